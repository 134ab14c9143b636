"""`hf-guided upscale`: makes large images of small ones, as an `.npz` file or as a picture of both."""

import argparse
from typing import Any

from ._arguments import add_batches, add_seed, add_steps

HELP = "make large images of small ones"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="an upscaling pipeline's folder, or its name on the Hub")
    parser.add_argument("images", nargs="+", help="a .npz file of samples as OpenAI's scripts write it, or image files")
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="one class for all or one for each, as for sample")
    add_steps(parser)
    add_batches(parser, 16)
    add_seed(parser)
    parser.add_argument("--output", default="upscaled.npz", metavar="NPZ|PNG", help="default: upscaled.npz")


def run(args: argparse.Namespace) -> None:
    """Makes large images of small ones, as an `.npz` file or as a picture of both."""
    import numpy as np
    import torch

    from ..data.npz import read_samples
    from ..files import check_parent, check_replaceable
    from ..generation.grids import labelled_grid, save_png
    from ..generation.options import class_ids
    from ..generation.samples import read_record, to_picture, write_samples
    from ..generation.sampling import to_8_bit
    from ..pipelines.auto_pipeline import load_saved
    from ..pipelines.pipeline_classifier_guided_upscale import ClassifierGuidedUpscalePipeline

    # 1. What there is, looked at before hours are spent on it
    if not args.output.endswith((".npz", ".png")):
        raise ValueError(f"--output {args.output} must end in .npz or .png.")
    check_parent(args.output)
    record = {"command": "upscale"}
    check_replaceable([args.output], lambda path: read_record(path) == record, args.images)
    images: Any
    labels: Any = None
    if len(args.images) == 1 and args.images[0].endswith(".npz"):
        images, labels = read_samples(args.images[0])
    else:
        images = [open_picture(path) for path in args.images]
    pipe = load_saved(ClassifierGuidedUpscalePipeline, args.model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.prepare_low_res(images if isinstance(images, list) else images[:1])
    if args.labels is not None:
        labels = class_ids(pipe, args.labels)
    elif pipe.num_classes is None:
        labels = None
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
        batches.append(to_8_bit(sample).permute(0, 2, 3, 1).cpu().numpy())
    large = np.concatenate(batches)

    # 3. Save
    if args.output.endswith(".npz"):
        write_samples(args.output, [large], large.shape, None if labels is None else labels.numpy(), record=record)
    else:
        shown = ((pipe.prepare_low_res(images) + 1) * 127.5).round().to(torch.uint8)  # bytes come back to the bit
        small = shown.permute(0, 2, 3, 1).cpu().numpy()
        pairs = zip(map(to_picture, small), map(to_picture, large), strict=True)
        names = [""] * len(large) if labels is None else [pipe.id2label.get(i, str(i)) for i in labels.tolist()]
        grid = labelled_grid([picture for pair in pairs for picture in pair], names, cell_size=max(large.shape[1:3]))
        save_png(grid, args.output, record=record)
    print(f"Saved {len(large)} images of {large.shape[1]}x{large.shape[2]} as {args.output}")


def open_picture(path: str) -> Any:
    """A picture's file, upright."""
    from ..data.images import BAD_IMAGE_ERRORS, open_image

    try:
        return open_image({"path": path, "bytes": None})
    except BAD_IMAGE_ERRORS as error:
        raise ValueError(
            f"{path} is no picture that can be read ({error}); give .png files and the like, or one .npz."
        ) from error
