"""Nothing is ever lost: the store's moves on a simulated disk, with the power failing at every step.

`python tests/campaigns/store_model.py [--states N]` runs a longer campaign and prints what it went through.
"""

from __future__ import annotations

import argparse
import errno
import sys
import time

from store_campaign import campaign
from store_guards import GUARDS, find_violation
from store_moves import COMPOSITE_MOVES, MOVES


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--states", type=int, default=60_000, help="disk states to recover from (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    started = time.monotonic()
    with campaign(options.seed, options.states) as run:
        for part in (run.run_moves, run.run_first_use, run.run_others, run.watch_mutex):
            part()
        run.run_errors(errno.ENOSPC, errno.EIO)
        run.run_pairs(10 ** 9)
    noticed = {guard: find_violation(guard) for guard in GUARDS}
    table = {"moves": len(MOVES) + len(COMPOSITE_MOVES), **run.counts, "violations": len(run.violations),
             "guards left out": len(noticed), "of these noticed": sum(map(bool, noticed.values())),
             "seconds": round(time.monotonic() - started)}
    for name, count in table.items():
        print(f"{name:<30} {count:>9,}")
    for line in run.violations[:20]:
        print(line)
    for guard, violation in noticed.items():
        print(f"without {guard}: {violation or 'NOTHING NOTICED'}")
    return 1 if run.violations or not all(noticed.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
