"""Text of summaries: how numbers, intervals, tables and long lines are written."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from smoothdiag.console import counted

WIDTH = 96  # Of a summary, in characters.
RULE, THIN = "=" * WIDTH, "-" * WIDTH
HESSIAN_GRADIENTS = (6, 20)  # Cost of a Hessian norm: 3 to 10 products of two gradients each (docs/measuring.md).


class Words(NamedTuple):
    """How a summary names what differs between the rows of a run and the points of a scan."""

    resampled: str
    confounder: str
    unseen: str


RUN = Words("steps long on average", "time", "later steps")
SCAN = Words(
    "points long on average: whole lines, where random lines of one kind count as one",
    "the distance from the start",
    "lines left out",
)


def number(value: float) -> str:
    """A number with four digits; "undefined" for NaN."""
    return "undefined" if math.isnan(value) else f"{value:.4g}"


def fixed(value: float, digits: int) -> str:
    """A number with a fixed number of digits after the point; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def interval(ends: tuple[float, float], spec: str = ".4g") -> str:
    """An interval in brackets; a dash if an end is NaN."""
    return "-" if math.isnan(ends[0]) or math.isnan(ends[1]) else f"[{ends[0]:{spec}}, {ends[1]:{spec}}]"


def free_exponent(ends: tuple[float, float], level: float) -> str:
    """The interval of the exponent of the power model; "undefined" for NaN."""
    if math.isnan(ends[0]):
        return "undefined"
    return f"{ends[0]:.2f} to {ends[1]:.2f} ({level:.0%} interval) for a free power of the gradient norm"


def cost(row_cost: tuple[float, float]) -> str:
    """What a row took, from its median gradients and median seconds; either may be NaN."""
    units = zip(row_cost, ("gradients", "s"), strict=True)
    return ", ".join(f"{value:.3g} {unit}" for value, unit in units if value > 0) or "not recorded"


def hessian_cost(row_cost: tuple[float, float]) -> str:
    """The measurements that test a law on the largest curvature, with their cost."""
    least, most = HESSIAN_GRADIENTS
    second = row_cost[1] / row_cost[0]
    time = f", {least * second:.2g} to {most * second:.2g} s," if second > 0 else ""
    return f"HessianNorm rows ({least} to {most} gradients{time} each) or a scan (sd.scan)"


def minutes(time: float) -> str:
    """A time in minutes, or in seconds below two minutes."""
    if 60 * time < 1:
        return "less than a second"
    return f"{time:.0f} minutes" if time >= 2 else counted(round(60 * time), "second")


def wrap(head: str, text: str) -> list[str]:
    """A paragraph that begins with a head; lines after the first are indented."""
    return textwrap.wrap(f"{head}: {text}", WIDTH, subsequent_indent="    ")


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their entries; the first one is aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
