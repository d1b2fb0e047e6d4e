"""lm-eval's command with shardprune's model: python -m shardprune.evaluation.lm_eval --model shardprune ...

lm-eval 0.4.13 has no plug-in mechanism for models: one of another package has to be imported before its command starts.
"""

from typing import NoReturn

from shardprune.process import be


def main() -> NoReturn:
    """Run lm-eval's command."""
    be(_carry_out)


def _carry_out() -> int:
    from lm_eval.__main__ import cli_evaluate

    import shardprune.evaluation.harness  # noqa: F401  registers the model

    cli_evaluate()
    return 0


if __name__ == "__main__":
    main()
