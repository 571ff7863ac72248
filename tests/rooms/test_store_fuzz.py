"""Damaged and hand-edited state files: each verb gives exit 7 or the right answer; no traceback, no write to the damaged file."""
from __future__ import annotations

import json
import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import farm as toolkit

DAMAGED = 7
ROUNDS = 60
QUEUES = ("task_queue/pending.json", "merge_queue/ready-to-merge.json")
LOCK = "agent_locks/agent-001.lock"
SIDE_FILES = ("farm.json", "loop.json", "merge_queue/now.json")
OWN = ["--owner-pid", str(os.getpid())]
SETUP = (
    *(["add", f"task {number}", "--path", f"src/{number}"] for number in range(1, 6)),
    *(["claim", agent, *OWN, "--id", task_id] for agent, task_id in
      (("agent-001", "t-0001"), ("agent-002", "t-0002"), ("agent-003", "t-0003"))),
    ["lock", "agent-001", "schema", *OWN],
    ["submit", "agent-002", "--fence", "t-0002.2"],
    ["fail", "agent-003", "--fence", "t-0003.2", "--why", "no use", "--no-retry"],
)
VERBS = (
    ["add", "new"], ["tasks", "--json"], ["claim", "agent-004", *OWN], ["claim", "agent-001", *OWN],
    ["renew", "agent-001", "--fence", "t-0001.2"], ["submit", "agent-001", "--fence", "t-0001.2"],
    ["fail", "agent-001", "--fence", "t-0001.2", "--why", "no idea"], ["release", "agent-001", "--fence", "t-0001.2"],
    ["cancel", "t-0004"], ["retry", "t-0003"], ["lock", "agent-005", "port:8080", *OWN], ["unlock", "agent-001", "schema"],
    ["locks", "--json"], ["queue", "--json"], ["status", "--json"],
)
SIDE_TEXTS = {
    "farm.json": {"schema": 1, "mode": "running", "settings": {"n": 3, "gate": "true", "slots": 1}},
    "loop.json": {"schema": 1, "agents": {"agent-001": {"cause": "crash", "parked": True, "since": "2026-03-01T14:02:10Z"}}},
    "merge_queue/now.json": {"schema": 1, "pid": os.getpid(), "start": toolkit.start_of(os.getpid()), "target": "main",
                             "order": ["t-0002"], "testing": [{"ids": ["t-0002"], "slot": 1, "tree": "c0ffee"}],
                             "held": {"t-0002": "t-0001"}, "trouble": ["a file is in the way", "git status"], "gates": 1},
}
ODD_VALUES = [None, True, -1, 0, 1.5, 10 ** 30, "", "x", "../../etc/passwd", "\ud800\x00", [], [None], [1], [[1]], ["a", {}],
              {}, {"a": 1}, {"t-0001": "x"}, float("nan")]
RUBBISH = [b"\0" * 20, b"\xff\xfe", b"\r\n", b"\xef\xbb\xbf", b"[" * 100_000, b"<<<<<<< HEAD\n", b"9" * 5000]
SOMETHING_ELSE = [b"", b" ", b"null", b"[]", b"[1]", b"7", b'"x"', b"{}", b"NaN", b"[" * 100_000, b"\xff", b"\0\0\0"]


class Farm:
    """A farm with something in each file; `restore` puts all of them back."""

    def __init__(self, repo: Path, capsys: pytest.CaptureFixture):
        self.repo, self.folder, self.capsys = repo, repo / "coordination", capsys
        for argv in SETUP:
            code, said = self.call(argv)
            assert code == 0, said
        with toolkit.Store(str(repo)).transaction() as tx:
            tx.move(tx.state.pending["t-0005"]._replace(state="landed", landed_commit="c0ffee"), "landed", "landed")
        for name, data in SIDE_TEXTS.items():
            (self.folder / name).write_text(json.dumps(data), encoding="utf-8")
        self.files = self.read()

    def read(self) -> dict[str, bytes]:
        """Every file but the locks under which pins are moved: they are empty."""
        files = [path for path in self.folder.rglob("*") if path.is_file() and not path.name.startswith(".pin-")]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in files}

    def restore(self) -> None:
        now = self.read()
        for name in {*now, *self.files}:
            if name not in self.files:
                (self.folder / name).unlink()
            elif now.get(name) != self.files[name]:
                (self.folder / name).write_bytes(self.files[name])

    def call(self, argv: list[str]) -> tuple[int, str]:
        """(exit code, what it printed) of a verb; whatever is no FarmError comes out as the traceback that it is."""
        self.capsys.readouterr()
        code = toolkit.main(["--repo", str(self.repo), *argv])
        return code, "".join(self.capsys.readouterr())

    def is_damaged(self) -> bool:
        try:
            toolkit.Store(str(self.repo)).load()
        except toolkit.DamagedState:
            return True
        return False

    def ids(self) -> set[str]:
        return {task.id for task in toolkit.Store(str(self.repo)).load().all_tasks()}

    def try_verb(self, name: str, damaged: bytes, argv: list[str]) -> int:
        """One verb on one damaged file: what it may do to the files, and what it says."""
        self.restore()
        (self.folder / name).write_bytes(damaged)
        before, must_refuse = self.read(), self.is_damaged()
        ids = set() if must_refuse else self.ids()
        code, said = self.call(argv)
        after, label = self.read(), f"{argv} on {name}, exit {code}: {said}\n{damaged[:2000]!r}"
        assert code in (0, 2, 3, 4, DAMAGED), label
        assert code == DAMAGED or not must_refuse, label
        if code == DAMAGED:
            assert changed(before, after) <= {".lock"}, label
            assert str(self.folder / name) in said, label
        elif name in SIDE_FILES:
            assert after[name] == damaged, label
        else:
            assert ids <= self.ids(), f"lost {ids - self.ids()}: {label}"
        return code


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in {*before, *after} if before.get(name) != after.get(name)}


