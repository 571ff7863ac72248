"""To see and to steer: status and its live view, attach and the overview, logs, send, pause, estop, notify, completion."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, SCRIPTS, find_processes, git, run, wait_until
from farm_calls import FARM, UGLY, Caller, bytes_below, copy_repo

sys.path[:0] = [str(ROOT)]
import farm as toolkit  # noqa: E402  (needs the path above)

A, B, C = "agent-001", "agent-002", "agent-003"
HEADS = ["AGENT", "STATE", "FOR", "TASK", "LINES", "COMMITS", "CPU", "MEM", "OUTPUT"]


def take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Screen:
    """A command on a terminal of its own: what it writes, and keys for it."""

    def __init__(self, argv: list, columns: int = 80, lines: int = 24, **options):
        self.master, slave = pty.openpty()
        self.resize(columns, lines)
        self.before = termios.tcgetattr(slave)
        self.process = subprocess.Popen([str(word) for word in argv], stdin=slave, stdout=slave, stderr=slave,
                                        start_new_session=True, preexec_fn=take_terminal, **options)  # noqa: PLW1509  no threads here
        self.slave, self.text = slave, ""
        os.set_blocking(self.master, False)

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def read(self) -> str:
        """All that it has written by now."""
        try:
            while part := os.read(self.master, 65536):
                self.text += part.decode("utf-8", "replace")
        except (BlockingIOError, OSError):
            pass
        return self.text

    def wait_for(self, pattern: str, after: int = 0, timeout: float = 30) -> re.Match:
        return wait_until(lambda: re.search(pattern, self.read()[after:]), timeout, f"{pattern!r} on the screen")

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def detach(self) -> None:
        """Ctrl-b d, as slowly as a hand: what comes within a millisecond tmux takes for a paste, and hands it on."""
        self.type("\x02")
        time.sleep(0.05)
        self.type("d")

    def end(self, timeout: float = 30) -> int:
        """Its exit code, once it has ended by itself."""
        wait_until(lambda: self.read() is None or self.process.poll() is not None, timeout, "its end")
        self.read()
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def farm(sandbox, farm_cleanup) -> Caller:
    """A farm on a new repo of one commit; leftovers are ended without failing the test."""
    return Caller(copy_repo(sandbox.work / "repo"), os.getpid())


@pytest.fixture
def screen(farm):
    """A factory of Screens that run a verb of the farm."""
    opened = []

    def open_screen(*words: str, **options) -> Screen:
        opened.append(Screen([sys.executable, FARM, "--repo", farm.repo, *words], **options))
        return opened[-1]

    yield open_screen
    for one in opened:
        one.close()


def up(farm, count: int, agent: str, *args: str, **options) -> None:
    farm.ok("up", "-n", str(count), "--agent", agent, "--gate", "true", *args, timeout=120, **options)


def agents_of(farm) -> dict:
    return {agent["agent"]: agent for agent in json.loads(farm("status", "--json").stdout)["agents"]}


def wait_for_state(farm, agent: str, state: str) -> dict:
    return wait_until(lambda: (found := agents_of(farm).get(agent, {})).get("state") == state and found, 40, f"{agent} {state}")


def record(agent: str, state: str = "idle", **fields) -> dict:
    """An agent as `status --json` shows it."""
    return {"agent": agent, "state": state, "task": "", "pid": 1, "rss_bytes": 0, "cpu_percent": 0.0, "since": "", "worktree": "",
            "branch": "", "last_output_at": "", "cause": "", "title": "", "commits": None, "changed_lines": None,
            "cost_usd": 0.0, **fields}


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


# ---------------------------------------------------------------------------------------------- status


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
    done = run([SCRIPTS / "probe-work.sh", "-C", farm.repo, "-b", "main"], input=rows)
    assert (done.returncode, done.stdout, done.stderr) == (0, "a\t0\t0\n", "")
    assert (farm.repo / ".git" / "index").read_bytes() == index


@pytest.mark.parametrize("name", ["probe-work.sh", "overview-tmux.sh", "note-tmux.sh", "attach-tmux.sh"])
def test_a_scripts_header_is_its_help_and_bad_options_are_usage_errors(name, sandbox):
    shown = run([SCRIPTS / name, "-h"], check=True).stdout
    assert shown.startswith(f"Usage: {name}") and "Exit: 0 " in shown
    assert run([SCRIPTS / name, "-z"]).returncode == 2
    empty = sandbox.root / "empty"
    empty.mkdir()
    words = {"probe-work.sh": ["-b", "main"], "overview-tmux.sh": ["-L", "x"]}.get(name, ["-L", "x", "y"])
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
    (farm.folder / "work.json").write_text(json.dumps({"schema": 1, "work": work}))
    counts = {name: (agent["commits"], agent["changed_lines"]) for name, agent in agents_of(farm).items()}
    assert counts == {A: (2, 30), B: (None, None)}, "what was counted for another task is not this one's"


@pytest.mark.parametrize("text", ["{", "[]", '{"work": 3}', '{"work": {"agent-001/t-0001": [1, "x"]}}'])
def test_nonsense_in_what_the_loop_has_counted_is_passed_over(farm, broken_git, text):
    farm.ok("add", "a task")
    farm.claim(A)
    (farm.folder / "work.json").write_text(text)
    assert agents_of(farm)[A]["commits"] is None and answers(farm)


def test_the_loop_counts_work_now_and_then(farm):
    farm.ok("add", "a task")
    up(farm, 1, "echo a >x && git add x && git commit -qm x && sleep 1000")
    wait_until(lambda: (farm.folder / "work.json").exists() and '"agent-001/t-0001": [1, 1]' in (
        farm.folder / "work.json").read_text(), 60, "its count")
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


# ---------------------------------------------------------------------------------------------- status --watch

ENTER, LEAVE = "\x1b[?1049h", "\x1b[?25h\x1b[?1049l"


def watch(screen, **options) -> Screen:
    """A live status whose first frame is drawn."""
    one = screen("status", "--watch", **options)
    one.wait_for("q leave")
    return one


def is_restored(one: Screen) -> bool:
    return one.read().endswith(LEAVE) and termios.tcgetattr(one.slave) == one.before


def frames(text: str) -> list[list[str]]:
    """The frames that were drawn, each a list of lines without escape codes."""
    return [re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "", frame).split("\r\n") for frame in text.split("\x1b[H")[1:]]


def test_watch_draws_on_another_screen_and_q_leaves_it(farm, screen):
    farm.ok("add", "a task")
    one = watch(screen)
    assert one.read().startswith(ENTER) and termios.tcgetattr(one.slave) != one.before
    one.type("q")
    assert (one.end(), is_restored(one)) == (0, True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_watch_restores_the_terminal_on_a_signal(farm, screen, number):
    one = watch(screen)
    one.process.send_signal(number)
    assert (one.end(), is_restored(one)) == (128 + number, True)


def test_watch_can_be_suspended_and_goes_on(farm, screen):
    one = watch(screen)
    one.process.send_signal(signal.SIGTSTP)
    wait_until(lambda: psutil.Process(one.process.pid).status() == psutil.STATUS_STOPPED, message="the stop")
    assert is_restored(one)
    mark = len(one.read())
    one.process.send_signal(signal.SIGCONT)
    one.wait_for("q leave", mark)
    one.type("q")
    assert one.end() == 0


def test_watch_shows_a_new_task_at_once_and_in_place(farm, screen):
    farm.ok("add", "a task")
    one = watch(screen)
    one.wait_for("0/1 tasks")
    farm.ok("add", "another")
    one.wait_for("0/2 tasks")
    assert "\x1b[2J" not in one.read(), "a cleared screen flickers"


def test_watch_follows_the_size_of_the_terminal(farm, screen):
    for number in range(40):
        farm.ok("add", f"task {number}")
        farm.claim(f"agent-{number + 1:03d}")
    one = watch(screen, columns=100, lines=30)
    mark = len(one.read())
    one.resize(60, 12)
    one.wait_for("q leave", mark)
    last = frames(one.read())[-1]
    assert len(last) <= 12 and max(map(len, last)) <= 60 and any("more" in line for line in last)


@pytest.mark.parametrize(("columns", "lines"), [(0, 0), (1, 1), (5, 2), (20, 4)])
def test_watch_draws_on_a_terminal_of_any_size(farm, screen, columns, lines):
    farm.ok("add", "a task")
    farm.claim(A)
    one = screen("status", "--watch", columns=columns, lines=lines)
    one.wait_for(r"\x1b\[H.")
    one.type("q")
    assert one.end() == 0


@pytest.mark.parametrize("width", range(-1, 8))
def test_a_line_is_cut_to_any_width(width):
    assert toolkit.text_width(toolkit.one_width("a\u65e5b\u672cc", width)) <= max(0, width)


def test_watch_waits_for_a_farm_that_is_not_there_yet(farm, screen):
    one = watch(screen)
    up(farm, 1, "sleep 1000")
    farm.ok("add", "a task")
    one.wait_for("agent-001 *working")
    farm.ok("down", "--now", timeout=120)


def test_watch_survives_a_restart_of_the_farm_and_damage(farm, screen):
    farm.ok("add", "a task")
    up(farm, 1, "sleep 1000")
    one = watch(screen)
    one.wait_for("agent-001 *working")
    farm.ok("down", "--now", timeout=120)
    one.wait_for("loop: not running")
    (farm.repo / "farm.env").write_text("nonsense")
    one.wait_for("expected KEY=VALUE")
    (farm.repo / "farm.env").unlink()
    mark = len(one.read())
    up(farm, 1, "sleep 1000")
    one.wait_for("agent-001 *working", mark)
    farm.ok("down", "--now", timeout=120)


def test_watch_writes_nothing_and_leaves_every_index_alone(farm, screen):
    farm.ok("add", "a task")
    farm.claim(A)
    worktree = farm.repo.parent / "repo-farm" / f"{A}-worktree"
    git(farm.repo, "worktree", "add", "-q", "-b", f"farm/{A}/t-0001", worktree)
    (worktree / "README.md").write_text("one\ntwo\n")
    (farm.folder / "farm.json").write_text(json.dumps({"mode": "down", "settings": {"into": "main"}}))
    before = bytes_below(farm.repo, but=())
    one = watch(screen)
    one.wait_for(f"{A} .* t-0001 *3 *0 ")
    one.wait_for("(?s)tasks: claimed 1.*tasks: claimed 1")
    one.type("q")
    one.end()
    assert bytes_below(farm.repo, but=()) == before


def test_l_shows_the_log_and_ctrl_c_comes_back(farm, screen):
    farm.ok("add", "a task")
    up(farm, 1, "echo here I am; sleep 1000")
    one = watch(screen)
    one.wait_for("agent-001 *working")
    one.type("1l")
    one.wait_for("here I am")
    mark = len(one.read())
    one.type("\x03")
    one.wait_for("q leave", mark)
    one.type("q")
    assert one.end() == 0
    farm.ok("down", "--now", timeout=120)


def test_a_number_attaches_and_detaching_comes_back(farm, screen):
    farm.ok("add", "a task")
    up(farm, 1, "echo here I am; sleep 1000")
    one = watch(screen)
    one.wait_for("agent-001 *working")
    one.type("1")
    one.wait_for("here I am")
    mark = len(one.read())
    one.detach()
    one.wait_for("q leave", mark)
    one.type("q")
    assert one.end() == 0
    farm.ok("down", "--now", timeout=120)


def test_p_pauses_and_resumes(farm, screen):
    up(farm, 1, "true")
    one = watch(screen)
    one.wait_for("loop: running")
    one.type("p")
    one.wait_for("paused")
    mark = len(one.read())
    one.type("p")
    one.wait_for(r"loop: running \(pid \d+\)\x1b", mark)
    one.type("q")
    assert one.end() == 0
    farm.ok("down", "--now", timeout=120)


def test_m_merges(farm, screen):
    farm.ok("add", "a task")
    farm.submit(A, {"a.txt": "a"})
    one = watch(screen)
    one.type("m")
    one.wait_for("press Enter to go back")
    one.type("\n")
    one.wait_for("1/1 tasks")
    assert farm.task("t-0001")["state"] == "landed"


def test_watch_in_a_pipe_prints_what_changes(farm):
    farm.ok("add", "a task")
    with farm.start("status", "--watch") as process:
        assert process.stdout.readline() == "tasks: pending 1\n"
        process.terminate()
        assert "\x1b" not in process.stdout.read()


def test_watch_as_json_is_a_document_a_line(farm):
    farm.ok("add", "a task")
    with farm.start("status", "--watch", "--json") as process:
        assert json.loads(process.stdout.readline())["tasks"] == {"pending": 1}
        farm.ok("add", "another")
        assert json.loads(process.stdout.readline())["tasks"] == {"pending": 2}
        process.terminate()


@pytest.mark.parametrize(
    ("landed", "left", "seconds"), [([], 5, None), ([0], 5, None), ([0, 50, 100], 4, 200), ([0, 100], 0, None)]
)
def test_the_time_left_is_told_from_the_pace_of_landings(landed, left, seconds):
    assert toolkit.estimate_left(landed, left, 100) == seconds


@pytest.mark.parametrize("width", [10, 30, 80, 200])
def test_the_bar_fits_and_is_full_when_all_is_over(width):
    status = {"tasks": {"landed": 3, "failed": 1}, "landed_at": [], "loop": {"alive": True}}
    line = toolkit.progress_line(status, width, 0)
    assert line == "[" + "#" * line.count("#") + "] 4/4 tasks" and (len(line) <= width or width < 20)


# ---------------------------------------------------------------------------------------------- logs


@pytest.fixture
def logs(farm) -> Path:
    """The folder of logs, with one of agent 1 and one of agent 2."""
    folder = farm.folder / "logs"
    folder.mkdir(parents=True)
    (folder / f"{A}.log").write_bytes(b"one\r\ntwo\r\n")
    (folder / f"{B}.log").write_bytes(b"\x1b[31mred\x1b[0m\r\nhalf a line")
    return folder


def test_logs_are_the_whole_history_through_rotations(farm, logs):
    (logs / f"{A}.log.1").write_text("zero\n")
    (logs / f"{A}.log.2").write_text("minus one\n")
    assert farm.ok("logs", "1") == "minus one\nzero\none\ntwo"


def test_logs_can_be_cut_to_the_last_lines(farm, logs):
    (logs / f"{A}.log.1").write_text("zero\n" * 5000)
    assert farm.ok("logs", "1", "-n", "3") == "zero\none\ntwo"


def test_logs_are_stripped_of_escape_codes_unless_raw(farm, logs):
    text = b"a\x1b[1;31mb\x1b]0;title\x07c\x1b(Bd\x1b7e\x1bPq#0\x1b\\f\x9b1mg\x07\x1b[?25l\r\nbar 1\rbar 2\n"
    (logs / f"{A}.log").write_bytes(text)
    assert farm.ok("logs", "1") == "abcdef1mg\nbar 1\nbar 2".replace("1mg", "\ufffd1mg")
    raw = subprocess.run(farm.argv("logs", "1", "--raw"), capture_output=True, check=True)
    assert raw.stdout == text


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_an_escape_code_that_is_cut_in_two_is_stripped_all_the_same(logs, size):
    reader = toolkit.LogReader(str(logs / f"{A}.log"))
    text = "a\x1b[1;31mb\x1b]0;title\x07c\x1b(Bd\x1b7e\x1bPq#0\x1b\\f\u65e5\x1b[?25l\r\ng".encode()
    pieces = [text[start:start + size] for start in range(0, len(text), size)]
    assert "".join(map(reader.clean, pieces)) == "abcdef\u65e5\ng"


def test_logs_follow_through_a_rotation(farm, logs):
    path = logs / f"{A}.log"
    with farm.start("logs", "1", "-f") as process:
        assert [process.stdout.readline() for _ in range(2)] == ["one\n", "two\n"]
        path.rename(logs / f"{A}.log.1")
        with open(logs / f"{A}.log.1", "ab") as old:
            old.write(b"three\r\n")
        path.write_bytes(b"four\r\n")
        assert [process.stdout.readline() for _ in range(2)] == ["three\n", "four\n"]
        process.terminate()


def test_logs_of_all_name_the_agent_on_each_line(farm, logs):
    (logs / "merger.log").write_text("not an agent's\n")
    assert farm.ok("logs", "--all").splitlines() == [f"{A} | one", f"{A} | two", f"{B} | red", f"{B} | half a line"]


def test_logs_of_all_follow_in_the_order_in_which_lines_appear(farm, logs):
    with farm.start("logs", "--all", "-f") as process:
        assert [process.stdout.readline() for _ in range(3)] == [f"{A} | one\n", f"{A} | two\n", f"{B} | red\n"]
        for name, text, shown in ((B, " and more\n", "half a line and more"), (A, "three\n", "three"), (C, "new\n", "new")):
            with open(logs / f"{name}.log", "a") as log:
                log.write(text)
            assert process.stdout.readline() == f"{name} | {shown}\n"
        process.terminate()


def test_a_log_is_rotated_without_losing_a_byte(farm):
    farm.ok("add", "a task")
    count = 6_000_000
    up(farm, 1, f"seq {count}; sleep 1000")
    path = farm.folder / "logs" / f"{A}.log"

    def numbers() -> list[int]:
        found = sorted(path.parent.glob(path.name + "*"), key=lambda path: path.name, reverse=True)
        return [int(line) for line in b"".join(one.read_bytes() for one in found).split(b"\r\n") if line.isdigit()]

    wait_until(lambda: path.exists() and str(count).encode() + b"\r\n" in path.read_bytes()[-100:], 120, "the last line")
    assert path.with_name(path.name + ".1").exists() and path.stat().st_size < 33 << 20
    assert numbers() == list(range(1, count + 1))
    last = farm.ok("logs", "1", "-n", "2").splitlines()
    assert last == [str(count - 1), str(count)]
    farm.ok("down", "--now", timeout=120)


# ---------------------------------------------------------------------------------------------- attach, overview, status line


@pytest.fixture
def tmux(farm):
    """tmux on the farm's own server: what it prints."""
    socket = toolkit.farm_socket(str(farm.repo))
    return lambda *words: run(["tmux", "-L", socket, *words]).stdout.strip()


