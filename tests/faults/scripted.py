"""A broker that does what real ones may and mosquitto does not: odd orders, repeats, packet ids used again."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import TYPE_CHECKING, Literal

from support.fake_broker import Peer
from support.mqtt_wire import publish

if TYPE_CHECKING:
    from collections.abc import Sequence

Message = tuple[str, bytes, list[int]]
_SESSION = {4: b"\x20\x02\x01\x00", 5: b"\x20\x03\x01\x00\x00"}
_NO_SESSION = {4: b"\x20\x02\x00\x00", 5: b"\x20\x03\x00\x00\x00"}


class _Session:
    """What the broker knows of one client id."""

    def __init__(self) -> None:
        self.waiting: list[Message] = []
        self.unacked: dict[int, Message] = {}
        self.connections = 0
        self.last_id = 0


class ScriptedBroker:
    """Plays `messages` to whoever subscribes to them, QoS 1.

    order       of what is unacknowledged, on a new connection
    repeat      each nth message is sent twice in a row: same packet id, the second marked as a duplicate; both are
                answered, and so packet ids are not used again: a second answer could be taken for another message's
    cut_after   connections end after so many messages, the first `cuts` of each client
    forget      no session is kept: packet ids begin at 1 again, what was unacknowledged comes as if it were new
    window      messages in flight; packet ids go round in as many
    pace_s      between two messages: so that what happens at its time finds some of them on the way
    """

    def __init__(
        self,
        messages: Sequence[Message],
        *,
        order: Literal["same", "reversed", "shuffled"] = "same",
        repeat: int = 0,
        cut_after: int = 0,
        cuts: int = 0,
        forget: bool = False,
        window: int = 100,
        pace_s: float = 0.0,
        seed: int = 1,
    ) -> None:
        self.numbers = {number for _, _, which in messages for number in which}
        self._messages = list(messages)
        self._order = order
        self._repeat = repeat
        self._cut_after = cut_after
        self._cuts = cuts
        self._forget = forget
        self._window = window
        self._pace_s = pace_s
        self._random = random.Random(seed)
        self._sessions: dict[str, _Session] = {}
        self.repeats = 0

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._client, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def close(self) -> None:
        self._server.close()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await self._serve(Peer(reader, writer, 0))
        writer.close()

    async def _serve(self, peer: Peer) -> None:
        first, body = await peer.packet()
        assert first == 0x10
        peer.version = body[6]
        at = 10
        if peer.version == 5:
            at += 1 + body[10]
        client_id = body[at + 2 : at + 2 + int.from_bytes(body[at : at + 2], "big")].decode()
        session = self._sessions.get(client_id)
        known = session is not None and not self._forget
        peer.send((_SESSION if known else _NO_SESSION)[peer.version])
        filters = await peer.subscribe()
        if session is None:
            session = self._sessions[client_id] = _Session()
            session.waiting = [m for m in self._messages if any(m[0].startswith(f.rstrip("#")) for f in filters)]
        session.connections += 1
        await self._play(peer, session)

    async def _play(self, peer: Peer, session: _Session) -> None:
        again = list(session.unacked.items())
        if self._forget:
            session.waiting[:0] = [message for _, message in again]
            session.unacked.clear()
            again = []
        elif self._order == "reversed":
            again.reverse()
        elif self._order == "shuffled":
            self._random.shuffle(again)
        for packet_id, message in again:
            self._send(peer, packet_id, message, again=True)
        most = self._cut_after if session.connections <= self._cuts else 1 << 60
        sent = 0
        while True:
            while session.waiting and len(session.unacked) < self._window:
                if self._repeat:
                    packet_id = session.last_id = session.last_id + 1
                else:
                    packet_id = next(i for i in range(1, self._window + 1) if i not in session.unacked)
                message = session.waiting.pop(0)
                session.unacked[packet_id] = message
                self._send(peer, packet_id, message)
                sent += 1
                if self._repeat and sent % self._repeat == 0:
                    self.repeats += 1
                    self._send(peer, packet_id, message, again=True)
                if sent >= most:
                    await peer.writer.drain()
                    await asyncio.sleep(self._random.random() * 0.05)
                    peer.writer.transport.abort()
                    return
                if self._pace_s:
                    await asyncio.sleep(self._pace_s)
            await peer.writer.drain()
            first, body = await peer.packet()
            if first >> 4 == 4:
                session.unacked.pop(int.from_bytes(body[:2], "big"), None)
            elif first >> 4 == 12:
                peer.send(b"\xd0\x00")
            elif first >> 4 == 14:
                return

    @staticmethod
    def _send(peer: Peer, packet_id: int, message: Message, *, again: bool = False) -> None:
        topic, payload, _ = message
        peer.send(publish(topic, payload, qos=1, packet_id=packet_id, version=peer.version, flags=0x08 if again else 0))
