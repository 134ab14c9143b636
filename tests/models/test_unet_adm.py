"""What the UNet computes and refuses, and all that diffusers offers around a model."""

import json

import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn

from hf_guided import ADMUNet2DModel
from hf_guided.models.layers import ADMAttention, ADMResnetBlock
from hf_guided.models.ops import ZeroConv2d, ZeroLinear

LABELS = torch.tensor([3, 0])
TIMESTEPS = torch.tensor([17, 800])


@pytest.fixture(scope="module")
def unet(tiny_unet):
    return tiny_unet()


@pytest.fixture(scope="module")
def x(randn):
    return randn(2, 3, 16, 16)


@pytest.fixture(scope="module")
def expected(unet, x):
    with torch.no_grad():
        return unet(x, TIMESTEPS, LABELS).sample


@torch.no_grad()
def run(unet, x, timesteps=TIMESTEPS, labels=LABELS, **kwargs):
    return unet(x, timesteps, labels, **kwargs).sample


# Its call


def test_outputs_as_object_and_tuple(unet, x, expected):
    with torch.no_grad():
        (output,) = unet(x, TIMESTEPS, LABELS, return_dict=False)
    assert torch.equal(output, expected)
    assert expected.shape == (2, 6, 16, 16)


def test_images_do_not_see_each_other(unet, x, expected, error):
    for i in range(2):
        assert error(run(unet, x[i : i + 1], TIMESTEPS[i], LABELS[i : i + 1]), expected[i : i + 1]) < 1e-5


def test_timestep_forms_agree(unet, x):
    expected = run(unet, x, torch.tensor([40, 40]))
    for timestep in (40, 40.0, torch.tensor(40), torch.tensor([40]), torch.tensor(40.0), torch.tensor([40.0, 40.0])):
        assert torch.equal(run(unet, x, timestep), expected)


def test_fractional_timesteps_lie_between(unet, x, error):
    low, middle, high = (run(unet, x, t) for t in (40, 40.5, 41))
    assert error(middle, low) > 1e-3
    assert error(middle, (low + high) / 2) < 0.25 * error(high, low)


def test_labels_and_timesteps_matter(unet, x, expected, error):
    assert error(run(unet, x, TIMESTEPS.flip(0)), expected) > 1e-2
    assert error(run(unet, x, labels=LABELS.flip(0)), expected) > 1e-2


def test_gradients_reach_every_weight_and_the_image(tiny_unet, x):
    unet = tiny_unet(low_res_channels=1, null_class_label=True)
    image = x.clone().requires_grad_()
    unet(image, TIMESTEPS, torch.arange(5)[:2], low_res=x[:, :1]).sample.square().sum().backward()
    assert image.grad.abs().min() > 0
    assert all(parameter.grad.abs().max() > 0 for parameter in unet.parameters())


# Shapes


@pytest.mark.parametrize("resblock_updown", [True, False])
@pytest.mark.parametrize("height_width", [(16, 16), (8, 24), (20, 6), (2, 2)])
def test_any_sides_that_divide(tiny_unet, randn, height_width, resblock_updown):
    output = run(tiny_unet(resblock_updown=resblock_updown), randn(2, 3, *height_width))
    assert output.shape == (2, 6, *height_width)
    assert output.isfinite().all()


@pytest.mark.parametrize(("height", "width"), [(15, 16), (16, 18)])
def test_sides_that_do_not_divide(tiny_unet, randn, height, width):
    with pytest.raises(ValueError, match=f"{height}x{width} cannot be halved 2 times.*multiples of 4"):
        run(tiny_unet(channel_mult=(1, 1, 1)), randn(2, 3, height, width))


@pytest.mark.parametrize("channels", [1, 5])
def test_other_numbers_of_channels(tiny_unet, randn, channels):
    unet = tiny_unet(in_channels=channels, out_channels=2 * channels)
    assert run(unet, randn(2, channels, 16, 16)).shape == (2, 2 * channels, 16, 16)


def test_a_fixed_variance_has_no_second_half(tiny_unet, x):
    assert run(tiny_unet(out_channels=3), x).shape == x.shape


def test_a_fractional_multiplier(tiny_unet, x):
    unet = tiny_unet(model_channels=64, channel_mult=(0.5, 1))
    assert unet.conv_in.out_channels == 32
    assert unet.time_embedding.linear_1.in_features == 64
    assert run(unet, x).isfinite().all()


# Where attention sits


def attention_levels(unet):
    return [len(block.attentions) > 0 for block in unet.down_blocks], [
        len(block.attentions) > 0 for block in unet.up_blocks
    ]