@pytest.fixture
def place(sandbox, capsys, monkeypatch):
    """No waiting for an editor's save, no git, no tmux: the files are what counts."""
    monkeypatch.setattr(toolkit, "time", SimpleNamespace(**{**vars(time), "sleep": lambda _seconds: None}))
    monkeypatch.setattr(toolkit, "spawn_script", lambda *_: "c0ffee\n")
    monkeypatch.setattr(toolkit, "probe_sessions", lambda *_, **_options: {})
    (sandbox.work / "repo" / ".git").mkdir(parents=True)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, limits[1]))  # a huge number in a file must not take the memory of all
    yield Farm(sandbox.work / "repo", capsys)
    resource.setrlimit(resource.RLIMIT_AS, limits)


# ---------------------------------------------------------------------------------------------- ways to damage a file


def cut_short(text: bytes, rng: random.Random) -> bytes:
    return text[:rng.randrange(len(text))]


def flip_bits(text: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(text)
    for _ in range(rng.randint(1, 3)):
        damaged[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def overwrite(text: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(text))
    rubbish = rng.choice(RUBBISH)
    return text[:start] + rubbish + text[start + rng.choice([0, len(rubbish)]):]


def lose_or_double_a_line(text: bytes, rng: random.Random) -> bytes:
    lines = text.split(b"\n")
    number = rng.randrange(len(lines))
    return b"\n".join(lines[:number] + lines[number:number + 1] * rng.choice([0, 2]) + lines[number + 1:])


def edit_value(text: bytes, rng: random.Random) -> bytes:
    """Still JSON, but one value is of another kind than it was, or its key is gone."""
    data = json.loads(text)
    places = list(walk(data))
    container, key = rng.choice(places) if places else (None, None)
    if container is not None and rng.random() < 0.15:
        del container[key]
    elif container is not None:
        container[key] = rng.choice(ODD_VALUES)
    else:
        data = rng.choice(ODD_VALUES)
    return json.dumps(data).encode()


def walk(data):
    """(container, key) of each value below `data`."""
    for key in list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield data, key
        yield from walk(data[key])


DAMAGES: tuple[Callable, ...] = (cut_short, flip_bits, overwrite, lose_or_double_a_line, edit_value, edit_value, edit_value)


# ---------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("name", [*QUEUES, LOCK, *SIDE_FILES])
def test_a_file_damaged_at_random_is_told_of_and_left_alone(name, place):
    rng = random.Random(name)
    for number in range(ROUNDS):
        damaged = DAMAGES[number % len(DAMAGES)](place.files[name], rng)
        for argv in rng.sample(VERBS, 4):
            place.try_verb(name, damaged, argv)


@pytest.mark.parametrize("text", SOMETHING_ELSE, ids=lambda text: repr(text[:10]))
@pytest.mark.parametrize("name", [*QUEUES, LOCK, *SIDE_FILES])
def test_a_file_that_holds_something_else_altogether_is_told_of_and_left_alone(name, text, place):
    for argv in VERBS:
        code = place.try_verb(name, text, argv)
        assert code == DAMAGED or name not in (*QUEUES, LOCK) or (text, name) in [(b"{}", queue) for queue in QUEUES], argv


@pytest.mark.parametrize("edit", [
    {"done": [1]}, {"done": "x"}, {"done": {"t-0002": "x"}}, {"done": {"t-0002": None}}, {"schema": 99}, {"ready": {}},
    {"landed": None},
], ids=json.dumps)
def test_a_merge_queue_edited_to_what_cannot_be_is_exit_7_for_every_verb(edit, place):
    name = QUEUES[1]
    text = json.dumps({**json.loads(place.files[name]), **edit}).encode()
    assert [place.try_verb(name, text, argv) for argv in VERBS] == [DAMAGED] * len(VERBS)


@pytest.mark.parametrize("edit", [
    {"id": "t-0003"}, {"id": "../../x"}, {"id": "a b"}, {"rev": "3"}, {"rev": 1.5}, {"rev": True}, {"title": 5},
    {"state": "ready"}, {"state": "paused"}, {"paths": [1]}, {"paths": "src"}, {"after": [["t-0001"]]}, {"after": [{}]},
    {"priority": "high"}, {"not_before": 5},
], ids=json.dumps)
def test_a_task_edited_to_what_cannot_be_is_exit_7_for_every_verb(edit, place):
    name = QUEUES[0]
    data = json.loads(place.files[name])
    number = next(number for number, task in enumerate(data["tasks"]) if task["id"] == "t-0004")
    data["tasks"][number] = {**data["tasks"][number], **edit}
    text = json.dumps(data).encode()
    assert [place.try_verb(name, text, argv) for argv in VERBS] == [DAMAGED] * len(VERBS)


@pytest.mark.parametrize("edit", [
    {"agent": "agent-002"}, {"owner": []}, {"owner": {"pid": "x"}}, {"locks": [1]}, {"locks": "schema"}, {"fence": 5},
    {"task": []}, {"task": {"title": "x"}}, {"task": {"id": 5}}, {"task": {"id": "t-0001", "paths": [1]}}, {"renewals": "x"},
], ids=json.dumps)
def test_a_lock_edited_to_what_cannot_be_is_exit_7_for_every_verb(edit, place):
    text = json.dumps({**json.loads(place.files[LOCK]), **edit}).encode()
    assert [place.try_verb(LOCK, text, argv) for argv in VERBS] == [DAMAGED] * len(VERBS)


@pytest.mark.parametrize("name, edit", [
    ("farm.json", {"settings": {"n": 10 ** 30}}), ("farm.json", {"settings": {"n": 1.5}}), ("farm.json", {"settings": [1]}),
    ("farm.json", {"settings": {"strict": "x", "gate": 5}}), ("farm.json", {"mode": []}),
    ("loop.json", {"agents": [1]}), ("loop.json", {"agents": {"agent-001": [1]}}),
    ("loop.json", {"agents": {"agent-001": {"since": 5, "cause": [], "parked": "x"}}}),
    ("merge_queue/now.json", {"testing": ["x"]}), ("merge_queue/now.json", {"testing": [{"ids": [{}]}]}),
    ("merge_queue/now.json", {"held": []}), ("merge_queue/now.json", {"held": {"t-0002": [1]}}),
    ("merge_queue/now.json", {"trouble": [1]}), ("merge_queue/now.json", {"target": None}), ("merge_queue/now.json", {"pid": "x"}),
], ids=str)
def test_what_is_only_shown_may_be_edited_to_what_cannot_be_without_a_traceback(name, edit, place):
    text = json.dumps({**SIDE_TEXTS[name], **edit}).encode()
    for argv in (*VERBS, ["status"], ["queue"]):
        place.try_verb(name, text, argv)


def test_a_task_written_by_hand_and_unknown_keys_are_kept(place):
    name = QUEUES[0]
    data = json.loads(place.files[name])
    data["tasks"] += [{"title": "by hand", "colour": "blue"}]
    data["note"] = ["mine"]
    assert place.try_verb(name, json.dumps(data).encode(), ["add", "new"]) == 0
    written = json.loads(place.read()[name])
    by_hand = next(task for task in written["tasks"] if task["title"] == "by hand")
    assert (by_hand["id"], by_hand["rev"], by_hand["colour"], written["note"]) == ("t-0006", 1, "blue", ["mine"])
    assert len({task["id"] for task in written["tasks"]}) == len(written["tasks"])


def test_damaged_history_stops_no_verb_and_is_only_ever_added_to(place):
    rng, name = random.Random(1), "events.jsonl"
    for number in range(ROUNDS):
        damaged = (cut_short, flip_bits, overwrite, lose_or_double_a_line)[number % 4](place.files[name], rng)
        for argv in rng.sample(VERBS, 3):
            place.restore()
            expected = place.call(argv)[0]
            place.restore()
            (place.folder / name).write_bytes(damaged)
            label = f"{argv} on {damaged[:500]!r}"
            assert place.call(argv)[0] == expected, label
            written = place.read()[name]
            assert written.startswith(damaged), label
            added = written[len(damaged):].decode()
            assert added in ("", "\n") or [json.loads(line) for line in added.splitlines() if line], label
