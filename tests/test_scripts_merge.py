"""The scripts of the merge queue on real git: chain, slots of gates, landing and its recovery, pins."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
from conftest import SCRIPTS, Sandbox, commit_files, git, run, wait_until, write_files

MERGE_TREE: Mapping[str, str] = {}
WORKTREE: Mapping[str, str] = {"FARM_MERGE": "worktree"}
BOTH_WAYS = pytest.mark.parametrize("way", [MERGE_TREE, WORKTREE], ids=["merge-tree", "worktree"])
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="kills git at a system call by strace")

Repo = Path
MakeRepo = Callable[..., Repo]


# --- what the tests share -------------------------------------------------------------------------------------------


def branch(repo: Repo, name: str, files: Mapping[str, str | None], start: str = "main", message: str = "work") -> str:
    """Commit `files` (None deletes) on a new branch from `start`, leave the checkout on main, return the commit."""
    git(repo, "checkout", "-q", "-b", name, start)
    for path, text in files.items():
        if text is None:
            git(repo, "rm", "-q", "-r", "--", path)
    sha = commit_files(repo, {path: text for path, text in files.items() if text is not None}, message)
    git(repo, "checkout", "-q", "main")
    return sha


def entry(task: str, commit: str, title: str = "A title", epoch: int = 1_700_000_000) -> str:
    return f"{task}\t{commit}\t{epoch}\tagent-001\t{title}\n"


def chain(
    repo: Repo, entries: Iterable[str], *options: str | Path, env: Mapping[str, str] = MERGE_TREE
) -> list[list[str]]:
    """The lines of merge-chain.sh, split into fields."""
    argv = [SCRIPTS / "merge-chain.sh", "-C", repo, "-b", "main", *options]
    done = run(argv, input="".join(entries), env=env, check=True)
    return [line.split("\t") for line in done.stdout.splitlines()]


def statuses(lines: list[list[str]]) -> dict[str, str]:
    return {fields[0]: fields[1] for fields in lines[1:]}


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


@pytest.fixture
def tmp_path(sandbox: Sandbox) -> Path:
    """A folder that lives as long as the sandbox does."""
    folder = sandbox.work / "elsewhere"
    folder.mkdir()
    return folder


@pytest.fixture
def repo(make_repo: MakeRepo) -> Repo:
    return make_repo(files={"a.txt": "one\ntwo\nthree\n", "dir/b.txt": "b\n", "keep.txt": "keep\n"})


# --- chain ----------------------------------------------------------------------------------------------------------


@BOTH_WAYS
def test_chain_puts_one_merge_commit_an_entry_on_the_one_before(repo: Repo, way: Mapping[str, str]) -> None:
    shas = [branch(repo, f"w{n}", {f"new{n}.txt": "x\n"}) for n in range(3)]
    lines = chain(repo, [entry(f"t-{n}", sha) for n, sha in enumerate(shas)], env=way)
    parents = [git(repo, "rev-parse", f"{fields[2]}^1", f"{fields[2]}^2").split() for fields in lines[1:]]
    assert parents == [[lines[n][2], shas[n]] for n in range(3)]


@BOTH_WAYS
def test_chain_prints_the_tree_of_each_commit(repo: Repo, way: Mapping[str, str]) -> None:
    lines = chain(repo, [entry("t-1", branch(repo, "w", {"new.txt": "x\n"}))], env=way)
    assert [git(repo, "rev-parse", f"{fields[2]}^{{tree}}") for fields in lines] == [fields[3] for fields in lines]


@pytest.mark.parametrize("style", ["merge", "squash", "rebase"])
def test_chain_gives_the_same_shas_by_both_ways_and_every_time(repo: Repo, style: str) -> None:
    git(repo, "mv", "a.txt", "moved.txt")
    git(repo, "commit", "-q", "-m", "rename")
    shas = [branch(repo, f"w{n}", {f"new{n}.txt": "x\n"}) for n in range(3)]
    shas.append(branch(repo, "edits-old-name", {"a.txt": "one\ntwo\nthree\nfour\n"}, start="main~1"))
    shas.append(branch(repo, "clash", {"new0.txt": "y\n"}))
    entries = [entry(f"t-{n}", sha, epoch=n) for n, sha in enumerate(shas)]
    runs = [chain(repo, entries, "-s", style, env=way) for way in (MERGE_TREE, MERGE_TREE, WORKTREE)]
    assert runs[0] == runs[1] == runs[2]


@BOTH_WAYS
def test_chain_follows_a_rename_on_the_base(repo: Repo, way: Mapping[str, str]) -> None:
    sha = branch(repo, "w", {"a.txt": "one\ntwo\nthree\nfour\n"})
    git(repo, "mv", "a.txt", "moved.txt")
    git(repo, "commit", "-q", "-m", "rename")
    tip = chain(repo, [entry("t-1", sha)], env=way)[1][2]
    assert git(repo, "show", f"{tip}:moved.txt").endswith("four")


@BOTH_WAYS
def test_chain_leaves_checkout_index_config_and_refs_alone(repo: Repo, way: Mapping[str, str]) -> None:
    entries = [entry("t-1", branch(repo, "w", {"a.txt": "x\n"})), entry("t-2", branch(repo, "v", {"a.txt": "y\n"}))]
    write_files(repo, {"a.txt": "dirty\n", "untracked.txt": "u\n"})
    before = footprint(repo)
    chain(repo, entries, env=way)
    assert footprint(repo) == before


@BOTH_WAYS
def test_chain_leaves_no_scratch_behind(repo: Repo, way: Mapping[str, str]) -> None:
    names = {path.name for path in (repo / ".git").iterdir()} | {"COMMIT_EDITMSG", "logs"}
    chain(repo, [entry("t-1", branch(repo, "w", {"a.txt": "x\n"}))], env=way)
    assert {path.name for path in (repo / ".git").iterdir()} <= names


def test_chain_removes_the_scratch_of_a_killed_one(repo: Repo) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    leftover = repo / f".git/farm-scratch.{dead.pid}"
    leftover.mkdir()
    chain(repo, [])
    assert not leftover.exists()


@BOTH_WAYS
def test_chain_runs_no_hooks(repo: Repo, way: Mapping[str, str], tmp_path: Path) -> None:
    entries = [entry("t-1", branch(repo, "w", {"new.txt": "x\n"})), entry("t-2", branch(repo, "v", {"a.txt": "x\n"}))]
    add_hooks(repo, tmp_path / "witness")
    chain(repo, entries, env=way)
    assert not (tmp_path / "witness").exists()


@BOTH_WAYS
def test_chain_is_not_bent_by_the_users_settings(repo: Repo, way: Mapping[str, str]) -> None:
    sha = branch(repo, "w", {"a.txt": "one\ntwo\nthree\nfour\n"})
    git(repo, "mv", "a.txt", "moved.txt")
    git(repo, "commit", "-q", "-m", "rename")
    plain = chain(repo, [entry("t-1", sha, title="café")], env=way)
    bent = ("merge.renames=false", "diff.renames=false", "merge.ff=only", "commit.gpgSign=true", "gpg.program=false")
    odd = ("i18n.commitEncoding=latin1", "merge.conflictStyle=diff3", "rerere.enabled=true", "merge.renormalize=true")
    for pair in (*bent, *odd, "merge.verifySignatures=true", "diff.algorithm=minimal", "core.quotePath=true"):
        git(repo, "config", *pair.split("="))
    assert chain(repo, [entry("t-1", sha, title="café")], env=way) == plain


@BOTH_WAYS
def test_chain_uses_the_attributes_of_the_base_and_not_of_the_checkout(repo: Repo, way: Mapping[str, str]) -> None:
    commit_files(repo, {".gitattributes": "/log merge=union\n", "sub/.gitattributes": "log merge=union\n"})
    commit_files(repo, {"log": "start\n", "sub/log": "start\n"})
    one = branch(repo, "w", {"log": "start\none\n", "sub/log": "start\none\n"})
    two = branch(repo, "v", {"log": "start\ntwo\n", "sub/log": "start\ntwo\n"})
    write_files(repo, {".gitattributes": "* -merge\n"})
    assert statuses(chain(repo, [entry("t-1", one), entry("t-2", two)], env=way)) == {"t-1": "ok", "t-2": "ok"}


@BOTH_WAYS
def test_chain_works_without_an_identity(repo: Repo, way: Mapping[str, str]) -> None:
    sha = branch(repo, "w", {"new.txt": "x\n"})
    tip = chain(repo, [entry("t-1", sha)], env={**way, "GIT_CONFIG_GLOBAL": "/dev/null"})[1][2]
    assert git(repo, "log", "-1", "--format=%an <%ae> %cn <%ce>", tip) == "farm <farm@localhost> farm <farm@localhost>"


def test_chain_takes_dates_from_the_submission(repo: Repo) -> None:
    tip = chain(repo, [entry("t-1", branch(repo, "w", {"new.txt": "x\n"}), epoch=1_234_567_890)])[1][2]
    assert git(repo, "log", "-1", "--date=raw", "--format=%ad|%cd", tip) == "1234567890 +0000|1234567890 +0000"


def test_chain_makes_a_title_one_line_without_control_characters(repo: Repo) -> None:
    title = r"""  Say "it's" $HOME `x` \\n é\tand\nmore""" + "\x1b\u0085\x7f"
    tip = chain(repo, [entry("t-1", branch(repo, "w", {"new.txt": "x\n"}), title=title)])[1][2]
    assert git(repo, "log", "-1", "--format=%s", tip) == r"""Merge t-1: Say "it's" $HOME `x` \n é and more"""


@pytest.mark.parametrize("style", ["merge", "squash", "rebase"])
def test_chain_names_task_agent_and_tree_in_trailers(repo: Repo, style: str) -> None:
    fields = chain(repo, [entry("t-1", branch(repo, "w", {"new.txt": "x\n"}))], "-s", style)[1]
    trailers = git(repo, "log", "-1", "--format=%(trailers:only,unfold)", fields[2]).strip()
    assert trailers == f"Farm-Task: t-1\nFarm-Agent: agent-001\nFarm-Tested-Tree: {fields[3]}"


@BOTH_WAYS
def test_chain_tells_landed_missing_empty_and_unrelated_apart(repo: Repo, way: Mapping[str, str]) -> None:
    empty = branch(repo, "empty", {})
    git(repo, "checkout", "-q", "--orphan", "orphan")
    unrelated = commit_files(repo, {"z.txt": "z\n"})
    git(repo, "checkout", "-q", "main")
    commits = {"landed": "main", "missing": "0" * 40, "empty": empty, "unrelated": unrelated}
    lines = chain(repo, [entry(name, commit) for name, commit in commits.items()], env=way)
    assert statuses(lines) == {name: name for name in commits}


def test_chain_takes_bad_lines_for_missing_commits(repo: Repo) -> None:
    blob = git(repo, "rev-parse", "main:a.txt")
    lines = chain(repo, [entry("blob", blob), entry("none", ""), entry("odd", "no such ref"), "alone\n"])
    assert set(statuses(lines).values()) == {"missing"}


@BOTH_WAYS
def test_chain_names_the_paths_that_conflict_with_the_base(repo: Repo, way: Mapping[str, str]) -> None:
    names = {"a b.txt": "x", "back\\slash": "x", "ta\tb": "x", "né": "x"}
    sha = branch(repo, "w", names)
    commit_files(repo, dict.fromkeys(names, "y"))
    line = chain(repo, [entry("t-1", sha)], env=way)[1]
    assert line[1:] == ["conflict", "-", "-", r"a\x20b.txt back\\slash né ta\tb"]


@BOTH_WAYS
def test_chain_holds_an_entry_behind_the_latest_that_touches_its_paths(repo: Repo, way: Mapping[str, str]) -> None:
    shas = {name: branch(repo, name, {"a.txt": f"{name}\n"}) for name in ("first", "clash")}
    shas["other"] = branch(repo, "other", {"other.txt": "x\n"})
    shas["last"] = branch(repo, "last", {"last.txt": "x\n"})
    lines = chain(repo, [entry(name, shas[name]) for name in ("first", "other", "clash", "last")], env=way)
    assert [fields[:2] + fields[4:] for fields in lines[1:]] == [
        ["first", "ok", ""],
        ["other", "ok", ""],
        ["clash", "held", "first"],
        ["last", "ok", ""],
    ]


def test_chain_of_rebased_commits_holds_behind_the_entry_whose_inner_commit_clashes(repo: Repo) -> None:
    branch(repo, "first", {"a.txt": "first\n"})
    first = branch(repo, "first-2", {"more.txt": "x\n"}, start="first")
    clash = branch(repo, "clash", {"a.txt": "clash\n"})
    other = branch(repo, "other", {"other.txt": "x\n"})
    lines = chain(repo, [entry("t-1", first), entry("t-2", other), entry("t-3", clash)], "-s", "rebase")
    assert lines[3][4] == "t-1"


def add_submodule_commit(repo: Repo, name: str, sha: str) -> str:
    git(repo, "checkout", "-q", "-b", name, "main")
    git(repo, "update-index", "--add", "--cacheinfo", f"160000,{sha},module")
    git(repo, "commit", "-q", "-m", name)
    commit = git(repo, "rev-parse", "HEAD")
    git(repo, "checkout", "-q", "-f", "main")
    return commit


def odd_pair(repo: Repo, kind: str) -> tuple[str, str]:
    """Two commits that each merge with main and that conflict in an unusual way."""
    if kind == "binary":
        return branch(repo, "p", {"data.bin": "\0one"}), branch(repo, "q", {"data.bin": "\0two"})
    if kind == "submodule":
        return add_submodule_commit(repo, "p", "1" * 40), add_submodule_commit(repo, "q", "2" * 40)
    if kind == "file/folder":
        return branch(repo, "p", {"x/y": "file below\n"}), branch(repo, "q", {"x": "file\n"})
    if kind == "delete":
        return branch(repo, "p", {"a.txt": None}), branch(repo, "q", {"a.txt": "one\ntwo\nfour\n"})
    text = "one\ntwo\nthree\n"
    return branch(repo, "p", {"a.txt": None, "p.txt": text}), branch(repo, "q", {"a.txt": None, "q.txt": text})


@BOTH_WAYS
@pytest.mark.parametrize("kind", ["binary", "submodule", "file/folder", "delete", "rename/rename"])
def test_chain_holds_work_that_conflicts_in_an_odd_way(repo: Repo, way: Mapping[str, str], kind: str) -> None:
    one, two = odd_pair(repo, kind)
    third = branch(repo, "third", {"third.txt": "x\n"})
    lines = chain(repo, [entry("t-1", one), entry("t-2", two), entry("t-3", third)], env=way)
    assert [fields[1] for fields in lines[1:]] == ["ok", "held", "ok"]
    assert lines[2][4] == "t-1"


@pytest.mark.parametrize("kind", ["binary", "submodule", "file/folder", "delete", "rename/rename"])
def test_chain_names_the_paths_of_an_odd_conflict_alike_by_both_ways(repo: Repo, kind: str) -> None:
    one, two = odd_pair(repo, kind)
    git(repo, "merge", "-q", "--no-edit", one)
    runs = [chain(repo, [entry("t-2", two)], env=way) for way in (MERGE_TREE, WORKTREE)]
    assert runs[0][1][1] == "conflict"
    assert runs[0] == runs[1]


@BOTH_WAYS
def test_chain_writes_the_hunks_of_a_conflict_for_people(repo: Repo, way: Mapping[str, str], tmp_path: Path) -> None:
    sha = branch(repo, "w", {"a.txt": "one\nmine\nthree\n"})
    commit_files(repo, {"a.txt": "one\nours\nthree\n"})
    chain(repo, [entry("t-1", sha)], env={**way, "FARM_CONFLICTS": str(tmp_path)})
    text = (tmp_path / "t-1.txt").read_text()
    assert "<<<<<<< main\nours\n=======\nmine\n>>>>>>> t-1\n" in text
    assert "CONFLICT (content)" in text


def test_chain_cuts_the_text_of_a_huge_conflict(repo: Repo, tmp_path: Path) -> None:
    sha = branch(repo, "w", {"a.txt": "mine\n" * 5000})
    commit_files(repo, {"a.txt": "ours\n" * 5000})
    chain(repo, [entry("t-1", sha)], env={"FARM_CONFLICTS": str(tmp_path)})
    assert len((tmp_path / "t-1.txt").read_text().splitlines()) == 200


def test_chain_gives_stacked_and_repeated_work_a_commit_of_its_own(repo: Repo) -> None:
    lower = branch(repo, "lower", {"lower.txt": "x\n"})
    upper = branch(repo, "upper", {"upper.txt": "x\n"}, start="lower")
    lines = chain(repo, [entry("t-1", upper), entry("t-2", lower), entry("t-3", upper)])
    tasks = git(repo, "log", "--first-parent", "--format=%(trailers:key=Farm-Task,valueonly)", f"main..{lines[3][2]}")
    assert tasks.split() == ["t-3", "t-2", "t-1"]


def test_chain_squashes_an_entry_to_one_plain_commit(repo: Repo) -> None:
    branch(repo, "w", {"one.txt": "x\n"})
    tip = chain(repo, [entry("t-1", branch(repo, "w2", {"two.txt": "x\n"}, start="w"))], "-s", "squash")[1][2]
    assert git(repo, "log", "--format=%s|%P", f"main..{tip}") == f"A title|{git(repo, 'rev-parse', 'main')}"


def test_chain_rebases_the_entrys_own_commits_with_author_and_message(repo: Repo) -> None:
    git(repo, "config", "user.name", "Somebody Else")
    branch(repo, "w", {"one.txt": "x\n"}, message="one\n\nwith a body")
    sha = branch(repo, "w2", {"two.txt": "x\n"}, start="w", message="two\n\nSigned-off-by: S <s@e.org>")
    git(repo, "config", "user.name", "Farmer")
    commit_files(repo, {"base.txt": "newer\n"})
    tip = chain(repo, [entry("t-1", sha)], "-s", "rebase")[1][2]
    log = git(repo, "log", "--reverse", "--format=%an|%cn|%s|%(trailers:keyonly,separator=%x2C)", f"main..{tip}")
    assert log.splitlines() == [
        "Somebody Else|Farmer|one|",
        "Somebody Else|Farmer|two|Signed-off-by,Farm-Task,Farm-Agent,Farm-Tested-Tree",
    ]


def test_chain_rebases_stacked_work_only_once(repo: Repo) -> None:
    lower = branch(repo, "lower", {"a.txt": "lower\n"}, message="lower")
    upper = branch(repo, "upper", {"a.txt": "upper\n"}, start="lower", message="upper")
    other = branch(repo, "other", {"other.txt": "x\n"}, message="other")
    lines = chain(repo, [entry("t-0", other), entry("t-1", lower), entry("t-2", upper)], "-s", "rebase")
    assert git(repo, "log", "--format=%s", f"main..{lines[3][2]}").split() == ["upper", "lower", "other"]


def test_chain_rebases_to_one_commit_what_does_not_add_up_in_a_line(repo: Repo) -> None:
    branch(repo, "w", {"a.txt": "one\nmine\nthree\n"})
    commit_files(repo, {"a.txt": "one\nours\nthree\n"})
    git(repo, "checkout", "-q", "w")
    run(["git", "-C", repo, "merge", "-q", "main"])
    resolved = commit_files(repo, {"a.txt": "one\nboth\nthree\n"}, "resolve")
    git(repo, "checkout", "-q", "main")
    tip = chain(repo, [entry("t-1", resolved)], "-s", "rebase")[1][2]
    assert git(repo, "log", "--format=%s", f"main..{tip}") == "A title"
    assert git(repo, "show", f"{tip}:a.txt") == "one\nboth\nthree"


def test_chain_starts_from_the_base_that_it_is_given(repo: Repo) -> None:
    base = git(repo, "rev-parse", "main")
    commit_files(repo, {"newer.txt": "x\n"})
    assert chain(repo, [], "-B", base)[0][2] == base


def test_chain_means_the_same_repo_from_a_folder_of_another_worktree(repo: Repo, tmp_path: Path) -> None:
    sha = branch(repo, "w", {"new.txt": "x\n"})
    git(repo, "worktree", "add", "-q", tmp_path / "other", "w")
    argv = [SCRIPTS / "merge-chain.sh", "-b", "main"]
    there = run(argv, cwd=tmp_path / "other/dir", input=entry("t-1", sha), check=True).stdout
    assert there.splitlines()[1].split("\t") == chain(repo, [entry("t-1", sha)])[1]


def test_chain_without_that_branch_exits_3(repo: Repo) -> None:
    assert run([SCRIPTS / "merge-chain.sh", "-C", repo, "-b", "nope"], input="").returncode == 3


def test_chain_outside_a_repo_exits_2(tmp_path: Path) -> None:
    assert run([SCRIPTS / "merge-chain.sh", "-C", tmp_path, "-b", "main"], input="").returncode == 2


# --- landing --------------------------------------------------------------------------------------------------------


def land(repo: Repo, old: str, new: str, *options: str | Path, **env: str) -> tuple[int, list[str]]:
    """land.sh's exit code and the fields of its line; it does not wait for locks."""
    argv = [SCRIPTS / "land.sh", "-C", repo, "-b", "main", "-o", old, "-n", new, *options]
    done = run(argv, env={"FARM_LOCK_SECONDS": "0", **env})
    return done.returncode, done.stdout.rstrip("\n").split("\t")


