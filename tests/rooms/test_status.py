"""What `status` shows, on a terminal, in a pipe and as JSON."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import sys
import time

import pytest
from farm_calls import UGLY, A, B
from paths import SCRIPTS
from sandbox import find_processes, git, run, wait_until
from screens import agents_of, record, up

import farm as toolkit

pytestmark = pytest.mark.usefixtures("farm_cleanup")  # farms are left running at the end of a test
HEADS = ["AGENT", "STATE", "FOR", "TASK", "LINES", "COMMITS", "CPU", "MEM", "OUTPUT"]


def show(capsys, monkeypatch, agents: list, columns: int = 0, **fields) -> list[str]:
    """The lines that print_status makes of a status; columns: on a terminal so wide."""
    state = toolkit.State()
    status = {"agents": agents, "tasks": {"claimed": 1}, "merge_queue": {}, "queue_line": "landed 0", "trouble": [], "mode": "",
              "reason": "", "loop": {"pid": 7, "alive": True}, **fields}
    status.setdefault("spent", {"tokens_in": 0, "tokens_out": 0, "cost_usd": 0.0})
    status["next"] = [{"what": what, "try": hint} for what, hint in toolkit.next_steps(status, [], state)]
    if columns:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(columns))
    toolkit.print_status(status)
    return capsys.readouterr().out.splitlines()


def test_times_within_texts_are_the_readers_on_a_terminal_and_utc_in_a_pipe(farm, screen, capsys, monkeypatch):
    why = "claude: usage limit until 2026-03-01T22:30:00Z (5-hour limit)"
    monkeypatch.setattr(toolkit.CLOCK, "now", lambda: toolkit.epoch("2026-03-01T20:00:00Z"))
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    assert why in show(capsys, monkeypatch, [record(A, "limited", cause=why)])[0]
    shown = show(capsys, monkeypatch, [record(A, "limited", cause=why)], 150)
    monkeypatch.undo()
    time.tzset()
    assert "until 07:30 (" in shown[1] and "until 07:30 (" in shown[-1]


def test_the_table_of_locks_has_the_readers_times(farm, screen):
    farm.lock(A, "schema")
    one = screen("locks", env={**os.environ, "TZ": "Asia/Tokyo"})
    one.end()
    assert re.search(r"schema +\d+ +alive +\d\d:\d\d\r\n", one.read())


def test_those_who_need_a_person_come_first_and_unknown_states_last(capsys, monkeypatch):
    states = ["unheard-of", "stopped", "idle", "working", "starting", "limited", "dead", "parked", "stuck", "waiting"]
    agents = [record(f"agent-{number:03d}", state) for number, state in enumerate(states, 1)]
    shown = [line.split("\t")[1] for line in show(capsys, monkeypatch, agents) if "\t" in line]
    assert shown == ["waiting", "stuck", "parked", "dead", "limited", "starting", "working", "idle", "stopped", "unheard-of"]


NEXT = {"waiting": "attach 2", "stuck": "attach 2", "parked": "logs 2", "dead": "logs 2"}


@pytest.mark.parametrize(("state", "command"), NEXT.items())
def test_each_trouble_has_the_command_to_type_next(capsys, monkeypatch, state, command):
    lines = show(capsys, monkeypatch, [record(A), record(B, state, message="May I?")])
    assert [line for line in lines if line.startswith(f"next: ./farm.py {command}")] and "agent-002" in lines[-1]


def test_what_it_has_cost_is_a_line_where_it_is_known(farm, capsys, monkeypatch):
    assert "cost:" not in answers(farm)
    spent = {"tokens_in": 3_000_000, "tokens_out": 200_000, "cost_usd": 12.5}
    assert "cost: $12.50, 3.2M tokens" in show(capsys, monkeypatch, [], spent=spent)
    farm.ok("add", "a task")
    claim = farm.claim(A)
    line = {"at": "2026-03-01T10:00:00Z", "task": "t-0001", "agent": A, "fence": claim["fence"], "tokens_in": 5, "tokens_out": 5}
    (farm.folder / "usage.jsonl").write_text(json.dumps({**line, "cost_usd": 0.5}) + "\nnonsense\n")
    assert agents_of(farm)[A]["cost_usd"] == 0.5 and "cost: $0.50, 10 tokens" in answers(farm)


def test_what_comes_next_is_a_line_that_a_shell_takes(capsys, monkeypatch):
    line = show(capsys, monkeypatch, [record(B, "waiting", message="it's $(touch x) `y`")])[-1]
    assert run(["bash", "-n", "-c", line.removeprefix("next: ")]).returncode == 0 and " # agent-002 waits" in line


def test_a_long_list_of_troubles_is_cut_and_says_so(capsys, monkeypatch):
    lines = show(capsys, monkeypatch, [record(f"agent-{number:03d}", "parked") for number in range(1, 31)])
    assert len([line for line in lines if line.startswith("next:")]) == 6 and lines[-1].endswith("25 more")


BUSY = [record(A, "working", task="t-0001", since="2026-03-01T10:00:00Z", last_output_at="2026-03-01T10:00:00Z", commits=12,
               changed_lines=1234, cost_usd=12.5, rss_bytes=900 << 20, cpu_percent=101.0, title="a title of some length " * 5),
        record(B, "waiting", task="t-0002", title="\u65e5\u672c\u8a9e\u306e\u984c\u540d" * 9)]


@pytest.mark.parametrize("columns", [40, 60, 80, 81, 100, 132, 200])
def test_no_line_is_wider_than_the_terminal(capsys, monkeypatch, columns):
    lines = show(capsys, monkeypatch, BUSY, columns)
    assert max(map(toolkit.text_width, lines)) <= columns


def test_eighty_columns_have_room_for_what_matters(capsys, monkeypatch):
    head = show(capsys, monkeypatch, BUSY, 80)[0].split()
    assert head[:9] == HEADS


def test_a_wider_terminal_shows_more(capsys, monkeypatch):
    lines = show(capsys, monkeypatch, BUSY, 132)
    assert lines[0].split() == [*HEADS, "COST", "NOTE"] and "a title of" in lines[2] and "$12.50" in lines[2]


def test_a_narrow_terminal_keeps_agent_state_and_task(capsys, monkeypatch):
    assert show(capsys, monkeypatch, BUSY, 40)[0].split()[:4] == HEADS[:4]


def test_in_a_pipe_every_column_is_there_between_tabs(capsys, monkeypatch):
    assert [len(line.split("\t")) for line in show(capsys, monkeypatch, BUSY)[:2]] == [11, 11]


def test_status_counts_changed_lines_and_commits(farm):
    farm.ok("add", "a task")
    agent = "printf 'a\\nb\\n' >x && git add x && git commit -qm x && printf 'c\\n' >>x && sleep 1000"
    up(farm, 1, agent)
    wait_until(lambda: (agents_of(farm)[A]["commits"], agents_of(farm)[A]["changed_lines"]) == (1, 3), 40, "1 commit, 3 lines")
    farm.ok("down", "--now", timeout=120)


def test_looking_at_work_takes_no_lock_of_git_and_writes_nothing(farm, monkeypatch):
    os.utime(farm.repo / "README.md")  # git would write the index anew for this
    index = (farm.repo / ".git" / "index").read_bytes()
    rows = f"a\tmain\t{farm.repo}\nb\tnone\t{farm.repo}/none\n"
    done = run([SCRIPTS / "merge/look.sh", "work", "-C", farm.repo, "-b", "main"], input=rows)
    assert (done.returncode, done.stdout, done.stderr) == (0, "a\t0\t0\n", "")
    assert (farm.repo / ".git" / "index").read_bytes() == index


@pytest.mark.parametrize("name", ["merge/look.sh", "overview-tmux.sh", "note-tmux.sh", "attach-tmux.sh"])
def test_a_scripts_header_is_its_help_and_bad_options_are_usage_errors(name, sandbox):
    shown = run([SCRIPTS / name, "-h"], check=True).stdout
    assert shown.startswith(f"Usage: {os.path.basename(name)}") and "Exit: 0 " in shown
    assert run([SCRIPTS / name, "-z"]).returncode == 2
    empty = sandbox.root / "empty"
    empty.mkdir()
    words = {"merge/look.sh": ["work", "-b", "main"], "overview-tmux.sh": ["-L", "x"]}.get(name, ["-L", "x", "y"])
    assert run(["/bin/bash", SCRIPTS / name, *words], env={"PATH": str(empty)}).returncode == 6


@pytest.fixture
def broken_git(sandbox, monkeypatch) -> None:
    """A git that never answers."""
    folder = sandbox.root / "slow"
    folder.mkdir()
    (folder / "git").write_text("#!/bin/sh\nexec sleep 7654321\n")
    (folder / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_git_that_does_not_answer_leaves_a_dash_and_no_process(farm, broken_git, sandbox):
    toolkit.Store(str(farm.repo)).ensure_folders()
    (farm.folder / "farm.json").write_text(json.dumps({"mode": "down", "settings": {"into": "main"}}))
    farm.ok("add", "a task")
    farm.claim(A)
    assert agents_of(farm)[A]["commits"] is None
    assert [process for process in find_processes(sandbox.token) if "7654321" in process.cmdline()] == []


def test_where_git_takes_its_time_what_the_loop_has_counted_is_shown(farm, broken_git):
    farm.ok("add", "a task"), farm.ok("add", "another")
    farm.claim(A), farm.claim(B)
    work = {f"{A}/t-0001": [2, 30], f"{B}/t-0009": [5, 50], "x": "y"}
    (farm.folder / "loop.json").write_text(json.dumps({"schema": 1, "work": work}))
    counts = {name: (agent["commits"], agent["changed_lines"]) for name, agent in agents_of(farm).items()}
    assert counts == {A: (2, 30), B: (None, None)}, "what was counted for another task is not this one's"


@pytest.mark.parametrize("text", ['{"work": 3}', '{"work": {"agent-001/t-0001": [1, "x"]}}'])
def test_nonsense_in_what_the_loop_has_counted_is_passed_over(farm, broken_git, text):
    farm.ok("add", "a task")
    farm.claim(A)
    (farm.folder / "loop.json").write_text(text)
    assert agents_of(farm)[A]["commits"] is None and answers(farm)


def test_the_loop_counts_work_now_and_then(farm):
    farm.ok("add", "a task")
    up(farm, 1, "echo a >x && git add x && git commit -qm x && sleep 1000")
    wait_until(lambda: (farm.folder / "loop.json").exists() and '"agent-001/t-0001": [1, 1]' in (
        farm.folder / "loop.json").read_text(), 60, "its count")
    farm.ok("down", "--now", timeout=120)


# -- a farm in any state


def answers(farm, *args: str, **options) -> str:
    """What status prints; it may take its time on a busy machine, and must not wait for anybody."""
    done = farm("status", *args, timeout=60, **options)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_status_of_a_repo_without_a_farm_says_how_to_begin(farm):
    assert "next: ./farm.py add" in answers(farm)
    assert not farm.folder.exists()


def test_status_of_a_farm_that_does_not_run_names_up(farm):
    farm.ok("add", "a task")
    assert "next: ./farm.py up" in answers(farm)


def test_status_answers_while_another_verb_holds_the_mutex(farm):
    farm.ok("add", "a task")
    with open(farm.folder / ".lock", "r+b") as mutex:
        fcntl.flock(mutex, fcntl.LOCK_EX)
        assert "pending 1" in answers(farm)


def test_status_answers_while_tmux_hangs(farm):
    up(farm, 1, "sleep 1000")
    pid = int(run(["tmux", "-L", toolkit.farm_socket(str(farm.repo)), "display-message", "-p", "#{pid}"], check=True).stdout)
    os.kill(pid, signal.SIGSTOP)
    try:
        done = farm("status", timeout=60)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert (done.returncode, "probe-tmux.sh took longer" in done.stdout) == (1, True)
    farm.ok("down", "--now", timeout=120)


def test_status_without_tmux_shows_the_tasks_and_exits_6(farm, sandbox):
    farm.ok("add", "a task")
    folder = sandbox.root / "few"
    folder.mkdir()
    for name in ("bash", "git", "env"):
        os.symlink(run(["which", name], check=True).stdout.strip(), folder / name)
    done = farm("status", env={"PATH": str(folder)})
    assert (done.returncode, "pending 1" in done.stdout, "tmux is missing" in done.stdout) == (6, True, True)


@pytest.mark.parametrize("count", [0, 200])
def test_status_of_any_number_of_agents_is_an_answer(farm, count):
    store = toolkit.Store(str(farm.repo))
    store.ensure_folders()
    owner = toolkit.identify(os.getpid())
    with store.transaction() as tx:
        toolkit.TaskQueue(tx).add([toolkit.Task(title=f"task {number}") for number in range(count)], 3)
    for number in range(count):
        with store.transaction() as tx:
            toolkit.TaskQueue(tx).claim(f"agent-{number + 1:03d}", owner)
    assert len([line for line in answers(farm).splitlines() if "\t" in line]) == count


def test_no_control_character_of_an_agent_a_title_or_a_branch_reaches_the_terminal(farm, screen):
    farm.ok("add", UGLY + " \u202ebackwards", "--prompt", "p")
    branch = "farm/x/\x9b2J\u202e"
    git(farm.repo, "branch", branch)
    claim = farm.claim(A)
    farm.ok("fail", A, "--fence", claim["fence"], "--why", UGLY, "--no-retry")
    farm.ok("add", UGLY + "two")
    farm.claim(B)
    (farm.folder / "farm.json").write_text(json.dumps({"mode": UGLY, "reason": UGLY, "settings": {"into": branch}}))
    for words in (["status"], ["tasks"], ["queue"], ["locks"]):
        one = screen(*words, columns=300)
        one.end()
        assert re.findall("[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]|\r(?!\n)", one.read()) == [], words


def test_times_are_utc_in_json_and_short_in_the_table(farm):
    farm.ok("add", "a task")
    farm.claim(A)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", agents_of(farm)[A]["since"])
    assert re.fullmatch(r"\d+s", answers(farm).split("\t")[2])
