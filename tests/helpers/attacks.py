"""The rows of the table of attacks, what is allowed beside them, and the ground on which both are tried."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from paths import ROOT, SCRIPTS
from sandbox import run

SECRETS = {
    ".ssh/id_ed25519": "KEY",
    ".aws/credentials": "KEY",
    ".gnupg/private-keys-v1.d/k.key": "KEY",
    ".config/gh/hosts.yml": "KEY",
    ".netrc": "KEY",
    ".kube/config": "KEY",
    ".docker/config.json": "KEY",
    ".git-credentials": "KEY",
    ".npmrc": "KEY",
    ".bash_history": "KEY",
    ".claude/.credentials.json": "KEY",
    ".cargo/credentials.toml": "KEY",
    ".password-store/x.gpg": "KEY",
    ".mozilla/cookies": "KEY",
}


@dataclass(frozen=True)
class Row:
    """One attack. `how` is bash; it has succeeded when `seen`, bash outside afterwards, ends with 0, or else `how` itself."""

    what: str
    how: str
    seen: str = ""
    gate: bool = True  # whether a test of the agent's branch can try it in the gate, too


def wants_to_write(what: str, path: str, **more) -> Row:
    return Row(f"write {what}", f'echo evil >>"{path}"', f'grep -qs evil "{path}"', **more)


def fills(folders: str) -> str:
    return (
        f'ok=1; for d in {folders}; do f=$d/$MARK.fill; head -c 8000000 /dev/zero >"$f" && '
        '[ "$(stat -c %s "$f")" = 8000000 ] && ok=0; rm -f "$f"; done; exit $ok'
    )


CONNECT = """perl -MSocket -e 'socket(my $s, %s, SOCK_STREAM, 0) or exit 2; connect($s, %s) or exit 1' -- """
BY_FILE, BY_NAME = CONNECT % ("AF_UNIX", "pack_sockaddr_un($ARGV[0])"), CONNECT % ("AF_UNIX", 'pack_sockaddr_un("\\0$ARGV[0]")')
BY_PORT = CONNECT % ("AF_INET", 'sockaddr_in($ARGV[0], inet_aton("127.0.0.1"))')
TYPE = r"""perl -MPOSIX -e 'setsid(); open(my $m, "+<", "/dev/ptmx") or exit 2; my ($zero, $n) = (pack("i", 0), pack("i", 0));
  ioctl($m, 0x40045431, $zero); ioctl($m, 0x80045430, $n); open(my $t, "+<", "/dev/pts/" . unpack("i", $n)) or exit 2;
  my $c = "x"; $SIG{HUP} = "IGNORE"; POSIX::_exit(ioctl($t, 0x5412, $c) ? 0 : 1)'"""
TIOCSTI_WORKS = (
    Path("/proc/sys/dev/tty/legacy_tiocsti").exists() and Path("/proc/sys/dev/tty/legacy_tiocsti").read_text().strip() == "1"
)

