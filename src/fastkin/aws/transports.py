"""Chooses the client that makes the calls: our own, or the SDK's.

Ours costs a fraction of the SDK's time per call, and none of its 30 MB. But it knows no proxies. So the SDK's client is
taken when the settings ask for it, or when they leave it open and the environment sends calls through a proxy.
"""

from __future__ import annotations

import urllib.request
from typing import TYPE_CHECKING

from fastkin.aws.destinations import FIREHOSE, KINESIS
from fastkin.aws.endpoint import light_endpoint
from fastkin.aws.native import KinesisClient

if TYPE_CHECKING:
    from fastkin.aws.client import Client
    from fastkin.aws.destinations import Destination
    from fastkin.config import Kinesis


def proxy_applies(kinesis: Kinesis, destination: Destination = KINESIS) -> bool:
    """Does the environment send calls to this endpoint through a proxy? NO_PROXY is respected."""
    proxies = urllib.request.getproxies_environment()
    if not (proxies.get("https") or proxies.get("http")):
        return False
    endpoint = light_endpoint(kinesis, destination=destination)
    if endpoint is None:
        return True  # only the SDK can say where the call goes: it also knows about the proxy
    scheme = endpoint.data.base.partition(":")[0]
    if not proxies.get(scheme):
        return False
    return not urllib.request.proxy_bypass(endpoint.data.host)


def make_client(kinesis: Kinesis, name: str | None = None, destination: Destination | None = None) -> Client:
    """The client that the settings and the environment ask for. `name` of the pipeline, for log lines.

    `destination` None: the one that the settings name.
    """
    if destination is None:
        destination = FIREHOSE if kinesis.firehose else KINESIS
    if kinesis.transport == "sdk" or (kinesis.transport == "auto" and proxy_applies(kinesis, destination)):
        from fastkin.aws.sdk import SdkClient  # the SDK costs 30 MB

        return SdkClient(kinesis, name=name, destination=destination)
    return KinesisClient(kinesis, name=name, destination=destination)
