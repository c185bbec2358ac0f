"""smoothdiag: only a few rooms know other people's optimizers, by class or by what they keep."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from places import REPOSITORY

PACKAGE = REPOSITORY / "smoothdiag"

MAY_KNOW = ("adapters", "optim", "demo", "integrations")
"""Rooms that may name optimizers and read their options and states; `optim` about its own."""

OTHERS = ("Lion", "Prodigy", "SAM", "WSAM", "Lookahead", "ScheduleFree", "AdamWScheduleFree", "SGDScheduleFree", "SOAP")
TORCH = {name for name, value in vars(torch.optim).items() if isinstance(value, type)} - {"Optimizer"}
CLASSES = TORCH | set(OTHERS)

KEPT = {
    *("betas", "momentum", "dampening", "nesterov", "nu", "weight_decay", "amsgrad", "eps", "lr_decay", "maximize"),
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg", "momentum_buffer", "sum", "ax", "z", "d"),
    *("weight_sum", "train_mode", "la_alpha", "lookahead_alpha", "base_optimizer", "grad_scale"),
}
"""Options of groups, entries of states and attributes by which an optimizer is known."""


def knowledge(source: str) -> Iterator[str]:
    """Yields what a module knows of optimizers: classes that it names, and entries that it reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id in CLASSES:
            yield f"line {node.lineno}: {node.id}"
        elif isinstance(node, ast.Attribute) and node.attr in CLASSES:
            yield f"line {node.lineno}: {node.attr}"
        elif isinstance(node, ast.alias) and node.name in CLASSES:
            yield f"import of {node.name}"
        elif isinstance(node, ast.Constant) and node.value in CLASSES:
            yield f"line {node.lineno}: {node.value!r}"
        elif (key := _key(node)) in KEPT:
            yield f"line {node.lineno}: {key!r}"  # type: ignore[attr-defined]


def _key(node: ast.AST) -> object:
    """Returns the constant that an expression looks something up by."""
    keys: list[ast.expr] = []
    if isinstance(node, ast.Subscript):
        keys = [node.slice]
    elif (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "setdefault")
    ):
        keys = node.args[:1]
    elif isinstance(node, ast.Call):
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        keys = node.args[:1] if called in ("get", "setdefault") else []
        keys = node.args[1:2] if called in ("getattr", "hasattr") else keys
    elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
        keys = [node.left]
    return next((key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)), None)


def strangers() -> list[Path]:
    files = sorted(PACKAGE.rglob("*.py"))
    return [path for path in files if path.relative_to(PACKAGE).parts[0].removesuffix(".py") not in MAY_KNOW]


def test_nobody_else_knows_an_optimizer() -> None:
    found = [f"{path.relative_to(PACKAGE)}, {what}" for path in strangers() for what in knowledge(path.read_text())]
    assert not found, "\n".join(found)


PLANTED = {
    "class": "import torch\nif isinstance(optimizer, torch.optim.SGD): ...",
    "import": "from torch.optim import AdamW as Other",
    "name": 'if type(optimizer).__name__ == "Muon": ...',
    "option": 'b = group["betas"][0]',
    "option with a default": 'b = group.get("momentum", 0.0)',
    "state": 'm = optimizer.state[p]["exp_avg"]',
    "question": 'if "train_mode" in group: ...',
    "attribute": 'inner = getattr(optimizer, "base_optimizer", None)',
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_knowledge_is_found(name: str) -> None:
    assert list(knowledge(PLANTED[name]))


def test_what_every_optimizer_has_is_no_knowledge() -> None:
    assert not list(knowledge('lr = group["lr"]; held = group["params"]; kind: torch.optim.Optimizer'))
