"""kill -9 of the merge queue: of the merger, its process group, its landing, its git, or of all at once, at chosen and at random
moments. Afterwards `merge` must bring everything to the same end as if nothing had happened.

`python tests/campaigns/merge_kills.py --seconds 60 --seed 1` goes on for longer and prints what it counted.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import paths
import psutil
import pytest
from merge_calls import GREEN, Queue, find_gate_processes, new_file
from sandbox import GIT_CONFIG, commit_files, git

TOKEN = "GATE_TOKEN"
CONDITION = f"{GREEN} && ! {{ [ -e a.txt ] && [ -e b.txt ]; }}"
KILLS = ("merger", "group", "everything", "landing", "git")
PARTS = {"landing": {str(paths.SCRIPTS / name) for name in ("merge/land.sh", "merge/fast-forward.sh")},
         "git": {"--ff-only", "farm: land"}}


class Victim:
    """A merger in a process group of its own, to be killed; what it prints goes to a file."""

    def __init__(self, queue: Queue, gate: str, *options: str, slots: int = 1, **env: str):
        self.queue, self.token = queue, os.environ[TOKEN]
        with (queue.outside / "printed").open("ab") as log:
            self.process = subprocess.Popen(
                queue.argv("merge", "--gate", gate, "--slots", str(slots), *options),
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def kill(self, what: str) -> bool:
        """SIGKILL to one of KILLS; False when it was not there (any more)."""
        found = self.find(what)
        if what == "group" and found:
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if what not in PARTS:
            self.process.wait(20)
        return bool(found)

    def find(self, what: str) -> list[psutil.Process]:
        if what not in PARTS and self.process.poll() is not None:
            return []
        if what in ("merger", "group"):
            return [psutil.Process(self.process.pid)]
        ours = find_gate_processes(self.token)
        return ours if what == "everything" else [process for process in ours if PARTS[what] & set(command_of(process))]

    def wait_for(self, what: str) -> None:
        """Until it runs, or the merger has ended."""
        while self.process.poll() is None and not self.find(what):
            time.sleep(0.002)


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def careful(queue: Queue, condition: str = CONDITION) -> str:
    """A gate that notes when it begins in a slot in which anything of an earlier gate still runs.

    It leaves something behind, and does its work in a process that has cleared the environment, as tox does.
    """
    guard = f'exec 9>>"{queue.outside}/$(basename "$PWD").lock"; flock -n 9 || echo "$PWD" >>{queue.outside}/overlaps; '
    return guard + queue.counted(f"setsid sleep 300 & env -i PATH=\"$PATH\" bash -c '{condition}'; code=$?; exit $code")


def finish(queue: Queue, gate: str, *options: str, slots: int = 1, **env: str) -> None:
    """One merger that nobody disturbs."""
    code = Victim(queue, gate, *options, slots=slots, **env).process.wait(120)
    if code not in (0, 5):
        pytest.fail(f"the merger after the kill exited {code}\n{(queue.outside / 'printed').read_text()[-3000:]}")


def events(queue: Queue, name: str) -> Counter:
    lines = map(json.loads, (queue.folder / "events.jsonl").read_text().splitlines())
    return Counter(line["task"]["id"] for line in lines if line["event"] == name)


def find_violations(queue: Queue, expected: dict[str, str]) -> list[str]:
    """Whatever is not as it would be had nobody been killed; `expected` is each task's state."""
    tree, found = queue.repo / ".git", []
    trailers, states = Counter(queue.landed()), queue.states()
    good = {task_id: 1 for task_id, state in expected.items() if state == "landed"}
    twice = [name for kind in ("landed", "returned") for name, count in events(queue, kind).items() if count > 1]
    checks = {
        "states": (states, expected),
        "landings in the history of main": (dict(trailers), good),
        "moved twice": (twice, []),
        "red values of main": (queue.red_values(CONDITION), []),
        "git status": (git(queue.repo, "status", "--porcelain"), ""),
        "locks in .git": ([str(path.relative_to(tree)) for path in tree.rglob("*.lock")], []),
        "left in .git": ([path.name for path in tree.glob("farm-*")], []),
        "an unfinished landing": ((queue.folder / "merge_queue/landing.json").exists(), False),
        "gates that overlap in a slot": ((queue.outside / "overlaps").exists(), False),
    }
    for what, (is_so, should_be) in checks.items():
        if is_so != should_be:
            found.append(f"{what}: {is_so}, should be {should_be}")
    return found


# ---------------------------------------------------------------------------------------------- at random


