"""mk-worktrees.sh and setup-worktree.sh on real repos."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from paths import SCRIPTS
from sandbox import commit_files, git, run, write_files
from worktree_calls import ODD_NAME, entry, make, rows, status, worktree

# ---------------------------------------------------------------------------------------------- making


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


# ---------------------------------------------------------------------------------------------- setting up


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
