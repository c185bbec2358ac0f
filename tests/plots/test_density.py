"""plots.density: many rows are drawn as density, or as median and range, and a file of them is small."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from figures import axes, labels, starting
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from smoothdiag.plots import plot_clipping, plot_groups, plot_sharpness, plot_smoothness, plot_trace
from smoothdiag.plots.density import DENSE
from smoothdiag.plots.saving import save

NUM_ROWS = 50_000
pytestmark = pytest.mark.usefixtures("no_figure_left_open")


def rows(num_rows: int = NUM_ROWS, **columns: Any) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    norm = 10 ** rng.uniform(-2, 1, num_rows)
    smoothness = (1 + 2 * norm) * np.exp(0.3 * rng.standard_normal(num_rows))
    plain = {"step": np.arange(num_rows), "estimator": "local", "grad_norm": norm, "smoothness": smoothness}
    return pd.DataFrame(plain | {"saturation": 0.1, "lr": 0.1, "loss": 1.0, "status": "ok"} | columns)


def test_each_row_is_in_a_hexagon_and_the_file_is_small(tmp_path) -> None:
    frame = rows(status=["failed"] * 3000 + ["ok"] * (NUM_ROWS - 3000))
    frame.loc[NUM_ROWS - 1, "smoothness"] = 1e9
    ax = plot_smoothness(frame, ax=axes())
    cells = starting(ax, "smoothness along the gradient, 47000 rows")
    assert isinstance(cells, PolyCollection)
    assert cells.get_array().sum() == 47000 - 1
    assert "1 row not shown (beyond the axes)" in [text.get_text() for text in ax.texts]
    assert len(starting(ax, "not usable, 300 of 3000 rows").get_offsets()) == 300
    assert [bar.get_ylabel() for bar in ax.child_axes if bar.get_ylabel()] == ["rows in a hexagon"]
    save(ax.figure, tmp_path / "many.svg")
    assert (tmp_path / "many.svg").stat().st_size < 1.5e6


def test_series_of_many_rows_are_median_and_range() -> None:
    frame = rows(smoothness=np.tile([1.0, 2.0, 9.0], NUM_ROWS)[:NUM_ROWS])
    panel = plot_trace(frame, ax=Figure().subplots(3))[2]
    line = starting(panel, "smoothness along the gradient, median of 200 rows")
    assert set(line.get_ydata()) == {2.0}
    around = starting(panel, "their range").get_paths()[0].vertices[:, 1]
    assert (around.min(), around.max()) == (1, 9)


def test_limit_between_dots_and_density_is_sharp() -> None:
    few, many = (plot_smoothness(rows(count), ax=axes()) for count in (DENSE, DENSE + 1))
    assert len(starting(few, "smoothness").get_offsets()) == DENSE
    assert isinstance(starting(many, "smoothness"), PolyCollection)


@pytest.mark.thorough
def test_every_figure_of_many_rows_is_small(tmp_path) -> None:
    frame = rows()
    history = pd.DataFrame({"step": [1], "longest_step": [0.9], "threshold": [0.9], "lr": [0.1]})
    drawn = {
        "groups": plot_groups(pd.concat([frame.assign(group=name) for name in ("all", "head")]))[0],
        "sharpness": plot_sharpness(frame.assign(estimator="sharpness"), ax=axes()),
        "clipping": plot_clipping(frame.assign(estimator="local_clip"), history=history, ax=axes()),
        "trace": plot_trace(frame)[0],
    }
    assert "rows, as density" in labels(drawn["groups"])
    for name, ax in drawn.items():
        save(ax.figure, tmp_path / f"{name}.svg")
        assert (tmp_path / f"{name}.svg").stat().st_size < 1.5e6, name
