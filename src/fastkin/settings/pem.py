"""Is it a PEM file with a certificate, or with a key? Whether they belong together shows when they are loaded."""

from __future__ import annotations

import re
from pathlib import Path

_MOST_BYTES = 4 << 20  # all authorities of a system are 0.2 MB


def holds(path: str, what: str, *, strict: bool = False) -> bool:
    """Is there a block of this kind: CERTIFICATE, PRIVATE KEY? `strict`: OSError when it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            text = file.read(_MOST_BYTES)
    except OSError:
        if strict:
            raise
        return False
    kind = rb"(?:TRUSTED |X509 )?" if what == "CERTIFICATE" else rb"(?:[A-Z]+ )?"
    block = rb"-----BEGIN (" + kind + what.encode() + rb")-----\s[^-]+-----END \1-----"
    return re.search(block, text) is not None


def problem(path: str, what: str) -> tuple[str, str] | None:
    """What is wrong with a file that should hold such a block, and the cure."""
    try:
        good = holds(path, what, strict=True)
    except OSError as error:
        return f"{path}: {error.strerror}", "check path and permissions"
    if good:
        return None
    return f"{path} has no {what.lower()} in PEM form", f"it needs the lines BEGIN and END {what}"
