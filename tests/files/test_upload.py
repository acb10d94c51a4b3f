"""Finished files go to S3 (moto), survive refusals and restarts, and are deleted here only when S3 has them."""

from __future__ import annotations

import asyncio
import gzip
import logging
import os
import threading
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from fastkin.config import Kinesis, Pipeline
from fastkin.errors import KinesisError
from fastkin.files.client import FileClient
from fastkin.files.directory import UPLOAD
from fastkin.files.upload import _Body
from support.buckets import create, objects
from support.fake_http import FakeServer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.fake_http import Link, Request
    from support.servers import Server


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setattr("fastkin.files.upload._AGAIN_S", (0.05, 0.1))


def pipeline(folder: Path, url: str, bucket: str, **more: Any) -> Pipeline:
    kinesis = Kinesis(region="us-east-1", endpoint_url=url, access_key="AKID", secret_key="secret-of-some-length")
    given = {"file_interval_s": 3600.0, "file_prefix": "prod/data/"} | more
    return Pipeline(id="p", kinesis=kinesis, file=str(folder), s3=bucket, **given)


def bucket_name() -> str:
    return f"plant-{uuid.uuid4().hex[:12]}"


async def put(client: FileClient, *datas: bytes) -> None:
    import base64

    for data in datas:
        await client.call("PutObject", b'{"Records":[{"Data":"%s"}],"D":"d"}' % base64.b64encode(data))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(100):
        while not condition():
            await asyncio.sleep(0.01)


async def test_finished_files_go_to_the_bucket(moto_server: Server, tmp_path: Path) -> None:
    """IC-09, IC-10: gzip and prefix in S3; nothing is left on the disk."""
    bucket = await create(moto_server.url, bucket_name())
    client = FileClient(pipeline(tmp_path, moto_server.url, bucket, file_max_bytes=1024))
    assert (await client.describe()).name == bucket
    await put(client, b"a" * 1024, b"b" * 1024, b"c\n")
    await client.finish()
    assert sorted((await objects(moto_server.url, bucket)).values()) == [b"a" * 1024, b"b" * 1024, b"c\n"]
    for key in await objects(moto_server.url, bucket):
        assert key.startswith("prod/data/p-")
        assert key.endswith(".jsonl.gz")
    counters = client.file_counters
    assert (counters.finished, counters.uploaded, counters.waiting, counters.waiting_bytes) == (3, 3, 0, 0)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    await client.close()


async def test_the_wrong_bucket_is_told_and_loses_nothing(
    moto_server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bucket = bucket_name()
    client = FileClient(pipeline(tmp_path, moto_server.url, bucket))
    with pytest.raises(
        KinesisError, match=f"there is no bucket {bucket}; check its name, region and account"
    ) as caught:
        await client.describe()
    assert not client.only_the_question(caught.value)
    await put(client, b"a\n")
    finish = asyncio.create_task(client.finish())
    await until(lambda: client.trouble)
    assert f"there is no bucket {bucket}" in str(client.trouble)
    assert client.file_counters.waiting == 1
    assert len(list((tmp_path / UPLOAD).rglob("*.gz"))) == 1
    await create(moto_server.url, bucket)
    await finish
    assert client.trouble is None
    assert list((await objects(moto_server.url, bucket)).values()) == [b"a\n"]
    await client.close()
    (error,) = [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR]
    assert "pipeline=p stage=send" in error
    assert f"bucket {bucket} takes no files" in error
    assert f"1 files ({client.file_counters.waiting_bytes or ''}" in error.replace("1 files (", "1 files (")
    assert f"are kept in {tmp_path} and tried again" in error
    assert any("takes files again" in each.getMessage() for each in caplog.records)


async def test_what_was_not_uploaded_is_uploaded_by_the_next_run(
    moto_server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bucket = bucket_name()
    first = FileClient(pipeline(tmp_path, moto_server.url, bucket, file_max_bytes=1024))
    await put(first, b"finished" * 128, b"unfinished")
    await until(lambda: first.trouble)
    await first.close()
    assert "1 files are not in S3 yet: they wait in" in caplog.text
    await create(moto_server.url, bucket)
    second = FileClient(pipeline(tmp_path, moto_server.url, bucket))
    await second.start()
    await second.finish()
    assert sorted((await objects(moto_server.url, bucket)).values()) == [b"finished" * 128, b"unfinished"]
    await second.close()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


REFUSED = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code><Message>%s</Message><RequestId>1</RequestId></Error>'
)


class Script:
    """A bucket that refuses some calls first, and then takes all."""

    def __init__(self, *refusals: tuple[int, bytes, bytes]) -> None:
        self.refusals = list(refusals)
        self.objects: dict[str, bytes] = {}
        self.puts = 0

    async def answer(self, link: Link, request: Request) -> None:
        if request.method != "PUT":
            link.reply(200, b"")
            return
        self.puts += 1
        if self.refusals:
            status, code, message = self.refusals.pop(0)
            link.reply(status, REFUSED % (code, message), {"Content-Type": "application/xml"})
            return
        self.objects[request.path] = request.body
        link.reply(200, b"", {"ETag": '"x"'})


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        (403, b"AccessDenied", "allow s3:PutObject on plant-1/*"),
        (503, b"SlowDown", "SlowDown: PutObject of prod/data/p-"),
        (500, b"InternalError", "InternalError: PutObject of prod/data/p-"),
        (400, b"ExpiredToken", "ExpiredToken: PutObject of prod/data/p-"),
    ],
)
async def test_a_refused_file_goes_again(status: int, code: bytes, told: str, tmp_path: Path) -> None:
    script = Script((status, code, b"no, says secret-of-some-length"))
    async with FakeServer(script.answer) as server:
        client = FileClient(pipeline(tmp_path, server.url, "plant-1"))
        await put(client, b"a\n")
        finish = asyncio.create_task(client.finish())
        await until(lambda: client.trouble or finish.done())
        assert told in str(client.trouble)
        assert "secret-of-some-length" not in str(client.trouble)
        await finish
        assert client.file_counters.upload_failures == 1
        await client.close()
    ((path, body),) = script.objects.items()
    assert path.startswith("/plant-1/prod/data/p-")
    assert gzip.decompress(body) == b"a\n"
    assert script.puts == 2


