"""What the tests of the merge queue's scripts share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from sandbox import commit_files, git

Repo = Path
MakeRepo = Callable[..., Repo]


def branch(repo: Repo, name: str, files: Mapping[str, str | None], start: str = "main", message: str = "work") -> str:
    """Commit `files` (None deletes) on a new branch from `start`, leave the checkout on main, return the commit."""
    git(repo, "checkout", "-q", "-b", name, start)
    for path, text in files.items():
        if text is None:
            git(repo, "rm", "-q", "-r", "--", path)
    sha = commit_files(repo, {path: text for path, text in files.items() if text is not None}, message)
    git(repo, "checkout", "-q", "main")
    return sha


def footprint(repo: Repo) -> tuple[str, bytes, str, str, str]:
    """All of a checkout that a merge could disturb."""
    return (
        (repo / ".git/HEAD").read_text(),
        (repo / ".git/index").read_bytes(),
        (repo / ".git/config").read_text(),
        git(repo, "--no-optional-locks", "status", "--porcelain"),
        git(repo, "for-each-ref"),
    )


def add_hooks(repo: Repo, witness: Path) -> None:
    """Hooks that leave a trace and refuse."""
    for name in ("pre-commit", "pre-merge-commit", "commit-msg", "post-checkout", "post-merge", "pre-push"):
        hook = repo / ".git/hooks" / name
        hook.parent.mkdir(exist_ok=True)
        hook.write_text(f"#!/bin/sh\necho {name} >>{witness}\nexit 1\n")
        hook.chmod(0o755)
