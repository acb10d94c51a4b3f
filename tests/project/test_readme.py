"""The README and the examples say what the code does. `python tests/project/test_readme.py` writes the tables."""

from __future__ import annotations

import ast
import json
import re
import runpy
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from aiohttp.test_utils import TestClient, TestServer

from fastkin import settings
from fastkin.config import Broker, Kinesis, Pipeline, Status, Tls
from fastkin.emulator import Emulator
from fastkin.settings import tables as keys

ROOT = Path(__file__).resolve().parent.parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- settings: written by tests/project/test_readme.py -->\n", "<!-- end of settings -->"


def tables() -> str:
    lines = []
    for title, kind, names in (
        ("`[broker]`", Broker, keys.BROKER_KEYS),
        ("`[broker.tls]`", Tls, keys.TLS_KEYS),
        ("`[kinesis]`, and in a `[[pipeline]]` that differs", Kinesis, keys.KINESIS_KEYS),
        ("`[[pipeline]]`", Pipeline, keys.PIPELINE_KEYS),
        ("`[status]`", Status, keys.STATUS_KEYS),
    ):
        lines += ["", f"**{title}**", "", "| key | default | allowed | |", "| --- | --- | --- | --- |"]
        defaults = {each.name: each.default for each in fields(kind)}
        for name, key in names.items():
            default = defaults.get(name, MISSING)
            shown = "" if default in (None, "", (), MISSING) else f"`{toml(default)}`"
            lines.append(f"| `{name}` | {shown} | {allowed(key)} | {key.doc} |".replace("|  |", "| |"))
    return "\n".join([*lines, "", ""])


def toml(value: object) -> str:
    return json.dumps(value)


def allowed(key: keys.Key) -> str:
    if key.choices:
        return ", ".join(f"`{choice}`" for choice in key.choices)
    if key.low is not None and key.high is not None:
        return f"{key.low:,} to {key.high:,}"
    return {"flag": "`true`, `false`", "list": "list of texts"}.get(key.kind, "text")


def parts() -> tuple[str, str, str]:
    before, _, rest = README.read_text().partition(BEGIN)
    inside, _, after = rest.partition(END)
    return before, inside, after


def test_the_settings_tables_are_those_of_the_code() -> None:
    assert parts()[1] == tables(), "run: python tests/project/test_readme.py"


def code(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_toml_of_the_readme_is_right(tmp_path: Path) -> None:
    text, spool = code("toml")
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
    before, _, after = parts()
    README.write_text(before + BEGIN + tables() + END + after)