@pytest.fixture
def three(farm):
    """A farm with three agents at work."""
    for number in range(3):
        farm.ok("add", f"task {number}")
    up(farm, 3, "echo here is $FARM_AGENT_NAME; while read -r line; do echo \"got $line\"; done")
    wait_until(lambda: [agent["state"] for agent in agents_of(farm).values()] == ["working"] * 3, 40, "three at work")
    yield farm
    farm.ok("down", "--now", timeout=120)


def test_attach_shows_the_agent_and_takes_keys(three, screen):
    one = screen("attach", "2")
    one.wait_for("here is agent-002")
    one.type("hello\r")
    one.wait_for("got hello")
    one.detach()
    assert one.end() == 0


def test_attach_from_another_tmux_goes_there_and_comes_back(three, tmux, sandbox):
    mine = ["tmux", "-L", "mine", "-f", "/dev/null"]
    one = Screen([*mine, "new-session", "-s", "it's mine"], columns=100)
    wait_until(lambda: "mine" in run([*mine, "list-clients", "-F", "#{client_session}"]).stdout, message="my session")
    one.type(f"{sys.executable} {FARM} --repo {three.repo} attach 2\r")
    one.wait_for("here is agent-002")
    assert "agent-002" in tmux("list-clients", "-F", "#{client_session}"), "it is nested"
    assert run([*mine, "list-clients"]).stdout == ""
    one.detach()
    wait_until(lambda: "mine" in run([*mine, "list-clients", "-F", "#{client_session}"]).stdout, message="the way back")
    run([*mine, "kill-server"])
    one.end()
    one.close()


