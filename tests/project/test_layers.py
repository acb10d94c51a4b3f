"""Imports point down: no room of fastkin imports one of a higher floor, and no two modules import each other."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent.parent / "src" / "fastkin"

# Modules and packages of the top level from the ground up: the floors of DESIGN.md section 6.
FLOORS = [
    {"errors", "results", "arn", "limits", "_codec", "lambdas", "setting_row"},
    {"formats", "net", "record", "runtime", "status"},
    {"aws", "mqtt"},
    {"delivery", "files", "one_call"},
    {"deadletter"},
    {"config"},
    {"settings"},
    {"producer", "consumer", "service"},
    {"sync_producer"},
    {"emulator"},
    {"bench"},
    {"commands", "testing"},
]
# They know no event loop: what they do can be tried by a call.
PURE = {
    "errors", "results", "arn", "limits", "lambdas", "record", "setting_row", "config", "formats", "settings",
    "consumer.positions", "aws.http_answer", "aws.shards", "aws.signing",
    "deadletter.destination", "deadletter.file", "deadletter.reader",
    "delivery.call_errors", "delivery.gate", "delivery.pacing", "delivery.send_counters", "delivery.spool_errors",
    "delivery.spool_file", "delivery.spool_reserve", "delivery.spool_schema",
    "files.directory", "files.naming", "files.part",
    "mqtt.dialect", "mqtt.frames", "mqtt.reasons", "mqtt.subscriptions",
    "net.names", "net.tcp",
    "service.counters", "service.members", "service.plan", "service.systemd",
    "status.instruments", "status.logs", "status.registry",
}  # fmt: skip


@cache
def modules() -> dict[str, Path]:
    """Dotted name below `fastkin` to its source; a package is its `__init__`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        if parts and parts != ["__main__"]:
            found[".".join(parts)] = path
    return found


@cache
def imports(path: Path) -> frozenset[str]:
    """What a file imports when it runs, also from within a function; imports for types alone do not count."""
    names: set[str] = set()

    class Reader(ast.NodeVisitor):
        def visit_If(self, node: ast.If) -> None:
            if "TYPE_CHECKING" not in ast.dump(node.test):
                self.generic_visit(node)

        def visit_Import(self, node: ast.Import) -> None:
            names.update(alias.name for alias in node.names)

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            module = node.module or ""
            if node.level:
                room = path.relative_to(PACKAGE.parent).parts[: -node.level]
                module = ".".join((*room, *filter(None, [module])))
            found = {f"{module}.{alias.name}" for alias in node.names}
            names.update(found)
            if not all(name.removeprefix("fastkin.") in modules() for name in found):
                names.add(module)  # else a package is only the way to its modules

    Reader().visit(ast.parse(path.read_text()))
    return frozenset(names)


def ours(path: Path) -> set[str]:
    """The modules of fastkin among them, compiled ones too, without the package's name."""
    below = {name.removeprefix("fastkin.") for name in imports(path) if name.startswith("fastkin.")}
    return {name for name in below if name in modules() or name in ("_codec", "mqtt._core")}


def floor_of(name: str) -> int:
    top = name.partition(".")[0]
    for at, floor in enumerate(FLOORS):
        if top in floor:
            return at
    raise AssertionError(f"fastkin.{top} has no floor yet: add it to FLOORS and to DESIGN.md")


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_down(name: str) -> None:
    for other in ours(modules()[name]):
        same = other.partition(".")[0] == name.partition(".")[0]
        assert same or floor_of(other) < floor_of(name), f"{name} imports {other}, which is not below it"


def test_no_two_modules_import_each_other() -> None:
    """Not even in three steps, or from within a function: then it would be one module in two files."""
    after = {name: ours(path) & set(modules()) - {name} for name, path in modules().items()}
    done: set[str] = set()
    circles: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        if name in way:
            circles.add(" -> ".join((*way[way.index(name) :], name)))
        elif name not in done:
            for other in sorted(after[name]):
                walk(other, (*way, name))
            done.add(name)

    for name in sorted(after):
        walk(name, ())
    assert not circles


@pytest.mark.parametrize("name", sorted(n for n in modules() if n in PURE or n.partition(".")[0] in PURE))
def test_the_lower_floors_know_no_event_loop(name: str) -> None:
    assert not imports(modules()[name]) & {"asyncio", "ssl", "uvloop"}
