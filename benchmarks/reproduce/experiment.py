"""What the scripts of this folder share: the command line, runs that are resumed, tables and figures on a page."""

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import pandas as pd
import torch
from kept import Kept
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

Size = Literal["quick", "full"]
Case = TypeVar("Case")


@dataclass(frozen=True)
class Place:
    """Where and how a run is made.

    Attributes:
        size: ``"quick"`` or ``"full"``.
        device: Where it trains.
        traces: Folder for what it measured; a run writes ``traces / f"{key}.jsonl"`` and the like.
        dry: Whether it takes two steps only, to show that it would run.
    """

    size: Size
    device: torch.device
    traces: Path
    dry: bool = False

    def steps(self, wanted: int) -> int:
        return min(wanted, 2) if self.dry else wanted


@dataclass(frozen=True)
class Experiment(Generic[Case]):
    """A claim that is measured again.

    Attributes:
        name: Name of the script and of its files.
        cases: Returns the runs of a size by their keys.
        run: Makes one run and returns its figures, which JSON can hold.
        tables: Returns tables in Markdown by their names, from the rows of all runs.
        page: Page with the tables, below the root of the repository.
        draw: Draws figures, by their file names below ``docs/figures``, from the rows and the folder of traces.
        then: Returns further runs of a size by their keys, from the rows of ``cases``: those that a choice leads to.
    """

    name: str
    cases: Callable[[Size], Mapping[str, Case]]
    run: Callable[[Case, Place], Mapping[str, Any]]
    tables: Callable[[pd.DataFrame], Mapping[str, str]]
    page: str
    draw: Mapping[str, Callable[[pd.DataFrame, Path], Figure]] = field(default_factory=dict)
    then: Callable[[Size, pd.DataFrame], Mapping[str, Case]] = lambda size, rows: {}


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    first, *lines = (f"| {' | '.join(map(str, line))} |" for line in [head, *rows])
    return "\n".join([first, f"|{'---|' * len(head)}", *lines])


def put(page: str, script: str, tables: Mapping[str, str]) -> str:
    """Returns a page with tables between their marks: ``<!-- begin: NAME by benchmarks/reproduce/SCRIPT -->``.

    Raises:
        KeyError: If the page has a mark for a table that there is not.
    """
    marks = re.compile(rf"(<!-- begin: ([\w ]+) by benchmarks/reproduce/{script} -->\n)(.*?)(<!-- end -->)", re.DOTALL)
    return marks.sub(lambda found: f"{found[1]}{tables[found[2]]}\n{found[4]}", page)


def arguments(experiment: Experiment[Any], doc: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_const", dest="size", const="quick", help="minutes, the default")
    size.add_argument("--full", action="store_const", dest="size", const="full", help="sizes of the papers, on a GPU")
    parser.add_argument("--dry-run", action="store_true", help="two steps of every run, and keep nothing")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--only", nargs="+", metavar="KEY", help="runs whose keys contain one of these")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--traces", type=Path, default=HERE / "traces", help="folder of what the runs measured")
    parser.add_argument("--report", action="store_true", help="run nothing; write tables and figures")
    parser.set_defaults(size="quick")
    return parser.parse_args()


def make(experiment: Experiment[Any], args: argparse.Namespace) -> Kept:
    """Makes the runs that are missing."""
    kept = Kept(args.results / f"{experiment.name}-{args.size}.jsonl")
    place = Place(args.size, args.device, args.traces / f"{experiment.name}-{args.size}", args.dry_run)
    place.traces.mkdir(parents=True, exist_ok=True)
    make_those(experiment, args, place, kept, experiment.cases(args.size))
    make_those(experiment, args, place, kept, experiment.then(args.size, kept.frame()))
    return kept


def make_those(
    experiment: Experiment[Case], args: argparse.Namespace, place: Place, kept: Kept, cases: Mapping[str, Case]
) -> None:
    todo = [key for key in cases if args.dry_run or key not in kept]
    for key in tqdm([key for key in todo if not args.only or any(part in key for part in args.only)], unit="run"):
        began = time.process_time()
        found = experiment.run(cases[key], place)
        if not args.dry_run:
            kept.add(key, {**found, "seconds": round(time.process_time() - began, 1)})


def main(experiment: Experiment[Any], doc: str | None) -> None:
    """Runs what is missing, prints the tables, and with ``--report`` writes page and figures."""
    args = arguments(experiment, doc)
    torch.set_num_threads(1)
    if args.report:
        rows = Kept(args.results / f"{experiment.name}-{args.size}.jsonl").frame()
        report(experiment, rows, args.traces / f"{experiment.name}-{args.size}")
        return
    try:
        rows = make(experiment, args).frame()
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    if not args.dry_run:
        for name, table in experiment.tables(rows).items():
            print(f"{name}\n{table}\n")


def report(experiment: Experiment[Any], rows: pd.DataFrame, traces: Path) -> None:
    page = ROOT / experiment.page
    text = page.read_text(encoding="utf-8")
    page.write_text(put(text, f"{experiment.name}.py", experiment.tables(rows)), encoding="utf-8")
    for name, draw in experiment.draw.items():
        save(draw(rows, traces), ROOT / "docs" / "figures" / name)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure in 256 colours, which takes a third of the bytes."""
    with BytesIO() as stream:
        figure.savefig(stream, dpi=100)
        Image.open(stream).convert("RGB").quantize(256).save(path, optimize=True)