def test_attach_from_the_farms_own_server_switches(three, screen, tmux):
    one = screen("attach", "1")
    one.wait_for("here is agent-001")
    tmux("split-window", "-t", "=agent-001:", f"{sys.executable} {FARM} --repo {three.repo} attach 3; sleep 100")
    one.wait_for("here is agent-003")
    assert tmux("list-clients", "-F", "#{client_session}").split() == ["agent-003"]


def test_the_overview_shows_all_agents_and_only_looks(three, screen, tmux):
    before = tmux("list-panes", "-a", "-F", "#{session_name} #{pane_id} #{window_width}x#{window_height}")
    one = screen("attach", "--all", columns=200, lines=50)
    for name in (A, B, C):
        one.wait_for(f"here is {name}")
    one.type("nobody gets this\r")
    listed = tmux("list-panes", "-a", "-F", "#{session_name} #{pane_id} #{window_width}x#{window_height}").splitlines()
    assert [line for line in listed if not line.startswith("overview")] == before.splitlines(), "an agent's pane has moved"
    assert len([line for line in listed if line.startswith("overview")]) == 3
    assert sorted(agents_of(three)) == [A, B, C]
    one.detach()
    assert one.end() == 0
    wait_until(lambda: "overview" not in tmux("list-sessions"), message="the end of an overview that nobody looks at")
    assert "nobody gets this" not in three.ok("logs", "--all")


