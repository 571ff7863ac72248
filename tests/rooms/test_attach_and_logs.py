"""What an agent prints: logs, attach, the overview of all agents and tmux's status line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from farm_calls import FARM, A, B, C
from paths import SCRIPTS
from sandbox import run, wait_until
from screens import Screen, agents_of, up

import farm as toolkit

pytestmark = pytest.mark.usefixtures("farm_cleanup")  # farms are left running at the end of a test


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


def test_attach_shows_the_agent_and_takes_keys(three, screen):
    one = screen("attach", "2")
    one.wait_for("here is agent-002")
    one.type("hello\r")
    one.wait_for("got hello")
    assert one.leave() == 0


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
    assert one.leave() == 0
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
