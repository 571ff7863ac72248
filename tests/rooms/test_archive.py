"""What is finished leaves the hot files: the archive of landed tasks, the cuts of the history and of the costs."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT
from sandbox import git

import farm as toolkit

READY, ARCHIVE = "coordination/merge_queue/ready-to-merge.json", "coordination/merge_queue/landed.jsonl"
COUNT = 130


def land(repo: Path, *ids: str) -> None:
    store = toolkit.Store(str(repo))
    for number, task_id in enumerate(ids):
        with store.transaction() as tx:
            task = tx.state.pending[task_id]._replace(state="landed", landed_at=toolkit.utc(1.7e9 + number))
            tx.move(task._replace(landed_commit="c0ffee"), "landed", "landed")


@pytest.fixture
def grown(farm):
    """A farm of 130 tasks from a list, all landed but the last five."""
    tasks = farm.repo / "tasks.md"
    tasks.write_text("".join(f"- [ ] task {number}\n" for number in range(1, COUNT + 1)))
    farm.ok("add", "-f", str(tasks))
    land(farm.repo, *(f"t-{number:04d}" for number in range(1, COUNT - 4)))
    return farm


def landed(farm) -> list[str]:
    return [task["id"] for task in farm.json("tasks") if task["state"] == "landed"]


ALL = [f"t-{number:04d}" for number in range(1, COUNT - 4)]


# ---------------------------------------------------------------------------------------------- ids in few bytes


@given(st.lists(st.from_regex(r"t-\d{4,5}|[a-z]{1,3}-?\d{0,2}|\d{1,3}", fullmatch=True)))
def test_a_set_of_ids_is_a_set_and_survives_its_text(names):
    ids = toolkit.Ids()
    for name in names:
        ids.add(name)
    again = toolkit.Ids.from_json(json.loads(json.dumps(ids.to_json())))
    assert all(name in again for name in names) and len(again) == len(set(names))
    assert not any(other in again for other in ("t-00001", "t-1", "zzzz", "", "t-") if other not in names)
    assert again.to_json() == ids.to_json() and again.ranges == ids.ranges


def test_ten_thousand_ids_take_a_few_bytes():
    ids = toolkit.Ids()
    for number in range(1, 10_001):
        ids.add(f"t-{number:04d}")
    assert len(json.dumps(ids.to_json())) < 60 and ids.last_number() == 10_000


@pytest.mark.parametrize("data", [
    [], "x", {"t-/4": 7}, {"t-/4": ""}, {"t-/4": "3-1"}, {"t-/4": "1-2-3"}, {"t-": "1"}, {"t-/4": "5 2"},
])
def test_ids_that_are_none_are_damage(farm, data):
    farm.ok("add", "one")
    ready = json.loads((farm.repo / READY).read_text())
    (farm.repo / READY).write_text(json.dumps({**ready, "archived": data}))
    assert "ready-to-merge.json" in farm.refused(7, "tasks")


# ---------------------------------------------------------------------------------------------- the archive


def test_the_queue_file_holds_the_last_of_what_has_landed_and_everybody_knows_the_rest(grown):
    ready = json.loads((grown.repo / READY).read_text())
    assert len(ready["landed"]) == len(ready["done"]) <= toolkit.LANDED_MAX
    assert ready["archived"] == {"t-/4": f"1-{COUNT - 5 - len(ready['landed'])}"}
    assert landed(grown) == ALL
    assert grown.json("status")["tasks"] == {"landed": COUNT - 5, "pending": 5}
    assert f"merge queue: landed {COUNT - 5}" in grown.ok("status")
    assert grown.json("report")["totals"]["landed"] == COUNT - 5
    assert "landed as c0ffee" in grown.refused(4, "cancel", "t-0001")
    assert "t-0001 is landed" in grown.refused(4, "retry", "t-0001")


def test_a_list_that_is_added_again_adds_nothing_and_ids_are_not_used_again(grown):
    grown.ok("add", "-f", str(grown.repo / "tasks.md"))
    assert len(grown.json("tasks")) == COUNT
    assert grown.ok("add", "new").split()[0] == f"t-{COUNT + 1:04d}"
    assert "t-0001 already" in grown.refused(2, "add", "again", "--id", "t-0001")


def test_a_task_after_an_archived_one_may_be_claimed(grown):
    grown.ok("add", "next", "--after", "t-0001", "--priority", "9")
    assert grown.claim("agent-001")["task"]["title"] == "next"


def test_what_an_old_copy_of_the_queue_files_says_of_archived_work_is_not_believed(farm):
    farm.ok("add", "one")
    old = {name: (farm.repo / name).read_text() for name in (READY, "coordination/task_queue/pending.json")}
    for number in range(2, 62):
        farm_id = farm.ok("add", f"task {number}").split()[0]
        assert farm_id == f"t-{number:04d}"
    land(farm.repo, *(f"t-{number:04d}" for number in range(1, 62)))
    for name, text in old.items():
        (farm.repo / name).write_text(text)
    assert "t-0001" in landed(farm) and len(landed(farm)) >= 20
    farm.refused(3, "claim", "agent-001", "--owner-pid", str(farm.owner))


def test_a_farm_of_the_version_before_is_taken_over_at_its_first_move_which_says_so(grown):
    ready = json.loads((grown.repo / READY).read_text())
    lines = [json.loads(line) for line in (grown.repo / ARCHIVE).read_text().splitlines()]
    whole = [*lines, *ready["landed"]]
    (grown.repo / ARCHIVE).unlink()
    (grown.repo / READY).write_text(json.dumps({"schema": 1, "done": {task["id"]: task["rev"] for task in whole}, "ready": [],
                                                "landed": whole}))
    assert landed(grown) == ALL
    assert "landed tasks move to merge_queue/landed.jsonl" in grown("add", "another").stderr
    assert landed(grown) == ALL and len(json.loads((grown.repo / READY).read_text())["landed"]) == toolkit.LANDED_KEPT
    assert "move to" not in grown("add", "and another").stderr


def test_a_torn_line_at_the_archives_end_costs_nothing(grown):
    with open(grown.repo / ARCHIVE, "ab") as file:
        file.write(b'{"id": "t-01')
    assert landed(grown) == ALL
    grown.ok("add", "x", "--id", "x-1")
    land(grown.repo, *(f"t-{number:04d}" for number in range(COUNT - 4, COUNT + 1)))
    assert len(landed(grown)) == COUNT


def test_of_an_archive_that_is_longer_than_known_only_the_end_is_read(grown):
    """By the loop, between the two writes of a landing: a year's archive does not fit into its memory."""
    store, sizes = toolkit.Store(str(grown.repo)), []
    path = Path(store.path(toolkit.ARCHIVE_FILE))
    before, line = path.stat().st_size, path.read_text().splitlines()[-1]
    path.write_text(path.read_text() + line.replace("t-0", "t-9") + "\n")

    class Counting(toolkit.Disk):
        def read(self, path: str, since: int = 0) -> bytes:
            data = super().read(path, since)
            if path.endswith("landed.jsonl"):
                sizes.append(len(data))
            return data

    state = toolkit.Store(str(grown.repo), Counting()).load()
    assert state.is_behind and state.archive_bytes == path.stat().st_size
    assert sizes == [path.stat().st_size - before] and sizes[0] < before


