"""The rules of all pipelines together: what only one of them may have."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from fastkin.settings.sources import pipeline_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastkin.config import Broker, Pipeline, Workers
    from fastkin.settings.sources import Sources
    from fastkin.settings.values import Raw, Report, Value


def check(sources: Sources, made: Sequence[Pipeline], report: Report) -> None:
    """`made`: those pipelines that are right by themselves."""
    raws = sources.pipelines
    in_file = sources.path is not None
    if in_file:
        _unique(raws, "id", report)
    _unique(raws, "bulk_label", report)
    _spools(raws, report)
    _directories(raws, report)
    _rotated(raws, report)
    silent = [repr(pipeline.id) for pipeline in made if pipeline.dead_letter is None and not pipeline.file_error_prefix]
    if silent:
        key = "dead_letter" if in_file else "FASTKIN_PIPELINE_DEAD_LETTER"
        report.warn(
            f"no dead_letter for {', '.join(silent)}: what Kinesis can never store is only logged;"
            f' set {key} to a file, or to "none" if that is meant'
        )
    if made and not any(pipeline.enabled for pipeline in made):
        report.warn("every pipeline is disabled: nothing to do")


def check_workers(sources: Sources, broker: Broker, workers: Workers, report: Report) -> None:
    """Workers are told apart by what is appended to names: nothing else may be named so."""
    count = sources.workers["count"].place
    if workers.count and workers.group is None:
        if broker.client_id_drawn or not broker.client_id:
            report.problem(
                count, "workers share their subscriptions in a group, and none is named", "set client_id, or group"
            )
        elif re.search("[+#/]", broker.client_id):
            cure = "set group: a name without + # /"
            report.problem(count, "client_id is no name for the group of a shared subscription", cure)
    for number, raw in enumerate(sources.pipelines, 1):
        if (said := _said(raw, "id")) and re.fullmatch(r"w\d+", said[1]):
            problem = f"{_label(sources.pipelines, number)} would have the client id of a worker"
            report.problem(said[0].place, problem, "give it another id, or leave workers out")
        if (said := _said(raw, "spool")) and re.search(r"-w\d+$", Path(said[1]).stem):
            problem = f"{said[1]!r} is named like the spool of a worker"
            report.problem(said[0].place, problem, "name a file that does not end with -w and a number")


def _said(raw: Raw, key: str) -> tuple[Value, str] | None:
    """A text that was said, be it right or wrong, and where."""
    value = raw.get(key)
    return (value, value.raw) if value is not None and isinstance(value.raw, str) else None


def _label(raws: Sequence[Raw], number: int) -> str:
    said = _said(raws[number - 1], "id")
    return pipeline_name(number, said[1] if said else None)


def _unique(raws: Sequence[Raw], key: str, report: Report) -> None:
    seen: dict[str, int] = {}
    for number, raw in enumerate(raws, 1):
        if said := _said(raw, key):
            value, text = said
            first = seen.setdefault(text, number)
            if first != number:
                names = f"{_label(raws, first)} and {_label(raws, number)}"
                report.problem(value.place, f"two pipelines have the {key} {text!r}: {names}", "make it unique")


def _spools(raws: Sequence[Raw], report: Report) -> None:
    """A spool belongs to one pipeline, and is no file of dead letters."""
    seen: dict[str, int] = {}
    for number, raw in enumerate(raws, 1):
        said, policy = _said(raw, "spool"), _said(raw, "on_full")
        if said is None or policy is None or policy[1] != "spool":
            continue
        value, text = said
        # By the real path: two names of one file are one file, and two pipelines would lock each other out.
        first = seen.setdefault(os.path.realpath(text), number)
        if first != number:
            names = f"{_label(raws, first)} and {_label(raws, number)}"
            report.problem(value.place, f"two pipelines have the spool {text!r}: {names}", "name a file for each")
    letters = {os.path.realpath(said[1]) for raw in raws if (said := _said(raw, "dead_letter"))}
    for raw in raws:
        if (said := _said(raw, "spool")) and os.path.realpath(said[1]) in letters:
            report.problem(said[0].place, f"{said[1]!r} is the dead letter file too", "name another file")


def _directories(raws: Sequence[Raw], report: Report) -> None:
    """A directory of files belongs to one pipeline: each would count and upload what the other one makes."""
    seen: dict[str, int] = {}
    for number, raw in enumerate(raws, 1):
        if (said := _said(raw, "file")) is None:
            continue
        value, text = said
        first = seen.setdefault(os.path.realpath(text), number)
        if first != number:
            names = f"{_label(raws, first)} and {_label(raws, number)}"
            report.problem(value.place, f"two pipelines have the directory {text!r}: {names}", "name one for each")


def _rotated(raws: Sequence[Raw], report: Report) -> None:
    """A file that is named like a rotated one of another would be renamed and deleted with those."""
    letters = {os.path.realpath(said[1]) for raw in raws if (said := _said(raw, "dead_letter")) and said[1] != "none"}
    for raw in raws:
        for key in ("dead_letter", "spool"):
            said = _said(raw, key)
            if said is None or said[1].startswith("stream:"):
                continue
            base, _, number = os.path.realpath(said[1]).rpartition(".")
            if base in letters and re.fullmatch("[1-9][0-9]{0,5}", number):
                report.problem(
                    said[0].place,
                    f"{said[1]!r} is named like a rotated file of the dead_letter {Path(base).name!r}",
                    "name a file that does not end with a dot and a number",
                )
