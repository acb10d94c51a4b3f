"""Pictures of a run or a comparison: a PNG, or a page of HTML with the drawing in it, which needs no network."""

from __future__ import annotations

import importlib.util
import io
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkin.bench.children import BenchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastkin.bench.comparison import Group
    from fastkin.bench.plan import Sample
    from fastkin.bench.result import Result

ENDINGS = (".png", ".html")
_INK = "#1f4e79"


def check(path: str) -> None:
    """BenchError: nothing here draws. Asked before a run, for after it its figures would be lost."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError("--plot needs matplotlib: pip install 'fastkin[bench]'")
    if not Path(path).parent.is_dir():
        raise BenchError(f"--plot {path}: there is no folder {Path(path).parent}; make it first")


def draw(what: Result | Sequence[Group], path: str) -> None:
    """Write the picture. OSError: the file cannot be written."""
    from matplotlib.figure import Figure  # a third of a second, for who draws alone

    figure = Figure()
    if isinstance(what, list | tuple):
        _groups(figure, what)
    else:
        _run(figure, what)
    figure.tight_layout()
    if path.endswith(".png"):
        figure.savefig(path, dpi=120)
    else:
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg")
        svg = drawing.getvalue()
        page = f"<!doctype html>\n<meta charset=utf-8>\n<title>fastkin-bench</title>\n{svg[svg.index('<svg') :]}"
        Path(path).write_text(page, "utf-8")


def _run(figure: Any, result: Any) -> None:
    samples: list[Sample] = result.samples
    seconds = [each.seconds for each in samples]
    panels: list[tuple[str, dict[str, list[float]]]] = [
        ("records/s", {"stored": [each.per_s for each in samples]}),
        ("ms", {share: [each.latency_ms.get(share, float("nan")) for each in samples] for share in ("p50", "p99")}),
        ("in flight", {"records": [each.in_flight for each in samples]}),
        ("MB", {"RSS": [each.rss_mb for each in samples]}),
        ("CPU %", {"of one core": [each.cpu_percent for each in samples]}),
        ("wake-ups/s", {"": [each.wakeups_per_s for each in samples]}),
    ]
    figure.set_size_inches(11, 8)
    axes = figure.subplots(3, 2, sharex=True)
    figure.suptitle(f"fastkin-bench {result.plan.command}: {result.records:,} records of form {result.plan.form}")
    for axis, (unit, lines) in zip(axes.flat, panels, strict=True):
        for at, (name, values) in enumerate(lines.items()):
            axis.plot(
                seconds, values, label=name, color=_INK, alpha=1 / (1 + at), marker="." if len(values) < 40 else ""
            )
        axis.set_ylabel(unit)
        axis.set_ylim(bottom=0)
        if len(lines) > 1:
            axis.legend()
    for axis in axes[-1]:
        axis.set_xlabel("seconds")


def _groups(figure: Any, groups: Sequence[Group]) -> None:
    figure.set_size_inches(10, 1.5 + 2.5 * len(groups))
    axes = figure.subplots(len(groups), 1, squeeze=False)
    figure.suptitle("CPU time per record, medians; the whiskers are the rounds")
    for axis, group in zip(axes.flat, groups, strict=True):
        names = [each.name for each in group.contenders]
        middles = [statistics.median(each.cpu_us) for each in group.contenders]
        reach = [
            [middle - min(each.cpu_us) for middle, each in zip(middles, group.contenders, strict=True)],
            [max(each.cpu_us) - middle for middle, each in zip(middles, group.contenders, strict=True)],
        ]
        axis.barh(names, middles, xerr=reach, color=_INK, alpha=0.8)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlabel("microseconds, logarithmic")
        axis.set_title(group.title, fontsize=10)
