"""plots.spikes: the figure of spikes shows each where it was, with its cause."""

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

import smoothdiag as sd

HISTORY = pd.DataFrame(
    {
        "step": [30, 30, 80, 120, 150],
        "signal": ["loss", "grad_norm", "loss", "loss", "loss"],
        "value": [9.0, 40.0, math.inf, 5.0, 4.0],
        "usual": [2.0, 1.0, 1.9, 1.8, 1.7],
        "done": ["logged", "logged", "skipped", "clipped", "logged"],
        "cause": ["data", "data", "numerics", "edge", "data"],
    }
)
LOG = pd.DataFrame({"step": np.arange(200), "loss": 2.0 + 0.1 * np.sin(np.arange(200))})


def test_every_spike_of_the_signal_is_drawn_at_its_value() -> None:
    ax = sd.plot_spikes(HISTORY, log=LOG, ax=plt.subplots()[1])
    curve, *spikes = ax.get_lines()
    assert len(curve.get_xdata()) == 200
    drawn = {(x, y) for line in spikes for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}
    assert drawn == {(30, 9), (150, 4), (120, 5), (80, ax.get_ylim()[1])}, "what is not finite stands at the top"
    assert ax.get_legend_handles_labels()[1] == ["loss", "data (2)", "edge (1)", "numerics (1)"]
    hollow = [line.get_markerfacecolor() == "white" for line in spikes]
    assert hollow == [False, True, True]


def test_another_signal_and_a_guard() -> None:
    guard = type("Guard", (), {"history": HISTORY})()
    ax = sd.plot_spikes(guard, signal="grad_norm", ax=plt.subplots()[1])
    (spike,) = ax.get_lines()
    assert (spike.get_xdata()[0], spike.get_ydata()[0]) == (30, 40)
    assert ax.get_ylabel() == "grad_norm"


def test_a_run_without_spikes_is_a_curve() -> None:
    ax = sd.plot_spikes(HISTORY[:0], log=LOG, ax=plt.subplots()[1])
    assert len(ax.get_lines()) == 1


def test_wrong_arguments_of_plot_spikes() -> None:
    with pytest.raises(ValueError, match="Parameter `data` should be a SpikeGuard or its history"):
        sd.plot_spikes([1])
    with pytest.raises(ValueError, match="Found no column cause"):
        sd.plot_spikes(HISTORY.drop(columns="cause"))
    with pytest.raises(ValueError, match="Parameter `log` should be a table.*Found no column loss"):
        sd.plot_spikes(HISTORY, log=LOG.rename(columns={"loss": "l"}))
    with pytest.raises(ValueError, match="Parameter `signal` should name a signal that spiked"):
        sd.plot_spikes(HISTORY, signal="update_norm")
