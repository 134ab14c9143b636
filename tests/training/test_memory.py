"""The memory that the preflight tells."""

import torch

from hf_guided.data import load_labelled_images
from hf_guided.training.arguments import parse_arguments
from hf_guided.training.preflight import estimate_memory
from hf_guided.training.train_diffusion import DiffusionArguments, DiffusionTask


def test_the_estimate_is_what_a_real_step_keeps():
    data_args, stages = parse_arguments({"diffusion": DiffusionArguments}, [])
    args = stages["diffusion"]
    args.train_batch_size = 16
    task = DiffusionTask(args, load_labelled_images(data_args, seed=0))
    unet = task.model.train()
    weights = {parameter.data_ptr() for parameter in unet.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = {"pixel_values": torch.randn(16, 1, 8, 8), "labels": torch.zeros(16, dtype=torch.long)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = unet(**task.inputs(batch)).sample.sum()
    expected = sum(kept.values()) + 5 * sum(parameter.nbytes for parameter in unet.parameters())
    assert loss.requires_grad
    assert abs(estimate_memory(task) / expected - 1) < 0.05
