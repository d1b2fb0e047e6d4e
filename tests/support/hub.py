"""A stand-in of the hub's API on this machine: what the client asks when it makes a repository and commits files."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_of_the_stand_in"


class Hub(ThreadingHTTPServer):
    """Repositories by name, each with whether it is private, and its files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.commits = 0
        self.away = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[name][value["path"]] = self.blobs[value["oid"]]
        self.commits += 1


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.answer({"error": "Invalid credentials in Authorization header"}, 401)
        return False

    def do_GET(self) -> None:
        if self.allowed():
            self.answer({"type": "user", "name": "someone"} if self.path == "/api/whoami-v2" else {"sha": "0" * 40})

    def do_PUT(self) -> None:
        content = self.body()
        self.server.blobs[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_POST(self) -> None:
        content = self.body()
        if not self.allowed():
            return
        path, hub = self.path.partition("?")[0], self.server
        if hub.away and "/commit/" in path:
            self.answer({"error": "the repository is full"}, 403)
        elif path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked['organization']}/{asked['name']}"
            known = name in hub.files
            hub.files.setdefault(name, {})
            hub.private.setdefault(name, asked.get("private") or asked.get("visibility") == "private")
            self.answer({"url": f"{hub.url}/{name}"}, 409 if known else 200)
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            files = json.loads(content)["files"]
            modes = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in files}
            self.answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(content)["objects"]
            actions = [{**o, "actions": {"upload": {"href": f"{hub.url}/blobs/{o['oid']}"}}} for o in objects]
            self.answer({"transfer": "basic", "objects": actions})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            hub.commit(match[1], [json.loads(line) for line in content.splitlines()])
            self.answer({"commitUrl": f"{hub.url}/{match[1]}/commit/1", "commitOid": "1" * 40})
        else:
            self.answer({"error": f"unknown: {path}"}, 404)


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
