"""Hosts whose machine is not as it should be: a disk that is full, a clock that is an hour off. Nothing is lost, and the hub says
what is the matter."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from farm_calls import landed
from host_calls import Spoke, make_ssh
from paths import ROOT, SCRIPTS
from sandbox import git, run, wait_until

MOUNT = 'mount -t tmpfs -o size=24m tmpfs "$1" && exec "${@:2}"'


def make_small_spoke(farm, sandbox, count: int, agent: str) -> Spoke:
    """A host whose disk has 24 MiB in all."""
    if not shutil.which("unshare") or run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", sandbox.work]).returncode:
        pytest.skip("no small disk may be mounted here")
    spoke = Spoke(farm, "h1", str(make_ssh(sandbox.root, farm.repo)), count, agent)
    spoke.folder.mkdir()
    spoke.argv = ["unshare", "--mount", "bash", "-c", MOUNT, "bash", str(spoke.folder), *spoke.argv]
    return spoke.start()


def test_what_an_agent_has_committed_when_its_hosts_disk_is_full_lands_when_there_is_room_again(farm, sandbox, monkeypatch,
                                                                                              farm_cleanup):
    """The disk fills up in the middle of an attempt, and nothing more can be written there, be it by git or by the farm itself."""
    monkeypatch.setenv("FARM_MIN_FREE_MIB", "4")
    full, room = sandbox.root / "full", sandbox.root / "room"
    agent = f"""echo x >f && git add f && {{ git diff --cached --quiet || git commit -qm f; }} || exit
        [ -e {full} ] || cat /dev/zero >"$FARM_WORKTREE/../../fill" 2>/dev/null; touch {full}
        until [ -e {room} ]; do sleep 0.2; done"""
    task = farm.ok("add", "one")
    spoke = make_small_spoke(farm, sandbox, 1, agent)
    wait_until(full.exists, 60, f"the disk to be full: {spoke.said()}")
    wait_until(lambda: "disk free" in farm("status").stdout, 60, "its word of the disk")
    room.touch()
    wait_until(lambda: "No space left" in spoke.said(), 60, f"the end of the attempt to meet it: {spoke.said()}")
    run(["nsenter", "--target", str(spoke.process.pid), "--mount", "rm", str(spoke.folder / "fill")])
    wait_until(lambda: farm.task(task)["state"] == "ready", 150, f"its work: {spoke.said()}")
    farm("merge", "--gate", "true", timeout=60)
    assert landed(farm) == [task] and git(farm.repo, "show", "main:f") == "x"
    assert spoke.end() == 143


def test_a_host_with_too_little_disk_takes_no_task_from_those_who_could_do_it(farm, sandbox, farm_cleanup):
    task = farm.ok("add", "one")
    spoke = make_small_spoke(farm, sandbox, 2, "echo x >f")
    wait_until(lambda: "disk free" in farm("status").stdout, 60, "its word of the disk")
    assert farm.task(task)["state"] == "pending"
    assert spoke.end() == 143


@pytest.mark.parametrize("seconds", [3600, -3600])
def test_a_host_whose_clock_is_an_hour_off_works_as_others_and_is_named(farm, sandbox, seconds, farm_cleanup):
    """Its leases run by the hub's clock alone; tasks that wait for a time (a backoff) wait no longer and no shorter."""
    kit = sandbox.root / "kit"
    shutil.copytree(SCRIPTS, kit / "scripts")
    text = (ROOT / "farm.py").read_text()
    off = text.replace("    now = staticmethod(time.time)\n", f"    now = staticmethod(lambda: time.time() + {seconds})\n")
    assert off != text
    (kit / "farm.py").write_text(off)
    agent = 'if [ "$FARM_ATTEMPT" = 1 ] && [ "$FARM_TITLE" = twice ]; then exit 1; fi; echo x >"$FARM_TASK.txt"'
    spoke = Spoke(farm, "h1", str(make_ssh(sandbox.root, farm.repo)), 2, agent)
    spoke.argv[spoke.argv.index(str(Path(ROOT / "farm.py")))] = str(kit / "farm.py")
    spoke.start()
    tasks = [farm.ok("add", name) for name in ("one", "twice", "three")]
    wait_until(lambda: {farm.task(task)["state"] for task in tasks} == {"ready"}, 60, f"their work: {spoke.said()}")
    assert farm.task(tasks[1])["attempts"] == 1
    assert "clock" in farm("doctor").stdout
    farm("merge", "--gate", "true", timeout=60)
    assert sorted(landed(farm)) == tasks
    assert spoke.end() == 143
