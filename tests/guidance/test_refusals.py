"""What cannot work is refused before the first step, in one sentence that names the thing and the mend."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from guidance_helpers import GRADIENTS, KINDS, NAMES, batches_seen, darkness, make, sample
from transformers import ConvNextImageProcessorPil, LevitImageProcessorPil, ViTImageProcessorPil

from hf_guided.guidance import (
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    CLIPGuidance,
    DenoisedClassifierGuidance,
    EntropyScaling,
    LossGuidance,
)

LABELS = [2, 0]


@pytest.fixture
def refused(make_pipe, components):
    """Asserts that a call is refused, by a sentence of this meaning, and that no model was called."""

    def check(message, arguments, labels=LABELS, **changed):
        pipe = make_pipe(**changed)
        with batches_seen(pipe) as seen, pytest.raises(ValueError, match=message) as caught:
            pipe(labels, **arguments)
        assert not any(seen.values())
        said = str(caught.value)
        assert said.endswith(".")
        assert "\n" not in said
        assert len(said) < 400

    return check


def guide(kind):
    return {"guidance": kind}


@pytest.mark.parametrize("kind", [ClassifierGuidance(), DenoisedClassifierGuidance()])
def test_no_classifier(kind, refused):
    message = "needs a classifier, and this pipeline has none; load one, or set the scale to 0"
    refused(message, guide(kind), classifier=None, clean_classifier=None)


@pytest.mark.parametrize("name", ["classifier", "denoised", "classifier-free"])
def test_no_labels(name, refused):
    neutral = KINDS[name][1](scale=1.0).neutral_scale
    refused(f"needs class_labels; .* scale to {neutral:g}", guide(make(name)), labels=None)


def test_no_null_label(refused, make_unet):
    no_null_label = {"unet": make_unet(null_class_label=False)}
    refused("this UNet has none: take one with null_class_label=True", guide(ClassifierFreeGuidance()), **no_null_label)
    unconditional = {"unet": make_unet(null_class_label=False, num_class_embeds=None)}
    refused("this UNet has none", guide(ClassifierFreeGuidance()), **unconditional)


def test_classifier_free_guidance_of_an_unconditional_unet(refused):
    arguments = {"guidance": [ClassifierGuidance(), ClassifierFreeGuidance()], "condition_unet": False}
    refused("which condition_unet=False turns off; leave one of them out", arguments)


def test_a_guide_unet_that_does_not_belong(refused, make_unet, components):
    refused("a second, weaker UNet: load the pipeline with guide_unet=", guide(AutoGuidance()), guide_unet=None)
    for name, other in {"in_channels": 1, "num_class_embeds": 4, "low_res_channels": 3}.items():
        arguments = {name: other, **({"out_channels": 2} if name == "in_channels" else {})}
        message = f"guide_unet's {name} is {other} and the UNet's {components['unet'].config.get(name)}"
        refused(message, guide(AutoGuidance()), guide_unet=make_unet(**arguments))
    unconditional = make_unet(num_class_embeds=None, null_class_label=False)
    refused("guide_unet's num_class_embeds is 5 and the UNet's None", guide(AutoGuidance()), unet=unconditional)
    no_null = make_unet(null_class_label=False)
    for arguments, labels in (({}, None), ({"condition_unet": False}, LABELS)):
        arguments = {**guide(AutoGuidance()), **arguments}
        refused("null label", arguments, labels=labels, guide_unet=no_null)


def test_a_classifier_of_other_channels(refused, make_classifier, make_resnet):
    message = "classifier takes images of 1 channels and the UNet of 3"
    refused(message, guide(ClassifierGuidance()), classifier=make_classifier(in_channels=1))
    refused(message, guide(DenoisedClassifierGuidance()), clean_classifier=make_resnet(num_channels=1))
    refused(message, guide(DenoisedClassifierGuidance()), clean_classifier=make_classifier(in_channels=1))


def test_a_clean_classifier_where_a_noisy_one_is_due(refused, make_resnet):
    refused("is for clean images. Guide with guidance=Den", guide(ClassifierGuidance()), classifier=make_resnet())


@pytest.mark.parametrize("kind", [ClassifierGuidance(), DenoisedClassifierGuidance()])
def test_classes_that_do_not_match(kind, refused, make_classifier, make_resnet):
    component, make = (
        ("classifier", make_classifier) if type(kind) is ClassifierGuidance else ("clean_classifier", make_resnet)
    )
    others = {0: "cat", 1: "dog", 2: "daisy", 3: "rat", 4: "crane"}
    refused(
        "has no class named 'tench, Tinca tinca', or several; rename",
        guide(kind),
        id2label=NAMES,
        **{component: make(id2label=others)},
    )
    unnamed = {label: f"LABEL_{label}" for label in range(4)}
    refused(
        "The classifier has 4 classes and the UNet 5, without names to match them by",
        guide(kind),
        id2label=NAMES,
        **{component: make(id2label=unnamed)},
    )


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("interval", [(1000, 2000), (800, 900), (-5, -1)])
def test_an_interval_in_which_no_timestep_lies(interval, name, refused):
    message = "acts at none of the 5 timesteps .*, from 999 to 0; give another interval, more steps"
    refused(message, guide([make(name, interval=interval)]))


def test_an_interval_that_the_rest_of_a_walk_does_not_reach(refused):
    arguments = {**guide(ClassifierGuidance(interval=(700, 999))), "image": torch.zeros(1, 3, 8, 8), "strength": 0.6}
    refused("acts at none of the 3 timesteps .*, from 500 to 0", arguments)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("scale", [-1, -math.inf, math.inf, math.nan, {0: 1.0, 500: -2.0}, {0: math.nan}])
def test_a_scale_that_is_none(scale, name):
    with pytest.raises(ValueError, match=r"The scale of \w+Guidance .* a finite number from 0 up; got .*\.$"):
        make(name, scale=scale)


@pytest.mark.parametrize("name", KINDS)
def test_a_scale_of_no_timesteps(name):
    with pytest.raises(ValueError, match="is an empty mapping; give at least one timestep and its scale"):
        make(name, scale={})


def test_a_function_that_gives_no_scale(refused):
    for value in (-1.0, math.nan, math.inf):
        kind = ClassifierGuidance(lambda t, value=value: value if t == 500 else 1.0)
        refused(f"its function gives {value} at timestep 500", guide(kind))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("interval", [(5, 1), (1,), (1, 2, 3)])
def test_an_interval_that_is_none(interval, name):
    with pytest.raises(ValueError, match=r"interval=.* is empty|interval=.*lowest timestep first"):
        make(name, interval=interval)


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("every", [0, -1])
def test_every_no_step(every, name):
    with pytest.raises(ValueError, match=f"every={every} of .* whole number from 1 up"):
        make(name, every=every)


@pytest.mark.parametrize(
    ("make_kind", "message"),
    [
        (lambda: DenoisedClassifierGuidance(joint_temperature=0), "joint_temperature=0 .* finite number above 0"),
        (lambda: DenoisedClassifierGuidance(joint_temperature=math.inf), "joint_temperature=inf"),
        (lambda: DenoisedClassifierGuidance(marginal_temperature=-0.1), "marginal_temperature=-0.1 .* from 0 up"),
        (lambda: DenoisedClassifierGuidance(marginal_temperature=math.nan), "marginal_temperature=nan"),
        (lambda: DenoisedClassifierGuidance(softplus_beta=0.0), "softplus_beta=0.0"),
        (lambda: DenoisedClassifierGuidance(sine=-1), "sine=-1"),
        (lambda: EntropyScaling(0.5), "max_factor=0.5"),
        (lambda: EntropyScaling(math.inf), "max_factor=inf"),
        (lambda: CLIPGuidance(""), "prompt of CLIPGuidance must be a text"),
        (lambda: CLIPGuidance(3), "prompt of CLIPGuidance must be a text"),
        (lambda: CLIPGuidance("a", num_cutouts=0), "num_cutouts=0"),
        (lambda: CLIPGuidance("a", min_cutout=0), "min_cutout=0"),
        (lambda: CLIPGuidance("a", min_cutout=1.5), "min_cutout=1.5"),
        (lambda: LossGuidance(3.0), "takes a function"),
    ],
)
def test_numbers_that_mean_nothing(make_kind, message):
    with pytest.raises(ValueError, match=message):
        make_kind()


def test_parts_of_clip_that_are_missing(refused, make_unet):
    kind = guide(CLIPGuidance("a pug"))
    refused("has no clip_model; load it with clip_model=", kind, clip_model=None)
    refused("has no clip_processor; load it with clip_processor=", kind, clip_processor=None)
    both = {"clip_model": None, "clip_processor": None}
    refused("no clip_model and no clip_processor; load it with clip_model=, clip_processor=", kind, **both)
    arguments = {**kind, "output_type": "np"}
    refused("makes images of 4 channels", arguments, unet=make_unet(in_channels=4, out_channels=8))


@pytest.mark.parametrize(
    "processor",
    [LevitImageProcessorPil(), ViTImageProcessorPil(size={"longest_edge": 8}), ConvNextImageProcessorPil(resample=1)],
)
def test_a_processor_that_resizes_in_an_unknown_way(processor, refused):
    refused(type(processor).__name__, guide(DenoisedClassifierGuidance()), classifier_processor=processor)


@pytest.mark.parametrize("thing", [3.0, "classifier", {"kind": "ClassifierGuidance"}, darkness, [darkness], [None]])
def test_what_is_no_guidance(thing, refused):
    refused("guidance takes objects of hf_guided.guidance, one or a list; got", guide(thing))


def test_guidance_beside_its_short_form(refused):
    refused("Give guidance_scale or guidance, not both", {"guidance": [], "guidance_scale": 1.0})


@pytest.mark.parametrize("name", KINDS)
def test_a_scheduler_of_another_process(name, refused):
    scheduler = FlowMatchEulerDiscreteScheduler()
    refused("is not a scheduler of this diffusion process", guide(make(name)), scheduler=scheduler)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradient_batch_size": 0}, "gradient_batch_size=0 is too small; give 1 or more"),
        ({"gradient_batch_size": -2}, "gradient_batch_size=-2"),
        ({"nonfinite_gradient": "ignore"}, "nonfinite_gradient='ignore' is not one of 'raise', 'skip'"),
    ],
)
def test_arguments_of_the_gradient(arguments, message, refused):
    refused(message, arguments)


def test_gradients_need_to_be_taken(pipe):
    with torch.inference_mode(), pytest.raises(ValueError, match="cannot be taken under"):
        sample(pipe, [1], guidance_scale=1.0)
    with pytest.raises(ValueError, match="has no gradient: compute it from the images"):
        sample(pipe, [1], guidance=LossGuidance(lambda images: torch.zeros(len(images))))


def test_a_class_conditional_guide_unet_without_a_class(make_pipe, make_unet):
    pipe = make_pipe(guide_unet=make_unet(null_class_label=False))
    assert sample(pipe, [1], guidance=make("auto")).isfinite().all()
    for labels, arguments in ((None, {}), ([1], {"condition_unet": False})):
        with pytest.raises(ValueError, match="guide_unet is class-conditional without a null label"):
            sample(pipe, labels, guidance=make("auto"), **arguments)


@pytest.mark.parametrize(
    ("make_kind", "message"),
    [
        (lambda: ClassifierGuidance("3"), "finite number from 0 up; got '3'"),
        (lambda: ClassifierGuidance(1.0, interval=500), "not a pair"),
        (lambda: ClassifierGuidance({0: lambda t: 1.0}), "finite number from 0 up"),
        (lambda: ClassifierGuidance(1.0, every=2.5), "every=2.5 .* whole number"),
        (lambda: ClassifierGuidance(1.0, entropy_scaling="yes"), "takes an EntropyScaling; got 'yes'"),
    ],
)
def test_arguments_of_another_type(make_kind, message):
    with pytest.raises(ValueError, match=message):
        make_kind()
