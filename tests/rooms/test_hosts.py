"""The hub's side of other machines: `farm serve HOST`, whose owner is told and whose leases lapse."""

from __future__ import annotations

import json
import os
import time

import pytest
from farm_calls import A, bytes_below, make_commit
from host_calls import Served, lock_of
from sandbox import git

import farm as toolkit

H1 = "h1-agent-001"


@pytest.fixture
def served(farm):
    """The host h1, which has said hello to a farm with three tasks."""
    farm.ok("add", "-f", "-", input="task 1\ntask 2\ntask 3\n")
    with Served(farm) as one:
        one.hello()
        yield one


def test_the_owner_of_a_hosts_claim_is_what_it_has_told_and_nobody_looks_for_its_pid_here(farm, served):
    boot = toolkit.boot_id()
    with Served(farm, "h2") as other:
        # a host on this very machine, as a test's is, or a clone of it: a pid that is dead here says nothing
        other.hello(pid=str(2**22 + 7), start="1", boot=boot)
        fence = other.claim()["claim"]["fence"]
        owner = lock_of(farm.repo, "h2-agent-001")["owner"]
        assert [owner[key] for key in ("pid", "start", "boot", "host")] == [2**22 + 7, "1", boot, "h2"]
    farm.ok("add", "looks for dead owners")
    assert farm.claim(A)["task"]["id"] == "t-0002"
    assert lock_of(farm.repo, "h2-agent-001")["fence"] == fence


def test_a_host_that_is_called_like_the_hub_is_refused(farm):
    name = os.uname().nodename
    assert "another" in farm.refused(4, "serve", name, input="").lower()
    farm.refused(2, "serve", "no/name", input="")
    farm.refused(2, "serve", input="")


def test_the_same_owner_gets_its_claim_again_and_another_copy_of_the_host_gets_none(farm, served):
    first = served.claim()
    assert served.claim()["claim"]["fence"] == first["claim"]["fence"]
    with Served(farm) as again:
        again.hello()
        assert again.claim()["claim"]["fence"] == first["claim"]["fence"]
    with Served(farm) as copy:
        copy.hello(boot="another machine of this name")
        answer = copy.claim()
        assert answer["code"] == 4 and "on h1" in answer["error"]


def commit_of(farm, name: str = "new.txt") -> str:
    return make_commit(farm.repo, {name: "text\n"})


def prepare_moves(farm) -> dict[str, dict]:
    """Each move that ends a claim, as `serve` takes it."""
    told = {"task": {"title": "task 1", "reason": "no luck"}}
    return {"submit": {"task": {"title": "task 1", "commit": commit_of(farm)}}, "fail": told, "release": told}


LOCAL = {"fail": ["--why", "no luck"], "release": ["--why", "no luck"], "submit": ["--commit"]}


@pytest.mark.parametrize("way", ["local", "serve"])
@pytest.mark.parametrize("move", ["submit", "fail", "release"])
def test_a_move_is_the_same_by_a_verb_and_over_serve(farm, served, way, move):
    """The contract of the moves: made once, answered again, refused for another's or an old fence, and so in the record."""
    words, agent = prepare_moves(farm)[move], H1 if way == "serve" else A
    argv = [*LOCAL[move], *([words["task"]["commit"]] if move == "submit" else [])]

    def make(fence: str, name: str = agent) -> int:
        if way == "serve":
            return served.ask(move, agent=name, fence=fence, **words)["code"]
        return farm(move, name, "--fence", fence, *argv).returncode

    claim = served.claim()["claim"] if way == "serve" else farm.claim(A)
    fence = claim["fence"]
    assert make("t-0001.99") == 4 and make("nonsense") == 4
    assert make(fence, "h1-agent-002" if way == "serve" else "agent-002") == 4
    assert make(fence) == 0
    after = farm.task("t-0001")
    before = bytes_below(farm.folder, but=(".lock",))
    assert make(fence) == 0  # a repeat, whose first answer was lost
    assert {name: data for name, data in before.items() if "events" not in name}.items() <= bytes_below(farm.folder).items()
    states = {"submit": ("ready", 0), "fail": ("pending", 1), "release": ("pending", 0)}
    assert (after["attempts"], after["agent"]) == (states[move][1], agent)
    record = next(task for task in read_records(farm) if task["id"] == "t-0001")
    assert record.get("state", "pending") == states[move][0] and record["ended_by"] == move
    if move == "submit":
        assert git(farm.repo, "rev-parse", "refs/farm/ready/t-0001") == words["task"]["commit"] == record["commit"]
    else:
        assert record["reason"] == "no luck"


