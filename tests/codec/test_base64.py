"""Base64 by every kernel the CPU has, MD5, and what the vector kernels leave behind."""

from __future__ import annotations

import base64
import hashlib
import random
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from fastkin import _codec

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(params=["scalar", "avx2", "vbmi"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _codec.simd()
    if not _codec._use_simd(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    assert _codec.simd() == request.param
    yield request.param
    assert _codec._use_simd(before)


def test_every_length(kernel: str) -> None:
    draw = random.Random(7)
    for n in [*range(300), 1000, 4095, 4096, 4097, 100_001]:
        data = draw.randbytes(n)
        assert _codec._base64(data) == base64.b64encode(data), (kernel, n)


def test_every_byte_in_every_place(kernel: str) -> None:
    for shift in range(3):
        data = b"\0" * shift + bytes(range(256)) * 3
        assert _codec._base64(data) == base64.b64encode(data)
    assert _codec._base64(bytearray(b"\xff" * 77)) == base64.b64encode(b"\xff" * 77)


def test_unknown_kernel() -> None:
    with pytest.raises(ValueError):
        _codec._use_simd("neon")


@pytest.mark.process
def test_vector_kernels_leave_the_vector_unit_clean() -> None:
    """Dirty upper halves slow SHA-256 down by a third: every way out goes through vzeroupper."""
    objdump = shutil.which("objdump")
    if objdump is None or _codec.simd() == "scalar":
        pytest.skip("needs objdump and a CPU with vectors")
    listing = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", _codec.__file__], check=True, capture_output=True, text=True
    ).stdout
    for name in ("fk_b64_avx2", "fk_b64_vbmi"):
        match = re.search(rf"<{name}>:\n(.*?)\n\n", listing, re.DOTALL)
        assert match is not None, name
        clean = False
        leaves = 0
        for line in match[1].splitlines():
            words = line.split("\t")[-1].split()
            if words[0] == "vzeroupper":
                clean = True
            elif re.search(r"%[yz]mm", line):
                clean = False
            elif words[0] == "ret" or (words[0] == "jmp" and name not in line):
                leaves += 1
                assert clean, f"{name} leaves with dirty upper halves"
        assert leaves, name


@pytest.mark.parametrize("n", [0, 1, 3, 54, 55, 56, 57, 63, 64, 65, 119, 120, 128, 1000, 65_537])
def test_md5(n: int) -> None:
    data = random.Random(n).randbytes(n)
    assert _codec._md5(data) == hashlib.md5(data).digest()
