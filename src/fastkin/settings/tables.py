"""The rows of config.py as their readers want them: by table, by name in the environment, by other names."""

from __future__ import annotations

from fastkin.config import SECTIONS, URL, ProducerOnly
from fastkin.setting_row import Row, rows_of

TABLES: dict[str, dict[str, Row]] = {section: dict(rows_of(table, section)) for section, table in SECTIONS.items()}
TABLES["broker"] = {URL.key: URL, **TABLES["broker"]}

BROKER_KEYS = TABLES["broker"]
TLS_KEYS = TABLES["broker.tls"]
KINESIS_KEYS = TABLES["kinesis"]
PIPELINE_KEYS = TABLES["pipeline"]
STATUS_KEYS = TABLES["status"]
WORKERS_KEYS = TABLES["workers"]

_ROWS = [row for rows in TABLES.values() for row in rows.values()]

# name in the environment -> (table, key)
ENV = {row.variable: (row.section, row.key) for row in _ROWS}
ALIASES = {alias: row.key for row in _ROWS for alias in row.aliases}
# what the SDK calls them; the first that is set counts
AWS = {row.key: row.aws for row in _ROWS if row.aws}
# names of the MQTT-to-Kinesis microservice -> (table, key)
MICROSERVICE = {row.microservice: (row.section, row.key) for row in _ROWS if row.microservice}
# its names that stand for no setting alone: sources.py puts them together
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
# what `Producer` takes
ARGUMENTS = {row.key: row for row in (*_ROWS, *rows_of(ProducerOnly, "Producer").values()) if row.argument}
