"""The proof of chaos. Each check gives what is wrong, a line each."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import time
from pathlib import Path

import psutil
from chaos_ground import FEW_ATTEMPTS, REVIEWED, Ground


def find_tasks(ground: Ground) -> list[dict]:
    done = ground.farm("tasks", "--json")
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def read_events(ground: Ground) -> list[dict]:
    events = []
    for line in ground.coordination("events.jsonl").read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # a torn line of a killed writer
            events.append(json.loads(line))
    return events


def check_landed_once(ground: Ground, acknowledged: list[str]) -> list[str]:
    """Against main's first-parent line, the history, and what each task was made to do."""
    tasks = {task["id"]: task for task in find_tasks(ground)}
    known = {event["task"]["id"] for event in read_events(ground) if "task" in event}
    problems = [f"{task_id} is lost" for task_id in sorted({*acknowledged, *known} - tasks.keys())]
    trailers = ground.git("log", "--first-parent", "--format=%(trailers:key=Farm-Task,valueonly)", "main")
    count = collections.Counter(trailers.split())
    for task_id, task in tasks.items():
        is_doomed = task["max_attempts"] == FEW_ATTEMPTS
        wanted = ("failed", 0) if is_doomed else ("landed", 1)
        if (task["state"], count[task_id]) != wanted or (is_doomed and not task["reason"]):
            problems.append(f"{task_id} ({task['title']}) is {task['state']} and landed {count[task_id]} times: {task['reason']!r}")
    return problems


def check_seen(ground: Ground) -> list[str]:
    """What is reviewed needs a yes to exactly the commit that landed: by its record, for a killed writer's event may be missing."""
    problems = []
    for task in find_tasks(ground):
        if task["state"] == "landed" and task.get("landed_from") and task.get("approved") != task["commit"]:
            names = ground.git("diff", "--name-only", task["landed_from"], task["landed_commit"]).splitlines()
            problems += [f"{task['id']} has landed unseen with {name}" for name in names if name.startswith(REVIEWED)]
    return problems


def is_green(ground: Ground, commit: str) -> bool:
    """What the gate says of a commit, without a checkout."""
    broken = ground.git("grep", "-l", "BROKEN", commit, "--", "files", check=False)
    words = ground.git("grep", "-h", "", commit, "--", "words", check=False).splitlines()
    return not broken and len(words) == len(set(words))


def check_main_is_green(ground: Ground) -> list[str]:
    values = set(ground.git("reflog", "--format=%H", "main").splitlines())
    return [f"main was red at {value}" for value in values if not is_green(ground, value)]


def blob_of(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def blobs_below(folder: Path) -> set[str]:
    return {blob_of(path) for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


def read_journal(ground: Ground) -> dict[tuple, tuple]:
    """(agent, run, path) -> (sha, path) of the last write that was finished; a later one of the same run replaced the earlier."""
    last: dict[tuple, tuple | None] = {}
    for file in sorted(ground.journal.iterdir()):
        for row in (line.split("\t") for line in file.read_text().splitlines()):
            if len(row) == 5:
                mark, sha, agent, run, path = row
                last[(agent, run, path)] = (agent, sha, path) if mark == "end" else None
    return {key: value for key, value in last.items() if value}


def check_bytes(ground: Ground) -> list[str]:
    listed = ground.git("rev-list", "--single-worktree", "--all", "--objects")
    safe = {line.split(" ", 1)[0] for line in listed.splitlines()} | blobs_below(ground.trash)
    problems = []
    for agent, sha, path in read_journal(ground).values():
        place = ground.worktree(agent) / path
        if sha not in safe and not (place.is_file() and blob_of(place) == sha):
            problems.append(f"what {agent} wrote to {path} is gone ({sha})")
    return problems


def check_quiet(ground: Ground) -> list[str]:
    deadline = time.monotonic() + 3
    while (left := ground.processes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    problems = [f"still running: {' '.join(process.cmdline())[:200]}" for process in left if psutil.pid_exists(process.pid)]
    return problems + [f"a claim is left: {path.name}" for path in ground.coordination("agent_locks").glob("*.lock")]


def check_all(ground: Ground, acknowledged: list[str]) -> list[str]:
    return [*check_landed_once(ground, acknowledged), *check_seen(ground), *check_main_is_green(ground), *check_bytes(ground),
            *check_quiet(ground)]
