"""Telegraf and Fluent Bit: the settings with which they do what fastkin does, as far as they can."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from fastkin.bench.children import HOST
from fastkin.bench.plan import KEY

if TYPE_CHECKING:
    from fastkin.bench.plan import Plan

# Its manual: inputs/mqtt_consumer, outputs/kinesis. The payload passes as one text field, so what is stored is what was
# published.
_TELEGRAF: Final = """\
[agent]
  omit_hostname = true
  flush_interval = "50ms"
  metric_batch_size = 500
  metric_buffer_limit = 100000

[[inputs.mqtt_consumer]]
  servers = ["{broker}"]
  topics = ["{filter}"]
  qos = {qos}
  client_id = "bench"
  persistent_session = true
  max_undelivered_messages = 10000
  data_format = "value"
  data_type = "string"
  topic_tag = ""
{tls}
[[outputs.kinesis]]
  region = "{region}"
  endpoint_url = "{endpoint}"
  access_key = "{key}"
  secret_key = "{key}"
  streamname = "{stream}"
  data_format = "template"
  template = '{{{{ .Field "value" }}}}'
  [outputs.kinesis.partition]
    method = "random"
"""

# Its manual: inputs/mqtt, which is a server that machines publish to, and outputs/kinesis, which speaks TLS only.
_FLUENT_BIT: Final = """\
[SERVICE]
    flush 0.05
    log_level warn

[INPUT]
    name mqtt
    tag plant
    listen {host}
    port {port}

[OUTPUT]
    name kinesis_streams
    match *
    region {region}
    stream {stream}
    endpoint {endpoint}
    port {endpoint_port}
    tls on
    tls.verify off
    retry_limit no_limits
"""


def telegraf(plan: Plan) -> list[str]:
    broker = urlsplit(plan.broker_url)
    path = plan.path("telegraf.conf")
    path.write_text(
        _TELEGRAF.format(
            broker=f"{'ssl' if plan.tls_broker else 'tcp'}://{broker.hostname}:{broker.port}",
            filter=plan.forms().filter,
            qos=plan.qos,
            tls=f'  tls_ca = "{plan.broker_ca}"\n' if plan.broker_ca else "",
            region=plan.region,
            endpoint=plan.endpoint_url,
            key=KEY,
            stream=plan.stream,
        )
    )
    return [shutil.which("telegraf") or "telegraf", "--config", str(path)]


def fluent_bit(plan: Plan) -> list[str]:
    endpoint = urlsplit(plan.endpoint_url)
    path = plan.path("fluent-bit.conf")
    path.write_text(
        _FLUENT_BIT.format(
            host=HOST,
            port=urlsplit(plan.broker_url).port,
            region=plan.region,
            stream=plan.stream,
            endpoint=endpoint.hostname,
            endpoint_port=endpoint.port,
        )
    )
    return [shutil.which("fluent-bit") or "fluent-bit", "--config", str(path)]


COMMANDS: Final = {"telegraf": telegraf, "fluent-bit": fluent_bit}
