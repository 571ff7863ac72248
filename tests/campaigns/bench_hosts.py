"""The rows of hosts: moves over `farm serve`, beside a process each. Imported for its group, which registers itself."""

from __future__ import annotations

import json
import math
import subprocess
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
from bench_harness import PYTHON, Bench, Cost, Farmed, Row, Samples, check
from bench_rows import measures
from paths import SCRIPTS
from sandbox import git, wait_until


class Connection:
    """One host's `farm serve`, with claims in its hands."""

    def __init__(self, farmed: Farmed, host: str, agents: int):
        argv = [PYTHON, "-I", "-S", "-OO", "-c", START, str(SCRIPTS.parent), "--repo", str(farmed.repo), "serve", host]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.ask("hello", pid="1", start=host, boot="elsewhere")
        self.claims = []
        for number in range(1, agents + 1):
            agent = f"{host}-agent-{number:03d}"
            claim = self.ask("claim", agent=agent, preset="", takes=[""])["claim"]
            self.claims.append({"agent": agent, "fence": claim["fence"]})

    def ask(self, move: str, **words) -> dict:
        self.process.stdin.write(json.dumps({"move": move, **words}).encode() + b"\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        check(answer["code"] == 0, f"{move}: {answer}")
        return answer

    def renew(self, claims: list[dict]) -> float:
        """Seconds that it took."""
        began = time.perf_counter()
        check(self.ask("renew", claims=claims, agents=[])["lost"] == [], "a claim is lost")
        return time.perf_counter() - began

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


START = "import sys; sys.path.insert(0, sys.argv.pop(1)); import farm; farm.leave(farm.main(sys.argv[1:]))"


def at_once(works: list) -> float:
    """Seconds until all that were started together are over."""
    threads = [threading.Thread(target=work) for work in works]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


@measures("hosts")
def host_rows(bench: Bench) -> Iterator[Row]:
    """A move of a process of its own and one over a connection; the moves of twenty; a renewal of all of many agents."""
    rounds, count = 10 * bench.size.verb_rounds, 20
    farmed, samples = bench.farmed(rounds + 50), Samples()
    own = farmed.claim("own")[0]
    one = Connection(farmed, "h1", 1)
    for _ in range(rounds // 5):
        samples.add("process", farmed.verb("renew", "own", "--fence", own))
        for _ in range(5):
            samples.add("serve", Cost(one.renew(one.claims), 0.0))
    yield samples.row("hosts: a move over serve, beside a process", "serve", "process", "<= 0.01 s")
    one.close()

    hosts = [Connection(farmed, f"m{number}", 1) for number in range(count)]
    seconds = at_once([lambda host=host: [host.renew(host.claims) for _ in range(rounds // 5)] for host in hosts])
    moves = count * (rounds // 5)
    yield Row(f"hosts: moves a second, {count} connections", moves / seconds, None, "1/s", ">= 150 1/s", f"{moves} moves")
    for host in hosts:
        host.close()

    yield dead_host_row(bench)
    yield from crowd_rows(bench)


def dead_host_row(bench: Bench) -> Row:
    """A host with the only task is killed; an agent of the hub's has waited for one."""
    lease, farmed = 6.0, bench.farmed(1)
    host = Connection(farmed, "d1", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FARM_HOST_LEASE_SECONDS", str(lease))
        farmed.main("up", "-n", 1, "--agent", "sleep 600", "--gate", "true")
        host.renew(host.claims)
        host.process.kill()
        host.close()
        began = time.perf_counter()
        wait_until(lambda: "agent-001" in farmed.store.snapshot().claims, 60, "the task to be taken over")
        seconds = time.perf_counter() - began
        farmed.main("down", "--now")
    note = f"after a lease of {lease:.0f} s ({seconds:.1f} s in all)"
    return Row("hosts: a dead host's task at work elsewhere", seconds - lease, None, "s", "<= 10 s", note)


class Crowd:
    """The agents of one host as time goes by: each hands in and takes a task every ten minutes, and all are renewed each third
    of a lease of 90 s, in one move."""

    AGENTS, TASK, THIRD = 20, 600.0, 30.0

    def __init__(self, farmed: Farmed, host: str, commit: str):
        self.connection, self.commit = Connection(farmed, host, self.AGENTS), commit

    def hand_in(self, number: int) -> None:
        """An agent's work is ready, and it takes another task."""
        claim = self.connection.claims[number]
        self.connection.ask("submit", **claim, task={"title": "x", "commit": self.commit})
        answer = self.connection.ask("claim", agent=claim["agent"], preset="", takes=[""])
        claim["fence"] = answer["claim"]["fence"]

    def live(self, seconds: float, pressed: float) -> None:
        """Make each move when it is due, or as soon as the one before is answered; waits: from then on, in seconds."""
        count, task, third = self.AGENTS, self.TASK / pressed, self.THIRD / pressed
        due = [(task * number / count, self.hand_in, number) for number in range(count)]
        due += [(third * number, self.connection.renew, self.connection.claims) for number in range(math.ceil(seconds / third))]
        self.waits, began = [], time.perf_counter()
        for when, move, what in sorted(due, key=lambda one: one[0]):
            if when < seconds:
                time.sleep(max(0.0, began + when - time.perf_counter()))
                move(what)
                self.waits.append(time.perf_counter() - began - when)


def measure_crowds(crowds: list[Crowd], seconds: float, pressed: int) -> Row:
    """Each move is answered, or this fails. The connections are hosts that came one after the other, each in its turn."""
    servers = [psutil.Process(crowd.connection.process.pid) for crowd in crowds]
    spent = sum(sum(server.cpu_times()[:4]) for server in servers)
    spread = Crowd.THIRD / pressed / len(crowds)

    def live(number: int, crowd: Crowd) -> None:
        time.sleep(spread * number)
        crowd.live(seconds, pressed)

    took = at_once([lambda number=number, crowd=crowd: live(number, crowd) for number, crowd in enumerate(crowds)])
    cores = (sum(sum(server.cpu_times()[:4]) for server in servers) - spent) / took
    memory = sum(server.memory_info().rss for server in servers) / 2**20
    waits = sorted(wait for crowd in crowds for wait in crowd.waits)
    note = f"{len(waits)} moves in {took:.0f} s; half within {waits[len(waits) // 2]:.2g} s; {cores:.1f} cores, {memory:.0f} MiB"
    name = f"hosts: {len(crowds) * Crowd.AGENTS} agents, time pressed by {pressed}: the longest wait"
    return Row(name, waits[-1], None, "s", "", note)


def crowd_rows(bench: Bench) -> Iterator[Row]:
    """What a hub spends on many agents: pressed by twenty, and in full size for a minute as it is, too."""
    connections = bench.size.hosts
    farmed = bench.farmed(connections * Crowd.AGENTS * 2)
    commit = git(farmed.repo, "rev-parse", "main")
    crowds = [Crowd(farmed, f"r{number}", commit) for number in range(connections)]
    if connections >= 50:
        yield measure_crowds(crowds, 60.0, 1)
    yield measure_crowds(crowds, min(12.0, 3.0 * connections), 20)
    for crowd in crowds:
        crowd.connection.close()
