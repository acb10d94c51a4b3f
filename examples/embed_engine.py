"""The whole service inside another asyncio program, which also watches its counters.

python examples/embed_engine.py examples/fastkin.toml
"""

import asyncio
import sys

import fastkin


async def main(path: str) -> None:
    async with fastkin.Engine(fastkin.load_settings(path)) as engine:
        while True:
            await asyncio.sleep(5)
            for name, stats in engine.stats().items():
                print(name, "stored", stats["stored"], "waiting", stats["in_flight"])


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
