"""TLS: the same on every Python, files that are renewed while we run, and a cure that fits the cause."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import logging
import os
import ssl
from typing import TYPE_CHECKING, Any, Self

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fastkin.aws.client import tls_context as kinesis_context
from fastkin.aws.native import KinesisClient
from fastkin.config import Broker, Kinesis, Tls
from fastkin.errors import Action, KinesisError, MqttError
from fastkin.mqtt.publisher import Publisher
from fastkin.mqtt.transport import renewed_tls
from fastkin.mqtt.transport import tls_context as broker_context
from support.fake_broker import Peer, Rig, until
from support.fake_http import FakeServer, Link, Request, on_both_loops

if TYPE_CHECKING:
    from pathlib import Path


class Authority:
    """A private authority as many plants have one: no key usage, no identifiers."""

    def __init__(self, *, constraints: bool = True) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "plant")])
        extensions = [(x509.BasicConstraints(ca=True, path_length=None), True)] if constraints else []
        self.certificate = self._sign(self.name, self.key, extensions)

    def _sign(self, name: x509.Name, key: Any, extensions: Any, days: tuple[int, int] = (-1, 30)) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days=days[0]))
            .not_valid_after(now + datetime.timedelta(days=days[1]))
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical=critical)
        return builder.sign(self.key, hashes.SHA256())

    def write(self, path: Path) -> Path:
        path.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
        return path

    def leaf(
        self, directory: Path, *, days: tuple[int, int] = (-1, 30), host: str = "127.0.0.1", usage: Any = None
    ) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        try:
            name: Any = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            name = x509.DNSName(host)
        extensions: list[Any] = [(x509.SubjectAlternativeName([name]), False)]
        if usage is not None:
            extensions.append((x509.ExtendedKeyUsage([usage]), False))
        made = self._sign(x509.Name([]), key, extensions, days)
        cert, secret = directory / "leaf.pem", directory / "leaf.key"
        cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
        secret.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return cert, secret

    def server(self, directory: Path, **more: Any) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.leaf(directory, **more))
        return context


def replace(path: Path, data: bytes) -> None:
    """As certificate managers do it."""
    new = path.with_suffix(".new")
    new.write_bytes(data)
    os.replace(new, path)


async def echo(link: Link, request: Request) -> None:
    link.reply(200, b"{}", {"Connection": "close"})


def client(url: str, bundle: Path) -> KinesisClient:
    return KinesisClient(
        Kinesis(stream="s", region="eu-west-1", endpoint_url=url, access_key="A", secret_key="S", ca_bundle=str(bundle))
    )


@pytest.fixture
def as_in_3_13(monkeypatch: pytest.MonkeyPatch) -> None:
    """create_default_context() as Python 3.13 made it."""
    true = ssl.create_default_context

    def strict(*arguments: Any, **options: Any) -> ssl.SSLContext:
        context = true(*arguments, **options)
        context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
        return context

    monkeypatch.setattr(ssl, "create_default_context", strict)


@pytest.mark.usefixtures("as_in_3_13")
@on_both_loops
async def test_a_private_authority_is_good_enough_for_kinesis_on_any_python(tmp_path: Path) -> None:
    authority = Authority()
    async with FakeServer(echo, tls=authority.server(tmp_path)) as server:
        one = client(server.url, authority.write(tmp_path / "ca.pem"))
        await one.start()
        assert await one.call("PutRecords", b"{}") == b"{}"
        await one.close()


class TlsBroker:
    """Takes CONNECT and says yes, over TLS."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        self.tls = tls

    async def __aenter__(self) -> Self:
        self._links: list[asyncio.StreamWriter] = []
        self._server = await asyncio.start_server(self._client, "127.0.0.1", 0, ssl=self.tls)
        self.host, self.port = self._server.sockets[0].getsockname()[:2]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        await asyncio.sleep(0.02)

    def cut(self) -> None:
        for writer in self._links:
            writer.transport.abort()
        self._links.clear()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._links.append(writer)
        peer = Peer(reader, writer, 0)
        try:
            await peer.connect()
            await peer.subscribe()
            await peer.until_closed()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError, AssertionError):
            pass
        finally:
            writer.close()


