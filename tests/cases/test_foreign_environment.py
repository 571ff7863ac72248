"""Variables of the caller's shell that name another repo, or lead bash astray, change nothing: not there, not here."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from farm_calls import A, Caller, bytes_below
from paths import SCRIPTS
from sandbox import git, run

LOCAL = subprocess.run(["git", "rev-parse", "--local-env-vars"], capture_output=True, text=True,
                       check=True).stdout.split()
KEPT = ("GIT_CONFIG_PARAMETERS", "GIT_CONFIG_COUNT")
NAMES = sorted({*LOCAL, "GIT_NAMESPACE", "GIT_CEILING_DIRECTORIES", "GIT_LITERAL_PATHSPECS", "GIT_GLOB_PATHSPECS",
                "GIT_ICASE_PATHSPECS", "GIT_QUARANTINE_PATH", "GIT_EXTERNAL_DIFF", "CDPATH"} - {*KEPT})


@pytest.fixture
def other(make_repo) -> Path:
    """Somebody's repo with work that is not saved."""
    repo = make_repo("other", files={"a.txt": "one\n"})
    (repo / "a.txt").write_text("an edit\n")
    (repo / "untracked").write_text("new\n")
    return repo


@pytest.fixture
def farm(make_repo) -> Caller:
    return Caller(make_repo("app", files={"a.txt": "app\n"}), os.getpid())


def foreign(other: Path, name: str) -> dict[str, str]:
    values = {
        "GIT_DIR": other / ".git", "GIT_COMMON_DIR": other / ".git", "GIT_WORK_TREE": other,
        "GIT_INDEX_FILE": other / ".git/index", "GIT_OBJECT_DIRECTORY": other / ".git/objects",
        "GIT_ALTERNATE_OBJECT_DIRECTORIES": other / ".git/objects", "GIT_CONFIG": other / ".git/config",
        "GIT_CEILING_DIRECTORIES": other.parent, "CDPATH": f".:{other.parent}", "GIT_NAMESPACE": "theirs",
        "GIT_PREFIX": "sub/", "GIT_EXTERNAL_DIFF": "false", "GIT_QUARANTINE_PATH": other / ".git/objects"
    }
    return {name: str(values.get(name, "1"))}


def everything(other: Path) -> dict[str, str]:
    return {key: value for name in NAMES for key, value in foreign(other, name).items()}


def state_of(repo: Path) -> dict:
    return {**bytes_below(repo, but=()), "HEAD": git(repo, "symbolic-ref", "HEAD"), "refs": git(repo, "for-each-ref")}


@pytest.mark.parametrize("name", ["all of them", *NAMES])
def test_a_task_goes_its_whole_way_and_the_other_repo_stays_as_it_is(farm, other, name):
    before = state_of(other)
    env = everything(other) if name == "all of them" else foreign(other, name)
    farm.ok("add", "one", env=env)
    if name in ("all of them", "GIT_DIR", "GIT_INDEX_FILE", "CDPATH"):
        farm.ok("run", "-n", "1", "--agent", "echo x >f", "--gate", "true", "--until-drained", env=env, timeout=60)
        assert git(farm.repo, "ls-tree", "--name-only", "main").split() == ["a.txt", "f"]
    else:
        farm.ok("claim", A, "--owner-pid", str(os.getpid()), env=env)
        run([SCRIPTS / "mk-worktrees.sh", "-C", farm.repo, "-n", "1"], env=env, check=True)
        tree = farm.repo.parent / "app-farm" / f"{A}-worktree"
        run([SCRIPTS / "agent/start-task.sh", "-a", A, "-t", "t-0001", "-b", "main", tree], env=env, check=True)
        (tree / "g").write_text("unsaved\n")
        assert "refs/farm/rescue" in run([SCRIPTS / "rescue.sh", "save", "-C", farm.repo, tree], env=env,
                                         check=True).stdout
    assert state_of(other) == before


