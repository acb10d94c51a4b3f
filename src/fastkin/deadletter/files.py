"""Dead letters as lines in files of the pipeline's own directory, where its records go to files."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fastkin.deadletter.file import line_of
from fastkin.deadletter.insist import insist
from fastkin.errors import KinesisError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from typing_extensions import Buffer

    from fastkin.deadletter.file import Spill
    from fastkin.files.files import Stream

_LOG = logging.getLogger("fastkin.pipeline")


class LetterFiles:
    """Where dead letters go: files with a prefix of their own."""

    deleted = 0

    def __init__(self, name: str, stream: Stream) -> None:
        """`name` of the pipeline. The files are its client's, which opens and closes them."""
        self._name = name
        self._stream = stream

    @property
    def place(self) -> str:
        return f"files {self._stream.place}"

    def spill(self) -> Spill | None:
        return None  # a line is written as a whole, so a large message does not pass through memory in pieces

    async def collect(self, spill: Spill, piece: bytes) -> None:
        raise NotImplementedError("there is no spill")

    async def open(self) -> None:
        """The pipeline's own records say what is wrong with the directory."""

    async def store(self, letters: Sequence[dict[str, Any]]) -> None:
        """Return when all are synced, however long that takes."""
        lines = b"".join(line_of(letter) for letter in letters)

        async def attempt() -> str | None:
            try:
                await self._stream.put(lines, one)
            except KinesisError as error:
                return str(error)
            return None

        def say(why: str, again_s: float) -> None:
            _LOG.error(
                "pipeline=%s stage=settle %s; %d dead letters and all that comes after them wait unacknowledged, trying"
                " again every %.0f s", self._name, why, len(letters), again_s,
            )  # fmt: skip

        await insist(attempt, say)

    async def close(self) -> None:
        pass


def one(data: Buffer) -> tuple[int, bytes]:
    """What is written as it stands."""
    return 1, bytes(data)
