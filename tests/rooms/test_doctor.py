"""`doctor`: what it finds and mends."""

from __future__ import annotations

import os
import re

import pytest
from farm_calls import A, living_process
from sandbox import git


@pytest.mark.parametrize("name", ["task_queue/pending.json", "merge_queue/ready-to-merge.json"])
@pytest.mark.parametrize("damage", ["{ torn", None])
def test_doctor_fix_rebuilds_a_queue_file_from_history(worked, name, damage):
    worked.ok("add", "one")
    worked.ok("add", "two")
    worked.submit(A, {"one.txt": "text\n"})
    before = worked.json("tasks")
    path = worked.folder / name
    path.unlink() if damage is None else path.write_text(damage)
    assert worked("tasks").returncode == 7
    assert "doctor --fix" in worked.doctor()
    worked.ok("doctor", "--fix")
    assert worked.json("tasks") == before
    assert damage is None or [kept.read_text() for kept in path.parent.glob(f"{path.name}.damaged-*")] == [damage]


def test_doctor_fix_rebuilds_the_lock_of_a_live_agent_which_then_can_submit(worked):
    [task_id] = worked.start_work()
    worked.lock_file().write_text("{ torn")
    assert str(worked.lock_file()) in worked.doctor()
    assert "claimed" in worked.ok("doctor", "--fix")
    worked.let_go()
    assert worked.wait_for(task_id)["attempts"] == 0


def test_doctor_fix_brings_back_the_task_of_a_live_agent_whose_lock_someone_deleted(worked):
    [task_id] = worked.start_work()
    worked.lock_file().unlink()
    assert task_id in worked.doctor()
    worked.ok("doctor", "--fix")
    worked.let_go()
    assert worked.wait_for(task_id)["attempts"] == 0


def test_doctor_fix_brings_back_a_task_that_only_history_knows(worked):
    worked.ok("add", "one")
    stale = (worked.folder / "task_queue/pending.json").read_bytes()
    worked.ok("add", "two", "--prompt", "with a prompt")
    before = worked.json("tasks")
    (worked.folder / "task_queue/pending.json").write_bytes(stale)
    assert "t-0002" in worked.doctor()
    worked.ok("doctor", "--fix")
    assert worked.json("tasks") == before


def test_a_stale_save_of_the_queue_brings_no_finished_work_back(worked):
    worked.ok("add", "one")
    stale = (worked.folder / "task_queue/pending.json").read_bytes()
    worked.submit(A, {"one.txt": "text\n"})
    worked.ok("merge", "--gate", "true")
    (worked.folder / "task_queue/pending.json").write_bytes(stale)
    assert worked("claim", A, "--owner-pid", str(os.getpid())).returncode == 3
    assert [task["state"] for task in worked.json("tasks")] == ["landed"]


def test_doctor_of_a_healed_farm_finds_nothing_and_a_second_fix_mends_nothing(worked):
    worked.ok("add", "one")
    (worked.folder / "task_queue/pending.json").unlink()
    worked.ok("doctor", "--fix")
    assert "mended" not in worked.ok("doctor", "--fix")


def test_doctor_lists_a_pin_that_no_task_knows(worked):
    worked.ok("add", "one")
    git(worked.repo, "update-ref", "refs/farm/ready/t-0099", "HEAD")
    assert re.search(r"refs/farm/ready/t-0099 keeps [0-9a-f]{10}, and no task t-0099 is known", worked.doctor())


def test_doctor_names_the_lock_of_a_dead_owner(worked):
    worked.ok("add", "one")
    with living_process() as owner:
        worked.ok("claim", A, "--owner-pid", str(owner.pid))
        owner.kill()
        owner.wait()
        assert f"{A} holds its lock" in worked.doctor()
