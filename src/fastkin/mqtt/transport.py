"""A byte stream to a broker: TCP, TLS or WebSocket, and the certificates for it.

A TCP or TLS wire is asyncio's own transport. A WebSocket wire has the same face (`websocket.py`), so that a connection
need not know what it is on. What can go wrong on the way is put into words in `words.py`.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import TYPE_CHECKING, Any, Protocol

from fastkin.errors import ConfigError, MqttError
from fastkin.mqtt.websocket import open_websocket
from fastkin.mqtt.words import tls_words
from fastkin.net import tcp
from fastkin.net.dial import avoid, dial
from fastkin.net.tls import Renewed, client_context, system_files, why_refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastkin.config import Broker

_LOG = logging.getLogger("fastkin.subscriber")

GONE_S = 1.0  # for an event loop to say that a connection is gone that was aborted


class Wire(Protocol):
    """What a connection writes to, and where it stops and restarts reading."""

    def write(self, data: bytes, /) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def get_write_buffer_size(self) -> int: ...
    def is_closing(self) -> bool: ...
    def close(self) -> None: ...  # writes what waits, then closes
    def abort(self) -> None: ...
    def get_extra_info(self, name: str, default: Any = None) -> Any: ...


class Receiver(asyncio.BufferedProtocol):
    """What a wire calls. connection_made() comes before open_wire() returns, connection_lost() once at the end."""

    def data_received(self, data: bytes | memoryview) -> None:
        """Bytes that did not come through get_buffer(): a WebSocket message."""
        raise NotImplementedError


async def open_wire(broker: Broker, receiver: Receiver, tls: Renewed | None) -> None:
    """Connect. Raises OSError (ssl.SSLError too) or MqttError; the caller bounds the time.

    `receiver` is connected from here on, by its connection_made(). When this raises it has heard nothing, and will not.
    """
    try:
        await _open(broker, receiver, tls.context() if tls is not None else None)
    except UnicodeError:
        raise OSError(f"{broker.host!r} is no name of a host") from None
    except ssl.SSLCertVerificationError as error:
        why = why_refused(error, f"{broker.host}:{broker.port}", "ca", broker.tls.ca)
        raise MqttError(f"TLS failed: {why}") from None


def blame(wire: Wire) -> None:
    """The peer took the connection and never answered: other addresses of its name are tried before it for a while."""
    if (address := wire.get_extra_info("peername")) is not None:
        avoid(address)


def silence(wire: Wire) -> float:
    """Seconds since bytes came, whether anybody has read them or not; infinite where the system does not say."""
    return tcp.silence(wire.get_extra_info("socket"))


_HEARD_MOST = 6  # times the time-out: a peer that trickles is waited for, not for ever


async def while_heard(waited: asyncio.Future[Any], silence_s: float, heard_at: Callable[[], float]) -> None:
    """Wait for it as long as bytes come. TimeoutError when none came for `silence_s`."""
    loop = asyncio.get_running_loop()
    end = loop.time() + _HEARD_MOST * silence_s
    while not waited.done():
        left = min(heard_at() + silence_s, end) - loop.time()
        if left <= 0:
            raise TimeoutError
        await asyncio.wait([waited], timeout=left)
    waited.result()


async def _open(broker: Broker, receiver: Receiver, tls: ssl.SSLContext | None) -> None:
    if broker.websocket:
        wire = await open_websocket(broker, receiver, tls)
        receiver.connection_made(wire)  # type: ignore[arg-type]
        wire.start()
        return
    await dial(receiver, broker.host, broker.port, tls=tls)


def renewed_tls(broker: Broker) -> Renewed | None:
    """TLS that follows its files; None for a scheme without. ConfigError names the file that is wrong."""
    if not broker.secure:
        return None
    tls = broker.tls
    files = (tls.ca, tls.cert, tls.key) if tls.ca else (*system_files(), tls.cert, tls.key)
    return Renewed(lambda: _tls_context(broker), files, _LOG, broker.tls)


def tls_context(broker: Broker) -> ssl.SSLContext | None:
    """None for a scheme without TLS. ConfigError names the file that is wrong."""
    return _tls_context(broker) if broker.secure else None


def _tls_context(broker: Broker) -> ssl.SSLContext:
    tls = broker.tls
    try:
        context = client_context(tls.ca)
    except FileNotFoundError:
        raise ConfigError("broker tls ca", f"{tls.ca} does not exist") from None
    except OSError as error:
        raise ConfigError("broker tls ca", f"{tls.ca}: {tls_words(error)}", "give a PEM file") from None
    if tls.insecure_skip_verify:
        _LOG.warning(
            "stage=intake broker=%s THE BROKER'S CERTIFICATE IS NOT CHECKED (insecure_skip_verify): anybody on the way"
            " can read and change messages and learn the password",
            broker.url,
        )
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if tls.cert is not None:
        try:
            # An empty password, not none: OpenSSL would ask for one at the terminal.
            context.load_cert_chain(tls.cert, tls.key, tls.key_password or "")
        except FileNotFoundError:
            raise ConfigError("broker tls cert, key", f"{tls.cert} or {tls.key} does not exist") from None
        except OSError as error:
            cure = "are certificate and key PEM, do they belong together, is the key's password right?"
            raise ConfigError("broker tls cert, key", f"{tls.cert}, {tls.key}: {tls_words(error)}", cure) from None
    if tls.alpn:
        context.set_alpn_protocols(list(tls.alpn))
    return context


# -- words -------------------------------------------------------------------------------------