def test_an_agents_window_follows_the_terminal_after_an_overview(three, screen, tmux):
    run(["bash", SCRIPTS / "overview-tmux.sh", "-L", toolkit.farm_socket(str(three.repo))], check=True)
    one = screen("attach", "1", columns=91, lines=33)
    one.wait_for("here is agent-001")
    wait_until(lambda: tmux("display-message", "-p", "-t", "=agent-001:", "#{window_width}") == "91", message="its width")


def test_down_ends_a_farm_with_an_overview_whole(three, screen):
    one = screen("attach", "--all")
    one.wait_for("here is agent-001")
    three.ok("down", "--now", timeout=120)
    one.end()
    assert agents_of(three) == {}


def test_the_overview_of_a_farm_that_does_not_run_says_so(farm):
    assert "./farm.py up" in farm.refused(3, "attach", "--all")


def test_the_status_line_has_the_farms_counts(three, tmux, screen):
    wait_until(lambda: "3 work" in tmux("show-options", "-gv", "@farm_note"), 40, "the counts")
    one = screen("attach", "1", columns=150)
    one.wait_for("3 work . 0 idle . 0 to merge . 0/3 landed")


def test_a_note_changes_the_farms_own_server_only(three, sandbox):
    run(["tmux", "-L", "other", "-f", "/dev/null", "new-session", "-d", "sleep 100"], check=True)
    before = run(["tmux", "-L", "other", "show-options", "-g"]).stdout
    script = SCRIPTS / "note-tmux.sh"
    assert run([script, "-L", toolkit.farm_socket(str(three.repo)), "#(touch no) text"]).returncode == 0
    assert run(["tmux", "-L", "other", "show-options", "-g"]).stdout == before
    run(["tmux", "-L", "other", "kill-server"])
    assert run([script, "-L", "nowhere", "text"]).returncode == 3


