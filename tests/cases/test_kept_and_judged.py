"""More of what git status does not show, of where an agent's HEAD may be, and of names that stand in the way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from farm_calls import A, Caller, files_of, tree_of
from paths import SCRIPTS
from sandbox import commit_files, git, run, write_files


@pytest.fixture
def farm(make_repo) -> Caller:
    return Caller(make_repo("app", files={"a.txt": "one\n", "b.txt": "b\n"}), os.getpid())


def make_worktree(farm: Caller) -> Path:
    run([SCRIPTS / "mk-worktrees.sh", "-n", "1", "-C", farm.repo], check=True)
    return tree_of(farm)


def drain(farm: Caller, scripts: dict[str, str], *, code: int = 0) -> str:
    """Run a task for each script, all of it on one farm: title -> what the agent does, once."""
    for title in scripts:
        farm.ok("add", title, "--max-attempts", "1")
    cases = " ".join(f"'{title}') {words} ;;" for title, words in scripts.items())
    agent = f'case $FARM_TITLE in {cases} esac'
    done = farm("run", "-n", "1", "--agent", agent, "--gate", "true", "--until-drained",
                env={"FARM_GRACE_SECONDS": "2"}, timeout=90)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def state_of(farm: Caller, title: str) -> tuple[str, str]:
    task = next(task for task in farm.json("tasks") if task["title"] == title)
    return task["state"], task["reason"]


def read_log(farm: Caller) -> str:
    return (farm.folder / "logs" / f"{A}.log").read_text()


# -- what git status does not show


@pytest.mark.parametrize("make", ["git init -q --bare {0}", "git init -q {0}", "git clone -q --bare . {0}"],
                         ids=["bare", "no commit", "clone"])
@pytest.mark.parametrize("folder", ["cache/a/b/store", "cache/à la \"carte\""])
def test_clean_keeps_a_worktree_with_a_repo_however_deep_in_an_ignored_folder(farm, make, folder):
    (farm.repo / ".git/info/exclude").write_text("cache/\n")
    worktree = make_worktree(farm)
    (worktree / folder).parent.mkdir(parents=True)
    run(["bash", "-c", make.format('"$1"'), "bash", folder], cwd=worktree, check=True)
    done = run([SCRIPTS / "rm-worktrees.sh", "-C", farm.repo])
    assert done.returncode == 4 and f"a repo of its own is inside ({folder})" in done.stdout
    assert (worktree / folder).exists()


def test_a_folder_that_cannot_be_looked_into_is_kept(farm, sandbox):
    worktree = make_worktree(farm)
    broken = sandbox.root / "bin" / "find"
    write_files(broken.parent, {"find": '#!/bin/sh\ncase "$*" in *-print0*) exit 1 ;; esac\nexec /usr/bin/find "$@"\n'})
    broken.chmod(0o755)
    done = run([SCRIPTS / "rm-worktrees.sh", "-C", farm.repo], env={"PATH": f"{broken.parent}:{os.environ['PATH']}"})
    assert done.returncode == 4 and worktree.exists()


@pytest.mark.parametrize("mark", ["--assume-unchanged", "--skip-worktree"])
def test_an_unwatched_edit_of_a_file_of_any_name_is_rescued_before_the_next_task_and_by_clean(farm, mark):
    name = 'ä "b"\tc.txt'
    commit_files(farm.repo, {name: "one\n"})
    worktree = make_worktree(farm)
    git(worktree, "update-index", mark, name)
    (worktree / name).write_text("precious\n")
    run([SCRIPTS / "agent/start-task.sh", "-a", A, "-t", "t-0001", "-b", "main", worktree], check=True)
    ref = git(farm.repo, "for-each-ref", "--format=%(refname)", "refs/farm/rescue")
    assert git(farm.repo, "show", f"{ref}:{name}") == "precious" and (worktree / name).read_text() == "one\n"
    git(worktree, "update-index", mark, name)
    (worktree / name).write_text("precious again\n")
    done = run([SCRIPTS / "rm-worktrees.sh", "-C", farm.repo], check=True)
    assert git(farm.repo, "show",
               f"{done.stdout.split('rescued as ')[1].split(';')[0].strip()}:{name}") == "precious again"


def test_a_sparse_worktree_is_clean(farm):
    commit_files(farm.repo, {"in/a": "a\n", "out/b": "b\n"})
    worktree = make_worktree(farm)
    git(worktree, "sparse-checkout", "set", "in")
    run([SCRIPTS / "agent/start-task.sh", "-a", A, "-t", "t-0001", "-b", "main", worktree], check=True)
    assert not (worktree / "out").exists() and git(worktree, "status", "--porcelain") == ""
    assert "clean" in run([SCRIPTS / "rm-worktrees.sh", "-C", farm.repo], check=True).stdout
    assert git(farm.repo, "for-each-ref", "refs/farm") == ""


def test_repos_that_a_failed_attempt_leaves_are_moved_aside_whole(farm):
    worktree = make_worktree(farm)
    git(worktree, "init", "-q", "deep/ü/lib")
    commit_files(worktree / "deep/ü/lib", {"code": "precious\n"}, "inner")
    write_files(worktree / "deep/ü/lib", {"unsaved": "precious\n"})
    git(worktree, "clone", "-q", "--bare", "deep/ü/lib", "store.git")
    run([SCRIPTS / "agent/start-task.sh", "-a", A, "-t", "t-0001", "-b", "main", worktree], check=True)
    kept = sorted(path for path in (worktree.parent / "kept" / A).rglob("*") if path.name in ("lib", "store.git"))
    assert [git(path, "log", "--format=%s", "HEAD") for path in kept] == ["inner", "inner"]
    assert (kept[0] / "unsaved").read_text() == "precious\n" and git(worktree, "status", "--porcelain") == ""
    rescued = git(farm.repo, "for-each-ref", "--format=%(refname)", "refs/farm/rescue").split()
    assert git(farm.repo, "grep", "-l", "precious", *rescued)


def test_unsaved_edits_in_a_submodule_survive_the_next_task(farm, make_repo):
    library = make_repo("library", files={"code": "one\n"})
    git(farm.repo, "submodule", "--quiet", "add", str(library), "lib")
    git(farm.repo, "commit", "-q", "-m", "lib")
    git(farm.repo, "config", "submodule.recurse", "true")
    worktree = make_worktree(farm)
    git(worktree, "submodule", "--quiet", "update", "--init")
    (worktree / "lib/code").write_text("precious\n")
    (worktree / "a.txt").write_text("edit\n")
    run([SCRIPTS / "agent/start-task.sh", "-a", A, "-t", "t-0001", "-b", "main", worktree])
    assert (worktree / "lib/code").read_text() == "precious\n"


def test_a_repo_whose_name_git_quotes_is_no_link_in_main(farm):
    make = 'git init -q "l\\"ä" && git -C "l\\"ä" commit -q --allow-empty -m inner; git init -q --bare store; echo x >f'
    drain(farm, {"one": make})
    assert files_of(farm) == ["a.txt", "b.txt", "f"]
    assert "is a repo of its own" in read_log(farm)


def test_links_whose_commits_no_remote_has_go_back_also_beside_one_that_is_pushed(farm, make_repo):
    for name in ("first", "second"):
        library = make_repo(name, files={"code": name})
        git(farm.repo, "submodule", "--quiet", "add", str(library), name)
    git(farm.repo, "commit", "-q", "-m", "libraries")
    update = "git submodule --quiet update --init; "
    drain(
        farm, {
            "unpushed": update
            + "(cd first; git switch -qc x; git commit -q --allow-empty -m p; git push -q origin x); "
            "(cd second; git commit -q --allow-empty -m q); git add -A; git commit -qm both",
            "by hand": "git init -q third; git -C third commit -q --allow-empty -m t; git add third 2>/dev/null; "
            "git config -f .gitmodules submodule.third.path third; git config -f .gitmodules submodule.third.url ../third; "
            "git add -A; git commit -qm third", "pushed": update +
            "(cd first; git switch -q --detach; git commit -q --allow-empty -m z; git push -q origin HEAD:refs/heads/y); "
            "git add -A; git commit -qm first",
        }, code=5)
    for title, path in (("unpushed", "second"), ("by hand", "third")):
        state, reason = state_of(farm, title)
        assert state == "failed" and reason.startswith(path) and "which no remote of that submodule has" in reason
    assert state_of(farm, "pushed")[0] == "landed", read_log(farm) + "the task before has left nothing behind"
    second = git(tree_of(farm) / "second", "for-each-ref", "--format=%(subject)", "refs/farm/kept")
    assert second == "q", "nor is its commit lost"


# -- where HEAD is


def test_head_is_judged_wherever_it_is(farm):
    commit = "git add -A; git commit -qm work"
    drain(
        farm, {
            "merge": f"git switch -qc o; echo o >m1; {commit}; git switch -q -; git switch -qc p; echo p >m2; {commit}; "
            "git merge -q --no-commit o",
            "bisect": f"echo x >k1; {commit}; echo x >k2; {commit}; git bisect start -q; git bisect bad; git bisect good main",
            "both": f"echo x >left; {commit}; git switch -qc side HEAD~; echo x >taken; {commit}",
            "itself": f"git switch -qc mine; echo x >i; {commit}; farm submit $FARM_AGENT_NAME --fence $FARM_FENCE",
            "fetched": "git switch -q --detach main", "pulled": "git merge -q main",
            "theirs": f"git switch -q --orphan new; echo x >z; {commit}",
            "rebase": f"echo x >r; {commit}; git switch -qc side2 HEAD~; echo y >r; {commit}; git rebase -q -x false main; true",
            "picks": f"echo 1 >p; {commit}; echo 2 >p; {commit}; git switch -qc q HEAD~2; echo 0 >p; {commit}; "
            "git cherry-pick HEAD@{1}~ HEAD@{1}; true",
        }, code=5)
    assert set(files_of(farm)) == {"a.txt", "b.txt", "m1", "m2", "k1", "k2", "taken", "i"}
    assert "the commits that only farm/agent-001/t-0003 has are not part of it" in read_log(farm)
    assert state_of(farm, "fetched") == state_of(farm, "pulled") == ("failed", "the agent ended without any change")
    assert "does not go on from where the task began" in state_of(farm, "theirs")[1]
    assert "in the middle of a rebase" in state_of(farm, "rebase")[1]
    assert state_of(farm, "picks")[0] == "failed"
    assert git(farm.repo, "show", "farm/agent-001/t-0003:left") == "x", "it stays on its branch"


def test_stash_entries_of_the_agent_are_named_pinned_and_come_back(farm, sandbox):
    (farm.repo / "b.txt").write_text("a person's\n")
    git(farm.repo, "stash", "-q")
    drain(farm, {"all": "echo precious >a.txt; git stash -q",
                 "own": "git switch -qc mine; echo more >a.txt; git stash push -q -m words; echo x >f"}, code=5)
    state, reason = state_of(farm, "all")
    assert state == "failed" and "git's stash" in reason and "WIP on farm/agent-001/t-0001" in reason
    assert state_of(farm, "own")[0] == "landed" and "On mine: words" in read_log(farm)
    assert "WIP on main" not in read_log(farm)
    git(farm.repo, "stash", "clear")
    refs = git(farm.repo, "for-each-ref", "--format=%(refname)", f"refs/farm/rescue/{A}").split()
    texts = set()
    for number, ref in enumerate(refs):
        into = sandbox.work / f"back-{number}"
        farm.ok("rescue", "restore", ref, "--into", str(into))
        texts.add((into / "a.txt").read_text())
    assert texts == {"precious\n", "more\n"}


# -- names in the way


def test_names_that_leave_no_room_are_found_and_others_are_left_alone(farm):
    for name in ("farm/docs/a/b", "farm/issue-123", "agent-001"):
        git(farm.repo, "branch", name)
    assert "in the way" not in farm("doctor").stdout
    git(farm.repo, "branch", "Farm")
    git(farm.repo, "config", "core.ignorecase", "false")
    assert "in the way" not in farm("doctor").stdout
    git(farm.repo, "config", "core.ignorecase", "true")
    assert "branch -m Farm old-Farm" in farm("doctor").stdout


@pytest.mark.parametrize("ref", ["refs/farm", "refs/farm/ready"])
def test_a_ref_where_the_pins_would_be_stops_the_farm_and_its_command_mends_it(farm, ref):
    git(farm.repo, "update-ref", ref, "HEAD")
    farm.ok("add", "one")
    done = farm("run", "-n", "1", "--agent", "echo x >f", "--gate", "true", "--until-drained")
    assert done.returncode == 1 and f"the ref {ref} is in the way" in done.stderr
    assert farm.task("t-0001")["attempts"] == 0
    command = done.stderr.split("  try: ")[-1].splitlines()[0]
    assert command in farm("doctor").stdout
    run(["bash", "-c", command], check=True)
    farm.ok("run", "-n", "1", "--agent", "echo x >f", "--gate", "true", "--until-drained", timeout=60)


def test_a_branch_below_an_agents_own_ends_the_run_and_outlives_clean(farm):
    make_worktree(farm)
    git(farm.repo, "branch", "farm/agent-001/t-0001/x")
    farm("clean")
    assert git(farm.repo, "rev-parse", "farm/agent-001/t-0001/x")
    git(farm.repo, "branch", "farm/agent-001/work/x")
    farm.ok("add", "one")
    done = farm("run", "-n", "1", "--agent", "echo x >f", "--until-drained")
    assert done.returncode == 1 and "branch -m farm/agent-001/work/x" in done.stderr


def test_tags_called_like_the_farms_branches_and_the_target_lead_nobody_astray(farm):
    for name in ("main", "farm/agent-001/work", "farm/agent-001/t-0001"):
        git(farm.repo, "tag", name)
    drain(farm, {"one": "echo x >f"})
    assert files_of(farm, "refs/heads/main") == ["a.txt", "b.txt", "f"]
    farm.ok("clean")
    assert git(farm.repo, "for-each-ref", "refs/heads/farm") == ""


def test_a_branch_that_only_lies_behind_the_target_is_no_work(farm):
    """A task that goes on from its branch, which has no commit of its own, while the target has moved."""
    farm.ok("add", "a task")
    worktree, branch = make_worktree(farm), f"farm/{A}/t-0001"
    git(worktree, "switch", "-qc", branch)
    base = commit_files(farm.repo, {"later.txt": "x\n"})
    fence = farm.claim(A)["fence"]
    env = {"FARM_AGENT_NAME": A, "FARM_WORKTREE": str(worktree), "FARM_BRANCH": branch, "FARM_BASE": base, "FARM_START": branch,
           "FARM_TARGET": "main", "FARM_REPO": str(farm.repo)}
    done = farm("submit", A, "--fence", fence, env=env)
    assert (done.returncode, f"{branch} has no commit of its own" in done.stderr) == (5, True), done.stderr
    commit_files(worktree, {"work.txt": "x\n"})
    farm.ok("submit", A, "--fence", fence, env=env)
    assert farm.task("t-0001")["state"] == "ready"
