"""The processes of a run, from both sides: who starts them, and how a child answers.

A child of ours is asked by one line on its stdin and answers by one line of JSON; its first line, unasked, says that
it is ready. It ends when its stdin ends, so none outlives the run, however that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import shutil
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING, Any, Self

from fastkin.bench.plan import EMULATOR, KEY
from fastkin.errors import FastkinError, printable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fastkin.bench.plan import Plan

HOST = "127.0.0.1"
START_S = 300.0  # for a process to be ready, on a machine that has other things to do
END_S = 45.0  # a service has 30 s to store what it holds
_LINE_BYTES = 1 << 20


class BenchError(FastkinError):
    """The run cannot be made, or broke off; the message ends with the cure."""


class Child:
    """One process. What it says on stderr is in `folder`."""

    def __init__(self, name: str, command: list[str], folder: Path, *, plan: Plan, talks: bool) -> None:
        """`talks`: it answers to ask(); else its stdout goes where its stderr goes."""
        self.name = name
        self._command = command
        self._log_path = folder / f"{name.replace(' ', '-')}.log"
        self._talks = talks
        self._env = environment(plan)
        self._process: asyncio.subprocess.Process | None = None
        self._asking = asyncio.Lock()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def ended(self) -> bool:
        assert self._process is not None
        return self._process.returncode is not None

    def log(self) -> str:
        return self._log_path.read_text(errors="replace") if self._log_path.exists() else ""

    async def __aenter__(self) -> Self:
        with self._log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE if self._talks else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if self._talks else log,
                stderr=log,
                env=self._env,
                limit=_LINE_BYTES,
                start_new_session=True,  # Ctrl-C is for us, and we end our children in order
            )
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.end()

    async def end(self) -> int:
        """SIGTERM, and SIGKILL when that is not enough; the exit code."""
        process = self._process
        assert process is not None
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), END_S)
            except TimeoutError:
                process.kill()
                await process.wait()
            except asyncio.CancelledError:  # asked twice: nothing of ours may stay behind
                process.kill()
                raise
        return int(process.returncode or 0)

    async def hello(self) -> dict[str, Any]:
        """Its first line. BenchError: it did not come."""
        return await self._answer(START_S)

    async def ask(self, word: str, timeout_s: float = 600.0) -> dict[str, Any]:
        """What it answers. BenchError: it has ended, or says nothing."""
        async with self._asking:
            assert self._process is not None
            assert self._process.stdin is not None
            self._process.stdin.write(f"{word}\n".encode())
            return await self._answer(timeout_s)

    async def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), timeout_s)
        except TimeoutError:
            raise BenchError(f"{self.name} said nothing for {timeout_s:g} s; try again on a quieter machine") from None
        if not line:
            raise self.failed()
        return dict(json.loads(line))

    async def until(self, ready: Callable[[], bool]) -> None:
        """BenchError when it ends or takes too long."""
        deadline = time.monotonic() + START_S
        while not ready():
            if self.ended or time.monotonic() > deadline:
                raise self.failed()
            await asyncio.sleep(0.02)

    def failed(self) -> BenchError:
        """It ended, or is not ready: with its last words."""
        words = [line for line in self.log().splitlines() if line.strip()]
        last = printable(words[-1], 300) if words else "nothing"
        how = "has ended" if self.ended else "is not ready in time"
        return BenchError(f"{self.name} {how}; it said last: {last}; run it with --keep and read {self._log_path.name}")


def ours(name: str, module: str, plan: Plan, folder: Path) -> Child:
    """A process of fastkin.bench that is given the plan."""
    command = [sys.executable, "-m", f"fastkin.bench.{module}", plan.text()]
    return Child(name, command, folder, plan=plan, talks=True)


def environment(plan: Plan) -> dict[str, str]:
    """What a child gets of ours. A run against the emulator must not reach AWS because of what this shell holds."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("FASTKIN_")}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # or each run would compile its modules, and count that as work
    if plan.endpoint == EMULATOR:
        away = ("AWS_", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
        env = {name: value for name, value in env.items() if not name.startswith(away)}
        env |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": KEY}
    if plan.endpoint_ca:
        env["AWS_CA_BUNDLE"] = plan.endpoint_ca  # a producer has no other way to say it
    for secret in ("FASTKIN_BROKER_USER", "FASTKIN_BROKER_PASSWORD"):
        if secret in os.environ:
            env[secret] = os.environ[secret]
    return env


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def accepts(port: int) -> bool:
    """Somebody listens there."""
    try:
        socket.create_connection((HOST, port), 1.0).close()
    except OSError:
        return False
    return True


def find_mosquitto() -> str | None:
    # Debian keeps it in /usr/sbin, which is not on everybody's path
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    return shutil.which("mosquitto", path=path)


# -- the child's side ------------------------------------------------------------------------------


async def serve(hello: dict[str, Any], handlers: dict[str, Callable[[], Any]]) -> None:
    """Say hello, then answer each word by its handler (a function or a coroutine function), until stdin ends."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    _print(hello)
    while line := await reader.readline():
        answer = handlers[line.decode().strip()]()
        if inspect.isawaitable(answer):
            answer = await answer
        _print(answer or {})


def _print(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def run(main: Callable[[Plan], Any]) -> int:
    """The `main` of a child: its plan is its one argument."""
    from fastkin.bench.plan import Plan
    from fastkin.runtime.loops import loop_factory

    with contextlib.suppress(KeyboardInterrupt), asyncio.Runner(loop_factory=loop_factory()) as runner:
        loop = runner.get_loop()

        async def ended() -> None:
            task = asyncio.current_task()
            assert task is not None
            loop.add_signal_handler(signal.SIGTERM, task.cancel)
            with contextlib.suppress(asyncio.CancelledError):
                await main(Plan.of(sys.argv[1]))

        runner.run(ended())
    return 0
