"""`make chaos HOSTS=3`: hosts and their hub, of which something is killed or stands still at random; a short form in the suite.

CHAOS_SECONDS, CHAOS_HOSTS and CHAOS_SEED say how long, how many hosts, and which choices.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time

import psutil
from farm_calls import landed
from host_calls import Spoke, make_ssh
from repo_calls import landed_on_main
from sandbox import git, run, wait_until

SECONDS, HOSTS = float(os.environ.get("CHAOS_SECONDS", "8")), int(os.environ.get("CHAOS_HOSTS", "3"))
LEASE = 5
# Two commits with a pause; now and then the first attempt hands in what the gate refuses.
AGENT = """
rm -f red
for i in 1 2; do echo "$i" >>"$FARM_TASK.txt"; git add -A; git commit -qm "$i of $FARM_TASK"; sleep 0.$((RANDOM % 9)); done
if [ "$FARM_ATTEMPT" = 1 ] && [ $((RANDOM % 4)) = 0 ]; then echo "$FARM_TASK" >red; fi
"""
GATE = "! [ -e red ]"


class Chaos:
    """The farm's processes by what they are, and what is done to them."""

    def __init__(self, farm, ssh: str, seed: int):
        self.farm, self.random, self.frozen = farm, random.Random(seed), {}
        self.hosts = {f"h{number}": Spoke(farm, f"h{number}", ssh, 2, AGENT) for number in range(1, HOSTS + 1)}
        self.done: list[str] = []

    def start_loop(self) -> None:
        self.loop = self.farm.start("run", "-n", "1", "--agent", AGENT, "--gate", GATE)

    def find(self, *ending: str) -> list[psutil.Process]:
        """Processes of this farm whose command line ends so."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if str(self.farm.repo) in words and tuple(words[-len(ending):]) == ending:
                found.append(process)
        return found

    def kill(self, processes: list[psutil.Process]) -> None:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself
                process.kill()

    def strike(self) -> None:
        what = self.random.choice(["host", "spoke", "serve", "merger", "loop", "freeze", "twice", "reboot"])
        name = self.random.choice(sorted(self.hosts.keys() - self.frozen.keys()) or [""])
        self.done.append(f"{what} {name}")
        if what in ("merger", "reboot"):
            self.kill(self.find("merge", "--watch"))
        if what in ("loop", "reboot"):
            self.loop.kill()
            self.loop.wait()
        if what == "reboot":
            self.kill([process for host in self.hosts for process in self.find("serve", host)])
        if name and what in ("host", "spoke"):
            self.hosts[name].kill_all() if what == "host" else self.hosts[name].process.kill()
            self.hosts[name].process.wait()
        if name and what == "serve":
            self.kill(self.find("serve", name))
        if name and what == "freeze":
            self.hosts[name].process.send_signal(signal.SIGSTOP)
            self.frozen[name] = time.monotonic() + self.random.choice([1, LEASE + 2])
        if name and what == "twice":
            argv = self.hosts[name]
            assert run(argv.argv, env=argv.env, cwd="/", timeout=60).returncode == 4 or argv.process.poll() is not None

    def look_after(self, *, all_of_it: bool = False) -> None:
        """What a person or an engine sees to: what has ended is started again, what stood still goes on."""
        for name, until in list(self.frozen.items()):
            if all_of_it or time.monotonic() > until:
                self.hosts[name].process.send_signal(signal.SIGCONT)
                del self.frozen[name]
        for host in self.hosts.values():
            if host.process.poll() is not None:
                host.start()
        if self.loop.poll() is not None:
            self.start_loop()


def test_nothing_is_lost_and_nothing_lands_twice_whatever_is_killed(farm, sandbox, monkeypatch, farm_cleanup):
    monkeypatch.setenv("FARM_HOST_LEASE_SECONDS", str(LEASE))
    seed = int(os.environ.get("CHAOS_SEED", random.randrange(10**6)))
    chaos = Chaos(farm, str(make_ssh(sandbox.root, farm.repo)), seed)
    count = max(12, int(2 * SECONDS))
    farm.ok("add", "-f", "-", input="".join(f'{{"title": "number {number}", "max_attempts": 90}}\n' for number in range(count)))
    chaos.start_loop()
    for host in chaos.hosts.values():
        host.start()
    wait_until(lambda: len(farm.json("locks")) > HOSTS, 60, "all to be at work")
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        chaos.strike()
        time.sleep(chaos.random.uniform(0.3, 1.5))
        chaos.look_after()

    def is_drained() -> bool:
        chaos.look_after(all_of_it=True)
        for task in farm.json("tasks"):
            if task["state"] == "waiting":  # a backoff that kills have made long
                assert farm("retry", task["id"]).returncode in (0, 4)  # 4: somebody has claimed it meanwhile
        return len(landed(farm)) == count

    told = f"seed {seed}: {', '.join(chaos.done)}"
    print(told)
    wait_until(is_drained, 150 + SECONDS, f"{told}; {farm.ok('status')}")
    on_main = landed_on_main(farm.repo)
    assert sorted(on_main) == sorted(landed(farm)) and len(set(on_main)) == len(on_main) == count, told
    for task_id in on_main:
        assert set(git(farm.repo, "show", f"main:{task_id}.txt").split()) == {"1", "2"}, told
    assert git(farm.repo, "log", "--format=%h", "--first-parent", "main", "--", "red") == "", f"main was red; {told}"
    farm.ok("down", "--now", timeout=90)
    assert [host.process.wait(60) for host in chaos.hosts.values()] == [0] * HOSTS, told
    assert farm.json("locks") == [], told
    chaos.loop.wait(30)