# ---------------------------------------------------------------------------------------------- send, pause, resume, estop


def test_send_to_all_reaches_everybody_at_work(three):
    assert three.ok("send", "--all", "be", "quick").splitlines() == [f"{name}\ttaken" for name in (A, B, C)]
    wait_until(lambda: three.ok("logs", "--all").count("got be quick") == 3, message="three answers")


def test_send_to_all_where_nobody_works_exits_3(farm):
    farm.refused(3, "send", "--all", "text")
    farm.refused(2, "send", "--all")


def test_a_paused_farm_hands_out_nothing_and_lets_agents_finish(farm):
    up(farm, 1, "until [ -e $FARM_REPO/go ]; do sleep 0.05; done; echo x > $FARM_TASK")
    farm.ok("add", "one"), farm.ok("add", "two")
    wait_for_state(farm, A, "working")
    farm.ok("pause", "--why", "lunch")
    assert json.loads(farm("status", "--json").stdout)["mode"] == "paused"
    assert "lunch" in farm("status").stdout and "next: ./farm.py resume" in farm("status").stdout
    (farm.repo / "go").touch()
    wait_until(lambda: farm.task("t-0001")["state"] == "landed", 60, "the landing of what was held")
    assert "resume" in farm.refused(3, "claim", "agent-009", "--owner-pid", str(os.getpid()))
    assert farm.task("t-0002")["state"] == "pending"
    farm.ok("resume")
    wait_until(lambda: farm.task("t-0002")["state"] == "landed", 60, "the landing of what had to wait")
    farm.ok("down", "--now", timeout=120)


def test_a_pause_outlives_a_killed_loop(farm):
    up(farm, 1, "true")
    wait_until(lambda: json.loads(farm("status", "--json").stdout)["loop"]["alive"], message="the loop")
    farm.ok("pause")
    loop = json.loads(farm("status", "--json").stdout)["loop"]["pid"]
    os.kill(loop, signal.SIGKILL)
    status = wait_until(lambda: (found := json.loads(farm("status", "--json").stdout))["loop"]["pid"] not in (None, loop) and found,
                        40, "a new loop")
    assert status["mode"] == "paused"
    farm.ok("down", "--now", timeout=120)


@pytest.mark.parametrize("verb", ["pause", "resume", "estop"])
def test_steering_a_farm_that_was_never_started_says_so(farm, verb):
    assert "./farm.py up" in farm.refused(3, verb)


