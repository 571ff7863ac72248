"""The table of attacks: what an agent, or a test of its branch within the gate, may try. Each row runs in a sandbox, where it must
fail, and without one, where it must succeed, or it would prove nothing; as an unprivileged user and as root."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from attacks import ALLOWED, BY_NAME, BY_PORT, DAMAGES, ROWS
from paths import SCRIPTS
from sandbox import git, run, wait_until

import farm as toolkit

USERS = (
    [pytest.param(54321, id="user"), pytest.param(0, id="root")] if os.geteuid() == 0 else [pytest.param(os.geteuid(), id="user")]
)


pytestmark = pytest.mark.usefixtures("there_can_be_sandboxes")


def test_there_are_enough_rows():
    assert len({row.what for row in (*ROWS, *DAMAGES)}) == len(ROWS) + len(DAMAGES) >= 60


@pytest.mark.parametrize("uid", USERS)
def test_what_an_agent_may_not_do_it_cannot_and_without_a_sandbox_it_can(make_ground, uid):
    ground = make_ground(uid)
    rows = [*ROWS, *DAMAGES]
    assert ground.attack("agent", "bwrap", ground.tree(1), rows) == []
    assert ground.attack("gate", "bwrap", ground.trees / "gate-1", [row for row in rows if row.gate]) == []
    done = ground.attack("agent", "none", ground.tree(1), ROWS) + ground.attack("agent", "none", ground.tree(1), DAMAGES)
    nothing = [row.what for row in rows if row.what not in done]
    assert not nothing, f"these prove nothing: {nothing}"


@pytest.mark.parametrize("uid", USERS)
def test_what_an_agent_needs_it_can_do(make_ground, uid):
    ground = make_ground(uid)
    script = "".join(f"( {how} ) >>/tmp/said 2>&1 </dev/null; echo {n} $?\n" for n, how in enumerate(ALLOWED.values()))
    done = ground.enter("agent", "bwrap", ground.tree(1), script + "cat /tmp/said >&2")
    codes = dict(line.split() for line in done.stdout.splitlines())
    assert [what for n, what in enumerate(ALLOWED) if codes.get(str(n)) != "0"] == [], done.stderr
    # what it has committed is there outside, and its tags, stash and cache are nobody else's
    assert ground.git("log", "-1", "--format=%s", "farm/agent-001/t-0001") == "more"
    assert ground.git("tag") == ground.git("stash", "list") == ""
    assert not (ground.home / ".cache/own").exists() and not (ground.root / "tmp/y").exists()
    done = ground.enter("agent", "bwrap", ground.tree(1), 'cat "$HOME/.cache/own"; git tag; git stash list')
    assert done.stdout.split()[:2] == ["x", "v1"] and "WIP" in done.stdout


def test_paths_are_shown_and_hidden_and_variables_passed_as_the_settings_say(make_ground):
    ground = make_ground(os.geteuid())
    script = "cat ~/.npmrc; [ -f ~/.bashrc ] || echo no bashrc; echo x >~/.aws/new && echo written; "
    script += 'echo "${SECRET_TOKEN-} ${DISPLAY-none}"'
    env = {"FARM_SHOW": "~/.npmrc:+.aws", "FARM_HIDE": str(ground.home / ".bashrc"), "FARM_PASS": "SECRET_*"}
    assert ground.enter("agent", "bwrap", ground.tree(1), script, **env).stdout.split("\n")[:2] == ["KEYno bashrc", "written"]
    assert ground.enter("agent", "bwrap", ground.tree(1), script, **env).stdout.split("\n")[2] == "x none"
    assert (ground.home / ".aws/new").read_text() == "x\n"


def test_a_link_that_the_command_names_is_followed(make_ground):
    """Where it can be seen it is left as it is: bwrap puts nothing in a link's place, which may lead outside."""
    ground = make_ground(0 if os.geteuid() == 0 else os.geteuid())
    for folder in (ground.home / "bin", ground.root / "opt"):
        folder.mkdir()
    (ground.root / "opt/tool").write_text("#!/bin/sh\necho $1\n")
    (ground.root / "opt/tool").chmod(0o755)
    (ground.home / "bin/tool").symlink_to(ground.root / "opt/tool")
    argv = ["bash", ground.toolkit / "scripts/sandbox/confine.sh", "agent", ground.repo, ground.tree(1)]
    done = ground.run(*argv, "bash", "-c", f"{ground.home}/bin/tool $((1 + 1))", FARM_ISOLATE="bwrap", FARM_AGENT_NAME="agent-001")
    assert done.stdout.split() == ["2"], done.stderr


