"""Every verb on a real disk: killed with SIGKILL in each of its file system calls, and with each of them failing."""
from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import fault_injector
import pytest
from sandbox import git, run
from store_views import raw_copies, view_of

import farm as toolkit

INJECTOR = Path(fault_injector.__file__)
CALLS_MAX = 100
OWN = f"--owner-pid {os.getpid()}"
CLAIMED = f"add one; claim agent-001 {OWN}"
READY = f"{CLAIMED}; submit agent-001 --fence t-0001.2 --commit HEAD"


class Case(NamedTuple):
    """setup: verbs that come first, `;` between them; verb: what is cut; is_counting: done twice it counts twice."""

    setup: str
    verb: str
    is_counting: bool = False


CASES = {
    "the very first add": Case("", "add first", is_counting=True),
    "add": Case("add one", "add two --path src", is_counting=True),
    "add -f": Case("add one", "add -f TASKS"),
    "claim": Case("add one", f"claim agent-001 {OWN}"),
    "claim with a lock": Case(f"add one; lock agent-001 schema {OWN}", f"claim agent-001 {OWN}"),
    "renew": Case(CLAIMED, "renew agent-001 --fence t-0001.2", is_counting=True),
    "submit": Case(CLAIMED, "submit agent-001 --fence t-0001.2 --commit HEAD"),
    "fail": Case(CLAIMED, "fail agent-001 --fence t-0001.2 --why broken"),
    "fail with a lock": Case(f"{CLAIMED}; lock agent-001 schema {OWN}", "fail agent-001 --fence t-0001.2 --why broken"),
    "release": Case(CLAIMED, "release agent-001 --fence t-0001.2"),
    "lock": Case("add one", f"lock agent-001 schema port:8080 {OWN}"),
    "lock of what dead agents held": Case("add one; claim agent-008 --owner-pid DEAD; lock agent-009 schema --owner-pid DEAD",
                                          f"lock agent-001 schema {OWN}"),
    "unlock": Case(f"lock agent-001 schema port:8080 {OWN}", "unlock agent-001 schema port:8080"),
    "cancel": Case("add one", "cancel t-0001"),
    "cancel what is ready": Case(READY, "cancel t-0001"),
    "retry": Case("add one; cancel t-0001", "retry t-0001", is_counting=True),
    "record-landed": Case(READY, "record-landed t-0001"),
}


class Farm:
    """A repo and its coordination/ folder, which can be put back to what it was after the setup."""

    def __init__(self, repo: Path, case: Case, capsys: pytest.CaptureFixture):
        self.repo, self.folder, self.base, self.capsys = repo, repo / "coordination", repo.parent / "base", capsys
        self.argv = ["--repo", str(repo), *case.verb.replace("TASKS", str(repo / "tasks.md")).split()]
        (repo / "tasks.md").write_text("- [ ] three\n  - [ ] four\n- [ ] five\n", encoding="utf-8")
        for line in filter(None, case.setup.split("; ")):
            self.setup(line)
        if case.setup:
            self.folder.rename(self.base)
        self.reset()
        self.before = self.view() if case.setup else {}
        self.reset()
        assert self.call(self.argv)[0] == 0, "the verb itself does not work"
        self.after = self.view()

    def setup(self, line: str) -> None:
        with subprocess.Popen(["sleep", "60"]) as dead:
            argv = line.replace("DEAD", str(dead.pid)).split()
            answer = self.call(["--repo", str(self.repo), *argv])
            dead.kill()
        assert answer[0] == 0, f"{line}: {answer[1]}"

    def reset(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.repo / ".git/farm", ignore_errors=True)
        if self.base.exists():
            shutil.copytree(self.base, self.folder)

    def call(self, argv: list[str]) -> tuple[int, str]:
        """(exit code, stderr) of a verb in this process."""
        self.capsys.readouterr()
        code = toolkit.main(argv)
        return code, self.capsys.readouterr().err

    def view(self) -> dict:
        """Each task and lock as the next transaction finds it, and as it lies on the disk afterwards; without times."""
        with toolkit.Store(str(self.repo)).transaction() as tx:
            view = view_of(tx.state)
        disk = toolkit.Disk()
        copies = raw_copies(SimpleNamespace(read=disk.read, listdir=disk.list_folder), str(self.folder))
        assert copies == {key: 1 for key in view if not key.startswith("claim ")}, f"on disk: {copies}"
        return {key: re.sub(r"\d{4}-\d\d-\d\dT[\d:]+Z", "TIME", str(value)) for key, value in view.items()}

    def assert_free(self, label: str) -> None:
        """Nobody holds the mutex; so nobody waits for it in vain."""
        if not (self.folder / ".lock").exists():
            return
        with open(self.folder / ".lock", "a", encoding="ascii") as mutex:
            try:
                fcntl.flock(mutex, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pytest.fail(f"the mutex was kept; {label}")

    def is_between(self, view: dict) -> bool:
        """Each task and lock is as before the verb or as after it."""
        return all(view.get(key) in (self.before.get(key), self.after.get(key)) for key in {*view, *self.before, *self.after})


@pytest.fixture
def make_farm(make_repo, capsys):
    return lambda name: Farm(make_repo(), CASES[name], capsys)


@pytest.mark.parametrize("name", CASES)
def test_a_verb_that_is_killed_in_any_call_was_made_or_not_and_can_be_repeated(name, make_farm):
    place, kills = make_farm(name), 0
    for number in range(1, CALLS_MAX):
        place.reset()
        done = run([sys.executable, "-I", "-S", INJECTOR, number, *place.argv])
        if done.returncode != -signal.SIGKILL:
            break
        kills += 1
        view = place.view()
        assert place.is_between(view), f"killed in call {number}"
        code, said = place.call(place.argv)
        assert code == 0, f"killed in call {number}, then repeated: {said}"
        is_twice = view == place.after and CASES[name].is_counting
        assert is_twice or place.view() == place.after, f"killed in call {number}, then repeated"
    print(f"{kills} kills")
    assert done.returncode == 0 and kills > 5


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=["a full disk", "a broken disk"])
@pytest.mark.parametrize("name", CASES)
def test_a_verb_on_a_disk_that_fails_in_any_call_says_so_and_tells_the_truth(name, error, make_farm):
    place = make_farm(name)

    def fail(call: str, args: tuple) -> None:
        raise OSError(error, os.strerror(error), *[arg for arg in args[:1] if isinstance(arg, str)])

    for number in range(1, CALLS_MAX):
        place.reset()
        with fault_injector.injected(number, fail) as faulty:
            code, said = place.call(place.argv)
        if faulty.calls < number:
            break
        label = f"call {number} failed; it said: {said}"
        place.assert_free(label)
        view = place.view()
        assert (said or code == 0) and "Traceback" not in said, label
        assert all(line.startswith(("farm: ", "  try: ")) for line in said.splitlines()), label
        assert (code, view) == (0, place.after) or code == 1 and place.is_between(view), label
        is_told = "the state is as it was" in said and "DEAD" not in CASES[name].setup  # dead agents are cleared away first
        assert view == place.before or not is_told, label
        assert place.call(place.argv)[0] == 0, label
        assert place.view() == place.after or view == place.after and CASES[name].is_counting, label
    print(f"{number - 1} faults")
    assert code == 0 and number > 5


