"""`hf-guided sample` and `evaluate` on small saved pipelines of the other families."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hf_guided import FlowPipeline, GANPipeline, VAEPipeline
from hf_guided.baselines import BigGANGenerator, ClassConditionalGlow, ClassConditionalVAE
from hf_guided.cli import main
from hf_guided.evaluation.features.image_sets import open_images
from hf_guided.generation.sampling import to_8_bit

NAMES = {0: "cat", 1: "dog", 2: "owl"}
KINDS = {"vae": VAEPipeline, "gan": GANPipeline, "flow": FlowPipeline}


@pytest.fixture(scope="module")
def work(tmp_path_factory, tiny_classifier):
    """A pipeline of each family, a judge, and a folder of real images."""
    path = tmp_path_factory.mktemp("families")
    torch.manual_seed(0)
    shared = {"sample_size": 8, "image_channels": 3, "num_class_embeds": 3}
    width = {"model_channels": 8, "channel_mult": (1, 2), "latent_dim": 6}
    models = {
        "vae": ClassConditionalVAE(**shared, **width, num_res_blocks=1),
        "gan": BigGANGenerator(**shared, **width),
        "flow": ClassConditionalGlow(**shared, num_levels=2, num_blocks=1, hidden_channels=8),
    }
    models["gan"].set_standing_statistics(num_batches=1, batch_size=32)
    for family, model in models.items():
        KINDS[family](model.eval(), id2label=NAMES).save_pretrained(path / family)
    tiny_classifier(
        sample_size=8, id2label=NAMES, label2id={name: label for label, name in NAMES.items()}
    ).save_pretrained(path / "judge")
    random = np.random.default_rng(0)
    for label, name in NAMES.items():
        (path / "real" / name).mkdir(parents=True)
        for i in range(4):
            pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / "real" / name / f"{label}{i}.png")
    return path


@pytest.fixture(autouse=True)
def caches(work, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(work / "hf"))
    monkeypatch.setattr("hf_guided.evaluation.features.feature_sets.CACHE_DIR", work / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries where there is no network
    monkeypatch.chdir(work)


@pytest.mark.parametrize(
    ("family", "flag", "option"),
    [
        ("vae", [], {}),
        ("vae", ["--temperature", "0.5"], {"temperature": 0.5}),
        ("flow", ["--temperature", "0.5"], {"temperature": 0.5}),
        ("gan", ["--truncation", "0.5"], {"truncation": 0.5}),
    ],
)
def test_samples_are_those_of_the_pipeline(family, flag, option, tmp_path, capsys):
    output = str(tmp_path / "samples.npz")
    labels = ["--labels", "owl", "0", "--num_images_per_label", "2", "--batch_size", "3", "--seed", "5"]
    main(["sample", family, *labels, *flag, "--output", output])
    assert f"Saved 4 samples as {output}" in capsys.readouterr().out
    with np.load(output) as file:
        images, ids = file["arr_0"], file["arr_1"]
    assert ids.tolist() == [2, 0, 2, 0]
    pipe = KINDS[family].from_pretrained(family)
    expected = pipe([2, 0, 2, 0], generator=torch.Generator().manual_seed(5), output_type="latent", **option).images
    difference = images.astype(int) - to_8_bit(expected).permute(0, 2, 3, 1).numpy()
    assert abs(difference).max() <= 1  # in batches of other sizes convolutions round otherwise
    if option:
        plain = pipe([2, 0, 2, 0], generator=torch.Generator().manual_seed(5), output_type="latent").images
        assert not torch.allclose(plain, expected, atol=1e-2)


@pytest.mark.parametrize("family", list(KINDS))
def test_a_picture_of_samples(family, tmp_path):
    main(["sample", family, "--num_images_per_label", "2", "--output", str(tmp_path / "grid.png")])
    with Image.open(tmp_path / "grid.png") as image:
        assert len(image.convert("L").getcolors()) > 20


@pytest.mark.parametrize(("family", "kind"), [("vae", "bound"), ("flow", "exact")])
def test_the_likelihood_of_real_images(family, kind, tmp_path, capsys):
    flags = ["--features", "judge", "--num_images", "6", "--temperature", "0.7", "--seed", "3", "--batch_size", "12"]
    main(["evaluate", family, "real", *flags, "--likelihood", "--output", str(tmp_path)])
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["num_generated"] == 6
    assert set(found["class_accuracy"]["judge"]) == set(NAMES.values())
    assert found["settings"]["temperature"] == 0.7
    bits = found["likelihood"]
    assert bits["kind"] == kind
    assert bits["num_images"] == 12
    assert bits["timesteps"] == bits["vb"] == []
    assert ("Likelihood: at most " in said) == (kind == "bound")
    assert f"{bits['total_bpd']:.4f} bits per dimension" in said
    assert not (tmp_path / "likelihood.png").exists()  # a curve over timesteps, of which there are none

    real = open_images("real")
    pixels = torch.stack([real[i] for i in range(12)]) / 127.5 - 1
    pipe = KINDS[family].from_pretrained(family)
    torch.manual_seed(3)
    expected = pipe.bits_per_dim(pixels, torch.tensor(real.labels))
    assert bits["total_bpd"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert bits["standard_error"] == pytest.approx(expected.std().item() / 12**0.5, rel=1e-4)


def test_a_gan_is_measured_without_likelihood(tmp_path):
    flags = ["--features", "judge", "--num_images", "6", "--truncation", "0.5", "--output", str(tmp_path)]
    main(["evaluate", "gan", "real", *flags])
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["likelihood"] is None
    assert found["metrics"]["fid/judge"] > 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["evaluate", "gan", "real", "--features", "judge", "--likelihood"],
            "GANPipeline has no likelihood: a GAN learns to draw samples and never says how likely an image is.",
        ),
        (["sample", "gan", "--guidance_scale", "2"], "A GANPipeline does not support --guidance_scale; leave it out."),
        (["sample", "vae", "--truncation", "0.5"], "A VAEPipeline does not support --truncation; leave it out."),
        (["sample", "flow", "--num_inference_steps", "9"], "A FlowPipeline does not support --num_inference_steps"),
        (["sample", "flow", "--respacing", "9"], "A FlowPipeline does not support --respacing; leave it out."),
        (["sample", "vae", "--no-condition_unet"], "A VAEPipeline does not support --condition_unet; leave it out."),
        (
            ["evaluate", "vae", "real", "--features", "judge", "--guidance_scale", "1"],
            "A VAEPipeline does not support --guid",
        ),
        (["sample", "gan", "--truncation", "0"], "truncation=0.0 leaves no latents; give a positive threshold"),
        (["sample", "vae", "--temperature", "-1"], "temperature=-1.0"),
        (["sample", "vae", "--labels", "cow"], "There is no class named 'cow'"),
        (["sweep", "flow", "real", "--features", "judge"], "flow is a FlowPipeline, which nothing guides"),
    ],
)
def test_mistakes_are_told_in_a_sentence(argv, message, tmp_path):
    output = tmp_path / ("out" if argv[0] != "sample" else "out.png")
    with pytest.raises(SystemExit, match="error: ") as caught:
        main([*argv, "--output", str(output)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not output.is_file()
