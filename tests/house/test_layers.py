"""smoothdiag: imports go down the layers of the package and nowhere else."""

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import REPOSITORY

PACKAGE = REPOSITORY / "smoothdiag"
MAX_LINES = 320

# A module may import from the lines below its own, never sideways.
LAYERS = (
    ("integrations", "__main__"),
    ("cli",),
    ("demo", "launch", "watch"),
    ("spikes",),
    ("autoclip",),
    ("report", "measure", "optim", "logs", "doctor", "schedulers"),
    ("tally",),
    ("plots", "clipping", "adapters", "packing"),
    ("collectives", "layout", "geometry"),
    ("fits", "trace", "vectors", "problems"),
    ("notebooks", "diverged"),
    ("spiking",),
    (
        "tails",
        "rows",
        "requirements",
        "memory",
        "console",
        "arguments",
        "growing",
        "machines",
        "moved",
        "momentum",
        "names",
    ),
)
LINE = {name: number for number, names in enumerate(LAYERS) for name in names}

# Inside a wing a module may import those that stand before it; a package re-exports, so it follows its parts. A star
# stands for all modules of a room that are not named: they do not know each other, and a new one needs no line here.
WINGS = {
    "measure": (
        "measure.loss.faults",
        "measure.loss.agreement",
        "measure.loss.beside",
        "measure.loss.bookkeeping",
        "measure.loss.state",
        "measure.loss.batches",
        "measure.loss.factors",
        "measure.loss.calls",
        "measure.loss.graph",
        "measure.loss.coordinates",
        "measure.loss.replicas",
        "measure.loss.isolation",
        "measure.loss.delivery",
        "measure.loss.shares",
        "measure.loss.sweeps",
        "measure.loss.objective",
        "measure.loss.selftest",
        "measure.loss.fixed",
        "measure.loss",
        "measure.curvature.guards",
        "measure.curvature.reverse",
        "measure.curvature.difference",
        "measure.curvature.operator",
        "measure.curvature.precise",
        "measure.curvature.check",
        "measure.curvature.frame",
        "measure.curvature.krylov",
        "measure.curvature.spectrum",
        "measure.curvature.quadrature",
        "measure.curvature",
        "measure.estimators.base",
        "measure.estimators.rays",
        "measure.estimators.secants",
        "measure.estimators.blocks",
        "measure.estimators.*",
        "measure.estimators",
        "measure.recording",
        "measure.scan.arcs",
        "measure.scan.lines",
        "measure.scan.search",
        "measure.scan.costs",
        "measure.scan.scanning",
        "measure.scan",
        "measure.scan.command",
        "measure.probe.sharded",
        "measure.probe.ranks",
        "measure.probe.unsupported",
        "measure.probe.backward",
        "measure.probe.calls",
        "measure.probe.watched",
        "measure.probe.replaying",
        "measure.probe.partners",
        "measure.probe.accumulation",
        "measure.probe.schedule",
        "measure.probe.data",
        "measure.probe.host",
        "measure.probe.arguments",
        "measure.probe.closures",
        "measure.probe.trust",
        "measure.probe.measuring",
        "measure.probe.others",
        "measure.probe.probe",
        "measure.probe",
        "measure",
    ),
    "adapters": (
        "adapters.updates",
        "adapters.protocol",
        "adapters.wrappers",
        "adapters.iterates",
        "adapters.unknown",
        "adapters.limits",
        "adapters.diagonals",
        "adapters.adaptive",
        "adapters.adam",
        "adapters.derived",
        "adapters.sam",
        "adapters.lookahead",
        "adapters.schedule_free",
        "adapters.zero",
        "adapters.joint",
        "adapters.*",
        "adapters",
    ),
    "fits": (
        "fits.text",
        "fits.plain",
        "fits.parts",
        "fits.decision",
        "fits.wording",
        "fits.needed",
        "fits.plan",
        "fits.summary",
        "fits.base",
        "fits.hull",
        "fits.resamples",
        "fits.walk",
        "fits.affine",
        "fits.models",
        "fits.lossgap",
        "fits.intervals",
        "fits.exponent",
        "fits.ranges",
        "fits.columns",
        "fits.rows",
        "fits.lines",
        "fits.correlations",
        "fits.errors",
        "fits.artefacts",
        "fits.verdict",
        "fits.surrogates",
        "fits.causes",
        "fits.checks",
        "fits.hessian",
        "fits.scans.lines",
        "fits.scans.shapes",
        "fits.scans.rivals",
        "fits.scans.doubts",
        "fits.scans.deciding",
        "fits.scans",
        "fits.groups",
        "fits",
    ),
    "optim": (
        "optim.described",
        "optim.arithmetic",
        "optim.base",
        "optim.descent",
        "optim.clipped_update",
        "optim.clipped_momentum",
        "optim.ggnc",
        "optim.scion",
        "optim",
    ),
    "trace": (
        "trace.lines",
        "trace.keys",
        "trace.order",
        "trace.reading",
        "trace.cells",
        "trace.tables",
        "trace.file",
        "trace.trace",
        "trace",
    ),
    "logs": (
        "logs.names",
        "logs.store",
        "logs.shapes",
        "logs.lines",
        "logs.tables",
        "logs.documents",
        "logs.opening",
        "logs.table",
        "logs.columns",
        "logs.counting",
        "logs.assembling",
        "logs.reading",
        "logs.outliers",
        "logs.findings",
        "logs.wording",
        "logs.review",
        "logs",
        "logs.alarms",
        "logs.watching",
    ),
    "geometry": (
        *("geometry.vector", "geometry.layer", "geometry.spectral", "geometry.product", "geometry.parts"),
        "geometry",
    ),
    "autoclip": (
        "autoclip.progression",
        "autoclip.calibration",
        "autoclip.advice",
        "autoclip.warm_ups",
        "autoclip.rates",
        "autoclip.rows",
        "autoclip.history",
        "autoclip.faults",
        "autoclip.closures",
        "autoclip.buckets",
        "autoclip.stretches",
        "autoclip.following",
        "autoclip.acting",
        "autoclip.ways",
        "autoclip.checks",
        "autoclip.books",
        "autoclip.benefit",
        "autoclip.step",
        "autoclip.clipper",
        "autoclip",
    ),
    "launch": (
        "launch.tape",
        "launch.recorder",
        "launch.norms",
        "launch.attaching",
        "launch.result",
        "launch.words",
        "launch.command",
        "launch",
    ),
    "spikes": (
        "spikes.statistics",
        "spikes.rarity",
        "spikes.robust",
        "spikes.rules",
        "spikes.events",
        "spikes.signals",
        "spikes.further",
        "spikes.elements",
        "spikes.modules",
        "spikes.acting",
        "spikes.recent",
        "spikes.evidence",
        "spikes.causes",
        "spikes.replays",
        "spikes.inquiry",
        "spikes.stepping",
        "spikes.guard",
        "spikes",
    ),
    "demo": ("demo.language", "demo.law", "demo.training", "demo.figures", "demo.story", "demo"),
    "doctor": (
        "doctor.patches",
        "doctor.frameworks",
        "doctor.sites",
        "doctor.explanations",
        "doctor.findings",
        "doctor.gradients",
        "doctor.by_hand",
        "doctor.register",
        "doctor.thresholds",
        "doctor.given",
        "doctor.micro_batches",
        "doctor.uses",
        "doctor.twice",
        "doctor.old_norms",
        "doctor.counts",
        "doctor.vain",
        "doctor.shards",
        "doctor.observer",
        "doctor.report",
        "doctor.scaling",
        "doctor.reading",
        "doctor.watching",
        "doctor.script",
        "doctor.command",
        "doctor",
    ),
    "integrations": (
        "integrations.losses",
        "integrations.latest",
        "integrations.loggers.sink",
        "integrations.loggers.figures",
        "integrations.loggers.verdicts",
        "integrations.loggers.writer",
        "integrations.loggers.*",
        "integrations.loggers",
        "integrations.attached",
        "integrations.training_step",
        "integrations.lightning",
        "integrations.huggingface",
        "integrations",
    ),
    "clipping": ("clipping.trust", "clipping.law", "clipping.result", "clipping.*", "clipping"),
    "report": (
        "report.paths",
        "report.svg",
        "report.answer",
        "report.snippets",
        "report.run",
        "report.figures",
        "report.views",
        "report.page",
        "report.command",
        "report",
    ),
    "plots": (
        "plots.common",
        "plots.looks",
        "plots.density",
        "plots.saving",
        "plots.*",
        "plots",
        "plots.command",
    ),
}

