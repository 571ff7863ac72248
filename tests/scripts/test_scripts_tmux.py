"""spawn-tmux.sh, probe-tmux.sh, send-tmux.sh, stop-tmux.sh and attach-tmux.sh on private tmux servers."""

from __future__ import annotations

import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from paths import SCRIPTS
from sandbox import git, run, wait_until

ODD_NAME = "a b'c\"d $HOME;#{pid} %H é\n*x\\n~"
SOCKET = "farm-test"


def escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


def tmux(*arguments: str, socket: str = SOCKET) -> str:
    return run(["tmux", "-u", "-L", socket, *arguments]).stdout.rstrip("\n")


def screen(name: str = "agent-001") -> str:
    return tmux("capture-pane", "-p", "-t", f"={name}:")


@pytest.fixture
def folder(sandbox) -> Path:
    """Where the sessions of a test start; their logs go beside it."""
    made = sandbox.work / "tree"
    made.mkdir()
    return made


@pytest.fixture
def spawn(folder: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Run spawn-tmux.sh for `names`, all in `folder`; the server is ended after the test."""

    def call(command: str, *names: str, options: tuple[str | Path, ...] = (), at: Path = folder):
        lines = "".join(f"{name}\tfarm/{name}/work\t{escape(str(at))}\tcreated\n" for name in names or ("agent-001",))
        return run([SCRIPTS / "spawn-tmux.sh", "-L", SOCKET, "-c", command, *options], input=lines)

    yield call
    run([SCRIPTS / "stop-tmux.sh", "-L", SOCKET, "-a"])


def probe(socket: str = SOCKET) -> dict[str, list[str]]:
    """Name -> the other fields of probe-tmux.sh's line."""
    done = run([SCRIPTS / "probe-tmux.sh", "-L", socket])
    return {fields[0]: fields[1:] for fields in (line.split("\t") for line in done.stdout.splitlines())}


def is_dead(name: str = "agent-001") -> bool:
    return probe()[name][2] == "1"


def send(text: str, *options: str, name: str = "agent-001") -> subprocess.CompletedProcess[str]:
    return run([SCRIPTS / "send-tmux.sh", "-L", SOCKET, *options, name], input=text)


def log_of(folder: Path, name: str = "agent-001") -> str:
    path = folder.parent / "logs" / f"{name}.log"
    return path.read_text().replace("\r\n", "\n") if path.exists() else ""


# --- spawn ------------------------------------------------------------------------------------------------------------


def test_spawn_prints_pane_pid_and_started(spawn):
    fields = spawn("exec sleep 60").stdout.rstrip("\n").split("\t")
    assert (fields[0], fields[1], fields[3], psutil.pid_exists(int(fields[2]))) == ("agent-001", "%0", "started", True)


def test_the_panes_pid_is_the_command_itself(spawn):
    pid = int(spawn("exec sleep 60").stdout.split("\t")[2])
    wait_until(lambda: psutil.Process(pid).name() == "sleep", message="the pane's process to be the command")


def test_ten_sessions_run_at_once(spawn):
    spawn("exec sleep 60", *(f"agent-{number:03d}" for number in range(1, 11)))
    assert [fields[2] for fields in probe().values()] == ["0"] * 10


def test_fifty_sessions_fit_into_one_call(spawn):
    done = spawn("exec sleep 60 # " + "x" * 500, *(f"agent-{number:03d}" for number in range(1, 51)))
    assert done.stdout.count("\tstarted\n") == 50


def test_the_command_knows_agent_worktree_branch_and_settings(spawn, folder):
    odd = 'it\'s "$HOME"; #{pid}\n\\n é'
    spawn('printf "%s|" "$FARM_AGENT_NAME" "$FARM_WORKTREE" "$FARM_BRANCH" "$ODD" "$PWD" >out', options=("-e", f"ODD={odd}"))
    wait_until(is_dead, message="the command to end")
    assert (folder / "out").read_text() == f"agent-001|{folder}|farm/agent-001/work|{odd}|{folder}|"


def test_a_command_with_quotes_and_newlines_arrives_unchanged(spawn, folder):
    spawn("cat >out <<'END'\na 'b' \"c\" $HOME #{pid} ; \\n é %H\nEND\n")
    wait_until(is_dead, message="the command to end")
    assert (folder / "out").read_text() == "a 'b' \"c\" $HOME #{pid} ; \\n é %H\n"


def test_a_session_starts_in_a_folder_with_an_odd_name(spawn, sandbox):
    odd = sandbox.work / ODD_NAME
    odd.mkdir()
    spawn("touch here", at=odd)
    wait_until((odd / "here").exists, message="the command to run in the odd folder")


def test_a_log_in_a_folder_with_an_odd_name_is_written(spawn, sandbox):
    logs = sandbox.work / ODD_NAME
    spawn("echo to the log", options=("-l", logs))
    wait_until(lambda: "to the log" in (logs / "agent-001.log").read_text(), message="the log")


def test_output_from_the_first_byte_on_is_in_the_log(spawn, folder):
    spawn("echo first")
    wait_until(lambda: log_of(folder).startswith("first\n"), message="the first line in the log")


def test_a_running_session_is_left_alone(spawn):
    first = spawn("exec sleep 60").stdout.split("\t")
    again = spawn("exec sleep 60").stdout.rstrip("\n").split("\t")
    assert again == [*first[:3], "running"]


def test_a_dead_session_is_respawned_and_its_log_goes_on(spawn, folder):
    spawn("echo one")
    wait_until(is_dead, message="the first command to end")
    assert spawn("echo two; exec sleep 60").stdout.endswith("\trespawned\n")
    wait_until(lambda: log_of(folder).startswith("one\n") and "two\n" in log_of(folder), message="both lines in the log")


def test_a_missing_folder_is_refused_and_the_others_start(spawn, folder, sandbox):
    lines = f"agent-001\tb\t{sandbox.work}/gone\nagent-002\tb\t{folder}\n"
    done = run([SCRIPTS / "spawn-tmux.sh", "-L", SOCKET, "-c", "exec sleep 60"], input=lines)
    assert (done.returncode, list(probe())) == (1, ["agent-002"])


def test_a_pane_that_a_person_added_is_not_taken_for_the_agents(spawn):
    first = spawn("exec sleep 60").stdout.split("\t")[1]
    tmux("split-window", "-b", "-t", "=agent-001:", "sleep 60")
    assert (spawn("exec sleep 60").stdout.split("\t")[1], probe()["agent-001"][0]) == (first, first)


def test_two_spawns_at_once_start_each_session_once(spawn, folder):
    lines = "".join(f"agent-{number:03d}\tb\t{folder}\n" for number in range(1, 9))
    command = [str(SCRIPTS / "spawn-tmux.sh"), "-L", SOCKET, "-c", "echo >>count-$FARM_AGENT_NAME; exec sleep 60"]
    calls = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for call in calls:
        call.stdin.write(lines)
        call.stdin.close()
    for call in calls:
        call.wait()
        call.stdout.close()
        call.stderr.close()
    counts = wait_until(lambda: len(found := list(folder.glob("count-*"))) == 8 and found, message="eight sessions")
    assert [path.read_text() for path in counts] == ["\n"] * 8


def test_a_missing_command_is_a_usage_error(folder):
    assert run([SCRIPTS / "spawn-tmux.sh", "-L", SOCKET], input="").returncode == 2


def test_a_missing_tmux_is_named(sandbox):
    bare = sandbox.work / "bin"
    bare.mkdir()
    for tool in ("bash", "git", "dirname"):
        (bare / tool).symlink_to(shutil.which(tool))
    done = run([SCRIPTS / "probe-tmux.sh", "-L", SOCKET], env={"PATH": str(bare)})
    assert (done.returncode, "tmux is missing" in done.stderr) == (6, True)


def test_the_users_configuration_is_not_read(spawn, sandbox):
    (sandbox.home / ".tmux.conf").write_text("set -g remain-on-exit off\nset -g base-index 7\n")
    spawn("exec sleep 60")
    assert tmux("show-options", "-gv", "base-index") == "0"


def test_worktrees_and_sessions_are_one_pipe(make_repo):
    repo = make_repo(ODD_NAME)
    command = f"{SCRIPTS}/mk-worktrees.sh -n 2 | {SCRIPTS}/spawn-tmux.sh -c 'pwd >here; exec sleep 60'"
    done = run(["bash", "-c", command], cwd=repo)
    folders = [repo.parent / f"{repo.name}-farm" / f"agent-00{number}-worktree" for number in (1, 2)]
    wait_until(lambda: all((path / "here").exists() for path in folders), message="both commands to run")
    run([SCRIPTS / "stop-tmux.sh", "-C", repo, "-a"])
    assert done.stdout.count("\tstarted\n") == 2


# --- probe ------------------------------------------------------------------------------------------------------------


def test_probe_without_a_server_finds_nothing():
    done = run([SCRIPTS / "probe-tmux.sh", "-L", SOCKET])
    assert (done.returncode, done.stdout) == (3, "")


def test_probe_tells_the_exit_status_of_a_dead_pane(spawn):
    told = set()
    for _ in range(8):  # tmux 3.3 now and then misses how a child ended, and says then that it does not know
        spawn("exit 7")
        wait_until(is_dead, message="the command to end")
        told.add(tuple(probe()["agent-001"][3:5]))
        if ("7", "-") in told:
            break
    assert ("7", "-") in told and told <= {("7", "-"), ("-", "-")}


def test_probe_tells_the_signal_that_ended_a_pane(spawn):
    told = set()
    for _ in range(8):  # tmux 3.3 now and then misses how a child ended, and says then that it does not know
        pid = int(spawn("exec sleep 60").stdout.split("\t")[2])
        psutil.Process(pid).kill()
        wait_until(is_dead, message="the pane to die")
        told.add(probe()["agent-001"][4])
        if "9" in told:
            break
    assert "9" in told and told <= {"9", "-"}


def test_probe_tells_an_odd_folder_escaped(spawn, sandbox):
    odd = sandbox.work / ODD_NAME
    odd.mkdir()
    spawn("exec sleep 60", at=odd)
    assert probe()["agent-001"][6] == escape(str(odd))


def test_the_socket_is_named_after_the_main_worktree(make_repo, spawn):
    repo = make_repo("my repo")
    (repo / "sub").mkdir()
    expected = "farm-my-repo-" + git(repo, "hash-object", "--stdin", input=str(repo))[:4]
    line = f"agent-001\tb\t{repo}\n"
    run([SCRIPTS / "spawn-tmux.sh", "-C", repo / "sub", "-c", "exec sleep 60"], input=line, check=True)
    assert list(probe(expected)) == ["agent-001"]
    run([SCRIPTS / "stop-tmux.sh", "-C", repo / "sub", "-a"], check=True)


# --- stop -------------------------------------------------------------------------------------------------------------


def test_stop_ends_only_the_session_of_exactly_that_name(spawn):
    spawn("exec sleep 60", "agent-1", "agent-10", "agent-100")
    run([SCRIPTS / "stop-tmux.sh", "-L", SOCKET, "agent-1"], check=True)
    assert list(probe()) == ["agent-10", "agent-100"]


def test_stop_of_a_prefix_ends_nothing(spawn):
    spawn("exec sleep 60", "agent-10")
    run([SCRIPTS / "stop-tmux.sh", "-L", SOCKET, "agent-1"], check=True)
    assert list(probe()) == ["agent-10"]


def test_stop_of_everything_leaves_other_servers_alone(spawn):
    spawn("exec sleep 60")
    tmux("new-session", "-d", "-s", "mine", "sleep 60", socket="other")
    run([SCRIPTS / "stop-tmux.sh", "-L", SOCKET, "-a"], check=True)
    assert (probe(), tmux("list-sessions", "-F", "#{session_name}", socket="other")) == ({}, "mine")
    tmux("kill-server", socket="other")


def test_stop_is_fine_where_nothing_runs():
    assert run([SCRIPTS / "stop-tmux.sh", "-L", SOCKET, "-a"]).returncode == 0


def test_a_server_can_start_right_after_it_was_stopped(spawn):
    for _ in range(5):
        assert spawn("exec sleep 60").returncode == 0
        run([SCRIPTS / "stop-tmux.sh", "-L", SOCKET, "-a"], check=True)


def test_stop_without_a_name_is_a_usage_error():
    assert run([SCRIPTS / "stop-tmux.sh", "-L", SOCKET]).returncode == 2


# --- send -------------------------------------------------------------------------------------------------------------


def test_text_reaches_the_program_as_it_is(spawn, folder):
    spawn("cat >out")
    done = send("--leading dashes, 'quotes' \"and\" $HOME #{pid} é;")
    wait_until(lambda: (folder / "out").read_text().endswith(";\n"), message="the text")
    assert (done.returncode, (folder / "out").read_text()) == (0, "--leading dashes, 'quotes' \"and\" $HOME #{pid} é;\n")


def test_thirty_kilobytes_of_many_lines_arrive_whole(spawn, folder):
    text = "\n".join(f"line {number} " + "x" * 90 for number in range(300))
    spawn("cat >out")
    send(text)
    wait_until(lambda: (folder / "out").read_text() == f"{text}\n", message="all of the text")


def test_many_lines_are_one_paste_for_a_program_that_asks_for_it(spawn, folder):
    spawn("bash --norc --noprofile")
    wait_until(lambda: re.search(r"[$#] ?$", screen()), message="the prompt")
    send("echo one >>out\necho two >>out")
    wait_until(lambda: (folder / "out").exists() and (folder / "out").read_text() == "one\ntwo\n", message="both commands")
    assert "\x1b[?2004h" in log_of(folder)


def test_a_program_that_shows_nothing_has_not_taken_the_text(spawn):
    spawn("stty raw -echo; echo ready; exec sleep 60")
    wait_until(lambda: "ready" in screen(), message="raw mode")
    assert send("hello").returncode == 4


def test_a_program_that_ignores_enter_has_not_taken_the_text(spawn):
    program = """
import os, tty
tty.setraw(0)
os.write(1, b"ready")
while True:
    os.write(1, os.read(0, 1024).replace(b"\\r", b""))
"""
    spawn(f"exec {shlex.quote(sys.executable)} -c {shlex.quote(program)}")
    wait_until(lambda: "ready" in screen(), message="the program")
    assert send("hello").returncode == 4


def test_without_enter_the_text_waits_in_the_input_line(spawn, folder):
    spawn("cat >out")
    send("not yet", "-n")
    assert ("not yet" in screen(), (folder / "out").read_text()) == (True, "")


def test_text_arrives_though_somebody_has_scrolled_back(spawn, folder):
    spawn("cat >out")
    tmux("copy-mode", "-t", "=agent-001:")
    send("through")
    wait_until(lambda: (folder / "out").read_text() == "through\n", message="the text")


def test_send_to_a_session_that_does_not_exist_is_not_found(spawn):
    spawn("exec sleep 60", "agent-10")
    assert send("hello", name="agent-1").returncode == 3


def test_send_to_a_dead_pane_is_not_found(spawn):
    spawn("true")
    wait_until(is_dead, message="the command to end")
    assert send("hello").returncode == 3


def test_no_text_is_a_usage_error(spawn):
    spawn("cat")
    assert send("\n").returncode == 2


# --- attach -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Run a command on a terminal of its own; what it prints is thrown away."""
    ends: list[int] = []
    started: list[subprocess.Popen[bytes]] = []

    def open_terminal(*argv: str | Path) -> subprocess.Popen[bytes]:
        ours, theirs = pty.openpty()
        ends.extend([ours, theirs])
        process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
        started.append(process)
        return process

    yield open_terminal
    for end in ends:
        os.close(end)
    for process in started:
        process.kill()
        process.wait()


def clients(socket: str = SOCKET) -> list[str]:
    return tmux("list-clients", "-F", "#{session_name}", socket=socket).split()


def test_attach_shows_the_session(spawn, terminal):
    spawn("exec sleep 60", "agent-001", "agent-002")
    terminal(SCRIPTS / "attach-tmux.sh", "-L", SOCKET, "agent-002")
    wait_until(lambda: clients() == ["agent-002"], message="a client of agent-002")


def test_attach_within_the_same_server_switches_the_client(spawn, terminal, sandbox):
    spawn("cat", "agent-001", "agent-002")
    terminal(SCRIPTS / "attach-tmux.sh", "-L", SOCKET, "agent-001")
    wait_until(clients, message="a client")
    tmux("split-window", "-t", "=agent-001:", f"{SCRIPTS}/attach-tmux.sh -L {SOCKET} agent-002")
    wait_until(lambda: clients() == ["agent-002"], message="the client to switch")


def test_attach_within_another_server_attaches_there(spawn, terminal):
    spawn("exec sleep 60")
    tmux("new-session", "-d", "-s", "mine", f"{SCRIPTS}/attach-tmux.sh -L {SOCKET} agent-001", socket="other")
    wait_until(lambda: clients() == ["agent-001"], message="a client from inside the other server")
    tmux("kill-server", socket="other")


def test_attach_to_a_session_that_does_not_exist_is_not_found(spawn):
    spawn("exec sleep 60", "agent-10")
    assert run([SCRIPTS / "attach-tmux.sh", "-L", SOCKET, "agent-1"]).returncode == 3


def test_every_script_prints_its_header_as_help():
    for script in sorted(SCRIPTS.glob("*-tmux.sh")):
        assert re.match(r"Usage: .*" + script.name, run([script, "-h"], check=True).stdout)
