"""`hf-guided …`: parses, calls, prints. What is heavy is imported by the command that needs it."""

import argparse
from collections.abc import Sequence

from . import __version__


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of `hf-guided`, also `python -m hf_guided.cli`."""
    parser = argparse.ArgumentParser(prog="hf-guided", description="Classifier-guided diffusion (ADM).")
    parser.add_argument("--version", action="version", version=f"hf-guided {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")

    command = commands.add_parser("sample", help="draw a grid of samples")
    command.add_argument("model", help="a pipeline's folder, or its name on the Hub")
    command.add_argument("--labels", nargs="+", metavar="LABEL", help="classes by id or name; by default the first ten")
    command.add_argument("--num_images_per_label", type=int, default=8, metavar="N", help="default: 8")
    command.add_argument("--guidance_scale", type=float, metavar="S", help="default: the pipeline's own")
    command.add_argument("--respacing", metavar="R", help='timesteps, such as "250" or "ddim25"; default: its own')
    command.add_argument("--batch_size", type=int, default=64, metavar="N", help="images at once; default: 64")
    command.add_argument("--seed", type=int, default=0, help="default: 0")
    command.add_argument("--output", default="samples.png", metavar="PNG", help="default: samples.png")
    command.set_defaults(run=sample)

    command = commands.add_parser("push", help="push a finished pipeline or model to the Hub, in one commit")
    command.add_argument("folder", help="what save_pretrained or training wrote")
    command.add_argument("repo_id", metavar="user/name", help="the repository, made if there is none")
    command.add_argument("--hub_private", action="store_true", help="make a new repository private")
    command.add_argument("--hub_token", metavar="TOKEN", help="default: the saved login, or HF_TOKEN")
    command.set_defaults(run=push)

    args = parser.parse_args(argv)
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

    pipe = ClassifierGuidedPipeline.from_pretrained(args.model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    labels = None
    if pipe.num_classes is not None:
        names = {name.casefold() for name in pipe.id2label.values()}
        given = args.labels or [str(label) for label in range(min(10, pipe.num_classes))]
        # digits are ids, unless they are the names of classes themselves
        labels = [
            int(label) if label.isdecimal() and (args.labels is None or label not in names) else label
            for label in given
        ]
    elif args.labels:
        raise ValueError("--labels were given, but this pipeline has no classes; leave them out.")
    count = args.num_images_per_label
    batches = sample_batches(
        pipe,
        count if labels is None else pipe.resolve_labels(labels, count).cpu(),
        args.batch_size,
        args.seed,
        guidance_scale=args.guidance_scale,
        respacing=args.respacing,
    )
    images = [image for batch in batches for image in batch]
    ids = [] if labels is None else pipe.resolve_labels(labels, 1).tolist()
    save_png(labelled_grid(images, [pipe.id2label.get(id, str(id)) for id in ids] or ["samples"]), args.output)
    print(f"Saved {len(images)} samples as {args.output}")


def push(args: argparse.Namespace) -> None:
    """Pushes a folder to the Hub."""
    from .hub import push_folder

    print(push_folder(args.folder, args.repo_id, private=args.hub_private or None, token=args.hub_token))


if __name__ == "__main__":
    main()
