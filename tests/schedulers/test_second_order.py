"""The second-order solver: that it is DPM-Solver++(2M), with its noise or without, and has no state."""

import itertools

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from hf_guided import ADMScheduler, ClassifierGuidedPipeline

THEIR_NAME = {"ddpm": "sde-dpmsolver++", "ddim": "dpmsolver++"}
over_algorithms = pytest.mark.parametrize("algorithm", THEIR_NAME)
over_schedules = pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
MEAN, STD = 0.3, 0.5


def make(steps=None, **arguments):
    defaults = {"variance_type": "fixed_small", "clip_sample": False, "solver_order": 2}
    scheduler = ADMScheduler(**{**defaults, **arguments})
    if steps is not None:
        scheduler.set_timesteps(steps)
    return scheduler


def alphas_of(scheduler):
    """Of the training schedule, and 1 for no noise at all as the last."""
    return torch.from_numpy(np.append(np.cumprod(1 - np.asarray(scheduler.config.trained_betas)), 1.0))


def exact_epsilon(x, alpha):
    """The noise of data drawn from a normal distribution."""
    return (1 - alpha) ** 0.5 * (x - alpha**0.5 * MEAN) / (alpha * STD**2 + 1 - alpha)


def denoise(scheduler, x, noises=None, order=2, until=None):
    """Samples by the exact noise, to the end or to a timestep; first order ignores the preceding step."""
    alphas, previous = alphas_of(scheduler), None
    for i, t in enumerate(scheduler.timesteps):
        if t == until:
            break
        noise = None if noises is None else noises[i]
        output = scheduler.step(exact_epsilon(x, alphas[t]), t, x, variance_noise=noise, previous=previous)
        previous = (t, output.pred_original_sample) if order == 2 else None
        x = output.prev_sample
    return x


@pytest.fixture
def inputs(randn):
    """A sample, a model's output, a gradient, a step's noise and a clean image from before, in float64."""
    names = ("sample", "output", "gradient", "noise", "before")
    return {name: randn(2, 3, 4, 4, seed=seed).double() for seed, name in enumerate(names)}


# What diffusers makes of it


@over_schedules
@pytest.mark.parametrize("total", [100, 1000, 4000])
def test_timesteps_are_those_of_diffusers(total, schedule):
    """All of them: halves are rounded alike."""
    ours = make(num_train_timesteps=total, beta_schedule=schedule)
    theirs = DPMSolverMultistepScheduler.from_config(ours.config)
    for steps in (*range(1, 64), total - 1):
        ours.set_timesteps(steps)
        theirs.set_timesteps(steps)
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()
        assert len(ours.timesteps) == steps
        assert ours.timesteps[0] == total - 1
        assert ours.timesteps[-1] > 0


@over_algorithms
@over_schedules
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [5, 10, 20])
def test_steps_are_those_of_diffusers(steps, prediction_type, schedule, algorithm, randn, error):
    """Each step from the same sample, the same outputs before and the same noise.

    The constants of theirs are made float64, and what they round to float32 is the sample alone; with their own float32
    constants, 1 - alpha_bar is that much coarser where there is little noise.
    """
    ours = make(steps, beta_schedule=schedule, algorithm_type=algorithm, prediction_type=prediction_type)
    alphas = alphas_of(ours)
    tolerances = {torch.float64: 1e-6, torch.float32: 1e-4}
    theirs = {}
    for dtype in tolerances:
        theirs[dtype] = DPMSolverMultistepScheduler.from_config(ours.config, algorithm_type=THEIR_NAME[algorithm])
        theirs[dtype].set_timesteps(steps)
    alphas_cumprod = torch.cat([alphas[ours.timesteps], alphas[-1:]])
    theirs[torch.float64].sigmas = (1 / alphas_cumprod - 1).sqrt()

    x, previous = randn(2, 1, 4, 4).double(), None
    for i, t in enumerate(ours.timesteps):
        alpha, noise = alphas[t], randn(2, 1, 4, 4, seed=i).double()
        epsilon = exact_epsilon(x, alpha) + 0.1 * torch.sin(3 * x)
        clean = (x - (1 - alpha) ** 0.5 * epsilon) / alpha**0.5
        velocity = alpha**0.5 * epsilon - (1 - alpha) ** 0.5 * clean
        output = {"epsilon": epsilon, "sample": torch.tanh(clean), "v_prediction": velocity}[prediction_type]
        step = ours.step(output, t, x, variance_noise=noise, previous=previous)
        for dtype, tolerance in tolerances.items():
            expected = theirs[dtype].step(output, t, x, variance_noise=noise).prev_sample
            assert error(step.prev_sample, expected) < tolerance
        previous = (t, step.pred_original_sample)
        x = step.prev_sample


