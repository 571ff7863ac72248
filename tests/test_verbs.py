"""The verbs of tasks and of the merge queue, as other tools build on them: output, exit codes, JSON, fences, repeats."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, commit_files, git, run, wait_until
from farm_calls import FARM, SHIM, UGLY, Caller, assert_is_error, bytes_below, copy_repo, living_process, make_commit

sys.path[:0] = [str(ROOT)]
import farm as toolkit  # noqa: E402  (needs the path above)

A, B, C = "agent-001", "agent-002", "agent-003"
CONTROL_CHARACTERS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
HEADS = {"task": "id state title agent attempts rev reason", "queue": "id state branch commit agent reason"}


@pytest.fixture
def farm(sandbox) -> Caller:
    """A farm on a new repo of one commit; its claims are owned by the test's own process."""
    return Caller(copy_repo(sandbox.work / "repo"), os.getpid())


# ---------------------------------------------------------------------------------------------- add


def test_add_prints_the_id_of_the_new_task(farm):
    assert farm.ok("add", "Fix the login") == "t-0001"


def test_ids_count_upwards(farm):
    assert [farm.ok("add", title) for title in ("a", "b", "c")] == ["t-0001", "t-0002", "t-0003"]


def test_add_takes_an_id_of_ones_own(farm):
    assert farm.ok("add", "Fix", "--id", "login-1") == "login-1"


def test_add_refuses_an_id_that_is_taken(farm):
    farm.ok("add", "Fix", "--id", "login")
    assert "login" in farm.refused(2, "add", "Another", "--id", "login")


@pytest.mark.parametrize("task_id", ["a/b", "../x", "a b", ".x", "a..b", "x.lock", "é", "a\nb", "-x"])
def test_add_refuses_an_id_that_cannot_be_in_a_branch_name(farm, task_id):
    farm.refused(2, "add", "Fix", f"--id={task_id}")


def test_an_id_is_never_used_again(farm):
    farm.submit(A, {"a.txt": "a"}) if farm.ok("add", "first") else None
    farm.ok("merge")
    assert farm.ok("add", "second") == "t-0002"


@pytest.mark.parametrize("title", ["", "   ", "\n"])
def test_add_refuses_a_blank_title(farm, title):
    farm.refused(2, "add", title)


def test_add_without_anything_is_a_usage_error(farm):
    farm.refused(2, "add")


def test_a_title_may_start_with_a_dash_after_two_dashes(farm):
    farm.ok("add", "--", "-v prints nothing")
    assert farm.task("t-0001")["title"] == "-v prints nothing"


@pytest.mark.parametrize("flag", ["--priority=high", "--priority=1.e400", "--max-attempts=many", "--max-attempts=-3", "--after=#0"])
def test_add_refuses_a_value_that_makes_no_sense(farm, flag):
    farm.refused(2, "add", "Fix", flag)


def test_add_refuses_to_come_after_a_task_that_is_not_there(farm):
    farm.refused(2, "add", "Fix", "--after", "t-0009")


def test_a_refused_add_leaves_no_task(farm):
    farm("add", "Fix", "--after", "t-0009")
    assert farm.json("tasks") == []


def test_add_reads_the_prompt_from_a_file(farm, tmp_path):
    (tmp_path / "p.md").write_text("line one\nline 'two'\n")
    farm.ok("add", "Fix", "--prompt-file", str(tmp_path / "p.md"))
    assert farm.claim(A)["task"]["prompt"].rstrip("\n") == "line one\nline 'two'"


def test_add_works_from_a_subfolder(farm):
    folder = farm.repo / "a" / "b"
    folder.mkdir(parents=True)
    run([SHIM, "add", "Fix"], cwd=folder, check=True)
    assert farm.task("t-0001")["title"] == "Fix"


def test_add_in_a_linked_worktree_means_the_main_one(farm, sandbox):
    git(farm.repo, "worktree", "add", "-q", "--detach", sandbox.work / "other")
    run([SHIM, "add", "Fix"], cwd=sandbox.work / "other", check=True)
    assert farm.task("t-0001")["title"] == "Fix"


def test_farm_repo_in_the_environment_names_the_repo(farm, sandbox):
    run([SHIM, "add", "Fix"], cwd=sandbox.home, env={"FARM_REPO": str(farm.repo)}, check=True)
    assert farm.task("t-0001")["title"] == "Fix"


def test_git_does_not_see_the_coordination_folder(farm):
    farm.ok("add", "Fix")
    assert git(farm.repo, "status", "--porcelain") == ""


# ---------------------------------------------------------------------------------------------- add -f

FORMATS = {
    "checklist": "# Plan\n\n- [ ] First\n- [x] Done long ago\n* [ ] Second\n",
    "json-lines": '{"title": "First"}\n\n{"title": "Second", "priority": 2}\n',
    "json-array": '[{"title": "First"},\n {"title": "Second"}]',
    "issues": '[{"number": 7, "title": "First", "body": "text"}, {"number": 9, "title": "Second", "body": null}]',
    "plain": "# a comment\nFirst\n\n  Second  \n",
    "windows": "- [ ] First\r\n- [x] Done\r\n- [ ] Second\r\n",
    "byte-order-mark": "\ufeffFirst\nSecond\n",
    "own-ids": '{"id": "one", "title": "First"}\n{"id": "two", "title": "Second", "after": ["one"]}\n',
}


@pytest.fixture(params=FORMATS)
def task_file(request, sandbox) -> Path:
    path = sandbox.work / f"{request.param}.txt"
    path.write_text(FORMATS[request.param], encoding="utf-8", newline="")
    return path


def test_add_f_adds_what_the_file_lists(farm, task_file):
    farm.ok("add", "-f", str(task_file))
    assert [task["title"] for task in farm.json("tasks")] == ["First", "Second"]


def test_add_f_twice_adds_nothing_twice(farm, task_file):
    farm.ok("add", "-f", str(task_file))
    before = farm.json("tasks")
    farm.ok("add", "-f", str(task_file))
    assert farm.json("tasks") == before


def test_add_f_reads_standard_input(farm):
    assert farm.ok("add", "-f", "-", input="First\nSecond\n").split() == ["t-0001", "t-0002"]


