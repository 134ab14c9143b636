"""Compiled models make the same images. (By the default backend it takes minutes: `speed_sampling.py` does that.)"""

import pytest
import torch

from hf_guided import ADMScheduler, ClassifierGuidedPipeline
from hf_guided.generation.sampling import sample_batches


@pytest.fixture
def make_pipe(tiny_unet, tiny_classifier):
    def make():
        pipe = ClassifierGuidedPipeline(tiny_unet(num_class_embeds=3), ADMScheduler(), tiny_classifier())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def images(pipe, labels=(1, 2)):
    options = {"respacing": "3", "guidance_scale": 5.0, "output_type": "latent"}
    return pipe(list(labels), generator=torch.Generator().manual_seed(0), **options).images


def compiled_regions(model):
    return [type(module).__name__ for module in model.modules() if module._compiled_call_impl is not None]


def test_compiled_by_regions(make_pipe):
    pipe = make_pipe()
    expected = images(pipe)
    torch.compiler.reset()
    pipe.compile(backend="aot_eager", fullgraph=True)
    assert set(compiled_regions(pipe.unet)) == {"ADMDownBlock", "ADMMidBlock", "ADMUpBlock"}
    assert set(compiled_regions(pipe.classifier)) == {"ADMDownBlock", "ADMMidBlock"}
    assert (images(pipe) - expected).abs().max() < 1e-4


def test_a_last_smaller_batch_is_not_compiled(make_pipe):
    seen = []

    def backend(graph, inputs):
        seen.append({tensor.shape[0] for tensor in inputs if torch.is_tensor(tensor) and tensor.ndim == 4})
        return graph.forward

    pipe = make_pipe()
    torch.compiler.reset()
    pipe.compile(backend=backend)
    batches = dict(sample_batches(pipe, torch.tensor([0, 1, 2, 0, 1]), 3, respacing="2"))
    assert [len(batch) for batch in batches.values()] == [3, 2]
    assert seen
    assert not any(2 in sizes for sizes in seen)


def test_no_compiler(make_pipe, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match="install g\\+\\+ or clang\\+\\+"):
        make_pipe().compile()