@over_algorithms
def test_samples_are_those_of_diffusers(algorithm, randn, error):
    """All steps in single precision, without restarting from the same sample."""
    ours = make(20, algorithm_type=algorithm)
    theirs = DPMSolverMultistepScheduler.from_config(ours.config, algorithm_type=THEIR_NAME[algorithm])
    theirs.set_timesteps(20)
    noises = randn(20, 2, 1, 4, 4, seed=1)
    x = start = randn(2, 1, 4, 4)
    for t, noise in zip(theirs.timesteps, noises, strict=True):
        x = theirs.step(exact_epsilon(x, theirs.alphas_cumprod[t]), t, x, variance_noise=noise).prev_sample
    assert error(denoise(ours, start, noises), x) < 1e-4


# Its order


def test_errors_fall_with_the_square_of_the_steps():
    """Against the exact solution of the probability-flow ODE at timestep 333, which all these numbers of steps include.

    At the very end, the last step is of first order, as in diffusers, and there is no order to be seen.
    """
    scheduler = make(algorithm_type="ddim")
    counts, alphas = (27, 54, 111, 222, 333), alphas_of(scheduler)
    start = torch.linspace(-3, 3, 101).double().view(1, 1, 1, -1)

    def normalised(x, t):  # which the ODE leaves as it is
        return (x - alphas[t] ** 0.5 * MEAN) / (alphas[t] * STD**2 + 1 - alphas[t]) ** 0.5

    for order in (1, 2):
        errors = []
        for steps in counts:
            scheduler.set_timesteps(steps)
            assert 333 in scheduler.timesteps
            x = denoise(scheduler, start, order=order, until=333)
            errors.append((normalised(x, 333) - normalised(start, 999)).abs().max().item())
        measured = np.diff(np.log(errors)) / -np.diff(np.log(counts))
        assert (abs(measured - order) < 0.1).all()


# The first order


@over_algorithms
@over_schedules
@pytest.mark.parametrize("clip", [False, True])
def test_without_a_step_before_it_is_ddim(algorithm, schedule, clip, inputs, error):
    """For "ddpm" with all of DDPM's noise, for "ddim" with any."""
    ours = make(10, algorithm_type=algorithm, beta_schedule=schedule, clip_sample=clip)
    ddim = make(algorithm_type="ddim", beta_schedule=schedule, clip_sample=clip, solver_order=1)
    ddim.set_timesteps(timesteps=ours.timesteps)
    for t in ours.timesteps:
        for eta in (1.0,) if algorithm == "ddpm" else (0.0, 0.4):
            arguments = inputs["output"], t, inputs["sample"]
            given = {"eta": eta} if algorithm == "ddim" else {}
            step = ours.step(*arguments, variance_noise=inputs["noise"], **given)
            expected = ddim.step(*arguments, variance_noise=inputs["noise"], eta=eta)
            assert error(step.prev_sample, expected.prev_sample) < 1e-12
            assert torch.equal(step.pred_original_sample, expected.pred_original_sample)


@over_algorithms
@pytest.mark.parametrize("arguments", [{"respacing": "10"}, {"timesteps": [900, 300, 20, 0]}, {}])
def test_chosen_timesteps_keep_the_published_samplers(arguments, algorithm, inputs):
    first, second = (make(algorithm_type=algorithm, solver_order=order, clip_sample=True) for order in (1, 2))
    for scheduler in (first, second):
        scheduler.set_timesteps(20)  # which leaves nothing behind
        scheduler.set_timesteps(**arguments)
    assert torch.equal(first.timesteps, second.timesteps)
    for t in first.timesteps[::100] if not arguments else first.timesteps:
        a, b = (
            scheduler.step(
                inputs["output"],
                t,
                inputs["sample"],
                gradient=inputs["gradient"],
                variance_noise=inputs["noise"],
                previous=(t, inputs["before"]),
            )
            for scheduler in (first, second)
        )
        assert torch.equal(a.prev_sample, b.prev_sample)
        assert torch.equal(a.pred_original_sample, b.pred_original_sample)


# A step


