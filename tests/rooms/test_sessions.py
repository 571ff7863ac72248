"""The verbs of sessions, on real tmux: up, status, send, logs, down, clean, and those that look after the farm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from farm_calls import A, B, Caller
from paths import ROOT
from sandbox import git, run, wait_until
from screens import agents_of

# ------------------------------------------------------------ sessions: up, status, send, logs, attach, down, clean


@pytest.fixture
def ready(farm, farm_cleanup) -> Caller:
    """A farm whose leftovers are ended without failing the test."""
    return farm


def wait_for_agents(farm, *names: str) -> dict:
    """Until exactly `names` have a live session; returns their records."""

    def all_live():
        records = agents_of(farm)
        live = {name for name, record in records.items() if record["pid"] and record["state"] in ("working", "idle")}
        return records if live == set(names) else None

    return wait_until(all_live, message=f"sessions of {names}")


def up(farm, *args: str, **options) -> None:
    farm.ok("up", *args, timeout=120, **options)


def test_up_starts_as_many_agents_as_it_is_told(ready):
    up(ready, "-n", "2", "--agent", "true")
    wait_for_agents(ready, A, B)


def test_up_twice_doubles_nothing(ready):
    up(ready, "-n", "2", "--agent", "true")
    before = {name: record["pid"] for name, record in wait_for_agents(ready, A, B).items()}
    up(ready, "-n", "2", "--agent", "true")
    assert {name: record["pid"] for name, record in wait_for_agents(ready, A, B).items()} == before


def test_a_status_record_has_the_keys_of_the_contract(ready):
    up(ready, "-n", "1", "--agent", "true")
    wait_for_agents(ready, A)
    wait_until(lambda: ready.json("status")["loop"]["alive"], message="the loop")
    status = ready.json("status")
    wanted = "agent state task pid rss_bytes cpu_percent since worktree branch last_output_at cause"
    assert set(wanted.split()) <= status["agents"][0].keys()
    assert {"agents", "tasks", "merge_queue", "loop"} <= status.keys()
    assert {"pid", "alive"} <= status["loop"].keys()


@pytest.mark.parametrize("stronger", ["farm.env", "environment"])
def test_the_loop_of_up_keeps_to_the_flags_that_up_was_given(ready, stronger):
    if stronger == "farm.env":
        (ready.repo / "farm.env").write_text("FARM_N=2\n")
    up(ready, "-n", "1", "--agent", "true", env={"FARM_N": "2"} if stronger == "environment" else {})
    wait_until((ready.folder / "loop.json").exists, message="the loop's first look")
    told = json.loads((ready.folder / "loop.json").read_text())
    assert list(told["agents"]) == [A]


def test_work_goes_all_the_way_by_up_alone(ready):
    ready.ok("add", "Write a file", "--prompt", "text for the file")
    up(ready, "-n", "1", "--agent", 'cp "$FARM_PROMPT_FILE" work.txt', "--gate", "test -s work.txt")
    wait_until(lambda: ready.task("t-0001")["state"] == "landed", timeout=60, message="the landing")
    assert "text for the file" in git(ready.repo, "show", "main:work.txt")


def test_the_agents_command_finds_its_environment(ready):
    ready.ok("add", "Write a file")
    names = "FARM_AGENT_NAME FARM_TASK FARM_FENCE FARM_PROMPT_FILE FARM_REPO FARM_HOME FARM_PORT TMPDIR"
    up(ready, "-n", "1", "--agent", f'for name in {names}; do printf "%s=%s\\n" "$name" "${{!name}}"; done >env.txt')
    wait_until(lambda: ready.task("t-0001")["state"] == "landed", timeout=60, message="the landing")
    told = dict(line.split("=", 1) for line in git(ready.repo, "show", "main:env.txt").splitlines())
    assert all(told.values()) and list(told) == names.split()
    assert (told["FARM_AGENT_NAME"], told["FARM_TASK"], told["FARM_REPO"]) == (A, "t-0001", str(ready.repo))


def test_down_ends_every_session_and_the_loop(ready):
    up(ready, "-n", "2", "--agent", "true")
    wait_for_agents(ready, A, B)
    ready.ok("down", timeout=120)
    status = ready.json("status")
    assert (status["loop"]["alive"], [agent["pid"] for agent in status["agents"] if agent["pid"]]) == (False, [])


def test_down_twice_exits_0(ready):
    up(ready, "-n", "1", "--agent", "true")
    ready.ok("down", timeout=120)
    ready.ok("down", timeout=120)


def test_down_now_ends_an_agent_at_work_and_gives_its_task_back_unharmed(ready):
    ready.ok("add", "Long")
    up(ready, "-n", "1", "--agent", "sleep 600")
    wait_until(lambda: ready.task("t-0001")["state"] == "claimed", timeout=60, message="the claim")
    ready.ok("down", "--now", timeout=120)
    task = ready.task("t-0001")
    assert (task["state"], task["attempts"]) == ("pending", 0)


def test_down_now_keeps_unsaved_work(ready):
    ready.ok("add", "Long")
    up(ready, "-n", "1", "--agent", "echo precious >unsaved.txt; sleep 600")
    unsaved = Path(f"{ready.repo}-farm/{A}-worktree/unsaved.txt")
    wait_until(lambda: unsaved.exists() and unsaved.read_text(), timeout=60, message="the agent's work")
    ready.ok("down", "--now", timeout=120)
    ref = ready.ok("rescue", "list").splitlines()[0].split("\t")[0]
    assert git(ready.repo, "show", f"{ref}:unsaved.txt") == "precious"


def test_clean_is_refused_while_agents_run(ready):
    up(ready, "-n", "1", "--agent", "true")
    wait_for_agents(ready, A)
    ready.refused(4, "clean")


def test_clean_after_down_removes_the_worktrees_and_what_agents_have_left_in_their_tmpdir(ready):
    up(ready, "-n", "1", "--agent", "true")
    left = ready.repo.parent / f"{ready.repo.name}-farm/tmp" / A
    wait_until(left.is_dir, message="its TMPDIR")
    (left / "left").mkdir()
    ready.ok("down", timeout=120)
    ready.ok("clean")
    assert [line for line in git(ready.repo, "worktree", "list").splitlines() if "agent-" in line] == []
    assert not left.exists()


def test_clean_keeps_a_branch_that_has_not_landed(ready):
    ready.ok("add", "a")
    ready.submit(A, {"a.txt": "a"})
    up(ready, "-n", "1", "--agent", "true", "--gate", "sleep 600")
    ready.ok("down", "--now", timeout=120)
    ready("clean")
    assert git(ready.repo, "show", "refs/farm/ready/t-0001:a.txt") == "a"


def test_logs_prints_what_the_agent_printed(ready):
    ready.ok("add", "Speak")
    up(ready, "-n", "1", "--agent", "echo hello from the agent; printf '\\033[31mred\\033[0m\\n'")
    wait_until(lambda: "hello from the agent" in ready("logs", "1").stdout, timeout=60, message="the log")
    assert "\x1b" not in ready.ok("logs", A)


def test_logs_of_an_agent_without_any_exits_3(farm):
    farm.refused(3, "logs", "agent-099")


@pytest.mark.parametrize(("verb", "args"), [("attach", ["agent-099"]), ("send", ["agent-099", "hello"])])
def test_attach_and_send_to_an_agent_that_does_not_run_exit_3(farm, verb, args):
    farm.refused(3, verb, *args)


@pytest.mark.parametrize(("verb", "args"), [("attach", []), ("logs", []), ("send", []), ("send", [A]), ("attach", ["a/b"])])
def test_attach_logs_and_send_without_their_arguments_are_usage_errors(farm, verb, args):
    farm.refused(2, verb, *args)


def test_send_types_a_text_that_the_agents_command_reads(ready):
    ready.ok("add", "Listen")
    up(ready, "-n", "1", "--agent", 'read -r line; printf "%s" "$line" >heard.txt')
    wait_until(lambda: ready.task("t-0001")["state"] == "claimed", timeout=60, message="the claim")
    log = ready.folder / "logs" / f"{A}.log"
    wait_until(lambda: log.exists() and "works on" in log.read_text(), timeout=60, message="the agent at its prompt")
    ready.ok("send", A, "it's \"so\"; $HOME #{pane_id} -n")
    wait_until(lambda: ready.task("t-0001")["state"] == "landed", timeout=60, message="the landing")
    assert git(ready.repo, "show", "main:heard.txt") == "it's \"so\"; $HOME #{pane_id} -n"


def test_down_where_no_farm_was_started_says_so(farm):
    done = farm("down")
    assert done.returncode in (0, 3)


# ---------------------------------------------------------------------------------------------- rescue, doctor, report


def test_rescue_list_of_nothing_prints_nothing(farm):
    assert farm.ok("rescue", "list") == ""


def save_unsaved_work(farm) -> str:
    """A rescue ref of a worktree with an edit; it is left as it was."""
    worktree = farm.repo.parent / "wt"
    git(farm.repo, "worktree", "add", "-q", "--detach", worktree)
    (worktree / "new file.txt").write_text("precious")
    done = run(["bash", ROOT / "scripts" / "rescue.sh", "save", "-C", farm.repo, "-a", A, worktree], check=True)
    return done.stdout.split("\t")[0]


def test_rescue_list_names_what_was_kept(farm):
    ref = save_unsaved_work(farm)
    assert farm.ok("rescue", "list").split("\t")[0] == ref


def test_rescue_show_names_the_files(farm):
    assert "new file.txt" in farm.ok("rescue", "show", save_unsaved_work(farm))


def test_rescue_restore_writes_the_files_into_a_folder(farm, sandbox):
    (sandbox.work / "out").mkdir()
    farm.ok("rescue", "restore", save_unsaved_work(farm), "--into", str(sandbox.work / "out"))
    assert (sandbox.work / "out" / "new file.txt").read_text() == "precious"


def test_rescue_restore_never_overwrites_a_file_that_differs(farm, sandbox):
    (sandbox.work / "out").mkdir()
    (sandbox.work / "out" / "new file.txt").write_text("mine")
    farm.refused(4, "rescue", "restore", save_unsaved_work(farm), "--into", str(sandbox.work / "out"))
    assert (sandbox.work / "out" / "new file.txt").read_text() == "mine"


@pytest.mark.parametrize("action", ["show", "restore"])
def test_rescue_of_no_such_ref_exits_3(farm, action):
    farm.refused(3, "rescue", action, f"refs/farm/rescue/{A}/20260101T000000Z")


@pytest.mark.parametrize("args", [["show"], ["restore"], ["burn"], ["list", "more"]])
def test_rescue_used_wrongly_is_a_usage_error(farm, args):
    farm.refused(2, "rescue", *args)


def test_doctor_of_a_sound_farm_exits_0(farm):
    farm.ok("add", "a")
    farm.ok("doctor")


def test_doctor_json_lists_problems_with_what_to_try(farm):
    farm.ok("add", "a")
    (farm.folder / "task_queue" / "pending.json").write_text("{")
    problems = json.loads(farm("doctor", "--json").stdout)
    assert any("pending.json" in json.dumps(problem) for problem in problems)


def test_report_writes_the_file_it_is_told(farm, sandbox):
    farm.ok("add", "A task to report")
    farm.submit(A, {"a.txt": "a"})
    farm.ok("merge")
    farm.ok("report", "-o", str(sandbox.work / "report.html"))
    assert "A task to report" in (sandbox.work / "report.html").read_text()
