"""`hf-guided convert`: converts published checkpoints to a folder, or a folder back."""

import argparse

from ..credentials import without_credentials
from ._arguments import add_flags

HELP = "OpenAI's checkpoints to a pipeline, and back"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", help="name of a published checkpoint; with --to openai, a folder or a name on the Hub"
    )
    parser.add_argument("--checkpoint", metavar="PT", help="the UNet's, the upsampler's or a classifier's .pt file")
    parser.add_argument("--classifier", metavar="PT", help="the .pt file of the classifier that guides")
    parser.add_argument("--flags", help='instead of a name: "$MODEL_FLAGS $DIFFUSION_FLAGS" of the published scripts')
    parser.add_argument("--labels", metavar="TXT", help="class names, one a line; default: ImageNet's for 1,000")
    parser.add_argument("--output", required=True, help="the folder to write; with --to openai, the .pt file")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], help="default: fp32")
    parser.add_argument("--to", choices=["openai"], help="write .pt files that the published code loads")
    parser.add_argument("--push_to_hub", action="store_true", help="push the folder to --hub_model_id")
    parser.add_argument("--hub_model_id", metavar="user/name", help="the repository, made if there is none")
    add_flags(parser, "hub_private", "hub_token")


def run(args: argparse.Namespace) -> None:
    """Converts published checkpoints to a folder, or a folder back."""
    if args.to == "openai":
        from ..conversion.export import export_checkpoint

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
    access = {"private": args.hub_private or None, "token": args.hub_token}
    if args.push_to_hub:
        if not args.hub_model_id:
            raise ValueError("--push_to_hub needs --hub_model_id user/name to know where.")
        from ..hub.push import prepare_push, push_folder

        args.hub_model_id = prepare_push(args.hub_model_id, **access)

    from ..conversion.convert import convert_checkpoint

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
        print(without_credentials(push_folder(args.output, args.hub_model_id, **access)))
