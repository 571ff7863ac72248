"""The merge queue from outside: `farm.py merge` on real repos with scripted gates, and what it leaves behind.

Every entry is made by claim and submit; gates write a line a run to a file outside of all trees, so that runs can be counted.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, Sandbox, commit_files, git, run, wait_until, write_files
from farm_calls import Caller

sys.path[:0] = [str(ROOT)]
import farm  # noqa: E402  (needs the path above)

AGENT = "agent-001"
GREEN = "! grep -rq BAD ."
GITLINK = "160000"
Files = Mapping[str, "str | bytes | None"]


class Queue(Caller):
    """farm.py on a repo with work to merge; what gates append to `log` says which trees they looked at."""

    def __init__(self, repo: Path, outside: Path):
        super().__init__(repo, os.getpid())
        self.log, self.go, self.outside = outside / "gated", outside / "go", outside

    # -- entries

    def ready(self, files: Files, **fields) -> str:
        """One entry that changes `files` (None deletes); its id. `base` names the commit that it starts from."""
        return self.ready_all([files], **fields)[0]

    def ready_all(self, works: Sequence[Files], base: str = "main", **fields) -> list[str]:
        """An entry for each of `works`, submitted in this order; their ids."""
        lines = "\n".join(json.dumps({"title": f"work on {' '.join(files)}", **fields}) for files in works)
        ids = re.findall(r"^\S+", self.ok("add", "-f", "-", input=lines), re.MULTILINE)
        self.make_branches(dict(zip(ids, works, strict=True)), git(self.repo, "rev-parse", base))
        for task_id in ids:
            self.submit_task(task_id)
        return ids

    def make_branches(self, works: Mapping[str, Files], base: str) -> None:
        """A branch with one commit on `base` for each task, by one git and without touching index or checkout."""
        stream = b""
        for task_id, files in works.items():
            stream += f"commit refs/heads/{branch_of(task_id)}\ncommitter A <a@x> 1700000000 +0000\n".encode()
            stream += f"data <<.\nwork of {task_id}\n.\nfrom {base}\n".encode() + b"".join(map(import_line, files.items()))
        subprocess.run(["git", "-C", self.repo, "fast-import", "--quiet", "--force"], input=stream, check=True, timeout=60)

    def submit_task(self, task_id: str, *options: str) -> None:
        claim = self.claim(AGENT, "--id", task_id)
        self.ok("submit", AGENT, "--fence", claim["fence"], *options)

    # -- merging

    def counted(self, condition: str) -> str:
        """A gate of this condition that notes the tree it looks at."""
        return f'git rev-parse "HEAD^{{tree}}" >>{self.log}; {condition}'

    def blocked(self, condition: str) -> str:
        """The same, but it waits until the test lets it go on."""
        return self.counted(f"until [ -e {self.go} ]; do sleep 0.02; done; {condition}")

    def merge(self, condition: str = GREEN, *options: str, slots: int = 1, code: int = 0, env: Mapping[str, str] | None = None):
        """Drain the queue with a counted gate; checks the exit code."""
        done = self("merge", "--gate", self.counted(condition), "--slots", str(slots), *options, env=env)
        if done.returncode != code:
            pytest.fail(f"merge exited {done.returncode}, not {code}\n{done.stdout}{done.stderr}")
        return done

    @contextlib.contextmanager
    def merging(self, gate: str, *options: str, slots: int = 1) -> Iterator[subprocess.Popen[str]]:
        """A merger that runs meanwhile, ended by SIGTERM at the latest."""
        process = self.start("merge", "--gate", gate, "--slots", str(slots), *options)
        try:
            yield process
        finally:
            process.terminate()
            process.communicate(timeout=30)

    # -- what came of it

    def gated(self) -> list[str]:
        """The trees that gates looked at, in order."""
        return self.log.read_text().split() if self.log.exists() else []

    def verdicts(self) -> dict[str, list[str]]:
        """tree -> the colours recorded for it."""
        files = [json.loads(path.read_text()) for path in (self.folder / "results").glob("*.json")]
        return {file["tree"]: [verdict["colour"] for verdict in file["runs"]] for file in files}

    def green_trees(self) -> set[str]:
        return {tree for tree, colours in self.verdicts().items() if "green" in colours}

    def states(self) -> dict[str, str]:
        return {task["id"]: task["state"] for task in self.json("tasks")}

    def landed(self, branch: str = "main") -> list[str]:
        """The Farm-Task trailers of the first-parent line, oldest first."""
        form = "--format=%(trailers:key=Farm-Task,valueonly)"
        return git(self.repo, "log", "--first-parent", "--reverse", form, branch).split()

    def reason(self, task_id: str) -> str:
        return self.task(task_id)["reason"]

    def returned_text(self, task_id: str, attempt: int = 1) -> str:
        return (self.folder / f"returns/{task_id}.{attempt}.txt").read_text()

    def red_values(self, condition: str = GREEN, branch: str = "main") -> list[str]:
        """The values of the branch's reflog whose files fail the gate's condition."""
        return [sha for sha in self.reflog(branch) if not self.is_green(sha, condition)]

    def reflog(self, branch: str = "main") -> list[str]:
        return list(dict.fromkeys(git(self.repo, "reflog", "--format=%H", branch).split()))

    def is_green(self, sha: str, condition: str) -> bool:
        folder = self.outside / f"try-{sha}"
        folder.mkdir()
        run(["bash", "-c", f"git -C '{self.repo}' archive {sha} | tar -x -C '{folder}'"], check=True)
        code = run(["bash", "-c", condition], cwd=folder).returncode
        shutil.rmtree(folder)
        return code == 0

    def summary(self) -> str:
        """What `queue` says in words."""
        return self("queue").stderr

    def wait_for_gates(self, count: int) -> None:
        wait_until(lambda: len(self.gated()) >= count, 30, f"{count} gates to begin")


def branch_of(task_id: str) -> str:
    return f"farm/{AGENT}/{task_id}"


def import_line(change: tuple[str, str | bytes | None]) -> bytes:
    """One file of a commit in the language of git fast-import; `GITLINK sha` as content makes a submodule's entry."""
    path, content = change
    if content is None:
        return f"D {path}\n".encode()
    if isinstance(content, str) and content.startswith(GITLINK):
        return f"M {content} {path}\n".encode()
    data = content.encode() if isinstance(content, str) else content
    return f"M 100644 inline {path}\ndata {len(data)}\n".encode() + data + b"\n"


