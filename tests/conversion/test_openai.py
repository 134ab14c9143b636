"""The published code's outputs, and every published checkpoint's names and shapes."""

import json
import re

import pytest
import torch

from hf_guided import ADMClassifierConfig, ADMForImageClassification, ADMUNet2DModel
from hf_guided.conversion import convert_openai_classifier, convert_openai_unet
from hf_guided.conversion.openai import published_shapes

TOLERANCE = 2e-5
UNETS = ["unet_class_cond", "unet_legacy_heads", "unet_no_conv_resample", "unet_uncond_legacy", "superres"]
CLASSIFIERS = ["classifier_adaptive", "classifier_attention", "classifier_spatial", "classifier_spatial_v2"]
CHECKPOINTS = [
    "64x64_diffusion",
    "128x128_diffusion",
    "256x256_diffusion",
    "256x256_diffusion_uncond",
    "512x512_diffusion",
    "64_256_upsampler",
    "128_512_upsampler",
    "lsun_bedroom",
    "lsun_cat",
    "lsun_horse",
    "lsun_horse_nodropout",
    "64x64_classifier",
    "128x128_classifier",
    "256x256_classifier",
    "512x512_classifier",
]


def convert(stored, name, weights=None, **changes):
    weights, config = stored.weights if weights is None else weights, {**stored.config, **changes}
    if name.startswith("classifier"):
        return convert_openai_classifier(weights, config)
    return convert_openai_unet(weights, config, super_resolution=name == "superres")


@pytest.mark.parametrize("name", UNETS)
def test_unet_agrees_with_the_published_code(reference, error, name):
    stored = reference(name)
    model = convert(stored, name)
    assert not model.training
    inputs = {"class_labels": stored.tensors.get("y"), "low_res": stored.tensors.get("low_res")}
    with torch.no_grad():
        output = model(stored.tensors["x"], stored.tensors["timesteps"], **inputs).sample
    assert error(output, stored.tensors["output"]) < TOLERANCE


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_agrees_with_the_published_code(reference, error, name, attention):
    stored = reference(name)
    model = convert(stored, name)
    model.set_attn_implementation(attention)
    x = stored.tensors["x"].clone().requires_grad_()
    logits = model(x, stored.tensors["timesteps"]).logits
    chosen = logits.log_softmax(dim=1)[range(len(x)), stored.tensors["y"]]
    (gradient,) = torch.autograd.grad(chosen.sum(), x)
    assert error(logits, stored.tensors["logits"]) < TOLERANCE
    assert error(gradient, stored.tensors["log_prob_grad"]) < TOLERANCE


@pytest.mark.parametrize("name", ["unet_legacy_heads", "classifier_attention"])
def test_half_precision_checkpoints_become_float32(reference, name):
    stored = reference(name)
    model = convert(stored, name, {key: weight.half() for key, weight in stored.weights.items()})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_checkpoint_is_left_alone(reference):
    stored = reference("unet_class_cond")
    before = {name: tensor.clone() for name, tensor in stored.weights.items()}
    model = convert(stored, "unet_class_cond")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert stored.weights.keys() == before.keys()
    assert all(torch.equal(stored.weights[name], before[name]) for name in before)


@pytest.mark.parametrize("name", ["unet_legacy_heads", "unet_no_conv_resample", *CLASSIFIERS])
def test_tensors_are_needed_and_their_shapes_matter(reference, name):
    stored = reference(name)
    one_of_each_kind = {re.sub(r"\d+", "", key): key for key in stored.weights}
    for key in one_of_each_kind.values():
        tensor = stored.weights[key]
        without = {k: v for k, v in stored.weights.items() if k != key}
        with pytest.raises(ValueError, match=f"no tensor {re.escape(key)},"):
            convert(stored, name, without)
        with pytest.raises(ValueError, match="the checkpoint belongs to another config"):
            convert(stored, name, {**stored.weights, key: torch.cat([tensor, tensor[:1]])})


@pytest.mark.parametrize("name", ["unet_class_cond", "classifier_spatial"])
def test_a_tensor_too_many_is_refused(reference, name):
    stored = reference(name)
    with pytest.raises(ValueError, match=r"1 tensors that are not in the config, such as stray\.weight"):
        convert(stored, name, {**stored.weights, "stray.weight": torch.zeros(1)})


@pytest.mark.parametrize("name", ["unet_class_cond", "classifier_attention"])
def test_a_config_of_another_size_is_refused(reference, name):
    stored = reference(name)
    with pytest.raises(ValueError, match="belongs to another config"):
        convert(stored, name, model_channels=64)


@pytest.mark.parametrize("name", ["unet_class_cond", "classifier_attention"])
def test_config_arguments_are_checked(reference, name):
    stored = reference(name)
    with pytest.raises(ValueError, match="use_spacial_transformer"):
        convert(stored, name, use_spacial_transformer=True)
    foreign = {"num_classes": 5} if name.startswith("classifier") else {"pool": "spatial"}
    with pytest.raises(ValueError, match=next(iter(foreign))):
        convert(stored, name, **foreign)
    for argument in ("image_size", "in_channels", "model_channels", "out_channels", "num_res_blocks"):
        missing = {key: value for key, value in stored.config.items() if key != argument}
        with pytest.raises(ValueError, match=f"{argument}.* missing"):
            convert(type(stored)(missing, stored.weights, {}), name)