VERBS = [["tasks"], ["status"], ["queue"], ["locks"], ["doctor"], ["cancel", "t-0001"], ["retry", "t-0001"], ["report"],
         ["rescue", "list"], ["merge"], ["clean"], ["logs", "1"], ["attach", "1"], ["send", "1", "x"], ["pause"],
         ["resume"], ["down", "--now"], ["estop"], ["lock", A, "x", "--owner-pid",
                                                    str(os.getpid())], ["unlock", A, "x"],
         ["with-lock", "y", "--", "true"], ["claim", A, "--owner-pid",
                                            str(os.getpid())], ["renew", A, "--fence", "t-0001.2"],
         ["submit", A, "--fence", "t-0001.2"], ["fail", A, "--fence", "t-0001.2", "--why", "x"],
         ["release", A, "--fence", "t-0001.2"], ["finish", A, "--fence", "t-0001.2"], ["answer", A],
         ["hook"], ["completion", "words", "1", "--", "farm", "a"], ["up", "-n", "1", "--agent", "true"],
         ["down", "--now"]]


def test_every_verb_leaves_the_other_repo_alone(farm, other):
    before, env = state_of(other), everything(other)
    farm.ok("add", "one")
    for argv in VERBS:
        farm(*argv, env=env, timeout=60)
    assert state_of(other) == before


def test_every_script_leaves_the_other_repo_alone(farm, other):
    before, env = state_of(other), everything(other)
    head = git(farm.repo, "rev-parse", "HEAD")
    words = {
        "land.sh": ["-b", "main", "-o", head, "-n", head], "pins.sh": ["set", "refs/farm/ready/x", head],
        "rescue.sh": ["list"], "gate-slot.sh": ["prepare", farm.repo.parent / "slot", head],
        "look.sh": ["work", "-b", "main"], "find-checkout.sh": ["main"],
        "mk-worktrees.sh": ["-n", "1"], "setup-worktree.sh": [farm.repo], "repair-worktree.sh": [farm.repo / "no"]
    }
    for script in sorted(SCRIPTS.rglob("*.sh")):
        if script.name in ("common.sh", "clean-tree.sh", "make-venv.sh", "install-into.sh", "run-agent.sh", "run-task.sh"):
            continue
        args = words.get(script.name, [])
        verb = [args.pop(0)] if script.name in ("gate-slot.sh", "rescue.sh", "pins.sh", "look.sh") else []
        run(["bash", script, *verb, "-C", farm.repo, *args], env=env, cwd=farm.repo, input="")
    run([SCRIPTS / "merge/gate-slot.sh", "remove", farm.repo.parent / "slot"])
    assert state_of(other) == before


def test_an_alias_typed_in_a_linked_worktree_leaves_that_on_its_branch(farm, sandbox):
    mine = sandbox.work / "feat"
    git(farm.repo, "worktree", "add", "-q", "-b", "feat", mine)
    git(farm.repo, "config", "alias.farm",
        "!" + " ".join(farm.argv("run", "-n", "1", "--agent", "'echo x >f'", "--until-drained")))
    farm.ok("add", "one")
    run(["git", "farm"], cwd=mine, check=True, timeout=60)
    assert git(mine, "symbolic-ref", "HEAD") == "refs/heads/feat"


def test_what_names_no_repo_is_kept(farm):
    env = {
        "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "user.name", "GIT_CONFIG_VALUE_0": "Kept",
        "GIT_AUTHOR_NAME": "Author"
    }
    farm.ok("add", "one")
    farm.ok("run", "-n", "1", "--agent", "echo x >f; git add f; git commit -qm x", "--gate", "true", "--until-drained",
            env=env, timeout=60)
    assert "Author" in git(farm.repo, "log", "--format=%an", "main").splitlines()


def test_a_function_of_the_callers_called_git_is_not_ours(farm):
    farm.ok("add", "one", env={"BASH_FUNC_git%%": "() { return 1; }"})
    assert farm("doctor", env={"BASH_FUNC_git%%": "() { return 1; }",
                               "SHELLOPTS": "braceexpand:nounset"}).returncode == 0
