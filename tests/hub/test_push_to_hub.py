"""`push_to_hub` of a pipeline and of its parts, as diffusers and transformers bring it, with the real client."""

import json

import pytest
from hub_server import Commit, HubServer, User

from hf_guided import ADMScheduler, ClassifierGuidedPipeline

OWNER, STRANGER, READER = ("hf_" + kind + "Aa0" * 10 for kind in ("owner", "stranger", "reader"))

# One process, for importing takes longer than all the rest. What a call returned, or what it raised, is printed.
PUSH = """
import os
from huggingface_hub import login
from hf_guided import ClassifierGuidedPipeline

def outcome(push, *arguments, **options):
    try:
        commit = push(*arguments, **options)
        return commit.pr_url or commit.commit_url
    except Exception as error:
        return f"{type(error).__name__}: {error}"

pipe = ClassifierGuidedPipeline.from_pretrained(arguments["folder"])
pipe.save_pretrained(arguments["saved"])
owner, stranger, reader = (arguments[name] for name in ("owner", "stranger", "reader"))
said = {}
said["no token"] = outcome(pipe.push_to_hub, "ada/refused")
said["read-only"] = outcome(pipe.push_to_hub, "ada/refused", token=reader)
said["no token, classifier"] = outcome(pipe.classifier.push_to_hub, "ada/refused")
said["read-only, classifier"] = outcome(pipe.classifier.push_to_hub, "ada/refused", token=reader)

said["pipeline"] = outcome(pipe.push_to_hub, "digits", token=owner, private=True, commit_message="First")
said["unet"] = outcome(pipe.unet.push_to_hub, "unet", token=owner)
said["scheduler"] = outcome(pipe.scheduler.push_to_hub, "scheduler", token=owner)
os.environ["HF_TOKEN"] = owner
said["classifier"] = outcome(pipe.classifier.push_to_hub, "judge", revision="next/v2")
said["organisation"] = outcome(pipe.push_to_hub, "lab/digits", private=True)
del os.environ["HF_TOKEN"]
login(owner)
said["again"] = outcome(pipe.push_to_hub, "digits")
said["part of a pipeline"] = outcome(pipe.unet.push_to_hub, "ada/digits", subfolder="guide_unet")
said["pull request"] = outcome(pipe.push_to_hub, "ada/digits", variant="fp16", create_pr=True)
said["a stranger's pull request"] = outcome(pipe.classifier.push_to_hub, "ada/judge", create_pr=True, token=stranger)
pipe.classifier.save_pretrained(arguments["saved"] + "-classifier", push_to_hub=True, repo_id="saved", variant="fp16")
said["card"] = outcome(pipe.push_to_hub, "ada/card")
print(json.dumps(said))
"""


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pushed(tmp_path_factory, tiny_unet, tiny_classifier):
    """The Hub after all pushes, what they said, and the files that `save_pretrained` writes."""
    folder = tmp_path_factory.mktemp("push_to_hub")
    pipe = ClassifierGuidedPipeline(tiny_unet(out_channels=6), ADMScheduler(), tiny_classifier(num_labels=5))
    pipe.save_pretrained(folder / "pipeline")
    lab = {"lab": "write"}
    with HubServer({OWNER: User("ada", orgs=lab), STRANGER: User("bob"), READER: User("ada", "read")}) as hub:
        edited = hub.add_repo("ada/card")
        card = b"---\nlicense: mit\nlibrary_name: diffusers\n---\n\n# Written by hand\n"
        edited.add("main", Commit("card", {**edited.head().files, "README.md": card}, frozenset(), edited.head().sha))
        tokens = {"owner": OWNER, "stranger": STRANGER, "reader": READER}
        result = hub.client(PUSH, folder / "home", folder=folder / "pipeline", saved=folder / "saved", **tokens)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "authenticated: True" in result.stderr  # the client did talk
    assert not [token for token in tokens.values() if token in result.stdout + result.stderr]
    found = {path for path, content in contents(folder).items() if any(t.encode() in content for t in tokens.values())}
    assert found == {"home/token", "home/stored_tokens"}
    assert not [path for path in hub.paths_with_token if path.startswith("/objects/")]
    return hub, json.loads(result.stdout.splitlines()[-1]), contents(folder / "saved")


