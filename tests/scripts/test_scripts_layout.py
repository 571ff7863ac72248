"""What every script of scripts/ has: few and short lines, a header that is its help, and nothing that only GNU or bash 4 has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from paths import SCRIPTS
from sandbox import run

ALL = sorted(path for path in SCRIPTS.rglob("*") if path.suffix == ".sh" or path.name == "farm")
SOURCED = {"common.sh", "clean-tree.sh", "set-aside.sh", "isolate-git.sh", "enter-scope.sh", "show-programs.sh",
           "slot-git.sh"}
LINUX_ONLY = {"isolate.sh", "show-programs.sh"}  # as bubblewrap is
EACH = pytest.mark.parametrize("path", ALL, ids=[str(path.relative_to(SCRIPTS)) for path in ALL])
NOT_EVERYWHERE = re.compile(r"< <\(|\breadarray\b|\bmapfile\b|declare -A|\$\{\w+(,,|\^\^)|\bgrep -[a-zA-Z]*[Pz]\b|\bsed -i\b|"
                            r"\breadlink -f\b|\bsort -[a-z]*z|\bxargs -r|\brealpath\b|\bstat -c\b|\bdate -d\b")


def header(path: Path) -> list[str]:
    """The comment at its top, without the first line."""
    lines = path.read_text().splitlines()[1:]
    return lines[:next(number for number, line in enumerate(lines) if not line.startswith("#"))]


@EACH
def test_a_script_has_at_most_150_lines_of_at_most_100_columns(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert (len(lines) <= 150, [line for line in lines if len(line) > 100]) == (True, [])


@EACH
def test_a_script_says_at_its_head_how_it_is_called_and_how_it_ends(path: Path) -> None:
    lines = header(path)
    assert lines[0].startswith("# Usage: ") and path.name in " ".join(lines[:2])
    assert [line for line in lines if line.startswith("# Exit: ")] != []


@EACH
def test_a_script_may_be_run_unless_it_is_sourced(path: Path) -> None:
    assert path.stat().st_mode & 0o111 != 0


@pytest.mark.parametrize("path", [path for path in ALL if path.name not in SOURCED | {"farm", "squash-message.sh"}],
                         ids=lambda path: str(path.relative_to(SCRIPTS)))
def test_the_header_is_the_help(path: Path) -> None:
    if path.name in ("make-venv.sh", ):
        assert run([path]).returncode == 2
        return
    shown = run([path, "-h"], check=True).stdout
    assert shown.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in header(path)]


@EACH
def test_a_script_needs_nothing_that_macos_does_not_have(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    assert [line for line in lines if NOT_EVERYWHERE.search(line)] == [] or path.name in LINUX_ONLY


@EACH
def test_each_directive_of_shellcheck_says_why(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if "# shellcheck " in line]
    assert [line for line in lines if not re.search(r"# shellcheck \S+  # \w", line)] == []
