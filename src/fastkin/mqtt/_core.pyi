# Per-packet work, compiled, sans-io: MQTT 3.1.1 and 5.0 for a subscriber, and the little a
# publisher needs. The docstrings are in the compiled module.

from collections.abc import Callable, Sequence
from typing import Self, final

from typing_extensions import Buffer

from fastkin._codec import Settler, Sink

EVENTS: int  # bits of what feed() and resume() return: control packets wait in take_events()
STALLED: int  # there is no room, in a sink or for unacknowledged messages: stop reading, resume() later
OUTPUT: int  # take_output() has something to write
APART: int  # a piece of what is to be set aside waits in take_piece(): stop reading

# Which PUBLISH still waits for which records; gives out acknowledgements in PUBLISH order only. One
# per subscription session, kept over reconnects: after reset() at each new connection nothing of before
# is acknowledged until the broker sends it again, in a session that it kept; then it is known by its
# packet identifier, its DUP flag and a digest of topic and payload, and not offered again.
@final
class AckTracker(Settler):
    # QoS 1 and 2 messages received on this connection, not acknowledged
    @property
    def unacked(self) -> int: ...
    # of these, how many take() would acknowledge now
    @property
    def ready(self) -> int: ...
    # messages remembered: unacknowledged, of a former connection, or waiting for their PUBREL
    @property
    def known(self) -> int: ...
    # records of messages with the DUP flag that were not known here, ever
    @property
    def repeated(self) -> int: ...
    # messages of this connection that can never be acknowledged, because a record of theirs ended
    # as FAILED; nothing behind them is acknowledged either: reconnect
    @property
    def failed(self) -> int: ...
    # the clock value (see Session.now) of the oldest unacknowledged one, 0.0 when there is none
    def oldest(self) -> float: ...
    # PUBACK / PUBREC of the completed prefix, one run of packets
    def take(self) -> bytes: ...
    def reset(self, keep_session: bool) -> None: ...
    # settles from Python: what a CallbackSink's messages need
    def settled(self, token: int, count: int = 1, outcome: int = 0) -> None: ...

# Which sink takes a message: the only one there is, whatever the topic; of several the one that the
# Subscription Identifier says, else the first whose filter matches, else `otherwise`. Remembers topics
# it has matched, within a bound.
@final
class Router:
    def __new__(cls, max_topics: int = 8192) -> Self: ...
    # the broker says `identifier` (not 0) with messages for this sink
    def add(self, topic_filter: str, sink: Sink, identifier: int = 0) -> None: ...  # LibraryError
    # what matches it and no other filter is discarded, in a session that the broker kept
    def remove(self, topic_filter: str) -> None: ...  # LibraryError
    # takes what nothing tells; None: the first sink does
    @property
    def otherwise(self) -> Sink | None: ...
    @otherwise.setter
    def otherwise(self, sink: Sink | None) -> None: ...
    @property
    def former(self) -> list[str]: ...  # what was removed
    # as Session asks: the sink, or none
    def match(self, topic: str, identifiers: Sequence[int] = (), resumed: bool = False) -> list[Sink]: ...
    # messages that nobody took: acknowledged and counted; and the topic of the last one, cut
    @property
    def unrouted(self) -> int: ...
    @property
    def stray(self) -> bytes: ...
    # topics remembered, and the bytes that takes
    @property
    def cached(self) -> int: ...
    @property
    def cached_bytes(self) -> int: ...

# A sink in Python: callback(topic, payload, token) says how many settlements will come (see
# AckTracker.settled), or -1 for no room. The callback must not feed the session that calls it.
@final
class CallbackSink(Sink):
    def __new__(cls, callback: Callable[[bytes, bytes, int], int]) -> Self: ...

