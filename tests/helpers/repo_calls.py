"""A whole farm on a repo, as the end-to-end tests call it: by verbs, with what they ask of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from paths import ROOT
from sandbox import git, run, wait_until

AGENT = 'echo "$FARM_TASK $FARM_AGENT_NAME" > "$FARM_TASK.txt" && git add -A && git commit -q -m "work on $FARM_TASK"'


def farm(repo: Path, *args: str, **options) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, ROOT / "farm.py", "--repo", repo, *args], **options)


def add_tasks(repo: Path, count: int, **fields) -> None:
    lines = "\n".join(json.dumps({"title": f"task {number}", **fields}) for number in range(1, count + 1))
    farm(repo, "add", "-f", "-", input=lines, check=True)


def tasks(repo: Path) -> list[dict]:
    return json.loads(farm(repo, "tasks", "--json", check=True).stdout)


def states(repo: Path) -> Counter:
    return Counter(task["state"] for task in tasks(repo))


def status(repo: Path) -> dict:
    return json.loads(farm(repo, "status", "--json").stdout)


def landed_on_main(repo: Path, branch: str = "main") -> list[str]:
    """The Farm-Task trailers of the first-parent line, oldest first."""
    text = git(repo, "log", "--first-parent", "--reverse", "--format=%(trailers:key=Farm-Task,valueonly)", branch)
    return text.split()


def up(repo: Path, count: int, agent: str = AGENT, gate: str = "true", **options) -> subprocess.CompletedProcess[str]:
    return farm(repo, "up", "-n", str(count), "--agent", agent, "--gate", gate, check=True, **options)


def down(repo: Path) -> None:
    farm(repo, "down", "--now", check=True)


def wait_for_states(repo: Path, wanted: dict, timeout: float = 60) -> None:
    wait_until(lambda: states(repo) == wanted, timeout, f"{wanted}, the last seen were {states(repo)}")


def live_pids(repo: Path) -> dict[str, int]:
    return {agent["agent"]: agent["pid"] for agent in status(repo)["agents"] if agent["pid"]}
