"""Tokens that say where a list or an iterator goes on."""

from __future__ import annotations

import base64
import binascii

from .rules import ApiError


def pack(*parts: str) -> str:
    return base64.urlsafe_b64encode("\n".join(parts).encode()).decode()


def unpack(token: str, count: int, text: str) -> list[str]:
    try:
        parts = base64.urlsafe_b64decode(token.encode()).decode().split("\n")
    except (binascii.Error, ValueError):
        parts = []
    if len(parts) != count:
        raise ApiError("InvalidArgumentException", text)
    return parts
