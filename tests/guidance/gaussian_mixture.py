"""A mixture of Gaussians on the line, whose noised scores and class probabilities are known in closed form.

Pictures of one pixel, so that a batch is as many independent samples. The models are exact: what a pipeline that they
make up samples wrongly is the pipeline's fault.
"""

import math

import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from scipy.linalg import solve_banded
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

WEIGHTS, MEANS, STDS = (0.5, 0.3, 0.2), (-1.0, 0.2, 0.9), (0.3, 0.4, 0.25)
NAMES = {0: "left", 1: "middle", 2: "right"}
ALPHAS_CUMPROD = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))  # the linear schedule of DDPM
GRID = torch.linspace(-6, 6, 2401, dtype=torch.float64)


class GaussianMixture:
    """The law of x_t if x_0 is drawn from component k with probability `weights[k]`; classes are the components.

    Alphas are alpha_bar, the share of signal in x_t's variance, and may be a tensor that broadcasts over x. Scores and
    logarithms of probabilities are float64, of shape `x.shape` or `(*x.shape, components)`.
    """

    def __init__(self, weights=WEIGHTS, means=MEANS, stds=STDS):
        self.weights, self.means, self.stds = (torch.tensor(part).double() for part in (weights, means, stds))

    def noised(self, alpha):
        """Means and variances of the components of x_t."""
        return alpha**0.5 * self.means, alpha * self.stds**2 + 1 - alpha

    def log_joint(self, x, alpha):
        """log p(x_t, y) of each class y."""
        means, variances = self.noised(alpha)
        normal = -((x[..., None] - means) ** 2) / (2 * variances) - (2 * math.pi * variances).log() / 2
        return self.weights.log() + normal

    def log_posterior(self, x, alpha):
        """log p(y | x_t) of each class y."""
        return self.log_joint(x, alpha).log_softmax(-1)

    def scores(self, x, alpha):
        """d log p(x_t | y) / d x_t of each class y and, last, d log p(x_t) / d x_t."""
        means, variances = self.noised(alpha)
        of_classes = (means - x[..., None]) / variances
        of_all = (self.log_posterior(x, alpha).exp() * of_classes).sum(-1, keepdim=True)
        return torch.cat([of_classes, of_all], dim=-1)

    def denoised(self, x, alpha):
        """Means `(*x.shape, components)` and variances `(components,)` of x_0 given x_t and the component."""
        means, variances = self.noised(alpha)
        gain = alpha**0.5 * self.stds**2 / variances
        return self.means + gain * (x[..., None] - means), (1 - alpha) * self.stds**2 / variances

    def log_tempered(self, x, alpha, power):
        """log E[p(y | x_0)^power | x_t] of each class y and its slope in x, both `(*x.shape, components)`.

        By the trapezoidal rule over x_0, on points 0.01 apart: as far as the least noise has a standard deviation.
        """
        clean = GRID[::2]
        law = (self.log_joint(clean, 1.0).logsumexp(-1, keepdim=True) + power * self.log_posterior(clean, 1.0)).exp()
        away = alpha**0.5 * clean - x[..., None]
        kernel = (-(away**2) / (2 * (1 - alpha))).exp()
        joint = kernel @ law  # up to a factor, p(x_t) E[p(y | x_0)^power | x_t]
        slopes = (kernel * away / (1 - alpha)) @ law / joint - self.scores(x, alpha)[..., -1:]
        factor = (clean[1] - clean[0]) / (2 * math.pi * (1 - alpha)) ** 0.5
        return (factor * joint).log() - self.log_joint(x, alpha).logsumexp(-1, keepdim=True), slopes

    def tempered_cdf(self, label, power):
        """The distribution function of p(x_0) p(y | x_0)^power on `GRID`; power 1 is that of the class."""
        log_density = self.log_joint(GRID, 1.0).logsumexp(-1) + power * self.log_posterior(GRID, 1.0)[:, label]
        return cumulated(log_density.exp())


def cumulated(density):
    """The distribution function of a density on `GRID`, by the trapezoidal rule."""
    steps = (density[1:] + density[:-1]) / 2
    return torch.cat([torch.zeros(1).double(), steps.cumsum(0)]) / steps.sum()


def distance(samples, cdf, grid=GRID):
    """Kolmogorov and Smirnov's: the largest difference of the samples' distribution function from one on a grid."""
    samples = samples.flatten().double().sort().values
    expected = torch.from_numpy(np.interp(samples.numpy(), grid.numpy(), cdf.numpy()))
    ranks = torch.arange(len(samples) + 1).double() / len(samples)
    return torch.maximum((ranks[1:] - expected).max(), (expected - ranks[:-1]).max()).item()


# The exact models


class MixtureUNet(ModelMixin, ConfigMixin):
    """The exact noise of x_t: of a class, or of the whole mixture for the null label."""

    @register_to_config
    def __init__(self, in_channels=1, out_channels=1, sample_size=1, num_class_embeds=3, null_class_label=True):
        super().__init__()
        self.mixture = GaussianMixture()
        self.alphas_cumprod = nn.Parameter(ALPHAS_CUMPROD.clone())  # double precision, as the whole model

    def forward(self, sample, timestep, class_labels=None):
        alpha = self.alphas_cumprod[timestep]
        if class_labels is None:
            class_labels = torch.full((len(sample),), len(MEANS))
        scores = self.mixture.scores(sample, alpha)
        score = scores.take_along_dim(class_labels.view(-1, 1, 1, 1, 1), -1)[..., 0]
        return UNet2DOutput(sample=-((1 - alpha) ** 0.5) * score)