def test_add_f_again_does_not_bring_back_what_is_canceled(farm, sandbox):
    (sandbox.work / "t").write_text("First\n")
    farm.ok("add", "-f", str(sandbox.work / "t"))
    farm.ok("cancel", "t-0001")
    farm.ok("add", "-f", str(sandbox.work / "t"))
    assert [task["state"] for task in farm.json("tasks")] == ["canceled"]


def test_add_f_again_does_not_bring_back_what_has_landed(farm, sandbox):
    (sandbox.work / "t").write_text("First\n")
    farm.ok("add", "-f", str(sandbox.work / "t"))
    farm.submit(A, {"a.txt": "a"})
    farm.ok("merge")
    farm.ok("add", "-f", str(sandbox.work / "t"))
    assert [task["state"] for task in farm.json("tasks")] == ["landed"]


def test_add_f_again_adds_the_line_that_is_new(farm, sandbox):
    path = sandbox.work / "t"
    path.write_text("First\n")
    farm.ok("add", "-f", str(path))
    path.write_text("Zeroth\nFirst\n")
    farm.ok("add", "-f", str(path))
    assert [task["title"] for task in farm.json("tasks")] == ["First", "Zeroth"]


def test_text_below_a_checkbox_is_its_prompt(farm):
    farm.ok("add", "-f", "-", input="- [ ] First\n  do this\n\n  and that\n- [ ] Second\n")
    assert farm.claim(A)["task"]["prompt"] == "do this\n\nand that"


def test_a_checkbox_comes_after_the_deeper_ones_below_it(farm):
    farm.ok("add", "-f", "-", input="- [ ] Whole\n  - [ ] Part\n")
    assert farm.claim(A)["task"]["title"] == "Part"


def test_text_after_the_list_belongs_to_no_task(farm):
    farm.ok("add", "-f", "-", input="- [ ] First\n\nA closing remark.\n")
    assert "prompt" not in farm.claim(A)["task"]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('{"title": "First"}\n{"title": \n', "line 2"),
        ('{"title": "First"}\n{"prompt": "no title"}\n', "line 2"),
        ('{"title": "First"}\n{"title": "x", "priority": "high"}\n', "priority"),
        ('{"title": "First"}\n{"title": "x", "after": "t-1"}\n', "after"),
        ('{"title": "First"}\n{"title": "x", "after": [3]}\n', "after"),
        ('{"title": "First"}\n{"title": "x", "paths": [3]}\n', "paths"),
        ('{"title": "First"}\n{"title": "x", "after": ["#7"]}\n', "#7"),
        ('{"title": "First"}\n{"title": "x", "after": ["#1"]}\n', "#1"),
        ('{"title": "First"}\n{"title": "x", "after": ["nothing"]}\n', "nothing"),
        ('{"title": "First"}\n{"title": "x", "id": "a/b"}\n', "a/b"),
        ('[{"title": "First"}, 7]', "item 2"),
        ('[{"title": "First"}, \n]', "line"),
        ('{"title": "First", "id": "x"}\n{"title": "Second", "id": "x"}\n', "x"),
    ],
)
def test_add_f_names_what_is_wrong_and_where(farm, text, where):
    assert where in farm.refused(2, "add", "-f", "-", input=text)


def test_add_f_adds_all_or_nothing(farm):
    farm.refused(2, "add", "-f", "-", input='{"title": "First"}\n{"title": \n')
    assert farm.json("tasks") == []


def test_add_f_of_a_file_that_is_not_there_says_so(farm):
    assert "no/such.md" in farm.refused(3, "add", "-f", "no/such.md")


def test_add_f_of_a_folder_says_so(farm):
    done = farm("add", "-f", str(farm.repo))
    assert_is_error(done, done.returncode)
    assert done.returncode in (1, 2, 3)


def test_add_f_of_bytes_that_are_no_text_is_a_usage_error(farm, sandbox):
    (sandbox.work / "t").write_bytes(b"First\n\xff\xfe\n")
    farm.refused(2, "add", "-f", str(sandbox.work / "t"))


def test_add_f_refuses_a_title_beside_the_file(farm, task_file):
    farm.refused(2, "add", "A title", "-f", str(task_file))


# ---------------------------------------------------------------------------------------------- tasks


def test_tasks_of_a_new_repo_are_an_empty_list(farm):
    assert farm.json("tasks") == []


def test_looking_makes_nothing(farm):
    for verb in ("tasks", "queue", "locks", "status"):
        farm.ok(verb)
    assert not farm.folder.exists()


def test_a_task_record_has_the_keys_of_the_contract(farm):
    farm.ok("add", "Fix")
    assert set(HEADS["task"].split()) <= farm.task("t-0001").keys()


def test_tasks_prints_one_line_a_task_in_a_pipe(farm):
    farm.ok("add", "Two\nlines")
    farm.ok("add", "Another")
    assert [line.split("\t")[0] for line in farm.ok("tasks").splitlines()] == ["t-0001", "t-0002"]


def test_a_task_added_by_hand_with_a_title_alone_can_be_claimed(farm):
    farm.ok("add", "First")
    path = farm.folder / "task_queue" / "pending.json"
    data = json.loads(path.read_text())
    data["tasks"].append({"title": "By hand"})
    path.write_text(json.dumps(data))
    farm.claim(A)
    assert farm.claim(B)["task"]["title"] == "By hand"


def test_keys_of_a_newer_version_are_kept(farm):
    farm.ok("add", "First")
    path = farm.folder / "task_queue" / "pending.json"
    data = json.loads(path.read_text())
    data["tasks"][0]["colour"] = "blue"
    path.write_text(json.dumps(data))
    assert farm.claim(A)["task"]["colour"] == "blue"


# ---------------------------------------------------------------------------------------------- claim


def test_claim_prints_the_lock_file_on_one_line(farm):
    farm.ok("add", "Fix")
    printed = farm.ok("claim", A, "--owner-pid", str(farm.owner))
    assert printed + "\n" == lock_file(farm, A).read_text()


def test_a_fence_names_the_task_and_its_revision(farm):
    farm.ok("add", "Fix")
    claim = farm.claim(A)
    assert claim["fence"] == f"t-0001.{claim['task']['rev']}"


def test_a_number_stands_for_an_agent(farm):
    farm.ok("add", "Fix")
    assert farm.claim("3")["agent"] == C


