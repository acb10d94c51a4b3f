"""The pytest plugin as its user has it: pytest finds it by its entry point, in a run of its own.

Tests of users run in a process of their own; what is about marks and options runs in this one, which costs no start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import boto3
import pytest

import fastkin.producer
import fastkin.testing

if TYPE_CHECKING:
    from collections.abc import Callable

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.timeout(300)  # a start of pytest costs a second of a CPU, of which there may be little

# A run in this process throws away what it imported, and a compiled module comes only once: these are here before.
PRELOADED = (boto3, fastkin.producer, fastkin.testing)


class Run(Protocol):
    """Runs a file of tests; warnings are errors, as in many projects."""

    def __call__(self, text: str, *arguments: str, ini: str = "") -> pytest.RunResult: ...


def runner(pytester: pytest.Pytester, start: Callable[..., pytest.RunResult]) -> Run:
    def run(text: str, *arguments: str, ini: str = "") -> pytest.RunResult:
        pytester.makepyfile(text)
        if "no:asyncio" not in arguments:  # which asks for this, to be sure
            ini += "\nasyncio_default_fixture_loop_scope = function"
        # The others cost a start more than all that is tested here, and one of them asks git.
        others = " ".join(f"-p no:{name}" for name in ("benchmark", "xdist", "hypothesispytest", "cacheprovider"))
        pytester.makeini(f"[pytest]\naddopts = --strict-markers {others}\nfilterwarnings = error\n{ini}")
        return start(*arguments)

    return run


@pytest.fixture(autouse=True)
def another_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)


@pytest.fixture
def run_apart(pytester: pytest.Pytester, process: None) -> Run:
    """In a process of its own."""
    return runner(pytester, pytester.runpytest_subprocess)


@pytest.fixture
def run(pytester: pytest.Pytester) -> Run:
    return runner(pytester, pytester.runpytest_inprocess)


def test_a_plain_test(run_apart: Run) -> None:
    result = run_apart(
        """
        import os
        import boto3
        import pytest

        def report(celsius):
            boto3.client("kinesis").put_record(
                StreamName="test", Data=b'{"celsius": %g}' % celsius, PartitionKey="oven"
            )

        def test_report(fastkin_emulator):
            report(21.5)
            assert fastkin_emulator.stored_json() == [{"celsius": 21.5}]

        def test_it_begins_anew(fastkin_emulator):
            assert fastkin_emulator.stored() == []
            with fastkin_emulator.throttle(), pytest.raises(Exception, match="ProvisionedThroughputExceeded"):
                report(21.5)

        def test_the_environment_is_as_it_was():
            assert os.environ["AWS_REGION"] == "eu-north-1"
            assert "AWS_ACCESS_KEY_ID" not in os.environ
            assert "AWS_ENDPOINT_URL_KINESIS" not in os.environ
        """
    )
    result.assert_outcomes(passed=3)


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_an_asyncio_test(run: Run, mode: str) -> None:
    result = run(
        """
        import asyncio
        import fastkin
        import pytest

        pytestmark = [pytest.mark.asyncio, pytest.mark.fastkin(streams={"welders": 4})]

        async def report(*values):
            async with fastkin.Producer("welders", linger_ms=1) as producer:
                await asyncio.gather(*[await producer.put(b"%d" % value) for value in values])

        async def test_in_the_loop_of_the_test(fastkin_async_emulator):
            fault = fastkin_async_emulator.fail_entries(times=2)
            await report(1, 2, 3)
            assert sorted(fastkin_async_emulator.stored_json("welders")) == [1, 2, 3]
            assert fault.hits == 2

        async def test_in_a_thread(fastkin_emulator):
            sending = asyncio.create_task(report(1, 2, 3))
            await fastkin_emulator.until_stored(3)
            await sending
            assert sorted(fastkin_emulator.stored_json()) == [1, 2, 3]
        """,
        ini=f"asyncio_mode = {mode}",
    )
    result.assert_outcomes(passed=2)


def test_a_host_application_of_aiohttp(run_apart: Run) -> None:
    """The application makes its producer when it starts, and knows nothing of the test."""
    result = run_apart(
        """
        import fastkin
        import pytest
        from aiohttp import web
        from aiohttp.test_utils import TestClient, TestServer

        PRODUCER = web.AppKey("producer", fastkin.Producer)

        async def with_producer(app):
            async with fastkin.Producer("readings", linger_ms=1, delivery_timeout_s=0.3) as app[PRODUCER]:
                yield

        async def post(request):
            try:
                stored = await (await request.app[PRODUCER].put(await request.read()))
            except fastkin.DeliveryTimeout:
                raise web.HTTPServiceUnavailable() from None
            return web.json_response({"shard": stored.shard_id})

        def application():
            app = web.Application()
            app.cleanup_ctx.append(with_producer)
            app.router.add_post("/", post)
            return app

        pytestmark = pytest.mark.fastkin(streams={"readings": 1})

        async def test_what_is_posted_is_stored(fastkin_async_emulator):
            async with TestClient(TestServer(application())) as http:
                answer = await http.post("/", json={"name": "device123"})
                assert await answer.json() == {"shard": "shardId-000000000000"}
            assert fastkin_async_emulator.stored_json() == [{"name": "device123"}]

        async def test_a_stream_without_room_is_told(fastkin_emulator):
            async with TestClient(TestServer(application())) as http:
                with fastkin_emulator.throttle() as fault:
                    answer = await http.post("/", json={"name": "device123"})
                    assert answer.status == 503
                    assert fault.hits > 0
            assert fastkin_emulator.stored_json() == []
        """,
        ini="asyncio_mode = auto",
    )
    result.assert_outcomes(passed=2)


def test_marks_add_up(run: Run) -> None:
    result = run(
        """
        import boto3
        import pytest

        pytestmark = pytest.mark.fastkin(region="eu-west-1", streams={"a": 1})

        def test_of_the_module(fastkin_emulator):
            assert boto3.client("kinesis").list_streams()["StreamNames"] == ["a"]
            assert boto3.client("kinesis").meta.region_name == "eu-west-1"

        @pytest.mark.fastkin(streams={"b": 2}, limits=False)
        def test_of_the_test(fastkin_emulator):
            assert boto3.client("kinesis").list_streams()["StreamNames"] == ["b"]
            assert boto3.client("kinesis").meta.region_name == "eu-west-1"
        """
    )
    result.assert_outcomes(passed=2)


@pytest.mark.parametrize(
    ("mark", "told"),
    [
        ('stream={"a": 1}', "*@pytest.mark.fastkin does not know 'stream': use streams, environ, firehose, limits,*"),
        ('{"a": 1}', '*@pytest.mark.fastkin takes names: streams={"welders": 4}*'),
    ],
)
def test_a_mark_that_is_wrong_is_told(run: Run, mark: str, told: str) -> None:
    result = run(
        f"""
        import pytest

        @pytest.mark.fastkin({mark})
        def test_it(fastkin_emulator):
            pass
        """
    )
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([told])


def test_who_does_not_use_it_does_not_pay_for_it(run_apart: Run) -> None:
    result = run_apart(
        """
        import sys

        def test_it():
            assert "pytest_fastkin" in sys.modules
            assert "fastkin" not in sys.modules
        """
    )
    result.assert_outcomes(passed=1)


def test_it_can_be_left_out(run: Run) -> None:
    result = run("def test_it(fastkin_emulator): pass", "-p", "no:fastkin")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*fixture 'fastkin_emulator' not found*"])


def test_without_pytest_asyncio(run: Run) -> None:
    """The thread needs no plugin, and anyio's looks after the other one, should it be there."""
    result = run(
        """
        import asyncio
        import fastkin

        def test_it(fastkin_emulator):
            async def report():
                async with fastkin.Producer("test") as producer:
                    await (await producer.put(b"1"))

            asyncio.run(report())
            assert fastkin_emulator.stored_json() == [1]
        """,
        "-p",
        "no:asyncio",
    )
    result.assert_outcomes(passed=1)


def test_help_tells_of_it(run: Run) -> None:
    result = run("", "--fixtures")
    result.stdout.fnmatch_lines(["fastkin_emulator*", "*An emulated Kinesis in a thread*"])
    result.stdout.fnmatch_lines(["fastkin_async_emulator*", "*An emulated Kinesis in the loop of the test*"])
    run("", "--markers").stdout.fnmatch_lines(["@pytest.mark.fastkin(*"])
