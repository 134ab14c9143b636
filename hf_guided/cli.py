"""`hf-guided …`: parses, calls, prints. What is heavy is imported by the command that needs it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of `hf-guided`, also `python -m hf_guided.cli`."""
    parser = argparse.ArgumentParser(prog="hf-guided", description="Classifier-guided diffusion (ADM).")
    parser.add_argument("--version", action="version", version=f"hf-guided {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")

    command = commands.add_parser("sample", help="draw a grid of samples")
    command.add_argument("model", help="a pipeline's folder, or its name on the Hub")
    command.add_argument("--labels", nargs="+", metavar="LABEL", help="classes by id or name; by default the first ten")
    command.add_argument("--num_images_per_label", type=count, default=8, metavar="N", help="default: 8")
    command.add_argument("--guidance_scale", type=float, metavar="S", help="default: the pipeline's own")
    command.add_argument("--num_inference_steps", type=count, metavar="N", help="default: the pipeline's own")
    command.add_argument("--respacing", metavar="R", help='instead: published timesteps, such as "250" or "ddim25"')
    command.add_argument("--batch_size", type=count, default=64, metavar="N", help="images at once; default: 64")
    command.add_argument("--seed", type=int, default=0, help="default: 0")
    command.add_argument("--output", default="samples.png", metavar="PNG", help="default: samples.png")
    command.set_defaults(run=sample)

    command = commands.add_parser("upscale", help="make large images of small ones")
    command.add_argument("model", help="an upscaling pipeline's folder, or its name on the Hub")
    command.add_argument(
        "images", nargs="+", help="a .npz file of samples as OpenAI's scripts write it, or image files"
    )
    command.add_argument(
        "--labels", nargs="+", metavar="LABEL", help="one class for all or one for each, by id or name"
    )
    command.add_argument("--guidance_scale", type=float, metavar="S", help="default: the pipeline's own")
    command.add_argument("--num_inference_steps", type=count, metavar="N", help="default: the pipeline's own")
    command.add_argument("--respacing", metavar="R", help='instead: published timesteps, such as "250" or "ddim25"')
    command.add_argument("--batch_size", type=count, default=16, metavar="N", help="images at once; default: 16")
    command.add_argument("--seed", type=int, default=0, help="default: 0")
    command.add_argument("--output", default="upscaled.npz", metavar="NPZ|PNG", help="default: upscaled.npz")
    command.set_defaults(run=upscale)

    command = commands.add_parser("convert", help="OpenAI's checkpoints to a pipeline, and back")
    command.add_argument(
        "model", nargs="?", help="name of a published checkpoint; with --to openai, a folder or a name on the Hub"
    )
    command.add_argument("--checkpoint", metavar="PT", help="the UNet's, the upsampler's or a classifier's .pt file")
    command.add_argument("--classifier", metavar="PT", help="the .pt file of the classifier that guides")
    command.add_argument("--flags", help='instead of a name: "$MODEL_FLAGS $DIFFUSION_FLAGS" of the published scripts')
    command.add_argument("--labels", metavar="TXT", help="class names, one a line; default: ImageNet's for 1,000")
    command.add_argument("--output", required=True, help="the folder to write; with --to openai, the .pt file")
    command.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], help="default: fp32")
    command.add_argument("--to", choices=["openai"], help="write .pt files that the published code loads")
    command.add_argument("--push_to_hub", action="store_true", help="push the folder to --hub_model_id")
    command.add_argument("--hub_model_id", metavar="user/name", help="the repository, made if there is none")
    command.add_argument("--hub_private", action="store_true", help="make a new repository private")
    command.add_argument("--hub_token", metavar="TOKEN", help="default: the saved login, or HF_TOKEN")
    command.set_defaults(run=convert)

    command = commands.add_parser("push", help="push a finished pipeline or model to the Hub, in one commit")
    command.add_argument("folder", help="what save_pretrained or training wrote")
    command.add_argument("repo_id", metavar="user/name", help="the repository, made if there is none")
    command.add_argument("--hub_private", action="store_true", help="make a new repository private")
    command.add_argument("--hub_token", metavar="TOKEN", help="default: the saved login, or HF_TOKEN")
    command.set_defaults(run=push)

    args = parser.parse_args(join_flags(sys.argv[1:] if argv is None else argv))
    try:
        args.run(args)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from None


