"""From what was said to the frozen tables of config.py.

Each value was judged by its row alone (values.py). Here, and in the rules_ modules, is what a row cannot say: what
excludes what, what needs what, which file must be there, and what is only worth a warning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastkin.config import Settings, Status, Workers
from fastkin.net.names import is_loopback
from fastkin.settings import rules_broker, rules_pipeline, rules_together
from fastkin.settings.tables import STATUS_KEYS, WORKERS_KEYS
from fastkin.settings.values import Given, SettingsError

if TYPE_CHECKING:
    from fastkin.settings.sources import Sources
    from fastkin.settings.values import Raw, Report


def check(sources: Sources, report: Report) -> Settings:
    """SettingsError with everything that is wrong."""
    broker = rules_broker.check(sources.broker, sources.tls, report)
    numbered = range(1, len(sources.pipelines) + 1)
    made = [rules_pipeline.check(sources, number, broker, report) for number in numbered]
    pipelines = tuple(pipeline for pipeline in made if pipeline is not None)
    rules_together.check(sources, pipelines, report)
    status = _status(sources.status, report)
    workers = Workers(**Given(WORKERS_KEYS, sources.workers, report).values)
    if broker is not None and workers.count is not None:
        rules_together.check_workers(sources, broker, workers, report)
    if report.problems:
        raise SettingsError(report.problems)
    assert broker is not None
    return Settings(broker=broker, pipelines=pipelines, warnings=tuple(report.warnings), status=status, workers=workers)


def _status(raw: Raw, report: Report) -> Status:
    given = Given(STATUS_KEYS, raw, report)
    host, port = given["host"], given["port"]
    if port and not is_loopback(host):
        report.warn(f"status port {port} on {host}: whoever reaches it reads names and figures, without a password")
    return Status(**given.values)