@pytest.mark.parametrize("agent", ["../x", "a/b", "", ".hidden", "a b", "x.lock", "a\nb"])
def test_claim_refuses_an_agent_that_is_no_file_name(farm, agent):
    farm.ok("add", "Fix")
    farm.refused(2, "claim", agent, "--owner-pid", str(farm.owner))


def test_claim_without_an_agent_is_a_usage_error(farm):
    farm.refused(2, "claim")


def test_claim_of_nothing_exits_3(farm):
    farm.refused(3, "claim", A, "--owner-pid", str(farm.owner))


def test_claim_is_first_come_first_served(farm):
    for title in ("a", "b", "c"):
        farm.ok("add", title)
    assert [farm.claim(agent)["task"]["id"] for agent in (A, B, C)] == ["t-0001", "t-0002", "t-0003"]


def test_claim_takes_the_highest_priority_first(farm):
    farm.ok("add", "low", "--priority", "-1")
    farm.ok("add", "normal")
    farm.ok("add", "high", "--priority", "5")
    assert [farm.claim(agent)["task"]["title"] for agent in (A, B, C)] == ["high", "normal", "low"]


def test_claim_again_by_the_same_owner_gives_the_same_claim(farm):
    farm.ok("add", "a")
    farm.ok("add", "b")
    assert farm.claim(A) == farm.claim(A)


def test_claim_for_an_agent_whose_owner_lives_is_refused_to_another_owner(farm):
    farm.ok("add", "a")
    farm.ok("add", "b")
    farm.claim(A)
    with living_process() as other:
        farm.refused(4, "claim", A, "--owner-pid", str(other.pid))


def test_claim_by_id_passes_over_those_before_it(farm):
    farm.ok("add", "a")
    farm.ok("add", "b")
    assert farm.claim(A, "--id", "t-0002")["task"]["title"] == "b"


def test_claim_by_id_of_a_held_task_is_refused(farm):
    farm.ok("add", "a")
    farm.claim(A)
    assert A in farm.refused(4, "claim", B, "--owner-pid", str(farm.owner), "--id", "t-0001")


def test_claim_by_id_of_no_task_exits_3(farm):
    farm.ok("add", "a")
    farm.refused(3, "claim", A, "--owner-pid", str(farm.owner), "--id", "t-0009")


def test_claim_refuses_an_owner_that_does_not_live(farm):
    farm.ok("add", "a")
    with living_process() as process:
        process.kill()
        process.wait()
        farm.refused(2, "claim", A, "--owner-pid", str(process.pid))


def in_a_session_of_its_own(then: str, argv: list[str]) -> list[str]:
    """A command that leads a new session and there runs `then`, Python that has `argv`."""
    return [sys.executable, "-c", f"import os, subprocess\nos.setsid()\nargv = {argv!r}\n{then}"]


def test_claim_that_leads_its_own_session_must_name_an_owner(farm):
    farm.ok("add", "a")
    assert_is_error(run(in_a_session_of_its_own("os.execv(argv[0], argv)", farm.argv("claim", A))), 2)


def test_the_session_leader_owns_a_claim_by_default(farm):
    farm.ok("add", "a")
    done = run(in_a_session_of_its_own("print(os.getpid(), flush=True)\nsubprocess.run(argv)", farm.argv("claim", A)))
    leader, claim = done.stdout.splitlines()
    assert json.loads(claim)["owner"]["pid"] == int(leader)


def test_many_claims_at_once_take_each_task_once(farm):
    farm.ok("add", "-f", "-", input="".join(f"task {number}\n" for number in range(8)))
    names = [f"agent-{number:03d}" for number in range(1, 9)]
    started = [farm.start("claim", name, "--owner-pid", str(farm.owner)) for name in names]
    claimed = sorted(json.loads(process.communicate(timeout=60)[0])["task"]["id"] for process in started)
    assert claimed == [f"t-{number:04d}" for number in range(1, 9)]


# ---------------------------------------------------------------------------------------------- what may not be claimed yet


def test_a_task_waits_until_what_it_comes_after_has_landed(farm):
    farm.ok("add", "a")
    farm.ok("add", "b", "--after", "t-0001")
    farm.submit(A, {"a.txt": "a"})
    farm.refused(3, "claim", B, "--owner-pid", str(farm.owner))


def test_a_task_may_be_claimed_once_what_it_comes_after_has_landed(farm):
    farm.ok("add", "a")
    farm.ok("add", "b", "--after", "t-0001")
    farm.submit(A, {"a.txt": "a"})
    farm.ok("merge")
    assert farm.claim(B)["task"]["id"] == "t-0002"


def test_a_task_with_unmet_after_is_shown_as_waiting(farm):
    farm.ok("add", "a")
    farm.ok("add", "b", "--after", "t-0001")
    assert farm.task("t-0002")["state"] == "waiting"


def test_waiting_is_never_stored(farm):
    farm.ok("add", "a")
    farm.ok("add", "b", "--after", "t-0001")
    assert '"waiting"' not in (farm.folder / "task_queue" / "pending.json").read_text()


def test_claim_skips_a_task_whose_paths_overlap_a_held_one(farm):
    farm.ok("add", "a", "--path", "src/**")
    farm.ok("add", "b", "--path", "src/db/*.py")
    farm.ok("add", "c", "--path", "docs")
    farm.claim(A)
    assert farm.claim(B)["task"]["title"] == "c"


def test_claim_skips_a_task_whose_paths_overlap_a_lock(farm):
    farm.ok("add", "a", "--path", "src/db/*.py")
    farm.lock(B, "path:src/**", check=True)
    farm.refused(3, "claim", A, "--owner-pid", str(farm.owner))


def test_claim_takes_a_task_whose_paths_only_its_own_lock_covers(farm):
    farm.ok("add", "a", "--path", "src/db/*.py")
    farm.lock(A, "path:src/**", check=True)
    assert farm.claim(A)["task"]["title"] == "a"


def test_a_task_in_backoff_is_shown_as_waiting(farm):
    farm.ok("add", "a")
    farm.ok("fail", A, "--fence", farm.claim(A)["fence"], "--why", "no")
    farm.ok("fail", A, "--fence", farm.claim(A, "--wait", "20")["fence"], "--why", "no")
    assert farm.task("t-0001")["state"] == "waiting"


