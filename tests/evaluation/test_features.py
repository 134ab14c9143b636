import importlib.util
import json
import sys
import urllib.error
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_guided.evaluation.features import extractors as features_module
from hf_guided.evaluation.features.extractors import InceptionFeatures, ModelFeatures, load_features, match_channels
from hf_guided.models.images import resize_and_crop, to_pixel_values

VIT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


@pytest.fixture
def pictures():
    """Draws 8-bit images `(n, channels, 40, 50)`: smooth, so that ways to resize agree or differ as on photographs."""

    def draw(n, channels=3, size=(40, 50), seed=1):
        coarse = torch.rand(n, channels, 5, 6, generator=torch.Generator().manual_seed(seed)) * 255
        return F.interpolate(coarse, size, mode="bilinear").round().to(torch.uint8)

    return draw


@pytest.fixture
def save(tmp_path):
    """Saves a model of random weights, with a processor, to a folder of that name, and returns the folder."""

    def to_folder(model, processor=None, name="network"):
        model.save_pretrained(tmp_path / name)
        if processor is not None:
            processor.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return to_folder


def vit(**arguments):
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**VIT, image_size=32, patch_size=8, **arguments)).eval()


def vit_processor(**arguments):
    return ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD, **arguments)


def prepared(images, size, resample, mean=MEAN, std=STD):
    """What processors mean, by hand: resize by PIL, to [0, 1], normalise."""
    resized = [
        np.asarray(Image.fromarray(image).resize(size, resample)) for image in images.movedim(1, -1).squeeze(-1).numpy()
    ]
    values = torch.from_numpy(np.stack(resized)).double() / 255
    values = values[:, None] if values.ndim == 3 else values.movedim(-1, 1)
    shape = (1, len(mean), 1, 1)
    return ((values - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)).float()


# Models of transformers


def test_classifier_of_tokens(save, pictures):
    model = vit(num_labels=3, id2label={0: "cat", 1: "dog", 2: "cow"}, label2id={"cat": 0, "dog": 1, "cow": 2})
    extractor = load_features(save(model, vit_processor()))
    computed = extractor(pictures(4))
    with torch.no_grad():
        pixel_values = prepared(pictures(4), (32, 32), Image.Resampling.BILINEAR)
        output = model(pixel_values, output_hidden_states=True)
    assert computed.features.dtype == computed.probabilities.dtype == np.float32
    assert output.hidden_states[-1].shape == (4, 17, 8)
    np.testing.assert_allclose(computed.features, output.hidden_states[-1].mean(dim=1), atol=1e-5)
    np.testing.assert_allclose(computed.probabilities, output.logits.softmax(dim=1), atol=1e-6)
    assert computed.spatial is None
    assert extractor.id2label == {0: "cat", 1: "dog", 2: "cow"}


def test_classifier_of_maps(save, pictures):
    torch.manual_seed(0)
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=5)
    model = ResNetForImageClassification(config)
    model(torch.randn(64, 1, 32, 32))  # in training mode: gives batch normalisation statistics unlike its defaults
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=0.5, image_std=0.5)
    extractor = load_features(save(model.eval(), processor))
    computed = extractor(pictures(4, channels=1))
    with torch.no_grad():
        pixel_values = prepared(pictures(4, channels=1), (32, 32), Image.Resampling.BILINEAR, [0.5], [0.5])
        output = model(pixel_values, output_hidden_states=True)
    assert computed.features.shape == (4, 12)
    np.testing.assert_allclose(computed.features, output.hidden_states[-1].mean(dim=(2, 3)), atol=1e-5)
    np.testing.assert_allclose(computed.probabilities, output.logits.softmax(dim=1), atol=1e-6)
    assert extractor.id2label is None  # LABEL_0 to LABEL_4 are no names

    # RGB is what its luminance is.
    np.testing.assert_array_equal(extractor(pictures(2)).features, extractor(match_channels(pictures(2), 1)).features)


