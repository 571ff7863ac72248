#!/usr/bin/env python3
"""How many gate runs, and how much time, the merge queue's planner needs on simulated gates; beside it other policies.

Usage: merge_simulator.py [--quick] [--draws N] [--seed N]
Prints one table: a figure a row, with the bound that it must keep. Exit: 0 all kept, 1 one is missed, 2 usage.

The gates: all take the same time, which is the unit of the wall time; a draw is a queue of 50 entries, each of which is
bad with probability p, by itself and unknown to the policies. Means over the draws. H is the binary entropy in bits, so
K*(H(p) + p) is what K verdicts are worth plus one repeated run for each bad entry.

A policy is a generator: it yields the tests to run side by side (each a tuple of entries that lands as a whole if it
passes), is sent their verdicts, and returns what it landed and what it returned, in order. Only the farm's own policy
repeats a red before it returns an entry; the others take the first red for the truth.
"""
from __future__ import annotations

import argparse
import functools
import itertools
import math
import random
import sys
from collections import Counter, namedtuple

import paths  # noqa: F401  (sets sys.path)
from table import VERDICTS, is_kept

import farm as toolkit

ENTRIES = 50
SLOTS = 4
FLAKE_DRAWS = 200  # as many as the bound speaks of, also in the quick form
UNTESTED = toolkit.Evidence(0, 0)

Outcome = namedtuple("Outcome", "runs wall landed returned")
Row = namedtuple("Row", "figure bound farm others")


class World:
    """One draw: which entries are bad, which pairs fail only together, how often a gate is red by chance."""

    def __init__(self, seed: int, *, failure_rate: float = 0.0, pairs: int = 0, flake_rate: float = 0.0):
        """Draw the world number `seed`; the same arguments give the same world."""
        self.chance = random.Random(seed)
        self.bad = {entry for entry in range(ENTRIES) if self.chance.random() < failure_rate}
        picked = self.chance.sample(range(ENTRIES), 2 * pairs)
        self.pairs = [tuple(sorted(picked[place : place + 2])) for place in range(0, 2 * pairs, 2)]
        self.flake_rate = flake_rate

    def is_good(self, entries: tuple) -> bool:
        """Say whether the tree with these entries is truly good."""
        present = set(entries)
        return not present & self.bad and not any(present.issuperset(pair) for pair in self.pairs)

    def gate(self, entries: tuple) -> bool:
        """Run the gate once: red for a tree that is not good, and now and then by chance."""
        return self.is_good(entries) and self.chance.random() >= self.flake_rate

    def wrongly_returned(self, returned: tuple) -> int:
        """Count the returned entries that are neither bad nor the later one of a pair."""
        at_fault = self.bad | {later for _, later in self.pairs}
        return len(set(returned) - at_fault)


# --- policies --------------------------------------------------------------------------------------------------------


class GateMemory:
    """What a farm remembers of its gate from queue to queue: of how many trees that passed it, how many also failed."""

    def __init__(self):
        """Start as a farm that has never run its gate."""
        self.flaky = self.green = 0

    def add(self, found) -> tuple[int, int]:
        """Give (flaky, green) trees ever seen, those of the Evidence in `found` counted in but not yet kept."""
        green = [evidence.reds for evidence in found if evidence.greens]
        return self.flaky + sum(reds > 0 for reds in green), self.green + len(green)

    def keep(self, found) -> None:
        """Keep the Evidence in `found` for the queues to come."""
        self.flaky, self.green = self.add(found)


def look_up(found: dict, landed: tuple, entries: tuple) -> toolkit.Evidence:
    """Give the Evidence of the tree with `entries` on top of those `landed`."""
    return found.get(landed + entries, UNTESTED)


