"""ClippedScion: clipped steps with a norm for each kind of layer, and functions that sort a model's layers by kind."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from smoothdiag import vectors
from smoothdiag.geometry import RMS, ByShape, Convolution, Euclidean, LayerGeometry, Sign, Spectral
from smoothdiag.optim.ggnc import GGNC, ShortStep

Kind = Literal["embedding", "hidden", "convolution", "transposed", "vector", "head", "tied"]


class ClippedScion(GGNC):
    """`GGNC` with one geometry for each kind of layer: Scion with clipped steps.

    With v_l = -radius_l lmo_l(d_l), the step is x_l -= lr min{threshold, sum_l <d_l, v_l>} v_l. Groups without a
    geometry take one by shape: spectral for matrices and convolutions, root mean square for biases and gains.
    `scion_groups` makes groups for the layers of a model, with Sign -> Spectral -> Sign for language (embedding,
    hidden, head) and Spectral -> Spectral -> Sign for images. `scion_init_` starts them on their spheres.

    Published settings:
        * NanoGPT, 124M, tied embedding: ``lr=6e-7, threshold=600`` (lr * threshold = 0.00036), momentum 0.9, radius
          50 for hidden layers and 3000 for the tied head. It takes more than 10% fewer steps than Scion at a fixed
          rate, and no fewer steps with a decaying rate. 1B: threshold 6000.
        * CIFAR-10, airbench, at a fixed rate: ``lr=0.05 / 1600, threshold=1600``, momentum 0.4, radius 8, and 128 for
          the head. It reaches 94.2%, Scion 92.4%.

    Args:
        params: As in `GGNC`, best from `scion_groups`.
        lr: As in `GGNC`; the lr of Scion is ``lr * threshold``.
        threshold: As in `GGNC`.
        radius: Radius of groups without one.
        momentum: As in `GGNC`; 1 minus what the released code calls momentum.
        weight_decay: As in `GGNC`. 1 is the constrained variant: parameters stay in the balls of their radii.
        geometry: Geometry of groups without one. None: `ByShape`.
        longest_step: As in `GGNC`.
        short_step: As in `GGNC`.
        maximize: As in `GGNC`.
        foreach: As in `GGNC`.
        capturable: As in `GGNC`.

    Raises:
        ValueError: As in `GGNC`.

    Units: As in `GGNC`; radius is a number.

    Source: Pethick et al. 2025 (NeurIPS), Algorithms 3 and 4; settings from appendix C and the released code.

    Examples:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 10, bias=False))
        >>> groups = sd.optim.scion_groups(model, radii={"hidden": 50.0})
        >>> optimizer = sd.ClippedScion(groups, lr=6e-7, threshold=600.0, radius=1.0)
        >>> [(g["kind"], type(g["geometry"]).__name__, g["radius"]) for g in optimizer.param_groups]
        [('embedding', 'Sign', 1.0), ('hidden', 'Spectral', 50.0), ('head', 'Sign', 1.0)]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *,
        threshold: float | Tensor | None = None,
        radius: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        geometry: Euclidean | LayerGeometry | None = None,
        longest_step: float | Tensor | None = None,
        short_step: ShortStep = "bound",
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            threshold=threshold,
            geometry=ByShape() if geometry is None else geometry,
            longest_step=longest_step,
            radius=radius,
            momentum=momentum,
            weight_decay=weight_decay,
            short_step=short_step,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
        )


def scion_groups(
    model: nn.Module,
    *,
    radii: Mapping[Kind, float] | None = None,
    head: str | None = None,
    kinds: Mapping[str, Kind] | None = None,
) -> list[dict[str, Any]]:
    """Sorts a model's parameters into groups by kind of layer, each with its geometry, for `ClippedScion`.

    =========== ================================================ ============================
    kind        what                                             geometry
    =========== ================================================ ============================
    embedding   weights of embeddings                            Sign()
    hidden      matrices: linear, attention, recurrent           Spectral()
    convolution weights of convolutions                          Convolution()
    transposed  weights of transposed convolutions               Convolution(transposed=True)
    vector      biases, gains, all with less than two dimensions RMS()
    head        the weight of the last linear layer              Sign(per_input=True)
    tied        a weight that is embedding and head at once      Sign(per_input=True)
    =========== ================================================ ============================

    Every group holds its kind and the names of its parameters. Check them once, because "last" means the module that
    was registered last. Parameters that need no gradient are left out.

    Args:
        model: Model, before or after sharding; only names, shapes and modules are read.
        radii: Radius for each kind; other kinds take the optimizer's radius.
        head: Name of the module with the head's weight, such as ``"lm_head"``; ``""`` if there is none. None: the
            model's ``get_output_embeddings()`` if there is one, else its last linear layer.
        kinds: Kind by name of parameter, for parameters that the table sorts wrongly or does not list.

    Returns:
        Groups with ``params``, ``geometry``, ``kind``, ``names`` and, if given, ``radius``.

    Raises:
        ValueError: If a name or a kind does not exist, or if a tensor with more than two dimensions belongs to no
            convolution.

    Source: Pethick et al. 2025 (ICML), "Training Deep Learning Models with Norm-Constrained LMOs", Tables 2 to 4.
    """
    radii, kinds = dict(radii or {}), dict(kinds or {})
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _refuse("kinds", set(kinds) - set(names), "names of parameters that need a gradient")
    _refuse("kinds", set(kinds.values()) - set(get_args(Kind)), f"kinds out of: {', '.join(get_args(Kind))}")
    _refuse("radii", set(radii) - set(get_args(Kind)), f"radii by kind, out of: {', '.join(get_args(Kind))}")
    found = _kinds_of_weights(model, head)
    groups: dict[Kind, dict[str, Any]] = {}
    for name, p in names.items():
        kind = kinds.get(name) or found.get(p) or _kind_of_shape(name, p)
        group = groups.setdefault(kind, {"params": [], "geometry": _GEOMETRIES[kind], "kind": kind, "names": []})
        group["params"].append(p)
        group["names"].append(name)
        if kind in radii:
            group["radius"] = radii[kind]
    return list(groups.values())


