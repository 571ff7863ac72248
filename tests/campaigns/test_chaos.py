"""A short chaos, and that its proof sees what it must: each check is shown a farm in which something is wrong."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator

import chaos
import chaos_ground
import chaos_proof
import psutil
import pytest
from paths import ROOT
from sandbox import run, wait_until

A = "agent-001"


@pytest.fixture
def ground() -> Iterator[chaos_ground.Ground]:
    """A campaign's repo on which no farm has run yet."""
    made = chaos_ground.Ground(seed=1, agents=1)
    yield made
    shutil.rmtree(made.root)


def test_a_short_chaos_loses_nothing():
    done = run([sys.executable, ROOT / "tests/campaigns/chaos.py", "--seconds", "6", "-n", "4", "--seed", "7"], timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all hold" in done.stdout


def test_no_farm_at_all_is_all_well(ground):
    ground.farm("add", "a task", "--max-attempts", "1")
    ground.farm("cancel", "t-0001")
    assert chaos_proof.check_main_is_green(ground) + chaos_proof.check_bytes(ground) + chaos_proof.check_quiet(ground) == []


# ------------------------------------------------------------------------------------------------ landed


def commit(ground: chaos_ground.Ground, name: str, text: str, message: str = "work") -> None:
    path = ground.repo / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    ground.git("add", "-A")
    ground.git("commit", "-q", "-m", message)


def test_a_task_that_was_acknowledged_and_is_nowhere_is_lost(ground):
    ground.farm("add", "a task")
    assert "t-0009 is lost" in chaos_proof.check_landed_once(ground, ["t-0009"])


def test_a_task_that_only_history_knows_is_lost(ground):
    ground.farm("add", "a task")
    pending = ground.coordination("task_queue/pending.json")
    stale = pending.read_bytes()
    ground.farm("add", "another")
    pending.write_bytes(stale)
    assert "t-0002 is lost" in chaos_proof.check_landed_once(ground, [])


@pytest.mark.parametrize("times", [0, 2])
def test_a_landed_task_that_main_has_not_just_once_is_found(ground, times):
    add = ground.farm("add", "a task", "--id", "x")
    assert add.returncode == 0
    for number in range(times):
        commit(ground, f"files/x-{number}.txt", "text", "work\n\nFarm-Task: x")
    sha = ground.git("rev-parse", "HEAD")
    claim = ground.farm("claim", A, "--owner-pid", "1")
    assert claim.returncode == 0, claim.stderr
    ground.farm("submit", A, "--fence", "x.2", "--commit", sha)
    ground.farm("merge", "--gate", "true")
    [problem] = chaos_proof.check_landed_once(ground, [])
    assert f"is landed and landed {times} times" in problem


def test_a_task_that_failed_although_it_could_be_done_is_found(ground):
    ground.farm("add", "a task", "--max-attempts", "1")
    ground.farm("claim", A, "--owner-pid", "1")
    ground.farm("fail", A, "--fence", "t-0001.2", "--why", "no luck")
    [problem] = chaos_proof.check_landed_once(ground, [])
    assert "is failed and landed 0 times: 'no luck'" in problem


@pytest.mark.parametrize(("name", "seen"), [("words/a", False), ("files/a", True)])
def test_work_that_landed_without_a_yes_is_found(ground, name, seen):
    ground.farm("add", "a task")
    commit(ground, name, "text\n")
    ground.git("branch", f"farm/{A}/t-0001")
    ground.git("reset", "-q", "--hard", "HEAD~1")
    ground.farm("claim", A, "--owner-pid", "1")
    ground.farm("submit", A, "--fence", "t-0001.2")
    assert ground.farm("merge", "--gate", "true", "--review", "no").returncode == 0
    assert chaos_proof.check_seen(ground) == [f"t-0001 has landed unseen with {name}"] * (not seen)


# ------------------------------------------------------------------------------------------------ green


@pytest.mark.parametrize("files", [{"files/a.txt": "BROKEN\n"}, {"words/a": "word\n", "words/b": "word\n"}])
def test_a_red_value_of_main_is_found_although_main_is_green_now(ground, files):
    for name, text in files.items():
        commit(ground, name, text)
    red = ground.git("rev-parse", "HEAD")
    ground.git("reset", "-q", "--hard", f"main@{{{len(files)}}}")
    assert chaos_proof.check_main_is_green(ground) == [f"main was red at {red}"]


# ------------------------------------------------------------------------------------------------ bytes


TEXT = "what an agent wrote\n"


def journal(ground: chaos_ground.Ground, text: str, mark: str = "end", path: str = "a.txt") -> None:
    sha = sha_of(ground, text)
    with (ground.journal / A).open("a") as file:
        file.write(f"{mark}\t{sha}\t{A}\trun\t{path}\n")


def sha_of(ground: chaos_ground.Ground, text: str) -> str:
    place = ground.root / "text"
    place.write_text(text)
    return ground.git("hash-object", str(place))


def test_bytes_that_are_nowhere_are_missed(ground):
    journal(ground, TEXT)
    [problem] = chaos_proof.check_bytes(ground)
    assert f"what {A} wrote to a.txt is gone" in problem


def test_bytes_that_only_a_reflog_has_are_missed(ground):
    journal(ground, TEXT)
    commit(ground, "a.txt", TEXT)
    ground.git("reset", "-q", "--hard", "HEAD~1")
    assert len(chaos_proof.check_bytes(ground)) == 1


@pytest.mark.parametrize("ref", ["refs/heads/farm/agent-001/x", "refs/farm/rescue/agent-001/x"])
def test_bytes_that_a_ref_reaches_are_safe(ground, ref):
    journal(ground, TEXT)
    commit(ground, "a.txt", TEXT)
    ground.git("update-ref", ref, "HEAD")
    ground.git("reset", "-q", "--hard", "HEAD~1")
    assert chaos_proof.check_bytes(ground) == []


@pytest.mark.parametrize("place", ["worktree", "trash"])
def test_bytes_in_the_worktree_or_in_what_a_person_threw_away_are_excused(ground, place):
    journal(ground, TEXT)
    folder = ground.worktree(A) if place == "worktree" else ground.trash / "x"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text(TEXT)
    assert chaos_proof.check_bytes(ground) == []


def test_bytes_that_the_same_run_overwrote_or_never_finished_are_excused(ground):
    journal(ground, TEXT)
    journal(ground, "a later text\n", "begin")
    assert chaos_proof.check_bytes(ground) == []


# ------------------------------------------------------------------------------------------------ quiet


@contextlib.contextmanager
def sleeping(environment: dict) -> Iterator[psutil.Process]:
    with subprocess.Popen(["sleep", "600"], env=environment) as child:
        try:
            process = psutil.Process(child.pid)
            wait_until(lambda: environment.items() <= process.environ().items(), message="the kernel to show its environment")
            yield process
        finally:
            child.kill()


def test_a_process_that_is_left_running_is_found(ground):
    with sleeping(ground.environment):
        assert chaos_proof.check_quiet(ground) == ["still running: sleep 600"]


def test_a_claim_that_is_left_is_found(ground):
    ground.farm("add", "a task")
    ground.farm("claim", A, "--owner-pid", "1")
    assert chaos_proof.check_quiet(ground) == [f"a claim is left: {A}.lock"]


def test_the_end_of_a_campaign_ends_what_is_its_own_and_nothing_else(ground):
    others = {key: value for key, value in ground.environment.items() if key != "CHAOS_TOKEN"}
    with sleeping(ground.environment) as own, sleeping(others) as other:
        chaos.end_everything(ground)
        assert (own.is_running(), other.is_running()) == (False, True)
