"""The merge queue's planner: what it proves before it lands or returns, and what it costs on simulated gates."""
from __future__ import annotations

from collections import namedtuple

import merge_simulator as simulator
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import farm as toolkit

GREEN, RED, TWICE_RED, FLAKY = (toolkit.Evidence(*counts) for counts in ((1, 0), (0, 1), (0, 2), (1, 1)))


def plan_for(queue, found, *, slots=1, rate=0.05, running=(), **more):
    """Plan with the Evidence in the dict `found`; trees that are not in it were never gated."""

    def verdict_of(entries):
        return found.get(entries, simulator.UNTESTED)

    return toolkit.plan(tuple(queue), verdict_of, slots, rate, running, **more)


def prefix(length):
    """Give the first `length` entries of a queue that is named a, b, c ..."""
    return tuple("abcdefghijklmnopqrstuvwxyz"[:length])


def entries_of(plan):
    """Give the trees that a plan starts."""
    return list(plan.tests)


# --- landing ---------------------------------------------------------------------------------------------------------


def test_an_empty_queue_asks_for_nothing():
    assert plan_for((), {}, slots=4) == toolkit.Plan(0, None, False, (), ())


def test_the_longest_green_prefix_lands_though_a_shorter_one_is_red():
    assert plan_for(prefix(5), {prefix(2): TWICE_RED, prefix(4): GREEN}).land == 4


def test_strict_lands_only_up_to_the_first_prefix_without_a_green_of_its_own():
    found = {prefix(1): GREEN, prefix(2): GREEN, prefix(4): GREEN}
    assert plan_for(prefix(5), found, strict=True).land == 2


def test_a_tree_that_was_green_once_is_green_whatever_came_after():
    assert plan_for(prefix(3), {prefix(2): toolkit.Evidence(1, 5)}).land == 2


def test_tests_go_on_from_a_green_prefix_that_could_not_land_yet():
    plan = plan_for(prefix(6), {prefix(4): GREEN})
    assert (plan.land, entries_of(plan)) == (4, [prefix(6)])


# --- guilt -----------------------------------------------------------------------------------------------------------


def test_one_red_returns_nobody_and_asks_for_the_same_tree_again():
    plan = plan_for(prefix(3), {(): GREEN, prefix(1): RED})
    assert (plan.guilty, plan.tests[0]) == (None, prefix(1))


def test_a_second_red_on_top_of_a_green_prefix_returns_the_entry():
    plan = plan_for(prefix(4), {prefix(2): GREEN, prefix(3): TWICE_RED})
    assert (plan.land, plan.guilty, entries_of(plan)) == (2, "c", [("a", "b", "d")])


def test_a_gate_that_is_known_to_flake_needs_a_third_red():
    found = {prefix(2): GREEN, prefix(3): TWICE_RED}
    plan = plan_for(prefix(4), found, reds=3)
    assert (plan.guilty, entries_of(plan)) == (None, [prefix(3)])


def test_a_red_that_turns_green_when_repeated_returns_nobody():
    plan = plan_for(prefix(3), {(): GREEN, prefix(1): FLAKY})
    assert (plan.land, plan.guilty) == (1, None)


@pytest.mark.parametrize(("flaky", "green", "reds"), [(0, 0, 2), (0, 9999, 2), (1, 1000, 3), (1, 100, 3), (5, 100, 4)])
def test_more_reds_are_needed_the_more_the_gate_flakes(flaky, green, reds):
    assert toolkit.reds_needed(flaky, green) == reds


def test_reds_needed_stay_bounded_for_a_gate_that_always_flakes():
    assert toolkit.reds_needed(9, 9) <= 12


# --- the target itself -----------------------------------------------------------------------------------------------


def test_the_target_is_tested_before_the_first_entry_is_blamed():
    plan = plan_for(prefix(2), {prefix(1): TWICE_RED})
    assert (plan.guilty, plan.tests[0]) == (None, ())


def test_a_target_that_is_red_twice_pauses_the_queue_and_blames_nobody():
    plan = plan_for(prefix(2), {(): TWICE_RED, prefix(1): TWICE_RED}, slots=4)
    assert plan == toolkit.Plan(0, None, True, (), ())


def test_a_target_that_was_red_once_is_tested_again_before_the_queue_pauses():
    plan = plan_for(prefix(2), {(): RED, prefix(1): TWICE_RED})
    assert (plan.target_red, plan.guilty, entries_of(plan)) == (False, None, [()])


def test_an_entry_that_mends_a_red_target_lands():
    assert plan_for(prefix(2), {(): TWICE_RED, prefix(1): GREEN}).land == 1


