"""Finished files go to S3, some at a time, and are deleted here when S3 has said that it has them.

A file is named before it is finished, so a file that goes twice (the answer was lost, the process killed before it
could delete) is the same object both times. The SDK makes the calls: some a minute, and any way to sign, proxy or
region.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from importlib import import_module
from random import Random
from typing import TYPE_CHECKING, Any

from fastkin.aws.credentials import make_provider
from fastkin.errors import Action, FastkinError, KinesisError, masked
from fastkin.status.logs import Repeats

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractAsyncContextManager
    from io import BufferedReader
    from pathlib import Path

    from fastkin.aws.credentials import Provider
    from fastkin.config import Kinesis
    from fastkin.files.directory import Waiting
    from fastkin.files.files import Files

_LOG = logging.getLogger("fastkin.files")

_SIDE_BY_SIDE = 4
_LOOK_EVERY_S = 10.0  # also without being told of a new file
_AGAIN_S = (1.0, 60.0)  # the first wait after a failure, and the longest
_SAY_EVERY_S = 60.0
_MISSING = frozenset({"404", "NoSuchBucket", "NotFound"})
# What fails like this fails for every file: the bucket, the keys, the way to it.
_FOR_ALL = frozenset({
    "NoSuchBucket",
    "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "RequestTimeTooSkewed", "SignatureDoesNotMatch",
    "TokenRefreshRequired",
    "CredentialRetrievalError", "NoCredentials", "NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError",
    "ConnectTimeoutError", "ConnectionClosedError", "ConnectionError", "EndpointConnectionError", "HTTPClientError",
    "ProxyConnectionError", "ReadTimeoutError", "SSLError", "TimeoutError",
})  # fmt: skip


class _Body:
    """A file that is opened and closed in the thread, one after the other: who is cancelled, be it while it is opened
    or when all is sent, has it closed all the same."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BufferedReader | None = None

    def open(self) -> BufferedReader:
        self._file = self._path.open("rb")
        return self._file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Uploader:
    """Takes the files of one directory to one bucket."""

    def __init__(self, kinesis: Kinesis, bucket: str, *, name: str) -> None:
        """`kinesis`: keys, region and endpoint. `name` of the pipeline, for log lines."""
        self.bucket = bucket
        self.trouble: str | None = None  # why the last file was not taken
        self.busy: bool = False  # a file waits, or is under way
        self._refused: frozenset[str] = frozenset()  # keys that failed in the last round
        self._kinesis = kinesis
        self._name = name
        self._random = Random()  # noqa: S311 - jitter, not secrets
        self._files: Files | None = None
        self._provider: Provider | None = None
        self._client: Any = None
        self._context: AbstractAsyncContextManager[Any] | None = None
        self._starting = asyncio.Lock()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._lines: Repeats | None = None

    def start(self, files: Files) -> None:
        """Begin with what lies there."""
        self._files = files
        self._lines = Repeats(_LOG, asyncio.get_running_loop().call_later, most=1, per_s=_SAY_EVERY_S)
        self.look()
        self._task = asyncio.create_task(self._run(), name=f"fastkin[{self._name}].upload")

    def look(self) -> None:
        """A file is finished."""
        self.busy = True
        self._wake.set()

    async def close(self) -> None:
        """End calls that are open: their files stay."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._lines is not None:
            self._lines.close()
        context, self._context, self._client = self._context, None, None
        if context is not None:
            await context.__aexit__(None, None, None)
        if self._provider is not None:
            await self._provider.close()

    async def describe(self) -> None:
        """Is the bucket there? KinesisError."""
        client = await self._ready()
        with self._as_ours("HeadBucket"):
            async with asyncio.timeout(self._kinesis.request_timeout_s):
                await client.head_bucket(Bucket=self.bucket)

    # -- the work ------------------------------------------------------------------------------

    async def _run(self) -> None:
        least, most = _AGAIN_S
        wait_s = least
        assert self._files is not None
        counters = self._files.counters
        while True:
            self._wake.clear()
            failures = counters.upload_failures
            try:
                await self._round()
            except Exception as error:  # noqa: BLE001 - whatever it is, the files are kept and tried again
                all_fail = _for_all(error) or counters.upload_failures == failures
                if counters.upload_failures == failures:
                    counters.upload_failures += 1  # no file's own
                wait_s = min(most, self._random.uniform(least, wait_s * 3))
                self._failed(error, wait_s, all_fail=all_fail)
                await asyncio.sleep(wait_s)
                continue
            if self.trouble is not None:
                _LOG.warning("pipeline=%s stage=send bucket %s takes files again", self._name, self.bucket)
            self.trouble = None
            wait_s = least
            if not self._wake.is_set():
                self.busy = False
                self._files.progress()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), _LOOK_EVERY_S)

    async def _round(self) -> None:
        """Upload all that waits, and raise the first failure. A file that is refused keeps no other from its place;
        what would fail for all of them ends the round."""
        files = self._files
        assert files is not None
        waiting = await files.in_thread(files.directory.waiting)
        assert isinstance(waiting, list)
        files.counters.waiting, files.counters.waiting_bytes = len(waiting), sum(each.nbytes for each in waiting)
        if not waiting:
            return
        self.busy = True
        client = await self._ready()
        # What failed comes last: else it would be tried first for ever, and a failure for all may be its own.
        rest = deque(sorted(waiting, key=lambda file: file.key in self._refused))
        failures: dict[str, Exception] = {}
        tried: set[str] = set()

        async def some() -> None:
            while rest:
                file = rest.popleft()
                tried.add(file.key)
                try:
                    await self._upload(client, files, file)
                except Exception as error:  # noqa: BLE001 - whatever it is, the file is kept and tried again
                    failures[file.key] = error
                    if _for_all(error):
                        rest.clear()

        async with asyncio.TaskGroup() as group:
            for _ in range(min(_SIDE_BY_SIDE, len(waiting))):
                group.create_task(some())
        self._refused = (self._refused - tried) | frozenset(failures)
        if failures:
            files.counters.upload_failures += len(failures)
            raise next((each for each in failures.values() if _for_all(each)), next(iter(failures.values())))

    async def _upload(self, client: Any, files: Files, file: Waiting) -> None:
        from fastkin.aws.sdk import slow_line_s

        with self._as_ours(f"PutObject of {file.key}"):
            body = _Body(file.path)
            try:
                opened = await files.in_thread(body.open)
                async with asyncio.timeout(slow_line_s(self._kinesis.request_timeout_s, file.nbytes)):
                    await client.put_object(Bucket=self.bucket, Key=file.key, Body=opened)
            except FileNotFoundError:
                return  # another process has taken it there
            finally:
                # Not awaited: a call that is waited for is not made when who waits is cancelled first.
                files.leave(body.close)
        await files.in_thread(files.directory.uploaded, file)
        files.counters.uploaded += 1
        files.counters.waiting -= 1
        files.counters.waiting_bytes -= file.nbytes
        files.progress()

    def _failed(self, error: Exception, wait_s: float, *, all_fail: bool) -> None:
        files = self._files
        assert files is not None
        assert self._lines is not None
        self.trouble = why = str(error) or type(error).__name__
        what = "takes no files" if all_fail else "refuses files"
        self._lines.say(
            logging.ERROR, "upload",
            "pipeline=%s stage=send bucket %s %s: %s; %d files (%d bytes) are kept in %s and tried again in"
            " %.0f s", self._name, self.bucket, what, why, files.counters.waiting,
            files.counters.waiting_bytes, files.directory.path, wait_s,
        )  # fmt: skip

    async def _ready(self) -> Any:
        async with self._starting:  # describe() and the first round may come at once
            if self._client is None:
                # The SDK costs 30 MB, and a second in which the loop would stand still.
                sdk = await asyncio.to_thread(import_module, "fastkin.aws.sdk")
                self._provider = self._provider or await make_provider(self._kinesis, self._name)
                context = sdk.s3_client(self._kinesis, self._provider)
                self._client = await context.__aenter__()
                self._context = context
            return self._client

    @contextlib.contextmanager
    def _as_ours(self, what: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except FastkinError:
            raise
        except ClientError as refusal:
            told = refusal.response.get("Error", {})
            code, status = str(told.get("Code") or ""), refusal.response["ResponseMetadata"].get("HTTPStatusCode")
            message = masked(str(told.get("Message") or ""), (self._kinesis.secret_key, self._kinesis.session_token))
            cure = ""
            if code in _MISSING:
                code, message = "NoSuchBucket", f"there is no bucket {self.bucket}"
                cure = "; check its name, region and account"
            elif status == 403:
                cure = f"; allow s3:PutObject on {self.bucket}/*"
            raise KinesisError(code, f"{what}: {message}{cure}", action=Action.OPERATOR, http_status=status) from None
        except (BotoCoreError, OSError, TimeoutError) as error:
            raise KinesisError(type(error).__name__, f"{what}: {error}") from None


def _for_all(error: Exception) -> bool:
    return isinstance(error, KinesisError) and error.code in _FOR_ALL
