"""Predicted and measured memory of trainings of many kinds on the CPU, each in processes of its own.

    python -m benchmarks.training_memory [KIND ...]

prints the table of docs/recovery.md. The model has 34 million parameters (136 MB in float32), and
what sees images beside it 26 million. Measured is what the first process takes beyond what it had before it loaded the
model, its libraries included.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROWS, LENGTH = 16, 256
VOCABULARY = 8000
SIDE, PATCH = 112, 14  # pixels of an image and of a patch: 64 tokens
COMMON: dict[str, Any] = {"length": LENGTH, "batch": 4, "micro_batch": 2, "steps": 2, "threads": 1, "precision": "fp32"}
# glibc gives freed tensors of a megabyte or more back at once, so that what is resident is what is alive.
VARIABLES = {"DS_ACCELERATOR": "cpu", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
# Images first, then the text of a turn.
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image> ' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)
# Kinds of training: options of `recover` beside those.
KINDS: dict[str, dict[str, Any]] = {
    "full, ZeRO 0": {"full": True, "zero": 0},
    "full, ZeRO 1": {"full": True, "zero": 1},
    "full, ZeRO 2": {"full": True, "zero": 2},
    "full, ZeRO 3": {"full": True, "zero": 3},
    "full, ZeRO 2, one micro-batch": {"full": True, "zero": 2, "batch": 2},
    "full, ZeRO 2, offload": {"full": True, "zero": 2, "offload": True},
    "full, ZeRO 2, zeros kept, recompute": {"full": True, "zero": 2, "keep_sparsity": True, "recompute": True},
    "low-rank, ZeRO 2": {"zero": 2},
    "low-rank, ZeRO 2, zeros kept": {"zero": 2, "keep_sparsity": True},
    "low-rank, ZeRO 2, recompute": {"zero": 2, "recompute": True},
    "low-rank, ZeRO 2, teacher": {"zero": 2, "teacher": True},
    "low-rank, ZeRO 2, stored teacher": {"zero": 2, "teacher": True, "teacher_top": 64},
    "full, ZeRO 2, two processes": {"full": True, "zero": 2, "workers": 2},
    "full, ZeRO 3, two processes": {"full": True, "zero": 3, "workers": 2},
    "low-rank, ZeRO 3, teacher, two processes": {"zero": 3, "workers": 2, "teacher": True},
    "low-rank, ZeRO 2, images": {"zero": 2, "images": True},
    "full, ZeRO 2, images": {"full": True, "zero": 2, "images": True},
    "low-rank, ZeRO 2, images, stored teacher": {"zero": 2, "images": True, "teacher": True, "teacher_top": 64},
    "low-rank, ZeRO 3, images, teacher, two processes": {"zero": 3, "workers": 2, "images": True, "teacher": True},
}


def main() -> None:
    """Print a line for each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; all unless given")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    print("| training | predicted MB | measured MB | predicted / measured |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), options.hidden, options.layers)
        kinds = options.kinds or [*KINDS]
        if any(KINDS[kind].get("images") for kind in kinds):
            make_seeing(Path(folder), options.hidden, options.layers)
        for kind in kinds:
            predicted, measured = measure(kind, folder)
            print(f"| {kind} | {predicted / 1e6:.0f} | {measured / 1e6:.0f} | {predicted / measured:.2f} |", flush=True)


def make_model(folder: Path, hidden: int, layers: int) -> None:
    """Write a Llama with random weights, half of its projections' zero, and rows of random tokens."""
    import numpy as np
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(_language(hidden, layers))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("proj.weight"):
                weight[weight.abs() < weight.abs().median()] = 0
    model.save_pretrained(folder / "model")
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, LENGTH))
    np.save(folder / "rows.npy", tokens.astype(np.int64))


