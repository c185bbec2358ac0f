"""Lines: one JSON object each. Its last entry says which line of which file it is, with a check sum.

The entry is ``FILE-NUMBER-SUM``: eight digits drawn for the file, the number of the line (the header is line 1), and
the CRC-32 of the text before the entry, of FILE and of NUMBER. So SUM shows that a line was changed, NUMBER that a line
is missing or comes twice, and FILE that a line was written for another file.
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
"""Names that tell what a line is, so facts about a run and columns cannot have them."""

_SEPARATOR: Final = f', "{CHECK}": "'
_FORM: Final = re.compile(r"([0-9a-f]{8})-([1-9][0-9]{0,17})(?:/([0-9]{1,18}))?-[0-9a-f]{8}")


class Place(NamedTuple):
    """The file and the number that a line claims to have, and the number of rows in the file, if the line says so."""

    file: str
    number: int
    total: int | None = None

    def seal(self, text: str, start: int = 0) -> str:
        """Returns the place with a check sum over a text and the place; `start` is the check sum of an earlier text."""
        place = f"{self.file}-{self.number}" + ("" if self.total is None else f"/{self.total}")
        return f"{place}-{zlib.crc32(f'{text}|{place}'.encode('utf-8', 'surrogatepass'), start):08x}"


def place_of(seal: str) -> Place | None:
    """Returns the place that a seal names, whether or not its check sum is right."""
    form = _FORM.fullmatch(seal)
    return form and Place(form[1], int(form[2]), None if form[3] is None else int(form[3]))


def sealed_line(value: Mapping[str, Any], place: Place) -> str:
    """Returns a value as a line of JSON with its place, a check sum and a line end."""
    body = json.dumps(_encode(value))[:-1]
    return f'{body}{_SEPARATOR}{place.seal(body)}"}}\n'


def parse(line: str) -> tuple[dict[str, Any] | None, Place | None]:
    """Returns the object in a line, if there is one, and the place of the line if its check sum is right."""
    body, separator, tail = line.rpartition(_SEPARATOR)
    if separator and tail.endswith('"}') and (place := place_of(tail[:-2])) and place.seal(body) == tail[:-2]:
        return _parsed(body + "}"), place
    return _parsed(line), None


def harmless(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns facts about a run in a form that JSON can hold; other values become text, reserved names are dropped."""
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
    except (ValueError, RecursionError):  # not JSON, whole numbers of thousands of digits, brackets without end
        return None
    return value if isinstance(value, dict) else None
