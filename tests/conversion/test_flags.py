"""The published scripts' flags: read as they are, checked against the tensors, never replaced by defaults."""

import pytest
from conversion_helpers import needed_flags, script_made, shapes_of

from hf_guided.conversion.architecture import infer_architecture
from hf_guided.conversion.flags import (
    classifier_config,
    improved_defaults,
    is_improved_diffusion,
    parse_flags,
    scheduler_arguments,
    spell_flags,
    unet_config,
)

README = """
MODEL_FLAGS="--image_size 64 --num_channels 192 --num_res_blocks 3 --learn_sigma True --class_cond True"
DIFFUSION_FLAGS="--diffusion_steps 4000 --noise_schedule cosine --rescale_timesteps False --use_kl False"
TRAIN_FLAGS="--lr 3e-4 --batch_size 2048"
"""


@pytest.fixture(scope="module")
def architecture(reference):
    return lambda name: infer_architecture(shapes_of(reference(name).weights))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("--image_size 64 --lr 1e-4 --image_size=32", {"image_size": 32}),
        ("--class_cond yes --learn_sigma f", {"class_cond": True, "learn_sigma": False}),
        ("--attention_resolutions 32,16", {"attention_resolutions": (32, 16)}),
        ("--channel_mult 0.5,1,2", {"channel_mult": (0.5, 1, 2)}),
        ("--channel_mult '' --timestep_respacing ''", {}),
        ("--num_heads_upsample -1 \\\n  --dropout 0.3", {"num_heads_upsample": -1, "dropout": 0.3}),
        ("--timestep_respacing 10,10 --timestep_respacing ddim25", {"timestep_respacing": "ddim25"}),
        ("mpiexec -n 8 python scripts/image_train.py --data_dir 'my data' --image_size 64", {"image_size": 64}),
        (
            README,
            {
                "image_size": 64, "num_channels": 192, "num_res_blocks": 3, "learn_sigma": True, "class_cond": True,
                "diffusion_steps": 4000, "noise_schedule": "cosine", "rescale_timesteps": False,
            },
        ),
    ],
)  # fmt: skip
def test_flags_are_read_as_the_scripts_take_them(text, expected):
    assert parse_flags(text) == expected
    assert parse_flags(spell_flags(expected)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--num_chanels 128", "--num_chanels is not a flag"),
        ("--image_size", "--image_size has no value"),
        ("--image_size --num_channels 3", "--image_size has no value"),
        ("--image_size 64x64", "--image_size takes a whole number; '64x64' was given"),
        ("--class_cond maybe", "--class_cond takes True or False; 'maybe' was given"),
        ("--dropout high", "--dropout takes a number; 'high'"),
        ("--attention_resolutions 32;16", "--attention_resolutions takes whole numbers separated by commas"),
        ("--image_size 64 128", "'128' follows no name"),
        ("64x64_diffusion", "'64x64_diffusion' is not a flag"),
        ("$MODEL_FLAGS --image_size 64", r"\$MODEL_FLAGS in the flags was not expanded"),
        ("--image_size '64", "cannot be read"),
    ],
)
def test_flags_that_are_none_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_flags(text)


