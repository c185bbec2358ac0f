"""Shards: the state that FSDP2 keeps of a model between passes, and how the probe repairs it after a fault."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from smoothdiag.measure.loss.agreement import all_failed
from smoothdiag.measure.loss.coordinates import fully_sharded
from smoothdiag.measure.loss.faults import NotPutBack

TESTED = ("2.13",)
"""Versions of torch whose private state is known, and under which rows equal the rows of one process."""


class Shards:
    """The modules of a model that FSDP2 shards; false if there are none.

    Args:
        model: The model, between two passes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = fully_sharded(model)
        self._mended: Exception | None = None

    def __bool__(self) -> bool:
        return bool(self._modules)

    @contextmanager
    def mended(self) -> Iterator[None]:
        """Repairs the state after an exception in forward or backward passes, if all ranks raise one together.

        It may be nested; an exception is handled once.

        Raises:
            NotPutBack: From the exception, if another rank did not fail, or if the state cannot be restored or
                verified.
        """
        if not self:
            yield
            return
        self.reshard()
        self._mended = None
        registered = list(self._model.parameters())
        try:
            yield
        except NotPutBack:
            raise
        except Exception as error:
            if error is not self._mended:
                self._put_back(registered, error)
                self._mended = error
            raise
        except BaseException:
            # Somebody stops the run by hand. In a notebook it may go on.
            with contextlib.suppress(Exception):
                self._reset()
            raise

    def reshard(self) -> None:
        """Puts the shards back in place of gathered weights."""
        for module in self._modules:
            module.reshard()

    def pending(self) -> str:
        """Returns what the training loop left between passes that a measurement would disturb; "" if nothing."""
        if not self.is_known():
            return ""
        if any(not state._state_ctx.is_last_backward for state in self._states()):
            return "backward passes that do not end, because of set_is_last_backward(False)"
        for group in self._groups():
            if not group.reduce_grads or not group.all_reduce_grads:
                return "gradients that stay unreduced, as set by set_requires_gradient_sync or set_requires_all_reduce"
            if group._partial_reduce_output is not None or any(_unreduced(p) for p in group.fsdp_params):
                return "gradients that are not reduced yet"
        return ""

    def _put_back(self, registered: list[nn.Parameter], error: Exception) -> None:
        if not self.is_known():
            raise NotPutBack(
                "A measurement failed under FSDP2 and left damaged state. The probe can repair that under torch "
                f"{', '.join(TESTED)}, but this is torch {torch.__version__}, so the run cannot go on. {_REMEDY}"
            ) from error
        if not all_failed(self._ranks()):
            raise NotPutBack(
                "A measurement failed under FSDP2 on this rank, but not on all ranks at the same place. The other "
                f"ranks now wait for this one, so the run cannot go on. {_REMEDY}"
            ) from error
        try:
            self._reset()
            wrong = self._wrong(registered)
        except Exception as problem:  # private state that is not as expected may raise any error
            wrong = f"{type(problem).__name__}: {problem}"
        if wrong:
            raise NotPutBack(
                f"A measurement failed under FSDP2, and the sharded state could not be restored ({wrong}), so the run "
                f"cannot go on. {_REMEDY}"
            ) from error

    @staticmethod
    def is_known() -> bool:
        """Returns whether this version of torch is among the tested ones."""
        return torch.__version__.startswith(tuple(f"{version}." for version in TESTED))

    def _reset(self) -> None:
        for module in self._modules:
            # Modules that have never been called have no root yet and nothing to restore.
            if module._get_fsdp_state()._is_root:
                module.reset_iter_state()
        for group in self._groups():
            for parameter in group.fsdp_params:
                _drop_gradients(parameter)
                # A fault between two parameters of a group leaves one gathered although the group counts as sharded.
                parameter.to_sharded()
        self.reshard()

    def _wrong(self, registered: list[nn.Parameter]) -> str:
        """Returns what differs from the state between passes; "" if nothing does."""
        present = list(self._model.parameters())
        if [id(p) for p in present] != [id(p) for p in registered]:
            return "the model has other parameters than before"
        held = {id(p) for p in present}
        for state in self._states():
            if state._training_state.name != "IDLE" or state._modules_to_run_forward:
                return "a module is still in a pass"
            shared, streams = state._state_ctx, state._comm_ctx
            if shared.iter_forward_root is not None or shared.post_backward_final_callback_queued:
                return "a pass has not ended"
            # Modules that have never been called have no streams yet.
            if any(getattr(streams, name, None) for name in ("all_gather_state", "reduce_scatter_states")):
                return "communication has not ended"
        for group in self._groups():
            if group._training_state.name != "IDLE" or group._sharded_state.name != "SHARDED":
                return "weights are not sharded"
            if any(getattr(group, name) is not None for name in _OF_A_PASS) or group._post_forward_indices:
                return "communication of a group has not ended"
            for parameter in group.fsdp_params:
                if id(parameter.sharded_param) not in held or parameter.sharded_state.name != "SHARDED":
                    return "a shard is not a parameter of the model"
                if _unreduced(parameter):
                    return "gradients are left"
                if any(tensor.untyped_storage().size() for tensor in parameter.all_gather_outputs):
                    return "gathered weights are left"
        return ""

    def shards(self) -> list[Any] | None:
        """Returns FSDP2's record of each parameter; ``None`` under versions of torch that do not show it."""
        try:
            return [parameter for group in self._groups() for parameter in group.fsdp_params]
        except AttributeError:
            return None

    def _states(self) -> list[Any]:
        # There is no public access. One state may serve several modules.
        return list({id(s): s for s in (module._get_fsdp_state() for module in self._modules)}.values())

    def _groups(self) -> list[Any]:
        return [group for state in self._states() for group in state._fsdp_param_groups]

    def _ranks(self) -> list[int]:
        return sorted({rank for group in self._groups() for rank in group.mesh_info.mesh.mesh.flatten().tolist()})


_OF_A_PASS = (
    "_all_gather_result",
    "_post_reduce_event",
    "_all_reduce_state",
    "_reshard_after_forward_event",
    "_partial_reduce_output",
)
_REMEDY = "Resume from a checkpoint. If memory ran out, measure with fewer estimators or on smaller batches."


def _unreduced(parameter: Any) -> bool:
    gathered = getattr(parameter, "_unsharded_param", None)
    return parameter.unsharded_accumulated_grad is not None or (gathered is not None and gathered.grad is not None)


def _drop_gradients(parameter: Any) -> None:
    # torch's own reset leaves these gradients, and the next backward pass would add to them.
    parameter.unsharded_accumulated_grad = None
    if hasattr(parameter, "_unsharded_param"):
        parameter._unsharded_param.grad = None
    if parameter.grad_offload_event is not None:
        parameter.grad_offload_event.synchronize()
        parameter.grad_offload_event = None
