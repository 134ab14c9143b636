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
import uuid
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
from ..messages import first_line
from ..processes import from_main

logger = logging.getLogger(__name__)

STATE_FILE = "training_state.json"
OTHERS_FILE = "loop_state.pt"
HISTORY = "history.json"
RUN_FILE = ".run.json"  # the run that a folder belongs to
_NAME = re.compile("checkpoint-(0|[1-9][0-9]*)")  # as this module writes it
# Errors of damaged files of tensors.
UNREADABLE = (OSError, RuntimeError, ValueError, TypeError, EOFError, pickle.UnpicklingError, SafetensorError)

# Flags that may change when a training is resumed: they concern folders, intervals and logs, not what is computed.
FREE_FLAGS = {
    *("output_dir", "resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit"),
    *("validation_steps", "preview_steps", "num_inference_steps", "respacing", "logging_steps", "report_to"),
    *("push_to_hub", "hub_model_id", "hub_private", "hub_token", "hub_license"),
    *("recipe", "dataloader_num_workers", "cache_dir"),
}

# Flags that name a file, and the fingerprint's entry with a hash of its content: only the hash is compared.
CONTENT_OF = {
    **dict.fromkeys(("dataset_name", "dataset_config_name", "train_data_dir"), "images"),
    **dict.fromkeys(("train_split", "validation_split", "held_out_fraction", "image_column", "label_column"), "images"),
    "pretrained_model": "pretrained weights",
}


def fingerprint(task: Any, data_args: Any, accelerator: Accelerator) -> dict[str, Any]:
    """The settings that a resumed training must share with its checkpoint, by flag or name.

    Images and pretrained weights are compared by content: they may have been moved, or their path spelled differently.
    URLs are saved without their credentials, which may change. The task's model has not been trained yet.
    """
    flags = {**dataclasses.asdict(task.args), **dataclasses.asdict(data_args)}
    if flags["lr_scheduler"] in ("constant", "constant_with_warmup"):
        del flags["max_train_steps"]  # other schedules depend on the last step
    id2label, is_pretrained = task.images.id2label, flags.get("pretrained_model") is not None
    images = (task.images, task.held_out)
    settings = {
        **{name: value for name, value in flags.items() if name not in FREE_FLAGS},
        "mixed_precision": accelerator.mixed_precision,
        "number of processes": accelerator.num_processes,
        "number of images": len(task.images),
        "classes": None if id2label is None else [composed(name) for name in id2label.values()],
        "images": from_main(lambda: [None if part is None else part.digest for part in images]),
        "pretrained weights": from_main(lambda: weights_digest(task.model)) if is_pretrained else None,
    }
    return without_credentials(json.loads(json.dumps(settings)))


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
        if newer and _is_of(run, state):
            raise ValueError(
                f"{output_dir} holds newer checkpoints than {folder.name}: {', '.join(newer)}. Resume from the newest "
                f"with --resume_from_checkpoint latest, give another --output_dir, or remove them."
            )
        return folder

    states, damaged = _scan(output_dir)
    # If none is of this run, those of another were copied here to resume from
    own = {path: state for path, state in states.items() if _is_of(run, state)} or states
    for newest, state in reversed(own.items()):
        try:
            check_files(newest, state)
        except ValueError as error:
            damaged[newest] = error
            continue
        for path, why in damaged.items():
            if step_of(path) > step_of(newest):
                aside = move_aside(path, "damaged")
                logger.warning(f"{why} It is now called {aside.name}; {newest.name} takes its place.")
        return newest
    if damaged:
        reasons = " ".join(map(str, damaged.values()))
        raise ValueError(f"{reasons} No checkpoint in {output_dir} is complete; remove them to start from scratch.")
    return None


def check_named(wanted: str, output_dir: Path) -> None:
    """Refuses a `--resume_from_checkpoint` that is not a checkpoint."""
    if wanted != "latest" and not (Path(wanted) / STATE_FILE).is_file():
        raise ValueError(
            f"--resume_from_checkpoint {wanted} is not a complete checkpoint ({STATE_FILE} is missing); name a folder "
            f"such as {output_dir}/checkpoint-500, or 'latest'."
        )


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of the run that a folder belongs to, oldest first."""
    run = _run_of(output_dir)
    return [path for path, state in _scan(output_dir)[0].items() if _is_of(run, state)]


def _scan(output_dir: Path) -> tuple[dict[Path, dict[str, Any]], dict[Path, ValueError]]:
    """The records of the checkpoints of any run, oldest first, and what is wrong with damaged ones."""
    states, damaged = {}, {}
    named = [path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    for path in sorted(named, key=step_of):
        try:
            state = read_state(path)
        except ValueError as error:
            damaged[path] = error
        except OSError:  # incomplete, or deleted meanwhile
            continue
        else:
            if state["step"] == step_of(path):  # otherwise it is a copy
                states[path] = state
    return states, damaged


def step_of(checkpoint: Path) -> int:
    """The steps trained at a checkpoint, by its name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _run_of(output_dir: Path) -> str | None:
    """The run that a folder belongs to, if recorded."""
    path = output_dir / RUN_FILE
    return read_json(path, {"run": str})["run"] if path.is_file() else None


