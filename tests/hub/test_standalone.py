"""Repositories that carry their code, loaded where the package is not installed, from a folder and from the Hub."""

import ast
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from hub_server import HubServer, User
from PIL import Image
from transformers import pipeline

import hf_guided
from hf_guided import (
    ADMForImageClassification,
    ADMImageProcessor,
    ADMScheduler,
    ADMUNet2DModel,
    BigGANGenerator,
    ClassConditionalGlow,
    ClassConditionalVAE,
    ClassifierGuidedPipeline,
    ClassifierGuidedUpscalePipeline,
    FlowPipeline,
    GANPipeline,
    VAEPipeline,
)
from hf_guided.guidance import (
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    DenoisedClassifierGuidance,
    LossGuidance,
)
from hf_guided.hub.standalone import inline, write_standalone

OWNER = "hf_owner" + "Aa0" * 10
NAMES = {0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "eel"}
DEFAULTS = {"num_inference_steps": 3, "guidance_scale": 2.0}

# What is drawn of each pipeline, with the package and without it.
CALLS = {
    "guided": [
        {"class_labels": ["cat", "dog"]},
        {"class_labels": 2, "respacing": "4"},
        {"class_labels": 2, "respacing": "4", "guidance_scale": 0.0},
        {"class_labels": 2, "num_inference_steps": 4, "image": "picture.png", "mask_image": "mask.png"},
    ],
    "composed": [{"class_labels": [1, 3]}, {"class_labels": [1, 3], "num_inference_steps": 2}],
    "upscale": [{"image": "small.npz", "num_inference_steps": 2}],
    "of diffusers": [{"num_inference_steps": 2}],
    "vae": [{"class_labels": ["bee", "eel"], "temperature": 0.5}],
    "gan": [{"class_labels": ["bee", "eel"], "truncation": 0.5}],
    "flow": [{"class_labels": ["bee", "eel"], "temperature": 0.5}],
}


def draw(pipe, call, folder):
    """Runs here and, by its source, where there is no package."""
    import torch
    from PIL import Image

    call = {name: f"{folder}/{value}" if name.endswith("image") else value for name, value in call.items()}
    call = {name: Image.open(value) if str(value).endswith(".png") else value for name, value in call.items()}
    return pipe(**call, generator=torch.Generator().manual_seed(5), output_type="latent").images.numpy()


# One process, for importing takes longer than all the rest. What it draws goes to a file, the rest is printed.
WITHOUT_PACKAGE = f"""
import importlib.util, inspect, json, sys
assert importlib.util.find_spec("hf_guided") is None
import numpy as np
import torch
from diffusers import AutoModel, DiffusionPipeline
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from transformers import AutoModelForImageClassification, pipeline

{inspect.getsource(draw)}

def refusal(loader, name, **options):
    try:
        loader(name, **options)
    except ValueError as error:
        return str(error)

folder, calls = sys.argv[1], json.loads(sys.argv[2])
trusting = {{"trust_remote_code": True}}
drawn, said = {{}}, {{}}
for name in calls:
    pipe = DiffusionPipeline.from_pretrained(f"{{folder}}/standalone/{{name}}", **trusting)
    for i, call in enumerate(calls[name]):
        drawn[f"{{name}} {{i}}"] = draw(pipe, call, folder)
pipe = DiffusionPipeline.from_pretrained("ada/composed", **trusting)
drawn["from the Hub"] = draw(pipe, calls["composed"][0], folder)
kinds = inspect.getmodule(pipe)  # where a user finds them
pipe.set_sampling_defaults(**{DEFAULTS!r})
chosen = {{"class_labels": [1, 3], "guidance": [kinds.ClassifierGuidance(3.0, every=2), kinds.AutoGuidance(2.0)]}}
drawn["guidance given"] = draw(pipe, chosen, folder)
loss = {{"class_labels": [1, 3], "guidance": kinds.LossGuidance(lambda images: images.square().mean((1, 2, 3)))}}
drawn["loss given"] = draw(pipe, loss, folder)
half = DiffusionPipeline.from_pretrained(folder + "/standalone/guided", variant="fp16", dtype=torch.float16, **trusting)
drawn["half"] = half.unet.conv_out.bias.detach().numpy()

unet = AutoModel.from_pretrained(folder + "/standalone/unet", **trusting)
images = torch.from_numpy(np.load(folder + "/images.npy"))
with torch.no_grad():
    drawn["unet"] = unet(images, 500, torch.tensor([1])).sample.numpy()
    for source in (folder + "/standalone/classifier", "ada/classifier"):
        classifier = AutoModelForImageClassification.from_pretrained(source, **trusting)
        drawn["logits of " + source.split("/")[-2]] = classifier(images, timestep=500).logits.numpy()
said["classes"] = pipeline("image-classification", "ada/classifier", **trusting)(folder + "/picture.png")

said["untrusted folder"] = refusal(DiffusionPipeline.from_pretrained, folder + "/standalone/guided")
said["untrusted"] = refusal(DiffusionPipeline.from_pretrained, "ada/composed")
said["untrusted unet"] = refusal(AutoModel.from_pretrained, folder + "/standalone/unet")
classifiers = AutoModelForImageClassification.from_pretrained
said["untrusted classifier"] = refusal(classifiers, "ada/classifier", trust_remote_code=False)
said["libraries"] = [*LOADABLE_CLASSES]
said["modules"] = [name for name in sys.modules if name.split(".")[0] == "hf_guided"]
np.savez(folder + "/drawn.npz", **drawn)
print(json.dumps(said))
"""

