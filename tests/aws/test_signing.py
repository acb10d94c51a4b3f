from __future__ import annotations

import datetime
import string
from hashlib import sha256
from typing import Any

import botocore.auth
import pytest
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from hypothesis import example, given
from hypothesis import strategies as st

from fastkin import __version__
from fastkin.aws.signing import Credentials, Signer, canonical_path

# the example keys of AWS's own pages
ACCESS = "AKIDEXAMPLE"
SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
JSON = "application/x-amz-json-1.1"
NOON = datetime.datetime(2026, 3, 4, 12, 0, 0, tzinfo=datetime.UTC).timestamp()


def parse(head: bytes) -> tuple[str, dict[str, str]]:
    assert head.endswith(b"\r\n\r\n")
    first, *lines = head[:-4].decode("ascii").split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    assert len(headers) == len(lines)
    return first, headers


def by_botocore(
    credentials: Credentials, region: str, url: str, headers: dict[str, str], body: bytes, now: float
) -> dict[str, str]:
    """What the SDK's signer makes of the same request at the same moment."""
    true = botocore.auth.get_current_datetime
    botocore.auth.get_current_datetime = lambda *_, **__: datetime.datetime.fromtimestamp(int(now), datetime.UTC)
    try:
        request = AWSRequest("POST", url, headers, body)
        request.context = {"payload_signing_enabled": True}
        keys = ReadOnlyCredentials(credentials.access_key, credentials.secret_key, credentials.token, None)
        botocore.auth.SigV4Auth(keys, "kinesis", region).add_auth(request)
        return dict(request.headers.items())
    finally:
        botocore.auth.get_current_datetime = true


KEY = st.text(string.ascii_uppercase + string.digits, min_size=16, max_size=32)
SECRET_KEY = st.text(string.ascii_letters + string.digits + "/+=", min_size=1, max_size=60)
TOKEN = st.none() | st.text(string.ascii_letters + string.digits + "/+=", min_size=1, max_size=800)
PIECE = st.sampled_from(
    ["a", "B", "9", "~", ".", "..", "%20", "%2F", "%e4", "-", "_", "+", "(", "*", "=", ":", "@", ","]
)
PATH = st.lists(st.lists(PIECE, max_size=4).map("".join), max_size=6).map(lambda parts: "/" + "/".join(parts))
HOST = st.sampled_from(
    ["kinesis.eu-west-1.amazonaws.com", "localhost:4567", "127.0.0.1:1", "[::1]:4567", "example.com:8443"]
)


@given(
    access=KEY,
    secret=SECRET_KEY,
    token=TOKEN,
    region=st.sampled_from(["us-east-1", "eu-central-1", "cn-north-1", "local"]),
    path=PATH,
    host=HOST,
    scheme=st.sampled_from(["http", "https"]),
    target=st.sampled_from(["PutRecords", "ListShards"]),
    content_type=st.sampled_from([JSON, "application/x-amz-cbor-1.1"]),
    body=st.binary(max_size=300),
    now=st.floats(0, 4_000_000_000),
    offset=st.floats(-1_000_000, 1_000_000),
)
@example(
    ACCESS,
    SECRET,
    None,
    "us-east-1",
    "//a/./../b//c/%41/",
    "localhost:4567",
    "http",
    "PutRecords",
    JSON,
    b"",
    NOON,
    0.0,
)
def test_signed_as_botocore_signs(
    access: str,
    secret: str,
    token: str | None,
    region: str,
    path: str,
    host: str,
    scheme: str,
    target: str,
    content_type: str,
    body: bytes,
    now: float,
    offset: float,
) -> None:
    credentials = Credentials(access, secret, token)
    moment = max(now + offset, 0.0)
    head = Signer(region).head(
        credentials,
        target=f"Kinesis_20131202.{target}",
        host=host,
        path=path,
        content_type=content_type,
        body_sha256_hex=sha256(body).hexdigest(),
        length=len(body),
        now=moment,
    )
    first, headers = parse(head)
    assert first == f"POST {path} HTTP/1.1"
    assert headers["Content-Length"] == str(len(body))
    assert headers["Host"] == host
    told = {"Content-Type": content_type, "X-Amz-Target": f"Kinesis_20131202.{target}"}
    expected = by_botocore(credentials, region, f"{scheme}://{host}{path}", told, body, moment)
    for name in ("Authorization", "X-Amz-Date", "Content-Type", "X-Amz-Target"):
        assert headers[name] == expected[name], name
    assert headers.get("X-Amz-Security-Token") == expected.get("X-Amz-Security-Token") == token


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 300_000))))
def test_kept_keys_and_dates_never_sign_for_another_moment(steps: list[tuple[int, float]]) -> None:
    """One signer, several credentials, a clock that jumps: the same as a fresh signer each time."""
    people = [Credentials(f"AKID{n}", f"secret{n % 3}", f"token{n}" if n % 2 else None) for n in range(4)]
    kept = Signer("eu-west-1")
    for who, when in steps:
        arguments: dict[str, Any] = {
            "target": "Kinesis_20131202.PutRecords", "host": "h", "path": "/", "content_type": JSON,
            "body_sha256_hex": "0" * 64, "length": 0, "now": NOON + when,
        }  # fmt: skip
        assert kept.head(people[who], **arguments) == Signer("eu-west-1").head(people[who], **arguments)


