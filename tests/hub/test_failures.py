"""What happens on the way to the Hub and back: servers that answer 500 or die, others who push, and secrets."""

import json
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

import numpy as np
import pytest
from hub_server import Commit, HubServer, User, sha256

WRITE = "hf_write" + "Aa0" * 10

# The client's waits between its tries add up to half a minute.
QUICK = "import time; pause = time.sleep; time.sleep = lambda seconds: pause(seconds / 1000)\n"


@pytest.fixture
def hub():
    with HubServer({WRITE: User("ada")}) as server:
        yield server


def run(hub, workplace, code, **arguments):
    """What the code printed, as JSON; its token is in none of its words and files, and was not given to the storage."""
    result = hub.client(QUICK + code, workplace / "home", WRITE, **arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "authenticated: True" in result.stderr  # it did talk, with the token
    assert WRITE not in result.stdout + result.stderr
    assert not [path for path in workplace.rglob("*") if path.is_file() and WRITE.encode() in path.read_bytes()]
    assert hub.paths_with_token
    assert not [path for path in hub.paths_with_token if path.startswith("/objects/")]
    return json.loads(result.stdout)


def model_files(name, size=1000):
    """A small model with weights of its own, so that its requests to the storage can be distinguished from others'."""
    seed = int.from_bytes(name.encode(), "big")
    return {"config.json": json.dumps(name).encode(), "model.safetensors": np.random.default_rng(seed).bytes(size)}


def save(folder, files):
    folder.mkdir(parents=True)
    for path, content in files.items():
        (folder / path).write_bytes(content)


PUSH_EACH = """
import os, urllib.request
from hf_guided.hub import push_folder
from huggingface_hub import HfApi

def attempt(name):
    try:
        return push_folder(f"{arguments['folder']}/{name}", "ada/" + name)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

first = {name: attempt(name) for name in arguments["names"]}
heads = {name: HfApi().model_info("ada/" + name).sha for name in arguments["names"]}
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/heal", data=b"")
second = {name: attempt(name) for name in arguments["names"]}
print(json.dumps([first, heads, second]))
"""

UPLOAD_STEPS = {
    "preupload": ("POST", "/api/models/ada/{name}/preupload/main"),
    "batch": ("POST", r"/ada/{name}\.git/info/lfs/objects/batch"),
    "put": ("PUT", "/objects/{oid}"),
    "verify": ("POST", r"/ada/{name}\.git/info/lfs/verify"),
    "commit": ("POST", "/api/models/ada/{name}/commit/main"),
}
FAILURES = {500: "answered 500: Internal Server Error", 429: "answered 429: Too Many Requests"}
FAILURES |= dict.fromkeys(("drop", "lose"), "could not be reached: ")


def test_a_push_is_retried_or_fails_clearly_and_never_leaves_half(hub, tmp_path):
    faults = {}
    for step, (method, pattern) in UPLOAD_STEPS.items():
        for how in FAILURES:
            for times in (1, float("inf")):
                name = f"{step}-{how}-{times}"
                save(tmp_path / "models" / name, model_files(name))
                oid = sha256(model_files(name)["model.safetensors"])
                faults[name] = hub.fail(method, pattern.format(name=name, oid=oid), how, times)
    first, heads, second = run(hub, tmp_path, PUSH_EACH, folder=tmp_path / "models", names=list(faults))
    for name, fault in faults.items():
        step, how, _ = name.split("-")
        repo, url = hub.repos[f"ada/{name}"], f"{hub.endpoint}/ada/{name}"
        assert fault.struck, name
        failed = first[name] != url
        if failed:
            expected = f"PushError: Pushing to ada/{name} failed, the Hub {FAILURES[fault.how]}"
            assert first[name].startswith(expected), name
        if step != "commit":
            assert failed == (fault.times > 0), name  # what passes is retried
        assert (heads[name] == repo.history()[-1].sha) == failed, name  # nothing of a failed push is there
        assert second[name] == url
        assert [commit.message for commit in repo.history()] == ["Upload with hf-guided", "initial commit"]
        assert repo.head().files.items() >= model_files(name).items()


PULL_EACH = """
import os, urllib.request
from pathlib import Path
from huggingface_hub import snapshot_download

def attempt(name):
    try:
        folder = Path(snapshot_download("ada/" + name))
        return {path.name: path.read_bytes().hex() for path in folder.iterdir() if path.name[0] != "."}
    except Exception as error:
        return f"{type(error).__name__}: {error}"

first = {name: attempt(name) for name in arguments["names"]}
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/heal", data=b"")
second = {name: attempt(name) for name in arguments["names"]}
print(json.dumps([first, second]))
"""

DOWNLOAD_STEPS = {
    "info": ("GET", "/api/models/ada/{name}/revision/main"),
    "tree": ("GET", "/api/models/ada/{name}/tree/.*"),
    "head": ("HEAD", "/ada/{name}/resolve/.*/model.safetensors"),
    "get": ("GET", "/ada/{name}/resolve/.*/config.json"),
    "object": ("GET", "/objects/{oid}"),
}


def add_model(hub, name, files):
    repo = hub.add_repo(f"ada/{name}", private=True)
    repo.add("main", Commit("model", {**repo.head().files, **files}, frozenset({"model.safetensors"}), repo.head().sha))
    hub.objects[sha256(files["model.safetensors"])] = files["model.safetensors"]


def test_a_download_that_failed_leaves_nothing_in_the_cache_that_is_wrong(hub, tmp_path):
    faults = {}
    for step, (method, pattern) in DOWNLOAD_STEPS.items():
        for how in (500, 429, "drop", "cut") if step != "head" else (500, 429, "drop"):
            for times in (1, float("inf")):
                name = f"{step}-{how}-{times}"
                add_model(hub, name, model_files(name))
                oid = sha256(model_files(name)["model.safetensors"])
                faults[name] = hub.fail(method, pattern.format(name=name, oid=oid), how, times)
    first, second = run(hub, tmp_path, PULL_EACH, names=list(faults))
    for name, fault in faults.items():
        right = {path: content.hex() for path, content in model_files(name).items()}
        assert fault.struck, name
        if isinstance(first[name], str):
            assert first[name].split(":")[0] in ("LocalEntryNotFoundError", "HfHubHTTPError", "RemoteProtocolError")
        else:
            assert first[name] == right, name
        if fault.times > 0:
            assert isinstance(first[name], str), name
        elif name.startswith("object") and fault.how != 500:
            assert first[name] == right, name  # retried
        assert second[name] == right, name


LARGE = """
from pathlib import Path
from hf_guided.hub import push_folder
from huggingface_hub import snapshot_download
push_folder(arguments["folder"], "ada/large")
print(json.dumps(snapshot_download("ada/large")))
"""


def test_large_files_survive_a_connection_that_breaks_in_their_midst(hub, tmp_path):
    files = model_files("large", size=21_500_000)
    files["tokenizer.json"] = b'"%s"' % (b"text " * 2_100_000)  # not binary, but over 10 MB
    save(tmp_path / "model", files)
    weights = "/objects/" + sha256(files["model.safetensors"])
    upload = hub.fail("PUT", weights, "drop", times=2)
    download = hub.fail("GET", weights, "cut")
    pulled = run(hub, tmp_path, LARGE, folder=tmp_path / "model")
    assert (upload.struck, download.struck) == (2, 1)
    assert hub.repos["ada/large"].head().large == {"model.safetensors", "tokenizer.json"}
    # The client resumes where it was cut off, in steps of 10 MB.
    assert [(method, status) for method, path, status in hub.requests if path == weights] == [
        ("PUT", 0), ("PUT", 0), ("PUT", 200), ("GET", 200), ("GET", 206),
    ]  # fmt: skip
    for path, content in files.items():
        assert (Path(pulled) / path).read_bytes() == content


OVERTAKEN = """
from hf_guided.hub import push_folder

def attempt(name):
    try:
        return push_folder(f"{arguments['folder']}/{name}", "ada/" + name)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

print(json.dumps([attempt("once"), attempt("always")]))
"""


def test_a_push_that_others_overtake_builds_on_theirs(hub, tmp_path):
    repos = {name: hub.add_repo(f"ada/{name}") for name in ("once", "always")}
    for name in repos:
        save(tmp_path / "models" / name, model_files(name))

    def overtake(repo):
        if repo is repos["always"] or len(repo.commits) == 1:
            head = repo.head()
            files = {**head.files, "notes.txt": b"%d" % len(repo.commits)}
            repo.add("main", Commit("Somebody else's", files, frozenset(), head.sha))

    hub.before_commit = overtake
    once, always = run(hub, tmp_path, OVERTAKEN, folder=tmp_path / "models")
    assert once == f"{hub.endpoint}/ada/once"
    messages = [commit.message for commit in repos["once"].history()]
    assert messages == ["Upload with hf-guided", "Somebody else's", "initial commit"]
    files = {path: content for path, content in repos["once"].head().files.items() if path != ".gitattributes"}
    assert files == {**model_files("once"), "notes.txt": b"1"}
    assert always == "PushError: Others are pushing to ada/always at the same time: push again when they have finished."
    assert {commit.message for commit in repos["always"].history()} == {"Somebody else's", "initial commit"}


PUSH_ONCE = """
from hf_guided.hub import push_folder
try:
    said = push_folder(arguments["folder"], "ada/card")
except Exception as error:
    said = f"{type(error).__name__}: {error}"
print(json.dumps(said))
"""


def test_a_card_that_cannot_be_read_is_not_overwritten(hub, tmp_path):
    save(tmp_path / "model", {**model_files("card"), "README.md": b"# New\n"})
    repo = hub.add_repo("ada/card")
    repo.add("main", Commit("Edit", {"README.md": b"# Mine\n"}, frozenset(), repo.head().sha))
    hub.fail("HEAD", "/ada/card/resolve/.*README.md", 500, float("inf"))
    assert run(hub, tmp_path, PUSH_ONCE, folder=tmp_path / "model").startswith("PushError: ")
    assert repo.head().files == {"README.md": b"# Mine\n"}


def test_the_storage_would_notice_a_token(hub):
    """What makes the other tests' silence about it mean something."""
    hub.objects["0"] = b"content"
    for method, body in (("GET", None), ("PUT", b"content")):
        token = {"Authorization": f"Bearer {WRITE}"}
        request = urllib.request.Request(f"{hub.storage}/objects/0", method=method, data=body, headers=token)
        with pytest.raises(HTTPError, match="400"):
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request)
    assert hub.paths_with_token == ["/objects/0", "/objects/0"]
