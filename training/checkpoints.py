"""Checkpoints that are whole or not there at all, and that say what they were trained with."""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..credentials import without_credentials
from ..files import partial_name, recover_folder, remove_folder, replacing_folder, write_json
from ..labels import composed

logger = logging.getLogger(__name__)

STATE_FILE = "training_state.json"
OTHERS_FILE = "loop_state.pt"
INDEX_FILE = "model_index.json"
MADE_FILE = ".hf-guided.json"  # in a finished folder: which files are ours, and the index as we wrote it

# Flags that may change between two sittings of one training: they decide where, how often and what is told, not what is
# computed.
FREE_FLAGS = {
    "output_dir",
    "resume_from_checkpoint",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "validation_steps",
    "preview_steps",
    "num_inference_steps",
    "respacing",
    "logging_steps",
    "report_to",
    "push_to_hub",
    "hub_model_id",
    "hub_private",
    "hub_token",
    "hub_license",
    "recipe",
    "dataloader_num_workers",
    "cache_dir",
}


def fingerprint(arguments: list[Any], data: Any, accelerator: Accelerator) -> dict[str, Any]:
    """Everything that a resumed training must have in common with what it resumes, by flag or by name.

    Addresses are compared and saved without their credentials, which may change.
    """
    merged: dict[str, Any] = {}
    for part in arguments:
        merged.update(dataclasses.asdict(part))
    if merged["lr_scheduler"] in ("constant", "constant_with_warmup"):
        merged.pop("max_train_steps")  # the other schedules depend on where training ends
    known = {name: value for name, value in merged.items() if name not in FREE_FLAGS}
    names = None if data.id2label is None else [composed(name) for name in data.id2label.values()]
    everything = {
        **known,
        "mixed_precision": accelerator.mixed_precision,
        "number of processes": accelerator.num_processes,
        "number of images": len(data),
        "classes": names,
    }
    return without_credentials(json.loads(json.dumps(everything)))


