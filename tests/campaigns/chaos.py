"""`make chaos`: a farm of scripted agents, one process that kills at random, and a careless person; then the proof.

    python tests/campaigns/chaos.py --seconds 60 -n 20 [--seed S] [--keep]

While it runs: SIGKILL for agents, their sessions, the tmux server, loop, merger, gates, short-lived verbs, scripts and gits of
the farm; and a person who adds tasks, commits on main, edits in the checkout, saves stale copies, deletes worktrees and lock
files, breaks git's entries and moves branches, and types `up` and `doctor --fix` as people do. Then the kills stop, the farm
drains, `down`, and these must hold:

  landed   every task landed exactly once, or failed with a reason (and only those that were made to fail)
  seen     nothing that is reviewed has landed without a yes to exactly its commit
  green    main passes the gate at every value of its reflog
  bytes    all that an agent wrote is reachable from a ref or still in its worktree (agents journal hashes outside the repo)
  quiet    no claim, no process and no tmux server is left

Prints what it did. Exit: 0 all of them hold, 1 one does not (its folder is kept, the seed is printed), 2 usage
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import multiprocessing
import os
import random
import secrets
import shutil
import sys
import time
from pathlib import Path

import psutil
from chaos_ground import DOOMED, FEW_ATTEMPTS, MANY_ATTEMPTS, MODES, Ground, Killer, end
from chaos_proof import check_all, find_tasks, read_events, read_journal

STILL_SECONDS = 90  # a farm in which nothing has landed, come back or failed for so long is stuck


# ---------------------------------------------------------------------------------------------- a careless person


class Person:
    """Adds tasks, looks after the farm, and makes every mistake that people make. `acknowledged`: ids that `add` printed."""

    CARELESS = {"commit_on_main": 3, "edit_in_the_way": 2, "leave_a_file": 2, "delete_worktree": 2, "break_entry": 2,
                "leave_stale_locks": 2, "move_branch": 2, "look_around": 2, "approve_all": 2, "delete_lock": 1,
                "save_stale_copy": 1, "add_by_hand": 1, "tear_queue_file": 0.5}
    BREAKAGES = (("gitdir", "/nowhere/.git\n"), ("gitdir", ""), ("HEAD", ""), ("locked", "on a USB stick\n"),
                 ("index", "DIRC not an index"), (".git", "gitdir: /nowhere\n"))

    def __init__(self, ground: Ground, needs_up, seconds: float):
        self.ground, self.needs_up = ground, needs_up
        self.random = random.Random(f"{ground.seed} person")
        self.left = max(2 * ground.agents, int(seconds * ground.agents / 12))
        self.done: collections.Counter = collections.Counter()
        self.acknowledged: list[str] = []
        self.stale = b""
        self.serial = 0
        self.is_damaged = False
        self.edited = False

    def run(self, seconds: float) -> None:
        started, total = time.monotonic(), self.left
        while (passed := time.monotonic() - started) < seconds:
            self.look_after()
            if total - self.left <= total * passed / seconds + self.ground.agents:
                self.add_tasks()
            self.act(self.random.choices(list(self.CARELESS), self.CARELESS.values())[0])
            time.sleep(self.random.uniform(0.05, 0.3))

    def look_after(self) -> None:
        """What a person sees to: a farm that stands still, and damage that stops it."""
        if self.edited:
            self.take_edit_back()
        if self.needs_up.is_set():
            self.needs_up.clear()
            self.done["up"] += 1
            if self.ground.up().returncode:
                self.needs_up.set()
        if self.is_damaged:
            self.done["doctor --fix"] += 1
            self.is_damaged = self.ground.farm("doctor", "--fix").returncode not in (0, 6)

    def act(self, name: str) -> None:
        """One careless act; what it meant to touch may not be there, or be torn already."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
            if getattr(self, name)() is not False:
                self.done[name.replace("_", " ")] += 1

    # -- tasks

    def draft(self) -> dict:
        mode = self.random.choices(list(MODES), MODES.values())[0]
        attempts = FEW_ATTEMPTS if mode in DOOMED else MANY_ATTEMPTS
        self.serial += 1
        plan = f"plan: {mode} {self.random.randint(1, 3)}"
        return {"title": f"number {self.serial}, {mode}", "prompt": plan, "max_attempts": attempts}

    def add_tasks(self) -> None:
        drafts = [self.draft() for _ in range(min(self.left, self.random.randint(1, self.ground.agents)))]
        if not drafts:
            return
        done = self.ground.farm("add", "-f", "-", stdin=None, input="".join(json.dumps(draft) + "\n" for draft in drafts))
        if done.returncode == 0:
            self.acknowledged += done.stdout.split()
            self.left -= len(drafts)

    def add_by_hand(self) -> None:
        path = self.ground.coordination("task_queue/pending.json")
        data = json.loads(path.read_bytes())
        data["tasks"].append(self.draft())
        self.overwrite(path, json.dumps(data, indent=1).encode())
        self.is_damaged = True  # what the farm wrote meanwhile is gone from the file

    def overwrite(self, path: Path, data: bytes) -> None:
        """As an editor without care saves: in place, in two writes."""
        with path.open("wb", buffering=0) as file:
            file.write(data[: len(data) // 2])
            file.write(data[len(data) // 2:])

    def save_stale_copy(self) -> None:
        path, stale = self.ground.coordination("task_queue/pending.json"), self.stale
        self.stale = path.read_bytes()
        if stale:
            self.overwrite(path, stale)
            self.is_damaged = True

    def tear_queue_file(self) -> None:
        name = self.random.choice(("task_queue/pending.json", "merge_queue/ready-to-merge.json"))
        path = self.ground.coordination(name)
        self.overwrite(path, path.read_bytes()[:-20])
        self.is_damaged = True

    # -- the checkout

    def commit_on_main(self) -> None:
        with (self.ground.repo / "diary.txt").open("a") as file:
            file.write(f"{self.random.random()}\n")
        self.ground.git("commit", "-qm", "by a person", "--", "diary.txt", check=False)

    def edit_in_the_way(self) -> None:
        (self.ground.repo / "shared.txt").write_text("half an idea\n")
        self.edited = True

    def take_edit_back(self) -> None:
        """Not at the first try, where another git holds the index."""
        self.ground.git("checkout", "-q", "--", "shared.txt", check=False)
        self.edited = "half an idea" in (self.ground.repo / "shared.txt").read_text()

    def leave_a_file(self) -> None:
        (self.ground.repo / f"scratch-{self.random.randint(1, 9)}.txt").write_text("untracked\n")

    def look_around(self) -> None:
        self.ground.farm(self.random.choice(("status", "tasks", "queue", "doctor", "merge")))

    def approve_all(self) -> bool:
        return self.ground.farm("approve", "--all").returncode == 0

    # -- worktrees, locks, branches

    def pick_agent(self) -> str:
        return f"agent-{self.random.randint(1, self.ground.agents):03d}"

    def git_dir(self) -> Path:
        return self.ground.repo / f".git/worktrees/{self.pick_agent()}-worktree"

    def delete_worktree(self) -> None:
        """To the trash: what was in it at that moment, and what is written there later, is the person's loss."""
        agent = self.pick_agent()
        os.rename(self.ground.worktree(agent), self.ground.trash / f"{agent}-{len(os.listdir(self.ground.trash))}")

    def delete_lock(self) -> None:
        locks = sorted(self.ground.coordination("agent_locks").glob("*.lock"))
        if not locks:
            raise FileNotFoundError
        self.random.choice(locks).unlink()
        self.is_damaged = True

    def break_entry(self) -> None:
        name, text = self.random.choice(self.BREAKAGES)
        path = self.ground.worktree(self.pick_agent()) / ".git" if name == ".git" else self.git_dir() / name
        if not path.parent.is_dir():
            raise FileNotFoundError
        path.write_text(text)

    def leave_stale_locks(self) -> None:
        folder = self.git_dir()
        for name in ("index.lock", "HEAD.lock", "ORIG_HEAD.lock"):
            (folder / name).touch()

    def move_branch(self) -> bool:
        """A task's branch that no worktree is on, and whose commits another ref has."""
        fields = "--format=%(refname) %(objectname) %(worktreepath)"
        rows = self.ground.git("for-each-ref", fields, "refs/heads/farm/*/t-*", check=False)
        free = [row.split(" ")[:2] for row in rows.splitlines() if row.endswith(" ")]
        if not free:
            return False
        ref, sha = self.random.choice(free)
        if len(self.ground.git("for-each-ref", "--contains", sha, "--format=x", check=False).splitlines()) < 2:
            return False
        self.ground.git("update-ref", ref, "main", sha, check=False)
        return True

    # -- after the kills

    def drain(self) -> str:
        """See to the farm until every task is over; empty, or what stands still."""
        self.ground.farm("doctor", "--fix")
        moved_at, next_up, before = time.monotonic(), 0.0, []
        while time.monotonic() < moved_at + STILL_SECONDS:
            if time.monotonic() >= next_up:
                done = self.ground.up()
                if done.returncode:
                    return f"up exited {done.returncode} although nobody kills any more: {done.stderr}"
                next_up = time.monotonic() + 15
            self.take_edit_back()
            left = [task for task in find_tasks(self.ground) if task["state"] not in ("landed", "failed")]
            if not left:
                return ""
            if (now := [(task["id"], task["attempts"]) for task in left]) != before:
                moved_at, before = time.monotonic(), now
            self.retry_waiting(left)
            if any(task["state"] == "review" for task in left):
                self.approve_all()
            time.sleep(0.5)
        still = ", ".join(f"{task['id']} {task['state']}" for task in left)
        return f"not drained: {still}; the farm says: {self.ground.farm('status').stdout[-300:]!r}"

    def retry_waiting(self, tasks: list[dict]) -> None:
        """Backoffs that kills have made long are cut short; what is made to fail has few attempts, and keeps them."""
        for task in tasks:
            if task["state"] == "waiting" and task["max_attempts"] != FEW_ATTEMPTS:
                self.ground.farm("retry", task["id"])


# ---------------------------------------------------------------------------------------------- the campaign


def run_campaign(ground: Ground, person: Person, seconds: float) -> list[str]:
    """Kills and carelessness for `seconds`, then drain, `down` and check; what is wrong, a line each."""
    if (done := ground.up()).returncode:
        return [f"up exited {done.returncode}: {done.stderr}"]
    killer = multiprocessing.get_context("fork").Process(target=Killer(ground, person.needs_up).run, args=(seconds,))
    killer.start()
    ground.killing.touch()
    try:
        person.run(seconds)
    finally:
        ground.killing.unlink()
        killer.join(seconds + 60)
    stuck = person.drain()
    done = ground.farm("down", "--now")
    problems = [stuck] if stuck else []
    problems += [f"down exited {done.returncode}: {done.stderr}"] if done.returncode else []
    return problems + check_all(ground, person.acknowledged)


def describe(counts: collections.Counter) -> str:
    return f"{sum(counts.values())}: " + ", ".join(f"{name} {count}" for name, count in counts.most_common())


def report(ground: Ground, person: Person, seconds: float) -> None:
    """What was done, and what became of it."""
    kills = collections.Counter(ground.kills.read_text().splitlines() if ground.kills.exists() else [])
    events = collections.Counter(event["event"] for event in read_events(ground))
    states = collections.Counter(task["state"] for task in find_tasks(ground))
    print(f"kills       {describe(kills)}")
    print(f"careless    {describe(person.done)}")
    print(f"tasks       {sum(states.values())}: " + ", ".join(f"{name} {count}" for name, count in states.most_common()))
    print(f"on the way  returned {events['returned']}, owners died {events['owner-died']}, attempts failed "
          f"{events['attempt-failed']}, sessions ended {events['session-ended']}, gates {events['gate-started']}")
    rescues = len(ground.git("for-each-ref", "--format=x", "refs/farm/rescue").splitlines())
    values = len(ground.git("reflog", "--format=%H", "main").splitlines())
    print(f"checked     {values} values of main, {len(read_journal(ground))} files that agents wrote, {rescues} rescues")
    print(f"took        {seconds:.0f} s")


def end_everything(ground: Ground) -> None:
    """Whatever still runs of this campaign, by its token."""
    while processes := ground.processes():
        for process in processes:
            end(process)
        psutil.wait_procs(processes, timeout=1)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="how long to kill")
    parser.add_argument("-n", type=int, default=20, help="how many agents")
    parser.add_argument("--seed", type=int, default=None, help="of all random choices but the agents' (default: a new one)")
    parser.add_argument("--keep", action="store_true", help="keep the folder in any case")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse_arguments(argv)
    seed = options.seed if options.seed is not None else secrets.randbelow(10**6)
    print(f"chaos       seed {seed}, {options.n} agents, {options.seconds:g} s of kills", flush=True)
    ground, started = Ground(seed, options.n), time.monotonic()
    person = Person(ground, multiprocessing.Event(), options.seconds)
    try:
        problems = run_campaign(ground, person, options.seconds)
        report(ground, person, time.monotonic() - started)
    finally:
        end_everything(ground)
    if problems or options.keep:
        print(f"kept        {ground.root}")
    else:
        shutil.rmtree(ground.root)
    for problem in problems[:20]:
        print(f"VIOLATED    {problem[:500]}")
    again = f"python tests/campaigns/chaos.py --seconds {options.seconds:g} -n {options.n} --seed {seed}"
    print(f"            again: {again}" if problems
          else "all hold    landed once, main green, no byte lost, nothing left running")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
