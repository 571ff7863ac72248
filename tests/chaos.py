"""`make chaos`: a farm of scripted agents, one process that kills at random, and a careless person; then the proof.

    python tests/chaos.py --seconds 60 -n 20 [--seed S] [--keep]

While it runs: SIGKILL for agents, their sessions, the tmux server, loop, merger, gates, short-lived verbs, scripts and gits of
the farm; and a person who adds tasks, commits on main, edits in the checkout, saves stale copies, deletes worktrees and lock
files, breaks git's entries and moves branches, and types `up` and `doctor --fix` as people do. Then the kills stop, the farm
drains, `down`, and these must hold:

  landed   every task landed exactly once, or failed with a reason (and only those that were made to fail)
  green    main passes the gate at every value of its reflog
  bytes    all that an agent wrote is reachable from a ref or still in its worktree (agents journal hashes outside the repo)
  quiet    no claim, no process and no tmux server is left

Prints what it did. Exit: 0 all of them hold, 1 one does not (its folder is kept, the seed is printed), 2 usage
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
import farm as toolkit  # noqa: E402  (needs the path above)

INHERITED_PREFIXES = ("FARM_", "GIT_", "TMUX", "XDG_", "PYTHON")
STILL_SECONDS = 90  # a farm in which nothing has landed, come back or failed for so long is stuck
MANY_ATTEMPTS, FEW_ATTEMPTS = 90, 2
SHARED_LINES = 5

# What an agent does; its prompt's line `plan: MODE STEPS` says how. Each file's hash is journalled before and after the write.
AGENT = r"""#!/usr/bin/env bash
set -euo pipefail

note() { printf '%s\t%s\t%s\t%s\t%s\n' "$1" "$2" "$FARM_AGENT_NAME" "$FARM_FENCE:$$" "$3" >>"$CHAOS_JOURNAL/$FARM_AGENT_NAME"; }

write() { # PATH TEXT
  local sha
  sha=$(printf '%s\n' "$2" | git hash-object --stdin)
  mkdir -p "$(dirname "$1")"
  note begin "$sha" "$1"
  printf '%s\n' "$2" >"$1"
  note end "$sha" "$1"
}

save() { git add --all && { git diff --cached --quiet || git commit --quiet --message "$1"; }; }

edit_shared() { # its line of the file that others edit, too
  local program='NR == line { $0 = text } { print }'
  if ! git merge --quiet --no-edit "$FARM_TARGET" >/dev/null 2>&1; then git checkout --theirs -- shared.txt; fi
  write shared.txt "$(awk -v line=$((RANDOM % 5 + 1)) -v text="$FARM_TASK $FARM_FENCE" "$program" shared.txt)"
}

main() {
  local mode steps step word colour=mended
  read -r mode steps <<<"$(sed -n 's/^plan: //p' "$FARM_PROMPT_FILE" | sed -n 1p)"
  word=$FARM_TASK
  [ "$FARM_ATTEMPT" -gt 1 ] || { word="word $steps" colour=BROKEN; }
  for ((step = 1; step <= steps; step++)); do
    write "files/$FARM_TASK-$step.txt" "$FARM_TASK $FARM_FENCE $$ step $step $RANDOM"
    sleep "0.$((RANDOM % 3))"
    write "notes/$FARM_TASK.txt" "$FARM_FENCE $$ thought $step $RANDOM"
    save "step $step of $FARM_TASK"
  done
  case $mode in
    dirty) write "files/$FARM_TASK-left.txt" "$FARM_FENCE $$ left uncommitted $RANDOM" ;;
    shared) edit_shared; save "shared by $FARM_TASK" ;;
    twin) write "words/$FARM_TASK" "$word"; save "word" ;;
    red) write "files/$FARM_TASK-red.txt" "$colour $FARM_FENCE"; save "red" ;;
    hopeless) write "files/$FARM_TASK-red.txt" "BROKEN $FARM_FENCE $$"; save "red for ever" ;;
    fail) write "files/$FARM_TASK-left.txt" "$FARM_FENCE $$ unsaved $RANDOM"; printf 'I cannot do it\n'; exit 3 ;;
  esac
}

