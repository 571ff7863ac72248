"""Run one verb of farm.py with a fault in its n-th call that changes the file system.

Usage: fault_injector.py NUMBER VERB...      the process ends by SIGKILL in that call; a write is torn
Tests that want the call to fail instead use `injected(fault)` in their own process. Beside farm.py's verbs there is
`record-landed ID`, the merge queue's last step.
"""
from __future__ import annotations

import builtins
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]
import farm as toolkit  # noqa: E402  (needs the path above)

CHANGES = ("write", "pwrite", "ftruncate", "fsync", "replace", "link", "unlink", "mkdir", "makedirs")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@toolkit.verb("record-landed ID", "only here: what the merge queue does when the target has moved")
def verb_record_landed(call: toolkit.Call) -> int:
    queue = toolkit.MergeQueue(call.store, toolkit.load_settings(call.repo), "main", "")
    queue.landing.record([(call.args[0], "c0ffee", "", None)])
    return 0


class FaultyOs:
    """farm.py's `os`, which counts the calls that change something and calls `fault(name, args)` before the `number`-th."""

    def __init__(self, number: int, fault: Callable):
        self.number, self.fault, self.calls = number, fault, 0

    def count(self, name: str, args: tuple) -> None:
        self.calls += 1
        if self.calls == self.number:
            self.fault(name, args)

    def __getattr__(self, name: str):
        real = getattr(os, name)
        if name not in CHANGES:
            return real

        def counted(*args, **options):
            self.count(name, args)
            return real(*args, **options)

        return counted

    def open(self, path, flags: int, mode: int = 0o777) -> int:
        if flags & WRITING:
            self.count("open", (path,))
        return os.open(path, flags, mode)

    def open_text(self, path, mode: str = "r", *args, **options):
        if mode[0] in "wa":
            self.count("open", (path,))
        return builtins.open(path, mode, *args, **options)


@contextmanager
def injected(number: int, fault: Callable) -> Iterator[FaultyOs]:
    """While it lasts, farm.py's calls go through a FaultyOs."""
    faulty = FaultyOs(number, fault)
    before = {name: vars(toolkit.Disk)[name] for name in ("rename", "link", "unlink")}
    toolkit.os, toolkit.open = faulty, faulty.open_text
    for name, call in (("rename", "replace"), ("link", "link"), ("unlink", "unlink")):
        setattr(toolkit.Disk, name, staticmethod(getattr(faulty, call)))
    try:
        yield faulty
    finally:
        toolkit.os = os
        del toolkit.open
        for name, method in before.items():
            setattr(toolkit.Disk, name, method)


def die(name: str, args: tuple) -> None:
    """End like under `kill -9`; half of a write is done."""
    if name == "write":
        os.write(args[0], bytes(args[1])[:len(args[1]) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    with injected(int(sys.argv[1]), die):
        code = toolkit.main(sys.argv[2:])
    sys.exit(code)
