"""kill -9 of the merge queue: of the merger, its process group, its landing, its git, or of all at once, at chosen and at random
moments. Afterwards `merge` must bring everything to the same end as if nothing had happened.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
from merge_calls import Queue, new_file
from merge_kills import CONDITION, Round, Victim, careful, find_violations, finish
from sandbox import commit_files, git, wait_until, write_files

pytestmark = pytest.mark.usefixtures("no_gate_is_left")
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


def test_kills_at_random_lose_and_double_nothing(queue: Queue) -> None:
    assert Round(queue, random.Random(1)).run(4) == []
