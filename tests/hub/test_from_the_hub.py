"""Pipelines and their parts from the Hub, as a user loads them: with and without a token, by revision, offline."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hub_server import HubServer, User, sha256
from PIL import Image
from transformers import pipeline

from hf_guided import ADMScheduler, ClassifierGuidedPipeline

OWNER, STRANGER, REVOKED = ("hf_" + kind + "Aa0" * 10 for kind in ("owner", "stranger", "revoked"))
LABELS, SEED = [1, 3], 5

PUSH = """
from hf_guided.hub import push_folder
for arguments in arguments["pushes"]:
    push_folder(**arguments, private=True)
"""

# One process, for importing takes longer than all the rest. What it draws goes to a file, the rest is printed.
START = """
import os, time, traceback, urllib.request
pause = time.sleep
time.sleep = lambda seconds: pause(seconds / 1000)  # the client's waits between its tries
if arguments.get("offline"):
    os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import torch
from huggingface_hub import login
from transformers import AutoModelForImageClassification, pipeline
from hf_guided import ADMScheduler, ADMUNet2DModel, ClassifierGuidedPipeline

def images(pipe):
    generator = torch.Generator().manual_seed(arguments["seed"])
    return pipe(arguments["labels"], generator=generator, output_type="np").images

def load(**options):
    return ClassifierGuidedPipeline.from_pretrained("ada/digits", **options)

def parts(**options):
    return {
        "unet": ADMUNet2DModel.from_pretrained("ada/digits", subfolder="unet", **options),
        "scheduler": ADMScheduler.from_pretrained("ada/digits", subfolder="scheduler", **options),
        "classifier": AutoModelForImageClassification.from_pretrained("ada/digits", subfolder="classifier", **options),
    }

def refusal(loader, *arguments, **options):
    try:
        loader(*arguments, **options)
    except Exception:
        return traceback.format_exc()

drawn, said = {}, {}
"""
ONLINE = """
said["no token"] = refusal(load)
said["revoked token"] = refusal(load, token=arguments["revoked"])
said["stranger's token"] = refusal(load, token=arguments["stranger"])
said["no token, unet"] = refusal(ADMUNet2DModel.from_pretrained, "ada/digits", subfolder="unet")
classifier = AutoModelForImageClassification.from_pretrained
said["no token, classifier"] = refusal(classifier, "ada/digits", subfolder="classifier")

drawn["token by argument"] = images(load(token=arguments["owner"], cache_dir=arguments["out"] + "/cache"))
os.environ["HF_TOKEN"] = arguments["owner"]
drawn["token by environment"] = images(load(cache_dir=arguments["out"] + "/another"))
del os.environ["HF_TOKEN"]
login(arguments["owner"])
drawn["saved login"] = images(load())

said["broken download"] = refusal(load, revision="next/v2")
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/heal", data=b"")
drawn["branch"] = images(load(revision="next/v2"))
drawn["commit"] = images(load(revision=arguments["commit"], cache_dir=arguments["out"] + "/commit"))
drawn["parts"] = images(ClassifierGuidedPipeline(**parts(), sampling_defaults=load().config.sampling_defaults))
drawn["parts of a branch"] = parts(revision="next/v2")["unet"].conv_out.bias.detach()
half = load(variant="fp16", dtype=torch.float16, cache_dir=arguments["out"] + "/half")
drawn["half"] = half.unet.conv_out.bias.detach()
said["half"] = [str(half.unet.dtype), str(half.classifier.dtype)]
said["missing variant"] = refusal(load, variant="bf16")
said["missing revision"] = refusal(load, revision="v3")
said["classes"] = pipeline("image-classification", model="ada/judge")(arguments["out"] + "/picture.png")
"""
OFFLINE = """
drawn["main"] = images(load())
drawn["branch"] = images(load(revision="next/v2"))
drawn["parts"] = images(ClassifierGuidedPipeline(**parts(), sampling_defaults=load().config.sampling_defaults))
said["classes"] = pipeline("image-classification", model="ada/judge")(arguments["out"] + "/picture.png")
said["not cached"] = refusal(load, revision="v3")
"""
END = """
np.savez(arguments["out"] + "/drawn.npz", **drawn)
print(json.dumps(said))
"""


def client(hub, folder, code, **arguments):
    """Runs the code in one process after another's cache and login."""
    arguments |= {"owner": OWNER, "stranger": STRANGER, "revoked": REVOKED, "labels": LABELS, "seed": SEED}
    result = hub.client(START + code + END, folder / "home", out=folder, **arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    with np.load(folder / "drawn.npz") as drawn:
        return dict(drawn), json.loads(result.stdout.splitlines()[-1]), result.stdout + result.stderr


@pytest.fixture(scope="module")
def found(tmp_path_factory, tiny_unet, tiny_classifier):
    """A pipeline with a branch, and a classifier, pushed to a Hub and loaded from there, then without it."""
    folder = tmp_path_factory.mktemp("loading")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)).save(folder / "picture.png")
    defaults = {"num_inference_steps": 2, "guidance_scale": 2.0}
    classifier = tiny_classifier(num_labels=5)
    pipe = ClassifierGuidedPipeline(tiny_unet(out_channels=6), ADMScheduler(), classifier, sampling_defaults=defaults)
    classifier.save_pretrained(folder / "judge")

    def images(pipe):
        return pipe(LABELS, generator=torch.Generator().manual_seed(SEED), output_type="np").images

    found = SimpleNamespace(folder=folder, made=images(pipe))
    half = copy.deepcopy(pipe).to(torch.float16)
    half.save_pretrained(folder / "pipeline", variant="fp16")
    found.half_bias = half.unet.conv_out.bias.detach().numpy()
    pipe.save_pretrained(folder / "pipeline")  # last: transformers loads in the precision that config.json was saved in
    pipe = ClassifierGuidedPipeline.from_pretrained(folder / "pipeline")
    found.main = images(pipe)
    pipe.unet.conv_out.bias.data += 1
    pipe.save_pretrained(folder / "next")
    found.branch, found.branch_bias = images(pipe), pipe.unet.conv_out.bias.detach().numpy()
    found.classes = pipeline_of(folder / "judge")(str(folder / "picture.png"))

    with HubServer({OWNER: User("ada"), STRANGER: User("bob")}) as hub:
        pushes = [
            {"folder": folder / "pipeline", "repo_id": "digits"},
            {"folder": folder / "next", "repo_id": "digits", "revision": "next/v2"},
            {"folder": folder / "judge", "repo_id": "judge"},
        ]
        pushed = hub.client(PUSH, folder / "pusher", OWNER, pushes=pushes)
        assert pushed.returncode == 0, pushed.stderr[-3000:]
        branch = hub.repos["ada/digits"].head("next/v2")
        weights = sha256(branch.files["unet/diffusion_pytorch_model.safetensors"])
        found.fault = hub.fail("GET", f"/objects/{weights}", "cut", times=float("inf"))
        found.drawn, found.said, found.output = client(hub, folder, ONLINE, commit=branch.sha)
        found.hub, found.num_requests = hub, len(hub.requests)
    found.offline_drawn, found.offline_said, output = client(hub, folder, OFFLINE, offline=True)
    found.output += output
    return found