def find_gate_processes(token: str, folder: str = "") -> list[psutil.Process]:
    """What still runs of the gates (and mergers) of the test with this token, or stands in this folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            ours = process.environ().get("GATE_TOKEN") == token or (folder and process.cwd().startswith(folder))
            if ours and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.fixture(autouse=True)
def no_gate_is_left(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gates do not inherit the sandbox's own token, so they have one of their own and their reaper here."""
    monkeypatch.setenv("GATE_TOKEN", sandbox.token)
    yield
    left = find_gate_processes(sandbox.token, f"{sandbox.root}/")
    lines = [str(process) for process in left]
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    assert lines == [], "left running by this test"


@pytest.fixture
def outside(sandbox: Sandbox) -> Path:
    folder = sandbox.work / "outside"
    folder.mkdir()
    return folder


@pytest.fixture
def queue(make_repo: Callable[..., Path], outside: Path) -> Queue:
    """An empty queue on a repo with a few files."""
    lines = "".join(f"line {number}\n" for number in range(1, 21))
    files = {"README.md": "text\n", "words.txt": "none\n", "long.txt": lines, ".gitignore": "cache/\n"}
    return Queue(make_repo(files=files), outside)


def new_file(name: str, text: str = "good\n") -> dict[str, str]:
    return {f"{name}.txt": text}


def edited_line(number: int, text: str) -> dict[str, str]:
    """long.txt with one line changed: edits of distant lines go together."""
    lines = [f"line {place}\n" for place in range(1, 21)]
    return {"long.txt": "".join([*lines[: number - 1], text + "\n", *lines[number:]])}


# ---------------------------------------------------------------------------------------------- never red


BAD_ONES = {1, 4, 7}


def many_entries(queue: Queue) -> list[str]:
    return queue.ready_all([new_file(f"f{number}", "BAD\n" if number in BAD_ONES else "good\n") for number in range(9)])


@pytest.mark.parametrize("slots", [1, 4])
def test_every_value_of_the_target_passes_the_gate_and_exactly_the_bad_come_back(queue: Queue, slots: int) -> None:
    ids = many_entries(queue)
    queue.merge(slots=slots, code=5)
    states = queue.states()
    assert (queue.red_values(), {number for number, task_id in enumerate(ids) if states[task_id] != "landed"}) == ([], BAD_ONES)


def test_good_entries_that_are_many_take_few_gate_runs(queue: Queue) -> None:
    queue.ready_all([new_file(f"f{number}") for number in range(8)])
    queue.merge()
    assert len(queue.gated()) <= 2


# ---------------------------------------------------------------------------------------------- conflicts


def conflicting_with_main(queue: Queue) -> str:
    task_id = queue.ready({"words.txt": "mine\n"})
    commit_files(queue.repo, {"words.txt": "theirs\n"})
    return task_id


def test_a_conflict_with_the_target_comes_back_with_its_hunks(queue: Queue) -> None:
    task_id = conflicting_with_main(queue)
    queue.merge(code=5)
    text = queue.returned_text(task_id)
    assert re.search(r"<<<<<<<.*\n.*theirs\n(.*\n)*=======\n.*mine\n.*>>>>>>>", text), text


def test_a_conflict_with_the_target_spends_no_gate_run(queue: Queue) -> None:
    conflicting_with_main(queue)
    queue.merge(code=5)
    assert queue.gated() == []


