"""What Prometheus is told: the figures, the books at every scrape, and what dashboard and alerts ask for."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_open
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse

import fastkin
from fastkin.config import Broker, Kinesis, Pipeline, Settings
from fastkin.delivery.pacing import Pacer
from fastkin.emulator import Emulator
from fastkin.mqtt.publisher import Publisher
from fastkin.status.instruments import Histogram, LabelledCounter
from fastkin.status.metrics import EngineCollector
from fastkin.status.registry import OF_ENGINE, OF_RUN, WORKER_RESTARTS, WORKER_UP
from fastkin.status.registry import Metric as Metered
from fastkin.status.server import EnginePage, StatusServer
from support.servers import ACCESS_KEY, SECRET_KEY, mosquitto

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from prometheus_client.metrics_core import Metric

    from support.servers import Server

ROOT = Path(__file__).resolve().parent.parent.parent
_RIGS = itertools.count()


@pytest.fixture(scope="module")
def server(process: None) -> Iterator[Server]:
    with mosquitto("max_queued_messages 0\nmax_inflight_messages 200\n") as running:
        yield running


Scrape = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(engine: fastkin.Engine) -> Scrape:
    registry = CollectorRegistry()
    registry.register(engine.metrics())
    return values(generate_latest(registry).decode())


def values(text: str) -> Scrape:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse(text)
        for sample in family.samples
    }


def total(found: Scrape, name: str, **labels: str) -> float:
    """The sum over all that have these labels."""
    wanted = set(labels.items())
    hits = [value for (sample, has), value in found.items() if sample == name and wanted <= has]
    assert hits, f"no {name} {labels}"
    return sum(hits)


def books(found: Scrape, pipeline: str) -> float:
    """Records that no counter has."""

    def of(name: str) -> float:
        return total(found, f"fastkin_{name}", pipeline=pipeline)

    return (
        of("records_received_total")
        - of("records_stored_total")
        - of("records_dead_lettered_total")
        - of("records_filtered_total")
        - of("records_dropped_total")
        - of("records_in_flight")
        - of("spool_records")
    )


@contextlib.asynccontextmanager
async def rig(
    server: Server, *pipelines: dict[str, Any], shards: int = 2
) -> AsyncIterator[tuple[fastkin.Engine, Publisher, Emulator]]:
    async with Emulator({"welders": shards}) as emulator:
        kinesis = Kinesis(
            stream="welders",
            region="us-east-1",
            endpoint_url=emulator.url,
            access_key=ACCESS_KEY,
            secret_key=SECRET_KEY,
        )
        settings = Settings(
            broker=Broker(port=server.port, client_id=f"metrics-{next(_RIGS)}"),
            pipelines=tuple(Pipeline(**{"dead_letter": "none", "kinesis": kinesis} | each) for each in pipelines),
        )
        async with fastkin.Engine(settings) as engine:
            await until(lambda: all(not run.unready() for run in engine.pipelines.values()))
            publisher = Publisher(Broker(port=server.port))
            await publisher.connect()
            try:
                yield engine, publisher, emulator
            finally:
                await publisher.close()


async def until(condition: Any, timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        await asyncio.sleep(0.01)


def ended(engine: fastkin.Engine, **received: int) -> bool:
    stats = engine.stats()
    return all(stats[name]["received"] >= count and not stats[name]["in_flight"] for name, count in received.items())


@contextlib.asynccontextmanager
async def everything(server: Server, tmp_path: Path) -> AsyncIterator[tuple[fastkin.Engine, Emulator]]:
    """Two pipelines to which everything happened that is counted."""
    async with rig(
        server,
        {"id": "a", "topics": ("a/#",), "format": "bulk", "dead_letter": str(tmp_path / "dead.jsonl")},
        {"id": "b", "topics": ("b/#",), "max_record_bytes": 1024},
    ) as (engine, publisher, emulator):
        emulator.faults.call("ServiceUnavailableException", times=2)
        emulator.faults.record("InternalFailure", times=3)
        emulator.faults.record(times=3)  # throttled
        emulator.faults.cut("after", times=1)
        await publisher.publish("a/1", fastkin.encode_frame([b"%d" % n for n in range(100)]), 1)
        await publisher.publish("a/1", b"no frame", 1)
        for _ in range(20):
            await publisher.publish("b/1", b"x", 1)
        await publisher.publish("b/1", b"x" * 2000, 1)
        await publisher.drain()
        await until(lambda: ended(engine, a=101, b=21))
        # a call is over a turn of the loop after its records have ended
        await until(lambda: all(stats["calls_open"] == 0 for stats in engine.stats().values()))
        yield engine, emulator


# --- the figures ---


async def test_every_figure_is_what_happened(server: Server, tmp_path: Path) -> None:
    async with everything(server, tmp_path) as (engine, emulator):
        found = scrape(engine)
        assert books(found, "a") == books(found, "b") == 0

        def of(name: str, pipeline: str, **labels: str) -> float:
            return total(found, f"fastkin_{name}", pipeline=pipeline, **labels)

        assert [of("messages_received_total", name) for name in "ab"] == [2, 21]
        assert [of("records_received_total", name) for name in "ab"] == [101, 21]
        assert [of("records_decoded_total", name) for name in "ab"] == [100, 20]
        assert [of("records_batched_total", name) for name in "ab"] == [100, 20]
        assert [of("records_stored_total", name) for name in "ab"] == [100, 20]
        assert [of("records_dropped_total", name, policy="no_dead_letter") for name in "ab"] == [0, 1]
        assert of("format_errors_total", "b", reason="oversize") == 1
        assert sum(of("records_dead_lettered_total", name) for name in "ab") == 1
        assert sum(of("batches_flushed_total", name) for name in "ab") >= 2
        for name in "ab":
            assert of("records_sent_total", name) == of("records_batched_total", name) + (
                of("records_retried_total", name) if name in retried(found) else 0
            )
            assert of("call_seconds_count", name) == of("calls_total", name)
            assert of("call_seconds_bucket", name, le="+Inf") == of("call_seconds_count", name)
            assert 0 < of("call_seconds_sum", name) < 60
            assert of("batch_fill_ratio_count", name) == of("batches_flushed_total", name)
            assert of("pipeline_ready", name) == of("intake_connected", name) == 1
            assert of("unacknowledged_messages", name) == of("oldest_unacknowledged_seconds", name) == 0
            assert of("budget_bytes", name) == of("calls_open", name) == 0
            assert of("budget_bytes_limit", name) == engine.pipelines[name].delivery.budget.max_bytes
            assert of("intake_connects_total", name) == 1
            assert of("broker_window_messages", name) >= 1
        assert total(found, "fastkin_records_retried_total", code="InternalFailure") == 3
        # the cut may have struck the second of them
        assert 1 <= total(found, "fastkin_calls_failed_total", code="ServiceUnavailableException") <= 2
        assert total(found, "fastkin_records_throttled_total") == 3
        # what came twice is bounded by what we say
        assert len(emulator.stored("welders")) - 120 <= total(found, "fastkin_duplicates_possible_total")
        assert total(found, "fastkin_info", version=fastkin.__version__) == 1


def retried(found: Scrape) -> set[str]:
    return {dict(labels)["pipeline"] for name, labels in found if name == "fastkin_records_retried_total"}


async def test_what_waits_is_seen_while_it_waits(server: Server) -> None:
    async with rig(server, {"id": "p", "topics": ("w/#",)}) as (engine, publisher, emulator):
        cut = emulator.faults.latency(60_000)
        await publisher.publish("w/1", b"x", 1)
        await publisher.drain()
        await until(lambda: engine.stats()["p"]["calls_open"] == 1)
        await asyncio.sleep(0.3)
        found = scrape(engine)
        assert books(found, "p") == 0
        for name in ("records_in_flight", "calls_open", "unacknowledged_messages"):
            assert total(found, f"fastkin_{name}") == 1, name
        assert 0.2 < total(found, "fastkin_oldest_unacknowledged_seconds") < 20
        assert total(found, "fastkin_budget_bytes") > 0
        assert total(found, "fastkin_call_seconds_count") == 0
        cut.remove()
        engine.pipelines["p"].pipeline = dataclasses.replace(engine.pipelines["p"].pipeline, shutdown_timeout_s=0.0)


async def test_the_books_balance_at_every_scrape_and_no_counter_goes_back(server: Server, tmp_path: Path) -> None:
    """Under load, with throttles, cut calls, bad frames and a reload on the way."""
    async with rig(
        server,
        {"id": "p", "topics": ("l/#",), "format": "bulk", "dead_letter": str(tmp_path / "dead.jsonl")},
        {"id": "q", "topics": ("l/#",), "linger_ms": 5.0},
        shards=16,
    ) as (engine, publisher, emulator):
        emulator.faults.record("InternalFailure", probability=0.02, seed=1)
        emulator.faults.call("ServiceUnavailableException", probability=0.05, seed=2)
        emulator.faults.cut("after", probability=0.05, seed=3)
        over = False
        scrapes = 0
        moving = 0

        async def watch() -> None:
            nonlocal scrapes, moving
            last: Scrape = {}
            while not over:
                found = scrape(engine)
                for name in "pq":
                    assert books(found, name) == 0
                    moving += total(found, "fastkin_records_in_flight", pipeline=name) > 0
                for key, before in last.items():
                    if key[0].endswith(("_total", "_count", "_bucket", "_sum")):
                        assert found.get(key, 0) >= before, key
                last = found
                scrapes += 1
                await asyncio.sleep(0.02)

        async def load() -> None:
            frame = fastkin.encode_frame([b"%d" % n for n in range(50)])
            for n in range(600):
                await publisher.publish("l/1", frame if n % 50 else b"no frame", 1)
                if n == 300:
                    changed = dataclasses.replace(engine.settings.pipelines[0], linger_ms=1.0)
                    settings = dataclasses.replace(engine.settings, pipelines=(changed, engine.settings.pipelines[1]))
                    await engine.reload(settings)
            await publisher.drain()

        watching = asyncio.create_task(watch())
        loading = asyncio.create_task(load())
        try:
            await asyncio.wait({watching, loading}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()
            await loading
            await until(lambda: watching.done() or ended(engine, p=588 * 50 + 12, q=600))
        finally:
            over = True
            loading.cancel()
            await watching
        assert scrapes > 20
        assert moving > 5  # it was looked at while something was on its way
        assert total(scrape(engine), "fastkin_records_dead_lettered_total", pipeline="p") == 12


async def test_the_books_balance_while_a_spool_fills_and_drains(server: Server, tmp_path: Path) -> None:
    spool = {"on_full": "spool", "spool": str(tmp_path / "p.spool"), "spool_after_s": 0.1, "budget_bytes": 200_000}
    async with rig(server, {"id": "p", "topics": ("s/#",), "max_record_bytes": 10_000, **spool}, shards=8) as (
        engine,
        publisher,
        emulator,
    ):
        away = emulator.faults.call("ServiceUnavailableException")
        for n in range(600):
            await publisher.publish("s/1", b"%d" % n * 200, 1)
            if n % 20 == 0:
                assert books(scrape(engine), "p") == 0
        await publisher.drain()

        def balanced() -> Scrape:
            found = scrape(engine)
            assert books(found, "p") == 0
            return found

        await until(lambda: total(balanced(), "fastkin_spool_records") > 100)
        found = balanced()
        assert total(found, "fastkin_spool_bytes") > 0
        assert total(found, "fastkin_spool_bytes_limit") == engine.pipelines["p"].pipeline.spool_max_bytes
        assert total(found, "fastkin_records_spooled_total") >= total(found, "fastkin_spool_records")
        away.remove()
        await until(lambda: total(balanced(), "fastkin_records_stored_total") == 600)
        assert total(balanced(), "fastkin_spool_records") == 0


async def test_a_key_whose_field_is_missing_is_counted_and_goes_on_over_a_reload(server: Server) -> None:
    async with rig(server, {"id": "p", "topics": ("k/#",), "partition_key": "field:id"}) as (
        engine,
        publisher,
        emulator,
    ):
        for payload in (b'{"id":"m1"}', b'{"no":1}', b"no JSON"):
            await publisher.publish("k/1", payload, 1)
        await publisher.drain()
        await until(lambda: ended(engine, p=3))
        assert engine.stats()["p"]["keys_missing"] == 2
        assert total(scrape(engine), "fastkin_keys_missing_total", pipeline="p") == 2
        keys = {record.data: record.partition_key for record in emulator.stored("welders")}
        assert keys[b'{"id":"m1"}'] == "m1"
        assert all(uuid.UUID(keys[data]).version == 4 for data in (b'{"no":1}', b"no JSON"))

        changed = dataclasses.replace(engine.settings.pipelines[0], linger_ms=1.0)
        await engine.reload(dataclasses.replace(engine.settings, pipelines=(changed,)))
        await publisher.publish("k/1", b"{}", 1)
        await publisher.drain()
        await until(lambda: ended(engine, p=4))
        assert total(scrape(engine), "fastkin_keys_missing_total", pipeline="p") == 3


async def test_any_thread_may_scrape(server: Server) -> None:
    async with rig(server, {"id": "p", "topics": ("t/#",)}) as (engine, _, _emulator):
        registry = CollectorRegistry()
        registry.register(engine.metrics())
        with pytest.raises(ValueError, match="Duplicated"):
            registry.register(engine.metrics())
        text = await asyncio.to_thread(generate_latest, registry)
        assert books(values(text.decode()), "p") == 0
        told = {sample.name for family in parse_open(generate_open(registry).decode()) for sample in family.samples}
        assert {"fastkin_records_stored_total", "fastkin_call_seconds_bucket"} <= told
    # the loop is at its end or not: a host may still scrape
    assert values(generate_latest(registry).decode())


@pytest.mark.process
def test_prometheus_is_not_loaded_by_who_does_not_ask(tmp_path: Path) -> None:
    script = (
        "import sys, fastkin.service.engine, fastkin.commands.cli, fastkin.commands.run; "
        "print('prometheus_client' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT / "src")
    assert done.stdout == "False\n", done.stderr


# --- counters that stay small ---


def test_names_that_a_peer_makes_up_are_bounded() -> None:
    counter = LabelledCounter(32)
    for n in range(10_000):
        counter.add(f"Code{n}", 2)
    for name in ("a b", 'x"} 1\nforged 2', "ü", "n" * 65, "\u2028"):
        counter.add(name, 1)
    assert len(counter) == 33
    assert sum(counter.values()) == 20_005
    assert counter["Code0"] == 2
    assert counter["other"] == 20_005 - 64


def test_a_labelled_counter_sums_up_to_the_total() -> None:
    counter = LabelledCounter()
    assert counter.summing_to(0) == {}
    assert counter.summing_to(3, "rest") == {"rest": 3}
    counter.add("a", 2)
    counter.add("b", 0)
    assert counter.summing_to(5) == {"a": 2, "other": 3}


async def test_hostile_names_do_not_break_the_page() -> None:
    run = SimpleNamespace(
        delivery=SimpleNamespace(
            budget=SimpleNamespace(max_bytes=1),
            backlog=SimpleNamespace(spool=None, broken=None),
            sender=SimpleNamespace(utilization=lambda: {f"shardId-{n:012}": n / 1000 for n in range(1000)}),
        ),
        oldest_s=lambda: 0.0,
        subscriber=SimpleNamespace(granted_window=1, connected=asyncio.Event()),
    )
    names = {'x"} 1\nforged_total 2': 3, "\\": 1, "": 2}
    stats: dict[str, Any] = {
        row.key: Histogram((1.0,)).told() if row.metric.kind == "histogram" else names if row.metric.labels[1:] else 6
        for row in OF_RUN
        if row.key is not None and row.metric is not None
    }
    engine: Any = SimpleNamespace(pipelines={"p": run}, stats=lambda: {"p": stats}, unready=lambda: {"p": "x"})
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine))
    text = generate_latest(registry).decode()
    assert "\nforged_total" not in text
    found = values(text)
    assert total(found, "fastkin_records_retried_total", code='x"} 1\nforged_total 2') == 3
    assert total(found, "fastkin_records_throttled_total", shard="unknown") == 2
    shown = [(dict(labels)["shard"], value) for (name, labels), value in found.items() if name == "fastkin_shard_heat"]
    assert len(shown) == 256
    assert min(value for _, value in shown) == 0.744


def test_a_histogram_counts_each_value_once() -> None:
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 1.0, 7.0):
        histogram.observe(value)
    assert histogram.told() == {"0.1": 2, "1.0": 2, "+Inf": 1, "sum": pytest.approx(8.65)}


def test_heat_is_the_share_of_the_limit_and_fades() -> None:
    pacer = Pacer(0.0)
    assert pacer.utilization(0.0) == []
    pacer.set_shards(0.0, [0.5, 0.25, 0.25])
    now = 0.0
    for _ in range(600):  # a minute at 500 records/s on shard 1 and 1,000/s spread over all
        now += 0.1
        pacer.stored(now, {1: (50, 5_000), -1: (100, 10_000)})
    assert pacer.utilization(now) == pytest.approx([0.5, 0.75, 0.25], rel=0.05)
    assert pacer.utilization(now + 100) == pytest.approx([0, 0, 0], abs=0.001)
    pacer.set_shards(now, [1.0])
    for _ in range(600):
        now += 0.1
        pacer.stored(now, {0: (10, 1024 * 1024 // 10)})
    assert pacer.utilization(now) == pytest.approx([1.0], rel=0.05)  # by bytes
    pacer.clear_shards(now)
    assert pacer.utilization(now) == []


# --- what deploy/ asks for ---

# of what prometheus_client says of the process, what is asked for
OF_THE_PROCESS = {"process_resident_memory_bytes"}
# what Prometheus adds by itself
_GIVEN = {"instance", "job"}
_WORDS = {"and", "or", "unless", "by", "without", "on", "ignoring", "group_left", "bool", "offset", "inf", "nan"}


def wrong(expr: str, known: dict[str, set[str]], legend: str = "") -> list[str]:
    """Metrics and labels of a PromQL expression that fastkin does not tell."""
    problems = []
    text = re.sub(r'"[^"]*"', '""', expr)
    text = re.sub(r"\[[^\]]*\]", "", text)
    labels: set[str] = set(re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)", legend))
    grouping = r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)"
    for group in re.findall(grouping, text):
        labels |= {label.strip() for label in group.split(",")}
    text = re.sub(grouping, "", text)
    names: set[str] = set()
    for name, selector in re.findall(r"(\w+)\s*\{([^}]*)\}", text):
        used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
        problems += [f"{name} has no label {label}" for label in sorted(used - known.get(name, set()) - _GIVEN)]
    text = re.sub(r"\{[^}]*\}", "", text)
    for name, call in re.findall(r"\b([A-Za-z_:][\w:]*)\s*(\(?)", text):
        if not call and name not in _WORDS:
            names.add(name)
    if not names:
        problems.append(f"no metric in {expr}")
    problems += [f"there is no {name}" for name in sorted(names - known.keys())]
    had = set().union(*(known.get(name, set()) for name in names)) | _GIVEN | {"value"}
    problems += [f"no label {label} in {expr}" for label in sorted(labels - had)]
    return problems


@pytest.mark.parametrize(
    ("expr", "problems"),
    [
        ("rate(m_total[5m]) > 0", []),
        ('sum by (pipeline, le) (rate(m_total{code=~"a b",instance="x"}[$__rate_interval]))', []),
        ("m_totl / m_total", ["there is no m_totl"]),
        ('m_total{cod="1"}', ["m_total has no label cod"]),
        ("sum without (shard) (m_total)", ["no label shard in sum without (shard) (m_total)"]),
        ("1", ["no metric in 1"]),
    ],
)
def test_the_check_finds_what_is_wrong(expr: str, problems: list[str]) -> None:
    assert wrong(expr, {"m_total": {"pipeline", "code", "le"}}) == problems


def from_the_registry(*more: Metered) -> dict[str, set[str]]:
    """Names of samples and their labels, as queries have them."""
    known: dict[str, set[str]] = {}
    for metric in (*more, *(row.metric for row in (*OF_ENGINE, *OF_RUN))):
        if metric is None:
            continue
        labels = set(metric.labels)
        if metric.kind == "histogram":
            known |= {f"{metric.name}_bucket": labels | {"le"}, f"{metric.name}_sum": labels}
            known[f"{metric.name}_count"] = labels
        else:
            known[metric.name] = labels
    return known


async def test_the_page_has_what_the_registry_says_and_nothing_else(server: Server, tmp_path: Path) -> None:
    async with everything(server, tmp_path) as (engine, _):
        page = await StatusServer(EnginePage(engine))._answer("/metrics", "")
    families: list[Metric] = list(parse(page.body.decode()))
    assert [family.name for family in families if not family.samples or not family.documentation] == []
    told: dict[str, set[str]] = {}
    for family in families:
        for sample in family.samples:
            told.setdefault(sample.name, set()).update(sample.labels)
    assert {name for name in told if not name.startswith("fastkin_")} >= OF_THE_PROCESS
    assert {name: labels for name, labels in told.items() if name.startswith("fastkin_")} == from_the_registry()


def test_dashboard_and_alerts_ask_for_what_is_told() -> None:
    known = from_the_registry(WORKER_UP, WORKER_RESTARTS) | {name: set() for name in ("up", *OF_THE_PROCESS)}
    dashboard = json.loads((ROOT / "deploy/grafana/fastkin.json").read_text())
    problems = []
    asked = ""
    for panel in dashboard["panels"]:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            problems += wrong(target["expr"], known, target["legendFormat"])
            asked += target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
            assert label in known[name] | _GIVEN
    alerts = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
    rules = [rule for group in alerts["groups"] for rule in group["rules"]]
    for rule in rules:
        problems += wrong(rule["expr"], known, json.dumps(rule["annotations"]))
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"]["summary"]
        assert rule["expr"].count("(") == rule["expr"].count(")")
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 10
    assert problems == []
    # and nothing that is told is left out of the dashboard
    told_names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in known if name.startswith("fastkin_")}
    assert {name for name in told_names if name not in asked} == set()


def test_places_on_the_dashboard_do_not_overlap() -> None:
    dashboard = json.loads((ROOT / "deploy/grafana/fastkin.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
