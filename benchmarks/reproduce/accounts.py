"""Measures again what popular accounts of gradient clipping claim, on functions of one variable.

    python benchmarks/reproduce/accounts.py             # two minutes
    python benchmarks/reproduce/accounts.py --report    # tables and figure of docs/reproduce/accounts.md

Three kinds of runs: how smooth x^3, x^4 and exp x are, how many steps a fixed rate and clipped descent take as the
gradient at the start grows, and what `sd.scan` and `sd.fit_smoothness` say of such landscapes.

Source: Zhang, He, Sra, Jadbabaie 2020 (ICLR, arXiv 1905.11881), Lemma 2 and Theorems 3, 4 and 6; Su 2020
(kexue.fm/archives/7469) for the account.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from curves import CURVES, first_order, frontier_error, growth, safe_factor
from experiment import Experiment, Place, Size, main, markdown
from matplotlib.figure import Figure
from races import SLOPES, dilemma, race
from surfaces import FAR, NEAR, SURFACES, descend, said, scan

SHORT, LONG = (0.03, 0.1), (1.0, 10.0, 100.0)
SETTINGS = {"quick": 400, "full": 10_000}
LARGEST = {"quick": 5, "full": 7}
"""Largest power of ten of M."""
NUM_STEPS = 300

Case = partial[Mapping[str, Any]]


def smoothness(name: str) -> Mapping[str, Any]:
    """Returns how smooth a function is, for the pair whose L1 is 1."""
    curve = CURVES[name]
    pair = next(pair for pair in curve.pairs if pair[1] == 1.0)
    return {
        "L0": pair[0],
        "growth": growth(curve),
        "frontier_error": frontier_error(curve),
        "short": first_order(curve, pair, SHORT),
        "to_radius": first_order(curve, pair, (0.1, 0.5, 1.0)),
        "far": first_order(curve, pair, LONG),
        "short_scaled": first_order(curve, pair, SHORT, scaled=True),
        "to_radius_scaled": first_order(curve, pair, (0.1, 0.5, 1.0), scaled=True),
        "safe_factor": safe_factor(curve, pair),
    }


def cases(size: Size) -> Mapping[str, Case]:
    found: dict[str, Case] = {f"smoothness/{name}": partial(smoothness, name) for name in CURVES}
    number = SETTINGS[size]
    for power in range(1, LARGEST[size] + 1):
        for name, slope in SLOPES.items():
            found[f"race/{name}/{power}"] = partial(race, slope, bound=10.0**power, number=number)
        found[f"pair/{power}"] = partial(dilemma, bound=10.0**power, number=number)
    for name in SURFACES:
        for distance, where in ((FAR, "far"), (NEAR, "near")):
            found[f"scan/{name}/{where}"] = partial(scanned, name, distance)
    for name in ("||x||^4", "hybrid"):
        found[f"descent/{name}"] = partial(descended, name, num_steps=NUM_STEPS)
    return found


def scanned(name: str, distance: float) -> Mapping[str, Any]:
    return said(scan(name, distance))


def descended(name: str, num_steps: int) -> Mapping[str, Any]:
    return said(descend(name, num_steps))


def run(case: Case, place: Place) -> Mapping[str, Any]:
    """Makes a run; a dry one starts where the gradient is 10."""
    return case(bound=10.0) if place.dry and "bound" in case.keywords else case()


def of_kind(rows: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Returns the rows of a kind, with the rest of their keys as ``name``."""
    own = rows[rows["key"].str.startswith(f"{kind}/")]
    return own.assign(name=own["key"].str.split("/", n=1).str[1])


def tables(rows: pd.DataFrame) -> Mapping[str, str]:
    return {
        "smoothness": smoothness_table(of_kind(rows, "smoothness")),
        "inequality": inequality_table(of_kind(rows, "smoothness")),
        "steps": steps_table(of_kind(rows, "race")),
        "growth": growth_table(of_kind(rows, "race")),
        "bounds": bounds_table(of_kind(rows, "pair")),
        "verdicts": verdicts_table(rows),
        "cost": f"{len(rows)} runs, {rows['seconds'].sum() / 60:.1f} CPU minutes.",
    }


