"""Training of the other families: resuming, the two players of the GAN, what is watched and what the card says."""

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hf_guided import FlowPipeline, GANPipeline, VAEPipeline
from hf_guided.baselines.gan import hinge_losses
from hf_guided.data import load_labelled_images
from hf_guided.training import train_baseline as script
from hf_guided.training.arguments import parse_arguments, run_script
from hf_guided.training.loop import train

STEPS = 4
TINY = {
    "vae": ["--latent_dim", "3", "--model_channels", "8", "--channel_mult", "1", "1", "--num_res_blocks", "1"],
    "gan": [
        *("--latent_dim", "6", "--model_channels", "8", "--discriminator_channels", "8"),
        *("--channel_mult", "1", "1", "--translation", "1"),
    ],
    "flow": ["--num_levels", "2", "--num_blocks", "1", "--hidden_channels", "8"],
}
FLAGS = [
    *("--train_batch_size", "8", "--max_train_steps", str(STEPS), "--checkpointing_steps", "2"),
    *("--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "2", "--learning_rate", "1e-3"),
    *("--validation_steps", "2", "--preview_steps", "0", "--logging_steps", "1", "--report_to", "none"),
    *("--resolution", "8", "--held_out_fraction", "0.1"),
]
PIPELINES = {"vae": VAEPipeline, "gan": GANPipeline, "flow": FlowPipeline}


def arguments(family: str, photos: Path, output_dir: Path, *more: str):
    flags = [*TINY[family], *FLAGS, "--train_data_dir", str(photos), "--output_dir", str(output_dir), *more]
    data_args, stages = parse_arguments({family: script.TRAINERS[family][0]}, flags)
    return data_args, stages[family]


def go(family: str, photos: Path, output_dir: Path, *more: str) -> Path | None:
    return script.train_baseline(family, *arguments(family, photos, output_dir, *more))


def bits(family: str, output_dir: Path) -> dict[str, bytes]:
    """Everything that training computes: weights, optimizer, moving average, schedule, and the finished model."""
    component = PIPELINES[family].main_component
    folders = [output_dir / family / f"checkpoint-{STEPS}", output_dir / family / "pipeline" / component]
    files = [path for folder in folders for path in sorted(folder.iterdir())]
    files = [path for path in files if path.suffix in (".safetensors", ".bin", ".pt")]
    assert len(files) == 4  # model, optimizer, the rest of the loop, and the finished model
    return {str(path.relative_to(output_dir)): path.read_bytes() for path in files}


def history(family: str, output_dir: Path) -> list[dict[str, float]]:
    rows = json.loads((output_dir / family / "history.json").read_text())
    assert all(row.pop("seconds") > 0 for row in rows)
    return rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory, photos) -> dict[str, Path]:
    """Each family, trained without a stop."""
    folders = {family: tmp_path_factory.mktemp(family) for family in script.TRAINERS}
    for family, folder in folders.items():
        assert go(family, photos, folder, "--preview_steps", "2") == folder / family / "pipeline"
    return folders


@pytest.fixture(params=list(script.TRAINERS))
def family(request) -> str:
    return request.param


def test_a_stopped_training_ends_with_the_same_bits(family, trained, photos, tmp_path):
    name = Path(family) / "checkpoint-2"
    shutil.copytree(trained[family] / name, tmp_path / name)
    shutil.copy(trained[family] / family / "history.json", tmp_path / family)  # what it says of later steps must go
    go(family, photos, tmp_path)
    assert bits(family, tmp_path) == bits(family, trained[family])
    assert history(family, tmp_path) == history(family, trained[family])


