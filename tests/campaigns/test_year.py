"""A short form of the year's campaign: what landed work leaves behind is gone at the end."""

from __future__ import annotations

import year


def test_a_short_year_leaves_behind_what_live_work_needs(capsys):
    code = year.main(["--tasks", "60", "-n", "3"])
    shown = capsys.readouterr().out
    assert code == 0 and "MISSED" not in shown, shown
