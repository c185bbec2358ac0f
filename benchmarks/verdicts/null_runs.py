"""Null cases: runs in which smoothness does not grow with the gradient norm by the law, known in closed form.

A case maps a seed to the rows of a run (or of several runs). Unless a docstring says otherwise the loss is a quadratic,
so ||H|| is constant and L1 is 0, and a row holds ||H g|| / ||g||, the value that a `Probe` measures along the gradient.
Columns are those that a probe writes, with `data` as it is: "fixed" where all rows are of one batch.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pandas as pd
from scipy.signal import lfilter

Vector = np.ndarray
Rows = pd.DataFrame | list[pd.DataFrame]
RADIUS = 1e-3  # Of a probe in float32, relative to the length of the weights.


def row(step: int, rate: float, loss: float, weights: Vector, gradient: Vector, product: Vector) -> dict[str, float]:
    """Returns what a probe writes down at ``weights``, given H g as ``product``."""
    norm = float(np.linalg.norm(gradient))
    smoothness, radius = float(np.linalg.norm(product)) / norm, RADIUS * float(np.linalg.norm(weights))
    saturation = smoothness * radius / (2 * norm + smoothness * radius)
    return dict(
        step=step, lr=rate, loss=loss, grad_norm=norm, smoothness=smoothness, step_norm=radius, saturation=saturation
    )  # fmt: skip


def table(rows: Iterable[dict[str, float]], data: str = "fixed", estimator: str = "local") -> pd.DataFrame:
    return pd.DataFrame(list(rows)).assign(estimator=estimator, data=data)


def clipped(vector: Vector, threshold: float) -> Vector:
    return vector * min(1.0, threshold / float(np.linalg.norm(vector)))


def saw_teeth(num: int, high: float, low: float, period: int) -> Vector:
    """Rates that fall from ``high`` to ``low`` by equal factors and jump back."""
    return high * (low / high) ** (np.arange(num) % period / (period - 1))


def warm_cosines(num: int, peak: float, period: int, warm_up: int) -> Vector:
    """Rates that rise linearly and then fall to nearly zero as half a cosine, again and again."""
    at = np.arange(num) % period
    fall = (1 + np.cos(np.pi * (at - warm_up) / (period - warm_up))) / 2
    return peak * np.where(at < warm_up, (at + 1) / warm_up, np.maximum(fall, 0.01))


def autoregression(num: int, memory: float, rng: np.random.Generator) -> Vector:
    """Returns a stationary autoregression with deviation one."""
    drawn = np.sqrt(1 - memory**2) * rng.standard_normal(num + 500)
    return lfilter([1.0], [1.0, -memory], drawn)[500:]


class Regression:
    """Linear regression on examples of unequal length; H of a batch is X'X / n, whatever the weights.

    Args:
        rng: generator of the data.
        scale: factor of all inputs.
    """

    def __init__(self, rng: np.random.Generator, scale: float = 1.0, dim: int = 30) -> None:
        self.rng, self.scale = rng, scale
        self.truth, self.mixing = rng.standard_normal(dim), rng.standard_normal((dim, dim)) / dim**0.5

    def batch(self, size: int) -> tuple[Vector, Vector]:
        lengths = self.scale * np.exp(0.8 * self.rng.standard_normal((size, 1)))
        inputs = self.rng.standard_normal((size, len(self.truth))) @ self.mixing * lengths
        return inputs, inputs @ self.truth + 0.5 * self.rng.standard_normal(size)

    @staticmethod
    def gradient(batch: tuple[Vector, Vector], weights: Vector) -> Vector:
        inputs, targets = batch
        return inputs.T @ (inputs @ weights - targets) / len(targets)

    def row(self, step: int, rate: float, batch: tuple[Vector, Vector], weights: Vector) -> dict[str, float]:
        inputs, targets = batch
        gradient = self.gradient(batch, weights)
        loss = float(np.square(inputs @ weights - targets).mean()) / 2
        return row(step, rate, loss, weights, gradient, inputs.T @ (inputs @ gradient) / len(targets))

    def train(
        self, rates: Vector, sizes: Iterable[int], threshold: float = np.inf, momentum: float = 0.0
    ) -> Iterator[tuple[int, float, tuple[Vector, Vector], Vector]]:
        """Yields step, rate, the step's batch and the weights before the step."""
        weights, buffer = np.zeros(len(self.truth)), np.zeros(len(self.truth))
        for step, (rate, size) in enumerate(zip(rates, sizes, strict=True)):
            batch = self.batch(size)
            yield step, rate, batch, weights
            buffer = momentum * buffer + clipped(self.gradient(batch, weights), threshold)
            weights = weights - rate * buffer


def quadratic_row(step: int, rate: float, curvature: Vector, weights: Vector) -> dict[str, float]:
    gradient = curvature * weights
    return row(step, rate, float(gradient @ weights) / 2, weights, gradient, curvature * gradient)


