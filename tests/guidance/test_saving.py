"""Kinds of guidance, their numbers and their models live in the pipeline's folder and come back from it."""

import json

import pytest
import torch
from guidance_helpers import KINDS, NAMES, REVERSED, darkness, make, sample
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_guided import ClassifierGuidedPipeline
from hf_guided.guidance import (
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    CLIPGuidance,
    DenoisedClassifierGuidance,
    EntropyScaling,
    LossGuidance,
    guidance_from_dict,
)

LABELS = [2, 0, 4]
KINDS_THAT_ARE_SAVED = [
    AutoGuidance(3.0),
    AutoGuidance({0: 1.0, 999: 3.0}),
    ClassifierFreeGuidance(4.5, interval=(200, 800)),
    ClassifierGuidance(7.0),
    ClassifierGuidance(entropy_scaling=EntropyScaling(20.0)),
    ClassifierGuidance({999: 0.0, 500.5: 12.0, 0: 3.0}, interval=(10.5, 900), every=2, reuse=True),
    CLIPGuidance("a pug", {0: 2.0, 999: 5.0}, num_cutouts=2, min_cutout=0.7, through_unet=True),
    DenoisedClassifierGuidance(9.0, marginal_temperature=0.25, softplus_beta=None, sine=0.0, through_unet=True),
    DenoisedClassifierGuidance(entropy_scaling=EntropyScaling(), joint_temperature=2.0, every=3),
]


@pytest.fixture(scope="module")
def folder(make_pipe, tmp_path_factory):
    """A pipeline of every component, with every kind in its defaults."""
    folder = tmp_path_factory.mktemp("pipeline")
    processor = ViTImageProcessorPil(size={"height": 12, "width": 10}, image_mean=[0.4, 0.5, 0.6])
    defaults = {"respacing": "5", "guidance": KINDS_THAT_ARE_SAVED}
    make_pipe(classifier_processor=processor, id2label=NAMES, sampling_defaults=defaults).save_pretrained(folder)
    return folder


@pytest.fixture
def loaded(folder):
    return load(folder)


def load(folder):
    pipe = ClassifierGuidedPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", KINDS_THAT_ARE_SAVED, ids=repr)
def test_a_kind_comes_back_from_its_numbers(kind):
    numbers = kind.to_dict()
    again = guidance_from_dict(json.loads(json.dumps(numbers)))
    assert type(again) is type(kind)
    assert repr(again) == repr(kind)
    assert again.to_dict() == numbers
    assert {**vars(again), "entropy_scaling": None} == {**vars(kind), "entropy_scaling": None}
    assert getattr(again, "entropy_scaling", None) == getattr(kind, "entropy_scaling", None)


def test_only_what_differs_from_the_defaults_is_written():
    assert ClassifierGuidance().to_dict() == {"kind": "ClassifierGuidance"}
    assert CLIPGuidance("a", interval=(0, 5)).to_dict() == {
        "kind": "CLIPGuidance",
        "prompt": "a",
        "interval": [0, 5],
    }
    scale = ClassifierGuidance({0: 1, 999.75: 2.0}, entropy_scaling={"max_factor": 7.0}).to_dict()
    assert scale["scale"] == {"0": 1, "999.75": 2.0}
    assert scale["entropy_scaling"] == {"max_factor": 7.0}


