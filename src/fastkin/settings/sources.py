"""Where values come from: the TOML file, the env file, the environment; and which of them wins."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkin.errors import ConfigError
from fastkin.setting_row import close
from fastkin.settings import envfile, toml_lines
from fastkin.settings.tables import (
    ALIASES,
    AWS,
    ENV,
    KINESIS_KEYS,
    MICROSERVICE,
    MICROSERVICE_MORE,
    NOT_SETTINGS,
    PIPELINE_KEYS,
    TABLES,
)
from fastkin.settings.values import SettingsError, Value, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastkin.setting_row import Row
    from fastkin.settings.values import Raw, Report

_SECRETS = frozenset({"access_key", "secret_key", "session_token"})
# a nearer source that says one of these takes the whole group over
_STREAM = frozenset({"stream", "stream_arn", "firehose"})
# names of the microservice that a login or a container sets for reasons of its own
_EVERYWHERE = frozenset({"USER", "PASS", "PORT", "STDOUT", "WEBSOCKET", "DOCKERLOG"})
_KEYS = frozenset({"access_key", "secret_key", "profile"})
# Values that mean one thing together. A nearer source that says one of them makes the others of a farther one void.
TOGETHER = {
    **dict.fromkeys(_STREAM, _STREAM),
    **dict.fromkeys((*_KEYS, "session_token"), _KEYS),
}


class Sources:
    """Reads everything; then `broker`, `tls`, `kinesis`, `aws` and `pipelines` hold what was said."""

    def __init__(
        self,
        path: str | Path | None,
        env: Mapping[str, str],
        env_file: str | Path | None,
        login: str | None,
        report: Report,
    ) -> None:
        self.path = path
        self.login = login
        self.report = report
        self.broker: Raw = {}
        self.tls: Raw = {}
        self.kinesis: Raw = {}
        self.status: Raw = {}
        self.workers: Raw = {}
        # those that a file begins with [NAME]
        self._tables = {
            "broker": self.broker, "kinesis": self.kinesis, "status": self.status, "workers": self.workers,
        }  # fmt: skip
        self.lines: dict[toml_lines.Path, int] = {}
        self.pipelines: list[Raw] = []
        self.vars: dict[str, Value] = {}
        self.from_file: frozenset[str] = frozenset()
        self._read_variables(env, env_file)
        if path is not None:
            self._toml(Path(path))
        else:
            self.pipelines.append({})
            self._microservice(self.pipelines[0])
        # The order is that of the head of this package: the file first, then the FASTKIN_ names over it, the AWS_
        # names last, for what nobody has said.
        self._fastkin_names()
        self._unused_names()
        self.aws: Raw = self._aws()
        if path is None and not (any((self.broker, self.kinesis, *self.pipelines)) or report.problems):
            cure = "give a settings file, or set BROKER, TOPIC and KIN_STREAM_NAME"
            if Path(".env").exists() and not self.from_file:
                cure += "; there is a .env here: --env-file .env reads it"
            raise SettingsError([ConfigError("settings", "there are none", cure)])

    def _read_variables(self, env: Mapping[str, str], env_file: str | Path | None) -> None:
        env = dict(env)
        if env_file is not None:
            try:
                found = envfile.read(Path(env_file))
            except ConfigError as error:
                raise SettingsError([error]) from None
            for name, (value, line) in found.items():
                if value:
                    self.vars[name] = Value(value, f"{env_file} line {line}: {name}", True)
            if "USER" in self.vars and not env.get("PASS") and env.get("USER") == self._login_name():
                del env["USER"]  # every login shell sets it: the file's is meant
            self.from_file = frozenset(name for name in self.vars if not env.get(name))
        # Behind the env file, so that the real environment wins. An empty variable is an unset one: Compose files and
        # charts write `NAME=` for what nobody set.
        for name, value in env.items():
            if value:
                self.vars[name] = Value(value, f"environment variable {name}", True)

    # --- the TOML file ---

    def _toml(self, path: Path) -> None:
        document, text = _read_toml(path)
        self.lines = toml_lines.lines(text)
        for name, value in document.items():
            if name in self._tables and isinstance(value, dict):
                into = self._tables[name]
                self._names(f"[{name}]", name, value, into, (name,))
            elif name == "pipeline" and isinstance(value, list) and _all_tables(value):
                for number, each in enumerate(value, 1):
                    raw: Raw = {}
                    self._names(pipeline_name(number, each.get("id")), name, each, raw, (name, number))
                    self.pipelines.append(raw)
            elif name in {*self._tables, "pipeline"}:
                form = "[[pipeline]]" if name == "pipeline" else f"[{name}]"
                self.report.problem(f"{self.place(name)} {name}", "is not a table", f"write {form}")
            else:
                self.report.problem(
                    f"{self.place(name)} {name!r}",
                    "is not a table fastkin knows",
                    nearest(name, (*self._tables, "pipeline")),
                )
        if "pipeline" not in document:
            self.report.problem(str(path), "has no [[pipeline]]", "add one with topics and stream")

    def place(self, *at: str | int) -> str:
        """How a message begins: the file, and the line if it can be found."""
        line = toml_lines.nearest(self.lines, at)
        return f"{self.path}:" if line is None else f"{self.path}:{line}:"

    def _names(self, table: str, kind: str, given: dict[str, Any], into: Raw, at: toml_lines.Path) -> None:
        """Sort the keys of one TOML table, refusing those that mean nothing."""
        known = dict(TABLES[kind])
        if kind == "pipeline":
            known.update(KINESIS_KEYS)
        aliases = ALIASES if kind in {"kinesis", "pipeline"} else {}
        for name, value in given.items():
            place = f"{self.place(*at, name)} {table} key {name!r}"
            key = aliases.get(name, name)
            if kind == "broker" and name == "tls":
                if isinstance(value, dict):
                    self._names("[broker.tls]", "broker.tls", value, self.tls, (*at, name))
                else:
                    self.report.problem(place, "is not a table", "write [broker.tls]")
            elif key not in known:
                cure = _nearest_key(name, kind, known)
                self.report.problem(place, "is not a key of this table", cure)
            # An alias and the name it stands for, both in one table.
            elif key in into:
                self.report.problem(place, f"sets {key} a second time", "keep one of them")
            else:
                into[key] = Value(value, place)

    # --- the environment ---

    def _fastkin_names(self) -> None:
        tables = {**self._tables, "broker.tls": self.tls}
        for name, value in self.vars.items():
            if not name.startswith("FASTKIN_") or name in NOT_SETTINGS or _is_service_link(name, str(value.raw)):
                continue
            if name not in ENV:
                # An error, not a warning: a slip in a name would otherwise leave the default in place, and nobody
                # would know why.
                self.report.problem(value.place, "is not a setting", nearest(name, ENV))
                continue
            table, key = ENV[name]
            if table == "pipeline":
                self._pipeline_name_of_all(key, value)
                continue
            if name == "FASTKIN_BROKER_URL":
                # it wins over the file's parts as well, not only over its url
                for part in ("scheme", "host", "port", "path"):
                    self.broker.pop(part, None)
            tables[table][key] = value
            if table == "kinesis":
                # over the TOML file, so over what its pipelines say too
                for raw in self.pipelines:
                    for each in TOGETHER.get(key, frozenset({key})):
                        raw.pop(each, None)

    def _pipeline_name_of_all(self, key: str, value: Value) -> None:
        if PIPELINE_KEYS[key].own and len(self.pipelines) > 1:
            self.report.problem(
                value.place,
                f"cannot be set for {len(self.pipelines)} pipelines at once",
                "set it in each [[pipeline]] of the settings file",
            )
            return
        for raw in self.pipelines:
            raw[key] = value

    def _unused_names(self) -> None:
        unused = sorted(name for name in {*MICROSERVICE, *MICROSERVICE_MORE} - _EVERYWHERE if name in self.vars)
        if self.path is not None and unused:
            self.report.warn(
                f"{', '.join(unused)} not used: with a settings file, the environment counts only by"
                " FASTKIN_ names and those of the AWS SDK (for example FASTKIN_BROKER_URL)"
            )
        known = {*ENV, *MICROSERVICE, *MICROSERVICE_MORE}
        for name in sorted(self.from_file - known):
            # In an env file every line is meant for us, so a near miss is worth a word. The environment is full of
            # other names.
            if not name.startswith(("AWS_", "FASTKIN_")) and (near := close(name, known)):
                self.report.warn(f"{self.vars[name].place}: not used; did you mean {near}?")

    def endpoint_of(self, service: str) -> Value | None:
        """What the SDK's names say of the endpoint of a service that is not Kinesis: "FIREHOSE", "S3"."""
        ignore = str(self.vars.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", Value("", "")).raw)
        names = (f"AWS_ENDPOINT_URL_{service}", *AWS["endpoint_url"][1:])
        found = [self.vars[name] for name in names if name in self.vars]
        return found[0] if found and ignore.lower() != "true" else None

    def _aws(self) -> Raw:
        found: Raw = {}
        for key, names in AWS.items():
            if key == "endpoint_url":
                if (url := self.endpoint_of("KINESIS")) is not None:
                    found[key] = url
                continue
            for name in names:
                # Keys of the real environment are left to credentials.py, which knows what else is
                # set beside them; those of an env file nobody else can see.
                if name in self.vars and (key not in _SECRETS or name in self.from_file):
                    found[key] = self.vars[name]
                    break
        return found

    # --- the names of the microservice ---

    def _microservice(self, pipeline: Raw) -> None:
        tables = {"broker": self.broker, "kinesis": self.kinesis, "pipeline": pipeline}
        for name, (table, key) in MICROSERVICE.items():
            if name in self.vars:
                tables[table][key] = self.vars[name]
        # The microservice knows fixed keys only: `uuid` set there means the text, and not our rule.
        if fixed := self.vars.get("KIN_PARTITION_KEY"):
            pipeline["partition_key"] = fixed._replace(raw=f"static:{fixed.raw}")
        if "DOCKERLOG" in self.vars:
            self.report.warn("DOCKERLOG is ignored: the log goes to stderr")
        self._microservice_address()
        self._microservice_user()

    def _microservice_user(self) -> None:
        user, password = self._either("MQTT_USER", "USER"), self._either("MQTT_PASS", "PASS")
        if password is not None:
            self.broker["password"] = password
        if user is None:
            return
        from_environment = user is self.vars.get("USER") and "USER" not in self.from_file
        if from_environment and user.raw == (login := self._login_name()):
            if password is None:
                self.report.warn(
                    f"USER={login} is the login name and PASS is not set: taken for the shell's"
                    " own and not sent to the broker; set MQTT_USER to send it"
                )
                return
            # Meant or the shell's: nobody can tell, and a container's login is often the broker's user as well.
            self.report.warn(
                f"USER={login} comes from the environment and is the login name, as in every login shell: sent to the"
                " broker because PASS is set; set MQTT_USER to the user that you mean"
            )
        self.broker["user"] = user

    def _login_name(self) -> str:
        return self.login if self.login is not None else _login()

    def _microservice_address(self) -> None:
        host, port, websocket = (self.vars.get(name) for name in ("BROKER", "PORT", "WEBSOCKET"))
        if port is not None:
            self.broker["port"] = port
        if host is None:
            return
        text = str(host.raw)
        if "://" in text:
            self.broker["url"] = host
            if websocket is not None:
                self.report.warn("WEBSOCKET not used: BROKER says how to connect")
        # host:port is how many write it down, and urlsplit() needs a scheme to take it apart.
        elif _has_port(text):
            self.broker["url"] = host._replace(raw=f"mqtt://{text}")
            if websocket is not None:
                self.report.problem(websocket.place, "BROKER has a port already", "keep one of them")
        else:
            self.broker["host"] = host
            # The microservice never reads WEBSOCKET, and the file that comes with it has both: such a file must go
            # where it went.
            if websocket is not None and port is not None:
                self.report.warn(
                    f"WEBSOCKET not used: PORT is set, connecting to {text}:{port.raw} by TCP; for ws:// take PORT out"
                )
            elif websocket is not None:
                self.broker["scheme"] = Value("ws", websocket.place, True)
                self.broker["port"] = websocket

    def _either(self, first: str, second: str) -> Value | None:
        return self.vars.get(first) or self.vars.get(second)


# What Kubernetes puts into every pod's environment for each service of the namespace, here for one called `fastkin` or
# `fastkin-something`: names and values as its kubelet makes them (and Docker's links before it).
_LINK_PORT = r"(?:tcp|udp|sctp)://\S+:\d+"
_LINKS = tuple(
    (re.compile(rf"FASTKIN(?:_[A-Z0-9_]+)?_{name}"), re.compile(value))
    for name, value in (
        ("SERVICE_HOST", r"[0-9.]+|[0-9a-fA-F:]*:[0-9a-fA-F:.]*"),
        (r"SERVICE_PORT(?:_[A-Z0-9_]+)?", r"\d+"),
        ("PORT", _LINK_PORT),
        (r"PORT_\d+_(?:TCP|UDP|SCTP)", _LINK_PORT),
        (r"PORT_\d+_(?:TCP|UDP|SCTP)_PROTO", "tcp|udp|sctp"),
        (r"PORT_\d+_(?:TCP|UDP|SCTP)_PORT", r"\d+"),
        (r"PORT_\d+_(?:TCP|UDP|SCTP)_ADDR", r"[0-9.]+|[0-9a-fA-F:]*:[0-9a-fA-F:.]*"),
    )
)


def _is_service_link(name: str, value: str) -> bool:
    """By its value too: a service called fastkin-status sets FASTKIN_STATUS_PORT, which is a name of ours."""
    return any(known.fullmatch(name) and looks.fullmatch(value) for known, looks in _LINKS)


_MOST_BYTES = 1 << 20  # a settings file is a few kilobytes


def _read_toml(path: Path) -> tuple[dict[str, Any], str]:
    import tomllib

    raw = b""
    try:
        with path.open("rb") as file:
            # Bounded before it is parsed: somebody may give the path of a device, or of a log.
            raw = file.read(_MOST_BYTES + 1)
        if len(raw) > _MOST_BYTES:
            problem = ConfigError(str(path), "is larger than 1 MiB", "that is no settings file: check the path")
            raise SettingsError([problem])
        # a byte order mark is what some editors put first
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
        return tomllib.loads(text), text
    except FileNotFoundError:
        problem = ConfigError(str(path), "there is no such settings file", "check the path")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problem = ConfigError(f"{path}:{line}", f"is not UTF-8 at byte {error.start}", "save it as UTF-8")
    except OSError as error:
        problem = ConfigError(str(path), f"cannot be read: {error.strerror}", "check path and permissions")
    except tomllib.TOMLDecodeError as error:
        # tomllib shows no values, only characters that it did not expect
        at = re.search(r"\(at line (\d+), column (\d+)\)", str(error))
        place = f"{path}:{at[1]}" if at else f"{path}"
        problem = ConfigError(place, f"is not TOML: {error}", "texts stand in quotes; see https://toml.io")
    raise SettingsError([problem])


def _all_tables(values: list[Any]) -> bool:
    return all(isinstance(value, dict) for value in values)


def pipeline_name(number: int, name: object) -> str:
    return f"[[pipeline]] {number}" + (f" ({name!r})" if isinstance(name, str) else "")


def _login() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return ""


def _has_port(host: str) -> bool:
    return re.fullmatch(r"(\[[^\]]*\]|[^:]*):\d+", host) is not None


def _nearest_key(name: str, kind: str, known: Mapping[str, Row]) -> str:
    if name in known:
        return ""
    for other, names in TABLES.items():
        if name in names and other != kind:
            form = "[[pipeline]]" if other == "pipeline" else f"[{other}]"
            return f"it belongs into {form}"
    return nearest(name, known)
