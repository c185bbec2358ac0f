"""The demo: a scan asks whether a law holds, a rate that is too large is trained three ways, a threshold is found."""

from smoothdiag.demo.language import (
    BATCH_SIZE,
    WINDOW,
    CharacterLSTM,
    Corpus,
    next_character_loss,
    standard_library_text,
)
from smoothdiag.demo.story import run_demo

__all__ = [
    "BATCH_SIZE",
    "WINDOW",
    "CharacterLSTM",
    "Corpus",
    "next_character_loss",
    "run_demo",
    "standard_library_text",
]