def test_equal_credentials_that_are_other_objects_sign_alike() -> None:
    signer = Signer("eu-west-1")
    arguments: dict[str, Any] = {
        "target": "t", "host": "h", "path": "/", "content_type": JSON,
        "body_sha256_hex": "0" * 64, "length": 0, "now": NOON,
    }  # fmt: skip
    first = signer.head(Credentials("a", "one"), **arguments)
    assert signer.head(Credentials("a", "two"), **arguments) != first
    assert signer.head(Credentials("a", "one"), **arguments) == first


def test_one_request_byte_for_byte() -> None:
    """The whole head of one request, for good. The signature was checked against botocore."""
    body = b'{"Records":[{"Data":"aGVsbG8=","PartitionKey":"k"}],"StreamName":"welders"}'
    head = Signer("us-east-1").head(
        Credentials(ACCESS, SECRET),
        target="Kinesis_20131202.PutRecords",
        host="kinesis.us-east-1.amazonaws.com",
        path="/",
        content_type=JSON,
        body_sha256_hex=sha256(body).hexdigest(),
        length=len(body),
        now=NOON,
    )
    assert head == (
        b"POST / HTTP/1.1\r\n"
        b"Host: kinesis.us-east-1.amazonaws.com\r\n"
        b"Content-Type: application/x-amz-json-1.1\r\n"
        b"X-Amz-Target: Kinesis_20131202.PutRecords\r\n"
        b"X-Amz-Date: 20260304T120000Z\r\n"
        b"Authorization: AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20260304/us-east-1/kinesis/aws4_request, "
        b"SignedHeaders=content-type;host;x-amz-date;x-amz-target, "
        b"Signature=a54d67cb5ada5b749936ea991ef03d209b8569740a8e2ef830fd38b3d88243ad\r\n"
        + f"User-Agent: fastkin/{__version__}\r\n".encode()
        + b"Content-Length: 75\r\n\r\n"
    )


def test_the_signing_key_of_the_documentation() -> None:
    """The derivation AWS publishes as an example: 20120215, us-east-1, iam."""
    signer = Signer("us-east-1", "iam")
    signer._new_key(Credentials(ACCESS, SECRET), "20120215")
    assert signer._key.hex() == "f4780e2d9f65fa895f9c67b32ce1baf0b0d8a43505a000a1a9e090d414db404d"


@pytest.mark.parametrize(
    ("path", "signed"),
    [
        ("", "/"),
        ("/", "/"),
        ("//", "/"),
        ("/a/../b", "/b"),
        ("/..", "/"),
        ("/a%20b/", "/a%2520b/"),
        ("/./a//b", "/a/b"),
    ],
)
def test_paths(path: str, signed: str) -> None:
    assert canonical_path(path) == signed


def test_no_repr_tells_a_secret() -> None:
    credentials = Credentials("AKIDSECRETIVE", "the-secret", "the-token", "123456789012")
    for text in (repr(credentials), str(credentials), f"{credentials}", f"{credentials!r}"):
        assert "the-secret" not in text
        assert "the-token" not in text
        assert "AKIDSECRETIVE" not in text
