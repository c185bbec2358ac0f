"""The subcommand ``smoothdiag scan``."""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smoothdiag import console
from smoothdiag.measure.scan import scan
from smoothdiag.trace import Trace

STATE_NAMES = ("model", "state_dict", "model_state_dict")
"""Entries under which checkpoints keep the state dict of the model."""


def add_command(commands: Any, fit: Callable[[argparse.Namespace], None]) -> None:
    """Adds the subcommand ``scan`` to the command line.

    Args:
        commands: The subcommands.
        fit: Runs the subcommand ``fit`` on the finished trace; measuring itself knows no fit.
    """
    parser = commands.add_parser(
        "scan",
        help="measure smoothness along lines out of saved weights, without training, and fit L0 and L1",
        description="Measure gradient norm and Hessian norm along lines out of saved weights, without training, and "
        "fit L0 and L1.",
    )
    parser.add_argument(
        "setup", metavar="FILE.py:FUNCTION", help="the function returns (model, loss_fn, batches), as scan() takes them"
    )
    parser.add_argument("--weights", type=Path, metavar="CKPT", help="weights to load (default: as the function left)")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("scan.jsonl"),
        metavar="TRACE",
        help="trace to write (default: scan.jsonl)",
    )
    parser.add_argument("--budget", type=int, default=500, metavar="N", help="most gradients to use (default: 500)")
    parser.add_argument("--points", type=int, default=8, metavar="N", help="most points of a line (default: 8)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random lines (default: 0)")
    parser.add_argument("--step", type=int, default=0, metavar="N", help="training step of the weights (default: 0)")
    parser.add_argument("--max-loss", type=float, metavar="F", help="loss that ends a line (default: 3 times chance)")
    parser.add_argument(
        "--toward", action="append", default=[], metavar="NAME=CKPT", help="further weights to walk towards; repeatable"
    )
    parser.add_argument(
        "--direction", action="append", metavar="NAME", help="line to follow instead of the default lines; repeatable"
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")

    parser.add_argument(
        "--quantile", type=float, default=0.95, metavar="Q", help="quantile of the bound (default: 0.95)"
    )
    parser.add_argument("--json", action="store_true", help="print the fit as JSON")

    def run(arguments: argparse.Namespace) -> None:
        trace = _scanned(arguments)
        used = sum(row["num_grads"] for row in trace)
        said = (
            f"{console.one_line(trace.path)}: {console.counted(len(trace), 'row')}, {console.counted(used, 'gradient')}"
        )
        print(said, file=sys.stderr if arguments.json else sys.stdout)
        arguments.traces = [trace.path]
        fit(arguments)

    parser.set_defaults(run=run, by_group=False, group=None, estimator=None, num_boot=400)


def _scanned(arguments: argparse.Namespace) -> Trace:
    """Runs the scan that the arguments ask for."""
    if arguments.out.suffix != ".jsonl":
        raise ValueError(f"Parameter `--out` should end in .jsonl. Found `{arguments.out}`.")
    model, loss_fn, batches = _set_up(arguments.setup)
    toward = {}
    for given in arguments.toward:
        name, is_pair, path = given.partition("=")
        if not (name and is_pair and path):
            raise ValueError(f"Parameter `--toward` should be NAME=CKPT. Found `{given}`.")
        toward[name] = _weights(Path(path))
    if arguments.weights is not None:
        try:
            model.load_state_dict(_weights(arguments.weights))
        except RuntimeError as error:
            raise ValueError(f"Parameter `--weights` should fit the model. Found: {error}") from error
    return scan(
        model,
        loss_fn,
        batches,
        directions=arguments.direction,
        points=arguments.points,
        trace=arguments.out,
        seed=arguments.seed,
        step=arguments.step,
        toward=toward,
        budget=arguments.budget,
        max_loss=arguments.max_loss,
        progress=not arguments.no_progress,
    )


def _set_up(setup: str) -> tuple[nn.Module, Callable[..., Tensor], Iterable[Any]]:
    """Calls the user's function and returns model, loss and batches."""
    file, _, name = setup.rpartition(":")
    path = Path(file)
    if not file or not name.isidentifier() or path.suffix != ".py":
        raise ValueError(f"Parameter `FILE.py:FUNCTION` should name a file and a function in it. Found `{setup}`.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file `{path}`.")
    # The file may import its neighbours, as it may when Python runs it.
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"`{path}` should have a function `{name}`. Found {type(function).__name__}.")
    found = function()
    if not isinstance(found, tuple) or len(found) != 3 or not isinstance(found[0], nn.Module):
        raise ValueError(f"`{name}` should return (model, loss_fn, batches). Found {type(found).__name__}.")
    return found


def _weights(path: Path) -> Mapping[str, Tensor]:
    """Returns the state dict in a checkpoint."""
    if not path.is_file():
        raise FileNotFoundError(f"There are no weights at `{path}`.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises errors of many kinds for files that it cannot read
        raise ValueError(f"`{path}` should be weights that torch.save wrote. Found: {error}") from error
    inner = next((found[name] for name in STATE_NAMES if isinstance(found, Mapping) and name in found), found)
    if not isinstance(inner, Mapping) or not all(isinstance(name, str) for name in inner):
        raise ValueError(f"`{path}` should hold a state dict. Found {type(inner).__name__}.")
    return inner
