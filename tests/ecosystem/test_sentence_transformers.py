"""docs/ecosystem.md: sentence-transformers train the same with the callback, whatever their loss keeps or owns."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recipes import recipe

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
sentence_transformers = pytest.importorskip("sentence_transformers")

CODE = recipe("sentence-transformers")


def trainer_of(folder: Path, loss: Callable[[Any, Any], Any], label: str = "", **options: Any) -> Any:
    from callbacks import COMMON
    from datasets import Dataset
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tiny import encoder, text
    from transformers import set_seed

    set_seed(2)
    model = sentence_transformers.SentenceTransformer(
        modules=[Transformer(encoder(folder / "begun"), max_seq_length=16), Pooling(16)], device="cpu"
    )
    draw = random.Random(0)
    labels: dict[str, Callable[[], Any]] = {"class": lambda: draw.randrange(3), "score": draw.random}
    rows = []
    for _ in range(96):
        sentence = text(draw, 6)
        rows.append({"anchor": sentence, "positive": " ".join(reversed(sentence.split()))})
        rows[-1] |= {"label": labels[label]()} if label else {}
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(str(folder), **COMMON | options)
    return sentence_transformers.SentenceTransformerTrainer(
        model, arguments, train_dataset=Dataset.from_list(rows), loss=loss(losses, model)
    )


def cached(losses: Any, model: Any) -> Any:
    return losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)


LOSSES: dict[str, tuple[Callable[[Any, Any], Any], dict[str, Any]]] = {
    "ranking": (lambda losses, model: losses.MultipleNegativesRankingLoss(model), {}),
    "cached ranking": (cached, {}),
    "cached ranking, accumulated": (cached, {"gradient_accumulation_steps": 2}),
    "cosine similarity": (lambda losses, model: losses.CosineSimilarityLoss(model), {"label": "score"}),
    "softmax": (lambda losses, model: losses.SoftmaxLoss(model, 16, 3), {"label": "class"}),
    "matryoshka": (
        lambda losses, model: losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [16, 8]),
        {},
    ),
    "adaptive layers": (
        lambda losses, model: losses.AdaptiveLayerLoss(model, losses.MultipleNegativesRankingLoss(model)),
        {},
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_training_and_logs_are_the_same_and_rows_are_those_of_the_optimizer(name: str, tmp_path: Path) -> None:
    from callbacks import assert_only_watches

    loss, options = LOSSES[name]
    callback = assert_only_watches(lambda: trainer_of(tmp_path, loss, max_steps=6, learning_rate=1e-3, **options), CODE)
    # A loss may have weights of its own, which the trainer's gradient norm leaves out but the optimizer moves.
    own = sum(p.numel() for p in callback.probe._parameters) - sum(
        p.numel() for p in callback._bound.trainer.model.parameters()
    )
    assert own == (3 * (3 * 16 + 1) if name == "softmax" else 0)


def test_auto_clip_helps_at_a_rate_that_is_too_large(tmp_path: Path) -> None:
    from callbacks import ends

    def make(**options: Any) -> Any:
        return trainer_of(tmp_path, LOSSES["ranking"][0], max_steps=60, lr_scheduler_type="constant", **options)

    fair, without, clipped = ends(make, CODE, 1.0, (1e-3, 3e-3, 1e-2))
    assert without > 1  # of pairs drawn at random: log 4
    assert clipped < 0.1
    assert max(fair) < 0.2
