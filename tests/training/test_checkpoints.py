"""Which folders count as checkpoints, which are ever deleted, and what happens to damaged ones."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from hf_guided.training.checkpoints import (
    HISTORY,
    OTHERS_FILE,
    STATE_FILE,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    start_run,
)

FINGERPRINT = {"seed": 0}
TENSOR_FILES = ["model.safetensors", "optimizer.bin", OTHERS_FILE]
FILES = [*TENSOR_FILES, STATE_FILE, HISTORY]


class Training:
    """The state of a training, of which each step has other weights."""

    def __init__(self, width: int = 2):
        AcceleratorState._reset_state(True)
        self.accelerator = Accelerator(cpu=True)
        model = torch.nn.Linear(width, 2)
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        self.others = {"lr_scheduler": torch.optim.lr_scheduler.ConstantLR(self.optimizer)}

    def save(self, folder, *steps, limit=10):
        folder.mkdir(parents=True, exist_ok=True)
        run = start_run(folder, None, limit)
        for step in steps:
            torch.nn.init.constant_(self.model.weight, step)
            state = {"step": step, "seconds": 1.0, "fingerprint": FINGERPRINT, "run": run}
            history = [{"step": step, "seconds": 1.0, "loss": 0.5}]
            save_checkpoint(self.accelerator, folder, state, self.others, history, limit)

    def load(self, folder, fingerprint=FINGERPRINT, defaults=None):
        return load_checkpoint(self.accelerator, folder, fingerprint, self.others, defaults)


@pytest.fixture
def training():
    return Training()


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


def make_older(checkpoint, keep=("step", "seconds", "fingerprint")):
    """As versions before run ids and digests wrote it."""
    state = json.loads((checkpoint / STATE_FILE).read_text())
    (checkpoint / STATE_FILE).write_text(json.dumps({name: state[name] for name in keep}))
    shutil.move(checkpoint / HISTORY, checkpoint.parent / HISTORY)


COPIES = [
    *("checkpoint-9-2", "checkpoint-best-2024", "checkpoint-6-backup", "checkpoint-6 (copy)", "checkpoint-12"),
    *("checkpoint-009", "checkpoint-٩", "checkpoint-9.old", "checkpoint-", "Checkpoint-9", "checkpoint-9\n"),
    *("checkpoint-+9", "checkpoint-1e1"),
]


def test_only_what_the_run_saved_counts_and_is_deleted(training, tmp_path):
    training.save(tmp_path, 6, 9)
    for name in COPIES:
        shutil.copytree(tmp_path / "checkpoint-9", tmp_path / name)
    (tmp_path / "checkpoint-77").write_text("a file")
    (tmp_path / "checkpoint-78").mkdir()
    shutil.copytree(tmp_path / "checkpoint-9", tmp_path / "best" / "checkpoint-80")
    (tmp_path / "checkpoint-79").symlink_to(tmp_path / "best")
    before = set(tmp_path.rglob("*")) - set((tmp_path / "checkpoint-6").rglob("*")) - {tmp_path / "checkpoint-6"}
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-9"]
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-9"
    training.save(tmp_path, 10, limit=2)
    assert names(tmp_path) == ["checkpoint-9", "checkpoint-10"]
    assert before <= set(tmp_path.rglob("*"))
    assert not (tmp_path / "checkpoint-6").exists()


def test_another_runs_checkpoint_counts_only_where_there_is_no_other(training, tmp_path, caplog):
    training.save(tmp_path / "a", 3)
    training.save(tmp_path / "b", 7, 8)
    shutil.copytree(tmp_path / "b" / "checkpoint-7", tmp_path / "a" / "checkpoint-7")
    assert find_checkpoint(tmp_path / "a", "latest").name == "checkpoint-3"
    training.save(tmp_path / "a", 4, limit=1)
    assert (tmp_path / "a" / "checkpoint-7" / STATE_FILE).is_file()
    training.save(tmp_path / "a", 7, limit=1)  # that name is needed now
    assert "checkpoint-7 is of another run, and is now called checkpoint-7-other" in caplog.text
    assert sorted(path.name for path in (tmp_path / "a").glob("check*")) == ["checkpoint-7", "checkpoint-7-other"]

    (tmp_path / "c").mkdir()
    shutil.copytree(tmp_path / "b" / "checkpoint-7", tmp_path / "c" / "checkpoint-7")
    assert find_checkpoint(tmp_path / "c", "latest").name == "checkpoint-7"


def test_a_linked_checkpoint_is_resumed_from_and_left_alone(training, tmp_path):
    training.save(tmp_path / "run", 3)
    shutil.move(tmp_path / "run" / "checkpoint-3", tmp_path / "large-disk")
    (tmp_path / "run" / "checkpoint-3").symlink_to(tmp_path / "large-disk")
    assert find_checkpoint(tmp_path / "run", "latest").name == "checkpoint-3"
    training.save(tmp_path / "run", 4, 5, limit=1)
    assert sorted(path.name for path in (tmp_path / "run").glob("check*")) == ["checkpoint-3", "checkpoint-5"]
    assert (tmp_path / "large-disk" / STATE_FILE).is_file()


def test_a_users_file_in_a_checkpoint_is_kept(training, tmp_path, caplog):
    training.save(tmp_path, 1, 2)
    (tmp_path / "checkpoint-1" / "notes").mkdir()
    (tmp_path / "checkpoint-1" / "notes" / "best.txt").write_text("mine")
    training.save(tmp_path, 3, 4, limit=1)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-4"]
    assert "checkpoint-1 is kept beyond --checkpoints_total_limit, since it holds notes/best.txt" in caplog.text


def test_a_resume_from_an_earlier_step_than_what_is_there_is_refused(training, tmp_path):
    training.save(tmp_path / "a", 4, 6, 8)
    shutil.copytree(tmp_path / "a" / "checkpoint-4", tmp_path / "kept")
    for wanted in (tmp_path / "a" / "checkpoint-4", tmp_path / "kept"):
        with pytest.raises(ValueError, match=r"holds newer checkpoints than .*: checkpoint-6, checkpoint-8\. Resume"):
            find_checkpoint(tmp_path / "a", str(wanted))
    assert find_checkpoint(tmp_path / "b", str(tmp_path / "kept")) == tmp_path / "kept"
    assert find_checkpoint(tmp_path / "a", str(tmp_path / "a" / "checkpoint-8")).name == "checkpoint-8"


def test_the_folder_of_another_run_is_moved_aside(training, tmp_path, caplog):
    """Its checkpoints, history, previews and logs, whole; and what is saved then is neither deleted nor mixed up."""
    old, new = tmp_path / "old", tmp_path / "new"
    training.save(old, 6, 8)
    for name in ("logs", "mine"):
        (old / name).mkdir()
    for name in ("preview-000006.png", "preview-mine.txt", "logs/events"):
        (old / name).write_text(name)
    training.save(new, 4)
    wanted = find_checkpoint(old, str(new / "checkpoint-4"))
    state = training.load(wanted)
    for _ in range(2):  # as after a kill
        assert start_run(old, state["run"], 1) == state["run"]
    moved = {"checkpoint-6", "checkpoint-8", HISTORY, "preview-000006.png", "logs"}
    assert {path.name for path in (old / "earlier-run").iterdir()} == moved
    assert {path.name for path in old.iterdir()} == {"earlier-run", "mine", "preview-mine.txt", ".run.json"}
    assert "belonged to another run" in caplog.text
    training.save(old, 5, 6, limit=1)
    assert find_checkpoint(old, "latest").name == names(old)[-1] == "checkpoint-6"
    assert find_checkpoint(old / "earlier-run", "latest").name == "checkpoint-8"


def damage(path, how):
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        contents = {"empty": b"", "cut off": content[: len(content) // 2], "binary": bytes(range(256))}
        path.write_bytes({**contents, "[]": b"[]", "{}": b"{}", "null": b"null"}[how])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["missing", "folder", "flipped", "empty", "cut off", "binary", "[]", "{}", "null"])
def test_damaged_files_are_named_and_the_older_whole_checkpoint_takes_over(training, tmp_path, caplog, file, how):
    training.save(tmp_path, 4, 6)
    damage(tmp_path / "checkpoint-6" / file, how)
    if file == STATE_FILE and how in ("missing", "folder"):  # which is written last: half a checkpoint, of no run
        assert find_checkpoint(tmp_path, "latest").name == "checkpoint-4"
        return
    with pytest.raises(ValueError, match=rf"checkpoint-6/{file} is (damaged|missing or damaged)\."):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-6"))
    assert (tmp_path / "checkpoint-6").is_dir()
    found = find_checkpoint(tmp_path, "latest")
    assert found == tmp_path / "checkpoint-4"
    assert caplog.text.count("\n") == 1
    for words in (f"checkpoint-6/{file} is", "now called checkpoint-6-damaged; checkpoint-4 takes its place"):
        assert words in caplog.text
    training.load(found)
    assert (training.model.weight == 4).all()
    training.save(tmp_path, 5, limit=1)  # the damaged one does not count to the limit
    assert names(tmp_path) == ["checkpoint-5"]
    assert (tmp_path / "checkpoint-6-damaged").is_dir()


def test_exchanged_files_are_found(training, tmp_path, caplog):
    training.save(tmp_path, 4, 6)
    for file in TENSOR_FILES[:2]:
        shutil.copy(tmp_path / "checkpoint-4" / file, tmp_path / "checkpoint-6" / file)
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-4"


def test_none_whole_is_no_start_from_scratch(training, tmp_path):
    training.save(tmp_path, 4, 6)
    for step in (4, 6):
        damage(tmp_path / f"checkpoint-{step}" / "model.safetensors", "flipped")
    with pytest.raises(
        ValueError, match=r"checkpoint-6/model.*checkpoint-4/model.* No checkpoint in .* is complete; rem"
    ):
        find_checkpoint(tmp_path, "latest")
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("file", TENSOR_FILES)
@pytest.mark.parametrize("how", ["missing", "empty", "cut off", "binary"])
def test_older_checkpoints_resume_and_their_damage_is_found_as_far_as_it_can_be(training, tmp_path, caplog, file, how):
    training.save(tmp_path, 4, 6)
    (tmp_path / ".run.json").unlink()
    for step in (4, 6):
        make_older(tmp_path / f"checkpoint-{step}")
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-6"
    damage(tmp_path / "checkpoint-6" / file, how)
    found = find_checkpoint(tmp_path, "latest")
    assert found.name == "checkpoint-4"
    assert f"checkpoint-6/{file} is missing or damaged" in caplog.text
    state = training.load(found)
    assert (training.model.weight == 4).all()
    assert [row["step"] for row in state["history"]] == [6]  # the loop leaves out what came later
    training.save(tmp_path, 5, limit=1)
    assert names(tmp_path) == ["checkpoint-5"]


def test_an_older_checkpoint_of_another_model(training, tmp_path):
    training.save(tmp_path, 4)
    make_older(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match=r"checkpoint-4 is damaged, or from another model; remove it"):
        Training(width=3).load(tmp_path / "checkpoint-4")
    (tmp_path / HISTORY).write_text("[{}]")
    with pytest.raises(ValueError, match=r"history\.json is damaged.*; remove it to resume without what was logged"):
        Training().load(tmp_path / "checkpoint-4")


def test_one_too_many_goes_at_the_start(training, tmp_path):
    training.save(tmp_path, 1, 2, 3)
    start_run(tmp_path, None, 2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_a_flag_that_an_older_version_did_not_have_has_its_default(training, tmp_path):
    training.save(tmp_path, 3)
    (folder,), defaults = list_checkpoints(tmp_path), {"seed": 7, "augment": False}
    assert training.load(folder, {"seed": 0, "augment": False}, defaults)["step"] == 3
    with pytest.raises(ValueError, match="augment was False and is now True"):
        training.load(folder, {"seed": 0, "augment": True}, defaults)
    with pytest.raises(ValueError, match="seed was 0 and is now 7"):
        training.load(folder, {"seed": 7, "augment": False}, defaults)
