"""Content in Git LFS on hosts: it goes by a server that both reach, before the commit that names it, or no work begins."""

from __future__ import annotations

import shutil

import pytest
from farm_calls import landed
from host_calls import Spoke, make_ssh
from sandbox import git, wait_until

needs_lfs = pytest.mark.skipif(not shutil.which("git-lfs"), reason="git-lfs is not installed: apt install git-lfs")


def track_lfs(repo, *config: str) -> None:
    git(repo, "lfs", "install", "--local")
    git(repo, "lfs", "track", "*.bin")
    for pair in config:
        git(repo, "config", "-f", ".lfsconfig", *pair.split(" ", 1))
    (repo / "old.bin").write_bytes(b"old content\n" * 100)
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", "lfs")


@needs_lfs
def test_lfs_content_goes_by_a_server_that_both_reach_before_the_commit_that_names_it(farm, sandbox, farm_cleanup):
    server = sandbox.work / "server.git"
    git(sandbox.work, "init", "-q", "--bare", str(server))
    track_lfs(farm.repo, f"lfs.url file://{server}")
    git(farm.repo, "remote", "add", "server", str(server))
    git(farm.repo, "lfs", "push", "server", "main")
    agent = "grep -q 'old content' old.bin && head -c 5000 /dev/urandom >new.bin"
    spoke = Spoke(farm, "h1", str(make_ssh(sandbox.root, farm.repo)), 1, agent).start()
    task = farm.ok("add", "one")
    wait_until(lambda: farm.task(task)["state"] == "ready", 60, f"its work: {spoke.said()}")
    oid = git(farm.repo, "show", f"{farm.task(task)['commit']}:new.bin").split("sha256:")[1].split()[0]
    assert list((server / "lfs").rglob(oid)), "the hub has a pointer to content that nobody else has"
    farm("merge", "--gate", '[ "$(wc -c <new.bin)" -eq 5000 ]', timeout=60)
    assert landed(farm) == [task]
    assert spoke.end() == 143


@needs_lfs
def test_a_host_of_a_repo_whose_lfs_content_cannot_come_to_the_hub_does_not_begin(farm, sandbox):
    track_lfs(farm.repo)
    spoke = Spoke(farm, "h1", str(make_ssh(sandbox.root, farm.repo)), 1, "true").start()
    assert spoke.process.wait(60) == 4 and "no server for them" in spoke.said()