PUSH = """
import sys
from hf_guided.hub import push_folder
for arguments in arguments["pushes"]:
    push_folder(**arguments)
print("hf_guided.models" in sys.modules)
"""


def packages_but_ours(folder):
    """A folder of links to all that is installed, but for this package in any form."""
    folder.mkdir()
    for path in map(Path, sys.path):
        for entry in path.iterdir() if path.name in ("site-packages", "dist-packages") else ():
            if "hf_guided" not in entry.name and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_unet, tiny_classifier):
    """What `save_pretrained` writes, each in a folder of its name, and what is drawn from it."""
    folder = tmp_path_factory.mktemp("standalone")
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / "picture.png")
    Image.fromarray(random.integers(0, 2, (16, 16), np.uint8) * 255).save(folder / "mask.png")
    np.savez(folder / "small.npz", random.integers(0, 256, (2, 8, 8, 3), np.uint8), np.array([1, 2]))
    np.save(folder / "images.npy", random.normal(size=(1, 3, 16, 16)).astype(np.float32))

    def classifier(**arguments):
        return tiny_classifier(num_labels=5, id2label=NAMES, label2id={v: k for k, v in NAMES.items()}, **arguments)

    unet = tiny_unet(null_class_label=True)
    guided = ClassifierGuidedPipeline(unet, ADMScheduler(solver_order=2), classifier(), sampling_defaults=DEFAULTS)
    composed = ClassifierGuidedPipeline(
        unet,
        ADMScheduler(algorithm_type="ddim"),
        classifier(),
        ADMImageProcessor(size={"height": 16, "width": 16}),
        tiny_unet(null_class_label=True, channel_mult=(1,)),
        clean_classifier=classifier(pool="adaptive"),
        sampling_defaults={
            "num_inference_steps": 3,
            "guidance": [
                ClassifierFreeGuidance({0: 2.0, 999: 1.5}),
                AutoGuidance(1.5),
                ClassifierGuidance(2.0, entropy_scaling=True),
                DenoisedClassifierGuidance(0.5, through_unet=True),
            ],
        },
    )
    upscale = ClassifierGuidedUpscalePipeline(tiny_unet(low_res_channels=3), ADMScheduler(), classifier())
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    theirs = UNet2DModel(16, block_out_channels=(32, 32), layers_per_block=1, **blocks)
    of_diffusers = ClassifierGuidedPipeline(theirs, DDIMScheduler())

    pipes = {"guided": guided, "composed": composed, "upscale": upscale, "of diffusers": of_diffusers}
    shape = {"sample_size": 8, "image_channels": 1, "num_class_embeds": 5}
    narrow = {**shape, "model_channels": 8, "channel_mult": (1, 2)}
    flow = ClassConditionalGlow(**shape, num_levels=2, num_blocks=1, hidden_channels=8)
    pipes["vae"] = VAEPipeline(ClassConditionalVAE(**narrow), id2label=NAMES)
    pipes["gan"] = GANPipeline(BigGANGenerator(**narrow), id2label=NAMES)
    pipes["flow"] = FlowPipeline(flow, id2label=NAMES)
    for name, saved in {**pipes, "classifier": classifier(), "unet": unet}.items():
        saved.save_pretrained(folder / "plain" / name)
    for name in ("unet", "classifier"):  # the same weights under a variant's name too
        for path in (folder / "plain/guided" / name).glob("*.safetensors"):
            path.with_suffix(".fp16.safetensors").write_bytes(path.read_bytes())
    (folder / "plain/guided/checkpoint-5").mkdir()
    (folder / "plain/guided/checkpoint-5/state.bin").write_bytes(b"momentum")
    (folder / "plain/guided/README.md").write_text("# Animals\n")

    found = SimpleNamespace(folder=folder, before=contents(folder / "plain"), drawn={})
    for name, made in pipes.items():
        pipe = type(made).from_pretrained(folder / "plain" / name)  # weights from a file, as there
        for i, call in enumerate(CALLS[name]):
            found.drawn[f"{name} {i}"] = draw(pipe, call, folder)
    for name in (*pipes, "unet", "classifier"):
        write_standalone(folder / "plain" / name, folder / "standalone" / name)
    return found


