"""A private environment for a test, the repos in it, and how a command is run there and waited for."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

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


class Started(subprocess.Popen):
    """A process in a `with` block: where the block fails it is killed, and it is waited for a minute at most. What
    is not over then would hold up all tests behind it for ever."""

    def __exit__(self, kind, *details) -> None:
        try:
            if kind is not None:
                self.kill()
            self.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            super().__exit__(kind, *details)


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
    while True:
        asked_at = time.monotonic()
        if value := predicate():
            return value
        now = time.monotonic()
        if now > deadline:
            pytest.fail(f"waited {timeout:g} s in vain for {message}")
        # what is dear to ask is asked less often: the farm that is waited for needs the cores, too
        time.sleep(max(pause, min(now - asked_at, 0.5)))
        pause = min(pause * 1.5, 0.1)


class NeverStopped:
    """A StopRequest that hears no signal, for a merger in this process."""

    def __init__(self):
        self.event = threading.Event()
        self.wake = self.event.set

    def is_set(self) -> bool:
        return False

    def wait(self, seconds: float) -> None:
        self.event.wait(seconds)
        self.event.clear()


def find_processes(token: str) -> list[psutil.Process]:
    """The live processes whose environment carries `token`, this one left out."""
    found = []
    for pid in candidates(token):
        try:
            process = psutil.Process(pid)
            is_ours = pid != os.getpid() and process.environ().get("TEST_TOKEN") == token
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def candidates(token: str) -> list[int]:
    """Pids whose environment may carry the token. Each test asks several times: where there is a /proc, by bytes."""
    if not Path("/proc/self/environ").exists():
        return psutil.pids()
    pids = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                if token.encode() in file.read():
                    pids.append(int(name))
        except OSError:  # another's, or gone
            continue
    return pids


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


def make_writable_and_retry(function: Callable[[str], object], path: str, _error: object) -> None:
    """Remove what a test made read-only; a path that is gone already is fine."""
    try:
        os.chmod(os.path.dirname(path), 0o700)
        os.chmod(path, 0o700)
        function(path)
    except OSError:
        return
