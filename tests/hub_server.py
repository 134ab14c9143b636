"""A Hub for tests: the part of its HTTP protocol that creating, pushing to and pulling from models and Spaces needs.

It listens on loopback, keeps everything in memory and is driven by the real client in a subprocess:

    with HubServer({"hf_secret": User("me")}) as hub:
        hub.client("from huggingface_hub import HfApi; HfApi().upload_folder(**arguments)", home, "hf_secret", ...)
        assert hub.repos["me/model"].head().files["config.json"] == b"..."
        assert hub.repos["spaces/me/demo"].sdk == "gradio"

It fails on demand, so that a test can watch the client do so:

    fault = hub.fail("PUT", "/objects/.*", "drop", times=2)
    ...
    assert fault.struck == 2  # it did happen

Git's objects are those of the real Hub in name only: a commit is a whole tree, its sha a hash of what it holds.
"""

import base64
import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from subprocess import CompletedProcess
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import forked

LARGE_FILE_BYTES = 10_000_000


@dataclass
class User:
    """Who a token belongs to; `role` is "write" or "read", `orgs` has that of the user in each organisation."""

    name: str
    role: str = "write"
    orgs: dict[str, str] = field(default_factory=dict)

    def may_read(self, owner: str) -> bool:
        return owner == self.name or owner in self.orgs

    def may_write(self, owner: str) -> bool:
        return self.role == "write" and (owner == self.name or self.orgs.get(owner) in ("write", "admin"))


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
    sdk: str | None = None  # of a Space
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)  # "refs/pr/1" is the first pull request's

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
class Fault:
    """What is wrong with requests of a method whose path matches a pattern, the next `times` times, after `skip` more.

    `how` is a status that is answered instead, or: "drop", the connection is closed while the request is still being
    read; "lose", the request is carried out but never answered; "cut", half of the answer's body is sent; or a number
    of seconds (`float`) to wait.
    """

    method: str
    pattern: str
    how: int | float | str
    times: float
    skip: int
    struck: int = 0

    def strikes(self, method: str, path: str) -> bool:
        if self.times < 1 or method not in self.method.split() or not re.fullmatch(self.pattern, path):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        self.struck += 1
        return True


