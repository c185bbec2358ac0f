"""Observer: follows the calls of a training loop and finds faults in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from smoothdiag.console import counted
from smoothdiag.doctor.by_hand import ByHand
from smoothdiag.doctor.counts import Binding, Count
from smoothdiag.doctor.findings import Fault, Finding, finding, worst_first
from smoothdiag.doctor.given import Call, mistaken, repeated
from smoothdiag.doctor.gradients import Held, Mark, Owner, is_sharded, local
from smoothdiag.doctor.micro_batches import MicroBatches
from smoothdiag.doctor.old_norms import OldNorms
from smoothdiag.doctor.register import Register
from smoothdiag.doctor.shards import Shards
from smoothdiag.doctor.sites import NOWHERE, Site
from smoothdiag.doctor.thresholds import effect, kind
from smoothdiag.doctor.twice import Twice
from smoothdiag.doctor.uses import ENOUGH, Uses
from smoothdiag.doctor.vain import Vain


class Observer:
    """Follows steps, backward passes, clips and norms, and counts faults.

    Attributes:
        steps: Optimizer steps so far.
        shards: Norms of local shards.
        register: The optimizers and their parameters.
        old_norms: Norms that were read, and the gradients they belong to.
        uses_scaler: Whether a GradScaler has scaled a loss so far.
        has_read_scale: Whether somebody has read the scaler's factor since the last backward pass.
        passes: Backward passes begun so far.
        in_backward: Whether a backward pass is under way.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.register, self.old_norms = Register(), OldNorms()
        self.shards = Shards(lambda site: self._count(Fault.NORM_OF_ONE_SHARD, site))
        self.uses_scaler = self.has_read_scale = self.in_backward = self._is_scaled = False
        self.passes = 0
        self._micro_batches = MicroBatches()
        self._before: list[tuple[Owner, list[tuple[int, int]]]] = []
        self._counts: dict[tuple[Fault, Site], Count] = {}
        self._bindings: dict[Site, Binding] = {}
        self._vain, self._uses, self._twice = Vain(), Uses(), Twice()
        self._moment = 0

    def update_by_hand(self, parameters: Iterable[Tensor]) -> None:
        """Looks whether a loop without an optimizer has written to its parameters since the last look.

        Args:
            parameters: The parameters of the backward pass or clip that is about to run.
        """
        hand = self.register.by_hand = self.register.by_hand or ByHand()
        has_moved, is_old = hand.has_moved(), hand.has_old_gradients()
        if hand.add(parameters) or has_moved:
            for clip in self._micro_batches.lines(hand, by_hand=True):
                self._count(Fault.CLIP_PER_MICRO_BATCH, clip, hand)
            self._vain.before_step(
                hand, [each for each in self.register.held(hand.parameters) if each.gradient is not None]
            )
            hand.entered = self.passes
            self._count_adding_up(hand)
            self.after_step(hand, is_seen=is_old)
        self.register.own_by_hand(hand.parameters, hand)
        hand.copy()

    def threshold(self, call: Call) -> None:
        """Checks the threshold of a clip."""
        what = "" if call.limit is None else kind(call.limit)
        if call.limit is not None and what and (what != "infinity" or not call.returns_norm):
            text = effect("clip_value" if call.by_value else "max_norm", call.limit)
            self._count(Fault.THRESHOLD_WITHOUT_MEANING, call.site, other=text)

    def before_clip(self, parameters: Sequence[Tensor], held: Sequence[Held], call: Call) -> bool:
        """Checks the order of calls before a clip; returns whether the clip can limit a step."""
        self.register.moved(held)
        if call.is_after_step:
            self._count(Fault.CLIP_AFTER_STEP, call.site, held[0].owner)
        if call.is_after_step or self._is_late(held, call.site):
            return False
        if self._vain.clip(parameters, held, call, ()) or all(each.gradient is None for each in held):
            return False
        if not call.by_value and (number := repeated(parameters)):
            self._count(Fault.CLIP_OF_DUPLICATES, call.site, held[0].owner, counted(number, "parameter"))
        if old := self.old_norms.cause(held, call.total_norm, self.passes):
            self._count(Fault.CLIP_WITH_OLD_NORM, call.site, held[0].owner, *old)
        elif not call.by_value and call.limit is not None and not kind(call.limit):
            self._twice.clip(held, call.site, call.norm_type)
        if self.in_backward:  # a hook clips each gradient as soon as it is there
            self._micro_batches.before_clip_in_backward(held)
        for owner in {each.owner: None for each in held}:
            if owner.scaled and not self.has_read_scale and owner.fingerprints() == owner.prints:
                self._count(Fault.CLIP_OF_SCALED_GRADIENTS, call.site, owner)
        if call.returns_norm:
            self._read(held, call.site)
        return True

    def find(self, tensors: Iterable[Any]) -> list[tuple[Held, bool]]:
        """Returns the parameters whose gradients these tensors are, and whether each tensor is one rank's shard."""
        return self.register.find(tensors, in_backward=self.in_backward)

    def after_update_of_gradients(self) -> None:
        """Records that gradients were written to, in a loop without an optimizer."""
        if self.register.by_hand is not None:
            self.register.by_hand.renew()

    def after_clip(self, held: Sequence[Held], known: Sequence[bool], call: Call) -> None:
        """Marks the gradients as clipped; ``known`` says which norms had been read before."""
        if self._vain.has_missed(call.site):
            return
        for each, was_known in zip(held, known, strict=True):
            is_known = was_known or call.returns_norm or call.total_norm is not None
            each.clipped = Mark(each.gradient, call.site, known=is_known, moment=self._moment)
        if call.limit is not None and not all(each.is_used_up for each in held):
            self._uses.clip(call.site, held, call.limit, by_value=call.by_value)

    def clip_of_others(self, parameters: Sequence[Tensor], call: Call) -> None:
        """Checks a clip of parameters that no watched optimizer holds; frozen parameters are ignored."""
        is_meant = not parameters or any(getattr(p, "requires_grad", False) for p in parameters)
        if self.register.all and (is_meant or mistaken(parameters, self.register.all)):
            self._vain.clip(parameters, [], call, self.register.all)

    def bind(self, site: Site, norm: Any, threshold: Any) -> None:
        """Counts whether a clip changed the gradient."""
        if is_sharded(norm):
            if not all(placement.is_replicate() for placement in norm.placements):
                return
            norm = local(norm)
        self._bindings.setdefault(site, Binding()).add(norm, threshold)

    def clip_as_norm(self, held: Sequence[Held], site: Site, *, is_harmful: bool) -> None:
        """Records a clip that only serves to read the norm."""
        if is_harmful:
            self._count(Fault.CLIP_AS_NORM, site)
        self._read(held, site)

    def norm(self, found: Sequence[tuple[Held, bool]], site: Site, value: Any, *, may_be_stale: bool = True) -> None:
        """Records a norm that was read; unless ``may_be_stale``, an old norm is no fault, as in library closures."""
        held = [each for each, _ in found]
        if any(is_part for _, is_part in found):
            self.shards.add(site, value)
        if all(each.is_used_up for each in held):
            for owner in {each.owner: None for each in held}:
                if owner.makes_gradients and owner.frame and may_be_stale:
                    self._count(Fault.STALE_GRADIENTS, site, owner)
                elif owner.makes_gradients and not owner.frame:
                    owner.early.append(site)
        self.old_norms.read(held, site, value, self.passes)
        self._read(held, site)

    def before_backward(self, is_scaled: bool) -> None:
        """Records which gradients a backward pass is about to add to, and whether its loss is scaled."""
        self.shards.settle()
        self._uses.before_backward()
        self.passes += 1
        self._moment += 1
        self.in_backward, self._is_scaled = True, is_scaled
        self._micro_batches.before_backward(self.register.all)
        for owner in self.register.owners:
            owner.before_backward()
        if self.uses_scaler:
            self._before = [(owner, owner.fingerprints()) for owner in self.register.owners]

    def after_backward(self) -> None:
        """Checks which gradients a backward pass has written."""
        self.in_backward = False
        self.register.moved(self.register.all)
        self._micro_batches.after_backward()
        for owner, before in self._before:
            now = owner.fingerprints()
            if now != before:
                owner.scaled, owner.prints = self._is_scaled, now
        self._before, self.has_read_scale = [], False
        if self.register.by_hand is not None:
            self.register.by_hand.copy()
        for owner in self.register.owners:
            owner.after_backward(self._first(owner))
        self._vain.after_backward()

    def before_step(self, owner: Owner, site: Callable[[], Site], hook: str, *, divides: bool) -> None:
        """Checks the gradients that the step is about to use.

        Args:
            owner: The optimizer that steps.
            site: Returns the line of the step.
            hook: A hook that sees gradients with a GradScaler's factor, by its place.
            divides: Whether the step itself divides by that factor.
        """
        owner.entered = self.passes
        held = self.register.held(owner.parameters)
        stepped = [each for each in held if each.gradient is not None]
        self._vain.before_step(owner, stepped)
        if owner.closure is None:  # a closure may throw the gradients away
            self._uses.before_step(stepped)
        self._count_spoiled(owner)
        self._count_adding_up(owner, site)
        owner.repeats = all(each.is_used_up for each in stepped) and owner.has_sum
        if owner.scaled and not divides and not self.has_read_scale and owner.fingerprints() == owner.prints:
            self._count(Fault.STEP_OF_SCALED_GRADIENTS, site(), owner)
        if owner.closure is not None and owner.early:
            here = site()
            for early in owner.early:
                # A line above the step, in the same function, was meant for the coming step; other lines may be right.
                if (early.file, early.function) == (here.file, here.function) and early.line < here.line:
                    self._count(Fault.STALE_GRADIENTS, early, owner)
        if hook:
            self._count(Fault.SCALED_GRADIENTS_IN_HOOK, site(), owner, hook)

    def before_scaled_step(self, owner: Owner) -> None:
        """Records that a GradScaler decides whether to take a step."""
        self._uses.meant(owner)

    def after_step(self, owner: Owner, site: Callable[[], Site] | None = None, *, is_seen: bool = True) -> None:
        """Marks the gradients as used; ``is_seen`` unless new gradients came since, which the step cannot have used."""
        owner.frame = 0
        owner.early.clear()
        owner.makes_gradients, owner.left = self.passes > owner.entered, self.passes
        held = self.register.held(owner.parameters)
        if site is not None:
            if owner.makes_gradients:
                self._count_spoiled(owner)
                self._count_adding_up(owner, site)
            elif owner.repeats:
                self._count(Fault.STEP_WITH_USED_GRADIENTS, site(), owner)
            self._uses.after_step(owner, held)
        self._twice.step(owner)
        owner.steps += 1
        self._moment += 1
        owner.since = self._moment
        self.steps = max(self.steps, owner.steps)
        for each in held if is_seen else []:
            each.stepped = Mark(each.gradient, NOWHERE)
        self.register.moved(held)
        self._micro_batches.forget(owner)

    def findings(self) -> list[Finding]:
        """Returns the findings so far, worst first."""
        found = [
            finding(
                fault,
                site,
                each.number,
                each.possible(self.steps),
                other=each.other,
                facts=each.facts,
                framework=each.framework,
            )
            for (fault, site), each in self._counts.items()
            if fault is not Fault.ZERO_GRAD_MISSING or each.number >= ENOUGH
        ]
        found += [
            finding(Fault.CLIP_TWICE, second, number, of, unit="clips", other=str(first))
            for first, second, number, of in self._twice.lines()
            if first in self._bindings and self._bindings[first].has_bound
        ]
        found += [said for site, each in self._bindings.items() if (said := each.finding(site)) is not None]
        return worst_first(found + self._vain.findings() + self._uses.findings())

    def _first(self, owner: Owner) -> Held | None:
        """Returns the first parameter of an owner that has a gradient."""
        return next((each for each in self.register.held(owner.parameters) if each.gradient is not None), None)

    def _is_late(self, held: Sequence[Held], site: Site) -> bool:
        fresh = {each.owner for each in held if not each.is_used_up}
        used = [owner for owner in dict.fromkeys(each.owner for each in held) if owner not in fresh]
        gone = next((owner for owner in used if owner.in_backward and owner.left == self.passes), None)
        if gone is not None:
            self._count(Fault.CLIP_AFTER_OPTIMIZER_IN_BACKWARD, site, gone, str(gone.step_site))
        if fresh or gone is not None:
            for owner in used if fresh and gone is None else []:
                if owner.left == self.passes and not owner.was_clipped and not owner.makes_gradients:
                    self._count(Fault.CLIP_AFTER_STEP, site, owner)
            return not fresh
        # If there are no gradients, they were removed after the step, or the latest backward pass made none here.
        if all(each.gradient is None for each in held) and any(owner.left != self.passes for owner in used):
            return False
        fault = Fault.STALE_GRADIENTS if any(owner.makes_gradients for owner in used) else Fault.CLIP_AFTER_STEP
        self._count(fault, site, used[0])
        return True

    def _count_spoiled(self, owner: Owner) -> None:
        for clip in self._micro_batches.lines(owner):
            self._count(Fault.CLIP_PER_MICRO_BATCH, clip, owner)

    def _count_adding_up(self, owner: Owner, site: Callable[[], Site] | None = None) -> None:
        if (first := owner.adds_up) is None:
            return
        if first.is_limited and first.clipped is not None:
            self._count(Fault.ZERO_GRAD_MISSING, first.clipped.site, owner)
        elif site is not None:
            self._count(Fault.ZERO_GRAD_MISSING, site(), owner)

    def _read(self, held: Sequence[Held], site: Site) -> None:
        for each in held:
            clipped = each.live("clipped")
            if clipped is None:
                each.read = Mark(each.gradient, site)
            elif not clipped.known:
                self._count(Fault.NORM_AFTER_CLIPPING, site, each.owner, str(clipped.site))
                clipped.known = True

    def _count(
        self, fault: Fault, site: Site, owner: Owner | None = None, other: Site | str = "", facts: str = ""
    ) -> None:
        """Counts a fault once per step of the optimizer concerned."""
        self._counts.setdefault((fault, site), Count(str(other), facts)).add(
            owner, self.steps if owner is None else owner.steps
        )
