"""The layers that compute in another way than they are written down: equal to the plain way, and cheaper."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_guided.models.ops import Conv2d, GroupNormSiLU, UpsampleConv2d


def randomised(layer):
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def kept_bytes(function, *frozen):
    """Bytes that a call keeps for its backward pass, beside parameters."""
    parameters = {parameter.untyped_storage()._cdata for layer in frozen for parameter in layer.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = function()  # kept alive, and with it every storage counted
    assert output.requires_grad
    return sum(kept.values())


# Group normalisation with its activation


def plain_norm(layer, x, scale=None, shift=None):
    """Written down as in section 3.1."""
    hidden = F.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)
    if scale is not None:
        hidden = (1 + scale[:, :, None, None]) * hidden + shift[:, :, None, None]
    return F.silu(hidden)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_norm_and_its_gradients(batch, adaptive, memory_format):
    torch.manual_seed(0)
    layer = randomised(GroupNormSiLU(96)).double()
    x = (3 * torch.randn(batch, 96, 5, 3).double() + 1).to(memory_format=memory_format).requires_grad_()
    conditions = [torch.randn(batch, 96).double().requires_grad_() for _ in range(2 * adaptive)]
    direction = torch.randn(batch, 96, 5, 3).double().to(memory_format=memory_format)
    inputs = [x, layer.weight, layer.bias, *conditions]

    expected, actual = plain_norm(layer, x, *conditions), layer(x, *conditions)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, direction), torch.autograd.grad(expected, inputs, direction)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_in_half_precision(dtype):
    """Sums over pixels are made in float32: 4,096 pixels of 64 would overflow float16."""
    torch.manual_seed(0)
    layer = randomised(GroupNormSiLU(32)).to(dtype)
    exact = randomised(GroupNormSiLU(32))
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(2, 32, 64, 64).to(dtype)

    def results(module, function):
        image = x.to(module.weight.dtype).requires_grad_()
        output = function(image)
        return [output, torch.autograd.grad(output, image, torch.full_like(output, 64.0))[0]]

    def errors(found, expected):
        return [(a.float() - b).norm() / b.norm() for a, b in zip(found, expected, strict=True)]

    expected = results(exact, exact)
    plain = errors(results(layer, lambda image: plain_norm(layer, image)), expected)
    for error, plain_error in zip(errors(results(layer, layer), expected), plain, strict=True):
        assert error < 1.1 * plain_error


def test_norm_under_autocast_is_computed_in_float32():
    torch.manual_seed(0)
    layer = randomised(GroupNormSiLU(32))
    x = torch.randn(2, 32, 8, 8).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, layer(x.detach().float()))
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert gradient.dtype == torch.bfloat16


def test_norm_keeps_its_input_alone():
    layer = GroupNormSiLU(64)
    x = torch.randn(2, 64, 16, 16, requires_grad=True)
    assert kept_bytes(lambda: layer(x), layer) < 1.05 * x.nbytes  # and two numbers for each group
    assert kept_bytes(lambda: plain_norm(layer, x), layer) > 1.95 * x.nbytes


# Convolutions


@pytest.mark.parametrize("stride", [1, 2])
def test_frozen_convolution_keeps_nothing(stride):
    torch.manual_seed(0)
    layer = randomised(Conv2d(8, 16, 3, stride=stride, padding=1)).double()
    x = torch.randn(2, 8, 6, 6).double().requires_grad_()
    expected = layer(x)
    direction = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(expected, x, direction)
    assert kept_bytes(lambda: layer(x), layer) == x.nbytes

    layer.requires_grad_(False)
    assert kept_bytes(lambda: layer(x), layer) == 0
    actual = layer(x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, x, direction)[0], gradient)


def test_a_bias_alone_can_be_trained():
    layer = randomised(Conv2d(4, 8, 3, padding=1))
    layer.weight.requires_grad_(False)
    (gradient,) = torch.autograd.grad(layer(torch.randn(2, 4, 5, 5)).sum(), layer.bias)
    torch.testing.assert_close(gradient, torch.full((8,), 50.0))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_upsampling_convolution(memory_format):
    torch.manual_seed(0)
    layer = randomised(UpsampleConv2d(6, 10)).double().to(memory_format=memory_format)
    x = torch.randn(2, 6, 5, 7).double().to(memory_format=memory_format).requires_grad_()
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), layer.weight, layer.bias, padding=1)
    actual = layer(x)
    torch.testing.assert_close(actual, expected)
    inputs, direction = [x, layer.weight, layer.bias], torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, direction), torch.autograd.grad(expected, inputs, direction)
    )