def test_a_farm_that_is_down_cannot_be_paused(farm):
    up(farm, 1, "true")
    farm.ok("down", "--now", timeout=120)
    farm.refused(4, "pause")
    farm.refused(4, "resume")


STUBBORN = """trap '' TERM HUP INT; echo precious > new.txt; echo changed >> README.md
(trap '' TERM HUP INT; while :; do date > ticking; sleep 0.1; done) & while :; do sleep 1; done"""


def test_estop_stops_what_ignores_every_signal_and_loses_nothing(farm, sandbox):
    for number in range(3):
        farm.ok("add", f"task {number}")
    up(farm, 3, STUBBORN)
    worktrees = farm.repo.parent / "repo-farm"
    wait_until(lambda: len(list(worktrees.glob("*/ticking"))) == 3, 40, "three stubborn agents")
    farm.ok("estop", timeout=120)
    assert [p.cmdline() for p in find_processes(sandbox.token)] == []
    status = json.loads(farm("status", "--json").stdout)
    assert (status["mode"], status["tasks"], status["agents"]) == ("down", {"pending": 3}, [])
    assert [task["attempts"] for task in farm.json("tasks")] == [0, 0, 0]
    refs = git(farm.repo, "for-each-ref", "--format=%(refname)", "refs/farm/rescue").splitlines()
    assert [git(farm.repo, "show", f"{ref}:new.txt") for ref in refs] == ["precious"] * 3
    up(farm, 3, "true")
    wait_until(lambda: json.loads(farm("status", "--json").stdout)["loop"]["alive"], message="the farm again")
    farm.ok("down", "--now", timeout=120)


def test_estop_ends_a_stubborn_gate_and_its_work_stays_submitted(farm, sandbox):
    farm.ok("add", "a task")
    before = git(farm.repo, "rev-parse", "main")
    gate = f"touch {sandbox.root}/gate; trap '' TERM HUP INT; while :; do sleep 1; done"
    farm.ok("up", "-n", "1", "--agent", "echo x > x", "--gate", gate, timeout=120)
    wait_until((sandbox.root / "gate").exists, 60, "the gate")
    farm.ok("estop", timeout=120)
    assert [p.cmdline() for p in find_processes(sandbox.token)] == []
    assert (farm.task("t-0001")["state"], git(farm.repo, "rev-parse", "main")) == ("ready", before)


def test_estop_leaves_a_shell_alone_that_only_names_the_repo(farm):
    up(farm, 1, "sleep 1000")
    with subprocess.Popen(["sleep", "1000"], env={**os.environ, "FARM_REPO": str(farm.repo)}) as mine:
        farm.ok("estop", timeout=120)
        assert mine.poll() is None
        mine.kill()


# ---------------------------------------------------------------------------------------------- notify

TELL = 'cat >> "$FARM_REPO/../told"'


def told(farm) -> list[dict]:
    path = farm.repo.parent / "told"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_drained_farm_tells_so_once_and_leaves_its_report(farm):
    farm.ok("add", "one")
    farm("run", "-n", "1", "--agent", "echo x > x", "--gate", "true", "--until-drained", env={"FARM_NOTIFY": TELL}, timeout=120)
    assert [event["event"] for event in told(farm)] == ["drained"]
    assert {"at", "repo", "tasks", "message", "try"} <= set(told(farm)[0]) and told(farm)[0]["tasks"] == {"landed": 1}
    assert "1 of 1 task landed" in (farm.folder / "report.html").read_text()


def test_each_event_is_told_once_through_restarts_of_the_loop(farm):
    farm.ok("add", "one", "--max-attempts", "1")
    up(farm, 1, "exit 1", env={"FARM_NOTIFY": TELL})
    wait_until(lambda: {event["event"] for event in told(farm)} == {"failed", "drained"}, 60, "what happened")
    for _ in range(2):
        pid = wait_until(lambda: json.loads(farm("status", "--json").stdout)["loop"]["pid"], 40, "a loop")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: json.loads(farm("status", "--json").stdout)["loop"]["pid"] not in (None, pid), 40, "the next")
    farm.ok("add", "two", "--max-attempts", "1")
    wait_until(lambda: len(told(farm)) >= 4, 60, "what happened next")
    assert sorted((event["event"], event.get("task")) for event in told(farm)) == [
        ("drained", None), ("drained", None), ("failed", "t-0001"), ("failed", "t-0002")]
    farm.ok("down", "--now", timeout=120)


def test_a_red_target_is_told(farm):
    farm.ok("add", "one")
    farm.ok("up", "-n", "1", "--agent", "echo x > x", "--gate", "false", timeout=120, env={"FARM_NOTIFY": TELL})
    wait_until(lambda: [event["event"] for event in told(farm)] == ["blocked"], 60, "that the target is red")
    assert "main" in told(farm)[0]["message"]
    farm.ok("down", "--now", timeout=120)


