"""What every test stands on: a private environment, throw-away repos and farms, and a reaper that fails a test which leaks."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest
from attacks import Ground
from attempt_calls import Clock
from farm_calls import FARM, Caller, copy_repo
from merge_calls import Queue, find_gate_processes
from merge_scripts import MakeRepo, Repo
from paths import SCRIPTS
from report_story import Story, make_busy, make_hostile
from sandbox import (
    Sandbox,
    commit_files,
    describe_leftovers,
    end_leftovers,
    find_processes,
    git,
    make_writable_and_retry,
    set_environment,
    wait_until,
)
from screens import Screen, agents_of, up
from worked import Worked

import farm as toolkit

GRACE_SECONDS = 3.0


@pytest.fixture(scope="session", autouse=True)
def base_of_temp_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chosen before a test sets TMPDIR: else it would lie in the first test's sandbox, and go with it."""
    return tmp_path_factory.getbasetemp()


@pytest.fixture(autouse=True)
def sandbox(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """The test's private environment; afterwards whatever still runs in it is ended, and fails the test."""
    # where /tmp is root's alone, another user of a test reaches nothing in it
    place = "/tmp" if os.stat("/tmp").st_mode & 1 else "/var/tmp"
    root = Path(tempfile.mkdtemp(prefix="f-", dir=place)).resolve()
    box = Sandbox(root, root / "home", root / "work", root / "tmux", secrets.token_hex(8))
    for folder in (box.home, box.work, box.tmux, root / "tmp"):
        folder.mkdir()
    set_environment(monkeypatch, box)
    try:
        yield box
        deadline = time.monotonic() + GRACE_SECONDS
        tidy = "farm_cleanup" in request.fixturenames
        while not tidy and describe_leftovers(box) and time.monotonic() < deadline:
            time.sleep(0.02)
        left = [] if tidy else describe_leftovers(box)
    finally:
        end_leftovers(box)
        shutil.rmtree(root, onerror=make_writable_and_retry)
    if left:
        pytest.fail("left running by this test:\n  " + "\n  ".join(left))


@pytest.fixture
def farm_cleanup(sandbox: Sandbox) -> Callable[[], None]:
    """Ask for it to have leftovers ended without failing the test; call it to end them now."""
    return lambda: end_leftovers(sandbox)


@pytest.fixture
def make_repo(sandbox: Sandbox) -> Callable[..., Path]:
    """A factory of throw-away repos: `make_repo(name="repo", files={"a.txt": "text"}, commits=1, branch="main")`."""

    def make(name: str = "repo", files: Mapping[str, str] | None = None, commits: int = 1, branch: str = "main") -> Path:
        repo = sandbox.work / name
        repo.mkdir(parents=True)
        git(repo, "init", "-q", "-b", branch)
        for number in range(1, commits + 1):
            first = {"README.md": "a throw-away repo\n"} if files is None else files
            commit_files(repo, first if number == 1 else {"log.txt": f"{number}\n"}, f"commit {number}")
        return repo

    return make


@pytest.fixture
def farm(sandbox) -> Caller:
    """A farm on a new repo of one commit; its claims are owned by the test's own process."""
    return Caller(copy_repo(sandbox.work / "repo"), os.getpid())


@pytest.fixture
def app(make_repo) -> Caller:
    """A farm on a new repo `app` with one file."""
    return Caller(make_repo("app", files={"a.txt": "one\n"}), os.getpid())


@pytest.fixture
def screen(farm):
    """A factory of Screens that run a verb of the farm."""
    opened = []

    def open_screen(*words: str, **options) -> Screen:
        opened.append(Screen([sys.executable, FARM, "--repo", farm.repo, *words], **options))
        return opened[-1]

    yield open_screen
    for one in opened:
        one.close()


@pytest.fixture
def three(farm):
    """A farm with three agents at work."""
    for number in range(3):
        farm.ok("add", f"task {number}")
    up(farm, 3, "echo here is $FARM_AGENT_NAME; while read -r line; do echo \"got $line\"; done")
    wait_until(lambda: [agent["state"] for agent in agents_of(farm).values()] == ["working"] * 3, 40, "three at work")
    yield farm
    farm.ok("down", "--now", timeout=120)


@pytest.fixture
def no_gate_is_left(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gates do not inherit the sandbox's own token, so they have one of their own and their reaper here."""
    monkeypatch.setenv("GATE_TOKEN", sandbox.token)
    yield
    left = find_gate_processes(sandbox.token, f"{sandbox.root}/")
    lines = [str(process) for process in left]
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    assert lines == [], "left running by this test"


@pytest.fixture
def outside(sandbox: Sandbox) -> Path:
    folder = sandbox.work / "outside"
    folder.mkdir()
    return folder


@pytest.fixture
def queue(make_repo: Callable[..., Path], outside: Path) -> Queue:
    """An empty queue on a repo with a few files."""
    lines = "".join(f"line {number}\n" for number in range(1, 21))
    files = {"README.md": "text\n", "words.txt": "none\n", "long.txt": lines, ".gitignore": "cache/\n"}
    return Queue(make_repo(files=files), outside)


@pytest.fixture
def clock(monkeypatch):
    fake = Clock()
    monkeypatch.setattr(toolkit, "CLOCK", fake)
    return fake


@pytest.fixture
def store(make_repo):
    store = toolkit.Store(str(make_repo()))
    with store.transaction() as tx:
        toolkit.TaskQueue(tx).add([toolkit.Task(title="one"), toolkit.Task(title="two", priority=5)], 3)
    return store


@pytest.fixture
def kill_everything(sandbox) -> Callable[[], None]:
    """kill -9 of every process of the test's farm, tmux included."""

    def kill() -> None:
        while processes := find_processes(sandbox.token):
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=1)

    return kill


@pytest.fixture
def worked(make_repo, farm_cleanup) -> Worked:
    """A farm at work on a new repo of one commit; what is left running is ended without failing the test."""
    return Worked(make_repo(), os.getpid())


@pytest.fixture
def story(make_repo, monkeypatch) -> Story:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    return Story(make_repo(), monkeypatch)


@pytest.fixture
def busy(story) -> Story:
    return make_busy(story)


@pytest.fixture
def hostile(story) -> Story:
    return make_hostile(story)


@pytest.fixture
def elsewhere(sandbox: Sandbox) -> Path:
    """A folder that lives as long as the sandbox does."""
    folder = sandbox.work / "elsewhere"
    folder.mkdir()
    return folder


@pytest.fixture
def repo(make_repo: MakeRepo) -> Repo:
    return make_repo(files={"a.txt": "one\ntwo\nthree\n", "dir/b.txt": "b\n", "keep.txt": "keep\n"})


ADMITTED = "FARM_TESTS_WITHOUT_SANDBOX"  # set: a place where bwrap cannot work is admitted, and said


@pytest.fixture(scope="module")
def there_can_be_sandboxes() -> None:
    done = subprocess.run(["bash", SCRIPTS / "sandbox/check-sandbox.sh"], capture_output=True, text=True)
    if done.returncode and os.environ.get(ADMITTED):
        sys.__stderr__.write(f"\nNO SANDBOX HERE, AND NOTHING OF IT IS TESTED: {done.stderr}\n")
        pytest.skip(f"no sandbox here: {done.stderr}", allow_module_level=True)
    assert done.returncode == 0, f"{done.stderr}(to admit it: {ADMITTED}=1)"


@pytest.fixture
def make_ground(sandbox) -> Iterator:
    made = []

    def make(uid: int, name: str = "g") -> Ground:
        os.chmod(sandbox.root, 0o755)
        (sandbox.root / name).mkdir()
        made.append(Ground(sandbox.root / name, uid))
        return made[-1].build()

    yield make
    for ground in made:
        ground.close()
