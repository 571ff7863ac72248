"""The rows of the benchmark's table, in groups: each a generator that measures a figure and its floor in turn."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import pty
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import merge_simulator
import psutil
import pytest
from bench_harness import PYTHON, Bench, Cost, Farmed, Row, Samples, all_at_once, bash, check, timed
from paths import ROOT, SCRIPTS
from sandbox import NeverStopped, git, wait_until

import farm as toolkit

FILE_BYTES = 10_000  # 20,000 of them are 200 MB
BARE_START = (PYTHON, "-I", "-S", "-c", "pass")
CORES = os.cpu_count() or 1
# What matters first stands first: what agents feel, what a task costs, what a run takes, then the farm's start.
ORDER = ("verbs", "claims at once", "a long history", "own time per landed task", "merges", "runs", "up, small repo",
         "idle loop, status", "isolation", "hosts", "gate runs (simulated)", "up, large repo")
GROUPS: dict[str, Callable[[Bench], Iterator[Row]]] = dict.fromkeys(ORDER)

BARE_UP = """
for ((i = 1; i <= $2; i++)); do
  git -C "$1" worktree add -q -b "floor/$i" "$3/$i"
  tmux -L floor -f /dev/null new-session -d -s "$i" -c "$3/$i" "exec sleep 600"
done"""
FASTEST_UP = """
sessions=()
for ((i = 1; i <= $2; i++)); do
  git -C "$1" worktree add -q --no-checkout -b "floor/$i" "$3/$i"
  sessions+=(new-session -d -s "$i" -c "$3/$i" "exec sleep 600" ";")
done
seq "$2" | xargs -P "$4" -I {} git -C "$3/{}" reset -q --hard
tmux -L floor -f /dev/null "${sessions[@]}" """
SWITCHES = 'for ((i = 1; i <= $2; i++)); do git -C "$3/agent-$(printf %03d "$i")-worktree" switch -q -C "floor/$i" main; done'
NEXT_TASKS = """
for ((i = 1; i <= $2; i++)); do
  printf -v agent 'agent-%03d' "$i"
  "$4/agent/start-task.sh" -a "$agent" -t t-0001 -b main "$3/$agent-worktree"
