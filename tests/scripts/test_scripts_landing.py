"""land.sh on real git: landing, on a remote too, and what is recovered after a kill."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from merge_scripts import Repo, add_hooks, branch, footprint
from paths import SCRIPTS
from sandbox import commit_files, git, run, wait_until, write_files

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="kills git at a system call by strace")


# ---------------------------------------------------------------------------------------------- landing


def land(repo: Repo, old: str, new: str, *options: str | Path, **env: str) -> tuple[int, list[str]]:
    """land.sh's exit code and the fields of its line; it does not wait for locks."""
    argv = [SCRIPTS / "merge/land.sh", "-C", repo, "-b", "main", "-o", old, "-n", new, *options]
    done = run(argv, env={"FARM_LOCK_SECONDS": "0", **env})
    return done.returncode, done.stdout.rstrip("\n").split("\t")


def recover(repo: Repo, old: str, new: str, seconds: int = 20) -> tuple[int, list[str]]:
    """land.sh recover's exit code and fields; `seconds` is how long a git that lives may take to end."""
    argv = [SCRIPTS / "merge/land.sh", "recover", "-C", repo, "-b", "main", "-o", old, "-n", new]
    done = run(argv, env={"FARM_LOCK_SECONDS": str(seconds)})
    return done.returncode, done.stdout.rstrip("\n").split("\t")


@pytest.fixture
def step(repo: Repo) -> tuple[str, str]:
    """OLD and NEW: NEW edits, adds, deletes, and puts a folder in a file's place and a file in a folder's."""
    commit_files(repo, {"gone.txt": "gone\n", "was-file": "x\n", "was-folder/y": "y\n", ".gitignore": "*.secret\n"})
    new = branch(
        repo,
        "new",
        {
            "a.txt": "changed\n",
            "gone.txt": None,
            "deep/er/new.txt": "new\n",
            "ta\tb é": "x\n",
        },
    )
    git(repo, "checkout", "-q", "new")
    git(repo, "rm", "-q", "was-file", "was-folder/y")
    new = commit_files(repo, {"was-file/z": "z\n", "was-folder": "now a file\n"})
    git(repo, "checkout", "-q", "main")
    return git(repo, "rev-parse", "main"), new


def test_land_moves_a_branch_that_nobody_has_checked_out(repo: Repo, step: tuple[str, str]) -> None:
    git(repo, "checkout", "-q", "--detach")
    assert land(repo, *step) == (0, ["landed", step[1]])
    assert git(repo, "reflog", "-1", "--format=%H %gs", "main") == f"{step[1]} farm: land"


def test_land_moves_the_checkout_along(repo: Repo, step: tuple[str, str]) -> None:
    assert land(repo, *step) == (0, ["landed", step[1]])
    assert git(repo, "status", "--porcelain") == ""


def test_land_moves_a_checkout_in_another_worktree(repo: Repo, step: tuple[str, str], elsewhere: Path) -> None:
    git(repo, "checkout", "-q", "--detach")
    git(repo, "worktree", "add", "-q", elsewhere / "odd\nname", "main")
    assert land(repo, *step) == (0, ["landed", step[1]])
    assert git(elsewhere / "odd\nname", "status", "--porcelain") == ""


def test_land_keeps_unrelated_edits_staged_and_not(repo: Repo, step: tuple[str, str]) -> None:
    write_files(repo, {"keep.txt": "staged\n"})
    git(repo, "add", "keep.txt")
    write_files(repo, {"keep.txt": "staged, then edited\n", "untracked.txt": "u\n", "dir/b.txt": "edited\n"})
    before = git(repo, "diff"), git(repo, "diff", "--cached"), git(repo, "ls-files", "-o")
    assert land(repo, *step)[0] == 0
    assert (git(repo, "diff"), git(repo, "diff", "--cached"), git(repo, "ls-files", "-o")) == before


@pytest.mark.parametrize("path", ["a.txt", "gone.txt", "deep/er/new.txt"])
def test_land_is_blocked_by_a_file_in_the_way(repo: Repo, step: tuple[str, str], path: str) -> None:
    write_files(repo, {path: "my own\n"})
    before = footprint(repo)
    assert land(repo, *step) == (5, ["blocked", path])
    assert footprint(repo) == before


