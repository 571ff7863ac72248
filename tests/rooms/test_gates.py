"""Gates of the merge queue: a red target, verdicts that are kept, odd gates, slots."""

from __future__ import annotations

import json
import os
import re
import signal
from collections import Counter

import pytest
from merge_calls import GREEN, Queue, find_gate_processes, new_file
from sandbox import NeverStopped, Sandbox, commit_files, git, run, wait_until, write_files

import farm as toolkit

pytestmark = pytest.mark.usefixtures("no_gate_is_left")


# ---------------------------------------------------------------------------------------------- a red target


def red_target(queue: Queue) -> tuple[str, str]:
    """(a good entry, the commit of a person that broke the target)."""
    task_id = queue.ready(new_file("a"))
    return task_id, commit_files(queue.repo, new_file("broken", "BAD\n"))


def test_a_red_target_pauses_the_queue_names_its_commit_and_blames_nobody(queue: Queue) -> None:
    task_id, sha = red_target(queue)
    said = queue.merge(code=5).stderr
    task = queue.task(task_id)
    assert re.search(rf"main itself is red at {sha[:10]}.*\n  try: \S", said), said
    assert (task["state"], task["attempts"]) == ("ready", 0)


def test_a_paused_queue_goes_on_by_itself_after_a_persons_fix(queue: Queue) -> None:
    task_id, _ = red_target(queue)
    with queue.merging(queue.counted(GREEN), "--watch"):
        wait_until(lambda: "itself is red" in queue.summary(), 30, "the queue to pause")
        commit_files(queue.repo, new_file("broken", "mended\n"))
        wait_until(lambda: queue.landed() == [task_id], 30, "the entry to land")


def test_an_entry_that_mends_the_red_target_lands(queue: Queue) -> None:
    commit_files(queue.repo, new_file("broken", "BAD\n"))
    task_id = queue.ready(new_file("broken", "mended\n"))
    queue.merge()
    assert queue.landed() == [task_id]


@pytest.mark.parametrize("broken", ["false", "kill -9 $$"])
def test_a_queue_paused_by_its_surroundings_goes_on_by_itself_and_blames_nobody(queue: Queue, broken: str) -> None:
    task_id, flag = queue.ready(new_file("a")), queue.outside / "broken"
    flag.touch()
    with queue.merging(queue.counted(f"[ ! -e {flag} ] || {broken}"), "--watch"):
        wait_until(lambda: "itself" in queue.summary(), 30, "the queue to pause")
        flag.unlink()
        hint = json.loads((queue.folder / "merge_queue/now.json").read_text())["trouble"][1]
        if broken == "false":  # verdicts stay until somebody does what the hint says
            run(["bash", "-c", hint.partition("again: ")[2]], check=True)
        wait_until(lambda: queue.task(task_id)["state"] != "ready", 60, "the entry to leave the queue")
    assert (queue.landed(), queue.task(task_id)["attempts"]) == ([task_id], 0)


# ---------------------------------------------------------------------------------------------- verdicts are kept


def gated_but_blocked(queue: Queue, **options) -> str:
    """An entry whose tree is green, and an untracked file of a person that keeps it from landing; its path."""
    queue.ready(new_file("a"))
    write_files(queue.repo, new_file("a", "in the way\n"))
    queue.merge(code=5, **options)
    return str(queue.repo / "a.txt")


def test_the_same_tree_is_not_gated_again_after_a_restart(queue: Queue) -> None:
    os.unlink(gated_but_blocked(queue))
    queue.merge()
    assert len(queue.gated()) == 1


def test_another_gate_command_gates_the_same_tree_again(queue: Queue) -> None:
    os.unlink(gated_but_blocked(queue))
    queue.merge(f"{GREEN} && true")
    assert len(queue.gated()) == 2


@pytest.mark.parametrize(("listed", "runs"), [("FLAVOUR", 2), ("OTHER", 1)])
def test_a_changed_variable_gates_the_same_tree_again_when_it_is_listed(queue: Queue, listed: str, runs: int) -> None:
    os.unlink(gated_but_blocked(queue, env={"FARM_GATE_ENV": listed, "FLAVOUR": "sweet"}))
    queue.merge(env={"FARM_GATE_ENV": listed, "FLAVOUR": "sour"})
    assert len(queue.gated()) == runs