def test_claim_waits_for_the_end_of_a_backoff(farm):
    farm.ok("add", "a")
    farm.ok("fail", A, "--fence", farm.claim(A)["fence"], "--why", "no")
    assert farm.claim(B, "--wait", "20")["task"]["attempts"] == 1


class StoodStill:
    """A clock that a test moves by hand."""

    def __init__(self):
        self.seconds = 1_800_000_000.0

    def now(self):
        return self.seconds

    monotonic = now


def test_backoff_doubles_up_to_five_minutes(farm, monkeypatch):
    clock = StoodStill()
    monkeypatch.setattr(toolkit, "CLOCK", clock)
    farm.ok("add", "a", "--max-attempts", "99")
    waits = []
    for _ in range(11):
        with toolkit.Store(str(farm.repo)).transaction() as tx:
            fence = toolkit.TaskQueue(tx).claim(A, toolkit.identify(farm.owner)).fence
            task = toolkit.TaskQueue(tx).fail(A, fence, "no")
        waits.append(toolkit.epoch(task.not_before) - clock.now())
        clock.seconds += waits[-1]
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]


# ---------------------------------------------------------------------------------------------- claim --wait


def test_claim_with_wait_gets_a_task_that_is_added_meanwhile(farm):
    waiting = farm.start("claim", A, "--owner-pid", str(farm.owner), "--wait", "60")
    wait_until((farm.folder / "events.jsonl").exists, message="the first look of the waiting claim")
    farm.ok("add", "Late")
    assert json.loads(waiting.communicate(timeout=60)[0])["task"]["title"] == "Late"


def test_claim_with_wait_gets_a_task_that_is_unblocked_meanwhile(farm):
    farm.ok("add", "a", "--path", "src")
    farm.ok("add", "b", "--path", "src/x")
    fence = farm.claim(A)["fence"]
    waiting = farm.start("claim", B, "--owner-pid", str(farm.owner), "--wait", "60")
    farm.ok("fail", A, "--fence", fence, "--why", "no", "--no-retry")
    assert json.loads(waiting.communicate(timeout=60)[0])["task"]["title"] == "b"


def test_claim_with_wait_gets_the_task_of_an_owner_that_dies_meanwhile(farm):
    farm.ok("add", "a")
    lock_and_die(farm, C)
    with living_process() as owner:
        farm.ok("claim", A, "--owner-pid", str(owner.pid))
        waiting = farm.start("claim", B, "--owner-pid", str(farm.owner), "--wait", "10")
        wait_until(lambda: not lock_file(farm, C).exists(), message="the first look, which ends the dead owner's lock")
        owner.kill()
        owner.wait()
        assert json.loads(waiting.communicate(timeout=60)[0] or "{}").get("agent") == B


def lock_file(farm, agent: str) -> Path:
    return farm.folder / "agent_locks" / f"{agent}.lock"


def lock_and_die(farm, agent: str) -> None:
    """A lock of an owner that is dead now: whoever looks next removes it, and can be seen to have looked."""
    with living_process() as owner:
        farm.ok("lock", agent, "schema", "--owner-pid", str(owner.pid))
        owner.kill()
        owner.wait()


def test_claim_with_wait_gives_up_at_its_end(farm):
    farm.refused(3, "claim", A, "--owner-pid", str(farm.owner), "--wait", "0.2")


@pytest.mark.parametrize("wait", ["soon", "nan", "-1"])
def test_claim_refuses_a_wait_that_is_no_number_of_seconds(farm, wait):
    done = farm("claim", A, "--owner-pid", str(farm.owner), f"--wait={wait}", timeout=20)
    assert_is_error(done, 2)


# ---------------------------------------------------------------------------------------------- dead owners


def claim_and_die(farm, agent=A, *args):
    """A claim of an owner that is dead now."""
    with living_process() as owner:
        claim = json.loads(farm.ok("claim", agent, "--owner-pid", str(owner.pid), *args))
        owner.kill()
        owner.wait()
    return claim


def test_claim_takes_over_a_dead_owners_task(farm):
    farm.ok("add", "a")
    claim_and_die(farm)
    assert farm.claim(B, "--wait", "20")["task"]["id"] == "t-0001"


def test_a_task_of_a_dead_owner_starts_from_its_own_branch(farm):
    farm.ok("add", "a")
    claim_and_die(farm)
    assert farm.claim(B, "--wait", "20")["task"]["start"] == f"farm/{A}/t-0001"


def test_a_death_counts_as_an_attempt(farm):
    farm.ok("add", "a", "--max-attempts", "1")
    claim_and_die(farm)
    farm("claim", B, "--owner-pid", str(farm.owner))
    assert farm.task("t-0001")["state"] == "failed"


def test_the_reason_after_a_death_names_the_agent(farm):
    farm.ok("add", "a")
    claim_and_die(farm)
    farm("claim", B, "--owner-pid", str(farm.owner))
    assert A in farm.task("t-0001")["reason"]


def test_a_reboot_costs_no_attempt(farm):
    farm.ok("add", "a")
    farm.claim(A)
    claim = farm.claim(B, env={"FARM_BOOT_ID": "another"})
    assert "attempts" not in claim["task"]


def test_the_fence_of_a_dead_owners_claim_is_refused(farm):
    farm.ok("add", "a")
    old = claim_and_die(farm)
    farm.claim(B, "--wait", "20")
    farm.refused(4, "submit", A, "--fence", old["fence"], "--commit", "HEAD")


def test_an_owner_that_is_a_zombie_is_dead(farm):
    farm.ok("add", "a")
    with living_process() as owner:
        farm.ok("claim", A, "--owner-pid", str(owner.pid))
        owner.kill()
        wait_until(lambda: psutil.Process(owner.pid).status() == psutil.STATUS_ZOMBIE)
        assert farm.claim(B, "--wait", "20")["agent"] == B


def test_a_live_owners_task_is_never_taken_by_age(farm):
    farm.ok("add", "a")
    farm.claim(A)
    farm.refused(3, "claim", B, "--owner-pid", str(farm.owner), "--wait", "0.2", env={"FARM_LEASE_SECONDS": "0"})