def head(hub, repo_id, revision="main"):
    """The files of a branch, without what the Hub and the libraries add."""
    files = dict(hub.repos[repo_id].head(revision).files)
    del files[".gitattributes"], files["README.md"]
    return files


def part(files, name):
    return {path.removeprefix(f"{name}/"): content for path, content in files.items() if path.startswith(f"{name}/")}


def messages(hub, repo_id, revision="main"):
    return [commit.message for commit in hub.repos[repo_id].history(revision)]


def test_each_push_is_one_commit_that_holds_everything(pushed):
    hub, said, files = pushed
    assert hub.repos["ada/digits"].history()[-2].message == "First"
    first = hub.repos["ada/digits"].history()[-2]
    assert said["pipeline"] == f"{hub.endpoint}/ada/digits/commit/{first.sha}"
    assert {path: first.files[path] for path in files} == files
    assert set(first.files) == {*files, "README.md", ".gitattributes"}
    for name, repo_id, message in [
        ("unet", "ada/unet", "Upload model"),
        ("scheduler", "ada/scheduler", "Upload scheduler"),
    ]:
        assert messages(hub, repo_id) == [message, "initial commit"]
        assert head(hub, repo_id) == part(files, name)


def test_pushing_again_or_a_part_touches_nothing_else(pushed):
    hub, said, files = pushed
    assert messages(hub, "ada/digits") == ["Upload model", "First", "initial commit"]
    assert said["again"] == said["pipeline"]
    guide = {f"guide_unet/{path}": content for path, content in part(files, "unet").items()}
    assert head(hub, "ada/digits") == files | guide
    card = hub.repos["ada/card"].head().files["README.md"]
    assert card == b"---\nlicense: mit\nlibrary_name: diffusers\n---\n\n# Written by hand\n"


def test_a_branch_an_organisation_and_privacy(pushed):
    hub, _, files = pushed
    assert messages(hub, "ada/judge") == ["initial commit"]
    assert messages(hub, "ada/judge", "next/v2") == ["Upload ADMForImageClassification", "initial commit"]
    assert head(hub, "ada/judge", "next/v2") == part(files, "classifier")
    assert "preprocessor_config.json" in head(hub, "ada/judge", "next/v2")
    assert head(hub, "lab/digits") == files
    assert messages(hub, "ada/saved")[1:] == ["initial commit"]
    saved = part(files, "classifier")
    saved["model.fp16.safetensors"] = saved.pop("model.safetensors")
    assert head(hub, "ada/saved") == saved
    private = {repo_id: repo.private for repo_id, repo in hub.repos.items()}
    assert private == {
        "ada/card": False, "ada/digits": True, "ada/judge": False, "ada/saved": False, "ada/scheduler": False,
        "ada/unet": False, "lab/digits": True,
    }  # fmt: skip


def test_a_pull_request_leaves_main_as_it_is(pushed):
    hub, said, files = pushed
    assert said["pull request"] == f"{hub.endpoint}/ada/digits/discussions/1"
    proposed = head(hub, "ada/digits", "refs/pr/1")
    weights = "unet/diffusion_pytorch_model{}.safetensors"
    assert proposed[weights.format(".fp16")] == files[weights.format("")]
    assert messages(hub, "ada/digits", "refs/pr/1") == ["Upload ClassifierGuidedPipeline", *messages(hub, "ada/digits")]
    assert said["a stranger's pull request"] == f"{hub.endpoint}/ada/judge/discussions/1"
    assert head(hub, "ada/judge", "refs/pr/1") == part(files, "classifier")


def test_refusals_leave_nothing(pushed):
    hub, said, _ = pushed
    assert "ada/refused" not in hub.repos
    for part in ("", ", classifier"):
        assert said[f"no token{part}"].startswith("HfHubHTTPError: Client error '401 Unauthorized'")
        assert "Make sure your token has the correct permissions." in said[f"read-only{part}"]
