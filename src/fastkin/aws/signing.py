"""Signature Version 4 for one kind of request: POST, a few fixed headers.

The signing key is kept per credentials and day and the date text per second, so a request costs two
hashes of a few hundred bytes. What is signed is what is sent: the whole request head is made here.

https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html
"""

from __future__ import annotations

import hmac
import time
from hashlib import sha256
from typing import NamedTuple
from urllib.parse import quote

from fastkin import __version__

ALGORITHM = "AWS4-HMAC-SHA256"
USER_AGENT = f"fastkin/{__version__}"


class Credentials(NamedTuple):
    """A key pair as it signs. The repr shows the access key's last four characters and nothing else."""

    access_key: str
    secret_key: str
    token: str | None = None
    account_id: str | None = None

    def __repr__(self) -> str:
        return f"Credentials(access_key='...{self.access_key[-4:]}')"


def canonical_path(path: str) -> str:
    """The path as it is signed: dot segments and empty segments removed, then every segment encoded.

    `path` is the text of the request line, so a percent sign in it is encoded a second time.
    """
    if path in {"", "/"}:
        return "/"
    kept: list[str] = []
    for part in path.split("/"):
        # The service makes the path canonical before it checks the signature, so it must be signed as it will see it.
        if part in {"", "."}:
            continue
        if part == "..":
            if kept:
                kept.pop()
        else:
            kept.append(part)
    first = "/" if path.startswith("/") else ""
    last = "/" if path.endswith("/") and kept else ""
    return quote(first + "/".join(kept) + last, safe="/~")


class Signer:
    """Makes signed request heads for one region and service."""

    def __init__(self, region: str, service: str = "kinesis") -> None:
        self.region = region
        self.service = service
        self._credentials: Credentials | None = None
        self._day = ""
        self._key = b""
        self._scope = ""
        self._second = -1
        self._date = ""
        # An endpoint has one path, nearly always "/": it is made canonical once.
        self._paths: dict[str, str] = {}

    def head(
        self,
        credentials: Credentials,
        *,
        target: str,
        host: str,
        path: str,
        content_type: str,
        body_sha256_hex: str,
        length: int,
        now: float,
    ) -> bytes:
        """The request line and all headers of one signed POST, ready to be written before the body."""
        second = int(now)
        # The text of a second serves for all calls in it: strftime costs more than the two hashes.
        if second != self._second:
            self._second = second
            self._date = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(second))
        date = self._date
        day = date[:8]
        # The key is made of keys, day, region and service by four hashes, and holds for the day.
        if credentials is not self._credentials or day != self._day:
            self._new_key(credentials, day)
        signed_path = self._paths.get(path)
        if signed_path is None:
            signed_path = self._paths[path] = canonical_path(path)
        token = credentials.token
        # The names of the signed headers must be sorted, and the token is one of them only when it is there.
        if token:
            names = "content-type;host;x-amz-date;x-amz-security-token;x-amz-target"
            signed_token = f"x-amz-security-token:{token}\n"
            token_header = f"X-Amz-Security-Token: {token}\r\n"
        else:
            names = "content-type;host;x-amz-date;x-amz-target"
            signed_token = token_header = ""
        # The canonical request: method, path, query (none here), the headers that are signed, their names, the hash
        # of the body. Each in the form that the service makes of what it received, or the signatures differ.
        request = (
            f"POST\n{signed_path}\n\ncontent-type:{content_type}\nhost:{host}\nx-amz-date:{date}\n"
            f"{signed_token}x-amz-target:{target}\n\n{names}\n{body_sha256_hex}"
        )
        # What is signed in the end: algorithm, time, scope, and the hash of the canonical request.
        text = f"{ALGORITHM}\n{date}\n{self._scope}\n{sha256(request.encode()).hexdigest()}"
        signature = hmac.digest(self._key, text.encode(), "sha256").hex()
        return (
            f"POST {path or '/'} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {content_type}\r\n"
            f"X-Amz-Target: {target}\r\nX-Amz-Date: {date}\r\n{token_header}"
            f"Authorization: {ALGORITHM} Credential={credentials.access_key}/{self._scope}, "
            f"SignedHeaders={names}, Signature={signature}\r\n"
            f"User-Agent: {USER_AGENT}\r\nContent-Length: {length}\r\n\r\n"
        ).encode()

    def _new_key(self, credentials: Credentials, day: str) -> None:
        key = f"AWS4{credentials.secret_key}".encode()
        for part in (day, self.region, self.service, "aws4_request"):
            key = hmac.digest(key, part.encode(), "sha256")
        self._key = key
        self._scope = f"{day}/{self.region}/{self.service}/aws4_request"
        self._day = day
        self._credentials = credentials
