"""Solvers of other libraries for the Hessian eigenvalue of largest magnitude, each called as a user would call it.

Every solver takes a ``Recorder``, which sees the products as they are made. With ``limit=None`` the library itself
decides when to stop, at a tolerance of 1e-3. With a number it must answer after so many products.
"""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from models import labelled_loss
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

TOLERANCE = 1e-3
MOST_PRODUCTS = 60

Batch = tuple[Tensor, Tensor]


class Enough(Exception):
    """Raised to leave a solver that has made as many products as its answer needs."""


class Recorder:
    """Counts products and, given the true value, stops as soon as a solver can know that value.

    Args:
        reference: The true eigenvalue; ``None`` only counts.
        krylov: Whether the solver combines all its products, or uses only the last one.

    Attributes:
        num_products: Products so far.
        reached: Whether the value was within the tolerance.
    """

    def __init__(self, reference: float | None = None, krylov: bool = False) -> None:
        self.num_products, self.reached = 0, False
        self._reference, self._krylov = reference, krylov
        self._basis, self._images = list[Tensor](), list[Tensor]()

    def __call__(self, v: Sequence[Tensor], product: Sequence[Tensor]) -> None:
        self.num_products += 1
        if self._reference is None:
            return
        kept = len(self._basis) if self._krylov else 0
        flat, image = (torch.cat([x.detach().double().flatten() for x in vector]) for vector in (v, product))
        self._basis = [*self._basis[:kept], flat / flat.norm()]
        self._images = [*self._images[:kept], image / flat.norm()]
        projected = torch.stack(self._basis) @ torch.stack(self._images).T
        value = max(torch.linalg.eigvalsh((projected + projected.T) / 2).tolist(), key=abs)
        self.reached = abs(value / self._reference - 1) <= TOLERANCE
        if self.reached or self.num_products == MOST_PRODUCTS:
            raise Enough


class Solver(Protocol):
    def __call__(self, model: nn.Module, batch: Batch, seed: int, limit: int | None, record: Recorder) -> float: ...


@dataclass(frozen=True)
class Peer:
    """A solver of another library.

    Attributes:
        module: Module to import.
        package: Package that has the version.
        solve: Function that returns the eigenvalue.
        krylov: Whether the solver combines all its products.
        fused: Whether the solver works with oneDNN's recurrence, which forward mode does not support.
    """

    module: str
    package: str
    solve: Solver
    krylov: bool
    fused: bool = True

    @property
    def missing(self) -> bool:
        return importlib.util.find_spec(self.module) is None

    @property
    def version(self) -> str:
        return importlib.metadata.version(self.package)

    def fewest(self, model: nn.Module, batch: Batch, seed: int, reference: float) -> int | None:
        """Returns after how many products a solver could know the value; ``None`` if there are too many."""
        record = Recorder(reference, self.krylov)
        try:
            self.solve(model, batch, seed, MOST_PRODUCTS, record)
        except Enough:
            return record.num_products if record.reached else None
        return None


def pyhessian(model: nn.Module, batch: Batch, seed: int, limit: int | None, record: Recorder) -> float:
    """Power iteration from a random vector; keeps the graph of the gradient."""
    module: Any = importlib.import_module("pyhessian.hessian")
    original = module.hessian_vector_product

    def counted(gradients: list[Tensor], parameters: list[nn.Parameter], v: list[Tensor]) -> tuple[Tensor, ...]:
        product = original(gradients, parameters, v)
        record(v, product)
        return product

    torch.manual_seed(seed)
    module.hessian_vector_product = counted
    try:
        hessian = module.hessian(model, nn.CrossEntropyLoss(), data=batch, cuda=batch[0].is_cuda)
        values, _ = hessian.eigenvalues(maxIter=limit or 100, tol=0.0 if limit else TOLERANCE)
    finally:
        module.hessian_vector_product = original
    return values[0]


def eigenthings_power(model: nn.Module, batch: Batch, seed: int, limit: int | None, record: Recorder) -> float:
    """Power iteration from a random vector; differentiates twice anew for each product."""
    library: Any = importlib.import_module("hessian_eigenthings")
    operator = _eigenthings(library, model, batch, record)
    if limit:
        return library.power_iteration_one(operator, max_iter=limit, tol=0.0, seed=seed)[0]
    return float(library.deflated_power_iteration(operator, k=1, tol=TOLERANCE, seed=seed).eigenvalues[0])