@pytest.mark.parametrize(("kind", "variable"), [("agent", "FARM_NETWORK"), ("gate", "FARM_GATE_NETWORK")])
def test_a_sandbox_without_network_has_none_not_even_the_loopback_of_the_host(make_ground, kind, variable):
    ground = make_ground(os.geteuid())
    tree = ground.trees / "gate-1" if kind == "gate" else ground.tree(1)
    other = {"FARM_NETWORK": "FARM_GATE_NETWORK", "FARM_GATE_NETWORK": "FARM_NETWORK"}[variable]
    script = f"{BY_PORT} $PORT; echo $?; {BY_NAME} $ABSTRACT; echo $?; tail -n +3 /proc/net/dev | grep -cv lo:"
    assert ground.enter(kind, "bwrap", tree, script, **{variable: "none"}).stdout.split() == ["1", "1", "0"]
    assert ground.enter(kind, "bwrap", tree, script, **{other: "none"}).stdout.split()[0] == "0"


def test_any_command_prefix_is_a_sandbox_with_its_places_filled_in(make_ground):
    ground = make_ground(os.geteuid())
    done = ground.enter(
        "agent", "env 'W={worktree}' G={git} R={refs} M={mailbox} H={home}", ground.tree(1), 'printf "%s|" "$W" "$G" "$R" "$M" "$H"'
    )
    git = ground.repo / ".git"
    # the batch itself has set W
    assert done.stdout.split("|")[1:5] == [
        str(path) for path in (git, git / "refs/heads/farm/agent-001", ground.repo / "coordination/mailbox/agent-001", ground.home)
    ]


def test_a_sandbox_ends_with_its_caller_and_passes_on_exit_code_and_interrupt(make_ground, sandbox):
    ground = make_ground(os.geteuid())
    assert ground.enter("agent", "bwrap", ground.tree(1), "exit 37").returncode == 37
    assert ground.enter("agent", "bwrap", ground.tree(1), "kill -9 $$").returncode == 137
    argv = ["bash", SCRIPTS / "isolate.sh", "-r", sandbox.root, "bash", "-c", f"exec -a {ground.mark} sleep 600"]
    caller = subprocess.Popen(["bash", "-c", '"$@"; :', "bash", *argv], cwd="/")
    wait_until(lambda: run(["pgrep", "-f", "--", f"^{ground.mark}"]).stdout, message="its sleep")
    caller.kill()
    caller.wait()
    wait_until(lambda: not run(["pgrep", "-f", "--", f"^{ground.mark}"]).stdout, message="the end of all in the sandbox")


# What an agent leaves for the farm's own git, which runs outside of its sandbox: `how` by the agent, `act` by the farm.
COMMIT = '"$TOOLKIT/scripts/agent/commit-rest.sh" -b "$BRANCH" -o main -t main -m "evil" "$W"'
RESCUE = 'timeout 2 "$TOOLKIT/scripts/rescue.sh" save -C "$W" "$W"; [ $? -ne 124 ] || touch "$HOME/waits-$N"'
START = '"$TOOLKIT/scripts/agent/start-task.sh" -a "$AGENT" -t t-0002 -b main -s evil "$W"'
RUNS = 'printf "#!/bin/sh\\ntouch $HOME/ran-$N\\ncat\\n" >evil.sh; chmod +x evil.sh; Q="\'$W/evil.sh\'"; '
RAN, WAITS = '[ -e "$HOME/ran-$N" ]', '[ -e "$HOME/waits-$N" ]'


@dataclass(frozen=True)
class Left:
    what: str
    how: str
    act: str
    seen: str
    alone: bool = False  # the farm withstands it without a sandbox, too


