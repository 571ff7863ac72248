"""Hosts whose machine is not as it should be: a disk that is full, a clock that is an hour off. Nothing is lost, and the hub says
what is the matter."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from farm_calls import landed
from host_calls import Spoke, make_ssh
from paths import ROOT, SCRIPTS
from sandbox import run, wait_until

MOUNT = 'mount -t tmpfs -o size=24m tmpfs "$1" && exec "${@:2}"'


def test_a_host_with_too_little_disk_takes_no_task_from_those_who_could_do_it(farm, sandbox, farm_cleanup):
    if not shutil.which("unshare") or run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", sandbox.work]).returncode:
        pytest.skip("no small disk may be mounted here")
    task = farm.ok("add", "one")
    spoke = Spoke(farm, "h1", str(make_ssh(sandbox.root, farm.repo)), 2, "echo x >f")
    spoke.folder.mkdir()
    spoke.argv = ["unshare", "--mount", "bash", "-c", MOUNT, "bash", str(spoke.folder), *spoke.argv]
    spoke.start()
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
