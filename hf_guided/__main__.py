"""Where `hf-guided` begins, also `python -m hf_guided`."""

from .interrupts import stop_at_once

stop_at_once()


def main() -> None:
    """[`cli.main`], which is imported once Ctrl-C ends in a sentence."""
    from .cli import main

    main()


if __name__ == "__main__":
    main()