class Round:
    """A queue that is killed again and again while work comes in, good and bad; style, slots and the like are drawn, too."""

    def __init__(self, queue: Queue, rng: random.Random):
        self.queue, self.rng, self.gate = queue, rng, careful(queue)
        self.options = {"slots": rng.choice([1, 2, 3]), "FARM_STYLE": rng.choice(["merge", "merge", "squash", "rebase"])}
        self.options["FARM_MERGE"] = rng.choice(["", "", "worktree"])
        commit_files(queue.repo, {".gitattributes": "*.txt filter=slow\n"})  # so that git is often at it
        git(queue.repo, "config", "filter.slow.smudge", "sleep 0.01; cat")
        self.remote = queue.outside / "bare.git" if rng.random() < 0.3 else None
        self.expected: dict[str, str] = {}
        self.done, self.serial = Counter(), itertools.count()
        self.settled: set[str] = set()
        self.seen, self.again = 0, []
        if self.remote:
            git(queue.repo, "clone", "-q", "--bare", queue.repo, self.remote)
            git(queue.repo, "remote", "add", "origin", self.remote)
            self.options["FARM_REMOTE"] = "origin"

    def submit(self, works: list[dict[str, str]]) -> None:
        """Work that is bad when it says so, or when it is the later one of the pair."""
        for task_id, files in zip(self.queue.ready_all(works, max_attempts=1), works, strict=True):
            is_bad = "BAD\n" in files.values() or "b.txt" in files
            self.expected[task_id] = "failed" if is_bad else "landed"
            self.done["returned" if is_bad else "landed"] += 1

    def some_work(self, count: int) -> list[dict[str, str]]:
        return [new_file(f"f{next(self.serial)}", "BAD\n" if self.rng.random() < 0.25 else "good\n") for _ in range(count)]

    def kill_once(self) -> None:
        """Start a merger and kill something of it at some moment, perhaps soon after a landing has begun."""
        what, moment, limit = self.rng.choice(KILLS), self.rng.choice(["landing", "git", "any"]), self.rng.uniform(0, 1.5)
        victim, begin = Victim(self.queue, self.gate, **self.options), time.monotonic()
        if what in PARTS or moment != "any":
            victim.wait_for(what if what in PARTS else moment)
            limit = self.rng.uniform(0, 0.1) * (what != "git")
            begin = time.monotonic()
        while victim.process.poll() is None and time.monotonic() < begin + limit:
            time.sleep(0.002)
        self.done[what if victim.kill(what) else "too late"] += 1
        victim.process.wait(120)  # where a part was killed, the merger says so, or does not even notice
        self.note_repeats()

    def note_repeats(self) -> None:
        """Keep the trees that were gated although nobody needed it, and those that nobody needs to gate from now on."""
        gated, verdicts = self.queue.gated(), self.queue.verdicts()
        self.again += [f"gated again although it had its verdict: {tree}" for tree in gated[self.seen :] if tree in self.settled]
        self.settled = {tree for tree, colours in verdicts.items() if "green" in colours or colours.count("red") > 1}
        self.seen = len(gated)

    def run(self, kills: int) -> list[str]:
        """Returns what is wrong at the end."""
        self.submit([*self.some_work(2), new_file("a"), *self.some_work(1), new_file("b")])
        for _ in range(kills):
            self.kill_once()
            self.submit(self.some_work(self.rng.choice([1, 2])))
        finish(self.queue, self.gate, **self.options)
        self.note_repeats()
        self.done["gates"] = self.seen
        wrong = find_violations(self.queue, self.expected) + self.again
        if self.remote and git(self.remote, "rev-parse", "main") != git(self.queue.repo, "rev-parse", "main"):
            wrong.append("the remote's main is not ours")
        return wrong


# ---------------------------------------------------------------------------------------------- a longer campaign


@contextlib.contextmanager
def private_environment() -> Iterator[Path]:
    """What the fixtures do for a test: a folder, git's own settings, a token by which whatever is left is ended."""
    folder = Path(tempfile.mkdtemp(prefix="f-", dir="/tmp"))
    for name in [name for name in os.environ if name.startswith(("FARM_", "GIT_"))]:
        del os.environ[name]
    (folder / "gitconfig").write_text(GIT_CONFIG)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    token = secrets.token_hex(8)
    os.environ.update({"GIT_CONFIG_GLOBAL": str(folder / "gitconfig"), "GIT_CONFIG_NOSYSTEM": "1", "PATH": path, TOKEN: token})
    try:
        yield folder
    finally:
        for process in find_gate_processes(token, f"{folder}/"):
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def make_queue(folder: Path) -> Queue:
    repo, beside = folder / "repo", folder / "outside"
    beside.mkdir(parents=True)
    git(folder, "init", "-q", "-b", "main", repo)
    commit_files(repo, {"README.md": "text\n"})
    return Queue(repo, beside)


def campaign(seconds: float, seed: int) -> int:
    """Round after round until the time is over; 1 when something was wrong, and then the round's folder is kept."""
    totals, number, end = Counter(), 0, time.monotonic() + seconds
    with private_environment() as folder:
        while time.monotonic() < end:
            number += 1
            queue = make_queue(folder / f"round-{number}")
            turn = Round(queue, random.Random(f"{seed}-{number}"))
            wrong = turn.run(10)
            totals += turn.done
            if wrong:
                kept = Path(tempfile.mkdtemp(prefix="merge-kills-"), "round")
                shutil.copytree(queue.repo.parent, kept, symlinks=True)
                print(f"seed {seed}, round {number}, kept in {kept}:", *wrong, sep="\n  ")
                return 1
            shutil.rmtree(queue.repo.parent)
    killed = ", ".join(f"{what} {totals[what]}" for what in KILLS)
    print(f"{number} rounds, {sum(totals[what] for what in KILLS)} kills ({killed}), {totals['too late']} came too late")
    print(f"landed once {totals['landed']}, returned once {totals['returned']}, gates begun {totals['gates']}, violations 0")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    choice = parser.parse_args()
    sys.exit(campaign(choice.seconds, choice.seed))
