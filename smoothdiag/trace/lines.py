"""Lines: one JSON object each, whose last entry says which line of which file it is, with a check sum.

The entry is ``FILE-NUMBER-SUM``: eight digits drawn for the file, the number of the line (the header is line 1), and
the CRC-32 of all that stands before it, of FILE and of NUMBER. So a changed line is known by its sum, and one that is
missing, comes twice, or was written for another file by its number and its FILE.
"""

import json
import math
import re
import zlib
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from smoothdiag.rows import CHECK

FORMAT_VERSION: Final = 2
HEADER: Final = "smoothdiag_trace"
RESUMED: Final = "smoothdiag_resumed_at"
COUNT: Final = "smoothdiag_rows"
RESERVED: Final = frozenset({HEADER, RESUMED, COUNT, CHECK})
"""Names that facts about a run and columns cannot have, since lines say by them what they are."""

_SEPARATOR: Final = f', "{CHECK}": "'
_FORM: Final = re.compile(r"([0-9a-f]{8})-([1-9][0-9]{0,17})(?:/([0-9]{1,18}))?-[0-9a-f]{8}")


class Place(NamedTuple):
    """Which line of which file a line is, as it says itself, and how many rows the file has, if it says that."""

    file: str
    number: int
    total: int | None = None

    def seal(self, text: str, start: int = 0) -> str:
        """Returns the place with the check sum of itself and of a text; `start` is that of what comes before."""
        place = f"{self.file}-{self.number}" + ("" if self.total is None else f"/{self.total}")
        return f"{place}-{zlib.crc32(f'{text}|{place}'.encode('utf-8', 'surrogatepass'), start):08x}"


def place_of(seal: str) -> Place | None:
    """Returns the place that a seal names, whether or not its check sum is right."""
    form = _FORM.fullmatch(seal)
    return form and Place(form[1], int(form[2]), None if form[3] is None else int(form[3]))


def sealed_line(value: Mapping[str, Any], place: Place) -> str:
    """Returns the line of JSON, with its end, that says its place and carries a check sum."""
    body = json.dumps(_encode(value))[:-1]
    return f'{body}{_SEPARATOR}{place.seal(body)}"}}\n'


def parse(line: str) -> tuple[dict[str, Any] | None, Place | None]:
    """Returns the object that a line holds, if it holds one, and its place where a check sum vouches for both."""
    body, separator, tail = line.rpartition(_SEPARATOR)
    if separator and tail.endswith('"}') and (place := place_of(tail[:-2])) and place.seal(body) == tail[:-2]:
        return _parsed(body + "}"), place
    return _parsed(line), None


def harmless(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns facts about a run as JSON can hold them: what it cannot hold as text, and without reserved names."""
    return {str(name): _as_json(value) for name, value in meta.items() if name not in RESERVED}


def is_json(value: Any) -> bool:
    """Whether JSON can hold a value."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _as_json(value: Any) -> Any:
    if not is_json(value):
        try:
            return str(value)
        except RecursionError:
            return f"a value of {type(value).__name__}"
    return _finite(value)


def _finite(value: Any) -> Any:
    # JSON has no NaN and no infinity; as strings they survive every reader, and float() takes them back.
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _encode(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, whole numbers of thousands of digits, brackets without end
        return None
    return value if isinstance(value, dict) else None
