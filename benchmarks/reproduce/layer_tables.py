"""Tables of layers.py: what layer-wise constants say about the step, about noise, and about the landscape."""

import math
from typing import Any

import pandas as pd
from experiment import markdown
from law_tables import counts, short, span
from layer_runs import LONGEST_STEP, RADII

from smoothdiag.optim.scion import Kind

KINDS = ("other", "null", "same", "short")

SOME = ("other verdict", *(f"short {name}" for name in ("verdict", "decades", "flags", "fit", "low", "high")), "bias")
"""Columns that only some layers or runs have."""

MATRICES = ("mix", "out", "up", "down", "tokens", "places")
"""Parts of names of layers, in the order of the tables."""

WORDS = {
    "mix": "attention, queries, keys and values",
    "out": "attention, output",
    "up": "hidden units, first matrix",
    "down": "hidden units, second matrix",
    "tokens": "embedding and head",
    "places": "places",
}

GROUPS = {
    "hidden matrices": ("mix", "out", "up", "down"),
    "embedding and head": ("tokens",),
    "places": ("places",),
}
"""Parts of names of layers that a line of a table holds together."""

PUBLISHED: dict[Kind, tuple[float, float, float]] = {"hidden": (67.0, 71.0, 0.018), "tied": (1.3, 1.3, 1.08)}
"""Least and largest L1 of NanoGPT with 124 million weights, and the step that it was trained with, in the own norm."""

TRUTH = {"quadratic": 0.0, "exponential": 2.0}


def layers_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns a row for each run, layer and norm."""
    found: list[dict[str, Any]] = []
    for run in rows.to_dict("records"):
        of = {key: run[key] for key in ("name", "factor", "batch", "seed", "first_loss", "loss")}
        found += [of | layer | {"part": part_of(layer["layer"])} for layer in run["layers"]]
    frame = pd.DataFrame(found)
    frame = frame.reindex(columns=[*frame, *(name for name in SOME if name not in frame)])
    for kind in KINDS:
        frame[f"{kind} share"] = frame[f"{kind} L1"] * frame["length"] / math.sqrt(2)
    return frame


def part_of(layer: str) -> str:
    return next((part for part in MATRICES if part in layer.split(".")), "")


def kind_of(part: str) -> str:
    return "tied" if part in ("tokens", "places") else "hidden"


def tables(rows: pd.DataFrame) -> dict[str, str]:
    found = layers_of(rows)
    gpt = found[found["name"] == "gpt"]
    usual = gpt[(gpt["factor"] == 1) & (gpt["batch"] == 16)]
    return {
        "follows": follows(gpt[gpt["norm"] == "own"]),
        "steps": steps(gpt[gpt["norm"] == "own"]),
        "constants": constants(gpt[gpt["norm"] == "own"]),
        "published": published(usual[usual["norm"] == "own"]),
        "weights": weights(gpt[(gpt["norm"] == "own") & (gpt["part"].map(kind_of) == "hidden")]),
        "layers": by_layer(usual[usual["norm"] == "own"]),
        "euclidean": euclidean(usual[usual["norm"] == "Euclidean"]),
        "known": known(found[(found["name"] != "gpt") & (found["norm"] == "own")]),
        "cost": cost(rows),
    }


def conditions(gpt: pd.DataFrame) -> list[tuple[float, int, pd.DataFrame]]:
    both = gpt[["batch", "factor"]].drop_duplicates().sort_values(["batch", "factor"])
    return [
        (factor, batch, gpt[(gpt["batch"] == batch) & (gpt["factor"] == factor)])
        for batch, factor in both.itertuples(index=False)
    ]


def follows(gpt: pd.DataFrame) -> str:
    """By how much the published constant differs from the step's, and from the landscape's, over all lengths of steps.

    A constant that is the step keeps L1 t / √2; one that is the landscape keeps its ratio to L1 of "short".
    """
    head = [
        "layers",
        "steps over a factor of",
        "L1 falls by a factor of",
        "L1, short, falls by",
        "medians of L1 t / √2",
    ]
    head += ["medians of L1 / L1, short", "L1 / L1, short: all"]
    lines = []
    for words, parts in GROUPS.items():
        of = gpt[gpt["part"].isin(parts) & (gpt["batch"] == 16)]
        if of.empty:
            continue
        middle = of.groupby("factor").median(numeric_only=True)
        falls = [middle[name].iloc[0] / middle[name].iloc[-1] for name in ("other L1", "short fit")]
        ratio = (of["other L1"] / of["short fit"]).groupby(of["factor"])
        factors = middle.index[-1] / middle.index[0]
        medians = (span(middle["other share"]), span(ratio.median()))
        lines.append(
            [
                words,
                f"{factors:g}",
                *(f"{fall:.2g}" for fall in falls),
                *medians,
                span(of["other L1"] / of["short fit"]),
            ]
        )
    return markdown(head, lines)


def steps(gpt: pd.DataFrame) -> str:
    """For each length of steps: the step that the published fit allows, and what its quotient consists of."""
    head = ["layers", "batch", "step t / published", "held-out loss", "t", "1/L1, other batches", "L1 t / √2: median"]
    head += ["all", "noise / other", "same / other", "saturation, same"]
    lines = []
    for words, parts in GROUPS.items():
        for factor, batch, part in conditions(gpt[gpt["part"].isin(parts)]):
            of = part.median(numeric_only=True)
            lines.append(
                [
                    words,
                    batch,
                    f"{factor:g}",
                    f"{part['first_loss'].median():.2f} to {part['loss'].median():.2f}",
                    f"{of['length']:.2g}",
                    f"{1 / of['other L1']:.2g}",
                    short(of["other share"]),
                    span(part["other share"]),
                    span(part["noise"]),
                    span(part["moved"]),
                    span(part["same saturation"]),
                ]
            )
    return markdown(head, lines)


def constants(gpt: pd.DataFrame) -> str:
    """Medians of L1 by each kind of rows, and the interval of the last: medians of its ends."""
    head = ["layers", "batch", "step t / published", "L1, other batches", "noise alone", "same examples", "short"]
    head += ["its 90% interval", "decades of gradient norms", "verdicts: short", "first flag"]
    lines = []
    for words, parts in GROUPS.items():
        for factor, batch, part in conditions(gpt[gpt["part"].isin(parts)]):
            of = part.median(numeric_only=True)
            found = [sized([of[name]]) for name in ("other L1", "null L1", "same L1", "short fit")]
            interval = sized([of["short low"], of["short high"]])
            flags = [names[0] for names in part["short flags"].dropna() if names]
            said = [span(part["short decades"], 1), counts(part["short verdict"].dropna()), counts(flags)]
            lines.append([words, batch, f"{factor:g}", *found, interval, *said])
    return markdown(head, lines)


def weights(hidden: pd.DataFrame) -> str:
    """The published fit with other weights of points above the line: medians of L1 t / √2, and fits without L0."""
    names = [str(column) for column in hidden if str(column).startswith("other L1 at ")]
    head = ["batch", "step t / published", *(f"weight {name.split()[-1]}" for name in names), "fits with L0 = 0"]
    lines = []
    for factor, batch, part in conditions(hidden):
        shares = [(part[name] * part["length"]).median() / math.sqrt(2) for name in names]
        zero = (part["other L0"] == 0).sum()
        lines.append([batch, f"{factor:g}", *map(short, shares), f"{zero} of {len(part)}"])
    return markdown(head, lines)


def published(usual: pd.DataFrame) -> str:
    """The published constants times the published steps, which five steps of Newton and Schulz make longer as here."""
    head = ["layers", "L1, published", "step, published", "L1 step / √2", "a step here / its radius"]
    head += ["L1 times such a step / √2", "L1 here: 10% to 90%", "all"]
    lines = []
    for (kind, (low, high, step)), (words, parts) in zip(PUBLISHED.items(), GROUPS.items(), strict=False):
        part = usual[usual["part"].isin(parts)]
        longer = float(part["length"].median()) / (LONGEST_STEP * RADII[kind])
        at, longest = ([value * by / math.sqrt(2) for value in (low, high)] for by in (step, step * longer))
        here = [sized(part["other L1"].quantile([0.1, 0.9])), sized(part["other L1"])]
        lines.append([words, span([low, high], 1), step, span(at), short(longer), span(longest), *here])
    return markdown(head, lines)


def by_layer(part: pd.DataFrame) -> str:
    """Ranges over blocks and seeds; of the ratio of the constants of noise and of other batches the median, too."""
    head = ["layer", "L1, other batches", "L1 t / √2", "L1, noise alone", "its share of L1: median", "noise / other"]
    head += ["L1, same examples", "L1, short", "its 90% intervals", "verdicts: other batches", "short"]
    lines = []
    for name in MATRICES:
        of = part[part["part"] == name]
        lines.append(
            [
                WORDS[name],
                sized(of["other L1"]),
                span(of["other share"]),
                sized(of["null L1"]),
                short((of["null L1"] / of["other L1"]).median()),
                span(of["noise"]),
                sized(of["same L1"]),
                sized(of["short fit"]),
                sized([of["short low"].min(), of["short high"].max()]),
                counts(of["other verdict"].dropna()),
                counts(of["short verdict"].dropna()),
            ]
        )
    return markdown(head, lines)


def euclidean(part: pd.DataFrame) -> str:
    head = ["layer", "L1, other batches", "L1 t / √2", "noise / other", "L1, short, without bias", "its 90% intervals"]
    head += ["verdicts: short", "one batch / two halves"]
    lines = []
    for name in MATRICES:
        of = part[part["part"] == name]
        lines.append(
            [
                WORDS[name],
                sized(of["other L1"]),
                span(of["other share"]),
                span(of["noise"]),
                sized(of["short fit"]),
                sized([of["short low"].min(), of["short high"].max()]),
                counts(of["short verdict"].dropna()),
                span(of["bias"]),
            ]
        )
    return markdown(head, lines)


def known(part: pd.DataFrame) -> str:
    head = ["landscape", "true L1", "√2 / step", "L1, other batches", "L1, noise alone", "L1, same examples"]
    head += ["L1, short", "its 90% intervals", "verdicts: other batches", "short", "first flag, short"]
    lines = []
    for name, truth in TRUTH.items():
        of = part[part["name"] == name]
        lines.append(
            [
                name,
                f"{truth:g}",
                f"{math.sqrt(2) / of['length'].median():.3g}",
                *(sized(of[f"{kind} L1"]) for kind in ("other", "null", "same")),
                sized(of["short fit"]),
                sized([of["short low"].min(), of["short high"].max()]),
                counts(of["other verdict"].dropna()),
                counts(of["short verdict"].dropna()),
                counts(names[0] for names in of["short flags"].dropna() if names),
            ]
        )
    return markdown(head, lines)


def sized(values: Any) -> str:
    """The smallest and the largest value, to two digits."""
    known = pd.Series(values, dtype=float).dropna()
    if known.empty:
        return "-"
    low, high = (f"{end:.2g}" if abs(end) < 100 else f"{end:.0f}" for end in (known.min(), known.max()))
    return low if low == high else f"{low} to {high}"


def cost(rows: pd.DataFrame) -> str:
    parts = [[name, len(part), f"{part['seconds'].sum() / 60:.1f}"] for name, part in rows.groupby("name", sort=False)]
    return markdown(["what", "runs", "CPU minutes"], [*parts, ["all", len(rows), f"{rows['seconds'].sum() / 60:.1f}"]])