READS = [
    *[Row(f"read ~/{name}", f'grep -q KEY ~/"{name}"') for name in SECRETS],
    Row("read a sibling's file", 'grep -q HALF "$W2/half.txt"'),
    Row("read a sibling's file by way of /proc", "grep -qs HALF /proc/[0-9]*/cwd/half.txt"),
    Row("read a sibling's file by way of another's root", 'grep -qs HALF /proc/[0-9]*/root"$W2/half.txt"'),
    Row("read the .env of the user's checkout", 'grep -q TOKEN "$REPO/.env"'),
    Row("read the tree of the user's checkout", 'ls "$REPO/a.txt"'),
    Row("read another's mailbox", 'ls "$REPO/coordination/mailbox/agent-002/turn.json"'),
    Row("read another's log", 'ls "$REPO/coordination/logs/agent-002.log"'),
    Row("read the queue", 'grep -q t-0 "$REPO/coordination/task_queue/pending.json"'),
    Row("read another's entry", 'ls "$GIT/worktrees/agent-002-worktree/HEAD"'),
    Row("read the farm's notes", 'ls "$GIT/farm/environment.json"'),
    Row("read another process's environment", 'grep -qa VICTIM_TOKEN "/proc/$VICTIM/environ"'),
    Row("read files that others have in /tmp", 'ls "$ROOT/loot"'),
    Row("have a token of the user's environment", '[ -n "${SECRET_TOKEN-}" ]'),
]
WRITES = [
    wants_to_write("the user's checkout", "$REPO/a.txt"),
    wants_to_write("a sibling's file", "$W2/half.txt"),
    wants_to_write("pending.json", "$REPO/coordination/task_queue/pending.json"),
    wants_to_write("ready-to-merge.json", "$REPO/coordination/merge_queue/ready-to-merge.json"),
    wants_to_write("a verdict", "$REPO/coordination/results/tree-1.json"),
    wants_to_write("another's mailbox", "$REPO/coordination/mailbox/agent-002/1.request"),
    wants_to_write("the pid that is ended for its sake", "$MB/pid"),
    wants_to_write("another's lock", "$REPO/coordination/agent_locks/agent-002.lock"),
    wants_to_write("another's log", "$REPO/coordination/logs/agent-002.log"),
    wants_to_write("the farm's own settings", "$REPO/farm.env"),
    wants_to_write("the setup that runs in every worktree", "$REPO/.farm/setup"),
    wants_to_write("the toolkit", "$TOOLKIT/scripts/rescue.sh"),
    wants_to_write("a hook", "$GIT/hooks/post-merge"),
    wants_to_write("git's attributes", "$GIT/info/attributes"),
    wants_to_write("alternates", "$GIT/objects/info/alternates"),
    wants_to_write("a pack of objects", "$GIT/objects/pack/pack-1.idx"),
    wants_to_write("a file of the user's that shells run", "$HOME/.bashrc"),
    wants_to_write("the user's git settings", "$HOME/.gitconfig"),
    wants_to_write("a key that opens the account", "$HOME/.ssh/authorized_keys"),
    wants_to_write("a cache that the user's programs trust", "$HOME/.cache/pip/wheel"),
    wants_to_write("a file of others in /tmp", "$ROOT/loot"),
    Row("move main", 'git -C "$REPO" update-ref refs/heads/main "$EVIL"', 'git -C "$REPO" rev-parse main | grep -qx "$EVIL"'),
    Row(
        "move main by its file", 'echo "$EVIL" >"$GIT/refs/heads/victim-1"', 'git -C "$REPO" rev-parse victim-1 | grep -qx "$EVIL"'
    ),
    Row("move main by a push", 'git push -q "$REPO" "$EVIL:refs/heads/pushed"', 'git -C "$REPO" rev-parse -q --verify pushed'),
    Row(
        "move another agent's branch",
        'git -C "$GIT" update-ref refs/heads/farm/agent-002/work "$EVIL"',
        'git -C "$REPO" rev-parse farm/agent-002/work | grep -qx "$EVIL"',
    ),
    Row(
        "delete another agent's branch",
        'git -C "$GIT" update-ref -d refs/heads/farm/agent-003/work',
        '! git -C "$REPO" rev-parse -q --verify farm/agent-003/work',
    ),
    Row(
        "move the HEAD of the user's checkout",
        'echo "ref: refs/heads/evil" >"$GIT/HEAD.new" && cat "$GIT/HEAD.new" >"$GIT/HEAD"',
        'grep -q evil "$GIT/HEAD"',
    ),
    Row(
        "make a pin of finished work",
        'git -C "$GIT" update-ref refs/farm/ready/t-0009 "$EVIL"',
        'git -C "$REPO" rev-parse -q --verify refs/farm/ready/t-0009',
    ),
    Row(
        "drop rescued work",
        'git -C "$GIT" update-ref -d refs/farm/rescue/agent-002/1',
        '! git -C "$REPO" rev-parse -q --verify refs/farm/rescue/agent-002/1',
    ),
    Row("pack the refs", 'git -C "$GIT" pack-refs --all', 'grep -qs refs/heads/main "$GIT/packed-refs"'),
    Row(
        "make a branch with the name of an option",
        'git -C "$GIT" update-ref "refs/heads/--upload-pack=x" "$EVIL"',
        'git -C "$REPO" show-ref -q --verify "refs/heads/--upload-pack=x"',
    ),
    Row("make a worktree of its own", 'git -C "$GIT" worktree add -q --detach "$ROOT/extra" main', '[ -e "$ROOT/extra/.git" ]'),
]
REACHES = [
    Row("fill memory by the folders that are hidden, or are its own", fills('"$HOME/.ssh" /dev /run /root')),
    Row("fill memory by git's folders that are hidden", fills('"$GIT/worktrees" "$GIT/farm"'), gate=False),
    Row("kill another's process", 'kill "$VICTIM2"', 'grep -q "State:.Z" "/proc/$VICTIM2/status"'),
    Row("signal the loop", 'kill -0 "$VICTIM"'),
    Row("see who else is there", '[ -e "/proc/$VICTIM/cmdline" ]'),
    Row("trace another's process", 'cat "/proc/$VICTIM/maps"'),
    Row("reach the farm's tmux", 'tmux -S "$TMUX_SOCKET" run-shell "touch $ROOT/escaped"', '[ -e "$ROOT/escaped" ]'),
    Row("type into another's pane", 'tmux -S "$TMUX_SOCKET" send-keys -t victim "touch $ROOT/typed" Enter', '[ -e "$ROOT/typed" ]'),
    Row("reach an agent of ssh or gpg, or docker, by its socket", BY_FILE + '"$ROOT/run/agent.sock"'),
    Row("reach an abstract socket, as dbus and X11 have", BY_NAME + '"$ABSTRACT"'),
    Row("have SSH_AUTH_SOCK, DBUS, DISPLAY or TMUX", '[ -n "${SSH_AUTH_SOCK-}${DBUS_SESSION_BUS_ADDRESS-}${DISPLAY-}${TMUX-}" ]'),
    Row("leave a daemon behind", 'setsid bash -c "exec -a $MARK sleep 600" >/dev/null 2>&1 &', 'pgrep -f -- "$MARK"'),
    Row("share memory with others", 'echo evil >"/dev/shm/$MARK"', '[ -e "/dev/shm/$MARK" ]'),
    Row(
        "ring another's bell",
        'timeout 1 bash -c "echo x >\\"$REPO/coordination/mailbox/agent-002/bell\\""',
        'exec 7<>"$REPO/coordination/mailbox/agent-002/bell"; read -r -t 1 <&7 && [ "$REPLY" = x ]',
    ),
]
DAMAGES = [  # after these, git would not work any more
    wants_to_write("the index of the user's checkout", "$GIT/index"),
    wants_to_write("git's config", "$GIT/config"),
    wants_to_write("packed refs", "$GIT/packed-refs"),
    wants_to_write("another's entry", "$GIT/worktrees/agent-002-worktree/commondir"),
    wants_to_write("its config.worktree", "$OWN/config.worktree", gate=False),
    wants_to_write("its commondir", "$OWN/commondir", gate=False),
    Row(
        "swap .git for a link to another repo",
        'mkdir -p "$W/x" && rm "$W/.git" && ln -s "$ROOT/evil.git" "$W/.git"',
        '[ -L "$W/.git" ]',
        gate=False,
    ),
]
ROWS = [*READS, *WRITES, *REACHES]
KEYS = {"x86_64": 250, "aarch64": 219}.get(platform.machine(), 0)
ASK_FOR_KEYS = f"perl -e 'exit(syscall({KEYS}, 0, -3, 1) < 0)'"  # the session's keyring, which is the user's
if KEYS and run(["bash", "-c", ASK_FOR_KEYS]).returncode == 0:
    ROWS.append(Row("reach the keys of the user's session", ASK_FOR_KEYS))