def test_dinov2_as_published(save, pictures):
    """The class token after the last normalisation, of the whole image at the size that its processor crops to."""
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**VIT, image_size=70, patch_size=14)).eval()
    size = {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}
    extractor = load_features(save(model, BitImageProcessorPil(**size, image_mean=MEAN, image_std=STD)))
    computed = extractor(pictures(3))
    with torch.no_grad():
        expected = model(prepared(pictures(3), (56, 56), Image.Resampling.BICUBIC)).last_hidden_state[:, 0]
    np.testing.assert_allclose(computed.features, expected, atol=1e-5)
    assert computed.probabilities is None
    assert extractor.id2label is None


def test_vision_model_that_pools_itself(save, pictures):
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**VIT, image_size=32, patch_size=8)).eval()
    pixel_values = prepared(pictures(3), (32, 32), Image.Resampling.BILINEAR)
    with torch.no_grad():
        expected = model(pixel_values).pooler_output
    computed = load_features(save(model, vit_processor()))(pictures(3))
    np.testing.assert_allclose(computed.features, expected, atol=1e-6)

    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])).eval()
    with torch.no_grad():
        expected = model(pixel_values).last_hidden_state.mean(dim=(2, 3))
    computed = load_features(save(model, vit_processor(), "maps"))(pictures(3))
    np.testing.assert_allclose(computed.features, expected, atol=1e-5)


def test_pooling_that_was_never_trained_is_left_out(save, pictures):
    """Weights without those of the pooling layer, as published for DINO: reinitialised ones would be random."""
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**VIT, image_size=32, patch_size=8), add_pooling_layer=False).eval()
    folder = save(model, vit_processor())
    with torch.no_grad():
        expected = model(prepared(pictures(3), (32, 32), Image.Resampling.BILINEAR)).last_hidden_state.mean(dim=1)
    np.testing.assert_allclose(load_features(folder)(pictures(3)).features, expected, atol=1e-5)
    assert load_features(folder).fingerprint == load_features(folder).fingerprint