@pytest.mark.parametrize(
    ("sample_size", "resolutions", "levels"),
    [
        (16, (8,), [False, True, False]),
        (16, [16, 4], [True, False, True]),
        (16, (7, 32, 2, 1), [False, False, False]),
        (16, (), [False, False, False]),
        ((8, 16), (8,), [True, False, False]),
        ([16, 8], (8,), [False, True, False]),
        (12, (12, 6, 3), [True, True, True]),
        (10, (2, 10), [True, False, False]),
    ],
)
def test_attention_resolutions_are_side_lengths_of_the_height(tiny_unet, sample_size, resolutions, levels):
    unet = tiny_unet(sample_size=sample_size, channel_mult=(1, 1, 1), attention_resolutions=resolutions)
    assert attention_levels(unet) == (levels, levels[::-1])
    assert len(unet.mid_block.attentions) == 1


def test_heads():
    def heads(**arguments):
        unet = ADMUNet2DModel(
            sample_size=8,
            model_channels=64,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(8, 4),
            **arguments,
        )
        return [
            [module.heads for module in part.modules() if isinstance(module, ADMAttention)]
            for part in (unet.down_blocks, unet.mid_block, unet.up_blocks)
        ]

    assert heads() == heads(attention_head_dim=64) == [[1, 2], [2], [2, 2, 1, 1]]
    assert heads(attention_head_dim=32) == [[2, 4], [4], [4, 4, 2, 2]]
    assert heads(num_heads=4) == [[4, 4], [4], [4, 4, 4, 4]]
    assert heads(num_heads=4, num_heads_upsample=8) == [[4, 4], [4], [8, 8, 8, 8]]


def test_attention_sees_every_pixel(tiny_unet, x, error):
    """Without attention a far pixel is out of reach at these few layers; with it, it is not."""
    moved = x.clone()
    moved[:, :, 0, 0] += 1

    def reach(attention):
        unet = tiny_unet(channel_mult=(1,), attention_resolutions=attention, attention_head_dim=16)
        if not attention:
            unet.mid_block.attentions[0].to_out.weight.data.zero_()
        for module in unet.modules():  # group normalisation would carry it everywhere
            if isinstance(module, nn.GroupNorm):
                module.forward = lambda hidden_states, *scale_and_shift: hidden_states
        return (run(unet, moved) - run(unet, x))[:, :, -1, -1].abs().max()

    assert reach(()) == 0
    assert reach((16,)) > 0


# Labels and low resolution


def test_null_label(tiny_unet, x, error):
    unet = tiny_unet(null_class_label=True)
    assert unet.class_embedding.num_embeddings == 6
    null = run(unet, x, labels=torch.tensor([5, 5]))
    assert torch.equal(run(unet, x, labels=None), null)
    assert error(run(unet, x), null) > 1e-2
    mixed = run(unet, x, labels=torch.tensor([3, 5]))
    assert error(mixed[1:], null[1:]) < 1e-5
    assert error(mixed[:1], null[:1]) > 1e-2


def test_missing_and_unexpected_labels(tiny_unet, unet, x):
    with pytest.raises(ValueError, match="class-conditional and has no null label: class_labels must be given"):
        run(unet, x, labels=None)
    unconditional = tiny_unet(num_class_embeds=None)
    assert run(unconditional, x, labels=None).shape == (2, 6, 16, 16)
    with pytest.raises(ValueError, match=r"unconditional .*class_labels must be None"):
        run(unconditional, x)
    with pytest.raises(ValueError, match="null_class_label=True needs num_class_embeds"):
        tiny_unet(num_class_embeds=None, null_class_label=True)


def test_low_res_is_upsampled_bilinearly(tiny_unet, x, randn, error):
    unet = tiny_unet(low_res_channels=2)
    low_res = randn(2, 2, 4, 4)
    upsampled = nn.functional.interpolate(low_res, (16, 16), mode="bilinear", align_corners=False)
    output = run(unet, x, low_res=low_res)
    assert torch.equal(output, run(unet, x, low_res=upsampled))
    assert error(run(unet, x, low_res=randn(2, 2, 4, 4, seed=1)), output) > 1e-2


