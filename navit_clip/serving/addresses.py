"""Images at web addresses that clients name, if the server is told to fetch them.

A client must not reach through the server what only the server can: loopback, private networks, the
metadata service of a cloud. So the name is resolved once, every address that it has must be public,
and the connection goes to the address that was checked, without redirects.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import urllib3

from navit_clip.serving.limits import RequestError

_SECONDS = urllib3.Timeout(connect=5.0, read=5.0)
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
    kind: type[urllib3.HTTPConnectionPool] = urllib3.HTTPConnectionPool
    secure: dict[str, Any] = {}
    if parts.scheme == "https":  # the certificate is the name's, not the address's
        kind = urllib3.HTTPSConnectionPool
        secure = {"server_hostname": host, "assert_hostname": host}
    target = f"{parts.path or '/'}{'?' * bool(parts.query)}{parts.query}"
    until = time.monotonic() + _ALL_SECONDS
    with kind(ip, port, timeout=_SECONDS, retries=False, **secure) as pool:
        try:
            response = pool.request(
                "GET",
                target,
                headers={"Host": parts.netloc, "Accept": "image/*"},
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
            if response.status != 200:
                raise _refused(address, f"it answered {response.status}")
            data = bytearray()
            while chunk := response.read1(_CHUNK):
                data += chunk
                if len(data) > max_bytes:
                    raise _refused(address, f"it has more than {max_bytes:,} bytes")
                if time.monotonic() > until:
                    raise _refused(address, f"it takes more than {_ALL_SECONDS:.0f} s")
            return bytes(data)
        except (urllib3.exceptions.HTTPError, UnicodeError) as error:
            raise _refused(address, f"it cannot be read ({type(error).__name__})") from error


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
