"""Names and addresses of hosts, as far as their letters tell: nothing is looked up."""

from __future__ import annotations

from urllib.parse import urlsplit


def is_host(name: str | None) -> bool:
    """Could this be the name or address of a host?"""
    try:
        return bool(name) and bool(name.encode("idna"))  # type: ignore[union-attr]
    except UnicodeError:
        return False


def is_loopback(host: str) -> bool:
    """Does what is sent there stay on this machine?"""
    return host in {"localhost", "::1"} or host.startswith("127.")


def is_endpoint(text: str) -> bool:
    """An http or https address of a service: no user and password, nothing behind the path."""
    try:
        url = urlsplit(text)
        good = url.scheme in {"http", "https"} and is_host(url.hostname) and url.port != 0
    except ValueError:
        return False
    return good and "@" not in url.netloc and not url.query and not url.fragment
