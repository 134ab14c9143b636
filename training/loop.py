"""The training loop, one for all trainers.

All randomness of a step follows from (seed, step, process). Rerun the same command to resume: the result is
bit-identical to a training without a stop.
"""

import copy
import functools
import hashlib
import logging
import math
import os
import shutil
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data import DataArguments, LabelledImages, StepBatchSampler, check_images
from ..data.folders import printable
from ..files import locked, write_json
from ..guidance.base import NotFiniteError
from ..hub.push import BackgroundPush, PushError, prepare_push, push_command, push_folder
from ..models.modes import evaluating
from ..processes import StoppedError, from_main, join_processes
from .arguments import LoopArguments, RunArguments
from .checkpoints import (
    HISTORY,
    find_checkpoint,
    fingerprint,
    load_checkpoint,
    recover_folders,
    save_checkpoint,
    save_folder,
    start_run,
)
from .timestep_sampling import TimestepSampler

logger = logging.getLogger(__name__)

LAUNCHER = os.getppid()
DIVERGED = 1e6  # times its first value: a loss from which no training comes back

check_once = functools.lru_cache(maxsize=1)(check_images)  # stages of one script share images

Batch = dict[str, torch.Tensor]


class Task(ABC):
    """A model to train, its loss, and its previews and logs.

    Attributes:
        name (`str`): The stage, for logs and folders.
        model (`nn.Module`): The model to train.
        timestep_sampler (`TimestepSampler`): Draws the timesteps that batches are noised to; a single one for a model
            without noise.
    """

    name: str
    model: Any
    timestep_sampler: TimestepSampler = TimestepSampler(1)

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch, timesteps: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """The loss of each image at its timestep, `(batch,)`, and tensors `(batch,)` to log, by name."""

    @abstractmethod
    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The model's arguments for a batch, to estimate memory."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer, each with an optional learning rate."""
        return [{"params": [parameter for parameter in self.model.parameters() if parameter.requires_grad]}]

    def preview(self, model: nn.Module, path: Path) -> None:
        """Writes a picture of the model's current output, if it has one."""
        return None

    def watch(self) -> dict[str, float]:
        """Further values of the current model to log with the losses on held-out images, by name."""
        return {}


def train(
    task: Task,
    train_images: LabelledImages,
    held_out_images: LabelledImages | None,
    args: LoopArguments,
    data_args: DataArguments,
    save: Callable[[str], Any],
) -> None:
    """Trains `task.model`, which ends up with the moving average of its weights.

    Args:
        task ([`Task`]): Model and loss.
        train_images, held_out_images ([`LabelledImages`]): Images to train and to validate on.
        args ([`LoopArguments`]): The loop's flags.
        data_args ([`DataArguments`]): The data's flags, for the fingerprint.
        save (`Callable`): Writes the model into a folder in its final format, to push it at checkpoints.

    Raises:
        `StoppedError`: If a signal stopped it; its state is then saved, and the same call resumes it.
        `ValueError`: If a checkpoint has other settings, or another process trains in the same folder.
        [`DivergedError`]: If the loss, a weight or an image of a preview is not finite.
        `OSError`: If `output_dir` cannot be written.
    """
    with ExitStack() as lock:
        train_alone(task, train_images, held_out_images, args, data_args, save, lock)


