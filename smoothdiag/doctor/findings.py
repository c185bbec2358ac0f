"""Findings: what is wrong with a training loop, where, how often, and which line to change."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from smoothdiag.console import counted
from smoothdiag.doctor.frameworks import place, place_to_read
from smoothdiag.doctor.sites import Site

_PAGE: Final = "docs/doctor.md"
_SETTINGS: Final = {
    "transformers": "max_grad_norm of TrainingArguments",
    "lightning": "gradient_clip_val of the Trainer",
    "pytorch_lightning": "gradient_clip_val of the Trainer",
    "trl": "max_grad_norm of TrainingArguments",
}
"""The setting that makes a library clip, by the name of the library."""


class Severity(Enum):
    """How bad a finding is; the value says what that means for the run."""

    ERROR = "the run does not train as its code says"
    WARNING = "a number is wrong, or the run can break"
    NOTE = "nothing is wrong, but a line may not do what it is there for"


class Fault(Enum):
    """The faults that the doctor knows: severity, what happened, what to change.

    Reports and the documentation call a fault by its name in small letters, with hyphens. In the texts, ``{other}``
    stands for a second line that takes part, and ``{facts}`` for what was seen.
    """

    CLIP_AFTER_STEP = (
        Severity.ERROR,
        "The clip ran after the optimizer had used the gradients, so this line limited no step.",
        "Move this line between backward() and the optimizer's step.",
    )
    CLIP_OF_SCALED_GRADIENTS = (
        Severity.ERROR,
        "The clip ran while the gradients were still multiplied by the factor of the GradScaler. It acted as if the "
        "threshold were divided by that factor, and changed with every change of the factor.",
        "Call scaler.unscale_(optimizer) right before this line.",
    )
    CLIP_OF_NOTHING = (
        Severity.ERROR,
        "The clip had no gradient to clip, so it limited no step: {facts}.",
        "Clip between backward() and zero_grad(), and give this line the parameters that the optimizer steps. Call "
        "model.parameters() anew for each clip or pass a list, because a generator can be used only once.",
    )
    CLIP_OF_DUPLICATES = (
        Severity.ERROR,
        "The clip was given {facts} more than once. It counted such a gradient several times in the norm and "
        "multiplied it several times, so it shortened it more than the others.",
        "Give each parameter once, as model.parameters() does: list(dict.fromkeys(parameters)).",
    )
    CLIP_OF_UNUSED_GRADIENTS = (
        Severity.ERROR,
        "No step used the gradients that this line clipped. They were thrown away, and the step that came instead used "
        "nothing that a clip had seen.",
        "Give this line the parameters of the optimizer that steps next, between its backward() and its step, and "
        "zero gradients only before backward().",
    )
    CLIP_OF_A_PART = (
        Severity.WARNING,
        "The clip limited one part of the gradient: {facts}.",
        "Give this line all parameters that the optimizer steps. If you leave some out on purpose, nothing is wrong.",
    )
    CLIP_WITH_UNUSED_GRADIENTS = (
        Severity.WARNING,
        "The norm that this line compared with its threshold also counted {facts} that the next step did not use. It "
        "shortened the step by more than the step's own gradient asks for.",
        "Give this line only the parameters of the optimizer that steps next, or zero the other gradients before it.",
    )
    CLIP_PER_MICRO_BATCH = (
        Severity.ERROR,
        "A backward pass added to a gradient that this line had already clipped. Every clip shortened the sum so far, "
        "so earlier micro-batches count less than later ones.",
        "Clip once, after the last backward() of the step and right before the optimizer's step.",
    )
    THRESHOLD_WITHOUT_MEANING = (
        Severity.ERROR,
        "{other}.",
        "Give a positive, finite threshold. To switch clipping off, leave the call out.",
    )
    STEP_WITH_USED_GRADIENTS = (
        Severity.ERROR,
        "The step used gradients that a step had already used: no backward pass came in between, and nothing zeroed "
        "them. The loop moved twice as far as one clipped gradient allows.",
        "Step once for each gradient. Under a GradScaler, scaler.step(optimizer) takes the step: delete "
        "optimizer.step().",
    )
    STEP_OF_SCALED_GRADIENTS = (
        Severity.ERROR,
        "The step used gradients that were still multiplied by the factor of the GradScaler.",
        "Call scaler.step(optimizer) in place of optimizer.step(), and scaler.unscale_(optimizer) before any clip.",
    )
    ZERO_GRAD_MISSING = (
        Severity.ERROR,
        "Nothing zeroed the gradients after a step: the next backward pass added to gradients that the step had "
        "already used, so later steps repeat earlier gradients, and a clip compares their sum with its threshold.",
        "Call optimizer.zero_grad() once per step, before its first backward(). Divide the loss if you want a mean.",
    )
    CLIP_TWICE = (
        Severity.WARNING,
        "The line at {other} had already clipped the same gradients for the same step. The smaller of the two "
        "thresholds decides, and a norm that this line returns is the clipped one.",
        "Keep one of the two lines, with the threshold that you mean.",
    )
    CLIP_WITH_OLD_NORM = (
        Severity.ERROR,
        "The total norm that this line was given was measured at {other}, {facts}. The line scaled the gradients by a "
        "factor that does not belong to them.",
        "Measure the norm right before this line, on the same gradients: after the last backward() of the step and "
        "after scaler.unscale_(optimizer). Or call clip_grad_norm_, which measures and clips.",
    )
    CLIP_NEVER_BINDS = (
        Severity.NOTE,
        "The clip never changed a gradient: {facts}.",
        "Lower the threshold below the largest norm if clipping should act, or keep the line as a safety net that was "
        "not needed so far.",
    )
    CLIP_ALWAYS_BINDS = (
        Severity.NOTE,
        "The clip shortened every gradient, so the optimizer never saw how large the gradients were: {facts}.",
        "Raise the threshold above the usual norm, or lower the learning rate and say that you normalise gradients.",
    )
    CLIP_AS_NORM = (
        Severity.WARNING,
        "max_norm=inf was used to read the gradient norm. That call also writes: it multiplies the gradients by "
        "inf/norm, limited to 1. Once a single gradient is infinite, this factor makes every gradient NaN.",
        "Read the norm with torch.nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None).",
    )
    STALE_GRADIENTS = (
        Severity.ERROR,
        "This line worked on gradients that the next step does not use, such as those of the step before: "
        "optimizer.step(closure) computes new gradients inside the closure, after this line has run.",
        "Move this line into the closure, after its backward().",
    )
    SCALED_GRADIENTS_IN_HOOK = (
        Severity.WARNING,
        "A fused optimizer divides by the factor of the GradScaler inside its step, so the step pre-hook at {other} "
        "saw gradients that were still multiplied by it. The hook also runs on steps that are skipped for overflow.",
        "Call scaler.unscale_(optimizer) before this line, or divide by optimizer.grad_scale in the hook.",
    )
    CLIP_AFTER_OPTIMIZER_IN_BACKWARD = (
        Severity.ERROR,
        "A hook on the parameters steps the optimizer inside backward(), so this clip came too late to limit the step.",
        "Clip each gradient inside the hook, before the step at {other}. To clip by the global norm, step after "
        "backward() instead.",
    )
    NORM_OF_ONE_SHARD = (
        Severity.WARNING,
        "The norm of this rank's shard was read as if it were the norm of the whole gradient. Other ranks hold the "
        "rest, so the number is wrong.",
        "Read the norm through .full_tensor(), or add up the squares of all ranks with all_reduce before the root.",
    )
    NORM_AFTER_CLIPPING = (
        Severity.WARNING,
        "The gradient norm was read after the clip at {other}, and nobody read the norm before. The number does not "
        "show how large the gradient was.",
        "Use the norm that clip_grad_norm_ returns, or read the norm before the clip.",
    )

    @property
    def severity(self) -> Severity:
        """How bad it is."""
        return self.value[0]

    @property
    def slug(self) -> str:
        """The name in reports, which is also the anchor in the documentation."""
        return self.name.lower().replace("_", "-")


@dataclass(frozen=True)
class Finding:
    """One fault at one line.

    Attributes:
        name: Name of the fault, as in the documentation.
        severity: ``"error"``, ``"warning"`` or ``"note"``.
        what: What happened.
        count: How often the fault was seen.
        of: How often the fault could have been seen.
        unit: What is counted, ``"steps"`` or ``"clips"``.
        site: The line at fault.
        change: What to change in that line.
        link: Where the documentation tells more.
    """

    name: str
    severity: str
    what: str
    count: int
    of: int
    unit: str
    site: Site
    change: str
    link: str

    @property
    def file(self) -> str:
        """File of the line at fault."""
        return self.site.file

    @property
    def line(self) -> int:
        """Number of the line at fault."""
        return self.site.line

    @property
    def code(self) -> str:
        """Text of the line at fault."""
        return self.site.code

    @property
    def seen(self) -> str:
        """How often the fault was seen, such as "1 of 1 step" and "3 of 30 clips"."""
        return f"{self.count} of {counted(self.of, self.unit.removesuffix('s'))}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the finding as strings and numbers."""
        names = ("name", "severity", "what", "count", "of", "unit", "file", "line", "code", "change", "link")
        return {name: getattr(self, name) for name in names} | {"inside": self.site.inside}

    def __str__(self) -> str:
        inside = f"\n  inside {self.site.inside}" if self.site.inside else ""
        return (
            f"{self.severity.upper()} {self.name}: {self.seen}\n"
            f"  {self.site}: {self.code}{inside}\n  {self.what}\n  Change: {self.change}\n"
            f"  More: smoothdiag doctor --explain {self.name}"
        )


