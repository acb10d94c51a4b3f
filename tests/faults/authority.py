"""Certificates that a server shows, good ones and bad ones."""

from __future__ import annotations

import datetime
import ssl
from typing import TYPE_CHECKING, Any

import trustme

if TYPE_CHECKING:
    from pathlib import Path

YESTERDAY = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)


class Authority:
    """Issues certificates, and changes what a server shows from one connection to the next."""

    def __init__(self, directory: Path) -> None:
        self.ca = trustme.CA()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.path = directory / "ca.pem"
        self.ca.cert_pem.write_to_path(str(self.path))

    def show(self, *names: str, ca: trustme.CA | None = None, **options: Any) -> None:
        (ca or self.ca).issue_cert(*names, **options).configure_cert(self.context)
