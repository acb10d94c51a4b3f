"""The `fastkin` command: options and exit codes. What a command does is in commands/.

Exit codes: 0 done, 1 a failure at work, 2 a usage or settings error, told in one line on stderr, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn

import click

from fastkin import __version__
from fastkin.formats.table import FORMATS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fastkin.commands.dead_letters import Filter
    from fastkin.config import Settings

    Load = Callable[[], Settings | None]

CONTEXT: dict[str, object] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def _print_version(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        click.echo(f"fastkin {__version__}")
        context.exit()


version = click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """What every command understands."""
    for option in (
        version,
        click.option("-q", "--quiet", is_flag=True, help="Log only warnings and errors."),
        click.option(
            "-v", "--verbose", is_flag=True, help="Also log each call and connection (DEBUG); no payloads, no secrets."
        ),
    ):
        command = option(command)
    return command


def log_format(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        envvar="FASTKIN_LOG_FORMAT",
        show_default=True,
        help="Log lines as text or as JSON, always on stderr.",
    )(command)


def settings_from(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option(
        "--env-file",
        type=click.Path(dir_okay=False),
        help="Read settings from KEY=VALUE lines; the real environment wins over them.",
    )(command)
    return click.argument("config", required=False, envvar="FASTKIN_CONFIG", metavar="[CONFIG.toml]")(command)


def _set_up_logs(verbose: bool, quiet: bool, log_format: str = "text", *, worker: str | None = None) -> None:
    from fastkin.status import logs

    if verbose and quiet:
        raise click.UsageError("-v and -q are both given")
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    logs.setup(level=level, json_lines=log_format == "json", worker=worker)


def _load(config: str | None, env_file: str | None) -> Settings:
    from fastkin.settings.reload import Reader

    return Reader(config, env_file).read()


@click.group(context_settings=CONTEXT, invoke_without_command=True)
@version
@click.pass_context
def cli(context: click.Context) -> None:
    """MQTT in, Kinesis out: a message is acknowledged only when Kinesis has it.

    Start with `fastkin demo`: it needs neither a broker nor AWS.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command()
@settings_from
@click.option(
    "--workers",
    type=click.IntRange(0, 64),
    metavar="N",
    help="Share the work among N processes; 0: none, after what former workers left was stored.",
)
@click.option("--worker", hidden=True, help="This is a worker: its number, or `all`.")
@click.option("--left-over", hidden=True, help="This empties what these workers left.")
@click.option("--channel", type=int, hidden=True, help="The descriptor to the process that has the workers.")
@common
@log_format
def run(
    config: str | None,
    env_file: str | None,
    workers: int | None,
    worker: str | None,
    left_over: str | None,
    channel: int | None,
    verbose: bool,
    quiet: bool,
    log_format: str,
) -> int:
    """Run the service: MQTT to Kinesis.

    The settings come from CONFIG.toml, or from the environment alone (BROKER, TOPIC,
    KIN_STREAM_NAME, AWS_REGION, ...). SIGHUP reads them again: pipelines that changed restart,
    the others do not notice. SIGTERM stores what is held, then exits; a second one exits at once.
    Exit code 1 means that records were lost or that the engine failed.

    --workers N uses N cores: the filters are shared at the broker, a worker that dies is started
    again, and signals, reloads and the status port are those of one service.
    """
    _set_up_logs(verbose, quiet, log_format, worker=worker or (left_over and "left-over"))
    from fastkin.settings.reload import Reader

    reader = Reader(config, env_file, workers=workers)
    loaded = reader.read()
    from fastkin.commands.run import Role, run
    from fastkin.service.members import member_of

    role = Role(
        None if worker is None else member_of(worker),
        tuple(map(member_of, left_over.split(","))) if left_over else (),
        channel,
    )
    command = [sys.executable, "-m", "fastkin", "run", *([config] if config else [])]
    command += ["--env-file", env_file] if env_file else []
    command += ["-v"] if verbose else ["-q"] if quiet else []
    command += ["--log-format", log_format]
    return run(loaded, reader.read_again, role=role, command=command, env=reader.environment)


@cli.command()
@settings_from
@click.option("--connect", is_flag=True, help="Also try the broker, every filter, the credentials and the stream.")
@click.option(
    "--own-id",
    is_flag=True,
    help="Connect with the service's own client id. This disconnects a service that runs.",
)
@common
def check(config: str | None, env_file: str | None, connect: bool, own_id: bool, verbose: bool, quiet: bool) -> int:
    """Check the settings and print what is in effect, secrets hidden.

    --connect subscribes the filters of each pipeline. It uses a client id of its own, and a group of
    its own for shared filters, so it takes no message away from a service that runs.

    Every wrong setting is named with its file, its key and the cure; the exit code is 2 then.
    """
    _set_up_logs(verbose, quiet)
    if own_id and not connect:
        raise click.UsageError("--own-id goes with --connect")
    loaded = _load(config, env_file)
    from fastkin.commands.check import check

    return check(loaded, connect=connect, quiet=quiet, own_id=own_id)


