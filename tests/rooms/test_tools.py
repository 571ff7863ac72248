"""Missing and old tools."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from farm_calls import FARM, A, B, assert_is_error, fake_tool, living_process
from paths import ROOT, SCRIPTS
from sandbox import run

TOOLS = """awk basename bash cat chmod cksum cmp cp cut date dirname env expr find flock git grep head id kill ln ls make
mkdir mkfifo mktemp mv od perl ps pwd python3 readlink realpath rm rmdir sed sh sleep sort stat tail tee tmux touch tr uname uniq
wc xargs"""


@pytest.fixture
def path_without(sandbox):
    """A PATH on which all the tools are that the farm may use, but the named ones."""

    def make(*names: str) -> str:
        folder = sandbox.work / "bin"
        folder.mkdir()
        for tool in set(TOOLS.split()) - set(names):
            if shutil.which(tool):
                (folder / tool).symlink_to(shutil.which(tool))
        return str(folder)

    return make


@pytest.mark.parametrize("tool", ["git", "tmux"])
def test_a_missing_tool_exits_6_with_what_to_install(farm, path_without, tool):
    said = farm.refused(6, "up", "-n", "1", "--agent", "true", env={"PATH": path_without(tool)})
    assert [word for word in (tool, f"apt install {tool}", f"dnf install {tool}", f"brew install {tool}") if word not in said] == []


@pytest.mark.parametrize(
    ("tool", "says", "found", "needed"),
    [("git", "git version 2.25.1", "2.25", "2.30"), ("tmux", "tmux 2.8", "2.8", "3.0"), ("tmux", "tmux 1.9a", "1.9", "3.0")],
)
def test_a_tool_that_is_too_old_exits_6_with_both_versions(farm, sandbox, tool, says, found, needed):
    said = farm.refused(6, "up", "-n", "1", "--agent", "true", env={"PATH": fake_tool(sandbox.work / "fake", tool, says)})
    assert [word for word in (tool, found, needed, "apt", "dnf", "brew") if word not in said] == []


NEW_ENOUGH = {
    "git": ["git version 2.30.0", "git version 2.39.5 (Apple Git-154)", "git version 3.0.rc1", "git version 2.100.0.windows.1"],
    "tmux": ["tmux 3.0", "tmux 3.4a", "tmux next-3.5", "tmux master", "tmux 10.1"],
}


@pytest.mark.parametrize(("tool", "says"), [(tool, says) for tool in NEW_ENOUGH for says in NEW_ENOUGH[tool]])
def test_a_tool_that_is_new_enough_passes(sandbox, tool, says):
    done = run(["bash", SCRIPTS / "check-tools.sh", tool], env={"PATH": fake_tool(sandbox.work / "fake", tool, says)})
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_every_missing_tool_is_named_at_once(sandbox, path_without):
    done = run(["bash", SCRIPTS / "check-tools.sh"], env={"PATH": path_without("git", "tmux", "make")})
    assert (done.returncode, [tool for tool in ("git", "tmux", "make") if f"farm: {tool} " not in done.stderr]) == (6, [])


def test_an_old_python_exits_6_with_what_to_install(sandbox):
    env = {"PATH": fake_tool(sandbox.work / "fake", "python3", "Python 3.8.10")}
    done = run(["bash", SCRIPTS / "check-tools.sh"], env=env)
    assert (done.returncode, [word for word in ("3.8", "3.10", "apt", "dnf", "brew") if word not in done.stderr]) == (6, [])


def test_doctor_names_the_missing_tool_and_exits_6(farm, path_without):
    farm.ok("add", "a")
    done = farm("doctor", env={"PATH": path_without("tmux")})
    assert (done.returncode, "apt install tmux" in done.stdout + done.stderr) == (6, True)


def test_agents_verbs_need_no_git_and_no_tmux(farm, path_without):
    env = {"PATH": path_without("git", "tmux")}
    for line in ("add a", f"claim {A} --owner-pid {farm.owner}", f"lock {A} x --owner-pid {farm.owner}", f"unlock {A} x", "tasks"):
        farm.ok(*line.split(), env=env)


def test_agents_verbs_need_no_package(farm):
    farm.ok("add", "a")
    done = run([sys.executable, "-I", "-S", FARM, "--repo", farm.repo, "claim", A, "--owner-pid", str(farm.owner)])
    assert done.returncode == 0, done.stderr


def test_a_dead_owner_is_replaced_without_git_when_it_has_no_worktree(farm, path_without):
    farm.ok("add", "a")
    with living_process() as owner:
        farm.ok("claim", A, "--owner-pid", str(owner.pid))
        owner.kill()
        owner.wait()
    assert farm.claim(B, "--wait", "20", env={"PATH": path_without("git", "tmux")})["agent"] == B


def test_a_copy_of_the_toolkit_without_its_packages_says_how_to_get_them(farm, sandbox):
    copy = sandbox.work / "copy"
    copy.mkdir()
    for name in ("farm.py", "scripts"):
        run(["cp", "-R", ROOT / name, copy / name], check=True)
    bare = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable
    done = run([bare, "-S", copy / "farm.py", "--repo", farm.repo, "merge"])
    assert_is_error(done, 6)
    assert "install" in done.stderr or "setup" in done.stderr