def train_alone(
    task: Task,
    train_images: LabelledImages,
    held_out_images: LabelledImages | None,
    args: LoopArguments,
    data_args: DataArguments,
    save: Callable[[str], Any],
    lock: ExitStack,
) -> None:
    """[`train`] with a given `lock` for its folder."""
    output_dir = Path(args.output_dir) / task.name
    join_processes()
    AcceleratorState._reset_state()  # an earlier stage may have had another precision
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
    )
    preflight(task, train_images, args, accelerator, output_dir, lock)
    if args.gradient_checkpointing:
        enable = getattr(task.model, "enable_gradient_checkpointing", None)
        (enable or task.model.activation_checkpointing_enable)()  # as diffusers and transformers call it
    groups = task.parameter_groups()
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(
        groups,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        fused=True,
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    model, optimizer = accelerator.prepare(task.model, optimizer)
    ema = EMAModel(parameters, decay=args.ema_decay)
    others = {"ema": ema, "lr_scheduler": lr_scheduler, "timestep_sampler": task.timestep_sampler}

    current = fingerprint([args, data_args], (train_images, held_out_images), task.model, accelerator)
    checkpoint = from_main(lambda: find_checkpoint(output_dir, args.resume_from_checkpoint))
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "run": None, "history": []}
    if checkpoint:
        state = load_checkpoint(accelerator, checkpoint, current, others)
    step, seconds = state["step"], state["seconds"]
    history = [row for row in state["history"] if row["step"] <= step]
    ema.to(accelerator.device)
    if step > args.max_train_steps:
        raise ValueError(
            f"{checkpoint} has {step} steps, more than --max_train_steps {args.max_train_steps}; raise it, or use "
            f"another --output_dir to start from scratch."
        )
    run = from_main(lambda: start_run(output_dir, state["run"], args.checkpoints_total_limit))
    if accelerator.is_main_process:
        write_json(history, output_dir / HISTORY)
        if checkpoint:
            logger.info(f"Resuming from {checkpoint}, after {step} of {args.max_train_steps} steps.")
    if accelerator.log_with:
        config = {name: printable(str(value)) for name, value in current.items()}  # paths need not be UTF-8
        # Purges log entries of a killed run after its newest checkpoint.
        accelerator.init_trackers(task.name, config, {"tensorboard": {"purge_step": step + 1}})

    sampler = StepBatchSampler(
        len(train_images),
        args.train_batch_size,
        seed=args.seed,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        start_step=step * args.gradient_accumulation_steps,
    )
    loader = DataLoader(
        train_images,
        batch_sampler=sampler,
        num_workers=data_args.dataloader_num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=accelerator.device.type == "cuda",
    )
    batches = TimedBatches(loader)
    progress = tqdm(
        initial=step, total=args.max_train_steps, desc=task.name, disable=not accelerator.is_main_process, mininterval=1
    )

    def due(every: int) -> bool:
        return every > 0 and step % every == 0

    def log(values: dict[str, float]) -> None:
        accelerator.log(values, step=step)
        history.append({"step": step, "seconds": time.monotonic() - started, **values})

    pushes = None
    if args.push_to_hub and args.hub_model_id and accelerator.is_main_process:
        pushes = BackgroundPush(args.hub_model_id, private=args.hub_private or None, token=args.hub_token)
    snapshot = output_dir / "snapshot"

    model.train()
    started = time.monotonic() - seconds
    with stop_requests(accelerator) as stop_requested:
        while step < args.max_train_steps:
            for micro_step in range(args.gradient_accumulation_steps):
                seed_everything(args.seed, step, micro_step, accelerator.process_index)
                batch = to_device(next(batches), accelerator.device)
                timesteps, weights = task.timestep_sampler.sample(len(batch["pixel_values"]))
                timesteps, weights = timesteps.to(accelerator.device), weights.to(accelerator.device)
                with accelerator.accumulate(model):
                    losses, logs = task.losses(model, batch, timesteps)
                    accelerator.backward((losses * weights).mean())
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                if task.timestep_sampler.learns_from_losses:
                    task.timestep_sampler.update(*accelerator.gather((timesteps, losses.detach())))
            lr_scheduler.step()
            ema.step(parameters)
            step += 1
            progress.update()

            if due(args.logging_steps) or step == args.max_train_steps:
                values = {name: value.float().mean() for name, value in {"loss": losses.detach(), **logs}.items()}
                values = {name: accelerator.reduce(value, "mean").item() for name, value in values.items()}
                check_loss(values["loss"], step, history)
                progress.set_postfix({name: f"{value:.3g}" for name, value in values.items()})
                log({**values, "learning_rate": lr_scheduler.get_last_lr()[0]})
                if accelerator.is_main_process:
                    batches.warn_if_slow()
            if accelerator.is_main_process and (due(args.validation_steps) or due(args.preview_steps)):
                with averaged_weights(ema, parameters), naming_divergence():
                    if due(args.validation_steps):
                        measured = task.watch()
                        if held_out_images is not None:
                            measured |= validate(task, held_out_images, args, accelerator.device)
                        if measured:
                            log(measured)
                    if due(args.preview_steps):
                        task.preview(task.model, output_dir / f"preview-{step:06d}.png")

            stopping = stop_requested()
            if stopping or due(args.checkpointing_steps) or step == args.max_train_steps:
                check_finite(sum(parameter.detach().float().mean() for parameter in parameters).item(), step)
                seconds = time.monotonic() - started
                state = {"step": step, "seconds": round(seconds, 1), "fingerprint": current, "run": run}
                folder = save_checkpoint(accelerator, output_dir, state, others, history, args.checkpoints_total_limit)
                if pushes and not pushes.is_busy and not stopping and step < args.max_train_steps:
                    with averaged_weights(ema, parameters):
                        save_folder(save, snapshot)
                    pushes.start(snapshot, f"Training, step {step} of {args.max_train_steps}")
            if stopping:
                progress.close()
                if pushes and (pushes.is_busy or pushes.failure):
                    why = f"failed: {pushes.failure}" if pushes.failure else "is not done and ends here."
                    logger.warning(
                        f"The push of the newest snapshot {why} To finish it:\n"
                        f"  {push_command(snapshot, pushes.repo_id, args.hub_private)}"
                    )
                finish_trackers(accelerator)
                how = "" if args.resume_from_checkpoint == "latest" else " with --resume_from_checkpoint latest"
                raise StoppedError(
                    stopping, f"Stopped after {step} steps, saved {folder}. Rerun the same command{how} to resume."
                )

    progress.close()
    finish_trackers(accelerator)
    if pushes:
        if pushes.is_busy:
            logger.info("Waiting for the push of the newest snapshot.")
        pushes.wait()
        if pushes.failure:
            logger.warning(f"The push of the newest snapshot failed: {pushes.failure}")
        shutil.rmtree(snapshot, ignore_errors=True)
    ema.copy_to(parameters)
    accelerator.unwrap_model(model).eval()
    if accelerator.is_main_process and train_images.bad_files:
        logger.warning(f"{len(train_images.bad_files)} images could not be read and were replaced by others.")


