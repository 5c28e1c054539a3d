"""A model hub on loopback, for tests: what huggingface_hub's own code asks of one, and no more.

Files live in memory. A repository has branches, a branch points to a commit, and a commit holds all files as they
were then. Small files travel in the commit itself and weights by Git LFS, as on the real Hub; Xet, which is a service
of its own, is switched off at the client.

    with HubStub() as hub:
        hub.add_repo("org/name", {"config.json": b"{}"})
        with hub.connected(tmp_path / "cache"):             # this process
            ...
        subprocess.run(..., env=hub.environment(tmp_path))  # a fresh one
        assert [commit.repo_id for commit in hub.commits] == ["org/name"]
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

__all__ = ["Commit", "HubStub", "Repo"]

Answer = tuple[int, Any, dict[str, str]]
LFS_SUFFIXES = (".safetensors", ".png", ".bin")


class _RefusedError(Exception):
    """A request that the hub does not carry out: status, error code and message."""


@dataclass(frozen=True)
class Commit:
    """One commit: what it changed, and everything that was there afterwards."""

    id: str
    repo_id: str
    branch: str
    message: str
    changed: tuple[str, ...]
    files: Mapping[str, bytes] = field(repr=False)


@dataclass
class Repo:
    """A model repository."""

    repo_id: str
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def at(self, revision: str = "main") -> Commit | None:
        """The commit of a branch, or with that id."""
        return self.commits.get(self.branches.get(revision, revision))

    @property
    def files(self) -> Mapping[str, bytes]:
        """The files of the main branch."""
        commit = self.at()
        return {} if commit is None else commit.files


class HubStub:
    """A hub that listens on loopback inside a `with`.

    Attributes:
        url: Where it listens; what `HF_ENDPOINT` has to be.
        token: The one token it knows. Writing, and reading what is private, takes it.
        repos: The repositories by name.
        commits: All commits, the oldest first.
        requests: What was asked, as `"METHOD /path"`; tokens are not kept.
        refuse: Asked before anything is done, with method and path; a status other than `None` is the answer.
    """

    def __init__(self, token: str = "token-of-the-stub") -> None:
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.commits: list[Commit] = []
        self.requests: list[str] = []
        self.refuse: Callable[[str, str], int | None] = lambda method, path: None
        self._blobs: dict[str, bytes] = {}  # uploaded by Git LFS, by their SHA-256
        self._lock = threading.Lock()
        stub = self

        class Handler(_Handler):
            hub = stub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubStub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    # ------------------------------------------------------------------------------------------------ the test's side

    def add_repo(
        self, repo_id: str, source: Path | Mapping[str, bytes], *, private: bool = False, branch: str = "main"
    ) -> str:
        """Puts a folder's files, or those given, into a repository by one commit, and returns the commit's id.

        A repository or a branch that does not exist is made; the files replace all that were there.
        """
        if isinstance(source, Path):
            files = {p.relative_to(source).as_posix(): p.read_bytes() for p in source.rglob("*") if p.is_file()}
        else:
            files = dict(source)
        if repo_id not in self.repos:
            self.repos[repo_id] = Repo(repo_id, private)
            if branch != "main":  # which every repository has
                self._commit(self.repos[repo_id], "main", "initial commit", (), {})
        return self._commit(self.repos[repo_id], branch, "add files", tuple(files), files).id

    def environment(self, home: Path, *, offline: bool = False, token: str | None = None) -> dict[str, str]:
        """The variables of a process that uses this hub, and `home` for its caches."""
        inherited = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        own |= {"HF_HUB_DISABLE_TELEMETRY": "1"}
        return {
            **inherited,
            **own,
            **({"HF_HUB_OFFLINE": "1"} if offline else {}),
            **({"HF_TOKEN": token} if token else {}),
        }

    @contextmanager
    def connected(self, cache: Path, *, offline: bool = False, token: str | None = None) -> Iterator[HubStub]:
        """Lets this process use the hub with an own cache, though huggingface_hub reads its settings at import."""
        import huggingface_hub
        from huggingface_hub import constants
        from transformers import dynamic_module_utils
        from transformers.utils import hub as transformers_hub

        own = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": offline,
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_TOKEN_PATH": str(cache / "token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        }
        environment = {"HF_TOKEN": token} if token else {}
        with mock.patch.dict(os.environ, environment), mock.patch.multiple(constants, **own):
            if not token:
                os.environ.pop("HF_TOKEN", None)
            api, modules = huggingface_hub.hf_api.api, str(cache / "modules")
            with (
                mock.patch.object(api, "endpoint", self.url),
                mock.patch.object(transformers_hub, "_hf_api", None, create=True),  # made anew, with the endpoint
                mock.patch.object(dynamic_module_utils, "HF_MODULES_CACHE", modules),
            ):
                yield self

    # ------------------------------------------------------------------------------------------------- the hub's side

    def _commit(
        self, repo: Repo, branch: str, message: str, changed: tuple[str, ...], files: Mapping[str, bytes]
    ) -> Commit:
        with self._lock:
            digest = hashlib.sha1(f"{len(self.commits)} {repo.repo_id} {branch} {message}".encode())
            for path, content in sorted(files.items()):
                digest.update(path.encode() + b"\0" + content)
            commit = Commit(digest.hexdigest(), repo.repo_id, branch, message, changed, dict(files))
            repo.commits[commit.id] = commit
            repo.branches[branch] = commit.id
            self.commits.append(commit)
        return commit

    def answer(self, method: str, url: str, token: str | None, body: bytes) -> Answer:
        """What the hub says to a request: status, content (JSON unless it is `bytes`) and headers."""
        parts = urlsplit(url)
        path = unquote(parts.path)
        with self._lock:
            self.requests.append(f"{method} {path}")
        status = self.refuse(method, path)
        if status is not None:
            return _error(status, "Refused", "the stub was told to refuse this")
        if token is not None and token != self.token:
            return _error(401, None, "Invalid credentials in Authorization header")
        for pattern, verb, action in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and verb == ("GET" if method == "HEAD" else method):
                try:
                    return action(self, found.groupdict(), token is not None, body, parse_qs(parts.query))
                except _RefusedError as refusal:
                    return _error(*refusal.args)
        return _error(404, None, f"the stub knows no {method} {path}")

    @staticmethod
    def _check_may_write(authorised: bool) -> None:
        if not authorised:
            raise _RefusedError(401, None, "Invalid username or password.")

    def _repo(self, groups: Mapping[str, str], authorised: bool) -> Repo:
        repo = self.repos.get(groups["repo"])
        if repo is None or (repo.private and not authorised):
            raise _RefusedError(404 if authorised else 401, "RepoNotFound", "Repository not found")
        return repo

    def _at(self, groups: Mapping[str, str], authorised: bool) -> tuple[Repo, Commit]:
        repo = self._repo(groups, authorised)
        commit = repo.at(groups.get("revision") or "main")
        if commit is None:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {groups.get('revision')}")
        return repo, commit

    def _create(self, groups: Any, authorised: bool, body: bytes, query: Any) -> Answer:
        self._check_may_write(authorised)
        wanted = json.loads(body)
        repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        answer = {"url": f"{self.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.repos:
            return 409, {"error": "You already created this model repo", **answer}, {}
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.repos[repo_id] = repo = Repo(repo_id, private)
        # A repository starts with a commit of its own, which is nobody's push.
        empty = Commit(hashlib.sha1(repo_id.encode()).hexdigest(), repo_id, "main", "initial commit", (), {})
        repo.commits[empty.id], repo.branches["main"] = empty, empty.id
        return 200, answer, {}

    def _info(self, groups: Any, authorised: bool, body: bytes, query: Any) -> Answer:
        repo, commit = self._at(groups, authorised)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        info = {"id": repo.repo_id, "modelId": repo.repo_id, "sha": commit.id, "private": repo.private, "tags": []}
        return 200, {**info, "siblings": siblings, "downloads": 0, "likes": 0, "gated": False}, {}

    def _tree(self, groups: Any, authorised: bool, body: bytes, query: Any) -> Answer:
        files, folder = self._at(groups, authorised)[1].files, groups.get("path") or ""
        inside = {path: data for path, data in files.items() if not folder or path.startswith(folder + "/")}
        if folder and not inside:
            return _error(404, "EntryNotFound", f"{folder} does not exist")
        start, entries, folders = len(folder) + 1 if folder else 0, [], set()
        for path, data in sorted(inside.items()):
            parents = [path[: start + cut.start()] for cut in re.finditer("/", path[start:])]
            folders.update(parents if query.get("recursive") == ["true"] else parents[:1])
            if not parents or query.get("recursive") == ["true"]:
                entries.append(_file_entry(path, data))
        entries += [{"type": "directory", "path": name, "oid": _sha1(name.encode()), "size": 0} for name in folders]
        return 200, entries, {}

    def _paths_info(self, groups: Any, authorised: bool, body: bytes, query: Any) -> Answer:
        files = self._at(groups, authorised)[1].files
        try:
            paths = json.loads(body)["paths"]
        except ValueError:
            paths = parse_qs(body.decode()).get("paths", [])
        return 200, [_file_entry(path, files[path]) for path in paths if path in files], {}

    def _refs(self, groups: Any, authorised: bool, body: bytes, query: Any) -> Answer:
        repo = self._repo(groups, authorised)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": target}
            for name, target in repo.branches.items()
        ]
        return 200, {"branches": branches, "tags": [], "converts": [], "pullRequests": []}, {}

    def _branch(self, groups: Any, authorised: bool, body: bytes, query: Any) -> Answer:
        self._check_may_write(authorised)
        repo = self._repo(groups, authorised)
        if groups["branch"] in repo.branches:
            return _error(409, None, "Reference already exists")
        start = repo.at((json.loads(body or b"{}") or {}).get("startingPoint") or "main")
        if start is None:
            return _error(404, "RevisionNotFound", "Invalid starting point")
        repo.branches[groups["branch"]] = start.id
        return 200, {}, {}

    def _preupload(self, groups: Any, authorised: bool, body: bytes, query: Any) -> Answer:
        self._check_may_write(authorised)
        self._at(groups, authorised)
        files = [
            {
                "path": entry["path"],
                "uploadMode": "lfs" if entry["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for entry in json.loads(body)["files"]
        ]
        return 200, {"files": files}, {}

    def _lfs_batch(self, groups: Any, authorised: bool, body: bytes, query: Any) -> Answer:
        self._check_may_write(authorised)
        self._repo(groups, authorised)
        objects = []
        for entry in json.loads(body)["objects"]:
            if entry["oid"] not in self._blobs:
                entry["actions"] = {"upload": {"href": f"{self.url}/lfs/{entry['oid']}"}}
            objects.append(entry)
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _lfs_upload(self, groups: Any, authorised: bool, body: bytes, query: Any) -> Answer:
        # The address was signed by the batch request, so it takes no token.
        if hashlib.sha256(body).hexdigest() != groups["oid"]:
            return _error(400, None, "the content does not have this SHA-256")
        self._blobs[groups["oid"]] = body
        return 200, b"", {}

    def _new_commit(self, groups: Any, authorised: bool, body: bytes, query: Any) -> Answer:
        self._check_may_write(authorised)
        repo, parent = self._at(groups, authorised)
        message, files, changed = "", dict(parent.files), []
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, parent.id):
                    return _error(412, None, "A commit has happened since. Please refresh and try again.")
                continue
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self._blobs:
                    return _error(400, None, f"{value['path']} was not uploaded")
                files[value["path"]] = self._blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif item["key"] == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                files = {path: data for path, data in files.items() if not path.startswith(folder)}
            changed.append(value["path"])
        commit = self._commit(repo, groups["revision"], message, tuple(changed), files)
        url = f"{self.url}/{repo.repo_id}/commit/{commit.id}"
        return 200, {"success": True, "commitOid": commit.id, "commitUrl": url, "hookOutput": ""}, {}

    def _resolve(self, groups: Any, authorised: bool, body: bytes, query: Any) -> Answer:
        commit = self._at(groups, authorised)[1]
        headers = {"X-Repo-Commit": commit.id}
        data = commit.files.get(groups["path"])
        if data is None:
            status, content, more = _error(404, "EntryNotFound", "Entry not found")
            return status, content, {**more, **headers}
        entry = _file_entry(groups["path"], data)
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(len(data))}
        return 200, data, {**headers, "ETag": f'"{entry["oid"]}"'}

    def _whoami(self, groups: Any, authorised: bool, body: bytes, query: Any) -> Answer:
        self._check_may_write(authorised)
        return 200, {"type": "user", "name": "me", "orgs": [], "auth": {"type": "access_token"}}, {}

    def _validate_yaml(self, groups: Any, authorised: bool, body: bytes, query: Any) -> Answer:
        return 200, {"errors": [], "warnings": []}, {}


_API = r"/api/models/(?P<repo>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>refs/[^/]+/[^/]+|[^/]+)"
_ROUTES: tuple[tuple[str, str, Callable[..., Answer]], ...] = (
    (r"/api/repos/create", "POST", HubStub._create),
    (r"/api/whoami-v2", "GET", HubStub._whoami),
    (r"/api/validate-yaml", "POST", HubStub._validate_yaml),
    (_API, "GET", HubStub._info),
    (rf"{_API}/revision/(?P<revision>.+)", "GET", HubStub._info),
    (rf"{_API}/tree/{_REVISION}(?:/(?P<path>.+))?", "GET", HubStub._tree),
    (rf"{_API}/paths-info/{_REVISION}", "POST", HubStub._paths_info),
    (rf"{_API}/refs", "GET", HubStub._refs),
    (rf"{_API}/branch/(?P<branch>.+)", "POST", HubStub._branch),
    (rf"{_API}/preupload/{_REVISION}", "POST", HubStub._preupload),
    (rf"{_API}/commit/{_REVISION}", "POST", HubStub._new_commit),
    (r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "POST", HubStub._lfs_batch),
    (r"/lfs/(?P<oid>[0-9a-f]{64})", "PUT", HubStub._lfs_upload),
    (rf"/(?P<repo>[^/]+/[^/]+)/resolve/{_REVISION}/(?P<path>.+)", "GET", HubStub._resolve),
)


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, lets the hub answer, writes the answer."""

    hub: HubStub
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        body = self._body()
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        status, content, headers = self.hub.answer(self.command, self.path, token if scheme else None, body)
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def log_message(self, *args: Any) -> None:
        """Says nothing: `HubStub.requests` has it all."""


def _error(status: int, code: str | None, message: str) -> Answer:
    """An error in the Hub's manner: the client looks at the headers."""
    return status, {"error": message}, {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


def _sha1(data: bytes) -> str:
    """The id that Git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _file_entry(path: str, data: bytes) -> dict[str, Any]:
    """A file as the Hub lists it."""
    entry: dict[str, Any] = {"type": "file", "path": path, "oid": _sha1(data), "size": len(data)}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry
