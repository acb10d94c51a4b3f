"""The broker: sessions, windows, redelivery, both versions, every QoS, and everything that brokers do wrong.

It speaks bytes, as on a wire, and keeps account of what each connection was sent: an acknowledgement is looked at
the moment it arrives. `Books.acknowledged` is asked then whether every record of that message is safe.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from typing import TYPE_CHECKING, Any

from simulation.loop import PROCESS, Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from simulation.world import World

PUBLISH_MOST = 64 * 1024  # bytes handed to a wire at once
# So many identifiers are taken that to look for a free one by counting takes minutes: those given back are used.
_CROWDED = 60_000
_CROWDED_LOWEST = 5_000
_AGAIN_MOST = 20_000  # identifiers sent again on a connection: they are not used anew on it, and some must be left
_PIECE_S = 1e-7  # what a piece takes at least: a long backlog is no loop that turns while no time passes


def varint(value: int) -> bytes:
    if value < 128:
        return bytes((value,))
    out = bytearray()
    while True:
        value, byte = value >> 7, value & 127
        out.append(byte | (128 if value else 0))
        if not value:
            return bytes(out)


def packet(first: int, body: bytes) -> bytes:
    return bytes((first,)) + varint(len(body)) + body


class Message:
    """Something that was published. `records` are what must be stored, or set aside one by one; of a frame that is
    none, `whole` is set: the payload itself is set aside."""

    __slots__ = (
        "acked", "given_up", "ill", "maker", "payload", "qos", "records", "retain", "sent", "serial", "topic", "whole",
    )  # fmt: skip

    def __init__(self, serial: int, topic: bytes, payload: bytes, qos: int, records: Sequence[bytes]) -> None:
        self.serial = serial
        self.topic = topic
        self.payload = payload
        self.qos = qos
        self.records = tuple(records)
        self.whole = False
        self.ill = False  # the packet is not what the standard allows
        self.retain = False
        self.sent = 0  # how often its PUBLISH left
        self.acked = False
        self.given_up = False  # the broker itself lost it, or was never asked to keep it


class Flight:
    __slots__ = ("message", "qos", "state")

    def __init__(self, message: Message, qos: int) -> None:
        self.message = message
        self.qos = qos
        self.state = "sent"  # sent, released


class Session:
    """What a broker keeps of one client."""

    def __init__(self, client: str) -> None:
        self.client = client
        self.filters: dict[str, int] = {}
        self.queue: deque[Message] = deque()
        self.flights: dict[int, Flight] = {}
        self.last_id = 0
        self.top_id = 0  # the highest that was ever used
        self.freed: deque[int] = deque(maxlen=65_535)  # identifiers, as they were given back
        self.link: Link | None = None
        self.known = False  # a CONNECT made it, and nothing ended it
        self.clean = False
        self.left_at = 0.0
        self.expiry = float("inf")

    def spare(self) -> Iterator[int]:
        while self.freed:
            yield self.freed.popleft()
        yield from range(self.top_id + 1, 65_536)

    def forget(self) -> None:
        for flight in self.flights.values():
            flight.message.given_up = True
        for message in self.queue:
            message.given_up = True
        self.flights.clear()
        self.queue.clear()
        self.filters.clear()
        self.known = False

    def save(self) -> tuple[Any, ...]:
        flights = {}
        for packet_id, flight in self.flights.items():
            copy = flights[packet_id] = Flight(flight.message, flight.qos)
            copy.state = flight.state
        return dict(self.filters), deque(self.queue), flights, self.last_id

    def restore(self, saved: tuple[Any, ...], excuse: Callable[[Message], None]) -> None:
        """As it was then. What was acknowledged meanwhile comes again, and what came meanwhile is gone."""
        filters, queue, flights, last_id = saved
        kept = {id(flight.message) for flight in flights.values()} | {id(message) for message in queue}
        for message in (*(flight.message for flight in self.flights.values()), *self.queue):
            if id(message) not in kept:
                message.given_up = True
        for message in queue:
            if message.sent:
                excuse(message)
        for flight in flights.values():
            excuse(flight.message)
        self.filters, self.queue, self.last_id = dict(filters), deque(queue), last_id
        self.flights = {}
        for packet_id, flight in flights.items():
            copy = self.flights[packet_id] = Flight(flight.message, flight.qos)
            copy.state = flight.state


class Wire:
    """Both directions of one connection, as the client's transport shows it."""

    def __init__(self, broker: Broker, receiver: Any, context: contextvars.Context) -> None:
        self.broker = broker
        self.world = broker.world
        self.loop = broker.world.loop
        self.receiver = receiver
        self.context = context
        self.process = context.get(PROCESS, 0)
        self.inbox = bytearray()  # on its way to the client
        self.out = bytearray()  # on its way to the broker
        self.reading = True
        self.lost = False
        self.closing = False
        self.ending = False
        self.frozen = False  # half open: nothing passes, nobody is told
        self.link: Link | None = None
        self._pumping = False
        self._sending = False

    # the client's side

    def write(self, data: bytes) -> None:
        if self.lost or self.closing or self.ending:
            return
        self.out += data
        self._send()

    def _send(self) -> None:
        if not self._sending and self.out and not self.lost:
            self._sending = True
            self.world.later(self.broker.lag(), self._sent)

    def _sent(self) -> None:
        self._sending = False
        if self.lost or self.frozen or not self.out:
            return
        if self.broker.deaf:
            self.world.mark("the broker does not read")
            return
        data = bytes(self.out)
        self.out.clear()
        self.world.note("to broker", data)
        if self.link is not None:
            self.link.received(data)
        if self.closing:
            self._end(None)

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True
        self._kick()

    def get_write_buffer_size(self) -> int:
        return len(self.out)

    def is_closing(self) -> bool:
        return self.closing or self.lost

    def close(self) -> None:
        if self.lost or self.closing:
            return
        self.closing = True
        if self.out and not self.frozen and not self.broker.deaf:
            self._send()
        elif not self.out:
            self.world.later(0, self._end, None)

    def abort(self) -> None:
        self.closing = True
        self.out.clear()
        self.world.later(0, self._end, None)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    # the broker's side

    def deliver(self, data: bytes) -> None:
        self.inbox += data
        self._kick()

    def _kick(self) -> None:
        if self._pumping or self.frozen or self.lost or not self.inbox or not self.reading:
            return
        if not self.loop.alive(self.process):
            return
        self._pumping = True
        self.loop.call_later(self.broker.lag() or _PIECE_S, self._pump, context=self.context)

    def _pump(self) -> None:
        self._pumping = False
        if self.lost or self.frozen or self.ending or not self.reading or self.world.over:
            return
        self.pass_on(self.broker.piece())
        self._kick()

    def pass_on(self, most: int) -> None:
        buffer = self.receiver.get_buffer(-1)
        count = min(len(buffer), len(self.inbox), most)
        if not count:
            return
        buffer[:count] = self.inbox[:count]
        self.world.note("to client", bytes(self.inbox[:count]))
        del buffer, self.inbox[:count]
        self.receiver.buffer_updated(count)

    def cut(self, error: Exception | None) -> None:
        """The connection breaks at any byte, in both directions."""
        if self.lost or self.ending:
            return
        broker = self.broker
        if self.out and not self.frozen and self.link is not None and not broker.deaf:
            count = self.world.between("bytes that still reach the broker", 0, len(self.out))
            data = bytes(self.out[:count])
            self.out.clear()
            if data:
                self.world.note("to broker, last", data)
                self.link.received(data)
        if self.lost:
            return
        if self.inbox and not self.frozen and self.reading and self.loop.alive(self.process):
            count = self.world.between("bytes that still reach the client", 0, len(self.inbox))
            del self.inbox[count:]
            if count:
                self.world.mark("cut inside of what was on its way")
                self.loop.call_soon(self._last_words, error, context=self.context)
                if self.link is not None:
                    self.link.gone()
                self.ending = True  # the client does not know yet
                return
        self._end(error)

    def _last_words(self, error: Exception | None) -> None:
        while self.inbox and self.reading and not self.lost:
            self.pass_on(1 << 20)
        self._end(error)

    def _end(self, error: Exception | None) -> None:
        if self.lost:
            return
        self.lost = True
        self.world.note("connection lost")
        if self.link is not None:
            self.link.gone()
        self.inbox.clear()
        self.out.clear()
        if self.loop.alive(self.process) and not self.world.over:
            self.loop.call_soon(self.receiver.connection_lost, error, context=self.context)


class Link:
    """What the broker knows of one connection."""

    def __init__(self, broker: Broker, wire: Wire) -> None:
        self.broker = broker
        self.world = broker.world
        self.wire = wire
        self.session: Session | None = None
        self.version = 4
        self.window = 65_535
        self.most_bytes = 1 << 28  # the client's Maximum Packet Size
        self.aliases = 0
        self.alias: dict[bytes, int] = {}
        self.buffer = bytearray()
        self.order: tuple[deque[tuple[int, Message]], deque[tuple[int, Message]]] = (deque(), deque())
        self.standing: dict[int, int] = {}  # id -> deliveries of it that stand in `order`
        self.again: dict[int, int] = {}  # id -> deliveries on this connection that asked for no answer of their own
        self.closed = False
        self.up = False
        self.heard_at = broker.world.loop.now

    def gone(self) -> None:
        if self.closed:
            return
        self.closed = True
        session = self.session
        if session is None or session.link is not self:
            return
        session.link = None
        session.left_at = self.world.loop.now
        if session.clean:
            session.forget()

    # -- what comes ------------------------------------------------------------------------------------

    def received(self, data: bytes) -> None:
        self.heard_at = self.world.loop.now
        self.buffer += data
        while len(self.buffer) >= 2 and not self.closed:
            length = shift = 0
            at = 1
            while True:
                if at >= len(self.buffer):
                    return
                byte = self.buffer[at]
                length |= (byte & 127) << shift
                shift += 7
                at += 1
                if byte < 128:
                    break
            if len(self.buffer) < at + length:
                return
            first, body = self.buffer[0], bytes(self.buffer[at : at + length])
            del self.buffer[: at + length]
            self.packet(first, body)

    def packet(self, first: int, body: bytes) -> None:
        kind = first >> 4
        if kind == 1:
            self.connect(body)
        elif self.session is None:
            raise Finding(f"packet {first:#x} before CONNECT was answered")
        elif kind == 4:
            self.acknowledged(0, int.from_bytes(body[:2], "big"))
        elif kind == 5:
            self.acknowledged(1, int.from_bytes(body[:2], "big"))
        elif kind == 7:
            self.completed(int.from_bytes(body[:2], "big"))
        elif kind == 8:
            self.subscribe(first, body)
        elif kind == 10:
            self.unsubscribe(body)
        elif kind == 12:
            if not self.broker.silent:
                self.send(b"\xd0\x00")
        elif kind == 14:
            self.world.note("DISCONNECT")
            if self.version == 5 and len(body) >= 1 and body[0]:
                self.world.mark("the client says why it leaves")
            self.wire.cut(None) if self.broker.piecemeal else self.wire._end(None)
        else:
            raise Finding(f"the client sent a packet of type {kind}")

    def send(self, data: bytes) -> None:
        if not self.closed:
            self.wire.deliver(data)

    def connect(self, body: bytes) -> None:
        broker, world = self.broker, self.world
        at = 2 + int.from_bytes(body[:2], "big")
        self.version, flags = body[at], body[at + 1]
        keep_alive = int.from_bytes(body[at + 2 : at + 4], "big")
        at += 4
        expiry = 0.0
        if self.version == 5:
            length, at = _read_varint(body, at)
            expiry = self._properties(body[at : at + length])
            at += length
        size = int.from_bytes(body[at : at + 2], "big")
        client = body[at + 2 : at + 2 + size].decode()
        clean = bool(flags & 2)
        world.note(f"CONNECT {client} version {self.version} clean {clean} keep-alive {keep_alive}")
        if self.version == 5 and not broker.five:
            world.mark("the broker does not know 5.0")
            if broker.shuts:
                self.wire._end(None)
            else:
                self.send(b"\x20\x02\x00\x01")
                world.later(0.01, self.wire.cut, None)
            return
        if broker.silent:
            world.mark("no CONNACK")
            return
        if broker.refusing:
            world.mark("CONNECT refused")
            self.send(b"\x20\x03\x00\x88\x00" if self.version == 5 else b"\x20\x02\x00\x03")
            world.later(0.01, self.wire.cut, None)
            return
        session = broker.sessions.get(client)
        if session is None:
            session = broker.sessions[client] = Session(client)
        if session.link is not None:
            other = session.link
            world.mark("a client takes its own session over")
            if other.version == 5:
                other.send(b"\xe0\x01\x8e")
            other.wire.cut(None)
            other.gone()
        if session.known and (clean or world.loop.now - session.left_at > session.expiry):
            session.forget()
        present = session.known
        if broker.amnesia and present:
            broker.amnesia = False
            world.mark("the broker lost the session")
            session.forget()
            present = False
        session.known = True
        session.clean = clean if self.version == 4 else expiry == 0
        session.expiry = float("inf") if self.version == 4 else expiry
        session.link = self
        self.session = session
        self.window = min(self.window, broker.window)
        if self.version == 5:
            properties = b"\x21" + broker.window.to_bytes(2, "big") if broker.window < 65_535 else b""
            if broker.keep_alive:
                properties += b"\x13" + broker.keep_alive.to_bytes(2, "big")
            self.send(packet(0x20, bytes((int(present), 0)) + varint(len(properties)) + properties))
        else:
            self.send(bytes((0x20, 2, int(present), 0)))
        self.up = True
        if present:
            world.mark("the session is taken up again")
            for packet_id, flight in list(session.flights.items()):
                if flight.state == "released":
                    self.send(b"\x62\x02" + packet_id.to_bytes(2, "big"))
                else:
                    self.publish(packet_id, flight, again=broker.says_dup)
        self.fill()

    def _properties(self, data: bytes) -> float:
        """Session Expiry, Receive Maximum, Maximum Packet Size, Topic Alias Maximum: all that we send."""
        at, expiry = 0, 0.0
        while at < len(data):
            name = data[at]
            if name == 0x11:
                expiry = float(int.from_bytes(data[at + 1 : at + 5], "big"))
                at += 5
            elif name == 0x21:
                self.window = int.from_bytes(data[at + 1 : at + 3], "big")
                at += 3
            elif name == 0x27:
                self.most_bytes = int.from_bytes(data[at + 1 : at + 5], "big")
                at += 5
            elif name == 0x22:
                self.aliases = int.from_bytes(data[at + 1 : at + 3], "big")
                at += 3
            elif name in (0x17, 0x19):
                at += 2
            else:
                raise Finding(f"CONNECT has property {name:#x}")
        return expiry

    def subscribe(self, first: int, body: bytes) -> None:
        broker, world, session = self.broker, self.world, self.session
        assert session is not None
        if first != 0x82:
            raise Finding("SUBSCRIBE with wrong flags")
        packet_id, at = body[:2], 2
        identifier = 0
        if self.version == 5:
            length, at = _read_varint(body, at)
            if length and body[at] == 0x0B:
                identifier, _ = _read_varint(body, at + 1)
            at += length
        codes = bytearray()
        while at < len(body):
            size = int.from_bytes(body[at : at + 2], "big")
            name, options = body[at + 2 : at + 2 + size].decode(), body[at + 2 + size]
            at += 3 + size
            if broker.denies and world.chance("a filter is refused", 0.5):
                world.mark("a filter is refused")
                codes.append(0x87 if self.version == 5 else 0x80)
                continue
            new = name not in session.filters
            session.filters[name] = options & 3
            handling = options >> 4 & 3 if self.version == 5 else 0  # Retain Handling: always, new, never
            if handling == 0 or (handling == 1 and new):
                for message in self.broker.retained:
                    if matches(name, message.topic.decode("utf-8", "replace")) and not name.startswith("$share/"):
                        world.mark("retained messages come with a subscription")
                        broker.excuse(message)
                        session.queue.append(message)
            broker.identifiers[session.client, name] = identifier
            codes.append(options & 3)
        world.note("SUBSCRIBE " + " ".join(session.filters))
        answer = packet(0x90, packet_id + (b"\x00" if self.version == 5 else b"") + bytes(codes))
        if broker.silent or broker.no_suback:
            world.mark("no SUBACK")
        elif broker.slow_suback:
            world.mark("SUBACK behind a flood")
            world.later(world.seconds(0.1, 8.0), self.send, answer)
        else:
            self.send(answer)
        self.fill()

    def unsubscribe(self, body: bytes) -> None:
        session = self.session
        assert session is not None
        packet_id, at = body[:2], 2
        if self.version == 5:
            length, at = _read_varint(body, at)
            at += length
        count = 0
        while at < len(body):
            size = int.from_bytes(body[at : at + 2], "big")
            session.filters.pop(body[at + 2 : at + 2 + size].decode(), None)
            at += 2 + size
            count += 1
        self.world.mark("UNSUBSCRIBE")
        self.send(packet(0xB0, packet_id + (b"\x00" + bytes(count) if self.version == 5 else b"")))

    # -- what goes ---------------------------------------------------------------------------------------

    def fill(self) -> None:
        """As many messages as the window allows."""
        session, broker = self.session, self.broker
        if session is None or not self.up or self.closed or session.link is not self:
            return
        room = self.window + (broker.overruns if self.version == 5 else 0)
        while session.queue and (len(session.flights) < room or session.queue[0].qos == 0):
            if len(session.flights) >= 65_535:
                break
            message = session.queue.popleft()
            qos = min(message.qos, broker.qos_of(session, message))
            if qos == 0:
                self.publish(0, Flight(message, 0), again=False)
                continue
            packet_id = self._free_id(session)
            if not packet_id:
                session.queue.appendleft(message)
                break
            flight = session.flights[packet_id] = Flight(message, qos)
            self.publish(packet_id, flight, again=False)

    def _free_id(self, session: Session) -> int:
        """0: there is none now. What was sent again on this connection is not used anew on it."""
        taken = len(session.flights) + len(self.again)
        lowest = self.broker.lowest_ids
        if taken > (_CROWDED_LOWEST if lowest else _CROWDED):
            tries = session.spare()
        elif lowest:
            tries = iter(range(1, 65_536))
        else:
            tries = (n % 65_535 + 1 for n in range(session.last_id, session.last_id + 65_535))
        for packet_id in tries:
            if packet_id not in session.flights and packet_id not in self.again:
                session.last_id = packet_id
                session.top_id = max(session.top_id, packet_id)
                return packet_id
        return 0

    def publish(self, packet_id: int, flight: Flight, *, again: bool) -> None:
        """One PUBLISH. The order in which they leave is the order in which they are to be answered."""
        message, world = flight.message, self.world
        if message.sent and not again:
            self.broker.excuse(message)
        message.sent += 1
        flags = flight.qos << 1 | (8 if again and flight.qos else 0) | int(message.retain)
        topic, properties = message.topic, b""
        if self.version == 5:
            if self.aliases and len(self.alias) < self.aliases and topic not in self.alias and self.broker.uses_aliases:
                self.alias[topic] = len(self.alias) + 1
                properties = b"\x23" + self.alias[topic].to_bytes(2, "big")
            elif topic in self.alias:
                world.mark("a topic alias")
                properties = b"\x23" + self.alias[topic].to_bytes(2, "big")
                topic = b""
            for identifier in self.broker.identifiers_of(self.session, message):
                properties += b"\x0b" + varint(identifier)
            if message.ill:
                properties += b"\x01\x07"  # Payload Format Indicator is 0 or 1
            properties = varint(len(properties)) + properties
        body = len(topic).to_bytes(2, "big") + topic
        if flight.qos:
            body += packet_id.to_bytes(2, "big")
            self.order[flight.qos - 1].append((packet_id, message))
            self.standing[packet_id] = self.standing.get(packet_id, 0) + 1
        data = packet(0x30 | flags, body + properties + message.payload)
        if world.tracing:
            world.say(f"PUBLISH id {packet_id} QoS {flight.qos} message {message.serial}{' again' if again else ''}")
        self.send(data)

    def redeliver(self) -> None:
        """Again on the same connection, as some brokers do when an answer does not come."""
        session = self.session
        if session is None or not self.up:
            return
        for packet_id, flight in list(session.flights.items()):
            if len(self.again) >= _AGAIN_MOST:
                break
            if flight.state == "sent" and self.standing.get(packet_id):
                self.world.mark("redelivered on the same connection")
                self.again[packet_id] = self.again.get(packet_id, 0) + 1
                message = flight.message
                self.publish(packet_id, flight, again=True)
                self.order[flight.qos - 1].pop()
                self.standing[packet_id] -= 1
                message.sent -= 1

    # -- acknowledgements -----------------------------------------------------------------------------------

    def acknowledged(self, which: int, packet_id: int) -> None:
        session, world = self.session, self.world
        assert session is not None
        order = self.order[which]
        name = ("PUBACK", "PUBREC")[which]
        if not order or order[0][0] != packet_id:
            if self.again.get(packet_id):
                # the answer crossed the repetition: it was taken for a message of its own
                self.again[packet_id] -= 1
                world.mark("an answer for a repetition")
                if which:
                    self.send(b"\x62\x02" + packet_id.to_bytes(2, "big"))
                return
            waits = [each for each, _ in list(order)[:5]]
            if self.standing.get(packet_id):
                raise Finding(f"{name} {packet_id} leaves before those of {waits} [MQTT-4.6.0-2]")
            raise Finding(f"{name} for id {packet_id}, which is not waited for; it is {waits}'s turn")
        _, message = order.popleft()
        self.standing[packet_id] -= 1
        if world.tracing:
            world.say(f"{name} id {packet_id} message {message.serial}")
        self.broker.books.acknowledged(message, name)
        flight = session.flights.get(packet_id)
        if flight is None or flight.message is not message:
            if which:
                self.send(b"\x62\x02" + packet_id.to_bytes(2, "big"))
            return
        if which == 0:
            del session.flights[packet_id]
            session.freed.append(packet_id)
            message.acked = True
            self.fill()
        else:
            flight.state = "released"
            message.acked = True
            if self.broker.loses_pubrel and world.chance("PUBREL is lost with the connection", 0.1):
                world.mark("PUBREL lost")
                self.wire.cut(None)
                return
            self.send(b"\x62\x02" + packet_id.to_bytes(2, "big"))

    def completed(self, packet_id: int) -> None:
        session = self.session
        assert session is not None
        flight = session.flights.get(packet_id)
        if flight is not None and flight.state == "released":
            del session.flights[packet_id]
            session.freed.append(packet_id)
            self.fill()


class Broker:
    """One broker; its moods are plain attributes that the scenario sets."""

    def __init__(self, world: World, books: Any) -> None:
        self.world = world
        self.books = books
        self.sessions: dict[str, Session] = {}
        self.links: list[Link] = []
        self.identifiers: dict[tuple[str, str], int] = {}
        self.window = 20
        self.five = True
        self.shuts = False  # closes without a word when 5.0 is spoken
        self.lags: Sequence[float] = (0.001,)
        self.pieces: Sequence[int] = (65_536,)
        self.lowest_ids = False
        self.says_dup = True
        self.uses_aliases = True
        self.uses_identifiers = True
        self.piecemeal = False
        self.keep_alive = 0  # what it imposes
        self.overruns = 0  # messages above Receive Maximum
        # moods
        self.down = False
        self.refusing = False
        self.silent = False
        self.deaf = False
        self.denies = False
        self.amnesia = False
        self.slow_suback = self.no_suback = False
        self.loses_pubrel = False
        self.retained: list[Message] = []

    def lag(self) -> float:
        lags = self.lags
        return lags[int(self.world.rng.random() * len(lags))]

    def piece(self) -> int:
        pieces = self.pieces
        return pieces[int(self.world.rng.random() * len(pieces))]

    async def open(self, broker: Any, receiver: Any, *rest: Any, **more: Any) -> None:
        """open_wire() of the product. What it is given beside broker and receiver is its own affair."""
        await asyncio.sleep(self.lag() + 0.001)
        if self.down:
            self.world.mark("connection refused")
            raise ConnectionRefusedError(111, "Connection refused")
        wire = Wire(self, receiver, contextvars.copy_context())
        link = wire.link = Link(self, wire)
        self.links = [each for each in self.links if not each.closed]
        self.links.append(link)
        self.world.note("connection made")
        receiver.connection_made(wire)

    def publish(self, message: Message) -> None:
        """To every session that wants it; who is away keeps it when the session is kept."""
        message.given_up = True
        for session in self.sessions.values():
            if session.known and self.matching(session, message):
                if session.link is None and message.qos == 0:
                    continue
                session.queue.append(message)
                message.given_up = self.qos_of(session, message) == 0 or message.qos == 0

    def fill(self) -> None:
        for session in self.sessions.values():
            if session.link is not None:
                session.link.fill()

    @staticmethod
    def matching(session: Session, message: Message) -> list[str]:
        topic = message.topic.decode("utf-8", "replace")
        return [name for name in session.filters if matches(name, topic)]

    def qos_of(self, session: Session, message: Message) -> int:
        return max((session.filters[name] for name in self.matching(session, message)), default=message.qos)

    def identifiers_of(self, session: Session | None, message: Message) -> list[int]:
        if not self.uses_identifiers or session is None:
            return []
        found = (self.identifiers.get((session.client, name), 0) for name in self.matching(session, message))
        return [identifier for identifier in found if identifier]

    def excuse(self, message: Message) -> None:
        self.books.excuse(message)

    def cut(self, *, error: bool = False) -> None:
        for link in list(self.links):
            if not link.closed:
                link.wire.cut(ConnectionResetError(104, "Connection reset by peer") if error else None)

    def heal(self) -> None:
        self.down = self.refusing = self.silent = self.denies = self.amnesia = False
        self.slow_suback = self.no_suback = self.loses_pubrel = False
        was_deaf, self.deaf = self.deaf, False
        for link in list(self.links):
            if link.closed:
                continue
            if link.wire.frozen:
                link.wire.frozen = False
                link.wire.cut(TimeoutError(110, "Connection timed out"))
            elif was_deaf:
                link.wire._send()

    def busy(self) -> int:
        """Messages that were not acknowledged yet, and connections with something on its way to the client."""
        waiting = sum(len(session.queue) + len(session.flights) for session in self.sessions.values() if session.known)
        return waiting + sum(bool(link.wire.inbox) for link in self.links if not link.closed)


def matches(name: str, topic: str) -> bool:
    if name.startswith("$share/"):
        name = name.split("/", 2)[2]
    wanted, have = name.split("/"), topic.split("/")
    if topic.startswith("$") and wanted[0] in ("#", "+"):
        return False
    for at, level in enumerate(wanted):
        if level == "#":
            return True
        if at >= len(have) or level not in ("+", have[at]):
            return False
    return len(wanted) == len(have)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        shift += 7
        at += 1
        if byte < 128:
            return value, at
