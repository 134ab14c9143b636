"""diffusers' solvers at as many steps as the schedule has timesteps: whole images, or a refusal before any step."""

import contextlib
import inspect

import diffusers
import pytest
import torch

from hf_guided import ADMScheduler, ClassifierGuidedPipeline
from hf_guided.schedulers.diffusers_compat import SOLVERS

SPACINGS = [
    {},
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"use_karras_sigmas": True},
    {"final_sigmas_type": "sigma_min"},
    {"skip_prk_steps": True},
    {"solver_order": 3},
]
SETTINGS = [
    (name, options)
    for name in SOLVERS
    for options in SPACINGS
    if options.keys() <= inspect.signature(getattr(diffusers, name)).parameters.keys()
]
ALWAYS = {  # steps of a schedule of 10 that each makes in its default setting, so that no refusal is one too many
    "DDIMScheduler": 10,
    "DDPMScheduler": 10,
    "DEISMultistepScheduler": 9,
    "DPMSolverMultistepScheduler": 9,
    "DPMSolverSinglestepScheduler": 9,
    "EulerDiscreteScheduler": 10,
    "HeunDiscreteScheduler": 10,
    "LMSDiscreteScheduler": 10,
    "PNDMScheduler": 10,
    "UniPCMultistepScheduler": 9,
}


@pytest.fixture(scope="module")
def unet(tiny_unet):
    return tiny_unet(
        sample_size=4, in_channels=1, out_channels=1, channel_mult=(1,), attention_resolutions=(), num_class_embeds=None
    )


def make_pipe(unet, name, options, total):
    ours = ADMScheduler(num_train_timesteps=total, beta_schedule="squaredcos_cap_v2", variance_type="fixed_small")
    extra = {"original_inference_steps": 5} if total == 10 and name in ("LCMScheduler", "TCDScheduler") else {}
    return ClassifierGuidedPipeline(unet, getattr(diffusers, name).from_config(ours.config, **options, **extra))


def calls_and_refusal(pipe, **arguments):
    """How often a call asks the UNet, and what it is refused with."""
    calls = []
    handle = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        images = pipe(output_type="pt", generator=torch.Generator().manual_seed(0), **arguments).images
    except ValueError as error:
        return len(calls), str(error)
    finally:
        handle.remove()
    assert images.isfinite().all()
    return len(calls), None


@pytest.mark.parametrize("steps", [9, 10])
@pytest.mark.parametrize(("name", "options"), SETTINGS)
def test_sampling_is_whole_or_refused(unet, name, options, steps):
    calls, refusal = calls_and_refusal(make_pipe(unet, name, options, 10), num_inference_steps=steps)
    if refusal is None:
        assert calls >= steps
    else:
        assert calls == 0
        assert f"num_inference_steps={steps}" in refusal
        assert "\n" not in refusal
    if not options and steps <= ALWAYS.get(name, 0):
        assert refusal is None


@pytest.mark.parametrize(("name", "options"), [case for case in SETTINGS if case[1] in SPACINGS[2:4]])
@pytest.mark.parametrize("steps", [998, 1000, 1001, 10**9])
def test_a_published_schedule_has_distinct_timesteps_inside(unet, name, options, steps):
    pipe = make_pipe(unet, name, options, 1000)
    if steps > 1000:
        with pytest.raises(ValueError, match=f"num_inference_steps={steps} does not lie between 1 and 1000"):
            pipe.set_timesteps(steps, None, None)
        return
    with contextlib.suppress(ValueError):
        pipe.set_timesteps(steps, None, None)
        check_timesteps(pipe.scheduler, steps)


def check_timesteps(scheduler, steps):
    timesteps, sigmas = scheduler.timesteps, getattr(scheduler, "sigmas", None)
    assert 0 <= timesteps.min() <= timesteps.max() <= 999
    assert len((timesteps if sigmas is None else sigmas[:-1]).unique()) >= steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "DDIMScheduler", "options": SPACINGS[2], "steps": 10}, "timesteps from 10 to 1 .* steps_offset=1"),
        ({"name": "PNDMScheduler", "options": SPACINGS[2], "steps": 10}, "timesteps from 10 to 1 .* steps_offset=1"),
        ({"name": "DPMSolverMultistepScheduler", "options": {}, "steps": 10}, "only 9 different noise levels"),
        ({"name": "UniPCMultistepScheduler", "options": {}, "steps": 10}, "only 9 different noise levels"),
        ({"name": "DEISMultistepScheduler", "options": SPACINGS[1], "steps": 10}, "only 1 different noise levels"),
        ({"name": "PNDMScheduler", "options": {}, "steps": 3}, "cannot take num_inference_steps=3; give another"),
    ],
)
def test_a_refusal_says_why(unet, arguments, message):
    pipe = make_pipe(unet, arguments["name"], arguments["options"], 10)
    with pytest.raises(ValueError, match=message):
        pipe(num_inference_steps=arguments["steps"])


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("timesteps", [[], [0, 5, 9], [9, 5, 5, 0], [10, 5], [5, -1], [9.0, 1.0], "951", [True]])
def test_explicit_timesteps_are_held_to_the_schedule(unet, name, timesteps):
    calls, refusal = calls_and_refusal(make_pipe(unet, name, {}, 10), timesteps=timesteps)
    assert "timesteps" in refusal
    assert calls == 0


def test_a_schedule_shorter_than_the_default_number_of_steps_samples(unet):
    assert calls_and_refusal(make_pipe(unet, "DDIMScheduler", {}, 10)) == (10, None)