LEFT = [
    Left(
        "its HEAD leads to main",
        'echo x >new; echo "ref: refs/heads/target-$N" >"$OWN/HEAD"',
        COMMIT,
        '[ "$(git -C "$REPO" log -1 --format=%s "target-$N")" = evil ]',
        alone=True,
    ),
    Left(
        "its branch is a symbolic ref to main",
        'echo x >new; echo "ref: refs/heads/target-$N" >"$GIT/refs/heads/$BRANCH"',
        COMMIT,
        '[ "$(git -C "$REPO" log -1 --format=%s "target-$N")" = evil ]',
        alone=True,
    ),
    Left(
        "its HEAD is a branch of its own that is a symbolic ref",
        'echo x >new; echo "ref: refs/heads/target-$N" >"$GIT/refs/heads/$BRANCH-2"; echo "ref: refs/heads/$BRANCH-2" >"$OWN/HEAD"',
        COMMIT.replace("$BRANCH", "$BRANCH-2"),
        '[ "$(git -C "$REPO" log -1 --format=%s "target-$N")" = evil ]',
        alone=True,
    ),
    Left(
        "the branch of its next task is a symbolic ref",
        'echo "ref: refs/heads/target-$N" >"$GIT/refs/heads/farm/$AGENT/t-0002"',
        START,
        '[ "$(git -C "$REPO" rev-parse "target-$N")" = "$EVIL" ]',
    ),
    Left(
        "its reflog is a link out of the tree",
        'echo x >new; rm "$OWN/logs/HEAD"; ln -s "$HOME/profile-$N" "$OWN/logs/HEAD"',
        COMMIT,
        'grep -q evil "$HOME/profile-$N"',
    ),
    Left("a filter of the user's that is a program of its tree", RUNS + "echo '* filter=user' >.gitattributes", COMMIT, RAN),
    Left("the same, for work that is rescued", RUNS + "echo '* filter=user' >.gitattributes", RESCUE, RAN),
    Left(
        "its config.worktree has a file system monitor",
        RUNS + 'echo "[core]fsmonitor=./evil.sh" >"$OWN/config.worktree"',
        RESCUE,
        RAN,
    ),
    Left(
        "its .git leads to another repo, whose config has one",
        RUNS + 'git init -q x && git -C x config core.fsmonitor "$Q" && rm .git && echo "gitdir: $W/x/.git" >.git',
        RESCUE,
        RAN,
    ),
    Left(
        "its commondir leads to another repo",
        RUNS + 'git init -q x && git -C x config core.fsmonitor "$Q" && echo "$W/x/.git" >"$OWN/commondir"',
        RESCUE,
        RAN,
    ),
    Left(
        "a submodule has a hook",
        RUNS + "git init -q sub && git -C sub commit -q --allow-empty -m a && A=$(git -C sub rev-parse HEAD) && "
        'git -C sub commit -q --allow-empty -m b && printf "[submodule \\"sub\\"]\\npath=sub\\nurl=./sub\\n" >.gitmodules && '
        'mkdir "$OWN/modules" && cp evil.sh "$OWN/modules" && Q="\'$OWN/modules/evil.sh\'" && '
        'git update-index --add --cacheinfo "160000,$(git -C sub rev-parse HEAD),sub" && git add .gitmodules && '
        "git commit -q -m sub && "
        'git config --file sub/.git/config core.fsmonitor "$Q" && git -C sub checkout -q "$A"; '
        'rm -f "$HOME/ran-$N"; git update-ref refs/heads/$BRANCH HEAD',
        '"$TOOLKIT/scripts/agent/start-task.sh" -a "$AGENT" -t t-0003 -b main -s "$BRANCH" "$W"',
        RAN,
    ),
    Left(
        "a folder of included files is a link out of the tree",
        'rm -rf conf && ln -s "$HOME/conf-$N" conf',
        START,
        '[ -e "$HOME/conf-$N/local.env" ]',
        alone=True,
    ),
    Left(
        "a name of two lines, of which the second is git's config",
        'echo "ref: refs/heads/no-$N" >"$GIT/refs/heads/farm/$AGENT/x"$\'\\n\'"config"',
        START,
        '[ ! -e "$GIT/config" ] && touch "$GIT/config"',
        alone=True,
    ),
    Left(
        "what the farm keeps in its folder of refs is a link to a file that is not there yet",
        'rm -f "$GIT/refs/heads/farm/$AGENT/.keep"; ln -s "$GIT/refs/heads/made-$N" "$GIT/refs/heads/farm/$AGENT/.keep"',
        START,
        '[ -e "$GIT/refs/heads/made-$N" ]',
        alone=True,
    ),
    Left(
        "a ref of a remote is a link out of its own",
        'mkdir -p "$GIT/refs/remotes/other-$N"; ln -sf "$HOME/profile-$N" "$GIT/refs/remotes/other-$N/main"',
        START,
        '[ -s "$HOME/profile-$N" ]',
        alone=True,
    ),
    Left("its index is a FIFO", 'rm "$OWN/index" && mkfifo "$OWN/index"', RESCUE, WAITS),
]


