#!/usr/bin/env python3
"""A year in a day: thousands of tasks through a farm of scripted agents; at the end nothing has grown but what should.

Usage: year.py [--tasks N] [-n AGENTS]
Tasks come in waves, as in a year; the work of each is a line in one of a hundred files, so that the repo does not grow; the gate
is `true`. Checked: each task landed exactly once; refs, branches and files below coordination/ are as many as live work needs;
loop and merger stay below 60 MiB. Printed beside it: how fast the first hundred tasks landed, and the last.
Exit: 0 all hold, 1 one does not, 2 usage.
"""
from __future__ import annotations

import argparse
import datetime
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import table
from bench_harness import Bench, Farmed, private_place
from paths import SCRIPTS
from sandbox import git

import farm as toolkit

AGENT = 'echo "$FARM_TASK" >"${FARM_TASK: -2}.txt" && git add --all && git commit --quiet --message "$FARM_TASK"'
MEMORY_MIB, PART = 60, 100
WAVE, LOW = 400, 200  # so many are added when fewer are left


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=10_000, help="how many (default: %(default)s)")
    parser.add_argument("-n", type=int, default=4, help="agents (default: %(default)s)")
    options = parser.parse_args(argv)
    with private_place() as box:
        farmed = Bench(None, box).farmed()
        began = time.monotonic()
        memory = run(farmed, options.n, options.tasks)
        print(f"{options.tasks} tasks, {options.n} agents: {time.monotonic() - began:.0f} s")
        return report(farmed, options.tasks, options.n, memory)


def add_wave(farmed: Farmed, added: int, tasks: int) -> int:
    """Add the next wave where few are left; how many have been added by then."""
    more = min(WAVE, tasks - added)
    if more and len(farmed.store.snapshot().pending) < LOW:
        farmed.main("add", "-f", "-", input="".join(f"task {number}\n" for number in range(added, added + more)))
        return added + more
    return added


def run(farmed: Farmed, agents: int, tasks: int) -> dict[str, float]:
    """The whole run; the most memory (MiB, resident) that the loop and the merger have had meanwhile."""
    # what landed work leaves in files goes after some seconds instead of thirty days
    environment = {**os.environ, "FARM_KEEP_DAYS": "0.0001", "FARM_PYTHON": sys.executable}
    words = [str(SCRIPTS / "farm"), "--repo", str(farmed.repo), "run", "-n", str(agents), "--agent", AGENT, "--gate", "true",
             "--until-drained"]
    most, added, told = {"loop": 0.0, "merger": 0.0}, add_wave(farmed, 0, tasks), 0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(words, env=environment, stdout=said, stderr=said)
        while process.poll() is None:
            now = {name: memory_of(farmed, name) for name in most}
            most = {name: max(most[name], now[name]) for name in most}
            added, landed = add_wave(farmed, added, tasks), farmed.store.snapshot().count_landed()
            if landed - told >= max(tasks // 10, 1):
                told = landed
                print(f"{landed} landed, MiB: " + ", ".join(f"{name} {mib:.1f}" for name, mib in now.items()), flush=True)
            time.sleep(0.5)
        said.seek(0)
        if process.returncode:
            raise SystemExit(f"year: the run ended with {process.returncode}\n{said.read()[-2000:].decode()}")
    return most


def memory_of(farmed: Farmed, name: str) -> float:
    """MiB, resident, of the loop or the merger; 0 where there is none."""
    pid = toolkit.find_recorded(farmed.store.path(f"{name}.lock"))
    try:
        return psutil.Process(pid).memory_info().rss / 2**20 if pid else 0.0
    except psutil.Error:
        return 0.0


def report(farmed: Farmed, tasks: int, agents: int, memory: dict[str, float]) -> int:
    """Print what has become of it; 1 when something does not hold."""
    state = farmed.store.snapshot()
    done = [task for task in state.all_tasks() if task.state == "landed"]
    log = git(farmed.repo, "log", "--first-parent", "--format=%(trailers:key=Farm-Task,valueonly)", "main").split()
    refs = git(farmed.repo, "for-each-ref", "--format=%(refname)", "refs/farm", "refs/heads/farm").split()
    settings = toolkit.load_settings(str(farmed.repo), {"keep_days": "0.00001"})
    toolkit.Housekeeping(toolkit.Site(farmed.store, settings, "main")).go_on(state)
    files = sum(len(names) for _, _, names in os.walk(farmed.store.folder))
    rows = [
        ("landed", len({task.id for task in done}), f">= {tasks}"),
        ("merges of a task that is on main already", len(log) - len(set(log)), "<= 0"),
        ("refs and branches", len(refs), f"<= {2 * agents + toolkit.LANDED_KEPT}"),
        ("files below coordination/", files, f"<= {60 + 20 * agents}"),
        ("bytes of the queue files", sum(Path(farmed.store.path(name)).stat().st_size
                                         for name in (toolkit.PENDING_FILE, toolkit.READY_FILE)), "<= 100000"),
        *((f"memory of the {name}, MiB", most, f"<= {MEMORY_MIB}") for name, most in memory.items()),
    ]
    kept = [table.is_kept(value, float(bound.split()[1]), bound.split()[0]) for _, value, bound in rows]
    for (name, value, bound), is_kept in zip(rows, kept, strict=True):
        print(f"{name:<45} {value:>10.4g} {bound:>10}  {table.VERDICTS[is_kept]}")
    print_pace(sorted(datetime.datetime.fromisoformat(task.landed_at.replace("Z", "+00:00")) for task in done))
    return 0 if all(kept) else 1


def print_pace(times: list[datetime.datetime]) -> None:
    """Seconds a task, of each tenth of the run."""
    if len(times) < 2 * PART:
        return
    gaps = [(after - before).total_seconds() for before, after in itertools.pairwise(times)]
    first, last = (sum(part) / len(part) for part in (gaps[:PART], gaps[-PART:]))
    print(f"seconds a task: the first {PART} {first:.3f}, the last {PART} {last:.3f}, {last / first:.2f} x")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
