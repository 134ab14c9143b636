"""Every kind of guidance on every solver, of ours and of diffusers; and solvers held to an exact model."""

import logging

import diffusers
import pytest
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from guidance_helpers import KINDS, make, sample, seeded
from torch import nn

from hf_guided import ADMScheduler, ClassifierGuidedPipeline
from hf_guided.guidance import ClassifierFreeGuidance, ClassifierGuidance, LossGuidance
from hf_guided.guidance.base import GradientGuidance
from hf_guided.schedulers.diffusers_compat import KNOWN_PREDICTIONS, SOLVERS, alpha_bar_at
from hf_guided.schedulers.gaussian_diffusion import original_of

OURS = {
    "ADM ddpm": {},
    "ADM ddim": {"algorithm_type": "ddim"},
    "ADM ddpm, order 2": {"solver_order": 2},
    "ADM ddim, order 2": {"algorithm_type": "ddim", "solver_order": 2},
}
# Every solver in its default setting, and in those that change its steps.
# Those of two evaluations do not cross the first of these sigmas unless they begin a step later.
LEADING = {"timestep_spacing": "leading"}
TWICE = ("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler")
SETTINGS = {name.removesuffix("Scheduler"): (name, LEADING if name in TWICE else {}) for name in SOLVERS} | {
    f"{name.removesuffix('Scheduler')} {', '.join(f'{k}={v}' for k, v in options.items())}": (name, options)
    for name, options in [
        ("DDIMScheduler", {"timestep_spacing": "trailing"}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}),
        ("DPMSolverSinglestepScheduler", {"use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
        ("DEISMultistepScheduler", {"use_karras_sigmas": True}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("LMSDiscreteScheduler", {"use_karras_sigmas": True}),
        ("PNDMScheduler", {"skip_prk_steps": True}),
    ]
}
OVERSHOOTING = ("DEIS", "PNDM", "SASolver")  # whose last step extrapolates from several clean images in range
LABELS = [0, 1, 2, 4]
ALL = "all together"
STEPS = 6


def make_scheduler(name, beta_schedule, **arguments):
    """A solver by its name here, on a schedule; what is left over goes to the [`ADMScheduler`] that it is made from."""
    if name in OURS:
        return ADMScheduler(beta_schedule=beta_schedule, **OURS[name], **arguments)
    kind, options = SETTINGS[name]
    return getattr(diffusers, kind).from_config(
        ADMScheduler(beta_schedule=beta_schedule, **arguments).config, **options
    )


def is_any(name, parts):
    return any(part in name for part in parts)


# Kinds x solvers, on a cosine schedule, where unclipped first steps explode


@pytest.fixture(scope="module")
def make_cosine_pipe(make_pipe, make_classifier):
    classifier = make_classifier(beta_schedule="squaredcos_cap_v2")
    return lambda name: make_pipe(
        scheduler=make_scheduler(name, "squaredcos_cap_v2"), classifier=classifier, sampling_defaults=None
    )


@pytest.fixture(scope="module")
def unguided(make_cosine_pipe):
    """The images of each solver without guidance, made once."""
    known = {}

    def images(name):
        if name not in known:
            known[name] = sample(make_cosine_pipe(name), LABELS, num_inference_steps=STEPS, guidance_scale=0)
        return known[name]

    return images


# The cross takes each solver once, and of the settings those that draw noise or choose their own sigmas. Ours meet
# every kind; each of diffusers' meets four of them in turn, so that every kind meets solvers of every sort.
CROSSED = [name for name in SETTINGS if "Parallel" not in name and ("=" not in name or is_any(name, ("sde", "lu_")))]
CROSS = [(kind, solver) for solver in OURS for kind in [*KINDS, ALL]]
CROSS += [([*KINDS, ALL][(4 * i + j) % (len(KINDS) + 1)], solver) for i, solver in enumerate(CROSSED) for j in range(4)]


@pytest.mark.parametrize(("kind", "solver"), CROSS)
def test_kinds_and_solvers(kind, solver, make_cosine_pipe, unguided):
    pipe = make_cosine_pipe(solver)
    kinds = [make(name, scale=5 * KINDS[name][2]) for name in (KINDS if kind == ALL else [kind])]
    calls, outputs = [], []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(args))
    watch = lambda pipe, i, t, tensors: outputs.append(tensors["model_output"]) or {}  # noqa: E731
    watching = {"callback_on_step_end": watch, "callback_on_step_end_tensor_inputs": ["model_output"]}
    arguments = {"num_inference_steps": STEPS, "guidance": kinds}
    output = pipe(LABELS, **arguments, generator=seeded(), output_type="latent", return_cost=True, **watching)
    hook.remove()
    images = output.images
    assert images.isfinite().all()
    assert images.abs().max() < (10 if is_any(solver, OVERSHOOTING) else 1.05)
    assert not torch.equal(images, unguided(solver))
    assert output.cost.calls["unet"] == len(pipe.scheduler.timesteps) == len(outputs) == len(calls)
    if kind == ALL:
        assert torch.equal(sample(pipe, LABELS, **arguments), images)

    gradients = [one for one in kinds if isinstance(one, GradientGuidance)]
    if kind in ("clip through the UNet", ALL):  # cutouts seen through random weights say little, a sum of all nothing
        return
    if gradients:
        assert total_log_p(pipe, gradients, images) > total_log_p(pipe, gradients, unguided(solver))
    else:
        noisy, timestep = calls[0][0][: len(LABELS)], calls[0][1]
        labels = torch.tensor(LABELS)
        with torch.no_grad():
            strong = pipe.unet(noisy, timestep, class_labels=labels).sample
            if isinstance(kinds[0], ClassifierFreeGuidance):
                weak = pipe.unet(noisy, timestep, class_labels=torch.full_like(labels, 5)).sample
            else:
                weak = pipe.guide_unet(noisy, timestep, class_labels=labels).sample
        expected = weak[:, :3] + kinds[0].scale * (strong[:, :3] - weak[:, :3])
        torch.testing.assert_close(outputs[0][:, :3], expected, atol=1e-4, rtol=1e-4)


def total_log_p(pipe, kinds, images):
    """The sum of the log-probabilities of some kinds, for finished images."""
    labels, rows = torch.tensor(LABELS), torch.arange(len(LABELS))
    with torch.no_grad():
        terms = [kind.scale * kind.objective(pipe, labels).log_probability(images, 0.0, rows) for kind in kinds]
    return sum(term.mean().item() for term in terms)


# Solvers held to an exact model


class GaussianUNet(ModelMixin, ConfigMixin):
    """The exact prediction for images whose pixels are drawn from a normal distribution, at fractional timesteps too.

    Every deterministic solver ends at mean + std * z if it starts at the z of the noise.
    """

    @register_to_config
    def __init__(self, prediction_type, beta_schedule, mean=0.3, std=0.2, in_channels=1, sample_size=8):
        super().__init__()
        self.register_to_config(num_class_embeds=None)
        self.half_log_snr = nn.Parameter(ADMScheduler(beta_schedule=beta_schedule).alphas_cumprod.double().logit() / 2)

    def forward(self, sample, timestep):
        low = int(timestep)
        high = min(low + 1, len(self.half_log_snr) - 1)
        alpha = torch.lerp(self.half_log_snr[low], self.half_log_snr[high], float(timestep) - low).mul(2).sigmoid()
        mean, variance = self.config.mean, self.config.std**2
        gain = alpha.sqrt() * variance / (alpha * variance + 1 - alpha)
        original = mean + gain * (sample.double() - alpha.sqrt() * mean)
        epsilon = (sample - alpha.sqrt() * original) / (1 - alpha).sqrt()
        velocity = alpha.sqrt() * epsilon - (1 - alpha).sqrt() * original
        predictions = {"epsilon": epsilon, "v_prediction": velocity, "sample": original}
        return UNet2DOutput(sample=predictions[self.config.prediction_type].float())


def gaussian_pipe(name, prediction_type="epsilon", beta_schedule="linear", **components):
    scheduler = make_scheduler(
        name, beta_schedule, prediction_type=prediction_type, clip_sample=False, variance_type="fixed_small"
    )
    pipe = ClassifierGuidedPipeline(GaussianUNet(prediction_type, beta_schedule), scheduler, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


STOCHASTIC = ("ddpm", "DDPM", "Ancestral", "sde-", "SASolver", "LCM")


def denoise(pipe, noise, **arguments):
    """Images from noise with the exact model, each of them with noise of its own."""
    arguments = {"num_images_per_label": len(noise), "latents": noise, **arguments}
    return sample(pipe, **{"num_inference_steps": 20, **arguments})


TABLE_ONLY = ("LCM", "PNDM", "TCD")  # tell no clean image; their alpha_bar is that of the schedule's table


@pytest.mark.parametrize("name", [name for name in SETTINGS if not is_any(name, TABLE_ONLY)])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_alpha_bar_is_what_the_solver_reckons_with(beta_schedule, name):
    """The clean image that we read from a prediction at each evaluation is the one that the solver reads from it."""
    pipe = gaussian_pipe(name, "v_prediction", beta_schedule)
    scheduler = pipe.scheduler
    pipe.set_timesteps(10, None, None)
    latents = torch.randn(2, 1, 8, 8, generator=seeded()) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        noisy = scheduler.scale_model_input(latents, t)
        alpha_bar = alpha_bar_at(scheduler, float(t))
        prediction = pipe.unet(noisy, t).sample
        original = original_of(prediction, noisy, alpha_bar, "v_prediction")
        output = scheduler.step(prediction, t, latents)
        theirs = getattr(output, "pred_original_sample", None)
        if theirs is None:
            theirs = scheduler.model_outputs[-1]
        if "DEIS" in name:
            original = alpha_bar**0.5 * prediction + (1 - alpha_bar) ** 0.5 * noisy  # it keeps epsilon
        torch.testing.assert_close(theirs, original, atol=2e-5, rtol=0)
        latents = output.prev_sample


@pytest.mark.parametrize("name", [*OURS, *SETTINGS])
def test_an_exact_model_is_sampled_exactly(name):
    noise = torch.randn(64, 1, 8, 8, generator=seeded())
    images = denoise(gaussian_pipe(name), noise, num_inference_steps=50)
    assert abs(images.mean() - 0.3) < 0.01
    if "LCM" in name:  # is made for models that make an image in one step
        return
    assert abs(images.std() - 0.2) < 0.05
    if not is_any(name, STOCHASTIC):
        assert (images - (0.3 + 0.2 * noise)).square().mean().sqrt() < 0.15 * 0.2


@pytest.mark.parametrize("name", [name for name in (*OURS, *SETTINGS) if not is_any(name, STOCHASTIC)])
def test_a_walk_may_begin_at_an_image(name):
    pipe = gaussian_pipe(name)
    noise, image = torch.randn(16, 1, 8, 8, generator=seeded()), torch.full((16, 1, 8, 8), 0.4)
    arguments = {"image": image, "strength": 0.5, "num_images_per_label": 1, "num_inference_steps": 50}
    if is_any(name, ("LMS", "PNDM")):
        with pytest.raises(ValueError, match="needs all steps from the first"):
            denoise(pipe, noise, **arguments)
        return
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(args[1]))
    images = denoise(pipe, noise, **arguments)
    hook.remove()
    assert len(calls) in (25, 49)
    alpha = pipe.unet.half_log_snr.mul(2).sigmoid()[round(float(calls[0]))].item()
    start = alpha**0.5 * (2 * image - 1) + (1 - alpha) ** 0.5 * noise
    z = (start - alpha**0.5 * 0.3) / (alpha * 0.2**2 + 1 - alpha) ** 0.5
    assert (images - (0.3 + 0.2 * z)).square().mean().sqrt() < 0.15 * 0.2


def lightness(images):
    """A loss of each image: its distance from black."""
    return ((images + 1) ** 2).sum((1, 2, 3))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", [*OURS, *SETTINGS])
def test_prediction_types_give_the_same_images(name, guided, make_classifier):
    kinds = [ClassifierGuidance(20.0), LossGuidance(lightness, 0.05)] if guided else []
    arguments = {"guidance": kinds, "class_labels": 1 if guided else None}
    noise = torch.randn(4, 1, 8, 8, generator=seeded())
    pipes = {
        prediction_type: gaussian_pipe(name, prediction_type, classifier=make_classifier(in_channels=1))
        for prediction_type in ("epsilon", "v_prediction", "sample")
    }
    known = KNOWN_PREDICTIONS.get(type(pipes["epsilon"].scheduler).__name__, tuple(pipes))
    images = {prediction_type: denoise(pipes[prediction_type], noise, **arguments) for prediction_type in known}
    if guided:
        unguided = denoise(pipes["epsilon"], noise)
        if "PNDM" not in name:  # whose fourth order overshoots with so strong a guidance and nothing clipped
            assert lightness(images["epsilon"]).mean() < lightness(unguided).mean()
        assert (images["epsilon"] - unguided).abs().max() > 0.01
    # Sigmas between timesteps are passed to the UNet as the nearest timestep, for which its predictions differ in what
    # they say of the image; the others differ by rounding alone: 4e-5 at most, or 8e-4 where KDPM2 is guided.
    tolerance = 5e-3 if is_any(name, ("karras", "lu_lambdas")) else 2e-3 if "KDPM2" in name else 1e-4
    for actual in images.values():
        torch.testing.assert_close(actual, images["epsilon"], atol=tolerance, rtol=0)
    for prediction_type in pipes.keys() - known:
        with pytest.raises(ValueError, match=f"prediction_type='{prediction_type}', but supports only"):
            denoise(pipes[prediction_type], noise)


# What is dropped, and what is refused


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_learned_variance_is_dropped(name, channels, make_unet):
    unet = make_unet(in_channels=channels, out_channels=2 * channels)
    pipe = ClassifierGuidedPipeline(unet, make_scheduler(name, "linear"))
    pipe.set_progress_bar_config(disable=True)
    images = sample(pipe, num_inference_steps=8)
    cut = lambda module, args, output: UNet2DOutput(sample=output.sample[:, :channels])  # noqa: E731
    hook = unet.register_forward_hook(cut)
    without = sample(pipe, num_inference_steps=8)
    hook.remove()
    assert images.shape == (1, channels, 8, 8)
    assert torch.equal(images, without)


def their(name, **options):
    return getattr(diffusers, name).from_config(ADMScheduler(beta_schedule="squaredcos_cap_v2").config, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("IPNDMScheduler", {}, "it has no alphas_cumprod"),
        ("EDMEulerScheduler", {}, "it has no alphas_cumprod"),
        ("EDMDPMSolverMultistepScheduler", {}, "it has no alphas_cumprod"),
        ("FlowMatchEulerDiscreteScheduler", {}, "it has no alphas_cumprod"),
        ("FlowMatchHeunDiscreteScheduler", {}, "it has no alphas_cumprod"),
        ("ScoreSdeVeScheduler", {}, "it has no alphas_cumprod"),
        ("CMStochasticIterativeScheduler", {}, "it has no alphas_cumprod"),
        ("DDIMInverseScheduler", {}, "not a scheduler of this diffusion process"),
        ("DPMSolverMultistepInverseScheduler", {}, "not a scheduler of this diffusion process"),
        ("UnCLIPScheduler", {}, "not a scheduler of this diffusion process"),
        ("CogVideoXDDIMScheduler", {}, "not a scheduler of this diffusion process"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "follows another process"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "follows another process"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ("DDPMScheduler", {"variance_type": "learned_range"}, "no scheduler of diffusers reads a learned variance"),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True}, "is pure noise"),
        ("DDPMScheduler", {"eta": 0.5}, "does not support eta"),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "respacing": "6"}, "chooses its own timesteps"),
    ],
)
def test_what_would_be_nonsense_is_refused(name, options, message, make_pipe):
    scheduler_options = {k: v for k, v in options.items() if k not in ("eta", "respacing")}
    arguments = {k: v for k, v in options.items() if k not in scheduler_options}
    arguments = arguments if "respacing" in arguments else {"num_inference_steps": STEPS, **arguments}
    pipe = make_pipe(scheduler=their(name, **scheduler_options), sampling_defaults=None)
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(args))
    with pytest.raises(ValueError, match=message):
        pipe([1], guidance_scale=0, **arguments)
    hook.remove()
    assert calls == []


