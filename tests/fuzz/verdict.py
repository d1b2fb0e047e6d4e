"""What a command may do with an input: finish with a right output, or end with one line and leave everything alone."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

from tests.fuzz.commands import Command
from tests.support.tiny import load_tensors

LONGEST = 2000  # characters of an error
SECRET = "SECRET"
ANSWERING = (
    "plan",
    "plan-recovery",
    "check",
)  # commands whose exit code 1 is an answer, given on stdout: nothing fits, something is wrong
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LIBRARY = re.compile(r"Warning|warn\(|Traceback|^\s+File ", re.MULTILINE)
_WAITING = re.compile(r"; trying again in \d")  # of what the network may still give

State = dict[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code (None: an exception, in `crash`), and what it printed."""

    code: int | None
    output: bytes
    errors: bytes
    crash: str = ""


@dataclass
class Verdict:
    """What is wrong with an outcome; nothing if `problems` is empty."""

    problems: list[str] = field(default_factory=list)

    def expect(self, met: bool, problem: str) -> None:
        if not met:
            self.problems.append(problem)


def state_of(folder: Path) -> State:
    """All files below a folder, by name, with what changes when they are written."""
    found: State = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        about = () if path.is_dir() else (status.st_size, status.st_mtime_ns, status.st_ino)
        found[str(path.relative_to(folder))] = about
    return found


def judge(command: Command, outcome: Outcome, before: State, folder: Path, well_formed: bool = False) -> list[str]:
    """The problems of an outcome, each as one line that begins with its kind.

    Args:
        well_formed: nothing is wrong with the input.
    """
    verdict = Verdict()
    if outcome.code is None:
        return [f"traceback: {outcome.crash}"]
    verdict.expect(outcome.code in (0, 1, 2), f"exit code: {outcome.code}")
    _judge_words(verdict, outcome, command)
    _judge_files(verdict, outcome, before, folder)
    verdict.expect(outcome.code != 0 or not command.finds or well_formed, "accepted: damage that was not noticed")
    if outcome.code == 0 and command.makes:
        try:
            verdict.problems += wrong_in(folder, command)
        except Exception as error:  # whatever a reader of the output would meet
            verdict.problems.append(f"wrong output: {type(error).__name__}: {error}")
    return verdict.problems


def _judge_words(verdict: Verdict, outcome: Outcome, command: Command) -> None:
    texts = {}
    for name, content in (("stdout", outcome.output), ("stderr", outcome.errors)):
        try:
            texts[name] = content.decode()
        except UnicodeDecodeError:
            verdict.problems.append(f"words: {name} is no UTF-8")
            texts[name] = content.decode(errors="replace")
        control = _CONTROL.search(texts[name])
        verdict.expect(control is None, f"words: control character {control and control[0]!r} on {name}")
        verdict.expect(SECRET not in texts[name], f"credentials: on {name}")
    lines = [line for line in texts["stderr"].splitlines() if not _WAITING.search(line)]
    errors = [line for line in lines if line.startswith("error: ")]
    if outcome.code == 2:
        verdict.expect(len(lines) == 1 and len(errors) == 1, f"words: {len(lines)} lines on stderr, not one")
        verdict.expect(not texts["stdout"], "words: bad input, and words on stdout")
    elif outcome.code == 1 and not (command.words[0] in ANSWERING and texts["stdout"]):
        verdict.expect(len(errors) == 1 and lines[-1] == errors[0], f"words: {len(errors)} errors on stderr, not one")
    verdict.expect(
        all(len(line) <= LONGEST + 7 for line in errors),
        f"words: an error of {max(map(len, [*errors, '']))} characters",
    )
    library = _LIBRARY.search(texts["stderr"])
    verdict.expect(library is None, f"words: of a library: {library and texts['stderr'][library.start() :][:80]!r}")


