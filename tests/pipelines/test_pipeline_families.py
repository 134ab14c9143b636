"""The pipelines of the other families: labels, noise, truncation, temperature, likelihood and files."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from hf_guided import FlowPipeline, GANPipeline, VAEPipeline
from hf_guided.baselines import BigGANGenerator, ClassConditionalGlow, ClassConditionalVAE
from hf_guided.pipelines.pipeline_gan import truncate

NAMES = {0: "cat, tom", 1: "dog", 2: "owl"}
FAMILIES = ["vae", "gan", "flow"]
WITH_TEMPERATURE = ["vae", "flow"]


def make_pipeline(family: str, size=(8, 4), channels: int = 3, **arguments):
    """With every parameter moved, so that latents and class matter."""
    torch.manual_seed(0)
    shared = {"sample_size": size, "image_channels": channels, "num_class_embeds": 3, **arguments}
    width = {"model_channels": 8, "channel_mult": (1, 2)}
    if family == "vae":
        pipe = VAEPipeline(ClassConditionalVAE(**shared, **width, latent_dim=6, num_res_blocks=1), id2label=NAMES)
    elif family == "gan":
        pipe = GANPipeline(BigGANGenerator(**shared, **width, latent_dim=6), id2label=NAMES)
        pipe.generator.set_standing_statistics(num_batches=2, batch_size=32)
        return pipe
    else:
        flow = ClassConditionalGlow(**shared, num_levels=2, num_blocks=2, hidden_channels=8)
        pipe = FlowPipeline(flow, id2label=NAMES)
    model = getattr(pipe, family)
    for parameter in model.parameters():
        parameter.data += 0.2 * parameter[:1].numel() ** -0.5 * torch.randn_like(parameter) if parameter.ndim else 0
    model.eval()
    return pipe


@pytest.fixture(scope="module")
def pipes():
    return {family: make_pipeline(family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def pipe(request, pipes):
    return pipes[request.param]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(pipe, labels, *arguments, **options) -> torch.Tensor:
    return pipe(labels, *arguments, **{"generator": seeded(), "output_type": "latent", **options}).images


def length_of(pipe) -> int:
    """Of its latents."""
    return 96 if isinstance(pipe, FlowPipeline) else 6


def test_labels_by_id_name_synonym_list_and_tensor(pipe):
    expected = sample(pipe, [1, 0])
    assert expected.shape == (2, 3, 8, 4)
    for labels in (["dog", "cat"], ["DOG", "tom"], ["dog", 0], torch.tensor([1, 0])):
        assert torch.equal(sample(pipe, labels), expected)
    assert torch.equal(sample(pipe, [1, 2], 3), sample(pipe, [1, 1, 1, 2, 2, 2]))
    assert torch.equal(sample(pipe, "owl"), sample(pipe, 2))
    assert not torch.allclose(sample(pipe, 2), sample(pipe, 1), atol=1e-3)  # the class matters
    assert not torch.allclose(sample(pipe, 2), sample(pipe, 2, generator=seeded(1)), atol=1e-3)  # and the noise


def test_mistakes_are_told_in_a_sentence(pipe):
    for labels, arguments, message in (
        ("dgo", {}, r"no class named 'dgo'; the nearest are 'dog'"),
        ([0, 3, -1], {}, r"\[3, -1\] are not among the ids of the 3 classes, 0 to 2"),
        ([], {}, r"class_labels \[\] are not among the ids"),
        (None, {}, "is class-conditional: give class_labels, ids or names"),
        (1, {"num_images_per_label": 0}, "num_images_per_label=0 is not allowed"),
        (1, {"output_type": "jpg"}, "output_type='jpg' is not one of 'pil', 'np', 'pt', 'latent'"),
        ([0, 1], {"generator": [seeded()]}, "1 generators were given for 2 images"),
        ([0, 1], {"latents": torch.zeros(2, 1)}, r"latents have shape \(2, 1\); these images need \(2, (6|96)\)"),
        ([0, 1], {"latents": torch.zeros(1, 6)}, r"latents have shape \(1, 6\); these images need \(2, (6|96)\)"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(pipe, labels, **arguments)


def test_images_that_are_not_finite_are_refused(pipe):
    latents = torch.zeros(3, length_of(pipe))
    latents[1] = math.nan
    with pytest.raises(RuntimeError, match="Images 1 of the batch are not finite"):
        sample(pipe, [0, 1, 2], latents=latents)


def test_an_image_does_not_depend_on_the_batch(pipe):
    labels = [0, 1, 2, 1, 0]
    together = sample(pipe, labels)
    assert torch.equal(together, sample(pipe, labels))
    seeds = torch.randint(2**63 - 1, (5,), generator=seeded()).tolist()
    for i in (0, 3, 4):
        generator = seeded()
        torch.randint(2**63 - 1, (i,), generator=generator)
        alone = sample(pipe, labels[i], generator=generator)
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=0)
    torch.testing.assert_close(sample(pipe, labels[:3]), together[:3], atol=1e-5, rtol=0)
    latents = torch.cat([torch.randn(1, length_of(pipe), generator=seeded(seed)) for seed in seeds])
    assert torch.equal(sample(pipe, labels, latents=latents), together)


def test_output_types(pipe):
    latent = sample(pipe, [0, 1])
    tensors = sample(pipe, [0, 1], output_type="pt")
    torch.testing.assert_close(tensors, (latent / 2 + 0.5).clamp(0, 1))
    arrays = sample(pipe, [0, 1], output_type="np")
    assert arrays.shape == (2, 8, 4, 3)
    np.testing.assert_array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
    pictures = sample(pipe, [0, 1], output_type="pil")
    assert [picture.size for picture in pictures] == [(4, 8), (4, 8)]
    assert isinstance(pictures[0], Image.Image)
    np.testing.assert_array_equal(np.asarray(pictures[1]), (arrays[1] * 255).round().astype(np.uint8))
    (tupled,) = pipe([0, 1], generator=seeded(), output_type="latent", return_dict=False)
    assert torch.equal(tupled, latent)


@pytest.mark.parametrize("family", FAMILIES)
def test_gray_images_are_pictures_and_images_of_two_channels_are_not(family):
    gray = make_pipeline(family, size=4, channels=1)
    assert gray(1)[0][0].mode == "L"
    assert gray.sample_size == (4, 4)
    with pytest.raises(ValueError, match="Images of 2 channels cannot be PIL images"):
        make_pipeline(family, size=4, channels=2)(1)


def test_files_give_the_same_bits(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    component = pipe.main_component
    assert index["_class_name"] == type(pipe).__name__
    assert index[component] == ["hf_guided", type(getattr(pipe, component)).__name__]
    assert "_name_or_path" not in index
    assert [path.name for path in (tmp_path / component).glob("*.safetensors")]
    loaded = type(pipe).from_pretrained(tmp_path)
    assert loaded.id2label == NAMES
    state = getattr(pipe, component).state_dict()
    for name, value in getattr(loaded, component).state_dict().items():
        assert torch.equal(value, state[name]), name
    # Weights in a mapped file are aligned otherwise than in memory, for which some processors round otherwise.
    torch.testing.assert_close(sample(loaded, ["dog", 2]), sample(pipe, ["dog", 2]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    for family in FAMILIES:
        pipe = make_pipeline(family)
        expected = sample(pipe, [0, 1, 2], 4)
        half = pipe.to(dtype=dtype)
        images = sample(half, [0, 1, 2], 4)
        assert images.dtype == dtype
        assert (images.float() - expected).abs().mean() < 0.05 * expected.std(), family


@pytest.mark.parametrize("family", WITH_TEMPERATURE)
def test_temperature(family, pipes):
    pipe = pipes[family]
    still = sample(pipe, [0, 1], 4, temperature=0)
    for label in (still[:4], still[4:]):
        assert torch.equal(label, label[:1].expand_as(label))
    assert not torch.allclose(still[0], still[4], atol=1e-3)
    zeros = torch.zeros(8, length_of(pipe))
    assert torch.equal(sample(pipe, [0, 1], 4, latents=zeros), still)
    whole = sample(pipe, 0, 8)
    assert torch.equal(sample(pipe, 0, 8, temperature=1.0), whole)
    latents = torch.randn(8, length_of(pipe), generator=seeded(4))
    assert torch.equal(sample(pipe, 0, 8, latents=latents, temperature=0.5), sample(pipe, 0, 8, latents=latents / 2))
    with pytest.raises(ValueError, match=r"temperature=-0\.5 is not allowed; give a finite number from 0"):
        sample(pipe, 0, temperature=-0.5)


def test_truncation_of_a_pipeline(pipes):
    pipe = pipes["gan"]
    latents = torch.randn(8, 6, generator=seeded(4))
    cut = sample(pipe, 0, 8, latents=latents, truncation=0.5)
    assert torch.equal(cut, sample(pipe, 0, 8, latents=truncate(latents, 0.5)))
    whole = sample(pipe, 0, 8, latents=latents)
    assert cut.std(dim=0).mean() < 0.8 * whole.std(dim=0).mean()
    torch.testing.assert_close(sample(pipe, 0, 8, latents=latents, truncation=50.0), whole, atol=1e-5, rtol=0)
    for threshold in (0, -1.0):
        with pytest.raises(ValueError, match=f"truncation={threshold} leaves no latents; give a positive threshold"):
            sample(pipe, 0, truncation=threshold)


@pytest.mark.parametrize("threshold", [0.02, 0.5, 2.0])
def test_truncated_latents_are_those_of_a_truncated_normal_distribution(threshold):
    latents = torch.randn(20_000, generator=seeded(1))
    truncated = truncate(latents, threshold)
    assert truncated.dtype == latents.dtype
    assert truncated.abs().max() <= threshold
    order = latents.argsort()
    assert (truncated[order].diff() >= 0).all()
    assert (truncated.sign() == latents.sign()).all()
    exact = stats.truncnorm(-threshold, threshold)
    assert stats.kstest(truncated.double().numpy(), exact.cdf).pvalue > 0.01
    ends = truncate(torch.tensor([-30.0, -9.0, 0.0, 9.0, 30.0]), threshold)  # where the normal's integral is 0 or 1
    torch.testing.assert_close(ends, threshold * torch.tensor([-1.0, -1.0, 0.0, 1.0, 1.0]), atol=1e-6, rtol=1e-5)


def test_a_threshold_that_nothing_reaches_changes_nothing():
    latents = torch.randn(20_000, generator=seeded(1))
    torch.testing.assert_close(truncate(latents, 100.0), latents, atol=1e-6, rtol=1e-6)


def eight_bit_images(count: int, size=(8, 4), channels: int = 3) -> torch.Tensor:
    return torch.randint(256, (count, channels, *size), generator=seeded(1)) / 127.5 - 1


@pytest.mark.parametrize("width", [1.0, 15.94])
def test_the_likelihood_of_a_flow_is_of_unit_noise_whatever_it_was_trained_with(width):
    pipe = make_pipeline("flow", dequantization_width=width)
    images, labels = eight_bit_images(4), torch.tensor([0, 1, 2, 0])
    seen = []
    encode = pipe.flow.encode  # the real one, watched
    pipe.flow.encode = lambda values, labels: seen.append(values) or encode(values, labels)
    bits = pipe.bits_per_dim(images, labels, seeded())
    del pipe.flow.encode
    steps = (seen[0] * (255 + width) - width / 2) - (images + 1) * 127.5
    assert -0.5 - 1e-3 <= steps.min() < -0.48
    assert 0.48 < steps.max() <= 0.5 + 1e-3
    assert bits.shape == (4,)
    torch.testing.assert_close(bits, pipe.bits_per_dim(images, labels, seeded()))
    noise = torch.rand(images.shape, generator=seeded()) - 0.5
    with torch.no_grad():
        torch.testing.assert_close(bits, pipe.flow(images, labels, noise))
    assert not torch.allclose(bits, pipe.bits_per_dim(images, torch.tensor([1, 2, 0, 1]), seeded()), atol=1e-3)


def test_the_likelihood_of_a_vae_is_its_bound():
    pipe = make_pipeline("vae")
    images, labels = eight_bit_images(4), torch.tensor([0, 1, 2, 0])
    bits = pipe.bits_per_dim(images, labels, seeded())
    with torch.no_grad():
        distortion, rate = pipe.vae.bound(images, pipe.vae(images, labels, seeded()))
    torch.testing.assert_close(bits, distortion + rate)
    assert not torch.equal(bits, pipe.bits_per_dim(images, labels, seeded(1)))
    assert pipe.likelihood_kind == "bound"
    assert FlowPipeline.likelihood_kind == "exact"
    assert not hasattr(GANPipeline, "bits_per_dim")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_from_files(pipe, dtype, tmp_path):
    pipe.save_pretrained(tmp_path)
    half = type(pipe).from_pretrained(tmp_path, dtype=dtype)
    images = sample(half, [0, 1, 2], 4)
    assert images.dtype == dtype
    assert (images.float() - sample(pipe, [0, 1, 2], 4)).abs().mean() < 0.05
    assert torch.get_default_dtype() == torch.float32


def test_no_likelihood_in_half_precision():
    flow = make_pipeline("flow").to(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="more than half precision; load the pipeline in float32"):
        flow.bits_per_dim(torch.zeros(1, 3, 8, 4), torch.tensor([0]))


LAST_BIAS = {"vae": "decoder.conv_out.bias", "gan": "conv_out.bias", "flow": "levels.0.0.norm.t"}


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_that_is_not_finite_is_never_a_clean_picture(family, value):
    """Neither where it is clipped nor where tanh or a sigmoid ends the model."""
    pipe = make_pipeline(family)
    parameter = getattr(pipe, pipe.main_component).state_dict(keep_vars=True)[LAST_BIAS[family]]
    parameter.data.fill_(value)
    with pytest.raises(RuntimeError, match="Images 0, 1 of the batch are not finite: the weights"):
        pipe([0, 1], output_type="pil")
    if family == "vae":  # whose likelihood is bounded, whatever the image
        with pytest.raises(RuntimeError, match="Images 0, 1 of the batch are not finite"):
            pipe.bits_per_dim(torch.zeros(2, 3, 8, 4), torch.tensor([0, 1]))


def test_latents_are_tensors(pipe):
    with pytest.raises(ValueError, match="latents is a ndarray; give a"):
        sample(pipe, 1, latents=torch.zeros(1, length_of(pipe)).numpy())


def test_models_give_tuples_as_diffusers_own_do():
    labels = torch.tensor([0, 2])
    for family, given in (("vae", torch.zeros(2, 3, 8, 4)), ("gan", torch.zeros(2, 6))):
        pipe = make_pipeline(family)
        model = pipe.components[pipe.main_component]
        options = {"generator": seeded()} if family == "vae" else {}
        outputs = model(given, labels, **options, return_dict=False)
        options = {"generator": seeded()} if family == "vae" else {}
        assert isinstance(outputs, tuple)
        assert torch.equal(outputs[0], model(given, labels, **options).sample)


@pytest.mark.parametrize("is_filled_late", [True, False])
def test_models_load_in_half_precision_however_they_are_filled(pipe, is_filled_late, tmp_path):
    model = pipe.components[pipe.main_component]
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=torch.float16, low_cpu_mem_usage=is_filled_late)
    assert half.dtype == torch.float16
    assert torch.get_default_dtype() == torch.float32