if TIOCSTI_WORKS:
    ROWS.append(Row("type into its terminal, for the shell behind it", TYPE))

ALLOWED = {
    "commit": "echo 1 >mine.txt && git add mine.txt && git commit -q -m one",
    "commit a second time, amend": "echo 2 >>mine.txt && git commit -q -a -m two && git commit -q --amend -m more",
    "see all history": "git log --all --oneline | grep -q 'commit 1'",
    "see what the target is": "git rev-parse main && git diff --quiet main -- a.txt",
    "rebase on the target": "git rebase -q main",
    "fetch the target": "git fetch -q . main && git fetch -q origin main && git rev-parse -q --verify origin/main",
    "make a branch of its own": 'git switch -q -c farm/agent-001/side && git switch -q "$BRANCH"',
    "stash": "echo 3 >>mine.txt && git stash -q && git stash list | grep -q WIP && ! git diff --quiet stash@{0}",
    "tag": "git tag v1 && git tag | grep -qx v1",
    "write to /tmp": 'echo x >/tmp/x && echo x >/var/tmp/y && f=$(mktemp) && [ -e "$f" ]',
    "have its own cache": 'echo x >"$HOME/.cache/own" && [ ! -e "$HOME/.cache/pip/wheel" ]',
    "use the network of the loopback": BY_PORT + '"$PORT"',
    "start processes and end them": "sleep 60 & kill $! && ! wait $!",
    "take signals of its terminal": "bash -c 'trap \"exit 7\" INT; kill -INT $$; exit 0'; [ $? -eq 7 ]",
    "read its prompt": 'grep -q "one" "$PROMPT"',
    "ask by its mailbox": 'echo "[]" >"$MB/7.request" && [ -p "$MB/bell" ]',
}


