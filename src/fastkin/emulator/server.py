"""The `Emulator`: starts and stops, is looked at and steered, and answers a call.

Its connections are in `connection.py`, the text of heads and pages in `pages.py`, what another process may ask for in
`admin.py`, the operations behind `service.py`.
"""

from __future__ import annotations

import asyncio
import ssl  # noqa: TC003 - who reads our annotations needs it
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path  # noqa: TC003
from types import MappingProxyType
from typing import Any, Self, TypeAlias

from . import sts
from .admin import admin
from .connection import Connection, Put, Request
from .faults import Faults, Plan
from .pages import Pages
from .rules import ApiError
from .service import Service
from .signature import SKEW_S, Secret, Verifier
from .state import StreamSpec
from .streams import MIB, Keep, StoredRecord
from .sts import Sts
from .wire import CBOR, JSON, WireError, dumps, loads

Streams: TypeAlias = Mapping[str, "int | StreamSpec"] | Iterable["str | tuple[str, int]"]


@dataclass(slots=True)
class Counters:
    """What happened so far. `records` are stored, `failed` struck by a fault, `refused` calls."""

    calls: int = 0
    records: int = 0
    record_bytes: int = 0
    throttled: int = 0
    failed: int = 0
    refused: int = 0
    cut: int = 0
    connections: int = 0
    body_bytes: int = 0
    max_concurrent: int = 0
    max_records_in_call: int = 0
    operations: dict[str, int] = field(default_factory=dict)


