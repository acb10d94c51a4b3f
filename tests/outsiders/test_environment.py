"""What the environment and a .env file say, as other tools that read and write them have it."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest

from fastkin import settings
from fastkin.errors import ConfigError
from fastkin.settings import envfile

if TYPE_CHECKING:
    from pathlib import Path

MICRO = {"BROKER": "h", "CLIENTID": "c", "TOPIC": "t", "KIN_STREAM_NAME": "s", "AWS_REGION": "us-east-1"}


def value(tmp_path: Path, line: str) -> str:
    path = tmp_path / ".env"
    path.write_text(line, "utf-8", newline="")
    return envfile.read(path)["A"][0]


VALUES = [
    ("A=#", "#"),
    ("A=#secret", "#secret"),
    ("A=##", "##"),
    ("A=#a #b", "#a"),
    ("export A=#", "#"),
    ("A=a#b", "a#b"),
    ("A=a#", "a#"),
    ("A=a #b", "a"),
    ("A=a\t#b", "a"),
    ("A=a # b # c", "a"),
    ("A= #x", ""),
    ("A=  # x", ""),
    ("A =#x", "#x"),
    ("A=", ""),
    ("A='#x'#c", "#x"),
    ('A="#x" # c', "#x"),
    ('A=" #x"', " #x"),
    ("A=a'b # c", "a'b"),
    ("A=x=y #", "x=y"),
    ("A=$HOME", "$HOME"),
    ("A=${HOME}", "${HOME}"),
    ("A=a\u2028b", "a\u2028b"),
    ("A=/devices/+/#\r\nB=1\r\n", "/devices/+/#"),
]


@pytest.mark.parametrize(("line", "wanted"), VALUES)
def test_a_hash_begins_a_comment_only_after_white_space(tmp_path: Path, line: str, wanted: str) -> None:
    assert value(tmp_path, line) == wanted


@pytest.mark.parametrize("line", [line for line, _ in VALUES])
def test_env_values_are_those_of_python_dotenv(tmp_path: Path, line: str) -> None:
    from dotenv import dotenv_values

    told = dotenv_values(stream=io.StringIO(line, newline=""), interpolate=False)
    assert value(tmp_path, line) == told["A"]


def test_a_topic_of_a_hash_alone_reaches_the_settings(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("BROKER=h\nTOPIC=#\nMQTT_USER=u\nPASS=#secret\nKIN_STREAM_NAME=s\nAWS_REGION=us-east-1\n")
    made = settings.load(env={}, env_file=path)
    assert made.pipelines[0].topics == ("#",)
    assert made.broker.password == "#secret"


# as a kubelet sets them for services called fastkin, fastkin-status, fastkin-broker and fastkin-metrics-v2
LINKS = {
    "FASTKIN_SERVICE_HOST": "10.0.171.239",
    "FASTKIN_SERVICE_PORT": "9464",
    "FASTKIN_SERVICE_PORT_METRICS": "9464",
    "FASTKIN_PORT": "tcp://10.0.171.239:9464",
    "FASTKIN_PORT_9464_TCP": "tcp://10.0.171.239:9464",
    "FASTKIN_PORT_9464_TCP_PROTO": "tcp",
    "FASTKIN_PORT_9464_TCP_PORT": "9464",
    "FASTKIN_PORT_9464_TCP_ADDR": "10.0.171.239",
    "FASTKIN_STATUS_SERVICE_HOST": "fd00::12",
    "FASTKIN_STATUS_PORT": "tcp://[fd00::12]:80",
    "FASTKIN_STATUS_PORT_80_TCP_ADDR": "fd00::12",
    "FASTKIN_BROKER_PORT": "tcp://10.0.0.2:1883",
    "FASTKIN_METRICS_V2_PORT_53_UDP": "udp://10.0.0.3:53",
    "FASTKIN_METRICS_V2_PORT_53_UDP_PROTO": "udp",
    "FASTKIN_METRICS_V2_SERVICE_PORT_HTTP_ALT": "8080",
    # of services called broker, port and topic: no names of the microservice
    "BROKER_SERVICE_HOST": "10.0.0.9",
    "BROKER_PORT": "tcp://10.0.0.9:1883",
    "PORT_PORT": "tcp://10.0.0.9:1",
    "TOPIC_SERVICE_PORT": "1",
}


def test_service_links_of_kubernetes_are_passed_over(tmp_path: Path) -> None:
    made = settings.load(env=MICRO | LINKS)
    assert made == settings.load(env=MICRO)
    assert (made.broker.host, made.broker.port) == ("h", 1883)
    path = tmp_path / "f.toml"
    path.write_text(
        '[broker]\nhost = "h"\nport = 1884\n[kinesis]\nregion = "us-east-1"\n[status]\nport = 9464\n'
        '[[pipeline]]\nid = "p"\nstream = "s"\ntopics = ["t"]\ndead_letter = "none"\n'
    )
    made = settings.load(path, env=LINKS)
    assert (made.broker.port, made.status.port) == (1884, 9464)
    assert not any("FASTKIN" in warning for warning in made.warnings)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("FASTKIN_BROKERPORT", "1883"),
        ("FASTKIN_PORT", "9464"),
        ("FASTKIN_BROKR_PORT", "1883"),
        ("FASTKIN_SERVICE_HOST", "broker.example"),
        ("FASTKIN_STATUS_PORTS", "tcp://10.0.0.1:80"),
        ("FASTKIN_BROKER_HOSTS", "h"),
    ],
)
def test_a_near_miss_of_a_name_is_still_an_error_beside_service_links(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: is not a setting"):
        settings.load(env=MICRO | LINKS | {name: text})


def test_a_real_port_of_ours_still_counts_beside_service_links() -> None:
    made = settings.load(env=MICRO | LINKS | {"FASTKIN_STATUS_PORT": "9465"})
    assert made.status.port == 9465
    with pytest.raises(ConfigError, match="FASTKIN_STATUS_PORT"):
        settings.load(env=MICRO | {"FASTKIN_STATUS_PORT": "tcp:/10.0.0.1"})