def eigenthings_lanczos(model: nn.Module, batch: Batch, seed: int, limit: int | None, record: Recorder) -> float:
    """Lanczos with a given number of products, 2 by default; it checks its residual only at the end."""
    library: Any = importlib.import_module("hessian_eigenthings")
    operator = _eigenthings(library, model, batch, record)
    return float(library.lanczos(operator, k=1, max_iter=limit, tol=TOLERANCE, seed=seed).eigenvalues[0])


def curvlinops_scipy(model: nn.Module, batch: Batch, seed: int, limit: int | None, record: Recorder) -> float:
    """Operator of curvlinops under SciPy's Lanczos; the fewest products are those of one subspace without a restart."""
    library: Any = importlib.import_module("curvlinops")
    parameters = [p for p in model.parameters() if p.requires_grad]
    check = {} if limit is None else {"check_deterministic": False}
    operator = library.HessianLinearOperator(model, nn.CrossEntropyLoss(), parameters, [batch], **check).to_scipy()
    given = {"tol": TOLERANCE} if limit is None else {"tol": 1.0, "ncv": max(limit, 2)}
    return largest(operator, seed, lambda v, w: record([torch.tensor(v)], [torch.tensor(w)]), **given)[0]


PEERS = {
    "PyHessian": Peer("pyhessian", "pyhessian", pyhessian, krylov=False),
    "hessian-eigenthings, power": Peer("hessian_eigenthings", "hessian-eigenthings", eigenthings_power, krylov=False),
    "hessian-eigenthings, Lanczos": Peer(
        "hessian_eigenthings", "hessian-eigenthings", eigenthings_lanczos, krylov=True
    ),
    "curvlinops, SciPy": Peer("curvlinops", "curvlinops-for-pytorch", curvlinops_scipy, krylov=True, fused=False),
}


def exact(model: nn.Module, batch: Batch) -> LinearOperator:
    """Returns the Hessian, by differentiating twice with the graph kept, as a matrix for SciPy."""
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(labelled_loss(model, batch), parameters, create_graph=True)
    sizes, like = [p.numel() for p in parameters], parameters[0]

    def product(v: np.ndarray) -> np.ndarray:
        parts = torch.from_numpy(np.ravel(v)).to(like).split(sizes)
        vectors = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
        found = torch.autograd.grad(gradient, parameters, vectors, retain_graph=True)
        return torch.cat([x.flatten() for x in found]).cpu().numpy()

    return LinearOperator((sum(sizes), sum(sizes)), matvec=product, dtype=np.dtype(str(like.dtype).split(".")[1]))


def largest(
    operator: LinearOperator, start: np.ndarray | int, seen: Callable[[Any, Any], None] | None = None, **options: Any
) -> tuple[float, np.ndarray]:
    """Returns eigenvalue of largest magnitude and eigenvector, by SciPy from a start vector or a seed."""

    def product(v: np.ndarray) -> np.ndarray:
        found = operator @ v
        if seen is not None:
            seen(v, found)
        return found

    counted = LinearOperator(operator.shape, matvec=product, dtype=operator.dtype)
    if isinstance(start, int):
        start = np.random.default_rng(start).standard_normal(operator.shape[0])
    values, vectors = eigsh(counted, k=1, which="LM", v0=start.astype(operator.dtype), **options)
    return float(values[0]), vectors[:, 0]


@contextmanager
def twice_differentiable(model: nn.Module, fused: bool = True) -> Iterator[None]:
    """Switches off what users of the other libraries must switch off themselves: fused attention and recurrence."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            if not fused:
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        yield


def _eigenthings(library: Any, model: nn.Module, batch: Batch, record: Recorder) -> Any:
    inner = library.HessianOperator(model, [batch], labelled_loss)

    def product(v: Tensor) -> Tensor:
        found = inner.matvec(v)
        record([v], [found])
        return found

    return library.LambdaOperator(product, inner.size, inner.device, inner.dtype)
