"""The settings in effect, as TOML."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from fastkin.config import URL, Pipeline, Settings, Status, Tls, Workers, label_filter
from fastkin.settings.tables import BROKER_KEYS, KINESIS_KEYS, PIPELINE_KEYS, STATUS_KEYS, TLS_KEYS, WORKERS_KEYS
from fastkin.settings.values import HIDDEN

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastkin.setting_row import Row


def effective(settings: Settings) -> str:
    """All settings as TOML; what is not set is left out. Secrets are "***", which no reading of them takes."""
    lines = ["[broker]"]
    lines += _shown_table(settings.broker, BROKER_KEYS)
    if settings.broker.tls != Tls():
        lines += ["", "[broker.tls]", *_shown_table(settings.broker.tls, TLS_KEYS)]
    if settings.status != Status():
        lines += ["", "[status]", *_shown_table(settings.status, STATUS_KEYS)]
    if settings.workers != Workers():
        lines += ["", "[workers]", *_shown_table(settings.workers, WORKERS_KEYS)]
    for pipeline in settings.pipelines:
        lines += ["", "[[pipeline]]"]
        lines += _shown_table(pipeline, PIPELINE_KEYS)
        lines += _shown_table(pipeline.kinesis, KINESIS_KEYS)
    return "\n".join(lines) + "\n"


def _shown_table(table: object, names: Mapping[str, Row]) -> list[str]:
    lines = []
    for name, key in names.items():
        if name == URL.key:
            continue
        value = getattr(table, name)
        if value is None or value == ():
            continue
        # The filter of the label is shown by the label: what is printed can be read again, and means the same.
        if name == "topics" and isinstance(table, Pipeline) and table.bulk_label is not None:
            value = tuple(t for t in value if t != label_filter(table.bulk_label))
            if not value:
                continue
        secret = key.secret or (name == "path" and "?" in str(value))  # a query may be a token or a signature
        lines.append(f"{name} = {_toml_value(HIDDEN if secret else value)}")
    return lines


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    # TOML's basic strings escape as JSON's do, but for DEL, which no setting can hold
    return json.dumps(str(value), ensure_ascii=False)
