"""Lookahead: a wrapper that pulls the parameters back to slow copies of them every few steps."""

from smoothdiag.adapters.derived import KeepsIterate


class Lookahead(KeepsIterate):
    """Describes Lookahead: shortened updates would spoil its slow copies.

    Source: Zhang, Lucas, Hinton, Ba 2019, *Lookahead optimizer: k steps forward, 1 step back*.
    """

    name = "lookahead"
    options = frozenset({"lookahead_alpha", "la_alpha"})