def test_an_agent_that_waits_for_a_person_is_told(farm):
    farm.ok("add", "one")
    hook = """printf '{"hook_event_name":"PermissionRequest","tool_name":"Bash","tool_input":{"command":"rm x"}}' | farm hook"""
    up(farm, 1, f"{hook}; sleep 1000", env={"FARM_NOTIFY": TELL})
    event = wait_until(lambda: told(farm), 60, "that somebody waits")[0]
    assert (event["event"], event["agent"], event["task"], event["try"]) == ("waiting", A, "t-0001", "./farm.py attach 1")
    assert "rm x" in event["message"]
    assert "next: ./farm.py attach 1 # agent-001 waits for a person: Bash rm x" in farm("status").stdout
    farm.ok("down", "--now", timeout=120)


@pytest.mark.parametrize("command", ["exit 3", "cat >/dev/null; sleep 1000", "nonsense-command", "exec 0<&-"])
def test_a_command_that_fails_or_hangs_does_not_stop_the_loop(farm, command):
    farm.ok("add", "one")
    up(farm, 1, "echo x > x", env={"FARM_NOTIFY": command})
    wait_until(lambda: farm.task("t-0001")["state"] == "landed", 60, "the landing")
    farm.ok("add", "two")
    wait_until((farm.folder / "report.html").exists, 60, "the report")
    farm.ok("down", "--now", timeout=120)


def test_a_command_that_hangs_is_ended(farm, monkeypatch, sandbox):
    monkeypatch.setattr(toolkit, "NOTICE_SECONDS", 0.2)
    store = toolkit.Store(str(farm.repo))
    store.ensure_folders()
    toolkit.run_notice("sleep 1000 & sleep 1000", {"event": "drained"}, store)
    assert find_processes(sandbox.token) == []
    assert "drained: exit code -9" in (farm.folder / "logs" / "notify.log").read_text()


# ---------------------------------------------------------------------------------------------- add

CHECKLIST = """\
# Plan

1. [ ] Whole
   what it is for

       indented = "code"
   - [ ] Part one
     about part one
     - [ ] Detail
   - [x] Part two, done
     this belongs to nobody
   ```
   - [ ] not a task, but an example
   ```
   more of the whole
- [ ] Alone
"""


def added(farm, text: str) -> dict[str, dict]:
    farm.ok("add", "-f", "-", input=text)
    records = json.loads((farm.folder / "task_queue" / "pending.json").read_text())["tasks"]
    return {record["title"]: record for record in records}


def test_sub_items_come_first_and_texts_keep_to_their_items(farm):
    tasks = added(farm, CHECKLIST)
    assert list(tasks) == ["Whole", "Part one", "Detail", "Alone"]
    ids = {title: task["id"] for title, task in tasks.items()}
    after = {title: task.get("after", []) for title, task in tasks.items()}
    assert after == {"Whole": [ids["Part one"]], "Part one": [ids["Detail"]], "Detail": [], "Alone": []}
    assert tasks["Part one"]["prompt"] == "about part one"
    assert tasks["Whole"]["prompt"] == (
        'what it is for\n\n    indented = "code"\n```\n- [ ] not a task, but an example\n```\nmore of the whole')


ISSUES = [
    {"body": "It fails.\r\n\r\n- [ ] a box of the issue's own\r\n", "labels": [{"id": "L", "name": "bug", "color": "f00"}],
     "number": 12, "title": "Fix the \"login\" test", "url": "https://github.com/o/r/issues/12"},
    {"body": "", "labels": [], "number": 7, "title": "[ui] Say hello", "url": "https://github.com/o/r/issues/7"},
]


@pytest.mark.parametrize("form", ["one line", "pretty", "an object a line", "pretty objects"])
def test_issues_of_gh_are_taken_as_they_are(farm, form):
    text = {"one line": json.dumps(ISSUES), "pretty": json.dumps(ISSUES, indent=2),
            "an object a line": "\n".join(map(json.dumps, ISSUES)),
            "pretty objects": "\n".join(json.dumps(issue, indent=2) for issue in ISSUES)}[form]
    tasks = added(farm, text)
    assert list(tasks) == ['Fix the "login" test', "[ui] Say hello"]
    assert tasks['Fix the "login" test']["prompt"] == "It fails.\n\n- [ ] a box of the issue's own\n"
    assert (tasks["[ui] Say hello"]["source"], tasks["[ui] Say hello"]["url"]) == ("issue 7", "https://github.com/o/r/issues/7")
    changed = [{**ISSUES[0], "title": "Fix it"}, ISSUES[1]]
    farm.ok("add", "-f", "-", input=json.dumps(changed))
    assert len(farm.json("tasks")) == 2


def test_plain_lines_may_begin_with_a_bracket(farm):
    assert list(added(farm, "[ui] first\n[db] second\n")) == ["[ui] first", "[db] second"]


NEARLY = ["- [] no space", "-[ ] no space", "- [ ]no space", "- [ ]", "* [?] what", "  - [  ] two", "1. []x"]


@pytest.mark.parametrize("line", NEARLY)
def test_a_line_that_is_nearly_a_task_names_itself_and_adds_nothing(farm, line):
    said = farm.refused(2, "add", "-f", "-", input=f"- [ ] good\n\n{line}\n- [ ] good too\n")
    assert "-, line 3: " in said and "nothing was added" in said
    assert farm.json("tasks") == []


