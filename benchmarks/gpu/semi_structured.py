"""2:4 weights in torch's compressed form beside the dense ones: the bundled model through an export, and products,
prefill and decode of layers of Llama-70B shape, dense and compressed in turn."""

import copy
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, PreTrainedModel

from benchmarks.gpu.results import Rows
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.whole_run import prune_bundled
from shardprune import ExportRecipe, export, load_exported, to_semi_structured
from shardprune.errors import InputError
from shardprune.recipes.demo import bundled_model
from shardprune.report.progress import Reporter
from shardprune.storage.stdlib import documents

NEAR = 3e-2  # of logits in bfloat16: sums in another order
SAME = 1e-2  # of a perplexity in bfloat16
ROUNDS = 3  # of measurements, dense and compressed in turn
Work = Callable[[], object]


@torch.no_grad()
def run(setting: Setting, rows: Rows) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _bundled(setting, folder, rows)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=setting.size(8192, 64),
        intermediate_size=setting.size(28672, 128),
        num_hidden_layers=setting.size(2, 1),
        num_attention_heads=setting.size(64, 4),
        num_key_value_heads=setting.size(8, 2),
    )
    dtype = torch.bfloat16 if setting.cuda else torch.float32
    torch.manual_seed(0)
    with torch.device(setting.device):
        dense = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for module in dense.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.view(-1, 4)[:, 2:] = 0  # which of four are zero changes no speed
    models = {"dense": dense}
    if setting.cuda:
        models["2:4"] = _compressed(dense, rows)
        tokens = torch.randint(0, 1024, (2, 128), device=setting.device)
        one, other = (model(tokens).logits.float() for model in models.values())
        distance = float((one - other).norm() / one.norm())
        rows.add("logits of 70B layers, distance from the dense ones'", distance, ok=distance < NEAR)
    _products(setting, models, rows)
    _prefill(setting, models, rows)
    _decode(setting, models, rows)


def _bundled(setting: Setting, folder: str, rows: Rows) -> None:
    """Prune the bundled model to 2:4, and compare its export's perplexity with that of the checkpoint."""
    fields = {"sparsity": None, "pattern": "2:4", "method": "magnitude", "measure_error": False, "eval_windows": 2}
    prune_bundled(setting, setting.device, f"{folder}/out", rows, **fields)
    recipe = ExportRecipe(model=f"{folder}/out", to=f"{folder}/export", format="semi-structured")
    found = export(recipe, Reporter(quiet=True))
    rows.add("weights in the export", len(found.semi_structured), ok=len(found.semi_structured) > 0)
    text = "".join(documents("heldout"))[:20_000]
    tokens = AutoTokenizer.from_pretrained(bundled_model())(text, return_tensors="pt").input_ids[:, : 8 * 256]
    windows = tokens[:, : tokens.shape[1] // 8 * 8].reshape(8, -1).to(setting.device)
    if not setting.cuda:
        try:
            load_exported(recipe.to)
        except InputError as error:
            rows.add("without a GPU", str(error), ok="has no kernels for 2:4" in str(error))
        return
    dense = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.bfloat16).to(setting.device).eval()
    ours = load_exported(recipe.to, device=setting.device, dtype=torch.bfloat16)
    losses = [float(model(windows, labels=windows).loss) for model in (dense, ours)]
    before, after = map(math.exp, losses)
    rows.add("perplexity of the bundled model, dense", before)
    rows.add("perplexity of the bundled model, 2:4", after, ok=abs(after / before - 1) < SAME)


def _compressed(dense: PreTrainedModel, rows: Rows) -> PreTrainedModel:
    before = torch.cuda.memory_allocated()
    own = copy.deepcopy(dense)
    whole = torch.cuda.memory_allocated() - before
    to_semi_structured(own)
    torch.cuda.empty_cache()
    rows.add("form", type(own.model.layers[0].mlp.up_proj.weight).__name__)
    rows.add("memory of the model, share of the dense one's", (torch.cuda.memory_allocated() - before) / whole)
    return own


def _products(setting: Setting, models: Mapping[str, PreTrainedModel], rows: Rows) -> None:
    """Products of one weight with so many tokens."""
    for count in setting.sizes((1, 16, 64, 512, 4096), (1, 16)):
        given = {name: _hidden(model, count) for name, model in models.items()}
        work = {
            name: (lambda model=model, hidden=given[name]: model.model.layers[0].mlp.up_proj(hidden))
            for name, model in models.items()
        }
        _compare(setting, f"up_proj, {count} tokens", work, rows)


def _prefill(setting: Setting, models: Mapping[str, PreTrainedModel], rows: Rows) -> None:
    for batch, length in setting.sizes(((1, 2048), (8, 512)), ((1, 16),)):
        tokens = torch.randint(0, 1024, (batch, length), device=setting.device)
        work = {name: (lambda model=model, tokens=tokens: model(tokens)) for name, model in models.items()}
        _compare(setting, f"prefill, {batch} x {length} tokens", work, rows)


def _decode(setting: Setting, models: Mapping[str, PreTrainedModel], rows: Rows) -> None:
    """Seconds of a step with one new token for each sequence."""
    for batch in setting.sizes((1, 16, 64), (1,)):
        tokens = torch.randint(0, 1024, (batch, setting.size(128, 8)), device=setting.device)
        work = {name: _step(model, tokens) for name, model in models.items()}
        _compare(setting, f"decode, {batch} sequences", work, rows)


def _step(model: PreTrainedModel, tokens: Tensor) -> Work:
    cache = DynamicCache()
    model(tokens, past_key_values=cache)

    def step() -> None:
        model(tokens[:, -1:], past_key_values=cache)
        cache.crop(-1)  # cuDNN builds a plan for every new length, which the first model would pay for

    return step


def _hidden(model: PreTrainedModel, count: int) -> Tensor:
    return torch.randn(count, model.config.hidden_size, device=model.device, dtype=model.dtype)


def _compare(setting: Setting, label: str, work: Mapping[str, Work], rows: Rows) -> None:
    """Measure works in turn, and add the median seconds of each, and their ratio."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(1 if setting.small else ROUNDS):
        for name, own in work.items():
            taken[name].append(setting.seconds(own))
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    for name, seconds in medians.items():
        rows.add(f"{label}, {name}", seconds, "s")
    if len(medians) == 2:
        rows.add(f"{label}: dense / 2:4", medians["dense"] / medians["2:4"])
