"""Atomic checkpoints that record their settings.

A folder belongs to one run at a time. In it, only a `checkpoint-<step>` that this run has saved is used as its
checkpoint, or deleted. Copies under other names, and checkpoints of other runs, belong to the user.
"""

import dataclasses
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open

from ..credentials import without_credentials
from ..files import differing, partial_name, read_json, recover_folder, remove_folder, replacing_folder, write_json
from ..labels import composed
from ..loading import weights_digest
from ..processes import from_main

logger = logging.getLogger(__name__)

STATE_FILE = "training_state.json"
OTHERS_FILE = "loop_state.pt"
INDEX_FILE, CONFIG_FILE = "model_index.json", "config.json"
MADE_FILE = ".hf-guided.json"  # in a finished folder: our files, and the entries of configs as written
HISTORY = "history.json"
RUN_FILE = ".run.json"  # the run that a folder belongs to
_NAME = re.compile("checkpoint-(0|[1-9][0-9]*)")  # as this module writes it
_STATE = {"step": int, "fingerprint": dict}
_ROW = {"step": int, "seconds": int | float}
# Errors of damaged files of tensors.
UNREADABLE = (OSError, RuntimeError, ValueError, TypeError, EOFError, pickle.UnpicklingError, SafetensorError)

# Flags that may change when a training is resumed: they concern folders, intervals and logs, not what is computed.
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

# Flags that name a file, and the fingerprint's entry with a hash of its content: only the hash is compared.
CONTENT_OF = {
    **dict.fromkeys(("dataset_name", "dataset_config_name", "train_data_dir"), "images"),
    **dict.fromkeys(("train_split", "validation_split", "held_out_fraction", "image_column", "label_column"), "images"),
    "pretrained_model": "pretrained weights",
}


def fingerprint(
    arguments: list[Any], images: tuple[Any, Any], model: torch.nn.Module, accelerator: Accelerator
) -> dict[str, Any]:
    """The settings that a resumed training must share with its checkpoint, by flag or name.

    Images and pretrained weights are compared by content: they may have been moved, or their path spelled differently.
    URLs are saved without their credentials, which may change.

    Args:
        arguments (`list`): The flags, as dataclasses.
        images (a pair of [`LabelledImages`]): Images to train on, and held out, if any.
        model (`nn.Module`): The model before the first step.
        accelerator (`Accelerator`): The training's accelerator.
    """
    train_images = images[0]
    merged: dict[str, Any] = {}
    for part in arguments:
        merged.update(dataclasses.asdict(part))
    if merged["lr_scheduler"] in ("constant", "constant_with_warmup"):
        merged.pop("max_train_steps")  # other schedules depend on the last step
    known = {name: value for name, value in merged.items() if name not in FREE_FLAGS}
    names = None if train_images.id2label is None else [composed(name) for name in train_images.id2label.values()]
    is_pretrained = merged.get("pretrained_model") is not None
    everything = {
        **known,
        "mixed_precision": accelerator.mixed_precision,
        "number of processes": accelerator.num_processes,
        "number of images": len(train_images),
        "classes": names,
        "images": from_main(lambda: [None if part is None else part.digest for part in images]),
        "pretrained weights": from_main(lambda: weights_digest(model)) if is_pretrained else None,
    }
    return without_credentials(json.loads(json.dumps(everything)))


