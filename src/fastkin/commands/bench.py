"""The `fastkin-bench` command: options and exit codes. What is measured, and how, is in bench/.

Exit codes: 0 done and nothing lost, 1 records are lost or the run broke off, 2 a usage error, told in one line on
stderr, 3 nothing is lost and `soak` exceeded a bound, 130 interrupted.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastkin.bench.bounds import CALLS_PER_S, CPU_PERCENT, GROWTH_MB_H, ONCE_MB, RATE, WAKEUPS_PER_S, Bounds
from fastkin.bench.cost import Prices, costs, table
from fastkin.bench.forms import FORMS, MOST_SAMPLES, Forms
from fastkin.bench.plan import EMULATOR, MOSQUITTO, REGION, SOURCE, STREAM, Plan
from fastkin.commands import cli

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from fastkin.bench.bounds import Verdict
    from fastkin.bench.result import Result
    from fastkin.bench.show import Progress

Decorator = "Callable[[Callable[..., Any]], Callable[..., Any]]"
_RUN_COUNT = 200_000  # messages of a run flat out
_BULK_COUNT = 5_000  # the same, of frames
_SECONDS = 10.0  # of a run at a rate
_SHARDS = 4  # of an emulator that keeps their limits
_MANY_SHARDS = 1000  # of one that does not
_EXCEEDED = 3  # exit code


@click.group(context_settings=cli.CONTEXT, invoke_without_command=True)
@cli.version
@click.pass_context
def bench(context: click.Context) -> None:
    """Measure fastkin on this machine, alone or beside its peers, and look up every record at the end.

    Simulated welders publish, the process measured is on its own, an emulated Kinesis keeps the ledger.
    Start with `fastkin-bench pipeline`. Figures of different machines cannot be compared; compare ratios.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


# -- options ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Output:
    """What becomes of the result."""

    as_json: bool
    as_csv: bool
    plot: str | None
    quiet: bool
    keep: bool