done"""
PLAIN_REMOVE = 'for ((i = 1; i <= $2; i++)); do git -C "$1" worktree remove "$3/$i"; done'
MERGES = 'for ((i = 1; i <= $2; i++)); do git -C "$1" merge -q --no-ff -m "merge $i" "work/$i"; done'
PLAIN_LANDING = 'git -C "$1" switch -q -c next main; git -C "$1" switch -q main; git -C "$1" merge -q --no-ff -m "land it" "$2"'
SCRIPTED_AGENT = 'echo "$FARM_TASK" >"$FARM_TASK.txt" && git add --all && git commit --quiet --message "$FARM_TITLE"'


def measures(name: str):
    """Register a generator of rows under `name`, by which --only picks it."""

    def register(function):
        GROUPS[name] = function
        return function

    return register


# --- sessions --------------------------------------------------------------------------------------------------------


def measure_floors(farmed: Farmed, count: int, samples: Samples) -> None:
    """The two ways without the farm, and the plain tear-down of what they made."""
    for name, script in (("bare", BARE_UP), ("fastest", FASTEST_UP)):
        farmed.wipe()
        samples.add(name, bash(script, farmed.repo, count, farmed.floor, CORES))
        if name == "fastest":
            samples.add("kill-server", timed("tmux", "-L", "floor", "kill-server"))
            samples.add("plain remove", bash(PLAIN_REMOVE, farmed.repo, count, farmed.floor))
    farmed.wipe()


def measure_life(farmed: Farmed, count: int, samples: Samples) -> None:
    """A farm from its first `up` to `clean`, and what comes in between."""
    samples.add("up", farmed.up(count))
    samples.add("up, running", farmed.up(count))
    samples.add("down", farmed.main("down", "--now"))
    samples.add("up, reused", farmed.up(count))
    farmed.main("down", "--now")
    place = (farmed.repo, count, farmed.worktrees)
    samples.add("switches", bash(SWITCHES, *place))
    samples.add("next tasks", bash(NEXT_TASKS, *place, SCRIPTS))
    samples.add("clean", farmed.main("clean"))
    check(not list(farmed.worktrees.glob("agent-*")), "clean has left worktrees")
    farmed.wipe()


def lacks_room(repo: Path, count: int) -> bool:
    """Whether the disk may not hold so many worktrees twice, which can be when those of before are still being deleted."""
    size = sum(path.stat().st_size for path in repo.glob("d*/*"))
    return shutil.disk_usage(repo).free < 3 * count * size


def session_rows(bench: Bench, repo: Path, kind: str, fastest_bound: str) -> Iterator[Row]:
    """`up` to `clean` on one repo, for each number of agents, beside the floors."""
    for count in bench.size.agents:
        farmed, samples, what = Farmed(repo), Samples(), f"{count} agents, {kind}"
        if lacks_room(repo, count):
            yield Row(f"up: {what}", None, None, note="not measured: the disk has too little room")
            continue
        measure_floors(farmed, count, Samples())  # not counted: the first one finds memory and disk as no later one does
        for _ in range(bench.size.rounds):
            measure_floors(farmed, count, samples)
            measure_life(farmed, count, samples)
        bound = "<= 0.3 s" if count == 10 else ""
        yield samples.row(f"up: {what}: bare", "up", "bare")
        yield samples.row(f"up: {what}: fastest", "up", "fastest", fastest_bound)
        yield samples.row(f"second up: {what}: all running", "up, running", "switches", note="floor: a git switch each")
        yield samples.row(f"second up: {what}: worktrees there", "up, reused", "switches", note="floor: a git switch each")
        yield samples.row(f"next task: {what}", "next tasks", "switches", note="start-task.sh; floor: a git switch each")
        yield samples.row(f"down --now: {what}", "down", "kill-server", bound, "floor: tmux kill-server")
        yield samples.row(f"clean: {what}", "clean", "plain remove", bound, "floor: git worktree remove each")


@measures("up, small repo")
def small_rows(bench: Bench) -> Iterator[Row]:
    yield from session_rows(bench, bench.repo(100), "100 files", "<= 2 x")


@measures("up, large repo")
def large_rows(bench: Bench) -> Iterator[Row]:
    repo = bench.repo(bench.size.large_files, FILE_BYTES)
    yield from session_rows(bench, repo, f"{bench.size.large_files:,} files", "<= 1.15 x")
    shutil.rmtree(repo)


@measures("idle loop, status")
def idle_rows(bench: Bench) -> Iterator[Row]:
    """CPU and memory of a loop whose agents have nothing to do; `status` meanwhile."""
    count, farmed, samples = max(bench.size.agents), bench.farmed(), Samples()
    farmed.up(count)
    loop, merger = (psutil.Process(wait_until(lambda name=name: toolkit.find_recorded(farmed.store.path(name))))
                    for name in ("loop.lock", "merger.lock"))
    time.sleep(min(5, bench.size.idle_seconds))  # until every agent has asked for a task once
    panes = toolkit.probe_sessions(toolkit.farm_socket(str(farmed.repo))).items()
    sessions = [psutil.Process(pane.pid) for name, pane in panes if name != toolkit.CONTROL]
    parts = {"all": [loop, merger], "merger": [merger], "sessions": sessions}
    share = watch(parts, bench.size.idle_seconds)
    memory = loop.memory_info().rss + merger.memory_info().rss
    with watching(farmed) as process:
        seen = watch({"status": [process]}, bench.size.idle_seconds)["status"]
    for _ in range(5 * bench.size.rounds):
        samples.add("status", farmed.main("status"))
        samples.add("start", timed(sys.executable, "-c", "pass"))
    farmed.main("down", "--now")
    note = f"of one core; the loop, its merger ({share['merger']:.2f} %) and their children"
    yield Row(f"idle loop: {count} agents", share["all"], None, "%", "<= 1 %", note)
    yield Row(f"idle sessions: {count} agents", share["sessions"], None, "%", "", "of one core; run-agent.sh's looks for tasks")
    yield Row("idle loop: memory", memory / 2**20, None, "MiB", "<= 60 MiB", "resident, loop and merger")
    status, start = samples.median("status"), samples.median("start")
    over = f"{1000 * (status.seconds - start.seconds):.0f} ms over its interpreter's start"
    yield samples.row(f"status: {count} agents", "status", "start", f"<= {start.seconds + 0.15:.3f} s", over)
    yield Row(f"status --watch: {count} agents", seen, None, "%", "<= 2 %", "of one core, on a terminal, its children too")


@contextlib.contextmanager
def watching(farmed: Farmed) -> Iterator[psutil.Process]:
    """`status --watch` on a terminal of its own, whose first frame is drawn."""
    master, slave = pty.openpty()
    argv = [sys.executable, "-I", str(ROOT / "farm.py"), "--repo", str(farmed.repo), "status", "--watch"]
    with subprocess.Popen(argv, stdin=slave, stdout=slave, env={**os.environ, "COLUMNS": "80", "LINES": "50"}) as process:
        threading.Thread(target=drain, args=(master,), daemon=True).start()
        time.sleep(3)
        yield psutil.Process(process.pid)
        process.terminate()
    os.close(slave)


def drain(descriptor: int) -> None:
    """Read what comes, until nobody can write any more."""
    with contextlib.suppress(OSError), open(descriptor, "rb", buffering=0) as terminal:
        while terminal.read(65536):
            pass


def watch(parts: dict[str, list[psutil.Process]], seconds: float) -> dict[str, float]:
    """The CPU that each part takes for so long, in percent of one core."""
    before, began = {name: cpu_of(part) for name, part in parts.items()}, time.monotonic()
    time.sleep(seconds)
    passed = time.monotonic() - began
    return {name: 100 * (cpu_of(part) - before[name]) / passed for name, part in parts.items()}


def cpu_of(processes: list[psutil.Process]) -> float:
    """CPU seconds of processes and all below them, each once, with what their ended children took."""
    total, seen = 0.0, set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            seen.update([process, *process.children(recursive=True)])
    for process in seen:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])
    return total


# --- verbs -----------------------------------------------------------------------------------------------------------


@measures("verbs")
def verb_rows(bench: Bench) -> Iterator[Row]:
    """Each of an agent's verbs from a shell, with a full queue and ten others at work."""
    rounds = bench.size.verb_rounds
    farmed, samples = bench.farmed(2 * rounds + 30), Samples()
    for number in range(10):
        farmed.claim(f"other-{number}")
    for _ in range(rounds):
        samples.add("start", timed(*BARE_START))
        fence, cost = farmed.claim("one")
        samples.add("claim", cost)
        samples.add("renew", farmed.verb("renew", "one", "--fence", fence))
        samples.add("lock", farmed.verb("lock", "one", "schema", "--owner-pid", os.getpid()))
        samples.add("unlock", farmed.verb("unlock", "one", "schema"))
        samples.add("release", farmed.verb("release", "one", "--fence", fence))
        samples.add("submit", farmed.submit("one", farmed.claim("one")[0]))
        samples.add("fail", farmed.verb("fail", "one", "--fence", farmed.claim("one")[0], "--why", "it did not work"))
    for name in ("claim", "renew", "release", "submit", "fail", "lock", "unlock"):
        yield samples.row(f"verb: {name}", name, "start", "<= 4 x")


