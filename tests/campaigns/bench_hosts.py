"""The rows of hosts: moves over `farm serve`, beside a process each. Imported for its group, which registers itself."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator

from bench_harness import PYTHON, Bench, Cost, Farmed, Row, Samples, check
from bench_rows import measures
from paths import SCRIPTS


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

    connections, agents = bench.size.clients // 2, 20
    farmed = bench.farmed(connections * agents)
    hosts = [Connection(farmed, f"r{number}", agents) for number in range(connections)]
    longest: list[float] = []
    seconds = at_once([lambda host=host: longest.append(host.renew(host.claims)) for host in hosts])
    note = f"{connections} connections; the longest waited {max(longest):.2f} s"
    yield Row(f"hosts: all claims of {connections * agents} agents renewed", seconds, None, "s", "", note)
    for host in hosts:
        host.close()