def find_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    """The newest complete checkpoint of the folder's run for `"latest"`, or the one named; `None` if there is none yet.

    Newer damaged ones are renamed, with a warning.

    Raises:
        `ValueError`: If the folder named is not a complete checkpoint or not the newest, or none is complete.
    """
    run = _run_of(output_dir)
    if wanted != "latest":
        check_named(wanted, output_dir)
        folder = Path(wanted)
        state = read_state(folder)
        check_files(folder, state)
        newer = [path.name for path in list_checkpoints(output_dir) if step_of(path) > state["step"]]
        if newer and (state["run"] is None or run in (None, state["run"])):
            raise ValueError(
                f"{output_dir} holds newer checkpoints than {folder.name}: {', '.join(newer)}. Resume from the newest "
                f"with --resume_from_checkpoint latest, give another --output_dir, or remove them."
            )
        return folder

    states: dict[Path, dict[str, Any]] = {}
    damaged: dict[Path, ValueError] = {}
    for path in _numbered(output_dir):
        try:
            state = read_state(path)
        except ValueError as error:
            damaged[path] = error
        else:
            if state["step"] == step_of(path):  # otherwise it is a copy
                states[path] = state
    if not any(state["run"] in (None, run) for state in states.values()):
        run = None  # checkpoints of another run were copied here to resume from
    newest = None
    for path, state in reversed(states.items()):
        if run is None or state["run"] in (None, run):
            try:
                check_files(path, state)
            except ValueError as error:
                damaged[path] = error
            else:
                newest = path
                break
    if newest is None and damaged:
        reasons = " ".join(map(str, damaged.values()))
        raise ValueError(f"{reasons} No checkpoint in {output_dir} is complete; remove them to start from scratch.")
    for path, why in damaged.items():
        if newest is not None and step_of(path) > step_of(newest):
            logger.warning(f"{why} It is now called {move_aside(path, 'damaged').name}; {newest.name} takes its place.")
    return newest


def check_named(wanted: str, output_dir: Path) -> None:
    """Refuses a `--resume_from_checkpoint` that is not a checkpoint.

    Raises:
        `ValueError`: Naming it.
    """
    if wanted != "latest" and not (Path(wanted) / STATE_FILE).is_file():
        raise ValueError(
            f"--resume_from_checkpoint {wanted} is not a complete checkpoint ({STATE_FILE} is missing); name a folder "
            f"such as {output_dir}/checkpoint-500, or 'latest'."
        )


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of the run that a folder belongs to, oldest first."""
    run, found = _run_of(output_dir), []
    for path in _numbered(output_dir):
        try:
            state = read_state(path)
        except (ValueError, OSError):  # damaged, or deleted meanwhile
            continue
        if state["step"] == step_of(path) and (run is None or state["run"] in (None, run)):
            found.append(path)
    return found


def _numbered(output_dir: Path) -> list[Path]:
    """Folders named like a checkpoint with a state file, oldest first."""
    named = [path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in named if (path / STATE_FILE).is_file()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of updates in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _run_of(output_dir: Path) -> str | None:
    """The run that a folder belongs to, if recorded."""
    path = output_dir / RUN_FILE
    return read_json(path, {"run": str})["run"] if path.is_file() else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's record: `step` and `seconds` trained, `fingerprint`, `run`, and the `digests` of its files.

    `digests` is `None` in checkpoints of older versions.

    Raises:
        `ValueError`: If it is damaged.
    """
    try:
        state = read_json(checkpoint / STATE_FILE, _STATE)
        if {"run", "digests"} & state.keys() and state["digests"].pop(STATE_FILE) != _digest_of_state(state):
            raise ValueError
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{checkpoint / STATE_FILE} is damaged.") from None
    return {"seconds": 0.0, "run": None, "digests": None, **state}


def check_files(checkpoint: Path, state: dict[str, Any]) -> None:
    """Compares the files with their digests; those of older versions without digests are only opened.

    Raises:
        `ValueError`: If one is missing or damaged, naming it.
    """
    if state["digests"] is not None:
        wrong = {name for name in state["digests"] if not (checkpoint / name).is_file()}
        if not wrong:
            found = digests(checkpoint, list(state["digests"]))
            wrong = {name for name, digest in state["digests"].items() if found[name] != digest}
    else:
        wrong = {name for name in ("model.safetensors", "optimizer.bin", OTHERS_FILE) if not _opens(checkpoint / name)}
    if wrong:
        raise ValueError(f"{checkpoint / min(wrong)} is missing or damaged.")


