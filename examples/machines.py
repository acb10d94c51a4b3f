"""What spark-protocol-aws-kinesis writes of machines, for Producer.put: a record of each whole reading, and metadata.

    machines = Machines(socket.gethostname(), configured)
    for key, data in machines.value("press-1", "temperature", 21.5, time):
        await producer.put(data, partition_key=key)
    for key, data in machines.configure(configured_now):  # metadata of what has changed
        await producer.put(data, partition_key=key)

A machine that is not enabled, or has `publishDisabled`, writes nothing. Each machine has its own unfinished reading, so
machines that report at the same time do not disturb each other.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Put = tuple[str, bytes]  # partition key and data


class Machines:
    def __init__(self, host: str, machines: Mapping[str, Any]) -> None:
        """`machines`: name -> {"info", "settings": {"model": {"enable", "publishDisabled"}}, "variables"}. Of these no
        metadata is written: only of what changes from here on."""
        self._host = host
        self._known = _published(machines)
        self._open: dict[str, dict[str, Any]] = {}  # readings that are not whole yet

    def configure(self, machines: Mapping[str, Any]) -> list[Put]:
        """All machines as they are now: the metadata of those that are new or differ from what was known."""
        before, self._known = self._known, _published(machines)
        changed = [name for name, known in self._known.items() if before.get(name) != known]
        # A reading that was begun with other variables would never be whole, or lack some.
        self._open = {
            name: reading
            for name, reading in self._open.items()
            if name in self._known and before[name]["variables"].keys() == self._known[name]["variables"].keys()
        }
        return [self._put("metadata", name, self._known[name]) for name in changed]

    def value(self, machine: str, variable: str, value: Any, time: Any) -> list[Put]:
        """One value of a machine. The record, when all variables of the machine have one now: `time` is that of the
        first. A variable that reports again before that replaces its value."""
        known = self._known.get(machine)
        if known is None or variable not in known["variables"]:
            return []
        reading = self._open.setdefault(machine, {"time": time, "values": {}})
        reading["values"][variable] = value
        if reading["values"].keys() != known["variables"].keys():
            return []
        del self._open[machine]
        attributes = {
            name: described | {"value": reading["values"][name]} for name, described in known["variables"].items()
        }
        return [self._put("record", machine, {"machine": machine, "time": reading["time"], "attributes": attributes})]

    def _put(self, kind: str, machine: str, data: Any) -> Put:
        return f"{self._host}/{machine}", orjson.dumps({"type": kind, "host": self._host, "data": data})


def _published(machines: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Metadata of the machines that write, by name."""
    return {
        machine["info"]["name"]: {"info": machine["info"], "variables": dict(_variables(machine, machines))}
        for machine in copy.deepcopy(dict(machines)).values()
        if "info" in machine
        and machine["settings"]["model"].get("enable")
        and not machine["settings"]["model"].get("publishDisabled")
    }


def _variables(machine: Mapping[str, Any], machines: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Those of a virtual machine say which variable of which machine they are made of."""
    for variable in _listed(machine):
        if machine["info"].get("hpl") == "virtual":
            source = variable["srcVariables"][0]
            other = next(each for each in machines.values() if each["info"]["name"] == source["srcMachine"])
            variable["referencedMachineInfo"] = other["info"]
            variable["referencedMachineConfig"] = other["settings"]["model"]
            for each in _listed(other):  # none: JSON.stringify leaves out what is undefined
                if each["name"] == source["srcVariable"]:
                    variable["referencedVariable"] = each
        yield variable["name"], variable


def _listed(machine: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Variables come as a list, or by name."""
    variables = machine["variables"]
    return list(variables.values() if isinstance(variables, dict) else variables)