@measures("claims at once")
def claim_rows(bench: Bench) -> Iterator[Row]:
    """Many agents claim at the same moment; every task is claimed once."""
    samples, count = Samples(), bench.size.claims
    for _ in range(bench.size.rounds):
        farmed = bench.farmed(count)
        shim = (SCRIPTS / "farm", "--repo", farmed.repo, "claim")
        samples.add("starts", all_at_once([BARE_START] * count))
        calls = [(*shim, f"agent-{number}", "--owner-pid", os.getpid()) for number in range(count)]
        samples.add("claims", all_at_once(calls, {"FARM_PYTHON": PYTHON}))
        tasks = [claim.task["id"] for claim in farmed.store.load().claims.values()]
        check(len(tasks) == len(set(tasks)) == count, f"{len(set(tasks))} of {count} tasks are claimed")
    yield samples.row(f"{count} claims at once", "claims", "starts", "<= 5 x", "every task claimed once")


# --- tasks to main ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def timed_parts(queue: toolkit.MergeQueue) -> Iterator[collections.Counter]:
    """Seconds in each script that farm.py runs meanwhile, by its name, and in making the record."""
    spent = collections.Counter()

    def timing(function: Callable, name_of: Callable[..., str]) -> Callable:
        def run(*args, **options):
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                spent[name_of(*args)] += time.perf_counter() - began

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toolkit, "run_script", timing(toolkit.run_script, lambda name, *_: name))
        patch.setattr(queue.landing, "record", timing(queue.landing.record, lambda _: "record"))
        yield spent


