import getpass
import socket

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from hf_guided.hub import write_model_card
from hf_guided.hub.model_card import address
from hf_guided.training.train import table

ROWS = [
    {
        "guidance_scale": 0.0,
        "condition_unet": False,
        "accuracy/judge": 0.1,
        "fid/inception": 28.123456,
        "precision/judge": 0.5,
        "recall/judge": 0.9,
    },
    {
        "guidance_scale": 3.0,
        "condition_unet": True,
        "accuracy/judge": 0.95,
        "fid/inception": 6.2,
        "precision/judge": 0.87,
        "recall/judge": None,
    },
]


def write(folder, **changes):
    arguments = {
        "title": "Digits | guided",
        "dataset": "scikit-learn's 8x8 digits",
        "class_names": ["zero", 'one "1"', "zwölf"],
        "training": {
            "steps": 1000,
            "learning_rate": 1e-4,
            "train_data_dir": folder / "secret" / "digits",
            "wall_time": 61234.5,
            "versions": {"torch": "2.13.0", "diffusers": "0.42.0"},
            "options": "a|b",
            "hub_token": "hf_" + "x1Y" * 10,
        },
        "results": ROWS,
    }
    return write_model_card(folder, **arguments | changes)


def test_metadata_is_read_back(tmp_path):
    card = ModelCard.load(write(tmp_path, dataset_id="ada/digits", license="apache-2.0"))
    data = card.data
    assert (data.library_name, data.license, data.datasets) == ("diffusers", "apache-2.0", ["ada/digits"])
    assert data.pipeline_tag == "unconditional-image-generation"
    assert {"hf-guided", "classifier-guidance", "adm"} <= set(data.tags)
    assert data.model_name == "Digits | guided"
    values = {result.metric_name: result.metric_value for result in data.eval_results}
    assert len(values) == 7  # each row's numbers under a name of their own; None is left out
    assert values["FID (inception), Guidance scale: 0, Class-conditional UNet: no"] == 28.123456
    assert values["Accuracy (judge), Guidance scale: 3, Class-conditional UNet: yes"] == 0.95
    assert {result.dataset_type for result in data.eval_results} == {"ada/digits"}


def test_nothing_is_claimed_that_was_not_said(tmp_path):
    path = write(tmp_path, results=())
    metadata = yaml.safe_load(path.read_text().split("---")[1])
    assert not metadata.keys() & {"license", "datasets", "model-index"}
    assert "Results" not in path.read_text()
    assert "![" not in path.read_text()


def test_text_shows_what_it_was_given(tmp_path):
    for name in ("grid.png", "trade_off.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    text = write(tmp_path).read_text()
    for line in [
        "# Digits | guided",
        "![Samples, one row per class](grid.png)",
        "![Precision, recall and FID by guidance scale](trade_off.png)",
        '`zero`, `one "1"`, `zwölf`',
        "| Steps | 1000 |",
        "| Learning rate | 0.0001 |",
        "| Train data dir | digits |",
        "| Wall time | 61234 |",
        "| Versions | torch 2.13.0, diffusers 0.42.0 |",
        "| Options | a\\|b |",
        "| Guidance scale | Class-conditional UNet | Accuracy (judge) | FID (inception) "
        "| Precision (judge) | Recall (judge) |",
        "| 0 | no | 0.1 | 28.12 | 0.5 | 0.9 |",
        "| 3 | yes | 0.95 | 6.2 | 0.87 | - |",
    ]:
        assert line in text.splitlines(), line
    assert "The features of a metric are in brackets" in text


def test_the_machine_stays_private(tmp_path):
    text = write(tmp_path).read_text()
    for secret in (str(tmp_path), "secret", "x1Y", socket.gethostname(), f"/{getpass.getuser()}"):
        assert secret not in text
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]  # no temporary file is left


def test_many_classes_are_folded(tmp_path):
    names = [f"class {i}" for i in range(1000)]
    text = write(tmp_path, class_names=names).read_text()
    assert "<details><summary>All 1000 classes</summary>" in text
    assert "`class 999`" in text


