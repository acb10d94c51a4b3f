"""What went wrong between a broker and us, in words for a log.

A peer chooses much of what is said here: reason strings, certificates, names. So its words are escaped, cut and rid of
our password before they go anywhere.
"""

from __future__ import annotations

import errno
import socket
import ssl
from typing import TYPE_CHECKING

from fastkin.errors import MqttError, RefusedError, masked, printable
from fastkin.mqtt._core import reason_text
from fastkin.mqtt.reasons import with_cure

if TYPE_CHECKING:
    from fastkin.mqtt._core import Connack, Disconnect

_SAID_MOST = 200  # characters of what a broker says for people: a reason may be 64 KiB

_ERRNO_WORDS = {
    errno.ECONNREFUSED: "connection refused: nothing listens on that port",
    errno.ECONNRESET: "the broker reset the connection",
    errno.EPIPE: "the broker has closed the connection",
    errno.EHOSTUNREACH: "no route to the host",
    errno.ENETUNREACH: "the network is unreachable",
    errno.ETIMEDOUT: "the network gave up: nothing came back from the host",
}

# parts of OpenSSL's reasons
_TLS_WORDS = (
    ("WRONG_VERSION_NUMBER", "that port does not speak TLS"),
    ("CERTIFICATE_REQUIRED", "the broker wants a client certificate: set cert and key"),
    ("HANDSHAKE_FAILURE", "the broker refused the handshake: it may want a client certificate"),
    ("UNKNOWN_CA", "the broker does not trust our client certificate"),
    ("BAD_CERTIFICATE", "the broker does not take our client certificate"),
    ("CERTIFICATE_EXPIRED", "the broker says that our client certificate has expired"),
    ("CERTIFICATE_REVOKED", "the broker says that our client certificate is revoked"),
    ("NO_APPLICATION_PROTOCOL", "the broker takes none of our ALPN protocols"),
    ("PROTOCOL_VERSION", "no TLS version in common: fastkin asks for 1.2 or newer"),
    ("UNSUPPORTED_PROTOCOL", "no TLS version in common: fastkin asks for 1.2 or newer"),
)


def tls_words(error: BaseException) -> str:
    """What OpenSSL means."""
    reason = getattr(error, "reason", None) or ""
    for part, words in _TLS_WORDS:
        if part in reason:
            return words
    return reason.replace("_", " ").lower() or str(error) or type(error).__name__


def explain(error: BaseException) -> str:
    """Why there is no connection, or why it ended, for the log: fit for it, whatever the peer put into it."""
    return printable(_explain(error))


def _explain(error: BaseException) -> str:
    if isinstance(error, MqttError):
        return str(error)
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {tls_words(error)}"
    if isinstance(error, socket.gaierror):
        return f"the host name cannot be resolved ({error.strerror})"
    if isinstance(error, TimeoutError) and error.errno is None:
        return "no answer in time"
    if isinstance(error, OSError):
        if error.errno is None and str(error).count(f"[Errno {errno.ECONNREFUSED}]") > 1:
            return _ERRNO_WORDS[errno.ECONNREFUSED]  # asyncio's summary of several addresses
        if error.errno in _ERRNO_WORDS:
            return _ERRNO_WORDS[error.errno]
        return error.strerror or str(error) or type(error).__name__
    return str(error) or type(error).__name__


def of_tls(error: BaseException) -> bool:
    """TLS said no: a certificate, a version, an alert. It does not get well by itself, unlike a peer that went away."""
    why = error.__context__ if isinstance(error, MqttError) else error  # told in words of ours
    return isinstance(why, ssl.SSLError) and not isinstance(why, ssl.SSLEOFError | ssl.SSLZeroReturnError)


def refusal(connack: Connack, secret: str | None = None) -> RefusedError:
    """A CONNACK that says no. `secret` is cut out of what the broker adds, should it repeat it."""
    return RefusedError(
        f"the broker refused the connection: {reason_text(connack.code)}{_told(connack.properties, secret)}",
        connack.code,
    )


def farewell(disconnect: Disconnect, secret: str | None = None) -> str:
    """A DISCONNECT of the broker, in words."""
    why = with_cure(disconnect.code) if disconnect.code else "no reason given"
    return f"the broker ended the connection: {why}{_told(disconnect.properties, secret)}"


def _told(properties: dict[str, object], secret: str | None) -> str:
    """What the broker added for people; escaped and cut, since it goes to a log."""
    told = ""
    if text := properties.get("reason_string"):
        told += f"; it says {said(text, secret)}"
    if server := properties.get("server_reference"):
        told += f"; it names {said(server, secret)} instead"
    return told


def said(text: object, secret: str | None = None) -> str:
    """A peer's words for a log line: quoted, escaped, not too long."""
    words = masked(str(text), (secret,))
    return ascii(words) if len(words) <= _SAID_MOST else f"{words[:_SAID_MOST]!a} (and {len(words) - _SAID_MOST} more)"