def test_missing_and_unexpected_low_res(tiny_unet, unet, x):
    with pytest.raises(ValueError, match="low_res_channels=None and low_res is given"):
        run(unet, x, low_res=x)
    with pytest.raises(ValueError, match="low_res_channels=3 and low_res is not given"):
        run(tiny_unet(low_res_channels=3), x)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"model_channels": 48}, "model_channels=48 times the entry 1 of channel_mult gives 48 channels"),
        ({"channel_mult": (0.5, 1)}, "times the entry 0.5 of channel_mult gives 16 channels"),
        ({"channel_mult": (0, 1)}, r"channel_mult=\(0, 1\) is not allowed in the config of ADMUNet2DModel"),
        ({"num_heads": 2, "attention_head_dim": 16}, "num_heads=2 and attention_head_dim=16 contradict each other"),
        ({"num_heads": 3}, "64 channels do not divide into 3 attention heads"),
        ({"attention_head_dim": 48}, "64 channels do not divide into attention heads of width 48"),
        ({"attention_head_dim": None, "attention_resolutions": (16,)}, "32 channels do not divide .* of width 64"),
        ({"num_heads_upsample": 2}, "num_heads_upsample=2 needs num_heads too"),
    ],
)
def test_contradicting_arguments(tiny_unet, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny_unet(**arguments)


# Initialisation


def test_a_fresh_unet_predicts_zero(x):
    torch.manual_seed(0)
    unet = ADMUNet2DModel(
        sample_size=16,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(8,),
        attention_head_dim=16,
    )
    assert not run(unet, x, labels=None).any()
    zeros = [module for module in unet.modules() if isinstance(module, ZeroConv2d | ZeroLinear)]
    assert len(zeros) == 15  # 10 residual blocks, 4 attention layers, the output
    for module in unet.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert module.weight.any() == (module not in zeros)


# Saving and loading


def test_save_and_load_is_bit_equal(tiny_unet, x, tmp_path):
    unet = tiny_unet(sample_size=(16, 8), null_class_label=True, dropout=0.25)
    unet.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded = ADMUNet2DModel.from_pretrained(tmp_path)
    assert not loaded.training
    config = json.loads(loaded.to_json_string())
    assert config == json.loads(unet.to_json_string())
    for name, tensor in unet.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert torch.equal(run(loaded, x), run(unet, x))


def test_from_config(unet):
    fresh = ADMUNet2DModel.from_config(unet.config)
    assert dict(fresh.config) == dict(unet.config)
    assert fresh.num_parameters() == unet.num_parameters() == sum(p.numel() for p in unet.parameters())
    assert ADMUNet2DModel.from_config(unet.config, out_channels=3).conv_out.out_channels == 3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
def test_half_precision(tiny_unet, x, expected, error, dtype, tolerance, tmp_path):
    unet = tiny_unet()
    unet.to(dtype).save_pretrained(tmp_path)
    assert unet.dtype == dtype
    loaded = ADMUNet2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    output = run(loaded, x.to(dtype))
    assert output.dtype == dtype
    assert torch.equal(output, run(unet, x.to(dtype)))
    assert error(output, expected) < tolerance


def test_loading_in_another_precision(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    loaded = ADMUNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.float16)
    for name, tensor in unet.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half())


def test_variant(tiny_unet, x, tmp_path):
    unet = tiny_unet().half()
    unet.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "diffusion_pytorch_model.fp16.safetensors").exists()
    loaded = ADMUNet2DModel.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert torch.equal(run(loaded, x.half()), run(unet, x.half()))
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        ADMUNet2DModel.from_pretrained(tmp_path)


def test_double_precision(tiny_unet, x, expected, error):
    output = run(tiny_unet().double(), x.double())
    assert output.dtype == torch.float64
    assert error(output, expected) < 1e-5


def test_sharded_checkpoint(unet, x, expected, tmp_path):
    unet.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(run(ADMUNet2DModel.from_pretrained(tmp_path), x), expected)


def test_training_mode(tiny_unet, x, error):
    unet = tiny_unet(dropout=0.5)
    expected = run(unet, x)
    assert torch.equal(run(unet, x), expected)
    unet.train()
    torch.manual_seed(0)
    first = run(unet, x)
    assert error(run(unet, x), first) > 1e-3
    unet.eval()
    assert torch.equal(run(unet, x), expected)


# What diffusers offers around a model


def test_gradient_checkpointing(tiny_unet, randn, error, backward):
    unet = tiny_unet(num_res_blocks=2).train()
    x = randn(2, 3, 16, 16)

    def call():
        return unet(x, TIMESTEPS, LABELS).sample.square().mean()

    plain_bytes, plain = backward(unet, call)
    unet.enable_gradient_checkpointing()
    assert unet.is_gradient_checkpointing
    checkpointed_bytes, checkpointed = backward(unet, call)
    assert checkpointed_bytes < 0.5 * plain_bytes
    assert all(error(a, b) < 1e-5 for a, b in zip(checkpointed, plain, strict=True))
    unet.disable_gradient_checkpointing()
    assert backward(unet, call)[0] == plain_bytes