# Counts and lets go: measures an intake alone. With an AckTracker, messages wait until release().
@final
class CountSink(Sink):
    def __new__(cls, acks: AckTracker | None = None) -> Self: ...
    @property
    def messages(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def release(self) -> None: ...

# Which ill-formed packets ended a connection already: one per subscription, given to each Session
@final
class Unfit:
    def __new__(cls) -> Self: ...

# A message that can never be a record: too large (`reason` is None) or ill-formed
@final
class Apart:
    @property
    def topic(self) -> bytes | None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def reason(self) -> str | None: ...
    @property
    def offset(self) -> int: ...
    @property
    def token(self) -> int: ...
    @property
    def again(self) -> bool: ...

# One connection's codec. Give it bytes through get_buffer()/feed(), write what take_output()
# returns.
@final
class Session:
    now: float  # the caller sets it before feed(): stamped on messages
    def __new__(
        cls,
        *,
        version: int,
        acks: AckTracker,
        router: Router,
        receive_maximum: int = 65535,
        max_packet_bytes: int = 8388608,
        topic_alias_maximum: int = 0,
        unfit: Unfit | None = None,
    ) -> Self: ...
    @property
    def version(self) -> int: ...
    # PUBLISH packets taken so far
    @property
    def messages(self) -> int: ...
    # messages that came again while they were known here, and were not offered again
    @property
    def duplicates(self) -> int: ...
    # messages above our Receive Maximum: tolerated
    @property
    def overruns(self) -> int: ...
    @property
    def stalled(self) -> bool: ...
    # stalled because as many messages are unacknowledged as there may be
    @property
    def crowded(self) -> bool: ...
    # of the receive buffer now
    @property
    def buffer_bytes(self) -> int: ...
    def get_buffer(self, sizehint: int) -> memoryview: ...
    def feed(self, nbytes: int) -> int: ...  # ProtocolError
    # copy in, then feed: WebSocket frames, tests
    def feed_data(self, data: Buffer) -> int: ...  # ProtocolError
    def resume(self) -> int: ...  # ProtocolError
    # the message that is being set aside; how many of its bytes are not handed out
    @property
    def apart(self) -> Apart | None: ...
    @property
    def apart_left(self) -> int: ...
    def take_piece(self) -> bytes: ...
    def finish_apart(self) -> None: ...
    def take_events(self) -> list[object]: ...
    def take_output(self) -> bytes: ...  # acks that are ready, PUBCOMPs
    def connect(
        self,
        *,
        client_id: str,
        user: str | None = None,
        password: bytes | None = None,
        clean_start: bool = True,
        keep_alive: int = 60,
        session_expiry: int = 0,
    ) -> bytes: ...
    def subscribe(
        self, packet_id: int, filters: Sequence[tuple[str, int]], retain_handling: int = 0, identifier: int = 0
    ) -> bytes: ...
    def unsubscribe(self, packet_id: int, filters: Sequence[str]) -> bytes: ...
    def pingreq(self) -> bytes: ...
    def disconnect(self, code: int = 0) -> bytes: ...

def publish(
    topic: str,
    payload: Buffer,
    *,
    qos: int = 0,
    packet_id: int = 0,
    version: int = 4,
    retain: bool = False,
    dup: bool = False,
) -> bytes: ...
def valid_filter(topic_filter: str) -> str | None: ...  # None when valid, else what is wrong
def matches(topic_filter: str, topic: str) -> bool: ...
def reason_text(code: int) -> str: ...

@final
class Connack:
    @property
    def session_present(self) -> bool: ...
    @property
    def code(self) -> int: ...
    @property
    def properties(self) -> dict[str, object]: ...

@final
class Suback:
    @property
    def packet_id(self) -> int: ...
    @property
    def codes(self) -> list[int]: ...

@final
class Unsuback:
    @property
    def packet_id(self) -> int: ...
    @property
    def codes(self) -> list[int]: ...

# Acknowledgements that came in a row
@final
class Puback:
    @property
    def packet_ids(self) -> list[int]: ...
    # of these, the ones with a reason code of 0x80 and above
    @property
    def refused(self) -> dict[int, int]: ...

@final
class Pingresp: ...

@final
class Disconnect:
    @property
    def code(self) -> int: ...
    @property
    def properties(self) -> dict[str, object]: ...
