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


def find_gate_processes(token: str) -> list[psutil.Process]:
    """What still runs of the gates (and mergers) of the test with this token."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("GATE_TOKEN") == token and process.pid != os.getpid():
                found.append(process)
    return [process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(autouse=True)
def no_gate_is_left(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gates do not inherit the sandbox's own token, so they have one of their own and their reaper here."""
    monkeypatch.setenv("GATE_TOKEN", sandbox.token)
    yield
    left = find_gate_processes(sandbox.token)
    lines = [f"{process.pid}: {' '.join(process.cmdline())}" for process in left]
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


BAD_ONES = {2, 5, 9}


def many_entries(queue: Queue) -> list[str]:
    return queue.ready_all([new_file(f"f{number}", "BAD\n" if number in BAD_ONES else "good\n") for number in range(12)])


@pytest.mark.parametrize("slots", [1, 4])
def test_every_value_of_the_target_passes_the_gate_although_entries_are_bad(queue: Queue, slots: int) -> None:
    many_entries(queue)
    queue.merge(slots=slots, code=5)
    assert queue.red_values() == []


@pytest.mark.parametrize("slots", [1, 4])
def test_exactly_the_bad_entries_come_back(queue: Queue, slots: int) -> None:
    ids = many_entries(queue)
    queue.merge(slots=slots, code=5)
    states = queue.states()
    assert {number for number, task_id in enumerate(ids) if states[task_id] != "landed"} == BAD_ONES


def test_good_entries_that_are_many_take_few_gate_runs(queue: Queue) -> None:
    queue.ready_all([new_file(f"f{number}") for number in range(12)])
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


CONFLICTS = {
    "text": ({"f": "base\n"}, {"f": "one\n"}, {"f": "two\n"}),
    "binary": ({"f": b"\0\1\2" * 90}, {"f": b"\0\1\3" * 90}, {"f": b"\0\1\4" * 90}),
    "rename/rename": ({"f": "a\nb\nc\nd\n" * 9}, {"f": None, "x": "a\nb\nc\nd\n" * 9}, {"f": None, "y": "a\nb\nc\nd\n" * 9}),
    "edit/delete": ({"f": "base\n"}, {"f": None}, {"f": "two\n"}),
    "file/folder": ({}, {"f": "a file\n"}, {"f/inner": "in a folder\n"}),
    "submodule": ({"f": f"{GITLINK} {'1' * 40}"}, {"f": f"{GITLINK} {'2' * 40}"}, {"f": f"{GITLINK} {'3' * 40}"}),
}


@pytest.mark.parametrize("kind", CONFLICTS)
def test_of_two_in_conflict_the_later_comes_back_and_a_third_is_not_touched(queue: Queue, kind: str) -> None:
    base, one, two = CONFLICTS[kind]
    queue.make_branches({"base": base}, git(queue.repo, "rev-parse", "main"))
    git(queue.repo, "merge", "-q", "--ff-only", branch_of("base"))
    first, second, third = queue.ready_all([one, two, new_file("third")])
    queue.merge(code=5)
    assert (queue.landed(), queue.reason(second)) == ([first, third], "it conflicts with main in f")


# ---------------------------------------------------------------------------------------------- guilt


PAIR = "! { [ -e a.txt ] && [ -e b.txt ]; }"


@pytest.mark.parametrize("slots", [1, 4])
def test_of_two_that_fail_only_together_the_earlier_lands_and_the_later_comes_back(queue: Queue, slots: int) -> None:
    ids = queue.ready_all([new_file(name) for name in ("u", "a", "v", "b", "w")])
    queue.merge(PAIR, slots=slots, code=5)
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


def test_a_red_target_pauses_the_queue_and_names_its_commit(queue: Queue) -> None:
    _, sha = red_target(queue)
    said = queue.merge(code=5).stderr
    assert f"main itself is red at {sha[:10]}" in said


def test_a_red_target_blames_nobody(queue: Queue) -> None:
    task_id, _ = red_target(queue)
    queue.merge(code=5)
    task = queue.task(task_id)
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


# ---------------------------------------------------------------------------------------------- odd gates


def test_a_time_out_ends_every_process_of_the_gate(queue: Queue, sandbox: Sandbox) -> None:
    queue.ready(new_file("a"))
    started = queue.outside / "started"
    hang = f"[ ! -e a.txt ] || {{ sleep 300 & setsid sleep 300 & touch {started}; wait; }}"
    queue.merge(hang, code=5, env={"FARM_GATE_TIMEOUT": "1"})
    assert (started.exists(), find_gate_processes(sandbox.token)) == (True, [])