def gate_events(queue: Queue) -> Counter:
    """(slot, tree) -> how many gates began there more than ended, by the history."""
    events = [json.loads(line) for line in (queue.folder / "events.jsonl").read_text().splitlines()]
    count = Counter()
    for event in events:
        if event["event"].startswith("gate-"):
            count[event["slot"], event["tree"]] += 1 if event["event"] == "gate-started" else -1
    return count


def test_a_gate_that_nobody_needs_any_more_has_its_end_in_the_history(queue: Queue) -> None:
    queue.ready(new_file("a"))
    with queue.merging(queue.blocked(GREEN)) as merger:
        queue.wait_for_gates(1)
        commit_files(queue.repo, new_file("person"))
        wait_until(lambda: len(queue.gated()) > 1, 30, "a gate on the new base")
        queue.go.touch()
        merger.wait(30)
    assert (len(gate_events(queue)), set(gate_events(queue).values())) == (2, {0})


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_each_gate_of_a_merger_that_was_ended_has_its_end_in_the_history_after_the_next_merge(queue: Queue, name: str) -> None:
    queue.ready_all([new_file("a"), new_file("b", "BAD\n")])
    with queue.merging(queue.blocked(GREEN)) as merger:
        queue.wait_for_gates(1)
        merger.send_signal(signal.Signals[name])
        merger.wait(30)
    open_gates = sum(gate_events(queue).values())
    queue.merge(code=5)
    assert (open_gates, set(gate_events(queue).values())) == (name == "SIGKILL", {0})


def test_torn_and_edited_lines_of_the_history_stop_no_merger(queue: Queue) -> None:
    task_id = queue.ready(new_file("a"))
    lines = ['{"event": "gate-started", "slot": 1, "tree": "t"}', '{"event": "gate-started", "slot": [1], "tree": {}, "ids": 1}',
             '{"event": "gate-started", "slot": 1', '{"event": "gate-ended", "slot": 2, "tree": "t"}', '["event": "gate-"]']
    with (queue.folder / "events.jsonl").open("a") as file:
        file.write("\n".join(lines) + "\n")
    queue.merge()
    assert queue.landed() == [task_id]


# ---------------------------------------------------------------------------------------------- odd gates


def test_a_time_out_ends_every_process_of_the_gate(queue: Queue, sandbox: Sandbox) -> None:
    queue.ready(new_file("a"))
    started = queue.outside / "started"
    hang = f"[ ! -e a.txt ] || {{ sleep 300 & setsid sleep 300 & touch {started}; wait; }}"
    queue.merge(hang, code=5, env={"FARM_GATE_TIMEOUT": "0.5"})
    assert (started.exists(), find_gate_processes(sandbox.token)) == (True, [])


@pytest.mark.parametrize("gate", ["sleep 300", "kill -9 $$", "bash -c 'kill -9 $$'; exit"])
def test_a_gate_that_timed_out_or_was_killed_is_no_verdict(queue: Queue, gate: str) -> None:
    queue.ready(new_file("a"))
    queue.merge(f"[ ! -e a.txt ] || {{ {gate}; }}", code=5, env={"FARM_GATE_TIMEOUT": "0.5"})
    colours = {colour for tree in queue.verdicts().values() for colour in tree}
    assert colours <= {"none", "green"}


def test_an_entry_whose_gate_times_out_comes_back_with_that_reason(queue: Queue) -> None:
    task_id = queue.ready(new_file("a"))
    queue.merge("[ ! -e a.txt ] || sleep 300", code=5, env={"FARM_GATE_TIMEOUT": "0.5"})
    assert "took longer than" in queue.reason(task_id)


def test_of_many_only_the_entry_whose_gate_times_out_comes_back(queue: Queue) -> None:
    ids = queue.ready_all([new_file(name) for name in ("u", "v", "a", "w")])
    queue.merge("[ ! -e a.txt ] || sleep 300", code=5, env={"FARM_GATE_TIMEOUT": "0.5"})
    assert queue.landed() == [ids[0], ids[1], ids[3]]


@pytest.mark.parametrize("gate", ["sleep 300", "kill -9 $$", "echo more >>README.md"])
def test_a_gate_that_gives_no_verdict_on_the_target_either_blames_nobody(queue: Queue, gate: str) -> None:
    task_id = queue.ready(new_file("a"))
    queue.merge(gate, code=5, env={"FARM_GATE_TIMEOUT": "0.5"})
    task = queue.task(task_id)
    assert (task["state"], task["attempts"]) == ("ready", 0)


