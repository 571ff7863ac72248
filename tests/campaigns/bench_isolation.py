"""The rows of sandboxes: what they cost beside the same without."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
from bench_harness import Bench, Farmed, Row, Samples, timed
from bench_rows import measures
from paths import SCRIPTS
from sandbox import git, wait_until

CONFINE = SCRIPTS / "sandbox/confine.sh"


def start(farmed: Farmed, kind: str, folder: Path, isolate: str):
    """A command's start and end in `folder`, as the farm starts an agent or a gate."""
    words = ["bash", "-c", 'cd "$1" && exec "${@:2}"', "bash", folder]
    words += ["bash", CONFINE, kind, farmed.repo, folder] if isolate != "none" else []
    env = {"FARM_ISOLATE": isolate} if kind == "agent" else {"FARM_ISOLATE": isolate, "TMPDIR": str(folder) + ".tmp"}
    return timed(*words, "bash", "-c", "exit 0", env=env)


def find_named(root: psutil.Process, name: str) -> list[psutil.Process]:
    """The processes of that name at and below `root`; some of those that begin it are over at once."""
    found = []
    for one in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [one] if one.name() == name else []
    return found


def resident_mib(farmed: Farmed, folder: Path) -> float:
    """What a sandbox's own processes hold while its command waits; pages that they share count in part."""
    command = ["bash", CONFINE, "agent", farmed.repo, folder, "sleep", "60"]
    with subprocess.Popen(command, cwd=folder, env={**os.environ, "FARM_ISOLATE": "bwrap"}) as process:
        root = psutil.Process(process.pid)
        wait_until(lambda: find_named(root, "sleep"), message="the command in the sandbox")
        held = sum(one.memory_full_info().pss for one in find_named(root, "bwrap"))
        process.kill()
    return held / 2**20


@measures("isolation")
def isolation_rows(bench: Bench) -> Iterator[Row]:
    """An agent's start, a gate's, what a sandbox holds, `up` of ten, and the look at what is submitted."""
    samples, farmed = Samples(), bench.farmed(1)
    farmed.up(1)
    farmed.main("down", "--now")
    tree, slot = farmed.worktrees / "agent-001-worktree", farmed.worktrees / "gate-1"
    mailbox = farmed.repo / "coordination/mailbox/agent-001"
    mailbox.mkdir(parents=True, exist_ok=True)
    (mailbox / "pid").touch()
    timed("bash", SCRIPTS / "merge/gate-slot.sh", "prepare", "-C", farmed.repo, slot, "main")
    Path(f"{slot}.tmp").mkdir(exist_ok=True)
    for _ in range(max(2, bench.size.verb_rounds)):
        for kind, folder in (("agent", tree), ("gate", slot)):
            for isolate in ("bwrap", "none"):
                samples.add(f"{kind} {isolate}", start(farmed, kind, folder, isolate))
    for kind, most in (("agent", 20), ("gate", 30)):
        more = 1000 * (samples.median(f"{kind} bwrap").seconds - samples.median(f"{kind} none").seconds)
        yield samples.row(f"start of a sandboxed {kind}", f"{kind} bwrap", f"{kind} none", note="floor: without a sandbox")
        yield Row(f"the same, in milliseconds more: {kind}", more, None, "ms", f"<= {most}")
    yield Row("memory of a sandbox", resident_mib(farmed, tree), None, "MiB", "<= 5")
    git(farmed.repo, "branch", "work", git(farmed.repo, "commit-tree", "-p", "main", "-m", "x", "main^{tree}"))
    for _ in range(bench.size.rounds):
        samples.add("rev-list", timed("git", "-C", farmed.repo, "rev-list", "--objects", "work", "^main"))
        samples.add("verify", timed("bash", SCRIPTS / "sandbox/verify-objects.sh", "-C", farmed.repo, "-b", "main", "work"))
    yield samples.row("objects verified at a submit", "verify", "rev-list", note="floor: git rev-list of them")
    ten = Farmed(bench.repo(100))
    for _ in range(bench.size.rounds):
        for isolate in ("none", "bwrap"):
            samples.add(f"up {isolate}", ten.main("up", "-n", bench.size.agents[0], "--agent", "true", isolate=isolate))
            ten.main("down", "--now")
            ten.wipe()
    yield samples.row(f"up: {bench.size.agents[0]} isolated agents", "up bwrap", "up none", "<= 1.3 x", "floor: without sandboxes")
