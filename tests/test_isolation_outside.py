"""What the farm itself runs outside of sandboxes, on trees and git entries that agents have left: it runs no program of theirs,
writes through no link of theirs, waits at no FIFO of theirs."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
from sandbox import git, run

import farm as toolkit

pytestmark = pytest.mark.usefixtures("there_can_be_sandboxes")


@dataclass(frozen=True)
class Outside:
    """`how` by the agent in its sandbox, `act` by the farm outside: it has succeeded when `seen` ends with 0."""

    what: str
    how: str
    act: str
    seen: str = '[ -e "$HOME/ran" ]'
    alone: bool = False  # the farm withstands it without sandboxes, too
    kind: str = "agent"


# what farm.py puts before a command that looks at trees, and how a worktree is seen by `status`
OFF = 'off() { [ "$FARM_ISOLATE" = none ] || set -- bash "$TOOLKIT/scripts/sandbox/tame-filters.sh" off "$REPO" "$@"; "$@"; }; '
REMOVE = OFF + 'off "$TOOLKIT/scripts/rm-worktrees.sh" -C "$REPO" -b main "$AGENT"'
LOOK = OFF + 'printf "$AGENT\\t$BRANCH\\t$W1\\n" | off "$TOOLKIT/scripts/merge/look.sh" work -C "$REPO" -b "target-$N"'
DIFF = OFF + 'off "$TOOLKIT/scripts/merge/diff-work.sh" -C "$REPO" -b main -w "$W1"'
MAKE = '"$TOOLKIT/scripts/mk-worktrees.sh" -C "$REPO" -n "$MANY"'
SLOT = '"$TOOLKIT/scripts/merge/gate-slot.sh" %s -C "$REPO" "$SLOT" "$BRANCH"'
MERGE = 'printf "t-1\\t$BRANCH\\t1\\t$AGENT\\tx\\n" | "$TOOLKIT/scripts/merge/chain.sh" -C "$REPO" -b main'

WAITED = '[ "$CODE" = 124 ]'
PIPE = 'rm "$OWN/HEAD"; mkfifo "$OWN/HEAD"'
PROGRAM = 'mkdir -p tools && printf "#!/bin/sh\\ntouch \\"$HOME/ran\\"\\ncat\\n" >tools/run && chmod +x tools/run; '
FILTERED = PROGRAM + "echo 'z.txt filter=user' >.gitattributes; echo x >z.txt; git add -A; git commit -q -m filtered; "
SUB = "git init -q sub; echo a >sub/f; git -C sub add f; git -C sub commit -q -m a; "
MONITORED = SUB + PROGRAM + "git -C sub config core.fsmonitor \"'$W/tools/run' #\"; git add sub; git commit -q -m sub; "
FAR = (
    SUB + "printf '[submodule \"sub\"]\\n\\tpath = sub\\n\\turl = ../x\\n' >.gitmodules; git add .gitmodules sub; "
    "git commit -q -m sub; cd sub; rm -rf .git/objects/??; git config core.repositoryformatversion 1; "
    'git config extensions.partialClone origin; git config remote.origin.promisor true; git config remote.origin.url "$W/sub"; '
    "git config remote.origin.uploadpack \"touch '$HOME/ran';:\""
)
HOOKS = PROGRAM + "mkdir .husky; cp tools/run .husky/post-index-change; cp tools/run .husky/reference-transaction; echo x >unsaved"
ELSEWHERE = (
    'mkfifo "$HOME/p"; exec 8<>"$HOME/p"; echo word >&8; S=$TOOLKIT/scripts; "$S/hosts/gate-here.sh" "$REPO" "refs/heads/$BRANCH" '
    '"$(git -C "$REPO" rev-parse "$BRANCH")" s \''
    + SUB
    + PROGRAM
    + 'echo "f filter=own" >sub/.gitattributes; git -C sub config filter.own.clean "$PWD/tools/run"; echo b >sub/f\' '
    '"$(cat "$S/isolate.sh")" full .npm <&8'
)

OUTSIDE = [
    Outside("hooks of the settings lie in its tree, whose rest is rescued", HOOKS, REMOVE),
    Outside("a filter lies in its tree, which is removed", FILTERED + "echo y >z.txt", REMOVE),
    Outside(
        "a filter lies in its tree, whose lines are counted",
        FILTERED + "echo y >z.txt",
        f'git -C "$REPO" branch "target-$N" main; {LOOK}',
    ),
    Outside("a filter lies in its tree, which is shown", FILTERED + "echo y >z.txt", DIFF),
    Outside("a filter lies in the tree that a gate's slot gets", FILTERED, SLOT % "prepare"),
    Outside("a filter lies in a slot whose gate has changed it", PROGRAM + "echo y >a.txt", SLOT % "check", kind="gate"),
    Outside(
        "a filter lies in the branch of a new worktree",
        FILTERED,
        f'MANY=$((MANY + 1)); git -C "$REPO" branch "farm/agent-0$MANY/work" "$BRANCH"; {MAKE}',
    ),
    Outside("a filter lies in a tree whose folder is gone", FILTERED + "rm -rf z.txt", f'find "$W1" -mindepth 1 -delete; {MAKE}'),
    Outside("a submodule has a monitor of files, and is removed", MONITORED, REMOVE, alone=True),
    Outside(
        "a submodule that the target has, too, has a filter",
        SUB + PROGRAM + 'echo "f filter=own" >sub/.gitattributes; git add sub; git commit -q -m sub; echo b >sub/f; '
        "git -C sub config filter.own.clean \"'$W/tools/run'\"",
        f'git -C "$REPO" branch "target-$N" "$BRANCH"; {LOOK}',
        alone=True,
    ),
    Outside(
        "a gate elsewhere leaves a submodule that has a filter", SUB + "git add sub; git commit -q -m sub", ELSEWHERE, alone=True
    ),
    Outside("a submodule gets missing objects by a program", FAR, MERGE, alone=True),
    Outside(
        "its HEAD is a link to a file that shells run, and its log says what",
        'rm "$OWN/farm-ready"; ln -sf "$HOME/.profile" "$OWN/HEAD"; echo "x evil" >"$OWN/logs/HEAD"',
        MAKE,
        'grep -q evil "$HOME/.profile"',
        alone=True,
    ),
    Outside(
        "the log of its HEAD names no commit",
        'rm "$OWN/farm-ready" "$OWN/HEAD"; echo "x evil" >"$OWN/logs/HEAD"',
        MAKE,
        '! git -C "$W1" rev-parse -q --verify HEAD',
        alone=True,
    ),
    Outside(
        "what says that its worktree is ready is a link",
        'rm "$OWN/farm-ready" "$OWN/index"; rm -rf "$W"/*; ln -s "$HOME/made" "$OWN/farm-ready"',
        MAKE,
        '[ -e "$HOME/made" ]',
        alone=True,
    ),
    Outside("its attributes are a FIFO, and it is removed", "mkfifo .gitattributes", REMOVE, WAITED, alone=True),
    Outside("attributes are a FIFO in a slot", "mkfifo .gitattributes", SLOT % "check", WAITED, alone=True, kind="gate"),
    Outside("they are in a slot that is used again", "mkfifo .gitattributes", SLOT % "prepare", WAITED, alone=True, kind="gate"),
    *[
        Outside(
            f"its HEAD is a FIFO, before {script}",
            PIPE,
            f'"$TOOLKIT"/scripts/merge/{script} -C "$REPO" {words}',
            WAITED,
            alone=True,
        )
        for script, words in (("find-checkout.sh", "main"), ("tidy-refs.sh list", "-b main"))
    ],
    Outside("its HEAD is a FIFO, which `up` reads", PIPE, MAKE, WAITED, alone=True),
]
USER = 54321 if os.geteuid() == 0 else os.geteuid()


MAKE_MORE = """
cd "$1"
"$2/mk-worktrees.sh" -n "$3" >/dev/null
git config core.hooksPath .husky; git config filter.user.clean 'sh ./tools/run'; git config filter.user.smudge 'sh ./tools/run'
for n in $(seq "$3"); do
  name=$(printf agent-%03d "$n"); mkdir -p "coordination/mailbox/$name"; : >"coordination/mailbox/$name/pid"
  git -C "../a repo-farm/$name-worktree" switch -q -C "farm/$name/t-0001"
