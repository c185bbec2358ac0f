"""What makes a run spike: each plant changes one thing, at steps that it draws, and nothing before."""

import random
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from texts import TEXTS
from torch import Tensor, nn

Cause = Literal["corrupted batch", "wrong mask", "rate x 8", "edge", "stale moment", "numerics"]
Answer = Literal["data", "edge", "optimizer", "numerics"]

RIGHT: dict[str, Answer] = {
    "corrupted batch": "data",
    "wrong mask": "data",
    "rate x 8": "optimizer",
    "edge": "edge",
    "stale moment": "optimizer",
    "numerics": "numerics",
}
"""The answer that is right for each cause."""

SEVERE = 30
"""A severe plant lasts so many times as long, or for ever."""

EVER = 10**9

EARLIEST, LATEST = 110, 260
"""A plant begins between these steps of a run of 300."""


class Plant:
    """Something that goes wrong in a run; this base class does nothing.

    Attributes:
        start: First step at which something is wrong; None if there is none.
        begins: First step that differs from the run without the plant.
        end: First step after which the loop is as before.
        kind: What was drawn, in words.
    """

    start: int | None = None
    begins: int | None = None
    end = 0
    kind = ""
    narrow: torch.dtype | None = None
    inner = False

    def active(self, step: int) -> bool:
        return self.start is not None and self.start <= step < self.end

    def batch(self, step: int, batch: Any) -> Any:
        return batch

    def rate(self, step: int) -> float:
        """Factor for the rate of the optimizer."""
        return 1.0

    def max_norm(self, step: int) -> float | None:
        """Threshold that the gradient is clipped to."""
        return None

    def prepare(self, step: int, model: nn.Module) -> None:
        """Called before the forward pass."""


class Drawn(Plant):
    """A plant that draws what it does from model, cause, seed and attempt."""

    length = 1

    def __init__(self, model: str, cause: str, seed: int, attempt: int = 0, *, severe: bool = False) -> None:
        self.random = random.Random(f"{model}/{cause}/{seed}/{attempt}")
        self.model, self.cause, self.seed, self.attempt, self.severe = model, cause, seed, attempt, severe
        self.vocabulary = TEXTS[model].vocabulary
        self.start = self.random.randint(EARLIEST, LATEST)
        if severe:
            self.length *= SEVERE
        self.begins, self.end = self.start, self.start + self.length

    def generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(1_000_003 * self.seed + step)


def random_tokens(plant: Drawn, step: int, windows: Tensor) -> Tensor:
    return torch.randint(plant.vocabulary, windows.shape, generator=plant.generator(step))


def one_token(plant: Drawn, step: int, windows: Tensor) -> Tensor:
    return torch.full_like(windows, int(torch.randint(plant.vocabulary, (), generator=plant.generator(step))))


def backwards(plant: Drawn, step: int, windows: Tensor) -> Tensor:
    return windows.flip(1)


def other_codes(plant: Drawn, step: int, windows: Tensor) -> Tensor:
    """The text under the codes of another vocabulary."""
    return torch.randperm(plant.vocabulary, generator=plant.generator(step))[windows]


class Corrupted(Drawn):
    """A batch that is no text: a reader that is stuck, noise, a text turned round, or one with other codes."""

    KINDS: tuple[Callable[[Drawn, int, Tensor], Tensor], ...] = (random_tokens, one_token, backwards, other_codes)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.change = self.KINDS[self.seed % len(self.KINDS)]
        self.whole = self.random.random() < 0.5
        self.kind = f"{self.change.__name__}, {'all' if self.whole else 'half of the'} rows"

    def batch(self, step: int, batch: Any) -> Any:
        if not self.active(step):
            return batch
        inputs, targets = batch
        windows = torch.cat([inputs, targets[:, -1:]], dim=1)
        rows = len(windows) if self.whole else len(windows) // 2
        windows = torch.cat([self.change(self, step, windows[:rows]), windows[rows:]])
        return windows[:, :-1], windows[:, 1:]


def unshifted(plant: Drawn, inputs: Tensor, targets: Tensor) -> Any:
    """Targets that were not shifted: each token is asked for itself."""
    return inputs, inputs