def test_usage_is_code_that_runs(tmp_path, monkeypatch):
    """The card of a real pipeline, its usage run as it stands, in the folder that it describes."""
    from hf_guided import (
        ADMClassifierConfig,
        ADMForImageClassification,
        ADMScheduler,
        ADMUNet2DModel,
        ClassifierGuidedPipeline,
    )

    shared = {"sample_size": 8, "in_channels": 1, "model_channels": 32, "channel_mult": (1,), "attention_head_dim": 16}
    names = {0: "zero", 1: 'one "1"', 2: "zwölf"}
    ClassifierGuidedPipeline(
        ADMUNet2DModel(**shared, out_channels=2, num_class_embeds=3),
        ADMScheduler(),
        ADMForImageClassification(ADMClassifierConfig(**shared, id2label=names)),
        sampling_defaults={"num_inference_steps": 2},
    ).save_pretrained(tmp_path)
    card = write(tmp_path, class_names=list(names.values())[::-1]).read_text()
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(card.split("```python\n")[1].split("```")[0], "README.md", "exec"), names)
    assert [image.size for image in names["images"]] == [(8, 8)] * 4
    assert (tmp_path / "sample.png").is_file()
    assert 'class_labels=["zwölf"]' in card


def test_usage_loads_from_the_hub_once_it_is_there(tmp_path):
    assert 'from_pretrained("ada/digits")' in write(tmp_path, repo_id="ada/digits").read_text()


def run_usage(card, monkeypatch, folder):
    """Runs the code of a card in its folder and returns what it made."""
    monkeypatch.chdir(folder)
    names = {}
    exec(compile(card.split("```python\n")[1].split("```")[0], "README.md", "exec"), names)
    return names


def test_half_precision_is_loaded_as_it_is_saved(tmp_path, monkeypatch, capsys):
    import torch

    from hf_guided import (
        ADMClassifierConfig,
        ADMForImageClassification,
        ADMScheduler,
        ADMUNet2DModel,
        ClassifierGuidedPipeline,
    )

    shape = {"sample_size": 8, "model_channels": 32, "channel_mult": (1,), "num_heads": 1}
    unet = ADMUNet2DModel(**shape, num_class_embeds=2).to(torch.bfloat16)
    options = {"id2label": {0: "a", 1: "b"}, "sampling_defaults": {"num_inference_steps": 2}}
    ClassifierGuidedPipeline(unet, ADMScheduler(), **options).save_pretrained(tmp_path / "pipe")
    card = write(tmp_path / "pipe", class_names=["a", "b"], guided=False, dtype="bfloat16").read_text()
    assert "saved in bfloat16" in card
    assert run_usage(card, monkeypatch, tmp_path / "pipe")["pipe"].unet.dtype == torch.bfloat16

    classifier = ADMForImageClassification(ADMClassifierConfig(**shape, id2label={0: "a", 1: "b"}))
    classifier.to(torch.float16).save_pretrained(tmp_path / "classifier")
    Image.new("RGB", (8, 8)).save(tmp_path / "classifier" / "picture.png")
    card = write(tmp_path / "classifier", model_class="ADMForImageClassification", dtype="float16").read_text()
    assert run_usage(card, monkeypatch, tmp_path / "classifier")["classify"].model.dtype == torch.float16
    assert "'label'" in capsys.readouterr().out
    assert "dtype" not in write(tmp_path / "pipe").read_text()


def test_an_unconditional_model_has_no_classes(tmp_path, monkeypatch):
    from hf_guided import ADMScheduler, ADMUNet2DModel, ClassifierGuidedPipeline

    unet = ADMUNet2DModel(
        sample_size=8, in_channels=1, out_channels=2, model_channels=32, channel_mult=(1,), num_heads=1
    )
    defaults = {"num_inference_steps": 2}
    ClassifierGuidedPipeline(unet, ADMScheduler(), sampling_defaults=defaults).save_pretrained(tmp_path)
    card = write(
        tmp_path,
        class_names=(),
        training=None,
        results=(),
        summary="An unconditional diffusion model",
        origin="converted from somewhere",
        guided=False,
    ).read_text()
    assert "An unconditional diffusion model (ADM" in card
    assert "converted from somewhere." in card
    for absent in ("## Classes", "## Training", "class_labels", "guidance", "trained on", "class-conditional"):
        assert absent not in card, absent
    assert len(run_usage(card, monkeypatch, tmp_path)["images"]) == 4


