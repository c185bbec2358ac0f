"""docs/gallery.md: every call and every figure on the page is one of the script that draws them."""

import ast
import re

import pytest
from places import REPOSITORY

PAGE = (REPOSITORY / "docs/gallery.md").read_text(encoding="utf-8")
SCRIPT = (REPOSITORY / "docs/gallery.py").read_text(encoding="utf-8")


def drawn() -> dict[str, str]:
    """The calls in `figures` of the script, by the name of the figure."""
    yielded = [node.value for node in ast.walk(ast.parse(SCRIPT)) if isinstance(node, ast.Yield)]
    pairs = [pair.elts for pair in yielded if isinstance(pair, ast.Tuple) and isinstance(pair.elts[0], ast.Constant)]
    return {str(name.value): ast.unparse(call) for name, call in pairs if isinstance(name, ast.Constant)}


def test_calls_and_figures_of_the_page_are_those_of_the_script() -> None:
    shown = re.findall(r"^`(sd\.plot_.*)`\n\n!\[.+\]\(figures/gallery/(.+)\.svg\)\n\n\S", PAGE, re.MULTILINE)
    assert {name: ast.unparse(ast.parse(call)) for call, name in shown} == drawn()
    assert len(shown) == PAGE.count("](figures/gallery/")


def test_every_plot_function_is_in_the_gallery() -> None:
    import smoothdiag as sd

    called = {call.partition("(")[0].removeprefix("sd.") for call in drawn().values()}
    assert called == {name for name in sd.__all__ if name.startswith("plot_")}


@pytest.mark.parametrize("name", drawn())
def test_figures_exist_and_name_no_date(name: str) -> None:
    text = (REPOSITORY / f"docs/figures/gallery/{name}.svg").read_text(encoding="utf-8")
    assert "<dc:date>" not in text