@pytest.fixture(scope="module")
def found(saved):
    """What a process without the package finds, in the folders and on a Hub."""
    folder = saved.folder
    with HubServer({OWNER: User("ada")}) as hub:
        pushes = [{"folder": folder / "plain" / name, "repo_id": name} for name in ("composed", "classifier")]
        pushed = hub.client(PUSH, folder / "pusher", OWNER, pushes=[push | {"standalone": True} for push in pushes])
        assert pushed.returncode == 0, pushed.stderr[-3000:]
        assert pushed.stdout.split()[-1] == "False"  # code is read, not run
        environment = hub.environment(folder / "home") | {"PYTHONPATH": str(packages_but_ours(folder / "packages"))}
        # Without its site, Python has no other packages than those on the path.
        command = [sys.executable, "-S", "-c", WITHOUT_PACKAGE, str(folder), json.dumps(CALLS)]
        result = subprocess.run(
            command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200
        )
        assert result.returncode == 0, result.stderr[-3000:]
        repos = {name: repo.head().files for name, repo in hub.repos.items()}
    with np.load(folder / "drawn.npz") as drawn:
        return SimpleNamespace(drawn=dict(drawn), said=json.loads(result.stdout.splitlines()[-1]), repos=repos)


def test_images_are_the_same_to_the_bit(saved, found):
    assert len(saved.drawn) == sum(map(len, CALLS.values()))
    for name, images in saved.drawn.items():
        assert np.array_equal(found.drawn[name], images), name
    assert np.array_equal(found.drawn["from the Hub"], saved.drawn["composed 0"])
    assert not np.array_equal(saved.drawn["guided 1"], saved.drawn["guided 2"])  # guidance does something


def test_guidance_can_be_chosen(saved, found):
    pipe = ClassifierGuidedPipeline.from_pretrained(saved.folder / "plain/composed")
    pipe.set_sampling_defaults(**DEFAULTS)
    for name, guidance in {
        "guidance given": [ClassifierGuidance(3.0, every=2), AutoGuidance(2.0)],
        "loss given": LossGuidance(lambda images: images.square().mean((1, 2, 3))),
    }.items():
        images = draw(pipe, {"class_labels": [1, 3], "guidance": guidance}, saved.folder)
        assert np.array_equal(found.drawn[name], images), name


def test_models_alone_are_found_by_auto_classes(saved, found):
    images = torch.from_numpy(np.load(saved.folder / "images.npy"))
    unet = ADMUNet2DModel.from_pretrained(saved.folder / "plain/unet")
    classifier = ADMForImageClassification.from_pretrained(saved.folder / "plain/classifier")
    with torch.no_grad():
        assert np.array_equal(found.drawn["unet"], unet(images, 500, torch.tensor([1])).sample.numpy())
        logits = classifier(images, timestep=500).logits.numpy()
    assert np.array_equal(found.drawn["logits of standalone"], logits)
    assert np.array_equal(found.drawn["logits of ada"], logits)
    classify = pipeline("image-classification", model=str(saved.folder / "plain/classifier"))
    assert found.said["classes"] == classify(str(saved.folder / "picture.png"))


def test_half_precision_variants_come_along(saved, found):
    pipe = ClassifierGuidedPipeline.from_pretrained(saved.folder / "plain/guided", variant="fp16", dtype=torch.float16)
    assert np.array_equal(found.drawn["half"], pipe.unet.conv_out.bias.detach().numpy())
    assert found.drawn["half"].dtype == np.float16


def test_code_is_run_for_those_who_trust_it_alone(found):
    wanted = "Pass `trust_remote_code=True` to allow loading remote code modules."
    for name in ("untrusted", "untrusted folder", "untrusted unet"):
        assert wanted in found.said[name], name
    assert "Please pass the argument `trust_remote_code=True`" in found.said["untrusted classifier"]
    assert "hf_guided" not in found.said["libraries"]
    assert found.said["modules"] == []


