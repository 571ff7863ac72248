"""mk-worktrees.sh, repair-worktree.sh, setup-worktree.sh and rm-worktrees.sh on real repos."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import SCRIPTS, commit_files, git, run, wait_until, write_files

ODD_NAME = "a b'c\"d $HOME;#{pid} é\n*x"


def unescape(field: str) -> str:
    """Turn a field of a script's TSV back into the text that it stands for."""
    return re.sub(r"\\(.)", lambda match: {"t": "\t", "n": "\n", "r": "\r"}.get(match[1], match[1]), field)


def make(repo: Path, count: int = 1, *options: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run([SCRIPTS / "mk-worktrees.sh", "-C", repo, "-n", str(count), *options], check=check)


def rows(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    return [[unescape(field) for field in line.split("\t")] for line in done.stdout.splitlines()]


def remove(repo: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run([SCRIPTS / "rm-worktrees.sh", "-C", repo, *arguments])


def worktree(repo: Path, number: int = 1) -> Path:
    return repo.parent / f"{repo.name}-farm" / f"agent-{number:03d}-worktree"


def entry(repo: Path, number: int = 1) -> Path:
    return repo / ".git" / "worktrees" / worktree(repo, number).name


def status(folder: Path) -> str:
    return git(folder, "status", "--porcelain")


def rescued(repo: Path, path: str) -> list[str]:
    """The text that `path` has in each rescue of `repo` which holds it."""
    refs = git(repo, "for-each-ref", "--format=%(refname)", "refs/farm/rescue").split()
    return [shown.stdout for ref in refs if (shown := run(["git", "-C", repo, "show", f"{ref}:{path}"])).returncode == 0]


# --- making -----------------------------------------------------------------------------------------------------------


def test_it_prints_name_branch_path_and_created(make_repo):
    repo = make_repo()
    assert rows(make(repo, 2)) == [
        ["agent-001", "farm/agent-001/work", str(worktree(repo, 1)), "created"],
        ["agent-002", "farm/agent-002/work", str(worktree(repo, 2)), "created"],
    ]


def test_each_worktree_is_clean_and_has_every_file(make_repo):
    repo = make_repo(files={"a.txt": "a\n", "d/b.txt": "b\n", ".gitattributes": "*.txt text\n"})
    make(repo, 3)
    assert [(status(worktree(repo, n)), (worktree(repo, n) / "d/b.txt").read_text()) for n in (1, 2, 3)] == [("", "b\n")] * 3


def test_a_second_call_reuses_every_worktree_as_it_is(make_repo):
    repo = make_repo()
    make(repo)
    write_files(worktree(repo), {"README.md": "edited\n", "new.txt": "new\n"})
    done = make(repo)
    assert (rows(done)[0][3], status(worktree(repo))) == ("reused", " M README.md\n?? new.txt")


def test_a_larger_count_adds_only_what_is_missing(make_repo):
    repo = make_repo()
    make(repo)
    assert [row[3] for row in rows(make(repo, 3))] == ["reused", "created", "created"]


def test_reuse_prints_the_branch_that_the_worktree_is_on_now(make_repo):
    repo = make_repo()
    make(repo)
    git(worktree(repo), "switch", "-q", "-c", "farm/agent-001/t-0007")
    assert rows(make(repo))[0][1] == "farm/agent-001/t-0007"


def test_reuse_prints_a_dash_for_a_detached_head(make_repo):
    repo = make_repo()
    make(repo)
    git(worktree(repo), "switch", "-q", "--detach")
    assert rows(make(repo))[0][1] == "-"


def test_every_new_worktree_is_locked_against_pruning(make_repo):
    repo = make_repo()
    make(repo)
    assert (entry(repo) / "locked").exists()


def test_base_names_the_commit_to_start_from(make_repo):
    repo = make_repo(commits=3)
    make(repo, 1, "-b", "HEAD~2")
    assert git(worktree(repo), "rev-parse", "HEAD") == git(repo, "rev-parse", "HEAD~2")


def test_base_means_the_branch_where_a_tag_has_the_same_name(make_repo):
    repo = make_repo(commits=2)
    git(repo, "tag", "main", "HEAD~1")
    make(repo, 1, "-b", "main")
    assert git(worktree(repo), "rev-parse", "HEAD") == git(repo, "rev-parse", "refs/heads/main")


def test_a_branch_with_an_odd_name_can_be_the_base(make_repo):
    repo = make_repo(branch="feature/ä'b\"c$d")
    assert rows(make(repo, 1, "-b", "feature/ä'b\"c$d"))[0][3] == "created"


def test_no_upstream_is_configured_for_a_remote_base(make_repo, sandbox):
    origin = make_repo("origin")
    clone = sandbox.work / "clone"
    git(sandbox.work, "clone", "-q", origin, clone)
    make(clone, 1, "-b", "origin/main")
    assert run(["git", "-C", clone, "config", "--get-regexp", r"branch\.farm"]).stdout == ""


def test_the_prefix_names_folders_and_branches(make_repo):
    repo = make_repo()
    assert [row[:2] for row in rows(make(repo, 1, "-p", "bot"))] == [["bot-001", "farm/bot-001/work"]]


def test_the_folder_can_be_chosen(make_repo, sandbox):
    repo = make_repo()
    assert rows(make(repo, 1, "-d", sandbox.work / "else where"))[0][2] == str(sandbox.work / "else where" / "agent-001-worktree")


def test_farm_worktrees_in_the_environment_chooses_the_folder(make_repo, sandbox, monkeypatch):
    monkeypatch.setenv("FARM_WORKTREES", str(sandbox.work / "elsewhere"))
    assert rows(make(make_repo()))[0][2] == str(sandbox.work / "elsewhere" / "agent-001-worktree")


def test_an_odd_repo_path_is_printed_escaped_on_one_line(make_repo):
    repo = make_repo(ODD_NAME)
    assert rows(make(repo, 2))[1] == ["agent-002", "farm/agent-002/work", str(worktree(repo, 2)), "created"]


def test_an_odd_repo_path_is_reused(make_repo):
    repo = make_repo(ODD_NAME)
    make(repo, 2)
    assert [row[3] for row in rows(make(repo, 2))] == ["reused", "reused"]


def test_a_call_from_a_subfolder_means_the_same_repo(make_repo):
    repo = make_repo(files={"d/e/f.txt": "f\n"})
    assert rows(make(repo / "d" / "e"))[0][2] == str(worktree(repo))


def test_a_call_from_a_worktree_means_the_same_repo(make_repo):
    repo = make_repo()
    make(repo)
    assert [row[2:] for row in rows(make(worktree(repo), 2))] == [
        [str(worktree(repo, 1)), "reused"],
        [str(worktree(repo, 2)), "created"],
    ]


def test_the_script_works_copied_alone_into_another_repo(make_repo):
    repo = make_repo()
    shutil.copy(SCRIPTS / "mk-worktrees.sh", repo / "mk-worktrees.sh")
    done = run([repo / "mk-worktrees.sh", "-n", "2"], cwd=repo, check=True)
    assert [row[3] for row in rows(done)] == ["created", "created"]


def test_a_detached_main_worktree_gives_its_commit(make_repo):
    repo = make_repo(commits=2)
    git(repo, "switch", "-q", "--detach", "HEAD~1")
    make(repo)
    assert git(worktree(repo), "rev-parse", "HEAD") == git(repo, "rev-parse", "HEAD")


def test_edits_in_the_main_worktree_stay_there(make_repo):
    repo = make_repo()
    write_files(repo, {"README.md": "edited\n"})
    make(repo)
    assert (status(repo), status(worktree(repo))) == (" M README.md", "")


def test_a_shallow_clone_can_have_worktrees(make_repo, sandbox):
    origin, clone = make_repo("origin", commits=3), sandbox.work / "clone"
    git(sandbox.work, "clone", "-q", "--depth", "1", f"file://{origin}", clone)
    make(clone)
    assert status(worktree(clone)) == ""


def test_a_bare_repo_can_have_worktrees(make_repo, sandbox):
    bare = sandbox.work / "bare.git"
    git(sandbox.work, "clone", "-q", "--bare", make_repo("origin"), bare)
    assert rows(make(bare))[0][2] == str(sandbox.work / "bare-farm" / "agent-001-worktree")


def test_a_failing_post_checkout_hook_does_not_run(make_repo, sandbox):
    repo, mark = make_repo(), sandbox.work / "hook-ran"
    hook = repo / ".git" / "hooks" / "post-checkout"
    write_files(hook.parent, {hook.name: f"#!/bin/sh\ntouch {mark}\nexit 1\n"})
    hook.chmod(0o755)
    make(repo)
    assert not mark.exists()


def test_submodules_are_named_as_left_empty(make_repo):
    repo, other = make_repo(), make_repo("other")
    git(repo, "submodule", "--quiet", "add", other, "sub")
    git(repo, "commit", "-qm", "submodule")
    assert "submodules are left empty" in make(repo).stderr


def test_git_environment_of_a_calling_hook_is_ignored(make_repo, monkeypatch):
    repo, other = make_repo(), make_repo("other")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
    done = make(repo)
    assert rows(done)[0][2] == str(worktree(repo))


def test_two_calls_at_once_make_each_worktree_once(make_repo):
    repo = make_repo()
    command = [str(SCRIPTS / "mk-worktrees.sh"), "-C", str(repo), "-n", "6"]
    calls = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    states = [line.split("\t")[3] for call in calls for line in call.communicate()[0].splitlines()]
    assert sorted(states) == ["created"] * 6 + ["reused"] * 12


def test_a_branch_with_commits_of_its_own_is_not_moved(make_repo):
    repo = make_repo()
    git(repo, "switch", "-q", "-c", "farm/agent-001/work")
    own = commit_files(repo, {"own.txt": "own\n"})
    git(repo, "switch", "-q", "main")
    make(repo)
    assert git(worktree(repo), "rev-parse", "HEAD") == own


def test_a_branch_that_is_merged_starts_again_at_the_base(make_repo):
    repo = make_repo()
    git(repo, "branch", "farm/agent-001/work")
    commit_files(repo, {"later.txt": "later\n"})
    make(repo)
    assert git(worktree(repo), "rev-parse", "HEAD") == git(repo, "rev-parse", "main")


@pytest.mark.parametrize("count", ["0", "-1", "x", "", "1.5"])
def test_a_count_that_is_no_number_above_zero_is_a_usage_error(make_repo, count):
    assert run([SCRIPTS / "mk-worktrees.sh", "-C", make_repo(), "-n", count]).returncode == 2


def test_a_folder_without_git_is_a_usage_error(sandbox):
    assert make(sandbox.work, check=False).returncode == 2


def test_a_repo_without_commits_is_named_in_one_line(sandbox):
    git(sandbox.work, "init", "-q")
    done = make(sandbox.work, check=False)
    assert (done.returncode, "no commit yet" in done.stderr) == (3, True)


def test_an_unknown_base_lists_the_branches_there_are(make_repo):
    repo = make_repo(branch="trunk")
    git(repo, "branch", "other")
    done = make(repo, 1, "-b", "main", check=False)
    assert (done.returncode, "there are: other trunk" in done.stderr) == (3, True)


def test_a_folder_of_someone_elses_is_left_alone_and_the_others_are_made(make_repo):
    repo = make_repo()
    write_files(worktree(repo), {"mine.txt": "mine\n"})
    done = make(repo, 2, check=False)
    assert (done.returncode, [row[0] for row in rows(done)]) == (4, ["agent-002"])
    assert (worktree(repo) / "mine.txt").read_text() == "mine\n"


# --- mending ----------------------------------------------------------------------------------------------------------


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


# --- setting up -------------------------------------------------------------------------------------------------------


def test_ignored_files_of_worktreeinclude_are_copied_with_their_modes(make_repo):
    repo = make_repo(files={".gitignore": ".env*\n", ".worktreeinclude": ".env*\n"})
    write_files(repo, {"conf d/.env": "secret\n"})
    (repo / "conf d" / ".env").chmod(0o600)
    make(repo)
    copied = worktree(repo) / "conf d" / ".env"
    assert (copied.read_text(), copied.stat().st_mode & 0o777) == ("secret\n", 0o600)


def test_a_file_that_worktreeinclude_takes_out_again_is_not_copied(make_repo):
    repo = make_repo(files={".gitignore": ".env*\n", ".worktreeinclude": ".env*\n!.env.local\n"})
    write_files(repo, {".env.local": "no\n"})
    make(repo)
    assert not (worktree(repo) / ".env.local").exists()


def test_a_file_that_git_does_not_ignore_is_not_copied(make_repo):
    repo = make_repo(files={".worktreeinclude": "*.txt\n"})
    write_files(repo, {"untracked.txt": "mine\n"})
    make(repo)
    assert not (worktree(repo) / "untracked.txt").exists()


def setup_repo(make_repo, text: str) -> Path:
    repo = make_repo(files={".farm/setup": f"#!/bin/sh\n{text}\n", ".gitignore": "out.txt\nfail\n"})
    (repo / ".farm" / "setup").chmod(0o755)
    commit_files(repo, {})
    return repo


def test_the_setup_runs_in_the_worktree_and_knows_the_repo(make_repo):
    repo = setup_repo(make_repo, 'printf "%s %s" "$FARM_REPO" "$FARM_AGENT_NAME" >out.txt')
    make(repo)
    assert (worktree(repo) / "out.txt").read_text() == f"{repo} agent-001"


def test_the_output_of_a_failing_setup_is_in_the_log_that_is_named(make_repo):
    repo = setup_repo(make_repo, "echo broken pipe dream; exit 3")
    done = make(repo, check=False)
    log = repo / ".git" / "farm-setup-logs" / "agent-001.log"
    assert (done.returncode, str(log) in done.stderr, log.read_text()) == (1, True, "broken pipe dream\n")


def test_a_worktree_whose_setup_failed_has_no_row(make_repo):
    assert make(setup_repo(make_repo, "exit 3"), check=False).stdout == ""


def test_a_failed_setup_runs_again_at_the_next_call(make_repo):
    repo = setup_repo(make_repo, '[ ! -e "$FARM_REPO/fail" ]')
    (repo / "fail").touch()
    make(repo, check=False)
    (repo / "fail").unlink()
    assert len(rows(make(repo))) == 1


# --- removing ---------------------------------------------------------------------------------------------------------


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
