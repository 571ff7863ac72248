"""Named locks: who gets one, who must wait, which paths exclude each other, and commands run under a lock."""

from __future__ import annotations

import fnmatch
import functools
import itertools
import json
import re
import signal
import sys

import psutil
import pytest
from farm_calls import A, B, C, assert_is_error, living_process
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sandbox import run, wait_until

import farm as toolkit

# ---------------------------------------------------------------------------------------------- lock, unlock, locks


def test_a_lock_that_another_holds_is_refused_and_names_the_holder(farm):
    farm.lock(A, "schema", check=True)
    done = farm.lock(B, "schema")
    assert_is_error(done, 4)
    assert A in done.stderr


def test_lock_again_by_its_holder_changes_nothing(farm):
    farm.lock(A, "schema", check=True)
    before = farm.json("locks")
    farm.lock(A, "schema", check=True)
    assert farm.json("locks") == before


def test_lock_takes_all_names_or_none(farm):
    farm.lock(A, "schema", check=True)
    assert_is_error(farm.lock(B, "port:8080", "schema"), 4)
    assert [lock["agent"] for lock in farm.json("locks")] == [A]


def test_unlock_lets_another_have_it(farm):
    farm.lock(A, "schema", check=True)
    farm.ok("unlock", A, "schema")
    farm.lock(B, "schema", check=True)


def test_unlock_keeps_the_names_that_were_not_given(farm):
    farm.lock(A, "schema", "port:8080", check=True)
    farm.ok("unlock", A, "schema")
    assert_is_error(farm.lock(B, "port:8080"), 4)


def test_unlock_of_what_is_not_held_exits_0(farm):
    farm.ok("unlock", A, "schema")


def test_what_an_agents_command_locks_is_the_agents_own_whoever_leads_its_session(farm):
    """Many a CLI gives each command a session of its own, whose leader is gone with the command."""
    lead = [sys.executable, "-c", "import os, sys; os.setsid(); os.execv(sys.argv[1], sys.argv[1:])"]
    run([*lead, *farm.argv("lock", A, "schema")], env={"FARM_OWNER_PID": str(farm.owner)}, check=True)
    assert farm.json("locks")[0]["owner"]["pid"] == farm.owner
    alone = run([*lead, *farm.argv("lock", B, "port:1")])
    assert (alone.returncode, "--owner-pid PID" in alone.stderr) == (2, True)


def test_unlock_gives_up_nothing_of_another_agent(farm):
    farm.lock(A, "schema", check=True)
    farm.ok("unlock", B, "schema")
    assert_is_error(farm.lock(C, "schema"), 4)


@pytest.mark.parametrize("verb", ["lock", "unlock"])
def test_lock_and_unlock_without_a_name_are_usage_errors(farm, verb):
    farm.refused(2, verb, A)


def test_lock_refuses_an_empty_name(farm):
    assert_is_error(farm.lock(A, ""), 2)


@pytest.mark.parametrize("name", ["a name with spaces", "it's \"quoted\"", "two\nlines", "ünï/çødé", "--help-me", "x" * 300])
def test_a_lock_may_have_any_name(farm, name):
    run(farm.argv("lock", A, "--owner-pid", str(farm.owner), "--", name), check=True)
    assert farm.json("locks")[0]["locks"] == [name]


def test_a_dead_owners_lock_is_taken_over(farm):
    with living_process() as owner:
        farm.ok("lock", A, "schema", "--owner-pid", str(owner.pid))
        owner.kill()
        owner.wait()
    farm.lock(B, "schema", check=True)


def test_a_lock_beside_a_task_keeps_the_task(farm):
    farm.ok("add", "a")
    fence = farm.claim(A)["fence"]
    farm.lock(A, "schema", check=True)
    farm.ok("unlock", A, "schema")
    farm.ok("release", A, "--fence", fence)


def test_a_claim_beside_a_lock_keeps_the_lock(farm):
    farm.ok("add", "a")
    farm.lock(A, "schema", check=True)
    farm.claim(A)
    assert_is_error(farm.lock(B, "schema"), 4)


def test_lock_with_wait_gets_what_is_unlocked_meanwhile(farm):
    farm.lock(A, "schema", check=True)
    waiting = farm.start("lock", B, "schema", "--owner-pid", str(farm.owner), "--wait", "60")
    farm.ok("unlock", A, "schema")
    assert waiting.wait(timeout=60) == 0


