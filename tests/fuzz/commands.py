"""The commands that are given inputs, and what each of them reads and makes."""

from dataclasses import dataclass

from tests.fuzz.material import SAMPLES, SEQLEN

LOCAL = ("--backend", "local", "--threads", "1")
DRAWN = ("--samples", str(SAMPLES), "--seqlen", str(SEQLEN))
RUN = (*LOCAL, *DRAWN, "--no-report", "--calibration", "tokens.npy")
WANDA = ("--method", "wanda", "--sparsity", "0.5")
MEASURED = ("--eval", "tokens.npy")
TRAINING = ("--lora-rank", "4", "--steps", "1", "--batch", "2", "--length", str(SEQLEN), "--keep-sparsity", *LOCAL)


@dataclass(frozen=True)
class Command:
    """A command over the material.

    Attributes:
        words: of the command line.
        needs: files and folders of the material that it reads.
        makes: the folder that holds a pruned checkpoint at its end; "" where it makes none.
        same: the output of the material whose tensors that checkpoint must have to the bit; "" for none.
        ends: its exit code for material that nothing is wrong with.
        finds: whether exit code 0 says that nothing is wrong with the input.
        source: the checkpoint that it prunes, and whose perplexity it measures if the words say so; "" for none.
    """

    words: tuple[str, ...]
    needs: tuple[str, ...]
    makes: str = ""
    same: str = ""
    source: str = ""
    finds: bool = False
    ends: int = 0


