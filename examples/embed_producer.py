"""A web service that stores what is posted to it: ten lines of it are fastkin's business.

    python examples/embed_producer.py            (needs aiohttp)
    curl -d '{"name":"device123"}' localhost:8080

Set AWS_REGION and credentials (for an emulator any, and AWS_ENDPOINT_URL_KINESIS).
"""

from collections.abc import AsyncIterator

from aiohttp import web

import fastkin

PRODUCER = web.AppKey("producer", fastkin.Producer)


async def with_producer(app: web.Application) -> AsyncIterator[None]:
    async with fastkin.Producer("welders") as app[PRODUCER]:
        yield  # leaving the block stores what is held


async def post(request: web.Request) -> web.Response:
    receipt = await request.app[PRODUCER].put(await request.read())
    stored = await receipt
    return web.json_response({"shard": stored.shard_id, "number": stored.sequence_number})


def application() -> web.Application:
    app = web.Application()
    app.cleanup_ctx.append(with_producer)
    app.router.add_post("/", post)
    return app


if __name__ == "__main__":
    web.run_app(application(), port=8080)
