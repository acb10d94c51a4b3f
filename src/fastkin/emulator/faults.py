"""Faults on demand: what goes wrong, when, and how often.

To add a kind: its word in `Kind`, and its row in `EFFECTS`. Only a kind that does what none did before needs a field of
`Plan` too, and the place in server.py that looks at it.

A fault says what happens (`kind` and its details) and when (`times`, `skip`, `every`,
`probability`, `after_s`, `for_s`, `stream`, `operation`). In code:

    emulator.faults.record("InternalFailure", every=10)          one record in ten, for ever
    emulator.faults.call("ServiceUnavailable", times=3)          the next three calls
    emulator.faults.cut("after", times=1)                        stored, but the answer never comes
    emulator.faults.record(shard=0, for_s=30).remove()           removable

In a file for `fastkin emulator --faults FILE`: one JSON object a line with the same names (empty
lines and those that start with # are skipped), or TOML with [[fault]] tables when it ends in .toml.

    {"kind": "record", "code": "ProvisionedThroughputExceededException", "shard": 1, "for_s": 30}
    {"kind": "latency", "ms": 250, "probability": 0.05, "seed": 7}
"""

from __future__ import annotations

import random
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping  # noqa: TC003 - who reads our annotations needs it
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, TypedDict, Unpack, get_args

import orjson

from .streams import THROTTLED, Shard, throttle_message