def test_a_folder_without_code_stays_so(saved):
    assert contents(saved.folder / "plain") == saved.before
    assert not [path for path in saved.before if path.endswith(".py") or b"auto_map" in saved.before[path]]


def test_the_repository_is_the_folder_with_code(saved, found):
    """Every process generates the same bytes, too."""
    code = {
        "pipeline_classifier_guided.py",
        "unet/unet_adm.py",
        "guide_unet/unet_adm.py",
        "scheduler/scheduling_adm.py",
        "classifier/classifier_adm.py",
        "clean_classifier/classifier_adm.py",
        "classifier_processor/image_processing_adm.py",
    }
    files = {path: content for path, content in found.repos["ada/composed"].items() if path != ".gitattributes"}
    card = files.pop("README.md").decode()  # which the folder lacks
    assert 'DiffusionPipeline.from_pretrained("ada/composed", trust_remote_code=True)' in card
    assert files == contents(saved.folder / "standalone/composed")
    assert set(files) == set(contents(saved.folder / "plain/composed")) | code
    written = contents(saved.folder / "standalone/guided")
    assert written["README.md"] == b"# Animals\n"
    assert "checkpoint-5/state.bin" not in written
    weights = "unet/diffusion_pytorch_model.fp16.safetensors"
    assert os.path.samefile(saved.folder / "standalone/guided" / weights, saved.folder / "plain/guided" / weights)
    assert not os.path.samefile(saved.folder / "standalone/guided/README.md", saved.folder / "plain/guided/README.md")
    code = {path for path in contents(saved.folder / "standalone/of diffusers") if path.endswith(".py")}
    assert code == {"pipeline_classifier_guided.py"}


@pytest.fixture(scope="module")
def code(saved):
    """All files of code, by name."""
    return {path.name: path.read_text() for path in (saved.folder / "standalone").rglob("*.py")}


def test_the_code_is_the_packages_own(code):
    classes = {name: getattr(hf_guided, name) for name in hf_guided.__all__ if name != "__version__"}
    assert len(code) == 12
    del classes["BigGANDiscriminator"]  # which training alone needs
    for name, cls in classes.items():
        source = inspect.getsource(cls).removeprefix("@register_with_diffusers\n")
        assert f"\n{source}" in code[f"{cls.__module__.rpartition('.')[2]}.py"], name
    assert "\n# Largest factor by which a step of Heun or KDPM2 may amplify" in code["pipeline_classifier_guided.py"]


