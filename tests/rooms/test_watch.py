"""`status --watch`: its frames, its keys, and the terminal that it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import termios
import time

import psutil
import pytest
from farm_calls import A, bytes_below
from sandbox import git, wait_until
from screens import Screen, up

import farm as toolkit

pytestmark = pytest.mark.usefixtures("farm_cleanup")  # farms are left running at the end of a test


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


def test_watch_can_be_suspended_in_any_step_of_its_drawing(farm, screen):
    """A handler that writes by what it interrupts would raise: the signal comes a little later each time."""
    one = watch(screen)
    process = psutil.Process(one.process.pid)
    for number in range(60):
        process.send_signal(signal.SIGTSTP)
        wait_until(lambda: process.status() == psutil.STATUS_STOPPED, message="the stop")
        process.send_signal(signal.SIGCONT)
        time.sleep(number / 20_000)
    one.wait_for("q leave", len(one.read()))
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


def crowd(farm) -> None:
    """200 tasks in all states, twelve of them for a review, and 50 agents at work."""
    with toolkit.Store(str(farm.repo)).transaction() as tx:
        queue, owner = toolkit.TaskQueue(tx), toolkit.identify(os.getpid())
        queue.add([toolkit.Task(title=f"{'a title as long as people write them ' * 2}{n}") for n in range(1, 201)], 3)
        for number in range(1, 31):
            claim = queue.claim("agent-099", owner, f"t-{number:04d}")
            if number > 27:
                queue.fail("agent-099", claim.fence, "no use", retry=False)
            else:
                queue.submit("agent-099", claim.fence, "", f"{number:040x}")
        for number in range(1, 51):
            queue.claim(f"agent-{number:03d}", owner, f"t-{number + 100:04d}")
    reviews = {f"t-{number:04d}": f"{number:040x}" for number in range(2, 14)}
    (farm.folder / "merge_queue/now.json").write_text(json.dumps({"reviews": reviews}))


def test_fifty_agents_and_two_hundred_tasks_fit_on_a_small_screen(farm, screen):
    crowd(farm)
    one = watch(screen)
    shown = frames(one.read())[-1]
    text = "\n".join(shown)
    assert len(shown) == 24 and max(map(len, shown)) <= 80, text
    assert " 0/200 tasks" not in text and " 3/200 tasks" in shown[1], "the failed ones are over"
    assert sum(line.startswith("agent-") for line in shown) >= 8 and re.search(r"^\.\.\. \d+ more$", text, re.M), text
    assert "tasks: claimed 50 \u00b7 failed 3 \u00b7 pending 120 \u00b7 ready 27" in shown
    assert "review 12 \u00b7 ready 15" in text and shown[-1].startswith("v y n review")
    steps = [step["what"] for step in json.loads(farm("status", "--json").stdout)["next"]]
    assert steps[0].startswith("t-0002 and 11 more wait for a review") and steps[1].startswith("no loop runs")
    assert len([line for line in shown if line.startswith("next: ")]) == len(steps) == 5, "nothing hides behind the reviews"
    one.type("q")
    assert one.end() == 0


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
    (farm.folder / "loop.json").write_text(json.dumps({"work": {f"{A}/t-0001": [0, 3]}}))
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
