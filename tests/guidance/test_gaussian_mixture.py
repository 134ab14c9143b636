"""Guided samples are those of the law that theory says, on a mixture of Gaussians that is known in closed form.

Every comparison is Kolmogorov and Smirnov's distance between samples and an exact distribution function. It stays below

    initial + C / steps^order + sqrt(log(2 / 0.001) / (2 n)).

The last summand is that of chance: n independent samples of the very law exceed it with a probability below 0.001
(Dvoretzky, Kiefer and Wolfowitz's inequality with Massart's constant). Samplers that draw no noise are started from the
n quantiles of the normal distribution instead; as they keep the order of the line, 1 / (2 n) takes its place. The
second is that of the steps; each sampler's C is its largest distance over three classes at 25, 50 and 100 steps, times
steps^order, rounded up by a tenth or less. The first is what it costs to start from N(0, 1) instead of from x_T's own
law, whose mean is up to sqrt(alpha_bar_T) away: that, times the largest density of N(0, 1).
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from gaussian_mixture import (
    ALPHAS_CUMPROD,
    GRID,
    MEANS,
    NAMES,
    GaussianMixture,
    MixtureClassifier,
    MixtureClassifierConfig,
    MixtureUNet,
    diffused_cdf,
    distance,
    flow_cdf,
)

from hf_guided import ADMScheduler, ClassifierGuidedPipeline
from hf_guided.guidance import ClassifierFreeGuidance, ClassifierGuidance, LossGuidance

MIXTURE = GaussianMixture()
POWER = 3
INITIAL = (ALPHAS_CUMPROD[-1] ** 0.5 * max(map(abs, MEANS)) / math.sqrt(2 * math.pi)).item()


def adm(algorithm="ddpm", order=1, variance_type="fixed_small"):
    return ADMScheduler(variance_type=variance_type, algorithm_type=algorithm, solver_order=order, clip_sample=False)


@dataclass
class Sampler:
    """One way to sample, and how fast it comes to its limit.

    Attributes:
        make: Makes the scheduler.
        order, constant: Of its distance from the exact law, constant / steps^order.
        plain: The constant where the score of no noised law is followed, scale 3 of a plain classifier.
        eta: Share of noise of its continuous limit, 0 the probability-flow ODE and 1 the reverse SDE.
    """

    make: Callable
    order: int
    constant: float
    plain: float
    eta: float = 1.0

    @property
    def enough(self):
        """Steps that make little of what the steps cost."""
        return 250 if self.order == 1 else 100

    def arguments(self, steps):
        if self.order == 2:
            return {"num_inference_steps": steps}
        return {"respacing": str(steps)} | ({"eta": self.eta} if self.make().config.algorithm_type == "ddim" else {})

    def bound(self, steps, count, constant):
        chance = math.sqrt(math.log(2 / 0.001) / (2 * count)) if self.eta else 1 / (2 * count)
        return INITIAL + constant / steps**self.order + chance


def diffusers_dpm(algorithm):
    return DPMSolverMultistepScheduler.from_config(adm().config, algorithm_type=algorithm)


SAMPLERS = {
    # Algorithm 1: the posterior's variance falls short of beta, and so does the shift, the more the closer to the end
    "ddpm, fixed_small": Sampler(adm, 1, 12, 7),
    "ddpm, fixed_large": Sampler(lambda: adm(variance_type="fixed_large"), 1, 2.2, 2.4),
    # Algorithm 2
    "ddim, eta 0": Sampler(lambda: adm("ddim"), 1, 1.9, 6.7, eta=0),
    "ddim, eta 0.5": Sampler(lambda: adm("ddim"), 1, 2.3, 5.2, eta=0.5),
    "ddim, eta 1": Sampler(lambda: adm("ddim"), 1, 3.4, 5.2),
    # DPM-Solver++ and its like
    "ddim, second order": Sampler(lambda: adm("ddim", order=2), 2, 45, 150, eta=0),
    "ddpm, second order": Sampler(lambda: adm("ddpm", order=2), 2, 45, 95),
    "dpmsolver++": Sampler(lambda: diffusers_dpm("dpmsolver++"), 2, 45, 150, eta=0),
    "sde-dpmsolver++": Sampler(lambda: diffusers_dpm("sde-dpmsolver++"), 2, 45, 95),
    "unipc": Sampler(lambda: UniPCMultistepScheduler.from_config(adm().config), 2, 45, 150, eta=0),
}
over_samplers = pytest.mark.parametrize("name", SAMPLERS)


@functools.cache
def models(power):
    return MixtureUNet(), MixtureClassifier(MixtureClassifierConfig(power=power))


def sample(scheduler, noisy, count, guidance, power=1, labels=tuple(NAMES), condition_unet=False, **arguments):
    """Samples `(labels, count)`: the classifier alone guides, unless asked otherwise."""
    unet, classifier = models(power)
    pipe = ClassifierGuidedPipeline(unet, scheduler, classifier, id2label=NAMES)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.special.ndtri((torch.arange(count).double() + 0.5) / count).float().repeat(len(labels))
    if noisy:
        pipe.set_timesteps(*(arguments.get(name) for name in ("num_inference_steps", "respacing", "timesteps")))
        shape = len(pipe.scheduler.timesteps), len(latents), 1, 1, 1
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(len(latents), generator=generator)
        arguments["variance_noise"] = torch.randn(shape, generator=generator)
    images = pipe(
        list(labels),
        num_images_per_label=count,
        guidance=guidance,
        condition_unet=condition_unet,
        latents=latents.view(-1, 1, 1, 1),
        output_type="latent",
        **arguments,
    ).images
    return images.view(len(labels), count)


def largest_distance(name, steps, guidance, expected, power=1):
    """Over all classes, and the number of samples of each."""
    sampler = SAMPLERS[name]
    count = 6000 if sampler.eta else 1000
    samples = sample(sampler.make(), sampler.eta > 0, count, guidance, power, **sampler.arguments(steps))
    return max(distance(of_class, cdf) for of_class, cdf in zip(samples, expected, strict=True)), count


def check_convergence(name, constant, guidance, expected, power=1):
    """Within the bound at few steps and at many, and at few not far within, so that the bound means something."""
    sampler = SAMPLERS[name]
    few, count = largest_distance(name, 25, guidance, expected, power)
    enough, _ = largest_distance(name, sampler.enough, guidance, expected, power)
    assert sampler.bound(25, count, constant) / 4 < few < sampler.bound(25, count, constant)
    assert enough < sampler.bound(sampler.enough, count, constant)
    assert enough < few / 2


# The reference solutions


def test_the_references_agree():
    """Where the guided score is that of noised data, flow and diffusion end at the conditional itself."""
    for label in NAMES:
        expected = MIXTURE.tempered_cdf(label, 1)
        closed_form = torch.special.ndtr((GRID - MIXTURE.means[label]) / MIXTURE.stds[label])
        assert (expected - closed_form).abs().max() < 1e-4
        assert (diffused_cdf(MIXTURE, label, 1.0) - expected).abs().max() < 1e-3
        assert (diffused_cdf(MIXTURE, label, 1.0, eta=0.5) - expected).abs().max() < INITIAL
        assert (flow_cdf(MIXTURE, label, 1.0) - expected).abs().max() < INITIAL * 1.1


def test_the_tempered_classifier_is_exact(error):
    """Power 1 is the posterior itself; the table gives what the integral does, and its probabilities add up to 1."""
    classifier = models(POWER)[1]
    x = torch.linspace(-2.5, 2.5, 37).double().requires_grad_()
    for t in (0, 100, 500, 999):
        alpha = ALPHAS_CUMPROD[t]
        assert error(MIXTURE.log_tempered(x, alpha, 1)[0], MIXTURE.log_posterior(x, alpha)) < 1e-6
        scores = MIXTURE.scores(x, alpha)
        assert error(MIXTURE.log_tempered(x, alpha, 1)[1], scores[:, :-1] - scores[:, -1:]) < 1e-6
        logits = classifier(x, torch.tensor(t)).logits
        assert error(logits.exp().sum(-1), torch.ones(37)) < 1e-12
        values, slopes = MIXTURE.log_tempered(x, alpha, POWER)
        assert error(logits[:, :3], values) < 1e-6
        for label in NAMES:
            (slope,) = torch.autograd.grad(logits[:, label].sum(), x, retain_graph=True)
            assert error(slope, slopes[:, label]) < 1e-4


# Guided samples


@over_samplers
def test_scale_1_samples_the_class(name):
    expected = [MIXTURE.tempered_cdf(label, 1) for label in NAMES]
    check_convergence(name, SAMPLERS[name].constant, ClassifierGuidance(1.0), expected)


@over_samplers
def test_the_tempered_classifier_samples_the_tempered_law(name):
    """p(x) p(y | x)^3, for log E[p(y | x_0)^3 | x_t] guides exactly there."""
    expected = [MIXTURE.tempered_cdf(label, POWER) for label in NAMES]
    check_convergence(name, SAMPLERS[name].constant, ClassifierGuidance(1.0), expected, POWER)


@functools.cache
def plain_limits(eta):
    """Where the guided ODE or SDE leads with scale 3 of a plain classifier."""
    if eta == 0:
        return [flow_cdf(MIXTURE, label, POWER) for label in NAMES]
    return [diffused_cdf(MIXTURE, label, POWER, eta) for label in NAMES]


@over_samplers
def test_plain_scale_3_follows_the_guided_equation(name):
    """Though not to the tempered law, the samples go where the guided ODE or SDE of their noise leads."""
    check_convergence(name, SAMPLERS[name].plain, ClassifierGuidance(float(POWER)), plain_limits(SAMPLERS[name].eta))


@pytest.mark.parametrize(("eta", "distances"), [(0.0, (0.494, 0.456, 0.700)), (1.0, (0.147, 0.096, 0.202))])
def test_plain_scale_3_is_not_the_tempered_law(eta, distances):
    """For scale * d log p(y | x_t) is the slope of log E[p(y | x_0) | x_t]^s, and the mean of a power is another.

    The distance is a property of the method, no error: of the ODE (Algorithm 2) and of the SDE (Algorithm 1) with
    infinitely many steps, from p(x) p(y | x)^3 of each class. The bounds above are 0.08 at most at many steps, and 0.01
    for the ODE.
    """
    for label, limit, known in zip(NAMES, plain_limits(eta), distances, strict=True):
        away = (limit - MIXTURE.tempered_cdf(label, POWER)).abs().max().item()
        assert away == pytest.approx(known, abs=2e-3)


# At few steps


def chain_cdf(grid, label, scale, timesteps, variance_type):
    """The distribution function of the chain that Algorithm 1 is: each step, summed over all x_t of a grid.

    At the last timestep, where the posterior's variance is 0, no noise is added; the larger variance is the posterior's
    of the timestep before there, as in the published code.
    """
    alphas = ALPHAS_CUMPROD[timesteps]
    following = torch.cat([alphas[1:], torch.ones(1)])
    betas = 1 - alphas / following
    posterior = betas * (1 - following) / (1 - alphas)
    variances = posterior if variance_type == "fixed_small" else torch.cat([betas[:-1], posterior[-2:-1]])

    x = (grid[1:] + grid[:-1]) / 2
    mass = torch.special.ndtr(grid).diff()
    for i, (alpha, beta, variance) in enumerate(zip(alphas, betas, variances, strict=True)):
        scores = MIXTURE.scores(x, alpha)
        unguided = (x + beta * scores[:, -1]) / (1 - beta) ** 0.5
        mean = unguided + variance * scale * (scores[:, label] - scores[:, -1])
        width = variance**0.5 if i < len(alphas) - 1 else 2e-3  # as good as none
        cdf = torch.special.ndtr((grid[:, None] - mean) / width) @ mass
        mass = cdf.diff()
    return cdf


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_algorithm_1_is_its_chain_at_few_steps(variance_type):
    """Exactly, but for chance and the grid: here it matters which variance multiplies the gradient."""
    label, scale, count, grid = 2, 3.0, 20000, GRID[::3]
    scheduler = adm(variance_type=variance_type)
    samples = sample(scheduler, True, count, ClassifierGuidance(scale), labels=[label], respacing="10")
    bound = math.sqrt(math.log(2 / 0.001) / (2 * count)) + 1e-3
    for other in ("fixed_small", "fixed_large"):
        away = distance(samples, chain_cdf(grid, label, scale, scheduler.timesteps, other), grid)
        assert (away < bound) == (other == variance_type)


# Identities


@pytest.mark.parametrize("name", [name for name in SAMPLERS if not name.startswith("ddpm, fixed")])
def test_classifier_free_guidance_is_the_exact_classifiers(name, error):
    """uncond + s (cond - uncond) in epsilon is Algorithm 2 with scale s from uncond, and with s - 1 from cond."""
    sampler = SAMPLERS[name]
    arguments = sampler.arguments(20)

    def images(guidance, condition_unet):
        return sample(sampler.make(), sampler.eta > 0, 50, guidance, condition_unet=condition_unet, **arguments)

    expected = images(ClassifierFreeGuidance(2.5), True)
    assert error(images(ClassifierGuidance(1.5), True), expected) < 1e-4
    assert error(images(ClassifierGuidance(2.5), False), expected) < 1e-4
    assert error(images(ClassifierGuidance(1.5), False), expected) > 1e-2


@pytest.mark.parametrize("through_unet", [True, False])
@pytest.mark.parametrize("condition_unet", [True, False])
def test_the_gradient_of_a_loss_is_the_closed_form(condition_unet, through_unet, error):
    """For y = x_0 + noise: (y - D) / sigma^2, and through the UNet times dD / dx_t = sqrt(alpha) Var[x_0 | x_t] /
    (1 - alpha), with D = E[x_0 | x_t]. What is asserted holds for the gradient: the samples of DPS are biased."""
    measured, sigma, label = 0.4, 0.7, 1
    taken = []

    def note(pipe, step, t, tensors):
        taken.append((t, tensors["latents"].clone(), tensors["gradient"]))
        return {}

    guidance = LossGuidance(
        lambda x: ((x - measured) ** 2).sum((1, 2, 3)) / (2 * sigma**2), scale=0.5, through_unet=through_unet
    )
    sample(
        adm("ddim"),
        False,
        50,
        guidance,
        labels=[label],
        condition_unet=condition_unet,
        respacing="10",
        callback_on_step_end=note,
        callback_on_step_end_tensor_inputs=("latents", "gradient"),
    )
    assert len(taken) == 10
    for (_, x, _), (t, _, gradient) in itertools.pairwise(taken):
        x, alpha = x.double().flatten(), ALPHAS_CUMPROD[t]
        means, variances = MIXTURE.denoised(x, alpha)
        if condition_unet:
            mean, variance = means[:, label], variances[label]
        else:
            shares = MIXTURE.log_posterior(x, alpha).exp()
            mean = (shares * means).sum(-1)
            variance = (shares * (variances + (means - mean[:, None]) ** 2)).sum(-1)
        expected = 0.5 * (measured - mean) / sigma**2
        if through_unet:
            expected = expected * alpha**0.5 * variance / (1 - alpha)
        # dD / dx_t is a difference of two numbers 1 / sqrt(alpha) large, divided by sqrt(alpha), in float32
        assert error(gradient.flatten(), expected) < 1e-5 + 1e-6 / alpha