class Emulator:
    """A Kinesis that behaves, on a loopback port of this process.

        async with Emulator({"welders": 4}) as emulator:
            ... emulator.url ...
            emulator.faults.record("InternalFailure", every=10)
            assert len(emulator.stored("welders")) == 1000

    streams             name -> number of shards, or a StreamSpec
    firehose            names of delivery streams for PutRecordBatch
    limits              1,000 records/s and 1 MiB/s per shard, one second's worth at once
    read_limits         5 GetRecords and 2 MiB a second per shard
    latency_ms          every answer comes that much later
    keep                "all": what is stored can be read back; "count": only counted
    count_only          no validation, routing or limits: answers from a template, for benches
    max_request_bytes   10 MiB as AWS now; 5 MiB is what it was until October 2025
    credentials         access key id -> secret (or Secret): signatures are checked; None: not
    roles               ARN of a role that STS gives keys of -> the external id it asks for, or None; None: any role
    skew_s              how far a signed date may be off; None: not checked
    create_ms           how long a new stream stays CREATING
    """

    def __init__(
        self,
        streams: Streams = (),
        *,
        limits: bool = True,
        read_limits: bool = False,
        latency_ms: float = 0.0,
        host: str = "127.0.0.1",
        port: int = 0,
        keep: Keep = "all",
        count_only: bool = False,
        firehose: Iterable[str] = (),
        max_request_bytes: int = 10 * MIB,
        max_records: int = 500,
        credentials: Mapping[str, str | Secret] | None = None,
        roles: Mapping[str, str | None] | None = None,
        skew_s: float | None = SKEW_S,
        region: str = "us-east-1",
        account: str = "123456789012",
        create_ms: float = 0.0,
        ssl_context: ssl.SSLContext | None = None,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.faults: Faults = Faults(clock)
        self.latency_s: float = latency_ms / 1000
        self.count_only = count_only
        self.service: Service = Service(
            region=region,
            account=account,
            limits=limits,
            read_limits=read_limits,
            keep=keep,
            max_request_bytes=max_request_bytes,
            max_records=max_records,
            create_s=create_ms / 1000,
            faults=self.faults,
            wall=wall,
            clock=clock,
        )
        for name, spec in parse_streams(streams).items():
            self.service.add_stream(name, spec)
        for name in firehose:
            self.service.add_delivery(name)
        self.verifier: Verifier | None = (
            None if credentials is None else Verifier(credentials, region=region, skew_s=skew_s)
        )
        self.sts: Sts = Sts(account=account, roles=roles, verifier=self.verifier, wall=wall)
        self.puts: list[Put] = []  # with keep="all": what bounds the duplicates that a caller may make
        self._counters = Counters()
        self._counted = 0
        self._concurrent = 0
        self._host = host
        self._port = port
        self._ssl = ssl_context
        self._server: asyncio.Server | None = None
        self._connections: set[Connection] = set()
        self._waiters: list[tuple[str, int, asyncio.Future[None]]] = []
        self._templates: dict[int, bytes] = {}
        self.pages: Pages = Pages(wall)

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Connection(self, loop),
            self._host,
            self._port,
            ssl=self._ssl,
            backlog=1024,
            reuse_address=True,
        )
        self._port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stops listening and cuts what is still connected."""
        if self._server is not None:
            self._server.close()
            for connection in tuple(self._connections):
                connection.abort()
            await self._server.wait_closed()
            self._server = None
        for _, _, waiter in self._waiters:
            waiter.cancel()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def url(self) -> str:
        return f"{'https' if self._ssl else 'http'}://{self._host}:{self._port}"

    @property
    def port(self) -> int:
        return self._port

    # --- looking and steering ------------------------------------------------------------------

    @property
    def counters(self) -> Counters:
        counters, service = self._counters, self.service
        counters.records = service.records + self._counted
        counters.record_bytes = service.record_bytes
        counters.throttled = service.throttled
        counters.failed = service.failed
        counters.max_records_in_call = service.largest_call
        return counters

    def stored(self, name: str) -> list[StoredRecord]:
        """The ledger: every record stored in the stream (or delivery stream), by arrival."""
        delivery = self.service.deliveries.get(name)
        if delivery is not None:
            return [
                StoredRecord("", str(number), None, data, arrival, None)
                for number, (arrival, data) in enumerate(delivery.records)
            ]
        return self.service.streams[name].stored()

    def stored_count(self, name: str) -> int:
        delivery = self.service.deliveries.get(name)
        return delivery.count if delivery is not None else self.service.streams[name].records

    async def wait_stored(self, name: str, count: int, timeout: float = 30.0) -> None:
        """Until the stream holds `count` records."""
        if self.stored_count(name) >= count:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((name, count, waiter))
        try:
            async with asyncio.timeout(timeout):
                await waiter
        except TimeoutError:
            have = self.stored_count(name)
            raise TimeoutError(f"{name} holds {have} records after {timeout} s, not {count}") from None

    def scale_limits(self, name: str | float, factor: float | None = None, *, shard: int | None = None) -> None:
        """Makes a stream's limits `factor` times AWS's: `scale_limits("welders", 0.1)`. A number
        alone means every stream; `shard` means only that one."""
        if factor is None:
            assert not isinstance(name, str), "scale_limits(name, factor)"
            factor, streams = name, list(self.service.streams.values())
        else:
            streams = [self.service.streams[str(name)]]
        now = self.service.clock()
        for stream in streams:
            stream.set_factor(factor, now, None if shard is None else stream.shards[shard])

    def set_limits(self, on: bool, name: str | None = None) -> None:
        """Switches the shard limits of one stream, or of all that are there now."""
        now = self.service.clock()
        for stream in self.service.streams.values():
            if name in (None, stream.name):
                stream.limit(on, now)

    def drop_connections(self) -> int:
        """Resets every open connection, as a load balancer that goes away; says how many."""
        connections = tuple(self._connections)
        for connection in connections:
            connection.abort()
        return len(connections)

    # --- what a connection asks ----------------------------------------------------------------

    def joined(self, connection: Connection) -> None:
        self._connections.add(connection)
        self._counters.connections += 1

    def left(self, connection: Connection) -> None:
        self._connections.discard(connection)

    def was_cut(self) -> None:
        """An answer was not written, or not whole, because a fault wanted it."""
        self._counters.cut += 1

    def begin(self) -> None:
        self._concurrent += 1
        self._counters.max_concurrent = max(self._counters.max_concurrent, self._concurrent)

    def end(self) -> None:
        self._concurrent -= 1

    def answer(self, request: Request) -> tuple[bytes, bytes, Plan]:
        """Head, body, and what else happens to the call."""
        counters = self._counters
        target = request.headers.get("x-amz-target", "")
        operation = target.rpartition(".")[2]
        form = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.path.startswith("/_emulator/"):
            status, page = admin(self, request.method, request.path, request.body)
            return (*self.pages.page(status, page, "application/json"), Plan())
        if request.method == "POST" and form == sts.FORM:
            return sts.answer(self, request)
        if request.method != "POST" or form not in (JSON, CBOR):
            return (*self.pages.page(404, "<UnknownOperationException/>\n"), Plan())
        self.count_call(operation, request)
        plan = Plan()
        try:
            if request.early is not None:
                raise ApiError(request.early.code, request.early.text, request.early.http_status)
            if not self.service.knows(target):
                raise ApiError("UnknownOperationException", f"{target!r} is not emulated")
            self.verify(request, target.partition("_")[0].lower())
            counting = self.count_only and operation == "PutRecords"
            fields = {} if counting else self._fields(request.body, form)
            plan = self.plan(operation, fields)
            failed = plan.error
            if failed is not None and not failed.stored:
                raise ApiError(failed.code, failed.text, failed.http_status)
            if plan.cut == "before":
                body = b""
            elif counting:
                body = self._count_only(request.body, form)
            else:
                before = self.service.records
                body = self.service.run(operation, fields, form)
                self._note(request, self.service.records - before)
            if failed is not None:
                raise ApiError(failed.code, failed.text, failed.http_status)
        except ApiError as error:
            counters.refused += 1
            if plan.error is not None and plan.error.kind == "html":
                return (*self.pages.html(plan.error.http_status), plan)
            body = dumps({"__type": error.code, "message": error.message}, form)
            return self.pages.head(error.status, form, len(body), counters.calls, error.code), body, plan
        if plan.rewrite is not None:
            body = plan.rewrite(body)
        elif plan.delta:
            body = _recount(body, form, plan.delta)
        if self._waiters and plan.cut != "before":
            self._wake()
        return self.pages.head(200, form, len(body), counters.calls), body, plan

    def count_call(self, operation: str, request: Request) -> int:
        """The number of this call."""
        counters = self._counters
        counters.calls += 1
        counters.body_bytes += len(request.body)
        counters.operations[operation] = counters.operations.get(operation, 0) + 1
        return counters.calls

    def verify(self, request: Request, service: str) -> None:
        """Raises ApiError unless a known key signed the request, where signatures are checked."""
        if self.verifier is not None:
            self.verifier.check(
                method=request.method,
                target=request.path,
                headers=request.headers,
                body=request.body,
                service=service,
                wall=self.service.wall(),
            )

    @staticmethod
    def _fields(body: bytes, form: str) -> dict[str, Any]:
        try:
            return loads(body or b"{}", form)
        except WireError as error:
            raise ApiError("SerializationException", str(error)) from None

    def plan(self, operation: str, fields: Mapping[str, Any] = MappingProxyType({})) -> Plan:
        """What happens to this call; counts."""
        plan = Plan()
        if self.faults.calls:
            stream = self.service.stream_name(fields)
            plan = self.faults.plan(operation, stream, lambda: self.service.datas(fields))
        plan.delay_s += self.latency_s
        return plan

    def _count_only(self, body: bytes, form: str) -> bytes:
        # A payload is base64 and a quote inside a key is escaped: neither can look like this.
        count = body.count(b'"Data":') if form == JSON else len(loads(body, form)["Records"])
        self._counted += count
        self.service.largest_call = max(self.service.largest_call, count)
        template = self._templates.get(count) if form == JSON else None
        if template is None:
            entry = {"SequenceNumber": "4" * 56, "ShardId": "shardId-000000000000"}
            template = dumps({"FailedRecordCount": 0, "Records": [entry] * count}, form)
            if form == JSON:
                self._templates[count] = template
        return template

    def _note(self, request: Request, stored: int) -> None:
        if stored and self.service.keep == "all":
            request.put = Put(request.port, stored)
            self.puts.append(request.put)
        if self._waiters:
            self._wake()

    def _wake(self) -> None:
        for entry in tuple(self._waiters):
            name, count, waiter = entry
            if waiter.done() or self.stored_count(name) >= count:
                self._waiters.remove(entry)
                if not waiter.done():
                    waiter.set_result(None)


def parse_streams(streams: Streams) -> dict[str, StreamSpec]:
    """Mapping or pairs or "NAME:SHARDS" texts, as the command line has them."""
    pairs: Iterable[Any] = streams.items() if isinstance(streams, Mapping) else streams
    parsed = {}
    for each in pairs:
        name, spec = each.rpartition(":")[::2] if isinstance(each, str) else each
        if isinstance(each, str) and not name:
            name, spec = spec, 1
        if not isinstance(spec, StreamSpec):
            try:
                spec = StreamSpec(shards=int(spec))
            except ValueError:
                raise ValueError(f"{each!r} is not NAME:SHARDS") from None
        if spec.shards < 1:
            raise ValueError(f"stream {name!r} needs at least one shard")
        parsed[name] = spec
    return parsed


def _recount(body: bytes, form: str, delta: int) -> bytes:
    """The same answer with too few or too many entries."""
    answer = loads(body, form)
    for name in ("Records", "RequestResponses"):
        entries = answer.get(name)
        if isinstance(entries, list):
            answer[name] = entries[:delta] if delta < 0 else entries + entries[-1:] * delta
    return dumps(answer, form)


async def serve(
    *,
    port: int = 4567,
    streams: Streams = (),
    limits: bool = True,
    latency_ms: float = 0.0,
    faults_path: str | Path | None = None,
    ready: Callable[[Emulator], None] | None = None,
    **options: Any,
) -> None:
    """Runs an emulator until it is cancelled; `ready` is called once it listens."""
    emulator = Emulator(streams, port=port, limits=limits, latency_ms=latency_ms, **options)
    if faults_path is not None:
        emulator.faults.load(faults_path)
    async with emulator:
        if ready is not None:
            ready(emulator)
        await asyncio.get_running_loop().create_future()
