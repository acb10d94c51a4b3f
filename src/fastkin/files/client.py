"""The client of a pipeline into files: what the sender calls is written and synced, and answered as Firehose would.

So batches, limits, retries and acknowledgements are those of every destination. A call that is answered is on the disk
of this machine: what becomes of its file is in files.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import orjson

from fastkin._codec import joined_data
from fastkin.aws.client import Client, StreamSummary
from fastkin.aws.destinations import FILES
from fastkin.files.directory import Directory
from fastkin.files.files import Files, Limits, Stream
from fastkin.files.upload import Uploader

if TYPE_CHECKING:
    from typing import Any

    from typing_extensions import Buffer

    from fastkin.config import Pipeline
    from fastkin.errors import KinesisError
    from fastkin.status.instruments import FileCounters


class FileClient(Client):
    """Writes to files, and has them uploaded."""

    def __init__(self, pipeline: Pipeline) -> None:
        assert pipeline.file is not None
        super().__init__(pipeline.kinesis, name=pipeline.id, destination=FILES)
        uploader = None if pipeline.s3 is None else Uploader(pipeline.kinesis, pipeline.s3, name=pipeline.id)
        self.files: Files = Files(
            Directory(pipeline.file, total_bytes=pipeline.file_disk_bytes, upload=uploader is not None),
            Limits(pipeline.file_interval_s, pipeline.file_max_bytes),
            name=pipeline.id, gzip=pipeline.file_compression == "gzip", uploader=uploader,
        )  # fmt: skip
        self._records = self.files.stream(pipeline.file_prefix, pipeline.file_extension)
        error, raw = pipeline.file_error_prefix, pipeline.file_raw_prefix
        self.letters: Stream | None = self.files.stream(error, ".jsonl") if error else None  # dead letters
        # messages as they came
        self.raw: Stream | None = self.files.stream(raw, pipeline.file_extension) if raw else None

    @property
    def file_counters(self) -> FileCounters:
        return self.files.counters

    @property
    def trouble(self) -> str | None:
        return self.files.hangs or self.files.trouble

    def _target(self) -> dict[str, Any]:
        return {self.destination.name_member: str(self.files.directory.path)}

    async def start(self) -> None:
        """Make the directory, and take over what a former run left. KinesisError."""
        await self.files.open()

    async def call(self, target: str, body: Buffer, *, once: bool = False) -> bytes:  # noqa: ARG002 - as Client has it
        """Return when the records of the body are synced. KinesisError: none of them is written."""
        self.calls += 1
        return _answer(await self._records.put(body, joined_data))

    async def describe(self) -> StreamSummary:
        """Can files be made, and is the bucket there? Takes nothing over, unlike start(). KinesisError."""
        await self.files.in_thread(self.files.directory.probe)
        uploader = self.files.uploader
        if uploader is not None:
            await uploader.describe()
        return StreamSummary(
            name=str(self.files.directory.path) if uploader is None else uploader.bucket,
            arn="",
            status="ACTIVE",
            shard_count=0,
            max_record_bytes=self.destination.record_bytes,
            mode="files" if uploader is None else "files for S3",
            auto_keys=True,
        )

    def only_the_question(self, error: KinesisError) -> bool:
        return error.http_status == 403  # to ask for the bucket is a permission of its own

    async def finish(self) -> None:
        """Return when all is finished and, with S3, uploaded, however long that takes."""
        await self.files.finish()

    async def close(self) -> None:
        await self.files.close()


@lru_cache(maxsize=64)
def _answer(count: int) -> bytes:
    """What PutRecordBatch answers when it has taken so many."""
    return orjson.dumps({"FailedPutCount": 0, "RequestResponses": [{"RecordId": "file"}] * count})