def test_a_gate_that_changes_tracked_files_lands_nothing_and_is_named_with_them(queue: Queue) -> None:
    queue.ready(new_file("a"))
    said = queue.merge("echo more >>README.md", code=5).stderr
    assert ("the gate changed tracked files: README.md" in said, queue.landed()) == (True, [])


def test_what_a_gate_leaves_running_is_ended(queue: Queue, sandbox: Sandbox) -> None:
    queue.ready(new_file("a"))
    queue.merge("sleep 300 & setsid sleep 301 & nohup sleep 302 & (setsid setsid sleep 303 &) & true")
    assert find_gate_processes(sandbox.token) == []


def test_the_gates_input_is_dev_null(queue: Queue) -> None:
    queue.ready(new_file("a"))
    queue.merge('[ "$(readlink -f /dev/stdin)" = /dev/null ] && ! read -r line')


def test_a_gate_that_needs_a_terminal_is_red_and_does_not_hang(queue: Queue) -> None:
    task_id = queue.ready(new_file("a"))
    queue.merge("[ ! -e a.txt ] || read -r line </dev/tty", code=5)
    assert queue.task(task_id)["attempts"] == 1


def test_a_gate_that_prints_100_mb_leaves_a_small_log_with_its_first_and_last_lines(queue: Queue) -> None:
    queue.ready(new_file("a"))
    queue.merge("echo first; head -c 100000000 /dev/zero; echo last")
    (log,) = (queue.folder / "results").glob("*.log")
    text = log.read_text()
    assert (text[:6], text[-5:], len(text) < 1_000_000) == ("first\n", "last\n", True)


def test_bytes_that_are_not_utf_8_come_back_as_readable_text(queue: Queue) -> None:
    task_id = queue.ready(new_file("a"))
    queue.merge("[ ! -e a.txt ] || { printf 'caf\\351 \\377\\033[31mred\\n'; exit 1; }", code=5)
    text = queue.returned_text(task_id)
    assert "caf" in text and "red" in text and "\x1b" not in text


def test_a_gate_that_cannot_be_ended_stops_the_merger_instead_of_holding_its_slot_for_ever(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.ready(new_file("a"))
    store = toolkit.Store(str(queue.repo))
    settings = toolkit.load_settings(str(queue.repo), {"gate": "true"})
    merges = toolkit.MergeQueue(store, settings, "main", f"{queue.repo}-farm")

    def end_gates(folder: str) -> None:
        raise toolkit.FarmError("processes of the gate could not be ended")

    monkeypatch.setattr(toolkit, "end_gates", end_gates)
    with pytest.raises(toolkit.FarmError, match="could not be ended"):
        toolkit.Merger(merges, forever=False).run(NeverStopped())


# ---------------------------------------------------------------------------------------------- slots


def test_between_two_runs_a_slot_keeps_ignored_caches_and_nothing_else(queue: Queue) -> None:
    look = f'mkdir -p cache; ls -d cache/* left "$TMPDIR"/* >>{queue.outside}/seen 2>/dev/null'
    for name in ("a", "b"):
        queue.ready(new_file(name))
        queue.merge(f'{look}; touch cache/kept left "$TMPDIR/file"')
    assert (queue.outside / "seen").read_text().split() == ["cache/kept"]


def test_two_gates_at_once_have_each_their_own_folder_tmpdir_and_port(queue: Queue) -> None:
    queue.ready_all([new_file(f"f{number}") for number in range(4)])
    note = f'[ -d "$TMPDIR" ] && echo "$PWD $TMPDIR $FARM_PORT" >>{queue.outside}/values; '
    with queue.merging(note + queue.blocked(GREEN), slots=2):
        queue.wait_for_gates(2)
        first, second = (line.split() for line in (queue.outside / "values").read_text().splitlines())
    assert [one != other for one, other in zip(first, second, strict=True)] == [True, True, True]


def test_urgent_work_that_comes_later_restarts_no_running_gate(queue: Queue) -> None:
    first = queue.ready(new_file("a"))
    with queue.merging(queue.blocked(GREEN)) as merger:
        queue.wait_for_gates(1)
        urgent = queue.ready(new_file("b"), priority=9)
        now = queue.folder / "merge_queue/now.json"
        wait_until(lambda: urgent in json.loads(now.read_text())["order"], 30, "the merger to notice the new entry")
        queue.go.touch()
        merger.wait(30)
    tree = git(queue.repo, "rev-parse", "main~1^{tree}")
    assert (queue.landed(), queue.gated().count(tree)) == ([first, urgent], 1)
