"""Tiny trainings: in this process, in two others that stay for all tests, and the same in plain PyTorch."""

import json
import multiprocessing
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, AutoTokenizer

from shardprune import RecoverRecipe, recover
from shardprune.cluster.local_backend import LocalBackend
from shardprune.errors import WorkerLost
from shardprune.recovery.examples import load_rows
from shardprune.recovery.rows import Rows
from shardprune.recovery.schedule import learning_rate
from shardprune.report.progress import Reporter
from shardprune.storage.folder import Folder
from tests.support.tiny import CONFIGS, VOCABULARY, load_tensors, make_model
from tests.support.words import WORDS, words_tokenizer

QUIET = Reporter(quiet=True)
LONGEST = 16  # tokens of the longest document
# ZeRO-3 takes its time for every module.
SHALLOW = {family: (name, {**values, "num_hidden_layers": 2}) for family, (name, values) in CONFIGS.items()}


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


def make_material(folder: Path) -> Path:
    """A sparse and a dense model, and documents."""
    make_sparse(folder / "sparse", configs=SHALLOW)
    make_model(folder / "dense", configs=SHALLOW)
    words_tokenizer().save_pretrained(folder / "dense")
    make_documents(folder / "documents.jsonl")
    return folder


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


def train(folder, out, pair=None, reporter=QUIET, **fields):
    """`recover` in this process, or in two others."""
    if pair is None:
        return recover(checked(folder, out, **fields), reporter)
    with patch("shardprune.commands.recover.backend_of", lambda *_: pair):
        return recover(checked(folder, out, **{"workers": 2, **fields}), reporter)


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
        self.loaded_bytes: list[int] = []  # that each process has read of the last training's model

    def train(self, spec, workers):
        """What the processes report; they end after the checkpoint of the step `cut_after`, if that is given."""
        with tempfile.TemporaryDirectory() as store:
            for end in self.ends:
                end.send((spec, f"{store}/store", self.cut_after))
            answers, self.loaded_bytes = [], []
            for end in self.ends:
                assert end.poll(120), "a process of the training hangs"
                answer, loaded = end.recv()
                answers.append(answer)
                self.loaded_bytes.append(loaded)
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

    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401  now, while other tests run

    from shardprune.recovery.worker import _end_group, train_worker

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    linear = torch.nn.functional.linear  # which ZeRO-3 replaces by its own
    while True:
        spec, store, cut_after = end.recv()
        dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
        loaded: list[int] = []
        try:
            with _cut(cut_after), _counted_loading(loaded):
                answer = train_worker(spec, torch.device("cpu"))
        except BaseException as error:
            answer = repr(error)
        _end_group()
        torch.nn.functional.linear = linear
        end.send((answer, sum(loaded)))


def _cut(step):
    from shardprune.recovery.checkpoints import Checkpoints

    save = Checkpoints.save

    def saving(self, engine, saved, best):
        save(self, engine, saved, best)
        if saved == step:
            raise KeyboardInterrupt

    return patch.object(Checkpoints, "save", saving)


@contextmanager
def _counted_loading(sizes):
    """Keep the sizes of what is read while a model is loaded."""
    from shardprune.recovery import training

    load, read = training.load_model, Folder.read_into

    def reading(self, name, start, buffer):
        sizes.append(len(buffer))
        read(self, name, start, buffer)

    def loading(*arguments):
        with patch.object(Folder, "read_into", reading):
            return load(*arguments)

    with patch.object(training, "load_model", loading):
        yield


# -- the same in plain PyTorch ------------------------------------------------------------------------------------


def rows_of(recipe: RecoverRecipe) -> tuple[Rows, Rows]:
    """What a training learns from, and what it holds out."""
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    (source,) = recipe.data
    rows = load_rows(source, lambda: tokenizer, recipe.length, recipe.packing, recipe.prompt_loss, VOCABULARY)
    return rows.split(recipe.held_out, recipe.seed)


def plain_training(recipe: RecoverRecipe) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train row by row without DeepSpeed, padding or micro-batches; the losses and the weights."""
    rows, _ = rows_of(recipe)
    model = AutoModelForCausalLM.from_pretrained(recipe.model)
    teacher = AutoModelForCausalLM.from_pretrained(recipe.teacher).eval() if recipe.teacher else None
    masks = {name: value != 0 for name, value in model.named_parameters() if is_projection(name)}
    linears = [] if recipe.full else _with_updates(model, recipe)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=recipe.weight_decay)
    sequence = torch.cat([rows.order(epoch, recipe.seed) for epoch in range(10)]).tolist()
    record = []
    for step in range(recipe.steps):
        chosen = sequence[step * recipe.batch : (step + 1) * recipe.batch]
        loss = sum(_plain_loss(model, rows.row(row), teacher, recipe) for row in chosen) / rows.targets(chosen)
        optimizer.zero_grad()
        loss.backward()
        for name in masks if recipe.full and recipe.keep_sparsity else ():
            trained[name].grad *= masks[name]
        torch.nn.utils.clip_grad_norm_(trained.values(), recipe.clip)
        optimizer.param_groups[0]["lr"] = learning_rate(
            step, recipe.steps, recipe.learning_rate, recipe.warmup, recipe.schedule
        )
        optimizer.step()
        record.append(loss.item())
    for linear in linears:
        parametrize.remove_parametrizations(linear, "weight")
    return record, model.state_dict()


class _Update(torch.nn.Module):
    """W + mask * (alpha / r) B A in the place of W."""

    def __init__(self, weight, recipe, generator) -> None:
        super().__init__()
        rank, bound = recipe.lora_rank, weight.shape[1] ** -0.5
        self.a = torch.nn.Parameter(torch.empty(rank, weight.shape[1]).uniform_(-bound, bound, generator=generator))
        self.b = torch.nn.Parameter(torch.zeros(weight.shape[0], rank))
        self.factor = (weight != 0 if recipe.keep_sparsity else torch.ones_like(weight)) * recipe.lora_alpha / rank

    def forward(self, weight):
        return weight + self.factor * (self.b @ self.a)


def _with_updates(model, recipe) -> list[torch.nn.Linear]:
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(recipe.seed)
    linears = [module for name, module in model.named_modules() if is_projection(f"{name}.weight") and "proj" in name]
    for linear in linears:
        parametrize.register_parametrization(linear, "weight", _Update(linear.weight.detach(), recipe, generator))
    return linears


def _plain_loss(model, row, teacher, recipe) -> torch.Tensor:
    """The summed loss of a row's targets."""
    tokens = row.tokens[None].long()
    places = row.learned[1:]
    chances = torch.log_softmax(model(tokens).logits[0, :-1][places].float(), 1)
    hard = -chances.gather(1, tokens[0, 1:][places][:, None]).sum()
    if teacher is None:
        return hard
    with torch.no_grad():
        wanted = torch.softmax(teacher(tokens).logits[0, :-1][places] / recipe.temperature, 1)
    given = torch.log_softmax(chances / recipe.temperature, 1)  # the same as of the logits
    if recipe.teacher_top is not None:  # all others are one prediction
        places = wanted.argsort(dim=1, descending=True)
        wanted, given = (values.gather(1, places) for values in (wanted, given.exp()))
        top = recipe.teacher_top
        wanted, given = (
            torch.cat([values[:, :top], values[:, top:].sum(1, keepdim=True)], 1) for values in (wanted, given)
        )
        given = given.log()
    soft = recipe.temperature**2 * (wanted * (wanted.log() - given)).sum()
    return recipe.teacher_weight * soft + (1 - recipe.teacher_weight) * hard


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
