"""Loopback for clients that know only a service's public name: their proxy leads every name here, over TLS.

They are told by what a company's network would tell them: an HTTP proxy, and the roots of certificates that they trust.
"""

import contextlib
import datetime
import socket
import threading
from collections.abc import Iterator

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa


def certificate(*hosts: str) -> tuple[bytes, bytes]:
    """A private key and a certificate for these names that is its own root, both PEM."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    day = datetime.timedelta(days=1)
    now = datetime.datetime.now(datetime.timezone.utc)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private, signed.public_bytes(serialization.Encoding.PEM)


@contextlib.contextmanager
def all_led_to(port: int) -> Iterator[str]:
    """The URL of an HTTP proxy that takes every CONNECT for one to this port of the loopback."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        threading.Thread(target=_lead, args=(proxy, port), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{proxy.getsockname()[1]}"
        finally:
            proxy.shutdown(socket.SHUT_RDWR)  # wakes the thread, which closing alone does not


def _lead(proxy: socket.socket, port: int) -> None:
    while True:
        try:
            client, _ = proxy.accept()
        except OSError:
            return
        asked = b""
        while b"\r\n\r\n" not in asked:
            asked += client.recv(4096)
        target = socket.create_connection(("127.0.0.1", port))
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for one, other in ((client, target), (target, client)):
            threading.Thread(target=_pump, args=(one, other), daemon=True).start()


def _pump(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := one.recv(65536):
            other.sendall(data)
        other.shutdown(socket.SHUT_WR)
