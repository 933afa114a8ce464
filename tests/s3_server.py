"""As much of S3 as s3fs asks for, on this machine, misbehaving as asked."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import fsspec
import pytest
from web_server import Server

SECRET = "a-secret-of-nobody"


@dataclass
class Bucket:
    """The one bucket ``b`` and what befalls requests.

    `cut` says after how many bytes of its body the answer to a GET breaks, by the number of the
    request, and None where it does not; `stall` whether nothing comes behind the first half of it.
    `before` is called with method, key and number of every request for an object and may change
    the bucket, or return a status to answer with.
    """

    objects: dict[str, bytes] = field(default_factory=dict)
    exists: bool = True
    cut: Callable[[int], int | None] = lambda number: None
    stall: Callable[[int], bool] = lambda number: False
    before: Callable[[str, str, int], int | None] = lambda method, key, number: None
    asked: list[tuple[str, str]] = field(default_factory=list)  # method and key
    sent: int = 0
    url: str = ""
    over: threading.Event = field(default_factory=threading.Event)

    def ranges(self, key: str) -> int:
        """Number of GETs of an object."""
        return self.asked.count(("GET", key))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    bucket: Bucket

    def _route(self):
        bucket, parts = self.bucket, urlsplit(self.path)
        name, _, key = unquote(parts.path).lstrip("/").partition("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        query = parse_qs(parts.query, keep_blank_values=True)
        if SECRET in str(self.headers) or "AWS4-HMAC" not in self.headers.get("Authorization", ""):
            return self._error(403, "AccessDenied")
        if not bucket.exists or name != "b":
            return self._error(404, "NoSuchBucket")
        if not key:
            return self._of_bucket(query, body)
        number = len(bucket.asked)
        status = bucket.before(self.command, key, number)
        bucket.asked.append((self.command, key))
        if status is not None:
            codes = {403: "AccessDenied", 404: "NoSuchBucket", 503: "ServiceUnavailable"}
            return self._error(status, codes[status])
        if self.command == "PUT":
            bucket.objects[key] = body
            return self._answer(200, b"", {"ETag": _etag(body)})
        if key not in bucket.objects:
            return self._error(404, "NoSuchKey")
        if self.command == "DELETE":
            del bucket.objects[key]
            return self._answer(204, b"")
        return self._object(bucket.objects[key], number)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _route

    def _object(self, data, number):
        headers = {"ETag": _etag(data), "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
        wanted = re.match(r"bytes=(\d+)-(\d+)$", self.headers.get("Range", ""))
        status = 206 if wanted else 200
        if wanted:
            start, end = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            data = data[start:end]
        cut = self.bucket.cut(number) if self.command == "GET" else None
        stalls = self.command == "GET" and self.bucket.stall(number)
        self._answer(status, data, headers, len(data) // 2 if stalls else cut)
        if stalls:
            self.bucket.over.wait(30)

    def _of_bucket(self, query, body):
        objects = self.bucket.objects
        if "delete" in query:
            for key in re.findall(r"<Key>(.*?)</Key>", body.decode()):
                objects.pop(key, None)
                self.bucket.asked.append(("DELETE", key))
            return self._answer(200, b"<DeleteResult/>")
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        found, folders = [], set()
        for key in sorted(objects):
            if key.startswith(prefix):
                rest = key[len(prefix) :]
                if delimiter and delimiter in rest:
                    folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
                else:
                    found.append(key)
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(objects[key])}</Size>"
            f"<ETag>{escape(_etag(objects[key]))}</ETag><StorageClass>STANDARD</StorageClass>"
            "<LastModified>2015-10-21T07:28:00.000Z</LastModified></Contents>"
            for key in found
        ) + "".join(
            f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
            for folder in sorted(folders)
        )
        count = len(found) + len(folders)
        return self._answer(
            200,
            f"<ListBucketResult><Name>b</Name><KeyCount>{count}</KeyCount>"
            f"<IsTruncated>false</IsTruncated>{contents}</ListBucketResult>".encode(),
        )

    def _error(self, status, code):
        text = f"<Error><Code>{code}</Code><Message>{code}, as asked</Message></Error>"
        self._answer(status, text.encode())

    def _answer(self, status, data, headers=None, cut=None):
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if cut is None else data[:cut])
            self.bucket.sent += len(data if cut is None else data[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, *args):
        pass


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


@contextmanager
def serve_bucket(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """Serves ``s3://b`` to this process and to those that it starts."""
    s3fs = pytest.importorskip("s3fs")
    handler = type("BucketHandler", (Handler,), {"bucket": bucket})
    with Server(("127.0.0.1", 0), handler) as server:
        bucket.url = f"http://127.0.0.1:{server.server_address[1]}"
        for name, value in {
            "AWS_ENDPOINT_URL": bucket.url,
            "AWS_ACCESS_KEY_ID": "an-id",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",
        }.items():
            monkeypatch.setenv(name, value)
        # Its own attempts, before ours, wait in earnest.
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield bucket
        finally:
            bucket.over.set()
            server.shutdown()
            thread.join()
            # Another server has another port.
            fsspec.get_filesystem_class("s3").clear_instance_cache()