def test_a_merge_that_is_killed_in_any_call_lands_the_work_once_when_it_is_repeated(make_repo, capsys):
    repo = make_repo()
    base = git(repo, "rev-parse", "HEAD")
    blob = git(repo, "hash-object", "-w", "--stdin", input="work")
    work = git(repo, "commit-tree", "-p", base, "-m", "work", git(repo, "mktree", input=f"100644 blob {blob}\twork.txt"))
    place = Farm(repo, Case(READY.replace("HEAD", work), "merge"), capsys)
    for number in range(1, CALLS_MAX):
        place.reset()
        git(repo, "reset", "-q", "--hard", base)
        done = run([sys.executable, INJECTOR, number, *place.argv])
        if done.returncode != -signal.SIGKILL:
            break
        repeated = run([sys.executable, INJECTOR, 0, *place.argv])
        assert repeated.returncode == 0, f"killed in call {number}, then repeated: {repeated.stderr}"
        assert "landed" in place.view()["t-0001"], f"killed in call {number}"
        assert git(repo, "rev-list", "--count", "--merges", "main") == "1", f"killed in call {number}: landed more than once"
        assert not (place.folder / "merge_queue" / "landing.json").exists()
    print(f"{number - 1} kills")
    assert done.returncode == 0 and number > 5


def test_a_revert_that_is_killed_in_any_call_is_whole_when_it_is_repeated(make_repo, capsys):
    repo = make_repo()
    base = git(repo, "rev-parse", "HEAD")
    blob = git(repo, "hash-object", "-w", "--stdin", input="work")
    work = git(repo, "commit-tree", "-p", base, "-m", "work", git(repo, "mktree", input=f"100644 blob {blob}\twork.txt"))
    place = Farm(repo, Case(f"{READY.replace('HEAD', work)}; merge", "revert t-0001 --retry"), capsys)
    pin, kinds = "refs/farm/ready/revert-t-0001", set()
    for number in range(1, CALLS_MAX):
        place.reset()
        git(repo, "update-ref", "-d", pin)
        done = run([sys.executable, INJECTOR, number, *place.argv])
        if done.returncode != -signal.SIGKILL:
            break
        view = place.view()
        where = "ready" if "'ready'" in (told := view.get("revert-t-0001", "")) else "pending" if told else ""
        kinds.add(f"{bool(git(repo, 'for-each-ref', pin)) * 'pinned '}{where}")
        code, said = place.call(place.argv)
        assert code == 0 or "revert-t-0001 already" in said, f"killed in call {number}, then repeated: {said}"
        with toolkit.Store(str(repo)).transaction() as tx:
            revert, again = tx.state.ready["revert-t-0001"], tx.state.pending["t-0002"]
            assert len(tx.state.pending) == len(tx.state.ready) == 1, f"killed in call {number}, then repeated"
        assert revert.commit == git(repo, "rev-parse", pin), f"killed in call {number}, then repeated"
        assert again.after == ["revert-t-0001"]
    assert done.returncode == 0 and kinds == {"", "pinned ", "pinned pending", "pinned ready"}