def test_an_entry_that_conflicts_with_one_ahead_is_shown_held_behind_it(queue: Queue) -> None:
    first, second = queue.ready_all([{"words.txt": "one\n"}, {"words.txt": "two\n"}])
    with queue.merging(queue.blocked(GREEN)):
        queue.wait_for_gates(1)
        wait_until(lambda: len({row["state"] for row in queue.json("queue")}) == 2, 20, "two states in the queue")
        shown = {row["id"]: (row["state"], row["reason"]) for row in queue.json("queue")}
    assert shown == {first: ("testing", ""), second: ("held", f"held behind {first}")}


def test_an_entry_held_behind_one_that_comes_back_is_tried_again_and_lands(queue: Queue) -> None:
    first, second = queue.ready_all([{"words.txt": "BAD\n"}, {"words.txt": "two\n"}])
    queue.merge(code=5)
    assert queue.landed() == [second]


def test_an_entry_held_behind_one_that_lands_comes_back(queue: Queue) -> None:
    first, second = queue.ready_all([{"words.txt": "one\n"}, {"words.txt": "two\n"}])
    queue.merge(code=5)
    assert (queue.landed(), queue.task(second)["attempts"]) == ([first], 1)


BASE_FILES = {"text": "base\n", "bin": b"\0\1\2" * 90, "old": "a\nb\nc\nd\n" * 9, "gone": "base\n", "sub": f"{GITLINK} {'1' * 40}"}
ODD_CONFLICTS = {
    "binary": ({"bin": b"\0\1\3" * 90}, {"bin": b"\0\1\4" * 90}),
    "rename/rename": ({"old": None, "x": BASE_FILES["old"]}, {"old": None, "y": BASE_FILES["old"]}),
    "edit/delete": ({"gone": None}, {"gone": "edited\n"}),
    "file/folder": ({"new": "a file\n"}, {"new/inner": "in a folder\n"}),
    "submodule": ({"sub": f"{GITLINK} {'2' * 40}"}, {"sub": f"{GITLINK} {'3' * 40}"}),
}


def test_of_two_in_an_odd_conflict_the_later_comes_back_and_a_third_is_not_touched(queue: Queue) -> None:
    queue.make_branches({"base": BASE_FILES}, git(queue.repo, "rev-parse", "main"))
    git(queue.repo, "merge", "-q", "--ff-only", branch_of("base"))
    pairs = {kind: queue.ready_all(works) for kind, works in ODD_CONFLICTS.items()}
    third = queue.ready(new_file("third"))
    queue.merge(code=5)
    assert queue.landed() == [*(first for first, _ in pairs.values()), third]


# ---------------------------------------------------------------------------------------------- guilt


PAIR = "! { [ -e a.txt ] && [ -e b.txt ]; }"


def test_of_two_that_fail_only_together_the_earlier_lands_and_the_later_comes_back(queue: Queue) -> None:
    ids = queue.ready_all([new_file(name) for name in ("u", "a", "v", "b", "w")])
    queue.merge(PAIR, slots=4, code=5)
    assert queue.landed() == [ids[0], ids[1], ids[2], ids[4]]


def test_the_later_of_two_that_fail_only_together_is_told_its_likely_partner(queue: Queue) -> None:
    ids = queue.ready_all([new_file("u"), {**new_file("a"), **edited_line(2, "a")}, {**new_file("b"), **edited_line(18, "b")}])
    queue.merge(PAIR, code=5)
    assert re.search(rf"by itself it is green.*most likely with {ids[1]} \(long.txt\)", queue.reason(ids[2]))


def test_an_entry_that_is_red_by_itself_is_told_so(queue: Queue) -> None:
    task_id = queue.ready(new_file("a", "BAD\n"))
    queue.merge(code=5)
    assert "by itself it is red, too" in queue.returned_text(task_id)


def test_nobody_comes_back_before_the_gate_was_red_twice(queue: Queue) -> None:
    queue.ready(new_file("a", "BAD\n"))
    commit_files(queue.repo, new_file("main"))  # so that the lone run afterwards looks at another tree
    queue.merge(code=5)
    assert sorted(Counter(queue.gated()).values()) == [1, 1, 2]


def test_a_lone_run_is_spared_when_the_same_tree_has_a_verdict(queue: Queue) -> None:
    queue.ready(new_file("a", "BAD\n"))
    queue.merge(code=5)
    assert max(Counter(queue.gated()).values()) == 2


def red_at_first_sight(outside: Path) -> str:
    """A gate that is red when it sees a tree for the first time, and green from then on."""
    seen = outside / "seen"
    seen.mkdir()
    return f'tree=$(git rev-parse "HEAD^{{tree}}"); [ -e {seen}/$tree ] || {{ touch {seen}/$tree; exit 1; }}'


def test_a_flaky_gate_returns_nobody(queue: Queue, outside: Path) -> None:
    ids = queue.ready_all([new_file(f"f{number}") for number in range(4)])
    queue.merge(red_at_first_sight(outside), slots=2)
    assert queue.landed() == ids


