"""Fine-tuning: weights that fit are kept to the bit, others are reinitialised and named."""

import logging
import shutil
import sys
from pathlib import Path

import forked
import launching
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from hub_server import Commit, HubServer
from launching import TINY_RUN
from safetensors.torch import load_file, save_file

from hf_guided import ADMScheduler, ADMUNet2DModel, ClassifierGuidedPipeline, ClassifierGuidedUpscalePipeline
from hf_guided.data import load_labelled_images
from hf_guided.training import train_diffusion as script
from hf_guided.training.arguments import parse_arguments
from hf_guided.training.train import ReportArguments, check_models
from hf_guided.training.train_classifier import ClassifierArguments
from hf_guided.training.train_diffusion import DiffusionArguments, make_unet
from hf_guided.training.train_upscaler import UpscalerArguments, train_upscaler

FRUITS = {0: "apple", 1: "banana", 2: "cherry"}
STAGE = {"diffusion": DiffusionArguments}
RUN = ["--train_batch_size", "4", "--report_to", "none", "--validation_steps", "0", "--max_train_steps", "2"]
SCHEDULE = ["--beta_schedule", "linear"]


@pytest.fixture(scope="module")
def pretrained(tiny_unet, tmp_path_factory) -> Path:
    """A pipeline of random weights for 8x8 pictures of three animals; attention at 4x4."""
    folder = tmp_path_factory.mktemp("pretrained")
    levels = {"channel_mult": (1, 1, 1), "attention_resolutions": (4,)}
    unet = tiny_unet(sample_size=8, num_class_embeds=3, null_class_label=True, **levels)
    animals = {0: "ape", 1: "bat", 2: "cat"}
    ClassifierGuidedPipeline(unet, ADMScheduler(), id2label=animals).save_pretrained(folder)
    return folder


@pytest.fixture
def fine_tune(photos, pretrained):
    """Makes the UNet that training with some flags starts from, and the pretrained one's tensors."""

    def make(*flags: str, pretrained: Path = pretrained) -> tuple[ADMUNet2DModel, dict[str, torch.Tensor]]:
        argv = ["--train_data_dir", str(photos), "--resolution", "8", "--pretrained_model", str(pretrained), *SCHEDULE]
        data_args, stages = parse_arguments(STAGE, [*argv, *flags])
        images = load_labelled_images(data_args, seed=0, require_labels=stages["diffusion"].class_conditional)[0]
        torch.manual_seed(stages["diffusion"].seed)
        unet = make_unet(stages["diffusion"], images)
        subfolder = "unet" if (pretrained / "unet").is_dir() else None
        return unet, ADMUNet2DModel.from_pretrained(pretrained, subfolder=subfolder).state_dict()

    return make


def differing(unet: ADMUNet2DModel, weights: dict[str, torch.Tensor]) -> set[str]:
    """The tensors that are not the pretrained ones to the bit."""
    tensors = unet.state_dict()
    assert all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors.values())
    return {
        name
        for name in {*tensors, *weights}
        if name not in tensors or name not in weights or not torch.equal(tensors[name], weights[name])
    }


def test_other_classes_take_a_fresh_embedding_and_all_else_to_the_bit(fine_tune, pretrained, caplog):
    caplog.set_level(logging.INFO)
    unet, weights = fine_tune()
    assert differing(unet, weights) == {"class_embedding.weight"}
    assert caplog.messages[-1] == (
        f"Kept {len(weights) - 1} of {len(weights)} tensors of {pretrained}; "
        "reinitialised: class_embedding.weight (other classes)."
    )
    rows = unet.class_embedding.weight
    assert rows.shape == (4, 128)  # the null label's too
    assert not torch.isclose(rows, weights["class_embedding.weight"]).all(dim=1).any()
    assert rows.std(dim=1).sub(1).abs().max() < 0.3
    assert rows.requires_grad
    assert torch.equal(fine_tune()[0].class_embedding.weight, rows)
    assert not torch.equal(fine_tune("--seed", "1")[0].class_embedding.weight, rows)


def test_the_same_classes_keep_their_embedding(fine_tune, pretrained, tmp_path, randn, caplog):
    caplog.set_level(logging.INFO)
    unet = ADMUNet2DModel.from_pretrained(pretrained, subfolder="unet")
    ClassifierGuidedPipeline(unet, ADMScheduler(), id2label=FRUITS).save_pretrained(tmp_path)
    mine, weights = fine_tune("--dropout", "0", pretrained=tmp_path)
    assert differing(mine, weights) == set()
    assert caplog.messages[-1] == f"Kept {len(weights)} of {len(weights)} tensors of {tmp_path}."
    inputs = (randn(2, 3, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 2]))
    assert torch.equal(mine(*inputs).sample, unet(*inputs).sample)

    # another number of rows does not fit, also of the same names
    assert differing(fine_tune("--label_dropout", "0", pretrained=tmp_path)[0], weights) == {"class_embedding.weight"}


