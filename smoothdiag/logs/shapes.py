"""Shapes: the names and numbers in a line of a console, whoever printed it."""

from __future__ import annotations

import json
import re
from typing import Any, Final, NamedTuple

from smoothdiag.logs.names import IS_VALIDATION, role_of, spoken

LONGEST: Final = 8192
"""Characters of a console line that are looked at; lines with metrics are shorter."""

COUNTER: Final = "N/M"
"""Name of the column of counters without a name, such as [10/1000]."""

_NUMBER: Final = r"[-+]?(?:\d+(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_NOT_FINITE: Final = r"[-+]?(?:nan|inf(?:inity)?)(?![A-Za-z])"

PAIR: Final = re.compile(
    r"(?<![\w./])(?P<name>(?!(?:nan|inf)\b)[A-Za-z_](?>[\w./#%*()@-]*)"
    r"(?>(?:[ ](?!(?:nan|inf)\b)[A-Za-z(](?>[\w./#%*()@-]*)){0,7}))"
    r"['\"]?(?:\s*[:=|]\s*|\s+)['\"\[(]*(?:(?:tensor|[aA]rray|np\.float\d*|float)\()?"
    rf"(?P<value>{_NUMBER}|{_NOT_FINITE})(?P<comma>,\d+)?(?P<unit>[A-Za-z]*)(?:\s*/\s*(?P<total>\d+))?",
    re.IGNORECASE,
)
"""Finds a name and the number behind it: `lm loss: 2.5E+00`, `loss 2.5`, `"loss": "2.5"`, `loss=tensor(2.5`."""

RUNNING: Final = "N/M of an epoch"
"""Name of the column of counters beside means over the epoch so far, as Keras prints them."""

# Counters without a name: with the trainers that write them so.
COUNTERS: Final = (
    re.compile(r"\[\s*(\d+)\s*/\s*(\d+)(?=[\s\](])"),  # mmengine, timm, Swin, torch examples: [  10/1000]
    re.compile(r"(?<![\d/.])(\d+)/(\d+)\s*\[\d+:"),  # tqdm: 10/1000 [00:01<02:00
    re.compile(r"epoch\s+\d+\s*[:|]\s*(\d+)\s*/\s*(\d+)", re.IGNORECASE),  # fairseq: epoch 001:    10 / 1000
    re.compile(r"^\s*(\d+)/(\d+)\s"),  # Keras: 10/1000 [====>...
    re.compile(r"[━╸╺]\s+(\d+)/(\d+)\s"),  # Lightning with rich: ━━━━ 10/1000
)
_KERAS: Final = re.compile(r"^\s*(\d+)/(\d+)\s+(?:\[[=>.]+\]|━)")  # 10/1000 [====>...] or 10/1000 ━━━━
EPOCH_OF: Final = re.compile(r"\[\s*(\d+)\s*/\s*\d+\s*\]\s*\[\s*\d+\s*/")  # Swin: [0/300][10/1251]
RANK: Final = re.compile(r"(?<![a-z])rank\s*[:=_]?\s*(\d+)|\[default(\d+)\]|^\s*(\d+):\s+(?=\S)", re.IGNORECASE)
SUMMARY: Final = re.compile(r"\|\s*train\s*\|")  # fairseq: means over the epoch, beside lines of train_inner

_EMPTY: Final = re.compile(r"\w+\s*[:=]\s*(?:n/?a|none|null|-+)(?!\w)", re.IGNORECASE)  # litgpt: val: n/a

_SCALES: Final = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}


class Value(NamedTuple):
    """A number of a line, its name, and its place in the line; NaN stands for what cannot be read."""

    name: str
    text: str
    unit: str
    total: int
    start: int
    end: int
    is_readable: bool


class Line(NamedTuple):
    """What a line says.

    Attributes:
        values: Numbers with a name.
        kind: As that of a `Context`.
        rank: As that of a `Context`.
        is_continuation: As that of a `Context`.
        fixed: Places of numbers that say what the line belongs to.
    """

    values: list[Value]
    kind: str
    rank: int
    is_continuation: bool
    fixed: tuple[tuple[int, int], ...]


def number(text: str, unit: str = "") -> float:
    """Returns a number as logs print it; K, M, G, B and T are thousands, millions, and so on."""
    plain_text = text.replace(",", "") if "," in text else text
    return float(plain_text) * _SCALES[unit] if unit in _SCALES else float(plain_text)


def json_of(line: str) -> dict[str, Any] | None:
    """Returns the JSON object that a line holds, also behind a prefix; None if there is none."""
    start = line.find('{"')
    if start < 0:
        start = line.find("{ ")
    if start < 0:
        return None
    try:
        found = json.loads(line[start : line.rindex("}") + 1])
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_line(line: str) -> Line:
    """Returns the names and numbers of a line."""
    line = line[:LONGEST]
    values, outside, end, is_validation, has_step = [], [], 0, False, False
    for match in PAIR.finditer(line):
        name, says_validation = spoken(match["name"])
        is_validation = is_validation or says_validation
        outside.append(line[end : match.start()])
        end = match.end()
        unit, total = match["unit"], match["total"]
        role = role_of(name)
        has_step = has_step or role == "step"
        is_clear = role in ("step", "epoch") or not _has_unclear_comma(match["value"], match["comma"])
        values.append(
            Value(name, match["value"], unit, int(total or 0), match.start("value"), match.end("value"), is_clear)
        )
    outside.append(line[end:])
    rest = _EMPTY.sub("", " ".join(outside))
    if not has_step:
        values += _counter(line)
    if (found := EPOCH_OF.search(line)) and not any(role_of(value.name) == "epoch" for value in values):
        values.append(Value("epoch", found[1], "", 0, found.start(1), found.end(1), True))
    rank = RANK.search(line)
    kind = "validation" if is_validation or IS_VALIDATION.search(rest) or _begins(line) else "train"
    if kind == "train" and SUMMARY.search(line):
        kind = "summary"
    return Line(
        values,
        kind,
        int(rank[rank.lastindex or 1]) if rank else -1,
        line[:1] in " \t" and not any(role_of(value.name) == "step" for value in values),
        ((rank.start(), rank.end()),) if rank else (),
    )


def _counter(line: str) -> list[Value]:
    if (found := _KERAS.match(line)) is not None:
        return [Value(RUNNING, found[1], "", int(found[2]), found.start(1), found.end(1), True)]
    for shape in COUNTERS:
        every = [*shape.finditer(line)]
        if every:
            last = every[-1]  # the first may count epochs: [0/300][10/1251]
            return [Value(COUNTER, last[1], "", int(last[2]), last.start(1), last.end(1), True)]
    return []


def _has_unclear_comma(value: str, behind: str | None) -> bool:
    """Whether a comma may be that of a fraction: 0,45, or 1,234 without a point."""
    is_plain = "." not in value and "e" not in value.lower()
    return is_plain and ("," in value or behind is not None)


def _begins(line: str) -> bool:
    """Whether a line begins with a word for validation: "Validation DataLoader 0: 100%"."""
    return bool(IS_VALIDATION.match(line.lstrip("[ \t")))
