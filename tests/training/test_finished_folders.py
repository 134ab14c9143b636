"""What a user does in a finished folder outlives the next run of the training that wrote it, and every kill of it."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_guided import ADMForImageClassification, ADMScheduler, ClassifierGuidedPipeline
from hf_guided.evaluation.sweep import save_choice
from hf_guided.files import recover_folder
from hf_guided.hub import write_model_card
from hf_guided.training.saving import save_folder

FOREIGN = {
    "notes.txt": "my notes",
    ".hidden": "mine",
    "unet/diffusion_pytorch_model.fp16.safetensors": "a variant",
    "drawings/one.png": "a picture",
}


@pytest.fixture(scope="module")
def save(tiny_unet) -> Callable[[str], None]:
    pipe = ClassifierGuidedPipeline(
        tiny_unet(sample_size=8, attention_resolutions=()),
        ADMScheduler(),
        id2label={i: f"class {i}" for i in range(5)},
        sampling_defaults={"num_inference_steps": 10, "guidance_scale": 3.0},
    )

    def write(folder: str) -> None:
        pipe.save_pretrained(folder)
        write_model_card(folder, title="Digits", dataset="digits", class_names=[*pipe.id2label.values()], training={})

    return write


def make_own(folder: Path) -> None:
    """What users do: files of their own, an edit of the card, the defaults of a sweep."""
    for name, text in FOREIGN.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "empty").mkdir()
    (folder / "link").symlink_to("notes.txt")
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\n## My own section\n\nwords\n")
    save_choice(folder, {"num_inference_steps": 3, "guidance_scale": 0.5})


def assert_own(folder: Path) -> None:
    for name, text in FOREIGN.items():
        assert (folder / name).read_text() == text, name
    assert (folder / "empty").is_dir()
    assert os.readlink(folder / "link") == "notes.txt"
    assert "## My own section" in (folder / "README.md").read_text()
    index = json.loads((folder / "model_index.json").read_text())
    assert index["sampling_defaults"] == {"num_inference_steps": 3, "guidance_scale": 0.5}


def test_a_second_and_a_third_run_keep_what_is_the_users(save, tmp_path):
    folder = tmp_path / "pipeline"
    save_folder(save, folder)
    make_own(folder)
    for _ in range(2):
        save_folder(save, folder)
        assert_own(folder)
    assert list(tmp_path.iterdir()) == [folder]
    pipe = ClassifierGuidedPipeline.from_pretrained(folder)
    assert pipe.config.sampling_defaults == {"num_inference_steps": 3, "guidance_scale": 0.5}


def test_without_a_change_other_flags_count(save, tmp_path):
    """What nobody has changed follows the flags, and a file that is no longer written is not taken for the user's."""
    folder = tmp_path / "pipeline"

    def first(path: str) -> None:
        save(path)
        save_choice(path, {"num_inference_steps": 10, "guidance_scale": 1.0})
        Path(path, "unet", "shard-00001-of-00002.safetensors").write_text("ours")

    save_folder(first, folder)
    save_folder(save, folder)
    assert json.loads((folder / "model_index.json").read_text())["sampling_defaults"]["guidance_scale"] == 3.0
    assert not (folder / "unet" / "shard-00001-of-00002.safetensors").exists()


def test_a_folder_of_an_earlier_version_keeps_its_defaults_and_files(save, tmp_path):
    folder = tmp_path / "pipeline"
    save(str(folder))
    make_own(folder)
    save_folder(save, folder)
    assert_own(folder)


def test_renamed_classes_are_kept_and_nothing_else_of_a_models_config(tiny_classifier, tmp_path):
    def save(num_labels: int) -> Callable[[str], None]:
        names = {i: f"class {i}" for i in range(num_labels)}
        return lambda folder: tiny_classifier(id2label=names, num_labels=num_labels).save_pretrained(folder)

    def edit(**entries: object) -> None:
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        (tmp_path / "model" / "config.json").write_text(json.dumps({**config, **entries}))

    save_folder(save(3), tmp_path / "model")
    edit(id2label={"0": "ant", "1": "bee", "2": "cat"}, label2id={"ant": 0, "bee": 1, "cat": 2}, pool="none")
    for _ in range(2):
        save_folder(save(3), tmp_path / "model")
        config = ADMForImageClassification.from_pretrained(tmp_path / "model").config
        assert config.id2label == {0: "ant", 1: "bee", 2: "cat"}
        assert config.label2id == {"ant": 0, "bee": 1, "cat": 2}
        assert config.pool == "attention"
    save_folder(save(4), tmp_path / "model")
    config = ADMForImageClassification.from_pretrained(tmp_path / "model").config
    assert config.id2label == {i: f"class {i}" for i in range(4)}


def test_a_linked_folder_is_replaced_where_it_lies(save, tmp_path):
    target = tmp_path / "disk" / "pipeline"
    target.parent.mkdir()
    link = tmp_path / "pipeline"
    save_folder(save, target)
    make_own(target)
    link.symlink_to(target)
    save_folder(save, link)
    assert link.is_symlink()
    assert_own(target)
    assert list(target.parent.iterdir()) == [target]


def killed(action: Callable[[], None], folder: Path, number: int) -> bool:
    """Runs it in a process that is killed at the so manieth event in the file system below a folder."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal seen
            if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link") and (
                str(folder) in str(arguments[0]) or event in ("os.remove", "os.rmdir")
            ):
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(hook)
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_kill_at_any_event_loses_nothing(save, tmp_path):
    folder, number = tmp_path / "pipeline", 0
    save_folder(save, folder)
    make_own(folder)
    while killed(lambda: save_folder(save, folder), tmp_path, number := number + 1):
        recover_folder(folder)
        assert_own(folder)
        assert list(tmp_path.iterdir()) == [folder]
    assert number > 40
    assert_own(folder)