@pytest.mark.parametrize(
    ("name", "options", "warned"),
    [
        ("HeunDiscreteScheduler", {}, True),
        ("KDPM2DiscreteScheduler", {"use_karras_sigmas": True}, True),
        ("HeunDiscreteScheduler", LEADING, False),
        ("EulerDiscreteScheduler", {}, False),
    ],
)
def test_steps_too_wide_for_two_evaluations_are_warned_of(name, options, warned, make_pipe, caplog, monkeypatch):
    logger = logging.getLogger("hf_guided.schedulers.diffusers_compat")
    monkeypatch.setattr(logger, "propagate", True)
    make_pipe(scheduler=their(name, **options), sampling_defaults=None).set_timesteps(STEPS, None, None)
    assert ("and will overshoot" in caplog.text) == warned


def test_a_saved_eta_is_for_solvers_that_take_one(make_pipe):
    pipe = make_pipe(scheduler=their("EulerDiscreteScheduler"), sampling_defaults={"eta": 0.5})
    assert sample(pipe, [1], num_inference_steps=2, guidance_scale=0).isfinite().all()


def test_a_saved_respacing_becomes_a_number_of_steps_where_sigmas_are_chosen(make_pipe):
    pipe = make_pipe(scheduler=their("DPMSolverMultistepScheduler", use_karras_sigmas=True))
    sample(pipe, [1], guidance_scale=0)
    assert len(pipe.scheduler.timesteps) == 5


