"""From what was said to the frozen tables: defaults, what excludes what, what needs what."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from fastkin.config import Broker, Kinesis, Pipeline, Settings, Status, Tls, label_filter
from fastkin.deadletter import destination as letterplace
from fastkin.formats import partition_key as keys
from fastkin.settings import pem
from fastkin.settings.sources import TOGETHER, pipeline_name
from fastkin.settings.tables import BROKER_KEYS, KINESIS_KEYS, PIPELINE_KEYS, STATUS_KEYS, TLS_KEYS
from fastkin.settings.values import SettingsError, parse_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastkin.settings.sources import Sources
    from fastkin.settings.values import Raw, Report


_STREAM = re.compile(r"arn:aws[a-z-]*:kinesis:([a-z0-9-]+):\d{12}:stream/([a-zA-Z0-9_.-]{1,128})")
_ROLE = re.compile(r"arn:aws[a-z-]*:iam::\d{12,}:role/[\w+=,.@/-]{1,512}", re.ASCII)


class Checker:
    def __init__(self, sources: Sources, report: Report) -> None:
        self.sources = sources
        self.report = report
        self.path = sources.path
        self.aws = sources.aws
        self.random_id = False

    def settings(self) -> Settings:
        """SettingsError with everything that is wrong."""
        sources = self.sources
        broker = self._broker(sources.broker, sources.tls)
        made = tuple(
            pipeline
            for number, raw in enumerate(sources.pipelines, 1)
            if (pipeline := self._pipeline(raw, sources.kinesis, number, broker)) is not None
        )
        self._together(sources.pipelines, made)
        status = self._status(sources.status)
        if self.report.problems:
            raise SettingsError(self.report.problems)
        assert broker is not None
        return Settings(broker=broker, pipelines=made, warnings=tuple(self.report.warnings), status=status)

    def _status(self, raw: Raw) -> Status:
        given = parse_table(STATUS_KEYS, raw, self.report)
        host = given.get("host")
        if host is not None and not re.fullmatch(r"[A-Za-z0-9._:%-]{1,255}", host):
            self._host(raw["host"].place, host)
        elif host is not None and given.get("port") and not _loopback(host):
            self.report.warn(
                f"status port {given['port']} on {host}: whoever reaches it reads names and figures, without a password"
            )
        return Status(**given)

    # --- the broker ---

    def _broker(self, raw: Raw, tls_raw: Raw) -> Broker | None:
        before = len(self.report.problems)
        given = parse_table(BROKER_KEYS, raw, self.report)
        tls = parse_table(TLS_KEYS, tls_raw, self.report)
        if "url" in given:
            self._url(given, raw)
        scheme = given.get("scheme") or ("mqtts" if tls else "mqtt")
        if tls and scheme in {"mqtt", "ws"}:
            secure = "mqtts" if scheme == "mqtt" else "wss"
            self.report.problem(
                next(iter(tls_raw.values())).place,
                f"is for TLS, and {scheme}:// has none",
                f"use {secure}://",
            )
        given["scheme"] = scheme
        given.setdefault("port", {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443}[scheme])
        if "key" in tls and "cert" not in tls:
            self.report.problem(tls_raw["key"].place, "is a key without a certificate", "set cert too")
        self._pem_files(tls, tls_raw)
        host = given.get("host", "localhost")
        if not re.fullmatch(r"[A-Za-z0-9._:%-]{1,255}", host):
            self._host(raw["host"].place, host)
        if "path" in given and not given["path"].startswith("/"):
            self.report.problem(raw["path"].place, "does not begin with /", "for example /mqtt")
        low = given.get("reconnect_min_s", _default(Broker, "reconnect_min_s"))
        if given.get("reconnect_max_s", _default(Broker, "reconnect_max_s")) < low:
            place = (raw.get("reconnect_max_s") or raw["reconnect_min_s"]).place
            self.report.problem(place, "reconnect_max_s is less than reconnect_min_s", "swap them")
        if "password" in given and "user" not in given:
            self.report.problem(raw["password"].place, "is a password without a user", "set user too")
        self._client_id(given, raw)
        if len(self.report.problems) > before:
            return None
        if given.get("password") and scheme in {"mqtt", "ws"} and not _loopback(host):
            self.report.warn(f"the broker's password goes unencrypted to {host}: use {scheme}s://")
        if not given.get("clean_session") and given.get("session_expiry_s") == 0:
            self.report.warn(
                "session_expiry_s = 0: a 5.0 broker forgets the session when fastkin is away; set the longest outage"
            )
        if tls.get("insecure_skip_verify"):
            self.report.warn("insecure_skip_verify: any machine in the way can be the broker")
        return Broker(tls=Tls(**tls), **given)

    def _host(self, place: str, host: str) -> None:
        # something with an @ may hold a password
        shown = "what is given" if "@" in host else repr(host)
        cure = "a name or address alone; user and password have keys of their own"
        self.report.problem(place, f"{shown} is not a host name or address", cure)

    def _client_id(self, given: dict[str, Any], raw: Raw) -> None:
        if given.get("client_id"):
            if len(given["client_id"].encode()) > 65_535:
                self.report.problem(raw["client_id"].place, "is longer than 65,535 bytes", "MQTT takes no more")
            return
        if "clean_session" not in given:
            given["clean_session"] = True
            self.report.warn(
                "no client_id: clean session, so what the broker would keep while fastkin is away"
                " is lost; set client_id"
            )
        elif not given["clean_session"]:
            self.report.problem(
                raw["clean_session"].place,
                "false needs a client id: the broker keeps the session under it",
                "set client_id",
            )
        # a blank id that was written down is wanted: the broker then draws one
        self.random_id = True
        if "client_id" not in given:
            given.update(client_id=f"fastkin-{os.urandom(6).hex()}", client_id_drawn=True)

    def _url(self, given: dict[str, Any], raw: Raw) -> None:
        place = raw["url"].place
        text = str(given.pop("url"))
        try:
            url = urlsplit(text)
            port = url.port
        except ValueError:  # its text may hold a part of the password
            self.report.problem(
                place, "is not an address", "mqtts://host:8883; in user and password, write / as %2F and @ as %40"
            )
            return
        schemes = {"tcp": "mqtt", "ssl": "mqtts", "tls": "mqtts", "mqtt+ssl": "mqtts"}
        scheme = schemes.get(url.scheme, url.scheme)
        if scheme not in {"mqtt", "mqtts", "ws", "wss"}:
            self.report.problem(
                place,
                f"{url.scheme!r} is not a way to connect" if url.scheme else "has no scheme",
                "use mqtt://, mqtts://, ws:// or wss://",
            )
            return
        if not url.hostname:
            self.report.problem(place, "names no host", "for example mqtt://localhost:1883")
            return
        if not _is_host(url.hostname):
            self.report.problem(place, f"{url.hostname!r} is no name of a host", "for example mqtt://localhost:1883")
            return
        if url.query or url.fragment or (url.path not in {"", "/"} and scheme[0] == "m"):
            self.report.problem(place, "says more than host and port", "for example mqtt://localhost:1883")
            return
        found = {"scheme": scheme, "host": url.hostname, "port": port}
        if scheme[0] == "w" and url.path not in {"", "/"}:
            found["path"] = url.path
        if url.username:
            found["user"] = unquote(url.username)
        if url.password:
            found["password"] = unquote(url.password)
        for name, value in found.items():
            if value is None:
                continue
            if name in raw and raw[name].text and not raw["url"].text:
                continue  # the environment wins over the file, also over a part of its address
            if given.get(name, value) != value:
                self.report.problem(raw[name].place, f"{name} is also in the address, otherwise", "keep one")
            raw.setdefault(name, raw["url"])
            given[name] = value

    def _pem_files(self, tls: dict[str, Any], raw: Raw) -> None:
        for name in ("ca", "cert"):
            if name in tls:
                self._pem(tls[name], raw[name].place, "CERTIFICATE")
        if "key" in tls:
            self._pem(tls["key"], raw["key"].place, "PRIVATE KEY")
        elif "cert" in tls and pem.holds(tls["cert"], "CERTIFICATE") and not pem.holds(tls["cert"], "PRIVATE KEY"):
            self.report.problem(raw["cert"].place, f"{tls['cert']} has no key in it", "set key too")

    def _pem(self, path: str, place: str, what: str) -> None:
        try:
            good = pem.holds(path, what, strict=True)
        except OSError as error:
            self.report.problem(place, f"{path}: {error.strerror}", "check path and permissions")
            return
        if not good:
            self.report.problem(
                place, f"{path} has no {what.lower()} in PEM form", f"it needs the lines BEGIN and END {what}"
            )

    # --- pipelines ---

    def _pipeline(self, raw: Raw, defaults: Raw, number: int, broker: Broker | None) -> Pipeline | None:
        before = len(self.report.problems)
        given = parse_table(PIPELINE_KEYS, {k: v for k, v in raw.items() if k in PIPELINE_KEYS}, self.report)
        where = "environment"
        if self.path is not None:
            where = f"{self.sources.place('pipeline', number)} {pipeline_name(number, given.get('id'))}"
        if "id" not in given:
            if self.path is not None and not (raw.get("id")):
                self.report.problem(where, "has no id", "name the pipeline: id = ...")
            given["id"] = "default"
        elif not re.fullmatch(r"[A-Za-z0-9_.:/-]{1,64}", given["id"]):
            self.report.problem(
                raw["id"].place, f"{given['id']!r} is not fit for a log line",
                "use 1 to 64 letters, digits and _ . : / -",
            )  # fmt: skip
        self._topics(given, raw, where)
        self._keys(given, raw, broker)
        self._sizes(given, raw)
        if given.get("dead_letter", "none") != "none":
            self._dead_letter(given["dead_letter"], raw["dead_letter"].place)
        self._spool(given, raw)
        kinesis = self._kinesis(raw, defaults, where)
        if len(self.report.problems) > before or kinesis is None:
            return None
        made = Pipeline(kinesis=kinesis, **given)
        if letterplace.is_own(made):
            cure = "name another stream, or a file"
            self.report.problem(raw["dead_letter"].place, "is the stream that refuses what would go there", cure)
            return None
        return made

    def _dead_letter(self, text: str, place: str) -> None:
        if text.startswith(letterplace.PREFIX):
            if problem := letterplace.wrong(text):
                self.report.problem(
                    place, problem, "stream:NAME or stream:arn:aws:kinesis:REGION:123456789012:stream/NAME"
                )
            return
        path = Path(text).absolute()
        if not path.parent.is_dir():
            self.report.problem(place, f"there is no directory {path.parent}", "make it")
        elif path.is_dir():
            self.report.problem(place, f"{path} is a directory", "name a file in it")
        elif not (os.access(path, os.W_OK) if path.exists() else os.access(path.parent, os.W_OK | os.X_OK)):
            who = f"user id {os.geteuid()}"
            self.report.warn(f"{place}: {path} cannot be written by {who}: let the service's user write there")

    def _topics(self, given: dict[str, Any], raw: Raw, where: str) -> None:
        topics = dict.fromkeys(given.get("topics", ()))
        for topic in topics:
            if wrong := _filter_problem(topic):
                cure = "+ and # stand for whole levels, # comes last; $share/GROUP/FILTER for a shared one"
                self.report.problem(raw["topics"].place, f"{topic!r} is not a topic filter: {wrong}", cure)
        if label := given.get("bulk_label"):
            if re.search(r"[+#/\x00]", label):
                self.report.problem(raw["bulk_label"].place, f"{label!r} is not one level of a topic", "without + # /")
            topics[label_filter(label)] = None
            if len(topics) == 1:  # else `format` is that of the others
                if given.get("format") == "raw":
                    self.report.warn(f"{raw['format'].place}: raw with bulk_label: frames are stored as they come")
                given.setdefault("format", "bulk")
        if not topics and not {"topics", "bulk_label"} & raw.keys():
            cure = "set topics or bulk_label"
            if self.path is None:
                cure = "set TOPIC, FASTKIN_PIPELINE_TOPICS or FASTKIN_PIPELINE_BULK_LABEL"
            self.report.problem(where, "has neither topics nor bulk_label", cure)
        elif not topics and "topics" in given:
            self.report.problem(raw["topics"].place, "is empty", "name a topic filter")
        given["topics"] = tuple(topics)

    def _keys(self, given: dict[str, Any], raw: Raw, broker: Broker | None) -> None:
        spec = given.get("partition_key", "uuid")
        client_id = ""
        if broker is None:
            client_id = "?"  # a problem of its own, already told
        elif not self.random_id:
            client_id = broker.client_id
        try:
            kind, _ = keys.key_plan(spec, client_id=client_id)
        except keys.KeySpecError as error:
            self.report.problem(raw["partition_key"].place, error.problem, error.cure)
            return
        if given.get("aggregation") == "kpl" and kind == "none":
            self.report.problem(
                raw["aggregation"].place,
                "cannot go with partition_key none: such streams do not take aggregates apart",
                "choose one of them",
            )

    def _sizes(self, given: dict[str, Any], raw: Raw) -> None:
        record = given.get("max_record_bytes", _default(Pipeline, "max_record_bytes"))
        batch = given.get("max_batch_bytes", _default(Pipeline, "max_batch_bytes"))
        budget = given.get("budget_bytes", _default(Pipeline, "budget_bytes"))
        if record > batch:
            place = (raw.get("max_batch_bytes") or raw["max_record_bytes"]).place
            self.report.problem(
                place,
                f"max_batch_bytes {batch} holds no record of max_record_bytes {record}",
                "raise the one or lower the other",
            )
        need = record_cost(record)
        if budget < need:
            place = (raw.get("budget_bytes") or raw["max_record_bytes"]).place
            self.report.problem(
                place,
                f"budget_bytes {budget} holds no record of max_record_bytes {record}",
                f"at least {need} (base64 takes a third more)",
            )

    def _spool(self, given: dict[str, Any], raw: Raw) -> None:
        """`spool` goes with on_full = "spool": a file that can be written."""
        spools = given.get("on_full") == "spool"
        if "spool" not in given:
            if spools and "spool" not in raw:
                cure = "set FASTKIN_PIPELINE_SPOOL" if self.path is None else 'set spool, for example to "spool.db"'
                self.report.problem(raw["on_full"].place, "on_full is spool, and no file is named", cure)
            for name in ("spool_max_bytes", "spool_after_s"):
                if name in raw and not spools:
                    self.report.warn(f'{raw[name].place}: not used without on_full = "spool"')
            return
        place = raw["spool"].place
        if not spools:
            self.report.warn(f'{place}: not used without on_full = "spool"')
            return
        path = Path(given["spool"]).absolute()
        record = given.get("max_record_bytes", _default(Pipeline, "max_record_bytes"))
        most = given.get("spool_max_bytes", _default(Pipeline, "spool_max_bytes"))
        if most < 2 * record_cost(record):
            at = (raw.get("spool_max_bytes") or raw["max_record_bytes"]).place
            self.report.problem(at, f"spool_max_bytes {most} holds no two records of max_record_bytes {record}",
                                f"at least {2 * record_cost(record)}")  # fmt: skip
        if not path.parent.is_dir():
            self.report.problem(place, f"there is no directory {path.parent}", "make it")
        elif path.is_dir():
            self.report.problem(place, f"{path} is a directory", "name a file in it")
        elif not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.R_OK | os.W_OK)):
            self.report.problem(
                place, f"{path} cannot be written",
                f"let user id {os.geteuid()} read and write the file and its directory, or name another",
            )  # fmt: skip

    # --- the stream ---

    def _kinesis(self, raw: Raw, defaults: Raw, where: str) -> Kinesis | None:
        """Three layers, the nearer wins: the pipeline, [kinesis], the AWS_ names."""
        own = {name: value for name, value in raw.items() if name in KINESIS_KEYS}
        merged = {**own}
        layers = [own, defaults, self.aws]
        for number, layer in enumerate(layers[1:], 1):
            nearer = {name for each in layers[:number] for name in each}
            for name, value in layer.items():
                if name not in merged and not nearer & TOGETHER.get(name, frozenset()):
                    merged[name] = value
        before = len(self.report.problems)
        given = parse_table(KINESIS_KEYS, merged, self.report)
        if not {"stream", "stream_arn"} & merged.keys():
            cure = "set stream or stream_arn, here or in [kinesis]"
            if self.path is None:
                cure = "set KIN_STREAM_NAME or FASTKIN_KINESIS_STREAM_ARN"
            self.report.problem(where, "has no stream", cure)
        self._stream(given, merged, layers)
        if "region" in given and not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", given["region"]):
            self.report.problem(
                (merged.get("region") or merged["stream_arn"]).place,  # an ARN brings one
                f"{given['region']!r} is not a region",
                "for example eu-west-1",
            )
        if "role_arn" in given and not _ROLE.fullmatch(given["role_arn"]):
            self.report.problem(
                merged["role_arn"].place, f"{given['role_arn']!r} is not the ARN of a role",
                "arn:aws:iam::123456789012:role/NAME",
            )  # fmt: skip
        if "external_id" in given and not re.fullmatch(r"[\w+=,.@:/-]{2,1224}", given["external_id"], re.ASCII):
            self.report.problem(
                merged["external_id"].place, "is not an external id", "2 to 1224 letters, digits and _ + = , . @ : / -"
            )
        if "session_name" in given and not re.fullmatch(r"[\w+=,.@-]{2,64}", given["session_name"], re.ASCII):
            self.report.problem(
                merged["session_name"].place, "is not a session name",
                "2 to 64 letters, digits and _ + = , . @ -",
            )  # fmt: skip
        self._endpoint(given, merged)
        for one, other in (
            ("access_key", "secret_key"),
            ("secret_key", "access_key"),
            ("session_token", "access_key"),
        ):
            if one in given and other not in merged:
                self.report.problem(merged[one].place, f"is set without {other}", f"set {other} too")
        if "profile" in given and "access_key" in given:
            self.report.problem(merged["profile"].place, "profile and access_key are both set", "keep one of them")
        if "ca_bundle" in given:
            self._pem(given["ca_bundle"], merged["ca_bundle"].place, "CERTIFICATE")
        if len(self.report.problems) > before:
            return None
        for name in ("external_id", "session_name"):
            if name in given and "role_arn" not in given:
                self.report.warn(f"{merged[name].place}: not used without role_arn")
        return Kinesis(**given)

    def _stream(self, given: dict[str, Any], merged: Raw, layers: Sequence[Raw]) -> None:
        name, arn = given.get("stream"), given.get("stream_arn")
        if name is not None and not re.fullmatch(r"[a-zA-Z0-9_.-]{1,128}", name):
            self.report.problem(
                merged["stream"].place, f"{name!r} is not a stream name",
                "1 to 128 letters, digits and _ . -",
            )  # fmt: skip
        if arn is None:
            return
        match = _STREAM.fullmatch(arn)
        if match is None:
            self.report.problem(
                merged["stream_arn"].place, f"{arn!r} is not the ARN of a stream",
                "arn:aws:kinesis:REGION:123456789012:stream/NAME",
            )  # fmt: skip
            return
        region, stream = match.groups()
        if name is not None and name != stream:
            self.report.problem(
                merged["stream"].place,
                f"stream {name!r} is not the {stream!r} of stream_arn",
                "keep one",
            )
        given["stream"] = stream
        # a region beside the ARN must be the same; a default from farther away just does not count
        beside = next(layer for layer in layers if "stream_arn" in layer)
        if "region" in beside and given.get("region", region) != region:
            self.report.problem(
                merged["region"].place,
                f"region {given['region']!r} is not the {region!r} of stream_arn",
                "leave region out: the ARN brings it",
            )
        given["region"] = region

    def _endpoint(self, given: dict[str, Any], merged: Raw) -> None:
        if "endpoint_url" not in given:
            return
        place, text = merged["endpoint_url"].place, str(given["endpoint_url"])
        try:
            url = urlsplit(text)
            good = url.scheme in {"http", "https"} and _is_host(url.hostname) and url.port != 0
        except ValueError:
            good = False
        if not good or "@" in url.netloc or url.query or url.fragment:
            self.report.problem(place, "is not an endpoint", "for example http://localhost:4567")
        elif url.scheme == "http" and not _loopback(url.hostname or ""):
            self.report.warn(f"the records go unencrypted to {url.hostname}: use https://")

    # --- all pipelines together ---

    def _together(self, raws: Sequence[Raw], made: Sequence[Pipeline]) -> None:
        if self.path is not None:
            self._unique(raws, "id", "two pipelines have the id")
        self._unique(raws, "bulk_label", "two pipelines have the bulk_label")
        self._spools(raws)
        self._rotated(raws)
        silent = [repr(pipeline.id) for pipeline in made if pipeline.dead_letter is None]
        if silent:
            key = "dead_letter" if self.path is not None else "FASTKIN_PIPELINE_DEAD_LETTER"
            self.report.warn(
                f"no dead_letter for {', '.join(silent)}: what Kinesis can never store is only logged;"
                f' set {key} to a file, or to "none" if that is meant'
            )
        if made and not any(pipeline.enabled for pipeline in made):
            self.report.warn("every pipeline is disabled: nothing to do")

    def _spools(self, raws: Sequence[Raw]) -> None:
        """A spool belongs to one pipeline."""
        seen: dict[str, str] = {}
        for number, raw in enumerate(raws, 1):
            value, policy, name = raw.get("spool"), raw.get("on_full"), raw.get("id")
            if value is None or policy is None or policy.raw != "spool" or not isinstance(value.raw, str):
                continue
            path = os.path.realpath(value.raw)
            label = pipeline_name(number, name.raw if name else None)
            if path in seen:
                both = f"{seen[path]} and {label}"
                says = f"two pipelines have the spool {value.raw!r}: {both}"
                self.report.problem(value.place, says, "name a file for each")
            seen.setdefault(path, label)
        letters = {os.path.realpath(v.raw) for raw in raws if (v := raw.get("dead_letter")) and isinstance(v.raw, str)}
        for raw in raws:
            value = raw.get("spool")
            if value is not None and isinstance(value.raw, str) and os.path.realpath(value.raw) in letters:
                self.report.problem(value.place, f"{value.raw!r} is the dead letter file too", "name another file")

    def _rotated(self, raws: Sequence[Raw]) -> None:
        """A file that is named like a rotated one of another would be renamed and deleted with those."""
        files = [
            (value, os.path.realpath(value.raw))
            for raw in raws
            for key in ("dead_letter", "spool")
            if (value := raw.get(key)) and isinstance(value.raw, str) and not value.raw.startswith("stream:")
        ]
        letters = {
            os.path.realpath(value.raw)
            for raw in raws
            if (value := raw.get("dead_letter")) and isinstance(value.raw, str) and value.raw != "none"
        }
        for value, path in files:
            base, _, number = path.rpartition(".")
            if base in letters and re.fullmatch("[1-9][0-9]{0,5}", number):
                self.report.problem(
                    value.place,
                    f"{value.raw!r} is named like a rotated file of the dead_letter {Path(base).name!r}",
                    "name a file that does not end with a dot and a number",
                )

    def _unique(self, raws: Sequence[Raw], key: str, says: str) -> None:
        seen: dict[object, int] = {}
        for number, raw in enumerate(raws, 1):
            value = raw.get(key)
            if value is None or not isinstance(value.raw, str):
                continue
            if value.raw in seen:
                first = raws[seen[value.raw] - 1].get("id")
                names = " and ".join(
                    pipeline_name(n, label.raw if label else None)
                    for n, label in ((seen[value.raw], first), (number, raw.get("id")))
                )
                self.report.problem(value.place, f"{says} {value.raw!r}: {names}", "make it unique")
            else:
                seen[value.raw] = number


def record_cost(nbytes: int) -> int:
    """What one record costs the budget at most: base64, its key and the JSON around it."""
    return 4 * ((nbytes + 2) // 3) + 1024


def _default(kind: type[Broker | Pipeline | Kinesis], name: str) -> Any:
    return next(f.default for f in fields(kind) if f.name == name)


def _is_host(name: str | None) -> bool:
    """Could this be the name or address of a host, as far as its letters go?"""
    try:
        return bool(name) and bool(name.encode("idna"))  # type: ignore[union-attr]
    except UnicodeError:
        return False


def _loopback(host: str) -> bool:
    return host in {"localhost", "::1"} or host.startswith("127.")


def _filter_problem(topic: str) -> str | None:
    # imported here: `fastkin --help` does without the compiled modules
    from fastkin.mqtt._core import valid_filter

    return valid_filter(topic)
