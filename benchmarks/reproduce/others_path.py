"""Puts the folders of other benchmarks, whose data sets and networks are used here, on the path."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1]
sys.path[1:1] = [str(BENCHMARKS / "autoclip"), str(BENCHMARKS)]
