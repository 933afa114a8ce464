"""A web server on this machine that misbehaves as asked, for tests of remote shards."""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """Files of a web server, how it treats who asks for them, and who did.

    `cut` says after how many bytes of its body a connection breaks, by the number of the request,
    and None where it does not; `stall` in the same way when nothing more comes.
    """

    files: dict[str, bytes]
    ranges: bool = True
    length: bool = True
    chunked: bool = False
    headers: dict[str, str] = field(default_factory=lambda: {"ETag": '"1"'})
    heeds_if_range: bool = True
    statuses: list[int] = field(default_factory=list)
    refusal: dict[str, str] = field(default_factory=dict)  # headers beside `statuses`
    redirect: bool = False
    moved_to: str = ""  # another host to redirect to
    tokens: list[str | None] = field(default_factory=list)
    reset: bool = False
    cut: Callable[[int], int | None] = lambda number: None
    stall: Callable[[int], int | None] = lambda number: None
    replace: Callable[[int], None] = lambda number: None
    asked: list[int] = field(default_factory=list)  # first byte wanted, by request
    sent: int = 0
    url: str = ""
    over: threading.Event = field(default_factory=threading.Event)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self):
        site = self.site
        path = self.path.partition("?")[0].lstrip("/")
        site.tokens.append(self.headers.get("Authorization"))
        if site.redirect and not path.startswith("moved/"):
            location = f"{site.moved_to}/moved{self.path}"
            return self.answer(302, {"Location": location, "Content-Length": "0"})
        number = len(site.asked)
        wanted = re.match(r"bytes=(\d+)-$", self.headers.get("Range", ""))
        site.asked.append(int(wanted[1]) if wanted else 0)
        site.replace(number)
        data = site.files.get(path.removeprefix("moved/"))
        if site.statuses:
            return self.answer(site.statuses.pop(0), {**site.refusal, "Content-Length": "0"})
        if data is None:
            return self.answer(404, {"Content-Length": "0"})
        given = [self.headers.get("If-Range"), *site.headers.values()]
        stale = site.heeds_if_range and given[0] is not None and given[0] not in given[1:]
        start = int(wanted[1]) if wanted and site.ranges and not stale else 0
        if start and start >= len(data):
            return self.answer(
                416, {"Content-Range": f"bytes */{len(data)}", "Content-Length": "0"}
            )
        headers = {**site.headers, "Accept-Ranges": "bytes"} if site.ranges else {**site.headers}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if site.chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif site.length:
            headers["Content-Length"] = str(len(data) - start)
        else:
            self.close_connection = True
        self.answer(206 if start else 200, headers)
        self.body(data[start:], site.cut(number), site.stall(number))
        return None

    def answer(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def body(self, data, cut, stall):
        stop = min(len(data) if n is None else n for n in (cut, stall))
        for at in range(0, stop, 4096):
            chunk = data[at : min(at + 4096, stop)]
            framed = b"%x\r\n%s\r\n" % (len(chunk), chunk) if self.site.chunked else chunk
            self.wfile.write(framed)
            self.site.sent += len(chunk)
        if stall is not None:
            self.site.over.wait(30)
        if cut is not None or stall is not None:
            self.close_connection = True
            if self.site.reset:
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
        elif self.site.chunked:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    def server_bind(self):
        # What a server has written and nobody read would count as sent.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        super().server_bind()

    def handle_error(self, request, client_address):
        pass  # a client that went away


@contextmanager
def serve(site: Site) -> Iterator[Site]:
    handler = type("SiteHandler", (Handler,), {"site": site})
    with Server(("127.0.0.1", 0), handler) as server:
        site.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield site
        finally:
            site.over.set()
            server.shutdown()
            thread.join()
