"""optim.scion: every parameter gets the geometry of its layer, and sharded ones take the same steps."""

import pytest
import torch
from networks import EmbeddingAndHead, mlp
from ranks import run_ranks
from scion_worker import CASES, WORLD, train, work
from torch import nn
from torch.testing import assert_close

from smoothdiag.geometry import RMS, ByShape, Convolution, Euclidean, Row, Sign, Spectral
from smoothdiag.optim.scion import ClippedScion, scion_groups, scion_init_


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 10)  # registered first
        self.stem, self.norm, self.up = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 4, 2)


def kinds(groups):
    return {name: group["kind"] for group in groups for name in group["names"]}


def test_groups_of_a_language_model():
    groups = scion_groups(EmbeddingAndHead(tied=False), radii={"hidden": 50.0, "head": 3000.0})
    assert kinds(groups) == {
        "wte.weight": "embedding", "lm_head.weight": "head", "block.norm.weight": "vector", "block.norm.bias": "vector",
        "block.up.weight": "hidden", "block.up.bias": "vector", "block.down.weight": "hidden",
        "block.down.bias": "vector",
    }  # fmt: skip
    geometries = {group["kind"]: group["geometry"] for group in groups}
    assert geometries == {"embedding": Sign(), "hidden": Spectral(), "head": Sign(per_input=True), "vector": RMS()}
    assert {g["kind"]: g.get("radius") for g in groups} == {
        "embedding": None, "hidden": 50.0, "head": 3000.0, "vector": None,
    }  # fmt: skip
    optimizer = ClippedScion(groups, lr=6e-7, threshold=600.0, radius=2.0)
    assert [g["radius"] for g in optimizer.param_groups] == [2.0, 2.0, 50.0, 3000.0]


def test_a_tied_embedding_is_one_parameter_with_the_geometry_of_a_head():
    model = EmbeddingAndHead(tied=True)
    groups = scion_groups(model, radii={"tied": 3000.0})
    assert kinds(groups)["wte.weight"] == "tied"
    assert "lm_head.weight" not in kinds(groups)
    (tied,) = (g for g in groups if g["kind"] == "tied")
    assert tied["geometry"] == Sign(per_input=True)
    assert tied["params"][0] is model.wte.weight
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    model.get_output_embeddings = lambda: model.lm_head
    assert kinds(scion_groups(model)) == kinds(groups)


def test_groups_of_a_network_for_images():
    found = kinds(scion_groups(Cnn(), head="head"))
    assert found["stem.weight"] == "convolution"
    assert found["up.weight"] == "transposed"
    assert found["head.weight"] == "head"
    assert found["norm.weight"] == found["norm.bias"] == found["stem.bias"] == "vector"
    by_kind = {g["kind"]: g["geometry"] for g in scion_groups(Cnn())}
    assert by_kind["convolution"] == Convolution()
    assert by_kind["transposed"] == Convolution(transposed=True)


def test_what_needs_no_gradient_is_left_out_and_the_head_can_be_named_or_none():
    model = EmbeddingAndHead(tied=False)
    model.wte.weight.requires_grad_(False)
    assert "wte.weight" not in kinds(scion_groups(model))
    assert kinds(scion_groups(model, head="block.up"))["block.up.weight"] == "head"
    assert "head" not in kinds(scion_groups(model, head="")).values()


def test_tensors_of_no_known_layer_have_to_be_named():
    model = EmbeddingAndHead(tied=False)
    model.position = nn.Parameter(torch.zeros(1, 7, 4))
    with pytest.raises(ValueError, match=r"Parameter `kinds` should say what `position` of shape \(1, 7, 4\) is"):
        scion_groups(model)
    assert kinds(scion_groups(model, kinds={"position": "vector"}))["position"] == "vector"
    for wrong in ({"kinds": {"nowhere": "vector"}}, {"kinds": {"position": "spectral"}}, {"radii": {"tail": 1.0}}):
        with pytest.raises(ValueError, match=r"Parameter `(kinds|radii)` should hold .* Found `\["):
            scion_groups(model, **wrong)
    for head in ("nowhere", "block.norm"):
        with pytest.raises(ValueError, match="Parameter `head` should be the name of a module"):
            scion_groups(model, head=head)


def test_recurrent_and_attention_weights_are_hidden():
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 4), "attention": nn.MultiheadAttention(4, 2), "out": nn.Linear(4, 2)})
    found = kinds(scion_groups(model))
    assert found["lstm.weight_ih_l0"] == found["attention.in_proj_weight"] == "hidden"
    assert found["attention.out_proj.weight"] == "hidden"
    assert found["out.weight"] == "head"