@dataclass
class Ground:
    """A repo with worktrees of three agents, a farm's files, secrets, sockets and victims, all of them of the user `uid`."""

    root: Path
    uid: int
    listeners: list[socket.socket] = field(default_factory=list)
    victims: list[subprocess.Popen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.repo, self.home, self.trees = self.root / "a repo", self.root / "home", self.root / "a repo-farm"
        self.toolkit, self.socket = self.root / "toolkit", self.root / "t"
        self.mark = f"mark-{os.getpid()}-{self.uid}-{self.root.name}"
        self.env = {
            "HOME": str(self.home),
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "LC_ALL": "C.UTF-8",
            "TERM": "xterm",
            "TEST_TOKEN": os.environ["TEST_TOKEN"],
            "SECRET_TOKEN": "x",
            "SSH_AUTH_SOCK": str(self.root / "run/agent.sock"),
            "DISPLAY": ":0",
            "FARM_REPO": str(self.repo),
            "FARM_HOME": str(self.toolkit),
            "TMPDIR": str(self.root / "tmp"),
            "FARM_PROMPT_FILE": str(self.repo / "coordination/prompts/p.md"),
        }

    def run(self, *argv: object, stdin: str = "", check: bool = False, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(word) for word in argv],
            input=stdin,
            text=True,
            capture_output=True,
            timeout=40,
            cwd=self.root,
            env={**self.env, **env},
            **self.identity(),
        )
        assert not check or done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done

    def identity(self) -> dict:
        return {"user": self.uid, "group": self.uid, "extra_groups": []} if self.uid != os.geteuid() else {}

    def build(self) -> Ground:
        files = {
            **{f"home/{name}": text for name, text in SECRETS.items()},
            "home/.bashrc": "",
            "home/.cache/pip/x": "",
            "loot": "x",
            "home/.gitconfig": "[user]\nname = T\nemail = t@example.org\n[init]\ndefaultBranch = main\n",
            "tmp/x": "",
            "run/x": "",
        }
        for name, text in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        shutil.copytree(SCRIPTS, self.toolkit / "scripts")
        shutil.copy2(ROOT / "farm.py", self.toolkit)
        if self.identity():
            os.chmod(self.root, 0o755)
            for folder, _, names in os.walk(self.root):
                for path in (folder, *(os.path.join(folder, name) for name in names)):
                    os.chown(path, self.uid, self.uid, follow_symlinks=False)
        self.run("bash", "-ec", MAKE, "bash", self.repo, self.toolkit / "scripts", check=True)
        self.evil = self.git("rev-parse", "evil")
        self.listen()
        self.run("tmux", "-S", self.socket, "-f", "/dev/null", "new-session", "-d", "-s", "victim", "sh", check=True)
        for _ in range(2):
            self.victims.append(
                subprocess.Popen(["sleep", "600"], cwd=self.tree(2), env={**self.env, "VICTIM_TOKEN": "x"}, **self.identity())
            )
        return self

    def listen(self) -> None:
        """A socket file, an abstract one, and a port of the loopback."""
        for family, address in (
            (socket.AF_UNIX, str(self.root / "run/agent.sock")),
            (socket.AF_UNIX, f"\0{self.mark}"),
            (socket.AF_INET, ("127.0.0.1", 0)),
        ):
            self.listeners.append(socket.socket(family))
            self.listeners[-1].bind(address)
            self.listeners[-1].listen(8)
        os.chmod(self.root / "run/agent.sock", 0o777)

    def git(self, *words: str) -> str:
        return self.run("git", "-C", self.repo, *words, check=True).stdout.strip()

    def tree(self, number: int) -> Path:
        return self.trees / f"agent-{number:03d}-worktree"

    def variables(self, tree: Path) -> str:
        common = self.repo / ".git"
        values = {
            "REPO": self.repo,
            "GIT": common,
            "W": tree,
            "W2": self.tree(2),
            "ROOT": self.root,
            "TOOLKIT": self.toolkit,
            "TMUX_SOCKET": self.socket,
            "VICTIM": self.victims[0].pid,
            "VICTIM2": self.victims[1].pid,
            "ABSTRACT": self.mark,
            "MARK": self.mark,
            "AGENT": tree.name.removesuffix("-worktree"),
            "BRANCH": f"farm/{tree.name.removesuffix('-worktree')}/t-0001",
            "N": tree.name[6:9].lstrip("0"),
            "OWN": common / "worktrees" / tree.name,
            "MB": self.repo / "coordination/mailbox/agent-001",
            "PORT": self.listeners[2].getsockname()[1],
            "PROMPT": self.env["FARM_PROMPT_FILE"],
            "EVIL": self.evil,
        }
        return "".join(f"export {name}='{value}'\n" for name, value in values.items())

    def enter(self, kind: str, isolate: str, tree: Path, script: str, **env: str) -> subprocess.CompletedProcess[str]:
        """`script` in a sandbox of this kind, or without one, from within `tree`."""
        script = f"cd '{tree}' || exit 9\n" + self.variables(tree) + script
        argv = [
            "bash",
            "-c",
            'cd "$1" && shift && exec "$@"',
            "bash",
            tree,
            "bash",
            self.toolkit / "scripts/sandbox/confine.sh",
            kind,
            self.repo,
            tree,
            "bash",
        ]
        return self.run(*argv, stdin=script, FARM_ISOLATE=isolate, FARM_AGENT_NAME="agent-001", **env)

    def attack(self, kind: str, isolate: str, tree: Path, rows: list[Row]) -> list[str]:
        """The attacks that have succeeded."""
        bell = os.open(self.repo / "coordination/mailbox/agent-002/bell", os.O_RDWR)
        script = "".join(f"( {row.how} ) >/dev/null 2>&1 </dev/null; echo {n} $?\n" for n, row in enumerate(rows))
        done = self.enter(kind, isolate, tree, script)
        codes = dict(line.split() for line in done.stdout.splitlines() if line.count(" ") == 1)
        assert len(codes) == len(rows), f"not all were tried: {done.stdout[-300:]}{done.stderr[-2000:]}"
        looks = "".join(f"( {row.seen} ) >/dev/null 2>&1; echo {n} $?\n" for n, row in enumerate(rows) if row.seen)
        seen = self.run("bash", stdin=self.variables(tree) + looks)
        os.close(bell)
        codes.update(line.split() for line in seen.stdout.splitlines())
        return [row.what for n, row in enumerate(rows) if codes[str(n)] == "0"]

    def close(self) -> None:
        run(["tmux", "-S", self.socket, "kill-server"])
        for victim in self.victims:
            victim.kill()
            victim.wait()
        for listener in self.listeners:
            listener.close()
        for pid in run(["pgrep", "-f", "--", self.mark]).stdout.split():
            os.kill(int(pid), 9)
        Path("/dev/shm", self.mark).unlink(missing_ok=True)


