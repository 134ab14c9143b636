import json
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
from hub_server import Commit, HubError, HubServer, User

from hf_guided import ADMScheduler, ClassifierGuidedPipeline
from hf_guided.guidance import AutoGuidance, ClassifierFreeGuidance, ClassifierGuidance
from hf_guided.hub import push_folder, write_model_card

WRITE, READ, REVOKED = ("hf_" + kind + "Aa0" * 10 for kind in ("write", "read", "revoked"))

COMPONENTS = {
    "unet": ["hf_guided", "ADMUNet2DModel"],
    "scheduler": ["hf_guided", "ADMScheduler"],
    "classifier": ["hf_guided", "ADMForImageClassification"],
}

PUSH = "import json, sys; from hf_guided.hub import push_folder; print(push_folder(**json.loads(sys.argv[1])))"
PULL = "import json, sys; from huggingface_hub import snapshot_download as pull; print(pull(**json.loads(sys.argv[1])))"


@pytest.fixture
def hub():
    with HubServer({WRITE: User("ada"), READ: User("ada", role="read")}) as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    """What training leaves: a pipeline, its card, and things that are nobody's business."""
    folder = tmp_path / "pipeline"
    for path, content in {
        "model_index.json": json.dumps({"_class_name": "ClassifierGuidedPipeline", **COMPONENTS}).encode(),
        "grid.png": b"\x89PNG\r\n\x1a\n\0\0",
        "unet/config.json": b"{}\n",
        "unet/diffusion_pytorch_model.safetensors": np.random.default_rng(0).bytes(3_000_001),
        "classifier/model.safetensors": np.random.default_rng(1).bytes(70_000),
        "scheduler/scheduler_config.json": "{'é': 1}\r\n".encode(),
        "checkpoint-500/optimizer.bin": b"momentum",
        "logs/train/events.out.tfevents.1": b"curve",
        "unet/config.json.tmp": b"half",
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    write_model_card(folder, title="Digits", dataset="digits", class_names=["0", "1"], training={"steps": 3})
    return folder


LEFT_BEHIND = {"checkpoint-500/optimizer.bin", "logs/train/events.out.tfevents.1", "unet/config.json.tmp"}


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }


def client(code, hub, home, token=None, **arguments):
    """Runs the real client, talkative, in a process of its own."""
    environment = hub.environment(home, token) | {"HF_HUB_VERBOSITY": "debug"}
    command = [sys.executable, "-c", code, json.dumps(arguments, default=str)]
    return forked.run(command, env=environment, timeout=60)


def test_a_folder_arrives_whole_in_one_commit_and_comes_back(hub, folder, tmp_path):
    pushed = client(PUSH, hub, tmp_path / "home", WRITE, folder=folder, repo_id="digits", commit_message="First")
    assert pushed.stdout.strip() == f"{hub.endpoint}/ada/digits", pushed.stderr
    repo = hub.repos["ada/digits"]
    assert [commit.message for commit in repo.history()] == ["First", "initial commit"]
    expected = {path: content for path, content in contents(folder).items() if path not in LEFT_BEHIND}
    assert len(expected) == len(contents(folder)) - 3
    assert repo.head().large >= {"classifier/model.safetensors", "unet/diffusion_pytorch_model.safetensors"}

    pulled = client(PULL, hub, tmp_path / "reader", repo_id="ada/digits")
    received = contents(pulled.stdout.strip())
    assert received.pop(".gitattributes")
    card = received.pop("README.md").decode()
    assert 'from_pretrained("ada/digits"' in card  # the local one loads from its own folder
    assert 'from_pretrained("."' in expected.pop("README.md").decode()
    assert received == expected

    # Again, to a branch, with one file changed: one more commit, there only, and nothing is uploaded twice.
    (folder / "unet/config.json").write_bytes(b'{"sample_size": 8}\n')
    before = len(hub.requests)
    again = client(PUSH, hub, tmp_path / "home", WRITE, folder=folder, repo_id="ada/digits", revision="v2/beta")
    assert again.returncode == 0, again.stderr
    assert [commit.message for commit in repo.history("v2/beta")] == [
        "Upload with hf-guided",
        "First",
        "initial commit",
    ]
    assert len(repo.history()) == 2
    assert repo.head("v2/beta").files == {**repo.head().files, "unet/config.json": b'{"sample_size": 8}\n'}
    assert not [request for request in hub.requests[before:] if request[0] == "PUT"]

    # The token went to the Hub and nowhere else.
    outputs = pushed.stdout + pushed.stderr + again.stdout + again.stderr
    assert "preupload" in outputs  # the client did talk
    assert WRITE not in outputs
    assert not [path for path, content in contents(tmp_path).items() if WRITE.encode() in content]