Kind = Literal["record", "call", "latency", "cut", "slow", "count", "html", "early", "garbage", "silent"]
Where = Literal["before", "after", "inside"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
WHERES: Final[tuple[Where, ...]] = get_args(Where)
SILENT_S: Final = 86_400.0  # longer than anybody waits for an answer

# docs.aws.amazon.com/kinesis/latest/APIReference/CommonErrors.html and API_PutRecords.html;
# a code that is not here is a 400.
STATUS: Final[Mapping[str, int]] = {
    "InternalFailure": 500,
    "InternalFailureException": 500,
    "ServiceUnavailable": 503,
    "ServiceUnavailableException": 503,
    "AccessDeniedException": 400,
    "RequestEntityTooLarge": 413,
    # of STS: docs.aws.amazon.com/STS/latest/APIReference/CommonErrors.html
    "AccessDenied": 403,
    "RegionDisabledException": 403,
}
MESSAGES: Final[Mapping[str, str]] = {
    "InternalFailure": "Internal service failure.",
    "InternalFailureException": "Internal service failure.",
    "ServiceUnavailable": "Service is unavailable. Please try again.",
    "ServiceUnavailableException": "Service is unavailable. Slow down.",
    "ExpiredTokenException": "The security token included in the request is expired",
    "UnrecognizedClientException": "The security token included in the request is invalid.",
    "AccessDenied": "User is not authorized to perform: sts:AssumeRole",
    "AccessDeniedException": "User is not authorized to perform: kinesis:PutRecords",
    "LimitExceededException": "Rate exceeded",
    "ThrottlingException": "Rate exceeded",
    "KMSThrottlingException": "The rate of requests to KMS is too high.",
    THROTTLED: "Rate exceeded for stream under account.",
}


class When(TypedDict, total=False):
    """When a fault strikes; every part is optional."""

    times: int | None
    skip: int
    every: int
    probability: float
    seed: int
    after_s: float
    for_s: float | None
    stream: str | None
    operation: str


@dataclass(slots=True, kw_only=True)
class Fault:
    """One scripted fault. `hits`: how often it struck, in records for `record`, else in calls."""

    kind: Kind
    # what happens
    code: str = ""
    message: str | None = None
    status: int | None = None
    ms: float = 0.0
    where: Where = "after"
    delta: int = -1  # entries the answer has too many (or too few)
    stored: bool = False  # the answer is an error, the records are stored all the same
    body: bytes | None = None  # the answer's body (`garbage` only)
    # which records (`record` only; `contains` also for `call`)
    shard: int | str | None = None
    contains: bytes | None = None
    key: str | None = None
    match: Callable[[Shard, str | None, bytes], bool] | None = None
    # when
    times: int | None = None  # strikes at most this often
    skip: int = 0  # lets the first ones pass
    every: int = 1  # strikes each nth that matches
    probability: float = 1.0
    seed: int = 0
    after_s: float = 0.0  # from when it was added
    for_s: float | None = None
    stream: str | None = None
    operation: str = "put"  # "put": PutRecords, PutRecord, PutRecordBatch; "*": every call; or a name

    hits: int = 0
    _seen: int = 0
    _random: random.Random = field(default_factory=random.Random, repr=False)
    _owner: Faults | None = field(default=None, repr=False)
    _begin: float = 0.0

    def remove(self) -> None:
        if self._owner is not None:
            self._owner.discard(self)

    @property
    def spent(self) -> bool:
        return self.times is not None and self.hits >= self.times

    def concerns(self, operation: str, stream: str | None) -> bool:
        if self.stream is not None and stream != self.stream:
            return False
        if self.operation == "put":
            return operation.startswith("PutRecord")
        return self.operation in ("*", operation)

    def strikes(self, now: float) -> bool:
        """Whether it strikes this time; counts."""
        passed = now - self._begin
        if self.spent or passed < self.after_s or (self.for_s is not None and passed >= self.after_s + self.for_s):
            return False
        self._seen += 1
        if self._seen <= self.skip or (self._seen - self.skip) % self.every:
            return False
        if self.probability < 1.0 and self._random.random() >= self.probability:
            return False
        self.hits += 1
        return True

    def fits(self, shard: Shard, key: str | None, data: bytes) -> bool:
        if self.shard is not None and self.shard not in (shard.index, shard.id):
            return False
        if self.key is not None and self.key != key:
            return False
        if self.contains is not None and self.contains not in data:
            return False
        return self.match is None or self.match(shard, key, data)

    @property
    def http_status(self) -> int:
        return self.status if self.status is not None else STATUS.get(self.code, 400)

    @property
    def text(self) -> str:
        return self.message if self.message is not None else MESSAGES.get(self.code, self.code)


@dataclass(slots=True)
class Plan:
    """What happens to one call: several faults may strike it."""

    delay_s: float = 0.0  # before the answer
    error: Fault | None = None  # the answer is this error
    cut: Where | None = None
    slow_s: float = 0.0  # in which the body of the answer dribbles out
    delta: int = 0  # entries the answer has too many
    rewrite: Callable[[bytes], bytes] | None = None  # makes another body of that of a 200 answer

    def refuse(self, fault: Fault) -> None:
        self.error = self.error or fault

    def delay(self, fault: Fault) -> None:
        self.delay_s += fault.ms / 1000

    def dribble(self, fault: Fault) -> None:
        self.slow_s += fault.ms / 1000

    def miscount(self, fault: Fault) -> None:
        self.delta += fault.delta

    def cut_off(self, fault: Fault) -> None:
        self.cut = self.cut or fault.where

    def silence(self, fault: Fault) -> None:
        self.cut = self.cut or ("after" if fault.stored else "before")
        self.delay_s += SILENT_S

    def replace(self, fault: Fault) -> None:
        self.rewrite = self.rewrite or (lambda _: fault.body or b"")


# What each kind does to a call that it strikes. Two are not here: `record` strikes as the records of a call are stored,
# `early` before the body of a call is read.
EFFECTS: Final[Mapping[Kind, Callable[[Plan, Fault], None]]] = {
    "call": Plan.refuse,
    "html": Plan.refuse,
    "latency": Plan.delay,
    "slow": Plan.dribble,
    "count": Plan.miscount,
    "cut": Plan.cut_off,
    "garbage": Plan.replace,
    "silent": Plan.silence,
}


class Faults:
    """The faults that are set now; `clear()` ends them all."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._faults: list[Fault] = []
        self.calls: list[Fault] = []
        self.records: list[Fault] = []
        self.earlies: list[Fault] = []

    def __iter__(self) -> Iterator[Fault]:
        return iter(tuple(self._faults))

    def __len__(self) -> int:
        return len(self._faults)

    # --- what can go wrong ---------------------------------------------------------------------

    def record(
        self,
        code: str = THROTTLED,
        message: str | None = None,
        *,
        shard: int | str | None = None,
        contains: bytes | None = None,
        key: str | None = None,
        match: Callable[[Shard, str | None, bytes], bool] | None = None,
        **when: Unpack[When],
    ) -> Fault:
        """Single records of a PutRecords call fail; the others are stored."""
        return self.add(
            Fault(
                kind="record",
                code=code,
                message=message,
                shard=shard,
                contains=contains,
                key=key,
                match=match,
                **when,
            )
        )

    def call(
        self,
        code: str,
        message: str | None = None,
        *,
        status: int | None = None,
        stored: bool = False,
        contains: bytes | None = None,
        **when: Unpack[When],
    ) -> Fault:
        """The whole call is refused with this error type. `stored`: as a 5xx may, after it stored the records.
        `contains`: only calls with such a record, as when one record spoils the call."""
        return self.add(
            Fault(kind="call", code=code, message=message, status=status, stored=stored, contains=contains, **when)
        )

    def throttle(self, **when: Unpack[When]) -> Fault:
        """The whole call is refused for its rate."""
        return self.call(THROTTLED, **when)

    def expired_token(self, **when: Unpack[When]) -> Fault:
        return self.call("ExpiredTokenException", **when)

    def html(self, status: int = 503, *, stored: bool = False, **when: Unpack[When]) -> Fault:
        """A front end answers instead of Kinesis: a status and a page of HTML. `stored`: it lost the real answer."""
        return self.add(Fault(kind="html", status=status, stored=stored, **when))

    def garbage(self, body: bytes = b"", **when: Unpack[When]) -> Fault:
        """The records are stored, the answer is 200 with this body."""
        return self.add(Fault(kind="garbage", body=body, **when))

    def latency(self, ms: float, **when: Unpack[When]) -> Fault:
        """The answer comes `ms` later."""
        return self.add(Fault(kind="latency", ms=ms, **when))

    def cut(self, where: Where = "after", **when: Unpack[When]) -> Fault:
        """The connection breaks: before storing, after it without an answer, or in the answer."""
        return self.add(Fault(kind="cut", where=where, **when))

    def silent(self, *, stored: bool = False, **when: Unpack[When]) -> Fault:
        """The call is read and never answered, as by a service that hangs; the connection stays. `stored`: and yet its
        records are stored."""
        return self.add(Fault(kind="silent", stored=stored, **when))

    def slow(self, ms: float, **when: Unpack[When]) -> Fault:
        """The body of the answer dribbles out over `ms`."""
        return self.add(Fault(kind="slow", ms=ms, **when))

    def wrong_count(self, delta: int = -1, **when: Unpack[When]) -> Fault:
        """The records are stored, but the answer has `delta` entries too many or too few."""
        return self.add(Fault(kind="count", delta=delta, **when))

    def early(self, code: str = "RequestEntityTooLarge", *, status: int = 413, **when: Unpack[When]) -> Fault:
        """The answer comes after the request's headers, before its body; nothing is stored."""
        return self.add(Fault(kind="early", code=code, status=status, **when))

    # --- the list ------------------------------------------------------------------------------

    def add(self, fault: Fault) -> Fault:
        if fault.kind not in KINDS:
            raise ValueError(f"fault kind {fault.kind!r} is unknown: use one of {', '.join(KINDS)}")
        if fault.where not in WHERES:
            raise ValueError(f"cut where {fault.where!r}? Use one of {', '.join(WHERES)}")
        if fault.kind in ("record", "call") and not fault.code:
            raise ValueError(f"a {fault.kind!r} fault needs a code, such as InternalFailure")
        if fault.every < 1 or fault.skip < 0:
            raise ValueError("every must be 1 or more, skip 0 or more")
        fault._owner = self
        fault._begin = self._clock()
        fault._random = random.Random(fault.seed)
        self._faults.append(fault)
        self._sort()
        return fault

    def discard(self, fault: Fault) -> None:
        if fault in self._faults:
            self._faults.remove(fault)
            self._sort()

    def clear(self) -> None:
        self._faults.clear()
        self._sort()

    def load(self, path: str | Path) -> list[Fault]:
        """Adds the faults of a file; their times count from now."""
        path = Path(path)
        text = path.read_text()
        if path.suffix == ".toml":
            return [self.parse(each, f"{path}") for each in tomllib.loads(text).get("fault", [])]
        return self.parse_lines(text, str(path))

    def parse_lines(self, text: str, place: str) -> list[Fault]:
        added = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip() and not line.lstrip().startswith("#"):
                try:
                    entry = orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    raise ValueError(f"{place}:{number}: not JSON: {error}") from None
                added.append(self.parse(entry, f"{place}:{number}"))
        return added

    def parse(self, entry: Mapping[str, Any], place: str) -> Fault:
        known = {each.name for each in fields(Fault) if not each.name.startswith("_")}
        known -= {"match", "hits"}
        unknown = sorted(set(entry) - known) if isinstance(entry, dict) else None
        if unknown is None or unknown:
            what = f"unknown key {unknown[0]!r}" if unknown else "not an object"
            raise ValueError(f"{place}: {what}; known keys are {', '.join(sorted(known))}")
        values = dict(entry)
        for name in ("contains", "body"):
            if isinstance(values.get(name), str):
                values[name] = values[name].encode()
        if values.get("kind") == "record":
            values.setdefault("code", THROTTLED)
        try:
            return self.add(Fault(**values))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{place}: {error}") from None

    # --- what the server asks ------------------------------------------------------------------

    def plan(self, operation: str, stream: str | None, datas: Callable[[], list[bytes]] = list) -> Plan:
        """`datas` gives the records of the call, should a fault want to see them."""
        plan = Plan()
        now = self._clock()
        for fault in tuple(self.calls):
            if not fault.concerns(operation, stream):
                continue
            if fault.contains is not None and not any(fault.contains in data for data in datas()):
                continue
            if not fault.strikes(now):
                continue
            EFFECTS[fault.kind](plan, fault)
            if fault.spent:
                self.discard(fault)
        return plan

    def early_answer(self, operation: str) -> Fault | None:
        now = self._clock()
        for fault in tuple(self.earlies):
            if fault.concerns(operation, fault.stream) and fault.strikes(now):
                if fault.spent:
                    self.discard(fault)
                return fault
        return None

    def for_records(
        self, operation: str, stream: str, account: str
    ) -> Callable[[Shard, str | None, bytes], tuple[str, str] | None] | None:
        """Judges the records of one call, or None when no fault concerns it."""
        concerned = [fault for fault in self.records if not fault.spent and fault.concerns(operation, stream)]
        if not concerned:
            return None
        now = self._clock()

        def judge(shard: Shard, key: str | None, data: bytes) -> tuple[str, str] | None:
            for fault in concerned:
                if fault.fits(shard, key, data) and fault.strikes(now):
                    if fault.code == THROTTLED and fault.message is None:
                        return fault.code, throttle_message(shard.id, stream, account)
                    return fault.code, fault.text
            return None

        return judge

    def _sort(self) -> None:
        self.records = [fault for fault in self._faults if fault.kind == "record"]
        self.earlies = [fault for fault in self._faults if fault.kind == "early"]
        self.calls = [fault for fault in self._faults if fault.kind in EFFECTS]
