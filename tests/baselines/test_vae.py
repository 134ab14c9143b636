"""The VAE: its bound against integrals over a fine grid of latents, its variance, and its life as files."""

import math

import pytest
import torch

from hf_guided.baselines import ClassConditionalVAE
from hf_guided.losses import discretized_gaussian_log_likelihood

LABEL = torch.tensor([1])


def make_vae(**arguments) -> ClassConditionalVAE:
    """With every parameter moved, so that latents and class matter."""
    torch.manual_seed(0)
    defaults = {"sample_size": 8, "image_channels": 1, "num_class_embeds": 3, "latent_dim": 6, "model_channels": 8}
    vae = ClassConditionalVAE(**{**defaults, "channel_mult": (1, 2), "num_res_blocks": 1, **arguments})
    for name, parameter in vae.named_parameters():
        if name != "decoder_log_variance":
            parameter.data += 0.3 * parameter[0].numel() ** -0.5 * torch.randn_like(parameter)
    return vae.eval()


def images_of(vae: ClassConditionalVAE, count: int) -> torch.Tensor:
    """8-bit images of random pixels."""
    size = vae.config.sample_size
    shape = (count, vae.config.image_channels, *((size, size) if isinstance(size, int) else size))
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1)) / 127.5 - 1


@pytest.mark.parametrize(
    ("size", "channels", "mult"), [(8, 1, (1, 2)), ((8, 4), 3, (1, 2, 4)), ([6, 2], 3, (0.5, 1)), (5, 1, (1,))]
)
def test_shapes(size, channels, mult):
    vae = make_vae(sample_size=size, image_channels=channels, channel_mult=mult)
    images, labels = images_of(vae, 4), torch.tensor([0, 1, 2, 1])
    with torch.no_grad():
        output = vae(images, labels)
        assert output.sample.shape == images.shape
        assert output.posterior.mean.shape == (4, 6, 1, 1)
        distortion, rate = vae.bound(images, output)
        assert distortion.shape == rate.shape == (4,)
        assert (rate > 0).all()
        latents = torch.ones(1, 6)
        assert not torch.allclose(vae.decode(latents, LABEL).sample, vae.decode(latents, LABEL + 1).sample, atol=1e-3)
        means = [vae.encode(images[:1], label).mean for label in (LABEL, LABEL + 1)]
        assert not torch.allclose(*means, atol=1e-3)


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_the_bound_is_that_of_integrals_over_the_latents(latent_dim):
    """Of one image: distortion and rate by quadrature, and what the bound lacks to -log p(x), which is another KL."""
    vae = make_vae(sample_size=2, latent_dim=latent_dim, model_channels=4, channel_mult=(1,), decoder_variance=0.02)
    image = torch.tensor([0.2, -0.2, 0.6, 1.0]).reshape(1, 1, 2, 2)
    points = torch.linspace(-8, 8, 6401 if latent_dim == 1 else 321, dtype=torch.float64)
    cell = (points[1] - points[0]).item() ** latent_dim
    grid = torch.cartesian_prod(*[points] * latent_dim).reshape(-1, latent_dim)
    with torch.no_grad():
        posterior = vae.encode(image, LABEL)
        mean, std = (part.double().flatten() for part in (posterior.mean, posterior.std))
        decoded = vae.decode(grid.float(), LABEL.expand(len(grid))).sample
        log_scale = torch.full_like(decoded, 0.5 * math.log(0.02))
        log_p_of_x = discretized_gaussian_log_likelihood(image.expand_as(decoded), decoded, log_scale)
        log_p_of_x = log_p_of_x.double().flatten(1).sum(1)
        log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(grid).sum(1)
        log_q = torch.distributions.Normal(mean, std).log_prob(grid).sum(1)
        q = log_q.exp() * cell
        bits = 4 * math.log(2)
        distortion, rate = -(q * log_p_of_x).sum() / bits, (q * (log_q - log_prior)).sum() / bits
        log_evidence = torch.logsumexp(log_prior + log_p_of_x, 0) + math.log(cell)
        gap = (q * (log_q - (log_prior + log_p_of_x - log_evidence))).sum() / bits

        draws = 4000
        images, labels = image.expand(draws, -1, -1, -1), LABEL.expand(draws)
        measured, rates = vae.bound(images, vae(images, labels, torch.Generator().manual_seed(0)))
    assert q.sum().item() == pytest.approx(1, abs=1e-3)  # the grid is fine and wide enough
    error = measured.double().std().item() / math.sqrt(draws)
    assert measured.double().mean().item() == pytest.approx(distortion.item(), abs=4 * error)
    assert error < 0.02 * distortion.item()
    assert rates.double().numpy() == pytest.approx(rate.item(), rel=1e-3)
    total = -log_evidence.item() / bits
    assert distortion.item() + rates[0].item() - total == pytest.approx(gap.item(), abs=1e-3)
    assert measured.mean().item() + rates[0].item() > total + 4 * error


def test_a_learned_variance_has_a_gradient_and_a_fixed_one_none():
    images, labels = images_of(make_vae(), 4), torch.tensor([0, 1, 2, 1])
    for variance in (None, 0.5):
        vae = make_vae(decoder_variance=variance)
        assert vae.decoder_log_variance.item() == pytest.approx(-3 if variance is None else math.log(variance))
        distortion, rate = vae.bound(images, vae(images, labels))
        (distortion + rate).mean().backward()
        assert (vae.decoder_log_variance.grad is None) == (variance is not None)
        assert all(p.grad.abs().max() > 0 for name, p in vae.named_parameters() if name != "decoder_log_variance")
        assert vae.decoder_log_variance.requires_grad == (variance is None)
    assert vae.decoder_log_variance.item() == pytest.approx(math.log(0.5))


@pytest.mark.parametrize("variance", [0.0, -1.0])
def test_a_variance_that_is_none(variance):
    with pytest.raises(ValueError, match=f"decoder_variance={variance} is not allowed .* give a finite number above 0"):
        make_vae(decoder_variance=variance)


@pytest.mark.parametrize("variance", [None, 0.1])
def test_files_give_the_same_bits(variance, tmp_path):
    vae = make_vae(sample_size=(8, 4), image_channels=3, decoder_variance=variance)
    vae.decoder_log_variance.data += 0.25  # as training does with a learned one
    vae.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded = ClassConditionalVAE.from_pretrained(tmp_path)
    state = vae.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert loaded.decoder_log_variance.requires_grad == (variance is None)
    images, labels = images_of(vae, 2), torch.tensor([0, 2])
    with torch.no_grad():
        outputs = [model(images, labels, torch.Generator().manual_seed(0)).sample for model in (vae, loaded)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("size", "mult"), [(6, (1, 1, 1)), ((8, 6), (1, 1, 1)), (7, (1, 2))])
def test_a_size_that_cannot_be_halved(size, mult):
    height, width = (size, size) if isinstance(size, int) else size
    with pytest.raises(ValueError, match=rf"{height}x{width} pixels cannot be halved {len(mult) - 1} times; take few"):
        make_vae(sample_size=size, channel_mult=mult)