main
"""
# Stands before git on the farm's PATH: now and then a git of the farm is killed a few milliseconds after its start.
GIT = r"""#!/usr/bin/env bash
if [ $((RANDOM % 60)) -gt 0 ] || [ ! -e "$CHAOS_JOURNAL/../killing" ]; then exec @git@ "$@"; fi
@git@ "$@" <&0 &
sleep "0.00$((RANDOM % 10))"
kill -9 "$!" 2>/dev/null && printf 'git
' >>"$CHAOS_JOURNAL/../kills.log"
wait "$!"
"""
GATE = "sleep 0.2; ! grep -rqs BROKEN files && [ -z \"$(cat words/* 2>/dev/null | sort | uniq -d)\" ]"
MODES = {"plain": 12, "dirty": 4, "shared": 2, "twin": 2, "red": 1, "hopeless": 1, "fail": 1}
DOOMED = ("hopeless", "fail")


# ---------------------------------------------------------------------------------------------- the ground


class Ground:
    """A throw-away repo with all that belongs to it in one folder, and the ways to call farm.py and git there."""

    def __init__(self, seed: int, agents: int):
        self.seed, self.agents, self.token = seed, agents, secrets.token_hex(8)
        self.root = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp")).resolve()
        self.repo, self.trash, self.journal = self.root / "repo", self.root / "trash", self.root / "journal"
        self.kills, self.script = self.root / "kills.log", self.root / "chaos-agent.sh"
        self.killing = self.root / "killing"
        for name in ("home", "tmp", "tmux", "trash", "journal", "bin"):
            (self.root / name).mkdir()
        self.person = self.make_environment()
        self.environment = {**self.person, "CHAOS_TOKEN": self.token, "CHAOS_JOURNAL": str(self.journal),
                            "PATH": f"{self.root / 'bin'}{os.pathsep}{self.person['PATH']}"}
        self.socket = toolkit.farm_socket(str(self.repo))
        self.make_repo()

    def make_environment(self) -> dict:
        """Without the caller's settings; a person's own git runs so, and is never a victim."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(INHERITED_PREFIXES)}
        names = {"GIT_AUTHOR_NAME": "Person", "GIT_COMMITTER_NAME": "Person", "GIT_AUTHOR_EMAIL": "p@example.org",
                 "GIT_COMMITTER_EMAIL": "p@example.org", "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C.UTF-8", "TERM": "xterm"}
        folders = {"HOME": self.root / "home", "TMPDIR": self.root / "tmp", "TMUX_TMPDIR": self.root / "tmux"}
        return {**kept, **names, **{key: str(path) for key, path in folders.items()}}

    def make_repo(self) -> None:
        self.git("init", "-q", "-b", "main", str(self.repo), folder=self.root)
        (self.repo / "shared.txt").write_text("".join(f"line {number}\n" for number in range(SHARED_LINES)))
        (self.repo / "diary.txt").write_text("by a person\n")
        self.git("add", "-A")
        self.git("commit", "-qm", "first")
        self.script.write_text(AGENT)
        (self.root / "bin/git").write_text(GIT.replace("@git@", shutil.which("git")))
        (self.root / "bin/git").chmod(0o755)

    def git(self, *args: str, folder: Path | None = None, check: bool = True) -> str:
        """A person's git: its output, without the last newline."""
        done = subprocess.run(["git", "-C", str(folder or self.repo), *args], env=self.person, capture_output=True, text=True,
                              errors="replace", stdin=subprocess.DEVNULL, timeout=60)
        if check and done.returncode:
            raise RuntimeError(f"git {' '.join(args)}: {done.stderr}")
        return done.stdout.removesuffix("\n")

    def farm(self, verb: str, *args: str, **options) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, str(ROOT / "farm.py"), "--repo", str(self.repo), verb, *args]
        return subprocess.run(argv, env=self.environment, capture_output=True, text=True, errors="replace", timeout=120,
                              **({"stdin": subprocess.DEVNULL} | options))

    def up(self) -> subprocess.CompletedProcess[str]:
        return self.farm("up", "-n", str(self.agents), "--agent", f"bash {self.script}", "--gate", GATE)

    def coordination(self, *parts: str) -> Path:
        return self.repo.joinpath("coordination", *parts)

    def worktree(self, agent: str) -> Path:
        return self.root / "repo-farm" / f"{agent}-worktree"

    def processes(self) -> list[psutil.Process]:
        """The farm's processes that live now."""
        return [process for process in psutil.process_iter() if environment_of(process).get("CHAOS_TOKEN") == self.token]


def environment_of(process: psutil.Process) -> dict:
    """What it was started with; empty when it is gone, a zombie or not ours to see."""
    try:
        return process.environ() if process.status() != psutil.STATUS_ZOMBIE else {}
    except (psutil.Error, OSError):
        return {}


# ---------------------------------------------------------------------------------------------- kills

# Gits die by their stand-in on PATH, too: they are too short-lived to be met often.
KILLS = {"agent": 6, "git": 2, "script": 5, "verb": 4, "runner": 4, "gate": 4, "session": 3, "merger": 2, "merger group": 1,
         "loop": 1, "server": 0.4, "everything": 0.2}
NEEDS_UP = ("loop", "server", "everything")