def test_a_flaky_gate_is_reported_with_the_tree_that_was_both(queue: Queue, outside: Path) -> None:
    queue.ready(new_file("a"))
    said = queue.merge(red_at_first_sight(outside)).stderr
    assert f"flaky gate: tree {git(queue.repo, 'rev-parse', 'main^{tree}')[:10]} was both" in said


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
    store = farm.Store(str(queue.repo))
    settings = farm.load_settings(str(queue.repo), {"gate": "true"})
    merges = farm.MergeQueue(store, settings, "main", f"{queue.repo}-farm")

    def end_gates(folder: str) -> None:
        raise farm.FarmError("processes of the gate could not be ended")

    monkeypatch.setattr(farm, "end_gates", end_gates)
    with pytest.raises(farm.FarmError, match="could not be ended"):
        merges.run(threading.Event(), forever=False)


# ---------------------------------------------------------------------------------------------- what stops a merger that watches


def lose_target(queue: Queue) -> Callable[[], object]:
    git(queue.repo, "checkout", "-q", "--detach")
    git(queue.repo, "branch", "-q", "-m", "main", "away")
    return lambda: git(queue.repo, "branch", "-q", "-m", "away", "main")


def leave_lock(queue: Queue) -> Callable[[], object]:
    lock = queue.repo / ".git/index.lock"
    lock.touch()
    return lock.unlink


@pytest.mark.parametrize("stop", [lose_target, leave_lock])
def test_what_stops_a_merger_that_watches_is_shown_and_the_merger_goes_on_by_itself(
    queue: Queue, stop: Callable[[Queue], Callable[[], object]]
) -> None:
    task_id = queue.ready(new_file("a"))
    now = queue.folder / "merge_queue/now.json"
    with queue.merging(queue.counted(GREEN), "--watch", "--into", "main") as merger:
        wait_until(now.exists, 30, "the merger to begin")
        mend = stop(queue)
        second = queue.ready(new_file("b"), base="HEAD")
        wait_until(lambda: json.loads(now.read_text())["trouble"], 60, "the trouble to be shown")
        shown = json.loads(now.read_text())["trouble"]
        mend()
        wait_until(lambda: queue.states()[second] == "landed", 90, "the entry to land")
        assert merger.poll() is None
    assert shown[0] and shown[1]
    assert queue.landed() == [task_id, second]