def test_a_private_repo_is_seen_by_its_owner_alone(hub, folder, tmp_path):
    pushed = client(PUSH, hub, tmp_path / "home", WRITE, folder=folder, repo_id="ada/digits", private=True)
    assert pushed.returncode == 0, pushed.stderr
    assert hub.repos["ada/digits"].private
    assert "RepositoryNotFoundError" in client(PULL, hub, tmp_path / "stranger", repo_id="ada/digits").stderr
    assert client(PULL, hub, tmp_path / "owner", READ, repo_id="ada/digits").returncode == 0


@pytest.mark.parametrize(
    ("token", "repo_id", "sentence"),
    [
        (None, "ada/digits", "No Hugging Face token was found: log in with `hf auth login`"),
        (READ, "ada/digits", "This token has no write access to ada/digits"),
        (READ, "ada/existing", "This token has no write access to ada/existing"),
        (WRITE, "bob/digits", "This token has no write access to bob/digits"),
        (REVOKED, "ada/digits", "The Hub does not accept this token, which may have expired"),
    ],
    ids=["no token", "read-only", "read-only, existing repo", "someone else's", "revoked"],
)
def test_refusals_become_one_sentence(hub, folder, tmp_path, token, repo_id, sentence):
    existing = hub.add_repo("ada/existing")
    pushed = client(PUSH, hub, tmp_path / "home", token, folder=folder, repo_id=repo_id)
    assert pushed.returncode == 1
    message = pushed.stderr.strip().splitlines()[-1]
    assert message.startswith(f"hf_guided.hub.push.PushError: {sentence}")
    assert message.endswith("using a token with write access (https://huggingface.co/settings/tokens).")
    assert "direct cause" in pushed.stderr  # the client's own error is kept
    assert token is None or token not in pushed.stdout + pushed.stderr
    assert list(hub.repos) == ["ada/existing"]
    assert len(existing.history()) == 1


def test_an_upload_that_fails_halfway_changes_nothing(hub, folder, tmp_path):
    repo = hub.add_repo("ada/digits")
    hub.objects = Full()
    pushed = client(PUSH, hub, tmp_path / "home", WRITE, folder=folder, repo_id="ada/digits")
    message = pushed.stderr.strip().splitlines()[-1]
    assert (
        message
        == "hf_guided.hub.push.PushError: Pushing to ada/digits failed, the Hub answered 413: The storage is full"
    )
    assert len(repo.history()) == 1


class Full(dict):
    """Storage that takes nothing."""

    def __setitem__(self, oid, content):
        raise HubError(413, "The storage is full")


def test_no_hub_to_be_reached(folder, tmp_path):
    with HubServer({}) as hub:
        pass
    pushed = client(PUSH, hub, tmp_path / "home", WRITE, folder=folder, repo_id="ada/digits")
    message = pushed.stderr.strip().splitlines()[-1]
    assert message.startswith(
        "hf_guided.hub.push.PushError: Pushing to ada/digits failed, the Hub could not be reached: "
    )


def test_only_saved_models_are_pushed(tmp_path):
    (tmp_path / "notes.txt").write_text("not a model")
    with pytest.raises(ValueError, match=r"has neither model_index.json nor config.json: give the folder that"):
        push_folder(tmp_path, "ada/digits", token=WRITE)
    with pytest.raises(ValueError, match="missing has neither"):
        push_folder(tmp_path / "missing", "ada/digits", token=WRITE)


LOAD = """
import json, sys, torch
from hf_guided import ClassifierGuidedPipeline
pipe = ClassifierGuidedPipeline.from_pretrained(**json.loads(sys.argv[1]))
images = pipe([1], generator=torch.Generator().manual_seed(0), output_type="pt", return_cost=True)
print(json.dumps([pipe.config.sampling_defaults, images.cost.calls]))
"""


