"""A farm at work, with what the tests of recovery ask about worktrees, processes and rescued work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from farm_calls import A, Caller
from sandbox import git, run, wait_until

# A first commit, something unsaved, then a wait for the file `go` beside the repo; with `go` there it just adds its line.
STEPS = """
echo "a line" >>"$FARM_TASK.txt"; git add -A && git commit -q -m "step of $FARM_TASK" || exit 1
[ -e "$FARM_REPO/../go" ] || { echo "unsaved in $FARM_TASK" >notes.txt; : >"$FARM_REPO/../at-$FARM_TASK"; }
until [ -e "$FARM_REPO/../go" ]; do sleep 0.05; done
"""


class Worked(Caller):
    """A farm whose agents are scripted, with what the tests ask about worktrees, processes and rescued work."""

    def worktree(self, agent: str = A) -> Path:
        return self.repo.parent / "repo-farm" / f"{agent}-worktree"

    def git_dir(self, agent: str = A) -> Path:
        """git's own folder for a worktree, found by its name: the worktree's .git file may be broken."""
        return self.repo / ".git/worktrees" / f"{agent}-worktree"

    def up(self, count: int = 1, agent: str = STEPS, gate: str = "true", **options) -> str:
        """`up`, which must succeed; what it said."""
        done = self("up", "-n", str(count), "--agent", agent, "--gate", gate, timeout=120, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stderr

    def start_work(self, count: int = 1, agents: int = 0, agent: str = STEPS, **options) -> list[str]:
        """`count` tasks in the hands of as many agents, each with a commit and unsaved work; the tasks' ids."""
        ids = [self.ok("add", f"task {number}") for number in range(1, count + 1)]
        self.up(agents or count, agent, **options)
        for task_id in ids:
            wait_until((self.repo.parent / f"at-{task_id}").exists, 60, f"work on {task_id}")
        return ids

    def let_go(self) -> None:
        (self.repo.parent / "go").touch()

    def wait_for(self, task_id: str, state: str = "landed", timeout: float = 60) -> dict:
        """The task's record once it is in `state`."""
        message = f"{task_id} {state}"
        return wait_until(lambda: (task := self.task(task_id))["state"] == state and task, timeout, message)

    def lines_on_main(self, task_id: str) -> int:
        """How many attempts' commits of STEPS reached main."""
        return len(git(self.repo, "show", f"main:{task_id}.txt").splitlines())

    def rescued(self, name: str = "notes.txt") -> set[str]:
        """The contents that a file has in the rescue refs."""
        refs = git(self.repo, "for-each-ref", "--format=%(refname)", "refs/farm/rescue").splitlines()
        found = [run(["git", "-C", self.repo, "show", f"{ref}:{name}"]) for ref in refs]
        return {done.stdout.strip() for done in found if done.returncode == 0}

    def live(self) -> dict[str, int]:
        """Agents with a live session, and its pid."""
        return {agent["agent"]: agent["pid"] for agent in self.json("status")["agents"] if agent["pid"]}

    def lock_file(self, agent: str = A) -> Path:
        return self.folder / "agent_locks" / f"{agent}.lock"

    def doctor(self, *args: str) -> str:
        return self("doctor", *args).stdout


BREAKAGES: dict[str, Callable[[Path, Path], object]] = {
    "no .git file": lambda worktree, git_dir: (worktree / ".git").unlink(),
    "broken .git file": lambda worktree, git_dir: (worktree / ".git").write_text("gitdir: /nowhere\n"),
    "broken gitdir": lambda worktree, git_dir: (git_dir / "gitdir").write_text("/nowhere/.git\n"),
    "empty gitdir": lambda worktree, git_dir: (git_dir / "gitdir").write_text(""),
    "empty HEAD": lambda worktree, git_dir: (git_dir / "HEAD").write_text(""),
    "no commondir": lambda worktree, git_dir: (git_dir / "commondir").unlink(),
    "broken index": lambda worktree, git_dir: (git_dir / "index").write_bytes(b"DIRC\0\0\0\2 not an index"),
    "locked": lambda worktree, git_dir: (git_dir / "locked").write_text("on a USB stick\n"),
    "unlocked": lambda worktree, git_dir: (git_dir / "locked").unlink(),
    "stale index.lock": lambda worktree, git_dir: (git_dir / "index.lock").touch(),
    "stale HEAD.lock": lambda worktree, git_dir: (git_dir / "HEAD.lock").touch(),
}


def break_worktree(farm: Worked, what: str, agent: str = A) -> None:
    BREAKAGES[what](farm.worktree(agent), farm.git_dir(agent))