def test_the_architecture_is_the_pretrained_models_and_the_rest_the_datas(fine_tune, caplog):
    caplog.set_level(logging.INFO)
    flags = ["--model_channels", "64", "--channel_mult", "1", "2", "--num_heads", "1", "--dropout", "0.3"]
    unet, weights = fine_tune(*flags, "--resolution", "16", "24")
    assert differing(unet, weights) == {"class_embedding.weight"}
    config = unet.config
    assert (config.model_channels, list(config.channel_mult), config.num_heads) == (32, [1, 1, 1], None)
    assert (list(config.sample_size), list(config.attention_resolutions)) == ([16, 24], [8])  # at the same level
    assert config.dropout == 0.3

    unet, weights = fine_tune("--image_channels", "1")
    assert differing(unet, weights) == {
        *("class_embedding.weight", "conv_in.weight", "conv_out.weight", "conv_out.bias"),
    }
    assert unet.conv_in.weight.std() > 0.1
    assert unet.conv_out.weight.abs().max() == 0  # as every last convolution starts
    for said in ("conv_in.weight (32x1x3x3 instead of 32x3x3x3)", "conv_out.bias (2 instead of 6)"):
        assert said in caplog.messages[-1]

    unet, weights = fine_tune("--no_class_conditional")
    assert differing(unet, weights) == {"class_embedding.weight"}
    assert unet.class_embedding is None
    assert caplog.messages[-1].endswith("; not used: class_embedding.weight.")


def test_a_unet_alone(fine_tune, pretrained, tmp_path):
    shutil.copytree(pretrained / "unet", tmp_path / "unet-alone")
    flags = ["--beta_schedule", "squaredcos_cap_v2", "--variance_type", "fixed_small", "--loss_type", "simple"]
    unet, weights = fine_tune(*flags, pretrained=tmp_path / "unet-alone")
    assert differing(unet, weights) == {"class_embedding.weight", "conv_out.weight", "conv_out.bias"}


def test_training_starts_from_the_hub_and_goes_on_by_the_same_command(photos, pretrained, tmp_path, monkeypatch):
    flags = [*RUN, "--checkpointing_steps", "1", "--train_data_dir", str(photos), "--resolution", "8", *SCHEDULE]
    with HubServer({}) as hub:
        files = {str(path.relative_to(pretrained)): path.read_bytes() for path in pretrained.rglob("*.*")}
        hub.add_repo("me/animals").add("main", Commit("a pipeline", files, frozenset()))
        still = ["--pretrained_model", "me/animals", "--learning_rate", "1e-30", "--output_dir", "still"]
        result = forked.run(
            launching.script("train_diffusion", *flags, *still),
            cwd=tmp_path,
            env={**hub.environment(tmp_path / "home"), "ACCELERATE_USE_CPU": "true"},
        )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "tensors of me/animals; reinitialised: class_embedding.weight (other classes)." in result.stderr
    pipe = ClassifierGuidedPipeline.from_pretrained(tmp_path / "still" / "diffusion" / "pipeline")
    assert pipe.id2label == FRUITS
    weights = ADMUNet2DModel.from_pretrained(pretrained, subfolder="unet").state_dict()
    assert differing(pipe.unet, weights) == {"class_embedding.weight"}  # a step of 1e-30 moves nothing

    def train(folder: str, source: Path = pretrained) -> bytes:
        argv = [*flags, "--pretrained_model", str(source), "--output_dir", str(tmp_path / folder)]
        monkeypatch.setattr(sys, "argv", ["train_diffusion.py", *argv])
        script.main()
        return (tmp_path / folder / "diffusion/pipeline/unet/diffusion_pytorch_model.safetensors").read_bytes()

    whole = train("whole")
    shutil.copytree(tmp_path / "whole/diffusion/checkpoint-1", tmp_path / "resumed/diffusion/checkpoint-1")
    copied = shutil.copytree(pretrained, tmp_path / "copied", copy_function=shutil.copyfile)
    assert train("resumed", copied) == whole  # the same model, wherever it lies
    unet = ADMUNet2DModel.from_pretrained(copied, subfolder="unet")
    unet.conv_out.bias.data += 1
    unet.save_pretrained(copied / "unet")
    with pytest.raises(ValueError, match="the pretrained weights have changed"):
        train("resumed", copied)


