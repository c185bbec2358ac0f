"""What each of two processes does for test_faults_distributed.py: runs whose measurements meet a fault, or none."""

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from asserts import state_of, without_cost
from distributed_runs import WORLD
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.nn.functional import all_reduce
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from smoothdiag import Probe, SmoothdiagWarning, every, vectors
from smoothdiag.measure.loss import agreement

STEPS = 5
FAULT_STEP = 3


class Bomb:
    """Counts the places that a measurement passes, and raises at one of them."""

    def __init__(self) -> None:
        self.is_armed, self.target, self.count = False, -1, 0

    def tick(self) -> None:
        if self.is_armed:
            self.count += 1
            if self.count - 1 == self.target:
                raise torch.OutOfMemoryError("out of memory (made up)")


BOMB = Bomb()


class Ticking(torch.autograd.Function):
    """Hands its input on; forward and backward are places."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        BOMB.tick()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        BOMB.tick()
        return gradient


class Net(nn.Module):
    """Three layers with a normalization, and two heads of which ``branch`` chooses one."""

    def __init__(self, norm: type[nn.Module] | None = None, sparse: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)])
        self.norm = nn.Identity() if norm is None else norm(8)
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])
        self.table = nn.Embedding(5, 3, sparse=True) if sparse else None
        self.checkpoints = False

    def forward(self, x: Tensor, branch: int = 2) -> Tensor:
        h = x
        for layer in self.layers:
            block = functools.partial(_block, layer)
            h = checkpoint(block, h, use_reentrant=False) if self.checkpoints else block(h)
        h = self.norm(h)
        out = sum(head(h) for index, head in enumerate(self.heads) if branch in (index, 2))
        if self.table is not None:
            out = out + self.table((x[:, 0].abs() * 10).long() % 5)
        return Ticking.apply(out)


def _block(layer: nn.Module, h: Tensor) -> Tensor:
    return Ticking.apply(torch.tanh(layer(Ticking.apply(h)))) if h.requires_grad else torch.tanh(layer(h))


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    BOMB.tick()
    x, y, branch = batch
    loss = F.cross_entropy(model(x, branch).float(), y)
    BOMB.tick()
    return loss


@dataclass(frozen=True)
class Setup:
    """How a run is wrapped; a name stands for each in the tests."""

    wrap: Callable[[nn.Module], nn.Module]
    net: Callable[[], nn.Module] = Net
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.AdamW(p, lr=1e-2)
    alternates: bool = False
    micro_batches: int = 1
    loop_no_sync: bool = False
    evaluates: bool = False
    dtype: torch.dtype = torch.float32
    checkpoints: bool = False


def ddp(**options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda net: DistributedDataParallel(net, **options)


def hooked(register: Callable[[DistributedDataParallel], None]) -> Callable[[nn.Module], nn.Module]:
    def wrap(net: nn.Module) -> nn.Module:
        model = DistributedDataParallel(net)
        register(model)
        return model

    return wrap


def _power(model: DistributedDataParallel) -> None:
    state = powerSGD_hook.PowerSGDState(
        None, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=1
    )
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def _nested(net: nn.Module) -> nn.Module:
    net.layers[1] = DistributedDataParallel(net.layers[1])
    return DistributedDataParallel(net)


def _ignoring(net: nn.Module) -> nn.Module:
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["layers.1.weight"])
    return DistributedDataParallel(net)


class Drifting(nn.Module):
    """Multiplies by a buffer that forward passes move, on each rank elsewhere."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        out = x * self.scale.clone()
        with torch.no_grad():
            self.scale += x.mean(dim=0)
        return out


