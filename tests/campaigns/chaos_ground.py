"""The ground of chaos: a throw-away repo, its scripted agents, and the process that kills at random."""

from __future__ import annotations

import collections
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
from paths import ROOT

import farm as toolkit

INHERITED_PREFIXES = ("FARM_", "GIT_", "TMUX", "XDG_", "PYTHON")
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
# What touches these waits for a yes; the command says yes, no, or leaves it to the person.
REVIEWED = ("shared.txt", "words/")
REVIEWER = "cat >/dev/null; case $((RANDOM % 4)) in 0) echo no; exit 1 ;; 1) exit 9 ;; esac"
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
                            "FARM_REVIEW": "shared.txt words/**", "FARM_REVIEWER": REVIEWER,
                            "PATH": f"{self.root / 'bin'}{os.pathsep}{self.person['PATH']}"}
        if "FARM_ISOLATE" in os.environ:
            shown = [str(self.root / "bin"), f"+{self.journal}", str(self.script)]
            self.environment.update(FARM_ISOLATE=os.environ["FARM_ISOLATE"], FARM_PASS="CHAOS_*", FARM_SHOW=os.pathsep.join(shown))
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
