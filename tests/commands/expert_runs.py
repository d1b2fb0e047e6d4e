"""Runs that remove experts from small models."""

import torch
from transformers import AutoModelForCausalLM

from shardprune import ExpertsRecipe, experts
from shardprune.report.progress import Reporter
from tests.support.architectures import MIXTURES, make_architecture
from tests.support.tiny import make_tokens

SAMPLES, SEQLEN, WAVE = 12, 24, 4
GROUPED = {"deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe"}  # of which each group keeps two, and has four
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def fields(folder, out, model="model", **changed):
    return {
        **{"model": str(folder / model), "out": str(folder / out), "calibration": str(folder / "tokens.npy")},
        **{"samples": SAMPLES, "seqlen": SEQLEN, "wave": WAVE, "backend": "local", "threads": 1, "report": False},
        **changed,
    }


def remove(folder, out, model="model", **changed):
    return experts(ExpertsRecipe.checked(fields(folder, out, model, **changed)), Reporter(quiet=True))


def material(folder, model_type):
    """A model of an architecture and a text; routers choose differently for different tokens."""
    values = MIXTURES[model_type]
    make_architecture(folder / "model", model_type, values | ({"n_routed_experts": 8} if model_type in GROUPED else {}))
    make_tokens(folder / "tokens.npy")
    return folder


def load(path):
    model, found = AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, dtype=torch.float32, experts_implementation="eager"
    )
    assert not any(found.values()), found
    return model.eval()
