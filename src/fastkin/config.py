"""What the user says, as frozen tables: broker, stream, pipelines. settings/ fills them.

A field with a row is a setting: the line here is all that is needed to read it from a file and the environment, to
check it, to show it and to write it into the README (setting_row.py says how). A field without a row is no setting: it
is worked out from others when the table is filled, or given by who makes the table in Python.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from fastkin.arn import is_stream_name, stream_arn
from fastkin.files import naming
from fastkin.formats.table import DEFAULT, FORMATS, FRAME, ROWS
from fastkin.limits import CALL_BYTES, CALL_RECORDS, DEFAULT_CALL_BYTES, LARGE_RECORD_BYTES, RECORD_BYTES
from fastkin.limits import KIB as KIB  # for who fills tables in code
from fastkin.limits import MIB as MIB
from fastkin.net.names import is_endpoint
from fastkin.setting_row import Row, Shape, meta, row

_TIB = 1024 * 1024 * MIB


class Scheme(NamedTuple):
    """A way to connect to a broker, as its URL begins."""

    port: int  # when none is said
    tls: bool
    websocket: bool


# Type checkers want the names spelled out once more, in `Broker.scheme`. mqtt/transport.py: open_wire connects.
SCHEMES = {
    "mqtt": Scheme(1883, tls=False, websocket=False),
    "mqtts": Scheme(8883, tls=True, websocket=False),
    "ws": Scheme(80, tls=False, websocket=True),
    "wss": Scheme(443, tls=True, websocket=True),
}

# What texts must look like. The names of AWS are those of its API reference.
_HOST = Shape(
    r"[A-Za-z0-9._:%-]{1,255}",
    "is not a host name or address",
    "a name or address alone; user and password have keys of their own",
    hidden_with="@",  # before it stands a password
)
_PATH = Shape(r"/.*", "does not begin with /", "for example /mqtt", shown=False)
_CLIENT_ID = Shape(
    lambda text: len(text.encode()) <= 65_535, "is longer than 65,535 bytes", "MQTT takes no more", shown=False
)
_STREAM = Shape(is_stream_name, "is not a stream name", "1 to 128 letters, digits and _ . -")
_FIREHOSE = Shape(r"[a-zA-Z0-9_.-]{1,64}", "is not the name of a delivery stream", "1 to 64 letters, digits and _ . -")
_STREAM_ARN = Shape(
    lambda text: stream_arn(text) is not None,
    "is not the ARN of a stream",
    "arn:aws:kinesis:REGION:123456789012:stream/NAME",
)
# One word is what emulators are told. What has more ends with a number, so that a zone or a slip is not asked for.
_REGION = Shape(r"[a-z0-9]+|[a-z0-9]+(-[a-z0-9]+)*-[0-9]+", "is not a region", "for example eu-west-1")
_ENDPOINT = Shape(is_endpoint, "is not an endpoint", "for example http://localhost:4567", shown=False, hidden_with="@")
_ROLE_ARN = Shape(
    r"arn:aws[a-z-]*:iam::\d{12,}:role/[\w+=,.@/-]{1,512}",
    "is not the ARN of a role",
    "arn:aws:iam::123456789012:role/NAME",
)
_EXTERNAL_ID = Shape(
    r"[\w+=,.@:/-]{2,1224}", "is not an external id", "2 to 1224 letters, digits and _ + = , . @ : / -", shown=False
)
_SESSION = Shape(r"[\w+=,.@-]{2,64}", "is not a session name", "2 to 64 letters, digits and _ + = , . @ -")
_ID = Shape(r"[A-Za-z0-9_.:/-]{1,64}", "is not fit for a log line", "use 1 to 64 letters, digits and _ . : / -")
_FIELD = Shape(lambda text: len(text.encode()) <= 1024, "is longer than 1,024 bytes", "use a shorter name")
_GROUP = Shape(r"[^+#/]+", "is not a group of a shared subscription", "a name without + # /")
_BUCKET = Shape(
    r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", "is not the name of a bucket", "3 to 63 small letters, digits and . -"
)
_PREFIX = Shape(
    lambda text: naming.wrong(text) is None,
    "is not a prefix",
    "folders have names that do not begin with a dot; % only in %Y %m %d %H %M %j and %%; 512 bytes at most,"
    " 255 in a folder",
)
_EXTENSION = Shape(r"(\.[A-Za-z0-9_-]{1,16}){1,4}", "is not an extension", "for example .jsonl or .csv.gz")
_LABEL = Shape(r"[^+#/]+", "is not one level of a topic", "without + # /")

_SHARED = ("$share/", "$queue/")  # shared already: brokers know the second as a short form

# Not stored: it is taken apart into the fields of Broker.
URL = Row(
    section="broker",
    key="url",
    doc="`mqtt://`, `mqtts://`, `ws://` or `wss://`: stands for scheme, host, port and path",
    secret=True,  # it may hold user and password
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    ca: str | None = row(None, "PEM file of authorities to trust instead of the system's", file=True)
    cert: str | None = row(None, "PEM file with the client certificate", file=True)
    key: str | None = row(None, "PEM file with its key", file=True)
    key_password: str | None = row(None, "password of the key", secret=True)
    alpn: tuple[str, ...] = row((), "ALPN protocols, for example `x-amzn-mqtt-ca`")
    insecure_skip_verify: bool = row(False, "true: believe any broker. For tests only")


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    scheme: Literal["mqtt", "mqtts", "ws", "wss"] = row("mqtt", "how to connect")
    host: str = row("localhost", "broker's name or address", shape=_HOST)
    port: int = row(1883, "1883 for mqtt, 8883 for mqtts, 80 for ws, 443 for wss when left out", least=1, most=65_535)
    path: str = row(
        "/mqtt", "path of the WebSocket; a query behind it is never shown, for it may be a token", shape=_PATH
    )
    user: str | None = row(None, "user name")
    password: str | None = row(None, "password", secret=True)
    client_id: str = row(
        "",
        "set it to lose nothing over a restart; left out: random, with a clean session",
        shape=_CLIENT_ID,
        microservice="CLIENTID",
    )
    # Not a row: nobody can set it. A reload must not take a fresh random id for a change of the settings.
    client_id_drawn: bool = False  # nobody chose it: each reading of the settings draws another
    protocol: Literal["auto", "5", "3.1.1"] = row(
        "auto", "`auto` tries 5 first, then 3.1.1; it comes back to 5 later, and stays where 5 has worked"
    )
    clean_session: bool = row(False, "false: the broker keeps what we have not acknowledged while we are away")
    session_expiry_s: int = row(86_400, "how long a 5.0 broker keeps the session", least=0, most=4_294_967_295)
    keep_alive_s: int = row(
        30, "0: none; TCP's own finds a dead peer within a minute all the same", least=0, most=65_535
    )
    receive_maximum: int = row(10_000, "unacknowledged messages a 5.0 broker may send us", least=1, most=65_535)
    # what a 3.1.1 broker grants unacknowledged; learned upwards and downwards
    inflight: int = row(20, "the same, as guessed for a 3.1.1 broker until it is learned", least=1, most=65_535)
    max_packet_bytes: int = row(
        8 * MIB, "larger messages are set aside, not held in memory", least=1024, most=268_435_460
    )
    topic_alias_maximum: int = row(0, "topic aliases a 5.0 broker may use", least=0, most=65_535)
    connect_timeout_s: float = row(
        10.0,
        "for the connection with its handshakes; then for CONNACK and SUBACK, each time without a byte",
        least=0.1,
        most=600,
    )
    reconnect_min_s: float = row(0.5, "first wait before a reconnect; doubles, with jitter", least=0.01, most=3600)
    reconnect_max_s: float = row(30.0, "longest wait before a reconnect", least=0.01, most=3600)
    # what a 5.0 broker does with retained messages when we subscribe again to what we are subscribed to
    retain_handling: Literal["new", "always", "never"] = row(
        "new", "retained messages of a 5.0 broker: with a `new` subscription, `always` (each reconnect) or `never`"
    )
    coalesce_ms: float = row(2.0, "pause between small reads at high rates; 0: never", least=0, most=1000)
    tls: Tls = field(default_factory=Tls)

    @property
    def secure(self) -> bool:
        """TLS is spoken."""
        return SCHEMES[self.scheme].tls

    @property
    def websocket(self) -> bool:
        """MQTT goes through a WebSocket."""
        return SCHEMES[self.scheme].websocket

    @property
    def url(self) -> str:
        """Without user, password and what a query may tell of them (a token, a signature): fit for a log line."""
        # Some brokers take their token in the query, so it is as secret as a password.
        path, query, _ = self.path.partition("?")
        return self._place(path + ("?***" if query else ""))

    @property
    def address(self) -> str:
        """As url, with the query: what is connected to."""
        return self._place(self.path)

    def _place(self, path: str) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{path if self.websocket else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kinesis:
    """One destination and how to get there."""

    stream: str | None = row(
        None,
        "stream name",
        shape=_STREAM,
        argument=True,
        aliases=("kinesisStreamName", "stream_name"),
        microservice="KIN_STREAM_NAME",
    )
    stream_arn: str | None = row(
        None, "stream ARN: preferred over the name, brings its region", shape=_STREAM_ARN, argument=True
    )
    firehose: str | None = row(None, "delivery stream of Firehose, in the place of a stream", shape=_FIREHOSE)
    region: str | None = row(
        None, "for example `eu-west-1`", shape=_REGION, argument=True, aws=("AWS_REGION", "AWS_DEFAULT_REGION")
    )
    endpoint_url: str | None = row(
        None,
        "another endpoint: a VPC endpoint, an emulator",
        shape=_ENDPOINT,
        argument=True,
        aws=("AWS_ENDPOINT_URL_KINESIS", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    )
    access_key: str | None = row(
        None,
        "left out: the AWS SDK's chain of credentials",
        secret=True,
        argument=True,
        aliases=("accessKeyId", "access_key_id"),
        aws=("AWS_ACCESS_KEY_ID",),
    )
    secret_key: str | None = row(
        None,
        "the secret of that key",
        secret=True,
        argument=True,
        aliases=("secretAccessKey", "secret_access_key"),
        aws=("AWS_SECRET_ACCESS_KEY",),
    )
    session_token: str | None = row(
        None, "the token of temporary keys", secret=True, argument=True, aws=("AWS_SESSION_TOKEN",)
    )
    profile: str | None = row(None, "profile of the AWS configuration files", argument=True)
    role_arn: str | None = row(
        None, "role to assume", shape=_ROLE_ARN, argument=True, microservice="AWS_ASSUME_ROLE_ARN"
    )
    external_id: str | None = row(None, "external id for that role", shape=_EXTERNAL_ID, secret=True, argument=True)
    session_name: str | None = row(
        None, "session name for that role", shape=_SESSION, argument=True, microservice="KIN_SESSION_NAME"
    )
    transport: Literal["auto", "native", "sdk"] = row(
        "auto", "`native`, or `sdk` (aiobotocore); auto: native, sdk behind a proxy", argument=True
    )
    api: Literal["put_records", "put_record"] = row(
        "put_records", "`put_record`: a call for each record, where kinesis:PutRecord alone is allowed", argument=True
    )
    max_connections: int = row(
        16, "calls in flight at most", least=1, most=256, argument=True, microservice="KIN_MAXCONN"
    )
    connect_timeout_s: float = row(6.0, "for a connection with its handshakes", least=0.1, most=600)
    request_timeout_s: float = row(
        30.0, "the longest time in which nothing of a call moves, out or in", least=0.1, most=600, argument=True
    )
    ca_bundle: str | None = row(
        None, "PEM file of authorities to trust instead of the system's", file=True, aws=("AWS_CA_BUNDLE",)
    )

    @property
    def name(self) -> str | None:
        """Of the stream, or of the delivery stream."""
        return self.firehose or self.stream

    @property
    def target(self) -> str:
        """The same for a log line; the ARN where there is one, "" when nothing is named."""
        return self.stream_arn or self.name or ""


def label_filter(label: str) -> str:
    """The topic filter that a bulk_label stands for."""
    return f"/devices/+/bulkData/{label}"


EVENT_FILTER = "/devices/+/event"  # the topic filter that `events` stands for when no topics are named


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    # without a default, which row() would be for type checkers
    id: str = field(metadata=meta(Row(doc="names the pipeline in every log line; unique", shape=_ID, own=True)))
    kinesis: Kinesis
    description: str = row("", "a note for people", own=True)
    # in the place of kinesis.stream; see files/
    file: str | None = row(
        None,
        "directory to write records into, in the place of a stream; with `s3` finished files wait there",
        file=True,
        own=True,
    )
    s3: str | None = row(None, "bucket that finished files of `file` go to", shape=_BUCKET)
    file_prefix: str = row(
        "",
        "before the name of a file, as `data/%Y/%m/%d/`: `%Y`, `%m`, `%d`, `%H`, `%M` and `%j` are the time in UTC at"
        " which it began",
        shape=_PREFIX,
    )
    file_error_prefix: str = row(
        "", "the same for dead letters, which become lines in files of their own, in the place of `dead_letter`",
        shape=_PREFIX,
    )  # fmt: skip
    file_raw_prefix: str = row(
        "", "the same for messages as they came, whatever becomes of their records; left out: they are not kept",
        shape=_PREFIX,
    )  # fmt: skip
    file_extension: str = row(".jsonl", "behind the name of a file; `.gz` follows", shape=_EXTENSION)
    file_compression: Literal["gzip", "none"] = row("gzip", "of finished files")
    file_interval_s: float = row(60.0, "a file is finished so long after its first record", least=0.1, most=86_400)
    file_max_bytes: int = row(
        5 * MIB, "or when it holds so many bytes before compression: whatever comes first", least=1024, most=512 * MIB
    )
    file_disk_bytes: int = row(
        4096 * MIB,
        "bytes in the directory at most. Nothing is deleted at the bound: nothing more is taken, and reading pauses",
        least=1 * MIB,
        most=_TIB,
    )
    enabled: bool = row(True, "false: the pipeline opens nothing")
    # what is subscribed: the filter of bulk_label is among them
    topics: tuple[str, ...] = row(
        (), "topic filters, `+`, `#` and `$share/GROUP/` included", own=True, microservice="TOPIC"
    )
    bulk_label: str | None = row(
        None,
        "stands for the topic filter `/devices/+/bulkData/LABEL`, whose payloads are `bulk`",
        shape=_LABEL,
        own=True,
    )
    events: tuple[str, ...] = row(
        (),
        "types of events (`eventType` of the JSON object) to store, `*` for all; others are acknowledged and counted as"
        " filtered. Without `topics` it stands for the topic filter `/devices/+/event`",
        own=True,
    )
    exclude: tuple[str, ...] = row(
        (),
        "topic filters whose messages are acknowledged and counted as filtered, though `topics` match them",
        own=True,
    )
    qos: int = row(1, "QoS to subscribe with; 0 is at most once", least=0, most=2, microservice="QOS")
    # of what comes by topics; what comes by a bulk_label beside them is bulk
    format: str = row(
        DEFAULT, "of `topics`. " + "; ".join(f"`{each.name}`: {each.doc}" for each in ROWS), choices=tuple(FORMATS)
    )
    enrich: bool = row(
        False,
        'of `format = "event"`: true adds `timestamp`, `originDeviceId` (from the topic), `homeId` (from `homes`) and'
        " an empty `eventData` where a device left them out",
    )
    homes: tuple[str, ...] = row((), "`DEVICE=HOME` for each device, or `*=HOME` for all others: for `enrich`")
    topic_field: str = row("", "a member of this name with the topic, first in each JSON object", shape=_FIELD)
    topic_clash: Literal["replace", "keep", "reject"] = row(
        "replace", "a record has that member already: `replace` it, `keep` it, or `reject` the message"
    )
    topic_others: Literal["pass", "wrap", "reject"] = row(
        "pass",
        "a record is no JSON object: `pass` it as it is, `wrap` it as base64 in `payload`, or `reject` the message",
    )
    envelope: Literal["none", "spark"] = row(
        "none",
        '`spark`: each record becomes `{"type":"record","host":...,"data":RECORD}`; what is no JSON is set aside',
    )
    envelope_host: str | None = row(None, "the host in the envelope; left out: the machine's name")
    separator: Literal["", ",", "\t", "\n", "\r\n"] = row(
        "",
        "follows each record; counts into its size. Left out: none, but `\\n` where records stand one behind the other",
    )
    partition_key: str = row("uuid", "see partition keys", argument=True)
    aggregation: Literal["none", "kpl", "lines"] = row(
        "none", "many records in one Kinesis record: `kpl`, as the KPL does it; `lines`, a line of JSON each"
    )
    linger_ms: float = row(50.0, "how long a record may wait for others", least=0, most=60_000, argument=True)
    max_records: int = row(
        CALL_RECORDS, "records per call", least=1, most=CALL_RECORDS, why="one PutRecords call takes 500", argument=True
    )
    max_batch_bytes: int = row(
        DEFAULT_CALL_BYTES,
        "bytes per call, data and keys",
        least=1024,
        most=CALL_BYTES,
        why="one PutRecords call takes 10 MiB",
        argument=True,
    )
    max_record_bytes: int = row(
        RECORD_BYTES,
        "bytes per record, with its key; larger: set aside",
        least=1024,
        most=LARGE_RECORD_BYTES,
        why="Kinesis takes records of up to 10 MiB",
        argument=True,
        argument_least=1,
    )
    budget_bytes: int = row(
        64 * MIB,
        "bytes held at most, waiting and in flight",
        least=64 * KIB,
        most=_TIB,
        argument=True,
        argument_least=1,  # one record at a time
    )
    budget_records: int = row(
        1_000_000, "records held at most", least=1, most=1_000_000_000, argument=True, microservice="BACKLOG_COUNT"
    )
    on_full: Literal["pause", "spool", "drop_oldest", "drop_newest"] = row(
        "pause", "when memory is full: wait, go to disk, or lose the oldest or newest", argument=True
    )
    spool: str | None = row(
        None, 'file for `on_full = "spool"`; each pipeline has its own', argument=True, file=True, own=True
    )
    spool_max_bytes: int = row(
        1024 * MIB, "bytes in the spool at most", least=1 * MIB, most=_TIB, argument=True, argument_least=64 * KIB
    )
    spool_after_s: float = row(
        5.0,
        "spool when the oldest record has waited so long, even if memory is not full",
        least=0.1,
        most=3600,
        argument=True,
    )
    throttle_error_after_s: float = row(
        60.0, "a throttle that lasts this long is an ERROR, again each time", least=1, most=86_400
    )
    dead_letter: str | None = row(
        None, "what can never be stored: a file, `stream:NAME` or `stream:ARN`; `none`: it is only logged"
    )
    dead_letter_max_bytes: int = row(
        64 * MIB, "the file is rotated before it grows larger; 0: never", least=0, most=_TIB
    )
    dead_letter_keep: int = row(
        5, "rotated files to keep; the oldest is deleted. 0: a full file is deleted", least=0, most=999
    )
    startup_check: Literal["none", "describe", "dry_run", "put"] = row(
        "describe",
        'how to try the stream at start; put stores a record `{"type":"connection_test",...}`, dry_run asks only',
    )
    shutdown_timeout_s: float = row(30.0, "for storing what is held after SIGTERM", least=0, most=3600)
    stdout: bool = row(False, "true: `fastkin run` prints every message", microservice="STDOUT")
    # Not rows: service/members.py fills them, for a worker of several.
    share: str = ""  # the group by which `topics` are shared with the other workers; "": they are not
    left_over: bool = False  # nothing is subscribed: what a session from before still holds is taken, and no more

    @property
    def filters(self) -> tuple[str, ...]:
        """`topics` as the broker is asked for them."""
        if not self.share:
            return self.topics
        return tuple(t if t.startswith(_SHARED) else f"$share/{self.share}/{t}" for t in self.topics)

    @property
    def target(self) -> str:
        """What records go to, for a log line."""
        if self.s3:
            return f"s3://{self.s3}"
        return self.file or self.kinesis.target

    @property
    def wanted(self) -> tuple[str, ...]:
        """The types of events that are stored; (): all of them, and nobody asks."""
        return () if "*" in self.events else self.events

    @property
    def formats(self) -> tuple[tuple[str, str], ...]:
        """Each filter with the format of its payloads; where several match a topic, the first decides."""
        label = None if self.bulk_label is None else label_filter(self.bulk_label)
        others = tuple((t, self.format) for t in self.topics if t != label)
        if label is None or label not in self.topics:
            return others
        return ((label, FRAME if others else self.format), *others)


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The HTTP port for metrics and health."""

    port: int = row(0, "serves `/metrics`, `/healthz` and `/readyz`; 0: none", least=0, most=65_535)
    host: str = row("127.0.0.1", "address to listen on", shape=_HOST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """How many processes do the work of `fastkin run`, and how they share it."""

    count: int | None = row(
        None,
        "processes that share the work, by shared subscriptions; `--workers` wins. 0: one process, its filters as they"
        " stand, which also takes what an earlier start with workers left at the broker. Left out: one process",
        least=0,
        most=64,
    )
    group: str | None = row(
        None,
        "the filters of a pipeline are subscribed as `$share/GROUP-ID/FILTER`, ID being the pipeline's; left out: the"
        " `client_id`",
        shape=_GROUP,
    )


# Each table of a settings file, by its name there.
SECTIONS: dict[str, type[Any]] = {
    "broker": Broker,
    "broker.tls": Tls,
    "kinesis": Kinesis,
    "pipeline": Pipeline,
    "status": Status,
    "workers": Workers,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProducerOnly:
    """Arguments of `Producer` that no file has. Its others are the rows above with `argument=True`."""

    aggregate_bytes: int = row(
        0, "size of a KPL aggregate; 0: records go one by one", least=0, most=10 * MIB, argument=True
    )
    shard_map: bool = row(True, "read the stream's shards, to pace by shard", argument=True)
    delivery_timeout_s: float | None = row(
        None, "a receipt without an outcome raises DeliveryTimeout after so long; None: it waits for ever",
        least=0.1, most=86_400, argument=True,
    )  # fmt: skip
    close_timeout_s: float = row(
        30.0, "how long close(), and leaving the block, waits for outcomes", least=0, most=3_600, argument=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    broker: Broker
    pipelines: tuple[Pipeline, ...]
    warnings: tuple[str, ...] = ()
    status: Status = field(default_factory=Status)
    workers: Workers = field(default_factory=Workers)


def client_id_of(settings: Settings, pipeline_id: str, owner: str | None = None) -> str:
    """The client id of a pipeline: `owner`, or else the first one, has the id of [broker] as it stands, so that adding
    one does not orphan its session; the others append their names. "": each connection draws one."""
    client_id = settings.broker.client_id
    if not client_id or pipeline_id == (owner or settings.pipelines[0].id):
        return client_id
    return f"{client_id}-{pipeline_id}"
