"""What a push takes along, what it leaves and names, and what `--include` adds."""

import json
import os
import socket
import sys

import forked
import pytest
from hub_server import Commit, HubServer, User

from hf_guided.hub.selection import select_files

WRITE = "hf_write" + "Aa0" * 10
INDEX = {
    "_class_name": "ClassifierGuidedPipeline",
    "unet": ["hf_guided", "ADMUNet2DModel"],
    "classifier_processor": ["transformers", "CLIPProcessor"],
    "classifier": [None, None],
    "sampling_defaults": {"num_inference_steps": 2},
}
MODEL = {
    "model_index.json": json.dumps(INDEX).encode(),
    "README.md": b"# Digits\n\n![a](assets/a%20b.png) <img src='./wide.jpg'>\n",
    "LICENSE": b"Apache",
    ".gitattributes": b"*.safetensors filter=lfs\n",
    "grid.png": b"png",
    "inspection.json": b"{}",
    "wide.jpg": b"jpg",
    "assets/a b.png": b"png",
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors": b"weights",
    "unet/diffusion_pytorch_model.safetensors.index.json": b"{}",
    "unet/diffusion_pytorch_model.fp16.safetensors": b"weights",
    "classifier_processor/merges.txt": b"a b",
    "classifier_processor/vocab.json": b"{}",
    "classifier_processor/preprocessor_config.json": b"{}",
}
OTHERS = [
    ".env", ".env.local", ".netrc", ".idea/workspace.xml", ".vscode/settings.json", ".git/config",
    ".ipynb_checkpoints/config.json", ".DS_Store", ".cache/huggingface/token", ".README.md.swp", "README.md~",
    "README.md.orig", "#README.md#", "id_rsa", "notes.txt", "data.csv", "data.parquet", "passport.png", "b.png",
    "client_secret.json", "credentials.json", "training_state.json", "config.json.bak", "train.log", "train.py",
    "pipeline_classifier_guided.pyc", "unet/secret.json", "unet/diffusion_pytorch_model.bin", "unet/optimizer.pt",
    "unet/.env", "unet/unet/config.json", "model.pkl", "classifier/config.json", "old/model_index.json",
    "old/unet/config.json", "checkpoint-5/model.safetensors", "logs/events.out.tfevents.1", "venv/pyvenv.cfg",
    "venv/lib/site-packages/tool/config.json", "samples.npz", "a\nb.txt", ".model.safetensors",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pipeline"
    for path, content in {**MODEL, **dict.fromkeys(OTHERS, b"secret")}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def push(hub, home, *arguments):
    """Runs `hf-guided push`."""
    command = [sys.executable, "-m", "hf_guided.cli", "push", *map(str, arguments)]
    return forked.run(command, env=hub.environment(home, WRITE), timeout=60)


def test_what_a_model_is_made_of_goes_and_the_rest_is_named(folder, tmp_path, monkeypatch):
    outside = tmp_path / "outside.json"
    outside.write_text('"secret"')
    (folder / "unet/generation_config.json").symlink_to(outside)
    (folder / "NOTICE").symlink_to(folder / ".env")  # within the folder, but none of the model's
    (folder / "unet/away.safetensors").symlink_to(tmp_path / "missing")
    (folder / "unet/loop.safetensors").symlink_to(folder / "unet/loop.safetensors")
    (folder / "linked").symlink_to(tmp_path)
    os.mkfifo(folder / "unet/pipe.safetensors")
    with HubServer({WRITE: User("ada")}) as hub, socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(folder)  # a socket's path is short
        server.bind("tokenizer.json")
        pushed = push(hub, tmp_path / "home", folder, "digits")
        assert pushed.returncode == 0, pushed.stderr
        files = dict(hub.repos["ada/digits"].head().files)
        assert pushed.stdout.strip() == f"{hub.endpoint}/ada/digits"
        (line,) = [line for line in pushed.stderr.splitlines() if "Not pushed" in line]
        assert f"{len(OTHERS) + 7} files" in line
        assert ".DS_Store, .README.md.swp, " in line
        assert "more. To push some: --include PATTERN." in line
        assert set(files) == set(MODEL)
        assert not [path for path, content in files.items() if b"secret" in content]


def test_standalone_takes_the_same_and_its_code(folder, tmp_path):
    with HubServer({WRITE: User("ada")}) as hub:
        pushed = push(hub, tmp_path / "home", folder, "digits", "--standalone", "--include", "notes.txt", ".env")
        assert pushed.returncode == 0, pushed.stderr
        files = set(hub.repos["ada/digits"].head().files)
        code = {path for path in files if path.endswith(".py")}
        assert files - code == {*MODEL, "notes.txt", ".env"}
        assert "pipeline_classifier_guided.py" in code
        assert "train.py" not in code
        assert pushed.stderr.count("Not pushed") == 1


@pytest.mark.parametrize(
    ("patterns", "added"),
    [
        (["notes.txt"], {"notes.txt"}),
        (["./notes.txt", "*.csv"], {"notes.txt", "data.csv"}),
        (["logs"], {"logs/events.out.tfevents.1"}),
        (["logs/", "unet/*.bin"], {"logs/events.out.tfevents.1", "unet/diffusion_pytorch_model.bin"}),
        ([".env"], {".env"}),
        (["*/.env"], {"unet/.env"}),
        (["*"], {path for path in OTHERS if not path.startswith(".") and "/." not in path}),
    ],
)
def test_include_adds(folder, patterns, added):
    assert set(select_files(folder, patterns)) == {*MODEL, *added}


def test_include_follows_a_link_and_refuses_what_is_not_there(folder, tmp_path):
    (tmp_path / "weights").write_bytes(b"weights")
    (folder / "unet/model.safetensors").symlink_to(tmp_path / "weights")
    assert "unet/model.safetensors" not in select_files(folder)
    assert "unet/model.safetensors" in select_files(folder, ["unet/*.safetensors"])
    with pytest.raises(ValueError, match=r"--include nothing \*\.docx matches no file of .*pipeline"):
        select_files(folder, ["nothing", "notes.txt", "*.docx"])


def test_a_link_to_a_part_of_the_model_goes(folder):
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.symlink_to("diffusion_pytorch_model.fp16.safetensors")
    assert "unet/diffusion_pytorch_model.safetensors" in select_files(folder)


@pytest.mark.parametrize("index", ["[]", "null", "{", '"x"'])
def test_a_damaged_index_is_named(folder, index):
    (folder / "model_index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model_index\.json is damaged: .*; save the pipeline again"):
        select_files(folder)


DOWNLOAD_AND_PUSH = """
from huggingface_hub import snapshot_download
from hf_guided.hub import push_folder
folder = snapshot_download("ada/digits")
import os
assert os.path.islink(folder + "/unet/config.json")
os.symlink(arguments["outside"], folder + "/NOTICE")
print(push_folder(folder, "ada/copy"), push_folder(folder + "/unet", "ada/unet"))
"""


def test_a_snapshot_of_the_cache_is_links_and_goes(tmp_path):
    (tmp_path / "outside").write_text("secret")
    with HubServer({WRITE: User("ada")}) as hub:
        hub.add_repo("ada/digits").add("main", Commit("Model", MODEL, frozenset()))
        result = hub.client(DOWNLOAD_AND_PUSH, tmp_path / "home", WRITE, outside=tmp_path / "outside")
        assert result.returncode == 0, result.stderr[-3000:]
        copy, unet = (hub.repos[f"ada/{name}"].head().files for name in ("copy", "unet"))
        assert set(copy) == set(MODEL)
        assert set(unet) == {".gitattributes", *(p[5:] for p in MODEL if p.startswith("unet/"))}


def test_a_space_takes_its_page_and_the_package(tmp_path):
    pushed = ("README.md", "app.py", "requirements.txt", "hf_guided/demo/page.py", "hf_guided/x/y.py")
    for path in (*pushed, ".env", "me.json"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert set(select_files(tmp_path, repo_type="space")) == set(pushed)
