"""lm-eval's own command with shardprune's model in it: python -m shardprune.evaluation.lm_eval --model shardprune ...

lm-eval 0.4.13 knows its models from a table of its own and looks for no others, so that somebody must register
those before its command starts.
"""

import sys

from lm_eval.__main__ import cli_evaluate

import shardprune.evaluation.harness  # noqa: F401  registers the model
from shardprune.errors import InputError


def main() -> None:
    """Run lm-eval's command."""
    try:
        cli_evaluate()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
