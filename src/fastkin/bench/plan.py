"""What a run is made of, as one frozen table: the command line fills it, and every process of the run is given it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fastkin.bench.forms import Forms

if TYPE_CHECKING:
    from fastkin.bench.ledger import Expand

SOURCE = "source"  # the built-in broker
MOSQUITTO = "mosquitto"  # one that is started for the run
EMULATOR = "emulator"
STREAM = "bench"
REGION = "us-east-1"
_SECRETS = {"password", "key_password", "access_key", "secret_key", "session_token", "external_id", "url"}
KEY = "bench"  # access key and secret for the emulator, which checks none


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    command: str
    # what is published
    form: str = "welder"
    seed: int = 1
    samples: int = 100
    sample_hz: float = 20_000.0
    messages: int = 100_000  # of all pipelines together
    rate: float | None = None  # messages per second, all pipelines together; None: as fast as they are taken
    qos: int = 1
    pipelines: int = 1
    # the two sides
    broker: str = SOURCE
    broker_ca: str | None = None
    window: int = 10_000  # of the built-in source: unacknowledged messages
    batch: int | None = None  # of the built-in source: most messages in one write
    endpoint: str = EMULATOR
    endpoint_ca: str | None = None
    stream: str = STREAM
    region: str = REGION
    shards: int = 4
    limits: bool = False
    latency_ms: float = 0.0
    route: bool = False  # the emulator finds the shard of each record, also without limits
    tls_broker: bool = False
    tls_kinesis: bool = False
    # what is measured
    settings: tuple[str, ...] = ()  # KEY=VALUE of the pipeline, or of the producer
    peer: str = "fastkin"
    aggregates: bool = False  # the peer packs records together, as the KPL does
    canonical: bool = False  # the peer writes the same JSON value in other words
    interval_s: float = 1.0
    # known once the processes run
    folder: str = ""
    broker_url: str = ""
    endpoint_url: str = ""

    def text(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def of(text: str) -> Plan:
        fields = json.loads(text)
        return Plan(**fields | {"settings": tuple(fields["settings"])})

    def told(self) -> dict[str, Any]:
        """For a report: what a reader needs to repeat the run. No certificates, no folders."""
        settings = [
            f"{key}=***" if key.rpartition(".")[2] in _SECRETS else f"{key}={value}"
            for key, value in self.option.items()
        ]
        hidden = {
            "folder",
            "broker_ca",
            "endpoint_ca",
            "canonical",
            "aggregates",
            "route",
            "broker_url",
            "endpoint_url",
        }
        return {key: value for key, value in asdict(self).items() if key not in hidden} | {
            "settings": settings,
            "broker": self.broker.rpartition("@")[2],
            "endpoint": self.endpoint.rpartition("@")[2],
        }

    def forms(self) -> Forms:
        """ValueError: a number of them is out of its range."""
        return Forms(self.form, seed=self.seed, samples=self.samples, sample_hz=self.sample_hz)

    @property
    def counting(self) -> bool:
        """The endpoint answers from a template: no limits, no routing, as cheap as it gets."""
        return not self.limits and not self.route

    @property
    def option(self) -> dict[str, str]:
        """The settings by name."""
        return dict(each.split("=", 1) for each in self.settings)

    @property
    def expand(self) -> Expand:
        """What the records of a call are: aggregates must be taken apart to be counted."""
        if self.aggregates:
            return "kpl"
        if self.command == "producer":
            return "kpl" if int(self.option.get("aggregate_bytes", "0")) > 0 else "none"
        return cast("Expand", self.option.get("aggregation", "none"))

    def runs(self, block: int) -> list[tuple[int, int]]:
        """Of each pipeline: the number of its first message, which begins a block, and how many it has."""
        each, more = divmod(self.messages, self.pipelines)
        span = -(-(each + 1) // block) * block
        return [(at * span, each + (at < more)) for at in range(self.pipelines)]

    @property
    def records(self) -> int:
        """Of all messages together."""
        return self.messages * (self.samples if self.form == "bulk" else 1)

    def path(self, name: str) -> Path:
        return Path(self.folder) / name


@dataclass(slots=True)
class Sample:
    """One moment of a run; rates are those since the sample before."""

    seconds: float
    published: int
    stored: int
    per_s: float  # records stored
    in_flight: int
    throttled: int
    rss_mb: float
    cpu_percent: float
    wakeups_per_s: float
    calls_per_s: float
    latency_ms: dict[str, float] = field(default_factory=dict)
