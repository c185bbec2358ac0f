"""A GPU rehearsed without one: tensors that say that they lie on "cuda", have no values, and refuse what would wait."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten
DTYPES = {
    Tensor.long: torch.int64,
    Tensor.int: torch.int32,
    Tensor.bool: torch.bool,
    Tensor.float: torch.float32,
    Tensor.double: torch.float64,
    Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
}
READS = (
    Tensor.item,
    Tensor.tolist,
    Tensor.cpu,
    Tensor.numpy,
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__int__,
    torch.equal,
)


class Waited(AssertionError):
    """Raised where the host would wait for the GPU."""


def on_gpu(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == "cuda"


def to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype)
    kwargs.pop("copy", None)
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    device, dtype = device or x.device, dtype or x.dtype
    if device.type != x.device.type and not non_blocking:
        raise Waited(f"a copy from {x.device} to {device} waits unless it says `non_blocking=True`")
    same = device.type == x.device.type and dtype == x.dtype
    return x if same else aten._to_copy.default(x, dtype=dtype, device=device, non_blocking=non_blocking)


def contiguous(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else aten.clone.default(x, memory_format=torch.contiguous_format)


class Refusing(TorchFunctionMode):
    """Refuses waits, and leads some calls around code that asks for a driver, which a CPU build of torch has not."""

    INSTEAD: ClassVar[dict[Any, Callable[..., Any]]] = {
        Tensor.to: to,
        Tensor.contiguous: contiguous,
        Tensor.__invert__: aten.bitwise_not.default,
        **{function: lambda x, dtype=dtype: to(x, dtype) for function, dtype in DTYPES.items()},
    }

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in READS and on_gpu(args[0]):
            raise Waited(f"`{function.__name__}` reads a number from the GPU")
        if function in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            raise Waited(f"`torch.{function.__name__}` copies a number to the GPU, and waits for the copy")
        return self.INSTEAD.get(function, function)(*args, **kwargs)


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """Makes "cuda" a device without values, on which mixing devices and waiting are errors.

    No graph is built: on a CPU build of torch, one node of a graph on "cuda" would end the process.
    """
    with torch.no_grad(), FakeTensorMode(), Refusing():
        yield


def moved(model: nn.Module) -> nn.Module:
    """Returns the model with parameters and gradients on the fake GPU."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            fake = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="cuda"))
            fake.grad = torch.empty_like(fake)
            setattr(module, name, fake)
    return model
