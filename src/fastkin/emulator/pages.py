"""The heads of answers, as AWS sends them, and pages that are no answer of an operation."""

from __future__ import annotations

import uuid
from email.utils import formatdate
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

REASONS: Final[Mapping[int, str]] = {
    200: "OK",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    413: "Request Entity Too Large",
    500: "Internal Server Error",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


class Pages:
    """Of one emulator. The date is formatted once a second, and not for each call."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._date = (0, b"")
        self._request_prefix = str(uuid.uuid4())[:24]

    def head(self, status: int, form: str, length: int, number: int, error: str | None = None) -> bytes:
        """Of the answer to call `number`."""
        # What AWS sends, in its order; the error type stands in the head as well.
        request_id = self.request_id(number)
        kind = f"x-amzn-ErrorType: {error}\r\n" if error is not None else ""
        return (
            f"HTTP/1.1 {status} {REASONS.get(status, 'Error')}\r\n"
            f"x-amzn-RequestId: {request_id}\r\nx-amz-id-2: {request_id}\r\n{kind}"
            f"Date: {self._today()}\r\nContent-Type: {form}\r\nContent-Length: {length}\r\n\r\n"
        ).encode()

    def request_id(self, number: int) -> str:
        """Of call `number`; STS repeats it in its answers."""
        return f"{self._request_prefix}{number:012x}"

    def _today(self) -> str:
        now = int(self._wall())
        if self._date[0] != now:
            self._date = (now, formatdate(now, usegmt=True).encode())
        return self._date[1].decode()

    def html(self, status: int) -> tuple[bytes, bytes]:
        return self.page(status, f"<html><body><b>Http/1.1 {REASONS.get(status, 'Error')}</b></body></html>\n")

    def page(self, status: int, text: str, form: str = "text/html") -> tuple[bytes, bytes]:
        body = text.encode()
        head = (
            f"HTTP/1.1 {status} {REASONS.get(status, 'Error')}\r\nDate: {self._today()}\r\n"
            f"Content-Type: {form}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode(), body