def test_without_geometries_shapes_decide():
    params = [torch.zeros(s, requires_grad=True) for s in [(3, 4), (2, 3, 3, 3), (5,)]]
    optimizer = ClippedScion(params, lr=0.1, threshold=1.0, radius=4.0)
    assert optimizer.param_groups[0]["geometry"] == ByShape()
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    steps = [float(g.norm(p.detach())) for g, p in zip((Spectral(), Convolution(), RMS()), params, strict=True)]
    assert steps == pytest.approx([0.4 * 0.6969, 0.4 * 0.6969, 0.4], rel=1e-3)  # rank one: the polynomial at 1


def test_first_weights_lie_on_their_spheres():
    model = EmbeddingAndHead(tied=False)
    model.conv, model.table = nn.Conv1d(3, 5, 2), nn.Parameter(torch.zeros(6, 4))
    groups = scion_groups(model, radii={"hidden": 5.0, "embedding": 2.0})
    groups.append({"params": [nn.Parameter(torch.zeros(6, 4))], "geometry": Row(table=True), "radius": 3.0})
    biases = model.block["up"].bias.detach().clone()
    scion_init_(groups, radius=1.5, generator=torch.Generator().manual_seed(1))
    for group in groups:
        for p in group["params"]:
            if p.dim() > 1:
                norm = float(group["geometry"].norm(p.detach()))
                assert norm == pytest.approx(group.get("radius", 1.5), rel=1e-5)
    up = model.block["up"].weight.detach()
    assert_close(up.T @ up, 5.0**2 * 8 / 4 * torch.eye(4), rtol=1e-5, atol=1e-4)
    assert torch.equal(model.block["up"].bias.detach(), biases)
    assert 0 < int((model.wte.weight == 2.0).sum()) < 44
    first = up.clone()
    scion_init_(groups, radius=1.5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.block["up"].weight.detach(), first)
    scion_init_(ClippedScion(groups, lr=0.1, threshold=1.0, radius=7.0).param_groups)
    assert float(groups[-1]["geometry"].norm(groups[-1]["params"][0].detach())) == pytest.approx(3.0, rel=1e-5)


def test_first_weights_need_a_geometry_and_a_radius():
    p = nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="Parameter `radius` should be given"):
        scion_init_([{"params": [p], "geometry": Spectral()}])
    with pytest.raises(ValueError, match="Parameter `geometry` should be a LayerGeometry"):
        scion_init_([{"params": [p], "geometry": Euclidean(), "radius": 1.0}])
    with pytest.raises(ValueError, match="3 dimensions for Convolution"):
        scion_init_([{"params": [p], "geometry": Convolution(), "radius": 1.0}])
    with pytest.raises(ValueError, match="Parameter `groups` should hold groups .* Found a `Parameter`"):
        scion_init_([p], radius=1.0)
    assert not p.any()


def test_a_model_starts_in_its_ball_stays_there_and_learns():
    torch.manual_seed(0)
    model = mlp(5, 16, 16, 3)
    groups = scion_groups(model, radii={"hidden": 3.0, "head": 20.0})
    scion_init_(groups, radius=1.0)
    optimizer = ClippedScion(groups, lr=0.05, threshold=2.0, radius=1.0, weight_decay=1.0)
    x = torch.randn(64, 5)
    y = x.abs().argmax(dim=1).clamp(max=2)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        for group in optimizer.param_groups:
            for p in group["params"]:
                # Steps of Newton and Schulz may be 1.21 times as long as those of the norm.
                assert float(group["geometry"].norm(p.detach())) <= 1.21 * group["radius"]
    assert losses[-1] < 0.5 * losses[0]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(work, tmp_path_factory.mktemp("ranks"), WORLD)


@pytest.mark.thorough
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it")
@pytest.mark.parametrize("case", CASES)
def test_two_processes_with_shards_take_the_steps_of_one(ranks, case):
    alone = train(case, None)
    for found in ranks:
        assert_close(found[case], alone, rtol=1e-9, atol=1e-10)


@pytest.mark.thorough
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it")
def test_geometries_of_shards_are_those_of_the_whole(ranks):
    for found in ranks:
        for sharded, whole in found["geometries"]:
            assert_close(sharded, whole, rtol=1e-12, atol=1e-13)
