"""The world of one seed: every choice goes through it, and leaves its trace.

`World.choose`, `chance`, `between` name what is decided, so that `--trace` reads as a history. `note` is called for
each byte on a wire, each call and each write: the hash over all notes is the same whenever the seed is run again.
"""

from __future__ import annotations

import random
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, TypeVar

from simulation.loop import START, VirtualLoop
from simulation.marks import mark

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")


class World:
    """One seed."""

    def __init__(self, seed: int, *, tracing: bool = False) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.tracing = tracing
        self.over = False
        self._hash = blake2b(digest_size=12)
        self.loop = VirtualLoop(self._delay, coarse=self.rng.random() < 0.25)
        self.job_delay: Callable[[Callable[..., Any]], tuple[float, float]] = lambda _: (0.0, 0.0)
        self.processes = 0
        self.stalls: list[str] = []  # what the product's own watchdog found
        # what the scenario fills in
        self.streams: dict[str, Any] = {}
        self.books: Any = None

    def _delay(self, func: Callable[..., Any]) -> tuple[float, float]:
        return self.job_delay(func)

    # -- choices -----------------------------------------------------------------------------------

    def choose(self, what: str, options: Sequence[T]) -> T:
        found = options[int(self.rng.random() * len(options))]
        if self.tracing:
            self.say(f"    {what} = {found!r}")
        return found

    def chance(self, what: str, probability: float) -> bool:
        found = self.rng.random() < probability
        if self.tracing and found and probability < 1:
            self.say(f"    {what}")
        return found

    def between(self, what: str, low: int, high: int) -> int:
        """Both included."""
        found = low + int(self.rng.random() * (high - low + 1))
        if self.tracing:
            self.say(f"    {what} = {found}")
        return found

    def seconds(self, low: float, high: float) -> float:
        return low + self.rng.random() * (high - low)

    # -- the trace -----------------------------------------------------------------------------------

    def note(self, what: str, data: bytes = b"") -> None:
        self._hash.update(b"%d|" % int((self.loop.now - START) * 1e6))
        self._hash.update(what.encode())
        if data:
            self._hash.update(data)
        if self.tracing:
            shown = f" {len(data)} bytes {bytes(data[:24]).hex()}" if data else ""
            self.say(what + shown)

    def say(self, text: str) -> None:
        if self.tracing:
            print(f"{self.loop.now - START:12.6f}  {text}", flush=True)

    def digest(self) -> str:
        return self._hash.hexdigest()

    # -- time ----------------------------------------------------------------------------------------

    def later(self, delay: float, callback: Callable[..., Any], *args: Any) -> None:
        """In the world, not in a process: a kill leaves it alone."""
        self.loop.outside(delay, callback, *args)

    mark = staticmethod(mark)
