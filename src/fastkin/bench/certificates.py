"""A certificate for loopback, made for one run: openssl's command makes it, or trustme where that is installed.

Made anew each time, because a key that is shipped expires, and sooner or later somebody trusts it.
"""

from __future__ import annotations

import importlib
import shutil
import ssl
import subprocess
from typing import TYPE_CHECKING

from fastkin.bench.children import HOST, BenchError

if TYPE_CHECKING:
    from fastkin.bench.plan import Plan


def make(plan: Plan) -> None:
    """Write cert.pem, which is its own authority, and key.pem into the folder of the run.

    BenchError: there is nothing here that makes certificates.
    """
    cert, key = plan.path("cert.pem"), plan.path("key.pem")
    program = shutil.which("openssl")
    if program is not None:
        command = [
            program, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-days", "2", "-subj", "/CN=fastkin-bench", "-addext", f"subjectAltName=IP:{HOST},DNS:localhost",
            "-keyout", str(key), "-out", str(cert),
        ]  # fmt: skip
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:  # noqa: S603
            return
    try:
        trustme = importlib.import_module("trustme")
    except ImportError:
        raise BenchError(
            "TLS needs a certificate, and nothing here makes one: install openssl, or pip install trustme"
        ) from None
    authority = trustme.CA()
    issued = authority.issue_cert(HOST, "localhost")
    issued.private_key_pem.write_to_path(str(key))
    for at, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(str(cert), append=at > 0)
    authority.cert_pem.write_to_path(str(cert), append=True)  # clients trust what is in this file


def server_context(plan: Plan) -> ssl.SSLContext:
    """For what listens."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(plan.path("cert.pem"), plan.path("key.pem"))
    return context
