"""Train the bundled demo model on the standard library's own sources.

    python -m dev.train_demo_model --out shardprune/assets/stdlib-4m

The training split of `shardprune.storage.stdlib` gives the tokenizer and the model their text; the held-out
split gives the curve that is printed and kept in training.json beside the weights. Some 12 million
tokens take an hour and a half on two CPU cores, minutes on a GPU.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shardprune.storage import stdlib

VOCABULARY = 2048
BEGIN, END = "<s>", "</s>"


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCABULARY` entries, two of them special."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents, vocab_size=VOCABULARY, special_tokens=[BEGIN, END])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=BEGIN, eos_token=END, clean_up_tokenization_spaces=False
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    """All documents as one int64 stream [tokens], each followed by the end token."""
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor([token for ids in encoded for token in [*ids, tokenizer.eos_token_id]])


def build_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=8,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=2048,
            bos_token_id=0,
            eos_token_id=1,
            tie_word_embeddings=False,
            rms_norm_eps=1e-5,
        )
    )


@torch.no_grad()
def heldout_perplexity(model: LlamaForCausalLM, stream: Tensor, seqlen: int, windows: int) -> float:
    """exp of the mean token loss over the first `windows` non-overlapping windows of the stream."""
    model.eval()
    batch = stream[: len(stream) // seqlen * seqlen].view(-1, seqlen)[:windows]
    losses = [model(part, labels=part).loss.item() * len(part) for part in batch.split(16)]
    model.train()
    return math.exp(sum(losses) / len(batch))


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    training = stdlib.documents("train")
    tokenizer = train_tokenizer(training)
    stream = token_stream(tokenizer, training)
    heldout = token_stream(tokenizer, stdlib.documents("heldout")).to(device)
    model = build_model().to(device)
    print(f"{model.num_parameters():,} parameters, {len(stream):,} training tokens on {device}", flush=True)

    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    batch = args.batch_tokens // args.seqlen
    steps = args.tokens // args.batch_tokens
    curve, started = [], time.monotonic()
    for step in range(steps + 1):
        if step % args.evaluate_every == 0 or step == steps:
            last = step == steps
            perplexity = heldout_perplexity(model, heldout, args.seqlen, windows=10**9 if last else 64)
            curve.append({"tokens": step * args.batch_tokens, "heldout_perplexity": round(perplexity, 3)})
            rate = step * args.batch_tokens / (time.monotonic() - started)
            print(f"step {step}/{steps}  held-out perplexity {perplexity:.3f}  {rate:,.0f} tokens/s", flush=True)
        if step == steps:
            break
        starts = torch.randint(0, len(stream) - args.seqlen, (batch,))
        tokens = torch.stack([stream[s : s + args.seqlen] for s in starts]).to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.lr, args.warmup)
        model(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    summary = {"tokens": steps * args.batch_tokens, "seqlen": args.seqlen, "seed": args.seed, "curve": curve}
    (args.out / "training.json").write_text(json.dumps(summary, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the trained checkpoint")
    parser.add_argument("--tokens", type=int, default=12_000_000, help="tokens to train on in all")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    parser.add_argument("--evaluate-every", type=int, default=200, help="steps between held-out evaluations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