@pytest.mark.parametrize("gate", ["sleep 300", "kill -9 $$", "kill -9 $$; :", "bash -c 'kill -9 $$'; exit"])
def test_a_gate_that_timed_out_or_was_killed_is_no_verdict(queue: Queue, gate: str) -> None:
    queue.ready(new_file("a"))
    queue.merge(f"[ ! -e a.txt ] || {{ {gate}; }}", code=5, env={"FARM_GATE_TIMEOUT": "1"})
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


def test_nothing_lands_by_a_gate_that_changes_tracked_files(queue: Queue) -> None:
    queue.ready(new_file("a"))
    queue.merge("echo more >>README.md", code=5)
    assert queue.landed() == []


def test_a_gate_that_changes_tracked_files_is_named_with_them(queue: Queue) -> None:
    queue.ready(new_file("a"))
    said = queue.merge("echo more >>README.md", code=5).stderr
    assert "the gate changed tracked files: README.md" in said


@pytest.mark.parametrize("command", ["sleep 300", "setsid sleep 300", "nohup sleep 300", "(setsid setsid sleep 300 &)"])
def test_what_a_gate_leaves_running_is_ended(queue: Queue, sandbox: Sandbox, command: str) -> None:
    queue.ready(new_file("a"))
    queue.merge(f"{command} & true")
    assert find_gate_processes(sandbox.token) == []


def test_a_background_process_without_our_environment_is_ended_by_the_slot_it_stands_in(queue: Queue) -> None:
    queue.ready(new_file("a"))
    pid_file = queue.outside / "pid"
    queue.merge(f"env -i setsid sh -c 'echo $$ >{pid_file}; exec sleep 300' & until [ -s {pid_file} ]; do sleep 0.01; done")
    left = [psutil.Process(pid) for pid in [int(pid_file.read_text())] if psutil.pid_exists(pid)]
    for process in left:
        process.kill()
    assert left == []


def test_the_gates_input_is_dev_null(queue: Queue) -> None:
    queue.ready(new_file("a"))
    queue.merge('[ "$(readlink -f /dev/stdin)" = /dev/null ] && ! read -r line')


def test_a_gate_that_needs_a_terminal_is_red_and_does_not_hang(queue: Queue) -> None:
    task_id = queue.ready(new_file("a"))
    queue.merge("[ ! -e a.txt ] || read -r line </dev/tty", code=5)
    assert queue.task(task_id)["attempts"] == 1


def test_a_gate_that_prints_100_mb_leaves_a_small_log(queue: Queue) -> None:
    queue.ready(new_file("a"))
    queue.merge("echo first; head -c 100000000 /dev/zero; echo last")
    assert sum(path.stat().st_size for path in (queue.folder / "results").iterdir()) < 1_000_000


def test_the_log_of_a_gate_that_prints_100_mb_has_its_first_and_last_lines(queue: Queue) -> None:
    queue.ready(new_file("a"))
    queue.merge("echo first; head -c 100000000 /dev/zero | tr '\\0' x; echo last")
    (log,) = (queue.folder / "results").glob("*.log")
    text = log.read_text()
    assert (text[:6], text[-5:]) == ("first\n", "last\n")


def test_bytes_that_are_not_utf_8_come_back_as_readable_text(queue: Queue) -> None:
    task_id = queue.ready(new_file("a"))
    queue.merge("[ ! -e a.txt ] || { printf 'caf\\351 \\377\\033[31mred\\n'; exit 1; }", code=5)
    text = queue.returned_text(task_id)
    assert "caf" in text and "red" in text and "\x1b" not in text


# ---------------------------------------------------------------------------------------------- slots


def test_ignored_caches_stay_in_a_slot_between_runs(queue: Queue) -> None:
    count = f"mkdir -p cache; echo run >>cache/runs; wc -l <cache/runs >{queue.outside}/runs"
    for name in ("a", "b"):
        queue.ready(new_file(name))
        queue.merge(count)
    assert int((queue.outside / "runs").read_text()) == 2


def test_files_that_a_gate_leaves_are_gone_at_the_next_run(queue: Queue) -> None:
    for name in ("a", "b"):
        queue.ready(new_file(name))
        queue.merge("[ ! -e left ] && touch left")
    assert len(queue.landed()) == 2


