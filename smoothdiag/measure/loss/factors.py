"""Factors: how much each loss counts in what a training loop calls ``backward`` on, read off the backward pass."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

_LINEAR = re.compile(
    "Add|Sub|Rsub|Neg|Sum|Mean|Nansum|View|UnsafeView|ReshapeAlias|Unsqueeze|Squeeze|Expand|Select|Slice|Stack|Cat|"
    "Unbind|Split|T|Transpose|Permute|ToCopy|Clone|Alias|Index"
)
"""Functions of autograd that are linear in all of their tensors together."""

_BILINEAR = re.compile("Mul|Dot")
"""Functions that are linear in each tensor, while the others stay as they are."""

_RUN = getattr(torch.autograd.graph, "_engine_run_backward").__code__  # noqa: B009  # torch declares no type for it
_GRAD = torch.autograd.grad.__code__


class Factor:
    """The derivative of the tensor that ``backward`` is called on with respect to a loss, over all backward passes.

    Whether a loop divides a loss by the number of micro-batches, weights it by its tokens or leaves it alone shows
    nowhere else. Passes of ``torch.autograd.grad`` do not count: they leave no gradient for the optimizer.

    Args:
        scaler: The GradScaler in use, if it is known; its factor is divided out, as before the optimizer steps.

    Attributes:
        bend: Name of a function between the loss and that tensor which is not linear, so that no factor says how the
            loss counts; "" if there is none.
    """

    def __init__(self, scaler: Any = None) -> None:
        self._scaler = scaler
        self._value: Tensor | None = None
        self._fault: Exception | None = None
        self.bend = ""

    def __deepcopy__(self, memo: object) -> "Factor":
        return self  # the factor is known only later, and belongs to all copies of the micro-batch

    @property
    def is_known(self) -> bool:
        """Whether a backward pass has used the loss."""
        return self._value is not None or self._fault is not None

    @property
    def value(self) -> Tensor:
        """The factor, in the shape of the loss; raises the error that kept it from being read, if there was one."""
        if self._fault is not None:
            raise self._fault
        if self._value is None:
            raise RuntimeError(
                "The trainer did not call backward on the loss that its compute_loss returned, so the factor of "
                "this loss in the step is unknown."
            )
        return self._value

    def watch(self, loss: Tensor, act: Callable[[], None] = lambda: None) -> None:
        """Waits for backward passes through ``loss``, and calls ``act`` in each before its factor is added."""
        if not loss.requires_grad:
            return
        place = Place(loss)

        def take(gradient: Tensor) -> None:
            try:
                runs = list(backward_runs())
                if not any(frame.f_back is not None and frame.f_back.f_code is _GRAD for frame in runs):
                    act()
                    self.bend = self.bend or place.bend([root for run in runs for root in run.f_locals["t_outputs"]])
                    self._add(gradient.detach())
            except Exception as error:  # the loop's own backward pass goes on
                self._fault = error

        loss.register_hook(take)  # type: ignore[no-untyped-call]

    def _add(self, value: Tensor) -> None:
        value = value.clone() if self._scaler is None else value / self._scaler.scale(torch.ones_like(value))
        self._value = value if self._value is None else self._value + value

    def forget(self) -> None:
        """Forgets the passes so far, whose gradients the loop has dropped."""
        self._value, self._fault, self.bend = None, None, ""


class Place:
    """Where a tensor stands in the graph of autograd; it does not keep the graph alive.

    Args:
        tensor: A tensor that autograd has computed.
    """

    def __init__(self, tensor: Tensor) -> None:
        edge = torch.autograd.graph.get_gradient_edge(tensor)
        # Numbers are given in the order of computation, so functions with a smaller one do not depend on the tensor.
        self._number, self._name, self._output = _number(edge.node), edge.node.name(), edge.output_nr

    def bend(self, roots: Sequence[Any]) -> str:
        """Returns the name of a function that is not linear between the tensor and ``roots``, "" if there is none.

        Args:
            roots: Tensors or gradient edges that a backward pass begins with.
        """
        edges = [(torch.autograd.graph.get_gradient_edge(r) if isinstance(r, Tensor) else r)[:2] for r in roots]
        after: dict[Any, int] = {}
        ends = [node for node, _ in edges]
        while ends:
            node = ends.pop()
            if node is not None and node not in after and (number := _number(node)) >= self._number:
                after[node] = number
                ends += [following for following, _ in node.next_functions]
        above: set[Any] = set()
        own: list[Any] = []
        for node in sorted(after, key=lambda node: after[node]):
            if self._is_here(node):
                continue
            leads = [self._is_it(*edge) or edge[0] in above for edge in node.next_functions]
            own = own or [edge[0] for edge in node.next_functions if self._is_it(*edge)]
            if any(leads):
                above.add(node)
                if not _is_linear(node.name(), leads) or _depends_alike(node, leads, own):
                    return str(node.name())
        if any(self._is_it(*edge) or edge[0] in above for edge in edges):
            return ""
        return "a backward pass that cannot be followed"

    def _is_here(self, node: Any) -> bool:
        return node is not None and _number(node) == self._number and node.name() == self._name

    def _is_it(self, node: Any, output: int) -> bool:
        return output == self._output and self._is_here(node)


def backward_runs() -> Iterator[FrameType]:
    """Yields the innermost run of autograd's engine in this thread or, if there is none, in every other thread.

    The engine runs the functions of a GPU in threads of its own, while the thread of the loop waits.
    """
    own = _run_of(sys._getframe(1))
    found = [own] if own is not None else map(_run_of, sys._current_frames().values())
    yield from (frame for frame in found if frame is not None)


def _run_of(frame: FrameType | None) -> FrameType | None:
    while frame is not None and frame.f_code is not _RUN:
        frame = frame.f_back
    return frame


def _number(node: Any) -> int:
    return int(node._sequence_nr())


def _kind(name: str) -> str:
    return re.sub(r"Backward\d*$", "", name)


def _is_linear(name: str, leads: Sequence[bool]) -> bool:
    """Returns whether a function is linear in those of its tensors that ``leads`` names."""
    kind = _kind(name)
    if _BILINEAR.fullmatch(kind):
        return sum(leads) == 1
    if kind == "Div":
        return not any(leads[1:])
    return _LINEAR.fullmatch(kind) is not None


def _depends_alike(node: Any, leads: Sequence[bool], loss: Sequence[Any]) -> bool:
    """Returns whether a product or quotient has a factor that depends on what the loss depends on.

    The factors of a product of two losses are right for its gradient, and wrong for its second derivative.
    """
    if _LINEAR.fullmatch(_kind(node.name())) is not None:
        return False
    others = [
        edge[0] for edge, lead in zip(node.next_functions, leads, strict=True) if edge[0] is not None and not lead
    ]
    return bool(others) and not _leaves(others).isdisjoint(_leaves(loss))


def _leaves(nodes: Iterable[Any]) -> set[int]:
    """Returns the identities of the tensors that gradients are accumulated in by a pass through some functions."""
    seen: set[Any] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return {id(node.variable) for node in seen if hasattr(node, "variable")}
