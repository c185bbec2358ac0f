"""SpikeGuard: watches every step of a run for spikes, without waiting for the device, and says why they happened."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from smoothdiag import arguments
from smoothdiag.adapters import adapter_of, finish, name_of, stepping
from smoothdiag.autoclip.checks import check_probe
from smoothdiag.measure.loss import batches
from smoothdiag.measure.probe import Probe
from smoothdiag.spikes.acting import Action
from smoothdiag.spikes.causes import Explanation
from smoothdiag.spikes.elements import Elements
from smoothdiag.spikes.events import SpikeEvent
from smoothdiag.spikes.further import Further
from smoothdiag.spikes.inquiry import Inquiry
from smoothdiag.spikes.modules import ModuleNorms, Modules
from smoothdiag.spikes.recent import Recent
from smoothdiag.spikes.rules import SPAM, Rule, SixSigma, ZClip
from smoothdiag.spikes.stepping import Stepping
from smoothdiag.spiking import SpikeRule

if TYPE_CHECKING:
    import pandas as pd

Keep = Literal["batches", "parameters"]

VERSION = 1
"""Version of the states that this version writes."""


class SpikeGuard:
    """Watches gradient norm, loss and update at every step, and acts on spikes.

    A step spikes if a signal is far above the last fifty steps, and further than the last 500 make one expect (see
    `SpikeRule`), or if it is not finite. Everything is compared on the device. The host learns of spikes when a copy
    has arrived there, or when you ask for ``events``.

    How it acts on a spike of gradient norm or loss:
        * ``"log"``: it changes nothing.
        * ``"skip"``: parameters, moments and step counts stay as they were. Fused optimizers of torch are told on the
          device. All others are given no gradients, and for that one number is read at every step.
        * ``"clip"``: it scales the gradients to the usual norm. A gradient that is not finite becomes zero.

    Things to know:
        * Call ``observe(loss)`` before ``optimizer.step()``. The loss of a closure is seen without that.
        * If the loop clips, call ``observe(loss, grad_norm=clip_grad_norm_(...))``: the guard sees the gradients as the
          optimizer gets them, and clipped ones never spike.
        * The first ``rule.fewest`` steps never spike, because nobody knows yet what is usual.
        * Spikes of the update are known after the step, so they are only logged.
        * Steps that a GradScaler skips are no spikes.
        * Where nothing spikes, weights are bit for bit those of a run without the guard.
        * To resume, load the state of the guard, too.

    Args:
        optimizer: The optimizer, or the list of optimizers that step on one loss.
        probe: A probe of that optimizer. It shows the guard the batches, and replays steps that spike.
        action: What to do at a spike of gradient norm or loss.
        rule: What a spike is: a `SpikeRule`, or a published rule (`SixSigma`, `ZClip`, `SPAM`).
        clip_to: What ``"clip"`` scales gradients to, in usual norms. `ZClip` has a norm of its own, and `SPAM` clips
            single elements.
        update_norm: Whether to watch the length of updates per rate, too; default: if parameters are kept.
        keep: ``"batches"`` (the default, with a probe) keeps the batches and random states of the last steps. A spike
            is then replayed before the optimizer steps, if that needs no wait. ``"parameters"`` also keeps the
            parameters of the last steps in host memory, so that the step before a spike can be measured from where it
            began.
        held_out: Held-out batches, of the kind that ``loss_fn`` takes. The guard measures on them, too, what clipping
            would have been worth. That takes ``keep="parameters"``, and two forward passes per batch at such a spike.
        modules: Whether to watch the gradient norm of each module that holds parameters, too; or names of modules, such
            as ``["layers.0", "layers.1"]``. Each is judged alone, and has to lie further away the more there are. The
            names come from the probe, or from an optimizer that was made with ``model.named_parameters()``. With the
            action ``"clip"``, a module that spikes is scaled to its own usual norm. Only with a `SpikeRule`.
        group: The ranks that train one model together; default: all. They decide alike, by one sum of two numbers over
            ranks at each step, and one more with `modules` or `SPAM`. Where ranks train models of their own, give each
            a group of its own.

    Raises:
        ValueError: If an argument is of the wrong kind, or if the optimizer takes several gradients in a step (LBFGS)
            and the action is not ``"log"``, or if it keeps no second moments and the rule is `SPAM`.

    Examples:
        >>> w = torch.ones(1, requires_grad=True)
        >>> optimizer = torch.optim.SGD([w], lr=0.1)
        >>> guard = sd.SpikeGuard(optimizer, action="skip")
        >>> for k in range(40): w.grad = torch.tensor([30.0 if k == 35 else 1 + k % 3 / 10]); optimizer.step()
        >>> print(guard.events[0])
        step 35: grad_norm 30, usually 1.1, 24.5 deviations above; skipped
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        probe: Probe | None = None,
        *,
        action: Action = "log",
        rule: Rule | None = None,
        clip_to: float = 1.0,
        update_norm: bool | None = None,
        keep: Keep | None = None,
        held_out: Iterable[Any] | None = None,
        modules: Modules = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        arguments.choice("action", action, get_args(Action))
        arguments.positive("clip_to", clip_to)
        if update_norm is not None:
            arguments.flag("update_norm", update_norm)
        if keep is not None:
            arguments.choice("keep", keep, get_args(Keep))
        if probe is not None:
            check_probe(optimizer, probe, "SpikeGuard")
        elif keep is not None:
            raise arguments.wrong("keep", "left out without a probe, which sees the batches", keep)
        if held_out is not None and (keep != "parameters" or action != "log"):
            raise ValueError(
                'Parameter `held_out` should be left out unless `keep="parameters"` and `action="log"`: only then both '
                f"ends of a step are known. Found `keep = {keep!r}` and `action = {action!r}`."
            )
        rule = SpikeRule() if rule is None else rule
        if not isinstance(rule, SpikeRule | SixSigma | ZClip | SPAM):
            raise arguments.wrong("rule", "a SpikeRule, SixSigma, ZClip or SPAM", rule)
        if modules is not False and not isinstance(rule, SpikeRule):
            raise ValueError(
                "Parameter `modules` should be left out unless the rule is a SpikeRule: the published rules are for "
                f"the norm of the whole gradient, and of many norms one would be a spike too often. Found {rule}."
            )
        self._optimizer, self._action = (optimizer := stepping(optimizer)), action
        if action != "log" and adapter_of(optimizer).way == "nothing":
            raise ValueError(
                'Parameter `action` should be "log" for an optimizer that takes several gradients in a step. '
                f"Found `action = {action!r}` with {name_of(optimizer)}."
            )
        recent = Recent(optimizer, probe, keeps_parameters=keep == "parameters")
        watches = keep == "parameters" if update_norm is None else update_norm
        self._inquiry = Inquiry(recent, probe)
        if held_out is not None and probe is not None:
            self._inquiry.held_out = batches.held_out(held_out, 0, probe.parameters, "held_out")
        self._stepping = Stepping(
            optimizer,
            action,
            rule,
            clip_to,
            update_norm=watches,
            group=group,
            inquiry=self._inquiry,
            further=_further(optimizer, probe, rule, modules, clip_to),
        )

    def __repr__(self) -> str:
        return f"<SpikeGuard of {name_of(self._optimizer)}, action {self._action!r}; `events` lists the spikes>"

    def observe(self, loss: Tensor | float | None = None, *, grad_norm: Tensor | float | None = None) -> None:
        """Shows the guard the loss of the step that comes; it is not read.

        Args:
            loss: The loss of a micro-batch, as it is trained. Of several micro-batches in a step, the mean counts.
            grad_norm: The gradient norm that the loop has measured before it clipped; default: that of the gradients
                that the optimizer gets. Show it on all ranks, or on none.

        Raises:
            ValueError: If one of them is no single number.
        """
        finish(self._optimizer)
        self._stepping.show(loss, grad_norm)

    @property
    def events(self) -> list[SpikeEvent]:
        """The spikes so far; waits for the device."""
        self._stepping.read()
        return list(self._stepping.journal.events)

    def explain(self, event: SpikeEvent) -> Explanation:
        """Returns why a run spiked: cause, numbers, and a paragraph.

        The answer is found when the spike is seen, because the weights move on. Asking for it costs nothing.

        Args:
            event: One of ``events``.

        Raises:
            ValueError: If this guard has not noted the event.
        """
        self._stepping.read()
        return self._inquiry.answer(event)

    @property
    def lost(self) -> int:
        """Number of spikes that are missing in ``events``: the device keeps 64 until somebody asks for them."""
        self._stepping.read()
        return self._stepping.journal.lost

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return self._stepping.steps

    @property
    def history(self) -> pd.DataFrame:
        """The spikes so far, one row for each signal.

        Columns: step, signal, value, usual, deviations, done, cause, and clip_benefit: how much lower the loss of the
        batch before would be, had a long gradient been clipped to the usual norm. It is known with
        ``keep="parameters"`` where nothing was clipped, and negative where clipping would have done harm.
        clip_benefit_held_out is the same on the held-out batches.
        """
        import pandas as pd

        columns = ["step", "signal", "value", "usual", "deviations", "done", "cause"]
        columns += ["clip_benefit", "clip_benefit_held_out"]
        rows = [
            (
                *(event.step, name, event.values[name], event.usual[name], event.deviations[name]),
                *(event.done, self._inquiry.answer(event).cause),
                self._inquiry.answer(event).evidence.get("clip_benefit_before", math.nan),
                self._inquiry.answer(event).evidence.get("clip_benefit_held_out", math.nan),
            )
            for event in self.events
            for name in event.spiked
        ]
        return pd.DataFrame(rows, columns=columns)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs to go on exactly; waits for the device."""
        finish(self._optimizer)
        return {"version": VERSION, **self._stepping.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state``, as returned by ``state_dict``.

        Raises:
            ValueError: If it is no such state, comes from a newer version, or from a guard with another rule or other
                signals.
        """
        if (
            not isinstance(state, Mapping)
            or not {"version", "steps", "statistics", "journal", "explanations"} <= state.keys()
        ):
            raise ValueError(
                "Parameter `state` should be the result of `SpikeGuard.state_dict()`. Found another value."
            )
        if state["version"] != VERSION:
            raise ValueError(
                f"Parameter `state` should be of version {VERSION}: load it with the smoothdiag that saved it, or a "
                f"newer one. Found version {state['version']!r}."
            )
        self._stepping.load_state_dict(state)

    def detach(self) -> None:
        """Stops watching and acting; the events stay."""
        finish(self._optimizer)
        self._stepping.detach()


def _further(
    optimizer: torch.optim.Optimizer, probe: Probe | None, rule: Rule, modules: Modules, clip_to: float
) -> Further | None:
    if isinstance(rule, SPAM):
        return Elements(optimizer, rule)
    if modules is False or not isinstance(rule, SpikeRule):
        return None
    return ModuleNorms(optimizer, probe, modules, rule, clip_to)