@measures("own time per landed task")
def landing_rows(bench: Bench) -> Iterator[Row]:
    """What the toolkit costs for one task on its way, with a gate that takes no time; tasks go one after the other."""
    farmed, samples = bench.farmed(bench.size.landings), Samples()
    timed(SCRIPTS / "mk-worktrees.sh", "-C", farmed.repo, "-n", "1")
    settings = toolkit.load_settings(str(farmed.repo), {"gate": "true", "slots": 1})
    queue = toolkit.MergeQueue(farmed.store, settings, "main", str(farmed.worktrees))
    for _ in range(bench.size.landings):
        measure_landing(farmed, queue, samples)
    parts = {name: samples.median(name).seconds for name in samples.costs if name != "git"}
    floor = samples.median("git").seconds
    yield Row("own time per landed task", sum(parts.values()), floor, note="floor: git switch to a branch, merge --no-ff")
    for name, seconds in parts.items():
        yield Row(f"  of it {name}", seconds)


def measure_landing(farmed: Farmed, queue: toolkit.MergeQueue, samples: Samples) -> None:
    """One task from claim to landed, in its parts."""
    fence, cost = farmed.claim("agent-001")
    samples.add("claim", cost)
    task, worktree = fence.rpartition(".")[0], farmed.worktrees / "agent-001-worktree"
    samples.add("start-task", timed(SCRIPTS / "agent/start-task.sh", "-a", "agent-001", "-t", task, "-b", "main", worktree))
    samples.add("submit", farmed.submit("agent-001", fence))
    samples.add("git", bash(PLAIN_LANDING, farmed.clone(), f"farm/agent-001/{task}"))
    parts = merge_one(queue)
    check(task in farmed.store.load().landed, f"{task} has not landed")
    for name, seconds in parts.items():
        samples.add(name, Cost(seconds, 0))


def merge_one(queue: toolkit.MergeQueue) -> dict[str, float]:
    """Run the merge queue in this process until it is empty: seconds by part; `rest` is the gate's start and all waits."""
    with timed_parts(queue) as spent, contextlib.redirect_stderr(io.StringIO()):
        began = time.perf_counter()
        toolkit.Merger(queue, forever=False).run(NeverStopped())
        whole = time.perf_counter() - began
    parts = {"chain": "merge/chain.sh", "slot": "merge/gate-slot.sh", "land": "merge/land.sh", "pin": "merge/pins.sh",
             "record": "record"}
    seconds = {name: spent[key] for name, key in parts.items()}
    return {**seconds, "rest": whole - sum(seconds.values())}


@measures("runs")
def run_rows(bench: Bench) -> Iterator[Row]:
    """Many scripted agents on a queue of small tasks, to the end; each lands exactly once."""
    for count in bench.size.runs:
        tasks = bench.size.run_tasks
        farmed = bench.farmed(tasks)
        cost = farmed.main("run", "-n", count, "--agent", SCRIPTED_AGENT, "--gate", "true", "--until-drained")
        log = git(farmed.repo, "log", "--first-parent", "--format=%(trailers:key=Farm-Task,valueonly)", "main").split()
        check(len(log) == len(set(log)) == tasks, f"{len(set(log))} of {tasks} tasks have landed, in {len(log)} merges")
        yield Row(f"run: {count} scripted agents, {tasks} tasks", cost.seconds, None, note="each landed exactly once")


@measures("merges")
def merge_rows(bench: Bench) -> Iterator[Row]:
    """Disjoint branches from submitted to landed, beside as many plain merges."""
    samples, count = Samples(), bench.size.merges
    for _ in range(bench.size.rounds):
        farmed = bench.farmed(count, bench.size.merge_files)
        for number in range(1, count + 1):
            farmed.submit(f"agent-{number}", farmed.claim(f"agent-{number}")[0])
            farmed.make_branch(f"work/{number}", f"{number}.txt")
        samples.add("git", bash(MERGES, farmed.clone(), count))
        samples.add("farm", farmed.main("merge", "--gate", "true"))
        check(farmed.store.load().count_landed() == count, "not all have landed")
    rates = [count / samples.median(name).seconds for name in ("farm", "git")]
    title = f"merges: {count} branches, {bench.size.merge_files:,} files"
    yield Row(title, *rates, "1/s", ">= 10 1/s", "from submitted to landed; floor: git merge --no-ff each")


@measures("gate runs (simulated)")
def planner_rows(bench: Bench) -> Iterator[Row]:
    """The planner's counts, from the simulator, with what other policies need beside them."""
    for row in merge_simulator.measure_all(bench.size.draws, 1):
        others = ", ".join(f"{name} {value:.4g}" for name, value in zip(merge_simulator.OTHERS, row.others, strict=True))
        yield Row(row.figure, row.farm, None, "", "" if row.bound is None else f"<= {row.bound:.4g}", others)


