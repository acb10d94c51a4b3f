"""Reads the same sources again and again, as if each time were the first.

The AWS SDK and proxies are told by the process's environment alone (AWS_PROFILE, HTTPS_PROXY, ...), so what the env
file says is put there, where nothing stood before. That must not look like the real environment at the next reading.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastkin import settings
from fastkin.settings import envfile
from fastkin.settings.tables import WORKERS_KEYS

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from fastkin.config import Settings


class Reader:
    """What `fastkin run` and `fastkin check` were told to read."""

    def __init__(
        self,
        config: str | None,
        env_file: str | None,
        environ: MutableMapping[str, str] | None = None,
        *,
        workers: int | None = None,
    ) -> None:
        """`workers`: what the command line says, which wins over all others."""
        self._config = config
        self._env_file = env_file
        self._environ = os.environ if environ is None else environ
        self._real = dict(self._environ)  # before anything of the env file came to it
        self._put: dict[str, str] = {}
        self._said = {} if workers is None else {WORKERS_KEYS["count"].variable: str(workers)}

    @property
    def environment(self) -> dict[str, str]:
        """As it was before anything of the env file came to it."""
        return dict(self._real)

    def read(self) -> Settings:
        """SettingsError, and the environment is as it was."""
        return self.read_again()[0]

    def read_again(self) -> tuple[Settings, bool]:
        """Also whether the env file says something else to the AWS SDK or about proxies now."""
        # Read before anything is changed: wrong settings leave the environment as it was.
        made = settings.load(self._config, env=self._real | self._said, env_file=self._env_file)
        put: dict[str, str] = {}
        if self._env_file is not None:
            found = envfile.read(Path(self._env_file))
            put = {name: value for name, (value, _) in found.items() if name not in self._real}
        before, self._put = self._put, put
        # What was taken out of the env file leaves the environment too: else the SDK would see it until the process
        # ends.
        for name in before.keys() - put.keys():
            self._environ.pop(name, None)
        self._environ.update(put)
        return made, _of_the_sdk(before) != _of_the_sdk(put)


def _of_the_sdk(names: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in names.items() if name.startswith("AWS_") or name.lower().endswith("_proxy")}
