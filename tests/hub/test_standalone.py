"""Repositories that carry their code give the same images, to the bit, where this package is not installed."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from hub_server import HubServer, User

from hf_guided import (
    ADMForImageClassification,
    ADMImageProcessor,
    ADMScheduler,
    ClassifierGuidedPipeline,
    ClassifierGuidedUpscalePipeline,
)
from hf_guided.guidance import AutoGuidance, ClassifierFreeGuidance, ClassifierGuidance
from hf_guided.hub import write_model_card
from hf_guided.hub.standalone import write_standalone

TOKEN = "hf_write" + "Aa0" * 10

# In a process that does not have the package. Prints what went wrong, or nothing.
STRANGER = """
import importlib.util, json, os, sys, torch
assert importlib.util.find_spec("hf_guided") is None
torch.set_num_threads(1)
from diffusers import AutoModel, DiffusionPipeline
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

arguments = json.loads(sys.argv[1])
trusted = {"trust_remote_code": True}
try:
    DiffusionPipeline.from_pretrained("ada/guided")
    raise SystemExit("loaded without trust")
except ValueError as error:
    assert "trust_remote_code" in str(error), error

def seeded():
    return torch.Generator().manual_seed(0)

made = {}
for source in ("ada/guided", arguments["guided"]):
    pipe = DiffusionPipeline.from_pretrained(source, **trusted)
    name = "hub" if source == "ada/guided" else "local"
    made[f"{name} default"] = pipe(["three"], 2, generator=seeded(), output_type="latent").images
    ddpm = {"respacing": "3", "guidance_scale": 2.0, "generator": seeded(), "output_type": "latent"}
    made[f"{name} ddpm"] = pipe([0, 1], **ddpm).images
