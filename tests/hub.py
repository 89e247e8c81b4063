"""A stand-in for a model hub on loopback: what `huggingface_hub.snapshot_download` asks for, and a record of it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """The hub's content and what was asked of it.

    Attributes:
        repositories: folders by repository id and revision; the first revision of each is `main`.
        requests: method and path of every request, in order.
        status: answers everything with this status, if it is set.
        port: where it listens.
    """

    repositories: Mapping[str, Mapping[str, Path]]
    requests: list[tuple[str, str]] = field(default_factory=list)
    status: int | None = None
    port: int = 0

    @property
    def url(self) -> str:
        """Value for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.port}"

    def fetched(self, repository: str) -> set[str]:
        """Names of the files of a repository whose content was sent."""
        start = f"/{repository}/resolve/"
        paths = [path for method, path in self.requests if method == "GET" and path.startswith(start)]
        return {path.removeprefix(start).partition("/")[2] for path in paths}

    def find(self, repository: str, revision: str) -> tuple[str, Path] | None:
        """Commit and folder of a revision, given by its name or as a commit."""
        for name, folder in self.repositories.get(repository, {}).items():
            if revision in (name, commit(repository, name)):
                return commit(repository, name), folder
        return None


def commit(repository: str, revision: str) -> str:
    """The commit that a revision of a repository stands for."""
    return hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve a hub from a thread of this process."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            del format, args

        def _answer(self, *, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            status, headers, body = (hub.status, {}, b"{}") if hub.status else _respond(hub, path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _respond(hub: Hub, path: str) -> tuple[int, dict[str, str], bytes]:
    if path.startswith("/api/models/"):
        repository, kind, revision = _split(path.removeprefix("/api/models/"), ("revision", "tree"))
    else:
        repository, kind, revision = _split(path.removeprefix("/"), ("resolve",))
    if repository not in hub.repositories:
        return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}"
    revision, _, name = revision.partition("/") if kind == "resolve" else (revision, "", "")
    found = hub.find(repository, revision or next(iter(hub.repositories[repository])))
    if found is None:
        return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"}, b"{}"
    sha, folder = found
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if kind == "tree":
        listed = [{"type": "file", "path": str(file.relative_to(folder)), **_entry(file)} for file in files]
        return 200, {"Content-Type": "application/json"}, json.dumps(listed).encode()
    if kind != "resolve":
        siblings = [{"rfilename": str(file.relative_to(folder))} for file in files]
        described = {"_id": "0", "id": repository, "modelId": repository, "sha": sha, "private": False}
        return 200, {"Content-Type": "application/json"}, json.dumps(described | {"siblings": siblings}).encode()
    file = folder / name
    if not file.is_file():
        return 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}, b"{}"
    return 200, {"X-Repo-Commit": sha, "ETag": f'"{_entry(file)["oid"]}"'}, file.read_bytes()


def _split(path: str, kinds: tuple[str, ...]) -> tuple[str, str, str]:
    """Repository, kind and the rest of a path such as `org/name/revision/main`."""
    for kind in kinds:
        repository, found, rest = path.partition(f"/{kind}/")
        if found:
            return repository, kind, rest
    return path, "", ""


def _entry(file: Path) -> dict[str, str | int]:
    content = file.read_bytes()
    return {"size": len(content), "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