@dataclass
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def owner_of(repo_id: str) -> str:
    return repo_id.split("/")[-2]


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
        repos (`dict[str, Repo]`): Models by id, Spaces by `"spaces/"` and id.
        objects (`dict[str, bytes]`): Large files by sha256.
        requests (`list[tuple[str, str, int]]`): Method, path and answered status of each request, in order; 0 is no
            answer.
        paths_with_token (`list[str]`): Paths of the requests that came with a token, those to the storage included.
        before_commit (`Callable[[Repo], None]`, *optional*): Called when a commit arrives, before it is looked at:
            somebody else's may come first.
    """

    def __init__(self, users: dict[str, User]):
        self.users = users
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.paths_with_token: list[str] = []
        self.before_commit: Callable[[Repo], None] = lambda repo: None
        self._faults: list[Fault] = []
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

    def fail(self, method: str, pattern: str, how: int | str, times: float = 1, skip: int = 0) -> Fault:
        """Makes requests fail, those whose path without a query matches the whole of `pattern`; see [`Fault`]."""
        self._faults.append(Fault(method, pattern, how, times, skip))
        return self._faults[-1]

    def delay(self, method: str, pattern: str, seconds: float, times: float = float("inf")) -> Fault:
        """Makes requests wait before they are looked at."""
        return self.fail(method, pattern, float(seconds), times)

    def heal(self) -> None:
        """Ends all failures and delays."""
        self._faults.clear()

    def add_repo(self, repo_id: str, private: bool = False, sdk: str | None = None) -> Repo:
        """A new repo with the first commit that the Hub makes by itself."""
        repo = self.repos[repo_id] = Repo(private, sdk)
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

    def client(
        self, code: str, home: os.PathLike | str, token: str | None = None, **arguments: Any
    ) -> CompletedProcess:
        """Runs Python code, which finds `arguments` in a dict, in a process of its own that talks as much as it can."""
        read = "import json, sys; arguments = json.loads(sys.argv[1])\n"
        command = [sys.executable, "-c", read + code, json.dumps(arguments, default=str)]
        talkative = {"HF_HUB_VERBOSITY": "debug", "HF_DEBUG": "1"}
        environment = self.environment(home, token) | talkative
        return forked.run(command, env=environment, timeout=120)

    def user(self, request: "Request") -> User | None:
        header = request.headers.get("Authorization")
        if header is None:
            return None
        user = self.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def repo(self, request: "Request", repo_id: str, write: bool = False, propose: bool = False) -> Repo:
        """The repo if the request may read it, write to it, or propose a change, for which any write token will do."""
        user, repo = self.user(request), self.repos.get(repo_id)
        if repo is None or (repo.private and not (user is not None and user.may_read(owner_of(repo_id)))):
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and not (propose and user is not None and user.role == "write"):
            self.require_write(user, repo_id)
        return repo

    @staticmethod
    def require_write(user: User | None, repo_id: str) -> None:
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if not user.may_write(owner_of(repo_id)):
            raise HubError(403, f"You don't have the rights to write to {repo_id} with this token")

    def _listen(self, routes: list["Route"]) -> ThreadingHTTPServer:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or every answer waits 40 ms for the client to acknowledge its headers

            def handle(self) -> None:
                with suppress(ConnectionError):  # the client hung up
                    super().handle()

            def serve(self) -> None:
                url = urlsplit(self.path)
                with hub._lock:
                    if "Authorization" in self.headers:
                        hub.paths_with_token.append(url.path)
                    how = next((fault.how for fault in hub._faults if fault.strikes(self.command, url.path)), None)
                    if how == "drop":
                        return self._hang_up()
                if isinstance(how, float):
                    time.sleep(how)
                # Always read the body: what is left of it would be taken for the next request.
                request = Request(self.headers, self._body(), parse_qs(url.query))
                with hub._lock:
                    if isinstance(how, int):
                        answer = Answer(json.dumps({"error": HTTPStatus(how).phrase}).encode(), how)
                    else:
                        answer = self._answer(request, url.path)
                    if how == "lose":
                        return self._hang_up()
                    hub.requests.append((self.command, self.path, answer.status))
                self.send_response(answer.status)
                for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body if how != "cut" else answer.body[: len(answer.body) // 2])
                if how == "cut":
                    self.close_connection = True
                return None

            def _hang_up(self) -> None:
                hub.requests.append((self.command, self.path, 0))
                self.close_connection = True

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
    orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in user.orgs.items()]
    return {"type": "user", "name": user.name, "orgs": orgs, "auth": {"accessToken": {"role": user.role}}}


def create_repo(hub: HubServer, request: Request) -> dict:
    user, payload = hub.user(request), request.json()
    owner, kind = payload["organization"] or (user.name if user else ""), payload.get("type", "model")
    repo_id = f"{'spaces/' if kind == 'space' else ''}{owner}/{payload['name']}"
    hub.require_write(user, repo_id)
    url = f"{hub.endpoint}/{repo_id}"
    if repo_id in hub.repos:
        raise HubError(409, f"You already created this {kind} repo", url=url)
    if kind == "space" and not payload.get("sdk"):
        raise HubError(400, "A Space needs an sdk")
    hub.add_repo(repo_id, private=payload.get("visibility") == "private", sdk=payload.get("sdk"))
    return {"url": url, "name": repo_id}


def create_branch(hub: HubServer, request: Request, repo_id: str, branch: str) -> dict:
    repo = hub.repo(request, repo_id, write=True)
    if branch in repo.branches:
        raise HubError(409, "Reference already exists")
    repo.branches[branch] = repo.head(request.json().get("startingPoint", "main")).sha
    return {}


def heal(hub: HubServer, request: Request) -> dict:
    """No part of the Hub: for a client process that goes on when the failures are over."""
    hub.heal()
    return {}


def validate_yaml(hub: HubServer, request: Request) -> dict:
    return {"errors": [], "warnings": []}


def preupload(hub: HubServer, request: Request, repo_id: str, revision: str) -> dict:
    head = hub.repo(request, repo_id, write=True, propose=proposes(request, revision)).head(revision)

    def mode(file: dict) -> dict:
        binary = b"\0" in base64.b64decode(file["sample"])
        large = binary or file["size"] > LARGE_FILE_BYTES or file["path"].endswith(".safetensors")
        old = head.files.get(file["path"])
        oid = None if old is None else (sha256(old) if file["path"] in head.large else blob_sha(old))
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    return {"files": [mode(file) for file in request.json()["files"]]}


def proposes(request: Request, revision: str) -> bool:
    """Whether it is about a pull request, new or old."""
    return "create_pr" in request.query or revision.startswith("refs/pr/")


def lfs_batch(hub: HubServer, request: Request, repo_id: str) -> dict:
    hub.repo(request, repo_id, write=True, propose="ref" not in request.json())  # a new pull request has no ref yet
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
    repo = hub.repo(request, repo_id, write=True, propose=proposes(request, revision))
    hub.before_commit(repo)
    items = [(item["key"], item["value"]) for item in map(json.loads, request.body.splitlines())]
    parent, is_new_pull_request = dict(items)["header"].get("parentCommit", ""), "create_pr" in request.query
    head = repo.head(parent or revision if is_new_pull_request else revision)
    files, large, message = dict(head.files), set(head.large), ""
    for key, value in items:
        path = value.get("path", "")
        if key == "header":
            message = value["summary"]
            if not head.sha.startswith(parent):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
        elif key == "file":
            files[path] = base64.b64decode(value["content"])
            large.discard(path)
            if len(files[path]) > LARGE_FILE_BYTES:
                raise HubError(400, f"{path} is larger than 10 MB and must be stored by LFS")
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
    answer = {"success": True}
    if is_new_pull_request:
        number = 1 + sum(branch.startswith("refs/pr/") for branch in repo.branches)
        revision = f"refs/pr/{number}"
        answer["pullRequestUrl"] = f"{hub.endpoint}/{repo_id}/discussions/{number}"
    sha = repo.add(revision, Commit(message, files, frozenset(large), parent=head.sha))
    return answer | {"commitUrl": f"{hub.endpoint}/{repo_id}/commit/{sha}", "commitOid": sha}


def repo_info(hub: HubServer, request: Request, repo_id: str, revision: str) -> dict:
    repo = hub.repo(request, repo_id)
    head = repo.head(revision or "main")
    siblings = [{"rfilename": path} for path in sorted(head.files)]
    name, sdk = repo_id.removeprefix("spaces/"), {} if repo.sdk is None else {"sdk": repo.sdk}
    return {"id": name, "sha": head.sha, "private": repo.private, "tags": [], "siblings": siblings, **sdk}


def refs(hub: HubServer, request: Request, repo_id: str) -> dict:
    branches = hub.repo(request, repo_id).branches.items()
    found: dict[str, list] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    for name, sha in branches:
        if name.startswith("refs/pr/"):
            found["pullRequests"].append({"name": name.rpartition("/")[2], "ref": name, "targetCommit": sha})
        else:
            found["branches"].append({"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha})
    return found


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
        return part(request, content, {"X-Repo-Commit": head.sha, "ETag": f'"{blob_sha(content)}"'})
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
    return part(request, hub.objects[oid], {})


def part(request: Request, content: bytes, headers: dict[str, str]) -> Answer:
    """The content, or what is left of it from where the client says that it already has it."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if match is None:
        return Answer(content, headers=headers)
    start, stop = int(match[1]), min(int(match[2] or len(content)) + 1, len(content))
    if start >= len(content):
        return Answer(status=416, headers={**headers, "Content-Range": f"bytes */{len(content)}"})
    where = f"bytes {start}-{stop - 1}/{len(content)}"
    return Answer(content[start:stop], 206, {**headers, "Content-Range": where})