def finish(save: Callable[[str], Any], folder: Path) -> Path:
    """The finished folder, written atomically by the main process."""
    if PartialState().is_main_process:
        with locked(folder.parent), naming_divergence():
            save_folder(save, folder)
        logger.info(f"Saved {folder}")
    return folder


def publish(folder: Path, args: RunArguments) -> None:
    """Pushes the finished folder, if `args` ask for it.

    Raises:
        `PushError`: If that fails, with the command to do it later.
    """
    if not args.push_to_hub or not args.hub_model_id or not PartialState().is_main_process:
        return
    try:
        url = push_folder(folder, args.hub_model_id, private=args.hub_private or None, token=args.hub_token)
    except PushError as error:
        command = push_command(folder, args.hub_model_id, args.hub_private)
        raise PushError(f"{error}\nThe training is done and saved. To push it:\n  {command}") from error
    logger.info(f"Pushed to {url}")


def preflight(
    task: Task,
    images: LabelledImages,
    args: LoopArguments,
    accelerator: Accelerator,
    output_dir: Path,
    lock: ExitStack,
) -> None:
    """Prints a summary of the training and raises early what would fail late; then makes and locks the folder."""
    if accelerator.is_main_process:
        check_batch(images, args.train_batch_size, accelerator.device)
        report = check_once(images)
        memory = estimate_memory(task, images, args.train_batch_size)
        make_writable(output_dir)
        lock.enter_context(locked(output_dir))
        recover_folders(output_dir)
        if args.push_to_hub and args.hub_model_id:
            args.hub_model_id = prepare_push(args.hub_model_id, private=args.hub_private or None, token=args.hub_token)
        num_parameters = sum(parameter.numel() for parameter in task.model.parameters())
        batch_size = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        height, width = images.resolution
        logger.info(
            f"\n== {task.name} ==\n{report}\n"
            f"model     {num_parameters:,} parameters, {height}x{width} pixels, "
            f"about {memory / 2**30:.2g} GiB a process to train"
            f"{', less with gradient checkpointing' if args.gradient_checkpointing else ''}\n"
            f"training  {args.max_train_steps} steps of {batch_size} images on {accelerator.num_processes} "
            f"{accelerator.device.type} process(es), {args.max_train_steps * batch_size / len(images):.1f} epochs\n"
            f"writes    {output_dir}: checkpoints every {args.checkpointing_steps} steps, logs, the finished model"
            f"{f', pushed to {args.hub_model_id} at each' if args.push_to_hub else ''}"
        )
    accelerator.wait_for_everyone()


