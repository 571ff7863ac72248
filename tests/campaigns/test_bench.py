"""The benchmark in its shortest form: every group of rows can be measured and printed. No time is judged here."""

from __future__ import annotations

import bench
import pytest
from bench_harness import Row, Size
from bench_rows import GROUPS

TINY = Size(1, 1, (2,), 60, 0.2, 4, (2,), 2, 1, 2, 60, 2, (60, 10), 3, 1)
ROWS = {"up, small repo": 7, "up, large repo": 7, "idle loop, status": 5, "verbs": 7, "claims at once": 1,
        "own time per landed task": 10, "runs": 1, "merges": 1, "gate runs (simulated)": 19,
        "a long history": 11, "isolation": 7, "hosts": 4}


def test_every_group_of_rows_is_tested_here():
    assert set(ROWS) == set(GROUPS)


@pytest.mark.parametrize("name", ROWS)
def test_a_group_of_rows_is_measured_and_printed(name):
    rows = list(bench.run_groups(TINY, f"^{bench.re.escape(name)}$"))
    lines = [bench.format_row(row) for row in rows]
    assert len(lines) == ROWS[name]
    assert all(line.startswith(row.name) for line, row in zip(lines, rows, strict=True))


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        (Row("time over its floor", 3.0, 1.0, "s", "<= 2 x"), False),
        (Row("time near its floor", 1.9, 1.0, "s", "<= 2 x"), True),
        (Row("time by itself", 0.31, 9.0, "s", "<= 0.3 s"), False),
        (Row("rate", 9.0, 12.0, "1/s", ">= 10 1/s"), False),
        (Row("count without unit", 4, None, "", "<= 4"), True),
        (Row("no bound", 4.0, 1.0), None),
    ],
)
def test_a_bound_is_on_the_ratio_when_its_unit_is_x_and_else_on_the_figure(row, kept):
    assert bench.is_kept(row) is kept


def test_a_row_that_was_not_measured_says_so():
    assert bench.format_row(Row("up", None, None, note="not measured")).endswith("not measured")
