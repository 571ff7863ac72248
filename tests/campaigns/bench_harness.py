"""What the benchmarks stand on: private places, throw-away farms, commands whose cost is counted, medians beside a floor."""

from __future__ import annotations

import collections
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from paths import SCRIPTS
from sandbox import Sandbox, end_leftovers, find_live_sockets, git, set_environment, wait_until

import farm as toolkit

PYTHON = str(Path(sys.executable).resolve())
Cost = collections.namedtuple("Cost", "seconds cpu")
Row = collections.namedtuple("Row", "name measured floor unit bound note", defaults=(None, "s", "", ""))

# rounds: how often each figure is measured, and each verb. agents: the sizes of farms. landings: tasks that go to main one by one.
# history: landed tasks, and long ones that wait; clients: how many call at once; hosts: with twenty agents each.
SIZES = ("rounds verb_rounds agents large_files idle_seconds claims runs run_tasks landings merges merge_files draws history "
         "clients hosts")
Size = collections.namedtuple("Size", SIZES)


def check(is_true: object, what: str) -> None:
    """End the run when a measured command did not do its work."""
    if not is_true:
        raise SystemExit(f"bench: {what}")


# --- costs -----------------------------------------------------------------------------------------------------------


def timed(*argv: str | Path | int, env: Mapping[str, str] | None = None, input: str = "") -> Cost:
    """Run a command to its end: wall time, and CPU time of it and of all that it waited for. Ends the run when it fails."""
    with tempfile.TemporaryFile("w+") as stdin, tempfile.TemporaryFile("w+", errors="replace") as errors:
        stdin.write(input)
        stdin.seek(0)
        words = [str(word) for word in argv]
        began = time.perf_counter()
        process = subprocess.Popen(words, stdin=stdin, stdout=subprocess.DEVNULL, stderr=errors, env={**os.environ, **(env or {})})
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        check(process.returncode == 0, f"{words} ended with {process.returncode}\n{errors.read()[-2000:]}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime)


def bash(text: str, *args: str | int | Path) -> Cost:
    """Time a piece of bash with its arguments."""
    return timed("bash", "-euo", "pipefail", "-c", text, "bash", *args)


def all_at_once(commands: list[tuple], env: Mapping[str, str] | None = None) -> Cost:
    """Start all, then wait for all. Ends the run when one fails."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "env": {**os.environ, **(env or {})}}
    began, before = time.perf_counter(), os.times()
    processes = [subprocess.Popen([str(word) for word in words], **options) for words in commands]
    failed = sum(process.wait() != 0 for process in processes)
    seconds, after = time.perf_counter() - began, os.times()
    check(not failed, f"{failed} of {len(commands)} commands failed, such as {commands[0]}")
    return Cost(seconds, sum(after[2:4]) - sum(before[2:4]))


class Samples:
    """What was measured, by name, over several rounds."""

    def __init__(self):
        self.costs: dict[str, list[Cost]] = collections.defaultdict(list)

    def add(self, name: str, cost: Cost) -> None:
        self.costs[name].append(cost)

    def median(self, name: str) -> Cost:
        return Cost(*map(statistics.median, zip(*self.costs[name], strict=True)))

    def row(self, title: str, name: str, floor: str, bound: str = "", note: str = "") -> Row:
        """One row of two names' medians; where the bound is a ratio, that of the CPU times as a note."""
        measured, beside = self.median(name), self.median(floor)
        cpu = f"cpu {measured.cpu / beside.cpu:.2f} x" if bound.endswith("x") and beside.cpu else ""
        return Row(title, measured.seconds, beside.seconds, "s", bound, "; ".join(filter(None, (note, cpu))))


# --- places and farms ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def private_place() -> Iterator[Sandbox]:
    """Folders, HOME, git settings and tmux server of their own; at the end nothing of them is left, and nothing runs."""
    root = Path(tempfile.mkdtemp(prefix="f-", dir="/tmp")).resolve()  # short, for the sake of socket paths
    box = Sandbox(root, root / "home", root / "work", root / "tmux", root.name)
    for folder in (box.home, box.work, box.tmux, root / "tmp"):
        folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch, box)
        try:
            yield box
        finally:
            end_leftovers(box)
            shutil.rmtree(root, ignore_errors=True)


