#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["psutil>=5.9", "portalocker>=2.7", "tabulate>=0.9"]
# ///
"""farm.py - many coding agents on one git repo, and a main branch that is never red.

    add -> pending --claim--> claimed --submit--> ready --gate--> landed
              ^                 | fail, agent died     | conflict, gate red
              +-----------------+----------------------+   (attempts + 1, reason kept; or `failed`)

Contents. A room uses only what stands above it; parts I to III are what must be trusted.
Each begins with a banner, which names its tests: grep -n '^# [-=]' farm.py

    I    Ground        errors, words, files, records, machine, settings, scripts, isolation
    II   Truth         state, store, mending, locks, task queue, task files
    III  Merge queue   planner, gates, chain, landing, review, merge queue
    IV   Agents        coding CLIs, usage, judgement, limits, prompts, turns, attempts, sessions,
                       surroundings, placement, worktrees and tmux, housekeeping, loop, news,
                       hosts, spoke
    V    Eyes          tables, status and watch, report, one task, doctor
    VI   Command line  command line, verbs of tasks and agents, verbs of a person, verbs of one
                       task, verbs of hosts, main

Files below coordination/ in the repo's main worktree: plain JSON, one record a line, UTC times. Its
README.md says of each who writes it and whether a person may edit it.

    agent_locks/AGENT.lock              what one agent holds: task, named locks, owner, fence
    task_queue/pending.json             tasks that nobody holds
    merge_queue/ready-to-merge.json     submitted work, and what has landed of late
    merge_queue/landed.jsonl            what landed before, append-only
    merge_queue/now.json, landing.json  what the merger does now; a landing that has begun
    events.jsonl, usage.jsonl           history; what attempts have cost; append-only, cut by size
                                        into events-0001.jsonl ..., usage-0001.jsonl ...
    results/  returns/  prompts/        verdicts by tree; why work came back; what agents were told
    logs/  mailbox/AGENT/               what agents printed; what they and their CLIs tell and ask
    farm.json  loop.json  limits.json   what `up` was told; what the loop knows; what holds a CLI up
    hosts/HOST.json  placed.json        when a host was heard, and how its agents are; where it is
    hub                                 on a host: where its tasks come from
    orders/HOST/                        what a person has typed for a host, until it is answered
    .lock                               the one mutex (flock)

Events, one JSON object a line of events.jsonl: `at`, `event`, the keys below, and for the moves of
a task its whole record as it is afterwards under `task`.

    created                                 the farm's first line
    added  edited  submitted  landed  canceled  retried  diagnosed      task
    approved                                task, by: person or reviewer
    claimed                                 task, agent, owner (as in a lock file)
    attempt-failed  released  owner-died  returned              task, why
    gate-started  gate-ended        ids, tree, slot; at the end colour, exit_code, seconds, note
    session-started  session-ended          agent; at the end cause
    agent-waits  agent-goes-on              agent, id (the task's), why
    paused  resumed                         why

Invariants:
  1. A task has one or more copies; the one with the highest `rev` is the task (on a tie: done >
     ready > claimed > pending), but one that is in the archive is done. A move makes the
     destination durable first and removes the source last, so a kill at any point leaves a state
     that the next transaction heals. There is no journal: the destination is the intent.
  2. The mutex guards milliseconds: no git, tmux, agent or gate runs inside a transaction.
  3. The target branch moves by compare-and-swap only, to a commit whose exact tree passed the gate.
  4. A live owner's lock is never taken; a dead one's is taken by whoever comes first.

Where to begin: a coding CLI is a class in "coding CLIs"; a setting is a row in "settings"; how long
a limit pauses a CLI is pause_until in "limits"; a column of `status` is one of COLUMNS in "status
and watch"; a verb is a function below @verb in part VI.

Exit codes: 0 ok, 1 failed, 2 usage, 3 nothing to do or not found, 4 refused, 5 rejected, 6 a tool
or package is missing, 7 damaged state file, 130/143 signals.
"""

from __future__ import annotations

import bisect
import errno
import fcntl
import functools
import gc
import heapq
import itertools
import json
import math
import os
import re
import stat
import sys
import time
from collections import Counter, defaultdict, deque, namedtuple

SCHEMA = 1
TOOLKIT = os.path.dirname(os.path.abspath(__file__))
SCRIPTS = f"{TOOLKIT}/scripts"


# ==================================================================================== PART I Ground

# ------------------------------------------------------------------------------------------- errors
# What can go wrong, its exit code, and an OS error in words. (tests/rooms/test_mending.py)


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


class BrokenObjects(Rejected):
    """Git objects of what was to be submitted are not what their names say."""


class TookTooLong(FarmError):
    """A script was ended because its time was over."""


# (what is the matter, what to type) of each thing that a person should see to
Advice = list[tuple[str, str]]


# An OSError, so that whoever already tells of a full disk tells of this too.
class NotDurable(OSError):
    """A change is visible, but its folder could not be fsynced: a power cut may undo it."""


# "The state is as it was" is true of every move: what fails before its rename has changed nothing
# that is read, and what comes after it is no error but NotDurable.
def describe_os_error(error: OSError) -> FarmError:
    """A full disk, a read-only folder and the like, in words."""
    what = f"{error.filename}: " if error.filename else ""
    state = "the state is as it was"
    if isinstance(error, NotDurable):
        state = "the change is there, but a power cut may undo it: repeat the command"
    hints = {
        errno.ENOSPC: "df -h .",
        errno.EDQUOT: "quota",
        errno.EROFS: "mount | grep ro,",
        errno.EACCES: "ls -ld coordination",
        errno.EPERM: "ls -ld coordination",
    }
    return FarmError(
        f"{what}{os.strerror(error.errno) if error.errno else error}; {state}",
        hints.get(error.errno, "./farm.py doctor"),
    )


# -------------------------------------------------------------------------------------------- words
# Text, times, TSV and shell words; the clock, which tests replace.
# (tests/rooms/test_command_line.py)


class Clock:
    """Wall and monotonic seconds; tests put their own in its place."""

    now = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)


CLOCK = Clock()


def given(variable: str) -> str:
    """A variable of the environment: empty is as good as none."""
    return os.environ.get(variable, "")


CALLED_WITH = {"repo": ""}  # the --repo of this call; `main` knows


# Reasons and hints are written to disk by one process and read in another folder, or by an agent.
def as_typed(text: str) -> str:
    """`text` with its commands as they can be typed where the reader stands; on disk they are
    always `./farm.py VERB`."""
    return (
        text.replace("./farm.py", find_typed(CALLED_WITH["repo"])) if "./farm.py" in text else text
    )


def find_typed(repo: str) -> str:
    """How this program is called from here: by the path that it was called by, with the repo
    when one was named."""
    # scripts/farm starts python3 by -c, which has no name of its own
    program = given("FARM_SHIM") if sys.argv[0] == "-c" else sys.argv[0]
    if given("FARM_TASK"):  # in an agent's session the shim is first on its PATH
        return "farm"
    if os.path.basename(program) == "farm":
        program = os.path.join(os.path.dirname(os.path.dirname(program)), "farm.py")
    if not os.path.isfile(program):
        return "./farm.py"
    near = os.path.relpath(os.path.realpath(program))
    program = f"./{near}" if os.path.basename(near) == near else os.path.abspath(program)
    words = [program, "--repo", repo] if repo else [program]
    return " ".join(
        word if re.fullmatch(r"[\w./~+-]+", word) else shell_word(word) for word in words
    )


def say(text: str) -> None:
    """A line for people, on stderr; the work goes on where it cannot be written (a log on a full
    disk, a terminal that is gone)."""
    line = as_typed(f"farm: {text.removeprefix('farm: ')}")
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        pass


# Titles, reasons and logs are written by agents. What is printed of them must not drive the
# reader's terminal: escape sequences go whole, then C0, DEL and C1 (which some terminals take for
# escapes) and lone surrogates, with which print() would raise.
def printable(text: str) -> str:
    """`text` without escape sequences and control characters, newlines and tabs kept."""
    if text.isprintable():
        return text
    text = re.sub(
        r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[PX^_][^\x1b]*\x1b\\|[ "
        r"-/]*[0-~])",
        "",
        text,
    )
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "", text)


def one_line(text: str, width: int = 0) -> str:
    """Text as one printable line, cut to `width` with an ellipsis."""
    line = " ".join(printable(text).split())
    return line if not width or len(line) <= width else line[: max(1, width - 1)] + "\u2026"


def utc(seconds: float) -> str:
    """Epoch seconds as stored text, `2026-03-01T14:02:10Z`; such texts sort as the times do."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def utc_now() -> str:
    return utc(CLOCK.now())


def epoch(text: str) -> float:
    """The inverse of `utc`; 0 for text that is no time."""
    import calendar

    try:
        return float(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")))
    except (ValueError, TypeError):
        return 0.0


NEVER = "9999-12-31T00:00:00Z"


def is_ahead(text: str, now: float, longest: float) -> bool:
    """Whether a stored time is still to come. One that lies further ahead than the `longest` wait
    is of a clock that was set back since, and holds nobody up."""
    return bool(text) and (utc(now) < text <= utc(now + longest) or text == NEVER)


# Paths, titles and branch names may hold tabs and newlines; bash reads a line with `read`, and
# would see two fields or two lines.
ESCAPES = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})


def escape_field(text: str) -> str:
    """A TSV field for a script: backslash, tab, newline and return as two characters."""
    return text.translate(ESCAPES)


def unescape_field(text: str) -> str:
    """The inverse of `escape_field`."""
    return re.sub(
        r"\\(.)", lambda match: {"t": "\t", "n": "\n", "r": "\r"}.get(match[1], match[1]), text
    )


# bash says both for a command that it could not start; a gate that ends with one has judged
# nothing.
CANNOT_START = {126: "may not be run", 127: "was not found"}  # exit codes of a shell


def find_missing(code: int, log: str) -> str:
    """What a shell says of a command that it could not start: `not found: NAME`, or `permission
    denied: NAME`, or so."""
    words = {
        "command not found": "not found",
        "No such file or directory": "not found",
        "not found": "not found",
        "Permission denied": "permission denied",
        "Is a directory": "is a directory",
        "cannot execute": "cannot execute",
        "Argument list too long": "argument list too long",
    }
    # bash says `bash: line 1: NAME: command not found`, dash `sh: 1: NAME: not found`
    pattern = r"(?:line \d+: |\d+: )?([^:\n]+): (" + "|".join(words) + r")\b"
    found = re.findall(pattern, printable(log))
    if not found:
        return f"its command {CANNOT_START[code]}"
    name, what = found[-1]
    return f"{words[what]}: {one_line(name, 100)}"


def shell_word(text: str) -> str:
    """`text` as one word for bash, on one line whatever it holds."""
    if text.isprintable():
        return "'" + text.replace("'", "'\\''") + "'"
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return (
        "$'"
        + "".join(
            c if c.isprintable() else "".join(f"\\x{byte:02x}" for byte in os.fsencode(c))
            for c in escaped
        )
        + "'"
    )


def write_tsv(rows) -> str:
    """Rows of texts as lines that a script can read; the inverse of `read_tsv`."""
    return "".join("\t".join(map(escape_field, row)) + "\n" for row in rows)


def read_tsv(text: str) -> list[list[str]]:
    """Lines of unescaped fields, as every script prints them."""
    return [
        [unescape_field(field) for field in line.split("\t")] for line in text.split("\n") if line
    ]


def duration(seconds: float) -> str:
    """Short: 45s, 3m, 2h10, 3d."""
    minutes = int(seconds // 60)
    if minutes < 1:
        return f"{max(0, int(seconds))}s"
    if minutes < 60:
        return f"{minutes}m"
    return f"{minutes // 60}h{minutes % 60:02d}" if minutes < 2880 else f"{minutes // 1440}d"


# On a terminal only: what programs read stays UTC.
def local_times(text: str) -> str:
    """Stored times within a text as the reader's clock has them: `14:02`, with the day when that
    is not today."""

    def local(match) -> str:
        then, today = time.localtime(epoch(match[0])), time.localtime(CLOCK.now())
        return time.strftime("%H:%M" if then[:3] == today[:3] else "%Y-%m-%d %H:%M", then)

    return re.sub(r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", local, text)


def ago(at: str) -> str:
    """How long since a stored time, `-` for none."""
    return duration(CLOCK.now() - epoch(at)) if at else "-"


def number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


# -------------------------------------------------------------------------------------------- files
# The file system calls of a move, and JSON in and out. Plain reading and writing goes through
# here, so that a test can cut the power between any two calls.
# (tests/rooms/test_store_fuzz.py)


def read_bytes(path: str, since: int = 0) -> bytes:
    """A file's content from the byte `since` on, read in one piece: of a long queue each copy
    costs a claim 2 ms."""
    with open(path, "rb", buffering=0) as file:
        if since:  # a pipe cannot seek
            file.seek(since)
        return file.read()


def read_line(path: str) -> str:
    """The text of a small file, such as .git and commondir; empty when it cannot be read."""
    try:
        return os.fsdecode(read_bytes(path)).strip("\n").strip(" ")
    except OSError:
        return ""


def names_in(folder: str, list_folder=os.listdir) -> list[str]:
    """What lies in a folder, sorted; nothing where there is none."""
    try:
        return sorted(list_folder(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def write_all(descriptor: int, data: bytes) -> None:
    """All of it: a signal or a disk that is nearly full cuts a write short."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def make_folder(path: str) -> None:
    """A folder, and those above it; one that is there is fine."""
    os.makedirs(path, exist_ok=True)


def make_parent(path: str) -> None:
    """The folder that a file is to lie in."""
    make_folder(os.path.dirname(path))


class Disk:
    """The file system calls of a move, one method each: the seam where tests cut the power."""

    def write_temp(self, path: str, data: bytes) -> None:
        """Write and fsync a new file at `path`.

        Only the mutex's holder writes, so a temp file that is there was left by a killed one. It
        is unlinked, never truncated: it may share its inode with the lock file that it was
        linked to.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            descriptor = os.open(path, flags, 0o666)
        except FileExistsError:
            os.unlink(path)
            descriptor = os.open(path, flags, 0o666)
        try:
            write_all(descriptor, data)
            # before the name is there: else a power cut may leave the name on an empty file
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def fsync_folder(self, path: str) -> None:
        """Make the names in a folder durable: fsync of a file says nothing of the name that it
        has just got."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    # O_RDWR, as the last byte is read; O_APPEND, so that two writers' lines stand one behind the
    # other and none is overwritten. 0o666: the user's umask decides, as with any file of theirs.
    # No O_CLOEXEC here or below: Python hands no descriptor on.
    # Durable is the archive, whose records are nowhere else; a cut line of history is only missed
    # in a report.
    def append(self, path: str, data: bytes, *, durably: bool = False) -> int:
        """All of it at the end, and, durably, on the disk when it returns; the file's length then.
        A torn last line of a killed writer is closed first, so that it spoils no other."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            torn = size and os.pread(descriptor, 1, size - 1) != b"\n"
            write_all(descriptor, b"\n" + data if torn else data)
            if durably:
                os.fsync(descriptor)
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    @staticmethod
    def size(path: str) -> int:
        return os.stat(path).st_size

    read = staticmethod(read_bytes)

    rename = staticmethod(os.replace)
    link = staticmethod(os.link)
    unlink = staticmethod(os.unlink)
    list_folder = staticmethod(os.listdir)


def dump_line(data, indent: int | None = None) -> str:
    """Compact JSON, a line without `indent`, with no raw control character, C1 and DEL included."""
    text = json.dumps(data, ensure_ascii=False, indent=indent)
    if text.isprintable():  # nearly always; compiling the pattern would cost every verb 2 ms
        return text
    return re.sub(
        "[\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text
    )


def line_bytes(data) -> bytes:
    return (dump_line(data) + "\n").encode("utf-8")


class Lines(list):
    """Records, and the lines that they were read from: of two thousand that wait, a move changes
    one, and the others are written as they were read."""

    texts: list[str] = []


def parse_lines(text: str) -> dict:
    """A document of `dump_records` whose one list is "tasks", those as Lines; in any other shape
    (a person's, say) what json.loads gives. Raises ValueError."""
    begin, end = '"tasks": [\n  ', "}\n ]\n}\n"
    document, place = json.loads(text), text.find(begin + "{")
    if place > 0 and text.endswith(end):
        texts = text.split(",\n  ")
        texts[-1] = texts[-1][: -len(end) + 1]
        texts[0] = texts[0][place + len(begin) :]
        try:
            tasks = Lines(document["tasks"])
            if len(texts) == len(tasks) and all(map(begins_with_id, texts, tasks)):
                document["tasks"], tasks.texts = tasks, texts
        except (KeyError, TypeError):
            pass  # a person's own shape
    return document


# Cutting a text at ",\n  " finds records only where dump_records has written it. An edit by hand
# may have put two on a line or one on two; then counts or beginnings differ, and all is written
# anew.
def begins_with_id(text: str, record) -> bool:
    """Whether this is the record's own line, as `dump_records` has written it."""
    return text.startswith(f'{{"id": "{record["id"]}"')


def dump_records(head: dict, lists: dict) -> bytes:
    """A document with one record a line: `head`'s keys first, then each list of `lists` (of
    objects, or of lines that are one already)."""
    # joined twice and no more: of a long queue each copy costs a claim
    parts = []
    for key, value in head.items():
        parts += [",\n ", dump_line(key), ": ", dump_line(value)]
    for key, records in lists.items():
        lines = [record if record.__class__ is str else dump_line(record) for record in records]
        text = (": [\n  ", ",\n  ".join(lines), "\n ]") if records else (": []",)
        parts += [",\n ", dump_line(key), *text]
    parts[0] = "{\n "
    return "".join([*parts, "\n}\n"]).encode()


def describe_damage(path: str, error: Exception) -> DamagedState:
    """The error with path, line and column where the JSON parser can tell them."""
    where, what = "", error
    if isinstance(error, json.JSONDecodeError):
        where, what = f", line {error.lineno}, column {error.colno}", error.msg
    return DamagedState(
        f"{path}{where}: {what}; nothing was written",
        "mend it in an editor, or see: ./farm.py doctor  (doctor --fix keeps it aside and "
        "rebuilds it)",
    )


def hide_bytecode() -> None:
    """Keep the toolkit's __pycache__ out of the git status of a repo that it was copied into."""
    ignore = f"{TOOLKIT}/__pycache__/.gitignore"
    if os.path.isdir(os.path.dirname(ignore)) and not os.path.exists(ignore):
        try:
            write_whole(ignore, "*\n")
        except OSError:
            return  # a toolkit that may not be written has no bytecode there either


def is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


# jq and gh print objects so, over several lines.
def read_values(text: str):
    """JSON values that stand one after the other. Raises json.JSONDecodeError."""
    decoder, place = json.JSONDecoder(), 0
    while rest := text[place:].lstrip():
        value, place = decoder.raw_decode(text, len(text) - len(rest))
        yield value


# For what others write (CLIs, agents, killed writers): a line that is none costs no other.
def read_json_lines(path: str):
    """Each JSON object of a file; other lines are passed over. A file that is one JSON document
    gives that."""
    try:
        text = read_foreign(path, 1 << 30)
    except OSError:
        return
    for line in [text] if text.lstrip().startswith("{\n") else text.splitlines():
        try:
            item = json.loads(line)
        # an agent's file may open ten thousand brackets: that is no ValueError
        except (ValueError, RecursionError):
            continue
        if isinstance(item, dict):
            yield item


def read_object(path: str) -> dict:
    """The first JSON object of a file; empty when there is none."""
    return next(read_json_lines(path), {})


def pick(record: dict, keys) -> dict:
    """These keys of a record, in their order."""
    return {key: record[key] for key in keys}


def object_of(value) -> dict:
    """What is an object in JSON of others, else an empty one."""
    return value if isinstance(value, dict) else {}


def items_of(value, fits) -> dict:
    """Of an object in JSON of others, the items whose value `fits`."""
    return {key: item for key, item in object_of(value).items() if fits(item)}


def has_kinds(value, kinds: dict) -> bool:
    """Whether it is an object, with a value of its kind under each key of `kinds`."""
    return all(isinstance(object_of(value).get(key), kind) for key, kind in kinds.items())


def is_number_pair(value) -> bool:
    return isinstance(value, list) and [*map(type, value)] == [int, int]


def count(record, *keys: str) -> int:
    """The sum of the whole numbers below `keys` of an object that may be anything."""
    values = map(object_of(record).get, keys)
    return sum(value for value in values if type(value) is int)  # a bool is an instance of int


def read_foreign(path: str, most: int, flags: int = 0) -> str:
    """A text that an agent may have written. Raises OSError for what is no file, such as a FIFO,
    which would keep us waiting, or has more than `most` bytes; with os.O_NOFOLLOW also for a link.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | flags)
    with open(descriptor, encoding="utf-8", errors="replace") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            raise OSError(errno.EFBIG, "is no file, or larger than one may be here", path)
        return file.read()


def read_printable(path: str) -> str:
    """What gates, reviewers and scripts have printed into a file; empty when it is not there."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return printable(file.read())
    except FileNotFoundError:
        return ""


# The pid in the temp file's name keeps two writers apart; "x" refuses to open what is there, so
# that a link which an agent has laid there is not followed.
def write_whole(path: str, text: str) -> None:
    """Write a file in one step: a reader finds the old one or the new one. Not durable: for what
    a power cut may take. Where an agent can write, it finds no link that leads elsewhere."""
    temp = f"{path}.{os.getpid()}.tmp"
    try:
        os.unlink(temp)
    except FileNotFoundError:
        pass
    with open(temp, "x", encoding="utf-8") as file:
        file.write(text)
    os.replace(temp, path)


def write_object(path: str, data) -> None:
    """`write_whole` of JSON, in a line."""
    write_whole(path, dump_line(data) + "\n")


def changed_at(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def print_json(data) -> None:
    print(dump_line(data, indent=1))


def read_text(path: str) -> str:
    """A file of the user's, or stdin for `-`. Raises NotFound or UsageError."""
    try:
        # utf-8-sig: editors on Windows begin a file with a byte order mark
        if path == "-":
            return sys.stdin.buffer.read().decode("utf-8-sig")
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except FileNotFoundError:
        raise NotFound(f"there is no file {path}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start})") from None


# ------------------------------------------------------------------------------------------ records
# The shapes on disk. One record serves a task in all its states: a move changes fields and raises
# `rev`, it never translates. (tests/rooms/test_store_machine.py)


class Record:
    """What namedtuples below share: JSON both ways, unknown keys kept in `extra`, defaults left
    out.

    namedtuple rather than dataclass: importing dataclasses costs an agent's verb 10 ms of its 32.
    """

    __slots__ = ()
    always = ("schema", "id", "title", "state", "agent", "rev")

    @classmethod
    @functools.cache
    def plain_kinds(cls) -> dict[str, type]:
        """Field -> its type, where a value of this type is right as it is."""
        return {
            key: type(value)
            for key, value in cls._field_defaults.items()
            if key != "extra" and not isinstance(value, list)
        }

    @classmethod
    def from_json(cls, data: dict):
        """Raises ValueError that names the field when a known one has another type than its
        default."""
        if not isinstance(data, dict):
            raise ValueError(f"a {cls.__name__} is an object, not {type(data).__name__}")
        defaults, kinds, extra = cls._field_defaults, cls.plain_kinds(), {}
        fields = {**defaults, "extra": extra}
        for key, value in data.items():
            if kinds.get(key) is value.__class__:  # nearly all of them
                fields[key] = value
                continue
            if key not in defaults or key == "extra":
                extra[key] = value
                continue
            kind = type(defaults[key])
            # a person writes 60 where 60.0 is meant, and JSON has one kind of number
            fields[key] = float(value) if kind is float and type(value) is int else value
            if type(fields[key]) is not kind:
                raise ValueError(
                    f"{cls.__name__}.{key} must be {kind.__name__}, not {dump_line(value)[:60]}"
                )
            if kind is list and not is_texts(value):
                raise ValueError(f"{cls.__name__}.{key} must be a list of text")
        return cls._make(fields.values())

    def to_json(self) -> dict:
        full = self._asdict()
        extra = full.pop("extra")
        kept = {
            key: value
            for key, value in full.items()
            if value != self._field_defaults[key] or key in self.always
        }
        return {**kept, **extra}


# of a title; what is longer goes into the prompt, and no further in one argument or variable
TITLE_LENGTH = 200

# The order is that of the keys on disk. `id` stays first: by it begins_with_id knows a record's
# own line. A default is left out when written, so a new field costs files of before nothing.
TASK_DEFAULTS = {
    "id": "",
    "title": "",
    "prompt": "",
    "state": "pending",
    "priority": 0,
    "after": [],
    "paths": [],
    "max_attempts": 0,
    "attempts": 0,
    "rev": 0,
    "seq": 0,
    "queue_seq": 0,
    "not_before": "",
    "reason": "",
    "agent": "",
    "fence": "",
    "ended_by": "",
    "start": "",
    "branch": "",
    "commit": "",
    "rescue": "",
    "submitted_at": "",
    "landed_commit": "",
    "landed_at": "",
    "added_at": "",
    "source": "",
    "conversation": {},
    "time_limit_seconds": 0.0,
    "budget_usd": 0.0,
    "parent": "",
    "landed_from": "",
    "preset": "",
    "approved": "",
    "lapses": 0,
    "extra": {},
}


class Task(Record, namedtuple("Task", TASK_DEFAULTS, defaults=TASK_DEFAULTS.values())):
    """A unit of work and all that is known of it, wherever it lies.

    attempts: ended ones. start: commit or branch that the next attempt begins from. fence,
    ended_by: the last claim's token and the verb that ended it. seq, queue_seq: first come,
    first served, in either queue. source: where `add -f` read it, so that it is not added twice.
    conversation: {"agent", "id", "until"}: the CLI's session that an interrupted attempt goes on
    in; until then (UTC) the task is kept for that agent. parent: the task whose agent has added
    this one. landed_from: where the target was before it. preset: only its agents take
    the task. approved: the commit that may land, where work is reviewed first.
    lapses: how often the host that worked on it was not heard of any more.
    """

    __slots__ = ()

    @property
    def attempt(self) -> int:
        """The number of the attempt that runs, or comes next."""
        return self.attempts + 1


# A pid is given out again; with its start it is one process, and with boot one of this start of
# the machine. namespace: whether its pids mean anything here. machine outlives a change of the
# host's name, which boot alone could not bridge: it is another one after each start.
OWNER_DEFAULTS = {
    "pid": 0,
    "start": "",
    "boot": "",
    "host": "",
    "namespace": "",
    "session": "",
    "machine": "",
    "extra": {},
}


class Owner(Record, namedtuple("Owner", OWNER_DEFAULTS, defaults=OWNER_DEFAULTS.values())):
    """The long-lived process behind a lock. start: field 22 of /proc/PID/stat, elsewhere what ps
    says. For an agent of a host it is the host's `spoke`, as told by it."""

    __slots__ = ()

    @property
    def is_on_host(self) -> bool:
        """Whether a host has told of it: its pid means nothing here, whatever runs under it."""
        return self.namespace == "host:" + self.host


# renewals is a number and no time: who watches a lease sees it change, and compares no clocks.
CLAIM_DEFAULTS = {
    "schema": SCHEMA,
    "agent": "",
    "fence": "",
    "claimed_at": "",
    "renewals": 0,
    "heard_at": "",
    "owner": {},
    "locks": [],
    "task": {},
    "extra": {},
}


class Claim(Record, namedtuple("Claim", CLAIM_DEFAULTS, defaults=CLAIM_DEFAULTS.values())):
    """One lock file: at most one task (a JSON object, empty for none), and named locks. heard_at:
    when it was last renewed."""

    __slots__ = ()

    def get_task(self) -> Task | None:
        return Task.from_json(self.task) if self.task else None

    def get_owner(self) -> Owner:
        return Owner.from_json(self.owner)

    def names(self) -> list[str]:
        """Every name that this claim excludes others from: its named locks and its task's paths."""
        return [*self.locks, *("path:" + glob for glob in self.task.get("paths", []))]


# the key in a task's record on a host, under which stands what the hub knows of it; and the file
# that names the hub there
HUB = "hub"


def branch_of(agent: str, task_id: str) -> str:
    """The branch on which an agent works on a task; its own, so that no two attempts meet."""
    return f"farm/{agent}/{task_id}"


def arrival_of(host: str, fence: str) -> str:
    """The ref in which a host keeps on the hub what it has committed for the claim `fence`."""
    return f"refs/farm/in/{host}/{fence}"


def is_texts(value) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


NAME_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")


# What git refuses in a part of a ref: `..`, a dot at either end, `.lock` at the end. A `-` in
# front would be read as an option by a command.
def is_name(text: str) -> bool:
    """Whether `text` can be a file name and a part of a git ref."""
    is_plain = 0 < len(text) <= 100 and NAME_CHARACTERS.issuperset(text)
    return (
        is_plain and text[0] not in "._-" and ".." not in text and not text.endswith((".", ".lock"))
    )


def checked_name(text: str, what: str) -> str:
    """`text`, when it is a name. Raises UsageError."""
    if not is_name(text):
        raise UsageError(f"{what} {text!r}: use letters, digits, '.', '_' and '-' only")
    return text


def number_of(task_id: str) -> int:
    """7 for t-0007; 0 for an id that a person has chosen."""
    return int(task_id[2:]) if task_id.startswith("t-") and task_id[2:].isdecimal() else 0


# ------------------------------------------------------------------------------------------ machine
# Who lives, and how it is ended; memory, disk, ports, packages. A pid alone says nothing after a
# reboot or a wrap-around, so an owner is pid, start time, boot and machine together.
# (tests/rooms/test_leases.py, tests/rooms/test_tools.py)


def import_package(name: str):
    """psutil, portalocker or tabulate; from the toolkit's .venv when this interpreter lacks it.
    Raises MissingTool.

    The shim starts Python without its site-packages; whoever needs a package pays for finding it
    here.
    """
    try:
        return __import__(name)
    except ImportError:
        packages = os.path.join(
            TOOLKIT, ".venv", "lib", "python{}.{}".format(*sys.version_info), "site-packages"
        )
        if os.path.isdir(packages) and packages not in sys.path:
            sys.path.append(packages)
            return import_package(name)
        # an interpreter with packages of its own: `uv run`, another venv
        if sys.flags.no_site and "site" not in sys.modules:
            import site

            site.main()
            return import_package(name)
        venv_python = f"{TOOLKIT}/.venv/bin/python"
        if os.path.exists(venv_python) and not given("FARM_REEXEC"):
            os.environ["FARM_REEXEC"] = "1"
            os.execv(venv_python, [venv_python, f"{TOOLKIT}/farm.py", *sys.argv[1:]])
    raise MissingTool(
        f"the Python package {name} is not installed for {sys.executable}",
        f"make -C {TOOLKIT} setup, or: uv run farm.py ..., or: pip install {name}",
    )


def ask_kernel(name: str) -> str:
    """A value of a Mac's kernel."""
    return os.popen(f"sysctl -n {name} 2>/dev/null").read().strip()


def boot_id() -> str:
    """Changes at each boot; FARM_BOOT_ID stands in for it where a test models a reboot."""
    return given("FARM_BOOT_ID") or read_boot_id()


# What stays as it is while a process lives is cached: a claim asks for it once a lock file.
@functools.cache
def read_boot_id() -> str:
    return read_line("/proc/sys/kernel/random/boot_id") or ask_kernel("kern.bootsessionuuid")


@functools.cache
def machine_id() -> str:
    """What stays over boots and changes of the host's name (a laptop on another network); empty
    where there is none."""
    noted = read_line("/etc/machine-id") or read_line("/var/lib/dbus/machine-id")
    return noted or (ask_kernel("kern.uuid") if sys.platform == "darwin" else "")


# Two containers may share a folder and a boot; a pid of one names another process in the other, or
# none.
@functools.cache
def pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def start_of(pid: int) -> str:
    """The process's start, as a text that no clock change moves; empty when it is gone or a
    zombie."""
    try:
        # from the last `)` on: the command's name, field 2, may hold blanks and parentheses
        fields = read_bytes(f"/proc/{pid}/stat").rpartition(b")")[2].split()
        return "" if fields[0] in b"ZX" else fields[19].decode("ascii")
    except (OSError, IndexError):
        # there is a /proc, so the process is gone; elsewhere ps has to tell
        if os.path.exists("/proc/self/stat"):
            return ""
        line = os.popen(f"ps -o stat= -o lstart= -p {int(pid)} 2>/dev/null").read().split()
        return "" if not line or line[0].startswith("Z") else " ".join(line[1:])


def identify(pid: int) -> Owner:
    """The Owner that `pid` is. Raises UsageError when no such process lives."""
    start = start_of(pid)
    if not start:
        raise UsageError(
            f"no process {pid} to own the lock",
            "name one that lives as long as the agent: --owner-pid PID",
        )
    return Owner(
        pid,
        start,
        boot_id(),
        os.uname().nodename,
        pid_namespace(),
        given("FARM_SESSION"),
        machine_id(),
    )


# A verb's own process is over with its answer: a lock that it owned would be free at once. A
# session's leader is no guide within an agent: many a CLI gives each command a session of its own.
def caller(owner_pid: int | None) -> Owner:
    """The owner of what this command acquires: --owner-pid, else the agent whose session this
    is, else the session leader."""
    if owner_pid is not None:
        return identify(owner_pid)
    agent = given("FARM_OWNER_PID")
    if agent.isascii() and agent.isdigit():
        return identify(int(agent))
    leader = os.getsid(0)
    # 0: the leader is outside of this container, or the kernel's first process, which has none
    if leader in (0, os.getpid()):
        raise UsageError(
            "no process that outlives this command leads its session, so nothing would be left "
            "to own the lock",
            "name the process that lives as long as the agent: --owner-pid PID",
        )
    return identify(leader)


def find_liveness(owner: Owner) -> bool | None:
    """True alive, False dead, None when it cannot be seen from here: another machine, or another
    container's processes.

    The same boot is the same machine whatever it is called now; another boot of the same machine
    has ended all.
    """
    if owner.is_on_host:
        return None
    if owner.boot != boot_id():
        is_here = (
            owner.machine == machine_id()
            if owner.machine and machine_id()
            else owner.host == os.uname().nodename
        )
        return False if is_here else None
    if owner.namespace != pid_namespace():
        return None
    # a process that is gone has an empty start, which must not equal that of a record without one
    return start_of(owner.pid) == owner.start != ""


# Opening a FIFO for writing waits for a reader; with O_NONBLOCK it fails where there is none. A
# full one needs no more bytes: whoever listens wakes up. Bells lie in mailboxes, where an agent
# can put a file or a link in their place: neither is written to.
def ring(path: str, word: bytes = b"claim\n") -> None:
    """Wake whoever waits at a bell, a FIFO; nobody listening is fine."""
    try:
        bell = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        if stat.S_ISFIFO(os.fstat(bell).st_mode):
            os.write(bell, word)
    except BlockingIOError:
        pass
    finally:
        os.close(bell)


# psutil's own children() goes over all of the machine's processes once for each process asked
# about.
def process_children() -> dict[int, list]:
    """pid -> its children's psutil.Process, from one pass over the machine's processes."""
    psutil = import_package("psutil")
    children = defaultdict(list)
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
    # it grows while it is gone through: children come behind their parents
    for process in found:
        found += children.get(process.pid, [])
    return found


def cpu_time_of(tree: list) -> float:
    """CPU seconds of a process tree, those of children that have ended included."""
    psutil = import_package("psutil")
    total = 0.0
    for process in tree:
        try:
            # user and system time, then those of children that have ended; what comes after is not
            # the same on each system
            total += sum(process.cpu_times()[:4])
        except psutil.Error:
            continue
    return total


# The environment is what a process cannot lose by setsid or by the death of its parent, where
# session and ppid no longer say where it comes from.
def find_by_environment(**wanted: str) -> list:
    """(process, its FARM_AGENT_NAME) of those whose environment at their start had these values;
    this one left out."""
    psutil = import_package("psutil")
    found = []
    for process in psutil.process_iter():
        try:
            # raises for other users' processes, and for those that end just now
            environment = process.environ()
        except (psutil.Error, OSError):
            continue
        if process.pid != os.getpid() and all(
            environment.get(key) == value for key, value in wanted.items()
        ):
            found.append((process, environment.get("FARM_AGENT_NAME", "")))
    return found


# Monotonic seconds: a clock that somebody sets must neither end a wait nor prolong it.
def wait_for(is_true, seconds: float, pause: float, sleep=time.sleep) -> bool:
    """Whether `is_true` has become true in so many seconds; asked every `pause` seconds, or when
    `sleep` (an Event's wait, say) returns early."""
    deadline = CLOCK.monotonic() + seconds
    while not is_true():
        left = deadline - CLOCK.monotonic()
        if left <= 0:
            return False
        sleep(min(pause, left))
    return True


def end_processes(processes: list, seconds: float = 3.0) -> None:
    """SIGTERM, then SIGKILL to what is left after `seconds`. psutil checks pid and start time
    before each signal."""
    psutil = import_package("psutil")
    for signal_name in ("terminate", "kill"):
        for process in processes:
            try:
                getattr(process, signal_name)()
            except psutil.Error:
                continue
        wait_for(lambda left=processes: not any(map(is_alive, left)), seconds, 0.01)
        processes = [process for process in processes if is_alive(process)]


# crc32, as Python's hash() of bytes differs from process to process. The highest port is 29,999:
# from 32,768 on Linux gives ports to whoever asks for any.
def port_base(folder: str) -> int:
    """Where the ports of a farm begin, the same at each start: slots have the first hundred,
    agents the next 900."""
    import zlib

    return 10000 + zlib.crc32(os.fsencode(folder)) % 19000


def default_slots() -> int:
    """Gates at once: a core each, and 2 GiB of memory each, four at the most."""
    return max(1, min(os.cpu_count() or 1, free_memory_mib() // 2048, 4))


def find_shortage(folder: str, min_free_mib: int) -> str:
    """What there is too little of, memory or disk, in words; empty when there is room."""
    disk = os.statvfs(folder)
    # f_bavail, as f_bfree counts what is kept for root
    free = {"memory": free_memory_mib(), "disk": disk.f_bavail * disk.f_frsize >> 20}
    return ", ".join(
        f"{mib} MiB of {what} free, {min_free_mib} wanted"
        for what, mib in free.items()
        if mib < min_free_mib
    )


# MemAvailable and not MemFree, which on a machine that has run for a while is little: the rest
# holds caches that go when somebody asks. psutil says the same, but has to be imported.
def free_memory_mib() -> int:
    """Memory that a new process can have without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(
                int(line.split()[1]) // 1024 for line in file if line.startswith("MemAvailable:")
            )
    except (OSError, StopIteration):
        return import_package("psutil").virtual_memory().available >> 20


def is_alive(process) -> bool:
    """Whether it is still this very process; a zombie is over."""
    return bool(start_of(process.pid)) and process.is_running()


def end_all(find, seconds: float) -> bool:
    """SIGKILL to what `find` names, again until it names nothing, for what is being ended may
    just have forked; False when that has taken too long."""
    psutil, deadline = import_package("psutil"), CLOCK.monotonic() + seconds
    while doomed := find():
        if CLOCK.monotonic() > deadline:
            return False
        for process in doomed:
            try:
                process.kill()
            except psutil.Error:
                continue
        # psutil would wait for zombies, too
        wait_for(lambda gone=doomed: not any(start_of(process.pid) for process in gone), 1, 0.005)
    return True


def end_gates(folder: str) -> None:
    """End every process of the gate in this slot, whoever started it: those that its environment
    marks, their sessions (the gate leads its own) and all below them, which may have cleared
    their environment. Again until none is left: what is being ended may just have forked. Raises
    FarmError when that takes half a minute.
    """
    sessions = set()

    def find() -> list:
        tops = [process for process, _ in find_by_environment(FARM_SLOT=folder)]
        # kept over the rounds: once those are dead, nothing else leads to the rest of
        # their session; our own is left out, as we are no part of the gate
        nobodys_or_ours = {-1, 0, session_of(os.getpid())}
        sessions.update({session_of(process.pid) for process in tops} - nobodys_or_ours)
        children = process_children()
        everything = itertools.chain(*children.values())
        tops += [process for process in everything if session_of(process.pid) in sessions]
        doomed = {process.pid: process for top in tops for process in tree_of(top.pid, children)}
        doomed.pop(os.getpid(), None)
        living = [process for pid, process in doomed.items() if start_of(pid)]
        for session in sessions if living else ():
            kill_group(session)
        return living

    if not end_all(find, 30):
        raise FarmError(
            f"processes of the gate in {folder} could not be ended",
            f"grep -l FARM_SLOT={folder} /proc/*/environ",
        )


# Signals by pid come too late for a child that is forked between looking and killing; the kernel
# knows a group's members at the moment of the signal.
def kill_group(group: int) -> None:
    """SIGKILL to a process group: in one blow, with whatever it has just forked."""
    import signal

    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def start_apart(argv: list[str], **options):
    """A process that leads a session of its own, where no signal to our group reaches it; with
    nothing on its standard input, unless `options` (Popen's) name something."""
    import subprocess

    options = {"stdin": subprocess.DEVNULL, **options}
    return subprocess.Popen(argv, start_new_session=True, **options)


def end_apart(process) -> None:
    """End what `start_apart` has started, and all of its group."""
    kill_group(process.pid)
    process.wait()


def start_thread(function, *args):
    """Run `function` on a thread of its own, which keeps no process from its end."""
    import threading

    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    return thread


# an empty folder among the slots, where FARM_REVIEWER runs
REVIEWER = "tmp/reviewer"


# By the folders, not by what a merger has noted: a killed one may not have come to its note.
def end_all_gates(slots_folder: str) -> None:
    """End the gates that a dead merger of this farm has left running."""
    for name in names_in(slots_folder):
        if re.fullmatch(r"gate-\d+", name):
            end_gates(f"{slots_folder}/{name}")
    if os.path.isdir(f"{slots_folder}/{REVIEWER}"):
        end_gates(f"{slots_folder}/{REVIEWER}")


def in_session(leader: int) -> list:
    """The live processes of a session."""
    psutil = import_package("psutil")
    return [
        process
        for process in psutil.process_iter()
        if session_of(process.pid) == leader and start_of(process.pid)
    ]


def resident_size(process) -> int:
    """Bytes; 0 for one that has gone."""
    try:
        return process.memory_info().rss
    except import_package("psutil").Error:
        return 0


def size_on_disk(folder: str) -> int:
    """Bytes, as du has them; 0 where it cannot tell."""
    import subprocess

    try:
        said = subprocess.run(["du", "-sk", folder], capture_output=True, text=True).stdout
        return int(said.partition("\t")[0] or 0) << 10
    except FileNotFoundError:
        return 0


def session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1


def hold(path: str):
    """A file, open and locked until it is closed; others wait. By flock, as the mutex: the
    import of portalocker takes as long as an agent's verb."""
    file = open(path, "a+", encoding="ascii")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


# Opened by `a+` and emptied only once it is ours: `w` would wipe out the holder's pid. The start
# time stands beside the pid, which by the time of find_recorded may be another's.
def hold_long(path: str, what: str):
    """Take the lock of what lives long (one loop, one merger a farm). Raises Refused that names
    the holder's pid."""
    portalocker = import_package("portalocker")
    file = open(path, "a+", encoding="ascii")
    try:
        portalocker.lock(file, portalocker.LOCK_EX | portalocker.LOCK_NB)
    except portalocker.LockException:
        file.seek(0)
        pid = file.read().partition("\t")[0]
        file.close()
        raise Refused(f"{what} runs already (pid {pid})", "./farm.py status") from None
    file.truncate(0)
    file.write(f"{os.getpid()}\t{start_of(os.getpid())}\n")
    file.flush()
    return file


def find_recorded(path: str) -> int | None:
    """The pid in a lock file of `hold_long`, while exactly that process lives."""
    try:
        pid, _, start = read_line(path).partition("\t")
        return int(pid) if start and start_of(int(pid)) == start else None
    except ValueError:
        return None


# By signal 0, as this is asked of each session five times a second.
def process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # it is there, and another user's
    except PermissionError:
        pass
    return True


def random_uuid() -> str:
    """RFC 4122, version 4; importing uuid takes longer than the rest of a claim."""
    digits = bytearray(os.urandom(16))
    digits[6], digits[8] = digits[6] & 0x0F | 0x40, digits[8] & 0x3F | 0x80
    text = digits.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


class StopRequest:
    """Whether SIGINT, SIGTERM or SIGHUP have come; `signal` is the last one's number, `count` how
    many came.

    No threading.Event: a handler runs between two steps of its own thread, and would wait for
    ever for the lock that this thread holds within `wait`.
    """

    def __init__(self):
        import signal

        self.signal = self.count = 0
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        os.set_blocking(self.reader, False)
        # SIGHUP comes when the terminal is closed or ssh breaks
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.note)

    def note(self, number: int, _frame) -> None:
        self.signal, self.count = number, self.count + 1
        self.wake()

    def wake(self) -> None:
        """End a wait early; any thread may."""
        try:
            os.write(self.writer, b"!")
        except BlockingIOError:
            pass  # it is full of such marks already

    def is_set(self) -> bool:
        return self.count > 0

    # A system call goes on after a signal's handler (PEP 475), so select would wait to its end: it
    # is the byte in the pipe that ends it.
    def wait(self, seconds: float) -> None:
        """Until one has come, or `wake` was called, or the time is over."""
        import select

        if select.select([self.reader], [], [], seconds)[0]:
            os.read(self.reader, 65536)

    def clear(self) -> None:
        """Begin anew: what has come was meant for a command that has ended."""
        self.signal = self.count = 0
        self.wait(0)


def find_bash() -> str:
    import shutil

    return shutil.which("bash") or "/bin/bash"


# ----------------------------------------------------------------------------------------- settings
# One table says what can be set; flags, environment, farm.env and the last `up` are looked through
# in that order. A row alone is a variable; its flag is a word in a verb's options (for `up` and
# `run`: FARM_OPTIONS), and where only some words are allowed, WORDS_OF has them. The repo is
# found from files, not by asking git: the start of an agent's verb is its cost.
# (tests/rooms/test_settings.py)

GUARD = "farm-guard"  # a file in coordination/.git, which is no repo of anybody's
FARM_HOME_NOTE = "farm/main"  # in the common git dir

# the default is of the kind that the setting has; most are texts, and empty
Setting = namedtuple("Setting", "meaning default", defaults=[""])

SETTINGS = {
    "n": Setting("how many agents", 10),
    "agent": Setting(
        "a preset, a mix such as claude:6,codex:4, or a command (default: claude when on PATH)"
    ),
    "permissions": Setting("what a preset's agents may do unasked: ask, edits or all", "edits"),
    "isolate": Setting(
        "bwrap: agents and gates run in sandboxes; none; or a command prefix with {worktree} {git} "
        "{refs} {mailbox} {home} (default: bwrap with permissions=all, else none)"
    ),
    "show": Setting(
        "paths that sandboxes show, separated by colons, below HOME; +PATH: to be written"
    ),
    "hide": Setting("paths that sandboxes hide besides those of scripts/isolate.sh"),
    "pass_": Setting("names of variables that sandboxes get, such as 'NPM_TOKEN AWS_*'"),
    "network": Setting("what agents' sandboxes have of it: full or none", "full"),
    "gate_network": Setting("what gates' sandboxes have of it: full or none", "full"),
    "agent_memory_mib": Setting(
        "an attempt whose processes take more memory together is ended (0: no limit)", 0
    ),
    "agent_processes": Setting("an attempt that has more processes is ended (0: no limit)", 0),
    "agent_disk_mib": Setting(
        "an attempt whose worktree and temporary files take more is ended (0: no limit)", 0
    ),
    "prompt_template": Setting(
        "your own file in the place of the farm's prompt: {body} {task} {fence} ..."
    ),
    "task_seconds": Setting(
        "an attempt that takes longer is ended; a task's own limit goes first", 0.0
    ),
    "task_budget": Setting(
        "dollars: a task that has cost as much is failed; its own goes first", 0.0
    ),
    "budget": Setting("dollars: the farm pauses when it has cost as much (default: none)", 0.0),
    "agent_home": Setting(
        "a folder that each agent gets a copy of as its own HOME (default: they share yours)"
    ),
    "on": Setting("where agents run: words of here, slurm, ssh:BOX (default: here)"),
    "per_host": Setting("agents a job of Slurm", 10),
    "slurm": Setting("options of sbatch for these jobs, such as '-p long --mem=40G'"),
    "hub_address": Setting("what hosts ssh to, to come here (default: user@hostname)"),
    "gate": Setting("the test command that a tree must pass before it lands (default: none)"),
    "gate_on": Setting(
        "where gates run: slurm or ssh:HOST (default: here); slots are those there then"
    ),
    "into": Setting("the target branch (default: the one that the main worktree has checked out)"),
    "slots": Setting("gates at once (default: from cores and memory)", 0),
    "style": Setting("how work lands: merge, squash or rebase", "merge"),
    "strict": Setting("gate every commit of the target's first-parent line by itself", False),
    "remote": Setting("push what lands to this remote first, with a lease"),
    "pull_request": Setting(
        "after each push, open a pull request from the target or bring its text up to date", False
    ),
    "remote_timeout": Setting(
        "seconds until a fetch or a push is ended, with all that it has started", 300.0
    ),
    "gate_timeout": Setting("seconds until a gate and its whole process group are ended", 1800.0),
    "gate_env": Setting("names of environment variables that a verdict depends on"),
    "fallback": Setting(
        "A>B: agents of the preset B take the tasks for A while that is at a limit"
    ),
    "review": Setting(
        "what lands only when somebody says yes: no, all, or globs of paths, such as db/**", "no"
    ),
    "reviewer": Setting(
        "a command that says it: prompt and diff on stdin; 0 yes, 1 no with words, else ask me"
    ),
    "follow_ups": Setting("how many tasks one attempt's agent may add (0: none)", 5),
    "follow_up_depth": Setting(
        "how many generations of them there may be: follow-ups of follow-ups", 2
    ),
    "max_attempts": Setting("attempts until a task is failed", 3),
    "lease_seconds": Setting(
        "until an owner on another host counts as dead without a renew", 900.0
    ),
    "host_lease_seconds": Setting(
        "until a host that is not heard of loses its tasks; it renews each third of it", 90.0
    ),
    "grace_seconds": Setting("how long `down` lets agents finish", 30.0),
    "sandboxed": Setting(
        "agents make their moves through their mailbox, for sandboxes that may not write elsewhere",
        False,
    ),
    "keep_days": Setting(
        "days until verdicts, prompts, returns and squashed commits of what landed go (0: never)",
        30.0,
    ),
    "min_free_mib": Setting(
        "no new agent starts and no gate runs below this much free disk or memory", 512
    ),
    "notify": Setting("a command that gets what a person should know, as JSON on stdin"),
    "worktrees": Setting("folder of the worktrees (default: ../<repo>-farm)"),
}

Settings = namedtuple("Settings", SETTINGS)

WORDS_OF = {
    "permissions": ("ask", "edits", "all"),
    "network": ("full", "none"),
    "gate_network": ("full", "none"),
    "style": ("merge", "squash", "rebase"),
}


def variable_of(name: str) -> str:
    return "FARM_" + name.rstrip("_").upper()  # `pass` is a word of Python's


# The error names the origin, as one of four places is to be mended.
def convert_setting(name: str, text, origin: str):
    """`text` as the setting's kind. Raises UsageError that names where it came from."""
    kind = type(SETTINGS[name].default)
    # the kernel takes 128 KiB in one argument or variable
    if isinstance(text, str) and len(text) > 100_000:
        raise UsageError(
            f"{name} is {len(text):,} characters long (from {origin}), and 100,000 can be passed "
            f"on",
            "put it into a script, and name that",
        )
    try:
        value = text
        if isinstance(text, str):
            value = text.lower() in ("1", "true", "yes", "on") if kind is bool else kind(text)
        # By type(): a bool, which is an int too, fits a bool and nothing else. And written so that
        # NaN fails, too.
        fits = type(value) in (kind, int if kind is float else kind)
        if not fits or kind in (int, float) and not 0 <= value < 1e9:
            raise ValueError
    except ValueError:
        what = "number from 0 on" if kind in (int, float) else kind.__name__
        raise UsageError(
            f"{name} must be a {what}, not {one_line(repr(text), 40)} (from {origin})"
        ) from None
    return value


def read_env_file(path: str) -> dict:
    """KEY=VALUE lines of farm.env; blank lines and # comments are passed over, quotes around a
    value dropped."""
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


# FARM_AS_TOLD: loop and merger run on for days. What tmux has in its environment, or a farm.env
# that has changed since, must not give them another gate than the one that `up` has named.
def load_settings(repo: str, flags: dict | None = None, remembered: dict | None = None) -> Settings:
    """flag > FARM_* in the environment > farm.env > what the last `up` was told > default.

    With FARM_AS_TOLD, which the farm's own loop and merger have, what `up` was told comes first.
    """
    flags, remembered = flags or {}, remembered or {}
    if given("FARM_AS_TOLD"):
        flags = {**remembered, **flags}
    env_file = read_env_file(f"{repo}/farm.env")
    values = {}
    for name, setting in SETTINGS.items():
        variable = variable_of(name)
        sources = (
            ("the command line", flags.get(name)),
            ("the environment", os.environ.get(variable)),
            ("farm.env", env_file.get(variable)),
            ("the last up", remembered.get(name)),
        )
        origin, found = next(
            ((o, v) for o, v in sources if v not in (None, "")), ("", setting.default)
        )
        values[name] = convert_setting(name, found, origin)
    if not 1 <= values["n"] <= 999:
        raise UsageError(
            f"a farm has at least one agent, and at most 999, not {values['n']}",
            "./farm.py up -n 10",
        )
    for name, words in WORDS_OF.items():
        if values[name] not in words:
            allowed = f"{', '.join(words[:-1])} or {words[-1]}"
            raise UsageError(f"{name} is {allowed}, not {values[name]!r}")
    return Settings(**values)


def worktrees_folder(repo: str, settings: Settings) -> str:
    return (
        os.path.realpath(os.path.join(repo, settings.worktrees))
        if settings.worktrees
        else repo + "-farm"
    )


def spread(count: int, places: int) -> list[int]:
    return [(count + place) // places for place in range(places)]


def share_out(settings: Settings) -> dict[str, list]:
    """host -> [engine, agents]: equal shares for all words of FARM_ON, Slurm's cut into jobs."""
    words = (settings.on.split() or ["here"])[: settings.n]
    shares = {}
    for engine, count in zip(words, spread(settings.n, len(words)), strict=True):
        if engine == "slurm":
            jobs = spread(count, math.ceil(count / max(1, settings.per_host)))
            shares.update({f"s{index}": [engine, size] for index, size in enumerate(jobs, 1)})
        elif re.fullmatch(r"here|ssh:\w[\w.@-]*", engine):
            shares[engine.removeprefix("ssh:").replace("@", "-")] = [engine, count]
        else:
            raise UsageError(f"on: {engine!r} is none of here, slurm and ssh:BOX")
    return shares


def count_here(settings: Settings) -> int:
    return share_out(settings).get("here", ("", 0))[1]


# Of git's own variables those that name no repo: how to reach a remote, who one is, settings for a
# single call.
KEPT_VARIABLES = (
    "GIT_CONFIG_",
    "GIT_SSH",
    "GIT_AUTHOR_N",
    "GIT_AUTHOR_E",
    "GIT_COMMITTER_N",
    "GIT_COMMITTER_E",
    "GIT_ASKPASS",
    "GIT_HTTP_",
    "GIT_SSL_",
    "GIT_PROXY_",
    "GIT_ALLOW_PROTOCOL",
    "GIT_TERMINAL_PROMPT",
    "GIT_EXEC_PATH",
    "GIT_LFS_",
    "GIT_PAGER",
)
# CDPATH lets `cd` go elsewhere and print where; SHELLOPTS, BASHOPTS and POSIXLY_CORRECT switch
# options on in each bash that starts.
BENT_BASH = ("CDPATH", "SHELLOPTS", "BASHOPTS", "POSIXLY_CORRECT")
# What the scripts call: an exported function goes before the command of its name.
CALLED = (
    " [ awk basename bash cat cd chmod command comm cp cut date dd df dirname du echo env eval "
    "exec exit export expr find git grep head id kill ln local ls mkdir mkfifo mktemp mv od "
    "printf ps pwd read readlink rm sed seq set sh shift sleep sort source ssh stat tail tee "
    "test tmux touch tr trap uname uniq unset wait wc xargs "
)
CALLER_ENVIRONMENT = dict(os.environ)  # as it was, for a command of the caller's own


# CALLER_ENVIRONMENT above keeps what is dropped here: a command that the caller names (with-lock)
# gets the environment that it would have had.
def forget_other_repos() -> None:
    """Drop from the environment, and so for all that we start, what names another repo (a hook's
    GIT_DIR, an alias's, that of yadm or vcsh) or bends bash: with GIT_DIR set, git would work
    there, whatever folder it is told. BASH_ENV, which each script would run and whose words it
    would print, is kept for the person's own commands.
    """
    if "BASH_ENV" in os.environ:
        os.environ["FARM_BASH_ENV"] = os.environ.pop("BASH_ENV")
    drop_lost_tmpdir()
    for name in [*os.environ]:
        bends = name in BENT_BASH or (
            name.startswith("BASH_FUNC_") and f" {name[len('BASH_FUNC_') : -2]} " in CALLED
        )
        if bends or name.startswith("GIT_") and not name.startswith(KEPT_VARIABLES):
            del os.environ[name]


# That of nix-shell goes with the shell; a loop lives on.
def drop_lost_tmpdir() -> None:
    """Without TMPDIR, where its folder is gone: /tmp then."""
    if not os.path.isdir(os.environ.get("TMPDIR", "/")):
        import tempfile

        del os.environ["TMPDIR"]
        tempfile.tempdir = None


def shell(command: str) -> list[str]:
    """The words that run a command of the person's, with the start file of their bash."""
    start = given("FARM_BASH_ENV")
    return [*(("env", "BASH_ENV=" + start) if start else ()), "bash", "-c", command]


def find_git_dirs(folder: str) -> tuple[str, str]:
    """(git dir, common git dir) of a worktree's top folder or of a bare repo; ("", "") when it
    is neither."""
    git_dir = f"{folder}/.git"
    # whoever stands in coordination/ is in the repo above it: its .git is a guard
    if not os.path.exists(git_dir) or os.path.exists(f"{git_dir}/{GUARD}"):
        is_bare = all(os.path.exists(f"{folder}/{name}") for name in ("HEAD", "objects", "refs"))
        return (folder, folder) if is_bare else ("", "")
    if not os.path.isdir(git_dir):
        # a linked worktree's .git is a file that names the folder, possibly relative to itself
        git_dir = os.path.join(folder, read_line(git_dir).removeprefix("gitdir:").strip(" "))
    git_dir = os.path.realpath(git_dir)
    return git_dir, os.path.realpath(
        os.path.join(git_dir, read_line(f"{git_dir}/commondir") or ".")
    )


# Looked up in the text of the config: each agent's verb comes by, and git is one process more. A
# key without a value is true for git.
def is_bare(common: str) -> bool:
    """Whether a common git dir has no worktree of its own. One with an index has: some tool has
    set core.bare there."""
    settings = "\n".join(read_line(f"{common}/{name}") for name in ("config", "config.worktree"))
    lines = {"".join(line.split()).lower() for line in settings.splitlines()}
    return not lines.isdisjoint(
        ("bare=true", "bare=yes", "bare=on", "bare=1", "bare")
    ) and not os.path.exists(f"{common}/index")


def find_repo(start: str) -> str:
    """The farm's checkout of the repo that `start` is in, the same from every worktree;
    find_main in the scripts has the same rule.

    That is git's main worktree. Where git has none to tell of (a bare repo with worktrees) or
    does not know it itself (its git dir lies elsewhere), it is the checkout that the farm was
    first used in: FARM_HOME_NOTE names it. Read from files, not by asking git, because every
    agent's verb comes through here. Raises NotFound.
    """
    folder = os.path.realpath(start)
    while not any(found := find_git_dirs(folder)):
        if folder == os.path.dirname(folder):
            raise NotFound(
                f"{os.path.realpath(start)} is not inside a git repository",
                "git init, or name a repo: farm.py --repo DIR VERB",
            )
        folder = os.path.dirname(folder)
    git_dir, common = found
    noted = read_line(f"{common}/{FARM_HOME_NOTE}")
    # a copied or moved repo brings a note along that is not its own
    if noted and find_git_dirs(noted)[1] == common:
        return noted
    if os.path.basename(common) == ".git" and not is_bare(common):
        return os.path.dirname(common)
    if git_dir == common and (folder == common or is_bare(common)):
        raise NotFound(
            f"{common} is a bare repository, and a farm needs a checkout",
            f"git -C {common} worktree list   (name one of them: --repo DIR), or git clone it",
        )
    return folder


# HEAD, objects and refs are what git takes for a repo; `git clean` and `git stash -u` do not go
# into one. GUARD is written last, so that where it is, all of it is there.
def make_guard(git_dir: str) -> None:
    """An empty repo, for git to pass over the folder that it is in."""
    if not os.path.exists(f"{git_dir}/{GUARD}"):
        for name in ("objects", "refs"):
            make_folder(f"{git_dir}/{name}")
        write_whole(f"{git_dir}/HEAD", "ref: refs/heads/none\n")
        write_whole(f"{git_dir}/{GUARD}", "git clean and git stash leave this alone\n")


def note_home(repo: str) -> None:
    """Write down which checkout the farm lives in, where git could not tell it from the others."""
    common = find_git_dirs(repo)[1]
    if common and (os.path.basename(common) != ".git" or is_bare(common)):
        note = f"{common}/{FARM_HOME_NOTE}"
        make_parent(note)
        write_whole(note, repo + "\n")


# Three digits: names sort as numbers do, and load_settings allows 999 at most.
def agent_names(count: int) -> list[str]:
    return [f"agent-{number:03d}" for number in range(1, count + 1)]


def worktree_of(repo: str, settings: Settings, agent: str) -> str:
    return f"{worktrees_folder(repo, settings)}/{agent}-worktree"


def agent_number(name: str) -> str:
    """The short way to name an agent on the command line: 3 for agent-003."""
    return str(int(name[6:])) if re.fullmatch(r"agent-\d{3}", name) else name


# ------------------------------------------------------------------------------------------ scripts
# The only way to git and tmux: whoever wants to know what the farm may do to a repo reads scripts/.
# (tests/scripts/test_scripts_*.py)

# Both languages have the same exit codes, so a script's code is a class here.
ERROR_OF_EXIT = {kind.exit_code: kind for kind in FarmError.__subclasses__() if kind.exit_code > 1}


class ScriptResult(namedtuple("ScriptResult", "code stdout stderr")):
    """How a script has ended; rows: what it printed, as lines of fields."""

    __slots__ = ()

    @property
    def rows(self) -> list[list[str]]:
        return read_tsv(self.stdout)


# Scripts can be used without farm.py, so their hints name scripts; who has typed a verb gets a
# verb.
VERB_OF_SCRIPT = {
    "probe-tmux.sh": "status",
    "attach-tmux.sh": "attach",
    "send-tmux.sh": "send",
    "mk-worktrees.sh": "up",
    "rm-worktrees.sh": "clean",
    "rescue.sh": "rescue",
    "spawn-tmux.sh": "up",
    "stop-tmux.sh": "down",
}


def hint_of(text: str, folder: str) -> str:
    """A script's hint for who has typed a verb: its scripts are not where they stand. `folder` is
    where the script that says it lies, below scripts/; it names those beside it."""
    name, _, rest = text.partition(" ")
    if name in VERB_OF_SCRIPT:
        words = "" if rest.startswith("-") else rest
        return f"./farm.py {VERB_OF_SCRIPT[name]} {words}".strip()
    is_beside = name.endswith(".sh") and "/" not in name
    return f"bash {os.path.join(SCRIPTS, folder, text)}" if is_beside else text


def script_error(name: str, result: ScriptResult) -> FarmError:
    """A script's exit code and its stderr (`farm: what`, `  try: command`) as the error that it
    is."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    hints = [line for line in lines if line.startswith("  try: ")]
    said = [line.removeprefix("farm: ") for line in lines if line not in hints]
    hint = hint_of(hints[-1].removeprefix("  try: "), os.path.dirname(name)) if hints else ""
    # git may say a hundred lines before it fails; the cause comes last
    message = "\n".join(said[-8:]) or f"{name} ended with exit code {result.code}"
    return ERROR_OF_EXIT.get(result.code, FarmError)(message, hint)


# Paths need be no UTF-8: by surrogateescape they are the same bytes when they go to a script
# again.
def run_script(
    name: str,
    *args: str,
    stdin: str = "",
    timeout: float = 600.0,
    env: dict | None = None,
    allow: tuple = (0,),
    detach: bool = False,
    prefix: list | tuple = (),
) -> ScriptResult:
    """Run scripts/`name`; raises the FarmError of its exit code when that is not in `allow`.

    prefix: a sandbox's words. detach: in a session of its own, where no signal to our process
    group reaches it; all that it starts (git, ssh, a pinentry) ends with it. Raises TookTooLong.
    """
    import subprocess

    drop_lost_tmpdir()
    try:
        process = subprocess.Popen(
            [*prefix, "bash", f"{SCRIPTS}/{name}", *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(env or {})},
            cwd=TOOLKIT,
            start_new_session=detach,
        )
        said = process.communicate(os.fsencode(stdin), timeout)
    except subprocess.TimeoutExpired:
        kill_group(process.pid) if detach else process.kill()
        process.wait()  # not for its pipes, which what it has started may hold on to
        raise TookTooLong(f"{name} took longer than {timeout:.0f} s and was ended") from None
    except FileNotFoundError:
        raise MissingTool("bash is not installed", "apt install bash, brew install bash") from None
    texts = (out.decode("utf-8", "surrogateescape") for out in said)
    result = ScriptResult(process.returncode, *texts)
    if result.code not in allow:
        raise script_error(name, result)
    return result


# An empty place is the folder that a process is in, too: for ours that is often an agent's tree.
def drop_relative_places() -> None:
    """Where agents are sandboxed, look for no program, library or module in an agent's tree."""
    for name in ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PERL5LIB"):
        if is_isolated() and (value := os.environ.get(name)):
            os.environ[name] = ":".join(place for place in value.split(":") if place[:1] == "/")


# Not resolved anew: that can be refused, and a farm has to be ended all the same.
def is_isolated(repo: str = "") -> bool:
    """Whether agents are sandboxed: as this process was told, else as the farm was started."""
    if repo and "FARM_ISOLATE" not in os.environ:
        farm = read_object(f"{repo}/coordination/farm.json")
        os.environ["FARM_ISOLATE"] = str(farm.get("isolation", "none"))
        drop_relative_places()
    return os.environ.get("FARM_ISOLATE", "none") not in ("", "none")


# Looking is enough: `git status` and `git diff` start the filter that a tree's attributes choose,
# and an agent can write those.
def unfiltered(repo: str) -> list[str]:
    """What goes before a command that looks at agents' trees from outside of a sandbox."""
    script = f"{SCRIPTS}/sandbox/tame-filters.sh"
    return ["bash", script, "off", repo] if is_isolated(repo) else []


# Of kind "tree" for what works on files that an agent has left: what lies there can make git run
# it.
def isolated(kind: str, repo: str, folder: str) -> list[str]:
    """What goes before a command that works in `folder`; confine.sh says what the kinds are."""
    script = f"{SCRIPTS}/sandbox/confine.sh"
    return ["bash", script, kind, repo, folder] if is_isolated(repo) else []


def spawn_script(name: str, *args: str) -> str:
    """Run a short script and return what it printed; raises its FarmError.

    For the agents' verbs: importing subprocess would cost a third of what they may take.
    """
    read_end, write_end = os.pipe()
    try:
        actions = [(os.POSIX_SPAWN_DUP2, write_end, 1), (os.POSIX_SPAWN_CLOSE, read_end)]
        pid = os.posix_spawnp(
            "bash", ["bash", f"{SCRIPTS}/{name}", *args], os.environ, file_actions=actions
        )
    # our copy of the writing end has to go: else the read below would never come to an end
    finally:
        os.close(write_end)
    with open(read_end, "rb") as pipe:
        output = pipe.read().decode("utf-8", "surrogateescape")
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise ERROR_OF_EXIT.get(code, FarmError)(f"{name} {' '.join(args)}: exit code {code}")
    return output


# in the common git dir: socket<TAB>pid<TAB>common git dir, by spawn-tmux.sh
TMUX_NOTE = "farm/tmux"


def find_server(repo: str) -> str:
    """What the scripts' -L takes: the socket of the farm's tmux server, as it is written down,
    else the name it will have.

    A shell with another TMUX_TMPDIR reaches the same server. One whose socket somebody has
    tidied away makes it anew at SIGUSR1; a note that came along with a copied repo is not this
    farm's.
    """
    common = find_git_dirs(repo)[1]
    socket, _, owner = (read_line(f"{common}/{TMUX_NOTE}").split("\t") + ["", "", ""])[:3]
    # of a repo that was moved the folder that is named is gone, and the server is its own still;
    # of a copy it is there, and the server is that one's
    if not socket or owner != common and os.path.isdir(owner):
        return farm_socket(repo)
    if not os.path.exists(socket) and (pid := find_living_server(repo)):
        remake_socket(f"{common}/{TMUX_NOTE}", socket, pid)
    return socket if os.path.isdir(os.path.dirname(socket)) else farm_socket(repo)


def remake_socket(note: str, socket: str, pid: int) -> None:
    """Have a tmux server listen at its path again. One asker at a time: a second signal would
    close the socket that the first has made, under whoever calls there already."""
    import signal

    os.makedirs(os.path.dirname(socket), mode=0o700, exist_ok=True)
    with hold(note):
        if not os.path.exists(socket):
            os.kill(pid, signal.SIGUSR1)
        wait_for(lambda: os.path.exists(socket), 2, 0.01)


def find_living_server(repo: str) -> int | None:
    """The pid of the farm's tmux server as it is written down, while it lives, whether or not
    anybody can reach it; else None."""
    note = read_line(f"{find_git_dirs(repo)[1]}/{TMUX_NOTE}")
    socket, pid = (note.split("\t") + [""])[:2]
    return int(pid) if pid.isdigit() and is_tmux(int(pid), socket) else None


def is_tmux(pid: int, socket: str) -> bool:
    """Whether this process is the tmux server that was started for `socket`; numbers are given
    to other processes in time."""
    psutil = import_package("psutil")
    try:
        process = psutil.Process(pid)
        is_ours = process.name().startswith("tmux") and process.uids().real == os.getuid()
        return is_ours and os.path.basename(socket) in " ".join(process.cmdline())
    except psutil.Error:
        return False


# The hash is that of `git hash-object`, which the scripts have on every system. 30 characters of
# the name, as the path of a socket has some 100 in all.
def farm_socket(repo: str) -> str:
    """The name of a farm's tmux server, `farm-<repo>-<hash4>`; the scripts compute the same from
    the folder's path."""
    import hashlib

    path = os.fsencode(repo)
    digest = hashlib.sha1(b"blob %d\0" % len(path) + path, usedforsecurity=False).hexdigest()[:4]
    return f"farm-{re.sub('[^A-Za-z0-9_-]', '-', os.path.basename(repo))[:30]}-{digest}"


def wait_for_landing(new: str) -> None:
    """Until no script and no git that lands `new` runs any more. Raises FarmError after a minute.

    A landing outlives its merger, so that none is cut in half. Between git's writing of the
    files and its moving of the ref no lock is there that a recovery could see: it would put the
    old files back, under the new ref.
    """
    psutil = import_package("psutil")

    def is_landing(words: list) -> bool:  # and no `git show NEW` in a person's pager
        return new in words and any(
            word.endswith(".sh") or word in ("merge", "update-ref") for word in words
        )

    def is_over() -> bool:
        processes = psutil.process_iter(["cmdline"])
        return not any(is_landing(process.info["cmdline"] or []) for process in processes)

    if not wait_for(is_over, 60, 0.05):
        raise FarmError(
            f"a landing of {new[:10]} from before still runs after a minute", "ps ax | grep land.sh"
        )


def rescue(repo: str, agent: str, worktree: str) -> str:
    """Snapshot what is uncommitted in a worktree; the ref, or empty when there was nothing.

    Never raises: one broken worktree must not stop the farm, and nobody resets it before its own
    rescue went through.
    """
    at = ("-C", worktree, "-a", agent, worktree)
    try:
        rows = run_script("rescue.sh", "save", *at, prefix=isolated("tree", repo, worktree)).rows
    except FarmError as error:
        say(f"{agent}: its unsaved work stays in {worktree}: {error}")
        return ""
    return rows[0][0] if rows else ""


def read_repo(repo: str) -> dict[str, list[str]]:
    """What repo-info.sh says: {"main", "head", "branches", "obstacles", ...}, each with its
    fields."""
    return {row[0]: row[1:] for row in run_script("merge/repo-info.sh", "-C", repo).rows}


def find_obstacles(call: Call) -> Advice:
    """(what, what to type) for each branch or ref that stands where one of the farm's would be."""
    info, at = call.repo_info, f"git -C {shell_word(call.repo)}"
    branches = [
        (
            f"the branch {name} is in the way: git keeps branches as files, and agents' "
            "are called farm/AGENT/TASK",
            f"{at} branch -m {name} old-{name.replace('/', '-')}",
        )
        for name in filter(None, info["obstacles"])
    ]
    refs = [
        (
            f"the ref {name} is in the way: git keeps refs as files, and the farm's pins "
            "lie below it",
            f"{at} branch old-{name.replace('/', '-')} {name} && {at} update-ref -d {name}",
        )
        for name in filter(None, info["blocking"])
    ]
    return branches + refs


def target_of(call: Call) -> str:
    """The target branch: --into, else the branch that the main worktree has checked out."""
    info = call.repo_info
    target = call.settings().into or info["head"][0]
    if not target or target not in info["branches"]:
        what = "HEAD is detached, so there is no target branch to take"
        if target:
            what = f"there is no branch {target}"
        raise NotFound(
            f"{what}; there are: {', '.join(info['branches'][:20])}",
            f"./farm.py {call.name} --into BRANCH",
        )
    return target


# ---------------------------------------------------------------------------------------- isolation
# In what sandbox agents and gates run. Scripts read it from the environment, where it is carried
# from the farm's start on, so that none of its processes has another answer.
# (tests/test_isolation.py)

CARRIED = (
    "isolate",
    "show",
    "hide",
    "pass_",
    "network",
    "gate_network",
    "agent_processes",
    "agent_memory_mib",
)


def resolve_isolation(settings: Settings) -> str:
    """What FARM_ISOLATE comes to: `none`, `bwrap` or a command prefix; never another than was
    said. Raises MissingTool where that cannot be, Refused where agents could do all without it."""
    import shutil

    said = settings.isolate
    # what a prefix lets through is its engine's business
    if said not in ("", "none", "bwrap"):
        if not shutil.which(word := said.split()[0]):
            raise MissingTool(
                f"FARM_ISOLATE begins with {word}, which is not on PATH",
                "FARM_ISOLATE=bwrap, or none",
            )
        return said
    if said == "none" or not said and settings.permissions != "all":
        return "none"
    try:
        run_script("sandbox/check-sandbox.sh")
    # who has said bwrap gets the error; who has said nothing is told that the default needs it
    except MissingTool as error:
        if said:
            raise
        raise Refused(
            f"with permissions=all agents can do all that you can here, and there is {error}",
            f"{error.hint}   (or, without a sandbox: FARM_ISOLATE=none)",
        ) from None
    return "bwrap"


def carry_isolation(settings: Settings) -> None:
    """Put the settings of the sandbox into the environment. Raises as `resolve_isolation`."""
    resolved = settings._replace(isolate=resolve_isolation(settings))
    for name in CARRIED:
        os.environ[variable_of(name)] = str(getattr(resolved, name))
    drop_relative_places()


def isolation_environment() -> dict[str, str]:
    """What `carry_isolation` has set, for a session."""
    return {name: os.environ[name] for name in map(variable_of, CARRIED) if name in os.environ}


def describe_isolation(settings: Settings) -> str:
    how = os.environ["FARM_ISOLATE"]
    if how == "none":
        why = "" if settings.isolate else f", the default with permissions={settings.permissions}"
        return f"agents and gates run without a sandbox (FARM_ISOLATE=none{why})"
    what = "in sandboxes of bubblewrap" if how == "bwrap" else f"behind {how!r}"
    return f"agents and gates run {what} (FARM_ISOLATE)"


# ==================================================================================== PART II Truth

# -------------------------------------------------------------------------------------------- state
# Each task once, in memory, wherever its copies lie; which of two copies is the task.
# (tests/rooms/test_store_machine.py, tests/rooms/test_archive.py)

PENDING_FILE = "task_queue/pending.json"
READY_FILE = "merge_queue/ready-to-merge.json"
# What has happened; cut at this size into events-0001.jsonl and so on, as logs are.
HISTORY_FILE, HISTORY_BYTES = "events.jsonl", 16 * 1024 * 1024
# What has landed, a record a line; the queue file holds the last of them. They move in batches of
# twenty, so that the archive is made durable once for many landings.
ARCHIVE_FILE = "merge_queue/landed.jsonl"
LANDED_MAX, LANDED_KEPT = 40, 20
# what this version writes at the top of that file; `load` keeps other keys for a newer one
READY_KEYS = ("ready", "landed", "done", "archived", "archive_bytes", "seqs")
LOCK_FOLDER = "agent_locks"
LOOP_FILE, AGENTS_FILE = "loop.json", "agents.json"  # the second one: of the version before
FARM_FILE = "farm.json"

# What a list may hold: a task whose state does not fit its place was edited by hand, and guessing
# would move work.
STATES_OF = {
    "pending": ("pending", "failed", "canceled"),
    "ready": ("ready",),
    "landed": ("landed",),
}
FOLDERS = (
    "task_queue",
    "merge_queue",
    LOCK_FOLDER,
    "results",
    "returns",
    "prompts",
    "logs",
    "mailbox",
)


class Ids:
    """A set of ids in few bytes: of t-0001 to t-0812 only the ends. A year's landed tasks are
    some ranges, so that every verb can know them all.

    ranges: (what stands before the number, its digits) -> sorted [first, last] pairs; an id that
    ends in no number is a key of its own, with no digits.
    """

    def __init__(self):
        self.ranges = {}

    @staticmethod
    def split(task_id: str) -> tuple[tuple[str, int], int]:
        head = task_id.rstrip("0123456789")
        digits = task_id[len(head) :][:18]
        head = task_id[: len(task_id) - len(digits)]
        return (head, len(digits)), int(digits or 0)

    def __contains__(self, task_id: str) -> bool:
        key, number = self.split(task_id)
        pairs = self.ranges.get(key, ())
        place = bisect.bisect(pairs, [number, math.inf])  # behind those that begin up to it
        return place > 0 and number <= pairs[place - 1][1]

    def __len__(self) -> int:
        return sum(last - first + 1 for pairs in self.ranges.values() for first, last in pairs)

    def add(self, task_id: str) -> None:
        if task_id in self:
            return
        key, number = self.split(task_id)
        pairs = self.ranges.setdefault(key, [])
        place = bisect.bisect(pairs, [number, math.inf])
        pairs.insert(place, [number, number])
        for left in (place, place - 1):  # neighbours grow together
            if 0 <= left < len(pairs) - 1 and pairs[left][1] + 1 == pairs[left + 1][0]:
                pairs[left : left + 2] = [[pairs[left][0], pairs[left + 1][1]]]

    def last_number(self) -> int:
        """The highest number of an id that the farm has given."""
        return max(
            (
                pairs[-1][1]
                for (head, digits), pairs in self.ranges.items()
                if head == "t-" and digits
            ),
            default=0,
        )

    def to_json(self) -> dict[str, str]:
        """`{"t-/4": "1-812 815", "fix-login/0": "0"}`."""
        return {
            f"{head}/{digits}": " ".join(
                str(first) if first == last else f"{first}-{last}" for first, last in pairs
            )
            for (head, digits), pairs in self.ranges.items()
        }

    @classmethod
    def from_json(cls, data) -> Ids:
        """Raises ValueError for what `to_json` never gives."""
        ids = cls()
        if not isinstance(data, dict) or not is_texts([*data.values()]):
            raise ValueError("archived must be an object of text")
        for name, text in data.items():
            head, _, digits = name.rpartition("/")
            pairs = [[*map(int, pair.split("-"))] for pair in text.split(" ")]
            ends = [end for pair in pairs for end in (pair[0], pair[-1])]
            if not digits.isdecimal() or ends != sorted(ends) or max(map(len, pairs)) > 2:
                raise ValueError(f"archived: {name[:40]!r} has ranges that are none")
            ids.ranges[head, int(digits)] = [[pair[0], pair[-1]] for pair in pairs]
        return ids


class State:
    """All that lies on disk, in memory: each task once, its outranked copies named in `losers`.

    pending, ready, landed: id -> Task; claims: agent -> Claim; done: id -> rev; heads: file ->
    its unknown top-level keys; losers: (place, id, agent) of what `Transaction.heal` removes,
    the agent's name only where the place is "claimed". landed and done are those of late: what
    landed before is in `archived`, its records in the archive, which `read_archive` reads.
    archive_bytes: the archive's length, as far as it is known here; seqs: the highest seq and
    queue_seq in it.
    """

    def __init__(self):
        self.pending, self.ready, self.landed = {}, {}, {}
        self.claims, self.done, self.heads = {}, {}, {}
        self.archived, self.archive_bytes, self.seqs = Ids(), 0, [0, 0]
        self.is_behind = False  # whether the archive was longer than the queue file knew
        self.read_archive = lambda: []
        self.lines = {}  # id -> (Task, its line in the pending file): as they were read
        self.losers = []

    def claimed(self) -> dict[str, Task]:
        """id -> Task of what agents hold."""
        return {claim.task["id"]: claim.get_task() for claim in self.claims.values() if claim.task}

    def busy(self) -> list[str]:
        """The agents that hold a task, in order."""
        return sorted(claim.agent for claim in self.claims.values() if claim.task)

    def is_done(self, task_id: str) -> bool:
        return task_id in self.done or task_id in self.archived

    def open_before(self, task: Task) -> list[str]:
        """The ids that it comes after and that have not landed."""
        return [name for name in task.after if not self.is_done(name)]

    def live_tasks(self) -> list[Task]:
        """Every task but those in the archive, in the order they were added."""
        tasks = [
            *self.pending.values(),
            *self.claimed().values(),
            *self.ready.values(),
            *self.landed.values(),
        ]
        return sorted(tasks, key=lambda task: (task.seq, task.id))

    def all_tasks(self) -> list[Task]:
        """Every task in every state, in the order they were added; reads the whole archive."""
        return sorted(
            [*self.read_archive(), *self.live_tasks()], key=lambda task: (task.seq, task.id)
        )

    def count_landed(self) -> int:
        return len(self.landed) + len(self.archived)

    def count_states(self, state_of=lambda task: task.state) -> Counter:
        """How many tasks are in each state."""
        counts = Counter(map(state_of, self.live_tasks()))
        counts["landed"] += len(self.archived)
        # the plus leaves out states that no task is in
        return +counts

    def find_task(self, task_id: str) -> Task | None:
        for place in (self.pending, self.ready, self.landed, self.claimed()):
            if task_id in place:
                return place[task_id]
        if task_id not in self.archived:
            return None
        return next((task for task in self.read_archive() if task.id == task_id), None)

    def get_task(self, task_id: str) -> Task:
        task = self.find_task(task_id)
        if task is None:
            raise NotFound(f"there is no task {task_id}", "./farm.py tasks")
        return task

    def find_holder(self, task_id: str) -> Claim | None:
        return next(
            (claim for claim in self.claims.values() if claim.task.get("id") == task_id), None
        )

    def place_of(self, task_id: str) -> str | None:
        """Where a task lies that is to move on: pending, ready or claimed."""
        waits = (place for place in ("pending", "ready") if task_id in getattr(self, place))
        return next(waits, "claimed" if self.find_holder(task_id) else None)

    # The archive's highest numbers are kept beside it: else what comes after a landing would be
    # first.
    def next_seq(self) -> int:
        return 1 + max((self.seqs[0], *(task.seq for task in self.live_tasks())))

    def next_queue_seq(self) -> int:
        return 1 + max((self.seqs[1], *(task.queue_seq for task in self.live_tasks())))

    def last_number(self) -> int:
        """The highest number that an id has. None is used again: `done` and `archived` keep those
        of finished work."""
        live = (task.id for task in self.live_tasks())
        return max((self.archived.last_number(), *map(number_of, (*self.done, *live))))

    def note_archived(self, task: Task) -> None:
        """Its record is in the archive now."""
        self.archived.add(task.id)
        self.done.pop(task.id, None)
        self.landed.pop(task.id, None)
        self.seqs = [max(self.seqs[0], task.seq), max(self.seqs[1], task.queue_seq)]

    def drop_losers(self) -> None:
        """Keep of each task the copy that wins, remember the others in `losers`: (place, id,
        agent)."""
        # (rev, rank): on equal revs the place further on its way wins. A tie takes a hand, or a
        # copy restored from a backup; then doing work again would be worse than believing that it
        # is done.
        copies = [
            (task.rev, rank, place, task.id, "")
            for rank, place in ((0, "pending"), (2, "ready"), (3, "landed"))
            for task in getattr(self, place).values()
        ]
        copies += [
            (claim.task.get("rev", 0), 1, "claimed", claim.task["id"], claim.agent)
            for claim in self.claims.values()
            if claim.task
        ]
        # `done` outlives the landed record: a stale editor's save cannot bring finished work back.
        copies += [
            (rev, 4, "done", task_id, "")
            for task_id, rev in self.done.items()
            if task_id not in self.landed
        ]
        # A tuple is compared from the left: rev, then rank.
        best: dict[str, tuple] = {}
        for copy in copies:
            best[copy[3]] = max(best.get(copy[3], copy), copy)
        # What is in the archive is over, whatever a copy says.
        self.losers = [
            copy[2:] for copy in copies if best[copy[3]] != copy or copy[3] in self.archived
        ]
        for place, task_id, agent in self.losers:
            self.forget(place, task_id, agent)

    # Named locks outlive the task: the agent may still hold its port or its schema.
    def forget(self, place: str, task_id: str, agent: str = "") -> None:
        """Take the copy of a task at `place` out of memory; a claim without task and locks goes
        whole."""
        if place != "claimed":
            getattr(self, place).pop(task_id, None)
            return
        claim = self.claims[agent]
        if claim.locks:
            self.claims[agent] = claim._replace(task={}, fence="")
        else:
            del self.claims[agent]


# -------------------------------------------------------------------------------------------- store
# The heart: what is acknowledged is on disk, what was cut short is healed by whoever comes next.
# The guard of each step is named where it stands; tests leave them out one by one and must see work
# lost. (tests/rooms/test_store_model.py)


class Folder:
    """coordination/ itself: kept from git, and missed when somebody has taken it away."""

    def __init__(self, repo: str, disk: Disk | None = None):
        self.repo = repo
        self.folder = os.path.join(repo, "coordination")
        self.disk = disk or Disk()
        # what `recall` has read: name -> (its mark, what it was)
        self.known = {}

    def path(self, *parts: str) -> str:
        return os.path.join(self.folder, *parts)

    def mark(self, name: str) -> tuple[int, int, int] | None:
        """Changes whenever a file does; None when it is not there."""
        try:
            status = os.stat(self.path(name))
        except OSError:
            return None
        # the inode is new after each rename, so that no two moves within one tick of the clock look
        # alike
        return status.st_ino, status.st_size, status.st_mtime_ns

    def guard(self) -> None:
        """Keep git from taking the folder, and keep its history under a second name in the common
        git dir.

        `git clean -fdx` and `git stash -a` pass a repo inside the repo over, so an empty one is
        made here, and named in info/exclude, lest `git add -A` asks what it is. Where files of
        this folder are tracked (the toolkit's own repo has its README.md) git looks in all the
        same, so that each folder in it has one, too.
        """
        common = find_git_dirs(self.repo)[1]
        if not common:
            return
        for folder in ("", *(FOLDERS if os.path.exists(self.path("README.md")) else ())):
            make_guard(self.path(folder, ".git"))
        # info/exclude and not .gitignore, which is the user's file and is committed
        exclude = f"{common}/info/exclude"
        if "/coordination/" not in read_line(exclude).splitlines():
            make_parent(exclude)
            self.disk.append(exclude, b"/coordination/\n")
        self.keep_copy()

    def files_of(self, name: str, folder: str = "") -> list[str]:
        """The files of a history that is cut by size, oldest first: events-0001.jsonl ...,
        events.jsonl."""
        names = names_in(folder or self.folder, self.disk.list_folder)
        older = name.replace(".jsonl", r"-\d+\.jsonl")
        return [other for other in names if re.fullmatch(older, other)] + [name] * (name in names)

    def name_to_close(self, name: str) -> str:
        """Under what number a history's file is closed: the next one, or the last one where a
        killed process had come as far as the link."""
        older = self.files_of(name)[:-1]
        if older and os.path.samefile(self.path(name), self.path(older[-1])):
            return older[-1]
        last = int(re.search(r"\d+", older[-1])[0]) if older else 0
        return name.replace(".jsonl", f"-{last + 1:04d}.jsonl")

    def begin_anew(self, name: str, closed: str, data: bytes = b"") -> None:
        """Close a file under the name `closed`, and begin the next with `data`. Each of the two
        has a name at any time, so who appends meanwhile loses no line."""
        path = self.path(name)
        # a link, then a rename over the old name: killed in between, both names are one file
        if not os.path.exists(self.path(closed)):
            self.disk.link(path, self.path(closed))
        self.disk.write_temp(path + ".tmp", data)
        self.disk.rename(path + ".tmp", path)

    def cut_history(self) -> None:
        # not the mutex: whoever holds that appends, and would wait for itself
        with hold(self.path(".history.lock")):
            if self.disk.size(self.path(HISTORY_FILE)) < HISTORY_BYTES:  # another has just done it
                return
            self.begin_anew(HISTORY_FILE, self.name_to_close(HISTORY_FILE))
        self.keep_copy()

    # A hard link takes no room and follows each append; a copy would be as old as its last making.
    def keep_copy(self) -> None:
        """Link the history's files to their second names; what lies there of an older one that
        somebody took away is kept beside it."""
        folder = os.path.dirname(self.copy_of_history())
        if not folder:
            return
        make_folder(folder)
        linked = []
        for name in self.files_of(HISTORY_FILE):
            history, copy = self.path(name), f"{folder}/{name}"
            if os.path.exists(copy) and not os.path.samefile(history, copy):
                # under its number it has its second name already
                is_cut = any(os.path.samefile(copy, other) for other in linked)
                os.unlink(copy) if is_cut else os.replace(copy, copy + ".1")
            try:
                if not os.path.exists(copy):
                    os.link(history, copy)
                linked.append(copy)
            except OSError as error:  # a git dir on another disk
                say(f"the history has no second copy in {folder} ({os.strerror(error.errno)})")
                return

    def copy_of_history(self) -> str:
        """Where the history's second name is; empty outside of a git repo."""
        common = find_git_dirs(self.repo)[1]
        return f"{common}/farm/{HISTORY_FILE}" if common else ""

    def is_there(self) -> bool:
        return any(
            os.path.exists(self.path(name)) for name in ("events.jsonl", PENDING_FILE, READY_FILE)
        )

    # A clone has no second copy, and begins a queue of its own without a word.
    def is_lost(self) -> bool:
        """Whether the history knows of a queue that is there no more: somebody has removed
        coordination/ or all that is in it."""
        copy = self.copy_of_history()
        return bool(copy) and not self.is_there() and os.path.exists(copy)

    def check_loss(self) -> None:
        """Raises DamagedState where what was in coordination/ is gone: a new queue in its place
        would hide that. No agent's session, and no merger of a loop, ever begins one.
        """
        if self.is_lost():
            raise DamagedState(
                f"{self.folder} is gone, and {self.copy_of_history()} knows what was in it",
                f"./farm.py doctor --fix   (to begin anew instead: rm {self.copy_of_history()})",
            )
        if not self.is_there() and (given("FARM_SESSION") or given("FARM_AS_TOLD")):
            raise DamagedState(f"{self.folder} is gone", "./farm.py down, and: ./farm.py doctor")


class Reader(Folder):
    """coordination/ read back: each file is checked, and what is damaged is named."""

    def read_json(self, name: str) -> dict | None:
        """The object in a file; None when there is none. Raises DamagedState after 3 looks: an
        editor may be in mid-save."""
        path = self.path(name)
        for attempts_left in (2, 1, 0):
            try:
                text = self.disk.read(path).decode("utf-8")
                # two thousand tasks may wait there; the other files are short
                data = parse_lines(text) if name == PENDING_FILE else json.loads(text)
                if isinstance(data, dict):
                    return data
                damage = ValueError(f"expected a JSON object, found {type(data).__name__}")
            except (FileNotFoundError, NotADirectoryError):
                return None
            except (ValueError, RecursionError) as error:
                damage = error
            # under the mutex, but rarely: editors truncate and write within a few milliseconds
            if attempts_left:
                time.sleep(0.05)
        raise describe_damage(path, damage)

    # What the loop has noted it can find out again: what a hand has bent there is left out, as
    # damage would stop every verb.
    def read_loop(self) -> dict:
        """What the loop has noted, {"agents", "told", "work", "lapses", "changes"}; parts of
        another shape are empty: it writes them anew.

        Raises DamagedState when `agents` is no object.
        """
        name = LOOP_FILE if os.path.exists(self.path(LOOP_FILE)) else AGENTS_FILE
        data, agents = self.read_json(name) or {}, self.read_part(name, "agents")
        agents = items_of(agents, lambda record: isinstance(record, dict))
        told = data.get("told")
        return {
            "agents": {key: {"ends": [], **record} for key, record in agents.items()},
            "told": told if is_texts(told) else [],
            "lapses": items_of(data.get("lapses"), lambda at: isinstance(at, str)),
            "changes": items_of(
                data.get("changes"), lambda change: is_texts(change) and len(change) == 3
            ),
            "work": items_of(data.get("work"), is_number_pair),
        }

    def farm(self) -> dict:
        """farm.json, how `up` was called last: mode, reason, settings; empty before the first
        `up`."""
        return self.read_json(FARM_FILE) or {}

    def mode(self) -> str:
        """running, paused, stopping or down; empty before the first `up`."""
        return self.farm().get("mode", "")

    def read_part(self, name: str, key: str) -> dict:
        """The object under `key` of a file; empty when there is neither. Raises DamagedState
        when it is something else."""
        part = (self.read_json(name) or {}).get(key, {})
        if not isinstance(part, dict):
            raise describe_damage(self.path(name), ValueError(f"{key} must be an object"))
        return part

    def read_queue(self, name: str, lists: tuple) -> dict:
        """A queue file's document, each of `lists` checked to be a list. A file that history
        knows of may not be missing."""
        data = self.read_json(name)
        if data is None:
            self.check_loss()
            # To take a lost file for an empty one would answer "no tasks", and the next write would
            # make that true.
            if os.path.exists(self.path("events.jsonl")):
                raise DamagedState(
                    f"{self.path(name)} is gone, but events.jsonl knows of it",
                    "./farm.py doctor --fix",
                )
            data = {}
        try:
            if data.get("schema", SCHEMA) != SCHEMA:
                raise ValueError(
                    f'this farm.py knows "schema": {SCHEMA}, not {json.dumps(data["schema"])[:20]}'
                )
            done = data.get("done", {})
            if not isinstance(done, dict) or not all(type(rev) is int for rev in done.values()):
                raise ValueError("done must be an object of id: rev")
            Ids.from_json(data.get("archived", {}))
            if not is_number_pair(data.get("seqs", [0, 0])):
                raise ValueError("seqs must be two numbers")
            if type(data.get("archive_bytes", 0)) is not int:
                raise ValueError("archive_bytes must be a number")
            for key in lists:
                if not isinstance(data.setdefault(key, []), list):
                    raise ValueError(f"{key} must be a list")
        except ValueError as error:
            raise describe_damage(self.path(name), error) from None
        return data

    # A record that does not fit is damage, as leaving it out would delete it at the next write.
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
                    raise ValueError(
                        f"a task here needs a title, and is {' or '.join(STATES_OF[place])}, not "
                        f"{task.state[:20]!r}"
                    )
                if task.id and not is_name(task.id):
                    raise ValueError(f"its id {task.id[:60]!r} is not a name")
                tasks.append(task)
            except ValueError as error:
                raise describe_damage(
                    self.path(name), ValueError(f"record {number}: {error}")
                ) from None
        return tasks

    def lock_files(self) -> list[str]:
        """Names of the lock files, relative to coordination/."""
        return [
            f"{LOCK_FOLDER}/{name}"
            for name in names_in(self.path(LOCK_FOLDER), self.disk.list_folder)
            # a dot in front: the temp file of a writer that was killed
            if name.endswith(".lock") and not name.startswith(".")
        ]

    def read_claim(self, name: str) -> Claim | None:
        """One lock file; None when it has gone meanwhile."""
        data = self.read_json(name)
        if data is None:
            return None
        try:
            claim = Claim.from_json(data)
            claim.get_owner()
            # a copy under another name would be a second lock of one agent
            if claim.agent + ".lock" != os.path.basename(name) or (
                claim.task and not is_name(claim.get_task().id)
            ):
                raise ValueError("its agent is not the file's name, or its task has no proper id")
        except ValueError as error:
            raise describe_damage(self.path(name), error) from None
        return claim

    def find_claim(self, agent: str) -> Claim | None:
        """What one agent holds, by one read."""
        return self.read_claim(f"{LOCK_FOLDER}/{agent}.lock")

    # Of a thousand lock files a move changes one. A host's connection makes many moves, the loop
    # looks each second: they read what is as it was once.
    def recall(self, name: str, read):
        """`read(name)`, which is not done again as long as the file is the same one."""
        mark = self.mark(name)
        if self.known.get(name, ((),))[0] == mark:
            return self.known[name][1]
        what = read(name)
        # as git does with its index: within one tick of the clock an inode may come back with
        # other content, so what is so young is read again
        if mark and time.time_ns() - mark[2] > 10**9:
            self.known[name] = mark, what
        return what

    def read_claims(self) -> dict[str, Claim]:
        """Every lock file, by agent. A damaged one stops all claims: what it holds is not known."""
        names = self.lock_files()
        claims = [self.recall(name, self.read_claim) for name in names]
        # each with-lock has a name of its own: a loop of months would remember them all
        for gone in {*self.known} - {*names}:
            if gone.startswith(LOCK_FOLDER):
                self.known.pop(gone, None)
        return {claim.agent: claim for claim in claims if claim is not None}

    def read_pending(self, name: str) -> tuple[dict, list[Task], dict]:
        """The queue file, its tasks, and id -> (task, its line) of those that have one."""
        data = self.read_queue(name, ("tasks",))
        tasks = self.read_tasks(name, "pending", data["tasks"])
        texts = getattr(data["tasks"], "texts", ())  # of Lines
        return data, tasks, {pair[0].id: pair for pair in zip(tasks, texts, strict=False)}

    def read_ready(self, name: str) -> tuple[dict, list[Task], list[Task]]:
        """The queue file, and the tasks of its two lists."""
        data = self.read_queue(name, ("ready", "landed"))
        return data, *(self.read_tasks(name, key, data[key]) for key in ("ready", "landed"))

    def load(self) -> State:
        """What is on disk, losing copies dropped in memory. Consistent only under the mutex.
        Raises DamagedState."""
        state = State()
        pending, waiting, state.lines = self.recall(PENDING_FILE, self.read_pending)
        ready, queued, landed = self.recall(READY_FILE, self.read_ready)
        state.done = dict(ready.get("done", {}))
        self.load_archive(state, ready)
        state.pending = {task.id: task for task in waiting if task.id}
        state.ready = {task.id: task for task in queued}
        state.landed = {task.id: task for task in landed}
        state.claims = self.read_claims()
        for name, data in ((PENDING_FILE, pending), (READY_FILE, ready)):
            state.heads[name] = {
                key: value
                for key, value in data.items()
                if key not in ("schema", "tasks", *READY_KEYS)
            }
        # Written by hand as {"title": ...}. Last: a new id has to be above those of all files, the
        # archive and the locks among them.
        for task in filter(lambda task: not task.id, waiting):
            task_id = f"t-{state.last_number() + 1:04d}"
            state.pending[task_id] = task._replace(id=task_id, rev=1, seq=state.next_seq())
        state.drop_losers()
        return state

    # The archive is not read here: after a year it has ten thousand records, and each verb comes
    # by. The queue file knows their ids as ranges, and the length up to which they are counted.
    def load_archive(self, state: State, ready: dict) -> None:
        """What the queue file knows of the archive. Where that is longer than it knows (a killed
        writer's, or the file was brought back from a backup), its end is read, too: what is
        archived stays done."""
        state.archived = Ids.from_json(ready.get("archived", {}))
        state.archive_bytes = ready.get("archive_bytes", 0)
        state.seqs = [*ready.get("seqs", (0, 0))]
        state.read_archive = lambda: self.read_archive(state.archived)
        try:
            size = self.disk.size(self.path(ARCHIVE_FILE))
        except OSError:
            return
        if size > state.archive_bytes:
            for task in self.read_archive(since=state.archive_bytes):
                state.note_archived(task)
            state.archive_bytes, state.is_behind = size, True

    def read_archive(self, ids: Ids | None = None, since: int = 0) -> list[Task]:
        """The archive's records from the byte `since` on, each once; ids: only these. Lines that
        a killed writer tore are passed over."""
        try:
            lines = self.disk.read(self.path(ARCHIVE_FILE), since).split(b"\n")
        except FileNotFoundError:
            return []
        tasks = {}
        for line in filter(None, lines):
            try:
                task = Task.from_json(json.loads(line.decode("utf-8")))
            except (ValueError, RecursionError):
                continue
            if is_name(task.id) and (ids is None or task.id in ids):
                tasks[task.id] = task
        return list(tasks.values())

    def snapshot(self) -> State:
        """A consistent view without the mutex, for those who only look: read again while files
        change underneath.

        A move writes its destination first, so even a torn view shows each task at least once,
        and `load` drops the loser.
        """
        # on a busy farm the fifth look may be torn, too: better than an answer that never comes
        for _ in range(5):
            before = self.signature()
            state = self.load()
            if before == self.signature():
                break
        return state

    def signature(self) -> tuple:
        """Changes whenever a move was made; costs a few stat calls."""
        # the folder's own time changes whenever a lock file is linked, renamed or removed
        return tuple(map(self.mark, (PENDING_FILE, READY_FILE, LOCK_FOLDER, HISTORY_FILE)))


class Store(Reader):
    """coordination/ on disk: durable writes under one mutex. Nothing else writes there what a
    task is."""

    def lay_folders(self) -> None:
        for name in FOLDERS:
            make_folder(self.path(name))
        ignore = self.path(".gitignore")
        if not os.path.exists(ignore):
            self.disk.write_temp(ignore, b"*\n")

    def make_folders(self) -> None:
        """What is missing below coordination/, durable before the first event. Only under the
        mutex.

        Queue files are made only where there is no history that knows of them.
        """
        if os.path.exists(self.path("events.jsonl")):  # made last, so it stands for all the others
            return
        self.check_loss()
        self.lay_folders()
        # the folder's own name is an entry of the repo's folder
        for folder in (self.folder, self.repo):
            self.disk.fsync_folder(folder)
        hide_bytecode()
        for name in (PENDING_FILE, READY_FILE):
            if not os.path.exists(self.path(name)):
                self.write_queue(name, State())
        # before the event that says all is made; a kill until then has the next verb do it again
        note_home(self.repo)
        self.append_event("created")
        self.guard()

    def write_durably(
        self, name: str, data: bytes, *, exclusive: bool = False, sync: bool = True
    ) -> None:
        """Temp file, fsync, rename (exclusive: link, which never replaces), fsync of the folder
        (sync: at once).

        Raises OSError, the file being as it was; NotDurable when only the last step failed, and
        the file is there.
        """
        path = self.path(name)
        folder, base = os.path.split(path)
        # in the same folder: a rename works within one file system only
        temp = f"{folder}/.{base}.tmp"
        try:
            self.disk.write_temp(temp, data)
            if exclusive:
                self.disk.link(temp, path)
            else:
                self.disk.rename(temp, path)
        except OSError as error:
            self.discard(temp)
            # a write that fails (a full disk) does not know its file's name; the message should
            error.filename = error.filename or path
            raise
        if sync:
            self.sync_folder(folder)
        if exclusive:  # a link leaves its temp file's name; gone or not, it is never read
            self.discard(temp)

    def write_json(self, name: str, data: dict, **how: bool) -> None:
        """One JSON object in a file, durably; how: as for `write_durably`."""
        self.write_durably(name, line_bytes(data), **how)

    # `is`, not `==`: a task that no move has replaced is the very object that was read with its
    # line.
    def write_queue(self, name: str, state: State, *, sync: bool = True) -> None:
        """One of the two queue files, durably, as `state` has it."""
        head = {"schema": SCHEMA, **state.heads.get(name, {})}
        if name == PENDING_FILE:
            unread = (None, "")
            tasks = [
                line if known is task else task.to_json()
                for task in state.pending.values()
                for known, line in (state.lines.get(task.id, unread),)
            ]
            lists = {"tasks": tasks}
        else:
            head["done"] = state.done
            if state.archive_bytes:
                head.update(
                    archived=state.archived.to_json(),
                    archive_bytes=state.archive_bytes,
                    seqs=state.seqs,
                )
            lists = {
                key: [task.to_json() for task in getattr(state, key).values()]
                for key in ("ready", "landed")
            }
        self.write_durably(name, dump_records(head, lists), sync=sync)

    def sync_folder(self, folder: str) -> None:
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

    # The whole record in each event: mending rebuilds a lost queue from the last one of each task.
    def append_event(self, event: str, task: Task | None = None, **details) -> None:
        """One line of history with the task's full record. Not fsynced, and no reason to fail:
        the queues are the truth."""
        record = {"at": utc_now(), "event": event, **details}
        if task is not None:
            record["task"] = task.to_json()
        try:
            if self.disk.append(self.path(HISTORY_FILE), line_bytes(record)) > HISTORY_BYTES:
                self.cut_history()
        except OSError as error:
            say(
                f"{self.path('events.jsonl')} could not be written ({os.strerror(error.errno)}); "
                f"the move itself is made"
            )

    def ensure_folders(self) -> None:
        """Make what is missing below coordination/, also what somebody has removed: verbs do not
        look for that, but `up` does, and each merger.
        """
        with self.transaction():
            self.lay_folders()
            self.guard()

    def transaction(self, before_load=lambda: None) -> Transaction:
        """`with store.transaction() as tx:` holds the mutex; inside, state is read and healed,
        and moves are made."""
        return Transaction(self, before_load)


def take_mutex(path: str) -> int:
    """The descriptor of the mutex, held. Where somebody has removed the file while we waited, it
    is opened again: others lock the new one."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            make_parent(path)
        os.close(descriptor)


class Transaction:
    """One hold of the mutex: `state`, and the moves. Every move is durable when its method
    returns."""

    def __init__(self, store: Store, before_load):
        self.store, self.before_load = store, before_load

    def __enter__(self) -> Transaction:
        store = self.store
        # else a repo's folder that somebody has just moved away would be made anew
        if not os.path.isdir(store.repo):
            raise NotFound(f"{store.repo} is not there")
        make_folder(store.folder)
        # Never a data file: after a rename a second process would hold "the lock" on the new inode.
        # And in the kernel's queue, not by polling: of 50 processes each then comes to it.
        self.mutex = take_mutex(store.path(".lock"))
        try:
            store.make_folders()
            self.before_load()
            self.state = store.load()
            # What we are about to answer or to heal by may be in the page cache only, where the
            # writer was killed before its fsync: to drop the losing copy then and lose the power
            # would lose the task.
            if self.state.losers or os.fstat(self.mutex).st_size:
                self.sync_folders()
            self.heal()
        # Ctrl-C as well: this process may go on, and would hold the mutex
        except BaseException:
            os.close(self.mutex)
            raise
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            # after an error the mark stays: a move may have come as far as the page cache
            if kind is None and os.fstat(self.mutex).st_size:
                os.ftruncate(self.mutex, 0)
        except OSError:
            pass  # the mark stays, and the next holder syncs the folders once more
        finally:
            os.close(self.mutex)

    def mark_dirty(self) -> None:
        """Leave a mark, one byte in the mutex file, while moves are made: who finds it knows
        that the last holder was killed.

        It is not fsynced. After a power cut there is no page cache left to distrust, so the mark
        may go with it.
        """
        os.pwrite(self.mutex, b"1", 0)

    def sync_folders(self) -> None:
        """Make durable what a killed writer may have left in the cache only, before anyone
        answers or heals because of it."""
        for name in ("task_queue", "merge_queue", LOCK_FOLDER):
            self.store.disk.fsync_folder(self.store.path(name))

    def heal(self) -> None:
        """Drop outranked copies for good."""
        places = {place for place, _, _ in self.state.losers}
        if len(self.state.landed) > LANDED_MAX:  # of a farm of the version before
            say(f"{len(self.state.landed) - LANDED_KEPT} landed tasks move to {ARCHIVE_FILE}")
            self.archive()
            places.add("ready")
        elif self.state.is_behind:  # what was read there may be in the page cache only
            self.store.disk.append(self.store.path(ARCHIVE_FILE), b"", durably=True)
            places.add("ready")
        if "pending" in places:
            self.write("pending")
        if places & {"ready", "landed"}:
            self.write("ready")
        if "claimed" in places:
            self.prune_lock_files()
        self.state.losers = []

    def archive(self, tasks: list[Task] | None = None) -> None:
        """Append records to the archive, durably, the oldest of the landed ones; the queue file
        that leaves them out is for the caller to write. Killed between the two, the archive's
        longer end is read, and outranks."""
        if tasks is None:
            tasks = sorted(self.state.landed.values(), key=lambda task: task.landed_at)
            tasks = tasks[: max(0, len(tasks) - LANDED_KEPT)]
        data = b"".join(line_bytes(task.to_json()) for task in tasks)
        store = self.store
        self.mark_dirty()
        path = store.path(ARCHIVE_FILE)
        self.state.archive_bytes = store.disk.append(path, data, durably=True)
        # the archive's first append has made its name
        store.sync_folder(store.path("merge_queue"))
        for task in tasks:
            self.state.note_archived(task)

    def prune_lock_files(self) -> None:
        """Make the lock folder what `state.claims` says, where healing took a task away from a
        claim."""
        for name in self.store.lock_files():
            agent = os.path.basename(name).removesuffix(".lock")
            claim = self.state.claims.get(agent)
            if claim is None:
                self.remove_lock(agent)
            elif not claim.task:
                self.write_lock(claim)

    def write(self, place: str, *, sync: bool = True) -> None:
        """Make the queue file with the tasks of `place` durable as `state` has it."""
        self.mark_dirty()
        name = PENDING_FILE if place == "pending" else READY_FILE
        self.store.write_queue(name, self.state, sync=sync)

    def write_lock(self, claim: Claim, *, sync: bool = True) -> None:
        """A claim's lock file: linked into place when new, renamed over our own when there is
        one."""
        self.mark_dirty()
        # By link, a file that somebody has put there meanwhile is an error and not replaced: the
        # lock would have two holders.
        is_new = claim.agent not in self.state.claims
        name = f"{LOCK_FOLDER}/{claim.agent}.lock"
        self.store.write_json(name, claim.to_json(), exclusive=is_new, sync=sync)
        self.state.claims[claim.agent] = claim

    def remove_lock(self, agent: str, *, sync: bool = True) -> None:
        self.mark_dirty()
        self.store.disk.unlink(self.store.path(f"{LOCK_FOLDER}/{agent}.lock"))
        if sync:
            self.store.sync_folder(self.store.path(LOCK_FOLDER))
        self.state.claims.pop(agent, None)

    def drop_source(self, place: str, task_id: str) -> None:
        """Remove the copy that a durable new one outranks.

        Its folder is not fsynced: if a power cut brings the old copy back, it loses. Where the
        removal fails the move is made all the same, and the next transaction heals.
        """
        claim = self.state.find_holder(task_id) if place == "claimed" else None
        try:
            if claim is None:
                self.state.forget(place, task_id)
                self.write(place, sync=False)
            elif claim.locks:
                self.write_lock(claim._replace(task={}, fence=""))
            else:
                self.remove_lock(claim.agent, sync=False)
        except OSError as error:
            where = error.filename or self.store.folder
            say(
                f"{where}: {os.strerror(error.errno)}; {task_id} has moved, its old copy is "
                f"dropped later"
            )

    def move(self, task: Task, place: str, event: str, **details) -> Task:
        """Make `task` (rev + 1) durable at `place`, "pending", "ready" or "landed", then remove
        it from where it was."""
        state = self.state
        source = state.place_of(task.id)
        if place == "landed" and len(state.landed) >= LANDED_MAX:  # before this one is among them
            self.archive()
        task = task._replace(rev=task.rev + 1)
        getattr(state, place)[task.id] = task
        if place == "landed":  # ready and landed share a file: one rename is the whole move
            state.done[task.id] = task.rev
            state.ready.pop(task.id, None)
            source = None if source == "ready" else source
        # the commit point: from here on the new copy is the task
        self.write(place)
        # After it, so that history never tells of a move that was not made; one that a kill leaves
        # out is not missed.
        self.store.append_event(event, task, **details)
        if source and source != place:
            self.drop_source(source, task.id)
        return task

    def claim(self, task: Task, claim: Claim) -> Claim:
        """Make `claim` on `task` (rev + 1, which is its fence) durable, then take the task off
        the pending list."""
        # rev only ever rises: no two claims share a fence
        task = task._replace(
            rev=task.rev + 1,
            state="claimed",
            agent=claim.agent,
            ended_by="",
            fence=f"{task.id}.{task.rev + 1}",
        )
        claim = claim._replace(task=task.to_json(), fence=task.fence, claimed_at=utc_now())
        self.write_lock(claim)
        self.store.append_event("claimed", task, agent=claim.agent, owner=claim.owner)
        self.drop_source("pending", task.id)
        return claim


# what all parts of a merger, or of a farm, are about: its state, what it was told, and the branch
# that work lands on
Site = namedtuple("Site", "store settings target")

INTENT_FILE = "merge_queue/landing.json"
NOW_FILE = "merge_queue/now.json"


def read_events(store: Store, containing: bytes = b"", files: int = 0):
    """Each event of the history, oldest first; None for a line that is none: a killed writer
    tore it, or a hand has edited it. containing: only the lines with these bytes are parsed;
    files: only the last so many, all when 0."""
    lines = []
    for name in store.files_of(HISTORY_FILE)[-files:]:
        try:
            with open(store.path(name), "rb") as file:
                lines += [line for line in file if containing in line and line.strip()]
        except FileNotFoundError:
            continue
    for line in lines:
        try:
            event = json.loads(line.decode("utf-8"))
            is_event = isinstance(event["event"], str) and epoch(event["at"]) > 0
        except (ValueError, KeyError, TypeError, RecursionError):
            is_event = False
        yield event if is_event else None


def find_open_gates(store: Store) -> list[dict]:
    """The gate-started events that have no gate-ended: what a killed merger's gates were."""
    begun: dict[tuple, list] = defaultdict(list)
    # two files: one may just have been begun
    for event in filter(None, read_events(store, b'"event": "gate-', files=2)):
        place = begun[str(event.get("slot")), str(event.get("tree"))]
        if event["event"] == "gate-started":
            place.append(event)
        elif place:
            place.pop()
    return [
        event
        for place in begun.values()
        for event in place
        if isinstance(event.get("ids"), list) and is_texts([event.get("tree")])
    ]


def wait_for_change(store: Store, before: tuple, deadline: float) -> None:
    """Until a move was made, or a second is over (backoffs, leases and owners end without one),
    or the deadline is reached."""
    wait_for(lambda: store.signature() != before, min(deadline - CLOCK.monotonic(), 1), 0.05)


# ------------------------------------------------------------------------------------------ mending
# What can be read of a damaged farm, and how it is rebuilt from its history: nothing is thrown
# away. (tests/rooms/test_mending.py, tests/cases/test_folder_gone.py)


# Each file by itself, so that one damaged file hides nothing of the others, and doctor names all
# of them at once.
def load_parts(store: Store) -> tuple[State, dict[str, str]]:
    """What can be read of a farm, each file by itself, and the files that cannot: name -> why. A
    queue file that history knows of and that is gone counts."""
    if store.is_lost():
        return State(), {"": f"is gone, and {store.copy_of_history()} knows what was in it"}
    state, damaged = State(), {}

    def attempt_to(read, name: str, *words: str) -> None:
        try:
            read(name, *words)
        except DamagedState as error:
            damaged[name] = str(error).removeprefix(store.path(name)).lstrip(":, ")

    def read_list(name: str, place: str, key: str) -> None:
        data = store.read_queue(name, (key,))
        if key == "landed":
            store.load_archive(state, data)
        tasks = store.read_tasks(name, place, data[key])
        getattr(state, place).update((task.id, task) for task in tasks)

    def read_claim(name: str) -> None:
        if claim := store.read_claim(name):
            state.claims[claim.agent] = claim

    attempt_to(read_list, PENDING_FILE, "pending", "tasks")
    attempt_to(read_list, READY_FILE, "ready", "ready")
    attempt_to(read_list, READY_FILE, "landed", "landed")
    for name in store.lock_files():
        attempt_to(read_claim, name)
    for name in (FARM_FILE, LOOP_FILE, NOW_FILE, INTENT_FILE):
        attempt_to(store.read_json, name)
    return state, damaged


# The whole first: files that are read one by one, while moves go on, need not fit together.
def load_anyway(store: Store) -> tuple[State, list[str]]:
    """The state, and what is damaged in words: then it holds what can be read."""
    try:
        return store.snapshot(), []
    except DamagedState:
        state, damaged = load_parts(store)
        return state, [f"{store.path(name)}: {why}" for name, why in damaged.items()]


def find_damaged(store: Store) -> dict[str, str]:
    """State files that cannot be read: name -> why."""
    return load_parts(store)[1]


GONE_HINT = (
    "bring coordination/ back from a backup; or ./farm.py up begins with an empty queue, "
    "and keeps that work"
)


# Refs are looked for in git's files: this is for status, which answers without git.
def find_traces(store: Store, worktrees: str) -> str:
    """That coordination/ is not there, and what a farm has left, in words; empty where it has left
    nothing."""
    if store.is_there():
        return ""
    common = find_git_dirs(store.repo)[1]
    packed = read_line(f"{common}/packed-refs")
    agents = [name for name in names_in(worktrees) if name.endswith("-worktree")]
    traces = [f"{number(len(agents), 'worktree')} in {worktrees}"] if agents else []
    for folder, words in (
        ("refs/farm", "pinned work below refs/farm"),
        ("refs/heads/farm", "branches farm/..."),
    ):
        if f" {folder}/" in packed or any(files for _, _, files in os.walk(f"{common}/{folder}")):
            traces.append(words)
    told = f"{store.folder} is not there, but a farm has left {', '.join(traces)}"
    return told if traces else ""


def find_forgotten(store: Store, state: State) -> list[tuple[Task, dict]]:
    """(task, event) of what the history knows with a higher rev than any file: the last record
    of each."""
    last = {}
    for event in filter(None, read_events(store)):
        try:
            task = Task.from_json(event["task"])
        except (KeyError, ValueError):
            continue
        if task.id not in last or task.rev >= last[task.id][0].rev:
            last[task.id] = (task, event)
    known = {task.id: task.rev for task in state.all_tasks()}
    return [
        (task, event)
        for task, event in last.values()
        if task.rev > max(known.get(task.id, -1), state.done.get(task.id, -1))
        and (task.id not in state.archived or task.state == "landed")
    ]


# Damaged files are set aside before the transaction loads: it would stop at them.
def mend(store: Store) -> list[str]:
    """Set damaged files aside (NAME.damaged-UTC, nothing is thrown away) and rebuild what they
    held from events.jsonl."""
    done = bring_history_back(store)
    if not os.path.isdir(store.folder):
        return []
    with store.transaction(before_load=lambda: done.extend(set_aside(store))) as tx:
        for task, event in find_forgotten(store, tx.state):
            if task.id in tx.state.archived:  # the archive's own record is gone
                tx.archive([task])
            else:
                restore_task(tx, task, event)
            done.append(f"{task.id} is {task.state} again, from events.jsonl")
        # restore_task and archive change the memory: both files once, at the end
        tx.write("pending")
        tx.write("ready")
    return done


def bring_history_back(store: Store) -> list[str]:
    """Where coordination/ is gone, its folders and its history from the second copy; then the
    queues can be rebuilt."""
    if not store.is_lost():
        return []
    import shutil

    store.lay_folders()
    folder = os.path.dirname(store.copy_of_history())
    for name in store.files_of(HISTORY_FILE, folder):
        try:
            # linked, so that the second copy goes on following
            os.link(f"{folder}/{name}", store.path(name))
        except OSError:  # a git dir on another disk
            shutil.copyfile(f"{folder}/{name}", store.path(name))
    store.guard()
    return ["events.jsonl is back, from the copy in the git dir"]


def set_aside(store: Store) -> list[str]:
    """Rename damaged files and put empty ones in the place of the queues; under the mutex."""
    stamp, done = utc_now().replace(":", ""), []
    for name in find_damaged(store):
        if os.path.exists(store.path(name)):
            os.rename(store.path(name), f"{store.path(name)}.damaged-{stamp}")
            done.append(f"{name} is kept as {name}.damaged-{stamp}")
        # an empty one in its place, as a queue file that is missing is damage, too
        if name in (PENDING_FILE, READY_FILE):
            store.write_queue(name, State())
            done.append(f"{name} is made anew")
    return done


def restore_task(tx: Transaction, task: Task, event: dict) -> None:
    """Put a task back where its last event left it, in memory or, for a claim, with its owner's
    lock file."""
    state = tx.state
    for place in ("pending", "ready", "landed"):
        state.forget(place, task.id)
    if task.state in ("ready", "landed"):
        getattr(state, task.state)[task.id] = task
    elif task.state == "claimed" and task.agent not in state.claims and event.get("owner"):
        tx.write_lock(
            Claim(
                agent=task.agent,
                fence=task.fence,
                claimed_at=event.get("at", ""),
                owner=event["owner"],
                task=task.to_json(),
            )
        )
    else:
        # also of a claim whose agent holds something else now, or whose owner the event does not
        # name
        state.pending[task.id] = task._replace(
            state="pending" if task.state == "claimed" else task.state
        )
    if task.state == "landed":
        state.done[task.id] = task.rev


# -------------------------------------------------------------------------------------------- locks
# Locks are files that name their owner. Nobody breaks one by its age: an owner is asked for, and
# only a dead one loses it. (tests/rooms/test_locks.py)


# Each pair of places is looked at once, and there is no recursion: a hundred `**` in a path, or a
# thousand folders, cost as many steps as there are pairs.
def find_meetings(a, b, star: str, meet) -> set[tuple[int, int]]:
    """The places in two patterns to which one common beginning leads. `star` stands for any number
    of elements, of which meet(x, y) says whether one text can match both."""
    reached, frontier = {(0, 0)}, [(0, 0)]
    for i, j in frontier:  # it grows while it is gone through
        left, right = a[i] if i < len(a) else "", b[j] if j < len(b) else ""
        steps = [(i + 1, j)] * (left == star) + [(i, j + 1)] * (right == star)
        if left and right and (star in (left, right) or meet(left, right)):
            steps.append((i + (left != star), j + (right != star)))
        frontier += [step for step in steps if step not in reached]
        reached.update(steps)
    return reached


# A class such as [ab] counts as any one character: excluding too much makes an agent wait,
# excluding too little lets two of them edit one file.
def segments_overlap(a: str, b: str) -> bool:
    """Whether one file name can match both patterns (`*`, `?`, `[...]` taken as any one
    character)."""
    a, b = (re.sub(r"\[[^]]+\]", "?", pattern) for pattern in (a, b))
    return (len(a), len(b)) in find_meetings(a, b, "*", lambda x, y: x == y or "?" in (x, y))


def globs_overlap(a: str, b: str) -> bool:
    """Whether one path can match both globs; `**` stands for any number of folders, a name
    covers all below it."""
    left, right = ([part for part in glob.split("/") if part not in ("", ".")] for glob in (a, b))
    # a lock on a folder holds what is in it: the end of either is enough
    return any(
        i == len(left) or j == len(right)
        for i, j in find_meetings(left, right, "**", segments_overlap)
    )


def names_exclude(a: str, b: str) -> bool:
    """Whether two lock names cannot be held by two agents at once."""
    if a.startswith("path:") and b.startswith("path:"):
        return globs_overlap(a[5:], b[5:])
    return a == b


class LockRegistry:
    """Who holds what, and who of them is dead. Every method needs an open Transaction, and its
    changes are durable at its end.

    An agent has one lock file, one owner, at most one task and any number of named locks; paths
    of its task count as names.
    """

    def __init__(self, tx: Transaction):
        self.tx = tx

    def find_conflict(self, agent: str, names: list) -> tuple[Claim, str] | None:
        """Another agent's claim that excludes one of `names`, with that name."""
        # Agents times names: a farm has some hundred of each, and an index would have to know
        # globs.
        for claim in self.tx.state.claims.values():
            for held in claim.names() if claim.agent != agent else ():
                for name in names:
                    if names_exclude(held, name):
                        return claim, held
        return None

    def get_own(self, agent: str, owner: Owner) -> Claim:
        """The agent's claim as it is, or an empty one. Raises Refused when another live owner
        has the agent's lock file."""
        claim = self.tx.state.claims.get(agent)
        if claim is None:
            return Claim(agent=agent, owner=owner.to_json())
        # The dead were expired before: whoever still has the file lives, or cannot be seen from
        # here.
        holder = claim.get_owner()
        # not the host's name, which changes with the network
        if (holder.pid, holder.start, holder.boot) != (owner.pid, owner.start, owner.boot):
            raise Refused(describe_holder(claim), "./farm.py locks")
        return claim

    # All or none: two agents with a half each would wait for each other.
    def acquire(self, agent: str, names: list, owner: Owner) -> Claim:
        """Hold all of `names` or none. Raises Refused that says who holds what is in the way."""
        claim = self.get_own(agent, owner)
        conflict = self.find_conflict(agent, names)
        if conflict:
            raise Refused(
                f"{conflict[1]} is held: {describe_holder(conflict[0])}", "./farm.py locks"
            )
        claim = claim._replace(
            locks=sorted({*claim.locks, *names}), claimed_at=claim.claimed_at or utc_now()
        )
        self.tx.write_lock(claim)
        return claim

    def release(self, agent: str, names: list) -> None:
        """Give up `names`; those that are not held are passed over."""
        claim = self.tx.state.claims.get(agent)
        if claim is None or not set(claim.locks) & set(names):
            return
        claim = claim._replace(locks=[name for name in claim.locks if name not in names])
        self.tx.write_lock(claim) if claim.locks or claim.task else self.tx.remove_lock(agent)


def describe_holder(claim: Claim) -> str:
    """Who holds a lock file, in words."""
    what = f"task {claim.task['id']}" if claim.task else ", ".join(claim.locks) or "its lock"
    owner = claim.get_owner()
    who = f"on {owner.host}" if owner.is_on_host else f"pid {owner.pid}"
    return f"{what} is held by {claim.agent} ({who}) since {claim.claimed_at}"


def is_orphan(claim: Claim) -> bool:
    """Whether its owner is dead, as far as that can be seen."""
    return find_liveness(claim.get_owner()) is False


def is_unseen(claim: Claim) -> bool:
    """Whether nothing but a lease can tell if this claim's owner lives."""
    return find_liveness(claim.get_owner()) is None


# Not on disk: a watcher that has just come has seen nothing, and waits for a whole lease. Two wall
# clocks may be hours apart, and a laptop may have slept.
class LeaseWatch:
    """Leases of owners that cannot be seen, counted on this process's monotonic clock from the
    first look at each renewal."""

    def __init__(self, settings: Settings):
        self.settings = settings
        # agent -> (its renewal, when that was seen first)
        self.first_seen = {}

    def seconds_left(self, claim: Claim) -> float:
        """Until this claim's lease is over; each renewal starts it anew."""
        # Two wall clocks are never compared: they may be hours apart.
        renewal = (claim.fence, claim.claimed_at, claim.renewals)
        if self.first_seen.get(claim.agent, ((), 0.0))[0] != renewal:
            self.first_seen[claim.agent] = (renewal, CLOCK.monotonic())
        is_on_host, settings = claim.get_owner().is_on_host, self.settings
        lease = settings.host_lease_seconds if is_on_host else settings.lease_seconds
        return self.first_seen[claim.agent][1] + lease - CLOCK.monotonic()

    def is_lapsed(self, claim: Claim) -> bool:
        return self.seconds_left(claim) <= 0


# --------------------------------------------------------------------------------------- task queue
# Each move checks its fence first. A fence that was spent on just this move is answered again,
# because an agent that was killed between the move and its answer will ask again, and must not be
# told that it failed. (tests/rooms/test_claims.py, tests/rooms/test_fences.py)

# after that a person will have looked, or the cause is not one that waiting mends
RETRY_SECONDS_MAX = 300
GIVE_BACK_EVENTS = {
    "fail": "attempt-failed",
    "release": "released",
    "died": "owner-died",
    "return": "returned",
}

# for so long an interrupted task is kept for the agent that knows its context
RESUME_SECONDS = 120.0
# from this lapse of one task on, each counts as an attempt
LAPSES_MAX = 3


# Another agent would begin without the context, so the task waits a little for the one that has
# it.
def kept_conversation(task: Task, now: float, told: str = "") -> dict:
    """The task's conversation, kept for its agent for a while; empty when there is none. told: its
    id, where the CLI has said it only at the end."""
    kept = {**task.conversation, "agent": task.agent, "id": told} if told else task.conversation
    return {**kept, "until": utc(now + RESUME_SECONDS)} if kept.get("id") else {}


# No agent: that is the loop, which asks for all that anybody may claim.
def is_kept_for_another(task: Task, agent: str, now: float) -> bool:
    kept, longest = task.conversation, RETRY_SECONDS_MAX + RESUME_SECONDS
    is_kept = is_ahead(kept.get("until", ""), now, longest)
    return bool(agent and kept.get("agent") != agent and is_kept)


def is_backing_off(task: Task, now: float) -> bool:
    return is_ahead(task.not_before, now, RETRY_SECONDS_MAX)


def shortened(draft: Task) -> Task:
    """A draft whose title can be shown and passed on; a longer one goes into the prompt whole."""
    if len(draft.title) <= TITLE_LENGTH:
        return draft
    whole = f"{draft.title}\n\n{draft.prompt}".strip()
    return draft._replace(title=one_line(draft.title, TITLE_LENGTH), prompt=whole)


# What needs git, a pin or a rescue say, the caller has done before: no git runs under the mutex.
class TaskQueue:
    """The moves of a task between pending, claimed and ready. Every method needs an open
    Transaction."""

    def __init__(self, tx: Transaction):
        self.tx = tx
        self.state = tx.state

    def add(self, drafts: list[Task], max_attempts: int) -> list[tuple[Task, bool]]:
        """Add tasks, all or none; returns (task, whether it is new). A `source` that is known
        already is not added again.

        Raises UsageError for an id that is taken or an `after` that names nothing.
        """
        state, now = self.state, utc_now()
        # landed ones, too: done is not to do
        known = state.all_tasks() if any(draft.source for draft in drafts) else ()
        sources = {task.source: task for task in known if task.source}
        answers, seq, number = [], state.next_seq(), state.last_number()
        for draft in drafts:
            if draft.source in sources:
                answers.append((sources[draft.source], False))
                continue
            if draft.id and (state.is_done(draft.id) or state.find_task(draft.id)):
                raise UsageError(f"there is a task {draft.id} already", "./farm.py tasks")
            task = shortened(draft)._replace(
                id=draft.id or f"t-{number + 1:04d}",
                seq=seq + len(answers),
                added_at=now,
                max_attempts=draft.max_attempts or max_attempts,
                rev=1,
            )
            # counted along: to look through all ids for each would be quadratic
            number = max(number, number_of(task.id))
            state.pending[task.id] = task
            answers.append((task, True))
        new = self.resolve_after([task for task, is_new in answers if is_new], answers)
        if new:
            self.tx.write("pending")
        for task in new:
            self.tx.store.append_event("added", task)
        return [(state.pending.get(task.id, task), is_new) for task, is_new in answers]

    def resolve_after(self, new: list[Task], answers: list) -> list[Task]:
        """`after` entries as ids; NUL and a number in a draft mean the file's item with that
        index."""
        resolved = []
        for task in new:
            after = [
                answers[int(name[1:])][0].id if name.startswith("\0") else name
                for name in task.after
            ]
            resolved.append(task._replace(after=after))
            self.state.pending[task.id] = resolved[-1]
        for task in resolved:
            check_after(task, self.state)
        return resolved

    def claimable(self, agent: str, presets: tuple | None = None) -> list[Task]:
        """What `agent` may claim now, best first: its own that was interrupted, priority, then
        first come. presets: those whose tasks it takes, None for all."""
        registry, now = LockRegistry(self.tx), CLOCK.now()
        tasks = [
            task
            for task in self.state.pending.values()
            if task.state == "pending"
            and not is_backing_off(task, now)
            and not (HUB in task.extra and task.ended_by)  # which goes back to the hub
            and not self.state.open_before(task)
            and not is_kept_for_another(task, agent, now)
            and (presets is None or task.preset in ("", *presets))
            and not (
                task.paths
                and registry.find_conflict(agent, ["path:" + glob for glob in task.paths])
            )
        ]
        return sorted(
            tasks,
            key=lambda task: (task.conversation.get("agent") != agent, -task.priority, task.seq),
        )

    def claim(
        self,
        agent: str,
        owner: Owner,
        task_id: str = "",
        conversation: dict | None = None,
        presets: tuple | None = None,
    ) -> Claim:
        """Lease the best task, or `task_id`, to `agent`; the same claim again when its owner
        asks twice.

        conversation: {"preset"} of the agent, with an "id" for a new one; an interrupted one of
        the same agent and preset is kept.

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
        # by name, it still waits its time
        tasks = [task for task in self.claimable(agent, presets) if task_id in ("", task.id)]
        if not tasks:
            who = f"task {task_id} cannot" if task_id else "no task can"
            raise NotFound(f"{who} be claimed now", "./farm.py tasks")
        task, kept = tasks[0], tasks[0].conversation
        own_by = (kept.get("agent"), kept.get("preset")) if kept.get("id") else ()
        if conversation and own_by != (agent, conversation["preset"]):
            task = task._replace(conversation={"agent": agent, **conversation})
        return self.tx.claim(task, own)

    def get_claimed(self, agent: str, fence: str, verb: str) -> Task:
        """The task behind the current claim `fence`; when `verb` has ended exactly this claim
        before, as it is now: that has an `ended_by`, which no claimed one has.

        Raises Refused for any other fence.
        """
        claim = self.state.claims.get(agent)
        if claim and claim.task and claim.fence == fence:
            return claim.get_task()
        # The record keeps the fence that it was last claimed by, and the verb that ended it: enough
        # to know a repeat, since an older fence's task has been claimed anew. A repeat by another
        # verb is a contradiction, and refused.
        task = self.state.find_task(fence.rpartition(".")[0])
        if task and task.fence == fence and task.ended_by == verb and task.state != "claimed":
            return task
        now = f"; {agent} holds {claim.fence}" if claim and claim.task else ""
        raise Refused(f"fence {fence} is not the current claim of {agent}{now}", "./farm.py tasks")

    def renew(self, agent: str, fence: str, *, sync: bool = True) -> None:
        self.get_claimed(agent, fence, "renew")
        claim = self.state.claims[agent]
        heard = claim._replace(renewals=claim.renewals + 1, heard_at=utc_now())
        self.tx.write_lock(heard, sync=sync)

    def submit(self, agent: str, fence: str, branch: str, commit: str) -> Task:
        """Hand `commit`, which is pinned already, to the merge queue; the task as it is there,
        also at a repeat.

        What lands is this commit, wherever its branch goes later. Raises Refused for an old fence.
        """
        task = self.get_claimed(agent, fence, "submit")
        if task.ended_by:
            return task
        return self.enqueue(task, branch=branch, commit=commit, ended_by="submit", approved="")

    def enqueue(self, task: Task, **fields: str) -> Task:
        """Put it into the merge queue, behind all others, with these fields."""
        place, now = self.state.next_queue_seq(), utc_now()
        task = task._replace(state="ready", queue_seq=place, submitted_at=now, **fields)
        return self.tx.move(task, "ready", "submitted")

    def fail(self, agent: str, fence: str, why: str, **how) -> Task:
        """End an attempt without result; the task waits for a while, or is failed when its
        attempts are used up. how: as for `give_back`."""
        task = self.get_claimed(agent, fence, "fail")
        return task if task.ended_by else self.give_back(task, why, "fail", **how)

    def release(self, agent: str, fence: str, why: str = "", **how) -> Task:
        """Give a task back unharmed: no attempt is counted; the next one goes on from its
        branch, in its conversation. how: as for `give_back`."""
        task = self.get_claimed(agent, fence, "release")
        if task.ended_by:
            return task
        how = {"start": kept_by(self.state.claims[agent]), "resume": True, **how}
        return self.give_back(task, why or task.reason, "release", counts=False, **how)

    def give_back(
        self,
        task: Task,
        reason: str,
        ended_by: str,
        *,
        counts: bool = True,
        retry: bool = True,
        start: str = "",
        rescue: str = "",
        resume: bool = False,
        conversation: str = "",
    ) -> Task:
        """The way back to pending, from a claim or from the merge queue, with the reason.

        counts: whether this was an attempt (1 s, 2 s, 4 s ... of backoff, `failed` after the
        last). start: the commit or branch that the next one begins from, empty for where this
        one did. resume: that goes on in the same conversation, whose id the CLI may have told
        only now.
        """
        attempts = task.attempts + counts
        is_over = counts and (not retry or attempts >= max(1, task.max_attempts))
        # nobody's fault: nobody waits
        wait = min(2.0 ** (attempts - 1), RETRY_SECONDS_MAX) if counts else 0
        task = task._replace(
            state="failed" if is_over else "pending",
            attempts=attempts,
            reason=reason,
            ended_by=ended_by,
            start=start or task.start,
            rescue=rescue or task.rescue,
            not_before=utc(CLOCK.now() + wait) if wait and not is_over else "",
            conversation=(
                kept_conversation(task, CLOCK.now() + wait, conversation) if resume else {}
            ),
        )
        return self.tx.move(task, "pending", GIVE_BACK_EVENTS[ended_by], why=reason)

    def expire(self, is_lapsed=lambda claim: False, rescues: dict | None = None) -> list[Claim]:
        """End the claims of dead owners, and of unseen ones whose lease `is_lapsed`; their tasks
        are pending again.

        rescues: agent -> ref of the unsaved work that was kept.
        """
        ended = []
        for claim in list(self.state.claims.values()):
            alive = find_liveness(claim.get_owner())
            if alive or alive is None and not is_lapsed(claim):
                continue
            # first, as in every move: a kill in between leaves the task pending twice, not nowhere
            if claim.task:
                rescue = (rescues or {}).get(claim.agent, "")
                self.requeue_orphan(claim, rescue, is_seen=alive is False)
            # the move took the file along where it held no named locks
            if claim.agent in self.state.claims:
                self.tx.remove_lock(claim.agent)
            ended.append(claim)
        return ended

    def requeue_orphan(self, claim: Claim, rescue: str, *, is_seen: bool) -> None:
        """A dead owner's task goes on from its own branch, or from what its host has kept here. A
        reboot or a lapsed lease is nobody's fault: no attempt counts, until the task has lapsed
        for the third time and may be what kills its hosts."""
        task, owner = claim.get_task(), claim.get_owner()
        lapses = task.lapses + (not is_seen)
        is_fault = owner.boot == boot_id() if is_seen else lapses >= LAPSES_MAX
        self.give_back(
            task._replace(lapses=lapses),
            describe_death(claim, owner, is_seen=is_seen),
            "died",
            counts=is_fault,
            start=kept_by(claim),
            rescue=rescue,
            resume=not owner.is_on_host,  # its conversation went with the host
        )

    def end_claim(self, claim: Claim, rescue: str = "") -> None:
        """End a claim whose agent the farm itself has stopped: no attempt is counted, the branch
        is the next one's start."""
        if claim.task:
            self.release(claim.agent, claim.fence, rescue=rescue)
        if claim.agent in self.state.claims:
            self.tx.remove_lock(claim.agent)

    def keep_for_agents(self, agents: list[str]) -> None:
        """Interrupted tasks wait once more for those of `agents` who know their context."""
        pending, now = self.state.pending, CLOCK.now()
        kept = [task for task in pending.values() if task.conversation.get("agent") in agents]
        for task in kept:
            pending[task.id] = task._replace(conversation=kept_conversation(task, now))
        if kept:
            self.tx.write("pending")

    def cancel(self, task_id: str) -> Task:
        """Raises Refused while an agent holds it or once it has landed."""
        task = self.state.get_task(task_id)
        holder = self.state.find_holder(task_id)
        if holder:
            raise Refused(
                describe_holder(holder),
                f"./farm.py send {holder.agent} 'please stop', or: ./farm.py down",
            )
        if task.state == "landed":
            raise Refused(
                f"task {task_id} has landed as {task.landed_commit[:10]}",
                f"./farm.py revert {task_id}",
            )
        if task.state == "canceled":
            return task
        return self.tx.move(task._replace(state="canceled"), "pending", "canceled")

    def retry(self, task_id: str, more: int) -> Task:
        """A failed or canceled task (or one in backoff) may be claimed at once, with `more`
        attempts.

        Attempts go on counting: returned work is pinned under its attempt's number.
        """
        task = self.state.get_task(task_id)
        if task_id not in self.state.pending:
            raise Refused(
                f"task {task_id} is {task.state}; only failed, canceled and pending tasks can be "
                f"retried",
                "./farm.py tasks",
            )
        task = task._replace(
            state="pending",
            max_attempts=max(task.max_attempts, task.attempts + more),
            not_before="",
        )
        return self.tx.move(task, "pending", "retried")


def kept_by(claim: Claim) -> str:
    """The branch or ref with what a claim's agent has committed, as far as it is here."""
    owner = claim.get_owner()
    return (
        arrival_of(owner.host, claim.fence)
        if owner.is_on_host
        else branch_of(claim.agent, claim.task["id"])
    )


def describe_death(claim: Claim, owner: Owner, *, is_seen: bool) -> str:
    if not is_seen:
        last = claim.heard_at or claim.claimed_at
        where = owner.host or "another host"
        return f"{claim.agent} on {where} was not heard of in its lease (last at {last})"
    if owner.boot != boot_id():
        return "the machine was restarted"
    return f"{claim.agent} died (pid {owner.pid} is gone)"


# Refused at once, as a task in a circle would wait for ever, and look like one that only waits.
def check_after(task: Task, state: State) -> None:
    """Raises UsageError for a task that comes after one that is not there, or after itself."""
    for name in state.open_before(task):
        if not state.find_task(name):
            raise UsageError(
                f"task {task.title!r} comes after {name}, and there is no such task",
                "./farm.py tasks",
            )
    if circle := find_circle(task, state):
        raise UsageError(
            f"a task would wait for itself: {' after '.join(circle)}", "take one `after` out"
        )


# No recursion: a list of two thousand tasks may be one chain, and Python stops at a thousand.
def find_circle(task: Task, state: State) -> tuple[str, ...]:
    """The ids on the way from a task back to itself by `after`; empty when there is none: it could
    never be claimed."""
    ways, seen = [(task.id,)], set()
    while ways:
        way = ways.pop()
        other = None if state.is_done(way[-1]) else state.find_task(way[-1])
        for name in other.after if other else ():
            if name == task.id:
                return (*way, name)
            if name not in seen:
                seen.add(name)
                ways.append((*way, name))
    return ()


# Before their tasks move on: the next attempt goes on from the branch, which does not have what is
# not committed.
def rescue_dead_owners(store: Store, settings: Settings) -> dict[str, str]:
    """Keep what dead owners' worktrees hold unsaved: agent -> rescue ref. Outside the mutex,
    before their tasks move on."""
    rescues = {}
    for claim in store.read_claims().values():
        worktree = worktree_of(store.repo, settings, claim.agent)
        if claim.task and is_orphan(claim) and os.path.isdir(worktree):
            rescues[claim.agent] = rescue(store.repo, claim.agent, worktree)
    return rescues


# Two rounds at most: an owner that dies during the rescues leaves its unsaved work in its
# worktree, which nobody resets before a rescue of its own.
def take_over(store: Store, watch: LeaseWatch, move):
    """`move(tx)` in a transaction in which dead owners hold nothing any more.

    Their unsaved work is kept first, outside of it: no git runs under the mutex.
    """
    rescues = None
    while True:
        with store.transaction() as tx:
            if rescues is not None or not any(map(is_orphan, tx.state.claims.values())):
                TaskQueue(tx).expire(watch.is_lapsed, rescues)
                return move(tx)
        rescues = rescue_dead_owners(store, watch.settings)


def describe_wait(task: Task, state: State, now: float) -> str:
    """What a pending task waits for, in words; empty when it may be claimed."""
    for name in state.open_before(task):
        other = state.find_task(name)
        what = "which is not there" if other is None else f"which is {other.state}"
        is_over = other is None or other.state in ("failed", "canceled")
        way_out = f": ./farm.py retry {name}, or ./farm.py cancel {task.id}" if is_over else ""
        return f"after {name}, {what}{way_out}"
    backs_off = is_backing_off(task, now)
    return f"until {task.not_before}, as it has failed before" if backs_off else ""


# `run --until-drained` ends when nothing but such tasks is left: it would wait for them for ever.
# No recursion here either, and each task once: the loop asks at every tick.
def find_stranded(state: State) -> set[str]:
    """Ids of the tasks that nobody holds and that can never be claimed: they are over, or come
    after one that is."""
    stranded, followers = [], defaultdict(list)
    for task in state.pending.values():
        before = state.open_before(task)
        if task.state != "pending" or any(state.find_task(name) is None for name in before):
            stranded.append(task.id)
        for name in before:
            followers[name].append(task.id)
    found = set(stranded)
    for task_id in stranded:  # it grows while it is gone through
        stranded += [name for name in followers[task_id] if name not in found]
        found.update(followers[task_id])
    return found


# Derived and not stored: time and other tasks change it, and nobody would be there to write it.
def derived_state(task: Task, state: State, now: float) -> str:
    """A pending task that may not be claimed yet is shown as waiting."""
    if task.state == "pending" and (is_backing_off(task, now) or state.open_before(task)):
        return "waiting"
    return task.state


# --------------------------------------------------------------------------------------- task files
# People keep tasks in lists of many kinds. All or nothing: a file with one bad line adds no task.
# (tests/rooms/test_task_files.py)

CHECKBOX = r"^(\s*)(?:[-*+]|\d+[.)])\s+\[([ xX])\]\s+(\S.*)$"
# A typing error (`-[ ] x`, `- [] x`, `- [?] x`) would be read as text of the item above, and a
# task lost without a word. `[x](url)` is a link and none. What CHECKBOX matches, this does, too.
NEARLY_CHECKBOX = r"^\s*(?:[-*+]|\d+[.)])\s*\[(?:\s*[xX]?\s*|[^\w\s])\](?!\()"


# of a checklist; after: NUL and the index of each item that is below it
Item = namedtuple("Item", "title body after")


def parse_checklist(text: str, name: str) -> list[Task]:
    """`- [ ] title`, deeper text below it is the prompt; a deeper checkbox comes first: the item
    is `after` it. The text may begin with labels: `agent: codex`, `path: src/**`, `priority: 5`,
    `after: t-0001 #2` (the list's second item).

    Checked items are passed over. Raises UsageError that names a line which is nearly a checkbox.
    """
    items: list[Item] = []
    # (indent, item; None for a checked one)
    open_items = []
    # a fence of a code block: what looks like a checkbox within is text
    in_code = False
    for number, line in enumerate(text.expandtabs(4).splitlines(), 1):
        found = None if in_code else re.match(CHECKBOX, line)
        indent = len(line) - len(line.lstrip())
        if not found and not in_code and re.match(NEARLY_CHECKBOX, line):
            raise UsageError(
                f"{name}, line {number}: {one_line(line, 60)!r} is nearly a task (`- [ ] title`); "
                f"nothing was added"
            )
        while open_items and line.strip() and not in_code and open_items[-1][0] >= indent:
            open_items.pop()
        parent = open_items[-1][1] if open_items else None
        if found:
            item = Item(found[3].strip(), [], []) if found[2] == " " else None
            if item and parent:
                parent.after.append(f"\0{len(items)}")
            if item:
                items.append(item)
            open_items.append((indent, item))
        elif parent:
            parent.body.append(line)
            in_code ^= line.lstrip().startswith("```")
    return [with_labels(item, len(items)) for item in items]


LABELS = {
    "title": "title",
    "priority": "priority",
    "after": "after",
    "path": "paths",
    "max-attempts": "max_attempts",
    "agent": "preset",
}


# Only at the beginning: further down `path: x` may be part of what the agent shall read.
def read_labels(lines: list[str]) -> tuple[dict, list[str]]:
    """The fields of a task that a text begins with, a line `label: value` each, and its other
    lines. Raises UsageError."""
    fields = {}
    for place, line in enumerate(lines):
        label, _, value = map(str.strip, line.partition(":"))
        if label not in LABELS:
            return fields, lines[place:]
        name = LABELS[label]
        kind = type(Task._field_defaults[name])
        if kind is list:
            words = re.split(r"[\s,]+", value) if name == "after" else [value]
            fields[name] = [*fields.get(name, []), *filter(None, words)]
        else:
            try:
                fields[name] = kind(value)
            except ValueError:
                raise UsageError(f"{label} must be a number, not {value!r}") from None
    return fields, []


def with_labels(item: Item, items: int) -> Task:
    """A task from an item of a checklist and what the text below it says, without the indent that
    all its lines have. Raises UsageError."""
    import textwrap

    (fields, rest), known = read_labels(item.body), {f"#{n + 1}": f"\0{n}" for n in range(items)}
    after = [*item.after, *(known.get(name, name) for name in fields.get("after", ()))]
    prompt = textwrap.dedent("\n".join(map(str.rstrip, rest))).strip("\n")
    return Task(**{"title": item.title, **fields, "after": after, "prompt": prompt})


def find_agent_label(item: dict) -> dict:
    """{"preset"} where an item, or a label of an issue, says `agent: PRESET`."""
    labels = [object_of(label).get("name") for label in item.get("labels") or ()]
    # last, and the last one counts: a key of the item's own goes before an issue's labels
    labels += [f"agent: {item['agent']}"] if "agent" in item else []
    named = [str(label) for label in labels if str(label).startswith("agent:")]
    return read_labels(named[-1:])[0]


# Only keys that are a person's to choose. State, rev or fence of a record that was copied from
# `tasks --json` would be those of another moment.
def parse_json_item(item, where: str) -> Task:
    """One object: a task's own keys, or an issue as `gh issue list --json
    number,title,body,labels,url` prints it."""
    item = {"title": item} if isinstance(item, str) else object_of(item)
    title = item.get("title")
    if not isinstance(title, str) or not title.strip():
        raise UsageError(f"{where}: a task needs a title; nothing was added")
    own = (
        "id",
        "title",
        "prompt",
        "priority",
        "after",
        "paths",
        "max_attempts",
        "time_limit_seconds",
        "budget_usd",
    )
    fields = {key: item[key] for key in own if key in item}
    fields.setdefault("prompt", item.get("body") or "")
    if isinstance(fields["prompt"], str):
        # GitHub's forms send CR LF
        fields["prompt"] = fields["prompt"].replace("\r\n", "\n")
    fields.update(find_agent_label(item))
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


# Line by line where that works, as then a mistake is told with its own line.
def parse_json_tasks(text: str, name: str) -> list[Task]:
    """A JSON array, one JSON object a line, or objects one after the other. Raises UsageError
    that names the line or item."""
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    first, drafts = lines[0][1], []
    by_line = first.lstrip().startswith("{") and is_json(first)
    for start, piece in lines if by_line else [(1, text)]:
        try:
            found = list(read_values(piece))
        except json.JSONDecodeError as error:
            raise UsageError(
                f"{name}, line {start + error.lineno - 1}: {error.msg}; nothing was added"
            ) from None
        found = found[0] if len(found) == 1 and isinstance(found[0], list) else found
        for number, item in enumerate(found, 1):
            where = f"line {start}" if by_line else f"item {number}"
            drafts.append(parse_json_item(item, f"{name}, {where}"))
    return drafts


# The source is made of title and prompt, not of the line's number: a list that grows in its middle
# adds what is new and nothing else. The counter keeps apart two items that are the same.
def parse_tasks(text: str, name: str) -> list[Task]:
    """Drafts from a checklist, JSON or plain lines, each with the `source` that keeps it from
    being added twice."""
    import zlib

    lines = [line.strip() for line in text.splitlines()]
    # `[ ] title` begins with a bracket, too
    if re.match(r"\s*(?:\{|\[\s*(?:[\[{\"\]]|\Z))", text):
        drafts = parse_json_tasks(text, name)
    elif any(re.match(NEARLY_CHECKBOX, line) for line in lines):
        drafts = parse_checklist(text, name)
    else:
        drafts = [Task(title=line) for line in lines if line and not line.startswith("#")]
    seen = Counter()
    for index, draft in enumerate(drafts):
        mark = f"{name}:{zlib.crc32(json.dumps([draft.title, draft.prompt]).encode()):08x}"
        seen[mark] += 1
        drafts[index] = draft._replace(source=draft.source or f"{mark}:{seen[mark]}")
    return drafts


# ============================================================================= PART III Merge queue

# ------------------------------------------------------------------------------------------ planner
# Which tree to gate next. Pure: no I/O, no clock, so that tests replay thousands of queues. Called
# anew at each tick with all the evidence there is, it remembers nothing: a kill or a person's
# commit is nothing special to it. (tests/rooms/test_planner.py)

# How often one tree passed and failed the gate; a time-out or a killed gate counts as neither.
Evidence = namedtuple("Evidence", "greens reds")

# What to do now: land the first `land` entries, return the entry `guilty` (or None), start `tests`:
# gate runs, each the entries that are merged in this order on the target, () for the target as it
# is. `target_red` pauses the queue. `abandon` are running tests that no branch can use any more.
# Landing and returning change the queue, so plan again after them; `tests` holds meanwhile (say,
# while a file in the checkout is in the way).
Plan = namedtuple("Plan", "land guilty target_red tests abandon")

# A place in the decision tree: `good` entries pass together, `rest` is open, in landing order.
# `good + rest[:bound]` is known to fail (0: nothing is) and was red `reds` times; `trusted`:
# `good` was seen green.
Node = namedtuple("Node", "good rest bound reds trusted")

# What one call of `plan` takes for granted: tuple -> Evidence, failure rate, reds that prove,
# strict.
Known = namedtuple("Known", "evidence_of rate reds strict")

# The test that a node asks for, and the nodes after either answer (None: nothing left to plan).
Question = namedtuple("Question", "entries green_chance if_green if_red")

TARGET_REDS = 2  # a pause calls a person: one unlucky run is not enough
# a guess that only ranks speculation: that a repeated run answers otherwise than expected
CHANCE_OF_FLAKE = 0.03
# rarer than this, a spare slot is better left to a lone diagnostic run: it saves < 1 % of time
LEAST_CHANCE = 0.1
# how seldom chance alone may return a good entry, once the gate is known to flake
WRONG_RETURN_ODDS = 1e-5


# Without the prior, one landing would make the rate 0 and one return make it 1: the group's size
# would jump from all that is ready to one.
def failure_rate(returned: int, done: int) -> float:
    """Estimate the chance that an entry fails, from the `returned` ones among those `done`
    (landed or returned).

    The mean of a Beta(0.5, 9.5) prior after that evidence: 5 % before the first entry, and soon
    the farm's own rate.
    """
    return (0.5 + returned) / (10 + done)


def reds_needed(flaky_trees: int, green_trees: int) -> int:
    """Say how many reds prove a failure, when `flaky_trees` of the `green_trees` ever gated were
    also red.

    Two for a gate that was never seen to contradict itself. One that was needs as many as make a
    wrong return rarer than WRONG_RETURN_ODDS, at least three. Count over the farm's whole
    memory: what one queue sees is too little.
    """
    if not flaky_trees:
        return 2
    # So many that chance alone gives them too seldom: rate ** reds <= WRONG_RETURN_ODDS. Above 0.3
    # nothing would ever be proven.
    rate = min(0.3, flaky_trees / max(flaky_trees, green_trees))
    return max(3, math.ceil(math.log(WRONG_RETURN_ODDS) / math.log(rate)))


def group_size(rate: float, available: int) -> int:
    """Choose how many untested entries to test at once so that green is as likely as red: (1 -
    rate) ** size = 1/2.

    An answer that is as likely as its opposite tells most: one bit.
    """
    return max(1, min(available, round(math.log(2) / -math.log(1 - rate))))


def median_cut(rate: float, bound: int) -> int:
    """Choose where to cut `bound` entries that fail together: the median of the first failing
    one's place.

    The place follows the geometric distribution truncated at `bound`; the result is in 1 ..
    bound - 1. The middle, where bisection cuts, is right for rare failures only: the more
    entries fail, the nearer to the front is the first of them.
    """
    passes = 1 - rate
    # P(the first `cut` pass, given that not all do) = (passes**cut - passes**bound) / (1 -
    # passes**bound) = 1/2, for the cut.
    half = (1 + passes**bound) / 2
    return max(1, min(bound - 1, round(math.log(half) / math.log(passes))))


def count_green(evidence: list, strict: bool) -> int:
    """Count the leading entries that are good, given the Evidence of each prefix: up to the last
    green prefix.

    A prefix passes for all in it, so a fault that a later entry mends is none; `strict` stops at
    the first not green.
    """
    greens = [found.greens > 0 for found in evidence]
    if strict:
        return [*greens, False].index(False)
    return max((length for length, green in enumerate(greens, 1) if green), default=0)


# Verdicts of earlier ticks, of other groups and of other orders stand under the same trees; each
# that fits is an answer for which no gate has to run.
def settle(node: Node, known: Known) -> Node:
    """Move `node` past all that existing verdicts answer: more entries known good, a closer
    failing bound."""
    good, rest, bound, reds, trusted = node
    evidence = [known.evidence_of(good + rest[:length]) for length in range(1, len(rest) + 1)]
    green = count_green(evidence, known.strict)
    # a bound inside the green prefix is void: what failed there was mended by a later entry, or was
    # a flake
    if green:
        good, rest, evidence, trusted = good + rest[:green], rest[green:], evidence[green:], True
        bound, reds = (bound - green, reds) if bound > green else (0, 0)
    # A tree that was ever green counts as green: a pass is proof that it can, a red may be the
    # gate's own fault.
    red = next(
        (length for length, found in enumerate(evidence, 1) if found.reds and not found.greens), 0
    )
    if red and red == bound:
        reds = max(reds, evidence[red - 1].reds)
    elif red and (not bound or red < bound):
        bound, reds = red, evidence[red - 1].reds
    return Node(good, rest, bound, reds, trusted)


def drop_guilty(node: Node, known: Known) -> tuple[Node, tuple]:
    """Settle `node` and take out every entry whose guilt is proven; gives the node and those
    entries.

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
    # green here leaves the fault among the others; red moves the bound to here
    left = bound - size if bound > size else 0
    if_green = Node(entries, rest[size:], left, reds if left else 0, True)
    return Question(
        entries,
        green_chance,
        if_green,
        Node(good, rest, size, reds + 1 if bound == size else 1, trusted),
    )


def can_use(node: Node, entries: tuple) -> bool:
    """Say whether a branch below the settled `node` may still ask for `entries`.

    It must go on from what is known good and leave out only entries that may yet prove guilty.
    More than the failing bound is of no use: it can only pass if that red was chance, and then
    the repeated run will say so.
    """
    good, rest, bound, _, trusted = node
    if not entries:
        return not trusted
    tail = entries[len(good) :]
    if (
        entries[: len(good)] != good
        or not tail
        or (0 < bound < len(tail) and tail[:bound] == rest[:bound])
    ):
        return False
    places = iter(rest)
    return all(entry in places for entry in tail)  # a shared iterator: the same order, gaps allowed


# The first is the next step (a group, a single suspect again, the target itself); the others are
# useful if gates that have no verdict yet go as expected.
def speculate(root: Node, known: Known, free: int, started: set) -> list[tuple]:
    """Choose up to `free` tests not in `started`: walk the decision tree, the likeliest node
    first."""
    tests, serial = [], 0
    # serial: of equal chances the earlier pushed, and two Nodes are never compared
    heap = [(-1.0, serial, root)]
    while heap and len(tests) < free:
        minus_chance, _, node = heapq.heappop(heap)
        # verdicts that are there already may answer what this node would ask
        node, _ = drop_guilty(node, known)
        if not node.rest:
            continue
        question = ask(node, known)
        if question.entries not in started:
            tests.append(question.entries)
            started = started | {question.entries}
        shares = (
            (question.if_green, question.green_chance),
            (question.if_red, 1 - question.green_chance),
        )
        for branch, share in shares:
            serial += 1
            if branch and -minus_chance * share >= LEAST_CHANCE:
                heapq.heappush(heap, (minus_chance * share, serial, branch))
    return tests


def plan(
    queue: tuple,
    verdict_of,
    slots: int,
    rate: float,
    running: tuple = (),
    *,
    reds: int = 2,
    strict: bool = False,
) -> Plan:
    """Decide what lands, who is guilty and which trees to gate next: adaptive group testing of
    the merge queue.

    `queue`: entry ids in landing order. `verdict_of(entries) -> Evidence` of the tree that
    merging these entries on the target gives, `verdict_of(())` of the target itself. `slots`:
    gates that may run at once, `running` those that do (as tuples). `rate`: see `failure_rate`.
    `reds`: see `reds_needed`. `strict`: each prefix lands by its own green.

    Sources: generalised binary splitting (Hwang 1972) with groups sized and cut by the entries'
    failure rate (Sobel and Groll 1959); running ahead of verdicts as in Zuul's dependent
    pipeline, the likeliest outcomes first as in Uber's SubmitQueue. Added here: tests are
    prefixes in landing order, so each green one lands as it is; guilt takes a repeated red and a
    green tree without the entry, so neither a flake nor a red target gets anyone returned.
    """
    # the rate stays off 0 and 1, where the logarithms above have no value; the cache is for this
    # call alone, as verdicts change between two
    known = Known(
        functools.lru_cache(maxsize=None)(verdict_of), min(max(rate, 1e-6), 0.99), reds, strict
    )
    target = known.evidence_of(())
    start = settle(Node((), tuple(queue), 0, 0, target.greens > 0), known)
    # only while no entry lands on it green: an entry that mends a red target is to land
    if not start.trusted and target.reds >= TARGET_REDS:
        return Plan(0, None, True, (), tuple(running))
    root, guilty = drop_guilty(start, known)
    useful = [entries for entries in running if can_use(root, entries)]
    tests = speculate(root, known, slots - len(useful), set(useful))
    abandon = tuple(entries for entries in running if entries not in useful)
    return Plan(len(start.good), guilty[0] if guilty else None, False, tuple(tests), abandon)


# -------------------------------------------------------------------------------------------- gates
# A gate is a user's command on one exact tree. Its exit code is evidence about that tree for ever;
# a time-out, a kill or a gate that edits what it tests is no evidence at all.
# (tests/rooms/test_gates.py)

# Bytes of a gate's output that are kept: what it set out to do, and how it ended. A gate that
# prints 100 MB fills no disk.
OUTPUT_HEAD, OUTPUT_TAIL = 64 * 1024, 256 * 1024

# One run's colour (green, red or none), the gate's exit code, its seconds, and why it is none.
Verdict = namedtuple("Verdict", "colour exit_code seconds note")


def no_verdict(note: str) -> Verdict:
    return Verdict("none", -1, 0.0, note)


# for a verdict of a target that gave none, longer at each time
ASK_AGAIN_SECONDS, ASK_AGAIN_SECONDS_MAX = 5.0, 3600.0


# The key is a hash of command and variables, as the command may be longer than a file's name, and
# another command has to ask anew.
class Verdicts:
    """What gates said of trees: results/TREE-KEY.json, KEY for the gate's command and the
    environment names that count.

    A verdict is evidence for ever. A gate that was killed or timed out gave none. By tree and
    not by commit: a rebase, another order or a restart that leads to the same files asks nothing
    again. Only the merger, one a farm, writes here.
    """

    def __init__(self, store: Store, gate: str, env_names: str):
        import hashlib

        self.store, self.gate = store, gate
        named = [
            [name, os.environ.get(name)] for name in sorted(env_names.replace(",", " ").split())
        ]
        self.key = hashlib.sha1(
            json.dumps([gate, named]).encode(), usedforsecurity=False
        ).hexdigest()[:8]
        # not below results/, where what is old is swept away
        self.sums_path = store.path(f"merge_queue/verdicts-{self.key}.json")
        self.memo: dict[str, Evidence] = {}  # the planner asks for each prefix at each tick
        # Trees that gave no verdict: how often, why, and when to ask the target again. Never on
        # disk, for it is no evidence.
        self.unjudged, self.silent, self.ask_again_at = Counter(), {}, 0.0
        # over all that was ever gated: one queue alone shows too little of a gate's flakes
        known = read_object(self.sums_path)
        self.sums = {key: count(known, key) for key in ("green_trees", "flaky_trees")}
        # The sums are a short cut: where their file is gone, all verdicts are read once more, of
        # which a busy farm has thousands.
        for name in () if known else names_in(store.path("results"), store.disk.list_folder):
            if name.endswith(f"-{self.key}.json"):
                self.count(self.evidence_in(f"results/{name}"), 1)

    def count(self, found: Evidence, step: int) -> None:
        """Keep the numbers of trees that were ever green, and of those that were red as well."""
        self.sums["green_trees"] += step * bool(found.greens)
        self.sums["flaky_trees"] += step * bool(found.greens and found.reds)

    def reds_needed(self) -> int:
        return reds_needed(**self.sums)

    def name_of(self, tree: str) -> str:
        return f"results/{tree[:16]}-{self.key}.json"

    def log_of(self, tree: str) -> str:
        """The path of what the gate printed about a tree."""
        return self.store.path(f"results/{tree[:16]}-{self.key}.log")

    def evidence(self, tree: str) -> Evidence:
        """Greens and reds of a tree. Without a gate every tree counts as green. Raises
        DamagedState for a hand-broken file."""
        if not self.gate:
            return Evidence(1, 0)
        if tree not in self.memo:
            self.memo[tree] = self.evidence_in(self.name_of(tree))
        return self.memo[tree]

    def runs_in(self, name: str) -> list[dict]:
        return (self.store.read_json(name) or {}).get("runs", [])

    def evidence_in(self, name: str) -> Evidence:
        colours = [run.get("colour") for run in self.runs_in(name)]
        return Evidence(colours.count("green"), colours.count("red"))

    def record(self, tree: str, verdict: Verdict) -> None:
        """Add one run's verdict, durably."""
        name = self.name_of(tree)
        data = self.store.read_json(name) or {
            "schema": SCHEMA,
            "tree": tree,
            "gate": self.gate,
            "runs": [],
        }
        data["runs"].append({"at": utc_now(), **verdict._asdict()})
        self.count(self.evidence(tree), -1)  # taken out as it was, put back as it is
        self.store.write_json(name, data)
        self.memo.pop(tree, None)
        if len(self.memo) > 1000:
            self.forget()
        self.count(self.evidence(tree), 1)
        write_object(self.sums_path, self.sums)

    def hold_red(self, tree: str, verdict: Verdict) -> None:
        """A tree that twice gave no verdict is held to be red, in memory only, for it is no
        evidence: the planner halves it and asks for the target, and nobody is blamed for a gate
        that never gives a verdict.
        """
        self.unjudged[tree] += 1
        # once may be an accident (a kill, a busy machine); a command that is not there is none
        if self.unjudged[tree] >= 2 or verdict.exit_code in CANNOT_START:
            self.silent[tree] = verdict.note
            # more than reds_needed ever asks for
            self.memo[tree] = Evidence(0, 99)
            again = 2 ** max(0, self.unjudged[tree] - 2)
            pause = min(max(ASK_AGAIN_SECONDS, verdict.seconds) * again, ASK_AGAIN_SECONDS_MAX)
            self.ask_again_at = CLOCK.monotonic() + pause

    def review(self, target: str) -> None:
        """While the target's tree is held to be red, look at the verdicts anew, so that a paused
        queue goes on by itself: a person may have removed them, and what kept gates from an
        answer may be over. What was said of entries meanwhile goes with it: it blames nobody.
        """
        found = self.memo.get(target, Evidence(0, 0))
        if found.greens or not found.reds:
            return
        if target in self.silent:
            if CLOCK.monotonic() < self.ask_again_at:
                return
            self.silent.clear()
        self.forget()

    def forget(self) -> None:
        """Have all evidence read from disk again but what is in memory only."""
        self.memo = {tree: found for tree, found in self.memo.items() if tree in self.silent}

    def told_by(self, tree: str) -> str:
        """Which host has said what of a tree; empty where its gates ran here."""
        runs = self.runs_in(self.name_of(tree))
        told = ", ".join(f"{run['colour']} {run['note']}" for run in runs if run["note"])
        return told and f" ({told})"

    # It goes back with the work, for an agent to read: the end says what has failed.
    def tail(self, tree: str) -> str:
        """The end of what the gate printed about a tree."""
        printed = read_printable(self.log_of(tree))
        return "".join(printed.splitlines(keepends=True)[-60:])[-16_000:]


class Gate:
    """One run of the gate on one tree, in a slot: a process group of its own, time-out, bounded
    output.

    ids: the entries whose chain it tests, () for the target. diagnosis: the returned task that
    runs alone. Two threads fill in `verdict` (or `failure`) and set `is_done` last; the merger
    reads them after that, and starts, abandons and ends it.
    """

    def __init__(
        self, slot: int, ids: tuple, commit: str, tree: str, diagnosis: Task | None = None
    ):
        self.slot, self.ids, self.commit, self.tree = slot, ids, commit, tree
        self.diagnosis = diagnosis
        self.started = CLOCK.monotonic()
        self.is_done = self.is_abandoned = False
        self.verdict: Verdict | None = None
        self.failure: Exception | None = None

    def named(self) -> dict:
        """What others are told of it."""
        return {"ids": list(self.ids), "slot": self.slot, "tree": self.tree}

    def start(self, folder: str, settings: Settings, log: str, wake, prefix=()) -> None:
        """Run the gate in `folder` (a worktree at the commit) on a thread of its own; `wake` is
        called when it is over.

        It sees the caller's environment without FARM_*, but FARM_PORT, FARM_SLOT (the folder, by
        which its processes are found) and a TMPDIR of its own. Standard input is /dev/null; both
        outputs go to `log`. prefix: what the sandbox puts before it.
        """
        self.log, self.folder = log, folder
        command = [*prefix, *shell(settings.gate)]
        if settings.gate_on:
            script = f"{SCRIPTS}/hosts/gate.sh"
            command = ["bash", script, settings.gate_on, self.commit, settings.gate]
        self.process = self.spawn(command)
        # One thread drains the pipe, or a gate that prints much would stand still; one waits, as
        # only its parent can.
        drain = start_thread(self.keep_output)
        start_thread(self.watch, settings.gate_timeout, drain, wake)

    def spawn(self, command: list[str]):
        """The gate's process, leader of a group of its own, in its environment."""
        import shutil
        import subprocess

        temp = self.folder + ".tmp"
        # what one gate left there is not the next one's business
        shutil.rmtree(temp, ignore_errors=True)
        make_folder(temp)
        # A gate that runs farm.py (its own tests, say) must not meet this farm; what is left can be
        # changed by the user.
        env = {key: value for key, value in os.environ.items() if not key.startswith("FARM_")}
        port = str(port_base(os.path.dirname(self.folder)) + self.slot)
        env.update(TMPDIR=temp, FARM_PORT=port, FARM_SLOT=self.folder, GIT_TERMINAL_PROMPT="0")
        return start_apart(
            command,
            cwd=self.folder,
            env={**env, **isolation_environment()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def keep_output(self) -> None:
        """The head and the tail of the output into its log; whatever lies between is counted, not
        kept."""
        head, tail, dropped = b"", b"", 0
        while chunk := os.read(self.process.stdout.fileno(), 65536):
            room = OUTPUT_HEAD - len(head)
            head, tail = head + chunk[:room], tail + chunk[room:]
            dropped += max(0, len(tail) - OUTPUT_TAIL)
            tail = tail[-OUTPUT_TAIL:]
        with open(self.log, "wb") as file:
            file.write(
                head + (b"\n[... %d bytes left out ...]\n" % dropped if dropped else b"") + tail
            )

    def watch(self, seconds: float, reader, wake) -> None:
        """Wait for the end or the time-out, end the whole group, judge. On the gate's own
        thread."""
        try:
            self.verdict = self.wait_for_verdict(seconds, reader)
        except Exception as error:
            # a thread that died in silence would hold its slot for ever; the merger raises it again
            self.failure = error
        # last, as the merger reads the rest once it sees it
        self.is_done = True
        wake()

    def wait_for_verdict(self, seconds: float, reader) -> Verdict:
        """What the gate says, once nothing of it runs any more. Raises FarmError when it could
        not be ended."""
        import signal
        import subprocess

        try:
            code = self.process.wait(seconds)
            # By the kernel (out of memory), by a person, or its shell tells so of a child: that
            # says nothing about the tree.
            by_shell = code - 128 if code - 128 in (signal.SIGKILL, signal.SIGTERM) else 0
            killed = -code if code < 0 else by_shell
            kind = "green" if code == 0 else "none" if killed or code in CANNOT_START else "red"
            note = f"the gate was killed by signal {killed}" if killed else ""
        except subprocess.TimeoutExpired:
            code, kind = -1, "none"
            note = f"the gate took longer than {seconds:.0f} s and was ended"
        self.end_group()
        # its writers are gone; one that was handed the pipe over a socket is not waited for
        reader.join(5)
        note = read_line(self.folder + ".tmp/note") or note  # which host has judged, or why none
        if code in CANNOT_START:  # nothing was tested: that says nothing of any tree
            note = f"the gate's command cannot be run: {find_missing(code, read_line(self.log))}"
        return Verdict(kind, code, round(CLOCK.monotonic() - self.started, 2), note)

    def end_group(self) -> None:
        """Kill what is left of the gate, also what moved to a session of its own: a gate that is
        over has no business running."""
        import subprocess

        kill_group(self.process.pid)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            # in the hands of a kernel that waits for a disk; end_gates sees it, and raises its
            # error
            pass
        end_gates(self.folder)


# The worktrees stay between two gates: what git ignores in them, caches of builds and tests, makes
# the next one quick.
class Slots:
    """The worktrees in which gates run, one each; the gates that run, and those that are over
    and not yet judged."""

    def __init__(self, store: Store, settings: Settings, folder: str):
        self.store, self.settings, self.folder = store, settings, folder
        self.number = settings.slots or default_slots()
        self.gates: list[Gate] = []
        self.wake = lambda: None  # a hook: called by a gate's thread when it is over

    def is_free(self) -> bool:
        return len(self.gates) < self.number

    def start(
        self, ids: tuple, commit: str, tree: str, log: str, diagnosis: Task | None = None
    ) -> None:
        """Put a tree under test in a free slot: that of `ids` on the target, or a returned
        entry's own.

        Raises FarmError when the slot's worktree cannot be made.
        """
        slot = min({*range(1, self.number + 1)} - {gate.slot for gate in self.gates})
        folder = f"{self.folder}/gate-{slot}"
        run_script("merge/gate-slot.sh", "prepare", "-C", self.store.repo, folder, commit)
        gate = Gate(slot, ids, commit, tree, diagnosis)
        prefix = isolated("gate", self.store.repo, folder)
        gate.start(folder, self.settings, log, self.wake, prefix)
        self.gates.append(gate)
        self.store.append_event("gate-started", **gate.named())

    def reap(self) -> list[Gate]:
        """Those that are over, their slots free again."""
        over = [gate for gate in self.gates if gate.is_done]
        self.gates = [gate for gate in self.gates if not gate.is_done]
        for gate in over:
            # it may still run, so its slot is not free: the next merger ends it before anything
            # else
            if gate.failure:
                raise gate.failure
            if gate.is_abandoned:
                self.note_end(gate, no_verdict("nobody needs its verdict any more"))
        return over

    # A gate that rewrites what it tests (a formatter, a lock file) has judged another tree than
    # the one that would land.
    def judge(self, gate: Gate) -> Verdict:
        """A gate's verdict; one that changed tracked files gave none, as one that timed out or
        was killed."""
        if gate.verdict.colour == "none":
            return gate.verdict
        check = run_script("merge/gate-slot.sh", "check", gate.folder, gate.commit, allow=(0, 1, 3))
        if not check.code:
            return gate.verdict
        changed = ", ".join(check.stdout.split("\n")[:5]).strip(", ")
        note = f"the gate changed tracked files: {changed}"
        if check.code == 3:
            note = "the gate's folder is gone"
        return gate.verdict._replace(colour="none", note=note)

    def note_end(self, gate: Gate, verdict: Verdict) -> None:
        """Each gate-started in the history has its gate-ended."""
        self.store.append_event("gate-ended", **gate.named(), **verdict._asdict())

    # Before anything else uses the slots: a dead merger's gate would go on in a folder that is
    # being made another tree.
    def recover(self) -> None:
        """End the gates of a dead merger."""
        end_all_gates(self.folder)
        for event in find_open_gates(self.store):
            gate = Gate(event["slot"], event["ids"], "", event["tree"])
            self.note_end(gate, no_verdict("its merger was killed"))

    def stop(self) -> None:
        """End the gates that run; they gave no verdict."""
        for gate in self.gates:
            gate.end_group()
            self.note_end(gate, no_verdict("its merger was stopped"))
        self.gates = []


# -------------------------------------------------------------------------------------------- chain
# Which tree each entry gives on the target, after those ahead of it. A chain is deterministic: the
# same place and the same commits give the same shas, so that a verdict by tree holds over restarts.
# (tests/scripts/test_scripts_chain.py)

# One line of merge/chain.sh, which says what its status and detail mean; commit and tree of the
# chain after it.
Step = namedtuple("Step", "id status commit tree detail")


# The commit's date will be that of the submission: made at any other time, the chain has the same
# shas.
def chain_row(task: Task) -> tuple[str, ...]:
    """One entry of merge/chain.sh's input."""
    at = str(int(epoch(task.submitted_at)))
    return task.id, task.commit, at, task.agent, one_line(task.title)


def show_tip(repo: str, revision: str) -> Step:
    """A commit and its tree, as the Step that a chain begins with."""
    commit, tree = run_script("merge/pins.sh", "tip", "-C", repo, revision).rows[0]
    return Step("base", "-", commit, tree, "")


class Chain:
    """Entries merged in memory, one on the other, on the target; what was merged once is not
    merged again."""

    def __init__(self, site: Site, verdicts: Verdicts):
        self.store, self.settings, self.target = site
        self.verdicts, identity = verdicts, self.store.farm().get("identity")
        # as `up` has found it: another user.name in between would change every sha
        self.identity = (
            "\t".join(identity)
            if is_texts(identity) and len(identity) == 2 and all(identity)
            else ""
        )
        # (commit before it, id, its commit) -> what merging it there gave
        self.steps = {}
        self.begin(None, {})

    def begin(self, base: Step | None, tasks: dict[str, Task]) -> None:
        """A new look: `base` is the target now, `tasks` is what is ready, by id, in landing
        order."""
        self.base, self.tasks = base, tasks
        self.walked = {}  # ids -> the last step of their chain
        # most are of what has landed; all are found out again by one call of the script
        if len(self.steps) > 1000 + 10 * len(tasks):
            self.steps.clear()

    # A gate that gives no verdict on the target is told apart from a red one: there the gate has
    # to be mended, and nobody's commit is at fault.
    def describe_red_base(self) -> tuple[str, str]:
        """What is wrong with the target itself, and the ways out of it."""
        name, commit, tree = self.target, self.base.commit, self.base.tree
        if why := self.verdicts.silent.get(tree):
            return (
                f"{name} itself gives no verdict at {commit[:10]}: {why}",
                "mend the gate or raise FARM_GATE_TIMEOUT, then: ./farm.py merge (one that "
                "watches asks again by itself)",
            )
        said = run_script("merge/find-author.sh", "-C", self.store.repo, commit, allow=(0, 1))
        who = said.rows
        by = f"; that commit was made by {who[0][0]} for {who[0][1]}" if who else ""
        return (
            f"{name} itself is red at {commit[:10]}: the gate fails on it without any new work{by} "
            f"(see {self.verdicts.log_of(tree)})",
            f"mend {name} and commit, and it goes on by itself; or have all judged again: "
            f"rm {self.store.path('results')}/*-{self.verdicts.key}.json",
        )

    def build_all(self, apart=()) -> list[Step]:
        """A Step for each ready task but those `apart`, in landing order."""
        return self.build([task for task in self.tasks.values() if task.id not in apart])

    def run_script(self, tasks: list[Task], base: str) -> list[Step]:
        """merge/chain.sh from the commit `base` on; its first row, the base itself, left out."""
        args = ["-C", self.store.repo, "-b", self.target, "-s", self.settings.style, "-B", base]
        result = run_script(
            "merge/chain.sh",
            *args,
            stdin=write_tsv(map(chain_row, tasks)),
            env={"FARM_CONFLICTS": self.store.path("returns"), "FARM_IDENTITY": self.identity},
        )
        return [Step(*(row + [""] * 5)[:5]) for row in result.rows[1:]]

    def build(self, tasks: list[Task]) -> list[Step]:
        """Each task merged on those before it that merge, on the target; steps known from
        earlier ticks are not redone."""
        # the chain is deterministic, so the same place and the same commit always give the same
        # step
        known, tip = [], self.base.commit
        for task in tasks:
            step = self.steps.get((tip, task.id, task.commit))
            # what held it has landed: now it conflicts
            if step is None or (step.status == "held" and tip == self.base.commit):
                break
            known.append(step)
            tip = step.commit if step.status == "ok" else tip
        rest = tasks[len(known) :]
        if not rest:
            return known
        steps = self.run_script(rest, tip)
        if tip != self.base.commit and any(step.status != "ok" for step in steps):
            # The script takes `tip` for the target. Only the whole chain tells a conflict with the
            # target from one with the work ahead, and what has landed from what is only in the work
            # ahead, which may yet come back.
            known, rest, tip = [], tasks, self.base.commit
            steps = self.run_script(rest, tip)
        for task, step in zip(rest, steps, strict=True):
            self.steps[(tip, task.id, task.commit)] = step
            tip = step.commit if step.status == "ok" else tip
        return known + steps

    # The planner asks about chains by the hundred; building each would be a git call each.
    def evidence_of(self, ids: tuple) -> Evidence:
        """Evidence for the target plus exactly these entries in this order. A chain that was
        never built has none."""
        step = self.known_step(ids)
        return self.verdicts.evidence(self.next_to_gate(step)[1]) if step else Evidence(0, 0)

    def line_of(self, step: Step) -> list[tuple[str, str]]:
        """(commit, tree) of what must be green before the target may be at `step`: its own
        commit, and with `strict` also the ones that rebase puts before it, for they come on the
        target's first-parent line as well.
        """
        before = step.detail.split() if self.settings.strict and step.status == "ok" else ()
        return [*(tuple(pair.split(":")) for pair in before), (step.commit, step.tree)]

    def next_to_gate(self, step: Step) -> tuple[str, str]:
        """The first commit of its line that was never green, and its tree; the last one when all
        were. One gate after the other judges a line: its first red settles it, and all green is
        green.
        """
        line = self.line_of(step)
        return next(
            (place for place in line if not self.verdicts.evidence(place[1]).greens), line[-1]
        )

    def known_step(self, ids: tuple) -> Step | None:
        """The last step of a chain that was built already; remembered for a tick, since the
        planner asks for every prefix."""
        if not ids:
            return self.base
        # Prefix by prefix, each from the one before it: fifty entries take fifty look-ups, not
        # fifty times fifty.
        if ids not in self.walked:
            before = self.known_step(ids[:-1])
            step = (
                self.steps.get((before.commit, ids[-1], self.tasks[ids[-1]].commit))
                if before
                else None
            )
            self.walked[ids] = step if step and step.status == "ok" else None
        return self.walked[ids]

    def step_of(self, ids: tuple) -> Step | None:
        """The last step of the chain of `ids` on the target; None when they do not merge so."""
        if not ids:
            return self.base
        steps = self.build([self.tasks[task_id] for task_id in ids])
        return steps[-1] if all(step.status == "ok" for step in steps) else None


# ------------------------------------------------------------------------------------------ landing
# What becomes of work whose verdict is known: it lands, or goes back with what is wrong with it.
# Here alone the target moves. (tests/rooms/test_landing.py, tests/rooms/test_merge_kills.py)


class Tally:
    """What a merger has done, for the report at its end."""

    def __init__(self):
        self.counts = Counter()
        self.moved = []  # (id, what became of it, why)

    def note(self, task_id: str, what: str, why: str) -> None:
        self.counts[what] += 1
        self.moved.append((task_id, what, why))


def describe_block(target: str, result: ScriptResult) -> tuple[str, str]:
    """What land.sh found in the way, and what to do: files, a whole checkout, or another git's
    lock."""
    said = script_error("merge/land.sh", result)
    files = result.rows[0][1:] if result.stdout else []
    # an absolute path is that of a checkout; files in the way are told relative to it
    if files and not any(map(os.path.isabs, files)):
        return (
            f"the checkout of {target} has changes of its own in the way: {', '.join(files)}",
            "commit them or move them away; the queue goes on by itself",
        )
    return str(said), said.hint or f"git status, in the checkout of {target}"


class Landing:
    """Moves the target to a tree that is green, and the tasks with it. Durable are the swap in
    git, the record in the queue file, and between the two the intent."""

    def __init__(self, site: Site, tally: Tally):
        self.store, self.settings, self.target = site
        self.tally = tally
        # what kept the last one from the target, and what only a person can do
        self.trouble = None

    def land(self, tasks: list[Task], steps: list[Step], base: str) -> bool:
        """Move the target from `base` to the last step's tested commit, the intent durable
        first, then record what landed; False when it did not move.

        Between the swap in git and the record in the queue file only the intent knows which
        commit is whose: with a squash or a rebase the entry's own commit is not in the target.
        """
        intent = {
            "schema": SCHEMA,
            "target": self.target,
            "old": base,
            "new": steps[-1].commit,
            "entries": [[step.id, step.commit] for step in steps],
            "works": [task.commit for task in tasks],
        }
        # before the swap: a kill behind it leaves a target that has moved, and this says for whom
        self.store.write_json(INTENT_FILE, intent)
        return self.finish(intent)

    def finish(self, intent: dict) -> bool:
        """The swap and the record; safe to repeat after a crash at any point."""
        self.trouble = None
        remote = ["-r", self.settings.remote] if self.settings.remote else []
        # In a session of its own: a Ctrl-C or a kill of our group must not leave half a checkout.
        result = run_script(
            "merge/land.sh",
            *self.arguments(intent),
            *remote,
            allow=(0, 4, 5),
            detach=True,
            env={"FARM_REMOTE_SECONDS": f"{self.settings.remote_timeout:.0f}"},
            timeout=3600,
        )
        if result.code == 0:
            # of each entry the commit before it: what `revert` and `diff` of it begin from
            befores = [intent["old"], *(commit for _, commit in intent["entries"])]
            works = intent.get("works") or [None] * len(befores)
            self.record(
                [
                    (*entry, before, work)
                    for entry, before, work in zip(intent["entries"], befores, works, strict=False)
                ]
            )
        elif (
            result.code == 4
            and show_tip(self.store.repo, f"refs/heads/{intent['target']}").commit == intent["old"]
        ):
            # Our target is where it was, so it is the remote's branch that has moved.
            self.trouble = self.catch_up(intent["target"])
        elif result.code == 5:
            self.trouble = describe_block(intent["target"], result)
        # It landed, or nothing was changed. An exit code other than these has raised: then the
        # intent stays for `recover`.
        self.store.disk.unlink(self.store.path(INTENT_FILE))
        if result.code == 0:
            self.tell_forge(result.stderr)
        return self.trouble is None

    def tell_forge(self, said: str) -> None:
        """One pull request for all that the target has beyond the remote's own branch; no landing
        fails for it."""
        if not self.settings.pull_request or not self.settings.remote:
            return
        try:
            said += run_script(
                "merge/pull-request.sh",
                "-C",
                self.store.repo,
                "-b",
                self.target,
                "-r",
                self.settings.remote,
                timeout=120,
                detach=True,
            ).stdout
        except FarmError as error:
            said += f"no pull request: {error}"
        for line in filter(None, said.splitlines()):
            say(printable(line))

    # Never a merge of the two: that would be a commit whose tree no gate has seen.
    def catch_up(self, target: str) -> tuple[str, str] | None:
        """Somebody has pushed: where our target is only behind, it moves to what the remote has,
        as in a landing, and all that is ready is merged and gated on that. Else what a person
        must do.
        """
        repo, remote = self.store.repo, self.settings.remote
        fetch = ("merge/fetch-branch.sh", "-C", repo, "-b", target, "-r", remote)
        fetched = run_script(*fetch, timeout=self.settings.remote_timeout, detach=True)
        row = fetched.rows[0]
        if row[0] == "same":
            return None
        if row[0] != "behind":
            return (
                f"{target} here has commits that {remote}/{target} has not, so nothing can be "
                f"pushed with them unseen",
                f"git -C {shell_word(repo)} push {remote} {target}, or take them out; the queue "
                f"goes on by itself",
            )
        ours = show_tip(repo, f"refs/heads/{target}").commit
        move = ("merge/land.sh", "-C", repo, "-b", target, "-o", ours, "-n", row[1])
        result = run_script(*move, allow=(0, 4, 5), detach=True)
        if result.code == 5:
            return describe_block(target, result)
        say(
            f"{target} is at {row[1][:10]} now, as somebody has pushed it to {remote}; what is "
            f"ready is gated on that"
        )
        return None

    def arguments(self, intent: dict) -> list[str]:
        return [
            "-C",
            self.store.repo,
            "-b",
            intent["target"],
            "-o",
            intent["old"],
            "-n",
            intent["new"],
        ]

    def record(self, entries: list[tuple[str, str, str, str | None]]) -> None:
        """Move each (id, commit, the commit before it, the commit that was submitted) from ready
        to landed; those recorded before a crash are passed over, and what was submitted anew is."""
        with self.store.transaction() as tx:
            for task_id, commit, before, work in entries:
                task = tx.state.ready.get(task_id) or tx.state.pending.get(task_id)
                if task is None:
                    continue
                # what was canceled or returned a moment too late is in the target all the same, and
                # said to be
                is_back = task.state == "pending" and task.ended_by == "return"
                is_meant = task.state == "ready" and work in (None, task.commit)
                if not (is_meant or is_back or task.state == "canceled"):
                    continue
                tx.move(
                    task._replace(
                        state="landed",
                        landed_commit=commit,
                        landed_from=before,
                        landed_at=utc_now(),
                        # what was asked is in the history; a year's archive would grow by it
                        prompt="",
                        reason="",
                    ),
                    "landed",
                    "landed",
                )
                self.tally.note(task_id, "landed", commit[:10])
                say(f"landed {task_id} {commit[:10]} {printable(task.title)}")

    def recover(self) -> None:
        """Finish a landing that was cut short. Before the swap it is dropped where its commits
        are gone, or where an entry was canceled or submitted anew meanwhile, which may be days:
        the next tick plans anew, and no gate runs twice.
        """
        intent = self.store.read_json(INTENT_FILE)
        if not intent:
            return
        wait_for_landing(intent["new"])
        found = run_script("merge/land.sh", "recover", *self.arguments(intent), allow=(0, 3))
        ready = self.store.snapshot().ready
        # another where one was canceled, returned or submitted anew since; the version before has
        # written none, and is planned anew, too
        now = [getattr(ready.get(task_id), "commit", "") for task_id, _ in intent["entries"]]
        goes_on = found.code == 0 and (
            found.stdout.startswith("landed") or now == intent.get("works")
        )
        what = "finished now" if goes_on else "planned anew"
        say(f"a landing that was cut short is {what}: {intent['old'][:10]} -> {intent['new'][:10]}")
        if goes_on:
            self.finish(intent)
        else:
            self.store.disk.unlink(self.store.path(INTENT_FILE))


class Returns:
    """Work that cannot land: its commits pinned, what is wrong in returns/, the task given back."""

    def __init__(self, site: Site, tally: Tally):
        self.store, self.target, self.tally = site.store, site.target, tally

    def send_back(
        self, task: Task, reason: str, detail: str, *, goes_on: bool = True, counts: bool = True
    ) -> bool:
        """Pin the commits, keep the detail in returns/, and give the task back; True, for
        something has moved.

        goes_on: the next attempt starts from the task's own commits, where they could be pinned;
        else from the target. counts: whether it was an attempt.
        """
        attempt = task.attempts + counts
        # Pin, text, move: the next attempt can only be claimed after the move, and then finds both.
        # A kill before it repeats them.
        # where no attempt is counted its number comes again: the rev keeps the two pins apart
        ref = f"refs/farm/returned/{task.id}/{attempt}" + f".{task.rev}" * (not counts)
        pinned = (
            run_script(
                "merge/pins.sh", "set", "-C", self.store.repo, ref, task.commit, allow=(0, 3)
            ).code
            == 0
        )
        name = f"returns/{task.id}.{attempt}.txt"
        self.store.write_durably(name, f"{reason}\n{detail}\n".encode("utf-8", "replace"))
        with self.store.transaction() as tx:
            current = tx.state.ready.get(task.id)
            # canceled, or submitted anew: this verdict was not about that
            if current is None or current.rev != task.rev:
                return True
            start = f"refs/heads/{self.target}" if not goes_on else ref if pinned else ""
            back = TaskQueue(tx).give_back(current, reason, "return", start=start, counts=counts)
        what = back.state if back.state == "failed" else "returned"
        self.tally.note(task.id, what, reason)
        say(f"returned {task.id}: {printable(reason)}")
        return True

    def send_back_broken(self) -> bool:
        """Send back the ready tasks of which git cannot read every object; whether there were any.

        Git does not fsync loose objects, so a power cut can leave a durable pin on a commit
        whose files are empty.
        """
        ready = self.store.snapshot().ready
        lines = "".join(f"{task.id}\t{task.commit}\n" for task in ready.values())
        found = run_script(
            "merge/look.sh",
            "broken",
            "-C",
            self.store.repo,
            "-b",
            self.target,
            stdin=lines,
            allow=(0, 1, 3),
        )
        for task_id, said in found.rows:
            task = ready[task_id]
            reason = (
                f"git cannot read all of its commit {task.commit[:10]} "
                "(a power cut, or a disk that was full?)"
            )
            self.send_back(task, reason, said, goes_on=False)
        return bool(found.stdout)

    # After the task went back, so that a diagnosis keeps nobody waiting: it is a help, not a
    # proof.
    def explain(self, task: Task, colour: str) -> None:
        """Add to the returned task what the lone run has shown."""
        partners = run_script(
            "merge/look.sh", "partners", "-C", self.store.repo, "-b", self.target, task.commit
        ).rows
        likely = f", most likely with {partners[0][0]} ({partners[0][1]})" if partners else ""
        words = (
            "by itself it is red, too: the fault is its own"
            if colour == "red"
            else f"by itself it is green: it does not go together with what has landed{likely}"
        )
        say(f"{task.id}: {words}")
        with open(
            self.store.path(f"returns/{task.id}.{task.attempt}.txt"), "a", encoding="utf-8"
        ) as file:
            file.write(f"\n{words}\n")
        with self.store.transaction() as tx:
            current = tx.state.pending.get(task.id)
            # nobody has begun the next attempt: it will read this
            if current and current.attempts == task.attempt:
                tx.move(
                    current._replace(reason=f"{current.reason}; {words}"), "pending", "diagnosed"
                )

    def describe(self, task: Task, step: Step) -> tuple[str, str]:
        """(reason, detail) of work that no chain can hold."""
        if step.status == "conflict":
            reason = f"it conflicts with {self.target} in {step.detail}"
            return reason, read_printable(self.store.path(f"returns/{task.id}.txt"))[:60_000]
        if step.status == "gitlink":
            return step.detail, (
                "Remove its .git and add its files; or make it a submodule (git submodule add URL "
                "PATH) and push its commit there; or take the link out again: git rm --cached PATH"
            )
        is_gone = step.status == "missing"
        what = "its commit is gone" if is_gone else f"it shares no history with {self.target}"
        return f"{what} ({task.commit[:10]})", ""


# ------------------------------------------------------------------------------------------- review
# What lands only when somebody has said yes to exactly that commit. It stays in the queue, gated
# alone on the target, and others land past it. (tests/rooms/test_steer_review.py)


def approve(store: Store, task_id: str, commit: str, by: str) -> Task:
    """Let a submitted commit (its beginning; empty: the one that is there) land. Raises Refused
    where it is another now."""
    with store.transaction() as tx:
        task = tx.state.get_task(task_id)
        if task.state != "ready" or not task.commit.startswith(commit):
            now = f"its commit is {task.commit[:10]} now" if task.state == "ready" else task.state
            raise Refused(
                f"{task_id} is no longer what was shown: {now}", f"./farm.py diff {task_id}"
            )
        if task.approved == task.commit:
            return task
        return tx.move(task._replace(approved=task.commit), "ready", "approved", by=by)


class Review:
    """Which entries wait for a yes, and what FARM_REVIEWER says of them: one at a time, in an empty
    folder, with no word about where the farm is.

    note_cost(task, log): a hook, called with what the command has printed.
    """

    def __init__(self, site: Site, returns: Returns, slots: Slots):
        self.store, self.settings, self.target = site
        self.returns, self.slots, self.note_cost = returns, slots, lambda task, log: None
        rule = self.settings.review.strip().lower()
        every, none = ("all", "yes", "1", "true", "on"), ("", "no", "0", "false", "off")
        self.globs = (
            []
            if rule in none
            else ["**"]
            if rule in every
            else re.split(r"[,\s]+", self.settings.review.strip())
        )
        self.base, self.paths = "", {}  # commit -> the files that it changes on that base
        self.gate, self.task = None, Task()  # the command at work, and on what
        self.silent = set()  # commits to which it has said neither yes nor no

    def is_wanted(self, task: Task, base: str) -> bool:
        """Whether the task may not land unseen on the commit `base`."""
        if not self.globs or task.approved == task.commit:
            return False
        if base != self.base:
            self.base, self.paths = base, {}
        if task.commit not in self.paths and self.globs != ["**"]:
            said = run_script(
                "merge/diff-work.sh",
                "-C",
                self.store.repo,
                "-n",
                "-b",
                base,
                task.commit,
                allow=(0, 3),
            )
            self.paths[task.commit] = [row[0] for row in said.rows[1:]]
        # one that cannot be read is for the merge queue to send back
        paths = self.paths.get(task.commit) or [""]
        return any(globs_overlap(glob, path) for glob in self.globs for path in paths)

    def go_on(self, tasks: list[Task]) -> bool:
        """Do what the command has said, or ask it about the next of `tasks`, whose gates are
        green; True when something has moved."""
        if self.gate is not None:
            if not self.gate.is_done:
                return False
            if self.take_answer(self.gate, self.task):
                return True
        left = [task for task in tasks if task.commit not in self.silent]
        if left and self.settings.reviewer:
            self.ask(left[0])
        return False

    def ask(self, task: Task) -> None:
        import shutil

        said = run_script(
            "merge/diff-work.sh", "-C", self.store.repo, "-b", self.target, task.commit
        )
        name = self.store.path(f"results/{task.commit[:16]}-review")
        write_whole(f"{name}.txt", printable(f"{task.title}\n\n{task.prompt}\n\n{said.stdout}"))
        folder = f"{self.slots.folder}/{REVIEWER}"
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        command = f"exec <{shell_word(name + '.txt')}; {self.settings.reviewer}"
        self.gate, self.task = Gate(0, (task.id,), task.commit, ""), task
        self.gate.start(
            folder, self.settings._replace(gate=command), f"{name}.log", self.slots.wake
        )

    def take_answer(self, gate: Gate, task: Task) -> bool:
        self.gate = None
        if gate.failure:
            raise gate.failure
        self.note_cost(task, gate.log)
        words = read_printable(gate.log).strip()[-8000:]
        if gate.verdict.exit_code == 1:  # it counts, or the two might go on for ever
            return self.returns.send_back(
                task, f"the reviewer says no: {one_line(words, 500)}", words
            )
        try:
            if gate.verdict.exit_code == 0:
                return bool(approve(self.store, task.id, task.commit, "reviewer"))
        except (Refused, NotFound) as error:
            say(str(error))
        self.silent.add(task.commit)
        say(
            f"{task.id}: the reviewer says neither yes nor no (exit code "
            f"{gate.verdict.exit_code}), so a person decides: {one_line(words, 200)}"
        )
        return False

    def stop(self) -> None:
        if self.gate is not None:
            self.gate.end_group()
            self.gate = None


# -------------------------------------------------------------------------------------- merge queue
# What is to be tested, landed and given back next. It computes everything anew from git and the
# queue file at each tick, and keeps only what cannot be computed: verdicts, and the intent of a
# landing that has begun. (tests/rooms/test_merge_queue.py, tests/rooms/test_merge_disturbed.py)

FIRST_LOOK_SECONDS = 4.0  # until the target is gated by itself: an `up` is often typed twice
# urgent work goes first, but a day of it keeps nobody waiting for a day
AGEING_SECONDS = 600.0


def merge_order(tasks: list[Task], now: float) -> list[Task]:
    """Priority, then first come; each AGEING_SECONDS of waiting lift an entry by one, so that
    none starves."""

    def key(task: Task) -> tuple:
        lifts = (now - epoch(task.submitted_at)) // AGEING_SECONDS
        return -task.priority - lifts, task.queue_seq

    return sorted(tasks, key=key)


# The order within a tick is the order of proofs: verdicts are recorded before anything is planned,
# what needs no gate moves before a plan, and each move ends the tick, as it changes the queue that
# all the rest was computed from.
class MergeQueue:
    """Lands ready tasks on the target, never through a red tree. Crash-only: durable are git,
    the queue file, the verdicts and the intent of a landing; everything else is computed again.
    """

    def __init__(self, store: Store, settings: Settings, target: str, slots_folder: str):
        self.store, self.settings, self.target = site = Site(store, settings, target)
        self.verdicts = Verdicts(store, settings.gate, settings.gate_env)
        self.chain = Chain(site, self.verdicts)
        self.slots, self.tally = Slots(store, settings, slots_folder), Tally()
        self.landing, self.returns = Landing(site, self.tally), Returns(site, self.tally)
        self.review = Review(site, self.returns, self.slots)
        self.waiting = {}  # id -> Task: what may not land unseen
        self.reviews = {}  # of these id -> commit of what is green
        self.begun_at = CLOCK.monotonic()
        # The tick's view, made anew each time:
        self.tasks = {}  # id -> Task: what is ready, in landing order
        self.held = {}  # id -> the entry that it is held behind
        self.trouble = None  # what only a person can mend, and how
        # What saves work from one tick to the next:
        self.front = []  # ids that were ever part of a test, in that order
        self.just_landed = None  # the Step where we have just put the target
        self.diagnoses = []  # returned entries that an idle slot may gate alone
        self.published = None
        self.is_watching = False  # whether it runs for ever
        self.knows_target = False  # whether the target was green once

    # -- one step

    def tick(self) -> bool:
        """One look at everything; True when something moved, so that another look is due at
        once."""
        self.trouble = None
        if self.reap_gates():
            return True
        self.order_tasks()
        # idle: not even a look at the target
        if not self.tasks and not self.slots.gates and not self.diagnoses:
            self.held, self.just_landed, self.reviews = {}, None, {}
            is_time = CLOCK.monotonic() - self.begun_at > FIRST_LOOK_SECONDS
            if self.is_watching and self.settings.gate and is_time and not self.knows_target:
                self.try_target()
            self.publish(())
            return False
        base = self.look_at_target().commit
        self.waiting = {
            task.id: task for task in self.tasks.values() if self.review.is_wanted(task, base)
        }
        steps = self.chain.build_all(self.waiting)
        if self.move_ungated(steps):
            return True
        self.held = {step.id: step.detail for step in steps if step.status == "held"}
        queue = tuple(step.id for step in steps if step.status == "ok")
        answer = self.plan(queue)
        moved = self.follow(answer, queue) or self.tend_waiting(not answer.tests)
        self.publish(queue)
        return moved

    def tend_waiting(self, is_idle: bool) -> bool:
        """Gate what waits for a yes, each entry alone on the target, in idle slots; send back what
        is red, ask about what is green. That is shown for as long as its commit waits."""
        commits = {task_id: task.commit for task_id, task in self.waiting.items()}
        self.reviews = dict(self.reviews.items() & commits.items())
        reds = self.verdicts.reds_needed()
        running = [gate.ids for gate in self.slots.gates if self.is_current(gate)]
        for task_id, task in self.waiting.items():
            # the others go first: this one may be one of a hundred
            if any(gate.is_done for gate in self.slots.gates) or self.move_ungated(
                self.chain.build([task])
            ):
                return True
            answer = plan((task_id,), self.chain.evidence_of, 1, 0.5, reds=reds)
            if answer.land:
                self.reviews[task_id] = task.commit
            elif answer.guilty:
                return self.return_red(task_id, (task_id,))
            elif is_idle and not self.trouble:
                self.start_tests([ids for ids in answer.tests if ids not in running])
        return self.review.go_on([self.waiting[task_id] for task_id in self.reviews])

    def try_target(self) -> None:
        """Gate the target as it is, before there is any work: a gate that is wrong shows in the
        first minute."""
        base = self.look_at_target()
        found = self.verdicts.evidence(base.tree)
        self.knows_target = bool(found.greens)
        if found.reds >= TARGET_REDS:
            self.trouble = self.chain.describe_red_base()
        elif not found.greens:
            self.start_gate((), base)

    def look_at_target(self) -> Step:
        """Where the target is now: what is ready is merged on that."""
        # A person's commit shows at the latest when the swap is refused; so right after our own
        # landing nobody need ask git.
        base = self.just_landed or show_tip(self.store.repo, f"refs/heads/{self.target}")
        self.just_landed = None
        self.chain.begin(base, self.tasks)
        self.verdicts.review(base.tree)
        return base

    def order_tasks(self) -> None:
        """Ready tasks in landing order. What was ever part of a test keeps its place in front:
        new work, however urgent, makes no running gate worthless.
        """
        ready = self.store.snapshot().ready
        self.front = [task_id for task_id in self.front if task_id in ready]
        rest = merge_order(
            [task for task in ready.values() if task.id not in self.front], CLOCK.now()
        )
        self.tasks = {
            task.id: task for task in [*(ready[task_id] for task_id in self.front), *rest]
        }

    def plan(self, queue: tuple) -> Plan:
        """Ask the planner; end gates on trees that no branch of its decision tree needs any
        more."""
        for gate in self.slots.gates:
            if not gate.diagnosis:
                gate.ids = tuple(task_id for task_id in gate.ids if task_id in self.tasks)
        apart = [
            gate
            for gate in self.slots.gates
            if gate.diagnosis or not self.waiting.keys().isdisjoint(gate.ids)
        ]
        running = tuple(
            gate.ids for gate in self.slots.gates if gate not in apart and self.is_current(gate)
        )
        red = self.tally.counts["red"]
        answer = plan(
            queue,
            self.chain.evidence_of,
            self.slots.number - len(apart),
            failure_rate(red, self.tally.counts["landed"] + red),
            running,
            reds=self.verdicts.reds_needed(),
            strict=self.settings.strict,
        )
        for gate in self.slots.gates:
            if not gate.diagnosis and (gate.ids in answer.abandon or not self.is_current(gate)):
                gate.is_abandoned = True
                gate.end_group()
        return answer

    def is_current(self, gate: Gate) -> bool:
        """Whether the gate's tree is still that of its entries on the target as it is now."""
        step = None if gate.diagnosis else self.chain.known_step(gate.ids)
        return step is not None and any(tree == gate.tree for _, tree in self.chain.line_of(step))

    def follow(self, answer: Plan, queue: tuple) -> bool:
        """Do what the plan says: land, else return the guilty, else start gates."""
        if answer.target_red:
            self.trouble = self.chain.describe_red_base()
            return False
        if answer.land:
            return self.land(queue[: answer.land])
        if answer.guilty:
            return self.return_red(answer.guilty, queue)
        self.start_tests(answer.tests)
        # only where nothing that could land is kept waiting
        while self.diagnoses and self.slots.is_free() and not answer.tests:
            self.diagnose(self.diagnoses.pop(0))
        return False

    def start_tests(self, tests) -> None:
        """Gates for these tests, as far as slots are free."""
        short = find_shortage(self.store.folder, self.settings.min_free_mib) if tests else ""
        if short:  # a gate that dies of it would say nothing about its tree
            self.trouble = (
                f"no gate starts: {short}",
                "free some, and it goes on by itself; or lower FARM_MIN_FREE_MIB",
            )
            return
        for ids in tests:
            place = self.chain.step_of(ids)
            if place is not None and self.slots.is_free():
                self.start_gate(ids, place)

    def move_ungated(self, steps: list[Step]) -> bool:
        """What needs no gate: work that is in the target already lands, work that cannot be
        merged goes back."""
        over = [step for step in steps if step.status not in ("ok", "held")]
        for step in over:
            task, base = self.tasks[step.id], self.chain.base.commit
            if step.status in ("landed", "empty"):
                places = (task.commit, "") if step.status == "landed" else (base, base)
                self.landing.record([(task.id, *places, None)])
            else:
                self.returns.send_back(task, *self.returns.describe(task, step))
        return bool(over)

    def start_gate(self, ids: tuple, step: Step, diagnosis: Task | None = None) -> None:
        """A gate on the tree of `ids` on the target, or on a returned entry's own."""
        commit, tree = self.chain.next_to_gate(step)
        self.slots.start(ids, commit, tree, self.verdicts.log_of(tree), diagnosis)
        self.front += [task_id for task_id in ids if task_id not in self.front]
        self.tally.counts["gates"] += not diagnosis

    def reap_gates(self) -> bool:
        """Judge the gates that are over."""
        over = self.slots.reap()
        for gate in over:
            if not gate.is_abandoned:
                self.judge(gate)
        return bool(over)

    def judge(self, gate: Gate) -> None:
        """Record a gate's verdict, and say what follows at once."""
        verdict = self.slots.judge(gate)
        # Durable before anything is done because of it: after a kill the next merger comes to the
        # same conclusions.
        before = self.verdicts.evidence(gate.tree)
        self.verdicts.record(gate.tree, verdict)
        after = self.verdicts.evidence(gate.tree)
        self.slots.note_end(gate, verdict)
        if gate.diagnosis:
            if verdict.colour != "none":
                self.returns.explain(gate.diagnosis, verdict.colour)
        elif verdict.colour == "none":
            say(f"{verdict.note} ({', '.join(gate.ids) or self.target}, tree {gate.tree[:10]})")
            self.verdicts.hold_red(gate.tree, verdict)
        elif after.greens and after.reds and not (before.greens and before.reds):
            told = self.verdicts.told_by(gate.tree)
            say(
                f"flaky gate: tree {gate.tree[:10]} was both green and red{told}; nobody's work "
                f"goes back for it"
            )

    def land(self, ids: tuple) -> bool:
        """Move the target to the tested commit of `ids`."""
        tasks = [self.tasks[task_id] for task_id in ids]
        steps = self.chain.build(tasks)
        has_moved = self.landing.land(tasks, steps, self.chain.base.commit)
        self.trouble, self.just_landed = self.landing.trouble, None
        if not has_moved:
            return False
        if steps[-1].id in self.store.snapshot().ready:
            self.knows_target = False  # we have caught up with the remote: the base is another one
        else:
            self.just_landed = steps[-1]._replace(status="-")
        return True

    def return_red(self, task_id: str, queue: tuple) -> bool:
        """Send back the entry whose step turned a green tree red, twice."""
        task, ids = self.tasks[task_id], queue[: queue.index(task_id) + 1]
        step, gate = self.chain.step_of(ids), self.settings.gate
        commit, tree = self.chain.next_to_gate(step)
        how = (
            f"to reproduce: git worktree add --detach ../try-{task_id} {commit[:12]} && cd "
            f"../try-{task_id} && "
            f"bash -c {shell_word(gate)}"
        )
        note = self.verdicts.silent.get(tree)
        if note is None:
            self.tally.counts["red"] += 1
            # a lone run looks at the last commit, and says nothing of those before it
            if tree == step.tree:
                self.diagnoses.append(task)
        what = "with it"
        if tree != step.tree:
            what = "at one of its commits before the last, and each must pass by itself (strict)"
        return self.returns.send_back(
            task, note or f"the gate fails {what}: {gate}", how + "\n\n" + self.verdicts.tail(tree)
        )

    def diagnose(self, task: Task) -> None:
        """In an idle slot, gate a returned entry alone, on its own base: is it red without the
        others, too?"""
        own = show_tip(self.store.repo, task.commit)
        known = self.verdicts.evidence(own.tree)
        if known.greens or known.reds:
            self.returns.explain(task, "green" if known.greens else "red")
        else:
            self.start_gate((), own, diagnosis=task)

    # -- recovery, and what others may see

    def recover(self) -> None:
        """Before anything else: end gates of a dead merger, finish or undo a landing that was
        cut short, pin what is ready."""
        self.slots.recover()
        self.landing.recover()
        pins = "".join(
            f"refs/farm/ready/{task.id} {task.commit}\n"
            for task in self.store.snapshot().ready.values()
        )
        pinned = run_script(
            "merge/pins.sh", "many", "-C", self.store.repo, stdin=pins, allow=(0, 1)
        )
        if pinned.code:  # no reason to land nothing
            say(str(script_error("merge/pins.sh", pinned)))

    def publish(self, queue: tuple) -> None:
        """What is being done right now, for `queue` and `status`; worth nothing once this
        process is gone."""
        data = {
            "schema": SCHEMA,
            "pid": os.getpid(),
            "start": start_of(os.getpid()),
            "target": self.target,
            "order": list(queue),
            "testing": [gate.named() for gate in self.running()],
            "held": self.held,
            "reviews": self.reviews,
            "trouble": list(self.trouble or ()),
            "gates": self.tally.counts["gates"],
        }
        if data != self.published:
            self.published = data
            write_object(self.store.path(NOW_FILE), data)

    def is_drained(self) -> bool:
        left = self.store.snapshot().ready.keys() - self.reviews.keys()
        return not (self.running() or self.diagnoses or left)

    def stop(self) -> None:
        """End what runs for us: it gave no verdict."""
        self.review.stop()
        self.slots.stop()

    def show_failure(self, error: FarmError) -> None:
        """End what runs after an error, and show it to `queue` and `status`. The next tick begins
        as after a crash, from disk."""
        try:
            self.stop()
        except FarmError:  # a gate that cannot be ended: the recovery tries it again, and says so
            self.slots.gates = []
        self.just_landed = None
        # merged in memory, and on no ref: somebody may have had it pruned (git gc --prune=now)
        self.chain.steps.clear()
        self.trouble = str(error), error.hint or "./farm.py doctor"
        self.publish(())

    def running(self) -> list:
        """The gates that run, and the reviewer's command."""
        return [gate for gate in (*self.slots.gates, self.review.gate) if gate]


class Merger:
    """Runs a merge queue until it is drained, or for ever."""

    def __init__(self, queue: MergeQueue, *, forever: bool):
        self.queue, self.forever = queue, forever
        if forever:  # nobody will ask what has moved, and it would be as long as the farm lives
            queue.tally.moved = deque(maxlen=0)
        self.is_recovered = False  # whether what a killed merger left has been seen to
        queue.is_watching = forever

    def run(self, should_stop) -> None:
        """Tick until drained, or until only a person can help. should_stop: a StopRequest.

        Raises FarmError; for ever, that is a trouble like others: shown, and tried again after 2
        s, 4 s ... a minute.
        """
        self.queue.slots.wake, failures = should_stop.wake, 0
        while not should_stop.is_set():
            try:
                has_moved, failures = self.try_tick(), 0
            except FarmError as error:
                if not self.forever:
                    raise
                failures += 1
                say(f"{error}\n  try: {error.hint or './farm.py doctor'}")
                self.queue.show_failure(error)
                self.is_recovered = False
                should_stop.wait(min(2.0**failures, 60))
                continue
            if has_moved:
                continue
            if not self.forever and (self.queue.is_drained() or self.queue.trouble):
                return
            self.wait(should_stop)

    def try_tick(self) -> bool:
        """A tick, after a recovery where one is due. When a script failed on work that git
        cannot read, that work goes back and the rest goes on.
        """
        # at a merger's first tick, and after each error: what failed may have left a landing half
        # done
        if not self.is_recovered:
            self.queue.recover()
        self.is_recovered = True
        try:
            return self.queue.tick()
        except FarmError:
            if not self.queue.returns.send_back_broken():
                raise
            return True

    def wait(self, should_stop) -> None:
        """Until a move is made or a gate is over; a person's commit, or a file taken out of the
        way, tells nobody, so 5 s at most."""
        store = self.queue.store
        seen = store.signature()

        def is_due() -> bool:
            return (
                should_stop.is_set()
                or seen != store.signature()
                or any(gate.is_done for gate in self.queue.running())
            )

        wait_for(is_due, 5, 0.1, should_stop.wait)


# The file outlives its merger; pid and start time say whether it still speaks for anybody.
def find_activity(store: Store) -> dict:
    """What a live merger is doing (merge_queue/now.json); empty when none runs."""
    now = store.read_json(NOW_FILE) or {}
    kinds = {
        "pid": int,
        "start": str,
        "target": str,
        "testing": list,
        "held": dict,
        "trouble": list,
    }
    gates = now.get("testing", [])
    if (
        not has_kinds(now, kinds)
        or not all(isinstance(gate, dict) and is_texts(gate.get("ids")) for gate in gates)
        or not is_texts(now["trouble"])
        or len(now["trouble"]) not in (0, 2)
    ):
        return {}  # nobody's truth: the merger writes it anew
    return now if start_of(now["pid"]) == now["start"] else {}


# The file is as old as the merger's last tick: a yes, or another commit, that has come since
# counts.
def find_reviews(store: Store, state: State) -> dict[str, str]:
    """id -> commit of what is green and waits for a yes, as the merger has found it last."""
    told = object_of(read_object(store.path(NOW_FILE)).get("reviews"))
    return {
        task.id: task.commit
        for task in state.ready.values()
        if told.get(task.id) == task.commit != task.approved
    }


QUEUE_KEYS = ("id", "state", "branch", "commit", "agent", "reason", "title", "submitted_at")


def queue_records(store: Store, state: State) -> list[dict]:
    """The merge queue in landing order, with what is derived: testing, held behind whom, and what
    waits for a review."""
    activity = find_activity(store)
    testing = {task_id for gate in activity.get("testing", []) for task_id in gate["ids"]}
    held, reviews = activity.get("held", {}), find_reviews(store, state)
    records = []
    for task in merge_order(list(state.ready.values()), CLOCK.now()):
        shown = "testing" if task.id in testing else "held" if task.id in held else "ready"
        shown = "review" if task.id in reviews else shown
        behind = f"held behind {held[task.id]}" if task.id in held else ""
        record = pick(task._asdict(), QUEUE_KEYS)
        records.append({**record, "state": shown, "reason": behind or task.reason})
    return records


def describe_queue(state: State, records: list[dict], activity: dict) -> str:
    """One line, such as `landed 12, returned 2, testing 3 (main+8), held 1 behind t-0031`, and
    what is next."""
    counts = Counter(record["state"] for record in records)
    returned = sum(task.ended_by == "return" for task in state.pending.values())
    parts = [f"landed {state.count_landed()}", f"returned {returned}"]
    largest = max((len(gate["ids"]) for gate in activity.get("testing", [])), default=0)
    if activity.get("testing"):
        parts.append(f"testing {len(activity['testing'])} ({activity['target']}+{largest})")
    # by the records: the activity was read at another moment, and may know of none that is held
    if held := [record["reason"] for record in records if record["state"] == "held"]:
        parts.append(f"held {len(held)} {held[0].removeprefix('held ')}")
    if counts["review"]:
        parts.append(f"review {counts['review']}")
    waiting = [record["id"] for record in records if record["state"] == "ready"]
    if waiting:
        parts.append(f"ready {len(waiting)}, next {waiting[0]}")
    trouble = activity.get("trouble")
    return " \u00b7 ".join(parts) + (f"\n{trouble[0]}\n  try: {trouble[1]}" if trouble else "")


# =================================================================================== PART IV Agents

# -------------------------------------------------------------------------------------- coding CLIs
# What the farm knows of coding CLIs, a class each: how one starts and goes on, how its end and its
# use of tokens are read, what it would ask. No other room knows one by name. The facts are those
# of the version in `checked`; recordings of them: tests/stand_ins/recorded.
# (tests/rooms/test_presets.py, tests/rooms/test_recorded.py)

# a hook of the user's may take its time; a pinentry that nobody sees waits for ever
COMMIT_SECONDS = 120.0
TURN_FILE, ENDING_FILE, COST_FILE = "turn.json", "ending.json", "cost.json"

Usage = namedtuple(
    "Usage",
    "tokens_in tokens_out cost_usd error denied conversation",
    defaults=(0, 0, 0.0, "", "", ""),
)


# bool is left out by type(), text and null by both: a CLI's file may hold anything
def dollars_of(value) -> float:
    return float(value) if type(value) in (int, float) else 0.0


def text_of(message: dict) -> str:
    parts = message.get("content")
    if not isinstance(parts, list):
        return str(parts)
    return " ".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


# What an agent may run unasked whatever FARM_PERMISSIONS says: it can work, commit and hand in
# without a person. Push, checkout and reset are not among these.
ALLOWED_VERBS = ("submit", "fail", "lock", "unlock", "renew", "add")
ALLOWED_GIT = (
    "status",
    "diff",
    "log",
    "show",
    "add",
    "commit",
    "rm",
    "mv",
    "restore",
    "merge",
    "rebase",
    "cherry-pick",
)
# for a shell to fill in: one settings file serves all agents
MAILBOX = "$FARM_REPO/coordination/mailbox/$FARM_AGENT_NAME"

# by which CLIs that are no provider's own pay; claude, codex and gemini get theirs by pattern
PROVIDER_KEYS = ("ANTHROPIC_API_KEY", "OPENAI_API_KEY", "GEMINI_API_KEY", "OPENROUTER_API_KEY")

# preset: a name in CLIS, or empty for a command
Launch = namedtuple("Launch", "preset start resume")


class Cli:
    """A coding CLI that the farm knows by name. A new one is a class here, and its name in CLIS;
    files of its that hold a login belong into the secrets of scripts/isolate.sh, which hides them
    from agents of other CLIs. scripts/README.md and the Makefile list the names for people.

    start, resume: run by bash in the worktree, `{permissions}` replaced by the flags of
    FARM_PERMISSIONS. resume is empty where nobody can go on in a conversation. Where the text
    $FARM_CONVERSATION stands in start, the farm makes up the conversation's id; else `read` must
    return the one that the CLI has chosen.
    """

    name = start = resume = checked = ""
    headless = ""  # the preset of the same CLI that ends by itself, where this one does not
    permissions: dict[str, str] = {}
    # what it prints is kept, for `read`
    keeps_output = True
    # its hooks tell the farm of each turn, from the first on
    has_hooks = False
    # when a turn is over; else it stays at its prompt until it is ended
    ends_by_itself = True
    # the use of tokens that it tells is that of the conversation, not that of the attempt
    counts_conversation = False
    # where this stands in a command line, the CLI cannot write outside of its worktree
    sandbox_word = ""
    # between two starts: many at once meet in its files, and in its provider's limit
    stagger_seconds = 1.0
    # what a sandbox lets it write, below HOME (NAME/: a folder that is made; -NAME: only read),
    # what is run before it there, and the variables that come along, also with *
    state: tuple[str, ...] = ()
    prelude = ""
    passes = ("*_proxy", "*_PROXY", "SSL_CERT_*", "NODE_EXTRA_CA_CERTS")

    def launch(self, permissions: str) -> Launch:
        """How it is run with these permissions: ask, edits, all. A sandbox of its own is left off
        in ours, where it could not be made: `permissions` has that under "isolated"."""
        flags = self.permissions.get(permissions, "")
        # its sandbox would need user namespaces within ours
        if is_isolated() and self.sandbox_word and self.sandbox_word in flags:
            flags = self.permissions["isolated"]
        # pipefail: else the exit code would be tee's, and each attempt a success
        frame = 'set -o pipefail; {{ {}; }} | tee "$FARM_OUTPUT"' if self.keeps_output else "{}"
        frame = self.prelude + frame if is_isolated() else frame
        start, resume = (
            frame.format(text.replace("{permissions}", flags)) if text else ""
            for text in (self.start, self.resume)
        )
        return Launch(self.name, start, resume)

    def program(self) -> str:
        return self.start.removeprefix("exec ").split()[0]

    def chooses_conversation(self) -> bool:
        return "$FARM_CONVERSATION" in self.start

    def has_conversation(self, conversation: str) -> bool:
        """Whether it still knows a conversation that was begun."""
        return True

    def can_resume(self, claim: Claim) -> bool:
        """Whether the claim's conversation is one that was interrupted, so that it goes on in
        it."""
        conversation = claim.task.get("conversation", {})
        # `until` is written when an attempt is interrupted: a new task's id has named nothing yet
        is_begun = self.resume and conversation.get("id") and "until" in conversation
        return bool(is_begun and self.has_conversation(conversation["id"]))

    def read(self, path: str) -> Usage:
        """What a file that it wrote tells of its use of tokens, and of the error at its end."""
        return Usage()

    def read_attempt(self, output: str, conversation: str) -> Usage:
        """What an attempt has used so far. output: where what it printed is kept."""
        return self.read(output)

    def read_session(self, home: str, pid: int) -> dict:
        """{"status", "statusUpdatedAt" (ms)}, what it says itself of a process at work; empty
        when that is nothing."""
        return {}

    def read_event(self, event: dict) -> tuple[str, str]:
        """(state, message) of a turn as its hook tells it; ("", "") when that is nothing."""
        return "", ""

    def read_cost(self, path: str, conversation: str) -> float:
        """Dollars of a conversation at work, from the file where it tells that."""
        return 0.0

    def find_blockers(self, repo: str, settings: Settings) -> Advice:
        """(what, what to type) of what it would ask at its first start, where nobody is there
        to answer."""
        return []


def state_in(folder: str, obeyed: str) -> tuple[str, ...]:
    """A CLI's `state` that is one folder, but for what it runs or obeys of it outside, too."""
    return (folder + "/", *(f"-{folder}/{name}" for name in obeyed.split()))


class ClaudeCode(Cli):
    """Claude Code at its prompt; hooks in --settings tell the farm of its turns."""

    name, headless, checked = "claude", "claude-print", "2.1.330"
    options = '--settings "$FARM_CLI_SETTINGS" {permissions} -- "$FARM_PROMPT"'
    start = f'exec claude --session-id "$FARM_CONVERSATION" {options}'
    resume = f'exec claude --resume "$FARM_CONVERSATION" {options}'
    permissions = {
        "ask": "--permission-mode default",
        "edits": "--permission-mode acceptEdits",
        "all": "--dangerously-skip-permissions",
    }
    keeps_output = ends_by_itself = False
    has_hooks = counts_conversation = True
    tokens_in = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    # its hooks' events that tell of a turn
    turn_states = {
        "UserPromptSubmit": "working",
        "PostToolUse": "working",
        "PermissionRequest": "waiting",
        "Notification": "waiting",
        "PostToolUseFailure": "working",
        "Stop": "over",
        "StopFailure": "over",
    }
    # HOME cannot be written, where it would replace .claude.json: it keeps that in its folder
    own = given("CLAUDE_CONFIG_DIR") or ".claude"
    obeyed = "settings.json CLAUDE.md hooks/ commands/ agents/ skills/ plugins/"
    state = (*state_in(own, obeyed), "-.claude.json")
    prelude = (
        '[ "${{CLAUDE_CONFIG_DIR-}}" ] || {{ export CLAUDE_CONFIG_DIR=$HOME/.claude; '
        'own=$CLAUDE_CONFIG_DIR/.claude.json; [ "$HOME/.claude.json" -ot "$own" ] || '
        '{{ cp "$HOME/.claude.json" "$own.$FARM_AGENT_NAME" && '
        'mv -f "$own.$FARM_AGENT_NAME" "$own"; }}; }}; '
    )
    passes = (*Cli.passes, "ANTHROPIC_*", "CLAUDE_*", "DISABLE_*", "IS_SANDBOX")

    @staticmethod
    def folder(home: str) -> str:
        return given("CLAUDE_CONFIG_DIR") or f"{home}/.claude"

    def find_transcript(self, conversation: str) -> str:
        """The file in which it keeps the conversation, below the HOME of the caller; empty when
        there is none."""
        import glob

        # below projects/ each worktree has a folder whose name is Claude Code's own business: any
        # will do
        folder = glob.escape(self.folder(os.path.expanduser("~")))
        pattern = f"{folder}/projects/*/{conversation}.jsonl"
        return next(iter(glob.glob(pattern)), "") if conversation else ""

    def has_conversation(self, conversation: str) -> bool:
        return bool(self.find_transcript(conversation))

    def read_attempt(self, output: str, conversation: str) -> Usage:
        return ClaudeCode.read(self, self.find_transcript(conversation))

    def read(self, path: str) -> Usage:
        """A conversation's own file. One message stands on several lines with the same usage: it
        counts once.

        cost-state lines, one at each orderly end, hold what the conversation has cost by then;
        after a kill -9 they begin at 0 again.
        """
        messages, error, earlier, cost = {}, "", 0.0, 0.0
        for item in read_json_lines(path):
            message = item.get("message")
            if item.get("type") == "cost-state":
                now = dollars_of(item.get("totalCostUSD"))
                earlier, cost = earlier + (cost if now < cost else 0.0), now
            if item.get("type") == "assistant" and isinstance(message, dict):
                messages[message.get("id")] = message.get("usage")
                # emptied by any answer that comes after it: only an error at the end is the
                # attempt's
                error = text_of(message) if item.get("isApiErrorMessage") else ""
        return Usage(
            sum(count(usage, *self.tokens_in) for usage in messages.values()),
            sum(count(usage, "output_tokens") for usage in messages.values()),
            earlier + cost,
            error,
        )

    def read_session(self, home: str, pid: int) -> dict:
        """From sessions/PID.json, when it is that of this very process."""
        told = read_object(f"{self.folder(home)}/sessions/{pid}.json")
        is_known = type(told.get("statusUpdatedAt")) is int
        # a file of that pid may be left from a process before the last reboot
        return told if is_known and told.get("procStart") == start_of(pid) else {}

    @classmethod
    def read_event(cls, event: dict) -> tuple[str, str]:
        """(state, message) of a turn as a hook's event tells it; ("", "") for one that tells
        nothing. state: working, waiting (for a person), over.

        event: the hook's JSON (hook_event_name, message, error, tool_name, ...).
        """
        name = str(event.get("hook_event_name", ""))
        # of notifications only that of a dialog is a wait: others come late, when a permission was
        # given
        is_news = event.get("notification_type") != "elicitation_dialog"
        if name not in cls.turn_states or name == "Notification" and is_news:
            return "", ""
        asked = event.get("tool_input") or {}
        about = asked.get("command") or asked.get("file_path") or ""
        tool = f"{event['tool_name']} {about}" if event.get("tool_name") else ""
        message = str(event.get("message") or tool.strip())
        if event.get("error"):
            said = event.get("last_assistant_message") or event.get("error_details") or ""
            message = f"{event['error']}: {said}"
        return cls.turn_states[name], one_line(message, 300)

    def read_cost(self, path: str, conversation: str) -> float:
        """From what its status line was told."""
        told = read_object(path)
        # the file may still hold what the conversation before this one has cost
        cost = told.get("cost") if told.get("session_id") == conversation else None
        return dollars_of(object_of(cost).get("total_cost_usd"))

    def find_blockers(self, repo: str, settings: Settings) -> Advice:
        if settings.agent_home:  # each agent has a HOME of its own, which a person has set up
            return []
        folder = given("CLAUDE_CONFIG_DIR") or os.path.expanduser("~")
        hint = f"cd {shell_word(repo)} && claude   (answer its questions once, then /exit)"
        blockers = [(what, hint) for what in self.find_questions(repo, folder)]
        if (
            settings.permissions == "all"
            and os.geteuid() == 0
            and not (is_isolated() or given("IS_SANDBOX"))
        ):
            blockers.append(
                (
                    "claude refuses permissions=all to root",
                    "work as another user, or: export IS_SANDBOX=1",
                )
            )
        return blockers

    @staticmethod
    def find_questions(repo: str, folder: str) -> list[str]:
        """What its .claude.json says that it would ask here."""
        try:
            with open(f"{folder}/.claude.json", encoding="utf-8") as file:
                told = json.load(file)
            projects, answers = told.get("projects") or {}, told.get("customApiKeyResponses") or {}
            trusted = (projects.get(repo) or {}).get("hasTrustDialogAccepted")
            key = given("ANTHROPIC_API_KEY")
            # of a key that was approved it keeps the last 20 characters
            key_is_known = not key or key[-20:] in (answers.get("approved") or [])
        except FileNotFoundError:
            told, trusted, key_is_known = {}, False, True
        except (OSError, ValueError, AttributeError, TypeError):
            return []  # a format that we do not know is no reason to stop anybody
        asks = (
            ("claude has not been set up for this user", told.get("hasCompletedOnboarding")),
            (f"claude does not trust {repo} yet", trusted),
            ("claude will ask about ANTHROPIC_API_KEY", key_is_known),
        )
        return [what for what, is_answered in asks if not is_answered]

    @staticmethod
    def hook_settings(settings: Settings) -> dict:
        """What `claude --settings` gets: the hooks that tell the farm, and the commands that it
        may run unasked.

        No file of the user's is changed. A hook must never exit 2, which would block the agent.
        PostToolUse matters only to an agent that waited for a person, and costs a grep otherwise.
        Where there is a budget, the status line tells the cost.
        """

        def hook(command: str) -> list:
            return [{"hooks": [{"type": "command", "command": command, "timeout": 20}]}]

        turn = f'"{MAILBOX}/{TURN_FILE}"'
        hooks = {event: hook("farm hook || true") for event in ClaudeCode.turn_states}
        for event in ("PostToolUse", "PostToolUseFailure"):
            hooks[event] = hook(f"! grep -qs '\"waiting\"' {turn} || farm hook || true")
        allowed = [f"Bash(farm {verb}:*)" for verb in ALLOWED_VERBS]
        allowed += [f"Bash(git {verb}:*)" for verb in ALLOWED_GIT]
        allowed += [f"Bash({settings.gate})"] if settings.gate else []
        # asked for by FARM_PERMISSIONS=all, and by nothing else
        data = {
            "hooks": hooks,
            "permissions": {"allow": allowed},
            "skipDangerousModePermissionPrompt": True,
        }
        if settings.budget or settings.task_budget:
            # only then, as it takes the place of the user's own status line
            data["statusLine"] = {"type": "command", "command": f'cat >"{MAILBOX}/{COST_FILE}"'}
        return data


class ClaudePrint(ClaudeCode):
    """Claude Code without a screen: it ends by itself, its result comes last."""

    name = "claude-print"
    command = "claude -p --output-format stream-json --verbose"
    start = f'{command} --session-id "$FARM_CONVERSATION" {ClaudeCode.options} </dev/null'
    resume = f'{command} --resume "$FARM_CONVERSATION" {ClaudeCode.options} </dev/null'
    keeps_output = ends_by_itself = True
    has_hooks = counts_conversation = False

    def read_attempt(self, output: str, conversation: str) -> Usage:
        spent = self.read(output)
        # one that was killed before it could tell has its conversation's file
        return spent if spent != Usage() else super().read_attempt(output, conversation)

    def read(self, path: str) -> Usage:
        """The last line, type result. A failed API call has subtype success and is_error."""
        result, stamp = {}, ""
        for item in read_json_lines(path):
            result = item if item.get("type") == "result" else result
            # the exact second of the reset stands in an event of its own, not in the words of the
            # error
            resets_at = object_of(item.get("rate_limit_info")).get("resetsAt")
            stamp = f"|{resets_at}" if type(resets_at) is int else stamp
        usage, denials = result.get("usage"), result.get("permission_denials")
        denied = (
            ", ".join(str(one.get("tool_name")) for one in denials if isinstance(one, dict))
            if isinstance(denials, list)
            else ""
        )
        return Usage(
            count(usage, *self.tokens_in),
            count(usage, "output_tokens"),
            dollars_of(result.get("total_cost_usd")),
            f"{result.get('result', '')}{stamp}" if result.get("is_error") else "",
            denied,
        )

    def find_blockers(self, repo: str, settings: Settings) -> Advice:
        return []


class Codex(Cli):
    name, checked = "codex", "0.169.0"
    start = 'codex exec --json {permissions} -- "$FARM_PROMPT" </dev/null'
    resume = 'codex exec {permissions} resume --json "$FARM_CONVERSATION" "$FARM_PROMPT" </dev/null'
    sandbox_word = "workspace-write"
    # Codex writes below its worktree only. A commit needs the worktree's own git dir, new objects,
    # its branch and that branch's log; the farm's moves need the mailbox.
    writable = ",".join(
        f'\\"{root}\\"'
        for root in (
            "$FARM_GIT_DIR",
            "$FARM_GIT/objects",
            "$FARM_GIT/refs/heads",
            "$FARM_GIT/logs",
            MAILBOX,
        )
    )
    permissions = {
        "ask": "--sandbox read-only",
        "all": "--dangerously-bypass-approvals-and-sandbox",
        "edits": f"--sandbox {sandbox_word} "
        f'-c "sandbox_workspace_write.writable_roots=[{writable}]"',
        "isolated": "--sandbox danger-full-access",
    }
    state = state_in(".codex", "config.toml AGENTS.md hooks.json prompts/ rules/ skills/")
    passes = (*Cli.passes, "OPENAI_*", "CODEX_*")
    counts_conversation = True

    def read(self, path: str) -> Usage:
        """turn.completed carries the thread's usage so far, turn.failed and error the message."""
        usage, error, thread = None, "", ""
        for item in read_json_lines(path):
            thread = str(item.get("thread_id") or thread)
            if item.get("type") == "turn.completed":
                # the sum so far: the last one counts, and a turn that ends well has got over its
                # errors
                usage, error = item.get("usage"), ""
            elif item.get("type") in ("turn.failed", "error"):
                inner = item.get("error")
                told = inner if isinstance(inner, dict) else item
                error = str(told.get("message") or inner)
        return Usage(
            count(usage, "input_tokens"),
            count(usage, "output_tokens"),
            error=error,
            conversation=thread,
        )


class Gemini(Cli):
    name, checked = "gemini", "0.61.0"
    options = '--skip-trust {permissions} --prompt="$FARM_PROMPT" </dev/null 2>&1'
    start = f'gemini -o json --session-id "$FARM_CONVERSATION" {options}'
    resume = f'gemini -o json --resume "$FARM_CONVERSATION" {options}'
    permissions = {
        "ask": "--approval-mode default",
        "edits": "--approval-mode auto_edit",
        "all": "--approval-mode yolo",
    }
    state = state_in(".gemini", "settings.json GEMINI.md .env commands/ extensions/")
    passes = (*Cli.passes, "GEMINI_*", "GOOGLE_*")

    def read(self, path: str) -> Usage:
        """One document with stats.models.NAME.tokens; or, behind stack traces, one with error."""
        try:
            text = "\n" + read_foreign(path, 1 << 30)
            # the last line that begins an object: 2>&1 puts warnings and stack traces before it
            told = json.JSONDecoder().raw_decode(text, text.rindex("\n{") + 1)[0]
            models, error = (told.get("stats") or {}).get("models") or {}, told.get("error") or {}
            tokens = [model.get("tokens") for model in models.values()]
            return Usage(
                sum(count(one, "prompt") for one in tokens),
                sum(count(one, "candidates", "thoughts") for one in tokens),
                error=str(error.get("message", "")),
                conversation=str(told.get("session_id") or ""),
            )
        except (OSError, ValueError, AttributeError):  # it was ended before it could tell
            return Usage()


class OpenCode(Cli):
    name, checked = "opencode", "1.18.33"
    command = "opencode run --format json {permissions}"
    start = f'{command} -- "$FARM_PROMPT" </dev/null'
    resume = f'{command} --session "$FARM_CONVERSATION" -- "$FARM_PROMPT" </dev/null'
    permissions = {"all": "--auto"}
    state = (
        *(".local/share/opencode/", ".local/state/opencode/"),
        *state_in(
            ".config/opencode",
            "opencode.json opencode.jsonc config.json AGENTS.md plugin/ plugins/ tool/ tools/",
        ),
    )
    passes = (*Cli.passes, *PROVIDER_KEYS, "OPENCODE_*")

    def read(self, path: str) -> Usage:
        """A step_finish part for each step with its tokens and cost; error events."""
        total, error, session = Usage(), "", ""
        for item in read_json_lines(path):
            part, session = item.get("part") or {}, str(item.get("sessionID") or session)
            if item.get("type") == "step_finish":
                tokens = part.get("tokens")
                total = Usage(
                    total.tokens_in + count(tokens, "input"),
                    total.tokens_out + count(tokens, "output"),
                    total.cost_usd + dollars_of(part.get("cost")),
                )
            elif item.get("type") == "error":
                error = dump_line(item.get("error"))[:300]
        return total._replace(error=error, conversation=session)


class Aider(Cli):
    name, checked = "aider", "0.86.2"
    start = (
        'aider --yes-always --no-check-update --no-pretty --message-file "$FARM_PROMPT_FILE" '
        "</dev/null"
    )
    keeps_output = False
    state, passes = (".aider/", "-.aider.conf.yml"), (*Cli.passes, *PROVIDER_KEYS, "AIDER_*")


# what runs when nobody names an agent, where it is on PATH
DEFAULT_CLI = ClaudeCode()


class Command(Cli):
    """Any other command: it tells nothing but its exit code; but one that takes the farm's hooks
    (claude in a wrapper, say) is believed."""

    keeps_output = ends_by_itself = False
    stagger_seconds = 0.0
    read_session, read_event = DEFAULT_CLI.read_session, DEFAULT_CLI.read_event
    read_cost = DEFAULT_CLI.read_cost

    def __init__(self, command: str):
        self.start = command

    def launch(self, permissions: str) -> Launch:
        return Launch("", self.start, "")

    def chooses_conversation(self) -> bool:
        return False


CLIS = {
    cli.name: cli for cli in (DEFAULT_CLI, ClaudePrint(), Codex(), Gemini(), OpenCode(), Aider())
}
# what the CLIs that take hooks are started with (cli-settings.json)
hook_settings = DEFAULT_CLI.hook_settings


def cli_of(agent: str) -> Cli:
    """The CLI of a preset's name, else the command as one that tells nothing."""
    return CLIS.get(agent) or Command(agent)


def read_mix(agent: str) -> list[str]:
    """A preset for each agent of a mix such as `claude:6,codex:4`; empty for a preset or
    command. Raises UsageError."""
    # a command may have colons and commas, too; only a whole mix is one
    if not re.fullmatch(r"[\w-]+:\d+(,[\w-]+:\d+)*", agent):
        return []
    shares = [share.split(":") for share in agent.split(",")]
    unknown = [name for name, _ in shares if name not in CLIS]
    if unknown:
        raise UsageError(f"there is no preset {unknown[0]!r}; there are {', '.join(CLIS)}")
    return [name for name, number in shares for _ in range(int(number))]


def count_agents(settings: Settings, wanted: int | None) -> int:
    """N: a mix names it by itself. wanted: what the command line says. Raises UsageError when
    they do not add up."""
    mix = read_mix(settings.agent)
    if mix and wanted not in (None, len(mix)):
        raise UsageError(
            f"{settings.agent} names {len(mix)} agents, and -n says {wanted}",
            f"./farm.py up -n {len(mix)}",
        )
    return len(mix) or settings.n


def share_agents(settings: Settings) -> list[str]:
    """What each agent runs, a preset's name or a command, in the order of their numbers."""
    return read_mix(settings.agent) or [settings.agent or DEFAULT_CLI.name] * settings.n


# Asked before ten sessions start that would all end at once. `type` and not `which`: the command
# is run by bash, and may be a builtin. A word with `$` or quotes in it is bash's business.
def check_command(agent: str, repo: str) -> None:
    """Raises MissingTool when the first word of a preset's or an agent's own command cannot be
    started; a path is looked up from the repo."""
    import subprocess

    command = CLIS[agent].program() if agent in CLIS else agent
    words = [word for word in command.split() if not re.match(r"[A-Za-z_]\w*=", word)]
    word = words[0].strip("'\"") if words else ""
    # scripts/ is first on PATH in a session, too: an agent may begin with `farm lock`
    look = f'PATH={shell_word(SCRIPTS)}:$PATH; type -t -- "$1" >/dev/null'
    found = subprocess.run([*shell(look), "bash", word], cwd=repo, timeout=10)
    if found.returncode and re.fullmatch(r"[\w./+-]+", word):
        where = f"not there (looked up in {repo})" if "/" in word else "not on PATH"
        raise MissingTool(
            f"the agent command {word!r} is {where}",
            "install it, or: ./farm.py up --agent 'COMMAND'",
        )


def is_sandboxed(command: str) -> bool:
    """Whether what this command starts cannot write to coordination/."""
    return any(cli.sandbox_word and cli.sandbox_word in command for cli in CLIS.values())


def resolve_agents(repo: str, settings: Settings) -> list[Launch]:
    """What each agent runs. Raises MissingTool when it cannot be started, Refused when it would
    wait for an answer, UsageError for a bad mix."""
    import shutil

    if not settings.agent and not shutil.which(DEFAULT_CLI.program()):
        raise MissingTool(
            f"no agent is named, and {DEFAULT_CLI.program()} is not on PATH",
            "make demo, or: ./farm.py up --agent 'COMMAND'",
        )
    shared = share_agents(settings)
    for agent in dict.fromkeys(shared):
        check_command(agent, repo)
    blockers = find_blockers(repo, settings, shared)
    if blockers:
        raise Refused(
            "; ".join(what for what, _ in blockers) + ": ten sessions would wait for an answer",
            blockers[0][1],
        )
    shares_home = given("FARM_ISOLATE") == "bwrap" and not settings.agent_home
    for path in find_linked_state(shared) if shares_home else ():
        word = shell_word(path)
        raise Refused(
            f"{path} is a link, in the place of which an agent could put another",
            f"cp -RL {word} {word}.new && rm {word} && mv {word}.new {word}",
        )
    return [cli_of(agent).launch(settings.permissions) for agent in shared]


def find_linked_state(shared: list[str]) -> list[str]:
    """What these CLIs obey, in folders that they may write: no sandbox can keep a link there."""
    obeyed = (name[1:] for agent in shared for name in cli_of(agent).state if name[0] == "-")
    paths = (
        os.path.join(os.path.expanduser("~"), name).rstrip("/") for name in obeyed if "/" in name
    )
    return [path for path in paths if os.path.islink(path)]


def find_blockers(repo: str, settings: Settings, shared: list[str]) -> Advice:
    """(what, what to type) of all that these CLIs would ask at their first start."""
    return [
        blocker
        for agent in dict.fromkeys(shared)
        for blocker in cli_of(agent).find_blockers(repo, settings)
    ]


# Beside the worktrees and in none of them: its files are no work, and the next task has them, too.
def agent_home(repo: str, settings: Settings, agent: str) -> str:
    """The HOME that an agent's CLI has."""
    return (
        f"{worktrees_folder(repo, settings)}/homes/{agent}"
        if settings.agent_home
        else os.path.expanduser("~")
    )


def read_cli_session(store: Store, agent: str, preset: str, home: str) -> dict:
    """What the CLI itself says of the process at work; empty when that is nothing."""
    try:
        # an agent can write there: no link, no FIFO, not more than a number
        pid = int(read_foreign(store.path(f"mailbox/{agent}/pid"), 99, os.O_NOFOLLOW))
        return cli_of(preset).read_session(home, pid)
    except (OSError, ValueError):
        return {}


# the first that matches a CLI's error; StopFailure's own words (authentication_failed, rate_limit,
# ...) among them
CAUSES = (
    (
        "not logged in",
        r"not logged in|run /login|invalid api key|api key not valid|authentication|\bauth\b|"
        r"oauth|account_on_hold|verification_required|cloud_credential|unauthori[sz]ed|"
        r"_API_KEY\b|missing environment variable|\b401\b",
    ),
    ("context used up", r"prompt is too long|context (window|length|limit)|maximum context"),
    (
        "usage limit",
        r"rate.?limit|limit reached|\blimit\b.*\bresets?\b|hit your .*limit|usage limit|"
        r"out of (extra )?usage|quota|too many requests|\b429\b",
    ),
    ("no credit", r"billing|credit balance|payment|\b402\b"),
    (
        "API failure",
        r"overloaded|api error|server.?error|bad gateway|unavailable|\b5\d\d\b|connection|"
        r"network|econn|stream (closed|disconnected|error)|timed? ?out|high demand|^unknown\b",
    ),
)


def find_cause(error: str) -> str:
    """The cause behind a CLI's own error text; empty when it is none that has a policy of its
    own."""
    return next(
        (cause for cause, pattern in CAUSES if re.search(pattern, error, re.IGNORECASE)), ""
    )


CUT_SECONDS = 75.0  # a clock shows whole minutes, cut off
UNIT_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
SPAN = (
    r"\b(?:in|after)\s+((?:\d+(?:\.\d+)?\s*(?:days?|d|hours?|hrs?|h|minutes?|mins?|m|"
    r"seconds?|secs?|s)\b[\s,]*(?:and\s+)?)+)"
)
DAY = r"(?:([A-Z][a-z]{2})[a-z]*\.?\s+(\d{1,2})(?:st|nd|rd|th)?,?\s+(?:(\d{4}),?\s+)?(?:at\s+)?)?"
TIME = r"(\d{1,2})(?::(\d\d))?\s*([ap]m)?\b(?:\s*\(([\w/+-]+)\))?"


def read_reset(text: str, now: float) -> float | None:
    """Epoch seconds at which a usage limit ends, from the CLI's words; None when they do not say.

    Known: `...|1765432100`, `resets 3pm (Europe/Berlin)`, `resets Nov 25, 3:30pm (UTC)`, `try
    again at Jan 2, 2027, 3pm`, `try again in 2 hours 5 minutes`, `retry after 30s`.
    """
    # exact, so it goes before words; ten digits are seconds from 2001 to 2286
    stamp = re.search(r"\|(\d{10})\b", text)
    if stamp:
        return float(stamp[1])
    span = re.search(SPAN, text, re.IGNORECASE)
    if span:
        parts = re.findall(r"(\d+(?:\.\d+)?)\s*([dhms])", span[1], re.IGNORECASE)
        return now + sum(float(number) * UNIT_SECONDS[unit.lower()] for number, unit in parts)
    return read_clock(text, now)


def read_clock(text: str, now: float) -> float | None:
    """The next time at which a clock shows `resets [Nov 25, [2027,]] 3:30pm [(Zone)]`, in the
    reader's zone where none is named."""
    import datetime
    import zoneinfo

    found = re.search(
        r"(?:resets?|again|until)\s+(?:at\s+|on\s+)?" + DAY + TIME, text, re.IGNORECASE
    )
    if not found or not (found[5] or found[6]):
        return None
    month, day, year, hour, minute, half, zone_name = found.groups()
    try:
        zone = zoneinfo.ZoneInfo(zone_name) if zone_name else None
        here = datetime.datetime.fromtimestamp(now, zone)
        hour = (
            (int(hour) % 12 if int(hour) <= 12 else 24) + 12 * (half.lower() == "pm")
            if half
            else int(hour)
        )
        at = here.replace(hour=hour, minute=int(minute or 0), second=0, microsecond=0)
        if month:
            at = at.replace(
                year=int(year or at.year), month=MONTHS.index(month.lower()) + 1, day=int(day)
            )
    except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError):
        return None
    if at <= here and not year:
        at = at.replace(year=at.year + 1) if month else at + datetime.timedelta(days=1)
    return at.timestamp() + CUT_SECONDS


def list_clis() -> list[str]:
    """A line about the coding CLIs that are on PATH, with their versions, and one about those
    that are not."""
    import shutil
    import subprocess
    from concurrent.futures import ThreadPoolExecutor

    def version_of(program: str) -> str:
        try:
            done = subprocess.run(
                [program, "--version"],
                capture_output=True,
                text=True,
                timeout=20,
                stdin=subprocess.DEVNULL,
            )
            found = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)
            said = found[0] if found else "(of no known version)"
        except (OSError, subprocess.TimeoutExpired) as error:
            said = f"(its version cannot be asked: {one_line(str(error), 60)})"
        return f"{program} {said} (checked with {checked[program]})"

    checked = {cli.program(): cli.checked for cli in CLIS.values()}
    there = [program for program in checked if shutil.which(program)]
    # at once: each of them starts a program, which may take its seconds
    with ThreadPoolExecutor() as pool:
        versions = ", ".join(pool.map(version_of, there)) or "none"
    missing = [program for program in checked if program not in there]
    without = f"; not installed: {', '.join(missing)}" if missing else ""
    return [f"coding CLIs: {versions}{without}"]


# Chosen before the start where that can be: after a kill the farm knows what to go on in, although
# the CLI has told nothing yet.
def new_conversation(preset: str) -> dict:
    """{"preset"}, with a random UUID as "id" where the CLI lets the farm choose it; empty for a
    command."""
    chosen = {"id": random_uuid()} if cli_of(preset).chooses_conversation() else {}
    return {"preset": preset, **chosen} if preset else {}


# -------------------------------------------------------------------------------------------- usage
# Tokens and dollars that attempts have used, and the budgets. (tests/rooms/test_attempts.py)

# what attempts have cost; cut at this size as the history is, what is over summed up in one line
USAGE_FILE, USAGE_BYTES = "usage.jsonl", 64 * 1024


def note_usage(store: Store, line: dict, spent: Usage) -> None:
    """One line an attempt in usage.jsonl. A resumed conversation's line holds all of it: readers
    take the last."""
    line = {"at": utc_now(), **line, **sum_usage([spent._asdict()])}
    try:
        with hold(store.path(".usage.lock")):
            if store.disk.append(store.path(USAGE_FILE), line_bytes(line)) > USAGE_BYTES:
                cut_usage(store)
    except OSError as error:  # what becomes of the attempt does not hang on it
        say(
            f"{store.path(USAGE_FILE)}: {os.strerror(error.errno)}; the cost of {line['fence']} "
            f"may not be counted"
        )


def cut_usage(store: Store) -> None:
    """Close usage.jsonl under its number; the next begins with the sum of what is over, and with
    the lines of tasks that may go on."""
    closed, state, lines = store.name_to_close(USAGE_FILE), store.snapshot(), read_usage(store)
    live = [line for line in lines if line["task"] and not state.is_done(line["task"])]
    over = sum_usage([line for line in lines if line not in live])
    head = {"task": "", "agent": "", "fence": f"up to {closed}", **over}
    store.begin_anew(USAGE_FILE, closed, b"".join(map(line_bytes, (head, *live))))


def read_usage(store: Store, *, is_whole: bool = False) -> list[dict]:
    """The lines of usage.jsonl, the last one of each conversation (or attempt, where
    conversations are not resumed); is_whole: of each attempt there ever was, else what is long
    over is one line without a task."""
    lines = {}
    for name in store.files_of(USAGE_FILE) if is_whole else (USAGE_FILE,):
        for line in read_json_lines(store.path(name)):
            if is_usage(line) and not (is_whole and not line["task"]):
                lines[line.get("conversation") or line["fence"]] = line
    return list(lines.values())


def is_usage(line: dict) -> bool:
    kinds = {"task": str, "agent": str, "fence": str, "tokens_in": int, "tokens_out": int}
    return has_kinds(line, {**kinds, "cost_usd": (int, float)})


def note_review(store: Store, command: str, task: Task, log: str) -> None:
    """What a reviewer has used, where its command names a CLI that has told it."""
    line = {"task": task.id, "agent": "reviewer", "fence": f"{task.id}.{task.rev}.review"}
    for cli in CLIS.values():
        if cli.keeps_output and re.search(rf"\b{cli.program()}\b", command):
            line.update(preset=cli.name, attempt=task.attempt)
            note_usage(store, line, cli.read(log))
            return


def cost_of_task(lines: list[dict], task_id: str) -> float:
    return sum_usage([line for line in lines if line["task"] == task_id])["cost_usd"]


def describe_overrun(task: Task, settings: Settings, cost_usd: float) -> str:
    """Empty while a task is within its budget, or has none."""
    return describe_budget("its", task.budget_usd or settings.task_budget, cost_usd)


def describe_farm_overrun(settings: Settings, cost_usd: float) -> str:
    told = describe_budget("the farm's", settings.budget, cost_usd)
    return told and f"{told}; to go on: FARM_BUDGET={settings.budget + cost_usd:.2f} ./farm.py up"


def describe_budget(whose: str, budget: float, cost_usd: float) -> str:
    is_over = budget and cost_usd >= budget
    return f"{whose} budget of ${budget:.2f} is used up (${cost_usd:.2f})" if is_over else ""


def sum_usage(lines: list[dict]) -> dict:
    """{"tokens_in", "tokens_out", "cost_usd"} of some lines of usage.jsonl."""
    keys = ("tokens_in", "tokens_out", "cost_usd")
    return {key: round(sum(line[key] for line in lines), 6) for key in keys}


def describe_usage(spent: dict) -> str:
    tokens = spent["tokens_in"] + spent["tokens_out"]
    return f"${spent['cost_usd']:.2f}, " + (
        f"{tokens / 1e6:.1f}M tokens" if tokens >= 1e5 else f"{tokens} tokens"
    )


# ---------------------------------------------------------------------------------------- judgement
# What becomes of an attempt, as far as its CLI and its exit code say. Words are looked for in a
# CLI's own error only, never in what an agent has written. (tests/rooms/test_presets.py)

# of the attempt: released, not counted
NO_FAULT = ("not logged in", "no credit", "usage limit", "API failure")
# the next attempt begins where this one did: there is nothing here to go on from
NO_START = ("crashed", "failed", "no change", "cannot commit", "cannot sign")
NO_COMMIT = ("cannot commit", "cannot sign")

# move: submit, fail, resume (fail, and the conversation goes on), release (no attempt counts);
# cause: one of a few words, for the code; why: for people, and for the next attempt
Outcome = namedtuple("Outcome", "move cause why")


def judge_end(
    code: int, turn: dict, ending: dict, spent: Usage, tail: str, not_found: str = ""
) -> Outcome:
    """What becomes of an attempt: pure. The farm's own word first, then the CLI's error, then
    its hooks, then the exit code.

    A limit, a failing API and a missing login are no fault of the attempt: it is released, and
    goes on later. code: exit code.
    """
    if ending:
        return Outcome("fail", ending["event"], ending["message"])
    told = turn.get("message", "") if turn.get("event") == "StopFailure" else ""
    # the exact end of a limit goes first
    error = spent.error if re.search(r"\|\d{10}\b", spent.error) else told or spent.error
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
    if code in CANNOT_START and not_found:
        return Outcome(
            "fail", "cannot start", f"the agent's command cannot be started: {not_found}"
        )
    return Outcome("fail", "crashed", f"the agent ended with exit code {code}: {tail}")


def describe_tail(log: str) -> str:
    """The last whole lines of an attempt's log in one, for a reason; what bash says of a child's
    death is said already."""
    lines = [
        line
        for line in printable(log).splitlines()
        if line.strip() and not re.search(r"run-(agent|task)\.sh: line \d", line)
    ]
    tail = lines[-1:]
    for line in reversed(lines[-5:-1]):
        if len(line) + sum(map(len, tail)) > 300:
            break
        tail.insert(0, line)
    return one_line(" ".join(tail), 300)


# ------------------------------------------------------------------------------------------- limits
# What holds a CLI up, and for how long: its provider's limits, and ends that are alike (a fault
# of the set-up); the farm's mode, which a person or a budget changes. (tests/rooms/test_presets.py)

LIMITS_FILE = "limits.json"
PAUSE_SECONDS, PAUSE_SECONDS_MAX = 30.0, 900.0
STREAK_TASKS, STREAK_SECONDS = 3, 20.0
# nothing but a person ends these; all others are tried again
FOR_A_PERSON = ("not logged in", "no credit")
LASTING = ("usage limit", *FOR_A_PERSON)
# told by a CLI; the others are streaks of ends that are alike
OWN_LIMITS = ("API failure", *LASTING)
COMMAND = "command"  # where limits are kept of an agent that is no known CLI


def limit_key(preset: str) -> str:
    return preset or COMMAND


def read_limits(store: Store) -> dict[str, dict]:
    """preset -> {"cause", "until" (UTC; empty: until a person has acted), "said", "count"} of
    what holds a CLI up."""
    kinds = dict.fromkeys(("cause", "until", "said"), str)
    return items_of(store.read_part(LIMITS_FILE, "presets"), lambda limit: has_kinds(limit, kinds))


def is_limited(limit: dict, now: float) -> bool:
    """Whether a limit, or none, holds its CLI up now."""
    if not limit or not limit["until"]:
        return bool(limit)
    if limit["cause"] in LASTING:  # how long that is, its provider has said
        return limit["until"] > utc(now)
    return is_ahead(limit["until"], now, PAUSE_SECONDS_MAX)


def find_limit(store: Store, preset: str) -> str:
    """Why no agent of this preset starts now, in words; empty when it may."""
    limit = read_limits(store).get(preset, {}) if preset else {}
    if not is_limited(limit, CLOCK.now()):
        return ""
    until = f" until {limit['until']}"
    if not limit["until"]:
        until = ", until a person mends it and types ./farm.py up"
        if limit["cause"] == "not logged in":
            until += " (a login by environment variable: ./farm.py down first)"
    who = "the agent command" if preset == COMMAND else preset
    return f"{who}: {limit['cause']}{until} ({one_line(limit['said'], 200)})"


def find_presets(store: Store, settings: Settings, key: str) -> tuple:
    """Whose tasks an agent of the preset `key` takes: its own, and those of presets at a limit
    that FARM_FALLBACK sends on to it."""
    chains = [part.replace(" ", "").split(">") for part in settings.fallback.split(",")]
    return key, *(
        name
        for chain in chains
        if key in chain
        for name in chain[: chain.index(key)]
        if find_limit(store, name)
    )


def write_limits(tx: Transaction, **parts: dict) -> None:
    """`presets`, `streaks` or both; the other one stays."""
    before = tx.store.read_json(LIMITS_FILE) or {"presets": {}}
    tx.store.write_json(LIMITS_FILE, {**before, "schema": SCHEMA, **parts})


def forget_limits(tx: Transaction) -> None:
    """A person has started or resumed the farm, and knows better: every CLI is tried again."""
    if read_limits(tx.store):
        write_limits(tx, presets={})


def set_mode(store: Store, mode: str, reason: str = "") -> None:
    """Pause, or go on: agents at work and the merge queue are left alone, new work is handed out
    or not. Raises Refused."""
    with store.transaction() as tx:
        farm = store.farm()
        if farm.get("mode") not in ("running", "paused"):
            raise Refused("the farm is not running", "./farm.py up")
        if mode == "running":
            forget_limits(tx)
        store.write_json(FARM_FILE, {**farm, "mode": mode, "reason": reason})
        store.append_event("paused" if mode == "paused" else "resumed", why=reason)


def pause_until(outcome: Outcome, times: int, now: float) -> str:
    """UTC; empty when only a person can mend it. times: how often in a row, all agents taken
    together. How long a limit pauses that names no end is decided here."""
    if outcome.cause in FOR_A_PERSON:
        return ""
    at = read_reset(outcome.why, now) if outcome.cause == "usage limit" else None
    return utc(at or now + min(PAUSE_SECONDS * 2.0 ** (times - 1), PAUSE_SECONDS_MAX))


def note_limit(tx: Transaction, preset: str, outcome: Outcome, now: float) -> str:
    """Write down what holds a preset up; until when, in UTC.

    One attempt's success ends a failing API, and nothing else: it may have asked before a limit
    began. A failing API never takes the place of a limit that lasts longer.
    """
    limits = read_limits(tx.store)
    before = limits.get(preset, {})
    was_on = is_limited(before, now)
    if outcome.move == "release":
        # ten agents that meet one limit together have met it once
        is_known = was_on and outcome.cause in OWN_LIMITS
        is_same = before.get("cause") == outcome.cause
        times = count(before, "count") + (not is_known) if is_same else 1
        until = pause_until(outcome, times, now)
        if was_on and outcome.cause not in LASTING and before["cause"] in LASTING:
            return before["until"]
        limits[preset] = {
            "cause": outcome.cause,
            "until": until,
            "said": outcome.why,
            "count": times,
        }
    elif before and (before["cause"] not in LASTING or not was_on):
        del limits[preset]
    else:
        return ""
    write_limits(tx, presets=limits)
    return limits.get(preset, {}).get("until", "")


def judge_streak(
    tx: Transaction, key: str, task_id: str, outcome: Outcome, *, is_idle: bool
) -> Outcome:
    """The outcome, or a release where the fault is the set-up's: several different tasks in a
    row have ended alike, within seconds and without work, or the agent could not be started at
    all. Trying on would use up every attempt of every task.
    """
    streaks = tx.store.read_part(LIMITS_FILE, "streaks")
    before = object_of(streaks.pop(key, None))
    if outcome.move == "fail" and is_idle:
        words = one_line(f"{outcome.cause}: {outcome.why}", 300)
        tasks = before.get("tasks", []) if before.get("words") == words else []
        tasks = [*dict.fromkeys([*tasks, task_id])][-STREAK_TASKS:]
        streaks[key] = {"words": words, "tasks": tasks}
        if len(tasks) == STREAK_TASKS or outcome.cause in ("cannot start", "cannot sign"):
            outcome = outcome._replace(move="release")
    if before or streaks.get(key):
        write_limits(tx, streaks=streaks)
    return outcome


def begin_trial(tx: Transaction, key: str, now: float) -> None:
    """After a pause for a streak one agent tries one task; the others wait for what comes of it.
    Raises NotFound."""
    limits = read_limits(tx.store)
    limit = limits.get(key)
    if limit and limit["until"] and limit["cause"] not in OWN_LIMITS:
        if is_limited(limit, now):
            raise NotFound("another agent tries whether it goes on", "./farm.py status")
        limits[key] = {**limit, "until": utc(now + PAUSE_SECONDS)}
        write_limits(tx, presets=limits)


# ------------------------------------------------------------------------------------------ prompts
# What an agent is told when its attempt begins. (tests/rooms/test_attempts.py)

PROMPT_TEMPLATE = """\
{body}

---
You are {agent}, one of several agents on this repository. Your task is {task}, attempt {attempt}.
- You stand in your own worktree, on branch {branch}. Work and commit here. Touch no other worktree
  and no other branch.
- Never use `git stash`, and never switch branches: all worktrees share one repository.
- Run the project's tests before you finish{gate}.
- When the work is done and committed, run:  farm submit {agent} --fence {fence}
- When you cannot do it, run:  farm fail {agent} --fence {fence} --why "the reason in a sentence"
- Before you use something that only one may use at a time:  farm lock {agent} NAME
  and afterwards  farm unlock {agent} NAME
{follow_ups}{history}"""

FOLLOW_UPS = """\
- Other work that you find should be done by others: hand it on, up to {} times, with
  farm add "what to do" --prompt "all one must know"   (it waits until yours has landed)
"""

RESUME_TEMPLATE = """\
You were interrupted ({reason}), and go on now. Your worktree is as you left it; look at
`git status` and `git log` first.
The task is the same, {task}: {title}
Your claim has a new fence:  farm submit {agent} --fence {fence}
                       or:  farm fail {agent} --fence {fence} --why "..."
"""


def describe_history(store: Store, task: Task) -> str:
    """What the next attempt should know of those before it; empty for a first one."""
    if not task.attempts and not task.reason:
        return ""
    lines = [
        "",
        "This task has been tried before. "
        + (f"It came back: {task.reason}" if task.reason else ""),
    ]
    if task.start:
        lines.append(f"Its commits are the start of your branch (from {task.start}).")
    if task.rescue:
        lines.append(f"Unsaved work of that attempt is kept: git show --stat {task.rescue}")
    if task.agent:
        lines.append(f"What its agent printed is in {store.path(f'logs/{task.agent}.log')}")
    if returned := read_return(store, task):
        lines.append("\n" + returned)
    return "\n".join(lines) + "\n"


def read_return(store: Store, task: Task) -> str:
    """Why the work of the last attempt came back; empty when it did not."""
    return read_printable(store.path(f"returns/{task.id}.{task.attempts}.txt"))[:20_000]


def read_template(repo: str, settings: Settings) -> str:
    """The user's own prompt template. Raises UsageError when it cannot be read."""
    path = os.path.join(repo, os.path.expanduser(settings.prompt_template))
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the prompt template {path} cannot be read: {error}", "FARM_PROMPT_TEMPLATE=FILE"
        ) from None


def write_prompt(store: Store, claim: Claim, settings: Settings, *, resumes: bool = False) -> str:
    """Write what the agent is told to prompts/ID.ATTEMPT.md (a conversation that goes on: what
    is new); returns the path."""
    task, gate = claim.get_task(), f" (the merge gate is: {settings.gate})" if settings.gate else ""
    values = {
        "body": f"{task.title}\n\n{task.prompt}".strip(),
        "title": task.title,
        "agent": claim.agent,
        "task": task.id,
        "attempt": str(task.attempt),
        "branch": branch_of(claim.agent, task.id),
        "fence": claim.fence,
        "gate": gate,
        "reason": task.reason or "the farm was stopped",
        "history": describe_history(store, task),
        "follow_ups": FOLLOW_UPS.format(settings.follow_ups) * bool(settings.follow_ups),
    }
    if settings.prompt_template and not resumes:  # a brace of the user's own stays
        text = re.sub(
            r"\{(\w+)\}",
            lambda match: values.get(match[1], match[0]),
            read_template(store.repo, settings),
        )
    else:
        text = (RESUME_TEMPLATE if resumes else PROMPT_TEMPLATE).format(**values)
    # CLIs take a slash at the start for a command of their own
    text = "Task:\n" * text.startswith("/") + text
    path = store.path(f"prompts/{task.id}.{task.attempt}{'.resumed' * resumes}.md")
    with open(path, "w", encoding="utf-8", errors="replace") as file:
        file.write(text)
    return path


def claim_environment(claim: Claim, prompt: str, resumes: bool) -> str:
    """FARM_* lines for run-agent.sh; each value is one line."""
    task = claim.get_task()
    values = {
        "FARM_TASK": task.id,
        "FARM_FENCE": claim.fence,
        "FARM_PROMPT_FILE": prompt,
        "FARM_ATTEMPT": task.attempt,
        "FARM_BRANCH": branch_of(claim.agent, task.id),
        "FARM_START": task.start,
        "FARM_TITLE": one_line(task.title, TITLE_LENGTH),
        "FARM_CONVERSATION": task.conversation.get("id", ""),
        "FARM_RESUME": "1" if resumes else "",
    }
    return "\n".join(f"{key}={value}" for key, value in values.items())


# -------------------------------------------------------------------------------------------- turns
# What an agent's CLI tells while it works, by files in its mailbox: turns, cost, and the word that
# ends it. (tests/rooms/test_presets_at_work.py, tests/rooms/test_recorded.py)

IDLE_SECONDS, BACKGROUND_SECONDS = 5.0, 1800.0
HOGS = ("memory", "processes", "disk")  # causes of an end that cannot wait for manners
SENT_BACK = """\
Your task {task} is not submitted yet. If the work is done, commit it, then run
    farm submit {agent} --fence {fence}
If it cannot be done:  farm fail {agent} --fence {fence} --why "the reason in a sentence"
If a command of yours runs in the background, wait for it first, or stop it.
Nobody reads questions here: decide yourself."""


MAIL_BYTES = 1 << 20  # of a request, or of what hooks tell


def read_mail(store: Store, agent: str, name: str, fence: str) -> dict:
    """What lies in an agent's mailbox under `name` about the claim `fence`; empty when there is
    nothing that can be read."""
    try:
        path = store.path(f"mailbox/{agent}/{name}")
        mail = object_of(json.loads(read_foreign(path, MAIL_BYTES, os.O_NOFOLLOW)))
    except (OSError, ValueError, RecursionError):
        return {}
    texts = [mail.get(key, "") for key in ("at", "event", "state", "message")]
    return mail if is_texts(texts) and mail.get("fence") == fence else {}


def write_mail(store: Store, agent: str, name: str, mail: dict) -> None:
    try:
        write_object(store.path(f"mailbox/{agent}/{name}"), mail)
    except OSError as error:  # a folder of that name, say: the loop has others to look after
        say(f"{agent}: its mailbox cannot be written: {error}")


def end_turn(store: Store, agent: str, fence: str, word: str = "over") -> None:
    """Have run-task.sh end the CLI that works on `fence`; with `kill` at once."""
    ring(store.path(f"mailbox/{agent}/bell"), f"{word} {fence}\n".encode())


def note_turn(store: Store, agent: str, fence: str, event: dict) -> dict | None:
    """Write a hook's event to turn.json; the answer for the CLI, when there is one.

    The first Stop of a task that is still claimed is sent back with what is missing; the next
    ends the CLI, and the farm decides from the branch; but one that waits for a command of its
    own in the background wakes by itself, and gets BACKGROUND_SECONDS. event: the hook's JSON.
    """
    cli, before = cli_of(given("FARM_PRESET")), read_mail(store, agent, TURN_FILE, fence)
    state, message = cli.read_event(event)
    if not state:
        return None
    name, at = event["hook_event_name"], utc_now()
    turn = {**before, "at": at, "fence": fence, "event": name, "state": state, "message": message}
    claim = store.find_claim(agent)
    is_early = name == "Stop" and claim and claim.fence == fence
    goes_back = is_early and not before.get("sent_back")
    if goes_back or is_early and event.get("background_tasks"):
        turn.update(state="working", sent_back=True)
    write_mail(store, agent, TURN_FILE, turn)
    if goes_back:
        reason = SENT_BACK.format(task=claim.task["id"], agent=agent, fence=fence)
        return {"decision": "block", "reason": reason}
    if turn["state"] == "over" and not cli.ends_by_itself:
        end_turn(store, agent, fence)
    return None


def end_waiting_turn(store: Store, agent: str, turn: dict, now: float) -> None:
    """End a turn that has waited long enough for its commands in the background (a server that
    nobody stops, say)."""
    if (
        turn.get("event") == "Stop"
        and turn.get("state") == "working"
        and now - epoch(turn["at"]) > BACKGROUND_SECONDS
    ):
        write_mail(store, agent, TURN_FILE, {**turn, "state": "over"})
        end_turn(store, agent, turn["fence"])


def read_turn(store: Store, settings: Settings, agent: str, fence: str, preset: str) -> dict:
    """The turn of the claim `fence`. Esc fires no hook: a CLI that says it is idle in the middle
    of a turn waits for a person."""
    turn = read_mail(store, agent, TURN_FILE, fence)
    if turn.get("state") != "working" or turn.get("event") == "Stop":
        return turn
    home = agent_home(store.repo, settings, agent)
    told = read_cli_session(store, agent, preset, home)
    idle_since = told.get("statusUpdatedAt", 0) / 1000
    if (
        told.get("status") != "idle"
        or not epoch(turn["at"]) - 1 <= idle_since < CLOCK.now() - IDLE_SECONDS
    ):
        return turn
    return {
        **turn,
        "at": utc(idle_since),
        "state": "waiting",
        "message": "interrupted: it waits for a person's word",
    }


def end_attempt(store: Store, agent: str, fence: str, cause: str, message: str) -> None:
    """Have run-task.sh end the CLI that works on `fence`; judge_end then reads why."""
    write_mail(
        store,
        agent,
        ENDING_FILE,
        {"at": utc_now(), "fence": fence, "event": cause, "message": message},
    )
    end_turn(store, agent, fence, "kill" if cause in HOGS else "over")


def live_cost(store: Store, claim: Claim, spending: list[dict]) -> float:
    """Dollars of the conversation at work beyond its line in `spending`, as its CLI told last."""
    conversation = claim.task.get("conversation", {})
    own_id, preset = conversation.get("id"), conversation.get("preset", "")
    if not own_id:
        return 0.0
    earlier = sum_usage([line for line in spending if line.get("conversation") == own_id])
    told = cli_of(preset).read_cost(store.path(f"mailbox/{claim.agent}/{COST_FILE}"), own_id)
    return max(0.0, told - earlier["cost_usd"])


def cost_of_claim(store: Store, claim: Claim, spending: list[dict]) -> float:
    """Dollars of an agent's task so far, the conversation at work included."""
    return cost_of_task(spending, claim.task.get("id", "")) + live_cost(store, claim, spending)


# ----------------------------------------------------------------------------------------- attempts
# From the claim to what becomes of the work: submitted, or given back with the reason.
# (tests/rooms/test_attempts.py)


# The file and not the loop says who is next: agents start by themselves, and a loop may be dead.
def wait_for_start(store: Store, stagger_seconds: float) -> None:
    """Until this one may start: one CLI starts every `stagger_seconds`, because many at once slow
    each other down for long.

    The file holds when the next one may start (epoch seconds); each takes that slot and moves it
    on, under a lock of its own.
    """
    with hold(store.path("starts.lock")) as file:
        file.seek(0)
        now, text = CLOCK.now(), file.read().strip()
        slot = float(text) if re.fullmatch(r"\d+\.\d+", text) else now
        # a clock that was set back holds nobody up
        slot = slot if now < slot < now + 999 * stagger_seconds else now
        file.truncate(0)
        file.write(f"{slot + stagger_seconds:.3f}")
    # after the lock is given back: who comes next takes the slot after this one meanwhile
    time.sleep(slot - now)


def check_hand_out(store: Store, settings: Settings) -> None:
    """Raises NotFound where the farm takes no new work."""
    mode = store.mode()
    if mode in ("stopping", "paused"):
        raise NotFound(
            f"the farm is {mode}; nothing is handed out",
            "./farm.py resume" if mode == "paused" else "./farm.py up",
        )
    if mode == "running" and (short := find_shortage(store.repo, settings.min_free_mib)):
        raise NotFound(
            f"no new work is handed out: {short}", "free some, or lower FARM_MIN_FREE_MIB"
        )


def claim_once(call: Call, agent: str, owner: Owner, watch: LeaseWatch) -> Claim:
    """Free what dead owners hold, then claim. Raises NotFound when there is nothing, or the farm
    takes no new work."""
    check_hand_out(call.store, watch.settings)
    preset = given("FARM_PRESET")
    # a claim by hand is nobody's preset
    key = limit_key(preset) if preset or given("FARM_AGENT") else ""
    if limit := find_limit(call.store, key):
        raise NotFound(f"no new work is handed out: {limit}", "./farm.py status")

    def move(tx: Transaction) -> Claim:
        # in the transaction of the claim: of ten agents that come at once, one is to be the trial
        begin_trial(tx, key, CLOCK.now())
        takes = find_presets(call.store, watch.settings, key) if key else None
        asked = (agent, owner, call.get("id", ""), new_conversation(preset), takes)
        return TaskQueue(tx).claim(*asked)

    return take_over(call.store, watch, move)


# git's own words, and those of the programs that sign for it
SIGNING_WORDS = r"sign(ed|ing)? (the data|failed)|failed to sign|signing key|gpg|ssh-keygen"


def hold_pin(store: Store, task_id: str):
    """A lock file, held, under which a task's pin is moved: from the look at the fence to the end
    of the move.

    A late agent's pin could else come after that of the next claim's accepted submission. Not
    the mutex: git takes its time. The git that moves the pin inherits it, so it is held as long
    as that one lives. One file for many tasks, so that they stay few.
    """
    make_folder(store.path("merge_queue"))
    guard = hold(store.path(f"merge_queue/.pin-{sum(task_id.encode()) % 16}.lock"))
    os.set_inheritable(guard.fileno(), True)
    return guard


COMMIT_FIRST = "git add -A && git commit, then submit again"


def submit(store: Store, agent: str, fence: str, *, branch: str = "", commit: str = "") -> None:
    """Pin a commit, then hand it to the merge queue: git first, so that the queue never names a
    commit that could be lost.

    branch: where it comes from, by default the task's own; commit: a sha or a ref, by default what
    the agent has left there. Raises Refused for an old fence, Rejected for no new commit.
    """
    task_id = fence.rpartition(".")[0]
    branch = branch or branch_of(agent, task_id)
    with hold_pin(store, task_id):
        claim = store.find_claim(agent)
        if claim is None or claim.fence != fence:
            with store.transaction() as tx:  # an old fence is refused, a repeated submit is fine
                if TaskQueue(tx).get_claimed(agent, fence, "submit").ended_by:
                    return
        head = commit or find_own_head(agent, branch) or f"refs/heads/{branch}"
        verify_objects(store.repo, head)
        pin = ("merge/pins.sh", "set", "-C", store.repo, f"refs/farm/ready/{task_id}", head)
        pinned = spawn_script(*pin).strip()
        # FARM_BASE is where the attempt began: a head that has not left it brings nothing
        if pinned == given("FARM_BASE"):
            raise Rejected(f"{branch} has no commit of its own", COMMIT_FIRST)
        with store.transaction() as tx:
            TaskQueue(tx).submit(agent, fence, branch, pinned)


def verify_objects(repo: str, head: str) -> None:
    """What a sandboxed agent submits is what it seems: sandboxes write to the one folder of
    objects. Raises BrokenObjects."""
    target = given("FARM_TARGET")
    if not is_isolated(repo) or not target:
        return
    try:
        run_script("sandbox/verify-objects.sh", "-C", repo, "-b", target, head, allow=(0, 3))
    except Rejected as error:
        raise BrokenObjects(str(error), error.hint) from None


# An agent may have worked on a branch that it has made itself, or without any. Where HEAD is on the
# task's branch, and the attempt the first, no script has to look, which would cost some processes.
def find_own_head(agent: str, branch: str) -> str:
    """The commit to submit where an agent that submits by itself has left its task's branch; empty
    where it has not. In the usual case two files are read.

    Raises Refused in the middle of a rebase, and Rejected where there is nothing new.
    """
    worktree = given("FARM_WORKTREE")
    is_own = given("FARM_AGENT_NAME") == agent and given("FARM_BRANCH") == branch
    if not worktree or not is_own or not given("FARM_BASE"):
        return ""
    folder = read_line(f"{worktree}/.git").removeprefix("gitdir: ")
    is_there = read_line(os.path.join(worktree, folder, "HEAD")) == f"ref: refs/heads/{branch}"
    if is_there and not given("FARM_START"):  # one that goes on may be behind its base
        return ""
    code, said, found = run_commit_rest(worktree, "-n", allow=(0, 4))
    if code:
        raise Refused(said, "git status")
    if "NOTHING" in found:
        raise Rejected(said or f"{branch} has no commit of its own", COMMIT_FIRST)
    return found.get("HEAD", "")


def run_commit_rest(worktree: str, *words: str, **options) -> tuple[int, str, dict[str, str]]:
    """commit-rest.sh for the attempt's branch: its exit code, what it said in a line, and what it
    has found (NAME -> value)."""
    branch = ("-b", given("FARM_BRANCH"), "-o", given("FARM_BASE"), "-t", given("FARM_TARGET"))
    confined = isolated("tree", given("FARM_REPO"), worktree)
    argv = ("agent/commit-rest.sh", *branch, *words, worktree)
    result = run_script(*argv, prefix=confined, **options)
    found = dict(line.split("=", 1) for line in result.stdout.splitlines() if "=" in line)
    return result.code, one_line(result.stderr.replace("farm: ", ""), 400), found


class Attempt:
    """An attempt whose command has ended: it is judged, and its work handed in, or its task given
    back. run-agent.sh and the claim have put into the environment what is known of it."""

    def __init__(self, call: Call, agent: str, fence: str):
        self.call, self.store, self.agent, self.fence = call, call.store, agent, fence
        self.task_id, self.preset = fence.rpartition(".")[0], given("FARM_PRESET")
        self.branch = given("FARM_BRANCH")
        self.worktree = given("FARM_WORKTREE")
        self.conversation = ""  # its id, where the CLI has told it only at the end

    def finish(self, code: int, log: str) -> None:
        """Decide what becomes of it, and make that move. code: its command's exit code; log: what
        it has printed. Raises Refused for an old fence."""
        outcome = self.judge(code, log)
        if outcome.move == "submit":
            outcome = self.hand_in(outcome)
        if outcome.move != "submit":
            self.leave_off(outcome)

    # The cost is noted before the budgets are asked, so that this attempt counts among them.
    def judge(self, code: int, log: str) -> Outcome:
        """The outcome as far as the CLI, the exit code and the budgets say; what the attempt has
        used is written down."""
        output = self.store.path(f"mailbox/{self.agent}/output")
        usage = cli_of(self.preset).read_attempt(output, given("FARM_CONVERSATION"))
        outcome = judge_end(
            code,
            read_mail(self.store, self.agent, TURN_FILE, self.fence),
            read_mail(self.store, self.agent, ENDING_FILE, self.fence),
            usage,
            "see its log" if self.preset else describe_tail(log),
            find_missing(code, log) if code in CANNOT_START else "",
        )
        # it goes into a command line later
        if is_name(usage.conversation):
            self.conversation = usage.conversation
        if not self.preset:
            return outcome
        self.note_usage(usage)
        over = self.judge_budgets()
        if over and outcome.move != "submit":
            return Outcome("fail", "budget", over)
        return outcome

    def note_usage(self, usage: Usage) -> None:
        line = {
            "task": self.task_id,
            "agent": self.agent,
            "fence": self.fence,
            "preset": self.preset,
            "attempt": int(given("FARM_ATTEMPT") or 0),
        }
        if cli_of(self.preset).counts_conversation:
            line["conversation"] = given("FARM_CONVERSATION") or usage.conversation
        note_usage(self.store, line, usage)

    def judge_budgets(self) -> str:
        """Why the task may not be tried again, as far as money goes. Pauses the farm here, before
        anybody claims the next task."""
        settings, lines = self.call.settings(), read_usage(self.store)
        if why := describe_farm_overrun(settings, sum_usage(lines)["cost_usd"]):
            try:
                set_mode(self.store, "paused", why)
            except (Refused, NotFound):
                pass  # it is being stopped, or an agent runs without a farm
        task = self.store.snapshot().find_task(self.task_id)
        return describe_overrun(task, settings, cost_of_task(lines, task.id)) if task else ""

    def hand_in(self, outcome: Outcome) -> Outcome:
        """Commit what is left, and submit; the outcome, which is another one when that cannot be
        done. Raises Refused."""
        outcome, found = self.commit_rest(outcome)
        if outcome.move != "submit":
            return outcome
        denied = "".join(f" ({words})" for words in (outcome.why, found["SAID"]) if words)
        why = f"the agent ended without any change{denied}"
        nothing = Outcome("fail", "no change", why)
        claim = self.store.find_claim(self.agent)
        # not what it has submitted itself, and landed since
        if "NOTHING" in found and claim and claim.fence == self.fence:
            return nothing
        head = found.get("HEAD") or f"refs/heads/{self.branch}"
        # what passes by itself (another git's lock, say) must not cost an attempt: the work is
        # done
        for tries_left in (2, 1, 0):
            try:
                submit(self.store, self.agent, self.fence, commit=head)
                break
            except BrokenObjects as error:
                return Outcome("fail", "cannot commit", one_line(str(error), 400))
            except Rejected:
                return nothing
            except (Refused, UsageError):
                raise
            except FarmError:
                if not tries_left:
                    raise
        return self.note_outcome(outcome)

    def commit_rest(self, outcome: Outcome) -> tuple[Outcome, dict]:
        """Commit what the CLI has left; the outcome, which is another one when that cannot be
        done, with what the script has found (NAME -> value)."""
        message = given("FARM_TITLE") or "work"  # git takes no empty one
        # detach, so that the end of its time ends the hook or the pinentry as well
        options = {"allow": (0, 1, 4), "timeout": COMMIT_SECONDS, "detach": True}
        try:
            code, said, found = run_commit_rest(self.worktree, "-m", message, **options)
        except TookTooLong:
            why = f"the commit took longer than {COMMIT_SECONDS:.0f} s"
            return Outcome("fail", "cannot commit", why), {}
        if code == 4:
            return Outcome("resume", "ended early", said), {}
        if code:
            # told apart, as that is nobody's task: no commit of any agent will be signed
            cause = "cannot sign" if re.search(SIGNING_WORDS, said) else "cannot commit"
            why = f"what it left could not be committed: {said}"
            return Outcome("fail", cause, why), {}
        if said:
            say(said)
        return outcome, {**found, "SAID": said}

    def note_outcome(self, outcome: Outcome, *, is_idle: bool = False) -> Outcome:
        """Keep in limits.json what it says of its CLI or command; the outcome, which is a release
        where the fault is theirs."""
        key = limit_key(self.preset)
        with self.store.transaction() as tx:
            if outcome.move != "release":
                outcome = judge_streak(tx, key, self.task_id, outcome, is_idle=is_idle)
            until = note_limit(tx, key, outcome, CLOCK.now())
        if outcome.move == "release":
            say(
                f"{key}: {outcome.cause}{' until ' + until if until else ''}: "
                f"{one_line(outcome.why, 200)}"
            )
        return outcome

    def leave_off(self, outcome: Outcome) -> None:
        """Give the task back without a result, unsaved work kept first."""
        # before the move: after it another agent may begin, and this worktree may be used again
        kept = rescue(self.store.repo, self.agent, self.worktree) if self.worktree else ""
        is_idle = self.was_idle(bool(kept) and outcome.cause not in NO_COMMIT)
        outcome = self.note_outcome(outcome, is_idle=is_idle)
        is_plain = outcome.move == "fail" and outcome.cause in NO_START
        how = {
            "start": "" if is_plain else self.find_start(),
            "rescue": kept,
            "conversation": self.conversation,
        }
        with self.store.transaction() as tx:
            queue = TaskQueue(tx)
            if outcome.move == "release":
                why = one_line(f"{outcome.cause}: {outcome.why}", 500)
                queue.release(self.agent, self.fence, why, **how)
                return
            queue.fail(
                self.agent,
                self.fence,
                one_line(outcome.why, 500),
                retry=outcome.cause != "budget",  # another attempt would only cost more
                resume=outcome.move == "resume",
                **how,
            )

    def find_start(self) -> str:
        """The branch with what it has committed, or the commit where it has worked on another."""
        if not self.worktree:
            return self.branch
        found = run_commit_rest(self.worktree, "-n", allow=range(256))[2]
        return found.get("HEAD", self.branch)

    def was_idle(self, has_saved: bool) -> bool:
        """Whether it was over within seconds, and has left no work: several tasks in a row that
        end so are a fault of the set-up."""
        claim = self.store.find_claim(self.agent)
        is_long = not claim or CLOCK.now() - epoch(claim.claimed_at) >= STREAK_SECONDS
        if has_saved or is_long:
            return False
        # any exit code will do: a branch that is gone, or that git cannot read, has brought nothing
        at = ("-C", self.store.repo, f"refs/heads/{self.branch}")
        tip = run_script("merge/pins.sh", "tip", *at, allow=range(256))
        return bool(tip.code) or tip.rows[0][0] == given("FARM_BASE")


# ----------------------------------------------------------------------------------------- sessions
# What psutil and tmux tell about the processes behind the panes. Words on a screen are no source
# here. (tests/rooms/test_sessions.py)

CONTROL = "control"

Session = namedtuple("Session", "pid dead exit_status signal")
Footprint = namedtuple("Footprint", "cpu_percent rss_bytes processes is_zombie")


def probe_sessions(socket: str, **options) -> dict[str, Session]:
    """name -> Session of every session on the farm's server; empty when no server runs."""
    result, sessions = run_script("probe-tmux.sh", "-L", socket, allow=(0, 3), **options), {}
    for name, _, pid, dead, status, signal, *_ in result.rows:
        exit_status = int(status) if status.isdigit() else None
        sessions[name] = Session(int(pid), dead == "1", exit_status, signal.strip("-"))
    return sessions


def measure(tree: list) -> Footprint:
    """CPU since each process started (percent of one core), memory and count of a process tree."""
    psutil = import_package("psutil")
    cpu = rss = 0.0
    zombie, now = False, CLOCK.now()
    for index, process in enumerate(tree):
        try:
            with process.oneshot():
                times = process.cpu_times()
                # since its start, as one look has nothing earlier to compare with
                cpu += 100 * (times.user + times.system) / max(now - process.create_time(), 1)
                rss += process.memory_info().rss
                zombie |= index == 0 and process.status() == psutil.STATUS_ZOMBIE
        except psutil.Error:
            continue
    return Footprint(round(cpu, 1), int(rss), len(tree), zombie)


# A shell says 128 + n where its child was ended by signal n; tmux itself tells of the pane's own
# process only.
def end_cause(session: Session | None) -> str:
    """Why a session is over, from what tmux knows of its process."""
    if session is None:
        return "its session is gone"
    if session.signal or (session.exit_status or 0) > 128:
        number = session.signal or str(session.exit_status - 128)
        return f"killed by signal {number}" + (
            " (out of memory?)" if number in ("9", "KILL") else ""
        )
    if session.exit_status is None:  # tmux has seen the pane close and has not yet been told how
        return "its process is gone"
    return "done" if session.exit_status == 0 else f"crashed with exit code {session.exit_status}"


START_SECONDS = 120.0  # a CLI that has not taken its prompt by then asks something on its screen


# A CLI without hooks tells of no turn: as long as its process lives and it has a task, it works.
def judge_session(
    session: Session | None,
    claim: Claim | None,
    noted: dict,
    footprint: Footprint | None,
    turn: dict,
    preset: str,
) -> tuple[str, str, str]:
    """(state, since when in UTC, why) of an agent, from the process tree, what its CLI's hooks have
    said, and the loop's notes."""
    # before all else: a session of that name here is not where this claim's owner runs
    if claim and is_unseen(claim):
        lapses_at = noted.get("lapses_at")
        until = f"at {lapses_at}" if lapses_at else "when a loop has waited for its lease"
        who = f"pid {claim.owner.get('pid')} on {claim.owner.get('host')}"
        why = f"its owner ({who}) cannot be seen from here; free {until}"
        return "unseen", claim.claimed_at, why
    at_work = claim and claim.task
    since, cause = claim.claimed_at if at_work else noted.get("since", ""), noted.get("cause", "")
    if not session or session.dead:
        state = "dead" if session or cause else "stopped"
        why = cause or (end_cause(session) if session else "")
        return "parked" if noted.get("parked") else state, since, why
    if footprint and footprint.is_zombie:
        return "zombie", since, cause
    if not at_work:
        return "idle", since, cause
    is_waiting = turn.get("state") == "waiting"
    if noted.get("still_since") and not is_waiting:
        return "stuck", noted["still_since"], "no output, and nothing runs"
    is_starting = not turn and cli_of(preset).has_hooks
    if is_starting and CLOCK.now() - epoch(claim.claimed_at) < START_SECONDS:
        return "starting", since, cause
    if is_starting or is_waiting:
        why = turn.get("message") or "it has not taken its prompt: look at its screen"
        return "waiting", turn.get("at", since), why
    return "working", since, cause


PARK_AFTER, WINDOW_SECONDS, DELAY_MAX = 5, 900.0, 300.0


def recent_ends(ends: list, now: float) -> list:
    return [end for end in ends if 0 <= now - end < WINDOW_SECONDS]


def next_start(ends: list, now: float) -> float | None:
    """When a session that ended may start again, in epoch seconds: backoff 1 s, 2 s, ... 5 min;
    None: parked, after five ends in 15 min."""
    recent = recent_ends(ends, now)
    if len(recent) >= PARK_AFTER:
        return None
    return recent[-1] + min(2.0 ** (len(recent) - 1), DELAY_MAX) if recent else now


def failed_tasks(state: State) -> list[Task]:
    return [task for task in state.pending.values() if task.state == "failed"]


def last_output_at(store: Store, agent: str) -> float:
    """Epoch seconds; 0 without a log."""
    return changed_at(store.path(f"logs/{agent}.log")) / 1e9


def agent_record(
    name: str,
    session: Session | None,
    claim: Claim | None,
    noted: dict,
    footprint: Footprint | None,
    store: Store,
    settings: Settings,
    preset: str,
) -> dict:
    """One agent as `status --json` shows it."""
    task_id, fence = (claim.task.get("id", ""), claim.fence) if claim else ("", "")
    turn = read_turn(store, settings, name, fence, preset) if task_id else {}
    state, since, cause = judge_session(session, claim, noted, footprint, turn, preset)
    # who is at work goes on; a limit holds up only who would begin
    if state == "idle" and (limit := find_limit(store, limit_key(preset))):
        state, cause = "limited", limit
    footprint = footprint or Footprint(0.0, 0, 0, False)
    return {
        "agent": name,
        "state": state,
        "task": task_id,
        "pid": session.pid if session else None,
        "rss_bytes": footprint.rss_bytes,
        "cpu_percent": footprint.cpu_percent,
        "since": since,
        "worktree": worktree_of(store.repo, settings, name),
        "branch": branch_of(name, task_id) if task_id else "",
        "last_output_at": utc(at) if (at := last_output_at(store, name)) else "",
        "cause": cause,
        "processes": footprint.processes,
        "preset": preset,
        "fence": fence,
    }


class WorkCount:
    """Commits and changed lines of all at work, counted by the loop alone: git may take its
    time, and a status may not.

    found: AGENT/TASK -> [commits, changed lines], as the last count had them. A count may take a
    share of a core.
    """

    SHARE, SECONDS_MAX = 0.005, 20.0

    def __init__(self):
        self.found, self.process, self.begun_at, self.due_at = {}, None, 0.0, 0.0

    def go_on(self, store: Store, state: State, settings: Settings, target: str) -> None:
        """Begin a count when it is time, or take what one has found; never waits."""
        import subprocess
        import tempfile

        if self.process:
            self.collect()
        if self.process or CLOCK.monotonic() < self.due_at:
            return
        rows = [
            [
                f"{task.agent}/{task.id}",
                branch_of(task.agent, task.id),
                worktree_of(store.repo, settings, task.agent),
            ]
            for task in state.claimed().values()
        ]
        if not rows or not target:
            self.found = {}
            return
        argv = ["bash", f"{SCRIPTS}/merge/look.sh", "work", "-C", store.repo, "-b", target]
        # Files, not pipes: nobody reads while the loop goes on, and a full pipe would hold git up.
        # A session of its own, so that one blow ends git and all that it has started.
        self.output, self.begun_at = tempfile.TemporaryFile(), CLOCK.monotonic()
        with tempfile.TemporaryFile() as lines:
            lines.write(os.fsencode(write_tsv(rows)))
            lines.seek(0)
            self.process = start_apart(
                [*unfiltered(store.repo), *argv],
                stdin=lines,
                stdout=self.output,
                stderr=subprocess.DEVNULL,
                cwd=TOOLKIT,
            )

    def collect(self) -> None:
        """Take the figures once the count is over, or those that are there when it has taken too
        long."""
        seconds = CLOCK.monotonic() - self.begun_at
        if self.process.poll() is None:
            if seconds < self.SECONDS_MAX:
                return
            end_apart(self.process)
        self.output.seek(0)
        # without a last line that the kill has cut in two
        whole = os.fsdecode(self.output.read()).rpartition("\n")[0]
        self.found = {name: [int(commits), int(lines)] for name, commits, lines in read_tsv(whole)}
        self.output.close()
        # the longer a count takes, the longer until the next: on a big repo git would never rest
        self.process, self.due_at = None, CLOCK.monotonic() + max(2.0, seconds / self.SHARE)


class Sight:
    """What a status needs beside files, from tmux and psutil.

    share: of a core, that each of them may take of a process which looks again and again; 0
    looks once.
    """

    TMUX_SECONDS = 3.0

    def __init__(self, share: float = 0.0):
        self.share, self.kept, self.error = share, {}, None

    def measure(self, name: str, function):
        """What `function` says, or what it said a while ago."""
        value, due = self.kept.get(name, (None, -math.inf))
        if CLOCK.monotonic() < due:
            return value
        # children that were waited for count, too: most of a look is tmux's and git's
        before, used = CLOCK.monotonic(), sum(os.times()[:4])
        value = function()
        cost = max(sum(os.times()[:4]) - used, CLOCK.monotonic() - before)
        self.kept[name] = value, CLOCK.monotonic() + (cost / self.share if self.share else -1)
        return value

    def find_sessions(self, repo: str) -> dict[str, Session]:
        """probe_sessions; where that cannot be had, `error` says why and none is found: a status
        answers all the same."""
        try:
            self.error = None
            return self.measure(
                "sessions", lambda: probe_sessions(find_server(repo), timeout=self.TMUX_SECONDS)
            )
        except FarmError as error:
            self.error = error
            return {}


def living(sessions: dict[str, Session]) -> dict[str, Session]:
    """Those whose process runs."""
    return {name: session for name, session in sessions.items() if not session.dead}


def measure_sessions(sessions: dict[str, Session]) -> dict[str, Footprint]:
    """name -> Footprint of each session that lives."""
    live = living(sessions)
    children = process_children() if live else {}
    return {name: measure(tree_of(one.pid, children)) for name, one in live.items()}


# of a host, and of an agent on it, what its hub is told and shows
TOLD_OF_HOST = ("toolkit", "farm", "reach", "trouble")
TOLD_OF_AGENT = {
    **dict.fromkeys(
        (
            "agent",
            "state",
            "task",
            "fence",
            "since",
            "cause",
            "title",
            "preset",
            "last_output_at",
            "worktree",
        ),
        "",
    ),
    **dict.fromkeys(("rss_bytes", "processes"), 0),
    **dict.fromkeys(("cpu_percent", "cost_usd"), 0.0),
}


def read_hosts(store: Store) -> dict[str, dict]:
    """host -> what it has told last."""
    return {
        name.removesuffix(".json"): store.read_json(f"hosts/{name}") or {}
        for name in names_in(store.path("hosts"))
    }


def host_records(store: Store, lease_seconds: float) -> list[dict]:
    """The agents of all hosts as these have told last; `lost` when a lease is over since."""
    records = []
    for host, told in read_hosts(store).items():
        heard_at = told.get("heard_at", "")
        lost = {}
        if CLOCK.now() - epoch(heard_at) > lease_seconds:
            lost = {"state": "lost", "cause": f"{host} was heard {ago(heard_at)} ago"}
        records += [
            {
                **record,
                "host": host,
                "heard_at": heard_at,
                "trouble": told.get("trouble", ""),
                **lost,
            }
            for record in told.get("agents", ())
        ]
    return records


# Agents of hosts have claims here, and neither session nor process: their host's word is all there
# is.
def agent_records(store: Store, state: State, settings: Settings, sight: Sight) -> list[dict]:
    """Every agent that has a session, a claim or a place in the farm."""
    noted = store.read_loop()
    sessions = sight.find_sessions(store.repo)
    footprints = sight.measure("footprints", lambda: measure_sessions(sessions))
    is_up = store.mode() in ("running", "stopping", "paused")
    on_hosts = host_records(store, settings.host_lease_seconds)
    names = {*state.claims, *sessions, *agent_names(count_here(settings) * is_up)} - {CONTROL}
    names -= {record["agent"] for record in on_hosts}
    runs = dict(zip(agent_names(settings.n), share_agents(settings), strict=False))
    records = []
    spending = sight.measure("spending", lambda: read_usage(store))
    for name in sorted(names):
        preset = cli_of(runs.get(name, "")).name
        claim = state.claims.get(name)
        told = {**noted["agents"].get(name, {}), "lapses_at": noted["lapses"].get(name, "")}
        record = agent_record(
            name, sessions.get(name), claim, told, footprints.get(name), store, settings, preset
        )
        commits, lines = noted["work"].get(f"{name}/{record['task']}", (None, None))
        record.update(
            title=claim.task.get("title", "") if claim else "",
            commits=commits,
            changed_lines=lines,
            cost_usd=round(cost_of_claim(store, claim, spending), 4) if claim else 0.0,
        )
        records.append(record)
    return records + on_hosts


# ------------------------------------------------------------------------------------- surroundings
# What agents stand in: the environment of the shell that has started them, and the settings and
# hooks that all worktrees share, which any of them can change. (tests/cases/test_other_shells.py)

# What differs from shell to shell, and says nothing of what agents need.
SHELLS_OWN = (
    "_",
    "PWD",
    "OLDPWD",
    "SHLVL",
    "COLUMNS",
    "LINES",
    "WINDOWID",
    "TERM",
    "TERM_PROGRAM",
    "TERM_PROGRAM_VERSION",
    "TERMCAP",
    "STY",
    "SSH_TTY",
    "SSH_CLIENT",
    "SSH_CONNECTION",
    "MAKEFLAGS",
    "MFLAGS",
    "MAKELEVEL",
    "GPG_TTY",
)


# Values go to the script by stdin: each user of the machine can read arguments.
def bring_environment(store: Store, socket: str) -> list[str]:
    """Give the tmux server what the caller's shell has (a new key, PATH, venv); the names that
    have changed since the last time.

    Idle agents are asked to start anew at once, those at work after their task. Values are kept
    as digests only.
    """
    import hashlib

    # a loop in tmux has what the server has, and is nobody's shell
    if given("FARM_AS_TOLD"):
        return []
    note = os.path.join(find_git_dirs(store.repo)[1], "farm/environment.json")
    others = ("FARM_", "TMUX", "GIT_CONFIG_", "BASH_FUNC_")
    # digests, as the note lies on disk and the values are keys and tokens
    now = {
        name: hashlib.sha256(os.fsencode(f"{name}={value}")).hexdigest()[:16]
        for name, value in os.environ.items()
        if name not in SHELLS_OWN and not name.startswith(others)
    }
    before = next(read_json_lines(note), {})
    os.makedirs(os.path.dirname(note), exist_ok=True)
    write_object(note, now)
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    live = living(probe_sessions(socket)) if before and changed else ()
    if not live:
        return []
    rows = [(name, os.environ[name]) if name in now else (name,) for name in changed]
    run_script("environ-tmux.sh", "-L", socket, stdin=write_tsv(rows), allow=(0, 3))
    for name in live:
        if name != CONTROL and os.path.isdir(store.path(f"mailbox/{name}")):
            write_whole(store.path(f"mailbox/{name}/renew"), "")
            ring(store.path(f"mailbox/{name}/bell"))
    return changed


SHARED_NOTE, SHARED_SECONDS = "farm/shared.json", 20.0


def describe_change(key: str, known: dict, now: dict, busy: list[str]) -> str:
    kind, _, name = key.partition(":")
    what = "was added" if key not in known else "is gone" if key not in now else "was changed"
    value = f" to {one_line(now[key], 60)!r}" if kind == "config" and key in now else ""
    who = ", ".join(busy) or "nobody"
    return f"{name} {what}{value}, which all worktrees share; at work then: {who}"


# Of a file only a digest is known, so its way back is for a person to find.
def undo_of(repo: str, key: str, known: dict) -> str:
    """The command that brings a shared setting or file back to what it was at the start."""
    kind, _, name = key.partition(":")
    if kind == "config":
        was = f"{name} {shell_word(known[key])}" if key in known else f"--unset-all {name}"
        return f"git -C {shell_word(repo)} config --local {was}   (if it is right: ./farm.py up)"
    path = shell_word(f"{find_git_dirs(repo)[1]}/{name}")
    wanted = "as before" if key in known else "removed"
    return f"look at {path}; it is to be {wanted} (if it is right: ./farm.py up)"


# Its time and not a number in it: each `up` writes it anew, also where nothing has changed.
def stamp_of(repo: str) -> str:
    """Which `up` has written the note of what is shared."""
    return str(changed_at(f"{find_git_dirs(repo)[1]}/{SHARED_NOTE}"))


def read_changes(store: Store) -> Advice:
    """(what, the command that undoes it) of what all worktrees share and has changed since the
    last `up`; what the loop had seen before that is found good."""
    found, stamp = store.read_loop()["changes"].values(), stamp_of(store.repo)
    return [(what, undo) for what, undo, seen in found if seen == stamp]


class SharedWatch:
    """What all worktrees share, beside what it was when a person has found it good, at the last
    `up`.

    changes: key -> [what, the command that undoes it, which note it was seen against].
    """

    def __init__(self, repo: str, changes: dict):
        self.repo, self.changes, self.due_at = repo, changes, 0.0
        self.note = f"{find_git_dirs(repo)[1]}/{SHARED_NOTE}"

    def read(self) -> dict[str, str]:
        return dict(run_script("merge/shared-state.sh", "-C", self.repo, timeout=30).rows)

    def remember(self) -> None:
        """What is so now is as it should be."""
        self.changes = {}
        make_parent(self.note)
        write_object(self.note, self.read())

    def compare(self, busy: list[str]) -> None:
        """Now and then: what differs. busy: the agents that are at work now."""
        stamp = stamp_of(self.repo)
        known = next(read_json_lines(self.note), None) if CLOCK.monotonic() >= self.due_at else None
        if known is None:
            return
        self.due_at, now = CLOCK.monotonic() + SHARED_SECONDS, self.read()
        keys = sorted(key for key in {*known, *now} if known.get(key) != now.get(key))
        for key in keys:
            # told once, with those who were at work when it was first seen: who begins later is no
            # suspect
            if self.changes.get(key, ("", "", ""))[2] != stamp:
                self.changes[key] = [
                    describe_change(key, known, now, busy),
                    undo_of(self.repo, key, known),
                    stamp,
                ]
                say(self.changes[key][0])
        # what was brought back is none any more
        self.changes = {key: self.changes[key] for key in keys}


# --------------------------------------------------------------------------------------- placement
# How agents get to other machines. Engines only give capacity: leases decide who lives.
# (tests/rooms/test_placement.py)

PLACED_FILE = "placed.json"  # host -> [engine, agents, what the engine says while it is not heard]


def run_place(verb: str, store: Store, hosts: dict, *args: str) -> dict[str, str]:
    """host -> what its engine says."""
    lines = "".join(f"{host}\t{share[0]}\t{share[1]}\n" for host, share in hosts.items())
    args = (verb, "-j", farm_socket(store.repo), "-p", sys.executable, *args)
    return dict(run_script("hosts/place.sh", *args, stdin=lines, timeout=7200).rows)


def start_placing(store: Store, settings: Settings) -> None:
    """From now on, hosts that are not heard are placed, again and again."""
    hosts = share_out(settings)
    hosts.pop("here", None)

    def go_on() -> None:
        while True:
            pause = 60.0
            try:
                pause = place_missing(store, settings, hosts)
            except (FarmError, OSError) as error:
                say(f"hosts cannot be placed: {error}")
            time.sleep(pause)

    if hosts:
        start_thread(go_on)


def place_missing(store: Store, settings: Settings, hosts: dict) -> float:
    """Place those that were not heard for a sixth of their lease, unless the farm is ending.
    Returns seconds until the next look: later where some are missing, as it may be for hours."""
    seconds = settings.host_lease_seconds / 6
    since = (CLOCK.now() - seconds) * 1e9
    missing = {
        host: share
        for host, share in hosts.items()
        if changed_at(store.path(f"hosts/{host}.json")) < since
    }
    if store.mode() in ("running", "paused"):
        to = f"{settings.hub_address}:{store.repo}"
        said = run_place("up", store, missing, "-u", to, "-o", settings.slurm)
        placed = {host: [*share, said.get(host, "")] for host, share in hosts.items()}
        note_placed(store, {**store.read_part(PLACED_FILE, "hosts"), **placed})
    return 4 * seconds if missing else seconds


def note_placed(store: Store, placed: dict) -> None:
    store.write_json(PLACED_FILE, {"schema": SCHEMA, "hosts": placed})


def end_placed(store: Store, seconds: float) -> None:
    """End what was placed; it has `seconds` to end by itself. What is left is kept for the next
    time."""
    if placed := store.read_part(PLACED_FILE, "hosts"):
        said = run_place("end", store, placed, "-w", str(seconds))
        left = {host: placed[host] for host in placed if said.get(host) != "ended"}
        for host in left:
            say(f"{host} could not be ended, its claims lapse: {said.get(host, '')}")
        note_placed(store, left)


# ------------------------------------------------------------------------------- worktrees and tmux
# What a farm consists of outside of its files: made, adopted, looked after while it works.
# (tests/rooms/test_farm.py, tests/rooms/test_recovery.py)

CLI_SETTINGS_FILE = "cli-settings.json"

# The loop is started again by the shell of its pane: nobody else looks after it. An agent's pane
# is the agent itself (exec), so that the pane's process and exit status are its own.
SESSION_COMMAND = """\
if [ "$FARM_AGENT_NAME" = control ]; then
  until "$FARM_HOME/scripts/farm" --repo "$FARM_REPO" run; do sleep 1; done
else
  exec bash "$FARM_HOME/scripts/run-agent.sh"
fi"""


class Sessions:
    """The worktrees and the tmux sessions of a farm: made, adopted, looked at, ended."""

    def __init__(self, site: Site, launches: dict[str, Launch]):
        self.store, self.settings, self.target = site
        self.repo, self.launches = self.store.repo, launches
        self.socket = find_server(self.repo)
        self.worktrees = {}  # agent -> mk-worktrees.sh's row
        self.found = {}  # name -> Session
        self.unable = ""  # why not all worktrees could be made

    # One after the other, by one script: of 60 `git worktree add`s that track a branch, 20 at
    # once, 36 failed for the lock of .git/config.
    def prepare(self) -> None:
        """Worktrees for all agents: made, adopted or repaired."""
        count, folder = count_here(self.settings), worktrees_folder(self.repo, self.settings)
        if not count:
            return
        base = ["-b", self.target] if self.target else []
        # two `up`s at once: git's own locks give up, this one waits
        with hold(self.store.path("worktrees.lock")):
            made = run_script(
                "mk-worktrees.sh",
                "-C",
                self.repo,
                "-n",
                str(count),
                "-d",
                folder,
                *base,
                timeout=3600,
                allow=(0, 1, 4),
            )
        self.worktrees = {row[0]: row for row in made.rows}
        if not self.worktrees:
            raise script_error("mk-worktrees.sh", made)
        self.unable = made.stderr.strip()
        if self.unable:  # some could not be made; the others work
            say(self.unable)

    def spawn(self, names: list[str]) -> list[list[str]]:
        """A session for each name that has none, by one call of tmux for all that run the same;
        returns spawn-tmux.sh's rows."""
        launches = defaultdict(list)
        for name in names:
            if name in self.worktrees:
                launches[self.launches[name]].append(self.worktrees[name])
        if CONTROL in names:
            launches[next(iter(launches), Launch("", "", ""))].append(
                [CONTROL, "-", self.repo, "reused"]
            )
        return [
            row
            for launch, rows in launches.items()
            for row in self.spawn_alike(launch, rows)
            if row[0] != CONTROL
        ]

    def environment_of(self, launch: Launch) -> dict[str, str]:
        """What run-agent.sh is told of the farm, and of the agent's CLI."""
        folder = worktrees_folder(self.repo, self.settings)
        is_boxed = is_sandboxed(launch.start) or is_isolated()
        return {
            "FARM_REPO": self.repo,
            "FARM_HOME": TOOLKIT,
            "FARM_PYTHON": sys.executable,
            "FARM_AGENT": launch.start,
            "FARM_AGENT_RESUME": launch.resume,
            "FARM_PRESET": launch.preset,
            "FARM_TARGET": self.target,
            "FARM_CLI_SETTINGS": self.store.path(CLI_SETTINGS_FILE),
            "FARM_WORKTREES": folder,
            "FARM_AGENT_HOME": os.path.expanduser(self.settings.agent_home),
            "FARM_PORTS": str(port_base(folder)),
            "FARM_AS_TOLD": "1",
            "FARM_BASH_ENV": given("FARM_BASH_ENV"),
            "FARM_SANDBOXED": "1" if self.settings.sandboxed or is_boxed else "",
            "FARM_CLI_STATE": ":".join(cli_of(launch.preset).state),
            "FARM_CLI_PASS": " ".join(cli_of(launch.preset).passes),
            **isolation_environment(),
            # else a CLI may refuse to work as root with all permissions, sandbox or not
            **({"IS_SANDBOX": "1"} if is_isolated() else {}),
        }

    def spawn_alike(self, launch: Launch, rows: list[list[str]]) -> list[list[str]]:
        told = self.environment_of(launch).items()
        pairs = [word for key, value in told for word in ("-e", f"{key}={value}")]
        where = ("-C", self.repo, "-L", self.socket, "-l", self.store.path("logs"))
        result = run_script(
            *("spawn-tmux.sh", *where, *pairs, "-c", SESSION_COMMAND),
            stdin=write_tsv(rows),
            allow=(0, 1),
            # `up` may be typed in a tmux or by an agent: neither is the new sessions' business
            env={"TMUX": "", "FARM_AGENT_NAME": ""},
        )
        if result.stderr.strip():
            say(result.stderr.strip())
        return result.rows

    def probe(self, known=()) -> None:
        """What sessions there are. tmux sees a pane close before it hears how: then it is asked
        again, five times. known: those whose end is news."""
        for _ in range(5):
            ended = [
                session
                for name, session in self.list_all().items()
                if session.dead and name in known
            ]
            if all(session.signal or session.exit_status is not None for session in ended):
                break
            time.sleep(0.05)

    def list_all(self) -> dict[str, Session]:
        """What the server tells. While it makes its socket anew it tells some nothing: then it
        is asked again, for two seconds."""

        def is_told() -> bool:
            self.socket = find_server(self.repo)
            self.found = probe_sessions(self.socket)
            return bool(self.found) or find_living_server(self.repo) is None

        wait_for(is_told, 2, 0.05)
        return self.found

    def find_strays(self, names) -> list:
        """What these agents have started, in whatever session it is: its environment names both
        this repo and the agent."""
        return [
            process for process, name in find_by_environment(FARM_REPO=self.repo) if name in names
        ]

    def end_strays(self, names: list[str], has_run: bool) -> None:
        """End what outlived its session (a killed tmux server's children, say): two must not
        write in one worktree."""
        # the loop's notes may be younger than the agents: a worktree that is there tells, too
        if has_run or any(row[3] != "created" for row in self.worktrees.values()):
            self.probe()
            if without := set(names) - living(self.found).keys():
                end_processes(self.find_strays(without))

    def find_trees(self, *more: int) -> list:
        """The processes of all sessions, and those at and below the pids `more`."""
        self.probe()
        pids, children = [one.pid for one in living(self.found).values()], process_children()
        return [process for pid in (*pids, *more) for process in tree_of(pid, children)]

    # The trees first: once the server is gone its panes' children belong to init, and only those
    # that have kept their environment can still be told apart.
    def end_all(self, names: list[str]) -> None:
        """End the sessions' process trees by pid and start time, then the private tmux server."""
        end_processes(self.find_trees(), 2.0)
        end_processes(self.find_strays(names), 1.0)
        run_script("stop-tmux.sh", "-C", self.repo, "-L", self.socket, "-a", allow=(0, 3))
        if pid := find_living_server(self.repo):
            end_processes(tree_of(pid, {}), 2.0)


STILL_SECONDS = 900.0


class Supervisor:
    """What agents at work have told or used up: who waits for a person, whose time or money is
    over, who stands still."""

    def __init__(self, store: Store, settings: Settings, launches: dict[str, Launch]):
        self.store, self.settings, self.launches = store, settings, launches
        self.turns = {}  # agent -> what its CLI's hooks said last
        self.cpu_seen = {}  # agent -> (epoch seconds, CPU seconds of its tree then)
        self.weighed_at = {}  # agent -> when its disk was looked at

    def watch(
        self, busy: list[Claim], agents: dict[str, dict], sessions: dict[str, Session], now: float
    ) -> None:
        """One look. agents: the loop's notes, where `still_since` is kept. Pauses the farm when all
        of it, what is at work included, has cost as much as it may."""
        # most ticks find it unchanged
        spending = self.store.recall(USAGE_FILE, lambda _: read_usage(self.store))
        live = {claim.agent: live_cost(self.store, claim, spending) for claim in busy}
        for name in agents.keys() - live.keys():
            agents[name].pop("still_since", None)
        for claim in busy:
            name, session = claim.agent, sessions.get(claim.agent)
            self.note_turns(claim)
            end_waiting_turn(self.store, name, self.turns[name], now)
            self.note_stillness(claim, agents[name], session, now)
            cost = cost_of_task(spending, claim.task["id"]) + live[name]
            over = self.find_excess(claim, session, cost, now)
            # once: at each tick until it has ended it is still over its limit
            if over and not read_mail(self.store, name, ENDING_FILE, claim.fence):
                say(f"{name}: {over[1]}")
                end_attempt(self.store, name, claim.fence, *over)
        cost = sum_usage(spending)["cost_usd"] + sum(live.values())
        if (why := describe_farm_overrun(self.settings, cost)) and self.store.mode() == "running":
            say(f"the farm pauses: {why}")
            set_mode(self.store, "paused", why)

    def note_stillness(
        self, claim: Claim, record: dict, session: Session | None, now: float
    ) -> None:
        """`still_since`: an agent at work whose output and whole process tree have stood still
        for STILL_SECONDS.

        Unknown is not stuck, and nothing is ended for it: `status` shows it to a person. A tree
        counts as still while all its CPU time since the last look (a minute ago, or longer) is
        below one percent.
        """
        quiet_since = max(epoch(claim.claimed_at), last_output_at(self.store, claim.agent))
        if (
            session is None
            or now - quiet_since < STILL_SECONDS
            or self.turns.get(claim.agent, {}).get("state") == "waiting"
        ):
            record.pop("still_since", None)
            self.cpu_seen.pop(claim.agent, None)
            return
        looked_at, cpu_before = self.cpu_seen.get(claim.agent, (0.0, 0.0))
        if now - looked_at < 60:
            return
        cpu_seconds = cpu_time_of(tree_of(session.pid, process_children()))
        self.cpu_seen[claim.agent] = (now, cpu_seconds)
        if looked_at and cpu_seconds - cpu_before < 0.01 * (now - looked_at):
            record.setdefault("still_since", utc(quiet_since))
        else:
            record.pop("still_since", None)

    def note_turns(self, claim: Claim) -> None:
        """An event in the history when an agent begins or ends to wait for a person."""
        name = claim.agent
        preset = self.launches[name].preset
        turn = read_turn(self.store, self.settings, name, claim.fence, preset)
        before, self.turns[name] = self.turns.get(name, {}), turn
        waits = [
            mail.get("state") == "waiting" and mail.get("fence") == claim.fence
            for mail in (before, turn)
        ]
        if waits[0] != waits[1]:
            self.store.append_event(
                "agent-waits" if waits[1] else "agent-goes-on",
                agent=name,
                why=turn.get("message", ""),
                id=claim.task["id"],
            )

    def find_excess(
        self, claim: Claim, session: Session | None, cost_usd: float, now: float
    ) -> tuple[str, str] | None:
        """(cause, words) when a claim is over its time limit or its task over its budget, or when
        its processes are too many, or take too much memory (their resident sizes added up) or
        disk, which is looked at every ten seconds."""
        task, limits = claim.get_task(), self.settings
        limit = task.time_limit_seconds or limits.task_seconds
        if limit and now - epoch(claim.claimed_at) > limit:
            return "time limit", f"its time limit of {duration(limit)} is over"
        if why := describe_overrun(task, limits, cost_usd):
            return "budget", why
        if not session or session.dead:
            return None
        if limits.agent_processes or limits.agent_memory_mib:
            tree = tree_of(session.pid, process_children())
            if 0 < limits.agent_processes < len(tree):
                return "processes", f"it has {len(tree)} processes: {limits.agent_processes} may be"
            mib = sum(map(resident_size, tree)) >> 20
            if 0 < limits.agent_memory_mib < mib:
                return "memory", f"it takes {mib} MiB of memory: {limits.agent_memory_mib} may be"
        if limits.agent_disk_mib and now - self.weighed_at.get(claim.agent, 0) > 10:
            self.weighed_at[claim.agent] = now
            above, place = os.path.split(worktree_of(self.store.repo, limits, claim.agent))
            places = (place, f"tmp/{claim.agent}", f"private/{claim.agent}")
            mib = sum(size_on_disk(f"{above}/{place}") for place in places) >> 20
            if mib > limits.agent_disk_mib:
                return "disk", f"its files take {mib} MiB of disk: {limits.agent_disk_mib} may be"
        return None


# ------------------------------------------------------------------------------------- housekeeping
# What landed work has left behind goes by itself, so that a farm is after a year as it was after a
# week: refs that the target contains, files that nobody reads. (tests/rooms/test_housekeeping.py)

# At most so often: tidying up is a git over all refs of the farm, sweeping a look at all its
# files.
TIDY_SECONDS, SWEEP_SECONDS, KEEP_SECONDS = 10.0, 3600.0, 60.0


def task_of_ref(ref: str) -> str:
    """The task that a pin or a branch of the farm belongs to; empty for any other ref."""
    found = re.fullmatch(
        r"refs/farm/(?:ready|returned)/([^/]+)(?:/(?:old-)?[\d.]+)?|"
        r"refs/heads/farm/[^/]+/([^/]+)|"
        r"refs/farm/in/[^/]+/([^/]+)\.\d+",
        ref,
    )
    return next(filter(None, found.groups())) if found else ""


# Only of tasks that are done: all other refs belong to work that may yet go on from them.
def find_leftovers(repo: str, target: str, state: State) -> tuple[list[list[str]], list[str]]:
    """([ref, sha] of landed work's refs that keep nothing any more, refs whose commits neither
    the target nor another pin has)."""
    rows = [
        row
        for row in run_script("merge/tidy-refs.sh", "list", "-C", repo, "-b", target).rows
        if state.is_done(task_of_ref(row[0]))
    ]
    pins = ("refs/farm/ready/", "refs/farm/returned/")
    pinned = {sha for ref, sha, where in rows if where == "out" and ref.startswith(pins)}
    # A pin may go where the target has its commit. A branch may go also where a pin keeps it, but
    # never the last name of a commit.
    over = [
        [ref, sha]
        for ref, sha, where in rows
        if where == "in" or sha in pinned and not ref.startswith(pins)
    ]
    return over, [ref for ref, sha, _ in rows if [ref, sha] not in over]


# As long as verdicts are kept a person may want the single commits; and while the target does not
# have what was made of them (somebody has moved it back) they are all that there is.
def find_superseded(repo: str, target: str, state: State, oldest: float) -> list[list[str]]:
    """[ref, sha] of the pins of work that has landed as another commit (squash, rebase) before
    `oldest` (epoch seconds), which the target has; some hundred at a time."""
    script = ("merge/tidy-refs.sh", "list", "-C", repo, "-b", target)
    pins = {
        ref: sha
        for ref, sha, where in run_script(*script).rows
        if where == "out" and ref.startswith("refs/farm/ready/")
    }
    tasks = {
        f"refs/farm/ready/{task.id}": task
        for task in (state.all_tasks() if any(map(state.is_done, map(task_of_ref, pins))) else ())
        if task.state == "landed" and epoch(task.landed_at) < oldest
    }
    pins = [[ref, pins[ref]] for ref in pins if ref in tasks and tasks[ref].commit == pins[ref]]
    lines = "".join(f"{tasks[ref].landed_commit}\n" for ref, _ in pins[:200])
    has = run_script("merge/tidy-refs.sh", "has", *script[2:], stdin=lines).stdout.split()
    return [pin for pin in pins if tasks[pin[0]].landed_commit in has]


def keep_objects(repo: str) -> None:
    """Take what is loose of git's objects out of the reach of sandboxed agents, into packs; one
    that is not what its name says stays, and is named."""
    if is_isolated(repo):
        said = run_script("sandbox/verify-objects.sh", "-C", repo, "-l", allow=(0, 1, 5)).stderr
        if said:
            say(said.strip())


class Housekeeping:
    """Tidies up after each landing, and once an hour what is older than FARM_KEEP_DAYS, and git's
    objects also where nothing lands, as on a host."""

    def __init__(self, site: Site):
        self.store, self.settings, self.target = site
        self.landed, self.tidy_at, self.sweep_at, self.keep_at = 0, 0.0, 0.0, 0.0
        self.packing, self.pack_at = None, 0.0  # the process that packs git's objects
        self.look_at = 0.0  # when there may be many of them

    def go_on(self, state: State) -> None:
        now = CLOCK.monotonic()
        if now >= self.keep_at:
            self.keep_at = now + KEEP_SECONDS
            keep_objects(self.store.repo)
        if state.count_landed() != self.landed and now >= self.tidy_at:
            self.tidy_at, self.landed = now + TIDY_SECONDS, state.count_landed()
            self.drop(find_leftovers(self.store.repo, self.target, state)[0])
            self.look_at = now
        if now >= self.look_at:
            self.look_at = now + SWEEP_SECONDS
            self.pack()
        if self.settings.keep_days and now >= self.sweep_at:
            self.sweep_at = now + SWEEP_SECONDS
            oldest = CLOCK.now() - self.settings.keep_days * 86400
            self.sweep(state, oldest)
            self.drop(find_superseded(self.store.repo, self.target, state, oldest))

    def drop(self, refs: list[list[str]]) -> None:
        """Delete each [ref, sha]: with the sha that was seen, so one that has moved stays."""
        lines = "".join(f"{ref} {sha}\n" for ref, sha in refs)
        if lines:
            run_script("merge/tidy-refs.sh", "drop", "-C", self.store.repo, stdin=lines)

    # Beside the loop, as it may take a minute. What cannot be packed (a damaged object, a full
    # disk) is tried again an hour later.
    def pack(self) -> None:
        """Have what agents and merges have written to git packed, when that is much."""
        code = self.packing.poll() if self.packing else 0
        if code:
            self.pack_at = CLOCK.monotonic() + SWEEP_SECONDS
        self.packing = self.packing if code is None else None
        if self.packing is None and CLOCK.monotonic() >= self.pack_at:
            self.packing = start_apart(
                ["bash", f"{SCRIPTS}/merge/pack-objects.sh", "-C", self.store.repo]
            )

    def close(self) -> None:
        """End the packing; what is not in a pack yet stays as it is."""
        if self.packing and self.packing.poll() is None:
            end_apart(self.packing)

    # Of trees that is safe for all: without its verdict a tree is gated once more. Prompts and
    # returns of tasks that are not done are still read.
    def sweep(self, state: State, oldest: float) -> None:
        """Remove what was written before `oldest` (epoch seconds): verdicts, and the prompts and
        returns of tasks that have landed, or are no more, as a host's are once it has given them
        back."""
        alive = {task.id for task in state.live_tasks() if task.state != "landed"}
        for folder in ("results", "returns", "prompts"):
            for name in names_in(self.store.path(folder)):
                path = self.store.path(f"{folder}/{name}")
                # t-0007.2.md, t-0007.txt; an id may have dots of its own
                found = re.fullmatch(r"(.+?)(?:\.\d+)?(?:\.resumed)?\.\w+", name)
                names = found and (found[1], name.rpartition(".")[0])
                is_over = found and (folder == "results" or alive.isdisjoint(names))
                try:
                    if is_over and os.stat(path).st_mtime < oldest:
                        os.unlink(path)
                except FileNotFoundError:
                    continue  # another has


# --------------------------------------------------------------------------------------------- loop
# Worktrees, sessions, loop: started, adopted, ended. Whatever is killed here goes on from disk at
# the next `up`. (tests/rooms/test_farm.py, tests/rooms/test_recovery.py,
# tests/rooms/test_stopping.py)


class MergerProcess:
    """One merger a farm, in a session of its own."""

    def __init__(self, store: Store):
        self.store, self.process, self.ends = store, None, []

    def is_ours(self) -> bool:
        """Whether one that we have started runs."""
        return self.process is not None and self.process.poll() is None

    # By the lock file and not by the child alone: after the loop was killed its merger goes on,
    # and is no child of the next loop.
    def tend(self, now: float) -> None:
        """Let the one that runs be, whoever has started it; else start one, unless it keeps
        ending."""
        if self.process and not self.is_ours():
            log = self.store.path("logs/merger.log")
            say(f"the merger ended with exit code {self.process.returncode}; see {log}")
            self.ends.append(now)
            self.process = None
        if self.process or find_recorded(self.store.path("merger.lock")):
            return
        # three of its ends are below PARK_AFTER: unlike an agent a merger is never given up
        if next_start(self.ends[-3:], now) <= now:
            self.start()

    # A session of its own: a Ctrl-C in the terminal of a foreground `run` goes to all of its group,
    # while it is for `down` to end the merger.
    def start(self) -> None:
        path = self.store.path("logs/merger.log")
        make_parent(path)  # somebody may have tidied up
        with open(path, "ab") as log:
            self.process = start_apart(
                [f"{SCRIPTS}/farm", "--repo", self.store.repo, "merge", "--watch"],
                stdout=log,
                stderr=log,
                cwd=TOOLKIT,
                # this interpreter, as it has the packages that a merger needs
                env={**os.environ, "FARM_AS_TOLD": "1", "FARM_PYTHON": sys.executable},
            )


# The order of a tick: the merger first, as it needs nothing of what may go wrong below; then what
# has ended, whose tasks are free by that, before what is due starts again; idle agents are rung
# last, when all that can be claimed is there.
class Farm:
    """The lifecycle of a farm. Crash-only: kill it at any time, start it again, and it goes on
    from disk."""

    def __init__(self, store: Store, settings: Settings, launches: list[Launch], target: str):
        """launches: what each agent runs; empty for a farm that is only stopped."""
        self.store, self.settings, self.target = site = Site(store, settings, target)
        self.repo = store.repo
        self.names = agent_names(count_here(settings))
        self.launches = dict(zip(self.names, launches, strict=False))
        self.sessions = Sessions(site, self.launches)
        self.supervisor = Supervisor(store, settings, self.launches)
        noted = store.read_loop()
        self.agents = noted["agents"]
        # what `tell` has said, and what those at work have done
        self.told, self.work = noted["told"], WorkCount()
        # agent -> when the lease of its unseen owner is over (UTC)
        self.lapses = {}
        self.leases = LeaseWatch(settings)
        self.merger = MergerProcess(store)
        self.blocked = self.saved = ""
        self.identity = []  # user.name and user.email at the start by a person
        self.shared = SharedWatch(self.repo, noted["changes"])
        self.housekeeping = Housekeeping(site)
        self.tell = lambda: None  # a hook: called in each tick, before what is known is saved
        self.is_over = lambda: False  # a hook: asked after each tick, whether to end the run

    def ending(self) -> Ending:
        return Ending(self)

    # -- start

    def up(self) -> tuple[int, int]:
        """Worktrees, sessions, and the loop in tmux; (started, adopted). Run again: adopts what
        runs, repairs what does not.

        A loop and a merger that were told something else (another gate, say), or that run
        another version of this file, start anew; sessions go on with what they have.
        """
        before = self.store.read_part(FARM_FILE, "settings")
        toolkit = self.store.farm().get("toolkit")
        self.remember("running")
        changed = ["settings have"] * (before not in ({}, self.settings_to_keep()))
        changed += ["toolkit has"] * (toolkit != self.version())
        if before and changed and find_recorded(self.store.path("loop.lock")):
            say(f"the {changed[0]} changed: the loop and the merger start anew")
            self.ending().stop_loop_and_merger()
        self.prepare()
        self.expire()
        has_loop = find_recorded(self.store.path("loop.lock"))
        rows = self.sessions.spawn(self.names if has_loop else [*self.names, CONTROL])
        adopted = sum(row[3] == "running" for row in rows)
        return len(rows) - adopted, adopted

    def prepare(self) -> None:
        """Worktrees and the tmux server are there, with the caller's environment, and nothing of
        an earlier farm that is not adopted."""
        self.sessions.prepare()
        if changed := bring_environment(self.store, self.sessions.socket):
            say(
                f"the environment has changed ({', '.join(changed)}): idle agents start anew now, "
                f"busy ones after their task"
            )
            self.ending().stop_loop_and_merger()
        self.sessions.end_strays(self.names, bool(self.agents))

    def remember(self, mode: str, reason: str = "") -> None:
        """What the farm is to do, and with which settings: a later `up`, `merge` or `claim`
        reads it.

        At a start by a person every CLI gets its chance again, and interrupted tasks are kept
        for their agents from now on.
        """
        with self.store.transaction() as tx:
            told = {
                "mode": mode,
                "reason": reason,
                "settings": self.settings_to_keep(),
                "toolkit": self.version(),
                "isolation": os.environ.get("FARM_ISOLATE", "none"),
                "identity": self.identity or tx.store.farm().get("identity", []),
            }
            tx.store.write_json(FARM_FILE, {"schema": SCHEMA, **told})
            if mode == "running":
                tx.store.write_json(CLI_SETTINGS_FILE, hook_settings(self.settings))
                if not given("FARM_AS_TOLD"):
                    forget_limits(tx)
                TaskQueue(tx).keep_for_agents(self.names)

    @staticmethod
    def version() -> str:
        """Which farm.py this is, as far as the loop and the merger need to know."""
        status = os.stat(__file__)
        return f"{status.st_mtime_ns}.{status.st_size}"

    def settings_to_keep(self) -> dict:
        """What a person has said: the loop is carried what that came to, which must not count as
        said when the next `up` gives agents other permissions."""
        kept = {**self.settings._asdict(), "into": self.target}
        if given("FARM_AS_TOLD"):
            kept["isolate"] = self.store.read_part(FARM_FILE, "settings").get("isolate", "")
        return kept

    # -- the loop

    def tick(self) -> None:
        now = CLOCK.now()
        if not self.store.is_there():  # else the next move would begin a queue with nothing in it
            raise DamagedState(
                f"{self.store.folder} is gone while {number(len(self.names), 'agent')} run",
                "./farm.py doctor --fix, or ./farm.py down",
            )
        # needs nothing of the others: what is wrong with an agent keeps no finished work from main
        self.merger.tend(now)
        self.sessions.probe([name for name, record in self.agents.items() if "pid" in record])
        if not self.sessions.found and (pid := find_living_server(self.repo)):
            raise FarmError(
                f"tmux ({pid}) runs, and does not answer at {self.sessions.socket}",
                f"kill -USR1 {pid}   (it makes its socket anew)",
            )
        self.reap(now)
        self.expire()
        self.restart(now)
        self.supervisor.watch(self.find_busy(), self.agents, self.sessions.found, now)
        self.admit()
        self.shared.compare(self.state.busy())
        self.work.go_on(self.store, self.state, self.settings, self.target)
        self.housekeeping.go_on(self.state)
        self.tell()
        self.save()

    def reap(self, now: float) -> None:
        """Note each session that ended: its cause, its strays ended, its unsaved work kept."""
        for name in self.names:
            session = self.sessions.found.get(name)
            record = self.agents.setdefault(name, {"ends": []})
            if session and not session.dead:
                if record.get("down"):  # somebody's `up` started it: it gets all its chances again
                    record = self.agents[name] = {"ends": []}
                if record.get("pid") != session.pid:
                    record["pid"] = session.pid
                    self.store.append_event("session-started", agent=name)
                continue
            if record.pop("pid", None) is None and "down" in record:
                continue
            record.update(down=True, cause=end_cause(session), since=utc(now))
            if record["cause"] != "done":  # which is a session that was asked to start anew
                record["ends"] = [*recent_ends(record["ends"], now), now]
            end_processes(self.sessions.find_strays([name]))
            worktree = worktree_of(self.repo, self.settings, name)
            if os.path.isdir(worktree):
                record["rescue"] = rescue(self.repo, name, worktree)
            self.store.append_event("session-ended", agent=name, cause=record["cause"])
            say(f"{name}: {record['cause']}")

    def expire(self) -> None:
        """Give the tasks of dead owners back to the queue, their unsaved work kept first."""
        rescues = rescue_dead_owners(self.store, self.settings)
        rescues.update(
            {name: record["rescue"] for name, record in self.agents.items() if record.get("rescue")}
        )
        with self.store.transaction() as tx:
            for claim in TaskQueue(tx).expire(self.leases.is_lapsed, rescues):
                say(f"{claim.agent} is gone; {claim.task.get('id', 'its locks')} is free again")
            self.state = tx.state
        self.lapses = {
            claim.agent: utc(CLOCK.now() + self.leases.seconds_left(claim))
            for claim in self.state.claims.values()
            if is_unseen(claim)
        }

    def restart(self, now: float) -> None:
        """Start what is down and due; park what keeps ending."""
        due = []
        for name in self.names:
            record = self.agents[name]
            if not record.get("down"):
                continue
            start_at = next_start(record["ends"], now)
            if start_at is None and not record.get("parked"):
                record["parked"] = True
                say(
                    f"{name} is parked: it ended {len(record['ends'])} times in 15 min, last: "
                    f"{record['cause']}"
                )
            elif start_at is not None and start_at <= now:
                due.append(name)
        if not due or not self.has_room():
            return
        self.sessions.prepare()
        self.sessions.spawn(due)
        for name in due:
            self.agents[name] = pick(self.agents[name], ("ends", "cause"))

    def has_room(self) -> bool:
        """Whether memory and disk allow a new start; says so when that changes."""
        short = find_shortage(self.store.folder, self.settings.min_free_mib)
        if short != self.blocked:
            self.blocked = short
            say(f"no new work starts: {short}" if short else "there is room again")
        return not short

    def admit(self) -> None:
        """Ring as many idle agents as there are tasks to claim, those that an interrupted task
        is kept for first."""
        if self.store.mode() == "paused":
            return
        busy = self.state.busy()
        kept = {task.conversation.get("agent") for task in self.state.pending.values()}
        idle = [
            name
            for name in self.names
            if name not in busy
            and not self.agents[name].get("down")
            and not find_limit(self.store, limit_key(self.launches[name].preset))
        ]
        idle.sort(key=lambda name: name not in kept)
        with self.store.transaction() as tx:
            tasks = TaskQueue(tx).claimable("")
        if not tasks or not idle or not self.has_room():
            return
        takes = {name: self.presets_of(name) for name in idle}
        for task in tasks:
            fitting = (name for name in idle if task.preset in ("", *takes[name]))
            if name := next(fitting, ""):
                idle.remove(name)
                ring(self.store.path(f"mailbox/{name}/bell"))

    def presets_of(self, name: str) -> tuple:
        """Whose tasks an agent takes."""
        return find_presets(self.store, self.settings, limit_key(self.launches[name].preset))

    def save(self) -> None:
        """loop.json for `status` and for the next loop: how sessions ended, who is parked, what
        was told, what was counted."""
        data = {
            "schema": SCHEMA,
            "agents": self.agents,
            "blocked": self.blocked,
            "told": self.told,
            "work": self.work.found,
            "lapses": self.lapses,
            "changes": self.shared.changes,
        }
        text = dump_line(data) + "\n"
        if text != self.saved:
            write_whole(self.store.path(LOOP_FILE), text)
            self.saved = text

    def is_drained(self) -> bool:
        """Nothing is claimed, nothing is ready, and nothing that waits can ever start."""
        state = self.state
        return (
            not state.ready and not state.claimed() and find_stranded(state) == state.pending.keys()
        )

    def wait(self, should_stop) -> None:
        """Until a move is made, a session's process is gone, a backoff is over, or five seconds
        have passed."""
        before, seconds = self.signature(), self.next_look()
        pids = [record["pid"] for record in self.agents.values() if "pid" in record]
        wait_for(
            lambda: (
                self.signature() != before
                or should_stop.is_set()
                or not all(map(process_exists, pids))
            ),
            seconds,
            0.2,
            should_stop.wait,
        )

    def find_busy(self) -> list[Claim]:
        """The claims of our agents that are at work on a task."""
        return [
            claim
            for claim in self.state.claims.values()
            if claim.task and claim.agent in self.names
        ]

    def signature(self) -> tuple:
        """What changes with each move, and with each event of a CLI's hooks."""
        turns = (
            self.store.path(f"mailbox/{claim.agent}/{TURN_FILE}") for claim in self.find_busy()
        )
        return (*self.store.signature(), *map(changed_at, turns))

    def next_look(self) -> float:
        """Seconds until something is due: a backoff's end, or a session's start."""
        now = CLOCK.now()
        dues = [
            epoch(task.not_before)
            for task in self.state.pending.values()
            if task.not_before and task.state == "pending"
        ]
        dues += [
            epoch(limit["until"])
            for limit in read_limits(self.store).values()
            if limit["until"] > utc(now)
        ]
        dues += [
            next_start(record["ends"], now) or now + 5
            for record in self.agents.values()
            if record.get("down")
        ]
        limits = self.settings  # a hog does harm quickly
        longest = 0.5 if limits.agent_memory_mib or limits.agent_processes else 5.0
        return min([longest, *(max(0.2, due - now) for due in dues)])

    def run(self, should_stop) -> None:
        """The loop, in the foreground, until `should_stop` is set or `is_over` says so."""
        failures = 0
        self.prepare()
        self.sessions.spawn(self.names)
        try:
            while not should_stop.is_set():
                try:
                    self.tick()
                    failures = 0
                except Exception as error:
                    # the loop outlives what it did not expect: said, logged, tried again later
                    failures += 1
                    self.report_failure(error)
                    should_stop.wait(min(2.0**failures, 60))
                    continue
                if self.is_over():
                    self.housekeeping.tidy_at = 0.0
                    self.housekeeping.go_on(self.state)
                    return
                self.wait(should_stop)
        finally:
            self.housekeeping.close()

    def report_failure(self, error: Exception) -> None:
        import traceback

        say(f"the loop: {error}" + (f"\n  try: {error.hint}" if getattr(error, "hint", "") else ""))
        if not self.store.is_there():
            return  # nothing is written where everything was taken away
        text = f"{utc_now()}\n{traceback.format_exc()}"
        try:
            path = self.store.path("logs/loop.log")
            make_parent(path)
            self.store.disk.append(path, text.encode())
        except OSError:
            pass  # a full disk, which was the failure itself: the loop outlives that, too


class Ending:
    """A farm's end: the loop and the merger, then the sessions; all work is kept, all claims are
    free."""

    def __init__(self, farm: Farm):
        self.farm, self.repo, self.names = farm, farm.repo, farm.names
        self.store, self.settings, self.sessions = farm.store, farm.settings, farm.sessions

    @property
    def is_blind(self) -> bool:
        """Whether coordination/ is gone: then sessions can be ended, and nothing be said of
        claims."""
        return not self.store.is_there()

    def estop(self) -> list[str]:
        """Everything stops this second, by a signal that nobody can catch; then all work is kept
        and all claims are freed."""
        names = {*self.everyone(), CONTROL}
        # all found before the first is killed, as parents lead to children only while they live
        trees = self.sessions.find_trees(*self.find_loop_and_merger())

        strays = self.sessions.find_strays
        end_all(lambda: list(filter(is_alive, [*trees, *strays(names)])), 5)
        end_all_gates(worktrees_folder(self.repo, self.settings))
        return self.down(0)

    def down(self, grace_seconds: float, hurry=lambda: False) -> list[str]:
        """Let agents finish, then end exactly what is the farm's, keep all work, free all
        claims. Returns rescue refs."""
        if self.is_blind:
            say(
                f"{self.store.folder} is gone; the sessions are ended all the same (then: "
                f"./farm.py doctor --fix)"
            )
        else:
            # before the wait: who ends a task now must not claim the next
            self.farm.remember("stopping")
        # first: the loop would start again what is ended here
        self.stop_loop_and_merger()
        names = self.names = self.everyone()
        # an idle agent waits at its bell, and sees at once that the farm is stopping
        for name in names:
            ring(self.store.path(f"mailbox/{name}/bell"))
        wait_for(lambda: hurry() or not self.find_busy(), grace_seconds, 0.1)
        # before the work is kept: a rescue beside a writer would keep half a file
        self.sessions.end_all(names)
        end_placed(self.store, grace_seconds)
        kept = self.keep_work()
        if not self.is_blind:
            self.farm.remember("down")
        return kept

    def stop_loop_and_merger(self) -> None:
        """The control session first, so that nothing starts the loop again."""
        run_script(
            "stop-tmux.sh", "-C", self.repo, "-L", self.sessions.socket, CONTROL, allow=(0, 3)
        )
        pids, merger = self.find_loop_and_merger(), self.farm.merger
        if merger.is_ours():
            pids.append(merger.process.pid)
        # these two alone: a landing outlives its merger
        own = [process for pid in {*pids} - {os.getpid()} for process in tree_of(pid, {})]
        end_processes(own, 5.0)
        # a push outlives its merger
        end_processes([process for process, _ in find_by_environment(FARM_PUSH=self.repo)], 2.0)
        # a merger that has not yet locked its file
        end_processes(self.sessions.find_strays([CONTROL]), 5.0)
        end_all_gates(worktrees_folder(self.repo, self.settings))

    def find_loop_and_merger(self) -> list[int]:
        """The pids of those that run."""
        locks = map(self.store.path, ("loop.lock", "merger.lock"))
        return list(filter(None, map(find_recorded, locks)))

    def everyone(self) -> list[str]:
        """Our agents, and those of a farm that was larger: by their sessions, or by a claim and
        a worktree of ours."""
        holders = {
            claim.agent
            for claim in self.find_claims()
            if os.path.isdir(worktree_of(self.repo, self.settings, claim.agent))
        }
        return sorted({*self.names, *self.sessions.list_all(), *holders} - {CONTROL})

    def find_claims(self) -> list[Claim]:
        return [] if self.is_blind else list(self.store.snapshot().claims.values())

    def find_busy(self) -> list[str]:
        """Those of our agents that are at work on a task."""
        return [
            claim.agent for claim in self.find_claims() if claim.task and claim.agent in self.names
        ]

    def keep_work(self) -> list[str]:
        """Rescue what agents were at work on, and give every claim back unharmed.

        What lies in other worktrees stays there: `down` removes none, and whoever resets or
        removes one rescues it first.
        """
        from concurrent.futures import ThreadPoolExecutor

        def keep(name: str) -> tuple[str, str]:
            place = worktree_of(self.repo, self.settings, name)
            return name, rescue(self.repo, name, place) if os.path.isdir(place) else ""

        # a rescue is git over a whole worktree; fifty of them one by one would be a long goodbye
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            rescues = dict(pool.map(keep, self.names if self.is_blind else self.find_busy()))
        kept = [*filter(None, rescues.values())]
        if self.is_blind:
            return kept
        with self.store.transaction() as tx:
            for claim in list(tx.state.claims.values()):
                if claim.agent in self.names and is_orphan(claim):
                    TaskQueue(tx).end_claim(claim, rescues.get(claim.agent, ""))
        return kept


def open_farm(call: Call) -> Farm:
    """A Farm from the settings, everything checked that would stop its agents later."""
    settings = call.settings()
    # first, as all below calls them
    run_script("check-tools.sh", "git", "tmux", *re.findall(r"\bssh\b|\bslurm\b", settings.on))
    target = target_of(call)
    settings = settings._replace(n=count_agents(settings, call.options.get("n")))
    if settings.on not in ("", "here") and read_mix(settings.agent):
        raise UsageError("a mix of agents can run here only")
    carry_isolation(settings)
    keep_objects(call.repo)
    launches = resolve_agents(call.repo, settings) if count_here(settings) else []
    if settings.prompt_template:
        read_template(call.repo, settings)
    for row in run_script("merge/check-repo.sh", "-s", "-C", call.repo).rows:
        raise Refused(*row)
    for what, hint in (obstacles := find_obstacles(call)):
        say(f"{what}\n  try: {hint}")
    blocked = {what.split()[2].lower() for what, _ in obstacles}
    everybody = {f"farm/{name}" for name in agent_names(settings.n)}
    if blocked & {"farm", "refs/farm", "refs/farm/ready"} or blocked >= everybody:
        raise FarmError("nobody could work: " + obstacles[0][0], obstacles[0][1])
    call.store.ensure_folders()
    farm = Farm(call.store, settings, launches, target)
    # a person has started it: what is so now is as it should be
    if not given("FARM_AS_TOLD"):
        farm.identity = call.repo_info["identity"]
        farm.shared.remember()
    return farm


def find_lonely(state: State, keys: set[str]) -> dict[str, str]:
    """id -> words of each pending task whose preset is none of the farm's, `keys`."""
    return {
        task.id: f"{task.id} is for {task.preset}, and no agent of the farm is"
        for task in state.pending.values()
        if task.state == "pending" and task.preset not in ("", *keys)
    }


# Sessions without a farm.json: somebody has removed coordination/, and they have to be ended all
# the same.
def started_farm(call: Call) -> Farm:
    """The farm that the last `up` started, to steer it. Raises NotFound."""
    settings = call.settings()
    if call.store.read_json(FARM_FILE) is None and not probe_sessions(find_server(call.repo)):
        raise NotFound("no farm was started here", "./farm.py up")
    is_isolated(call.repo)
    return Farm(call.store, settings, [], settings.into)


def say_kept(refs: list[str]) -> None:
    for ref in refs:
        say(f"unsaved work is kept: {ref}")


# --------------------------------------------------------------------------------------------- news
# Who must be told what: a person by FARM_NOTIFY, everybody by tmux's line; and whether anything can
# move without one. The loop asks at the end of each tick, by hooks, and knows nothing of it.
# (tests/rooms/test_news.py)

NOTICE_SECONDS = 60.0


class Standstill:
    """Whether nothing can move without a person, and has not for a while: then a run that ends
    when all is done ends, too.

    found: (exit code, why) while that is so.
    """

    def __init__(self, farm: Farm):
        self.farm, self.found, self.begun_at = farm, None, 0.0

    def is_reached(self) -> bool:
        """True once it has been so for the whole of the grace."""
        now, found = CLOCK.monotonic(), self.find()
        if not found or not self.found or found[0] != self.found[0]:
            self.begun_at = now
        self.found = found
        return found is not None and now - self.begun_at >= self.farm.settings.grace_seconds

    def find(self) -> tuple[int, str] | None:
        """(exit code, why) where nothing can move without a person; None while something can."""
        farm, store, state = self.farm, self.farm.store, self.farm.state
        activity = find_activity(store)
        if state.claimed() or activity.get("testing"):
            return None
        if activity.get("trouble") and (state.ready or not farm.sessions.worktrees):
            return 5, activity["trouble"][0]
        stranded = find_stranded(state)
        waiting = [task for task in state.pending.values() if task.id not in stranded]
        free = [task for task in waiting if all(map(state.is_done, task.after))]
        reviews = find_reviews(store, state)
        if reviews and not free and reviews.keys() == state.ready.keys():
            return 5, f"{', '.join(reviews)} wait for a review"
        if state.ready or not waiting:
            return None
        if store.mode() == "paused":
            return 5, f"the farm is paused: {store.farm().get('reason', '')}"
        if len(farm.names) < farm.settings.n:  # a host may be able
            return None
        able = [
            name
            for name in farm.names
            if name in farm.sessions.worktrees and not farm.agents.get(name, {}).get("parked")
        ]
        if not able:
            why = farm.sessions.unable or "every agent is parked"
            return 1, f"nobody is left who could work: {why}"
        keys = {limit_key(farm.launches[name].preset) for name in able}
        limits = [find_limit(store, key) for key in sorted(keys)]
        if all(limits):
            return 5, limits[0]
        lonely = find_lonely(state, keys)
        if lonely and all(task.id in lonely for task in waiting):
            return 5, next(iter(lonely.values()))
        return (5, f"no new work starts: {farm.blocked}") if farm.blocked else None


def names_of(task: Task) -> dict:
    return {"agent": task.agent, "task": task.id, "title": task.title}


class News:
    """What a loop tells. One of its own a loop; what was told is kept in loop.json over
    restarts."""

    def __init__(self, farm: Farm, on_drained):
        """on_drained(store): called once when everything is done, before anybody is told."""
        self.farm, self.on_drained = farm, on_drained
        self.store, self.settings = farm.store, farm.settings
        self.line, self.line_at, self.notices = "", -math.inf, []
        self.news = {}  # key -> event of all that is so now and calls for a person

    def tell(self) -> None:
        """What a person should know and was not told yet: once each."""
        try:
            self.find_news()
            for key, event in self.news.items():
                if key not in self.farm.told:
                    self.notify({"at": utc_now(), "repo": self.farm.repo, **event})
            self.farm.told = list(self.news)
            self.show_in_tmux()
        except (OSError, FarmError) as error:
            say(f"nobody could be told what happened: {error}")

    def add(self, key: str, message: str, hint: str, **more) -> None:
        """A piece of news as FARM_NOTIFY gets it; the key's first word is the event's name."""
        self.news[key] = {"event": key.split()[0], "message": message, "try": hint, **more}

    def find_news(self) -> None:
        self.news, state = {}, self.farm.state
        self.find_waiting()
        for task in failed_tasks(state):
            hint = f"./farm.py retry {task.id}"
            self.add(f"failed {task.id}.{task.rev}", task.reason, hint, **names_of(task))
        for task_id, commit in find_reviews(self.store, state).items():
            title, hint = state.ready[task_id].title, f"./farm.py diff {task_id}"
            self.add(f"review {task_id} {commit}", title, hint, task=task_id, commit=commit)
        if trouble := find_activity(self.store).get("trouble"):
            self.add(f"blocked {trouble[0]}", *trouble)
        for key in sorted({limit_key(launch.preset) for launch in self.farm.launches.values()}):
            if limit := find_limit(self.store, key):
                self.add(f"limited {limit.partition(' until ')[0]}", limit, "./farm.py up")
        counts = state.count_states()
        if counts and self.farm.is_drained():
            words = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
            self.add("drained", words, "./farm.py report", tasks=dict(counts))

    def find_waiting(self) -> None:
        """The agents that wait for a person."""
        farm = self.farm
        for claim in farm.find_busy():
            name = claim.agent
            state, since, message = judge_session(
                farm.sessions.found.get(name),
                claim,
                farm.agents.get(name, {}),
                None,
                farm.supervisor.turns.get(name, {}),
                farm.launches[name].preset,
            )
            if state == "waiting":
                hint, names = f"./farm.py attach {agent_number(name)}", names_of(claim.get_task())
                self.add(f"waiting {claim.fence} {since}", message, hint, **names)

    def notify(self, event: dict) -> None:
        """Say it, write the report when all is done, and run the user's command in the
        background."""
        what = " ".join(filter(None, (event["event"], event.get("agent"), event.get("task"))))
        say(f"{what}: {one_line(event['message'], 200)}")
        if event["event"] == "drained":
            self.on_drained(self.store)
        if self.settings.notify:
            thread = start_thread(run_notice, self.settings.notify, event, self.store)
            self.notices = [*(notice for notice in self.notices if notice.is_alive()), thread]

    def finish(self, seconds: float) -> None:
        """Wait for commands that are being told something."""
        deadline = CLOCK.monotonic() + seconds
        for notice in self.notices:
            notice.join(max(0.0, deadline - CLOCK.monotonic()))

    def describe_counts(self) -> str:
        """The farm in one short line."""
        farm, state = self.farm, self.farm.state
        busy, turns = farm.find_busy(), farm.supervisor.turns
        waiting = sum(turns.get(claim.agent, {}).get("state") == "waiting" for claim in busy)
        reviews, failed = len(find_reviews(self.store, state)), len(failed_tasks(state))
        parts = (
            "paused" * (self.store.mode() == "paused"),
            f"{reviews} to review" * bool(reviews),
            f"{waiting} wait for you" * bool(waiting),
            f"{len(busy) - waiting} work",
            f"{len(farm.names) - len(busy)} idle",
            f"{len(state.ready)} to merge",
            f"{state.count_landed()}/{state.count_states().total()} landed",
            f"{failed} failed" * bool(failed),
        )
        return " \u00b7 ".join(filter(None, parts))

    def show_in_tmux(self) -> None:
        """The farm's counts on the status line of its own tmux server, when they have changed;
        every five seconds at the most."""
        line = self.describe_counts()
        is_time = line != self.line and CLOCK.monotonic() - self.line_at >= 5
        if is_time and self.farm.sessions.found:
            self.line, self.line_at = line, CLOCK.monotonic()
            run_script(
                "note-tmux.sh", "-L", self.farm.sessions.socket, line, allow=(0, 1, 3), timeout=10
            )


def run_notice(command: str, event: dict, store: Store) -> None:
    """Run FARM_NOTIFY with `event` on its stdin; its output and how it ended go to
    logs/notify.log. Never raises."""
    import subprocess

    # so that `down` ends it too
    env = {**os.environ, "FARM_REPO": store.repo, "FARM_AGENT_NAME": CONTROL}
    try:
        with open(store.path("logs/notify.log"), "ab") as log:
            process = start_apart(
                shell(command),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=store.repo,
                env=env,
            )
            try:
                process.communicate(line_bytes(event), timeout=NOTICE_SECONDS)
            except subprocess.TimeoutExpired:
                end_apart(process)
                # what it had started dies with it; the kernel takes its time to bury it
                end_all(lambda: in_session(process.pid), 2)
            log.write(f"{utc_now()} {event['event']}: exit code {process.returncode}\n".encode())
    except OSError as error:
        say(f"FARM_NOTIFY: {error}")


# -------------------------------------------------------------------------------------------- hosts
# The hub's side of other machines: each host's moves are made here, in one process, from lines on
# one connection. All state stays here, and fences refuse what comes too late.
# (tests/rooms/test_hosts.py)

LINE_BYTES_MAX = 1024 * 1024
ORDER_SECONDS = 600.0  # nobody waits as long for the answer to an order


def get_text(words: dict, key: str) -> str:
    """Raises UsageError where the line has no text under `key`."""
    if not isinstance(words.get(key), str):
        raise UsageError(f"{key} must be text")
    return words[key]


class HostMoves:
    """What one host may do: the moves of its own agents, each answered the same when it is asked
    again, because a connection may break between a move and its answer.

    A line is {"id", "move", ...}; its answer {"id", "code", "mode"} with what the move gives, or
    "error"; code is an exit code, mode the farm's.
    """

    def __init__(self, call: Call, host: str):
        self.call, self.store, self.settings = call, call.store, call.settings()
        self.host, self.moves = checked_name(host, "host"), ("hello",)
        if host == os.uname().nodename:
            raise Refused(
                f"{host} is this machine's own name, and no process of a host is looked for here",
                "farm spoke HUB --name ANOTHER",
            )
        self.watch = LeaseWatch(self.settings)

    def answer(self, line: bytes) -> dict:
        """Make one line's move."""
        answer = {"id": None, "code": 0}
        try:
            words = json.loads(line)
            answer["id"], move = words.get("id"), get_text(words, "move")
            if move not in self.moves:
                raise Refused(f"a host can {', '.join(self.moves)} now, not {move[:40]!r}")
            answer.update(getattr(self, move)(words) or {}, mode=self.store.mode())
        except OSError as error:
            answer.update(code=FarmError.exit_code, error=str(describe_os_error(error)))
        except (
            FarmError,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            RecursionError,
        ) as error:
            answer.update(code=getattr(error, "exit_code", 2), error=str(error))
        return answer

    def get_agent(self, words: dict) -> str:
        """Raises Refused for an agent of the hub or of another host."""
        name = get_text(words, "agent")
        if not re.fullmatch(re.escape(self.host) + r"-agent-\d{3}", name):
            raise Refused(f"{name[:60]!r} is no agent of the host {self.host}")
        return name

    def hello(self, words: dict) -> dict:
        """Tells who owns what is claimed here: the host's name is the door's word, the rest its
        own."""
        told = (get_text(words, "start"), get_text(words, "boot"))
        self.owner = Owner(int(get_text(words, "pid")), *told, self.host, "host:" + self.host)
        self.moves = ("hello", "claim", "renew", "release", "fail", "submit")
        return {
            "target": target_of(self.call),
            "lease_seconds": self.settings.host_lease_seconds,
            "settings": {**self.settings._asdict(), "worktrees": "", "agent_home": "", "on": ""},
            "identity": self.call.repo_info["identity"],
        }

    def claim(self, words: dict) -> dict:
        """{"claim", "returned"}: the claim, and why the work of the attempt before came back."""
        agent, takes = self.get_agent(words), tuple(words["takes"])
        check_hand_out(self.store, self.settings)
        asked = (agent, self.owner, "", {"preset": get_text(words, "preset")}, takes)
        claim = take_over(self.store, self.watch, lambda tx: TaskQueue(tx).claim(*asked))
        return {"claim": claim.to_json(), "returned": read_return(self.store, claim.get_task())}

    def renew(self, words: dict) -> dict:
        """{"lost"}: of "claims", [{"agent", "fence"}], the fences that are none any more. All in
        one transaction; without any it only hears that the host lives, and how its "agents" are
        (records as `status --json` has them)."""
        claims = [(self.get_agent(claim), get_text(claim, "fence")) for claim in words["claims"]]
        self.note_agents(words["agents"], words.get("about", {}))
        lost = []
        if claims:
            with self.store.transaction() as tx:
                for agent, fence in claims:
                    try:
                        TaskQueue(tx).renew(agent, fence, sync=False)
                    except Refused:
                        lost.append(fence)
                self.store.sync_folder(self.store.path(LOCK_FOLDER))
        return {"lost": lost, "orders": self.pass_orders(words.get("done", {}))}

    def pass_orders(self, done: dict) -> dict:
        """id -> what a person has typed here for this host; `done` has the answers to earlier
        ones, for those who still wait for them. What a killed verb has left goes: a host that
        starts anew would do it once more."""
        folder, orders = self.store.path(f"orders/{self.host}"), {}
        for name in names_in(folder):
            key, _, ending = name.rpartition(".")
            if CLOCK.now() - changed_at(f"{folder}/{name}") / 1e9 > ORDER_SECONDS:
                self.store.discard(f"{folder}/{name}")
            elif ending == "order" and key in done:
                write_object(f"{folder}/{key}.answer", done[key])
            elif ending == "order" and (
                order := self.store.read_json(f"orders/{self.host}/{name}")
            ):
                orders[key] = order
        return orders

    def note_agents(self, agents: list, about: dict) -> None:
        """Write down that the host is there, and how, for `status` and `doctor`."""
        kinds = TOLD_OF_AGENT.items()
        records = [
            {key: told[key] if type(told.get(key)) is type(kind) else kind for key, kind in kinds}
            for told in agents
            if self.get_agent(told)
        ]
        told = {"heard_at": utc_now(), "agents": records}
        told.update({key: one_line(str(about.get(key, "")), 500) for key in TOLD_OF_HOST})
        told["apart"] = round(float(about.get("now", CLOCK.now())) - CLOCK.now())
        path = self.store.path(f"hosts/{self.host}.json")
        make_parent(path)
        write_object(path, told)

    def fail(self, words: dict) -> None:
        """fail, release or submit, as the host's own record of the "task" tells of its end: why,
        and in which conversation it goes on; "start" is what it began from. A commit is here
        already: it was pushed to the host's own ref of this fence."""
        agent, fence = self.get_agent(words), get_text(words, "fence")
        task, move = Task.from_json(words["task"]), words["move"]
        kept = task.conversation.get("until") and task.conversation.get("id", "")
        more = {"conversation": kept if kept and is_name(kept) else "", "resume": bool(kept)}
        if words.get("has_rescue"):
            more["rescue"] = arrival_of(self.host, f"rescue/{fence}")
        if move == "fail":
            start = arrival_of(self.host, fence) if task.start != words.get("start") else ""
            more.update(retry=task.state != "failed", start=start)
        if move == "submit":
            if not re.fullmatch(r"[0-9a-f]{40,64}", task.commit):
                raise UsageError("commit must be a whole sha")
            submit(self.store, agent, fence, commit=task.commit)
        else:
            with self.store.transaction() as tx:
                getattr(TaskQueue(tx), move)(agent, fence, one_line(task.reason, 500), **more)
        self.note_usage(words)

    release = submit = fail

    def note_usage(self, words: dict) -> None:
        """What the attempt has cost counts for the farm's budget; a repeat is the same line."""
        told = {"task": words["fence"].rpartition(".")[0], "agent": words["agent"]}
        for line in filter(is_usage, words.get("usage", ())):
            spent = Usage(line["tokens_in"], line["tokens_out"], line["cost_usd"])
            keys = ("preset", "conversation")
            kept = {key: line[key] for key in keys if isinstance(line.get(key), str)}
            note_usage(self.store, {**told, "fence": words["fence"], **kept}, spent)


def order(store: Store, host: str, *argv: str, stdin: str = "", seconds: float = 30.0) -> dict:
    """Have a host run a verb on its own farm: {"code", "out", "err"}. Its connection takes the
    order there, as no host need be reached from here. Raises FarmError when nothing comes back."""
    path = store.path(f"orders/{host}/{random_uuid()}")
    make_parent(path)
    write_object(path + ".order", {"argv": argv, "stdin": stdin})
    try:
        if not wait_for(lambda: os.path.exists(path + ".answer"), seconds, 0.05):
            raise FarmError(f"{host} has not answered within {seconds:.0f} s", "./farm.py status")
        return read_object(path + ".answer")
    finally:
        for ending in (".order", ".answer"):
            if os.path.exists(path + ending):
                os.unlink(path + ending)


def serve_lines(moves: HostMoves, reader, writer) -> None:
    """Answer each whole line until the input ends: half a line is no move. Who is silent for four
    leases is gone, and this process, too. Raises UsageError for a line that has no end."""
    import signal

    silence = math.ceil(4 * moves.settings.host_lease_seconds)
    signal.alarm(silence)
    while (line := reader.readline(LINE_BYTES_MAX)).endswith(b"\n"):
        signal.alarm(silence)
        writer.write(os.fsencode(dump_line(moves.answer(line)) + "\n"))
        writer.flush()
    if len(line) == LINE_BYTES_MAX:
        raise UsageError(f"a line of more than {LINE_BYTES_MAX} bytes")


# -------------------------------------------------------------------------------------------- spoke
# A host's side: its agents run in a farm of the host's own, whose queue holds what the hub has
# leased to them. What ends here is kept here until the hub has taken it.
# (tests/rooms/test_spoke.py, tests/rooms/test_spoke_clones.py)

SSH_OPTIONS = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10"


def ssh_command() -> str:
    """How hosts are reached: GIT_SSH_COMMAND, as git has it, without any question."""
    return f"{os.environ.get('GIT_SSH_COMMAND', 'ssh')} {SSH_OPTIONS}"


class Link:
    """The one lasting connection of a host to its hub. It is made anew when it breaks or hangs,
    and the move is asked again: each answers a repeat the same."""

    def __init__(self, hub: str, owner: dict):
        import threading

        self.command = f"exec {ssh_command()} {shell_word(hub)} 'farm serve'"
        self.owner, self.lock = owner, threading.Lock()
        self.process = self.socket = self.reader = None
        self.told: dict = {"lease_seconds": 90.0}  # what the hub has answered to hello
        self.mode = ""  # of the hub's farm

    def ask(self, move: str, **words) -> dict:
        """The answer, whatever its code. Raises FarmError when there is none in time, and the
        hub's refusal of this host."""
        with self.lock:
            # below a third of the lease, so that the next renewal is in time
            self.deadline, pause = CLOCK.monotonic() + self.told["lease_seconds"] / 4, 0.1
            while True:
                try:
                    if self.process is None:
                        self.connect()
                    return self.exchange(move, words)
                except (OSError, ValueError) as error:
                    self.close()
                    if CLOCK.monotonic() + pause > self.deadline:
                        raise FarmError(f"the hub does not answer: {error}") from None
                time.sleep(pause)
                pause = min(2 * pause, 2.0)

    def connect(self) -> None:
        import socket

        self.socket, other = socket.socketpair()
        self.reader = self.socket.makefile("rb")
        with other:
            self.process = start_apart(["bash", "-c", self.command], stdin=other, stdout=other)
        told = self.exchange("hello", self.owner)
        if told["code"]:
            self.close()
            raise Refused(told["error"])
        self.told = told

    def exchange(self, move: str, words: dict) -> dict:
        """One line there, one back. Raises OSError, or ValueError for no line of JSON."""
        self.socket.settimeout(self.deadline - CLOCK.monotonic())
        self.socket.sendall(os.fsencode(dump_line({"move": move, **words}) + "\n"))
        line = self.reader.readline()
        if not line:
            raise ConnectionError("the connection ended")
        answer = json.loads(line)
        self.mode = answer.get("mode", self.mode)
        return answer

    def close(self) -> None:
        """End the connection and what it runs in."""
        if self.process is not None:
            end_apart(self.process)
            self.reader.close()
            self.socket.close()
            self.process = None


class Carrier:
    """Brings tasks from the hub to a host's own farm, and commits and moves back.

    A task is here from the claim on the hub until the hub has answered the move that ended it;
    its record has under HUB {"agent", "fence", "attempts", "start"} as they came, and "name": the
    agent's, as it is called here.
    """

    def __init__(self, farm: Farm, link: Link, host: str, stop):
        """stop: called when the hub's farm is over; with 2, when nobody may finish."""
        import threading

        self.farm, self.store, self.link, self.host, self.stop = farm, farm.store, link, host, stop
        self.third = link.told["lease_seconds"] / 3
        self.takes_new, self.is_over = True, threading.Event()
        self.coming: list[dict] = []  # claims that are not yet in this host's queue
        self.pushed: dict[str, str] = {}  # fence -> the commit that the hub has
        self.broken: dict[str, str] = {}  # fence -> why git there does not take its commit
        self.lost: set[str] = set()  # fences that the hub has given to others
        self.done: dict[str, dict] = {}  # answers to orders that the hub may not have
        self.troubles: dict = {}  # what each thread could not do at its last try
        job = given("SLURM_JOB_ID")
        self.about = {
            "toolkit": run_script("hosts/describe.sh").stdout.strip(),
            "farm": f"{TOOLKIT}/farm.py --repo {self.store.repo}",
            "reach": f"srun --jobid={job} --overlap --pty" if job else "",
        }
        self.renew_at = self.push_at = 0.0
        self.sight = Sight(0.02)
        for duty in (self.keep, self.go_on):
            start_thread(self.repeat, duty)

    def repeat(self, duty) -> None:
        """`duty` each second until the end. What goes wrong is said once, and tried again."""
        while not self.is_over.wait(1.0):
            before, trouble = self.troubles.get(duty, ""), ""
            try:
                duty()
            except Exception as error:
                trouble = str(error)
            self.troubles[duty] = trouble
            if trouble != before:
                say(trouble or "the hub is there again")

    def finish(self, seconds: float) -> None:
        """What has ended here goes to the hub, as far as that can be done in time."""
        self.takes_new = False
        wait_for(lambda: not self.find_held(), seconds, 0.1)
        self.is_over.set()
        try:
            self.link.ask("renew", claims=[], agents=[])
        except FarmError as error:
            say(f"{error}; it sees after a lease that nobody is here")
        if held := self.find_held():
            say(f"{number(len(held), 'task')} could not be given back; the next start does that")

    # -- what is here

    def find_living(self) -> dict[str, Session]:
        return living(self.farm.sessions.found)

    def find_held(self) -> list[Task]:
        """What is here of the hub: not yet begun, at work, or ended."""
        state = self.store.snapshot()
        tasks = (*state.pending.values(), *state.claimed().values(), *state.ready.values())
        return [task for task in tasks if HUB in task.extra]

    def has_ended(self, task: Task) -> bool:
        """Whether it is to go back: its attempt is over, or its agent will not begin it."""
        has_agent = self.takes_new and task.extra[HUB]["name"] in self.find_living()
        return task.state != "claimed" and (task.ended_by != "" or not has_agent)

    # -- to the hub

    def keep(self) -> None:
        """Renew what is here each third of the lease; in between, hear of the farm's mode."""
        begun, claims = CLOCK.monotonic(), []
        if begun >= self.renew_at:
            claims = [*self.coming, *(task.extra[HUB] for task in self.find_held())]
        about = {**self.about, "now": CLOCK.now(), "trouble": self.find_trouble()}
        told = {"agents": self.describe_agents(), "about": about, "done": self.done}
        answer = self.link.ask("renew", claims=claims, **told)
        if answer["code"]:
            raise FarmError(f"the hub did not renew: {answer['error']}")
        self.lost.update(answer["lost"])
        if claims:
            self.renew_at = begun + self.third
        if self.link.mode in ("stopping", "down"):
            self.stop(1)
        orders = answer["orders"].items()
        self.done = {key: self.done.get(key) or self.obey(**order) for key, order in orders}

    def find_trouble(self) -> str:
        """What keeps this host from its work now."""
        return self.farm.blocked or next(filter(None, self.troubles.values()), "")

    def obey(self, argv: list[str], stdin: str) -> dict:
        """Run a verb here that a person has typed on the hub."""
        if argv == ["estop"]:
            self.stop(2)
            return {"code": 0, "out": "", "err": ""}
        words, env = ("--repo", self.store.repo, *argv), {"FARM_PYTHON": sys.executable}
        way = {"env": env, "timeout": self.third, "allow": range(256), "detach": True}
        try:
            done = run_script("farm", *words, stdin=stdin, **way)
        except FarmError as error:
            return {"code": error.exit_code, "out": "", "err": str(error)}
        return {"code": done.code, "out": done.stdout[-99_000:], "err": done.stderr[-9000:]}

    def describe_agents(self) -> list[dict]:
        """Their records as `status` here has them, by their names on the hub."""
        store, settings, state = self.store, self.farm.settings, self.store.snapshot()
        records = agent_records(store, state, settings, self.sight)
        return [{**record, "agent": f"{self.host}-{record['agent']}"} for record in records]

    def go_on(self) -> None:
        """One round: commits and ended attempts to the hub, new tasks from it. Raises FarmError
        for what could not be done."""
        held = self.find_held()
        self.push(held)
        troubles = [
            self.give_back(task)
            for task in held
            if task.extra[HUB]["fence"] in self.lost or self.has_ended(task)
        ]
        # where nothing may begin, a claim would keep a task from those who could
        if self.takes_new and self.farm.has_room():
            troubles.append(self.bring())
        if any(troubles):
            raise FarmError("; ".join(filter(None, troubles)))

    def push(self, held: list[Task]) -> None:
        """Commits to refs of the fences on the hub: those of ended attempts at once, those of
        agents at work each third of the lease."""
        is_due, lines = CLOCK.monotonic() >= self.push_at, []
        for task in held:
            fence, name = task.extra[HUB]["fence"], task.extra[HUB]["name"]
            is_moving = task.state == "claimed" and (is_due or fence in self.lost)
            if task.ended_by or is_moving:
                branch = f"refs/heads/{branch_of(name, task.id)}"
                commit = task.commit if task.state == "ready" else branch
                lines.append(f"{commit} {fence} {self.pushed.get(fence, '-')}\n")
                if task.rescue.startswith("refs/farm/rescue/"):
                    lines.append(f"{task.rescue} rescue/{fence} -\n")
        if is_due:
            self.push_at = CLOCK.monotonic() + self.third
        if lines:
            at = ("-C", self.store.repo, "-t", self.host)
            rows = read_tsv(run_carry("push", *at, stdin="".join(lines)))
            self.pushed.update(row for row in rows if len(row) == 2)
            self.broken = {row[0]: one_line(row[2], 400) for row in rows if len(row) > 2}

    def give_back(self, task: Task) -> str:
        """Make the move on the hub that has ended an attempt here, and end here what is another's
        by now; then the task is the hub's. Returns why it stays."""
        note, fence = task.extra[HUB], task.extra[HUB]["fence"]
        move = "fail" if task.attempts > note["attempts"] else "release"
        if why := self.broken.get(fence):  # what it has committed is here alone, and stays
            task = task._replace(start=note["start"])
            if task.state == "ready":
                why = f"git on the hub does not take its commit: {why}"
                task, move = task._replace(state="pending", reason=why), "fail"
        told = task if self.takes_new else task._replace(conversation={})
        more = {
            "task": told.to_json(),
            "has_rescue": f"rescue/{fence}" in self.pushed,
            "usage": [line for line in read_usage(self.store) if line["fence"] == task.fence],
        }
        answer = {"code": Refused.exit_code, "error": f"{self.host} was not heard of in its lease"}
        if fence not in self.lost:
            answer = self.link.ask("submit" if task.state == "ready" else move, **note, **more)
        if answer["code"] not in (0, Refused.exit_code):
            return f"{task.id} stays here: {answer['error']}"
        with self.store.transaction() as tx:
            claim = tx.state.find_holder(task.id)
            take_out(tx, task.id)
        if answer["code"]:
            say(f"{task.id} is another's by now: {answer['error']}")
        if claim is not None:
            end_attempt(self.store, claim.agent, claim.fence, "lost", answer["error"])
        self.lost.discard(fence)
        for name in (fence, f"rescue/{fence}"):
            self.pushed.pop(name, None)
        return ""

    # -- from the hub

    def find_idle(self) -> list[str]:
        """Agents that could begin a task now."""
        busy = {task.extra[HUB]["name"] for task in self.find_held()}
        return [
            name
            for name in self.farm.names
            if name not in busy
            and name in self.find_living()
            and not find_limit(self.store, limit_key(self.farm.launches[name].preset))
        ]

    def bring(self) -> str:
        """A task for each idle agent, as far as there are some: its commits first, then into this
        host's queue, for this agent only. Returns why there are no more, in trouble."""
        found, answer = [], {"code": 0}
        self.coming = []
        for name in self.find_idle():
            agent, preset = f"{self.host}-{name}", self.farm.launches[name].preset
            takes = self.farm.presets_of(name)
            answer = self.link.ask("claim", agent=agent, preset=preset, takes=takes)
            if answer["code"]:
                break
            self.coming.append({"agent": agent, "fence": answer["claim"]["fence"]})
            found.append((name, Claim.from_json(answer["claim"]).get_task(), answer["returned"]))
        if found:
            self.take_in(found)
        return answer["error"] if answer["code"] not in (0, NotFound.exit_code) else ""

    def take_in(self, found: list[tuple[str, Task, str]]) -> None:
        """Claimed tasks of the hub as pending ones here: (agent, task, why it came back) each."""
        starts = [(task.start, local_start(task)) for _, task, _ in found if task.start]
        starts += [(task.rescue, task.rescue) for _, task, _ in found if task.rescue]
        lines = "".join(f"{there} {here}\n" for there, here in starts)
        at = ("-C", self.store.repo, "-b", self.farm.target)
        there = run_carry("fetch", *at, stdin=lines).split()
        with self.store.transaction() as tx:
            for name, task, returned in found:
                self.put(tx, name, task, local_start(task) if local_start(task) in there else "")
                if returned:
                    path = self.store.path(f"returns/{task.id}.{task.attempts}.txt")
                    write_whole(path, returned)
        self.coming = []
        for name, _, _ in found:
            ring(self.store.path(f"mailbox/{name}/bell"))

    def put(self, tx: Transaction, name: str, task: Task, start: str) -> None:
        """Its order and its paths are the hub's business; its number is above that of any copy
        which was here."""
        known = tx.state.find_task(task.id)
        take_out(tx, task.id)
        note = {
            "agent": task.agent,
            "fence": task.fence,
            "name": name,
            "attempts": task.attempts,
            "start": start,
        }
        tx.state.pending[task.id] = task._replace(
            state="pending",
            rev=max(task.rev, known.rev if known else 0),
            seq=tx.state.next_seq(),
            max_attempts=10**6,
            not_before="",  # by the hub's clock, which has handed it out
            after=[],
            paths=[],
            preset="",
            start=start,
            conversation={**task.conversation, "agent": name, "until": NEVER},
            extra={**task.extra, HUB: note},
        )
        tx.write("pending")


def local_start(task: Task) -> str:
    """The ref here that holds what a task of the hub begins from; a branch of the hub could be
    called like one of this host's own."""
    is_returned = task.start.startswith("refs/farm/returned/")
    return task.start if is_returned else f"refs/farm/from/{task.fence}"


def take_out(tx: Transaction, task_id: str) -> None:
    """Remove a task from wherever it is."""
    if place := tx.state.place_of(task_id):
        tx.drop_source(place, task_id)


def run_carry(*args: str, **options) -> str:
    """git to and from the hub, by the host's own key; ended with all that it has started when
    its time is over."""
    env = {"GIT_SSH_COMMAND": ssh_command(), "GIT_SSH_VARIANT": "ssh"}
    return run_script("hosts/carry.sh", *args, env=env, detach=True, **options).stdout


# ====================================================================================== PART V Eyes

# ------------------------------------------------------------------------------------------- tables
# Rows for a terminal or a pipe, and JSON for programs. (tests/rooms/test_status.py)


def one_width(line: str, width: int) -> str:
    """A line cut to `width` columns of a terminal, with an ellipsis."""
    if text_width(line) <= width:
        return line
    while line and text_width(line) > width - 1:
        line = line[:-1]
    return (line + "\u2026")[: max(0, width)]


def for_screen(lines, width: int) -> list[str]:
    """Lines as a terminal of `width` shows them; 0: as they are."""
    return [one_width(local_times(line), width) if width else line for line in lines]


def text_width(text: str) -> int:
    """Columns of a terminal: wide characters take two, combining ones none."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(
        2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text
    )


def terminal_size() -> tuple[int, int]:
    """Columns and lines; 80 and 24 where the terminal does not say (0 and 0)."""
    columns, lines = os.get_terminal_size(1)
    return columns or 80, lines or 24


def shown_width() -> int:
    """Columns for what goes to stdout, 0 in a pipe; COLUMNS in the environment goes first."""
    import shutil

    return max(20, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 0


def fit_columns(rows: list[list], headers: list[str], spare: tuple, width: int) -> list[int]:
    """Which columns a table of `width` has room for: those of `spare` go first, in that order.
    The last one may be cut to 12."""
    widths = [
        max(map(text_width, (header, *(row[index] for row in rows))))
        for index, header in enumerate(headers)
    ]
    kept = list(range(len(headers)))
    for name in spare:
        if sum(widths[index] + 2 for index in kept[:-1]) + min(widths[kept[-1]], 12) <= width:
            break
        kept.remove(headers.index(name))
    return kept


def undirected(text: str) -> str:
    """`text` without what makes a terminal write from right to left."""
    return re.sub("[\u200e\u200f\u202a-\u202e\u2066-\u2069]", "", text)


def table_lines(rows: list[list], headers: list[str], spare: tuple, width: int) -> list[str]:
    """A table cut to `width` (columns named in `spare` go first); width 0: tab-separated,
    without a head, all columns."""
    rows = [[undirected(one_line(str(cell))) for cell in row] for row in rows]
    if not width:
        return ["\t".join(row) for row in rows]
    rows = [list(map(local_times, row)) for row in rows]
    tabulate = import_package("tabulate")
    tabulate.MIN_PADDING = 0  # else a column is two wider than its head
    kept = fit_columns(rows, headers, spare, width)
    text = tabulate.tabulate(
        [[row[index] for index in kept] for row in rows],
        headers=[headers[index] for index in kept],
        tablefmt="plain",
        disable_numparse=True,
    )
    return [one_width(line, width) for line in text.split("\n")]


def print_table(rows: list[list], headers: list[str]) -> None:
    """A table on a terminal, tab-separated in a pipe."""
    for line in table_lines(rows, headers, (), shown_width()):
        print(line)


def task_record(task: Task, state: State, now: float) -> dict:
    """What `tasks --json` says of a task."""
    keys = ("id", "state", "title", "agent", "attempts", "rev", "reason")
    record = pick(task._asdict(), keys)
    record["state"] = derived_state(task, state, now)
    if task.state == "pending" and (wait := describe_wait(task, state, now)):
        record["waits"] = wait
    more = {key: value for key, value in task.to_json().items() if key != "prompt"}
    return {**record, **more, **record}


# --------------------------------------------------------------------------------- status and watch
# Who needs a person, why, and what to type. Looking takes no lock and writes nothing; what is slow
# (git, tmux, processes) gets a time limit or a share of a core.
# (tests/rooms/test_status.py, tests/rooms/test_watch.py)


def farm_status(store: Store, settings: Settings, sight: Sight) -> dict:
    """What `status --json` prints: what is damaged under `problems`, the rest as far as it goes."""
    agents, activity, farm = [], {}, {}
    state, problems = load_anyway(store)
    try:
        farm = store.farm()
        activity = find_activity(store)
        agents = agent_records(store, state, settings, sight)
    except FarmError as error:
        problems, sight.error = problems or [str(error)], error
    now, records = CLOCK.now(), []
    if not problems and (traces := find_traces(store, worktrees_folder(store.repo, settings))):
        problems = [traces]
    if not problems:
        records, problems = queue_records(store, state), [str(sight.error)] if sight.error else []
    loop, mode = find_recorded(store.path("loop.lock")), farm.get("mode", "")
    status = {
        "agents": agents,
        "tasks": dict(state.count_states(lambda task: derived_state(task, state, now))),
        "merge_queue": dict(Counter(record["state"] for record in records)),
        "queue_line": describe_queue(state, records, activity),
        "loop": {"pid": loop, "alive": loop is not None},
        "mode": mode,
        "reason": farm.get("reason", ""),
        "trouble": activity.get("trouble", []),
        "target": activity.get("target", ""),
        "landed_at": sorted(task.landed_at for task in state.landed.values())[-20:],
        "spent": sum_usage(sight.measure("spending", lambda: read_usage(store))),
        "reviews": [
            pick(record, ("id", "commit", "title"))
            for record in records
            if record["state"] == "review"
        ],
        "changes": read_changes(store) if not problems else [],
        "lonely": list_lonely(state, settings, mode),
    }
    steps = next_steps(status, problems, state)
    status["next"] = [{"what": what, "try": hint} for what, hint in steps]
    code = sight.error.exit_code if sight.error else DamagedState.exit_code
    return {**status, "problems": problems, "exit_code": code} if problems else status


def list_lonely(state: State, settings: Settings, mode: str) -> list[list[str]]:
    """[what, what to type] for each task whose preset no agent of a farm that is up has."""
    if mode not in ("running", "paused"):
        return []
    keys = {limit_key(cli_of(agent).name) for agent in share_agents(settings)}
    return [
        [what, f"./farm.py edit {task_id} --agent ''"]
        for task_id, what in find_lonely(state, keys).items()
    ]


# What a person can do about an agent in each state of trouble; the order is that of `status`.
STEPS_OF = {
    "waiting": ("waits for a person", "attach {0}"),
    "stuck": ("is stuck", "attach {0}"),
    "parked": ("is parked", "logs {0} && ./farm.py up"),
    "dead": ("ended", "logs {0}"),
    "failed": ("failed", "logs {0}"),
    "zombie": ("is a zombie", "logs {0}"),
    "unseen": ("is held elsewhere", "release {0} --fence {1}"),
    "limited": ("", ""),
}
STATE_ORDER = (*STEPS_OF, "lost", "starting", "working", "idle", "stopped")


def state_rank_of(state: str) -> int:
    """Those that need a person first, unknown states last."""
    return STATE_ORDER.index(state) if state in STATE_ORDER else len(STATE_ORDER)


def state_rank(record: dict) -> tuple:
    return state_rank_of(record["state"]), record["agent"]


def steps_of_agents(records: list[dict]) -> Advice:
    """(what is the matter, what to type) for each agent that needs a person."""
    steps = []
    for record in sorted(records, key=state_rank):
        words, command = STEPS_OF.get(record["state"], ("", ""))
        why = record["cause"]
        if record["state"] == "limited":
            steps.append((why, "./farm.py up"))
        elif words:
            host = record.get("host", "")
            name = record["agent"].removeprefix(host + "-")
            command = command.format(agent_number(name), record.get("fence", ""))
            what = f"{record['agent']} {words}" + (f": {why}" if why else "")
            where = f"on {host}: ./farm.py --repo {record['worktree']} " if host else "./farm.py "
            steps.append((what, where + command))
    return list(dict.fromkeys(steps))  # one line for all whom one limit holds up


def next_steps(status: dict, problems: list[str], state: State) -> Advice:
    """(what is the matter, what to type) for each trouble, the most pressing first."""
    steps = [(problem, "./farm.py doctor") for problem in problems]
    steps += steps_of_agents(status["agents"])
    if reviews := status.get("reviews"):  # one line for all: what is below it has to be seen, too
        first, more = reviews[0], len(reviews) - 1
        who = f"{first['id']} and {more} more wait" if more else f"{first['id']} waits"
        what = f"{who} for a review: {first['title']}"
        steps.append((what, f"./farm.py diff {first['id']}"))
    steps += [*status.get("lonely", ()), *status.get("changes", ())]
    if status["trouble"]:
        steps.append(tuple(status["trouble"]))
    if status["mode"] == "paused":
        why, _, command = status["reason"].partition("; to go on: ")
        steps.append(
            (why or "the farm is paused: no new work is handed out", command or "./farm.py resume")
        )
    if not status["loop"]["alive"]:
        stopped = "no loop runs: nothing is started, restarted or merged"
        steps.append(
            (stopped, "./farm.py up")
            if status["tasks"]
            else ("there is no task yet", "./farm.py add 'what to do'")
        )
    return steps + [
        (f"{task.id} failed: {task.reason}", f"./farm.py retry {task.id}")
        for task in failed_tasks(state)
    ]


def agent_row(record: dict) -> list[str]:
    note = record["cause"] or record.get("title", "")
    cost = f"${record['cost_usd']:.2f}" if record.get("cost_usd") else "-"
    counts = ("changed_lines", "commits")
    return [
        record["agent"],
        record["state"],
        ago(record["since"]),
        record["task"] or "-",
        *("-" if record.get(key) is None else record[key] for key in counts),
        f"{record['cpu_percent']:.0f}%",
        f"{record['rss_bytes'] >> 20}M",
        ago(record["last_output_at"]),
        cost,
        note,
    ]


def status_lines(status: dict, room: int = 6) -> list[str]:
    """What stands below the agents: tasks, merge queue, loop, and what a person should type
    next, in `room` lines."""
    tasks = count_words(status["tasks"], sorted(status["tasks"])) or "none"
    loop = f"running (pid {status['loop']['pid']})" if status["loop"]["alive"] else "not running"
    mode = f", {status['mode']}" if status["mode"] in ("paused", "stopping") else ""
    steps = [f"next: {step['try']} # {step['what']}" for step in status["next"]]
    if len(steps) > room > 0:
        steps[room - 1 :] = [f"next: ./farm.py status --json # {len(steps) - room + 1} more"]
    spent = [f"cost: {describe_usage(status['spent'])}"] if any(status["spent"].values()) else []
    heard = {
        agent["host"]: f" heard {ago(agent['heard_at'])} ago"
        + f" ({agent['trouble']})" * bool(agent["trouble"])
        for agent in status["agents"]
        if "host" in agent
    }
    says = {host: f" ({said})" for host, (*_, said) in status.get("placed", {}).items() if said}
    hosts = [f"{host}{heard.get(host, '')}{says.get(host, '')}" for host in sorted({*heard, *says})]
    lines = [
        f"tasks: {tasks}",
        f"merge queue: {status['queue_line']}",
        *([f"hosts: {', '.join(hosts)}"] if hosts else ()),
        *spent,
        f"loop: {loop}{mode}",
        *steps[:room],
    ]
    return [one_line(line) for line in lines]


# a head here is a cell in agent_row; what a record does not have yet: agent_record, for agents on
# hosts TOLD_OF_AGENT (both in sessions)
COLUMNS = [
    "AGENT",
    "STATE",
    "FOR",
    "TASK",
    "LINES",
    "COMMITS",
    "CPU",
    "MEM",
    "OUTPUT",
    "COST",
    "NOTE",
]
# what goes first where the terminal is too narrow
SPARE_COLUMNS = ("NOTE", "COST", "MEM", "CPU", "OUTPUT", "COMMITS", "LINES")


def status_text(status: dict, width: int, height: int = 0) -> list[str]:
    """Agents that need a person first, then counts, then what to type next: lines of `width` (0:
    tab-separated), at most `height` of them (0: all).
    """
    below = for_screen(map(as_typed, status_lines(status)), width)
    records, heads = sorted(status["agents"], key=state_rank), list(COLUMNS)
    rows = [agent_row(record) for record in records]
    if any("host" in record for record in records):
        heads.insert(1, "HOST")
        for record, row in zip(records, rows, strict=True):
            row.insert(1, record.get("host", "-"))
    room = max(2, height - len(below) - 2) if height else len(rows)
    table = table_lines(rows[:room], heads, SPARE_COLUMNS, width) if rows else []
    return table + ([f"... {len(rows) - room} more"] if len(rows) > room else []) + below


def print_status(status: dict) -> None:
    print("\n".join(status_text(status, shown_width())))


def count_words(counts: dict, names) -> str:
    """`landed 3 \u00b7 ready 1`: what there is none of is left out."""
    return " \u00b7 ".join(f"{name} {counts[name]}" for name in names if counts[name])


def count_over(counts: dict) -> tuple[int, int]:
    """How many tasks are over, and of how many."""
    over = sum(counts.get(name, 0) for name in ("landed", "failed", "canceled"))
    return over, sum(counts.values())


class Progress:
    """A bar on a terminal, a line in a pipe whenever the counts change."""

    def __init__(self):
        self.is_terminal, self.last = sys.stdout.isatty(), ""

    def show(self, state: State) -> None:
        counts = state.count_states()
        over, total = count_over(counts)
        shown = ("landed", "ready", "claimed", "pending", "failed", "canceled")
        words = count_words(counts, shown)
        if words == self.last:
            return
        self.last = words
        if self.is_terminal:
            bar = "#" * (24 * over // max(total, 1))
            print(f"\r\x1b[K[{bar:<24}] {over}/{total} {words}", end="", flush=True)
        else:
            print(f"{over}/{total} done: {words}", flush=True)

    def close(self) -> None:
        if self.is_terminal and self.last:
            print()


class LogReader:
    """What an agent's sessions have printed, from the oldest file on (NAME.log.9 ... NAME.log.1,
    NAME.log), through rotations.

    The pane's pipe renames a log that has grown (spawn-tmux.sh); nothing is copied, so a file is
    known by its inode.
    """

    UNFINISHED = r"(?:\x1b(?:\[[0-?]*[ -/]*|[]PX^_][^\x07\x1b]{0,4096}\x1b?|[ -/]*)?|\r)\Z"

    def __init__(self, path: str):
        import codecs

        self.path, self.held, self.begun, self.files = path, "", "", []
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.open_newer(set())

    def open_newer(self, known: set) -> None:
        """Open what is not known by its inode. Newest first: a file that is renamed meanwhile is
        met twice, and not never."""
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
        """`data` as printable text; an escape sequence that is cut off at its end is kept for
        the next piece."""
        text = self.held + self.decoder.decode(data)
        cut = re.search(self.UNFINISHED, text)
        self.held, text = (text[cut.start() :], text[: cut.start()]) if cut else ("", text)
        return printable(text.replace("\r\n", "\n").replace("\r", "\n"))

    def show(self, text: str, head: str) -> None:
        """Print it; with a head, whole lines only, each behind it: what is begun waits for its
        end."""
        if head:
            whole, newline, self.begun = (self.begun + text).rpartition("\n")
            text = "".join(f"{head}{line}\n" for line in whole.split("\n") if newline)
        sys.stdout.write(text)

    def last_lines(self, count: int) -> str:
        """The last `count` lines of what is there."""
        size = 4096 * count  # what is before that is not read
        for file in reversed(self.files):
            here = os.fstat(file.fileno()).st_size
            file.seek(max(0, here - max(0, size)))
            size -= here
        lines = deque(
            "".join(map(self.clean, iter(self.read, b""))).splitlines(keepends=True), maxlen=count
        )
        return "".join(lines)


def estimate_left(landed_at: list[float], left: int, now: float) -> float | None:
    """Seconds until `left` more tasks have landed, at the pace of the last 20; None where there
    is no pace yet."""
    recent = sorted(landed_at)[-20:]
    if not left or len(recent) < 2 or now <= recent[0]:
        return None
    return left * (now - recent[0]) / (len(recent) - 1)


def progress_line(status: dict, width: int, now: float) -> str:
    """A bar over all tasks, and how long it will still take."""
    over, total = count_over(status["tasks"])
    seconds = (
        estimate_left(list(map(epoch, status["landed_at"])), total - over, now)
        if status["loop"]["alive"]
        else None
    )
    words = f" {over}/{total} tasks" + (f", about {duration(seconds)} left" if seconds else "")
    room = max(4, min(40, width - len(words) - 2))
    return "[" + ("#" * (room * over // max(total, 1))).ljust(room, ".") + "]" + words


class Terminal:
    """The screen and the keys of this process: another screen and no echo between `enter` and
    `leave`."""

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

    # Not by sys.stdout: what Ctrl-Z comes in the middle of may not be entered again.
    def write(self, text: str) -> None:
        write_all(1, text.encode(sys.stdout.encoding, "replace"))

    def draw(self, lines: list[str]) -> None:
        """One write a frame, each line cleared behind its end: no flicker, and nothing of the
        last frame stays."""
        text = "\x1b[H" + "\x1b[K\n".join(lines) + "\x1b[K\x1b[J"
        if text != self.last:
            self.write(text)
            self.last = text

    def read_key(self, seconds: float) -> str:
        """What was typed within `seconds`; empty for nothing and for keys that send an escape
        sequence."""
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

    def __init__(self, call: Call, should_stop: StopRequest):
        self.call, self.should_stop = call, should_stop
        self.terminal, self.sight, self.status, self.trouble = Terminal(), Sight(0.004), {}, ""
        self.typed, self.typed_at, self.drawn, self.next_at = "", 0.0, (), 0.0
        self.seen = ""  # ID@COMMIT of the work that was looked at last

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
        """Draw when something has changed, the terminal has another size, or two seconds are
        over."""
        size, now = terminal_size(), CLOCK.monotonic()
        seen = (size, self.typed, self.call.store.signature(), int(now / self.LOOK_SECONDS))
        if seen == self.drawn or now < self.next_at and seen[:2] == self.drawn[:2]:
            return
        used = sum(os.times()[:2])
        if seen[2:] != self.drawn[2:]:
            try:
                self.status, self.trouble = read_status(self.call, self.sight), ""
            except (FarmError, OSError) as error:
                self.trouble = f"{error}; trying again"
        self.terminal.draw(self.frame(*size))
        self.drawn, self.next_at = (
            seen,
            now + min(2 * self.LOOK_SECONDS, (sum(os.times()[:2]) - used) / self.DRAW_SHARE),
        )

    def frame(self, columns: int, lines: int) -> list[str]:
        clock = time.strftime("%H:%M:%S", time.localtime(CLOCK.now()))
        head = one_width(f"{one_line(os.path.basename(self.call.repo))} \u00b7 {clock}", columns)
        foot = self.KEYS if self.terminal.has_keys else "Ctrl-C: leave"
        foot = "v y n review \u00b7 " * bool(self.status.get("reviews")) + foot
        if self.typed:
            foot = f"attach {self.typed} (l: its log)"
        if self.trouble:
            body = ["", one_line(self.trouble)]
        else:
            body = [
                progress_line(self.status, columns, CLOCK.now()),
                "",
                *status_text(self.status, columns, max(8, lines - 4)),
            ]
        return [head, *(one_width(line, columns) for line in body)][: lines - 1] + [
            one_width(foot, columns)
        ]

    def press(self, keys: str) -> bool:
        """Do what the keys say; True to leave. A number by itself counts after a moment, or at
        Enter."""
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
                self.do("logs", number or "--all", "-f", "-n", "200")
            elif key == "m":
                self.do("merge", pause=True)
            elif key == "p":
                self.do("resume" if self.status.get("mode") == "paused" else "pause")
            elif key in ("v", "y", "n"):
                self.review(key)
        if self.typed and CLOCK.monotonic() - self.typed_at > self.TYPE_SECONDS:
            number, self.typed = self.typed, ""
            self.do("attach", number)
        return False

    def review(self, key: str) -> None:
        """Look at the next work that waits for a review; or say yes or no to what was shown."""
        found = [f"{one['id']}@{one['commit']}" for one in self.status.get("reviews", ())]
        if key == "v" and found:
            later = found[found.index(self.seen) + 1 :] if self.seen in found else ()
            self.seen = (*later, *found)[0]
            self.do("diff", self.seen, pause=True)
        elif key != "v" and self.seen in found:
            self.do("approve" if key == "y" else "return", self.seen)

    def do(self, *words: str, pause: bool = False) -> None:
        """Another verb on the terminal as it was; its Ctrl-C brings back here."""
        import signal

        self.terminal.leave()
        say(" ".join(words) + " (Ctrl-C: back)" * (words[0] in ("logs", "merge")))
        code = call_farm(self.call.repo, *words)
        if self.should_stop.signal == signal.SIGINT:
            self.should_stop.clear()
        if (code or pause) and self.terminal.has_keys and code not in (130, -signal.SIGINT):
            say("press Enter to go back")
            self.terminal.read_key(60)
        self.terminal.enter()
        self.drawn = ()


def call_farm(repo: str, *words: str, **options) -> int:
    """Another verb as a process of its own, to its end; its exit code."""
    import subprocess

    env = {**os.environ, "FARM_PYTHON": sys.executable}
    return subprocess.call([f"{SCRIPTS}/farm", "--repo", repo, *words], env=env, **options)


def read_status(call: Call, sight: Sight | None = None) -> dict:
    """`farm_status`, also where the settings that the last `up` left cannot be read."""
    try:
        settings = call.settings()
    except DamagedState:
        settings = load_settings(call.repo)
    return {
        "placed": call.store.read_part(PLACED_FILE, "hosts"),
        **farm_status(call.store, settings, sight or Sight()),
    }


def find_logs(store: Store) -> list[str]:
    """The agents that have a log."""
    names = [name[:-4] for name in names_in(store.path("logs")) if name.endswith(".log")]
    return [name for name in names if name not in ("loop", "merger", "notify", CONTROL)]


def general_steps(status: dict) -> list[tuple[str, str]]:
    """(what to type, why) where nothing is the matter."""
    tasks = status["tasks"]
    if status["loop"]["alive"]:
        return [
            ("./farm.py status --watch", "see it work, with keys"),
            ("./farm.py attach --all", "look at all agents at once"),
            ("./farm.py add 'what to do'", "one more task; add -f FILE takes a list"),
        ]
    if tasks and not set(tasks) - {"landed", "canceled"}:
        return [
            ("./farm.py report", "a page of all that happened"),
            ("./farm.py clean", "remove what is safe to remove"),
            ("./farm.py add 'what to do'", "one more task"),
        ]
    return [
        ("./farm.py doctor", "is everything here that it takes?"),
        ("./farm.py up -n 3", "start three agents"),
        ("./farm.py add -f tasks.md", "tasks from a checklist, gh's JSON or plain lines"),
    ]


# ------------------------------------------------------------------------------------------- report
# History folded into one document; scripts/report.html draws it. (tests/rooms/test_report.py)

# Stretches of time: their fields; those by which the latest one is found; and what an event makes
# of it: "open" begins a new one, all others end it with that fate.
SPANS = {
    "attempts": (
        "agent task",
        "agent task",
        {
            "claimed": "open",
            "submitted": "queued",
            "attempt-failed": "failed",
            "owner-died": "failed",
            "released": "released",
            "returned": "returned",
            "landed": "landed",
        },
    ),
    "sessions": (
        "agent",
        "agent",
        {"claimed": "open", "session-started": "open", "session-ended": "ended"},
    ),
    "gates": ("slot tasks", "slot", {"gate-started": "open", "gate-ended": "none"}),
    "waits": (
        "agent task",
        "agent",
        {
            "agent-waits": "open",
            **dict.fromkeys(
                (
                    "agent-goes-on",
                    "session-ended",
                    "submitted",
                    "attempt-failed",
                    "owner-died",
                    "released",
                ),
                "over",
            ),
        },
    ),
    "merges": (
        "agent task",
        "task",
        {"submitted": "open", "landed": "landed", "returned": "returned"},
    ),
}
SETBACKS = ("returned", "attempt-failed", "owner-died", "session-ended")
TASK_KEYS = (
    "id",
    "state",
    "title",
    "reason",
    "agent",
    "attempts",
    "added_at",
    "landed_at",
    "landed_commit",
)


def word(record, key: str, width: int = 100) -> str:
    """A field of an event that anybody may have written, as one line; empty when it is no text."""
    value = object_of(record).get(key)
    return one_line(value, width) if isinstance(value, str) else ""


class History:
    """events.jsonl, folded once. Times are stored text throughout: it sorts as the times do.

    lists: those of the document; latest: (kind, field, value) -> the last stretch found so; gated:
    tasks whose submission had a gate; judged: how many of these landed or came back since.
    """

    def __init__(self):
        self.lists = {name: [] for name in (*SPANS, "restarts", "moves", "setbacks")}
        self.latest, self.times, self.unread_lines = {}, [], 0
        self.started, self.gated, self.judged = set(), set(), 0

    def is_open(self, place: tuple) -> bool:
        return place in self.latest and not self.latest[place]["ended_at"]

    def fold(self, at: str, event: dict) -> None:
        kind, task, ids = event["event"], event.get("task"), event.get("ids")
        names = ids if is_texts(ids) else []
        known = {
            "agent": word(event, "agent") or word(task, "agent"),
            "task": word(task, "id"),
            "slot": one_line(str(event.get("slot")), 6),
            "tasks": [one_line(name, 100) for name in names],
        }
        self.times.append(at)
        if kind == "session-started":
            self.fold_start(at, known["agent"])
        for span, (_, _, fates) in SPANS.items():
            if kind in fates:
                colour = word(event, "colour") if kind == "gate-ended" else ""
                fate = colour if colour in ("green", "red") else fates[kind]
                self.fold_span(span, at, known, fate)
        if kind in SETBACKS:
            why = word(event, "why", 500) or word(event, "cause", 500)
            self.lists["setbacks"].append(
                {
                    "at": at,
                    "event": kind,
                    "agent": known["agent"],
                    "task": known["task"],
                    "why": why,
                }
            )
        if known["task"]:
            self.lists["moves"].append(
                {"at": at, "task": known["task"], "state": word(task, "state")}
            )
        self.judge(event, known)

    def fold_start(self, at: str, agent: str) -> None:
        """The loop may see a session's start after its first claim: that is no second start."""
        place = ("sessions", "agent", agent)
        if agent in self.started or place in self.latest and not self.is_open(place):
            self.lists["restarts"].append({"agent": agent, "at": at})
        self.started.add(agent)

    def fold_span(self, kind: str, at: str, known: dict, fate: str) -> None:
        """Begin a stretch, or end the latest one; one that has ended may still change its fate."""
        fields, keys, _ = SPANS[kind]
        places = [(kind, key, known[key]) for key in keys.split()]
        if fate != "open":
            self.end_span(places[-1], at, fate)
        elif kind != "sessions" or not self.is_open(places[0]):
            for place in filter(self.is_open, places):  # its end was not recorded
                is_gate = kind == "gates"
                self.end_span(place, self.latest[place]["started_at"] if is_gate else at, "cut")
            span = {
                **{field: known[field] for field in fields.split()},
                "started_at": at,
                "ended_at": "",
                "fate": "open",
            }
            self.lists[kind].append(span)
            self.latest.update(dict.fromkeys(places, span))

    def end_span(self, place: tuple, at: str, fate: str) -> None:
        if span := self.latest.get(place):
            span.update(ended_at=span["ended_at"] or at, fate=fate)

    def judge(self, event: dict, known: dict) -> None:
        """A submission that had a gate is judged when it lands or comes back, once."""
        if event["event"] == "gate-started":
            self.gated.update(known["tasks"])
        elif event["event"] in ("landed", "returned") and known["task"] in self.gated:
            self.judged += not word(event, "why").startswith("it conflicts with")
            self.gated.discard(known["task"])

    def finish(self, now: str) -> tuple[str, str]:
        """End what is open at `now`; where nothing is alive (""), at the last time known.

        Returns the first and the last time, "" without any.
        """
        self.times += filter(None, [now])
        last = max(self.times, default="")
        for kind in SPANS:
            for span in [span for span in self.lists[kind] if not span["ended_at"]]:
                if kind == "gates" and not now:  # one that was ended early leaves no event
                    span.update(ended_at=span["started_at"], fate="cut")
                else:
                    span["ended_at"] = last
        return min(self.times, default=""), last


def fold_history(store: Store) -> History:
    """Fold events.jsonl in the order of time; lines that are no events are only counted."""
    history, events = History(), list(read_events(store))
    history.unread_lines = events.count(None)
    dated = [(utc(epoch(event["at"])), event) for event in events if event]
    for at, event in sorted(dated, key=lambda pair: pair[0]):
        history.fold(at, event)
    history.lists["spending"] = [
        pick(line, ("agent", "task", "tokens_in", "tokens_out", "cost_usd"))
        for line in read_usage(store, is_whole=True)
        if abs(line["cost_usd"]) < 1e9
    ]
    return history


def read_farm(store: Store) -> tuple[State, dict, bool, list[str]]:
    """(state, what `up` was told, whether a task or a gate is being worked on, what is damaged)."""
    state, problems = load_anyway(store)
    try:
        told = store.farm().get("settings", {})
        owners = [claim.get_owner() for claim in state.claims.values()]
        is_live = bool(find_activity(store).get("testing")) or any(map(find_liveness, owners))
    except (DamagedState, AttributeError, TypeError) as error:
        return state, {}, False, [*problems, str(error)]
    return state, told, is_live, problems


def sum_history(history: History, tasks: list[Task]) -> dict:
    def seconds_of(spans: list[dict]) -> float:
        return sum(epoch(span["ended_at"]) - epoch(span["started_at"]) for span in spans)

    states = Counter(task.state for task in tasks)
    attempts, gates = history.lists["attempts"], history.lists["gates"]
    fates = Counter(span["fate"] for span in attempts)
    return {
        "tasks": len(tasks),
        **pick(states, ("claimed", "ready", "landed", "failed", "canceled")),
        "unfinished": states["pending"] + states["claimed"] + states["ready"],
        "attempts": len(attempts),
        "returned": fates["returned"],
        "failed_attempts": fates["failed"],
        "worked_seconds": seconds_of(attempts),
        "gate_runs": len(gates),
        "gate_seconds": seconds_of(gates),
        "gate_runs_one_by_one": history.judged,
        **sum_usage(history.lists["spending"]),
    }


def task_of_report(task: Task, state: State, now: float) -> dict:
    record = task_record(task, state, now)
    record["attempts"] += task.state in ("claimed", "ready", "landed")
    kept = [(key, record[key]) for key in TASK_KEYS if key in record]
    return {key: one_line(value) if isinstance(value, str) else value for key, value in kept}


def name_report(store: Store, told: dict) -> dict:
    remote = told.get("remote") or "origin"
    url = run_script("merge/commit-url.sh", "-C", store.repo, remote).stdout
    return {
        "schema": SCHEMA,
        "name": one_line(os.path.basename(store.repo), 80),
        "into": one_line(str(told.get("into") or ""), 80),
        "commit_url": url.strip(),
    }


def report_document(store: Store) -> dict:
    """All that happened, as `report --json` prints it and as the page embeds it.

    Times are UTC text, 2026-03-01T14:02:10Z; amounts name their unit. Lists are in order of time.
    The same history gives the same document; only while a claim or a gate is alive it ends now.

    schema, name (of the repo), into (the target branch) and commit_url (what a sha is put behind
        to see it): "" where not known
    started_at, ended_at: the first and last time known, "" without history
    problems: texts, what is damaged; unread_lines: how many of events.jsonl
    totals: tasks, and how many are claimed, ready, landed, failed, canceled, unfinished; attempts,
        returned, failed_attempts, worked_seconds; gate_runs, gate_seconds, gate_runs_one_by_one (as
        if each submission that landed or came back had its own); tokens_in, tokens_out, cost_usd
    attempts, from claim to submit or failure, then judged: agent, task, started_at, ended_at,
        fate: open, queued, landed, returned, failed, released, cut (its end is not recorded)
    sessions: agent, started_at, ended_at, fate: open, ended
    gates: slot, tasks, started_at, ended_at, fate: open, green, red, none (no verdict), cut
    waits (for a person): agent, task, started_at, ended_at, fate: open, over, cut
    merges (submit to landing or return): the same, fate: open, landed, returned, cut
    restarts, a session that started again: agent, at
    moves, each event of a task: at, task, state (since then)
    spending, of each attempt or conversation: agent, task, tokens_in, tokens_out, cost_usd
    setbacks: at, event (returned, attempt-failed, owner-died, session-ended), agent, task, why
    tasks, failed ones first, then as they were added: as in `tasks --json`, but attempts counts
        the one that runs or has succeeded too
    """
    history, (state, told, is_live, problems) = fold_history(store), read_farm(store)
    started_at, ended_at = history.finish(utc_now() if is_live else "")
    tasks = sorted(state.all_tasks(), key=lambda task: task.state != "failed")
    now = epoch(ended_at) or CLOCK.now()
    return {
        **name_report(store, told),
        "started_at": started_at,
        "ended_at": ended_at,
        "problems": problems,
        "unread_lines": history.unread_lines,
        "totals": sum_history(history, tasks),
        **history.lists,
        "tasks": [task_of_report(task, state, now) for task in tasks],
    }


def as_html(value) -> str:
    """A value of the document, as one printable line of HTML."""
    from html import escape

    return escape(one_line(", ".join(value) if isinstance(value, list) else str(value), 500))


def fill_mark(known: dict, name: str, keys: list[str]) -> str:
    """What `{{name}}`, `{{totals key}}` or `{{list key key}}`, a row a record, stands for."""
    value = known[name]
    if not keys:
        return as_html(value)
    if isinstance(value, dict):
        return as_html(duration(value[keys[0]]) if keys[0].endswith("_seconds") else value[keys[0]])
    rows = []
    for record in value:
        head, *cells = [f"<bdi>{as_html(record.get(key, ''))}</bdi>" for key in keys]
        rows.append(f'<tr><th scope="row">{head}</th><td>{"</td><td>".join(cells)}</td></tr>\n')
    return "".join(rows)


def report_page(document: dict) -> str:
    """scripts/report.html, filled; its policy lets its own script run and no other."""
    import base64
    import hashlib

    with open(f"{SCRIPTS}/report.html", encoding="utf-8") as file:
        page = file.read()
    script = page.split("<script>")[1].split("</script>")[0]
    totals, into = document["totals"], document["into"] or "the target branch"
    took = duration(epoch(document["ended_at"]) - epoch(document["started_at"]))
    known = {
        **document,
        "summary": "No task was added yet.",
        "lost": "",
        "digest": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    if totals["tasks"]:
        tasks = number(totals["tasks"], "task")
        known["summary"] = f"{totals['landed']} of {tasks} landed on {into} in {took}."
    if document["unread_lines"]:
        known["lost"] = (
            f"{number(document['unread_lines'], 'line')} of events.jsonl could not be "
            "read: what happened there is missing here."
        )
    embedded = dump_line(document).replace("<", "\\u003c").replace("/", "\\/")
    return re.sub(
        r"\{\{(\w+)([\w ]*)\}\}",
        lambda mark: (
            embedded if mark[1] == "document" else fill_mark(known, mark[1], mark[2].split())
        ),
        page,
    )


# ----------------------------------------------------------------------------------------- one task
# All of one task: what it is, how its attempts went, what its work would bring.
# (tests/rooms/test_steer_one_task.py)

NEXT_OF = {
    "claimed": "attach {agent} | diff {id}",
    "ready": "diff {id} | queue",
    "testing": "diff {id}",
    "held": "diff {id}",
    "failed": "retry {id} | edit {id} | diff {id}",
    "landed": "diff {id} | revert {id}",
    "canceled": "retry {id}",
    "review": "diff {id} | approve {id}@{commit} | return {id}@{commit} --why 'what is wrong'",
}
SHOWN = (
    "waits",
    "reason",
    "priority",
    "preset",
    "after",
    "paths",
    "parent",
    "follow_ups",
    "tries",
    "max_attempts",
    "cost_usd",
    "landed_commit",
)
ATTEMPT_HEADS = {
    "attempt": "TRY",
    "agent": "AGENT",
    "cli": "CLI",
    "took": "TOOK",
    "cost_usd": "$",
    "fate": "END",
    "why": "WHY",
}


def read_task_events(store: Store, task_id: str) -> list[dict]:
    """The events of the history that are about a task, or about a gate that it was in."""
    return [
        event
        for event in filter(None, read_events(store, f'"{task_id}"'.encode()))
        if word(event.get("task"), "id") == task_id
        or is_texts(event.get("ids"))
        and task_id in event["ids"]
    ]


def find_prompt(task: Task, events: list[dict]) -> str:
    """A task's prompt; of one that has landed from its history."""
    told = [event["task"].get("prompt", "") for event in events if "task" in event]
    return next(filter(None, (task.prompt, *told)), "")


def fold_attempts(events: list[dict], spending: list[dict]) -> list[dict]:
    """A task's attempts: {"attempt", "agent", "cli", "fence", "started_at", "ended_at", "took",
    "fate" (as in the report), "why", "commit" (that was submitted)}, and their usage."""
    fates, attempts = SPANS["attempts"][2], []
    for event in events:
        task, at, fate = event.get("task"), event["at"], fates.get(event["event"])
        if fate == "open":
            fence = word(task, "fence")
            one = {
                "attempt": count(task, "attempts") + 1,
                "agent": word(task, "agent"),
                "cli": word(task.get("conversation"), "preset"),
                "fence": fence,
                "started_at": at,
                "ended_at": "",
                "commit": "",
                "fate": fate,
                "why": "",
                "took": ago(at),
                **sum_usage([line for line in spending if line["fence"] == fence]),
            }
            attempts.append(one)
        elif fate and attempts:
            one.update(ended_at=one["ended_at"] or at, fate=fate, why=word(event, "why", 2000))
            one["took"] = duration(epoch(one["ended_at"]) - epoch(one["started_at"]))
            one["commit"] = word(task, "commit") if fate == "queued" else one["commit"]
    return attempts


def last_verdict(store: Store, events: list[dict]) -> dict:
    """The last gate's end on a tree with the task's work in it, and where its `log` is; empty
    where there was none."""
    import glob

    gates = [event for event in events if event["event"] == "gate-ended"]
    if not gates:
        return {}
    tree = glob.escape(store.path("results", word(gates[-1], "tree")[:16]))
    return {**gates[-1], "log": next(iter(glob.glob(f"{tree}-*.log")), "")}


def find_work(call: Call, task: Task, attempt: int = 0) -> list[str]:
    """What diff-work.sh takes to show a task's work, or what one attempt submitted. Raises
    NotFound."""
    tip = task.commit
    before = task.landed_from or task.landed_commit and f"{task.landed_commit}^"
    if before and not attempt:
        return ["-f", before, task.landed_commit]
    base = ["-b", before or target_of(call)]
    place = worktree_of(call.repo, call.settings(), task.agent)
    branch = branch_of(task.agent, task.id) if task.agent else ""
    if attempt:
        attempts = fold_attempts(read_task_events(call.store, task.id), [])
        tip = {one["attempt"]: one["commit"] for one in attempts}.get(attempt, "")
    elif task.state == "claimed":
        tip = branch
        base += ["-w", place] * os.path.isdir(place)
    elif task.state != "ready":
        tip = task.start or tip or branch
    if not tip:
        raise NotFound(f"{task.id} has no such work", f"./farm.py show {task.id}")
    return base if "-w" in base else [*base, tip]


def task_document(call: Call, task_id: str) -> dict:
    """What `show --json` prints: a record of `tasks --json`, with "prompt", "attempts" (see
    `fold_attempts`), "tries", "gate", "commits" and "files" (path, added, removed) of its work,
    "follow_ups" (ids) and "next"."""
    store, state = call.store, call.state
    task, events = state.get_task(task_id), read_task_events(store, task_id)
    record = task_record(task, state, CLOCK.now())
    for queued in queue_records(store, state):
        if queued["id"] == task_id:
            record.update(state=queued["state"], reason=queued["reason"])
    spending = [line for line in read_usage(store, is_whole=True) if line["task"] == task_id]
    try:
        at = ("-C", call.repo, "-n", *find_work(call, task))
        work = run_script("merge/diff-work.sh", *at, prefix=unfiltered(call.repo)).rows
    except FarmError:
        work = [[0]]
    steps = NEXT_OF.get(record["state"], "edit {id} | cancel {id}").format(
        id=task_id, agent=agent_number(task.agent), commit=task.commit[:12]
    )
    return {
        **record,
        "prompt": find_prompt(task, events),
        "tries": task.attempts,
        "attempts": fold_attempts(events, spending),
        **sum_usage(spending),
        "gate": last_verdict(store, events),
        "commits": int(work[0][0]),
        "files": work[1:],
        "follow_ups": [one.id for one in state.all_tasks() if one.parent == task_id],
        "next": [f"./farm.py {step}" for step in steps.split(" | ")],
    }


def show_lines(document: dict, width: int) -> list[str]:
    """`show` for people, in lines of at most `width` (0: as long as they are)."""
    gate, files = document["gate"], document["files"]
    lines = [f"{document['id']} {document['state']}: {one_line(document['title'])}"]
    for key in SHOWN:
        if value := document.get(key):
            lines.append(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
    lines += ["", *(f"  {line}" for line in document["prompt"].splitlines()), ""]
    rows = [[one[key] or "-" for key in ATTEMPT_HEADS] for one in document["attempts"]]
    if rows:
        lines += [*table_lines(rows, [*ATTEMPT_HEADS.values()], ("CLI", "$"), width), ""]
    if files:
        lines.append(f"{number(document['commits'], 'commit')}, {number(len(files), 'file')}")
    lines += [f"  {one_line(path)} +{added} -{removed}" for path, added, removed in files]
    if gate:
        log = gate["log"] and f": cat {gate['log']}"
        lines.append(f"gate: {gate.get('colour')} {gate.get('note')}{log}")
    lines += [f"next: {step}" for step in document["next"]]
    return for_screen((as_typed(undirected(printable(line))) for line in lines), width)


# ------------------------------------------------------------------------------------------- doctor
# What is missing or damaged. A finding is (what is wrong, what to type, exit code); one without a
# code is a warning. (tests/rooms/test_doctor.py)


def run_check(check, *args) -> list[tuple]:
    """Run a check that raises; its error as a finding."""
    try:
        check(*args)
    except FarmError as error:
        return [(str(error), error.hint, error.exit_code)]
    return []


def check_tools(call: Call) -> list[tuple]:
    """Programs and packages."""
    return [
        finding
        for name in ("psutil", "portalocker", "tabulate")
        for finding in run_check(import_package, name)
    ] + run_check(lambda: run_script("check-tools.sh", env={"FARM_PYTHON": sys.executable}))


def check_settings(call: Call) -> list[tuple]:
    """What they name: the target, and the sandbox that they want for agents."""
    if found := run_check(call.settings):
        return found
    found = run_check(target_of, call)
    found = found or [(what, hint, 1) for what, hint in find_obstacles(call)]
    return found + run_check(resolve_isolation, call.settings())


def check_state(call: Call) -> list[tuple]:
    """Files that cannot be read, tasks that only the history knows, locks of the dead."""
    store = call.store
    findings = [
        (f"{store.path(name)}: {words}", "mend it in an editor, or: ./farm.py doctor --fix", 7)
        for name, words in find_damaged(store).items()
    ]
    traces = find_traces(store, worktrees_folder(call.repo, load_settings(call.repo)))
    if traces:
        findings.append((traces, GONE_HINT))
    if findings or not os.path.isdir(store.folder):
        return findings
    state = store.snapshot()
    findings += [
        (
            f"task {task.id} is in events.jsonl (rev {task.rev}), and no file has it",
            "./farm.py doctor --fix",
            7,
        )
        for task, _ in find_forgotten(store, state)
    ]
    findings += [
        (
            f"{claim.agent} holds its lock, and its owner (pid {claim.owner.get('pid')}) is gone",
            "./farm.py up, or any claim: both take it over",
        )
        for claim in filter(is_orphan, state.claims.values())
    ]
    if not os.access(store.folder, os.W_OK):
        findings.append((f"{store.folder} cannot be written", f"ls -ld {store.folder}", 1))
    return findings


def check_pins(call: Call) -> list[tuple]:
    """Submitted work that a pin keeps and no task knows."""
    state = call.state
    pins = run_script("merge/pins.sh", "list", "-C", call.repo, allow=(0, 2, 3)).rows
    return [
        (
            f"{ref} keeps {sha[:10]}, and no task {task_id} is known",
            f"git log {sha[:10]}; git update-ref -d {ref}",
        )
        for ref, sha in pins
        if not state.is_done(task_id := os.path.basename(ref)) and not state.find_task(task_id)
    ]


def check_refs(call: Call) -> list[tuple]:
    """Refs of landed work that hold commits which are nowhere else: nothing removes them."""
    target = call.store.read_part(FARM_FILE, "settings").get("into")
    kept = find_leftovers(call.repo, target, call.state)[1] if target else []
    what = (
        f"{number(len(kept), 'ref')} of landed tasks hold commits that {target} has not: "
        f"{', '.join(kept[:3])}{' ...' * (len(kept) > 3)}"
    )
    return [(what, f"git log {kept[0]}; git update-ref -d {kept[0]}")] if kept else []


def check_machine(call: Call) -> list[tuple]:
    """Disk, memory, limits of the kernel."""
    settings = load_settings(call.repo)
    short = find_shortage(call.repo, settings.min_free_mib)
    rows = run_script("check-machine.sh", "-n", str(settings.n), call.repo).rows
    return [(short, "free some, or lower FARM_MIN_FREE_MIB")] * bool(short) + rows


def check_repo(call: Call) -> list[tuple]:
    """What in the repo itself would stop a farm, and what the loop and the merger say now."""
    is_whole = not find_damaged(call.store)
    told = call.store.read_part(FARM_FILE, "settings") if is_whole else {}
    settings = load_settings(call.repo, call.options, told)
    state = call.state if is_whole else State()
    landed = "".join(f"{task.landed_commit}\n" for task in state.all_tasks() if task.landed_commit)
    target = ["-b", settings.into] if settings.into else []
    said = run_script("merge/check-repo.sh", "-C", call.repo, *target, stdin=landed, allow=(0, 1))
    rows = said.rows
    if is_whole and (trouble := find_activity(call.store).get("trouble")):
        rows.append(trouble)
    return [(*row, 1) for row in rows] + (read_changes(call.store) if is_whole else [])


def check_hosts(call: Call) -> list[tuple]:
    """What each host's own doctor says, in what it is not as this machine, and whether gates can
    run where they are to."""
    found, toolkit = [], run_script("hosts/describe.sh").stdout.strip()
    if where := load_settings(call.repo, call.options).gate_on:
        found += [(*row, 1) for row in run_script("hosts/gate.sh", "check", where).rows]
    for host, (engine, _, said) in call.store.read_part(PLACED_FILE, "hosts").items():
        if said:  # it is not heard
            look = f"ssh -o BatchMode=yes {engine[4:]} true" if engine[:4] == "ssh:" else "squeue"
            found.append((f"{host} has been placed on {engine}, and is not heard: {said}", look, 1))
    for host, told in read_hosts(call.store).items():
        if not told.get("agents"):
            continue
        if told["toolkit"] != toolkit:
            found.append((f"{host} has another version of the toolkit", "git pull, there"))
        if abs(told["apart"]) > 60:
            apart = f"{duration(abs(told['apart']))} {'ahead' if told['apart'] > 0 else 'behind'}"
            found.append((f"the clock of {host} is {apart}", "only what is shown is wrong by it"))
        try:
            said = json.loads(order(call.store, host, "doctor", "--json", seconds=20.0)["out"])
            found += [(f"{host}: {row['problem']}", row["try"], row["exit_code"]) for row in said]
        except (FarmError, ValueError) as error:
            heard = f"{host} was heard {ago(told['heard_at'])} ago; {told['trouble']}"
            found.append((f"{heard}: {error}", f"on {host}: farm spoke"))
    return found


def describe_sandbox() -> str:
    """Whether there can be sandboxes of bubblewrap here, why not, and what they leave open."""
    try:
        rows = run_script("sandbox/check-sandbox.sh").rows
    except FarmError as error:
        return f"sandbox: {error}\n  try: {error.hint}"
    return "\n".join(
        ["sandbox: bubblewrap works here, for FARM_ISOLATE=bwrap"]
        + [f"sandbox: {what}\n  try: {hint}" for what, hint in rows]
    )


def check_agents(call: Call) -> list[tuple]:
    """What would keep the farm's agents from starting, or from working unattended."""
    import shutil

    settings = call.settings()
    is_there = settings.agent or shutil.which(DEFAULT_CLI.program())
    shared = share_agents(settings) if is_there else []
    findings = [
        finding
        for agent in dict.fromkeys(shared)
        for finding in run_check(check_command, agent, call.repo)
    ]
    findings = findings or find_blockers(call.repo, settings, shared)
    return findings + [
        (limit, "./farm.py up")
        for preset in (*CLIS, COMMAND)
        if (limit := find_limit(call.store, preset))
    ]


# ============================================================================= PART VI Command line

# ------------------------------------------------------------------------------------- command line
# A table of verbs, help and completion. getopt and not argparse: building thirty sub-parsers takes
# longer than a claim. (tests/rooms/test_command_line.py)

Verb = namedtuple("Verb", "run synopsis summary options example")
VERBS: dict[str, Verb] = {}
GLOBAL_OPTIONS = "repo= h|help"


def verb(synopsis: str, summary: str, options: str = "", example: str = ""):
    """Register a verb. options: words like `json` (flag), `id=` (text), `n|n=#` (whole number),
    `wait=s` (seconds), `after=*`. It returns its exit code, or nothing for 0."""

    def register(function):
        name = function.__name__.removeprefix("verb_").replace("_", "-")
        VERBS[name] = Verb(function, synopsis, summary, options, example)
        return function

    return register


class Call:
    """One invocation: positional `args`, `options` by long name, and what nearly every verb
    needs."""

    def __init__(self, name: str, args: list[str], options: dict):
        self.name, self.args, self.options = name, args, options
        start = options.get("repo") or given("FARM_REPO") or os.getcwd()
        # a shell and a host start anywhere
        self.repo = start if name in ("completion", "spoke") else find_repo(start)
        self.store = Store(self.repo)
        hub = name in ("add", "lock", "with-lock") and read_line(self.store.path(HUB))
        if hub:
            raise Refused(
                f"{name}: this is a host of {hub}, which would not know of it",
                "say it in your commit message, or type it there",
            )

    @functools.cached_property
    def repo_info(self) -> dict[str, list[str]]:
        """`read_repo`, once a verb."""
        return read_repo(self.repo)

    @property
    def state(self) -> State:
        """What is on disk now."""
        return self.store.snapshot()

    def settings(self) -> Settings:
        remembered = self.store.read_part(FARM_FILE, "settings")
        return load_settings(self.repo, self.options, remembered)

    def agent(self) -> str:
        """The first argument as an agent's name; a bare number means agent-00N."""
        if not self.args:
            raise UsageError(f"{self.name} needs an agent", f"./farm.py {self.name} --help")
        text = self.args[0]
        return f"agent-{int(text):03d}" if text.isdigit() else checked_name(text, "agent")

    def get(self, option: str, default=None):
        return self.options.get(option, default)

    def one(self, what: str) -> str:
        if len(self.args) != 1:
            raise UsageError(
                f"{self.name} needs exactly one {what}", f"./farm.py {self.name} --help"
            )
        return self.args[0]


def find_near(name: str, names) -> str:
    """The one of `names` that was probably meant, or an empty text."""
    import difflib

    return next(iter(difflib.get_close_matches(name, names, 1)), "")


def split_options(words: str):
    """(short, long, kind with its `=`) of each option of a verb; short may be empty."""
    for word in words.split():
        flags, equals, kind = word.partition("=")
        short, _, name = flags.rpartition("|")
        yield short, name, equals + kind


def parse_options(verb_name: str, argv: list[str]) -> tuple[list[str], dict]:
    """getopt over the verb's option words; (positional, options). Raises UsageError."""
    import getopt

    kinds, shorts, names = {}, "", {}
    for short, name, kind in split_options(f"{VERBS[verb_name].options} {GLOBAL_OPTIONS}"):
        kinds[name], names["-" + short], names["--" + name] = kind, name, name
        shorts += short + ":" * bool(short and kind)
    cut = argv.index("--") if "--" in argv else len(argv)
    try:
        pairs, args = getopt.gnu_getopt(
            argv[:cut], shorts, [name + "=" * bool(kind) for name, kind in kinds.items()]
        )
    except getopt.GetoptError as error:
        near = find_near(error.opt, kinds)
        raise UsageError(
            f"{verb_name}: {error.msg}", f"./farm.py {verb_name} --{near or 'help'}"
        ) from None
    command = argv[cut + 1 :]
    options = {"command": command} if cut < len(argv) else {}
    for flag, value in pairs:
        name, key = names[flag], names[flag].replace("-", "_")
        options[key] = read_option(verb_name, name, kinds[name], value, options.get(key, []))
    return args + command * (verb_name != "with-lock"), options


def read_option(verb_name: str, name: str, kind: str, value: str, before: list):
    """One option's value by its kind: flag, text, whole number (#), seconds (s), or a list that
    grows (*) from what stood `before`."""
    if kind == "":
        return True
    if kind == "=*":
        return [*before, value]
    if kind in ("=#", "=s"):
        try:
            number = int(value) if kind == "=#" else float(value)
            if 0 <= number < 1e9 or name == "priority":
                return number
        except (ValueError, OverflowError):
            pass
        raise UsageError(
            f"{verb_name}: --{name} needs a number{' of seconds' * (kind == '=s')}, not {value!r}"
        )
    return value


MAILBOX_SECONDS = 120.0


def ask_by_mailbox(mailbox: str, argv: list[str]) -> int:
    """Put a move into the agent's mailbox and wait for its answer: for agents whose sandbox may
    write nowhere else.

    One file a request, by rename; run-task.sh, outside the sandbox, makes the move. Raises
    FarmError when nobody answers.
    """
    if argv == ["hook"]:  # the event is only here
        argv = ["hook", given("FARM_AGENT_NAME"), "--", sys.stdin.read()]
    name = f"{mailbox}/{os.getpid()}-{time.monotonic_ns()}"
    write_whole(name + ".request", json.dumps(argv))
    ring(f"{mailbox}/bell", b"request\n")
    if not wait_for(lambda: os.path.exists(name + ".answer"), MAILBOX_SECONDS, 0.02):
        raise FarmError(
            f"nobody answered {argv[0]} within {MAILBOX_SECONDS:.0f} s",
            "is run-task.sh still running?",
        )
    answer = json.loads(read_bytes(name + ".answer"))
    os.unlink(name + ".answer")
    sys.stdout.write(answer["stdout"])
    sys.stderr.write(answer["stderr"])
    return answer["code"]


def run_verb(name: str, argv: list[str]) -> int:
    """Run one verb with what stands behind its name; print what went wrong, and return the exit
    code."""
    try:
        args, options = parse_options(name, argv)
        return VERBS[name].run(Call(name, args, options)) or 0
    except (FarmError, OSError) as error:
        return print_error(error)


def print_error(error: FarmError | OSError) -> int:
    """What went wrong and what to type next, on stderr; the exit code."""
    told = describe_os_error(error) if isinstance(error, OSError) else error
    hint = f"\n  try: {printable(told.hint)}" if told.hint else ""
    say(printable(str(told)) + hint)
    return told.exit_code


def overview_text() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {entry.summary}" for name, entry in VERBS.items()]
    return (
        "usage: farm.py [--repo DIR] VERB ...\n\n"
        + "\n".join(lines)
        + "\n\nfarm.py VERB --help says more, as do: farm.py help settings, farm.py help clis."
    )


# What options say that are no settings of the same name.
OPTION_HELP = """\
prompt         what the agent is told beyond the title
prompt-file    the same, from a file
id             an id of your own (claim: this task and no other)
priority       higher goes first (default 0)
no-after       an agent's: do not wait until its own task has landed
after          an id that must have landed before; may be repeated
path           a glob that nobody else may work in meanwhile; may be repeated
time-limit     seconds until an attempt is ended
budget         dollars that the task may cost
file           a checklist, JSON lines or plain lines; - is standard input
json           one JSON document on standard output
fence          the token of the claim, as it printed it
owner-pid      the process that lives as long as the agent
wait           seconds to wait for it
env            FARM_* lines for run-agent.sh
why            the reason, which the next attempt reads
no-retry       the task is failed at once
branch         another branch than the task's own
commit         this commit, wherever branches are
code           the exit code of its command
name           what the hub calls this host (default: this machine's name)
folder         where its clone and worktrees are (default: ~/farm-hosts/HOST)
watch          again and again, until it is stopped
until-drained  end when all is done, or nothing can move
now            do not let agents finish
all            of all agents
follow         go on as it grows
lines          so many of the last lines
raw            with its escape codes
stat           only which files, and how much
tool           in your difftool (git config --global diff.tool)
state          in this state; may be repeated
match          whose title or id has this text
sort           priority, attempts, cost_usd, state, agent, title or added_at
yes            without asking
fail           it counts as an attempt
retry          and have it tried again after that
failed         all that have failed
title          what to do, in a line
attempt        what this attempt has submitted
into           where to (rescue)
fix            keep damaged files aside and rebuild what they held
output         another file
repo           the repo to work on (default: the one you stand in)
help           this
"""


def option_lines(words: str) -> list[str]:
    """`--name  what it is` for each option of a verb."""
    meanings, lines = dict(line.split(None, 1) for line in OPTION_HELP.splitlines()), []
    for short, name, _ in split_options(words):
        setting = SETTINGS.get(name.replace("-", "_"))
        meaning = meanings.get(name) or (setting.meaning if setting else "")
        flags = f"-{short}, --{name}" if short not in ("", name) else f"--{name}"
        lines.append(f"  {flags:<18} {meaning}")
    return lines


def help_text(name: str) -> str:
    entry = VERBS[name]
    options = "\n".join(option_lines(f"{entry.options} repo="))
    return (
        f"usage: farm.py {entry.synopsis}\n\n{entry.summary}\n\noptions:\n{options}\n\n"
        f"example: {entry.example}"
    )


def settings_text() -> str:
    """Every setting: its variable, its default, its meaning."""
    lines = [
        f"{variable_of(name):<22} {str(entry.default) or '-':<8} {entry.meaning}"
        for name, entry in SETTINGS.items()
    ]
    return (
        "A flag goes before FARM_* in the environment, that before farm.env (KEY=VALUE lines\n"
        "at the repo's root), that before what the last `up` was told.\n\n" + "\n".join(lines)
    )


def clis_text() -> str:
    """The coding CLIs that are known by name: how each starts, goes on, and with which version
    that was checked."""
    lines = []
    for name, cli in CLIS.items():
        lines += [f"{name} (checked with {cli.checked})", f"  starts:   {cli.start}"]
        lines += [f"  goes on:  {cli.resume}"] if cli.resume else []
    return "\n".join(
        [*lines, "", "any other --agent is a command, run by bash -c in the agent's worktree"]
    )


# ------------------------------------------------------------------------ verbs of tasks and agents
# A few lines each, in the order of a task's way, then locks. The agents' own are called often:
# their start is their cost. (tests/rooms/test_task_queue.py, tests/rooms/test_fences.py)

NEED_STATE = (check_pins, check_refs)
CHECKS = (
    check_tools,
    check_settings,
    check_state,
    *NEED_STATE,
    check_repo,
    check_machine,
    check_agents,
    check_hosts,
)


@verb(
    "add TITLE [--prompt TEXT | --prompt-file F] [--agent PRESET] | add -f FILE",
    "add one task, or many from a file (- for stdin)",
    "prompt= prompt-file= id= priority=# after=* path=* max-attempts=# time-limit=s budget=s "
    "agent= no-after f|file=",
    "./farm.py add 'Fix the login test' --priority 5",
)
def verb_add(call: Call) -> None:
    settings = call.settings()
    if file := call.get("file"):
        drafts = parse_tasks(read_text(file), os.path.basename(file))
        if call.args or not drafts:
            raise UsageError(
                "add -f takes no title" if call.args else f"there is no task in {file}"
            )
    else:
        drafts = [draft_from(call)]
    check_presets(drafts)
    with call.store.transaction() as tx:
        drafts = follow_up(tx, drafts, settings, not call.get("no_after"))
        answers = TaskQueue(tx).add(drafts, settings.max_attempts)
    for task, is_new in answers:
        print(task.id)
        if not is_new:
            say(f"{task.id} is there already: {one_line(task.title, 60)}")


def check_presets(drafts: list[Task]) -> None:
    """Raises UsageError for a task whose preset nobody knows."""
    known = ("", *CLIS, COMMAND)
    for draft in drafts:
        if draft.preset not in known:
            raise UsageError(
                f"{one_line(draft.title, 60)!r}: there is no preset {draft.preset!r}; "
                f"there are {', '.join(known[1:])} (any other agent)"
            )


def follow_up(tx: Transaction, drafts: list[Task], settings: Settings, waits: bool) -> list[Task]:
    """The drafts of an agent at work name its task as their parent, and come after it (waits:
    where they name nothing else). Raises Refused for too many
    in one attempt, and in too late a generation: agents that add tasks in every task would never
    be done.
    """
    parent, fence = given("FARM_TASK"), given("FARM_FENCE")
    claim = tx.state.find_holder(parent) if parent else None
    if claim is None or claim.fence != fence:
        return drafts
    limit, depth, elder = settings.follow_ups, 0, claim.get_task()
    while elder and elder.parent:
        depth, elder = depth + 1, tx.state.find_task(elder.parent)
    if depth >= settings.follow_up_depth:
        raise Refused(
            f"{parent} is a follow-up itself, of generation {depth}, and may add none",
            "say in your commit message what is left to do (a person may raise "
            "FARM_FOLLOW_UP_DEPTH)",
        )
    added = sum(
        task.parent == parent and task.added_at >= claim.claimed_at for task in tx.state.all_tasks()
    )
    if added + len(drafts) > limit:
        raise Refused(
            f"one attempt may add {number(limit, 'task')}, and {parent} has added {added}; "
            f"{len(drafts)} more are refused",
            "say in your commit message what is left to do (a person may raise FARM_FOLLOW_UPS)",
        )
    return [
        draft._replace(parent=parent, after=draft.after or [parent] * waits) for draft in drafts
    ]


# the options that are no fields of the same name
TASK_OPTIONS = {
    "path": "paths",
    "agent": "preset",
    "time_limit": "time_limit_seconds",
    "budget": "budget_usd",
}


def draft_from(call: Call) -> Task:
    """The task that the command line of `add` describes."""
    title = " ".join(call.args).strip()
    if not title:
        raise UsageError("a task needs a title", "./farm.py add 'what to do'")
    fields = fields_of(call)
    if fields.get("max_attempts", 1) < 1:
        raise UsageError("a task needs at least one attempt: --max-attempts 1")
    if file := fields.pop("prompt_file", ""):
        fields["prompt"] = read_text(file)
    if fields.get("id"):
        checked_name(fields["id"], "task id")
    return Task(title=title, **fields)


def fields_of(call: Call) -> dict:
    """The fields of a task that the options of `add` and `edit` name, whose lists may be emptied
    by an empty word."""
    return {
        TASK_OPTIONS.get(key, key): list(filter(None, value)) if isinstance(value, list) else value
        for key, value in call.options.items()
        if key not in ("repo", "file", "no_after", "command")
    }


def print_records(call: Call, records: list[dict], heads: list[str], cells) -> None:
    """As JSON, or as a table of `cells(record)`."""
    if call.get("json"):
        print_json(records)
    else:
        print_table(list(map(cells, records)), heads)


SORTED_BY = ("priority", "attempts", "cost_usd", "state", "agent", "title", "added_at")


def select_tasks(records: list[dict], options: dict) -> list[dict]:
    """Those that --state, --agent and --match name, in the order of --sort: numbers from the
    highest, texts from the first. Raises UsageError."""
    states, agent, text = (options.get(key) for key in ("state", "agent", "match"))
    key = options.get("sort", "added_at")  # the order that they come in
    if key not in SORTED_BY:
        raise UsageError(f"tasks can be sorted by {', '.join(SORTED_BY)}, not by {key!r}")
    found = [
        one
        for one in records
        if (not states or one["state"] in states)
        and (not agent or agent in (one["agent"], agent_number(one["agent"])))
        and (not text or text.lower() in f"{one['id']} {one['title']}".lower())
    ]
    zero = 0 if key in SORTED_BY[:3] else ""
    return sorted(found, key=lambda one: one.get(key, zero), reverse=zero == 0)


@verb(
    "tasks [--state S]... [--agent A] [--match TEXT] [--sort KEY] [--json]",
    "every task in every state, or some",
    "json state=* agent= match= sort=",
    "./farm.py tasks --state failed --sort priority",
)
def verb_tasks(call: Call) -> None:
    state, now = call.state, CLOCK.now()
    spending = defaultdict(list)
    for line in read_usage(call.store, is_whole=True):
        spending[line["task"]].append(line)
    reviews = dict.fromkeys(find_reviews(call.store, state), {"state": "review"})
    records = select_tasks(
        [
            {
                **task_record(task, state, now),
                **reviews.get(task.id, {}),
                **(sum_usage(spending[task.id]) if task.id in spending else {}),
            }
            for task in state.all_tasks()
        ],
        call.options,
    )
    print_records(
        call,
        records,
        ["TASK", "STATE", "AGENT", "TRIES", "TITLE", "COMMIT OR REASON"],
        lambda task: [
            task["id"],
            task["state"],
            task["agent"] or "-",
            task["attempts"],
            task["title"],
            task.get("landed_commit", "")[:10]
            or as_typed("; ".join(filter(None, (task.get("waits"), task["reason"])))),
        ],
    )


def move_each(call: Call, ids: list[str], move) -> int:
    """`move(queue, id)` for each task, a transaction each; those that are refused are said.
    Raises NotFound where there is none."""
    code = 0
    for task_id in ids:
        try:
            with call.store.transaction() as tx:
                move(TaskQueue(tx), task_id)
        except Refused as error:
            code = print_error(error)
    if not ids:
        raise NotFound("there is no such task", "./farm.py tasks")
    return code


@verb(
    "cancel ID | cancel --match TEXT",
    "take a task out, or all whose title has a text",
    "match=",
    "./farm.py cancel t-0007",
)
def verb_cancel(call: Call) -> int:
    text = call.get("match", "").lower()
    ids = [
        task.id
        for task in call.state.live_tasks()
        if task.state not in ("landed", "canceled") and text in task.title.lower()
    ]
    return move_each(call, ids if text else [call.one("task id")], TaskQueue.cancel)


@verb(
    "retry ID | retry --failed",
    "let a failed or canceled task, or all failed ones, be claimed again",
    "failed",
    "./farm.py retry t-0007",
)
def verb_retry(call: Call) -> int:
    more = call.settings().max_attempts
    ids = [task.id for task in failed_tasks(call.state)]
    return move_each(
        call,
        ids if call.get("failed") else [call.one("task id")],
        lambda queue, task_id: queue.retry(task_id, more),
    )


def wait_until_made(call: Call, settings: Settings, error: type, move):
    """What `move(watch)` returns: while it raises `error`, again at each change of the state, up
    to --wait seconds."""
    watch = LeaseWatch(settings)
    deadline = CLOCK.monotonic() + call.get("wait", 0)
    while True:
        before = call.store.signature()
        try:
            return move(watch)
        except error:
            if CLOCK.monotonic() >= deadline:
                raise
        wait_for_change(call.store, before, deadline)


@verb(
    "claim AGENT [--owner-pid PID] [--wait SECONDS] [--id ID]",
    "take the next task; prints its lock file as one line",
    "owner-pid=# wait=s id= env",
    "./farm.py claim agent-001 --owner-pid $$",
)
def verb_claim(call: Call) -> None:
    agent, owner = call.agent(), caller(call.get("owner_pid"))
    settings = call.settings()
    claim = wait_until_made(
        call, settings, NotFound, lambda watch: claim_once(call, agent, owner, watch)
    )
    cli = cli_of(given("FARM_PRESET"))
    resumes = cli.can_resume(claim)
    try:
        prompt = write_prompt(call.store, claim, settings, resumes=resumes)
    except OSError as error:
        raise FarmError(
            f"{error.filename}: {error.strerror}; {claim.task['id']} is claimed, but its prompt "
            f"could not be written",
            "repeat the command",
        ) from None
    if cli.stagger_seconds and call.get("env"):
        wait_for_start(call.store, cli.stagger_seconds)
    print(
        claim_environment(claim, prompt, resumes) if call.get("env") else dump_line(claim.to_json())
    )


def fence_of(call: Call) -> str:
    fence = call.get("fence") or given("FARM_FENCE")
    if not fence:
        raise UsageError(
            f"{call.name} needs --fence",
            f"the claim printed it: ./farm.py {call.name} AGENT --fence t-0001.2",
        )
    return fence


def move_claim(call: Call, *args, **options) -> None:
    """The move that the verb is called, of what the agent holds by its fence."""
    with call.store.transaction() as tx:
        getattr(TaskQueue(tx), call.name)(call.agent(), fence_of(call), *args, **options)


@verb(
    "renew AGENT --fence F",
    "keep a claim of an owner that others cannot see",
    "fence=",
    "farm renew agent-001 --fence t-0001.2",
)
def verb_renew(call: Call) -> None:
    move_claim(call)


@verb(
    "release AGENT --fence F",
    "give a task back; no attempt is counted",
    "fence= why=",
    "farm release agent-001 --fence t-0001.2",
)
def verb_release(call: Call) -> None:
    move_claim(call, one_line(call.get("why", ""), 500))


@verb(
    "fail AGENT --fence F --why TEXT [--no-retry]",
    "end an attempt without a result",
    "fence= why= no-retry",
    "farm fail agent-001 --fence t-0001.2 --why 'the API is gone'",
)
def verb_fail(call: Call) -> None:
    why = one_line(call.get("why", ""), 500)
    if not why:
        raise UsageError("fail needs --why: the next attempt reads it")
    move_claim(call, why, retry=not call.get("no_retry"))


@verb(
    "submit AGENT --fence F [--branch B] [--commit SHA]",
    "hand finished work to the merge queue",
    "fence= branch= commit=",
    "farm submit agent-001 --fence t-0001.2",
)
def verb_submit(call: Call) -> None:
    source = {"branch": call.get("branch", ""), "commit": call.get("commit", "")}
    submit(call.store, call.agent(), fence_of(call), **source)


@verb(
    "hook",
    "what a coding CLI's hooks call, with their event as JSON on stdin",
    "",
    "farm hook <event.json",
)
def verb_hook(call: Call) -> None:
    agent, fence = given("FARM_AGENT_NAME"), given("FARM_FENCE")
    try:  # by way of the mailbox it comes behind the agent's name
        event = json.loads((call.args[1:] or [sys.stdin.buffer.read()])[0] or "{}")
    except (ValueError, RecursionError) as error:
        raise UsageError(f"a hook's event is a JSON object: {error}") from None
    if not is_name(agent) or not fence or not isinstance(event, dict):
        raise UsageError(
            "hook is for the CLI that the farm has started: FARM_AGENT_NAME and FARM_FENCE are "
            "not set"
        )
    if answer := note_turn(call.store, agent, fence, event):
        print(dump_line(answer))


@verb(
    "finish AGENT --fence F --code N",
    "say and do what becomes of an attempt whose command ended with N (run-task.sh calls it)",
    "fence= code=#",
    "farm finish agent-001 --fence t-0001.2 --code 0 <log",
)
def verb_finish(call: Call) -> None:
    attempt = Attempt(call, call.agent(), fence_of(call))
    log = sys.stdin.buffer.read().decode("utf-8", "replace")
    try:
        attempt.finish(call.get("code", 0), log)
    except Refused as error:
        # somebody else has the task now, or the agent has made its move itself
        say(str(error))


MAILBOX_VERBS = ("submit", "fail", "release", "renew", "lock", "unlock", "add")


@verb(
    "answer AGENT",
    "make the moves that a sandboxed agent has asked for; run-task.sh calls it",
    "",
    "farm answer agent-001",
)
def verb_answer(call: Call) -> None:
    agent = call.agent()
    mailbox = call.store.path(f"mailbox/{agent}")
    with os.scandir(mailbox) as entries:  # no more than a hundred at a time, whatever lies there
        asked = (one.name for one in entries if re.fullmatch(r"[\w-]{1,60}\.request", one.name))
        names = sorted(itertools.islice(asked, 100))
    for name in names:
        request = f"{mailbox}/{name}"
        answer = answer_request(agent, call.repo, request)
        try:
            os.unlink(request)
            write_whole(request.removesuffix(".request") + ".answer", json.dumps(answer))
        except OSError as error:  # folders of these names
            say(f"{agent}: {name} cannot be answered: {error}")


def answer_request(agent: str, repo: str, path: str) -> dict:
    """Make one request's move, if it is one that this agent may ask for: {"code", "stdout",
    "stderr"}."""
    import contextlib
    import io

    out, errors = io.StringIO(), io.StringIO()
    try:
        asked = json.loads(read_foreign(path, MAIL_BYTES, os.O_NOFOLLOW))
        argv = [str(word) for word in asked]
        is_own = argv[1:2] == [agent] or argv[0] == "add"
        # also what getopt takes for a short --repo
        leads_away = any(word.startswith("--r") for word in itertools.takewhile("--".__ne__, argv))
        if argv[0] not in (*MAILBOX_VERBS, "hook") or not is_own or leads_away:
            raise ValueError(f"only {', '.join(MAILBOX_VERBS)} of {agent} itself can be asked for")
        if argv[0] == "add" and any(word.startswith(("-f", "--f", "--prompt-f")) for word in argv):
            raise ValueError("a file cannot be read from here: add TITLE --prompt TEXT")
    except (OSError, ValueError, IndexError, TypeError, RecursionError) as error:
        return {"code": Refused.exit_code, "stdout": "", "stderr": f"farm: {error}\n"}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = run_verb(argv[0], ["--repo", repo, *argv[1:]])
    return {"code": code, "stdout": out.getvalue(), "stderr": errors.getvalue()}


def acquire_waiting(call: Call, agent: str, names: list[str], owner: Owner) -> None:
    """Hold all names. Raises Refused."""

    def acquire(watch: LeaseWatch) -> None:
        take_over(call.store, watch, lambda tx: LockRegistry(tx).acquire(agent, names, owner))

    wait_until_made(call, call.settings(), Refused, acquire)


def lock_names(call: Call, names: list[str]) -> list[str]:
    if not names or not all(names):
        raise UsageError(f"{call.name} needs a name, such as schema, port:8080 or path:src/db/**")
    return names


@verb(
    "lock AGENT NAME... [--wait S]",
    "hold named resources, all or none",
    "wait=s owner-pid=#",
    "farm lock agent-001 schema 'path:src/db/**'",
)
def verb_lock(call: Call) -> None:
    acquire_waiting(
        call, call.agent(), lock_names(call, call.args[1:]), caller(call.get("owner_pid"))
    )


@verb("unlock AGENT NAME...", "give named resources up", "", "farm unlock agent-001 schema")
def verb_unlock(call: Call) -> None:
    with call.store.transaction() as tx:
        LockRegistry(tx).release(call.agent(), lock_names(call, call.args[1:]))


@verb("locks [--json]", "who holds what", "json", "./farm.py locks")
def verb_locks(call: Call) -> None:
    records = [
        {
            "agent": claim.agent,
            "task": claim.task.get("id", ""),
            "locks": claim.names(),
            "fence": claim.fence,
            "owner": claim.owner,
            "alive": find_liveness(claim.get_owner()),
            "claimed_at": claim.claimed_at,
        }
        for claim in call.state.claims.values()
    ]
    words = {True: "alive", False: "dead", None: "unseen"}
    print_records(
        call,
        records,
        ["AGENT", "TASK", "LOCKS", "PID", "OWNER", "SINCE"],
        lambda one: [
            one["agent"],
            one["task"] or "-",
            ", ".join(one["locks"]) or "-",
            one["owner"].get("pid"),
            words[one["alive"]],
            one["claimed_at"],
        ],
    )


@verb(
    "with-lock NAME... -- COMMAND",
    "run a command while holding names",
    "wait=s",
    "farm with-lock schema -- ./migrate.sh",
)
def verb_with_lock(call: Call) -> int:
    import shutil

    command, names = call.get("command"), lock_names(call, call.args)
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
    """A child that becomes `command` once a byte comes through the pipe: (pid, write end). It
    owns the lock, so the lock lives exactly as long as the command, whatever happens to this
    process.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child:
        os.close(read_end)
        return child, write_end
    os.close(write_end)
    if os.read(read_end, 1):
        os.execvpe(command[0], command, CALLER_ENVIRONMENT)
    os._exit(Refused.exit_code)


# -------------------------------------------------------------------------------- verbs of a person
# The merge queue, the farm, and what a person sees and steers: a few lines each.
# (tests/rooms/test_steering.py, tests/rooms/test_attach_and_logs.py)


@verb("queue [--json]", "the merge queue", "json", "./farm.py queue")
def verb_queue(call: Call) -> None:
    state = call.state
    records = queue_records(call.store, state)
    print_records(
        call,
        records,
        ["TASK", "STATE", "AGENT", "COMMIT", "TITLE", "WHY"],
        lambda r: [r["id"], r["state"], r["agent"], r["commit"][:10], r["title"], r["reason"]],
    )
    if not call.get("json"):
        say(describe_queue(state, records, find_activity(call.store)))


@verb(
    "merge [--gate COMMAND] [--slots P] [--into BRANCH] [--watch] [--json]",
    "land what is ready, once or for ever",
    "gate= slots=# into= watch json style= strict remote= review=",
    "./farm.py merge --gate 'make test'",
)
def verb_merge(call: Call) -> int:
    settings = call.settings()
    target = target_of(call)
    call.store.ensure_folders()
    carry_isolation(settings)
    if not settings.gate:
        say(
            "there is no gate: what merges cleanly lands, and nothing was tested (set one: --gate "
            "'make test')"
        )
    try:
        guard = hold_long(call.store.path("merger.lock"), "a merger")
    except Refused:
        if call.get("watch"):
            raise
        return follow_merger(call)
    queue = MergeQueue(call.store, settings, target, worktrees_folder(call.repo, settings))
    queue.review.note_cost = functools.partial(note_review, call.store, settings.reviewer)
    should_stop = StopRequest()
    try:
        Merger(queue, forever=bool(call.get("watch"))).run(should_stop)
    finally:
        queue.stop()
        guard.close()
    if should_stop.is_set():
        return 128 + should_stop.signal
    if queue.reviews:
        say(f"waits for a review: {', '.join(queue.reviews)}\n  try: ./farm.py status")
    return report_merge(call, queue.tally.moved, queue.trouble or (), queue.tally.counts["gates"])


def report_merge(call: Call, moved: list[tuple], trouble: tuple, gates: int) -> int:
    """What landed and what came back; 5 when something came back or waits for a person."""
    came_back = [move for move in moved if move[1] != "landed"]
    if trouble:
        say(f"{trouble[0]}\n  try: {trouble[1]}")
    if call.get("json"):
        print_json(
            {
                "landed": [name for name, what, _ in moved if what == "landed"],
                "gates": gates,
                "returned": [{"id": name, "reason": why} for name, _, why in came_back],
                "trouble": list(trouble),
            }
        )
    else:
        print_table(moved, ["TASK", "WHAT", "COMMIT OR REASON"])
    return 5 if came_back or trouble else 0


def follow_merger(call: Call) -> int:
    """The farm's own merger is at work: wait until it has drained the queue or needs a person,
    and report what it did."""
    say("the farm's merger is at work; waiting until the queue is empty")
    store, waiting = call.store, call.state.ready
    while (
        (activity := find_activity(store))
        and not activity["trouble"]
        and (now := store.snapshot()).ready.keys() - find_reviews(store, now).keys()
    ):
        wait_for_change(store, store.signature(), CLOCK.monotonic() + 1)
    state = store.snapshot()
    tasks = [state.get_task(task_id) for task_id in waiting if task_id not in state.ready]
    moved = [
        (task.id, "landed", task.landed_commit[:10])
        if task.state == "landed"
        else (task.id, "returned", task.reason)
        for task in tasks
    ]
    return report_merge(call, moved, tuple(activity.get("trouble", ())), activity.get("gates", 0))


FARM_OPTIONS = "n|n=# agent= gate= into= slots=# style= strict remote= review= on= gate-on="


@verb(
    "up [-n N] [--agent A] [--gate C] [--into B]",
    "worktrees, sessions and the loop, in tmux; again: adopts and repairs",
    FARM_OPTIONS,
    "./farm.py up -n 10 --agent claude --gate 'make test'",
)
def verb_up(call: Call) -> None:
    farm = open_farm(call)
    if call.store.mode() == "running" and find_recorded(call.store.path("loop.lock")) is None:
        say("this farm was running and was not stopped; going on from what is on disk")
    # which need not be where one stands
    found = run_script("merge/find-checkout.sh", "-C", call.repo, farm.target, allow=(0, 1, 3))
    places = [row[1] for row in found.rows if row[0] == "checkout"]
    where = f"checked out in {', '.join(places)}" if places else "which is checked out nowhere"
    say(f"work lands on {farm.target}, {where}")
    say(describe_isolation(farm.settings))
    started, adopted = farm.up()
    say(
        f"{started} agents started{farm.settings.on and ' here'}, {adopted} were running; they go "
        f"on when you log out"
    )
    say("look: ./farm.py status   go there: ./farm.py attach 1   stop: ./farm.py down")


@verb(
    "run [-n N] ... [--until-drained]",
    "the same loop in the foreground; Ctrl-C stops the farm",
    FARM_OPTIONS + " until-drained",
    "./farm.py run -n 4 --agent ./agent.sh --until-drained",
)
def verb_run(call: Call) -> int:
    import signal

    farm = open_farm(call)
    guard = hold_long(call.store.path("loop.lock"), "a loop")
    before = call.store.farm()
    # a loop that was killed goes on as it was told
    if given("FARM_AS_TOLD") and before.get("mode") == "paused":
        farm.remember("paused", before.get("reason", ""))
    else:
        farm.remember("running")
    should_stop, progress, news = StopRequest(), Progress(), News(farm, report_apart)
    standstill, farm.tell = Standstill(farm), news.tell

    def is_over() -> bool:
        progress.show(farm.state)
        return farm.is_drained() or standstill.is_reached()

    if call.get("until_drained"):
        farm.is_over = is_over
    start_placing(call.store, farm.settings)
    try:
        farm.run(should_stop)
    finally:
        progress.close()
    news.finish(0 if should_stop.is_set() else NOTICE_SECONDS)
    if should_stop.is_set() and should_stop.signal != signal.SIGINT:
        return 128 + should_stop.signal
    end_run(farm, should_stop)
    guard.close()
    if should_stop.is_set():
        return 130
    if standstill.found:
        say(f"nothing can move without a person: {standstill.found[1]}\n  try: ./farm.py doctor")
        return standstill.found[0]
    states = call.state.count_states()
    return 0 if set(states) <= {"landed", "canceled"} else 5


def report_apart(store: Store) -> None:
    """The report, by a process of its own: it reads all of a year's history, and the loop stays
    small."""
    import subprocess

    nothing = subprocess.DEVNULL
    code = call_farm(store.repo, "report", stdin=nothing, stdout=nothing)
    if code not in (0, DamagedState.exit_code):
        say(f"the report could not be written (exit code {code})")


def end_run(farm: Farm, should_stop: StopRequest) -> None:
    """Agents may finish after the first Ctrl-C, and are ended by the second."""
    if should_stop.is_set():
        say("stopping: agents may finish their tasks; press Ctrl-C again to end them now")
    grace_seconds = farm.settings.grace_seconds if should_stop.is_set() else 0
    farm.ending().down(grace_seconds, hurry=lambda: should_stop.count > 1)


@verb(
    "down [--now]",
    "stop the sessions: agents may finish first, all work is kept",
    "now n|n=#",
    "./farm.py down",
)
def verb_down(call: Call) -> None:
    farm = started_farm(call)
    seconds = 0 if call.get("now") else farm.settings.grace_seconds
    say_kept(farm.ending().down(seconds))
    end_hosts(call, seconds)


@verb("clean", "remove worktrees and branches that are safe to remove", "", "./farm.py clean")
def verb_clean(call: Call) -> int:
    settings = call.settings()
    sessions = probe_sessions(find_server(call.repo))
    if living(sessions):
        raise Refused(
            f"{len(sessions)} sessions are running", "./farm.py down, then ./farm.py clean"
        )
    end_placed(call.store, 0)
    folder = worktrees_folder(call.repo, settings)
    target = settings.into or target_of(call)
    run_script("merge/pins.sh", "drop", "-C", call.repo, "-b", target)
    where = ("-C", call.repo, "-d", folder, "-b", target)
    result = run_script("rm-worktrees.sh", *where, allow=(0, 4), prefix=unfiltered(call.repo))
    print_table(result.rows, ["AGENT", "WHAT", "WHY"])
    for name in names_in(folder):
        if name.startswith(("gate-", "plan-")) and not name.endswith(".tmp"):
            run_script("merge/gate-slot.sh", "remove", f"{folder}/{name}")
    return result.code


@verb(
    "status [--json] [--watch]",
    "agents, tasks, queue, loop; --watch: again and again, with keys",
    "json watch",
    "./farm.py status --watch",
)
def verb_status(call: Call) -> int:
    """With --watch until q or a signal; the farm goes on. In a pipe: the status every two seconds,
    when it has changed; JSON: one line each."""
    as_json = call.get("json")
    if not call.get("watch"):
        status = read_status(call)
        print_json(status) if as_json else print_status(status)
        return status.get("exit_code", 0)
    should_stop = StopRequest()
    if sys.stdout.isatty() and not as_json:
        return Watch(call, should_stop).run()
    sight, last = Sight(0.004), ""
    while not should_stop.is_set():
        status = read_status(call, sight)
        text = dump_line(status) if as_json else "\n".join(status_text(status, 0)) + "\n"
        if text != last:
            print(text, flush=True)
            last = text
        should_stop.wait(2)
    return 128 + should_stop.signal


@verb(
    "attach AGENT | attach --all",
    "go into an agent's session; --all: an overview of all, to look at",
    "all",
    "./farm.py attach 3",
)
def verb_attach(call: Call) -> int:
    agent, host = ("", "") if call.get("all") else find_agent(call)
    if host:
        return attach_on(call, agent, host)
    socket = find_server(call.repo)
    name = agent or run_script("overview-tmux.sh", "-L", socket).stdout.strip()
    # what the script names where there is no such session
    os.environ["FARM_STATUS"] = as_typed("./farm.py status")
    argv = ["bash", f"{SCRIPTS}/attach-tmux.sh", "-L", socket, name]
    return os.execv(find_bash(), argv)


def host_of(store: Store, agent: str) -> str:
    """The host that an agent is on; empty for one of this machine."""
    host = agent.rpartition("-agent-")[0]
    return host if host in read_hosts(store) else ""


def find_agent(call: Call) -> tuple[str, str]:
    """(agent, its host) of the first argument. A bare number that no agent here has had is that of
    the one host that has it. Raises Refused where several have."""
    agent = call.agent()
    if call.args[0].isdigit() and not os.path.exists(call.store.path(f"logs/{agent}.log")):
        found = [
            record["agent"]
            for told in read_hosts(call.store).values()
            for record in told.get("agents", ())
            if record["agent"].endswith("-" + agent)
        ]
        if len(found) > 1:
            hint = f"./farm.py {call.name} {found[0]}"
            raise Refused(f"{call.args[0]} is the number of {', '.join(found)}", hint)
        agent = found[0] if found else agent
    return agent, host_of(call.store, agent)


# What a host has told of itself is a text for a person, and no command for this machine: it runs
# what it says on that host only.
def attach_on(call: Call, agent: str, host: str) -> int:
    """Go there by ssh where this farm has placed the host itself; else, and without a terminal,
    what to type: a host need not be reachable from here."""
    told = read_hosts(call.store)[host]
    engine = call.store.read_part(PLACED_FILE, "hosts").get(host, [""])[0]
    there = f"{told['farm']} {call.name} {agent[-3:]}" + " -f" * (call.name == "logs")
    if engine.startswith("ssh:") and sys.stdin.isatty() and sys.stdout.isatty():
        line = 'exec ${GIT_SSH_COMMAND:-ssh} -t -- "$@"'
        return os.execv(find_bash(), ["bash", "-c", line, "ssh", engine[4:], there])
    print(f"{told['reach'] or 'ssh -t ' + (engine[4:] or host)} {there}")
    say(f"{agent} is on {host}: type that where {host} can be reached")
    return 0


def order_on(call: Call, agent: str, host: str, *argv: str) -> int:
    """What the host's own farm says to the verb."""
    done = order(call.store, host, call.name, agent[-3:], *argv)
    sys.stdout.write(printable(done["out"]))
    if done["err"].strip():
        say(printable(done["err"]).strip().removeprefix("farm: "))
    return done["code"]


def end_hosts(call: Call, seconds: float) -> None:
    """Hosts see by themselves that the farm is stopped: wait for them, and name those that are
    not heard, or not ready in time; without seconds nobody there may finish."""
    lease = call.settings().host_lease_seconds

    def find() -> dict[str, dict]:
        return {record["host"]: record for record in host_records(call.store, lease)}

    def is_over() -> bool:
        return all(record["state"] == "lost" for record in find().values())

    for host in find() if not seconds and not is_over() else ():
        try:
            order(call.store, host, "estop", seconds=5.0)
        except FarmError:
            continue  # it may have ended by itself already; who has not is named below
    wait_for(is_over, seconds + 20, 0.2)
    for host, record in find().items():
        heard = f"{host} was heard {ago(record['heard_at'])} ago"
        say(f"{heard}; what its agents hold is free after its lease, and comes too late then")


@verb(
    "logs AGENT [-f] [-n LINES] [--raw] | logs --all [-f]",
    "what an agent printed, through all its sessions; of all: with names",
    "f|follow n|lines=# raw all",
    "./farm.py logs 3 -f",
)
def verb_logs(call: Call) -> int:
    """Of all, the last 10 lines of each, or all with `-n` or without -f; -f goes on in the order in
    which lines appear."""
    is_all, follow, readers = call.get("all"), call.get("follow"), {}
    agent, host = ("", "") if is_all else find_agent(call)
    if host and follow:
        return attach_on(call, agent, host)
    if host:
        return order_on(call, agent, host, "-n", str(call.get("lines", 200)))
    raw = call.get("raw") and not is_all
    if agent and not os.path.exists(call.store.path(f"logs/{agent}.log")):
        raise NotFound(f"{agent} has no log yet", "./farm.py status")
    lines = call.get("lines", 10 if is_all and follow else None)
    while True:
        for name in [agent] if agent else find_logs(call.store):
            if is_new := name not in readers:
                readers[name] = LogReader(call.store.path(f"logs/{name}.log"))
            reader, head = readers[name], f"{name} | " if is_all else ""
            if is_new and lines is not None and not raw:
                reader.show(reader.last_lines(lines), head)
            for data in iter(reader.read, b""):
                sys.stdout.buffer.write(data) if raw else reader.show(reader.clean(data), head)
            if not follow:
                reader.show("\n" * bool(reader.begun), head)
        sys.stdout.flush()
        if not follow:
            return 0
        time.sleep(0.2)


@verb(
    "send AGENT TEXT | send --all TEXT",
    "type a text into a session, and see that it was taken; --all: to all who are at work",
    "all",
    "./farm.py send 3 'please also add a test'",
)
def verb_send(call: Call) -> int:
    text = " ".join(call.args if call.get("all") else call.args[1:])
    if not text:
        raise UsageError("send needs a text", "./farm.py send AGENT TEXT")
    if call.get("all"):
        return send_to_all(call, text)
    agent, host = find_agent(call)
    if host:
        return order_on(call, agent, host, text)
    run_script("send-tmux.sh", "-L", find_server(call.repo), agent, stdin=text)
    return 0


def send_to_all(call: Call, text: str) -> int:
    """To every agent that holds a task: one that is idle has no program that would read it."""
    from concurrent.futures import ThreadPoolExecutor

    socket = find_server(call.repo)
    live = living(probe_sessions(socket))
    names = [name for name in call.state.busy() if name in live or host_of(call.store, name)]
    if not names:
        raise NotFound("no agent is at work", "./farm.py status")

    def send(name: str) -> list[str]:
        try:
            if host := host_of(call.store, name):
                done = order(call.store, host, "send", name[-3:], text)
                return [name, one_line(done["err"], 200) if done["code"] else "taken"]
            run_script("send-tmux.sh", "-L", socket, name, stdin=text)
        except FarmError as error:
            return [name, str(error)]
        return [name, "taken"]

    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(send, names))
    print_table(rows, ["AGENT", "TEXT"])
    return 0 if all(said == "taken" for _, said in rows) else Refused.exit_code


@verb(
    "pause [--why TEXT]",
    "hand out no new work; agents finish what they hold, and the merge queue goes on",
    "why=",
    "./farm.py pause --why 'release at noon'",
)
def verb_pause(call: Call) -> None:
    set_mode(started_farm(call).store, "paused", one_line(call.get("why", ""), 200))


@verb("resume", "hand out work again", "", "./farm.py resume")
def verb_resume(call: Call) -> None:
    set_mode(started_farm(call).store, "running")


@verb(
    "estop",
    "stop everything this second: nobody finishes anything, all work is kept, all claims are freed",
    "",
    "./farm.py estop",
)
def verb_estop(call: Call) -> None:
    import signal

    # it may be typed in one of the sessions that it ends
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    say_kept(started_farm(call).ending().estop())
    end_hosts(call, 0)
    say("everything has stopped; ./farm.py up goes on from here")


@verb(
    "rescue list | show REF | restore REF [--into DIR]",
    "unsaved work that was kept",
    "into=",
    "./farm.py rescue list",
)
def verb_rescue(call: Call) -> None:
    action, *refs = call.args or ["list"]
    if (action, len(refs)) not in (("list", 0), ("show", 1), ("restore", 1)):
        raise UsageError("rescue list, rescue show REF, or rescue restore REF [--into DIR]")
    if action == "restore":
        refs.append(call.get("into") or os.getcwd())
    print(run_script("rescue.sh", action, "-C", call.repo, *refs).stdout, end="")


@verb(
    "doctor [--fix] [--json]",
    "what is missing or damaged, and the command that mends it",
    "fix json",
    "./farm.py doctor",
)
def verb_doctor(call: Call) -> int:
    mended = mend(call.store) if call.get("fix") else []
    unable = NEED_STATE if find_damaged(call.store) else ()
    findings = [
        (*finding, 0)[:3] for check in CHECKS if check not in unable for finding in check(call)
    ]
    codes = {code for _, _, code in findings}
    if call.get("json"):
        print_json(
            [
                {"problem": one_line(what), "try": hint, "exit_code": code}
                for what, hint, code in findings
            ]
        )
        return max(codes, default=0)
    for line in [f"mended: {line}" for line in mended] + list_clis() + [describe_sandbox()]:
        print(line)
    if os.path.isdir(call.store.folder) and MissingTool.exit_code not in codes:
        places = worktrees_folder(call.repo, load_settings(call.repo)), call.store.folder
        disk = run_script("merge/measure-disk.sh", "-C", call.repo, *places, allow=(0, 2, 3))
        print(f"disk: {disk.stdout.strip()}")
    for what, hint, _ in findings:
        print(as_typed(f"{printable(what)}\n  try: {hint}"))
    if not findings:
        print("all is well")
    return max(codes, default=0)


@verb(
    "report [--json] [-o FILE]",
    "one HTML page of all that happened, or its data as JSON; prints the page's path",
    "json o|output=",
    "./farm.py report -o report.html",
)
def verb_report(call: Call) -> int:
    output, document = call.get("output"), report_document(call.store)
    if call.get("json") and not output:
        print_json(document)
    else:
        if not output:
            call.store.ensure_folders()
        path = output or call.store.path("report.html")
        write_whole(path, dump_line(document) + "\n" if call.get("json") else report_page(document))
        print(path)
    for problem in document["problems"]:
        say(problem)
    return DamagedState.exit_code if document["problems"] else 0


# -------------------------------------------------------------------------------- verbs of one task
# To see one task and its work, and to steer it. (tests/rooms/test_steer_one_task.py)


@verb(
    "show ID [--json]",
    "all of one task: prompt, attempts, work, gate, and what to type next",
    "json",
    "./farm.py show t-0007",
)
def verb_show(call: Call) -> None:
    document = task_document(call, call.one("task id"))
    if call.get("json"):
        print_json(document)
    else:
        print("\n".join(show_lines(document, shown_width())))


@verb(
    "diff ID [--stat | --tool | --raw] [--attempt K]",
    "what a task's work would bring to the target, or has brought; what is unsaved included",
    "stat tool attempt=# raw",
    "./farm.py diff t-0007 --stat",
)
def verb_diff(call: Call) -> int:
    task_id, _, commit = call.one("task id").partition("@")
    task = find_submitted(call, call.args[0]) if commit else call.state.get_task(task_id)
    forms = {"stat": "-s", "tool": "-t", "raw": "-r"}
    form = [flag for name, flag in forms.items() if call.get(name)]
    work = find_work(call, task, call.get("attempt", 0))
    argv = ["bash", f"{SCRIPTS}/merge/diff-work.sh", "-C", call.repo, *form, *work]
    os.execv(find_bash(), [*unfiltered(call.repo), *argv])


def check_free(state: State, task: Task) -> None:
    """Raises Refused unless nobody holds the task, and it is as it was read."""
    if holder := state.find_holder(task.id):
        raise Refused(describe_holder(holder), f"./farm.py attach {agent_number(holder.agent)}")
    now = state.get_task(task.id)
    if task.id not in state.pending or now.rev != task.rev:
        raise Refused(
            f"task {task.id} is {now.state}" + ", and has moved" * (now.rev != task.rev),
            f"./farm.py show {task.id}",
        )


def edit_by_hand(task: Task) -> tuple[str, dict]:
    """Have a person edit a task as a text; the text's file, and the fields as they are there.
    Raises NotFound where nothing has changed."""
    import subprocess
    import tempfile

    head = [
        f"{label}: {one}"
        for label, name in LABELS.items()
        for value in [getattr(task, name)]
        for one in ((value or [""]) if isinstance(value, list) else [one_line(str(value))])
    ]
    text = "\n".join([*head, "", task.prompt, ""])
    with tempfile.NamedTemporaryFile(
        "w", prefix=f"{task.id}-", suffix=".md", encoding="utf-8", errors="replace", delete=False
    ) as file:
        file.write(text)
    argv = ["bash", f"{SCRIPTS}/merge/edit-text.sh", file.name]
    code = subprocess.call(argv, env=CALLER_ENVIRONMENT)
    if code or read_text(file.name) == text:
        os.unlink(file.name)
        raise NotFound(f"nothing was changed (the editor ended with {code})")
    fields, rest = read_labels(read_text(file.name).splitlines())
    lists = {"after": [], "paths": []}  # a line that was taken out
    return file.name, {**lists, **fields, "prompt": "\n".join(rest).strip("\n")}


@verb(
    "edit ID [--title T] [--prompt TEXT] [--priority N] [--after ID]... [--path GLOB]... "
    "[--max-attempts N] [--agent PRESET]",
    "change a task that nobody holds; without options in your $EDITOR",
    "title= prompt= priority=# after=* path=* max-attempts=# agent=",
    "./farm.py edit t-0007 --priority 5",
)
def verb_edit(call: Call) -> None:
    state, file = call.state, ""
    task = state.get_task(call.one("task id"))
    fields = fields_of(call)
    check_free(state, task)
    try:
        if not fields:
            file, fields = edit_by_hand(task)
        changed = shortened(task._replace(**fields))
        check_presets([changed])
        if not changed.title.strip() or changed.max_attempts < 1:
            raise UsageError("a task needs a title, and at least one attempt")
        with call.store.transaction() as tx:
            check_free(tx.state, task)
            TaskQueue(tx).resolve_after([changed], [])
            tx.move(changed, "pending", "edited")
    except FarmError as error:
        raise type(error)(
            f"{error}; your text is in {file}" if file else str(error), error.hint
        ) from None
    if file:
        os.unlink(file)


def find_submitted(call: Call, text: str) -> Task:
    """The task of an argument ID or ID@COMMIT, which is in the merge queue at that commit. Raises
    Refused; agents do not judge work."""
    task_id, _, commit = text.partition("@")
    task = call.state.get_task(task_id)
    if task.state != "ready" or not task.commit.startswith(commit):
        raise Refused(
            f"{task_id} is {task.state}" + f" at {task.commit[:10]}" * bool(commit),
            f"./farm.py show {task_id}",
        )
    if given("FARM_SESSION"):
        raise Refused("an agent's work is judged by others", f"./farm.py diff {task_id}")
    return task


@verb(
    "approve ID[@COMMIT]... | approve --all",
    "let work land that waits for a review: the commit that was shown, and no later one",
    "all",
    "./farm.py approve t-0007",
)
def verb_approve(call: Call) -> int:
    target, code = target_of(call), 0
    found = find_reviews(call.store, call.state)
    wanted = (
        [f"{task_id}@{commit}" for task_id, commit in found.items()]
        if call.get("all")
        else call.args
    )
    if not wanted:
        raise NotFound("nothing waits for a review", "./farm.py queue")
    for text in wanted:
        try:
            task = find_submitted(call, text)
            site = Site(call.store, call.settings(), target)
            chain = Chain(site, Verdicts(call.store, "", ""))
            chain.begin(show_tip(call.repo, f"refs/heads/{target}"), {task.id: task})
            step = chain.build_all()[0]
            if step.status not in ("ok", "landed", "empty"):
                raise Rejected(
                    f"{task.id} does not merge with {target} any more ({step.status} "
                    f"{step.detail}): the merge queue sends it back"
                )
            approve(call.store, task.id, task.commit, "person")
            print(f"{task.id}\t{task.commit}")
        except FarmError as error:
            code = print_error(error)
    return code


@verb(
    "return ID[@COMMIT] --why TEXT [--fail]",
    "send submitted work back, with words for the next attempt; --fail: it counts as an attempt",
    "why= fail",
    "./farm.py return t-0007 --why 'the old name has to stay'",
)
def verb_return(call: Call) -> None:
    task, why = find_submitted(call, call.one("task id")), call.get("why", "")
    if not why and sys.stdin.isatty():
        why = input(f"what is wrong with {task.id}? ")
    if not why.strip():
        raise UsageError("return needs --why: the next attempt reads it")
    site = Site(call.store, call.settings(), target_of(call))
    Returns(site, Tally()).send_back(
        task, f"a person says: {one_line(why, 500)}", printable(why), counts=call.get("fail", False)
    )
    if task.id in call.state.ready:
        raise Refused(f"{task.id} has moved meanwhile", f"./farm.py show {task.id}")


PLAN_PROMPT = """\
Make a plan for this goal, and nothing else:
{}

Read this repository first. Then write the file PLAN.md in its top folder: a checklist of tasks for
coding agents that work at the same time, each in a copy of its own, and know no more than they read
there. Change no other file, and commit nothing. This is its form, where labels may be left out:

- [ ] What to do, in a line
  path: src/db/**
  after: #2
  What the agent must know, and how one sees that it is done.
- [ ] Another task
"""


def have_plan_made(call: Call, settings: Settings, goal: str) -> str:
    """The PLAN.md that one agent writes in a worktree of its own. Raises FarmError."""
    agent = call.get("agent") or share_agents(settings)[0]
    cli = cli_of(cli_of(agent).headless or agent)
    check_command(agent, call.repo)
    carry_isolation(settings)
    folder = f"{worktrees_folder(call.repo, settings)}/plan-{os.getpid()}"
    told, output = call.store.path(CLI_SETTINGS_FILE), call.store.path("mailbox/plan/output")
    write_object(told, hook_settings(settings))
    env = {
        "FARM_AGENT": cli.launch(settings.permissions).start,
        "FARM_CLI_STATE": ":".join(cli.state),
        "FARM_CLI_PASS": " ".join(cli.passes),
        "FARM_REPO": call.repo,
        "FARM_CONVERSATION": random_uuid(),
        "FARM_CLI_SETTINGS": told,
    }
    tip = show_tip(call.repo, f"refs/heads/{target_of(call)}")
    say(f"the agent is at work; what it says is in {output}")
    try:
        done = run_script(
            "agent/make-plan.sh",
            folder,
            tip.commit,
            stdin=PLAN_PROMPT.format(goal),
            env=env,
            timeout=settings.task_seconds or 86400,
        )
        note_review(call.store, cli.program(), Task(id="plan"), output)
        return printable(done.stdout)
    finally:
        end_gates(folder)
        run_script("merge/gate-slot.sh", "remove", "-C", call.repo, folder, allow=(0, 3, 4))


@verb(
    "plan GOAL [--agent A] [--yes]",
    "have one agent make a list of tasks for a goal; it is shown, and --yes adds it",
    "agent= yes",
    "./farm.py plan 'Port it to Windows' --agent claude",
)
def verb_plan(call: Call) -> int:
    settings, goal = call.settings(), " ".join(call.args).strip()
    if not goal:
        raise UsageError("plan needs a goal", "./farm.py plan 'what to reach'")
    call.store.ensure_folders()
    path = call.store.path("plan.md")
    text = have_plan_made(call, settings, goal)
    write_whole(path, text)
    check_presets(parse_tasks(text, "plan.md"))
    print(text)
    if call.get("yes"):
        return run_verb("add", ["--repo", call.repo, "-f", path])
    say(f"nothing was added yet\n  try: ./farm.py add -f {shell_word(path)}")
    return 0


def draft_revert(call: Call, task: Task, name: str, title: str) -> list[Task]:
    """What takes back a landed task: like others, should its commit not merge; and the task once
    more, after it. Added twice they are one."""
    at = task.landed_commit
    prompt = f"Take back what {at} has brought, and keep all that came after it."
    shared = {"priority": task.priority}
    drafts = [Task(id=name, title=title, parent=task.id, prompt=prompt, source=name, **shared)]
    if call.get("retry"):
        told = find_prompt(task, read_task_events(call.store, task.id))
        prompt = f"{told}\n\nThis was done before, in {at}, and has been taken back."
        shared |= {"paths": task.paths, "after": [name]}
        drafts.append(Task(title=task.title, prompt=prompt, source=f"after {name}", **shared))
    return drafts


@verb(
    "revert ID [--retry]",
    "take back what a task has landed: a revert, gated and landed as any "
    "other work; --retry: the task is tried again after it",
    "retry",
    "./farm.py revert t-0007",
)
def verb_revert(call: Call) -> None:
    state = call.state
    task = state.get_task(call.one("task id"))
    if task.state != "landed":
        raise Refused(f"task {task.id} is {task.state}", f"./farm.py show {task.id}")
    name = f"revert-{task.id}"
    while state.is_done(name):  # it was taken back, and has landed again
        name += ".2"
    with hold_pin(call.store, name):  # two at once: one makes it, the other finds it
        there = call.state.find_task(name)
        # before its pin is moved, which keeps its work; one that a kill has left is made whole
        if there and there.rev > 1:
            raise UsageError(f"there is a task {name} already", f"./farm.py show {name}")
        add_revert(call, task, name)


def add_revert(call: Call, task: Task, name: str) -> None:
    """Make the commit, pin it, and put it into the merge queue; prints the ids of its tasks."""
    title, at = one_line(f"Revert {task.id}: {task.title}", TITLE_LENGTH), task.landed_commit
    begin = task.landed_from or f"{at}^"
    commit = run_script("merge/revert-work.sh", "-C", call.repo, begin, at, title).stdout.strip()
    run_script("merge/pins.sh", "set", "-C", call.repo, f"refs/farm/ready/{name}", commit)
    drafts = draft_revert(call, task, name, title)
    with call.store.transaction() as tx:
        queue = TaskQueue(tx)
        answers = queue.add(drafts, call.settings().max_attempts)
        # a kill before the next line leaves a task like others: an agent makes the revert, or
        # the same verb again
        queue.enqueue(answers[0][0], commit=commit)
    print("\n".join(task.id for task, _ in answers))


# ----------------------------------------------------------------------------------- verbs of hosts
# What a host asks of its hub, and what a person types for it. (tests/rooms/test_hosts.py)


@verb(
    "serve HOST",
    "make the moves of a host's agents, from JSON lines on stdin; door.sh starts it",
    "",
    "farm serve h1",
)
def verb_serve(call: Call) -> None:
    serve_lines(HostMoves(call, call.one("host")), sys.stdin.buffer, sys.stdout.buffer)


@verb(
    "spoke-key HOST [-o FILE]",
    "make a host's key, and print its line for ~/.ssh/authorized_keys",
    "o|output=",
    "./farm.py spoke-key h1 >>~/.ssh/authorized_keys",
)
def verb_spoke_key(call: Call) -> None:
    host, output = checked_name(call.one("host"), "host"), call.get("output", "")
    env = {"FARM_PYTHON": sys.executable}
    made = run_script("hosts/make-key.sh", "-o", output, call.repo, host, env=env)
    print(made.stdout, end="")
    say(made.stderr.strip())


@verb(
    "spoke HUB [-n N] [--name HOST] [--folder DIR]",
    "run agents of another machine's farm here: HUB is HOST:REPO",
    "n|n=# agent= name= folder=",
    "./farm.py spoke hub:/home/me/app -n 10 --name h1",
)
def verb_spoke(call: Call) -> int:
    url, options = call.one("hub, HOST:REPO"), call.options
    host = checked_name(options.pop("name", os.uname().nodename), "host")
    folder = os.path.abspath(options.pop("folder", os.path.expanduser(f"~/farm-hosts/{host}")))
    make_folder(folder)
    guard, should_stop = hold_long(folder + ".lock", f"the spoke {host}"), StopRequest()
    # the same for all spokes that come after each other in this folder
    owner = {"pid": "0", "start": str(os.stat(folder).st_ino), "boot": boot_id()}
    link = Link(url.partition(":")[0], owner)

    def stop(count: int) -> None:
        while should_stop.count < count:
            should_stop.note(0, None)

    try:
        link.ask("renew", claims=[], agents=[])
        farm = open_host_farm(link, url, folder, options)
        carrier = Carrier(farm, link, host, stop)
        if link.mode not in ("stopping", "down"):
            farm.run(should_stop)
        carrier.takes_new = False
        farm.ending().down(farm.settings.grace_seconds, hurry=lambda: should_stop.count > 1)
        carrier.finish(60.0)
    finally:
        link.close()
        guard.close()
    return 128 + should_stop.signal if should_stop.signal else 0


def open_host_farm(link: Link, url: str, folder: str, options: dict) -> Farm:
    """A clone of the hub's repo, and a farm on it with the hub's settings and no merger."""
    target, repo = link.told["target"], f"{folder}/repo"
    identity = "\t".join(link.told["identity"][:2])
    run_carry("clone", "-u", url, "-b", target, "-i", identity, repo, timeout=3600)
    store = Store(repo)
    store.ensure_folders()
    settings = {**link.told["settings"], "into": target}
    store.write_json(FARM_FILE, {"schema": SCHEMA, "settings": settings})
    write_whole(store.path(HUB), url + "\n")
    farm = open_farm(Call("spoke", [], {**options, "repo": repo}))
    farm.merger.tend = lambda now: None  # work lands on the hub only
    farm.remember("running")
    return farm


# --------------------------------------------------------------------------------------------- main
# From argv to a verb and its exit code. (tests/rooms/test_command_line.py)


def describe_farm(leading: list[str]) -> str:
    """Where the farm stands, and three things to type next; outside a repo, how to call this."""
    args, options = parse_options("status", leading)
    try:
        call = Call("status", args, options)
    except NotFound as error:
        return f"{error}\n\n{overview_text()}"
    status = read_status(call)
    states = Counter(agent["state"] for agent in status["agents"])
    agents = count_words(states, sorted(states, key=state_rank_of))
    steps = [(step["try"], step["what"]) for step in status["next"]] + general_steps(status)
    width = max(len(command) for command, _ in steps[:3])
    lines = [f"  {command:<{width}}  # {one_line(what, 100)}" for command, what in steps[:3]]
    head = f"{one_line(os.path.basename(call.repo))}: {agents or 'no agents'}"
    return "\n".join(
        [head, *status_lines(status, 0), "", "next:", *lines, "", "farm.py --help lists all verbs."]
    )


COMPLETION = {
    "bash": """\
# bash: eval "$(./farm.py completion bash)"
_farm() {
  local IFS=$'\\n'
  COMPREPLY=($({farm} completion words "$COMP_CWORD" -- "${COMP_WORDS[@]}" 2>/dev/null))
}
complete -o default -F _farm farm.py farm""",
    "zsh": """\
# zsh: eval "$(./farm.py completion zsh)"
_farm() {
  local -a found
  found=("${(@f)$({farm} completion words $((CURRENT - 1)) -- "${words[@]}" 2>/dev/null)}")
  if [[ -n $found ]]; then compadd -Q -- $found; else _files; fi
}
compdef _farm farm.py farm""",
}


@verb(
    "completion bash|zsh",
    "print what makes your shell complete verbs, options, agents and tasks",
    "",
    'eval "$(./farm.py completion bash)"',
)
def verb_completion(call: Call) -> None:
    if call.args[:1] == ["words"] and len(call.args) > 2 and call.args[1].isdecimal():
        for name in find_completions(call.args[2:], int(call.args[1])):
            print(name)
        return
    if len(call.args) != 1 or call.args[0] not in COMPLETION:
        raise UsageError("completion of which shell?", "./farm.py completion bash")
    farm = f"FARM_PYTHON={shell_word(sys.executable)} {shell_word(f'{SCRIPTS}/farm')}"
    print(COMPLETION[call.args[0]].replace("{farm}", farm))


# No git and no tmux: it is run at each press of the tab key.
def find_completions(words: list[str], current: int) -> list[str]:
    """What the word at `current` of a command line may become. Reads files only; a farm that
    cannot be read has no names."""
    words = (words + [""] * current)[: current + 1]
    pairs = list(zip(words, words[1:], strict=False))
    repo = dict(pairs).get("--repo", "")
    plain = [word for before, word in pairs[:-1] if not word.startswith("-") and before != "--repo"]
    begun, before = words[-1], words[-2] if current else ""
    if not plain or plain[0] not in VERBS:
        found = ["--repo", "--help"] if begun.startswith("-") else list(VERBS)
        found = [] if before == "--repo" else found
    elif begun.startswith("-"):
        options = split_options(f"{VERBS[plain[0]].options} help")
        found = [f"--{name}" if len(name) > 1 else f"-{name}" for _, name, _ in options]
    else:
        found = find_names(plain[0], plain[1:], before, repo)
    return [name for name in found if name.startswith(begun)]


def find_names(verb_name: str, args: list[str], before: str, repo: str) -> list[str]:
    """Names for the next argument of a verb: agents, tasks, or the words of its synopsis."""
    synopsis = VERBS[verb_name].synopsis
    try:
        store = Store(find_repo(os.path.expanduser(repo) or given("FARM_REPO") or os.getcwd()))
        if before in ("--id", "--after") or not args and synopsis.startswith(f"{verb_name} ID"):
            over = () if verb_name in ("show", "diff", "revert") else ("landed",)
            return [task.id for task in store.snapshot().live_tasks() if task.state not in over]
        if not args and " AGENT" in synopsis:
            return sorted(
                {
                    *store.read_loop()["agents"],
                    *(os.path.basename(name)[:-5] for name in store.lock_files()),
                }
            )
    # a word of an error would be typed into the reader's command line
    except (FarmError, OSError):
        return []
    words = {"completion": [*COMPLETION], "rescue": ["list", "show", "restore"]}
    return [] if args else words.get(verb_name, [])


def parse_command_line(argv: list[str]) -> Call | str:
    """The Call that argv asks for, or a help text. Raises UsageError that suggests the near
    verb."""
    leading = []
    while argv and argv[0].startswith("-"):
        if argv[0] in ("-h", "--help"):
            return overview_text()
        take = 2 if argv[0] == "--repo" else 1
        leading, argv = leading + argv[:take], argv[take:]
    if not argv:
        return describe_farm(leading)
    if argv[0] == "help":
        topics, topic = {"settings": settings_text, "clis": clis_text}, "".join(argv[1:2])
        if topic in topics:
            return topics[topic]()
        return help_text(topic) if topic in VERBS else overview_text()
    name = argv[0]
    if name not in VERBS:
        raise UsageError(
            f"there is no verb {name!r}", f"./farm.py {find_near(name, VERBS) or '--help'}"
        )
    args, options = parse_options(name, leading + argv[1:])
    return help_text(name) if options.get("help") else Call(name, args, options)


def main(argv: list[str]) -> int:
    """Run one verb; print what went wrong on stderr, and return the exit code."""
    # two thousand records that wait are no garbage: to search them for some costs a claim some ms
    gc.set_threshold(20_000)
    # before anything starts: all that we run inherits it
    forget_other_repos()
    try:
        # before a repo is looked for: in a sandbox coordination/ can neither be read nor written
        mailbox = given("FARM_MAILBOX")
        name = argv[0] if mailbox and argv else ""
        if name in (*MAILBOX_VERBS, "hook"):
            return ask_by_mailbox(mailbox, argv)
        if name in VERBS and not os.path.isdir(f"{mailbox}/../../{LOCK_FOLDER}"):
            raise Refused(
                f"{name} cannot be called from a sandbox",
                f"these can: farm {', '.join(MAILBOX_VERBS)}",
            )
        CALLED_WITH["repo"] = argv[1] if argv[:1] == ["--repo"] and len(argv) > 1 else ""
        call = parse_command_line(argv)
        if isinstance(call, str):
            print(as_typed(call))
            return 0
        return VERBS[call.name].run(call) or 0
    # `farm.py tasks | head`: Python would complain once more when it flushes at its end, so output
    # goes nowhere from here on
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (FarmError, OSError) as error:
        return print_error(error)
    except KeyboardInterrupt:
        return 130


# Python would first take apart all that it has made, which costs an agent's verb 4 ms of its 30,
# and which the kernel frees anyway.
def leave(code: int) -> None:
    """End this process at once, with what was printed on its way (stderr is by then)."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        pass
    except OSError as error:
        code = print_error(error)
    os._exit(code)


# Titles, paths and what git says are UTF-8 in files and between processes, as they are for git.
def speak_utf8() -> None:
    """Start this process anew where the user's locale has another encoding."""
    spoken = {sys.getfilesystemencoding(), getattr(sys.stdout, "encoding", "utf-8").lower()}
    if spoken == {"utf-8"} or sys.flags.utf8_mode:
        return
    try:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    except UnicodeError:  # of EUC-JP, say, not every byte comes back as it was
        words = f"what was typed is no {sys.getfilesystemencoding()}, the encoding of your locale"
        leave(print_error(UsageError(words, "export LC_ALL=C.UTF-8")))


if __name__ == "__main__":
    speak_utf8()
    leave(main(sys.argv[1:]))
