"""kill -9 of the merge queue: of the merger, its process group, its landing, its git, or of all at once, at chosen and at random
moments. Afterwards `merge` must bring everything to the same end as if nothing had happened.

`python tests/test_merge_kills.py --seconds 60 --seed 1` goes on for longer and prints what it counted.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import GIT_CONFIG, SCRIPTS, commit_files, git, wait_until, write_files
from test_merge_queue import GREEN, Queue, find_gate_processes, new_file, no_gate_is_left, outside, queue

__all__ = ["no_gate_is_left", "outside", "queue"]  # fixtures
TOKEN = "GATE_TOKEN"
CONDITION = f"{GREEN} && ! {{ [ -e a.txt ] && [ -e b.txt ]; }}"
KILLS = ("merger", "group", "everything", "landing", "git")
PARTS = {"landing": {str(SCRIPTS / "land.sh"), str(SCRIPTS / "fast-forward.sh")}, "git": {"--ff-only", "farm: land"}}

GIT_THAT_WAITS = """\
#!/bin/sh
# Stops before or after git moves the target, for as long as the file of that name is there.
reach() { [ ! -e "$here/$1" ] || { : >"$here/reached"; while [ -e "$here/$1" ]; do sleep 0.02; done; }; }
here='%s'
case " $* " in
  *" merge --ff-only "* | *" update-ref -m farm"*) reach before; code=0; '%s' "$@" || code=$?; reach after; exit $code ;;
esac
exec '%s' "$@"
"""


class Victim:
    """A merger in a process group of its own, to be killed; what it prints goes to a file."""

    def __init__(self, queue: Queue, gate: str, *options: str, slots: int = 1, **env: str):
        self.queue, self.token = queue, os.environ[TOKEN]
        with (queue.outside / "printed").open("ab") as log:
            self.process = subprocess.Popen(
                queue.argv("merge", "--gate", gate, "--slots", str(slots), *options),
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def kill(self, what: str) -> bool:
        """SIGKILL to one of KILLS; False when it was not there (any more)."""
        found = self.find(what)
        if what == "group" and found:
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if what not in PARTS:
            self.process.wait(20)
        return bool(found)

    def find(self, what: str) -> list[psutil.Process]:
        if what not in PARTS and self.process.poll() is not None:
            return []
        if what in ("merger", "group"):
            return [psutil.Process(self.process.pid)]
        ours = find_gate_processes(self.token)
        return ours if what == "everything" else [process for process in ours if PARTS[what] & set(command_of(process))]

    def wait_for(self, what: str) -> None:
        """Until it runs, or the merger has ended."""
        while self.process.poll() is None and not self.find(what):
            time.sleep(0.002)


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def careful(queue: Queue, condition: str = CONDITION) -> str:
    """A gate that notes when it begins in a slot in which anything of an earlier gate still runs.

    It leaves something behind, and does its work in a process that has cleared the environment, as tox does.
    """
    guard = f'exec 9>>"{queue.outside}/$(basename "$PWD").lock"; flock -n 9 || echo "$PWD" >>{queue.outside}/overlaps; '
    return guard + queue.counted(f"setsid sleep 300 & env -i PATH=\"$PATH\" bash -c '{condition}'; code=$?; exit $code")


def finish(queue: Queue, gate: str, *options: str, slots: int = 1, **env: str) -> None:
    """One merger that nobody disturbs."""
    code = Victim(queue, gate, *options, slots=slots, **env).process.wait(120)
    if code not in (0, 5):
        pytest.fail(f"the merger after the kill exited {code}\n{(queue.outside / 'printed').read_text()[-3000:]}")


def events(queue: Queue, name: str) -> Counter:
    lines = map(json.loads, (queue.folder / "events.jsonl").read_text().splitlines())
    return Counter(line["task"]["id"] for line in lines if line["event"] == name)


def find_violations(queue: Queue, expected: dict[str, str]) -> list[str]:
    """Whatever is not as it would be had nobody been killed; `expected` is each task's state."""
    tree, found = queue.repo / ".git", []
    trailers, states = Counter(queue.landed()), queue.states()
    good = {task_id: 1 for task_id, state in expected.items() if state == "landed"}
    twice = [name for kind in ("landed", "returned") for name, count in events(queue, kind).items() if count > 1]
    checks = {
        "states": (states, expected),
        "landings in the history of main": (dict(trailers), good),
        "moved twice": (twice, []),
        "red values of main": (queue.red_values(CONDITION), []),
        "git status": (git(queue.repo, "status", "--porcelain"), ""),
        "locks in .git": ([str(path.relative_to(tree)) for path in tree.rglob("*.lock")], []),
        "left in .git": ([path.name for path in tree.glob("farm-*")], []),
        "an unfinished landing": ((queue.folder / "merge_queue/landing.json").exists(), False),
        "gates that overlap in a slot": ((queue.outside / "overlaps").exists(), False),
    }
    for what, (is_so, should_be) in checks.items():
        if is_so != should_be:
            found.append(f"{what}: {is_so}, should be {should_be}")
    return found