def regression_fixed_batch(seed: int) -> Rows:
    """SGD at batch 8 with clipping, under a saw-toothed rate; rows on a fixed batch of 32."""
    problem = Regression(np.random.default_rng(seed))
    kept = problem.batch(32)
    steps = problem.train(saw_teeth(3300, 0.3, 0.002, 40), [8] * 3300, threshold=1.0)
    return table(problem.row(step, rate, kept, weights) for step, rate, _, weights in steps if step % 11 == 0)


def regression_held_out(seed: int) -> Rows:
    """SGD at batch 32 with momentum .9, warm-up and cosines with restarts; rows on held-out data."""
    problem = Regression(np.random.default_rng(seed))
    kept = problem.batch(256)
    steps = problem.train(warm_cosines(3300, 0.04, 150, 15), [32] * 3300, threshold=5.0, momentum=0.9)
    rows = (problem.row(step, rate, kept, weights) for step, rate, _, weights in steps if step % 11 == 0)
    return table(rows, data="held-out")


def batch_sizes(seed: int) -> Rows:
    """The batch grows from 4 to 256 and starts again, at one rate; rows on the step's own batch."""
    problem = Regression(np.random.default_rng(seed))
    sizes = np.repeat(np.tile([4, 16, 64, 256], 4), 25)
    steps = problem.train(np.full(400, 0.01), sizes, threshold=1.0)
    return table((problem.row(step, rate, batch, weights) for step, rate, batch, weights in steps), data="step")


def moving_targets(seed: int) -> Rows:
    """Fixed inputs, targets by a copy of the network that is renewed now and then, as in Q-learning."""
    rng = np.random.default_rng(seed)
    problem = Regression(rng)
    inputs, targets = problem.batch(256)
    weights, rows = np.zeros(30), []
    for step in range(2800):
        if rng.random() < 1 / 40:
            targets = targets + inputs @ rng.standard_normal(30) * np.exp(rng.standard_normal() - 2)
        if step % 7 == 0:
            rows.append(problem.row(step, 0.02, (inputs, targets), weights))
        chosen = rng.integers(0, 256, 32)
        weights = weights - 0.02 * clipped(problem.gradient((inputs[chosen], targets[chosen]), weights), 5.0)
    return table(rows)


def runs_of_other_scale(seed: int) -> Rows:
    """Eight runs whose inputs have other units; H goes with the square of the units and the gradient with the units."""
    rng = np.random.default_rng(seed)
    runs = []
    for scale in np.exp(0.5 * rng.standard_normal(8)):
        problem = Regression(rng, scale)
        kept = problem.batch(32)
        steps = problem.train(saw_teeth(200, 0.05, 0.002, 20) / scale**2, [16] * 200, threshold=2.0 * scale)
        runs.append(table(problem.row(at, rate, kept, w) for at, rate, _, w in steps if at % 4 == 0))
    return runs


def heavy_ball_near_the_edge(seed: int) -> Rows:
    """Heavy ball whose rate swings from far below its limit to .9 of it, with Gaussian noise."""
    rng = np.random.default_rng(seed)
    curvature, weights, buffer, rows = np.logspace(-2, 0, 50), rng.standard_normal(50), np.zeros(50), []
    swing = np.abs(np.arange(2800) % 200 - 100) / 100
    for step, rate in enumerate(3.4 * (0.005 / 3.4) ** swing):
        if step % 7 == 0:
            rows.append(quadratic_row(step, rate, curvature, weights))
        buffer = 0.9 * buffer + curvature * weights + 0.01 * rng.standard_normal(50)
        weights = weights - rate * buffer
    return table(rows)


def heavy_tails(seed: int) -> Rows:
    """Clipped SGD at one rate; noise with covariance as H and a Student-t length, as minibatches have it."""
    rng = np.random.default_rng(seed)
    curvature, weights, rows = np.logspace(-3, 0, 50), rng.standard_normal(50), []
    for step in range(4000):
        if step % 10 == 0:
            rows.append(quadratic_row(step, 0.5, curvature, weights))
        noise = 0.02 * rng.standard_t(1.5) * np.sqrt(curvature) * rng.standard_normal(50)
        weights = weights - 0.5 * clipped(curvature * weights + noise, 1.0)
    return table(rows)


