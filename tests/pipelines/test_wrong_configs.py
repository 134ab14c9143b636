"""Wrong values in the configs of a saved pipeline end in one sentence that names the setting or the file."""

import importlib.util
import inspect
import json

import pytest

from hf_guided import (
    ADMClassifierConfig,
    ADMScheduler,
    ADMUNet2DModel,
    ClassifierGuidedPipeline,
    FlowPipeline,
    GANPipeline,
    VAEPipeline,
)
from hf_guided.baselines import BigGANDiscriminator, BigGANGenerator, ClassConditionalGlow, ClassConditionalVAE

INF = float("inf")
WRONG = {
    "sample_size": ["x", [8], 0, -8, 8.5, None, True, [8, 8, 8], [8, "x"], [], {}, 10**12],
    "in_channels": ["3", 0, -1, None, 1.5, 10**12],
    "model_channels": ["x", 0, -32, 32.5, None, [32], 10**12],
    "channel_mult": [[], [0], [-1], "x", 3, None, [None], ["1"], [1e30], [1] * 40],
    "num_res_blocks": [0, -1, "x", 1.5, None, 10**9],
    "num_class_embeds": [-1, 0, "x", 1.5, [3], 10**12],
    "dropout": [2, 1, -0.5, "x", None, [0.1]],
    "attention_resolutions": ["x", 8, [0], [None], ["8"], None, [8.5]],
    "num_heads": [0, -1, "x", 1.5, [1]],
    "attention_head_dim": [0, -16, "x", 1.5],
}
SWITCHES = ["conv_resample", "resblock_updown", "use_scale_shift_norm"]
UNET = [(name, value) for name, values in WRONG.items() for value in values]
UNET += [("out_channels", value) for value in ("x", 0, None)] + [("low_res_channels", value) for value in ("x", 0)]
UNET += [(name, value) for name in [*SWITCHES, "null_class_label"] for value in ("yes", 2, None)]
CLASSIFIER = [(name, value) for name, value in UNET if hasattr(ADMClassifierConfig, name)]
CLASSIFIER += [("pool", value) for value in ("x", 3, None)]
NAMES = [["a", "b", "c"], [], "x", 3, {"x": "a"}, {"0": 1}, {"0": None}, {"0": ""}, {"-1": "a"}, {"0.5": "a"}]
CLASSIFIER += [("id2label", value) for value in [*NAMES, {"1": "a", "2": "b"}, {"0": "a", "00": "b"}]]
SCHEDULER = [("num_train_timesteps", value) for value in (0, -5, "x", 1e30, 10**12, None, 2.5, [1000], True, 999)] + [
    ("trained_betas", value)
    for value in ("x", 3, [], ["x"] * 1000, [0.0] * 1000, [2.0] * 1000, [None] * 1000, [INF] * 1000, {}, [[0.1]])
]
SCHEDULER += [
    (name, value) for name in ("beta_schedule", "prediction_type", "algorithm_type") for value in ("x", 3, [])
]
SCHEDULER += [("variance_type", "x"), ("variance_type", None), ("solver_order", 0), ("solver_order", "x")]
SCHEDULER += [(name, value) for name in ("clip_sample", "rescale_timesteps") for value in ("x", 2, None)]
INDEX = [("id2label", value) for value in [*NAMES, {"3": "a"}, {"0": "a", "00": "b"}]]
INDEX += [
    ("sampling_defaults", value)
    for value in (
        *([], ["x"], "x", 3, {"x": 1}, {"num_inference_steps": "x"}, {"num_inference_steps": 0}, {"respacing": 4}),
        *({"num_inference_steps": 2.5}, {"num_inference_steps": True}, {"respacing": "x"}, {"respacing": [4]}),
        *({"timesteps": "x"}, {"timesteps": []}, {"timesteps": [1, 5]}, {"timesteps": [5.5]}, {"timesteps": 3}),
        *({"guidance_scale": "x"}, {"guidance_scale": -1}, {"guidance_scale": [1]}, {"eta": "x"}, {"eta": 2}),
        *(
            {"eta": -1},
            {"guidance": "x"},
            {"guidance": {"kind": "x"}},
            {"guidance": [{"kind": "ClassifierGuidance"}, 3]},
        ),
        *(
            {"guidance": {"kind": "ClassifierGuidance", "scale": "x"}},
            {"guidance": {"kind": "ClassifierGuidance", "x": 1}},
        ),
        {"num_inference_steps": 5, "respacing": "5"},
    )
]
INDEX += [("unet", value) for value in (None, "x", [], ["x"], ["hf_guided", "X"], ["x", "ADMUNet2DModel"], 3, [3, 4])]
INDEX += [("scheduler", value) for value in (["hf_guided", "ADMUNet2DModel"], ["diffusers", "X"])]
INDEX += [("_class_name", value) for value in (None,)]
TABLE = {
    "unet/config.json": UNET,
    "classifier/config.json": CLASSIFIER,
    "scheduler/scheduler_config.json": SCHEDULER,
    "model_index.json": INDEX,
}
CASES = [(path, name, value) for path, cases in TABLE.items() for name, value in cases]


