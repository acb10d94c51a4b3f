"""A query behind the path of a WebSocket is often a token or a signature: it is sent, and never said."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from aiohttp import web

from fastkin.config import Broker, Kinesis, Pipeline, Settings
from fastkin.settings.show import effective
from support.fake_broker import Rig

if TYPE_CHECKING:
    import pytest

QUERY = "X-Amz-Signature=s3cr3tMARK&x=1"


async def test_a_query_is_sent_and_not_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    asked: list[str] = []

    async def refuse(request: web.Request) -> web.StreamResponse:
        asked.append(request.path_qs)
        if len(asked) == 1:
            raise web.HTTPForbidden
        websocket = web.WebSocketResponse(protocols=("mqtt",))
        await websocket.prepare(request)
        await websocket.receive()
        await websocket.send_bytes(b"\x20\x02\x00\x00")
        await websocket.send_bytes(b"\x90\x03" + (await websocket.receive()).data[2:4] + b"\x01")
        await websocket.receive()
        return websocket

    app = web.Application()
    app.router.add_get("/mqtt", refuse)
    runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)  # which would say it
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()

    class Place:
        host = "127.0.0.1"
        port: int = runner.addresses[0][1]

    try:
        async with asyncio.timeout(20), Rig(Place, scheme="ws", protocol="3.1.1", path=f"/mqtt?{QUERY}") as rig:
            assert asked == [f"/mqtt?{QUERY}"] * 2
            assert "HTTP 403" in caplog.text
            assert f"ws://127.0.0.1:{Place.port}/mqtt" in caplog.text
            assert "MARK" not in caplog.text + str(rig.subscriber.last_error)
    finally:
        await runner.cleanup()


def test_a_query_is_not_shown() -> None:
    broker = Broker(scheme="wss", path=f"/mqtt?{QUERY}")
    shown = effective(
        Settings(broker=broker, pipelines=(Pipeline(id="p", topics=("t",), kinesis=Kinesis(stream="s")),))
    )
    assert 'path = "***"' in shown
    assert "MARK" not in shown
