"""Pages as html.parser sees them, and traces to report on whose answer is known."""

from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pandas as pd

from smoothdiag import Trace

VOID = {"meta", "link", "img", "br", "hr", "input", "source", "path", "use", "image", "rect"}


class Page(HTMLParser):
    """Tags, attributes and texts of a page; an element that is not closed in its place is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag, tag

    def handle_data(self, data) -> None:
        if data.strip():
            self.texts.append((self._open[-1] if self._open else "", " ".join(data.split())))

    def values(self, name: str) -> list[str]:
        return [value for _, other, value in self.attributes if other == name]

    def inside(self, tag: str) -> list[str]:
        return [text for at, text in self.texts if at == tag]

    @property
    def text(self) -> str:
        return " ".join(text for _, text in self.texts)


def lawful(number: int = 200, **columns: object) -> pd.DataFrame:
    """Rows that lie on smoothness = 1 + 2 * gradient norm; at the rate 0.1 the threshold is (1/0.1 - 1)/2 = 4.5."""
    norms = 10 ** np.sin(np.arange(number, dtype=np.float64))
    known = {"estimator": "local", "data": "fixed", "saturation": 0.1, "lr": 0.1, "loss": 3.0}
    rows = {"step": np.arange(number), "grad_norm": norms, "smoothness": 1 + 2 * norms}
    return pd.DataFrame(rows).assign(**(known | columns))


def flat(number: int = 200) -> pd.DataFrame:
    """Rows over a fifth of a decade, from which no law can be seen."""
    source = np.random.default_rng(0)
    return lawful(number, grad_norm=1 + 0.3 * source.random(number), smoothness=1 + 0.3 * source.random(number))


def recorded(frame: pd.DataFrame, path=None, **meta: object) -> Trace:
    """A trace of the rows of a table, with a header."""
    trace = Trace(path, meta={"optimizer": "SGD", "follows_gradients": True, "momentum": 0.0, "gain": 1.0} | meta)
    with trace:
        trace.extend(frame.to_dict("records"))
    return trace