def test_guidance_saved_with_a_pipeline_comes_from_the_hub(hub, tmp_path, tiny_unet, tiny_classifier):
    guidance = [ClassifierFreeGuidance({0: 2.0, 999: 1.0}), AutoGuidance(1.5), ClassifierGuidance(2.0, every=2)]
    pipe = ClassifierGuidedPipeline(
        tiny_unet(null_class_label=True, out_channels=6),
        ADMScheduler(solver_order=2),
        tiny_classifier(num_labels=5),
        guide_unet=tiny_unet(null_class_label=True, out_channels=6, model_channels=32, channel_mult=(1,)),
        sampling_defaults={"num_inference_steps": 3, "guidance": guidance},
    )
    pipe.save_pretrained(tmp_path / "pipeline")
    pushed = client(PUSH, hub, tmp_path / "home", WRITE, folder=tmp_path / "pipeline", repo_id="guided")
    assert pushed.returncode == 0, pushed.stderr
    loaded = client(LOAD, hub, tmp_path / "reader", pretrained_model_name_or_path="ada/guided")
    assert loaded.returncode == 0, loaded.stderr
    defaults, calls = json.loads(loaded.stdout)
    assert defaults == {"num_inference_steps": 3, "guidance": [kind.to_dict() for kind in guidance]}
    assert calls == {"unet": 3, "classifier": 2, "guide_unet": 3}


def test_edits_of_the_card_on_the_hub_survive(hub, folder, tmp_path):
    """Even those that are made while the push is under way."""
    arguments = {"folder": folder, "repo_id": "ada/digits"}
    assert client(PUSH, hub, tmp_path / "home", WRITE, **arguments).returncode == 0
    repo = hub.repos["ada/digits"]

    def edit(old, new):
        head = repo.head()
        card = head.files["README.md"].decode()
        assert old in card
        files = head.files | {"README.md": card.replace(old, new).encode()}
        repo.add("main", Commit("Update README.md", files, head.large, parent=head.sha))

    edit("## Training", "## Who made it\n\nAda.\n\n## Training")
    raced = []

    def race(_):
        if not raced:
            raced.append(edit("- Its images are synthetic", "- They are free.\n- Its images are synthetic"))

    hub.before_commit = race
    (folder / "scheduler/scheduler_config.json").write_text("{}")
    write_model_card(folder, title="Digits", dataset="digits", class_names=["0", "1"], training={"steps": 7})
    assert client(PUSH, hub, tmp_path / "home", WRITE, **arguments).returncode == 0
    assert raced
    card = repo.head().files["README.md"].decode()
    for line in ("Ada.", "- They are free.", "| Steps | 7 |"):
        assert line in card.splitlines()
    assert "| Steps | 3 |" not in card
    assert repo.head().files["scheduler/scheduler_config.json"] == b"{}"
    assert [commit.message for commit in repo.history()] == [
        "Upload with hf-guided", "Update README.md", "Update README.md", "Upload with hf-guided", "initial commit",
    ]  # fmt: skip

    # What is pushed twice is edited in the folder, too: the newer of a user's two versions counts.
    for thanks in ("To Bob.", "To Bob and Eve."):
        local = (folder / "README.md").read_text()
        (folder / "README.md").write_text(local.partition("\n## Thanks")[0] + f"\n## Thanks\n\n{thanks}\n")
        assert client(PUSH, hub, tmp_path / "home", WRITE, **arguments).returncode == 0
    lines = repo.head().files["README.md"].decode().splitlines()
    assert "To Bob and Eve." in lines
    assert "To Bob." not in lines
    assert "Ada." in lines


def test_what_has_not_changed_is_not_sent_again(hub, folder, tmp_path):
    arguments = {"folder": folder, "repo_id": "ada/digits"}
    assert client(PUSH, hub, tmp_path / "home", WRITE, **arguments).returncode == 0
    before = len(hub.requests)
    again = client(PUSH, hub, tmp_path / "home", WRITE, **arguments)
    assert again.returncode == 0, again.stderr
    assert len(hub.repos["ada/digits"].history()) == 2
    sent = [path for method, path, _ in hub.requests[before:] if method == "PUT" or "/commit/" in path]
    assert sent == []


