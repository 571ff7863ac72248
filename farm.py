#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["psutil>=5.9", "portalocker>=2.7", "tabulate>=0.9"]
# ///
"""farm.py - many coding agents on one git repo, and a main branch that is never red.

    add -> pending --claim--> claimed --submit--> ready --gate--> landed
              ^                 | fail, agent died     | conflict, gate red
              +-----------------+----------------------+   (attempts + 1, reason kept; then `failed`)

Files, all below coordination/ in the repo's main worktree, plain JSON, one record a line:

    agent_locks/agent-001.lock          what one agent holds: task, named locks, owner, fence
    task_queue/pending.json             tasks that nobody holds
    merge_queue/ready-to-merge.json     submitted work, and what became of it
    events.jsonl                        history, append-only
    .lock                               the one mutex (flock)

Invariants:
  1. A task has one or more copies; the one with the highest `rev` is the task (on a tie: done > ready > claimed > pending).
     A move makes the destination durable first and removes the source last, so a kill at any point leaves a state that the
     next transaction heals. There is no journal: the destination is the intent.
  2. The mutex guards milliseconds: no git, tmux, agent or gate runs inside a transaction.
  3. The target branch moves by compare-and-swap only, to a commit whose exact tree passed the gate.
  4. A live owner's lock is never taken; a dead one's is taken by whoever comes first.

Exit codes: 0 ok, 1 failed, 2 usage, 3 nothing to do or not found, 4 refused, 5 rejected, 6 a tool or package is missing,
7 damaged state file, 130/143 signals.
"""
from __future__ import annotations

import collections
import errno
import fcntl
import os
import sys
import time

try:
    import _json
except ImportError:  # not CPython
    _json = None

SCHEMA = 1
TOOLKIT = os.path.dirname(os.path.abspath(__file__))
SCRIPTS = os.path.join(TOOLKIT, "scripts")


class LazyModule:
    """A module that is imported when something of it is first used: json and re alone take a fifth of an agent's verb."""

    def __init__(self, name: str):
        self.module_name = name

    def __getattr__(self, attribute: str):
        value = self.__dict__[attribute] = getattr(__import__(self.module_name), attribute)
        return value


functools, heapq, json, math, re = map(LazyModule, ("functools", "heapq", "json", "math", "re"))

# ---------------------------------------------------------------------------------------------- errors


class FarmError(Exception):
    """What happened, to what; `hint` is what to type next. Subclasses fix the exit code.

    FarmError 1 > UsageError 2, NotFound 3, Refused 4, Rejected 5, MissingTool 6, DamagedState 7.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.hint = hint


class UsageError(FarmError):
    exit_code = 2


class NotFound(FarmError):
    exit_code = 3


class Refused(FarmError):
    exit_code = 4


class Rejected(FarmError):
    exit_code = 5


class MissingTool(FarmError):
    exit_code = 6


class DamagedState(FarmError):
    exit_code = 7


class NotDurable(OSError):
    """A change is visible, but its folder could not be fsynced: a power cut may undo it."""


ERROR_OF_EXIT = {kind.exit_code: kind for kind in FarmError.__subclasses__()}

# ---------------------------------------------------------------------------------------------- settings
# One table says what can be set; flags, environment, farm.env and the last `up` are looked through in that order. The repo is
# found from files, for the same reason as everything on an agent's way is plain: its start is its cost.

Setting = collections.namedtuple("Setting", "kind default meaning")

SETTINGS = {
    "n": Setting(int, 10, "how many agents"),
    "agent": Setting(str, "", "a preset, a mix such as claude:6,codex:4, or a command (default: claude when on PATH)"),
    "permissions": Setting(str, "edits", "what a preset's agents may do unasked: ask, edits or all"),
    "prompt_template": Setting(str, "", "your own file in the place of the farm's prompt: {body} {task} {fence} ..."),
    "task_seconds": Setting(float, 0.0, "an attempt that takes longer is ended; a task's own limit goes first"),
    "task_budget": Setting(float, 0.0, "dollars: a task that has cost as much is failed; its own goes first"),
    "budget": Setting(float, 0.0, "dollars: the farm pauses when it has cost as much (default: none)"),
    "agent_home": Setting(str, "", "a folder that each agent gets a copy of as its own HOME (default: they share yours)"),
    "gate": Setting(str, "", "the test command that a tree must pass before it lands (default: none)"),
    "into": Setting(str, "", "the target branch (default: the one that the main worktree has checked out)"),
    "slots": Setting(int, 0, "gates at once (default: from cores and memory)"),
    "style": Setting(str, "merge", "how work lands: merge, squash or rebase"),
    "strict": Setting(bool, False, "gate every commit of the target's first-parent line by itself"),
    "remote": Setting(str, "", "push what lands to this remote first, with a lease"),
    "gate_timeout": Setting(float, 1800.0, "seconds until a gate and its whole process group are ended"),
    "gate_env": Setting(str, "", "names of environment variables that a verdict depends on"),
    "max_attempts": Setting(int, 3, "attempts until a task is failed"),
    "lease_seconds": Setting(float, 900.0, "until an owner on another host counts as dead without a renew"),
    "grace_seconds": Setting(float, 30.0, "how long `down` lets agents finish"),
    "sandboxed": Setting(bool, False, "agents make their moves through their mailbox, for sandboxes that may not write elsewhere"),
    "min_free_mib": Setting(int, 512, "no new agent starts and no gate runs below this much free disk or memory"),
    "notify": Setting(str, "", "a command that gets what a person should know, as JSON on stdin"),
    "worktrees": Setting(str, "", "folder of the worktrees (default: ../<repo>-farm)"),
}

Settings = collections.namedtuple("Settings", SETTINGS)


def convert_setting(name: str, text, origin: str):
    """`text` as the setting's kind. Raises UsageError that names where it came from."""
    kind = SETTINGS[name].kind
    if not isinstance(text, str):
        fits = isinstance(text, (int, float) if kind is float else kind) and isinstance(text, bool) == (kind is bool)
        if not fits or kind in (int, float) and not 0 <= text < 1e9:
            raise UsageError(f"{name} must be a {kind.__name__}, not {one_line(repr(text), 40)} (from {origin})")
        return text
    try:
        value = text.lower() in ("1", "true", "yes", "on") if kind is bool else kind(text)
        if kind in (int, float) and not 0 <= value < 1e9:
            raise ValueError
    except ValueError:
        raise UsageError(f"{name} must be a number from 0 on, not {text!r} (from {origin})") from None
    return value


def read_env_file(path: str) -> dict:
    """KEY=VALUE lines of farm.env; blank lines and # comments are passed over, quotes around a value dropped."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except FileNotFoundError:
        return {}
    pairs = {}
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        key, equals, value = line.partition("=")
        if not equals:
            raise UsageError(f"{path}, line {number}: expected KEY=VALUE, found {line[:60]!r}")
        value = value.strip()
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        pairs[key.removeprefix("export ").strip()] = value[1:-1] if quoted else value
    return pairs


def load_settings(repo: str, flags: dict | None = None, remembered: dict | None = None) -> Settings:
    """flag > FARM_* in the environment > farm.env > what the last `up` was told > default.

    With FARM_AS_TOLD, which the farm's own loop and merger have, what `up` was told comes first.
    """
    if os.environ.get("FARM_AS_TOLD"):
        flags = {**(remembered or {}), **(flags or {})}
    env_file = read_env_file(os.path.join(repo, "farm.env"))
    values = {}
    for name, setting in SETTINGS.items():
        variable = "FARM_" + name.upper()
        sources = (("the command line", (flags or {}).get(name)), ("the environment", os.environ.get(variable)),
                   ("farm.env", env_file.get(variable)), ("the last up", (remembered or {}).get(name)))
        origin, found = next(((o, v) for o, v in sources if v not in (None, "")), ("", setting.default))
        values[name] = convert_setting(name, found, origin)
    if not 1 <= values["n"] <= 999:
        raise UsageError(f"a farm has at least one agent, and at most 999, not {values['n']}", "./farm.py up -n 10")
    if values["permissions"] not in ("ask", "edits", "all"):
        raise UsageError(f"permissions is ask, edits or all, not {values['permissions']!r}")
    if values["style"] not in ("merge", "squash", "rebase"):
        raise UsageError(f"style is merge, squash or rebase, not {values['style']!r}")
    return Settings(**values)


def worktrees_folder(repo: str, settings: Settings) -> str:
    return os.path.abspath(os.path.join(repo, settings.worktrees)) if settings.worktrees else repo + "-farm"


def find_repo(start: str) -> str:
    """The main worktree of the repo that `start` is in (a linked worktree names its own through .git).

    Read from files, not by asking git, because every agent's verb comes through here.
    """
    folder = os.path.realpath(start)
    while not os.path.exists(os.path.join(folder, ".git")):
        if folder == os.path.dirname(folder):
            raise NotFound(f"{os.path.realpath(start)} is not inside a git repository",
                           "git init, or name a repo: farm.py --repo DIR VERB")
        folder = os.path.dirname(folder)
    dot_git = os.path.join(folder, ".git")
    if os.path.isdir(dot_git):
        return folder
    with open(dot_git, encoding="utf-8", errors="surrogateescape") as file:
        git_dir = os.path.join(folder, file.read().removeprefix("gitdir:").strip("\n").strip(" "))
    common = os.path.dirname(os.path.dirname(os.path.realpath(git_dir)))
    is_linked = os.path.basename(os.path.dirname(os.path.realpath(git_dir))) == "worktrees"
    return os.path.dirname(common) if is_linked and os.path.basename(common) == ".git" else folder


# ---------------------------------------------------------------------------------------------- seams
# What tests put something else in place of: the clock, and the way to git and tmux. No git and no tmux is called but through
# scripts/, so that whoever wants to know what the farm may do to a repo can read it there.


class Clock:
    """Wall and monotonic seconds; tests put their own in its place."""

    now = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)


CLOCK = Clock()


def say(text: str) -> None:
    """A line for people, on stderr."""
    print(text if text.startswith("farm: ") else f"farm: {text}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """`text` without escape sequences and control characters, newlines and tabs kept."""
    if text.isprintable():
        return text
    text = re.sub(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[PX^_][^\x1b]*\x1b\\|[ -/]*[0-~])", "", text)
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "", text)


def one_line(text: str, width: int = 0) -> str:
    """Text as one printable line, cut to `width` with an ellipsis."""
    line = " ".join(printable(text).split())
    return line if not width or len(line) <= width else line[:max(1, width - 1)] + "\u2026"


def utc(seconds: float) -> str:
    """Epoch seconds as stored text, `2026-03-01T14:02:10Z`; such texts sort as the times do."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def epoch(text: str) -> float:
    """The inverse of `utc`; 0 for text that is no time."""
    import calendar

    try:
        return float(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")))
    except (ValueError, TypeError):
        return 0.0


def escape_field(text: str) -> str:
    """A TSV field for a script: backslash, tab, newline and return as two characters."""
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


def unescape_field(text: str) -> str:
    """The inverse of `escape_field`."""
    return re.sub(r"\\(.)", lambda match: {"t": "\t", "n": "\n", "r": "\r"}.get(match[1], match[1]), text)


def shell_word(text: str) -> str:
    """`text` as one word for bash, on one line whatever it holds."""
    if text.isprintable():
        return "'" + text.replace("'", "'\\''") + "'"
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(c if c.isprintable() else "".join(f"\\x{byte:02x}" for byte in os.fsencode(c)) for c in escaped) + "'"


def read_tsv(text: str) -> list[list[str]]:
    """Lines of unescaped fields, as every script prints them."""
    return [[unescape_field(field) for field in line.split("\t")] for line in text.split("\n") if line]


ScriptResult = collections.namedtuple("ScriptResult", "code stdout stderr")


def script_error(name: str, result: ScriptResult) -> FarmError:
    """A script's exit code and its stderr (`farm: what`, `  try: command`) as the error that it is."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    said = [line.removeprefix("farm: ") for line in lines if not line.startswith("  try: ")]
    hints = [line.removeprefix("  try: ") for line in lines if line.startswith("  try: ")]
    message = "\n".join(said[-8:]) or f"{name} ended with exit code {result.code}"
    return ERROR_OF_EXIT.get(result.code, FarmError)(message, hints[-1] if hints else "")


def run_script(name: str, *args: str, stdin: str = "", timeout: float = 600.0, env: dict | None = None,
               allow: tuple = (0,), detach: bool = False) -> ScriptResult:
    """Run scripts/`name`; raises the FarmError of its exit code when that is not in `allow`.

    detach: in a session of its own, so that a signal to our process group does not reach it.
    """
    import subprocess

    path = os.path.join(SCRIPTS, name)
    try:
        done = subprocess.run(["bash", path, *args], input=os.fsencode(stdin), capture_output=True,
                              timeout=timeout, env={**os.environ, **(env or {})}, cwd=TOOLKIT, start_new_session=detach)
    except subprocess.TimeoutExpired:
        raise FarmError(f"{name} took longer than {timeout:.0f} s and was ended") from None
    except FileNotFoundError:
        raise MissingTool("bash is not installed", "apt install bash, dnf install bash or brew install bash") from None
    result = ScriptResult(done.returncode, *(out.decode("utf-8", "surrogateescape") for out in (done.stdout, done.stderr)))
    if result.code not in allow:
        raise script_error(name, result)
    return result


def spawn_script(name: str, *args: str) -> str:
    """Run a short script and return what it printed; raises its FarmError.

    For the agents' verbs: importing subprocess would cost a third of what they may take.
    """
    read_end, write_end = os.pipe()
    try:
        actions = [(os.POSIX_SPAWN_DUP2, write_end, 1), (os.POSIX_SPAWN_CLOSE, read_end)]
        pid = os.posix_spawnp("bash", ["bash", os.path.join(SCRIPTS, name), *args], os.environ, file_actions=actions)
    finally:
        os.close(write_end)
    with open(read_end, "rb") as pipe:
        output = pipe.read().decode("utf-8", "surrogateescape")
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise ERROR_OF_EXIT.get(code, FarmError)(f"{name} {' '.join(args)}: exit code {code}")
    return output


def import_package(name: str):
    """psutil, portalocker or tabulate; from the toolkit's .venv when this interpreter lacks it. Raises MissingTool.

    The shim starts Python without its site-packages; whoever needs a package pays for finding it here.
    """
    try:
        return __import__(name)
    except ImportError:
        packages = os.path.join(TOOLKIT, ".venv", "lib", "python{}.{}".format(*sys.version_info), "site-packages")
        if os.path.isdir(packages) and packages not in sys.path:
            sys.path.append(packages)
            return import_package(name)
        if sys.flags.no_site and "site" not in sys.modules:  # an interpreter with packages of its own: `uv run`, another venv
            import site

            site.main()
            return import_package(name)
        venv_python = os.path.join(TOOLKIT, ".venv", "bin", "python")
        if os.path.exists(venv_python) and not os.environ.get("FARM_REEXEC"):
            os.environ["FARM_REEXEC"] = "1"
            os.execv(venv_python, [venv_python, os.path.join(TOOLKIT, "farm.py"), *sys.argv[1:]])
    raise MissingTool(f"the Python package {name} is not installed for {sys.executable}",
                      f"make -C {TOOLKIT} setup, or: uv run farm.py ..., or: pip install {name}")


# ---------------------------------------------------------------------------------------------- records
# The shapes on disk. One record serves a task in all its states: a move changes fields and raises `rev`, it never translates.


class Record:
    """What namedtuples below share: JSON both ways, unknown keys kept in `extra`, defaults left out.

    namedtuple rather than dataclass: importing dataclasses costs an agent's verb 10 ms of its 32.
    """

    __slots__ = ()
    always = ("schema", "id", "title", "state", "agent", "rev")

    @classmethod
    def from_json(cls, data: dict):
        """Raises ValueError that names the field when a known one has another type than its default."""
        if not isinstance(data, dict):
            raise ValueError(f"a {cls.__name__} is an object, not {type(data).__name__}")
        known, extra, defaults = {}, {}, cls._field_defaults
        for key, value in data.items():
            if key not in defaults or key == "extra":
                extra[key] = value
                continue
            known[key] = value
            if type(value) is int and type(defaults[key]) is float:
                known[key] = float(value)
            elif type(value) is not type(defaults[key]):
                kind = type(defaults[key]).__name__
                raise ValueError(f"{cls.__name__}.{key} must be {kind}, not {dump_line(value)[:60]}")
            if value.__class__ is list and not all(isinstance(item, str) for item in value):
                raise ValueError(f"{cls.__name__}.{key} must be a list of text")
        return cls(**known, extra=extra)

    def to_json(self) -> dict:
        full = self._asdict()
        extra = full.pop("extra")
        kept = {key: value for key, value in full.items() if value != self._field_defaults[key] or key in self.always}
        return {**kept, **extra}


TASK_DEFAULTS = {
    "id": "", "title": "", "prompt": "", "state": "pending", "priority": 0, "after": [], "paths": [], "max_attempts": 0,
    "attempts": 0, "rev": 0, "seq": 0, "queue_seq": 0, "not_before": "", "reason": "", "agent": "", "fence": "", "ended_by": "",
    "start": "", "branch": "", "commit": "", "rescue": "", "submitted_at": "", "landed_commit": "", "landed_at": "",
    "added_at": "", "source": "", "conversation": {}, "time_limit_seconds": 0.0, "budget_usd": 0.0, "extra": {},
}


class Task(Record, collections.namedtuple("Task", TASK_DEFAULTS, defaults=TASK_DEFAULTS.values())):
    """A unit of work and all that is known of it, wherever it lies.

    attempts: ended ones. start: commit or branch that the next attempt begins from. fence, ended_by: the last claim's token and
    the verb that ended it. seq, queue_seq: first come, first served, in either queue. source: where `add -f` read it, so that it
    is not added twice. conversation: {"agent", "id", "until"}: the CLI's session that an interrupted attempt goes on in; until then
    (UTC) the task is kept for that agent.
    """

    __slots__ = ()


OWNER_DEFAULTS = {"pid": 0, "start": "", "boot": "", "host": "", "namespace": "", "session": "", "extra": {}}


class Owner(Record, collections.namedtuple("Owner", OWNER_DEFAULTS, defaults=OWNER_DEFAULTS.values())):
    """The long-lived process behind a lock. start: field 22 of /proc/PID/stat, elsewhere what ps says."""

    __slots__ = ()


CLAIM_DEFAULTS = {"schema": SCHEMA, "agent": "", "fence": "", "claimed_at": "", "renewals": 0, "owner": {}, "locks": [],
                  "task": {}, "extra": {}}


class Claim(Record, collections.namedtuple("Claim", CLAIM_DEFAULTS, defaults=CLAIM_DEFAULTS.values())):
    """One lock file: at most one task (a JSON object, empty for none), and named locks."""

    __slots__ = ()

    def get_task(self) -> Task | None:
        return Task.from_json(self.task) if self.task else None

    def names(self) -> list[str]:
        """Every name that this claim excludes others from: its named locks and its task's paths."""
        return [*self.locks, *("path:" + glob for glob in self.task.get("paths", []))]


def is_texts(value) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


NAME_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")


def is_name(text: str) -> bool:
    """Whether `text` can be a file name and a part of a git ref."""
    is_plain = 0 < len(text) <= 100 and NAME_CHARACTERS.issuperset(text)
    return is_plain and text[0] not in "._-" and ".." not in text and not text.endswith((".", ".lock"))


def checked_name(text: str, what: str) -> str:
    """`text`, when it is a name. Raises UsageError."""
    if not is_name(text):
        raise UsageError(f"{what} {text!r}: use letters, digits, '.', '_' and '-' only")
    return text


# ---------------------------------------------------------------------------------------------- processes
# Who lives. A pid alone says nothing after a reboot or a wrap-around, so an owner is pid, start time, boot and host together.


MACHINE: dict[str, str] = {}  # what stays as it is while a process lives: a claim asks for it once a lock file


def read_bytes(path: str) -> bytes:
    """A file's content by the fewest system calls: a claim among a hundred reads a hundred lock files."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(descriptor, 1 << 16):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(descriptor)


def boot_id() -> str:
    """Changes at each boot; FARM_BOOT_ID stands in for it where a test models a reboot."""
    if "boot" not in MACHINE:
        MACHINE["boot"] = read_boot_id()
    return os.environ.get("FARM_BOOT_ID") or MACHINE["boot"]


def read_boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return os.popen("sysctl -n kern.bootsessionuuid 2>/dev/null").read().strip()


def pid_namespace() -> str:
    if "namespace" not in MACHINE:
        try:
            MACHINE["namespace"] = os.readlink("/proc/self/ns/pid")
        except OSError:
            MACHINE["namespace"] = ""
    return MACHINE["namespace"]


def start_of(pid: int) -> str:
    """The process's start, as a text that no clock change moves; empty when it is gone or a zombie."""
    try:
        fields = read_bytes(f"/proc/{pid}/stat").rpartition(b")")[2].split()
        return "" if fields[0] in b"ZX" else fields[19].decode("ascii")
    except (OSError, IndexError):
        if os.path.exists("/proc/self/stat"):
            return ""
        line = os.popen(f"ps -o stat= -o lstart= -p {int(pid)} 2>/dev/null").read().split()
        return "" if not line or line[0].startswith("Z") else " ".join(line[1:])


def identify(pid: int) -> Owner:
    """The Owner that `pid` is. Raises UsageError when no such process lives."""
    start = start_of(pid)
    if not start:
        raise UsageError(f"no process {pid} to own the lock", "name one that lives as long as the agent: --owner-pid PID")
    return Owner(pid, start, boot_id(), os.uname().nodename, pid_namespace(), os.environ.get("FARM_SESSION", ""))


def caller(owner_pid: int | None = None) -> Owner:
    """The owner of what this command acquires: --owner-pid, else the session leader (in a pane: the pane's own process)."""
    if owner_pid is not None:
        return identify(owner_pid)
    leader = os.getsid(0)
    if leader in (0, os.getpid()):
        raise UsageError("this command leads its own session, so nothing would be left to own the lock",
                         "name the process that lives as long as the agent: --owner-pid PID")
    return identify(leader)


def find_liveness(owner: Owner) -> bool | None:
    """True alive, False dead, None when it cannot be seen from here (another host or pid namespace)."""
    if owner.host != os.uname().nodename:
        return None
    if owner.boot != boot_id():
        return False
    if owner.namespace != pid_namespace():
        return None
    return start_of(owner.pid) == owner.start != ""


def ring(path: str, word: bytes = b"claim\n") -> None:
    """Wake whoever waits at a bell, a FIFO; nobody listening is fine."""
    try:
        bell = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return
    try:
        os.write(bell, word)
    except BlockingIOError:
        pass
    finally:
        os.close(bell)

# ---------------------------------------------------------------------------------------------- store
# The heart: what is acknowledged is on disk, what was cut short is healed by whoever comes next. The guard of each step is
# named where it stands; tests leave them out one by one and must see work lost.

PENDING_FILE = os.path.join("task_queue", "pending.json")
READY_FILE = os.path.join("merge_queue", "ready-to-merge.json")
LOCK_FOLDER = "agent_locks"
AGENTS_FILE = "agents.json"
FARM_FILE = "farm.json"
CLI_SETTINGS_FILE = "cli-settings.json"
# What a list may hold: a task whose state does not fit its place was edited by hand, and guessing would move work.
STATES_OF = {"pending": ("pending", "failed", "canceled"), "ready": ("ready",), "landed": ("landed",)}
FOLDERS = ("task_queue", "merge_queue", LOCK_FOLDER, "results", "returns", "prompts", "logs", "mailbox")


class Disk:
    """The file system calls of a move, one method each: the seam where tests cut the power."""

    def write_temp(self, path: str, data: bytes) -> None:
        """Write and fsync a new file at `path`.

        Only the mutex's holder writes, so a temp file that is there was left by a killed one. It is unlinked, never truncated:
        it may share its inode with the lock file that it was linked to.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags, 0o666)
        except FileExistsError:
            os.unlink(path)
            descriptor = os.open(path, flags, 0o666)
        try:
            view = memoryview(data)
            while view:  # a signal or a disk that is nearly full cuts a write short
                view = view[os.write(descriptor, view):]
            os.fsync(descriptor)  # before the name is there: else a power cut may leave the name on an empty file
        finally:
            os.close(descriptor)

    def fsync_folder(self, path: str) -> None:
        """Make the names in a folder durable: fsync of a file says nothing of the name that it has just got."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def append(self, path: str, data: bytes) -> None:
        """One write at the end; a torn last line of a killed writer is closed first, so that it spoils no other."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            torn = size and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, b"\n" + data if torn else data)
        finally:
            os.close(descriptor)

    read = staticmethod(read_bytes)

    rename = staticmethod(os.replace)
    link = staticmethod(os.link)
    unlink = staticmethod(os.unlink)
    list_folder = staticmethod(os.listdir)


class JsonRules:
    """What json.loads tells the half of it that is written in C."""

    strict, object_hook, object_pairs_hook, parse_float, parse_int, parse_constant = True, None, None, float, int, float


def parse_json(text: str):
    """json.loads; by its C half alone where that is all it takes. Raises ValueError (json.JSONDecodeError) and RecursionError."""
    try:
        value, end = _json.make_scanner(JsonRules)(text, 0)
        if not text[end:].strip(" \t\n\r"):
            return value
    except (AttributeError, StopIteration, ValueError, SystemError):
        pass  # no _json; or no JSON, and json words the error (until it is imported, CPython 3.11 has none but SystemError)
    return json.loads(text)


def dump_json(data) -> str:
    """json.dumps with ensure_ascii=False, likewise."""
    if _json is None:
        return json.dumps(data, ensure_ascii=False)
    encode = _json.make_encoder(None, json_refuses, _json.encode_basestring, None, ": ", ", ", False, False, True)
    return "".join(encode(data, 0))


def json_refuses(value):
    """Raises TypeError for what JSON cannot say."""
    json.dumps(value)


def dump_line(data) -> str:
    """Compact JSON with no raw control character, C1 and DEL included."""
    text = dump_json(data)
    if text.isprintable():  # nearly always; compiling the pattern would cost every verb 2 ms
        return text
    return re.sub("[\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def dump_records(head: dict, lists: dict) -> bytes:
    """A document with one record a line: `head`'s keys first, then each list of `lists`."""
    parts = [f" {dump_line(key)}: {dump_line(value)}" for key, value in head.items()]
    for key, records in lists.items():
        body = ",\n  ".join(dump_line(record) for record in records)
        parts.append(f" {dump_line(key)}: [\n  {body}\n ]" if records else f" {dump_line(key)}: []")
    return ("{\n" + ",\n".join(parts) + "\n}\n").encode("utf-8")


def describe_damage(path: str, error: Exception) -> DamagedState:
    """The error with path, line and column where the JSON parser can tell them."""
    where = f", line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
    what = error.msg if isinstance(error, json.JSONDecodeError) else error
    return DamagedState(f"{path}{where}: {what}; nothing was written",
                        "mend it in an editor, or see: ./farm.py doctor  (doctor --fix keeps it aside and rebuilds it)")


def number_of(task_id: str) -> int:
    """7 for t-0007; 0 for an id that a person has chosen."""
    return int(task_id[2:]) if task_id.startswith("t-") and task_id[2:].isdecimal() else 0


class State:
    """All that lies on disk, in memory: each task once, its outranked copies named in `losers`.

    pending, ready, landed: id -> Task; claims: agent -> Claim; done: id -> rev; heads: file -> its unknown top-level keys;
    losers: (place, id, agent) of what `Transaction.heal` removes, the agent's name only where the place is "claimed".
    """

    def __init__(self):
        self.pending: dict[str, Task] = {}
        self.ready: dict[str, Task] = {}
        self.landed: dict[str, Task] = {}
        self.claims: dict[str, Claim] = {}
        self.done: dict[str, int] = {}
        self.heads: dict[str, dict] = {}
        self.losers: list[tuple[str, str, str]] = []

    def claimed(self) -> dict[str, Task]:
        """id -> Task of what agents hold."""
        return {claim.task["id"]: claim.get_task() for claim in self.claims.values() if claim.task}

    def all_tasks(self) -> list[Task]:
        """Every task in every state, in the order they were added."""
        tasks = [*self.pending.values(), *self.claimed().values(), *self.ready.values(), *self.landed.values()]
        return sorted(tasks, key=lambda task: (task.seq, task.id))

    def find_task(self, task_id: str) -> Task | None:
        for place in (self.pending, self.ready, self.landed, self.claimed()):
            if task_id in place:
                return place[task_id]
        return None

    def get_task(self, task_id: str) -> Task:
        task = self.find_task(task_id)
        if task is None:
            raise NotFound(f"there is no task {task_id}", "./farm.py tasks")
        return task

    def find_holder(self, task_id: str) -> Claim | None:
        return next((claim for claim in self.claims.values() if claim.task.get("id") == task_id), None)

    def next_seq(self) -> int:
        return 1 + max((task.seq for task in self.all_tasks()), default=0)

    def last_number(self) -> int:
        """The highest number that an id has. None is used again: `done` keeps those of finished work."""
        return max(map(number_of, (*self.done, *(task.id for task in self.all_tasks()))), default=0)

    def next_id(self) -> str:
        return f"t-{self.last_number() + 1:04d}"

    def drop_losers(self) -> None:
        """Keep of each task the copy that wins, remember the others in `losers`: (place, id, agent)."""
        # (rev, rank): on equal revs the place further on its way wins. A tie takes a hand, or a copy restored from a backup; then
        # doing work again would be worse than believing that it is done.
        copies = [(task.rev, rank, place, task.id, "") for rank, place in ((0, "pending"), (2, "ready"), (3, "landed"))
                  for task in getattr(self, place).values()]
        copies += [(claim.task.get("rev", 0), 1, "claimed", claim.task["id"], claim.agent)
                   for claim in self.claims.values() if claim.task]
        # `done` outlives the landed record: a stale editor's save cannot bring finished work back.
        copies += [(rev, 4, "done", task_id, "") for task_id, rev in self.done.items() if task_id not in self.landed]
        best: dict[str, tuple] = {}
        for copy in copies:
            best[copy[3]] = max(best.get(copy[3], copy), copy)
        self.losers = [copy[2:] for copy in copies if best[copy[3]] != copy]
        for place, task_id, agent in self.losers:
            self.forget(place, task_id, agent)

    def forget(self, place: str, task_id: str, agent: str = "") -> None:
        """Take the copy of a task at `place` out of memory; a claim without task and locks goes whole."""
        if place != "claimed":
            getattr(self, place).pop(task_id, None)
            return
        claim = self.claims[agent]
        if claim.locks:
            self.claims[agent] = claim._replace(task={}, fence="")
        else:
            del self.claims[agent]


def hide_bytecode() -> None:
    """Keep the toolkit's __pycache__ out of the git status of a repo that it was copied into."""
    ignore = os.path.join(TOOLKIT, "__pycache__", ".gitignore")
    if os.path.isdir(os.path.dirname(ignore)) and not os.path.exists(ignore):
        try:
            with open(ignore, "w", encoding="ascii") as file:
                file.write("*\n")
        except OSError:
            return  # a toolkit that may not be written has no bytecode there either


class Store:
    """coordination/ on disk: durable writes under one mutex, read back healed. Nothing else writes there what a task is."""

    def __init__(self, repo: str, disk: Disk | None = None):
        self.repo = repo
        self.folder = os.path.join(repo, "coordination")
        self.disk = disk or Disk()

    def path(self, *parts: str) -> str:
        return os.path.join(self.folder, *parts)

    def make_folders(self) -> None:
        """What is missing below coordination/, durable before the first event. Only under the mutex.

        Queue files are made only where there is no history that knows of them.
        """
        if os.path.exists(self.path("events.jsonl")):  # made last, so it stands for all the others
            return
        for name in FOLDERS:
            os.makedirs(self.path(name), exist_ok=True)
        ignore = self.path(".gitignore")
        if not os.path.exists(ignore):
            self.disk.write_temp(ignore, b"*\n")
        for folder in (self.folder, self.repo):
            self.disk.fsync_folder(folder)
        hide_bytecode()
        state = State()
        for name, data in ((PENDING_FILE, self.pending_bytes(state)), (READY_FILE, self.ready_bytes(state))):
            if not os.path.exists(self.path(name)):
                self.write_durably(name, data)
        self.append_event("created", None)

    # -- reading

    def read_json(self, name: str) -> dict | None:
        """The object in a file; None when there is none. Raises DamagedState after 3 looks: an editor may be in mid-save."""
        path = self.path(name)
        for attempts_left in (2, 1, 0):
            try:
                data = parse_json(self.disk.read(path).decode("utf-8"))
                if isinstance(data, dict):
                    return data
                damage = ValueError(f"expected a JSON object, found {type(data).__name__}")
            except (FileNotFoundError, NotADirectoryError):
                return None
            except (ValueError, RecursionError) as error:
                damage = error
            if attempts_left:  # under the mutex, but rarely: editors truncate and write within a few milliseconds
                time.sleep(0.05)
        raise describe_damage(path, damage)

    def read_agents(self) -> dict[str, dict]:
        """What the loop has noted of each agent; entries that are no objects are passed over, the loop writes them anew."""
        agents = self.read_part(AGENTS_FILE, "agents")
        return {name: {"ends": [], **told} for name, told in agents.items() if isinstance(told, dict)}

    def read_part(self, name: str, key: str) -> dict:
        """The object under `key` of a file; empty when there is neither. Raises DamagedState when it is something else."""
        part = (self.read_json(name) or {}).get(key, {})
        if not isinstance(part, dict):
            raise describe_damage(self.path(name), ValueError(f"{key} must be an object"))
        return part

    def read_queue(self, name: str, lists: tuple) -> dict:
        """A queue file's document, each of `lists` checked to be a list. A file that history knows of may not be missing."""
        data = self.read_json(name)
        if data is None:
            # To take a lost file for an empty one would answer "no tasks", and the next write would make that true.
            if os.path.exists(self.path("events.jsonl")):
                raise DamagedState(f"{self.path(name)} is gone, but events.jsonl knows of it", "./farm.py doctor --fix")
            data = {}
        try:
            if data.get("schema", SCHEMA) != SCHEMA:
                raise ValueError(f'this farm.py knows "schema": {SCHEMA}, not {json.dumps(data["schema"])[:20]}')
            done = data.get("done", {})
            if not isinstance(done, dict) or not all(type(rev) is int for rev in done.values()):
                raise ValueError("done must be an object of id: rev")
            for key in lists:
                if not isinstance(data.setdefault(key, []), list):
                    raise ValueError(f"{key} must be a list")
        except ValueError as error:
            raise describe_damage(self.path(name), error) from None
        return data

    def read_tasks(self, name: str, place: str, records: list) -> list[Task]:
        """The records of one list. Raises DamagedState that names the record."""
        tasks, seen = [], set()
        for number, record in enumerate(records, 1):
            try:
                task = Task.from_json(record)
                if task.id and task.id in seen:
                    raise ValueError(f"{task.id} is there twice")
                seen.add(task.id)
                if task.state not in STATES_OF[place] or not task.title and not task.id:
                    raise ValueError(f"a task here needs a title, and is {' or '.join(STATES_OF[place])}, not {task.state[:20]!r}")
                if task.id and not is_name(task.id):
                    raise ValueError(f"its id {task.id[:60]!r} is not a name")
                tasks.append(task)
            except ValueError as error:
                raise describe_damage(self.path(name), ValueError(f"record {number}: {error}")) from None
        return tasks

    def lock_files(self) -> list[str]:
        """Names of the lock files, relative to coordination/."""
        try:
            names = sorted(self.disk.list_folder(self.path(LOCK_FOLDER)))
        except FileNotFoundError:
            return []
        return [os.path.join(LOCK_FOLDER, name) for name in names if name.endswith(".lock") and not name.startswith(".")]

    def read_claim(self, name: str) -> Claim | None:
        """One lock file; None when it has gone meanwhile."""
        data = self.read_json(name)
        if data is None:
            return None
        try:
            claim = Claim.from_json(data)
            Owner.from_json(claim.owner)
            if claim.agent + ".lock" != os.path.basename(name) or (claim.task and not is_name(claim.get_task().id)):
                raise ValueError("its agent is not the file's name, or its task has no proper id")
        except ValueError as error:
            raise describe_damage(self.path(name), error) from None
        return claim

    def read_claims(self) -> dict[str, Claim]:
        """Every lock file, by agent. A damaged one stops all claims: what it holds is not known."""
        claims = [self.read_claim(name) for name in self.lock_files()]
        return {claim.agent: claim for claim in claims if claim is not None}

    def load(self) -> State:
        """What is on disk, losing copies dropped in memory. Consistent only under the mutex. Raises DamagedState."""
        state = State()
        pending = self.read_queue(PENDING_FILE, ("tasks",))
        ready = self.read_queue(READY_FILE, ("ready", "landed"))
        state.done = dict(ready.get("done", {}))
        unnamed = []
        for task in self.read_tasks(PENDING_FILE, "pending", pending["tasks"]):
            (unnamed.append(task) if not task.id else state.pending.__setitem__(task.id, task))
        for key in ("ready", "landed"):
            getattr(state, key).update((task.id, task) for task in self.read_tasks(READY_FILE, key, ready[key]))
        state.claims = self.read_claims()
        for name, data in ((PENDING_FILE, pending), (READY_FILE, ready)):
            state.heads[name] = {key: value for key, value in data.items()
                                 if key not in ("schema", "tasks", "ready", "landed", "done")}
        for task in unnamed:  # written by hand as {"title": ...}
            task_id = state.next_id()
            state.pending[task_id] = task._replace(id=task_id, rev=1, seq=state.next_seq())
        state.drop_losers()
        return state

    def snapshot(self) -> State:
        """A consistent view without the mutex, for those who only look: read again while files change underneath.

        A move writes its destination first, so even a torn view shows each task at least once, and `load` drops the loser.
        """
        for _ in range(5):  # on a busy farm the fifth look may be torn, too: better than an answer that never comes
            before = self.signature()
            state = self.load()
            if before == self.signature():
                break
        return state

    def signature(self) -> tuple:
        """Changes whenever a move was made; costs a few stat calls."""
        marks = []  # the inode is new after each rename, so that no two moves within one tick of the clock look alike
        for name in (PENDING_FILE, READY_FILE, LOCK_FOLDER, "events.jsonl"):
            try:
                status = os.stat(self.path(name))
                marks.append((status.st_ino, status.st_size, status.st_mtime_ns))
            except OSError:
                marks.append(None)
        return tuple(marks)

    # -- writing

    def write_durably(self, name: str, data: bytes, *, exclusive: bool = False, settle: bool = True) -> None:
        """Temp file, fsync, rename (exclusive: link, which never replaces), fsync of the folder (settle: at once).

        Raises OSError, the file being as it was; NotDurable when only the last step failed, and the file is there.
        """
        path = self.path(name)
        folder, base = os.path.split(path)
        temp = os.path.join(folder, f".{base}.tmp")  # in the same folder: a rename works within one file system only
        try:
            self.disk.write_temp(temp, data)
            if exclusive:
                self.disk.link(temp, path)
            else:
                self.disk.rename(temp, path)
        except OSError as error:
            self.discard(temp)
            error.filename = error.filename or path
            raise
        if settle:
            self.settle(folder)
        if exclusive:  # a link leaves its temp file's name; gone or not, it is never read
            self.discard(temp)

    def settle(self, folder: str) -> None:
        """Make a folder's changes durable. Raises NotDurable."""
        try:
            self.disk.fsync_folder(folder)
        except OSError as error:
            raise NotDurable(error.errno, os.strerror(error.errno), folder) from None

    def discard(self, path: str) -> None:
        """Unlink a temp file; where that fails, the next writer does."""
        try:
            self.disk.unlink(path)
        except OSError:
            pass

    def append_event(self, event: str, task: Task | None, **details) -> None:
        """One line of history with the task's full record. Not fsynced, and no reason to fail: the queues are the truth."""
        record = {"at": utc(CLOCK.now()), "event": event, **details}
        if task is not None:
            record["task"] = task.to_json()
        try:
            self.disk.append(self.path("events.jsonl"), (dump_line(record) + "\n").encode("utf-8"))
        except OSError as error:
            say(f"{self.path('events.jsonl')} could not be written ({os.strerror(error.errno)}); the move itself is made")

    def pending_bytes(self, state: State) -> bytes:
        head = {"schema": SCHEMA, **state.heads.get(PENDING_FILE, {})}
        return dump_records(head, {"tasks": [task.to_json() for task in state.pending.values()]})

    def ready_bytes(self, state: State) -> bytes:
        head = {"schema": SCHEMA, **state.heads.get(READY_FILE, {}), "done": state.done}
        return dump_records(head, {key: [task.to_json() for task in getattr(state, key).values()] for key in ("ready", "landed")})

    def ensure_folders(self) -> None:
        """Make what is missing below coordination/, also what somebody has removed: verbs do not look for that, but `up` does,
        and each merger.
        """
        with self.transaction():
            for name in FOLDERS:
                os.makedirs(self.path(name), exist_ok=True)

    def transaction(self, before_load=lambda: None) -> Transaction:
        """`with store.transaction() as tx:` holds the mutex; inside, state is read and healed, and moves are made."""
        return Transaction(self, before_load)


class Transaction:
    """One hold of the mutex: `state`, and the moves. Every move is durable when its method returns."""

    def __init__(self, store: Store, before_load):
        self.store, self.before_load = store, before_load
        self.state = State()

    def __enter__(self) -> Transaction:
        store = self.store
        if not os.path.isdir(store.repo):
            raise NotFound(f"{store.repo} is not there")
        os.makedirs(store.folder, exist_ok=True)
        # Never a data file: after a rename a second process would hold "the lock" on the new inode. And in the kernel's queue,
        # not by polling: of 50 processes each then gets its turn.
        self.mutex = os.open(store.path(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self.mutex, fcntl.LOCK_EX)
            store.make_folders()
            self.before_load()
            self.state = store.load()
            # What we are about to answer or to heal by may be in the page cache only, where the writer was killed before its
            # fsync: to drop the losing copy then and lose the power would lose the task.
            if self.state.losers or os.fstat(self.mutex).st_size:
                self.settle_folders()
            self.heal()
        except BaseException:
            os.close(self.mutex)
            raise
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None and os.fstat(self.mutex).st_size:
                os.ftruncate(self.mutex, 0)
        except OSError:
            pass  # the mark stays, and the next holder settles the folders once more
        finally:
            os.close(self.mutex)

    def mark_dirty(self) -> None:
        """Leave a mark, one byte in the mutex file, while moves are made: who finds it knows that the last holder was killed.

        It is not fsynced. After a power cut there is no page cache left to distrust, so the mark may go with it.
        """
        os.pwrite(self.mutex, b"1", 0)

    def settle_folders(self) -> None:
        """Make durable what a killed writer may have left in the cache only, before anyone answers or heals because of it."""
        for name in ("task_queue", "merge_queue", LOCK_FOLDER):
            self.store.disk.fsync_folder(self.store.path(name))

    def heal(self) -> None:
        """Drop outranked copies for good."""
        places = {place for place, _, _ in self.state.losers}
        if "pending" in places:
            self.write("pending")
        if places & {"ready", "landed"}:
            self.write("ready")
        if "claimed" in places:
            self.prune_lock_files()
        self.state.losers = []

    def prune_lock_files(self) -> None:
        """Make the lock folder what `state.claims` says, where healing took a task away from a claim."""
        for name in self.store.lock_files():
            agent = os.path.basename(name).removesuffix(".lock")
            claim = self.state.claims.get(agent)
            if claim is None:
                self.remove_lock(agent)
            elif not claim.task:
                self.write_lock(claim)

    def write(self, place: str, *, settle: bool = True) -> None:
        """Make one queue file durable as `state` has it."""
        self.mark_dirty()
        if place == "pending":
            self.store.write_durably(PENDING_FILE, self.store.pending_bytes(self.state), settle=settle)
        else:
            self.store.write_durably(READY_FILE, self.store.ready_bytes(self.state), settle=settle)

    def write_lock(self, claim: Claim) -> None:
        """A claim's lock file: linked into place when new, renamed over our own when there is one."""
        self.mark_dirty()
        # By link, a file that somebody has put there meanwhile is an error and not replaced: the lock would have two holders.
        data = (dump_line(claim.to_json()) + "\n").encode("utf-8")
        is_new = claim.agent not in self.state.claims
        self.store.write_durably(os.path.join(LOCK_FOLDER, claim.agent + ".lock"), data, exclusive=is_new)
        self.state.claims[claim.agent] = claim

    def remove_lock(self, agent: str, *, settle: bool = True) -> None:
        self.mark_dirty()
        self.store.disk.unlink(self.store.path(LOCK_FOLDER, agent + ".lock"))
        if settle:
            self.store.settle(self.store.path(LOCK_FOLDER))
        self.state.claims.pop(agent, None)

    def drop_source(self, place: str, task_id: str) -> None:
        """Remove the copy that a durable new one outranks.

        Its folder is not fsynced: if a power cut brings the old copy back, it loses. Where the removal fails the move is made
        all the same, and the next transaction heals.
        """
        claim = self.state.find_holder(task_id) if place == "claimed" else None
        try:
            if claim is None:
                self.state.forget(place, task_id)
                self.write(place, settle=False)
            elif claim.locks:
                self.write_lock(claim._replace(task={}, fence=""))
            else:
                self.remove_lock(claim.agent, settle=False)
        except OSError as error:
            where = error.filename or self.store.folder
            say(f"{where}: {os.strerror(error.errno)}; {task_id} has moved, its old copy is dropped later")

    def move(self, task: Task, place: str, event: str, **details) -> Task:
        """Make `task` (rev + 1) durable at `place`, "pending", "ready" or "landed", then remove it from where it was."""
        state = self.state
        source = next((name for name in ("pending", "ready") if task.id in getattr(state, name)),
                      "claimed" if state.find_holder(task.id) else None)
        task = task._replace(rev=task.rev + 1)
        getattr(state, place)[task.id] = task
        if place == "landed":  # ready and landed share a file: one rename is the whole move
            state.done[task.id] = task.rev
            state.ready.pop(task.id, None)
            source = None if source == "ready" else source
        self.write("pending" if place == "pending" else "ready")  # the commit point: from here on the new copy is the task
        # After it, so that history never tells of a move that was not made; one that a kill leaves out is not missed.
        self.store.append_event(event, task, **details)
        if source and source != place:
            self.drop_source(source, task.id)
        return task

    def claim(self, task: Task, claim: Claim) -> Claim:
        """Make `claim` on `task` (rev + 1, which is its fence) durable, then take the task off the pending list."""
        task = task._replace(rev=task.rev + 1, state="claimed", agent=claim.agent, ended_by="",
                             fence=f"{task.id}.{task.rev + 1}")  # rev only ever rises: no two claims share a fence
        claim = claim._replace(task=task.to_json(), fence=task.fence, claimed_at=utc(CLOCK.now()))
        self.write_lock(claim)
        self.store.append_event("claimed", task, agent=claim.agent, owner=claim.owner)
        self.drop_source("pending", task.id)
        return claim

# ---------------------------------------------------------------------------------------------- lock registry
# Locks are files that name their owner. Nobody breaks one by its age: an owner is asked for, and only a dead one loses it.


def segments_overlap(a: str, b: str) -> bool:
    """Whether one file name can match both patterns (`*`, `?`, `[...]` taken as any one character)."""
    a, b = re.sub(r"\[[^]]+\]", "?", a), re.sub(r"\[[^]]+\]", "?", b)
    reached = {(0, 0)}
    frontier = [(0, 0)]
    while frontier:
        i, j = frontier.pop()  # the places in a and b to which one common beginning leads; each pair is looked at once
        left, right = a[i:i + 1], b[j:j + 1]
        steps = {(i + 1, j)} if left == "*" else set()
        steps |= {(i, j + 1)} if right == "*" else set()
        if left and right and (left == right or "?" in (left, right) or "*" in (left, right)):
            steps.add((i + (left != "*"), j + (right != "*")))
        frontier += steps - reached
        reached |= steps
    return (len(a), len(b)) in reached


def globs_overlap(a: str, b: str) -> bool:
    """Whether one path can match both globs; `**` stands for any number of folders, a name covers all below it."""
    def overlap(left: tuple, right: tuple) -> bool:
        if not left or not right:
            return True  # a lock on a folder holds what is in it
        if left[0] == "**":
            return overlap(left[1:], right) or overlap(left, right[1:])
        if right[0] == "**":
            return overlap(right, left)
        return segments_overlap(left[0], right[0]) and overlap(left[1:], right[1:])

    return overlap(*(tuple(part for part in glob.split("/") if part not in ("", ".")) for glob in (a, b)))


def names_exclude(a: str, b: str) -> bool:
    """Whether two lock names cannot be held by two agents at once."""
    if a.startswith("path:") and b.startswith("path:"):
        return globs_overlap(a[5:], b[5:])
    return a == b


class LockRegistry:
    """Who holds what, and who of them is dead. Every method needs an open Transaction, and its changes are durable at its end.

    An agent has one lock file, one owner, at most one task and any number of named locks; paths of its task count as names.
    """

    def __init__(self, tx: Transaction):
        self.tx = tx

    def find_conflict(self, agent: str, names: list) -> tuple[Claim, str] | None:
        """Another agent's claim that excludes one of `names`, with that name."""
        # Agents times names: a farm has some hundred of each, and an index would have to know globs.
        for claim in self.tx.state.claims.values():
            for held in claim.names() if claim.agent != agent else ():
                for name in names:
                    if names_exclude(held, name):
                        return claim, held
        return None

    def get_own(self, agent: str, owner: Owner) -> Claim:
        """The agent's claim as it is, or an empty one. Raises Refused when another live owner has the agent's lock file."""
        claim = self.tx.state.claims.get(agent)
        if claim is None:
            return Claim(agent=agent, owner=owner.to_json())
        # The dead were expired before: whoever still has the file lives, or cannot be seen from here.
        holder = Owner.from_json(claim.owner)
        if (holder.pid, holder.start, holder.boot) != (owner.pid, owner.start, owner.boot):
            raise Refused(describe_holder(claim), "./farm.py locks")
        return claim

    def acquire(self, agent: str, names: list, owner: Owner) -> Claim:
        """Hold all of `names` or none. Raises Refused that says who holds what is in the way."""
        claim = self.get_own(agent, owner)
        conflict = self.find_conflict(agent, names)
        if conflict:
            raise Refused(f"{conflict[1]} is held: {describe_holder(conflict[0])}", "./farm.py locks")
        claim = claim._replace(locks=sorted({*claim.locks, *names}), claimed_at=claim.claimed_at or utc(CLOCK.now()))
        self.tx.write_lock(claim)
        return claim

    def release(self, agent: str, names: list) -> None:
        """Give up `names`; those that are not held are passed over."""
        claim = self.tx.state.claims.get(agent)
        if claim is None or not set(claim.locks) & set(names):
            return
        claim = claim._replace(locks=[name for name in claim.locks if name not in names])
        self.tx.write_lock(claim) if claim.locks or claim.task else self.tx.remove_lock(agent)

    def has_dead_owner(self) -> bool:
        return any(find_liveness(Owner.from_json(claim.owner)) is False for claim in self.tx.state.claims.values())

    def expire(self, is_lapsed=lambda claim: False, rescues: dict | None = None) -> list[Claim]:
        """End the claims of dead owners, and of unseen ones whose lease `is_lapsed`; their tasks are pending again.

        rescues: agent -> ref of the unsaved work that was kept.
        """
        ended = []
        for claim in list(self.tx.state.claims.values()):
            owner = Owner.from_json(claim.owner)
            alive = find_liveness(owner)
            if alive or alive is None and not is_lapsed(claim):
                continue
            task = claim.get_task()
            if task:  # first, as in every move: a kill in between leaves the task pending twice, not nowhere
                self.requeue_orphan(task, claim, owner, (rescues or {}).get(claim.agent, ""))
            if claim.agent in self.tx.state.claims:  # the move took the file along where it held no named locks
                self.tx.remove_lock(claim.agent)
            ended.append(claim)
        return ended

    def requeue_orphan(self, task: Task, claim: Claim, owner: Owner, rescue: str) -> None:
        """A dead owner's task goes on from its own branch. A reboot is nobody's fault and costs no attempt."""
        task = task._replace(rescue=rescue or task.rescue)
        is_reboot = owner.boot != boot_id()
        what = "the machine was restarted" if is_reboot else f"{claim.agent} died (pid {owner.pid} is gone)"
        TaskQueue(self.tx).give_back(task, what, "died", counts=not is_reboot, start=f"farm/{claim.agent}/{task.id}", resume=True)

    def give_up(self, claim: Claim, rescue: str = "") -> None:
        """End a claim whose agent the farm itself has stopped: no attempt is counted, the branch is the next one's start."""
        task = claim.get_task()
        if task:
            task = task._replace(rescue=rescue or task.rescue)
            TaskQueue(self.tx).give_back(task, task.reason, "release", counts=False, start=f"farm/{claim.agent}/{task.id}",
                                         resume=True)
        if claim.agent in self.tx.state.claims:
            self.tx.remove_lock(claim.agent)


def describe_holder(claim: Claim) -> str:
    """Who holds a lock file, in words."""
    what = f"task {claim.task['id']}" if claim.task else ", ".join(claim.locks) or "its lock"
    return f"{what} is held by {claim.agent} (pid {claim.owner.get('pid')}) since {claim.claimed_at}"


class LeaseWatch:
    """Leases of owners that cannot be seen, counted on this process's monotonic clock from the first look at each renewal."""

    def __init__(self, lease_seconds: float):
        self.lease_seconds = lease_seconds
        self.first_seen: dict[tuple, float] = {}

    def is_lapsed(self, claim: Claim) -> bool:
        # Each renewal is a new key and starts anew. Two wall clocks are never compared: they may be hours apart.
        key = (claim.agent, claim.fence, claim.claimed_at, claim.renewals)
        return CLOCK.monotonic() - self.first_seen.setdefault(key, CLOCK.monotonic()) >= self.lease_seconds


# ---------------------------------------------------------------------------------------------- task queue
# Each move checks its fence first. A fence that was spent on just this move is answered again, because an agent that was killed
# between the move and its answer will ask again, and must not be told that it failed.

RETRY_SECONDS_MAX = 300  # after that a person will have looked, or the cause is not one that waiting mends
GIVE_BACK_EVENTS = {"fail": "attempt-failed", "release": "released", "died": "owner-died", "return": "returned"}


RESUME_SECONDS = 120.0  # for so long an interrupted task is kept for the agent that knows its context


def with_conversation(task: Task, agent: str, conversation: str) -> Task:
    return task._replace(conversation={**task.conversation, "agent": agent, "id": conversation}) if conversation else task


def kept_conversation(task: Task, now: float) -> dict:
    """The task's conversation, kept for its agent for a while; empty when there is none."""
    return {**task.conversation, "until": utc(now + RESUME_SECONDS)} if task.conversation.get("id") else {}


def is_kept_for_another(task: Task, agent: str, now: str) -> bool:
    kept = task.conversation
    return bool(agent and kept.get("agent") != agent and kept.get("until", "") > now)


class TaskQueue:
    """The moves of a task between pending, claimed and ready. Every method needs an open Transaction."""

    def __init__(self, tx: Transaction):
        self.tx = tx
        self.state = tx.state

    def add(self, drafts: list[Task], max_attempts: int) -> list[tuple[Task, bool]]:
        """Add tasks, all or none; returns (task, whether it is new). A `source` that is known already is not added again.

        Raises UsageError for an id that is taken or an `after` that names nothing.
        """
        state, now = self.state, utc(CLOCK.now())
        sources = {task.source: task for task in state.all_tasks() if task.source}  # landed ones, too: done is not to do
        answers, seq, number = [], state.next_seq(), state.last_number()
        for draft in drafts:
            known = sources.get(draft.source)
            if known is not None:
                answers.append((known, False))
                continue
            if draft.id and (state.find_task(draft.id) or draft.id in state.done):
                raise UsageError(f"there is a task {draft.id} already", "./farm.py tasks")
            task = draft._replace(id=draft.id or f"t-{number + 1:04d}", seq=seq + len(answers), added_at=now,
                                  max_attempts=draft.max_attempts or max_attempts, rev=1)
            number = max(number, number_of(task.id))  # counted along: to look through all ids for each would be quadratic
            state.pending[task.id] = task
            answers.append((task, True))
        new = self.resolve_after([task for task, is_new in answers if is_new], drafts, answers)
        if new:
            self.tx.write("pending")
        for task in new:
            self.tx.store.append_event("added", task)
        return [(state.get_task(task.id), is_new) for task, is_new in answers]

    def resolve_after(self, new: list[Task], drafts: list[Task], answers: list) -> list[Task]:
        """`after` entries as ids; NUL and a number in a draft mean the file's item with that index."""
        resolved = []
        for task in new:
            after = [answers[int(name[1:])][0].id if name.startswith("\0") else name for name in task.after]
            for name in after:
                if not self.state.find_task(name) and name not in self.state.done:
                    raise UsageError(f"task {task.title!r} comes after {name}, and there is no such task", "./farm.py tasks")
            self.state.pending[task.id] = task._replace(after=after)
            resolved.append(self.state.pending[task.id])
        return resolved

    def is_unblocked(self, task: Task) -> bool:
        """All that it comes after has landed."""
        return all(name in self.state.done for name in task.after)

    def claimable(self, agent: str) -> list[Task]:
        """What `agent` may claim now, best first: its own that was interrupted, priority, then first come."""
        registry, now = LockRegistry(self.tx), utc(CLOCK.now())
        tasks = [task for task in self.state.pending.values()
                 if task.state == "pending" and task.not_before <= now and self.is_unblocked(task)
                 and not is_kept_for_another(task, agent, now)
                 and not (task.paths and registry.find_conflict(agent, ["path:" + glob for glob in task.paths]))]
        return sorted(tasks, key=lambda task: (task.conversation.get("agent") != agent, -task.priority, task.seq))

    def claim(self, agent: str, owner: Owner, task_id: str = "", conversation: dict | None = None) -> Claim:
        """Lease the best task, or `task_id`, to `agent`; the same claim again when its owner asks twice.

        conversation: {"preset"} of the agent, with an "id" for a new one; an interrupted one of the same agent and preset is kept.

        Raises NotFound when there is none, Refused when the task or the agent's lock file is held.
        """
        own = LockRegistry(self.tx).get_own(agent, owner)
        if own.task:
            return own
        if task_id:
            holder = self.state.find_holder(task_id)
            if holder:
                raise Refused(describe_holder(holder), "./farm.py locks")
            self.state.get_task(task_id)
        tasks = [task for task in self.claimable(agent) if task_id in ("", task.id)]  # by name, it still waits its time
        if not tasks:
            raise NotFound(f"task {task_id} cannot be claimed now" if task_id else "no task can be claimed now",
                           "./farm.py tasks")
        task, kept = tasks[0], tasks[0].conversation
        if conversation and not (kept.get("id") and (kept.get("agent"), kept.get("preset")) == (agent, conversation["preset"])):
            task = task._replace(conversation={"agent": agent, **conversation})
        return self.tx.claim(task, own)

    def get_claimed(self, agent: str, fence: str, verb: str) -> Task | None:
        """The task behind the current claim `fence`; None when `verb` has ended exactly this claim before.

        Raises Refused for any other fence.
        """
        claim = self.state.claims.get(agent)
        if claim and claim.task and claim.fence == fence:
            return claim.get_task()
        # The record keeps the fence that it was last claimed by, and the verb that ended it: enough to know a repeat, since an
        # older fence's task has been claimed anew. A repeat by another verb is a contradiction, and refused.
        task = self.state.find_task(fence.rpartition(".")[0])
        if task and task.fence == fence and task.ended_by == verb and task.state != "claimed":
            return None
        now = f"; {agent} holds {claim.fence}" if claim and claim.task else ""
        raise Refused(f"fence {fence} is not the current claim of {agent}{now}", "./farm.py tasks")

    def renew(self, agent: str, fence: str) -> None:
        self.get_claimed(agent, fence, "renew")
        claim = self.state.claims[agent]
        self.tx.write_lock(claim._replace(renewals=claim.renewals + 1))

    def submit(self, agent: str, fence: str, branch: str, commit: str) -> Task:
        """Hand `commit`, which is pinned already, to the merge queue; the task as it is there, also at a repeat.

        What lands is this commit, wherever its branch goes later. Raises Refused for an old fence.
        """
        task = self.get_claimed(agent, fence, "submit")
        if task is None:
            return self.state.get_task(fence.rpartition(".")[0])
        task = task._replace(state="ready", branch=branch, commit=commit, submitted_at=utc(CLOCK.now()), ended_by="submit",
                             queue_seq=1 + max((other.queue_seq for other in self.state.all_tasks()), default=0))
        return self.tx.move(task, "ready", "submitted")

    def fail(self, agent: str, fence: str, why: str, *, retry: bool = True, start: str = "", rescue: str = "",
             resume: bool = False, conversation: str = "") -> Task:
        """End an attempt without result; the task waits for a while, or is failed when its attempts are used up.

        resume: the next attempt goes on in the same conversation, whose id the CLI may have told only now.
        """
        task = self.get_claimed(agent, fence, "fail")
        if task is None:
            return self.state.get_task(fence.rpartition(".")[0])
        task = with_conversation(task._replace(rescue=rescue or task.rescue), agent, conversation)
        return self.give_back(task, why, "fail", retry=retry, start=start, resume=resume)

    def release(self, agent: str, fence: str, why: str = "", rescue: str = "", conversation: str = "") -> Task:
        """Give a task back unharmed: no attempt is counted; the next one goes on from its branch."""
        task = self.get_claimed(agent, fence, "release")
        if task is None:
            return self.state.get_task(fence.rpartition(".")[0])
        task = with_conversation(task._replace(rescue=rescue or task.rescue), agent, conversation)
        return self.give_back(task, why or task.reason, "release", counts=False, start=f"farm/{agent}/{task.id}", resume=True)

    def give_back(self, task: Task, reason: str, ended_by: str, *, counts: bool = True, retry: bool = True,
                  start: str = "", resume: bool = False) -> Task:
        """The way back to pending, from a claim or from the merge queue, with the reason.

        counts: whether this was an attempt (1 s, 2 s, 4 s ... of backoff, `failed` after the last). start: the commit or branch
        that the next one begins from, empty for where this one did.
        """
        attempts = task.attempts + counts
        is_over = counts and (not retry or attempts >= max(1, task.max_attempts))
        wait = min(2.0 ** (attempts - 1), RETRY_SECONDS_MAX) if counts else 0  # nobody's fault: nobody waits
        task = task._replace(state="failed" if is_over else "pending", attempts=attempts, reason=reason, ended_by=ended_by,
                             start=start or task.start, not_before=utc(CLOCK.now() + wait) if wait and not is_over else "",
                             conversation=kept_conversation(task, CLOCK.now() + wait) if resume else {})
        return self.tx.move(task, "pending", GIVE_BACK_EVENTS[ended_by], why=reason)

    def keep_for_agents(self, agents: list[str]) -> None:
        """Interrupted tasks wait once more for those of `agents` who know their context."""
        kept = [task for task in self.state.pending.values() if task.conversation.get("agent") in agents]
        for task in kept:
            self.state.pending[task.id] = task._replace(conversation=kept_conversation(task, CLOCK.now()))
        if kept:
            self.tx.write("pending")

    def cancel(self, task_id: str) -> Task:
        """Raises Refused while an agent holds it or once it has landed."""
        task = self.state.get_task(task_id)
        holder = self.state.find_holder(task_id)
        if holder:
            raise Refused(describe_holder(holder), f"./farm.py send {holder.agent} 'please stop', or: ./farm.py down")
        if task.state == "landed":
            raise Refused(f"task {task_id} has landed as {task.landed_commit[:10]}", f"git revert -m 1 {task.landed_commit[:10]}")
        if task.state == "canceled":
            return task
        return self.tx.move(task._replace(state="canceled"), "pending", "canceled")

    def retry(self, task_id: str, more: int) -> Task:
        """A failed or canceled task (or one in backoff) may be claimed at once, with `more` attempts.

        Attempts go on counting: returned work is pinned under its attempt's number.
        """
        task = self.state.get_task(task_id)
        if task_id not in self.state.pending:
            raise Refused(f"task {task_id} is {task.state}; only failed, canceled and pending tasks can be retried",
                          "./farm.py tasks")
        task = task._replace(state="pending", max_attempts=max(task.max_attempts, task.attempts + more), not_before="")
        return self.tx.move(task, "pending", "retried")


# ---------------------------------------------------------------------------------------------- task files
# People keep tasks in lists of many kinds. All or nothing: a file with one bad line adds no task at all.

CHECKBOX = r"^(\s*)(?:[-*+]|\d+[.)])\s+\[([ xX])\]\s+(\S.*)$"
NEARLY_CHECKBOX = r"^\s*(?:[-*+]|\d+[.)])\s*\[(?:\s*[xX]?\s*|[^\w\s])\](?!\()"


def parse_checklist(text: str, name: str) -> list[Task]:
    """`- [ ] title`, deeper text below it is the prompt; a deeper checkbox comes first: the item is `after` it.

    Checked items are passed over. Raises UsageError that names a line which is nearly a checkbox.
    """
    drafts: list[Task] = []
    bodies: list[list[str]] = []
    open_items: list[tuple[int, int | None]] = []  # (indent, index of its draft; None for a checked one)
    in_code = False
    for number, line in enumerate(text.expandtabs(4).splitlines(), 1):
        item, indent = None if in_code else re.match(CHECKBOX, line), len(line) - len(line.lstrip())
        if not item and not in_code and re.match(NEARLY_CHECKBOX, line):
            raise UsageError(f"{name}, line {number}: {one_line(line, 60)!r} is nearly a task (`- [ ] title`); nothing was added")
        while open_items and line.strip() and not in_code and open_items[-1][0] >= indent:
            open_items.pop()
        parent = open_items[-1][1] if open_items else None
        if item:
            index = len(drafts) if item[2] == " " else None
            if index is not None:
                drafts.append(Task(title=item[3].strip()))
                bodies.append([])
                if parent is not None:
                    drafts[parent] = drafts[parent]._replace(after=[*drafts[parent].after, f"\0{index}"])
            open_items.append((indent, index))
        elif parent is not None:
            bodies[parent].append(line)
            in_code ^= line.lstrip().startswith("```")
    return [draft._replace(prompt=dedent(body)) for draft, body in zip(drafts, bodies, strict=True)]


def dedent(lines: list[str]) -> str:
    """Lines without the indent that all have, and without blank ones around them."""
    indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return "\n".join(line[indent:].rstrip() for line in lines).strip("\n")


def parse_json_item(item, where: str) -> Task:
    """One object: a task's own keys, or an issue as `gh issue list --json number,title,body,labels,url` prints it."""
    if isinstance(item, str):
        item = {"title": item}
    if not isinstance(item, dict) or not isinstance(item.get("title"), str) or not item["title"].strip():
        raise UsageError(f"{where}: a task needs a title; nothing was added")
    own = ("id", "title", "prompt", "priority", "after", "paths", "max_attempts", "time_limit_seconds", "budget_usd")
    fields = {key: item[key] for key in own if key in item}
    fields.setdefault("prompt", item.get("body") or "")
    if isinstance(fields["prompt"], str):
        fields["prompt"] = fields["prompt"].replace("\r\n", "\n")
    if "number" in item:
        fields["source"] = f"issue {item['number']}"
    if isinstance(item.get("url"), str):
        fields["url"] = one_line(item["url"], 500)
    try:
        draft = Task.from_json(fields)
    except ValueError as error:
        raise UsageError(f"{where}: {error}; nothing was added") from None
    for name in [draft.id] * bool(draft.id) + draft.after:
        checked_name(name, f"{where}: task id")
    return draft


def parse_json_tasks(text: str, name: str) -> list[Task]:
    """A JSON array, one JSON object a line, or objects one after the other. Raises UsageError that names the line or item."""
    drafts, lines = [], text.splitlines()
    first = next(line for line in lines if line.strip())
    if first.lstrip().startswith("{") and is_json(first):
        items = [(f"line {number}", line, number) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        items = [("item", text, 1)]
    for where, piece, first_line in items:
        try:
            found = list(read_values(piece))
        except json.JSONDecodeError as error:
            raise UsageError(f"{name}, line {first_line + error.lineno - 1}: {error.msg}; nothing was added") from None
        found = found[0] if len(found) == 1 and isinstance(found[0], list) else found
        for number, item in enumerate(found, 1):
            drafts.append(parse_json_item(item, f"{name}, {where}" + (f" {number}" if where == "item" else "")))
    return drafts


def is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def read_values(text: str):
    """JSON values that stand one after the other. Raises json.JSONDecodeError."""
    decoder, place = json.JSONDecoder(), 0
    while rest := text[place:].lstrip():
        value, place = decoder.raw_decode(text, len(text) - len(rest))
        yield value


def parse_tasks(text: str, name: str) -> list[Task]:
    """Drafts from a checklist, JSON or plain lines, each with the `source` that keeps it from being added twice."""
    import zlib

    lines = [line.strip() for line in text.splitlines()]
    if re.match(r"\s*(?:\{|\[\s*(?:[\[{\"\]]|\Z))", text):
        drafts = parse_json_tasks(text, name)
    elif any(re.match(CHECKBOX, line) or re.match(NEARLY_CHECKBOX, line) for line in lines):
        drafts = parse_checklist(text, name)
    else:
        drafts = [Task(title=line) for line in lines if line and not line.startswith("#")]
    seen = collections.Counter()
    for index, draft in enumerate(drafts):
        mark = f"{name}:{zlib.crc32(json.dumps([draft.title, draft.prompt]).encode()):08x}"
        seen[mark] += 1
        drafts[index] = draft._replace(source=draft.source or f"{mark}:{seen[mark]}")
    return drafts


# ---------------------------------------------------------------------------------------------- prompts

PROMPT_TEMPLATE = """\
{body}

---
You are {agent}, one of several agents on this repository. Your task is {task}, attempt {attempt}.
- You stand in your own worktree, on branch {branch}. Work and commit here. Touch no other worktree and no other branch.
- Never use `git stash`, and never switch branches: all worktrees share one repository.
- Run the project's tests before you finish{gate}.
- When the work is done and committed, run:  farm submit {agent} --fence {fence}
- When you cannot do it, run:  farm fail {agent} --fence {fence} --why "the reason in a sentence"
- Before you use something that only one may use at a time:  farm lock {agent} NAME  and afterwards  farm unlock {agent} NAME
{history}"""


RESUME_TEMPLATE = """\
You were interrupted ({reason}), and go on now. Your worktree is as you left it; look at `git status` and `git log` first.
The task is the same, {task}: {title}
Your claim has a new fence: farm submit {agent} --fence {fence}   or   farm fail {agent} --fence {fence} --why "..."
"""


def describe_history(store: Store, task: Task) -> str:
    """What the next attempt should know of those before it; empty for a first one."""
    if not task.attempts and not task.reason:
        return ""
    lines = ["", "This task has been tried before. " + (f"It came back: {task.reason}" if task.reason else "")]
    if task.start:
        lines.append(f"Its commits are the start of your branch (from {task.start}).")
    if task.rescue:
        lines.append(f"Unsaved work of that attempt is kept: git show --stat {task.rescue}")
    if task.agent:
        lines.append(f"What its agent printed is in {store.path('logs', task.agent + '.log')}")
    try:
        with open(store.path("returns", f"{task.id}.{task.attempts}.txt"), encoding="utf-8", errors="replace") as file:
            lines.append("\n" + file.read(20_000))
    except FileNotFoundError:
        pass
    return "\n".join(lines) + "\n"


def read_template(repo: str, settings: Settings) -> str:
    """The user's own prompt template. Raises UsageError when it cannot be read."""
    path = os.path.join(repo, os.path.expanduser(settings.prompt_template))
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the prompt template {path} cannot be read: {error}", "FARM_PROMPT_TEMPLATE=FILE") from None


def write_prompt(store: Store, claim: Claim, settings: Settings, *, resumes: bool = False) -> str:
    """Write what the agent is told to prompts/ID.ATTEMPT.md (a conversation that goes on: what is new); returns the path."""
    task, gate = claim.get_task(), f" (the merge gate is: {settings.gate})" if settings.gate else ""
    values = {"body": f"{task.title}\n\n{task.prompt}".strip(), "title": task.title, "agent": claim.agent, "task": task.id,
              "attempt": str(task.attempts + 1), "branch": f"farm/{claim.agent}/{task.id}", "fence": claim.fence,
              "gate": gate, "reason": task.reason or "the farm was stopped", "history": describe_history(store, task)}
    if settings.prompt_template and not resumes:  # a brace of the user's own stays
        text = re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), read_template(store.repo, settings))
    else:
        text = (RESUME_TEMPLATE if resumes else PROMPT_TEMPLATE).format(**values)
    text = "Task:\n" * text.startswith("/") + text  # CLIs take a slash at the start for a command of their own
    path = store.path("prompts", f"{task.id}.{task.attempts + 1}{'.resumed' * resumes}.md")
    with open(path, "w", encoding="utf-8", errors="replace") as file:
        file.write(text)
    return path


# ---------------------------------------------------------------------------------------------- agents
# What the farm knows of coding CLIs, as data: how one starts and goes on, how its end and its use of tokens are read. A new CLI is
# one entry of PRESETS. The facts are those of the version in `checked`; recordings of them lie below tests/recorded.

Preset = collections.namedtuple("Preset", "start resume permissions reader transcript stagger_seconds checked")

ALLOWED = [f"Bash(farm {verb}:*)" for verb in ("submit", "fail", "lock", "unlock", "renew")] + [
    f"Bash(git {verb}:*)" for verb in ("status", "diff", "log", "show", "add", "commit", "rm", "mv", "restore", "merge", "rebase",
                                       "cherry-pick")]
CLAUDE = '--settings "$FARM_CLI_SETTINGS" {permissions} -- "$FARM_PROMPT"'
CLAUDE_PRINT = "claude -p --output-format stream-json --verbose"
CLAUDE_PERMISSIONS = {"ask": "--permission-mode default", "edits": "--permission-mode acceptEdits",
                      "all": "--dangerously-skip-permissions"}
CLAUDE_TRANSCRIPT = "projects/*/{conversation}.jsonl"

TURN_FILE, ENDING_FILE, COST_FILE = "turn.json", "ending.json", "cost.json"
TURN_STATES = {"UserPromptSubmit": "working", "PostToolUse": "working", "PermissionRequest": "waiting", "Notification": "waiting",
               "PostToolUseFailure": "working", "Stop": "over", "StopFailure": "over"}
MAILBOX = "$FARM_REPO/coordination/mailbox/$FARM_AGENT_NAME"
CODEX_ROOTS = ",".join(f'\\"{root}\\"' for root in (
    "$FARM_GIT_DIR", "$FARM_GIT/objects", "$FARM_GIT/refs/heads", "$FARM_GIT/logs", MAILBOX))
CODEX_PERMISSIONS = {"ask": "--sandbox read-only", "all": "--dangerously-bypass-approvals-and-sandbox",
                     "edits": f'--sandbox workspace-write -c "sandbox_workspace_write.writable_roots=[{CODEX_ROOTS}]"'}
GEMINI = 'gemini -o json --skip-trust {permissions} --prompt="$FARM_PROMPT" </dev/null 2>&1'
GEMINI_PERMISSIONS = {"ask": "--approval-mode default", "edits": "--approval-mode auto_edit", "all": "--approval-mode yolo"}

# start, resume: run by bash in the worktree; what a headless CLI prints is kept for its reader. transcript: the file of a
# conversation whose id the farm chooses; the other CLIs tell theirs.
PRESETS = {
    "claude": Preset(f'exec claude --session-id "$FARM_CONVERSATION" {CLAUDE}',
                     f'exec claude --resume "$FARM_CONVERSATION" {CLAUDE}',
                     CLAUDE_PERMISSIONS, "claude-transcript", CLAUDE_TRANSCRIPT, 1.0, "2.1.330"),
    "claude-print": Preset(f'{CLAUDE_PRINT} --session-id "$FARM_CONVERSATION" {CLAUDE} </dev/null',
                           f'{CLAUDE_PRINT} --resume "$FARM_CONVERSATION" {CLAUDE} </dev/null',
                           CLAUDE_PERMISSIONS, "claude", CLAUDE_TRANSCRIPT, 1.0, "2.1.330"),
    "codex": Preset('codex exec --json {permissions} -- "$FARM_PROMPT" </dev/null',
                    'codex exec {permissions} resume --json "$FARM_CONVERSATION" "$FARM_PROMPT" </dev/null',
                    CODEX_PERMISSIONS, "codex", "", 1.0, "0.169.0"),
    "gemini": Preset(GEMINI.replace("--skip", '--session-id "$FARM_CONVERSATION" --skip'),
                     GEMINI.replace("--skip", '--resume "$FARM_CONVERSATION" --skip'),
                     GEMINI_PERMISSIONS, "gemini", "", 1.0, "0.61.0"),
    "opencode": Preset('opencode run --format json {permissions} -- "$FARM_PROMPT" </dev/null',
                       'opencode run --format json {permissions} --session "$FARM_CONVERSATION" -- "$FARM_PROMPT" </dev/null',
                       {"all": "--auto"}, "opencode", "", 1.0, "1.18.33"),
    "aider": Preset('aider --yes-always --no-check-update --no-pretty --message-file "$FARM_PROMPT_FILE" </dev/null', "", {}, "",
                    "", 1.0, "0.86.2"),
}

Launch = collections.namedtuple("Launch", "preset start resume")  # preset: a name of PRESETS, or empty for a command


def read_mix(agent: str) -> list[str]:
    """A preset for each agent of a mix such as `claude:6,codex:4`; empty for a preset or command. Raises UsageError."""
    if not re.fullmatch(r"[\w-]+:\d+(,[\w-]+:\d+)*", agent):
        return []
    shares = [share.split(":") for share in agent.split(",")]
    unknown = [name for name, _ in shares if name not in PRESETS]
    if unknown:
        raise UsageError(f"there is no preset {unknown[0]!r}; there are {', '.join(PRESETS)}")
    return [name for name, number in shares for _ in range(int(number))]


def count_agents(settings: Settings, wanted: int | None) -> int:
    """N: a mix names it by itself. wanted: what the command line says. Raises UsageError when they do not add up."""
    mix = read_mix(settings.agent)
    if mix and wanted not in (None, len(mix)):
        raise UsageError(f"{settings.agent} names {len(mix)} agents, and -n says {wanted}", f"./farm.py up -n {len(mix)}")
    return len(mix) or settings.n


def share_agents(settings: Settings) -> list[str]:
    """What each agent runs, a preset's name or a command, in the order of their numbers."""
    return read_mix(settings.agent) or [settings.agent or "claude"] * settings.n


def launch_of(agent: str, permissions: str) -> Launch:
    """How a preset's name, or a command, is run."""
    preset = PRESETS.get(agent)
    if preset is None:
        return Launch("", agent, "")
    flags = preset.permissions.get(permissions, "")
    tee = 'set -o pipefail; {{ {}; }} | tee "$FARM_OUTPUT"' if preset.reader and not preset.start.startswith("exec") else "{}"
    start, resume = (tee.format(text.replace("{permissions}", flags)) if text else "" for text in (preset.start, preset.resume))
    return Launch(agent, start, resume)


def check_command(command: str) -> None:
    """Raises MissingTool when the first word of an agent's command cannot be started."""
    import subprocess

    words = [word for word in command.split() if not re.match(r"[A-Za-z_]\w*=", word)]
    found = subprocess.run(["bash", "-c", 'type -t -- "$1" >/dev/null', "bash", words[0].strip("'\"") if words else ""],
                           cwd=TOOLKIT, timeout=10)
    if found.returncode and re.fullmatch(r"[\w./+-]+", words[0] if words else ""):
        raise MissingTool(f"the agent command {words[0]!r} is not on PATH", "install it, or: ./farm.py up --agent 'COMMAND'")


def program_of(agent: str) -> str:
    """The command line whose first word must be on PATH for this preset or command."""
    return PRESETS[agent].start.removeprefix("exec ") if agent in PRESETS else agent


def resolve_agents(repo: str, settings: Settings) -> list[Launch]:
    """What each agent runs. Raises MissingTool when it cannot be started, UsageError for a bad mix."""
    import shutil

    if not settings.agent and not shutil.which("claude"):
        raise MissingTool("no agent is named, and claude is not on PATH", "make demo, or: ./farm.py up --agent 'COMMAND'")
    shared = share_agents(settings)
    for agent in dict.fromkeys(shared):
        check_command(program_of(agent))
    blockers = find_blockers(repo, settings) if "claude" in shared and not settings.agent_home else []
    if blockers:
        raise Refused("; ".join(what for what, _ in blockers) + ": ten sessions would wait for an answer", blockers[0][1])
    return [launch_of(agent, settings.permissions) for agent in shared]


def find_blockers(repo: str, settings: Settings) -> list[tuple[str, str]]:
    """(what, what to type) of the questions that Claude Code would ask at its first start here, where nobody is there to answer."""
    folder = os.environ.get("CLAUDE_CONFIG_DIR") or os.path.expanduser("~")
    try:
        with open(os.path.join(folder, ".claude.json"), encoding="utf-8") as file:
            told = json.load(file)
        projects, answers = told.get("projects") or {}, told.get("customApiKeyResponses") or {}
        trusted = (projects.get(repo) or {}).get("hasTrustDialogAccepted")
        key = os.environ.get("ANTHROPIC_API_KEY", "")
        key_is_known = not key or key[-20:] in (answers.get("approved") or [])
    except FileNotFoundError:
        told, trusted, key_is_known = {}, False, True
    except (OSError, ValueError, AttributeError, TypeError):
        return []  # a format that we do not know is no reason to stop anybody
    asks = (("claude has not been set up for this user", not told.get("hasCompletedOnboarding")),
            (f"claude does not trust {repo} yet", not trusted), ("claude will ask about ANTHROPIC_API_KEY", not key_is_known))
    hint = f"cd {shell_word(repo)} && claude   (answer its questions once, then leave with /exit)"
    blockers = [(what, hint) for what, asks_it in asks if asks_it]
    if settings.permissions == "all" and os.geteuid() == 0 and not os.environ.get("IS_SANDBOX"):
        blockers.append(("claude refuses permissions=all to root", "work as another user, or: export IS_SANDBOX=1"))
    return blockers


def cli_settings(settings: Settings) -> dict:
    """What `claude --settings` gets: the hooks that tell the farm, and the commands that it may run unasked.

    No file of the user's is changed. A hook must never exit 2, which would block the agent. PostToolUse matters only to an agent
    that waited for a person, and costs a grep otherwise. Where there is a budget, the status line tells the cost.
    """
    def hook(command: str) -> list:
        return [{"hooks": [{"type": "command", "command": command, "timeout": 20}]}]

    turn = f'"{MAILBOX}/{TURN_FILE}"'
    hooks = {event: hook("farm hook || true") for event in TURN_STATES}
    for event in ("PostToolUse", "PostToolUseFailure"):
        hooks[event] = hook(f"! grep -qs '\"waiting\"' {turn} || farm hook || true")
    data = {"hooks": hooks, "permissions": {"allow": ALLOWED + ([f"Bash({settings.gate})"] if settings.gate else [])},
            "skipDangerousModePermissionPrompt": True}  # asked for by FARM_PERMISSIONS=all, and by nothing else
    if settings.budget or settings.task_budget:
        data["statusLine"] = {"type": "command", "command": f'cat >"{MAILBOX}/{COST_FILE}"'}
    return data


# ---------------------------------------------------------------------------------------------- turns
# What a CLI's hooks have told of the attempt it is at, and the farm's own word that it is over: files in the agent's mailbox.

IDLE_SECONDS, BACKGROUND_SECONDS = 5.0, 1800.0
SENT_BACK = """\
Your task {task} is not submitted yet. If the work is done, commit it, then run  farm submit {agent} --fence {fence}
If it cannot be done:  farm fail {agent} --fence {fence} --why "the reason in a sentence"
If a command of yours runs in the background, wait for it first, or stop it.
Nobody reads questions here: decide yourself."""


def read_mail(store: Store, agent: str, name: str, fence: str) -> dict:
    """What lies in an agent's mailbox under `name` about the claim `fence`; empty when there is nothing that can be read."""
    try:
        with open(store.path("mailbox", agent, name), encoding="utf-8") as file:
            mail = json.load(file)
    except (OSError, ValueError):
        return {}
    texts = isinstance(mail, dict) and all(isinstance(mail.get(key, ""), str) for key in ("at", "event", "state", "message"))
    return mail if texts and mail.get("fence") == fence else {}


def write_mail(store: Store, agent: str, name: str, mail: dict) -> None:
    path = store.path("mailbox", agent, name)
    temp = f"{path}.{os.getpid()}.tmp"
    with open(temp, "w", encoding="utf-8") as file:
        file.write(dump_line(mail) + "\n")
    os.replace(temp, path)


def note_turn(store: Store, agent: str, fence: str, event: dict) -> dict | None:
    """Write a hook's event to turn.json; the answer for the CLI, when there is one.

    The first Stop of a task that is still claimed is sent back with what is missing; the next ends the CLI, and the farm decides
    from the branch; but one that waits for a command of its own in the background wakes by itself, and gets BACKGROUND_SECONDS.
    event: the hook's JSON (hook_event_name, message, error, tool_name, background_tasks, ...).
    """
    name, before = str(event.get("hook_event_name", "")), read_mail(store, agent, TURN_FILE, fence)
    if name not in TURN_STATES or name == "Notification" and event.get("notification_type") != "elicitation_dialog":
        return None
    turn = {**before, "at": utc(CLOCK.now()), "fence": fence, "event": name, "state": TURN_STATES[name],
            "message": one_line(describe_event(event), 300)}
    claim = store.read_claim(os.path.join(LOCK_FOLDER, agent + ".lock"))
    is_early = name == "Stop" and claim is not None and claim.fence == fence
    goes_back = is_early and not before.get("sent_back")
    if goes_back or is_early and event.get("background_tasks"):
        turn.update(state="working", sent_back=True)
    write_mail(store, agent, TURN_FILE, turn)
    if goes_back:
        return {"decision": "block", "reason": SENT_BACK.format(task=claim.task["id"], agent=agent, fence=fence)}
    if turn["state"] == "over" and os.environ.get("FARM_PRESET") != "claude-print":  # which ends by itself, its result comes last
        ring(store.path("mailbox", agent, "bell"), b"over\n")
    return None


def end_waiting_turn(store: Store, agent: str, turn: dict, now: float) -> None:
    """End a turn that has waited long enough for its commands in the background (a server that nobody stops, say)."""
    if turn.get("event") == "Stop" and turn.get("state") == "working" and now - epoch(turn["at"]) > BACKGROUND_SECONDS:
        write_mail(store, agent, TURN_FILE, {**turn, "state": "over"})
        ring(store.path("mailbox", agent, "bell"), b"over\n")


def agent_home(repo: str, settings: Settings, agent: str) -> str:
    """The HOME that an agent's CLI has."""
    return os.path.join(worktrees_folder(repo, settings), "homes", agent) if settings.agent_home else os.path.expanduser("~")


def read_cli_session(store: Store, agent: str, home: str) -> dict:
    """What Claude Code itself says of the process at work (sessions/PID.json); empty when that is nothing, or of another one."""
    folder = os.environ.get("CLAUDE_CONFIG_DIR") or os.path.join(home, ".claude")
    try:
        with open(store.path("mailbox", agent, "pid"), encoding="ascii") as file:
            pid = int(file.read())
        told = next(read_json_lines(os.path.join(folder, "sessions", f"{pid}.json")), {})
    except (OSError, ValueError):
        return {}
    return told if told.get("procStart") == start_of(pid) and type(told.get("statusUpdatedAt")) is int else {}


def read_turn(store: Store, agent: str, fence: str, home: str) -> dict:
    """The turn of the claim `fence`. Esc fires no hook: a CLI that says it is idle in the middle of a turn waits for a person."""
    turn = read_mail(store, agent, TURN_FILE, fence)
    if turn.get("state") != "working" or turn.get("event") == "Stop":
        return turn
    told = read_cli_session(store, agent, home)
    idle_since = told.get("statusUpdatedAt", 0) / 1000
    if told.get("status") != "idle" or not epoch(turn["at"]) - 1 <= idle_since < CLOCK.now() - IDLE_SECONDS:
        return turn
    return {**turn, "at": utc(idle_since), "state": "waiting", "message": "interrupted: it waits for a person's word"}


def describe_event(event: dict) -> str:
    """What a hook's event says in words: an error, a question, the tool that is asked for."""
    asked = event.get("tool_input") or {}
    tool = f"{event['tool_name']} {asked.get('command') or asked.get('file_path') or ''}" if event.get("tool_name") else ""
    if event.get("error"):
        return f"{event['error']}: {event.get('last_assistant_message') or event.get('error_details') or ''}"
    return str(event.get("message") or tool.strip())


def end_attempt(store: Store, agent: str, fence: str, cause: str, message: str) -> None:
    """Have run-task.sh end the CLI that works on `fence`; judge_end then reads why."""
    write_mail(store, agent, ENDING_FILE, {"at": utc(CLOCK.now()), "fence": fence, "event": cause, "message": message})
    ring(store.path("mailbox", agent, "bell"), b"over\n")


# ---------------------------------------------------------------------------------------------- spending
# What a CLI has printed or written down: tokens, dollars, its error; and what all attempts have cost.

Spent = collections.namedtuple("Spent", "tokens_in tokens_out cost_usd error denied conversation", defaults=(0, 0, 0.0, "", "", ""))


def read_json_lines(path: str):
    """Each JSON object of a file; other lines are passed over. A file that is one JSON document gives that."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError:
        return
    for line in [text] if text.lstrip().startswith("{\n") else text.splitlines():
        try:
            item = json.loads(line)
        except ValueError:
            continue
        if isinstance(item, dict):
            yield item


def count(record, *keys: str) -> int:
    """The sum of the whole numbers below `keys` of an object that may be anything."""
    values = [record.get(key) for key in keys] if isinstance(record, dict) else []
    return sum(value for value in values if type(value) is int)


TOKENS_IN = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


def dollars_of(value) -> float:
    return float(value) if type(value) in (int, float) else 0.0


def read_claude_transcript(path: str) -> Spent:
    """A conversation's own file. One message stands on several lines with the same usage: it counts once.

    cost-state lines, one at each orderly end, hold what the conversation has cost by then; after a kill -9 they begin at 0 again.
    """
    messages, error, earlier, cost = {}, "", 0.0, 0.0
    for item in read_json_lines(path):
        message = item.get("message")
        if item.get("type") == "cost-state":
            now = dollars_of(item.get("totalCostUSD"))
            earlier, cost = earlier + (cost if now < cost else 0.0), now
        if item.get("type") == "assistant" and isinstance(message, dict):
            messages[message.get("id")] = message.get("usage")
            error = text_of(message) if item.get("isApiErrorMessage") else ""
    return Spent(sum(count(usage, *TOKENS_IN) for usage in messages.values()),
                 sum(count(usage, "output_tokens") for usage in messages.values()), earlier + cost, error)


def text_of(message: dict) -> str:
    parts = message.get("content")
    texts = [str(part.get("text", "")) for part in parts if isinstance(part, dict)] if isinstance(parts, list) else [str(parts)]
    return " ".join(texts)


def read_claude(path: str) -> Spent:
    """`claude -p --output-format stream-json`: the last line, type result. A failed API call has subtype success and is_error."""
    result, stamp = {}, ""
    for item in read_json_lines(path):
        result = item if item.get("type") == "result" else result
        info = item.get("rate_limit_info")
        stamp = f"|{info['resetsAt']}" if isinstance(info, dict) and type(info.get("resetsAt")) is int else stamp
    usage, cost, denials = result.get("usage"), result.get("total_cost_usd"), result.get("permission_denials")
    denied = ", ".join(str(one.get("tool_name")) for one in denials if isinstance(one, dict)) if isinstance(denials, list) else ""
    return Spent(count(usage, *TOKENS_IN), count(usage, "output_tokens"), dollars_of(cost),
                 f"{result.get('result', '')}{stamp}" if result.get("is_error") else "", denied)


def read_codex(path: str) -> Spent:
    """`codex exec --json`: turn.completed carries the thread's usage so far, turn.failed and error the message."""
    usage, error, thread = None, "", ""
    for item in read_json_lines(path):
        thread = str(item.get("thread_id") or thread)
        if item.get("type") == "turn.completed":
            usage, error = item.get("usage"), ""
        elif item.get("type") in ("turn.failed", "error"):
            inner = item.get("error")
            error = str(inner.get("message") if isinstance(inner, dict) else item.get("message") or inner)
    return Spent(count(usage, "input_tokens"), count(usage, "output_tokens"), error=error, conversation=thread)


def read_gemini(path: str) -> Spent:
    """`gemini -o json`: one document with stats.models.NAME.tokens; or, behind stack traces, one with error."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = "\n" + file.read()
        told = json.JSONDecoder().raw_decode(text, text.rindex("\n{") + 1)[0]
        models, error = (told.get("stats") or {}).get("models") or {}, told.get("error") or {}
        tokens = [model.get("tokens") for model in models.values()]
        tokens_out = sum(count(one, "candidates", "thoughts") for one in tokens)
        return Spent(sum(count(one, "prompt") for one in tokens), tokens_out, error=str(error.get("message", "")),
                     conversation=str(told.get("session_id") or ""))
    except (OSError, ValueError, AttributeError):  # it was ended before it could tell
        return Spent()


def read_opencode(path: str) -> Spent:
    """`opencode run --format json`: a step_finish part for each step with its tokens and cost; error events."""
    total, error, session = Spent(), "", ""
    for item in read_json_lines(path):
        part, session = item.get("part") or {}, str(item.get("sessionID") or session)
        if item.get("type") == "step_finish":
            tokens = part.get("tokens")
            total = Spent(total.tokens_in + count(tokens, "input"), total.tokens_out + count(tokens, "output"),
                          total.cost_usd + dollars_of(part.get("cost")))
        elif item.get("type") == "error":
            error = dump_line(item.get("error"))[:300]
    return total._replace(error=error, conversation=session)


READERS = {"claude-transcript": read_claude_transcript, "claude": read_claude, "codex": read_codex, "gemini": read_gemini,
           "opencode": read_opencode}


def find_transcript(preset: Preset, conversation: str) -> str:
    """The file in which a CLI keeps the conversation, below the HOME of the caller; empty when there is none."""
    import glob

    folder = os.environ.get("CLAUDE_CONFIG_DIR") or os.path.join(os.path.expanduser("~"), ".claude")
    pattern = os.path.join(glob.escape(folder), preset.transcript.format(conversation=conversation)) if preset.transcript else ""
    return next(iter(glob.glob(pattern)), "") if pattern and conversation else ""


def can_resume(preset: Preset, claim: Claim) -> bool:
    """Whether the claim's conversation is one that was interrupted, so that the CLI goes on in it."""
    conversation = claim.task.get("conversation", {})
    is_begun = preset.resume and conversation.get("id") and "until" in conversation
    return bool(is_begun and (not preset.transcript or find_transcript(preset, conversation["id"])))


def read_spent(store: Store, agent: str, preset_name: str, conversation: str) -> Spent:
    """What an attempt has used so far, and the error that it ended with; empty for a command that is no preset."""
    preset = PRESETS.get(preset_name)
    if preset is None or not preset.reader:
        return Spent()
    if preset.reader == "claude-transcript":
        return read_claude_transcript(find_transcript(preset, conversation))
    spent = READERS[preset.reader](store.path("mailbox", agent, "output"))
    if spent == Spent() and preset.transcript:  # it was killed before it could tell
        return read_claude_transcript(find_transcript(preset, conversation))
    return spent


USAGE_FILE = "usage.jsonl"


def note_spent(store: Store, line: dict, spent: Spent) -> None:
    """One line an attempt in usage.jsonl. A resumed conversation's line holds all of it: readers take the last."""
    line = {"at": utc(CLOCK.now()), **line, "tokens_in": spent.tokens_in, "tokens_out": spent.tokens_out,
            "cost_usd": round(spent.cost_usd, 6)}
    try:
        store.disk.append(store.path(USAGE_FILE), (dump_line(line) + "\n").encode("utf-8"))
    except OSError as error:  # what becomes of the attempt does not hang on it
        say(f"{store.path(USAGE_FILE)}: {os.strerror(error.errno)}; the cost of {line['fence']} is not counted")


def read_spending(store: Store) -> list[dict]:
    """The lines of usage.jsonl, the last one of each conversation (or attempt, where conversations are not resumed)."""
    lines = {}
    for line in read_json_lines(store.path(USAGE_FILE)):
        kinds = {"task": str, "agent": str, "fence": str, "tokens_in": int, "tokens_out": int}
        if all(isinstance(line.get(key), kind) for key, kind in kinds.items()) and isinstance(line.get("cost_usd"), (int, float)):
            lines[line.get("conversation") or line["fence"]] = line
    return list(lines.values())


def cost_of_task(lines: list[dict], task_id: str) -> float:
    return sum_spending([line for line in lines if line["task"] == task_id])["cost_usd"]


def describe_overrun(task: Task, settings: Settings, cost_usd: float) -> str:
    """Empty while a task is within its budget, or has none."""
    budget = task.budget_usd or settings.task_budget
    return f"its budget of ${budget:.2f} is used up (${cost_usd:.2f})" if budget and cost_usd >= budget else ""


def describe_farm_overrun(settings: Settings, cost_usd: float) -> str:
    budget = settings.budget
    way_on = f"to go on: FARM_BUDGET={budget + cost_usd:.2f} ./farm.py up"
    return f"the farm's budget of ${budget:.2f} is used up (${cost_usd:.2f}); {way_on}" if budget and cost_usd >= budget else ""


def sum_spending(lines: list[dict]) -> dict:
    """{"tokens_in", "tokens_out", "cost_usd"} of some lines of usage.jsonl."""
    total = {key: sum(line[key] for line in lines) for key in ("tokens_in", "tokens_out", "cost_usd")}
    return {**total, "cost_usd": round(total["cost_usd"], 6)}


# ---------------------------------------------------------------------------------------------- trouble
# Why an attempt ended, and what follows: pure, but for limits.json. Words are looked for in a CLI's own error only, never in
# what an agent has written.

LIMITS_FILE = "limits.json"
PAUSE_SECONDS, PAUSE_SECONDS_MAX = 30.0, 900.0
TROUBLES = (  # the first that matches a CLI's error; StopFailure's own words (authentication_failed, rate_limit, ...) among them
    ("not logged in", r"not logged in|run /login|invalid api key|api key not valid|authentication|\bauth\b|oauth|account_on_hold|"
                      r"verification_required|cloud_credential|unauthori[sz]ed|_API_KEY\b|missing environment variable|\b401\b"),
    ("context used up", r"prompt is too long|context (window|length|limit)|maximum context"),
    ("usage limit", r"rate.?limit|limit reached|\blimit\b.*\bresets?\b|hit your .*limit|usage limit|out of (extra )?usage|quota|"
                    r"too many requests|\b429\b"),
    ("no credit", r"billing|credit balance|payment|\b402\b"),
    ("API failure", r"overloaded|api error|server.?error|bad gateway|unavailable|\b5\d\d\b|connection|network|econn|"
                    r"stream (closed|disconnected|error)|timed? ?out|high demand|^unknown\b"),
)
NO_FAULT = ("not logged in", "no credit", "usage limit", "API failure")  # of the attempt: released, not counted
# move: submit, fail, resume (fail, and the conversation goes on), release
Outcome = collections.namedtuple("Outcome", "move cause why")


def find_cause(error: str) -> str:
    """The cause behind a CLI's own error text; empty when it is none that has a policy of its own."""
    return next((cause for cause, pattern in TROUBLES if re.search(pattern, error, re.IGNORECASE)), "")


def judge_end(code: int, turn: dict, ending: dict, spent: Spent, tail: str) -> Outcome:
    """What becomes of an attempt: pure. The farm's own word first, then the CLI's error, then its hooks, then the exit code.

    A limit, a failing API and a missing login are no fault of the attempt: it is released, and goes on later. code: exit code.
    """
    if ending:
        return Outcome("fail", ending["event"], ending["message"])
    told = turn.get("message", "") if turn.get("event") == "StopFailure" else ""
    error = spent.error if re.search(r"\|\d{10}\b", spent.error) else told or spent.error  # the exact end of a limit goes first
    cause = find_cause(error) if error else ""
    if cause in NO_FAULT:
        return Outcome("release", cause, error)
    if error:
        return Outcome("fail", cause or "failed", error)
    if code == 0 and turn.get("state") in ("working", "waiting"):
        return Outcome("resume", "ended early", "its session was ended in the middle of a turn")
    if code == 0 or turn.get("state") == "over":
        return Outcome("submit", "done", f"denied: {spent.denied}" if spent.denied else "")
    if code > 128:
        cause = "killed (out of memory?)" if code == 137 else "killed"
        return Outcome("resume", cause, f"the agent was killed by signal {code - 128}: {tail}")
    return Outcome("fail", "crashed", f"the agent ended with exit code {code}: {tail}")


CUT_SECONDS = 75.0  # a clock shows whole minutes, cut off
UNIT_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
SPAN = r"\b(?:in|after)\s+((?:\d+(?:\.\d+)?\s*(?:days?|d|hours?|hrs?|h|minutes?|mins?|m|seconds?|secs?|s)\b[\s,]*(?:and\s+)?)+)"
DAY = r"(?:([A-Z][a-z]{2})[a-z]*\.?\s+(\d{1,2})(?:st|nd|rd|th)?,?\s+(?:(\d{4}),?\s+)?(?:at\s+)?)?"
TIME = r"(\d{1,2})(?::(\d\d))?\s*([ap]m)?\b(?:\s*\(([\w/+-]+)\))?"


def read_reset(text: str, now: float) -> float | None:
    """Epoch seconds at which a usage limit ends, from the CLI's words; None when they do not say.

    Known: `...|1765432100`, `resets 3pm (Europe/Berlin)`, `resets Nov 25, 3:30pm (UTC)`, `try again at Jan 2, 2027, 3pm`,
    `try again in 2 hours 5 minutes`, `retry after 30s`.
    """
    stamp = re.search(r"\|(\d{10})\b", text)
    if stamp:
        return float(stamp[1])
    span = re.search(SPAN, text, re.IGNORECASE)
    if span:
        parts = re.findall(r"(\d+(?:\.\d+)?)\s*([dhms])", span[1], re.IGNORECASE)
        return now + sum(float(number) * UNIT_SECONDS[unit.lower()] for number, unit in parts)
    return read_clock(text, now)


def read_clock(text: str, now: float) -> float | None:
    """The next time at which a clock shows `resets [Nov 25, [2027,]] 3:30pm [(Zone)]`, in the reader's zone where none is named."""
    import datetime
    import zoneinfo

    found = re.search(r"(?:resets?|again|until)\s+(?:at\s+|on\s+)?" + DAY + TIME, text, re.IGNORECASE)
    if not found or not (found[5] or found[6]):
        return None
    month, day, year, hour, minute, half, zone_name = found.groups()
    try:
        zone = zoneinfo.ZoneInfo(zone_name) if zone_name else None
        here = datetime.datetime.fromtimestamp(now, zone)
        hour = (int(hour) % 12 if int(hour) <= 12 else 24) + 12 * (half.lower() == "pm") if half else int(hour)
        at = here.replace(hour=hour, minute=int(minute or 0), second=0, microsecond=0)
        if month:
            at = at.replace(year=int(year or at.year), month=MONTHS.index(month.lower()) + 1, day=int(day))
    except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError):
        return None
    if at <= here and not year:
        at = at.replace(year=at.year + 1) if month else at + datetime.timedelta(days=1)
    return at.timestamp() + CUT_SECONDS


def read_limits(store: Store) -> dict[str, dict]:
    """preset -> {"cause", "until" (UTC; empty: until a person has acted), "said", "count"} of what holds a CLI up."""
    return {name: limit for name, limit in store.read_part(LIMITS_FILE, "presets").items()
            if isinstance(limit, dict) and is_texts([limit.get(key) for key in ("cause", "until", "said")])}


def find_limit(store: Store, preset: str, now: float) -> str:
    """Why no agent of this preset starts now, in words; empty when it may."""
    limit = read_limits(store).get(preset) if preset else None
    if not limit or limit["until"] and limit["until"] <= utc(now):
        return ""
    login = " (a login by environment variable: ./farm.py down first)" if limit["cause"] == "not logged in" else ""
    until = f" until {limit['until']}" if limit["until"] else f", until a person mends it and types ./farm.py up{login}"
    return f"{preset}: {limit['cause']}{until} ({one_line(limit['said'], 80)})"


def write_limits(tx: Transaction, limits: dict) -> None:
    tx.store.write_durably(LIMITS_FILE, (dump_line({"schema": SCHEMA, "presets": limits}) + "\n").encode("utf-8"))


def forget_limits(tx: Transaction) -> None:
    """A person has started or resumed the farm, and knows better: every CLI is tried again."""
    if read_limits(tx.store):
        write_limits(tx, {})


def pause_until(outcome: Outcome, times: int, now: float) -> str:
    """UTC; empty when only a person can mend it. times: how often in turn."""
    if outcome.cause not in ("usage limit", "API failure"):
        return ""
    at = read_reset(outcome.why, now) if outcome.cause == "usage limit" else None
    return utc(at or now + min(PAUSE_SECONDS * 2.0 ** (times - 1), PAUSE_SECONDS_MAX))


def note_limit(tx: Transaction, preset: str, outcome: Outcome, now: float) -> str:
    """Write down what holds a preset up; until when, in UTC.

    One attempt's success ends a failing API, and nothing else: it may have asked before a limit began. A failing API never takes
    the place of a limit that lasts longer.
    """
    limits = read_limits(tx.store)
    before = limits.get(preset, {})
    is_on = bool(before) and (not before["until"] or before["until"] > utc(now))
    if outcome.move == "release":
        times = count(before, "count") + 1 if before.get("cause") == outcome.cause else 1
        until = pause_until(outcome, times, now)
        if is_on and outcome.cause == "API failure" and before["cause"] != "API failure":
            return before["until"]
        limits[preset] = {"cause": outcome.cause, "until": until, "said": outcome.why, "count": times}
    elif before and (before["cause"] == "API failure" or not is_on):
        del limits[preset]
    else:
        return ""
    write_limits(tx, limits)
    return limits.get(preset, {}).get("until", "")

# ---------------------------------------------------------------------------------------------- sessions
# What psutil and tmux tell about the processes behind the panes. Words on a screen are no source here.

CONTROL = "control"

Session = collections.namedtuple("Session", "name pane pid dead exit_status signal activity path")
Usage = collections.namedtuple("Usage", "cpu_percent rss_bytes processes is_zombie")


def farm_socket(repo: str) -> str:
    """The farm's private tmux server, `farm-<repo>-<hash4>`; the scripts compute the same from the folder's path."""
    import hashlib

    path = os.fsencode(repo)
    digest = hashlib.sha1(b"blob %d\0" % len(path) + path, usedforsecurity=False).hexdigest()[:4]
    return f"farm-{re.sub('[^A-Za-z0-9_-]', '-', os.path.basename(repo))[:30]}-{digest}"


def probe_sessions(socket: str, timeout: float = 600.0) -> dict[str, Session]:
    """name -> Session of every session on the farm's server; empty when no server runs."""
    result = run_script("probe-tmux.sh", "-L", socket, allow=(0, 3), timeout=timeout)
    sessions = {}
    for name, pane, pid, dead, status, signal, activity, path in (row[:8] for row in read_tsv(result.stdout)):
        exit_status = int(status) if status.isdigit() else None
        sessions[name] = Session(name, pane, int(pid), dead == "1", exit_status, signal.strip("-"), float(activity or 0), path)
    return sessions


def process_children() -> dict[int, list]:
    """pid -> its children's psutil.Process, from one pass over the machine's processes."""
    psutil = import_package("psutil")
    children = collections.defaultdict(list)
    for process in psutil.process_iter(["ppid"]):
        children[process.info["ppid"]].append(process)
    return children


def tree_of(pid: int, children: dict) -> list:
    """The processes at and below `pid`, parents first."""
    psutil = import_package("psutil")
    try:
        found = [psutil.Process(pid)]
    except psutil.NoSuchProcess:
        return []
    for process in found:
        found += children.get(process.pid, [])
    return found


def measure(tree: list) -> Usage:
    """CPU since each process started (percent of one core), memory and count of a process tree."""
    psutil = import_package("psutil")
    cpu = rss = 0.0
    zombie, now = False, CLOCK.now()
    for index, process in enumerate(tree):
        try:
            with process.oneshot():
                times = process.cpu_times()
                cpu += 100 * (times.user + times.system) / max(now - process.create_time(), 1)
                rss += process.memory_info().rss
                zombie |= index == 0 and process.status() == psutil.STATUS_ZOMBIE
        except psutil.Error:
            continue
    return Usage(round(cpu, 1), int(rss), len(tree), zombie)


def cpu_time_of(tree: list) -> float:
    """CPU seconds of a process tree, those of children that have ended included."""
    psutil = import_package("psutil")
    total = 0.0
    for process in tree:
        try:
            total += sum(process.cpu_times()[:4])
        except psutil.Error:
            continue
    return total


def find_by_environment(**wanted: str) -> list:
    """(process, its FARM_AGENT_NAME) of those whose environment at their start had these values; this one left out."""
    psutil = import_package("psutil")
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except (psutil.Error, OSError):
            continue
        if process.pid != os.getpid() and all(environment.get(key) == value for key, value in wanted.items()):
            found.append((process, environment.get("FARM_AGENT_NAME", "")))
    return found


def end_processes(processes: list, seconds: float = 3.0) -> None:
    """SIGTERM, then SIGKILL to what is left after `seconds`. psutil checks pid and start time before each signal."""
    psutil = import_package("psutil")
    for signal_name in ("terminate", "kill"):
        for process in processes:
            try:
                getattr(process, signal_name)()
            except psutil.Error:
                continue
        deadline = CLOCK.monotonic() + seconds
        while (processes := [process for process in processes if start_of(process.pid) and process.is_running()]):
            if CLOCK.monotonic() > deadline:
                break
            time.sleep(0.01)


def end_cause(session: Session | None) -> str:
    """Why a session is over, from what tmux knows of its process."""
    if session is None:
        return "its session is gone"
    if session.signal or (session.exit_status or 0) > 128:
        number = session.signal or str(session.exit_status - 128)
        return f"killed by signal {number}" + (" (out of memory?)" if number in ("9", "KILL") else "")
    if session.exit_status is None:  # tmux has seen the pane close and has not yet been told how
        return "its process is gone"
    return "done" if session.exit_status == 0 else f"crashed with exit code {session.exit_status}"


START_SECONDS = 120.0  # a CLI that has not taken its prompt by then asks something on its screen


def session_state(session: Session | None, told: dict, usage: Usage | None, claim: Claim | None, turn: dict, preset: str) -> str:
    """An agent's state, best source first: the process tree, the loop's notes, its CLI's hooks."""
    if session is None or session.dead:
        return "parked" if told.get("parked") else "stopped" if session is None and not told.get("cause") else "dead"
    if usage and usage.is_zombie:
        return "zombie"
    if claim is None or not claim.task:
        return "idle"
    if turn.get("state") == "waiting":
        return "waiting"
    if told.get("still_since"):
        return "stuck"
    has_hooks = preset in PRESETS and PRESETS[preset].reader == "claude-transcript"
    if turn or not has_hooks:
        return "working"
    return "starting" if CLOCK.now() - epoch(claim.claimed_at) < START_SECONDS else "waiting"


def explain_state(state: str, session: Session | None, told: dict, claim: Claim | None, turn: dict) -> tuple[str, str]:
    """(since when, in UTC, and why) an agent is in its state."""
    since, cause = claim.claimed_at if claim else told.get("since", ""), told.get("cause", "")
    if state == "waiting":
        return turn.get("at", since), turn.get("message", "") or "it has not taken its prompt: look at its screen"
    if state == "stuck":
        return told["still_since"], "no output, and nothing runs"
    return since, cause or (end_cause(session) if session and session.dead else "")


class RestartPolicy:
    """When a session that ended may start again: backoff 1 s, 2 s, ... 5 min; five ends in 15 min park it."""

    PARK_AFTER, WINDOW_SECONDS, DELAY_MAX = 5, 900.0, 300.0

    def recent(self, ends: list, now: float) -> list:
        return [end for end in ends if now - end < self.WINDOW_SECONDS]

    def start_at(self, ends: list, now: float) -> float | None:
        """Epoch seconds of the next start; None: parked."""
        recent = self.recent(ends, now)
        if len(recent) >= self.PARK_AFTER:
            return None
        return recent[-1] + min(2.0 ** (len(recent) - 1), self.DELAY_MAX) if recent else now


# ---------------------------------------------------------------------------------------------- planner
# Which tree to gate next. Pure: no I/O, no clock, so that tests replay thousands of queues. Called anew at each tick with all the
# evidence there is; it remembers nothing, so a kill, a new entry or a person's commit is nothing special to it.

Evidence = collections.namedtuple("Evidence", "greens reds")
Evidence.__doc__ = "How often one tree passed and failed the gate; a time-out or a killed gate counts as neither."

Test = collections.namedtuple("Test", "entries kind chance")
Test.__doc__ = """A gate run to start: `entries` merged in this order on the target, () for the target as it is.

`kind` is main (the next step), confirm (a single suspect again), target (is it the target itself?) or speculative
(useful if gates that have no verdict yet go as expected); `chance` that its verdict will be used, 1.0 for the next.
"""

Plan = collections.namedtuple("Plan", "land guilty target_red tests abandon")
Plan.__doc__ = """What to do now: land the first `land` entries, return the entry `guilty` (or None), start `tests`.

`target_red` pauses the queue. `abandon` are running tests that no branch can use any more. Landing and returning change
the queue, so plan again after them; `tests` holds meanwhile (say, while a file in the checkout is in the way).
"""

Node = collections.namedtuple("Node", "good rest bound reds trusted")
Node.__doc__ = """A place in the decision tree: `good` entries pass together, `rest` is open, in landing order.

`good + rest[:bound]` is known to fail (0: nothing is) and was red `reds` times; `trusted`: `good` was seen green.
"""

Known = collections.namedtuple("Known", "look rate reds strict")
Known.__doc__ = "What one call of `plan` takes for granted: tuple -> Evidence, failure rate, reds that prove, strict."

Question = collections.namedtuple("Question", "entries green_chance if_green if_red")
Question.__doc__ = "The test that a node asks for, and the nodes after either answer (None: nothing left to plan)."

TARGET_REDS = 2  # a pause calls a person: one unlucky run is not enough
CHANCE_OF_FLAKE = 0.03  # a guess that only ranks speculation: that a repeated run answers otherwise than expected
LEAST_CHANCE = 0.1  # rarer than this, a spare slot is better left to a lone diagnostic run: it saves < 1 % of time
WRONG_RETURN_ODDS = 1e-5  # how seldom chance alone may return a good entry, once the gate is known to flake


def failure_rate(returned: int, done: int) -> float:
    """Estimate the chance that an entry fails, from the `returned` ones among those `done` (landed or returned).

    The mean of a Beta(0.5, 9.5) prior after that evidence: 5 % before the first entry, and soon the farm's own rate.
    """
    return (0.5 + returned) / (10 + done)


def reds_needed(flaky_trees: int, green_trees: int) -> int:
    """Say how many reds prove a failure, when `flaky_trees` of the `green_trees` ever gated were also red.

    Two for a gate that was never seen to contradict itself. One that was needs as many as make a wrong return rarer
    than WRONG_RETURN_ODDS, at least three. Count over the farm's whole memory: what one queue sees is too little.
    """
    if not flaky_trees:
        return 2
    # So many that chance alone gives them too seldom: rate ** reds <= WRONG_RETURN_ODDS. Above 0.3 nothing would ever be proven.
    rate = min(0.3, flaky_trees / max(flaky_trees, green_trees))
    return max(3, math.ceil(math.log(WRONG_RETURN_ODDS) / math.log(rate)))


def group_size(rate: float, available: int) -> int:
    """Choose how many untested entries to test at once so that green is as likely as red: (1 - rate) ** size = 1/2.

    An answer that is as likely as its opposite tells most: one bit.
    """
    return max(1, min(available, round(math.log(2) / -math.log(1 - rate))))


def median_cut(rate: float, bound: int) -> int:
    """Choose where to cut `bound` entries that fail together: the median of the first failing one's place.

    The place follows the geometric distribution truncated at `bound`; the result is in 1 .. bound - 1. The middle, where
    bisection cuts, is right for rare failures only: the more entries fail, the nearer to the front is the first of them.
    """
    passes = 1 - rate
    # P(the first `cut` pass, given that not all do) = (passes**cut - passes**bound) / (1 - passes**bound) = 1/2, for the cut.
    half = (1 + passes**bound) / 2
    return max(1, min(bound - 1, round(math.log(half) / math.log(passes))))


def count_green(evidence: list, strict: bool) -> int:
    """Count the leading entries that are good, given the Evidence of each prefix: up to the last green prefix.

    A prefix passes for all in it, so a fault that a later entry mends is none; `strict` stops at the first not green.
    """
    greens = [found.greens > 0 for found in evidence]
    if strict:
        return [*greens, False].index(False)
    return max((length for length, green in enumerate(greens, 1) if green), default=0)


def settle(node: Node, known: Known) -> Node:
    """Move `node` past all that existing verdicts answer: more entries known good, a closer failing bound."""
    good, rest, bound, reds, trusted = node
    evidence = [known.look(good + rest[:length]) for length in range(1, len(rest) + 1)]
    green = count_green(evidence, known.strict)
    if green:  # a bound inside the green prefix is void: what failed there was mended by a later entry, or was a flake
        good, rest, evidence, trusted = good + rest[:green], rest[green:], evidence[green:], True
        bound, reds = (bound - green, reds) if bound > green else (0, 0)
    # A tree that was ever green counts as green: a pass is proof that it can, a red may be the gate's own fault.
    red = next((length for length, found in enumerate(evidence, 1) if found.reds and not found.greens), 0)
    if red and red == bound:
        reds = max(reds, evidence[red - 1].reds)
    elif red and (not bound or red < bound):
        bound, reds = red, evidence[red - 1].reds
    return Node(good, rest, bound, reds, trusted)


def drop_guilty(node: Node, known: Known) -> tuple[Node, tuple]:
    """Settle `node` and take out every entry whose guilt is proven; gives the node and those entries.

    Proof: without the entry the tree is green, with it red as often as needed and never green.
    """
    guilty = ()
    node = settle(node, known)
    while node.bound == 1 and node.reds >= known.reds and node.trusted:
        guilty += node.rest[:1]
        node = settle(Node(node.good, node.rest[1:], 0, 0, True), known)
    return node, guilty


def ask(node: Node, known: Known) -> Question:
    """Choose the test that tells most at `node`, which is settled and has entries left."""
    good, rest, bound, reds, trusted = node
    if bound == 1 and reds >= known.reds:  # only the target's own tree has no verdict yet
        return Question((), 1 - CHANCE_OF_FLAKE, Node(good, rest[1:], 0, 0, True), None)
    passes = 1 - known.rate
    if bound == 1:  # the suspect once more: two reds on one tree are what guilt takes
        size, green_chance = 1, CHANCE_OF_FLAKE
    elif bound:  # within the failing ones
        size = 1 if known.strict else median_cut(known.rate, bound)
        green_chance = (passes**size - passes**bound) / (1 - passes**bound)
    else:
        size = 1 if known.strict else group_size(known.rate, len(rest))
        green_chance = passes**size
    entries = good + rest[:size]
    left = bound - size if bound > size else 0  # green here leaves the fault among the others; red moves the bound to here
    if_green = Node(entries, rest[size:], left, reds if left else 0, True)
    return Question(entries, green_chance, if_green, Node(good, rest, size, reds + 1 if bound == size else 1, trusted))


def can_use(node: Node, entries: tuple) -> bool:
    """Say whether a branch below the settled `node` may still ask for `entries`.

    It must go on from what is known good and leave out only entries that may yet prove guilty. More than the failing
    bound is of no use: it can only pass if that red was chance, and then the repeated run will say so.
    """
    good, rest, bound, _, trusted = node
    if not entries:
        return not trusted
    tail = entries[len(good):]
    if entries[: len(good)] != good or not tail or (0 < bound < len(tail) and tail[:bound] == rest[:bound]):
        return False
    places = iter(rest)
    return all(entry in places for entry in tail)  # a shared iterator: the same order, gaps allowed


def kind_of_test(question: Question, node: Node, order: int) -> str:
    """Name what a test is for (see `Test`); `order` is 0 at the root of the decision tree."""
    if not question.entries:
        return "target"
    if node.bound == 1:
        return "confirm"
    return "speculative" if order else "main"


def speculate(root: Node, known: Known, free: int, started: set) -> list[Test]:
    """Choose up to `free` tests not in `started`: walk the decision tree, the likeliest node first."""
    tests, serial = [], 0
    heap = [(-1.0, serial, root)]  # serial: of equal chances the earlier pushed, and two Nodes are never compared
    while heap and len(tests) < free:
        minus_chance, order, node = heapq.heappop(heap)
        node, _ = drop_guilty(node, known)  # verdicts that are there already may answer what this node would ask
        if not node.rest:
            continue
        question = ask(node, known)
        if question.entries not in started:
            tests.append(Test(question.entries, kind_of_test(question, node, order), -minus_chance))
            started = started | {question.entries}
        shares = ((question.if_green, question.green_chance), (question.if_red, 1 - question.green_chance))
        for branch, share in shares:
            serial += 1
            if branch and -minus_chance * share >= LEAST_CHANCE:
                heapq.heappush(heap, (minus_chance * share, serial, branch))
    return tests


def plan(
    queue: tuple, verdict_of, slots: int, rate: float, running: tuple = (), *, reds: int = 2, strict: bool = False
) -> Plan:
    """Decide what lands, who is guilty and which trees to gate next: adaptive group testing of the merge queue.

    `queue`: entry ids in landing order. `verdict_of(entries) -> Evidence` of the tree that merging these entries on the
    target gives, `verdict_of(())` of the target itself. `slots`: gates that may run at once, `running` those that do
    (as tuples). `rate`: see `failure_rate`. `reds`: see `reds_needed`. `strict`: each prefix lands by its own green.

    Sources: generalised binary splitting (Hwang 1972) with groups sized and cut by the entries' failure rate (Sobel and
    Groll 1959); running ahead of verdicts as in Zuul's dependent pipeline, the likeliest outcomes first as in Uber's
    SubmitQueue. Added here: tests are prefixes in landing order, so each green one lands as it is; guilt takes a
    repeated red and a green tree without the entry, so neither a flake nor a red target gets anyone returned.
    """
    known = Known(functools.lru_cache(maxsize=None)(verdict_of), min(max(rate, 1e-6), 0.99), reds, strict)
    target = known.look(())
    start = settle(Node((), tuple(queue), 0, 0, target.greens > 0), known)
    if not start.trusted and target.reds >= TARGET_REDS:
        return Plan(0, None, True, (), tuple(running))
    root, guilty = drop_guilty(start, known)
    useful = [entries for entries in running if can_use(root, entries)]
    tests = speculate(root, known, slots - len(useful), set(useful))
    abandon = tuple(entries for entries in running if entries not in useful)
    return Plan(len(start.good), guilty[0] if guilty else None, False, tuple(tests), abandon)

# ---------------------------------------------------------------------------------------------- verdicts and gates
# A gate is a user's command on one exact tree. Its exit code is evidence about that tree for ever; a time-out, a kill or a
# gate that edits what it tests is no evidence at all.

# Bytes of a gate's output that are kept: what it set out to do, and how it ended. A gate that prints 100 MB fills no disk.
OUTPUT_HEAD, OUTPUT_TAIL = 64 * 1024, 256 * 1024

Verdict = collections.namedtuple("Verdict", "colour exit_code seconds note")
Verdict.__doc__ = "One run's colour (green, red or none), the gate's exit code, its seconds, and why it is none."
NO_VERDICT = Verdict("none", -1, 0.0, "")


class Verdicts:
    """What gates said of trees: results/TREE-KEY.json, KEY for the gate's command and the environment names that count.

    A verdict is evidence for ever. A gate that was killed or timed out gave none. By tree and not by commit: a rebase, another
    order or a restart that leads to the same files asks nothing again. Only the merger, one a farm, writes here.
    """

    def __init__(self, store: Store, gate: str, env_names: str):
        import hashlib

        self.store, self.gate = store, gate
        named = [[name, os.environ.get(name)] for name in sorted(env_names.replace(",", " ").split())]
        self.key = hashlib.sha1(json.dumps([gate, named]).encode(), usedforsecurity=False).hexdigest()[:8]
        self.memo: dict[str, Evidence] = {}  # the planner asks for each prefix at each tick
        self.green_trees = self.flaky_trees = 0  # over all that was ever gated: one queue alone shows too little of a gate's flakes
        for name in self.store.disk.list_folder(self.store.path("results")):
            if name.endswith(f"-{self.key}.json"):
                self.count(self.evidence_in(os.path.join("results", name)), 1)

    def count(self, found: Evidence, step: int) -> None:
        """Keep the numbers of trees that were ever green, and of those that were red as well."""
        self.green_trees += step * bool(found.greens)
        self.flaky_trees += step * bool(found.greens and found.reds)

    def name_of(self, tree: str, ending: str) -> str:
        return os.path.join("results", f"{tree[:16]}-{self.key}.{ending}")

    def evidence(self, tree: str) -> Evidence:
        """Greens and reds of a tree. Without a gate every tree counts as green. Raises DamagedState for a hand-broken file."""
        if not self.gate:
            return Evidence(1, 0)
        if tree not in self.memo:
            self.memo[tree] = self.evidence_in(self.name_of(tree, "json"))
        return self.memo[tree]

    def evidence_in(self, name: str) -> Evidence:
        colours = [run.get("colour") for run in (self.store.read_json(name) or {}).get("runs", [])]
        return Evidence(colours.count("green"), colours.count("red"))

    def record(self, tree: str, verdict: Verdict) -> None:
        """Add one run's verdict, durably."""
        name = self.name_of(tree, "json")
        data = self.store.read_json(name) or {"schema": SCHEMA, "tree": tree, "gate": self.gate, "runs": []}
        data["runs"].append({"at": utc(CLOCK.now()), **verdict._asdict()})
        self.count(self.evidence(tree), -1)  # taken out as it was, put back as it is
        self.store.write_durably(name, (json.dumps(data) + "\n").encode("utf-8"))
        self.memo.pop(tree, None)
        self.count(self.evidence(tree), 1)

    def tail(self, tree: str, lines: int = 60) -> str:
        """The end of what the gate printed about a tree."""
        try:
            with open(self.store.path(self.name_of(tree, "log")), encoding="utf-8", errors="replace") as file:
                return printable("".join(file.readlines()[-lines:]))[-16_000:]
        except FileNotFoundError:
            return ""


class Gate:
    """One run of the gate on one tree, in a slot: a process group of its own, time-out, bounded output.

    ids: the entries whose chain it tests, () for the target. diagnosis: the returned task that runs alone. Two threads fill in
    `verdict` (or `failure`) and set `is_done` last; the merger reads them after that, and starts, abandons and ends it.
    """

    def __init__(self, slot: int, ids: tuple, commit: str, tree: str, diagnosis: Task | None = None):
        self.slot, self.ids, self.commit, self.tree, self.diagnosis = slot, ids, commit, tree, diagnosis
        self.is_diagnosis = diagnosis is not None
        self.started = CLOCK.monotonic()
        self.is_done = self.is_abandoned = False
        self.verdict: Verdict | None = None
        self.failure: Exception | None = None

    def start(self, folder: str, settings: Settings, log: str, wake) -> None:
        """Run the gate in `folder` (a worktree at the commit) on a thread of its own; `wake` is set when it is over.

        It sees the caller's environment without FARM_*, but FARM_PORT, FARM_SLOT (the folder, by which its processes are found)
        and a TMPDIR of its own. Standard input is /dev/null; both outputs go to `log`.
        """
        import shutil
        import subprocess
        import threading

        temp = folder + ".tmp"
        shutil.rmtree(temp, ignore_errors=True)  # what one gate left there is not the next one's business
        os.makedirs(temp, exist_ok=True)
        # A gate that runs farm.py (its own tests, say) must not meet this farm; what is left can be changed by the user.
        env = {key: value for key, value in os.environ.items() if not key.startswith("FARM_")}
        port = port_base(os.path.dirname(folder)) + self.slot
        env.update(TMPDIR=temp, FARM_PORT=str(port), FARM_SLOT=folder, GIT_TERMINAL_PROMPT="0")
        self.folder, self.process = folder, subprocess.Popen(
            ["bash", "-c", settings.gate], cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True)
        # One thread drains the pipe, or a gate that prints much would stand still; one waits, as only its parent can.
        threads = [threading.Thread(target=self.keep_output, args=(log,), daemon=True)]
        threads.append(threading.Thread(target=self.watch, args=(settings.gate_timeout, threads[0], wake), daemon=True))
        for thread in threads:
            thread.start()

    def keep_output(self, log: str) -> None:
        """The head and the tail of the output into `log`; whatever lies between is counted, not kept."""
        head, tail, dropped = b"", b"", 0
        while chunk := os.read(self.process.stdout.fileno(), 65536):
            room = OUTPUT_HEAD - len(head)
            head, tail = head + chunk[:room], tail + chunk[room:]
            dropped += max(0, len(tail) - OUTPUT_TAIL)
            tail = tail[-OUTPUT_TAIL:]
        with open(log, "wb") as file:
            file.write(head + (b"\n[... %d bytes left out ...]\n" % dropped if dropped else b"") + tail)

    def watch(self, seconds: float, reader, wake) -> None:
        """Wait for the end or the time-out, end the whole group, judge. On the gate's own thread."""
        try:
            self.verdict = self.wait_for_verdict(seconds, reader)
        except Exception as error:  # a thread that died in silence would hold its slot for ever; the merger raises it again
            self.failure = error
        self.is_done = True
        wake.set()

    def wait_for_verdict(self, seconds: float, reader) -> Verdict:
        """What the gate says, once nothing of it runs any more. Raises FarmError when it could not be ended."""
        import signal
        import subprocess

        try:
            code = self.process.wait(seconds)
            # By the kernel (out of memory), by a person, or its shell tells so of a child: that says nothing about the tree.
            killed = -code if code < 0 else code - 128 if code in (128 + signal.SIGKILL, 128 + signal.SIGTERM) else 0
            kind = "green" if code == 0 else "none" if killed else "red"
            note = f"the gate was killed by signal {killed}" if killed else ""
        except subprocess.TimeoutExpired:
            code, kind, note = -1, "none", f"the gate took longer than {seconds:.0f} s and was ended"
        self.end_group()
        reader.join(5)  # its writers are gone; one that was handed the pipe over a socket is not waited for
        return Verdict(kind, code, round(CLOCK.monotonic() - self.started, 2), note)

    def end_group(self) -> None:
        """Kill what is left of the gate, also what moved to a session of its own: a gate that is over has no business running."""
        import subprocess

        kill_group(self.process.pid)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            pass  # in the hands of a kernel that waits for a disk; end_gates sees it, and raises its error
        end_gates(self.folder)


def port_base(folder: str) -> int:
    """Where the ports of a farm begin, the same at each start: slots have the first hundred, agents the next 900."""
    import zlib

    return 10000 + zlib.crc32(os.fsencode(folder)) % 19000


# ---------------------------------------------------------------------------------------------- merge queue
# The one place that moves the target. It computes everything anew from git and the queue file at each tick, and keeps only what
# cannot be computed: verdicts, and the intent of a landing that has begun.

AGEING_SECONDS = 600.0  # in the order of a gate's time: urgent work goes first, but a day of it keeps nobody waiting for a day
ASK_AGAIN_SECONDS, ASK_AGAIN_SECONDS_MAX = 5.0, 3600.0  # for a verdict of a target that gave none, longer at each time

Step = collections.namedtuple("Step", "id status commit tree detail")
Step.__doc__ = "One line of merge-chain.sh, which says what its status and detail mean; commit and tree of the chain after it."


def merge_order(tasks: list[Task], now: float) -> list[Task]:
    """Priority, then first come; each AGEING_SECONDS of waiting lift an entry by one, so that none starves."""
    def key(task: Task) -> tuple:
        return -task.priority - int((now - epoch(task.submitted_at)) // AGEING_SECONDS), task.queue_seq

    return sorted(tasks, key=key)


def chain_line(task: Task) -> str:
    """One entry of merge-chain.sh's input."""
    fields = (task.id, task.commit, str(int(epoch(task.submitted_at))), task.agent, one_line(task.title))
    return "\t".join(escape_field(field) for field in fields) + "\n"


class MergeQueue:
    """Lands ready tasks on the target, never through a red tree. Crash-only: durable are git, the queue file, the verdicts
    and the intent of a landing; everything else is computed again.
    """

    def __init__(self, store: Store, settings: Settings, target: str, slots_folder: str):
        import threading

        self.store, self.settings, self.target, self.slots_folder = store, settings, target, slots_folder
        self.verdicts = Verdicts(store, settings.gate, settings.gate_env)
        self.slots = settings.slots or default_slots()
        self.gates: list[Gate] = []  # those that run, and those that are over and not yet judged
        self.wake = threading.Event()
        self.is_recovered = False  # whether `recover` has seen to what a killed merger left
        # The tick's view, made anew each time:
        self.base: Step | None = None  # the target
        self.tasks: dict[str, Task] = {}  # what is ready, in landing order
        self.held: dict[str, str] = {}  # id -> the entry that it is held behind
        self.walked: dict[tuple, Step | None] = {}  # ids -> the last step of their chain
        self.trouble: tuple[str, str] | None = None  # what only a person can mend, and how
        # What saves work from one tick to the next:
        self.steps: dict[tuple, Step] = {}  # (commit before it, id, its commit) -> what merging it there gave
        self.front: list[str] = []  # ids that were ever part of a test, in that order
        self.just_landed: Step | None = None  # where we have just put the target
        # Trees that gave no verdict: how often, why, and when to ask the target again. Never on disk, for it is no evidence.
        self.unjudged, self.notes, self.ask_again_at = collections.Counter(), {}, 0.0
        self.diagnoses: list[Task] = []  # returned entries that an idle slot may gate alone
        # What the verb reports at its end:
        self.moved: list[tuple[str, str, str]] = []
        self.counts = collections.Counter()

    # -- the chain

    def run_chain(self, tasks: list[Task], base: str) -> list[Step]:
        """merge-chain.sh from the commit `base` on: the first Step is the base itself."""
        args = ["-C", self.store.repo, "-b", self.target, "-s", self.settings.style, "-B", base]
        result = run_script("merge-chain.sh", *args, stdin="".join(map(chain_line, tasks)),
                            env={"FARM_CONFLICTS": self.store.path("returns")})
        return [Step(*(row + [""] * 5)[:5]) for row in read_tsv(result.stdout)]

    def show_tip(self, revision: str) -> Step:
        """A commit and its tree, as the Step that a chain begins with."""
        commit, tree = read_tsv(run_script("show-tip.sh", "-C", self.store.repo, revision).stdout)[0]
        return Step("base", "-", commit, tree, "")

    def chain(self, tasks: list[Task], parent: str) -> list[Step]:
        """Each task merged on those before it that merge, from `parent` on; steps known from earlier ticks are not redone."""
        known, tip = [], parent  # the chain is deterministic, so the same place and the same commit always give the same step
        for task in tasks:
            step = self.steps.get((tip, task.id, task.commit))
            if step is None or (step.status == "held" and tip == parent):  # what held it has landed: now it conflicts
                break
            known.append(step)
            tip = step.commit if step.status == "ok" else tip
        rest = tasks[len(known):]
        if not rest:
            return known
        steps = self.run_chain(rest, tip)[1:]
        if tip != parent and any(step.status != "ok" for step in steps):
            # The script takes `tip` for the target. Only the whole chain tells a conflict with the target from one with the work
            # ahead, and what has landed from what is only in the work ahead, which may yet come back.
            known, rest, tip = [], tasks, parent
            steps = self.run_chain(rest, tip)[1:]
        for task, step in zip(rest, steps, strict=True):
            self.steps[(tip, task.id, task.commit)] = step
            tip = step.commit if step.status == "ok" else tip
        return known + steps

    def evidence_of(self, ids: tuple) -> Evidence:
        """Evidence for the target plus exactly these entries in this order. A chain that was never built has none."""
        step = self.known_step(ids)
        return self.verdicts.evidence(self.next_to_gate(step)[1]) if step else Evidence(0, 0)

    def line_of(self, step: Step) -> list[tuple[str, str]]:
        """(commit, tree) of what must be green before the target may be at `step`: its own commit, and with `strict` also the
        ones that rebase puts before it, for they come on the target's first-parent line as well.
        """
        before = step.detail.split() if self.settings.strict and step.status == "ok" else ()
        return [*(tuple(pair.split(":")) for pair in before), (step.commit, step.tree)]

    def next_to_gate(self, step: Step) -> tuple[str, str]:
        """The first commit of its line that was never green, and its tree; the last one when all were. One gate after the other
        judges a line: its first red settles it, and all green is green.
        """
        line = self.line_of(step)
        return next((place for place in line if not self.verdicts.evidence(place[1]).greens), line[-1])

    def known_step(self, ids: tuple) -> Step | None:
        """The last step of a chain that was built already; remembered for a tick, since the planner asks for every prefix."""
        if not ids:
            return self.base
        # Prefix by prefix, each from the one before it: fifty entries take fifty look-ups, not fifty times fifty.
        if ids not in self.walked:
            before = self.known_step(ids[:-1])
            step = self.steps.get((before.commit, ids[-1], self.tasks[ids[-1]].commit)) if before else None
            self.walked[ids] = step if step and step.status == "ok" else None
        return self.walked[ids]

    def step_of(self, ids: tuple) -> Step | None:
        """The last step of the chain of `ids` on the target; None when they do not merge so."""
        if not ids:
            return self.base
        steps = self.chain([self.tasks[task_id] for task_id in ids], self.base.commit)
        return steps[-1] if all(step.status == "ok" for step in steps) else None

    # -- one step

    def tick(self) -> bool:
        """One look at everything; True when something moved, so that another look is due at once."""
        self.trouble = None
        if self.reap_gates():
            return True
        self.order_tasks()
        if not self.tasks and not self.gates and not self.diagnoses:  # idle: not even a look at the target
            self.held, self.just_landed = {}, None
            self.publish(())
            return False
        # A person's commit shows at the latest when the swap is refused; so right after our own landing nobody need ask git.
        self.base, self.walked, self.just_landed = self.just_landed or self.show_tip("refs/heads/" + self.target), {}, None
        self.review_target()
        steps = self.chain(list(self.tasks.values()), self.base.commit)
        if self.settle(steps):
            return True
        self.held = {step.id: step.detail for step in steps if step.status == "held"}
        queue = tuple(step.id for step in steps if step.status == "ok")
        moved = self.follow(self.plan(queue), queue)
        self.publish(queue)
        return moved

    def order_tasks(self) -> None:
        """Ready tasks in landing order. What was ever part of a test keeps its place in front: new work, however urgent,
        makes no running gate worthless.
        """
        ready = self.store.snapshot().ready
        self.front = [task_id for task_id in self.front if task_id in ready]
        rest = merge_order([task for task in ready.values() if task.id not in self.front], CLOCK.now())
        self.tasks = {task.id: task for task in [*(ready[task_id] for task_id in self.front), *rest]}

    def plan(self, queue: tuple) -> Plan:
        """Ask the planner; end gates on trees that no branch of its decision tree needs any more."""
        for gate in self.gates:
            if not gate.is_diagnosis:
                gate.ids = tuple(task_id for task_id in gate.ids if task_id in self.tasks)
        running = tuple(gate.ids for gate in self.gates if self.is_current(gate))
        done = self.counts["landed"] + self.counts["red"]
        reds = reds_needed(self.verdicts.flaky_trees, self.verdicts.green_trees)
        answer = plan(queue, self.evidence_of, self.slots - sum(gate.is_diagnosis for gate in self.gates),
                      failure_rate(self.counts["red"], done), running, reds=reds,
                      strict=self.settings.strict)
        for gate in self.gates:
            if not gate.is_diagnosis and (gate.ids in answer.abandon or not self.is_current(gate)):
                gate.is_abandoned = True
                gate.end_group()
        return answer

    def is_current(self, gate: Gate) -> bool:
        """Whether the gate's tree is still that of its entries on the target as it is now."""
        step = None if gate.is_diagnosis else self.known_step(gate.ids)
        return step is not None and any(tree == gate.tree for _, tree in self.line_of(step))

    def follow(self, step: Plan, queue: tuple) -> bool:
        """Do what the plan says: land, else return the guilty, else start gates."""
        if step.target_red:
            self.trouble = self.describe_red_target()
            return False
        if step.land:
            return self.land(queue[:step.land])
        if step.guilty:
            return self.return_red(step.guilty, queue)
        short = find_shortage(self.store.folder, self.settings.min_free_mib) if step.tests else ""
        if short:  # a gate that dies of it would say nothing about its tree
            self.trouble = (f"no gate starts: {short}", "free some, and it goes on by itself; or lower FARM_MIN_FREE_MIB")
            return False
        for test in step.tests:
            place = self.step_of(test.entries)
            if place is not None and self.has_slot():
                self.start_gate(test.entries, place)
        while self.diagnoses and self.has_slot() and not step.tests:  # only where nothing that could land is kept waiting
            self.diagnose(self.diagnoses.pop(0))
        return False

    def describe_red_target(self) -> tuple[str, str]:
        """What is wrong with the target itself, and the ways out of it."""
        name, at = self.target, self.base.commit[:10]
        verdict = self.store.path(self.verdicts.name_of(self.base.tree, "log"))
        if self.base.tree in self.notes:
            return (f"{name} itself gives no verdict at {at}: {self.notes[self.base.tree]}",
                    "mend the gate or raise FARM_GATE_TIMEOUT, then: ./farm.py merge (one that watches asks again by itself)")
        return (f"{name} itself is red at {at}: the gate fails on it without any new work (see {verdict})",
                f"mend {name} and commit, and it goes on by itself; or have all judged again: "
                f"rm {self.store.path('results')}/*-{self.verdicts.key}.json")

    def review_target(self) -> None:
        """While the target is held to be red, look at the verdicts anew, so that a paused queue goes on by itself: a person may
        have removed them, and what kept gates from an answer may be over. What was said of entries meanwhile goes with it: it
        blames nobody.
        """
        found = self.verdicts.memo.get(self.base.tree, Evidence(0, 0))
        if found.greens or not found.reds:
            return
        if self.base.tree in self.notes:
            if CLOCK.monotonic() < self.ask_again_at:
                return
            self.notes.clear()
        self.verdicts.memo = {tree: found for tree, found in self.verdicts.memo.items() if tree in self.notes}

    def settle(self, steps: list[Step]) -> bool:
        """What needs no gate: work that is in the target already lands, work that cannot be merged goes back."""
        moved = False
        for step in steps:
            task = self.tasks[step.id]
            if step.status in ("landed", "empty"):
                self.record_landed([(task.id, task.commit if step.status == "landed" else self.base.commit)])
            elif step.status == "conflict":
                self.return_work(task, f"it conflicts with {self.target} in {step.detail}", self.conflict_text(task))
            elif step.status in ("missing", "unrelated"):
                what = "its commit is gone" if step.status == "missing" else f"it shares no history with {self.target}"
                self.return_work(task, f"{what} ({task.commit[:10]})", "")
            moved |= step.status not in ("ok", "held")
        return moved

    def conflict_text(self, task: Task) -> str:
        try:
            with open(self.store.path("returns", f"{task.id}.txt"), encoding="utf-8", errors="replace") as file:
                return printable(file.read(60_000))
        except FileNotFoundError:
            return ""

    # -- gates

    def slot_folder(self, number: int) -> str:
        return os.path.join(self.slots_folder, f"gate-{number}")

    def has_slot(self) -> bool:
        return len(self.gates) < self.slots

    def start_gate(self, ids: tuple, step: Step, diagnosis: Task | None = None) -> None:
        """Put a tree under test in a free slot: that of `ids` on the target, or a returned entry's own.

        Raises FarmError when the slot's worktree cannot be made.
        """
        slot = next(number for number in range(1, self.slots + 1) if number not in {gate.slot for gate in self.gates})
        folder = self.slot_folder(slot)
        commit, tree = self.next_to_gate(step)
        run_script("gate-slot.sh", "prepare", "-C", self.store.repo, folder, commit)
        gate = Gate(slot, ids, commit, tree, diagnosis)
        log = self.store.path(self.verdicts.name_of(tree, "log"))
        gate.start(folder, self.settings, log, self.wake)
        self.gates.append(gate)
        self.front += [task_id for task_id in ids if task_id not in self.front]
        self.counts["diagnoses" if gate.is_diagnosis else "gates"] += 1
        self.store.append_event("gate-started", None, ids=list(ids), tree=tree, slot=slot)

    def reap_gates(self) -> bool:
        """Judge the gates that are over."""
        done = [gate for gate in self.gates if gate.is_done]
        self.gates = [gate for gate in self.gates if not gate.is_done]
        for gate in done:
            if gate.failure:  # it may still run, so its slot is not free: the next merger ends it before anything else
                raise gate.failure
            if gate.is_abandoned:
                self.note_end(gate.ids, gate.tree, gate.slot, NO_VERDICT._replace(note="nobody needs its verdict any more"))
            else:
                self.judge(gate)
        return bool(done)

    def note_end(self, ids: tuple, tree: str, slot: int, verdict: Verdict) -> None:
        """Each gate-started in the history has its gate-ended."""
        self.store.append_event("gate-ended", None, ids=list(ids), tree=tree, slot=slot, **verdict._asdict())

    def judge(self, gate: Gate) -> None:
        """Record a gate's verdict; one that changed tracked files, timed out or was killed gave none."""
        verdict = gate.verdict
        if verdict.colour != "none":
            check = run_script("gate-slot.sh", "check", gate.folder, gate.commit, allow=(0, 1, 3))
            if check.code == 3:
                verdict = verdict._replace(colour="none", note="the gate's folder is gone")
            elif check.code:
                changed = ", ".join(check.stdout.split("\n")[:5]).strip(", ")
                verdict = verdict._replace(colour="none", note=f"the gate changed tracked files: {changed}")
        # Durable before anything is done because of it: after a kill the next merger comes to the same conclusions.
        before = self.verdicts.evidence(gate.tree)
        self.verdicts.record(gate.tree, verdict)
        after = self.verdicts.evidence(gate.tree)
        self.note_end(gate.ids, gate.tree, gate.slot, verdict)
        if gate.is_diagnosis:
            if verdict.colour != "none":
                self.explain(gate.diagnosis, verdict.colour)
        elif verdict.colour == "none":
            self.give_up_on(gate, verdict.note)
        elif after.greens and after.reds and not (before.greens and before.reds):
            say(f"flaky gate: tree {gate.tree[:10]} was both green and red; nobody's work goes back for it")

    def give_up_on(self, gate: Gate, note: str) -> None:
        """A tree that twice gave no verdict is held to be red, in memory only, for it is no evidence: the planner halves it
        and asks for the target, and nobody is blamed for a gate that never gives a verdict.
        """
        self.unjudged[gate.tree] += 1
        say(f"{note} ({', '.join(gate.ids) or self.target}, tree {gate.tree[:10]})")
        if self.unjudged[gate.tree] >= 2:
            self.notes[gate.tree] = note
            self.verdicts.memo[gate.tree] = Evidence(0, 99)
            pause = max(ASK_AGAIN_SECONDS, gate.verdict.seconds) * 2 ** (self.unjudged[gate.tree] - 2)
            self.ask_again_at = CLOCK.monotonic() + min(pause, ASK_AGAIN_SECONDS_MAX)

    # -- landing

    def land(self, ids: tuple) -> bool:
        """Move the target to the tested commit of `ids`, the intent durable first, then record what landed.

        Between the swap in git and the record in the queue file only the intent knows which commit is whose: with a squash or a
        rebase the entry's own commit is not in the target.
        """
        steps = self.chain([self.tasks[task_id] for task_id in ids], self.base.commit)
        intent = {"schema": SCHEMA, "target": self.target, "old": self.base.commit, "new": steps[-1].commit,
                  "entries": [[step.id, step.commit] for step in steps], "revs": [self.tasks[task_id].rev for task_id in ids]}
        self.store.write_durably(INTENT_FILE, (json.dumps(intent) + "\n").encode("utf-8"))
        has_moved = self.finish_landing(intent)
        self.just_landed = steps[-1]._replace(status="-") if has_moved and steps[-1].id not in self.store.snapshot().ready else None
        return has_moved

    def finish_landing(self, intent: dict) -> bool:
        """The swap and the record; safe to repeat after a crash at any point."""
        remote = ["-r", self.settings.remote] if self.settings.remote else []
        # In a session of its own: a Ctrl-C or a kill of our group must not leave half a checkout.
        result = run_script("land.sh", *self.landing_arguments(intent), *remote, allow=(0, 4, 5), detach=True)
        if result.code == 0:
            self.record_landed([tuple(entry) for entry in intent["entries"]])
        elif result.code == 4 and self.show_tip("refs/heads/" + intent["target"]).commit == intent["old"]:
            # Our target is where it was, so it is the remote's branch that has moved.
            where = f"{self.settings.remote}/{intent['target']}"
            self.trouble = (f"{where} has commits that {intent['target']} here has not, so nothing can be pushed",
                            f"git pull --ff-only {self.settings.remote} {intent['target']}; the queue goes on by itself")
        elif result.code == 5:
            self.trouble = describe_block(intent["target"], result)
        # It landed, or nothing was changed. An exit code other than these has raised: then the intent stays for `recover`.
        self.store.disk.unlink(self.store.path(INTENT_FILE))
        return self.trouble is None

    def landing_arguments(self, intent: dict) -> list[str]:
        return ["-C", self.store.repo, "-b", intent["target"], "-o", intent["old"], "-n", intent["new"]]

    def record_landed(self, entries: list[tuple[str, str]]) -> None:
        """Move each (id, commit) from ready to landed; those recorded before a crash are passed over."""
        with self.store.transaction() as tx:
            for task_id, commit in entries:
                task = tx.state.ready.get(task_id) or tx.state.pending.get(task_id)
                if task is None or task.state not in ("ready", "canceled"):  # recorded before a crash
                    continue  # what was canceled a moment too late is in the target all the same, and said to be
                tx.move(task._replace(state="landed", landed_commit=commit, landed_at=utc(CLOCK.now()), prompt="", reason=""),
                        "landed", "landed")
                self.counts["landed"] += 1
                self.moved.append((task_id, "landed", commit[:10]))
                say(f"landed {task_id} {commit[:10]} {printable(task.title)}")

    # -- returning

    def return_red(self, task_id: str, queue: tuple) -> bool:
        """Send back the entry whose step turned a green tree red, twice."""
        task, ids = self.tasks[task_id], queue[:queue.index(task_id) + 1]
        step, gate = self.step_of(ids), self.settings.gate
        commit, tree = self.next_to_gate(step)
        how = (f"to reproduce: git worktree add --detach ../try-{task_id} {commit[:12]} && cd ../try-{task_id} && "
               f"bash -c {shell_word(gate)}")
        note = self.notes.get(tree)
        if note is None:
            self.counts["red"] += 1
            if tree == step.tree:  # a lone run looks at the last commit, and says nothing of those before it
                self.diagnoses.append(task)
        what = "with it" if tree == step.tree else "at one of its commits before the last, and each must pass by itself (strict)"
        return self.return_work(task, note or f"the gate fails {what}: {gate}", how + "\n\n" + self.verdicts.tail(tree))

    def return_work(self, task: Task, reason: str, detail: str, *, goes_on: bool = True) -> bool:
        """Pin the commits, keep the detail in returns/, and give the task back; True, for something has moved.

        goes_on: the next attempt starts from the task's own commits, where they could be pinned; else from the target.
        """
        attempt = task.attempts + 1
        # Pin, text, move: the next attempt can only be claimed after the move, and then finds both. A kill before it repeats them.
        ref = f"refs/farm/returned/{task.id}/{attempt}"
        pinned = run_script("pin-ref.sh", "-C", self.store.repo, ref, task.commit, allow=(0, 3)).code == 0
        name = os.path.join("returns", f"{task.id}.{attempt}.txt")
        self.store.write_durably(name, f"{reason}\n{detail}\n".encode("utf-8", "replace"))
        with self.store.transaction() as tx:
            current = tx.state.ready.get(task.id)
            if current is None or current.rev != task.rev:  # canceled, or submitted anew: this verdict was not about that
                return True
            start = "refs/heads/" + self.target if not goes_on else ref if pinned else ""
            back = TaskQueue(tx).give_back(current, reason, "return", start=start)
        self.counts["returned"] += 1
        self.moved.append((task.id, back.state if back.state == "failed" else "returned", reason))
        say(f"returned {task.id}: {printable(reason)}")
        return True

    def return_broken(self) -> bool:
        """Send back the ready tasks of which git cannot read every object; whether there were any.

        Git does not fsync loose objects, so a power cut can leave a durable pin on a commit whose files are empty.
        """
        ready = self.store.snapshot().ready
        lines = "".join(f"{task.id}\t{task.commit}\n" for task in ready.values())
        found = run_script("find-broken.sh", "-C", self.store.repo, "-b", self.target, stdin=lines, allow=(0, 1, 3))
        for task_id, said in read_tsv(found.stdout):
            task = ready[task_id]
            reason = f"git cannot read all of its commit {task.commit[:10]} (a power cut, or a disk that was full?)"
            self.return_work(task, reason, said, goes_on=False)
        return bool(found.stdout)

    def diagnose(self, task: Task) -> None:
        """In an idle slot, gate a returned entry alone, on its own base: is it red without the others, too?"""
        own = self.show_tip(task.commit)
        known = self.verdicts.evidence(own.tree)
        if known.greens or known.reds:
            self.explain(task, "green" if known.greens else "red")
        else:
            self.start_gate((), own, diagnosis=task)

    def explain(self, task: Task, colour: str) -> None:
        """Add to the returned task what the lone run has shown."""
        partners = read_tsv(run_script("merge-partners.sh", "-C", self.store.repo, "-b", self.target, task.commit).stdout)
        likely = f", most likely with {partners[0][0]} ({partners[0][1]})" if partners else ""
        words = "by itself it is red, too: the fault is its own" if colour == "red" else \
            f"by itself it is green: it does not go together with what has landed{likely}"
        say(f"{task.id}: {words}")
        with open(self.store.path("returns", f"{task.id}.{task.attempts + 1}.txt"), "a", encoding="utf-8") as file:
            file.write(f"\n{words}\n")
        with self.store.transaction() as tx:
            current = tx.state.pending.get(task.id)
            if current and current.attempts == task.attempts + 1:  # nobody has begun the next attempt: it will read this
                tx.move(current._replace(reason=f"{current.reason}; {words}"), "pending", "diagnosed")

    # -- recovery, and what others may see

    def recover(self) -> None:
        """Before anything else: end gates of a dead merger, finish or undo a landing that was cut short, pin what is ready."""
        end_all_gates(self.slots_folder)
        for gate in find_open_gates(self.store):
            self.note_end(gate["ids"], gate["tree"], gate["slot"], NO_VERDICT._replace(note="its merger was killed"))
        intent = self.store.read_json(INTENT_FILE)
        if intent:
            self.recover_landing(intent)
        pins = "".join(f"refs/farm/ready/{task.id} {task.commit}\n" for task in self.store.snapshot().ready.values())
        pinned = run_script("pin-ref.sh", "-C", self.store.repo, "-", stdin=pins, allow=(0, 1))
        if pinned.code:  # no reason to land nothing
            say(str(script_error("pin-ref.sh", pinned)))

    def recover_landing(self, intent: dict) -> None:
        """Finish a landing that was cut short. Before the swap it is dropped where its commits are gone, or where an entry was
        canceled or submitted anew meanwhile, which may be days: the next tick plans anew, and no gate runs twice.
        """
        wait_for_landing(intent["new"])
        found = run_script("land.sh", "recover", *self.landing_arguments(intent), allow=(0, 3))
        ready = self.store.snapshot().ready
        now = [getattr(ready.get(task_id), "rev", 0) for task_id, _ in intent["entries"]]
        if found.code == 0 and (found.stdout.startswith("landed") or now == intent.get("revs", now)):
            say(f"finishing a landing that was cut short: {intent['old'][:10]} -> {intent['new'][:10]}")
            self.finish_landing(intent)
        else:
            say(f"a landing that was cut short is planned anew: {intent['old'][:10]} -> {intent['new'][:10]}")
            self.store.disk.unlink(self.store.path(INTENT_FILE))

    def publish(self, queue: tuple) -> None:
        """What is being done right now, for `queue` and `status`; worth nothing once this process is gone."""
        me = identify(os.getpid())
        data = {"schema": SCHEMA, "pid": me.pid, "start": me.start, "target": self.target, "order": list(queue),
                "testing": [{"ids": list(gate.ids), "slot": gate.slot, "tree": gate.tree} for gate in self.gates],
                "held": self.held, "trouble": list(self.trouble or ()), "gates": self.counts["gates"]}
        if data != getattr(self, "published", None):
            self.published = data
            temp = self.store.path("merge_queue", ".now.json.tmp")
            with open(temp, "w", encoding="utf-8") as file:
                file.write(dump_line(data) + "\n")
            os.replace(temp, self.store.path(NOW_FILE))

    def is_drained(self) -> bool:
        return not self.gates and not self.diagnoses and not self.store.snapshot().ready

    def run(self, should_stop, *, forever: bool) -> None:
        """Tick until drained (or for ever), or until only a person can help. `should_stop` is a threading.Event.

        Raises FarmError; for ever, that is a trouble like others: shown, and tried again after 2 s, 4 s ... a minute.
        """
        failures = 0
        while not should_stop.is_set():
            try:
                has_moved, failures = self.try_tick(), 0
            except FarmError as error:
                if not forever:
                    raise
                failures += 1
                self.pause(error)
                should_stop.wait(min(2.0 ** failures, 60))
                continue
            if has_moved:
                continue
            if not forever and (self.is_drained() or self.trouble):
                return
            self.wake.clear()
            seen = self.store.signature()
            deadline = CLOCK.monotonic() + 5  # moves and gates wake us; a person's commit, or a file taken out of the way, does not
            while CLOCK.monotonic() < deadline and seen == self.store.signature() and not should_stop.is_set():
                if self.wake.wait(0.1) or any(gate.is_done for gate in self.gates):
                    break

    def try_tick(self) -> bool:
        """A tick, after a recovery where one is due. When a script failed on work that git cannot read, that work goes back and
        the rest goes on.
        """
        if not self.is_recovered:
            self.recover()
        self.is_recovered = True
        try:
            return self.tick()
        except FarmError:
            if not self.return_broken():
                raise
            return True

    def pause(self, error: FarmError) -> None:
        """What stopped us, for people and for `queue` and `status`. The next tick begins as after a crash, from disk."""
        say(f"{error}\n  try: {error.hint or './farm.py doctor'}")
        try:
            self.stop()
        except FarmError:  # a gate that cannot be ended: the recovery tries it again, and says so
            self.gates = []
        self.is_recovered, self.just_landed = False, None
        self.trouble = str(error), error.hint or "./farm.py doctor"
        self.publish(())

    def stop(self) -> None:
        """End the gates that run; they gave no verdict."""
        for gate in self.gates:
            gate.end_group()
            self.note_end(gate.ids, gate.tree, gate.slot, NO_VERDICT._replace(note="its merger was stopped"))
        self.gates = []


def describe_block(target: str, result: ScriptResult) -> tuple[str, str]:
    """What land.sh found in the way, and what to do: files, a whole checkout, or another git's lock."""
    said = script_error("land.sh", result)
    files = read_tsv(result.stdout)[0][1:] if result.stdout else []
    if files and not any(map(os.path.isabs, files)):
        return (f"the checkout of {target} has changes of its own in the way: {', '.join(files)}",
                "commit them or move them away; the queue goes on by itself")
    return str(said), said.hint or f"git status, in the checkout of {target}"


INTENT_FILE = os.path.join("merge_queue", "landing.json")
NOW_FILE = os.path.join("merge_queue", "now.json")


def default_slots() -> int:
    """Gates at once: a core each, and 2 GiB of memory each, four at the most."""
    return max(1, min(os.cpu_count() or 1, free_memory_mib() // 2048, 4))


def find_shortage(folder: str, min_free_mib: int) -> str:
    """What there is too little of, memory or disk, in words; empty when there is room."""
    disk = os.statvfs(folder)
    free = {"memory": free_memory_mib(), "disk": disk.f_bavail * disk.f_frsize >> 20}
    return ", ".join(f"{mib} MiB of {what} free, {min_free_mib} wanted" for what, mib in free.items() if mib < min_free_mib)


def free_memory_mib() -> int:
    """Memory that a new process can have without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) // 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return import_package("psutil").virtual_memory().available >> 20


def end_gates(folder: str) -> None:
    """End every process of the gate in this slot, whoever started it: those that its environment marks, their sessions (the
    gate leads its own) and all below them, which may have cleared their environment. Again until none is left: what is
    being ended may just have forked. Raises FarmError when that takes half a minute.
    """
    sessions, deadline = set(), CLOCK.monotonic() + 30
    while CLOCK.monotonic() < deadline:
        marked = [process for process, _ in find_by_environment(FARM_SLOT=folder)]
        sessions |= {session_of(process.pid) for process in marked} - {-1, session_of(os.getpid())}
        children = process_children()
        members = [process for family in children.values() for process in family if session_of(process.pid) in sessions]
        doomed = {process.pid: process for top in (*marked, *members) for process in tree_of(top.pid, children)}
        living = [process for pid, process in doomed.items() if pid != os.getpid() and start_of(pid)]
        if not living:
            return
        for session in sessions:
            kill_group(session)
        end_processes(living, 0.0)
        pause = CLOCK.monotonic() + 1
        while any(start_of(process.pid) for process in living) and CLOCK.monotonic() < pause:  # psutil would wait for zombies, too
            time.sleep(0.005)
    raise FarmError(f"processes of the gate in {folder} could not be ended", f"grep -l FARM_SLOT={folder} /proc/*/environ")


def kill_group(group: int) -> None:
    """SIGKILL to a process group: in one blow, with whatever it has just forked."""
    import signal

    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def find_open_gates(store: Store) -> list[dict]:
    """The gate-started events that have no gate-ended: what a killed merger's gates were."""
    begun: dict[tuple, list] = collections.defaultdict(list)
    try:
        with open(store.path("events.jsonl"), "rb") as file:
            events = [line for line in file if b'"event": "gate-' in line]  # most lines are others: parsed are only these
    except FileNotFoundError:
        return []
    for line in events:
        try:
            event = json.loads(line)
            place = begun[event["slot"], event["tree"]]
            place.append(event) if event["event"] == "gate-started" else place.pop()
        except (ValueError, KeyError, TypeError, IndexError):
            continue  # a line that a killed writer tore, or a hand has edited: history stops nothing
    return [event for place in begun.values() for event in place if isinstance(event.get("ids"), list)]


def end_all_gates(slots_folder: str) -> None:
    """End the gates that a dead merger of this farm has left running."""
    names = os.listdir(slots_folder) if os.path.isdir(slots_folder) else []
    for name in names:
        if re.fullmatch(r"gate-\d+", name):
            end_gates(os.path.join(slots_folder, name))


def session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1


def wait_for_landing(new: str) -> None:
    """Until no script and no git that lands `new` runs any more. Raises FarmError after a minute.

    A landing outlives its merger, so that none is cut in half. Between git's writing of the files and its moving of the ref no
    lock is there that a recovery could see: it would put the old files back, under the new ref.
    """
    psutil = import_package("psutil")
    deadline = CLOCK.monotonic() + 60

    def is_landing(words: list) -> bool:  # and no `git show NEW` in a person's pager
        return new in words and any(word.endswith(".sh") or word in ("merge", "update-ref") for word in words)

    while any(is_landing(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])):
        if CLOCK.monotonic() > deadline:
            raise FarmError(f"a landing of {new[:10]} from before still runs after a minute", "ps ax | grep land.sh")
        time.sleep(0.05)

# ---------------------------------------------------------------------------------------------- lifecycle
# Worktrees, sessions, loop: started, adopted, ended. Whatever is killed here goes on from disk at the next `up`.

SESSION_COMMAND = """\
if [ "$FARM_AGENT_NAME" = control ]; then
  until "$FARM_HOME/scripts/farm" --repo "$FARM_REPO" run; do sleep 1; done
else
  exec bash "$FARM_HOME/scripts/run-agent.sh"
fi"""


STILL_SECONDS = 900.0


def agent_names(count: int) -> list[str]:
    return [f"agent-{number:03d}" for number in range(1, count + 1)]


def worktree_of(repo: str, settings: Settings, agent: str) -> str:
    return os.path.join(worktrees_folder(repo, settings), agent + "-worktree")


def rescue_dead_owners(store: Store, settings: Settings) -> dict[str, str]:
    """Keep what dead owners' worktrees hold unsaved: agent -> rescue ref. Outside the mutex, before their tasks move on."""
    rescues = {}
    for claim in store.read_claims().values():
        worktree = worktree_of(store.repo, settings, claim.agent)
        if claim.task and find_liveness(Owner.from_json(claim.owner)) is False and os.path.isdir(worktree):
            rescues[claim.agent] = rescue(store.repo, claim.agent, worktree)
    return rescues


def take_over(store: Store, settings: Settings, watch: LeaseWatch, move):
    """`move(tx)` in a transaction in which dead owners hold nothing any more.

    Their unsaved work is kept first, outside of it: no git runs under the mutex.
    """
    rescues = None
    while True:
        with store.transaction() as tx:
            if rescues is not None or not LockRegistry(tx).has_dead_owner():
                LockRegistry(tx).expire(watch.is_lapsed, rescues)
                return move(tx)
        rescues = rescue_dead_owners(store, settings)


def rescue(repo: str, agent: str, worktree: str) -> str:
    """Snapshot what is uncommitted in a worktree; the ref, or empty when there was nothing.

    Never raises: one broken worktree must not stop the farm, and nobody resets it before its own rescue went through.
    """
    try:
        rows = read_tsv(run_script("rescue.sh", "save", "-C", repo, "-a", agent, worktree).stdout)
    except FarmError as error:
        say(f"{agent}: its unsaved work stays in {worktree}: {error}")
        return ""
    return rows[0][0] if rows else ""


def hold_long(path: str, what: str):
    """Take the lock of what lives long (one loop, one merger a farm). Raises Refused that names the holder's pid."""
    portalocker = import_package("portalocker")
    file = open(path, "a+", encoding="ascii")
    try:
        portalocker.lock(file, portalocker.LOCK_EX | portalocker.LOCK_NB)
    except portalocker.LockException:
        file.seek(0)
        pid = file.read().partition("\t")[0]
        file.close()
        raise Refused(f"{what} runs already (pid {pid})", "./farm.py status") from None
    me = identify(os.getpid())
    file.truncate(0)
    file.write(f"{me.pid}\t{me.start}\n")
    file.flush()
    return file


def find_recorded(path: str) -> int | None:
    """The pid in a lock file of `hold_long`, while exactly that process lives."""
    try:
        with open(path, encoding="ascii") as file:
            pid, _, start = file.read().strip().partition("\t")
        return int(pid) if start and start_of(int(pid)) == start else None
    except (OSError, ValueError):
        return None


def live_cost(store: Store, claim: Claim, spending: list[dict]) -> float:
    """Dollars of the conversation at work beyond its line in `spending`, as its CLI's status line told last."""
    conversation = claim.task.get("conversation", {}).get("id")
    told = next(read_json_lines(store.path("mailbox", claim.agent, COST_FILE)), {})
    cost = told.get("cost") if conversation and told.get("session_id") == conversation else {}
    earlier = sum_spending([line for line in spending if conversation and line.get("conversation") == conversation])["cost_usd"]
    return max(0.0, dollars_of(cost.get("total_cost_usd")) - earlier) if isinstance(cost, dict) else 0.0


class Farm:
    """The lifecycle of a farm's sessions. Crash-only: kill it at any time, start it again, and it goes on from disk."""

    def __init__(self, store: Store, settings: Settings, launches: list[Launch], target: str):
        """launches: what each agent runs; empty for a farm that is only stopped."""
        self.store, self.settings, self.target = store, settings, target
        self.repo = store.repo
        self.socket = farm_socket(self.repo)
        self.names = agent_names(settings.n)
        self.launches = dict(zip(self.names, launches, strict=False))
        self.turns: dict[str, dict] = {}
        self.looks: dict[str, tuple[float, float]] = {}  # agent -> (epoch seconds, CPU seconds of its tree then)
        self.worktrees: dict[str, list] = {}
        self.sessions: dict[str, Session] = {}
        self.agents: dict[str, dict] = store.read_agents()
        self.policy = RestartPolicy()
        self.leases = LeaseWatch(settings.lease_seconds)
        self.merger = None
        self.merger_ends: list[float] = []
        self.blocked = ""
        self.note, self.noted_at, self.notices = "", -math.inf, []
        self.sight, self.work = Sight(0.005), {}

    # -- start

    def prepare(self) -> None:
        """Worktrees for all agents: made, adopted or repaired."""
        folder = worktrees_folder(self.repo, self.settings)
        base = ["-b", self.target] if self.target else []
        with open(self.store.path("worktrees.lock"), "w", encoding="ascii") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)  # two `up`s at once: git's own locks give up, this one waits
            made = run_script("mk-worktrees.sh", "-C", self.repo, "-n", str(self.settings.n), "-d", folder, *base, timeout=3600,
                              allow=(0, 1, 4))
        self.worktrees = {row[0]: row for row in read_tsv(made.stdout)}
        if not self.worktrees:
            raise script_error("mk-worktrees.sh", made)
        if made.stderr.strip():  # some could not be made; the others work
            say(made.stderr.strip())

    def spawn(self, names: list[str]) -> list[list[str]]:
        """A session for each name that has none, by one call of tmux for all that run the same; returns spawn-tmux.sh's rows."""
        launches = collections.defaultdict(list)
        for name in names:
            if name in self.worktrees:
                launches[self.launches[name]].append(self.worktrees[name])
        if CONTROL in names:
            launches[next(iter(launches), Launch("", "", ""))].append([CONTROL, "-", self.repo, "reused"])
        return [row for launch, rows in launches.items() for row in self.spawn_alike(launch, rows) if row[0] != CONTROL]

    def spawn_alike(self, launch: Launch, rows: list[list[str]]) -> list[list[str]]:
        folder = worktrees_folder(self.repo, self.settings)
        is_sandboxed = self.settings.sandboxed or "workspace-write" in launch.start
        environment = {"FARM_REPO": self.repo, "FARM_HOME": TOOLKIT, "FARM_PYTHON": sys.executable, "FARM_AGENT": launch.start,
                       "FARM_AGENT_RESUME": launch.resume, "FARM_PRESET": launch.preset, "FARM_TARGET": self.target,
                       "FARM_CLI_SETTINGS": self.store.path(CLI_SETTINGS_FILE), "FARM_WORKTREES": folder,
                       "FARM_AGENT_HOME": os.path.expanduser(self.settings.agent_home), "FARM_PORTS": str(port_base(folder)),
                       "FARM_AS_TOLD": "1", "FARM_SANDBOXED": "1" if is_sandboxed else ""}
        pairs = [word for key, value in environment.items() for word in ("-e", f"{key}={value}")]
        result = run_script("spawn-tmux.sh", "-C", self.repo, "-L", self.socket, "-l", self.store.path("logs"), *pairs,
                            "-c", SESSION_COMMAND, stdin="".join("\t".join(map(escape_field, row)) + "\n" for row in rows),
                            allow=(0, 1), env={"TMUX": "", "FARM_AGENT_NAME": ""})
        if result.stderr.strip():
            say(result.stderr.strip())
        return read_tsv(result.stdout)

    def up(self) -> tuple[int, int]:
        """Worktrees, sessions, and the loop in tmux; (started, adopted). Run again: adopts what runs, repairs what does not.

        A loop and a merger that were told something else (another gate, say) start anew; sessions go on with what they have.
        """
        before = self.store.read_part(FARM_FILE, "settings")
        self.remember("running")
        if before not in ({}, self.settings_to_keep()) and find_recorded(self.store.path("loop.lock")):
            say("the settings have changed: the loop and the merger start anew")
            self.stop_loop_and_merger()
        self.prepare()
        self.end_strays()
        self.expire()
        has_loop = find_recorded(self.store.path("loop.lock")) is not None
        rows = self.spawn([*self.names, *([] if has_loop else [CONTROL])])
        return sum(row[3] != "running" for row in rows), sum(row[3] == "running" for row in rows)

    def end_strays(self) -> None:
        """End what outlived its session (a killed tmux server's children, say): two must not write in one worktree."""
        self.probe()
        alive = {name for name, session in self.sessions.items() if not session.dead}
        if len(alive) < len(self.names) and os.path.exists(self.store.path(AGENTS_FILE)):
            strays = find_by_environment(FARM_REPO=self.repo)
            end_processes([process for process, name in strays if name in set(self.names) - alive])

    def remember(self, mode: str, reason: str = "") -> None:
        """What the farm is to do, and with which settings: a later `up`, `merge` or `claim` reads it.

        At a start by a person every CLI gets its chance again, and interrupted tasks are kept for their agents from now on.
        """
        with self.store.transaction() as tx:
            data = {"schema": SCHEMA, "mode": mode, "reason": reason, "settings": self.settings_to_keep()}
            tx.store.write_durably(FARM_FILE, (dump_line(data) + "\n").encode("utf-8"))
            if mode == "running":
                text = dump_line(cli_settings(self.settings)) + "\n"
                tx.store.write_durably(CLI_SETTINGS_FILE, text.encode("utf-8"))
                if not os.environ.get("FARM_AS_TOLD"):
                    forget_limits(tx)
                TaskQueue(tx).keep_for_agents(self.names)

    def settings_to_keep(self) -> dict:
        return {**self.settings._asdict(), "into": self.target}

    # -- the loop

    def tick(self) -> None:
        now = CLOCK.now()
        self.tend_merger(now)  # needs nothing of the others: what is wrong with an agent keeps no finished work from main
        self.probe()
        self.reap(now)
        self.expire()
        self.restart(now)
        self.watch_agents(now)
        self.admit(now)
        self.save()
        self.tell()

    def probe(self) -> None:
        """What sessions there are. tmux sees a pane close before it hears how: then it is asked again, five times."""
        for _ in range(5):
            self.sessions = probe_sessions(self.socket)
            ended = [session for name, session in self.sessions.items() if session.dead and "pid" in self.agents.get(name, {})]
            if all(session.signal or session.exit_status is not None for session in ended):
                break
            time.sleep(0.05)

    def reap(self, now: float) -> None:
        """Note each session that ended: its cause, its strays ended, its unsaved work kept."""
        for name in self.names:
            session, record = self.sessions.get(name), self.agents.setdefault(name, {"ends": []})
            if session is not None and not session.dead:
                if record.get("down"):  # somebody's `up` started it: it gets all its chances again
                    record = self.agents[name] = {"ends": []}
                if record.get("pid") != session.pid:
                    record["pid"] = session.pid
                    self.store.append_event("session-started", None, agent=name)
                continue
            if record.pop("pid", None) is None and "down" in record:
                continue
            record.update(down=True, cause=end_cause(session), since=utc(now))
            record["ends"] = [*self.policy.recent(record["ends"], now), now]
            self.end_agent(name, 3.0)
            if name in self.worktrees and os.path.isdir(self.worktrees[name][2]):
                record["rescue"] = rescue(self.repo, name, self.worktrees[name][2])
            self.store.append_event("session-ended", None, agent=name, cause=record["cause"])
            say(f"{name}: {record['cause']}")

    def end_agent(self, name: str, seconds: float) -> None:
        """End what a session has left behind: its environment names both this repo and the agent."""
        end_processes([process for process, _ in find_by_environment(FARM_REPO=self.repo, FARM_AGENT_NAME=name)], seconds)

    def expire(self) -> None:
        """Give the tasks of dead owners back to the queue, their unsaved work kept first."""
        rescues = rescue_dead_owners(self.store, self.settings)
        rescues.update({name: record["rescue"] for name, record in self.agents.items() if record.get("rescue")})
        with self.store.transaction() as tx:
            for claim in LockRegistry(tx).expire(self.leases.is_lapsed, rescues):
                say(f"{claim.agent} is gone; {claim.task.get('id', 'its locks')} is free again")
            self.state = tx.state

    def restart(self, now: float) -> None:
        """Start what is down and due; park what keeps ending."""
        due = []
        for name in self.names:
            record = self.agents[name]
            if not record.get("down"):
                continue
            start_at = self.policy.start_at(record["ends"], now)
            if start_at is None and not record.get("parked"):
                record["parked"] = True
                say(f"{name} is parked: it ended {len(record['ends'])} times in 15 min, last: {record['cause']}")
            elif start_at is not None and start_at <= now:
                due.append(name)
        if not due or not self.has_room():
            return
        self.prepare()
        self.spawn(due)
        for name in due:
            self.agents[name] = {"ends": self.agents[name]["ends"], "cause": self.agents[name]["cause"]}

    def has_room(self) -> bool:
        """Whether memory and disk allow a new start; says so when that changes."""
        short = find_shortage(self.store.folder, self.settings.min_free_mib)
        if short != self.blocked:
            self.blocked = short
            say(f"no new work starts: {short}" if short else "there is room again")
        return not short

    def watch_agents(self, now: float) -> None:
        """What agents at work have told or used up: who waits for a person, whose time or money is over, who stands still."""
        busy = [claim for claim in self.state.claims.values() if claim.task and claim.agent in self.names]
        spending = read_spending(self.store)
        live = {claim.agent: live_cost(self.store, claim, spending) for claim in busy}
        for name in set(self.agents) - {claim.agent for claim in busy}:
            self.agents[name].pop("still_since", None)
        for claim in busy:
            self.note_turns(claim)
            end_waiting_turn(self.store, claim.agent, self.turns[claim.agent], now)
            self.note_stillness(claim, now)
            over = self.find_excess(claim, cost_of_task(spending, claim.task["id"]) + live[claim.agent], now)
            if over and not read_mail(self.store, claim.agent, ENDING_FILE, claim.fence):
                say(f"{claim.agent}: {over[1]}")
                end_attempt(self.store, claim.agent, claim.fence, *over)
        self.watch_budget(sum_spending(spending)["cost_usd"] + sum(live.values()))

    def note_stillness(self, claim: Claim, now: float) -> None:
        """`still_since`: an agent at work whose output and whole process tree have stood still for STILL_SECONDS.

        Unknown is not stuck, and nothing is ended for it: `status` shows it to a person. A tree counts as still while all its CPU
        time since the last look (a minute ago, or longer) is below one percent.
        """
        record, session = self.agents.get(claim.agent, {}), self.sessions.get(claim.agent)
        log = self.store.path("logs", claim.agent + ".log")
        quiet_since = max(epoch(claim.claimed_at), os.path.getmtime(log) if os.path.exists(log) else 0.0)
        if session is None or now - quiet_since < STILL_SECONDS or self.turns.get(claim.agent, {}).get("state") == "waiting":
            record.pop("still_since", None)
            self.looks.pop(claim.agent, None)
            return
        looked_at, cpu_before = self.looks.get(claim.agent, (0.0, 0.0))
        if now - looked_at < 60:
            return
        cpu_seconds = cpu_time_of(tree_of(session.pid, process_children()))
        self.looks[claim.agent] = (now, cpu_seconds)
        if looked_at and cpu_seconds - cpu_before < 0.01 * (now - looked_at):
            record.setdefault("still_since", utc(quiet_since))
        else:
            record.pop("still_since", None)

    def note_turns(self, claim: Claim) -> None:
        """An event in the history when an agent begins or ends to wait for a person."""
        name = claim.agent
        turn = read_turn(self.store, name, claim.fence, agent_home(self.repo, self.settings, name))
        before, self.turns[name] = self.turns.get(name, {}), turn
        waits = [mail.get("state") == "waiting" and mail.get("fence") == claim.fence for mail in (before, turn)]
        if waits[0] != waits[1]:
            self.store.append_event("agent-waits" if waits[1] else "agent-goes-on", None, agent=name,
                                    why=turn.get("message", ""), id=claim.task["id"])

    def find_excess(self, claim: Claim, cost_usd: float, now: float) -> tuple[str, str] | None:
        """(cause, words) when a claim is over its time limit or its task over its budget."""
        task = claim.get_task()
        limit = task.time_limit_seconds or self.settings.task_seconds
        if limit and now - epoch(claim.claimed_at) > limit:
            return "time limit", f"its time limit of {duration(limit)} is over"
        why = describe_overrun(task, self.settings, cost_usd)
        return ("budget", why) if why else None

    def watch_budget(self, cost: float) -> None:
        """Pause the farm when all of it, what is at work included, has cost as much as it may (dollars)."""
        why = describe_farm_overrun(self.settings, cost)
        if why and (self.store.read_json(FARM_FILE) or {}).get("mode") == "running":
            say(f"the farm pauses: {why}")
            self.set_mode("paused", why)

    def admit(self, now: float) -> None:
        """Ring as many idle agents as there are tasks to claim, those that an interrupted task is kept for first."""
        if (self.store.read_json(FARM_FILE) or {}).get("mode") == "paused":
            return
        busy = {claim.agent for claim in self.state.claims.values() if claim.task}
        kept = {task.conversation.get("agent") for task in self.state.pending.values()}
        idle = [name for name in self.names if name not in busy and not self.agents[name].get("down")
                and not find_limit(self.store, self.launches[name].preset, now)]
        idle.sort(key=lambda name: name not in kept)
        with self.store.transaction() as tx:
            tasks = TaskQueue(tx).claimable("")
        if tasks and idle and self.has_room():
            for name in idle[:len(tasks)]:
                ring(self.store.path("mailbox", name, "bell"))

    def tend_merger(self, now: float) -> None:
        """One merger a farm: adopt the one that runs, else start one, in a session of its own."""
        import subprocess

        if self.merger is not None and self.merger.poll() is not None:
            say(f"the merger ended with exit code {self.merger.returncode}; see {self.store.path('logs', 'merger.log')}")
            self.merger_ends.append(now)
            self.merger = None
        if self.merger is not None or find_recorded(self.store.path("merger.lock")) is not None:
            return
        start_at = self.policy.start_at(self.merger_ends[-3:], now)
        if start_at is not None and start_at > now:
            return
        os.makedirs(self.store.path("logs"), exist_ok=True)  # somebody may have tidied up
        with open(self.store.path("logs", "merger.log"), "ab") as log:
            argv = [os.path.join(SCRIPTS, "farm"), "--repo", self.repo, "merge", "--watch"]
            environment = {**os.environ, "FARM_AS_TOLD": "1", "FARM_PYTHON": sys.executable}
            self.merger = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=TOOLKIT,
                                           env=environment, start_new_session=True)

    def save(self) -> None:
        """agents.json for `status`: why each session ended, and who is parked. Only the loop writes it."""
        data = {"schema": SCHEMA, "agents": self.agents, "blocked": self.blocked}
        text = dump_line(data) + "\n"
        if text != getattr(self, "saved", None):
            temp = self.store.path("." + AGENTS_FILE + ".tmp")
            with open(temp, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(temp, self.store.path(AGENTS_FILE))
            self.saved = text

    def is_drained(self) -> bool:
        """Nothing is claimed, nothing is ready, and nothing that waits can ever start."""
        state = self.state
        return not state.ready and not state.claimed() and all(is_stranded(task, state) for task in state.pending.values())

    def wait(self, should_stop) -> None:
        """Until a move is made, a session's process is gone, a backoff is over, or five seconds have passed."""
        before, deadline = self.signature(), CLOCK.monotonic() + self.next_look()
        pids = [record["pid"] for record in self.agents.values() if "pid" in record]
        while CLOCK.monotonic() < deadline and not should_stop.wait(0.2):
            if self.signature() != before or not all(map(process_exists, pids)):
                return

    def signature(self) -> tuple:
        """What changes with each move, and with each event of a CLI's hooks."""
        busy = [claim.agent for claim in self.state.claims.values() if claim.task and claim.agent in self.names]
        return (*self.store.signature(), *(changed_at(self.store.path("mailbox", name, TURN_FILE)) for name in busy))

    def next_look(self) -> float:
        """Seconds until something is due: a backoff's end, or a session's start."""
        now = CLOCK.now()
        dues = [epoch(task.not_before) for task in self.state.pending.values() if task.not_before and task.state == "pending"]
        dues += [epoch(limit["until"]) for limit in read_limits(self.store).values() if limit["until"] > utc(now)]
        dues += [self.policy.start_at(record["ends"], now) or now + 5 for record in self.agents.values() if record.get("down")]
        return min([5.0, *(max(0.2, due - now) for due in dues)])

    def run(self, should_stop, *, until_drained: bool = False, on_tick=lambda farm: None) -> None:
        """The loop, in the foreground, until `should_stop` is set or everything is done."""
        self.prepare()
        self.end_strays()
        self.spawn(self.names)
        failures = 0
        while not should_stop.is_set():
            try:
                self.tick()
                failures = 0
            except Exception as error:  # the loop outlives what it did not expect: said, logged, tried again later
                failures += 1
                self.report_failure(error)
                should_stop.wait(min(2.0 ** failures, 60))
                continue
            on_tick(self)
            if until_drained and self.is_drained():
                return
            self.wait(should_stop)

    def report_failure(self, error: Exception) -> None:
        import traceback

        say(f"the loop: {error}" + (f"\n  try: {error.hint}" if getattr(error, "hint", "") else ""))
        with open(self.store.path("logs", "loop.log"), "a", encoding="utf-8") as log:
            log.write(utc(CLOCK.now()) + "\n" + traceback.format_exc())

    # -- notify

    def tell(self) -> None:
        """What a person should know and was not told yet: once each, remembered in told.json over restarts of the loop."""
        try:
            news, told = self.find_news(), read_note(self.store, TOLD_FILE).get("told")
            told = told if is_texts(told) else []
            for key, event in news.items():
                if key not in told:
                    self.notify({"at": utc(CLOCK.now()), "repo": self.repo, **event})
            if set(news) != set(told):
                self.store.write_durably(TOLD_FILE, (dump_line({"schema": SCHEMA, "told": list(news)}) + "\n").encode("utf-8"))
            self.tell_tmux()
            self.count_work()
        except (OSError, FarmError) as error:
            say(f"nobody could be told what happened: {error}")

    def find_news(self) -> dict[str, dict]:
        """key -> event of all that is so now and calls for a person."""
        news = {key: event for claim in self.state.claims.values() for key, event in self.find_waiting(claim)}
        for task in self.state.pending.values():
            if task.state == "failed":
                news[f"failed {task.id}.{task.rev}"] = {"event": "failed", "agent": task.agent, "task": task.id,
                                                        "title": task.title, "message": task.reason,
                                                        "try": f"./farm.py retry {task.id}"}
        trouble = find_activity(self.store).get("trouble")
        if trouble:
            news[f"blocked {trouble[0]}"] = {"event": "blocked", "message": trouble[0], "try": trouble[1]}
        for preset in sorted({launch.preset for launch in self.launches.values()} - {""}):
            if limit := find_limit(self.store, preset, CLOCK.now()):
                news[f"limited {limit}"] = {"event": "limited", "message": limit, "try": "./farm.py up"}
        counts = collections.Counter(task.state for task in self.state.all_tasks())
        if counts and self.is_drained():
            words = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
            news["drained"] = {"event": "drained", "message": words, "tasks": dict(counts), "try": "./farm.py report"}
        return news

    def find_waiting(self, claim: Claim) -> list[tuple[str, dict]]:
        """The (key, event) of an agent that waits for a person; none for others."""
        name, task, launch = claim.agent, claim.get_task(), self.launches.get(claim.agent)
        told, turn, session = self.agents.get(name, {}), self.turns.get(name, {}), self.sessions.get(name)
        if not task or not launch or session_state(session, told, None, claim, turn, launch.preset) != "waiting":
            return []
        since, message = explain_state("waiting", None, told, claim, turn)
        return [(f"waiting {claim.fence} {since}", {"event": "waiting", "agent": name, "task": task.id, "title": task.title,
                                                    "message": message, "try": f"./farm.py attach {agent_number(name)}"})]

    def notify(self, event: dict) -> None:
        """Say it, write the report when all is done, and run the user's command in the background."""
        import threading

        what = " ".join(filter(None, (event["event"], event.get("agent"), event.get("task"))))
        say(f"{what}: {one_line(event['message'], 200)}")
        if event["event"] == "drained":
            write_report(self.store, self.store.path("report.html"))
        if self.settings.notify:
            thread = threading.Thread(target=run_notice, args=(self.settings.notify, event, self.store), daemon=True)
            self.notices = [*(notice for notice in self.notices if notice.is_alive()), thread]
            thread.start()

    def finish_telling(self, seconds: float) -> None:
        """Wait for commands that are being told something."""
        deadline = CLOCK.monotonic() + seconds
        for notice in self.notices:
            notice.join(max(0.0, deadline - CLOCK.monotonic()))

    def tell_tmux(self) -> None:
        """The farm's counts on the status line of its own tmux server, when they have changed; every five seconds at the most."""
        is_paused = (self.store.read_json(FARM_FILE) or {}).get("mode") == "paused"
        waits = {name: self.turns.get(name, {}).get("state") == "waiting" for name in self.names}
        note = "paused \u00b7 " * is_paused + describe_counts(self.state, waits)
        if note != self.note and CLOCK.monotonic() - self.noted_at >= 5 and any(self.sessions):
            self.note, self.noted_at = note, CLOCK.monotonic()
            run_script("note-tmux.sh", "-L", self.socket, note, allow=(0, 1, 3), timeout=10)

    def count_work(self) -> None:
        """Commits and changed lines of all at work, for a `status` that cannot wait for git; at half a percent of a core."""
        self.sight.begin_work(self.store, self.state, self.settings._replace(into=self.target))
        held = {f"{claim.agent}/{claim.task['id']}" for claim in self.state.claims.values() if claim.task}
        work = {name: pair for name, pair in self.sight.find_work().items() if name in held}
        if work != self.work:
            self.work = work
            temp = self.store.path(f".{WORK_FILE}.tmp")
            with open(temp, "w", encoding="utf-8") as file:
                file.write(dump_line({"schema": SCHEMA, "work": work}) + "\n")
            os.replace(temp, self.store.path(WORK_FILE))

    # -- stop

    def set_mode(self, mode: str, reason: str = "") -> None:
        """Pause, or go on: agents at work and the merge queue are left alone, new work is handed out or not. Raises Refused."""
        with self.store.transaction() as tx:
            farm = self.store.read_json(FARM_FILE) or {}
            if farm.get("mode") not in ("running", "paused"):
                raise Refused("the farm is not running", "./farm.py up")
            if mode == "running":
                forget_limits(tx)
            data = {**farm, "mode": mode, "reason": reason}
            tx.store.write_durably(FARM_FILE, (dump_line(data) + "\n").encode("utf-8"))
            tx.store.append_event("paused" if mode == "paused" else "resumed", None, why=reason)

    def estop(self) -> list[str]:
        """Everything stops this second, by a signal that nobody can catch; then all work is kept and all claims are freed."""
        psutil = import_package("psutil")
        names, deadline = {*self.everyone(), CONTROL}, CLOCK.monotonic() + 5
        roots = [session.pid for session in probe_sessions(self.socket).values() if not session.dead]
        roots += filter(None, (find_recorded(self.store.path(name)) for name in ("loop.lock", "merger.lock")))
        children = process_children()
        doomed = [process for pid in roots for process in tree_of(pid, children)]
        while doomed and CLOCK.monotonic() < deadline:  # again: what is being killed may just have forked
            for process in doomed:
                try:
                    process.kill()
                except psutil.Error:
                    continue
            doomed = [process for process, name in find_by_environment(FARM_REPO=self.repo) if name in names]
        end_all_gates(worktrees_folder(self.repo, self.settings))
        return self.down(0)

    def down(self, grace_seconds: float, hurry=lambda: False) -> list[str]:
        """Let agents finish, then end exactly what is the farm's, keep all work, free all claims. Returns rescue refs."""
        self.remember("stopping")
        self.stop_loop_and_merger()
        self.names = self.everyone()
        for name in self.names:
            ring(self.store.path("mailbox", name, "bell"))
        deadline = CLOCK.monotonic() + grace_seconds
        while CLOCK.monotonic() < deadline and not hurry() and any(claim.task for claim in self.own_claims()):
            time.sleep(0.1)
        self.end_sessions()
        kept = self.keep_work()
        self.remember("down")
        return kept

    def stop_loop_and_merger(self) -> None:
        """The control session first, so that nothing starts the loop again."""
        psutil = import_package("psutil")
        run_script("stop-tmux.sh", "-C", self.repo, "-L", self.socket, CONTROL, allow=(0, 3))
        pids = [find_recorded(self.store.path(name)) for name in ("loop.lock", "merger.lock")]
        own = [pid for pid in pids if pid and pid != os.getpid()]
        if self.merger is not None and self.merger.poll() is None:
            own.append(self.merger.pid)
        end_processes([psutil.Process(pid) for pid in set(own) if psutil.pid_exists(pid)], 5.0)
        self.end_agent(CONTROL, 5.0)  # a merger that has not yet locked its file
        end_all_gates(worktrees_folder(self.repo, self.settings))

    def everyone(self) -> list[str]:
        """Our agents, and those of a farm that was larger: by their sessions, or by a claim and a worktree of ours."""
        holders = {claim.agent for claim in self.store.snapshot().claims.values()
                   if os.path.isdir(worktree_of(self.repo, self.settings, claim.agent))}
        return sorted({*self.names, *probe_sessions(self.socket), *holders} - {CONTROL})

    def own_claims(self) -> list[Claim]:
        return [claim for claim in self.store.snapshot().claims.values() if claim.agent in self.names]

    def end_sessions(self) -> None:
        """End the sessions' process trees by pid and start time, then the private tmux server."""
        self.probe()
        children = process_children()
        doomed = [process for session in self.sessions.values() if not session.dead for process in tree_of(session.pid, children)]
        end_processes(doomed, 2.0)
        strays = find_by_environment(FARM_REPO=self.repo)
        end_processes([process for process, name in strays if name in self.names], 1.0)
        run_script("stop-tmux.sh", "-C", self.repo, "-L", self.socket, "-a", allow=(0, 3))

    def keep_work(self) -> list[str]:
        """Rescue what agents were at work on, and give every claim back unharmed.

        What lies in other worktrees stays there: `down` removes none, and whoever resets or removes one rescues it first.
        """
        from concurrent.futures import ThreadPoolExecutor

        busy = [claim.agent for claim in self.own_claims() if claim.task]
        places = {name: worktree_of(self.repo, self.settings, name) for name in busy}
        places = {name: place for name, place in places.items() if os.path.isdir(place)}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            rescues = dict(zip(places, pool.map(lambda name: rescue(self.repo, name, places[name]), places), strict=True))
        kept = [ref for ref in rescues.values() if ref]
        with self.store.transaction() as tx:
            for claim in list(tx.state.claims.values()):
                if claim.agent in self.names and find_liveness(Owner.from_json(claim.owner)) is False:
                    LockRegistry(tx).give_up(claim, rescues.get(claim.agent, ""))
        return kept


TOLD_FILE, WORK_FILE = "told.json", "work.json"
NOTICE_SECONDS = 60.0


def run_notice(command: str, event: dict, store: Store) -> None:
    """Run FARM_NOTIFY with `event` on its stdin; its output and how it ended go to logs/notify.log. Never raises."""
    import signal
    import subprocess

    environment = {**os.environ, "FARM_REPO": store.repo, "FARM_AGENT_NAME": CONTROL}  # so that `down` ends it too
    try:
        with open(store.path("logs", "notify.log"), "ab") as log:
            process = subprocess.Popen(["bash", "-c", command], stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=store.repo,
                                       env=environment, start_new_session=True)
            try:
                process.communicate((dump_line(event) + "\n").encode("utf-8"), timeout=NOTICE_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            log.write(f"{utc(CLOCK.now())} {event['event']}: exit code {process.returncode}\n".encode())
    except OSError as error:
        say(f"FARM_NOTIFY: {error}")


def describe_counts(state: State, waits: dict[str, bool]) -> str:
    """The farm in one short line. waits: agent -> whether it waits for a person."""
    at_work = [claim.agent for claim in state.claims.values() if claim.task and claim.agent in waits]
    waiting = sum(waits[name] for name in at_work)
    over = len(state.landed)
    parts = [f"{waiting} wait for you"] * bool(waiting) + [f"{len(at_work) - waiting} work", f"{len(waits) - len(at_work)} idle",
             f"{len(state.ready)} to merge", f"{over}/{len(state.all_tasks())} landed"]
    failed = sum(task.state == "failed" for task in state.pending.values())
    return " \u00b7 ".join(parts + [f"{failed} failed"] * bool(failed))


def is_stranded(task: Task, state: State) -> bool:
    """Whether a task that nobody holds can never be claimed: it is over, or it comes after one that is."""
    if task.state != "pending":
        return True
    before = [state.find_task(name) for name in task.after if name not in state.done]
    return any(other is None or other.id in state.pending and is_stranded(other, state) for other in before)


def changed_at(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# ---------------------------------------------------------------------------------------------- reports
# Looking takes no lock and writes nothing: a status must answer while another verb holds the mutex, and on a broken farm.


def print_json(data) -> None:
    text = json.dumps(data, indent=1, ensure_ascii=False)
    print(re.sub("[\x7f-\x9f\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text))


def duration(seconds: float) -> str:
    """Short: 45s, 3m, 2h10, 3d."""
    minutes = int(seconds // 60)
    if minutes < 1:
        return f"{max(0, int(seconds))}s"
    if minutes < 60:
        return f"{minutes}m"
    return f"{minutes // 60}h{minutes % 60:02d}" if minutes < 2880 else f"{minutes // 1440}d"


def one_width(line: str, width: int) -> str:
    """A line cut to `width` columns of a terminal, with an ellipsis."""
    if text_width(line) <= width:
        return line
    while line and text_width(line) > width - 1:
        line = line[:-1]
    return (line + "\u2026")[:max(0, width)]


def text_width(text: str) -> int:
    """Columns of a terminal: wide characters take two, combining ones none."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)


def terminal_size() -> tuple[int, int]:
    """Columns and lines; 80 and 24 where the terminal does not say (0 and 0)."""
    columns, lines = os.get_terminal_size(1)
    return columns or 80, lines or 24


def terminal_width() -> int:
    """Columns for a table; COLUMNS in the environment goes first."""
    import shutil

    return max(20, shutil.get_terminal_size().columns)


def fit_columns(rows: list[list], headers: list[str], spare: tuple, width: int) -> list[int]:
    """Which columns a table of `width` has room for: those of `spare` go first, in that order. The last one may be cut to 12."""
    widths = [max(map(text_width, (header, *(row[index] for row in rows)))) for index, header in enumerate(headers)]
    kept = list(range(len(headers)))
    for name in spare:
        if sum(widths[index] + 2 for index in kept[:-1]) + min(widths[kept[-1]], 12) <= width:
            break
        kept.remove(headers.index(name))
    return kept


def local_times(text: str) -> str:
    """Stored times within a text as the reader's clock has them: `14:02`, with the day when that is not today."""
    def local(match) -> str:
        then, today = time.localtime(epoch(match[0])), time.localtime(CLOCK.now())
        return time.strftime("%H:%M" if then[:3] == today[:3] else "%Y-%m-%d %H:%M", then)

    return re.sub(r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", local, text)


def table_lines(rows: list[list], headers: list[str], spare: tuple, width: int) -> list[str]:
    """A table cut to `width` (columns named in `spare` go first); width 0: tab-separated, without a head, all columns."""
    rows = [[re.sub("[\u200e\u200f\u202a-\u202e\u2066-\u2069]", "", one_line(str(cell))) for cell in row] for row in rows]
    if not width:
        return ["\t".join(row) for row in rows]
    rows = [list(map(local_times, row)) for row in rows]
    tabulate = import_package("tabulate")
    tabulate.MIN_PADDING = 0  # else a column is two wider than its head
    kept = fit_columns(rows, headers, spare, width)
    text = tabulate.tabulate([[row[index] for index in kept] for row in rows], headers=[headers[index] for index in kept],
                             tablefmt="plain", disable_numparse=True)
    return [one_width(line, width) for line in text.split("\n")]


def print_table(rows: list[list], headers: list[str]) -> None:
    """A table on a terminal, tab-separated in a pipe."""
    for line in table_lines(rows, headers, (), terminal_width() if sys.stdout.isatty() else 0):
        print(line)


def derived_state(task: Task, state: State, now: float) -> str:
    """A pending task that may not be claimed yet is shown as waiting."""
    if task.state == "pending" and (task.not_before > utc(now) or any(name not in state.done for name in task.after)):
        return "waiting"
    return task.state


def task_record(task: Task, state: State, now: float) -> dict:
    """What `tasks --json` says of a task."""
    record = {"id": task.id, "state": derived_state(task, state, now), "title": task.title, "agent": task.agent,
              "attempts": task.attempts, "rev": task.rev, "reason": task.reason}
    record.update({key: value for key, value in task.to_json().items() if key not in record and key != "prompt"})
    return record


def find_activity(store: Store) -> dict:
    """What a live merger is doing (merge_queue/now.json); empty when none runs."""
    now = store.read_json(NOW_FILE) or {}
    shapes = {"pid": int, "start": str, "target": str, "testing": list, "held": dict, "trouble": list}
    gates = now.get("testing", [])
    if not all(isinstance(now.get(key), kind) for key, kind in shapes.items()) or \
            not all(isinstance(gate, dict) and is_texts(gate.get("ids")) for gate in gates) or not is_texts(now["trouble"]) or \
            len(now["trouble"]) not in (0, 2):
        return {}  # nobody's truth: the merger writes it anew
    return now if start_of(now["pid"]) == now["start"] else {}


def queue_records(store: Store, state: State) -> list[dict]:
    """The merge queue in landing order, with what is derived: testing, held behind whom."""
    activity = find_activity(store)
    testing = {task_id for gate in activity.get("testing", []) for task_id in gate["ids"]}
    held = activity.get("held", {})
    records = []
    for task in merge_order(list(state.ready.values()), CLOCK.now()):
        shown = "testing" if task.id in testing else "held" if task.id in held else "ready"
        behind = f"held behind {held[task.id]}" if task.id in held else ""
        records.append({"id": task.id, "state": shown, "branch": task.branch, "commit": task.commit, "agent": task.agent,
                        "reason": behind or task.reason, "title": task.title, "submitted_at": task.submitted_at})
    return records


def describe_queue(state: State, records: list[dict], activity: dict) -> str:
    """One line, such as `landed 12, returned 2, testing 3 (main+8), held 1 behind t-0031`, and what is next."""
    counts = collections.Counter(record["state"] for record in records)
    returned = sum(task.ended_by == "return" for task in state.pending.values())
    parts = [f"landed {len(state.landed)}", f"returned {returned}"]
    largest = max((len(gate["ids"]) for gate in activity.get("testing", [])), default=0)
    if activity.get("testing"):
        parts.append(f"testing {len(activity['testing'])} ({activity['target']}+{largest})")
    if counts["held"]:
        parts.append(f"held {counts['held']} behind {next(iter(activity['held'].values()))}")
    waiting = [record["id"] for record in records if record["state"] == "ready"]
    parts += [f"ready {len(waiting)}, next {waiting[0]}"] if waiting else []
    trouble = activity.get("trouble")
    return " \u00b7 ".join(parts) + (f"\n{trouble[0]}\n  try: {trouble[1]}" if trouble else "")


def agent_record(name: str, session: Session | None, claim: Claim | None, told: dict, usage: Usage | None, store: Store,
                 settings: Settings, preset: str = "") -> dict:
    """One agent as `status --json` shows it; the process tree speaks before anything else."""
    task = claim.get_task() if claim else None
    turn = read_turn(store, name, claim.fence, agent_home(store.repo, settings, name)) if task else {}
    state = session_state(session, told, usage, claim, turn, preset)
    limit = find_limit(store, preset, CLOCK.now()) if state == "idle" else ""
    state = "limited" if limit else state
    since, cause = explain_state(state, session, told, claim if task else None, turn)
    log = store.path("logs", name + ".log")
    return {"agent": name, "state": state, "task": task.id if task else "", "pid": session.pid if session else None,
            "rss_bytes": usage.rss_bytes if usage else 0, "cpu_percent": usage.cpu_percent if usage else 0.0,
            "since": since, "worktree": worktree_of(store.repo, settings, name), "branch": f"farm/{name}/{task.id}" if task else "",
            "last_output_at": utc(os.path.getmtime(log)) if os.path.exists(log) else "", "cause": limit or cause,
            "processes": usage.processes if usage else 0, "preset": preset}


# ---------------------------------------------------------------------------------------------- status
# Who needs a person, why, and what to type. What is slow (git, tmux, processes) gets a time limit or a share of a core.


class WorkProbe:
    """probe-work.sh, begun early and read late. found: AGENT/TASK -> [commits, changed lines], as far as it has come.

    seconds: of CPU that it took, or of time where it had to be ended.
    """

    def __init__(self, store: Store, state: State, settings: Settings):
        import subprocess

        rows = [[f"{claim.agent}/{claim.task['id']}", f"farm/{claim.agent}/{claim.task['id']}",
                 worktree_of(store.repo, settings, claim.agent)] for claim in state.claims.values() if claim.task]
        self.found, self.begun_at, self.seconds, self.rest, self.process = {}, CLOCK.monotonic(), 0.0, b"", None
        if rows and settings.into:
            argv = ["bash", os.path.join(SCRIPTS, "probe-work.sh"), "-C", store.repo, "-b", settings.into]
            self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                            cwd=TOOLKIT, start_new_session=True)
            lines = "".join("\t".join(map(escape_field, row)) + "\n" for row in rows)
            try:
                self.process.stdin.write(os.fsencode(lines))
                self.process.stdin.close()
            except BrokenPipeError:
                pass  # git is missing: nothing is found

    def read(self, limit: float, *, wait: bool) -> dict[str, list]:
        """What is known now; wait: what is known when all is, or `limit` seconds after the beginning. Then the rest is ended."""
        import select

        while self.process:
            left = self.begun_at + limit - CLOCK.monotonic()
            if left <= 0:
                self.end(is_late=True)
            elif not select.select([self.process.stdout], [], [], left if wait else 0)[0]:
                if not wait:
                    break
            elif data := os.read(self.process.stdout.fileno(), 65536):
                *lines, self.rest = (self.rest + data).split(b"\n")
                self.found.update((name, [int(commits), int(changed)]) for name, commits, changed in
                                  (line.decode().split("\t") for line in lines))
            else:
                self.end()
        return self.found

    def end(self, *, is_late: bool = False) -> None:
        """Note what it has taken; what still runs of it is ended, by its process group."""
        import signal

        if is_late:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        self.process.stdout.close()
        _, self.process.returncode, used = os.wait4(self.process.pid, 0)
        self.seconds = CLOCK.monotonic() - self.begun_at if is_late else used.ru_utime + used.ru_stime
        self.process = None


class Sight:
    """What a status needs beside files, from tmux, psutil and git.

    share: of a core, that each of them may take of a process which looks again and again; 0 looks once.
    """

    WORK_SECONDS, SLOW_WORK_SECONDS, TMUX_SECONDS = 0.2, 20.0, 3.0

    def __init__(self, share: float = 0.0):
        self.share, self.kept, self.work, self.error = share, {}, None, None

    def look(self, name: str, function):
        """What `function` says, or what it said a while ago."""
        value, due = self.kept.get(name, (None, -math.inf))
        if CLOCK.monotonic() < due:
            return value
        before, used = CLOCK.monotonic(), sum(os.times()[:4])
        value = function()
        cost = max(sum(os.times()[:4]) - used, CLOCK.monotonic() - before)
        self.kept[name] = value, CLOCK.monotonic() + (cost / self.share if self.share else -1)
        return value

    def find_sessions(self, repo: str) -> dict[str, Session]:
        """probe_sessions; where that cannot be had, `error` says why and none is found: a status answers all the same."""
        try:
            self.error = None
            return self.look("sessions", lambda: probe_sessions(farm_socket(repo), self.TMUX_SECONDS))
        except FarmError as error:
            self.error = error
            return {}

    def begin_work(self, *place) -> None:
        """Begin to count commits and lines, if it is time."""
        if self.work is None or not self.work.process and self.share and \
                CLOCK.monotonic() > self.work.begun_at + max(2.0, self.work.seconds / self.share):
            found = self.work.found if self.work else {}
            self.work = WorkProbe(*place)
            self.work.found = found

    def find_work(self) -> dict[str, list]:
        return self.work.read(self.SLOW_WORK_SECONDS, wait=False) if self.share else self.work.read(self.WORK_SECONDS, wait=True)


def read_note(store: Store, name: str) -> dict:
    """A file of the loop's that is worth nothing when it is damaged: it is written anew."""
    try:
        return store.read_json(name) or {}
    except DamagedState:
        return {}


def read_work(store: Store) -> dict[str, list]:
    """What the loop has counted a while ago, as in WorkProbe.found: better than nothing where git takes its time."""
    found = read_note(store, WORK_FILE).get("work")
    pairs = found.items() if isinstance(found, dict) else ()
    return {name: pair for name, pair in pairs if isinstance(pair, list) and [type(part) for part in pair] == [int, int]}


def measure_sessions(sessions: dict[str, Session]) -> dict[str, Usage]:
    """name -> Usage of each session that lives."""
    live = {name: session.pid for name, session in sessions.items() if not session.dead}
    children = process_children() if live else {}
    return {name: measure(tree_of(pid, children)) for name, pid in live.items()}


def cost_of_claim(store: Store, claim: Claim, spending: list[dict]) -> float:
    """Dollars of an agent's task so far, the conversation at work included."""
    return cost_of_task(spending, claim.task.get("id", "")) + live_cost(store, claim, spending)


def agent_records(store: Store, state: State, settings: Settings, sight: Sight) -> list[dict]:
    """Every agent that has a session, a claim or a place in the farm."""
    sight.begin_work(store, state, settings)
    told = store.read_agents()
    sessions = sight.find_sessions(store.repo)
    usages = sight.look("usages", lambda: measure_sessions(sessions))
    is_up = (store.read_json(FARM_FILE) or {}).get("mode") in ("running", "stopping", "paused")
    names = {*state.claims, *sessions, *(agent_names(settings.n) if is_up else ())} - {CONTROL}
    presets = dict(zip(agent_names(settings.n), share_agents(settings), strict=False))
    records, work = [], {**read_work(store), **sight.find_work()}
    spending = sight.look("spending", lambda: read_spending(store))
    for name in sorted(names):
        preset = presets.get(name, "") if presets.get(name, "") in PRESETS else ""
        claim = state.claims.get(name)
        commits, lines = work.get(f"{name}/{claim.task.get('id')}" if claim else "", (None, None))
        record = agent_record(name, sessions.get(name), claim, told.get(name, {}), usages.get(name), store, settings, preset)
        record.update(title=claim.task.get("title", "") if claim else "", commits=commits, changed_lines=lines,
                      cost_usd=round(cost_of_claim(store, claim, spending), 4) if claim else 0.0)
        records.append(record)
    return records


def farm_status(store: Store, settings: Settings, sight: Sight | None = None) -> dict:
    """What `status --json` prints. Damage is listed under `problems`; the rest is shown as far as it can be read."""
    problems, agents, activity, farm, sight = [], [], {}, {}, sight or Sight()
    try:
        state = store.snapshot()
    except DamagedState:
        state, problems = partial_state(store), [f"{store.path(name)}: {why}" for name, why in find_damaged(store).items()]
    try:
        farm = store.read_json(FARM_FILE) or {}
        activity = find_activity(store)
        agents = agent_records(store, state, settings, sight)
    except FarmError as error:
        problems, sight.error = problems or [str(error)], error
    now, records = CLOCK.now(), []
    if not problems:
        records, problems = queue_records(store, state), [str(sight.error)] if sight.error else []
    loop = find_recorded(store.path("loop.lock"))
    task_counts = collections.Counter(derived_state(task, state, now) for task in state.all_tasks())
    status = {"agents": agents, "tasks": dict(task_counts),
              "merge_queue": dict(collections.Counter(record["state"] for record in records)),
              "queue_line": describe_queue(state, records, activity), "loop": {"pid": loop, "alive": loop is not None},
              "mode": farm.get("mode", ""), "reason": farm.get("reason", ""), "trouble": activity.get("trouble", []),
              "target": activity.get("target", ""), "landed_at": sorted(task.landed_at for task in state.landed.values())[-20:]}
    status["spent"] = sum_spending(sight.look("spending", lambda: read_spending(store)))
    status["next"] = [{"what": what, "try": hint} for what, hint in next_steps(status, problems, state)]
    code = sight.error.exit_code if sight.error else DamagedState.exit_code
    return {**status, "problems": problems, "exit_code": code} if problems else status


def agent_number(name: str) -> str:
    """The short way to name an agent on the command line: 3 for agent-003."""
    return str(int(name[6:])) if re.fullmatch(r"agent-\d{3}", name) else name


# What a person can do about an agent in each state of trouble; the order is that of `status`.
STEPS_OF = {"waiting": ("waits for a person", "attach {0}"), "stuck": ("is stuck", "attach {0}"),
            "parked": ("is parked", "logs {0} && ./farm.py up"), "dead": ("ended", "logs {0}"), "failed": ("failed", "logs {0}"),
            "zombie": ("is a zombie", "logs {0}"), "limited": ("", "")}
STATE_ORDER = (*STEPS_OF, "starting", "working", "idle", "stopped")


def state_rank_of(state: str) -> int:
    """Those that need a person first, unknown states last."""
    return STATE_ORDER.index(state) if state in STATE_ORDER else len(STATE_ORDER)


def state_rank(record: dict) -> tuple:
    return state_rank_of(record["state"]), record["agent"]


def next_steps(status: dict, problems: list[str], state: State) -> list[tuple[str, str]]:
    """(what is the matter, what to type) for each trouble, the most pressing first."""
    steps = [(problem, "./farm.py doctor") for problem in problems]
    for record in sorted(status["agents"], key=state_rank):
        words, command = STEPS_OF.get(record["state"], ("", ""))
        if record["state"] == "limited":  # one line for all whom it holds up
            steps += [(record["cause"], "./farm.py up")] if (record["cause"], "./farm.py up") not in steps else []
        elif words:
            why = record["cause"]
            steps.append((f"{record['agent']} {words}" + (f": {why}" if why else ""),
                          "./farm.py " + command.format(agent_number(record["agent"]))))
    if status["trouble"]:
        steps.append(tuple(status["trouble"]))
    if status["mode"] == "paused":
        why, _, command = status["reason"].partition("; to go on: ")
        steps.append((why or "the farm is paused: no new work is handed out", command or "./farm.py resume"))
    if not status["loop"]["alive"]:
        stopped = "no loop runs: nothing is started, restarted or merged"
        steps.append((stopped, "./farm.py up") if status["tasks"] else ("there is no task yet", "./farm.py add 'what to do'"))
    return steps + [(f"{task.id} failed: {task.reason}", f"./farm.py retry {task.id}")
                    for task in state.pending.values() if task.state == "failed"]


def partial_state(store: Store) -> State:
    """What can be read of a damaged farm: each file by itself."""
    state = State()
    for name, places in ((PENDING_FILE, (("pending", "tasks"),)), (READY_FILE, (("ready", "ready"), ("landed", "landed")))):
        try:
            data = store.read_queue(name, tuple(key for _, key in places))
            for place, key in places:
                getattr(state, place).update((task.id, task) for task in store.read_tasks(name, place, data[key]))
        except DamagedState:
            continue
    try:
        state.claims = store.read_claims()
    except DamagedState:
        state.claims = {}
    return state


def ago(at: str) -> str:
    """How long since a stored time, `-` for none."""
    return duration(CLOCK.now() - epoch(at)) if at else "-"


def agent_row(record: dict) -> list[str]:
    note = record["cause"] or record.get("title", "")
    cost = f"${record['cost_usd']:.2f}" if record.get("cost_usd") else "-"
    counts = ["-" if record.get(key) is None else record[key] for key in ("changed_lines", "commits")]
    return [record["agent"], record["state"], ago(record["since"]), record["task"] or "-", *counts,
            f"{record['cpu_percent']:.0f}%", f"{record['rss_bytes'] >> 20}M", ago(record["last_output_at"]), cost, note]


def describe_spending(spent: dict) -> str:
    tokens = spent["tokens_in"] + spent["tokens_out"]
    return f"${spent['cost_usd']:.2f}, " + (f"{tokens / 1e6:.1f}M tokens" if tokens >= 1e5 else f"{tokens} tokens")


def status_lines(status: dict, room: int = 6) -> list[str]:
    """What stands below the agents: tasks, merge queue, loop, and what a person should type next, in `room` lines."""
    tasks = " \u00b7 ".join(f"{name} {count}" for name, count in sorted(status["tasks"].items())) or "none"
    loop = f"running (pid {status['loop']['pid']})" if status["loop"]["alive"] else "not running"
    mode = f", {status['mode']}" if status["mode"] in ("paused", "stopping") else ""
    steps = [f"next: {step['try']} # {step['what']}" for step in status["next"]]
    if len(steps) > room > 0:
        steps[room - 1:] = [f"next: ./farm.py status --json # {len(steps) - room + 1} more"]
    spent = [f"cost: {describe_spending(status['spent'])}"] if any(status["spent"].values()) else []
    lines = [f"tasks: {tasks}", f"merge queue: {status['queue_line']}", *spent, f"loop: {loop}{mode}", *steps[:room]]
    return [one_line(line) for line in lines]


COLUMNS = ["AGENT", "STATE", "FOR", "TASK", "LINES", "COMMITS", "CPU", "MEM", "OUTPUT", "COST", "NOTE"]
SPARE_COLUMNS = ("NOTE", "COST", "MEM", "CPU", "OUTPUT", "COMMITS", "LINES")


def status_text(status: dict, width: int, height: int = 0) -> list[str]:
    """Agents that need a person first, then counts, then what to type next: lines of `width` (0: tab-separated), at most
    `height` of them (0: all).
    """
    below = [one_width(local_times(line), width) if width else line for line in status_lines(status)]
    rows = [agent_row(record) for record in sorted(status["agents"], key=state_rank)]
    room = max(2, height - len(below) - 2) if height else len(rows)
    table = table_lines(rows[:room], COLUMNS, SPARE_COLUMNS, width) if rows else []
    return table + ([f"... {len(rows) - room} more"] if len(rows) > room else []) + below


def print_status(status: dict) -> None:
    print("\n".join(status_text(status, terminal_width() if sys.stdout.isatty() else 0)))


class Progress:
    """A bar on a terminal, a line in a pipe whenever the counts change."""

    def __init__(self, stream):
        self.stream, self.is_terminal, self.last = stream, stream.isatty(), ""

    def show(self, state: State) -> None:
        counts = collections.Counter(task.state for task in state.all_tasks())
        total, over = sum(counts.values()), counts["landed"] + counts["failed"] + counts["canceled"]
        shown = ("landed", "ready", "claimed", "pending", "failed", "canceled")
        words = " \u00b7 ".join(f"{name} {counts[name]}" for name in shown if counts[name])
        if words == self.last:
            return
        self.last = words
        if self.is_terminal:
            bar = "#" * (24 * over // max(total, 1))
            self.stream.write(f"\r\x1b[K[{bar:<24}] {over}/{total} {words}")
        else:
            self.stream.write(f"{over}/{total} done: {words}\n")
        self.stream.flush()

    def close(self) -> None:
        if self.is_terminal and self.last:
            self.stream.write("\n")


# ---------------------------------------------------------------------------------------------- logs


class LogReader:
    """What an agent's sessions have printed, from the oldest file on (NAME.log.9 ... NAME.log.1, NAME.log), through rotations.

    The pane's pipe renames a log that has grown (spawn-tmux.sh); nothing is copied, so a file is known by its inode.
    """

    UNFINISHED = r"(?:\x1b(?:\[[0-?]*[ -/]*|[]PX^_][^\x07\x1b]{0,4096}\x1b?|[ -/]*)?|\r)\Z"

    def __init__(self, path: str):
        import codecs

        self.path, self.held, self.files = path, "", []
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.open_newer(set())

    def open_newer(self, known: set) -> None:
        """Open what is not known by its inode. Newest first: a file that is renamed meanwhile is met twice, and not never."""
        found = []
        for name in [self.path, *(f"{self.path}.{number}" for number in range(1, 10))]:
            try:
                descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
            inode = os.fstat(descriptor).st_ino
            if inode in known:
                os.close(descriptor)
                break  # whatever is older was read before
            known.add(inode)
            found.append(open(descriptor, "rb", buffering=0))
        self.files += found[::-1]

    def skip_to_last(self, size: int) -> None:
        """Begin `size` bytes before the end."""
        for file in reversed(self.files):
            here = os.fstat(file.fileno()).st_size
            file.seek(max(0, here - max(0, size)))
            size -= here

    def read(self) -> bytes:
        """The next piece; empty when nothing more is there yet."""
        while self.files:
            file = self.files[0]
            status = os.fstat(file.fileno())
            if status.st_size < file.tell():  # somebody has emptied it
                file.seek(0)
            if data := file.read(65536):
                return data
            if len(self.files) == 1:
                self.open_newer({status.st_ino})
                if len(self.files) == 1:
                    break
                if data := file.read(65536):  # written between the last look and the renaming
                    return data
            self.files.pop(0).close()
        return b""

    def clean(self, data: bytes) -> str:
        """`data` as printable text; an escape sequence that is cut off at its end is kept for the next piece."""
        text = self.held + self.decoder.decode(data)
        cut = re.search(self.UNFINISHED, text)
        self.held, text = (text[cut.start():], text[:cut.start()]) if cut else ("", text)
        return printable(text.replace("\r\n", "\n").replace("\r", "\n"))

    def last_lines(self, count: int) -> str:
        """The last `count` lines of what is there."""
        self.skip_to_last(4096 * count)
        lines = collections.deque("".join(map(self.clean, iter(self.read, b""))).splitlines(keepends=True), maxlen=count)
        return "".join(lines)


# ---------------------------------------------------------------------------------------------- watch
# The status again and again on a screen of its own, with keys. It writes nothing and takes no lock. Files are looked at when they
# have changed; tmux, processes and git only as often as each of them stays below half a percent of a core.


def estimate_left(landed_at: list[float], left: int, now: float) -> float | None:
    """Seconds until `left` more tasks have landed, at the pace of the last 20; None where there is no pace yet."""
    recent = sorted(landed_at)[-20:]
    if not left or len(recent) < 2 or now <= recent[0]:
        return None
    return left * (now - recent[0]) / (len(recent) - 1)


def progress_line(status: dict, width: int, now: float) -> str:
    """A bar over all tasks, and how long it will still take."""
    counts = status["tasks"]
    total, over = sum(counts.values()), sum(counts.get(name, 0) for name in ("landed", "failed", "canceled"))
    seconds = estimate_left(list(map(epoch, status["landed_at"])), total - over, now) if status["loop"]["alive"] else None
    words = f" {over}/{total} tasks" + (f", about {duration(seconds)} left" if seconds else "")
    room = max(4, min(40, width - len(words) - 2))
    return "[" + ("#" * (room * over // max(total, 1))).ljust(room, ".") + "]" + words


class Terminal:
    """The screen and the keys of this process: another screen and no echo between `enter` and `leave`."""

    def __init__(self):
        self.has_keys, self.saved, self.last = sys.stdin.isatty(), None, ""

    def enter(self) -> None:
        import termios
        import tty

        if self.has_keys:
            self.saved = termios.tcgetattr(0)
            tty.setcbreak(0, termios.TCSANOW)
        self.write("\x1b[?1049h\x1b[?25l")
        self.last = ""

    def leave(self) -> None:
        """The terminal as it was; a terminal that is gone is fine."""
        import termios

        try:
            self.write("\x1b[?25h\x1b[?1049l")
            if self.saved is not None:
                termios.tcsetattr(0, termios.TCSADRAIN, self.saved)
        except (OSError, termios.error):
            pass

    def suspend(self, *_) -> None:
        """Ctrl-Z: stop like any other program, and go on like one."""
        import signal

        self.leave()
        os.kill(os.getpid(), signal.SIGSTOP)
        self.enter()

    def write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def draw(self, lines: list[str]) -> None:
        """One write a frame, each line cleared behind its end: no flicker, and nothing of the last frame stays."""
        text = "\x1b[H" + "\x1b[K\n".join(lines) + "\x1b[K\x1b[J"
        if text != self.last:
            self.write(text)
            self.last = text

    def read_key(self, seconds: float) -> str:
        """What was typed within `seconds`; empty for nothing and for keys that send an escape sequence."""
        import select

        if not self.has_keys:
            time.sleep(seconds)
        elif select.select([0], [], [], seconds)[0]:
            typed = os.read(0, 64).decode("utf-8", "replace")
            self.has_keys = bool(typed)  # else the terminal has hung up
            return "" if typed.startswith("\x1b") else typed
        return ""


class Watch:
    """`status --watch` on a terminal."""

    LOOK_SECONDS, DRAW_SHARE, TYPE_SECONDS = 2.0, 0.008, 0.8
    KEYS = "1..9 attach \u00b7 l logs \u00b7 m merge \u00b7 p pause \u00b7 q leave"

    def __init__(self, call: Call, look, should_stop):
        self.call, self.look, self.should_stop = call, look, should_stop
        self.terminal, self.sight, self.status, self.trouble = Terminal(), Sight(0.004), {}, ""
        self.typed, self.typed_at, self.drawn, self.next_at = "", 0.0, (), 0.0

    def run(self) -> int:
        import signal

        signal.signal(signal.SIGTSTP, self.terminal.suspend)
        self.terminal.enter()
        try:
            while not self.should_stop.is_set():
                self.refresh()
                if self.press(self.terminal.read_key(0.25)):
                    return 0
        finally:
            self.terminal.leave()
        return 128 + self.should_stop.signal

    def refresh(self) -> None:
        """Draw when something has changed, the terminal has another size, or two seconds are over."""
        size, now = terminal_size(), CLOCK.monotonic()
        seen = (size, self.typed, self.call.store.signature(), int(now / self.LOOK_SECONDS))
        if seen == self.drawn or now < self.next_at and seen[:2] == self.drawn[:2]:
            return
        used = sum(os.times()[:2])
        if seen[2:] != self.drawn[2:]:
            try:
                self.status, self.trouble = self.look(self.sight), ""
            except (FarmError, OSError) as error:
                self.trouble = f"{error}; trying again"
        self.terminal.draw(self.frame(*size))
        self.drawn, self.next_at = seen, now + min(2 * self.LOOK_SECONDS, (sum(os.times()[:2]) - used) / self.DRAW_SHARE)

    def frame(self, columns: int, lines: int) -> list[str]:
        clock = time.strftime("%H:%M:%S", time.localtime(CLOCK.now()))
        head = one_width(f"{one_line(os.path.basename(self.call.repo))} \u00b7 {clock}", columns)
        foot = f"attach {self.typed} (l: its log)" if self.typed else self.KEYS if self.terminal.has_keys else "Ctrl-C: leave"
        if self.trouble:
            body = ["", one_line(self.trouble)]
        else:
            body = [progress_line(self.status, columns, CLOCK.now()), "", *status_text(self.status, columns, max(8, lines - 4))]
        return [head, *(one_width(line, columns) for line in body)][:lines - 1] + [one_width(foot, columns)]

    def press(self, keys: str) -> bool:
        """Do what the keys say; True to leave. A number by itself counts after a moment, or at Enter."""
        for key in keys:
            if key == "q":
                return True
            if key in "0123456789":
                self.typed, self.typed_at = self.typed + key, CLOCK.monotonic()
                continue
            number, self.typed = self.typed, ""
            if key in "\r\n" and number:
                self.do("attach", number)
            elif key == "l":
                self.do("logs", *([number] if number else ["--all"]), "-f", "-n", "200")
            elif key == "m":
                self.do("merge", pause=True)
            elif key == "p":
                self.do("resume" if self.status.get("mode") == "paused" else "pause")
        if self.typed and CLOCK.monotonic() - self.typed_at > self.TYPE_SECONDS:
            number, self.typed = self.typed, ""
            self.do("attach", number)
        return False

    def do(self, *words: str, pause: bool = False) -> None:
        """Another verb on the terminal as it was; its Ctrl-C brings back here."""
        import signal
        import subprocess

        self.terminal.leave()
        say(f"{' '.join(words)} (Ctrl-C: back)" if words[0] in ("logs", "merge") else " ".join(words))
        environment = {**os.environ, "FARM_PYTHON": sys.executable}
        code = subprocess.call([os.path.join(SCRIPTS, "farm"), "--repo", self.call.repo, *words], env=environment)
        if self.should_stop.signal == signal.SIGINT:
            self.should_stop.clear()
        if (code or pause) and self.terminal.has_keys and code not in (130, -signal.SIGINT):
            say("press Enter to go back")
            self.terminal.read_key(60)
        self.terminal.enter()
        self.drawn = ()


# ---------------------------------------------------------------------------------------------- report page

LEFT, RIGHT, TOP, ROW = 96, 972, 22, 18
STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800)
ENDS = {"submitted": "queued", "attempt-failed": "failed", "owner-died": "failed", "released": "released", "returned": "returned",
        "landed": "landed"}
STRIPS = {"waits": "waited for a person", "merging": "work being gated and merged"}
FATES = {"landed": "landed", "queued": "in the merge queue", "returned": "came back", "failed": "failed", "released": "given back",
         "open": "not finished", "green": "green", "red": "red", "none": "no verdict", "cut": "ended early"}
CAUSES = {"returned": "came back", "attempt-failed": "attempt failed", "owner-died": "agent died", "session-ended": "session ended"}
GLYPHS = {"landed": "\u25cf", "ready": "\u25d5", "claimed": "\u25d1", "failed": "\u2715", "canceled": "\u2212", "": "\u25cb"}
FORGES = {"github": "/commit/", "gitlab": "/-/commit/", "bitbucket": "/commits/", "codeberg": "/commit/", "sr": "/commit/"}
PAGE_STYLE = """\
:root{color-scheme:light dark;--paper:#fdfdfb;--ink:#1e2329;--soft:#59626c;--line:#e0e4e8;--faint:#f0f2f3;--on:#fff;--blue:#2b648f;
--amber:#946010;--red:#a93a34;--green:#2e7450;--idle:#8d969f}@media screen and (prefers-color-scheme:dark){:root{--paper:#14181c;
--ink:#e3e7ea;--soft:#9ba5af;--line:#2b3239;--faint:#20262c;--on:#10151a;--blue:#7db4dc;--amber:#dfae5c;--red:#ec8f88;
--green:#7fc79f;--idle:#6a747e}}*{box-sizing:border-box;print-color-adjust:exact;-webkit-print-color-adjust:exact}main{
max-width:70rem;margin:auto;padding:3rem 1.5rem}body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.55 system-ui,
-apple-system,"Segoe UI",Roboto,"Liberation Sans",Arial,sans-serif;font-variant-numeric:tabular-nums}h1{font-size:1.75rem;
line-height:1.25;margin:0}h1,h2,dd{font-weight:600}h2{font-size:1.15rem;margin:2.75rem 0 .2rem}p{margin:.3rem 0;max-width:46rem}
figure{margin:1rem 0 0}a{color:var(--blue)}.soft,caption,figcaption,dt,thead th,small{color:var(--soft);font-size:.88rem;
font-weight:400}dd small,td small{display:block}.note{border-left:3px solid var(--amber);padding:.2rem .8rem;margin-top:1rem}
figcaption span{margin-right:1.2rem;white-space:nowrap}dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.8rem,1fr));
gap:1.1rem 1.5rem;margin:1.75rem 0 0}dl div{border-top:2px solid var(--line);padding-top:.5rem}dd{margin:0;font-size:1.6rem;
line-height:1.3}figcaption{margin-top:.4rem}.wide{overflow-x:auto}.wide:focus-visible{outline:2px solid var(--blue);
outline-offset:3px}svg{display:block;width:100%;min-width:46rem}figcaption svg,svg.bar{display:inline-block;width:20px;min-width:0;
height:10px;margin-right:.4rem}svg.bar{width:7rem}table{border-collapse:collapse;min-width:60%;margin-top:.8rem;font-size:.93rem}
caption{padding-bottom:.3rem;text-align:left}th,td{padding:.38rem 1.5rem .38rem 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line);font-weight:400}th,time,code,.k{white-space:nowrap}.n{text-align:right}.t{display:block;
min-width:14rem;white-space:normal;overflow-wrap:anywhere}code{font:.92em ui-monospace,Menlo,Consolas,"Liberation Mono",monospace}
text{font-size:11px;fill:var(--soft)}.e{text-anchor:end}.m{text-anchor:middle}.grid{stroke:var(--line)}.idle{stroke:var(--idle)}
.quiet{fill:var(--faint)}.landed{fill:var(--blue)}.green{fill:var(--green)}.returned{fill:url(#amber)}.failed{fill:url(#cross)}
.red{fill:url(#red)}.queued,.released,.open,.none,.cut{fill:var(--paper);stroke:var(--blue)}.open,.cut{stroke-dasharray:3 2}
.released,.none,.cut{stroke:var(--soft)}.in{font-size:10px;fill:var(--on);paint-order:stroke;stroke-width:4px;pointer-events:none}
.open+.in,.queued+.in,.released+.in,.none+.in,.cut+.in{fill:var(--ink)}.failed+.in,.red+.in{stroke:var(--red)}.returned+.in{
stroke:var(--amber)}.waits{stroke:var(--amber);stroke-width:3}.merging{stroke:var(--green);stroke-width:2;stroke-dasharray:3 1.5}
.end{stroke:var(--ink);stroke-width:2}.a,.b{stroke:var(--blue);stroke-width:2;fill:none}.b{stroke:var(--soft);
stroke-dasharray:5 4}.area{fill:var(--blue);opacity:.13}@media(max-width:40rem){main{padding:1.5rem 1rem}}@media print{:root{
--paper:#fff;font-size:11px}main{padding:0;max-width:none}body{font-size:12px}svg{min-width:0}.wide{overflow:visible}tr,figure,
dl div{break-inside:avoid}h2{break-after:avoid}}"""
# The page is complete without it: it says times in the reader's zone where that is not the writer's.
PAGE_SCRIPT = """\
for(const e of document.querySelectorAll("[datetime],[data-at]")){const d=new Date(e.getAttribute("datetime")||e.dataset.at);
const s=new Date(d-d.getTimezoneOffset()*6e4).toISOString().replace("T"," ");e.textContent=s.slice(...e.dataset.cut.split(" "))}
for(const e of document.querySelectorAll(".zone"))e.textContent=Intl.DateTimeFormat().resolvedOptions().timeZone"""
# Outcomes differ in pattern too, so that nothing is said by colour alone.
PATTERNS = "<defs>" + "".join(
    f'<pattern id="{name}" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="5" '
    f'height="5" style="fill:var(--{colour})"/><path d="{lines}" style="stroke:var(--paper)" stroke-width="1.5"/></pattern>'
    for name, colour, lines in (("amber", "amber", "M0 0V5"), ("cross", "red", "M0 0V5M0 0H5"), ("red", "red", "M0 0H5"))
) + "</defs>"


class Stretch:
    """An agent's attempt (`work`), its session (`here`) or a slot's `gate`, from `start` to `end` (epoch seconds), and its fate."""

    def __init__(self, row: str, what: str, start: float):
        self.row, self.what, self.start, self.end, self.fate = row, what, start, None, "open"

    @property
    def seconds(self) -> float:
        return self.end - self.start


def word(record, key: str, width: int = 100) -> str:
    """A field of an event that anybody may have written, as one printable line; empty when it is no text."""
    value = record.get(key) if isinstance(record, dict) else None
    return one_line(value, width) if isinstance(value, str) else ""


def cause_of(why: str) -> str:
    """A reason without what belongs to one case only, so that like ones count together."""
    why = re.sub(r"(: | in ).*", "", re.sub(r"agent-\d+", "the agent", why))
    why = re.sub(r"\b(?:[0-9a-f]{7,40}|\d{4,})\b", "\u2026", why)
    return why[:1].upper() + why[1:] or "No reason was given"


class History:
    """events.jsonl, folded once.

    work, here, gate: Stretches by start; strips: those of an agent's row that waits for a person, or whose work is being gated and
    merged; restarts: (agent, at); series: state -> (at, count) steps; causes: (what, cause) -> ids; judged: submissions that
    landed or came back after a gate; cost, tokens: name -> dollars or count, "" for all; unread: lines that are no event.
    """

    def __init__(self):
        self.work, self.here, self.gate, self.times, self.latest = [], [], [], [], {}
        self.series, self.causes, self.states = collections.defaultdict(list), collections.defaultdict(list), {}
        self.counts, self.cost, self.tokens = collections.Counter(), collections.Counter(), collections.Counter()
        self.started, self.strips, self.open_strips, self.restarts = set(), [], {}, []
        self.gated, self.judged, self.unread = set(), 0, 0

    def is_open(self, *key: str) -> bool:
        return key in self.latest and self.latest[key].end is None

    def begin(self, kind: str, at: float, row: str, what: str) -> None:
        """A new Stretch, found by its row and by what it is; one that is open there, its end not recorded, is cut."""
        for key in ((kind, row), (kind, "", what)):
            if self.is_open(*key):
                self.close(self.latest[key].start if kind == "gate" else at, "cut", *key)
        self.latest[kind, row] = self.latest[kind, "", what] = Stretch(row, what, at)
        getattr(self, kind).append(self.latest[kind, row])

    def close(self, at: float, fate: str, *key: str) -> None:
        """Give the latest Stretch found by `key` its fate, and an end when it has none."""
        if key in self.latest:
            self.latest[key].end = at if self.is_open(*key) else self.latest[key].end
            self.latest[key].fate = fate

    def fold(self, at: float, event: dict) -> None:
        kind = event["event"]
        task_id, agent = word(event.get("task"), "id"), word(event, "agent") or word(event.get("task"), "agent")
        self.times.append(at)
        if kind == "claimed":
            self.begin("work", at, agent, task_id)
        if kind == "session-started":  # the loop may see it after its first claim
            if agent in self.started or ("here", agent) in self.latest and not self.is_open("here", agent):
                self.restarts.append((agent, at))
            self.started.add(agent)
        if kind in ("claimed", "session-started") and not self.is_open("here", agent):
            self.begin("here", at, agent, agent)
        if kind in ENDS:
            self.close(at, ENDS[kind], "work", "", task_id)
        elif kind == "session-ended":
            self.close(at, "ended", "here", agent)
        elif kind.startswith("gate-"):
            self.fold_gate(at, kind, event)
        if kind in CAUSES:
            self.causes[CAUSES[kind], cause_of(word(event, "why", 500) or word(event, "cause"))].append(task_id or agent)
        if task_id:
            self.count(at, kind, task_id, event)
        self.fold_strips(at, kind, task_id, agent)

    def fold_strips(self, at: float, kind: str, task_id: str, agent: str) -> None:
        if kind in ("agent-goes-on", "agent-waits", "session-ended", "submitted", "attempt-failed", "owner-died", "released"):
            self.close_strip(at, "waits", agent)
        if kind in ("submitted", "landed", "returned"):
            self.close_strip(at, "merging", task_id)
        if kind in ("agent-waits", "submitted") and agent:
            strip = Stretch(agent, task_id, at)
            strip.fate = "waits" if kind == "agent-waits" else "merging"
            self.open_strips[strip.fate, agent if kind == "agent-waits" else task_id] = strip
            self.strips.append(strip)

    def close_strip(self, at: float, *key: str) -> None:
        if key in self.open_strips:
            self.open_strips.pop(key).end = at

    def fold_spending(self, lines: list[dict]) -> None:
        for line in lines:
            names = {"", one_line(line["agent"], 100), one_line(line["task"], 100)}
            self.cost.update(dict.fromkeys(names, line["cost_usd"]))
            self.tokens.update(dict.fromkeys(names, line["tokens_in"] + line["tokens_out"]))

    def fold_gate(self, at: float, kind: str, event: dict) -> None:
        slot, ids, colour = f"gate {one_line(str(event.get('slot')), 6)}", event.get("ids"), event.get("colour")
        if kind == "gate-started":
            names = [one_line(name, 100) for name in ids if isinstance(name, str)] if isinstance(ids, list) else []
            self.gated.update(names)
            self.begin("gate", at, slot, " ".join([slot, *names]))
        elif kind == "gate-ended":
            self.close(at, colour if colour in ("green", "red") else "none", "gate", slot)

    def count(self, at: float, kind: str, task_id: str, event: dict) -> None:
        """A step of the states' counts; a submission that had a gate is judged when it lands or comes back."""
        state = word(event["task"], "state")
        self.counts.subtract([self.states.get(task_id)])
        self.counts.update([state])
        self.states[task_id] = state
        for name, value in {**self.counts, "all": len(self.states)}.items():
            if self.series[name][-1:] != [(at, value)]:
                self.series[name].append((at, value))
        if kind in ("landed", "returned") and task_id in self.gated:
            self.judged += not word(event, "why").startswith("it conflicts with")
            self.gated.discard(task_id)

    def finish(self, now: float, is_live: bool) -> None:
        """Give what is open an end: now where the farm is at work, else the last that is known of it."""
        self.times += [now] if is_live or not self.times else []
        last = max(self.times)
        for strip in self.open_strips.values():
            strip.end = last
        for stretch in self.work + self.here + self.gate:
            if stretch.end is None:  # a gate that was ended early leaves no event
                is_cut = stretch in self.gate and not is_live
                stretch.end, stretch.fate = (stretch.start, "cut") if is_cut else (last, "open")


def fold_history(store: Store) -> History:
    """Fold events.jsonl in the order of time; a torn or unparsable line is counted and passed over."""
    history, events, path = History(), [], store.path("events.jsonl")
    for line in filter(bytes.strip, store.disk.read(path).split(b"\n") if os.path.exists(path) else ()):
        try:
            event = json.loads(line.decode("utf-8"))
            if not isinstance(event["event"], str) or epoch(event["at"]) <= 0:
                raise ValueError("not an event")
            events.append((epoch(event["at"]), event))
        except (ValueError, KeyError, TypeError, RecursionError):
            history.unread += 1
    for at, event in sorted(events, key=lambda pair: pair[0]):
        history.fold(at, event)
    history.fold_spending(read_spending(store))
    return history


class Scale:
    """Time as x; parts: (start, end, x of the start). A quiet time, nothing held and nothing tested, is cut to a narrow gap."""

    def __init__(self, history: History):
        busy = [(stretch.start, stretch.end) for stretch in history.work + history.gate]
        longest = max(60.0, min(1800.0, sum(end - start for start, end in busy) / 4))
        spans = [[min(history.times), min(history.times) + 1]]
        for start, end in sorted(busy + [(at, at) for at in history.times]):
            if start - spans[-1][1] > longest:
                spans.append([start, start + 1])
            spans[-1][1] = max(spans[-1][1], end)
        gap = min(16.0, 300 / len(spans))
        self.total, self.parts, left = sum(end - start for start, end in spans), [], LEFT
        self.per_second = (RIGHT - LEFT - gap * (len(spans) - 1)) / self.total
        for start, end in spans:
            self.parts.append((start, end, left))
            left += (end - start) * self.per_second + gap

    def x(self, at: float) -> float:
        import bisect

        start, end, left = self.parts[max(0, bisect.bisect(self.parts, (at, math.inf)) - 1)]
        return round(left + (min(max(at, start), end) - start) * self.per_second, 1)

    def ticks(self) -> list[tuple[float, float, str]]:
        """(x, epoch seconds, `cut` of stamp) at round times of the local clock, or at a part's start; labels do not touch."""
        step = next((step for step in STEPS if self.total / step <= 8), int(self.total / 8) + 1)
        cut = "5 16" if self.parts[-1][1] - self.parts[0][0] > 80000 else "11 19" if step < 60 else "11 16"
        found = [(-math.inf, 0.0, cut)]
        for start, end, _ in self.parts:
            offset = time.localtime(start).tm_gmtoff
            for at in range(-int(-(start + offset) // step) * step - offset, int(end) + 1, step) or (start,):
                if self.x(at) - found[-1][0] > 84:
                    found.append((self.x(at), at, cut))
        return found[1:]


def as_html(text, width: int = 300) -> str:
    """Foreign text as one printable line, escaped."""
    from html import escape

    return escape(one_line(str(text), width))


def number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def stamp(at: float, cut: str = "0 16", svg: str = "") -> str:
    """A time in local words (`cut`: first and last character kept) with UTC beside it for PAGE_SCRIPT. svg: a text's attributes."""
    first, last = map(int, cut.split())
    text = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))[first:last]
    head, tail = (f"text {svg} data-at", "text") if svg else ("time datetime", "time")
    return f'<{head}="{utc(at)}" data-cut="{cut}">{text}</{tail}>'


def draw_axis(scale: Scale, bottom: float) -> str:
    """Times above with a line down from each, and a grey band for what was cut out."""
    out, ends = [], [end for _, end, _ in scale.parts]
    for before, (start, _, x) in zip(ends, scale.parts[1:], strict=False):
        out.append(f'<rect class="quiet" x="{scale.x(before)}" y="18" width="{x - scale.x(before):.1f}" height="{bottom - 18}">'
                   f"<title>nothing happened for {duration(start - before)}</title></rect>")
    for x, at, cut in scale.ticks():
        out.append(f'<path class="grid" d="M{x} 18V{bottom}"/>' + stamp(at, cut, f'class="m" x="{x}" y="12"'))
    return "".join(out)


def draw_bar(stretch: Stretch, label: str, name: str, y: int, scale: Scale) -> str:
    """A Stretch: its fate in fill and pattern, and in words in its tooltip; its label where there is room."""
    x = scale.x(stretch.start)
    width = max(2.0, round(scale.x(stretch.end) - x, 1))
    text = f'<text class="in" x="{x + 4}" y="{y + 12}">{label}</text>' if width > 6 * len(label) + 8 else ""
    return (f'<rect class="{stretch.fate}" x="{x}" y="{y + 2}" width="{width}" height="{ROW - 5}" rx="1.5"><title>{name}: '
            f"{FATES[stretch.fate]}, {duration(stretch.seconds)}</title></rect>{text}")


def draw_strip(strip: Stretch, y: int, scale: Scale) -> str:
    """A line above the bar for a time of waiting, below it for work in the gate and merge."""
    x, y = scale.x(strip.start), y + (1 if strip.fate == "waits" else ROW - 2)
    words = f"{as_html(strip.what)} {STRIPS[strip.fate]}, {duration(strip.seconds)}".strip()
    return f'<path class="{strip.fate}" d="M{x} {y}h{max(2.0, scale.x(strip.end) - x):.1f}"><title>{words}</title></path>'


def draw_timeline(history: History, scale: Scale) -> tuple[str, int]:
    """Rows of agents, then of gate slots: the drawing and its height."""
    rows = sorted({here.row for here in history.here})
    tops = {("here", row): TOP + ROW * index for index, row in enumerate(rows)}
    for row in sorted({gate.row for gate in history.gate}, key=lambda row: (len(row), row)):
        tops["gate", row] = TOP + ROW * len(tops) + 10
    bottom = TOP + ROW * len(tops) + 10
    out = [PATTERNS, draw_axis(scale, bottom)]
    out += [f'<text class="e" x="{LEFT - 8}" y="{y + 12}">{as_html(row, 14)}</text>' for (_, row), y in tops.items()]
    crosses = []
    for here in history.here:
        y, end = tops["here", here.row] + 8, scale.x(here.end)
        out.append(f'<path class="idle" d="M{scale.x(here.start)} {y}H{end}"/>')
        if here.fate == "ended":
            crosses.append(f'<path class="end" d="M{end - 3.5:.1f} {y - 3}l7 7m0-7l-7 7"><title>session ended</title></path>')
    out += [draw_bar(work, as_html(work.what, 40), as_html(work.what), tops["here", work.row], scale) for work in history.work]
    out += [draw_strip(strip, tops["here", strip.row], scale) for strip in history.strips if ("here", strip.row) in tops]
    crosses += [f'<path class="end" d="M{scale.x(at)} {tops["here", row] + 3}v10l5-5z"><title>session started again</title></path>'
                for row, at in history.restarts if ("here", row) in tops]
    for gate in history.gate:
        ids = gate.what.removeprefix(gate.row).split()
        name = f"target with {as_html(', '.join(ids), 80)}" if ids else "the target, or one task alone"
        out.append(draw_bar(gate, f"+{len(ids)}" if ids else "", name, tops["gate", gate.row], scale))
    return "".join(out + crosses), bottom


def draw_steps(history: History, scale: Scale, solid: str, dashed: str) -> str:
    """Two counts over time, one solid and filled, one dashed."""
    top = max(1, *(value for state in (solid, dashed) for _, value in history.series[state] or [(0, 0)]))
    out, lines = [draw_axis(scale, 122)], []
    for value in (0, top):
        y = 122 - 96 * value // top
        out.append(f'<text class="e" x="{LEFT - 8}" y="{y + 4}">{value}</text><path class="grid" d="M{LEFT} {y}H{RIGHT}"/>')
    for state in (solid, dashed):
        highest: dict = {}
        for at, value in history.series[state]:
            highest.setdefault(scale.x(at), []).append(122 - 96 * value // top)
        lines.append(f"M{LEFT} 122" + "".join(f"H{x}V{min(ys)}V{ys[-1]}" for x, ys in highest.items()) + f"H{RIGHT}")
    out += [f'<path class="area" d="{lines[0]}V122Z"/><path class="b" d="{lines[1]}"/><path class="a" d="{lines[0]}"/>']
    return "".join(out)


def figure(name: str, title: str, words: str, drawing: str, height: float, keys: dict) -> str:
    """An SVG with title and description for a screen reader, and its legend: words -> a sample of 20 x 10."""
    legend = [f'<span><svg viewBox="0 0 20 10" aria-hidden="true">{sample}</svg>{key}</span> ' for key, sample in keys.items()]
    return (f'<figure><div class="wide" tabindex="0" role="region" aria-label="{title}">'
            f'<svg role="img" viewBox="0 0 1000 {height}" aria-labelledby="{name}-1 {name}-2"><title id="{name}-1">{title}</title>'
            f'<desc id="{name}-2">{words}</desc>{drawing}</svg></div><figcaption>{"".join(legend)}</figcaption></figure>\n')


def table(caption: str, heads: list[str], rows: list[list]) -> str:
    """Rows of HTML cells, columns without any left out; a head with # is of numbers; the first cell heads its row."""
    kept = [index for index in range(len(heads)) if any(row[index] != "" for row in rows)]
    marks = [' class="n"' if head.startswith("#") else "" for head in heads]
    top = "".join(f'<th scope="col"{marks[index]}>{heads[index].lstrip("#")}</th>' for index in kept)
    lines = [f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td{marks[index]}>{row[index]}</td>" for index in kept[1:])
             + "</tr>\n" for row in rows]
    return (f'<div class="wide" tabindex="0" role="region" aria-label="{caption}"><table><caption>{caption}</caption>'
            f'<thead><tr>{top}</tr></thead><tbody>\n{"".join(lines)}</tbody></table></div>\n')


def dollars(history: History, name: str) -> str:
    """Where only tokens are known, those."""
    if history.cost[name]:
        return f"${history.cost[name]:.2f}"
    tokens = history.tokens[name]
    return f"{tokens / 1e6:.1f}M tokens" if tokens >= 1e6 else f"{tokens // 1000 + 1}k tokens" if tokens else ""


def find_commit_url(repo: str, remote: str) -> str:
    """What a sha is put behind to see it at a known forge, else empty. Read from git's file, without credentials in it."""
    try:
        with open(os.path.join(repo, ".git", "config"), encoding="utf-8", errors="replace") as file:
            section = file.read().partition(f'[remote "{remote}"]')[2].partition("\n[")[0]
    except OSError:
        return ""
    place = r"(?:\w+://(?:[^@/\s]+@)?([\w.-]+)(?::\d+)?/|(?:[^@/:\s]+@)?([\w.-]+):)([\w./~-]+?)(?:\.git)?/?"
    url = re.search(rf"^\s*url\s*=\s*{place}\s*$", section, re.MULTILINE)
    host = (url[1] or url[2]).lower() if url else ""
    forge = next((name for name in host.split(".")[:-1] if name in FORGES), "")
    return f"https://{host}/{url[3]}{FORGES[forge]}" if forge else ""


def say_totals(history: History, tasks: list[Task]) -> str:
    """The numbers on top."""
    states, happened, runs = collections.Counter(task.state for task in tasks), collections.Counter(), len(history.gate)
    for (what, _), ids in history.causes.items():
        happened[what] += len(ids)
    failed = happened["attempt failed"] + happened["agent died"]
    saved = f"{runs - history.judged} more than one by one" if history.judged < runs else f"{history.judged - runs} saved"
    totals = (("Landed", states["landed"], f"of {number(len(tasks), 'task')}"),
              ("Not finished", states["pending"] + states["claimed"] + states["ready"], f"{states['ready']} in the merge queue"),
              ("Failed", states["failed"], f"and {states['canceled']} canceled"),
              ("Came back", happened["came back"], f"and {number(failed, 'failed attempt')}"),
              ("Work", duration(sum(work.seconds for work in history.work)), f"in {number(len(history.work), 'attempt')}"),
              ("Gate runs", runs, saved), ("Cost", dollars(history, ""), f"{history.tokens['']:,} tokens, where agents said it"))
    items = [f"<div><dt>{name}</dt><dd>{value} <small>{words}</small></dd></div>" for name, value, words in totals if value != ""]
    return f'<dl>{"".join(items)}</dl>\n'


def say_agents(history: History) -> str:
    """What the timeline shows, in numbers."""
    rows = []
    for agent in sorted({here.row for here in history.here}):
        own, here = ([stretch for stretch in stretches if stretch.row == agent] for stretches in (history.work, history.here))
        busy, fates = sum(work.seconds for work in own), collections.Counter(work.fate for work in own)
        idle = sum(session.seconds for session in here) - busy
        waits = [strip.seconds for strip in history.strips if strip.row == agent and strip.fate == "waits"]
        rows.append([as_html(agent, 40), len(own), fates["landed"], fates["returned"], fates["failed"], duration(busy),
                     duration(idle), duration(sum(waits)) if waits else "", sum(session.fate == "ended" for session in here),
                     sum(row == agent for row, _ in history.restarts) or "", dollars(history, agent)])
    heads = ["Agent", "#Attempts", "#Landed", "#Came back", "#Failed", "#Worked", "#Idle", "#Waited for a person", "#Session ends",
             "#Restarts", "#Cost"]
    return table("The same in numbers", heads, rows)


def say_gates(history: History) -> str:
    """Gate runs used, against one for each submission that was judged."""
    runs, fates = len(history.gate), collections.Counter(FATES[gate.fate] for gate in history.gate)
    kinds, seconds = ", ".join(f"{count} {fate}" for fate, count in fates.items()), sum(gate.seconds for gate in history.gate)
    saved = f"{abs(history.judged - runs)} {'more' if history.judged < runs else 'saved'}"
    return (f"<p>{number(runs, 'gate run')} ({kinds}) took {duration(seconds)} in all. One by one it would have been "
            f"{history.judged}, a run for each submission that landed or came back after a gate: {saved}.</p>\n")


def say_causes(history: History) -> str:
    """Why work came back, attempts failed and sessions ended, most frequent first."""
    ranked, rows = sorted(history.causes.items(), key=lambda item: (-len(item[1]), item[0]))[:40], []
    for (what, cause), ids in ranked:
        width = 100 * len(ids) / len(ranked[0][1])
        rows.append([f'<span class="t">{as_html(cause, 120)}</span>', what, len(ids),
                     as_html(", ".join(dict.fromkeys(ids)), 60).replace("-", "\u2011"),
                     '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
                     f'<rect class="landed" width="{width:.0f}" height="10"/></svg>'])
    return table("Like reasons are counted together", ["Cause", "What happened", "#Times", "Which", ""], rows)


def show_commit(sha: str, url: str) -> str:
    """A link where the forge is known, else what to type."""
    if not re.fullmatch("[0-9a-f]{7,64}", sha):
        return as_html(sha, 64)
    words = f"git show {sha[:10]}"
    return f'<a href="{as_html(url)}{sha}" title="{words}"><code>{sha[:10]}</code></a>' if url else f"<code>{words}</code>"


def say_tasks(history: History, state: State, url: str) -> str:
    """Every task, failed ones first."""
    rows, worked, now = [], collections.Counter(), CLOCK.now()
    for work in history.work:
        worked[work.what] += work.seconds
    for task in sorted(state.all_tasks(), key=lambda task: task.state != "failed"):
        shown = derived_state(task, state, now)
        reason = f"<small><bdi>{as_html(task.reason)}</bdi></small>" if task.reason else ""
        rows.append([as_html(task.id, 40),
                     f'<span class="k"><span aria-hidden="true">{GLYPHS.get(shown, GLYPHS[""])}</span> {shown}</span>',
                     f'<span class="t"><bdi>{as_html(task.title, 200)}</bdi>{reason}</span>',
                     f'<span class="k">{as_html(task.agent, 30)}</span>',
                     task.attempts + (task.state in ("claimed", "ready", "landed")),
                     duration(worked[task.id]) if task.id in worked else "",
                     stamp(epoch(task.landed_at), "5 16") if epoch(task.landed_at) else "", show_commit(task.landed_commit, url),
                     dollars(history, task.id)])
    heads = ["Task", "State", "Title, and why it last came back", "Agent", "#Attempts", "#Worked", "Landed", "Commit", "#Cost"]
    return table("Failed ones first, then in the order they were added", heads, rows)


def say_pictures(history: History) -> str:
    """The timeline, its numbers, and two charts on the same scale."""
    scale, used = Scale(history), {stretch.fate for stretch in history.work + history.gate}
    keys = {FATES[fate]: f'<rect class="{fate}" x="1" y="1" width="18" height="8" rx="1.5"/>' for fate in FATES if fate in used}
    strips = {strip.fate for strip in history.strips}
    keys.update({STRIPS[fate]: f'<path class="{fate}" d="M0 5H20"/>' for fate in STRIPS if fate in strips})
    keys.update({"session started again": '<path class="end" d="M7 1v8l5-4z"/>'} if history.restarts else {})
    keys.update({"idle": '<path class="idle" d="M0 5H20"/>', "session ended": '<path class="end" d="M6 1l8 8m0-8l-8 8"/>'})
    if len(scale.parts) > 1:
        keys["nothing happened, cut out"] = '<rect class="quiet" x="5" y="-2" width="10" height="14"/>'
    words = (f"A row an agent with {number(len(history.work), 'attempt')}, then a row a gate slot with "
             f"{number(len(history.gate), 'gate run')}. The table below says it in numbers.")
    page = ["<h2>Timeline</h2>\n", figure("timeline", "Timeline", words, *draw_timeline(history, scale), keys),
            say_agents(history), "<h2>Queues</h2>\n"]
    for name, solid, solid_words, dashed, dashed_words in (
            ("depth", "ready", "waiting to be merged", "claimed", "being worked on"),
            ("growth", "landed", "landed", "all", "all tasks")):
        counts = [count for _, count in history.series[solid]] or [0]
        page.append(figure(name, f"Tasks {solid_words}, over time", f"At most {max(counts)}, at the end {counts[-1]}.",
                           draw_steps(history, scale, solid, dashed), 130,
                           {solid_words: '<path class="a" d="M0 5H20"/>', dashed_words: '<path class="b" d="M0 5H20"/>'}))
    return "".join(page)


def read_farm(store: Store) -> tuple[State, dict, bool, list[str]]:
    """(state, what `up` was told, whether something is at work, what is damaged): as much as can be read."""
    try:
        state, problems = store.snapshot(), []
    except DamagedState as error:
        state, problems = partial_state(store), [str(error)]
    try:
        told = (store.read_json(FARM_FILE) or {}).get("settings", {})
        is_live = bool(find_activity(store)) or any(find_liveness(Owner.from_json(claim.owner)) for claim in state.claims.values())
    except (DamagedState, AttributeError, TypeError) as error:
        return state, {}, False, [*problems, str(error)]
    return state, told, is_live, problems


def page_head(name: str) -> str:
    """All before the words: the style, and a policy that forbids every load and every script but PAGE_SCRIPT."""
    import base64
    import hashlib

    digest = base64.b64encode(hashlib.sha256(PAGE_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none';style-src 'unsafe-inline';img-src data:;script-src 'sha256-{digest}'"
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}: farm report</title>\n'
            '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="referrer" content="no-referrer">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<link rel="icon" href="data:,">\n'
            f"<style>\n{PAGE_STYLE}\n</style></head>\n<body><main>\n<h1>{name}</h1>\n")


def report_page(store: Store) -> tuple[str, list[str]]:
    """The whole page, and what is damaged."""
    history, (state, told, is_live, problems) = fold_history(store), read_farm(store)
    history.finish(CLOCK.now(), is_live)
    tasks, first, last = state.all_tasks(), min(history.times), max(history.times)
    landed, zone = sum(task.state == "landed" for task in tasks), as_html(time.strftime("%Z", time.localtime(last)))
    words = (f"{landed} of {number(len(tasks), 'task')} landed on {as_html(told.get('into') or 'the target branch', 80)} in "
             f"{duration(last - first)}.") if tasks else "No task was added yet."
    page = [page_head(as_html(os.path.basename(store.repo), 80)),
            f'<p>{words}</p>\n<p class="soft">{stamp(first)} to {stamp(last)}, '
            f'written {stamp(CLOCK.now())}; times in <span class="zone">{zone}</span>.</p>\n']
    lost = [f"{number(history.unread, 'line')} of events.jsonl could not be read: what happened there is missing here."]
    page += [f'<p class="note">{as_html(note, 500)}</p>\n' for note in problems + lost * bool(history.unread)]
    page.append(say_totals(history, tasks))
    if history.series or history.here:
        page.append(say_pictures(history))
    if history.gate:
        page += ["<h2>Gate runs</h2>\n", say_gates(history)]
    if history.causes:
        page += ["<h2>What went wrong on the way</h2>\n", say_causes(history)]
    if tasks:
        url = find_commit_url(store.repo, told.get("remote") or "origin")
        page += ["<h2>Tasks</h2>\n", say_tasks(history, state, url)]
    return "".join(page) + f"</main><script>{PAGE_SCRIPT}</script></body></html>\n", problems


def write_report(store: Store, path: str) -> list[str]:
    """Write the page in one step; returns what is damaged."""
    page, problems = report_page(store)
    temp = f"{path}.{os.getpid()}.tmp"
    with open(temp, "w", encoding="utf-8") as file:
        file.write(page)
    os.replace(temp, path)
    return problems

# ---------------------------------------------------------------------------------------------- doctor

# A finding is (what is wrong, what to type, exit code); code 0 is a warning.


def attempt(check, *args) -> list[tuple[str, str, int]]:
    """Run a check that raises; its error as a finding."""
    try:
        check(*args)
    except FarmError as error:
        return [(str(error), error.hint, error.exit_code)]
    return []


def check_tools(call: Call) -> list[tuple]:
    """Programs and packages."""
    packages = [finding for name in ("psutil", "portalocker", "tabulate") for finding in attempt(import_package, name)]
    result = run_script("check-tools.sh", env={"FARM_PYTHON": sys.executable}, allow=(0, 6))
    return packages + ([(str(error), error.hint, 6)] if (error := script_error("check-tools.sh", result)) and result.code else [])


def check_settings(call: Call) -> list[tuple]:
    return attempt(call.settings) or attempt(lambda: target_of(call, call.settings()))


def check_state(call: Call) -> list[tuple]:
    """Files that cannot be read, tasks that only the history knows, locks of the dead."""
    store = call.store
    findings = [(f"{store.path(name)}: {words}", "mend it in an editor, or: ./farm.py doctor --fix", 7)
                for name, words in find_damaged(store).items()]
    if findings or not os.path.isdir(store.folder):
        return findings
    state = store.snapshot()
    findings += [(f"task {task.id} is in events.jsonl (rev {task.rev}), and no file has it", "./farm.py doctor --fix", 7)
                 for task, _ in find_forgotten(store, state)]
    findings += [(f"{claim.agent} holds its lock, and its owner (pid {claim.owner.get('pid')}) is gone",
                  "./farm.py up, or any claim: both take it over", 0)
                 for claim in state.claims.values() if find_liveness(Owner.from_json(claim.owner)) is False]
    if not os.access(store.folder, os.W_OK):
        findings.append((f"{store.folder} cannot be written", f"ls -ld {store.folder}", 1))
    return findings


def check_pins(call: Call) -> list[tuple]:
    """Submitted work that a pin keeps and no task knows."""
    if find_damaged(call.store):
        return []
    state = call.store.snapshot()
    pins = read_tsv(run_script("list-pins.sh", "-C", call.repo, allow=(0, 2, 3)).stdout)
    orphans = [(ref, sha, ref.rpartition("/")[2]) for ref, sha in pins]
    return [(f"{ref} keeps {sha[:10]}, and no task {task_id} is known", f"git log {sha[:10]}; git update-ref -d {ref}", 0)
            for ref, sha, task_id in orphans if not state.find_task(task_id) and task_id not in state.done]


def check_machine(call: Call) -> list[tuple]:
    """Disk, memory, limits of the kernel, and the file system that locks must work on."""
    import resource

    settings = load_settings(call.repo)
    findings = [(short, "free some, or lower FARM_MIN_FREE_MIB", 0)
                for short in [find_shortage(call.repo, settings.min_free_mib)] if short]
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if 0 < limit < 64 * settings.n:
        findings.append((f"only {limit} processes are allowed, for {settings.n} agents", f"ulimit -u {64 * settings.n}", 0))
    watches = read_number("/proc/sys/fs/inotify/max_user_instances")
    if watches is not None and watches < 4 * settings.n:
        findings.append((f"only {watches} inotify instances are allowed, for {settings.n} agents",
                         f"sudo sysctl fs.inotify.max_user_instances={4 * settings.n}", 0))
    kind = file_system_of(call.repo)
    if kind.startswith(("nfs", "cifs", "smb", "fuse.sshfs", "9p")):
        findings.append((f"{call.repo} lies on {kind}, where flock may not hold", "move the repo to a local disk", 0))
    return findings


def read_number(path: str) -> int | None:
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


def file_system_of(path: str) -> str:
    """The type of the mount that `path` lies on; empty where /proc/mounts is not there to tell."""
    try:
        with open("/proc/mounts", encoding="utf-8", errors="replace") as file:
            mounts = [line.split() for line in file]
    except OSError:
        return ""
    above = [mount for mount in mounts if (path + "/").startswith(mount[1].rstrip("/") + "/")]
    return max(above, key=lambda mount: len(mount[1]), default=["", "", ""])[2]


def check_agents(call: Call) -> list[tuple]:
    """What would keep the farm's agents from starting, or from working unattended."""
    import shutil

    settings = call.settings()
    shared = share_agents(settings) if settings.agent or shutil.which("claude") else []
    findings = [finding for agent in dict.fromkeys(shared) for finding in attempt(check_command, program_of(agent))]
    if "claude" in shared and not findings:
        findings += [(what, hint, 0) for what, hint in find_blockers(call.repo, settings)]
    return findings + [(limit, "./farm.py up", 0) for preset in PRESETS if (limit := find_limit(call.store, preset, CLOCK.now()))]


def list_clis() -> list[str]:
    """A line about the coding CLIs that are on PATH, with their versions, and one about those that are not."""
    import shutil
    import subprocess
    from concurrent.futures import ThreadPoolExecutor

    def version_of(program: str) -> str:
        try:
            done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{program} (its version cannot be asked: {one_line(str(error), 60)})"
        found = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)
        return f"{program} {found[0] if found else '(of no known version)'}"

    checked = {program_of(name).split()[0]: preset.checked for name, preset in PRESETS.items()}
    there = [program for program in checked if shutil.which(program)]
    with ThreadPoolExecutor() as pool:
        versions = [version + (f" (checked with {known})" if (known := checked[version.split()[0]]) else "")
                    for version in pool.map(version_of, there)]
    missing = [program for program in checked if program not in there]
    return [f"coding CLIs: {', '.join(versions) or 'none'}" + (f"; not installed: {', '.join(missing)}" if missing else "")]


CHECKS = (check_tools, check_settings, check_state, check_pins, check_machine, check_agents)


def find_damaged(store: Store) -> dict[str, str]:
    """State files that cannot be read: name -> why. A queue file that history knows of and that is gone counts."""
    readers = {PENDING_FILE: lambda: store.read_tasks(PENDING_FILE, "pending", store.read_queue(PENDING_FILE, ("tasks",))["tasks"]),
               READY_FILE: lambda: [store.read_tasks(READY_FILE, key, store.read_queue(READY_FILE, ("ready", "landed"))[key])
                                    for key in ("ready", "landed")]}
    for name in (*store.lock_files(), FARM_FILE, AGENTS_FILE, NOW_FILE, INTENT_FILE):
        readers[name] = functools.partial(store.read_claim if name.startswith(LOCK_FOLDER) else store.read_json, name)
    damaged = {}
    for name, reader in readers.items():
        try:
            reader()
        except DamagedState as error:
            damaged[name] = str(error).removeprefix(store.path(name)).lstrip(":, ")
    return damaged


def read_history(store: Store):
    """Each event of events.jsonl, oldest first; lines that cannot be read are passed over."""
    try:
        lines = store.disk.read(store.path("events.jsonl")).decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event


def find_forgotten(store: Store, state: State) -> list[tuple[Task, dict]]:
    """(task, event) of what the history knows with a higher rev than any file: the last record of each."""
    last: dict[str, tuple[Task, dict]] = {}
    for event in read_history(store):
        try:
            task = Task.from_json(event["task"])
        except (KeyError, ValueError):
            continue
        if task.id not in last or task.rev >= last[task.id][0].rev:
            last[task.id] = (task, event)
    known = {task.id: task.rev for task in state.all_tasks()}
    return [(task, event) for task, event in last.values() if task.rev > max(known.get(task.id, -1), state.done.get(task.id, -1))]


def mend(store: Store) -> list[str]:
    """Set damaged files aside (NAME.damaged-UTC, nothing is thrown away) and rebuild what they held from events.jsonl."""
    if not os.path.isdir(store.folder):
        return []
    done = []
    with store.transaction(before_load=lambda: done.extend(set_aside(store))) as tx:
        for task, event in find_forgotten(store, tx.state):
            restore_task(tx, task, event)
            done.append(f"{task.id} is {task.state} again, from events.jsonl")
        tx.write("pending")
        tx.write("ready")
    return done


def set_aside(store: Store) -> list[str]:
    """Rename damaged files and put empty ones in the place of the queues; under the mutex."""
    stamp, done, empty = utc(CLOCK.now()).replace(":", ""), [], State()
    for name in find_damaged(store):
        if os.path.exists(store.path(name)):
            os.rename(store.path(name), f"{store.path(name)}.damaged-{stamp}")
            done.append(f"{name} is kept as {name}.damaged-{stamp}")
        if name in (PENDING_FILE, READY_FILE):
            store.write_durably(name, store.pending_bytes(empty) if name == PENDING_FILE else store.ready_bytes(empty))
            done.append(f"{name} is made anew")
    return done


def restore_task(tx: Transaction, task: Task, event: dict) -> None:
    """Put a task back where its last event left it, in memory or, for a claim, with its owner's lock file."""
    state = tx.state
    for place in ("pending", "ready", "landed"):
        state.forget(place, task.id)
    if task.state in ("ready", "landed"):
        getattr(state, task.state)[task.id] = task
    elif task.state == "claimed" and task.agent not in state.claims and event.get("owner"):
        tx.write_lock(Claim(agent=task.agent, fence=task.fence, claimed_at=event.get("at", ""), owner=event["owner"],
                            task=task.to_json()))
    else:
        state.pending[task.id] = task._replace(state="pending" if task.state == "claimed" else task.state)
    if task.state == "landed":
        state.done[task.id] = task.rev


# ---------------------------------------------------------------------------------------------- command line
# A table of verbs, each a few lines. getopt and not argparse: building thirty sub-parsers takes longer than a whole claim.

Verb = collections.namedtuple("Verb", "run usage summary options example")
VERBS: dict[str, Verb] = {}
GLOBAL_OPTIONS = "repo= help h|help"


def verb(usage: str, summary: str, options: str = "", example: str = ""):
    """Register a verb. options: words like `json` (flag), `id=` (text), `n|n=#` (whole number), `wait=s` (seconds), `after=*`."""
    def register(function):
        name = function.__name__.removeprefix("verb_").replace("_", "-")
        VERBS[name] = Verb(function, usage, summary, options, example)
        return function

    return register


class Call:
    """One invocation: positional `args`, `options` by long name, and what nearly every verb needs."""

    def __init__(self, name: str, args: list[str], options: dict):
        self.name, self.args, self.options = name, args, options
        start = options.get("repo") or os.environ.get("FARM_REPO") or os.getcwd()
        self.repo = start if name == "completion" else find_repo(start)  # a shell starts anywhere
        self.store = Store(self.repo)

    def settings(self) -> Settings:
        remembered = self.store.read_part(FARM_FILE, "settings")
        return load_settings(self.repo, self.options, remembered)

    def agent(self) -> str:
        """The first argument as an agent's name; a bare number means agent-00N."""
        if not self.args:
            raise UsageError(f"{self.name} needs an agent", f"./farm.py {self.name} --help")
        text = self.args[0]
        return f"agent-{int(text):03d}" if text.isdigit() else checked_name(text, "agent")

    def one(self, what: str) -> str:
        if len(self.args) != 1:
            raise UsageError(f"{self.name} needs exactly one {what}", f"./farm.py {self.name} --help")
        return self.args[0]


def find_near(name: str, names) -> str:
    """The one of `names` that was probably meant, or an empty text."""
    import difflib

    return next(iter(difflib.get_close_matches(name, names, 1)), "")


def parse_options(verb_name: str, argv: list[str]) -> tuple[list[str], dict]:
    """getopt over the verb's option words; (positional, options). Raises UsageError."""
    without = sys.modules.setdefault("gettext", None)  # getopt can do without it, and it would import re
    import getopt

    if without is None:
        del sys.modules["gettext"]
    kinds, shorts, short_names = {}, "", {}
    for word in (VERBS[verb_name].options + " " + GLOBAL_OPTIONS).split():
        short, bar, rest = word.partition("|")
        name, equals, kind = (rest if bar else word).partition("=")
        kinds[name] = (equals + kind) if equals else ""
        if bar:
            shorts += short + (":" if equals else "")
            short_names["-" + short] = name
    own, separator, command = argv, [], []
    if "--" in argv:
        cut = argv.index("--")
        own, separator, command = argv[:cut], ["--"], argv[cut + 1:]
    try:
        pairs, args = getopt.gnu_getopt(own, shorts, [name + ("=" if kind else "") for name, kind in kinds.items()])
    except getopt.GetoptError as error:
        near = find_near(error.opt, [name for name in kinds if name != "h"])
        raise UsageError(f"{verb_name}: {error.msg}", f"./farm.py {verb_name} --{near or 'help'}") from None
    options: dict = {"command": command} if separator else {}
    for flag, value in pairs:
        name = short_names.get(flag, flag[2:])
        options.update({name.replace("-", "_"): read_option(verb_name, name, kinds[name], value, options)})
    return args + ([] if verb_name == "with-lock" else command), options


def read_option(verb_name: str, name: str, kind: str, value: str, options: dict):
    """One option's value by its kind: flag, text, whole number (#), seconds (s), or a list that grows (*)."""
    if kind == "":
        return True
    if kind == "=*":
        return [*options.get(name.replace("-", "_"), []), value]
    if kind in ("=#", "=s"):
        try:
            number = int(value) if kind == "=#" else float(value)
            if 0 <= number < 1e9 or name == "priority":
                return number
        except (ValueError, OverflowError):
            pass
        raise UsageError(f"{verb_name}: --{name} needs a number{' of seconds' * (kind == '=s')}, not {value!r}")
    return value

# ---------------------------------------------------------------------------------------------- verbs: tasks


@verb("add TITLE [--prompt TEXT | --prompt-file F] | add -f FILE", "add one task, or many from a file (- for stdin)",
      "prompt= prompt-file= id= priority=# after=* path=* max-attempts=# time-limit=s budget=s f|file=",
      "./farm.py add 'Fix the login test' --priority 5")
def verb_add(call: Call) -> int:
    settings = call.settings()
    if call.options.get("file"):
        drafts = parse_tasks(read_text(call.options["file"]), os.path.basename(call.options["file"]))
        if call.args or not drafts:
            raise UsageError("add -f takes no title" if call.args else f"there is no task in {call.options['file']}")
    else:
        drafts = [draft_from(call)]
    with call.store.transaction() as tx:
        answers = TaskQueue(tx).add(drafts, settings.max_attempts)
    for task, is_new in answers:
        print(task.id)
        if not is_new:
            say(f"{task.id} is there already: {one_line(task.title, 60)}")
    return 0


def draft_from(call: Call) -> Task:
    """The task that the command line of `add` describes."""
    title = " ".join(call.args).strip()
    if not title:
        raise UsageError("a task needs a title", "./farm.py add 'what to do'")
    options = call.options
    if options.get("max_attempts", 1) < 1:
        raise UsageError("a task needs at least one attempt: --max-attempts 1")
    prompt = read_text(options["prompt_file"]) if options.get("prompt_file") else options.get("prompt", "")
    return Task(id=checked_name(options["id"], "task id") if options.get("id") else "", title=title, prompt=prompt,
                priority=options.get("priority", 0), after=options.get("after", []), paths=options.get("path", []),
                max_attempts=options.get("max_attempts", 0), time_limit_seconds=options.get("time_limit", 0.0),
                budget_usd=options.get("budget", 0.0))


def read_text(path: str) -> str:
    """A file of the user's, or stdin for `-`. Raises NotFound or UsageError."""
    try:
        if path == "-":
            return sys.stdin.buffer.read().decode("utf-8-sig")
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except FileNotFoundError:
        raise NotFound(f"there is no file {path}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start})") from None


@verb("tasks [--json]", "every task in every state", "json", "./farm.py tasks --json")
def verb_tasks(call: Call) -> int:
    state, now = call.store.snapshot(), CLOCK.now()
    spending = collections.defaultdict(list)
    for line in read_spending(call.store):
        spending[line["task"]].append(line)
    records = [{**task_record(task, state, now), **(sum_spending(spending[task.id]) if task.id in spending else {})}
               for task in state.all_tasks()]
    if call.options.get("json"):
        print_json(records)
        return 0
    rows = [[r["id"], r["state"], r["agent"] or "-", r["attempts"], r["title"], r.get("landed_commit", "")[:10] or r["reason"]]
            for r in records]
    print_table(rows, ["TASK", "STATE", "AGENT", "TRIES", "TITLE", "COMMIT OR REASON"])
    return 0


@verb("cancel ID", "take a task out", "", "./farm.py cancel t-0007")
def verb_cancel(call: Call) -> int:
    with call.store.transaction() as tx:
        TaskQueue(tx).cancel(call.one("task id"))
    return 0


@verb("retry ID", "let a failed or canceled task be claimed again", "", "./farm.py retry t-0007")
def verb_retry(call: Call) -> int:
    more = call.settings().max_attempts
    with call.store.transaction() as tx:
        TaskQueue(tx).retry(call.one("task id"), more)
    return 0

# ---------------------------------------------------------------------------------------------- verbs: an agent's moves
# Called by agents, by run-agent.sh and its like, and by a CLI's hooks: their start is their cost.


@verb("claim AGENT [--owner-pid PID] [--wait SECONDS] [--id ID]", "take the next task; prints its lock file as one line",
      "owner-pid=# wait=s id= env", "./farm.py claim agent-001 --owner-pid $$")
def verb_claim(call: Call) -> int:
    agent, owner = call.agent(), caller(call.options.get("owner_pid"))
    settings = call.settings()
    watch, deadline = LeaseWatch(settings.lease_seconds), CLOCK.monotonic() + call.options.get("wait", 0)
    while True:
        before = call.store.signature()
        try:
            claim = claim_once(call, agent, owner, watch, settings)
            break
        except NotFound:
            if CLOCK.monotonic() >= deadline:
                raise
        wait_for_change(call.store, before, deadline)
    preset = PRESETS.get(os.environ.get("FARM_PRESET", ""))
    resumes = preset is not None and can_resume(preset, claim)
    try:
        prompt = write_prompt(call.store, claim, settings, resumes=resumes)
    except OSError as error:
        raise FarmError(f"{error.filename}: {error.strerror}; {claim.task['id']} is claimed, but its prompt could not be written",
                        "repeat the command") from None
    if preset and call.options.get("env"):
        wait_for_start(call.store, preset.stagger_seconds)
    print(claim_environment(claim, prompt, resumes) if call.options.get("env") else dump_line(claim.to_json()))
    return 0


def wait_for_start(store: Store, stagger_seconds: float) -> None:
    """Until this start's turn: one CLI starts every `stagger_seconds`, because many at once slow each other down for long.

    The file holds when the next one may start (epoch seconds); each takes that slot and moves it on, under a lock of its own.
    """
    with open(store.path("starts.lock"), "a+", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        now, text = CLOCK.now(), file.read().strip()
        slot = float(text) if re.fullmatch(r"\d+\.\d+", text) else now
        slot = slot if now < slot < now + 999 * stagger_seconds else now  # a clock that was set back holds nobody up
        file.truncate(0)
        file.write(f"{slot + stagger_seconds:.3f}")
    time.sleep(slot - now)


def claim_once(call: Call, agent: str, owner: Owner, watch: LeaseWatch, settings: Settings) -> Claim:
    """Free what dead owners hold, then claim. Raises NotFound when there is nothing, or the farm takes no new work."""
    farm = call.store.read_json(FARM_FILE) or {}
    if farm.get("mode") in ("stopping", "paused"):
        raise NotFound(f"the farm is {farm['mode']}; nothing is handed out",
                       "./farm.py resume" if farm["mode"] == "paused" else "./farm.py up")
    short = find_shortage(call.repo, settings.min_free_mib) if farm.get("mode") == "running" else ""
    if short:
        raise NotFound(f"no new work is handed out: {short}", "free some, or lower FARM_MIN_FREE_MIB")
    preset = os.environ.get("FARM_PRESET", "")
    limit = find_limit(call.store, preset, CLOCK.now())
    if limit:
        raise NotFound(f"no new work is handed out: {limit}", "./farm.py status")
    task_id, conversation = call.options.get("id", ""), new_conversation(preset)
    return take_over(call.store, settings, watch, lambda tx: TaskQueue(tx).claim(agent, owner, task_id, conversation))


def new_conversation(preset: str) -> dict:
    """{"preset"}, with a random UUID as "id" where the CLI lets the farm choose it; empty for a command."""
    chooses = bool(preset) and "$FARM_CONVERSATION" in PRESETS[preset].start
    return {"preset": preset, **({"id": random_uuid()} if chooses else {})} if preset else {}


def random_uuid() -> str:
    """RFC 4122, version 4; importing uuid takes longer than the rest of a claim."""
    digits = bytearray(os.urandom(16))
    digits[6], digits[8] = digits[6] & 0x0F | 0x40, digits[8] & 0x3F | 0x80
    text = digits.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def wait_for_change(store: Store, before: tuple, deadline: float) -> None:
    """Until a move was made, or a second is over (backoffs, leases and owners end without one), or the deadline is reached."""
    deadline = min(deadline, CLOCK.monotonic() + 1)
    while store.signature() == before and (left := deadline - CLOCK.monotonic()) > 0:
        time.sleep(min(0.05, left))


def claim_environment(claim: Claim, prompt: str, resumes: bool) -> str:
    """FARM_* lines for run-agent.sh; each value is one line."""
    task = claim.get_task()
    values = {"FARM_TASK": task.id, "FARM_FENCE": claim.fence, "FARM_PROMPT_FILE": prompt, "FARM_ATTEMPT": task.attempts + 1,
              "FARM_BRANCH": f"farm/{claim.agent}/{task.id}", "FARM_START": task.start, "FARM_TITLE": one_line(task.title),
              "FARM_CONVERSATION": task.conversation.get("id", ""), "FARM_RESUME": "1" if resumes else ""}
    return "\n".join(f"{key}={value}" for key, value in values.items())


def fence_of(call: Call) -> str:
    fence = call.options.get("fence") or os.environ.get("FARM_FENCE", "")
    if not fence:
        raise UsageError(f"{call.name} needs --fence", f"the claim printed it: ./farm.py {call.name} AGENT --fence t-0001.2")
    return fence


@verb("renew AGENT --fence F", "keep a claim of an owner that others cannot see", "fence=",
      "farm renew agent-001 --fence t-0001.2")
def verb_renew(call: Call) -> int:
    with call.store.transaction() as tx:
        TaskQueue(tx).renew(call.agent(), fence_of(call))
    return 0


@verb("release AGENT --fence F", "give a task back; no attempt is counted", "fence= why= rescue= conversation=",
      "farm release agent-001 --fence t-0001.2")
def verb_release(call: Call) -> int:
    with call.store.transaction() as tx:
        TaskQueue(tx).release(call.agent(), fence_of(call), one_line(call.options.get("why", ""), 500),
                              call.options.get("rescue", ""), call.options.get("conversation", ""))
    return 0


@verb("fail AGENT --fence F --why TEXT [--no-retry]", "end an attempt without a result",
      "fence= why= no-retry rescue= start= resume conversation=", "farm fail agent-001 --fence t-0001.2 --why 'the API is gone'")
def verb_fail(call: Call) -> int:
    why = one_line(call.options.get("why", ""), 500)
    if not why:
        raise UsageError("fail needs --why: the next attempt reads it")
    with call.store.transaction() as tx:
        TaskQueue(tx).fail(call.agent(), fence_of(call), why, retry=not call.options.get("no_retry"),
                           rescue=call.options.get("rescue", ""), start=call.options.get("start", ""),
                           resume=bool(call.options.get("resume")), conversation=call.options.get("conversation", ""))
    return 0


@verb("submit AGENT --fence F [--branch B] [--commit SHA]", "hand finished work to the merge queue", "fence= branch= commit=",
      "farm submit agent-001 --fence t-0001.2")
def verb_submit(call: Call) -> int:
    agent, fence = call.agent(), fence_of(call)
    guard = hold_pin(call.store, fence.rpartition(".")[0])
    try:
        return pin_and_submit(call, agent, fence)
    finally:
        os.close(guard)


def hold_pin(store: Store, task_id: str) -> int:
    """A lock file's descriptor, under which a task's pin is moved: from the look at the fence to the end of the move.

    A late agent's pin could else come after that of the next claim's accepted submission. Not the mutex: git takes its time.
    The git that moves the pin inherits it, so it is held as long as that one lives. One file for many tasks, so that they
    stay few.
    """
    os.makedirs(store.path("merge_queue"), exist_ok=True)
    guard = os.open(store.path("merge_queue", f".pin-{sum(task_id.encode()) % 16}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    os.set_inheritable(guard, True)
    fcntl.flock(guard, fcntl.LOCK_EX)
    return guard


def pin_and_submit(call: Call, agent: str, fence: str) -> int:
    """The move itself, under `hold_pin`: git first, so that the queue never names a commit that could be lost."""
    task_id = fence.rpartition(".")[0]
    branch = call.options.get("branch") or f"farm/{agent}/{task_id}"
    claim = call.store.read_claim(os.path.join(LOCK_FOLDER, agent + ".lock"))
    if claim is None or claim.fence != fence:
        with call.store.transaction() as tx:  # an old fence is refused, a repeated submit is fine
            if TaskQueue(tx).get_claimed(agent, fence, "submit") is None:
                return 0
    head = call.options.get("commit") or "refs/heads/" + branch
    commit = spawn_script("pin-ref.sh", "-C", call.repo, f"refs/farm/ready/{task_id}", head).strip()
    if commit == os.environ.get("FARM_BASE"):
        raise Rejected(f"{branch} has no commit of its own", "git add -A && git commit, then submit again")
    with call.store.transaction() as tx:
        TaskQueue(tx).submit(agent, fence, branch, commit)
    return 0


@verb("hook", "what a coding CLI's hooks call, with their event as JSON on stdin", "", "farm hook <event.json")
def verb_hook(call: Call) -> int:
    agent, fence = os.environ.get("FARM_AGENT_NAME", ""), os.environ.get("FARM_FENCE", "")
    try:
        event = json.loads(sys.stdin.buffer.read() or b"{}")
    except ValueError as error:
        raise UsageError(f"a hook's event is a JSON object: {error}") from None
    if not is_name(agent) or not fence or not isinstance(event, dict):
        raise UsageError("hook is for the CLI that the farm has started: FARM_AGENT_NAME and FARM_FENCE are not set")
    answer = note_turn(call.store, agent, fence, event)
    if answer:
        print(dump_line(answer))
    return 0


@verb("judge AGENT --fence F --code N", "what becomes of an attempt that has ended (finish-task.sh asks)",
      "fence= code=#", "farm judge agent-001 --fence t-0001.2 --code 0 <log")
def verb_judge(call: Call) -> int:
    agent, fence, preset = call.agent(), fence_of(call), os.environ.get("FARM_PRESET", "")
    spent = read_spent(call.store, agent, preset, os.environ.get("FARM_CONVERSATION", ""))
    tail = describe_tail(sys.stdin.buffer.read().decode("utf-8", "replace")) if not preset else "see its log"
    outcome = judge_end(call.options.get("code", 0), read_mail(call.store, agent, TURN_FILE, fence),
                        read_mail(call.store, agent, ENDING_FILE, fence), spent, tail)
    if preset:
        note_attempt(call.store, agent, fence, preset, spent)
        with call.store.transaction() as tx:
            until = note_limit(tx, preset, outcome, CLOCK.now())
            task = tx.state.find_task(fence.rpartition(".")[0])
        if outcome.move == "release":
            say(f"{preset}: {outcome.cause}{' until ' + until if until else ''}: {one_line(outcome.why, 200)}")
        over = judge_budgets(call, task) if task else ""
        outcome = Outcome("fail", "budget", over) if over and outcome.move != "submit" else outcome
    conversation = spent.conversation if is_name(spent.conversation) else ""
    print("\t".join((outcome.move, outcome.cause, conversation or "-", one_line(outcome.why))))
    return 0


def judge_budgets(call: Call, task: Task) -> str:
    """Why the task may not be tried again, as far as money goes. Pauses the farm here, before anybody claims the next task."""
    settings, spending = call.settings(), read_spending(call.store)
    if why := describe_farm_overrun(settings, sum_spending(spending)["cost_usd"]):
        try:
            started_farm(call).set_mode("paused", why)
        except (Refused, NotFound):
            pass  # it is being stopped, or an agent runs without a farm
    return describe_overrun(task, settings, cost_of_task(spending, task.id))


def describe_tail(log: str) -> str:
    """The last lines of a log in one, for a reason; what bash says of a child's death is said already."""
    lines = [line for line in printable(log).splitlines() if line.strip() and not re.search(r"run-(agent|task)\.sh: line \d", line)]
    return one_line(" ".join(lines[-5:])[-300:], 300)


def note_attempt(store: Store, agent: str, fence: str, preset: str, spent: Spent) -> None:
    """An attempt's line in usage.jsonl, from the environment that run-agent.sh and the claim have set."""
    line = {"task": fence.rpartition(".")[0], "agent": agent, "fence": fence, "preset": preset,
            "attempt": int(os.environ.get("FARM_ATTEMPT") or 0)}
    if PRESETS[preset].reader in ("claude-transcript", "codex"):
        line["conversation"] = os.environ.get("FARM_CONVERSATION") or spent.conversation
    note_spent(store, line, spent)


MAILBOX_VERBS = ("submit", "fail", "release", "renew", "lock", "unlock")
MAILBOX_SECONDS = 120.0


def ask_by_mailbox(mailbox: str, argv: list[str]) -> int:
    """Put a move into the agent's mailbox and wait for its answer: for agents whose sandbox may write nowhere else.

    One file a request, by rename; run-task.sh, outside the sandbox, makes the move. Raises FarmError when nobody answers.
    """
    name = os.path.join(mailbox, f"{os.getpid()}-{time.monotonic_ns()}")
    with open(name + ".tmp", "w", encoding="utf-8") as file:
        json.dump(argv, file)
    os.rename(name + ".tmp", name + ".request")
    ring(os.path.join(mailbox, "bell"), b"request\n")
    deadline = CLOCK.monotonic() + MAILBOX_SECONDS
    while not os.path.exists(name + ".answer"):
        if CLOCK.monotonic() > deadline:
            raise FarmError(f"nobody answered {argv[0]} within {MAILBOX_SECONDS:.0f} s", "is run-task.sh still running?")
        time.sleep(0.02)
    with open(name + ".answer", encoding="utf-8") as file:
        answer = json.load(file)
    os.unlink(name + ".answer")
    sys.stdout.write(answer["stdout"])
    sys.stderr.write(answer["stderr"])
    return answer["code"]


@verb("answer AGENT", "make the moves that a sandboxed agent has asked for; run-task.sh calls it", "", "farm answer agent-001")
def verb_answer(call: Call) -> int:
    agent = call.agent()
    mailbox = call.store.path("mailbox", agent)
    for name in sorted(os.listdir(mailbox)):
        if not name.endswith(".request"):
            continue
        request = os.path.join(mailbox, name)
        answer = answer_request(agent, call.repo, request)
        with open(request + ".tmp", "w", encoding="utf-8") as file:
            json.dump(answer, file)
        os.rename(request + ".tmp", request.removesuffix(".request") + ".answer")
        os.unlink(request)
    return 0


def answer_request(agent: str, repo: str, path: str) -> dict:
    """Make one request's move, if it is one that this agent may ask for: {"code", "stdout", "stderr"}."""
    import contextlib
    import io

    out, errors = io.StringIO(), io.StringIO()
    try:
        with open(path, encoding="utf-8") as file:
            argv = [str(word) for word in json.load(file)]
        if argv[0] not in MAILBOX_VERBS or argv[1:2] != [agent] or "--repo" in " ".join(argv):
            raise ValueError(f"only {', '.join(MAILBOX_VERBS)} of {agent} itself can be asked for")
    except (ValueError, IndexError, TypeError) as error:
        return {"code": Refused.exit_code, "stdout": "", "stderr": f"farm: {error}\n"}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = main(["--repo", repo, *argv])
    return {"code": code, "stdout": out.getvalue(), "stderr": errors.getvalue()}

# ---------------------------------------------------------------------------------------------- verbs: locks


def acquire_waiting(call: Call, agent: str, names: list[str], owner: Owner) -> None:
    """Hold all names, waiting up to --wait seconds. Raises Refused."""
    settings, deadline = call.settings(), CLOCK.monotonic() + call.options.get("wait", 0)
    watch = LeaseWatch(settings.lease_seconds)
    while True:
        before = call.store.signature()
        try:
            take_over(call.store, settings, watch, lambda tx: LockRegistry(tx).acquire(agent, names, owner))
            return
        except Refused:
            if CLOCK.monotonic() >= deadline:
                raise
        wait_for_change(call.store, before, deadline)


def lock_names(call: Call, names: list[str]) -> list[str]:
    if not names or not all(names):
        raise UsageError(f"{call.name} needs a name, such as schema, port:8080 or path:src/db/**")
    return names


@verb("lock AGENT NAME... [--wait S]", "hold named resources, all or none", "wait=s owner-pid=#",
      "farm lock agent-001 schema 'path:src/db/**'")
def verb_lock(call: Call) -> int:
    acquire_waiting(call, call.agent(), lock_names(call, call.args[1:]), caller(call.options.get("owner_pid")))
    return 0


@verb("unlock AGENT NAME...", "give named resources up", "", "farm unlock agent-001 schema")
def verb_unlock(call: Call) -> int:
    with call.store.transaction() as tx:
        LockRegistry(tx).release(call.agent(), lock_names(call, call.args[1:]))
    return 0


@verb("locks [--json]", "who holds what", "json", "./farm.py locks")
def verb_locks(call: Call) -> int:
    claims = call.store.snapshot().claims.values()
    records = [{"agent": claim.agent, "task": claim.task.get("id", ""), "locks": claim.names(), "fence": claim.fence,
                "owner": claim.owner, "alive": find_liveness(Owner.from_json(claim.owner)), "claimed_at": claim.claimed_at}
               for claim in claims]
    if call.options.get("json"):
        print_json(records)
        return 0
    words = {True: "alive", False: "dead", None: "unseen"}
    rows = [[r["agent"], r["task"] or "-", ", ".join(r["locks"]) or "-", r["owner"].get("pid"), words[r["alive"]],
             r["claimed_at"]] for r in records]
    print_table(rows, ["AGENT", "TASK", "LOCKS", "PID", "OWNER", "SINCE"])
    return 0


@verb("with-lock NAME... -- COMMAND", "run a command while holding names", "wait=s", "farm with-lock schema -- ./migrate.sh")
def verb_with_lock(call: Call) -> int:
    import shutil

    command, names = call.options.get("command"), lock_names(call, call.args)
    if not command:
        raise UsageError("with-lock needs a command after --", "farm with-lock NAME -- COMMAND")
    if not shutil.which(command[0]):
        raise NotFound(f"there is no command {command[0]}")
    child, go = fork_waiting(command)
    agent = f"with-lock-{child}"
    try:
        acquire_waiting(call, agent, names, identify(child))
        os.write(go, b"1")
    finally:
        os.close(go)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with call.store.transaction() as tx:
        LockRegistry(tx).release(agent, names)
    return code if code >= 0 else 128 - code


def fork_waiting(command: list[str]) -> tuple[int, int]:
    """A child that becomes `command` once a byte comes through the pipe: (pid, write end). It owns the lock, so the lock
    lives exactly as long as the command, whatever happens to this process.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child:
        os.close(read_end)
        return child, write_end
    os.close(write_end)
    if os.read(read_end, 1):
        os.execvp(command[0], command)
    os._exit(Refused.exit_code)

# ---------------------------------------------------------------------------------------------- verbs: merge queue and farm


@verb("queue [--json]", "the merge queue", "json", "./farm.py queue")
def verb_queue(call: Call) -> int:
    state = call.store.snapshot()
    records = queue_records(call.store, state)
    if call.options.get("json"):
        print_json(records)
        return 0
    rows = [[r["id"], r["state"], r["agent"], r["commit"][:10], r["title"], r["reason"]] for r in records]
    print_table(rows, ["TASK", "STATE", "AGENT", "COMMIT", "TITLE", "WHY"])
    say(describe_queue(state, records, find_activity(call.store)))
    return 0


def target_of(call: Call, settings: Settings) -> str:
    """The target branch: --into, else the branch that the main worktree has checked out."""
    rows = read_tsv(run_script("repo-info.sh", "-C", call.repo).stdout)
    info = {row[0]: row[1:] for row in rows}
    target = settings.into or info["head"][0]
    if not target or target not in info["branches"]:
        what = f"there is no branch {target}" if target else "HEAD is detached, so there is no target branch to take"
        raise NotFound(f"{what}; there are: {', '.join(info['branches'][:20])}", f"./farm.py {call.name} --into BRANCH")
    return target


@verb("merge [--gate COMMAND] [--slots P] [--into BRANCH] [--watch] [--json]", "land what is ready, once or for ever",
      "gate= slots=# into= watch json style= strict remote=", "./farm.py merge --gate 'make test'")
def verb_merge(call: Call) -> int:
    settings = call.settings()
    target = target_of(call, settings)
    call.store.ensure_folders()
    if not settings.gate:
        say("there is no gate: what merges cleanly lands, and nothing was tested (set one: --gate 'make test')")
    try:
        guard = hold_long(call.store.path("merger.lock"), "a merger")
    except Refused:
        if call.options.get("watch"):
            raise
        return follow_merger(call)
    slots_folder = worktrees_folder(call.repo, settings)
    queue = MergeQueue(call.store, settings, target, slots_folder)
    should_stop = stop_on_signals()
    try:
        queue.run(should_stop, forever=bool(call.options.get("watch")))
    finally:
        queue.stop()
        guard.close()
    if should_stop.is_set():
        return 128 + should_stop.signal
    return report_merge(call, queue.moved, queue.trouble or (), queue.counts["gates"])


def report_merge(call: Call, moved: list[tuple], trouble: tuple, gates: int) -> int:
    """What landed and what came back; 5 when something came back or waits for a person."""
    came_back = [move for move in moved if move[1] != "landed"]
    if trouble:
        say(f"{trouble[0]}\n  try: {trouble[1]}")
    if call.options.get("json"):
        print_json({"landed": [move[0] for move in moved if move[1] == "landed"], "gates": gates,
                    "returned": [{"id": move[0], "reason": move[2]} for move in came_back], "trouble": list(trouble)})
    else:
        print_table(moved, ["TASK", "WHAT", "COMMIT OR REASON"])
    return 5 if came_back or trouble else 0


def follow_merger(call: Call) -> int:
    """The farm's own merger is at work: wait until it has drained the queue or needs a person, and report what it did."""
    say("the farm's merger is at work; waiting until the queue is empty")
    store, waiting = call.store, call.store.snapshot().ready
    while (activity := find_activity(store)) and store.snapshot().ready and not activity["trouble"]:
        wait_for_change(store, store.signature(), CLOCK.monotonic() + 1)
    state = store.snapshot()
    tasks = [state.get_task(task_id) for task_id in waiting if task_id not in state.ready]
    moved = [(task.id, "landed", task.landed_commit[:10]) if task.state == "landed" else (task.id, "returned", task.reason)
             for task in tasks]
    return report_merge(call, moved, tuple(activity.get("trouble", ())), activity.get("gates", 0))


def stop_on_signals(count_to_exit: int = 0):
    """An Event that SIGINT, SIGTERM and SIGHUP set; `signal` is the last one's number, `count` how many came."""
    import signal
    import threading

    event = threading.Event()
    event.signal = event.count = 0

    def set_event(number, _frame):
        event.signal, event.count = number, event.count + 1
        event.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, set_event)
    return event


FARM_OPTIONS = "n|n=# agent= gate= into= slots=# style= strict remote="


def open_farm(call: Call) -> Farm:
    """A Farm from the settings, everything checked that would stop its agents later."""
    run_script("check-tools.sh", "git", "tmux")
    settings = call.settings()
    target = target_of(call, settings)
    settings = settings._replace(n=count_agents(settings, call.options.get("n")))
    launches = resolve_agents(call.repo, settings)
    if settings.prompt_template:
        read_template(call.repo, settings)
    call.store.ensure_folders()
    return Farm(call.store, settings, launches, target)


@verb("up [-n N] [--agent A] [--gate C] [--into B]", "worktrees, sessions and the loop, in tmux; again: adopts and repairs",
      FARM_OPTIONS, "./farm.py up -n 10 --agent claude --gate 'make test'")
def verb_up(call: Call) -> int:
    farm = open_farm(call)
    if (call.store.read_json(FARM_FILE) or {}).get("mode") == "running" and find_recorded(call.store.path("loop.lock")) is None:
        say("this farm was running and was not stopped; going on from what is on disk")
    started, adopted = farm.up()
    say(f"{started} agents started, {adopted} were running; they go on when you log out")
    say("look: ./farm.py status   go there: ./farm.py attach 1   stop: ./farm.py down")
    return 0


@verb("run [-n N] ... [--until-drained]", "the same loop in the foreground; Ctrl-C stops the farm",
      FARM_OPTIONS + " until-drained", "./farm.py run -n 4 --agent ./agent.sh --until-drained")
def verb_run(call: Call) -> int:
    import signal

    farm = open_farm(call)
    guard = hold_long(call.store.path("loop.lock"), "a loop")
    before = call.store.read_json(FARM_FILE) or {}
    if os.environ.get("FARM_AS_TOLD") and before.get("mode") == "paused":  # a loop that was killed goes on as it was told
        farm.remember("paused", before.get("reason", ""))
    else:
        farm.remember("running")
    should_stop, progress = stop_on_signals(), Progress(sys.stdout)
    until_drained = bool(call.options.get("until_drained"))
    try:
        farm.run(should_stop, until_drained=until_drained,
                 on_tick=lambda farm: progress.show(farm.state) if until_drained else None)
    finally:
        progress.close()
    farm.finish_telling(0 if should_stop.is_set() else NOTICE_SECONDS)
    if should_stop.is_set() and should_stop.signal != signal.SIGINT:
        return 128 + should_stop.signal
    if should_stop.is_set():
        say("stopping: agents may finish their tasks; press Ctrl-C again to end them now")
    grace_seconds = farm.settings.grace_seconds if should_stop.is_set() else 0
    farm.down(grace_seconds, hurry=lambda: should_stop.count > 1)
    guard.close()
    if should_stop.is_set():
        return 130
    states = collections.Counter(task.state for task in call.store.snapshot().all_tasks())
    return 0 if set(states) <= {"landed", "canceled"} else 5


@verb("down [--now]", "stop the sessions: agents may finish first, all work is kept", "now n|n=#", "./farm.py down")
def verb_down(call: Call) -> int:
    farm = started_farm(call)
    say_kept(farm.down(0 if call.options.get("now") else farm.settings.grace_seconds))
    return 0


@verb("clean", "remove worktrees and branches that are safe to remove", "", "./farm.py clean")
def verb_clean(call: Call) -> int:
    settings = call.settings()
    sessions = probe_sessions(farm_socket(call.repo))
    if any(not session.dead for session in sessions.values()):
        raise Refused(f"{len(sessions)} sessions are running", "./farm.py down, then ./farm.py clean")
    folder = worktrees_folder(call.repo, settings)
    target = settings.into or target_of(call, settings)
    run_script("drop-pins.sh", "-C", call.repo, "-b", target)
    result = run_script("rm-worktrees.sh", "-C", call.repo, "-d", folder, "-b", target, allow=(0, 4))
    print_table(read_tsv(result.stdout), ["AGENT", "WHAT", "WHY"])
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        if name.startswith("gate-") and not name.endswith(".tmp"):
            run_script("gate-slot.sh", "remove", os.path.join(folder, name))
    return result.code

# ---------------------------------------------------------------------------------------------- verbs: see and steer


@verb("status [--json] [--watch]", "agents, tasks, queue, loop; --watch: again and again, with keys", "json watch",
      "./farm.py status --watch")
def verb_status(call: Call) -> int:
    if call.options.get("watch"):
        return watch_status(call)
    status = look(call)
    print_json(status) if call.options.get("json") else print_status(status)
    return status.get("exit_code", 0)


def look(call: Call, sight: Sight | None = None) -> dict:
    """`farm_status`, also where the settings that the last `up` left cannot be read."""
    try:
        settings = call.settings()
    except DamagedState:
        settings = load_settings(call.repo)
    return farm_status(call.store, settings, sight)


def watch_status(call: Call) -> int:
    """Until q or a signal; the farm goes on. In a pipe: the status every two seconds, when it has changed; JSON: one line each."""
    should_stop, as_json = stop_on_signals(), call.options.get("json")
    if sys.stdout.isatty() and not as_json:
        return Watch(call, functools.partial(look, call), should_stop).run()
    sight, last = Sight(0.004), ""
    while not should_stop.is_set():
        status = look(call, sight)
        text = dump_line(status) if as_json else "\n".join(status_text(status, 0)) + "\n"
        if text != last:
            print(text, flush=True)
            last = text
        should_stop.wait(2)
    return 128 + should_stop.signal


@verb("attach AGENT | attach --all", "go into an agent's session; --all: an overview of all, to look at", "all",
      "./farm.py attach 3")
def verb_attach(call: Call) -> int:
    socket = farm_socket(call.repo)
    name = run_script("overview-tmux.sh", "-L", socket).stdout.strip() if call.options.get("all") else call.agent()
    os.execv(find_bash(), ["bash", os.path.join(SCRIPTS, "attach-tmux.sh"), "-L", socket, name])


def find_bash() -> str:
    import shutil

    return shutil.which("bash") or "/bin/bash"


@verb("logs AGENT [-f] [-n LINES] [--raw] | logs --all [-f]", "what an agent printed, through all its sessions; of all: with names",
      "f|follow n|lines=# raw all", "./farm.py logs 3 -f")
def verb_logs(call: Call) -> int:
    if call.options.get("all"):
        return show_all_logs(call)
    path = call.store.path("logs", call.agent() + ".log")
    if not os.path.exists(path):
        raise NotFound(f"{call.agent()} has no log yet", "./farm.py status")
    reader, raw = LogReader(path), call.options.get("raw")
    if call.options.get("lines") is not None and not raw:
        sys.stdout.write(reader.last_lines(call.options["lines"]))
    while True:
        data = reader.read()
        sys.stdout.buffer.write(data) if raw else sys.stdout.write(reader.clean(data))
        sys.stdout.flush()
        if not data and not call.options.get("follow"):
            return 0
        if not data:
            time.sleep(0.2)


def show_all_logs(call: Call) -> int:
    """Every agent's log, each line behind its agent's name: the last 10 lines of each, or all with `-n` or without -f; -f goes on
    in the order in which lines appear.
    """
    follow, readers, begun = call.options.get("follow"), {}, {}
    lines = call.options.get("lines", 10 if follow else None)
    while True:
        for name in find_logs(call.store):
            text = ""
            if name not in readers:
                readers[name] = LogReader(call.store.path("logs", name + ".log"))
                text = readers[name].last_lines(lines) if lines is not None else ""
            text = begun.pop(name, "") + text + "".join(map(readers[name].clean, iter(readers[name].read, b"")))
            whole, newline, begun[name] = text.rpartition("\n") if follow else (text.removesuffix("\n"), "\n" * bool(text), "")
            sys.stdout.write("".join(f"{name} | {line}\n" for line in (whole + newline).split("\n")[:-1]))
        sys.stdout.flush()
        if not follow:
            return 0
        time.sleep(0.2)


def find_logs(store: Store) -> list[str]:
    """The agents that have a log."""
    try:
        names = sorted(os.listdir(store.path("logs")))
    except FileNotFoundError:
        return []
    others = ("loop", "merger", "notify", CONTROL)
    return [name[:-4] for name in names if name.endswith(".log") and name[:-4] not in others]


@verb("send AGENT TEXT | send --all TEXT", "type a text into a session, and see that it was taken; --all: to all who are at work",
      "all", "./farm.py send 3 'please also add a test'")
def verb_send(call: Call) -> int:
    text = " ".join(call.args if call.options.get("all") else call.args[1:])
    if not text:
        raise UsageError("send needs a text", "./farm.py send AGENT TEXT")
    if call.options.get("all"):
        return send_to_all(call, text)
    run_script("send-tmux.sh", "-L", farm_socket(call.repo), call.agent(), stdin=text)
    return 0


def send_to_all(call: Call, text: str) -> int:
    """To every agent that holds a task: one that is idle has no program that would read it."""
    from concurrent.futures import ThreadPoolExecutor

    socket = farm_socket(call.repo)
    live = {name for name, session in probe_sessions(socket).items() if not session.dead}
    names = sorted(claim.agent for claim in call.store.snapshot().claims.values() if claim.task and claim.agent in live)
    if not names:
        raise NotFound("no agent is at work", "./farm.py status")
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda name: run_script("send-tmux.sh", "-L", socket, name, stdin=text, allow=range(256)), names))
    print_table([[name, "taken" if not result.code else str(script_error("send-tmux.sh", result))]
                 for name, result in zip(names, results, strict=True)], ["AGENT", "TEXT"])
    return Refused.exit_code if any(result.code for result in results) else 0


def started_farm(call: Call) -> Farm:
    """The farm that the last `up` started, to steer it. Raises NotFound."""
    settings = call.settings()
    if call.store.read_json(FARM_FILE) is None:
        raise NotFound("no farm was started here", "./farm.py up")
    return Farm(call.store, settings, [], settings.into)


@verb("pause [--why TEXT]", "hand out no new work; agents finish what they hold, and the merge queue goes on", "why=",
      "./farm.py pause --why 'release at noon'")
def verb_pause(call: Call) -> int:
    started_farm(call).set_mode("paused", one_line(call.options.get("why", ""), 200))
    return 0


@verb("resume", "hand out work again", "", "./farm.py resume")
def verb_resume(call: Call) -> int:
    started_farm(call).set_mode("running")
    return 0


@verb("estop", "stop everything this second: nobody finishes anything, all work is kept, all claims are freed", "",
      "./farm.py estop")
def verb_estop(call: Call) -> int:
    import signal

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it may be typed in one of the sessions that it ends
    say_kept(started_farm(call).estop())
    say("everything has stopped; ./farm.py up goes on from here")
    return 0


def say_kept(refs: list[str]) -> None:
    for ref in refs:
        say(f"unsaved work is kept: {ref}")


@verb("rescue list | show REF | restore REF [--into DIR]", "unsaved work that was kept", "into=", "./farm.py rescue list")
def verb_rescue(call: Call) -> int:
    action = call.args[0] if call.args else "list"
    wanted = {"list": 1, "show": 2, "restore": 2}.get(action)
    if wanted is None or len(call.args) > wanted or (wanted == 2 and len(call.args) < 2):
        raise UsageError("rescue list, rescue show REF, or rescue restore REF [--into DIR]")
    extra = [call.options.get("into") or os.getcwd()] if action == "restore" else []
    result = run_script("rescue.sh", action, "-C", call.repo, *call.args[1:], *extra)
    print(result.stdout, end="")
    return 0


@verb("doctor [--fix] [--json]", "what is missing or damaged, and the command that mends it", "fix json", "./farm.py doctor")
def verb_doctor(call: Call) -> int:
    mended = mend(call.store) if call.options.get("fix") else []
    findings = [finding for check in CHECKS for finding in check(call)]
    if call.options.get("json"):
        print_json([{"problem": one_line(what), "try": hint, "exit_code": code} for what, hint, code in findings])
        return max((code for _, _, code in findings), default=0)
    for line in [f"mended: {line}" for line in mended] + list_clis():
        print(line)
    for what, hint, _ in findings:
        print(f"{printable(what)}\n  try: {hint}")
    if not findings:
        print("all is well")
    return max((code for _, _, code in findings), default=0)


@verb("report [-o FILE]", "one HTML page of all that happened; prints its path", "o|output=", "./farm.py report -o report.html")
def verb_report(call: Call) -> int:
    path = call.options.get("output") or call.store.path("report.html")
    if not call.options.get("output") and not os.path.isdir(call.store.folder):
        call.store.ensure_folders()
    problems = write_report(call.store, path)
    for problem in problems:
        say(problem)
    print(path)
    return DamagedState.exit_code if problems else 0

# ---------------------------------------------------------------------------------------------- main
# Help, completion, and the way from argv to a verb and its exit code.


def usage_text() -> str:
    width = max(len(name) for name in VERBS)
    lines = [f"  {name:<{width}}  {entry.summary}" for name, entry in VERBS.items()]
    return "usage: farm.py [--repo DIR] VERB ...\n\n" + "\n".join(lines) + "\n\nfarm.py VERB --help says more."


def help_text(name: str) -> str:
    entry = VERBS[name]
    return f"usage: farm.py {entry.usage}\n\n{entry.summary}\n\nexample: {entry.example}"


def describe_farm(leading: list[str]) -> str:
    """Where the farm stands, and three things to type next; outside a repo, how to call this."""
    args, options = parse_options("status", leading)
    try:
        call = Call("status", args, options)
    except NotFound as error:
        return f"{error}\n\n{usage_text()}"
    status = look(call)
    states = collections.Counter(agent["state"] for agent in status["agents"])
    agents = " \u00b7 ".join(f"{name} {count}" for name, count in sorted(states.items(), key=lambda item: state_rank_of(item[0])))
    steps = [(step["try"], step["what"]) for step in status["next"]] + general_steps(status)
    width = max(len(command) for command, _ in steps[:3])
    lines = [f"  {command:<{width}}  # {one_line(what, 100)}" for command, what in steps[:3]]
    head = f"{one_line(os.path.basename(call.repo))}: {agents or 'no agents'}"
    return "\n".join([head, *status_lines(status, 0), "", "next:", *lines, "", "farm.py --help lists all verbs."])


def general_steps(status: dict) -> list[tuple[str, str]]:
    """(what to type, why) where nothing is the matter."""
    tasks = status["tasks"]
    if status["loop"]["alive"]:
        return [("./farm.py status --watch", "see it work, with keys"), ("./farm.py attach --all", "look at all agents at once"),
                ("./farm.py add 'what to do'", "one more task; add -f FILE takes a list")]
    if tasks and not set(tasks) - {"landed", "canceled"}:
        return [("./farm.py report", "a page of all that happened"), ("./farm.py clean", "remove what is safe to remove"),
                ("./farm.py add 'what to do'", "one more task")]
    return [("./farm.py doctor", "is everything here that it takes?"), ("./farm.py up -n 3", "start three agents"),
            ("./farm.py add -f tasks.md", "tasks from a checklist, gh's JSON or plain lines")]


COMPLETION = {"bash": """\
# bash: eval "$(./farm.py completion bash)"
_farm() {
  local IFS=$'\\n'
  COMPREPLY=($({farm} completion words "$COMP_CWORD" -- "${COMP_WORDS[@]}" 2>/dev/null))
}
complete -o default -F _farm farm.py farm""", "zsh": """\
# zsh: eval "$(./farm.py completion zsh)"
_farm() {
  local -a found
  found=("${(@f)$({farm} completion words $((CURRENT - 1)) -- "${words[@]}" 2>/dev/null)}")
  if [[ -n $found ]]; then compadd -Q -- $found; else _files; fi
}
compdef _farm farm.py farm"""}


@verb("completion bash|zsh", "print what makes your shell complete verbs, options, agents and tasks", "",
      'eval "$(./farm.py completion bash)"')
def verb_completion(call: Call) -> int:
    if call.args[:1] == ["words"] and len(call.args) > 2 and call.args[1].isdecimal():
        for name in find_completions(call.args[2:], int(call.args[1])):
            print(name)
        return 0
    if len(call.args) != 1 or call.args[0] not in COMPLETION:
        raise UsageError("completion of which shell?", "./farm.py completion bash")
    farm = f"FARM_PYTHON={shell_word(sys.executable)} {shell_word(os.path.join(SCRIPTS, 'farm'))}"
    print(COMPLETION[call.args[0]].replace("{farm}", farm))
    return 0


def find_completions(words: list[str], current: int) -> list[str]:
    """What the word at `current` of a command line may become. Reads files only; a farm that cannot be read has no names."""
    words = (words + [""] * current)[:current + 1]
    repo = next((value for name, value in zip(words, words[1:], strict=False) if name == "--repo"), "")
    plain = [word for before, word in zip(words, words[1:-1], strict=False) if not word.startswith("-") and before != "--repo"]
    begun, before = words[-1], words[-2] if current else ""
    if not plain or plain[0] not in VERBS:
        found = [] if before == "--repo" else ["--repo", "--help"] if begun.startswith("-") else list(VERBS)
    elif begun.startswith("-"):
        entries = [word.partition("=")[0].rpartition("|")[2] for word in f"{VERBS[plain[0]].options} help".split()]
        found = [f"--{name}" if len(name) > 1 else f"-{name}" for name in entries]
    else:
        found = find_names(plain[0], plain[1:], before, repo)
    return [name for name in found if name.startswith(begun)]


def find_names(verb_name: str, args: list[str], before: str, repo: str) -> list[str]:
    """Names for the next argument of a verb: agents, tasks, or the words of its usage."""
    usage = VERBS[verb_name].usage
    try:
        store = Store(find_repo(os.path.expanduser(repo) or os.environ.get("FARM_REPO") or os.getcwd()))
        if before in ("--id", "--after") or not args and usage.startswith((f"{verb_name} ID", f"{verb_name} [ID")):
            return [task.id for task in store.snapshot().all_tasks() if task.state != "landed"]
        if not args and " AGENT" in usage:
            return sorted({*store.read_agents(), *(os.path.basename(name)[:-5] for name in store.lock_files())})
    except (FarmError, OSError):
        return []
    if not args and verb_name in ("completion", "rescue"):
        return {"completion": list(COMPLETION), "rescue": ["list", "show", "restore"]}[verb_name]
    return []


def parse_command_line(argv: list[str]) -> Call | str:
    """The Call that argv asks for, or a help text. Raises UsageError that suggests the near verb."""
    leading = []
    while argv and argv[0].startswith("-"):
        if argv[0] in ("-h", "--help"):
            return usage_text()
        take = 2 if argv[0] == "--repo" else 1
        leading, argv = leading + argv[:take], argv[take:]
    if not argv:
        return describe_farm(leading)
    if argv[0] == "help":
        return help_text(argv[1]) if argv[1:] and argv[1] in VERBS else usage_text()
    name = argv[0]
    if name not in VERBS:
        raise UsageError(f"there is no verb {name!r}", f"./farm.py {find_near(name, VERBS) or '--help'}")
    args, options = parse_options(name, leading + argv[1:])
    return help_text(name) if options.get("help") else Call(name, args, options)


def describe_os_error(error: OSError) -> FarmError:
    """A full disk, a read-only folder and the like, in words."""
    what = f"{error.filename}: " if error.filename else ""
    state = "the change is there, but a power cut may undo it: repeat the command" if isinstance(error, NotDurable) else \
        "the state is as it was"
    hints = {errno.ENOSPC: "df -h .", errno.EDQUOT: "quota", errno.EROFS: "mount | grep ro,", errno.EACCES: "ls -ld coordination",
             errno.EPERM: "ls -ld coordination"}
    return FarmError(f"{what}{os.strerror(error.errno) if error.errno else error}; {state}",
                     hints.get(error.errno, "./farm.py doctor"))


def main(argv: list[str]) -> int:
    """Run one verb; print what went wrong on stderr, and return the exit code."""
    try:
        mailbox = os.environ.get("FARM_MAILBOX")
        if mailbox and argv and argv[0] in MAILBOX_VERBS:
            return ask_by_mailbox(mailbox, argv)
        call = parse_command_line(argv)
        if isinstance(call, str):
            print(call)
            return 0
        return VERBS[call.name].run(call) or 0
    except FarmError as error:
        print(f"farm: {printable(str(error))}" + (f"\n  try: {printable(error.hint)}" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        wrapped = describe_os_error(error)
        print(f"farm: {wrapped}\n  try: {wrapped.hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
