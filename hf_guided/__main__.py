"""The entry point of `hf-guided` and `python -m hf_guided`."""

from .interrupts import stop_at_once

stop_at_once()


def main() -> None:
    """[`cli.main`], imported after Ctrl-C is handled."""
    from .cli import main

    main()


if __name__ == "__main__":
    main()
