"""Each script of scripts/ does its work copied alone into an empty folder; merge/ and agent/ do theirs copied whole."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from paths import ROOT, SCRIPTS
from sandbox import Sandbox, Started, commit_files, git, run, wait_until, write_files

TOP = sorted(path.name for path in SCRIPTS.iterdir() if path.suffix == ".sh" or path.name == "farm")
SOCKET = "alone"
A = "agent-001"


@dataclass
class Alone:
    """A script in an empty folder, and a repo to use it on."""

    script: Path
    repo: Path
    sandbox: Sandbox

    def __call__(self, *args: str | Path, code: int = 0, **options) -> str:
        """What it printed; it has to end with `code`, and may not fail for want of a file that is not beside it."""
        done = run([self.script, *args], **options)
        assert (done.returncode, "No such file" in done.stderr) == (code, False), done.stderr
        return done.stdout

    @property
    def tree(self) -> Path:
        """A linked worktree, made without any script."""
        path = self.repo.parent / "repo-farm" / f"{A}-worktree"
        if not path.exists():
            git(self.repo, "worktree", "add", "-q", "--lock", "-b", f"farm/{A}/work", path)
        return path

    def start_session(self, command: str = "exec cat") -> None:
        argv = ["tmux", "-u", "-L", SOCKET, "-f", "/dev/null", "new-session", "-d", "-s", A, "-c", self.repo, command, ";",
                "set-option", "-p", "-t", f"={A}:", "@farm_path", self.repo, ";", "set-option", "-g", "remain-on-exit", "on"]
        run(argv, check=True)


def tmux(*args: str) -> str:
    return run(["tmux", "-u", "-L", SOCKET, *args]).stdout.strip()


def attach(alone: Alone) -> None:
    alone.start_session()
    ours, theirs = pty.openpty()
    with Started([alone.script, "-L", SOCKET, A], stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True,
                 start_new_session=True) as client:
        os.close(theirs)
        wait_until(lambda: tmux("list-clients", "-F", "#{client_session}") == A, message="the client")
        tmux("detach-client", "-s", f"={A}")
        os.read(ours, 65536)
        assert client.wait(20) == 0
    os.close(ours)


def check_machine(alone: Alone) -> None:
    assert alone("-n", "1", alone.repo) == "" and alone(code=2) == ""


def check_tools(alone: Alone) -> None:
    alone("git", "tmux")
    empty = alone.sandbox.root / "empty"
    empty.mkdir()
    done = run(["/bin/bash", alone.script, "git"], env={"PATH": str(empty)})
    assert (done.returncode, "apt install git" in done.stderr) == (6, True)


def environ(alone: Alone) -> None:
    alone.start_session()
    alone("-L", SOCKET, input="COLOUR\tblue\\tgreen\n")
    assert tmux("show-environment", "-g", "COLOUR") == "COLOUR=blue\tgreen"


def farm(alone: Alone) -> None:
    """It is nothing without farm.py, and finds it by FARM_HOME."""
    assert "FARM_HOME" in run([alone.script, "tasks"], cwd=alone.repo).stderr
    home = {"FARM_HOME": str(ROOT), "FARM_PYTHON": sys.executable}
    assert alone("--repo", alone.repo, "add", "First", env=home) == "t-0001\n"


def install_into(alone: Alone) -> None:
    """It copies the toolkit of FARM_HOME, where it does not lie in one itself."""
    assert run([alone.script, alone.repo]).returncode == 2
    alone(alone.repo, env={"FARM_HOME": str(ROOT)})
    names = [str(path.relative_to(SCRIPTS)) for path in SCRIPTS.rglob("[!.]*") if path.is_file()]
    assert [name for name in names if not (alone.repo / "scripts" / name).is_file()] == []


def isolate(alone: Alone) -> None:
    """Where there can be no sandbox, it says what is missing."""
    if run(["bash", SCRIPTS / "sandbox/check-sandbox.sh"]).returncode:
        assert "bwrap" in run([alone.script, "true"]).stderr
        return
    write_files(alone.repo, {"written.txt": "", "hidden.txt": "text\n"})
    script = 'echo x >written.txt; cat hidden.txt; echo y >README.md; ls -A /tmp | wc -l; hostname'
    done = run([alone.script, "-r", alone.repo, "-w", alone.repo / "written.txt", "bash", "-c", script], cwd=alone.repo)
    assert ((alone.repo / "written.txt").read_text(), done.stderr.count("Read-only")) == ("x\n", 1), done.stderr
    assert "sandbox/isolate-git.sh is not beside this" in run([alone.script, "-g", alone.tree, "true"], cwd="/").stderr


def make_venv(alone: Alone) -> None:
    wheel = alone.sandbox.work / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny.py", "")
        archive.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    source = alone.sandbox.work / "farm.py"
    source.write_text(f'# dependencies = ["{wheel}"]\n')
    venv = alone.sandbox.work / "venv"
    alone(venv, sys.executable, source, env={"PIP_NO_INDEX": "1"}, timeout=120)
    run([venv / "bin/python", "-c", "import tiny"], check=True)


def mk_worktrees(alone: Alone) -> None:
    rows = alone("-n", "2", "-C", alone.repo).splitlines()
    assert [(row.split("\t")[0], row.split("\t")[3]) for row in rows] == [(A, "created"), ("agent-002", "created")]
    assert (alone.repo.parent / "repo-farm" / f"{A}-worktree" / "README.md").is_file()


def note(alone: Alone) -> None:
    alone.start_session()
    alone("-L", SOCKET, "3 at work")
    assert tmux("show-options", "-gv", "@farm_note") == "3 at work"


def overview(alone: Alone) -> None:
    alone.start_session()
    assert alone("-L", SOCKET) == "overview\n"
    assert tmux("list-panes", "-t", "=overview:", "-F", "x") == "x"


def probe(alone: Alone) -> None:
    alone.start_session()
    fields = alone("-L", SOCKET).removesuffix("\n").split("\t")
    assert (fields[0], fields[1], fields[3], fields[7]) == (A, "%0", "0", str(alone.repo))


def repair_worktree(alone: Alone) -> None:
    git_dir = Path(git(alone.tree, "rev-parse", "--absolute-git-dir"))
    (git_dir / "farm-ready").touch()
    write_files(alone.tree, {"new.txt": "unsaved\n"})
    (alone.tree / ".git").unlink()
    alone("-C", alone.repo, alone.tree)
    assert git(alone.tree, "status", "--porcelain") == "?? new.txt"


def rescue(alone: Alone) -> None:
    write_files(alone.tree, {"new.txt": "unsaved\n"})
    ref = alone("save", "-C", alone.repo, alone.tree).split("\t")[0]
    assert ref in alone("list", "-C", alone.repo) and "+unsaved" in alone("show", "-C", alone.repo, ref)
    done = run([alone.script, "restore", "-C", alone.repo, ref, alone.sandbox.work / "back"])
    assert (done.returncode, "restore-rescue.sh is not beside this" in done.stderr) == (6, True)


def restore_rescue(alone: Alone) -> None:
    commit = commit_files(alone.repo, {"new.txt": "unsaved\n"})
    alone("-C", alone.repo, commit, alone.sandbox.work / "back")
    assert (alone.sandbox.work / "back/new.txt").read_text() == "unsaved\n"


def rm_worktrees(alone: Alone) -> None:
    """Plain checkouts go; what may be lost stays, for nothing is there to rescue it."""
    other = alone.tree.parent / "agent-002-worktree"
    git(alone.repo, "worktree", "add", "-q", "--lock", "-b", "farm/agent-002/work", other)
    write_files(other, {"new.txt": "unsaved\n"})
    rows = [row.split("\t")[:2] for row in run([alone.script, "-C", alone.repo]).stdout.splitlines()]
    assert (rows, other.exists()) == ([[A, "removed"], ["agent-002", "kept"]], True)
    assert not (alone.repo.parent / "repo-farm" / f"{A}-worktree").exists()


def run_agent(alone: Alone) -> None:
    """It needs the farm, by FARM_HOME: then it claims a task, again where it got no answer, and works on it; what is locked
    meanwhile is its own, in whatever session."""
    assert run([alone.script]).returncode == 2
    shim = [SCRIPTS / "farm", "--repo", alone.repo]
    run([*shim, "add", "First"], check=True)
    python = alone.sandbox.work / "python-that-fails-once"
    python.write_text(f"#!/bin/sh\nmkdir '{python}-failed' 2>/dev/null && exit 7\nexec '{sys.executable}' \"$@\"\n")
    python.chmod(0o755)
    # as a CLI that gives each command a session of its own
    lock = f"""{sys.executable} -c 'import os; os.setsid(); os.execlp("farm", "farm", "lock", "{A}", "schema")'"""
    settings = {
        "FARM_AGENT_NAME": A, "FARM_WORKTREE": alone.tree, "FARM_REPO": alone.repo, "FARM_HOME": ROOT,
        "FARM_AGENT": f"{lock} && echo x >made.txt", "FARM_TARGET": "main", "FARM_PYTHON": python
    }
    env = {**os.environ, **{name: str(value) for name, value in settings.items()}}
    mailbox = alone.repo / "coordination" / "mailbox" / A

    said = alone.sandbox.work / "said"

    def ready() -> bool:
        queue = alone.repo / "coordination/merge_queue/ready-to-merge.json"
        assert process.poll() is None, said.read_text()
        return queue.exists() and bool(json.loads(queue.read_text())["ready"])

    with (open(said, "w") as file,
          Started([alone.script], env=env, stdin=subprocess.DEVNULL, stderr=file, stdout=file) as process):
        try:
            wait_until(ready, 40, "the task to be submitted")
        except pytest.fail.Exception as error:
            seen = [path.read_text() for path in (said, mailbox / "claim.err", alone.repo / "coordination/events.jsonl")
                    if path.exists()]
            raise AssertionError("\n".join([str(error), run(["ps", "-ef", "--forest"]).stdout[-6000:], *seen])) from None
        wait_until((mailbox / "looked").exists, 40, "the look for another task")
        (mailbox / "renew").touch()
        with open(mailbox / "bell", "w") as bell:
            bell.write("\n")
        assert process.wait(40) == 0
    assert git(alone.repo, "show", f"farm/{A}/t-0001:made.txt") == "x"


def send(alone: Alone) -> None:
    alone.start_session()
    alone("-L", SOCKET, A, input="hello there\n")
    wait_until(lambda: tmux("capture-pane", "-p", "-t", f"={A}:").count("hello there") == 2, message="cat's answer")


def setup_worktree(alone: Alone) -> None:
    write_files(alone.repo, {".gitignore": ".env\n", ".worktreeinclude": ".env\n", ".env": "1\n"})
    write_files(alone.repo, {".farm/setup": "#!/bin/sh\necho done >made-by-setup\n"})
    (alone.repo / ".farm/setup").chmod(0o755)
    alone("-C", alone.repo, alone.tree)
    assert ((alone.tree / ".env").read_text(), (alone.tree / "made-by-setup").read_text()) == ("1\n", "done\n")
    os.utime(alone.repo / ".env", (1, 1))
    (alone.repo / ".env").write_text("2\n")
    alone("-u", "-C", alone.repo, alone.tree)
    assert (alone.tree / ".env").read_text() == "2\n"


def spawn(alone: Alone) -> None:
    row = f"{A}\tfarm/{A}/work\t{alone.tree}\n"
    assert alone("-L", SOCKET, "-c", "echo $FARM_BRANCH", input=row).split("\t")[3] == "started\n"
    log = alone.tree.parent / "logs" / f"{A}.log"
    wait_until(lambda: log.exists() and f"farm/{A}/work" in log.read_text(), message="the session's log")


def stop(alone: Alone) -> None:
    alone.start_session()
    alone("-L", SOCKET, "-a")
    assert tmux("list-sessions") == ""


WORK: dict[str, Callable[[Alone], None]] = {
    "attach-tmux.sh": attach, "check-machine.sh": check_machine,
    "check-tools.sh": check_tools, "environ-tmux.sh": environ, "farm": farm,
    "install-into.sh": install_into, "isolate.sh": isolate, "make-venv.sh": make_venv,
    "mk-worktrees.sh": mk_worktrees, "note-tmux.sh": note,
    "overview-tmux.sh": overview, "probe-tmux.sh": probe, "repair-worktree.sh": repair_worktree, "rescue.sh": rescue,
    "restore-rescue.sh": restore_rescue, "rm-worktrees.sh": rm_worktrees, "run-agent.sh": run_agent,
    "send-tmux.sh": send, "setup-worktree.sh": setup_worktree, "spawn-tmux.sh": spawn, "stop-tmux.sh": stop
}


@pytest.mark.parametrize("name", TOP)
def test_a_script_does_its_work_copied_alone_into_an_empty_folder(name: str, make_repo, sandbox: Sandbox) -> None:
    folder = sandbox.work / "alone"
    folder.mkdir()
    shutil.copy(SCRIPTS / name, folder / name)
    try:
        WORK[name](Alone(folder / name, make_repo(), sandbox))
    finally:
        run(["tmux", "-L", SOCKET, "kill-server"])
    assert [path.name for path in folder.iterdir()] == [name]


def test_the_folder_of_the_merge_queue_does_its_work_copied_whole(make_repo, sandbox: Sandbox) -> None:
    repo, merge = make_repo(), sandbox.work / "merge"
    shutil.copytree(SCRIPTS / "merge", merge)
    git(repo, "checkout", "-q", "-b", "work")
    new = commit_files(repo, {"new.txt": "x\n"})
    git(repo, "checkout", "-q", "main")
    old = git(repo, "rev-parse", "main")
    assert run([merge / "pins.sh", "set", "-C", repo, "refs/farm/ready/t-1", "work"], check=True).stdout == f"{new}\n"
    line = f"t-1\t{new}\t1\t{A}\tTitle\n"
    done = run([merge / "chain.sh", "-C", repo, "-b", "main"], input=line, check=True)
    tip = done.stdout.splitlines()[1].split("\t")[2]
    slot = sandbox.work / "slot"
    run([merge / "gate-slot.sh", "prepare", "-C", repo, slot, tip], check=True)
    run([merge / "gate-slot.sh", "check", slot, tip], check=True)
    run([merge / "gate-slot.sh", "remove", "-C", repo, slot], check=True)
    landed = run([merge / "land.sh", "-C", repo, "-b", "main", "-o", old, "-n", tip], check=True).stdout
    assert (landed, (repo / "new.txt").read_text()) == (f"landed\t{tip}\n", "x\n")
    assert run([merge / "look.sh", "broken", "-C", repo, "-b", "main"], input=f"t-1\t{new}\n", check=True).stdout == ""
    assert run([merge / "repo-info.sh", "-C", repo], check=True).stdout.splitlines()[1] == f"main\t{repo}"
    assert run([merge / "pins.sh", "drop", "-C", repo, "-b", "main"], check=True).stdout == "refs/farm/ready/t-1\n"


def test_the_folder_of_an_attempt_does_its_work_with_what_lies_beside_it(make_repo, sandbox: Sandbox) -> None:
    repo, copy = make_repo(), sandbox.work / "copy"
    for name in ("merge", "agent"):
        shutil.copytree(SCRIPTS / name, copy / name)
    shutil.copy(SCRIPTS / "rescue.sh", copy)
    tree = Alone(copy, repo, sandbox).tree
    write_files(tree, {"unsaved.txt": "x\n"})
    done = run([copy / "agent/start-task.sh", "-a", A, "-t", "t-1", "-b", "main", tree], check=True)
    branch, base, kept = done.stdout.removesuffix("\n").split("\t")
    assert (branch, kept.startswith(f"refs/farm/rescue/{A}/")) == (f"farm/{A}/t-1", True)
    write_files(tree, {"new.txt": "x\n"})
    run([copy / "agent/commit-rest.sh", "-b", branch, "-o", base, "-m", "work", tree], check=True)
    assert git(repo, "ls-tree", "--name-only", branch).split() == ["README.md", "new.txt"]
    with subprocess.Popen(["sleep", "60"]) as process:
        run([copy / "agent/end-tree.sh", str(process.pid)], check=True)
