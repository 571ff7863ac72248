"""Where things are. Imported first by the programs of this folder, which are started alone, so that they find all the others."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"

sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests/helpers"), str(ROOT / "tests/stand_ins")) if path not in sys.path]