TEXTS = ("tokens.npy", "text.txt", "documents.jsonl", "instructions.json", "instructions.jsonl")
COMMANDS = {
    "prune": Command(
        ("prune", "model", "--out", "out", *WANDA, *RUN, *MEASURED), ("model", "tokens.npy"), "out", source="model"
    ),
    "prune sharded": Command(
        ("prune", "sharded", "--out", "out", *WANDA, *RUN, *MEASURED),
        ("sharded", "tokens.npy"),
        "out",
        source="sharded",
    ),
    "prune structured": Command(
        ("prune", "model", "--out", "out", "--structured", "0.3", *RUN), ("model", "tokens.npy"), "out", source="model"
    ),
    "prune streamed": Command(
        ("prune", "model", "--out", "out", *WANDA, "--weights", "streamed", *RUN),
        ("model", "tokens.npy"),
        "out",
        source="model",
    ),
    "prune on text": Command(
        ("prune", "model", "--out", "out", *WANDA, *LOCAL, *DRAWN, "--no-report", "--calibration", "text.txt"),
        ("model", "text.txt"),
        "out",
    ),
    "prune on lines": Command(
        ("prune", "model", "--out", "out", *WANDA, *LOCAL, *DRAWN, "--no-report", "--calibration", "documents.jsonl"),
        ("model", "documents.jsonl"),
        "out",
    ),
    "prune again": Command(
        ("prune", "model", "--out", "half", *WANDA, *RUN, *MEASURED), ("model", "half", "tokens.npy"), "half", "pruned"
    ),
    "prune finished": Command(
        ("prune", "model", "--out", "pruned", *WANDA, *RUN, *MEASURED),
        ("model", "pruned", "tokens.npy"),
        "pruned",
        "pruned",
    ),
    "prune a recipe": Command(("prune", "--recipe", "prune.yaml"), ("model", "tokens.npy", "prune.yaml")),
    "plan": Command(("plan", "model", "--gpus", "1", "--seqlen", "16"), ("model",)),
    "plan a recovery": Command(
        ("plan-recovery", "model", "--teacher", "model", "--length", "64", "--lora-rank", "4"), ("model",)
    ),
    "plan sharded": Command(("plan", "sharded", "--gpus", "1", "--seqlen", "16"), ("sharded",)),
    "plan a config": Command(("plan", "model/config.json", "--gpus", "2", "--seqlen", "16", "--json"), ("model",)),
    "plan a recipe": Command(("plan", "--recipe", "prune.yaml"), ("model", "prune.yaml")),
    "slurm": Command(("slurm", "job.yaml", "--nodes", "1", "--script", "-"), ("job.yaml",)),
    "mop": Command(
        ("mop", "model", "--out", "out", "--remove", "0.2", *RUN), ("model", "tokens.npy"), "out", source="model"
    ),
    "mop a recipe": Command(("mop", "--recipe", "mop.yaml"), ("model", "tokens.npy", "mop.yaml")),
    "rebuild": Command(
        ("rebuild", "model", "pruned", "--out", "out", *RUN), ("model", "pruned", "tokens.npy"), "out", source="model"
    ),
    "prune a mixture": Command(
        ("prune", "mixture", "--out", "out", *WANDA, *RUN, *MEASURED),
        ("mixture", "tokens.npy"),
        "out",
        source="mixture",
    ),
    "plan a mixture": Command(("plan", "mixture", "--gpus", "1", "--seqlen", "16"), ("mixture",)),
    "experts": Command(
        ("experts", "mixture", "--out", "out", "--keep", "2", *RUN, *MEASURED),
        ("mixture", "tokens.npy"),
        "out",
        source="mixture",
    ),
    "experts by statistics": Command(
        ("experts", "mixture", "--out", "out", "--keep", "2", "--statistics", "fewer", *LOCAL, "--no-report"),
        ("mixture", "fewer"),
        "out",
        "fewer",
    ),
    "export": Command(("export", "pruned", "--to", "out"), ("pruned",)),
    "restore": Command(("export", "exported", "--restore", "--to", "out"), ("exported",), "out", "pruned"),
    "evaluate": Command(
        ("evaluate", "model", "--perplexity", "tokens.npy", "--seqlen", str(SEQLEN), *LOCAL), ("model", "tokens.npy")
    ),
    "evaluate sharded": Command(
        ("evaluate", "sharded", "--perplexity", "tokens.npy", "--seqlen", str(SEQLEN), *LOCAL),
        ("sharded", "tokens.npy"),
    ),
    "evaluate on text": Command(
        ("evaluate", "model", "--perplexity", "text.txt", "--seqlen", str(SEQLEN), *LOCAL), ("model", "text.txt")
    ),
    "evaluate on lines": Command(
        ("evaluate", "model", "--perplexity", "documents.jsonl:text", "--seqlen", str(SEQLEN), *LOCAL),
        ("model", "documents.jsonl"),
    ),
    "evaluate a result": Command(
        ("evaluate", "measured", "--perplexity", "tokens.npy", "--seqlen", str(SEQLEN), *LOCAL, "--no-report"),
        ("measured", "tokens.npy"),
    ),
    "evaluate tasks": Command(
        ("evaluate", "model", "--tasks", "pairs", "--tasks-dir", "tasks", *LOCAL), ("model", "tasks")
    ),
    "evaluate a recipe": Command(("evaluate", "--recipe", "evaluate.yaml"), ("pruned", "tokens.npy", "evaluate.yaml")),
    "recover": Command(
        ("recover", "pruned", "--out", "out", "--data", "documents.jsonl", *TRAINING), ("pruned", *TEXTS)
    ),
    "recover, watched": Command(
        ("recover", "pruned", "--out", "out", "--data", "tokens.npy", *TRAINING, "--track", "tensorboard:logs"),
        ("pruned", "tokens.npy"),
    ),
    "recover on text": Command(
        ("recover", "pruned", "--out", "out", "--data", "text.txt", *TRAINING), ("pruned", *TEXTS)
    ),
    "recover on ids": Command(
        ("recover", "pruned", "--out", "out", "--data", "tokens.npy", *TRAINING), ("pruned", *TEXTS)
    ),
    "recover on instructions": Command(
        ("recover", "pruned", "--out", "out", "--data", "instructions.json", *TRAINING, "--length", "128"),
        ("pruned", *TEXTS),
    ),
    "recover on instruction lines": Command(
        ("recover", "pruned", "--out", "out", "--data", "instructions.jsonl", *TRAINING, "--length", "128"),
        ("pruned", *TEXTS),
    ),
    "recover with settings": Command(
        ("recover", "pruned", "--out", "out", "--data", "tokens.npy", "--deepspeed", "deepspeed.json", *TRAINING),
        ("pruned", "deepspeed.json", *TEXTS),
    ),
    "recover a recipe": Command(("recover", "--recipe", "recover.yaml"), ("pruned", "recover.yaml", *TEXTS)),
    "pipeline": Command(("pipeline", "pipeline.yaml"), ("model", "tokens.npy", "pipeline.yaml")),
    "status": Command(("status", "half"), ("half",)),
    "status finished": Command(("status", "measured", "--json"), ("measured",)),
    "report": Command(("report", "measured"), ("measured",)),
    "report of a search": Command(("report", "mopped"), ("mopped",)),
    "check": Command(("check", "pruned"), ("pruned",), finds=True),
    "check a result": Command(("check", "measured"), ("measured",)),
    "check an unfinished run": Command(("check", "half"), ("half",), ends=1),
    "compare": Command(("report", "--compare", "pruned", "measured", "--file", "c.html"), ("pruned", "measured")),
}
CONFIG_READERS = (
    "prune",
    "prune structured",
    "plan",
    "plan a config",
    "plan a recovery",
    "mop",
    "rebuild",
    "evaluate",
    "recover",
)
HEADER_READERS = ("prune", "prune streamed", "plan", "evaluate", "mop", "rebuild")