# Differences from the released code:
# 1. A convolution is drawn as a random point of its unit sphere. Theirs is orthogonal at each of the k^2 positions,
#    each divided by k^2, which has the norm k if C_out <= C_in.
# 2. Biases and gains keep the values from their modules; theirs are set to zero.
def scion_init_(
    groups: Iterable[Mapping[str, Any]], *, radius: float | None = None, generator: torch.Generator | None = None
) -> None:
    """Draws weights in place from the spheres of their geometries, with norm ``radius`` and random directions.

    Matrices become random (semi-)orthogonal matrices times sqrt(d_out / d_in) radius, tables of `Sign` become random
    signs. Tensors with fewer than two dimensions are left as they are.

    Args:
        groups: Groups from `scion_groups`, or an optimizer's ``param_groups``.
        radius: Radius of groups without one.
        generator: Source of the random numbers, on the CPU; None: torch's own.

    Raises:
        ValueError: If a group has no geometry of layers or no radius, or a parameter is sharded.

    Source: Pethick et al. 2025 (ICML), section 5.
    """
    checked = []
    for group in groups:
        if not isinstance(group, Mapping):
            raise ValueError(
                f"Parameter `groups` should hold groups of `scion_groups`. Found a `{type(group).__name__}`."
            )
        geometry, r = group.get("geometry"), group.get("radius", radius)
        if not isinstance(geometry, LayerGeometry):
            raise ValueError(f"Parameter `geometry` should be a LayerGeometry. Found `geometry = {geometry!r}`.")
        if r is None:
            raise ValueError("Parameter `radius` should be given, because a group has none. Found `radius = None`.")
        for p in group["params"]:
            if vectors.is_sharded(p):
                raise ValueError("Parameter `groups` should hold whole tensors. Call scion_init_ before sharding.")
            geometry.check(p.shape)
            checked.append((p, geometry, r))
    with torch.no_grad():
        for p, geometry, r in checked:
            if p.dim() >= 2:
                drawn = torch.randn(p.shape, generator=generator)
                p.copy_(-r * _exact(geometry).lmo(drawn))


_GEOMETRIES: dict[Kind, LayerGeometry] = {
    "embedding": Sign(),
    "hidden": Spectral(),
    "convolution": Convolution(),
    "transposed": Convolution(transposed=True),
    "vector": RMS(),
    "head": Sign(per_input=True),
    "tied": Sign(per_input=True),
}


def _kinds_of_weights(model: nn.Module, head: str | None) -> dict[Tensor, Kind]:
    """Returns the kinds that follow from the modules."""
    found: dict[Tensor, Kind] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            found[weight] = "embedding"
        elif isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            found[weight] = "transposed"
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            found[weight] = "convolution"
    last = _head_of(model, head)
    if last is not None:
        weight = last.weight
        assert isinstance(weight, Tensor)
        found[weight] = "tied" if found.get(weight) == "embedding" else "head"
    return found


def _head_of(model: nn.Module, head: str | None) -> nn.Module | None:
    if head is not None:
        modules = dict(model.named_modules())
        weight = getattr(modules.get(head), "weight", None)
        if head and (not isinstance(weight, Tensor) or weight.dim() < 2):
            raise ValueError(f"Parameter `head` should be the name of a module with a weight. Found `head = {head!r}`.")
        return modules[head] if head else None
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(output, nn.Module) and isinstance(getattr(output, "weight", None), Tensor):
        return output
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return linear[-1] if linear else None


def _kind_of_shape(name: str, p: Tensor) -> Kind:
    if p.dim() > 2:
        raise ValueError(
            f"Parameter `kinds` should say what `{name}` of shape {tuple(p.shape)} is. No convolution has this weight."
        )
    return "hidden" if p.dim() == 2 else "vector"


def _refuse(name: str, wrong: set[Any], requirement: str) -> None:
    if wrong:
        raise ValueError(f"Parameter `{name}` should hold {requirement}. Found `{sorted(map(str, wrong))}`.")


def _exact(geometry: LayerGeometry) -> LayerGeometry:
    if isinstance(geometry, ByShape):
        return dataclasses.replace(geometry, matrix=_exact(geometry.matrix), convolution=_exact(geometry.convolution))
    if isinstance(geometry, Spectral | Convolution):
        return dataclasses.replace(geometry, exact=True)
    return geometry
