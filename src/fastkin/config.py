"""What the user says, as frozen tables: broker, stream, pipelines. settings/ fills them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastkin.limits import CALL_RECORDS, DEFAULT_CALL_BYTES, RECORD_BYTES
from fastkin.limits import KIB as KIB  # for who fills tables in code
from fastkin.limits import MIB as MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    key_password: str | None = field(default=None, repr=False)
    alpn: tuple[str, ...] = ()
    insecure_skip_verify: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    host: str = "localhost"
    port: int = 1883
    scheme: Literal["mqtt", "mqtts", "ws", "wss"] = "mqtt"
    path: str = "/mqtt"
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    client_id: str = ""
    client_id_drawn: bool = False  # nobody chose it: each reading of the settings draws another
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    clean_session: bool = False
    session_expiry_s: int = 86_400
    keep_alive_s: int = 30
    receive_maximum: int = 10_000
    inflight: int = 20  # what a 3.1.1 broker grants unacknowledged; learned upwards and downwards
    max_packet_bytes: int = 8 * MIB
    topic_alias_maximum: int = 0
    connect_timeout_s: float = 10.0
    reconnect_min_s: float = 0.5
    reconnect_max_s: float = 30.0
    # what a 5.0 broker does with retained messages when we subscribe again to what we are subscribed to
    retain_handling: Literal["new", "always", "never"] = "new"
    coalesce_ms: float = 2.0  # 0: never pause between reads
    tls: Tls = field(default_factory=Tls)

    @property
    def url(self) -> str:
        """Without user, password and what a query may tell of them (a token, a signature): fit for a log line."""
        path, query, _ = self.path.partition("?")
        return self._place(path + ("?***" if query else ""))

    @property
    def address(self) -> str:
        """As url, with the query: what is connected to."""
        return self._place(self.path)

    def _place(self, path: str) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{path if self.scheme in {'ws', 'wss'} else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kinesis:
    """One destination and how to get there."""

    stream: str | None = None
    stream_arn: str | None = None
    region: str | None = None
    endpoint_url: str | None = None
    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    profile: str | None = None
    role_arn: str | None = None
    external_id: str | None = field(default=None, repr=False)
    session_name: str | None = None
    transport: Literal["auto", "native", "sdk"] = "auto"  # auto: native, sdk behind a proxy
    max_connections: int = 16  # 1..256
    connect_timeout_s: float = 6.0
    request_timeout_s: float = 30.0
    ca_bundle: str | None = None


Format = Literal["raw", "bulk"]

# The Subscription Identifier of each format. Brokers keep them in sessions and beside queued messages: a
# number is never given to another format.
FORMAT_IDS: dict[Format, int] = {"raw": 1, "bulk": 2}


def label_filter(label: str) -> str:
    """The topic filter that a bulk_label stands for."""
    return f"/devices/+/bulkData/{label}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    id: str
    kinesis: Kinesis
    description: str = ""
    enabled: bool = True
    topics: tuple[str, ...] = ()  # what is subscribed: the filter of bulk_label is among them
    bulk_label: str | None = None
    qos: int = 1
    format: Format = "raw"  # of what comes by topics; what comes by a bulk_label beside them is bulk
    partition_key: str = "uuid"
    aggregation: Literal["none", "kpl"] = "none"
    linger_ms: float = 50.0
    max_records: int = CALL_RECORDS
    max_batch_bytes: int = DEFAULT_CALL_BYTES
    max_record_bytes: int = RECORD_BYTES
    budget_bytes: int = 64 * MIB
    budget_records: int = 1_000_000
    on_full: Literal["pause", "spool", "drop_oldest", "drop_newest"] = "pause"
    spool: str | None = None  # the file; one per pipeline
    spool_max_bytes: int = 1024 * MIB
    throttle_error_after_s: float = 60.0  # a throttle that lasts is told as an error this often
    spool_after_s: float = 5.0  # how long the oldest record may wait before a pipeline spools
    dead_letter: str | None = None
    dead_letter_max_bytes: int = 64 * MIB
    dead_letter_keep: int = 5
    startup_check: Literal["none", "describe", "dry_run", "put"] = "describe"
    shutdown_timeout_s: float = 30.0
    stdout: bool = False

    @property
    def formats(self) -> tuple[tuple[str, Format], ...]:
        """Each filter with the format of its payloads; where several match a topic, the first decides."""
        label = None if self.bulk_label is None else label_filter(self.bulk_label)
        others: tuple[tuple[str, Format], ...] = tuple((t, self.format) for t in self.topics if t != label)
        if label is None or label not in self.topics:
            return others
        return ((label, "bulk" if others else self.format), *others)


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The HTTP port for metrics and health."""

    port: int = 0  # 0: none
    host: str = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    broker: Broker
    pipelines: tuple[Pipeline, ...]
    warnings: tuple[str, ...] = ()
    status: Status = field(default_factory=Status)


def client_id_of(settings: Settings, pipeline_id: str, owner: str | None = None) -> str:
    """The client id of a pipeline: `owner`, or else the first one, has the id of [broker] as it stands, so that adding
    one does not orphan its session; the others append their names. "": each connection draws one."""
    client_id = settings.broker.client_id
    if not client_id or pipeline_id == (owner or settings.pipelines[0].id):
        return client_id
    return f"{client_id}-{pipeline_id}"
