"""Names: what trainers call the step, the gradient norm, the loss and the learning rate, and where they do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final, NamedTuple


class Name(NamedTuple):
    """A usual name.

    Attributes:
        name: The name in small letters, with everything but letters and digits as underscores.
        origin: File or documentation page of the trainer that writes it.
        note: What the name does not say, such as a unit; empty if nothing is known beyond the name.
    """

    name: str
    origin: str
    note: str = ""


MANY: Final = "many trainers"

# Likeliest first. The optimizer's counter of steps comes before counters of batches.
USUAL: Final[Mapping[str, Sequence[Name]]] = {
    "step": (
        Name("optimizer_step", "smoothdiag integrations/loggers/writer.py"),
        Name("global_step", "Lightning loggers; NeMo lightning/megatron_parallel.py; transformers trainer_state.json"),
        Name("trainer_global_step", "Lightning loggers/wandb.py"),
        Name("step", MANY),
        Name("num_updates", "fairseq logging/progress_bar.py"),
        Name("iteration", "Megatron-LM training/training.py; NeMo"),
        Name("iter", "nanoGPT train.py; mmengine hooks/logger_hook.py"),
        Name("steps", "DeepSpeed runtime/pipe/engine.py"),
        Name("global_steps", "DeepSpeed runtime/engine.py"),
        Name("current_steps", "LLaMA-Factory train/callbacks.py"),
        Name("current_step", MANY),
        Name("completed_steps", "accelerate examples"),
        Name("s", "llm.c llmc/logger.h"),
        Name("timesteps_total", "RLlib algorithms/algorithm.py", "counts steps of the environment"),
        Name("num_env_steps", "RLlib utils/metrics", "counts steps of the environment"),
        Name("num_env_steps_sampled_lifetime", "RLlib utils/metrics", "counts steps of the environment"),
        Name("total_timesteps", "stable-baselines3 common/logger.py", "counts steps of the environment"),
        Name("batch", "Composer loggers/console_logger.py"),
        Name("time_batch", "Composer loggers/console_logger.py"),
        Name("it", MANY),
        Name("n_m_of_an_epoch", "Keras utils/progbar.py"),
        Name("n_m", "tqdm, mmengine, timm: a counter without a name, such as [10/1000]"),
    ),
    "grad_norm": (
        Name("grad_norm", "transformers trainer.py; torchtitan components/metrics.py; mmengine; timm; OLMo-core"),
        Name("gradient_norm", "NeMo models; accelerate examples"),
        Name("global_grad_norm", "DeepSpeed runtime/engine.py, get_global_grad_norm"),
        Name("total_grad_norm", "OLMo optim.py"),
        Name("grad_norm_total", MANY),
        Name("grad_2_0_norm_total", "Lightning utilities/grads.py"),
        Name("total_norm", "torch nn/utils/clip_grad.py"),
        Name("raw_grad_norm", "MaxText metric_logger.py", "before clipping"),
        Name("gnorm", "fairseq trainer.py", "of gradients that fairseq has divided by the number of tokens"),
        Name("grad_gnorm", "RLlib policy/torch_policy.py"),
        Name("gradients_default_optimizer_global_norm", "RLlib core/learner/learner.py"),
        Name("gradient_norm_l2", MANY),
        Name("l2_norm_grad_global", "Composer callbacks/optimizer_monitor.py"),
        Name("gradnorm", MANY),
        Name("norm", "llm.c llmc/logger.h; build-nanogpt train_gpt2.py"),
    ),
    "loss": (
        Name(
            "reduced_train_loss", "NeMo lightning/megatron_parallel.py", "a mean over the ranks of the data parallelism"
        ),
        Name("loss", MANY),
        Name("loss_train_total", "Composer loggers/console_logger.py"),
        Name("lm_loss", "Megatron-LM training/training.py; nanotron trainer.py", "a mean over the logging interval"),
        Name("crossentropyloss", "OLMo train.py"),
        Name("ce_loss", "OLMo-core train/train_module"),
        Name("global_avg_loss", "torchtitan components/metrics.py", "a mean over the ranks of the data parallelism"),
        Name("step_loss", "diffusers examples"),
        Name("total_loss", "detectron2 engine/train_loop.py; RLlib"),
        Name("pg_loss", "verl workers/actor", "a loss of the policy, which is no measure of success"),
        Name("policy_loss", "RLlib; OpenRLHF", "a loss of the policy, which is no measure of success"),
        Name("trl", "llm.c llmc/logger.h"),
        Name("nll_loss", "fairseq criterions", "in base 2, if fairseq wrote it"),
    ),
    "lr": (
        Name("lr", MANY),
        Name("learning_rate", "transformers trainer.py; Megatron-LM training/training.py"),
        Name("current_learning_rate", "MaxText metric_logger.py"),
        Name("cur_lr", "RLlib"),
        Name("base_lr", "mmengine"),
        Name("default_optimizer_learning_rate", "RLlib core/learner/learner.py"),
        Name("learning_rate_group0", "OLMo optim.py"),
    ),
    "epoch": (Name("epoch", MANY), Name("train_epoch", "torch examples mnist/main.py"), Name("ep", MANY)),
}

RUN_NAMES: Final = frozenset(
    ("run", "run_id", "run_uuid", "run_name", "experiment", "experiment_name", "trial_id", "trial_name")
)
"""Fields that name the run of a row (MLflow, Weights & Biases, Ray Tune)."""

RUN_COLUMNS: Final = RUN_NAMES | {"name", "id"}
"""Columns that name the run of a row in a table."""

RANK_NAMES: Final = frozenset(("rank", "global_rank", "process_index"))
"""Fields that say which process wrote a row (torchrun, DeepSpeed, accelerate)."""

SPLIT_NAMES: Final = frozenset(("mode", "split", "phase", "stage", "subset", "partition", "dataset_split", "context"))
"""Fields that say which data a row belongs to, such as `mode` of mmdetection."""

VALIDATION: Final = r"val|valid|validate|validation|validating|eval|evaluate|evaluation|evaluating|test|testing|dev"

IS_VALIDATION: Final = re.compile(rf"(?<![\w/.\\-])(?:{VALIDATION})(?![\w/\\]|[.-]\w)", re.IGNORECASE)
"""Finds a word that says that a line belongs to other data than those of training; parts of paths do not count."""

_NOT_OF_A_STEP: Final = re.compile(
    r"(^|_)(eval|evaluation|val|valid|validation|test|dev)_|_(eval|val|valid|validation|test)$|_epoch$"
)
"""Matches names of losses on other data, and of means over an epoch."""

_OF_TRAINING: Final = re.compile(r"^(train|training)_|_(train|step)$")
"""Matches parts of a name that only say that the value belongs to a training step."""

_ONLY_WHOLE: Final = frozenset(("norm", "s", "trl", "it", "batch", "ep"))
"""Names too short to mean the same behind a slash: `param/norm` is no gradient norm."""

_NOISE: Final = re.compile(
    r"(?:(?:info|debug|warning|train|training|current|completed|finished|at|on|in|of|the|and|worker|global|total|step|"
    r"avg|average|mean|batch|mini|minibatch|optim|optimizer|log|now|after|learner)_(?:\d+_)?)+"
)
"""Matches words before a name in a line of a console, which belong to the text and not to the name.

