"""The command line on a small saved pipeline."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from hf_guided import ADMScheduler, ADMUNet2DModel, ClassifierGuidedPipeline, ClassifierGuidedUpscalePipeline
from hf_guided.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    unet = ADMUNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=2,
        model_channels=32,
        channel_mult=(1, 1),
        num_res_blocks=1,
        num_heads=2,
        num_class_embeds=3,
        null_class_label=True,
    )
    for parameter in unet.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    names = {0: "zero", 1: "one", 2: "7"}
    pipe = ClassifierGuidedPipeline(unet, ADMScheduler(), id2label=names, sampling_defaults={"respacing": "3"})
    path = tmp_path_factory.mktemp("cli") / "pipeline"
    pipe.save_pretrained(path)
    return path


def test_sample_draws_a_grid(folder, tmp_path, capsys):
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    main(["sample", str(folder), "--output", str(paths[0])])
    assert "Saved 24 samples" in capsys.readouterr().out
    for path, labels in zip(paths[1:], (["one", "7"], ["1", "2"], ["2", "1"]), strict=True):
        main(["sample", str(folder), "--labels", *labels, "--num_images_per_label", "2", "--output", str(path)])
    pictures = [Image.open(path).tobytes() for path in paths]
    assert pictures[1] == pictures[2] != pictures[3]


def test_sample_takes_labels_and_numbers(folder, tmp_path, capsys):
    def labels(*flags: str) -> list[int]:
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}.npz"
        main(["sample", str(folder), "--output", str(output), *flags])
        assert f"as {output}" in capsys.readouterr().out
        with np.load(output) as file:
            assert file["arr_0"].shape == (len(file["arr_1"]), 8, 8, 1)
            return file["arr_1"].tolist()

    assert labels("--labels", "one", "0", "--num_images", "5") == [1, 0, 1, 0, 1]
    assert labels("--labels", "one", "0", "--num_images_per_label", "2") == [1, 0, 1, 0]
    assert labels("--labels", "all", "--num_images", "4") == [0, 1, 2, 0]
    assert labels("--labels", "all") == [0, 1, 2] * 8
    uniform = labels("--num_images", "20")  # the default of a file
    assert uniform == labels("--labels", "uniform", "--num_images", "20") != [i % 3 for i in range(20)]
    assert set(uniform) == {0, 1, 2}
    assert labels("--num_images", "20", "--seed", "1") != uniform

    output = tmp_path / "0.npz"
    main(["sample", str(folder), "--output", str(output), "--labels", "one", "0", "--num_images", "5"])
    assert capsys.readouterr().out == f"{output} is there already, made by the same command\n"


def test_the_classifier_steers_alone(folder, tmp_path):
    paths = [tmp_path / "told.npz", tmp_path / "not-told.npz"]
    flags = ["--labels", "one", "--num_images", "4", "--batch_size", "4"]
    main(["sample", str(folder), *flags, "--output", str(paths[0])])
    main(["sample", str(folder), *flags, "--no-condition_unet", "--output", str(paths[1])])
    told, not_told = (np.load(path)["arr_0"] for path in paths)
    pipe = ClassifierGuidedPipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    samples = pipe(num_images_per_label=4, generator=generator, output_type="latent").images  # and here is none
    expected = ((samples + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert np.array_equal(not_told, expected)
    assert not np.array_equal(told, expected)


def test_sample_without_classes(tiny_unet, tmp_path):
    unet = tiny_unet(sample_size=8, in_channels=1, out_channels=2, channel_mult=(1,), num_class_embeds=None)
    ClassifierGuidedPipeline(unet, ADMScheduler(), sampling_defaults={"respacing": "3"}).save_pretrained(tmp_path / "p")
    sample = ["sample", str(tmp_path / "p"), "--output"]
    main([*sample, str(tmp_path / "samples.png")])
    assert Image.open(tmp_path / "samples.png").height == 56 + 2 * 16  # a row of eight
    main([*sample, str(tmp_path / "many.npz"), "--num_images", "12", "--batch_size", "5"])
    with np.load(tmp_path / "many.npz") as file:
        assert file["arr_0"].shape == (12, 8, 8, 1)
        assert "arr_1" not in file
    main([*sample, str(tmp_path / "folder"), "--num_images", "2"])
    assert (tmp_path / "folder" / "metadata.jsonl").read_text().splitlines()[1] == '{"file_name": "000001.png"}'
    with pytest.raises(SystemExit, match="this pipeline has no classes"):
        main([*sample, str(tmp_path / "x.npz"), "--labels", "all", "--num_images", "2"])


def test_upscale_writes_published_files_and_pictures(tiny_unet, tmp_path, capsys):
    pipe = ClassifierGuidedUpscalePipeline(
        tiny_unet(low_res_channels=3),
        ADMScheduler(),
        id2label=dict(enumerate("abcde")),
        sampling_defaults={"respacing": "3"},
    )
    pipe.save_pretrained(tmp_path / "upscaler")
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "small.npz", images, np.array([0, 1, 2, 3, 4]))
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    upscale = ["upscale", str(tmp_path / "upscaler")]

    main([*upscale, str(tmp_path / "small.npz"), "--output", str(tmp_path / "large.npz"), "--batch_size", "2"])
    assert "Saved 5 images of 16x16" in capsys.readouterr().out
    with np.load(tmp_path / "large.npz") as large:
        assert large["arr_0"].shape == (5, 16, 16, 3)
        assert large["arr_0"].dtype == np.uint8
        assert large["arr_1"].tolist() == [0, 1, 2, 3, 4]
        expected = large["arr_0"]
    samples = pipe(images, list(range(5)), generator=torch.Generator().manual_seed(0), output_type="latent").images
    published = ((samples + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert (published != expected).mean() < 0.01

    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "large.png")
    np.savez(tmp_path / "unknown.npz", images, np.array([0, 1, 2, 3, 9]))
    pictures = [str(tmp_path / f"{i}.png") for i in range(5)]
    main([*upscale, *pictures, "--labels", *"abcde", "--output", str(tmp_path / "again.npz"), "--batch_size", "5"])
    with np.load(tmp_path / "again.npz") as again:
        assert (again["arr_0"] != expected).mean() < 0.01  # batches of another size round otherwise
        assert again["arr_1"].tolist() == [0, 1, 2, 3, 4]
    main([*upscale, *pictures, "--labels", "2", "--output", str(tmp_path / "grid.png")])
    assert Image.open(tmp_path / "grid.png").width > 2 * 16

    for argv, message in [
        ([pictures[0]], "add --labels, one for all images"),
        ([*pictures, "--labels", "a", "b"], "2 classes for 5 images"),
        ([pictures[0], "--output", "large.jpg"], "must end in .npz, .parquet or .png"),
        ([str(tmp_path), "--labels", "a"], "is no picture that can be read"),
        ([str(tmp_path / "small.npz.png"), "--labels", "a"], "is no picture that can be read"),
        ([str(tmp_path / "nowhere.npz")], "nowhere.npz"),
        ([pictures[0], "--output", str(tmp_path / "no" / "x.npz")], "make it first"),
        ([*pictures, str(tmp_path / "large.png"), "--labels", "a"], "one size"),
        ([str(tmp_path / "unknown.npz")], r"class_labels [9] are not among"),
    ]:
        with pytest.raises(SystemExit, match="error: ") as caught:
            main([*upscale, *argv])
        assert message in str(caught.value)


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "RGB on its side"])
def test_upscale_sees_pictures_as_training_does(mode, tiny_unet, tmp_path):
    """In its output and in the grid, beside the same picture as 8-bit RGB."""
    pipe = ClassifierGuidedUpscalePipeline(
        tiny_unet(low_res_channels=3, num_class_embeds=None), ADMScheduler(), sampling_defaults={"respacing": "2"}
    )
    pipe.save_pretrained(tmp_path / "upscaler")
    random, exif = np.random.default_rng(0), Image.Exif()
    if mode == "I;16":
        values = random.integers(0, 256, (8, 8))
        picture, plain = Image.fromarray((257 * values).astype(np.uint16)), Image.fromarray(values.astype(np.uint8))
    else:
        picture = Image.fromarray(random.integers(0, 256, (8, 8, 4), dtype=np.uint8))
        plain = Image.alpha_composite(Image.new("RGBA", (8, 8), "white"), picture).convert("RGB")
        if mode != "RGBA":
            picture, plain = plain, plain.rotate(-90)
            exif[ExifTags.Base.Orientation] = 6
    picture.save(tmp_path / "picture.png", exif=exif)
    plain.save(tmp_path / "plain.png")
    for name in ("picture", "plain"):
        for output in ("npz", "grid.png"):
            main(
                [
                    "upscale",
                    str(tmp_path / "upscaler"),
                    f"{tmp_path / name}.png",
                    "--output",
                    f"{tmp_path / name}.{output}",
                ]
            )
    for output in ("npz", "grid.png"):
        assert (tmp_path / f"picture.{output}").read_bytes() == (tmp_path / f"plain.{output}").read_bytes()


def test_mistakes_end_in_one_sentence(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for argv, message in [
        (["sample", str(folder), "--labels", "two"], "no class named 'two'"),
        (["sample", str(folder), "--guidance_scale", "1", "--output", str(tmp_path / "x.png")], "needs a classifier"),
        (["sample", str(tmp_path / "nowhere")], "There is no folder"),
        (["sample", "me/nowhere"], "There is no folder me/nowhere, and it could not be downloaded from the Hub"),
        (["sample", str(folder), "--output", "samples.jpg"], "must end in .npz, .parquet or .png"),
        (["sample", str(tmp_path / "nowhere"), "--output", str(tmp_path / "no" / "x.npz")], "make it first"),
        (["sample", str(folder), "--output", str(tmp_path / "x.npz")], "Say how many samples"),
        (["sample", str(folder), "--num_images", "9", "--num_images_per_label", "3"], "not both"),
        (["push", str(tmp_path), "me/model"], "neither model_index.json nor config.json"),
    ]:
        with pytest.raises(SystemExit, match="error: ") as caught:
            main(argv)
        assert message in str(caught.value)
    result = subprocess.run([sys.executable, "-m", "hf_guided.cli"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "usage: hf-guided" in result.stderr
