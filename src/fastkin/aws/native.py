"""The native way to make a call: own signature, own connections, nothing of the SDK on the path of a call.

The SDK makes a body of its own from a list of records. Here the batch is the body already: it is hashed, signed and
written as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from fastkin.aws.client import RESIGNS, Client, bundle_path, is_aws, tls_context, wire, wire_answered, wire_asked
from fastkin.aws.credentials import make_provider
from fastkin.aws.endpoint import Endpoint, resolve_endpoint
from fastkin.aws.error_table import note_answer
from fastkin.aws.http import IDLE_AWS_S, IDLE_FOREIGN_S, HttpPool
from fastkin.aws.http_answer import MAX_ANSWER, PUT_ANSWER
from fastkin.aws.signing import Signer
from fastkin.net.tls import Renewed, system_files

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from fastkin.aws.signing import Credentials

log: logging.Logger = logging.getLogger("fastkin.kinesis")

JSON = "application/x-amz-json-1.1"
# A larger body is hashed in a thread. 256 KiB are 0.15 ms of the loop; handing over costs 45 us of CPU, so
# that 500 records of 200 B (169 kB) measured 110 us a call hashed here and 155 us hashed in a thread.
INLINE_BYTES = 256 * 1024
# One thread hashes 1.8 GB/s, more than one process sends. A second one measured worse on two cores: a 1 ms
# ticker was late by 10 ms at p99 instead of 0.9 ms, and 8 calls of 6.8 MB in flight made 170 instead of 305
# calls a second.
HASH_THREADS = 1


class KinesisClient(Client):
    """The native way: own signature, own connections, nothing of the SDK on the path of a call."""

    def _begin(self) -> None:
        self._endpoint: Endpoint | None = None
        self._account: str | None = None
        self._signer: Signer | None = None
        self._pools: dict[str, HttpPool] = {}
        self._tls: Renewed | None = None
        self._threads: ThreadPoolExecutor | None = None

    def read_files(self) -> None:
        if bundle_path(self.kinesis) and not (self.kinesis.endpoint_url or "").startswith("http:"):
            self._read_authorities()

    def _read_authorities(self) -> None:
        if self._tls is None:
            bundle = bundle_path(self.kinesis)
            files = (bundle,) if bundle else system_files()
            self._tls = Renewed(partial(tls_context, self.kinesis), files, log, ("kinesis", bundle))

    async def start(self) -> None:
        """Find keys and endpoint. No call to Kinesis is made. Raises ConfigError, KinesisError."""
        self._provider = self._provider or await make_provider(self.kinesis, self.name)
        credentials = await self._provider.get()
        self._account = credentials.account_id
        endpoint = await resolve_endpoint(self.kinesis, credentials, self.destination)
        # A region with another key: the signer keeps the signing key of one region only.
        if self._signer is None or self._signer.region != endpoint.region:
            self._signer = Signer(endpoint.region, self.destination.service)
        if "https:" in endpoint.data.base + endpoint.control.base:
            self._read_authorities()
        self._endpoint = endpoint
        self.at_aws: bool = is_aws(endpoint.data.base)

    def abort(self) -> None:
        for pool in self._pools.values():
            pool.abort()

    async def close(self) -> None:
        """Close connections and threads. The client can be started again."""
        pools, self._pools = self._pools, {}
        for pool in pools.values():
            await pool.close()
        if self._provider is not None:
            await self._provider.close()
        if self._threads is not None:
            self._threads.shutdown(wait=False)
            self._threads = None
        self._endpoint = None

    async def call(self, target: str, body: Buffer, *, once: bool = False) -> bytes:
        """One call. Returns the body of a 200 answer, raises KinesisError for any other outcome. `once`: see Client."""
        assert self._provider is not None
        self.calls += 1
        view = memoryview(body)
        length = view.nbytes
        view.release()
        # Once per body, not once per attempt: it costs more than the rest of the signature.
        digest = await self._digest(body, length)
        resigned = RESIGNS if once else 0
        while True:
            credentials = await self._provider.get()
            endpoint = self._endpoint
            if endpoint is None or credentials.account_id != self._account:
                await self.start()  # another account has another host
                endpoint = self._endpoint
            assert endpoint is not None
            assert self._signer is not None
            url = endpoint.control if target in self.destination.control else endpoint.data
            # Signed when a connection is there, and anew for a second attempt: a signature is only good for five
            # minutes, and waiting for a connection may take a part of them.
            head = partial(self._head, self._signer, credentials, target, url.host, url.path, digest, length)
            pool = self._pools.get(url.base) or self._new_pool(url.base)
            offset = self.clock_offset
            began = time.monotonic()
            said = wire.isEnabledFor(logging.DEBUG)
            if said:
                wire_asked(target, body)
            most = PUT_ANSWER if target == self.destination.put else MAX_ANSWER
            reply = await pool.request(head, body, most, once=once)
            if log.isEnabledFor(logging.DEBUG):
                log.debug(
                    "%s with %d bytes to %s: status %d, %d bytes, %.1f ms", target, length, url.host, reply.status,
                    len(reply.body), (time.monotonic() - began) * 1000,
                )  # fmt: skip
            if said:
                wire_answered(target, reply.status, reply.body, (credentials.token, credentials.secret_key))
            if reply.status == 200:
                note_answer(reply.headers)
                return reply.body
            await self._mend(reply, credentials, offset, resigned)
            resigned += 1

    def _head(
        self,
        signer: Signer,
        credentials: Credentials,
        target: str,
        host: str,
        path: str,
        digest: str,
        length: int,
    ) -> bytes:
        return signer.head(
            credentials,
            target=f"{self.destination.api}.{target}",
            host=host,
            path=path,
            content_type=JSON,
            body_sha256_hex=digest,
            length=length,
            now=self._clock() + self.clock_offset,
        )

    async def _digest(self, body: Any, length: int) -> str:
        """SHA-256 of the body in hex. Kept with a body that can hold it, so a resend costs none."""
        # A batch keeps its digest; what is asked about a stream is plain bytes, which cannot.
        kept = getattr(body, "digest", None)
        if isinstance(kept, str):
            return kept
        if length <= INLINE_BYTES:
            digest = sha256(body).hexdigest()
        else:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(HASH_THREADS, "fastkin-hash", _step_back)
            loop = asyncio.get_running_loop()
            digest = await loop.run_in_executor(self._threads, _sha256, body)
        if hasattr(body, "digest"):
            body.digest = digest
        return digest

    def _resent(self, body: Buffer) -> None:
        if self.on_resend is not None:
            self.on_resend(body)

    def _new_pool(self, base: str) -> HttpPool:
        kinesis = self.kinesis
        pool = self._pools[base] = HttpPool(
            base,
            max_connections=kinesis.max_connections,
            connect_timeout_s=kinesis.connect_timeout_s,
            request_timeout_s=kinesis.request_timeout_s,
            ssl_context=self._tls.context if self._tls is not None else None,
            ca_bundle=bundle_path(kinesis),
            # The other side must not close first: a call on a connection that is just being closed is lost and sent
            # again.
            idle_s=IDLE_AWS_S if is_aws(base) else IDLE_FOREIGN_S,
            on_resend=self._resent,
        )
        return pool


def _step_back() -> None:
    """The loop's thread goes first when cores are scarce: 1 to 2 ms less lateness at p99 on a busy machine."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + 5)


def _sha256(body: Buffer) -> str:
    return sha256(body).hexdigest()