class Bench:
    """One group's run: its size, its private folders, and the repos in them."""

    def __init__(self, size: Size, box: Sandbox):
        self.size, self.box = size, box
        self.made = 0

    def repo(self, files: int, file_bytes: int = 100) -> Path:
        """A new repo of so many files, 100 a folder, on main."""
        self.made += 1
        repo = self.box.work / f"r{self.made}"
        git(self.box.work, "init", "-q", repo)
        for number in range(files):
            path = repo / f"d{number // 100}" / f"f{number}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text((f"{number} " * file_bytes)[:file_bytes])
        git(repo, "add", "-A")
        git(repo, "commit", "-q", "-m", "first")
        return repo

    def farmed(self, tasks: int = 0, files: int = 100) -> Farmed:
        """A new repo with a farm that has so many tasks."""
        farmed = Farmed(self.repo(files))
        if tasks:
            farmed.main("add", "-f", "-", input="".join(f"task {number}\n" for number in range(tasks)))
        return farmed


class Farmed:
    """A repo and the calls of farm.py on it."""

    def __init__(self, repo: Path):
        self.repo, self.worktrees = repo, repo.with_name(repo.name + "-farm")
        self.floor = repo.with_name(repo.name + "-floor")
        self.store = toolkit.Store(str(repo))

    def main(self, *args: str | int | Path, isolate: str = "", **options) -> Cost:
        """A verb as the Makefile calls it."""
        env = {"FARM_PYTHON": sys.executable, **({"FARM_ISOLATE": isolate} if isolate else {})}
        return timed(SCRIPTS / "farm", "--repo", self.repo, *args, env=env, **options)

    def verb(self, *args: str | int | Path, **options) -> Cost:
        """A verb by the shim, as agents call it."""
        return timed(SCRIPTS / "farm", "--repo", self.repo, *args, env={"FARM_PYTHON": PYTHON}, **options)

    def up(self, count: int) -> Cost:
        return self.main("up", "-n", count, "--agent", "true")

    def claim(self, agent: str) -> tuple[str, Cost]:
        """Claim for `agent`, this process being the owner: the fence, and what it cost."""
        cost = self.verb("claim", agent, "--owner-pid", os.getpid())
        return self.store.load().claims[agent].fence, cost

    def make_branch(self, branch: str, name: str) -> None:
        """A branch with one new file on main, without touching index or checkout."""
        blob = git(self.repo, "hash-object", "-w", "--stdin", input=name)
        tree = git(self.repo, "mktree", input=git(self.repo, "ls-tree", "main") + f"\n100644 blob {blob}\t{name}\n")
        git(self.repo, "update-ref", f"refs/heads/{branch}", git(self.repo, "commit-tree", "-p", "main", "-m", name, tree))

    def submit(self, agent: str, fence: str) -> Cost:
        """Submit one commit for the task that `fence` is of; its making is not counted."""
        task = fence.rpartition(".")[0]
        self.make_branch(f"farm/{agent}/{task}", f"{task}.txt")
        return self.verb("submit", agent, "--fence", fence)

    def clone(self) -> Path:
        """A plain clone that has every branch, with main checked out."""
        clone = self.repo.with_name(f"{self.repo.name}-clone-{time.monotonic_ns()}")
        git(self.repo, "clone", "-q", "--mirror", self.repo, clone / ".git")
        git(clone, "config", "core.bare", "false")
        git(clone, "reset", "-q", "--hard", "main")
        return clone

    def wipe(self) -> None:
        """What a farm and the floors leave, removed, so that the next round begins like the first."""
        for path in find_live_sockets(Path(os.environ["TMUX_TMPDIR"])):
            subprocess.run(["tmux", "-S", path, "kill-server"], check=True)
        for folder in (self.worktrees, self.repo / "coordination", self.repo / ".git" / "worktrees", self.repo / ".git" / "farm",
                       self.floor):
            wait_until(lambda folder=folder: not shutil.rmtree(folder, ignore_errors=True) and not folder.exists(), 120)
        refs = git(self.repo, "for-each-ref", "--format=delete %(refname)", "refs/heads/farm", "refs/heads/floor", "refs/farm")
        git(self.repo, "update-ref", "--stdin", input=refs + "\n" if refs else "")
        os.sync()  # so that nobody pays for what another wrote
