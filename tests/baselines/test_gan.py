"""The GAN: whose loss trains whom, what the discriminator sees, and standing statistics."""

import pytest
import torch
from torch import nn

from hf_guided.baselines import AdversarialPair, BigGANDiscriminator, BigGANGenerator
from hf_guided.baselines.gan import AdversarialOutput, hinge_losses

SHARED = {"sample_size": 8, "image_channels": 1, "num_class_embeds": 3, "model_channels": 8, "channel_mult": (1, 2)}


def make_generator(**arguments) -> BigGANGenerator:
    torch.manual_seed(0)
    return BigGANGenerator(**{**SHARED, "latent_dim": 5, **arguments})


def make_pair(translation: int = 0, **arguments) -> AdversarialPair:
    return AdversarialPair(make_generator(**arguments), BigGANDiscriminator(**{**SHARED, **arguments}), translation)


def batch_of(pair: AdversarialPair, count: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    config = pair.generator.config
    size = config.sample_size
    shape = (count, config.image_channels, *((size, size) if isinstance(size, int) else size))
    return {
        "sample": 2 * torch.rand(shape, generator=generator) - 1,
        "class_labels": torch.arange(count) % 3,
        "latents": torch.randn(count, config.latent_dim, generator=generator),
    }


def gradients(module: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize(
    ("size", "channels", "mult"), [(8, 1, (1, 2)), ((8, 4), 3, (1, 2, 4)), ([6, 2], 3, (0.5, 1)), (5, 1, (1,))]
)
def test_shapes(size, channels, mult):
    pair = make_pair(sample_size=size, image_channels=channels, channel_mult=mult)
    batch = batch_of(pair)
    images = pair.generator(batch["latents"], batch["class_labels"]).sample
    assert images.shape == batch["sample"].shape
    assert images.abs().max() < 1
    output = pair(**batch)
    assert output.real.shape == output.fake.shape == output.fake_for_generator.shape == (6,)
    pair.eval()
    classes = [torch.full((6,), label) for label in (0, 2)]
    images = [pair.generator(batch["latents"], labels).sample for labels in classes]
    scores = [pair.discriminator(batch["sample"], labels) for labels in classes]
    assert not torch.allclose(*images, atol=1e-3)
    assert not torch.allclose(*scores, atol=1e-3)


def test_each_loss_trains_its_own_player_and_no_other():
    def backward(choose) -> tuple[dict, dict]:
        pair = make_pair()
        losses = hinge_losses(pair(**batch_of(pair)))
        choose(*losses).mean().backward()
        return gradients(pair.discriminator), gradients(pair.generator)

    of_discriminator, none = backward(lambda discriminator, generator: discriminator)
    assert all(gradient is None for gradient in none.values())
    none, of_generator = backward(lambda discriminator, generator: generator)
    assert all(gradient is None for gradient in none.values())
    for own in (of_discriminator, of_generator):
        assert all(gradient.abs().max() > 0 for name, gradient in own.items() if not name.endswith("score.bias"))
    together = backward(lambda discriminator, generator: discriminator + generator)
    for both, own in zip(together, (of_discriminator, of_generator), strict=True):
        assert all(torch.equal(both[name], own[name]) for name in own)


def test_the_generator_follows_the_discriminator_that_there_is():
    """The gradient of `fake_for_generator` is that of the discriminator itself, for the samples it scores as fake."""
    pair = make_pair().eval()  # so that spectral norm stands still
    batch = batch_of(pair)
    output = pair(**batch)
    torch.testing.assert_close(output.fake_for_generator, output.fake, atol=1e-5, rtol=0)
    output.fake_for_generator.sum().backward()
    found = gradients(pair.generator)
    pair.zero_grad()
    made = pair.generator(batch["latents"], batch["class_labels"]).sample
    pair.discriminator(made, batch["class_labels"]).sum().backward()
    for name, expected in gradients(pair.generator).items():
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-4)


def test_hinge_losses_by_hand():
    scores = AdversarialOutput(
        real=torch.tensor([2.0, 1.0, 0.25, -1.0]),
        fake=torch.tensor([-2.0, -1.0, 0.0, 3.0]),
        fake_for_generator=torch.tensor([0.5, -4.0, 0.0, 1.0]),
    )
    discriminator, generator = hinge_losses(scores)
    assert discriminator.tolist() == [0.0, 0.0, 1.75, 6.0]
    assert generator.tolist() == [-0.5, 4.0, 0.0, -1.0]


def is_shift_of(moved: torch.Tensor, image: torch.Tensor, reach: int) -> tuple[int, int] | None:
    """How far down and right an image was moved, with -1 where nothing was."""
    height, width = image.shape[1:]
    padded = nn.functional.pad(image, (reach,) * 4, value=-1.0)
    for down in range(2 * reach + 1):
        for right in range(2 * reach + 1):
            if torch.equal(moved, padded[:, down : down + height, right : right + width]):
                return reach - down, reach - right
    return None


def test_the_discriminator_sees_real_and_fake_moved_by_whole_pixels():
    pair = make_pair(translation=2, sample_size=(8, 4), image_channels=3)
    batch = batch_of(pair, 60)
    seen = []
    pair.discriminator.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    made = []
    pair.generator.register_forward_hook(lambda module, arguments, output: made.append(output.sample))
    pair(**batch)
    (both, labels), (for_generator, labels_for_generator) = seen
    assert torch.equal(labels, batch["class_labels"].repeat(2))
    assert torch.equal(labels_for_generator, batch["class_labels"])
    for images, moved in ((batch["sample"], both[:60]), (made[0], both[60:]), (made[0], for_generator)):
        shifts = [is_shift_of(*pairs, reach=2) for pairs in zip(moved, images, strict=True)]
        assert None not in shifts
        for axis in (0, 1):
            assert {shift[axis] for shift in shifts} == {-2, -1, 0, 1, 2}
    assert torch.equal(make_pair()._shift(batch["sample"]), batch["sample"])
    assert not both.requires_grad
    assert for_generator.requires_grad


def norms_of(generator: BigGANGenerator) -> list[nn.BatchNorm2d]:
    return [module for module in generator.modules() if isinstance(module, nn.BatchNorm2d)]


def test_standing_statistics_are_those_of_the_batches():
    generator = make_generator()
    seen: dict[nn.Module, list[torch.Tensor]] = {}
    for norm in norms_of(generator):
        norm.register_forward_pre_hook(lambda module, args: seen.setdefault(module, []).append(args[0].detach()))
    generator.set_standing_statistics(num_batches=8, batch_size=64)
    assert not generator.training
    assert len(norms_of(generator)) == 5
    for norm in norms_of(generator):
        flat = [hidden.transpose(0, 1).flatten(1) for hidden in seen[norm]]
        assert len(flat) == 8
        assert flat[0].shape[1] % 64 == 0
        torch.testing.assert_close(norm.running_mean, torch.stack([part.mean(1) for part in flat]).mean(0))
        torch.testing.assert_close(norm.running_var, torch.stack([part.var(1) for part in flat]).mean(0))

    # evaluation looks like training then, and does not depend on what was gathered before
    spoilt = make_generator()
    for norm in norms_of(spoilt):
        norm.running_mean.fill_(7.0)
        norm.running_var.fill_(100.0)
        norm.num_batches_tracked.fill_(9)
    spoilt.set_standing_statistics(num_batches=8, batch_size=64)
    for name, value in generator.state_dict().items():
        assert torch.equal(value, spoilt.state_dict()[name]), name
    latents, labels = torch.randn(256, 5, generator=torch.Generator().manual_seed(3)), torch.arange(256) % 3
    with torch.no_grad():
        evaluated = generator(latents, labels).sample
        trained = generator.train()(latents, labels).sample
    assert (evaluated - trained).abs().mean() < 0.1 * trained.std()


def test_an_image_of_standing_statistics_does_not_depend_on_the_batch():
    generator = make_generator(sample_size=(8, 4), image_channels=3)
    generator.set_standing_statistics(num_batches=2, batch_size=16)
    latents, labels = torch.randn(8, 5), torch.arange(8) % 3
    with torch.no_grad():
        together = generator(latents, labels).sample
        alone = torch.cat([generator(latents[i : i + 1], labels[i : i + 1]).sample for i in range(8)])
    torch.testing.assert_close(alone, together, atol=5e-6, rtol=0)  # processors round up to 1.2e-6 otherwise
    assert together.std(dim=0).mean() > 1e-3


def test_layers_have_spectral_norm_one():
    pair = make_pair()
    layers = [module for module in pair.modules() if nn.utils.parametrize.is_parametrized(module)]
    assert len(layers) == 26  # all but plain batch norm and the generator's embedding
    for layer in layers:  # they begin with that norm
        layer.parametrizations.weight.original.data += torch.randn(layer.weight.shape)
    for _ in range(50):  # of power iteration
        pair(**batch_of(pair))
    pair.eval()
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("make", [make_generator, lambda **shared: BigGANDiscriminator(**{**SHARED, **shared})])
def test_files_give_the_same_bits(make, tmp_path):
    model = make(sample_size=(8, 4), image_channels=3).eval()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    torch.manual_seed(5)
    loaded = type(model).from_pretrained(tmp_path)
    state = model.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    is_generator = isinstance(model, BigGANGenerator)
    given = torch.randn(2, 5) if is_generator else torch.rand(2, 3, 8, 4)
    with torch.no_grad():
        outputs = [network(given, torch.tensor([0, 2])) for network in (model, loaded)]
    if is_generator:
        outputs = [output.sample for output in outputs]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [BigGANGenerator, BigGANDiscriminator])
@pytest.mark.parametrize(("size", "mult"), [(6, (1, 1, 1)), ((8, 6), (1, 1, 1)), (7, (1, 2))])
def test_a_size_that_cannot_be_halved(kind, size, mult):
    height, width = (size, size) if isinstance(size, int) else size
    with pytest.raises(
        ValueError, match=rf"{height}x{width} pixels cannot be halved {len(mult) - 1} times; take fewer"
    ):
        kind(**{**SHARED, "sample_size": size, "channel_mult": mult})
