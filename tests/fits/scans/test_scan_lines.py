"""fits.scans.lines: points go to their lines, random lines of one kind stay together, and mixtures are refused."""

import numpy as np
import pandas as pd
import pytest
from scans import NAMES, linear, scanned

from smoothdiag.fits import compare_runs, fit_smoothness
from smoothdiag.fits.scans.lines import has_lines, select_lines


def lines_of(frame):
    return select_lines(frame, None, "all")[1]


def test_random_lines_of_one_kind_are_one_unit_and_checkpoints_are_not():
    lines = lines_of(scanned(linear, names=("to s50", "to s400", "random 1", "random 2", "layers 1", "layers 2")))
    units = {name: set(lines.unit[lines.line == number]) for number, name in enumerate(lines.names)}
    assert lines.num_lines == 6
    assert lines.num_units == 4
    assert units["random 1"] == units["random 2"]
    assert units["layers 1"] == units["layers 2"]
    assert units["to s50"] != units["to s400"]


def test_resamples_hold_whole_units_and_the_start_once():
    lines = lines_of(scanned(linear))
    counts = lines.resamples(200, 0)
    assert (counts[:, lines.unit < 0] == 1).all()
    per_unit = np.stack([counts[:, lines.unit == number] for number in range(lines.num_units) if number != 4][:3])
    assert (per_unit == per_unit[..., :1]).all()
    firsts = [np.flatnonzero(lines.unit == number)[0] for number in range(lines.num_units)]
    assert (counts[:, firsts].sum(axis=1) == lines.num_units).all()
    assert counts[:, firsts].mean() == pytest.approx(1)


def test_without_one_unit_every_other_point_stays():
    lines = lines_of(scanned(linear))
    assert lines.all_but_one().shape == (lines.num_units, len(lines.line))
    for number, weights in enumerate(lines.all_but_one()):
        assert set(lines.unit[weights == 0]) == {number}


def test_order_of_the_rows_does_not_matter():
    frame = scanned(linear)
    assert fit_smoothness(frame, num_boot=40) == fit_smoothness(frame.sample(frac=1, random_state=1), num_boot=40)


def test_end_of_a_line_is_no_point_and_is_counted():
    frame = scanned(linear)
    end = pd.DataFrame(
        [{"scan": "to a", "point": 9, "distance": 9.0, "grad_norm": 1.0, "status": "end_of_line", "step": 7}]
    ).assign(estimator="hessian_norm", data="fixed")
    found = fit_smoothness(pd.concat([frame, end]), num_boot=40)
    assert found.num_points == len(frame)
    assert sum(found.dropped.values()) == 1


def test_rows_of_a_run_beside_points_of_a_scan_are_refused():
    frame = scanned(linear)
    mixed = pd.concat([frame, frame.assign(scan=None).head(3)])
    with pytest.raises(ValueError, match=r"Found 3 rows without an entry in the column `scan` and 81 rows with one"):
        fit_smoothness(mixed)
    assert not has_lines(mixed[mixed["scan"].isna()])
    assert has_lines(mixed[mixed["scan"].notna()])


def test_several_checkpoints_are_refused_and_the_message_says_what_works():
    frame = pd.concat([scanned(linear, step=0), scanned(linear, step=50)])
    with pytest.raises(ValueError, match=r"one scan.* Found 2 checkpoints, `step = 0` to `50`: .*groupby\('step'\)"):
        fit_smoothness(frame)
    table = compare_runs({str(name): fit_smoothness(one, num_boot=20) for name, one in frame.groupby("step")})
    assert list(table.index) == ["0", "50"]


def test_several_scans_in_a_list_are_refused():
    with pytest.raises(ValueError, match=r"Found 2 runs"):
        fit_smoothness([scanned(linear), scanned(linear, seed=1)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.drop(columns="distance"), r"should have the column `distance`"),
        (lambda frame: frame.assign(distance=-1.0), r"Found `distance = -1.0` on the line"),
        (lambda frame: frame[frame["scan"] == "start"], r"Found the start alone"),
        (lambda frame: frame.assign(status="not_converged"), r"all dropped"),
    ],
)
def test_tables_that_are_no_scan_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        fit_smoothness(change(scanned(linear)))


def test_hessian_norms_are_preferred_to_secants():
    both = pd.concat([scanned(linear), scanned(linear, estimator="local")])
    assert fit_smoothness(both, num_boot=20).estimator == "hessian_norm"
    assert set(NAMES) == set(lines_of(both).names)
