"""The emulator's own CBOR reader and writer, and its signature check, against independent ones."""

from __future__ import annotations

import contextlib
import datetime
import math
from typing import TYPE_CHECKING, Any

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import ClientError
from hypothesis import given
from hypothesis import strategies as st

from fastkin.emulator import ApiError, Emulator, Secret
from fastkin.emulator.signature import Verifier
from fastkin.emulator.wire import CBOR, JSON, Millis, WireError, decode_cbor, dumps, loads
from support.readback import kinesis_client
from support.servers import ACCESS_KEY, SECRET_KEY

if TYPE_CHECKING:
    from collections.abc import Mapping

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@given(st.dictionaries(st.text(), values))
def test_cbor_comes_back_as_it_was_written(value: dict[str, Any]) -> None:
    assert loads(dumps(value, CBOR), CBOR) == value


# RFC 8949, appendix A: what every decoder must make of these bytes.
APPENDIX_A = [
    ("00", 0),
    ("17", 23),
    ("1818", 24),
    ("1903e8", 1000),
    ("1a000f4240", 1_000_000),
    ("1bffffffffffffffff", 2**64 - 1),
    ("20", -1),
    ("3903e7", -1000),
    ("3bffffffffffffffff", -(2**64)),
    ("f93c00", 1.0),
    ("fa47c35000", 100_000.0),
    ("fb3ff199999999999a", 1.1),
    ("f97c00", math.inf),
    ("f4", False),
    ("f5", True),
    ("f6", None),
    ("c11a514b67b0", 1_363_896_240),
    ("d74401020304", b"\x01\x02\x03\x04"),
    ("40", b""),
    ("6449455446", "IETF"),
    ("63e6b0b4", "水"),
    ("80", []),
    ("8301820203820405", [1, [2, 3], [4, 5]]),
    ("a26161016162820203", {"a": 1, "b": [2, 3]}),
    ("5f42010243030405ff", b"\x01\x02\x03\x04\x05"),
    ("7f657374726561646d696e67ff", "streaming"),
    ("9fff", []),
    ("9f018202039f0405ffff", [1, [2, 3], [4, 5]]),
    ("bf61610161629f0203ffff", {"a": 1, "b": [2, 3]}),
    ("bf6346756ef563416d7421ff", {"Fun": True, "Amt": -2}),
]


@pytest.mark.parametrize(("wire", "value"), APPENDIX_A)
def test_the_examples_of_the_rfc(wire: str, value: Any) -> None:
    raw = bytes.fromhex(wire)
    assert decode_cbor(raw) == value
    for cut in range(len(raw)):
        with pytest.raises(WireError):
            decode_cbor(raw[:cut])
    with pytest.raises(WireError, match="follow"):
        decode_cbor(raw + b"\x00")


@pytest.mark.parametrize(
    "wire",
    [
        "ff",  # a break alone
        "82ff",  # inside a definite array
        "bf6161ff",  # after a key
        "a10102",  # a key that is no text
        "5f6161ff",  # a text chunk in a byte string
        "1f",  # a length that cannot be indefinite
        "1c",  # reserved
        "f8ff",  # an unknown simple value
        "62c328",  # not UTF-8
        "5bffffffffffffffff00",  # a length that is a lie
        "81" * 200,  # too deep
    ],
)
def test_malformed_cbor_is_refused(wire: str) -> None:
    with pytest.raises(WireError):
        decode_cbor(bytes.fromhex(wire))


@given(st.binary(max_size=60))
def test_noise_gives_a_value_or_an_error(noise: bytes) -> None:
    for form in (CBOR, JSON):
        with contextlib.suppress(WireError):
            assert isinstance(loads(noise, form), dict)


def test_times_and_bytes_have_a_form_on_each_wire() -> None:
    value = {"T": Millis(1500), "D": b"\xff", "L": [b"a"]}
    assert dumps(value, JSON) == b'{"T":1.5,"D":"/w==","L":["YQ=="]}'
    assert loads(dumps(value, CBOR), CBOR) == value
    assert isinstance(loads(dumps(value, CBOR), CBOR)["T"], Millis)
    with pytest.raises(WireError, match="no CBOR form"):
        dumps({"x": object()}, CBOR)


# --- signatures ---

NOW = 1_795_234_567.0


