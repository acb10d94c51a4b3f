"""The rows of config.py: each is sound, files are held to them, and one more row is one more setting."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from fastkin import config
from fastkin.errors import ConfigError
from fastkin.formats.table import FORMATS
from fastkin.setting_row import Row, row, rows_of
from fastkin.settings import load, tables
from fastkin.settings.values import Value, parse

ROWS = [each for rows in tables.TABLES.values() for each in rows.values()]
NUMBERS = [each for each in ROWS if each.kind in {"int", "number"}]
SMALL = '[broker]\nclient_id = "c"\n[[pipeline]]\nid = "a"\ntopics = ["t"]\nstream = "s"\ndead_letter = "none"\n'


def name(value: object) -> str | None:
    return f"{value.section}.{value.key}" if isinstance(value, Row) else None


def below(least: float, kind: str) -> float:
    return least - 1 if kind == "int" else math.nextafter(least, -math.inf)


def above(most: float, kind: str) -> float:
    return most + 1 if kind == "int" else math.nextafter(most, math.inf)


# --- each row is sound ---


@pytest.mark.parametrize("each", [*ROWS, *tables.ARGUMENTS.values()], ids=name)
def test_a_row_says_what_it_does_and_allows_its_own_default(each: Row) -> None:
    assert each.doc
    assert "\n" not in each.doc
    assert (each.least is None) == (each.most is None) == (each.kind not in {"int", "number"})
    if each.default is not None:
        assert parse(each, Value(each.default, "here")) == each.default
    if each.argument_least is not None:
        assert each.argument
        assert each.least is not None
        assert each.argument_least < each.least


def test_a_name_means_one_setting() -> None:
    for names in (
        [each.variable for each in ROWS],
        [each.microservice for each in ROWS if each.microservice],
        [other for each in ROWS for other in each.aliases],
        [each.key for each in ROWS if each.argument],
        [each.key for each in ROWS if each.section in {"kinesis", "pipeline"}],  # a pipeline has both
    ):
        assert len(names) == len(set(names))


def test_a_number_with_a_unit_says_it_in_its_name() -> None:
    units = {each.key: each.unit for each in NUMBERS if each.unit}
    assert units["linger_ms"] == "ms"
    assert units["spool_after_s"] == "s"
    assert units["budget_bytes"] == "bytes"
    assert not {"max_records", "qos", "port"} & units.keys()


@pytest.mark.parametrize("table", [*config.SECTIONS.values(), config.ProducerOnly])
def test_secrets_are_no_part_of_the_repr(table: type) -> None:
    rows = rows_of(table, "")
    assert {each.name for each in fields(table) if not each.repr} == {key for key in rows if rows[key].secret}


@pytest.mark.parametrize("table", config.SECTIONS.values())
def test_a_table_has_no_field_without_a_row_that_is_not_known(table: type) -> None:
    """A setting without a row would be read from nowhere."""
    made = {"tls", "client_id_drawn", "kinesis", "share", "left_over"}
    assert {each.name for each in fields(table)} - rows_of(table, "").keys() <= made


def test_the_facts_of_row_are_those_of_its_class() -> None:
    written = set(inspect.signature(row).parameters) - {"default", "doc"}
    read = {"section", "key", "kind", "default"}
    assert written == {each.name for each in fields(Row)} - read - {"doc"}


# --- what a file or the environment says ---


@pytest.mark.parametrize("each", NUMBERS, ids=name)
def test_the_ends_of_a_range_are_allowed_and_what_is_beyond_is_not(each: Row) -> None:
    assert each.least is not None
    assert each.most is not None
    cure = f"use {each.least} to {each.most}" + (f": {each.why}" if each.why else "")
    for end in (each.least, each.most):
        assert parse(each, Value(end, "here")) == end
        assert parse(each, Value(str(end), "here", text=True)) == end
    for beyond in (below(each.least, each.kind), above(each.most, each.kind)):
        for value in (Value(beyond, "here"), Value(str(beyond), "here", text=True)):
            with pytest.raises(ConfigError) as caught:
                parse(each, value)
            assert str(caught.value) == f"here: {beyond} is out of range; {cure}"


@pytest.mark.parametrize("each", NUMBERS, ids=name)
@pytest.mark.parametrize("value", ["7", True, None, [7], math.nan])
def test_a_number_is_a_number(each: Row, value: object) -> None:
    wanted = "a whole number" if each.kind == "int" else "a number"
    with pytest.raises(ConfigError) as caught:
        parse(each, Value(value, "here"))
    assert str(caught.value) == f"here: {value!r} is not {wanted}; use {each.least} to {each.most}"


@pytest.mark.parametrize("each", [each for each in ROWS if each.kind == "text"], ids=name)
def test_a_text_is_a_text_of_one_line(each: Row) -> None:
    for value, problem in (
        (5, 'is not text in quotes; write "..."'),
        ("a\nb", "has a control character in it; remove"),
    ):
        with pytest.raises(ConfigError) as caught:
            parse(each, Value(value, "here"))
        assert problem in str(caught.value)


@pytest.mark.parametrize("each", [each for each in ROWS if each.choices], ids=name)
def test_a_choice_is_one_of_those_of_the_type(each: Row) -> None:
    for choice in each.choices:
        assert parse(each, Value(choice, "here")) == choice
    with pytest.raises(ConfigError) as caught:
        parse(each, Value("zzz", "here"))
    assert str(caught.value) == f"here: 'zzz' is no value of {each.key}; use {', '.join(each.shown_choices)}"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mqtt://h:0", "key 'url': 0 is out of range; use 1 to 65535"),
        ("mqtt://u:p%00@h", "key 'url': has a control character in it; remove it"),
        ("***", "which stands for a secret"),
    ],
)
def test_the_parts_of_an_address_are_held_to_their_rows(tmp_path: Path, url: str, says: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(SMALL.replace("[broker]", f'[broker]\nurl = "{url}"'))
    with pytest.raises(ConfigError, match=r"x\.toml:2: ") as caught:
        load(path, env={})
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('client_id = "c"', f'client_id = "{"x" * 65_536}"\nclean_session = false', "is longer than 65,535 bytes"),
        ('topics = ["t"]', 'topics = []\nbulk_label = "a/b"', "is not one level of a topic"),
        ('stream = "s"', 'stream = "a b"\nstream_arn = "arn:x"', "is not the ARN of a stream"),
    ],
)
def test_a_value_that_was_told_wrong_is_not_the_cause_of_more(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(SMALL.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load(path, env={})
    lines = str(caught.value).splitlines()
    assert says in lines[-1]
    assert len(lines) == (2 if "arn" in new else 1)


# --- one more setting ---

TOY = '    toy_ms: float = row(7.0, "a toy", least=1, most=9, aliases=("toyTime",), microservice="TOY")\n'
TRY = """
import importlib.util, json, sys