# Edges that go down and are still wrong: optim serves those who measure nothing, and measuring knows no fit.
FORBIDDEN = {
    "optim": {"plots", "clipping", "fits", "trace", "doctor", "problems", "adapters"},
    "measure": {"plots", "clipping", "fits"},
    "fits": {"torch"},
    "clipping": {"torch"},
    "logs": {"torch"},
    "trace": {"torch"},
}
LAZY = {
    "plots": {"matplotlib", "seaborn", "mpl_toolkits"},
    "report": {"matplotlib", "seaborn"},
    "integrations": {"matplotlib", "mlflow", "tensorboard", "torch.utils.tensorboard", "trackio", "wandb"},
}


def violations(package: Path) -> set[str]:
    """Returns one line for everything in the package that breaks a rule of this file."""
    found = set()
    for path in sorted(package.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        parts = path.relative_to(package).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        if (length := len(source.splitlines())) > MAX_LINES:
            found.add(f"{module} has {length} lines, more than {MAX_LINES}")
        if module == "":  # smoothdiag/__init__.py only re-exports
            continue
        top = module.split(".")[0]
        if top not in LINE or (top in WINGS and _place(module, WINGS[top]) is None):
            found.add(f"{module} has no place in the layers of tests/house/test_layers.py")
            continue
        tree = ast.parse(source)
        for node in ast.walk(tree):
            for target in _targets(node, path, package):
                if reason := _wrong(module, target):
                    found.add(f"{module}, line {node.lineno}: imports {target}, {reason}")
        for node in _run_on_import(tree):
            for target in _targets(node, path, package):
                if {target, target.split(".")[0]} & LAZY.get(top, set()):
                    found.add(f"{module}, line {node.lineno}: imports {target} outside of functions")
    return found


def _targets(node: ast.AST, path: Path, package: Path) -> Iterator[str]:
    """Yields the modules that a node imports; names inside the package start with "smoothdiag"."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            anchor = ("smoothdiag", *path.relative_to(package).parts)[: -node.level]
            base = ".".join([*anchor, *base.split(".")]).rstrip(".")
        for alias in node.names:
            # `from smoothdiag import vectors` is an edge to the module, not to what re-exports it.
            inner = package.joinpath(*base.split(".")[1:], alias.name)
            is_module = base.startswith("smoothdiag") and (inner.is_dir() or inner.with_suffix(".py").exists())
            yield f"{base}.{alias.name}" if is_module else base


def _wrong(module: str, target: str) -> str | None:
    """Returns why ``module`` may not import ``target``, or None where it may."""
    top, (root, *rest) = module.split(".")[0], target.split(".")
    if root == "functorch":
        return "which torch.func replaces"
    if root != "smoothdiag":
        return "which its layer must not need" if root in FORBIDDEN.get(top, ()) else None
    if not rest:
        return "which re-exports everything"
    if rest[0] not in LINE:
        return "which has no place in the layers"
    if rest[0] in FORBIDDEN.get(top, ()):
        return "which its wing must not know"
    if rest[0] != top:
        return None if LINE[rest[0]] > LINE[top] else "which is not below it"
    order = WINGS.get(top, (module, top))
    inner = ".".join(rest)
    there, here = _place(inner, order), _place(module, order)
    if there is None or here is None:
        return "which has no place in the wing" if top in WINGS else "which stands beside it"
    if there == here and inner != module:
        return "which stands beside it"
    return None if there < here else "which comes after it in the wing"


def _place(module: str, order: tuple[str, ...]) -> int | None:
    """Returns the place of a module in its wing: its own, or that of the star of its room."""
    star = f"{module.rpartition('.')[0]}.*"
    return next((order.index(name) for name in (module, star) if name in order), None)


def _run_on_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Yields the nodes that importing the module runs: neither functions nor blocks for type checkers."""
    for node in ast.iter_child_nodes(tree):
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if not lazy and not typing_only:
            yield node
            yield from _run_on_import(node)


def test_package_keeps_its_layers() -> None:
    assert not violations(PACKAGE), "\n".join(sorted(violations(PACKAGE)))


@pytest.mark.thorough
@pytest.mark.parametrize("folder", ["tests", "examples", "benchmarks", "docs"])
def test_nothing_beside_the_package_imports_functorch(folder: str) -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in (REPOSITORY / folder).rglob("*.py")}
    for path, text in texts.items():
        for node in ast.walk(ast.parse(text)) if "functorch" in text else ():
            roots = {target.split(".")[0] for target in _targets(node, path, REPOSITORY / folder)}
            assert "functorch" not in roots, path


