"""Checks of a probe's arguments and of saved states."""

from collections.abc import Mapping, Sequence
from typing import Any, Self, get_args

from torch import nn

from smoothdiag import arguments
from smoothdiag.adapters import finish, name_of
from smoothdiag.console import counted
from smoothdiag.measure.loss.objective import Reduction
from smoothdiag.measure.probe.data import Kind
from smoothdiag.measure.probe.host import Where
from smoothdiag.measure.probe.schedule import Adaptive, budget, every, log_spaced
from smoothdiag.notebooks import as_html

STATE_VERSION = 1
"""Version of what ``state_dict`` returns; states without a version are of version 0 and have the same content."""


def check_arguments(
    model: object,
    loss_fn: object,
    estimators: object,
    schedule: object,
    reduction: object,
    data: object,
    probe_batches: object,
    offload: object,
) -> None:
    """Makes sure that the arguments are of the right kind.

    Raises:
        ValueError: If one is not; the message names it.
    """
    if not isinstance(model, nn.Module):
        raise arguments.wrong("model", "a torch.nn.Module", model)
    if loss_fn is not None:
        arguments.called("loss_fn", loss_fn, "callable as loss_fn(model, batch)")
    check_estimators(estimators)
    check_schedule(schedule)
    arguments.choice("reduction", reduction, get_args(Reduction))
    arguments.choice("data", data, get_args(Kind))
    if offload is not None:
        arguments.choice("offload", offload, get_args(Where))
    if probe_batches is not None and data == "step":
        raise ValueError(
            'Parameter `data` should not be "step" beside `probe_batches`, on which all rows are measured. Leave one '
            "of the two out, or use two probes, with a trace each."
        )


def as_module(model: nn.Module | Sequence[nn.Module]) -> nn.Module:
    """Returns several modules as one, which ``loss_fn`` can take apart, and anything else as it is.

    Raises:
        ValueError: If a list holds anything else, nothing, or the same module twice.
    """
    if not isinstance(model, list | tuple):
        return model  # type: ignore[return-value]  # check_arguments refuses what is no module
    requirement = "a torch.nn.Module, or a list of different ones, such as [generator, discriminator]"
    if not model or not all(isinstance(module, nn.Module) for module in model):
        raise arguments.wrong("model", requirement, model)
    if len(set(map(id, model))) < len(model):
        raise ValueError(f"Parameter `model` should be {requirement}. Found the same module twice.")
    return nn.ModuleList(model)


def check_estimators(estimators: object) -> None:
    """Raises a ValueError unless it is a sequence of estimators."""
    requirement = "a sequence of instances, such as [LocalSmoothness()]"
    if isinstance(estimators, str) or not isinstance(estimators, Sequence):  # a string is a sequence too
        raise arguments.wrong("estimators", requirement, estimators)
    for estimator in estimators:
        if not callable(estimator) or isinstance(estimator, type | nn.Module):
            raise arguments.wrong("estimators", requirement, estimator)


def check_schedule(schedule: object) -> None:
    """Raises a ValueError unless it is a schedule or None; `every` itself, for one, should have been called."""
    requirement = "a Schedule, such as every(20)"
    if schedule is None:
        return
    arguments.called("schedule", schedule, requirement)
    if schedule in (every, log_spaced, budget):
        raise arguments.wrong("schedule", requirement, schedule)


class Managed:
    """What a Probe does besides measuring: it is saved, prints on one line, and closes after a ``with`` statement."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        probe: Any = self
        probe.close()

    def outlive_errors(self) -> None:
        """Lets an error of the first measurement cost a row, as later ones do, because nobody asked for this probe."""
        probe: Any = self
        probe._measuring.has_measured = True

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs to measure at the same steps; batches are no part of it.

        If an optimizer of a list has been left out of the last step, the step ends here.
        """
        probe: Any = self
        finish(probe.optimizer)
        following = probe._schedule.next if isinstance(probe._schedule, Adaptive) else None
        return {"version": STATE_VERSION, "steps": probe.steps, "next": following}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state``, as returned by ``state_dict``.

        A trace file that the probe opened is continued too: rows of steps that the run takes again stay in the file
        but no longer count. With ``data="fixed"`` the resumed run keeps the batches of its own first measured step, so
        its rows describe another loss than the earlier rows; the column ``data_step`` tells them apart. Pass the same
        ``probe_batches`` to both runs to measure on the same data throughout.

        Raises:
            ValueError: If ``state`` is no state of a probe, or if it comes from a later version.
        """
        check_state(state, STATE_VERSION)
        probe: Any = self
        probe.steps = int(state["steps"])
        if isinstance(probe._schedule, Adaptive) and state["next"] is not None:
            probe._schedule.next = int(state["next"])
        probe._due = probe._estimators_due()
        if probe._owns_trace:
            probe.trace.resume(probe.steps)

    def __repr__(self) -> str:
        probe: Any = self
        state = ", closed" if probe.is_closed else ""
        names = f"{type(probe._model).__name__} and {name_of(probe.optimizer)}"
        return f"<Probe of {names}: {counted(len(probe.trace), 'row')} in {counted(probe.steps, 'step')}{state}>"

    def _repr_html_(self) -> str:
        probe: Any = self
        if len(probe.trace):
            todo = "sd.fit_smoothness(probe.trace) fits the rows."
        elif probe.is_closed:
            todo = "make a new probe; this one was closed before it measured anything."
        else:
            todo = "train on; loop over probe.watch(loader), so that the probe sees the batches."
        estimators = "\n".join(f"estimator {estimator!r}" for estimator in probe.estimators)
        facts = f"{estimators}\ndata {probe._data.kind}\ntrace {probe.trace!r}"
        return as_html(f"{repr(probe)[1:-1]}\nNEXT: {todo}\n{facts}")


def check_state(state: object, latest: int) -> None:
    """Makes sure that a probe can continue from a state, which may be of an earlier version.

    Raises:
        ValueError: If it cannot; the message says what is missing.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"Parameter `state` should be what Probe.state_dict() returned. Found {state!r}.")
    version = state.get("version", 0)
    if version not in range(latest + 1):
        raise ValueError(
            f"Parameter `state` should be of version {latest} or earlier. Found version {version!r}; load it with the "
            "smoothdiag that wrote it, or with a later one."
        )
    if missing := {"steps", "next"} - state.keys():
        raise ValueError(
            f"Parameter `state` should be what Probe.state_dict() returned, with the entries `steps` and `next`. "
            f"Found no entry {', '.join(f'`{name}`' for name in sorted(missing))}."
        )
    if isinstance(state["steps"], bool) or not isinstance(state["steps"], int) or state["steps"] < 0:
        raise ValueError(
            f"Parameter `state` should hold a whole number of steps, at least 0. Found `steps = {state['steps']!r}`."
        )