Every part has to be such a word: `train` before `loss` is, but `train/Z` names another loss.
"""

_TOTAL: Final = re.compile(r"/(max|total)_(steps|iters|iterations|updates|epochs)$")
"""Matches what a counter counts to, if its name says so: `global_step/max_steps` of ms-swift, with "5/500"."""

_FILLER: Final = re.compile(r" (is|was|of|now|at|about)$")

_COUNTERS: Final = ("step", "epoch")

_NO_COUNTER: Final = re.compile(
    r"(^|_)(max|num|number|total|warmup|warm|skipped|accumulation|save|logging|every|per|remaining|eta|time|last|best|"
    r"nan|eval|of|for)(_|$)"
)
"""Matches names of settings and sums that end like a counter of steps."""


def plain(name: str) -> str:
    """Returns a name in small letters, with everything but letters and digits as single underscores."""
    return re.sub(r"[\W_]+", "_", name.lower()).strip("_")


@lru_cache(maxsize=100_000)
def readings(name: str) -> frozenset[str]:
    """Returns the ways to read a name; none if the name does not belong to a training step."""
    name = _TOTAL.sub("", name)
    whole, last = plain(name), plain(name.split("/")[-1])
    if _NOT_OF_A_STEP.search(f"{whole}_" if "/" in name else whole):
        return frozenset()
    bare = _OF_TRAINING.sub("", whole)
    found = {whole, bare, _OF_TRAINING.sub("", bare)}
    return frozenset(found if last in _ONLY_WHOLE else {*found, last, _OF_TRAINING.sub("", last)})


_PLACES: Final = {name.name: (role, place) for role, names in USUAL.items() for place, name in enumerate(names)}


@lru_cache(maxsize=100_000)
def place(name: str) -> tuple[str, int] | None:
    """Returns the role of a column and the place of its name in the table of that role; None if it is not usual."""
    found = [_PLACES[reading] for reading in readings(name) if reading in _PLACES]
    if any(role == "lr" for role, _ in found) or not found:
        return min((entry for entry in found if entry[0] == "lr"), default=_learning_rate(name))
    return min(found, key=lambda entry: entry[1])


def role_of(name: str) -> str:
    """Returns the role of a column with a usual name; empty if the name is not usual."""
    return found[0] if (found := place(name)) is not None else ""


def _learning_rate(name: str) -> tuple[str, int] | None:
    """Returns the place of a rate with the name of its optimizer, as Lightning's monitor and Composer write it."""
    return ("lr", len(USUAL["lr"])) if re.match(r"lr[-/_](?!scale)", name.lower()) else None