def test_the_target_is_not_tested_while_nothing_casts_suspicion_on_it():
    assert () not in entries_of(plan_for(prefix(20), {}, slots=8))


# --- which tree next -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "size"), [(0.05, 14), (0.1, 7), (0.2, 3), (0.5, 1), (0.99, 1)])
def test_a_group_is_as_large_as_makes_red_and_green_equally_likely(rate, size):
    assert entries_of(plan_for(range(50), {}, rate=rate)) == [tuple(range(size))]


def test_a_failing_group_is_cut_where_both_answers_are_likely():
    assert entries_of(plan_for(prefix(20), {prefix(14): RED})) in ([prefix(6)], [prefix(7)])


def test_strict_tests_one_more_entry_at_a_time_and_the_next_ones_ahead():
    assert entries_of(plan_for(prefix(9), {}, slots=3, strict=True)) == [prefix(1), prefix(2), prefix(3)]


def test_spare_slots_run_both_outcomes_of_the_test_under_way_ahead():
    plan = plan_for(range(50), {}, slots=3, running=(tuple(range(14)),))
    assert sorted(len(entries) for entries in entries_of(plan)) == [6, 28]


def test_a_spare_slot_goes_on_without_the_suspect_while_its_red_is_confirmed():
    plan = plan_for(prefix(8), {(): GREEN, prefix(1): RED}, slots=2)
    assert entries_of(plan) == [prefix(1), prefix(8)[1:]]


def test_running_tests_take_up_slots_and_are_not_started_twice():
    plan = plan_for(range(50), {}, slots=1, running=(tuple(range(14)),))
    assert (plan.tests, plan.abandon) == ((), ())


def test_a_running_test_that_contains_a_failing_prefix_is_abandoned():
    plan = plan_for(prefix(20), {prefix(7): RED}, slots=2, running=(prefix(14), prefix(3)))
    assert plan.abandon == (prefix(14),)


def test_a_running_test_of_an_entry_that_left_the_queue_is_abandoned():
    assert plan_for("acd", {}, running=(prefix(4),)).abandon == (prefix(4),)


# --- properties ------------------------------------------------------------------------------------------------------

QUEUES = st.integers(1, 12).map(lambda length: tuple(range(length)))
EVIDENCE = st.builds(toolkit.Evidence, st.integers(0, 2), st.integers(0, 3))


@st.composite
def situations(draw):
    """Draw any queue with any verdicts, also ones that contradict each other, and any tests under way."""
    queue = draw(QUEUES)
    subsets = st.sets(st.sampled_from(queue)).map(lambda chosen: tuple(sorted(chosen)))
    prefixes = st.integers(0, len(queue)).map(lambda length: queue[:length])
    found = draw(st.dictionaries(prefixes | subsets, EVIDENCE, max_size=12))
    running = tuple(draw(st.lists(prefixes | subsets, max_size=4, unique=True)))
    slots, rate = len(running) + draw(st.integers(0, 4)), draw(st.floats(0.001, 0.9))
    more = {"reds": draw(st.integers(2, 4)), "strict": draw(st.booleans())}
    return queue, found, {"slots": slots, "rate": rate, "running": running, **more}


@given(situations())
def test_nobody_is_returned_without_proof(situation):
    queue, found, more = situation
    plan = plan_for(queue, found, **more)
    if plan.guilty is not None:
        place = queue.index(plan.guilty)
        without, with_it = (found.get(queue[:length], simulator.UNTESTED) for length in (place, place + 1))
        assert place == plan.land
        assert without.greens and not with_it.greens and with_it.reds >= more["reds"]


@given(situations())
def test_what_lands_is_green_and_in_strict_every_prefix_of_it(situation):
    queue, found, more = situation
    land = plan_for(queue, found, **more).land
    for length in range(1 if more["strict"] else max(land, 1), land + 1):
        assert found[queue[:length]].greens


@given(situations())
def test_a_plan_fills_at_most_the_free_slots_and_never_stands_still(situation):
    queue, found, more = situation
    plan = plan_for(queue, found, **more)
    kept = set(more["running"]) - set(plan.abandon)
    started = entries_of(plan)
    assert len(started) + len(kept) <= more["slots"]
    assert len(set(started) | kept) == len(started) + len(kept)
    if more["slots"] and not plan.target_red:
        assert plan.land or plan.guilty is not None or started or kept


@given(situations(), st.integers(1, 5))
def test_a_submission_at_the_end_abandons_no_running_test(situation, count):
    queue, found, more = situation
    longer = queue + tuple(range(100, 100 + count))
    assert set(plan_for(longer, found, **more).abandon) <= set(plan_for(queue, found, **more).abandon)


Gates = namedtuple("Gates", "landed returned trees")


