"""What a person types on the hub reaches the agents of hosts: the connection takes it there, and brings the answer."""

from __future__ import annotations

import json
import os
import shlex
import signal
import time

import pytest
from farm_calls import Caller, landed
from host_calls import Served, Spoke, make_ssh
from sandbox import run, wait_until

AGENT = """
echo "ready for $FARM_TITLE"; read -r line; echo "$line" >"$FARM_TASK.txt"
"""


def row_of(farm, agent: str) -> list[str]:
    rows = [line.split("\t") for line in farm.ok("status").splitlines()]
    return next((row for row in rows if row[0] == agent), [])


def test_a_host_is_seen_read_told_and_stopped_from_the_hub(farm, sandbox, monkeypatch, farm_cleanup):
    monkeypatch.setenv("FARM_HOST_LEASE_SECONDS", "9")
    farm.ok("add", "one")
    loop = farm.start("run", "-n", "1", "--agent", "sleep 600", "--gate", "true")
    wait_until(lambda: farm.json("locks"), 30, "the hub's own agent to be busy")
    spoke = Spoke(farm, "h1", str(make_ssh(sandbox.root, farm.repo)), 1, AGENT).start()
    farm.ok("add", "two")
    agent = "h1-agent-001"
    wait_until(lambda: row_of(farm, agent)[1:3] == ["h1", "working"], 40, f"its row: {spoke.said()}")
    assert row_of(farm, "agent-001")[1:3] == ["-", "working"]
    for words in (["add", "typed on the host"], ["lock", "agent-001", "port"]):
        assert "would not know of it" in Caller(spoke.repo, 0).refused(4, *words)

    wait_until(lambda: "ready for two" in farm.ok("logs", agent), 20, "its log")
    assert farm.ok("attach", agent) == f"ssh -t h1 ./farm.py --repo {spoke.repo} attach 001"
    assert farm.ok("logs", agent, "-f") == f"ssh -t h1 ./farm.py --repo {spoke.repo} logs 001 -f"
    farm.refused(3, "send", "h1-agent-002", "nobody is there")
    farm.ok("pause")
    farm.ok("add", "three")
    farm.ok("send", agent, "a word from the hub")
    wait_until(lambda: len(landed(farm)) == 1, 40, f"two to land: {spoke.said()}")
    assert farm.task("t-0003")["state"] == "pending"
    farm.ok("resume")
    wait_until(lambda: "ready for three" in farm.ok("logs", agent), 30, f"three: {spoke.said()}")

    begun = time.monotonic()
    said = farm("estop", timeout=60)
    assert said.returncode == 0 and "h1" not in said.stderr, said.stderr
    assert spoke.process.wait(30) == 0 and time.monotonic() - begun < 60
    assert farm.json("locks") == [] and farm.task("t-0003")["attempts"] == 0
    loop.wait(20)


def test_down_lets_agents_of_hosts_finish_and_names_a_host_that_is_not_heard(farm, sandbox, monkeypatch, farm_cleanup):
    monkeypatch.setenv("FARM_HOST_LEASE_SECONDS", "4")
    monkeypatch.setenv("FARM_GRACE_SECONDS", "15")
    go = farm.repo.parent / "go"
    agent = f'until [ -e {go} ]; do sleep 0.1; done; echo done >"$FARM_TASK.txt"'
    loop = farm.start("run", "-n", "1", "--agent", "sleep 600", "--gate", "true")
    farm.ok("add", "one")
    wait_until(lambda: farm.json("locks"), 30, "the hub's own agent to be busy")
    ssh = str(make_ssh(sandbox.root, farm.repo))
    hosts = [Spoke(farm, name, ssh, 1, agent).start() for name in ("h1", "h2")]
    farm.ok("add", "-f", "-", input="two\nthree\n")
    wait_until(lambda: len(farm.json("locks")) == 3, 40, f"both to be at work: {hosts[0].said()}")
    hosts[1].process.send_signal(signal.SIGSTOP)
    down = farm.start("down")
    wait_until(lambda: farm.json("status")["mode"] == "stopping", 20, "the end to begin")
    wait_until(lambda: "heard" in farm.ok("status") and row_of(farm, "h2-agent-001")[2] == "lost", 20, "h2 to be lost")
    assert row_of(farm, "h1-agent-001")[2] == "working"
    go.touch()
    said = down.communicate(timeout=60)
    assert down.returncode == 0 and "h2 was heard" in said[1] and "h1 was heard" not in said[1], said
    assert hosts[0].process.wait(30) == 0
    task = next(claim["task"] for claim in farm.json("locks"))
    assert {farm.task(name)["state"] for name in {"t-0002", "t-0003"} - {task}} == {"ready"}
    hosts[1].process.send_signal(signal.SIGCONT)
    assert hosts[1].process.wait(30) == 0
    loop.wait(20)


def test_what_a_killed_verb_has_ordered_is_not_done_for_ever(farm):
    folder = farm.folder / "orders/h1"
    folder.mkdir(parents=True)
    for name, age in (("new", 5), ("old", 3600)):
        path = folder / f"{name}.order"
        path.write_text(json.dumps({"argv": ["send", "001", "hello"], "stdin": ""}))
        os.utime(path, (time.time() - age,) * 2)
    with Served(farm) as served:
        served.hello()
        assert [*served.renew()["orders"]] == ["new"]
    assert [path.name for path in folder.iterdir()] == ["new.order"]