class Shared(nn.Module):
    """Subtracts the mean over all ranks, as SyncBatchNorm does, which runs on a GPU alone."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x - all_reduce(x.mean(dim=0)) / WORLD


def fsdp(*, mesh: tuple[int, ...] = (WORLD,), nested: bool = True, **options: Any) -> Callable[[nn.Module], nn.Module]:
    def wrap(net: nn.Module) -> nn.Module:
        names = ("replicate", "shard")[-len(mesh) :]
        found = init_device_mesh("cpu", mesh, mesh_dim_names=names)
        for layer in [*net.layers, *net.heads] if nested else []:
            fully_shard(layer, mesh=found, **options)
        return fully_shard(net, mesh=found, **options)

    return wrap


HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
REPLICAS = {
    "plain": Setup(ddp()),
    "bucket views": Setup(ddp(gradient_as_bucket_view=True)),
    "many buckets": Setup(ddp(bucket_cap_mb=1e-4)),
    "branches in turn": Setup(ddp(find_unused_parameters=True), alternates=True),
    "branches in turn, views": Setup(
        ddp(find_unused_parameters=True, gradient_as_bucket_view=True),
        alternates=True,
        micro_batches=2,
        loop_no_sync=True,
    ),
    "static graph": Setup(ddp(static_graph=True)),
    "static graph, views": Setup(ddp(static_graph=True, gradient_as_bucket_view=True)),
    "static graph, checkpoints": Setup(ddp(static_graph=True), checkpoints=True),
    "half-precision hook": Setup(hooked(lambda m: m.register_comm_hook(None, default_hooks.fp16_compress_hook))),
    "PowerSGD": Setup(hooked(_power)),
    "buffers fetched": Setup(ddp(), lambda: Net(nn.BatchNorm1d)),
    "buffers kept": Setup(ddp(broadcast_buffers=False), lambda: Net(nn.BatchNorm1d)),
    "buffers that matter": Setup(ddp(), lambda: Net(Drifting)),
    "buffers fetched, micro-batches": Setup(ddp(), lambda: Net(nn.BatchNorm1d), micro_batches=3, loop_no_sync=True),
    "collectives within": Setup(ddp(), lambda: Net(Shared)),
    "one within another": Setup(_nested),
    "some parameters left out": Setup(_ignoring),
    "micro-batches": Setup(ddp(), micro_batches=3),
    "micro-batches, no_sync": Setup(ddp(), micro_batches=3, loop_no_sync=True),
    "a forward pass on the way": Setup(ddp(), evaluates=True),
    "a forward pass on the way, in turn": Setup(ddp(find_unused_parameters=True), evaluates=True, alternates=True),
    "bfloat16": Setup(ddp(), dtype=torch.bfloat16),
    "sparse": Setup(ddp(), lambda: Net(sparse=True), lambda p: torch.optim.SGD(p, lr=0.1)),
    "ZeRO": Setup(ddp(), optimizer=lambda p: ZeroRedundancyOptimizer(p, torch.optim.AdamW, lr=1e-2)),
}
SHARDS = {
    "nested": Setup(fsdp()),
    "root alone": Setup(fsdp(nested=False)),
    "gathered between passes": Setup(fsdp(reshard_after_forward=False)),
    "half precision": Setup(fsdp(mp_policy=HALF)),
    "micro-batches": Setup(fsdp(), micro_batches=2),
    "checkpoints": Setup(fsdp(), checkpoints=True),
    "replicated": Setup(fsdp(mesh=(WORLD, 1))),
    "replicas of shards": Setup(fsdp(mesh=(1, WORLD))),
    "on the CPU": Setup(fsdp(offload_policy=CPUOffloadPolicy(pin_memory=False))),
    "buffers": Setup(fsdp(), lambda: Net(nn.BatchNorm1d)),
}
SETUPS = {"ddp": REPLICAS, "fsdp2": SHARDS}


@dataclass(frozen=True)
class Fault:
    """Where a measurement fails, counted from its beginning, and on which ranks; nowhere by default."""

    place: int = -1
    ranks: tuple[int, ...] = ()


def train(setup: Setup, rank: int, *, schedule: int | None, fault: Fault = Fault()) -> dict[str, Any]:
    """Trains; returns the state after it, the rows, the warnings and how many places the faulty step has."""
    torch.manual_seed(0)
    net = setup.net().to(setup.dtype)
    net.checkpoints = setup.checkpoints
    model = setup.wrap(net)
    optimizer = setup.optimizer(model.parameters())
    probe = None if schedule is None else Probe(model, optimizer, loss_fn, schedule=every(schedule))
    source = torch.Generator().manual_seed(rank)
    found: dict[str, Any] = {"places": 0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(STEPS):
            optimizer.zero_grad()
            branch = step % 2 if setup.alternates else 2
            for part in range(setup.micro_batches):
                x = torch.randn(8, 6, generator=source).to(setup.dtype)
                batch = x, torch.randint(3, (8,), generator=source), branch
                is_last = part == setup.micro_batches - 1
                later = model.no_sync() if setup.loop_no_sync and not is_last else contextlib.nullcontext()
                if probe is not None:
                    probe.observe(batch)
                with later:
                    (loss_fn(model, batch) / setup.micro_batches).backward()
            if setup.evaluates:
                loss_fn(model, batch)
            with armed(fault if step == FAULT_STEP else Fault(), rank):
                optimizer.step()
            if step == FAULT_STEP:
                found["places"] = BOMB.count
    state = state_of(model, getattr(optimizer, "optim", optimizer))
    found["state"] = {n: v.to_dense() if isinstance(v, Tensor) and v.is_sparse else v for n, v in state.items()}
    found["rows"] = [] if probe is None else [{n: str(v) for n, v in without_cost(row).items()} for row in probe.trace]
    found["warnings"] = [str(w.message) for w in caught if issubclass(w.category, SmoothdiagWarning)]
    return found


@contextlib.contextmanager
def armed(fault: Fault, rank: int) -> Iterator[None]:
    """Counts places, some of them in the algebra, and raises at the one of the fault."""
    real = {name: getattr(vectors, name) for name in ("norms", "sub", "add_scaled")}

    def ticking(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            BOMB.tick()
            return function(*args, **kwargs)

        return call

    BOMB.is_armed, BOMB.count = True, 0
    BOMB.target = fault.place if rank in fault.ranks else -1
    for name, function in real.items():
        setattr(vectors, name, ticking(function))
    try:
        yield
    finally:
        BOMB.is_armed = False
        for name, function in real.items():
            setattr(vectors, name, function)


def unchanged(setup: Setup, rank: int) -> dict[str, Any]:
    """Trains with a probe at every step and without one."""
    return {"bare": train(setup, rank, schedule=None), "probed": train(setup, rank, schedule=1)}


def faulty(setup: Setup, rank: int, ranks: tuple[int, ...], num_places: int) -> dict[str, Any]:
    """Trains with faults on some ranks, at places spread over a measurement."""
    found = {"bare": train(setup, rank, schedule=None), "whole": train(setup, rank, schedule=FAULT_STEP)}
    for place in _places(found["whole"]["places"], num_places):
        found[place] = train(setup, rank, schedule=FAULT_STEP, fault=Fault(place, ranks))
    return found


def ended(setup: Setup, rank: int, folder: Path, num_places: int) -> dict[str, Any]:
    """Trains with faults on the second rank that the first one cannot be told of; returns how each rank ends."""
    number = train(setup, rank, schedule=FAULT_STEP)["places"]
    dist.destroy_process_group()
    found: dict[str, Any] = {}
    for place in _places(number, num_places):
        meet(folder, rank, seconds=3)
        try:
            train(setup, rank, schedule=FAULT_STEP, fault=Fault(place, (1,)))
            found[place] = None
        except Exception as error:
            found[place] = (type(error).__name__, type(error.__cause__).__name__, str(error))
        dist.destroy_process_group()
    meet(folder, rank, seconds=60)
    return found


def _places(number: int, wanted: int) -> list[int]:
    return sorted({round(i * (number - 1) / max(1, wanted - 1)) for i in range(wanted)})


_meetings = itertools.count()


def meet(folder: Path, rank: int, *, seconds: float) -> None:
    store = dist.FileStore(str(folder / f"store{next(_meetings)}"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=seconds))


def work(rank: int, folder: str, jobs: Sequence[tuple[Any, ...]]) -> None:
    """Takes all jobs, (what, kind, name, ...), as one of the processes."""
    torch.set_num_threads(1)
    agreement.WAIT = 1.0
    meet(Path(folder), rank, seconds=60)
    found: dict[Any, Any] = {}
    for job in jobs:
        what, kind, name, *rest = job
        setup = SETUPS[kind][name]
        if what == "unchanged":
            found[job] = unchanged(setup, rank)
        elif what == "faulty":
            found[job] = faulty(setup, rank, *rest)
        else:
            found[job] = ended(setup, rank, Path(folder), *rest)
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