def padding_counted(plant: Drawn, inputs: Tensor, targets: Tensor) -> Any:
    """Rows that are padded after a quarter, and a loss that counts the padding."""
    cut = inputs.shape[1] // 4
    return inputs.index_fill(1, torch.arange(cut, inputs.shape[1]), 0), targets.index_fill(
        1, torch.arange(cut, inputs.shape[1]), plant.vocabulary - 1
    )


def rows_moved(plant: Drawn, inputs: Tensor, targets: Tensor) -> Any:
    """Targets that belong to another row."""
    return inputs, targets.roll(1, 0)


def only_later(plant: Drawn, inputs: Tensor, targets: Tensor) -> Any:
    """A mask with the wrong sign: attention sees the token itself and what follows."""
    return inputs, targets, torch.ones(inputs.shape[1], inputs.shape[1], dtype=torch.bool).triu()


class WrongMask(Drawn):
    """Labels or a mask that do not belong to the batch."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.change = self.random.choice(
            (unshifted, padding_counted, rows_moved, *((only_later,) if self.model == "gpt" else ()))
        )
        self.kind = self.change.__name__

    def batch(self, step: int, batch: Any) -> Any:
        return self.change(self, *batch) if self.active(step) else batch


class JumpOfRate(Drawn):
    """A rate that is eight times as large for one step."""

    kind = "one step"

    def rate(self, step: int) -> float:
        return 8.0 if self.active(step) else 1.0


class Edge(Drawn):
    """A rate that rises by the same factor at each step until the run is unstable."""

    RATIO, LENGTH = 100.0, 60

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.start = self.random.randint(80, 160)
        self.begins, self.end = self.start, EVER if self.severe else self.start + self.LENGTH
        self.kind = f"x {self.RATIO:g} in {self.LENGTH} steps"

    def rate(self, step: int) -> float:
        return self.RATIO ** min(1.0, (step + 1 - self.start) / self.LENGTH) if self.active(step) else 1.0


class Stale(Drawn):
    """Gradients that were clipped to a small norm for a while; Adam's second moment remembers these.

    The threshold is then lifted, at once or by the same factor over four steps. Adam's steps do not depend on the scale
    of its gradients, so the clipped part of the run is much as without clipping.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.begins, self.lifted = 0, self.start
        self.small = 10 ** self.random.uniform(-3, -2)
        self.over = self.seed % 2 * 4
        self.kind = f"norm {self.small:.2g}, lifted over {self.over} steps"

    def max_norm(self, step: int) -> float | None:
        if step < self.lifted:
            return self.small
        if step < self.lifted + self.over:
            return self.small ** (1 - (step + 1 - self.lifted) / self.over)
        return None


HALFWAY = {"last": (770.0, 1540.0, 3080.0), "inner": (3080.0, 6160.0, 12320.0)}
"""Halfway between neighbours in bfloat16, which are 4 to 64 apart there, by the layer."""


class Numerics(Drawn):
    """A layer in a narrow dtype, with scales that the dtype cannot hold: fp16 overflows or bf16 rounds."""

    length = 2

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.narrow = torch.float16 if self.seed % 2 else torch.bfloat16
        drawn = self.random.random() < 0.5
        # All attempts have the layer of the first: it belongs to the setting, which they share with the pair.
        self.inner = Numerics(self.model, self.cause, self.seed).inner if self.attempt else drawn
        layer = "inner" if self.inner else "last"
        self.scale = self.random.choice(HALFWAY[layer]) if self.narrow is torch.bfloat16 else 1e6
        what = "overflow" if self.narrow is torch.float16 else f"rounding at {self.scale:g}"
        self.kind = f"{what}, {layer} layer"

    def prepare(self, step: int, model: nn.Module) -> None:
        layer = model.inner if self.inner else model.last
        on = self.active(step)
        layer.shift.fill_(self.scale if on and self.narrow is torch.bfloat16 else 0.0)
        layer.gain.fill_(self.scale if on and self.narrow is torch.float16 else 1.0)


PLANTS: dict[str, Callable[..., Drawn]] = {
    "corrupted batch": Corrupted,
    "wrong mask": WrongMask,
    "rate x 8": JumpOfRate,
    "edge": Edge,
    "stale moment": Stale,
    "numerics": Numerics,
}
assert set(PLANTS) == set(get_args(Cause)) == set(RIGHT)
