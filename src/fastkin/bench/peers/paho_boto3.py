"""paho-mqtt and boto3, a thread each: the microservice as it would look in Python. Acknowledges before storing."""

from __future__ import annotations

import queue
import sys
import time
import uuid
from typing import Any
from urllib.parse import urlsplit

import boto3
import paho.mqtt.client as mqtt
from botocore.config import Config
from paho.mqtt.enums import CallbackAPIVersion

from fastkin.bench.plan import KEY, Plan

_LINGER_S = 0.05
_RECORDS = 500


def main(plan: Plan) -> None:
    """Until it is ended."""
    kinesis: Any = boto3.client(
        "kinesis", region_name=plan.region, endpoint_url=plan.endpoint_url, aws_access_key_id=KEY,
        aws_secret_access_key=KEY, verify=plan.endpoint_ca, config=Config(retries={"total_max_attempts": 1}),
    )  # fmt: skip
    backlog: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    client: Any = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="bench")
    client.on_message = lambda _client, _data, message: backlog.put(message.payload)
    client.on_connect = lambda client, *_: client.subscribe(plan.forms().filter, plan.qos)
    if plan.broker_ca:
        client.tls_set(plan.broker_ca)
    broker = urlsplit(plan.broker_url)
    client.connect(broker.hostname, broker.port)
    client.loop_start()
    while True:
        batch = [backlog.get()]
        deadline = time.monotonic() + _LINGER_S
        while len(batch) < _RECORDS:
            try:
                batch.append(backlog.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                break
        kinesis.put_records(
            StreamName=plan.stream, Records=[{"Data": data, "PartitionKey": str(uuid.uuid4())} for data in batch]
        )


if __name__ == "__main__":
    main(Plan.of(sys.argv[1]))
