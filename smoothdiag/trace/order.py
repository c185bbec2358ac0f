"""Order: finds lines that are missing, come twice, or belong to another file, by the places that lines carry."""

from itertools import pairwise
from typing import Final, Generic, TypeVar

from smoothdiag.console import counted
from smoothdiag.trace.lines import Place

EDITED: Final = "If you edited the file on purpose, read it with `Trace.read(path, verify=False)`"
NUM_SHOWN: Final = 10
_ANOTHER_RUN: Final = "to another run. A file should hold one run: split it to read the other one"


Content = TypeVar("Content")


class Order(Generic[Content]):
    """Collects the lines of one file, and puts them into the order in which they were written.

    Args:
        first: Number that the first line of the file should have; None if the first lines have no numbers.
        problems: List to which everything that is wrong is added.
    """

    def __init__(self, first: int | None, problems: list[str]) -> None:
        self.file: str | None = None
        self._first, self._problems = first, problems
        self._numbers: list[int] = []
        self._contents: list[Content] = []
        self._seen: set[int] = set()
        self._total: int | None = None
        self._damaged = self._tail = 0
        self._foreign: list[int] = []
        self._repeated: list[int] = []

    @property
    def next_number(self) -> int:
        """Number of the next line to write; damaged lines after the last good one count, too."""
        return max(self._seen, default=0) + 1 + self._tail

    def damaged(self, line: int, why: str) -> None:
        """Notes a damaged line, which is left out and may have had any number."""
        self.lost()
        self._problems.append(f"line {line} left out: {why}")

    def lost(self) -> None:
        """Notes that the number of a line is unknown."""
        self._damaged += 1
        self._tail += 1

    def expect(self, total: int | None) -> None:
        """Notes how many rows the file should have."""
        self._total = total

    def add(self, line: int, content: Content, place: Place | None = None) -> None:
        """Takes a line whose check sum is right, or one of the first lines, which have none."""
        if place is None or self.counts(line, place):
            self._numbers.append(0 if place is None else place.number)
            self._contents.append(content)

    def counts(self, line: int, place: Place) -> bool:
        """Whether a line with a correct check sum belongs to this file and comes for the first time."""
        self.file = self.file or place.file
        if place.file != self.file:
            self._foreign.append(line)
        elif place.number in self._seen:
            self._repeated.append(line)
        else:
            self._seen.add(place.number)
            self._tail = 0
            self._total = self._total if place.total is None else place.total
            return True
        return False

    def finish(self) -> list[Content]:
        """Notes what the numbers show to be wrong, and returns the contents of the lines in the order of writing."""
        contents, numbers = self._contents, self._numbers
        if any(one > other for one, other in pairwise(numbers)):
            self._problems.append("the lines are not in the order in which they were written; reading restores it")
            contents = [contents[at] for at in sorted(range(len(numbers)), key=numbers.__getitem__)]
        for lines, one, several in (
            (self._repeated, "it comes a second time", "they come a second time"),
            (self._foreign, f"it belongs {_ANOTHER_RUN}", f"they belong {_ANOTHER_RUN}"),
        ):
            if len(lines) > 1:
                self._problems.append(f"{len(lines)} lines left out, the first of them line {lines[0]}: {several}")
            elif lines:
                self._problems.append(f"line {lines[0]} left out: {one}")
        if self._seen or self._total is not None:
            first = min(self._seen) if self._first is None else self._first
            last = max(max(self._seen, default=0), 1 + (self._total or 0))
            missing = last - first + 1 - len(self._seen) - self._damaged
            if missing > 0:
                self._problems.append(f"{counted(missing, 'line is', 'lines are')} missing that the file once had")
        return contents


def told(problems: list[str]) -> str:
    """Returns the problems of a file as the text of one warning."""
    rest = len(problems) - NUM_SHOWN
    listed = "; ".join(problems[:NUM_SHOWN]) + (f"; and {rest} more, see `problems`" if rest > 0 else "")
    return f"{listed}. {EDITED}." if any("check sum" in problem for problem in problems) else listed
