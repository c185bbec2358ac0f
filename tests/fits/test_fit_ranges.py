"""fits.ranges: at the ends of the float range there is a fit, or an error that names the range."""

import warnings

import numpy as np
import pandas as pd
import pytest

from smoothdiag import SmoothnessFit, fit_smoothness

NUM = 40


def column(kind: int, generator: np.random.Generator) -> np.ndarray:
    """Positive numbers of one kind, anywhere that a float reaches."""
    spread = np.exp(generator.normal(size=NUM))
    with np.errstate(over="ignore", under="ignore"):
        return [
            spread,
            spread * 10.0 ** generator.uniform(-310, 300),
            10.0 ** generator.uniform(-320, 308.2, size=NUM),
            10.0 ** generator.uniform(-30, 30, size=NUM),
            np.full(NUM, 10.0 ** generator.uniform(-320, 308.2)),
            generator.integers(1, 50, NUM) * 5e-324,
            generator.uniform(0.5, 1, NUM) * 1.79e308,
            np.where(generator.random(NUM) < 0.5, 0.0, spread),
        ][kind]


def examine(data: dict[str, np.ndarray], quantile: float) -> str:
    """Fits without any warning of NumPy's; the constants are numbers and lie within their intervals."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            fit = fit_smoothness(pd.DataFrame(data), quantile=quantile, num_boot=20)
        except ValueError as error:
            return "refused" if str(error).startswith("Parameter `data`") else repr(error)
        for value, (low, high) in ((fit.L0, fit.L0_interval), (fit.L1, fit.L1_interval)):
            assert 0 <= low <= value <= high
        assert not np.isnan([*fit.lines.values(), *fit.replicates]).any()
        assert SmoothnessFit.from_dict(fit.to_dict()).summary() == fit.summary()
        fit.predict([0.0, 1.0, 1e300])
    return "fitted"


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(24))
def test_any_scales_give_numbers_or_words(seed) -> None:
    generator = np.random.default_rng(seed)
    kinds = generator.integers(0, 8, 6)
    data = {"grad_norm": column(kinds[0], generator), "smoothness": column(kinds[1], generator)}
    names = ("loss", "grad_variance", "step_norm", "noise_floor")
    data |= {name: column(kind, generator) for name, kind in zip(names, kinds[2:], strict=True) if seed % 2}
    assert examine(data, (0.5, 0.8, 0.95, 0.99)[seed % 4]) in ("fitted", "refused")


ORDINARY = np.exp(np.random.default_rng(0).normal(size=NUM))
EXTREME = {
    "smoothness at the upper end": (ORDINARY, ORDINARY[::-1] * 1e307, "fitted"),
    "an L1 beyond the upper end": (ORDINARY * 1e-300, (1 + ORDINARY) * 1e300, "fitted"),
    "denormal norms": (np.arange(1, NUM + 1) * 5e-324, ORDINARY, "fitted"),
    "equal rows at the upper end": (np.ones(NUM), np.full(NUM, 1.7e308), "fitted"),
    "norms over 600 decades": (np.geomspace(1e-300, 1e300, NUM), ORDINARY, "refused"),
    "smoothness over 600 decades": (ORDINARY, np.geomspace(1e-300, 1e300, NUM), "refused"),
    "one absurd row": (np.append(ORDINARY[1:], 1e200), ORDINARY, "refused"),
    "norms over 69 decades": (np.geomspace(1e-34, 1e35, NUM), ORDINARY, "fitted"),
}


@pytest.mark.parametrize(("x", "y", "expected"), EXTREME.values(), ids=EXTREME.keys())
def test_the_ends_of_the_range(x, y, expected) -> None:
    assert examine({"grad_norm": x, "smoothness": y}, 0.8) == expected


def test_what_no_float_holds_is_infinite() -> None:
    fit = fit_smoothness(pd.DataFrame({"grad_norm": ORDINARY * 1e-300, "smoothness": ORDINARY * 1e300}), num_boot=20)
    assert fit.L1 == np.inf


@pytest.mark.thorough
@pytest.mark.parametrize("power", [-900, -300, 300, 900])
def test_units_of_the_loss_move_no_digit(power) -> None:
    one, other = (
        fit_smoothness(
            pd.DataFrame({"grad_norm": np.ldexp(ORDINARY, at), "smoothness": np.ldexp(1 + ORDINARY, at)}), num_boot=20
        )
        for at in (0, power)
    )
    assert (other.L0, other.L1) == (np.ldexp(one.L0, power), one.L1)
    assert other.verdict == one.verdict


def test_the_range_is_named() -> None:
    rows = pd.DataFrame({"grad_norm": [1e-100, 1.0, 1e100], "smoothness": [1.0, 1.0, 1.0]})
    with pytest.raises(ValueError, match="`data` should have gradient norms within 70 powers .* from 1e-100 to 1e"):
        fit_smoothness(rows, num_boot=20)