def test_a_lost_archive_is_said_and_comes_back_from_the_history(grown):
    (grown.repo / ARCHIVE).unlink()
    assert "t-0001" not in landed(grown)
    grown.refused(3, "claim", "agent-001", "--id", "t-0001", "--owner-pid", str(grown.owner))
    assert "t-0001 is in events.jsonl" in grown("doctor").stdout
    grown("doctor", "--fix")
    assert landed(grown) == ALL


# ---------------------------------------------------------------------------------------------- cuts


@pytest.fixture
def cut(farm, monkeypatch):
    """The farm's history is cut at 4 KiB, its costs at 1 KiB, in this process."""
    monkeypatch.setattr(toolkit, "HISTORY_BYTES", 4096)
    monkeypatch.setattr(toolkit, "USAGE_BYTES", 1024)
    farm.ok("add", "one")
    return farm


def test_the_history_is_cut_and_readers_go_on_over_the_cuts(cut):
    store = toolkit.Store(str(cut.repo))
    for number in range(200):
        store.append_event("note", None, number=number)
    names = store.files_of("events.jsonl")
    assert len(names) > 3 and names[-1] == "events.jsonl" and all(Path(store.path(name)).stat().st_size < 4400 for name in names)
    assert [event["number"] for event in toolkit.read_events(store) if event["event"] == "note"] == list(range(200))
    copies = [cut.repo / ".git/farm" / name for name in names]
    assert all(copy.samefile(store.path(name)) for copy, name in zip(copies, names, strict=True))
    assert sorted(path.name for path in (cut.repo / ".git/farm").glob("events*")) == sorted(names), "none is left over"


