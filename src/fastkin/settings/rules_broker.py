"""The rules of [broker] and [broker.tls]."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, unquote, urlsplit

from fastkin.config import SCHEMES, Broker, Tls
from fastkin.net.names import is_host, is_loopback
from fastkin.settings import pem
from fastkin.settings.tables import BROKER_KEYS, TLS_KEYS
from fastkin.settings.values import Given, Value

if TYPE_CHECKING:
    from fastkin.settings.values import Raw, Report

_ALIASES = {"tcp": "mqtt", "ssl": "mqtts", "tls": "mqtts", "mqtt+ssl": "mqtts"}  # what others call a scheme
_EXAMPLE = "for example mqtt://localhost:1883"


def check(raw: Raw, tls_raw: Raw, report: Report) -> Broker | None:
    """None: there are problems, and they are in the report."""
    before = len(report.problems)
    given = Given(BROKER_KEYS, raw, report)
    tls = Given(TLS_KEYS, tls_raw, report)
    if "url" in given:
        _url(given)
    _scheme(given, tls)
    _certificates(tls)
    if given["reconnect_max_s"] < given["reconnect_min_s"]:
        place = given.place("reconnect_max_s", "reconnect_min_s")
        report.problem(place, "reconnect_max_s is less than reconnect_min_s", "swap them")
    if "password" in given and "user" not in given:
        given.problem("password", "is a password without a user", "set user too")
    _client_id(given)
    if len(report.problems) > before:
        return None
    _warn(given, tls, report)
    return Broker(tls=Tls(**tls.values), **given.values)


def _scheme(given: Given, tls: Given) -> None:
    """TLS is said by the scheme or by its table, and the port follows from that."""
    scheme = given.values.get("scheme") or ("mqtts" if tls.values else "mqtt")
    if tls.values and not SCHEMES[scheme].tls:
        tls.problem(next(iter(tls.raw)), f"is for TLS, and {scheme}:// has none", f"use {_secured(scheme)}://")
    given.values["scheme"] = scheme
    given.values.setdefault("port", SCHEMES[scheme].port)


def _secured(scheme: str) -> str:
    """The scheme that connects in the same way, with TLS."""
    websocket = SCHEMES[scheme].websocket
    return next(name for name, way in SCHEMES.items() if way.tls and way.websocket == websocket)


def _certificates(tls: Given) -> None:
    if "key" in tls and "cert" not in tls:
        tls.problem("key", "is a key without a certificate", "set cert too")
    for key, what in (("ca", "CERTIFICATE"), ("cert", "CERTIFICATE"), ("key", "PRIVATE KEY")):
        if key in tls and (found := pem.problem(tls[key], what)):
            tls.problem(key, *found)
    if "cert" in tls and "key" not in tls:  # then both are in one file
        path = tls["cert"]
        if pem.holds(path, "CERTIFICATE") and not pem.holds(path, "PRIVATE KEY"):
            tls.problem("cert", f"{path} has no key in it", "set key too")


def _client_id(given: Given) -> None:
    if given["client_id"] or given.is_wrong("client_id"):
        return
    if "clean_session" not in given:
        given.values["clean_session"] = True
        given.report.warn(
            "client_id is not set: the session is clean, and what is published while fastkin is away is lost;"
            " set client_id"
        )
    elif not given["clean_session"]:
        cure = "set client_id"
        given.problem("clean_session", "false needs a client id: the broker keeps the session under it", cure)
    # a blank id that was written down is wanted: the broker then draws one
    if "client_id" not in given:
        # Drawn by us and not by the broker: a name in the log, and an id that several connections of this process
        # share.
        given.values.update(client_id=f"fastkin-{os.urandom(6).hex()}", client_id_drawn=True)


def _warn(given: Given, tls: Given, report: Report) -> None:
    host, scheme = given["host"], given["scheme"]
    if given["password"] and not SCHEMES[scheme].tls and not is_loopback(host):
        report.warn(f"the broker's password goes unencrypted to {host}: use {_secured(scheme)}://")
    if not given["clean_session"] and given["session_expiry_s"] == 0:
        report.warn(
            "session_expiry_s = 0: a 5.0 broker forgets the session as soon as fastkin is away; set it to the"
            " seconds of your longest outage"
        )
    if tls["insecure_skip_verify"]:
        report.warn("insecure_skip_verify: any machine on the way can pretend to be the broker")


def _url(given: Given) -> None:
    """Takes the address apart into scheme, host, port, path, user and password."""
    raw = given.raw
    address = raw["url"]
    try:
        parts = _parts(urlsplit(str(given.values.pop("url"))))
    except _AddressError as error:
        given.problem("url", error.problem, error.cure)
        return
    except ValueError:  # its text may hold a part of the password
        cure = "mqtts://host:8883; in user and password, write / as %2F and @ as %40"
        given.problem("url", "is not an address", cure)
        return
    for key, part in parts.items():
        if key in raw and raw[key].text and not address.text:
            continue  # the environment wins over the file, also over a part of its address
        if key in given and given[key] != part:
            given.problem(key, f"the address says another {key}", "keep one of them")
        # The part stands under its own key from here on, with the address as its place: rules need not know where it
        # came from.
        raw.setdefault(key, address)
        given.take(key, Value(part, address.place))


class _AddressError(Exception):
    def __init__(self, problem: str, cure: str = _EXAMPLE) -> None:
        super().__init__(problem)
        self.problem = problem
        self.cure = cure


def _parts(url: SplitResult) -> dict[str, Any]:
    """What an address says, by key; _AddressError or ValueError: it cannot be the one of a broker."""
    port = url.port  # first: a secret with a / in it ends here, before any part of it is taken for a path
    scheme = _ALIASES.get(url.scheme, url.scheme)
    if scheme not in SCHEMES:
        problem = f"{url.scheme!r} is not a way to connect" if url.scheme else "has no scheme"
        raise _AddressError(problem, "use mqtt://, mqtts://, ws:// or wss://")
    if not url.hostname:
        raise _AddressError("names no host")
    if not is_host(url.hostname):
        raise _AddressError(f"{url.hostname!r} is no name of a host")
    path = "" if url.path == "/" else url.path
    if url.query or url.fragment or (path and not SCHEMES[scheme].websocket):
        raise _AddressError("says more than host and port")
    found = {"scheme": scheme, "host": url.hostname, "port": port, "path": path or None}
    found |= {"user": unquote(url.username or "") or None, "password": unquote(url.password or "") or None}
    return {key: part for key, part in found.items() if part is not None}