def written(L0: Callable[[float], float]) -> str:
    """Returns the closed form of a frontier, from its values: a constant, a power of 1/L1, or a corner."""
    if math.isinf(L0(0.5)):
        return f"{L0(1.0):g} for L1 ≥ 1, none below"
    power = round(math.log2(L0(1.0) / L0(2.0)))
    return f"{L0(1.0):g}" + {0: "", 1: " / L1"}.get(power, f" / L1^{power}")


def smoothness_table(own: pd.DataFrame) -> str:
    lines = []
    for _, row in own.iterrows():
        curve = CURVES[row["name"]]
        smooth = "no" if math.isinf(curve.lipschitz) else f"L = {curve.lipschitz:g}"
        lines.append([
            row["name"],
            "yes" if curve.bounded_below else "no",
            ", ".join(f"{value:.3g}" for value in row["growth"]),
            smooth,
            written(curve.frontier),
            f"{row['frontier_error']:.1g}",
        ])  # fmt: skip
    head = ["f", "bounded below", "largest curvature for \\|x\\| up to R/100, R/10, R", "L-smooth"]
    return markdown([*head, "smallest L0 of an L1", "grid against formula"], lines)


def inequality_table(own: pd.DataFrame) -> str:
    lines = []
    for _, row in own.iterrows():
        factors = [row[name] for name in ("short", "to_radius", "far", "short_scaled", "to_radius_scaled")]
        safe = "all tried" if math.isinf(row["safe_factor"]) else f"{row['safe_factor']:.2f}"
        lines.append([row["name"], f"{row['L0']:g}, 1", *(f"{factor:.3g}" for factor in factors), safe])
    head = ["f", "L0, L1", "steps up to .1/L1", "up to 1/L1", "up to 100/L1", "A L0, B L1: up to .1/L1", "up to 1/L1"]
    return markdown([*head, "largest safe kappa"], lines)


def split(own: pd.DataFrame) -> pd.DataFrame:
    names = own["name"].str.rsplit("/", n=1, expand=True)
    return own.assign(name=names[0], power=names[1].astype(int))


def steps_table(own: pd.DataFrame) -> str:
    lines = []
    for name, of_function in split(own).groupby("name", sort=False):
        for _, row in of_function.sort_values("power").iterrows():
            lines.append([
                str(name).replace("|", "\\|"),
                f"{row['bound']:,.0f}",
                f"{row['fixed_rate']:.2g}",
                f"{row['fixed']:,.0f}",
                f"{row['fixed_from_one_start']:,.0f}",
                f"{row['fixed_by_theorem']:,.0f}",
                f"{row['clipped_rate']:.2g}, {row['clipped_threshold']:.2g}",
                f"{row['clipped']:,.0f}",
                f"{row['clipped_by_theorem']:,.0f}",
                f"{row['fixed'] / row['clipped']:,.0f}",
            ])  # fmt: skip
    head = ["f", "M", "best fixed rate", "steps", "for one start alone", "rate of Theorem 6"]
    return markdown([*head, "best clipped rate, threshold", "steps", "setting of Theorem 3", "fixed / clipped"], lines)


def growth_table(own: pd.DataFrame) -> str:
    """Returns the powers of M by which steps grow over the last two decades, and those that arithmetic predicts."""
    lines = []
    for name, of_function in split(own).groupby("name", sort=False):
        last = of_function.sort_values("power").iloc[[-3, -1]]
        low, high = last["bound"]
        cells = []
        for method, (words, shape) in zip(("fixed", "clipped"), SLOPES[str(name)].grows, strict=True):
            before, after = last[method]
            decades = math.log10(high / low)
            cells += [words, f"{math.log10(shape(high) / shape(low)) / decades:.2f}"]
            cells += [f"{math.log10(after / before) / decades:.2f}"]
        lines.append([str(name).replace("|", "\\|"), f"{low:,.0f} to {high:,.0f}", *cells])
    each = ["grows like", "predicted power", "measured"]
    return markdown(["f", "M", *(f"{method}: {cell}" for method in ("fixed", "clipped") for cell in each)], lines)