def recover(repo: Repo, old: str, new: str, seconds: int = 20) -> tuple[int, list[str]]:
    """land.sh recover's exit code and fields; `seconds` is how long a git that lives may take to end."""
    argv = [SCRIPTS / "land.sh", "recover", "-C", repo, "-b", "main", "-o", old, "-n", new]
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


def test_land_moves_a_checkout_in_another_worktree(repo: Repo, step: tuple[str, str], tmp_path: Path) -> None:
    git(repo, "checkout", "-q", "--detach")
    git(repo, "worktree", "add", "-q", tmp_path / "odd\nname", "main")
    assert land(repo, *step) == (0, ["landed", step[1]])
    assert git(tmp_path / "odd\nname", "status", "--porcelain") == ""


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


def test_land_is_blocked_by_a_second_checkout(repo: Repo, step: tuple[str, str], tmp_path: Path) -> None:
    git(repo, "worktree", "add", "-q", "--force", tmp_path / "second", "main")
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


def test_land_runs_no_hooks(repo: Repo, step: tuple[str, str], tmp_path: Path) -> None:
    add_hooks(repo, tmp_path / "witness")
    assert land(repo, *step)[0] == 0
    assert not (tmp_path / "witness").exists()


@needs_strace
def test_land_takes_a_fast_forward_back_that_fails_after_its_files(repo: Repo, step: tuple[str, str]) -> None:
    write_files(repo, {"keep.txt": "edited\n"})
    ref_lock = repo / ".git/refs/heads/main.lock"
    trace = ["strace", "-f", "-qq", "-o", "/dev/null", "-P", ref_lock, "-e", "inject=openat:error=ENOSPC"]
    argv = [*trace, SCRIPTS / "land.sh", "-C", repo, "-b", "main", "-o", step[0], "-n", step[1]]
    assert run(argv).returncode == 1
    assert git(repo, "status", "--porcelain") == " M keep.txt"