done
"""


def test_what_agents_have_left_the_farm_neither_runs_nor_follows_nor_waits_for(make_ground):
    wrong, many = [], str(len(OUTSIDE))
    for isolate in ("bwrap", "none"):
        ground = make_ground(USER, isolate)
        ground.run("bash", "-ec", MAKE_MORE, "bash", ground.repo, ground.toolkit / "scripts", many, check=True)
        for n, row in enumerate(OUTSIDE, 1):
            own, slot = ground.tree(n), ground.trees / f"gate-{n}"
            names = ground.variables(own) + f"export W1='{own}' MANY={many} SLOT='{slot}'\n"
            if row.kind == "gate":
                ground.run("bash", stdin=names + SLOT % "prepare", check=True)
                (ground.repo / ".git/info/attributes").write_text("a.txt filter=user\n")
            ground.enter(row.kind, isolate, slot if row.kind == "gate" else own, row.how)
            (ground.home / "ran").unlink(missing_ok=True)
            done = ground.run("timeout", "5", "bash", stdin=names + row.act, FARM_ISOLATE=isolate)
            is_done = ground.run("bash", stdin=names + row.seen, CODE=str(done.returncode)).returncode == 0
            if is_done != (isolate == "none" and not row.alone):
                wrong.append(f"{isolate}: {row.what}: {done.returncode} {done.stderr[-200:]}")
            (ground.repo / ".git/info/attributes").unlink(missing_ok=True)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kind", ["tree", "setup"])
@pytest.mark.parametrize("isolate", ["bwrap", "none"])
def test_what_runs_for_the_farm_cannot_signal_its_processes(make_ground, kind, isolate):
    """A signal to its own process group would reach the loop, or `up`: a group goes across namespaces of processes."""
    ground = make_ground(USER)
    confine = ["bash", ground.toolkit / "scripts/sandbox/confine.sh", kind, ground.repo, ground.tree(1), "bash", "-c", "kill -9 0"]
    loop = ["setsid", "-w", "bash", "-c", 'cd "$0" && "$@"; echo "goes on after $?"', ground.tree(1), *confine]
    done = ground.run(*loop, FARM_ISOLATE=isolate)
    assert (done.stdout == "goes on after 137\n") == (isolate == "bwrap"), done


@pytest.mark.skipif(os.geteuid() != 0, reason="only root could")
def test_root_in_a_sandbox_cannot_set_what_the_kernel_obeys(make_ground):
    """Without any capability it can, by its uid alone; the program of core_pattern would run outside."""
    ground = make_ground(0)
    script = "for f in kernel/core_pattern kernel/modprobe vm/swappiness; do cat /proc/sys/$f >/proc/sys/$f && echo $f; done"
    if not ground.enter("agent", "none", ground.tree(1), script).stdout:
        pytest.skip("nobody can write there on this machine")
    for kind, tree in (("agent", ground.tree(1)), ("gate", ground.trees / "gate-1")):
        assert ground.enter(kind, "bwrap", tree, script).stdout == ""


@pytest.mark.parametrize("isolate", ["bwrap", "none"])
def test_no_program_of_a_tree_is_found_by_a_relative_place_of_path(farm, sandbox, isolate):
    """`.` or ./node_modules/.bin in PATH, an empty entry of PYTHONPATH: for what works in a tree that is an agent's."""
    ran = sandbox.home / "ran"
    agent = f"""
      mkdir -p bin
      for name in bash git perl bwrap env; do
        printf '#!/bin/sh\\ntouch {ran}\\nPATH=/usr/bin:/bin exec %s "$@"\\n' $name >bin/$name
      done
      chmod +x bin/*; echo 'open("{ran}", "w")' | tee json.py >typing.py; echo "$FARM_TASK" >"$FARM_TASK.txt"; /bin/rm -f {ran}"""
    for title in ("one", "two"):
        farm.ok("add", title)
    places = {"PATH": f"bin:{os.environ['PATH']}", "PYTHONPATH": ":/none", "FARM_ISOLATE": isolate}
    done = farm("run", "-n", "1", "--agent", agent, "--gate", "ls t-*.txt", "--until-drained", env=places)
    assert (done.returncode, ran.exists()) == (0, isolate == "none"), done.stderr