@pytest.mark.parametrize("variable", ["TMPDIR", "FARM_PORT", "PWD"])
def test_two_gates_at_once_have_each_their_own(queue: Queue, variable: str) -> None:
    queue.ready_all([new_file(f"f{number}") for number in range(4)])
    with queue.merging(f'echo "${variable}" >>{queue.outside}/values; ' + queue.blocked(GREEN), slots=2):
        queue.wait_for_gates(2)
        values = (queue.outside / "values").read_text().split()
    assert len(values) == len(set(values)) == 2


def test_the_gates_tmpdir_is_a_folder(queue: Queue) -> None:
    queue.ready(new_file("a"))
    queue.merge('[ -d "$TMPDIR" ] && touch "$TMPDIR/file"')


def test_what_a_gate_left_in_its_tmpdir_is_gone_at_the_next_run(queue: Queue) -> None:
    for name in ("a", "b"):
        queue.ready(new_file(name))
        queue.merge('[ ! -e "$TMPDIR/file" ] && touch "$TMPDIR/file"')
    assert len(queue.landed()) == 2


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


def test_returned_work_says_what_the_gate_printed(queue: Queue) -> None:
    task_id, _ = returned_entry(queue)
    assert "the words of the gate" in queue.returned_text(task_id)


def test_the_line_that_reproduces_a_failure_does(queue: Queue) -> None:
    task_id, _ = returned_entry(queue)
    line = re.search(r"^to reproduce: (.*)", queue.returned_text(task_id), re.MULTILINE)
    assert line is not None
    done = run(["bash", "-c", line[1]], cwd=queue.repo)
    assert (done.returncode, "the words of the gate" in done.stdout) == (1, True)


def test_returned_work_is_pinned_under_its_attempt(queue: Queue) -> None:
    task_id, commit = returned_entry(queue)
    assert git(queue.repo, "rev-parse", f"refs/farm/returned/{task_id}/1") == commit


def test_the_next_attempt_starts_from_the_returned_commits(queue: Queue) -> None:
    task_id, _ = returned_entry(queue)
    queue.ok("retry", task_id)
    assert queue.claim(AGENT)["task"]["start"] == f"refs/farm/returned/{task_id}/1"


def test_work_that_comes_back_after_its_last_attempt_is_failed(queue: Queue) -> None:
    task_id, _ = returned_entry(queue, max_attempts=1)
    assert queue.task(task_id)["state"] == "failed"


def test_failed_work_outlives_its_branch_and_a_gc(queue: Queue) -> None:
    task_id, commit = returned_entry(queue, max_attempts=1)
    git(queue.repo, "update-ref", "-d", f"refs/heads/{branch_of(task_id)}")
    git(queue.repo, "reflog", "expire", "--expire=now", "--all")
    git(queue.repo, "gc", "-q", "--prune=now")
    assert git(queue.repo, "cat-file", "-t", commit) == "commit"


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


def test_unrelated_edits_in_the_checkout_are_kept_as_they_are(queue: Queue) -> None:
    queue.ready(new_file("a"))
    picture = dirty_checkout(queue)
    before = picture()
    queue.merge()
    assert picture() == before


def test_a_landing_brings_the_checkouts_files_along(queue: Queue) -> None:
    queue.ready(new_file("a"))
    dirty_checkout(queue)
    queue.merge()
    assert (queue.repo / "a.txt").read_text() == "good\n"


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
def test_what_is_in_the_way_in_the_checkout_is_named(queue: Queue, kind: str) -> None:
    path = block_landing(queue, kind)
    assert f"in the way: {path.name}\n" in queue.merge(code=5).stderr


@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_a_landing_with_something_in_the_way_changes_nothing(queue: Queue, kind: str) -> None:
    path = block_landing(queue, kind)

    def picture() -> tuple:
        return path.read_bytes(), (queue.repo / ".git/index").read_bytes(), git(queue.repo, "rev-parse", "HEAD", "main")

    before = picture()
    queue.merge(code=5)
    assert picture() == before


@pytest.mark.parametrize("kind", IN_THE_WAY)
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


def test_an_entry_whose_branch_is_gone_lands_by_its_pin(queue: Queue) -> None:
    task_id = queue.ready(new_file("a"))
    git(queue.repo, "update-ref", "-d", f"refs/heads/{branch_of(task_id)}")
    git(queue.repo, "reflog", "expire", "--expire=now", "--all")
    git(queue.repo, "gc", "-q", "--prune=now")
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
    git(queue.repo, "update-ref", "-d", f"refs/heads/{branch_of(task_id)}")
    git(queue.repo, "update-ref", "-d", f"refs/farm/ready/{task_id}")
    git(queue.repo, "reflog", "expire", "--expire=now", "--all")
    git(queue.repo, "gc", "-q", "--prune=now")
    queue.merge(code=5)
    assert "its commit is gone" in queue.reason(task_id)


