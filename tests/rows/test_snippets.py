"""Each snippet of docs/coming-from/ does what the page says: Python runs, settings can be read."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fastkin import settings
from fastkin.emulator import Emulator
from rows.snippets import PAGES, Snippet, snippets
from support.servers import ACCESS_KEY, SECRET_KEY

if TYPE_CHECKING:
    from fastkin.config import Settings

TESTS = Path(__file__).resolve().parent.parent
PEM = TESTS / "wrong_settings"
STREAMS = ("clicks", "orders", "telemetry", "testStream", "TEST")
FILES = {"AmazonRootCA1.pem": "good.pem", "device.pem.crt": "good.pem", "private.pem.key": "good.key"}
OTHERS = {"README", "electric-imp", "boto3"}  # pages of programs: there is nothing to set


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that a page names are there."""
    monkeypatch.chdir(tmp_path)
    for name, good in FILES.items():
        (tmp_path / name).write_bytes((PEM / good).read_bytes())


def named(*languages: str) -> Any:
    return pytest.mark.parametrize("snippet", snippets(*languages), ids=lambda snippet: snippet.name)


@named("python")
async def test_python_runs(snippet: Snippet, monkeypatch: pytest.MonkeyPatch) -> None:
    code = compile(snippet.text, snippet.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)

    def run() -> None:
        # A loop of its own, in a thread: some wait for their outcome and do not await it.
        result = eval(code, {"__name__": snippet.name})
        if inspect.iscoroutine(result):
            asyncio.run(result)

    async with Emulator(dict.fromkeys(STREAMS, 2)) as emulator:
        monkeypatch.setenv("AWS_ENDPOINT_URL_KINESIS", emulator.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        await asyncio.to_thread(run)
        stored = sum(len(emulator.stored(name)) for name in STREAMS)
    # what puts must have stored something, unless it is about a stream that is not there
    assert bool(stored) == ("Producer(" in snippet.text and "no-such-stream" not in snippet.text)


def read(snippet: Snippet, folder: Path) -> Settings:
    path = folder / f"{snippet.name}.{snippet.language}"
    path.write_text(snippet.text, "utf-8")
    return settings.load(path, env={}) if snippet.language == "toml" else settings.load(env={}, env_file=path)


@named("toml", "sh")
def test_settings_are_read(snippet: Snippet, tmp_path: Path) -> None:
    made = read(snippet, tmp_path)
    assert made.pipelines
    assert all(pipeline.enabled for pipeline in made.pipelines)


@named("json")
def test_json_is_json(snippet: Snippet) -> None:
    json.loads(snippet.text)


def test_every_snippet_is_of_a_kind_that_is_tried() -> None:
    assert {snippet.language for snippet in snippets()} == {"python", "toml", "sh", "json"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_a_table_and_snippets_and_its_links_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    rows = [line for line in text.splitlines() if re.match(r"\| .* \|$", line)]
    assert len(rows) > 8
    if page.stem != "README":
        assert rows[0].endswith(" | what differs, and why |")
        languages = {snippet.language for snippet in snippets() if re.fullmatch(rf"{page.stem}-\d+", snippet.name)}
        assert languages & ({"python"} if page.stem in OTHERS else {"toml"})


def test_the_index_names_every_page() -> None:
    index = (PAGES[0].parent / "README.md").read_text("utf-8")
    assert [page.name for page in PAGES if page.name != "README.md" and f"({page.name})" not in index] == []
    assert len(PAGES) == 11


# -- what single pages promise


def test_the_pages_settings_mean_what_the_pages_say(tmp_path: Path) -> None:
    made = {each.name: read(each, tmp_path) for each in snippets("toml", "sh")}
    events, telemetry = made["mode-1"].pipelines
    assert (events.topics, events.format, telemetry.format) == (("/devices/+/event",), "event", "bulk")
    (device,) = made["mode-2"].pipelines
    assert (device.qos, made["mode-2"].broker.clean_session, made["mode-2"].broker.protocol) == (0, True, "3.1.1")
    (spark,) = made["spark-protocol-aws-kinesis-1"].pipelines
    assert (spark.kinesis.stream, spark.kinesis.access_key, spark.envelope) == ("TEST", "TEST", "spark")
    (iot,) = made["aws-iot-core-pipeline-1"].pipelines
    assert (iot.topic_field, iot.separator) == ("topic", "\n")
    (micro,) = made["mqtt-to-kinesis-microservice-1"].pipelines
    assert (micro.budget_records, micro.kinesis.max_connections) == (2000, 10)
    assert (micro.partition_key, micro.kinesis.session_name) == ("static:someMeaningfulValue", "fastkin")
    assert [each.aggregation for each in made["kpl-3"].pipelines] == ["kpl"]
