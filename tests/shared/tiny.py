"""Language models, sentences and tokenizers of 32 words, made from nothing: no test of a library loads a file."""

import random
from pathlib import Path
from typing import Any

import torch
import trainers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

SPECIAL = ["<pad>", "<eos>", "<unk>"]
WORDS = [f"w{number}" for number in range(29)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer that takes words apart at spaces."""
    numbers = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    made = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def text(draw: random.Random, number: int) -> str:
    """Returns a sentence in which every word follows from the one before, three times in four."""
    place, found = draw.randrange(len(WORDS)), []
    for _ in range(number):
        found.append(WORDS[place])
        place = (place + 1) % len(WORDS) if draw.random() < 0.75 else draw.randrange(len(WORDS))
    return " ".join(found)


def llama(dropout: float = 0.1) -> LlamaForCausalLM:
    """Returns a Llama of 5,000 parameters that knows where its tokens end."""
    ends: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return trainers.llama(dropout, max_position_embeddings=64, **ends)


def encoder(folder: Path) -> str:
    """Writes a BERT of 6,000 parameters and its tokenizer to a folder, which sentence-transformers reads them from."""
    set_seed(1)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=32, intermediate_size=32, max_position_embeddings=32, **sizes)).save_pretrained(
        folder
    )
    tokenizer().save_pretrained(folder)
    return str(folder)


def tokens(number: int, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Returns sentences as rows of token numbers."""
    draw = random.Random(seed)
    return torch.tensor([tokenizer()(text(draw, length))["input_ids"] for _ in range(number)])