def seen_from(landed, trees):
    """Name trees as the planner does, by what they add to `landed`; trees that do not build on it are left out."""
    return {tree[len(landed) :]: seen for tree, seen in trees.items() if tree[: len(landed)] == landed}


def run_with_uneven_gates(world, count, slots, *, strict=False):
    """Drive the planner with gates of random length, so that verdicts come one by one and `running` matters.

    Checks on the way that no more than `slots` run and that no abandoned tree is ever asked for again.
    """
    queue, landed, returned, found, ends, abandoned, now = tuple(range(count)), (), (), {}, {}, set(), 0.0
    while queue:
        running, rate = seen_from(landed, ends), toolkit.failure_rate(len(returned), len(landed + returned))
        plan = plan_for(queue, seen_from(landed, found), slots=slots, rate=rate, running=tuple(running), strict=strict)
        abandoned |= {landed + entries for entries in plan.abandon}
        ends = {landed + entries: end for entries, end in running.items() if entries not in plan.abandon}
        if plan.land or plan.guilty is not None:
            landed += queue[: plan.land]
            returned += () if plan.guilty is None else (plan.guilty,)
            queue = tuple(entry for entry in queue[plan.land :] if entry != plan.guilty)
            continue
        started = [landed + entries for entries in entries_of(plan)]
        assert not abandoned & set(started)
        ends.update((tree, now + world.chance.uniform(0.2, 3)) for tree in started)
        assert 0 < len(ends) <= slots
        tree = min(ends, key=ends.get)
        now, green, before = ends.pop(tree), world.gate(tree), found.get(tree, simulator.UNTESTED)
        found[tree] = toolkit.Evidence(before.greens + green, before.reds + (not green))
    return Gates(landed, returned, found)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    failure_rate=st.sampled_from([0.0, 0.05, 0.2, 0.6, 1.0]),
    pairs=st.integers(0, 3),
    slots=st.integers(1, 6),
    strict=st.booleans(),
)
@example(seed=1, failure_rate=0.2, pairs=2, slots=4, strict=True)
def test_exactly_the_bad_and_the_later_of_a_pair_come_back(seed, failure_rate, pairs, slots, strict):
    world = simulator.World(seed, failure_rate=failure_rate, pairs=pairs)
    gates = run_with_uneven_gates(world, 30, slots, strict=strict)
    expected = ()
    for entry in range(30):
        kept = tuple(other for other in range(entry) if other not in expected)
        expected += () if world.is_good((*kept, entry)) else (entry,)
    assert sorted(gates.returned) == list(expected)
    assert sorted(gates.landed + gates.returned) == list(range(30))


def test_strict_gates_every_value_of_the_target_by_itself():
    gates = run_with_uneven_gates(simulator.World(3, failure_rate=0.1), 30, 4, strict=True)
    for length in range(1, len(gates.landed) + 1):
        assert gates.trees[gates.landed[:length]].greens


# --- the cost --------------------------------------------------------------------------------------------------------


def mean_of(name, slots, draws=200, **kind):
    """Give the mean of one figure over the simulator's draws."""
    return simulator.run_draws(lambda queue: simulator.farm_queue(queue, slots), draws, 1, **kind)[name] / draws


def test_fifty_good_entries_take_at_most_four_runs():
    assert mean_of("runs", 1, draws=1) <= 4


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.2])
def test_one_slot_needs_at_most_a_tenth_more_runs_than_the_entropy_bound(rate):
    assert mean_of("runs", 1, failure_rate=rate) <= simulator.entropy_bound(rate)


@pytest.mark.parametrize(("rate", "wall"), [(0.05, 8.5), (0.1, 13.5)])
def test_four_slots_keep_the_bound_on_wall_time(rate, wall):
    assert mean_of("wall", 4, failure_rate=rate) <= wall


def test_two_pairs_that_fail_together_return_nobody_else_and_keep_the_bound():
    assert mean_of("wall", 4, pairs=2) <= 7.5
    assert mean_of("wrong", 4, pairs=2) == 0


def test_a_gate_that_flakes_returns_no_good_entry():
    assert simulator.flake_row("", 4, 1, failure_rate=0.05, flake_rate=0.01).farm == 0


def test_a_plan_looks_up_few_trees_so_that_it_stays_fast():
    asked = []
    toolkit.plan(tuple(range(50)), lambda entries: asked.append(entries) or simulator.UNTESTED, 4, 0.05)
    assert len(asked) <= 50 * 8


def test_the_simulator_prints_every_bound_beside_its_figure(capsys):
    assert simulator.main(["--draws", "3"]) in (0, 1)
    lines = capsys.readouterr().out.splitlines()
    assert sum("<=" in line for line in lines) == 12