def check_batch(images: LabelledImages, batch_size: int, device: torch.device) -> None:
    """Refuses batches whose pixels alone exceed the memory.

    Raises:
        `ValueError`: Naming the batch size.
    """
    size = 4 * batch_size * images.image_channels * math.prod(images.resolution)  # bytes, as float32
    on_gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else psutil.virtual_memory().total
    if size > memory:
        raise ValueError(
            f"--train_batch_size {batch_size}: the pixels of a batch take {size / 2**30:.3g} GiB, and there are "
            f"{memory / 2**30:.3g}; give a smaller batch, and --gradient_accumulation_steps if it is to count as a "
            f"large one."
        )


def make_writable(output_dir: Path) -> None:
    """Makes the folder; an error names `--output_dir`."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / ".writable").touch()
        (output_dir / ".writable").unlink()
    except OSError as error:
        raise OSError(
            f"--output_dir {output_dir} cannot be written ({error.strerror}); choose another folder."
        ) from None


def estimate_memory(task: Task, images: LabelledImages, batch_size: int) -> int:
    """Bytes of weights, gradients, AdamW's moments, the moving average, and a batch's activations.

    The activations are counted on the meta device, where nothing is computed.
    """
    model = copy.deepcopy(task.model).to("meta").train()
    weights = {parameter.untyped_storage()._cdata: parameter.nbytes for parameter in model.parameters()}
    activations: dict[int, int] = {}  # by storage: tensors that several layers keep count once

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            activations[storage._cdata] = storage.nbytes()
        return tensor

    size = (batch_size, images.image_channels, *images.resolution)
    batch = {"pixel_values": torch.empty(size, device="meta")}
    batch["labels"] = torch.zeros(batch_size, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**task.inputs(batch))  # keeps every counted storage alive
    del output
    return 5 * sum(weights.values()) + sum(activations.values())


@torch.no_grad()
def validate(task: Task, images: LabelledImages, args: LoopArguments, device: torch.device) -> dict[str, float]:
    """Mean losses on held-out images, each noised to the same timesteps with the same noise every time."""
    with evaluating(task.model), torch.random.fork_rng():
        seed_everything(0, 0, 0, 0)
        spread = torch.linspace(0, len(images) - 1, min(len(images), 1024)).long()  # rows may be sorted by class
        keys = [(index, 0) for index in spread.tolist()]
        totals: dict[str, float] = {}
        for batch in DataLoader(images, sampler=keys, batch_size=args.train_batch_size):
            batch = to_device(batch, device)
            timesteps, _ = TimestepSampler(task.timestep_sampler.num_train_timesteps).sample(len(batch["pixel_values"]))
            losses, logs = task.losses(task.model, batch, timesteps.to(device))
            for name, value in {"loss": losses, **logs}.items():
                totals[name] = totals.get(name, 0.0) + value.float().sum().item() / len(keys)
    return {f"held_out/{name}": value for name, value in totals.items()}


def seed_everything(seed: int, step: int, micro_step: int, process_index: int) -> None:
    """Seeds all random generators from the position in the training."""
    digest = hashlib.sha256(f"{seed}/{step}/{micro_step}/{process_index}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


class DivergedError(ValueError):
    """A loss, a weight or an image is not finite, or the loss has grown beyond use.

    Args:
        what (`str`): Which of them.
    """

    def __init__(self, what: str):
        super().__init__(
            f"The training has diverged: {what}. Start from scratch in another --output_dir with a lower "
            f"--learning_rate, more --lr_warmup_steps, or bf16 instead of fp16; checkpoints are kept."
        )


def check_finite(value: float, step: int) -> None:
    if not math.isfinite(value):
        raise DivergedError(f"a number is {value} at step {step}")


def check_loss(loss: float, step: int, history: list[dict[str, float]]) -> None:
    """Refuses a loss that is not finite, or a million times what it was first: the samples would soon not be finite."""
    check_finite(loss, step)
    first = next((row["loss"] for row in history if "loss" in row), loss)
    if abs(loss) > DIVERGED * max(1.0, abs(first)):
        raise DivergedError(f"the loss is {loss:.3g} at step {step}, and was {first:.3g} at first")


@contextmanager
def naming_divergence() -> Iterator[None]:
    """Turns images that are not finite into a [`DivergedError`]: the weights are finite, but beyond use."""
    try:
        yield
    except NotFiniteError:
        raise DivergedError("the model's images are not finite") from None


@contextmanager
def averaged_weights(ema: EMAModel, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Swaps in the moving average of the weights temporarily."""
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


