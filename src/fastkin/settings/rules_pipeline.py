"""The rules of one [[pipeline]], without those of its stream."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastkin._codec import record_cost
from fastkin.config import EVENT_FILTER, Broker, Pipeline, label_filter
from fastkin.deadletter import destination
from fastkin.files import naming
from fastkin.formats import event, partition_key
from fastkin.formats.table import DEFAULT, FRAME
from fastkin.settings import rules_stream
from fastkin.settings.sources import pipeline_name
from fastkin.settings.tables import PIPELINE_KEYS
from fastkin.settings.values import Given

if TYPE_CHECKING:
    from fastkin.settings.sources import Sources
    from fastkin.settings.values import Report


def check(sources: Sources, number: int, broker: Broker | None, report: Report) -> Pipeline | None:
    """The pipeline of this number, from 1. None: there are problems, and they are in the report."""
    before = len(report.problems)
    raw = sources.pipelines[number - 1]
    given = Given(PIPELINE_KEYS, {key: value for key, value in raw.items() if key in PIPELINE_KEYS}, report)
    in_file = sources.path is not None
    where = "environment"
    if in_file:
        name = raw["id"].raw if "id" in raw else None
        where = f"{sources.place('pipeline', number)} {pipeline_name(number, name)}"
    if "id" not in raw:
        if in_file:
            report.problem(where, "has no id", "name the pipeline: id = ...")
        given.values["id"] = "default"
    _topics(given, where, in_file)
    _partition_key(given, broker)
    _events(given)
    _topic_field(given)
    if "envelope_host" in given.raw and given["envelope"] == "none":
        given.report.warn(f"{given.place('envelope_host')}: not used without envelope")
    _sizes(given)
    if given["dead_letter"] not in {None, "none"}:
        _dead_letter(given)
    _spool(given, in_file)
    kinesis = rules_stream.check(sources, raw, where, report)
    if kinesis is not None and kinesis.firehose:
        _unkeyed(given, "Firehose")
    _files(given)
    if len(report.problems) > before or kinesis is None:
        return None
    made = Pipeline(kinesis=kinesis, **given.values)
    # What the stream refuses once it would refuse as a dead letter too, and the pipeline would stand still.
    if destination.is_own(made):
        given.problem(
            "dead_letter",
            "is the stream of the records, which would refuse them again",
            "name another stream, or a file",
        )
        return None
    return made


def _topics(given: Given, where: str, in_file: bool) -> None:
    """`topics` as the pipeline has them: that of `bulk_label` is among them, and nothing twice."""
    # The same filter twice would make a broker deliver twice, or refuse the packet.
    topics = dict.fromkeys(given["topics"])
    for topic in topics:
        if wrong := _filter_problem(topic):
            cure = "+ and # stand for whole levels, # comes last; $share/GROUP/FILTER for a shared one"
            given.problem("topics", f"{topic!r} is not a topic filter: {wrong}", cure)
    for topic in given["exclude"]:
        if wrong := _filter_problem(topic) or ("a share is subscribed" if topic.startswith("$share/") else None):
            cure = "+ and # stand for whole levels, # comes last, no $share"
            given.problem("exclude", f"{topic!r} is not a topic filter to exclude: {wrong}", cure)
    if "events" in given and not given["events"]:
        given.problem("events", "is empty", 'name types of events, or leave it out; "*" is all of them')
    if given["events"] and not given.raw.keys() & {"topics"}:
        topics[EVENT_FILTER] = None
    if label := given["bulk_label"]:
        topics[label_filter(label)] = None
        if len(topics) == 1:  # else `format` is that of the others
            if given.values.get("format") == DEFAULT:
                given.report.warn(
                    f"{given.place('format')}: format is {DEFAULT}: each frame of bulk_label is stored whole"
                )
            given.values.setdefault("format", FRAME)
    if not topics and not {"topics", "bulk_label", "events"} & given.raw.keys():
        cure = "set topics, bulk_label or events"
        if not in_file:
            cure = "set TOPIC, FASTKIN_PIPELINE_TOPICS, FASTKIN_PIPELINE_BULK_LABEL or FASTKIN_PIPELINE_EVENTS"
        given.report.problem(where, "has neither topics nor bulk_label nor events", cure)
    elif not topics and "topics" in given and not given.is_wrong("bulk_label"):
        given.problem("topics", "is empty", "name a topic filter")
    given.values["topics"] = tuple(topics)


def _filter_problem(topic: str) -> str | None:
    # imported here: `fastkin --help` does without the compiled modules
    from fastkin.mqtt._core import valid_filter

    return valid_filter(topic)


def _partition_key(given: Given, broker: Broker | None) -> None:
    client_id = "?"  # no broker: that is a problem of its own, and told
    if broker is not None:
        client_id = "" if broker.client_id_drawn else broker.client_id
    try:
        kind, _ = partition_key.key_plan(given["partition_key"], client_id=client_id)
    except partition_key.KeySpecError as error:
        given.problem("partition_key", error.problem, error.cure)
        return
    if given["aggregation"] == "lines" and given["separator"]:
        problem = 'does not go with aggregation = "lines", where a line feed stands between records'
        given.problem("separator", problem, "remove one of them")
    bulk = given["bulk_label"] or given["format"] == FRAME
    if given["aggregation"] != "none" and kind == "content" and not bulk:
        given.report.warn(
            f"{given.place('aggregation', 'partition_key')}: nothing is aggregated: with partition_key content only"
            f" records of one message share a Kinesis record, and a message of format {given['format']} is one record"
        )
    if given["aggregation"] == "kpl" and kind == "none":
        problem = "does not go with partition_key none: consumers of such a stream do not take aggregates apart"
        given.problem("aggregation", problem, "choose one of them")


def _unkeyed(given: Given, where: str) -> None:
    """A destination without partition keys, which writes records one behind the other."""
    if given["partition_key"] != given.rows["partition_key"].default:
        given.report.warn(f"{given.place('partition_key')}: not used with {where}, which takes no keys")
    if given["aggregation"] != "none":
        # KPL aggregates are taken apart behind a stream only, and between two records of lines nothing would stand.
        problem = f"does not go with {where}, which writes records one behind the other"
        given.problem("aggregation", problem, 'remove it: each record ends with the separator, "\\n" when left out')
    if "separator" not in given.raw:
        given.values["separator"] = "\n"  # else nobody could tell where a record ends

    if given["startup_check"] == "dry_run":
        given.problem("startup_check", f"does not go with {where}: it knows no DryRun", 'use "describe" or "put"')


def _files(given: Given) -> None:
    """`file` with its neighbours: a directory that can be made, and room in it."""
    if "file" not in given:
        for key in given.raw if "file" not in given.raw else ():
            if key == "s3":
                given.problem(key, "is set without file", "set file to the directory where files wait for the bucket")
            elif key.startswith("file_"):
                given.report.warn(f"{given.place(key)}: not used without file")
        return
    _unkeyed(given, "file")
    if given["file_error_prefix"] and given["dead_letter"] not in {None, "none"}:
        given.problem("file_error_prefix", "file_error_prefix and dead_letter are both set", "keep one of them")
    for key in ("file_prefix", "file_error_prefix", "file_raw_prefix"):
        extension = ".jsonl" if key == "file_error_prefix" else given["file_extension"]
        if given[key] and (wrong := naming.wrong(given[key], given["id"], extension)):
            given.problem(key, f"{given[key]!r} {wrong}", "shorten it, or end it with a slash")
    path = Path(given["file"]).absolute()
    if path.exists() and not path.is_dir():
        given.problem("file", f"{path} is no directory", "name a directory")
    elif not path.exists() and not path.parent.is_dir():
        given.problem("file", f"there is no directory {path.parent}", "make it")
    need = 4 * (given["file_max_bytes"] + given["max_batch_bytes"])
    if given["file_disk_bytes"] < need:
        given.report.problem(
            given.place("file_disk_bytes", "file_max_bytes", "max_batch_bytes", "file"),
            f"file_disk_bytes {given['file_disk_bytes']} has no room for two files of file_max_bytes"
            f" {given['file_max_bytes']} and a call of max_batch_bytes {given['max_batch_bytes']} each, which lie there"
            " twice while they are finished",
            f"set file_disk_bytes to {need} or more",
        )


def _events(given: Given) -> None:
    """`enrich` and `homes` go with format = "event"."""
    for key in ("enrich", "homes"):
        if key in given.raw and given["format"] != "event":
            given.report.warn(f'{given.place(key)}: not used without format = "event"')
        elif key == "homes" and key in given.raw and not given["enrich"]:
            given.report.warn(f"{given.place(key)}: not used without enrich = true")
    for each in given["homes"]:
        try:
            event.home_of(each)
        except ValueError as error:
            given.problem("homes", str(error), 'write a device and its home as numbers, "7=12", or "*=12" for all')
            return


def _topic_field(given: Given) -> None:
    if not given["topic_field"]:
        for key in ("topic_clash", "topic_others"):
            if key in given.raw:
                given.report.warn(f"{given.place(key)}: not used without topic_field")
    elif given["topic_field"] == "payload" and given["topic_others"] == "wrap":
        cure = "give the topic another name, or choose another topic_others"
        given.problem("topic_field", 'is "payload", which is where topic_others = "wrap" puts the record', cure)


def _sizes(given: Given) -> None:
    record, batch, budget = given["max_record_bytes"], given["max_batch_bytes"], given["budget_bytes"]
    # Told here, for the codec would call every large record oversize, and nobody would know that a setting did it.
    if record > batch:
        given.report.problem(
            given.place("max_batch_bytes", "max_record_bytes"),
            f"max_batch_bytes {batch} has no room for one record of max_record_bytes {record}",
            "raise max_batch_bytes or lower max_record_bytes",
        )
    # A record that can never fit into the budget would be offered again and again, and reading would never go on.
    need = record_cost(record)
    if budget < need:
        given.report.problem(
            given.place("budget_bytes", "max_record_bytes"),
            f"budget_bytes {budget} has no room for one record of max_record_bytes {record}",
            f"set budget_bytes to {need} or more (base64 takes a third more)",
        )


def _dead_letter(given: Given) -> None:
    """A stream that can be one, or a file in a directory that is there."""
    text = given["dead_letter"]
    if text.startswith(destination.PREFIX):
        if problem := destination.wrong(text):
            cure = "stream:NAME or stream:arn:aws:kinesis:REGION:123456789012:stream/NAME"
            given.problem("dead_letter", problem, cure)
        return
    path = Path(text).absolute()
    if _no_place(given, "dead_letter", path):
        return
    if not (os.access(path, os.W_OK) if path.exists() else os.access(path.parent, os.W_OK | os.X_OK)):
        who = f"user id {os.geteuid()}"
        place = given.place("dead_letter")
        # Only a warning: `fastkin check` may be run by another user than the service.
        given.report.warn(f"{place}: {path} cannot be written by {who}: let the service's user write there")


def _no_place(given: Given, key: str, path: Path) -> bool:
    """Is there no place for such a file?"""
    if not path.parent.is_dir():
        given.problem(key, f"there is no directory {path.parent}", "make it")
    elif path.is_dir():
        given.problem(key, f"{path} is a directory", "name a file in it")
    else:
        return False
    return True


def _spool(given: Given, in_file: bool) -> None:
    """`spool` goes with on_full = "spool": a file that can be written."""
    if given["on_full"] != "spool":
        for key in ("spool",) if "spool" in given else ("spool_max_bytes", "spool_after_s"):
            if key in given.raw:
                given.report.warn(f'{given.place(key)}: not used without on_full = "spool"')
    elif "spool" in given:
        _spool_file(given, Path(given["spool"]).absolute())
    elif "spool" not in given.raw:
        cure = 'set spool, for example to "spool.db"' if in_file else "set FASTKIN_PIPELINE_SPOOL"
        given.problem("on_full", "on_full is spool, and no file is named", cure)


def _spool_file(given: Given, path: Path) -> None:
    record, most = given["max_record_bytes"], given["spool_max_bytes"]
    if most < 2 * record_cost(record):
        given.report.problem(
            given.place("spool_max_bytes", "max_record_bytes"),
            f"spool_max_bytes {most} has no room for two records of max_record_bytes {record}",
            f"set spool_max_bytes to {2 * record_cost(record)} or more",
        )
    if _no_place(given, "spool", path):
        return
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.R_OK | os.W_OK)):
        cure = f"let user id {os.geteuid()} read and write the file and its directory, or name another"
        given.problem("spool", f"{path} cannot be written", cure)
