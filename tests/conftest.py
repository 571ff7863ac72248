"""What every test stands on: a private environment, throw-away repos, and a reaper that fails a test which leaks.

Helpers are imported (`from conftest import ROOT, SCRIPTS, git, run, wait_until`), fixtures are asked for by name.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
GRACE_SECONDS = 3.0
INHERITED_PREFIXES = ("FARM_", "GIT_", "TMUX", "XDG_", "PYTHON")

GIT_CONFIG = """\
[user]
    name = Test Person
    email = test@example.org
[init]
    defaultBranch = main
[protocol "file"]
    allow = always
"""


@dataclass(frozen=True)
class Sandbox:
    """The folders of one test: `root` holds all the others and is short, for the sake of socket paths."""

    root: Path
    home: Path
    work: Path
    tmux: Path
    token: str


def run(
    argv: Sequence[str | Path],
    *,
    cwd: Path | str | None = None,
    env: Mapping[str, str] | None = None,
    input: str | None = None,
    check: bool = False,
    timeout: float = 60,
) -> subprocess.CompletedProcess[str]:
    """Run a command and capture its text; `env` is laid over the test's environment; no input means /dev/null."""
    done = subprocess.run(
        [str(arg) for arg in argv],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        input=input,
        stdin=subprocess.DEVNULL if input is None else None,
        check=False,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=timeout,
    )
    if check and done.returncode != 0:
        pytest.fail(f"{done.args} exited {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def git(repo: Path | str, *args: str | Path, input: str | None = None) -> str:
    """Run git in `repo`, fail the test when it fails, and return its output without the last newline."""
    return run(["git", "-C", repo, *args], input=input, check=True).stdout.removesuffix("\n")


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write `files` (relative name -> text) below `folder`, with the folders that they need."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="surrogateescape")


def commit_files(repo: Path, files: Mapping[str, str], message: str = "change") -> str:
    """Write `files`, commit everything in `repo`, and return the new commit's sha."""
    write_files(repo, files)
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "--allow-empty", "-m", message)
    return git(repo, "rev-parse", "HEAD")


def wait_until(predicate: Callable[[], object], timeout: float = 20, message: str = "the condition") -> object:
    """Poll `predicate` until it is true and return its value; fail the test with `message` at the deadline."""
    deadline = time.monotonic() + timeout
    pause = 0.005
    while not (value := predicate()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout:g} s in vain for {message}")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)
    return value


def find_processes(token: str) -> list[psutil.Process]:
    """The live processes whose environment carries `token`, this one left out."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.environ().get("TEST_TOKEN") != token:
                continue
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def find_live_sockets(folder: Path) -> list[Path]:
    """The tmux sockets below `folder` on which a server answers."""
    live = []
    for path in folder.glob("tmux-*/*"):
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(path))
            except OSError:
                continue
        live.append(path)
    return live


def describe_leftovers(sandbox: Sandbox) -> list[str]:
    """One line for each tmux server and process that still belongs to this test."""
    lines = [f"tmux server on {path}" for path in find_live_sockets(sandbox.tmux)]
    for process in find_processes(sandbox.token):
        try:
            lines.append(f"process {process.pid}: {' '.join(process.cmdline())[:200]}")
        except psutil.Error:
            continue
    return lines


def end_leftovers(sandbox: Sandbox) -> None:
    """End the tmux servers and processes of this test, and nothing else, until none is left."""
    for path in find_live_sockets(sandbox.tmux):
        run(["tmux", "-S", path, "kill-server"])
    for _ in range(20):
        left = find_processes(sandbox.token)
        if not left:
            return
        for process in left:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.Error:
                continue
        psutil.wait_procs(left, timeout=1)


def set_environment(monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox) -> None:
    """Point HOME, git, tmux and temporary files into the sandbox, and drop what the caller's shell had set."""
    for name in list(os.environ):
        if name.startswith(INHERITED_PREFIXES):
            monkeypatch.delenv(name)
    config = sandbox.home / ".gitconfig"
    config.write_text(GIT_CONFIG, encoding="utf-8")
    temporary = sandbox.root / "tmp"
    settings = {
        "HOME": str(sandbox.home),
        "XDG_CONFIG_HOME": str(sandbox.home / ".config"),
        "GIT_CONFIG_GLOBAL": str(config),
        "GIT_CONFIG_NOSYSTEM": "1",
        "TMPDIR": str(temporary),
        "TMUX_TMPDIR": str(sandbox.tmux),
        "TEST_TOKEN": sandbox.token,
        "LC_ALL": "C.UTF-8",
        "TERM": "xterm",
        "SHELL": "/bin/sh",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))


@pytest.fixture(autouse=True)
def sandbox(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """The test's private environment; afterwards whatever still runs in it is ended, and fails the test."""
    root = Path(tempfile.mkdtemp(prefix="f-", dir="/tmp")).resolve()
    box = Sandbox(root, root / "home", root / "work", root / "tmux", secrets.token_hex(8))
    for folder in (box.home, box.work, box.tmux, root / "tmp"):
        folder.mkdir()
    set_environment(monkeypatch, box)
    try:
        yield box
        deadline = time.monotonic() + GRACE_SECONDS
        tidy = "farm_cleanup" in request.fixturenames
        while not tidy and describe_leftovers(box) and time.monotonic() < deadline:
            time.sleep(0.02)
        left = [] if tidy else describe_leftovers(box)
    finally:
        end_leftovers(box)
        shutil.rmtree(root, onerror=make_writable_and_retry)
    if left:
        pytest.fail("left running by this test:\n  " + "\n  ".join(left))


def make_writable_and_retry(function: Callable[[str], object], path: str, _error: object) -> None:
    """Remove what a test made read-only; a path that is gone already is fine."""
    try:
        os.chmod(os.path.dirname(path), 0o700)
        os.chmod(path, 0o700)
        function(path)
    except OSError:
        return


@pytest.fixture
def farm_cleanup(sandbox: Sandbox) -> Callable[[], None]:
    """Ask for it to have leftovers ended without failing the test; call it to end them now."""
    return lambda: end_leftovers(sandbox)


@pytest.fixture
def make_repo(sandbox: Sandbox) -> Callable[..., Path]:
    """A factory of throw-away repos: `make_repo(name="repo", files={"a.txt": "text"}, commits=1, branch="main")`."""

    def make(name: str = "repo", files: Mapping[str, str] | None = None, commits: int = 1, branch: str = "main") -> Path:
        repo = sandbox.work / name
        repo.mkdir(parents=True)
        git(repo, "init", "-q", "-b", branch)
        for number in range(1, commits + 1):
            first = {"README.md": "a throw-away repo\n"} if files is None else files
            commit_files(repo, first if number == 1 else {"log.txt": f"{number}\n"}, f"commit {number}")
        return repo

    return make