def test_the_folder_names_every_component_and_holds_no_list_that_breaks_diffusers(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert not any(isinstance(value, list) and len(value) != 2 for value in index.values())
    assert index["guide_unet"] == ["hf_guided", "ADMUNet2DModel"]
    assert index["clean_classifier"] == ["transformers", "ResNetForImageClassification"]
    assert index["clip_model"] == ["transformers", "CLIPModel"]
    assert index["clip_processor"] == ["transformers", "CLIPProcessor"]
    assert index["classifier_processor"][0] == "transformers"
    assert index["sampling_defaults"]["guidance"] == [kind.to_dict() for kind in KINDS_THAT_ARE_SAVED]


def test_components_come_back(loaded, pipe):
    assert type(loaded.guide_unet) is type(pipe.guide_unet)
    for name in ("unet", "classifier", "guide_unet", "clean_classifier", "clip_model"):
        ours, theirs = getattr(pipe, name).state_dict(), getattr(loaded, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert not getattr(loaded, name).training
    assert loaded.clean_classifier.config.id2label == REVERSED
    assert (loaded.classifier_processor.size["height"], loaded.classifier_processor.size["width"]) == (12, 10)
    assert list(loaded.classifier_processor.image_mean) == [0.4, 0.5, 0.6]
    assert loaded.clip_processor.tokenizer("a pug").input_ids == pipe.clip_processor.tokenizer("a pug").input_ids
    assert loaded.clip_processor.image_processor.size["shortest_edge"] == 8


def test_every_default_comes_back_with_the_same_images(loaded, folder, tmp_path):
    expected = sample(loaded, LABELS, guidance=KINDS_THAT_ARE_SAVED)
    assert torch.equal(sample(loaded, LABELS), expected)
    loaded.save_pretrained(tmp_path)  # and a second time
    assert torch.equal(sample(load(tmp_path), LABELS), expected)
    index, again = (json.loads((path / "model_index.json").read_text()) for path in (folder, tmp_path))
    assert again == index


def test_each_default_comes_back_with_the_same_images(loaded):
    unguided = sample(loaded, LABELS, guidance=[])
    for kind in KINDS_THAT_ARE_SAVED:
        expected = sample(loaded, LABELS, guidance=kind)
        assert not torch.equal(expected, unguided)
        for saved in (kind, [kind], kind.to_dict(), [kind.to_dict()]):
            loaded.set_sampling_defaults(respacing="5", guidance=saved)
            assert loaded.config.sampling_defaults["guidance"] == [kind.to_dict()]
            assert json.loads(json.dumps(loaded.config.sampling_defaults)) == loaded.config.sampling_defaults
        assert torch.equal(sample(loaded, LABELS), expected)


def test_a_call_overrides_what_is_saved(loaded):
    weak = ClassifierGuidance(1.0)
    loaded.set_sampling_defaults(respacing="5", guidance=ClassifierFreeGuidance(5.0))
    saved = sample(loaded, LABELS)
    assert torch.equal(saved, sample(loaded, LABELS, guidance=ClassifierFreeGuidance(5.0)))
    assert torch.equal(sample(loaded, LABELS, guidance_scale=1.0), sample(loaded, LABELS, guidance=weak))
    assert not torch.equal(sample(loaded, LABELS, guidance=weak), saved)
    assert torch.equal(sample(loaded, LABELS, guidance_scale=0), sample(loaded, LABELS, guidance=[]))
    loaded.set_sampling_defaults(respacing="5", guidance=[])  # which is none, and no other default
    assert torch.equal(sample(loaded, LABELS), sample(loaded, LABELS, guidance_scale=0))


def test_a_saved_interval_that_a_short_walk_never_enters_is_left_out(make_pipe):
    pipe = make_pipe(sampling_defaults={"respacing": "10", "guidance": ClassifierGuidance(1.0, interval=(500, 999))})
    edit = {"image": torch.zeros(3, 8, 8), "strength": 0.3}
    assert torch.equal(sample(pipe, [1], **edit), sample(pipe, [1], guidance_scale=0, **edit))
    with pytest.raises(ValueError, match="or a higher strength"):
        sample(pipe, [1], guidance=ClassifierGuidance(1.0, interval=(500, 999)), **edit)


def test_two_defaults_of_one_thing_are_refused(make_pipe):
    with pytest.raises(ValueError, match="guidance_scale or guidance, not both"):
        make_pipe().set_sampling_defaults(guidance_scale=2.0, guidance=ClassifierGuidance(1.0))


def test_defaults_of_an_existing_pipeline_are_replaced(make_pipe, tmp_path):
    pipe = make_pipe()
    guidance = DenoisedClassifierGuidance(5.0)
    pipe.set_sampling_defaults(num_inference_steps=3, guidance=guidance)
    assert pipe.config.sampling_defaults == {"num_inference_steps": 3, "guidance": [guidance.to_dict()]}
    assert torch.equal(sample(pipe, LABELS), sample(pipe, LABELS, num_inference_steps=3, guidance=guidance))
    pipe.save_pretrained(tmp_path)
    assert load(tmp_path).config.sampling_defaults == pipe.config.sampling_defaults
    pipe.set_sampling_defaults(guidance_scale=2.0)
    assert pipe.config.sampling_defaults == {"guidance_scale": 2.0}
    pipe.set_sampling_defaults()
    assert pipe.config.sampling_defaults is None


def test_none_stays_none(make_pipe, tmp_path):
    names = ("classifier_processor", "guide_unet", "clean_classifier", "clip_model", "clip_processor")
    make_pipe(**dict.fromkeys(names), sampling_defaults=None).save_pretrained(tmp_path)
    pipe = load(tmp_path)
    assert [getattr(pipe, name) for name in names] == [None] * 5
    assert pipe.config.sampling_defaults is None
    assert sample(pipe, [2], respacing="2").shape == (1, 3, 8, 8)


def test_without_labels_a_default_that_needs_them_is_left_out(loaded):
    guidance = [ClassifierGuidance(5.0), ClassifierFreeGuidance(3.0), AutoGuidance(2.0), CLIPGuidance("a pug", 3.0)]
    loaded.set_sampling_defaults(respacing="5", guidance=guidance)
    assert torch.equal(sample(loaded, None, 3), sample(loaded, None, 3, guidance=guidance[2:]))
    loaded.set_sampling_defaults(respacing="5", guidance=guidance[:2])
    assert torch.equal(sample(loaded, None, 3), sample(loaded, None, 3, guidance=[]))


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        (
            {"guidance": LossGuidance(darkness)},
            r"LossGuidance holds a function \(fn\).* pass it as guidance= at each call",
        ),
        ({"guidance": [ClassifierGuidance(lambda t: 1.0)]}, r"ClassifierGuidance holds a function \(scale\)"),
        ({"guidance": AutoGuidance(lambda t: 1.0)}, r"AutoGuidance holds a function \(scale\)"),
        (
            {"guidance": {"kind": "LossGuidance"}},
            "'LossGuidance' is not a kind of guidance that can be saved",
        ),
        ({"guidance": {"kind": "Telepathy", "scale": 1.0}}, "'Telepathy' is not a kind"),
        ({"guidance": [{"scale": 1.0}]}, "None is not a kind"),
        ({"guidance": {"kind": "ClassifierGuidance", "scale": -1.0}}, "finite number from 0 up"),
        ({"guidance": {"kind": "ClassifierGuidance", "strength": 1.0}}, "ClassifierGuidance does not support strength"),
        ({"guidance": 3.0}, "3.0 is not a kind"),
        ({"guidance": [darkness]}, "darkness.* is not a kind"),
        ({"steps": 3, "scale": 1.0}, "sampling_defaults does not support scale, steps"),
    ],
)
def test_defaults_that_cannot_be_saved_are_refused(defaults, message, make_pipe):
    pipe = make_pipe()
    before = pipe.config.sampling_defaults
    with pytest.raises(ValueError, match=message):
        pipe.set_sampling_defaults(**defaults)
    assert pipe.config.sampling_defaults == before
    with pytest.raises(ValueError, match=message):
        make_pipe(sampling_defaults=defaults)


def test_defaults_are_no_ones_but_the_pipelines(make_pipe):
    numbers = {"kind": "ClassifierGuidance", "scale": {0: 1.0, 999: 2.0}, "entropy_scaling": EntropyScaling(9.0)}
    defaults = {"guidance": [numbers]}
    pipe = make_pipe(sampling_defaults=defaults)
    saved = json.dumps(pipe.config.sampling_defaults)  # which takes objects in a dict as well
    numbers["scale"][0] = 7.0
    defaults["guidance"].append({"kind": "AutoGuidance"})
    assert json.dumps(pipe.config.sampling_defaults) == saved


@pytest.mark.parametrize("name", KINDS)
def test_repr_says_what_was_given(name):
    kind = make(name)
    assert repr(kind).startswith(f"{type(kind).__name__}(")
    assert f"scale={kind.scale!r}" in repr(kind) or kind.scale == 1.0
    assert "interval" not in repr(kind)
