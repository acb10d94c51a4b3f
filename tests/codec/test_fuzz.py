"""A short run of the mutations; ci/variant runs many more against the sanitizers."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "fuzz"))

import mutate_codec


def test_mutations() -> None:
    assert mutate_codec.run(20_000, seed=5, quiet=True) == 20_000