@pytest.mark.parametrize("uid", USERS)
def test_what_an_agent_leaves_leads_the_farms_own_git_nowhere(make_ground, uid):
    wrong = []
    for isolate in ("bwrap", "none"):
        ground = make_ground(uid, isolate)
        ground.run("bash", "-ec", MAKE_MORE, "bash", ground.repo, ground.toolkit / "scripts", str(len(LEFT)), check=True)
        for n, row in enumerate(LEFT, 4):
            done = [ground.enter(kind, isolate, ground.tree(n), script) for kind, script in (("agent", row.how), ("tree", row.act))]
            is_done = ground.run("bash", stdin=ground.variables(ground.tree(n)) + row.seen).returncode == 0
            if is_done != (isolate == "none" and not row.alone):
                wrong.append(
                    f"{isolate}: {row.what}: {is_done} {[(one.returncode, one.stdout, one.stderr[-300:]) for one in done]}"
                )
    assert not wrong, "\n".join(wrong)


MAKE_MORE = """
cd "$1"
"$2/mk-worktrees.sh" -n $(($3 + 3)) >/dev/null
git config --global filter.user.clean ./evil.sh
git config extensions.worktreeConfig true; git config submodule.sub.url ./sub; echo conf >>.git/info/exclude
printf '.env\\ncoordination/\\nconf/local.env\\n' >.gitignore; echo conf/local.env >.worktreeinclude
mkdir conf; echo x >conf/local.env
for n in $(seq 4 $(($3 + 3))); do
  name=$(printf agent-%03d "$n") tree="../a repo-farm/$(printf agent-%03d-worktree "$n")"
  git update-ref "refs/remotes/other-$n/main" HEAD; : >"$HOME/profile-$n"
  git branch "target-$n"; mkdir -p "$HOME/conf-$n" "coordination/mailbox/$name"; : >"coordination/mailbox/$name/pid"
  git -C "$tree" switch -q -c "farm/$name/t-0001"
done
"""


TAMPER = r"""
cd "$W" && echo 'fine work' >mine.txt && git add mine.txt && git commit -q -m one
name=$(git rev-parse "$TAMPERED") && file=$GIT/objects/${name:0:2}/${name:2} && chmod u+w "$file" &&
perl -MCompress::Zlib -e 'local $/; open F, "<", $ARGV[0]; my $d = uncompress(<F>); $d =~ s/$ARGV[1]/$ARGV[2]/ or die;
  open F, ">", $ARGV[0]; print F compress($d)' \
  "$file" "$FROM" "$TO"
"""


@pytest.mark.parametrize(
    ("tampered", "was", "now"),
    [("HEAD:mine.txt", "fine", "evil"), ("HEAD:", "mine", "evil"), ("HEAD", "one", "two")],
    ids=["blob", "tree", "commit"],
)
def test_objects_that_are_not_what_their_names_say_are_not_submitted(make_ground, tampered, was, now):
    ground = make_ground(os.geteuid())
    verify = ["bash", SCRIPTS / "sandbox/verify-objects.sh", "-C", ground.repo, "-b", "main", "farm/agent-001/t-0001"]
    ground.enter("agent", "bwrap", ground.tree(1), "echo a >b && git add b && git commit -q -m b")
    assert ground.run(*verify).returncode == 0
    done = ground.enter("agent", "bwrap", ground.tree(1), f"TAMPERED={tampered} FROM={was} TO={now}\n{TAMPER}")
    assert done.returncode == 0, done.stderr
    done = ground.run(*verify)
    assert (done.returncode, "objects" in done.stderr) == (5, True)
    # nor do they land, of whatever is damaged between a submit and the landing
    old, new = ground.git("rev-parse", "main"), ground.git("rev-parse", "farm/agent-001/t-0001")
    land = ["bash", SCRIPTS / "merge/land.sh", "-C", ground.repo, "-b", "main", "-o", old, "-n", new]
    assert ground.run(*land, FARM_ISOLATE="bwrap").returncode in (1, 3)  # 3: git itself has seen it
    assert ground.git("rev-parse", "main") == old
    assert tampered != "HEAD:mine.txt" or ground.run(*land, FARM_ISOLATE="none").returncode == 0, "this proves nothing"