@pytest.mark.usefixtures("as_in_3_13")
@on_both_loops
async def test_a_private_authority_is_good_enough_for_a_broker_on_any_python(tmp_path: Path) -> None:
    authority = Authority()
    async with TlsBroker(authority.server(tmp_path)) as broker:
        tls = Tls(ca=str(authority.write(tmp_path / "ca.pem")))
        publisher = Publisher(Broker(scheme="mqtts", host=broker.host, port=broker.port, tls=tls))
        await publisher.connect()
        await publisher.close()


@pytest.mark.parametrize("strict", [False, True])
def test_the_flags_do_not_depend_on_the_version(request: pytest.FixtureRequest, strict: bool) -> None:
    if strict:
        request.getfixturevalue("as_in_3_13")
    for context in (kinesis_context(Kinesis(stream="s")), broker_context(Broker(scheme="mqtts", host="h"))):
        assert context is not None
        assert not context.verify_flags & ssl.VERIFY_X509_STRICT
        assert context.verify_flags & ssl.VERIFY_X509_PARTIAL_CHAIN
        assert context.check_hostname
        assert context.verify_mode is ssl.CERT_REQUIRED


# -- renewed


def test_what_says_the_same_of_tls_has_one_context(tmp_path: Path) -> None:
    """A context with a system's authorities takes 0.7 MB, and 48 pipelines had two each."""
    ca = Authority().write(tmp_path / "ca.pem")
    one, same, other = (
        renewed_tls(Broker(scheme="mqtts", client_id=name, tls=Tls(ca=str(ca), insecure_skip_verify=skip)))
        for name, skip in (("a", False), ("b", False), ("c", True))
    )
    assert one is not None
    assert same is not None
    assert other is not None
    assert one.context() is same.context()
    assert other.context() is not one.context()
    assert other.context().verify_mode is ssl.CERT_NONE
    assert one.context().verify_mode is ssl.CERT_REQUIRED
    before = one.context()
    replace(ca, Authority().write(tmp_path / "new.pem").read_bytes())
    assert one.context() is not before
    assert one.context() is same.context()


@on_both_loops
async def test_a_renewed_authority_of_kinesis_is_taken_at_the_next_connection(tmp_path: Path) -> None:
    old, new = Authority(), Authority()
    bundle = old.write(tmp_path / "ca.pem")
    async with (
        FakeServer(echo, tls=old.server(tmp_path)) as first,
        FakeServer(echo, tls=new.server(tmp_path)) as second,
    ):
        one = client(first.url, bundle)
        await one.start()
        assert await one.call("PutRecords", b"{}") == b"{}"
        # the same endpoint, with the certificate of another authority
        (pool,) = one._pools.values()
        pool.port = second.port
        with pytest.raises(KinesisError):
            await one.call("PutRecords", b"{}")
        replace(bundle, new.write(tmp_path / "new.pem").read_bytes())
        assert await one.call("PutRecords", b"{}") == b"{}"
        await one.close()


@on_both_loops
async def test_a_renewed_authority_of_a_broker_is_taken_at_the_next_connection(tmp_path: Path) -> None:
    old, new = Authority(), Authority()
    ca = old.write(tmp_path / "ca.pem")
    tls = old.server(tmp_path)
    async with TlsBroker(tls) as broker, Rig(broker, scheme="mqtts", tls=Tls(ca=str(ca))) as rig:
        tls.load_cert_chain(*new.leaf(tmp_path))  # for connections from now on
        broker.cut()
        await until(lambda: rig.subscriber.last_error and "certificate" in rig.subscriber.last_error)
        replace(ca, new.write(tmp_path / "new.pem").read_bytes())
        await until(lambda: rig.subscriber.traffic.connects >= 2 and rig.subscriber.connected.is_set(), 10.0)