def test_what_training_leaves(family, trained, photos):
    folder = trained[family] / family
    rows = history(family, trained[family])
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4]
    names = {
        "vae": {"loss", "bits_per_dim", "rate"},
        "gan": {"loss", "discriminator_loss", "real_score", "fake_score"},
        "flow": {"loss"},
    }[family]
    watched = {"spread", "lowest_spread"} if family == "gan" else set()
    assert set(rows[0]) == {"step", *names, "learning_rate"}
    assert set(rows[2]) == {"step", *(f"held_out/{name}" for name in names), *watched}
    assert [row["learning_rate"] for row in rows if "learning_rate" in row] == pytest.approx([5e-4, *[1e-3] * 3])

    for picture in (folder / "preview-000002.png", folder / "preview-000004.png", folder / "pipeline" / "grid.png"):
        with Image.open(picture) as image:
            assert len(image.convert("L").getcolors()) > 20, picture
    card = (folder / "pipeline" / "README.md").read_text()
    kind = PIPELINES[family]
    for part in (
        "\n# " + {"vae": "VAE", "gan": "GAN", "flow": "Flow"}[family] + f" of {photos.name}\n",
        {"vae": "variational autoencoder", "gan": "a small BigGAN", "flow": "normalizing flow"}[family],
        f"- {'normalizing-flow' if family == 'flow' else family}\n",
        f"{kind.__name__}.from_pretrained(",
        'class_labels=["apple"]',
        "`truncation=`" if family == "gan" else "`temperature=`",
        "It generates images of 8x8 pixels",
        "54 to train on, 6 held out",
        "4 steps of 8 images",
        "| Seed | 0 |",
    ):
        assert part in card, part
    assert "guidance" not in card
    assert ("| Collapse | " in card) == (family == "gan")
    assert ("| Largest error of an image taken to latents and back | " in card) == (family == "flow")

    pipe = kind.from_pretrained(folder / "pipeline")
    assert pipe.id2label == {0: "apple", 1: "banana", 2: "cherry"}
    assert pipe(["cherry"], generator=torch.Generator().manual_seed(0)).images[0].size == (8, 8)


def test_the_finished_model_is_the_moving_average(trained, photos):
    """The VAE's, whose pipeline saves the model as it is: other than the last weights, and near them."""
    folder = trained["vae"] / "vae"
    last = load_file(folder / f"checkpoint-{STEPS}" / "model.safetensors")
    finished = load_file(folder / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors")
    assert last.keys() == finished.keys()
    shares = [not torch.equal(last[name], finished[name]) for name in last if last[name].is_floating_point()]
    assert sum(shares) > 0.9 * len(shares)
    assert all((last[name] - finished[name]).abs().max() < 0.01 for name in last)


class OnePlayer(script.GANTask):
    """Of whom alone the loss is, the discriminator or the generator."""

    player: int

    def losses(self, model, batch, timesteps):
        return hinge_losses(model(**self.inputs(batch)))[self.player], {}


@pytest.mark.parametrize("player", [0, 1])
def test_a_step_on_one_loss_moves_one_player_at_its_own_rate(player, photos, tmp_path):
    rates = {"generator": 1e-3, "discriminator": 1e-4}
    flags = ["--discriminator_learning_rate", "1e-4", "--max_train_steps", "1", "--lr_warmup_steps", "0"]
    data_args, args = arguments("gan", photos, tmp_path, *flags, "--ema_decay", "0", "--validation_steps", "0")
    task = OnePlayer(args, load_labelled_images(data_args, seed=0))
    task.player = player
    groups = task.parameter_groups()
    assert [group["lr"] for group in groups] == list(rates.values())
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in task.model.parameters()}
    before = {name: parameter.detach().clone() for name, parameter in task.model.named_parameters()}
    train(task, data_args)
    trained_name = ("discriminator", "generator")[player]
    largest = 0.0
    for name, parameter in task.model.named_parameters():
        moved = (parameter.detach() - before[name]).abs().max().item()
        if name.startswith(trained_name):
            largest = max(largest, moved)
        else:
            assert moved == 0, name
    assert largest == pytest.approx(rates[trained_name], rel=0.01)  # of AdamW's first step, whatever the gradient


@pytest.fixture
def gan(photos, tmp_path) -> script.GANTask:
    data_args, args = arguments("gan", photos, tmp_path, "--model_channels", "16")
    torch.manual_seed(0)
    task = script.GANTask(args, load_labelled_images(data_args, seed=0))
    task.model.generator.norm_out.weight.data.fill_(3.0)  # images of many shades
    return task


def test_a_generator_that_ignores_its_latents_is_found_out(gan, caplog):
    spreads = gan.spreads()
    assert len(spreads) == 3
    assert min(spreads) > 0.5
    assert gan.collapsed(spreads) == ""
    assert gan.findings() == {"collapse": "none was seen"}
    assert gan.validation_metrics() == pytest.approx({"spread": sum(spreads) / 3, "lowest_spread": min(spreads)})
    assert not caplog.records

    gan.model.generator.norm_out.weight.data.zero_()  # hides all that was made of latents and class
    assert gan.spreads() == pytest.approx([0, 0, 0], abs=1e-6)
    with caplog.at_level(logging.WARNING):
        assert gan.validation_metrics()["lowest_spread"] < 1e-6
    finding = "samples of a class differ far less than its real images do: apple (0%), banana (0%), cherry (0%)"
    assert f"The GAN's {finding}." in caplog.text
    assert gan.findings() == {"collapse": finding}
    assert gan.collapsed([0.9, 0.49, 0.51]).endswith("do: banana (49%)")


