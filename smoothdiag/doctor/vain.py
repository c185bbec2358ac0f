"""Vain: clips that had no gradient to clip."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from torch import Tensor

from smoothdiag.doctor.counts import FEWEST_CLIPS
from smoothdiag.doctor.findings import Fault, Finding, finding
from smoothdiag.doctor.given import Call, mistaken
from smoothdiag.doctor.gradients import Held, Owner, has_entries
from smoothdiag.doctor.sites import Site
from smoothdiag.doctor.uses import ENOUGH

_GONE: Final = "its parameters got gradients in the backward pass, which were zeroed or removed before the clip"
_NO_PARAMETERS: Final = "it was given no parameters"
_ELSEWHERE: Final = "it was given parameters that have no gradients and that no optimizer holds"
_USED_UP: Final = "it was given a generator of parameters that an earlier loop or call had used up"
_TOO_EARLY: Final = "it ran before the backward pass that made the gradients of the step"


class Vain:
    """Follows, line by line, the clips that found nothing."""

    def __init__(self) -> None:
        self._lines: dict[Site, _Line] = {}
        self._elsewhere: list[tuple[_Line, bool]] = []

    def clip(self, parameters: Sequence[Tensor], held: Sequence[Held], call: Call, known: Iterable[Held]) -> bool:
        """Records a clip and returns whether it found no gradient; ``known`` are all parameters of optimizers."""
        line = self._lines.setdefault(call.site, _Line())
        line.calls += 1
        if call.is_used_up:
            line.mistake()
        elif line.is_open and has_entries(getattr(p, "grad", None) for p in parameters):
            line.close()
        elif line.is_open and held:
            line.lose(list(held))
        elif parameters and not held and (cause := mistaken(parameters, known)):
            line.mistake(cause)
        elif line.is_open:
            self._elsewhere.append((line, bool(parameters)))
        return bool(line.missing)

    def has_missed(self, site: Site) -> bool:
        """Returns whether the latest clip of a line found no gradient."""
        return bool(self._lines[site].missing) if site in self._lines else False

    def after_backward(self) -> None:
        """Looks whether the parameters that had no gradient have one now."""
        for line in self._lines.values():
            line.is_given = line.is_given or has_entries(each.gradient for each in line.missing)

    def before_step(self, owner: Owner, stepped: Sequence[Held]) -> None:
        """Counts the clips before a step if no clip has seen its gradients, those of ``stepped``."""
        if not any(each.live("clipped") for each in stepped):
            for line, has_parameters in self._elsewhere if stepped else []:
                line.miss(has_parameters=has_parameters)
            for line in self._lines.values():
                line.step(owner)
        self._elsewhere = []

    def findings(self) -> list[Finding]:
        """Returns the lines that clipped nothing often enough to be sure."""
        return [found for site, line in self._lines.items() if (found := line.finding(site)) is not None]


class _Line:
    """The clips of one line that had no gradient to clip while a gradient existed somewhere else.

    Attributes:
        calls: All clips of the line.
        missing: Parameters that had no gradient at the latest clip.
        is_given: Whether a backward pass has given them a gradient since.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.missing: list[Held] = []
        self.is_given = False
        self._has_clipped = False
        self._in_vain = self._early = self._certain = 0
        self._cause = ""

    @property
    def is_open(self) -> bool:
        """Whether no clip of the line has had a gradient so far."""
        return not self._has_clipped

    def close(self) -> None:
        """Records a clip that had a gradient: the line works."""
        self._has_clipped, self.missing = True, []

    def lose(self, missing: list[Held]) -> None:
        """Records a clip of parameters that an optimizer holds, none of which has a gradient."""
        if self.is_given:
            self.add(_GONE)
        self.missing, self.is_given = missing, False

    def mistake(self, cause: str = _USED_UP) -> None:
        """Records a clip of things that can have no gradient, such as a used-up generator."""
        self._certain += 1
        self._cause = cause

    def step(self, owner: Owner) -> None:
        """Records a step whose gradients no clip has seen."""
        if self.is_given and any(each.owner is owner for each in self.missing):
            self._early += 1
            self.missing, self.is_given = [], False

    def miss(self, *, has_parameters: bool) -> None:
        """Records a clip of parameters that no optimizer holds, followed by a step with gradients that no clip saw."""
        self.add(_ELSEWHERE if has_parameters else _NO_PARAMETERS)

    def add(self, cause: str) -> None:
        """Counts a clip without a gradient."""
        self._in_vain += 1
        self._cause = self._cause or cause

    def finding(self, site: Site) -> Finding | None:
        """Returns a finding if the line clipped nothing often enough to be sure."""
        number, cause = self._certain, self._cause
        if self.is_open and self._early >= ENOUGH:
            number, cause = number + self._early, cause or _TOO_EARLY
        if self.is_open and self._in_vain >= FEWEST_CLIPS:
            number += self._in_vain
        if not number:
            return None
        return finding(Fault.CLIP_OF_NOTHING, site, number, self.calls, unit="clips", facts=cause)
