"""Reads the answer of an HTTP/1.1 call, piece by piece, and says when it is whole.

The parser, httptools, cannot be left alone with this. It is lenient where two readers of the same bytes may differ, and
it has no limits. So an answer whose end is open to opinion is refused here (two lengths, two kinds of length,
compression), and so is one that costs more memory or time than an answer may.

A byte behind an answer ends the connection, though the answer stands. On a kept connection that byte would be taken for
the beginning of the next call's answer. Records would then be settled by an answer that is not theirs: acknowledged,
and not stored.

No socket and no loop is known here. The connection feeds bytes, and ends itself when `feed` says that more came than
was asked for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

MAX_ANSWER = 16 * 1024 * 1024  # of any call: GetRecords ends at 14 MB
PUT_ANSWER = 1024 * 1024  # of PutRecords: an answer to 500 records is 56 KB, 150 KB when all of them failed
MAX_HEADERS = 64 * 1024  # as h11 and node allow 16 to 80 KB
MAX_HEADER_COUNT = 256
# An answer may cost so many bytes of framing (chunk sizes, extensions, trailers) for each byte of its body, and
# MAX_HEADERS besides: a body sent byte by byte needs five.
FRAMING_PER_BYTE = 8


class Reply(NamedTuple):
    """An answer, whole. Header names are in lower case; the last of several equal ones counts."""

    status: int
    headers: dict[str, str]
    body: bytes


class RefusedAnswerError(Exception):
    """The answer is not taken; `code` is that of the TransportError to raise."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


