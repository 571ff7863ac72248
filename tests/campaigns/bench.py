#!/usr/bin/env python3
"""Measure each speed figure of the farm beside its floor, in the same run, and print one table.

Usage: bench.py [--full | --quick] [--only PATTERN]
The groups of rows are picked by a regular expression on their names. Exit: 0 all kept, 1 one is missed, 2 usage.

A figure and its floor are measured in turn, several times; the table shows medians, so that what else the machine does slows
both alike. `cpu` in a note is the ratio of user plus system time, which a busy machine changes less. What is counted:
  up          farm.py up, from the shell's call until it returns: then each session's own process runs in its worktree
  bare        for each agent git worktree add and tmux new-session, one after the other
  fastest     worktree add --no-checkout in turn, the checkouts on all cores, one call of tmux
  verb        scripts/farm VERB as agents call it, with this interpreter; the floor is this interpreter's start and end
  idle loop   user plus system time of the loop and of all its children, the merger too, as a share of one core
  own time    what a task costs besides the agent's work; the gate is `true`, its start is part of `rest`
"""
from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import bench_hosts  # noqa: F401  (its rows register themselves)
import bench_isolation  # noqa: F401
import bench_year  # noqa: F401
import table
from bench_harness import Bench, Row, Size, private_place
from bench_rows import CORES, GROUPS

FULL = Size(3, 21, (10, 50), 20_000, 30, 100, (20, 50), 60, 10, 50, 5_000, 1000, (10_000, 2_000), 100, 50)
USUAL = Size(2, 11, (10,), 4_000, 5, 50, (20,), 40, 8, 50, 1_000, 200, (10_000, 2_000), 100, 10)
QUICK = Size(1, 3, (10,), 2_000, 5, 20, (20,), 20, 3, 20, 1_000, 100, (500, 100), 10, 4)


def is_kept(row: Row) -> bool | None:
    """Whether the row keeps its bound, which is on the ratio when its unit is x; None without a bound."""
    if not row.bound:
        return None
    relation, limit, *unit = row.bound.split()
    value = row.measured / row.floor if unit == ["x"] else row.measured
    return table.is_kept(value, float(limit), relation)


def format_figure(value: float | None, unit: str) -> str:
    """Three digits, or four before the point."""
    if value is None:
        return "-"
    return f"{value:.4g} {unit}" if abs(value) >= 1 else f"{value:.3f} {unit}"


def format_row(row: Row) -> str:
    """One line of the table."""
    ratio = f"{row.measured / row.floor:.2f} x" if row.floor else "-"
    figures = f"{format_figure(row.measured, row.unit):>10} {format_figure(row.floor, row.unit):>10}"
    cells = f"{figures} {ratio:>9} {row.bound or '-':>11}  {table.VERDICTS[is_kept(row)]:<6}"
    return f"{row.name:<50} {cells}  {row.note}".rstrip()


def run_groups(size: Size, pattern: str = "") -> Iterator[Row]:
    """The rows of every group whose name matches, each in a private place of its own; says how long each group took."""
    for name, group in GROUPS.items():
        if re.search(pattern, name):
            began = time.monotonic()
            with private_place() as box:
                yield from group(Bench(size, box))
            print(f"    ({name}: {time.monotonic() - began:.0f} s)", flush=True)


def describe_machine() -> str:
    """What the figures were measured on."""
    commands = (("git", "--version"), ("tmux", "-V"))
    versions = [subprocess.run(words, capture_output=True, text=True).stdout.strip() for words in commands]
    return f"{CORES} cores, load {os.getloadavg()[0]:.1f}, Python {sys.version.split()[0]}, {', '.join(versions)}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="50 agents, 20,000 files, and more rounds")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller, for a first look")
    parser.add_argument("--only", default="", metavar="PATTERN", help=f"some of the groups: {', '.join(GROUPS)}")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(describe_machine())
    print(f"{'':<50} {'measured':>10} {'floor':>10} {'ratio':>9} {'bound':>11}")
    kept, began = True, time.monotonic()
    size = FULL if options.full else QUICK if options.quick else USUAL
    for row in run_groups(size, options.only):
        print(format_row(row), flush=True)
        kept = kept and is_kept(row) is not False
    print(f"{time.monotonic() - began:.0f} s in all")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
