"""The status port: /metrics for Prometheus, /healthz and /readyz for whoever starts and stops the process.

    GET /metrics   Prometheus text; OpenMetrics to those who accept it
    GET /healthz   200 while the process can do its work, 503 when a pipeline failed for good
    GET /readyz    200 when every pipeline is connected, subscribed and has reached its stream, else 503 and why

Strangers may reach the port: one request a connection, and its size, time and number are bounded. What it says
holds no secret of the settings, but it does tell names of pipelines, shards and error codes.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder

from fastkin.errors import ConfigError
from fastkin.metrics import EngineCollector

if TYPE_CHECKING:
    from fastkin.config import Status
    from fastkin.metrics import Engine

_LOG = logging.getLogger("fastkin.status")

_HEAD_BYTES = 8 * 1024  # of a request
_CONNECTIONS = 32  # at once; more are closed without a word
_TIME_S = 10.0  # for one connection, from its first byte to the last of the answer

_REASONS = {
    200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed",
    431: "Request Header Fields Too Large", 500: "Internal Server Error", 503: "Service Unavailable",
}  # fmt: skip


class _Answer(NamedTuple):
    code: int
    body: bytes
    kind: str = "text/plain; charset=utf-8"


class StatusServer:
    """Serves one engine's metrics and health."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(engine))
        ProcessCollector(registry=self._registry)
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()
        self.port = 0

    async def start(self, settings: Status) -> None:
        """Listen. ConfigError when the address cannot be had."""
        host, port = settings.host, settings.port
        try:
            self._server = await asyncio.start_server(self._connected, host, port, limit=_HEAD_BYTES)
        except (OSError, UnicodeError) as error:
            raise ConfigError(
                "[status]",
                f"cannot listen on {host} port {port}: {getattr(error, 'strerror', None) or error}",
                "choose another port or host, or leave port out",
            ) from None  # fmt: skip
        self.port = self._server.sockets[0].getsockname()[1]
        _LOG.info("stage=status http://%s:%d/metrics", f"[{host}]" if ":" in host else host, self.port)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            for task in self._open:
                task.cancel()
            await asyncio.gather(*self._open, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= _CONNECTIONS:
            writer.transport.abort()
            return
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer), name="fastkin status")
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_TIME_S):
                head, answer = await self._exchange(reader)
                lines = [
                    f"HTTP/1.1 {answer.code} {_REASONS[answer.code]}",
                    f"Content-Type: {answer.kind}",
                    f"Content-Length: {len(answer.body)}",
                    "Cache-Control: no-store",
                    "X-Content-Type-Options: nosniff",
                    "Connection: close",
                ]
                if answer.code == 405:
                    lines.append("Allow: GET, HEAD")
                writer.write("\r\n".join([*lines, "", ""]).encode() + (b"" if head else answer.body))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError):
            pass  # the peer's loss
        finally:
            writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader) -> tuple[bool, _Answer]:
        """(whether only the head is wanted, the answer)"""
        try:
            request = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return False, _Answer(431, b"too long\n")
        except asyncio.IncompleteReadError:
            return False, _Answer(400, b"not a request\n")
        first, *fields = request.decode("latin-1").split("\r\n")
        parts = first.split(" ")
        if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
            return False, _Answer(400, b"not a request\n")
        method, target, _ = parts
        if method not in ("GET", "HEAD"):
            return False, _Answer(405, b"GET or HEAD\n")
        accept = ""
        for field in fields:
            name, _, value = field.partition(":")
            if name.lower() == "accept":
                accept = value.strip()
        try:
            answer = self._answer(target.partition("?")[0], accept)
        except Exception:  # noqa: BLE001 - whatever it is, the next one may work
            _LOG.exception("stage=status cannot answer")
            answer = _Answer(500, b"see the log\n")
        return method == "HEAD", answer

    def _answer(self, path: str, accept: str) -> _Answer:
        if path == "/metrics":
            try:
                encode, kind = choose_encoder(accept)
            except Exception:  # noqa: BLE001 - what a stranger says it accepts may be nonsense
                encode, kind = choose_encoder("")
            return _Answer(200, encode(self._registry), kind)
        if path == "/healthz":
            return self._told({name: run.failed() for name, run in self._engine.pipelines.items()}, "alive")
        if path == "/readyz":
            return self._told({name: run.unready() for name, run in self._engine.pipelines.items()}, "ready")
        return _Answer(404, b"/metrics, /healthz or /readyz\n")

    def _told(self, reasons: dict[str, str | None], word: str) -> _Answer:
        """`reasons`: pipeline to what is wrong with it."""
        good = not any(reasons.values())
        pipelines = {
            name: {"ok": not reason, "reason": reason, "last_error": self._engine.pipelines[name].last_error}
            for name, reason in reasons.items()
        }
        return _Answer(
            200 if good else 503, (json.dumps({word: good, "pipelines": pipelines}) + "\n").encode(), "application/json"
        )