def test_land_names_every_file_in_the_way(repo: Repo, step: tuple[str, str]) -> None:
    write_files(repo, {"a.txt": "mine\n", "deep/er/new.txt": "mine\n", "ta\tb é": "mine\n"})
    assert land(repo, *step) == (5, ["blocked", "a.txt", "deep/er/new.txt", r"ta\tb é"])


def test_land_does_not_overwrite_an_ignored_file(repo: Repo, step: tuple[str, str]) -> None:
    git(repo, "checkout", "-q", "new")
    write_files(repo, {"my.secret": "committed\n"})
    git(repo, "add", "-f", "my.secret")
    git(repo, "commit", "-q", "-m", "secret")
    new = git(repo, "rev-parse", "HEAD")
    git(repo, "checkout", "-q", "main")
    write_files(repo, {"my.secret": "mine\n"})
    assert land(repo, step[0], new) == (5, ["blocked", "my.secret"])


def test_land_is_not_blocked_by_a_file_that_was_only_touched(repo: Repo, step: tuple[str, str]) -> None:
    os.utime(repo / "a.txt", (1, 1))
    assert land(repo, *step)[0] == 0


def test_land_refuses_when_the_branch_moved(repo: Repo, step: tuple[str, str]) -> None:
    moved = commit_files(repo, {"person.txt": "x\n"})
    assert land(repo, *step) == (4, ["moved", moved])


def test_land_of_what_is_there_already_says_so(repo: Repo, step: tuple[str, str]) -> None:
    land(repo, *step)
    later = commit_files(repo, {"person.txt": "x\n"})
    assert land(repo, *step) == (0, ["already", later])


def test_land_refuses_a_commit_that_is_no_descendant(repo: Repo, step: tuple[str, str]) -> None:
    assert land(repo, step[1], step[0])[0] == 3


def begin_rebase(repo: Repo) -> None:
    run(["git", "-C", repo, "rebase", "--exec", "false", "HEAD~1"])


def begin_bisect(repo: Repo) -> None:
    git(repo, "bisect", "start", "HEAD", "HEAD~1")


def begin_merge(repo: Repo) -> None:
    branch(repo, "side", {"side.txt": "x\n"}, start="HEAD~1")
    git(repo, "merge", "-q", "--no-commit", "--no-ff", "side")


@pytest.mark.parametrize("begin", [begin_rebase, begin_bisect, begin_merge])
def test_land_is_blocked_while_the_checkout_is_in_the_middle_of_something(
    repo: Repo, step: tuple[str, str], begin: Callable[[Repo], None]
) -> None:
    begin(repo)
    before = footprint(repo)
    assert land(repo, *step) == (5, ["blocked", str(repo)])
    assert footprint(repo) == before


def test_land_is_blocked_by_a_second_checkout(repo: Repo, step: tuple[str, str], elsewhere: Path) -> None:
    git(repo, "worktree", "add", "-q", "--force", elsewhere / "second", "main")
    assert land(repo, *step)[0] == 5


def test_land_leaves_a_locked_branch_and_its_lock_alone(repo: Repo, step: tuple[str, str]) -> None:
    lock = repo / ".git/refs/heads/main.lock"
    lock.touch()
    assert land(repo, *step) == (5, ["blocked"])
    git(repo, "checkout", "-q", "--detach", "main")
    assert land(repo, *step) == (5, ["blocked"])
    git(repo, "checkout", "-q", "-B", "other", step[0])
    assert lock.exists()
    assert git(repo, "status", "--porcelain") == ""


def test_land_runs_no_hooks(repo: Repo, step: tuple[str, str], elsewhere: Path) -> None:
    add_hooks(repo, elsewhere / "witness")
    assert land(repo, *step)[0] == 0
    assert not (elsewhere / "witness").exists()


@needs_strace
def test_land_takes_a_fast_forward_back_that_fails_after_its_files(repo: Repo, step: tuple[str, str]) -> None:
    write_files(repo, {"keep.txt": "edited\n"})
    ref_lock = repo / ".git/refs/heads/main.lock"
    trace = ["strace", "-f", "-qq", "-o", "/dev/null", "-P", ref_lock, "-e", "inject=openat:error=ENOSPC"]
    argv = [*trace, SCRIPTS / "merge/land.sh", "-C", repo, "-b", "main", "-o", step[0], "-n", step[1]]
    assert run(argv).returncode == 1
    assert git(repo, "status", "--porcelain") == " M keep.txt"


# ---------------------------------------------------------------------------------------------- landing on a remote


