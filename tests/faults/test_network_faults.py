"""The way between fastkin and Kinesis, plain and through TLS; certificates, names, clocks and keys."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from authority import YESTERDAY, Authority
from fastkin.emulator import Secret
from harness import Rig
from support.servers import ACCESS_KEY, SECRET_KEY

if TYPE_CHECKING:
    from pathlib import Path

SIGNED = {"credentials": {ACCESS_KEY: SECRET_KEY}}


# -- the wire


@pytest.mark.faults_full
def test_connections_to_kinesis_are_cut(tmp_path: Path) -> None:
    with Rig(tmp_path, emulator={"latency_ms": 30}) as rig:
        rig.flow(2500)
        for target in (200, 500, 800, 1100, 1400, 1700):
            rig.stored(target)
            rig.call(rig.kinesis_way.cut)
        rig.settle()
        rig.finish()


@pytest.mark.faults_full
def test_a_request_is_cut_on_its_way(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.flow(2000)
        for number, target in enumerate((200, 500, 800, 1100)):
            rig.stored(target)
            rig.kinesis_way.up.cut_in = 100 + number * 700
        rig.settle()
        assert rig.finish()["dup"] == 0


@pytest.mark.faults_full
def test_an_answer_is_cut_on_its_way(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.flow(2000)
        for number, target in enumerate((200, 500, 800, 1100)):
            rig.stored(target)
            rig.kinesis_way.down.cut_in = 10 + number * 300
        rig.settle()
        books = rig.finish()
        assert books["dup"] > 0, "the fault did not bite"


@pytest.mark.faults_full
def test_kinesis_half_closes(tmp_path: Path) -> None:
    with Rig(tmp_path, emulator={"latency_ms": 30}) as rig:
        rig.flow(2000)
        for target in (200, 600, 1000):
            rig.stored(target)
            rig.call(rig.kinesis_way.half_close)
        rig.settle()
        rig.finish()


@pytest.mark.faults_full
def test_answers_trickle(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.kinesis_way.down.trickle = 97
        rig.flow(1000)
        rig.settle()
        assert rig.finish()["dup"] == 0


@pytest.mark.faults_full
def test_requests_trickle(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.kinesis_way.up.trickle = 211
        rig.flow(600)
        rig.settle()
        assert rig.finish()["dup"] == 0


@pytest.mark.faults_full
def test_the_way_to_kinesis_is_long(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.kinesis_way.down.delay_s = rig.kinesis_way.up.delay_s = 0.15
        rig.flow(1500)
        rig.settle()
        assert rig.finish()["dup"] == 0


def test_a_black_hole_on_the_way_to_kinesis(tmp_path: Path) -> None:
    """Longer than the timeout of a call; then everything that was held arrives, late."""
    with Rig(tmp_path, kinesis={"request_timeout_s": 0.6, "connect_timeout_s": 0.5}) as rig:
        rig.flow(1500)
        rig.stored(400)
        rig.call(rig.kinesis_way.hold)
        time.sleep(1.5)
        rig.call(rig.kinesis_way.release)
        rig.settle()
        rig.finish()


@pytest.mark.faults_full
def test_a_black_hole_for_answers_only(tmp_path: Path) -> None:
    """The worst for duplicates: everything is stored, no answer comes back in time."""
    with Rig(tmp_path, kinesis={"request_timeout_s": 0.5}) as rig:
        rig.flow(1500)
        rig.stored(400)
        rig.call(rig.kinesis_way.down.passing.clear)
        time.sleep(1.5)
        rig.call(rig.kinesis_way.release)
        rig.settle()
        books = rig.finish()
        assert books["dup"] > 0, "the fault did not bite"


@pytest.mark.faults_full
def test_kinesis_refuses_connections(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.flow(2000)
        rig.stored(400)
        rig.wait(rig.kinesis_way.refuse())
        rig.call(rig.kinesis_way.cut)
        time.sleep(1.0)
        rig.wait(rig.kinesis_way.start())
        rig.settle()
        rig.finish()


@pytest.mark.faults_full
@pytest.mark.parametrize("at", [9, 2000])
def test_a_request_arrives_with_a_flipped_byte(tmp_path: Path, at: int) -> None:
    """In its head it is no HTTP any more, in its body the signature does not fit: it is refused and goes again."""
    with Rig(tmp_path, emulator=SIGNED) as rig:
        rig.flow(1500)
        for target in (200, 500, 800):
            rig.stored(target)
            rig.kinesis_way.up.corrupt_in = at
        rig.settle()
        assert rig.finish()["dup"] == 0


@pytest.mark.faults_full
@pytest.mark.parametrize("at", [3, 400, 1000])
def test_an_answer_arrives_with_a_flipped_byte(tmp_path: Path, at: int) -> None:
    """While a third of the records fails: none may be taken for stored because its error code cannot be read."""
    with Rig(tmp_path) as rig:
        rig.call(lambda: rig.kinesis.faults.record("InternalFailure", probability=0.3))
        rig.flow(2000)
        for number, target in enumerate((200, 400, 600, 800, 1000, 1200)):
            rig.stored(target)
            rig.kinesis_way.down.corrupt_in = at + number * 11
        rig.call(rig.kinesis.faults.clear)
        rig.settle()
        rig.finish()


# -- TLS


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority(tmp_path)
    made.show("127.0.0.1")
    return made


def kinesis_tls(authority: Authority) -> dict[str, Any]:
    return {"emulator": {"ssl_context": authority.context}, "kinesis": {"ca_bundle": str(authority.path)}}


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"names": ("127.0.0.1",), "not_after": YESTERDAY}, id="expired"),
        pytest.param({"names": ("kinesis.example",)}, id="for-another-host", marks=pytest.mark.faults_full),
        pytest.param({"names": ("127.0.0.1",), "foreign": True}, id="not-trusted", marks=pytest.mark.faults_full),
    ],
)
def test_a_wrong_certificate_of_kinesis(tmp_path: Path, authority: Authority, wrong: dict[str, Any]) -> None:
    """It changes in the middle, and is put right again: the data waits."""
    wrong = dict(wrong)
    if wrong.pop("foreign", False):
        wrong["ca"] = trustme.CA()
    names = wrong.pop("names")
    with Rig(tmp_path, **kinesis_tls(authority)) as rig:
        rig.flow(1500)
        rig.stored(300)
        authority.show(*names, **wrong)
        rig.call(rig.kinesis_way.cut)
        rig.logged("CertificateNotTrusted")
        authority.show("127.0.0.1")
        rig.settle()
        rig.finish()


@pytest.mark.faults_full
@pytest.mark.parametrize("way", ["up", "down"])
def test_a_flipped_byte_in_tls_to_kinesis(tmp_path: Path, authority: Authority, way: str) -> None:
    with Rig(tmp_path, **kinesis_tls(authority)) as rig:
        rig.flow(2000)
        for target in (200, 500, 800, 1100):
            rig.stored(target)
            getattr(rig.kinesis_way, way).corrupt_in = 50
        rig.settle()
        rig.finish()


@pytest.mark.faults_full
@pytest.mark.parametrize("way", ["up", "down"])
def test_a_flipped_byte_in_tls_to_the_broker(tmp_path: Path, authority: Authority, way: str) -> None:
    with Rig(tmp_path, tls=authority.context, broker={"tls": {"ca": str(authority.path)}}) as rig:
        rig.flow(2000)
        for target in (200, 500, 800, 1100):
            rig.stored(target)
            getattr(rig.broker_way, way).corrupt_in = 50
        rig.settle()
        rig.finish(least_redelivered=1 if way == "down" else 0)


@pytest.mark.faults_full
@pytest.mark.parametrize("name", ["expired", "for-another-host"])
def test_a_wrong_certificate_of_the_broker(tmp_path: Path, authority: Authority, name: str) -> None:
    with Rig(tmp_path, tls=authority.context, broker={"tls": {"ca": str(authority.path)}}) as rig:
        rig.flow(1500)
        rig.stored(300)
        if name == "expired":
            authority.show("127.0.0.1", not_after=YESTERDAY)
        else:
            authority.show("broker.example")
        rig.call(rig.broker_way.cut)
        rig.logged("certificate")
        authority.show("127.0.0.1")
        rig.settle()
        rig.finish()


# -- names


@pytest.mark.faults_full
def test_names_do_not_resolve_for_a_while(tmp_path: Path) -> None:
    """Broker and Kinesis by name; DNS fails in the middle, every connection is cut."""
    unknown = tmp_path / "unknown"
    with Rig(tmp_path, host="localhost", patch={"unknown": str(unknown)}) as rig:
        rig.flow(1500)
        rig.stored(300)
        unknown.touch()
        rig.call(rig.kinesis_way.cut)
        rig.call(rig.broker_way.cut)
        rig.logged("NameNotFound")
        time.sleep(0.5)
        unknown.unlink()
        rig.settle()
        rig.finish()


@pytest.mark.faults_full
def test_names_do_not_resolve_at_the_start(tmp_path: Path) -> None:
    unknown = tmp_path / "unknown"
    unknown.touch()
    with Rig(tmp_path, host="localhost", patch={"unknown": str(unknown)}, ready=False) as rig:
        rig.logged("not ready")
        unknown.unlink()
        rig.subscribed()
        rig.flow(500)
        rig.settle()
        assert rig.finish()["dup"] == 0


# -- clocks


class Wall:
    """The service's clock, `off` seconds from ours."""

    def __init__(self, off: float) -> None:
        self.off = off

    def __call__(self) -> float:
        return time.time() + self.off