@lru_cache(maxsize=100_000)
def spoken(text: str) -> tuple[str, bool]:
    """Returns the name at the end of the words before a number, and whether the words speak of validation.

    Words that belong to the text are taken off as long as the rest is no usual name: "INFO train step" is `train step`.
    The whole text is the name if no usual name is found.
    """
    words = rest = _FILLER.sub("", text.strip())
    while not role_of(rest) or (rest != words and _is_setting(words, rest)):
        first, space, after = rest.partition(" ")
        is_other = bool(IS_VALIDATION.fullmatch(first))
        is_word = bool(_NOISE.fullmatch(plain(first) + "_")) or is_other or _is_counter(after)
        # "val loss" is the name of a column, and "eval step" begins a line of other data.
        if not space or not is_word or (is_other and role_of(after) and role_of(after) not in _COUNTERS):
            return words, _is_other_counter(words)
        rest = after.strip()
    return rest, bool(IS_VALIDATION.search(words))


def _is_other_counter(words: str) -> bool:
    """Whether words are a counter of other data, as `Epoch(val)`."""
    return bool(IS_VALIDATION.search(words)) and role_of(IS_VALIDATION.sub("", words).strip(" ()[]")) in _COUNTERS


def _is_counter(text: str) -> bool:
    """Whether words end in a counter of steps, which any word may precede: "Finished iteration"."""
    return role_of(text.split(" ")[-1]) in _COUNTERS


def _is_setting(words: str, rest: str) -> bool:
    """Whether the words before a counter make it a setting or a sum: "max steps", "number of skipped iterations"."""
    return _is_counter(rest) and bool(_NO_COUNTER.search(plain(words)))


def note_of(name: str) -> str:
    """Returns what is known of a usual name beyond the name; empty if nothing is."""
    found = place(name)
    return USUAL[found[0]][found[1]].note if found is not None and found[1] < len(USUAL[found[0]]) else ""
