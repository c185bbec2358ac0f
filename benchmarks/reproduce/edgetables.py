"""Tables and figure of the runs at the edge of stability."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from experiment import markdown
from matplotlib.axes import Axes
from matplotlib.figure import Figure

AT = (0.9, 1.1)
"""Levels in units of the limit that count as at the edge."""
STILL = 1.05
"""Factor from the first half of the late window to the second above which a level counts as rising."""
OWN = ("spectral descent", "Muon, no momentum", "Muon, 0.95")


def in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows by net, optimizer, falling rate, batch and seed, each in the order of the script."""
    ranks = {name: i for i, name in enumerate(("MLP", "GPT", "quadratic", "SGD", "momentum 0.9", *OWN))}
    ranked = rows.assign(first=rows["net"].map(ranks), second=rows["optimizer"].map(ranks), third=-rows["lr"])
    return ranked.sort_values(["first", "second", "third", "batch", "seed"])


def tables(rows: pd.DataFrame) -> Mapping[str, str]:
    rows = in_order(rows)
    plain = rows[~rows["optimizer"].isin(OWN)]
    return {
        "full": full_table(plain[plain["batch"].isna()]),
        "small": small_table(plain[plain["batch"].notna()]),
        "held": held_table(plain[plain["net"] != "quadratic"]),
        "own": own_table(rows[rows["optimizer"].isin(OWN)]),
        "cost": f"{len(rows)} runs, {rows['seconds'].sum() / 60:.1f} CPU minutes.",
    }


def cell(values: pd.Series, digits: int = 2) -> str:
    """Returns the mean over seeds and the range."""
    if values.isna().any():
        return f"{values.isna().sum()} of {len(values)} diverged"
    low, middle, high = (f"{value:.{digits}f}" for value in (values.min(), values.mean(), values.max()))
    return middle if low == high else f"{middle} ({low} to {high})"


def place(values: pd.Series) -> str:
    """Returns where all seeds lie: below, at or above the edge."""
    places = ["below" if value < AT[0] else "at" if value <= AT[1] else "above" for value in values]
    return places[0] if len(set(places)) == 1 else " and ".join(sorted(set(places)))


def groups(rows: pd.DataFrame) -> Any:
    return rows.groupby(["net", "optimizer", "lr", "batch"], sort=False, dropna=False)


def named(optimizer: str, lr: float) -> str:
    return f"{optimizer}, lr {lr:g}"


def full_table(rows: pd.DataFrame) -> str:
    lines = []
    for (net, optimizer, lr, _), own in groups(rows):
        limit = own["full_limit"]
        lines.append([
            net,
            named(optimizer, lr),
            f"{limit.iloc[0]:.3g}",
            cell(own["sharpness"] / limit),
            cell(own["highest"] / limit),
            cell(own["batch_sharpness"] / limit),
            place(own["sharpness"] / limit),
            f"{own['loss'].mean():.2g}",
            own["num_steps"].iloc[0],
        ])  # fmt: skip
    head = ["net", "optimizer", "limit × lr", "sharpness / limit", "highest on the way", "along the gradient / limit"]
    return markdown([*head, "sharpness is", "loss", "steps"], lines)


def small_table(rows: pd.DataFrame) -> str:
    lines = []
    for (net, optimizer, lr, batch), own in groups(rows):
        full, small, b = own["full_limit"], own["small_limit"], own["momentum"]
        line = small + 2 * b / (1 + b) * own["mean_curvature"]
        rise = own["halves"].map(lambda halves: halves[1] / halves[0])
        lines.append([
            net,
            named(optimizer, lr),
            f"{batch:.0f}",
            f"{full.iloc[0]:.3g}, {small.iloc[0]:.3g}",
            cell(own["sharpness"] / full),
            cell(own["batch_sharpness"] / small),
            cell(own["unweighted"] / small),
            cell(own["mean_curvature"] / small),
            cell(own["batch_highest"] / small),
            cell(own["batch_sharpness"] / line),
            place(own["batch_sharpness"] / small) + (", rising" if rise.mean() > STILL else ""),
            f"{own['loss'].mean():.2g}",
            own["num_steps"].iloc[0],
        ])  # fmt: skip
    head = ["net", "optimizer", "batch", "limits × lr, full and small", "sharpness / full", "batch sharpness / small"]
    head += ["without weights", "on all data", "highest on the way", "batch sharpness / line", "batch sharpness is"]
    return markdown([*head, "loss", "steps"], lines)


