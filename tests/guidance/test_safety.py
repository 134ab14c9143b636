"""The gradient is float32, bounded in memory, never silently broken, and leaves the models as they were."""

import copy
import time
import weakref

import diffusers
import pytest
import torch
import torch.nn.functional as F
from guidance_helpers import GRADIENTS, KINDS, batches_seen, darkness, make, sample, seeded, steps_of

from hf_guided.guidance import ClassifierFreeGuidance, ClassifierGuidance, DenoisedClassifierGuidance, LossGuidance
from hf_guided.guidance.monitor import Monitor, broken_images

LABELS = [2, 0, 4, 1, 3]
MODELS = ("unet", "classifier", "guide_unet", "clean_classifier", "clip_model")


@pytest.fixture(scope="module")
def noisy():
    return torch.randn(5, 3, 8, 8, generator=seeded(5))


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 0.999), (torch.float16, 0.99999)])
def test_the_gradient_is_float32_under_half_precision(dtype, least, pipe, make_pipe, noisy):
    half = make_pipe(**{name: copy.deepcopy(getattr(pipe, name)).to(dtype) for name in MODELS})
    for name in GRADIENTS:
        arguments = {"guidance": make(name), "timesteps": [100], "latents": noisy[:2]}
        (full,), (halved,) = steps_of(pipe, LABELS[:2], **arguments), steps_of(half, LABELS[:2], **arguments)
        assert halved["gradient"].dtype == halved["model_output"].dtype == torch.float32
        expected, gradient = full["gradient"].flatten(1), halved["gradient"].flatten(1)
        assert F.cosine_similarity(gradient, expected).min() > least
        assert ((gradient.norm(dim=1) / expected.norm(dim=1) - 1).abs() < 0.02).all()
    for name in KINDS:
        images = sample(half, LABELS[:2], guidance=make(name), timesteps=[500])
        assert images.dtype == torch.float32


@pytest.mark.parametrize("name", KINDS)
def test_gradient_batch_size_bounds_the_batch_and_changes_no_image(name, pipe, noisy, error):
    """Within what convolutions round otherwise in batches of another size: 1e-5 of the gradient, 2e-5 of images."""
    component, _, _ = KINDS[name]
    through_unet = getattr(make(name), "through_unet", False)
    arguments = {"guidance": make(name), "timesteps": [500], "latents": noisy}
    (whole,) = steps_of(pipe, LABELS, **arguments)
    loop = {"guidance": make(name), "timesteps": [400, 200, 0]}
    images = sample(pipe, LABELS, **loop)
    for size, parts in ((1, [1] * 5), (3, [3, 2]), (8, [5])):
        with batches_seen(pipe) as seen:
            (in_parts,) = steps_of(pipe, LABELS, gradient_batch_size=size, **arguments)
        if name == "classifier-free":
            assert seen["unet"] == [10]  # no gradient is computed, which alone needs memory
        elif through_unet:
            assert seen["unet"] == parts
        else:
            assert seen["unet"] == [5]
        if name in GRADIENTS and component != "loss":
            cutouts = 2 if component == "clip_model" else 1
            assert seen[component] == [cutouts * part for part in parts]
        assert error(in_parts["model_output"], whole["model_output"]) < 1e-5
        if name in GRADIENTS:
            assert error(in_parts["gradient"], whole["gradient"]) < 1e-5
        again = sample(pipe, LABELS, gradient_batch_size=size, **loop)
        assert (again - images).abs().max() < 2e-5


@pytest.mark.parametrize("name", ["denoised through the UNet", "loss", "clip through the UNet"])
def test_gradient_batch_size_bounds_what_autograd_keeps(name, pipe, noisy):
    """When the UNet has seen a part, nothing is kept of the parts before; after the call, nothing at all."""
    live = weakref.WeakSet()

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # or it would keep the graph that keeps it
            live.add(self)

    kept = []
    hook = pipe.unet.register_forward_hook(lambda *_: kept.append(len(live)))
    guidance = [make(name), ClassifierFreeGuidance(2.0)]
    try:
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            arguments = {"timesteps": [500, 300], "latents": noisy, "gradient_batch_size": 1}
            sample(pipe, LABELS, guidance=guidance, **arguments)
    finally:
        hook.remove()
    assert len(kept) == 10
    assert kept[0] > 0
    assert set(kept) == {kept[0]}
    assert not live