def _judge_files(verdict: Verdict, outcome: Outcome, before: State, folder: Path) -> None:
    after = state_of(folder)
    verdict.expect("owned" not in after, "code: an input was executed")
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if outcome.code == 2:
        verdict.expect(not changed, f"touched: {changed[:3]}")
    partial = [name for name in after.keys() - before.keys() if name.endswith(".tmp")]
    verdict.expect(not partial, f"half-written: {partial[:3]}")
    known = any(SECRET in path.read_text(errors="replace") for path in map(folder.joinpath, before) if _is_plain(path))
    given = {path.read_bytes() for path in map(folder.joinpath, before) if path.suffix == ".json" and _is_plain(path)}
    for name in changed:
        path = folder / name
        if path.suffix in (".json", ".jsonl", ".html", ".txt") and _is_plain(path):
            verdict.expect(known or SECRET not in path.read_text(errors="replace"), f"credentials: in {path.name}")
        if (
            path.suffix == ".json" and _is_plain(path) and path.read_bytes() not in given
        ):  # not a copy of what was given
            _read_json(verdict, path)


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _read_json(verdict: Verdict, path: Path) -> None:
    """A JSON file that was written must be JSON, without numbers that are none."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    try:
        json.loads(path.read_text(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        verdict.problems.append(f"wrong output: {path.name}: {error}")


# -- outputs --------------------------------------------------------------------------------------------------------


def wrong_in(folder: Path, command: Command) -> list[str]:
    """What is wrong in the output of a command that ended with 0."""
    verdict = Verdict()
    out = folder / command.makes
    tensors = load_tensors(out)  # as the safetensors library reads them
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    verdict.expect(index.keys() == tensors.keys(), "wrong output: the index has other names than the files")
    infinite = {name for name, tensor in tensors.items() if not tensor.float().isfinite().all()}
    if infinite and command.source:  # what a run has not touched stays as it was given
        given = load_tensors(folder / command.source)
        infinite -= {name for name in infinite & given.keys() if not given[name].float().isfinite().all()}
    verdict.expect(not infinite, f"wrong output: {min(infinite, default='')} is not finite")
    result = json.loads((out / "result.json").read_text())
    if command.same:
        expected = load_tensors(folder.parent / "material" / command.same)
        verdict.expect(
            expected.keys() == tensors.keys(), "wrong output: other tensors than those of an undisturbed run"
        )
        for name in sorted(expected.keys() & tensors.keys()):
            if expected[name].dtype != tensors[name].dtype or not torch.equal(expected[name], tensors[name]):
                verdict.problems.append(f"wrong output: {name} is not that of an undisturbed run")
                break
        for name in ("config.json", "tokenizer.json"):
            same = (out / name).is_file() and (out / name).read_bytes() == (
                folder.parent / "material" / command.same / name
            ).read_bytes()
            verdict.expect(same, f"wrong output: {name} is not that of an undisturbed run")
    if result.get("sparsity") and not (result.get("model") or {}).get("structure"):
        _judge_sparsity(verdict, result, tensors)
    if command.source and result.get("perplexity"):
        _judge_perplexity(verdict, folder / command.source, result)
    return verdict.problems


def _judge_sparsity(verdict: Verdict, result: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """`achieved` must be the share of zeros."""
    for report in result["sparsity"]["projections"]:
        weight = tensors[f"model.layers.{report['layer']}.{report['name']}.weight"]
        counted = float((weight == 0).float().mean())
        if not math.isclose(counted, report["achieved"], abs_tol=1e-6):
            verdict.problems.append(f"wrong output: {report['name']} has {counted} zeros, not {report['achieved']}")
            return


def _judge_perplexity(verdict: Verdict, source: Path, result: dict[str, Any]) -> None:
    """The perplexity before must be that of transformers."""
    for file in source.glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as opened:
                opened.keys()
        except SafetensorError as error:
            verdict.problems.append(f"accepted: {file.name}, which safetensors refuses: {error}")
            return
    (source / "adapter_config.json").unlink(missing_ok=True)  # without the adapter, as a line says
    try:
        model, info = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # transformers raises anything
        verdict.problems.append(
            f"accepted: a checkpoint that transformers refuses: {type(error).__name__}: {error}"[:200]
        )
        return
    if missing := sorted(info["missing_keys"]):
        verdict.problems.append(f"accepted: a checkpoint without {missing[0]}")
        return
    tokens = torch.from_numpy(np.load(source.parent / "tokens.npy"))
    with torch.no_grad():
        loss = torch.stack([model(row[None], labels=row[None]).loss for row in tokens]).mean()
    theirs, ours = float(loss.exp()), result["perplexity"]["tokens.npy"]["before"]
    if not math.isfinite(theirs):
        verdict.expect(ours is None or not math.isfinite(ours), f"wrong output: perplexity {ours}, not {theirs}")
    elif ours is None or not math.isclose(theirs, ours, rel_tol=1e-3):
        verdict.problems.append(f"wrong output: perplexity {ours}, of transformers {theirs}")
