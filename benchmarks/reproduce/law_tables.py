"""Tables of which_law.py: verdicts, constants, exponents, rivals, secants, and descents."""

from collections import Counter
from collections.abc import Iterable, Iterator

import pandas as pd
from checkpoints import KNOWN, NETS, SUBJECTS
from experiment import markdown

from smoothdiag.fits.verdict import MIN_EXPONENT_GAP

FLAT = ("quadratic", "regression")
"""Landscapes with one curvature everywhere: whatever rises there is the instrument."""

CLEAR = 0.5
"""Rank correlation from which a descent counts as one way or the other."""

FEW = 9
"""Points from which a descent is counted once more: a rank correlation of fewer says little."""

CLEARLY = 1 + MIN_EXPONENT_GAP
"""Lower end of the exponent's interval from which the library itself takes an exponent for larger than 1."""

MODELS = ("affine", "power", "isotonic", "distance", "loss gap")


def tables(rows: pd.DataFrame) -> dict[str, str]:
    larger, rows = rows[rows["times"] > 1], usual(rows)
    nets = rows[rows["subject"].isin(NETS)]
    return {
        "sum": totals(nets, rows[rows["subject"].isin(KNOWN)]),
        "said": said(nets, rows[rows["subject"].isin(KNOWN)]),
        "leaving": leaving(nets),
        "constants": constants(nets),
        "rivals": rivals(nets),
        "secants": secants(rows),
        "arriving": arriving(rows),
        "ways": ways(nets[nets["subject"] != "logistic"]),
        "known": known(rows[rows["subject"].isin(KNOWN)]),
        "examples": examples(nets, larger),
        "cost": cost(rows, larger),
    }