def shown(value):
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) < 30 else f"{text[:27]}..."


@pytest.fixture(scope="module")
def folder(tiny_unet, tiny_classifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    ClassifierGuidedPipeline(tiny_unet(num_class_embeds=3), ADMScheduler(), tiny_classifier()).save_pretrained(folder)
    return folder


def refusal(load, *arguments, **settings):
    """The sentence that something is refused with."""
    with pytest.raises((ValueError, OSError)) as caught:
        load(*arguments, **settings)
    message = str(caught.value)
    assert "\n" not in message.strip()
    return message


@pytest.mark.parametrize(
    ("path", "name", "value"), CASES, ids=[f"{path}-{name}-{shown(value)}" for path, name, value in CASES]
)
def test_a_wrong_setting_is_named(folder, path, name, value):
    file = folder / path
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), name: value}))
    try:
        message = refusal(ClassifierGuidedPipeline.from_pretrained, folder)
    finally:
        file.write_text(before)
    inside = value if isinstance(value, dict | list) else [value]
    assert any(str(word) in message for word in (name, *inside, folder, "ClassifierGuidance"))


@pytest.mark.parametrize(
    "content", ["[]", '["unet"]', '"x"', "", "{}", "3", '{"unet": ["hf_guided", "ADMUNet2DModel"]}']
)
def test_an_index_that_names_no_pipeline(folder, content):
    file = folder / "model_index.json"
    before = file.read_text()
    file.write_text(content)
    try:
        assert str(folder) in refusal(ClassifierGuidedPipeline.from_pretrained, folder)
    finally:
        file.write_text(before)


def test_what_is_right_loads(folder):
    assert ClassifierGuidedPipeline.from_pretrained(folder).num_classes == 3


TINY = {"sample_size": 8, "image_channels": 1, "num_class_embeds": 2}
FAMILIES = {
    BigGANDiscriminator: {**TINY, "model_channels": 8, "channel_mult": [1, 2]},
    BigGANGenerator: {**TINY, "model_channels": 8, "channel_mult": [1, 2], "latent_dim": 4},
    ClassConditionalVAE: {**TINY, "model_channels": 8, "channel_mult": [1, 2], "latent_dim": 4, "num_res_blocks": 1},
    ClassConditionalGlow: {**TINY, "num_levels": 2, "num_blocks": 1, "hidden_channels": 8},
}
OTHERS = {
    **WRONG,
    "num_class_embeds": [*WRONG["num_class_embeds"], None],
    "image_channels": WRONG["in_channels"],
    "latent_dim": WRONG["in_channels"],
    "hidden_channels": WRONG["in_channels"],
    "num_levels": [0, "x", None, 99],
    "num_blocks": [0, "x", None, 10**9],
    "decoder_variance": [0, -1, "x", [1]],
    "dequantization_width": [-1, "x", None],
}
SAVED = {VAEPipeline: ClassConditionalVAE, GANPipeline: BigGANGenerator, FlowPipeline: ClassConditionalGlow}


def needs(family):
    if family is ClassConditionalGlow and importlib.util.find_spec("normflows") is None:
        pytest.skip("the flow needs normflows")


OF_FAMILIES = [
    (family, name) for family in FAMILIES for name in OTHERS if name in inspect.signature(family.__init__).parameters
]


@pytest.mark.parametrize(("family", "name"), OF_FAMILIES)
def test_models_of_other_families_name_a_wrong_setting(family, name):
    needs(family)
    for value in OTHERS[name]:
        assert refusal(family, **{**FAMILIES[family], name: value}).startswith(f"{name}=")


@pytest.mark.parametrize("name", ["sample_size", "num_class_embeds", "image_channels"])
@pytest.mark.parametrize("kind", SAVED, ids=lambda kind: kind.__name__)
def test_saved_pipelines_of_other_families_name_a_wrong_setting(kind, name, tmp_path):
    needs(SAVED[kind])
    kind(SAVED[kind](**FAMILIES[SAVED[kind]])).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*/config.json")
    config = json.loads(file.read_text())
    for value in OTHERS[name]:
        file.write_text(json.dumps({**config, name: value}))
        assert f"{name}=" in refusal(kind.from_pretrained, tmp_path)
    file.write_text(json.dumps(config))
    index = json.loads((tmp_path / "model_index.json").read_text())
    for value in NAMES:
        (tmp_path / "model_index.json").write_text(json.dumps({**index, "id2label": value}))
        assert "id2label" in refusal(kind.from_pretrained, tmp_path)


def test_models_that_are_built_from_wrong_settings():
    for name, value in [case for case in UNET if case[1] != "3"]:
        assert name in refusal(ADMUNet2DModel, **{"sample_size": 8, "model_channels": 32, name: value})
    for name, value in SCHEDULER:
        if value != 999:
            assert name in refusal(ADMScheduler, **{name: value})
