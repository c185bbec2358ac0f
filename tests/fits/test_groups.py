"""fits.groups: several fits stand beside each other, by group and by run."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

import smoothdiag as sd
from smoothdiag.fits.text import WIDTH

LAWS = {"head": (3.0, 0.5), "all": (1.0, 2.0), "body": (0.5, 4.0)}


def rows(group: str = "all", num_rows: int = 200, estimator: str = "local", **columns: Any) -> pd.DataFrame:
    """The law of the group over three decades, with a little noise."""
    rng = np.random.default_rng(len(group))
    L0, L1 = LAWS.get(group, (1.0, 1.0))
    norm = 10 ** rng.uniform(-2, 1, num_rows)
    frame = pd.DataFrame(
        {
            "step": np.arange(num_rows),
            "group": group,
            "estimator": estimator,
            "grad_norm": norm,
            "smoothness": (L0 + L1 * norm) * np.exp(0.1 * rng.standard_normal(num_rows)),
            "saturation": 0.1,
        }
    )
    return frame.assign(**columns)


@pytest.fixture(scope="module")
def trace() -> pd.DataFrame:
    """Three groups, and two whose rows cannot be fitted."""
    others = [rows("dead", smoothness=0.0), rows("path only", estimator="path")]
    return pd.concat([rows(group) for group in LAWS] + others, ignore_index=True)


@pytest.fixture(scope="module")
def fits(trace: pd.DataFrame) -> sd.GroupFits:
    return sd.fit_groups(trace, num_boot=60)


@pytest.mark.thorough
def test_every_group_has_the_fit_it_has_alone(trace: pd.DataFrame, fits: sd.GroupFits) -> None:
    assert list(fits) == ["all", "head", "body"], "all comes first, the others as they were recorded"
    assert len(fits) == 3
    for group, (L0, L1) in LAWS.items():
        assert fits[group] == sd.fit_smoothness(trace, group=group, num_boot=60)
        assert fits[group].L0 == pytest.approx(L0, rel=0.35)
        assert fits[group].L1 == pytest.approx(L1, rel=0.35)
        assert fits[group].verdict is sd.Verdict.L0L1


def test_group_that_cannot_be_fitted_has_a_reason(fits: sd.GroupFits) -> None:
    assert list(fits.failed) == ["dead", "path only"]
    assert "all dropped (zero_smoothness: 200)" in fits.failed["dead"]
    assert "dead" not in fits
    with pytest.raises(KeyError, match=r"'dead' has no fit: .*zero_smoothness"):
        fits["dead"]
    with pytest.raises(KeyError, match="nowhere"):
        fits["nowhere"]


def test_groups_are_never_fitted_by_rows_of_different_estimators(trace: pd.DataFrame, fits: sd.GroupFits) -> None:
    assert "one of ['path']. Found `estimator = 'local'`" in fits.failed["path only"]
    assert sd.fit_groups(trace, groups=["path only"], num_boot=20)["path only"].estimator == "path"


def test_table_has_a_row_per_group(fits: sd.GroupFits) -> None:
    table = fits.table()
    assert table.index.name == "group"
    assert list(table.index) == ["all", "head", "body", "dead", "path only"]
    for group, fit in fits.items():
        row = table.loc[group]
        assert (row["L0"], row["L1"]) == (fit.L0, fit.L1)
        assert (row["L0_low"], row["L0_high"]) == fit.L0_interval
        assert (row["L1_low"], row["L1_high"]) == fit.L1_interval
        assert (row["decades"], row["num_effective"]) == (fit.decades, fit.num_effective)
        assert (row["verdict"], row["reason"]) == (fit.verdict.name, fit.verdict_reason)
    assert table.loc["dead", ["L0", "L1", "decades"]].isna().all()
    assert table.loc["dead", "reason"] == fits.failed["dead"]
    assert table["L0"].dtype == table["L1_high"].dtype == np.float64


def test_summary_has_a_line_per_group_of_one_width(fits: sd.GroupFits) -> None:
    text = str(fits)
    assert text == fits.summary()
    for group, fit in fits.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"{group} ") and "L0L1" in line]
        assert f"{fit.L0:.3g}" in line
        assert f"{fit.L1:.3g}" in line
        assert len(line) <= WIDTH
    assert "dead has no fit: Parameter `data` should have usable rows" in text
    assert "estimator local" in text
    assert "quantile 0.95" in text


@pytest.mark.thorough
def test_asked_groups_and_options_are_followed(trace: pd.DataFrame) -> None:
    found = sd.fit_groups(trace, groups=["body", "all"], quantile=0.5, num_boot=20)
    assert list(found) == ["body", "all"]
    assert {fit.quantile for fit in found.values()} == {0.5}
    assert list(sd.fit_groups(trace, groups="body", num_boot=20)) == ["body"]


@pytest.mark.thorough
def test_several_runs_and_tables_without_groups_count_too() -> None:
    runs = [pd.concat([rows(group) for group in ("all", "head")]) for _ in range(2)]
    assert [fit.num_runs for fit in sd.fit_groups(runs, num_boot=20).values()] == [2, 2]
    assert list(sd.fit_groups(rows().drop(columns="group"), num_boot=20)) == ["all"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": ["nowhere"]}, r"`groups` should hold some of \['all', 'head', .*Found \['nowhere'\]"),
        ({"groups": []}, r"`groups` should hold some of .*Found none"),
        ({"quantile": 2.0}, r"`quantile` should be in \(0, 1\)"),
        ({"estimator": "nothing"}, "`estimator` should be one of"),
        ({"groups": ["dead"]}, "should have usable rows for the group 'dead'"),
    ],
)
def test_wrong_input_is_named(trace: pd.DataFrame, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sd.fit_groups(trace, **options)


def test_runs_stand_beside_each_other_by_name(fits: sd.GroupFits) -> None:
    table = sd.compare_runs({"warm-up": fits["head"], "plain": fits["all"]})
    assert table.index.name == "run"
    assert list(table.index) == ["warm-up", "plain"]
    assert table["group"].tolist() == ["head", "all"]
    assert table["L1"].tolist() == [fits["head"].L1, fits["all"].L1]
    assert table["quantile"].tolist() == [0.95, 0.95]


@pytest.mark.parametrize(
    ("wrong", "found"), [({}, "none"), ({"a": rows()}, "DataFrame at 'a'")], ids=["empty", "tables"]
)
def test_what_is_no_fit_is_refused(wrong: Any, found: str) -> None:
    with pytest.raises(ValueError, match=f"`fits` should hold fits by name. Found {found}"):
        sd.compare_runs(wrong)


def test_summary_of_one_fit_explains_its_columns_and_writes_no_nan(fits: sd.GroupFits) -> None:
    few = sd.fit_smoothness(rows(num_rows=6)).summary()
    assert np.isnan(sd.fit_smoothness(rows(num_rows=6)).comparison[1].skill)
    for text in (fits["all"].summary(), few):
        assert "nan" not in text
        assert "skill: share of the constant's later loss that is removed" in text
        assert "max_lr = 1/L0 = " in text
        assert "step_cap = 1/L1 = " in text
        assert "quantile 0.9 " in text
        assert "hard envelope" in text
        assert max(map(len, text.splitlines())) <= WIDTH
        assert not any(line.endswith(" ") for line in text.splitlines())
    assert "(blocks the verdict)" in few