MAKE = """
git init -q -b main "$1" && cd "$1"
printf '.env\\ncoordination/\\n' >.gitignore; echo a >a.txt; git add -A; git commit -q -m 'commit 1'
git remote add origin "$1"; git branch victim-1
git update-ref refs/heads/evil "$(git commit-tree -m evil 'HEAD^{tree}')"
echo TOKEN >.env
mkdir -p coordination/{task_queue,merge_queue,results,logs,agent_locks,prompts} coordination/mailbox/agent-00{1,2}
mkdir -p .git/farm .git/info .farm
for f in task_queue/pending.json merge_queue/ready-to-merge.json results/tree-1.json logs/agent-002.log agent_locks/agent-002.lock \
  mailbox/agent-002/turn.json; do echo '{"t-0001": 1}' >coordination/$f; done
echo one >coordination/prompts/p.md; mkfifo coordination/mailbox/agent-00{1,2}/bell; touch coordination/mailbox/agent-001/pid
echo '#!/bin/sh' >.farm/setup; echo {} >.git/farm/environment.json; touch .git/packed-refs
"$2/mk-worktrees.sh" -n 3 >/dev/null
git init -q --bare ../evil.git
git update-ref refs/farm/rescue/agent-002/1 HEAD
echo HALF >"../a repo-farm/agent-002-worktree/half.txt"
git -C "../a repo-farm/agent-001-worktree" switch -q -c farm/agent-001/t-0001
"$2/merge/gate-slot.sh" prepare -C "$1" "../a repo-farm/gate-1" main >/dev/null
"""