def test_an_upsampler_too(photos, tiny_unet, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    unet = tiny_unet(sample_size=8, attention_resolutions=(4,), num_class_embeds=3, low_res_channels=3)
    ClassifierGuidedUpscalePipeline(unet, ADMScheduler(), id2label=FRUITS).save_pretrained(tmp_path / "a")
    argv = [*RUN, *SCHEDULE, "--train_data_dir", str(photos), "--resolution", "8", "--label_dropout", "0"]
    argv += ["--pretrained_model", str(tmp_path / "a"), "--output_dir", str(tmp_path / "out"), "--respacing", "2"]
    argv += ["--learning_rate", "1e-30", "--low_resolution", "4"]
    data_args, stages = parse_arguments({"upscaler": UpscalerArguments}, argv)
    folder = train_upscaler(data_args, stages["upscaler"])
    assert differing(ADMUNet2DModel.from_pretrained(folder, subfolder="unet"), unet.state_dict()) == set()


def test_what_cannot_be_gone_on_from_is_refused_with_the_mend(fine_tune, photos, pretrained, tiny_unet, tmp_path):
    flags = ["--beta_schedule", "squaredcos_cap_v2", "--variance_type", "fixed_large", "--loss_type", "simple"]
    mend = r"another noise schedule or objective .*; add --beta_schedule linear --variance_type learned_range\.$"
    with pytest.raises(ValueError, match=mend):
        fine_tune(*flags)
    with pytest.raises(ValueError, match=r"; add --rescale_timesteps False\.$"):
        fine_tune("--rescale_timesteps")
    fine_tune("--rescale_timesteps", "False")

    with pytest.raises(ValueError, match=r"neither a pipeline with a UNet nor a UNet \("):
        fine_tune(pretrained=tmp_path)
    theirs = UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    DDPMPipeline(theirs, DDPMScheduler()).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="has a UNet2DModel; only an ADMUNet2DModel is fine-tuned"):
        fine_tune(pretrained=tmp_path / "theirs")

    upsampler = tiny_unet(sample_size=8, attention_resolutions=(4,), low_res_channels=3)
    upsampler.save_pretrained(tmp_path / "upsampler")
    with pytest.raises(ValueError, match=r"is an upsampler; train it with train_upscaler.py"):
        fine_tune(pretrained=tmp_path / "upsampler")
    argv = [*RUN, *SCHEDULE, "--train_data_dir", str(photos), "--resolution", "8"]
    argv += ["--pretrained_model", str(pretrained)]
    data_args, stages = parse_arguments({"upscaler": UpscalerArguments}, argv)
    with pytest.raises(ValueError, match=r"is not an upsampler; train it with train_diffusion.py"):
        train_upscaler(data_args, stages["upscaler"])


def test_the_whole_walk_checks_it_early_without_its_weights(photos, pretrained, monkeypatch):
    types = {"judge": ClassifierArguments, "classifier": ClassifierArguments, "diffusion": DiffusionArguments}
    argv = [*TINY_RUN, "--train_data_dir", str(photos), "--resolution", "8", "--label_dropout", "0.1", "--num_images"]
    argv += ["8", "--diffusion_pretrained_model", str(pretrained)]
    monkeypatch.setattr(ADMUNet2DModel, "from_pretrained", lambda *args, **kwargs: pytest.fail("read the weights"))

    def check(*flags: str) -> None:
        data_args, stages = parse_arguments({**types, "report": ReportArguments}, [*argv, *flags])
        check_models(stages, load_labelled_images(data_args, seed=0)[0])

    check(*SCHEDULE)
    with pytest.raises(ValueError, match="add --beta_schedule linear"):
        check()
    with pytest.raises(ValueError, match="multiples of 4"):
        check(*SCHEDULE, "--resolution", "10")


@pytest.mark.parametrize("damage", ["missing tensor", "truncated", "index"])
def test_a_damaged_source_is_an_error_and_no_fresh_tensors(fine_tune, pretrained, tmp_path, damage):
    folder = shutil.copytree(pretrained, tmp_path / "damaged")
    file = folder / ("model_index.json" if damage == "index" else "unet/diffusion_pytorch_model.safetensors")
    if damage == "missing tensor":
        tensors = load_file(file)
        del tensors["conv_in.bias"]
        save_file(tensors, file, metadata={"format": "pt"})
    else:
        file.write_bytes(b"[]" if damage == "index" else file.read_bytes()[:1000])
    with pytest.raises((ValueError, OSError), match="conv_in.bias is missing" if damage[0] == "m" else str(file)):
        fine_tune(pretrained=folder)
