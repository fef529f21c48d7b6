"""A small Hub on 127.0.0.1 for the real huggingface_hub client: models and datasets with commits, branches, tags, large files.

It can also be slow, fail, hang, and refuse a token. The client is led to it by `HF_ENDPOINT`, and kept to HTTP by
`HF_HUB_DISABLE_XET`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_" + "SecretSecretSecretSecretSecretSecr"


@dataclass
class Repository:
    """Its history. A revision is a branch, a tag or a commit."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> path -> content
    messages: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, message: str, files: dict[str, bytes]) -> str:
        """Make `branch` hold `files`."""
        self.messages.append(message)
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        """The commit of a revision."""
        return {**self.tags, **self.branches}.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str) -> dict[str, bytes]:
        """Path -> content."""
        return self.commits[self.resolve(revision) or ""]


@dataclass
class Fault:
    """What happens to requests that match.

    Args:
        pattern: regular expression for `METHOD /path`.
        status: the answer; None hangs until the server is released.
        times: how often; afterwards requests are answered again.
    """

    pattern: str
    status: int | None
    times: float = float("inf")


class HubServer:
    """The server, as a context manager. What it holds and what it was asked can be looked at from the test."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # sha256 -> content of large files
        self.requests: list[str] = []  # METHOD /path
        self.faults: list[Fault] = []
        self.is_released = threading.Event()
        self.delay_seconds = 0.0
        self.token = TOKEN
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.storage_url = (
            f"http://localhost:{self._server.server_port}/objects"  # another host, as it is for the real one
        )

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_released.set()
        self._server.shutdown()
        self._server.server_close()

    def environment(self, **more: str) -> dict[str, str]:
        """What a process needs to take this for the Hub, with a login."""
        return {
            **{"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"},
            **{"HF_HUB_DISABLE_TELEMETRY": "1", **more},
        }

    def lead(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """Let this process, and those it starts, take this for the Hub, with a login."""
        for name, value in self.environment(HF_HOME=str(home)).items():
            monkeypatch.setenv(name, value)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        addresses = {"ENDPOINT": self.url, "HUGGINGFACE_CO_URL_TEMPLATE": template}
        for constant, setting in {**addresses, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, constant, setting)

    def pushed(self, revision: str, repo_id: str = "user/model") -> dict[str, bytes]:
        """Path -> content of a revision, without the file that the Hub makes itself."""
        files = self.repositories[repo_id].files(revision)
        return {path: content for path, content in files.items() if path != ".gitattributes"}

    def fault_of(self, request: str) -> Fault | None:
        """The fault that this request meets, counted."""
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.pattern, request):
                fault.times -= 1
                return fault
        return None


def is_large(path: str) -> bool:
    """Whether the Hub keeps a file outside of git."""
    return path.endswith((".safetensors", ".parquet", ".bin"))


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the test's output is its own."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # the client was killed, which is what some tests do
            self.close_connection = True

    def do_any(self) -> None:
        """Read a request whole, let it meet a fault, and answer it."""
        path, hub = unquote(urlsplit(self.path).path), self.hub
        request = f"{self.command} {path}"
        hub.requests.append(request)
        body = self._body()
        time.sleep(hub.delay_seconds)
        fault = hub.fault_of(request)
        if fault and fault.status is None:
            hub.is_released.wait()
        elif fault:
            return self._error(fault.status or 0, f"planted, for {self.headers.get('Authorization')}")
        login = self.headers.get("Authorization")
        if path.startswith("/objects/") and login:
            return self._error(400, "the token was sent to the storage")
        if not path.startswith("/objects/") and login != f"Bearer {hub.token}":
            return self._error(401, "Invalid credentials in Authorization header")
        for method, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in (self.command, {"HEAD": "GET"}.get(self.command)):
                found = match.groupdict()
                name = found.pop("repository", None)
                if name is None:
                    return answer(self, body, **found)
                if name not in hub.repositories:
                    return self._error(404, "Repository not found", "RepoNotFound")
                return answer(self, body, name, hub.repositories[name], **found)
        self._error(404, f"no such route: {request}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_any  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = b""
        while size := int(self.rfile.readline(), 16):
            chunks += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return chunks

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json")

    def _error(self, status: int, message: str, code: str = "") -> None:
        headers = {"X_Error_Message": message, **({"X_Error_Code": code} if code else {})}
        self._send(status, json.dumps({"error": message}).encode(), Content_Type="application/json", **headers)

    def _range(self, content: bytes, **headers: str) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return self._send(200, content, **headers)
        first, last = int(match[1]), int(match[2] or len(content) - 1)
        span = f"bytes {first}-{last}/{len(content)}"
        self._send(206, content[first : last + 1], Content_Range=span, **headers)

    # Answers: of the whole server, then of a repository.

    def whoami(self, body: bytes) -> None:
        self._json({"name": "user", "type": "user", "orgs": []})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if name in self.hub.repositories:
            return self._json({"error": "You already created this repo", "url": f"{self.hub.url}/{name}"}, 409)
        repository = Repository(private=asked.get("visibility") == "private")
        repository.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.hub.repositories[name] = repository
        self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def validate_yaml(self, body: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def object(self, body: bytes, sha256: str) -> None:
        if self.command != "PUT":
            return self._range(self.hub.objects[sha256], ETag=f'"{sha256}"')
        assert hashlib.sha256(body).hexdigest() == sha256
        self.hub.objects[sha256] = body
        self._send(200, b"")

    def verify(self, body: bytes) -> None:
        asked = json.loads(body)
        is_there = len(self.hub.objects.get(asked["oid"], b"")) == asked["size"]
        self._json({}, 200 if is_there else 404)

    def info(self, body: bytes, name: str, repository: Repository, revision: str | None = None) -> None:
        commit = repository.resolve(revision or "main")
        if commit is None:
            return self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        siblings = [{"rfilename": path} for path in repository.commits[commit]]
        self._json({"id": name, "private": repository.private, "sha": commit, "siblings": siblings})

    def may_write(self, body: bytes, name: str, repository: Repository) -> None:
        self._json({})

    def refs(self, body: bytes, name: str, repository: Repository) -> None:
        def listed(kind: str, found: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": commit} for n, commit in found.items()]

        branches, tags = listed("heads", repository.branches), listed("tags", repository.tags)
        self._json({"branches": branches, "tags": tags, "converts": []})

    def tree(self, body: bytes, name: str, repository: Repository, revision: str, folder: str | None = None) -> None:
        entries = []
        for path, content in repository.files(revision).items():
            if not path.startswith(f"{folder or ''}/".lstrip("/")):
                continue
            large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            entry = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
            entries.append(entry | ({"lfs": large} if is_large(path) else {}))
        if folder and not entries:
            return self._error(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        self._json(entries)

    def preupload(self, body: bytes, name: str, repository: Repository, revision: str) -> None:
        there = repository.files(revision)
        answers = []
        for file in json.loads(body)["files"]:
            path, content = file["path"], there.get(file["path"])
            oid = content and (hashlib.sha256(content).hexdigest() if is_large(path) else _git_hash(content))
            mode = "lfs" if is_large(path) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def batch(self, body: bytes, name: str, repository: Repository) -> None:
        answers = []
        for asked in json.loads(body)["objects"]:
            place = f"{self.hub.storage_url}/{asked['oid']}?signature=secret"
            actions = {"upload": {"href": place}, "verify": {"href": f"{self.hub.url}/verify"}}
            answers.append(asked | ({} if asked["oid"] in self.hub.objects else {"actions": actions}))
        self._json({"transfer": "basic", "objects": answers})

    def commit(self, body: bytes, name: str, repository: Repository, revision: str) -> None:
        files, message = dict(repository.files(revision)), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(revision, message, files)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def reference(self, body: bytes, name: str, repository: Repository, kind: str, revision: str) -> None:
        references = repository.tags if kind == "tag" else repository.branches
        asked = json.loads(body or b"{}")
        reference = asked.get("tag", revision)
        if self.command == "DELETE":
            del references[reference]
        elif reference in references:
            return self._error(409, f"{reference} exists already")
        else:
            commit = repository.resolve(revision if kind == "tag" else asked.get("startingPoint", "main"))
            assert commit is not None
            references[reference] = commit
        self._json({})

    def download(self, body: bytes, name: str, repository: Repository, revision: str, path: str) -> None:
        commit = repository.resolve(revision)
        if commit is None:
            return self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        content = repository.commits[commit].get(path)
        if content is None:
            return self._error(404, "Entry not found", "EntryNotFound")
        if not is_large(path):
            return self._range(content, ETag=f'"{_git_hash(content)}"', X_Repo_Commit=commit)
        sha256 = hashlib.sha256(content).hexdigest()
        linked = {"X_Linked_ETag": f'"{sha256}"', "X_Linked_Size": str(len(content)), "X_Repo_Commit": commit}
        self._send(302, b"", Location=f"{self.hub.storage_url}/{sha256}?signature=secret", **linked)


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_REPOSITORY = r"/api/(?:models|datasets)/(?P<repository>[^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("PUT", "/objects/(?P<sha256>[0-9a-f]{64})", _Handler.object),
    ("GET", "/objects/(?P<sha256>[0-9a-f]{64})", _Handler.object),
    ("POST", "/verify", _Handler.verify),
    ("GET", _REPOSITORY, _Handler.info),
    ("GET", _REPOSITORY + "/revision/(?P<revision>.+)", _Handler.info),
    ("GET", _REPOSITORY + "/auth-check/write", _Handler.may_write),
    ("GET", _REPOSITORY + "/refs", _Handler.refs),
    ("GET", _REPOSITORY + "/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler.tree),
    ("POST", _REPOSITORY + "/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", _REPOSITORY + "/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", _REPOSITORY + "/(?P<kind>tag|branch)/(?P<revision>.+)", _Handler.reference),
    ("DELETE", _REPOSITORY + "/(?P<kind>tag|branch)/(?P<revision>.+)", _Handler.reference),
    ("POST", r"(?:/datasets)?/(?P<repository>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.batch),
    ("GET", "(?:/datasets)?/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.download),
]
