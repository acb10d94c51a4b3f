from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from fastkin.arn import StreamArn
from fastkin.aws.endpoint import (
    Endpoint,
    Url,
    captured_endpoint,
    find_region,
    light_endpoint,
    parse_arn,
    resolve_endpoint,
    split_url,
)
from fastkin.aws.signing import Credentials
from fastkin.config import Kinesis
from fastkin.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

ACCOUNT = "123456789012"
ARN = "arn:aws:kinesis:eu-west-1:210987654321:stream/welders"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def keys(account: str | None = None) -> Credentials:
    return Credentials("AKIDEXAMPLE", "secret", None, account)


REGIONS = ["us-east-1", "eu-central-1", "ap-southeast-7", "il-central-1", "mx-central-1", "cn-north-1", "us-gov-west-1"]


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("account", [None, ACCOUNT])
@pytest.mark.parametrize("by_arn", [False, True])
async def test_the_plain_rule_is_the_sdks(region: str, account: str | None, by_arn: bool) -> None:
    partition = {"cn": "aws-cn", "us-gov": "aws-us-gov"}.get(region.rpartition("-")[0].rpartition("-")[0], "aws")
    arn = f"arn:{partition}:kinesis:{region}:210987654321:stream/x" if by_arn else None
    kinesis = Kinesis(stream=None if by_arn else "x", stream_arn=arn, region=region)
    light = light_endpoint(kinesis, account)
    assert light is not None
    assert light == await captured_endpoint(kinesis, keys(account))