def finding(
    fault: Fault,
    site: Site,
    count: int,
    of: int,
    *,
    unit: str = "steps",
    other: str = "",
    facts: str = "",
    change: str = "",
    framework: str = "",
) -> Finding:
    """Returns a finding with the texts of its fault; ``change`` replaces the fault's own advice.

    ``framework`` helps with the steps, in a loop that shows no other framework.
    """
    severity, what, usual = fault.value
    names = {"other": other, "facts": facts}
    return Finding(
        name=fault.slug,
        severity=severity.name.lower(),
        what=what.format(**names),
        count=count,
        of=of,
        unit=unit,
        site=site,
        change=_for_library(fault, site, change or usual.format(**names), site.framework or framework),
        link=f"{_PAGE}#{fault.slug}",
    )


def worst_first(findings: list[Finding]) -> list[Finding]:
    """Returns the findings, worst first, without those that another finding on the same line makes superfluous.

    The remedy of a note would contradict the remedy of an error. A clip above the ``backward()`` of accumulated
    gradients is early for each micro-batch and late for the step before: one remedy serves both.
    """
    wrong = {(each.file, each.line) for each in findings if each.severity == "error"}
    early = {(each.file, each.line) for each in findings if each.name == Fault.CLIP_PER_MICRO_BATCH.slug}
    kept = (
        each
        for each in findings
        if not (each.severity == "note" and (each.file, each.line) in wrong)
        and not (each.name == Fault.CLIP_AFTER_STEP.slug and (each.file, each.line) in early)
    )
    order = ("error", "warning", "note")
    return sorted(kept, key=lambda each: (order.index(each.severity), each.file, each.line))


