"""The fixtures `fastkin_emulator` and `fastkin_async_emulator` of pytest: `fastkin.testing` says what they are.

pytest loads this file in every run of an environment that has fastkin. So it stands beside the package and not in it,
and imports nothing of it until a test asks for a fixture: other tests do not pay for it.
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from fastkin.testing import AsyncEmulator, ThreadEmulator

MARK = "fastkin"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        'fastkin(streams={"welders": 4}, limits=False, ...): what the emulated Kinesis of a test is like; arguments of'
        " fastkin.testing.ThreadEmulator. Marks of the module, the class and the test add up.",
    )
    decorate: Callable[..., Any] = pytest.fixture
    if config.pluginmanager.hasplugin("asyncio"):
        # pytest-asyncio in its strict mode looks after no fixtures but those of its own decorator.
        import pytest_asyncio

        decorate = pytest_asyncio.fixture
    # Which decorator it is depends on what else is installed, so the fixture is made now. pytest takes fixtures from
    # modules: here is one that has no file.
    module = ModuleType("pytest_fastkin_async", fastkin_async_emulator.__doc__)
    module.fastkin_async_emulator = decorate(fastkin_async_emulator)  # type: ignore[attr-defined]
    config.pluginmanager.register(module, "fastkin_async")


@pytest.fixture
def fastkin_emulator(request: pytest.FixtureRequest) -> Iterator[ThreadEmulator]:
    """An emulated Kinesis in a thread, for tests of any kind; AWS variables lead to it: see fastkin.testing."""
    from fastkin.testing import ThreadEmulator

    with ThreadEmulator(**_options(request)) as kinesis:
        yield kinesis


async def fastkin_async_emulator(request: pytest.FixtureRequest) -> AsyncIterator[AsyncEmulator]:
    """An emulated Kinesis in the loop of the test; AWS variables lead to it: see fastkin.testing."""
    if "anyio_backend" in request.fixturenames and request.config.pluginmanager.hasplugin("asyncio"):
        # Each of the two plugins would run its part in a loop of its own, and one of them would wait for ever.
        pytest.fail(
            "fastkin_async_emulator runs in pytest-asyncio's loop and this test in anyio's: use fastkin_emulator, or"
            " `async with fastkin.testing.AsyncEmulator() as kinesis` within the test",
            pytrace=False,
        )
    from fastkin.testing import AsyncEmulator

    async with AsyncEmulator(**_options(request)) as kinesis:
        yield kinesis


def _options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the marks say, the nearest one last."""
    from fastkin.testing import EmulatedKinesis, EmulatorOptions

    own = [name for name in inspect.signature(EmulatedKinesis).parameters if name != "options"]
    known = [*own, *EmulatorOptions.__annotations__]
    options: dict[str, Any] = {}
    for mark in reversed(list(request.node.iter_markers(MARK))):
        if mark.args:
            pytest.fail('@pytest.mark.fastkin takes names: streams={"welders": 4}', pytrace=False)
        for name in mark.kwargs:
            if name not in known:
                pytest.fail(f"@pytest.mark.fastkin does not know {name!r}: use {', '.join(known)}", pytrace=False)
        options |= mark.kwargs
    return options
