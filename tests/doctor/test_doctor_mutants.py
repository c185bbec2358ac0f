"""doctor: each rule is broken in turn, and some cell of the table shows it."""

import contextlib
import importlib
import inspect
import textwrap

import pytest
from cells import FRAMEWORKS, cells, scripts

MUTANTS = [
    ("observer.Observer._is_late", " and not owner.was_clipped", ""),
    ("observer.Observer._is_late", "owner.left == self.passes and not owner.was_clipped", "not owner.was_clipped"),
    ("observer.Observer._is_late", "self._count(fault, site, used[0])", "pass"),
    ("observer.Observer._is_late", "not each.is_used_up", "True"),
    ("observer.Observer.threshold", "or not call.returns_norm", ""),
    ("observer.Observer.threshold", "(what != \"infinity\" or not call.returns_norm)", "True"),
    ("observer.Observer.before_clip", "if call.is_after_step:", "if False:"),
    ("observer.Observer.before_clip", "not call.by_value and ", ""),
    ("observer.Observer.before_clip", "if self.in_backward:", "if False:"),
    ("observer.Observer.before_clip", "if owner.scaled", "if False"),
    ("observer.Observer.before_clip", "not self.has_read_scale", "True"),
    ("observer.Observer.before_clip", "owner.fingerprints() == owner.prints", "True"),
    ("observer.Observer.before_step", " and owner.has_sum", ""),
    ("observer.Observer.before_step", "if owner.scaled", "if False"),
    ("observer.Observer.before_step", "not divides and ", ""),
    ("observer.Observer.before_step", "not self.has_read_scale and ", ""),
    ("observer.Observer.before_step", "owner.fingerprints() == owner.prints", "True"),
    ("observer.Observer.before_step", "self._count_spoiled(owner)", "pass"),
    ("observer.Observer.after_step", "self._count_spoiled(owner)", "pass"),
    ("observer.Observer.after_step", "elif owner.repeats:", "elif False:"),
    ("observer.Observer.after_step", "elif owner.repeats:", "else:"),
    ("observer.Observer.after_step", "held if is_seen else []", "held"),
    ("observer.Observer.after_clip", "if self._vain.has_missed(call.site):", "if False:"),
    ("observer.Observer.after_update_of_gradients", "renew()", "parameters"),
    ("observer.Observer.update_by_hand", "hand.add(parameters) or has_moved", "hand.add(parameters)"),
    ("observer.Observer.update_by_hand", "hand.add(parameters) or has_moved", "(hand.add(parameters), has_moved)[1]"),
    ("observer.Observer.update_by_hand", "is_seen=is_old", "is_seen=False"),
    ("observer.Observer.update_by_hand", "self._count(Fault.CLIP_PER_MICRO_BATCH, clip, hand)", "pass"),
    ("observer.Observer.update_by_hand", "self._vain.before_step(", "len("),
    ("uses._Line.settle", "self.is_dropped and self.is_beside", "self.is_dropped"),
    ("uses._Line.settle", "self.is_dropped and self.is_beside", "self.is_beside"),
    ("uses.Uses.before_backward", "line.settle()", "pass"),
    ("uses._Line.look", "each.clipped = None", "pass"),
    ("uses.Uses.before_backward", "line.settle_mixed()", "pass"),
    ("uses.Uses.clip", "line.is_beside = line.is_dropped = False", "pass"),
    ("uses.Uses.clip", "not each.is_used_up", "each.gradient is not None"),
    ("uses.Uses.clip", " and not by_value", ""),
    ("uses.Uses.clip", " and has_entries([each.gradient])", ""),
    ("uses.Uses.before_step", "line.shared += not rest", "pass"),
    ("uses.Uses.before_step", "line.has_mixed or len(rest) < len(line.mixed)", "True"),
    ("uses.Uses.findings", "line.extra >= ENOUGH", "line.extra"),
    ("uses._Line.settle_mixed", "self.has_mixed", "True"),
    ("gradients.Held.is_limited", "mark.moment >= self.owner.since and ", ""),
    ("uses.Uses.before_step", "line.is_used, line.waiting = True, {}", "pass"),
    ("uses.Uses.before_step", "is_kept(mark.gradient, mark)", "True"),
    ("uses.Uses.before_step", "id(mark.gradient) in gradients", "True"),
    ("uses.Uses.after_step", "self._parts(stepping, seen)\n        return", "self._parts(stepping, seen)"),
    ("uses.Uses.after_step", "owner.was_clipped = bool(seen)", "pass"),
    ("uses.Uses.meant", "if any(each.owner is owner for each in line.waiting):", "if False:"),
    ("uses.Uses.findings", "line.unused >= ENOUGH", "line.unused"),
    ("uses.Uses.findings", "and not line.is_used", ""),
    ("uses.Uses.findings", "line.parts >= ENOUGH", "line.parts"),
    ("uses.Uses.findings", "and not line.wholes", ""),
    ("uses.Uses._parts", "length > line.limit", "True"),
    ("uses.Uses._parts", "_largest(gradients) if line.by_value else _norm(gradients)", "_norm(gradients)"),
    ("uses.Uses._parts", "_largest(gradients) if line.by_value else _norm(gradients)", "_largest(gradients)"),
    ("vain.Vain.clip", "call.is_used_up", "False"),
    ("vain.Vain.clip", "(cause := mistaken(parameters, known))", "False"),
    ("vain._Line.finding", "self._early >= ENOUGH", "self._early"),
    ("vain._Line.finding", "self._early >= ENOUGH", "False"),
    ("vain._Line.finding", "self._in_vain >= FEWEST_CLIPS", "self._in_vain"),
    ("vain._Line.finding", "self._in_vain >= FEWEST_CLIPS", "False"),
    ("vain._Line.step", "self.is_given and ", ""),
    ("vain.Vain.before_step", "if not any(each.live(\"clipped\") for each in stepped):", "if True:"),
    ("micro_batches.MicroBatches.before_backward", "is_kept(key[0].gradient, mark)", "True"),
    ("micro_batches.MicroBatches.before_backward", " and not each.is_used_up", ""),
    ("micro_batches.MicroBatches.before_clip_in_backward", "if each in self._at_risk", "if False"),
    ("micro_batches.MicroBatches.lines", "by_hand or mark.is_of(each.gradient)", "mark.is_of(each.gradient)"),
    ("micro_batches.MicroBatches.lines", "by_hand or mark.is_of(each.gradient)", "True"),
    ("micro_batches.MicroBatches.lines", "if key[0].owner is owner", ""),
    ("by_hand.ByHand.has_moved", "not _same(p.detach(), copy)", "False"),
    ("by_hand.ByHand.has_moved", "not _same(p.detach(), copy)", "True"),
    ("by_hand.ByHand.has_old_gradients", "mark.holds(p.grad)", "True"),
    ("by_hand._same", " | ((now != now) & (before != before))", ""),
    ("given.mistaken", "if known:", "if False:"),
    ("given.mistaken", "any(each.address in wheres for each in held)", "False"),
    ("given.repeated", "times > 1", "False"),
    ("given.repeated", "getattr(p, \"grad\", None) is not None", "True"),
    ("thresholds.kind", "math.isnan(limit)", "False"),
    ("thresholds.kind", "math.isinf(limit)", "False"),
    ("thresholds.kind", "limit < 0", "False"),
    ("thresholds.kind", "limit == 0", "False"),
    ("thresholds.kind", "limit == 0", "limit < 1e-3"),
    ("scaling.Scaling._on_step", "self._observer.before_scaled_step(owner)", "pass"),
    ("scaling.Scaling._on_unscale", "owner.scaled = False", "pass"),
    ("scaling.Scaling._on_get_scale", "self._observer.has_read_scale = True", "pass"),
    ("findings._for_library", "is_own and fault in _PLACED and place(framework", "False and place(framework"),
    ("findings._for_library", "if fault is Fault.STALE_GRADIENTS", "if False"),
    ("findings.worst_first", "each.severity == \"note\" and", "False and"),
    ("findings.worst_first", "each.name == Fault.CLIP_AFTER_STEP.slug and", "False and"),
    ("frameworks.around", "_MANUAL if name == \"lightning\" and _is_manual(frame) else name", "name"),
    ("frameworks.around", "beside = beside or", "beside = \"\" and"),
    ("frameworks.around", "return trainer or beside", "return beside or trainer"),
    ("frameworks.place", "by_itself and framework == _MANUAL", "False"),
    ("watching.Watcher._before_step", "owner.framework or helper(caller(frame))", "\"\""),
]  # fmt: skip


