"""Faster, smaller equivalents of operations of torch, on which `layers.py` builds."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_input

NORM_GROUPS = 32


class _FrozenConvolution(torch.autograd.Function):
    """A convolution with frozen parameters. torch's own would keep its input nevertheless."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.geometry = (x.shape, stride, padding)
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        shape, stride, padding = ctx.geometry
        return conv2d_input(shape, weight.to(grad.dtype), grad, stride, padding), None, None, None, None


class Conv2d(nn.Conv2d):
    """A convolution that keeps only its weight where the gradient is with respect to the input alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() or any(parameter.requires_grad for parameter in self.parameters()):
            return super().forward(x)
        return _FrozenConvolution.apply(x, self.weight, self.bias, self.stride, self.padding)


class ZeroConv2d(Conv2d):
    """A convolution that starts at zero, so that its residual branch starts as the identity."""

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero."""

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class _NormSiLU(torch.autograd.Function):
    """GroupNorm and SiLU with a gain and an offset per image, of shape `(batch, channels)`.

    The batch is folded into the channels, so that torch's kernels apply all gains and offsets in one pass. Only the
    input is kept for the backward pass, which recomputes the normalised activations.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gain: torch.Tensor, offset: torch.Tensor, num_groups: int, eps: float
    ) -> torch.Tensor:
        x = x.to(gain.dtype)  # under autocast, which leaves norms in float32
        batch, channels, *sides = x.shape
        ctx.geometry = (1, batch * channels, math.prod(sides), batch * num_groups)
        side_by_side = x.reshape(1, batch * channels, -1).contiguous()
        arguments = (side_by_side, gain.flatten(), offset.flatten(), *ctx.geometry, eps)
        normed, mean, rstd = torch.ops.aten.native_group_norm(*arguments)
        ctx.save_for_backward(x, gain, offset, mean, rstd)
        return F.silu(normed, inplace=True).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, gain, offset, mean, rstd = ctx.saved_tensors
        batch, channels = gain.shape
        of_groups = (batch, ctx.geometry[3] // batch, -1)
        scale = (rstd.view(of_groups) * gain.view(of_groups)).flatten(1)
        shift = offset - (mean.view(of_groups) * scale.view(of_groups)).flatten(1)
        before = torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None])
        grad = torch.ops.aten.silu_backward.grad_input(grad, before, grad_input=before)
        d_x, d_gain, d_offset = torch.ops.aten.native_group_norm_backward(
            grad.reshape(1, batch * channels, -1).contiguous(),  # required by the backward kernel
            x.reshape(1, batch * channels, -1).contiguous(),
            mean,
            rstd,
            gain.flatten(),
            *ctx.geometry,
            [True, ctx.needs_input_grad[1], ctx.needs_input_grad[2]],
        )
        d_gain, d_offset = (None if d is None else d.view(batch, channels) for d in (d_gain, d_offset))
        return d_x.view(x.shape), d_gain, d_offset, None, None


class GroupNormSiLU(nn.GroupNorm):
    """Group normalisation, adaptive if `scale` and `shift` are given, and then SiLU.

    AdaGN(h, y) = y_s GroupNorm(h) + y_b (section 3.1), with y_s = 1 + `scale` and y_b = `shift`, of shape `(batch,
    channels)`. Two passes over the pixels forward and three backward; only the input is kept.
    """

    def __init__(self, channels: int):
        super().__init__(NORM_GROUPS, channels)

    def forward(
        self, hidden_states: torch.Tensor, scale: torch.Tensor | None = None, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        if scale is None or shift is None:
            gain, offset = (values.expand(hidden_states.shape[:2]) for values in (self.weight, self.bias))
        else:
            scale, shift = scale.to(self.weight.dtype), shift.to(self.weight.dtype)
            gain, offset = self.weight * (1 + scale), torch.addcmul(shift, self.bias, 1 + scale)
        if not torch.compiler.is_compiling():
            return _NormSiLU.apply(hidden_states, gain, offset, self.num_groups, self.eps)
        normed = F.group_norm(hidden_states.to(gain.dtype), self.num_groups, eps=self.eps)  # fused by the compiler
        return F.silu(normed * gain[:, :, None, None] + offset[:, :, None, None])


class UpsampleConv2d(nn.Conv2d):
    """Nearest-neighbour upsampling by two and a 3x3 convolution, with 4/9 of the multiplications.

    At most four of the nine pixels under the kernel differ, so weights of equal pixels are added first. The result is a
    transposed convolution of stride two; its 4x4 kernel is the 3x3 one convolved with upsampling's 2x2 box.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        flipped = torch.eye(3, dtype=self.weight.dtype, device=self.weight.device).flip(0)
        box = F.pad(flipped, (0, 0, 0, 1)) + F.pad(flipped, (0, 0, 1, 0))  # (4, 3), for each axis of the kernel
        kernel = (self.weight.flatten(2) @ torch.kron(box, box).T).unflatten(2, (4, 4))
        return F.conv_transpose2d(hidden_states, kernel.transpose(0, 1), self.bias, stride=2, padding=1)