def test_a_merger_that_ends_again_and_again_is_started_again_and_again(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    queue.ready(new_file("a"))
    settings, begun = farm.load_settings(str(queue.repo), {"gate": "true"}), []
    loop = farm.Farm(farm.Store(str(queue.repo)), settings, "true", "main")

    class Ended:
        returncode = 1

        def __init__(self, *_args, **_options):
            begun.append(self)

        def poll(self) -> int:
            return self.returncode

    monkeypatch.setattr(subprocess, "Popen", Ended)
    for second in range(900):
        loop.tend_merger(1e9 + second)
    assert 100 < len(begun) < 500


def test_a_merger_makes_anew_what_somebody_has_removed_below_coordination(queue: Queue) -> None:
    task_id = queue.ready(new_file("a"))
    for name in ("results", "returns", "logs"):
        shutil.rmtree(queue.folder / name)
    queue.merge()
    assert queue.landed() == [task_id]


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


# ---------------------------------------------------------------------------------------------- returned work


def returned_entry(queue: Queue, **fields) -> tuple[str, str]:
    """(a task whose work came back, the commit that it had submitted)."""
    task_id = queue.ready(new_file("a", "BAD\n"), **fields)
    commit = git(queue.repo, "rev-parse", branch_of(task_id))
    queue.merge(f"echo 'the words of the gate'; {GREEN}", code=5)
    return task_id, commit


def test_returned_work_says_what_the_gate_printed_and_how_to_see_it_again(queue: Queue) -> None:
    task_id, _ = returned_entry(queue)
    text = queue.returned_text(task_id)
    line = re.search(r"^to reproduce: (.*)", text, re.MULTILINE)
    assert line is not None and "\nthe words of the gate" in text
    done = run(["bash", "-c", line[1]], cwd=queue.repo)
    assert (done.returncode, "the words of the gate" in done.stdout) == (1, True)


def test_returned_work_is_pinned_and_the_next_attempt_starts_from_it(queue: Queue) -> None:
    task_id, commit = returned_entry(queue)
    queue.ok("retry", task_id)
    start = queue.claim(AGENT)["task"]["start"]
    assert (start, git(queue.repo, "rev-parse", start)) == (f"refs/farm/returned/{task_id}/1", commit)


def test_work_that_comes_back_after_its_last_attempt_is_failed_and_outlives_its_branch_and_a_gc(queue: Queue) -> None:
    task_id, commit = returned_entry(queue, max_attempts=1)
    forget_branch(queue, task_id)
    assert (queue.task(task_id)["state"], git(queue.repo, "cat-file", "-t", commit)) == ("failed", "commit")


def test_returned_work_that_was_mended_lands(queue: Queue) -> None:
    task_id, commit = returned_entry(queue)
    queue.ok("retry", task_id)
    queue.make_branches({task_id: new_file("a", "mended\n")}, commit)
    queue.submit_task(task_id)
    queue.merge()
    assert queue.landed() == [task_id]


# ---------------------------------------------------------------------------------------------- people at work meanwhile


def test_a_persons_commit_during_a_gate_is_simply_the_new_base(queue: Queue) -> None:
    queue.ready(new_file("a"))
    with queue.merging(queue.blocked(GREEN)) as merger:
        queue.wait_for_gates(1)
        sha = commit_files(queue.repo, new_file("person"))
        queue.go.touch()
        merger.wait(30)
    assert git(queue.repo, "rev-parse", "main^1") == sha


def test_what_lands_after_a_persons_commit_was_gated_together_with_it(queue: Queue) -> None:
    queue.ready(new_file("a"))
    with queue.merging(queue.blocked("! { [ -e a.txt ] && [ -e person.txt ]; }")) as merger:
        queue.wait_for_gates(1)
        commit_files(queue.repo, new_file("person"))
        queue.go.touch()
        merger.wait(30)
    assert queue.landed() == []


def dirty_checkout(queue: Queue) -> Callable[[], tuple]:
    """Edits of every kind that are in nobody's way; the result takes a picture of them."""
    names = ["README.md", "staged.txt", "untracked.bin", "words.txt"]
    write_files(queue.repo, {"README.md": "edited\n", "staged.txt": "new\n", "words.txt": "first\n"})
    git(queue.repo, "add", "staged.txt", "words.txt")
    write_files(queue.repo, {"words.txt": "first\nsecond\n"})
    (queue.repo / "untracked.bin").write_bytes(b"\0\1")
    return lambda: (
        [(queue.repo / name).read_bytes() for name in names],
        git(queue.repo, "diff", "--cached"),
        git(queue.repo, "status", "--porcelain"),
    )


def test_a_landing_brings_files_along_and_keeps_unrelated_edits_as_they_are(queue: Queue) -> None:
    queue.ready(new_file("a"))
    picture = dirty_checkout(queue)
    before = picture()
    queue.merge()
    assert (picture(), (queue.repo / "a.txt").read_text()) == (before, "good\n")


IN_THE_WAY = {"edit": "words.txt", "untracked": "a.txt", "staged": "words.txt"}


def block_landing(queue: Queue, kind: str) -> Path:
    """An entry, and something of a person in its way in the checkout."""
    path = IN_THE_WAY[kind]
    queue.ready({path: "of the entry\n"})
    write_files(queue.repo, {path: "of a person\n"})
    if kind == "staged":
        git(queue.repo, "add", path)
    return queue.repo / path


@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_what_is_in_the_way_in_the_checkout_is_named_and_nothing_is_changed(queue: Queue, kind: str) -> None:
    path = block_landing(queue, kind)

    def picture() -> tuple:
        return path.read_bytes(), (queue.repo / ".git/index").read_bytes(), git(queue.repo, "rev-parse", "HEAD", "main")

    before = picture()
    said = queue.merge(code=5).stderr
    assert (f"in the way: {path.name}\n" in said, picture()) == (True, before)


@pytest.mark.parametrize("kind", ["edit", "untracked"])
def test_the_queue_goes_on_by_itself_when_nothing_is_in_the_way_any_more(queue: Queue, kind: str) -> None:
    path = block_landing(queue, kind)
    with queue.merging(queue.counted(GREEN), "--watch"):
        wait_until(lambda: "in the way" in queue.summary(), 30, "the queue to wait")
        path.unlink()
        if kind != "untracked":
            git(queue.repo, "checkout", "-q", "HEAD", "--", path.name)
        wait_until(lambda: len(queue.landed()) == 1, 30, "the entry to land")


def test_a_target_that_another_worktree_has_checked_out_moves_there_with_its_files(queue: Queue) -> None:
    place = queue.outside / "elsewhere"
    git(queue.repo, "checkout", "-q", "-b", "mine")
    git(queue.repo, "worktree", "add", "-q", place, "main")
    queue.ready(new_file("a"))
    queue.merge(GREEN, "--into", "main")
    assert (git(place, "status", "--porcelain"), (place / "a.txt").exists()) == ("", True)


def test_a_target_that_nobody_has_checked_out_moves_alone(queue: Queue) -> None:
    git(queue.repo, "checkout", "-q", "-b", "mine")
    task_id = queue.ready(new_file("a"))
    queue.merge(GREEN, "--into", "main")
    assert (queue.landed(), git(queue.repo, "status", "--porcelain"), (queue.repo / "a.txt").exists()) == ([task_id], "", False)


# ---------------------------------------------------------------------------------------------- odd entries


def forget_branch(queue: Queue, task_id: str) -> None:
    """Delete a task's branch and all that git would keep only for that branch's sake."""
    git(queue.repo, "update-ref", "-d", f"refs/heads/{branch_of(task_id)}")
    git(queue.repo, "reflog", "expire", "--expire=now", "--all")
    git(queue.repo, "gc", "-q", "--prune=now")


def test_an_entry_whose_branch_is_gone_lands_by_its_pin(queue: Queue) -> None:
    task_id = queue.ready(new_file("a"))
    forget_branch(queue, task_id)
    queue.merge()
    assert queue.landed() == [task_id]


def test_a_branch_that_moves_after_its_submission_lands_as_it_was_submitted(queue: Queue) -> None:
    task_id = queue.ready(new_file("a"))
    submitted = git(queue.repo, "rev-parse", branch_of(task_id))
    queue.make_branches({task_id: new_file("a", "BAD\n")}, "main")
    queue.merge()
    assert git(queue.repo, "rev-parse", "main^2") == submitted


def test_an_entry_that_changes_nothing_is_landed_without_a_commit(queue: Queue) -> None:
    before = git(queue.repo, "rev-parse", "main")
    task_id = queue.ready({})
    queue.merge()
    assert (queue.task(task_id)["state"], git(queue.repo, "rev-parse", "main")) == ("landed", before)


def test_work_without_common_history_comes_back_with_that_reason(queue: Queue) -> None:
    task_id = queue.ok("add", "from nowhere")
    root = git(queue.repo, "commit-tree", "-m", "root", "main^{tree}")
    queue.submit_task(task_id, "--commit", root)
    queue.merge(code=5)
    assert "shares no history with main" in queue.reason(task_id)


def test_work_that_a_person_merged_by_hand_is_landed_without_a_gate_run(queue: Queue) -> None:
    task_id = queue.ready(new_file("a"))
    git(queue.repo, "merge", "-q", "--no-ff", "--no-edit", branch_of(task_id))
    queue.merge()
    assert (queue.task(task_id)["state"], queue.gated()) == ("landed", [])


def test_work_whose_commit_is_gone_comes_back_with_that_reason(queue: Queue) -> None:
    task_id = queue.ready(new_file("a"))
    git(queue.repo, "update-ref", "-d", f"refs/farm/ready/{task_id}")
    forget_branch(queue, task_id)
    queue.merge(code=5)
    assert "its commit is gone" in queue.reason(task_id)


@pytest.mark.parametrize("how", ["the same commit", "the same change"])
def test_work_that_is_contained_in_untested_work_ahead_is_not_taken_for_landed(queue: Queue, how: str) -> None:
    first = queue.ready(new_file("a", "BAD\n"))
    with queue.merging(queue.blocked(GREEN)) as merger:
        queue.wait_for_gates(1)
        if how == "the same commit":
            second = queue.ok("add", "second")
            queue.submit_task(second, "--commit", branch_of(first))
        else:
            second = queue.ready(new_file("a", "BAD\n"), title="second")
        now = queue.folder / "merge_queue/now.json"
        wait_until(lambda: second in json.loads(now.read_text())["order"], 30, "the merger to notice the new entry")
        queue.go.touch()
        merger.wait(30)
    assert (queue.task(second)["attempts"], queue.landed()) == (1, [])


def make_unreadable(repo: Path, revision: str) -> None:
    """Empty an object's file, as a power cut leaves one that git has not fsynced."""
    for pack in (repo / ".git/objects/pack").glob("*.pack"):
        with pack.open("rb") as file:
            pack.unlink()
            subprocess.run(["git", "-C", repo, "unpack-objects", "-q"], stdin=file, check=True, timeout=60)
    sha = git(repo, "rev-parse", revision)
    path = repo / ".git/objects" / sha[:2] / sha[2:]
    path.chmod(0o600)
    path.write_bytes(b"")


@pytest.mark.parametrize("what", ["", "^{tree}", ":words.txt", ":a.txt"])
def test_work_of_which_git_cannot_read_all_comes_back_and_the_rest_lands(queue: Queue, what: str) -> None:
    broken, whole = queue.ready_all([{"words.txt": "none\nand more\n", "a.txt": "mine\n"}, new_file("b")])
    commit_files(queue.repo, {"words.txt": "more\nnone\n"})
    make_unreadable(queue.repo, branch_of(broken) + what)
    queue.merge(code=5)
    task = queue.task(broken)
    assert (queue.landed(), task["attempts"]) == ([whole], 1)
    assert re.search("git cannot read|its commit is gone", task["reason"])


# ---------------------------------------------------------------------------------------------- styles, ways, remotes


SHAPES = {"merge": 2, "squash": 1, "rebase": 1}


@pytest.mark.parametrize("style", SHAPES)
def test_a_style_lands_its_own_shape_of_commits_and_no_red_tree(queue: Queue, style: str) -> None:
    before = git(queue.repo, "rev-parse", "main")
    ids = queue.ready_all([new_file(f"f{number}", "BAD\n" if number == 1 else "good\n") for number in range(4)])
    queue.merge(GREEN, "--style", style, slots=2, code=5)
    parents = git(queue.repo, "log", "--first-parent", "--format=%P", f"{before}..main").splitlines()
    shapes = [len(line.split()) for line in parents]
    assert (queue.red_values(), queue.landed(), shapes) == ([], [ids[0], ids[2], ids[3]], [SHAPES[style]] * 3)


def test_rebase_keeps_the_messages_of_the_entrys_own_commits(queue: Queue) -> None:
    task_id = queue.ready(new_file("a"))
    queue.merge(GREEN, "--style", "rebase")
    assert git(queue.repo, "log", "-1", "--format=%s", "main") == f"work of {task_id}"


def test_strict_gates_every_commit_of_the_targets_first_parent_line(queue: Queue) -> None:
    before = git(queue.repo, "rev-parse", "main")
    queue.ready_all([new_file(f"f{number}") for number in range(4)])
    queue.merge(GREEN, "--strict", slots=2)
    trees = git(queue.repo, "log", "--first-parent", "--format=%T", f"{before}..main").split()
    assert len(trees) == 4 and set(trees) <= queue.green_trees()


def ready_in_steps(queue: Queue, *steps: Files) -> str:
    """An entry of a commit for each of `steps`; its id."""
    task_id = queue.ok("add", f"{len(steps)} steps")
    commit = git(queue.repo, "rev-parse", "main")
    for files in steps:
        queue.make_branches({task_id: files}, commit)
        commit = git(queue.repo, "rev-parse", branch_of(task_id))
    queue.submit_task(task_id)
    return task_id


@pytest.mark.parametrize("slots", [1, 3])
def test_strict_gates_every_commit_that_rebase_puts_on_the_line(queue: Queue, slots: int) -> None:
    before = git(queue.repo, "rev-parse", "main")
    for name in ("a", "b"):
        ready_in_steps(queue, *(new_file(f"{name}{number}") for number in range(3)))
    queue.merge(GREEN, "--strict", "--style", "rebase", slots=slots)
    trees = git(queue.repo, "log", "--first-parent", "--format=%T", f"{before}..main").split()
    assert (len(trees), set(trees) - queue.green_trees()) == (6, set())


def test_strict_returns_work_that_rebase_would_put_on_the_line_with_a_red_commit(queue: Queue) -> None:
    before = git(queue.repo, "rev-parse", "main")
    good, bad, last = (
        ready_in_steps(queue, new_file("a"), new_file("b")),
        ready_in_steps(queue, new_file("c"), new_file("x", "BAD\n"), new_file("x", "mended\n")),
        ready_in_steps(queue, new_file("d"), new_file("e")),
    )
    queue.merge(GREEN, "--strict", "--style", "rebase", slots=2, code=5)
    trees = git(queue.repo, "log", "--first-parent", "--format=%T", f"{before}..main").split()
    assert (queue.landed(), len(trees), set(trees) - queue.green_trees()) == ([good, last], 4, set())
    assert "one of its commits before the last" in queue.reason(bad)
    line = re.search(r"^to reproduce: (.*)", queue.returned_text(bad), re.MULTILINE)
    assert run(["bash", "-c", line[1]], cwd=queue.repo).returncode == 1


def test_rebase_without_strict_gates_the_end_of_an_entry_only(queue: Queue) -> None:
    task_id = ready_in_steps(queue, new_file("x", "BAD\n"), new_file("x", "mended\n"))
    queue.merge(GREEN, "--style", "rebase")
    assert (queue.landed(), len(queue.gated())) == ([task_id], 1)


def test_merging_in_a_scratch_worktree_lands_the_same_commits(queue: Queue) -> None:
    queue.ready_all([new_file("a"), edited_line(2, "a"), edited_line(18, "b"), new_file("bad", "BAD\n")])
    twin = Queue(queue.repo.with_name("twin"), queue.outside)
    shutil.copytree(queue.repo, twin.repo, symlinks=True)
    queue.merge(code=5)
    twin.merge(code=5, env={"FARM_MERGE": "worktree"})
    assert git(queue.repo, "log", "--format=%H", "main") == git(twin.repo, "log", "--format=%H", "main")


@pytest.fixture
def bare(queue: Queue) -> Path:
    """The bare repo that `origin` is."""
    folder = queue.outside / "bare.git"
    git(queue.repo, "clone", "-q", "--bare", queue.repo, folder)
    git(queue.repo, "remote", "add", "origin", folder)
    return folder


REMOTE = {"FARM_REMOTE": "origin"}


def push_by_another(queue: Queue, bare: Path) -> str:
    """What somebody else pushed to the target meanwhile."""
    clone = queue.outside / "clone"
    git(queue.outside, "clone", "-q", bare, clone)
    sha = commit_files(clone, new_file("other"))
    git(clone, "push", "-q", "origin", "main")
    return sha


def test_what_lands_is_pushed(queue: Queue, bare: Path) -> None:
    queue.ready(new_file("a"))
    queue.merge(env=REMOTE)
    assert git(bare, "rev-parse", "main") == git(queue.repo, "rev-parse", "main") == queue.reflog()[0]


def test_nothing_lands_while_the_remote_has_what_we_have_not(queue: Queue, bare: Path) -> None:
    task_id = queue.ready(new_file("a"))
    sha = push_by_another(queue, bare)
    queue.merge(code=5, env=REMOTE)
    assert (git(bare, "rev-parse", "main"), queue.landed(), queue.task(task_id)["state"]) == (sha, [], "ready")


def test_the_queue_goes_on_once_the_remotes_commits_are_here(queue: Queue, bare: Path) -> None:
    queue.ready(new_file("a"))
    push_by_another(queue, bare)
    queue.merge(code=5, env=REMOTE)
    git(queue.repo, "pull", "-q", "--ff-only", "origin", "main")
    queue.merge(env=REMOTE)
    assert git(bare, "rev-parse", "main") == git(queue.repo, "rev-parse", "main")


# ---------------------------------------------------------------------------------------------- order


def entry(name: str, waited: float, now: float, priority: int = 0, seq: int = 0) -> farm.Task:
    return farm.Task(id=name, priority=priority, queue_seq=seq, submitted_at=farm.utc(now - waited))


NOW = 1_800_000_000.0


def ids_in_order(*tasks: farm.Task) -> list[str]:
    return [task.id for task in farm.merge_order(list(tasks), NOW)]


def test_of_equal_priority_the_first_comes_first() -> None:
    assert ids_in_order(entry("b", 9, NOW, seq=2), entry("a", 9, NOW, seq=1)) == ["a", "b"]


def test_higher_priority_comes_first() -> None:
    assert ids_in_order(entry("a", 9, NOW, seq=1), entry("b", 9, NOW, 3, seq=2)) == ["b", "a"]


def test_work_that_waits_does_not_starve_beside_a_steady_stream_of_urgent_work() -> None:
    waiting = [entry("old", 0, NOW, 0, 0)]
    for minute in range(600):
        now = NOW + 60 * minute
        waiting += [entry(f"urgent-{minute}-{twin}", 0, now, 5, 1 + 2 * minute + twin) for twin in range(2)]
        waiting = farm.merge_order(waiting, now)[1:]
        if waiting and all(task.id != "old" for task in waiting):
            break
    assert minute <= 120  # as urgent as they are after 50 minutes, then behind the hundred that came before


# ---------------------------------------------------------------------------------------------- what it shows


def test_the_summary_says_what_landed_came_back_is_tested_and_is_held(queue: Queue) -> None:
    queue.ready_all([new_file("a"), new_file("b", "BAD\n")])
    queue.merge(code=5)
    first, *_ = queue.ready_all([{"words.txt": "one\n"}, {"words.txt": "two\n"}, new_file("c")])
    with queue.merging(queue.blocked(GREEN)):
        queue.wait_for_gates(1)
        wait_until(lambda: "testing" in queue.summary(), 20, "the merger to say what it tests")
        assert f"landed 1 · returned 1 · testing 1 (main+2) · held 1 behind {first}" in queue.summary()


def test_the_queue_shows_nothing_as_tested_once_the_merger_is_gone(queue: Queue) -> None:
    queue.ready(new_file("a"))
    with queue.merging(queue.blocked(GREEN)) as merger:
        queue.wait_for_gates(1)
        wait_until(lambda: [row["state"] for row in queue.json("queue")] == ["testing"], 20, "the entry to be shown as tested")
        merger.kill()
        merger.wait(30)
        queue.go.touch()
    assert [row["state"] for row in queue.json("queue")] == ["ready"]


def test_work_that_is_canceled_during_its_gate_does_not_land(queue: Queue) -> None:
    canceled, other = queue.ready_all([new_file("a"), new_file("b")])
    with queue.merging(queue.blocked(GREEN)) as merger:
        queue.wait_for_gates(1)
        queue.ok("cancel", canceled)
        queue.go.touch()
        merger.wait(30)
    assert queue.landed() == [other]


def test_odd_titles_gates_and_paths_are_no_trouble(make_repo: Callable[..., Path], outside: Path) -> None:
    queue = Queue(make_repo("a 'repo' é"), outside)
    works = [{"with blank.txt": "good\n"}, {"ümlaut.txt": "good\n"}, {"it's.txt": "BAD\n"}]
    good, _, bad = queue.ready_all(works, title="it's \"odd\" $(touch no)\t\\n é \x1b[31m")
    queue.merge(f"true\n{GREEN}  # a comment", code=5)
    line = re.search(r"^to reproduce: (.*)", queue.returned_text(bad), re.MULTILINE)
    assert line is not None
    assert (len(queue.landed()), run(["bash", "-c", line[1]], cwd=queue.repo).returncode) == (2, 1)


def test_a_second_merge_waits_for_the_first_and_reports_what_it_did(queue: Queue) -> None:
    task_id = queue.ready(new_file("a"))
    with queue.merging(queue.blocked(GREEN)):
        queue.wait_for_gates(1)
        second = queue.start("merge", "--gate", "true", "--json")
        wait_until(lambda: "waiting" in second.stderr.readline(), 20, "the second merge to wait")
        queue.go.touch()
        out, _ = second.communicate(timeout=30)
    assert json.loads(out)["landed"] == [task_id]