def usual(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the scans on as many examples as a training batch has."""
    return rows[~(rows["times"] > 1)]


def cells(rows: pd.DataFrame) -> Iterator[tuple[str, int, pd.DataFrame]]:
    """Yields subject, stage and the rows of all seeds, in the order of the subjects."""
    order = {name: k for k, name in enumerate(SUBJECTS)}
    for name, of in sorted(rows.groupby("subject"), key=lambda part: order[str(part[0])]):
        for stage, part in of.groupby("stage"):
            yield str(name), int(str(stage)), part


def short(value: float, digits: int = 2) -> str:
    text = f"{value:.{digits}f}" if abs(value) < 100 else f"{value:.0f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") and digits else text


def span(values: Iterable[float], digits: int = 2) -> str:
    """The smallest and the largest of the values that are known."""
    known = pd.Series(values, dtype=float).dropna()
    if known.empty:
        return "-"
    low, high = short(known.min(), digits), short(known.max(), digits)
    return low if low == high else f"{low} to {high}"


def ends(low: pd.Series, high: pd.Series, digits: int = 2) -> str:
    """From the lowest lower end of the seeds' intervals to the highest upper end."""
    return span([low.min(), high.max()], digits)


def counts(values: Iterable[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in Counter(values).most_common() if name)


def rises(rows: pd.DataFrame) -> pd.Series:
    """Whether the fit says so: the interval of L1 lies above zero, and the line rises 1.25-fold or more.

    The interval alone proves little: where ||H|| is known to a part in a thousand, the smallest error has a sign.
    """
    said = rows["reason"].str.contains("smoothness rises along these lines", regex=False)
    return said | rows["verdict"].isin(["L0L1", "POWER"])


def parts(rows: pd.DataFrame, known: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Every network, all of them, and constant curvature.

    Args:
        rows: Scans of networks.
        known: Scans of landscapes.
    """
    found = [(name, rows[rows["subject"] == name]) for name in NETS if name in set(rows["subject"])]
    found += [("the six networks", rows[rows["subject"] != "logistic"]), ("all seven", rows)]
    return [*found, ("constant by law", known[known["subject"].isin(FLAT)])]


def totals(rows: pd.DataFrame, known: pd.DataFrame) -> str:
    """How often each verdict came."""
    names = ("CONSTANT", "L0L1", "POWER", "LOSS_GAP", "NOT_IDENTIFIED")
    lines = [
        [name, len(part), *((part["verdict"] == verdict).sum() for verdict in names)]
        for name, part in parts(rows, known)
    ]
    return markdown(["network", "scans", *names], lines)


def said(rows: pd.DataFrame, known: pd.DataFrame) -> str:
    """What can be said without a verdict, and how much the points scatter."""
    head = ["network", "scans", "error factor: median", "10% to 90%", "L1 above zero", "‖H‖ rises for sure", "L0 = 0"]
    head += ["exponent below 1", "above 1", f"above {CLEARLY}"]
    lines = [
        [
            name,
            len(part),
            short(part["factor"].median()),
            span(part["factor"].quantile([0.1, 0.9])),
            (part["L1_low"] > 0).sum(),
            rises(part).sum(),
            (part["L0"] == 0).sum(),
            (part["exponent_high"] < 1).sum(),
            (part["exponent_low"] > 1).sum(),
            (part["exponent_low"] > CLEARLY).sum(),
        ]
        for name, part in parts(rows, known)
    ]
    return markdown(head, lines)


def leaving(rows: pd.DataFrame) -> str:
    head = ["network", "steps", "loss", "verdicts", "decided by", "exponent", "decades", "error factor", "points"]
    return markdown(
        head,
        [
            [
                name,
                stage,
                span(part["loss"]),
                counts(part["verdict"]),
                counts(part["why"]),
                ends(part["exponent_low"], part["exponent_high"]),
                span(part["decades"], 1),
                span(part["factor"], 1),
                span(part["points"], 0),
            ]
            for name, stage, part in cells(rows)
        ],
    )


def constants(rows: pd.DataFrame) -> str:
    head = ["network", "steps", "L0", "its 90% intervals", "L1", "its 90% intervals", "gradients for the exponent"]
    return markdown(
        head,
        [
            [
                name,
                stage,
                span(part["L0"]),
                ends(part["L0_low"], part["L0_high"]),
                span(part["L1"]),
                ends(part["L1_low"], part["L1_high"]),
                span(part["needed"], 0),
            ]
            for name, stage, part in cells(rows)
        ],
    )


def rivals(rows: pd.DataFrame) -> str:
    """Medians over the seeds of the share of the constant's error that each model removes on lines left out."""
    return markdown(
        ["network", "steps", *MODELS],
        [
            [name, stage, *(f"{part[f'skill {model}'].median():.2f}" for model in MODELS)]
            for name, stage, part in cells(rows)
        ],
    )


def secants(rows: pd.DataFrame) -> str:
    head = ["network", "steps", "‖H‖: exponent", "secants: exponent", "secants: verdicts", "secant / ‖H‖", "at kinks"]
    return markdown(
        head,
        [
            [
                name,
                stage,
                ends(part["exponent_low"], part["exponent_high"]),
                ends(part["secant_low"], part["secant_high"]),
                counts(part["secant_verdict"].dropna()),
                span(part["secant"]),
                f"{part['kinks'].mean():.0%}",
            ]
            for name, stage, part in cells(rows)
        ],
    )


def arriving(rows: pd.DataFrame) -> str:
    head = ["network", "steps", "points", "rank correlation", "decades", "loss falls to", "‖H‖ changes by"]
    return markdown(
        head,
        [
            [
                name,
                stage,
                span(part["down_points"], 0),
                span(part["down_rank"]),
                span(part["down_decades"], 1),
                span(part["down_loss"]),
                span(part["down_hessian"], 1),
            ]
            for name, stage, part in cells(rows)
        ],
    )


def ways(six: pd.DataFrame) -> str:
    """How many descents go which way, by stage, by network, and among those with more points."""

    def line(name: str, part: pd.DataFrame) -> list[object]:
        with_it, against = (part["down_rank"] > CLEAR).sum(), (part["down_rank"] < -CLEAR).sum()
        return [name, len(part), against, with_it, len(part) - with_it - against]

    found = [(f"{stage} steps", part) for stage, part in six.groupby("stage")]
    found += [("all", six), (f"of them with {FEW} points or more", six[six["down_points"] >= FEW])]
    found += [(name, six[six["subject"] == name]) for name in NETS if name in set(six["subject"])]
    head = ["six networks", "descents", "‖H‖ rises (rank < -.5)", "falls, too (rank > .5)", "neither"]
    return markdown(head, [line(name, part) for name, part in found])


def known(rows: pd.DataFrame) -> str:
    head = [
        "landscape",
        "steps",
        "its law",
        "verdicts",
        "decided by",
        "decades",
        "error factor",
        "exponent",
        "L0",
        "L1",
    ]
    head += ["on secants: verdicts", "exponent above 0", "above 1"]
    return markdown(
        head,
        [
            [
                name,
                stage,
                KNOWN[name].law,
                counts(part["verdict"]),
                counts(part["why"]),
                span(part["decades"]),
                span(part["factor"], 4),
                ends(part["exponent_low"], part["exponent_high"]),
                span(part["L0"]),
                span(part["L1"]),
                counts(part["secant_verdict"].dropna()),
                *((part["secant_low"] > least).sum() for least in (0, 1)),
            ]
            for name, stage, part in cells(rows)
        ],
    )


def examples(nets: pd.DataFrame, larger: pd.DataFrame) -> str:
    """The same point on four times as many examples, and how many of its points a fit may use."""
    head = ["network", "steps", "verdict", "exponent", "L1", "on four times the examples: verdict", "exponent", "L1"]
    head += ["points", "not converged", "gradients"]
    lines = []
    for name, stage, part in cells(larger):
        of = nets[(nets["subject"] == name) & (nets["stage"] == stage) & (nets["seed"] == 0)]
        both = [(p["verdict"].iloc[0], ends(p["exponent_low"], p["exponent_high"]), span(p["L1"])) for p in (of, part)]
        spent = [int(part[column].fillna(0).iloc[0]) for column in ("status ok", "status not_converged", "gradients")]
        lines.append([name, stage, *both[0], *both[1], *spent])
    return markdown(head, lines)


def cost(rows: pd.DataFrame, larger: pd.DataFrame) -> str:
    """CPU minutes of each network, training and fits included; and what scan_power.py takes for typical of a scan."""
    minutes = [[name, f"{rows.loc[rows['subject'] == name, 'seconds'].sum() / 60:.1f}"] for name in SUBJECTS]
    minutes.append(["four times the examples", f"{larger['seconds'].sum() / 60:.1f}"])
    whole = [*minutes, ["all", f"{(rows['seconds'].sum() + larger['seconds'].sum()) / 60:.1f}"]]
    nets = rows[rows["subject"].isin(NETS)]
    typical = {
        "points": nets["points"].median(),
        "lines": nets["lines"].median(),
        "gradients for a point": (nets["gradients"] / nets["points"]).median(),
    }
    of = ", ".join(f"{value:.0f} {name}" for name, value in typical.items())
    of += (
        f", {nets['decades'].median():.1f} decades of gradient norms, an error factor of {nets['factor'].median():.1f}"
    )
    return f"{markdown(['what', 'CPU minutes'], whole)}\n\nThe median scan of a network has {of}."
