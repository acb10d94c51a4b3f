"""What a subscriber says to the log of its connections, and to nobody else.

Each sentence names broker, client id and cure. A broker that is away for hours, or one that ends each connection, makes
the same thing happen again and again: all that can repeat goes through `Repeats`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from fastkin.mqtt.handshake import SHARED_QUIET_S
from fastkin.mqtt.subscriptions import SHARED, Refusal
from fastkin.mqtt.words import said
from fastkin.status.logs import Repeats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastkin.config import Broker
    from fastkin.mqtt._core import Connack

_LOG = logging.getLogger("fastkin.subscriber")
_FILTERS_SHOWN = 10
_EARLY_MOST = 3  # so many connections that die right after SUBSCRIBE are no accident
# A broker that is away for hours: so many lines of a kind, then one line a minute that counts the rest.
_TROUBLE_LINES = 5
_TROUBLE_S = 60.0
_TAKEN_OVER = 0x8E
# Broker and client id of each session that this process has had: a reload makes a new subscriber for an old session.
_SESSIONS: set[tuple[str, str]] = set()


class Reports:
    """Of one subscriber."""

    def __init__(self, broker: Broker, name: str | None, client_id: str) -> None:
        """`name`: of the pipeline. `client_id` is set anew when another one is used."""
        self._broker = broker
        # A host that logs in its own way gets pipeline and stage in the text, see status/logs.py.
        self.who: str = f"{f'pipeline={name} ' if name else ''}stage=intake broker={broker.url}"
        self.client_id = client_id
        self._lines = Repeats(_LOG, asyncio.get_running_loop().call_later, most=_TROUBLE_LINES, per_s=_TROUBLE_S)

    def close(self) -> None:
        self._lines.close()

    # -- the client id ---------------------------------------------------------------------------

    def no_client_id(self) -> None:
        _LOG.warning(
            "%s no client id is set: using %s for this process. The session, and what the broker keeps"
            " in it, cannot be taken up again after a restart; set a client id",
            self.who, self.client_id,
        )  # fmt: skip

    def given_client_id(self) -> None:
        _LOG.info("%s wants a client id: using %s", self.who, self.client_id)

    # -- connecting ------------------------------------------------------------------------------

    def waiting(self, delay_s: float) -> None:
        self._lines.say(logging.INFO, "again", "%s trying again in %.1f s", self.who, delay_s)

    def version_refused(self, version: int) -> None:
        """The broker said that it does not speak it."""
        self._lines.say(
            logging.INFO, "version", "%s does not take MQTT %s: trying %s", self.who, _told(version), _told(9 - version)
        )

    def version_unanswered(self, version: int) -> None:
        """The broker may not speak it."""
        self._lines.say(
            logging.INFO, "version guess", "%s did not answer MQTT %s: it may not speak it, trying %s",
            self.who, _told(version), _told(9 - version),
        )  # fmt: skip

    def cannot_connect(self, code: int | None, reason: str) -> None:
        """`code`: the broker's, None when it said nothing."""
        self._lines.say(
            logging.ERROR if code is not None else logging.WARNING, f"cannot connect {code}",
            "%s client=%s cannot connect: %s", self.who, ascii(self.client_id), reason,
        )  # fmt: skip

    def disconnected(self, reason: str) -> None:
        """As we wanted it."""
        _LOG.info("%s disconnected: %s", self.who, reason)

    def lost(self, lived_s: float, reason: str) -> None:
        self._lines.say(
            logging.WARNING, "lost",
            "%s client=%s connection lost after %.1f s: %s", self.who, ascii(self.client_id), lived_s, reason,
        )  # fmt: skip

    def lost_early(self, times: int, code: int) -> None:
        """The connection died soon after SUBSCRIBE, `times` in a row. Said once: the lines of each tell the rest."""
        if times != _EARLY_MOST or code == _TAKEN_OVER:
            return
        _LOG.error(
            "%s client=%s the connection was lost %d times in a row soon after subscribing: does the"
            " broker's policy allow these filters to this client, and does another client use the same client id?"
            " Going on with a growing delay",
            self.who, ascii(self.client_id), times,
        )  # fmt: skip

    # -- the session -----------------------------------------------------------------------------

    def connected(self, version: int, connack: Connack, *, asks_qos: bool) -> None:
        """The broker takes us. `asks_qos`: a filter asks for more than QoS 0."""
        broker = self._broker
        assigned = connack.properties.get("assigned_client_identifier")
        client = self.client_id or str(assigned or "")
        self._lines.say(
            logging.INFO, "connected", "%s client=%s connected (MQTT %s, %s)",
            self.who, said(client), _told(version), self._session_words(connack),
        )  # fmt: skip
        if connack.properties.get("maximum_qos") == 0 and asks_qos:
            self._lines.say(
                logging.WARNING, "maximum qos",
                "%s takes and gives QoS 0 only (Maximum QoS): a message that is on its way when a connection"
                " or fastkin ends is lost, whatever qos is set",
                self.who,
            )  # fmt: skip
        mine = (broker.url, self.client_id)
        if broker.clean_session:
            _SESSIONS.discard(mine)
            return
        if mine in _SESSIONS and not connack.session_present:
            self._lines.say(
                logging.WARNING, "session lost",
                "%s client=%s the broker has lost our session: what was published meanwhile is lost. It does"
                " not keep sessions over its restarts, they expire (session_expiry_s), or another client ended it",
                self.who, said(client),
            )  # fmt: skip
        _SESSIONS.add(mine)
        expiry = connack.properties.get("session_expiry_interval")
        if isinstance(expiry, int) and expiry < broker.session_expiry_s:
            self._lines.say(
                logging.WARNING, "session expiry",
                "%s keeps our session for %d s only, %d were asked for", self.who, expiry, broker.session_expiry_s,
            )  # fmt: skip

    def _session_words(self, connack: Connack) -> str:
        if connack.session_present:
            return "the broker has our session"
        if self._broker.clean_session:
            return "a clean session"
        if (self._broker.url, self.client_id) in _SESSIONS:
            return "a new session, ours is lost"
        if not self._broker.client_id:
            return "a new session"  # of a client id that is new as well
        return "a new session: if this client id had one, the broker has lost it and what it held"

    # -- subscriptions ---------------------------------------------------------------------------

    def refused(self, refusal: Refusal) -> None:
        """The broker does not give a filter."""
        again = "Not asked for" if refusal.final else f"Asking again in {self._broker.reconnect_max_s:.0f} s"
        self._lines.say(
            logging.ERROR, f"refused {refusal.topic_filter}",
            "%s client=%s filter=%s subscription with QoS %d refused: %s%s. %s",
            self.who, ascii(self.client_id), ascii(refusal.topic_filter), refusal.qos,
            refusal.why, refusal.cure and f"; {refusal.cure}", again,
        )  # fmt: skip

    def subscribed(self, version: int, granted: Sequence[tuple[str, int]], asked: Sequence[tuple[str, int]]) -> None:
        """Filters and QoS that the broker granted, and those of all filters that were asked for."""
        wanted = dict(asked)
        for topic_filter, qos in granted:
            if qos < wanted.get(topic_filter, 0):
                self._lines.say(
                    logging.WARNING, "granted", "%s filter=%s QoS %d was asked for and %d granted%s",
                    self.who, ascii(topic_filter), wanted[topic_filter], qos,
                    ": messages may be lost" if qos == 0 else "",
                )  # fmt: skip
        if granted:
            shown = ", ".join(f"{topic!a} QoS {qos}" for topic, qos in granted[:_FILTERS_SHOWN])
            if version == 4 and any(topic.startswith(SHARED) for topic, _ in granted):
                shown += " (MQTT 3.1.1 cannot tell whether the broker knows $share)"
            more = f" and {len(granted) - _FILTERS_SHOWN} more" if len(granted) > _FILTERS_SHOWN else ""
            self._lines.say(logging.INFO, "subscribed", "%s subscribed %s%s", self.who, shown, more)

    def kept(self, topic_filter: str, why: str) -> None:
        """The broker did not unsubscribe the filter."""
        self._lines.say(
            logging.WARNING, "kept",
            "%s client=%s filter=%s cannot be unsubscribed: %s. The broker goes on sending what it matches,"
            " and it is thrown away; asked again at the next connection",
            self.who, ascii(self.client_id), ascii(topic_filter), why,
        )  # fmt: skip

    def late_suback(self, waited_s: float) -> None:
        """Other packets come, and no SUBACK."""
        self._lines.say(
            logging.WARNING, "late",
            "%s client=%s no SUBACK after %.0f s, though other packets come: they are taken, and the filters"
            " count as not subscribed until the broker answers",
            self.who, ascii(self.client_id), waited_s,
        )  # fmt: skip

    def quiet_shared(self, filters: Sequence[str]) -> None:
        """They brought nothing for SHARED_QUIET_S."""
        self._lines.say(
            logging.WARNING, "quiet",
            "%s client=%s nothing came for %.0f s. The shared subscription %s was granted over MQTT 3.1.1,"
            " where a broker that does not know $share takes it for a plain topic: if messages are published there, set"
            " the filter without $share/GROUP/ (and let one fastkin alone subscribe it), or protocol = \"5\"",
            self.who, ascii(self.client_id), SHARED_QUIET_S, ", ".join(map(ascii, filters)),
        )  # fmt: skip


def _told(version: int) -> str:
    return "5.0" if version == 5 else "3.1.1"
