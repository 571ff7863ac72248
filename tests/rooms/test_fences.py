"""renew, release, fail and submit: fences and repeats."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess

import pytest
from farm_calls import A, B, bytes_below, living_process, lock_file, make_commit
from sandbox import git, wait_until

MOVES = {
    "submit": ["--commit", "HEAD"],
    "fail": ["--why", "it did not work"],
    "release": [],
}
WITH_FENCE = {**MOVES, "renew": []}


@pytest.mark.parametrize("fence", ["t-0001.1", "t-0009.2", "nonsense", "../../x.2", "t-0001"])
def test_a_fence_that_never_was_is_refused(farm, fence):
    farm.ok("add", "a")
    farm.claim(A)
    farm.refused(4, "submit", A, "--fence", fence, "--commit", "HEAD")


@pytest.mark.parametrize("verb", WITH_FENCE)
def test_a_refused_fence_changes_nothing(farm, verb):
    farm.ok("add", "a")
    farm.claim(A)
    before = bytes_below(farm.folder)
    farm.refused(4, verb, A, "--fence", "t-0001.99", *WITH_FENCE[verb])
    assert bytes_below(farm.folder) == before


@pytest.mark.parametrize("verb", WITH_FENCE)
def test_another_agents_fence_is_refused(farm, verb):
    farm.ok("add", "a")
    fence = farm.claim(A)["fence"]
    farm.refused(4, verb, B, "--fence", fence, *WITH_FENCE[verb])


@pytest.mark.parametrize("verb", WITH_FENCE)
def test_a_missing_fence_is_a_usage_error(farm, verb):
    farm.ok("add", "a")
    farm.claim(A)
    farm.refused(2, verb, A, *WITH_FENCE[verb])


@pytest.mark.parametrize("verb", WITH_FENCE)
def test_the_fence_may_come_from_the_environment(farm, verb):
    farm.ok("add", "a")
    farm.ok(verb, A, *WITH_FENCE[verb], env={"FARM_FENCE": farm.claim(A)["fence"]})


@pytest.mark.parametrize("verb", MOVES)
def test_a_move_that_is_repeated_exits_0(farm, verb):
    farm.ok("add", "a")
    fence = farm.claim(A)["fence"]
    farm.ok(verb, A, "--fence", fence, *MOVES[verb])
    farm.ok(verb, A, "--fence", fence, *MOVES[verb])


@pytest.mark.parametrize("verb", MOVES)
def test_a_move_that_is_repeated_changes_nothing(farm, verb):
    farm.ok("add", "a")
    fence = farm.claim(A)["fence"]
    farm.ok(verb, A, "--fence", fence, *MOVES[verb])
    before = bytes_below(farm.folder)
    farm.ok(verb, A, "--fence", fence, *MOVES[verb])
    assert bytes_below(farm.folder) == before


@pytest.mark.parametrize(("first", "second"), [*itertools.permutations(MOVES, 2)])
def test_a_claim_that_has_ended_cannot_end_otherwise(farm, first, second):
    farm.ok("add", "a")
    fence = farm.claim(A)["fence"]
    farm.ok(first, A, "--fence", fence, *MOVES[first])
    farm.refused(4, second, A, "--fence", fence, *MOVES[second])


def test_a_submit_repeated_after_the_landing_exits_0(farm):
    farm.ok("add", "a")
    fence = farm.submit(A, {"a.txt": "a"})["fence"]
    farm.ok("merge")
    farm.ok("submit", A, "--fence", fence)


def test_the_old_fence_is_refused_once_the_task_is_claimed_again(farm):
    farm.ok("add", "a")
    old = farm.claim(A)["fence"]
    farm.ok("release", A, "--fence", old)
    farm.claim(A)
    farm.refused(4, "release", A, "--fence", old)


def test_fences_of_a_task_rise(farm):
    farm.ok("add", "a")
    first = farm.claim(A)["fence"]
    farm.ok("release", A, "--fence", first)
    assert int(farm.claim(A)["fence"].split(".")[1]) > int(first.split(".")[1])


def test_renew_counts_up_in_the_lock_file(farm):
    farm.ok("add", "a")
    fence = farm.claim(A)["fence"]
    farm.ok("renew", A, "--fence", fence)
    farm.ok("renew", A, "--fence", fence)
    assert json.loads(lock_file(farm, A).read_text())["renewals"] == 2


def test_renew_keeps_the_fence(farm):
    farm.ok("add", "a")
    fence = farm.claim(A)["fence"]
    farm.ok("renew", A, "--fence", fence)
    farm.ok("release", A, "--fence", fence)


def test_release_counts_no_attempt(farm):
    farm.ok("add", "a")
    farm.ok("release", A, "--fence", farm.claim(A)["fence"])
    assert farm.task("t-0001")["attempts"] == 0


def test_a_released_task_can_be_claimed_at_once(farm):
    farm.ok("add", "a")
    farm.ok("release", A, "--fence", farm.claim(A)["fence"])
    assert farm.claim(B)["task"]["id"] == "t-0001"


def test_fail_needs_a_reason(farm):
    farm.ok("add", "a")
    farm.refused(2, "fail", A, "--fence", farm.claim(A)["fence"])


def test_fail_keeps_the_reason(farm):
    farm.ok("add", "a")
    farm.ok("fail", A, "--fence", farm.claim(A)["fence"], "--why", "the API is gone")
    assert farm.task("t-0001")["reason"] == "the API is gone"


def test_a_task_fails_for_good_after_its_last_attempt(farm):
    farm.ok("add", "a", "--max-attempts", "2")
    for _ in range(2):
        farm.ok("fail", A, "--fence", farm.claim(A, "--wait", "20")["fence"], "--why", "no")
    assert (farm.task("t-0001")["state"], farm.task("t-0001")["attempts"]) == ("failed", 2)


def test_fail_with_no_retry_fails_for_good_at_once(farm):
    farm.ok("add", "a")
    farm.ok("fail", A, "--fence", farm.claim(A)["fence"], "--why", "no", "--no-retry")
    assert farm.task("t-0001")["state"] == "failed"


def test_a_failed_task_cannot_be_claimed(farm):
    farm.ok("add", "a")
    farm.ok("fail", A, "--fence", farm.claim(A)["fence"], "--why", "no", "--no-retry")
    farm.refused(3, "claim", A, "--owner-pid", str(farm.owner))


def test_submit_puts_the_head_of_the_tasks_branch_into_the_queue(farm):
    farm.ok("add", "a")
    farm.submit(A, {"a.txt": "a"})
    assert farm.json("queue")[0]["commit"] == git(farm.repo, "rev-parse", f"refs/heads/farm/{A}/t-0001")


def test_submit_takes_another_branch(farm):
    farm.ok("add", "a")
    git(farm.repo, "update-ref", "refs/heads/mine", make_commit(farm.repo, {"a.txt": "a"}))
    farm.ok("submit", A, "--fence", farm.claim(A)["fence"], "--branch", "mine")
    assert farm.json("queue")[0]["commit"] == git(farm.repo, "rev-parse", "refs/heads/mine")


def test_submit_takes_a_commit(farm):
    farm.ok("add", "a")
    commit = make_commit(farm.repo, {"a.txt": "a"})
    farm.ok("submit", A, "--fence", farm.claim(A)["fence"], "--commit", commit[:12])
    assert farm.json("queue")[0]["commit"] == commit


def test_submit_pins_the_head(farm):
    farm.ok("add", "a")
    farm.submit(A, {"a.txt": "a"})
    assert git(farm.repo, "rev-parse", "refs/farm/ready/t-0001") == farm.json("queue")[0]["commit"]


GIT_THAT_WAITS = """\
#!/bin/sh
here='%s'
case "$*" in *update-ref*) ;; *) exec '%s' "$@" ;; esac
: >"$here/reached"
until [ -e "$here/go" ]; do sleep 0.02; done
'%s' "$@"
: >"$here/done"
"""


@pytest.mark.parametrize("when", ["it lives", "it was killed"])
def test_a_late_agents_pin_does_not_come_after_that_of_the_next_claims_submission(farm, sandbox, when):
    folder = sandbox.work / "bin"
    folder.mkdir()
    (folder / "git").write_text(GIT_THAT_WAITS % (folder, shutil.which("git"), shutil.which("git")))
    (folder / "git").chmod(0o755)
    farm.ok("add", "a")
    first, second = (make_commit(farm.repo, {"a.txt": text}) for text in ("first", "second"))
    with living_process() as owner:
        fence = json.loads(farm.ok("claim", A, "--owner-pid", str(owner.pid)))["fence"]
    slow = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    late = farm.start("submit", A, "--fence", fence, "--commit", first, env=slow)
    wait_until((folder / "reached").exists)
    if when == "it was killed":  # the git that it had started goes on
        late.kill()
    other = farm.start("submit", B, "--fence", farm.claim(B, "--wait", "20")["fence"], "--commit", second)
    with contextlib.suppress(subprocess.TimeoutExpired):
        other.wait(1.5)  # it must wait for the late one's git; where it does not, this is ample time for it
    (folder / "go").touch()
    late_code, code = (process.wait(30) for process in (late, other))
    wait_until((folder / "done").exists)
    assert (late_code, code) == (4 if when == "it lives" else -signal.SIGKILL, 0)
    assert [git(farm.repo, "rev-parse", "refs/farm/ready/t-0001"), farm.json("queue")[0]["commit"]] == [second, second]


@pytest.mark.parametrize("flag", ["--branch=nothing", "--commit=--help", "--branch=", "--commit=HEAD:README.md"])
def test_submit_of_what_is_no_commit_exits_3(farm, flag):
    farm.ok("add", "a")
    farm.refused(3, "submit", A, "--fence", farm.claim(A)["fence"], flag)


def test_a_refused_submit_keeps_the_claim(farm):
    farm.ok("add", "a")
    farm("submit", A, "--fence", farm.claim(A)["fence"], "--branch", "nothing")
    assert farm.task("t-0001")["state"] == "claimed"


def test_submit_without_a_commit_of_its_own_is_rejected(farm):
    farm.ok("add", "a")
    base = git(farm.repo, "rev-parse", "HEAD")
    git(farm.repo, "branch", f"farm/{A}/t-0001")
    farm.refused(5, "submit", A, "--fence", farm.claim(A)["fence"], env={"FARM_BASE": base})