def test_an_owner_on_another_host_keeps_its_task_within_the_lease(farm):
    farm.ok("add", "a")
    farm.claim(A)
    move_owner_to_another_host(farm)
    farm.refused(3, "claim", B, "--owner-pid", str(farm.owner), "--wait", "0.2", env={"FARM_LEASE_SECONDS": "600"})


def test_an_owner_on_another_host_loses_its_task_after_the_lease(farm):
    farm.ok("add", "a")
    farm.claim(A)
    move_owner_to_another_host(farm)
    assert farm.claim(B, "--wait", "10", env={"FARM_LEASE_SECONDS": "0.3"})["agent"] == B


def move_owner_to_another_host(farm) -> None:
    path = lock_file(farm, A)
    claim = json.loads(path.read_text())
    claim["owner"]["host"] = "elsewhere.example"
    path.write_text(json.dumps(claim) + "\n")


# ------------------------------------------------------------------ renew, release, fail, submit: fences and repeats

MOVES = {
    "submit": ["--commit", "HEAD"],
    "fail": ["--why", "it did not work"],
    "release": [],
}
WITH_FENCE = {**MOVES, "renew": []}


@pytest.mark.parametrize("fence", ["t-0001.1", "t-0009.2", "nonsense", "../../x.2", "t-0001"])
def test_a_fence_that_never_was_is_refused(farm, fence):
    farm.ok("add", "a")
    farm.claim(A)
    farm.refused(4, "submit", A, "--fence", fence, "--commit", "HEAD")


@pytest.mark.parametrize("verb", WITH_FENCE)
def test_a_refused_fence_changes_nothing(farm, verb):
    farm.ok("add", "a")
    farm.claim(A)
    before = bytes_below(farm.folder)
    farm.refused(4, verb, A, "--fence", "t-0001.99", *WITH_FENCE[verb])
    assert bytes_below(farm.folder) == before


@pytest.mark.parametrize("verb", WITH_FENCE)
def test_another_agents_fence_is_refused(farm, verb):
    farm.ok("add", "a")
    fence = farm.claim(A)["fence"]
    farm.refused(4, verb, B, "--fence", fence, *WITH_FENCE[verb])


@pytest.mark.parametrize("verb", WITH_FENCE)
def test_a_missing_fence_is_a_usage_error(farm, verb):
    farm.ok("add", "a")
    farm.claim(A)
    farm.refused(2, verb, A, *WITH_FENCE[verb])


@pytest.mark.parametrize("verb", WITH_FENCE)
def test_the_fence_may_come_from_the_environment(farm, verb):
    farm.ok("add", "a")
    farm.ok(verb, A, *WITH_FENCE[verb], env={"FARM_FENCE": farm.claim(A)["fence"]})


@pytest.mark.parametrize("verb", MOVES)
def test_a_move_that_is_repeated_exits_0(farm, verb):
    farm.ok("add", "a")
    fence = farm.claim(A)["fence"]
    farm.ok(verb, A, "--fence", fence, *MOVES[verb])
    farm.ok(verb, A, "--fence", fence, *MOVES[verb])


@pytest.mark.parametrize("verb", MOVES)
def test_a_move_that_is_repeated_changes_nothing(farm, verb):
    farm.ok("add", "a")
    fence = farm.claim(A)["fence"]
    farm.ok(verb, A, "--fence", fence, *MOVES[verb])
    before = bytes_below(farm.folder)
    farm.ok(verb, A, "--fence", fence, *MOVES[verb])
    assert bytes_below(farm.folder) == before


@pytest.mark.parametrize(("first", "second"), [*itertools.permutations(MOVES, 2)])
def test_a_claim_that_has_ended_cannot_end_otherwise(farm, first, second):
    farm.ok("add", "a")
    fence = farm.claim(A)["fence"]
    farm.ok(first, A, "--fence", fence, *MOVES[first])
    farm.refused(4, second, A, "--fence", fence, *MOVES[second])


def test_a_submit_repeated_after_the_landing_exits_0(farm):
    farm.ok("add", "a")
    fence = farm.submit(A, {"a.txt": "a"})["fence"]
    farm.ok("merge")
    farm.ok("submit", A, "--fence", fence)


def test_the_old_fence_is_refused_once_the_task_is_claimed_again(farm):
    farm.ok("add", "a")
    old = farm.claim(A)["fence"]
    farm.ok("release", A, "--fence", old)
    farm.claim(A)
    farm.refused(4, "release", A, "--fence", old)


def test_fences_of_a_task_rise(farm):
    farm.ok("add", "a")
    first = farm.claim(A)["fence"]
    farm.ok("release", A, "--fence", first)
    assert int(farm.claim(A)["fence"].split(".")[1]) > int(first.split(".")[1])


def test_renew_counts_up_in_the_lock_file(farm):
    farm.ok("add", "a")
    fence = farm.claim(A)["fence"]
    farm.ok("renew", A, "--fence", fence)
    farm.ok("renew", A, "--fence", fence)
    assert json.loads(lock_file(farm, A).read_text())["renewals"] == 2


def test_renew_keeps_the_fence(farm):
    farm.ok("add", "a")
    fence = farm.claim(A)["fence"]
    farm.ok("renew", A, "--fence", fence)
    farm.ok("release", A, "--fence", fence)


def test_release_counts_no_attempt(farm):
    farm.ok("add", "a")
    farm.ok("release", A, "--fence", farm.claim(A)["fence"])
    assert farm.task("t-0001")["attempts"] == 0


def test_a_released_task_can_be_claimed_at_once(farm):
    farm.ok("add", "a")
    farm.ok("release", A, "--fence", farm.claim(A)["fence"])
    assert farm.claim(B)["task"]["id"] == "t-0001"


def test_fail_needs_a_reason(farm):
    farm.ok("add", "a")
    farm.refused(2, "fail", A, "--fence", farm.claim(A)["fence"])


def test_fail_keeps_the_reason(farm):
    farm.ok("add", "a")
    farm.ok("fail", A, "--fence", farm.claim(A)["fence"], "--why", "the API is gone")
    assert farm.task("t-0001")["reason"] == "the API is gone"