@contextmanager
def stop_requests(accelerator: Accelerator) -> Iterator[Any]:
    """A function for the loop to call after each step: the signal received (Ctrl-C, SIGTERM), 0 for none.

    A second Ctrl-C ends the process at once.
    """
    requested: list[int] = []

    def handle(signum: int, frame: Any) -> None:
        # SIGTERM may come several times: from a launcher, and from a cluster's scheduler
        if signum == signal.SIGINT and signum in requested:
            raise StoppedError(signum)
        requested.append(signum)

    # `accelerate launch` of one process does not forward SIGTERM: watch for its end instead
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "LOCAL_RANK" not in os.environ

    def stop_requested() -> int:
        if launched and os.getppid() != LAUNCHER:
            requested.append(signal.SIGTERM)
        signum = requested[0] if requested else 0
        if accelerator.num_processes == 1:
            return signum
        signums = accelerator.gather(torch.tensor([signum], device=accelerator.device))
        return int(signums.max())  # all processes stop after the same step

    previous = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop_requested
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


class TimedBatches:
    """The batches of a loader; warns once if loading slows the training, as large files do."""

    def __init__(self, loader: DataLoader):
        self.batches, self.num_workers = iter(loader), loader.num_workers
        self.waited, self.since, self.has_warned = 0.0, math.nan, False

    def __next__(self) -> Batch:
        started = time.monotonic()
        batch = next(self.batches)
        if math.isnan(self.since):
            self.since = time.monotonic()  # the first batch includes the start of the workers
        else:
            self.waited += time.monotonic() - started
        return batch

    def warn_if_slow(self) -> None:
        """Checks the share of loading in the time since the last call."""
        share = self.waited / (time.monotonic() - self.since)
        self.waited, self.since = 0.0, time.monotonic()
        if share > 0.5 and not self.has_warned:
            self.has_warned = True
            logger.warning(
                f"{share:.0%} of the time is spent loading images: raise --dataloader_num_workers, now "
                f"{self.num_workers} on {os.cpu_count()} cores, or resize the files to about the --resolution first."
            )


def ignore_signals(worker_id: int) -> None:
    """Lets the loader's workers ignore signals: they must live until the step is done."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


def finish_trackers(accelerator: Accelerator) -> None:
    """Closes the trackers, but not the process group, which later stages need."""
    for tracker in accelerator.trackers:
        tracker.finish()