@pytest.mark.parametrize(
    "minutes", [pytest.param(20, id="behind"), pytest.param(-20, id="ahead", marks=pytest.mark.faults_full)]
)
def test_our_clock_is_twenty_minutes_off(tmp_path: Path, minutes: int) -> None:
    with Rig(tmp_path, emulator=SIGNED | {"wall": Wall(60.0 * minutes)}) as rig:
        rig.flow(1000)
        rig.settle()
        assert rig.finish()["dup"] == 0


@pytest.mark.faults_full
def test_our_clock_jumps_by_twenty_minutes_and_back(tmp_path: Path) -> None:
    wall = Wall(0.0)
    with Rig(tmp_path, emulator=SIGNED | {"wall": wall}) as rig:
        rig.flow(2500)
        for target, off in ((300, 1200.0), (900, 0.0), (1500, -1200.0), (2000, 0.0)):
            rig.stored(target)
            wall.off = off
        rig.settle()
        assert rig.finish()["dup"] == 0


# -- keys


@pytest.mark.faults_full
def test_keys_are_withdrawn_and_given_back(tmp_path: Path) -> None:
    with Rig(tmp_path, emulator=SIGNED) as rig:
        verifier = rig.emulator.verifier
        assert verifier is not None
        rig.flow(1500)
        rig.stored(300)
        key = verifier.secrets.pop(ACCESS_KEY)
        rig.logged("UnrecognizedClientException")
        verifier.secrets[ACCESS_KEY] = key
        rig.settle()
        assert rig.finish()["dup"] == 0
        assert SECRET_KEY not in rig.service.log()