composed = DiffusionPipeline.from_pretrained(arguments["composed"], **trusted)
made["composed"] = composed([1, 2], generator=seeded(), output_type="latent").images
composed.save_pretrained(arguments["again"])
upscale = DiffusionPipeline.from_pretrained(arguments["upscale"], **trusted)
made["upscale"] = upscale(torch.full((1, 3, 4, 4), 0.5), [1], generator=seeded(), output_type="latent").images
classifier = AutoModelForImageClassification.from_pretrained(arguments["classifier"], **trusted).eval()
AutoImageProcessor.from_pretrained(arguments["classifier"], **trusted)
made["classifier"] = classifier(torch.linspace(-1, 1, 3 * 256).view(1, 3, 16, 16)).logits.detach()
unet = AutoModel.from_pretrained(arguments["unet"], **trusted).eval()
made["unet"] = unet(torch.linspace(-1, 1, 3 * 256).view(1, 3, 16, 16), 7, torch.tensor([1])).sample.detach()
save_file({name: tensor.contiguous() for name, tensor in made.items()}, arguments["made"])
"""


@pytest.fixture
def without_the_package(tmp_path):
    """An environment with everything that is installed but this package."""
    folder = tmp_path / "site"
    folder.mkdir()
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "hf_guided" not in path.name:
            (folder / path.name).symlink_to(path)
    return {"PYTHONPATH": str(folder)}


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def folders(tmp_path, tiny_unet, tiny_classifier):
    """What the stranger loads, as the package saves it."""
    unet = tiny_unet(null_class_label=True, out_channels=6)
    names = dict(enumerate(["one", "two", "three", "four", "five"]))
    classifier = tiny_classifier(num_labels=5)
    classifier.config.id2label, classifier.config.label2id = names, {name: id for id, name in names.items()}
    pipelines = {
        "guided": ClassifierGuidedPipeline(
            unet,
            ADMScheduler(solver_order=2),
            classifier,
            ADMImageProcessor(size={"height": 16, "width": 16}),
            sampling_defaults={"num_inference_steps": 3, "guidance_scale": 2.0},
        ),
        "composed": ClassifierGuidedPipeline(
            unet,
            ADMScheduler(solver_order=2),
            classifier,
            guide_unet=tiny_unet(null_class_label=True, out_channels=6, model_channels=32, channel_mult=(1,)),
            sampling_defaults={
                "num_inference_steps": 3,
                "guidance": [ClassifierFreeGuidance({0: 2.0, 999: 1.0}), AutoGuidance(1.5), ClassifierGuidance(2.0)],
            },
        ),
        "upscale": ClassifierGuidedUpscalePipeline(
            tiny_unet(null_class_label=True, out_channels=6, low_res_channels=3),
            ADMScheduler(solver_order=2),
            sampling_defaults={"num_inference_steps": 2},
            low_res_size=4,
        ),
        "classifier": classifier,
        "unet": unet,
    }
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(tmp_path / "saved" / name)
    write_model_card(tmp_path / "saved" / "guided", title="Tiny", dataset="noise", class_names=list(names.values()))
    return {name: tmp_path / "saved" / name for name in pipelines}


def test_the_same_bits_where_the_package_is_not(folders, tmp_path, without_the_package):
    carrying = {name: str(write_standalone(folder, tmp_path / "out" / name)) for name, folder in folders.items()}
    for name, folder in folders.items():
        assert not list(folder.rglob("*.py"))  # saved as ever: without code
        assert list(Path(carrying[name]).rglob("*.py"))
    for path in (tmp_path / "out").rglob("*.py"):
        text = path.read_text()
        assert text.startswith("# Generated from hf-guided ")
        assert str(Path(__file__).parents[2]) not in text
        assert "from ." not in text
    with HubServer({TOKEN: User("ada")}) as hub:
        pushed = subprocess.run(
            [sys.executable, "-m", "hf_guided.cli", "push", str(folders["guided"]), "guided", "--standalone"],
            env=hub.environment(tmp_path / "home", TOKEN),
            capture_output=True,
            text=True,
            check=False,
        )
        assert pushed.returncode == 0, pushed.stderr
        files = hub.repos["ada/guided"].head().files
        usage = files["README.md"].decode().split("```python\n")[1].split("```")[0]
        assert 'DiffusionPipeline.from_pretrained("ada/guided", trust_remote_code=True)' in usage
        assert "hf_guided" not in usage
        assert not (folders["guided"].parent / ".standalone").exists()
        command = [sys.executable, "-S", "-c", STRANGER]  # no site-packages but those of PYTHONPATH
        arguments = {**carrying, "made": str(tmp_path / "made"), "again": str(tmp_path / "again")}
        environment = {**hub.environment(tmp_path / "stranger"), **without_the_package, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [*command, json.dumps(arguments)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]

        # Pushed again without its code, the repository has none.
        push_folder_in(hub, tmp_path, folders["guided"], "ada/guided")
        assert not [path for path in hub.repos["ada/guided"].head().files if path.endswith(".py")]
        assert b"trust_remote_code" not in hub.repos["ada/guided"].head().files["README.md"]

    from safetensors.torch import load_file

    made = load_file(tmp_path / "made")
    guided = ClassifierGuidedPipeline.from_pretrained(folders["guided"])
    default = guided(["three"], 2, generator=seeded(), output_type="latent").images
    ddpm = guided([0, 1], respacing="3", guidance_scale=2.0, generator=seeded(), output_type="latent").images
    composed = ClassifierGuidedPipeline.from_pretrained(folders["composed"])
    upscale = ClassifierGuidedUpscalePipeline.from_pretrained(folders["upscale"])
    pixels = torch.linspace(-1, 1, 3 * 256).view(1, 3, 16, 16)
    expected = {
        "composed": composed([1, 2], generator=seeded(), output_type="latent").images,
        "upscale": upscale(torch.full((1, 3, 4, 4), 0.5), [1], generator=seeded(), output_type="latent").images,
        "classifier": ADMForImageClassification.from_pretrained(folders["classifier"])(pixels).logits,
        "unet": composed.unet(pixels, 7, torch.tensor([1])).sample,
    }
    for name in ("hub", "local"):
        expected |= {f"{name} default": default, f"{name} ddpm": ddpm}
    assert made.keys() == expected.keys()
    for name, images in expected.items():
        assert torch.equal(made[name], images), name


def push_folder_in(hub, workplace, folder, repo_id):
    """Pushes from another process."""
    code = "import sys; from hf_guided.hub import push_folder; push_folder(sys.argv[1], sys.argv[2])"
    command = [sys.executable, "-c", code, str(folder), repo_id]
    subprocess.run(command, env=hub.environment(workplace / "home", TOKEN), check=True, capture_output=True)


def test_what_cannot_be_exported_is_said(folders, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="full is not empty"):
        write_standalone(folders["unet"], tmp_path / "full")
    with pytest.raises(ValueError, match="holds no model"):
        write_standalone(tmp_path / "full", tmp_path / "out")
    once = write_standalone(folders["guided"], tmp_path / "once")
    with pytest.raises(ValueError, match="carries its code already: push it as it is"):
        write_standalone(once, tmp_path / "twice")
    index = json.loads((folders["guided"] / "model_index.json").read_text())
    index["unet"] = ["their_package", "TheirUNet"]
    (folders["guided"] / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"component unet of .* is TheirUNet of their_package"):
        write_standalone(folders["guided"], tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_weights_are_not_copied(folders, tmp_path):
    out = write_standalone(folders["unet"], tmp_path / "out")
    weights = "diffusion_pytorch_model.safetensors"
    assert os.path.samefile(folders["unet"] / weights, out / weights)
