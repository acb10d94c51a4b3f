"""What rows promise of documents, policies and manifests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import orjson
import yaml

from fastkin.bench.plant import PAYLOAD_BYTES, welder_payload
from fastkin.settings.tables import TABLES
from rows.snippets import snippets

ROOT = Path(__file__).resolve().parent.parent.parent
DEPLOY = ROOT / "deploy"
PIPELINE: dict[str, Any] = dict(TABLES["pipeline"])


def words(name: str) -> str:
    """A page without its line ends."""
    return " ".join((ROOT / name).read_text("utf-8").split())


def allowed(policy: dict[str, Any]) -> dict[str, list[str]]:
    """Action to resources."""
    found: dict[str, list[str]] = {}
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow"
        actions, resources = statement["Action"], statement["Resource"]
        for action in [actions] if isinstance(actions, str) else actions:
            found.setdefault(action, []).extend([resources] if isinstance(resources, str) else resources)
    return found


def test_the_policy_of_a_subscriber() -> None:
    """IC-04: connect, subscribe and receive; on the page for the file of the page, and to be filled in."""
    (on_page,) = (json.loads(each.text) for each in snippets("json"))
    for policy in (on_page, json.loads((DEPLOY / "iot-subscriber.json").read_text())):
        actions = allowed(policy)
        kinds = {name: {resource.split(":", 5)[5].split("/")[0] for resource in actions[name]} for name in actions}
        assert kinds == {"iot:Connect": {"client"}, "iot:Subscribe": {"topicfilter"}, "iot:Receive": {"topic"}}
        assert all(resource.endswith("*") for resource in actions["iot:Connect"])  # several client ids
    (text,) = (each.text for each in snippets("toml") if each.name == "aws-iot-core-pipeline-1")
    filters = re.search(r"topics = (\[.*\])", text)
    assert filters is not None
    asked = [resource.split("topicfilter/")[1] for resource in allowed(on_page)["iot:Subscribe"]]
    assert asked == json.loads(filters[1])
    assert "`iot:Subscribe`" in words("README.md")


def test_the_keep_alive_of_aws_iot() -> None:
    """IC-03: its minimum is said where settings of brokers are."""
    assert "a keep-alive under 30 s counts as 30 s" in words("README.md")


def test_the_topology_behind_firehose() -> None:
    """IC-16: S3, SNS, SQS with a dead-letter queue, and a bound for the function."""
    text = words("docs/coming-from/aws-iot-core-pipeline.md").partition("## Behind Firehose")[2]
    assert "S3 notify SNS, SNS fill an SQS queue with a dead-letter queue" in text
    assert "with a maximum concurrency" in text


def test_a_policy_for_each_destination() -> None:
    """IC-17, MK-27: no more than what is called; every file is named where policies are told of."""
    read = ["kinesis:ListShards", "kinesis:GetShardIterator", "kinesis:GetRecords"]
    logs = ["logs:CreateLogStream", "logs:PutLogEvents"]
    expected = {
        "iam-minimal.json": ["kinesis:PutRecords"],
        "iam-recommended.json": ["kinesis:PutRecords", "kinesis:DescribeStreamSummary", "kinesis:ListShards"],
        "iam-tail.json": read,
        "iam-firehose.json": ["firehose:PutRecordBatch", "firehose:DescribeDeliveryStream"],
        "iam-lambda-store.json": [
            "kinesis:DescribeStream", "kinesis:DescribeStreamSummary", "kinesis:GetRecords", "kinesis:GetShardIterator",
            "kinesis:ListShards", "dynamodb:PutItem", "dynamodb:UpdateItem", "sqs:SendMessage", *logs,
        ],
        "iam-lambda-csv.json": ["s3:PutObject", *logs],
    }  # fmt: skip
    page = words("docs/coming-from/aws-iot-core-pipeline.md")
    for name, actions in expected.items():
        assert list(allowed(json.loads((DEPLOY / name).read_text()))) == actions
        assert f"(../../deploy/{name})" in page
    assert "`sts:AssumeRole`" in words("README.md")


def test_the_image_and_the_manifest() -> None:
    """MK-24: not as root, with probes, and with time to drain; memory as the page says."""
    image = (DEPLOY / "Dockerfile").read_text()
    user = re.search(r"useradd --system --uid (\d+) .* fastkin\nUSER fastkin\n", image)
    assert user is not None
    assert re.search(r"^FROM python:\S+-slim$", image, re.MULTILINE)
    manifest = yaml.safe_load((DEPLOY / "kubernetes.yaml").read_text())
    spec = manifest["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == int(user[1])
    assert spec["terminationGracePeriodSeconds"] >= PIPELINE["shutdown_timeout_s"].default + 5
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "status"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "status"}
    mebibytes = int(container["resources"]["limits"]["memory"].removesuffix("Mi"))
    assert mebibytes == 40 + PIPELINE["budget_bytes"].default // 2**20
    env = {each["name"]: each for each in container["env"]}
    assert env["FASTKIN_STATUS_PORT"]["value"] == str(container["ports"][0]["containerPort"])
    assert manifest["kind"] == "StatefulSet"  # a name of its own for each pod: two with one client id fight


def test_records_are_what_a_parquet_conversion_reads() -> None:
    """MK-28, MK-26: each record is one JSON object whose members are the columns of the page, of their types."""
    page = (ROOT / "docs" / "coming-from" / "mqtt-to-kinesis-microservice.md").read_text("utf-8")
    columns = re.findall(r"^\| `(\w+)` \| (string|double) \|$", page, re.MULTILINE)
    kinds = {"string": str, "double": float}
    for n in range(200):
        payload = welder_payload(n)
        assert len(payload) == PAYLOAD_BYTES == 152
        read = orjson.loads(payload)
        assert [(name, type(value)) for name, value in read.items()] == [(name, kinds[kind]) for name, kind in columns]
    assert len(columns) == 9
