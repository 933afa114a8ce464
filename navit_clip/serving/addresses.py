"""Images at web addresses that clients name, if the server is told to fetch them.

A client must not reach through the server what only the server can: loopback, private networks, the
metadata service of a cloud. So the name is resolved once, every address that it has must be public,
and the connection goes to the address that was checked, without redirects.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from threading import Timer
from urllib.parse import urlsplit

from navit_clip.serving.limits import RequestError

_SECONDS = 5.0  # to connect, and between one piece and the next
_ALL_SECONDS = 20.0
_CHUNK = 1 << 16
_PORTS = {"http": 80, "https": 443}


def fetch(address: str, max_bytes: int) -> bytes:
    """The file at a public address.

    Raises:
        RequestError: 400 if the address is not public, or there is no such file.
    """
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _refused(address, str(error)) from error
    if parts.scheme not in _PORTS or not host or parts.username or parts.password:
        raise _refused(address, "expected http or https, a host and no password")
    port = port or _PORTS[parts.scheme]
    ip = _public_ip(address, host, port)
    target = f"{parts.path or '/'}{'?' * bool(parts.query)}{parts.query}"
    try:
        with _connection(ip, port, host if parts.scheme == "https" else None) as connection:
            headers = {"Host": parts.netloc, "Accept": "image/*", "Connection": "close"}
            connection.request("GET", target, headers=headers)
            data = bytearray()
            with connection.getresponse() as response:
                if response.status != 200:
                    raise _refused(address, f"it answered {response.status}")
                while chunk := response.read1(_CHUNK):
                    data += chunk
                    if len(data) > max_bytes:
                        raise _refused(address, f"it has more than {max_bytes:,} bytes")
                if response.length:
                    raise EOFError
        return bytes(data)
    except TimeoutError as error:
        raise _refused(address, "it takes too long") from error
    # ValueError: what may not stand in a request, in the address.
    except (OSError, HTTPException, EOFError, ValueError) as error:
        raise _refused(address, f"it cannot be read ({type(error).__name__})") from error


@contextmanager
def _connection(ip: str, port: int, name: str | None) -> Iterator[HTTPConnection]:
    """A connection that is cut when its time is over: a header may come a byte at a time.

    Args:
        ip: Where it goes.
        port: Likewise.
        name: Of the host, for its certificate; None without TLS.

    Raises:
        TimeoutError: If its time was over before the end.
        OSError: If there is none.
    """
    late = False

    def cut() -> None:
        nonlocal late
        late = True
        with suppress(OSError):
            # Not TLS's own, which would take the connection from under who reads it.
            socket.socket.shutdown(link, socket.SHUT_RDWR)

    connection = HTTPConnection(ip, port)
    link = socket.create_connection((ip, port), _SECONDS)
    timer = Timer(_ALL_SECONDS, cut)
    timer.daemon = True
    timer.start()
    try:
        if name is not None:  # the certificate is the name's, not the address's
            tls = ssl.create_default_context()
            secure = tls.wrap_socket(link, server_hostname=name, do_handshake_on_connect=False)
            link = secure
            secure.do_handshake()
        connection.sock = link
        yield connection
        if late:  # else what was cut looks whole
            raise TimeoutError
    except (OSError, HTTPException, EOFError) as error:
        if late:
            raise TimeoutError from error
        raise
    finally:
        timer.cancel()
        link.close()


def _public_ip(address: str, host: str, port: int) -> str:
    """The first of a name's addresses; all must be public. IPv4 alone.

    IPv6 has too many spellings of private IPv4 addresses.
    """
    try:
        found = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _refused(address, "no such host") from error
    ips = [ipaddress.ip_address(entry[4][0]) for entry in found]
    if not all(ip.is_global and not ip.is_multicast for ip in ips):
        raise _refused(address, "it is not a public address")
    return str(ips[0])


def _refused(address: str, reason: str) -> RequestError:
    return RequestError(400, "address", f"cannot fetch {address[:200]!r}: {reason}")
