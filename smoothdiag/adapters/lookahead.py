"""Lookahead: a wrapper that pulls the parameters back to slow copies of them every few steps."""

import torch

from smoothdiag.adapters.derived import Derived
from smoothdiag.adapters.unknown import first_options, is_of_torch, keeps_iterate

_OPTIONS = frozenset({"lookahead_alpha", "la_alpha"})


class Lookahead(Derived):
    """Describes Lookahead: shortened updates would spoil its slow copies.

    Source: Zhang, Lucas, Hinton, Ba 2019, *Lookahead optimizer: k steps forward, 1 step back*.
    """

    @staticmethod
    def matches(optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether the name of the class or an option says Lookahead."""
        named = "lookahead" in type(optimizer).__name__.lower().replace("_", "")
        return not is_of_torch(optimizer) and (named or bool(_OPTIONS & first_options(optimizer)))

    def refusal(self) -> str:
        """Returns the refusal: Lookahead keeps a copy of the parameters."""
        name, options = type(self.optimizer).__name__, _OPTIONS & first_options(self.optimizer)
        return keeps_iterate(f"{name}, whose groups have `{min(options)}`" if options else name)
