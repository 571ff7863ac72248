"""merge-chain.sh on real git."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from merge_scripts import Repo, add_hooks, branch, footprint
from paths import SCRIPTS
from sandbox import commit_files, git, run, write_files

MERGE_TREE: Mapping[str, str] = {}
WORKTREE: Mapping[str, str] = {"FARM_MERGE": "worktree"}
BOTH_WAYS = pytest.mark.parametrize("way", [MERGE_TREE, WORKTREE], ids=["merge-tree", "worktree"])


def entry(task: str, commit: str, title: str = "A title", epoch: int = 1_700_000_000) -> str:
    return f"{task}\t{commit}\t{epoch}\tagent-001\t{title}\n"


def chain(
    repo: Repo, entries: Iterable[str], *options: str | Path, env: Mapping[str, str] = MERGE_TREE
) -> list[list[str]]:
    """The lines of merge-chain.sh, split into fields."""
    argv = [SCRIPTS / "merge/chain.sh", "-C", repo, "-b", "main", *options]
    done = run(argv, input="".join(entries), env=env, check=True)
    return [line.split("\t") for line in done.stdout.splitlines()]


def statuses(lines: list[list[str]]) -> dict[str, str]:
    return {fields[0]: fields[1] for fields in lines[1:]}


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
def test_chain_runs_no_hooks(repo: Repo, way: Mapping[str, str], elsewhere: Path) -> None:
    entries = [entry("t-1", branch(repo, "w", {"new.txt": "x\n"})), entry("t-2", branch(repo, "v", {"a.txt": "x\n"}))]
    add_hooks(repo, elsewhere / "witness")
    chain(repo, entries, env=way)
    assert not (elsewhere / "witness").exists()


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
def test_chain_is_not_bent_by_replace_refs(repo: Repo, way: Mapping[str, str]) -> None:
    sha = branch(repo, "w", {"a.txt": "bad\n"})
    commit_files(repo, {"new.txt": "new\n"})
    plain = chain(repo, [entry("t-1", sha)], env=way)
    git(repo, "replace", sha, "main~1")
    git(repo, "replace", "--graft", "main")
    assert chain(repo, [entry("t-1", sha)], env=way) == plain


@BOTH_WAYS
def test_chain_sees_what_lies_behind_a_shallow_fetch_and_stays_within_a_shallow_clone(repo: Repo, way: Mapping[str, str]) -> None:
    sha = branch(repo, "w", {"w.txt": "work\n"})
    for number in range(3):
        commit_files(repo, {"new.txt": f"{number}\n"})
    plain = chain(repo, [entry("t-1", sha)], env=way)
    server = repo.parent / "server"
    git(repo, "clone", "-q", "--bare", repo, server)
    git(repo, "fetch", "-q", "--depth=1", f"file://{server}", "main")
    assert git(repo, "rev-list", "--count", "main") == "1"
    assert "file:shallow\t" in run([SCRIPTS / "merge/shared-state.sh", "-C", repo]).stdout
    assert chain(repo, [entry("t-1", sha)], env=way) == plain
    clone = repo.parent / "clone"
    git(repo, "clone", "-q", "--depth=2", f"file://{server}", clone)
    new = branch(clone, "new", {"x.txt": "x\n"})
    git(clone, "fetch", "-q", "origin", "w")
    found = chain(clone, [entry("t-1", new), entry("t-2", "FETCH_HEAD")], env=way)
    assert statuses(found) == {"t-1": "ok", "t-2": "unrelated"}


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
        commit_files(repo, {".gitmodules": '[submodule "module"]\n\tpath = module\n\turl = ../module\n'})
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
def test_chain_writes_the_hunks_of_a_conflict_for_people(repo: Repo, way: Mapping[str, str], elsewhere: Path) -> None:
    sha = branch(repo, "w", {"a.txt": "one\nmine\nthree\n"})
    commit_files(repo, {"a.txt": "one\nours\nthree\n"})
    chain(repo, [entry("t-1", sha)], env={**way, "FARM_CONFLICTS": str(elsewhere)})
    text = (elsewhere / "t-1.txt").read_text()
    assert "<<<<<<< main\nours\n=======\nmine\n>>>>>>> t-1\n" in text
    assert "CONFLICT (content)" in text


def test_chain_cuts_the_text_of_a_huge_conflict(repo: Repo, elsewhere: Path) -> None:
    sha = branch(repo, "w", {"a.txt": "mine\n" * 5000})
    commit_files(repo, {"a.txt": "ours\n" * 5000})
    chain(repo, [entry("t-1", sha)], env={"FARM_CONFLICTS": str(elsewhere)})
    assert len((elsewhere / "t-1.txt").read_text().splitlines()) == 200


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


@pytest.mark.parametrize("style", ["squash", "rebase"])
def test_chain_keeps_a_message_whole_that_has_a_rule_in_it(repo: Repo, style: str) -> None:
    sha = branch(repo, "w", {"one.txt": "x\n"}, message="one\n\nWhy: so\n---\nmore\n\nSigned-off-by: S <s@e.org>")
    tip = chain(repo, [entry("t-1", sha)], "-s", style)[1][2]
    message = git(repo, "log", "-1", "--format=%B", tip)
    assert "Why: so\n---\nmore\n" in message and message.count("Why: so") == 1
    keys = git(repo, "log", "-1", "--format=%(trailers:keyonly,separator=%x2C)", tip).split(",")
    assert [key for key in keys if key != "Co-authored-by"] == ["Signed-off-by", "Farm-Task", "Farm-Agent", "Farm-Tested-Tree"]


@pytest.mark.parametrize("style", ["merge", "squash", "rebase"])
@pytest.mark.parametrize("author", [". <a@x> 1600000000 +0000", " <> 1600000000 +0000", "a <a@x> -1600000000 +0000", "a <a@x>"])
def test_chain_takes_an_author_whom_git_would_not_take_from_us(repo: Repo, style: str, author: str) -> None:
    """As old tools have written them into some history that an agent has merged: else one entry would stop all."""
    text = git(repo, "cat-file", "commit", branch(repo, "w", {"one.txt": "x\n"})) + "\n"
    odd = re.sub(r"(?m)^author .*", f"author {author}", text)
    done = run(["git", "-C", repo, "hash-object", "-t", "commit", "-w", "--stdin", "--literally"], input=odd, check=True)
    lines = chain(repo, [entry("t-1", done.stdout.strip()), entry("t-2", branch(repo, "v", {"two.txt": "x\n"}))], "-s", style)
    assert statuses(lines) == {"t-1": "ok", "t-2": "ok"}


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


def test_chain_means_the_same_repo_from_a_folder_of_another_worktree(repo: Repo, elsewhere: Path) -> None:
    sha = branch(repo, "w", {"new.txt": "x\n"})
    git(repo, "worktree", "add", "-q", elsewhere / "other", "w")
    argv = [SCRIPTS / "merge/chain.sh", "-b", "main"]
    there = run(argv, cwd=elsewhere / "other/dir", input=entry("t-1", sha), check=True).stdout
    assert there.splitlines()[1].split("\t") == chain(repo, [entry("t-1", sha)])[1]


def test_chain_without_that_branch_exits_3(repo: Repo) -> None:
    assert run([SCRIPTS / "merge/chain.sh", "-C", repo, "-b", "nope"], input="").returncode == 3


def test_chain_outside_a_repo_exits_2(elsewhere: Path) -> None:
    assert run([SCRIPTS / "merge/chain.sh", "-C", elsewhere, "-b", "main"], input="").returncode == 2