def _is_of(run: str | None, state: dict[str, Any]) -> bool:
    """Whether a checkpoint is of a run; older versions recorded none."""
    return run is None or state["run"] in (None, run)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's record: `step` and `seconds` trained, `fingerprint`, `run`, and the `digests` of its files.

    `digests` is `None` in checkpoints of older versions. A damaged record is a `ValueError`.
    """
    try:
        state = read_json(checkpoint / STATE_FILE, {"step": int, "fingerprint": dict})
        if {"run", "digests"} & state.keys() and state["digests"].pop(STATE_FILE) != _digest_of_state(state):
            raise ValueError
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{checkpoint / STATE_FILE} is damaged.") from None
    return {"seconds": 0.0, "run": None, "digests": None, **state}


def check_files(checkpoint: Path, state: dict[str, Any]) -> None:
    """Refuses files that differ from their digests; those of older versions without digests are only opened."""
    if (saved := state["digests"]) is None:
        wrong = [name for name in ("model.safetensors", "optimizer.bin", OTHERS_FILE) if not _opens(checkpoint / name)]
    else:
        found = digests(checkpoint, [name for name in saved if (checkpoint / name).is_file()])
        wrong = [name for name, digest in saved.items() if found.get(name) != digest]
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
    accelerator: Accelerator,
    folder: Path,
    current: dict[str, Any],
    others: dict[str, Any],
    defaults: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Restores a training from a checkpoint, see [`resume`]; returns its record and the `history` of logged values.

    Flags that an older version did not have have their `defaults`.
    """
    state = read_state(folder)
    saved = {**(defaults or {}), **without_credentials(state["fingerprint"])}
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
            f"{folder} is damaged, or from another model; remove it to resume from an older one. ({first_line(error)})"
        ) from error
    # Older versions saved the history next to the checkpoints.
    return {**state, "history": read_history(folder if (folder / HISTORY).is_file() else folder.parent)}


def resume(
    accelerator: Accelerator, output_dir: Path, args: Any, current: dict[str, Any], others: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Resumes a training from the checkpoint that its flags name, if any, or starts it; called by all processes.

    Restores model, optimizer and `others`. `current` is the [`fingerprint`] of this training. Returns the state, see
    [`save_checkpoint`], and the values logged until then.

    Raises:
        `ValueError`: If flags, data or number of processes differ, naming each, it does not fit the model, or it has
            more steps than wanted.
    """
    checkpoint = from_main(lambda: find_checkpoint(output_dir, args.resume_from_checkpoint))
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "run": None, "history": []}
    if checkpoint:
        defaults = {field.name: field.default for field in dataclasses.fields(args) if field.name in current}
        state = load_checkpoint(accelerator, checkpoint, current, others, defaults)
    step = state["step"]
    if step > args.max_train_steps:
        raise ValueError(
            f"{checkpoint} has {step} steps, more than --max_train_steps {args.max_train_steps}; raise it, or give "
            f"another --output_dir to start from scratch."
        )
    run = from_main(lambda: start_run(output_dir, state["run"], args.checkpoints_total_limit))
    history = [row for row in state["history"] if row["step"] <= step]
    if accelerator.is_main_process:
        write_json(history, output_dir / HISTORY)
        if checkpoint:
            logger.info(f"Resuming from {checkpoint}, after {step} of {args.max_train_steps} steps.")
    return {"step": step, "seconds": state["seconds"], "fingerprint": current, "run": run}, history


def read_history(folder: Path) -> list[dict[str, float]]:
    """The values that a stage logged, each with the step and the seconds of training."""
    path = folder / HISTORY
    fix = "remove it to resume without what was logged before"
    return read_json(path, [{"step": int, "seconds": int | float}], fix) if path.is_file() else []


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    state: dict[str, Any],
    others: dict[str, Any],
    history: list[dict[str, float]],
    total_limit: int,
) -> Path:
    """Saves a checkpoint atomically, then removes the oldest beyond a limit; called by all processes.

    Args:
        accelerator (`Accelerator`): Saves model and optimizer, which it has prepared.
        state (`dict`): The `step`, `seconds`, `fingerprint` and `run`.
        others (`dict`): Further objects with a `state_dict`, by name.
        history (`list[dict]`): The logged values.
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
    """The run that a folder now belongs to: the one given, that of the folder, or a new one.

    Files of another run are moved to a subfolder, and checkpoints beyond the limit are removed.
    """
    old = _run_of(output_dir)
    run = run or old or uuid.uuid4().hex
    if old not in (None, run):
        left = [*list_checkpoints(output_dir), *output_dir.glob("preview-*.png")]
        left += [path for path in (output_dir / HISTORY, output_dir / "logs") if path.exists()]
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


def recover_folders(output_dir: Path) -> None:
    """Restores folders that a killed process left unfinished."""
    for path in output_dir.glob(".*"):
        if path.suffix in (".partial", ".old", ".removed"):
            recover_folder(path.with_name(path.stem[1:]))