def test_the_code_stands_alone(code, tmp_path):
    for name, text in code.items():
        assert text.startswith(f"# Generated from hf-guided {hf_guided.__version__} "), name
        assert "Licence: Apache-2.0" in text.splitlines()[1]
        (tmp_path / name).write_text(text)
        for node in ast.walk(compile(text, name, "exec", ast.PyCF_ONLY_AST)):
            imported = node.names[0].name if isinstance(node, ast.Import) else getattr(node, "module", "")
            assert not getattr(node, "level", 0), name
            assert not str(imported).startswith("hf_guided"), name
        for path in (Path.home(), Path(hf_guided.__file__).parents[1], Path(sys.prefix), Path("/tmp")):
            assert f"{path}/" not in text, name
    # Nothing that is used is missing, and nothing that is imported is unused.
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "F", str(tmp_path)]
    linted = subprocess.run(command, capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout


def test_each_file_has_what_its_class_needs_and_no_more(code):
    def classes(name):
        return {node.name for node in ast.parse(code[name]).body if isinstance(node, ast.ClassDef)}

    for name, others in {
        "unet_adm.py": {"ADMForImageClassification", "ADMScheduler", "Guidance", "ADMAttentionPool"},
        "scheduling_adm.py": {"ADMUNet2DModel", "Guidance", "RePaint"},
        "classifier_adm.py": {"ADMUNet2DModel", "ADMScheduler", "Guidance"},
        "image_processing_adm.py": {"ADMForImageClassification"},
        "vae.py": {"VAEPipeline", "ADMScheduler", "GaussianDiffusion"},
        "gan.py": {"GANPipeline", "BigGANDiscriminator", "AdversarialPair"},
        "flow.py": {"FlowPipeline", "ClassConditionalVAE"},
        "pipeline_vae.py": {"ADMScheduler", "Guidance", "BigGANGenerator"},
        "pipeline_classifier_guided.py": {"ADMUNet2DModel", "ADMScheduler", "ADMForImageClassification"},
    }.items():
        assert not classes(name) & others, name
    kinds = set(hf_guided.guidance.__all__) - {"guidance_from_dict"}
    for name in ("pipeline_classifier_guided.py", "pipeline_classifier_guided_upscale.py"):
        assert classes(name) >= kinds


@pytest.fixture
def inlined(tmp_path, monkeypatch):
    """The one file of `run`, of a package of the given modules."""
    package = f"zoo_{tmp_path.name}"
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()

    def write(**modules):
        for name, text in modules.items():
            (tmp_path / package / f"{name}.py").write_text(text)
        return inline([(f"{package}.main", "run")]).replace(package, "zoo")

    return write


MODULES = {
    "main": '''"""The zoo."""
import math
from .cages import CAGES

# Opens.
def run():
    return CAGES, math.pi  # all
''',
    "cages": """
import os
import numpy as np
from .animals import cat as cat

CAGES = [cat()]  # for now
EMPTY = os.sep
ZERO = np.e
""",
    "animals": '''"""Animals."""

def run(): ...  # not the one that is needed


# It purrs.
@register_with_diffusers
def cat():
    """A cat."""
    CAGE = 1
    return CAGE
''',
}
INLINED = '''"""The zoo."""

import math


# zoo.animals
# Animals.

# It purrs.
def cat():
    """A cat."""
    CAGE = 1
    return CAGE


# zoo.cages

CAGES = [cat()]  # for now


# Opens.
def run():
    return CAGES, math.pi  # all
'''


def test_inlining_keeps_what_is_needed_in_order(inlined):
    header, text = inlined(**MODULES).split('"""', 1)
    assert all(line.startswith("# ") for line in header.splitlines())
    assert f'"""{text}' == INLINED


RUN = "def run(): return helper(N)"
HELPER = "def helper(N=0): return N"


@pytest.mark.parametrize(
    ("main", "other", "sentence"),
    [
        ("from .other import helper\nN = 1\n" + RUN, "N = 2\n" + HELPER, "N of .*other and N of .*main cannot be"),
        ("from .other import helper\nimport re as N\n" + RUN, "N = 2\n" + HELPER, "N of .* and N of .*: rename one"),
        ("from .other import helper\nfrom a import N\n" + RUN, "from b import N\n" + HELPER, "N of b and N of a"),
        ("from .other import max\ndef run(): return max", "def max(): ...", "max of .*other would .* Python's own"),
        ("from .other import N as M\ndef run(): return M", "", "line 1, .* imports N as M: import it by its own name"),
        ("def run():\n    from .other import N\n    return N", "", "line 2, .* imports inside run: import at"),
        ("from .other import N\n" + RUN, "import os\nN = 1\nos.umask(0)", "line 3, .* runs code on import"),
        ("from .other import N\n" + RUN, "if True:\n    N = 1", "line 1, .* runs code on import"),
        ("from .other import N\n" + RUN, "", "main imports N from .*other, which does not define it"),
        ("N = 1\nN = 2\n" + RUN, "", "main defines N twice"),
    ],
    ids=["two definitions", "definition and module", "two imports", "builtin", "alias", "inner import", "effect",
         "branch", "missing", "redefinition"],
)  # fmt: skip
def test_inlining_refuses_what_would_mean_something_else(inlined, main, other, sentence):
    with pytest.raises(ValueError, match=sentence):
        inlined(main=main, other=other)


def test_refusals(saved, tmp_path):
    plain, standalone = saved.folder / "plain", saved.folder / "standalone"
    for name in ("guided", "unet", "classifier"):
        with pytest.raises(ValueError, match=f"{name} carries its code already: push it without --standalone"):
            write_standalone(standalone / name, tmp_path / "new")
    with pytest.raises(ValueError, match="guided is not empty: give an empty"):
        write_standalone(plain / "unet", standalone / "guided")
    with pytest.raises(ValueError, match=r"plain holds no model; code can be added to a saved ClassifierGuided"):
        write_standalone(plain, tmp_path / "new")
    folder = tmp_path / "pipeline"
    folder.mkdir()
    for index, sentence in [
        ({"_class_name": "DDPMPipeline"}, "pipeline holds DDPMPipeline; code can be added to"),
        ({"_class_name": "ClassifierGuidedPipeline", "unet": ["mine.unet", "Mine"]}, "unet of .* is Mine of mine.unet"),
    ]:
        (folder / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=sentence):
            write_standalone(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()
