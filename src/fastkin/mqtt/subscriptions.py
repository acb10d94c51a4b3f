"""What a connection asks the broker to subscribe, within what the broker's CONNACK allows, and what came of it.

    packets = subscriptions.subscribe([("plant/#", 1)])   # write them
    packets = subscriptions.suback(event)                 # some filters may be asked for again
    if not subscriptions.waiting: granted, refused = subscriptions.outcome()

Pure: no clock, no socket.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from fastkin.errors import ProtocolError
from fastkin.mqtt._core import reason_text
from fastkin.mqtt.reasons import cure

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from fastkin.mqtt._core import Session, Suback, Unsuback

T = TypeVar("T")

FILTERS_PER_PACKET = 8  # AWS IoT Core takes no more in one SUBSCRIBE
SHARED = "$share/"

PACKET_IDS = 65_535  # how many there are
_ID_IN_USE = 0x91
_ID_TRIES = 8
_NO_SHARED = 0x9E
_NO_IDENTIFIERS = 0xA1
_NO_WILDCARDS = 0xA2


class Refusal(NamedTuple):
    """A filter that is not subscribed."""

    topic_filter: str
    qos: int
    why: str
    cure: str
    final: bool  # on this connection: the broker must end it if we asked


class Subscriptions:
    """Of one connection. `missing` are the filters that are not subscribed, and why."""

    def __init__(
        self,
        session: Session,
        retain_handling: int,
        unavailable: Collection[int] = (),
        identifiers: Mapping[str, int] | None = None,
    ) -> None:
        """`unavailable`: reason codes by which the broker ended an earlier connection. `identifiers`: the Subscription
        Identifiers of filters, for a 5.0 broker."""
        self._session = session
        self._retain_handling = retain_handling
        self._shared = _NO_SHARED not in unavailable
        self._wildcards = _NO_WILDCARDS not in unavailable
        self._identifiers = {} if _NO_IDENTIFIERS in unavailable or identifiers is None else dict(identifiers)
        self._numbered: set[int] = set()  # SUBSCRIBEs with one
        self._most_bytes = 1 << 28
        self._per_packet = FILTERS_PER_PACKET
        # From the top: some brokers keep one set of identifiers for both directions, and theirs begin at 1.
        self._last_id = 0
        self._asked: dict[int, list[tuple[str, int]]] = {}  # SUBSCRIBE without its SUBACK
        self._dropping: dict[int, list[str]] = {}  # UNSUBSCRIBE without its UNSUBACK
        self._answered: set[int] = set()
        self._tries: dict[str, int] = {}
        self._granted: list[tuple[str, int]] = []
        self._refused: list[Refusal] = []
        self._kept: list[tuple[str, str]] = []
        self.missing: dict[str, Refusal] = {}

    def learn(self, properties: Mapping[str, object]) -> None:
        """What the broker's CONNACK says about itself; what it does not say is available."""
        most = properties.get("maximum_packet_size")
        if isinstance(most, int) and most > 0:
            self._most_bytes = most
        if not properties.get("shared_subscription_available", True):
            self._shared = False
        if not properties.get("wildcard_subscription_available", True):
            self._wildcards = False
        if not properties.get("subscription_identifiers_available", True):
            self._identifiers.clear()

    @property
    def waiting(self) -> bool:
        """A SUBACK is to come."""
        return bool(self._asked)

    @property
    def letting_go(self) -> bool:
        """An UNSUBACK is to come."""
        return bool(self._dropping)

    def subscribe(self, filters: Sequence[tuple[str, int]]) -> bytes:
        """Packets that ask for them; empty when the broker must not be asked for any."""
        askable = []
        for topic_filter, qos in filters:
            refusal = self._impossible(topic_filter, qos)
            if refusal is None:
                askable.append((topic_filter, qos))
            else:
                self._refuse(refusal)
        return self._ask(askable)

    def unsubscribe(self, filters: Sequence[str]) -> bytes:
        out = []
        encode = self._session.unsubscribe
        filters = [f for f in filters if len(encode(1, [f])) <= self._most_bytes]  # the broker cannot hear of others
        for part in self._parts(encode, filters):
            packet_id = self._take_id()
            self._dropping[packet_id] = part
            out.append(encode(packet_id, part))
        return b"".join(out)

    def suback(self, suback: Suback) -> bytes:
        """Takes an answer; returns packets that ask again where that helps. ProtocolError: it answers nothing."""
        packet_id, codes = suback.packet_id, suback.codes
        asked = self._asked.pop(packet_id, None)
        if asked is None:
            if packet_id in self._answered:
                return b""  # said twice
            raise ProtocolError("a SUBACK that answers no SUBSCRIBE of ours", 0, 0x82)
        self._answered.add(packet_id)
        # It said that it can, and cannot. Without identifiers several formats are told by topic alone, which is
        # enough.
        if _NO_IDENTIFIERS in codes and packet_id in self._numbered:
            self._identifiers.clear()
            return self._ask(asked)
        if len(asked) != len(codes):
            # One filter was asked for and the count is wrong all the same: to ask again would go on for ever.
            if len(asked) == 1:
                raise ProtocolError(f"a SUBACK with {len(codes)} codes for one filter", 0, 0x82)
            # What these codes mean cannot be guessed: one filter a packet leaves nothing to guess.
            self._per_packet = 1  # some small brokers answer once per packet, whatever it holds
            return self._ask(asked)
        again = []
        for (topic_filter, qos), code in zip(asked, codes, strict=True):
            if code < 0x80:
                self._granted.append((topic_filter, code))
                self.missing.pop(topic_filter, None)
            elif code == _ID_IN_USE and self._tries.get(topic_filter, 0) < _ID_TRIES:
                self._tries[topic_filter] = self._tries.get(topic_filter, 0) + 1
                again.append((topic_filter, qos))
            else:
                self._refuse(Refusal(topic_filter, qos, reason_text(code), cure(code), final=False))
        if again:
            self._last_id = random.randrange(PACKET_IDS)  # noqa: S311 - away from the broker's own, which come in a row
        return self._ask(again)

    def unsuback(self, unsuback: Unsuback) -> bytes:
        """The same for UNSUBSCRIBE. An answer to nothing is let go: nothing waits for one."""
        asked = self._dropping.pop(unsuback.packet_id, [])
        again = []
        for topic_filter, code in zip(asked, unsuback.codes, strict=False):
            if code == _ID_IN_USE and self._tries.get(topic_filter, 0) < _ID_TRIES:
                self._tries[topic_filter] = self._tries.get(topic_filter, 0) + 1
                again.append(topic_filter)
            elif code >= 0x80:
                self._kept.append((topic_filter, reason_text(code)))
        if again:
            self._last_id = random.randrange(PACKET_IDS)  # noqa: S311
        return self.unsubscribe(again)

    def kept(self) -> list[tuple[str, str]]:
        """Filters that the broker did not unsubscribe since the last time, and why."""
        kept, self._kept = self._kept, []
        return kept

    def outcome(self) -> tuple[list[tuple[str, int]], list[Refusal]]:
        """Granted and refused since the last time."""
        granted, self._granted = self._granted, []
        refused, self._refused = self._refused, []
        self._tries.clear()
        return granted, refused

    def _ask(self, filters: Sequence[tuple[str, int]]) -> bytes:
        out = []
        # an identifier holds for all filters of a packet
        numbers = dict.fromkeys(self._identifiers.get(topic_filter, 0) for topic_filter, _ in filters)
        for number in numbers:
            group = [one for one in filters if self._identifiers.get(one[0], 0) == number]
            for part in self._parts(self._encode, group):
                packet_id = self._take_id()
                self._asked[packet_id] = part
                if number:
                    self._numbered.add(packet_id)
                out.append(self._encode(packet_id, part))
        return b"".join(out)

    def _encode(self, packet_id: int, filters: Sequence[tuple[str, int]]) -> bytes:
        return self._session.subscribe(
            packet_id, filters, self._retain_handling, self._identifiers.get(filters[0][0], 0)
        )

    def _parts(self, encode: Callable[[int, Sequence[T]], bytes], entries: Sequence[T]) -> Iterator[list[T]]:
        """What goes into one packet each: few filters, and no more bytes than the broker takes."""
        part: list[T] = []
        for entry in entries:
            if part and (len(part) >= self._per_packet or len(encode(1, [*part, entry])) > self._most_bytes):
                yield part
                part = []
            part.append(entry)
        if part:
            yield part

    def _impossible(self, topic_filter: str, qos: int) -> Refusal | None:
        code = 0
        if not self._shared and topic_filter.startswith(SHARED):
            code = _NO_SHARED
        elif not self._wildcards and ("+" in topic_filter or "#" in topic_filter):
            code = _NO_WILDCARDS
        if code:
            return Refusal(topic_filter, qos, reason_text(code), cure(code), final=True)
        size = len(self._encode(1, [(topic_filter, qos)]))
        if size <= self._most_bytes:
            return None
        return Refusal(
            topic_filter, qos,
            f"to ask for it takes a packet of {size} bytes, the broker takes {self._most_bytes} (Maximum Packet Size)",
            "shorten the filter in topics, or raise the broker's limit", final=True,
        )  # fmt: skip

    def _refuse(self, refusal: Refusal) -> None:
        self._refused.append(refusal)
        self.missing[refusal.topic_filter] = refusal

    def _take_id(self) -> int:
        while True:
            self._last_id = self._last_id - 1 if self._last_id > 1 else PACKET_IDS
            # An identifier that waits for its answer must not be given to another question: one SUBACK would answer
            # both.
            if self._last_id not in self._asked and self._last_id not in self._dropping:
                self._answered.discard(self._last_id)
                self._numbered.discard(self._last_id)
                return self._last_id