@cli.command()
@settings_from
@click.option("--from-environment", is_flag=True, help="Take the settings from the environment alone, as `run` does.")
@click.option("--pipeline", metavar="ID", help="Only this pipeline; else each one, a stream that several share once.")
@click.option("--topic", help="Publish to this topic; else to fastkin/selftest/ and something random.")
@click.option(
    "--messages", type=click.IntRange(1, 1000), default=10, show_default=True, help="How many messages to publish."
)
@click.option(
    "--timeout", type=click.FloatRange(1, 600), default=30.0, show_default=True, help="Seconds for each step."
)
@click.option(
    "--no-read", is_flag=True, help="Do not read the records back: that takes permissions `run` does not need."
)
@common
def selftest(
    config: str | None,
    env_file: str | None,
    from_environment: bool,
    pipeline: str | None,
    topic: str | None,
    messages: int,
    timeout: float,
    no_read: bool,
    verbose: bool,
    quiet: bool,
) -> int:
    """Publish messages, store them and read them back; one line for each step.

    Without settings all of it happens on this machine, with an emulated stream. With CONFIG.toml it is tried with the
    broker and the streams of the settings: under client ids and a topic of its own, so nothing is taken away from a
    service that runs, and each stream gets as many records as there are messages.

    The exit code is 0 when every step went well, 1 when one did not, 2 for wrong settings.
    """
    _set_up_logs(verbose, quiet or not verbose)
    from fastkin.commands.selftest import Wanted, selftest

    given = config is not None or env_file is not None or from_environment
    if pipeline is not None and not given:
        raise click.UsageError("--pipeline goes with settings: give CONFIG.toml")
    return selftest(
        _load(config, env_file) if given else None,
        Wanted(messages=messages, timeout_s=timeout, topic=topic, read=not no_read),
        only=pipeline,
    )


@cli.command()
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=4567,
    show_default=True,
    help="Port to listen on; 0: any that is free.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--stream",
    "streams",
    multiple=True,
    metavar="NAME:SHARDS",
    help="Make this stream at the start; may be given several times. Without it: welders:4.",
)
@click.option(
    "--limits",
    type=click.Choice(["on", "off"]),
    default="on",
    show_default=True,
    help="Limit each shard to 1,000 records and 1 MiB a second, as Kinesis does.",
)
@click.option("--latency-ms", type=click.FloatRange(0), default=0.0, help="Milliseconds to wait before each answer.")
@click.option(
    "--faults",
    type=click.Path(exists=True, dir_okay=False),
    help="Faults to play: JSON lines, or TOML with [[fault]] tables.",
)
@common
def emulator(
    port: int,
    host: str,
    streams: tuple[str, ...],
    limits: str,
    latency_ms: float,
    faults: str | None,
    verbose: bool,
    quiet: bool,
) -> int:
    """Run an emulated Kinesis: shard limits, partial failures and faults on demand.

    It holds everything in memory and checks no credentials. For tests and trials only.
    """
    _set_up_logs(verbose, quiet)
    from fastkin.commands.emulator import emulator

    return emulator(
        port=port,
        host=host,
        streams=streams or ("welders:4",),
        limits=limits == "on",
        latency_ms=latency_ms,
        faults=faults,
        quiet=quiet,
    )


@cli.command()
@click.option("--seconds", type=click.FloatRange(2, 3600), default=10.0, show_default=True, help="How long to publish.")
@click.option(
    "--rate",
    type=click.FloatRange(10, 100_000),
    default=2000.0,
    show_default=True,
    help="Records per second; the stream takes 4,000.",
)
@click.option("--kill", is_flag=True, help="Also kill the service (SIGKILL) on the way.")
@click.option("--keep", is_flag=True, help="Keep the settings, logs and dead letters of the demo.")
@common
def demo(seconds: float, rate: float, kill: bool, keep: bool, verbose: bool, quiet: bool) -> int:
    """Show the main job: a simulated plant, a broker, an emulated stream, and a ledger at the end.

    Welders publish JSON and bulk frames with QoS 1; `fastkin run` stores them in four shards. On
    the way the stream is throttled, calls are cut off and a bad frame is sent. The exit code is 0
    only if nothing was lost.
    """
    _set_up_logs(verbose, quiet)
    from fastkin.commands.demo import demo

    return demo(seconds=seconds, rate=rate, kill=kill, keep=keep, verbose=verbose, quiet=quiet)


