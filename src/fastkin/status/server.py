"""The status port: /metrics for Prometheus, /healthz and /readyz for whoever starts and stops the process.

    GET /metrics   Prometheus text; OpenMetrics to those who accept it
    GET /healthz   200 while the process can do its work, 503 when a pipeline failed for good
    GET /readyz    200 when every pipeline is connected, subscribed and has reached its stream, else 503 and why

A pipeline that the settings want and that does not run is not ready, and not healthy once it failed for good. When
all are disabled on purpose nothing is wrong with the process, so it is healthy, but there is nothing to be ready.

Strangers may reach the port: one request a connection, and its size, time and number are bounded; when there are too
many, the one that has been silent for longest makes room, so that a probe always gets in. A port that is taken stops
no pipeline: it is an ERROR, and tried again until it is free. What it says
holds no secret of the settings, but it does tell names of pipelines, shards and error codes.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder

from fastkin.errors import ConfigError
from fastkin.status.metrics import EngineCollector

if TYPE_CHECKING:
    from fastkin.config import Status
    from fastkin.status.registry import Engine

_LOG = logging.getLogger("fastkin.status")

_HEAD_BYTES = 8 * 1024  # of a request
_CONNECTIONS = 32  # at once
_TIME_S = 10.0  # for one connection, from its first byte to the last of the answer
_BIND_S = 2.0  # between attempts at a port that is taken
_BIND_SAY_S = 60.0

_REASONS = {
    200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed",
    431: "Request Header Fields Too Large", 500: "Internal Server Error", 503: "Service Unavailable",
}  # fmt: skip


class _Answer(NamedTuple):
    code: int
    body: bytes
    kind: str = "text/plain; charset=utf-8"


class Health(NamedTuple):
    """How it stands with each pipeline that there is or should be."""

    failed: dict[str, str | None]  # why it does nothing any more
    unready: dict[str, str | None]  # why it does not do what the settings say
    last_error: dict[str, str | None]
    more: dict[str, Any] = {}  # noqa: RUF012 - what else the probes tell, nobody writes to it


class Page(Protocol):
    """What the port tells."""

    async def registry(self) -> CollectorRegistry:
        """What /metrics collects, once."""
        ...

    async def health(self) -> Health: ...


class EnginePage:
    """Of one engine, and of the process that it is in."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(engine))
        ProcessCollector(registry=self._registry)

    async def registry(self) -> CollectorRegistry:
        return self._registry

    async def health(self) -> Health:
        engine = self._engine
        errors = {name: run.last_error for name, run in engine.pipelines.items()}
        return Health(engine.failed(), engine.unready(), errors)


# HTTP/1.1 by hand: three paths, no body, one request a connection. A web framework would cost more memory than a
# pipeline, in every process that has a status port.
class StatusServer:
    """Serves metrics and health."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[None], asyncio.Transport] = {}  # the oldest first
        self._silent: dict[asyncio.Task[None], None] = {}  # those that have asked for nothing yet
        self._binding: asyncio.Task[None] | None = None
        self.port: int = 0

    async def start(self, settings: Status) -> None:
        """Listen. An address that is taken is tried again in the background. ConfigError when it can never be had."""
        try:
            await self._bind(settings)
        except (PermissionError, UnicodeError) as error:
            raise ConfigError(
                "[status]",
                f"cannot listen on {settings.host} port {settings.port}:"
                f" {getattr(error, 'strerror', None) or error}",
                "choose another port or host, or leave port out",
            ) from None  # fmt: skip
        except OSError as error:
            self._binding = asyncio.create_task(self._bind_later(settings, error), name="fastkin status bind")

    async def _bind(self, settings: Status) -> None:
        host, port = settings.host, settings.port
        self._server = await asyncio.start_server(self._connected, host, port, limit=_HEAD_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]
        _LOG.info("stage=status http://%s:%d/metrics", f"[{host}]" if ":" in host else host, self.port)

    async def _bind_later(self, settings: Status, error: Exception) -> None:
        loop = asyncio.get_running_loop()
        said: float | None = None
        while True:
            if said is None or loop.time() - said >= _BIND_SAY_S:
                said = loop.time()
                _LOG.error(
                    "stage=status cannot listen on %s port %d: %s; the pipelines work without it, /metrics and the"
                    " probes do not; end what has the port, or choose another in [status]; trying again every %.0f s",
                    settings.host, settings.port, getattr(error, "strerror", None) or error, _BIND_S,
                )  # fmt: skip
            await asyncio.sleep(_BIND_S)
            try:
                await self._bind(settings)
            except (OSError, UnicodeError) as again:
                error = again
            else:
                return

    async def close(self) -> None:
        if self._binding is not None:
            self._binding.cancel()
            await asyncio.gather(self._binding, return_exceptions=True)
        if self._server is not None:
            self._server.close()
            for task in self._open:
                task.cancel()
            await asyncio.gather(*self._open, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= _CONNECTIONS:
            # whoever has asked is answered within a moment; the one who has been silent for longest is no probe
            oldest = next(iter(self._silent or self._open))
            self._open.pop(oldest).abort()
            self._silent.pop(oldest, None)
            oldest.cancel()
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer), name="fastkin status")
        self._open[task] = writer.transport  # type: ignore[assignment]
        self._silent[task] = None
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._open.pop(task, None)
        self._silent.pop(task, None)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_TIME_S):
                head, answer = await self._exchange(reader)
                self._silent.pop(asyncio.current_task(), None)  # type: ignore[arg-type]
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
            # Nothing waits here: a peer that takes its answer byte by byte must not hold a place for longer than its
            # time.
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
            answer = await self._answer(target.partition("?")[0], accept)
        except Exception:  # noqa: BLE001 - whatever it is, the next one may work
            _LOG.exception("stage=status cannot answer")
            answer = _Answer(500, b"see the log\n")
        return method == "HEAD", answer

    async def _answer(self, path: str, accept: str) -> _Answer:
        if path == "/metrics":
            try:
                encode, kind = choose_encoder(accept)
            except Exception:  # noqa: BLE001 - what a stranger says it accepts may be nonsense
                encode, kind = choose_encoder("")
            return _Answer(200, encode(await self._page.registry()), kind)
        if path == "/healthz":
            health = await self._page.health()
            return _told(health, health.failed, "alive")
        if path == "/readyz":
            health = await self._page.health()
            return _told(health, health.unready, "ready", None if health.unready else "no pipeline is enabled")
        return _Answer(404, b"/metrics, /healthz or /readyz\n")


def _told(health: Health, reasons: dict[str, str | None], word: str, wrong: str | None = None) -> _Answer:
    """`reasons`: pipeline to what is wrong with it; `wrong`: with all of it."""
    good = not wrong and not any(reasons.values())
    pipelines = {
        name: {"ok": not reason, "reason": reason, "last_error": health.last_error.get(name)}
        for name, reason in reasons.items()
    }
    told = {word: good, **({"reason": wrong} if wrong else {}), "pipelines": pipelines, **health.more}
    return _Answer(200 if good else 503, (json.dumps(told) + "\n").encode(), "application/json")
