"""How the tests call farm.py: as a process, from outside, and what they ask it about its tasks."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from paths import ROOT, SCRIPTS
from sandbox import Started, git, run

SHIM = SCRIPTS / "farm"
FARM = ROOT / "farm.py"
UGLY = "red \x1b[31mtext\x1b[0m \x1b]0;title\x07 bell\x07 del\x7f c1\x85\x9b2J tab\there\nand\r\na line \u2028 end"
A, B, C = "agent-001", "agent-002", "agent-003"
HEADS = {"task": "id state title agent attempts rev reason", "queue": "id state branch commit agent reason"}
NEEDS_PACKAGES = {"merge", "up", "run", "down", "clean", "doctor", "status"}


class Caller:
    """farm.py on one repo. A call gives the finished process; `ok`, `json` and `refused` also check how it ended."""

    def __init__(self, repo: Path, owner: int):
        self.repo, self.owner = repo, owner
        self.folder = repo / "coordination"

    def argv(self, verb: str, *args: str) -> list[str]:
        """The command line: by the shim, as agents do it, or by the interpreter that has the run-time packages."""
        start = [sys.executable, str(FARM)] if verb in NEEDS_PACKAGES else [str(SHIM)]
        return [*start, "--repo", str(self.repo), verb, *args]

    def __call__(self, verb: str, *args: str, **options) -> subprocess.CompletedProcess[str]:
        """The finished process; where its words name the command as it was typed here, that is `./farm.py`, to be short."""
        done = run(self.argv(verb, *args), **options)
        done.stdout, done.stderr = self.shorten(done.stdout), self.shorten(done.stderr)
        return done

    def shorten(self, text: str) -> str:
        return re.sub(rf"(?:\./|{ROOT}/)farm\.py(?: --repo {re.escape(str(self.repo))})?(?= )", "./farm.py", text)

    def ok(self, verb: str, *args: str, **options) -> str:
        """What it printed, when it ended with 0."""
        done = self(verb, *args, **options)
        if done.returncode:
            pytest.fail(f"farm {verb} {args} exited {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout.removesuffix("\n")

    def json(self, verb: str, **options):
        return json.loads(self.ok(verb, "--json", **options))

    def refused(self, code: int, verb: str, *args: str, **options) -> str:
        """What it said on stderr, when it ended with `code` and in the one form that errors have."""
        done = self(verb, *args, **options)
        assert_is_error(done, code)
        return done.stderr

    def start(self, verb: str, *args: str, env: Mapping[str, str] | None = None) -> Started:
        """The same without waiting for its end."""
        return Started(
            ["env", *(f"{key}={value}" for key, value in (env or {}).items()), *self.argv(verb, *args)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    # -- asking and moving

    def task(self, task_id: str) -> dict:
        """What `tasks --json` says of one task."""
        return next(task for task in self.json("tasks") if task["id"] == task_id)

    def claim(self, agent: str, *args: str, **options) -> dict:
        return json.loads(self.ok("claim", agent, "--owner-pid", str(self.owner), *args, **options))

    def lock(self, agent: str, *names: str, **options) -> subprocess.CompletedProcess[str]:
        return self("lock", agent, *names, "--owner-pid", str(self.owner), **options)

    def submit(self, agent: str, files: Mapping[str, str], *args: str) -> dict:
        """Claim a task, commit `files` for it on its branch (straight into git, no worktree), and submit; returns the claim."""
        claim = self.claim(agent, *args)
        branch = f"farm/{agent}/{claim['task']['id']}"
        git(self.repo, "update-ref", f"refs/heads/{branch}", make_commit(self.repo, files))
        self.ok("submit", agent, "--fence", claim["fence"])
        return claim


def make_folder_for_all_tests() -> Path:
    """A folder that outlives a test's sandbox and goes with the test process."""
    folder = Path(tempfile.mkdtemp(prefix="f-template-", dir="/tmp"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def template_repo() -> Path:
    """A repo of one commit, made once a test process and copied after that: a copy costs a fifth of the git commands."""
    folder = make_folder_for_all_tests()
    git(folder, "init", "-q", "-b", "main")
    (folder / "README.md").write_text("a throw-away repo\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "commit 1")
    return folder


def copy_repo(folder: Path, template: Path | None = None) -> Path:
    """A repo at `folder` just like `template`, by default one of a single commit."""
    shutil.copytree(template or template_repo(), folder)
    git(folder, "update-index", "-q", "--refresh")
    return folder


def assert_is_error(done: subprocess.CompletedProcess[str], code: int) -> None:
    """The exit code, one line `farm: what`, perhaps `  try: command`, nothing on stdout, no traceback."""
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    lines = done.stderr.splitlines()
    assert lines and lines[0].startswith("farm: "), done.stderr
    assert "Traceback" not in done.stderr


def make_commit(repo: Path, files: Mapping[str, str], base: str = "HEAD", message: str = "work") -> str:
    """A commit on `base` with `files` in its top folder, made without touching index or checkout."""
    tree = {line.split("\t", 1)[1]: line for line in git(repo, "ls-tree", base).splitlines()}
    for name, text in files.items():
        tree[name] = f"100644 blob {git(repo, 'hash-object', '-w', '--stdin', input=text)}\t{name}"
    return git(repo, "commit-tree", "-p", base, "-m", message, git(repo, "mktree", input="\n".join(tree.values()) + "\n"))


@contextlib.contextmanager
def living_process() -> Iterator[subprocess.Popen[bytes]]:
    """A process to own locks; `kill()` and `wait()` make it a dead owner."""
    with subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def bytes_below(folder: Path, *, but: Sequence[str] = (".lock", "merger.lock")) -> dict[str, bytes]:
    """Every file below `folder` but the mutexes, with its content: equal before and after means that nothing was written."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        is_mutex = name in but or path.name.startswith(".pin-")
        if path.is_file() and not path.is_symlink() and not is_mutex:
            found[name] = path.read_bytes()
    return found


def fake_tool(folder: Path, name: str, says: str) -> str:
    """A PATH on which `name` is a script that only prints `says`."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\necho '{says}'\n")
    (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def drain(farm: Caller, *args: str, agent: str = "date >made.txt", check: bool = True) -> subprocess.CompletedProcess[str]:
    """The whole way of every task by one agent, in the foreground, until nothing is left to do."""
    argv = ["run", "-n", "1", "--agent", agent, "--until-drained", *args]
    done = farm(*argv, timeout=120)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def landed(farm: Caller) -> list[str]:
    return [task["id"] for task in farm.json("tasks") if task["state"] == "landed"]


def lock_file(farm, agent: str) -> Path:
    return farm.folder / "agent_locks" / f"{agent}.lock"


def tree_of(farm: Caller, agent: str = A) -> Path:
    """An agent's worktree."""
    return farm.repo.parent / f"{farm.repo.name}-farm" / f"{agent}-worktree"


def files_of(farm: Caller, ref: str = "main") -> list[str]:
    return git(farm.repo, "ls-tree", "-r", "--name-only", ref).splitlines()