def test_a_history_in_pieces_comes_back_whole_from_its_copy(cut):
    store = toolkit.Store(str(cut.repo))
    for _ in range(100):
        store.append_event("note", None, text="x" * 50)
    subprocess.run(["rm", "-rf", store.folder], check=True)
    cut("doctor", "--fix")
    assert len([event for event in toolkit.read_events(store) if event["event"] == "note"]) == 100
    assert [task["id"] for task in cut.json("tasks")] == ["t-0001"]


def test_who_appends_while_the_history_is_cut_loses_no_line(cut):
    store = toolkit.Store(str(cut.repo))

    def write(name: str) -> None:
        for number in range(100):
            store.append_event("note", None, number=f"{name}-{number}")

    writers = [threading.Thread(target=write, args=(name,)) for name in "abcdef"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    numbers = [event["number"] for event in toolkit.read_events(store) if event["event"] == "note"]
    assert sorted(numbers) == sorted(f"{name}-{number}" for name in "abcdef" for number in range(100))


@pytest.mark.parametrize("call", ["link", "write_temp", "rename"])
def test_a_cut_that_was_killed_half_way_is_finished_by_the_next(cut, monkeypatch, call):
    store = toolkit.Store(str(cut.repo))
    with monkeypatch.context() as patch:
        def fail(*_args):
            raise OSError(28, "No space left on device")

        patch.setattr(store.disk, call, fail, raising=False)
        for number in range(60):
            store.append_event("note", None, number=number)
    for number in range(60, 200):
        store.append_event("note", None, number=number)
    assert [event["number"] for event in toolkit.read_events(store) if event["event"] == "note"] == list(range(200))


def test_costs_are_cut_and_the_sum_stays(cut):
    store = toolkit.Store(str(cut.repo))
    with store.transaction() as tx:
        toolkit.TaskQueue(tx).add([toolkit.Task(title=f"task {number}") for number in range(40)], 3)
    land(cut.repo, *(f"t-{number:04d}" for number in range(2, 42)))
    for number in range(2, 42):
        for attempt in (1, 2):
            toolkit.note_usage(store, {"task": f"t-{number:04d}", "agent": "agent-001", "fence": f"t-{number:04d}.{attempt}"},
                               toolkit.Usage(100, 10, 0.25))
    line = {"task": "t-0001", "agent": "agent-001", "fence": "t-0001.2", "conversation": "c"}
    toolkit.note_usage(store, line, toolkit.Usage(7, 0, 1.0))
    for _ in range(20):  # one conversation that goes on: its last line holds all of it
        toolkit.note_usage(store, line, toolkit.Usage(9, 0, 2.0))
    assert Path(store.path("usage.jsonl")).stat().st_size < 2048 and len(store.files_of("usage.jsonl")) > 2
    total = toolkit.sum_usage(toolkit.read_usage(store))
    assert total == toolkit.sum_usage(toolkit.read_usage(store, is_whole=True)) == {
        "tokens_in": 8009, "tokens_out": 800, "cost_usd": 22.0}
    assert cut.task("t-0002")["cost_usd"] == 0.5 and cut.json("status")["spent"]["cost_usd"] == 22.0
    assert toolkit.cost_of_task(toolkit.read_usage(store), "t-0001") == 2.0


@pytest.mark.parametrize("call", ["link", "write_temp", "rename"])
def test_a_cut_of_the_costs_that_was_killed_half_way_is_finished_by_the_next(cut, monkeypatch, call):
    store = toolkit.Store(str(cut.repo))

    def spend(numbers: range) -> None:
        for number in numbers:
            line = {"task": f"t-{number:04d}", "agent": "agent-001", "fence": f"t-{number:04d}.2"}
            toolkit.note_usage(store, line, toolkit.Usage(1, 0, 0.5))

    with monkeypatch.context() as patch:
        def fail(*_args):
            raise OSError(28, "No space left on device")

        patch.setattr(store.disk, call, fail, raising=False)
        spend(range(2, 30))
    spend(range(30, 60))
    for lines in (toolkit.read_usage(store), toolkit.read_usage(store, is_whole=True)):
        assert toolkit.sum_usage(lines) == {"tokens_in": 58, "tokens_out": 0, "cost_usd": 29.0}
    assert len(store.files_of("usage.jsonl")) > 1


def test_a_verb_that_looks_reads_no_history(cut):
    """status of a farm whose history cannot even be opened."""
    store = toolkit.Store(str(cut.repo))
    text = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import farm; farm.read_events = None; sys.exit(farm.main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", text, "--repo", str(cut.repo), "status", "--json"], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["tasks"] == {"pending": 1} and store.files_of("events.jsonl")
    assert git(cut.repo, "status", "--porcelain") == ""
