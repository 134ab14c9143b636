"""What the noisy-image classifier computes and refuses, and all that transformers offers around a model."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    pipeline,
)

from hf_guided import ADMClassifierConfig, ADMForImageClassification, ADMImageProcessor
from hf_guided.models.images import resize_and_crop, to_pixel_values
from hf_guided.models.layers import ADMAttentionPool
from hf_guided.models.ops import ZeroConv2d, ZeroLinear

TIMESTEPS = torch.tensor([17, 800])
POOLS = ("adaptive", "attention", "spatial", "spatial_v2")
NAMES = {0: "cat", 1: "dog", 2: "newt"}


@pytest.fixture(scope="module")
def classifier(tiny_classifier):
    return tiny_classifier(id2label=NAMES)


@pytest.fixture(scope="module")
def x(randn):
    return randn(2, 3, 16, 16)


@pytest.fixture(scope="module")
def expected(classifier, x):
    return run(classifier, x)


@torch.no_grad()
def run(classifier, x, timestep=TIMESTEPS, **kwargs):
    return classifier(x, timestep, **kwargs).logits


# Its call


def test_no_timestep_means_clean(classifier, x, error):
    clean = run(classifier, x, None)
    for timestep in (0, 0.0, torch.tensor(0), torch.tensor([0, 0])):
        assert torch.equal(run(classifier, x, timestep), clean)
    assert error(run(classifier, x), clean) > 1e-2
    assert torch.equal(run(classifier, x, 12.0), run(classifier, x, torch.tensor([12, 12])))
    assert error(run(classifier, x, 12.5), run(classifier, x, 12)) > 1e-4


def test_images_do_not_see_each_other(classifier, x, expected, error):
    for i in range(2):
        assert error(run(classifier, x[i : i + 1], TIMESTEPS[i]), expected[i : i + 1]) < 1e-5


def test_outputs(classifier, x, expected):
    labels = torch.tensor([2, 0])
    with torch.no_grad():
        output = classifier(x, TIMESTEPS, labels=labels, output_hidden_states=True)
        as_tuple = classifier(x, TIMESTEPS, labels=labels, output_hidden_states=True, return_dict=False)
    assert torch.equal(output.logits, expected)
    assert torch.equal(output.loss, nn.functional.cross_entropy(expected, labels))
    assert [tuple(feature_map.shape) for feature_map in output.hidden_states] == [
        (2, 32, 16, 16), (2, 32, 16, 16), (2, 32, 8, 8), (2, 64, 8, 8), (2, 64, 8, 8)
    ]  # fmt: skip
    for ours, tuples in zip(output.to_tuple(), as_tuple, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, tuples, strict=True)) if isinstance(ours, tuple) else (
            torch.equal(ours, tuples)
        )  # fmt: skip


def test_the_config_chooses_what_is_returned(tiny_classifier, x):
    classifier = tiny_classifier(output_hidden_states=True)
    with torch.no_grad():
        assert len(classifier(x).hidden_states) == 5
        assert classifier(x, output_hidden_states=False).hidden_states is None
        classifier.config.return_dict = False
        assert isinstance(classifier(x), tuple)
        assert torch.equal(classifier(x, output_hidden_states=False)[0], classifier(x, return_dict=True).logits)
        assert not isinstance(classifier(x, return_dict=True), tuple)


@pytest.mark.parametrize("pool", POOLS)
def test_gradients_reach_every_weight_and_the_image(tiny_classifier, x, pool):
    classifier = tiny_classifier(pool=pool)
    image = x.clone().requires_grad_()
    classifier(image, TIMESTEPS, labels=torch.tensor([2, 0])).loss.backward()
    assert image.grad.abs().min() > 0
    for name, parameter in classifier.named_parameters():
        # A constant added to all keys moves all weights of attention alike.
        assert parameter.grad.abs().max() > (0 if not name.endswith("to_k.bias") else -1), name


# Shapes and refusals


@pytest.mark.parametrize("pool", ["adaptive", "spatial", "spatial_v2"])
def test_heads_without_positions_take_any_sides_that_divide(tiny_classifier, randn, pool):
    classifier = tiny_classifier(pool=pool)
    assert run(classifier, randn(2, 3, 8, 24)).isfinite().all()
    with pytest.raises(ValueError, match="8x23 cannot be halved 1 times"):
        run(classifier, randn(2, 3, 8, 23))


def test_attention_pool_of_a_pair(tiny_classifier, randn, x):
    classifier = tiny_classifier(sample_size=[8, 24], attention_resolutions=[4])
    assert classifier.head.classifier.position_embedding.shape == (1 + 4 * 12, 64)
    assert len(classifier.down_blocks[1].attentions) == 1
    assert run(classifier, randn(2, 3, 8, 24)).shape == (2, 3)
    for height, width in ((24, 8), (16, 16), (16, 12)):
        with pytest.raises(ValueError, match=f"Images of {height}x{width} were given; .* takes exactly 8x24"):
            run(classifier, randn(2, 3, height, width))


@pytest.mark.parametrize("channels", [1, 5])
def test_other_numbers_of_channels(tiny_classifier, randn, channels):
    assert run(tiny_classifier(in_channels=channels), randn(2, channels, 16, 16)).shape == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"pool": "mean"}, "pool='mean' is not one of adaptive, attention, spatial, spatial_v2"),
        ({"model_channels": 48}, "multiple of 32"),
        ({"num_heads": 2, "attention_head_dim": 16}, "contradict each other"),
        ({"num_heads": 3}, "do not divide into 3 attention heads"),
    ],
)
def test_contradicting_arguments(tiny_classifier, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny_classifier(**arguments)


# Initialisation


@pytest.mark.parametrize("pool", POOLS)
def test_a_fresh_classifier_starts_as_torch_does(pool):
    torch.manual_seed(0)
    config = ADMClassifierConfig(
        sample_size=16,
        model_channels=64,
        channel_mult=[1, 2],
        num_res_blocks=1,
        attention_resolutions=[8],
        num_labels=200,
        pool=pool,
    )
    classifier = ADMForImageClassification(config)
    for name, module in classifier.named_modules():
        if isinstance(module, ZeroConv2d | ZeroLinear):
            assert not module.weight.any()
            assert not module.bias.any()
        elif isinstance(
            module, nn.Conv2d | nn.Linear
        ):  # uniform up to 1 / sqrt(inputs), 0.577 of which is the deviation
            bound = module.weight[0].numel() ** -0.5
            assert 0.98 * bound < module.weight.abs().max() <= bound, name
            assert module.weight.std().item() == pytest.approx(3**-0.5 * bound, rel=0.05), name
            assert 0.8 * bound < module.bias.abs().max() <= bound, name
        elif isinstance(module, nn.GroupNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()
        elif isinstance(module, ADMAttentionPool):
            assert module.position_embedding.std().item() == pytest.approx(128**-0.5, rel=0.05)


# Saving and loading


@pytest.mark.parametrize("pool", POOLS)
def test_save_and_load_is_bit_equal(tiny_classifier, x, pool, tmp_path):
    classifier = tiny_classifier(pool=pool, id2label=NAMES, beta_schedule="squaredcos_cap_v2")
    classifier.save_pretrained(tmp_path)
    files = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert {path.name for path in tmp_path.iterdir()} == files
    loaded = ADMForImageClassification.from_pretrained(tmp_path)
    assert not loaded.training
    for name, tensor in classifier.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert torch.equal(run(loaded, x), run(classifier, x))
    ours, theirs = (json.loads(model.config.to_json_string(use_diff=False)) for model in (classifier, loaded))
    assert theirs.pop("_name_or_path") == str(tmp_path)
    assert {**ours, "_name_or_path": ""} == {**theirs, "_name_or_path": ""}
    assert loaded.config.id2label == NAMES


def test_every_parameter_and_buffer_is_saved(classifier):
    """transformers leaves what is not saved as garbage, or on the meta device, when it loads."""
    assert not list(classifier.buffers())
    assert set(classifier.state_dict()) == {name for name, _ in classifier.named_parameters()}
    for module in classifier.modules():
        assert not any(torch.is_tensor(value) for value in vars(module).values())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
def test_half_precision(classifier, x, expected, error, dtype, tolerance, tmp_path):
    classifier.save_pretrained(tmp_path)
    loaded = ADMForImageClassification.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    for attention in ("sdpa", "eager"):
        loaded.set_attn_implementation(attention)
        logits = run(loaded, x.to(dtype))
        assert logits.dtype == dtype
        assert error(logits, expected) < tolerance
    loaded.save_pretrained(tmp_path / "half", variant="fp16")
    assert (tmp_path / "half" / "model.fp16.safetensors").exists()
    again = ADMForImageClassification.from_pretrained(tmp_path / "half", variant="fp16", dtype=dtype)
    assert torch.equal(run(again, x.to(dtype)), run(loaded.eval(), x.to(dtype))) or attention == "eager"
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.parametrize(("pool", "head"), [("attention", "head.classifier.to_out"), ("spatial", "head.linear_2")])
def test_another_number_of_labels(tiny_classifier, x, pool, head, tmp_path):
    classifier = tiny_classifier(pool=pool)
    classifier.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        ADMForImageClassification.from_pretrained(tmp_path, num_labels=70)
    loaded = ADMForImageClassification.from_pretrained(tmp_path, num_labels=70, ignore_mismatched_sizes=True)
    assert run(loaded, x).shape == (2, 70)
    for name, tensor in loaded.state_dict().items():
        if name.startswith(head):
            bound = loaded.get_submodule(head).in_features ** -0.5
            assert 0.7 * bound < tensor.abs().max() <= bound  # drawn afresh, as torch does
        else:
            assert torch.equal(tensor, classifier.state_dict()[name])


def test_another_number_of_labels_of_a_zero_head(tiny_classifier, x, tmp_path):
    tiny_classifier(pool="adaptive").save_pretrained(tmp_path)
    loaded = ADMForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert torch.equal(run(loaded, x), torch.zeros(2, 7))


def test_training_mode(tiny_classifier, x, error):
    classifier = tiny_classifier(dropout=0.5).train()
    assert error(run(classifier, x), run(classifier, x)) > 1e-3
    classifier.eval()
    assert torch.equal(run(classifier, x), run(classifier, x))


# Auto classes and pipeline


def test_auto_classes(classifier, x, expected, tmp_path):
    classifier.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), ADMClassifierConfig)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(loaded, ADMForImageClassification)
    assert torch.equal(run(loaded, x), expected)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, ADMImageProcessor)
    assert dict(processor.size) == {"height": 16, "width": 16}
    assert processor.num_channels == 3


@pytest.mark.parametrize(("channels", "sample_size"), [(3, 16), (1, 16), (3, [8, 24])])
def test_image_classification_pipeline(tiny_classifier, channels, sample_size, tmp_path):
    classifier = tiny_classifier(in_channels=channels, sample_size=sample_size, id2label=NAMES)
    classifier.save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 31, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    result = pipeline("image-classification", model=str(tmp_path), device="cpu")(image)

    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    picture = resize_and_crop(image.convert("L" if channels == 1 else "RGB"), (height, width))
    tensor = torch.from_numpy(to_pixel_values(picture, channels))[None]
    scores = run(classifier, tensor, None).softmax(dim=1)[0]
    best_first = sorted(((scores[i].item(), name) for i, name in NAMES.items()), reverse=True)
    assert [entry["label"] for entry in result] == [name for _, name in best_first]
    assert [entry["score"] for entry in result] == pytest.approx([score for score, _ in best_first], abs=1e-5)


# What transformers offers around a model


@pytest.mark.parametrize("pool", ["attention", "adaptive"])
def test_attention_implementations_agree(tiny_classifier, x, error, pool):
    classifier = tiny_classifier(pool=pool)
    logits = {}
    for attention in ("eager", "sdpa"):
        classifier.set_attn_implementation(attention)
        assert classifier.config._attn_implementation == attention
        logits[attention] = run(classifier, x)
    assert error(logits["eager"], logits["sdpa"]) < 1e-5


def test_attention_implementation_is_the_one_called(classifier, x, tmp_path):
    calls = []

    def counting(module, query, key, value, attention_mask, scaling, **kwargs):
        calls.append((type(module).__name__, tuple(query.shape), tuple(key.shape), scaling, kwargs.get("is_causal")))
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("counting", counting)
    try:
        classifier.save_pretrained(tmp_path)
        loaded = ADMForImageClassification.from_pretrained(tmp_path, attn_implementation="counting")
        logits = run(loaded, x)
    finally:
        AttentionInterface._global_mapping.pop("counting")
    assert calls == [
        ("ADMAttention", (2, 4, 64, 16), (2, 4, 64, 16), 0.25, False),
        ("ADMAttention", (2, 4, 64, 16), (2, 4, 64, 16), 0.25, False),
        ("ADMAttentionPool", (2, 4, 1, 16), (2, 4, 65, 16), 0.25, False),
    ]
    assert torch.equal(logits, loaded.head.classifier.to_out.bias.expand(2, 3))  # it is also what is used


def test_gradient_checkpointing(tiny_classifier, randn, error, backward):
    classifier = tiny_classifier(num_res_blocks=2).train()
    x = randn(2, 3, 16, 16)

    def call():
        return classifier(x, TIMESTEPS, labels=torch.tensor([2, 0])).loss

    plain_bytes, plain = backward(classifier, call)
    classifier.activation_checkpointing_enable()
    assert classifier.is_activation_checkpointing
    checkpointed_bytes, checkpointed = backward(classifier, call)
    assert checkpointed_bytes < 0.5 * plain_bytes
    for (name, _), a, b in zip(classifier.named_parameters(), checkpointed, plain, strict=True):
        assert name.endswith("to_k.bias") or error(a, b) < 1e-5, name
    classifier.activation_checkpointing_disable()
    assert backward(classifier, call)[0] == plain_bytes


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing_enable:FutureWarning")
def test_guidance_gradient_under_gradient_checkpointing(tiny_classifier, x, error):
    """The gradient with respect to the image alone, weights frozen and in evaluation mode."""
    classifier = tiny_classifier().requires_grad_(False)

    def gradient():
        image = x.clone().requires_grad_()
        return torch.autograd.grad(classifier(image, TIMESTEPS).logits.log_softmax(dim=1)[:, 0].sum(), image)[0]

    plain = gradient()
    classifier.gradient_checkpointing_enable()
    assert error(gradient(), plain) < 1e-5


def test_compile_in_one_graph(tiny_classifier, x, error):
    classifier = tiny_classifier(attention_resolutions=[])
    torch._dynamo.reset()
    compiled = torch.compile(classifier, fullgraph=True, backend="aot_eager")
    assert error(run(compiled, x), run(classifier, x)) < 1e-5


def test_channels_last(tiny_classifier, x, expected, error):
    classifier = tiny_classifier().to(memory_format=torch.channels_last)
    assert error(run(classifier, x.to(memory_format=torch.channels_last)), expected) < 1e-5