# ---------------------------------------------------------------------------------------------- styles, ways, remotes


def test_the_default_style_lands_a_merge_commit_of_the_submitted_head(queue: Queue) -> None:
    task_id = queue.ready(new_file("a"))
    before = git(queue.repo, "rev-parse", "main")
    queue.merge()
    assert git(queue.repo, "log", "-1", "--format=%P", "main").split() == [before, git(queue.repo, "rev-parse", branch_of(task_id))]


def test_squash_lands_one_plain_commit_an_entry(queue: Queue) -> None:
    before = git(queue.repo, "rev-parse", "main")
    queue.ready_all([new_file("a"), new_file("b")])
    queue.merge(GREEN, "--style", "squash")
    parents = [line.split() for line in git(queue.repo, "log", "--format=%P", f"{before}..main").splitlines()]
    assert [len(found) for found in parents] == [1, 1]


def test_rebase_lands_the_entrys_own_commits_in_a_line(queue: Queue) -> None:
    before = git(queue.repo, "rev-parse", "main")
    ids = queue.ready_all([new_file("a"), new_file("b")])
    queue.merge(GREEN, "--style", "rebase")
    subjects = git(queue.repo, "log", "--first-parent", "--reverse", "--format=%s", f"{before}..main").splitlines()
    assert subjects == [f"work of {task_id}" for task_id in ids]


@pytest.mark.parametrize("style", ["merge", "squash", "rebase"])
def test_no_style_lands_a_red_tree(queue: Queue, style: str) -> None:
    queue.ready_all([new_file(f"f{number}", "BAD\n" if number == 2 else "good\n") for number in range(5)])
    queue.merge(GREEN, "--style", style, slots=2, code=5)
    assert queue.red_values() == []


def test_strict_gates_every_commit_of_the_targets_first_parent_line(queue: Queue) -> None:
    before = git(queue.repo, "rev-parse", "main")
    queue.ready_all([new_file(f"f{number}") for number in range(4)])
    queue.merge(GREEN, "--strict", slots=2)
    trees = git(queue.repo, "log", "--first-parent", "--format=%T", f"{before}..main").split()
    assert len(trees) == 4 and set(trees) <= queue.green_trees()


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


def test_a_remote_that_moved_keeps_what_it_has(queue: Queue, bare: Path) -> None:
    queue.ready(new_file("a"))
    sha = push_by_another(queue, bare)
    queue.merge(code=5, env=REMOTE)
    assert git(bare, "rev-parse", "main") == sha


def test_nothing_lands_here_while_the_remote_has_what_we_have_not(queue: Queue, bare: Path) -> None:
    task_id = queue.ready(new_file("a"))
    push_by_another(queue, bare)
    queue.merge(code=5, env=REMOTE)
    assert (queue.landed(), queue.task(task_id)["state"]) == ([], "ready")


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


def test_of_equal_priority_the_first_comes_first(queue: Queue) -> None:
    assert ids_in_order(entry("b", 9, NOW, seq=2), entry("a", 9, NOW, seq=1)) == ["a", "b"]


def test_higher_priority_comes_first(queue: Queue) -> None:
    assert ids_in_order(entry("a", 9, NOW, seq=1), entry("b", 9, NOW, 3, seq=2)) == ["b", "a"]


def test_work_that_waits_does_not_starve_beside_a_steady_stream_of_urgent_work() -> None:
    waiting = [entry("old", 0, NOW, 0, 0)]
    for minute in range(600):
        now = NOW + 60 * minute
        waiting += [entry(f"urgent-{minute}-{twin}", 0, now, 5, 1 + 2 * minute + twin) for twin in range(2)]
        waiting = farm.merge_order(waiting, now)[1:]
        if waiting and all(task.id != "old" for task in waiting):
            break
    assert minute <= 60


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
        merger.send_signal(signal.SIGTERM)
        merger.wait(30)
    assert [row["state"] for row in queue.json("queue")] == ["ready"]


def test_a_second_merge_waits_for_the_first_and_reports_what_it_did(queue: Queue) -> None:
    task_id = queue.ready(new_file("a"))
    with queue.merging(queue.blocked(GREEN)):
        queue.wait_for_gates(1)
        second = queue.start("merge", "--gate", "true", "--json")
        wait_until(lambda: "waiting" in second.stderr.readline(), 20, "the second merge to wait")
        queue.go.touch()
        out, _ = second.communicate(timeout=30)
    assert json.loads(out)["landed"] == [task_id]