def breaking(row, at):
    """A loss whose gradient is infinite for one image of the batch at one timestep's call."""
    calls = []

    def loss(images, rows):
        if not len(rows) or rows[0] == 0:
            calls.append(1)
        broken = (rows == row) & (len(calls) == at + 1)
        return darkness(images) * torch.where(broken, torch.inf, 1.0)

    return loss


@pytest.mark.parametrize("through_unet", [False, True])
@pytest.mark.parametrize("size", [None, 2])
def test_a_gradient_that_is_not_finite_stops_with_its_place(size, through_unet, pipe):
    guidance = [ClassifierGuidance(1.0), LossGuidance(breaking(row=3, at=2), 0.1, through_unet=through_unet)]
    message = r"gradient of LossGuidance is not finite at step 2 \(timestep 500\) for image 3 of the batch"
    with batches_seen(pipe) as seen, pytest.raises(RuntimeError, match=message):
        sample(pipe, LABELS, guidance=guidance, gradient_batch_size=size)
    assert sum(seen["unet"]) == 15  # three steps


def nothing(images):
    return darkness(images) * torch.nan


def test_many_gradients_that_are_not_finite_are_named_shortly(pipe):
    with pytest.raises(RuntimeError, match=r"for images 0, 1, 2, 3, 4 and 2 more of the batch. Take a smaller scale"):
        sample(pipe, [2] * 7, guidance=LossGuidance(nothing, through_unet=False))


@pytest.mark.parametrize("through_unet", [False, True])
@pytest.mark.parametrize("size", [None, 2])
def test_a_gradient_that_is_not_finite_may_be_skipped(size, through_unet, pipe):
    def run(loss):
        guidance = [ClassifierGuidance(1.0), LossGuidance(loss, 0.1, through_unet=through_unet)]
        return pipe(
            LABELS,
            guidance=guidance,
            gradient_batch_size=size,
            nonfinite_gradient="skip",
            return_cost=True,
            generator=seeded(),
            output_type="latent",
        )

    expected, output = run(darkness), run(breaking(row=3, at=2))
    assert (expected.cost.skipped_gradients, output.cost.skipped_gradients) == (0, 1)
    others = [0, 1, 2, 4]
    assert torch.equal(output.images[others], expected.images[others])
    assert not torch.equal(output.images[3], expected.images[3])
    assert output.images.isfinite().all()


def test_a_reused_gradient_that_is_not_finite_is_counted_as_often(pipe):
    broken = LossGuidance(nothing, every=3, reuse=True, through_unet=False)
    arguments = {"guidance": broken, "nonfinite_gradient": "skip", "output_type": "latent", "generator": seeded()}
    output = pipe(LABELS, return_cost=True, **arguments)
    assert output.cost.skipped_gradients == 25
    assert torch.equal(output.images, sample(pipe, LABELS, guidance=[]))


def test_a_classifier_that_overflows_float16_is_never_a_black_picture(make_pipe, pipe):
    classifier = copy.deepcopy(pipe.classifier).half()
    with torch.no_grad():
        for parameter in list(classifier.parameters())[-2:]:
            parameter.mul_(1e6).clamp_(-6e4, 6e4)
    broken = make_pipe(classifier=classifier)
    with pytest.raises(RuntimeError, match=r"gradient of ClassifierGuidance is not finite at step 0 \(timestep 999\)"):
        broken(LABELS, output_type="pil")


@pytest.mark.parametrize("output_type", ["pil", "np", "latent"])
@pytest.mark.parametrize("guided", [False, True])
def test_a_unet_that_gives_nan_raises(guided, output_type, make_pipe, make_unet):
    unet = make_unet()
    with torch.no_grad():
        unet.conv_out.bias[0] = torch.nan
    guidance = [make("classifier")] if guided else []
    for nonfinite in ("raise", "skip"):
        with pytest.raises(RuntimeError, match="not finite"):
            make_pipe(unet=unet)(LABELS, guidance=guidance, output_type=output_type, nonfinite_gradient=nonfinite)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("channel", [0, 4], ids=["noise", "variance"])
