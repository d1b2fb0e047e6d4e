"""A real S3 protocol server (moto) behind a proxy that counts what passes and fails on demand.

with serve() as s3:
    os.environ |= s3.environment     # all that a client needs
    s3.put(folder, "bucket/model")   # past the proxy: neither counted nor failing
    s3.faults.down(seconds=10)       # connections are refused for so long
"""

import http.client
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

HOST = "127.0.0.1"
START_SECONDS = 240.0
CODES = {403: "AccessDenied", 429: "TooManyRequests", 500: "InternalError", 503: "SlowDown"}
HOP_BY_HOP = frozenset({"connection", "expect", "keep-alive", "transfer-encoding"})

# request: before the server saw it; answer: after the server did it, before its answer; body: in the middle of that
Moment = Literal["request", "answer", "body"]


@dataclass(frozen=True)
class Request:
    """One request as it passed. `bytes` are those of the answer's body that went out, `fault` what was done to it."""

    method: str
    path: str  # bucket/key
    query: str
    range: str | None
    status: int | None = None
    bytes: int = 0
    fault: str | None = None

    @property
    def operation(self) -> str:
        """The request as `METHOD path`, with the names of what its query asks for."""
        names = sorted(urllib.parse.parse_qs(self.query, keep_blank_values=True))
        return f"{self.method} {self.path}" + (f"?{'&'.join(names)}" if names else "")

    @property
    def whole(self) -> str:
        """The request as `METHOD path?query`."""
        return f"{self.method} {self.path}" + (f"?{urllib.parse.unquote(self.query)}" if self.query else "")


@dataclass
class Fault:
    """What is done to the requests that the pattern finds, as their `Request.whole`: `times` of them after `skip`."""

    pattern: str
    status: int | None = None  # answered instead of the server
    drop: Moment | None = None
    action: Callable[[], None] | None = None  # called before the request goes on
    down: float | None = None  # the seconds for which nothing answers any more
    times: float = 1
    skip: int = 0
    hits: int = field(default=0, init=False)


class Faults:
    """What goes wrong from now on."""

    def __init__(self, proxy: "Proxy") -> None:
        self._proxy = proxy
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._timer: threading.Timer | None = None

    def answer(self, status: int, pattern: str = "", times: float = 1, skip: int = 0) -> Fault:
        """Answer requests with an error of a status, such as 503."""
        return self._add(Fault(pattern, status=status, times=times, skip=skip))

    def deny(self, pattern: str = "") -> Fault:
        """Answer all such requests with 403, from now on."""
        return self.answer(403, pattern, times=float("inf"))

    def drop(self, moment: Moment, pattern: str = "", times: float = 1, skip: int = 0) -> Fault:
        """Break the connection."""
        return self._add(Fault(pattern, drop=moment, times=times, skip=skip))

    def call(self, action: Callable[[], None], pattern: str = "", skip: int = 0) -> Fault:
        """Do something when a request comes, and let it go on then."""
        return self._add(Fault(pattern, action=action, skip=skip))

    def down_at(self, pattern: str, seconds: float, skip: int = 0) -> Fault:
        """Go down for so long when such a request comes."""
        return self._add(Fault(pattern, down=seconds, skip=skip))

    def down(self, seconds: float | None = None) -> None:
        """Break all connections and refuse new ones, for so long or until `up`."""
        self._proxy.stop()
        if seconds is not None:
            self._timer = threading.Timer(seconds, self._proxy.start)
            self._timer.daemon = True
            self._timer.start()

    def up(self) -> None:
        """Take connections again."""
        if self._timer:
            self._timer.cancel()
            self._timer.join()
            self._timer = None
        self._proxy.start()

    def clear(self) -> None:
        """Nothing goes wrong any more."""
        with self._lock:
            self._faults.clear()
        self.up()

    def pick(self, request: str) -> Fault | None:
        """The fault that a request meets, if any."""
        with self._lock:
            for fault in self._faults:
                if re.search(fault.pattern, request):
                    fault.hits += 1
                    if fault.skip < fault.hits <= fault.skip + fault.times:
                        return fault
        return None

    def _add(self, fault: Fault) -> Fault:
        with self._lock:
            self._faults.append(fault)
        return fault


