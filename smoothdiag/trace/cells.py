"""Cells: how a table writes values as text. They read back unchanged, and no spreadsheet runs them as formulas."""

import math
import re
from typing import Any, Final

_FORMULA: Final = ("=", "+", "-", "@", "'", "＝", "＋", "－", "＠")
"""Beginnings of text that spreadsheets take for a formula, and the mark that says that a text is none."""

_ESCAPED: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]|\\\\(?=u[0-9a-f]{4})")
"""Line ends, control characters, half characters, and backslashes that would read as the escape of one."""

_ESCAPE: Final = re.compile(r"\\u([0-9a-f]{4})")


def cell(value: Any) -> str:
    """Returns the text of a value; an empty text for NaN and None."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return float.__repr__(value)
    return escaped(value) if isinstance(value, str) else str(value)


def escaped(text: str) -> str:
    """Returns the text on one line and not as a formula; `plain` undoes this."""
    text = _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return f"'{text}" if text.startswith(_FORMULA) else text


def plain(text: str) -> str:
    """Returns the text that `escaped` was given."""
    text = text[1:] if text.startswith("'") else text
    return _ESCAPE.sub(lambda found: chr(int(found[1], 16)), text) if "\\u" in text else text
