"""Progress of a run on stderr: one line that is written anew on a terminal, a line each in a log."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from fastkin.bench.plan import Sample


class Progress:
    """What runs.Show wants."""

    def __init__(self, *, quiet: bool, live: bool) -> None:
        """`live`: stderr is a terminal."""
        self._quiet = quiet
        self._live = live
        self._open = False  # the cursor stands behind a line that is to be written anew

    def say(self, text: str) -> None:
        if not self._quiet:
            self.close()
            click.echo(text, err=True)

    def now(self, sample: Sample) -> None:
        if self._quiet:
            return
        if self._live:
            click.echo(f"\r\x1b[K{line(sample)}", err=True, nl=False)
            self._open = True
        else:
            click.echo(line(sample), err=True)

    def close(self) -> None:
        """End the line that is written anew."""
        if self._open:
            click.echo("", err=True)
            self._open = False


def line(sample: Sample) -> str:
    """A moment of a run in one line."""
    waits = sample.latency_ms
    shares = "/".join(f"{waits[share]:.1f}" for share in ("p50", "p99", "p99.9") if share in waits) or "-"
    return (
        f"{sample.seconds:6.1f} s {sample.stored:>11,} stored {sample.per_s:>9,.0f}/s {sample.in_flight:>7,} in flight"
        f"  p50/p99/p99.9 {shares} ms  throttled {sample.throttled:,}  RSS {sample.rss_mb:.1f} MB"
        f"  CPU {sample.cpu_percent:.1f} %  wake-ups {sample.wakeups_per_s:,.0f}/s"
    )
