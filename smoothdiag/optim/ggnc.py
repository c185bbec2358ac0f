"""Generalised gradient norm clipping: clipped steps in any norm."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from smoothdiag import vectors
from smoothdiag.geometry import Euclidean, LayerGeometry, Product, describe
from smoothdiag.optim import arithmetic
from smoothdiag.optim.base import COMMON, NON_NEGATIVE, POSITIVE, Bucket, CappedOptimizer, Group, Option, step_length

ShortStep = Literal["bound", "norm"]


# Differences from the paper:
# 1. The ball of the short step has the radius 1 / weight_decay, and its length is in the units of the threshold:
#    with b = 1 / weight_decay and rho = weight_decay * threshold it is Algorithm 2. So weight_decay -> 0 with the
#    variant "norm" gives Algorithm 1, and one threshold has one meaning in both.
# 2. tau is never negative. Inside the ball <d, u> >= 0 and nothing changes; outside of it a negative tau would push
#    the parameters further away.
# Differences from the code released with it:
# 3. The dual norm is taken of the averaged gradient, whatever the number of processes; theirs adds up one norm for each
#    process, so that a threshold means something else on other machines.
# 4. lr is the paper's gamma; theirs is gamma * rho. Theirs has no factor of 4 in variant 2: lr * 4 and threshold / 4
#    here make the same steps.
class GGNC(CappedOptimizer):
    """Steepest descent in the norm of a geometry, with steps clipped by the dual norm of the averaged gradient.

    With d the momentum, lmo(d) the minimiser of <d, x> over ||x|| <= 1, and ||d||_* = -<d, lmo(d)>::

        d = momentum d + (1 - momentum) g
        x += lr min{threshold, ||d||_*} lmo(d)

    With weight decay the step is the short step of Frank and Wolfe. Parameters that start in the ball of radius
    1/weight_decay stay there while lr * threshold * weight_decay <= 1::

        u = weight_decay x - lmo(d),  tau = min{threshold, <d, u> / ||u||^2},  x -= lr tau u

    Over several tensors the geometry is a product: ||x|| is the largest ||x_l||_l / radius_l. So lmo is taken for each
    tensor and multiplied by the tensor's radius, and the dual norm is one sum over all groups. All tensors with the
    geometry `Euclidean` count as one vector. If every tensor has this geometry, the optimizer is gradient descent
    clipped by the global norm.

    Things to know:
        * ``threshold=inf`` is steepest descent. ``threshold`` towards 0 at a fixed ``lr * threshold`` is Scion (Muon,
          sign descent, normalised descent), whose steps all have the same length.
        * A learning-rate schedule changes ``lr``. ``threshold`` stays, so the longest step shrinks with the rate. With
          ``longest_step`` instead, the longest step stays, and the threshold longest_step / lr changes.
        * The ``lr`` of Scion and Muon is ``lr * threshold`` here.
        * `Spectral` and `Convolution` take their minimisers and the dual norm from Newton-Schulz, as the paper does.
          The dual norm is mostly 5 to 23% below the exact one (30% below to 12% above at the extremes); a threshold
          from measured norms should allow for that. Steps and balls are up to 1.21 times as large.
        * A parameter without a gradient neither moves nor decays, and counts in no norm. ``.grad`` is only read.
        * Parameters outside the ball may stay where they are: `scion_init_` puts them on its surface.
        * Sharded matrices (DTensor) are gathered for their minimiser, which every rank computes.
        * ``state_dict`` describes geometries in words. Make the optimizer with the same geometries before loading.

    Args:
        params: Parameters, named parameters or groups of them. Every option may be set per group.
        lr: Learning rate gamma.
        threshold: Dual norm rho, over all groups, above which steps stop growing. ``inf`` never clips.
        geometry: `Euclidean` or one of the geometries of layers, shared by the tensors of a group.
        longest_step: Longest step lr * threshold in the norm of the geometry, instead of ``threshold``.
        radius: Weight r of the group's tensors in the product: they move r times as far.
        momentum: Weight of the past in the average, in [0, 1); the paper's 1 - alpha.
        weight_decay: 1 / radius of the ball. Each group has a ball of its own, whose radius is multiplied by the
            group's ``radius``.
        short_step: With weight decay, how to find ||u||^2, in the same way for all groups. ``"bound"`` takes 4, which
            ||u||^2 never exceeds in the ball (variant 2). ``"norm"`` computes it (variant 1); for `Spectral` that takes
            singular values, which wait for the device.
        maximize: Whether to ascend instead of descending.
        foreach: Whether to use operations on lists of tensors. None: yes.
        capturable: Promises that a CUDA graph may capture the step, see `ClippedMomentum`.

    Raises:
        ValueError: If an option is out of its range, now or at a later step; if a tensor has no norm in its geometry;
            or if a loaded state was made with another geometry.
        RuntimeError: If a step meets a sparse or complex gradient.

    Units: lr [x^2/f], threshold [f/x], longest_step [x], weight_decay [1/x], where [x] is the unit of the geometry's
    norm.

    Source: Pethick, Xie, Erdogan, Antonakopoulos, Silveti-Falls, Cevher 2025 (NeurIPS), "Generalized Gradient Norm
    Clipping & Non-Euclidean (L0,L1)-Smoothness", Algorithms 1 and 2.

    Examples:
        In the geometry ``Sign`` every weight moves by the same length, lr * threshold where the step is clipped:

        >>> weights = nn.Parameter(torch.zeros(2))
        >>> optimizer = sd.GGNC([weights], lr=0.1, threshold=1.0, geometry=sd.geometry.Sign(), momentum=0.0)
        >>> weights.grad = torch.tensor([3.0, -4.0])
        >>> optimizer.step()
        >>> print(weights.data)
        tensor([-0.1000,  0.1000])
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {
        **COMMON,
        **CappedOptimizer.CAPS,
        "geometry": Option(lambda v: isinstance(v, Euclidean | LayerGeometry), "Euclidean() or a LayerGeometry"),
        "radius": POSITIVE,
        "momentum": Option(lambda v: 0 <= v < 1, "in [0, 1)"),
        "weight_decay": NON_NEGATIVE,
        "short_step": Option(lambda v: v in ("bound", "norm"), '"bound" or "norm"'),
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *,
        threshold: float | Tensor | None = None,
        geometry: Euclidean | LayerGeometry,
        longest_step: float | Tensor | None = None,
        radius: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        short_step: ShortStep = "bound",
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "threshold": threshold,
            "longest_step": longest_step,
            "geometry": geometry,
            "radius": radius,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "short_step": short_step,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group; its own threshold or longest step replaces whichever of the two is the default."""
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])  # now that the parameters are a list of tensors
        except ValueError:
            self.param_groups.pop()
            raise

    def product(self, params: Iterable[Tensor]) -> Product:
        """Returns the norm in which the optimizer steps, for measuring in it; the norm is exact, unlike its minimisers.

        Args:
            params: Parameters in the order in which they are measured; for a probe ``model.parameters()``.

        Raises:
            ValueError: If a parameter is not the optimizer's, or its geometry is `Euclidean`.
        """
        found = self._groups_of(params)
        if not all(isinstance(group.get("geometry"), LayerGeometry) for group in found):
            raise ValueError(
                "Parameter `params` should hold parameters of this optimizer that have the geometry of a layer. "
                f"Found `geometry = {[group.get('geometry') for group in found]}`."
            )
        return Product(tuple(g["geometry"] for g in found), tuple(float(g["radius"]) for g in found))

    def unit_balls(self, parameters: Sequence[Tensor]) -> Sequence[tuple[LayerGeometry, float] | None]:
        """Returns geometry and radius of each parameter; ``None`` for `Euclidean`, which joins parameters."""
        found = self._groups_of(parameters)
        told = [isinstance(group.get("geometry"), LayerGeometry) for group in found]
        return [(g["geometry"], float(g["radius"])) if tells else None for g, tells in zip(found, told, strict=True)]

    def _groups_of(self, params: Iterable[Tensor]) -> list[Group]:
        groups = {param: group for group in self.param_groups for param in group["params"]}
        return [groups.get(param, {}) for param in params]

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, with geometries in words, so that any reader can load it."""
        state = super().state_dict()
        groups = [{**group, "geometry": describe(group["geometry"])} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state into an optimizer with the same geometries.

        Raises:
            ValueError: If a group was saved with another geometry.
        """
        groups = []
        for saved, own in zip(state_dict["param_groups"], self.param_groups, strict=False):
            geometry = own["geometry"]
            if saved.get("geometry", describe(geometry)) != describe(geometry):
                raise ValueError(
                    f"Parameter `geometry` should be the geometry of the saved group, {saved['geometry']}. "
                    f"Found `geometry = {describe(geometry)}`."
                )
            groups.append({**saved, "geometry": geometry})
        # torch refuses groups without a counterpart here.
        groups += state_dict["param_groups"][len(groups) :]
        super().load_state_dict({**state_dict, "param_groups": groups})

    @property
    def follows_gradients(self) -> bool:
        """Whether a step is the learning rate times an average of gradients, clipped or not: in Euclidean norms."""
        return super().follows_gradients and all(
            isinstance(group["geometry"], Euclidean) for group in self.param_groups
        )

    def refusal(self) -> str:
        """Returns why AutoClip must not act on this optimizer; empty if it may."""
        for geometry, radius in ((group["geometry"], group["radius"]) for group in self.param_groups):
            if not isinstance(geometry, Euclidean) or radius != 1:
                return (
                    "Parameter `optimizer` should step in the Euclidean norm, with a radius of 1: AutoClip measures "
                    f"the longest step in this norm. Found `geometry = {geometry}`, `radius = {radius}`."
                )
        return ""

    def _kept(self, group: Group) -> Sequence[str]:
        return ("momentum_buffer",)

    def _check(self, group: Group) -> None:
        super()._check(group)
        if not any(group is own for own in self.param_groups):
            return
        if group["short_step"] != (first := self.param_groups[0]["short_step"]):
            raise ValueError(
                f'Parameter `short_step` should be "{first}", as in the first group. '
                f'Found `short_step = "{group["short_step"]}"`.'
            )
        if isinstance(group["geometry"], LayerGeometry):
            for param in group["params"]:
                group["geometry"].check(param.shape)

    def _update(self, buckets: list[Bucket]) -> None:
        for b in buckets:
            weight = 1 - b.group["momentum"]
            arithmetic.average_(b.states["momentum_buffer"], b.grads, weight, foreach=b.foreach)

        minimisers, total = self._minimize(buckets)
        decaying = any(b.group["weight_decay"] > 0 for b in buckets)
        if decaying:
            total = total + self._decay_products(buckets)
            if buckets[0].group["short_step"] == "bound":
                total = total / 4  # ||u|| <= ||weight_decay x|| + ||lmo(d)|| <= 2
            else:
                square = self._square_of_direction(buckets, minimisers)
                total = (total / square).where(square != 0, 0.0)  # a NaN stays one
            total = total.clamp(min=0.0)

        for b, (directions, scale) in zip(buckets, minimisers, strict=True):
            step = step_length(b.group, total)
            if b.group["weight_decay"] > 0:
                arithmetic.multiply_(b.params, 1 - step * b.group["weight_decay"], foreach=b.foreach)
            arithmetic.subtract_scaled_(b.params, directions, step * -scale, foreach=b.foreach)

    def _minimize(self, buckets: Sequence[Bucket]) -> tuple[list[tuple[list[Tensor], Tensor]], Tensor]:
        """Returns, for each bucket, local tensors and the factor that makes them lmo(d), and -<d, lmo(d)> over all."""
        found: list[tuple[list[Tensor], Tensor]] = []
        length = _joint_length(buckets)
        total = length
        for b in buckets:
            geometry, radius, sign = b.group["geometry"], b.group["radius"], -1.0 if b.group["maximize"] else 1.0
            if isinstance(geometry, Euclidean):
                # For ||x|| = ||x_1 / r_1, x_2 / r_2, ...|| the minimiser is -r_i^2 d_i / ||r_1 d_1, r_2 d_2, ...||.
                scale = (-sign * radius**2 / length).where(length != 0, 0.0)
                found.append((b.states["momentum_buffer"], scale))
                continue
            momenta = [self.state[owner]["momentum_buffer"] for owner in b.owners]
            minimisers, products = geometry.minimize(momenta)
            total = total + torch.stack(products).sum(dtype=length.dtype).to(length.device) * radius
            found.append(([vectors.local(m) for m in minimisers], torch.ones_like(length) * (sign * radius)))
        return found, total

    def _decay_products(self, buckets: Sequence[Bucket]) -> Tensor:
        """Returns <d, weight_decay x> over all buckets."""
        parts = []
        for b in buckets:
            factor = -b.group["weight_decay"] if b.group["maximize"] else b.group["weight_decay"]
            pairs = zip(b.states["momentum_buffer"], b.params, strict=True)
            products = [(vectors.wide(d) * vectors.wide(x)).sum() * factor for d, x in pairs]
            parts.append((products, b.owners))
        return vectors.total(parts)

    def _square_of_direction(
        self, buckets: Sequence[Bucket], minimisers: Sequence[tuple[list[Tensor], Tensor]]
    ) -> Tensor:
        """Returns ||weight_decay x - lmo(d)||^2."""
        norms, squares = [], []
        for b, (directions, scale) in zip(buckets, minimisers, strict=True):
            geometry, radius, decay = b.group["geometry"], b.group["radius"], b.group["weight_decay"]
            for owner, x, direction in zip(b.owners, b.params, directions, strict=True):
                u = (
                    vectors.wide(x) * decay - vectors.wide(direction) * scale.to(x.device).to(vectors.wide(x).dtype)
                ) / radius
                if isinstance(geometry, Euclidean):
                    squares.append(([arithmetic.lengths([u])[0].square()], [owner]))
                else:
                    norms.append(geometry.norm(vectors.as_part_of(u, owner)).to(scale))
        found = torch.stack(norms).amax().square() if norms else None
        joint = vectors.total(squares) if squares else None
        if found is None or joint is None:
            return found if joint is None else joint  # type: ignore[return-value]
        return torch.maximum(found, joint.to(found))


def _joint_length(buckets: Sequence[Bucket]) -> Tensor:
    """Returns the dual norm of all tensors with the Euclidean geometry, 0-dim; zero if there are none."""
    parts = []
    for b in buckets:
        if isinstance(b.group["geometry"], Euclidean):
            found = torch.stack(arithmetic.lengths(b.states["momentum_buffer"], foreach=b.foreach))
            # float64 holds the square of every float32 number.
            squares = (found.to(vectors.widest(found.device)) * b.group["radius"]).square()
            parts.append((list(squares.unbind()), b.owners))
    if parts:
        return vectors.total(parts).sqrt()
    device = buckets[0].params[0].device
    return torch.zeros((), dtype=vectors.widest(device), device=device)