def _chain(*options: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _output(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command gets `output`, an Output."""

    @wraps(command)
    def told(*, as_json: bool, as_csv: bool, plot: str | None, quiet: bool, keep: bool, **others: Any) -> int:
        if as_json and as_csv:
            raise click.UsageError("--json and --csv are both given")
        if plot is not None:
            from fastkin.bench import plots

            if not plot.endswith(plots.ENDINGS):
                raise click.BadParameter(f"{plot!r} ends with neither .png nor .html", param_hint="--plot")
            plots.check(plot)
        return int(command(output=Output(as_json, as_csv, plot, quiet, keep), **others))

    return _chain(
        click.option("--json", "as_json", is_flag=True, help="Write the result as JSON, not as a table."),
        click.option("--csv", "as_csv", is_flag=True, help="Write CSV: a row a second, or a row for each round."),
        click.option("--plot", metavar="FILE", help="Also draw it: FILE.png or FILE.html; needs fastkin[bench]."),
        click.option("-q", "--quiet", is_flag=True, help="No progress on stderr."),
        click.option("--keep", is_flag=True, help="Keep settings and logs of the run, and say where."),
        cli.version,
    )(told)


_FORM = _chain(
    click.option(
        "--form", type=click.Choice(list(FORMS)), default="welder", show_default=True,
        help="What the machines say: " + "; ".join(f"{name}, {what}" for name, what in FORMS.items()) + ".",
    ),
    click.option("--seed", type=int, default=1, show_default=True, help="The same seed, the same bytes."),
    click.option(
        "--samples", type=click.IntRange(1, MOST_SAMPLES), default=100, show_default=True,
        help="Records of a bulk frame.",
    ),
    click.option(
        "--sample-hz", type=click.FloatRange(1, 1_000_000), default=20_000.0, show_default=True,
        help="How fast a machine takes the samples of its frames.",
    ),
)  # fmt: skip
_LOAD = _chain(
    click.option("--rate", type=click.FloatRange(0.1, 10_000_000), help="Messages a second; without it: flat out."),
    click.option("--count", type=click.IntRange(1, 100_000_000), help="How many messages."),
    click.option("--seconds", type=click.FloatRange(0.1, 86_400), help="How long, at a --rate, instead of --count."),
    click.option("--interval", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True,
                 help="Seconds between two lines of progress."),
    click.option("--set", "settings", multiple=True, metavar="KEY=VALUE",
                 help="A setting of the pipeline (linger_ms=1000), broker.KEY, kinesis.KEY; `producer`: an argument."),
)  # fmt: skip
_QOS = click.option("--qos", type=click.IntRange(0, 1), default=1, show_default=True, help="QoS of the messages.")
_BROKER = _chain(
    _QOS,
    click.option(
        "--broker", default=SOURCE, show_default=True, metavar=f"{SOURCE}|{MOSQUITTO}|URL",
        help="The built-in source, a mosquitto that is started, or a broker that runs (mqtt://HOST:PORT).",
    ),
    click.option("--broker-ca", type=click.Path(exists=True, dir_okay=False), help="Authorities of a broker at a URL."),
    click.option("--window", type=click.IntRange(1, 65_535), default=10_000, show_default=True,
                 help="Unacknowledged messages of the built-in source."),
    click.option("--batch", type=click.IntRange(1), help="Messages in a write of the built-in source, 1 as a broker."),
    click.option("--pipelines", type=click.IntRange(1, 500), default=1, show_default=True,
                 help="How many pipelines share the load, each with a connection of its own."),
)  # fmt: skip
_ENDPOINT = _chain(
    click.option("--endpoint", default=EMULATOR, show_default=True, metavar=f"{EMULATOR}|URL",
                 help="The emulator, a process of its own, or another endpoint; its stream is read back afterwards."),
    click.option("--endpoint-ca", type=click.Path(exists=True, dir_okay=False), help="Authorities of that endpoint."),
    click.option("--stream", default=STREAM, show_default=True, help="The stream at that endpoint."),
    click.option("--region", default=REGION, show_default=True, help="Its region."),
    click.option("--shards", type=click.IntRange(1, 10_000),
                 help=f"Shards of the emulator.  [default: {_SHARDS} with --limits, else {_MANY_SHARDS}]"),
    click.option("--limits/--no-limits", default=None, help="The emulator keeps the limits of shards."),
    click.option("--latency-ms", type=click.FloatRange(0, 60_000), default=0.0, show_default=True,
                 help="How long the emulator holds an answer back."),
)  # fmt: skip

_MOST = click.FloatRange(0, 1_000_000)
_AT = f"at {RATE:g} messages a second, more in proportion"
_BOUNDS = _chain(
    click.option("--most-cpu", type=_MOST, metavar="PERCENT",
                 help=f"CPU share of one core. [default: {CPU_PERCENT:g} {_AT}]"),
    click.option("--most-growth", type=_MOST, metavar="MB/H",
                 help=f"Growth of memory. [default: {GROWTH_MB_H:g}, and {ONCE_MB:g} MB once]"),
    click.option("--most-wakeups", type=_MOST, metavar="N", help=f"A second. [default: {WAKEUPS_PER_S:g} {_AT}]"),
    click.option("--most-calls", type=_MOST, metavar="N", help=f"A second. [default: {CALLS_PER_S:g} {_AT}]"),
)  # fmt: skip


def _tls(*sides: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option("--tls", type=click.Choice(["none", *sides]), default="none", show_default=True,
                        help="Where TLS is spoken, with certificates made for the run.")  # fmt: skip


# -- commands --------------------------------------------------------------------------------------


@bench.command()
@_FORM
@click.option("--count", type=click.IntRange(1, 10_000_000), help="Messages of a round.")
@click.option(
    "--rounds", type=click.IntRange(1, 1000), default=5, show_default=True, help="Of each contender, in turns."
)
@_output
def codec(count: int | None, rounds: int, output: Output, **options: Any) -> int:
    """The work on records alone: messages to the bodies of calls, no socket, beside plain Python."""
    from fastkin.bench import codecs

    plan = Plan(command="codec", messages=count or (200 if options["form"] == "bulk" else 20_000), **options)
    _tell_groups([codecs.compare(plan, rounds)], plan, output)
    return 0


@bench.command()
@_FORM
@_LOAD
@_ENDPOINT
@_tls("kinesis")
@_output
def producer(output: Output, **options: Any) -> int:
    """A `Producer` in a process of its own: put, an outcome for each record."""
    plan = _plan("producer", options)
    _check_producer(plan)
    return _run(plan, output)


@bench.command()
@_FORM
@_LOAD
@_BROKER
@_tls("broker")
@_output
def mqtt(output: Output, **options: Any) -> int:
    """The intake alone: messages are taken, counted and acknowledged late."""
    if options["pipelines"] != 1:
        raise click.UsageError("--pipelines: the intake alone is one connection")
    return _run(_plan("mqtt", options), output)


@bench.command()
@_FORM
@_LOAD
@_BROKER
@_ENDPOINT
@_tls("broker", "kinesis", "both")
@_output
def pipeline(output: Output, **options: Any) -> int:
    """The whole path: `fastkin run` between a broker and Kinesis."""
    return _run(_plan("pipeline", options), output)


@bench.command()
@_FORM
@_LOAD
@_BROKER
@_ENDPOINT
@_tls("broker", "kinesis", "both")
@_BOUNDS
@_output
def soak(
    output: Output,
    most_cpu: float | None,
    most_growth: float | None,
    most_wakeups: float | None,
    most_calls: float | None,
    **options: Any,
) -> int:
    """The whole path, slowly and for long: losses, CPU share, wake-ups, whether memory grows.

    Without other options 6,000 messages at 100 a second, a minute, and shards with their limits. The exit code is 3
    when nothing is lost and a bound is exceeded. A bound that is not given is judged in runs of half a minute and more,
    growth in those of five. The CPU share is that of a machine that does nothing else: give more beside other work.
    """
    if options["rate"] is None:
        options["rate"] = 100.0
    if options["count"] is None and options["seconds"] is None:
        options["count"] = 6_000
    if options["limits"] is None and options["endpoint"] == EMULATOR:  # others have limits of their own
        options["limits"] = True
    bounds = Bounds(cpu_percent=most_cpu, growth_mb_h=most_growth, wakeups_per_s=most_wakeups, calls_per_s=most_calls)
    return _run(_plan("soak", options), output, bounds)


@bench.command()
@click.option(
    "--form",
    type=click.Choice(["welder", "wide"]),
    default="welder",
    show_default=True,
    help="What the machines say; peers store payloads as they come.",
)
@click.option("--seed", type=int, default=1, show_default=True, help="The same seed, the same bytes.")
@click.option(
    "--kind",
    type=click.Choice(["all", "bridges", "producers"]),
    default="all",
    show_default=True,
    help="MQTT to Kinesis, records to Kinesis, or both.",
)
@click.option("--peer", "names", multiple=True, metavar="NAME", help="Only this peer; may be given several times.")
@click.option(
    "--count",
    type=click.IntRange(1, 1_000_000),
    default=10_000,
    show_default=True,
    help="Messages of a round of the slowest; faster ones get up to twenty times as many.",
)
@click.option("--rounds", type=click.IntRange(1, 1000), default=5, show_default=True, help="Of each, in turns.")
@_QOS
@click.option(
    "--window",
    type=click.IntRange(1, 65_535),
    default=10_000,
    show_default=True,
    help="Unacknowledged messages of the source.",
)
@_tls("broker", "kinesis", "both")
@_output
def compare(
    kind: str, names: tuple[str, ...], count: int, rounds: int, tls: str, output: Output, **options: Any
) -> int:  # fmt: skip
    """fastkin beside the peers that are installed: outputs compared first, rounds in turns, medians and ratios.

    CPU time, user and system, of the process measured, per record that was stored.
    """
    from fastkin.bench.peers import PEERS, Kind

    known = sorted({each.name for each in PEERS})
    for name in names:
        if name not in known:
            raise click.BadParameter(f"{name!r} is none; there is {', '.join(known)}", param_hint="--peer")
        if not any(each.name == name and not each.missing for each in PEERS):
            missing = next(each.missing for each in PEERS if each.name == name)
            raise click.BadParameter(f"{name} is not installed: it needs {missing}", param_hint="--peer")
    kinds: list[Kind] = (
        ["bridge"] if kind == "bridges" else ["producer"] if kind == "producers" else ["bridge", "producer"]
    )
    plan = Plan(
        command="compare", messages=count, tls_broker=tls in ("broker", "both"), tls_kinesis=tls in ("kinesis", "both"),
        **options,
    )  # fmt: skip
    from fastkin.bench.compare import compare as beside

    groups = _with_folder(plan, output, lambda folder, show: beside(plan, kinds, names, rounds, folder, show))
    _tell_groups(groups, plan, output)
    return 0


_PRICE = click.FloatRange(0, 1_000_000)
_PRICES = Prices()


@bench.command()
@_FORM
@click.option(
    "--rate", type=click.FloatRange(0.1, 10_000_000), default=1000.0, show_default=True, help="Messages a second."
)
@click.option(
    "--linger-ms",
    type=click.FloatRange(0, 60_000),
    default=50.0,
    show_default=True,
    help="How long a record may wait for others.",
)
@click.option(
    "--used",
    type=click.FloatRange(0.01, 1.0),
    default=0.8,
    show_default=True,
    help="The share of its limits that a shard is planned to take.",
)
@click.option(
    "--shard-hour", type=_PRICE, default=_PRICES.shard_hour, show_default=True, help="Provisioned, in dollars."
)
@click.option(
    "--put-units",
    type=_PRICE,
    default=_PRICES.million_put_units,
    show_default=True,
    help="Provisioned: a million units of 25 KB, in dollars.",
)
@click.option(
    "--stream-hour", type=_PRICE, default=_PRICES.stream_hour, show_default=True, help="On demand, in dollars."
)
@click.option(
    "--gb-in",
    type=_PRICE,
    default=_PRICES.gb_in,
    show_default=True,
    help="On demand: a GB of records, each rounded up to 1 KB, in dollars.",
)
@click.option("--json", "told_as_json", is_flag=True, help="Write the result as JSON, not as a table.")
@cli.version
def cost(
    rate: float, linger_ms: float, used: float, shard_hour: float, put_units: float, stream_hour: float, gb_in: float,
    told_as_json: bool, **options: Any,
) -> int:  # fmt: skip
    """What a plant costs on Kinesis by `aggregation`: bytes, records, calls, shards and AWS's bill. Nothing is sent.

    The prices are us-east-1's of 2023 unless others are given: https://aws.amazon.com/kinesis/data-streams/pricing/
    """
    prices = Prices(shard_hour, put_units, stream_hour, gb_in)
    found = costs(Forms(**options), rate=rate, linger_s=linger_ms / 1000, prices=prices, used=used)
    click.echo(json.dumps([asdict(each) for each in found], indent=2) if told_as_json else table(found))
    return 0


# -- from options to a plan ------------------------------------------------------------------------


def _plan(command: str, options: dict[str, Any]) -> Plan:
    """Raises UsageError for options that contradict each other."""
    count, seconds, rate = options.pop("count"), options.pop("seconds"), options["rate"]
    if seconds is not None and rate is None:
        raise click.UsageError("--seconds goes with --rate; flat out, give --count")
    if seconds is not None and count is not None:
        raise click.UsageError("--seconds and --count are both given")
    if count is None:
        if rate is not None:
            count = max(1, round(rate * (seconds or _SECONDS)))
        else:
            count = _BULK_COUNT if options["form"] == "bulk" else _RUN_COUNT
    tls = options.pop("tls")
    broker, endpoint = options.get("broker", SOURCE), options.get("endpoint", EMULATOR)
    _check_sides(broker, endpoint, tls, options)
    limits, shards = bool(options.pop("limits", None)), options.pop("shards", None)
    return Plan(
        command=command,
        messages=count,
        interval_s=options.pop("interval"),
        tls_broker=tls in ("broker", "both"),
        tls_kinesis=tls in ("kinesis", "both"),
        limits=limits,
        # fastkin keeps to what the shards can take, also when the emulator would take more: few of them, and a run flat
        # out shows nothing but their limit.
        shards=shards or (_SHARDS if limits else _MANY_SHARDS),
        **options,
    )


def _check_sides(broker: str, endpoint: str, tls: str, options: dict[str, Any]) -> None:
    if broker not in (SOURCE, MOSQUITTO) and not broker.startswith(("mqtt://", "mqtts://", "ws://", "wss://")):
        raise click.BadParameter(
            f"{broker!r} is neither {SOURCE} nor {MOSQUITTO} nor a URL such as mqtt://localhost:1883",
            param_hint="--broker",
        )
    if endpoint != EMULATOR and not endpoint.startswith(("http://", "https://")):
        raise click.BadParameter(
            f"{endpoint!r} is neither {EMULATOR} nor a URL such as http://localhost:4567", param_hint="--endpoint"
        )
    if broker != SOURCE and (options["pipelines"] != 1 or options["batch"] is not None):
        raise click.UsageError("--pipelines and --batch go with the built-in source")
    if tls in ("broker", "both") and broker not in (SOURCE, MOSQUITTO):
        raise click.UsageError("--tls broker: a broker at a URL speaks TLS when it begins with mqtts://")
    if tls in ("kinesis", "both") and endpoint != EMULATOR:
        raise click.UsageError("--tls kinesis: an endpoint at a URL speaks TLS when it begins with https://")
    if endpoint != EMULATOR and (options["limits"] is not None or options["latency_ms"]):
        raise click.UsageError("--limits and --latency-ms go with the emulator")
    for each in options["settings"]:
        if not each.partition("=")[0] or "=" not in each:
            raise click.BadParameter(f"{each!r} is not KEY=VALUE", param_hint="--set")


def _check_producer(plan: Plan) -> None:
    """The arguments of `--set`, before a process is started for them."""
    from fastkin.bench.service import value_of
    from fastkin.errors import LibraryError
    from fastkin.producer import Producer

    try:
        Producer(
            plan.stream, region=plan.region, access_key="any", secret_key="any",  # noqa: S106 - it opens nothing
            **{key: value_of(value) for key, value in plan.option.items()},
        )  # fmt: skip
    except TypeError as error:
        raise click.BadParameter(
            f"{str(error).partition(' ')[2]}: see Producer's arguments", param_hint="--set"
        ) from None
    except LibraryError as error:
        raise click.BadParameter(str(error), param_hint="--set") from None


# -- running and telling ---------------------------------------------------------------------------


def _run(plan: Plan, output: Output, bounds: Bounds | None = None) -> int:
    from fastkin.bench.runs import run

    result = _with_folder(plan, output, lambda folder, show: run(plan, folder, show))
    verdicts = bounds.verdicts(result) if bounds is not None else []
    _tell(result, verdicts, output)
    if not result.good:
        balance = result.balance
        left = f", {result.unpublished:,} were not taken from the machines" if result.unpublished else ""
        click.echo(
            f"fastkin-bench: {balance.lost:,} records are lost, {balance.foreign:,} that are stored nobody"
            f" published{left}; run it again with --keep, and read the logs",
            err=True,
        )
        return 1
    for each in verdicts:
        if not each.held:
            click.echo(f"fastkin-bench: {each.name}: {each.text} {each.unit}, at most {each.most:,.4g}", err=True)
    return 0 if all(each.held for each in verdicts) else _EXCEEDED


def _with_folder(plan: Plan, output: Output, work: Callable[[Path, Progress], Coroutine[Any, Any, Any]]) -> Any:
    """Do the work with a folder for its files; SIGINT and SIGTERM end it, and its processes with it."""
    from fastkin.bench.show import Progress
    from fastkin.runtime.loops import loop_factory

    show = Progress(quiet=output.quiet, live=sys.stderr.isatty())
    folder = Path(tempfile.mkdtemp(prefix=f"fastkin-bench-{plan.command}-"))

    async def until_asked() -> Any:
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await work(folder, show)

    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(until_asked())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        show.close()
        if output.keep:
            click.echo(f"settings and logs are in {folder}", err=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _tell(result: Result, verdicts: list[Verdict], output: Output) -> None:
    from fastkin.bench import result as telling

    if output.as_json:
        bounds = {"bounds": [each.told() for each in verdicts]} if verdicts else {}
        click.echo(telling.as_json(result.told() | bounds))
    elif output.as_csv:
        click.echo(telling.samples_csv(result.samples), nl=False)
    else:
        click.echo(telling.table(f"{result.plan.command}: {result.measured}", result.rows()))
        click.echo(telling.table("ledger", result.ledger()))
        if verdicts:
            click.echo(telling.table("bounds", [each.row() for each in verdicts]))
    _draw(result, output)


def _tell_groups(groups: Sequence[Any], plan: Plan, output: Output) -> None:
    from fastkin.bench import comparison
    from fastkin.bench.result import as_json

    if output.as_json:
        click.echo(as_json(comparison.told(list(groups), plan.told())))
    elif output.as_csv:
        click.echo(comparison.rounds_csv(list(groups)), nl=False)
    else:
        click.echo("\n\n".join(group.table() for group in groups))
    _draw(groups, output)


def _draw(what: Any, output: Output) -> None:
    if output.plot is not None:
        from fastkin.bench import plots
        from fastkin.errors import FastkinError

        try:
            plots.draw(what, output.plot)
        except OSError as error:
            raise FastkinError(f"--plot {output.plot}: {error.strerror}; give a file that can be written") from None


def main(args: Sequence[str] | None = None) -> None:
    """The entry point: turns every ending into an exit code."""
    cli.main(args, bench, "fastkin-bench")


if __name__ == "__main__":
    main()
