"""The results of an experiment: one line of JSON for each run that ended, so that no run is made twice."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

Row = dict[str, Any]


class Kept:
    """Rows in a file, each found by its key; a last line that was cut short is left out.

    Args:
        path: The file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = path.read_bytes() if path.exists() else b""
        self._whole = content[: content.rfind(b"\n") + 1]
        self.rows: list[Row] = [json.loads(line) for line in self._whole.splitlines()]
        self._keys = {row["key"] for row in self.rows}

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def add(self, key: str, found: Mapping[str, Any]) -> None:
        """Adds a row and waits until it is on the disk."""
        row = {"key": key, **found}
        line = json.dumps(row).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size > len(self._whole):
            os.truncate(self.path, len(self._whole))
        with self.path.open("ab") as stream:
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
        self._whole += line
        self.rows.append(row)
        self._keys.add(key)

    def frame(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows)
