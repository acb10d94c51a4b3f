"""Types as a user meets them: in a type checker, in `help()`, and at run time."""

from __future__ import annotations

import importlib
import inspect
import json
import pydoc
import subprocess
import sys
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import fastkin

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent.parent
PUBLIC = ["fastkin", "fastkin.consumer", "fastkin.emulator", "fastkin.lambdas", "fastkin.settings"]
SPELT = """import fastkin
from fastkin import Producer, {name}

print(fastkin.{name}, Producer)
"""


@pytest.mark.process
@pytest.mark.timeout(300)  # a checker reads all of fastkin first
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_a_misspelt_name_is_an_error_and_the_right_one_is_none(checker: str, tmp_path: Path) -> None:
    for file, name in (("wrong.py", "Consumr"), ("right.py", "Consumer")):
        (tmp_path / file).write_text(SPELT.format(name=name))
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT / "src")]}))
    command = {
        "mypy": ["mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml")],
        "pyright": ["pyright", "-p"],
    }
    done = subprocess.run(
        [sys.executable, "-m", *command[checker], str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    told = [line for line in (done.stdout + done.stderr).splitlines() if "error: " in line]
    assert len(told) == 2, told  # imported, and asked for
    assert all("wrong.py" in line and '"Consumr"' in line for line in told)


@pytest.mark.parametrize("name", ["Producer", "Consumer", "Engine", "SyncProducer"])
def test_help_shows_what_is_loaded_late_too(name: str) -> None:
    shown = pydoc.plain(pydoc.render_doc(fastkin))
    assert f"class {name}(" in shown
    assert f"`{name}`" in (fastkin.__doc__ or "")


def callables() -> Iterator[tuple[str, Any]]:
    """Each public function, class and method of the public modules."""
    for place in PUBLIC:
        module = importlib.import_module(place)
        for name in getattr(module, "__all__", None) or vars(module):
            each = getattr(module, name)
            if name.startswith("_") or not callable(each) or not str(each.__module__).startswith("fastkin"):
                continue
            yield f"{place}.{name}", each
            for member, found in vars(each).items() if inspect.isclass(each) else ():
                method = found.__func__ if isinstance(found, classmethod | staticmethod) else found
                method = method.fget if isinstance(method, property) else method
                if callable(method) and (not member.startswith("_") or member == "__init__"):
                    yield f"{place}.{name}.{member}", method


CALLABLES = dict(callables())


def test_they_are_found() -> None:
    assert {"fastkin.Producer.put", "fastkin.Consumer.stream", "fastkin.Engine.reload", "fastkin.load_settings"} <= set(
        CALLABLES
    )


@pytest.mark.parametrize("name", CALLABLES)
def test_hints_can_be_read_at_run_time(name: str) -> None:
    """What frameworks do that make calls from annotations."""
    typing.get_type_hints(CALLABLES[name])
