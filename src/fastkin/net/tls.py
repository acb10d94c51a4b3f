"""TLS to Kinesis and to brokers: contexts that are the same on every Python, files that are renewed, and the cure for
a certificate that was refused.
"""

from __future__ import annotations

import os
import ssl
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from fastkin.errors import printable

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Hashable, Iterable

Stamp = tuple[tuple[str, int, int, int] | tuple[str], ...]

# X509_V_ERR_...: the numbers of OpenSSL's x509_vfy.h, which are part of its interface
# no issuer found, one of that name with another key, none for the server's own, chain of one, not trusted
_NO_ISSUER = frozenset({2, 7, 20, 21, 27})
_SELF_SIGNED = frozenset({18, 19})
_NOT_YET, _EXPIRED = 9, 10
_PURPOSE = 26
_NAME = frozenset({62, 64})  # host name, address


def client_context(authorities: str | None = None) -> ssl.SSLContext:
    """TLS 1.2 or newer with verification, by the system's authorities or those of one file.

    The flags are set here and not left to the version of Python: 3.13 made verification strict, which refuses private
    authorities without a key usage, and took any certificate of the file for an anchor. Botocore is not strict.
    """
    context = ssl.create_default_context(cafile=authorities)
    context.verify_flags = (context.verify_flags | ssl.VERIFY_X509_PARTIAL_CHAIN) & ~ssl.VERIFY_X509_STRICT
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def why_refused(error: ssl.SSLCertVerificationError, peer: str, setting: str, authorities: str | None) -> str:
    """Why a peer's certificate was refused, and the cure that fits. `setting`: what names the authorities' file."""
    code = error.verify_code
    said = error.verify_message or str(error)
    if code in _NAME:
        return f"the certificate of {peer} is for another name: {said}; connect by a name that it holds"
    if code == _EXPIRED:
        return (
            f"the certificate of {peer}, or of its authority, has expired ({said}); renew it, or set this clock right"
        )
    if code == _NOT_YET:
        return (
            f"the certificate of {peer}, or of its authority, is not valid yet ({said}); is this machine's clock right?"
        )
    if code == _PURPOSE:
        return f"the certificate of {peer} is not one for servers ({said}); its extended key usage must allow that"
    if code in _NO_ISSUER or code in _SELF_SIGNED:
        if authorities:
            return (
                f"the certificate of {peer} is not trusted: {said}; {setting} is {authorities}, which does not hold the"
                " authority that signed it"
            )
        return (
            f"the certificate of {peer} is not trusted: {said}; set {setting} to the file of the authority it is from"
        )
    return f"the certificate of {peer} was refused: {said}"


def stamp(files: Iterable[str | None]) -> Stamp:
    """What changes when one of these files is written again or replaced."""
    found: list[tuple[str, int, int, int] | tuple[str]] = []
    for path in files:
        if path:
            try:
                told = os.stat(path)  # noqa: PTH116 - a path may be any text that a setting holds
            # A file that is not there is a state as well: that it comes back is a change.
            except (OSError, ValueError):
                found.append((path,))
            else:
                # The inode too: a file that was replaced by a rename may have the size and the time of the one
                # before.
                found.append((path, told.st_mtime_ns, told.st_size, told.st_ino))
    return tuple(found)


# A context holds every authority that it trusts: 0.7 MB with those of a system. Pipelines of one service say the same
# of broker and Kinesis, so one context serves them all, as long as one of them needs it.
_contexts: WeakValueDictionary[Hashable, ssl.SSLContext] = WeakValueDictionary()


class Renewed:
    """A context that follows its files: looked at when a connection is made.

    Files that cannot be read now, as half-written ones, leave the former context in place, with one WARNING; they are
    read again when they change again. `make` raises what the files deserve.
    """

    def __init__(
        self,
        make: Callable[[], ssl.SSLContext],
        files: Iterable[str | None],
        log: logging.Logger,
        said: Hashable,
    ) -> None:
        """`said`: all that the context is made from besides its files. What says the same has the same context."""
        self._make = make
        self._said = said
        self._files = tuple(one for one in files if one)
        self._log = log
        self._stamp = stamp(self._files)  # before they are read: what is written meanwhile is a change
        self._context = self._shared()

    def _shared(self) -> ssl.SSLContext:
        key = (self._said, self._stamp)
        context = _contexts.get(key)
        if context is None:
            context = _contexts[key] = self._make()
        return context

    def context(self) -> ssl.SSLContext:
        """The context for a new connection. Raises nothing."""
        now = stamp(self._files)
        if now != self._stamp:
            # Also when reading fails below: a file that is wrong is told once, and read again when it changes once
            # more.
            self._stamp = now
            names = ", ".join(self._files)
            try:
                self._context = self._shared()
            except Exception as error:  # noqa: BLE001 - whatever the files hold, there is a context that worked
                self._log.warning(
                    "TLS files have changed and cannot be used, going on with what they were: %s", printable(str(error))
                )
            else:
                self._log.info("TLS files have changed and were read again: %s", printable(names))
        return self._context


def system_files() -> tuple[str | None, ...]:
    """Where the system keeps its authorities, as a file."""
    paths = ssl.get_default_verify_paths()
    return (paths.cafile,)
