# Per-record work, compiled: frames, keys, size accounting, batches, request bodies, answers.
# The docstrings are in the compiled module.

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Generic, Literal, Self, TypeVar, final, overload

from typing_extensions import Buffer, disjoint_base

from fastkin.errors import DataFormatError
from fastkin.results import FrameResult, PutResult

_T = TypeVar("_T")
_End = TypeVar("_End")
_T_co = TypeVar("_T_co", covariant=True)

STORED: int
DEAD: int
FILTERED: int
DROPPED: int
FAILED: int
SPOOLED: int  # durable on disk: who waits is told, the record has not ended

# why a batch was closed (index into Batcher.flushes)
FULL_COUNT: int
FULL_BYTES: int
LINGER: int
WINDOW: int
IDLE: int
DRAIN: int

def encode_frame(records: Iterable[Buffer]) -> bytes: ...
def decode_frame(payload: Buffer) -> list[bytes]: ...
def decode_json(data: bytes) -> Any: ...
def deaggregate(data: bytes) -> list[tuple[str | None, bytes]]: ...
def read_records(
    told: list[dict[str, Any]], shard_id: str | None, raw: bool, as_stored: bool
) -> list[ConsumerRecord]: ...
def uuid_key() -> str: ...
def content_key(data: Buffer, topic: str = "", index: int = 0) -> str: ...
def _seed_keys(seed: int | None) -> None: ...  # for tests: the same keys for the same seed; None: random again
def simd() -> str: ...  # the base64 kernel in use: scalar, avx2 or vbmi

@disjoint_base
class Settler: ...

@disjoint_base
class Sink: ...

# Tells a callable how records ended: fn(token, count, outcome, answer, at).
# For STORED `answer` is the answer's body and `at` the offset of the (first) record's entry in it; for
# FAILED `answer` is the exception, or None; else None. Token 0 is never told.
@final
class CallbackSettler(Settler):
    def __new__(cls, callback: Callable[[int, int, int, Any, int], object]) -> Self: ...

def joined_data(body: Buffer) -> tuple[int, bytes]: ...  # how many records a call's body has, and their data
def record_cost(nbytes: int) -> int: ...  # of a record of nbytes (data + key) at most, to a budget

# What may be held, in bytes and records: buffered plus in flight. Several batchers may share one.
@final
class Budget:
    def __new__(cls, max_bytes: int, max_records: int) -> Self: ...
    max_bytes: int
    max_records: int
    @property
    def bytes(self) -> int: ...
    @property
    def records(self) -> int: ...
    @property
    def peak_bytes(self) -> int: ...
    @property
    def full(self) -> bool: ...  # high mark reached, or something stalled on it
    @property
    def low(self) -> bool: ...  # under the low mark (3/4 of both), or only doubted: reading may resume
    # so many of the records held were refused one by one: alone they do not fill the budget
    def doubt(self, records: int) -> None: ...
    waiting: int  # who stand in line for room: who comes now has to stand behind them
    on_room: Callable[[], None] | None  # called when `full` has ended; must not take or end records
    # would one record of nbytes (data + key) fit now; True when nothing is held
    def room(self, nbytes: int) -> bool: ...

# How a record's partition key is made.
# parts: ("text", "x"), ("topic", None), ("level", n from 0), ("field", ("a", "b")).
@final
class KeyPlan:
    def __new__(
        cls, kind: Literal["uuid", "content", "none", "parts"], parts: Sequence[tuple[str, Any]] = ()
    ) -> Self: ...
    def render(self, topic: bytes, data: bytes) -> str: ...

# Hash key to shard index. ends: the inclusive end hash key of each shard, ascending.
@final
class ShardTable:
    def __new__(cls, ends: Sequence[int]) -> Self: ...
    def find(self, key: str, hash_key: str | None = None) -> int: ...
    # how likely a key is kept that is drawn for this shard, 0.0 to 1.0; None: any key will do
    def set_odds(self, odds: Sequence[float] | None) -> None: ...
    def __len__(self) -> int: ...

# A payload, or one record of it (index not None), that is set aside.
@final
class Reject:
    topic: bytes
    payload: bytes  # the whole payload, or the one record
    kind: str  # for a counter: empty, version, element, truncated, trailing, oversize, partition_key, records
    reason: str  # for a person
    offset: int  # into the payload
    index: int | None
    token: int