def sample(args: argparse.Namespace) -> None:
    """Draws a grid of samples, a row for each label."""
    import torch

    from .evaluation.pictures import labelled_grid, save_png
    from .evaluation.sampling import sample_batches
    from .pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline

    check_output(args.output, ".png")
    pipe = load_pipeline(ClassifierGuidedPipeline, args.model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    labels = ids_and_names(pipe, args.labels)
    if labels is None and pipe.num_classes is not None:
        labels = list(range(min(10, pipe.num_classes)))
    ids = torch.tensor([]) if labels is None else pipe.resolve_labels(labels).cpu()
    copies = args.num_images_per_label
    batches = sample_batches(
        pipe,
        copies if labels is None else ids.repeat_interleave(copies),
        args.batch_size,
        args.seed,
        guidance_scale=args.guidance_scale,
        num_inference_steps=args.num_inference_steps,
        respacing=args.respacing,
    )
    images = [image for batch in batches for image in batch]
    names = [pipe.id2label.get(id, str(id)) for id in ids.tolist()] or ["samples"]
    save_png(labelled_grid(images, names), args.output)
    print(f"Saved {len(images)} samples as {args.output}")


def upscale(args: argparse.Namespace) -> None:
    """Makes large images of small ones, as an `.npz` file or as a picture of both."""
    import numpy as np
    import torch
    from PIL import Image

    from .data.samples import read_samples, write_samples
    from .evaluation.pictures import labelled_grid, save_png
    from .pipelines.pipeline_classifier_guided_upscale import ClassifierGuidedUpscalePipeline

    # 1. What there is, looked at before hours are spent on it
    check_output(args.output, ".npz", ".png")
    images: Any
    labels: Any = None
    if len(args.images) == 1 and args.images[0].endswith(".npz"):
        images, labels = read_samples(args.images[0])
    else:
        images = [open_picture(path) for path in args.images]
    pipe = load_pipeline(ClassifierGuidedUpscalePipeline, args.model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.prepare_low_res(images if isinstance(images, list) else images[:1])
    labels = ids_and_names(pipe, args.labels) or (labels if pipe.num_classes is not None else None)
    if labels is not None:
        labels = pipe.resolve_labels(labels).cpu()
        if len(labels) not in (1, len(images)):
            raise ValueError(f"--labels names {len(labels)} classes for {len(images)} images; give one, or one each.")
        labels = labels.expand(len(images))
    elif pipe.unet.config.num_class_embeds is not None and not pipe.unet.config.null_class_label:
        raise ValueError("This upsampler is told the class: add --labels, one for all images or one for each.")

    # 2. Upsample; as the published script does, 8 bits cut off what lies between them
    generator = torch.Generator().manual_seed(args.seed)
    batches = []
    for start in range(0, len(images), args.batch_size):
        part = slice(start, start + args.batch_size)
        sample = pipe(
            images[part],
            None if labels is None else labels[part],
            guidance_scale=args.guidance_scale,
            num_inference_steps=args.num_inference_steps,
            respacing=args.respacing,
            generator=generator,
            output_type="latent",
        ).images
        batches.append(((sample + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
    large = np.concatenate(batches)

    # 3. Save
    if args.output.endswith(".npz"):
        write_samples(args.output, large, None if labels is None else labels.numpy())
    else:
        small = [image if isinstance(image, Image.Image) else Image.fromarray(image.squeeze()) for image in images]
        pairs = zip(small, (Image.fromarray(image.squeeze()) for image in large), strict=True)
        names = [""] * len(large) if labels is None else [pipe.id2label.get(i, str(i)) for i in labels.tolist()]
        grid = labelled_grid([picture for pair in pairs for picture in pair], names, cell_size=max(large.shape[1:3]))
        save_png(grid, args.output)
    print(f"Saved {len(large)} images of {large.shape[1]}x{large.shape[2]} as {args.output}")


def count(text: str) -> int:
    """A number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small, give 1 or more")
    return number


def open_picture(path: str) -> Any:
    """A picture's file, upright."""
    from .data.images import BAD_IMAGE_ERRORS, open_image

    try:
        return open_image({"path": path, "bytes": None})
    except BAD_IMAGE_ERRORS as error:
        raise ValueError(
            f"{path} is no picture that can be read; give .png files and the like, or one .npz."
        ) from error


def load_pipeline(kind: Any, model: str) -> Any:
    """A pipeline of a folder or of the Hub, without the bars of its parts."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    if not Path(model).exists() and (model.count("/") > 1 or model.startswith((".", "/", "~"))):
        raise ValueError(f"There is no folder {model}.")
    try:
        return kind.from_pretrained(model)
    except OSError as error:
        if Path(model).exists():
            raise
        raise ValueError(f"There is no folder {model}, nor could the Hub's of that name be had.") from error


def check_output(path: str, *suffixes: str) -> None:
    """Refuses, before the work, a file of another kind or in a folder that is not there."""
    if not path.endswith(suffixes):
        raise ValueError(f"--output {path} must end in {' or '.join(suffixes)}.")
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise ValueError(f"--output {path}: there is no folder {folder}; make it first.")


def ids_and_names(pipe: Any, labels: list[str] | None) -> list[int | str] | None:
    """Labels of the command line for the pipeline: digits are ids, unless they are the names of classes themselves."""
    if labels is None:
        return None
    if pipe.num_classes is None:
        raise ValueError("--labels were given, but this pipeline has no classes; leave them out.")
    names = {name.casefold() for name in pipe.id2label.values()}
    return [int(label) if label.isdecimal() and label not in names else label for label in labels]


def join_flags(argv: Sequence[str]) -> list[str]:
    """Makes `--flags VALUE` one word, for argparse takes a value that begins with dashes for an option."""
    joined: list[str] = []
    words = iter(argv)
    for word in words:
        value = next(words, None) if word == "--flags" else None
        joined.append(word if value is None else f"{word}={value}")
    return joined


def convert(args: argparse.Namespace) -> None:
    """Converts published checkpoints to a folder, or a folder back."""
    if args.to == "openai":
        from .conversion.export import export_checkpoint

        others = ("checkpoint", "flags", "labels", "dtype", "push_to_hub", "hub_model_id", "hub_private")
        superfluous = [name for name in others if getattr(args, name)]
        if args.model is None or superfluous:
            raise ValueError(
                "--to openai takes the folder of a pipeline or model, --output and, for the pipeline's classifier, "
                "--classifier" + "".join(f"; leave --{name} out" for name in superfluous) + "."
            )
        export_checkpoint(args.model, args.output, classifier=args.classifier, token=args.hub_token)
        return

    if args.checkpoint is None:
        raise ValueError("--checkpoint is missing: the .pt file to convert.")
    if args.push_to_hub:
        if not args.hub_model_id:
            raise ValueError("--push_to_hub needs --hub_model_id user/name to know where.")
        from .hub.push import check_login

        check_login(args.hub_token)

    from .conversion.convert import convert_checkpoint

    convert_checkpoint(
        args.checkpoint,
        args.output,
        name=args.model,
        flags=args.flags,
        classifier=args.classifier,
        labels=args.labels,
        dtype=args.dtype or "fp32",
        repo_id=args.hub_model_id,
    )
    if args.push_to_hub:
        from .hub import push_folder

        print(push_folder(args.output, args.hub_model_id, private=args.hub_private or None, token=args.hub_token))


def push(args: argparse.Namespace) -> None:
    """Pushes a folder to the Hub."""
    from .hub import push_folder

    print(push_folder(args.folder, args.repo_id, private=args.hub_private or None, token=args.hub_token))


if __name__ == "__main__":
    main()
