"""What the rows of each way show: slopes, rank correlations, verdicts and null lines, and the tables of the page."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from experiment import markdown
from zhang_ways import ALIKE, CONTROLS, HESSIAN, HESSIAN_NORMS, RELEASED, STILL, WAYS

import smoothdiag as sd
from smoothdiag.fits.correlations import decades, loglog_slope, rank_correlations
from smoothdiag.fits.parts import Array
from smoothdiag.fits.resamples import stationary_counts
from smoothdiag.fits.rows import Rows, as_frame, select_rows, step_blocks
from smoothdiag.measure.estimators.secants import SATURATED_ABOVE

NUM_BOOT, NUM_SHUFFLED, BLOCKS = 1000, 400, 12

LEVELS = (0.95, 0.8)
"""Lines that are fitted: the default of the library, and one that a quarter of the rows is enough for."""

THRESHOLD = 0.25
"""Threshold of all clipped runs [gradient norm]."""

Figures = dict[str, Any]


def frames_of(paths: Sequence[Path], way: tuple[str, str]) -> list[pd.DataFrame]:
    """Returns the rows of one way, a table for each seed."""
    estimator, data = way
    tables = (sd.Trace.read(path).to_frame() for path in paths)
    return [frame[(frame["estimator"] == estimator) & (frame["data"] == data)] for frame in tables]


def judged(paths: Sequence[Path]) -> Figures:
    """Returns the figures of all ways and controls of a case, from the traces of its seeds."""
    found: Figures = {"ways": {}, "runs": [of_run_itself(sd.Trace.read(path).to_frame()) for path in paths]}
    for name, way in (WAYS | CONTROLS).items():
        frames = frames_of(paths, way)
        if all(map(len, frames)):
            found["ways"][name] = judge(frames, LEVELS if name in WAYS else LEVELS[:1])
    released = frames_of(paths, WAYS["as released"])
    found["ways"]["as released"]["bare"] = verdict_of([f[["step", "grad_norm", "smoothness"]] for f in released])
    if still := [f for f in frames_of(paths, (STILL, "tenth")) if len(f)]:
        floors = [
            frame.assign(noise_floor=floor["smoothness"].to_numpy())
            for frame, floor in zip(released, still, strict=True)
        ]
        found["ways"]["as released"]["with floor"] = verdict_of(floors)
    if HESSIAN_NORMS in found["ways"]:
        both = (frames_of(paths, (name, "held-out")) for name in ("local", HESSIAN))
        beside = [pd.concat(pair) for pair in zip(*both, strict=True)]
        found["hessian"] = verdict_of(beside, estimator="local")
    found["pieces"] = of_pieces(released, frames_of(paths, (ALIKE, "tenth")))
    return dict(rounded(found))


def of_run_itself(frame: pd.DataFrame) -> Figures:
    """Returns losses on the fixed training data, first and of the last ten rows, and the share of large gradients."""
    losses = frame[frame["estimator"] == RELEASED]["loss"]
    norms = frame[frame["estimator"] == "path"]["grad_norm"]
    return {"first": losses.iloc[0], "last": losses.tail(10).mean(), "clipped": float((norms > THRESHOLD).mean())}


def judge(frames: Sequence[pd.DataFrame], levels: Sequence[float] = LEVELS) -> Figures:
    """Returns the figures of one way: of all seeds together, and slope and partial rank correlation of each."""
    data = as_frame(list(frames))
    rows = select_rows(data, None, "all")
    verdicts = {str(level): verdict_of(frames, level) for level in levels}
    block = verdicts[str(LEVELS[0])]["block"]
    found = described(rows, block) | {"verdicts": verdicts, "nulls": {}}
    found["seeds"] = [related(of_run(rows, run)) for run in np.unique(rows.run)]
    nulls = {"ceiling": rows.y / np.where(rows.saturation > 0, rows.saturation, np.nan)}
    if "noise_line" in data.columns:
        nulls["noise line"] = matched(data, rows, "noise_line")
    for name, values in nulls.items():
        if (values > 0).all():
            found["nulls"][name] = described(replace(rows, y=values), block)
    return found


def matched(data: pd.DataFrame, rows: Rows, column: str) -> Array:
    """Returns a column of the table in the order of the rows of the fit."""
    keyed = data.assign(code=np.unique(data["run"], return_inverse=True)[1]).set_index(["code", "step"])[column]
    keys = list(zip(rows.run.astype(int), rows.step.astype(int), strict=True))
    return np.asarray(keyed.loc[keys], dtype=np.float64)


def of_run(rows: Rows, run: float) -> Rows:
    mine = rows.run == run
    names = ("x", "y", "step", "run", "saturation")
    return replace(rows, **{name: getattr(rows, name)[mine] for name in names})


def described(rows: Rows, block: float) -> Figures:
    """Returns what the rows show without a model: ranges, slope, correlations, and the correlation of shuffled rows."""
    saturation = rows.saturation[np.isfinite(rows.saturation)]
    return {
        "rows": len(rows.x),
        "decades": decades(rows.x),
        "decades_y": decades(rows.y),
        "median": float(np.median(rows.y)),
        **related(rows),
        "slope_interval": slope_interval(rows, block),
        "shuffled": shuffled(rows),
        "saturated": float(np.mean(saturation > SATURATED_ABOVE)) if len(saturation) else math.nan,
    }


def related(rows: Rows) -> Figures:
    rank, partial = rank_correlations(rows.x, rows.y, rows.step)
    return {"slope": loglog_slope(rows.x, rows.y), "rank": rank, "partial": partial}


def slope_interval(rows: Rows, block: float) -> tuple[float, float]:
    """90% interval of the log-log slope, from resampled blocks of steps and resampled seeds.

    Args:
        rows: The rows.
        block: Mean length of a block [steps]; the one of the library's own fit.
    """
    counts = stationary_counts(rows.step, block, NUM_BOOT, 0, rows.run).astype(np.float64)
    u, v = np.log(rows.x), np.log(rows.y)
    size, first, second = counts.sum(axis=1), counts @ u, counts @ v
    slopes = (counts @ (u * v) - first * second / size) / (counts @ (u * u) - first**2 / size)
    low, high = np.quantile(slopes, [0.05, 0.95])
    return float(low), float(high)


def shuffled(rows: Rows) -> float:
    """Partial rank correlation that rows shuffled within twelve blocks of steps exceed once in twenty times."""
    random, blocks = np.random.default_rng(0), step_blocks(rows.step, rows.run, BLOCKS)
    order = np.concatenate(blocks)
    x, step = rows.x[order], rows.step[order]
    found = [
        rank_correlations(x, rows.y[np.concatenate([random.permutation(block) for block in blocks])], step)[1]
        for _ in range(NUM_SHUFFLED)
    ]
    return float(np.quantile(found, 0.95))


def verdict_of(frames: Sequence[pd.DataFrame], level: float = LEVELS[0], estimator: str | None = None) -> Figures:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sd.SmoothdiagWarning)
        fit = sd.fit_smoothness(list(frames), estimator=estimator, quantile=level)
    return {
        "verdict": fit.verdict.name,
        "flags": [flag.name for flag in fit.flags if flag.fatal or flag.blocking],
        "fatal": [flag.name for flag in fit.flags if flag.fatal],
        "reason": fit.verdict_reason,
        "L0": fit.L0,
        "L1": fit.L1,
        "L1_interval": fit.L1_interval,
        "exponent": fit.exponent_interval,
        "block": fit.block_length,
        "agrees": None if fit.hessian is None else fit.hessian.agrees,
    }


def of_pieces(released: Sequence[pd.DataFrame], alike: Sequence[pd.DataFrame]) -> Figures:
    """Returns how often the two points were cut into different numbers of pieces, and what that did to the rows."""
    one, other = pd.concat(released), pd.concat(alike)
    differ = (one["pieces"] != one["pieces_there"]).to_numpy()
    ratio = one["smoothness"].to_numpy() / (other["smoothness"] * other["pieces"]).to_numpy()
    return {
        "pieces": float(one["pieces"].mean()),
        "differ": float(differ.mean()),
        "ratio_same": float(np.median(ratio[~differ])) if (~differ).any() else math.nan,
        "ratio_differ": float(np.median(ratio[differ])) if differ.any() else math.nan,
    }


def rounded(value: Any) -> Any:
    """Returns the figures with five digits, and None for what is not finite, which JSON has no number for."""
    if isinstance(value, Mapping):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


# Tables


def number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return "-"
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def interval(values: Sequence[float | None], digits: int = 2) -> str:
    return " to ".join(number(value, digits) for value in values)


def each_way(
    results: pd.DataFrame, cells: Callable[[Figures], Sequence[Any]], names: Sequence[str] = tuple(WAYS)
) -> list[list[Any]]:
    """Returns a row of cells for each case and way."""
    return [
        [key, name, *cells(ways[name])]
        for key, ways in zip(results["key"], results["ways"], strict=True)
        for name in names
        if name in ways
    ]


def of_slopes(way: Figures) -> list[str]:
    names = ("rank", "partial", "shuffled", "saturated")
    slope = f"{number(way['slope'])} ({interval(way['slope_interval'])})"
    return [way["rows"], number(way["decades"]), number(way["decades_y"]), slope, *(number(way[n]) for n in names)]


def of_verdicts(way: Figures) -> list[str]:
    cells = []
    for level in LEVELS:
        found = way["verdicts"][str(level)]
        cells += [found["verdict"], ", ".join(f"**{f}**" if f in found["fatal"] else f for f in found["flags"]) or "-"]
    return cells


def of_seeds(way: Figures) -> list[str]:
    slopes, partials = ([number(seed[name]) for seed in way["seeds"]] for name in ("slope", "partial"))
    return [", ".join(slopes), ", ".join(partials)]


def of_null(null: Figures, way: Figures) -> list[str]:
    slope = f"{number(null['slope'])} ({interval(null['slope_interval'])})"
    return [slope, number(null["partial"]), number(null["median"] / way["median"])]


def nulls(results: pd.DataFrame) -> list[list[Any]]:
    found = []
    for key, ways in zip(results["key"], results["ways"], strict=True):
        found += [[key, name, "ceiling", *of_null(ways[name]["nulls"]["ceiling"], ways[name])] for name in WAYS]
        if (still := ways.get("no step, cut anew")) is not None:
            found.append([key, "as released", "no step, cut anew", *of_null(still, ways["as released"])])
    return found


def hessians(results: pd.DataFrame) -> list[list[Any]]:
    found = []
    for key, ways, fit in zip(results["key"], results["ways"], results["hessian"], strict=True):
        norms, local = ways[HESSIAN_NORMS], ways["local, held-out batch"]
        slopes = [f"{number(way['slope'])} ({interval(way['slope_interval'])})" for way in (local, norms)]
        says = {True: "agree", False: "contradict", None: "cannot decide"}[fit["agrees"]]
        cells = [number(norms[name]) for name in ("rank", "partial", "shuffled")]
        cells += [says, norms["verdicts"]["0.95"]["verdict"]]
        found.append([key, norms["rows"], number(norms["median"]), *slopes, *cells])
    return found


def runs(results: pd.DataFrame) -> list[list[Any]]:
    found = []
    for key, each, ways in zip(results["key"], results["runs"], results["ways"], strict=True):
        cells = [", ".join(number(run[name]) for run in each) for name in ("first", "last", "clipped")]
        found.append([key, ways["as released"]["rows"] // len(each), *cells])
    if "entropy" in results.columns:
        return [[*row, number(entropy)] for row, entropy in zip(found, results["entropy"], strict=True)]
    return found


def pieces(results: pd.DataFrame) -> list[list[Any]]:
    names = ("pieces", "differ", "ratio_same", "ratio_differ")
    found = []
    for key, cut, ways in zip(results["key"], results["pieces"], results["ways"], strict=True):
        released, alike = ways["as released"], ways["as released, cut alike"]
        slopes = [released["verdicts"]["0.95"]["L1"], alike["verdicts"]["0.95"]["L1"]]
        said = [released[name]["verdict"] if name in released else "-" for name in ("bare", "with floor")]
        found.append([key, *(number(cut[name]) for name in names), *map(number, slopes), *said])
    return found


def tables(results: pd.DataFrame) -> dict[str, str]:
    """Returns the tables of one script."""
    run = ["run", "way"]
    slope = "log-log slope (90% interval)"
    of_rows = ["rows", "decades of norms", "of smoothness", slope, "rank", "given the step", "shuffled", "saturated"]
    of_runs = ["run", "rows of a seed", "first loss", "last loss", "norms above .25"]
    of_runs += ["loss of word frequencies"] if "entropy" in results.columns else []
    of_cuts = ["run", "pieces", "another number", "ratio, same number", "ratio, another number"]
    of_cuts += ["L1 as released", "L1 cut alike", "verdict, bare", "verdict, noise floor"]
    of_hessians = ["run", "Hessian norms", "their median", "slope of local rows", "slope of Hessian norms"]
    of_hessians += ["rank", "given the step", "shuffled", "the line of local rows", "verdict of Hessian norms"]
    found = {
        "runs": markdown(of_runs, runs(results)),
        "slopes": markdown([*run, *of_rows], each_way(results, of_slopes, (*WAYS, *CONTROLS))),
        "verdicts": markdown([*run, "at .95", "flags", "at .8", "flags"], each_way(results, of_verdicts)),
        "nulls": markdown([*run, "null line", f"its {slope}", "given the step", "null / row"], nulls(results)),
        "seeds": markdown([*run, "slopes", "given the step"], each_way(results, of_seeds, (*WAYS, HESSIAN_NORMS))),
        "pieces": markdown(of_cuts, pieces(results)),
        "cost": f"{results['seconds'].sum() / 60:.1f} CPU minutes",
    }
    if "hessian" in results.columns:
        found["hessian"] = markdown(of_hessians, hessians(results))
    return found
