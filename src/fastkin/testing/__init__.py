"""For tests of programs that write to Kinesis: an emulated one, which the program finds by its environment.

With pytest there is nothing to import, the fixtures are there:

    def test_report(fastkin_emulator):
        report(21.5)                                    # your code, with any client of Kinesis
        assert fastkin_emulator.stored_json() == [{"celsius": 21.5}]

`fastkin_emulator` runs in a thread, so that a test of any kind may use it; `fastkin_async_emulator` runs in the loop of
the test, under pytest-asyncio or anyio. What each of them is like is said by a mark:

    @pytest.mark.fastkin(streams={"welders": 4}, limits=False, roles={"arn:aws:iam::123456789012:role/r": None})
    async def test_it_waits_for_room(fastkin_async_emulator):
        with fastkin_async_emulator.throttle(): ...

Without pytest they are context managers:

    with fastkin.testing.ThreadEmulator({"welders": 4}) as kinesis:
        report(21.5)
        assert kinesis.stored_json("welders") == [{"celsius": 21.5}]
"""

from fastkin.testing.emulated import ActiveFault, AsyncEmulator, EmulatedKinesis, EmulatorOptions
from fastkin.testing.environment import ACCESS_KEY, SECRET_KEY, aws_environment
from fastkin.testing.threaded import ThreadEmulator

__all__ = [
    "ACCESS_KEY",
    "SECRET_KEY",
    "ActiveFault",
    "AsyncEmulator",
    "EmulatedKinesis",
    "EmulatorOptions",
    "ThreadEmulator",
    "aws_environment",
]