def test_a_task_fails_for_good_after_its_last_attempt(farm):
    farm.ok("add", "a", "--max-attempts", "2")
    for _ in range(2):
        farm.ok("fail", A, "--fence", farm.claim(A, "--wait", "20")["fence"], "--why", "no")
    assert (farm.task("t-0001")["state"], farm.task("t-0001")["attempts"]) == ("failed", 2)


def test_fail_with_no_retry_fails_for_good_at_once(farm):
    farm.ok("add", "a")
    farm.ok("fail", A, "--fence", farm.claim(A)["fence"], "--why", "no", "--no-retry")
    assert farm.task("t-0001")["state"] == "failed"


def test_a_failed_task_cannot_be_claimed(farm):
    farm.ok("add", "a")
    farm.ok("fail", A, "--fence", farm.claim(A)["fence"], "--why", "no", "--no-retry")
    farm.refused(3, "claim", A, "--owner-pid", str(farm.owner))


def test_submit_puts_the_head_of_the_tasks_branch_into_the_queue(farm):
    farm.ok("add", "a")
    farm.submit(A, {"a.txt": "a"})
    assert farm.json("queue")[0]["commit"] == git(farm.repo, "rev-parse", f"refs/heads/farm/{A}/t-0001")


def test_submit_takes_another_branch(farm):
    farm.ok("add", "a")
    git(farm.repo, "update-ref", "refs/heads/mine", make_commit(farm.repo, {"a.txt": "a"}))
    farm.ok("submit", A, "--fence", farm.claim(A)["fence"], "--branch", "mine")
    assert farm.json("queue")[0]["commit"] == git(farm.repo, "rev-parse", "refs/heads/mine")


def test_submit_takes_a_commit(farm):
    farm.ok("add", "a")
    commit = make_commit(farm.repo, {"a.txt": "a"})
    farm.ok("submit", A, "--fence", farm.claim(A)["fence"], "--commit", commit[:12])
    assert farm.json("queue")[0]["commit"] == commit


def test_submit_pins_the_head(farm):
    farm.ok("add", "a")
    farm.submit(A, {"a.txt": "a"})
    assert git(farm.repo, "rev-parse", "refs/farm/ready/t-0001") == farm.json("queue")[0]["commit"]


GIT_THAT_WAITS = """\
#!/bin/sh
here='%s'
case "$*" in *update-ref*) ;; *) exec '%s' "$@" ;; esac
: >"$here/reached"
until [ -e "$here/go" ]; do sleep 0.02; done
'%s' "$@"
: >"$here/done"
"""


@pytest.mark.parametrize("when", ["it lives", "it was killed"])
def test_a_late_agents_pin_does_not_come_after_that_of_the_next_claims_submission(farm, sandbox, when):
    folder = sandbox.work / "bin"
    folder.mkdir()
    (folder / "git").write_text(GIT_THAT_WAITS % (folder, shutil.which("git"), shutil.which("git")))
    (folder / "git").chmod(0o755)
    farm.ok("add", "a")
    first, second = (make_commit(farm.repo, {"a.txt": text}) for text in ("first", "second"))
    with living_process() as owner:
        fence = json.loads(farm.ok("claim", A, "--owner-pid", str(owner.pid)))["fence"]
    slow = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    late = farm.start("submit", A, "--fence", fence, "--commit", first, env=slow)
    wait_until((folder / "reached").exists)
    if when == "it was killed":  # the git that it had started goes on
        late.kill()
    other = farm.start("submit", B, "--fence", farm.claim(B, "--wait", "20")["fence"], "--commit", second)
    with contextlib.suppress(subprocess.TimeoutExpired):
        other.wait(1.5)  # it must wait for the late one's git; where it does not, this is ample time for it
    (folder / "go").touch()
    late_code, code = (process.wait(30) for process in (late, other))
    wait_until((folder / "done").exists)
    assert (late_code, code) == (4 if when == "it lives" else -signal.SIGKILL, 0)
    assert [git(farm.repo, "rev-parse", "refs/farm/ready/t-0001"), farm.json("queue")[0]["commit"]] == [second, second]


@pytest.mark.parametrize("flag", ["--branch=nothing", "--commit=--help", "--branch=", "--commit=HEAD:README.md"])
def test_submit_of_what_is_no_commit_exits_3(farm, flag):
    farm.ok("add", "a")
    farm.refused(3, "submit", A, "--fence", farm.claim(A)["fence"], flag)


def test_a_refused_submit_keeps_the_claim(farm):
    farm.ok("add", "a")
    farm("submit", A, "--fence", farm.claim(A)["fence"], "--branch", "nothing")
    assert farm.task("t-0001")["state"] == "claimed"


def test_submit_without_a_commit_of_its_own_is_rejected(farm):
    farm.ok("add", "a")
    base = git(farm.repo, "rev-parse", "HEAD")
    git(farm.repo, "branch", f"farm/{A}/t-0001")
    farm.refused(5, "submit", A, "--fence", farm.claim(A)["fence"], env={"FARM_BASE": base})


# ---------------------------------------------------------------------------------------------- cancel, retry


def test_cancel_takes_a_task_out(farm):
    farm.ok("add", "a")
    farm.ok("cancel", "t-0001")
    farm.refused(3, "claim", A, "--owner-pid", str(farm.owner))


def test_cancel_takes_submitted_work_out_of_the_merge_queue(farm):
    farm.ok("add", "a")
    farm.submit(A, {"a.txt": "a"})
    farm.ok("cancel", "t-0001")
    assert farm.json("queue") == []


def test_cancel_twice_changes_nothing(farm):
    farm.ok("add", "a")
    farm.ok("cancel", "t-0001")
    before = bytes_below(farm.folder)
    farm.ok("cancel", "t-0001")
    assert bytes_below(farm.folder) == before


@pytest.mark.parametrize("verb", ["cancel", "retry"])
def test_cancel_and_retry_of_no_task_exit_3(farm, verb):
    farm.refused(3, verb, "t-0009")


@pytest.mark.parametrize("verb", ["cancel", "retry"])
def test_cancel_and_retry_without_an_id_are_usage_errors(farm, verb):
    farm.refused(2, verb)


@pytest.mark.parametrize("verb", ["cancel", "retry"])
def test_cancel_and_retry_of_a_held_task_are_refused(farm, verb):
    farm.ok("add", "a")
    farm.claim(A)
    farm.refused(4, verb, "t-0001")