@pytest.mark.parametrize("isolate", ["bwrap", "none"])
def test_what_a_person_types_runs_as_the_farm_was_started(farm, sandbox, isolate):
    """The person's shell knows nothing of FARM_ISOLATE: the gates of `merge`, and what `show` and `diff` have git look at."""
    by_gate, by_filter = sandbox.home / "by-gate", sandbox.home / "by-filter"
    farm.ok("add", "one")
    gate, agent = ("--gate", f"touch {by_gate}; true"), ("--agent", 'echo x >"$FARM_TASK.txt"')
    farm.ok("run", "-n", "1", *agent, *gate, "--until-drained", env={"FARM_ISOLATE": isolate})
    by_gate.unlink(missing_ok=True)
    farm.ok("add", "two")
    farm.submit("agent-002", {"two.txt": "x"})
    farm.ok("merge", *gate)
    assert (farm.task("t-0002")["state"], by_gate.exists()) == ("landed", isolate == "none")
    farm.ok("add", "three")
    farm.claim("agent-001")
    tree = farm.repo.parent / f"{farm.repo.name}-farm/agent-001-worktree"
    git(tree, "switch", "-q", "-C", "farm/agent-001/t-0003")
    git(farm.repo, "config", "filter.user.clean", f"touch {by_filter}; cat")
    (tree / ".gitattributes").write_text("* filter=user\n")
    farm.ok("show", "t-0003", "--json")
    farm.ok("diff", "t-0003")
    assert by_filter.exists() == (isolate == "none")


