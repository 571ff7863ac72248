"""Hosts in the tests: `farm serve` as a process that is asked line by line, and hubs that are reached without an sshd."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from farm_calls import FARM, Caller
from paths import SCRIPTS
from sandbox import Started

SECONDS = 20.0


class Served:
    """A host's one connection to the hub: `farm serve HOST`, asked a line at a time."""

    def __init__(self, farm: Caller, host: str = "h1", argv: list[str] | None = None, **options):
        self.farm, self.host, self.count = farm, host, 0
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = Started(argv or farm.argv("serve", host), **pipes, **options)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(SECONDS)
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            self.process.stderr.close()

    def write(self, data: bytes) -> None:
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def read(self) -> dict:
        if not select.select([self.process.stdout], [], [], SECONDS)[0]:
            pytest.fail(f"serve did not answer within {SECONDS:g} s")
        line = self.process.stdout.readline()
        if not line:
            pytest.fail(f"serve has ended: {self.process.stderr.read().decode()}")
        return json.loads(line)

    def ask(self, move: str, **words) -> dict:
        self.count += 1
        self.write(json.dumps({"id": self.count, "move": move, **words}).encode() + b"\n")
        answer = self.read()
        assert answer["id"] == self.count
        return answer

    def ok(self, move: str, **words) -> dict:
        answer = self.ask(move, **words)
        assert answer["code"] == 0, answer
        return answer

    def hello(self, pid: str = "4711", start: str = "1", boot: str = "a boot elsewhere") -> dict:
        return self.ok("hello", pid=pid, start=start, boot=boot)

    def claim(self, number: int = 1, preset: str = "") -> dict:
        return self.ask("claim", agent=self.agent(number), preset=preset, takes=["", preset])

    def renew(self, *claims: tuple[str, str], **told) -> dict:
        pairs = [{"agent": agent, "fence": fence} for agent, fence in claims]
        return self.ask("renew", claims=pairs, **{"agents": [], **told})

    def agent(self, number: int = 1) -> str:
        return f"{self.host}-agent-{number:03d}"


def lock_of(repo: Path, agent: str) -> dict:
    return json.loads((repo / "coordination" / "agent_locks" / f"{agent}.lock").read_text())


# In the place of ssh: no machine in between, but the same door.
NO_SSH = """#!/usr/bin/env bash
while :; do case $1 in -o | -p | -i | -F) shift 2 ;; -*) shift ;; *) break ;; esac; done
host=$1; shift
SSH_ORIGINAL_COMMAND="$*" exec bash {door} {repo} "${{DOOR_HOST:-$host}}"
"""


def make_ssh(folder: Path, repo: Path) -> Path:
    """A command for GIT_SSH_COMMAND that goes through the door of `repo` as the host that ssh is told to call."""
    path = folder / "no-ssh"
    path.write_text(NO_SSH.format(door=SCRIPTS / "hosts" / "door.sh", repo=repo))
    path.chmod(0o755)
    return path


class Spoke:
    """A host of a test: `farm spoke`, with a folder of its own."""

    def __init__(self, hub: Caller, name: str, ssh: str, count: int = 2, agent: str = "", url: str = ""):
        self.hub, self.name, self.folder = hub, name, hub.repo.parent / name
        self.env = {"GIT_SSH_COMMAND": ssh, "DOOR_HOST": name}
        more = ["--agent", agent] if agent else []
        self.argv = [
            *[sys.executable, str(FARM), "spoke", url or f"hub:{hub.repo}", "-n", str(count), "--name", name],
            *["--folder", str(self.folder), *more],
        ]
        self.log = hub.repo.parent / f"{name}.log"
        self.repo = self.folder / "repo"

    def start(self) -> Spoke:
        with self.log.open("ab") as log:
            env = {**os.environ, **self.env}
            self.process = Started(self.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd="/")
        return self

    def said(self) -> str:
        return self.log.read_text()

    def end(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        """Send a signal, and wait for its end; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def kill_all(self) -> None:
        """kill -9 of the spoke, of its tmux server and of all its agents, as when the machine goes."""
        self.process.kill()
        self.process.wait()
        for _ in range(50):
            left = [process for process in psutil.process_iter(["pid"]) if self.is_mine(process)]
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if not psutil.wait_procs(left, timeout=2)[1] and not left:
                return

    def is_mine(self, process: psutil.Process) -> bool:
        """Whether it runs for this host: by its environment, or as its tmux server."""
        try:
            words = process.environ()
            return words.get("DOOR_HOST") == self.name and words.get("TEST_TOKEN") == os.environ["TEST_TOKEN"]
        except (psutil.Error, OSError):
            return False