def test_the_spread_of_images_is_their_mean_distance():
    images = torch.tensor([0.0, 3.0, 4.0]).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    assert script.spread(images) == pytest.approx((2 * 3 + 2 * 4 + 2 * 1) / 3)
    assert script.spread(images[:1]) == 0


def test_watching_takes_standing_statistics_and_leaves_the_model_as_it_is(gan):
    expected = gan.validation_metrics()
    for module in gan.model.generator.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(1e6)
    before = {name: value.clone() for name, value in gan.model.state_dict().items()}
    assert gan.validation_metrics() == expected
    assert gan.model.training
    assert all(torch.equal(value, before[name]) for name, value in gan.model.state_dict().items())


def test_the_weight_of_the_rate_changes_the_loss_and_not_the_bits(photos, tmp_path):
    found = {}
    for weight in (0.0, 1.0, 1000.0):
        data_args, args = arguments("vae", photos, tmp_path, "--kl_weight", str(weight))
        images = load_labelled_images(data_args, seed=0)[0]
        torch.manual_seed(0)
        task = script.VAETask(args, (images, None))
        batch = {"pixel_values": torch.stack([images[i]["pixel_values"] for i in range(4)])}
        batch["labels"] = torch.tensor([images[i]["labels"] for i in range(4)])
        loss, logs = task.losses(task.model, batch, torch.zeros(4))
        found[weight] = loss.detach(), logs["bits_per_dim"], logs["rate"]
    for weight, (loss, bits_per_dim, rate) in found.items():
        assert torch.equal(bits_per_dim, found[1.0][1])
        torch.testing.assert_close(loss, bits_per_dim + (weight - 1) * rate)
        assert rate.min() > 1e-5


def test_a_flow_begins_with_unit_variance_and_tells_how_well_it_inverts(photos, tmp_path, caplog):
    data_args, args = arguments("flow", photos, tmp_path)
    images, held_out = load_labelled_images(data_args, seed=0)
    torch.manual_seed(0)
    task = script.FlowTask(args, (images, held_out))
    batch = torch.stack([images[i]["pixel_values"] for i in range(len(images))])
    with torch.no_grad():
        hidden = task.model.squeeze.inverse(task.model.logit.inverse(task.model.dequantize(batch))[0])[0]
        hidden, _ = task.model.levels[0][0].norm.inverse(hidden)
    torch.testing.assert_close(hidden.mean(dim=(0, 2, 3)), torch.zeros(12), atol=0.02, rtol=0)
    torch.testing.assert_close(hidden.std(dim=(0, 2, 3)), torch.ones(12), atol=0.02, rtol=0)
    (error,) = task.findings().values()
    assert 0 < error < 1e-5
    assert not caplog.records
    for base in task.model.bases:
        base.loc.data.fill_(1e6)  # between such numbers float32 has little room
    with caplog.at_level(logging.WARNING):
        (error,) = task.findings().values()
    assert error > 1e-3
    assert "hard to invert: images come back with an error of" in caplog.text


def test_mistakes_end_before_the_training(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for flags, message in (
        ([], "the following arguments are required: --family"),
        (["--family", "diffusion"], "argument --family: invalid choice: 'diffusion'"),
        (["--family", "flow", "--latent_dim", "3"], "--latent_dim"),
    ):
        monkeypatch.setattr(sys, "argv", ["train_baseline.py", *flags])
        with pytest.raises(SystemExit) as stopped:
            run_script(script.main)
        assert message in f"{stopped.value} {capsys.readouterr().err}"
    assert not (tmp_path / "outputs").exists()


def test_help_is_the_family_s_own(monkeypatch, capsys):
    for name, flag in (("gan", "--discriminator_learning_rate"), ("flow", "--dequantization_width")):
        monkeypatch.setattr(sys, "argv", ["train_baseline.py", "--family", name, "--help"])
        with pytest.raises(SystemExit) as stopped:
            script.main()
        assert stopped.value.code == 0
        said = capsys.readouterr().out
        assert flag in said
        assert "--kl_weight" not in said


def test_shifts_out_of_view_are_refused(photos, tmp_path):
    with pytest.raises(ValueError, match="--translation 8 shifts images of 8 pixels out of view; give less"):
        go("gan", photos, tmp_path / "out", "--translation", "8")
    assert not (tmp_path / "out").exists()
