"""Tiny trainings: in this process, in two others that stay for all tests, and the same in plain PyTorch."""

import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shardprune import RecoverRecipe, recover
from shardprune.cluster.local_backend import LocalBackend
from shardprune.errors import WorkerLost
from shardprune.progress import Output
from shardprune.recovery.schedule import learning_rate
from shardprune.recovery_plan import make_recovery_plan
from tests.tiny import load_tensors, make_model
from tests.words import WORDS, words_tokenizer

QUIET = Output(quiet=True)
LONGEST = 16  # tokens of the longest document


def make_sparse(folder: Path, family: str = "llama-3.1", **saving) -> str:
    """A tiny model without the smaller half of each projection's weights, with a tokenizer."""
    make_model(folder, family, **saving)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if is_projection(name):
            tensor[tensor.abs() < tensor.abs().float().median()] = 0
    save_file(tensors, file, {"format": "pt"})
    words_tokenizer().save_pretrained(folder)
    return str(folder)


def is_projection(name: str) -> bool:
    return ".layers." in name and name.endswith("weight") and "norm" not in name


def make_documents(file: Path, count: int = 21) -> str:
    """Documents of very different lengths, so that micro-batches differ in their numbers of tokens."""
    generator = torch.Generator().manual_seed(3)
    lines = []
    for number in range(count):
        words = torch.randint(3, len(WORDS), (1 + (5 * number) % (LONGEST - 1),), generator=generator)
        lines.append(json.dumps({"text": " ".join(WORDS[word] for word in words)}))
    file.write_text("\n".join(lines))
    return str(file)


def checked(folder, out, **fields) -> RecoverRecipe:
    """A recipe of ten steps over the documents."""
    values = {
        "model": str(folder / "sparse"),
        "out": str(out),
        "data": str(folder / "documents.jsonl"),
        "length": LONGEST,
        "batch": 8,
        "micro_batch": 2,
        "steps": 10,
        "learning_rate": 3e-3,
        "checkpoint_every": 4,
        "backend": "local" if fields.get("workers", 1) == 1 else "ray",
        "threads": 1,
        **fields,
    }
    return RecoverRecipe.checked(values)


def train(folder, out, pair=None, output=QUIET, **fields):
    """`recover` in this process, or in two others."""
    if pair is None:
        return recover(checked(folder, out, **fields), output)
    with patch("shardprune.fine_tuning.backend_of", lambda *_: pair):
        return recover(checked(folder, out, **{"workers": 2, **fields}), output)


def losses(result) -> list[float]:
    return [record.loss for record in result.recovery.losses]


# -- two processes ------------------------------------------------------------------------------------------------


class Pair(LocalBackend):
    """A backend of two processes that carry out one training after another, because starting them takes seconds."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(2)]
        self.ends = [mine for mine, _ in pipes]
        self.workers = [
            context.Process(target=_serve, args=(rank, theirs), daemon=True) for rank, (_, theirs) in enumerate(pipes)
        ]
        for worker in self.workers:
            worker.start()
        self.cut_after: int | None = None

    def train(self, spec, workers):
        """What the processes report; they end after the checkpoint of the step `cut_after`, if that is given."""
        with tempfile.TemporaryDirectory() as store:
            for end in self.ends:
                end.send((spec, f"{store}/store", self.cut_after))
            answers = []
            for end in self.ends:
                assert end.poll(120), "a process of the training hangs"
                answers.append(end.recv())
        if self.cut_after is not None:
            raise KeyboardInterrupt
        assert all(isinstance(answer, dict) for answer in answers), answers
        return answers

    def settle(self):
        raise WorkerLost("both processes are here")

    def end(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.join()


def _serve(rank, end) -> None:
    import torch.distributed as dist

    from shardprune.recovery.process import _end_group, take_part

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    linear = torch.nn.functional.linear  # which ZeRO-3 replaces by its own
    while True:
        spec, store, cut_after = end.recv()
        dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
        try:
            with _cut(cut_after):
                answer = take_part(spec)
        except BaseException as error:
            answer = repr(error)
        _end_group()
        torch.nn.functional.linear = linear
        end.send(answer)


def _cut(step):
    from shardprune.recovery.checkpoints import Checkpoints

    save = Checkpoints.save

    def saving(self, engine, saved):
        save(self, engine, saved)
        if saved == step:
            raise KeyboardInterrupt

    return patch.object(Checkpoints, "save", saving)


# -- the same in plain PyTorch ------------------------------------------------------------------------------------


def plain_training(recipe: RecoverRecipe, teacher: str | None = None):
    """Train all weights row by row without DeepSpeed, padding or micro-batches; the losses and the weights."""
    rows = make_recovery_plan(recipe.model_copy(update={"out": f"{recipe.out}-none"}), LocalBackend()).rows
    model = AutoModelForCausalLM.from_pretrained(recipe.model)
    taught = AutoModelForCausalLM.from_pretrained(teacher) if teacher else None
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=recipe.weight_decay)
    sequence = torch.cat([rows.order(epoch, recipe.seed) for epoch in range(10)]).tolist()
    record = []
    for step in range(recipe.steps):
        chosen = [rows.row(index) for index in sequence[step * recipe.batch : (step + 1) * recipe.batch]]
        loss = sum(_plain_loss(model, row, taught, recipe) for row in chosen) / sum(
            int(row.learned.sum()) for row in chosen
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.steps, recipe.learning_rate, recipe.warmup, recipe.schedule)
        optimizer.step()
        record.append(loss.item())
    return record, {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _plain_loss(model, row, teacher, recipe):
    """The summed loss of a row's targets."""
    tokens = row.tokens[None].long()
    logits = model(tokens).logits[0].float()
    wanted = teacher(tokens).logits[0].detach().float() if teacher else None
    total = torch.zeros(())
    for place in range(1, len(row.tokens)):
        if not row.learned[place]:
            continue
        hard = -torch.log_softmax(logits[place - 1], 0)[row.tokens[place].long()]
        if wanted is None:
            total = total + hard
            continue
        softened, target = logits[place - 1] / recipe.temperature, wanted[place - 1] / recipe.temperature
        chances = torch.softmax(target, 0)
        soft = (chances * (torch.log_softmax(target, 0) - torch.log_softmax(softened, 0))).sum()
        total = total + recipe.teacher_weight * recipe.temperature**2 * soft + (1 - recipe.teacher_weight) * hard
    return total


# -- what lies in an output -----------------------------------------------------------------------------------------


def zeros(folder) -> dict[str, torch.Tensor]:
    """Where the zeros of every projection are."""
    return {name: tensor == 0 for name, tensor in load_tensors(folder).items() if is_projection(name)}


def same_zeros(one, other) -> bool:
    first, second = zeros(one), zeros(other)
    assert first.keys() == second.keys()
    assert first
    return all(torch.equal(first[name], second[name]) for name in first)


def furthest(one, other) -> float:
    """The largest difference between the tensors of two checkpoints."""
    first, second = (place if isinstance(place, dict) else load_tensors(place) for place in (one, other))
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


def loss_of(model: str, rows) -> float:
    """The mean loss of the targets of rows, of a checkpoint that transformers loads."""
    loaded = AutoModelForCausalLM.from_pretrained(model).float()
    with torch.no_grad():
        total = sum(float(_plain_loss(loaded, rows.row(index), None, None)) for index in range(len(rows)))
    return total / rows.targets(range(len(rows)))


def held_out_rows(recipe: RecoverRecipe):
    return make_recovery_plan(recipe.model_copy(update={"out": f"{recipe.out}-none"}), LocalBackend()).held_out
