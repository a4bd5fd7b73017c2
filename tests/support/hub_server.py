"""A server on this machine that speaks the few calls of the Hugging Face hub that DiTune makes."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        files: repository -> path -> bytes, of the commit `COMMIT`.
        requests: (method, path) of every call.
        tokens: what came in the Authorization header.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.commit = COMMIT
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._resolve()

    def do_GET(self) -> None:
        path = self._noted()
        info = re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
        tree = re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(/.*)?", path)
        if info and info[1] in self.server.files:
            files = self.server.files[info[1]]
            return self._json(
                {"id": info[1], "sha": self.server.commit, "siblings": [{"rfilename": name} for name in files]}
            )
        if tree and tree[1] in self.server.files:
            return self._json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in self.server.files[tree[1]].items()
                ]
            )
        return self._resolve(noted=True)

    def do_POST(self) -> None:
        path = self._noted()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'user'}/{asked['name']}"
            self.server.files.setdefault(repo, {})
            return self._json({"url": f"{self.server.url}/{repo}", "name": repo})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = json.loads(body)["files"]
            answer = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self._json({"files": answer})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[match[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.url}/{match[1]}/commit/{self.server.commit}"
            return self._json({"commitOid": self.server.commit, "commitUrl": url, "success": True})
        return self._answer(404, b"")

    def _resolve(self, noted: bool = False) -> None:
        path = self.path.partition("?")[0] if noted else self._noted()
        match = re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", unquote(path))
        data = self.server.files.get(match[1], {}).get(match[3]) if match else None
        if data is None:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": self.server.commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        return self._answer(200, data, headers)

    def _noted(self) -> str:
        path = unquote(self.path.partition("?")[0])
        self.server.requests.append((self.command, path))
        self.server.tokens.add(self.headers.get("Authorization"))
        return path

    def _json(self, content: Any) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
