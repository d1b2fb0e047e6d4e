"""Train a small mixture of experts out of a dense Llama, on English text.

    python -m dev.train_mixture --dense MODEL --text FILE --text FILE --heldout FILE --out OUT

The mixture is a Qwen3-MoE: embedding, attention and norms are those of the dense model, each expert starts as a random
part of the neurons of its layer's MLP, and the routers start at random. A million tokens, some twenty minutes of one
core, are enough for the experts to get tokens of their own and for the whole to predict better than what it began as.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from dev.train_demo_model import heldout_perplexity, learning_rate

ROUTING = 0.1  # standard deviation of the routers' first weights


@torch.no_grad()
def mixture_of(dense: LlamaForCausalLM, experts: int, chosen: int) -> Qwen3MoeForCausalLM:
    """Return a mixture of which a token passes through as many neurons as in the dense model."""
    old = dense.config
    width = old.intermediate_size // chosen
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("head_dim", "rms_norm_eps", "max_position_embeddings", "bos_token_id", "eos_token_id", "rope_parameters")
    config = Qwen3MoeConfig(
        **{name: getattr(old, name) for name in names},
        intermediate_size=old.intermediate_size,
        moe_intermediate_size=width,
        num_experts=experts,
        num_experts_per_tok=chosen,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        output_router_logits=False,
        tie_word_embeddings=False,
        experts_implementation="eager",
    )
    model = Qwen3MoeForCausalLM(config)
    model.load_state_dict(dense.state_dict(), strict=False)
    for layer, given in zip(model.model.layers, dense.model.layers, strict=True):
        mlp, router, mixture = given.mlp, layer.mlp.gate, layer.mlp.experts
        router.weight.normal_(0, ROUTING)
        for norm, weight in ((layer.self_attn.q_norm, "q_proj"), (layer.self_attn.k_norm, "k_proj")):
            # The dense model's heads have about this size for inputs of size one, which a norm would make one.
            norm.weight.fill_(math.sqrt(float(getattr(given.self_attn, weight).weight.square().sum(1).mean())))
        for expert in range(experts):
            own = torch.randperm(old.intermediate_size)[:width]
            gate_up = torch.cat([mlp.gate_proj.weight[own], mlp.up_proj.weight[own]])
            mixture.gate_up_proj[expert].copy_(gate_up)
            mixture.down_proj[expert].copy_(mlp.down_proj.weight[:, own] * chosen)  # their weights add up to one
    return model


def stream_of(tokenizer: AutoTokenizer, files: list[Path]) -> Tensor:
    """Return the texts of files as one int64 stream [tokens]."""
    texts = [file.read_text() for file in files]
    return torch.cat([torch.tensor(tokenizer(text, add_special_tokens=False).input_ids) for text in texts])


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.dense)
    stream, heldout = stream_of(tokenizer, args.text), stream_of(tokenizer, [args.heldout])
    dense = LlamaForCausalLM.from_pretrained(args.dense, dtype=torch.float32)
    dense_perplexity = heldout_perplexity(dense, heldout, args.seqlen, windows=128)
    model = mixture_of(dense, args.experts, args.chosen)
    print(f"{model.num_parameters():,} parameters, {len(stream):,} tokens; dense: {dense_perplexity:.3f}", flush=True)

    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    batch, steps = args.batch_tokens // args.seqlen, args.tokens // args.batch_tokens
    curve, started = [], time.monotonic()
    for step in range(steps + 1):
        if step % args.evaluate_every == 0 or step == steps:
            perplexity = heldout_perplexity(model, heldout, args.seqlen, windows=128)
            curve.append({"tokens": step * args.batch_tokens, "heldout_perplexity": round(perplexity, 3)})
            rate = step * args.batch_tokens / (time.monotonic() - started)
            print(f"step {step}/{steps}  held-out perplexity {perplexity:.3f}  {rate:,.0f} tokens/s", flush=True)
        if step == steps:
            break
        starts = torch.randint(0, len(stream) - args.seqlen, (batch,))
        tokens = torch.stack([stream[s : s + args.seqlen] for s in starts])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.lr, args.warmup)
        model(tokens, labels=tokens, output_router_logits=True).loss.backward()  # with the loss that spreads tokens
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    summary = {"tokens": steps * args.batch_tokens, "seqlen": args.seqlen, "seed": args.seed, "curve": curve}
    summary |= {"dense_perplexity": round(dense_perplexity, 3)}
    (args.out / "training.json").write_text(json.dumps(summary, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, required=True, help="folder of a Llama, with its tokenizer")
    parser.add_argument("--text", type=Path, action="append", required=True, help="text to train on; repeatable")
    parser.add_argument("--heldout", type=Path, required=True, help="text of the printed curve")
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained checkpoint")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--chosen", type=int, default=2, help="experts of a token")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens to train on in all")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=50, help="steps of linear warm-up")
    parser.add_argument("--evaluate-every", type=int, default=100, help="steps between held-out evaluations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
