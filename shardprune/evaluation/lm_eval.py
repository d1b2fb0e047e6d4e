"""lm-eval's command with shardprune's model: python -m shardprune.evaluation.lm_eval --model shardprune ...

lm-eval 0.4.13 has no plug-in mechanism for models: one of another package has to be imported before its command starts.
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