@cli.command()
@click.argument("stream", metavar="STREAM")
@click.option(
    "--from",
    "start",
    default="latest",
    show_default=True,
    metavar="trim_horizon|latest|TIME",
    help="Begin with the oldest record, with the next one, or at a time: 2026-11-21T04:00:00Z.",
)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object a line, with key and shard.")
@click.option("--raw", is_flag=True, help="Write only the data, with a line break after each record.")
@click.option("--as-stored", is_flag=True, help="Do not take KPL aggregates apart.")
@click.option("--limit", type=click.IntRange(1), help="Stop after so many records.")
@click.option("--region", help="Region; else AWS_REGION or the AWS configuration.")
@click.option("--endpoint-url", help="Another endpoint; else AWS_ENDPOINT_URL_KINESIS.")
@click.option("--profile", help="Profile of the AWS configuration files.")
@common
def tail(
    stream: str,
    start: str,
    as_json: bool,
    raw: bool,
    as_stored: bool,
    limit: int | None,
    region: str | None,
    endpoint_url: str | None,
    profile: str | None,
    verbose: bool,
    quiet: bool,
) -> int:
    """Print the records of STREAM (a name or an ARN), all shards, until Ctrl-C.

    KPL aggregates are taken apart, as KCL does. Characters that do not print are written as escapes.
    """
    _set_up_logs(verbose, quiet)
    if as_json and raw:
        raise click.UsageError("--json and --raw are both given")
    from fastkin.commands.tail import tail
    from fastkin.consumer import Position

    try:
        begin = Position.parse(start)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--from") from None
    return tail(
        stream,
        start=begin,
        form="json" if as_json else "raw" if raw else "text",
        limit=limit,
        region=region,
        endpoint_url=endpoint_url,
        profile=profile,
        as_stored=as_stored,
    )


@cli.group("dead-letters", context_settings=CONTEXT)
def dead_letters() -> None:
    """See what was set aside because Kinesis can never take it, and send it once more.

    A FILE stands for itself and its rotated files (FILE.1, FILE.2, ...), the oldest first. Without a
    FILE those of the settings are used. A service may go on writing to them meanwhile.
    """


