"""`hf-guided …`: finds the commands, which are the modules of `commands/`, parses, and runs one."""

if __name__ == "__main__":  # before what takes seconds to import
    from hf_guided.interrupts import stop_at_once

    stop_at_once()

import argparse
import logging
import pkgutil
import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__, commands
from .credentials import FormatterWithoutCredentials
from .processes import user_command


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of `hf-guided`, also `python -m hf_guided.cli`."""
    parser = argparse.ArgumentParser(prog="hf-guided", description="Classifier-guided diffusion (ADM).")
    parser.add_argument("--version", action="version", version=f"hf-guided {__version__}")
    parsers = parser.add_subparsers(title="commands", required=True, metavar="command")
    for module in pkgutil.iter_modules(commands.__path__):
        if not module.name.startswith("_"):
            command = import_module(f"{commands.__name__}.{module.name}")
            added = parsers.add_parser(module.name.replace("_", "-"), help=command.HELP)
            command.add_arguments(added)
            added.set_defaults(run=command.run)

    args, unknown = parser.parse_known_args(join_flags(sys.argv[1:] if argv is None else argv))
    if "words" in args:  # a command that takes flags of its own
        args.words = [*unknown, *args.words]
    elif unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    run = args.run
    del args.run  # what is left are the flags
    if logging.lastResort is not None:  # what shows the warnings of commands without a log
        logging.lastResort.setFormatter(FormatterWithoutCredentials())
    with user_command():
        run(args)


def join_flags(argv: Sequence[str]) -> list[str]:
    """Makes `--flags VALUE` one word, for argparse takes a value that begins with dashes for an option."""
    joined: list[str] = []
    words = iter(argv)
    for word in words:
        value = next(words, None) if word == "--flags" else None
        joined.append(word if value is None else f"{word}={value}")
    return joined


if __name__ == "__main__":
    main()
