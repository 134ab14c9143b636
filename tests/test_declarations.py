"""What is open to be added has one declaration, which everything else reads: a toy metric, kind and family show it."""

import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

import hf_guided
from hf_guided import ADMScheduler, ADMUNet2DModel, ClassifierGuidedPipeline
from hf_guided.comparison.report import comparison_table
from hf_guided.evaluation.evaluate import Evaluation, measure
from hf_guided.evaluation.features.feature_sets import FeatureSet
from hf_guided.evaluation.metrics.moments import FeatureStatistics
from hf_guided.evaluation.metrics.table import METRICS, Metric
from hf_guided.families import BASELINES, Family
from hf_guided.generation.sampling import sample_batches
from hf_guided.guidance.base import KINDS, PredictionGuidance
from hf_guided.hub.model_card import write_model_card
from hf_guided.hub.saved_card import card_of_saved
from hf_guided.hub.space import write_space
from hf_guided.pipelines.auto_pipeline import pipeline_class
from hf_guided.pipelines.from_latents import LatentPipeline


@pytest.fixture
def toy_metric(monkeypatch):
    """The share of features above those of every real image."""

    def compute(compared):
        return float((compared.generated.kept > compared.reference.kept.max()).mean())

    metric = Metric("beyond", "beyond reality", "{:.1%}".format, needs=("generated.kept",), compute=compute)
    monkeypatch.setitem(METRICS, metric.name, metric)


def features(seed: int) -> FeatureSet:
    kept = np.random.default_rng(seed).normal(size=(40, 3)).astype(np.float32)
    return FeatureSet(
        "toy", "", len(kept), FeatureStatistics.from_moments(kept.mean(axis=0), np.cov(kept.T), len(kept)), kept=kept
    )


def test_a_metric(toy_metric, tmp_path):
    metrics = measure(features(0), features(1))
    value = metrics["beyond/toy"]
    assert "beyond reality" in str(Evaluation("a", "b", 40, 40, metrics))
    write_model_card(tmp_path, title="toy", dataset="toys", results=[{"guidance_scale": 1.0, **metrics}])
    assert "Beyond reality (toy)" in (tmp_path / "README.md").read_text()
    run = {"family": "mine", "title": "mine", "seed": 0, "metrics": {"beyond": value}, "losses": {}, "notes": []}
    table = comparison_table({"runs": [run], "real": None, "settings": {}})
    header, _, row = (line.split(" | ") for line in table.splitlines()[:3])
    assert row[header.index("beyond reality")] == f"{value:.1%}"


def test_a_kind_of_guidance(tmp_path):
    class OppositeGuidance(PredictionGuidance, source="nowhere, equation 0"):
        component = "unet"

    try:
        sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 2, "model_channels": 32, "channel_mult": [1]}
        unet = ADMUNet2DModel(**sizes, num_res_blocks=1, num_heads=1, attention_resolutions=[])
        pipe = ClassifierGuidedPipeline(unet, ADMScheduler(), sampling_defaults={"guidance": [OppositeGuidance(2.0)]})
        pipe.save_pretrained(tmp_path)
        (saved,) = ClassifierGuidedPipeline.from_pretrained(tmp_path).config.sampling_defaults["guidance"]
        assert saved == {"kind": "OppositeGuidance", "scale": 2.0}
        assert "OppositeGuidance" in card_of_saved(tmp_path, "toy")
    finally:
        KINDS.pop("OppositeGuidance", None)


class ToyModel(ModelMixin, ConfigMixin):
    """One gray level for each class."""

    @register_to_config
    def __init__(self, sample_size: int = 4, image_channels: int = 1, num_class_embeds: int = 2):
        super().__init__()
        self.level = torch.nn.Parameter(torch.linspace(-1, 1, num_class_embeds))


class ToyPipeline(LatentPipeline):
    main_component = "model"

    def __init__(self, model: ToyModel, id2label: dict | None = None):
        super().__init__()
        self.register_modules(model=model)
        self.register_to_config(id2label=id2label)

    @property
    def latent_length(self):
        return 1

    def decode(self, latents, labels):
        return self.model.level[labels][:, None, None, None].expand(-1, 1, 4, 4)


@pytest.fixture
def toy_family(monkeypatch):
    family = Family(
        "Toy", "toy model", "ToyPipeline", ("ToyModel",), "model", "[no paper](x)", "toy-tag", "glee", (1.0, 2.0)
    )
    monkeypatch.setitem(BASELINES, "toy", family)
    for name, module, cls in (
        ("ToyModel", "baselines.toy", ToyModel),
        ("ToyPipeline", "pipelines.pipeline_toy", ToyPipeline),
    ):
        made = ModuleType(f"hf_guided.{module}")
        setattr(made, name, cls)
        monkeypatch.setitem(sys.modules, made.__name__, made)
        monkeypatch.setitem(hf_guided._MODULE_OF, name, module)
        monkeypatch.setattr(cls, "__module__", "hf_guided")


def test_a_family(toy_family, tmp_path):
    ToyModel().save_pretrained(tmp_path / "saved" / "model")
    index = {"_class_name": "ToyPipeline", "_diffusers_version": "0", "model": ["hf_guided", "ToyModel"]}
    (tmp_path / "saved" / "model_index.json").write_text(json.dumps({**index, "id2label": {"0": "a", "1": "b"}}))

    kind = pipeline_class(str(tmp_path / "saved"))
    assert kind is ToyPipeline
    pipe = kind(ToyModel.from_pretrained(tmp_path / "saved" / "model"), {0: "a", 1: "b"})
    pipe.set_progress_bar_config(disable=True)
    ((_, images),) = sample_batches(pipe, torch.tensor([0, 1]), 2, 0)
    assert images[:, 0, 0, 0].tolist() == [0, 255]

    card = card_of_saved(tmp_path / "saved", "toy")
    assert "- toy-tag\n" in card
    assert "[no paper](x)" in card
    assert "`glee=`" in card
    assert "A class-conditional toy model" in card
    write_space(tmp_path / "space", model_id="ada/toy", model_class="ToyPipeline")
    assert "the same noise at several glees" in (tmp_path / "space" / "README.md").read_text()