@pytest.fixture
def remote(repo: Repo, step: tuple[str, str], elsewhere: Path) -> Path:
    """A bare origin whose main is at OLD."""
    git(repo, "clone", "-q", "--bare", repo, elsewhere / "origin.git")
    git(repo, "remote", "add", "origin", elsewhere / "origin.git")
    git(elsewhere / "origin.git", "update-ref", "refs/heads/main", step[0])
    return elsewhere / "origin.git"


def test_land_pushes_to_the_remote_too(repo: Repo, step: tuple[str, str], remote: Path) -> None:
    assert land(repo, *step, "-r", "origin") == (0, ["landed", step[1]])
    assert git(remote, "rev-parse", "main") == step[1]


def test_land_leaves_the_local_branch_when_the_remote_moved(repo: Repo, step: tuple[str, str], remote: Path) -> None:
    other = git(repo, "commit-tree", f"{step[0]}^{{tree}}", "-p", step[0], "-m", "by a person")
    git(repo, "push", "-q", "origin", f"{other}:refs/heads/main")
    assert land(repo, *step, "-r", "origin") == (4, ["moved", other])
    assert git(repo, "rev-parse", "main") == step[0]


def test_land_pushes_nothing_when_a_file_is_in_the_way_here(repo: Repo, step: tuple[str, str], remote: Path) -> None:
    write_files(repo, {"a.txt": "mine\n"})
    assert land(repo, *step, "-r", "origin") == (5, ["blocked", "a.txt"])
    assert git(remote, "rev-parse", "main") == step[0]


def test_land_goes_on_after_a_push_that_was_not_followed_up(repo: Repo, step: tuple[str, str], remote: Path) -> None:
    git(repo, "push", "-q", "origin", f"{step[1]}:refs/heads/main")
    assert land(repo, *step, "-r", "origin") == (0, ["landed", step[1]])


def test_land_on_an_unreachable_remote_changes_nothing(repo: Repo, step: tuple[str, str]) -> None:
    assert land(repo, *step, "-r", "/nowhere")[0] == 1
    assert git(repo, "rev-parse", "main") == step[0]


# ---------------------------------------------------------------------------------------------- recovery of a landing


def kill_landing(repo: Repo, step: tuple[str, str], folder: Path, when: str) -> None:
    """Land with a git whose fast-forward strace kills at a system call, and the whole landing with it."""
    real = shutil.which("git")
    wrapper = folder / "git"
    traced = f'strace -f -qq -o /dev/null -e inject={when} {real} "$@" || kill -9 0'
    wrapper.write_text(f'#!/bin/sh\ncase "$*" in *ff-only*) {traced} ;; *) exec {real} "$@" ;; esac\n')
    wrapper.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    argv = [str(SCRIPTS / "merge/land.sh"), "-C", str(repo), "-b", "main", "-o", step[0], "-n", step[1]]
    subprocess.run(argv, env=environment, start_new_session=True, capture_output=True, timeout=60, check=False)


KILL_POINTS = [
    *(("openat", n) for n in (40, 60, 75, 90, 100, 110, 120)),
    *(("unlink", n) for n in (1, 2, 4)),
    *(("rename", n) for n in (1, 2, 3)),
    *(("write", n) for n in (1, 3, 5, 8)),
]


@needs_strace
@pytest.mark.parametrize(("call", "number"), KILL_POINTS)
def test_a_landing_killed_at_any_point_is_mended_and_lands(
    repo: Repo, step: tuple[str, str], call: str, number: int, elsewhere: Path
) -> None:
    write_files(repo, {"keep.txt": "staged\n"})
    git(repo, "add", "keep.txt")
    write_files(repo, {"keep.txt": "edited\n", "untracked.txt": "u\n"})
    before = git(repo, "diff"), git(repo, "diff", "--cached"), git(repo, "ls-files", "-o")
    kill_landing(repo, step, elsewhere, f"{call}:signal=KILL:when={number}")
    assert recover(repo, *step)[0] == 0
    assert land(repo, *step)[0] == 0
    assert (git(repo, "diff"), git(repo, "diff", "--cached"), git(repo, "ls-files", "-o")) == before


GIT_THAT_DIES_TWICE = """\
#!/bin/sh
case "$*" in *ff-only* | *"update-ref -m farm: land"*) : >'%s'; : >'%s'; kill -9 $$ ;; esac
[ ! -e '%s' ] || { rm '%s'; kill -9 $$; }
exec '%s' "$@"
"""


