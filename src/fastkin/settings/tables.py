"""The keys: how each is written, what it may be, what it does, and its names in the environment."""

from __future__ import annotations

from typing import Literal, NamedTuple

from fastkin.config import KIB, MIB


class Key(NamedTuple):
    """One setting: how it is written, what is allowed, what it does; a row of README's tables."""

    name: str
    kind: Literal["text", "int", "number", "flag", "list"]
    doc: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    secret: bool = False


def _table(*rows: Key) -> dict[str, Key]:
    return {row.name: row for row in rows}


def _text(name: str, doc: str, *choices: str, secret: bool = False) -> Key:
    return Key(name, "text", doc, choices=choices, secret=secret)


def _int(name: str, low: int, high: int, doc: str) -> Key:
    return Key(name, "int", doc, low, high)


def _number(name: str, low: float, high: float, doc: str) -> Key:
    return Key(name, "number", doc, low, high)


def _flag(name: str, doc: str) -> Key:
    return Key(name, "flag", doc)


def _list(name: str, doc: str) -> Key:
    return Key(name, "list", doc)


BROKER_KEYS = _table(
    _text(
        "url",
        "`mqtt://`, `mqtts://`, `ws://` or `wss://`: stands for scheme, host, port and path",
    ),
    _text("scheme", "how to connect", "mqtt", "mqtts", "ws", "wss"),
    _text("host", "broker's name or address"),
    _int("port", 1, 65_535, "1883 for mqtt, 8883 for mqtts, 80 for ws, 443 for wss when left out"),
    _text("path", "path of the WebSocket; a query behind it is never shown, for it may be a token"),
    _text("user", "user name"),
    _text("password", "password", secret=True),
    _text("client_id", "set it to lose nothing over a restart; left out: random, with a clean session"),
    _text(
        "protocol",
        "`auto` tries 5 first, then 3.1.1; it comes back to 5 later, and stays where 5 has worked",
        "auto",
        "5",
        "3.1.1",
    ),
    _flag("clean_session", "false: the broker keeps what we have not acknowledged while we are away"),
    _int("session_expiry_s", 0, 4_294_967_295, "how long a 5.0 broker keeps the session"),
    _int("keep_alive_s", 0, 65_535, "0: none; TCP's own finds a dead peer within a minute all the same"),
    _int("receive_maximum", 1, 65_535, "unacknowledged messages a 5.0 broker may send us"),
    _int("inflight", 1, 65_535, "the same, as guessed for a 3.1.1 broker until it is learned"),
    _int("max_packet_bytes", 1024, 268_435_460, "larger messages are set aside, not held in memory"),
    _int("topic_alias_maximum", 0, 65_535, "topic aliases a 5.0 broker may use"),
    _number(
        "connect_timeout_s",
        0.1,
        600,
        "for the connection with its handshakes; then for CONNACK and SUBACK, each time without a byte",
    ),
    _number("reconnect_min_s", 0.01, 3600, "first wait before a reconnect; doubles, with jitter"),
    _number("reconnect_max_s", 0.01, 3600, "longest wait before a reconnect"),
    _text(
        "retain_handling",
        "retained messages of a 5.0 broker: with a `new` subscription, `always` (each reconnect) or `never`",
        "new",
        "always",
        "never",
    ),
    _number("coalesce_ms", 0, 1000, "pause between small reads at high rates; 0: never"),
)

TLS_KEYS = _table(
    _text("ca", "PEM file of authorities to trust instead of the system's"),
    _text("cert", "PEM file with the client certificate"),
    _text("key", "PEM file with its key"),
    _text("key_password", "password of the key", secret=True),
    _list("alpn", "ALPN protocols, for example `x-amzn-mqtt-ca`"),
    _flag("insecure_skip_verify", "true: believe any broker. For tests only"),
)

KINESIS_KEYS = _table(
    _text("stream", "stream name"),
    _text("stream_arn", "stream ARN: preferred over the name, brings its region"),
    _text("region", "for example `eu-west-1`"),
    _text("endpoint_url", "another endpoint: a VPC endpoint, an emulator"),
    _text("access_key", "left out: the AWS SDK's chain of credentials", secret=True),
    _text("secret_key", "", secret=True),
    _text("session_token", "", secret=True),
    _text("profile", "profile of the AWS configuration files"),
    _text("role_arn", "role to assume"),
    _text("external_id", "external id for that role", secret=True),
    _text("session_name", "session name for that role"),
    _text(
        "transport", "`native`, or `sdk` (aiobotocore); auto: native, sdk behind a proxy",
        "auto", "native", "sdk",
    ),
    _int("max_connections", 1, 256, "calls in flight at most"),
    _number("connect_timeout_s", 0.1, 600, ""),
    _number("request_timeout_s", 0.1, 600, "the longest time in which nothing of a call moves, out or in"),
    _text("ca_bundle", "PEM file of authorities to trust instead of the system's"),
)  # fmt: skip