@on_both_loops
async def test_a_half_written_file_leaves_the_former_one_in_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority()
    ca = authority.write(tmp_path / "ca.pem")
    whole = ca.read_bytes()
    async with TlsBroker(authority.server(tmp_path)) as broker:
        rig = Rig(broker, scheme="mqtts", tls=Tls(ca=str(ca)))
        async with rig:
            for half in (b"", whole[: len(whole) // 2], b"not PEM", whole):
                ca.write_bytes(half)
                connects = rig.subscriber.traffic.connects
                broker.cut()
                await until(
                    lambda n=connects: rig.subscriber.traffic.connects > n and rig.subscriber.connected.is_set(), 10.0
                )
            for _ in range(2):
                ca.unlink(missing_ok=True)
                connects = rig.subscriber.traffic.connects
                broker.cut()
                await until(
                    lambda n=connects: rig.subscriber.traffic.connects > n and rig.subscriber.connected.is_set(), 10.0
                )
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING and "TLS files" in record.msg]
    assert len(warned) == 4  # each change once
    assert all(str(ca) in record.getMessage() for record in warned)


@on_both_loops
async def test_a_renewed_client_certificate_is_shown_at_the_next_connection(tmp_path: Path) -> None:
    authority = Authority()
    ca = authority.write(tmp_path / "ca.pem")
    (tmp_path / "client").mkdir()
    (tmp_path / "next").mkdir()
    cert, key = authority.leaf(tmp_path / "client")
    tls = authority.server(tmp_path)
    tls.verify_mode = ssl.CERT_REQUIRED
    tls.load_verify_locations(ca)
    shown: list[int] = []

    class Watching(TlsBroker):
        async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            told = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            shown.append(x509.load_der_x509_certificate(told).serial_number)
            await super()._client(reader, writer)

    async with Watching(tls) as broker:
        settings = Tls(ca=str(ca), cert=str(cert), key=str(key))
        async with Rig(broker, scheme="mqtts", tls=settings) as rig:
            new_cert, new_key = authority.leaf(tmp_path / "next")
            replace(cert, new_cert.read_bytes())  # the key is still the old one: they do not belong together
            broker.cut()
            await until(lambda: rig.subscriber.traffic.connects == 2 and rig.subscriber.connected.is_set(), 10.0)
            replace(key, new_key.read_bytes())
            broker.cut()
            await until(lambda: rig.subscriber.traffic.connects == 3 and rig.subscriber.connected.is_set(), 10.0)
    assert shown[0] == shown[1] != shown[2]
    assert shown[2] == x509.load_pem_x509_certificate(new_cert.read_bytes()).serial_number


# -- the cure


CASES: dict[str, tuple[dict[str, Any], bool, str]] = {
    "another name": ({"host": "other.example.com"}, True, "is for another name"),
    "expired": ({"days": (-30, -1)}, True, "has expired"),
    "not yet valid": ({"days": (2, 30)}, True, "is not valid yet"),
    "not for servers": ({"usage": x509.ExtendedKeyUsageOID.CLIENT_AUTH}, True, "is not one for servers"),
    "another authority": ({}, False, "does not hold the authority that signed it"),
}


@on_both_loops
@pytest.mark.parametrize("case", CASES)
async def test_the_cure_for_a_refused_certificate_fits(case: str, tmp_path: Path) -> None:
    more, right, words = CASES[case]
    authority = Authority()
    ca = (authority if right else Authority()).write(tmp_path / "ca.pem")
    tls = authority.server(tmp_path, **more)
    async with FakeServer(echo, tls=tls) as server:
        one = client(server.url, ca)
        await one.start()
        with pytest.raises(KinesisError) as caught:
            await one.call("PutRecords", b"{}")
        await one.close()
    assert caught.value.code == "CertificateNotTrusted"
    assert caught.value.action is Action.OPERATOR
    assert words in str(caught.value)
    assert "set ca_bundle" not in str(caught.value)
    async with TlsBroker(tls) as broker:
        for scheme in ("mqtts", "wss"):
            settings = Broker(scheme=scheme, host=broker.host, port=broker.port, path="/mqtt", tls=Tls(ca=str(ca)))
            with pytest.raises(MqttError) as said:
                await Publisher(settings).connect()
            assert words in str(said.value)
            assert "set ca " not in str(said.value)
