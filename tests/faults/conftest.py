"""`make test` runs the fast cases; all of them run where somebody asks for this directory or `make faults`."""

from __future__ import annotations

import os
from typing import Any


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    asked = any("faults" in str(argument) for argument in config.invocation_params.args)
    if asked or os.environ.get("FASTKIN_FAULTS") == "full":
        return
    slow = [item for item in items if item.get_closest_marker("faults_full")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