def test_lock_with_wait_gets_what_a_dying_owner_held(farm):
    lock_of_the_dead = farm.folder / "agent_locks" / f"{C}.lock"
    with living_process() as owner:
        farm.ok("lock", C, "port:1", "--owner-pid", str(owner.pid))
        owner.kill()
        owner.wait()
    with living_process() as owner:
        farm.ok("lock", A, "schema", "--owner-pid", str(owner.pid))
        waiting = farm.start("lock", B, "schema", "--owner-pid", str(farm.owner), "--wait", "10")
        wait_until(lambda: not lock_of_the_dead.exists(), message="the first look, which ends the dead owner's lock")
        owner.kill()
        owner.wait()
        assert waiting.wait(timeout=60) == 0


def test_lock_with_wait_gives_up_at_its_end(farm):
    farm.lock(A, "schema", check=True)
    assert_is_error(farm.lock(B, "schema", "--wait", "0.2"), 4)


def test_locks_lists_agent_and_names(farm):
    farm.lock(A, "schema", "port:8080", check=True)
    assert [(lock["agent"], sorted(lock["locks"])) for lock in farm.json("locks")] == [(A, ["port:8080", "schema"])]


def test_locks_lists_the_paths_of_a_claimed_task(farm):
    farm.ok("add", "a", "--path", "src/**")
    farm.claim(A)
    assert farm.json("locks")[0]["locks"] == ["path:src/**"]


def test_locks_prints_one_line_a_holder_in_a_pipe(farm):
    farm.lock(A, "schema", check=True)
    farm.lock(B, "two\nlines", check=True)
    assert [line.split("\t")[0] for line in farm.ok("locks").splitlines()] == [A, B]


# ---------------------------------------------------------------------------------------------- path locks and globs


@pytest.mark.parametrize(
    ("held", "wanted", "code"),
    [
        ("path:src/db/**", "path:src/db/a/b.py", 4),
        ("path:src/db/a.py", "path:src/**", 4),
        ("path:src", "path:src/db/a.py", 4),
        ("path:src/*.py", "path:src/a.*", 4),
        ("path:**/test_*.py", "path:src/deep/test_a.py", 4),
        ("path:./src//a", "path:src/a", 4),
        ("path:src/", "path:src/a", 4),
        ("path:src/db", "path:src/dbx", 0),
        ("path:src/*.py", "path:src/a.txt", 0),
        ("path:src/a", "path:src/b", 0),
        ("path:src/[ab].py", "path:src/a.py", 4),
        ("path:src/a?.py", "path:src/a.py", 0),
        ("path:src", "src", 0),
        ("port:8080", "port:8081", 0),
        ("port:*", "port:8080", 0),
    ],
)
def test_path_locks_exclude_each_other_when_one_file_matches_both(farm, held, wanted, code):
    farm.lock(A, held, check=True)
    assert farm.lock(B, wanted).returncode == code


NAMES = ["".join(name) for size in (1, 2) for name in itertools.product("ab", repeat=size)]
PATHS = ["/".join(path) for depth in range(1, 5) for path in itertools.product(NAMES, repeat=depth)]


@functools.cache
def paths_matching(glob: str) -> frozenset:
    """Brute force: the PATHS that `glob` covers. A name covers all below it; `**` is any number of folders."""
    pattern = ""
    for segment in glob.split("/"):
        names = "|".join(name for name in NAMES if fnmatch.fnmatchcase(name, segment)) or "(?!)"
        pattern += "(?:[^/]+/)*" if segment == "**" else f"(?:{names})/"
    covers = re.compile(pattern).match
    return frozenset(path for path in PATHS if covers(path + "/"))


def globs_of(*segments: str) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(segments), min_size=1, max_size=2).map("/".join)


@settings(max_examples=400, deadline=None)
@given(
    globs_of("a", "b", "ab", "*", "?", "a*", "*b", "?a", "[ab]", "[!a]b", "**"),
    globs_of("a", "ba", "*", "b*", "*a", "??", "[b]", "[!b]", "**"),
)
@example("**/a", "b")
@example("a/**", "a")
def test_globs_that_share_a_path_overlap(left, right):
    if paths_matching(left) & paths_matching(right):
        assert toolkit.globs_overlap(left, right)