def mutated(name: str, old: str, new: str) -> tuple:
    """Returns a function, and its code with one piece of the text replaced."""
    module_name, *parents = name.split(".")
    module = found = importlib.import_module(f"smoothdiag.doctor.{module_name}")
    for each in parents:
        found = vars(found)[each] if isinstance(found, type) else getattr(found, each)
    function = found.fget if isinstance(found, property) else found
    text = textwrap.dedent(inspect.getsource(function))
    assert old in text, f"{name} has no `{old}`"
    names: dict = {}
    text = "\n".join(line for line in text.splitlines() if not line.startswith("@"))
    exec(compile(f"from __future__ import annotations\n{text.replace(old, new)}", name, "exec"), vars(module), names)
    return function, names[function.__name__].__code__


def complaints(order):
    """Yields what is wrong with each cell in turn."""
    for cell in order:
        try:
            found, _ = cell.judge()
        except Exception as error:
            yield f"{cell.title}: {error!r}"
            return
        if wrong := cell.complaint(found):
            yield wrong


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "old", "new"), MUTANTS)
def test_a_cell_shows_that_the_rule_is_broken(monkeypatch, name, old, new) -> None:
    function, code = mutated(name, old, new)
    monkeypatch.setattr(function, "__code__", code)
    is_about_frameworks = name.startswith(("frameworks", "findings._for", "watching"))
    order = [each for each in (*cells(), *scripts()) if (each.path.stem in FRAMEWORKS) == is_about_frameworks]
    with contextlib.closing(complaints(order)) as wrong:
        assert next(wrong, "") != "", f"{name}: no cell notices `{old}` -> `{new}`"