def signed(
    *,
    access_key: str = ACCESS_KEY,
    secret: str = SECRET_KEY,
    token: str | None = None,
    path: str = "/",
    body: bytes = b"{}",
    region: str = "us-east-1",
    headers: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Headers as botocore signs them, names in lower case."""
    request = AWSRequest(
        "POST",
        "http://127.0.0.1:4567" + path,
        headers={"X-Amz-Target": "Kinesis_20131202.PutRecords", **(headers or {})},
        data=body,
    )
    SigV4Auth(Credentials(access_key, secret, token), "kinesis", region).add_auth(request)
    return {
        "host": "127.0.0.1:4567",
        **{name.lower(): value for name, value in request.headers.items()},
    }


def judge(
    headers: dict[str, str],
    *,
    secrets: Mapping[str, str | Secret] | None = None,
    wall: float | None = None,
    body: bytes = b"{}",
    path: str = "/",
    skew_s: float | None = 300,
) -> str | None:
    """The error type, or None when the signature is accepted."""
    verifier = Verifier(secrets or {ACCESS_KEY: SECRET_KEY}, region="us-east-1", skew_s=skew_s)
    try:
        verifier.check(
            method="POST",
            target=path,
            headers=headers,
            body=body,
            service="kinesis",
            wall=datetime.datetime.now(datetime.UTC).timestamp() if wall is None else wall,
        )
    except ApiError as error:
        return f"{error.code}: {error.message}"
    return None


@pytest.mark.parametrize("path", ["/", "/base", "/a%20b/c", "/a b", "/x?b=2&a=1", "/~._-"])
def test_botocores_signature_is_accepted_on_any_path(path: str) -> None:
    sent = path.replace(" ", "%20")
    assert judge(signed(path=sent), path=sent) is None


@given(st.binary(max_size=200), st.text("abc DEF:,;=/", max_size=30))
def test_botocores_signature_is_accepted_for_any_body_and_header(body: bytes, text: str) -> None:
    headers = signed(body=body, headers={"X-Amz-Extra": text})
    assert judge(headers, body=body) is None
    assert judge(headers, body=body + b" ") is not None


def test_what_is_not_signed_right_is_refused() -> None:
    good = signed()
    refused = {
        "MissingAuthenticationTokenException": {name: value for name, value in good.items() if name != "authorization"},
        "IncompleteSignatureException": {**good, "authorization": "Bearer x"},
        "UnrecognizedClientException": signed(access_key="OTHER"),
        "InvalidSignatureException: The request": signed(secret="wrong"),
        "InvalidSignatureException: Credential": signed(region="eu-west-1"),
    }
    for code, headers in refused.items():
        assert (judge(headers) or "").startswith(code), code
    host = {**good, "host": "elsewhere"}
    assert (judge(host) or "").startswith("InvalidSignatureException")
    date = {**good, "x-amz-date": "yesterday"}
    assert (judge(date) or "").startswith("IncompleteSignatureException")
    # an unsigned host or date would let anyone replay the rest
    naked = {
        **good,
        "authorization": good["authorization"].replace("host;", ""),
    }
    assert (judge(naked) or "").startswith("InvalidSignatureException")


# The texts of the real service: awslabs/amazon-kinesis-producer#222, s12v/awsbeats#48.
def test_a_clock_that_is_off_is_refused_in_kinesis_words() -> None:
    headers = signed()
    sent = datetime.datetime.strptime(headers["x-amz-date"] + "+0000", "%Y%m%dT%H%M%SZ%z")
    base = sent.timestamp()
    for offset in (-299, 0, 299):
        assert judge(headers, wall=base + offset) is None
    late = judge(headers, wall=base + 301) or ""
    assert late.startswith("InvalidSignatureException: Signature expired: ")
    assert " is now earlier than " in late
    assert late.endswith(" - 5 min.)")
    early = judge(headers, wall=base - 301) or ""
    assert early.startswith("InvalidSignatureException: Signature not yet current: ")
    assert early.endswith(" + 5 min.)")
    assert judge(headers, wall=base + 10**6, skew_s=None) is None


def test_session_tokens_belong_to_their_key() -> None:
    secrets = {ACCESS_KEY: Secret(SECRET_KEY, token="T")}
    assert judge(signed(token="T"), secrets=secrets) is None
    for wrong in (signed(), signed(token="U")):
        assert (judge(wrong, secrets=secrets) or "").startswith("UnrecognizedClientException")
    expired = {ACCESS_KEY: Secret(SECRET_KEY, token="T", expired=True)}
    assert (judge(signed(token="T"), secrets=expired) or "").startswith("ExpiredTokenException")


async def test_the_emulator_checks_when_it_knows_credentials() -> None:
    async with Emulator({"s": 1}, credentials={ACCESS_KEY: SECRET_KEY}) as emulator:
        async with kinesis_client(emulator.url) as client:
            await client.put_record(StreamName="s", Data=b"x", PartitionKey="ü")
        async with kinesis_client(emulator.url, aws_secret_access_key="wrong") as client:
            with pytest.raises(ClientError, match="InvalidSignatureException"):
                await client.put_record(StreamName="s", Data=b"x", PartitionKey="k")
        assert emulator.stored_count("s") == 1
