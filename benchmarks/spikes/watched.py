"""Runs under the guard."""

from loops import Loop, Watcher


class Guarded(Watcher):
    def attach(self, loop: Loop) -> Watcher:
        raise NotImplementedError

    def found(self) -> list[tuple[int, str]]:
        raise NotImplementedError
