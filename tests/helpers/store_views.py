"""What a store holds: each task and where it is, in memory and as it lies on the disk."""

from __future__ import annotations

import contextlib
import json
from collections import Counter

import farm as toolkit


def view_of(state: toolkit.State) -> dict:
    """Each task -> (place, record), and each `claim AGENT` -> its record without the task."""
    view: dict = {}
    copies = [(task_id, place, task.to_json()) for place in ("pending", "ready", "landed")
              for task_id, task in getattr(state, place).items()]
    archived = {task.id: task.to_json() for task in state.read_archive()}
    assert len(archived) == len(state.archived), "what is in the archive has no record there"
    copies += [(task_id, "landed", record) for task_id, record in archived.items()]
    copies += [(task_id, "done", rev) for task_id, rev in state.done.items() if task_id not in state.landed]
    copies += [(claim.task["id"], f"claimed by {claim.agent}", claim.task) for claim in state.claims.values() if claim.task]
    for task_id, place, record in copies:
        assert task_id not in view, f"{task_id} is {place} and {view[task_id][0]}"
        view[task_id] = (place, json.dumps(record, sort_keys=True))
    for claim in state.claims.values():
        view["claim " + claim.agent] = json.dumps({**claim.to_json(), "task": None}, sort_keys=True)
    return view


def raw_copies(system, folder: str) -> Counter:
    """How often each task id occurs on the disk, read without the store."""
    pending = json.loads(system.read(f"{folder}/task_queue/pending.json"))
    ready = json.loads(system.read(f"{folder}/merge_queue/ready-to-merge.json"))
    ids = [task["id"] for task in (*pending["tasks"], *ready["ready"], *ready["landed"])]
    known = {task["id"] for task in ready["landed"]}
    if "landed.jsonl" in system.listdir(f"{folder}/merge_queue"):
        for line in filter(None, system.read(f"{folder}/merge_queue/landed.jsonl").split(b"\n")):
            with contextlib.suppress(ValueError):  # a torn line
                archived = json.loads(line)["id"]
                ids += [archived] if archived not in known else []
                known.add(archived)
    ids += [task_id for task_id in ready["done"] if task_id not in known]
    for name in system.listdir(f"{folder}/agent_locks"):
        if name.endswith(".lock") and not name.startswith("."):
            ids += [task["id"] for task in [json.loads(system.read(f"{folder}/agent_locks/{name}")).get("task")] if task]
    return Counter(ids)
