"""The command line: ``smoothdiag COMMAND``; ``smoothdiag --help`` lists the commands."""

import argparse
import json
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from smoothdiag import console, machines, watch
from smoothdiag.doctor import command as doctor
from smoothdiag.launch import command as launch
from smoothdiag.measure.scan import command as scan
from smoothdiag.plots import command as plot
from smoothdiag.report import command as report
from smoothdiag.rows import SmoothdiagWarning
from smoothdiag.trace import Trace

if TYPE_CHECKING:
    from smoothdiag.fits import GroupFits, SmoothnessFit


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    The code is 0 on success, 2 after wrong input, 130 after Ctrl-C and 141 if the reader of the output has left. Errors
    and warnings take one line each.
    """
    command = "smoothdiag"
    try:
        try:
            arguments = _parser().parse_args(argv)
            command += f" {arguments.command}"
            with _warnings_as_lines(command):
                arguments.run(arguments)
        finally:
            console.flush()
    except BrokenPipeError:
        console.let_go()
        return console.BROKEN_PIPE
    except KeyboardInterrupt:
        console.say(f"{command}: stopped by Ctrl-C")
        return console.INTERRUPTED
    except (ValueError, OSError, ImportError, OverflowError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno and error.filename is None:  # the output takes no more
            console.let_go()
        console.say(f"{command}: {console.one_line(error)}")
        return 2
    return 0


@contextmanager
def _warnings_as_lines(command: str) -> Iterator[None]:
    """Shows warnings of smoothdiag without their place in the code; other warnings stay as they are."""
    shown_before = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, SmoothdiagWarning):
            print(f"{command}: warning: {console.one_line(message)}", file=file or sys.stderr)
        else:
            shown_before(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _demo(arguments: argparse.Namespace) -> None:
    import torch

    from smoothdiag.demo import run_demo

    if not 0 < arguments.lr < math.inf:
        raise ValueError(f"Parameter `--lr` should be positive and finite. Found {arguments.lr}.")
    if arguments.steps < 1:
        raise ValueError(f"Parameter `--steps` should be at least 1. Found {arguments.steps}.")
    cuda = torch.cuda.is_available()
    if arguments.device == "cuda" and not cuda:
        raise ValueError("Parameter `--device` is cuda, but this PyTorch sees no CUDA device; use auto or cpu.")
    device = torch.device("cuda" if cuda and arguments.device != "cpu" else "cpu")
    text = None if arguments.text is None else arguments.text.read_text(encoding="utf-8", errors="replace")
    run_demo(text, arguments.steps, arguments.out, device, lr=arguments.lr)


def _fit(arguments: argparse.Namespace) -> None:
    if arguments.by_group:
        fits = _fitted_groups(arguments)
        plain = {"fits": {group: fit.to_dict() for group, fit in fits.items()}, "failed": fits.failed}
        print(json.dumps(plain, indent=2) if arguments.json else fits.summary())
    else:
        fit = _fitted(arguments)
        print(json.dumps(fit.to_dict(), indent=2) if arguments.json else fit.summary())


def _clip(arguments: argparse.Namespace) -> None:
    from smoothdiag.clipping import clip_rule
    from smoothdiag.fits.columns import largest_rate

    fit, lr = _fitted(arguments), arguments.lr
    if lr is None:
        frames = [Trace.read(path).to_frame() for path in arguments.traces]
        rates = [largest_rate(frame, estimator=fit.estimator, group=fit.group) for frame in frames]
        lr = max((rate for rate in rates if not math.isnan(rate)), default=None)
    rule = clip_rule(
        fit,
        lr=lr,
        momentum=arguments.momentum,
        dampening=arguments.dampening,
        kappa=arguments.kappa,
        noise=arguments.noise,
    )
    print(rule)
    if lr is not None and arguments.lr is None:
        print(f"the rate {lr:.4g} is the largest of the trace; --lr gives another")


def _import(arguments: argparse.Namespace) -> None:
    from smoothdiag.logs import describe_columns, read_log, review_log
    from smoothdiag.logs.alarms import findings_of

    out, form = arguments.out, machines.chosen_format(arguments)
    # Only JSON lines can hold these rows: tables leave out NaN, and the smoothness of a log is always NaN.
    if out is not None and out.suffix != ".jsonl":
        raise ValueError(f"Parameter `--out` should end in .jsonl. Found `{out}`.")
    try:
        kept = Trace(out)
    except ValueError as error:
        raise ValueError(f"Parameter `--out` should be a new file or an earlier trace. {error}") from error
    columns = {role: getattr(arguments, role) for role in ("grad_norm", "loss", "lr", "step")}
    trace = read_log(arguments.log, **columns, run=arguments.of_run)
    review = review_log(trace, thresholds=arguments.threshold)
    found = findings_of(review, str(arguments.log))
    code = machines.exit_code(found, arguments.fail_on)
    if form == "json":
        print(machines.document("import", found, code, **(trace.meta | review.to_dict())))
    elif form == "github":
        print(machines.workflow_commands("import", found, str(Path.cwd())))
    else:
        print(f"{arguments.log}: {describe_columns(trace)}\n{review.summary()}")
    if out is not None:
        kept.meta = trace.meta
        _write(trace, kept)
        print(f"\n{out}", file=sys.stderr if form == "json" else sys.stdout)
    if code:
        sys.exit(code)


def _write(trace: Trace, target: Trace) -> None:
    """Writes rows to the file of another trace; a row that cannot be written is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", SmoothdiagWarning)
        try:
            with target:
                target.extend(trace)
        except SmoothdiagWarning as warning:
            raise OSError(
                f"Parameter `--out` should be a file that can be written. Found: {warning.__context__}"
            ) from warning


