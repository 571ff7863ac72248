"""Damaged files, no room, no permission: nothing is lost, and one clear line says what is wrong."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path

import pytest
from farm_calls import SHIM, A, B, Caller, assert_is_error, bytes_below, copy_repo, make_commit, make_folder_for_all_tests
from sandbox import run

import farm as toolkit

QUEUE_FILES = ["task_queue/pending.json", "merge_queue/ready-to-merge.json", f"agent_locks/{A}.lock"]


# ---------------------------------------------------------------------------------------------- damaged files


@functools.cache
def three_tasks() -> Path:
    """A repo whose farm has one task in each place: pending, claimed, ready."""
    farm = Caller(copy_repo(make_folder_for_all_tests() / "repo"), os.getpid())
    farm.ok("add", "-f", "-", input="one\ntwo\nthree\n")
    farm.submit(B, {"b.txt": "b"})
    farm.claim(A)
    return farm.repo


@pytest.fixture
def damaged(sandbox) -> Caller:
    """A farm with one task in each place; a test then damages one file."""
    return Caller(copy_repo(sandbox.work / "repo", three_tasks()), os.getpid())


DAMAGE = {
    "cut": b'{\n "schema": 1,\n "tasks": [',
    "empty": b"",
    "null": b"null\n",
    "list": b"[]\n",
    "bytes": b"\xff\xfe{}",
    "newer": b'{"schema": 99}\n',
    "wrong-type": b'{"schema": 1, "tasks": {}, "ready": 7, "agent": 3}\n',
}


@pytest.mark.parametrize("name", QUEUE_FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_stops_the_verb_with_its_path(damaged, name, damage):
    (damaged.folder / name).write_bytes(DAMAGE[damage])
    assert name in damaged.refused(7, "claim", "agent-003", "--owner-pid", str(damaged.owner))


@pytest.mark.parametrize("name", QUEUE_FILES)
def test_a_damaged_file_is_never_rewritten(damaged, name):
    (damaged.folder / name).write_bytes(DAMAGE["cut"])
    before = bytes_below(damaged.folder)
    for line in ("add new", f"claim agent-003 --owner-pid {damaged.owner}", "cancel t-0003", "merge", "status"):
        damaged(*line.split())
    assert bytes_below(damaged.folder) == before


@pytest.mark.parametrize("line", ["add new", "tasks", "queue", "locks", "merge", "cancel t-0003", "doctor"])
def test_every_verb_exits_7_on_a_damaged_queue(damaged, line):
    (damaged.folder / "task_queue/pending.json").write_bytes(DAMAGE["cut"])
    assert damaged(*line.split()).returncode == 7


def test_damage_is_told_with_line_and_column(damaged):
    (damaged.folder / "task_queue/pending.json").write_text('{\n "schema": 1,\n "tasks": [,]\n}\n')
    assert "line 3, column 12" in damaged.refused(7, "tasks")


@pytest.mark.parametrize(
    "record",
    [
        '{"id": "t-0009"',
        '{"id": 7, "title": "x"}',
        '{"title": "x", "state": "asleep"}',
        '"text"',
        "{}",
        '{"id": "t-0009", "title": "x", "paths": [1]}',
        '{"id": "t-0009", "title": "x", "rev": true}',
        '{"id": "../../x", "title": "x"}',
    ],
)
def test_a_hand_written_record_that_is_wrong_stops_the_verb(damaged, record):
    (damaged.folder / "task_queue/pending.json").write_text('{"schema": 1, "tasks": [\n' + record + "\n]}\n")
    damaged.refused(7, "claim", "agent-003", "--owner-pid", str(damaged.owner))


@pytest.mark.parametrize(
    ("broken", "still"),
    [
        ("task_queue/pending.json", {"ready": 1, "claimed": 1}),
        ("merge_queue/ready-to-merge.json", {"claimed": 1, "pending": 1}),
        (f"agent_locks/{A}.lock", {"ready": 1, "pending": 1}),
    ],
)
def test_status_shows_what_it_can_of_a_damaged_farm(damaged, broken, still):
    (damaged.folder / broken).write_bytes(DAMAGE["cut"])
    done = damaged("status", "--json")
    shown = json.loads(done.stdout)
    assert (done.returncode, any(broken in problem for problem in shown["problems"])) == (7, True)
    assert still.items() <= shown["tasks"].items()


def test_status_lists_every_damaged_file(damaged):
    for name in QUEUE_FILES:
        (damaged.folder / name).write_bytes(DAMAGE["cut"])
    problems = json.loads(damaged("status", "--json").stdout)["problems"]
    assert [name for name in QUEUE_FILES if not any(name in problem for problem in problems)] == []


@pytest.mark.parametrize("name", ["farm.json", "loop.json"])
def test_status_survives_damage_in_what_the_loop_wrote(damaged, name):
    (damaged.folder / name).write_text("{")
    done = damaged("status", "--json")
    assert (done.returncode, name in json.dumps(json.loads(done.stdout)["problems"])) == (7, True)


def test_a_queue_file_that_is_gone_is_damage_not_an_empty_queue(damaged):
    (damaged.folder / "task_queue/pending.json").unlink()
    damaged.refused(7, "tasks")


class SavedInTwoSteps(toolkit.Disk):
    """A disk on which an editor is in the middle of a save for the first two looks at the pending list."""

    looks = 0

    def read(self, path: str, since: int = 0) -> bytes:
        whole = super().read(path, since)
        self.looks += path.endswith("pending.json")
        return whole[:40] if path.endswith("pending.json") and self.looks < 3 else whole


def test_a_file_that_an_editor_is_saving_is_looked_at_again(damaged):
    assert len(toolkit.Store(str(damaged.repo), SavedInTwoSteps()).load().all_tasks()) == 3


def test_everything_works_again_once_the_file_is_mended(damaged):
    path = damaged.folder / "task_queue/pending.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    damaged.refused(7, "tasks")
    path.write_bytes(whole)
    assert len(damaged.json("tasks")) == 3


def test_a_torn_line_of_history_is_no_damage(damaged):
    with (damaged.folder / "events.jsonl").open("a") as file:
        file.write('{"at": "2026-')
    damaged.ok("add", "more")
    assert json.loads((damaged.folder / "events.jsonl").read_text().splitlines()[-1])["event"] == "added"


# ---------------------------------------------------------------------------------------------- no room, no permission


@pytest.fixture
def read_only():
    """A function that makes a folder read-only, for root too where the file system can."""
    locked = []

    def lock(folder: Path) -> None:
        for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
            path.chmod(0o555)
            locked.append(path)
            if os.geteuid() == 0 and run(["chattr", "+i", path]).returncode:
                pytest.skip("nothing is read-only for root here")

    yield lock
    for path in locked:
        if os.geteuid() == 0:
            run(["chattr", "-i", path])
        path.chmod(0o755)


@pytest.mark.parametrize("line", ["add new", "claim 3 --owner-pid OWNER", "cancel t-0003", "lock 3 x --owner-pid OWNER"])
def test_a_read_only_folder_is_one_clear_line_and_nothing_changes(damaged, read_only, line):
    before = bytes_below(damaged.folder)
    read_only(damaged.folder)
    damaged.refused(1, *line.replace("OWNER", str(damaged.owner)).split())
    assert bytes_below(damaged.folder) == before


@pytest.mark.parametrize("verb", ["tasks", "queue", "locks", "status"])
def test_a_read_only_farm_can_be_looked_at(damaged, read_only, verb):
    read_only(damaged.folder)
    damaged.ok(verb)


def test_a_repo_that_cannot_be_written_is_one_clear_line(farm, read_only):
    read_only(farm.repo)
    farm.refused(1, "add", "new")


@pytest.mark.parametrize("name", ["coordination", "coordination/task_queue", "coordination/agent_locks"])
def test_a_file_where_a_folder_should_be_is_one_clear_line(farm, name):
    path = farm.repo / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("in the way")
    done = farm("add", "new")
    assert done.returncode in (1, 7), done.stderr
    assert_is_error(done, done.returncode)


def test_a_folder_where_a_queue_file_should_be_is_one_clear_line(damaged):
    (damaged.folder / "task_queue/pending.json").unlink()
    (damaged.folder / "task_queue/pending.json").mkdir()
    done = damaged("add", "new")
    assert_is_error(done, done.returncode)


def run_with_small_files(farm: Caller, blocks: int, *argv: str) -> subprocess.CompletedProcess[str]:
    """A verb that may write no file beyond `blocks` KiB."""
    return run(["bash", "-c", f'ulimit -f {blocks}; exec "$@"', "bash", *farm.argv(*argv)])


def test_a_file_that_cannot_grow_is_one_clear_line_and_nothing_is_lost(damaged):
    damaged.ok("add", "-f", "-", input="".join(f"task {number}\n" for number in range(30)))
    before = bytes_below(damaged.folder)
    assert_is_error(run_with_small_files(damaged, 2, "add", "new"), 1)
    assert bytes_below(damaged.folder) == before


FULL_DISK = """
set -eu
mount -t tmpfs -o size=256k tmpfs "$1/coordination"
shift
"$@" add -f "$TASKS" >/dev/null
head -c 1000000 /dev/zero >"$FILLED" 2>/dev/null || true
code=0
"$@" add "one too many" || code=$?
rm "$FILLED"
"$@" tasks | wc -l >&2
exit "$code"
"""


def test_a_full_disk_is_one_clear_line_and_nothing_is_lost(farm, sandbox):
    if run(["unshare", "-m", "true"]).returncode:
        pytest.skip("no mount namespace may be made here")
    (sandbox.work / "tasks").write_text("".join(f"task {number}\n" for number in range(20)))
    farm.folder.mkdir()
    env = {"TASKS": str(sandbox.work / "tasks"), "FILLED": str(farm.folder / "filled")}
    done = run(["unshare", "-m", "bash", "-c", FULL_DISK, "bash", farm.repo, SHIM, "--repo", farm.repo], env=env)
    assert (done.returncode, done.stderr.splitlines()[-1].strip()) == (1, "20"), done.stderr
    assert done.stderr.startswith("farm: ") and "Traceback" not in done.stderr


def test_no_room_stops_new_work_with_a_word_about_it(farm):
    farm.ok("add", "Write")
    commit = make_commit(farm.repo, {"a.txt": "a"})
    farm.ok("submit", A, "--fence", farm.claim(A)["fence"], "--commit", commit)
    farm("merge", "--gate", "true", env={"FARM_MIN_FREE_MIB": str(10**9)}, timeout=60)
    assert farm.task("t-0001")["state"] in ("ready", "landed")
