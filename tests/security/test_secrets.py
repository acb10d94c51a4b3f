"""Marked secrets in every place that takes one, then everything that can go wrong, and a look at all that was said."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import orjson
import pytest
import trustme

from fastkin.config import Broker, Tls
from fastkin.mqtt.transport import tls_context
from fastkin.settings import load_settings
from support.fake_http import FakeServer, Link, Request

if TYPE_CHECKING:
    from pathlib import Path

MARK = "s3cr3tMARK"
PASSWORD, USERINFO, KEY_PASSWORD = (f"{MARK}{n}" for n in ("pw", "url", "key"))
SECRET, TOKEN, EXTERNAL = (f"{MARK}{n}" for n in ("sec", "tok", "ext"))
SETTINGS = """
[broker]
url = "{scheme}://user:{userinfo}@127.0.0.1:{port}"
client_id = "c"
connect_timeout_s = 1.0
reconnect_min_s = 0.1
reconnect_max_s = 0.3
{more}
[kinesis]
region = "us-east-1"
endpoint_url = "{endpoint}"
access_key = "AKIDEXAMPLE"
secret_key = "{secret}"
session_token = "{token}"
{role}
[[pipeline]]
id = "a"
topics = ["t/#"]
stream = "s"
dead_letter = "none"
startup_check = "{check}"
"""


def written(folder: Path, port: int, endpoint: str, **given: str) -> Path:
    values = {"scheme": "mqtt", "userinfo": USERINFO, "more": "", "role": "", "check": "describe", **given}
    path = folder / "fastkin.toml"
    path.write_text(SETTINGS.format(port=port, endpoint=endpoint, secret=SECRET, token=TOKEN, **values))
    return path


async def said(folder: Path, *command: str, seconds: float = 5.0, **env: str) -> str:
    """Everything `fastkin ...` writes, ended by SIGTERM when it goes on."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "FASTKIN_"))}
    clean |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(folder), **env}
    return await asyncio.to_thread(_ended, [sys.executable, "-m", "fastkin", *command], clean, folder, seconds)


def _ended(command: list[str], env: dict[str, str], folder: Path, seconds: float) -> str:
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder, text=True
    ) as child:
        try:
            return child.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            child.terminate()
        try:
            return child.communicate(timeout=30)[0]
        finally:
            child.kill()


async def refusing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A broker that says: wrong user name or password, and repeats what it was sent."""
    packet = await reader.read(4096)
    reason = packet[-60:].decode("ascii", "replace").replace("\x00", "").encode()[:100]
    block = b"\x1f" + len(reason).to_bytes(2, "big") + reason
    body = b"\x00\x86" + bytes((len(block),)) + block
    writer.write(bytes((0x20, len(body))) + body)
    await writer.drain()
    writer.close()


async def echoing(link: Link, request: Request) -> None:
    """An endpoint that refuses with everything it was sent in its words."""
    told = f"not authorized: {request.head.decode('latin-1')}"
    link.reply(403, orjson.dumps({"__type": "AccessDeniedException", "message": " ".join(told.split())}))


@pytest.mark.process
async def test_no_secret_is_said_in_any_failure(tmp_path: Path) -> None:
    broker = await asyncio.start_server(refusing, "127.0.0.1", 0)
    port = broker.sockets[0].getsockname()[1]
    certificate = tmp_path / "cert.pem"
    trustme.CA().issue_cert("h").private_key_and_cert_chain_pem.write_to_path(str(certificate))
    tls = f'[broker.tls]\ncert = "{certificate}"\nkey = "{certificate}"\nkey_password = "{KEY_PASSWORD}"'
    role = f'role_arn = "arn:aws:iam::111122223333:role/r"\nexternal_id = "{EXTERNAL}"'
    async with FakeServer(echoing) as server:

        def path(name: str, **given: str) -> str:
            (tmp_path / name).mkdir()
            return str(written(tmp_path / name, port, server.url, **given))

        plain = path("plain")
        texts = await asyncio.gather(
            said(tmp_path, "run", "-v", plain),
            said(tmp_path, "run", "-v", "--log-format", "json", plain, FASTKIN_BROKER_PASSWORD=PASSWORD),
            said(tmp_path, "check", "-v", plain),
            said(tmp_path, "check", "-v", "--connect", plain),
            said(tmp_path, "run", "-v", path("tls", scheme="mqtts", more=tls)),
            said(tmp_path, "run", "-v", path("role", role=role)),
            said(tmp_path, "check", "-v", path("wss", scheme="wss", more="role_arn = 1", role=role)),
        )
    broker.close()
    for text in texts:
        assert text.strip(), "nothing was said at all"
        assert MARK not in text
    assert any("password" in text for text in texts), "the refusal was not reached"


def test_unchecked_certificates_are_said_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broker = Broker(scheme="mqtts", tls=Tls(insecure_skip_verify=True))
    for start in (1, 2):
        tls_context(broker)
        loud = [one for one in caplog.records if one.levelno == logging.WARNING and "NOT CHECKED" in one.getMessage()]
        assert len(loud) == start
    path = written(tmp_path, 1, "http://127.0.0.1:1", scheme="mqtts", more="[broker.tls]\ninsecure_skip_verify = true")
    assert any("insecure_skip_verify" in warning for warning in load_settings(path, env={}).warnings)