# Entries of one call that failed alike, as a batch of their own (same bytes, same keys).
@final
class Failure:
    code: str
    message: str
    batch: Batch

# One PutRecords body, finished. Exports the body through the buffer protocol, read-only.
@final
class Batch:
    def __len__(self) -> int: ...  # records
    def __buffer__(self, flags: int, /) -> memoryview: ...
    @property
    def nbytes(self) -> int: ...  # of the body
    @property
    def user_records(self) -> int: ...  # records as they were given: more than len() when aggregated
    @property
    def size(self) -> int: ...  # data before base64 + key bytes: what Kinesis counts
    @property
    def reason(self) -> int: ...
    @property
    def batcher(self) -> Batcher: ...
    @property
    def counts(self) -> bytes: ...  # user records of each entry, for Batcher.restore; empty: one each
    @property
    def restored(self) -> bool: ...  # some of its entries came back from the disk
    def rows(self) -> dict[int, int]: ...  # of those: row -> user records of it in this batch
    attempts: int  # free for the sender
    uncertain: int  # for the sender: calls with it whose outcome nobody knows
    taken_at: float  # free for the sender
    flush_generation: int  # free for the sender
    overhead: int  # charged to the budget besides the entries
    digest: str | None  # free for the client: the body's SHA-256 in hex
    def shard_load(self) -> dict[int, tuple[int, int]]: ...  # shard index (-1 unknown) -> (records, bytes)
    # (entries of those shards, the others); self is spent
    # the shards of keys that were drawn; those without room are drawn anew, unless they may be stored already.
    # None: they have no shard any more
    def place(self, table: ShardTable | None, again: bool = False) -> None: ...
    @property
    def drawn(self) -> bool: ...  # it has keys that were drawn
    def split(self, shards: Iterable[int]) -> tuple[Batch | None, Batch | None]: ...
    @property
    def single(self) -> bool: ...  # it cannot be halved: one record, and no aggregate of several
    # bisect, an aggregate that stands alone by its records; self is spent; LibraryError when single
    def halves(self) -> tuple[Batch, Batch]: ...
    # of the same batcher; as few as the limits allow; order kept; the inputs are spent
    @staticmethod
    def gather(batches: Sequence[Batch]) -> list[Batch]: ...
    # scans the answer, settles what is stored; self is spent; UnexpectedResponse leaves it whole
    def settle(self, answer: bytes) -> list[Failure]: ...
    def finish(self, outcome: int, error: BaseException | None = None) -> None: ...  # every entry alike
    def expire(self, error: BaseException) -> None: ...  # its receipts raise it; the entries go on
    # (data, partition key, explicit hash key), decoded back
    def entries(self) -> list[tuple[bytes, str | None, str | None]]: ...

# What an operation calls the members of its answer: the list of entries, the count of failed ones, and in an entry that
# is stored, one or two that say where.
@final
class AnswerNames:
    def __new__(cls, entries: str, failed: str, *places: str) -> Self: ...

PUT_RECORDS_ANSWER: AnswerNames

# Resolves to PutResult (or FrameResult for a frame), or raises. Costs next to nothing until awaited.
@final
class Receipt(Generic[_T_co]):
    def done(self) -> bool: ...
    def cancelled(self) -> Literal[False]: ...
    def result(self) -> _T_co: ...  # asyncio.InvalidStateError before it is known
    def exception(self) -> BaseException | None: ...
    def add_done_callback(self, fn: Callable[[Receipt[_T_co]], object], /) -> None: ...
    def remove_done_callback(self, fn: Callable[[Receipt[_T_co]], object], /) -> int: ...
    async def wait(self) -> _T_co: ...
    def __await__(self) -> Generator[Any, None, _T_co]: ...