class Answer:
    """The answer of one call at a time.

    Its `on_...` methods are called by the parser within `feed`. What they raise comes out of the parser as the context
    of an HttpParserError.
    """

    def __init__(self) -> None:
        self._parser: Any = None  # HttpResponseParser, while connected
        self.reply: Reply | None = None  # once it is whole
        self.last: bool = False  # whole, and it ends its connection all the same
        self.begun: bool = False  # a byte of it has come
        self.wire_bytes: int = 0  # of this answer, early hints and framing included
        self._excess = False  # a second answer came behind the first
        self._max_body = MAX_ANSWER
        self._status = 0
        self._headers: dict[str, str] = {}
        self._header_count = 0
        self._head_done = False
        # The body: one piece is handed on as it came, more are joined as they come.
        self._piece = b""
        self._joined: bytearray | None = None
        self.received: int = 0
        self._expected = -1  # bytes of the body, where the head says so
        self._until_close = False
        self._last_of_all = False

    # -- for the connection

    def open(self) -> None:
        """The connection is there."""
        self._parser = HttpResponseParser(self)

    def close(self) -> None:
        """The connection is gone. The parser holds our methods: without this each connection would be a cycle."""
        self._parser = None

    def start(self, max_body: int) -> None:
        """A request is about to be written."""
        self.reply = None
        self.last = self.begun = self._excess = self._head_done = False
        self._max_body = max_body
        self.wire_bytes = self.received = 0
        self._expected = -1

    def feed(self, data: bytes) -> bool:
        """Take one read. True: more came than the answer, so its connection is of no more use.

        RefusedAnswerError: this is no answer to take. An answer that was whole before the fault stands: `reply` has it.
        """
        if not self.begun and data[0] != _H:
            self.begun = True
            # the parser passes over blank lines, and knows RTSP
            raise RefusedAnswerError("BadAnswer", "the answer is not HTTP/1.1")
        self.begun = True
        try:
            if self._parse(data) or self._excess:
                return True
        except HttpParserUpgrade:
            if self.reply is not None:
                return True
            raise RefusedAnswerError("BadAnswer", "the server wants to change the protocol") from None
        except HttpParserError as error:
            if self.reply is not None:
                return True
            if isinstance(cause := error.__context__, RefusedAnswerError):
                raise cause from None
            raise RefusedAnswerError("BadAnswer", f"the answer is not HTTP/1.1: {error}") from None
        self.wire_bytes += len(data)
        if self.wire_bytes - self.received > MAX_HEADERS + FRAMING_PER_BYTE * self.received and self.reply is None:
            what = "chunk framing and trailers" if self._head_done else "headers"
            raise RefusedAnswerError("AnswerTooLarge", f"{what} of more than {MAX_HEADERS} bytes")
        return False

    def end(self) -> Reply | None:
        """The other side has closed. The answer, if that is how it says that it is whole."""
        if not (self._until_close and self._head_done):
            return None
        return self._finish(last=True)

    def _parse(self, data: bytes) -> bool:
        """Give one read to the parser. True: the answer was whole before the read ended.

        The parser would not tell: it takes what is behind an answer for another one, skips it when it is a blank line,
        or fails. So where a Content-Length says how much is to come, it gets no more than that; elsewhere it gets all
        but the last byte first, at the cost of a copy.
        """
        feed = self._parser.feed_data
        view = memoryview(data)
        at = 0
        if not self.wire_bytes and (at := _head_end(data)):
            feed(view[:at])
        if self.reply is None and self._expected >= 0:
            left = self._expected - self.received
            feed(view[at : at + left])
            return len(data) - at > left
        if self.reply is None and at < len(data):
            feed(view[at:-1])
            if self.reply is None:
                feed(view[-1:])
                return False
        return self.reply is not None and at < len(data)

    # -- what the parser tells us

    def on_message_begin(self) -> None:
        self._status = 0
        self._headers = {}
        self._header_count = 0
        self._head_done = False
        self._piece = b""
        self._joined = None
        self.received = 0
        self._expected = -1
        self._until_close = False
        self._last_of_all = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_count += 1
        if self._header_count > MAX_HEADER_COUNT:
            raise RefusedAnswerError("AnswerTooLarge", f"more than {MAX_HEADER_COUNT} headers")
        if self._head_done:  # a trailer is none of ours
            return
        key = name.decode("latin-1").lower()
        if key in _FRAMING and key in self._headers:
            raise RefusedAnswerError("BadAnswer", f"two headers {key}")
        self._headers[key] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._status = status = self._parser.get_status_code()
        headers = self._headers
        if not 100 <= status < 600:
            raise RefusedAnswerError("BadAnswer", f"a status of {status}")
        self._head_done = status >= 200
        if not self._head_done:
            if not _FRAMING.isdisjoint(headers):
                raise RefusedAnswerError("BadAnswer", f"an answer {status} with a body")
            return
        version = self._parser.get_http_version()
        if version not in {"1.1", "1.0"}:
            raise RefusedAnswerError("BadAnswer", f"the answer is HTTP/{version}")
        self._last_of_all = version == "1.0"
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding not in {"identity", ""}:
            # never asked for, and never unpacked: a few bytes may become gigabytes
            raise RefusedAnswerError(
                "BadAnswer", f"the answer is compressed ({encoding[:40]!a}), which was not asked for"
            )
        length = headers.get("content-length")
        transfer = headers.get("transfer-encoding")
        if transfer is not None:
            # where such an answer ends is a matter of opinion: two readers of it may differ
            if transfer.strip().lower() != "chunked" or length is not None or version == "1.0":
                raise RefusedAnswerError(
                    "BadAnswer", "the length of the answer is told in two ways, or in none we know"
                )
        elif length is not None:
            digits = length.strip()
            if not (digits.isascii() and digits.isdigit()):
                raise RefusedAnswerError("BadAnswer", f"a content-length of {length[:24]!a}")
            if len(digits) > 18 or int(digits) > self._max_body:
                raise RefusedAnswerError(
                    "AnswerTooLarge", f"an answer of {digits[:24]} bytes, more than {self._max_body}"
                )
            if self._head_done:
                self._expected = int(digits)
        else:
            self._until_close = status not in {204, 304}
        if status in {204, 304} and (transfer is not None or (length or "0") != "0"):
            self._last_of_all = True  # there is no body, whatever it says; some servers send it

    def on_body(self, data: bytes) -> None:
        self.received += len(data)
        if self.received > self._max_body:
            raise RefusedAnswerError("AnswerTooLarge", f"an answer of more than {self._max_body} bytes")
        if self._joined is not None:
            self._joined += data
        elif self._piece:
            # Not a list of pieces: two bytes in a chunk would cost fifty. Nor bytes that grow: each one more would copy
            # all that came before it.
            self._joined = bytearray(self._piece)
            self._joined += data
        else:
            self._piece = data

    def on_message_complete(self) -> None:
        if self._status < 200:  # 100 Continue, 103 Early Hints: the answer is still to come
            self._head_done = False
            return
        if self.reply is not None:
            self._excess = True  # two answers to one request
            return
        self._finish(last=self._until_close or self._last_of_all or not self._parser.should_keep_alive())

    def _finish(self, *, last: bool) -> Reply:
        body = self._piece if self._joined is None else bytes(self._joined)
        self.reply = reply = Reply(self._status, self._headers, body)
        self.last = last
        self._piece = b""
        self._joined = None
        return reply


def _head_end(data: bytes) -> int:
    """Where the head of an answer ends, if all of it is here and its lines end as the standard says; else 0."""
    at = data.find(b"\n\r\n")
    if at < 1 or data[at - 1] != _CR or data.find(b"\n\n", 0, at) >= 0:
        return 0
    return at + 3


_CR = ord("\r")
_H = ord("H")
_FRAMING = frozenset({"content-length", "transfer-encoding"})
