"""The README and the examples say what the code does. `python tests/project/test_readme.py` writes the tables."""

from __future__ import annotations

import ast
import json
import re
import runpy
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from aiohttp.test_utils import TestClient, TestServer

from fastkin import settings
from fastkin.emulator import Emulator
from fastkin.emulator.faults import KINDS
from fastkin.settings import tables as keys
from fastkin.status.registry import OF_ENGINE, OF_RUN, WORKER_RESTARTS, WORKER_UP

if TYPE_CHECKING:
    from fastkin.setting_row import Row

ROOT = Path(__file__).resolve().parent.parent.parent
README = ROOT / "README.md"
_MARKS = ("<!-- {}: written by tests/project/test_readme.py -->\n", "<!-- end of {} -->")


TITLES = {"kinesis": "`[kinesis]`, and in a `[[pipeline]]` that differs", "pipeline": "`[[pipeline]]`"}


def settings_tables() -> str:
    lines = []
    for section, rows in keys.TABLES.items():
        title = TITLES.get(section, f"`[{section}]`")
        lines += ["", f"**{title}**", "", "| key | default | allowed | |", "| --- | --- | --- | --- |"]
        for name, row in rows.items():
            default = "" if row.default in (None, "", ()) else f"`{json.dumps(row.default)}`"
            lines.append(f"| `{name}` | {default} | {allowed(row)} | {row.doc} |".replace("|  |", "| |"))
    return "\n".join([*lines, "", ""])


def allowed(row: Row) -> str:
    if row.choices:
        return ", ".join(f"`{choice}`" for choice in row.shown_choices)
    if row.least is not None:
        return f"{row.least:,} to {row.most:,} {row.unit}".rstrip()
    return {"flag": "`true`, `false`", "list": "list of texts"}.get(row.kind, "text")


def metrics_table() -> str:
    lines = ["", "| metric, its label | kind | unit | what it says |", "| --- | --- | --- | --- |"]
    for metric in (WORKER_UP, WORKER_RESTARTS, *(row.metric for row in (*OF_ENGINE, *OF_RUN))):
        if metric is not None:
            (label,) = set(metric.labels) - {"pipeline"} or {""}
            name = f"`{metric.name}`" + (f" by `{label}`" if label else "")
            lines.append(f"| {name} | {metric.kind} | {metric.unit} | {metric.doc} |")
    return "\n".join([*lines, "", ""])


WRITTEN = {"settings": settings_tables, "metrics": metrics_table}


def parts(title: str) -> tuple[str, str, str]:
    """README before a written part, the part itself, and README behind it; the marks are not in the part."""
    begin, end = (mark.format(title) for mark in _MARKS)
    text = README.read_text()
    assert text.count(begin) == text.count(end) == 1
    before, _, rest = text.partition(begin)
    inside, _, after = rest.partition(end)
    return before + begin, inside, end + after


@pytest.mark.parametrize("title", WRITTEN)
def test_the_written_tables_are_those_of_the_code(title: str) -> None:
    assert parts(title)[1] == WRITTEN[title](), "run: python tests/project/test_readme.py"


def code(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_toml_of_the_readme_is_right(tmp_path: Path) -> None:
    text, spool, files = code("toml")
    path = tmp_path / "x.toml"
    path.write_text(text)
    made = settings.load(path, env={})
    assert [pipeline.format for pipeline in made.pipelines] == ["raw", "bulk"]
    assert made.warnings == ()
    # the part about outages, with the rest of what a file needs
    spool = spool.replace("/var/lib/fastkin", str(tmp_path)) + 'stream = "s"\nregion = "eu-west-1"\n'
    path.write_text('[broker]\nclient_id = "c"\n' + spool + 'dead_letter = "none"\n')
    (pipeline,) = settings.load(path, env={}).pipelines
    assert (pipeline.on_full, pipeline.spool_max_bytes) == ("spool", 10 << 30)
    path.write_text('[broker]\nclient_id = "c"\n' + files.replace("/var/lib/fastkin", str(tmp_path)))
    made = settings.load(path, env={})
    assert made.warnings == ()
    assert [pipeline.target for pipeline in made.pipelines] == ["s3://plant-data"]


def test_the_environment_of_the_readme_is_right(tmp_path: Path) -> None:
    (text,) = code("sh")
    path = tmp_path / ".env"
    path.write_text(text)
    made = settings.load(env={"USER": "me"}, env_file=path)
    assert made.broker.url == "mqtts://broker.example.com:8883"
    assert not made.broker.clean_session


@pytest.mark.parametrize("name", sorted(keys.MICROSERVICE) + sorted(keys.MICROSERVICE_MORE))
def test_the_readme_names_every_variable_of_the_microservice(name: str) -> None:
    assert f"`{name}`" in README.read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_the_readme_names_every_fault_of_the_emulator(kind: str) -> None:
    assert f"`{kind}`" in README.read_text().partition("`--faults FILE`")[2].partition("##")[0]


def test_the_examples_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    made = settings.load("examples/fastkin.toml", env={})
    assert [pipeline.id for pipeline in made.pipelines] == ["machines", "frames"]
    made = settings.load(env={}, env_file="examples/microservice.env")
    assert made.pipelines[0].kinesis.endpoint_url == "http://localhost:4567"


@pytest.mark.parametrize("path", sorted(ROOT.glob("deploy/*.json")), ids=lambda path: path.name)
def test_policies_are_json(path: Path) -> None:
    (statement, *_) = json.loads(path.read_text())["Statement"]
    assert statement["Effect"] == "Allow"


@pytest.mark.parametrize("text", code("python"))
def test_the_python_of_the_readme_compiles(text: str) -> None:
    compile(text, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


async def test_the_service_that_embeds_a_producer(monkeypatch: pytest.MonkeyPatch) -> None:
    place = ROOT / "examples" / "embed_producer.py"
    example = runpy.run_path(str(place))
    async with Emulator({"welders": 2}) as emulator:
        monkeypatch.setenv("AWS_ENDPOINT_URL_KINESIS", emulator.url)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "any")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        async with TestClient(TestServer(example["application"]())) as client:
            answer = await (await client.post("/", data=b"welded")).json()
        (stored,) = emulator.stored("welders")
        assert stored.data == b"welded"
        assert answer == {"shard": stored.shard_id, "number": stored.sequence_number}


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert target.startswith("https://") or (ROOT / target).exists(), target


if __name__ == "__main__":
    for each, written in WRITTEN.items():
        before, _, after = parts(each)
        README.write_text(before + written() + after)