_PLACED: Final = frozenset((
    Fault.CLIP_AFTER_STEP,
    Fault.CLIP_OF_NOTHING,
    Fault.CLIP_OF_SCALED_GRADIENTS,
    Fault.CLIP_OF_UNUSED_GRADIENTS,
    Fault.CLIP_PER_MICRO_BATCH,
    Fault.STALE_GRADIENTS,
))  # fmt: skip
"""Faults of lines that stand in the wrong place."""
_OF_LOOPS: Final = frozenset((Fault.CLIP_OF_SCALED_GRADIENTS, Fault.STALE_GRADIENTS))
"""Faults with a remedy of their own in a loop that calls backward() and step() itself."""


def _for_library(fault: Fault, site: Site, change: str, framework: str) -> str:
    """Returns what to change: a framework has its own place for a clip, and settings for the clips that it makes."""
    package, _, function = site.through.partition(".")
    framework = framework or (package if package == "accelerate" else "")
    is_own = not site.inside or "clip" in function  # the line named asks for the clip, perhaps through a library
    if is_own and fault in _PLACED and place(framework, by_itself=fault in _OF_LOOPS):
        own_place = place(framework, by_itself=fault in _OF_LOOPS)
        if fault is Fault.CLIP_OF_NOTHING:
            return f"{own_place} Give the clip model.parameters(), called anew each time, or a list."
        return own_place + (place_to_read(framework) if fault is Fault.STALE_GRADIENTS else "")
    if is_own:
        return change
    setting = _SETTINGS.get(package) if fault.slug.startswith(("clip", "threshold")) else None
    if setting is None:
        return f"{change} The call is a library's own; look for the setting that asks for it."
    if fault is Fault.CLIP_AS_NORM:
        return f"Set {setting} to 1e30, which reads the norm too and leaves finite gradients as they are."
    return f"{change} The call is a library's own; the setting is {setting}."
