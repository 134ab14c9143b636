"""How many bits a model needs to describe an image: the variational bound, term by term."""

import math
from dataclasses import dataclass

import torch
from diffusers.models.modeling_utils import ModelMixin

from ..losses import mean_over_pixels, normal_kl, variational_bound_term
from ..schedulers.gaussian_process import upcast
from ..schedulers.schedules import space_timesteps
from ..schedulers.scheduling_adm import ADMScheduler, model_timesteps


@dataclass
class BitsPerDim:
    """
    Attributes:
        total_bpd (`torch.Tensor` of shape `(batch,)`): The bound on the negative log-likelihood, in bits per dimension.
        prior_bpd (`torch.Tensor` of shape `(batch,)`): Its part that no model can change: what noise remains at the
            last timestep.
        vb (`torch.Tensor` of shape `(batch, timesteps)`): Its terms, last timestep first.
        mse (`torch.Tensor` of the same shape): Mean squared error of the noise that the predicted clean image implies.
        xstart_mse (`torch.Tensor` of the same shape): Mean squared error of the predicted clean image.
    """

    total_bpd: torch.Tensor
    prior_bpd: torch.Tensor
    vb: torch.Tensor
    mse: torch.Tensor
    xstart_mse: torch.Tensor


@torch.no_grad()
def bits_per_dim(
    unet: ModelMixin,
    scheduler: ADMScheduler,
    images: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    respacing: str | None = None,
    noise: torch.Tensor | None = None,
) -> BitsPerDim:
    r"""The variational bound of images under a diffusion model (Improved DDPM, arXiv 2102.09672, equations 4 to 7).

    Args:
        unet ([`ADMUNet2DModel`] or like it): Predicts noise; is set to evaluation mode for the time of the call.
        scheduler ([`ADMScheduler`]): Is left as it was. With its `clip_sample`, predicted clean images are clipped.
        images (`torch.Tensor` of shape `(batch, C, height, width)`): 8-bit images, scaled to [-1, 1].
        class_labels (`torch.Tensor` of shape `(batch,)`, *optional*): For a class-conditional UNet.
        respacing (`str`, *optional*): Timesteps to use, in OpenAI's notation; all of them by default.
        noise (`torch.Tensor` of shape `(timesteps, batch, C, height, width)`, *optional*): The noise of each timestep,
            last timestep first; drawn if not given.

    Returns:
        [`BitsPerDim`]

    Raises:
        `ValueError`: If `noise` has another shape, or the respacing cannot be satisfied.
    """
    total = scheduler.config.num_train_timesteps
    process = scheduler.process_of(space_timesteps(total, respacing) if respacing else range(total))
    descending = process.timesteps[::-1]
    images = upcast(images)
    if noise is not None and noise.shape != (len(descending), *images.shape):
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}; {len(descending)} timesteps of images of shape "
            f"{tuple(images.shape)} need {(len(descending), *images.shape)}."
        )
    conditions = {} if class_labels is None else {"class_labels": class_labels}
    was_training = unet.training
    unet.eval()
    vb, mse, xstart_mse = [], [], []
    try:
        for i, timestep in enumerate(descending):
            timesteps = torch.full((len(images),), timestep, device=images.device)
            step_noise = torch.randn_like(images) if noise is None else noise[i].to(images)
            sample = process.add_noise(images, step_noise, timesteps)
            told = model_timesteps(scheduler, timesteps)
            model_output = unet(sample.to(unet.dtype), told, **conditions).sample
            predicted = process.predict(model_output, timesteps, sample, scheduler.config.clip_sample)
            original = predicted.pred_original_sample
            vb.append(variational_bound_term(process, predicted, images, sample, timesteps))
            mse.append(mean_over_pixels((process.epsilon_of(original, timesteps, sample) - step_noise) ** 2))
            xstart_mse.append(mean_over_pixels((original - images) ** 2))
    finally:
        unet.train(was_training)

    # in float64: at the last timestep so little is left that float32 would round it away
    signal, alpha_bar = process.at(descending[0], images.double(), "sqrt_alpha_bar", "alpha_bar")
    zero = torch.zeros_like(alpha_bar)
    prior = normal_kl(signal * images.double(), (1 - alpha_bar).log(), zero, zero)
    prior_bpd = (mean_over_pixels(prior) / math.log(2)).to(images.dtype)
    terms = torch.stack(vb, dim=1)
    return BitsPerDim(
        total_bpd=terms.sum(dim=1) + prior_bpd,
        prior_bpd=prior_bpd,
        vb=terms,
        mse=torch.stack(mse, dim=1),
        xstart_mse=torch.stack(xstart_mse, dim=1),
    )