@pytest.mark.parametrize("way", ["local", "serve"])
def test_a_claim_and_its_renewal_are_the_same_by_a_verb_and_over_serve(farm, served, way):
    """The oldest first, each once, the same again to who asks again; a renewal of its own fence only; and 3 when none is left."""

    def claim(number: int) -> tuple[int, str]:
        if way == "serve":
            answer = served.claim(number)
            return answer["code"], answer.get("claim", {}).get("fence", "")
        done = farm("claim", str(number), "--owner-pid", str(farm.owner))
        return done.returncode, json.loads(done.stdout)["fence"] if done.stdout else ""

    def renew(number: int, fence: str) -> bool:
        if way == "serve":
            return served.renew((served.agent(number), fence))["lost"] == []
        return farm("renew", str(number), "--fence", fence).returncode == 0

    first, agent = claim(1), served.agent(1) if way == "serve" else A
    assert first == (0, "t-0001.2") == claim(1)
    assert [claim(2)[1], claim(3)[1]] == ["t-0002.2", "t-0003.2"]
    assert claim(4) == (3, "") and "renewals" not in lock_of(farm.repo, agent)
    assert renew(1, first[1]) and not renew(1, "t-0001.9") and not renew(2, first[1])
    assert lock_of(farm.repo, agent)["renewals"] == 1


def read_records(farm) -> list[dict]:
    """The records of what nobody holds, as they lie on disk."""
    pending = json.loads((farm.folder / "task_queue/pending.json").read_text())["tasks"]
    return pending + json.loads((farm.folder / "merge_queue/ready-to-merge.json").read_text())["ready"]


def test_many_claims_are_renewed_in_one_transaction_and_the_lost_ones_are_named(farm, served):
    fences = [served.claim(number)["claim"]["fence"] for number in (1, 2, 3)]
    farm.ok("release", "h1-agent-002", "--fence", fences[1])
    answer = served.renew(*((served.agent(number), fence) for number, fence in enumerate(fences, 1)))
    assert answer["lost"] == [fences[1]]
    records = [lock_of(farm.repo, served.agent(number)) for number in (1, 3)]
    assert [record["renewals"] for record in records] == [1, 1] and all(record["heard_at"] for record in records)
    # without claims it only says that it lives
    before = bytes_below(farm.folder, but=("hosts/h1.json", ".lock"))
    assert served.renew() == {"id": served.count, "code": 0, "mode": "", "lost": [], "orders": {}}
    assert bytes_below(farm.folder, but=("hosts/h1.json", ".lock")) == before


def test_only_the_moves_of_its_own_agents_are_made(farm, served):
    served.claim()
    before = bytes_below(farm.folder)
    others = {"agent-001", "h2-agent-001", "h1-agent-1", "h1-agent-001/..", "control"}
    assert {served.ask("claim", agent=name, preset="", takes=[])["code"] for name in others} == {4}
    assert {served.renew((name, "t-0001.2"))["code"] for name in others} == {4}
    assert {served.ask(verb)["code"] for verb in ("add", "merge", "down", "estop", "__init__", "answer", "own_agent")} == {4}
    assert {served.renew(agents=[{"agent": name}])["code"] for name in others} == {4}
    assert {served.renew(agents=agents)["code"] for agents in ("x", 7, [7], [[]], [{}])} == {2}
    broken = [b"{", b"[]", b"7", b'"text"', b"{}", b'{"move": 1}', b'{"move": "claim"}', b'{"move": "renew"}', b"\xff\xfe",
              b'{"move": "fail", "agent": "h1-agent-001"}', b'{"move": "renew", "agents": [], "claims": [["h1-agent-001"]]}',
              b'{"move": "hello"}', b"[" * 90000]
    for line in broken:
        served.write(line + b"\n")
        assert served.read()["code"] == 2, line
    answer = served.ask("submit", agent=H1, fence="t-0001.2", task={"commit": "main"})
    assert answer["code"] == 2 and "sha" in answer["error"]
    assert bytes_below(farm.folder) == before


def test_no_move_is_made_before_hello(farm):
    farm.ok("add", "a")
    with Served(farm) as one:
        assert one.claim()["code"] == 4
        assert one.ask("hello", pid="a", start="", boot="")["code"] == 2
        one.hello()
        assert one.claim()["code"] == 0


