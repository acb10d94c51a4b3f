"""Checks AWS Signature Version 4 as the service does; the engine's signer has no part in it.

docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html gives the steps,
the texts are those of the real service.
"""

from __future__ import annotations

import calendar
import hashlib
import hmac
import re
import time
import urllib.parse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .rules import ApiError

if TYPE_CHECKING:
    from collections.abc import Mapping

SKEW_S: Final = 300
_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256\s+Credential=([^,\s]+),\s*SignedHeaders=([^,\s]+),\s*Signature=([0-9a-fA-F]+)"
)


@dataclass(frozen=True, slots=True)
class Secret:
    """What an access key id stands for. `expired`: its session token is no longer valid; `expires`: it is not from
    then on, in seconds since 1970."""

    secret_key: str
    token: str | None = None
    expired: bool = False
    expires: float | None = None


def access_key_of(headers: Mapping[str, str]) -> str | None:
    """The access key id that a request names, whether or not its signature is right. Header names in lower case."""
    match = _AUTHORIZATION.fullmatch(headers.get("authorization", "").strip())
    return None if match is None else match[1].partition("/")[0]


class Verifier:
    """Judges requests against the known access keys; without any, every request is welcome."""

    def __init__(self, secrets: Mapping[str, str | Secret], *, region: str, skew_s: float | None = SKEW_S) -> None:
        self.secrets: dict[str, Secret] = {
            key: Secret(value) if isinstance(value, str) else value for key, value in secrets.items()
        }
        self.region = region
        self.skew_s = skew_s

    def check(
        self,
        *,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes,
        service: str,
        wall: float,
    ) -> None:
        """Raises ApiError unless a known key signed the request. Header names in lower case."""
        authorization = headers.get("authorization")
        if authorization is None:
            raise ApiError("MissingAuthenticationTokenException", "Missing Authentication Token")
        match = _AUTHORIZATION.fullmatch(authorization.strip())
        stamp = headers.get("x-amz-date", "")
        if match is None or not re.fullmatch(r"\d{8}T\d{6}Z", stamp):
            raise ApiError(
                "IncompleteSignatureException",
                "Authorization header requires Credential, Signature and SignedHeaders parameters "
                "and the existence of a 'X-Amz-Date' or a 'Date' header.",
            )
        credential, signed_names, signature = match.groups()
        access_key, _, scope = credential.partition("/")
        known = self.secrets.get(access_key)
        if known is None or (known.token or "") != headers.get("x-amz-security-token", ""):
            raise ApiError(
                "UnrecognizedClientException",
                "The security token included in the request is invalid.",
            )
        day = stamp[:8]
        if scope != f"{day}/{self.region}/{service}/aws4_request":
            raise ApiError(
                "InvalidSignatureException",
                f"Credential should be scoped to a valid region, not '{scope}'.",
            )
        names = signed_names.split(";")
        must = {"host", "x-amz-date"}
        if known.token is not None:
            must.add("x-amz-security-token")
        if not must <= set(names) or names != sorted(names):
            raise _mismatch()
        canonical = _canonical(method, target, headers, signed_names, body)
        text = "\n".join(("AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()))
        key = f"AWS4{known.secret_key}".encode()
        for part in (day, self.region, service, "aws4_request"):
            key = hmac.digest(key, part.encode(), "sha256")
        expected = hmac.digest(key, text.encode(), "sha256").hex()
        if not hmac.compare_digest(expected, signature.lower()):
            raise _mismatch()
        if self.skew_s is not None:
            self._check_clock(stamp, wall)
        if known.expired or (known.expires is not None and wall >= known.expires):
            raise ApiError("ExpiredTokenException", "The security token included in the request is expired")

    def _check_clock(self, stamp: str, wall: float) -> None:
        assert self.skew_s is not None
        sent = calendar.timegm(time.strptime(stamp, "%Y%m%dT%H%M%SZ"))
        minutes = f"{self.skew_s / 60:g} min."
        now = _stamp(wall)
        if sent < wall - self.skew_s:
            edge = _stamp(wall - self.skew_s)
            raise ApiError(
                "InvalidSignatureException",
                f"Signature expired: {stamp} is now earlier than {edge} ({now} - {minutes})",
            )
        if sent > wall + self.skew_s:
            edge = _stamp(wall + self.skew_s)
            raise ApiError(
                "InvalidSignatureException",
                f"Signature not yet current: {stamp} is still later than {edge} ({now} + {minutes})",
            )


def _canonical(method: str, target: str, headers: Mapping[str, str], signed_names: str, body: bytes) -> str:
    """The request as both sides write it before they sign it."""
    path, _, query = target.partition("?")
    return "\n".join(
        (
            method,
            urllib.parse.quote(path, safe="/-_.~") or "/",
            "&".join(sorted(query.split("&"))) if query else "",
            *(f"{name}:{' '.join(headers.get(name, '').split())}" for name in signed_names.split(";")),
            "",
            signed_names,
            hashlib.sha256(body).hexdigest(),
        )
    )


def _stamp(wall: float) -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(wall))


def _mismatch() -> ApiError:
    return ApiError(
        "InvalidSignatureException",
        "The request signature we calculated does not match the signature you provided. Check your "
        "AWS Secret Access Key and signing method. Consult the service documentation for details.",
    )