def _letters(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which letters are meant: the command gets them as `wanted`, a Filter."""

    @wraps(command)
    def filtered(
        *, pipeline: str | None, reason: str | None, topic: str | None, since: str | None, **others: Any
    ) -> int:
        return int(command(wanted=_letter_filter(pipeline, reason, topic, since), **others))

    for option in (
        click.option(
            "--since",
            metavar="TIME",
            help="Only letters that are not older: 90s, 30m, 2h, 7d, or since 2026-11-21T04:00:00Z.",
        ),
        click.option(
            "--topic", metavar="FILTER", help="Only letters whose topic matches this MQTT filter (+, #, $share/GROUP/)."
        ),
        click.option("--reason", metavar="TEXT", help="Only letters whose reason contains this text."),
        click.option("--pipeline", metavar="ID", help="Only letters of this pipeline."),
    ):
        filtered = option(filtered)
    return filtered


def _letter_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which settings name files and streams: the command gets `load`, which reads them, or gives None without any."""

    @wraps(command)
    def told(*, config: str | None, env_file: str | None, **others: Any) -> int:
        named = config is not None or env_file is not None
        return int(command(load=lambda: _load(config, env_file) if named else None, **others))

    option = click.option(
        "--env-file",
        type=click.Path(dir_okay=False),
        help="Read settings from KEY=VALUE lines; the real environment wins over them.",
    )
    return click.option(
        "--config",
        envvar="FASTKIN_CONFIG",
        metavar="CONFIG.toml",
        help="Settings file: it names the dead letter files and the streams.",
    )(option(told))


def _letter_filter(pipeline: str | None, reason: str | None, topic: str | None, since: str | None) -> Filter:
    from fastkin.commands.dead_letters import Filter, parse_since

    try:
        begin = None if since is None else parse_since(since)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--since") from None
    if topic is not None:
        from fastkin.errors import LibraryError
        from fastkin.mqtt._core import matches

        try:
            matches(topic, "t")
        except LibraryError as error:
            raise click.BadParameter(str(error), param_hint="--topic") from None
    return Filter(pipeline=pipeline, reason=reason, topic=topic, since=begin)


@dead_letters.command("list")
@click.argument("files", nargs=-1, metavar="[FILE]...")
@_letters
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object a line, also on a terminal.")
@_letter_settings
@common
def list_dead_letters(
    files: tuple[str, ...], wanted: Filter, as_json: bool, load: Load, verbose: bool, quiet: bool
) -> int:
    """List dead letters: a table on a terminal, JSON lines when piped."""
    _set_up_logs(verbose, quiet)
    from fastkin.commands import dead_letters as letters

    return letters.list_letters(letters.paths_of(files, None if files else load()), wanted, as_json=as_json)


@dead_letters.command("show")
@click.argument("number", type=click.IntRange(1), metavar="N")
@click.argument("files", nargs=-1, metavar="[FILE]...")
@click.option("--raw", is_flag=True, help="Write only the payload, byte for byte, into a file or a pipe.")
@_letter_settings
@common
def show_dead_letter(number: int, files: tuple[str, ...], raw: bool, load: Load, verbose: bool, quiet: bool) -> int:
    """Show dead letter N of the list in full, its payload as text or in hex."""
    _set_up_logs(verbose, quiet)
    from fastkin.commands import dead_letters as letters

    return letters.show(letters.paths_of(files, None if files else load()), number, raw=raw)


@dead_letters.command("replay")
@click.argument("files", nargs=-1, metavar="[FILE]...")
@_letters
@click.option("--stream", help="Send all letters to this stream (a name or an ARN), not to those of the settings.")
@click.option("--format", "form", type=click.Choice(list(FORMATS)), help="Format of letters that hold a whole payload.")
@click.option("--region", help="Region for --stream; else AWS_REGION or the AWS configuration.")
@click.option("--endpoint-url", help="Endpoint for --stream; else AWS_ENDPOINT_URL_KINESIS.")
@click.option("--profile", help="Profile of the AWS configuration files, for --stream.")
@_letter_settings
@common
def replay_dead_letters(
    files: tuple[str, ...],
    wanted: Filter,
    stream: str | None,
    form: str | None,
    region: str | None,
    endpoint_url: str | None,
    profile: str | None,
    load: Load,
    verbose: bool,
    quiet: bool,
) -> int:
    """Send dead letters again, to the stream of their pipeline; what is stored leaves the files.

    A letter that fails again is kept with its new reason, and the exit code is 1 then. You can break
    it off and run it again. No letter is sent twice, except for the last 500 (or 4 MiB) of a run
    that was killed.
    """
    _set_up_logs(verbose, quiet)
    if stream is None and (region or endpoint_url or profile):
        raise click.UsageError("--region, --endpoint-url and --profile go with --stream")
    from fastkin.commands import dead_letters as letters

    loaded = None if files and stream is not None else load()
    return letters.replay(
        letters.paths_of(files, loaded),
        wanted,
        settings=loaded,
        stream=None if stream is None else letters.stream_of(stream, region, endpoint_url, profile),
        form=form,
    )


def main(args: Sequence[str] | None = None, command: click.Command = cli, name: str = "fastkin") -> None:
    """The entry point: turns every ending of a command into an exit code."""
    if args is None and command is cli and sys.argv[1:2] == ["run"]:
        from fastkin.commands.watch import hold_hangup

        # First of all: reading the settings and loading the engine take a third of a second, and whoever changes a
        # file and says so by SIGHUP does not know that we have only just begun.
        hold_hangup()
    code = _main(args, command, name)
    if args is None:
        _leave(code)
    sys.exit(code)


def _leave(code: int) -> NoReturn:
    """End this process without the interpreter's clean-up, which waits for threads of libraries: a name server or
    a disk that does not answer would keep us here."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # nobody reads it
            code = code or 1
    os._exit(code)


def _main(args: Sequence[str] | None, command: click.Command = cli, name: str = "fastkin") -> int:
    from fastkin.errors import ConfigError, FastkinError

    try:
        code = command.main(args=args, prog_name=name, standalone_mode=False)
    except click.UsageError as error:
        used = error.ctx.command_path if error.ctx is not None else name
        return _say(f"{used}: {error.format_message()} (see {used} --help)", 2)
    except click.ClickException as error:
        return _say(f"{name}: {error.format_message()}", 2)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except ConfigError as error:
        return _say("\n".join(f"{name}: {line}" for line in str(error).splitlines()), 2)
    except FastkinError as error:
        return _say(f"{name}: {error}", 1)
    except BrokenPipeError:
        # the reader of our output has gone (`fastkin tail ... | head`): not our failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code if isinstance(code, int) else 0


def _say(line: str, code: int) -> int:
    click.echo(line, err=True)
    return code


if __name__ == "__main__":
    main()
