"""Puts the folder of the benchmark of AutoClip, whose networks and data are used here, on the path."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1] / "autoclip"))