def test_what_is_verified_is_out_of_agents_reach_from_then_on(make_ground):
    ground = make_ground(os.geteuid())
    ground.enter("agent", "bwrap", ground.tree(1), "echo fine >mine.txt && git add mine.txt && git commit -q -m b")
    branch = "farm/agent-001/t-0001"
    ground.run("bash", SCRIPTS / "sandbox/verify-objects.sh", "-C", ground.repo, "-b", "main", branch, check=True)
    names = [line.split()[0] for line in ground.git("rev-list", "--objects", branch, "^main").splitlines()]
    files = [f"{name[:2]}/{name[2:]}" for name in names]
    done = ground.enter("agent", "bwrap", ground.tree(1), f'cd "$GIT/objects" && rm -f {" ".join(files)}')
    assert done.returncode == 0 and not any((ground.repo / ".git/objects" / file).exists() for file in files), done.stderr
    assert ground.git("cat-file", "-p", f"{branch}:mine.txt") == "fine"


@pytest.mark.parametrize("cli", [cli for cli in toolkit.CLIS.values() if cli.state], ids=lambda cli: cli.name)
def test_what_a_cli_obeys_outside_of_its_sandbox_cannot_be_written_inside(make_ground, cli):
    """Its hooks, its commands and its settings are the person's, too; its sessions and its login are written."""
    ground = make_ground(os.geteuid())
    (ground.home / ".config").mkdir(exist_ok=True)
    obeyed = [name[1:] for name in cli.state if name[0] == "-"]
    script = "".join(f"echo evil >~/{name}{'x' * name.endswith('/')}; mv ~/{name} ~/{cli.state[0]}old\n" for name in obeyed)
    script += f"touch ~/{cli.state[0]}own"
    done = ground.enter("agent", "bwrap", ground.tree(1), script, FARM_CLI_STATE=":".join(cli.state))
    assert (done.returncode, (ground.home / cli.state[0] / "own").exists()) == (0, True), done.stderr
    assert all((ground.home / name).exists() for name in obeyed if "/" in name)
    assert run(["grep", "-rl", "evil", ground.home]).stdout == ""


def test_twenty_sandboxed_agents_bring_their_tasks_to_a_green_main(farm):
    """By all that an agent does: a lock, a follow-up, commits, what it leaves, a failure, submit by itself."""
    agent = """
      [ ! -e "$FARM_REPO/README.md" ] && [ "$FARM_MAILBOX" ] || exit 9
      echo "$FARM_TASK" >"$FARM_TASK.txt"
      case $FARM_ATTEMPT:$FARM_TITLE in
        1:0) farm fail "$FARM_AGENT_NAME" --fence "$FARM_FENCE" --why "not yet"; exit ;;
        1:1) farm add "a follow-up" >/dev/null && farm lock "$FARM_AGENT_NAME" schema || exit 8 ;;
        *:2) git add -A; git commit -q -m work; farm submit "$FARM_AGENT_NAME" --fence "$FARM_FENCE" ;;
        1:3) echo lost >unsaved.txt; exit 1 ;;
      esac"""
    gate = (
        '[ ! -e "$HOME/.ssh" ] && [ "$(ls ..)" = "$(printf "%s\\n" "$(basename "$PWD")" "$(basename "$PWD").tmp")" ] && ls t-*.txt'
    )
    for number in range(20):
        farm.ok("add", str(number))
    done = farm("run", "-n", "20", "--agent", agent, "--gate", gate, "--until-drained", timeout=150, env={"FARM_ISOLATE": "bwrap"})
    states = [task["state"] for task in farm.json("tasks")]
    assert (done.returncode, states) == (0, ["landed"] * 21), done.stderr
    assert "unsaved.txt" in run(["git", "-C", farm.repo, "log", "--all", "--name-only"]).stdout
    assert git(farm.repo, "fsck", "--no-dangling") == ""