class Proxy:
    """Passes requests on to a server, unless a fault is in the way."""

    def __init__(self, server: int) -> None:
        self.server = server  # port
        self.faults = Faults(self)
        self.requests: list[Request] = []
        self._lock = threading.Lock()
        self._http: _Listener | None = None
        self.port = 0
        self.start()

    def start(self) -> None:
        with self._lock:
            if self._http is None:
                self._http = _Listener(self)
                self.port = self._http.server_port
                threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        with self._lock:
            if self._http is not None:
                self._http.shutdown()
                self._http.server_close()
                self._http.break_connections()
                self._http = None


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self._connections: set[socket.socket] = set()
        super().__init__((HOST, proxy.port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def break_connections(self) -> None:
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that went away


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Listener

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        self._pass()

    def _pass(self) -> None:
        path, _, query = self.path.partition("?")
        seen = Request(self.command, urllib.parse.unquote(path).strip("/"), query, self.headers.get("Range"))
        fault = self.server.proxy.faults.pick(seen.whole)
        if fault and fault.action:
            fault.action()
            fault = None
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault is None:
            status, headers, answer = self._forward(body)
            self._answer(seen, status, headers, answer)
        elif fault.status:
            self._answer(
                seen, fault.status, [("Content-Type", "application/xml")], _error(fault.status), str(fault.status)
            )
        elif fault.drop == "body":
            status, headers, answer = self._forward(body)
            self._answer(seen, status, headers, answer, "body")
            self._break()
        else:
            if fault.drop == "answer":
                self._forward(body)
            self.server.proxy.requests.append(replace(seen, fault=fault.drop or "down"))
            if fault.down:
                self.server.proxy.faults.down(fault.down)
            self._break()

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(HOST, self.server.proxy.server, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, [pair for pair in answer.getheaders() if pair[0].lower() not in HOP_BY_HOP], content

    def _answer(
        self, seen: Request, status: int, headers: list[tuple[str, str]], body: bytes, fault: str | None = None
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command == "HEAD":
            body = b""
        else:
            self.send_header("Content-Length", str(len(body)))
        sent = body[: len(body) // 2] if fault == "body" else body
        # The client may look at the list as soon as it has its answer.
        self.server.proxy.requests.append(replace(seen, status=status, bytes=len(sent), fault=fault))
        self.end_headers()
        self.wfile.write(sent)
        self.wfile.flush()

    def _break(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def _error(status: int) -> bytes:
    code = CODES.get(status, "Error")
    words = re.sub(r"(?<!^)([A-Z])", r" \1", code)
    return f"<Error><Code>{code}</Code><Message>{words}</Message></Error>".encode()


class S3:
    """A server with its proxy. `environment` is all that a client needs to come through the proxy."""

    def __init__(self, server: int) -> None:
        self._proxy = Proxy(server)
        self.faults = self._proxy.faults
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://{HOST}:{self._proxy.port}",
            "AWS_ACCESS_KEY_ID": "a-key-of-the-tests",
            "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-tests",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            # The client's own attempts at a request: one, so that it is ours that are seen.
            "AWS_MAX_ATTEMPTS": "1",
            "NO_PROXY": HOST,
        }
        self._server = server

    @property
    def requests(self) -> list[Request]:
        """What has passed since `clear`."""
        return self._proxy.requests

    def of(self, pattern: str) -> list[Request]:
        """The requests whose operation a pattern finds."""
        return [request for request in self.requests if re.search(pattern, request.operation)]

    def clear(self) -> None:
        """Forget faults and requests."""
        self.faults.clear()
        self.requests.clear()

    def close(self) -> None:
        self.faults.clear()
        self._proxy.stop()

    # -- past the proxy ---------------------------------------------------------------------------------------

    @property
    def files(self) -> Any:
        """The server as a file system of fsspec, past the proxy."""
        import s3fs

        return s3fs.S3FileSystem(
            endpoint_url=f"http://{HOST}:{self._server}", key="a", secret="b", use_listings_cache=False
        )

    def bucket(self, name: str) -> str:
        """Make a bucket."""
        self.files.mkdir(name)
        return name

    def put(self, local: str | Path, path: str) -> str:
        """Store a file, or a folder and what lies directly in it; its URL."""
        local, files = Path(local), self.files
        for file in sorted(local.iterdir()) if local.is_dir() else [local]:
            files.pipe_file(f"{path}/{file.name}" if local.is_dir() else path, file.read_bytes())
        return f"s3://{path}"

    def get(self, path: str, local: str | Path) -> Path:
        """Fetch what lies below a path into a local folder."""
        local, files = Path(local), self.files
        for name in files.find(path):
            target = local / name.removeprefix(path).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(files.cat_file(name))
        return local

    def names(self, path: str) -> list[str]:
        """The names of all objects below a path."""
        return [name.removeprefix(path).lstrip("/") for name in self.files.find(path)]

    def uploads(self, bucket: str) -> list[str]:
        """The keys of multipart uploads that were begun and neither completed nor aborted."""
        return [upload["Key"] for upload in self.files.list_multipart_uploads(bucket)]


@contextmanager
def serve() -> Iterator[S3]:
    """A server of its own process that forgets everything at the end, and a proxy in front of it."""
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", HOST, "-p", "0"],
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            s3 = S3(_port(server, log))
            try:
                yield s3
            finally:
                s3.close()
        finally:
            server.kill()
            server.wait()


def _port(server: subprocess.Popen, log: Any) -> int:
    """The port that the server has chosen, once it listens there."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        said = os.pread(log.fileno(), 2**16, 0).decode()
        if found := re.search(rf"Running on http://{HOST}:(\d+)\n", said):
            return int(found[1])
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"moto does not start: {said[-2000:]}")
        time.sleep(0.05)


@contextmanager
def client_of(s3: S3) -> Iterator[None]:
    """This process, and those it starts, as a client of a server."""
    import s3fs

    before = {name: os.environ.get(name) for name in s3.environment}
    os.environ.update(s3.environment)
    s3fs.S3FileSystem.clear_instance_cache()  # which have read the environment already
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
        s3fs.S3FileSystem.clear_instance_cache()