def test_an_upsampler_takes_an_image(tmp_path, monkeypatch):
    from hf_guided import ADMScheduler, ADMUNet2DModel, ClassifierGuidedUpscalePipeline

    unet = ADMUNet2DModel(
        sample_size=16, in_channels=3, model_channels=32, channel_mult=(1,), num_heads=1, num_class_embeds=2,
        low_res_channels=3,
    )  # fmt: skip
    options = {"id2label": {0: "a", 1: "b"}, "sampling_defaults": {"num_inference_steps": 2}, "low_res_size": 4}
    ClassifierGuidedUpscalePipeline(unet, ADMScheduler(), **options).save_pretrained(tmp_path)
    Image.new("RGB", (20, 30)).save(tmp_path / "small.png")
    card = write(tmp_path, class_names=["a", "b"], model_class="ClassifierGuidedUpscalePipeline", guided=False)
    made = run_usage(card.read_text(), monkeypatch, tmp_path)
    assert [image.size for image in made["images"]] == [(16, 16)] * 4
    assert made["small"].size == (4, 4)


@pytest.mark.parametrize("model_class", ["VAEPipeline", "GANPipeline", "FlowPipeline"])
def test_a_family_is_used_with_the_package_and_without(model_class, tmp_path, monkeypatch):
    import hf_guided

    shape = {"sample_size": 8, "image_channels": 1, "num_class_embeds": 2}
    narrow = {**shape, "model_channels": 8, "channel_mult": (1, 2)}
    model = {
        "VAEPipeline": lambda: hf_guided.ClassConditionalVAE(**narrow),
        "GANPipeline": lambda: hf_guided.BigGANGenerator(**narrow),
        "FlowPipeline": lambda: hf_guided.ClassConditionalGlow(**shape, num_levels=2, num_blocks=1, hidden_channels=8),
    }[model_class]()
    getattr(hf_guided, model_class)(model, id2label={0: "a", 1: "b"}).save_pretrained(tmp_path)
    card = write(tmp_path, class_names=["a", "b"], model_class=model_class, guided=False).read_text()
    assert len(run_usage(card, monkeypatch, tmp_path)["images"]) == 4
    extra = " normflows" if model_class == "FlowPipeline" else ""
    assert f"`pip install hf-guided{extra}`, then:" in card

    alone = address(card, "ada/digits", standalone=True)
    usage = alone.split("```python\n")[1].split("```")[0]
    assert "from diffusers import DiffusionPipeline" in usage
    assert 'pipe = DiffusionPipeline.from_pretrained("ada/digits", trust_remote_code=True)\n' in usage
    assert model_class not in usage
    assert f"`pip install torch diffusers transformers{extra}`, then:" in alone
    assert address(alone, "ada/digits", standalone=True) == alone  # pushed again


def test_a_classifier_classifies(tmp_path, monkeypatch, capsys):
    from hf_guided import ADMClassifierConfig, ADMForImageClassification

    shape = {"sample_size": 8, "model_channels": 32, "channel_mult": [1], "attention_head_dim": 16}
    names = {0: "zero", 1: "one"}
    ADMForImageClassification(ADMClassifierConfig(**shape, id2label=names)).save_pretrained(tmp_path)
    Image.new("RGB", (20, 30)).save(tmp_path / "picture.png")
    path = write(tmp_path, class_names=["zero", "one"], model_class="ADMForImageClassification")
    data = ModelCard.load(path).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-classification")
    assert "diffusers" not in data.tags
    run_usage(path.read_text(), monkeypatch, tmp_path)
    assert "'label': 'zero'" in capsys.readouterr().out

    alone = address(path.read_text(), "ada/digits", standalone=True)
    assert 'pipeline("image-classification", model="ada/digits", trust_remote_code=True)\n' in alone
    assert "hf_guided" not in alone.split("```python\n")[1].split("```")[0]
    assert address(alone, "ada/digits", standalone=True) == alone  # pushed again


@pytest.mark.parametrize(("accuracy", "is_weak"), [(0.67, True), (0.95, False), (None, False)])
def test_a_weak_evaluation_classifier_is_named_before_its_numbers(accuracy, is_weak, tmp_path):
    held_out = {"samples": "held-out images", "guidance_scale": None, "condition_unet": None}
    held_out |= {} if accuracy is None else {"accuracy/judge": accuracy}
    card = write(tmp_path, results=[held_out, *({"samples": "generated", **row} for row in ROWS)]).read_text()
    said = "right in only 67% of held-out images, so these numbers say little.\n\n|"
    assert (said in card) == is_weak
    rows = [{**held_out, "accuracy/judge": accuracy or 1.0}]
    assert ("right in only 67% of held-out images" in table(rows)) == is_weak