def digests(folder: Path, names: list[str]) -> dict[str, str]:
    """The SHA-256 of each file, by name."""

    def digest(name: str) -> str:
        with open(folder / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _digest_of_state(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _opens(path: Path) -> bool:
    """Whether a file of tensors is not truncated."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        else:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE:
        return False
    return True


def move_aside(path: Path, why: str) -> Path:
    """The new path of a file or folder, renamed so that nothing finds it as a checkpoint."""
    target, number = path.with_name(f"{path.name}-{why}"), 1
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f"{path.name}-{why}-{number}")
    os.replace(path, target)
    return target


def load_checkpoint(
    accelerator: Accelerator, folder: Path, current: dict[str, Any], others: dict[str, Any]
) -> dict[str, Any]:
    """Restores a training from a checkpoint, and returns its record.

    Args:
        accelerator (`Accelerator`): Restores model and optimizer, which it prepared.
        folder (`Path`): The checkpoint.
        current (`dict`): The [`fingerprint`] of this training.
        others (`dict`): Other objects with a `load_state_dict`, by name.

    Returns:
        `dict`: Its [`read_state`], and the `history` of logged values.

    Raises:
        `ValueError`: If flags, data or number of processes differ, naming each, or it does not fit the model.
    """
    state = read_state(folder)
    saved = without_credentials(state["fingerprint"])
    if saved.get("classes") is not None:
        saved["classes"] = [composed(name) for name in saved["classes"]]
    changes = [
        f"the {name} have changed"
        if name in CONTENT_OF.values()
        else f"{name} was {saved.get(name)!r} and is now {current.get(name)!r}"
        for name in sorted(differing(saved, current, CONTENT_OF))
    ]
    if changes:
        raise ValueError(
            f"{folder} cannot be resumed: it was trained with other settings: {'; '.join(changes)}. Use "
            f"the same flags, or another --output_dir to start from scratch."
        )
    try:
        accelerator.load_state(str(folder))
        states = torch.load(folder / OTHERS_FILE, map_location="cpu", weights_only=True)
        for name, other in others.items():
            other.load_state_dict(states[name])
    except (*UNREADABLE, KeyError) as error:
        raise ValueError(
            f"{folder} is damaged, or from another model; remove it to resume from an older one. "
            f"({str(error).partition(chr(10))[0]})"
        ) from error
    # Older versions saved the history next to the checkpoints.
    return {**state, "history": read_history(folder if (folder / HISTORY).is_file() else folder.parent)}


def read_history(folder: Path) -> list[dict[str, float]]:
    """The values that a stage logged, each with the step and the seconds of training.

    Raises:
        `ValueError`: If the file is damaged.
    """
    path = folder / HISTORY
    fix = "remove it to resume without what was logged before"
    return read_json(path, [_ROW], fix) if path.is_file() else []


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    state: dict[str, Any],
    others: dict[str, Any],
    history: list[dict[str, float]],
    total_limit: int,
) -> Path:
    """Saves a checkpoint atomically, then removes the oldest; called by all processes.

    Args:
        accelerator (`Accelerator`): Saves model and optimizer.
        output_dir (`Path`): The folder of the checkpoints.
        state (`dict`): Its `step`, `seconds`, `fingerprint` and `run`.
        others (`dict`): Other objects with a `state_dict`, by name.
        history (`list[dict]`): The logged values.
        total_limit (`int`): Number of newest checkpoints to keep.

    Raises:
        `FullDiskError`: If the disk is full; older checkpoints stay complete.
    """
    folder = output_dir / f"checkpoint-{state['step']}"
    if accelerator.is_main_process and os.path.lexists(folder):
        logger.warning(f"{folder} is of another run, and is now called {move_aside(folder, 'other').name}.")
    replacing = replacing_folder(folder) if accelerator.is_main_process else nullcontext(partial_name(folder))
    with replacing as partial:
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            torch.save({name: other.state_dict() for name, other in others.items()}, partial / OTHERS_FILE)
            write_json(history, partial / HISTORY)
            state = {**state, "digests": digests(partial, _files(partial))}
            state["digests"][STATE_FILE] = _digest_of_state(state)
            write_json(state, partial / STATE_FILE)
    if accelerator.is_main_process:
        write_json(history, output_dir / HISTORY)
        prune(output_dir, total_limit)
    accelerator.wait_for_everyone()
    return folder


def prune(output_dir: Path, total_limit: int) -> None:
    """Removes the run's oldest checkpoints beyond a limit, except those with files of the user."""
    own = [path for path in list_checkpoints(output_dir) if not path.is_symlink()]
    for path in own[:-total_limit]:
        known = read_state(path)["digests"]
        others = [] if known is None else sorted({*_files(path)} - {STATE_FILE, *known})
        if others:
            logger.warning(f"{path} is kept beyond --checkpoints_total_limit, since it holds {', '.join(others)}.")
        else:
            remove_folder(path)


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def start_run(output_dir: Path, run: str | None, total_limit: int) -> str:
    """The run that a folder now belongs to; files of another run are moved to a subfolder.

    Args:
        output_dir (`Path`): The folder.
        run (`str`, *optional*): The run to resume. Default: that of the folder, or a new one.
        total_limit (`int`): Number of newest checkpoints of the run to keep.

    Returns:
        `str`: The run.
    """
    old = _run_of(output_dir)
    run = run or old or uuid.uuid4().hex
    if old not in (None, run):
        left = [*list_checkpoints(output_dir), *output_dir.glob("preview-*.png"), output_dir / HISTORY]
        left = [path for path in (*left, output_dir / "logs") if path.exists()]
        aside = output_dir / "earlier-run"
        if aside.exists():
            move_aside(aside, "older")
        aside.mkdir()
        for path in left:
            os.replace(path, aside / path.name)
        logger.warning(f"{output_dir} belonged to another run: {', '.join(path.name for path in left)} are in {aside}.")
    if old != run:
        write_json({"run": run}, output_dir / RUN_FILE)
    prune(output_dir, total_limit)
    return run


def save_folder(save: Callable[[str], Any], folder: Path) -> None:
    """Replaces a finished model or pipeline atomically, and keeps the user's files and edits in it.

    Kept are files that no earlier call has written, and changes since in `model_index.json` (saved defaults, added
    components) and of the class names in a model's config. `save` finds the older model card, to keep its edits.

    Args:
        save (`Callable`): Writes into the given folder.
        folder (`Path`): The final folder.
    """
    with replacing_folder(folder) as partial:
        if (folder / "README.md").is_file():
            shutil.copy(folder / "README.md", partial)
        save(str(partial))
        made = {path.relative_to(partial) for path in partial.rglob("*")}
        names = [path.as_posix() for path in made if path.name in (INDEX_FILE, CONFIG_FILE)]
        configs = {name: read_record(partial / name) for name in names}
        written = {name: _editable(name, config) for name, config in configs.items()}
        if folder.is_dir():
            record = read_record(folder / MADE_FILE, {"files": [str]})
            ours = {*made, *map(Path, record.get("files", ())), Path(MADE_FILE)}
            keep_foreign_files(folder, partial, ours)
            for name, config in configs.items():
                now = _editable(name, read_record(folder / name))
                if now and (changed := changed_entries(name, record.get(name), now, written[name])):
                    write_json({**config, **changed}, partial / name)
        files = sorted(path.as_posix() for path in made if (partial / path).is_file())
        write_json({"files": files, **written}, partial / MADE_FILE)


def _editable(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The entries of a config that a user may change; of a model's config only the class names."""
    if Path(name).name == INDEX_FILE:
        return config
    return {key: config[key] for key in ("id2label", "label2id") if key in config}


def read_record(path: Path, shape: Any = dict) -> dict[str, Any]:
    """The content of a JSON file, empty if it is missing or damaged: too late to stop for that."""
    try:
        return read_json(path, shape)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        logger.warning(f"{error} Changes in it are lost.")
        return {}


def changed_entries(name: str, written: Any, now: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The entries of a config changed since it was last written, except class names of other classes.

    Args:
        name (`str`): The file.
        written (`dict`): The entries as written; another type if there is no record.
        now (`dict`), new (`dict`): The current entries, and those to write.
    """
    if not isinstance(written, dict):  # an older version kept no record
        written = {key: value for key, value in now.items() if key != "sampling_defaults"}
    if Path(name).name == CONFIG_FILE and _classes(now) != _classes(new):
        return {}
    keys = sorted(key for key in {*written, *now} if key[0] != "_")
    changed = {key: now.get(key) for key in keys if now.get(key) != written.get(key)}
    for key, value in changed.items():
        if value != new.get(key):
            logger.info(f"Kept the changed {key} of {name}: {value}.")
    return changed


def _classes(config: dict[str, Any]) -> set[str]:
    names = config.get("id2label")
    return set(names) if isinstance(names, dict) else set()


def keep_foreign_files(old: Path, new: Path, ours: set[Path]) -> None:
    """Links the user's files of an older folder into a newer one."""
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
    """Restores folders that a killed process left unfinished."""
    for path in output_dir.glob(".*"):
        if path.suffix in (".partial", ".old", ".removed"):
            recover_folder(path.with_name(path.stem[1:]))