@pytest.mark.parametrize("verb", ["cancel", "retry"])
def test_cancel_and_retry_of_a_landed_task_are_refused(farm, verb):
    farm.ok("add", "a")
    farm.submit(A, {"a.txt": "a"})
    farm.ok("merge")
    farm.refused(4, verb, "t-0001")


def test_a_canceled_task_can_be_retried(farm):
    farm.ok("add", "a")
    farm.ok("cancel", "t-0001")
    farm.ok("retry", "t-0001")
    assert farm.claim(A)["task"]["id"] == "t-0001"


def test_retry_gives_a_failed_task_all_its_attempts_again(farm):
    farm.ok("add", "a", "--max-attempts", "1")
    farm.ok("fail", A, "--fence", farm.claim(A)["fence"], "--why", "no")
    farm.ok("retry", "t-0001")
    task = farm.task("t-0001")
    assert (task["state"], task["max_attempts"] - task["attempts"]) == ("pending", 3)


def test_retry_ends_a_backoff(farm):
    farm.ok("add", "a", "--max-attempts", "9")
    for _ in range(2):
        farm.ok("fail", A, "--fence", farm.claim(A, "--wait", "20")["fence"], "--why", "no")
    farm.ok("retry", "t-0001")
    assert farm.claim(B)["task"]["id"] == "t-0001"


# ---------------------------------------------------------------------------------------------- queue, merge


def test_a_queue_record_has_the_keys_of_the_contract(farm):
    farm.ok("add", "a")
    farm.submit(A, {"a.txt": "a"})
    assert set(HEADS["queue"].split()) <= farm.json("queue")[0].keys()


def test_the_queue_of_a_new_repo_is_an_empty_list(farm):
    assert farm.json("queue") == []


def test_merge_of_nothing_exits_0(farm):
    assert farm.ok("merge") == ""


def test_merge_without_a_gate_says_that_nothing_was_tested(farm):
    assert "nothing was tested" in farm("merge").stderr


def test_merge_with_a_gate_does_not_say_that_nothing_was_tested(farm):
    assert "nothing was tested" not in farm("merge", "--gate", "true").stderr


def test_merge_lands_what_is_ready(farm):
    farm.ok("add", "a")
    farm.submit(A, {"a.txt": "text"})
    farm.ok("merge", "--gate", "test -e a.txt")
    assert git(farm.repo, "show", "main:a.txt") == "text"


def test_a_landed_task_names_its_commit(farm):
    farm.ok("add", "a")
    farm.submit(A, {"a.txt": "text"})
    farm.ok("merge")
    assert farm.task("t-0001")["landed_commit"] == git(farm.repo, "rev-parse", "main")


def test_merge_exits_5_when_the_gate_is_red(farm):
    farm.ok("add", "a")
    farm.submit(A, {"bad.txt": "text"})
    assert farm("merge", "--gate", "! test -e bad.txt").returncode == 5


def test_work_with_a_red_gate_goes_back_with_the_reason(farm):
    farm.ok("add", "a")
    farm.submit(A, {"bad.txt": "text"})
    farm("merge", "--gate", "! test -e bad.txt")
    task = farm.task("t-0001")
    assert (task["attempts"], "! test -e bad.txt" in task["reason"]) == (1, True)


def test_merge_exits_5_when_work_conflicts(farm):
    farm.ok("add", "a")
    farm.submit(A, {"README.md": "theirs\n"})
    commit_files(farm.repo, {"README.md": "ours\n"})
    assert farm("merge").returncode == 5


def test_work_that_conflicts_goes_back_and_names_the_file(farm):
    farm.ok("add", "a")
    farm.submit(A, {"README.md": "theirs\n"})
    commit_files(farm.repo, {"README.md": "ours\n"})
    farm("merge")
    assert "README.md" in farm.task("t-0001")["reason"]


def test_merge_json_says_what_landed_and_what_came_back(farm):
    farm.ok("add", "-f", "-", input="good\nbad\n")
    farm.submit(A, {"good.txt": "text"})
    farm.submit(B, {"bad.txt": "text"})
    told = json.loads(farm("merge", "--json", "--gate", "! test -e bad.txt").stdout)
    assert (told["landed"], [item["id"] for item in told["returned"]]) == (["t-0001"], ["t-0002"])


def test_merge_with_a_red_target_exits_5_and_keeps_its_entries(farm):
    farm.ok("add", "a")
    farm.submit(A, {"a.txt": "text"})
    assert farm("merge", "--gate", "false").returncode == 5
    assert [entry["id"] for entry in farm.json("queue")] == ["t-0001"]


def test_merge_with_a_file_in_the_way_exits_5_and_keeps_its_entries(farm):
    farm.ok("add", "a")
    farm.submit(A, {"a.txt": "text"})
    (farm.repo / "a.txt").write_text("mine")
    assert farm("merge").returncode == 5
    assert [entry["id"] for entry in farm.json("queue")] == ["t-0001"]


def test_merge_names_the_file_that_is_in_the_way(farm):
    farm.ok("add", "a")
    farm.submit(A, {"a.txt": "text"})
    (farm.repo / "a.txt").write_text("mine")
    assert "a.txt" in farm("merge").stderr


def test_merge_into_a_branch_that_is_not_there_lists_those_that_are(farm):
    assert "main" in farm.refused(3, "merge", "--into", "develop")


def test_merge_into_another_branch_moves_that_one(farm):
    git(farm.repo, "branch", "develop")
    farm.ok("add", "a")
    farm.submit(A, {"a.txt": "text"})
    farm.ok("merge", "--into", "develop")
    assert git(farm.repo, "show", "develop:a.txt") == "text"


def test_merge_lands_the_highest_priority_first(farm):
    farm.ok("add", "low")
    farm.ok("add", "high", "--priority", "5")
    farm.submit(A, {"a.txt": "a"}, "--id", "t-0001")
    farm.submit(B, {"b.txt": "b"}, "--id", "t-0002")
    farm.ok("merge")
    landed = git(farm.repo, "log", "--reverse", "--first-parent", "--format=%(trailers:key=Farm-Task,valueonly)", "main").split()
    assert landed == ["t-0002", "t-0001"]