def farm_queue(queue: tuple, slots: int = SLOTS, memory: GateMemory | None = None, *, strict: bool = False):
    """Follow the farm's planner; it learns the failure rate from this queue alone."""
    memory = memory or GateMemory()
    landed, returned, found = (), (), {}
    while queue:
        rate = toolkit.failure_rate(len(returned), len(landed) + len(returned))
        reds = toolkit.reds_needed(*memory.add(found.values()))
        verdict_of = functools.partial(look_up, found, landed)
        now = toolkit.plan(queue, verdict_of, slots, rate, reds=reds, strict=strict)
        if now.land or now.guilty is not None:
            landed += queue[: now.land]
            returned += (now.guilty,) if now.guilty is not None else ()
            queue = tuple(entry for entry in queue[now.land :] if entry != now.guilty)
            continue
        trees = [landed + entries for entries in now.tests]
        verdicts = yield trees
        for tree, green in zip(trees, verdicts, strict=True):
            before = found.get(tree, UNTESTED)
            found[tree] = toolkit.Evidence(before.greens + green, before.reds + (not green))
    memory.keep(found.values())
    return landed, returned


def one_by_one(queue: tuple):
    """Gate each entry on top of all that landed before it."""
    landed, returned = (), ()
    for entry in queue:
        (green,) = yield [(*landed, entry)]
        landed, returned = ((*landed, entry), returned) if green else (landed, (*returned, entry))
    return landed, returned


def bors_bisection(queue: tuple):
    """Gate all that waits as one batch; split a red batch in halves that are queued again, as bors does."""
    landed, returned, batches = (), (), [queue]
    while batches:
        batch = batches.pop(0)
        (green,) = yield [landed + batch]
        middle = len(batch) // 2
        if green:
            landed += batch
        elif middle:
            batches[:0] = [batch[:middle], batch[middle:]]
        else:
            returned += batch
    return landed, returned


def zuul_window(queue: tuple, window: int = SLOTS):
    """Gate the first `window` entries, each on top of those before it; what is behind a red one starts again."""
    landed, returned = (), ()
    while queue:
        verdicts = yield [landed + queue[:length] for length in range(1, min(window, len(queue)) + 1)]
        green = [*verdicts, False].index(False)
        landed, returned = landed + queue[:green], returned + queue[green : len(verdicts)][:1]
        queue = queue[green + (green < len(verdicts)) :]
    return landed, returned


def halves_side_by_side(queue: tuple, slots: int = SLOTS):
    """Bisect with the next levels of halves run at once: `slots` cuts, evenly spread over what is open or failing."""
    landed, returned, failing = (), (), 0
    while queue:
        cuts = slots + 1 if failing else slots  # a failing bound itself need not be run again
        open_entries = failing or len(queue)
        lengths = sorted({math.ceil(open_entries * part / cuts) for part in range(1, slots + 1)} - {failing})
        verdicts = yield [landed + queue[:length] for length in lengths]
        passed = dict(zip(lengths, verdicts, strict=True))
        green = max((length for length in lengths if passed[length]), default=0)
        reds = [length for length in lengths if not passed[length] and length > green]
        failing = max(0, min(reds, default=failing) - green)
        landed, queue = landed + queue[:green], queue[green:]
        if failing == 1:
            returned, queue, failing = returned + queue[:1], queue[1:], 0
    return landed, returned


OTHERS = {
    "one by one": one_by_one,
    "bors": bors_bisection,
    f"window of {SLOTS}": zuul_window,
    "halves at once": halves_side_by_side,
}


# --- measures --------------------------------------------------------------------------------------------------------


def drive(policy, world: World) -> Outcome:
    """Run one policy through one world; the wall time counts the rounds of gates side by side."""
    runs = wall = 0
    verdicts = None
    while True:
        try:
            tests = policy.send(verdicts)
        except StopIteration as end:
            return Outcome(runs, wall, *end.value)
        runs, wall = runs + len(tests), wall + 1
        verdicts = [world.gate(entries) for entries in tests]


def run_draws(policy_of, draws: int, seed: int, **kind) -> Counter:
    """Sum over `draws` worlds of one `kind`: gate `runs`, `wall`, entries `returned` and of these the `wrong` ones.

    `policy_of(queue)` starts the policy. Raises AssertionError when one loses an entry or lands a tree that is red.
    """
    total = Counter()
    for draw in range(draws):
        world = World(seed * 1_000_003 + draw, **kind)
        outcome = drive(policy_of(tuple(range(ENTRIES))), world)
        assert sorted(outcome.landed + outcome.returned) == list(range(ENTRIES)), "an entry is lost"
        assert world.is_good(outcome.landed), "the target is red"
        wrong = world.wrongly_returned(outcome.returned)
        total.update(runs=outcome.runs, wall=outcome.wall, returned=len(outcome.returned), wrong=wrong)
    return total