# --- landing on a remote --------------------------------------------------------------------------------------------


@pytest.fixture
def remote(repo: Repo, step: tuple[str, str], tmp_path: Path) -> Path:
    """A bare origin whose main is at OLD."""
    git(repo, "clone", "-q", "--bare", repo, tmp_path / "origin.git")
    git(repo, "remote", "add", "origin", tmp_path / "origin.git")
    git(tmp_path / "origin.git", "update-ref", "refs/heads/main", step[0])
    return tmp_path / "origin.git"


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


# --- recovery of a landing ------------------------------------------------------------------------------------------


def kill_landing(repo: Repo, step: tuple[str, str], folder: Path, when: str) -> None:
    """Land with a git whose fast-forward strace kills at a system call, and the whole landing with it."""
    real = shutil.which("git")
    wrapper = folder / "git"
    traced = f'strace -f -qq -o /dev/null -e inject={when} {real} "$@" || kill -9 0'
    wrapper.write_text(f'#!/bin/sh\ncase "$*" in *ff-only*) {traced} ;; *) exec {real} "$@" ;; esac\n')
    wrapper.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    argv = [str(SCRIPTS / "land.sh"), "-C", str(repo), "-b", "main", "-o", step[0], "-n", step[1]]
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
    repo: Repo, step: tuple[str, str], call: str, number: int, tmp_path: Path
) -> None:
    write_files(repo, {"keep.txt": "staged\n"})
    git(repo, "add", "keep.txt")
    write_files(repo, {"keep.txt": "edited\n", "untracked.txt": "u\n"})
    before = git(repo, "diff"), git(repo, "diff", "--cached"), git(repo, "ls-files", "-o")
    kill_landing(repo, step, tmp_path, f"{call}:signal=KILL:when={number}")
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
    repo: Repo, step: tuple[str, str], tmp_path: Path, head: str, name: str
) -> None:
    git(repo, "checkout", "-q", "-B", head, "main")
    dying, lock = tmp_path / "dying", repo / ".git" / name
    (tmp_path / "git").write_text(GIT_THAT_DIES_TWICE % (lock, dying, dying, dying, shutil.which("git")))
    (tmp_path / "git").chmod(0o755)
    code, _ = land(repo, *step, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
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


# --- slots of gates -------------------------------------------------------------------------------------------------


def slot(verb: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run([SCRIPTS / "gate-slot.sh", verb, *arguments])


@pytest.fixture
def gate_slot(repo: Repo) -> Path:
    """A slot at main, in a folder of the repo's own checkout, where a mistake would hit that checkout."""
    commit_files(repo, {".gitignore": "/slots/\n/slots-*\ncache/\n"})
    folder = repo / "slots/1"
    assert slot("prepare", "-C", repo, folder, "main").stdout == f"{folder}\n"
    return folder


def test_slot_holds_exactly_the_commit(repo: Repo, gate_slot: Path) -> None:
    assert git(gate_slot, "rev-parse", "HEAD") == git(repo, "rev-parse", "main")
    assert git(gate_slot, "status", "--porcelain", "--ignored") == ""


def test_slot_moves_to_another_commit_and_keeps_ignored_caches(repo: Repo, gate_slot: Path) -> None:
    sha = branch(repo, "w", {"a.txt": "new\n"})
    write_files(gate_slot, {"cache/x": "kept\n", "a.txt": "dirty\n", "untracked/y": "y\n"})
    slot("prepare", "-C", repo, gate_slot, sha)
    assert git(gate_slot, "rev-parse", "HEAD") == sha
    assert git(gate_slot, "status", "--porcelain", "--ignored") == "!! cache/"


def leave_nested_repo(folder: Path) -> None:
    git(folder, "init", "-q", "nested")
    commit_files(folder / "nested", {"x": "x\n"})


def leave_commit(folder: Path) -> None:
    git(folder, "checkout", "-q", "-b", "by-the-gate")
    commit_files(folder, {"a.txt": "by the gate\n"})


def leave_locked_folder(folder: Path) -> None:
    write_files(folder, {"locked/x": "x\n"})
    (folder / "locked").chmod(0o500)


def leave_index_lock(folder: Path) -> None:
    Path(git(folder, "rev-parse", "--absolute-git-dir"), "index.lock").touch()


def leave_broken_index(folder: Path) -> None:
    Path(git(folder, "rev-parse", "--absolute-git-dir"), "index").write_bytes(b"DIRC broken")


def leave_broken_head(folder: Path) -> None:
    Path(git(folder, "rev-parse", "--absolute-git-dir"), "HEAD").write_bytes(b"")


def leave_merge(folder: Path) -> None:
    git(folder, "-c", "user.name=x", "commit", "-q", "--allow-empty", "-m", "x")
    git(folder, "merge", "-q", "--no-commit", "--no-ff", "-s", "ours", git(folder, "rev-parse", "HEAD@{1}"))


def leave_no_git_file(folder: Path) -> None:
    (folder / ".git").unlink()


def leave_no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def leave_half_made(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != ".git":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    Path(git(folder, "rev-parse", "--absolute-git-dir"), "index").unlink()


def leave_forgotten(folder: Path) -> None:
    shutil.rmtree(git(folder, "rev-parse", "--absolute-git-dir"))


LEFT = [value for name, value in sorted(globals().items()) if name.startswith("leave_")]


@pytest.mark.parametrize("leave", LEFT, ids=lambda leave: leave.__name__.removeprefix("leave_"))
def test_slot_is_made_good_after_a_gate_left(repo: Repo, gate_slot: Path, leave: Callable[[Path], None]) -> None:
    leave(gate_slot)
    before = footprint(repo)
    done = slot("prepare", "-C", repo, gate_slot, "main")
    assert done.returncode == 0, done.stderr
    assert slot("check", gate_slot, "main").returncode == 0
    assert git(gate_slot, "status", "--porcelain") == ""
    assert footprint(repo) == before


def test_slot_check_names_the_changed_files(gate_slot: Path) -> None:
    write_files(gate_slot, {"a.txt": "changed\n", "untracked.txt": "fine\n"})
    (gate_slot / "dir/b.txt").unlink()
    done = slot("check", gate_slot, "main")
    assert (done.returncode, done.stdout) == (1, "a.txt\ndir/b.txt\n")


def test_slot_check_names_a_moved_head(gate_slot: Path) -> None:
    git(gate_slot, "commit", "-q", "--allow-empty", "-m", "by the gate")
    done = slot("check", gate_slot, "main")
    assert (done.returncode, done.stdout) == (1, "HEAD\n")


def test_slot_check_does_not_mind_a_touched_file(gate_slot: Path) -> None:
    os.utime(gate_slot / "a.txt", (1, 1))
    assert slot("check", gate_slot, "main").returncode == 0


def test_slot_of_an_unknown_commit_exits_3(repo: Repo, gate_slot: Path) -> None:
    assert slot("prepare", "-C", repo, gate_slot, "nope").returncode == 3


@pytest.mark.parametrize("verb", ["prepare", "remove"])
def test_a_folder_that_is_no_slot_is_refused_and_left_alone(repo: Repo, verb: str) -> None:
    write_files(repo, {"untracked.txt": "u\n"})
    before = footprint(repo)
    assert slot(verb, "-C", repo, repo, *(["main"] if verb == "prepare" else [])).returncode == 4
    assert footprint(repo) == before


def test_slot_removed_is_forgotten_by_git(repo: Repo, gate_slot: Path) -> None:
    assert slot("remove", gate_slot).returncode == 0
    assert list(gate_slot.parent.iterdir()) == []
    assert len(git(repo, "worktree", "list").splitlines()) == 1


# --- pins ------------------------------------------------------------------------------------------------------------


def pin(repo: Repo, *arguments: str) -> tuple[int, str]:
    done = run([SCRIPTS / "pin-ref.sh", "-C", repo, *arguments])
    return done.returncode, done.stdout.strip()


def test_pin_makes_a_ref_below_refs_farm(repo: Repo) -> None:
    sha = git(repo, "rev-parse", "main")
    assert pin(repo, "refs/farm/ready/t-1", "main") == (0, sha)
    assert git(repo, "rev-parse", "refs/farm/ready/t-1") == sha


def test_pin_of_a_tag_pins_its_commit(repo: Repo) -> None:
    git(repo, "tag", "-a", "v1", "-m", "v1")
    assert pin(repo, "refs/farm/ready/t-1", "v1") == (0, git(repo, "rev-parse", "main"))


@pytest.mark.parametrize("ref", ["refs/heads/main", "refs/farm/", "HEAD", "refs/farm/../heads/x"])
def test_pin_refuses_a_ref_elsewhere(repo: Repo, ref: str) -> None:
    before = git(repo, "for-each-ref")
    assert pin(repo, ref, "main")[0] == 2
    assert git(repo, "for-each-ref") == before


@pytest.mark.parametrize("commit", ["nope", "main:a.txt", "", "-x"])
def test_pin_of_no_commit_exits_3(repo: Repo, commit: str) -> None:
    assert pin(repo, "refs/farm/ready/t-1", commit) == (3, "")
