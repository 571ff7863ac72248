"""The script of a prompt, and the model that follows it: what a stand-in for a model's API answers next."""

from __future__ import annotations

import os
import re
import shlex
import threading
import time

WORDS = "WRITE|APPEND|RUN|COMMIT|READ|ASK|TOOL|SLEEP|ERROR|LIMIT|DROP|SAY|NOCOMMIT|SUBMIT|FAIL|GATHER|AWAIT"
DIRECTIVE = re.compile(rf"^[\s>*\"-]*(?:(FIRST|AGAIN)\s+)?({WORDS})(?:\s+(.*?))?\"?\s*$")
ATTEMPT = re.compile(r"\battempt (\d+)\b")
TOLD = re.compile(r"farm (submit|fail) \S+ --fence [\w.-]*\w(?: --why \"[^\"]*\")?")
REMINDER = re.compile(r"<system-reminder>.*?</system-reminder>", re.DOTALL)


def parts_of(content) -> list[dict]:
    """A message's content as a list of blocks; it may be one string."""
    return (
        [{"type": "text", "text": content}]
        if isinstance(content, str)
        else [part for part in content or [] if isinstance(part, dict)]
    )


def text_of(content) -> str:
    return REMINDER.sub("", "\n".join(part.get("text") or "" for part in parts_of(content))).strip()


def has_directive(text: str) -> bool:
    return any(DIRECTIVE.match(line) for line in text.splitlines())


def find_turn(items: list[tuple[str, str, int]]) -> tuple[str, int]:
    """(the prompt in force, how many tool results came after it) of [(role, text, tool results)].

    A prompt is in force until a later human text has a directive of its own: a CLI's own reminders have none.
    """
    prompt, done = "", 0
    for role, text, results in items:
        done += results
        if role == "user" and text and (not prompt or has_directive(text) or (not results and not has_directive(prompt))):
            prompt, done = text, 0
    return prompt, done


def number(text: str, default: float = 0.0) -> float:
    try:
        return float(text)
    except ValueError:
        return default


def parse_script(prompt: str) -> tuple[list[tuple[str, str, float]], dict]:
    """([(tool word, argument, seconds to think before)], how the turn ends) of a prompt."""
    steps, end, think = [], {"say": [], "errors": [], "limit": None, "drop": False}, 0.0
    words = set()
    attempt = ATTEMPT.search(prompt)
    skipped = "AGAIN" if attempt is None or attempt[1] == "1" else "FIRST"
    for match in filter(None, map(DIRECTIVE.match, prompt.splitlines())):
        word, argument = match[2], (match[3] or "").strip()
        if match[1] == skipped:
            continue
        if word in ("WRITE", "APPEND") and "::" not in argument:
            continue
        words.add(word)
        if word == "SLEEP":
            think += number(argument)
        elif word == "ERROR":
            status, times, message = [*argument.split("::", 2), "", ""][:3]
            end["errors"].append((int(number(status, 500)), int(number(times, 1)), message or "scripted error"))
        elif word == "LIMIT":
            end["limit"] = argument
        elif word == "DROP":
            end["drop"] = True
        elif word == "SAY":
            end["say"].append(argument)
        elif word != "NOCOMMIT":
            steps.append((word, argument, think))
            think = 0.0
    if words & {"WRITE", "APPEND"} and not words & {"COMMIT", "NOCOMMIT"}:
        at = next((index for index, step in enumerate(steps) if step[0] in ("SUBMIT", "FAIL")), len(steps))
        steps.insert(at, ("COMMIT", first_line(prompt), 0.0))
    end["think"] = think
    return steps, end


def first_line(prompt: str) -> str:
    lines = re.sub(r"<(\w+)>.*?</\1>", "", prompt, flags=re.DOTALL).strip().splitlines()
    return (lines or ["work"])[0].strip('#" ')[:50] or "work"


def shell_line(word: str, argument: str) -> str:
    path, _, text = argument.partition("::")
    folder = shlex.quote(os.path.dirname(path.strip()) or ".")  # by name: Gemini's shell takes no $(...)
    path, text = shlex.quote(path.strip()), shlex.quote(text.replace("\\n", "\n"))
    return {
        "WRITE": f"mkdir -p {folder} && printf %s {text} >{path}",
        "APPEND": f"printf '%s\\n' {text} >>{path}",
        "COMMIT": f"git add -A && git commit -q -m {shlex.quote(argument or 'work')} && git log --oneline -1",
        "READ": f"cat {path}",
    }.get(word, argument)


class Model:
    """Makes replies. Its only memory: how often a prompt's errors were given, and when its usage limit ends."""

    def __init__(self) -> None:
        self.lock, self.given = threading.Lock(), {}
        self.limited, self.limited_until = set(), 0.0
        self.gathered, self.gathering = set(), threading.Condition()

    def refusal(self, end: dict, key: str) -> tuple[int, str, float] | None:
        """(HTTP status, message, unix time of the reset or 0) when this request is to be refused."""
        with self.lock:
            for index, (status, times, message) in enumerate(end["errors"]):
                count = self.given.get((key, index), 0)
                if count < times:
                    self.given[key, index] = count + 1
                    return status, message, 0
            self.begin_limit(end["limit"], key)
            if time.time() < self.limited_until:
                return 429, "This request would exceed your account's rate limit. Please try again later.", self.limited_until
        return None

    def begin_limit(self, limit: str | None, key: str) -> None:
        if limit is None or key in self.limited:
            return
        self.limited.add(key)
        now = time.time()
        self.limited_until = now // 60 * 60 + 60 if limit == "minute" else int(now + number(limit, 10))
        with self.gathering:
            self.gathering.notify_all()

    def gather(self, word: str, count: int, key: str) -> None:
        """Wait until `count` conversations have come here, or for a limit."""
        with self.gathering:
            self.gathered.add(key)
            self.gathering.notify_all()
            self.gathering.wait_for(lambda: self.limited if word == "AWAIT" else len(self.gathered) >= count, timeout=90)

    def drops(self, end: dict, key: str) -> bool:
        with self.lock:
            first = end["drop"] and not self.given.get((key, "drop"))
            self.given[key, "drop"] = 1
            return first

    def reply(self, items: list[tuple[str, str, int]], session: str) -> dict:
        """What to do next: {refusal, word, argument, text, drop}; without a word it is the turn's last text."""
        prompt, done = find_turn(items)
        steps, end = parse_script(prompt)
        key = session + "\n".join(filter(DIRECTIVE.match, prompt.splitlines()))
        refusal = self.refusal(end, key)
        if refusal:
            return {"refusal": refusal, "word": "", "argument": "", "text": "", "drop": False, "prompt": prompt}
        word, argument, think = steps[done] if done < len(steps) else ("", "", end["think"])
        if word in ("GATHER", "AWAIT"):
            self.gather(word, int(number(argument, 1)), key)
            word, argument = "RUN", "true"
        time.sleep(min(think, 300))
        if word in ("SUBMIT", "FAIL"):
            told = [match[0] for _, text, _ in items for match in TOLD.finditer(text) if match[1] == word.lower()]
            line = re.sub(r'--why ".*"', f'--why "{argument}"', told[-1]) if told else f"farm {word.lower()} was never told"
            word, argument = "RUN", line
        text = "\n".join(end["say"]) or (f"Done: {len(steps)} step(s)." if steps else "OK: " + prompt[:80])
        return {"refusal": None, "word": word, "argument": argument, "text": text, "drop": self.drops(end, key), "prompt": prompt}
