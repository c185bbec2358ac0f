"""The demo: trains a character language model while measuring it, fits, plots, and trains again with clipping."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from smoothdiag.clipping import clip_rule
from smoothdiag.fits import SmoothnessFit, fit_smoothness
from smoothdiag.measure.probe import Probe
from smoothdiag.measure.probe.schedule import log_spaced
from smoothdiag.optim import ClippedMomentum
from smoothdiag.plots import plot_fit, plot_smoothness, plot_trace
from smoothdiag.trace import Trace

WINDOW = 64
BATCH_SIZE = 32
MOMENTUM = 0.0
PROBES_PER_DECADE = 60
MAX_CHARACTERS = 2_000_000
MAX_VOCABULARY = 128


class CharacterLSTM(nn.Module):
    """Predicts the next character from the characters before it.

    Args:
        vocabulary: Number of different characters.
        width: Hidden size of the LSTM.
        dropout: Share of hidden units dropped before the last layer.
    """

    def __init__(self, vocabulary: int, width: int = 128, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 64)
        self.lstm = nn.LSTM(64, width, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, vocabulary)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)

    def forward(self, characters: Tensor) -> Tensor:
        """Returns logits, shape (batch, length, vocabulary), for characters of shape (batch, length)."""
        logits: Tensor = self.head(self.dropout(self.lstm(self.embed(characters))[0]))
        return logits


def next_character_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Returns the mean cross-entropy [nats per character] over windows of shape (batch, length + 1)."""
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