# A row of the table of payload formats. What is made by a call is a format in Python: `records(payload)` gives the
# records, or raises DataFormatError with the offset of what is wrong.
@final
class PayloadFormat:
    def __new__(cls, *_args: object, **_kwargs: object) -> Self: ...
    @overload
    def __init__(self, name: str, number: int, doc: str, records: Callable[[bytes], Iterable[Buffer]]) -> None: ...
    # records(payload, topic)
    @overload
    def __init__(
        self,
        name: str,
        number: int,
        doc: str,
        records: Callable[[bytes, str], Iterable[Buffer]],
        *,
        topic: Literal[True],
    ) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def number(self) -> int: ...  # its Subscription Identifier
    @property
    def doc(self) -> str: ...
    def decode(self, payload: Buffer) -> list[bytes]: ...  # its records; DataFormatError: all or nothing

COMPILED_FORMATS: tuple[PayloadFormat, ...]

# What a pipeline makes of each of its records: events it does not want are left out, the topic in a JSON object, a
# separator behind it.
@final
class Shape:
    def __new__(
        cls,
        *,
        topic_field: str = "",
        topic_clash: str = "replace",
        topic_others: str = "pass",
        separator: str = "",
        envelope: str | None = None,  # the host in it
        events: Iterable[str] = (),
    ) -> Self: ...
    # what is stored of a payload; DataFormatError: it is none of this format, or a record cannot be shaped
    def records(self, topic: bytes, frame: PayloadFormat, payload: Buffer) -> list[bytes]: ...

# The way into a batcher for payloads of one format, whatever the batcher's own is.
@final
class FormatSink(Sink):
    def __new__(cls, batcher: Batcher, frame: PayloadFormat | str, shape: Shape | None = None) -> Self: ...
    def offer(self, topic: bytes, payload: Buffer, token: int) -> int: ...  # as the C sink

# Takes messages that are not wanted: each counts as one filtered record.
@final
class ExcludedSink(Sink):
    def __new__(cls, batcher: Batcher) -> Self: ...
    def offer(self, topic: bytes, payload: Buffer, token: int) -> int: ...  # as the C sink

# Sets aside whole what matches none of `filters` (told in the reason).
@final
class StraySink(Sink):
    def __new__(cls, batcher: Batcher, filters: str) -> Self: ...
    def offer(self, topic: bytes, payload: Buffer, token: int) -> int: ...  # as the C sink

# Builds batches for one destination. One settler; records are encoded once, straight into the open body.
@final
class Batcher(Sink):
    def __new__(
        cls,
        *,
        settler: Settler | None,
        budget: Budget,
        frame: PayloadFormat | str,  # of what is offered: a row, or the name of a compiled one
        key: KeyPlan,
        target: bytes,
        max_records: int = ...,  # those of fastkin.limits
        max_batch_bytes: int = ...,
        max_record_bytes: int = ...,
        aggregate_bytes: int = 0,
        line_bytes: int = 0,  # size of a Kinesis record of JSON lines; 0: none are made
        rows: Settler | None = None,  # is told how restored records end
        replay: Budget | None = None,  # pays for them; None: `budget`
        answer: AnswerNames | None = None,  # None: as PutRecords has them
    ) -> Self: ...
    dirty: bool  # set when the open batch got its first record, a batch closed, or a reject came
    @property
    def budget(self) -> Budget: ...
    shards: ShardTable | None
    aggregate_bytes: int  # 0: records are not aggregated
    @property
    def open_records(self) -> int: ...
    @property
    def open_bytes(self) -> int: ...
    @property
    def ready(self) -> int: ...  # batches that take() would give
    @property
    def offered(self) -> bool: ...  # the open batch is one of them
    @property
    def opened(self) -> int: ...  # open batches there were
    @property
    def received(self) -> int: ...  # records; a bad frame counts as one
    @property
    def stored(self) -> int: ...
    @property
    def dead_lettered(self) -> int: ...
    @property
    def filtered(self) -> int: ...
    @property
    def dropped(self) -> int: ...  # dropped or failed for good
    @property
    def spooled(self) -> int: ...  # on the disk and not in memory: acknowledged, not ended
    @property
    def in_flight(self) -> int: ...  # received, not ended, not spooled
    @property
    def keys_missing(self) -> int: ...  # a field key was absent, a UUID was used
    @property
    def flushes(self) -> tuple[int, ...]: ...
    def offer(self, topic: bytes, payload: Buffer, token: int) -> int: ...  # as the C sink: -1 when stalled
    # raises RecordError
    def add(self, data: Buffer, token: int = 0, key: str | None = None, hash_key: str | None = None) -> None: ...
    def put(self, data: Buffer, key: str | None = None, hash_key: str | None = None) -> Receipt[PutResult]: ...
    # put_if_room() is for this thread alone, while its loop is running; attend() is called when the batcher needs
    # attention
    def belong(self, is_running: Callable[[], bool], attend: Callable[[], None]) -> None: ...
    def leave(self) -> None: ...  # put_if_room() is for nobody
    # None for who does not own the batcher, while the budget is full, and while somebody waits for room
    def put_if_room(self, data: Buffer, key: str | None, hash_key: str | None) -> Receipt[PutResult] | None: ...
    # put_if_room() for each that is bytes, until one is not taken, which is returned; `end` after the last
    def put_while_room(self, records: Iterator[_T], receipts: list[Receipt[PutResult]], end: _End) -> _T | _End: ...
    def put_frame(self, payload: Buffer) -> Receipt[FrameResult]: ...
    def close_batch(self, reason: int) -> bool: ...  # True: something waits to be taken
    # who can send may take the open batch as it is; until then it grows. False: there is none
    def offer_open(self, reason: int) -> bool: ...
    def take(self) -> Batch | None: ...
    def take_rejects(self) -> list[Reject]: ...
    # what was never offered, for it can be no record: received, and settled with settle_reject()
    def refuse(self, topic: bytes, payload: bytes, kind: str, reason: str, offset: int, token: int) -> Reject: ...
    # a former run left so many on the disk: received and spooled
    def adopt_spooled(self, records: int) -> None: ...
    # so many of what is spooled ended on the disk
    def settle_spooled(self, records: int, outcome: int) -> None: ...
    # a batch of what was finished as SPOOLED, in flight again; `rows` is told of `token`. DataFormatError: no such body
    def restore(self, body: Buffer, counts: bytes, token: int) -> Batch: ...
    def settle_reject(self, reject: Reject, outcome: int) -> None: ...
    # open and ready entries end as FAILED without being counted as dropped twice; returns records
    def abandon(self, error: BaseException) -> int: ...