async def test_many_files_go_side_by_side_and_each_goes_once(tmp_path: Path) -> None:
    script = Script()
    async with FakeServer(script.answer) as server:
        client = FileClient(pipeline(tmp_path, server.url, "plant-1", file_max_bytes=1024))
        await put(client, *[b"%04d" % n * 256 for n in range(30)])
        await client.finish()
        await client.close()
    assert sorted(gzip.decompress(body)[:4] for body in script.objects.values()) == [b"%04d" % n for n in range(30)]
    assert script.puts == 30


async def test_nobody_at_home_keeps_the_files(tmp_path: Path) -> None:
    client = FileClient(pipeline(tmp_path, "http://127.0.0.1:9", "plant-1"))
    await put(client, b"a\n")
    finish = asyncio.create_task(client.finish())
    await until(lambda: client.trouble)
    assert not finish.done()
    finish.cancel()
    await client.close()
    assert len(list((tmp_path / UPLOAD).rglob("*.gz"))) == 1


class Picky(Script):
    """A bucket that refuses some keys for ever."""

    def __init__(self, code: bytes, prefix: str) -> None:
        super().__init__()
        self.code, self.prefix = code, prefix
        self.tried: list[str] = []

    async def answer(self, link: Link, request: Request) -> None:
        if request.method == "PUT":
            self.tried.append(request.path)
            if request.path.startswith(self.prefix):
                link.reply(403, REFUSED % (self.code, b"no"), {"Content-Type": "application/xml"})
                return
        await super().answer(link, request)


async def test_a_file_that_is_refused_keeps_no_other_from_its_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = Picky(b"AccessDenied", "/plant-1/error/")
    for n in range(3):
        for place in ("error", "prod"):
            path = tmp_path / UPLOAD / place / f"{n}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"%d" % n)
    async with FakeServer(script.answer) as server:
        client = FileClient(pipeline(tmp_path, server.url, "plant-1"))
        await client.start()
        await until(lambda: client.trouble)
        assert client.file_counters.uploaded == 3
        assert (client.file_counters.waiting, client.file_counters.upload_failures) == (3, 3)
        assert "allow s3:PutObject on plant-1/*" in str(client.trouble)
        await put(client, b"new\n")
        finish = asyncio.create_task(client.finish())
        await until(lambda: client.file_counters.uploaded == 4)
        assert not finish.done()
        finish.cancel()
        await client.close()
    assert len(script.objects) == 4
    assert [path for path in script.tried if path in script.objects] == list(script.objects)  # each goes up once
    assert "bucket plant-1 refuses files" in caplog.text


async def test_what_was_refused_is_tried_behind_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkin.files.upload._SIDE_BY_SIDE", 1)
    script = Picky(b"AccessDenied", "/plant-1/error/")
    (tmp_path / UPLOAD / "error").mkdir(parents=True)
    (tmp_path / UPLOAD / "error" / "a.jsonl").write_bytes(b"a")
    async with FakeServer(script.answer) as server:
        client = FileClient(pipeline(tmp_path, server.url, "plant-1"))
        await client.start()
        await until(lambda: client.trouble)
        path = tmp_path / UPLOAD / "prod" / "b.jsonl"
        path.parent.mkdir()
        path.write_bytes(b"b")
        await until(lambda: script.objects)
        await client.close()
    before = script.tried[: script.tried.index("/plant-1/prod/b.jsonl")]
    assert set(before) == {"/plant-1/error/a.jsonl"}


async def test_a_file_is_closed_when_its_upload_is_cancelled_at_the_very_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is sent, and the thread that closes has not come to it yet."""
    closed: list[str] = []
    close = _Body.close

    def closing(self: _Body) -> None:
        close(self)
        closed.append(self._path.name)

    monkeypatch.setattr(_Body, "close", closing)
    held, busy = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        busy.wait()

    async def answer(link: Link, _: Request) -> None:
        client.files._press.leave(hold)
        await until(held.is_set)  # what waits for the thread from now on is the closing
        link.reply(200, b"")

    (tmp_path / UPLOAD).mkdir(parents=True)
    (tmp_path / UPLOAD / "a.jsonl").write_bytes(b"a")
    async with FakeServer(answer) as server:
        client = FileClient(pipeline(tmp_path, server.url, "plant-1"))
        try:
            await client.start()
            # To close it. Without the first, it could be the one that holds the thread.
            await until(lambda: held.is_set() and client.files._press._jobs.qsize())
            await client.close()
            assert not closed
        finally:
            busy.set()
        await until(lambda: closed)


async def test_keys_that_are_wrong_for_all_files_end_the_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkin.files.upload._AGAIN_S", (1000.0, 1000.0))
    script = Picky(b"InvalidAccessKeyId", "/plant-1/")
    (tmp_path / UPLOAD).mkdir()
    for n in range(40):
        (tmp_path / UPLOAD / f"{n}.jsonl").write_bytes(b"a")
    async with FakeServer(script.answer) as server:
        client = FileClient(pipeline(tmp_path, server.url, "plant-1"))
        await client.start()
        await until(lambda: client.trouble)
        assert len(set(script.tried)) <= 4
        await client.close()
