"""`hf-guided demo`: serves a demo of a pipeline until it is stopped."""

import argparse
import os
import signal
import sys
import time

from ._arguments import PIPELINE, number_between, shown_name

HELP = "a demo of a pipeline in the browser"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=PIPELINE)
    parser.add_argument(
        "--judge", metavar="MODEL", help="evaluation classifier: one that does not guide, to classify the samples"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone; 0.0.0.0 lets others in"
    )
    parser.add_argument("--port", type=number_between(1, 65535), default=7860, help="default: 7860")


def run(args: argparse.Namespace) -> None:
    """Serves a demo of a pipeline until it is stopped."""
    from ..demo.page import build_demo, launch_demo
    from ..evaluation.run import load_extractors
    from ..pipelines.auto_pipeline import load_pipeline
    from ..processes import join_processes

    stopped: list[int] = []
    try:
        state = join_processes()
        pipe = load_pipeline(args.model, state)
        judge = load_extractors([args.judge], pipe, state)[0] if args.judge else None
        url = launch_demo(build_demo(pipe, judge, shown_name(args.model)), args.host, args.port)
        for signum in (signal.SIGINT, signal.SIGTERM):  # no exception, which whatever runs just then could swallow
            signal.signal(signum, lambda signum, frame: stopped.append(signum))
        print(f"The demo of {args.model} is at {url} until Ctrl-C.", flush=True)
        while not stopped:
            time.sleep(0.1)
    except KeyboardInterrupt as stop:
        stopped.append(getattr(stop, "signum", signal.SIGINT))
    print("Stopped.", file=sys.stderr, flush=True)
    os._exit(128 + stopped[0])  # an orderly end is aborted by the threads of a request under way
