"""run-agent.sh: where it asks for a task (of fifty that start at once each costs a Python), and what a task finds in TMPDIR."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from paths import SCRIPTS
from sandbox import Sandbox, Started, wait_until, write_files

import farm as toolkit

A = "agent-001"
EMPTY = toolkit.dump_records({"schema": 1}, {"tasks": []}).decode()
ONE = toolkit.dump_records({"schema": 1}, {"tasks": [toolkit.Task(id="t-0001", title='"tasks": []').to_json()]}).decode()


def start(sandbox: Sandbox, queue: str | None, answer: str = "exit 3", **files: str) -> tuple[Started, Path, Path]:
    """Its session with a farm.py that gives this answer: (the process, the agent's mailbox, where each call is noted)."""
    home, repo, calls = sandbox.work / "home", sandbox.work / "app", sandbox.work / "calls"
    write_files(home, {"farm.py": "", "scripts/farm": f"#!/bin/sh\necho \"$@\" >>'{calls}'\n{answer}\n"})
    (home / "scripts/farm").chmod(0o755)
    found = {f"coordination/{name.replace('__', '/')}": text for name, text in files.items()}
    if queue is not None:
        found["coordination/task_queue/pending.json"] = queue
    write_files(repo, {"coordination/events.jsonl": "", **found})
    os.utime(repo / "coordination/events.jsonl", (1, 1))
    (sandbox.work / "tree").mkdir()
    settings = {"FARM_AGENT_NAME": A, "FARM_WORKTREE": sandbox.work / "tree", "FARM_REPO": repo, "FARM_HOME": home,
                "FARM_AGENT": "true", "FARM_TARGET": "main", "FARM_WORKTREES": sandbox.work / "farm"}
    env = {**os.environ, **{name: str(value) for name, value in settings.items()}}
    return Started(["bash", SCRIPTS / "run-agent.sh"], env=env, stdin=subprocess.DEVNULL), repo / "coordination/mailbox" / A, calls


def end(process: Started, mailbox: Path) -> None:
    """Have it look once more, at whether it is to end: what it has done before that is done."""
    wait_until((mailbox / "looked").exists, message="the first look")
    (mailbox / "renew").touch()
    with open(mailbox / "bell", "w") as bell:
        bell.write("\n")
    assert process.wait(40) == 0


def test_where_nothing_waits_and_nobody_holds_anything_nobody_asks(sandbox):
    process, mailbox, calls = start(sandbox, EMPTY)
    with process:
        end(process, mailbox)
    assert not calls.exists()


@pytest.mark.parametrize(("queue", "files"), [
    (ONE, {}), (EMPTY, {"agent_locks__agent-002.lock": "{}"}), (EMPTY.replace(" ", ""), {}), (None, {}), ("{", {}),
], ids=["a task", "a lock, perhaps of a dead one", "as a person has written it", "no file", "damaged"])
def test_where_there_may_be_something_it_asks(sandbox, queue, files):
    process, mailbox, calls = start(sandbox, queue, **files)
    with process:
        wait_until(calls.exists, message="a claim")
        end(process, mailbox)
    assert calls.read_text().splitlines()[0] == f"claim {A} --env"


def test_it_asks_again_when_something_has_happened(sandbox):
    process, mailbox, calls = start(sandbox, EMPTY)
    with process:
        wait_until((mailbox / "looked").exists, message="the first look")
        (sandbox.work / "app/coordination/task_queue/pending.json").write_text(ONE)
        with open(mailbox / "bell", "w") as bell:
            bell.write("claim\n")
        wait_until(calls.exists, message="a claim")
        end(process, mailbox)


def test_where_the_farm_is_stopping_it_ends_and_asks_nobody(sandbox):
    process, _, calls = start(sandbox, ONE, **{"farm.json": toolkit.dump_line({"schema": 1, "mode": "stopping"})})
    with process:
        assert process.wait(40) == 0
    assert not calls.exists()


def test_a_task_finds_nothing_of_another_in_its_tmpdir_and_one_that_goes_on_finds_its_own(sandbox):
    """Else a year of tasks fills the disk, and what others have left counts for FARM_AGENT_DISK_MIB."""
    claims, seen = sandbox.work / "claims", sandbox.work / "seen"
    claims.write_text("FARM_TASK=t-1\nFARM_TASK=t-2\nFARM_TASK=t-2 FARM_RESUME=1\nFARM_TASK=t-3 FARM_RESUME=\n")
    work = f"ls -A \"$TMPDIR\" | tr '\\n' ' ' >>'{seen}'; echo >>'{seen}'\nmkdir -m 500 \"$TMPDIR/$FARM_TASK-$RANDOM\"\n"
    write_files(sandbox.work / "home", {"scripts/agent/run-task.sh": work})
    answer = f"[ -s '{claims}' ] || exit 3; head -n 1 '{claims}' | tr ' ' '\\n'; sed -i.old 1d '{claims}'"
    process, mailbox, _ = start(sandbox, ONE, answer)
    with process:
        wait_until(lambda: seen.exists() and seen.read_text().count("\n") == 4, message="four attempts")
        end(process, mailbox)
    first, second, again, third = seen.read_text().splitlines()
    assert (first, second, third, again.startswith("t-2-")) == ("", "", "", True)
