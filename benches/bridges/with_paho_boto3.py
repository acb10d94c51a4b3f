"""paho-mqtt and boto3, a thread each: the microservice as it would look in Python. Acknowledges before storing."""

from __future__ import annotations

import queue
import time
import uuid

import boto3
import paho.mqtt.client as mqtt
from _measure import Meter, arguments
from botocore.config import Config

args = arguments()
kinesis = boto3.client(
    "kinesis", region_name="us-east-1", endpoint_url=args.url, aws_access_key_id="AK", aws_secret_access_key="SK",
    config=Config(retries={"total_max_attempts": 1}),
)  # fmt: skip
backlog: queue.SimpleQueue[bytes] = queue.SimpleQueue()
client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="bench")
client.on_message = lambda client, data, message: backlog.put(message.payload)
client.on_connect = lambda client, *rest: client.subscribe("plant/#", args.qos)
meter = Meter()
client.connect("127.0.0.1", args.port)
client.loop_start()
stored = 0
while stored < args.count:
    batch = [backlog.get()]
    deadline = time.monotonic() + 0.05
    while len(batch) < 500:
        try:
            batch.append(backlog.get(timeout=max(0.0, deadline - time.monotonic())))
        except queue.Empty:
            break
    answer = kinesis.put_records(
        StreamName="bench", Records=[{"Data": data, "PartitionKey": str(uuid.uuid4())} for data in batch]
    )
    stored += len(batch) - answer["FailedRecordCount"]
meter.report(args.count)
time.sleep(1.0)  # for its last acknowledgements
client.loop_stop()