def adam_cosine(seed: int) -> Rows:
    """Adam with warm-up and cosines with restarts on a rotated quadratic of three decades, with Gaussian noise."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((60, 60)))[0]
    hessian = turn * np.logspace(-3, 0, 60) @ turn.T
    weights, first, second, rows = 0.3 * rng.standard_normal(60), np.zeros(60), np.zeros(60), []
    for step, rate in enumerate(warm_cosines(3300, 0.2, 300, 30)):
        gradient = hessian @ weights
        if step % 11 == 0:
            rows.append(row(step, rate, float(gradient @ weights) / 2, weights, gradient, hessian @ gradient))
        noisy = gradient + 0.003 * rng.standard_normal(60)
        first, second = 0.9 * first + 0.1 * noisy, 0.999 * second + 0.001 * noisy**2
        scale = np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8
        weights = weights - rate * first / (1 - 0.9 ** (step + 1)) / scale
    return table(rows)


def loss_spikes(seed: int) -> Rows:
    """Now and then the rate is above the limit for some steps: the loss leaps along the sharpest direction."""
    rng = np.random.default_rng(seed)
    curvature, weights, rows, left = np.logspace(-2, 0, 50), rng.standard_normal(50), [], 0
    for step in range(2800):
        left = rng.integers(3, 13) if left == 0 and rng.random() < 0.02 else max(left - 1, 0)
        rate = 2.5 if left else 0.8
        if step % 7 == 0:
            rows.append(quadratic_row(step, rate, curvature, weights))
        weights = weights - rate * (curvature * weights + 0.01 * rng.standard_normal(50))
    return table(rows)


def loss_reweighted(seed: int) -> Rows:
    """The loss gets another factor eight times (class weights, annealing); both axes carry that factor."""
    rng = np.random.default_rng(seed)
    curvature, weights, rows = np.logspace(-1, 0, 50), rng.standard_normal(50), []
    changes = set(rng.choice(np.arange(200, 2600), 8, replace=False))
    factor = 1.0
    for step in range(2800):
        if step in changes:
            factor = 10 ** rng.uniform(-1, 0.4)
        if step % 7 == 0:
            rows.append(quadratic_row(step, 0.3, factor * curvature, weights))
        weights = weights - 0.3 * factor * (curvature * weights + 0.05 * rng.standard_normal(50))
    return table(rows)


def normalised_weights(seed: int) -> Rows:
    """Weights behind a normalisation, f(w) = w'Aw / (2 w'w): heavy-tailed steps lengthen w, weight decay shortens it.

    The gradient goes with 1/||w||, the Hessian with 1/||w||^2: a square where ||w|| changes, and no law elsewhere.
    """
    rng = np.random.default_rng(seed)
    matrix, weights, rows = np.logspace(-1, 1, 40), rng.standard_normal(40), []
    for step in range(2800):
        square = float(weights @ weights)
        twice = float(matrix * weights @ weights) / square
        gradient = (matrix - twice) * weights / square
        if step % 7 == 0:
            product = ((matrix - twice) * gradient - 2 * float(gradient @ gradient) * weights) / square
            rows.append(row(step, 0.3, twice / 2, weights, gradient, product))
        noise = rng.standard_t(1.0) * rng.standard_normal(40)
        weights = 0.97 * weights - 0.3 * (gradient + (noise - float(noise @ weights) / square * weights) / square**0.5)
    return table(rows)


def two_layer_linear(seed: int) -> Rows:
    """Two linear layers, (u'v - 1)^2 / 2, noisy labels: g is 0 along a valley where ||H|| = ||u||^2 + ||v||^2 moves."""
    rng = np.random.default_rng(seed)
    weights, rows = rng.standard_normal((2, 10)) * np.array([[1.0], [0.1]]), []
    for step, rate in enumerate(saw_teeth(4400, 0.1, 0.005, 100)):
        residue = float(weights[0] @ weights[1]) - 1
        other = weights[::-1]
        gradient = residue * other
        if step % 11 == 0:
            product = other * float((other * gradient).sum()) + residue * gradient[::-1]
            rows.append(row(step, rate, residue**2 / 2, weights, gradient, product))
        weights = weights - rate * (residue + rng.standard_normal()) * other
    return table(rows)


def rate_moves_both(seed: int) -> Rows:
    """Edge of stability, sampled: smoothness and gradient norm follow the rate, and at one rate nothing is left."""
    rng = np.random.default_rng(seed)
    rates = saw_teeth(400, 0.3, 0.003, 40)
    norms = rates**-0.6 * np.exp(0.3 * autoregression(400, 0.7, rng))
    smoothness = rates**-0.6 * np.exp(0.25 * autoregression(400, 0.5, rng))
    rows = dict(step=np.arange(400), lr=rates, loss=np.exp(0.3 * autoregression(400, 0.9, rng)))
    return pd.DataFrame(
        rows | dict(grad_norm=norms, smoothness=smoothness, saturation=0.01, estimator="local", data="fixed")
    )


def two_slow_series(seed: int) -> Rows:
    """Two independent slow series, sampled: they rise and fall together for a while by chance."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        dict(
            step=np.arange(600), lr=0.1, grad_norm=np.exp(autoregression(600, 0.9, rng)),
            smoothness=np.exp(0.6 * autoregression(600, 0.85, rng)), loss=np.exp(0.3 * autoregression(600, 0.99, rng)),
            saturation=0.01, estimator="local", data="fixed",
        )
    )  # fmt: skip


NULLS: dict[str, Callable[[int], Rows]] = {
    case.__name__: case
    for case in (
        regression_fixed_batch, regression_held_out, batch_sizes, moving_targets, runs_of_other_scale,
        heavy_ball_near_the_edge, heavy_tails, adam_cosine, loss_spikes, loss_reweighted, normalised_weights,
        two_layer_linear, rate_moves_both, two_slow_series,
    )
}  # fmt: skip
