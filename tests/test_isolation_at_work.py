"""Whole farms in sandboxes: `make chaos` and `make demo` in short, an unprivileged user, another mount, beside systemd."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import portalocker
import psutil
import pytest
import tabulate
from attacks import Ground
from farm_calls import Caller, copy_repo
from paths import ROOT, SCRIPTS
from sandbox import GIT_CONFIG, run

import farm as toolkit

pytestmark = pytest.mark.usefixtures("there_can_be_sandboxes")


CAMPAIGNS = {"chaos.py": ["--seconds", "3", "-n", "3", "--seed", "7"], "demo.py": ["-n", "4"]}


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_a_campaign_in_short_holds_in_sandboxes(sandbox, monkeypatch, name):
    counted, seen = sandbox.root / "bin/bwrap", sandbox.root / "seen"
    counted.parent.mkdir()
    counted.write_text(f'#!/bin/sh\necho x >>{seen}\nexec {shutil.which("bwrap")} "$@"\n')
    counted.chmod(0o755)
    monkeypatch.setenv("PATH", str(counted.parent), prepend=os.pathsep)
    monkeypatch.setenv("FARM_ISOLATE", "bwrap")
    done = run([sys.executable, ROOT / "tests/campaigns" / name, *CAMPAIGNS[name]], timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(seen.read_text().split()) > 6  # agents, gates, git on what they left


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A folder on another mount than the repo's."""
    folder = Path(tempfile.mkdtemp(prefix="f-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


def find_python(ground: Ground) -> str:
    """One that this user can run: root's own may lie in a folder of root's."""
    for path in (os.path.realpath(sys.executable), "/usr/local/bin/python3", "/usr/bin/python3"):
        if ground.run("test", "-x", path).returncode == 0:
            return path
    raise AssertionError(f"no python that user {ground.uid} can run: apt-get install python3")


def make_python(ground: Ground) -> Path:
    venv = ground.toolkit / ".venv"
    run([find_python(ground), "-m", "venv", "--without-pip", venv], check=True)
    packages = next(venv.glob("lib/python3*/site-packages"))
    for package in (psutil, portalocker, tabulate):
        source = Path(package.__file__)
        if source.name == "__init__.py":
            shutil.copytree(source.parent, packages / source.parent.name)
        else:
            shutil.copy2(source, packages)
    return venv / "bin/python"


def test_an_unprivileged_user_has_a_farm_on_a_shared_repo_with_worktrees_on_another_mount(sandbox, elsewhere):
    os.chmod(sandbox.root, 0o755)
    ground = Ground(sandbox.root / "u", 54321 if os.geteuid() == 0 else os.geteuid())
    for folder in (ground.home, ground.root / "tmp", ground.repo):
        folder.mkdir(parents=True)
    shutil.copytree(SCRIPTS, ground.toolkit / "scripts")
    shutil.copy2(ROOT / "farm.py", ground.toolkit)
    python = make_python(ground)
    if ground.identity():
        run(["chown", "-R", f"{ground.uid}:{ground.uid}", ground.root, elsewhere], check=True)
    make = 'cd "$1"; git init -q -b main --shared=group; git config user.name T; git config user.email t@e; '
    make += "git commit -q --allow-empty -m a"
    ground.run("bash", "-ec", make, "bash", ground.repo, check=True)
    env = {"FARM_WORKTREES": str(elsewhere), "FARM_ISOLATE": "bwrap", "TMUX_TMPDIR": str(ground.root / "tmp")}
    farm = [python, ground.toolkit / "farm.py", "--repo", ground.repo]
    for title in ("one", "two"):
        ground.run(*farm, "add", title, check=True, **env)
    agent = '[ "$(id -u)" != 0 ] && [ ! -e "$FARM_REPO/farm.env" ] && [ "$FARM_MAILBOX" ] && echo x >"$FARM_TASK.txt"'
    done = ground.run(*farm, "run", "-n", "2", "--agent", agent, "--gate", "ls t-*.txt", "--until-drained", **env)
    assert done.returncode == 0, done.stdout + done.stderr
    names = ground.git("ls-tree", "--name-only", "main").split()
    assert names == ["t-0001.txt", "t-0002.txt"]
    # what was written is the group's, too
    written = [path for path in (ground.repo / ".git/objects").rglob("*") if path.is_dir()]
    assert all(path.stat().st_mode & stat.S_IWGRP for path in written), written
    ground.run(*farm, "down", "--now", **env)


SYSTEMD_RUN = """#!/bin/sh
echo "$@" >>"$HOME/scopes"
while :; do case $1 in -p) shift 2 ;; -*) shift ;; *) exec "$@" ;; esac; done
"""


def test_an_agents_limits_are_those_of_a_scope_where_systemd_runs(make_ground):
    """systemd-run is a stand-in: that a scope holds its processes is systemd's part."""
    ground = make_ground(os.geteuid())
    program = ground.root / "bin/systemd-run"
    program.parent.mkdir()
    program.write_text(SYSTEMD_RUN)
    program.chmod(0o755)
    (ground.root / "xdg/systemd").mkdir(parents=True)
    limits = {"FARM_AGENT_MEMORY_MIB": "300", "FARM_AGENT_PROCESSES": "200"}
    env = {"PATH": f"{program.parent}:{ground.env['PATH']}", "XDG_RUNTIME_DIR": str(ground.root / "xdg"), **limits}

    def start(kind: str = "agent", **more: str) -> tuple:
        (ground.home / "scopes").write_text("")
        done = ground.enter(kind, "bwrap", ground.tree(1), 'echo "${FARM_IN_SCOPE-no}"; exit 37', **{**env, **more})
        return done.stdout, done.returncode, (ground.home / "scopes").read_text().partition(" bash ")[0]

    assert start() == ("no\n", 37, "")  # no systemd of this user runs
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(ground.root / "xdg/systemd/private"))
        scope = "--user --scope --quiet --collect -p MemoryMax=300M -p MemorySwapMax=0 -p TasksMax=200"
        assert start() == ("no\n", 37, scope)
        assert start(**dict.fromkeys(limits, "0")) == start("setup") == ("no\n", 37, "")


@pytest.mark.parametrize("wanted", ["bwrap --ro-bind / / true", "unshare -Ur true"])
def test_a_sandbox_within_a_sandbox_cannot_be_made_so_that_codex_goes_without(wanted, monkeypatch):
    done = run(["bash", SCRIPTS / "isolate.sh", "bash", "-c", wanted])
    assert done.returncode == 1 and "Operation not permitted" in done.stderr
    assert "danger-full-access" not in toolkit.CLIS["codex"].launch("edits").start
    monkeypatch.setenv("FARM_ISOLATE", "bwrap")
    for permissions in ("edits", "all"):
        start = toolkit.CLIS["codex"].launch(permissions).start
        assert "danger-full-access" in start or "bypass-approvals-and-sandbox" in start


def test_home_and_worktrees_may_lie_behind_links_and_the_repo_have_an_odd_name(sandbox):
    """Where /home is a link, say: bwrap puts nothing in the place of one."""
    (sandbox.root / "data/u/.ssh").mkdir(parents=True)
    home = sandbox.root / "home-link/u"
    home.parent.symlink_to(sandbox.root / "data")
    (home / ".ssh/id").write_text("KEY")
    (home / ".gitconfig").write_text(GIT_CONFIG)
    farm = Caller(copy_repo(home / "odd $x'\"\u00fc#(1) re po;"), os.getpid())
    farm.ok("add", "one")
    hidden = '[ ! -e ~/.ssh/id ] && [ ! -e "$FARM_REPO/README.md" ]'
    env = {"HOME": str(home), "FARM_WORKTREES": str(home.parent / "trees"), "FARM_ISOLATE": "bwrap"}
    agent, gate = f'{hidden} && echo x >"$FARM_TASK.txt"', "[ ! -e ~/.ssh/id ] && ls t-*.txt README.md"
    done = farm("run", "-n", "1", "--agent", agent, "--gate", gate, "--until-drained", env=env)
    assert (done.returncode, farm.task("t-0001")["state"]) == (0, "landed"), done.stderr


@pytest.fixture
def confined(farm, sandbox, monkeypatch):
    """A call of a command as an agent in the sandbox of Claude Code, by a person whose dotfiles are links."""
    farm.ok("up", "-n", "1", "--agent", "sleep 60")
    farm.ok("down", "--now", timeout=60)
    for name in ("dotfiles/claude/hooks", "scratch/cache", "data"):
        (sandbox.home / name).mkdir(parents=True)
    links = {".claude": "dotfiles/claude", ".cache": "scratch/cache", "shown": "data", ".claude.json": "claude.json"}
    for link, place in links.items():
        (sandbox.home / link).symlink_to(sandbox.home / place)
    for name in ("claude.json", "dotfiles/claude/settings.json", "data/x"):
        (sandbox.home / name).write_text("{}")
    tree = farm.repo.with_name("repo-farm") / "agent-001-worktree"
    mailbox = farm.folder / "mailbox/agent-001"
    mailbox.mkdir(parents=True, exist_ok=True)
    (mailbox / "pid").touch()
    monkeypatch.setenv("FARM_ISOLATE", "bwrap")
    monkeypatch.setenv("FARM_SHOW", str(sandbox.home / "shown"))
    monkeypatch.setenv("FARM_CLI_STATE", ":".join(toolkit.CLIS["claude"].state))
    return lambda command: run(["bash", SCRIPTS / "sandbox/confine.sh", "agent", farm.repo, tree, "bash", "-c", command], cwd=tree)


def test_what_a_cli_and_caches_keep_may_lie_behind_links_that_no_agent_can_have_made(confined, sandbox):
    """~/.claude of one who keeps such files elsewhere, ~/.cache on a cluster's big disk, FARM_SHOW of a link."""
    done = confined("""echo x >~/.cache/mine && echo x >~/.claude/mine && cat ~/shown/x &&
        ! echo x >~/.claude.json && ! echo x >~/.claude/settings.json && ! echo x >~/.claude/hooks/x && ! echo x >~/mine""")
    assert done.returncode == 0 and done.stdout == "{}", done.stderr
    assert (sandbox.home / "dotfiles/claude/mine").read_text() == "x\n" and not (sandbox.home / "scratch/cache/mine").exists()


@pytest.mark.parametrize("place", ["", "+"])
def test_no_link_is_followed_that_an_agent_can_have_made(confined, sandbox, monkeypatch, place):
    """What it may write it may have linked to a key: a file that the CLI obeys, and what is shown below what can be written."""
    (sandbox.home / ".ssh").mkdir()
    (sandbox.home / ".ssh/id").write_text("KEY")
    link = sandbox.home / ("data/x" if place else "dotfiles/claude/settings.json")
    link.unlink()
    link.symlink_to(sandbox.home / ".ssh/id")
    monkeypatch.setenv("FARM_SHOW", f"+{sandbox.home}/data:{sandbox.home}/data/x" if place else "")
    done = confined("cat ~/data/x ~/.claude/settings.json ~/.ssh/id")
    assert done.returncode and "KEY" not in done.stdout + done.stderr
    assert place or "settings.json is a link" in done.stderr
    assert place or toolkit.find_linked_state(["claude"]) == [str(sandbox.home / ".claude/settings.json")]