def test_model_that_also_knows_text(save, pictures):
    torch.manual_seed(0)
    text = {**VIT, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    vision = {**VIT, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    computed = load_features(save(model, vit_processor()))(pictures(3))
    with torch.no_grad():
        pixel_values = prepared(pictures(3), (32, 32), Image.Resampling.BILINEAR)
        expected = model.visual_projection(model.vision_model(pixel_values).pooler_output)
    np.testing.assert_allclose(computed.features, expected, atol=1e-6)


def test_half_precision_gives_float32(pictures):
    exact = ModelFeatures(vit(num_labels=3), "judge", vit_processor())(pictures(6))
    half = ModelFeatures(vit(num_labels=3).to(torch.bfloat16), "judge", vit_processor())(pictures(6))
    assert half.features.dtype == half.probabilities.dtype == np.float32
    np.testing.assert_allclose(half.features, exact.features, atol=0.05)
    np.testing.assert_allclose(half.probabilities.sum(axis=1), 1, atol=1e-6)


def test_mode_is_left_as_it_was(pictures):
    model = vit(hidden_dropout_prob=0.5)
    extractor = ModelFeatures(model, "judge", vit_processor())
    expected = extractor(pictures(3)).features
    assert not model.training
    model.train()
    np.testing.assert_array_equal(extractor(pictures(3)).features, expected)
    assert model.training
    extractor.processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    with pytest.raises(ValueError, match="image size"):  # raised inside the model
        extractor(pictures(3))
    assert model.training


def test_batches_change_nothing(save, pictures):
    extractor = load_features(save(vit(num_labels=3), vit_processor()))
    whole = extractor(pictures(10))
    for size in (1, 3):
        parts = [extractor(batch) for batch in pictures(10).split(size)]
        np.testing.assert_allclose(np.concatenate([part.features for part in parts]), whole.features, atol=2e-6)
        np.testing.assert_allclose(
            np.concatenate([part.probabilities for part in parts]), whole.probabilities, atol=1e-6
        )


def test_fingerprint_is_of_weights_and_preprocessing(save):
    folder = save(vit(num_labels=3), vit_processor())
    fingerprint = load_features(folder).fingerprint
    assert len(fingerprint) == 64
    assert load_features(f"other={folder}").fingerprint == fingerprint
    assert ModelFeatures(vit(num_labels=3), "judge", vit_processor()).fingerprint == fingerprint

    changed = vit(num_labels=3)
    changed.classifier.bias.data[1] = torch.nextafter(changed.classifier.bias.data[1], torch.tensor(1.0))
    others = [
        load_features(save(changed, vit_processor(), "changed")).fingerprint,
        load_features(save(vit(num_labels=3), vit_processor(resample=3), "bicubic")).fingerprint,
        ModelFeatures(vit(num_labels=3).half(), "judge", vit_processor()).fingerprint,
    ]
    assert len({fingerprint, *others}) == 4


# The classifier of ADM


def test_adm_sees_what_training_saw(tiny_classifier, pictures, tmp_path):
    """8-bit images of its own size are `images / 127.5 - 1` to the bit, loaded or in memory."""
    classifier = tiny_classifier()
    images = pictures(5, size=(16, 16))
    with torch.no_grad():
        output = classifier(images / 127.5 - 1, output_hidden_states=True)
    classifier.save_pretrained(tmp_path / "judge" / "model")
    in_memory = ModelFeatures(classifier, "judge")
    loaded = load_features(str(tmp_path / "judge" / "model"))
    for extractor in (in_memory, loaded):
        computed = extractor(images)
        np.testing.assert_array_equal(computed.features, output.hidden_states[-1].mean(dim=(2, 3)))
        np.testing.assert_array_equal(computed.probabilities, output.logits.softmax(dim=1))
    assert loaded.name == "judge"
    assert loaded.fingerprint == in_memory.fingerprint


def test_adm_gets_other_sizes_and_channels_through_its_processor(tiny_classifier, pictures):
    classifier = tiny_classifier(in_channels=1, pool="adaptive", num_heads=2)
    extractor = ModelFeatures(classifier, "judge")
    luminances = [Image.fromarray(array).convert("L") for array in pictures(3).movedim(1, -1).numpy()]
    as_in_training = [to_pixel_values(resize_and_crop(luminance, (16, 16)), 1) for luminance in luminances]
    with torch.no_grad():
        pixel_values = torch.from_numpy(np.stack(as_in_training))
        expected = classifier(pixel_values).logits.softmax(dim=1)
    np.testing.assert_allclose(extractor(pictures(3)).probabilities, expected, atol=1e-6)


def test_channels():
    every = torch.stack(torch.meshgrid(*[torch.arange(0, 256, 15, dtype=torch.uint8)] * 3, indexing="ij"))
    colours = every.reshape(1, 3, 18, -1)
    picture = Image.fromarray(colours[0].movedim(0, -1).contiguous().numpy())
    np.testing.assert_array_equal(match_channels(colours, 1)[0, 0], np.asarray(picture.convert("L")))
    gray = colours[:, :1]
    np.testing.assert_array_equal(match_channels(gray, 3), torch.cat([gray] * 3, dim=1))
    assert match_channels(gray, 1) is gray
    for bad in (colours.float(), colours[0], torch.zeros(2, 2, 4, 4, dtype=torch.uint8), colours[:0]):
        with pytest.raises(ValueError, match=r"torch.uint8 tensor of shape .* got torch.*\("):
            match_channels(bad, 3)


# Loading


def test_names(save, tmp_path, monkeypatch):
    model, processor = vit(num_labels=3), vit_processor()
    for path in ("judge/model", "facebook/vit-tiny", "runs/lr=3/model", "a/pipeline/model"):
        save(model, processor, path)
    for spec, name in {
        f"{tmp_path}/judge/model": "judge",
        f"{tmp_path}/judge/model/": "judge",
        f"{tmp_path}/judge/./model/.": "judge",
        f"{tmp_path}/facebook/vit-tiny": "vit-tiny",
        f"{tmp_path}/runs/lr=3/model": "lr=3",
        f"{tmp_path}/a/pipeline/model": "a",
        f"mine={tmp_path}/judge/model": "mine",
        f"mine={tmp_path}/runs/lr=3/model": "mine",
    }.items():
        assert load_features(spec).name == name
    monkeypatch.chdir(tmp_path / "judge" / "model")
    assert load_features(".").name == "judge"
    monkeypatch.chdir(tmp_path / "runs")
    assert load_features("lr=3/model").name == "lr=3"


def test_half_precision_files_are_computed_in_float32(save):
    assert load_features(save(vit(num_labels=3).half(), vit_processor())).model.dtype == torch.float32


def test_refusals_of_loading(save, tmp_path):
    good = save(vit(num_labels=3), vit_processor(), "good")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="is a pipeline, and the classifier that guides it must not evaluate it"):
        load_features(str(tmp_path / "pipeline"))
    with pytest.raises(ValueError, match=r"There is no folder .*/nowhere\.$"):
        load_features(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"There is no folder .*/nowhere\.$"):
        load_features(f"judge={tmp_path}/nowhere")
    with pytest.raises(ValueError, match=r"There is no folder .*config\.json\.$"):
        load_features(f"{good}/config.json")
    with pytest.raises(ValueError, match=r"loaded from .*: Unrecognized model"):
        load_features(str(tmp_path))
    with pytest.raises(ValueError, match=r"loaded from .*/alone: Can't load image processor"):
        load_features(save(vit(num_labels=3), None, "alone"))
    with pytest.raises(ValueError, match="The name inception is reserved for the published features"):
        load_features(f"inception={good}")

    text = save(BertModel(BertConfig(**VIT, vocab_size=30)), vit_processor(), "text")
    with pytest.raises(ValueError, match="BertModel takes input_ids, not images"):
        load_features(text)
    four = save(vit(num_channels=4), vit_processor(), "four")
    with pytest.raises(ValueError, match="ViTForImageClassification takes images of 4 channels"):
        load_features(four)
    (tmp_path / "good" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"loaded from .*/good: "):
        load_features(good)


def test_missing_weights_are_refused(save, tmp_path):
    """A classifier's head drawn at random would give an accuracy of chance."""
    headless = save(ViTModel(ViTConfig(**VIT, image_size=32, patch_size=8), add_pooling_layer=False), vit_processor())
    config = json.loads((tmp_path / "network" / "config.json").read_text())
    (tmp_path / "network" / "config.json").write_text(
        json.dumps(config | {"architectures": ["ViTForImageClassification"]})
    )
    with pytest.raises(ValueError, match=r"classifier\.bias, classifier\.weight are missing"):
        load_features(headless)


def test_a_model_without_processor_is_refused():
    with pytest.raises(ValueError, match="ViTForImageClassification needs its image processor"):
        ModelFeatures(vit(num_labels=3), "judge")


def test_bars_are_as_they_were(save):
    from transformers.utils import logging

    folder = save(vit(num_labels=3), vit_processor())
    for switch in (logging.disable_progress_bar, logging.enable_progress_bar):
        switch()
        before = logging.is_progress_bar_enabled()
        load_features(folder)
        assert logging.is_progress_bar_enabled() == before


# Inception

needs_torch_fidelity = pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed"
)