def test_a_hog_of_memory_disk_or_processes_is_ended_and_the_others_work_on(farm):
    for title in ("memory", "disk", "processes", "good"):
        farm.ok("add", title)
    agent = """
      case $FARM_TITLE in
        memory) exec perl -e '$x = "x" x 400_000_000; sleep 100' ;;
        disk) head -c 70000000 /dev/zero >big; sleep 100 ;;
        processes) for i in $(seq 300); do sleep 100 & done; wait; sleep 100 ;;
      esac
      echo x >good.txt"""
    limits = {"FARM_AGENT_MEMORY_MIB": "300", "FARM_AGENT_DISK_MIB": "50", "FARM_AGENT_PROCESSES": "150", "FARM_MAX_ATTEMPTS": "1"}
    done = farm("run", "-n", "4", "--agent", agent, "--until-drained", timeout=100, env={"FARM_ISOLATE": "bwrap", **limits})
    tasks = {task["title"]: (task["state"], task["reason"]) for task in farm.json("tasks")}
    assert (done.returncode, tasks["good"][0]) == (5, "landed"), done.stderr
    for title, words in {
        "memory": "MiB of memory: 300 may be",
        "disk": "MiB of disk: 50 may be",
        "processes": "processes: 150 may be",
    }.items():
        assert tasks[title][0] == "failed" and words in tasks[title][1], tasks


def test_up_says_how_agents_run_and_gives_nobody_all_permissions_without_a_sandbox_unless_told(farm, sandbox, farm_cleanup):
    def start(**env: str):
        return farm("run", "-n", "1", "--agent", "true", "--until-drained", env=env)

    for env, words in (
        ({}, "without a sandbox (FARM_ISOLATE=none, the default with permissions=edits)"),
        ({"FARM_PERMISSIONS": "all"}, "in sandboxes of bubblewrap"),
    ):
        said = farm("up", "-n", "1", "--agent", "true", env=env).stderr
        wait_until(lambda: farm.json("status")["loop"]["alive"], message="the loop, which writes down what it was told")
        assert json.loads((farm.folder / "farm.json").read_text())["isolation"] == ("bwrap" if env else "none")
        farm.ok("down", "--now")  # which keeps work in the same way
        assert words in said
    bare = {"PATH": f"{sandbox.root}/bin"}
    (sandbox.root / "bin").mkdir()
    for folder in os.environ["PATH"].split(os.pathsep):
        for path in Path(folder).glob("*") if Path(folder).is_dir() else ():
            if path.name != "bwrap" and not (sandbox.root / "bin" / path.name).exists():
                (sandbox.root / "bin" / path.name).symlink_to(path)
    refused = start(FARM_PERMISSIONS="all", **bare)
    assert refused.returncode == 4 and "FARM_ISOLATE=none" in refused.stderr and "bwrap is not installed" in refused.stderr
    missing = start(FARM_ISOLATE="bwrap", **bare)
    assert missing.returncode == 6 and "bwrap is not installed" in missing.stderr
    assert start(FARM_PERMISSIONS="all", FARM_ISOLATE="none", **bare).returncode == 0
    assert start(FARM_ISOLATE="no-such-engine {worktree}").returncode == 6
    assert "bwrap is not installed" in farm("doctor", env=bare).stdout
    assert farm("doctor", env={"FARM_ISOLATE": "bwrap", **bare}).returncode == 6
    assert "sandbox: bubblewrap works here" in farm("doctor").stdout