@pytest.mark.parametrize("line", ["- [link](https://example.org)", "- [1] a note", "- plain", "[ ] no bullet"])
def test_other_lines_of_a_list_are_no_mistake(farm, line):
    assert list(added(farm, f"- [ ] good\n\n{line}\n")) == ["good"]


@pytest.mark.parametrize(("text", "where"), [('{"title": "a"}\n{"title": \n{"title": "b"}\n', "line 2"),
                                             ('[\n {"title": "a"},\n {"title": }\n]', "line 3"),
                                             ('{\n "title": "a"\n}\n{\n "titel": "b"\n}', "item 2")])
def test_a_bad_line_of_json_names_itself_and_adds_nothing(farm, text, where):
    assert where in farm.refused(2, "add", "-f", "-", input=text)
    assert farm.json("tasks") == []


# ---------------------------------------------------------------------------------------------- completion, help, first use


def complete(farm, line: str, cwd=None) -> set[str]:
    """What bash offers for a command line whose cursor is at its end."""
    words = line.split(" ")
    array = " ".join(f"'{word}'" for word in words)
    script = f"""eval "$({sys.executable} {FARM} completion bash)"
COMP_WORDS=({array}); COMP_CWORD={len(words) - 1}; _farm; printf '%s\\n' "${{COMPREPLY[@]}}" """
    return set(run(["bash", "-c", script], cwd=cwd or farm.repo, check=True).stdout.split())


def test_bash_completes_verbs_options_agents_and_tasks(farm):
    farm.ok("add", "one"), farm.ok("add", "two")
    farm.claim(A)
    assert complete(farm, "./farm.py st") == {"status"}
    assert complete(farm, "./farm.py status --") == {"--json", "--watch", "--help"}
    assert complete(farm, "./farm.py attach ") == {A}
    assert complete(farm, "./farm.py cancel t-") == {"t-0001", "t-0002"}
    assert complete(farm, "./farm.py add x --after t-0001 --after ") == {"t-0001", "t-0002"}
    assert complete(farm, "./farm.py rescue r") == {"restore"}
    assert complete(farm, "./farm.py completion z") == {"zsh"}


def test_completion_follows_repo_and_works_anywhere(farm, sandbox):
    farm.ok("add", "one")
    assert complete(farm, f"farm.py --repo {farm.repo} retry ", sandbox.home) == {"t-0001"}
    assert "status" in complete(farm, "farm.py ", sandbox.home)
    assert complete(farm, "farm.py retry ", sandbox.home) == set()


def test_completion_of_a_damaged_farm_is_silent(farm):
    farm.ok("add", "one")
    (farm.folder / "task_queue" / "pending.json").write_text("{")
    assert complete(farm, "farm.py retry ") == set()


def test_zsh_takes_its_completion(farm):
    zsh = shutil.which("zsh")
    if not zsh:
        pytest.skip("there is no zsh here (apt install zsh)")
    text = run([sys.executable, FARM, "completion", "zsh"], check=True).stdout
    assert run([zsh, "-f", "-c", "autoload -U compinit; compinit -D\n" + text]).returncode == 0


def test_completion_of_another_shell_is_a_usage_error(farm):
    assert "completion bash" in farm.refused(2, "completion", "fish")


@pytest.mark.parametrize("verb", sorted(toolkit.VERBS))
def test_the_example_of_each_verbs_help_is_one_that_it_takes(farm, verb):
    shown = run([sys.executable, FARM, verb, "--help"], check=True).stdout
    example = shown.rpartition("example: ")[2].strip()
    assert example
    text = example.replace("$$", "1").removeprefix('eval "$(').removesuffix(')"')
    words = shlex.split(text)
    assert words[0] in ("farm", "./farm.py") and words[1] == verb
    args, options = toolkit.parse_options(verb, words[2:])
    assert "help" not in options


def test_farm_alone_says_where_it_stands_and_three_things_to_type(farm):
    shown = run([sys.executable, FARM], cwd=farm.repo, check=True).stdout
    commands = [line for line in shown.splitlines() if line.startswith("  ./farm.py")]
    assert "tasks: none" in shown and len(commands) == 3 and "./farm.py add" in commands[0]
    up(farm, 1, "sleep 1000")
    farm.ok("add", "one")
    wait_for_state(farm, A, "working")
    shown = run([sys.executable, FARM], cwd=farm.repo, check=True).stdout
    assert "working 1" in shown and "loop: running" in shown and shown.count("  ./farm.py") == 3
    farm.ok("down", "--now", timeout=120)


def test_farm_alone_outside_a_repo_says_how_it_is_called(sandbox):
    shown = run([sys.executable, FARM], cwd=sandbox.home, check=True).stdout
    assert "not inside a git repository" in shown and "usage: farm.py" in shown


@pytest.mark.parametrize(
    ("words", "near"),
    [(["status", "--jsn"], "status --json"), (["merge", "--gatte", "x"], "merge --gate"), (["statsu"], "status"), (["tell"], "")],
)
def test_a_wrong_word_suggests_the_near_one(farm, words, near):
    assert f"try: ./farm.py {near}" in farm.refused(2, *words)
