"""The scripts of worktrees as the tests call them, and where their worktrees are."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from paths import SCRIPTS
from sandbox import git, run

ODD_NAME = "a b'c\"d $HOME;#{pid} é\n*x"


def unescape(field: str) -> str:
    """Turn a field of a script's TSV back into the text that it stands for."""
    return re.sub(r"\\(.)", lambda match: {"t": "\t", "n": "\n", "r": "\r"}.get(match[1], match[1]), field)


def make(repo: Path, count: int = 1, *options: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run([SCRIPTS / "mk-worktrees.sh", "-C", repo, "-n", str(count), *options], check=check)


def rows(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    return [[unescape(field) for field in line.split("\t")] for line in done.stdout.splitlines()]


def worktree(repo: Path, number: int = 1) -> Path:
    return repo.parent / f"{repo.name}-farm" / f"agent-{number:03d}-worktree"


def entry(repo: Path, number: int = 1) -> Path:
    return repo / ".git" / "worktrees" / worktree(repo, number).name


def status(folder: Path) -> str:
    return git(folder, "status", "--porcelain")
