"""What each further pipeline of `fastkin run` takes of memory: one process with one pipeline, then with many.

    python tests/long/pipelines.py                      1, then 48 pipelines at mosquitto
    python tests/long/pipelines.py --tls                broker and Kinesis behind TLS
    python tests/long/pipelines.py --count 8 --messages 200

Exit code 0: every message of every pipeline was stored, and a further pipeline took no more than 1 MB.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING, Any

from stand import MIB, Memory, Report, service, wait_for, workplace

from fastkin.config import Broker, Tls
from fastkin.emulator import Emulator
from fastkin.mqtt.publisher import Publisher
from faults.authority import Authority
from support.servers import mosquitto

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MB = 1_000_000
SETTINGS = """
[broker]
url = "{scheme}://{host}:{port}"
client_id = "many"
{tls}
[kinesis]
endpoint_url = "{url}"
region = "us-east-1"
{bundle}
"""
PIPELINE = """
[[pipeline]]
id = "p{n}"
stream = "s{n}"
topics = ["plant/{n}/#"]
dead_letter = "{dead}"
"""


def bundle(directory: Path, authority: Authority) -> Path:
    """The machine's authorities and ours: a context that trusts few is smaller than those of real life."""
    import certifi

    path = directory / "bundle.pem"
    path.write_bytes(certifi.contents().encode() + authority.path.read_bytes())
    return path


@contextlib.contextmanager
def broker(directory: Path, authority: Authority | None) -> Iterator[Any]:
    conf = "max_inflight_messages 1000\n"
    if authority is not None:
        cert = authority.ca.issue_cert("localhost")
        cert.private_key_pem.write_to_path(str(directory / "key.pem"))
        cert.cert_chain_pems[0].write_to_path(str(directory / "cert.pem"))
        conf += f"certfile {directory}/cert.pem\nkeyfile {directory}/key.pem\n"
    with mosquitto(conf, anonymous=True) as server:
        yield server


async def case(count: int, messages: int, *, tls: bool, report: Report) -> tuple[int, bool]:
    """RSS when all is stored, and whether it is."""
    with workplace(None) as directory:
        authority = None
        trusted = ""
        if tls:
            authority = Authority(directory)
            authority.show("localhost", "127.0.0.1")
            trusted = str(bundle(directory, authority))
        context = authority.context if authority is not None else None
        streams = {f"s{n}": 1 for n in range(count)}
        with broker(directory, authority) as server:
            async with Emulator(streams, ssl_context=context, host="127.0.0.1") as emulator:
                toml = SETTINGS.format(
                    scheme="mqtts" if tls else "mqtt", host="localhost" if tls else server.host, port=server.port,
                    url=emulator.url, tls=f'tls.ca = "{trusted}"' if tls else "",
                    bundle=f'ca_bundle = "{trusted}"' if tls else "",
                ) + "".join(PIPELINE.format(n=n, dead=directory / "dead.jsonl") for n in range(count))  # fmt: skip
                with service(directory, toml) as run, Memory(run) as memory:
                    connected = lambda: run.log().count(" subscribed ") == count  # noqa: E731
                    await asyncio.to_thread(wait_for, connected, 60, f"{count} pipelines subscribe")
                    idle = await asyncio.to_thread(memory.settle)
                    at = Broker(scheme="mqtts" if tls else "mqtt", host="localhost" if tls else server.host,
                                port=server.port, tls=Tls(ca=trusted or None))  # fmt: skip
                    async with Publisher(at) as publisher:
                        for i in range(messages):
                            for n in range(count):
                                await publisher.publish(f"plant/{n}/m", b'{"n":%d,"i":%d,"t":20.5}' % (n, i), 1)
                        await publisher.drain()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(60):
                            while any(len(emulator.stored(name)) < messages for name in streams):
                                await asyncio.sleep(0.1)
                    await asyncio.sleep(1)
                    rss = await asyncio.to_thread(memory.settle)
                    whole = all(len(emulator.stored(name)) == messages for name in streams)
                    report.note(f"{count:3} pipelines: idle {idle / MIB:.1f} MiB, after {messages} messages each"
                                f" {rss / MIB:.1f} MiB, all stored: {whole}")  # fmt: skip
                    return rss, whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--messages", type=int, default=100, help="of each pipeline")
    parser.add_argument("--tls", action="store_true", help="broker and Kinesis behind TLS")
    args = parser.parse_args()
    report = Report(f"memory of {args.count} pipelines in one process{', TLS' if args.tls else ''}")
    one, good = asyncio.run(case(1, args.messages, tls=args.tls, report=report))
    many, all_good = asyncio.run(case(args.count, args.messages, tls=args.tls, report=report))
    each = (many - one) / (args.count - 1)
    report.claim(good and all_good, "every message of every pipeline was stored, once")
    report.claim(each <= MB, f"a further pipeline takes {each / MB:.2f} MB (bound 1.00)")
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
