"""A command on a terminal of its own, and what tests of what is shown ask and wait for."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

from sandbox import wait_until

# run before the command, in its place: a function that runs between fork and exec may wait for ever for a lock that another
# thread of pytest's held
TAKE_TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"


class Screen:
    """A command on a terminal of its own: what it writes, and keys for it."""

    def __init__(self, argv: list, columns: int = 80, lines: int = 24, **options):
        self.master, slave = pty.openpty()
        self.resize(columns, lines)
        self.before = termios.tcgetattr(slave)
        command = [sys.executable, "-c", TAKE_TERMINAL, *map(str, argv)]
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, **options)
        self.slave, self.text = slave, ""
        os.set_blocking(self.master, False)

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def read(self) -> str:
        """All that it has written by now."""
        try:
            while part := os.read(self.master, 65536):
                self.text += part.decode("utf-8", "replace")
        except (BlockingIOError, OSError):
            pass
        return self.text

    def wait_for(self, pattern: str, after: int = 0, timeout: float = 30) -> re.Match:
        return wait_until(lambda: re.search(pattern, self.read()[after:]), timeout, f"{pattern!r} on the screen")

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def detach(self) -> None:
        """Ctrl-b d, as slowly as a hand: what comes within a millisecond tmux takes for a paste, and hands it on."""
        self.type("\x02")
        time.sleep(0.3)  # not less: a client that waits for a core reads both at once
        self.type("d")

    def leave(self) -> int:
        """Detach until it ends, as a person would who sees that nothing happens; its exit code."""
        for _ in range(10):
            self.detach()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(3)
                break
        return self.end()

    def end(self, timeout: float = 30) -> int:
        """Its exit code, once it has ended by itself."""
        wait_until(lambda: self.read() is None or self.process.poll() is not None, timeout, "its end")
        self.read()
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        os.close(self.master)
        os.close(self.slave)


def up(farm, count: int, agent: str, *args: str, **options) -> None:
    farm.ok("up", "-n", str(count), "--agent", agent, "--gate", "true", *args, timeout=120, **options)


def agents_of(farm) -> dict:
    return {agent["agent"]: agent for agent in json.loads(farm("status", "--json").stdout)["agents"]}


def wait_for_state(farm, agent: str, state: str) -> dict:
    return wait_until(lambda: (found := agents_of(farm).get(agent, {})).get("state") == state and found, 40, f"{agent} {state}")


def record(agent: str, state: str = "idle", **fields) -> dict:
    """An agent as `status --json` shows it."""
    return {"agent": agent, "state": state, "task": "", "pid": 1, "rss_bytes": 0, "cpu_percent": 0.0, "since": "", "worktree": "",
            "branch": "", "last_output_at": "", "cause": "", "title": "", "commits": None, "changed_lines": None,
            "cost_usd": 0.0, **fields}