# ---------------------------------------------------------------------------------------------- around the swap


@pytest.fixture
def waiting_git(queue: Queue) -> Path:
    """A folder with a git that waits at `before` and `after` the swap; it says `reached`."""
    folder = queue.outside / "bin"
    folder.mkdir()
    real = shutil.which("git")
    (folder / "git").write_text(GIT_THAT_WAITS % (folder, real, real))
    (folder / "git").chmod(0o755)
    return folder


def wait_for_either(victim: Victim, path: Path, seconds: float) -> None:
    """Until the file is there, the merger has ended, or the time is over."""
    end = time.monotonic() + seconds
    while victim.process.poll() is None and not path.exists() and time.monotonic() < end:
        time.sleep(0.01)


def merge_up_to(queue: Queue, waiting_git: Path, moment: str) -> Victim:
    """A merger whose landing stands still at that moment."""
    (waiting_git / moment).touch()
    victim = Victim(queue, careful(queue), PATH=f"{waiting_git}:{os.environ['PATH']}")
    wait_until((waiting_git / "reached").exists, 60, f"the landing to come to the moment {moment} the swap")
    return victim


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_merger_killed_while_its_landing_lives_on_lands_once(queue: Queue, waiting_git: Path, moment: str) -> None:
    task_id = queue.ready(new_file("f"))
    merge_up_to(queue, waiting_git, moment).kill("group")
    second = Victim(queue, careful(queue))
    wait_until(lambda: str(second.process.pid) in (queue.folder / "merger.lock").read_text(), 30, "the second merger to begin")
    (waiting_git / moment).unlink()
    assert second.process.wait(60) == 0
    assert find_violations(queue, {task_id: "landed"}) == []


GIT_BETWEEN_FILES_AND_REF = """\
#!/bin/sh
# A fast-forward as git makes it, index and files first, and a stop before the ref; whoever puts files back waits for its end.
here='%s' git='%s'
case " $* " in
  *" merge --ff-only "*)
    for new; do :; done
    old=$("$git" -C "$2" rev-parse HEAD)
    "$git" -C "$2" read-tree -m -u "$old" "$new"
    : >"$here/reached"
    while [ -e "$here/before" ]; do sleep 0.02; done
    "$git" -C "$2" update-ref -m "farm: land" refs/heads/main "$new" "$old"
    : >"$here/landed" ;;
  *" restore -S -W "*) "$git" "$@"; : >"$here/restored"; until [ -e "$here/landed" ]; do sleep 0.02; done ;;
  *) exec "$git" "$@" ;;
esac
"""


def test_a_merger_leaves_the_files_of_a_landing_alone_that_a_killed_one_has_begun(queue: Queue, waiting_git: Path) -> None:
    task_id, folder = queue.ready({"README.md": "new text\n"}), waiting_git
    (folder / "git").write_text(GIT_BETWEEN_FILES_AND_REF % (folder, shutil.which("git")))
    merge_up_to(queue, folder, "before").kill("group")
    second = Victim(queue, careful(queue), PATH=f"{folder}:{os.environ['PATH']}")
    wait_for_either(second, folder / "restored", 3)  # it must wait; where it does not, it puts files back in that time
    (folder / "before").unlink()
    assert second.process.wait(60) == 0
    assert find_violations(queue, {task_id: "landed"}) == []


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_power_cut_around_the_swap_lands_once(queue: Queue, waiting_git: Path, moment: str) -> None:
    task_id = queue.ready(new_file("f"))
    merge_up_to(queue, waiting_git, moment).kill("everything")
    finish(queue, careful(queue))
    assert find_violations(queue, {task_id: "landed"}) == []