def test_doctor_tells_of_a_host_its_version_its_clock_its_trouble_and_what_its_own_doctor_says(farm):
    farm.ok("add", "a task")
    told = [{"agent": "h1-agent-001", "state": "working"}]
    about = {"toolkit": "another", "now": time.time() - 7200, "trouble": "no new work starts: only 3 MiB\x1b are free"}
    with Served(farm) as served:
        served.hello()
        served.renew(agents=told, about=about)
        doctor = farm.start("doctor", "--json")
        orders: dict = {}

        def has_come() -> bool:
            orders.update(served.renew(agents=told, about=about)["orders"])
            return bool(orders)

        wait_until(has_come, 30, "the order to come")
        [(key, order)] = orders.items()
        assert order["argv"] == ["doctor", "--json"]
        rows = [{"problem": "git-lfs is missing", "try": "apt install git-lfs", "exit_code": 6}]
        assert served.renew(done={key: {"code": 6, "out": json.dumps(rows), "err": ""}}, agents=told, about=about)["orders"] == {}
        out, _ = doctor.communicate(timeout=30)
        assert "hosts: h1" in farm.ok("status") and "(no new work starts: only 3 MiB" in farm.ok("status")
    found = [row["problem"] for row in json.loads(out)]
    assert doctor.returncode == 6
    for words in ("h1 has another version", "the clock of h1 is 2h00 behind", "h1: git-lfs is missing"):
        assert any(words in problem for problem in found), (words, found)
    assert list((farm.folder / "orders" / "h1").iterdir()) == []


def tell_of(farm, host: str, *agents: str) -> None:
    """As a host that tells of these agents."""
    path = farm.folder / "hosts" / f"{host}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"heard_at": "2099-01-01T00:00:00Z", "agents": [{"agent": name} for name in agents], "reach": "", "farm": "f/farm.py"}
    path.write_text(json.dumps(told))


def test_a_bare_number_is_the_agent_of_the_one_host_that_has_it(farm):
    tell_of(farm, "h1", "h1-agent-001", "h1-agent-002")
    assert farm.ok("attach", "2") == "ssh -t h1 f/farm.py attach 002"
    tell_of(farm, "h2", "h2-agent-002")
    assert "h1-agent-002, h2-agent-002" in farm.refused(4, "attach", "2") and farm.ok("attach", "h2-agent-002")
    (farm.folder / "logs").mkdir(exist_ok=True)
    (farm.folder / "logs/agent-002.log").write_text("mine\n")
    assert farm.ok("logs", "2") == "mine"


@pytest.mark.parametrize(("verb", "options"), [("attach", ""), ("logs", " -f")])
def test_on_a_terminal_one_goes_to_a_host_that_the_farm_has_placed_and_nothing_of_what_it_tells_runs(farm, sandbox, verb, options):
    tell_of(farm, "h1", "h1-agent-001")
    path = farm.folder / "hosts/h1.json"
    path.write_text(path.read_text().replace("f/farm.py", f"$(touch {sandbox.root}/made) farm.py"))
    (farm.folder / "placed.json").write_text(json.dumps({"schema": 1, "hosts": {"h1": ["ssh:box1", 1, ""]}}))
    ssh = sandbox.root / "ssh"
    ssh.write_text("#!/bin/sh\nprintf '<%s>' \"$@\"\n")
    ssh.chmod(0o755)
    words = " ".join(map(shlex.quote, farm.argv(verb, "h1-agent-001", *options.split())))
    said = run(["script", "-qc", words, "/dev/null"], env={"GIT_SSH_COMMAND": str(ssh)}).stdout
    there = f"<-t><--><box1><$(touch {sandbox.root}/made) farm.py {verb} 001{options}>"
    assert there in said and not (sandbox.root / "made").exists()
    assert "ssh -t box1 " in farm.ok(verb, "h1-agent-001", *options.split())


def test_doctor_says_why_a_host_that_was_placed_is_not_heard(farm):
    farm.ok("add", "one")
    (farm.folder / "placed.json").write_text(json.dumps({"schema": 1, "hosts": {
        "h1": ["ssh:box1", 2, "not reached, or it failed: Permission denied (publickey)."], "h2": ["ssh:box2", 2, ""]}}))
    said = farm("doctor").stdout
    assert "h1 has been placed on ssh:box1, and is not heard: not reached, or it failed: Permission denied" in said
    assert "ssh -o BatchMode=yes box1 true" in said and "h2" not in said


def test_what_is_sent_to_all_goes_to_agents_of_hosts_and_names_those_that_do_not_answer(farm, sandbox, monkeypatch, farm_cleanup):
    spoke = Spoke(farm, "h1", str(make_ssh(sandbox.root, farm.repo)), 1, AGENT).start()
    task = farm.ok("add", "one")
    wait_until(lambda: "ready for one" in farm("logs", "h1-agent-001").stdout, 40, f"its claim: {spoke.said()}")
    assert farm.ok("send", "--all", "for all", timeout=60).split("\t") == ["h1-agent-001", "taken"]
    wait_until(lambda: farm.task(task)["state"] == "ready", 40, f"its work: {spoke.said()}")
    spoke.process.send_signal(signal.SIGINT)
    assert spoke.process.wait(60) is not None
