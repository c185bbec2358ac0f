"""What a due step adds on each GPU if a large model is sharded, on paper, from the copies that were measured."""

import math
from collections.abc import Iterable

from overhead.memory import COPIES, OFFLOADED, USUAL
from overhead.table import Row, number

WEIGHTS, RANKS = 7e9, 8
BYTES = {"float32": (4, USUAL), "bfloat16": (2, f"{USUAL}, bfloat16")}
"""Bytes of a weight, and the case whose copies were measured, by the dtype of the parameters."""


def gibibytes(copies: float, width: int) -> float:
    """Returns GiB for each GPU: every copy is sharded as the parameters are."""
    return copies * WEIGHTS * width / RANKS / 2**30


def seven_billion(rows: Iterable[Row]) -> str:
    """Returns the table of 7 billion weights on 8 GPUs."""
    figures = {row.what: row.figure for row in rows}
    head = ["parameters", "one copy, GiB", "copies", "GiB of a due step", "copies with `offload`", "GiB of a due step"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for dtype, (width, case) in BYTES.items():
        found = [figures.get(what.format(case), math.nan) for what in (COPIES, OFFLOADED)]
        cells = [f"{number(c) or 'not measured'} | {number(gibibytes(c, width)) or 'not measured'}" for c in found]
        lines.append(f"| {dtype} | {number(gibibytes(1, width))} | {' | '.join(cells)} |")
    return "\n".join(lines)