@pytest.mark.parametrize("checked_out", [True, False])
def test_locks_that_a_killed_landing_left_are_removed(queue: Queue, waiting_git: Path, checked_out: bool) -> None:
    task_id = queue.ready(new_file("f"))
    git(queue.repo, "branch", "other")
    if not checked_out:
        git(queue.repo, "checkout", "-q", "other")
    (waiting_git / "before").touch()
    victim = Victim(queue, careful(queue), "--into", "main", PATH=f"{waiting_git}:{os.environ['PATH']}")
    wait_until((waiting_git / "reached").exists, 60, "the landing to begin")
    new = json.loads((queue.folder / "merge_queue/landing.json").read_text())["new"]
    write_files(queue.repo / ".git", {"refs/heads/main.lock": f"{new}\n", **({"index.lock": ""} if checked_out else {})})
    victim.kill("everything")
    finish(queue, careful(queue), "--into", "main")
    assert find_violations(queue, {task_id: "landed"}) == []


def test_a_persons_commit_after_a_power_cut_is_the_new_base_of_what_was_about_to_land(queue: Queue, waiting_git: Path) -> None:
    task_id = queue.ready(new_file("f"))
    merge_up_to(queue, waiting_git, "before").kill("everything")
    sha = commit_files(queue.repo, new_file("person"))
    finish(queue, careful(queue))
    assert (git(queue.repo, "rev-parse", "main^1"), find_violations(queue, {task_id: "landed"})) == (sha, [])


def test_a_landing_killed_under_a_living_merger_lands_once(queue: Queue, waiting_git: Path) -> None:
    task_id = queue.ready(new_file("f"))
    victim = merge_up_to(queue, waiting_git, "before")
    victim.kill("landing")
    (waiting_git / "before").unlink()
    victim.process.wait(60)
    finish(queue, careful(queue))
    assert find_violations(queue, {task_id: "landed"}) == []


def test_work_that_is_canceled_after_a_power_cut_does_not_land(queue: Queue, waiting_git: Path) -> None:
    canceled, other = queue.ready_all([new_file("f"), new_file("g")])
    merge_up_to(queue, waiting_git, "before").kill("everything")
    queue.ok("cancel", canceled)
    finish(queue, careful(queue))
    assert find_violations(queue, {canceled: "canceled", other: "landed"}) == []


def test_work_that_is_canceled_in_the_middle_of_its_landing_is_landed(queue: Queue, waiting_git: Path) -> None:
    task_id = queue.ready(new_file("f"))
    victim = merge_up_to(queue, waiting_git, "before")
    queue.ok("cancel", task_id)
    (waiting_git / "before").unlink()
    assert victim.process.wait(60) == 0
    assert find_violations(queue, {task_id: "landed"}) == []


@pytest.mark.parametrize("key", ["old", "new"])
def test_an_intent_whose_commits_are_gone_stops_nothing(queue: Queue, waiting_git: Path, key: str) -> None:
    task_id = queue.ready(new_file("f"))
    merge_up_to(queue, waiting_git, "before").kill("everything")
    path = queue.folder / "merge_queue/landing.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: "1" * 40}))
    finish(queue, careful(queue))
    assert find_violations(queue, {task_id: "landed"}) == []


SLOW = 12


@pytest.mark.parametrize("what", ["git", "landing", "group", "everything"])
def test_a_kill_in_the_middle_of_writing_the_checkout_leaves_it_whole(queue: Queue, what: str) -> None:
    commit_files(queue.repo, {".gitattributes": "*.slow filter=slow\n", "s1.slow": "old\n"})
    git(queue.repo, "config", "filter.slow.smudge", "sleep 0.03; cat")
    task_id = queue.ready({f"s{number}.slow": "new\n" for number in range(SLOW)})
    (queue.repo / "mine.txt").write_text("a person's edit\n")
    victim = Victim(queue, careful(queue))
    wait_until((queue.repo / f"s{SLOW // 3}.slow").exists, 60, "the landing to write files")
    victim.kill(what)
    if what in ("git", "landing"):
        victim.process.wait(60)
    finish(queue, careful(queue))
    (queue.repo / "mine.txt").unlink()  # fails when it is gone
    assert find_violations(queue, {task_id: "landed"}) == []