PIPELINE_KEYS = _table(
    _text("id", "names the pipeline in every log line; unique"),
    _text("description", ""),
    _flag("enabled", "false: the pipeline opens nothing"),
    _list("topics", "topic filters, `+`, `#` and `$share/GROUP/` included"),
    _text("bulk_label", "stands for the topic filter `/devices/+/bulkData/LABEL`, whose payloads are `bulk`"),
    _int("qos", 0, 2, "QoS to subscribe with; 0 is at most once"),
    _text("format", "of `topics`. `raw`: a payload is a record; `bulk`: a frame of records", "raw", "bulk"),
    _text("partition_key", "see partition keys"),
    _text("aggregation", "`kpl`: many records in one Kinesis record", "none", "kpl"),
    _number("linger_ms", 0, 60_000, "how long a record may wait for others"),
    _int("max_records", 1, 500, "records per call"),
    _int("max_batch_bytes", 1024, 10 * MIB, "bytes per call, data and keys"),
    _int("max_record_bytes", 1024, 10 * MIB, "bytes per record, with its key; larger: set aside"),
    _int("budget_bytes", 64 * KIB, 1024 * 1024 * MIB, "bytes held at most, waiting and in flight"),
    _int("budget_records", 1, 1_000_000_000, "records held at most"),
    _text(
        "on_full", "when memory is full: wait, go to disk, or lose the oldest or newest",
        "pause", "spool", "drop_oldest", "drop_newest",
    ),
    _text("spool", "file for `on_full = \"spool\"`; each pipeline has its own"),
    _int("spool_max_bytes", 1 * MIB, 1024 * 1024 * MIB, "bytes in the spool at most"),
    _number("spool_after_s", 0.1, 3600, "spool when the oldest record has waited so long, even if memory is not full"),
    _number("throttle_error_after_s", 1, 86_400, "a throttle that lasts this long is an ERROR, again each time"),
    _text("dead_letter", "what can never be stored: a file, `stream:NAME` or `stream:ARN`; `none`: it is only logged"),
    _int("dead_letter_max_bytes", 0, 1024 * 1024 * MIB, "the file is rotated before it grows larger; 0: never"),
    _int("dead_letter_keep", 0, 999, "rotated files to keep; the oldest is deleted. 0: a full file is deleted"),
    _text(
        "startup_check",
        'how to try the stream at start; put stores a record `{"type":"connection_test",...}`, dry_run asks only',
        "none", "describe", "dry_run", "put",
    ),
    _number("shutdown_timeout_s", 0, 3600, "for storing what is held after SIGTERM"),
    _flag("stdout", "true: `fastkin run` prints every message"),
)  # fmt: skip

STATUS_KEYS = _table(
    _int("port", 0, 65_535, "serves `/metrics`, `/healthz` and `/readyz`; 0: none"),
    _text("host", "address to listen on"),
)

ALIASES = {
    "accessKeyId": "access_key",
    "access_key_id": "access_key",
    "secretAccessKey": "secret_key",
    "secret_access_key": "secret_key",
    "kinesisStreamName": "stream",
    "stream_name": "stream",
}

# names of the MQTT-to-Kinesis microservice -> (table, key)
MICROSERVICE = {
    "CLIENTID": ("broker", "client_id"),
    "TOPIC": ("pipeline", "topics"),
    "QOS": ("pipeline", "qos"),
    "BACKLOG_COUNT": ("pipeline", "budget_records"),
    "STDOUT": ("pipeline", "stdout"),
    "KIN_STREAM_NAME": ("kinesis", "stream"),
    "KIN_MAXCONN": ("kinesis", "max_connections"),
    "KIN_SESSION_NAME": ("kinesis", "session_name"),
    "AWS_ASSUME_ROLE_ARN": ("kinesis", "role_arn"),
}
MICROSERVICE_MORE = frozenset(
    {
        "BROKER",
        "PORT",
        "WEBSOCKET",
        "USER",
        "PASS",
        "MQTT_USER",
        "MQTT_PASS",
        "KIN_PARTITION_KEY",
        "DOCKERLOG",
    }
)
# what the SDK calls them; the first that is set counts
AWS = {
    "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    "endpoint_url": ("AWS_ENDPOINT_URL_KINESIS", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "access_key": ("AWS_ACCESS_KEY_ID",),
    "secret_key": ("AWS_SECRET_ACCESS_KEY",),
    "session_token": ("AWS_SESSION_TOKEN",),
    "ca_bundle": ("AWS_CA_BUNDLE",),
}
# FASTKIN_ names that are not settings: of the build, of the command line
NOT_SETTINGS = frozenset(
    {
        "FASTKIN_BUILD",
        "FASTKIN_ANNOTATE",
        "FASTKIN_SANITIZE",
        "FASTKIN_CONFIG",
        "FASTKIN_LOG_FORMAT",
    }
)
# one pipeline's own: a FASTKIN_PIPELINE_ name cannot mean it when there are several
OWN = frozenset({"id", "description", "topics", "bulk_label", "spool"})

TABLES: dict[str, dict[str, Key]] = {
    "broker": BROKER_KEYS,
    "broker.tls": TLS_KEYS,
    "kinesis": KINESIS_KEYS,
    "pipeline": PIPELINE_KEYS,
    "status": STATUS_KEYS,
}
ENV = {
    f"FASTKIN_{table.replace('.', '_').upper()}_{key.upper()}": (table, key)
    for table, names in TABLES.items()
    for key in names
}