def test_someone_who_keeps_pushing_is_told_of(hub, folder, tmp_path):
    hub.add_repo("ada/digits")
    numbers = iter(range(100))

    def race(repo):
        repo.add("main", Commit(f"{next(numbers)}", repo.head().files, frozenset(), parent=repo.head().sha))

    hub.before_commit = race
    pushed = client(PUSH, hub, tmp_path / "home", WRITE, folder=folder, repo_id="ada/digits")
    message = pushed.stderr.strip().splitlines()[-1]
    assert message.endswith("Others are pushing to ada/digits at the same time: push again when they have finished.")
    assert set(hub.repos["ada/digits"].head().files) == {".gitattributes"}


def cli(hub, home, token, *arguments):
    """Runs `hf-guided push`."""
    command = [sys.executable, "-m", "hf_guided.cli", "push", *map(str, arguments)]
    return forked.run(command, env=hub.environment(home, token), timeout=60)


def test_command_line_to_branches_organisations_and_as_a_pull_request(folder, tmp_path):
    with HubServer({WRITE: User("ada", orgs={"zoo": "write"}), READ: User("bob")}) as hub:
        home = tmp_path / "home"
        pushed = cli(hub, home, WRITE, folder, "zoo/digits", "--revision", "small", "--hub_private")
        assert pushed.stdout.strip() == f"{hub.endpoint}/zoo/digits", pushed.stderr
        assert hub.repos["zoo/digits"].private
        assert "model_index.json" in hub.repos["zoo/digits"].head("small").files
        assert "model_index.json" not in hub.repos["zoo/digits"].head().files

        hub.add_repo("ada/digits")
        asked = cli(hub, home, None, folder, "ada/digits", "--hub_token", READ, "--create_pr", "--commit_message", "Hi")
        assert asked.returncode == 0, asked.stderr
        assert asked.stdout.strip() == f"{hub.endpoint}/ada/digits/discussions/1"
        assert hub.repos["ada/digits"].head("refs/pr/1").message == "Hi"
        assert len(hub.repos["ada/digits"].history()) == 1

        for arguments, sentence in [
            ((folder,), "error: Name the repository to push to, user/name"),
            ((folder, "ada/digits", "--judge", "ada/judge"), "error: --judge is for the page of --space"),
            ((folder, "--space", "ada/page"), "error: A page shows a model of the Hub: say where"),
            ((folder, "ada/digits", "--create_pr", "--revision", "x"), "error: A pull request is made to main"),
        ]:
            refused = cli(hub, home, WRITE, *arguments)
            assert refused.returncode == 1
            assert refused.stderr.strip().splitlines()[-1].startswith(sentence), refused.stderr


def test_code_comes_and_goes_with_the_flag(hub, folder, tmp_path):
    pushed = cli(hub, tmp_path / "home", WRITE, folder, "digits", "--standalone")
    assert pushed.returncode == 0, pushed.stderr
    repo = hub.repos["ada/digits"]
    assert "pipeline_classifier_guided.py" in repo.head().files
    usage = repo.head().files["README.md"].decode().split("```python\n")[1].split("```")[0]
    assert "from diffusers import DiffusionPipeline" in usage
    assert 'DiffusionPipeline.from_pretrained("ada/digits", trust_remote_code=True)' in usage
    assert "hf_guided" not in usage
    assert sorted(path.name for path in folder.parent.iterdir()) == ["pipeline"]

    assert cli(hub, tmp_path / "home", WRITE, folder, "digits").returncode == 0
    assert len(repo.history()) == 3
    assert not [path for path in repo.head().files if path.endswith(".py")]
    assert "trust_remote_code" not in repo.head().files["README.md"].decode()


def test_the_page_comes_beside_the_model(hub, folder, tmp_path):
    pushed = cli(hub, tmp_path / "home", WRITE, folder, "digits", "--space", "ada/page", "--judge", "ada/judge")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.splitlines() == [f"{hub.endpoint}/ada/digits", f"{hub.endpoint}/spaces/ada/page"]
    space = hub.repos["spaces/ada/page"]
    assert space.sdk == "gradio"
    assert [commit.message for commit in space.history()] == ["Upload with hf-guided", "initial commit"]
    assert b'"ada/digits", "--judge", "ada/judge"' in space.head().files["app.py"]
    assert {"README.md", "requirements.txt", "hf_guided/demo/page.py"} <= set(space.head().files)

    again = cli(hub, tmp_path / "home", WRITE, "ada/digits", "--space", "page")  # of a model that is there
    assert again.returncode == 0, again.stderr
    assert b"--judge" not in space.head().files["app.py"]
    assert len(space.history()) == 3