WRONG = [
    ("vectors.py", "from smoothdiag.geometry import Euclidean", "smoothdiag.geometry"),
    ("vectors.py", "from smoothdiag import geometry", "smoothdiag.geometry"),
    ("vectors.py", "from .geometry import Euclidean", "smoothdiag.geometry"),
    ("vectors.py", "def late():\n    import smoothdiag.geometry as g", "smoothdiag.geometry"),
    ("vectors.py", "import functorch", "functorch"),
    ("measure/loss/objective.py", "from functorch import vmap", "functorch"),
    ("geometry.py", "from smoothdiag.clipping import clip_rule", "smoothdiag.clipping"),
    ("trace.py", "import torch", "torch"),
    (
        "trace.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import Tensor",
        "torch",
    ),
    ("clipping/rule.py", "def late():\n    import torch.nn as nn", "torch.nn"),
    (
        "clipping.py",
        "from smoothdiag.measure.estimators.base import Status",
        "smoothdiag.measure.estimators.base",
    ),
    ("fits/base.py", "import torch", "torch"),
    ("fits/base.py", "from smoothdiag.trace import Trace", "smoothdiag.trace"),
    ("fits/base.py", "from smoothdiag.fits.affine import envelope", "smoothdiag.fits.affine"),
    ("fits/base.py", "from smoothdiag.fits import fit_smoothness", "smoothdiag.fits"),
    ("fits/affine.py", "from .checks import run_checks", "smoothdiag.fits.checks"),
    ("fits/affine.py", "from ..optim.ggnc import GGNC", "smoothdiag.optim.ggnc"),
    ("optim/clipped_momentum.py", "from smoothdiag.trace import Trace", "smoothdiag.trace"),
    ("optim/clipped_momentum.py", "from smoothdiag.measure.probe import Probe", "smoothdiag.measure.probe"),
    ("optim/clipped_momentum.py", "from smoothdiag.optim.ggnc import GGNC", "smoothdiag.optim.ggnc"),
    ("measure/probe/probe.py", "from smoothdiag.fits.base import SmoothnessFit", "smoothdiag.fits.base"),
    ("measure/probe/probe.py", "from smoothdiag.clipping import ClipRule", "smoothdiag.clipping"),
    ("measure/probe/schedule.py", "from smoothdiag.measure.probe import Probe", "smoothdiag.measure.probe"),
    (
        "measure/estimators/path.py",
        "from .local import LocalSmoothness",
        "smoothdiag.measure.estimators.local",
    ),
    ("plots/common.py", "import matplotlib.pyplot as plt", "outside of functions"),
    ("plots/common.py", "try:\n    import seaborn\nexcept ImportError:\n    seaborn = None", "outside of functions"),
    ("integrations/loggers/sink.py", "import wandb", "outside of functions"),
    ("plots/common.py", "import smoothdiag.report", "smoothdiag.report"),
    ("plots/smoothness.py", "from smoothdiag.plots import plot_trace", "smoothdiag.plots"),
    ("demo.py", "from smoothdiag.cli import main", "smoothdiag.cli"),
    ("cli.py", "from smoothdiag import Probe", "re-exports everything"),
    ("cli.py", "import smoothdiag as sd", "re-exports everything"),
    ("autoclip.py", "import smoothdiag.cli", "smoothdiag.cli"),
    ("integrations/lightning.py", "from smoothdiag.integrations.huggingface import x", "comes after it"),
    ("stray.py", "import math", "no place in the layers"),
    ("adapters/new.py", "from smoothdiag.adapters.newer import New", "stands beside it"),
    ("adapters/limits.py", "from smoothdiag.adapters.new import New", "comes after it"),
    ("adapters/new.py", "from smoothdiag.adapters import adapter_of", "comes after it"),
    ("fits/stray.py", "import math", "no place in the layers"),
    ("trace.py", "# line\n" * (MAX_LINES + 1), f"more than {MAX_LINES}"),
]


