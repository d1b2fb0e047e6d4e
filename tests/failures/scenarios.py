"""Commands of all kinds over tiny models, for kills at random moments."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.recovery.trainings import is_projection, make_documents
from tests.support.architectures import MIXTURES, make_architecture
from tests.support.tiny import GROUPED, make_model, make_tokens
from tests.support.words import words_tokenizer

TEXT = ("--calibration", "tokens.npy", "--samples", "12", "--seqlen", "24")
MEASURED = ("--eval", "tokens.npy", "--eval", "other.npy")
HALF = ("--sparsity", "0.5")
TRAINING = ("--data", "documents.jsonl", "--length", "16", "--batch", "8", "--micro-batch", "2", "--steps", "6")
TRAINING += ("--checkpoint-every", "2", "--keep-sparsity", "--held-out", "0.2", *MEASURED, "--seqlen", "24")
EVALUATION = ("--perplexity", "tokens.npy", "--perplexity", "other.npy", "--seqlen", "24")


@dataclass(frozen=True)
class Scenario:
    """A command that makes `out`, or measures into it.

    Attributes:
        slots: of Ray that it takes; 0: it is one process.
    """

    name: str
    words: tuple[str, ...]
    slots: int = 0

    def command(self, out: Path, address: str) -> list[str]:
        backend = ("--backend", "ray", "--address", address) if self.slots else ("--backend", "local")
        return [*self.words, "--out", str(out), "--threads", "1", "--no-report", *backend]


def _prune(*words: str) -> tuple[str, ...]:
    return ("prune", "model", *TEXT, "--wave", "4", *words)


def _experts(*words: str) -> tuple[str, ...]:
    return ("experts", "mixture", *TEXT, "--wave", "4", "--keep", "4", *words)


SCENARIOS = (
    Scenario("prune", _prune(*HALF, *MEASURED)),
    Scenario("prune, streamed, Barber", _prune(*HALF, "--rebuild", "barber", "--weights", "streamed")),
    Scenario("prune, OWL", _prune(*HALF, "--method", "wanda", "--allocation", "owl")),
    Scenario("prune, improved", _prune(*HALF, "--targets", "stream", "--reconstruct", "4")),
    Scenario("prune, structured", _prune("--structured", "0.3", *MEASURED)),
    Scenario("prune, composite", _prune("--structured", "0.3", *HALF, *MEASURED)),
    Scenario("rebuild", ("rebuild", "model", "sparse", *TEXT, "--wave", "4", *MEASURED)),
    Scenario("mop", ("mop", "model", *TEXT, "--path", "LG", *MEASURED)),
    Scenario("mop, trained", ("mop", "model", *TEXT, "--path", "LG", "--reconstruct", "4")),
    Scenario("experts", _experts(*MEASURED)),
    Scenario("experts, propagated, trained", _experts("--propagate", "pruned", "--router-kd", "4")),
    Scenario("experts, merged", _experts("--merge")),
    Scenario("recover", ("recover", "sparse", *TRAINING)),
    Scenario("recover, full", ("recover", "sparse", "--full", *TRAINING)),
    Scenario("evaluate", ("evaluate", "sparse", *EVALUATION)),
    Scenario("pipeline", ("pipeline", "pipeline.yaml")),
    Scenario("prune, 2 shards", _prune(*HALF, "--shards", "2", *MEASURED), 2),
    Scenario(
        "prune, parallel, OWL", _prune(*HALF, "--shards", "2", "--propagation", "parallel", "--allocation", "owl"), 2
    ),
    Scenario("prune, composite, 2 shards", _prune("--structured", "0.3", *HALF, "--shards", "2", *MEASURED), 2),
    Scenario("rebuild, 2 shards", ("rebuild", "model", "sparse", *TEXT, "--wave", "4", "--shards", "2", *MEASURED), 2),
    Scenario("mop, 2 shards", ("mop", "model", *TEXT, "--path", "LG", "--shards", "2", *MEASURED), 2),
    Scenario("experts, 2 shards", _experts("--shards", "2", *MEASURED), 2),
    Scenario("recover, full, 2 workers", ("recover", "sparse", "--full", "--workers", "2", *TRAINING), 2),
    Scenario("evaluate, 2 shards", ("evaluate", "sparse", *EVALUATION, "--shards", "2"), 2),
    Scenario("pipeline, 2 shards", ("pipeline", "pipeline.yaml"), 2),
)
PIPELINE = """\
model: model
prune: {sparsity: 0.5, calibration: tokens.npy, samples: 12, seqlen: 24, wave: 4, eval: [tokens.npy]}
recover: {data: documents.jsonl, length: 16, batch: 8, micro_batch: 2, steps: 4, checkpoint_every: 2, workers: 1}
evaluate: {perplexity: [other.npy], seqlen: 24}
"""


def make_material(folder: Path) -> None:
    """Make models, texts and recipes in a folder, from which the commands are started."""
    configs = {"llama": (GROUPED["llama"][0], {**GROUPED["llama"][1], "num_hidden_layers": 4})}
    for name in ("model", "sparse"):
        make_model(folder / name, "llama", configs=configs)
        words_tokenizer().save_pretrained(folder / name)
    make_architecture(folder / "mixture", "qwen3_moe", MIXTURES["qwen3_moe"])
    file = folder / "sparse" / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if is_projection(name):
            tensor[tensor.abs() < tensor.abs().median()] = 0
    save_file(tensors, file, {"format": "pt"})
    torch.manual_seed(0)
    make_tokens(folder / "tokens.npy")
    make_tokens(folder / "other.npy", samples=7, seed=1)
    make_documents(folder / "documents.jsonl")
    (folder / "pipeline.yaml").write_text(PIPELINE)
