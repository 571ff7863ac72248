"""Make the README's pictures anew, from a real farm of scripted agents: tests/pictures/status.txt and report.png.

    python tests/campaigns/pictures.py

The text is what `farm.py status` writes on a terminal of 100 columns; the page is photographed by a headless Chromium
(apt install chromium). Takes half a minute. Exit 1 when there is no Chromium.
"""
from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from demo import make_repo
from paths import ROOT

FOLDER = ROOT / "tests" / "pictures"
WIDTH, HEIGHT = 1000, 520
TASKS = ["Add a function reverse", "Add a function count", "Say many words", "Say short words", "Add a function title",
         "Change shout", "Add a function strip", "Drop the old table", "Add a function first", "Look around",
         "Add a function last", "Add a function swap", "Add a function lower", "Document every function", "Measure all of it"]
# What an agent does by its task: most write a file, two edit the same line, one breaks the gate once, one gives up, one asks a
# person, two go on for ever.
AGENT = r"""
commit() { git add -A && git commit -q -m "$FARM_TITLE"; }
ask() { printf '{"hook_event_name":"PermissionRequest","tool_name":"Bash","tool_input":{"command":"%s"}}' "$1" | farm hook; }
sleep "$((1 + 10#${FARM_TASK#t-} % 4))"
case $FARM_TITLE in
  Say*) git merge -q "$FARM_TARGET" 2>/dev/null || git reset -q --hard "$FARM_TARGET"
    sed "s/^words:.*/words: $FARM_TITLE/" README.md >x; mv x README.md; commit ;;
  Change*) if [ "$FARM_ATTEMPT" -gt 1 ]; then git rm -q broken; else touch broken; fi; commit ;;
  Look*) echo 'there is nothing to do here'; exit 1 ;;
  Drop*) seq 12 >drop.sql; git add drop.sql; ask 'psql -f drop.sql'; sleep 600 ;;
  Document*) seq 240 >doc.md; commit; seq 77 >>doc.md; sleep 600 ;;
  Measure*) seq 31 >measure.py; git add measure.py; sleep 600 ;;
  *) seq "$((20 + ${#FARM_TITLE}))" >"${FARM_TITLE##* }.py"; commit ;;
esac"""
GATE = "sleep 1.5; test ! -e broken"


def farm(repo: Path, *args: str, **options) -> str:
    return subprocess.run([sys.executable, str(ROOT / "farm.py"), "--repo", str(repo), *args], text=True, check=False,
                          stdout=subprocess.PIPE, **options).stdout


def on_a_terminal(repo: Path, *args: str) -> str:
    """What farm.py writes on a terminal of 100 columns."""
    master, slave = pty.openpty()
    with subprocess.Popen([sys.executable, str(ROOT / "farm.py"), "--repo", str(repo), *args], stdin=slave, stdout=slave,
                          env={**os.environ, "COLUMNS": "100"}) as process:
        os.close(slave)
        text = b""
        try:
            while part := os.read(master, 65536):
                text += part
        except OSError:
            pass
    os.close(master)
    assert process.returncode == 0, text
    return text.decode().replace("\r\n", "\n")


def states(repo: Path) -> dict[str, str]:
    return {task["title"]: task["state"] for task in json.loads(farm(repo, "tasks", "--json"))}


def wait_until_interesting(repo: Path, seconds: float = 120) -> None:
    """Until all but the three that go on are over."""
    deadline = time.monotonic() + seconds
    while sum(state in ("landed", "failed") for state in states(repo).values()) < len(TASKS) - 3:
        if time.monotonic() > deadline:
            raise SystemExit(f"this takes too long: {states(repo)}")
        time.sleep(0.2)
    time.sleep(3)


def photograph(page: Path, picture: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise SystemExit("there is no Chromium here (apt install chromium)")
    subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
                    f"--user-data-dir={page.parent / 'browser'}", f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={picture}",
                    page.as_uri()], check=True, capture_output=True, timeout=120)


def main() -> int:
    folder = Path(tempfile.mkdtemp(prefix="farm-pictures-"))
    for name in [name for name in os.environ if name.startswith(("FARM_", "TMUX"))]:
        del os.environ[name]
    os.environ.update(TMUX_TMPDIR=str(folder), TZ="UTC", TERM="xterm")
    repo = folder / "textkit"
    try:
        make_repo(repo)
        farm(repo, "add", "-f", "-", input="\n".join(f"- [ ] {title}" for title in TASKS))
        farm(repo, "up", "-n", "5", "--agent", AGENT, "--gate", GATE, env={**os.environ, "FARM_MAX_ATTEMPTS": "2"})
        wait_until_interesting(repo)
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / "status.txt").write_text(on_a_terminal(repo, "status"))
        photograph(Path(farm(repo, "report").strip()), FOLDER / "report.png")
    finally:
        farm(repo, "estop")
        shutil.rmtree(folder, ignore_errors=True)
    print((FOLDER / "status.txt").read_text() + f"{FOLDER / 'report.png'}: {(FOLDER / 'report.png').stat().st_size // 1024} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
