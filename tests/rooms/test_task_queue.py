"""The verbs add, tasks, cancel and retry: output, exit codes, JSON."""

from __future__ import annotations

import json

import pytest
from farm_calls import HEADS, SHIM, A, B, bytes_below
from sandbox import git, run

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
