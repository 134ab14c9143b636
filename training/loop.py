"""The training loop, one for all trainers.

All randomness of a step follows from (seed, step, process). Rerun the same command to resume: the result is
bit-identical to a training without a stop.
"""

import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, send_to_device
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data import DataArguments, StepBatchSampler, load_labelled_images
from ..messages import printable
from ..models.modes import evaluating
from ..processes import StoppedError, join_processes
from .checkpoints import fingerprint, resume, save_checkpoint
from .divergence import check_finite, check_loss, naming_divergence
from .interruption import ignore_signals, stop_requests
from .preflight import preflight
from .saving import finish, save_task, snapshot_pushes
from .task import Batch, Images, Task, evenly
from .timestep_sampling import TimestepSampler

logger = logging.getLogger(__name__)


def train_and_save(
    make_task: Callable[[Any, Images], Task], data_args: DataArguments, args: Any, images: Images | None = None
) -> Path:
    """Trains a task and saves the result with its card; returns the finished folder.

    `make_task` makes the task of its flags, `args`, and of the images to train and to validate on, loaded if not given.
    """
    images = images or load_labelled_images(
        data_args, seed=args.seed, require_labels=getattr(args, "class_conditional", True)
    )
    torch.manual_seed(args.seed)
    task = make_task(args, images)
    train(task, data_args)
    return finish(partial(save_task, task, data_args), Path(args.output_dir) / task.name / task.folder)


def train(task: Task, data_args: DataArguments) -> None:
    """Trains `task.model`, which ends up with the moving average of its weights.

    Raises:
        `StoppedError`: If a signal stopped it; its state is then saved, and the same call resumes it.
        `ValueError`: If a checkpoint has other settings, or another process trains in the same folder.
        [`DivergedError`]: If the loss, a weight or an image of a preview is not finite.
        `OSError`: If `output_dir` cannot be written.
    """
    args = task.args
    output_dir = Path(args.output_dir) / task.name
    join_processes()
    AcceleratorState._reset_state()  # an earlier stage may have had another precision
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
    )
    with preflight(task, accelerator, output_dir):
        training_loop(task, data_args, accelerator, output_dir)
    if accelerator.is_main_process and task.images.bad_files:
        logger.warning(f"{len(task.images.bad_files)} images could not be read and were replaced by others.")


def training_loop(task: Task, data_args: DataArguments, accelerator: Accelerator, output_dir: Path) -> None:
    """The loop of [`train`], after the checks."""
    args = task.args

    # Model, optimizer, moving average of the weights
    if args.gradient_checkpointing:
        enable = getattr(task.model, "enable_gradient_checkpointing", None)
        (enable or task.model.activation_checkpointing_enable)()  # as diffusers and transformers call it
    groups = task.parameter_groups()
    parameters = [parameter for group in groups for parameter in group["params"]]
    betas, decay = (args.adam_beta1, args.adam_beta2), args.adam_weight_decay
    optimizer = torch.optim.AdamW(groups, args.learning_rate, betas, args.adam_epsilon, decay, fused=True)
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    model, optimizer = accelerator.prepare(task.model, optimizer)
    ema = EMAModel(parameters, decay=args.ema_decay)

    # Resume
    others = {"ema": ema, "lr_scheduler": lr_scheduler, "timestep_sampler": task.timestep_sampler}
    settings = fingerprint(task, data_args, accelerator)
    state, history = resume(accelerator, output_dir, args, settings, others)
    step = state["step"]
    ema.to(accelerator.device)

    # Train
    last = args.max_train_steps

    def due(every: int) -> bool:
        return every > 0 and step % every == 0

    model.train()
    with (
        snapshot_pushes(task, data_args, output_dir) as push,
        closing(TimedBatches(task, data_args, accelerator, step)) as batches,
        closing(Log(task.name, accelerator, state, history, last)) as log,
        stop_requests(accelerator) as stop_requested,
    ):
        while step < last:
            for micro_step in range(args.gradient_accumulation_steps):
                seed_everything(args.seed, step, micro_step, accelerator.process_index)
                batch = send_to_device(next(batches), accelerator.device, non_blocking=True)
                timesteps, weights = task.timestep_sampler.sample(len(batch["pixel_values"]))
                timesteps, weights = timesteps.to(accelerator.device), weights.to(accelerator.device)
                with accelerator.accumulate(model):
                    losses, extra = task.losses(model, batch, timesteps)
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
            log.progress.update()

            # Log
            if due(args.logging_steps) or step == last:
                values = {name: value.float().mean() for name, value in {"loss": losses.detach(), **extra}.items()}
                values = {name: accelerator.reduce(value, "mean").item() for name, value in values.items()}
                check_loss(values["loss"], step, history)
                log.progress.set_postfix({name: f"{value:.3g}" for name, value in values.items()})
                log(step, {**values, "learning_rate": lr_scheduler.get_last_lr()[0]})
                batches.warn_if_slow()

            # Validate
            if accelerator.is_main_process and (due(args.validation_steps) or due(args.preview_steps)):
                with averaged_weights(ema, parameters), naming_divergence():
                    if due(args.validation_steps):
                        log(step, {**task.validation_metrics(), **validate(task, accelerator.device)})
                    if due(args.preview_steps):
                        task.preview(output_dir / f"preview-{step:06d}.png")

            # Save
            stopping = stop_requested()
            if stopping or due(args.checkpointing_steps) or step == last:
                check_finite("a weight", sum(weight.detach().float().mean() for weight in parameters).item(), step)
                state |= {"step": step, "seconds": round(log.seconds, 1)}
                folder = save_checkpoint(accelerator, output_dir, state, others, history, args.checkpoints_total_limit)
                if push and not stopping and step < last:
                    with averaged_weights(ema, parameters):
                        push(step)
            if stopping:
                how = "" if args.resume_from_checkpoint == "latest" else " with --resume_from_checkpoint latest"
                raise StoppedError(
                    stopping, f"Stopped after {step} steps, saved {folder}. Rerun the same command{how} to resume."
                )

    ema.copy_to(parameters)
    accelerator.unwrap_model(model).eval()


