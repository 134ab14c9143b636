"""What is taken for a class, and what is refused, in every way that a class can be named."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_guided import (
    ADMScheduler,
    ClassifierGuidedPipeline,
    ClassifierGuidedUpscalePipeline,
    FlowPipeline,
    GANPipeline,
    VAEPipeline,
)
from hf_guided.baselines import BigGANGenerator, ClassConditionalGlow, ClassConditionalVAE
from hf_guided.cli import main
from hf_guided.data.npz import read_samples
from hf_guided.evaluation import bits_per_dim
from hf_guided.evaluation.classifier_inspection import with_classes_of
from hf_guided.evaluation.evaluate import expected_labels
from hf_guided.evaluation.features.extractors import ModelFeatures
from hf_guided.evaluation.features.image_sets import ArrayImages, open_images
from hf_guided.guidance import ClassifierFreeGuidance
from hf_guided.labels import match_classes, resolve_labels, unique_names

CLASSES = 5
NAMES = {0: "cat", 1: "café", 2: "Cat", 3: "dog, hound", 4: "Ångström"}
NUMBERED = {label: str(label + 1) for label in range(10)}


def nfd(name):
    return unicodedata.normalize("NFD", name)


def small_models():
    shared = {"sample_size": 8, "image_channels": 3, "num_class_embeds": CLASSES}
    width = {"model_channels": 8, "channel_mult": (1, 2), "latent_dim": 6}
    gan = BigGANGenerator(**shared, **width)
    gan.set_standing_statistics(num_batches=1, batch_size=32)
    vae = ClassConditionalVAE(**shared, **width, num_res_blocks=1)
    flow = ClassConditionalGlow(**shared, num_levels=2, num_blocks=1, hidden_channels=8)
    return VAEPipeline(vae.eval(), NAMES), GANPipeline(gan.eval(), NAMES), FlowPipeline(flow.eval(), NAMES)


@pytest.fixture(scope="module")
def pipes(tiny_unet):
    """By kind, a function that makes images of labels."""
    torch.manual_seed(0)
    unet = {"sample_size": 8, "attention_resolutions": (4,), "null_class_label": True}
    settings = {"id2label": NAMES, "sampling_defaults": {"num_inference_steps": 1}}
    guided = ClassifierGuidedPipeline(tiny_unet(**unet), ADMScheduler(solver_order=2), **settings)
    upscaler = tiny_unet(**unet, low_res_channels=3)
    upscale = ClassifierGuidedUpscalePipeline(upscaler, ADMScheduler(solver_order=2), **settings)
    small = torch.zeros(1, 3, 4, 4)

    def classifier_free(labels, **arguments):
        return guided(labels, guidance=ClassifierFreeGuidance(2.0), **arguments)

    def upscaled(labels, **arguments):
        return upscale(small, labels, **arguments)

    for pipe in (guided, upscale):
        pipe.set_progress_bar_config(disable=True)
    vae, gan, flow = small_models()
    return {
        "guided": guided,
        "classifier-free": classifier_free,
        "upscale": upscaled,
        "vae": vae,
        "gan": gan,
        "flow": flow,
    }


KINDS = ("guided", "classifier-free", "upscale", "vae", "gan", "flow")
NO_IDS = [
    1.7,
    2.0,
    float("nan"),
    np.float32(2),
    np.float16([1, 2]),
    torch.tensor([2.9]),
    torch.tensor(2.0),
    torch.tensor([1.0], dtype=torch.bfloat16),
    [0, 1.0],
    1j,
    torch.tensor([1j]),
    True,
    [False],
    np.bool_(True),
    np.array([True]),
    torch.tensor([True, False]),
    [None],
    [[0, 1]],
    torch.tensor([[0, 1]]),
    np.eye(CLASSES, dtype=int),
    [torch.tensor([1])],
    b"\x01",
    [b"cat"],
    np.array([b"cat"]),
    bytearray(b"\x01"),
    {1},
    {1: "cat"},
    object(),
]
IDS = [
    2,
    np.int64(2),
    np.uint8(2),
    np.uint64(2),
    np.array(2),
    np.array([2], dtype=np.int16),
    torch.tensor(2),
    torch.tensor([2], dtype=torch.uint8),
    (2,),
    range(2, 3),
    [np.int32(2)],
    [torch.tensor(2)],
    "Cat",
    np.str_("Cat"),
    np.array(["Cat"]),
    "2",
    (label for label in [2]),
]


@pytest.mark.parametrize("given", NO_IDS)
def test_what_is_no_id_and_no_name_is_refused(given):
    with pytest.raises(ValueError, match=r"^class_labels.* id"):
        resolve_labels(given, NAMES, CLASSES)


@pytest.mark.parametrize("given", IDS)
def test_integers_of_every_type_and_names_are_taken(given):
    assert resolve_labels(given, NAMES, CLASSES) == [2]


@pytest.mark.parametrize(
    "given",
    [-1, 5, [0, 5], np.int8(-1), torch.tensor([-1]), 2**70, np.array([2**63], dtype=np.uint64), "5", [], range(0), ()],
)
def test_ids_out_of_range_and_none_at_all_are_refused(given):
    with pytest.raises(ValueError, match="are not among the ids of the 5 classes, 0 to 4"):
        resolve_labels(given, NAMES, CLASSES)
    with pytest.raises(ValueError, match="are not among the ids"):
        resolve_labels(torch.tensor([]), NAMES, CLASSES)


@pytest.mark.parametrize("kind", KINDS)
def test_every_pipeline_resolves_alike(kind, pipes):
    def draw(labels, **arguments):
        generator = torch.Generator().manual_seed(0)
        return pipes[kind](labels, generator=generator, output_type="latent", **arguments).images

    expected = draw(1)
    for same in (np.int64(1), torch.tensor(1), "café", nfd("CAFÉ"), "1", ["café"]):
        assert torch.equal(draw(same), expected)
    for wrong in (1.7, torch.tensor([2.9]), True, [None]):
        with pytest.raises(ValueError, match=r"class_labels: .* is not an id"):
            draw(wrong)
    for wrong in (1.0, True, "2"):
        with pytest.raises(ValueError, match=r"num_images_per_label: .* is not a whole number"):
            draw(1, num_images_per_label=wrong)
    assert len(draw(1, num_images_per_label=np.int64(2))) == 2


@pytest.mark.parametrize(
    ("names", "given", "expected"),
    [
        (NAMES, "Cat", 2),  # exactly so, before another case
        (NAMES, "cat ", 0),
        (NAMES, "hound", 3),
        (NAMES, nfd("café"), 1),
        (NAMES, nfd("ångström"), 4),
        ({0: "dog", 1: nfd("café, bar")}, "CAFÉ", 1),
        ({0: "maillot", 1: "maillot, tank suit"}, "maillot", 0),
        ({0: "zero", 1: "one", 2: "7"}, "1", 1),  # 7 is no id
        ({0: "zero", 1: "one", 2: "7"}, "7", 2),
        ({label: str(label) for label in range(5)}, "3", 3),
        (NUMBERED, "1", 0),
        (NUMBERED, "10", 9),
        (NUMBERED, 1, 1),
        ({0: "2023", 1: "2024"}, "1", 1),
    ],
)
def test_names(names, given, expected):
    assert resolve_labels(given, names, len(names)) == [expected]


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [
        (NAMES, "CAT", "belongs to several ids: 0 .cat., 2 .Cat."),
        ({0: "café", 1: nfd("café")}, "café", "belongs to several ids: 0 .*, 1 .*. Give the id"),
        (NUMBERED, "0", "no class named '0'.*not taken as an id, because numbers are names here"),
        (NUMBERED, ["0", "1"], "no class named '0'"),
        (NUMBERED, "01", "no class named '01'"),
        ({0: "001", 1: "002"}, "1", "no class named '1'; the nearest are '001'"),
        ({0: "cat", 1: "x, 0"}, "1", "numbers are names here"),
        (NAMES, "1.0", "no class named '1.0'"),
        (NAMES, "-1", "no class named '-1'"),
        (NAMES, "²", "no class named '²'"),
        (NAMES, "", "no class named ''"),
        (NAMES, "cafe", "the nearest are 'café'"),
    ],
)
def test_names_that_might_mean_another_class_are_refused(names, given, message):
    with pytest.raises(ValueError, match=message):
        resolve_labels(given, names, len(names))


def test_names_are_made_unique():
    assert unique_names(["crane", "cat", "crane"]) == ["crane (0)", "cat", "crane (2)"]
    assert len(set(unique_names(["a", "a", "a (0)"]))) == 3
    assert [*map(len, unique_names(["café", nfd("café")]))] == [8, 9]
    assert unique_names([nfd("café"), "cat"]) == [nfd("café"), "cat"]


def test_models_are_matched_in_either_form(tiny_classifier):
    forms = {0: "dog", 1: "café", 2: "Ångström"}, {0: nfd("ångström"), 1: "dog", 2: nfd("café")}
    assert match_classes(*forms, {0, 1, 2}, "the judge") == {0: 1, 1: 2, 2: 0}
    same = {label: nfd(name) for label, name in forms[0].items()}
    assert match_classes(forms[0], same, {0, 1, 2}, "the judge") == {0: 0, 1: 1, 2: 2}
    judge = tiny_classifier(id2label=forms[1], label2id={})
    samples = ArrayImages(np.zeros((3, 16, 16, 3), np.uint8), np.arange(3), forms[0])
    assert expected_labels(samples, ModelFeatures(judge, "judge"), []).tolist() == [1, 2, 0]


def test_an_inspected_classifier_knows_the_folders_of_macos(tiny_classifier, tmp_path):
    for name in ("café", "dog"):
        (tmp_path / nfd(name)).mkdir()
        for i in range(4):
            Image.new("RGB", (16, 16), (9 * i, 0, 0)).save(tmp_path / nfd(name) / f"{i}.png")
    images = open_images(str(tmp_path)).images
    classifier = tiny_classifier(num_labels=2, id2label={0: "dog", 1: "café"}, label2id={})
    assert with_classes_of(classifier, images).labels.tolist() == [1] * 4 + [0] * 4


@pytest.mark.parametrize("kind", ["vae", "flow"])
def test_the_likelihood_is_of_the_classes_given(kind, pipes):
    images = torch.zeros(2, 3, 8, 8)
    pipe = pipes[kind]
    bits = [pipe.bits_per_dim(images, labels, torch.Generator().manual_seed(0)) for labels in ([1, 1], "café", "1")]
    assert torch.equal(bits[0], bits[1])
    assert torch.equal(bits[0], bits[2])
    for wrong, message in (
        (1.0, "is not an id"),
        ([True] * 2, "is not an id"),
        ([9, 9], "not among"),
        ([1] * 3, "for 2 images"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.bits_per_dim(images, wrong)


def test_the_diffusion_bound_is_of_the_classes_given(pipes):
    unet, images = pipes["guided"].unet, torch.zeros(2, 3, 8, 8)

    def bits(labels):
        noise = torch.zeros(2, *images.shape)
        return bits_per_dim(unet, ADMScheduler(), images, labels, "2", noise).total_bpd

    assert torch.equal(bits(np.array([1, 5])), bits(torch.tensor([1, 5])))  # 5 is the null label
    for wrong, message in (
        (torch.tensor([1.0, 2.0]), "is not an id"),
        (torch.tensor([True, False]), "is not an id"),
        ([1, 6], "not among the ids of the 6"),
        ([1], "1 class_labels were given for 2 images"),
    ):
        with pytest.raises(ValueError, match=message):
            bits(wrong)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("timesteps", [1.5]),
        ("timesteps", [2.0, 1.0]),
        ("timesteps", [True, False]),
        ("timesteps", torch.tensor([9.0, 3.0])),
        ("timesteps", np.array([9.5])),
        ("timesteps", torch.tensor([True])),
        ("timesteps", [[9, 3]]),
        ("timesteps", "93"),
        ("timesteps", b"\x09\x03"),
        ("timesteps", 9),
        ("timesteps", [None]),
        ("num_inference_steps", 2.0),
        ("num_inference_steps", True),
        ("num_inference_steps", "2"),
        ("num_inference_steps", torch.tensor(2.0)),
        ("gradient_batch_size", 1.5),
        ("gradient_batch_size", True),
        ("respacing", 2),
        ("respacing", True),
    ],
)
@pytest.mark.parametrize("scheduler", ["ADMScheduler", "DDPMScheduler"])
def test_timesteps_and_numbers_are_whole(name, given, scheduler, pipes):
    import diffusers

    unet = pipes["guided"].unet
    kind = ADMScheduler if scheduler == "ADMScheduler" else diffusers.DDPMScheduler
    pipe = ClassifierGuidedPipeline(unet, kind(), id2label=NAMES)
    pipe.set_progress_bar_config(disable=True)
    steps = {"timesteps": [9, 3]} if name == "gradient_batch_size" else {}
    with pytest.raises(ValueError, match=rf"^{name}.* is not a "):
        pipe(0, **{name: given}, **steps)
    if kind is ADMScheduler and name != "gradient_batch_size":
        with pytest.raises(ValueError, match=rf"^{name}.* is not a "):
            kind().set_timesteps(**{name: given})


@pytest.mark.parametrize("given", [np.array([9, 3]), torch.tensor([9, 3]), (9, 3), range(9, 0, -6)])
def test_timesteps_of_every_integer_type_are_taken(given):
    scheduler = ADMScheduler()
    scheduler.set_timesteps(timesteps=given)
    assert scheduler.timesteps.tolist() == [9, 3]
    scheduler.set_timesteps(np.int64(2))
    assert len(scheduler.timesteps) == 2


@pytest.mark.parametrize(
    "labels",
    [
        np.array([0.0, 1.0]),
        np.array([True, False]),
        np.array([0, -1]),
        np.array([0, 2**63], np.uint64),
        np.array(["a", "b"]),
    ],
)
def test_labels_of_a_file_are_ids(labels, tmp_path):
    np.savez(tmp_path / "samples.npz", np.zeros((2, 4, 4, 3), np.uint8), labels)
    with pytest.raises(ValueError, match=r"arr_1 of .*samples.npz"):
        read_samples(tmp_path / "samples.npz")
    np.savez(tmp_path / "samples.npz", np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 1], np.uint64))
    assert read_samples(tmp_path / "samples.npz")[1].tolist() == [0, 1]


@pytest.fixture(scope="module")
def numbered(tiny_unet, tmp_path_factory):
    """A saved pipeline whose classes are called 1 to 10, and one with a class called "all"."""
    folder: Path = tmp_path_factory.mktemp("numbered")
    unet = tiny_unet(sample_size=8, attention_resolutions=(4,), num_class_embeds=10)
    settings = {"sampling_defaults": {"num_inference_steps": 1}}
    scheduler = ADMScheduler(solver_order=2)
    ClassifierGuidedPipeline(unet, scheduler, id2label=NUMBERED, **settings).save_pretrained(folder / "numbered")
    words = {**dict(enumerate("abcdefgh")), 8: "all", 9: "café"}
    ClassifierGuidedPipeline(unet, scheduler, id2label=words, **settings).save_pretrained(folder / "words")
    return folder


def test_numbers_on_the_command_line(numbered, tmp_path, capsys):
    sample = ["sample", str(numbered / "numbered"), "--num_images_per_label", "1", "--output"]
    main([*sample, str(tmp_path / "named.npz"), "--labels", "1", "10"])
    assert np.load(tmp_path / "named.npz")["arr_1"].tolist() == [0, 9]
    assert "Note: numbers are taken for class names: 1 has id 0, 10 has id 9" in capsys.readouterr().out
    for labels in (["0", "1"], ["0"], ["11"], ["1.0"], ["-1"]):
        with pytest.raises(SystemExit, match="error: There is no class named"):
            main([*sample, str(tmp_path / "refused.npz"), "--labels", *labels])
    assert not (tmp_path / "refused.npz").exists()


def test_words_on_the_command_line(numbered, tmp_path, capsys):
    sample = ["sample", str(numbered / "words"), "--num_images_per_label", "1", "--output"]
    main([*sample, str(tmp_path / "samples.npz"), "--labels", nfd("Café"), "0", "b"])
    assert np.load(tmp_path / "samples.npz")["arr_1"].tolist() == [9, 0, 1]
    assert "Note" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--labels all might mean the class of that name too; give the ids"):
        main([*sample, str(tmp_path / "all.npz"), "--labels", "all"])
    main([*sample, str(tmp_path / "all.npz"), "--labels", "8"])
    assert np.load(tmp_path / "all.npz")["arr_1"].tolist() == [8]
