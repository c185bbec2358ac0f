"""What a notebook shows of an object: its first two lines, and the rest folded. No colours, so any theme fits."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from smoothdiag.rows import printable

if TYPE_CHECKING:
    import pandas as pd

MOST_ROWS = 20
"""Rows of a table that a notebook shows, the last ones."""


def as_html(text: str, *tables: pd.DataFrame) -> str:
    """Returns a text and tables as HTML for a notebook; nothing in them can act as HTML.

    Args:
        text: Its first line is shown bold, its second line plain, and the others are folded.
        tables: Shown below the text, folded; of long ones the last rows.
    """
    head, *rest = [printable(line) for line in text.split("\n")]
    said = f"<div><b>{escape(head)}</b>"
    if rest:
        said += f"<br>{escape(rest[0])}"
    folded = f"<pre style='white-space: pre-wrap'>{escape(chr(10).join(rest[1:]))}</pre>" if rest[1:] else ""
    for table in tables:
        shown = table.tail(MOST_ROWS)
        if len(shown) < len(table):
            folded += f"<p>the last {len(shown)} of {len(table)} rows</p>"
        shown = shown.map(_printed).rename(index=_printed, columns=_printed)
        folded += shown.to_html(escape=True, border=0, na_rep="")
    return said + (f"<details><summary>more</summary>{folded}</details>" if folded else "") + "</div>"


def _printed(value: object) -> object:
    """Returns a text without characters that a terminal would obey, and anything else as it is."""
    return printable(value) if isinstance(value, str) else value