class MixtureClassifierConfig(PreTrainedConfig):
    model_type = "mixture_classifier"

    def __init__(self, power=1, **kwargs):
        self.power = power
        self.in_channels = 1
        self.beta_schedule, self.trained_betas = "linear", None
        self.num_train_timesteps, self.rescale_timesteps = 1000, False
        names = NAMES if power == 1 else {**NAMES, len(NAMES): "they disagree"}
        super().__init__(id2label=names, label2id={name: label for label, name in names.items()}, **kwargs)


class MixtureClassifier(PreTrainedModel):
    """The exact log p(y | x_t) or, with a power s, the exact log E[p(y | x_0)^s | x_t].

    The latter is the probability that s labels, drawn independently given x_0, are all y; so one class more says that
    they are not all the same. It is tabulated, for the integral takes long: cubic Hermite interpolation of exact
    values and slopes, 0.02 apart, has errors of some 1e-7.
    """

    config_class = MixtureClassifierConfig

    def __init__(self, config):
        super().__init__(config)
        self.mixture = GaussianMixture()
        self.alphas_cumprod = nn.Parameter(ALPHAS_CUMPROD.clone())
        self.tables = {}
        self.post_init()

    def forward(self, pixel_values, timestep):
        x, alpha = pixel_values.flatten(), self.alphas_cumprod[timestep]
        if self.config.power == 1:
            return ImageClassifierOutput(logits=self.mixture.log_posterior(x, alpha))
        agreed = self.interpolate(x, alpha)
        disagreed = torch.log1p(-agreed.exp().sum(-1, keepdim=True))
        return ImageClassifierOutput(logits=torch.cat([agreed, disagreed], dim=-1))

    def interpolate(self, x, alpha, width=0.02, end=6.0):
        if alpha.item() not in self.tables:
            nodes = torch.arange(-end, end + width, width).double()
            self.tables[alpha.item()] = self.mixture.log_tempered(nodes, alpha, self.config.power)
        values, slopes = self.tables[alpha.item()]
        place = ((x + end) / width).clamp(0, len(values) - 1.001)
        i = place.detach().long()
        u = (place - i)[:, None]
        low = (1 + 2 * u) * (1 - u) ** 2 * values[i] + u * (1 - u) ** 2 * width * slopes[i]
        return low + u**2 * (3 - 2 * u) * values[i + 1] - u**2 * (1 - u) * width * slopes[i + 1]


# The continuous limits of the samplers, solved otherwise than by samples


def guided_score(mixture, x, alpha, label, scale):
    """d log p(x_t) + scale * d log p(y | x_t), for one class."""
    scores = mixture.scores(x, alpha)
    return scores[..., -1] + scale * (scores[..., label] - scores[..., -1])


def log_snr_levels(steps):
    """Alphas from the noisiest timestep to no noise, evenly apart in the logarithm of the signal-to-noise ratio."""
    return torch.linspace(ALPHAS_CUMPROD[-1].logit(), 14, steps + 1, dtype=torch.float64).sigmoid()


def flow_cdf(mixture, label, scale, steps=600):
    """The distribution function on `GRID` to which the guided probability-flow ODE carries noise, by Runge-Kutta.

    With u = x_t / sqrt(alpha) and r = sqrt(1 / alpha - 1) it is du/dr = -sqrt(1 - alpha) * score. The line keeps its
    order under it, so that each quantile of the noise becomes that quantile of the samples.
    """

    def slope(r, u):
        alpha = 1 / (1 + r**2)
        return -((1 - alpha) ** 0.5) * guided_score(mixture, alpha**0.5 * u, alpha, label, scale)

    noise = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    alphas = log_snr_levels(steps)
    u = noise / alphas[0] ** 0.5
    for r, r_next in (1 / alphas - 1).sqrt().unfold(0, 2, 1):
        h = r_next - r
        k1 = slope(r, u)
        k2 = slope(r + h / 2, u + h / 2 * k1)
        k3 = slope(r + h / 2, u + h / 2 * k2)
        u = u + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(r_next, u + h * k3))
    return torch.from_numpy(np.interp(GRID.numpy(), u.numpy(), torch.special.ndtr(noise).numpy()))


def diffused_cdf(mixture, label, scale, eta=1.0, steps=600):
    """The distribution function on `GRID` to which the guided reverse SDE carries noise, by its Fokker-Planck equation.

    dx = (x / 2 + (1 + eta^2) / 2 * score) dlog(alpha) + eta dW, eta being DDIM's share of noise, in central differences
    and Crank and Nicolson's steps.
    """
    width = (GRID[1] - GRID[0]).item()
    density = (-(GRID**2) / 2).exp().numpy()
    alphas = log_snr_levels(steps)
    for alpha, alpha_next in alphas.unfold(0, 2, 1):
        step = (alpha_next / alpha).log().item()
        middle = (alpha * alpha_next) ** 0.5
        drift = GRID / 2 + (1 + eta**2) / 2 * guided_score(mixture, GRID, middle, label, scale)
        flow, spread = step * drift.numpy() / (2 * width), step * eta**2 / (2 * width**2)
        # the change of density[i] is above * density[i + 1] + below * density[i - 1] - 2 * spread * density[i]
        above, below = spread - np.append(flow[1:], 0), spread + np.append(0, flow[:-1])
        change = above * np.append(density[1:], 0) + below * np.append(0, density[:-1]) - 2 * spread * density
        bands = np.stack([-np.append(0, above[:-1]) / 2, np.full(len(GRID), 1 + spread), -np.append(below[1:], 0) / 2])
        density = solve_banded((1, 1), bands, density + change / 2)
    return cumulated(torch.from_numpy(density))