import fastkin

spec = importlib.util.spec_from_file_location("fastkin.config", sys.argv[1])
sys.modules["fastkin.config"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

from fastkin.settings import SettingsError, load
from fastkin.settings.show import effective

def read(more="", **env):
    with open(sys.argv[2], "w") as file:
        file.write(sys.argv[3] + more)
    try:
        made = load(sys.argv[2], env=env)
    except SettingsError as error:
        return str(error).removeprefix(sys.argv[2])
    assert f"toy_ms = {made.pipelines[0].toy_ms}" in effective(made).splitlines()
    return made.pipelines[0].toy_ms

def micro(**env):
    return load(env={"BROKER": "h", "TOPIC": "t", "KIN_STREAM_NAME": "s", "CLIENTID": "c"} | env).pipelines[0].toy_ms

print(json.dumps({
    "default": read(),
    "file": read("toy_ms = 3"),
    "alias": read("toyTime = 4"),
    "environment": read("toy_ms = 3", FASTKIN_PIPELINE_TOY_MS="5.5"),
    "microservice": micro(TOY="6"),
    "range": read("toy_ms = 10"),
    "kind": read(FASTKIN_PIPELINE_TOY_MS="soon"),
    "near": read("toy = 1"),
}))
"""


@pytest.mark.process
def test_one_more_row_is_one_more_setting(tmp_path: Path) -> None:
    """A copy of config.py with one line more, and nothing else changed."""
    source = Path(config.__file__).read_text()
    last = "    stdout: bool = row("
    assert source.count(last) == 1
    (tmp_path / "config.py").write_text(source.replace(last, TOY + last))
    arguments = [str(tmp_path / "config.py"), str(tmp_path / "x.toml"), SMALL]
    done = subprocess.run([sys.executable, "-c", TRY, *arguments], capture_output=True, text=True, check=False)
    assert not done.stderr
    assert json.loads(done.stdout) == {
        "default": 7.0,
        "file": 3.0,
        "alias": 4.0,
        "environment": 5.5,
        "microservice": 6.0,
        "range": ":8: [[pipeline]] 1 ('a') key 'toy_ms': 10 is out of range; use 1 to 9",
        "kind": "environment variable FASTKIN_PIPELINE_TOY_MS: 'soon' is not a number; use 1 to 9",
        "near": ":8: [[pipeline]] 1 ('a') key 'toy': is not a key of this table; did you mean toy_ms?",
    }


TRY_FORMAT = """
import json, sys
import fastkin.formats.table as table
from fastkin._codec import PayloadFormat

row = PayloadFormat("words", 9, "a word is a record", bytes.split)
table.ROWS += (row,)
table.FORMATS[row.name] = row

from fastkin.commands.cli import replay_dead_letters
from fastkin.errors import ConfigError
from fastkin.settings import load_settings
from fastkin.settings.tables import PIPELINE_KEYS

said = {}
for name in ("words", "wards", "x"):
    with open(sys.argv[1], "w") as file:
        file.write(sys.argv[2] + f'format = "{name}"\\n')
    try:
        said[name] = load_settings(sys.argv[1]).pipelines[0].format
    except ConfigError as error:
        said[name] = str(error).partition("key 'format': ")[2]
said["readme"] = PIPELINE_KEYS["format"].doc
said["help"] = next(list(each.type.choices) for each in replay_dead_letters.params if each.name == "form")
print(json.dumps(said))
"""


@pytest.mark.process
def test_one_more_payload_format_is_one_more_choice(tmp_path: Path) -> None:
    """A row more in the table of formats, and nothing else changed."""
    arguments = [str(tmp_path / "x.toml"), SMALL]
    known = [*FORMATS, "words"]
    done = subprocess.run([sys.executable, "-c", TRY_FORMAT, *arguments], capture_output=True, text=True, check=False)
    assert not done.stderr
    assert json.loads(done.stdout) == {
        "words": "words",
        "wards": "'wards' is no value of format; did you mean words?",
        "x": f"'x' is no value of format; use {', '.join(known)}",
        "readme": "of `topics`. "
        + "; ".join([*(f"`{row.name}`: {row.doc}" for row in FORMATS.values()), "`words`: a word is a record"]),
        "help": known,
    }
