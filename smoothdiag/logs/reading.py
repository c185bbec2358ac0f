"""Reading: gradient norms and losses from the log of a run that nobody measured."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Final

from smoothdiag.logs.assembling import assembled
from smoothdiag.logs.columns import listed
from smoothdiag.logs.documents import LARGEST, add_document, add_folder, is_folder_log, may_be_document
from smoothdiag.logs.lines import LineReader
from smoothdiag.logs.opening import blocks
from smoothdiag.logs.store import Store
from smoothdiag.logs.table import LogTrace
from smoothdiag.logs.tables import TableReader, looks_like_table
from smoothdiag.rows import SmoothdiagWarning, printable

_TABLES: Final = (".csv", ".tsv")
_OBJECTS: Final = (".json", ".jsonl", ".ndjson")

_PURPOSE: Final = {"step": "steps", "grad_norm": "gradient norms", "loss": "losses", "lr": "learning rates"}


class LogReader:
    """Reads a log as it grows: give it lines with `feed`, ask for what they say with `trace`.

    The first two lines decide whether the log is a table or lines of a console or of JSON, unless the name says so.

    Args:
        source: Name of the log, for messages; a suffix of .csv or .tsv makes it a table.
        grad_norm: Column of gradient norms; default: the column with a usual name.
        loss: Column of losses.
        lr: Column of learning rates.
        step: Column of steps.
        run: Name or number of the run, if the log holds several.
    """

    def __init__(
        self,
        source: str | Path = "log",
        *,
        grad_norm: str | None = None,
        loss: str | None = None,
        lr: str | None = None,
        step: str | None = None,
        run: str | None = None,
    ) -> None:
        self.source = Path(source)
        self.store = Store((grad_norm, loss, lr, step))
        self.problems: list[str] = []
        self._asked = {"step": step, "grad_norm": grad_norm, "loss": loss, "lr": lr}
        self._run = run
        self._suffix = Path(self.source.name.lower().removesuffix(".gz")).suffix
        self._reader: TableReader | LineReader | None = TableReader(self.store) if self._suffix in _TABLES else None
        self._waiting: list[str] = []
        self._is_cut = False

    def feed(self, lines: Iterable[str], *, is_cut: bool = False) -> None:
        """Reads further lines; ``is_cut`` says that the last of them has no end, and may be half a line.

        Raises:
            ValueError: If the log is a table with a cell that no log has.
        """
        self._is_cut = is_cut
        lines = iter(lines)
        if self._reader is None:
            for line in lines:
                if line.strip():
                    self._waiting.append(line)
                if len(self._waiting) == 2:
                    break
            else:
                return
            self._begin()
        try:
            self._pass_on(chain(self._waiting, lines))
        except csv.Error as error:
            raise ValueError(f"`{self.source}` should be a table with one line per row. Found: {error}.") from error
        self._waiting = []

    def trace(self) -> LogTrace:
        """Returns what the lines so far say.

        Raises:
            ValueError: As `read_log` does.
        """
        if self._reader is None and self._waiting:
            self._begin()
            self._pass_on(self._waiting)
            self._waiting = []
        problems = [*self.problems]
        if isinstance(self._reader, TableReader):
            self._reader.finish(is_cut=self._is_cut)
            problems += self._reader.problems(is_cut=self._is_cut)
        lines = self._reader if isinstance(self._reader, LineReader) else None
        if lines is not None:
            problems += lines.problems(of_json=self._suffix in _OBJECTS)
        trace = assembled(self.store, self._asked, self._run, str(self.source), problems)
        if lines is not None:
            trace.meta["lines"] = lines.num_lines - lines.num_empty
            trace.meta["lines_without_values"] = lines.num_without
        return trace

    def _begin(self) -> None:
        is_table = self._suffix not in _OBJECTS and len(self._waiting) == 2 and looks_like_table(*self._waiting)
        self._reader = TableReader(self.store) if is_table else LineReader(self.store)

    def _pass_on(self, lines: Iterable[str]) -> None:
        if isinstance(self._reader, LineReader):
            self._reader.feed(lines, is_cut=self._is_cut)
        elif self._reader is not None:
            self._reader.feed(lines)


def read_log(
    path: str | Path,
    *,
    grad_norm: str | None = None,
    loss: str | None = None,
    lr: str | None = None,
    step: str | None = None,
    run: str | None = None,
) -> LogTrace:
    r"""Reads the log of an earlier run as a trace; its smoothness is NaN, because nobody measured it.

    These logs can be read, all but the folders also compressed (``.gz``):

    * text of a console, as nanoGPT, the Trainer of Hugging Face, Megatron-LM, DeepSpeed, torchtitan, mmengine, fairseq,
      NeMo, Lightning and many others print it, under any name;
    * tables, such as Lightning's ``metrics.csv``, timm's ``summary.csv`` or an export of Weights & Biases or MLflow;
    * JSON lines, under any name, and ``.json`` with a list of objects, with columns, or Hugging Face's
      ``trainer_state.json``;
    * folders of TensorBoard, and of MLflow.

    Nested names are joined, as in ``train/loss``. Entries of one step become one row. Rows of validation are left out.
    A counter that starts anew in every epoch is unrolled, and a warning says so. If a run was resumed, rows of steps
    that it took again no longer count. A gradient norm of -1 is read as NaN, because DeepSpeed writes -1 for NaN.

    Args:
        path: The log.
        grad_norm: Column of gradient norms; default: the column with a usual name. If there is none, only losses are
            read, and a warning says so.
        loss: Column of losses; default: the column with a usual name, if there is one.
        lr: Column of learning rates; default: the column with a usual name, if there is one.
        step: Column of step numbers; default: the column with a usual name. If there is none, entries are counted.
        run: Name of the run to read, if the log holds several; their number, from 1, if they have no names.

    Returns:
        A trace with one row for each step that has a gradient norm or a loss. The estimator is ``log``; the status is
        ``not_measured``, or ``non_finite`` if a logged value is inf or NaN. Fits refuse such rows.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If the log needs TensorBoard, which is not installed.
        ValueError: If the file is no such log, if no column or several columns may be meant (the message lists the
            columns), if it holds several runs, or if gradient norms are negative.

    Units: grad_norm [f/x], as logged, before or after clipping; ``meta["notes"]`` says what is not known of them.

    Examples:
        >>> import pathlib
        >>> text = "loading data\nstep 10 | loss: 2.5 | grad norm: 0.5\nstep 20 | loss: 2.25 | grad norm: 2.0\n"
        >>> _ = pathlib.Path("train.log").write_text(text)
        >>> trace = sd.read_log("train.log")
        >>> [(row["step"], row["grad_norm"], row["loss"], row["status"]) for row in trace]
        [(10, 0.5, 2.5, 'not_measured'), (20, 2.0, 2.25, 'not_measured')]
    """
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"There is no log at `{source}`.")
    reader = LogReader(source, grad_norm=grad_norm, loss=loss, lr=lr, step=step, run=run)
    if is_folder_log(source):
        add_folder(source, reader.store)
    else:
        _read_file(source, reader)
    trace = reader.trace()
    if trace.problems:
        warnings.warn(f"{source}: {printable('; '.join(trace.problems))}", SmoothdiagWarning, stacklevel=2)
    return trace


def _read_file(source: Path, reader: LogReader) -> None:
    text = blocks(source, reader.problems)
    first = next(text, "")
    kept = [first]
    if may_be_document(first):
        size = len(first)
        for block in text:
            kept.append(block)
            size += len(block)
            if size > LARGEST:
                raise ValueError(
                    f"`{source}` should be a JSON document of at most {LARGEST >> 20} million characters. Found more; "
                    "write it as JSON lines, with one entry in each."
                )
        if add_document("".join(kept), reader.store, reader.problems):
            return
    for block in chain(kept, text):
        lines = block.split("\n")
        is_cut = bool(lines[-1])
        reader.feed(lines if is_cut else lines[:-1], is_cut=is_cut)


def describe_columns(trace: LogTrace) -> str:
    """Returns in words which columns `read_log` took, and which other columns could be named."""
    chosen = {role: trace.meta[f"{role}_column"] for role in ("grad_norm", "loss", "lr", "step")}
    taken = ", ".join(f"{_PURPOSE[role]} from `{printable(name)}`" for role, name in chosen.items() if name is not None)
    others = [name for name in trace.meta["columns"] if name not in chosen.values()]
    without = [role for role, name in chosen.items() if name is None and role != "lr"]
    lines = [f"{taken}."]
    if "step" in without:
        lines.append("No column has a usual name for steps, so entries are counted instead.")
    if without and others:
        flags = ", ".join(f"--{role.replace('_', '-')} for {_PURPOSE[role]}" for role in without)
        lines.append(f"Other columns can be named ({flags}): {listed(others)}.")
    if trace.meta.get("lines_without_values"):
        lines.append(f"{trace.meta['lines_without_values']} of {trace.meta['lines']} lines hold no value of use.")
    return "\n".join(lines)
