"""What a peer, or time, makes longer must not make the work for each piece longer."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from fastkin import Producer
from fastkin.aws import credentials
from fastkin.aws.credentials import ChainCredentials
from fastkin.aws.http import HttpPool
from fastkin.config import Kinesis
from fastkin.emulator import Emulator
from fastkin.errors import KinesisError
from support.fake_http import FakeServer, Link, Request
from support.servers import ACCESS_KEY, SECRET_KEY

if TYPE_CHECKING:
    import pytest

HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\n"


async def test_an_answer_in_chunks_of_one_byte_costs_its_bytes() -> None:
    """Each byte copied all that came before it: a megabyte stood the loop still for half a minute."""
    count = 600_000

    async def serve(link: Link, request: Request) -> None:
        link.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * count + b"0\r\n\r\n")
        await link.writer.drain()

    async with FakeServer(serve) as server:
        pool = HttpPool(server.url)
        began = time.thread_time()
        reply = await pool.request(HEAD, b"body")
        spent = time.thread_time() - began
        await pool.close()
    assert reply.body == b"x" * count
    assert spent < 3.0, f"{spent:.1f} s of the loop's time"


async def test_keys_that_were_missing_for_hours_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait was computed as a power of two of the failures: after the 1024th that is no number any more, and what
    was raised then was no error of Kinesis, so it ended the pipeline."""
    keys: list[object] = []

    async def load(kinesis: Kinesis) -> object:
        if not keys:
            raise RuntimeError("no keys yet")
        return keys[0]

    monkeypatch.setattr(credentials, "_load_source", load)
    now = 0.0
    chain = ChainCredentials(Kinesis(stream="s", region="eu-west-1", profile="p"), clock=lambda: now)
    for _ in range(1_100):
        now += 60.0
        try:
            await chain.get()
        except KinesisError as error:
            assert error.code == "NoCredentials"  # noqa: PT017 - thousands of times
        else:
            raise AssertionError("there were no keys")

    class Frozen:
        access_key, secret_key, token = "AKID", "secret", None

    class Source:
        async def get_frozen_credentials(self) -> Frozen:
            return Frozen()

    keys.append(Source())
    now += 60.0
    assert (await chain.get()).access_key == "AKID"
    await chain.close()


async def test_many_who_flush_at_once_share_calls() -> None:
    """Each flush had a mark of its own, records of different marks share no call, and each answer looked at all marks
    for all who waited: a thousand took twelve seconds, two thousand more than a minute."""
    async with Emulator({"s": 4}) as emulator:
        async with Producer(
            "s", region="us-east-1", endpoint_url=emulator.url, access_key=ACCESS_KEY, secret_key=SECRET_KEY
        ) as producer:

            async def one(number: int) -> None:
                receipt = await producer.put(b"%d" % number)
                await producer.flush()
                assert receipt.done(), "flush returned before the receipt had ended"

            await asyncio.gather(*map(one, range(400)))
            calls = producer.stats()["calls"]
        assert sorted(int(record.data) for record in emulator.stored("s")) == list(range(400))
    assert calls < 100, f"{calls} calls for 400 records"
