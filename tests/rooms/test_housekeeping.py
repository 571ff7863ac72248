"""What landed work leaves behind goes by itself: pins, branches, verdicts, prompts, returns."""

from __future__ import annotations

import os
import time

import pytest
from sandbox import commit_files, git, wait_until

import farm as toolkit

A = "agent-001"


def refs(repo) -> list[str]:
    return git(repo, "for-each-ref", "--format=%(refname)", "refs/farm/ready", "refs/farm/returned", "refs/heads/farm").splitlines()


@pytest.fixture
def keeper(farm):
    """Landed tasks t-0001 to t-0003, others that are not; and the housekeeping of their farm."""
    for number in range(1, 6):
        farm.ok("add", f"task {number}", "--id", f"t-000{number}")
    repo, store = farm.repo, toolkit.Store(str(farm.repo))
    kept = {}
    for number in (1, 2, 4, 5):
        git(repo, "checkout", "-q", "-b", f"farm/{A}/t-000{number}", "main")
        kept[number] = commit_files(repo, {f"{number}.txt": "x"})
    git(repo, "checkout", "-q", "main")
    for number in (1, 2):
        git(repo, "merge", "-q", "--no-ff", "-m", f"land {number}", kept[number])
    for ref, number in (("ready/t-0001", 1), ("returned/t-0001/1", 1), ("ready/t-0002", 2), ("ready/t-0004", 4),
                        ("returned/t-0005/1", 5)):
        git(repo, "update-ref", f"refs/farm/{ref}", kept[number])
    # an attempt of t-0002 that another one has overtaken: pinned, and on a branch of its own
    git(repo, "checkout", "-q", "-b", "farm/agent-002/t-0002", "main~2")
    git(repo, "update-ref", "refs/farm/returned/t-0002/1", commit_files(repo, {"other.txt": "x"}))
    git(repo, "checkout", "-q", "main")
    with store.transaction() as tx:
        for number in (1, 2, 3):
            task = tx.state.pending[f"t-000{number}"]
            tx.move(task._replace(state="landed", landed_commit="c0ffee", landed_at="2026-01-01T00:00:00Z"), "landed", "landed")
        tx.store.write_json("farm.json", {"schema": 1, "mode": "down", "settings": {"into": "main"}})
    return toolkit.Housekeeping(toolkit.Site(store, toolkit.load_settings(str(repo)), "main")), farm


def test_refs_of_landed_work_go_and_those_of_other_work_stay(keeper):
    housekeeping, farm = keeper
    housekeeping.go_on(housekeeping.store.snapshot())
    assert refs(farm.repo) == [f"refs/farm/{name}" for name in ("ready/t-0004", "returned/t-0002/1", "returned/t-0005/1")] + [
        f"refs/heads/farm/{A}/t-0004", f"refs/heads/farm/{A}/t-0005"]


def test_the_pin_of_a_branch_that_was_moved_goes_as_others_do(keeper):
    """start-task.sh makes it where an attempt begins elsewhere."""
    housekeeping, farm = keeper
    for task, ref in (("t-0001", "ready/t-0001"), ("t-0002", "returned/t-0002/1"), ("t-0004", "ready/t-0004")):
        git(farm.repo, "update-ref", f"refs/farm/returned/{task}/old-1", f"refs/farm/{ref}")
    housekeeping.go_on(housekeeping.store.snapshot())
    assert [ref for ref in refs(farm.repo) if ref.endswith("old-1")] == [
        "refs/farm/returned/t-0002/old-1", "refs/farm/returned/t-0004/old-1"]
    assert "returned/t-0002/old-1" in farm("doctor").stdout


def test_what_only_a_ref_of_landed_work_has_is_listed_by_doctor(keeper):
    housekeeping, farm = keeper
    housekeeping.go_on(housekeeping.store.snapshot())
    shown = farm("doctor").stdout
    assert "1 ref of landed tasks hold commits that main has not: refs/farm/returned/t-0002/1" in shown
    assert "disk: " in shown and "coordination" in shown and "5 refs" in shown


def land_as_another(farm, task: str, *, is_in_main: bool = True) -> None:
    """What squash leaves: the pin has the commits as they were submitted, main one that says the same."""
    own = git(farm.repo, "commit-tree", "main^{tree}", "-p", "main", "-m", f"own {task}")
    git(farm.repo, "update-ref", f"refs/farm/ready/{task}", own)
    landed = git(farm.repo, "commit-tree", "main^{tree}", "-p", "main", "-m", f"squashed {task}")
    if is_in_main:
        git(farm.repo, "reset", "-q", "--hard", landed)
    store = toolkit.Store(str(farm.repo))
    with store.transaction() as tx:
        record = tx.state.landed[task]
        tx.state.landed[task] = record._replace(commit=own, landed_commit=landed)
        tx.write("landed")


