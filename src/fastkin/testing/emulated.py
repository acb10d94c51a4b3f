"""What a test does with an emulated Kinesis: looks at what is stored, and lets calls go wrong."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping  # noqa: TC003 - who reads our annotations needs these and the following
from typing import Any, Literal, Self, TypedDict, TypeVar, Unpack

import orjson

from fastkin.emulator import Counters, Emulator, Fault, Secret, StoredRecord, StreamSpec
from fastkin.emulator.faults import When  # noqa: TC001
from fastkin.emulator.streams import THROTTLED
from fastkin.lambdas import deaggregate
from fastkin.testing.environment import aws_environment

T = TypeVar("T")

STREAM = "test"  # what there is when nobody says which streams there are
_SHOWN = 60  # bytes of a record that an error shows


class EmulatorOptions(TypedDict, total=False):
    """What else may be said of an emulator: see `fastkin.emulator.Emulator`."""

    firehose: list[str]
    limits: bool
    read_limits: bool
    latency_ms: float
    credentials: Mapping[str, str | Secret] | None
    roles: Mapping[str, str | None] | None
    region: str
    account: str
    create_ms: float
    max_request_bytes: int
    max_records: int


class ActiveFault:
    """A fault that is in effect until it is used up or removed; `with` removes it at the end of the block."""

    def __init__(self, kinesis: EmulatedKinesis, fault: Fault) -> None:
        self._kinesis = kinesis
        self._fault = fault

    def __repr__(self) -> str:
        return f"<ActiveFault {self._fault.kind} hits={self._fault.hits}>"

    @property
    def hits(self) -> int:
        """How often it struck: records where single records fail, else calls."""
        return self._fault.hits

    def remove(self) -> None:
        """Ends it; once more does no harm."""
        self._kinesis._run(self._fault.remove)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class EmulatedKinesis:
    """What `ThreadEmulator` and `AsyncEmulator` have in common.

    streams   name -> number of shards (or a StreamSpec); without it there is one stream "test" of one shard
    environ   while it runs, the AWS variables of this process lead to it: see `aws_environment`
    options   of `fastkin.emulator.Emulator`: limits=False, roles={...}, firehose=[...], region="eu-west-1"
    """

    def __init__(
        self,
        streams: Mapping[str, int | StreamSpec] | None = None,
        *,
        environ: bool = True,
        **options: Unpack[EmulatorOptions],
    ) -> None:
        """ValueError for a stream without a shard."""
        self.emulator: Emulator = Emulator({STREAM: 1} if streams is None else streams, **options)
        self.region: str = options.get("region", "us-east-1")
        self._environ = environ
        self._left = contextlib.ExitStack()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url} {', '.join(self._names())}>"

    def _run(self, what: Callable[[], T]) -> T:
        """Does it where the emulator runs."""
        return what()

    def _enter(self) -> None:
        if self._environ:
            self._left.enter_context(aws_environment(self.url, self.region))

    # --- looking -------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT`, for clients that do not ask the environment."""
        return self.emulator.url

    @property
    def counters(self) -> Counters:
        """Calls, records, throttles and more, of now; by operation in `counters.operations`."""
        return self._run(lambda: self.emulator.counters)

    def create_stream(self, name: str, shards: int = 1) -> None:
        """One more stream, ready at once."""
        self._run(lambda: self.emulator.service.add_stream(name, StreamSpec(shards=shards)))

    def stored(self, stream: str | None = None) -> list[StoredRecord]:
        """Every record of the stream (or delivery stream) as Kinesis has it, by arrival; within a call by shard.

        Without a name: of the only stream there is. LookupError when there is no such stream, or when there are more.
        """
        name = self._name(stream)
        return self._run(lambda: self.emulator.stored(name))

    def stored_data(self, stream: str | None = None) -> list[bytes]:
        """The data of every record, KPL aggregates taken apart. LookupError as `stored`."""
        return [data for record in self.stored(stream) for _, data in deaggregate(record.data)]

    def stored_json(self, stream: str | None = None) -> list[Any]:
        """The JSON value of every record: KPL aggregates are taken apart, and a record of several lines
        (`aggregation = "lines"`) is a value for each. LookupError as `stored`; ValueError for a record that is no JSON.
        """
        name = self._name(stream)
        return [value for at, data in enumerate(self.stored_data(name)) for value in _values(data, at, name)]

    async def until_stored(self, count: int, stream: str | None = None, timeout: float = 10.0) -> None:
        """Until the stream holds so many records, KPL aggregates taken apart. TimeoutError says how many it holds after
        `timeout` seconds; LookupError as `stored`."""
        name = self._name(stream)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while len(self.stored_data(name)) < count:
                    # Each Kinesis record may hold several: whenever one more has come they are counted anew.
                    await self.emulator.wait_stored(name, self.emulator.stored_count(name) + 1, timeout=2 * timeout + 1)
                return
        have = len(self.stored_data(name))
        if have < count:
            raise TimeoutError(f"stream {name!r} holds {have} records after {timeout:g} s, not {count}")

    def _names(self) -> list[str]:
        service = self.emulator.service
        return [*service.streams, *service.deliveries]

    def _name(self, stream: str | None) -> str:
        names = self._names()
        if stream is None and len(names) == 1:
            return names[0]
        if stream is None:
            raise LookupError(f"there are {len(names)} streams: say which one of {', '.join(names) or 'none'}")
        if stream not in names:
            raise LookupError(
                f"there is no stream {stream!r}, only {', '.join(names) or 'none'}: make it with"
                f" create_stream({stream!r}), or begin with streams={{{stream!r}: 1}}"
            )
        return stream

    # --- what goes wrong; `when` says how often: times=3, skip=1, every=10, for_s=2.0, stream="welders" ---

    def throttle(self, **when: Unpack[When]) -> ActiveFault:
        """Every record is refused for its rate, as by a shard that has no room."""
        return self._fault(lambda: self.emulator.faults.record(THROTTLED, **when))

    def fail_entries(
        self,
        code: str = "InternalFailure",
        message: str | None = None,
        *,
        contains: bytes | None = None,
        key: str | None = None,
        shard: int | str | None = None,
        **when: Unpack[When],
    ) -> ActiveFault:
        """Single records of a call fail with this code, the others are stored: `every=10`, or those whose data
        `contains` this, with this partition `key`, or on this `shard`."""
        return self._fault(
            lambda: self.emulator.faults.record(code, message, contains=contains, key=key, shard=shard, **when)
        )

    def fail_calls(
        self,
        code: str = "ServiceUnavailable",
        message: str | None = None,
        *,
        stored: bool = False,
        **when: Unpack[When],
    ) -> ActiveFault:
        """Whole calls fail with this code; `stored`: though the records were stored, as after a 5xx on the way back.
        Other calls than those that put need `operation`: "AssumeRole", "GetRecords", "*"."""
        return self._fault(lambda: self.emulator.faults.call(code, message, stored=stored, **when))

    def latency(self, ms: float, **when: Unpack[When]) -> ActiveFault:
        """Every answer comes so many milliseconds later."""
        return self._fault(lambda: self.emulator.faults.latency(ms, **when))

    def silent(self, *, stored: bool = False, **when: Unpack[When]) -> ActiveFault:
        """Calls are read and never answered, as by a service that hangs; `stored`: and yet their records are stored."""
        return self._fault(lambda: self.emulator.faults.silent(stored=stored, **when))

    def cut(self, where: Literal["before", "after", "inside"] = "after", **when: Unpack[When]) -> ActiveFault:
        """The connection breaks: before storing, after it without an answer, or within the answer."""
        return self._fault(lambda: self.emulator.faults.cut(where, **when))

    def clear_faults(self) -> None:
        """From now on nothing goes wrong."""
        self._run(self.emulator.faults.clear)

    def _fault(self, make: Callable[[], Fault]) -> ActiveFault:
        return ActiveFault(self, self._run(make))


class AsyncEmulator(EmulatedKinesis):
    """An emulated Kinesis in the running loop. Use it from there only; `ThreadEmulator` is for everything else.

    async with AsyncEmulator({"welders": 4}) as kinesis:
        await report(21.5)
        assert kinesis.stored_json("welders") == [{"celsius": 21.5}]
    """

    async def __aenter__(self) -> Self:
        await self.emulator.start()
        self._enter()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._left.close()
        await self.emulator.close()


def _values(data: bytes, at: int, stream: str) -> list[Any]:
    try:
        return [orjson.loads(data)]
    except orjson.JSONDecodeError as whole:
        lines = data.splitlines()
        if len(lines) > 1:
            with contextlib.suppress(orjson.JSONDecodeError):
                return [orjson.loads(line) for line in lines if line]
        shown = data[:_SHOWN]
        more = "..." if len(data) > _SHOWN else ""
        raise ValueError(
            f"record {at} of stream {stream!r} is no JSON ({whole}): {shown!r}{more}; stored_data() has the bytes"
        ) from None