@pytest.mark.thorough
@pytest.mark.parametrize(("file", "code", "message"), WRONG)
def test_planted_fault_is_found(empty: Path, file: str, code: str, message: str) -> None:
    found = _plant(empty, file, code)
    assert len(found) == 1, found
    assert message in found.pop()


@pytest.mark.thorough
def test_fault_planted_in_a_copy_of_the_real_package_is_found(tmp_path: Path) -> None:
    copy = tmp_path / "smoothdiag"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "vectors.py").open("a", encoding="utf-8") as stream:
        stream.write("from smoothdiag.geometry import Euclidean\n")
    (fault,) = violations(copy)
    assert "smoothdiag.geometry" in fault


RIGHT = [
    ("cli.py", "from smoothdiag import demo, doctor, problems\nfrom smoothdiag.fits import fit_smoothness"),
    (
        "demo.py",
        "import torch\nfrom smoothdiag.measure.probe import Probe\nfrom smoothdiag.plots import plot_trace",
    ),
    (
        "autoclip.py",
        "from smoothdiag.clipping import clip_rule\nfrom smoothdiag.optim import ClippedMomentum",
    ),
    ("measure/probe/probe.py", "from smoothdiag.trace import Trace\nfrom smoothdiag.measure.loss import objective"),
    ("measure/estimators/path.py", "from .base import Step\nfrom ..loss.objective import Objective"),
    ("optim/ggnc.py", "import torch\nfrom smoothdiag import geometry, vectors"),
    ("adapters/new.py", "from smoothdiag.adapters.unknown import Unknown"),
    ("fits/affine.py", "import numpy\nfrom smoothdiag.fits.base import Verdict"),
    ("fits/__init__.py", "from smoothdiag.fits.checks import run_checks"),
    ("plots/common.py", "def late():\n    import matplotlib.pyplot\n    import seaborn"),
    ("plots/common.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from matplotlib.axes import Axes"),
    ("integrations/huggingface.py", "import transformers\nfrom smoothdiag.autoclip import AutoClip"),
]


@pytest.mark.thorough
@pytest.mark.parametrize(("file", "code"), RIGHT)
def test_downward_import_is_allowed(empty: Path, file: str, code: str) -> None:
    assert not _plant(empty, file, code)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of empty modules, one for each place in the layers."""
    package = tmp_path_factory.mktemp("planted") / "smoothdiag"
    modules = [name for names in LAYERS for name in names] + [name for order in WINGS.values() for name in order]
    modules = [name.replace("*", "some") for name in modules]
    for name in modules:
        is_package = any(other.startswith(name + ".") for other in modules)
        path = (
            package.joinpath(*name.split("."), "__init__.py")
            if is_package
            else package / f"{name.replace('.', '/')}.py"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert not violations(package)
    return package


def _plant(package: Path, file: str, code: str) -> set[str]:
    """Returns the violations of the package while the file of it holds ``code``."""
    path = package / file
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code, encoding="utf-8")
    try:
        return violations(package)
    finally:
        path.unlink() if new else path.write_text("")