# ---------------------------------------------------------------------------------------------- around the gates


def blocked_gate(queue: Queue, free_runs: int = 0) -> str:
    """Waits for the test's permission, but for the first `free_runs`."""
    wait = f"[ $(wc -l <{queue.log}) -le {free_runs} ] || until [ -e {queue.go} ]; do sleep 0.02; done"
    return careful(queue, f"{{ {wait}; }}; {CONDITION}")


@pytest.mark.parametrize("what", ["merger", "group"])
def test_gates_of_a_dead_merger_are_ended_before_another_begins(queue: Queue, what: str) -> None:
    ids = queue.ready_all([new_file(f"f{number}") for number in range(3)])
    victim = Victim(queue, blocked_gate(queue), slots=2)
    queue.wait_for_gates(2)
    victim.kill(what)
    queue.go.touch()
    finish(queue, blocked_gate(queue), slots=2)
    assert find_violations(queue, dict.fromkeys(ids, "landed")) == []


def test_a_gate_that_keeps_forking_is_ended_whole_after_its_mergers_death(queue: Queue) -> None:
    task_id = queue.ready(new_file("f"))
    forks = careful(queue, f"until [ -e {queue.go} ]; do sleep 300 & sleep 0.005; done; {CONDITION}")
    victim = Victim(queue, forks)
    queue.wait_for_gates(1)
    victim.kill("merger")
    second = Victim(queue, forks)
    queue.wait_for_gates(2)
    queue.go.touch()
    assert second.process.wait(60) == 0
    assert find_violations(queue, {task_id: "landed"}) == []


def test_verdicts_reached_before_a_kill_are_not_reached_again(queue: Queue) -> None:
    ids = queue.ready_all([new_file(f"f{number}", "BAD\n" if number == 1 else "good\n") for number in range(6)])
    victim = Victim(queue, blocked_gate(queue, 3))
    queue.wait_for_gates(4)
    victim.kill("group")
    known = Counter({tree: len(colours) for tree, colours in queue.verdicts().items()})
    queue.go.touch()
    finish(queue, blocked_gate(queue, 3))
    again = [tree for tree, count in Counter(queue.gated()[4:]).items() if count + known[tree] > 2]
    assert (sum(known.values()), again, queue.landed()) == (3, [], [ids[0], *ids[2:]])


# ---------------------------------------------------------------------------------------------- at random


class Round:
    """A queue that is killed again and again while work comes in, good and bad; style, slots and the like are drawn, too."""

    def __init__(self, queue: Queue, rng: random.Random):
        self.queue, self.rng, self.gate = queue, rng, careful(queue)
        self.options = {"slots": rng.choice([1, 2, 3]), "FARM_STYLE": rng.choice(["merge", "merge", "squash", "rebase"])}
        self.options["FARM_MERGE"] = rng.choice(["", "", "worktree"])
        commit_files(queue.repo, {".gitattributes": "*.txt filter=slow\n"})  # so that git is often at it
        git(queue.repo, "config", "filter.slow.smudge", "sleep 0.01; cat")
        self.remote = queue.outside / "bare.git" if rng.random() < 0.3 else None
        self.expected: dict[str, str] = {}
        self.done, self.serial = Counter(), itertools.count()
        self.settled: set[str] = set()
        self.seen, self.again = 0, []
        if self.remote:
            git(queue.repo, "clone", "-q", "--bare", queue.repo, self.remote)
            git(queue.repo, "remote", "add", "origin", self.remote)
            self.options["FARM_REMOTE"] = "origin"

    def submit(self, works: list[dict[str, str]]) -> None:
        """Work that is bad when it says so, or when it is the later one of the pair."""
        for task_id, files in zip(self.queue.ready_all(works, max_attempts=1), works, strict=True):
            is_bad = "BAD\n" in files.values() or "b.txt" in files
            self.expected[task_id] = "failed" if is_bad else "landed"
            self.done["returned" if is_bad else "landed"] += 1

    def some_work(self, count: int) -> list[dict[str, str]]:
        return [new_file(f"f{next(self.serial)}", "BAD\n" if self.rng.random() < 0.25 else "good\n") for _ in range(count)]

    def kill_once(self) -> None:
        """Start a merger and kill something of it at some moment, perhaps soon after a landing has begun."""
        what, moment, limit = self.rng.choice(KILLS), self.rng.choice(["landing", "git", "any"]), self.rng.uniform(0, 1.5)
        victim, begin = Victim(self.queue, self.gate, **self.options), time.monotonic()
        if what in PARTS or moment != "any":
            victim.wait_for(what if what in PARTS else moment)
            limit = self.rng.uniform(0, 0.1) * (what != "git")
            begin = time.monotonic()
        while victim.process.poll() is None and time.monotonic() < begin + limit:
            time.sleep(0.002)
        self.done[what if victim.kill(what) else "too late"] += 1
        victim.process.wait(120)  # where a part was killed, the merger says so, or does not even notice
        self.note_repeats()

    def note_repeats(self) -> None:
        """Keep the trees that were gated although nobody needed it, and those that nobody needs to gate from now on."""
        gated, verdicts = self.queue.gated(), self.queue.verdicts()
        self.again += [f"gated again although it had its verdict: {tree}" for tree in gated[self.seen :] if tree in self.settled]
        self.settled = {tree for tree, colours in verdicts.items() if "green" in colours or colours.count("red") > 1}
        self.seen = len(gated)

    def run(self, kills: int) -> list[str]:
        """Returns what is wrong at the end."""
        self.submit([*self.some_work(2), new_file("a"), *self.some_work(1), new_file("b")])
        for _ in range(kills):
            self.kill_once()
            self.submit(self.some_work(self.rng.choice([1, 2])))
        finish(self.queue, self.gate, **self.options)
        self.note_repeats()
        self.done["gates"] = self.seen
        wrong = find_violations(self.queue, self.expected) + self.again
        if self.remote and git(self.remote, "rev-parse", "main") != git(self.queue.repo, "rev-parse", "main"):
            wrong.append("the remote's main is not ours")
        return wrong


