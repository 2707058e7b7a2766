"""Local servers: S3, a proxy in front of it that fails on purpose, and a small web server."""

from __future__ import annotations

import http.client
import http.server
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "someone",
    "AWS_SECRET_ACCESS_KEY": "secret-of-someone",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
Answer = tuple[int, dict[str, str], bytes]


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Ignore clients that disconnect."""


@contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[int]:
    """Serve in a thread and yield the port."""
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        del self.headers["Transfer-Encoding"]
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def answer(self, status: int, headers: dict[str, str], body: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


class Proxy:
    """Forwards requests to an HTTP server and fails on purpose.

    Every `every`th request fails with `fault`: "503", "reset", or "cut" after half of the body. `refuse` may
    answer a request by method and path.
    """

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.every, self.fault = 0, "503"
        self.latency_s = 0.0
        self.refuse: Callable[[str, str], Answer | None] = lambda method, path: None
        self.requests = self.failed = self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()

    @contextmanager
    def serving(self) -> Iterator[int]:
        proxy = self

        class Handler(_Handler):
            def do_GET(self) -> None:
                body = self.body()
                with proxy.counted() as fails:
                    time.sleep(proxy.latency_s)
                    proxy.serve(self, body, fails)

            do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

        with serving(Handler) as port:
            yield port

    @contextmanager
    def counted(self) -> Iterator[bool]:
        with self._lock:
            self.requests += 1
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            fails = bool(self.every) and self.requests % self.every == 0
            self.failed += fails
        try:
            yield fails
        finally:
            with self._lock:
                self.in_flight -= 1

    def serve(self, request: _Handler, body: bytes, fails: bool) -> None:
        if answer := self.refuse(request.command, request.path):
            request.answer(*answer)
        elif fails and self.fault == "503":
            request.answer(HTTPStatus.SERVICE_UNAVAILABLE, {}, b"")
        elif fails and self.fault == "reset":
            request.reset()
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=30)
            connection.request(request.command, request.path, body, dict(request.headers))
            response = connection.getresponse()
            hop = {"connection", "transfer-encoding", "date", "server"}
            headers = {name: value for name, value in response.getheaders() if name.lower() not in hop}
            answer = response.read()
            connection.close()
            request.answer(response.status, headers, answer, cut=fails and len(answer) > 1)


@contextmanager
def web_server(files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Serve `files`; yield the address and the list of requested paths.

    The first folder of a path selects the answer: /chunked/ has no length, /cut/ is shorter than announced,
    /moved/ is a redirect, /status/N/ is only status N.
    """
    seen: list[str] = []

    class Handler(_Handler):
        def do_GET(self) -> None:
            seen.append(self.path)
            path = self.path.partition("?")[0]
            kind, _, rest = path[1:].partition("/")
            if kind == "status":
                self.answer(int(rest.split("/")[0]), {}, b"secret page")
            elif kind == "moved":
                self.answer(302, {"Location": f"/{rest}"}, b"")
            elif kind == "chunked":
                self.send_response_only(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                data = files[rest]
                for piece in (data[:100], data[100:]):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.wfile.write(b"0\r\n\r\n")
            elif kind == "cut":
                self.answer(200, {}, files[rest], cut=True)
            elif path[1:] in files:
                self.answer(200, {}, files[path[1:]])
            else:
                self.answer(404, {}, b"no such page")

    with serving(Handler) as port:
        yield f"http://127.0.0.1:{port}", seen
