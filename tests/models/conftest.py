from collections.abc import Callable

import pytest
import torch


@pytest.fixture(scope="session")
def backward() -> Callable[[torch.nn.Module, Callable[[], torch.Tensor]], tuple[int, list[torch.Tensor]]]:
    """Calls for a loss and goes back through it: the bytes that autograd kept for it, and the weights' gradients."""

    def run(model: torch.nn.Module, call: Callable[[], torch.Tensor]) -> tuple[int, list[torch.Tensor]]:
        model.zero_grad()
        kept = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = call()
        for parameter in model.parameters():
            kept.pop(parameter.untyped_storage().data_ptr(), None)
        total = sum(kept.values())
        loss.backward()
        return total, [parameter.grad.clone() for parameter in model.parameters()]

    return run
