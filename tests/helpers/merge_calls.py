"""The merge queue from outside: a repo with work to merge, and what a merge leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest
from farm_calls import Caller
from sandbox import git, run, wait_until

AGENT = "agent-001"
GREEN = "! grep -rq BAD ."
GITLINK = "160000"
Files = Mapping[str, "str | bytes | None"]


class Queue(Caller):
    """farm.py on a repo with work to merge; what gates append to `log` says which trees they looked at."""

    def __init__(self, repo: Path, outside: Path):
        super().__init__(repo, os.getpid())
        self.log, self.go, self.outside = outside / "gated", outside / "go", outside

    # -- entries

    def ready(self, files: Files, **fields) -> str:
        """One entry that changes `files` (None deletes); its id. `base` names the commit that it starts from."""
        return self.ready_all([files], **fields)[0]

    def ready_all(self, works: Sequence[Files], base: str = "main", **fields) -> list[str]:
        """An entry for each of `works`, submitted in this order; their ids."""
        lines = "\n".join(json.dumps({"title": f"work on {' '.join(files)}", **fields}) for files in works)
        ids = re.findall(r"^\S+", self.ok("add", "-f", "-", input=lines), re.MULTILINE)
        self.make_branches(dict(zip(ids, works, strict=True)), git(self.repo, "rev-parse", base))
        for task_id in ids:
            self.submit_task(task_id)
        return ids

    def make_branches(self, works: Mapping[str, Files], base: str) -> None:
        """A branch with one commit on `base` for each task, by one git and without touching index or checkout."""
        stream = b""
        for task_id, files in works.items():
            stream += f"commit refs/heads/{branch_of(task_id)}\ncommitter A <a@x> 1700000000 +0000\n".encode()
            stream += f"data <<.\nwork of {task_id}\n.\nfrom {base}\n".encode() + b"".join(map(import_line, files.items()))
        subprocess.run(["git", "-C", self.repo, "fast-import", "--quiet", "--force"], input=stream, check=True, timeout=60)

    def submit_task(self, task_id: str, *options: str) -> None:
        claim = self.claim(AGENT, "--id", task_id)
        self.ok("submit", AGENT, "--fence", claim["fence"], *options)

    # -- merging

    def counted(self, condition: str) -> str:
        """A gate of this condition that notes the tree it looks at."""
        return f'git rev-parse "HEAD^{{tree}}" >>{self.log}; {condition}'

    def blocked(self, condition: str) -> str:
        """The same, but it waits until the test lets it go on."""
        return self.counted(f"until [ -e {self.go} ]; do sleep 0.02; done; {condition}")

    def merge(self, condition: str = GREEN, *options: str, slots: int = 1, code: int = 0, env: Mapping[str, str] | None = None):
        """Drain the queue with a counted gate; checks the exit code."""
        done = self("merge", "--gate", self.counted(condition), "--slots", str(slots), *options, env=env)
        if done.returncode != code:
            pytest.fail(f"merge exited {done.returncode}, not {code}\n{done.stdout}{done.stderr}")
        return done

    @contextlib.contextmanager
    def merging(self, gate: str, *options: str, slots: int = 1) -> Iterator[subprocess.Popen[str]]:
        """A merger that runs meanwhile, ended by SIGTERM at the latest."""
        process = self.start("merge", "--gate", gate, "--slots", str(slots), *options)
        try:
            yield process
        finally:
            process.terminate()
            process.communicate(timeout=30)

    # -- what came of it

    def gated(self) -> list[str]:
        """The trees that gates looked at, in order."""
        return self.log.read_text().split() if self.log.exists() else []

    def verdicts(self) -> dict[str, list[str]]:
        """tree -> the colours recorded for it."""
        files = [json.loads(path.read_text()) for path in (self.folder / "results").glob("*.json")]
        return {file["tree"]: [verdict["colour"] for verdict in file["runs"]] for file in files}

    def green_trees(self) -> set[str]:
        return {tree for tree, colours in self.verdicts().items() if "green" in colours}

    def states(self) -> dict[str, str]:
        return {task["id"]: task["state"] for task in self.json("tasks")}

    def landed(self, branch: str = "main") -> list[str]:
        """The Farm-Task trailers of the first-parent line, oldest first."""
        form = "--format=%(trailers:key=Farm-Task,valueonly)"
        return git(self.repo, "log", "--first-parent", "--reverse", form, branch).split()

    def reason(self, task_id: str) -> str:
        return self.task(task_id)["reason"]

    def returned_text(self, task_id: str, attempt: int = 1) -> str:
        return (self.folder / f"returns/{task_id}.{attempt}.txt").read_text()

    def red_values(self, condition: str = GREEN, branch: str = "main") -> list[str]:
        """The values of the branch's reflog whose files fail the gate's condition."""
        return [sha for sha in self.reflog(branch) if not self.is_green(sha, condition)]

    def reflog(self, branch: str = "main") -> list[str]:
        return list(dict.fromkeys(git(self.repo, "reflog", "--format=%H", branch).split()))

    def is_green(self, sha: str, condition: str) -> bool:
        folder = self.outside / f"try-{sha}"
        folder.mkdir()
        run(["bash", "-c", f"git -C '{self.repo}' archive {sha} | tar -x -C '{folder}'"], check=True)
        code = run(["bash", "-c", condition], cwd=folder).returncode
        shutil.rmtree(folder)
        return code == 0

    def summary(self) -> str:
        """What `queue` says in words."""
        return self("queue").stderr

    def wait_for_gates(self, count: int) -> None:
        wait_until(lambda: len(self.gated()) >= count, 30, f"{count} gates to begin")


def branch_of(task_id: str) -> str:
    return f"farm/{AGENT}/{task_id}"


def import_line(change: tuple[str, str | bytes | None]) -> bytes:
    """One file of a commit in the language of git fast-import; `GITLINK sha` as content makes a submodule's entry."""
    path, content = change
    if content is None:
        return f"D {path}\n".encode()
    if isinstance(content, str) and content.startswith(GITLINK):
        return f"M {content} {path}\n".encode()
    data = content.encode() if isinstance(content, str) else content
    return f"M 100644 inline {path}\ndata {len(data)}\n".encode() + data + b"\n"


def find_gate_processes(token: str, folder: str = "") -> list[psutil.Process]:
    """What still runs of the gates (and mergers) of the test with this token, or stands in this folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            ours = process.environ().get("GATE_TOKEN") == token or (folder and process.cwd().startswith(folder))
            if ours and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def new_file(name: str, text: str = "good\n") -> dict[str, str]:
    return {f"{name}.txt": text}


def edited_line(number: int, text: str) -> dict[str, str]:
    """long.txt with one line changed: edits of distant lines go together."""
    lines = [f"line {place}\n" for place in range(1, 21)]
    return {"long.txt": "".join([*lines[: number - 1], text + "\n", *lines[number:]])}


def forget_branch(queue: Queue, task_id: str) -> None:
    """Delete a task's branch and all that git would keep only for that branch's sake."""
    git(queue.repo, "update-ref", "-d", f"refs/heads/{branch_of(task_id)}")
    git(queue.repo, "reflog", "expire", "--expire=now", "--all")
    git(queue.repo, "gc", "-q", "--prune=now")