@pytest.mark.parametrize("scheduler", [None, "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_an_output_that_clipping_would_hide_is_found_at_once(scheduler, channel, value, make_pipe, make_unet):
    """It drew clean black pictures."""
    pipe = make_pipe(unet=make_unet())
    if scheduler is not None:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    with torch.no_grad():
        pipe.unet.conv_out.bias[channel] = value
    with batches_seen(pipe) as seen, pytest.raises(RuntimeError, match="output of the UNet is not finite at step 0 "):
        pipe(LABELS, output_type="pil", nonfinite_gradient="skip")
    assert len(seen["unet"]) == 1


@pytest.mark.parametrize("kinds", [[], ["classifier"], ["denoised through the UNet"], ["classifier-free"]])
@pytest.mark.parametrize("size", [None, 2])
def test_an_output_that_is_not_finite_once_stops_with_its_place(size, kinds, pipe):
    calls = []

    def break_one(module, args, output):
        calls.append(len(output.sample))
        seen = sum(calls) if size and "denoised through the UNet" in kinds else len(calls) * 5
        row = 3 - (seen - len(output.sample)) % 5 if size and "denoised through the UNet" in kinds else 3
        if 10 < seen <= 15 and 0 <= row < len(output.sample):
            output.sample[row, 0, 0, 0] = torch.inf
        return output

    hook = pipe.unet.register_forward_hook(break_one)
    try:
        message = r"UNet is not finite at step 2 \(timestep 500\) for image 3 of the batch: its weights have infinite"
        with pytest.raises(RuntimeError, match=message):
            sample(pipe, LABELS, guidance=[make(name) for name in kinds], gradient_batch_size=size)
    finally:
        hook.remove()


def test_an_output_of_the_second_unet_that_is_not_finite_names_it(make_pipe, make_unet):
    guide = make_unet()
    with torch.no_grad():
        guide.conv_out.bias[0] = torch.inf
    with pytest.raises(RuntimeError, match="output of the UNet or of guide_unet is not finite at step 0"):
        sample(make_pipe(guide_unet=guide), LABELS, guidance=make("auto"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_finite_images_are_not_taken_for_broken(dtype):
    images = torch.full((2, 3, 256, 256), 60000.0, dtype=dtype)
    assert broken_images(images).tolist() == [False, False]
    images[1, 2, 3, 4] = -torch.inf
    assert broken_images(images).tolist() == [False, True]


@pytest.fixture
def partly_frozen(pipe):
    """The models, of whose parameters the first of each takes no gradient, and what must be true of all afterwards."""
    models = [getattr(pipe, component) for component in MODELS]
    for model in models:
        for i, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(i > 0)
    before = [[parameter.clone() for parameter in model.parameters()] for model in models]

    def check():
        for model, values in zip(models, before, strict=True):
            for i, (parameter, value) in enumerate(zip(model.parameters(), values, strict=True)):
                assert parameter.requires_grad == (i > 0)
                assert parameter.grad is None
                assert torch.equal(parameter, value)
            assert not model.training
            assert not any(module._forward_pre_hooks for module in model.modules())

    yield check
    for model in models:
        model.requires_grad_(True)


@pytest.mark.parametrize("name", KINDS)
def test_parameters_are_left_as_they_were(name, pipe, partly_frozen):
    sample(pipe, LABELS, guidance=[make(name), ClassifierFreeGuidance(2.0), make("loss")], respacing="2")
    partly_frozen()


@pytest.mark.parametrize("component", MODELS)
def test_parameters_are_left_as_they_were_by_a_call_that_raises(component, pipe, partly_frozen):
    def fail(*_):
        raise RuntimeError("from within")

    model = pipe.clip_model.vision_model if component == "clip_model" else getattr(pipe, component)
    hook = model.register_forward_hook(fail)
    names = ["classifier", "denoised through the UNet", "clip through the UNet", "auto"]
    try:
        with pytest.raises(RuntimeError, match="from within"):
            sample(pipe, LABELS, guidance=[make(name) for name in names])
    finally:
        hook.remove()
    partly_frozen()


def test_no_graph_is_kept_of_a_walk(pipe):
    for name in KINDS:
        for step in steps_of(pipe, LABELS, guidance=make(name), respacing="2"):
            assert not step["model_output"].requires_grad
            assert step["gradient"] is None or not step["gradient"].requires_grad
        assert not sample(pipe, LABELS, guidance=make(name), respacing="2").requires_grad


def test_what_a_call_cost(pipe):
    guidance = [
        ClassifierGuidance(1.0, interval=(200, 800)),
        DenoisedClassifierGuidance(1.0, every=2, through_unet=True),
        ClassifierFreeGuidance(2.0, interval=(0, 0)),
    ]
    arguments = {"guidance": guidance, "generator": seeded(), "output_type": "latent", "gradient_batch_size": 2}
    with batches_seen(pipe) as seen:
        images, cost = pipe(LABELS, return_dict=False, return_cost=True, **arguments)
    calls = {name: len(sizes) for name, sizes in seen.items() if sizes}
    assert cost.calls == calls == {"unet": 3 * 3 + 2, "classifier": 3 * 3, "clean_classifier": 3 * 3}
    assert cost.seconds.keys() == calls.keys()
    assert all(0 < seconds < 60 for seconds in cost.seconds.values())
    assert cost.skipped_gradients == 0
    arguments["generator"] = seeded()
    output = pipe(LABELS, **arguments)
    assert output.cost is None
    assert torch.equal(output.images, images)
    arguments["generator"] = seeded()
    (alone,) = pipe(LABELS, return_dict=False, **arguments)
    assert torch.equal(alone, images)


def test_seconds_are_those_of_the_component(pipe):
    """A classifier that sleeps takes its seconds, and the UNet none of them."""
    handle = pipe.classifier.register_forward_pre_hook(lambda *_: time.sleep(0.15))
    try:
        cost = pipe(LABELS, guidance_scale=1.0, return_cost=True, output_type="latent").cost
    finally:
        handle.remove()
    assert 0.75 < cost.seconds["classifier"] < 0.75 + 5
    unguided = pipe(LABELS, guidance_scale=0.0, return_cost=True, output_type="latent").cost
    assert unguided.calls == {"unet": 5, "classifier": 0}
    assert unguided.seconds["classifier"] == 0
    assert unguided.seconds["unet"] > 0


def test_half_precision_keeps_the_small_gradients_of_a_certain_classifier(pipe, make_pipe, noisy):
    certain = copy.deepcopy(pipe.classifier)
    with torch.no_grad():
        logits = certain(noisy[:2], 100).logits
    labels = logits.argmax(dim=1).tolist()
    scale = 20.0 / (logits.amax(dim=1) - logits.median(dim=1).values).mean().item()

    def sharpened(module, args, output):
        output.logits = output.logits * scale
        return output

    certain.register_forward_hook(sharpened)
    half = copy.deepcopy(certain).to(torch.float16)
    arguments = {"guidance": ClassifierGuidance(1.0), "timesteps": [100], "latents": noisy[:2]}
    (full,) = steps_of(make_pipe(classifier=certain), labels, **arguments)
    (halved,) = steps_of(make_pipe(classifier=half), labels, **arguments)
    expected, gradient = full["gradient"].flatten(1), halved["gradient"].flatten(1)
    assert F.cosine_similarity(gradient, expected).min() > 0.999


def test_a_gradient_that_clipping_would_hide_is_found_at_its_step(pipe):
    """At the first timestep of a cosine schedule every predicted pixel is clipped."""
    nothing = LossGuidance(lambda images: (images * torch.nan).sum((1, 2, 3)))
    with pytest.raises(RuntimeError, match=r"LossGuidance is not finite at step 0 \(timestep 999\)"):
        sample(pipe, LABELS, guidance=nothing, timesteps=[999, 500])


def test_a_compiled_classifier_guides(pipe, make_pipe):
    compiled = make_pipe(classifier=torch.compile(pipe.classifier, backend="eager"))
    arguments = {"guidance_scale": 20.0, "timesteps": [500]}
    expected = sample(pipe, LABELS, **arguments)
    torch.testing.assert_close(sample(compiled, LABELS, **arguments), expected, atol=1e-5, rtol=0)


def test_gradients_seen_late_are_named_by_their_step():
    """As on an accelerator, which is asked once for many steps."""
    fine, broken = torch.tensor([False, False, False]), torch.tensor([False, True, True])
    monitor = Monitor()
    monitor.pending = [
        (fine, "LossGuidance", 900.0, 3),
        (broken, "CLIPGuidance", 800.0, 4),
        (broken, "Other", 800.0, 4),
    ]
    with pytest.raises(RuntimeError, match=r"CLIPGuidance is not finite at step 4 \(timestep 800\) for images 1, 2 of"):
        monitor.check()
    monitor = Monitor(skip_gradients=True)
    monitor.pending = [(fine, "LossGuidance", 900.0, 3), (broken, "CLIPGuidance", 800.0, 4)]
    monitor.check()
    monitor.check()
    assert monitor.cost.skipped_gradients == 2
