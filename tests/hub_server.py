"""A Hub for tests: the part of its HTTP protocol that creating, pushing to and pulling from a model repo needs.

It listens on loopback, keeps everything in memory and is driven by the real client in a subprocess:

    with HubServer({"hf_secret": User("me")}) as hub:
        subprocess.run([sys.executable, ...], env=hub.environment(home, token="hf_secret"))
        assert hub.repos["me/model"].head().files["config.json"] == b"..."

Git's objects are those of the real Hub in name only: a commit is a whole tree, its sha a hash of what it holds.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE_FILE_BYTES = 10_000_000


@dataclass
class User:
    """Who a token belongs to; `role` is "write" or "read"."""

    name: str
    role: str = "write"


@dataclass
class Commit:
    message: str
    files: dict[str, bytes]
    large: frozenset[str]  # paths that are stored by LFS
    parent: str | None = None

    @property
    def sha(self) -> str:
        tree = sorted((path, sha256(content)) for path, content in self.files.items())
        return hashlib.sha1(json.dumps([self.message, self.parent, tree]).encode()).hexdigest()


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, commit: Commit) -> str:
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit.sha

    def head(self, revision: str = "main") -> Commit:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def history(self, revision: str = "main") -> list[Commit]:
        """Commits of a branch, newest first."""
        commits = [self.head(revision)]
        while (parent := commits[-1].parent) is not None:
            commits.append(self.commits[parent])
        return commits


class HubError(Exception):
    """An answer that the client turns into an exception; `code` is what tells it which."""

    def __init__(self, status: int, message: str, code: str | None = None, **content: Any):
        super().__init__(message)
        self.status, self.code, self.content = status, code, {"error": message, **content}


@dataclass
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def blob_sha(content: bytes) -> str:
    """The name that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(content: bytes) -> bytes:
    """What git stores in place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(content)}\nsize {len(content)}\n".encode()


class HubServer:
    """Serves the Hub at `endpoint` and its large files at another origin, as the real one does.

    Args:
        users (`dict[str, User]`): Who each token belongs to.

    Attributes:
        repos (`dict[str, Repo]`): Model repos by id.
        objects (`dict[str, bytes]`): Large files by sha256.
        requests (`list[tuple[str, str, int]]`): Method, path and answered status of each request, in order.
    """

    def __init__(self, users: dict[str, User]):
        self.users = users
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []
        self._lock = threading.Lock()
        self._hub = self._listen(HUB_ROUTES)
        self._storage = self._listen(STORAGE_ROUTES)
        self.endpoint, self.storage = (
            f"http://127.0.0.1:{server.server_address[1]}" for server in (self._hub, self._storage)
        )

    def __enter__(self) -> "HubServer":
        for server in (self._hub, self._storage):
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in (self._hub, self._storage):
            server.shutdown()
            server.server_close()

    def add_repo(self, repo_id: str, private: bool = False) -> Repo:
        """A new repo with the first commit that the Hub makes by itself."""
        repo = self.repos[repo_id] = Repo(private)
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        repo.add("main", Commit("initial commit", {".gitattributes": attributes}, frozenset()))
        return repo

    def environment(self, home: os.PathLike | str, token: str | None = None) -> dict[str, str]:
        """The environment of a client process: this Hub, a home of its own, no proxy, no token but the given one."""
        ours = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(ours) and not k.lower().endswith("_proxy")}
        kept |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        kept |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        return kept if token is None else kept | {"HF_TOKEN": token}

    def user(self, request: "Request") -> User | None:
        header = request.headers.get("Authorization")
        if header is None:
            return None
        user = self.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def repo(self, request: "Request", repo_id: str, write: bool = False) -> Repo:
        """The repo if the request may read it (or write to it)."""
        user, repo = self.user(request), self.repos.get(repo_id)
        owned = user is not None and user.name == repo_id.split("/")[0]
        if repo is None or (repo.private and not owned):
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write:
            self.require_write(user, repo_id)
        return repo

    @staticmethod
    def require_write(user: User | None, repo_id: str) -> None:
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if user.role != "write" or user.name != repo_id.split("/")[0]:
            raise HubError(403, f"You don't have the rights to write to {repo_id} with this token")

    def _listen(self, routes: list["Route"]) -> ThreadingHTTPServer:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def serve(self) -> None:
                url = urlsplit(self.path)
                # Always read the body: what is left of it would be taken for the next request.
                request = Request(self.headers, self._body(), parse_qs(url.query))
                with hub._lock:
                    answer = self._answer(request, url.path)
                    hub.requests.append((self.command, self.path, answer.status))
                self.send_response(answer.status)
                for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body)

            do_GET = do_HEAD = do_POST = do_PUT = serve  # noqa: N815

            def _answer(self, request: Request, path: str) -> Answer:
                try:
                    for method, pattern, function in routes:
                        match = re.fullmatch(pattern, path)
                        if match and self.command in method.split():
                            result = function(hub, request, *[unquote(group or "") for group in match.groups()])
                            return result if isinstance(result, Answer) else Answer(json.dumps(result).encode())
                    raise HubError(404, f"{self.command} {path} is not spoken here")
                except HubError as error:
                    headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
                    return Answer(json.dumps(error.content).encode(), error.status, headers)

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def log_message(self, format: str, *args: object) -> None:
                pass

        return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@dataclass
class Request:
    headers: Any
    body: bytes
    query: dict[str, list[str]]

    def json(self) -> Any:
        return json.loads(self.body)


Route = tuple[str, str, Callable[..., Any]]


def who_am_i(hub: HubServer, request: Request) -> dict:
    user = hub.user(request)
    if user is None:
        raise HubError(401, "Invalid username or password.")
    return {"type": "user", "name": user.name, "orgs": [], "auth": {"accessToken": {"role": user.role}}}


def create_repo(hub: HubServer, request: Request) -> dict:
    user, payload = hub.user(request), request.json()
    owner = payload["organization"] or (user.name if user else "")
    repo_id = f"{owner}/{payload['name']}"
    hub.require_write(user, repo_id)
    url = f"{hub.endpoint}/{repo_id}"
    if repo_id in hub.repos:
        raise HubError(409, "You already created this model repo", url=url)
    hub.add_repo(repo_id, private=payload.get("visibility") == "private")
    return {"url": url, "name": repo_id}


def create_branch(hub: HubServer, request: Request, repo_id: str, branch: str) -> dict:
    repo = hub.repo(request, repo_id, write=True)
    if branch in repo.branches:
        raise HubError(409, "Reference already exists")
    repo.branches[branch] = repo.head(request.json().get("startingPoint", "main")).sha
    return {}


def validate_yaml(hub: HubServer, request: Request) -> dict:
    return {"errors": [], "warnings": []}


def preupload(hub: HubServer, request: Request, repo_id: str, revision: str) -> dict:
    head = hub.repo(request, repo_id, write=True).head(revision)

    def mode(file: dict) -> dict:
        binary = b"\0" in base64.b64decode(file["sample"])
        large = binary or file["size"] > LARGE_FILE_BYTES or file["path"].endswith(".safetensors")
        old = head.files.get(file["path"])
        oid = None if old is None else (sha256(old) if file["path"] in head.large else blob_sha(old))
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    return {"files": [mode(file) for file in request.json()["files"]]}


def lfs_batch(hub: HubServer, request: Request, repo_id: str) -> dict:
    hub.repo(request, repo_id, write=True)
    objects = request.json()["objects"]
    for item in objects:
        if item["oid"] not in hub.objects:
            item["actions"] = {
                "upload": {"href": f"{hub.storage}/objects/{item['oid']}"},
                "verify": {"href": f"{hub.endpoint}/{repo_id}.git/info/lfs/verify"},
            }
    return {"transfer": "basic", "objects": objects}


def lfs_verify(hub: HubServer, request: Request, repo_id: str) -> dict:
    item = request.json()
    if len(hub.objects.get(item["oid"], b"")) != item["size"]:
        raise HubError(404, "Object was not uploaded")
    return {}


def commit(hub: HubServer, request: Request, repo_id: str, revision: str) -> dict:
    repo = hub.repo(request, repo_id, write=True)
    head = repo.head(revision)
    files, large, message = dict(head.files), set(head.large), ""
    for key, value in ((item["key"], item["value"]) for item in map(json.loads, request.body.splitlines())):
        path = value.get("path", "")
        if key == "header":
            message = value["summary"]
            if not head.sha.startswith(value.get("parentCommit", "")):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
        elif key == "file":
            files[path] = base64.b64decode(value["content"])
            large.discard(path)
        elif key == "lfsFile":
            if value["oid"] not in hub.objects:
                raise HubError(400, f"The content of {path} was not uploaded")
            files[path] = hub.objects[value["oid"]]
            large.add(path)
        elif key in ("deletedFile", "deletedFolder"):
            for old in [old for old in files if old == path or old.startswith(path.rstrip("/") + "/")]:
                del files[old]
                large.discard(old)
        else:
            raise HubError(400, f"Unknown key in commit: {key}")
    sha = repo.add(revision, Commit(message, files, frozenset(large), parent=head.sha))
    return {"commitUrl": f"{hub.endpoint}/{repo_id}/commit/{sha}", "commitOid": sha, "success": True}


def model_info(hub: HubServer, request: Request, repo_id: str, revision: str) -> dict:
    repo = hub.repo(request, repo_id)
    head = repo.head(revision or "main")
    siblings = [{"rfilename": path} for path in sorted(head.files)]
    return {
        "id": repo_id, "modelId": repo_id, "sha": head.sha, "private": repo.private, "tags": [], "siblings": siblings,
    }  # fmt: skip


def refs(hub: HubServer, request: Request, repo_id: str) -> dict:
    branches = hub.repo(request, repo_id).branches.items()
    found = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches]
    return {"branches": found, "converts": [], "tags": []}


def tree(hub: HubServer, request: Request, repo_id: str, revision: str) -> list[dict]:
    head = hub.repo(request, repo_id).head(revision)
    entries = []
    for path, content in sorted(head.files.items()):
        stored = pointer(content) if path in head.large else content
        entry = {"type": "file", "path": path, "size": len(content), "oid": blob_sha(stored)}
        if path in head.large:
            entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": len(stored)}
        entries.append(entry)
    return entries


def resolve(hub: HubServer, request: Request, repo_id: str, revision: str, path: str) -> Answer:
    head = hub.repo(request, repo_id).head(revision)
    if path not in head.files:
        raise HubError(404, "Entry not found", "EntryNotFound")
    content = head.files[path]
    if path not in head.large:
        return Answer(content, headers={"X-Repo-Commit": head.sha, "ETag": f'"{blob_sha(content)}"'})
    headers = {"X-Linked-ETag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
    location = f"{hub.storage}/objects/{sha256(content)}"
    return Answer(status=302, headers={"X-Repo-Commit": head.sha, "ETag": '""', **headers, "Location": location})


def put_object(hub: HubServer, request: Request, oid: str) -> Answer:
    refuse_token(request)
    if sha256(request.body) != oid:
        raise HubError(400, "The content does not match its sha256")
    hub.objects[oid] = request.body
    return Answer()


def get_object(hub: HubServer, request: Request, oid: str) -> Answer:
    refuse_token(request)
    if oid not in hub.objects:
        raise HubError(404, "No such object")
    return Answer(hub.objects[oid])


def refuse_token(request: Request) -> None:
    """Storage belongs to someone else: a client that sends its token there gives it away."""
    if "Authorization" in request.headers:
        raise HubError(400, "Only one auth mechanism allowed")


_REPO = r"([^/]+/[^/]+?)"
HUB_ROUTES: list[Route] = [
    ("GET", "/api/whoami-v2", who_am_i),
    ("POST", "/api/repos/create", create_repo),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("POST", f"/api/models/{_REPO}/branch/([^/]+)", create_branch),
    ("POST", f"/api/models/{_REPO}/preupload/([^/]+)", preupload),
    ("POST", f"/api/models/{_REPO}/commit/([^/]+)", commit),
    ("GET", f"/api/models/{_REPO}/refs", refs),
    ("GET", f"/api/models/{_REPO}/tree/([^/]+)", tree),
    ("GET", f"/api/models/{_REPO}(?:/revision/([^/]+))?", model_info),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", lfs_batch),
    ("POST", rf"/{_REPO}\.git/info/lfs/verify", lfs_verify),
    ("GET HEAD", f"/{_REPO}/resolve/([^/]+)/(.+)", resolve),
]
STORAGE_ROUTES: list[Route] = [
    ("PUT", "/objects/([0-9a-f]+)", put_object),
    ("GET HEAD", "/objects/([0-9a-f]+)", get_object),
]
