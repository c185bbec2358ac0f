"""Counts of verdicts, kept in a JSON file as they come, and the table of them."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import smoothdiag as sd

VERDICTS = tuple(verdict.name for verdict in sd.Verdict)
CASES = ("null_runs.py", "probed_runs.py", "true_laws.py")
WORST_CASE, WORST_SHARE = 3, 0.05  # Most L0L1 of 20 seeds in one null case, and in all of them together.


def digest() -> str:
    """Returns a digest of the library and of the cases, so that verdicts of two versions never share a file."""
    folder = Path(sd.__file__).parent
    found = hashlib.sha256()
    for path in (*sorted(folder.rglob("*.py")), *(Path(__file__).with_name(name) for name in CASES)):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON so that a kill leaves the old file or the new one."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)


def read(path: Path | None, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Returns what a file holds, None where there is no file.

    Raises:
        ValueError: If the file has results of another source or of other settings.
    """
    if path is None or not path.exists():
        return None
    kept: dict[str, Any] = json.loads(path.read_text())
    if kept["settings"] != settings:
        raise ValueError(f"{path} has results of {kept['settings']}, not {settings}: choose another --out.")
    return kept


class Tally:
    """Fits of cases by seed and quantile; every fit is written down before the next one begins.

    Args:
        path: JSON file; one of the same source and settings is continued.
        settings: what else has to agree before results can be continued.
    """

    def __init__(self, path: Path | None, **settings: Any) -> None:
        self.path, self.settings = path, {"source": digest(), **settings}
        kept = read(path, self.settings)
        self.cases: dict[str, dict[str, Any]] = {} if kept is None else kept["cases"]

    def lacks(self, case: str, quantiles: Sequence[float], seed: int) -> list[float]:
        """Returns the quantiles at which a case has no fit of that seed."""
        fits = self.cases.get(case, {}).get("fits", {})
        return [quantile for quantile in quantiles if str(seed) not in fits.get(f"{quantile:g}", {})]

    def add(self, case: str, facts: dict[str, Any], quantile: float, seed: int, fit: sd.SmoothnessFit) -> None:
        found = self.cases.setdefault(case, {**facts, "fits": {}})
        found["fits"].setdefault(f"{quantile:g}", {})[str(seed)] = {
            "verdict": fit.verdict.name,
            "flags": [flag.name for flag in fit.flags],
            "decades": round(fit.decades, 3),
            "num_effective": round(fit.num_effective, 1),
        }
        if self.path is not None:
            write(self.path, {"settings": self.settings, "cases": self.cases})

    def counts(self, case: str, quantile: str) -> Counter[str]:
        return Counter(fit["verdict"] for fit in self.cases[case]["fits"][quantile].values())

    def of(self, kind: str) -> Iterator[tuple[str, str]]:
        """Yields the cases of a kind, each with its quantiles."""
        for case, found in self.cases.items():
            if found["kind"] == kind:
                yield from ((case, quantile) for quantile in sorted(found["fits"]))

    def table(self, kind: str) -> Iterator[str]:
        """Yields the lines of a Markdown table: counts of verdicts, and of the flags that were raised."""
        yield "| case | quantile | decades | " + " | ".join(VERDICTS) + " | flags |"
        yield "|---|---|---|" + "---|" * (len(VERDICTS) + 1)
        for case, quantile in self.of(kind):
            fits, counts = self.cases[case]["fits"][quantile].values(), self.counts(case, quantile)
            flags = Counter(flag for fit in fits for flag in fit["flags"])
            decades = sorted(fit["decades"] for fit in fits)[len(fits) // 2]
            listed = ", ".join(f"{name} {count}" for name, count in flags.most_common())
            cells = (case, quantile, f"{decades:.1f}", *(str(counts[name] or "") for name in VERDICTS), listed)
            yield "| " + " | ".join(cells) + " |"

    def false_laws(self) -> Iterator[str]:
        """Yields what the null cases show, with those above the limits."""
        found = [(case, quantile, self.counts(case, quantile)) for case, quantile in self.of("null")]
        fits = sum(counts.total() for _, _, counts in found)
        wrong = sum(counts["L0L1"] for _, _, counts in found)
        if fits:
            share = wrong / fits
            yield f"Nulls: {wrong} of {fits} fits are L0L1, {share:.1%} ({'met' if share <= WORST_SHARE else 'MISSED'})"
        for kind in ("null", "known"):
            most = WORST_CASE if kind == "null" else 1
            for case, quantile in self.of(kind):
                counts = self.counts(case, quantile)
                if counts["L0L1"] > most / 20 * counts.total():
                    wrong = f"{counts['L0L1']} of {counts.total()} are L0L1"
                    yield f"MISSED: {case} at {quantile}: {wrong}, goal {most} of 20"

    def true_laws(self) -> Iterator[str]:
        """Yields the laws that got their verdict too seldom, and the other laws that pass for a line."""
        for case, quantile in self.of("law"):
            facts, counts = self.cases[case], self.counts(case, quantile)
            right = f"{counts[facts['right']]} of {counts.total()} are {facts['right']}"
            if facts["least"] is not None and counts[facts["right"]] < facts["least"] * counts.total():
                yield f"MISSED: {case} at {quantile}: {right}, goal {facts['least']:.0%}"
            elif facts["right"] != "L0L1" and counts["L0L1"]:
                yield f"{case} at {quantile}: {right}, {counts['L0L1']} L0L1"