@pytest.mark.parametrize(("head", "name"), [("main", "index.lock"), ("other", "refs/heads/main.lock")])
def test_a_lock_is_known_as_the_landings_own_although_the_git_that_should_mend_it_was_killed_too(
    repo: Repo, step: tuple[str, str], elsewhere: Path, head: str, name: str
) -> None:
    git(repo, "checkout", "-q", "-B", head, "main")
    dying, lock = elsewhere / "dying", repo / ".git" / name
    (elsewhere / "git").write_text(GIT_THAT_DIES_TWICE % (lock, dying, dying, dying, shutil.which("git")))
    (elsewhere / "git").chmod(0o755)
    code, _ = land(repo, *step, PATH=f"{elsewhere}{os.pathsep}{os.environ['PATH']}")
    assert (code in (0, 4, 5), lock.exists()) == (False, True)
    assert (recover(repo, *step)[0], land(repo, *step)[0]) == (0, 0)


def mark_landing(repo: Repo, state: str = "clean") -> None:
    """What land.sh writes just before it lets git begin."""
    (repo / ".git/farm-landing").write_text(f"{repo}/.git\n{state}\n")


def test_recovery_keeps_what_lay_there_reachable(repo: Repo, step: tuple[str, str]) -> None:
    mark_landing(repo)
    write_files(repo, {"a.txt": "half writ"})
    code, fields = recover(repo, *step)
    assert (code, fields[0]) == (0, "restored")
    assert git(repo, "show", f"{fields[2]}:a.txt") == "half writ"


def test_recovery_puts_nothing_back_when_no_landing_had_begun(repo: Repo, step: tuple[str, str]) -> None:
    write_files(repo, {"a.txt": "my own edit\n"})
    assert recover(repo, *step) == (0, ["clean", step[0]])
    assert (repo / "a.txt").read_text() == "my own edit\n"


def test_recovery_puts_nothing_back_where_an_edit_had_blocked_the_landing(repo: Repo, step: tuple[str, str]) -> None:
    mark_landing(repo, "dirty")
    write_files(repo, {"a.txt": "my own edit\n"})
    assert recover(repo, *step) == (0, ["clean", step[0]])
    assert (repo / "a.txt").read_text() == "my own edit\n"


def test_recovery_may_be_repeated(repo: Repo, step: tuple[str, str]) -> None:
    mark_landing(repo)
    write_files(repo, {"a.txt": "half writ"})
    recover(repo, *step)
    assert recover(repo, *step) == (0, ["clean", step[0]])


def test_recovery_removes_the_scratch_of_a_killed_one(repo: Repo, step: tuple[str, str]) -> None:
    (repo / ".git/farm-recover.999999999").mkdir()
    recover(repo, *step)
    assert list((repo / ".git").glob("farm-*")) == []


def test_recovery_removes_the_lock_that_holds_the_new_commit(repo: Repo, step: tuple[str, str]) -> None:
    lock = repo / ".git/refs/heads/main.lock"
    lock.write_text(step[1] + "\n")
    assert recover(repo, *step)[0] == 0
    assert not lock.exists()


def test_recovery_keeps_a_lock_older_than_the_landing(repo: Repo, step: tuple[str, str]) -> None:
    lock = repo / ".git/index.lock"
    lock.touch()
    os.utime(lock, (1, 1))
    mark_landing(repo)
    assert recover(repo, *step)[0] == 1
    assert lock.exists()


def test_recovery_keeps_a_lock_while_a_git_lives_that_may_hold_it(repo: Repo, step: tuple[str, str]) -> None:
    mark_landing(repo)
    lock = repo / ".git/index.lock"
    with subprocess.Popen(["git", "-C", repo, "update-index", "--stdin"], stdin=subprocess.PIPE) as holder:
        wait_until(lock.exists)
        code = recover(repo, *step, seconds=0)[0]
        kept = lock.exists()
        holder.communicate()
    assert (code, kept) == (1, True)


def test_recovery_keeps_a_lock_that_somebody_has_open(repo: Repo, step: tuple[str, str]) -> None:
    mark_landing(repo)
    with (repo / ".git/index.lock").open("w"):
        code = recover(repo, *step)[0]
    assert code == 1


def test_recovery_of_a_landing_that_was_made_says_landed(repo: Repo, step: tuple[str, str]) -> None:
    land(repo, *step)
    assert recover(repo, *step) == (0, ["landed", step[1]])