KEYS_PROCESS = """
import json, sys
from pathlib import Path
told = Path(sys.argv[1])
if not told.exists():
    sys.exit("no keys today")
print(told.read_text())
"""
SHORT = {
    "set": {
        "fastkin.aws.credentials:REFUSED_EVERY_S": 0.2,
        "fastkin.aws.credentials:BACKOFF_S": 0.5,
    }
}


@pytest.mark.faults_full
def test_credentials_expire_and_the_refresh_fails(tmp_path: Path) -> None:
    """Keys of a process: they expire, it fails for a while, then it has others."""
    told = tmp_path / "keys.json"

    def tell(access: str, secret: str, token: str, seconds: float) -> None:
        ends = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
        fresh = tmp_path / "keys.new"
        fresh.write_text(
            json.dumps(
                {"Version": 1, "AccessKeyId": access, "SecretAccessKey": secret, "SessionToken": token,
                 "Expiration": ends.strftime("%Y-%m-%dT%H:%M:%SZ")}
            )
        )  # fmt: skip
        os.replace(fresh, told)

    tell("AKONE", "first-secret", "first-token", 3600)
    script = tmp_path / "keys.py"
    script.write_text(KEYS_PROCESS)
    (tmp_path / "config").write_text(
        f"[default]\nregion = us-east-1\ncredential_process = {sys.executable} {script} {told}\n"
    )
    env = {
        "AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"), "AWS_EC2_METADATA_DISABLED": "true",
        "HOME": str(tmp_path),
    }  # fmt: skip
    keys = {"AKONE": Secret("first-secret", "first-token")}
    with Rig(tmp_path, emulator={"credentials": keys}, env=env, patch=SHORT) as rig:
        verifier = rig.emulator.verifier
        assert verifier is not None
        rig.flow(1500)
        rig.stored(300)
        told.unlink()
        verifier.secrets["AKONE"] = Secret("first-secret", "first-token", expired=True)
        rig.logged("ExpiredTokenException")
        time.sleep(1.0)
        verifier.secrets["AKTWO"] = Secret("second-secret", "second-token")
        tell("AKTWO", "second-secret", "second-token", 3600)
        rig.settle()
        assert rig.finish()["dup"] == 0
        for secret in ("first-secret", "second-secret", "first-token", "second-token"):
            assert secret not in rig.service.log()
