"""The signals of `fastkin run`, and its end, whatever the event loop and the disks do.

The loop itself may be stuck, in a write to a terminal or a pipe that nobody reads or in a call of the system that
never returns. So the signals are read by a thread, from the descriptor that Python writes their numbers to; the
thread hands them to the loop, and when the loop does not do what they ask for, it does so itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable

log: logging.Logger = logging.getLogger("fastkin.run")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# `shutdown_timeout_s` and two seconds are promised: these are for what the engine does after its own deadline,
# for the loop to end the process after a second signal, and for the last line to be written
_GRACE_S = 1.4
_AT_ONCE_S = 0.4
_WORDS_S = 0.4


class Watch:
    """`with Watch() as watch:` around the event loop, in the main thread; start() when the loop runs."""

    def __init__(self) -> None:
        self._limit: Callable[[], float] = _none
        self._last_words: Callable[[], int] = _failure
        self._code: int | None = None
        self._tell: Callable[[signal.Signals], object] | None = None
        self._lock = threading.Lock()
        self._asked = False
        self._end_at: float | None = None
        self._why = ""
        self._ending = False
        self._closed = False
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._before: dict[signal.Signals, Any] = {}
        self._thread = threading.Thread(target=self._work, name="fastkin signals", daemon=True)

    def __enter__(self) -> Self:
        # Kept back until start(): there is nobody yet to hear of them, and a signal that only a handler saw is lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for number in SIGNALS:
            # the handler is there for Python to catch the signal at all
            self._before[number] = signal.signal(number, _nothing)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._tell is not None:
            signal.set_wakeup_fd(-1)  # the one before was the loop's, which is closed
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # while they still have a handler that does no harm
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._closed = True
        self._poke()
        self._thread.join(1.0)
        self._read.close()
        self._write.close()

    def start(
        self,
        tell: Callable[[signal.Signals], object],
        limit: Callable[[], float],
        last_words: Callable[[], int],
    ) -> None:
        """From a coroutine: both uvloop and asyncio set the descriptor for themselves when a loop begins to run.

        `tell(number)` is called in the watch's thread. `limit()`: seconds that storing what is held may take.
        `last_words()` logs what became of the records and gives the exit code; it must do without the loop.
        """
        self._limit, self._last_words, self._tell = limit, last_words, tell
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # what came meanwhile comes now

    def stop_within(self, seconds: float) -> None:
        """The process is to be gone by then, and the grace after it."""
        self._set_end(seconds + _GRACE_S, f"not stopped within {seconds:g} s, something does not return: ends at once")

    def finished(self, code: int) -> None:
        """The last words were said; what is left is to close the loop."""
        self._code = code
        self.stop_within(0.0)

    def end(self, why: str, words_s: float = 1.0) -> None:
        """Log `why` and the last words, and end the process now. Never returns, and needs nobody's help."""
        with self._lock:
            again, self._ending = self._ending, True
        code = 1 if self._code is None else self._code

        def words() -> None:
            nonlocal code
            if self._code is None:
                log.warning("%s", why)
                code = self._last_words()
            flush()

        if not again:  # else the one who began hangs in it
            # In a thread with a limit: to write the last line may hang as well, when the log goes to a pipe that
            # nobody reads.
            thread = threading.Thread(target=words, name="fastkin last words", daemon=True)
            thread.start()
            thread.join(words_s)
        # Not sys.exit(): that would wait for threads, and one of them is why we are here.
        os._exit(code)

    # -- the thread ------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._closed:
            left = None if self._end_at is None else max(0.001, self._end_at - time.monotonic())
            self._read.settimeout(left)
            try:
                # Python's own C handler writes the number of each signal: that needs neither the loop nor the
                # interpreter's lock.
                numbers = self._read.recv(64)
            except TimeoutError:
                if self._end_at is not None and time.monotonic() >= self._end_at:
                    self.end(self._why, _WORDS_S)
                continue
            except OSError:
                return
            for number in numbers:
                if number:
                    self._got(signal.Signals(number))

    def _got(self, number: signal.Signals) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            if self._asked:
                self._set_end(_AT_ONCE_S, f"{number.name}: stops at once")
            else:
                self._asked = True
                self.stop_within(self._limit())
        assert self._tell is not None  # signals come from start() on
        with contextlib.suppress(RuntimeError):  # the loop was closed
            self._tell(number)

    def _set_end(self, seconds: float, why: str) -> None:
        at = time.monotonic() + seconds
        if self._end_at is None or at < self._end_at:
            self._end_at, self._why = at, why
            if threading.current_thread() is not self._thread:
                self._poke()

    def _poke(self) -> None:
        with contextlib.suppress(OSError):
            self._write.send(b"\0")


def hold_hangup() -> None:
    """Keep a SIGHUP back from now on: until a `Watch` is there it would end the process. start() lets it go."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP,))


def flush() -> None:
    """What was logged and printed leaves now."""
    with contextlib.suppress(Exception):
        logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _nothing(*_: object) -> None:
    pass


def _none() -> float:
    return 0.0


def _failure() -> int:
    return 1
