"""Nothing is ever lost: the store's moves on a simulated disk, with the power failing at every step."""

from __future__ import annotations

import errno

import pytest
from store_campaign import Campaign, campaign
from store_guards import GUARDS, find_violation


def report_of(run: Campaign) -> str:
    return "\n".join([f"{len(run.violations)} violations", *run.violations[:10], str(dict(run.counts))])


def test_a_power_cut_or_a_kill_in_any_step_of_any_move_loses_nothing():
    with campaign() as run:
        run.run_moves()
    assert not run.violations, report_of(run)
    assert run.counts["crash points"] > 250, report_of(run)


def test_a_power_cut_during_the_very_first_move_leaves_a_farm_that_works():
    with campaign() as run:
        run.run_first_use()
    assert not run.violations, report_of(run)


def test_a_disk_error_in_any_step_leaves_a_move_unmade_or_made_and_it_can_be_repeated():
    with campaign() as run:
        run.run_errors(errno.ENOSPC)
    assert not run.violations, report_of(run)


def test_a_power_cut_after_a_kill_undoes_nothing_that_was_acknowledged():
    with campaign() as run:
        run.run_pairs(50)
    assert not run.violations, report_of(run)


def test_nobody_overwrites_a_lock_or_restarts_work_that_went_on_without_him():
    with campaign() as run:
        run.run_others()
    assert not run.violations, report_of(run)


def test_nothing_is_written_without_the_mutex():
    with campaign() as run:
        run.watch_mutex()
    assert not run.violations, report_of(run)


@pytest.mark.parametrize("guard", GUARDS)
def test_the_model_notices_when_a_guard_is_left_out(guard):
    assert find_violation(guard), f"without {guard} nothing went wrong in the model"
