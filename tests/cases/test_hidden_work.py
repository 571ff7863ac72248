"""Work that git status does not show, and work that is not on the task's branch: kept, submitted, or returned with
the way out."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from farm_calls import A, Caller, files_of, tree_of
from paths import SCRIPTS
from sandbox import git, run

INNER = "git init -q lib && echo precious >lib/code && git -C lib add -A && git -C lib commit -qm inner"


def drain(app: Caller, agent: str, code: int = 0, title: str = "one", *options: str, **env: str) -> str:
    app.ok("add", title, *options)
    done = app("run", "-n", "1", "--agent", agent, "--gate", "true", "--until-drained",
                env={"FARM_GRACE_SECONDS": "2", **env}, timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr


def find_text(root: Path, name: str) -> list[Path]:
    return [path for path in root.rglob(name) if path.is_file() and path.read_text() == "precious\n"]


def test_a_repo_inside_is_left_out_of_the_commit_and_clean_keeps_it(app):
    drain(app, f"{INNER}; echo x >f")
    assert files_of(app) == ["a.txt", "f"]
    done = app("clean")
    assert done.returncode == 4 and "a repo of its own is inside (lib)" in done.stdout
    assert find_text(app.repo.parent, "code")


def test_a_repo_inside_moves_away_whole_before_the_next_task(app):
    drain(app, f"{INNER}; echo x >f")
    drain(app, "echo y >g", title="two")
    kept = find_text(app.repo.parent / "app-farm/kept", "code")
    assert len(kept) == 1 and git(kept[0].parent, "log", "--format=%s") == "inner"


def test_a_linked_worktree_in_an_ignored_folder_is_kept(app):
    (app.repo / ".git/info/exclude").write_text(".claude/\n")
    drain(app,
          "git worktree add -q .claude/worktrees/sub -b sub; echo precious >.claude/worktrees/sub/code; echo x >f")
    assert app("clean").returncode == 4 and find_text(app.repo.parent, "code")


@pytest.mark.parametrize("mark", ["--assume-unchanged", "--skip-worktree"])
def test_edits_that_git_was_told_not_to_look_at_are_rescued(app, mark):
    drain(app, f"git update-index {mark} a.txt; echo precious >a.txt; echo x >f")
    drain(app, "echo y >g", title="two")
    refs = git(app.repo, "for-each-ref", "--format=%(refname)", "refs/farm/rescue").split()
    assert "precious" in [git(app.repo, "show", f"{ref}:a.txt") for ref in refs]
    assert (tree_of(app) / "a.txt").read_text() == "one\n"


def test_clean_says_how_many_ignored_files_went(app):
    (app.repo / ".git/info/exclude").write_text("*.log\n")
    drain(app, "echo x >f; touch a.log b.log")
    assert "2 ignored files" in app.ok("clean")


def test_a_link_to_a_commit_that_nobody_has_does_not_land(app):
    drain(app, f"{INNER}; git add lib 2>/dev/null; git commit -qm all", 5, "one", "--max-attempts", "1")
    task = app.task("t-0001")
    assert "lib is a repo of its own" in task["reason"] and ".gitmodules" in task["reason"]
    assert "git submodule add" in (app.folder / "returns/t-0001.1.txt").read_text()
    assert files_of(app) == ["a.txt"]


def test_a_submodule_whose_commit_no_remote_has_does_not_land(app, make_repo):
    library = make_repo("library")
    agent = (
        f"git -c protocol.file.allow=always submodule --quiet add {library} lib && cd lib && echo x >x && git add x && "
        "git -c user.name=a -c user.email=a@b commit -qm mine && cd .. && git add -A && git commit -qm all")
    drain(app, agent, 5, "one", "--max-attempts", "1")
    assert "which no remote of that submodule has" in app.task("t-0001")["reason"]


def test_a_submodule_at_a_commit_of_its_remote_lands(app, make_repo):
    drain(app,
          f"git -c protocol.file.allow=always submodule --quiet add {make_repo('library')} lib && git commit -qm all")
    assert "lib" in files_of(app)


@pytest.mark.parametrize("agent", [
    "git switch -qc feature/mine; echo x >f; git add -A; git commit -qm x",
    "git switch -qc feature/mine; echo x >f",
    "git switch -q --detach; echo x >f; git add -A; git commit -qm x",
    "git switch -q --detach; echo x >f",
    "git branch -m renamed; echo x >f; git add -A; git commit -qm x",
    "echo x >f; git add -A; git commit -qm x; git switch -q --detach HEAD~",
], ids=["branch", "branch, not committed", "detached", "detached, not committed", "renamed", "went back"])
def test_work_on_another_branch_or_on_none_is_taken(app, agent):
    drain(app, agent)
    assert files_of(app) == ["a.txt", "f"]


@pytest.mark.parametrize("way", ["git switch -qc mine", "git switch -q --detach", "true"])
def test_an_attempt_that_is_killed_on_another_branch_or_on_none_goes_on_from_there(app, way):
    first = f'{way}; echo x >f; git add -A; git commit -qm x; echo z >z; kill -9 $$'
    drain(app, f'if [ "$FARM_ATTEMPT" = 1 ]; then {first}; fi; test -e f && echo y >g')
    assert files_of(app) == ["a.txt", "f", "g"] and app.task("t-0001")["attempts"] == 1


def test_what_is_left_on_somebodys_branch_is_committed_on_none(app):
    git(app.repo, "branch", "theirs")
    drain(app, "git switch -q theirs; echo x >f")
    assert files_of(app, "theirs") == ["a.txt"] and files_of(app) == ["a.txt", "f"]


def test_an_end_in_the_middle_of_a_conflict_is_not_committed(app):
    agent = (
        "git switch -qc other; echo two >a.txt; git commit -qam two; git switch -q -; echo three >a.txt; git commit -qam three; "
        "git merge -q other; true")
    drain(app, agent, 5, "one", "--max-attempts", "1")
    assert "conflicts that are not resolved" in app.task("t-0001")["reason"]


def test_entries_of_the_stash_are_named(app):
    drain(app, "echo y >a.txt; git stash -q; echo x >f")
    assert "stash@{0}" in (app.folder / "logs" / f"{A}.log").read_text()


def test_untracked_work_is_seen_whatever_status_is_told_to_show(app):
    git(app.repo, "config", "status.showUntrackedFiles", "no")
    drain(app, "echo x >f")
    assert files_of(app) == ["a.txt", "f"]


def test_files_of_worktreeinclude_reach_worktrees_and_slots_that_are_there(app):
    (app.repo / ".gitignore").write_text(".env\n")
    (app.repo / ".env").write_text("S=1\n")
    git(app.repo, "add", "-A")
    git(app.repo, "commit", "-q", "-m", "ignore")
    drain(app, "echo x >f")
    (app.repo / ".worktreeinclude").write_text(".env\n")
    git(app.repo, "add", "-A")
    git(app.repo, "commit", "-q", "-m", "include")
    app.ok("add", "two")
    app.ok("run", "-n", "1", "--agent", "cp .env seen", "--gate", "grep -q S=1 .env", "--until-drained", timeout=60)
    (app.repo / ".env").write_text("S=2\n")
    app.ok("add", "three")
    app.ok("run", "-n", "1", "--agent", "cp .env again", "--gate", "grep -q S=2 .env", "--until-drained", timeout=60)
    assert git(app.repo, "show", "main:again") == "S=2"


def test_an_agents_own_edit_of_an_included_file_stays(app):
    (app.repo / ".git/info/exclude").write_text(".env\n.worktreeinclude\n")
    (app.repo / ".env").write_text("S=1\n")
    (app.repo / ".worktreeinclude").write_text(".env\n")
    drain(app, "echo mine >.env; echo x >f")
    (app.repo / ".env").write_text("S=2\n")
    drain(app, "cp .env seen", title="two")
    assert git(app.repo, "show", "main:seen") == "mine"


def test_a_branch_in_the_way_is_named_with_the_command_that_moves_it(app):
    git(app.repo, "branch", "farm")
    assert "branch -m farm old-farm" in app("doctor").stdout
    said = drain(app, "echo x >f", 1)
    assert "branch -m farm old-farm" in said


def test_a_branch_in_the_way_of_a_task_is_named_by_doctor(app):
    git(app.repo, "branch", "farm/agent-001/t-0001/x")
    assert "branch -m farm/agent-001/t-0001/x" in app("doctor").stdout


# -- scripts that must not go on when a question has failed


def test_land_moves_nothing_when_it_cannot_tell_where_the_branch_is_checked_out(app, sandbox):
    alone = sandbox.work / "alone"
    alone.mkdir()
    for path in (SCRIPTS / "merge").glob("*.sh"):
        (alone / path.name).write_bytes(path.read_bytes())
    (alone / "find-checkout.sh").write_text("#!/usr/bin/env bash\nexit 1\n")
    for path in alone.iterdir():
        path.chmod(0o755)
    old = git(app.repo, "rev-parse", "HEAD")
    new = git(app.repo, "commit-tree", "-p", old, "-m", "new", git(app.repo, "rev-parse", "HEAD^{tree}"))
    for script in ("land.sh", "recover-landing.sh"):
        done = run([alone / script, "-C", app.repo, "-b", "main", "-o", old, "-n", new])
        assert (done.returncode, git(app.repo, "rev-parse", "main"), git(app.repo, "status",
                                                                          "--porcelain")) == (1, old, "")


def test_a_gate_slot_that_git_cannot_compare_is_not_unchanged(app, sandbox):
    slot = sandbox.work / "slot"
    run([SCRIPTS / "merge/gate-slot.sh", "prepare", "-C", app.repo, slot, "HEAD"], check=True)
    next((app.repo / ".git/worktrees").glob("slot*/index")).write_text("garbage")
    assert run([SCRIPTS / "merge/gate-slot.sh", "check", slot, "HEAD"]).returncode in (1, 3)
    run([SCRIPTS / "merge/gate-slot.sh", "remove", slot], check=True)


def test_no_script_reads_what_matters_where_its_failure_is_lost():
    found = subprocess.run(["grep", "-rlF", "< <(", SCRIPTS], capture_output=True, text=True).stdout.split()
    assert [Path(name).name for name in found] == ["isolate.sh"], "and there it fails closed, as the script says"