def refuse_token(request: Request) -> None:
    """Storage belongs to someone else: a client that sends its token there gives it away."""
    if "Authorization" in request.headers:
        raise HubError(400, "Only one auth mechanism allowed")


_REPO = r"((?:spaces/)?[^/]+/[^/]+?)"
_API = f"/api/(?:models/)?{_REPO}"
HUB_ROUTES: list[Route] = [
    ("GET", "/api/whoami-v2", who_am_i),
    ("POST", "/api/repos/create", create_repo),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("POST", "/heal", heal),
    ("POST", f"{_API}/branch/([^/]+)", create_branch),
    ("POST", f"{_API}/preupload/([^/]+)", preupload),
    ("POST", f"{_API}/commit/([^/]+)", commit),
    ("GET", f"{_API}/refs", refs),
    ("GET", f"{_API}/tree/([^/]+)", tree),
    ("GET", f"{_API}(?:/revision/([^/]+))?", repo_info),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", lfs_batch),
    ("POST", rf"/{_REPO}\.git/info/lfs/verify", lfs_verify),
    ("GET HEAD", f"/{_REPO}/resolve/([^/]+)/(.+)", resolve),
]
STORAGE_ROUTES: list[Route] = [
    ("PUT", "/objects/([0-9a-f]+)", put_object),
    ("GET HEAD", "/objects/([0-9a-f]+)", get_object),
]
