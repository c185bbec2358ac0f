"""Tables and a figure of the scans in a folder.

python benchmarks/scans/report.py scans                    # tables in Markdown; results go to results.csv
python benchmarks/scans/report.py scans --figure docs/figures/scans.png
"""

import argparse
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from checkpoints import NETS, STAGES
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter
from scipy.stats import spearmanr
from tqdm import tqdm

import smoothdiag as sd

MODELS = ("affine", "power", "isotonic", "distance", "loss gap")
RESULTS = Path(__file__).parent / "results.csv"


def facts(path: Path) -> dict[str, str | int]:
    kind, net, stage, seed, batch = path.stem.split("-")
    return {"kind": kind, "net": net, "stage": int(stage), "seed": int(seed), "batch": int(batch)}


def read(folder: Path) -> dict[Path, pd.DataFrame]:
    paths = sorted(path for path in folder.glob("*.jsonl") if ".part" not in path.name)
    return {path: sd.Trace.read(path).to_frame() for path in paths}


REASONS = {
    "smoothness rises along": "exponent",
    "on lines left out, smoothness at equal": "scatter",
    "on lines left out, the gradient norm hardly": "skill",
    "these points do not tell": "loss",
    "while the gradient norm grows": "rise",
}
"""How reasons for NOT_IDENTIFIED begin that no flag names, and what decided."""


def why(fit: sd.SmoothnessFit) -> str:
    """What kept a scan from a verdict: the first blocking flag, or the rule that applied."""
    if fit.verdict is not sd.Verdict.NOT_IDENTIFIED:
        return ""
    flags = [flag.name for flag in fit.flags if flag.blocking]
    return flags[0] if flags else next(name for begin, name in REASONS.items() if fit.verdict_reason.startswith(begin))


def judged(frame: pd.DataFrame) -> dict[str, Any]:
    """The verdict on one scan, with the numbers behind it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = sd.fit_smoothness(frame)
    skills = {f"skill {score.name}": score.skill for score in fit.comparison if score.name in MODELS}
    return {
        "verdict": fit.verdict.name,
        "exponent_low": fit.exponent_interval[0],
        "exponent_high": fit.exponent_interval[1],
        "decades": fit.decades,
        "rows": fit.num_points,
        "lines": fit.num_scans,
        "factor": float(np.exp(fit.spread)),
        "gradients": int(frame["num_grads"].sum()),
        "why": why(fit),
        "needed": fit.plan().gradients,
        "reason": fit.verdict_reason,
        **skills,
    }


def down(frame: pd.DataFrame) -> dict[str, Any]:
    """Rank correlation of gradient norm and Hessian norm down one path of descent."""
    rows = frame[(frame["estimator"] == "hessian_norm") & (frame["status"] == "ok")]
    if len(rows) < 4:
        return {"rows": len(rows), "rank": np.nan}
    x, y = rows["grad_norm"], rows["smoothness"]
    return {
        "rows": len(rows),
        "rank": float(spearmanr(x, y).statistic),
        "decades": float(np.log10(x.max() / x.min())),
        "hessian_first": float(y.iloc[0]),
        "hessian_last": float(y.iloc[-1]),
        "loss_first": float(rows["loss"].iloc[0]),
        "loss_last": float(rows["loss"].iloc[-1]),
    }


def markdown(table: pd.DataFrame) -> str:
    cells = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def span(values: pd.Series, digits: int = 2) -> str:
    known = values.dropna()
    if not len(known):
        return "-"
    low, high = (
        f"{end:.{digits}f}".replace("0.", ".", 1) if abs(end) < 1 else f"{end:.{digits}f}"
        for end in (known.min(), known.max())
    )
    return low if low == high else f"{low} to {high}"


def outward(results: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (net, stage), part in results.groupby(["net", "stage"], sort=False):
        rows.append(
            {
                "network": net,
                "steps": stage,
                "verdicts": counts(part["verdict"]),
                "decided by": counts(part["why"]),
                "exponent, lower ends": span(part["exponent_low"]),
                "upper ends": span(part["exponent_high"]),
                "decades": span(part["decades"], 1),
                "error factor": span(part["factor"], 1),
                "gradients for the exponent": span(part["needed"], 0),
            }
        )
    return pd.DataFrame(rows)


def skills(results: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (net, stage), part in results.groupby(["net", "stage"], sort=False):
        medians = {name: f"{part[f'skill {name}'].median():.2f}" for name in MODELS}
        rows.append({"network": net, "steps": stage, **medians})
    return pd.DataFrame(rows)


def counts(values: pd.Series) -> str:
    return ", ".join(f"{name} {count}" for name, count in Counter(values).most_common() if name)


def downward(results: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (net, stage), part in results.groupby(["net", "stage"], sort=False):
        rows.append(
            {
                "network": net,
                "steps": stage,
                "rank correlation": span(part["rank"]),
                "decades": span(part["decades"], 1),
                "loss falls to": span(part["loss_last"] / part["loss_first"]),
                "Hessian norm changes by": span(part["hessian_last"] / part["hessian_first"], 1),
            }
        )
    return pd.DataFrame(rows)


def draw(frames: dict[Path, pd.DataFrame], path: Path) -> None:
    """One panel for each network and stage: the points of the first seed and batch, joined along lines."""
    nets = [net for net in NETS if any(facts(p)["net"] == net for p in frames)]
    with sns.axes_style("ticks"), mpl.rc_context({"font.size": 8}):
        figure, axes = plt.subplots(
            len(nets), len(STAGES), figsize=(7.5, 1.9 * len(nets)), squeeze=False, layout="constrained"
        )
        for p, frame in frames.items():
            fact = facts(p)
            if fact["seed"] or fact["batch"] or fact["stage"] not in STAGES:
                continue
            ax = axes[nets.index(str(fact["net"]))][STAGES.index(int(fact["stage"]))]
            rows = frame[(frame["estimator"] == "hessian_norm") & (frame["status"] == "ok")]
            if fact["kind"] == "descent":
                ax.plot(rows["grad_norm"], rows["smoothness"], "s--", color="tab:red", ms=3, lw=1)
                continue
            start = rows[rows["scan"] == "start"]
            for _, line in rows[rows["scan"] != "start"].groupby("scan"):
                line = pd.concat([start, line.sort_values("point")])
                ax.plot(line["grad_norm"], line["smoothness"], "o-", color="tab:blue", ms=2.5, lw=0.6, alpha=0.7)
            ax.plot(start["grad_norm"], start["smoothness"], "k*", ms=7, zorder=3)
        for row, net in enumerate(nets):
            for column, stage in enumerate(STAGES):
                ax = axes[row][column]
                ax.set(xscale="log", yscale="log", title=f"{net} after {stage} steps")
                for axis in (ax.xaxis, ax.yaxis):
                    axis.set_minor_formatter(NullFormatter())
        figure.supxlabel("gradient norm [loss / parameter]")
        figure.supylabel("Hessian norm [loss / parameter²]")
        marks = {
            "start": ("k", "*", ""),
            "along lines": ("tab:blue", "o", "-"),
            "down the gradient": ("tab:red", "s", "--"),
        }
        handles = [
            Line2D([], [], color=color, marker=marker, ls=style, label=name)
            for name, (color, marker, style) in marks.items()
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of run.py")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    frames = read(args.folder)
    found = [
        facts(path) | (judged(frame) if facts(path)["kind"] == "scan" else down(frame))
        for path, frame in tqdm(frames.items(), unit="fit")
    ]
    order = {net: i for i, net in enumerate(NETS)}
    results = pd.DataFrame(found).sort_values(
        ["kind", "net", "stage"], key=lambda c: c.map(order) if c.name == "net" else c
    )
    results.to_csv(RESULTS, index=False, float_format="%.4g")
    for kind, table in (("scan", outward), ("scan", skills), ("descent", downward)):
        part = results[results["kind"] == kind]
        if len(part):
            print(markdown(table(part)), end="\n\n")
    if args.figure:
        draw(frames, args.figure)


if __name__ == "__main__":
    main()
