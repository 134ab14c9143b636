"""Checkpoints that are whole or not there at all, and that say what they were trained with.

A folder belongs to one run at a time. Of what is in it, only `checkpoint-<step>` that this run has saved is ever taken
for its checkpoint, or deleted; copies under other names, and checkpoints of other runs, are the user's.
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
from ..evaluation.features.extractors import weights_digest
from ..files import differing, partial_name, read_json, recover_folder, remove_folder, replacing_folder, write_json
from ..labels import composed
from ..processes import from_main

logger = logging.getLogger(__name__)

STATE_FILE = "training_state.json"
OTHERS_FILE = "loop_state.pt"
INDEX_FILE, CONFIG_FILE = "model_index.json", "config.json"
MADE_FILE = ".hf-guided.json"  # in a finished folder: which files are ours, and the entries of configs as we wrote them
HISTORY = "history.json"
RUN_FILE = ".run.json"  # which run a folder belongs to
_NAME = re.compile("checkpoint-(0|[1-9][0-9]*)")  # as this module writes it
_STATE = {"step": int, "fingerprint": dict}
_ROW = {"step": int, "seconds": int | float}
# What damaged files of tensors raise.
UNREADABLE = (OSError, RuntimeError, ValueError, TypeError, EOFError, pickle.UnpicklingError, SafetensorError)

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

# Flags that name something, and the entry of the fingerprint that is a hash of it: that alone is compared.
CONTENT_OF = {
    **dict.fromkeys(("dataset_name", "dataset_config_name", "train_data_dir"), "images"),
    **dict.fromkeys(("train_split", "validation_split", "held_out_fraction", "image_column", "label_column"), "images"),
    "pretrained_model": "pretrained weights",
}


def fingerprint(
    arguments: list[Any], images: tuple[Any, Any], model: torch.nn.Module, accelerator: Accelerator
) -> dict[str, Any]:
    """Everything that a resumed training must have in common with what it resumes, by flag or by name.

    Images and pretrained weights are compared by content: they may have been moved, or their path spelled otherwise.
    Addresses are saved without their credentials, which may change.

    Args:
        arguments (`list`): The flags, as dataclasses.
        images (a pair of [`LabelledImages`]): Trained on, and held out, if any are.
        model (`nn.Module`): As it is before the first step.
        accelerator (`Accelerator`): Of the training.
    """
    train_images = images[0]
    merged: dict[str, Any] = {}
    for part in arguments:
        merged.update(dataclasses.asdict(part))
    if merged["lr_scheduler"] in ("constant", "constant_with_warmup"):
        merged.pop("max_train_steps")  # the other schedules depend on where training ends
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
    """The newest whole checkpoint of the folder's run for `"latest"`, or the one named; `None` if there is none yet.

    Damaged ones that are newer are renamed, with a warning.

    Raises:
        `ValueError`: If the folder named is not a whole checkpoint or older than what is there, or none is whole.
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
            if state["step"] == step_of(path):  # or else it is a copy
                states[path] = state
    if not any(state["run"] in (None, run) for state in states.values()):
        run = None  # those of another run were copied here to resume from
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
        raise ValueError(f"{reasons} No checkpoint in {output_dir} is whole; remove them to start from scratch.")
    for path, why in damaged.items():
        if newest is not None and step_of(path) > step_of(newest):
            logger.warning(f"{why} It is now called {move_aside(path, 'damaged').name}; {newest.name} takes its place.")
    return newest


def check_named(wanted: str, output_dir: Path) -> None:
    """Refuses a `--resume_from_checkpoint` that names no checkpoint.

    Raises:
        `ValueError`: Naming it.
    """
    if wanted != "latest" and not (Path(wanted) / STATE_FILE).is_file():
        raise ValueError(
            f"--resume_from_checkpoint {wanted} is not a whole checkpoint ({STATE_FILE} is missing); name a folder "
            f"such as {output_dir}/checkpoint-500, or 'latest'."
        )


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of the run that a folder belongs to, oldest first."""
    run, found = _run_of(output_dir), []
    for path in _numbered(output_dir):
        try:
            state = read_state(path)
        except (ValueError, OSError):  # damaged, or gone by now
            continue
        if state["step"] == step_of(path) and (run is None or state["run"] in (None, run)):
            found.append(path)
    return found


def _numbered(output_dir: Path) -> list[Path]:
    """What is named like a checkpoint and has a state, oldest first."""
    named = [path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in named if (path / STATE_FILE).is_file()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of updates that a checkpoint's name tells."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _run_of(output_dir: Path) -> str | None:
    """The run that a folder belongs to, if it says so."""
    path = output_dir / RUN_FILE
    return read_json(path, {"run": str})["run"] if path.is_file() else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: `step` and `seconds` trained, its `fingerprint`, its `run` and the `digests` of
    its files (`None` in those of older versions).

    Raises:
        `ValueError`: If that is damaged.
    """
    try:
        state = read_json(checkpoint / STATE_FILE, _STATE)
        if {"run", "digests"} & state.keys() and state["digests"].pop(STATE_FILE) != _digest_of_state(state):
            raise ValueError
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{checkpoint / STATE_FILE} is damaged.") from None
    return {"seconds": 0.0, "run": None, "digests": None, **state}