@pytest.mark.parametrize("name", ["unet_class_cond", "unet_legacy_heads", "superres", "unet_uncond_legacy"])
def test_what_tensors_do_not_tell_must_be_said(architecture, reference, name):
    flags = parse_flags(needed_flags(reference(name).config))
    needed = {"image_size", "large_size", "small_size"} & flags.keys()
    for missing in needed:
        with pytest.raises(ValueError, match=f"--{missing} is missing.* default is --{missing}"):
            unet_config({key: value for key, value in flags.items() if key != missing}, architecture(name))
    headless = {key: value for key, value in flags.items() if not key.startswith("num_head")}
    with pytest.raises(ValueError, match="--num_heads or --num_head_channels is missing"):
        unet_config(headless, architecture(name))
    for missing in ("noise_schedule", "diffusion_steps"):
        with pytest.raises(ValueError, match=f"--{missing} is missing.* default is --{missing}"):
            scheduler_arguments({key: value for key, value in flags.items() if key != missing}, True)


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("unet_class_cond", "--num_channels 64", "--num_channels 64 contradicts .* tensors say 32"),
        ("unet_class_cond", "--num_res_blocks 3", "--num_res_blocks 3 contradicts .* tensors say 1"),
        ("unet_class_cond", "--channel_mult 1,2,3", "--channel_mult 1,2,3 contradicts .* tensors say 1,2"),
        ("unet_class_cond", "--class_cond False", "--class_cond False contradicts .* tensors say True"),
        ("unet_class_cond", "--learn_sigma False", "--learn_sigma False contradicts .* tensors say True"),
        ("unet_class_cond", "--resblock_updown False", "--resblock_updown False contradicts .* tensors say True"),
        ("unet_class_cond", "--use_scale_shift_norm 0", "--use_scale_shift_norm False contradicts .* say True"),
        ("unet_class_cond", "--attention_resolutions 16,8", "--attention_resolutions 16,8 contradicts .* at 8"),
        ("unet_class_cond", "--attention_resolutions 16", "--attention_resolutions 16 contradicts .* at 8"),
        ("unet_class_cond", "--image_size 64", "--image_size 64 means widths of 1,2,3,4.*--channel_mult 1,2"),
        ("unet_class_cond", "--image_size 15", "--image_size 15 cannot be halved 1 times"),
        ("unet_class_cond", "--num_head_channels 24", "--num_head_channels 24 does not divide .* 64 channels"),
        ("unet_class_cond", "--large_size 16", "--large_size 16 is a flag of upsamplers"),
        ("unet_legacy_heads", "--num_heads 5", "--num_heads 5 does not divide"),
        ("unet_uncond_legacy", "--num_heads_upsample 3", "--num_heads_upsample 3 does not divide"),
        ("superres", "--small_size 32", "--small_size 32 is not below --large_size 32"),
        ("superres", "--image_size 64", "--image_size 64 and --large_size 32 contradict"),
        ("superres", "--large_size 256", "--large_size 256 means widths of 1,1,2,2,4,4"),
        ("classifier_attention", "--image_size 32", "--image_size 32 contradicts .* tensors say 16"),
        ("classifier_attention", "--classifier_width 64", "--classifier_width 64 contradicts .* tensors say 32"),
        ("classifier_attention", "--classifier_depth 2", "--classifier_depth 2 contradicts .* tensors say 1"),
        ("classifier_attention", "--classifier_pool spatial", "--classifier_pool spatial .* tensors say attention"),
        ("classifier_attention", "--classifier_resblock_updown f", "--classifier_resblock_updown False contradicts"),
        ("classifier_adaptive", "--classifier_use_scale_shift_norm t", "--classifier_use_scale_shift_norm True contr"),
        ("classifier_adaptive", "--classifier_attention_resolutions 8", "--classifier_attention_resolutions 8 contr"),
        ("classifier_adaptive", "--image_size 64", "--image_size 64 means widths of 1,2,3,4"),
        ("classifier_adaptive", "--classifier_num_heads 3", "--classifier_num_heads 3 does not divide"),
    ],
)  # fmt: skip
def test_a_flag_that_contradicts_the_tensors_is_named(architecture, reference, name, flags, message):
    needed = needed_flags(reference(name).config)
    describe = classifier_config if name.startswith("classifier") else unet_config
    describe(parse_flags(needed), architecture(name))
    with pytest.raises(ValueError, match=message):
        describe(parse_flags(f"{needed} {flags}"), architecture(name))


def test_attention_where_no_level_reaches_is_ignored(architecture, reference):
    flags = needed_flags(reference("unet_class_cond").config)
    for sides in ("8", "32,8", "8,4,2"):
        unet_config(parse_flags(f"{flags} --attention_resolutions {sides}"), architecture("unet_class_cond"))


def test_published_classifiers_have_heads_of_64_channels(architecture, reference_json):
    flags = parse_flags("--image_size 128 --diffusion_steps 1000 --noise_schedule linear")
    published = infer_architecture(reference_json("published_checkpoints")["128x128_classifier"]["tensors"])
    assert classifier_config(flags, published)["num_head_channels"] == 64
    assert "num_heads" not in classifier_config({**flags, "num_heads": 4}, published)  # the UNet's
    with pytest.raises(ValueError, match="--classifier_num_heads or --classifier_num_head_channels is missing"):
        classifier_config({**flags, "image_size": 16}, architecture("classifier_adaptive"))


def test_heads_of_64_channels_are_assumed_only_of_what_the_published_scripts_make(architecture, reference_json):
    schedule = "--diffusion_steps 1000 --noise_schedule linear"
    missing = "--classifier_num_heads or --classifier_num_head_channels is missing"
    small = architecture("classifier_attention")
    assert all(width % 64 == 0 for width in small.attended_widths)
    with pytest.raises(ValueError, match=missing):
        classifier_config(parse_flags(schedule), small)
    # whoever changed the scripts' sizes did not leave their heads: the UNet's flag is then the classifier's too
    assert classifier_config(parse_flags(f"{schedule} --num_head_channels 16"), small)["num_head_channels"] == 16
    shapes = reference_json("published_checkpoints")["128x128_classifier"]["tensors"]
    beside_unet = parse_flags(f"{schedule} --image_size 128 --num_heads 4")
    assert classifier_config(beside_unet, infer_architecture(shapes))["num_head_channels"] == 64
    grey = {**shapes, "input_blocks.0.0.weight": (128, 1, 3, 3)}
    with pytest.raises(ValueError, match=missing):
        classifier_config(parse_flags(f"{schedule} --image_size 128"), infer_architecture(grey))