@pytest.mark.parametrize("days", [30.0, 36500.0, 0.0])
def test_the_pin_of_what_has_landed_as_another_commit_goes_after_the_days_that_are_kept(keeper, days):
    """Else a farm that lands by squash or rebase has a ref more for each task for ever."""
    housekeeping, farm = keeper
    land_as_another(farm, "t-0001")
    land_as_another(farm, "t-0002", is_in_main=False)
    housekeeping.settings = housekeeping.settings._replace(keep_days=days)
    housekeeping.go_on(housekeeping.store.snapshot())
    pins = [ref.rpartition("/")[2] for ref in refs(farm.repo) if ref.startswith("refs/farm/ready")]
    assert pins == (["t-0002", "t-0004"] if days == 30 else ["t-0001", "t-0002", "t-0004"])


def test_a_branch_that_a_worktree_is_on_stays(keeper):
    housekeeping, farm = keeper
    git(farm.repo, "worktree", "add", "-q", "../there", f"farm/{A}/t-0001")
    housekeeping.go_on(housekeeping.store.snapshot())
    assert f"refs/heads/farm/{A}/t-0001" in refs(farm.repo) and f"refs/heads/farm/{A}/t-0002" not in refs(farm.repo)


def test_a_ref_that_has_moved_meanwhile_stays_and_the_others_go(keeper):
    housekeeping, farm = keeper
    over, _ = toolkit.find_leftovers(str(farm.repo), "main", housekeeping.store.snapshot())
    git(farm.repo, "branch", "-f", f"farm/{A}/t-0001", "main~1")
    toolkit.run_script("merge/tidy-refs.sh", "drop", "-C", str(farm.repo), stdin="".join(f"{ref} {sha}\n" for ref, sha in over))
    assert f"refs/heads/farm/{A}/t-0001" in refs(farm.repo) and f"refs/heads/farm/{A}/t-0002" not in refs(farm.repo)


def test_the_lock_that_a_killed_git_left_on_all_refs_keeps_nothing_and_one_that_is_held_does_not_for_long(keeper, monkeypatch):
    housekeeping, farm = keeper
    monkeypatch.setenv("FARM_LOCK_SECONDS", "1")
    lock, before = farm.repo / ".git/packed-refs.lock", refs(farm.repo)
    assert len(before) >= 8
    with lock.open("w"):
        began = time.monotonic()
        housekeeping.go_on(housekeeping.store.snapshot())
        assert (refs(farm.repo), lock.exists()) == (before, True)
        assert time.monotonic() - began < 8, "each ref waits for the lock"
        assert "packed-refs.lock" in farm("doctor").stdout
    housekeeping.landed = housekeeping.tidy_at = 0
    housekeeping.go_on(housekeeping.store.snapshot())
    assert not lock.exists()
    test_refs_of_landed_work_go_and_those_of_other_work_stay(keeper)


def test_files_of_landed_work_go_when_they_are_old_enough(keeper):
    housekeeping, farm = keeper
    names = ("prompts/t-0001.1.md", "prompts/t-0001.2.resumed.md", "returns/t-0001.1.txt", "returns/t-0001.txt",
             "results/ab-12.json", "results/ab-12.log", "prompts/t-0005.1.md", "returns/t-0004.1.txt")
    gone = ("prompts/t-0099.1.md", "prompts/v1.3.1.md")
    kept = ("returns/v1.2.txt", "prompts/v1.2.1.md", "results/.git/HEAD", "results/.git")
    farm.ok("add", "its id has a dot", "--id", "v1.2")
    (farm.folder / "results/.git").mkdir(exist_ok=True)
    for name in (*names, *gone, *kept):
        if not (farm.folder / name).is_dir():
            (farm.folder / name).write_text("x")
        os.utime(farm.folder / name, (time.time() - 40 * 86400,) * 2)
    (farm.folder / "prompts/t-0002.1.md").write_text("new")
    state = housekeeping.store.snapshot()
    housekeeping.settings = housekeeping.settings._replace(keep_days=0.0)
    housekeeping.go_on(state)
    assert all((farm.folder / name).exists() for name in names), "0 keeps all"
    housekeeping.settings = housekeeping.settings._replace(keep_days=30.0)
    housekeeping.go_on(state)
    left = [name for name in (*names, "prompts/t-0002.1.md") if (farm.folder / name).exists()]
    assert left == ["prompts/t-0005.1.md", "returns/t-0004.1.txt", "prompts/t-0002.1.md"]
    assert [(farm.folder / name).exists() for name in (*gone, *kept)] == [False, False, True, True, True, True]


