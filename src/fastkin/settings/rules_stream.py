"""The rules of one stream: what a pipeline, [kinesis] and the AWS_ names say about it together."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fastkin.config import Kinesis
from fastkin.net.names import is_loopback
from fastkin.settings import pem
from fastkin.settings.sources import TOGETHER
from fastkin.settings.tables import KINESIS_KEYS
from fastkin.settings.values import Given

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastkin.settings.sources import Sources
    from fastkin.settings.values import Raw, Report


def check(sources: Sources, pipeline: Raw, where: str, report: Report) -> Kinesis | None:
    """None: there are problems, and they are in the report."""
    own = {key: value for key, value in pipeline.items() if key in KINESIS_KEYS}
    before = len(report.problems)
    merged = _merged([own, sources.kinesis, sources.aws])
    to_files = "file" in pipeline
    if to_files:
        for key in {"stream", "stream_arn", "firehose"} & merged.keys():
            if key in own:
                report.problem(own[key].place, f"file and {key} are both set", "keep one of them")
            del merged[key]  # of all pipelines, in [kinesis]: this one has another destination
    service = "S3" if to_files else "FIREHOSE" if "firehose" in merged else None
    if service is not None and merged.get("endpoint_url") is sources.aws.get("endpoint_url"):
        merged.pop("endpoint_url", None)
        if (url := sources.endpoint_of(service)) is not None:
            merged["endpoint_url"] = url
    given = Given(KINESIS_KEYS, merged, report)
    if not to_files and not {"stream", "stream_arn", "firehose"} & given.raw.keys():
        cure = "set stream, stream_arn or firehose, here or in [kinesis]"
        if sources.path is None:
            cure = "set KIN_STREAM_NAME, FASTKIN_KINESIS_STREAM_ARN or FASTKIN_KINESIS_FIREHOSE"
        report.problem(where, "has no stream", cure)
    if "firehose" in given.raw and (other := {"stream", "stream_arn"} & given.raw.keys()):
        given.problem("firehose", f"firehose and {min(other)} are both set", "keep one of them")
    if "stream_arn" in given:
        _arn(given)
    _credentials(given)
    if "ca_bundle" in given and (found := pem.problem(given["ca_bundle"], "CERTIFICATE")):
        given.problem("ca_bundle", *found)
    if len(report.problems) > before:
        return None
    _warn(given, report)
    return Kinesis(**given.values)


def _merged(layers: Sequence[Raw]) -> Raw:
    """The nearer layer wins; what is said together is taken together (sources.TOGETHER)."""
    merged: Raw = {}
    for number, layer in enumerate(layers):
        nearer = {key for each in layers[:number] for key in each}
        for key, value in layer.items():
            # A stream by name in the pipeline takes the ARN of [kinesis] out: the two together would be a
            # contradiction that nobody wrote.
            if key not in merged and not nearer & TOGETHER.get(key, frozenset()):
                merged[key] = value
    # an ARN brings its region: another one counts only where the ARN is said, as a contradiction
    if "stream_arn" in merged and "region" not in next(layer for layer in layers if "stream_arn" in layer):
        merged.pop("region", None)
    return merged


def _arn(given: Given) -> None:
    """An ARN brings name and region."""
    parts = given["stream_arn"].split(":")
    region, stream = parts[3], parts[5].removeprefix("stream/")
    if "stream" in given and given["stream"] != stream:
        given.problem("stream", f"stream {given['stream']!r} differs from {stream!r} in stream_arn", "keep one")
    if "region" in given and given["region"] != region:
        problem = f"region {given['region']!r} differs from {region!r} in stream_arn"
        given.problem("region", problem, "leave region out: the ARN brings it")
    given.values.update(stream=stream, region=region)


def _credentials(given: Given) -> None:
    for one, other in (("access_key", "secret_key"), ("secret_key", "access_key"), ("session_token", "access_key")):
        if one in given and other not in given.raw:
            given.problem(one, f"is set without {other}", f"set {other} too")
    if "profile" in given and "access_key" in given:
        given.problem("profile", "profile and access_key are both set", "keep one of them")


def _warn(given: Given, report: Report) -> None:
    if "endpoint_url" in given:
        url = urlsplit(given["endpoint_url"])
        if url.scheme == "http" and not is_loopback(url.hostname or ""):
            report.warn(f"the records go unencrypted to {url.hostname}: use https://")
    for key in ("external_id", "session_name"):
        if key in given and "role_arn" not in given:
            report.warn(f"{given.place(key)}: not used without role_arn")
