"""Imports point down: no module of fastkin imports one of a higher floor, or one of its own that imports it back."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "fastkin"

# from the ground up; the floors of DESIGN.md section 4
FLOORS = [
    {"errors", "results", "_codec", "_mqtt", "lambdas"},
    {
        "config",
        "envfile",
        "settings",
        "keys",
        "shards",
        "pacing",
        "tallies",
        "deadletter",
        "letterfile",
        "letterplace",
        "spool",
        "logs",
        "signing",
        "notify",
        "dialect",
        "frames",
        "reasons",
        "subscriptions",
        "tcp",
    },
    {
        "credentials",
        "deadline",
        "dropped",
        "endpoint",
        "transport",
        "wire",
        "worker",
        "dial",
        "tls",
        "emulator",
        "printing",
    },
    {"kinesis", "sdk", "publisher"},
    {"intake", "sender", "flusher", "overflow", "turns", "watchdog"},
    {"letterstream"},
    {"aside"},
    {"pipeline", "producer"},
    {"metrics", "status"},
    {"engine", "carry"},
    {"bench"},
    {"commands", "cli"},
]
# these floors know no event loop
PURE = FLOORS[0] | FLOORS[1]


def modules() -> dict[str, list[Path]]:
    """Module or subpackage name to its source files."""
    found: dict[str, list[Path]] = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name not in ("__init__", "__main__"):
            found.setdefault(name, []).append(path)
    return found


def imports(path: Path) -> set[str]:
    """What of fastkin (and of the standard library) a file imports when it runs; type-only imports do not count."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        for name, value in ast.iter_fields(node):
            if isinstance(value, list):
                kept = [v for v in value if not (isinstance(v, ast.If) and "TYPE_CHECKING" in ast.dump(v.test))]
                setattr(node, name, kept)
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            if node.module == "fastkin":
                names |= {f"fastkin.{alias.name}" for alias in node.names}
    return names


def floor_of(name: str) -> int:
    for at, floor in enumerate(FLOORS):
        if name in floor:
            return at
    raise AssertionError(f"fastkin.{name} has no floor yet: add it to FLOORS and DESIGN.md")


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_down(name: str) -> None:
    own = floor_of(name)
    for path in modules()[name]:
        for imported in imports(path):
            if not imported.startswith("fastkin."):
                continue
            other = imported.split(".")[1]
            if other != name and not other.startswith("__"):
                assert floor_of(other) <= own, f"{path.name} imports {imported} from a higher floor"


@pytest.mark.parametrize("name", sorted(set(modules()) & PURE))
def test_the_lower_floors_know_no_event_loop(name: str) -> None:
    for path in modules()[name]:
        assert not imports(path) & {"asyncio", "ssl", "uvloop"}, path.name