def find_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    """The newest whole checkpoint for `"latest"`, or the folder named; `None` if there is none yet.

    Raises:
        `ValueError`: If the folder named is not a whole checkpoint, or lies beside newer ones.
    """
    if wanted != "latest":
        if not (Path(wanted) / STATE_FILE).is_file():
            raise ValueError(
                f"--resume_from_checkpoint {wanted} is not a whole checkpoint ({STATE_FILE} is missing); name a folder "
                f"such as {output_dir}/checkpoint-500, or 'latest'."
            )
        newer = [path.name for path in list_checkpoints(output_dir) if step_of(path) > step_of(Path(wanted))]
        if newer and Path(wanted).resolve().parent == output_dir.resolve():
            raise ValueError(
                f"{output_dir} holds newer checkpoints than {Path(wanted).name}: {', '.join(newer)}. Go on from the "
                f"newest with --resume_from_checkpoint latest, or remove them."
            )
        return Path(wanted)
    whole = list_checkpoints(output_dir)
    return whole[-1] if whole else None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The whole checkpoints, oldest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if (path / STATE_FILE).is_file()]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of updates that a checkpoint's name tells."""
    return int(checkpoint.name.rpartition("-")[2])


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: `step` and `seconds` trained, and its `fingerprint`."""
    return {"seconds": 0.0, **json.loads((checkpoint / STATE_FILE).read_text())}


def load_checkpoint(
    accelerator: Accelerator, folder: Path, current: dict[str, Any], others: dict[str, Any]
) -> tuple[int, float]:
    """Restores everything and returns the number of updates done, and the seconds that they took.

    Args:
        accelerator (`Accelerator`): Restores what it prepared: model and optimizer.
        folder (`Path`): The checkpoint.
        current (`dict`): The [`fingerprint`] of this training.
        others (`dict`): What else has a `load_state_dict`, by name.

    Raises:
        `ValueError`: If it was trained with other flags, data or another number of processes, naming each.
    """
    state = read_state(folder)
    saved = without_credentials(state["fingerprint"])
    if saved.get("classes") is not None:
        saved["classes"] = [composed(name) for name in saved["classes"]]
    differing = [
        f"{name} was {saved.get(name)!r} and is now {current.get(name)!r}"
        for name in sorted({*saved, *current})
        if saved.get(name) != current.get(name)
    ]
    if differing:
        raise ValueError(
            f"{folder} cannot be gone on from, since it was trained otherwise: {'; '.join(differing)}. Use the same "
            f"flags, or another --output_dir to start anew."
        )
    accelerator.load_state(str(folder))
    states = torch.load(folder / OTHERS_FILE, map_location="cpu", weights_only=True)
    for name, other in others.items():
        other.load_state_dict(states[name])
    return state["step"], state["seconds"]


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    step: int,
    seconds: float,
    current: dict[str, Any],
    others: dict[str, Any],
    total_limit: int,
) -> Path:
    """Saves all under a temporary name, renames it, and only then removes the oldest; called by all processes."""
    folder = output_dir / f"checkpoint-{step}"
    replacing = replacing_folder(folder) if accelerator.is_main_process else nullcontext(partial_name(folder))
    with replacing as partial:
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            torch.save({name: other.state_dict() for name, other in others.items()}, partial / OTHERS_FILE)
            state = {"step": step, "seconds": round(seconds, 1), "fingerprint": current}
            (partial / STATE_FILE).write_text(json.dumps(state, indent=2))
    if accelerator.is_main_process:
        for old in list_checkpoints(output_dir)[:-total_limit]:
            remove_folder(old)
    accelerator.wait_for_everyone()
    return folder


def save_folder(save: Callable[[str], Any], folder: Path) -> None:
    """Writes a finished model or pipeline in the place of an older one, whole, and keeps what is not ours in it.

    Kept are files that no earlier call has written, and what was changed since in `model_index.json`: the defaults that
    a sweep or a user has saved, a component that was added. `save` finds the older model card, for its edits.

    Args:
        save (`Callable`): Writes into the folder that it is given.
        folder (`Path`): The folder's final name.
    """
    with replacing_folder(folder) as partial:
        if (folder / "README.md").is_file():
            shutil.copy(folder / "README.md", partial)
        save(str(partial))
        made = {path.relative_to(partial) for path in partial.rglob("*")}
        written = read_index(partial)
        if folder.is_dir():
            record = json.loads((folder / MADE_FILE).read_text()) if (folder / MADE_FILE).is_file() else {}
            keep_foreign_files(folder, partial, ours={*made, *map(Path, record.get("files", [])), Path(MADE_FILE)})
            if written:
                write_json(keep_changes(record.get(INDEX_FILE), read_index(folder), written), partial / INDEX_FILE)
        files = sorted(path.as_posix() for path in made if (partial / path).is_file())
        write_json({"files": files, INDEX_FILE: written}, partial / MADE_FILE)


def read_index(folder: Path) -> dict[str, Any]:
    """What a pipeline's `model_index.json` says; nothing of a model alone."""
    return json.loads((folder / INDEX_FILE).read_text()) if (folder / INDEX_FILE).is_file() else {}


def keep_changes(written: dict[str, Any] | None, now: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The entries of an index that is written again, but those that were changed since it was written last."""
    if written is None:  # by an earlier version, which kept no record
        written = {name: value for name, value in now.items() if name != "sampling_defaults"}
    names = {*written, *now}
    changed = {name: now.get(name) for name in names if name[0] != "_" and now.get(name) != written.get(name)}
    for name, value in changed.items():
        if value != new.get(name):
            logger.info(f"Kept {name} as it was changed in {INDEX_FILE}: {value}.")
    return {**new, **changed}


def keep_foreign_files(old: Path, new: Path, ours: set[Path]) -> None:
    """Links the files of an older folder that are not ours into a newer one."""
    for path in sorted(old.rglob("*")):
        name = path.relative_to(old)
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                (new / name).mkdir(parents=True, exist_ok=True)
        elif name not in ours:
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, new / name, follow_symlinks=False)
            except OSError:  # a file system without links
                shutil.copy2(path, new / name, follow_symlinks=False)


def recover_folders(output_dir: Path) -> None:
    """Undoes what a killed process left unfinished."""
    for path in output_dir.glob(".*"):
        if path.suffix in (".partial", ".old", ".removed"):
            recover_folder(path.with_name(path.stem[1:]))
