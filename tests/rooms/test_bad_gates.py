"""Gates that misbehave."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from farm_calls import A, Caller, landed, make_commit
from sandbox import wait_until


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def submit_one(farm: Caller) -> None:
    farm.ok("add", "Write")
    farm.ok("submit", A, "--fence", farm.claim(A)["fence"], "--commit", make_commit(farm.repo, {"a.txt": "a"}))


def pids_in(path: Path) -> list[int]:
    return [int(word) for word in path.read_text().split()]


def test_a_gate_that_hangs_is_ended_with_its_whole_group(farm, sandbox):
    submit_one(farm)
    gate = f"trap '' TERM HUP; sleep 600 & echo $$ $! >>{sandbox.work}/pids; (trap '' TERM; sleep 600)"
    farm("merge", "--gate", gate, env={"FARM_GATE_TIMEOUT": "0.5"}, timeout=60)
    wait_until(lambda: all(gone(pid) for pid in pids_in(sandbox.work / "pids")), message="the end of the gate's processes")


def test_work_whose_gate_hangs_comes_back_with_that_reason(farm):
    submit_one(farm)
    done = farm("merge", "--gate", "sleep 600", env={"FARM_GATE_TIMEOUT": "0.5"}, timeout=60)
    assert done.returncode == 5
    assert "took longer" in farm.task("t-0001")["reason"] or "took longer" in done.stderr


def test_what_a_green_gate_leaves_running_is_ended(farm, sandbox):
    submit_one(farm)
    farm.ok("merge", "--gate", f"sleep 600 & echo $! >>{sandbox.work}/pids; exit 0", timeout=60)
    wait_until(lambda: all(gone(pid) for pid in pids_in(sandbox.work / "pids")), message="the end of the gate's process")


def test_a_gate_that_prints_without_end_is_bounded(farm):
    submit_one(farm)
    farm("merge", "--gate", "head -c 30000000 /dev/zero | tr '\\0' x; false", timeout=60)
    assert max(path.stat().st_size for path in (farm.folder / "results").iterdir()) < 2_000_000


def test_a_gate_that_reads_input_gets_none(farm):
    submit_one(farm)
    farm.ok("merge", "--gate", "! read -r line", timeout=60)
    assert landed(farm) == ["t-0001"]


def test_a_gate_that_edits_tracked_files_lands_nothing(farm):
    submit_one(farm)
    farm("merge", "--gate", "echo edited >a.txt", timeout=60)
    assert landed(farm) == []


def test_a_gate_command_that_is_not_there_blames_nobody(farm):
    submit_one(farm)
    done = farm("merge", "--gate", "no-such-gate", timeout=60)
    assert (done.returncode, farm.task("t-0001")["attempts"]) == (5, 0)


@pytest.mark.parametrize("gate", ["test \"$(cat 'a.txt')\" = a # it's \\so", "test $(( 1 + 1 )) = 2 &&\ntrue"])
def test_a_gate_is_run_as_it_was_written(farm, gate):
    submit_one(farm)
    farm.ok("merge", "--gate", gate, timeout=60)
    assert landed(farm) == ["t-0001"]
