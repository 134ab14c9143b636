"""The flow: inverse, Jacobian determinant, density and dequantisation, with random weights in every layer."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import qmc

from hf_guided.baselines import ClassConditionalGlow
from hf_guided.generation.sampling import to_8_bit


def make_flow(**arguments) -> ClassConditionalGlow:
    """With every parameter moved, those that start at zero included."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    defaults = {"sample_size": 4, "image_channels": 1, "num_class_embeds": 3, "num_levels": 2, "num_blocks": 2}
    flow = ClassConditionalGlow(**{**defaults, "hidden_channels": 8, **arguments})
    for parameter in flow.parameters():
        parameter.data += 0.2 * parameter[0].numel() ** -0.5 * torch.randn(parameter.shape, generator=generator)
    return flow.eval()


def values_of(flow: ClassConditionalGlow, count: int) -> torch.Tensor:
    """Dequantised images of random pixels."""
    size = flow.config.sample_size
    size = (size, size) if isinstance(size, int) else size
    shape = (count, flow.config.image_channels, *size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("size", "channels", "num_levels"), [(8, 1, 3), ((8, 4), 3, 2), ((4, 12), 3, 1), ([6, 2], 1, 1)]
)
def test_shapes_and_the_way_back(size, channels, num_levels):
    flow = make_flow(sample_size=size, image_channels=channels, num_levels=num_levels)
    values, labels = values_of(flow, 5), torch.tensor([0, 1, 2, 1, 0])
    with torch.no_grad():
        latents, log_det = flow.encode(values, labels)
        assert latents.shape == (5, values[0].numel())
        assert log_det.shape == flow(2 * values - 1, labels).shape == (5,)
        # in float32: `decode` is half a step of the 8-bit scale higher, and unit noise half a step less
        back = flow.dequantize(flow.decode(latents, labels).sample, torch.tensor(-0.5))
        torch.testing.assert_close(back, values, atol=1e-5, rtol=0)
        drawn = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
        sample = flow.decode(drawn, labels).sample
        again, _ = flow.encode(flow.dequantize(sample, torch.tensor(-0.5)), labels)
        torch.testing.assert_close(again, drawn, atol=1e-4, rtol=0)  # where the logit is steep an error grows

        double = flow.double()
        latents, _ = double.encode(values.double(), labels)
        back = double.dequantize(double.decode(latents, labels).sample, torch.tensor(-0.5))
        torch.testing.assert_close(back, values.double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("num_levels", [1, 2])
def test_the_determinant_is_that_of_the_jacobian(num_levels):
    flow = make_flow(num_levels=num_levels).double()
    values = values_of(flow, 3).double()
    found = []
    for label, image in enumerate(values):
        class_labels = torch.tensor([label])
        jacobian = torch.autograd.functional.jacobian(
            lambda x, class_labels=class_labels: flow.encode(x[None], class_labels)[0][0], image
        )
        expected = torch.linalg.slogdet(jacobian.reshape(16, 16)).logabsdet
        log_det = flow.encode(image[None], class_labels)[1]
        torch.testing.assert_close(log_det[0], expected, atol=1e-10, rtol=0)
        found.append(flow.encode(values[:1], class_labels)[1].item())
    assert len({round(log_det, 6) for log_det in found}) == 3  # the class matters


@pytest.mark.parametrize("width", [1.0, 15.94])
def test_the_density_is_that_of_the_base_distributions_and_the_determinant(width):
    """normflows' own density of latents before they are standardised, for one step of the 8-bit scale."""
    flow = make_flow(sample_size=(4, 8), image_channels=3, dequantization_width=width).double()
    values, labels = values_of(flow, 4).double(), torch.tensor([0, 1, 2, 2])
    with torch.no_grad():
        latents, log_det = flow.encode(values, labels)
        log_likelihood = log_det.clone()
        for base, part in zip(
            flow.bases, latents.split([math.prod(base.shape) for base in flow.bases], 1), strict=True
        ):
            log_scale = base.log_scale[..., labels].movedim(-1, 0)
            mean = base.loc[..., labels].movedim(-1, 0)
            raw = part.reshape(4, *base.shape) * log_scale.exp() + mean
            log_likelihood += base.log_prob(raw, labels) + log_scale.flatten(1).sum(1)
        noise = torch.zeros_like(values)
        images = ((255 + width) * values - width / 2) / 127.5 - 1
        step = (flow.dequantize(images + 2 / 255, noise) - flow.dequantize(images, noise)).mean()
        expected = -log_likelihood / (values[0].numel() * math.log(2)) - step.log2()
        found = flow(images, labels, noise)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_the_density_integrates_to_one():
    """Over all that the logit can come from, a little more than (0, 1), since it keeps off both ends."""
    flow = make_flow(sample_size=2, num_levels=1).double()
    reach = 0.05 / 0.9
    points = torch.from_numpy(qmc.Sobol(4, seed=0).random(2**14))
    values = (-reach + (1 + 2 * reach) * points).reshape(-1, 1, 2, 2)
    for label in range(3):
        labels = torch.full((len(values),), label)
        with torch.no_grad():
            latents, log_det = flow.encode(values, labels)
        log_density = log_det - 0.5 * (latents**2).sum(1) - 2 * math.log(2 * math.pi)
        assert log_density.exp().mean().item() * (1 + 2 * reach) ** 4 == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("width", [1.0, 15.94])
def test_dequantisation(width):
    flow = make_flow(sample_size=16, dequantization_width=width)
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    images = pixels.float() / 127.5 - 1
    torch.manual_seed(0)
    trained = torch.cat([flow.dequantize(images) for _ in range(200)]) * (255 + width) - width / 2 - pixels
    assert trained.min().item() == pytest.approx(-width / 2, rel=1e-2)  # in steps of the 8-bit scale
    assert trained.max().item() == pytest.approx(width / 2, rel=1e-2)
    assert trained.mean().abs().item() < 0.01 * width
    ends = torch.stack([flow.dequantize(images, torch.full((), sign * width / 2)) for sign in (-1, 1)])
    assert (ends.min().item(), ends.max().item()) == pytest.approx((0, 1), abs=1e-6)

    # back in 8 bits: the same value wherever in its bin the noise put it
    for noise in (-0.49, -0.2, 0.3, 0.49):
        with torch.no_grad():
            values = flow.dequantize(images, torch.full_like(images, noise))
            sample = flow.decode(flow.encode(values, torch.tensor([1]))[0], torch.tensor([1])).sample
        assert torch.equal(to_8_bit(sample), pixels)


def test_first_statistics_are_those_of_the_images():
    """Activation norm gives unit variance to what it sees, and is not asked for it when a model is loaded."""
    torch.manual_seed(0)
    flow = ClassConditionalGlow(sample_size=4, image_channels=1, num_levels=2, num_blocks=2, hidden_channels=8)
    images = (0.2 * torch.randn(64, 1, 4, 4) - 0.5).clamp(-1, 1)
    labels = torch.arange(64) % 10
    with torch.no_grad():
        before = flow.encode(flow.dequantize(images), labels)[0]
        flow.initialize(images, labels)
        state = {name: value.clone() for name, value in flow.state_dict().items()}
        after = flow.encode(flow.dequantize(images), labels)[0]
        flow.encode(flow.dequantize(-images), labels)  # as a later batch
    assert abs(before.mean().item()) > 0.3
    assert after.std().item() == pytest.approx(1, abs=0.1)
    assert after.mean().item() == pytest.approx(0, abs=0.1)
    assert all(torch.equal(value, state[name]) for name, value in flow.state_dict().items())  # once, and no more


def test_files_give_the_same_bits(tmp_path):
    flow = make_flow(sample_size=(8, 4), image_channels=3, dequantization_width=4.0)
    flow.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    torch.manual_seed(5)  # what construction draws must not matter
    loaded = ClassConditionalGlow.from_pretrained(tmp_path)
    assert loaded.config.sample_size == [8, 4]
    state = flow.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    values, labels = values_of(flow, 3), torch.tensor([0, 1, 2])
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode(values, labels), flow.encode(values, labels), atol=1e-5, rtol=1e-5)
        assert not np.allclose(loaded.encode(values, labels)[0], loaded.encode(values, labels.flip(0))[0])


@pytest.mark.parametrize(("size", "num_levels"), [(6, 2), ((8, 6), 2), (9, 1)])
def test_a_size_that_cannot_be_halved(size, num_levels):
    height, width = (size, size) if isinstance(size, int) else size
    with pytest.raises(ValueError, match=rf"{height}x{width} pixels cannot be halved {num_levels} times; take fewer"):
        make_flow(sample_size=size, num_levels=num_levels)
