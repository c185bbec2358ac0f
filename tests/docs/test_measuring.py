"""docs/measuring.md: the page names files and sections that exist, and its code runs."""

import re

import pytest
import torch
from networks import mlp
from places import REPOSITORY
from torch.nn import functional as F

import smoothdiag as sd

PAGE = (REPOSITORY / "docs" / "measuring.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", re.findall(r"`((?:tests|benchmarks)/[\w/]+\.py)`|docs/(\w+\.py)", PAGE))
def test_scripts_exist(name) -> None:
    assert (REPOSITORY / (name[0] or f"docs/{name[1]}")).is_file()


@pytest.mark.parametrize("link", re.findall(r"\]\((.*?)\)", PAGE))
def test_links_lead_somewhere(link) -> None:
    path, _, section = link.partition("#")
    page = REPOSITORY / "docs" / (path or "measuring.md")
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8") if section else "", re.MULTILINE)
    assert page.is_file()
    # As the sites that show these pages make an anchor of a title.
    assert not section or section in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_estimators_of_the_optimizers_own_norm_measure() -> None:
    names = {"sd": sd}
    exec(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0], names)
    model = torch.nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.Muon(model.parameters(), lr=0.01)
    probe = sd.Probe(model, optimizer, lambda m, x: m(x).square().mean(), estimators=names["estimators"])
    for batch in probe.watch(torch.randn(1, 8, 3)):
        model(batch).square().mean().backward()
        optimizer.step()
    assert [row["estimator"] for row in probe.trace] == ["path_own", "local_steepest_own"]


def test_the_loop_of_a_gan_runs_as_it_stands() -> None:
    section = PAGE.partition("## Several networks")[2]
    example = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    networks = mlp(8, 16, 4), mlp(4, 16, 1)
    optimizers = [torch.optim.Adam(network.parameters(), lr=0.01) for network in networks]
    names = dict(zip(("generator", "discriminator"), networks, strict=True))
    names |= {f"{name}_optimizer": optimizer for name, optimizer in zip(names, optimizers, strict=True)}
    names |= {"sd": sd, "torch": torch, "F": F, "loader": torch.randn(21, 8, 4)}
    exec(example, names)
    for probe in names["of_generator"], names["of_discriminator"]:
        assert {row["step"] for row in probe.trace} == {0, 20}
        assert {row["status"] for row in probe.trace} <= {"ok", "saturated", "kink_limited"}
