"""Findings: what is wrong with a training loop, where, how often, and which line to change."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from smoothdiag.doctor.sites import Site

_PAGE: Final = "docs/doctor.md"
_IN_LIBRARY: Final = " The call is a library's own; look for the setting that asks for it."


class Severity(Enum):
    """How bad a finding is; each value says what it means."""

    ERROR = "the run does not train as its code says"
    WARNING = "a number is wrong, or the run can break"
    NOTE = "nothing is wrong, but a line may not do what it is there for"


class Fault(Enum):
    """The faults that the doctor knows: severity, what happened, what to change.

    ``name.lower()``, with hyphens, is what reports and the documentation call it. In the texts ``{other}`` is the
    second line that takes part, and ``{facts}`` are the numbers seen.
    """

    CLIP_AFTER_STEP = (
        Severity.ERROR,
        "The gradients were clipped after the optimizer had used them, so nothing was clipped.",
        "Move this line between backward() and the optimizer's step.",
    )
    CLIP_OF_SCALED_GRADIENTS = (
        Severity.ERROR,
        "The gradients still carried the factor of the GradScaler when they were clipped, so the threshold was "
        "effectively divided by that factor, and moved with it.",
        "Call scaler.unscale_(optimizer) right before this line.",
    )
    CLIP_PER_MICRO_BATCH = (
        Severity.ERROR,
        "A clipped gradient was accumulated onto: every clip shortened the sum so far, so that earlier micro-batches "
        "count less than later ones.",
        "Clip once, after the last backward() of the step and right before the optimizer's step.",
    )
    CLIP_NEVER_BINDS = (
        Severity.NOTE,
        "The clip never changed a gradient: {facts}.",
        "Lower the threshold below the largest norm, or keep the line as a safety net that was not needed so far.",
    )
    CLIP_ALWAYS_BINDS = (
        Severity.NOTE,
        "The clip shortened every gradient, so its length never reached the optimizer: {facts}.",
        "Raise the threshold above the usual norm, or lower the learning rate and say that you normalise gradients.",
    )
    CLIP_AS_NORM = (
        Severity.WARNING,
        "max_norm=inf was used to read the gradient norm. That call writes: it multiplies the gradients by inf/norm, "
        "limited to 1, which is NaN for every gradient once a single one is infinite.",
        "Read the norm with torch.nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None).",
    )
    STALE_GRADIENTS = (
        Severity.ERROR,
        "The gradients were those of the step before: optimizer.step(closure) makes new ones inside the closure, after "
        "this line has run.",
        "Move this line into the closure, after its backward().",
    )
    SCALED_GRADIENTS_IN_HOOK = (
        Severity.WARNING,
        "A fused optimizer divides by the factor of the GradScaler inside its step, so the step pre-hook at {other} "
        "saw scaled gradients; it also runs on steps that are skipped for overflow.",
        "Call scaler.unscale_(optimizer) before this line, or divide by optimizer.grad_scale in the hook.",
    )
    CLIP_AFTER_OPTIMIZER_IN_BACKWARD = (
        Severity.ERROR,
        "The optimizer steps inside backward(), in a hook of its parameters, so this clip came too late and changed "
        "nothing.",
        "Clip each gradient in the hook, before its step ({other}); a global norm needs a step after backward().",
    )
    NORM_OF_ONE_SHARD = (
        Severity.WARNING,
        "The norm of this rank's shard alone was taken for the norm of the whole gradient; other ranks hold the rest.",
        "Read it through .full_tensor(), or add the squares of all ranks with all_reduce before the root.",
    )
    NORM_AFTER_CLIPPING = (
        Severity.WARNING,
        "The gradient norm was read after the clip at {other}, so it does not show how large the gradient was; nobody "
        "read the norm before.",
        "Use what clip_grad_norm_ returns, or read the norm before the clip.",
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
        name: Which fault, as in the documentation.
        severity: ``"error"``, ``"warning"`` or ``"note"``.
        what: What happened.
        count: How often it was seen.
        of: How often it could have been.
        unit: What is counted.
        site: The line at fault.
        change: What to change in it.
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

    def to_dict(self) -> dict[str, Any]:
        """Returns the finding as strings and numbers."""
        names = ("name", "severity", "what", "count", "of", "unit", "file", "line", "code", "change", "link")
        return {name: getattr(self, name) for name in names} | {"inside": self.site.inside}

    def __str__(self) -> str:
        inside = f"\n  inside {self.site.inside}" if self.site.inside else ""
        return (
            f"{self.severity.upper()} {self.name}: {self.count} of {self.of} {self.unit}\n"
            f"  {self.site}: {self.code}{inside}\n  {self.what}\n  Change: {self.change}\n  See {self.link}"
        )


def finding(
    fault: Fault, site: Site, count: int, of: int, *, unit: str = "steps", other: str = "", facts: str = ""
) -> Finding:
    """Returns a finding with the texts of its fault."""
    severity, what, change = fault.value
    names = {"other": other, "facts": facts}
    return Finding(
        name=fault.slug,
        severity=severity.name.lower(),
        what=what.format(**names),
        count=count,
        of=of,
        unit=unit,
        site=site,
        change=change.format(**names) + (_IN_LIBRARY if site.inside else ""),
        link=f"{_PAGE}#{fault.slug}",
    )


def as_text(findings: list[Finding], steps: int) -> str:
    """Returns a table of the findings, and below it what each of them means."""
    if not steps and not findings:
        return (
            "smoothdiag doctor: no optimizer step was seen in this process. Processes that a script starts are not "
            "watched: start the ranks with torchrun and the doctor in each of them. Nor are compiled steps, or threads "
            "that outlive the script."
        )
    counted = f"{len(findings) or 'no'} finding{'' if len(findings) == 1 else 's'}"
    head = f"smoothdiag doctor: {counted} in {steps} step{'' if steps == 1 else 's'}"
    if not findings:
        return f"{head}."
    rows = [("severity", "finding", "seen", "line")]
    rows += [(f.severity, f.name, f"{f.count} of {f.of} {f.unit}", str(f.site)) for f in findings]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join([head, "", *table, *(f"\n{each}" for each in findings)])