def bounds_table(own: pd.DataFrame) -> str:
    lines = []
    for _, row in own.sort_values("bound").iterrows():
        steps = [row[name] for name in ("fixed_at_least", "fixed", "fixed_at_most", "clipped", "clipped_at_most")]
        ratio, proved = row["fixed"] / row["clipped"], row["fixed_at_least"] / row["clipped_at_most"]
        lines.append([f"{row['bound']:,.0f}", *(f"{value:.3g}" for value in steps), f"{ratio:,.3g}", f"{proved:.2g}"])
    head = ["M", "fixed: at least", "fixed: counted", "fixed: at most", "clipped: counted", "clipped: at most"]
    return markdown([*head, "counted ratio", "proved ratio"], lines)


def verdicts_table(rows: pd.DataFrame) -> str:
    lines = []
    for kind in ("scan", "descent"):
        for _, row in of_kind(rows, kind).iterrows():
            name, _, where = row["name"].rpartition("/") if kind == "scan" else (row["name"], "", "along descent")
            low, high = row["exponent_interval"]
            exponents = "–" if math.isnan(low) else f"{low:.2f} to {high:.2f}"
            lines.append([
                name.replace("|", "\\|"),
                SURFACES[name].truth,
                f"scan, {where}" if kind == "scan" else where,
                f"{row['decades']:.1f}",
                row["verdict"],
                f"{row['L0']:.2g}, {row['L1']:.2g}",
                exponents,
                ", ".join(row["flags"]) or "none",
                row["shuffled"],
            ])  # fmt: skip
    head = ["landscape", "law", "rows", "decades of gradient", "verdict", "L0, L1", "exponent", "flags"]
    return markdown([*head, "verdict, shuffled"], lines)


def draw(rows: pd.DataFrame, traces: Path) -> Figure:
    """Returns the figure: steps of both methods on one function, and on two functions at once with the bounds."""
    import seaborn as sns

    colors = sns.color_palette("colorblind")
    figure = Figure(figsize=(9.0, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, (name, own) in zip(colors, split(of_kind(rows, "race")).groupby("name", sort=False), strict=False):
        for method, marker, dashes in (("fixed", "s", "-"), ("clipped", "o", "--")):
            look: dict[str, Any] = {"color": color, "marker": marker, "markersize": 4, "linestyle": dashes}
            left.plot(own["bound"], own[method], label=f"{name}, {method}", **look)
    pair = of_kind(rows, "pair")
    for color, method in ((colors[3], "fixed"), (colors[0], "clipped")):
        right.plot(pair["bound"], pair[method], "o-", color=color, markersize=4, label=f"{method}, counted")
        right.plot(pair["bound"], pair[f"{method}_at_most"], ":", color=color, label=f"{method}, theorem: at most")
    at_least: dict[str, Any] = {"color": "black", "linewidth": 1.0, "linestyle": "--", "zorder": 3}
    right.plot(pair["bound"], pair["fixed_at_least"], label="fixed, theorem: at least", **at_least)
    left.set_ylabel("steps to a gradient of 0.01")
    for ax, title in (
        (left, "One function, best settings"),
        (right, "One setting for the hybrid and the flat function"),
    ):
        ax.set_title(title, size="medium")
        ax.set(xscale="log", yscale="log", xlabel="gradient at the start, M")
        ax.legend(fontsize="small", frameon=False)
        sns.despine(ax=ax)
    return figure


EXPERIMENT = Experiment("accounts", cases, run, tables, "docs/reproduce/accounts.md", {"reproduce_accounts.png": draw})

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