def test_kills_at_random_lose_and_double_nothing(queue: Queue) -> None:
    assert Round(queue, random.Random(1)).run(4) == []


# ---------------------------------------------------------------------------------------------- a longer campaign


@contextlib.contextmanager
def private_environment() -> Iterator[Path]:
    """What the fixtures do for a test: a folder, git's own settings, a token by which whatever is left is ended."""
    folder = Path(tempfile.mkdtemp(prefix="f-", dir="/tmp"))
    for name in [name for name in os.environ if name.startswith(("FARM_", "GIT_"))]:
        del os.environ[name]
    (folder / "gitconfig").write_text(GIT_CONFIG)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    token = secrets.token_hex(8)
    os.environ.update({"GIT_CONFIG_GLOBAL": str(folder / "gitconfig"), "GIT_CONFIG_NOSYSTEM": "1", "PATH": path, TOKEN: token})
    try:
        yield folder
    finally:
        for process in find_gate_processes(token, f"{folder}/"):
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def make_queue(folder: Path) -> Queue:
    repo, beside = folder / "repo", folder / "outside"
    beside.mkdir(parents=True)
    git(folder, "init", "-q", "-b", "main", repo)
    commit_files(repo, {"README.md": "text\n"})
    return Queue(repo, beside)


def campaign(seconds: float, seed: int) -> int:
    """Round after round until the time is over; 1 when something was wrong, and then the round's folder is kept."""
    totals, number, end = Counter(), 0, time.monotonic() + seconds
    with private_environment() as folder:
        while time.monotonic() < end:
            number += 1
            queue = make_queue(folder / f"round-{number}")
            turn = Round(queue, random.Random(f"{seed}-{number}"))
            wrong = turn.run(10)
            totals += turn.done
            if wrong:
                kept = Path(tempfile.mkdtemp(prefix="merge-kills-"), "round")
                shutil.copytree(queue.repo.parent, kept, symlinks=True)
                print(f"seed {seed}, round {number}, kept in {kept}:", *wrong, sep="\n  ")
                return 1
            shutil.rmtree(queue.repo.parent)
    killed = ", ".join(f"{what} {totals[what]}" for what in KILLS)
    print(f"{number} rounds, {sum(totals[what] for what in KILLS)} kills ({killed}), {totals['too late']} came too late")
    print(f"landed once {totals['landed']}, returned once {totals['returned']}, gates begun {totals['gates']}, violations 0")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    choice = parser.parse_args()
    sys.exit(campaign(choice.seconds, choice.seed))
