"""`make test` runs the fast cases; all of them run where somebody asks for this directory or `make faults`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
# asyncio drops a connection that it had accepted but not begun with when the rig's listener is closed under it.
# These sockets are the rig's own: fastkin is another process, and what it leaves behind is not judged by this.
DROPPED = (
    "ignore:Exception ignored in. <(function _SelectorTransport|socket.socket):pytest.PytestUnraisableExceptionWarning"
)


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(DROPPED))
    asked = any("faults" in str(argument) for argument in config.invocation_params.args)
    if asked or os.environ.get("FASTKIN_FAULTS") == "full":
        return
    slow = [item for item in items if item.get_closest_marker("faults_full")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
