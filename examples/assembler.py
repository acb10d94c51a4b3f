"""Puts single values of machines together to whole records, ready for Producer.put.

    assembler = Assembler({"press-1": ["temperature", "count"]})
    for record in assembler.add("press-1", "temperature", 21.5):
        await producer.put(json.dumps(record), partition_key=record["machine"])

Every machine has its own unfinished record, so values of machines that report at the same time do not disturb each
other. A record is handed out when it has all variables of its machine. Nothing is thrown away:
when a variable reports again before the record is whole, or more machines report than may be held, the unfinished
one is handed out too, with "complete": False; with `incomplete=False` it is not, and counts in `discarded`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class Assembler:
    def __init__(
        self, variables: Mapping[str, Iterable[str]], *, max_machines: int = 10_000, incomplete: bool = True
    ) -> None:
        self._variables = {machine: frozenset(names) for machine, names in variables.items()}
        self._max = max_machines
        self._incomplete = incomplete
        self.discarded = 0  # unfinished records that were not handed out
        self._open: dict[str, dict[str, Any]] = {}  # oldest first

    def __len__(self) -> int:
        """Unfinished records."""
        return len(self._open)

    def add(self, machine: str, variable: str, value: Any) -> list[dict[str, Any]]:
        """Take one value; returns the records that are ready now. KeyError for an unknown machine or variable."""
        names = self._variables[machine]
        if variable not in names:
            raise KeyError(f"{machine} has no variable {variable}")
        ready: list[dict[str, Any]] = []
        if variable in self._open.get(machine, {}):
            ready += self._unfinished(machine)
        values = self._open.setdefault(machine, {})
        values[variable] = value
        if values.keys() == names:
            ready.append(self._take(machine))
        elif len(self._open) > self._max:
            ready += self._unfinished(next(iter(self._open)))
        return ready

    def flush(self) -> list[dict[str, Any]]:
        """What is unfinished, before the program ends."""
        return [record for machine in list(self._open) for record in self._unfinished(machine)]

    def _unfinished(self, machine: str) -> list[dict[str, Any]]:
        record = self._take(machine)
        if self._incomplete:
            return [record]
        self.discarded += 1
        return []

    def _take(self, machine: str) -> dict[str, Any]:
        values = self._open.pop(machine)
        return {"machine": machine, "complete": values.keys() == self._variables[machine], "values": values}
