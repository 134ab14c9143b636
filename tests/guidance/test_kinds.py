"""Each kind against its definition, written out by hand, and against what it costs."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from guidance_helpers import COMPARISONS, GRADIENTS, KINDS, batches_seen, darkness, make, sample, seeded, steps_of
from torch import nn
from transformers import ViTImageProcessorPil

from hf_guided.guidance import (
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    CLIPGuidance,
    DenoisedClassifierGuidance,
    EntropyScaling,
    LossGuidance,
)

TIMESTEPS = [999, 749, 500, 250, 0]
LABELS = [2, 0, 4]


@pytest.fixture(scope="module")
def unguided(pipe):
    return sample(pipe, LABELS, guidance=[])


@pytest.fixture(scope="module")
def unguided_in_20(pipe):
    """5 steps of a random UNet are too coarse to be guided far."""
    return sample(pipe, LABELS, guidance=[], respacing="20")


@pytest.fixture(scope="module")
def noisy():
    """x_t of the single steps that are compared with a computation by hand."""
    return torch.randn(3, 3, 8, 8, generator=seeded(5))


def single_step(pipe, noisy, guidance, t=500, **kwargs):
    """The guided output and the gradient of one step from x_t at t."""
    (seen,) = steps_of(pipe, LABELS, guidance=guidance, timesteps=[t], latents=noisy, **kwargs)
    return seen["model_output"], seen["gradient"]


def predicted_original(pipe, noisy, epsilon, t=500):
    alpha_bar = pipe.scheduler.alphas_cumprod[t]
    return ((noisy - (1 - alpha_bar).sqrt() * epsilon[:, :3]) / alpha_bar.sqrt()).clamp(-1, 1)


@pytest.mark.parametrize("name", KINDS)
def test_the_neutral_scale_is_exactly_no_guidance(name, pipe, unguided):
    _, kind, _ = KINDS[name]
    neutral = 0 if name in GRADIENTS else 1
    for scale in (neutral, float(neutral), {0: neutral, 999: neutral}):
        with batches_seen(pipe) as seen:
            output = pipe(LABELS, guidance=make(name, scale=scale), generator=seeded(), output_type="latent")
        assert torch.equal(output.images, unguided)
        assert {name: sizes for name, sizes in seen.items() if sizes} == {"unet": [3] * 5}
    assert kind().is_neutral is False  # as constructed, it guides


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_steers_and_costs_what_its_models_do(name, pipe, unguided):
    component, _, _ = KINDS[name]
    with batches_seen(pipe) as seen:
        output = pipe(LABELS, guidance=make(name), generator=seeded(), output_type="latent", return_cost=True)
    assert (output.images - unguided).abs().mean() > 0.02
    expected = {"unet": [3] * 5, "classifier": [], "guide_unet": [], "clean_classifier": [], "clip_model": []}
    expected[component] = {"unet": [6] * 5, "clip_model": [6] * 5}.get(component, [3] * 5)  # 2 cutouts of each image
    assert seen == {name: expected[name] for name in seen}
    calls = {"unet": 5, "classifier": 0, component: 5}
    assert output.cost.calls == calls
    assert set(output.cost.seconds) == set(calls)
    for name, number in calls.items():
        assert (output.cost.seconds[name] > 0) == (number > 0)
    assert output.cost.skipped_gradients == 0


# Comparisons


def test_classifier_free_guidance_is_its_equation_in_one_doubled_batch(pipe, noisy, error):
    with batches_seen(pipe) as seen:
        output, gradient = single_step(pipe, noisy, ClassifierFreeGuidance(3.0))
    assert seen["unet"] == [6]
    assert gradient is None
    with torch.no_grad():
        cond = pipe.unet(noisy, 500, torch.tensor(LABELS)).sample
        uncond = pipe.unet(noisy, 500, None).sample
        doubled = pipe.unet(torch.cat([noisy, noisy]), 500, torch.tensor([*LABELS, 5, 5, 5])).sample
    assert error(output[:, :3], uncond[:, :3] + 3.0 * (cond - uncond)[:, :3]) < 1e-5
    assert torch.equal(output[:, 3:], doubled[:3, 3:])
    assert error(output[:, 3:], uncond[:, 3:]) > 1e-3  # the two differ, so that it matters which


@pytest.mark.parametrize("classes", [5, None])
def test_autoguidance_is_its_equation(classes, make_pipe, make_unet, noisy, error):
    weak = make_unet(
        channel_mult=(1,), attention_resolutions=(), num_class_embeds=classes, null_class_label=bool(classes)
    )
    pipe = make_pipe(guide_unet=weak)
    with batches_seen(pipe) as seen:
        output, gradient = single_step(pipe, noisy, AutoGuidance(2.5))
    assert (seen["unet"], seen["guide_unet"], gradient) == ([3], [3], None)
    labels = torch.tensor(LABELS)
    with torch.no_grad():
        strong = pipe.unet(noisy, 500, labels).sample
        weaker = weak(noisy, 500, labels if classes else None).sample
    assert error(output[:, :3], weaker[:, :3] + 2.5 * (strong - weaker)[:, :3]) < 1e-5
    assert torch.equal(output[:, 3:], strong[:, 3:])


def test_autoguidance_without_a_class(pipe, noisy, error):
    (seen,) = steps_of(pipe, None, 3, guidance=AutoGuidance(2.0), timesteps=[500], latents=noisy)
    with torch.no_grad():
        strong, weak = pipe.unet(noisy, 500).sample[:, :3], pipe.guide_unet(noisy, 500).sample[:, :3]
    assert error(seen["model_output"][:, :3], 2 * strong - weak) < 1e-5


# Classifiers


def with_softplus(model, beta):
    """A copy whose ReLUs are softpluses."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Softplus(beta))
    return model


