"""Opening: the text of a log in blocks of whole lines, whatever it was packed in, and never more than memory holds."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, cast

from smoothdiag.console import counted

BLOCK: Final = 1 << 20
"""Characters that are read at once."""

LONGEST_LINE: Final = 1 << 24
"""Most characters of a line; a line of metrics has hundreds, and a table in a single line of JSON a few million."""

BOMB_SIZE: Final = 1 << 26
BOMB_RATIO: Final = 100
"""A gzip file is refused if it unpacks to more than both; logs unpack to 5 to 50 times their size."""

_NO_TEXT: Final = {
    b"PAR1": "a Parquet table; write it as CSV with pandas",
    b"PK\x03\x04": "a zip archive, such as a checkpoint of PyTorch; unpack it, if it holds a log",
    b"\x28\xb5\x2f\xfd": "a file packed by zstd; unpack it",
    b"BZh": "a file packed by bzip2; unpack it",
    b"\xfd7zXZ": "a file packed by xz; unpack it",
    b":W&B": "the binary record of a run of Weights & Biases; export the run as CSV instead",
    b"SQLite format 3": "a database, as MLflow and trackio keep; export its metrics as CSV instead",
    b"\x93NUMPY": "an array of NumPy; write it as CSV",
    b"\x80\x02": "a pickle; write its metrics as CSV",
    b"\x80\x04": "a pickle; write its metrics as CSV",
    b"%PDF": "a PDF",
    b"\x89PNG": "an image",
    b"\x89HDF": "an HDF5 file; write its metrics as CSV",
}

_UNPRINTABLE: Final = re.compile("[\x01-\x06\x0e-\x1a\x1c-\x1f]")
MOST_UNPRINTABLE: Final = 0.02
"""Share of characters that no text has, beyond which a file is none."""


def blocks(source: Path, problems: list[str]) -> Iterator[str]:
    r"""Yields the text of a file in blocks of whole lines with "\n" at the ends of lines.

    Bytes that cannot be decoded become marks, so that they do not hide the rest. Zero bytes, which a crash leaves in a
    file, are left out.

    Raises:
        ValueError: If the file is no text, is a bomb, or has a line without end.
    """
    with source.open("rb") as file:
        yield from text_blocks(file, source, problems)


def text_blocks(file: BinaryIO, source: Path, problems: list[str]) -> Iterator[str]:
    """Yields the text of an open file, as `blocks` does."""
    start = file.read(16)
    file.seek(0)
    for mark, what in _NO_TEXT.items():
        if start.startswith(mark):
            raise ValueError(f"`{source}` should be a log as text. Found {what}.")
    is_packed = source.name.lower().endswith(".gz") or start.startswith(b"\x1f\x8b")
    packed = gzip.GzipFile(fileobj=file) if is_packed else None
    raw = cast(BinaryIO, packed or file)
    try:
        if packed is not None:
            _check_size(packed, source)
        yield from _decoded(raw, source, problems)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"`{source}` should be a complete gzip file. Found: {error}") from error


def _check_size(packed: gzip.GzipFile, source: Path) -> None:
    """Unpacks a file once without reading it, which takes seconds, because to read a bomb takes hours."""
    size = source.stat().st_size
    limit = max(BOMB_SIZE, BOMB_RATIO * size)
    unpacked = 0
    while piece := packed.read(BLOCK):
        unpacked += len(piece)
        if unpacked > limit:
            raise ValueError(
                f"`{source}` should unpack to at most {BOMB_RATIO} times its size, as logs do. Found more than "
                f"{limit >> 20} MB in {counted(size, 'byte')}, as in a bomb; if it is none, unpack it first."
            )
    packed.seek(0)


def _decoded(raw: BinaryIO, source: Path, problems: list[str]) -> Iterator[str]:
    start = raw.read(4)
    raw.seek(0)
    has_utf16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = io.TextIOWrapper(raw, encoding="utf-16" if has_utf16 else "utf-8-sig", errors="replace")
    rest: list[str] = []
    length, zeros, is_first = 0, 0, True
    while block := text.read(BLOCK):
        if is_first:
            _check_text(block, source)
            is_first = False
        if "\0" in block:
            zeros += block.count("\0")
            block = block.replace("\0", "")
        cut = block.rfind("\n") + 1
        if cut:
            yield "".join((*rest, block[:cut]))
            rest, length = [], 0
        rest.append(block[cut:])
        length += len(rest[-1])
        if length > LONGEST_LINE:
            raise ValueError(
                f"`{source}` should have lines of at most {LONGEST_LINE >> 20} million characters. Found a longer one."
            )
    if any(rest):
        yield "".join(rest)
    if zeros:
        problems.append(f"{counted(zeros, 'zero byte is', 'zero bytes are')} left out, as a crash leaves in a file")
    text.detach()


def _check_text(block: str, source: Path) -> None:
    if "\0" in block[:2]:
        raise ValueError(f"`{source}` should be text in UTF-8. Found zero bytes at its start, as in other encodings.")
    start = block[:4096]
    if len(_UNPRINTABLE.findall(start)) > MOST_UNPRINTABLE * len(start):
        raise ValueError(f"`{source}` should be a log as text. Found bytes that are no text.")