@settings(max_examples=400, deadline=None)
@given(globs_of("a", "b", "ab", "*", "?", "a*", "*b", "?a", "**"), globs_of("a", "ba", "*", "b*", "*a", "??", "**"))
def test_globs_that_share_no_path_do_not_overlap(left, right):
    if not paths_matching(left) & paths_matching(right):
        assert not toolkit.globs_overlap(left, right)


def test_globs_of_many_folders_and_stars_are_compared_without_going_every_way():
    stars, deep = "**/a/" * 15 + "c", "a/" * 1200
    assert toolkit.globs_overlap(stars, deep + "b/d") and toolkit.globs_overlap(deep + "*", deep + "b")
    assert not toolkit.globs_overlap(deep + "b", deep + "c")


@settings(max_examples=200, deadline=None)
@given(st.text("ab*?[]!/.", max_size=8), st.text("ab*?[]!/.", max_size=8))
def test_overlap_of_globs_is_symmetric(left, right):
    assert toolkit.globs_overlap(left, right) == toolkit.globs_overlap(right, left)


@settings(max_examples=200, deadline=None)
@given(st.text("ab*?[]!/.", max_size=8))
def test_every_glob_overlaps_itself(glob):
    assert toolkit.globs_overlap(glob, glob)


# ---------------------------------------------------------------------------------------------- with-lock


def test_with_lock_runs_the_command_while_it_holds_the_lock(farm):
    inner = [*farm.argv("locks"), "--json"]
    assert json.loads(farm.ok("with-lock", "schema", "--", *inner))[0]["locks"] == ["schema"]


def test_with_lock_gives_the_lock_up_afterwards(farm):
    farm.ok("with-lock", "schema", "port:1", "--", "true")
    assert farm.json("locks") == []


def test_with_lock_gives_the_lock_up_when_the_command_fails(farm):
    farm("with-lock", "schema", "--", "false")
    assert farm.json("locks") == []


@pytest.mark.parametrize(("command", "code"), [("exit 0", 0), ("exit 7", 7), ("exit 200", 200), ("kill -TERM $$", 143)])
def test_with_lock_exits_as_the_command_did(farm, command, code):
    assert farm("with-lock", "schema", "--", "bash", "-c", command).returncode == code


def test_with_lock_hands_arguments_and_input_on_as_they_are(farm):
    words = ["a b", "it's", '"', "$(x)", "", "--json", "--", "é"]
    printed = farm.ok("with-lock", "schema", "--", "bash", "-c", 'printf "<%s>" "$@"; cat', "bash", *words, input="text")
    assert printed == "".join(f"<{word}>" for word in words) + "text"


def test_with_lock_is_refused_when_the_name_is_held(farm):
    farm.lock(A, "schema", check=True)
    farm.refused(4, "with-lock", "schema", "--", "touch", str(farm.repo / "ran"))


def test_with_lock_does_not_run_the_command_when_it_is_refused(farm):
    farm.lock(A, "schema", check=True)
    farm("with-lock", "schema", "--", "touch", str(farm.repo / "ran"))
    assert not (farm.repo / "ran").exists()


@pytest.mark.parametrize("args", [["schema"], ["schema", "--"], ["--", "true"], []])
def test_with_lock_without_name_or_command_is_a_usage_error(farm, args):
    farm.refused(2, "with-lock", *args)


def test_with_lock_of_a_command_that_is_not_there_says_so_and_holds_nothing(farm):
    assert "no-such-command" in farm.refused(3, "with-lock", "schema", "--", "no-such-command")
    assert farm.json("locks") == []


def test_with_lock_waits_for_its_turn(farm):
    farm.lock(A, "schema", check=True)
    waiting = farm.start("with-lock", "schema", "--wait", "60", "--", "echo", "my turn")
    farm.ok("unlock", A, "schema")
    assert waiting.communicate(timeout=60)[0] == "my turn\n"


def test_a_command_under_with_lock_never_runs_on_without_the_lock(farm, sandbox):
    path = sandbox.work / "pid"
    started = farm.start("with-lock", "schema", "--", "bash", "-c", f"echo $$ >{path}; exec sleep 600")
    wait_until(lambda: path.exists() and path.read_text().strip(), message="the command")
    command = psutil.Process(int(path.read_text()))
    started.send_signal(signal.SIGTERM)
    started.wait(timeout=60)
    done = farm.lock(B, "schema")
    still_runs = command.is_running() and command.status() != psutil.STATUS_ZOMBIE
    if still_runs:
        command.kill()
    assert done.returncode == (4 if still_runs else 0)