@pytest.fixture(scope="module")
def inception_weights():
    """Random weights of the shapes and names of the published file (which has no counters of batches)."""
    module = features_module._torch_fidelity_inception()
    module.load_state_dict_from_url = lambda *args, **kwargs: {}

    class Untrained(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, value in Untrained("untrained", ["2048"]).state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            weights[name] = noise * (2 / value[0].numel()) ** 0.5
        elif not name.endswith("num_batches_tracked"):
            weights[name] = noise * 0.1 + name.endswith(("bn.weight", "running_var"))
    return weights


@pytest.fixture
def inception_home(inception_weights, tmp_path, monkeypatch):
    """A cache of torch.hub that holds them under the published file's name."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    file.parent.mkdir(parents=True)
    torch.save(inception_weights, file)
    return file


@needs_torch_fidelity
def test_inception_features_are_the_published_ones(inception_home, inception_weights, pictures):
    extractor = load_features("inception")
    computed = extractor(pictures(3))
    assert [computed.features.shape, computed.probabilities.shape, computed.spatial.shape] == [
        (3, 2048), (3, 1008), (3, 2023),
    ]  # fmt: skip
    assert computed.features.dtype == computed.probabilities.dtype == computed.spatial.dtype == np.float32

    oracle = type(extractor.model)("oracle", ["2048", "logits_unbiased", "logits"])  # torch-fidelity's class
    pooled, unbiased, _ = oracle(pictures(3))
    np.testing.assert_array_equal(computed.features, pooled)
    np.testing.assert_array_equal(computed.probabilities, unbiased.softmax(dim=1))
    np.testing.assert_allclose(
        computed.probabilities, (pooled @ inception_weights["fc.weight"].T).softmax(dim=1), rtol=1e-3
    )  # without the bias

    # The convolution of mixed_6 after its normalisation and ReLU, from the maps that go into it.
    inputs = []
    oracle.Mixed_6d.register_forward_pre_hook(lambda module, args: inputs.extend(args))
    oracle(pictures(3))
    kernel, scale, shift, mean, variance = (
        inception_weights[f"Mixed_6d.branch1x1.{name}"].double()
        for name in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    )
    maps = torch.einsum("nchw,oc->nhwo", inputs[0].double(), kernel[:7, :, 0, 0])
    maps = ((maps - mean[:7]) / (variance[:7] + 0.001).sqrt() * scale[:7] + shift[:7]).clamp(min=0)
    np.testing.assert_allclose(computed.spatial, maps.flatten(1), rtol=1e-3, atol=1e-4)

    gray = pictures(2, channels=1)
    np.testing.assert_array_equal(extractor(gray).features, extractor(gray.expand(-1, 3, -1, -1)).features)
    assert not extractor.model.Mixed_6d.branch1x1._forward_hooks
    assert extractor.name == "inception"
    assert extractor.id2label is None


@needs_torch_fidelity
def test_inception_imports_nothing_but_its_module(inception_home, monkeypatch):
    """The package is neither executed, which would need torchvision, nor left half made, nor taken from others."""
    others = ModuleType("torch_fidelity.helpers")
    monkeypatch.setitem(sys.modules, "torch_fidelity.helpers", others)
    modules = dict(sys.modules)
    load_features("inception")
    assert {name for name in sys.modules if "torch_fidelity" in name} == {
        name for name in modules if "torch_fidelity" in name
    }
    assert sys.modules["torch_fidelity.helpers"] is others
    assert "torchvision" in modules or "torchvision" not in sys.modules


@needs_torch_fidelity
def test_inception_fingerprint(inception_home, inception_weights, tmp_path):
    torch.save({**inception_weights, "fc.bias": inception_weights["fc.bias"] + 1}, tmp_path / "other.pth")
    first, again = load_features("inception"), InceptionFeatures(weights=inception_home)
    assert first.fingerprint == again.fingerprint != InceptionFeatures(tmp_path / "other.pth").fingerprint


@needs_torch_fidelity
def test_inception_without_its_weights(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(OSError, match=rf"no network.*weights-inception-\S+\.pth by hand .* {tmp_path}/hub/checkpoints"):
        load_features("inception")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        InceptionFeatures(weights=tmp_path / "nowhere.pth")


def test_inception_without_torch_fidelity(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-guided\[eval\]'"):
        load_features("inception")