def kind_of(process: psutil.Process) -> str:
    """What a process is to the farm; empty for those that are nothing by themselves."""
    try:
        words, name, environment = process.cmdline(), process.name(), process.environ()
    except (psutil.Error, OSError):
        return ""
    if name.startswith("tmux: server"):
        return "server"
    if name.startswith("git"):
        return "git"
    if "FARM_SLOT" in environment:
        return "gate"
    if any("farm.py" in word or "import farm" in word for word in words[:6]):
        return "loop" if words[-1:] == ["run"] else "merger" if "--watch" in words else "verb"
    scripts = [os.path.basename(word) for word in words[:3] if word.endswith(".sh")]
    kinds = {"run-agent.sh": "runner", "run-task.sh": "runner", "chaos-agent.sh": "agent"}
    return kinds.get(scripts[0], "script") if scripts else ""


class Killer:
    """The second process: SIGKILL at random, each kill a line of the log."""

    def __init__(self, ground: Ground, needs_up):
        self.ground, self.needs_up = ground, needs_up
        self.random = random.Random(f"{ground.seed} kills")

    def run(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        rate = min(6.0, max(2.0, self.ground.agents / 4))
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, self.random.expovariate(rate)))
            self.strike()

    def strike(self) -> None:
        """One kill of a kind chosen by weight; the short-lived ones are looked for, and when none comes, another kind will do."""
        wanted = self.random.choices(list(KILLS), KILLS.values())[0]
        deadline = time.monotonic() + 0.3
        while wanted not in (victims := self.find_victims()) and time.monotonic() < deadline:
            pass
        others = sorted(victims.keys() - {"server", "everything", "verb"})
        kind = wanted if wanted in victims or not others else self.random.choice(others)
        if kind in victims and self.kill(kind, victims[kind]):
            with self.ground.kills.open("a") as file:
                file.write(kind + "\n")
            if kind in NEEDS_UP:
                self.needs_up.set()

    def find_victims(self) -> dict[str, list[psutil.Process]]:
        """What can be killed at this moment, by kind."""
        everything = self.ground.processes()
        victims = collections.defaultdict(list)
        for process in everything:
            victims[kind_of(process)].append(process)
        if victims["merger"]:
            victims["merger group"] = victims["merger"]
        victims.update({"session": victims["server"], "everything": everything})
        return {kind: victims[kind] for kind in KILLS if victims[kind]}

    def kill(self, kind: str, victims: list[psutil.Process]) -> bool:
        if kind == "session":
            return self.kill_session()
        if kind == "everything":
            return sum(end(process) for process in victims) > 0
        victim = self.random.choice(victims)
        return end_group(victim) if kind == "merger group" else end(victim)

    def kill_session(self) -> bool:
        name = f"agent-{self.random.randint(1, self.ground.agents):03d}"
        done = subprocess.run(["tmux", "-L", self.ground.socket, "kill-session", "-t", f"={name}"], env=self.ground.environment,
                              capture_output=True, timeout=20)
        return done.returncode == 0


def end(process: psutil.Process) -> bool:
    """SIGKILL; whether it was there."""
    try:
        process.kill()
    except psutil.Error:
        return False
    return True


def end_group(process: psutil.Process) -> bool:
    try:
        os.killpg(process.pid, 9)
    except (ProcessLookupError, PermissionError):
        return False
    return True


# ---------------------------------------------------------------------------------------------- a careless person


class Person:
    """Adds tasks, looks after the farm, and makes every mistake that people make. `acknowledged`: ids that `add` printed."""

    CARELESS = {"commit_on_main": 3, "edit_in_the_way": 2, "leave_a_file": 2, "delete_worktree": 2, "break_entry": 2,
                "leave_stale_locks": 2, "move_branch": 2, "look_around": 2, "delete_lock": 1, "save_stale_copy": 1,
                "add_by_hand": 1, "tear_queue_file": 0.5}
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
            time.sleep(0.5)
        still = ", ".join(f"{task['id']} {task['state']}" for task in left)
        return f"not drained: {still}; the farm says: {self.ground.farm('status').stdout[-300:]!r}"

    def retry_waiting(self, tasks: list[dict]) -> None:
        """Backoffs that kills have made long are cut short; what is made to fail has few attempts, and keeps them."""
        for task in tasks:
            if task["state"] == "waiting" and task["max_attempts"] != FEW_ATTEMPTS:
                self.ground.farm("retry", task["id"])


def find_tasks(ground: Ground) -> list[dict]:
    done = ground.farm("tasks", "--json")
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


# ---------------------------------------------------------------------------------------------- the proof
# Each check gives what is wrong, a line each.


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
    return [*check_landed_once(ground, acknowledged), *check_main_is_green(ground), *check_bytes(ground), *check_quiet(ground)]


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
    print(f"            again: python tests/chaos.py --seconds {options.seconds:g} -n {options.n} --seed {seed}" if problems
          else "all hold    landed once, main green, no byte lost, nothing left running")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
