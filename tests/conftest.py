"""``toy_run`` (tests/faults) makes the smallest run there is; any test may import it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "faults"))