def make_seeing(folder: Path, hidden: int, layers: int) -> None:
    """Write a LLaVA with such a language model and a tower of its width and depth, and conversations about an image
    each, longer than a row."""
    import torch
    from PIL import Image
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=4 * hidden,
        num_attention_heads=8,
        image_size=SIDE,
        patch_size=PATCH,
    )
    config = LlavaConfig(vision_config=tower, text_config=_language(hidden, layers), image_token_index=VOCABULARY - 1)
    LlavaForConditionalGeneration(config).save_pretrained(folder / "seeing")
    words = [f"w{number}" for number in range(VOCABULARY - 4)]
    vocabulary = {word: place for place, word in enumerate(["<unk>", "<s>", "</s>", *words, "<image>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            additional_special_tokens=["<image>"],
        ),
        patch_size=PATCH,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
    ).save_pretrained(folder / "seeing")
    (folder / "images").mkdir()
    rows = []
    for number in range(ROWS):
        Image.new("RGB", (SIDE, SIDE), (number, 0, 0)).save(folder / "images" / f"{number}.png")
        turns = [("human", "<image>\n w0"), ("gpt", " ".join(words[number : number + LENGTH]))]
        conversation = [{"from": speaker, "value": text} for speaker, text in turns]
        rows.append({"image": f"{number}.png", "conversations": conversation})
    (folder / "conversations.json").write_text(json.dumps(rows))


def _language(hidden: int, layers: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=hidden * 11 // 4,
        num_attention_heads=8,
        vocab_size=VOCABULARY,
    )


def measure(kind: str, folder: str) -> tuple[int, int]:
    """Return the predicted and the measured bytes of a kind of training."""
    count = KINDS[kind].get("workers", 1)
    with tempfile.TemporaryDirectory() as own:
        command = [sys.executable, "-m", "benchmarks.training_memory", "--process", kind, folder, own]
        processes = []
        for rank in range(count):
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            environment = {**os.environ, **variables, "LOCAL_WORLD_SIZE": str(count), **VARIABLES}
            with Path(own, f"said-{rank}").open("wb") as said, Path(own, f"errors-{rank}").open("wb") as errors:
                processes.append(subprocess.Popen([*command, str(rank)], env=environment, stdout=said, stderr=errors))
        failed = _first_to_fail(processes)
        if failed is not None:
            raise SystemExit(Path(own, f"errors-{failed}").read_text()[-3000:])
        found = json.loads(Path(own, "said-0").read_text().splitlines()[-1])
    return found["predicted"], found["measured"]


def _first_to_fail(processes: list["subprocess.Popen[bytes]"]) -> int | None:
    """Wait for processes; return the first that fails, for which the others would wait and are killed."""
    while any(process.poll() is None for process in processes):
        if failed := [rank for rank, process in enumerate(processes) if process.returncode]:
            for process in processes:
                process.kill()
                process.wait()
            return failed[0]
        time.sleep(0.1)
    return next((rank for rank, process in enumerate(processes) if process.returncode), None)


def work(kind: str, folder: str, own: str, rank: int) -> None:
    """Be one process of a training: predict its memory, train, and print both."""
    import torch
    import torch.distributed as dist

    from shardprune.cluster.local_backend import LocalBackend
    from shardprune.commands.prepare_recovery import prepare_recovery
    from shardprune.planning.training.need import training_memory
    from shardprune.recipes.recover import RecoverRecipe
    from shardprune.recovery.operations import build_what_is_used
    from shardprune.recovery.spec import ROWS as FILE
    from shardprune.recovery.worker import train_worker
    from shardprune.shard.memory import peak_bytes
    from shardprune.storage.folder import Folder

    torch.set_num_threads(1)
    options, out = dict(KINDS[kind]), f"{own}/out"
    seen = options.pop("images", False)
    model = f"{folder}/seeing" if seen else f"{folder}/model"
    if seen:
        options["images"] = f"{folder}/images"
    if options.pop("teacher", False):
        options["teacher"] = model
    values = {
        "model": model,
        "data": f"{folder}/conversations.json" if seen else f"{folder}/rows.npy",
        "out": out,
        "backend": "ray",
        **COMMON,
        **options,
    }
    recipe = RecoverRecipe.checked(values)
    prepared = prepare_recovery(recipe, LocalBackend())
    inputs = prepared.inputs
    rows = inputs.rows.longest, inputs.images
    predicted = training_memory(prepared.recipe, inputs.skeleton, inputs.teacher, *rows).device.peak
    spec = prepared.spec(prepared.processes)
    store = dist.FileStore(f"{own}/store", recipe.workers or 1)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=recipe.workers or 1)
    dist.barrier()  # what is begun is prepared in another way
    if rank == 0:
        Path(prepared.recipe.state).mkdir(parents=True, exist_ok=True)
        prepared.inputs.rows.save(Folder(prepared.recipe.state, "state"), FILE)
        build_what_is_used(recipe.offload, prepared.recipe.state, lambda _: None)
    # Before memory is looked at. DeepSpeed imports the second when it starts, and with it torch's compiler: 57 MB.
    import deepspeed
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    dist.barrier()
    del prepared
    gc.collect()
    before = _resident()
    Path("/proc/self/clear_refs").write_text("5")  # the highest value so far is forgotten
    with _quiet():
        train_worker(spec, torch.device("cpu"))
    print(json.dumps({"predicted": predicted, "measured": peak_bytes(torch.device("cpu")) - before}))


def _resident() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def _quiet() -> Any:
    from contextlib import redirect_stdout

    return redirect_stdout(sys.stderr)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        work(*sys.argv[2:5], int(sys.argv[5]))
    else:
        main()
