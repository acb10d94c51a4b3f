"""What a child must leave alone after a fork: it has copies of its parent's sockets, and none of its threads."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")


class OfThisProcess(Generic[T]):
    """What was started in this process; it keeps nothing alive."""

    def __init__(self, leave_behind: Callable[[T], None]) -> None:
        """`leave_behind(one)` runs in a child: the one is of no use there, and is to say so to who asks it."""
        self._living: weakref.WeakSet[T] = weakref.WeakSet()
        self._leave_behind = leave_behind
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    def add(self, one: T) -> None:
        self._living.add(one)

    def __iter__(self) -> Iterator[T]:
        return iter(list(self._living))

    def _forked(self) -> None:
        for one in self:
            self._leave_behind(one)
        self._living.clear()