@torch.no_grad()
def validate(task: Task, device: torch.device) -> dict[str, float]:
    """Mean losses on held-out images, if any, each noised to the same timesteps with the same noise every time."""
    if task.held_out is None:
        return {}
    with evaluating(task.model), torch.random.fork_rng():
        seed_everything(0, 0, 0, 0)
        keys = [(index, 0) for index in evenly(len(task.held_out), 1024)]
        uniform = TimestepSampler(task.timestep_sampler.num_train_timesteps)
        totals: dict[str, float] = {}
        for batch in DataLoader(task.held_out, sampler=keys, batch_size=task.args.train_batch_size):
            batch = send_to_device(batch, device, non_blocking=True)
            timesteps, _ = uniform.sample(len(batch["pixel_values"]))
            losses, extra = task.losses(task.model, batch, timesteps.to(device))
            for name, value in {"loss": losses, **extra}.items():
                totals[name] = totals.get(name, 0.0) + value.float().sum().item() / len(keys)
    return {f"held_out/{name}": value for name, value in totals.items()}


def seed_everything(seed: int, step: int, micro_step: int, process_index: int) -> None:
    """Seeds all random generators from the position in the training."""
    digest = hashlib.sha256(f"{seed}/{step}/{micro_step}/{process_index}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@contextmanager
def averaged_weights(ema: EMAModel, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Swaps in the moving average of the weights temporarily."""
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


class Log:
    """Values by step, for the tracker and for `history`, with the seconds of training; and the progress bar."""

    def __init__(
        self, name: str, accelerator: Accelerator, state: dict[str, Any], history: list[dict[str, float]], last: int
    ):
        self.accelerator, self.history = accelerator, history
        if accelerator.log_with:
            config = {key: printable(str(value)) for key, value in state["fingerprint"].items()}
            # Purges log entries of a killed run after its newest checkpoint.
            accelerator.init_trackers(name, config, {"tensorboard": {"purge_step": state["step"] + 1}})
        self.progress = tqdm(
            initial=state["step"], total=last, desc=name, disable=not accelerator.is_main_process, mininterval=1
        )
        self.started = time.monotonic() - state["seconds"]

    @property
    def seconds(self) -> float:
        """Seconds of training, those before a resume included."""
        return time.monotonic() - self.started

    def __call__(self, step: int, values: dict[str, float]) -> None:
        if values:
            self.accelerator.log(values, step=step)
            self.history.append({"step": step, "seconds": self.seconds, **values})

    def close(self) -> None:
        """Closes the trackers, but not the process group, which later stages need."""
        self.progress.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()


class TimedBatches:
    """The batches of a training from a step on; warns once if loading slows the training, as large files do."""

    def __init__(self, task: Task, data_args: DataArguments, accelerator: Accelerator, step: int):
        args, first = task.args, step * task.args.gradient_accumulation_steps
        process = {"num_processes": accelerator.num_processes, "process_index": accelerator.process_index}
        sampler = StepBatchSampler(len(task.images), args.train_batch_size, args.seed, **process, start_step=first)
        self.num_workers = workers = data_args.dataloader_num_workers
        self.warns, on_gpu = accelerator.is_main_process, accelerator.device.type == "cuda"
        loader = DataLoader(
            task.images, batch_sampler=sampler, num_workers=workers, worker_init_fn=ignore_signals, pin_memory=on_gpu
        )
        self.batches: Iterator[Batch] = iter(loader)
        self.waited, self.since = 0.0, math.nan

    def __next__(self) -> Batch:
        started = time.monotonic()
        batch = next(self.batches)
        if math.isnan(self.since):
            self.since = time.monotonic()  # the first batch includes the start of the workers
        else:
            self.waited += time.monotonic() - started
        return batch

    def close(self) -> None:
        """Ends the loader's workers, even if the traceback of an error keeps this object."""
        self.batches = iter(())

    def warn_if_slow(self) -> None:
        """Checks the share of loading in the time since the last call."""
        share = self.waited / (time.monotonic() - self.since)
        self.waited, self.since = 0.0, time.monotonic()
        if share > 0.5 and self.warns:
            self.warns = False
            logger.warning(
                f"{share:.0%} of the time is spent loading images: raise --dataloader_num_workers, now "
                f"{self.num_workers} on {os.cpu_count()} cores, or resize the files to about the --resolution first."
            )