def settings(model):
    return json.loads((model if isinstance(model, ADMUNet2DModel) else model.config).to_json_string())


@pytest.mark.parametrize("name", ["classifier_adaptive", "unet_uncond_legacy"])
def test_what_the_config_leaves_out_has_the_published_default(reference, name):
    stored = reference(name)
    defaults = {
        "pool": "adaptive", "use_scale_shift_norm": False, "resblock_updown": False, "conv_resample": True,
        "num_classes": None, "use_new_attention_order": False,
    }  # fmt: skip
    given = {key: value for key, value in stored.config.items() if defaults.get(key, "none") != value}
    assert len(given) < len(stored.config)
    model = convert(type(stored)(given, stored.weights, {}), name)
    assert settings(model) == settings(convert(stored, name))


def test_published_default_widths_and_heads():
    config = {
        "image_size": 8, "in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1,
        "attention_resolutions": [1],
    }  # fmt: skip
    with torch.device("meta"):
        model = ADMUNet2DModel(
            sample_size=8,
            out_channels=3,
            model_channels=32,
            channel_mult=(1, 2, 4, 8),
            num_res_blocks=1,
            attention_resolutions=(8,),
            num_heads=1,
            resblock_updown=False,
            use_scale_shift_norm=False,
        )
    weights = {name: torch.zeros(shape) for name, shape in published_shapes(model).items()}
    assert settings(convert_openai_unet(weights, config)) == settings(model)


def test_arguments_that_choose_how_to_compute_change_nothing(reference):
    stored = reference("unet_class_cond")
    model = convert(stored, "unet_class_cond", dims=2, use_checkpoint=True, use_fp16=True, num_heads=7)
    plain = convert(stored, "unet_class_cond")
    assert model.config == plain.config
    assert model.dtype == torch.float32


def test_a_classifier_keeps_what_the_published_config_lacks(reference):
    stored = reference("classifier_attention")
    names = {i: f"name {i}" for i in range(5)}
    model = convert(stored, "classifier_attention", beta_schedule="squaredcos_cap_v2", id2label=names)
    assert model.config.beta_schedule == "squaredcos_cap_v2"
    assert model.config.id2label == names


def constructor_arguments(kind, flags):
    """The published scripts' flags in this library's spelling; what a flag leaves out has the scripts' default."""
    if kind == "classifier":
        size = flags["image_size"]
        return {
            "sample_size": size,
            "channel_mult": channel_mult(size),
            "model_channels": flags["classifier_width"],
            "num_res_blocks": flags["classifier_depth"],
            "attention_resolutions": split(flags["classifier_attention_resolutions"]),
            "attention_head_dim": 64,
            "use_scale_shift_norm": flags["classifier_use_scale_shift_norm"],
            "resblock_updown": flags["classifier_resblock_updown"],
            "pool": flags["classifier_pool"],
            "num_labels": 1000,
        }
    size = flags["large_size"] if kind == "superres" else flags["image_size"]
    head_dim = flags.get("num_head_channels", -1)
    return {
        "sample_size": size,
        "channel_mult": channel_mult(size, kind),
        "model_channels": flags["num_channels"],
        "out_channels": 6 if flags["learn_sigma"] else 3,
        "num_res_blocks": flags["num_res_blocks"],
        "attention_resolutions": split(flags["attention_resolutions"]),
        "num_heads": flags.get("num_heads", 4) if head_dim == -1 else None,
        "attention_head_dim": None if head_dim == -1 else head_dim,
        "dropout": flags.get("dropout", 0.0),
        "resblock_updown": flags["resblock_updown"],
        "use_scale_shift_norm": flags["use_scale_shift_norm"],
        "num_class_embeds": 1000 if flags["class_cond"] else None,
        "low_res_channels": 3 if kind == "superres" else None,
    }


def channel_mult(size, kind="unet"):
    if size == 512 and kind == "superres":
        return (1, 1, 2, 2, 4, 4)
    return {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}[size]


def split(numbers):
    return [int(number) for number in numbers.split(",")]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_published_checkpoints_fit(reference_json, name):
    published = reference_json("published_checkpoints")[name]
    arguments = constructor_arguments(published["kind"], published["flags"])
    with torch.device("meta"):
        if published["kind"] == "classifier":
            model = ADMForImageClassification(ADMClassifierConfig(**arguments))
        else:
            model = ADMUNet2DModel(**arguments)
    assert sum(parameter.numel() for parameter in model.parameters()) == published["parameters"]
    assert model.num_parameters() == published["parameters"]
    shapes = published_shapes(model)
    assert {key: list(shape) for key, shape in shapes.items()} == published["tensors"]
    assert list(shapes) == list(published["tensors"])  # in the order of the published modules


def test_all_published_checkpoints_are_tested(reference_json):
    assert sorted(CHECKPOINTS) == sorted(reference_json("published_checkpoints"))