@over_algorithms
def test_a_step_looks_back_at_what_it_is_given_alone(algorithm, inputs):
    scheduler = make(10, algorithm_type=algorithm)
    steps = list(itertools.pairwise(scheduler.timesteps))

    def step(before, t):
        previous = (before, inputs["before"])
        noise = inputs["noise"]
        return scheduler.step(inputs["output"], t, inputs["sample"], variance_noise=noise, previous=previous)

    forward = [step(*pair).prev_sample for pair in steps]
    backward = [step(*pair).prev_sample for pair in steps[::-1]][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    alone = scheduler.step(inputs["output"], steps[0][1], inputs["sample"], variance_noise=inputs["noise"])
    assert not torch.equal(alone.prev_sample, forward[0])


@over_algorithms
def test_timesteps_may_differ_within_a_batch(algorithm, inputs):
    scheduler = make(10, algorithm_type=algorithm)
    times, befores = scheduler.timesteps[[4, 9]], scheduler.timesteps[[3, 8]]

    def step(t, before, rows=slice(None)):
        sample, output, gradient, noise, original = (inputs[name][rows] for name in inputs if name)
        return scheduler.step(
            output, t, sample, gradient=gradient, variance_noise=noise, previous=(before, original)
        ).prev_sample

    mixed = step(times, befores)
    for i in range(2):
        row = slice(i, i + 1)
        assert torch.equal(mixed[row], step(times[i], befores[i], row))
        assert torch.equal(mixed[row], step(int(times[i]), int(befores[i]), row))


@over_algorithms
def test_the_learned_variance_is_left_out(algorithm, inputs):
    learned, fixed = (
        make(10, algorithm_type=algorithm, variance_type=name) for name in ("learned_range", "fixed_large")
    )
    t, before = learned.timesteps[4], learned.timesteps[3]
    output = torch.cat([inputs["output"], inputs["before"]], dim=1)
    options = {"variance_noise": inputs["noise"], "previous": (before, inputs["before"])}
    steps = (
        learned.step(output, t, inputs["sample"], **options),
        fixed.step(inputs["output"], t, inputs["sample"], **options),
    )
    assert torch.equal(steps[0].prev_sample, steps[1].prev_sample)
    with pytest.raises(ValueError, match="output has 3 channels"):
        learned.step(inputs["output"], t, inputs["sample"], **options)


@over_algorithms
def test_the_clean_image_is_clipped_as_guided(algorithm, inputs, error):
    """After the gradient, so that no gradient leads out of [-1, 1]; and only then it is looked back from."""
    clipped, free = (make(10, algorithm_type=algorithm, clip_sample=clip) for clip in (True, False))
    alphas = alphas_of(clipped)
    for before, t in itertools.pairwise(clipped.timesteps):
        alpha = alphas[t]
        epsilon = inputs["output"] - (1 - alpha) ** 0.5 * inputs["gradient"]
        guided = (inputs["sample"] - (1 - alpha) ** 0.5 * epsilon) / alpha**0.5
        assert (guided.abs() > 1).any()
        options = {"variance_noise": inputs["noise"], "previous": (before, inputs["before"])}
        step = clipped.step(inputs["output"], t, inputs["sample"], gradient=inputs["gradient"], **options)
        assert error(step.pred_original_sample, guided.clamp(-1, 1)) < 1e-9
        shifted = (inputs["sample"] - alpha**0.5 * guided.clamp(-1, 1)) / (1 - alpha) ** 0.5
        assert error(step.prev_sample, free.step(shifted, t, inputs["sample"], **options).prev_sample) < 1e-9
        unclipped = free.step(inputs["output"], t, inputs["sample"], gradient=inputs["gradient"], **options)
        assert error(unclipped.pred_original_sample, guided) < 1e-9


@over_algorithms
def test_the_last_step_ends_at_the_clean_image(algorithm, inputs):
    """Which one step does at once; it adds no noise, and does not extrapolate."""
    for steps in (1, 10):
        scheduler = make(steps, algorithm_type=algorithm)
        t = scheduler.timesteps[-1]
        previous = None if steps == 1 else (scheduler.timesteps[-2], inputs["before"])
        step = scheduler.step(
            inputs["output"], t, inputs["sample"], variance_noise=100 * inputs["noise"], previous=previous
        )
        torch.testing.assert_close(step.prev_sample, step.pred_original_sample)


@over_schedules
@over_algorithms
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 99, 999])
def test_every_number_of_steps_is_finite(algorithm, schedule, steps, randn):
    scheduler = make(steps, algorithm_type=algorithm, beta_schedule=schedule, clip_sample=True)
    assert scheduler.num_inference_steps == len(scheduler.timesteps) == steps
    assert scheduler.timesteps[0] == 999
    x, previous = randn(1, 1, 2, 2), None
    for t in scheduler.timesteps[:20]:
        step = scheduler.step(randn(1, 1, 2, 2), t, x, variance_noise=randn(1, 1, 2, 2, seed=1), previous=previous)
        x, previous = step.prev_sample, (t, step.pred_original_sample)
        assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@over_algorithms
