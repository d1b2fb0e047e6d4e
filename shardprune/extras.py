"""The extras of this package, by what of them a command looks for: `pip install 'shardprune[recover]'`."""

from importlib.util import find_spec

from shardprune.errors import InputError

# Packages by their names in an import statement.
PACKAGES = {
    "eval": ("lm_eval", "accelerate", "peft"),
    "experts": ("scipy",),
    "images": ("PIL",),
    "mlflow": ("mlflow",),
    "recover": ("deepspeed", "tensorboardX"),
    "report": ("jinja2", "plotly"),
    "wandb": ("wandb",),
}


def check_extra(extra: str, field: str) -> None:
    """Check that the packages of an extra are installed, without importing them.

    Raises:
        InputError: one is not; names the field that asks for it.
    """
    if missing := [name for name in PACKAGES[extra] if find_spec(name) is None]:
        raise InputError(field, f"needs {', '.join(missing)}: pip install 'shardprune[{extra}]'")