def check_files(checkpoint: Path, state: dict[str, Any]) -> None:
    """Compares the files with what was saved; those of older versions, without digests, are just looked at.

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
        raise ValueError(f"{checkpoint / min(wrong)} is missing or not as it was saved.")


def digests(folder: Path, names: list[str]) -> dict[str, str]:
    """The SHA-256 of files by name."""

    def digest(name: str) -> str:
        with open(folder / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _digest_of_state(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _opens(path: Path) -> bool:
    """Whether a file of tensors is there up to its end."""
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
    """Gives a file or folder another name, under which nothing is looked for."""
    target, number = path.with_name(f"{path.name}-{why}"), 1
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f"{path.name}-{why}-{number}")
    os.replace(path, target)
    return target


def load_checkpoint(
    accelerator: Accelerator, folder: Path, current: dict[str, Any], others: dict[str, Any]
) -> dict[str, Any]:
    """Restores everything.

    Args:
        accelerator (`Accelerator`): Restores what it prepared: model and optimizer.
        folder (`Path`): The checkpoint.
        current (`dict`): The [`fingerprint`] of this training.
        others (`dict`): What else has a `load_state_dict`, by name.

    Returns:
        `dict`: Its [`read_state`], with the `history` that was logged until then.

    Raises:
        `ValueError`: If it was trained with other flags, data or another number of processes, naming each, or does not
            fit the model.
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
            f"{folder} cannot be resumed from, since it was trained with other settings: {'; '.join(changes)}. Use "
            f"the same flags, or another --output_dir to start from scratch."
        )
    try:
        accelerator.load_state(str(folder))
        states = torch.load(folder / OTHERS_FILE, map_location="cpu", weights_only=True)
        for name, other in others.items():
            other.load_state_dict(states[name])
    except (*UNREADABLE, KeyError) as error:
        raise ValueError(
            f"{folder} is damaged, or of another model; remove it to resume from an older one. "
            f"({str(error).partition(chr(10))[0]})"
        ) from error
    # Those of older versions have their history beside them.
    return {**state, "history": read_history(folder if (folder / HISTORY).is_file() else folder.parent)}


def read_history(folder: Path) -> list[dict[str, float]]:
    """What a stage logged, beside the step and the seconds of training.

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
    """Saves all under a temporary name, renames it, and only then removes the oldest; called by all processes.

    Args:
        accelerator (`Accelerator`): Saves what it prepared.
        output_dir (`Path`): Where the checkpoint goes.
        state (`dict`): Its `step`, `seconds`, `fingerprint` and `run`.
        others (`dict`): What else has a `state_dict`, by name.
        history (`list[dict]`): What was logged.
        total_limit (`int`): The newest so many checkpoints stay.

    Raises:
        `FullDiskError`: If the disk is full; the older checkpoints are whole.
    """
    folder = output_dir / f"checkpoint-{state['step']}"
    if accelerator.is_main_process and os.path.lexists(folder):
        logger.warning(f"{folder} is not of this run, and now called {move_aside(folder, 'other').name}.")
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
    """Removes the run's oldest checkpoints beyond a limit, but none in which a user keeps files."""
    own = [path for path in list_checkpoints(output_dir) if not path.is_symlink()]
    for path in own[:-total_limit]:
        known = read_state(path)["digests"]
        others = [] if known is None else sorted({*_files(path)} - {STATE_FILE, *known})
        if others:
            logger.warning(f"{path} stays beyond --checkpoints_total_limit, since it holds {', '.join(others)}.")
        else:
            remove_folder(path)


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def start_run(output_dir: Path, run: str | None, total_limit: int) -> str:
    """Makes a folder that of a run, and moves aside what another run left there.

    Args:
        output_dir (`Path`): The folder.
        run (`str`, *optional*): The run that is resumed; that of the folder by default, or a new one.
        total_limit (`int`): The newest so many checkpoints of the run stay.

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
    """Writes a finished model or pipeline in the place of an older one, whole, and keeps what is not ours in it.

    Kept are files that no earlier call has written, and what was changed since in `model_index.json`: the defaults that
    a sweep or a user has saved, a component that was added; of a model's config, the class names. `save` finds the
    older model card, for its edits.

    Args:
        save (`Callable`): Writes into the folder that it is given.
        folder (`Path`): The folder's final name.
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
    """What a user may change in a config: of a model all but its class names describes the weights."""
    if Path(name).name == INDEX_FILE:
        return config
    return {key: config[key] for key in ("id2label", "label2id") if key in config}


def read_record(path: Path, shape: Any = dict) -> dict[str, Any]:
    """What a file of [`read_json`] holds; nothing of one that is not there, or damaged: too late to ask for help."""
    try:
        return read_json(path, shape)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        logger.warning(f"{error} What was changed in it is not kept.")
        return {}


def changed_entries(name: str, written: Any, now: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The entries of a config that were changed since it was written last, but for class names of other classes.

    Args:
        name (`str`): The file's.
        written (`dict`): The entries as they were written; anything else, if there is no record of it.
        now (`dict`), new (`dict`): The entries as they are, and as they would be written now.
    """
    if not isinstance(written, dict):  # by an earlier version, which kept no record
        written = {key: value for key, value in now.items() if key != "sampling_defaults"}
    if Path(name).name == CONFIG_FILE and _classes(now) != _classes(new):
        return {}
    keys = sorted(key for key in {*written, *now} if key[0] != "_")
    changed = {key: now.get(key) for key in keys if now.get(key) != written.get(key)}
    for key, value in changed.items():
        if value != new.get(key):
            logger.info(f"Kept {key} as it was changed in {name}: {value}.")
    return changed


def _classes(config: dict[str, Any]) -> set[str]:
    names = config.get("id2label")
    return set(names) if isinstance(names, dict) else set()


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