def pipeline_of(folder):
    return pipeline("image-classification", model=str(folder))


def test_images_are_the_same_to_the_bit_wherever_the_token_comes_from(found):
    # Weights that were read from a file lie in memory where other instructions take them: the last bit may differ.
    assert np.allclose(found.made, found.main, rtol=0, atol=1e-6)
    for how in ("token by argument", "token by environment", "saved login", "parts"):
        assert np.array_equal(found.drawn[how], found.main), how


def test_revisions_are_branches_and_commits(found):
    assert not np.array_equal(found.main, found.branch)
    for how in ("branch", "commit"):
        assert np.array_equal(found.drawn[how], found.branch), how
    assert np.array_equal(found.drawn["parts of a branch"], found.branch_bias)
    assert "Revision Not Found" in found.said["missing revision"]


def test_a_variant_is_loaded_alone(found):
    assert np.array_equal(found.drawn["half"], found.half_bias)
    assert found.said["half"] == ["torch.float16", "torch.float16"]
    weights = {path.name for path in (found.folder / "half").rglob("*.safetensors")}
    assert weights == {"model.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors"}
    assert "variant=bf16" in found.said["missing variant"]


def test_a_classifier_is_an_image_classification_model_of_the_hub(found):
    for said in (found.said, found.offline_said):
        assert [answer["label"] for answer in said["classes"]] == [answer["label"] for answer in found.classes]
        assert [answer["score"] for answer in said["classes"]] == [answer["score"] for answer in found.classes]


def test_a_private_repo_tells_others_what_to_do(found):
    for who in ("no token", "stranger's token", "no token, unet", "no token, classifier"):
        assert "make sure you are authenticated and your token has the required permissions" in found.said[who], who
    assert "Invalid credentials in Authorization header" in found.said["revoked token"]


def test_a_broken_download_is_no_lie_and_mended_by_the_next(found):
    assert found.fault.struck > 1  # it was tried again
    assert found.said["broken download"].strip().splitlines()[-1].startswith("httpx2.RemoteProtocolError: peer closed")


def test_offline_the_cache_is_enough(found):
    assert len(found.hub.requests) == found.num_requests
    assert np.array_equal(found.offline_drawn["main"], found.main)
    assert np.array_equal(found.offline_drawn["branch"], found.branch)
    assert np.array_equal(found.offline_drawn["parts"], found.main)
    assert "local" in found.offline_said["not cached"].strip().splitlines()[-1]


def test_the_token_is_in_the_saved_login_alone(found):
    assert "authenticated: True" in found.output  # the client did talk
    assert not [token for token in (OWNER, STRANGER, REVOKED) if token in found.output]
    files = [path for path in found.folder.rglob("*") if path.is_file() and OWNER.encode() in path.read_bytes()]
    assert {path.relative_to(found.folder).as_posix() for path in files} == {"home/token", "home/stored_tokens"}
    assert "/api/models/ada/digits" in found.hub.paths_with_token
    assert not [path for path in found.hub.paths_with_token if path.startswith("/objects/")]