def test_a_mailbox_is_read_with_limits_and_leads_nowhere(farm, sandbox):
    """Each of these would keep the farm waiting, fill its memory, or have it read or write elsewhere."""
    box, target = farm.folder / "mailbox/agent-001", sandbox.work / "target"
    box.mkdir(parents=True)
    target.write_text(json.dumps(["add", "from elsewhere"]))
    os.mkfifo(box / "1.request")
    (box / "2.request").symlink_to(target)
    with open(box / "3.request", "w") as file:
        file.truncate(1 << 30)
    (box / "4.request").mkdir()
    (box / "5.request").write_text("[" * 100_000)
    for n, words in enumerate(
        [
            ["submit", "agent-002", "--fence", "t-0001.1"],
            ["add", "x", "--rep", str(sandbox.work)],
            ["../add", "x"],
            ["status", "agent-001"],
            ["lock", "../agent-002", "x"],
            ["claim", "agent-001"],
            "add",
            7,
            [],
        ],
        6,
    ):
        (box / f"{n}.request").write_text(json.dumps(words))
    (box / "15.request").write_text(json.dumps(["add", "a task that names --repo", "--prompt", "see --repo"]))
    (box / "15.answer").mkdir()
    (box / "x;y.request").write_text(json.dumps(["add", "strange"]))
    for n in range(16, 120):
        (box / f"{n}.request").write_text("[]")
    farm("answer", "agent-001", env={"FARM_TASK": ""}, timeout=20)
    farm("answer", "agent-001", env={"FARM_TASK": ""}, timeout=20)
    codes = {n: json.loads((box / f"{n}.answer").read_text())["code"] for n in range(1, 15) if n != 4}
    assert set(codes.values()) == {4}, codes
    assert [task["title"] for task in farm.json("tasks")] == ["a task that names --repo"]
    # what the loop reads and writes there
    for name in ("turn.json", "cost.json"):
        os.mkfifo(box / name)
    (box / "ending.json").mkdir()
    (box / "bell").symlink_to(target)
    store = toolkit.Store(str(farm.repo))
    (box / f"turn.json.{os.getpid()}.tmp").symlink_to(target)
    before = target.read_text()
    assert toolkit.read_mail(store, "agent-001", "turn.json", "t-0001.1") == {}
    assert list(toolkit.read_json_lines(str(box / "cost.json"))) == []
    toolkit.end_attempt(store, "agent-001", "t-0001.1", "time limit", "over")
    toolkit.write_mail(store, "agent-001", "turn.json", {"fence": "t-0001.1"})
    assert (target.read_text(), (box / "turn.json").is_symlink()) == (before, False)


@pytest.mark.parametrize("isolate", ["bwrap", "none"])
def test_the_setup_of_a_worktree_runs_in_a_sandbox(make_ground, isolate):
    ground = make_ground(os.geteuid())
    setup = '#!/bin/sh\ncp ~/.ssh/id_ed25519 stolen\necho evil >"$FARM_REPO/a.txt"\necho evil >~/.bashrc\ntouch made\n'
    (ground.repo / ".farm/setup").write_text(setup)
    (ground.repo / ".farm/setup").chmod(0o755)
    ground.run("bash", ground.toolkit / "scripts/mk-worktrees.sh", "-C", ground.repo, "-n", "4", FARM_ISOLATE=isolate, check=True)
    done = [
        (ground.tree(4) / "made").exists(),
        (ground.tree(4) / "stolen").exists(),
        "evil" in (ground.repo / "a.txt").read_text(),
        "evil" in (ground.home / ".bashrc").read_text(),
    ]
    assert done == [True] + [isolate == "none"] * 3


def test_whoever_looks_at_trees_from_outside_runs_no_filter_but_that_of_lfs(make_ground):
    ground, ran = make_ground(os.geteuid()), "ran-by-the-filter"
    ground.git("config", "filter.user.clean", f"touch '{ground.home}/{ran}'; cat")
    ground.git("config", "filter.lfs.clean", "git-lfs clean")
    ground.enter("agent", "bwrap", ground.tree(1), "echo 'a.txt filter=user' >.gitattributes; echo y >a.txt")
    without = ["bash", ground.toolkit / "scripts/sandbox/tame-filters.sh", "off", ground.repo]
    look = ["bash", ground.toolkit / "scripts/merge/look.sh", "work", "-C", ground.repo, "-b", "main"]
    row = f"agent-001\tfarm/agent-001/t-0001\t{ground.tree(1)}\n"
    assert ground.run(*without, *look, stdin=row, check=True).stdout
    assert not (ground.home / ran).exists()
    assert ground.run(*without, "git", "-C", ground.repo, "config", "filter.lfs.clean").stdout == "git-lfs clean\n"
    ground.run(*look, stdin=row, check=True)
    assert (ground.home / ran).exists(), "this proves nothing"
