"""WebSocket in, TCP out: puts a WebSocket listener in front of a broker whose packets a proxy reads."""

from __future__ import annotations

import asyncio
import contextlib

from aiohttp import WSMsgType, web

HOST = "127.0.0.1"


class WebSocketBridge:
    """Every binary message is written to a connection of its own to `target_port`, and back."""

    def __init__(self, target_port: int) -> None:
        self.port = 0
        self._target = target_port
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/mqtt", self._serve)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await self._runner.setup()
        site = web.TCPSite(self._runner, HOST, 0)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _serve(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(protocols=("mqtt",), max_msg_size=0)
        await socket.prepare(request)
        reader, writer = await asyncio.open_connection(HOST, self._target)

        async def down() -> None:
            while data := await reader.read(65_536):
                await socket.send_bytes(data)
            await socket.close()

        back = asyncio.create_task(down())
        try:
            async for message in socket:
                if message.type is WSMsgType.BINARY:
                    writer.write(message.data)
                    await writer.drain()
        except OSError:
            pass
        finally:
            back.cancel()
            await asyncio.gather(back, return_exceptions=True)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        return socket
