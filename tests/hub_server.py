"""A hub of models on this machine: the endpoints that huggingface_hub uses to read a model and to write one."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """A repository: its commits, oldest first, and where its branches point."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str = ""
    """Without it the repository does not exist, as the hub says it."""
    is_gated: bool = False
    is_private: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit of all these files; returns its name."""
        told = repr((sorted(files.items()), len(self.commits), branch)).encode()
        sha = hashlib.sha1(told).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[branch] = sha
        return sha

    def find(self, revision: str) -> str:
        return revision if revision in self.commits else self.refs.get(revision, "")


@dataclass
class Hub:
    """What the server has and was asked. A test may change it while the server runs."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    asked: list[tuple[str, str, str, str]] = field(default_factory=list)
    """(method, path, authorization, range) of every request."""
    cut: dict[str, int] = field(default_factory=dict)
    """Files whose next answer ends after so many bytes."""
    fails_with: int = 0
    """Status of every answer, if it is not 0."""

    def add(self, name: str, files: dict[str, bytes], **more: object) -> str:
        """Add a repository with one commit on main; returns the commit's name."""
        self.repos[name] = Repo(**more)
        return self.repos[name].commit(files)

    def downloads(self, ending: str = "") -> list[str]:
        """The files that were sent, in order."""
        return [path for method, path, *_ in self.asked if method == "GET" and "/resolve/" in path and ending in path]


@contextmanager
def running() -> Iterator[Hub]:
    """A hub, served on a free port until the end of the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def files_of(directory: Path) -> dict[str, bytes]:
    """The files of a model directory."""
    return {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.is_file()}


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    """Variables for a process that uses this hub, with a cache of its own."""
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", **more}


def use(monkeypatch, hub: Hub, home: Path, *, offline: bool = False, token: str = "") -> None:
    """Let this process use the hub: huggingface_hub reads most of its environment when it is imported."""
    from huggingface_hub import constants

    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    values = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HOME": str(home)}
    values |= {"HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": offline, "HF_TOKEN_PATH": str(home / "token")}
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", token)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        told = self.headers.get("Authorization", ""), self.headers.get("Range", "")
        self.hub.asked.append((self.command, path, *told))
        body = self._body()
        if self.hub.fails_with:
            return self._json({"error": "out of order"}, self.hub.fails_with)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":  # of a card's metadata
            return self._json({"errors": [], "warnings": []})
        matched = re.fullmatch(
            r"(?:/api/models)?/([^/]+/[^/]+)(?:/(revision|tree|resolve|preupload|commit)/(.+))?", path
        )
        repo = self.hub.repos.get(matched[1]) if matched else None
        if repo is None or (repo.token and told[0] != f"Bearer {repo.token}"):
            code = 404 if told[0] else 401
            return self._json(
                {"error": "Repository not found"}, code, {"X-Error-Code": "RepoNotFound"} if told[0] else {}
            )
        what, rest = matched[2] or "revision", matched[3] or "main"
        return getattr(self, f"_{what}")(matched[1], repo, rest, body)

    def _revision(self, name: str, repo: Repo, revision: str, body: bytes) -> None:
        if not (sha := repo.find(revision)):
            return self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": path, "size": len(data)} for path, data in repo.commits[sha].items()]
        return self._json({"id": name, "modelId": name, "sha": sha, "siblings": siblings, "private": repo.is_private})

    def _tree(self, name: str, repo: Repo, revision: str, body: bytes) -> None:
        files = repo.commits.get(repo.find(revision), {})
        entries = [{"type": "file", "path": p, "size": len(d), "oid": _etag(d)} for p, d in files.items()]
        return self._json(entries)

    def _resolve(self, name: str, repo: Repo, rest: str, body: bytes) -> None:
        revision, _, path = rest.partition("/")
        sha = repo.find(revision)
        if repo.is_gated:
            return self._json({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})
        if path not in repo.commits.get(sha, {}):
            return self._json({"error": "no entry"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        data = repo.commits[sha][path]
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        stop = self.hub.cut.pop(path, None) if self.command == "GET" else None
        return self._send(data[start:], 206 if start else 200, headers, stop=stop)

    def _create(self, told: dict) -> None:
        name = f"{told.get('organization') or 'me'}/{told['name']}"
        if name in self.hub.repos:
            return self._json({"error": "it exists", "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.repos[name] = Repo(is_private=told.get("visibility") == "private" or bool(told.get("private")))
        self.hub.repos[name].commit({})
        return self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _preupload(self, name: str, repo: Repo, revision: str, body: bytes) -> None:
        files = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
            for file in json.loads(body)["files"]
        ]
        return self._json({"files": files})

    def _commit(self, name: str, repo: Repo, revision: str, body: bytes) -> None:
        files = dict(repo.commits[repo.find(revision)])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        sha = repo.commit(files, revision)
        return self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _json(self, told: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        message = {"X-Error-Message": str(told["error"])} if isinstance(told, dict) and "error" in told else {}
        self._send(
            json.dumps(told).encode(), status, {"Content-Type": "application/json", **message, **(headers or {})}
        )

    def _send(self, data: bytes, status: int, headers: dict[str, str], *, stop: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:stop])
        if stop is not None:
            self.close_connection = True


def _etag(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
