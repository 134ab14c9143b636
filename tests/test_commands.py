"""A command is one file of `commands/`: found by its name, light to import."""

import logging
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from hf_guided import ClassifierGuidedPipeline, commands
from hf_guided.cli import main

NAMES = sorted(path.stem for path in Path(commands.__file__).parent.glob("[a-z]*.py"))
HEAVY = {"torch", "numpy", "diffusers", "transformers", "accelerate", "huggingface_hub"}
TOY = """
HELP = "count the letters of a word"


def add_arguments(parser):
    parser.add_argument("word")
    parser.add_argument("--times", type=int, default=1)


def run(args):
    if not args.word.isalpha():
        raise ValueError(f"{args.word} is no word; give letters.")
    assert vars(args) == {"word": args.word, "times": args.times}  # nothing but its flags
    print(len(args.word) * args.times)
"""


def test_help_lists_every_command_and_imports_nothing_heavy():
    spelled = [name.replace("_", "-") for name in NAMES]
    code = (
        "import contextlib, sys; from hf_guided.cli import main\n"
        "for name in sys.argv[1:]:\n"
        "    with contextlib.suppress(SystemExit):\n        main([*([name] if name else []), '--help'])\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    argv = [sys.executable, "-c", code, "", *spelled]
    shown = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    texts, _, imported = shown.strip().rpartition("\n")
    assert not HEAVY & set(imported.split())
    assert {"sample", "upscale", "evaluate", "sweep", "compare", "inspect-classifier", "convert", "push", "train"} < {
        *spelled
    }
    listed, *helps = texts.split("usage: hf-guided ")[1:]
    assert all(f"  {name}" in listed for name in spelled)
    assert all(text.startswith(name) for name, text in zip(spelled, helps, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_command_says_what_it_does(name):
    module = import_module(f"hf_guided.commands.{name}")
    assert f"`hf-guided {name.replace('_', '-')}`" in module.__doc__
    assert module.HELP
    assert module.run.__doc__


def test_a_new_command_is_one_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "count_letters.py").write_text(TOY)
    (tmp_path / "_helpers.py").write_text("")  # is no command
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "count-letters" in shown
    assert "count the letters of a word" in shown
    assert "helpers" not in shown
    main(["count-letters", "apple", "--times", "2"])
    assert capsys.readouterr().out == "10\n"
    with pytest.raises(SystemExit, match=r"error: 4\.2 is no word; give letters\."):
        main(["count-letters", "4.2"])
    sys.modules.pop("hf_guided.commands.count_letters")


def test_train_takes_pictures_and_the_flags_of_the_script(tmp_path, monkeypatch, capsys, caplog):
    """Pictures of 13x13 pixels keep their grey, and have a size that networks can halve."""
    for label in ("a", "b"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(8):
            Image.new("L", (13, 13), 20 * i).save(tmp_path / "photos" / label / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    model = "--model_channels 32 --channel_mult 1 1 1 1 --num_res_blocks 1 --num_heads 1 --report_to none"
    flags = "--train_batch_size 4 --max_train_steps 1 --num_images 8 --num_inference_steps 2 --guidance_scales 1"
    argv = f"train photos {model} {flags} --conditional_scales 1 --output_dir out --held_out_fraction 0.5".split()
    main(argv)
    said = r"This takes about \d+ seconds? on this machine: judge .*, classifier .*, diffusion .*, report"
    assert re.search(said, caplog.text)
    assert "12x12 pixels, then 6x6, 3x3 (odd, so not all 4 levels of --channel_mult are used), about" in caplog.text
    pipe = ClassifierGuidedPipeline.from_pretrained("out/pipeline")
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a").images[0]
    assert (picture.mode, picture.size) == ("L", (12, 12))
    with pytest.raises(SystemExit, match="error: --resolution 0 is not allowed"):
        main(["train", "photos", "--resolution", "0"])
    with pytest.raises(SystemExit) as stopped:
        main(["sample", "out/pipeline", "--bogus", "1"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --bogus 1" in capsys.readouterr().err
