"""The environment in which every AWS SDK finds the emulator and nothing else, for a while."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping  # noqa: TC003 - who reads our annotations needs them
from typing import Final

ACCESS_KEY: Final = "AKIAFASTKINTESTING00"
SECRET_KEY: Final = "no-secret-at-all-it-opens-the-emulator-only"  # noqa: S105 - it is none

# What would lead an SDK past the variables that are set here: to keys, to a region or to an endpoint of the machine's.
_UNSET: Final = (
    "AWS_PROFILE",
    "AWS_DEFAULT_PROFILE",
    "AWS_SESSION_TOKEN",
    "AWS_SECURITY_TOKEN",
    "AWS_CREDENTIAL_EXPIRATION",
    "AWS_ACCOUNT_ID",
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
    "AWS_USE_FIPS_ENDPOINT",
    "AWS_USE_DUALSTACK_ENDPOINT",
)
_SERVICES: Final = ("KINESIS", "FIREHOSE", "STS")


def aws_variables(url: str, region: str = "us-east-1") -> dict[str, str]:
    """The variables by which an SDK finds an emulator at `url`, and keys to sign with that open nothing else."""
    own = {
        **{f"AWS_ENDPOINT_URL_{service}": url for service in _SERVICES},
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": region,
        "AWS_DEFAULT_REGION": region,
        # The files of whoever runs the tests must not decide how they end; nor must an instance's role.
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name in ("NO_PROXY", "no_proxy"):
        before = os.environ.get(name) or os.environ.get(name.swapcase())
        own[name] = f"{before},127.0.0.1" if before else "127.0.0.1"
    return own


@contextlib.contextmanager
def aws_environment(url: str, region: str = "us-east-1") -> Iterator[Mapping[str, str]]:
    """Points every AWS SDK of this process, and of those it starts, at the emulator at `url`.

    Gives the variables that are set. Afterwards every variable is as it was; those that were not there are gone. A
    client that was made before keeps the endpoint it has.
    """
    own = aws_variables(url, region)
    before = {name: os.environ.get(name) for name in (*own, *_UNSET)}
    for name in _UNSET:
        os.environ.pop(name, None)
    os.environ.update(own)
    try:
        yield own
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