def test_a_farm_at_work_keeps_the_refs_of_what_is_alive_only(farm):
    for number in range(6):
        farm.ok("add", f"task {number}")
    agent = "echo $FARM_TASK >>list-$FARM_TASK; git add -A; git commit -qm work"
    farm.ok("run", "-n", "2", "--agent", agent, "--gate", "true", "--until-drained", timeout=90)
    wait_until(lambda: not [ref for ref in refs(farm.repo) if ref.startswith("refs/farm")], 20, "no pins are left")
    left = [ref for ref in refs(farm.repo) if not ref.endswith("/work")]
    assert len(left) <= 2, "a branch that a worktree is on, each"


def test_objects_that_are_many_become_a_pack_and_none_is_dropped(keeper):
    """What no ref has, too: an agent may be about to submit it."""
    housekeeping, farm = keeper
    loose = int(git(farm.repo, "count-objects").split()[0])
    blob = git(farm.repo, "hash-object", "-w", "README.md" if (farm.repo / "README.md").exists() else ".git/config")
    run_pack(housekeeping)
    assert int(git(farm.repo, "count-objects").split()[0]) >= loose, "few: they stay files"
    for number in range(2):  # one of them is in the folder that stands for all, whatever it holds
        (farm.repo / ".git/objects/17").mkdir(exist_ok=True)
        (farm.repo / f".git/objects/17/no-object-{number}").touch()
    git(farm.repo, "config", "gc.auto", "500")
    for _ in range(2):
        run_pack(housekeeping)
    assert git(farm.repo, "count-objects").split()[0] == "0"
    git(farm.repo, "fsck", "--full", "--strict")
    assert git(farm.repo, "cat-file", "-t", blob) == "blob"
    git(farm.repo, "config", "gc.auto", "0")
    commit_files(farm.repo, {"after.txt": "x"})
    run_pack(housekeeping)
    assert git(farm.repo, "count-objects").split()[0] != "0", "0 means never"


def test_objects_are_packed_where_nothing_lands_too(farm):
    """A host's farm: what it does lands on its hub."""
    farm.ok("add", "one")
    store = toolkit.Store(str(farm.repo))
    housekeeping = toolkit.Housekeeping(toolkit.Site(store, toolkit.load_settings(str(farm.repo)), "main"))
    git(farm.repo, "config", "gc.auto", "500")
    (farm.repo / ".git/objects/17").mkdir(exist_ok=True)
    for number in range(2):
        (farm.repo / f".git/objects/17/no-object-{number}").touch()
    housekeeping.go_on(store.snapshot())
    assert housekeeping.packing.wait(30) == 0
    assert list((farm.repo / ".git/objects/pack").glob("*.pack"))
    housekeeping.packing = None
    housekeeping.go_on(store.snapshot())
    assert housekeeping.packing is None, "once an hour"


def test_an_object_that_a_power_cut_has_emptied_keeps_no_other_from_its_pack(keeper):
    housekeeping, farm = keeper
    blob = git(farm.repo, "hash-object", "-w", ".git/config")
    objects = farm.repo / ".git/objects"
    (objects / "17").mkdir(exist_ok=True)
    empty = [objects / f"17/{number:038}" for number in range(2)]
    for file in empty:
        file.touch()
    unfinished = [objects / "pack/tmp_pack_old", objects / "pack/tmp_pack_new"]
    for file in unfinished:
        file.touch()
    os.utime(unfinished[0], (time.time() - 3 * 86400,) * 2)
    git(farm.repo, "config", "gc.auto", "500")
    for _ in range(2):
        run_pack(housekeeping)
    assert git(farm.repo, "count-objects").split()[0] == "2"
    assert [file.exists() for file in (*empty, *unfinished)] == [True, True, False, True]
    assert git(farm.repo, "cat-file", "-t", blob) == "blob"


def run_pack(housekeeping) -> None:
    housekeeping.pack()
    assert housekeeping.packing.wait(30) == 0