def entropy_bound(failure_rate: float) -> float:
    """Give 1.10 * K * (H(p) + p): the gate runs that K entries may cost, in runs."""
    bits = -sum(chance * math.log2(chance) for chance in (failure_rate, 1 - failure_rate))
    return 1.10 * ENTRIES * (bits + failure_rate)


def measure(slots: int, draws: int, seed: int, **kind) -> list[dict]:
    """Run the same draws through the farm with `slots` and through the other policies; means a draw, farm first."""
    policies = [lambda queue: farm_queue(queue, slots), *OTHERS.values()]
    totals = [run_draws(policy, draws, seed, **kind) for policy in policies]
    return [{name: total[name] / draws for name in ("runs", "wall", "returned", "wrong")} for total in totals]


def make_row(figure: str, bound: float | None, measured: list[dict], name: str) -> Row:
    """Pick the figure `name` out of what `measure` gave."""
    values = [policy[name] for policy in measured]
    return Row(figure, bound, values[0], values[1:])


def flake_row(figure: str, slots: int, seed: int, **kind) -> Row:
    """Count the good entries returned in all FLAKE_DRAWS draws, which are queues of one farm one after the other."""
    memory = GateMemory()
    farm = run_draws(lambda queue: farm_queue(queue, slots, memory), FLAKE_DRAWS, seed, **kind)
    others = [run_draws(policy, FLAKE_DRAWS, seed, **kind)["wrong"] for policy in OTHERS.values()]
    return Row(figure, 0, farm["wrong"], others)


def measure_all(draws: int, seed: int):
    """Yield the rows of the table."""
    yield make_row("gate runs, 1 slot, none bad", 4, measure(1, 1, seed), "runs")
    for rate in (0.05, 0.1, 0.2):
        measured = measure(1, draws, seed, failure_rate=rate)
        yield make_row(f"gate runs, 1 slot, p={rate}", entropy_bound(rate), measured, "runs")
        yield make_row("  lone diagnostic runs, apart", None, measured, "returned")
    for rate, bound in ((0.05, 8.5), (0.1, 13.5), (0.2, None)):
        measured = measure(SLOTS, draws, seed, failure_rate=rate)
        yield make_row(f"wall time, {SLOTS} slots, p={rate}", bound, measured, "wall")
        yield make_row("  gate runs for it", None, measured, "runs")
    measured = measure(SLOTS, draws, seed, pairs=2)
    yield make_row(f"wall time, {SLOTS} slots, two pairs fail together", 7.5, measured, "wall")
    yield make_row("  other entries returned", 0, measured, "wrong")
    for slots, rate in itertools.product((1, SLOTS), (0.0, 0.05)):
        title = f"good ones returned, 1 % flakes, p={rate}, slots {slots}"
        yield flake_row(title, slots, seed, failure_rate=rate, flake_rate=0.01)


def format_row(row: Row) -> str:
    """Write one line of the table."""
    bound = "-" if row.bound is None else f"<= {row.bound:.2f}"
    verdict = VERDICTS[is_kept(row.farm, row.bound)]
    others = "".join(f"{value:>16.2f}" for value in row.others)
    return f"{row.figure:<52}{row.farm:>8.2f}{bound:>10}  {verdict:<7}{others}"


def main(argv: list[str]) -> int:
    """Print the table; 1 when a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="100 draws instead of 1000")
    parser.add_argument("--draws", type=int, help="draws for each mean")
    parser.add_argument("--seed", type=int, default=1, help="which draws (default 1)")
    options = parser.parse_args(argv)
    draws = options.draws or (100 if options.quick else 1000)
    print(f"{ENTRIES} entries, {draws} draws for a mean, {FLAKE_DRAWS} for a count; unit of wall time: one gate")
    print(f"{'figure':<52}{'farm':>8}{'bound':>10}  {'':<7}" + "".join(f"{name:>16}" for name in OTHERS))
    kept = True
    for row in measure_all(draws, options.seed):
        print(format_row(row), flush=True)
        kept = kept and is_kept(row.farm, row.bound) is not False
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
