"""docs/threat-model.md names settings, tests, fuzz targets and numbers: they exist, and the numbers are the code's."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from fastkin import config
from fastkin.aws import http_answer as transport
from fuzz import fuzz_targets

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs/threat-model.md").read_text("utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+(?:\.py)?)(?:::(\w+))?`", PAGE)))
# between backticks and no setting
OTHERS = {
    "lines",
    "reading",
    "shape",
    "port",
    "host",
    "frame",
    "answer",
    "restore",
    "mqtt",
    "router",
    "http",
    "settings",
}


def test_the_page_names_tests() -> None:
    assert len(NAMED) > 30


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_test_that_is_named_exists(file: str, name: str) -> None:
    path = ROOT / file
    assert path.exists()
    if name:
        assert re.search(rf"^(async )?def {name}\(", path.read_text("utf-8"), re.MULTILINE)


def test_settings_that_are_named_exist() -> None:
    known = {
        field.name
        for table in (config.Broker, config.Tls, config.Kinesis, config.Pipeline, config.Status)
        for field in fields(table)
    }
    assert {"port", "host"} <= {field.name for field in fields(config.Status)}
    named = set(re.findall(r"`([a-z][a-z_]+)`", PAGE)) - OTHERS
    assert len(named) > 12
    assert named <= known


def test_fuzz_targets_that_are_named_exist() -> None:
    named = set(re.findall(r"`([a-z]+)`", " ".join(re.findall(r"fuzz targets? `[a-z]+`(?: and `[a-z]+`)?", PAGE))))
    assert named == set(fuzz_targets.TARGETS)


def test_numbers_are_the_code_s() -> None:
    assert transport.PUT_ANSWER == 1 << 20
    assert transport.MAX_ANSWER == 16 << 20
    assert (transport.MAX_HEADERS, transport.MAX_HEADER_COUNT, transport.FRAMING_PER_BYTE) == (64 << 10, 256, 8)
    assert config.Broker().max_packet_bytes == 8 << 20
    assert config.Broker().topic_alias_maximum == 0
    assert config.Status().host == "127.0.0.1"


def test_the_readme_links_here() -> None:
    assert "docs/threat-model.md" in (ROOT / "README.md").read_text("utf-8")