def test_objects_that_are_there_at_the_start_are_out_of_agents_reach(farm):
    """They are in packs before an agent begins. One that is damaged is named, and keeps none of the others from it."""
    before = git(farm.repo, "rev-parse", "HEAD:README.md")
    bad = git(farm.repo, "hash-object", "-w", "--stdin", input="bad")
    good = git(farm.repo, "hash-object", "-w", "--stdin", input="good")
    folder = farm.repo / ".git/objects"
    (folder / bad[:2] / bad[2:]).unlink()
    (folder / bad[:2] / bad[2:]).write_bytes((folder / good[:2] / good[2:]).read_bytes())
    farm.ok("add", "one")
    agent = f"""
      cd "$(git rev-parse --git-common-dir)/objects" && rm -rf {before[:2]}/{before[2:]} {good[:2]}/{good[2:]}
      rm -rf pack; cd - && echo x >"$FARM_TASK.txt" """
    done = farm("run", "-n", "1", "--agent", agent, "--until-drained", env={"FARM_ISOLATE": "bwrap"})
    assert (done.returncode, bad in done.stderr) == (0, True), done.stderr
    assert git(farm.repo, "cat-file", "-p", "main:README.md") == "a throw-away repo"
    assert git(farm.repo, "cat-file", "-p", good) == "good"


def test_what_another_has_committed_is_out_of_reach_once_the_loop_has_kept_it(make_ground, farm, monkeypatch):
    ground = make_ground(os.geteuid())
    monkeypatch.setenv("FARM_ISOLATE", "bwrap")
    settings, state = toolkit.load_settings(str(farm.repo), {}, {}), toolkit.Store(str(farm.repo)).snapshot()
    for text in ("kept", "not kept"):
        ground.enter("agent", "bwrap", ground.tree(1), f"echo {text} >mine.txt; git add mine.txt; git commit -q -m mine")
        if text == "kept":
            toolkit.Housekeeping(toolkit.Site(toolkit.Store(str(ground.repo)), settings, "main")).go_on(state)
        name = ground.git("rev-parse", "farm/agent-001/t-0001:mine.txt")
        ground.enter("setup", "bwrap", ground.tree(2), f'rm -f "$GIT/objects/{name[:2]}/{name[2:]}"')
        assert (run(["git", "-C", ground.repo, "cat-file", "-e", name]).returncode == 0) == (text == "kept")


def test_no_folder_on_the_way_to_a_mount_can_be_changed_for_a_link(make_ground):
    """It would have the next start make a folder elsewhere, and then fail, whatever the task."""
    ground = make_ground(os.geteuid())
    (ground.home / "dir").mkdir()
    script = 'for d in logs/refs refs/farm refs/heads; do mv "$GIT/$d" "$GIT/${d%/*}/x" && ln -s "$HOME/dir" "$GIT/$d"; done; true'
    for _ in range(2):
        assert ground.enter("agent", "bwrap", ground.tree(1), script).returncode == 0
    assert not list((ground.home / "dir").iterdir())