def test_flags_of_a_classifier_alone_are_its_own(architecture):
    schedule = "--image_size 16 --diffusion_steps 1000 --noise_schedule linear"
    seen = architecture("classifier_adaptive")
    for spelling in ("--num_heads 2", "--classifier_num_heads 2", "--num_channels 32 --num_heads 2"):
        own = f"{spelling} --classifier_width 32" if "channels" not in spelling else spelling
        assert classifier_config(parse_flags(f"{schedule} {own}"), seen, alone=True)["num_heads"] == 2
    with pytest.raises(ValueError, match="--num_channels 64 contradicts"):
        classifier_config(parse_flags(f"{schedule} --num_channels 64 --num_heads 2"), seen, alone=True)
    both = "--num_channels 256 --num_heads 4 --class_cond True --classifier_width 32 --classifier_num_heads 2"
    assert classifier_config(parse_flags(f"{schedule} {both}"), seen, alone=True)["num_heads"] == 2


@pytest.mark.parametrize(
    ("flags", "improved"),
    [
        ("--image_size 64 --num_channels 128 --num_res_blocks 3 --learn_sigma True --use_fp16 True", True),
        ("--image_size 32 --num_heads 1 --sigma_small True", True),
        ("--image_size 128", False),
        ("--image_size 64 --num_head_channels 64", False),
        ("--image_size 64 --channel_mult 1,2", False),
        ("--image_size 64 --resblock_updown False", False),
        ("--image_size 64 --use_new_attention_order False", False),
        ("--image_size 64 --classifier_scale 1.0", False),
    ],
)
def test_whose_model_it_is(architecture, flags, improved):
    seen = infer_architecture(script_made(32 if "_size 32" in flags else 64))
    assert is_improved_diffusion(parse_flags(flags), seen) == improved
    assert not is_improved_diffusion(parse_flags(flags), architecture("unet_class_cond"))  # its blocks resample


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("--image_size 16", "unet_uncond_legacy"),
        ("--image_size 32", "unet_uncond_legacy"),
        ("--image_size 16", "unet_no_conv_resample"),
        ("", "unet_uncond_legacy"),
        ("", "superres"),
        ("--large_size 64 --small_size 16", "superres"),
    ],
)
def test_what_improved_diffusions_scripts_do_not_make_is_not_its(architecture, flags, name):
    assert not is_improved_diffusion(parse_flags(flags), architecture(name))


def test_improved_diffusions_upsamplers_are_recognised():
    for size, flags in ((256, ""), (256, "--large_size 256"), (64, "--large_size 64 --small_size 16")):
        assert is_improved_diffusion(parse_flags(flags), infer_architecture(script_made(size, upsampler=True)))
    assert not is_improved_diffusion(parse_flags(""), infer_architecture(script_made(64, upsampler=True)))


def test_improved_diffusions_defaults_fill_only_what_is_left_out(architecture):
    seen = architecture("unet_uncond_legacy")
    assert improved_defaults(parse_flags("--diffusion_steps 4000"), seen) == {
        "num_heads": 4,
        "rescale_timesteps": True,
    }
    assert improved_defaults(parse_flags("--diffusion_steps 1000"), seen) == {"num_heads": 4}
    stated = parse_flags("--diffusion_steps 4000 --num_heads 1 --rescale_timesteps False")
    assert improved_defaults(stated, seen) == {}
    sizes = {"large_size": 256, "small_size": 64}
    assert improved_defaults(parse_flags("--num_heads 1"), architecture("superres")) == sizes


def test_the_diffusion_that_flags_describe():
    base = parse_flags("--diffusion_steps 100 --noise_schedule cosine")
    assert scheduler_arguments(base, learns_sigma=True) == {
        "num_train_timesteps": 100,
        "beta_schedule": "squaredcos_cap_v2",
        "variance_type": "learned_range",
        "prediction_type": "epsilon",
        "algorithm_type": "ddpm",
        "clip_sample": True,
        "rescale_timesteps": False,
    }
    for flags, learns, changed in [
        ("--noise_schedule linear", True, {"beta_schedule": "linear"}),
        ("", False, {"variance_type": "fixed_large"}),
        ("--sigma_small True", False, {"variance_type": "fixed_small"}),
        ("--sigma_small True", True, {}),
        ("--predict_xstart True", True, {"prediction_type": "sample"}),
        ("--use_ddim True", True, {"algorithm_type": "ddim"}),
        ("--clip_denoised False", True, {"clip_sample": False}),
        ("--rescale_timesteps True", True, {"rescale_timesteps": True}),
    ]:
        expected = {**scheduler_arguments(base, True), **changed}
        assert scheduler_arguments({**base, **parse_flags(flags)}, learns) == expected
    too_few = {**base, "noise_schedule": "linear", "diffusion_steps": 10}
    with pytest.raises(ValueError, match=r"--diffusion_steps 10 is too few for .* with --noise_schedule cosine"):
        scheduler_arguments(too_few, True)
    assert scheduler_arguments({**too_few, "noise_schedule": "cosine"}, True)["num_train_timesteps"] == 10
    with pytest.raises(ValueError, match="--noise_schedule quadratic is neither"):
        scheduler_arguments({**base, "noise_schedule": "quadratic"}, True)