@pytest.mark.parametrize("through_unet", [False, True])
@pytest.mark.parametrize(
    ("options", "t"),
    [
        ({"joint_temperature": 1.0, "marginal_temperature": 1.0, "softplus_beta": None, "sine": 0.0}, 500),
        ({"joint_temperature": 0.7, "marginal_temperature": 0.3, "softplus_beta": None, "sine": 0.0}, 500),
        ({"joint_temperature": 1.0, "marginal_temperature": 0.0, "softplus_beta": 5.0, "sine": 0.0}, 250),
        ({"softplus_beta": None, "sine": 0.4}, 250),
        ({}, 700),  # the defaults: 1, 0.5, 3, 0.3
    ],
)
def test_denoised_classifier_guidance_is_its_equation(through_unet, options, t, pipe, noisy, error):
    guidance = DenoisedClassifierGuidance(2.0, through_unet=through_unet, **options)
    _, gradient = single_step(pipe, noisy, guidance, t)
    beta = options.get("softplus_beta", 3.0)
    classifier = pipe.clean_classifier if beta is None else with_softplus(pipe.clean_classifier, beta)
    tau_1, tau_2 = options.get("joint_temperature", 1.0), options.get("marginal_temperature", 0.5)
    targets = torch.tensor([2, 4, 0])  # the same names in the classifier's order

    x = noisy.clone().requires_grad_()
    original = predicted_original(pipe, x, pipe.unet(x, t, torch.tensor(LABELS)).sample, t)
    if not through_unet:
        x = original = original.detach().requires_grad_()
    logits = classifier(original).logits
    log_p = tau_1 * logits[range(3), targets] - (tau_2 * logits).exp().sum(dim=1).log()
    (expected,) = torch.autograd.grad(log_p.sum(), x)
    expected *= 2.0 * (1 + options.get("sine", 0.3) * math.sin(math.pi * t / 1000))
    assert error(gradient, expected) < 2e-5


def test_both_temperatures_1_climb_the_classifiers_log_probability(make_pipe, make_classifier, noisy, error):
    """And the pipeline's own classifier sees the clean image where there is no other."""
    pipe = make_pipe(clean_classifier=None)
    plain = {"marginal_temperature": 1.0, "softplus_beta": None, "sine": 0.0}
    with batches_seen(pipe) as seen:
        _, gradient = single_step(pipe, noisy, DenoisedClassifierGuidance(1.0, **plain))
    assert seen["classifier"] == [3]
    with torch.no_grad():
        original = predicted_original(pipe, noisy, pipe.unet(noisy, 500, torch.tensor(LABELS)).sample)
    original.requires_grad_()
    log_p = pipe.classifier(original).logits.log_softmax(dim=1)[range(3), LABELS]
    assert error(gradient, torch.autograd.grad(log_p.sum(), original)[0]) < 2e-5