def test_ddim_of_diffusers_takes_the_noise_itself(make_pipe):
    """Ours takes the same steps, with the same noise of each step."""
    ours = ADMScheduler(algorithm_type="ddim")
    theirs = diffusers.DDIMScheduler.from_config(ours.config, timestep_spacing="leading")
    noise = torch.randn(5, 1, 3, 8, 8, generator=seeded())
    arguments = {"eta": 1.0, "variance_noise": noise, "guidance_scale": 0}
    expected = sample(make_pipe(scheduler=ours), [1], respacing="ddim5", **arguments)
    pipe = make_pipe(scheduler=theirs, sampling_defaults=None)
    images = sample(pipe, [1], num_inference_steps=5, **arguments)
    torch.testing.assert_close(images, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_solvers_loaded_from_the_folder_of_a_pipeline(name, make_pipe, tmp_path):
    pipe = make_pipe(scheduler=ADMScheduler())
    pipe.save_pretrained(tmp_path)
    pipe.scheduler = getattr(diffusers, name).from_pretrained(tmp_path, subfolder="scheduler")
    assert sample(pipe, [1], num_inference_steps=3).isfinite().all()


def test_the_second_order_takes_few_steps_if_nobody_says_how_many(make_pipe):
    pipe = make_pipe(scheduler=make_scheduler("ADM ddpm, order 2", "squaredcos_cap_v2"), sampling_defaults=None)
    pipe.set_timesteps(None, None, None)
    assert len(pipe.scheduler.timesteps) == 20
    pipe.set_timesteps(None, "30", None)
    assert len(pipe.scheduler.timesteps) == 30
