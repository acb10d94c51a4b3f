"""The inputs worth keeping, one packed file per target: tests/corpus/fuzz/TARGET.bin.

A file is a row of inputs, each behind its length as four bytes, big-endian, shortest input first. What a
fuzzer found stands beside it as a file of its own, tests/corpus/fuzz/TARGET-NAME.bin, and is never thinned out.
"""

from __future__ import annotations

import os
from pathlib import Path

# ci/variant runs a copy of the tree; what is kept goes to the tree itself
FOLDER = Path(os.environ.get("FASTKIN_CORPUS") or Path(__file__).resolve().parent.parent / "corpus" / "fuzz")


def packed(target: str) -> list[bytes]:
    path = FOLDER / f"{target}.bin"
    if not path.exists():
        return []
    data = path.read_bytes()
    inputs, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        inputs.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    assert at == len(data), path
    return inputs


def findings(target: str) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in sorted(FOLDER.glob(f"{target}-*.bin"))}


def inputs(target: str) -> list[bytes]:
    """Everything a run starts from."""
    return packed(target) + list(findings(target).values())


def pack(target: str, kept: list[bytes]) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows = sorted(set(kept), key=lambda one: (len(one), one))
    (FOLDER / f"{target}.bin").write_bytes(b"".join(len(one).to_bytes(4, "big") + one for one in rows))
