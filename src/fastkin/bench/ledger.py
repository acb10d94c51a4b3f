"""The ledger of a run: every record that was published is looked up among those that were stored, by its bytes.

Of each stored record 64 bits are kept, its hash: a plain run of two million records holds 16 MB. What was published is
made once more at the end, from the plan, and hashed too.
"""

from __future__ import annotations

import base64
import binascii
from array import array
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from fastkin._codec import deaggregate
from fastkin.bench.meter import percentiles

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fastkin.bench.forms import Forms

Expand = Literal["none", "kpl", "lines"]


@dataclass(slots=True)
class Balance:
    """Where the records are. `lost`: published and not stored; `foreign`: stored and never published."""

    published: int = 0
    stored: int = 0  # with duplicates
    duplicates: int = 0
    lost: int = 0
    foreign: int = 0
    latency_ms: dict[str, float] = field(default_factory=dict)  # publish to stored

    @property
    def good(self) -> bool:
        return self.lost == 0 and self.foreign == 0

    def told(self) -> dict[str, Any]:
        return asdict(self)


class Ledger:
    """What was stored, call by call."""

    def __init__(
        self,
        forms: Forms,
        *,
        encoded: bool = False,
        expand: Expand = "none",
        canonical: Callable[[bytes], bytes] | None = None,
    ) -> None:
        """`encoded`: take() is given base64 as it stands in a call. `expand`: what an aggregate is made of is taken.

        `canonical`: records are compared as this makes them, for peers that write the same value in other words.
        """
        self._forms = forms
        self._decode = encoded and (expand != "none" or canonical is not None)
        self.encoded: bool = encoded and not self._decode
        self._expand = expand
        self._canonical = canonical
        self._hashes = array("q")
        self._ends = array("Q")  # of each call: how many there were when it was stored
        self._times = array("d")  # and when that was

    @property
    def stored(self) -> int:
        """Records so far, those of aggregates counted one by one."""
        return len(self._hashes)

    def take(self, datas: Sequence[bytes], at: float) -> Sequence[bytes]:
        """The records of a call were stored at a time; gives them one by one (base64 when `encoded`)."""
        if self._decode:
            datas = [binascii.a2b_base64(data) for data in datas]
        if self._expand == "kpl":
            datas = [data for each in datas for _, data in deaggregate(each)]
        elif self._expand == "lines":
            datas = [line for each in datas for line in each.split(b"\n") if line]
        made = datas if self._canonical is None else list(map(self._canonical, datas))
        self._hashes.extend(map(hash, made))
        self._ends.append(len(self._hashes))
        self._times.append(at)
        return datas

    def balance(self, sent: Sequence[tuple[int, int]], published: memoryview[float] | None = None) -> Balance:
        """`sent`: runs of messages, each by its first number and how many.

        `published`: their times, for latencies; what has none was never published, and cannot be lost.
        """
        # which call stored a record first: the last one wins in a dict, so it is filled from the end
        first: dict[int, int] = {}
        call = len(self._ends) - 1
        for at in range(len(self._hashes) - 1, -1, -1):
            while call > 0 and at < self._ends[call - 1]:
                call -= 1
            first[self._hashes[at]] = call
        there = len(first)
        made = Balance(stored=len(self._hashes))
        waits: list[float] = []
        found = 0
        for begin, count in sent:
            for at, record in enumerate(self._forms.all_records(begin, count)):
                when = 0.0 if published is None else published[begin + at // self._forms.samples]
                stored_by = first.get(hash(self._as_taken(record)))
                if stored_by is None and published is not None and not when:
                    continue
                made.published += 1
                if stored_by is None:
                    made.lost += 1
                    continue
                found += 1
                if when:
                    waits.append((self._times[stored_by] - when) * 1000)
        made.foreign = there - found
        made.duplicates = made.stored - there
        made.latency_ms = percentiles(waits)
        return made

    def _as_taken(self, record: bytes) -> bytes:
        if self._canonical is not None:
            return self._canonical(record)
        return base64.b64encode(record) if self.encoded else record
