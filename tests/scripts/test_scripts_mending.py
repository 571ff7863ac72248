"""repair-worktree.sh and rm-worktrees.sh on real repos."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

from paths import SCRIPTS
from sandbox import commit_files, git, run, wait_until, write_files
from worktree_calls import ODD_NAME, entry, make, rows, status, worktree


def remove(repo: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run([SCRIPTS / "rm-worktrees.sh", "-C", repo, *arguments])


def rescued(repo: Path, path: str) -> list[str]:
    """The text that `path` has in each rescue of `repo` which holds it."""
    refs = git(repo, "for-each-ref", "--format=%(refname)", "refs/farm/rescue").split()
    return [shown.stdout for ref in refs if (shown := run(["git", "-C", repo, "show", f"{ref}:{path}"])).returncode == 0]


# ---------------------------------------------------------------------------------------------- mending


def test_a_deleted_folder_comes_back_with_what_was_staged(make_repo):
    repo = make_repo()
    make(repo)
    write_files(worktree(repo), {"staged.txt": "staged\n"})
    git(worktree(repo), "add", "-A")
    shutil.rmtree(worktree(repo))
    make(repo)
    assert (worktree(repo) / "staged.txt").read_text() == "staged\n"


def test_a_deleted_folder_comes_back_on_its_detached_commit(make_repo):
    repo = make_repo()
    make(repo)
    git(worktree(repo), "switch", "-q", "--detach")
    own = commit_files(worktree(repo), {"own.txt": "own\n"})
    shutil.rmtree(worktree(repo))
    make(repo)
    assert (git(worktree(repo), "rev-parse", "HEAD"), status(worktree(repo))) == (own, "")


def test_a_deleted_git_file_comes_back_and_edits_stay(make_repo):
    repo = make_repo()
    make(repo)
    write_files(worktree(repo), {"README.md": "edited\n"})
    (worktree(repo) / ".git").unlink()
    make(repo)
    assert status(worktree(repo)) == " M README.md"


def test_a_pruned_entry_is_made_anew_and_the_files_are_rescued(make_repo):
    repo = make_repo()
    make(repo)
    write_files(worktree(repo), {"README.md": "edited\n", "new.txt": "new\n"})
    shutil.rmtree(entry(repo))
    done = make(repo)
    assert (len(rows(done)), rescued(repo, "README.md"), rescued(repo, "new.txt")) == (1, ["edited\n"], ["new\n"])


def test_an_entry_without_head_is_mended_from_its_log(make_repo):
    repo = make_repo()
    make(repo)
    own = commit_files(worktree(repo), {"own.txt": "own\n"})
    (entry(repo) / "HEAD").write_text("")
    make(repo)
    assert git(worktree(repo), "rev-parse", "HEAD") == own


def test_a_moved_folder_is_known_to_git_again(make_repo):
    repo = make_repo()
    make(repo)
    parent = worktree(repo).parent
    moved = parent.rename(parent.with_name("moved"))
    make(repo, 1, "-d", moved)
    assert git(repo, "worktree", "list", "--porcelain").count(str(moved)) == 1


def test_a_copy_of_a_worktree_is_not_taken_for_it(make_repo):
    repo = make_repo()
    make(repo)
    copy = worktree(repo).parent.with_name("copies")
    shutil.copytree(worktree(repo), copy / "agent-001-worktree")
    assert make(repo, 1, "-d", copy, check=False).returncode == 4


def test_an_interrupted_entry_without_files_is_made_anew(make_repo):
    repo = make_repo()
    git(repo, "worktree", "add", "-q", "--lock", "--no-checkout", "-b", "farm/agent-001/work", worktree(repo))
    (entry(repo) / "HEAD").write_text("0" * 40 + "\n")
    make(repo)
    assert status(worktree(repo)) == ""


def test_an_interrupted_checkout_is_finished_without_a_rescue(make_repo):
    repo = make_repo(files={"a.txt": "a\n", "b.txt": "b\n"})
    git(repo, "worktree", "add", "-q", "--lock", "--no-checkout", "-b", "farm/agent-001/work", worktree(repo))
    write_files(worktree(repo), {"a.txt": "a\n"})
    (entry(repo) / "index.lock").touch()
    make(repo)
    assert (status(worktree(repo)), git(repo, "for-each-ref", "refs/farm/rescue")) == ("", "")


def test_work_in_an_unfinished_worktree_is_rescued_before_it_is_finished(make_repo):
    repo = make_repo(files={"a.txt": "a\n", "b.txt": "b\n"})
    git(repo, "worktree", "add", "-q", "--lock", "--no-checkout", "-b", "farm/agent-001/work", worktree(repo))
    write_files(worktree(repo), {"a.txt": "work\n"})
    make(repo)
    assert ((worktree(repo) / "a.txt").read_text(), rescued(repo, "a.txt")) == ("a\n", ["work\n"])


def test_a_killed_creation_is_finished_by_the_next_call(make_repo):
    repo = make_repo(files={f"d{n % 7}/f{n}.txt": f"{n}\n" * 200 for n in range(400)})
    command = [str(SCRIPTS / "mk-worktrees.sh"), "-C", str(repo), "-n", "4"]
    call = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_until((worktree(repo, 2) / ".git").exists, message="the second worktree")
    os.killpg(call.pid, signal.SIGKILL)
    call.wait()
    make(repo, 4)
    assert [status(worktree(repo, n)) for n in (1, 2, 3, 4)] == [""] * 4


# ---------------------------------------------------------------------------------------------- removing


def test_clean_worktrees_and_their_merged_branches_are_removed(make_repo):
    repo = make_repo()
    make(repo, 2)
    done = remove(repo)
    left = git(repo, "for-each-ref", "--format=%(refname)"), git(repo, "worktree", "list").count("\n")
    assert (done.returncode, [row[:2] for row in rows(done)], left) == (
        0,
        [["agent-001", "removed"], ["agent-002", "removed"]],
        ("refs/heads/main", 0),
    )


def test_removed_files_are_deleted_in_the_background(make_repo):
    repo = make_repo()
    make(repo, 2)
    remove(repo)
    wait_until(lambda: not worktree(repo).parent.exists(), message="the farm's folder to go")


def test_only_the_named_worktree_is_removed(make_repo):
    repo = make_repo()
    make(repo, 2)
    remove(repo, "agent-002")
    assert (worktree(repo, 1).exists(), worktree(repo, 2).exists()) == (True, False)


def test_unsaved_work_is_rescued_before_its_worktree_goes(make_repo):
    repo = make_repo()
    make(repo)
    write_files(worktree(repo), {"new.txt": "new\n"})
    remove(repo)
    assert (worktree(repo).exists(), rescued(repo, "new.txt")) == (False, ["new\n"])


def test_a_branch_with_unmerged_commits_stays(make_repo):
    repo = make_repo()
    make(repo)
    own = commit_files(worktree(repo), {"own.txt": "own\n"})
    remove(repo)
    assert (worktree(repo).exists(), git(repo, "rev-parse", "farm/agent-001/work")) == (False, own)


def test_a_branch_that_a_pin_holds_is_deleted(make_repo):
    repo = make_repo()
    make(repo)
    git(repo, "update-ref", "refs/farm/ready/t-0001", commit_files(worktree(repo), {"own.txt": "own\n"}))
    remove(repo)
    assert git(repo, "for-each-ref", "refs/heads/farm") == ""


def test_detached_commits_are_pinned_before_their_worktree_goes(make_repo):
    repo = make_repo()
    make(repo)
    git(worktree(repo), "switch", "-q", "--detach")
    commit_files(worktree(repo), {"own.txt": "own\n"})
    remove(repo)
    assert (worktree(repo).exists(), rescued(repo, "own.txt")) == (False, ["own\n"])


def test_a_worktree_that_somebody_is_in_is_kept(make_repo):
    repo = make_repo(files={"d/a.txt": "a\n"})
    make(repo)
    with subprocess.Popen(["sleep", "60"], cwd=worktree(repo) / "d") as inside:
        done = remove(repo)
        inside.kill()
    assert (done.returncode, rows(done)[0][1], worktree(repo).exists()) == (4, "kept", True)


def test_a_dirty_worktree_is_kept_where_rescue_is_missing(make_repo, sandbox):
    repo = make_repo()
    make(repo)
    write_files(worktree(repo), {"new.txt": "new\n"})
    shutil.copy(SCRIPTS / "rm-worktrees.sh", sandbox.work / "rm-worktrees.sh")
    done = run([sandbox.work / "rm-worktrees.sh", "-C", repo])
    assert (done.returncode, (worktree(repo) / "new.txt").exists()) == (4, True)


def test_a_worktree_with_a_repo_of_its_own_inside_is_kept(make_repo):
    repo = make_repo()
    make(repo)
    git(worktree(repo), "init", "-q", "inner")
    commit_files(worktree(repo) / "inner", {"a.txt": "a\n"})
    done = remove(repo)
    assert (done.returncode, (worktree(repo) / "inner" / ".git").exists()) == (4, True)


def test_what_a_worktrees_git_file_names_is_no_reason_to_remove_links_there(make_repo):
    """An agent may have made it name another repo, whose links git would not follow here."""
    repo, other = make_repo(), make_repo("other")
    make(repo)
    for place in (other / ".git/link", entry(repo) / "link"):
        place.symlink_to("nowhere")
    own = (worktree(repo) / ".git").read_text()
    (worktree(repo) / ".git").write_text(f"gitdir: {other}/.git\n")
    remove(repo)
    assert (other / ".git/link").is_symlink()
    (worktree(repo) / ".git").write_text(own)
    (worktree(repo) / "unsaved.txt").write_text("unsaved\n")
    run([SCRIPTS / "agent/judge-trees.sh", worktree(repo).parent, repo.parent, "agent-001"], check=True)
    assert not (entry(repo) / "link").is_symlink() and "unsaved.txt" in (repo.parent / "agent-001").read_text()


def test_leftovers_of_a_killed_removal_are_deleted(make_repo):
    repo = make_repo()
    make(repo)
    left = worktree(repo).parent / ".trash-1-agent-009"
    write_files(left, {"d/a.txt": "a\n"})
    (left / "d").chmod(0o500)
    remove(repo, "agent-001")
    wait_until(lambda: not left.exists(), message="the leftovers to go")


def test_removing_from_an_odd_path_works(make_repo):
    repo = make_repo(ODD_NAME)
    make(repo)
    assert (remove(repo).returncode, worktree(repo).exists()) == (0, False)


def test_removing_twice_is_fine(make_repo):
    repo = make_repo()
    make(repo)
    remove(repo)
    assert remove(repo).returncode == 0


def test_an_unknown_name_is_not_found(make_repo):
    repo = make_repo()
    make(repo)
    assert remove(repo, "agent-077").returncode == 3


def test_removed_worktrees_can_be_made_again_at_once(make_repo):
    repo = make_repo()
    make(repo, 2)
    remove(repo)
    assert [row[3] for row in rows(make(repo, 2))] == ["created", "created"]


def test_a_worktree_whose_folder_was_deleted_is_removed_and_its_staged_work_rescued(make_repo):
    repo = make_repo()
    make(repo)
    write_files(worktree(repo), {"staged.txt": "staged\n"})
    git(worktree(repo), "add", "-A")
    shutil.rmtree(worktree(repo).parent)
    remove(repo)
    assert (entry(repo).exists(), rescued(repo, "staged.txt")) == (False, ["staged\n"])


def test_a_removal_leaves_no_folder_where_there_was_no_farm(make_repo):
    repo = make_repo()
    remove(repo)
    wait_until(lambda: not worktree(repo).parent.exists(), message="the empty folder to go")