@dataclass(frozen=True)
class Corpus:
    """Text as character codes; the last tenth is held out."""

    codes: Tensor
    vocabulary: int

    @classmethod
    def from_text(cls, text: str) -> "Corpus":
        """Encodes a text; characters beyond the 127 most frequent ones share one code.

        Raises:
            ValueError: If the text is too short to cut windows from both parts.
        """
        if len(text) < 20 * WINDOW:
            raise ValueError(f"The text should have at least {20 * WINDOW} characters. Found {len(text)}.")
        frequent = [c for c, _ in Counter(text).most_common(MAX_VOCABULARY - 1)]
        code = {c: i for i, c in enumerate(sorted(frequent), start=1)}
        return cls(torch.tensor([code.get(c, 0) for c in text]), len(code) + 1)

    def batches(self, num: int, seed: int, device: torch.device) -> Iterator[Tensor]:
        """Yields random training windows, shape (batch, length + 1); the same seed yields the same windows."""
        train = self.codes[: len(self.codes) * 9 // 10]
        generator = torch.Generator().manual_seed(seed)
        for _ in range(num):
            starts = torch.randint(len(train) - WINDOW, (BATCH_SIZE,), generator=generator)
            yield torch.stack([train[i : i + WINDOW + 1] for i in starts]).to(device)

    def held_out(self, device: torch.device) -> Tensor:
        """Returns up to 512 windows of the last tenth, shape (windows, length + 1)."""
        rest = self.codes[len(self.codes) * 9 // 10 :]
        return rest.unfold(0, WINDOW + 1, WINDOW)[:512].to(device)


def standard_library_text() -> str:
    """Returns source files of the running Python's standard library, in alphabetical order.

    Raises:
        FileNotFoundError: If the library is not installed as source files.
    """
    folder = Path(os.__file__).parent
    files = sorted(folder.glob("*.py"))
    if not files:
        raise FileNotFoundError(f"There are no Python sources in `{folder}`. Pass a text of your own with --text FILE.")
    return "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)[:MAX_CHARACTERS]


@dataclass(frozen=True)
class Run:
    """A finished training run: its weights, its last training loss and its held-out loss [nats per character]."""

    weights: list[Tensor]
    train_loss: float
    held_out_loss: float


def train(
    corpus: Corpus,
    steps: int,
    device: torch.device,
    *,
    lr: float,
    threshold: float,
    label: str,
    trace: Trace | None = None,
) -> Run:
    """Trains the model from a fixed seed, with a probe attached if ``trace`` is given."""
    torch.manual_seed(0)
    model = CharacterLSTM(corpus.vocabulary).to(device)
    optimizer = ClippedMomentum(model.parameters(), lr, threshold=threshold, momentum=MOMENTUM)
    probe = None
    if trace is not None:
        probe = Probe(model, optimizer, next_character_loss, schedule=log_spaced(PROBES_PER_DECADE), trace=trace)
    batches = corpus.batches(steps, seed=0, device=device)
    losses = []
    with tqdm(total=steps, desc=label, unit="step") as bar:
        for windows in probe.watch(batches) if probe else batches:
            optimizer.zero_grad()
            loss = next_character_loss(model, windows)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.detach())
            bar.update()
            if bar.n % 10 == 0:
                shown = {"loss": f"{float(losses[-1]):.3f}"}
                if trace:
                    last = trace[-1]
                    shown |= {"|g|": f"{last['grad_norm']:.3g}", "L": f"{last['smoothness']:.3g}"}
                bar.set_postfix(shown)
    if probe:
        probe.close()
    model.eval()
    with torch.no_grad():
        held_out = float(next_character_loss(model, corpus.held_out(device)))
    tail = torch.stack(losses[-min(50, steps) :])
    return Run([p.detach().cpu() for p in model.parameters()], float(tail.mean()), held_out)


def run_demo(text: str | None, steps: int, out: Path, device: torch.device, *, lr: float) -> None:
    """Runs the demo and leaves trace.jsonl, smoothness.png, fit.png, trace.png and summary.txt in ``out``."""
    if device.type == "cpu":
        torch.set_num_threads(1)  # no slower at this size, and the losses do not depend on the number of cores
    out.mkdir(parents=True, exist_ok=True)
    path = out / "trace.jsonl"
    corpus = Corpus.from_text(standard_library_text() if text is None else text)
    print(f"Text: {len(corpus.codes):,} characters, {corpus.vocabulary} different. Device: {device}. Results: {out}/")
    meta = {"demo": True, "lr": lr, "momentum": MOMENTUM, "steps": steps, "torch": torch.__version__}
    with Trace(path, meta=meta) as trace:
        measured = train(corpus, steps, device, lr=lr, threshold=float("inf"), label="measure", trace=trace)
    fit = fit_smoothness(trace)
    save_figures(trace, fit, out)
    rule = clip_rule(fit, lr=lr, momentum=MOMENTUM, dampening=MOMENTUM)
    report = [fit.summary(), "", str(rule)]
    print("\n" + "\n".join(report) + "\n")
    clipped = train(corpus, steps, device, lr=lr, threshold=rule.threshold, label="clipped")
    plain = train(corpus, steps, device, lr=lr, threshold=float("inf"), label="unclipped")
    comparison = compare(clipped, plain, measured, lr, rule.threshold)
    print("\n" + comparison)
    (out / "summary.txt").write_text("\n".join([*report, "", comparison, ""]), encoding="utf-8")
    print(f"\nWritten to {out}/: trace.jsonl, smoothness.png, fit.png, trace.png, summary.txt")


def save_figures(trace: Trace, fit: SmoothnessFit, out: Path) -> None:
    """Writes smoothness.png, fit.png and trace.png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    plot_smoothness(trace, fit=fit, ax=figure.subplots())
    figure.savefig(out / "smoothness.png", dpi=150)
    figure = Figure(figsize=(6.4, 7.7), layout="constrained")
    plot_fit(fit, trace, axes=figure.subplots(2, 2))
    figure.savefig(out / "fit.png", dpi=150)
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    plot_trace(trace, estimator=fit.estimator, ax=figure.subplots(3, sharex=True))
    figure.savefig(out / "trace.png", dpi=150)


def compare(clipped: Run, plain: Run, measured: Run, lr: float, threshold: float) -> str:
    """Returns a text with the losses of both runs, and whether measuring changed the run."""
    difference = plain.held_out_loss - clipped.held_out_loss
    better = "lower" if difference > 0 else "higher"
    same = all(torch.equal(a, b) for a, b in zip(plain.weights, measured.weights, strict=True))
    return "\n".join(
        [
            f"{f'Same model, same seeds, lr = {lr:g}, trained again:':<50} last train loss   held-out loss",
            f"  ClippedMomentum, threshold {threshold:<21.4g} {clipped.train_loss:15.4f} {clipped.held_out_loss:15.4f}",
            f"  ClippedMomentum, never clips {'':<19} {plain.train_loss:15.4f} {plain.held_out_loss:15.4f}",
            f"With clipping, the held-out loss is {abs(difference):.4f} nats per character {better}.",
            "This is one run of one seed: no evidence for or against clipping.",
            "The run with a probe and the run without one ended with "
            + ("bit-identical weights." if same else "different weights: on a GPU, some kernels do not repeat."),
        ]
    )