def test_half_precision_is_rounded_once(algorithm, dtype, inputs):
    scheduler = make(10, algorithm_type=algorithm)
    t, before = scheduler.timesteps[4], scheduler.timesteps[3]
    half = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    step, exact = (
        scheduler.step(
            given["output"], t, given["sample"], variance_noise=given["noise"], previous=(before, given["before"])
        ).prev_sample
        for given in (half, {name: tensor.float() for name, tensor in half.items()})
    )
    assert step.dtype == dtype
    assert torch.equal(step, exact.to(dtype))


# Arguments


@pytest.mark.parametrize("steps", [0, -1, 1000, 2000])
def test_numbers_of_steps_are_checked(steps):
    with pytest.raises(ValueError, match=f"num_inference_steps={steps} does not lie between 1 and 999"):
        make(steps)


def test_arguments_are_checked(inputs):
    with pytest.raises(ValueError, match="solver_order=3 is not one of 1, 2"):
        make(solver_order=3)
    with pytest.raises(ValueError, match="belongs to 'ddim'"):
        make(10).step(inputs["output"], 999, inputs["sample"], eta=0.5)
    scheduler = make(10)
    with pytest.raises(ValueError, match="not among the 10 timesteps of the schedule"):
        scheduler.step(inputs["output"], 0, inputs["sample"])
    with pytest.raises(ValueError, match=r"timestep \[998\] is not among the 10 timesteps"):
        scheduler.step(inputs["output"], scheduler.timesteps[1], inputs["sample"], previous=(998, inputs["before"]))


# Configs that travel


def test_the_order_is_saved(tmp_path):
    make().save_pretrained(tmp_path)
    for other in (ADMScheduler.from_pretrained(tmp_path), ADMScheduler.from_config(make().config)):
        assert other.config.solver_order == 2
        other.set_timesteps(10)
        assert other.timesteps[-1] > 0
    assert ADMScheduler.from_config(make().config, solver_order=1).config.solver_order == 1


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    "name",
    [
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
    ],
)
def test_the_order_stays_ours(name, order, saved, tmp_path):
    """Schedulers of diffusers mean another thing by it, and keep their own."""
    ours = make(solver_order=order)
    if saved:
        ours.save_pretrained(tmp_path)
        ours = ADMScheduler.from_pretrained(tmp_path)
    theirs = getattr(diffusers, name)
    assert theirs.from_config(ours.config).config.solver_order == theirs().config.solver_order
    assert theirs.from_config(ours.config, solver_order=3).config.solver_order == 3


# In the pipeline


@over_algorithms
def test_the_pipeline_looks_back(algorithm, sampler_unet, sampler_classifier, randn, error):
    """It is this loop."""
    scheduler = make(6, algorithm_type=algorithm, variance_type="learned_range", clip_sample=True)
    pipe = ClassifierGuidedPipeline(sampler_unet, make(**scheduler.config), sampler_classifier)
    pipe.set_progress_bar_config(disable=True)
    start, noises, labels = randn(2, 3, 16, 16), randn(6, 2, 3, 16, 16, seed=1), torch.tensor([1, 3])

    def loop(order):
        x, previous = start, None
        for t, noise in zip(scheduler.timesteps, noises, strict=True):
            with torch.no_grad():
                output = sampler_unet(x, t, labels).sample
            leaf = x.clone().requires_grad_()
            chosen = sampler_classifier(leaf, t).logits.log_softmax(dim=1)[range(2), labels]
            gradient = 2 * torch.autograd.grad(chosen.sum(), leaf)[0]
            step = scheduler.step(output, t, x, gradient=gradient, variance_noise=noise, previous=previous)
            x, previous = step.prev_sample, ((t, step.pred_original_sample) if order == 2 else None)
        return x

    images = pipe(
        labels, num_inference_steps=6, guidance_scale=2.0, latents=start, variance_noise=noises, output_type="latent"
    ).images
    assert error(images, loop(order=2)) < 1e-4
    assert error(images, loop(order=1)) > 1e-3
