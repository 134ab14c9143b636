"""Architectures read off the tensors' names and shapes alone."""

import re

import pytest
from conversion_helpers import shapes_of
from test_openai import CHECKPOINTS, CLASSIFIERS, UNETS, constructor_arguments

from hf_guided.conversion.architecture import infer_architecture
from hf_guided.conversion.flags import classifier_config, parse_flags, unet_config
from hf_guided.conversion.openai import make_classifier, make_unet, published_shapes
from hf_guided.conversion.published import PUBLISHED, kind_of

SILENT = {"image_size", "num_heads", "num_head_channels", "num_heads_upsample", "use_new_attention_order", "dropout"}


@pytest.mark.parametrize("name", [*UNETS, *CLASSIFIERS, "sampler_unet", "sampler_classifier"])
def test_reference_models_are_inferred_exactly(reference, name):
    stored = reference(name)
    architecture = infer_architecture(shapes_of(stored.weights))
    expected = {"conv_resample": True, **stored.config, "channel_mult": tuple(stored.config["channel_mult"])}
    if expected.get("pool") != "attention":
        expected.pop("image_size")
    for argument in SILENT - {"image_size"}:
        expected.pop(argument, None)
    assert architecture.config == expected
    assert architecture.kind == {"superres": "upsampler"}.get(name, "classifier" if "pool" in expected else "unet")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_published_checkpoints_are_inferred_exactly(reference_json, name):
    """Names and shapes at full size give the flags back; name and flags give the names and shapes."""
    published = reference_json("published_checkpoints")[name]
    flags = parse_flags(PUBLISHED[name].flags)
    architecture = infer_architecture(published["tensors"])
    assert architecture.kind == kind_of(name) == {"superres": "upsampler"}.get(published["kind"], published["kind"])
    if architecture.kind == "classifier":
        model = make_classifier(classifier_config(flags, architecture))
        settings = model.config.to_dict()
        assert settings["beta_schedule"] == {"cosine": "squaredcos_cap_v2"}.get(published["noise_schedule"], "linear")
    else:
        model = make_unet(unet_config(flags, architecture), architecture.kind == "upsampler")
        settings = dict(model.config)
    shapes = published_shapes(model)
    assert {key: list(shape) for key, shape in shapes.items()} == published["tensors"]
    expected = constructor_arguments(published["kind"], published["flags"])
    factors = expected.pop("attention_resolutions")
    assert sorted(settings["attention_resolutions"]) == sorted(factors)
    assert tuple(settings["channel_mult"]) == expected.pop("channel_mult")
    expected.pop("num_labels", None)
    assert {key: settings[key] for key in expected} == expected


def test_the_table_says_what_was_published(reference_json):
    """The flags of the name are those of the published README."""
    checkpoints = reference_json("published_checkpoints")
    assert PUBLISHED.keys() == checkpoints.keys()
    for name, published in checkpoints.items():
        flags = parse_flags(PUBLISHED[name].flags)
        assert flags["noise_schedule"] == published["noise_schedule"]
        assert flags["diffusion_steps"] == published["diffusion_steps"]
        assert flags.get("learn_sigma", False) == published["learned_sigma"]
        unset = {"num_heads": 4, "num_head_channels": -1, "num_heads_upsample": -1, "dropout": 0.0}
        expected = parse_flags(" ".join(f"--{key} {value}" for key, value in published["flags"].items()))
        for key, value in expected.items():
            if key == "num_heads" and "num_head_channels" in flags:
                continue
            assert flags.get(key, unset.get(key, False)) == value, (name, key)


def test_a_classifier_that_fits_several_depths_needs_its_flag(reference):
    """All blocks alike: three levels of one block are one level of five."""
    shapes = shapes_of(reference("classifier_spatial").weights)
    block = {key: shape for key, shape in shapes.items() if key.startswith("input_blocks.1.0.")}
    shapes = {key: shape for key, shape in shapes.items() if not re.match(r"input_blocks\.[1-9]", key)}
    for i in range(1, 6):
        shapes |= {key.replace("blocks.1.", f"blocks.{i}."): shape for key, shape in block.items()}
    with pytest.raises(ValueError, match=r"1 or 2 or 5 residual blocks per level.*--classifier_depth"):
        infer_architecture(shapes)
    for depth, levels in ((1, 3), (2, 2), (5, 1)):
        architecture = infer_architecture(shapes, classifier_depth=depth)
        assert architecture.config["num_res_blocks"] == depth
        assert len(architecture.config["channel_mult"]) == levels
        assert architecture.config["resblock_updown"] == (levels > 1)
    assert infer_architecture(shapes, image_size=7).config["num_res_blocks"] == 5  # seven pixels cannot be halved


def test_attention_pools_tell_the_levels(reference):
    """Without widths that change, the positions of the pool and the image size decide."""
    shapes = shapes_of(reference("classifier_spatial").weights)
    shapes = {key: shape for key, shape in shapes.items() if not key.startswith(("out.", "input_blocks.3.1"))}
    shapes |= {"out.2.positional_embedding": (32, 17), "out.2.c_proj.weight": (4, 32, 1)}
    with pytest.raises(ValueError, match="classifier_depth"):
        infer_architecture(shapes)
    assert infer_architecture(shapes, image_size=8).config["num_res_blocks"] == 1
    assert infer_architecture(shapes, image_size=4).config["num_res_blocks"] == 3
    with pytest.raises(ValueError, match="not match a published classifier of an image_size of 64"):
        infer_architecture(shapes, image_size=64)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("time_embed.0.weight", r"no tensor time_embed\.0\.weight"),
        ("input_blocks.0.0.weight", r"no tensor input_blocks\.0\.0\.weight"),
        ("out.2.weight", r"no tensor out\.2\.weight"),
        ("input_blocks.1.0.out_layers.3.weight", "not the weights of a model of the published code"),
    ],
)
def test_other_weights_are_refused(reference, missing, message):
    shapes = shapes_of(reference("unet_class_cond").weights)
    with pytest.raises(ValueError, match=message):
        infer_architecture({key: shape for key, shape in shapes.items() if key != missing})


def test_odd_numberings_and_channels_are_refused(reference):
    shapes = shapes_of(reference("unet_class_cond").weights)
    with pytest.raises(ValueError, match="gaps"):
        infer_architecture({**shapes, "input_blocks.999999999.0.in_layers.0.weight": (32,)})
    with pytest.raises(ValueError, match="takes 4 channels and returns 6"):
        infer_architecture({**shapes, "input_blocks.0.0.weight": (32, 4, 3, 3)})
    with pytest.raises(ValueError, match="shape"):
        infer_architecture({**shapes, "time_embed.0.weight": (128,)})
    with pytest.raises(ValueError, match="input_blocks are not levels of"):
        infer_architecture(
            {**shapes, "output_blocks.1.1.in_layers.0.weight": (32,), "output_blocks.0.1.x": (1,)}
            | {"output_blocks.2.1.in_layers.0.weight": (32,)}
            | {key.replace("input_blocks.3", "input_blocks.4"): value for key, value in shapes.items()}
        )


def test_a_first_width_of_a_half_is_kept(reference_json):
    tensors = reference_json("published_checkpoints")["512x512_diffusion"]["tensors"]
    assert infer_architecture(tensors).config["channel_mult"] == (0.5, 1, 1, 2, 2, 4, 4)
