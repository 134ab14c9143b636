"""Configs that travel: saved, loaded, and handed to the schedulers of diffusers and back."""

import diffusers
import numpy as np
import pytest
import torch

from hf_guided import ADMScheduler
from hf_guided.schedulers.scheduling_adm import model_timesteps

THEIRS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
]
OTHER = {
    "num_train_timesteps": 100,
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "fixed_small",
    "prediction_type": "v_prediction",
    "algorithm_type": "ddim",
    "clip_sample": False,
    "rescale_timesteps": True,
}


def reload(scheduler, folder):
    scheduler.save_pretrained(folder)
    return type(scheduler).from_pretrained(folder)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("algorithm", ["ddpm", "ddim"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("total", [100, 1000])
@pytest.mark.parametrize("theirs", THEIRS)
def test_schedulers_of_diffusers_get_the_betas(theirs, total, schedule, algorithm, saved, tmp_path):
    ours = ADMScheduler(total, schedule, algorithm_type=algorithm, prediction_type="v_prediction", clip_sample=False)
    if saved:
        ours = reload(ours, tmp_path)
    scheduler = getattr(diffusers, theirs).from_config(ours.config)
    assert torch.equal(scheduler.betas, ours.betas)
    torch.testing.assert_close(scheduler.alphas_cumprod, ours.alphas_cumprod, rtol=1e-4, atol=1e-9)
    assert len(scheduler) == total
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.get("clip_sample", False) is False
    reloaded = reload(scheduler, tmp_path / "theirs")
    assert torch.equal(reloaded.betas, ours.betas)


@pytest.mark.parametrize("theirs", THEIRS)
def test_schedulers_of_diffusers_sample(theirs, randn):
    """What ours says of the variance and of the algorithm is in words that theirs would misunderstand."""
    for algorithm in ("ddpm", "ddim"):
        scheduler = getattr(diffusers, theirs).from_config(ADMScheduler(algorithm_type=algorithm).config)
        scheduler.set_timesteps(4)
        x = randn(1, 3, 4, 4) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x = scheduler.step(0.1 * randn(1, 3, 4, 4), t, scheduler.scale_model_input(x, t), return_dict=False)[0]
        assert x.isfinite().all()


def test_rescaled_timesteps_survive_the_handing_over():
    scheduler = diffusers.DDIMScheduler.from_config(ADMScheduler(100, rescale_timesteps=True).config)
    assert model_timesteps(scheduler, torch.tensor([7])).tolist() == [70.0]
    scheduler = diffusers.DDIMScheduler.from_config(ADMScheduler(100).config)
    assert model_timesteps(scheduler, torch.tensor([7])).tolist() == [7]


def settings(scheduler):
    return {name: scheduler.config[name] for name in [*OTHER, "trained_betas"]}


@pytest.mark.parametrize("arguments", [{}, OTHER, {"num_train_timesteps": 3, "trained_betas": [0.1, 0.2, 0.4]}])
def test_a_config_makes_the_same_scheduler(arguments, tmp_path):
    scheduler = ADMScheduler(**arguments)
    for other in (ADMScheduler.from_config(scheduler.config), reload(scheduler, tmp_path)):
        assert settings(other) == settings(scheduler)
        assert torch.equal(other.alphas_cumprod, scheduler.alphas_cumprod)
        assert settings(ADMScheduler.from_config(other.config)) == settings(scheduler)


def test_a_config_may_be_changed_on_the_way():
    scheduler = ADMScheduler.from_config(ADMScheduler().config, algorithm_type="ddim", clip_sample=False)
    assert scheduler.config.algorithm_type == "ddim"
    assert scheduler.config.clip_sample is False
    changed = ADMScheduler.from_config(ADMScheduler().config, beta_schedule="squaredcos_cap_v2", trained_betas=None)
    assert torch.equal(changed.betas, ADMScheduler(beta_schedule="squaredcos_cap_v2").betas)
    changed = ADMScheduler.from_config(ADMScheduler().config, num_train_timesteps=50, trained_betas=None)
    assert torch.equal(changed.betas, ADMScheduler(50).betas)


def test_betas_that_contradict_the_schedule_are_refused():
    with pytest.raises(ValueError, match="trained_betas are those of beta_schedule='linear', and"):
        ADMScheduler.from_config(ADMScheduler().config, beta_schedule="squaredcos_cap_v2")
    with pytest.raises(ValueError, match=r"trained_betas must be 50 numbers.* give trained_betas=None with it"):
        ADMScheduler.from_config(ADMScheduler().config, num_train_timesteps=50)


@pytest.mark.parametrize("arguments", [{}, {"num_train_timesteps": 100}, {"beta_start": 8.5e-4, "beta_end": 0.012}])
def test_configs_of_diffusers_keep_their_betas(arguments):
    theirs = diffusers.DDPMScheduler(**arguments)
    ours = ADMScheduler.from_config(theirs.config)
    torch.testing.assert_close(ours.betas, theirs.betas, rtol=1e-5, atol=0)
    assert ours.config.variance_type == "fixed_small"
    for name in ("scaled_linear", "sigmoid"):
        with pytest.raises(ValueError, match=f"beta_schedule='{name}' is not one of"):
            ADMScheduler.from_config(diffusers.DDPMScheduler(beta_schedule=name).config)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("theirs", [*THEIRS, "DEISMultistepScheduler"])
@pytest.mark.parametrize("arguments", [{}, OTHER, {"num_train_timesteps": 100, "solver_order": 2}])
def test_there_and_back(arguments, theirs, saved, tmp_path):
    ours = ADMScheduler(**arguments)
    there = getattr(diffusers, theirs).from_config(ours.config)
    there = reload(there, tmp_path) if saved else there
    back = ADMScheduler.from_config(there.config)
    assert settings(back) == settings(ours)
    assert back.config.solver_order == ours.config.solver_order
    assert torch.equal(back.betas, ours.betas)
    assert ADMScheduler.from_config(there.config, algorithm_type="ddim").config.algorithm_type == "ddim"


def test_there_and_back_of_a_changed_config(tmp_path):
    """As trained pipelines are saved."""
    ours = reload(ADMScheduler.from_config(ADMScheduler().config, solver_order=2, algorithm_type="ddim"), tmp_path)
    back = ADMScheduler.from_config(diffusers.UniPCMultistepScheduler.from_config(ours.config).config)
    assert settings(back) == settings(ours)
    assert back.config.solver_order == 2


def test_what_diffusers_means_by_the_same_words_is_not_taken_over():
    for theirs in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"):
        ours = ADMScheduler.from_config(getattr(diffusers, theirs)().config)
        assert (ours.config.algorithm_type, ours.config.solver_order) == ("ddpm", 1)


def test_ours_is_among_the_compatible_ones():
    compatibles = ADMScheduler().compatibles
    assert ADMScheduler in compatibles
    assert {getattr(diffusers, name) for name in THEIRS} - {diffusers.LCMScheduler} <= set(compatibles)


BETAS = [0.01 + 0.001 * step for step in range(50)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        OTHER,
        {"num_train_timesteps": 100},
        {"solver_order": 2, "rescale_timesteps": True},
        *({"trained_betas": betas} for betas in (BETAS, tuple(BETAS), np.array(BETAS), torch.tensor(BETAS))),
    ],
)
def test_a_config_is_equal_after_saving_and_loading(settings, tmp_path):
    scheduler = ADMScheduler(**settings)
    loaded = reload(scheduler, tmp_path)
    assert loaded.config == scheduler.config
    assert dict(ADMScheduler.from_config(scheduler.config).config) == dict(scheduler.config)
    assert torch.equal(loaded.betas, scheduler.betas)
