"""Rows about a farm with a long history, each beside the same call on a new farm, measured in turn."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator

from bench_harness import PYTHON, Bench, Cost, Farmed, Row, Samples, check
from bench_rows import measures
from paths import SCRIPTS

import farm as toolkit

PROMPT = "What is to be done, and how one sees that it is. " * 41  # 2 kB


def grow(farmed: Farmed, landed: int) -> None:
    """Give a new farm the landed tasks of a year, with their history and costs."""
    store, now = farmed.store, time.time()
    with store.transaction() as tx:
        for number in range(1, landed + 1):
            task = toolkit.Task(
                id=f"t-{number:04d}", title=f"task {number}", state="landed", rev=4, seq=number, queue_seq=number,
                ended_by="submit", agent="agent-001", fence=f"t-{number:04d}.2",
                branch=f"farm/agent-001/t-{number:04d}", commit="c0ffee" * 6,
                landed_commit="c0ffee" * 6, added_at=toolkit.utc(now - 3e6), submitted_at=toolkit.utc(now - 2e6),
                landed_at=toolkit.utc(now - 1e6 + number))
            tx.state.landed[task.id], tx.state.done[task.id] = task, task.rev
            for event in ("added", "claimed", "submitted", "landed"):
                store.append_event(event, task)
        tx.write("ready")
    for number in range(1, landed + 1):
        toolkit.note_usage(store, {"task": f"t-{number:04d}", "agent": "agent-001", "fence": f"t-{number:04d}.2"},
                           toolkit.Usage(50_000, 2_000, 0.12))


def add_open(farmed: Farmed, count: int, prompt: str = "") -> None:
    """Tasks that wait; the first move also takes the landed ones to the archive."""
    with contextlib.redirect_stderr(io.StringIO()), farmed.store.transaction() as tx:
        toolkit.TaskQueue(tx).add([toolkit.Task(title=f"open {number}", prompt=prompt) for number in range(count)], 3)


def measure_verbs(farmed: Farmed, samples: Samples, kind: str) -> None:
    """One turn of the agents' verbs and of status."""
    fence, cost = farmed.claim("one")
    samples.add(f"claim, {kind}", cost)
    samples.add(f"renew, {kind}", farmed.verb("renew", "one", "--fence", fence))
    samples.add(f"lock, {kind}", farmed.verb("lock", "one", "schema", "--owner-pid", os.getpid()))
    farmed.verb("unlock", "one", "schema")
    samples.add(f"submit, {kind}", farmed.submit("one", fence))
    samples.add(f"status, {kind}", farmed.main("status"))


def measure_ticks(farmed: Farmed, samples: Samples, kind: str) -> None:
    """A start with one agent, and ticks of the loop and of the merger, in this process."""
    settings = toolkit.load_settings(str(farmed.repo), {"gate": "true", "n": 1})
    samples.add(f"up, {kind}", farmed.up(1))
    farmed.main("pause")
    loop = toolkit.Farm(farmed.store, settings, [toolkit.Launch("", "true", "")], "main")
    queue = toolkit.MergeQueue(farmed.store, settings, "main", str(farmed.worktrees))
    for name, tick in (("loop", loop.tick), ("merger", queue.tick)):
        with contextlib.redirect_stderr(io.StringIO()):
            loop.merger.tend = lambda now: None
            tick()  # the first one of a process sees to what the last one has left
            time.sleep(1.1)  # and what is younger than a second is read at each
            tick()
            for _ in range(10):
                began, cpu = time.perf_counter(), time.process_time()
                tick()
                samples.add(f"{name}, {kind}", Cost(time.perf_counter() - began, time.process_time() - cpu))
    farmed.main("down", "--now")


@measures("a long history")
def year_rows(bench: Bench) -> Iterator[Row]:
    """The verbs, `up` and the ticks with 10,000 landed tasks, and a claim with 2,000 long ones that wait as well."""
    landed, pending = bench.size.history
    farms = {"new": bench.farmed(), "old": bench.farmed(), "full": bench.farmed()}
    grow(farms["old"], landed)
    shutil.copytree(farms["old"].store.folder, farms["full"].store.folder, dirs_exist_ok=True)
    for kind in ("new", "old"):
        add_open(farms[kind], 60)
    add_open(farms["full"], max(pending, 60), PROMPT)
    samples = Samples()
    for _ in range(bench.size.verb_rounds):
        for kind in ("new", "old"):
            measure_verbs(farms[kind], samples, kind)
        fence, cost = farms["full"].claim("one")
        samples.add("claim, full", cost)
        farms["full"].verb("release", "one", "--fence", fence)
    title = f"{landed:,} landed"
    for name in ("claim", "submit", "lock", "renew", "status"):
        bound, note = ("<= 1.5 x" if name == "status" else "<= 1.3 x"), "floor: the same on a new farm"
        yield samples.row(f"{title}: {name}", f"{name}, old", f"{name}, new", bound, note)
    yield samples.row(f"{title}, {pending:,} long ones wait: claim", "claim, full", "claim, new", "<= 2.5 x")
    for _ in range(bench.size.rounds + 1):
        for kind in ("new", "old"):
            measure_ticks(farms[kind], samples, kind)
    for name, words in (("up", "up, 1 agent"), ("loop", "a tick of the loop"), ("merger", "a tick of the merger")):
        yield samples.row(f"{title}: {words}", f"{name}, old", f"{name}, new", "<= 1.3 x")
    yield from crowd_rows(bench, farms["old"], landed)


def crowd_rows(bench: Bench, farmed: Farmed, landed: int) -> Iterator[Row]:
    """Many clients at once, each with a claim, a renew and a submit."""
    clients, waits = bench.size.clients, []
    with farmed.store.transaction() as tx:
        toolkit.TaskQueue(tx).add([toolkit.Task(title=f"crowd {number}") for number in range(clients)], 3)
    farmed.make_branch("crowd", "crowd.txt")
    shim, environment = [str(SCRIPTS / "farm"), "--repo", str(farmed.repo)], {**os.environ, "FARM_PYTHON": PYTHON}

    def call(*words: str) -> str:
        began = time.perf_counter()
        done = subprocess.run([*shim, *words], env=environment, capture_output=True, text=True)
        check(done.returncode == 0, f"{words}: {done.stderr}")
        waits.append(time.perf_counter() - began)
        return done.stdout

    def work(agent: str) -> None:
        fence = json.loads(call("claim", agent, "--owner-pid", str(os.getpid())))["fence"]
        call("renew", agent, "--fence", fence)
        call("submit", agent, "--fence", fence, "--commit", "crowd")

    threads = [threading.Thread(target=work, args=(f"crowd-{number}",)) for number in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    check(len(waits) == 3 * clients, "not every move was answered")
    yield Row(f"{landed:,} landed: {clients} clients at once", len(waits) / seconds, None, "1/s", "", "claim, renew, submit each")
    yield Row("  of it the longest wait", max(waits), None, "s", "", "a process each, all at the same moment")