def test_the_clean_classifier_sees_what_its_processor_would_show_it(make_pipe, noisy, error):
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    processor = ViTImageProcessorPil(size={"height": 12, "width": 12}, image_mean=mean, image_std=std)
    pipe = make_pipe(classifier_processor=processor)
    _, gradient = single_step(pipe, noisy, DenoisedClassifierGuidance(1.0, marginal_temperature=1.0, sine=0.0))
    with torch.no_grad():
        original = predicted_original(pipe, noisy, pipe.unet(noisy, 500, torch.tensor(LABELS)).sample)
    original.requires_grad_()
    resized = F.interpolate((original + 1) / 2, (12, 12), mode="bilinear", antialias=True)
    pixels = (resized - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    log_p = with_softplus(pipe.clean_classifier, 3.0)(pixels).logits.log_softmax(dim=1)[range(3), [2, 4, 0]]
    assert error(gradient, torch.autograd.grad(log_p.sum(), original)[0]) < 2e-5


def test_softplus_leaves_the_classifier_as_it_was(pipe, noisy):
    before = pipe.clean_classifier(noisy).logits
    sample(pipe, LABELS, guidance=DenoisedClassifierGuidance(5.0))
    assert torch.equal(pipe.clean_classifier(noisy).logits, before)
    assert not any(module._forward_pre_hooks for module in pipe.clean_classifier.modules())


def test_entropy_scaling_is_its_equation(pipe, noisy, error):
    _, plain = single_step(pipe, noisy, ClassifierGuidance(1.0))
    _, scaled = single_step(pipe, noisy, ClassifierGuidance(1.0, entropy_scaling=EntropyScaling()))
    with torch.no_grad():
        p = pipe.classifier(noisy, 500).logits.softmax(dim=1).double()
    factor = math.log(5) / -(p * p.log()).sum(dim=1)
    assert factor.min() > 1.01
    assert error(scaled, factor.float().view(3, 1, 1, 1) * plain) < 1e-5


def test_entropy_scaling_of_a_clean_classifier(pipe, noisy, error):
    plain = {"marginal_temperature": 1.0, "softplus_beta": None}
    _, without = single_step(pipe, noisy, DenoisedClassifierGuidance(1.0, **plain))
    _, scaled = single_step(pipe, noisy, DenoisedClassifierGuidance(1.0, entropy_scaling={"max_factor": 50.0}, **plain))
    with torch.no_grad():
        original = predicted_original(pipe, noisy, pipe.unet(noisy, 500, torch.tensor(LABELS)).sample)
        p = pipe.clean_classifier(original).logits.softmax(dim=1)
    factor = (math.log(5) / -(p * p.log()).sum(dim=1)).view(3, 1, 1, 1)
    assert error(scaled, factor * without) < 1e-5


def test_entropy_scaling_of_a_certain_classifier_is_finite(make_pipe, make_classifier):
    scaling = EntropyScaling(max_factor=30.0)
    certain = torch.tensor([[1e4, 0, 0], [0.0, 1e4, -1e4], [60.0, 0, 0], [18.0, 0, 0], [0, 0, 0]])
    torch.testing.assert_close(scaling.factor(certain), torch.tensor([30.0, 30.0, 30.0, 30.0, 1.0]))
    gaps = torch.cat([torch.linspace(0, 200, 4001)[:, None], torch.zeros(4001, 4)], dim=1)
    factors = scaling.factor(gaps)  # rounding must not make an entropy negative on the way
    assert factors.min() > 0.9999
    assert (factors.diff() > -1e-3).all()
    sure = make_classifier()
    with torch.no_grad():
        for parameter in list(sure.parameters())[-2:]:
            parameter *= 1e6
    images = sample(make_pipe(classifier=sure), LABELS, guidance=ClassifierGuidance(1.0, entropy_scaling=scaling))
    assert images.isfinite().all()


# CLIP


def similarity(pipe, images, prompt):
    """CLIP's logit of images, of the size that it takes, with a text."""
    inputs = pipe.clip_processor.tokenizer([prompt], return_tensors="pt")
    mean = torch.tensor(pipe.clip_processor.image_processor.image_mean).view(3, 1, 1)
    std = torch.tensor(pipe.clip_processor.image_processor.image_std).view(3, 1, 1)
    return pipe.clip_model(pixel_values=((images + 1) / 2 - mean) / std, **inputs).logits_per_image[:, 0]


@pytest.mark.parametrize("through_unet", [False, True])
@pytest.mark.parametrize("prompt", ["a pug", "zebras"])
def test_clip_guidance_brings_images_nearer_to_their_text(prompt, through_unet, pipe, unguided_in_20):
    guidance = CLIPGuidance(prompt, 20.0, through_unet=through_unet, num_cutouts=4)
    guided = sample(pipe, LABELS, guidance=guidance, respacing="20")
    with torch.no_grad():
        gain = similarity(pipe, guided, prompt) - similarity(pipe, unguided_in_20, prompt)
    assert gain.min() > 2  # logits


def test_clip_guidance_by_the_whole_image_is_its_logits_gradient(pipe, noisy, error):
    guidance = CLIPGuidance("a pug", 2.0, num_cutouts=1, min_cutout=1.0)
    _, gradient = single_step(pipe, noisy, guidance)
    with torch.no_grad():
        original = predicted_original(pipe, noisy, pipe.unet(noisy, 500, torch.tensor(LABELS)).sample)
    original.requires_grad_()
    (expected,) = torch.autograd.grad(similarity(pipe, original, "a pug").sum(), original)
    assert error(gradient, 2.0 * expected) < 2e-5


def test_cutouts_depend_on_the_timestep_alone(pipe, noisy, error):
    guidance = CLIPGuidance("a pug", 5.0, num_cutouts=3, min_cutout=0.3)
    together = steps_of(pipe, LABELS, guidance=guidance, latents=noisy, timesteps=[400, 200, 0])
    torch.manual_seed(123)
    again = steps_of(pipe, LABELS, guidance=guidance, latents=noisy, timesteps=[400, 200, 0])
    assert all(torch.equal(one["gradient"], other["gradient"]) for one, other in zip(together, again, strict=True))
    generator = seeded()  # gives image i alone what it gives it in the batch
    for i, label in enumerate(LABELS):
        arguments = {"latents": noisy[i : i + 1], "timesteps": [400, 200, 0], "generator": generator}
        alone = steps_of(pipe, [label], guidance=guidance, **arguments)
        for one, other in zip(alone, together, strict=True):
            assert error(one["gradient"], other["gradient"][i : i + 1]) < 1e-4
    places = {tuple(guidance.cutouts(64, 48, seed=t)) for t in range(20)}
    assert len(places) == 20
    for top, left, side in {place for cutouts in places for place in cutouts}:
        assert 0.3 * 48 - 1 <= side <= 48
        assert 0 <= top <= 64 - side
        assert 0 <= left <= 48 - side
    assert set(CLIPGuidance("a", min_cutout=1.0).cutouts(8, 8, seed=3)) == {(0, 0, 8)}


def test_every_pixel_of_a_large_image_is_guided(pipe, error):
    """Shrunk to what CLIP takes, 8 pixels for 64, the image is averaged; points of it would leave pixels out."""
    objective = CLIPGuidance("a pug", num_cutouts=1, min_cutout=1.0).objective(pipe, None)
    images = torch.randn(1, 3, 64, 64, generator=seeded()).requires_grad_()
    logits = objective.log_probability(images, 500, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(logits.sum(), images)
    assert (gradient != 0).float().mean() > 0.99
    shrunk = F.interpolate(images, (8, 8), mode="bicubic", antialias=True)
    assert error(logits, similarity(pipe, shrunk, "a pug")) < 1e-5


def test_clip_guidance_of_grey_images(make_pipe, make_unet):
    pipe = make_pipe(unet=make_unet(in_channels=1, out_channels=2), classifier=None, clean_classifier=None)
    guided = sample(pipe, [2], guidance=CLIPGuidance("a pug", 5.0, num_cutouts=2))
    assert guided.shape == (1, 1, 8, 8)
    assert not torch.equal(guided, sample(pipe, [2], guidance=[]))


# Losses


@pytest.mark.parametrize("through_unet", [False, True])
def test_loss_guidance_lowers_its_loss(through_unet, pipe, unguided_in_20):
    guidance = LossGuidance(darkness, 0.2, through_unet=through_unet)
    guided = sample(pipe, LABELS, guidance=guidance, respacing="20")
    assert (darkness(guided) < 0.7 * darkness(unguided_in_20)).all()


def test_loss_guidance_through_the_unet_is_dps(pipe, noisy, error):
    _, gradient = single_step(pipe, noisy, LossGuidance(darkness, 0.5))
    x = noisy.clone().requires_grad_()
    loss = darkness(predicted_original(pipe, x, pipe.unet(x, 500, torch.tensor(LABELS)).sample))
    assert error(gradient, -0.5 * torch.autograd.grad(loss.sum(), x)[0]) < 2e-5
    _, stopped = single_step(pipe, noisy, LossGuidance(darkness, 0.5, through_unet=False))
    with torch.no_grad():
        original = predicted_original(pipe, noisy, pipe.unet(noisy, 500, torch.tensor(LABELS)).sample)
    assert error(stopped, 0.5 * -2 * (original - 1)) < 1e-5


def test_a_loss_may_be_of_each_image_or_their_sum(pipe):
    of_each = sample(pipe, LABELS, guidance=LossGuidance(darkness, 0.1))
    in_sum = sample(pipe, LABELS, guidance=LossGuidance(lambda images: darkness(images).sum(), 0.1))
    assert torch.equal(of_each, in_sum)


@pytest.mark.parametrize("through_unet", [False, True])
def test_a_loss_is_told_the_rows_of_the_batch(through_unet, pipe, unguided_in_20, noisy, error):
    targets = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    seen = []

    def to_targets(images, rows):
        seen.append(rows.tolist())
        return ((images - targets[rows]) ** 2).sum((1, 2, 3))

    guidance = LossGuidance(to_targets, 0.2, through_unet=through_unet)
    together = sample(pipe, LABELS, guidance=guidance, respacing="20")
    assert seen == [[0, 1, 2]] * 20
    _, gradient = single_step(pipe, noisy, guidance)
    seen.clear()
    _, in_parts = single_step(pipe, noisy, guidance, gradient_batch_size=2)
    assert seen == [[0, 1], [2]]
    assert error(in_parts, gradient) < 1e-5
    means = (together - unguided_in_20).mean((1, 2, 3))
    assert means[0] < -0.1
    assert means[2] > 0.1


@pytest.mark.parametrize(
    "loss", [lambda images: images, lambda images: images.mean((1, 2, 3))[:1], lambda images: 3.0, lambda images: None]
)
def test_a_loss_of_another_shape_is_refused(loss, pipe):
    with pytest.raises(ValueError, match="one loss for each of the 3 images, or their sum"):
        pipe(LABELS, guidance=LossGuidance(loss))


# When a kind acts


@pytest.mark.parametrize("name", ["classifier", "denoised through the UNet"])
def test_the_scale_may_be_a_mapping_or_a_function(name, pipe, noisy, error):
    points = {900: 1.0, 100: 3.0, 500: 4.0}
    from_json = make(name, scale=json.loads(json.dumps(points)))
    _, unit = single_step(pipe, noisy, make(name, scale=1.0))
    mapping, function = make(name, scale=points), make(name, scale=lambda t: 4.0 - abs(t - 500) / 400)
    for t, expected in {999: 1.0, 900: 1.0, 700: 2.5, 500: 4.0, 200: 3.25, 100: 3.0, 0: 3.0}.items():
        assert mapping.scale_at(t) == from_json.scale_at(t) == pytest.approx(expected)
        assert mapping.scale_at(t + 0.0) == mapping.scale_at(t)
    _, mapped = single_step(pipe, noisy, mapping)
    assert error(mapped, 4.0 * unit) < 1e-6
    assert torch.equal(single_step(pipe, noisy, function)[1], mapped)
    assert torch.equal(sample(pipe, LABELS, guidance=mapping), sample(pipe, LABELS, guidance=from_json))
    varied = make(name, scale=lambda t: mapping.scale_at(t))
    assert torch.equal(sample(pipe, LABELS, guidance=mapping), sample(pipe, LABELS, guidance=varied))


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_scale_of_a_comparison_follows_the_timestep(name, pipe, noisy):
    points = {0: 1.0, 500: 1.0, 1000: 3.0}
    with batches_seen(pipe) as seen:
        sample(pipe, LABELS, guidance=make(name, scale=points))
    doubled = [6 if name == "classifier-free" else 3] * 2  # where the scale is not 1
    assert seen["unet"] == doubled + [3] * 3
    assert seen["guide_unet"] == ([3] * 2 if name == "auto" else [])
    output, _ = single_step(pipe, noisy, make(name, scale=points), t=750)
    assert torch.equal(output, single_step(pipe, noisy, make(name, scale=2.0), t=750)[0])


@pytest.mark.parametrize("name", KINDS)
def test_outside_its_interval_a_kind_costs_nothing(name, pipe):
    component, _, _ = KINDS[name]
    for interval, acting in (((250, 749), [1, 2, 3]), ((251, 748.5), [2]), ((0, 0), [4]), ([749, 2000], [0, 1])):
        with batches_seen(pipe) as seen:
            output = pipe(
                LABELS,
                guidance=make(name, interval=interval),
                generator=seeded(),
                output_type="latent",
                return_cost=True,
            )
        expected = [6 if name == "classifier-free" and i in acting else 3 for i in range(5)]
        assert seen.pop("unet") == expected
        assert sum(map(len, seen.values())) == (0 if component in ("unet", "loss") else len(acting))
        assert output.cost.calls[component] == (5 if component == "unet" else len(acting))


@pytest.mark.parametrize("name", GRADIENTS)
def test_between_every_so_many_steps_a_gradient_is_left_out_or_reused(name, pipe):
    component, _, _ = GRADIENTS[name]
    always = steps_of(pipe, LABELS, guidance=make(name))
    for every, computed in ((2, [0, 2, 4]), (3, [0, 3]), (9, [0])):
        skipping = steps_of(pipe, LABELS, guidance=make(name, every=every))
        assert [i for i, step in enumerate(skipping) if step["gradient"] is not None] == computed
        assert torch.equal(skipping[0]["gradient"], always[0]["gradient"])
        reusing = pipe(LABELS, guidance=make(name, every=every, reuse=True), output_type="latent", return_cost=True)
        assert reusing.cost.calls[component] == len(computed)
        gradients = [step["gradient"] for step in steps_of(pipe, LABELS, guidance=make(name, every=every, reuse=True))]
        for i, gradient in enumerate(gradients):
            assert torch.equal(gradient, gradients[max(j for j in computed if j <= i)])
        assert all(not torch.equal(gradients[i], gradients[0]) for i in computed[1:])


def test_a_reused_gradient_has_the_scale_of_its_timestep(pipe, error):
    guidance = ClassifierGuidance({0: 0.0, 1000: 10.0}, interval=(100, 800), every=2, reuse=True)
    steps = steps_of(pipe, LABELS, guidance=guidance)
    assert steps[0]["gradient"] is None  # the count begins where it acts
    assert error(steps[2]["gradient"] / 5.0, steps[1]["gradient"] / 7.49) < 1e-6
    assert error(steps[3]["gradient"] / 2.5, steps[1]["gradient"] / 7.49) > 1e-2
    assert steps[4]["gradient"] is None


def test_a_reused_gradient_is_one_calls_own(pipe):
    guidance = ClassifierGuidance(5.0, every=9, reuse=True)
    first = sample(pipe, LABELS, guidance=guidance)
    sample(pipe, [1], guidance=guidance)
    assert torch.equal(sample(pipe, LABELS, guidance=guidance), first)
