"""Hubs whose clone is not all of the repo: content in Git LFS goes by a server that both reach, before the commit that names
it, or no work begins; nor does it with a partial clone."""

from __future__ import annotations

import shutil

import pytest
from farm_calls import landed, make_commit
from host_calls import Spoke, make_ssh
from paths import SCRIPTS
from sandbox import commit_files, git, run, wait_until

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


def test_what_a_task_begins_from_is_there_or_not_as_the_hub_says_and_no_cut_in_between(farm, sandbox, monkeypatch):
    """Else the next attempt would begin anew, without the work that the hub has."""
    ssh, cut, clone = sandbox.root / "ssh", sandbox.root / "cut", sandbox.work / "clone"
    # from its second call on there is no connection, where `cut` is there
    fails = f"[ ! -e {cut} ] || case $(wc -l <{cut}) in 0) echo >{cut} ;; *) exit 255 ;; esac"
    ssh.write_text(f'#!/bin/sh\nshift "$(($# - 1))"; {fails}\nexec sh -c "$*"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("GIT_SSH_COMMAND", str(ssh))
    carry = SCRIPTS / "hosts/carry.sh"
    run([carry, "clone", "-u", f"hub:{farm.repo}", "-b", "main", clone], check=True)
    git(farm.repo, "update-ref", "refs/farm/returned/t-1/1", make_commit(farm.repo, {"f": "x"}))
    lines = "".join(f"refs/farm/returned/t-{number}/1 refs/farm/from/t-{number}.2\n" for number in (1, 2))
    cut.touch()
    done = run([carry, "fetch", "-C", clone, "-b", "main"], input=lines)
    assert (done.returncode, done.stdout) == (1, "")
    cut.unlink()
    assert run([carry, "fetch", "-C", clone, "-b", "main"], input=lines, check=True).stdout == "refs/farm/from/t-1.2\n"


def test_a_host_of_a_hub_that_lacks_objects_does_not_begin_and_says_what_helps(farm, sandbox):
    upstream, repo = sandbox.work / "upstream", farm.repo
    commit_files(repo, {"old.txt": "old"})
    commit_files(repo, {"old.txt": "new"})
    git(sandbox.work, "clone", "-q", "--bare", str(repo), str(upstream))
    git(upstream, "config", "uploadpack.allowFilter", "true")
    shutil.rmtree(repo)
    git(sandbox.work, "clone", "-q", "--filter=blob:none", f"file://{upstream}", str(repo))
    spoke = Spoke(farm, "h1", str(make_ssh(sandbox.root, repo)), 1, "true").start()
    assert spoke.process.wait(60) == 4 and "partial clone" in spoke.said()
    said = spoke.said()
    run(["bash", "-c", said.split("try: there: ")[1].splitlines()[0]], cwd=repo, check=True)
    spoke.start()
    wait_until((spoke.repo / "old.txt").exists, 60, f"its clone: {spoke.said()}")
    assert spoke.end() == 143
