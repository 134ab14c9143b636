"""`hf-guided push`: pushes a folder to the Hub, and the page that shows it."""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from ..processes import print_once
from ._arguments import add_flags

HELP = "push a finished pipeline or model to the Hub, in one commit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="what save_pretrained or training wrote; with --space alone, a name on the Hub")
    parser.add_argument("repo_id", nargs="?", metavar="user/name", help="the repository, made if there is none")
    parser.add_argument("--revision", metavar="BRANCH", help="the branch, made if there is none; default: main")
    parser.add_argument("--create_pr", action="store_true", help="propose the commit as a pull request")
    parser.add_argument("--commit_message", default="Upload with hf-guided", help="default: %(default)s")
    parser.add_argument(
        "--standalone",
        action="store_true",
        help="let the repository carry its code, so that it loads with trust_remote_code=True and without this package",
    )
    parser.add_argument(
        "--include",
        nargs="+",
        action="extend",
        metavar="PATTERN",
        help="push these too: paths in the folder, or patterns such as 'assets/*'; what is no part of the model stays "
        "behind otherwise, and is named",
    )
    parser.add_argument(
        "--hub_license",
        metavar="NAME",
        help="of the model card that is added where there is none, as the Hub spells it: apache-2.0, mit ...",
    )
    parser.add_argument("--space", metavar="user/space", help="also push the page of `hf-guided demo`, as a Space")
    parser.add_argument("--judge", metavar="MODEL", help="of that page: the evaluation classifier on the Hub")
    add_flags(parser, "hub_private", "hub_token")


def run(args: argparse.Namespace) -> None:
    """Pushes a folder to the Hub, and the page that shows it."""
    from ..hub import push_folder
    from ..hub.push import prepare_push

    access = {"private": args.hub_private or None, "token": args.hub_token}
    if args.repo_id is None and args.space is None:
        raise ValueError("Name the repository to push to, user/name; or, for a page of a model there, --space.")
    for flag in ("include", "hub_license"):
        if getattr(args, flag) and args.repo_id is None:
            raise ValueError(f"--{flag} is for a folder that is pushed; name its repository, or leave it out.")
    if args.judge and not args.space:
        raise ValueError("--judge is for the page of --space; add that, or leave it out.")
    if args.repo_id is not None:
        names = ("commit_message", "revision", "create_pr", "standalone", "include")
        options = {name: getattr(args, name) for name in names}
        print_once(push_folder(args.folder, args.repo_id, license=args.hub_license, **options, **access))
    elif Path(args.folder).exists():
        raise ValueError(f"A page shows a model of the Hub: say where {args.folder} goes, as user/name before --space.")
    if args.space is not None:
        from ..hub.space import write_space
        from ..pipelines.auto_pipeline import pipeline_class

        with TemporaryDirectory() as folder:
            model_id = args.folder if args.repo_id is None else prepare_push(args.repo_id, **access)
            kind = pipeline_class(args.folder, args.hub_token).__name__
            write_space(folder, model_id=model_id, judge_id=args.judge, model_class=kind)
            print_once(push_folder(folder, args.space, repo_type="space", **access))
