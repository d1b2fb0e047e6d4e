"""The process of the command `shardprune`: signals have their meaning before anything else is imported."""

from typing import NoReturn

from shardprune.process import be


def main() -> NoReturn:
    """Run the command line that this process was started with."""
    be(_carry_out)


def _carry_out() -> int:
    from shardprune.cli import carry_out

    return carry_out()


if __name__ == "__main__":
    main()
