"""How many messages a broker lets be unacknowledged, learned from how it sends.

A 3.1.1 broker does not say it, and a 5.0 broker may grant less than was asked for. The flusher must know: when the
window is exhausted nothing more will come before acknowledgements leave, so a batch that waits would wait in vain.
"""

from __future__ import annotations

MAX_WINDOW = 65_535


class Window:
    """How many unacknowledged messages the broker hands out: what was asked for, then what was seen.

    A window is exhausted when the broker falls silent and goes on as soon as acknowledgements leave. The
    same count seen like that three times in a row is the broker's window. More than the window proves
    the guess wrong: it is doubled, and learned anew. Pure: times come from outside.

    A slow source falls silent too, so silence alone says little. It counts when it was long compared with how messages
    came just before, or as long as a batch is held at all. And a guess is believed only while the broker
    presses, that is, has the next message at hand when acknowledgements leave: else nobody waits for us and there is
    no hurry. It is verified now and then by holding a batch although the guess says that no more will come.
    """

    # Chosen against brokers on one machine and across a network: shorter gaps lie between the packets of one burst.
    QUIET_S = 0.005
    # One silence may be chance. Three in a row with the same count, and each ended by acknowledgements, are not.
    AGREE = 3
    LONG = 4  # silence this many times as long as the gaps before it is no gap
    MOST_OF = 0.8  # of the linger
    # after a guess, and twice that after each time it held: a hold costs a linger at most
    VERIFY_S = 1.0
    VERIFY_LINGERS = 20
    VERIFY_DOUBLED = 8

    __slots__ = (
        "_acked_at",
        "_agreed",
        "_count",
        "_gap",
        "_held_at",
        "_hold_s",
        "_pressing",
        "_probe",
        "_received_at",
        "_sure",
        "_verify_at",
        "_verify_least_s",
        "_verify_s",
        "granted",
        "most",
        "round_trip_s",
    )

    def __init__(self, granted: int, most: int = MAX_WINDOW, *, linger_s: float = 0.0, sure: bool = False) -> None:
        """`linger_s`: how long a batch is held at most. `sure`: the broker was told not to go beyond `most`."""
        self.most: int = most
        self.granted: int = max(1, min(granted, most))
        self.round_trip_s: float = 0.0
        self._hold_s = max(self.QUIET_S, self.MOST_OF * linger_s)
        self._sure = sure
        self._pressing = True
        self._probe = 0  # what was unacknowledged when acknowledgements left after a silence
        self._acked_at: float | None = None  # when the first left since messages came
        self._received_at: float | None = None
        self._gap: float | None = None  # between reads that no acknowledgement lies between, the longest lately
        self._count = 0
        self._agreed = 0
        self._held_at: float | None = None  # since when a batch is held to verify the guess
        self._verify_least_s = max(self.VERIFY_S, self.VERIFY_LINGERS * linger_s)
        self._verify_s = self._verify_least_s
        self._verify_at: float | None = None

    def acknowledging(self, unacked: int, now: float, last_read: float) -> None:
        """Acknowledgements are about to leave."""
        if self._held_at is not None and now - self._held_at >= self._hold_s:
            # It was held for long enough, and no more came than the guess says.
            self._held_at = None
            self._verify_s = min(2 * self._verify_s, self.VERIFY_DOUBLED * self._verify_least_s)
            self._verify_at = now + self._verify_s
        if self._acked_at is not None:
            if now - self._acked_at <= self._at_once():
                return  # together with those before: the broker has not had the time to say what they are worth
            self._probe = 0
        else:
            self._acked_at = now
        if now - last_read > self._silence():
            self._probe = unacked

    def received(self, unacked: int, now: float) -> None:
        """Messages came; `unacked` counts them."""
        acked_at, self._acked_at = self._acked_at, None
        before, self._received_at = self._received_at, now
        probe, self._probe = self._probe, 0
        # More than the guess: it was wrong. Doubled at once, because a guess that is too small costs a call per
        # window.
        if unacked > self.granted:
            self.granted = min(self.most, max(2 * unacked, 1))
            self._agreed = 0
            self._held_at = None
        if acked_at is None:
            if before is not None:
                gap = now - before
                self._gap = gap if self._gap is None else max(gap, self._gap * 0.9)
            return
        self._pressing = now - acked_at <= self._at_once()
        if not self._pressing:
            self._agreed = 0  # they did not come because of the acknowledgements
            return
        if not probe:
            return
        self._agreed = self._agreed + 1 if probe == self._count else 1
        self._count = probe
        if self._agreed >= self.AGREE and probe < self.granted:
            self.granted = probe
            self._held_at = None
            self._verify_s = self._verify_least_s
            self._verify_at = now + self._verify_s

    def exhausted(self, unacked: int, now: float) -> bool:
        """Is everything here that the broker will hand out? Then to wait for more would be to wait for nothing."""
        if unacked < self.granted:
            return False
        if self._sure and self.granted == self.most:  # no guess, though mosquitto may go a little beyond it
            return True
        if not self._pressing:
            return False
        if self._verify_at is None:
            self._verify_at = now + self._verify_s
        if now < self._verify_at:
            return True
        if self._held_at is None:
            self._held_at = now
        return False

    def _at_once(self) -> float:
        return self.QUIET_S + 2 * self.round_trip_s

    def _silence(self) -> float:
        """What is longer is no gap between messages."""
        if self._gap is None:
            return self._hold_s
        return min(self._hold_s, max(self.QUIET_S, self.LONG * self._gap))