def _fitted(arguments: argparse.Namespace) -> "SmoothnessFit":
    from smoothdiag.fits import fit_smoothness

    return fit_smoothness(_data(arguments), group=console.once(arguments, "group") or "all", **_options(arguments))


def _fitted_groups(arguments: argparse.Namespace) -> "GroupFits":
    from smoothdiag.fits import fit_groups

    return fit_groups(_data(arguments), groups=arguments.group, **_options(arguments))


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    options = {name: getattr(arguments, name) for name in ("quantile", "num_boot", "seed")}
    return {"estimator": console.once(arguments, "estimator"), **options}


def _data(arguments: argparse.Namespace) -> Trace | list[Trace]:
    """Returns the trace, or a list of traces if several runs are given."""
    traces = [Trace.read(path) for path in arguments.traces]
    return traces if len(traces) > 1 else traces[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="smoothdiag",
        description="Measure how fast gradients change (smoothness), fit L0 and L1, derive a clipping threshold.",
        epilog="smoothdiag COMMAND --help explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"smoothdiag {version('smoothdiag')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = _add(commands, "demo", "scan, train at too large a rate three ways, find a threshold to paste")
    demo.add_argument("--text", type=Path, metavar="FILE", help="text to train on (default: Python's standard library)")
    demo.add_argument("--steps", type=int, default=250, metavar="N", help="optimizer steps of each run (default: 250)")
    demo.add_argument("--lr", type=float, default=24.0, help="learning rate of each run (default: 24)")
    demo.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="DIR", help="folder for results (default: demo)"
    )
    demo.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where; auto prefers cuda")
    demo.set_defaults(run=_demo)

    rows = argparse.ArgumentParser(add_help=False)
    rows.add_argument(
        "traces", type=Path, nargs="+", metavar="TRACE", help="recorded traces, one per run: .jsonl, .csv, .parquet"
    )
    for flag, metavar, what in (
        (
            "--estimator",
            "NAME",
            "estimator to use (default: local, else path; of a scan hessian_norm); plot --kind sharpness takes several",
        ),
        ("--group", "NAME", "parameter group to use (default: all); fit and plot take several with --by-group"),
    ):
        rows.add_argument(flag, action="append", metavar=metavar, help=what)
    rows.add_argument("--quantile", type=float, default=0.95, metavar="Q", help="quantile of the bound (default: 0.95)")
    rows.add_argument("--num-boot", type=int, default=400, metavar="N", help="bootstrap resamples (default: 400)")
    rows.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the resampling (default: 0)")

    fit = _add(commands, "fit", "fit L0 and L1 to a trace, check the fit and print the verdict", parents=[rows])
    fit.add_argument("--json", action="store_true", help="print the fit as JSON")
    fit.add_argument("--by-group", action="store_true", help="fit every parameter group and print one table")
    fit.set_defaults(run=_fit)

    plot.add_command(commands, rows, _fitted, _fitted_groups)

    clip = _add(commands, "clip", "derive a clipping threshold from a trace and say why", parents=[rows])
    clip.add_argument("--lr", type=float, help="learning rate of the run (default: the largest in the trace)")
    console.add_momentum(clip)
    clip.add_argument("--kappa", type=float, default=1.0, help="largest lr * smoothness, at most 2 (default: 1)")
    clip.add_argument("--noise", type=float, help="standard deviation of the minibatch gradient norm")
    clip.set_defaults(run=_clip)
    report.add_command(commands, rows)

    log = _add(commands, "import", "say what the log of an earlier run tells about clipping, and what it cannot tell")
    log.add_argument(
        "log", type=Path, metavar="LOG", help="text of a console, table, JSON, or a folder of TensorBoard or MLflow"
    )
    roles = {"grad-norm": "gradient norms", "loss": "losses", "lr": "learning rates", "step": "step numbers"}
    for flag, what in roles.items():
        log.add_argument(
            f"--{flag}", metavar="COLUMN", help=f"column of {what} (default: the column with a usual name)"
        )
    log.add_argument("--run", dest="of_run", metavar="NAME", help="the run to read, if the log holds several")
    log.add_argument(
        "--threshold",
        type=float,
        action="append",
        default=[],
        metavar="T",
        help="count how often a threshold of T would have clipped; may be repeated",
    )
    kept = "an earlier trace there is kept as NAME.1.jsonl"
    log.add_argument("--out", type=Path, metavar="TRACE", help=f"write the rows as a trace (.jsonl); {kept}")
    machines.add_options(log)
    log.set_defaults(run=_import)

    scan.add_command(commands, _fit)
    doctor.add_command(commands)
    launch.add_command(commands)
    watch.add_command(commands)
    return parser


def _add(commands: Any, name: str, what: str, **options: Any) -> Any:
    """Adds a subcommand; its line in the list of commands is also the first line of its own help."""
    return commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.", **options)


if __name__ == "__main__":
    sys.exit(main())