@final
class ConsumerRecord:
    """One record of a stream as it was put there: of a KPL aggregate each record is one."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...  # TypeError: a Consumer makes them
    @property
    def data(self) -> Any:
        """The JSON value; bytes of a consumer with `raw=True`; None when `error` is set."""

    @property
    def raw(self) -> bytes:
        """The bytes, whatever they mean."""

    @property
    def error(self) -> DataFormatError | None:
        """Why the bytes are no JSON, and at which byte."""

    @property
    def partition_key(self) -> str | None:
        """None on streams that choose shards themselves."""

    @property
    def shard_id(self) -> str | None:
        """None of `get_records`, which is told an iterator only."""

    @property
    def sequence_number(self) -> str:
        """Decimal digits; the records of an aggregate share it."""

    @property
    def subsequence_number(self) -> int | None:
        """The place in the aggregate, from 0; None for a plain record."""

    @property
    def timestamp(self) -> float | None:
        """When Kinesis took it, in seconds since 1970 (ApproximateArrivalTimestamp)."""

    @property
    def timestamp_ms(self) -> int | None:
        """The same in milliseconds."""

    @property
    def encryption_type(self) -> str | None:
        """`NONE` or `KMS`, None where the service does not say."""

# The records of an answer to GetRecords, made as they are taken: a few bytes of an aggregate are a record each.
@final
class Reading:
    def __init__(self, told: list[dict[str, Any]], shard_id: str | None, raw: bool, as_stored: bool) -> None: ...
    def take(self, most: int) -> list[ConsumerRecord]: ...  # the next ones, at most so many
    @property
    def more(self) -> bool: ...  # may more be taken? The last portion may be empty
    @property
    def wrong(self) -> int: ...  # how many of those taken are no JSON
    @property
    def first_wrong(self) -> ConsumerRecord | None: ...

# The last so many records, known by key, data and place in the aggregate.
@final
class Seen:
    def __new__(cls, most: int) -> Self: ...
    def __len__(self) -> int: ...
    def is_new(self, record: ConsumerRecord) -> bool: ...
    @property
    def duplicates(self) -> int: ...
    @property
    def unknown(self) -> int: ...  # their key is no UUID: never taken for a duplicate
