"""check-machine.sh: limits that are too little for many agents, and file systems on which locks may not hold."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from paths import SCRIPTS
from sandbox import run

SCRIPT = SCRIPTS / "check-machine.sh"


@pytest.fixture
def mounted(tmp_path: Path):
    """What the script says of tmp_path where `mount` prints a line with `form` for what it lies on."""
    def check(form: str) -> str:
        point = subprocess.run(["df", "-P", tmp_path], capture_output=True, text=True, check=True).stdout.split()[-1]
        tools = tmp_path / "tools"
        tools.mkdir(exist_ok=True)
        (tools / "mount").write_text(f"#!/bin/sh\nprintf '%s\\n' 'proc on /proc type proc (rw)' 'x on {point} {form}'\n")
        (tools / "mount").chmod(0o755)
        return run([SCRIPT, tmp_path], env={"PATH": f"{tools}:{os.environ['PATH']}"}, check=True).stdout

    return check


@pytest.mark.parametrize(("form", "kind"), [
    ("type nfs4 (rw,vers=4.2)", "nfs4"), ("type fuse.sshfs (rw)", "fuse.sshfs"), ("(smbfs, nodev)", "smbfs"),
])
def test_a_file_system_on_which_locks_may_not_hold_is_named(mounted, tmp_path, form, kind):
    assert mounted(form) == f"{tmp_path} lies on {kind}, where flock may not hold\tmove the repo to a local disk\n"


@pytest.mark.parametrize("form", ["type ext4 (rw)", "type tmpfs (rw)", "(apfs, local, journaled)"])
def test_a_local_disk_is_fine(mounted, form):
    assert mounted(form) == ""


@pytest.mark.skipif(not Path("/proc/sys/fs/inotify/max_user_instances").exists(), reason="only Linux has inotify")
def test_a_limit_that_is_too_little_is_named_with_what_raises_it(tmp_path):
    said = run([SCRIPT, "-n", "99999999", tmp_path], check=True).stdout
    assert "inotify instances are allowed, for 99999999 agents\tsudo sysctl fs.inotify.max_user_instances=399999996\n" in said
    assert run([SCRIPT, "-n", "1", tmp_path], check=True).stdout == ""


@pytest.mark.parametrize("args", [[], ["-n", "x", "/"], ["-n", "", "/"], ["/", "/"], ["-x"]])
def test_a_wrong_call_is_exit_2(args):
    assert run([SCRIPT, *args]).returncode == 2
