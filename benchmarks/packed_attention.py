"""Attention of packed rows by examples beside the mask of tokens by tokens.

    python -m benchmarks.packed_attention [--length 2048 --examples 64 128 256 512] [--device cuda --dtype bfloat16]

One step, forward and backward, of a model of Llama's kind with random weights (`--hidden`, `--layers`) on one row of
`--length` tokens that holds examples of a length. Prints for each length milliseconds of a step by mask and by
examples, taken in turn, medians of `--rounds`; their ratio; and the largest difference of the last hidden states, as a
share of their largest.
"""

import copy
import time
from statistics import median

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.options import parser_of
from shardprune.recovery.packed_attention import BOUNDS, attend_by_example, bounds_of
from shardprune.recovery.rows import Example, Rows


def row_of(length: int, size: int) -> dict[str, torch.Tensor]:
    """One row of examples of a size, as a model is given it."""
    tokens = torch.randint(3, 256, (length,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    examples = [Example(part, torch.ones(len(part), dtype=torch.bool)) for part in tokens.split(size)]
    batch = Rows.of([examples]).collate([0])
    del batch["labels"]
    return {**batch, BOUNDS: bounds_of(batch["position_ids"])}


def step(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Run a step; return its seconds and the last hidden states."""
    model.zero_grad()
    synchronise(model.device)
    begun = time.perf_counter()
    states = model.base_model(**batch, use_cache=False).last_hidden_state
    states.square().mean().backward()
    synchronise(model.device)
    return time.perf_counter() - begun, states.detach()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--examples", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=max(options.hidden // 64, 1),
        num_key_value_heads=max(options.hidden // 128, 1),
        max_position_embeddings=options.length,
    )
    models = []
    for by_example in (False, True):
        torch.manual_seed(0)
        own = copy.deepcopy(config)  # which says how a model attends
        model = AutoModelForCausalLM.from_config(own, dtype=dtype, attn_implementation="sdpa").to(device)
        if by_example and not attend_by_example(model, device):
            parser.error(f"{options.device} has no variable-length attention in {options.dtype}")
        models.append(model)
    print(f"| a row of {options.length} tokens, examples of | by mask, ms | by examples, ms | ratio | difference |")
    print("|---|---|---|---|---|")
    for size in options.examples:
        batch = {name: tensor.to(device) for name, tensor in row_of(options.length, size).items()}
        rounds = [[step(model, batch) for model in models] for _ in range(1 + options.rounds)][1:]  # one to warm up
        masked, apart = (1000 * median(one[place][0] for one in rounds) for place in (0, 1))
        expected, found = (states.float() for _, states in rounds[-1])
        difference = float((found - expected).abs().max() / expected.abs().max())
        print(f"| {size} | {masked:.1f} | {apart:.1f} | {apart / masked:.2f} | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    main()