def held_table(rows: pd.DataFrame) -> str:
    """Returns what the curvature does where nothing limits it, against the limits of the runs at larger rates.

    The control of a run has the same net and batch and the smallest rate without momentum.
    """
    lines = []
    for (net, optimizer, lr, batch), own in groups(rows):
        alike = rows[(rows["net"] == net) & ((rows["batch"] == batch) | (rows["batch"].isna() & math.isnan(batch)))]
        control = alike[alike["optimizer"] == "SGD"]
        control = control[control["lr"] == control["lr"].min()] if len(control) else control
        if control.empty or (optimizer == "SGD" and lr == control["lr"].iloc[0]):
            continue
        by, limit = ("sharpness", "full_limit") if math.isnan(batch) else ("batch_sharpness", "small_limit")
        free, held = control[by] / control["lr"], own[by] / own["lr"]
        bound = (own[limit] / own["lr"]).iloc[0]
        lines.append([
            net,
            named(optimizer, lr),
            "all" if math.isnan(batch) else f"{batch:.0f}",
            "sharpness" if by == "sharpness" else "batch sharpness",
            f"{bound:.3g}",
            cell(held, 1),
            f"{cell(free, 1)} at lr {control['lr'].iloc[0]:g}",
            "yes" if free.min() > bound else "no",
        ])  # fmt: skip
    head = ["net", "optimizer", "batch", "what", "limit", "late in the run", "late in the control"]
    return markdown([*head, "control beyond the limit"], lines)


def own_table(rows: pd.DataFrame) -> str:
    lines = []
    for (net, optimizer, lr, _), own in groups(rows):
        lines.append([
            net,
            named(optimizer, lr),
            cell(own["largest"]),
            cell(own["highest"]),
            cell(own["along"]),
            cell(own["update"]),
            cell(own["critical"]),
            place(own["largest"]),
            f"× {own['curvature_growth'].mean():.2g}",
            f"× {own['gradient_growth'].mean():.2g}",
            f"{own['loss'].mean():.2g}",
        ])  # fmt: skip
    head = ["net", "optimizer", "S / limit", "highest on the way", "steepest direction / limit", "update / limit"]
    return markdown([*head, "lr / critical lr", "S is", "S grew", "dual norm grew", "loss"], lines)


def draw(rows: pd.DataFrame, traces: Path) -> Figure:
    """Returns the figure: curvature times the rate over the steps, with the limits; a row of panels for each net."""
    import seaborn as sns

    rows = in_order(rows)
    colors = dict(zip(("SGD", "momentum 0.9", *OWN), sns.color_palette("colorblind"), strict=False))
    figure = Figure(figsize=(10.0, 5.6), layout="constrained")
    panels = figure.subplots(2, 3)
    for across, net in zip(panels, ("MLP", "GPT"), strict=True):
        own = rows[(rows["net"] == net) & (rows["seed"] == 0)]
        full, small = own[own["batch"].isna()], own[own["batch"].notna()]
        panel(across[0], full[~full["optimizer"].isin(OWN)], "curve", ["full_limit"], colors)
        panel(across[1], small, "batch_curve", ["full_limit", "small_limit"], colors)
        panel(across[2], full[full["optimizer"].isin(OWN)], "curve", [], colors)
        across[0].set_ylabel(f"{net}: curvature × rate")
    titles = ("full batches: sharpness", "small batches: batch sharpness", "own norm: S × effective rate")
    for ax, title in zip(panels[0], titles, strict=True):
        ax.set_title(title, size="medium")
    for ax in panels[1]:
        ax.set_xlabel("step")
    return figure


def panel(ax: Axes, rows: pd.DataFrame, curve: str, limits: Sequence[str], colors: Mapping[str, Any]) -> None:
    """Draws the runs of a panel, and a dashed line at each limit in the colour of its runs, or a black one at 2."""
    import seaborn as sns

    fastest = rows.groupby("optimizer")["lr"].max()
    for _, row in rows.iterrows():
        is_control = row["lr"] < fastest[row["optimizer"]]
        size = "" if math.isnan(row["batch"]) else f", batch {row['batch']:.0f}"
        values = row[curve]
        ax.plot(
            row["steps"][: len(values)],
            values,
            color=colors[row["optimizer"]],
            linestyle=":" if is_control else "-" if not size or row["batch"] < 50 else "-.",
            linewidth=1.3,
            label=f"{row['optimizer']}, lr {row['lr']:g}{size}",
        )
    heights = {
        round(float(value), 3): colors[optimizer]
        for name in limits
        for optimizer, value in zip(rows["optimizer"], rows[name], strict=True)
    }
    for height, color in (heights or {2.0: "black"}).items():
        ax.axhline(height, color=color, linewidth=0.9, linestyle="--")
        look: dict[str, Any] = {"color": color, "va": "center", "fontsize": "small"}
        ax.text(1.0, height, f" {height:g}", transform=ax.get_yaxis_transform(), **look)
    ax.set_yscale("log")
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom * (bottom / top) ** 0.45, top)  # room for the legend
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_formatter(lambda value, _: "")
    ax.legend(fontsize="x-small", frameon=False, loc="lower right", ncols=1)
    sns.despine(ax=ax)
