"""Reads what the user says, from one TOML file, the environment, or both, and checks it once.

Who wins: FASTKIN_ names in the environment, then those in the env file, then the TOML file, then
the AWS_ names. Without a TOML file the names of the MQTT-to-Kinesis microservice (BROKER, TOPIC,
KIN_STREAM_NAME, ...) are read too, under the FASTKIN_ names. An empty variable counts as unset.

tomllib and dataclasses do all of it: pydantic costs 15 MB a process, and one process per core is
how fastkin is run; msgspec stops at the first wrong value, and here all are reported at once.

    tables.py     the rows of config.py, by table and by name
    sources.py    reads files and variables, and decides who wins
    values.py     one value: is it what its row allows?
    checks.py     all values together, by the rules of rules_*.py: contradictions, what is missing
    arguments.py  the arguments of `Producer`, by the same rows
"""

from __future__ import annotations

import os
from collections.abc import Mapping  # noqa: TC003 - who reads our annotations needs it
from pathlib import Path  # noqa: TC003

from fastkin.config import Settings  # noqa: TC001
from fastkin.settings.values import Report, SettingsError

__all__ = ["SettingsError", "load", "load_settings"]


def load(
    path: str | Path | None = None,
    *,
    env: Mapping[str, str] | None = None,
    env_file: str | Path | None = None,
    login: str | None = None,
) -> Settings:
    """Read and validate; raises SettingsError with everything that is wrong.

    `login` is the login name: a USER variable that equals it is the shell's, not the broker's.
    """
    # imported here: who imports this package for arguments.py reads no files
    from fastkin.settings.checks import check
    from fastkin.settings.sources import Sources

    report = Report()
    return check(Sources(path, os.environ if env is None else env, env_file, login, report), report)


def load_settings(
    path: str | Path | None = None,
    *,
    env: Mapping[str, str] | None = None,
    env_file: str | Path | None = None,
) -> Settings:
    """Read a TOML file, the environment, or both; SettingsError names everything that is wrong."""
    return load(path, env=env, env_file=env_file)
