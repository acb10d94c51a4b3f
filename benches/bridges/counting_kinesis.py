"""A Kinesis that only counts, as a process: prints its address.

With the argument "routed" it also tells the true shard of each record, which aiokpl insists on. With "keep" it
is a whole emulated stream that can be read back.
"""

from __future__ import annotations

import asyncio
import sys

import uvloop

from fastkin.emulator import Emulator


async def main() -> None:
    options: dict[str, object] = {"count_only": True}
    if "keep" in sys.argv or "routed" in sys.argv:
        options = {"limits": False, "keep": "all" if "keep" in sys.argv else "count"}
    async with Emulator({"bench": 4}, **options) as emulator:
        print(emulator.url, flush=True)
        await asyncio.Event().wait()


uvloop.run(main())
