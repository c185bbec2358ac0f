"""report.page: a page of many rows stays small."""

import numpy as np
import pandas as pd
import pytest

import smoothdiag as sd


@pytest.mark.slow
def test_a_page_of_fifty_thousand_rows_is_under_three_megabytes(tmp_path) -> None:
    random = np.random.default_rng(0)
    norms = 10 ** random.normal(0, 0.5, 50_000)
    rows = {
        "step": np.arange(50_000),
        "estimator": "local",
        "grad_norm": norms,
        "smoothness": (1 + 2 * norms) * np.exp(random.normal(0, 0.2, 50_000)),
        "saturation": 0.1,
        "loss": 2 + random.normal(0, 0.1, 50_000),
        "lr": 0.1,
    }
    with sd.Trace(tmp_path / "run.jsonl") as trace:
        trace.extend(pd.DataFrame(rows).to_dict("records"))
    sd.write_report(tmp_path / "run.jsonl", tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
