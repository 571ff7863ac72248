"""A file system in memory that forgets what was not made durable, and a farm whose store runs on it unchanged.

The store's own code makes its system calls on `System`, which stands in for farm.py's `os`. Each call that changes something is one
step; a write is two, so that it can be torn. `fuse = n` ends the program before its n-th step (`Cut`), `error_at = n` makes that
step fail. After a cut the machine either lives on (kill -9: the page cache is whole) or it does not (a power cut): then `images`
yields what the disk may hold: any subset of the folder operations that no fsync of the folder covered, with each file that was
not fsynced whole, torn, empty, zeroed or as it was before.
"""
from __future__ import annotations

import errno
import fcntl
import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
from store_views import raw_copies, view_of

import farm as toolkit

REPO = "/simulated"
FOLDER = REPO + "/coordination"
STORY_FILES = ("events.jsonl", ".lock")  # nothing reads them to find out what a task is
HOST = os.uname().nodename


class Cut(BaseException):
    """The program ends here, like by SIGKILL; no `except Exception` sees it."""


# ---------------------------------------------------------------------------------------------- the tree


class File:
    """An inode: what readers see, and what a power cut leaves of it (None: nothing yet)."""

    __slots__ = ("data", "durable")

    def __init__(self, data: bytes = b"", durable: bytes | None = None):
        self.data, self.durable = data, durable

    def variants(self) -> list[bytes]:
        """What a power cut may leave, what readers see first."""
        if self.data == self.durable:
            return [self.data]
        # what was appended to durable text comes in part or as zeros; the text before it stays
        kept = self.durable if self.durable and self.data.startswith(self.durable) else b""
        new = self.data[len(kept):]
        return list(dict.fromkeys([self.data, self.durable or b"", kept + new[:len(new) // 2], kept + b"\0" * len(new)]))


class Folder:
    """Names that readers see, names that a power cut leaves, and the operations between the two."""

    __slots__ = ("entries", "durable", "log")

    def __init__(self):
        self.entries: dict[str, File | Folder] = {}
        self.durable: dict[str, File | Folder] = {}
        self.log: list[tuple] = []

    def apply(self, *changes: tuple) -> None:
        """One atomic operation: (name, node or None)..."""
        change(self.entries, changes)
        self.log.append(changes)

    def make_durable(self) -> None:
        self.durable, self.log = dict(self.entries), []

    def after(self, kept: set[int]) -> dict:
        """The names that are left when of the operations in `log` only those in `kept` (by identity) reached the disk."""
        entries = dict(self.durable)
        for operation in self.log:
            if id(operation) in kept:
                change(entries, operation)
        return entries


def change(entries: dict, changes: tuple) -> None:
    for name, node in changes:
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


def clone(node: File | Folder, known: dict | None = None) -> File | Folder:
    """A copy of a whole tree that shares nothing that changes; hard links stay hard links."""
    known = {} if known is None else known
    if id(node) in known:
        return known[id(node)]
    if isinstance(node, File):
        known[id(node)] = File(node.data, node.durable)
        return known[id(node)]
    copy = known[id(node)] = Folder()
    copy.entries = {name: clone(child, known) for name, child in node.entries.items()}
    copy.durable = {name: clone(child, known) for name, child in node.durable.items()}
    copy.log = [tuple((name, child and clone(child, known)) for name, child in operation) for operation in node.log]
    return copy


def all_folders(root: Folder) -> list[Folder]:
    found, waiting = [], [root]
    while waiting:
        folder = waiting.pop()
        if any(folder is other for other in found):
            continue
        found.append(folder)
        children = [*folder.entries.values(), *folder.durable.values()]
        waiting += [child for child in children if isinstance(child, Folder)]
    return found


def choose_subsets(count: int, limit: int, rng: random.Random) -> Iterator[tuple[bool, ...]]:
    """All subsets of `count` operations; above `limit` all, none, each prefix, each one alone or missing, and random ones."""
    if 2 ** count <= limit:
        yield from itertools.product((True, False), repeat=count)
        return
    picked = [tuple(index < length for index in range(count)) for length in range(count + 1)]
    picked += [tuple((index == one) == alone for index in range(count)) for one in range(count) for alone in (True, False)]
    picked += [tuple(rng.random() < 0.5 for _ in range(count)) for _ in range(max(0, limit - len(picked)))]
    yield from dict.fromkeys(picked)


def images(root: Folder, limit: int, rng: random.Random) -> Iterator[tuple]:
    """What the disk may hold after a power cut now: hashable, each once; `tree_of` makes a tree of it."""
    operations = [operation for folder in all_folders(root) for operation in folder.log]
    seen = set()
    for subset in choose_subsets(len(operations), limit, rng):
        kept = {id(operation) for operation, keep in zip(operations, subset, strict=True) if keep}
        layout, files = lay_out(root, kept)
        for contents in choose_contents(layout, files):
            image = (layout, contents)
            if image not in seen:
                seen.add(image)
                yield image


def lay_out(root: Folder, kept: set[int]) -> tuple[tuple, list[File]]:
    """((path, number of the file or -1 for a folder)...), files."""
    layout, numbers, files = [], {}, []
    waiting: list[tuple[str, Folder]] = [("", root)]
    while waiting:
        path, folder = waiting.pop()
        layout.append((path, -1))
        for name, node in sorted(folder.after(kept).items()):
            if isinstance(node, Folder):
                waiting.append((f"{path}/{name}", node))
                continue
            if id(node) not in numbers:
                numbers[id(node)] = len(files)
                files.append(node)
            layout.append((f"{path}/{name}", numbers[id(node)]))
    return tuple(layout), files


def choose_contents(layout: tuple, files: list[File]) -> Iterator[tuple[bytes, ...]]:
    """Everything whole, then one file at a time damaged in each way. History is left empty: no task depends on it."""
    story = {number for path, number in layout if os.path.basename(path) in STORY_FILES}
    whole = [b"" if number in story else file.data for number, file in enumerate(files)]
    yield tuple(whole)
    for number, file in enumerate(files):
        for data in () if number in story else file.variants()[1:]:
            yield (*whole[:number], data, *whole[number + 1:])


def tree_of(image: tuple) -> Folder:
    """A tree in which all is durable, as after a reboot."""
    layout, contents = image
    files = [File(data, data) for data in contents]
    folders: dict[str, Folder] = {}
    for path, number in layout:
        node: File | Folder = Folder() if number < 0 else files[number]
        if number < 0:
            folders[path] = node
        if path:
            parent, name = os.path.split(path)
            folders["" if parent == "/" else parent].entries[name] = node
    for folder in folders.values():
        folder.make_durable()
    return folders[""]


# ---------------------------------------------------------------------------------------------- system calls


class System:
    """Stands in for farm.py's `os` (and `os.path`, `fcntl`) on a tree in memory; what it does not know is the real module's."""

    def __init__(self):
        self.root = Folder()
        self.path = SystemPath(self)
        self.fcntl = SimpleNamespace(LOCK_EX=fcntl.LOCK_EX, LOCK_NB=fcntl.LOCK_NB, LOCK_UN=fcntl.LOCK_UN, LOCK_SH=fcntl.LOCK_SH,
                                     flock=self.flock)
        self.observer = lambda call, path: None
        self.restart()

    def __getattr__(self, name: str):
        return getattr(os, name)

    def restart(self, root: Folder | None = None, *, fuse: int = 0, error_at: int = 0, error: int = errno.ENOSPC) -> None:
        """A new process, on `root` when it is given: no open files, no mutex held, steps counted from 1."""
        self.root = root or self.root
        self.fuse, self.error_at, self.error = fuse, error_at, error
        self.steps, self.is_dead, self.mutex = 0, False, -1
        self.open_files: dict[int, list] = {}

    def step(self, call: str, path: str) -> None:
        if self.is_dead:
            raise Cut
        self.steps += 1
        if self.steps == self.fuse:
            self.is_dead = True
            raise Cut
        if self.steps == self.error_at:
            raise OSError(self.error, os.strerror(self.error), path)
        self.observer(call, path)

    def find(self, path: str) -> File | Folder | None:
        node: File | Folder | None = self.root
        for name in path.split("/"):
            if name and node is not None:
                node = node.entries.get(name) if isinstance(node, Folder) else None
        return node

    def get(self, path: str) -> File | Folder:
        node = self.find(path)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return node

    def parent(self, path: str) -> tuple[Folder, str]:
        folder, name = os.path.split(path)
        return self.get(folder), name

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        folder, name = self.parent(path)
        node = folder.entries.get(name)
        if node is None:
            if not flags & os.O_CREAT:
                self.get(path)
            self.step("create", path)
            node = File()
            folder.apply((name, node))
        elif flags & os.O_CREAT and flags & os.O_EXCL:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        if flags & os.O_TRUNC and node.data:
            self.step("truncate", path)
            node.data = b""
        descriptor = max(self.open_files, default=1000) + 1
        self.open_files[descriptor] = [node, len(node.data) if flags & os.O_APPEND else 0, path]
        return descriptor

    def close(self, descriptor: int) -> None:
        del self.open_files[descriptor]
        if descriptor == self.mutex:
            self.mutex = -1

    def flock(self, descriptor: int, _operation: int) -> None:
        self.mutex = descriptor

    def write(self, descriptor: int, data) -> int:
        """In two steps, so that a cut can fall between them."""
        position, text = self.open_files[descriptor][1], bytes(data)
        middle = len(text) // 2
        self.pwrite(descriptor, text[:middle], position)
        self.pwrite(descriptor, text[middle:], position + middle)
        self.open_files[descriptor][1] += len(text)
        return len(text)

    def pwrite(self, descriptor: int, data: bytes, offset: int) -> int:
        node, _, path = self.open_files[descriptor]
        self.step("write", path)
        node.data = node.data[:offset] + data + node.data[offset + len(data):]
        return len(data)

    def pread(self, descriptor: int, length: int, offset: int) -> bytes:
        return self.open_files[descriptor][0].data[offset:offset + length]

    def ftruncate(self, descriptor: int, length: int) -> None:
        node, _, path = self.open_files[descriptor]
        self.step("truncate", path)
        node.data = node.data[:length]

    def fsync(self, descriptor: int) -> None:
        node, _, path = self.open_files[descriptor]
        self.step("fsync", path)
        if isinstance(node, Folder):
            node.make_durable()
        else:
            node.durable = node.data

    fdatasync = fsync

    def fstat(self, descriptor: int) -> SimpleNamespace:
        node = self.open_files[descriptor][0]
        return SimpleNamespace(st_ino=id(node), st_dev=0, st_size=len(getattr(node, "data", b"")))

    def stat(self, path: str) -> SimpleNamespace:
        node = self.get(path)
        names = tuple(node.entries) if isinstance(node, Folder) else ()
        return SimpleNamespace(st_ino=id(node), st_dev=0, st_size=len(getattr(node, "data", b"")), st_mtime_ns=hash(names))

    def read(self, path: str, since: int = 0) -> bytes:
        return self.get(path).data[since:]

    def listdir(self, path: str) -> list[str]:
        return list(self.get(path).entries)

    def unlink(self, path: str) -> None:
        self.get(path)
        self.step("unlink", path)
        folder, name = self.parent(path)
        folder.apply((name, None))

    def link(self, source: str, target: str) -> None:
        node = self.get(source)
        self.step("link", target)
        if self.find(target) is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), source, None, target)
        folder, name = self.parent(target)
        folder.apply((name, node))

    def replace(self, source: str, target: str) -> None:
        """Within one folder, as the store does it. Two names of one inode: nothing happens (POSIX)."""
        folder, name = self.parent(target)
        node = self.get(source)
        if folder.entries.get(name) is node:
            return
        self.step("rename", target)
        folder.apply((os.path.basename(source), None), (name, node))

    def mkdir(self, path: str, mode: int = 0o777) -> None:
        folder, name = self.parent(path)
        self.step("mkdir", path)
        folder.apply((name, Folder()))

    def makedirs(self, path: str, mode: int = 0o777, exist_ok: bool = False) -> None:
        so_far = ""
        for name in path.strip("/").split("/"):
            so_far += "/" + name
            if self.find(so_far) is None:
                self.mkdir(so_far)

    def put(self, path: str, data: bytes) -> None:
        """What a person's editor does beside the farm: a durable file, no steps."""
        folder, name = self.parent(path)
        folder.apply((name, File(data, data)))
        folder.make_durable()


class SystemPath:
    """Stands in for `os.path`."""

    def __init__(self, system: System):
        self.system = system

    def __getattr__(self, name: str):
        return getattr(os.path, name)

    def exists(self, path: str) -> bool:
        return self.system.find(path) is not None

    def isdir(self, path: str) -> bool:
        return isinstance(self.system.find(path), Folder)

    def isfile(self, path: str) -> bool:
        return isinstance(self.system.find(path), File)


# ---------------------------------------------------------------------------------------------- a farm on it


class World:
    """A farm in memory: its store, a clock that stands still, and who is alive."""

    def __init__(self):
        self.system = System()
        self.system.makedirs(REPO)
        for folder in all_folders(self.system.root):
            folder.make_durable()
        disk = toolkit.Disk()
        disk.rename, disk.link, disk.unlink = self.system.replace, self.system.link, self.system.unlink
        disk.read, disk.list_folder = self.system.read, self.system.listdir
        self.store = toolkit.Store(REPO, disk)
        self.now, self.boot, self.alive = 1_700_000_000.0, "boot-1", {}
        self.said: list[str] = []
        self.starts = itertools.count(1)

    def owner_of(self, agent: str) -> toolkit.Owner:
        """The live process behind `agent` (agent-003's is pid 103); a new one when the last was killed."""
        pid = 100 + int(agent.rpartition("-")[2])
        if not self.alive.get(pid):
            self.alive[pid] = str(next(self.starts))
        return toolkit.Owner(pid, self.alive[pid], self.boot, HOST, "namespace")

    def kill(self, agent: str) -> None:
        self.alive[self.owner_of(agent).pid] = ""

    def view(self) -> dict:
        """What the next transaction makes of the disk: healed, then compared with what a reader without the store finds there.

        Raises AssertionError for a task that is there twice, or that can be claimed although it is held or done.
        """
        with self.store.transaction() as tx:
            view = view_of(tx.state)
            claimable = [task.id for task in toolkit.TaskQueue(tx).claimable("agent-099")]
        assert all(view[task_id][0] == "pending" for task_id in claimable), "work that is held or done can be claimed"
        once = Counter(key for key in view if not key.startswith("claim "))
        assert raw_copies(self.system, FOLDER) == once, "there twice, or not at all"
        return view


@contextmanager
def mounted(world: World) -> Iterator[World]:
    """While it lasts, farm.py's system calls, clock, boot id and processes are those of `world`."""
    stand_ins = {
        "os": world.system, "fcntl": world.system.fcntl, "boot_id": lambda: world.boot, "pid_namespace": lambda: "namespace",
        "start_of": lambda pid: world.alive.get(pid, ""), "spawn_script": lambda *_: "c0ffee\n",
        # No git moves a pin here, and one process runs at a time: nothing need lock it.
        # each landing moves the one before to the archive
        "LANDED_MAX": 1, "LANDED_KEPT": 0,
        "hold_pin": lambda *_: nullcontext(),
        "say": world.said.append,
        "CLOCK": SimpleNamespace(now=lambda: world.now, monotonic=lambda: world.now),
        "time": SimpleNamespace(**{**vars(time), "sleep": lambda _seconds: None}),
    }
    before = {name: getattr(toolkit, name) for name in stand_ins}
    for name, stand_in in stand_ins.items():
        setattr(toolkit, name, stand_in)
    try:
        yield world
    finally:
        for name, original in before.items():
            setattr(toolkit, name, original)


@contextmanager
def watched(on_move: Callable[[toolkit.Transaction], None]) -> Iterator[None]:
    """Call `on_move(tx)` whenever one of a transaction's outermost moves has returned."""
    depth = 0

    def watch(original: Callable) -> Callable:
        def method(tx: toolkit.Transaction, *args, **options):
            nonlocal depth
            depth += 1
            try:
                answer = original(tx, *args, **options)
            finally:
                depth -= 1
            if not depth:
                on_move(tx)
            return answer

        return method

    with pytest.MonkeyPatch.context() as patch:
        for name in ("move", "claim", "write", "write_lock", "remove_lock"):
            patch.setattr(toolkit.Transaction, name, watch(getattr(toolkit.Transaction, name)))
        yield
