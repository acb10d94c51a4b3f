"""Keys for a role, and whose keys these are: AssumeRole and GetCallerIdentity, so that a credential chain needs no AWS.

Point AWS_ENDPOINT_URL_STS at the emulator. STS speaks another protocol than Kinesis: a form comes in, XML goes out, and
its errors have names of their own (docs.aws.amazon.com/STS/latest/APIReference, CommonErrors and API_AssumeRole). The
bounds are those of the service model (sts/2011-06-15/service-2.json).
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
import time
import urllib.parse
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import escape

from .faults import Plan
from .rules import ApiError, Rule, refuse, violations
from .signature import Secret, access_key_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .connection import Request
    from .server import Emulator
    from .signature import Verifier

FORM: Final = "application/x-www-form-urlencoded"
XML: Final = "text/xml"
VERSION: Final = "2011-06-15"
_NAMESPACE: Final = f'xmlns="https://sts.amazonaws.com/doc/{VERSION}/"'
_HOUR_S: Final = 3600
_ROLE = re.compile(r"arn:aws[a-z-]*:iam::(\d{12}):role/(?:[\x21-\x7e]+/)?([\w+=,.@-]{1,64})", re.ASCII)
_RULES: Final[Mapping[str, Rule]] = {
    "RoleArn": Rule(str, 20, 2048),
    "RoleSessionName": Rule(str, 2, 64, r"[\w+=,.@-]*"),
    "ExternalId": Rule(str, 2, 1224, r"[\w+=,.@:\/-]*"),
    "DurationSeconds": Rule(int, 900, 43_200),
}
# What the JSON services call an error, and what STS calls it.
_NAMES: Final[Mapping[str, tuple[str, int]]] = {
    "ExpiredTokenException": ("ExpiredToken", 403),
    "IncompleteSignatureException": ("IncompleteSignature", 403),
    "InvalidSignatureException": ("SignatureDoesNotMatch", 403),
    "MissingAuthenticationTokenException": ("MissingAuthenticationToken", 403),
    "UnrecognizedClientException": ("InvalidClientTokenId", 403),
    "ValidationException": ("ValidationError", 400),
}


@dataclass(frozen=True, slots=True)
class AssumedRole:
    """One answered AssumeRole. `expires`: seconds since 1970; `secret_key` and `token` are in no repr."""

    role_arn: str
    session_name: str
    external_id: str | None
    access_key: str
    secret_key: str = field(repr=False)
    token: str = field(repr=False)
    expires: float

    @property
    def arn(self) -> str:
        """Who acts with these keys."""
        role = _ROLE.fullmatch(self.role_arn)
        assert role is not None
        partition = self.role_arn.split(":")[1]
        return f"arn:{partition}:sts::{role[1]}:assumed-role/{role[2]}/{self.session_name}"

    @property
    def user_id(self) -> str:
        return f"{_id_of('AROA', self.role_arn)}:{self.session_name}"


class Sts:
    """Gives out keys of roles. With a `verifier` the keys are good for calls to the emulator until they expire."""

    def __init__(
        self,
        *,
        account: str,
        roles: Mapping[str, str | None] | None,
        verifier: Verifier | None,
        wall: Callable[[], float],
    ) -> None:
        """`roles`: ARN to the external id that its trust policy asks for, None for none; None: every role is given."""
        self.roles: dict[str, str | None] | None = None if roles is None else dict(roles)
        self.assumed: list[AssumedRole] = []
        self._account = account
        self._verifier = verifier
        self._wall = wall

    def run(self, fields: Mapping[str, str], access_key: str, request_id: str) -> str:
        """The XML of the answer to a call that this access key has signed. Raises ApiError."""
        action, version = fields.get("Action", ""), fields.get("Version", "")
        if version == VERSION and action == "AssumeRole":
            result = self._assume_role(fields, access_key)
        elif version == VERSION and action == "GetCallerIdentity":
            arn, user_id, account = self._caller(access_key)
            result = _element("Arn", arn) + _element("UserId", user_id) + _element("Account", account)
        else:
            raise ApiError("InvalidAction", f"Could not find operation {action} for version {version}")
        return (
            f"<{action}Response {_NAMESPACE}><{action}Result>{result}</{action}Result>"
            f"<ResponseMetadata>{_element('RequestId', request_id)}</ResponseMetadata></{action}Response>\n"
        )

    def _assume_role(self, fields: Mapping[str, str], access_key: str) -> str:
        broken: list[str] = []
        for name in ("RoleArn", "RoleSessionName"):
            if name not in fields:
                path = name[0].lower() + name[1:]
                broken.append(f"Value null at '{path}' failed to satisfy constraint: Member must not be null")
        duration = fields.get("DurationSeconds", str(_HOUR_S))
        if not re.fullmatch(r"[0-9]{1,9}", duration):
            raise ApiError("MalformedInput", f"{duration!r} is no number of seconds")
        values: dict[str, str | int] = {**fields, "DurationSeconds": int(duration)}
        for name, rule in _RULES.items():
            if name in values:
                broken += violations(rule, name, name[0].lower() + name[1:], values[name])
        refuse(broken)
        role_arn, external_id = fields["RoleArn"], fields.get("ExternalId")
        if not _ROLE.fullmatch(role_arn):
            raise ApiError("ValidationError", f"{role_arn} is invalid")
        # A role that does not exist is answered as one that may not be assumed: STS tells nobody which roles there are.
        if self.roles is not None and (role_arn not in self.roles or self.roles[role_arn] not in (None, external_id)):
            raise ApiError(
                "AccessDenied",
                f"User: {self._caller(access_key)[0]} is not authorized to perform: sts:AssumeRole on resource:"
                f" {role_arn}",
                403,
            )
        role = AssumedRole(
            role_arn=role_arn,
            session_name=fields["RoleSessionName"],
            external_id=external_id,
            access_key=_id_of("ASIA", secrets.token_hex()),
            secret_key=secrets.token_urlsafe(30),
            token=secrets.token_urlsafe(96),
            expires=float(int(self._wall()) + int(duration)),
        )
        self.assumed.append(role)
        if self._verifier is not None:
            self._verifier.secrets[role.access_key] = Secret(role.secret_key, role.token, expires=role.expires)
        expiration = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(role.expires))
        return (
            f"<AssumedRoleUser>{_element('AssumedRoleId', role.user_id)}{_element('Arn', role.arn)}</AssumedRoleUser>"
            f"<Credentials>{_element('AccessKeyId', role.access_key)}{_element('SecretAccessKey', role.secret_key)}"
            f"{_element('SessionToken', role.token)}{_element('Expiration', expiration)}</Credentials>"
        )

    def _caller(self, access_key: str) -> tuple[str, str, str]:
        """ARN, id and account of whom the key belongs to: a role that was assumed here, else a user of its name."""
        for role in reversed(self.assumed):
            if role.access_key == access_key:
                return role.arn, role.user_id, role.arn.split(":")[4]
        return f"arn:aws:iam::{self._account}:user/{access_key}", _id_of("AIDA", access_key), self._account


def answer(emulator: Emulator, request: Request) -> tuple[bytes, bytes, Plan]:
    """Head and body of the answer to a form, and what else happens to the call: a fault may name these operations."""
    parsed = urllib.parse.parse_qs(request.body.decode("utf-8", "replace"), keep_blank_values=True)
    fields = {name: values[-1] for name, values in parsed.items()}
    operation = fields.get("Action", "")
    number = emulator.count_call(operation, request)
    pages, plan = emulator.pages, Plan()
    request_id = pages.request_id(number)
    try:
        emulator.verify(request, "sts")
        plan = emulator.plan(operation)
        if plan.error is not None:
            raise ApiError(plan.error.code, plan.error.text, plan.error.http_status)
        access_key = access_key_of(request.headers) or "anonymous"
        text = "" if plan.cut == "before" else emulator.sts.run(fields, access_key, request_id)
    except ApiError as error:
        emulator.counters.refused += 1
        if plan.error is not None and plan.error.kind == "html":
            return (*pages.html(plan.error.http_status), plan)
        body = _error(error, request_id).encode()
        status = _NAMES.get(error.code, (error.code, error.status))[1]
        return pages.head(status, XML, len(body), number), body, plan
    body = text.encode() if plan.rewrite is None else plan.rewrite(text.encode())
    return pages.head(200, XML, len(body), number), body, plan


def _error(error: ApiError, request_id: str) -> str:
    code, status = _NAMES.get(error.code, (error.code, error.status))
    kind = "Sender" if status < 500 else "Receiver"
    return (
        f"<ErrorResponse {_NAMESPACE}><Error>{_element('Type', kind)}{_element('Code', code)}"
        f"{_element('Message', error.message)}</Error>{_element('RequestId', request_id)}</ErrorResponse>\n"
    )


def _element(name: str, text: str) -> str:
    return f"<{name}>{escape(text)}</{name}>"


def _id_of(prefix: str, name: str) -> str:
    """An id as IAM gives them, the same one for the same name."""
    return prefix + base64.b32encode(hashlib.sha256(name.encode()).digest())[:16].decode()