def test_merge_again_lands_nothing_twice(farm):
    farm.ok("add", "a")
    farm.submit(A, {"a.txt": "a"})
    farm.ok("merge")
    before = git(farm.repo, "rev-parse", "main")
    farm.ok("merge")
    assert git(farm.repo, "rev-parse", "main") == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_merge_with_watch_lands_what_comes_later_until_a_signal_ends_it(farm, number, code):
    watching = farm.start("merge", "--watch", "--gate", "true")
    farm.ok("add", "a")
    farm.submit(A, {"a.txt": "a"})
    wait_until(lambda: farm.task("t-0001")["state"] == "landed", timeout=60, message="the landing")
    watching.send_signal(number)
    watching.communicate(timeout=60)
    assert watching.returncode == code


def test_status_with_watch_goes_on_until_a_signal_ends_it(farm):
    farm.ok("add", "a")
    watching = farm.start("status", "--watch")
    first = watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    watching.communicate(timeout=60)
    assert (bool(first), watching.returncode) == (True, 130)


# ---------------------------------------------------------------------------------------------- what is printed


def with_control_characters(text: str) -> list[str]:
    """The lines that hold one, newlines and the tabs between fields left out."""
    return [line for line in text.replace("\t", " ").split("\n") if CONTROL_CHARACTERS.search(line)]


@pytest.mark.parametrize("verb", ["tasks", "queue", "locks", "status", "claim", "merge"])
def test_no_control_character_is_ever_printed(farm, verb):
    farm.ok("add", UGLY, "--prompt", UGLY)
    farm.ok("add", "b " + UGLY, "--path", UGLY)
    farm.submit(A, {"a.txt": "a"})
    farm.lock(C, UGLY, check=True)
    for options in [[B, "--owner-pid", str(farm.owner)]] if verb == "claim" else [["--json"], []]:
        done = farm(verb, *options)
        assert (done.returncode, with_control_characters(done.stdout + done.stderr)) == (0, [])


def test_json_keeps_text_exactly(farm):
    farm.ok("add", UGLY)
    assert farm.task("t-0001")["title"] == UGLY.strip()


def test_an_error_prints_no_control_character(farm):
    farm.lock(A, UGLY, check=True)
    assert with_control_characters(farm.lock(B, UGLY).stderr) == []


@pytest.mark.parametrize("verb", ["tasks", "queue", "locks", "merge", "status", "doctor"])
def test_json_is_one_document(farm, verb):
    farm.ok("add", "a")
    json.loads(farm(verb, "--json").stdout)


def test_a_verb_that_is_not_there_is_a_usage_error_that_names_the_near_one(farm):
    assert "status" in farm.refused(2, "statsu")


def test_an_option_that_is_not_there_is_a_usage_error(farm):
    farm.refused(2, "tasks", "--colour")


def test_an_option_without_its_value_is_a_usage_error(farm):
    farm.refused(2, "add", "Fix", "--prompt")


def test_no_verb_prints_the_usage(sandbox):
    done = run([SHIM], cwd=sandbox.home)
    assert "usage" in (done.stdout + done.stderr).lower()


VERBS = (
    "add tasks claim renew release fail submit cancel retry lock unlock locks with-lock queue merge up run down clean status"
    " attach logs send rescue doctor report"
)


def test_every_verb_explains_itself(sandbox):
    silent = [verb for verb in VERBS.split() if verb not in run([SHIM, verb, "--help"], cwd=sandbox.home).stdout]
    assert silent == []


def test_farm_py_can_be_run_as_a_program(farm):
    assert run([FARM, "--repo", farm.repo, "add", "Fix"], check=True).stdout == "t-0001\n"


def test_a_reader_that_goes_away_is_no_error(farm):
    farm.ok("add", "-f", "-", input="".join(f"task {number} {'x' * 200}\n" for number in range(500)))
    done = run(["bash", "-o", "pipefail", "-c", '"$@" | head -n 1', "bash", *farm.argv("tasks")])
    assert (done.returncode in (0, 141), done.stderr) == (True, "")


# ---------------------------------------------------------------------------------------------- settings


SOURCES = ("default", "last up", "farm.env", "environment", "flag")


@pytest.mark.parametrize("highest", range(len(SOURCES)), ids=SOURCES)
def test_the_nearest_setting_counts(farm, highest):
    """max_attempts stands for all: it is set in every source up to `highest`, to that source's number."""
    farm.ok("add", "makes the folders")
    remembered = {"schema": 1, "mode": "down", "settings": {"max_attempts": 11}}
    if highest >= 1:
        (farm.folder / "farm.json").write_text(json.dumps(remembered))
    if highest >= 2:
        (farm.repo / "farm.env").write_text("# settings\n\nFARM_MAX_ATTEMPTS='12'\n")
    env = {"FARM_MAX_ATTEMPTS": "13"} if highest >= 3 else {}
    flag = ["--max-attempts", "14"] if highest >= 4 else []
    farm.ok("add", "a", *flag, env=env)
    assert farm.task("t-0002")["max_attempts"] == [3, 11, 12, 13, 14][highest]


def test_an_empty_variable_counts_as_not_set(farm):
    farm.ok("add", "a", env={"FARM_MAX_ATTEMPTS": ""})
    assert farm.task("t-0001")["max_attempts"] == 3


def test_a_setting_that_is_no_number_says_where_it_comes_from(farm):
    (farm.repo / "farm.env").write_text("FARM_MAX_ATTEMPTS=many\n")
    assert "farm.env" in farm.refused(2, "add", "a")


def test_a_line_of_farm_env_that_is_no_setting_is_named(farm):
    (farm.repo / "farm.env").write_text("FARM_N=2\nnonsense\n")
    assert "line 2" in farm.refused(2, "add", "a")


@pytest.mark.parametrize("line", ["FARM_GATE=test ! -e b.txt", "export FARM_GATE='test ! -e b.txt'"])
def test_the_gate_of_farm_env_decides(farm, line):
    (farm.repo / "farm.env").write_text(line + "\n")
    farm.ok("add", "a")
    farm.submit(A, {"b.txt": "b"})
    farm("merge")
    assert "test ! -e b.txt" in farm.task("t-0001")["reason"]


