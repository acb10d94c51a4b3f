"""A short run of the mutation driver; the long one belongs to the sanitizer build."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fuzz.mutate_mqtt import run

if TYPE_CHECKING:
    from pathlib import Path


def test_mutations(tmp_path: Path) -> None:
    broken, messages = run(40_000, seed=7, keep=tmp_path / "last")
    # neither all refused nor all taken: the mutations reach behind the header
    assert broken > 2_000
    assert messages > 2_000
    assert run(5_000, seed=8) == run(5_000, seed=8)