def test_compile_in_one_graph(tiny_unet, x, error):
    unet = tiny_unet(low_res_channels=3, null_class_label=True, attention_resolutions=())
    inputs = {"labels": None, "low_res": x[:, :, ::2, ::2]}
    torch._dynamo.reset()
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    assert error(run(compiled, x, **inputs), run(unet, x, **inputs)) < 1e-5


def test_compile_repeated_blocks(tiny_unet, x, expected, error):
    unet = tiny_unet()
    torch._dynamo.reset()
    unet.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert error(run(unet, x), expected) < 1e-5


def test_channels_last(tiny_unet, x, expected, error):
    unet = tiny_unet().to(memory_format=torch.channels_last)
    output = run(unet, x.to(memory_format=torch.channels_last))
    assert error(output, expected) < 1e-5


@pytest.fixture
def default_backend():
    """Choosing a backend for one model also changes diffusers' default for all; this changes it back."""
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


@pytest.mark.usefixtures("default_backend")
def test_attention_backends(tiny_unet, x, expected, error):
    unet = tiny_unet()
    for backend in ("_native_math", "native"):
        unet.set_attention_backend(backend)
        processors = {module.processor for module in unet.modules() if isinstance(module, ADMAttention)}
        assert {processor._attention_backend.value for processor in processors} == {backend}
        assert error(run(unet, x), expected) < 1e-5
    unet.set_attention_backend("_native_cudnn")
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    assert error(run(tiny_unet(), x), expected) < 1e-5
    with pytest.raises((RuntimeError, AssertionError)):  # has no kernel on the CPU: the choice reaches the call
        run(unet, x)


def test_attention_processors_are_exposed(tiny_unet):
    unet = tiny_unet()
    assert sorted(unet.attn_processors) == [
        "down_blocks.1.attentions.0.processor",
        "mid_block.attentions.0.processor",
        "up_blocks.0.attentions.0.processor",
        "up_blocks.0.attentions.1.processor",
    ]

    class Nothing:
        def __call__(self, attn, query, key, value):
            return torch.zeros_like(value)

    unet.set_attn_processor(Nothing())
    attention = unet.mid_block.attentions[0]
    hidden_states = torch.randn(1, 64, 2, 2)
    assert torch.equal(attention(hidden_states), hidden_states + attention.to_out.bias[:, None, None])


def test_fused_projections(tiny_unet, x, expected, error):
    unet = tiny_unet()
    unet.fuse_qkv_projections()
    attention = unet.mid_block.attentions[0]
    assert attention.fused_projections
    attention.to_q.weight.data.fill_(torch.nan)  # it is the fused one that is used
    assert error(run(unet, x), expected) < 1e-5
    unet.unfuse_qkv_projections()
    assert run(unet, x).isnan().any()


def test_layerwise_casting(tiny_unet, x, expected, error):
    unet = tiny_unet()
    full = unet.get_memory_footprint()
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert unet.get_memory_footprint() < 0.5 * full
    for name, parameter in unet.named_parameters():
        kept = any(part in name for part in ("norm", "time_embedding", "class_embedding", "conv_in", "conv_out"))
        assert parameter.dtype == (torch.float32 if kept else torch.float8_e4m3fn), name
    output = run(unet, x)
    assert output.dtype == torch.float32
    assert 0 < error(output, expected) < 0.3


@pytest.mark.parametrize(
    "offload", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_group_offload(tiny_unet, x, expected, offload):
    unet = tiny_unet()
    unet.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **offload)
    assert torch.equal(run(unet, x), expected)


def test_group_offload_to_disk(tiny_unet, x, expected, tmp_path):
    unet = tiny_unet()
    apply_group_offloading(
        unet, onload_device=torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
    )
    assert torch.equal(run(unet, x), expected)


def test_placed_by_accelerate(tiny_unet, x, expected, tmp_path):
    unet = tiny_unet()
    whole = {name for name, module in unet.named_modules() if isinstance(module, ADMResnetBlock | ADMAttention)}
    size = unet.get_memory_footprint()
    for tenth in (3, 4, 5, 6, 7):
        device_map = infer_auto_device_map(unet, {"cpu": size * tenth // 10, "disk": size}, unet._no_split_modules)
        assert set(device_map.values()) == {"cpu", "disk"}
        assert not any(placed.startswith(f"{name}.") for placed in device_map for name in whole)
    dispatch_model(unet, device_map, main_device="cpu", offload_dir=str(tmp_path))
    assert torch.equal(run(unet, x), expected)
