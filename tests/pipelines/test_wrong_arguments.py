"""Wrong arguments of every pipeline's call end in one sentence before the first step."""

import importlib.util
import math

import numpy as np
import pytest
import torch

from hf_guided import (
    ADMScheduler,
    ClassifierGuidedPipeline,
    ClassifierGuidedUpscalePipeline,
    FlowPipeline,
    GANPipeline,
    VAEPipeline,
)
from hf_guided.baselines import BigGANGenerator, ClassConditionalGlow, ClassConditionalVAE
from hf_guided.guidance import ClassifierGuidance

NAN, INF = math.nan, math.inf
G = torch.Generator
EVERY = {
    "class_labels": [
        *("nothing", 3, -1, [], 1.0, [1.5], [[0, 1], [1, 0]], True, [None], np.array([0.5]), torch.tensor([7])),
        *({0: 1}, b"0", [0, "nothing"], object(), torch.zeros(0, dtype=torch.long)),
    ],
    "num_images_per_label": [0, -1, 1.5, "x", None, True, NAN, [1], 10**12],
    "generator": ["x", 3, [], [G()] * 2, ["x"], {}, [G(), None, G()], np.random.default_rng(0)],
    "output_type": ["jpg", 3, None, [], "PIL", True],
    "latents": [
        *(np.zeros((1, 1, 8, 8), np.float32), "x", 3, [0.0], torch.zeros(3), torch.zeros(2, 1, 8, 8)),
        *(torch.zeros(0, 1, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.long)),
    ],
}
DIFFUSION = {
    **EVERY,
    "num_inference_steps": [0, -1, 2.5, "x", NAN, True, 10**9, [5], INF],
    "respacing": [4, [4], "x", "0", "ddim", "-3", "1,,2", "9" * 30, "9" * 5000, 2.5, True, "ddim17,3"],
    "timesteps": ["951", [], [1, 5], [5, 5], [10], [-1], ["a"], [2.5], 3, [True], [[5, 1]], NAN],
    "guidance_scale": ["x", NAN, INF, -1, [1.0, None], [], True, {}, {0: "x"}, {"a": 1}, object()],
    "guidance": ["x", 3, [3], [None], ClassifierGuidance, [ClassifierGuidance(), "x"]],
    "eta": [-1, NAN, "x", 2, INF, [0], True],
    "callback_on_step_end": ["x", 3, []],
    "callback_on_step_end_tensor_inputs": [["x"], "latents", 3, [3], None],
    "variance_noise": [np.zeros(3), "x", torch.zeros(3), torch.zeros(3, 1, 1, 8, 8)],
    "gradient_batch_size": [0, -1, 1.5, "x", True],
    "nonfinite_gradient": ["x", 3, None],
}
EDIT = {
    "strength": [0, -1, 2, NAN, "x", True, INF, [1]],
    "image": ["x", 3, [], torch.zeros(1, 8), torch.zeros(1, 1, 4, 4), torch.full((1, 1, 8, 8), NAN), np.zeros(3)],
    "mask_image": ["x", 3, torch.zeros(1, 1, 4, 4), []],
    "jump_n_sample": [1.5, INF, 0, -1, "x", NAN, None, 10**9, True],
    "jump_length": [1.5, INF, 0, -1, "x", NAN, True],
}
OF_VECTORS = {**EVERY, "temperature": [-1, NAN, INF, "x", [1], True]}
TABLES = {
    "guided": DIFFUSION,
    "edit": EDIT,
    "upscale": {**DIFFUSION, "image": ["x", 3, [], torch.zeros(1, 8), torch.full((1, 1, 4, 4), NAN), None]},
    "vae": OF_VECTORS,
    "flow": OF_VECTORS,
    "gan": {**EVERY, "truncation": [0, -1, NAN, "x", [1], True]},
}
TINY = {"sample_size": 8, "image_channels": 1, "num_class_embeds": 3}
UNET = {"sample_size": 8, "in_channels": 1, "out_channels": 2, "num_class_embeds": 3, "attention_resolutions": ()}


@pytest.fixture(scope="module")
def pipes(tiny_unet, tiny_classifier):
    """The pipelines by name, with arguments that work."""
    scheduler = ADMScheduler(num_train_timesteps=10, beta_schedule="squaredcos_cap_v2", algorithm_type="ddim")
    classifier = tiny_classifier(
        sample_size=8, in_channels=1, num_train_timesteps=10, beta_schedule="squaredcos_cap_v2"
    )
    guided = ClassifierGuidedPipeline(tiny_unet(**UNET), scheduler, classifier)
    upscale = ClassifierGuidedUpscalePipeline(tiny_unet(**UNET, low_res_channels=1), scheduler, classifier)
    small = {"model_channels": 8, "channel_mult": [1, 2], "latent_dim": 4}
    pipes = {
        "guided": (guided, {}),
        "edit": (guided, {"image": torch.zeros(1, 1, 8, 8), "mask_image": torch.zeros(1, 1, 8, 8)}),
        "upscale": (upscale, {"image": torch.zeros(1, 1, 4, 4)}),
        "vae": (VAEPipeline(ClassConditionalVAE(**TINY, **small, num_res_blocks=1).eval()), {}),
        "gan": (GANPipeline(BigGANGenerator(**TINY, **small).eval()), {}),
    }
    if importlib.util.find_spec("normflows"):
        flow = ClassConditionalGlow(**TINY, num_levels=2, num_blocks=1, hidden_channels=8).eval()
        pipes["flow"] = (FlowPipeline(flow), {})
    for pipe, _ in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    return pipes


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, table in TABLES.items() for name in table])
def test_a_wrong_argument_is_named_before_the_first_step(pipes, kind, name):
    if kind not in pipes:
        pytest.skip("the flow needs normflows")
    pipe, right = pipes[kind]
    steps = {} if kind in ("vae", "gan", "flow") or name in ("respacing", "timesteps") else {"num_inference_steps": 2}
    calls = []
    handle = getattr(pipe, pipe.main_component).register_forward_pre_hook(lambda *_: calls.append(1))
    wrong = []
    for value in TABLES[kind][name]:
        arguments = {"class_labels": 0, "output_type": "pt", **steps, **right, name: value}
        try:
            pipe(**arguments)
        except (ValueError, TypeError, FileNotFoundError) as error:
            message = str(error)
            named = name.split("_")[0] in message.lower()
            named = named or isinstance(error, FileNotFoundError)  # an image by its path
            if "\n" in message or calls or not named:
                wrong.append((value, len(calls), message[:200]))
        except Exception as error:
            wrong.append((value, len(calls), f"{type(error).__name__}: {str(error)[:200]}"))
        else:
            wrong.append((value, len(calls), "no refusal"))
        calls.clear()
    handle.remove()
    assert not wrong


def test_right_arguments_give_images(pipes):
    for pipe, right in pipes.values():
        assert pipe(class_labels=[0, 2], output_type="pt", **right).images.shape == (2, 1, 8, 8)