ENVIRONMENTS: list[dict[str, str]] = [
    {"AWS_ENDPOINT_URL_KINESIS": "http://one:1/", "AWS_ENDPOINT_URL": "http://two:2/"},
    {"AWS_ENDPOINT_URL": "http://two:2/base/path"},
    {"AWS_ENDPOINT_URL": "https://two"},
    {"AWS_ENDPOINT_URL": "http://two:80/"},
    {"AWS_ENDPOINT_URL": "http://two:2/", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"},
    {"AWS_ENDPOINT_URL": "http://two:2/", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "false"},
    {"AWS_ENDPOINT_URL_KINESIS": ""},
    {"AWS_ACCOUNT_ID_ENDPOINT_MODE": "preferred"},
]


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda e: ",".join(e))
@pytest.mark.parametrize("by_arn", [False, True])
@pytest.mark.parametrize("url", [None, "http://localhost:4567/own"])
async def test_configured_urls_win_as_with_the_sdk(
    environment: dict[str, str], by_arn: bool, url: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    kinesis = Kinesis(
        stream=None if by_arn else "x", stream_arn=ARN if by_arn else None, region="eu-west-1", endpoint_url=url
    )
    light = light_endpoint(kinesis)
    assert light is not None
    assert light == await captured_endpoint(kinesis, keys())


ASKED = [
    ({"AWS_USE_FIPS_ENDPOINT": "true"}, "us-east-1", None, "https://kinesis-fips.us-east-1.amazonaws.com"),
    ({"AWS_USE_DUALSTACK_ENDPOINT": "true"}, "us-east-1", None, "https://kinesis.us-east-1.api.aws"),
    (
        {"AWS_USE_FIPS_ENDPOINT": "true", "AWS_USE_DUALSTACK_ENDPOINT": "true"},
        "us-east-1",
        "arn:aws:kinesis:us-east-1:210987654321:stream/x",
        "https://210987654321.data-kinesis-fips.us-east-1.api.aws",
    ),
    ({}, "us-iso-east-1", None, "https://kinesis.us-iso-east-1.c2s.ic.gov"),
    ({"AWS_ACCOUNT_ID_ENDPOINT_MODE": "disabled"}, "us-east-1", None, "https://kinesis.us-east-1.amazonaws.com"),
]


@pytest.mark.parametrize(("environment", "region", "arn", "base"), ASKED)
async def test_other_cases_are_asked_from_the_sdk(
    environment: dict[str, str], region: str, arn: str | None, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    kinesis = Kinesis(stream=None if arn else "x", stream_arn=arn, region=region)
    assert light_endpoint(kinesis, ACCOUNT) is None
    account = ACCOUNT if "AWS_ACCOUNT_ID_ENDPOINT_MODE" in environment else None
    assert (await resolve_endpoint(kinesis, keys(account))).data.base == base


async def test_a_shared_config_file_is_heard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(
        "[default]\nregion = eu-north-1\n[profile plant]\nservices = plant\n"
        "[services plant]\nkinesis =\n  endpoint_url = http://from-profile:1234/\n"
    )
    assert (await resolve_endpoint(Kinesis(stream="x"), keys())).region == "eu-north-1"
    endpoint = await resolve_endpoint(Kinesis(stream="x", profile="plant", region="eu-west-1"), keys())
    assert endpoint.data == Url("http://from-profile:1234", "from-profile:1234", "/")
    monkeypatch.setenv("AWS_PROFILE", "plant")
    assert (
        await resolve_endpoint(Kinesis(stream="x", region="eu-west-1"), keys())
    ).data.base == "http://from-profile:1234"


async def test_no_region_at_all() -> None:
    with pytest.raises(ConfigError, match="region"):
        await resolve_endpoint(Kinesis(stream="x"), keys())


@pytest.mark.parametrize(
    ("setting", "environment", "arn", "region"),
    [
        ("eu-west-1", {"AWS_REGION": "us-east-1"}, None, "eu-west-1"),
        (None, {"AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-2"}, None, "us-east-1"),
        (None, {"AWS_DEFAULT_REGION": "us-east-2"}, None, "us-east-2"),
        (None, {}, ARN, "eu-west-1"),
        ("eu-west-1", {}, ARN, "eu-west-1"),
        (None, {}, None, None),
    ],
)
def test_region(setting: str | None, environment: dict[str, str], arn: str | None, region: str | None) -> None:
    assert find_region(Kinesis(stream="x", stream_arn=arn, region=setting), environment) == region


def test_a_region_that_is_not_the_streams() -> None:
    with pytest.raises(ConfigError, match="the stream is in eu-west-1, the region is set to us-east-1"):
        find_region(Kinesis(stream_arn=ARN, region="us-east-1"), {})
    with pytest.raises(ConfigError, match="us-east-1"):
        find_region(Kinesis(stream_arn=ARN), {"AWS_REGION": "us-east-1"})
    with pytest.raises(ConfigError, match="is not a region"):
        find_region(Kinesis(stream="x", region="eu-west-1/../x"), {})


def test_arn() -> None:
    assert parse_arn(ARN) == StreamArn("aws", "eu-west-1", "210987654321", "welders")
    for bad in ("", "welders", ARN + "/consumer/c:1", ARN.replace("stream", "table"), ARN + "\n"):
        with pytest.raises(ConfigError, match="is not the ARN of a stream"):
            parse_arn(bad)


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("http://localhost:4567", ("http://localhost:4567", "localhost:4567", "/")),
        ("https://Example.COM:443/", ("https://example.com", "example.com", "/")),
        ("http://[::1]:4567/a", ("http://[::1]:4567", "[::1]:4567", "/a")),
        ("http://h/a b/%20/ä", ("http://h", "h", "/a%20b/%20/%C3%A4")),
        ("http://h//x/../y/", ("http://h", "h", "//x/../y/")),
    ],
)
def test_urls_are_taken_apart(url: str, parts: tuple[str, str, str]) -> None:
    assert split_url(url) == parts


@pytest.mark.parametrize(
    "url",
    [
        "localhost:4567",
        "ftp://h",
        "http://",
        "http://h:99999",
        "http://user:pass-word@h/",
        "http://h/?a=b",
        "http://h/#x",
    ],
)
def test_urls_that_cannot_be_called(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        split_url(url)
    assert "pass-word" not in str(caught.value)


@pytest.mark.process
def test_plain_cases_never_load_the_sdk() -> None:
    code = (
        "import sys, asyncio\n"
        "from fastkin.config import Kinesis\n"
        "from fastkin.aws.native import KinesisClient\n"
        "import fastkin.aws.http, fastkin.aws.credentials, fastkin.aws.endpoint\n"
        "async def main():\n"
        "    for more in ({'stream': 'x'}, {'stream_arn': '" + ARN + "'}):\n"
        "        client = KinesisClient(Kinesis(region='eu-west-1', **more))\n"
        "        await client.start()\n"
        "        await client.close()\n"
        "asyncio.run(main())\n"
        "bad = [name for name in sys.modules if name.partition('.')[0] in ('aiobotocore', 'botocore', 'aiohttp')]\n"
        "assert not bad, bad\n"
    )
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "secret"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr


def test_an_endpoint_is_one_for_both_when_it_is_given() -> None:
    url = Url("http://h:1", "h:1", "/")
    assert light_endpoint(Kinesis(stream="x", region="r", endpoint_url="http://h:1")) == Endpoint(url, url, "r")
