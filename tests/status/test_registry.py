"""The rows of status/registry.py keep to what Prometheus and stats() rely on."""

from __future__ import annotations

from collections import Counter

import pytest

from fastkin.status.registry import OF_ENGINE, OF_RUN, WORKER_RESTARTS, WORKER_UP, Metric, Reload

METRICS = [WORKER_UP, WORKER_RESTARTS, *(row.metric for row in (*OF_ENGINE, *OF_RUN) if row.metric is not None)]


def test_no_key_and_no_name_stands_for_two_figures() -> None:
    keys = Counter(row.key for row in OF_RUN if row.key is not None)
    names = Counter(metric.name for metric in METRICS)
    assert [name for told in (keys, names) for name, count in told.items() if count > 1] == []


def test_what_prometheus_takes_for_a_counter_goes_on_over_a_reload() -> None:
    """Else rate() would see each reload as a restart."""
    for row in OF_RUN:
        if row.metric is not None:
            assert (row.reload is Reload.SUMMED) == (row.metric.kind != "gauge"), row.metric.name


def test_each_row_is_told_somewhere() -> None:
    """Without a key a figure is read from the run at work, which is no sum over runs."""
    for row in OF_RUN:
        assert row.key is not None or (row.metric is not None and row.reload is Reload.LATEST), row


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_are_as_prometheus_wants_them(metric: Metric) -> None:
    assert metric.name.startswith("fastkin_")
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    if metric.unit in {"bytes", "seconds"}:
        assert metric.unit in metric.name.split("_")
    assert metric.doc
    assert not metric.doc.endswith("."), "/metrics adds it"
    assert not metric.always or metric.kind == "counter"
