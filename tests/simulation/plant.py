"""Faults on purpose: the product with one patch of planted/ in it, in a copy, which the seeds must find.

To add one: a unified diff of src (paths `a/fastkin/...`) under planted/, with a line above it that says what is wrong.
A patch of compiled parts is built in the copy, which takes a minute.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PATCHES = Path(__file__).parent / "planted"
COMPILED = (".pxi", ".pyx", ".pxd", ".h")


def names(*, compiled: bool) -> list[str]:
    return sorted(each.stem for each in PATCHES.glob("*.patch") if _compiled(each) is compiled)


def _compiled(patch: Path) -> bool:
    touched = [line.split()[1] for line in patch.read_text().splitlines() if line.startswith("+++ ")]
    return any(name.endswith(COMPILED) for name in touched)


@contextmanager
def planted(name: str) -> Iterator[Path]:
    """A directory that holds `fastkin` with the fault in it, to stand first in PYTHONPATH."""
    patch = PATCHES / f"{name}.patch"
    with tempfile.TemporaryDirectory(prefix="fastkin-planted-") as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src" / "fastkin", source / "fastkin", ignore=shutil.ignore_patterns("__pycache__"))
        subprocess.run(["patch", "-p1", "-s", "-d", source, "-i", patch], check=True)
        if _compiled(patch):
            for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
                shutil.copy(ROOT / part, folder)
            subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=folder, check=True)
        yield source


def find(name: str, seeds: str, jobs: int) -> int:
    """0 when the seeds find it."""
    with planted(name) as source:
        path = os.pathsep.join((str(source), str(ROOT / "tests")))
        command = [sys.executable, "-m", "simulation.run", "--seeds", seeds, "--jobs", str(jobs), "--findings", "1"]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
        )
    print(done.stdout, end="")
    if done.returncode == 1 and "replay:" in done.stdout:
        return 0
    print(f"what was planted is not found: {name}\n{done.stderr}")
    return 1
