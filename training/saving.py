"""Finished folders: what a training leaves, with its card, and how it reaches the Hub."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..data import DataArguments
from ..files import locked, read_json, replacing_folder, write_json
from ..hub import write_model_card
from ..hub.push import BackgroundPush, PushError, push_command, push_folder
from ..processes import StoppedError
from .arguments import RunArguments
from .cards import describe_data, describe_images, describe_run, describe_steps, on_hub
from .divergence import naming_divergence
from .task import Task

logger = logging.getLogger(__name__)

INDEX_FILE, CONFIG_FILE = "model_index.json", "config.json"
MADE_FILE = ".hf-guided.json"  # in a finished folder: our files, and the entries of configs as written


def save_task(task: Task, data_args: DataArguments, folder: str, is_finished: bool = True) -> None:
    """Saves the current model with its card; a finished one with its pictures and numbers."""
    saved, args = task.pipeline(), task.args
    saved.save_pretrained(folder)
    shown = task.report(Path(folder)) if is_finished else {}
    write_model_card(
        folder,
        title=f"{task.title} {data_args.title}",
        summary=task.summary,
        class_names=list((task.id2label or {}).values()),
        training={
            "images": describe_images((task.images, task.held_out)),
            "steps": describe_steps(args, task.name),
            **task.facts(),
            **(task.findings() if is_finished else {}),
            **describe_run(args),
        },
        model_class=type(saved).__name__,
        guided=False,
        repo_id=args.hub_model_id,
        license=args.hub_license,
        base_model=on_hub(getattr(args, "pretrained_model", None)),
        **describe_data(data_args),
        **shown,
    )


def finish(save: Callable[[str], Any], folder: Path) -> Path:
    """The finished folder, written atomically by the main process."""
    if PartialState().is_main_process:
        with locked(folder.parent), naming_divergence():
            save_folder(save, folder)
        logger.info(f"Saved {folder}")
    return folder


def publish(folder: Path, args: RunArguments) -> None:
    """Pushes the finished folder, if `args` ask for it; a `PushError` gives the command to do it later."""
    if not (args.push_to_hub and args.hub_model_id and PartialState().is_main_process):
        return
    try:
        url = push_folder(folder, args.hub_model_id, **args.hub_access())
    except PushError as error:
        command = push_command(folder, args.hub_model_id, args.hub_private)
        raise PushError(f"{error}\nThe training is done and saved. To push it:\n  {command}") from error
    logger.info(f"Pushed to {url}")


@contextmanager
def snapshot_pushes(task: Task, data_args: DataArguments, output_dir: Path) -> Iterator[Callable[[int], None] | None]:
    """A function that pushes the model after a step in the background, unless a push is running; `None` if not wanted.

    A failed push does not stop the training. A stopped training does not wait for a push.
    """
    args, snapshot = task.args, output_dir / "snapshot"
    if not args.push_to_hub or not PartialState().is_main_process:
        yield None
        return
    pushes = BackgroundPush(args.hub_model_id, **args.hub_access())

    def push(step: int) -> None:
        if not pushes.is_busy:
            save_folder(lambda folder: save_task(task, data_args, folder, is_finished=False), snapshot)
            pushes.start(snapshot, f"Training, step {step} of {args.max_train_steps}")

    try:
        yield push
    except StoppedError:
        if pushes.is_busy or pushes.failure:
            why = f"failed: {pushes.failure}" if pushes.failure else "is not done and ends here."
            command = push_command(snapshot, args.hub_model_id, args.hub_private)
            logger.warning(f"The push of the newest snapshot {why} To finish it:\n  {command}")
        raise
    if pushes.is_busy:
        logger.info("Waiting for the push of the newest snapshot.")
    pushes.wait()
    if pushes.failure:
        logger.warning(f"The push of the newest snapshot failed: {pushes.failure}")
    shutil.rmtree(snapshot, ignore_errors=True)


def save_folder(save: Callable[[str], Any], folder: Path) -> None:
    """Replaces a finished model or pipeline atomically, and keeps the user's files and edits in it.

    Kept are files that no earlier call has written, and changes since in `model_index.json` (saved defaults, added
    components) and of the class names in a model's config. `save` finds the older model card, to keep its edits.
    """
    with replacing_folder(folder) as partial:
        if (folder / "README.md").is_file():
            shutil.copy(folder / "README.md", partial)
        save(str(partial))
        made = {path.relative_to(partial) for path in partial.rglob("*")}
        names = [path.as_posix() for path in made if path.name in (INDEX_FILE, CONFIG_FILE)]
        configs = {name: read_entries(partial / name) for name in names}
        written = {name: _editable(name, config) for name, config in configs.items()}
        if folder.is_dir():
            record = read_entries(folder / MADE_FILE, {"files": [str]})
            keep_foreign_files(folder, partial, {*made, *map(Path, record.get("files", ())), Path(MADE_FILE)})
            for name, config in configs.items():
                now = _editable(name, read_entries(folder / name))
                if now and (changed := changed_entries(name, record.get(name), now, written[name])):
                    write_json({**config, **changed}, partial / name)
        files = sorted(path.as_posix() for path in made if (partial / path).is_file())
        write_json({"files": files, **written}, partial / MADE_FILE)


def _editable(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The entries of a config that a user may change; of a model's config only the class names."""
    if Path(name).name == INDEX_FILE:
        return config
    return {key: config[key] for key in ("id2label", "label2id") if key in config}


def read_entries(path: Path, shape: Any = dict) -> dict[str, Any]:
    """The content of a JSON file, empty if it is missing or damaged: too late to stop for that."""
    try:
        return read_json(path, shape)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        logger.warning(f"{error} Changes in it are lost.")
        return {}


def changed_entries(name: str, written: Any, now: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The entries that the user has changed between `written` and `now`, except class names of other classes."""
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
