"""What a push adds to folders that only `save_pretrained` wrote: a model card of what their configs say."""

import json
import os
import sys

import forked
import pytest
from hub_server import HubServer, User
from huggingface_hub import ModelCard

import hf_guided
from hf_guided import ADMScheduler, ClassifierGuidedPipeline, ClassifierGuidedUpscalePipeline
from hf_guided.hub.saved_card import card_of_saved

NAMES = {0: "red apple", 1: "pear", 2: "plum"}
SHAPE = {"sample_size": 8, "image_channels": 1, "num_class_embeds": 3}
NARROW = {**SHAPE, "model_channels": 8, "channel_mult": (1, 2)}


def vae():
    return hf_guided.ClassConditionalVAE(**NARROW)


def gan():
    return hf_guided.BigGANGenerator(**NARROW)


def flow():
    return hf_guided.ClassConditionalGlow(**SHAPE, num_levels=2, num_blocks=1, hidden_channels=8)


@pytest.fixture
def saved(tiny_unet, tiny_classifier, tmp_path):
    """Saves a model or pipeline of a kind, and nothing else."""
    small = {"sample_size": 8, "channel_mult": (1,), "attention_resolutions": ()}
    kinds = {
        "guided": lambda: ClassifierGuidedPipeline(
            tiny_unet(**small, num_class_embeds=3),
            ADMScheduler(),
            tiny_classifier(**small, id2label=NAMES),
            sampling_defaults={"num_inference_steps": 7, "guidance_scale": 1.25},
        ),
        "unconditional": lambda: ClassifierGuidedPipeline(tiny_unet(**small, num_class_embeds=None), ADMScheduler()),
        "upscale": lambda: ClassifierGuidedUpscalePipeline(
            tiny_unet(**small, num_class_embeds=3, low_res_channels=3), ADMScheduler(), id2label=NAMES, low_res_size=4
        ),
        "vae": lambda: hf_guided.VAEPipeline(vae(), id2label=NAMES),
        "gan": lambda: hf_guided.GANPipeline(gan(), id2label=NAMES),
        "flow": lambda: hf_guided.FlowPipeline(flow(), id2label=NAMES),
        "unet": lambda: tiny_unet(**small),
        "classifier": lambda: tiny_classifier(**small, id2label=NAMES),
        "bare vae": vae,
        "bare gan": gan,
        "bare flow": flow,
    }

    def save(kind):
        folder = tmp_path / kind
        kinds[kind]().save_pretrained(folder)
        assert not (folder / "README.md").exists()
        return folder

    return save


@pytest.mark.parametrize(
    ("kind", "tag", "said"),
    [
        ("guided", "classifier-guidance", "A class-conditional diffusion model with classifier guidance"),
        ("unconditional", "adm", "An unconditional diffusion model"),
        ("upscale", "adm", "A class-conditional upsampler"),
        ("vae", "vae", "A class-conditional VAE"),
        ("gan", "gan", "A class-conditional GAN"),
        ("flow", "normalizing-flow", "A class-conditional normalizing flow"),
        ("unet", "adm", "A class-conditional UNet of a diffusion model"),
        ("classifier", "classifier-guidance", "A classifier of noisy images"),
        ("bare vae", "vae", "A class-conditional VAE"),
        ("bare gan", "gan", "A class-conditional generator of a GAN"),
        ("bare flow", "normalizing-flow", "A class-conditional normalizing flow"),
    ],
)
def test_every_kind_says_what_it_is_and_how_to_load_it(saved, kind, tag, said, monkeypatch):
    folder = saved(kind)
    before = sorted(folder.rglob("*"))
    card = card_of_saved(folder, "fruits", "apache-2.0")
    assert sorted(folder.rglob("*")) == before
    data = ModelCard(card).data
    assert data.library_name == ("transformers" if kind == "classifier" else "diffusers")
    assert {"hf-guided", tag} <= set(data.tags)
    assert (data.license, data.model_name) == ("apache-2.0", "fruits")
    assert said in card
    assert ("`red apple`, `pear`, `plum`" in card) == (not kind.startswith(("un", "bare")))
    assert ("| Guidance scale | 1.25 |" in card) == (kind == "guided")
    usage = card.split("```python\n")[1].split("```")[0]
    loading = "".join(line + "\n" for line in usage.splitlines() if "import" in line or "from_pretrained" in line)
    monkeypatch.chdir(folder)
    if kind == "classifier":
        loading = usage.partition("print(")[0]
    exec(loading, {})


def test_nameless_classes_are_not_listed(tiny_classifier, tmp_path):
    tiny_classifier().save_pretrained(tmp_path)
    assert "## Classes" not in card_of_saved(tmp_path, "fruits")


def test_models_of_others_get_no_card_of_ours(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    assert card_of_saved(tmp_path, "fruits") is None


def test_a_push_adds_the_card_to_the_repository_alone(saved, tmp_path):
    folder, token = saved("guided"), "hf_write" + "Aa0" * 10
    with HubServer({token: User("ada")}) as hub:

        def push(*flags):
            command = [sys.executable, "-m", "hf_guided.cli", "push", str(folder), "fruits", *flags]
            environment = {**os.environ, **hub.environment(tmp_path / "home", token)}
            result = forked.run(command, env=environment, timeout=120)
            assert result.returncode == 0, result.stderr
            return hub.repos["ada/fruits"].head().files["README.md"].decode(), result.stderr

        card, _ = push("--hub_license", "apache-2.0")
        assert 'ClassifierGuidedPipeline.from_pretrained("ada/fruits")' in card
        assert ModelCard(card).data.license == "apache-2.0"
        assert not (folder / "README.md").exists()
        again, told = push("--hub_license", "mit", "--standalone")
        assert again == card  # a card that is there is kept
        assert "write the licence mit into it" in told
        (folder / "README.md").write_text("# Mine\n")
        mine, _ = push()
        assert "# Mine" in mine