def test_a_cut_in_the_middle_of_a_line_leaves_no_half_move(farm, served):
    fence = served.claim()["claim"]["fence"]
    before = bytes_below(farm.folder)
    line = json.dumps({"id": 9, "move": "release", "agent": H1, "fence": fence, "task": {}})
    for cut in (1, len(line) // 2, len(line)):
        with Served(farm) as other:
            other.hello()
            other.write(line[:cut].encode())
        assert other.process.returncode == 0
    assert bytes_below(farm.folder) == before


def test_a_line_without_an_end_ends_the_connection_and_not_the_memory(farm):
    with Served(farm) as one:
        with pytest.raises(BrokenPipeError):
            for _ in range(1024):  # a GiB, were it read
                one.write(b"x" * 2**20)
        assert one.process.wait(20) == 2


def test_no_start_of_a_cli_holds_up_the_moves_of_a_host(farm, served):
    """A claim by the verb takes a start's turn; one over serve leaves that to its host."""
    (farm.folder / "starts.lock").write_text(f"{time.time() + 900:.3f}")
    text = (farm.folder / "starts.lock").read_text()
    assert served.claim(1, preset="claude")["code"] == 0
    assert (farm.folder / "starts.lock").read_text() == text


def test_a_paused_farm_hands_nothing_out_to_hosts_and_tells_its_mode(farm, served):
    (farm.folder / "farm.json").write_text('{"schema": 1, "mode": "paused"}\n')
    answer = served.claim()
    assert (answer["code"], "paused" in answer["error"]) == (3, True)
    assert served.renew()["mode"] == "paused"


class Lapses:
    """A watcher of leases, whose clock a test turns."""

    def __init__(self, farm, monkeypatch):
        self.farm, self.seconds = farm, 1000.0
        self.store, self.leases = toolkit.Store(str(farm.repo)), toolkit.LeaseWatch(toolkit.load_settings(str(farm.repo)))
        monkeypatch.setattr(toolkit, "CLOCK", self)

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> float:
        return time.time() + self.seconds

    def look(self) -> list[str]:
        with self.store.transaction() as tx:
            return [claim.agent for claim in toolkit.TaskQueue(tx).expire(self.leases.is_lapsed)]


def test_a_lapse_names_the_host_counts_from_the_third_on_and_the_next_begins_where_the_host_had_pushed(farm, served, monkeypatch):
    lapses = Lapses(farm, monkeypatch)
    attempts = []
    for _ in range(4):
        lapses.seconds += 500  # out of any backoff
        (farm.folder / "task_queue/pending.json").write_text(
            (farm.folder / "task_queue/pending.json").read_text().replace('"not_before"', '"was_not_before"')
        )
        claim = served.claim()["claim"]
        assert claim["task"]["id"] == "t-0001"
        assert served.renew((H1, claim["fence"]))["lost"] == []
        assert lapses.look() == []
        lapses.seconds += 89.9
        assert lapses.look() == []
        lapses.seconds += 0.2
        assert lapses.look() == [H1]
        task = next(task for task in read_records(farm) if task["id"] == "t-0001")
        heard = claim["claimed_at"][:4]
        assert task["reason"].startswith(f"{H1} on h1 was not heard of in its lease (last at {heard}")
        assert task["start"] == f"refs/farm/in/h1/{claim['fence']}"
        attempts.append(task.get("attempts", 0))
    assert attempts == [0, 0, 1, 2]
    answer = served.ask("submit", agent=H1, fence=claim["fence"], task={"commit": commit_of(farm)})
    assert answer["code"] == 4  # too late


def test_what_hosts_have_pushed_goes_when_their_task_has_landed(farm, served):
    fence = served.claim()["claim"]["fence"]
    commit = commit_of(farm)
    for ref in (f"refs/farm/in/h1/{fence}", "refs/farm/in/h2/t-0002.9"):
        git(farm.repo, "update-ref", ref, commit)
    usage = {"task": "x", "agent": "x", "fence": "x", "tokens_in": 5, "tokens_out": 2, "cost_usd": 1.5, "conversation": []}
    for _ in range(2):  # a repeat costs nothing more
        served.ok("submit", agent=H1, fence=fence, task={"commit": commit}, usage=[usage, {}])
    assert farm.json("status")["spent"] == {"tokens_in": 5, "tokens_out": 2, "cost_usd": 1.5}
    farm.ok("merge", "--gate", "true", timeout=60)
    state = toolkit.Store(str(farm.repo)).snapshot()
    over, _ = toolkit.find_leftovers(str(farm.repo), "main", state)
    assert f"refs/farm/in/h1/{fence}" in [ref for ref, _ in over]
    assert "refs/farm/in/h2/t-0002.9" not in [ref for ref, _ in over]


def test_status_shows_the_agents_of_a_host_as_it_tells_them_and_as_lost_after_a_lease(farm, served):
    served.claim()
    told = {"agent": H1, "state": "working", "task": "t-0001", "title": "a \x1b[31mtask", "rss_bytes": 2**20, "pid": "?",
            "cpu_percent": "much", "since": 7, "worktree": "/far/away"}
    served.renew(agents=[told, {"agent": served.agent(2), "state": "waiting", "cause": "it asks", "worktree": "/far/away"}])
    agents = {agent["agent"]: agent for agent in farm.json("status")["agents"]}
    assert (agents[H1]["state"], agents[H1]["host"], agents[H1]["cpu_percent"]) == ("working", "h1", 0.0)
    shown = farm.ok("status")
    assert "\x1b" not in shown and "hosts: h1 heard" in shown
    assert "next: on h1: ./farm.py --repo /far/away attach 2 # h1-agent-002 waits for a person: it asks" in shown
    path = farm.folder / "hosts" / "h1.json"
    path.write_text(path.read_text().replace('"heard_at": "2', '"heard_at": "1'))
    lost = {agent["agent"]: agent for agent in farm.json("status")["agents"]}
    assert lost[H1]["state"] == "lost" and "h1 was heard" in lost[H1]["cause"]
    served.renew()  # a host that has ended tells of none
    assert [agent["state"] for agent in farm.json("status")["agents"]] == ["unseen"]
