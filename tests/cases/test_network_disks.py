"""State on a file system of the network: no farm starts where two processes can hold one lock. The mount table is a stand-in's."""

from __future__ import annotations

import os

import pytest
from paths import SCRIPTS
from sandbox import run


def stand_in(folder, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def mount_as(sandbox, monkeypatch, kind: str, options: str = "rw", knows_types: bool = True) -> None:
    """df and mount tell of one file system, of this kind; without `knows_types` df is that of macOS."""
    tools = sandbox.root / "tools"
    types = f'case $1 in *T*) echo "Filesystem Type x x x x /"; echo "server:/x {kind} 1 1 1 1% /far"; exit ;; esac'
    refuse = "case $1 in *T*) echo 'df: illegal option -- T' >&2; exit 1 ;; esac"
    stand_in(tools, "df", f'{types if knows_types else refuse}\necho "Filesystem x x x x /"; echo "server:/x 1 1 1 1% /far"')
    table = f"server:/x on /far type {kind} ({options})" if knows_types else f"server:/x on /far ({kind}, {options})"
    stand_in(tools, "mount", f"echo '/dev/sda on / type ext4 (rw,flock)'; echo '{table}'")
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize("knows_types", [True, False], ids=["linux", "macos"])
@pytest.mark.parametrize("kind", ["nfs4", "smbfs", "fuse.sshfs", "9p", "lustre"])
def test_a_farm_is_refused_on_a_disk_of_the_network(farm, sandbox, monkeypatch, kind, knows_types):
    mount_as(sandbox, monkeypatch, kind, knows_types=knows_types)
    said = farm.refused(4, "run", "-n", "1", "--agent", "true")
    assert f"lies on {kind}, a file system on which two processes can hold one lock" in said and "local disk" in said
    assert not (farm.folder / "farm.json").exists()


def test_doctor_tells_the_same(farm, sandbox, monkeypatch):
    mount_as(sandbox, monkeypatch, "nfs4")
    done = farm("doctor")
    assert "lies on nfs4" in done.stdout


@pytest.mark.parametrize(("kind", "options"), [("ext4", "rw"), ("apfs", "local"), ("lustre", "rw,flock,lazystatfs"),
                                               ("lustre", "rw,localflock")])
def test_a_disk_that_keeps_its_locks_is_taken(farm, sandbox, monkeypatch, kind, options):
    mount_as(sandbox, monkeypatch, kind, options)
    done = run([SCRIPTS / "merge/check-repo.sh", "-s", "-C", farm.repo], input="", check=True)
    assert done.stdout == ""
