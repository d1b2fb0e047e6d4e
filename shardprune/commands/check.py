"""The story of `shardprune check`: is an output whole, and what it says it is?

Everything is found anew: from the files, tensor by tensor, without Ray and without the model in memory.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from shardprune.errors import InputError
from shardprune.model.checkpoint import INDEX, Checkpoint
from shardprune.model.checks import check_tensors
from shardprune.model.companions import check_configs
from shardprune.model.skeleton import Skeleton
from shardprune.report.achieved import shape_of
from shardprune.report.result import EvaluationResult, Result, read_result
from shardprune.solvers.pattern import NM, parse_pattern
from shardprune.storage.folder import Folder
from shardprune.storage.malformed import Malformed
from shardprune.storage.manifest import manifest_faults
from shardprune.storage.output_names import RESULT, STATE
from shardprune.storage.records import LayerRecord, ProjectionReport
from shardprune.storage.retrying import preflight
from shardprune.storage.run_folders import run_folders
from shardprune.storage.safetensors_file import Entry, StoredTensor
from shardprune.storage.seals import BrokenSeal, NoSeal, read_sealed
from shardprune.storage.tensor_facts import TensorFacts

READERS = 4  # tensors that are read at the same time, in parts of some megabytes
EXACT = 1e-9  # between fractions that were computed from the same numbers in another order


@dataclass
class Verdict:
    """What was found of the output of one run: `faults`, one line each, and what was looked at."""

    url: str
    faults: list[str] = field(default_factory=list)
    tensors: int = 0
    bytes: int = 0
    zeros: int = 0
    weights: int = 0

    @property
    def lines(self) -> list[str]:
        """One line for a whole output, else one for each fault."""
        if self.faults:
            return [f"{self.url}: {fault.removeprefix(f'{self.url}/')}" for fault in self.faults]
        share = f", {self.zeros / self.weights:.4%} of the projections' weights are zero" if self.weights else ""
        return [f"{self.url} is whole: {self.tensors} tensors, {self.bytes:,} bytes{share}"]


@preflight()
def check(out: str) -> list[Verdict]:
    """Check the output of a run, or those of a pipeline's finished steps, and return what was found of each.

    Raises:
        InputError: the folder holds no run that makes a model, or cannot be read.
    """
    runs = [folder for folder in run_folders(out) if folder.is_file(RESULT) or folder.is_file(STATE)]
    if not runs:
        raise InputError("out", f"{out!r} holds no run that makes a model; give the output directory of one")
    return [_verdict(folder) for folder in runs]


def _verdict(folder: Folder) -> Verdict:
    verdict = Verdict(folder.url)
    if folder.is_file(STATE):
        verdict.faults.append(f"{STATE} is there: the run is not finished; the same command goes on")
    try:
        result = read_result(folder) if folder.is_file(RESULT) else None
    except Malformed as error:
        verdict.faults.append(f"{RESULT} {error}")
        return verdict
    if isinstance(result, EvaluationResult):
        raise InputError("out", f"{folder.url} holds an evaluation and no model; give the model's own directory")
    if result is None:
        return verdict
    if not result.files:
        verdict.faults.append(f"{RESULT} names no files: it was written by an earlier version")
    broken = manifest_faults(folder, result.files)
    verdict.faults += [f"{name} {fault}" for name, fault in broken.items()]
    kept = [entry.folder for entry in (result.structure.path or []) if entry.folder] if result.structure else []
    for name in ("", *kept):
        _Model(Folder(f"{folder.url}/{name}".rstrip("/"), "out"), f"{name}/" if name else "", result, verdict).check()
    return verdict


class _Model:
    """One model in an output: the run's own, or an iteration that it kept.

    Args:
        prefix: of its files in messages.
    """

    def __init__(self, folder: Folder, prefix: str, result: Result, verdict: Verdict) -> None:
        self.folder, self.prefix, self.result, self.verdict = folder, prefix, result, verdict
        self.digests: dict[str, str] = {}  # of tensors, as they were written
        self.reports: dict[str, ProjectionReport] = {}  # of projections, by the tensor's name in the files

    def check(self) -> None:
        """Add what is wrong to the verdict."""
        try:
            self.checkpoint = Checkpoint(self.folder.url, "out")
            ignored = self.result.recipe.get("ignore") or ()
            self.skeleton = Skeleton(self.checkpoint.config, "cpu", ignore=ignored)
            check_tensors(self.skeleton, self.checkpoint)
            check_configs(self.folder, self.checkpoint.companions())
        except InputError as error:
            self._say(error.problem)
            return
        self._check_files()
        found = self._check_tensors()
        if not self.prefix:
            self._check_result(found)
        self._check_tokenizer()

    def _say(self, fault: str) -> None:
        # Most errors name their place already.
        self.verdict.faults.append(fault if fault.startswith(self.folder.url) else f"{self.prefix}{fault}")

    # -- files --------------------------------------------------------------------------------------------------

    def _check_files(self) -> None:
        """Read the header of every file of weights, and compare it with its seal and with the index."""
        placed: dict[str, set[str]] = {}
        for name, entry in self.checkpoint.files.items():
            placed.setdefault(entry.file, set()).add(name)
        for file in sorted(name for name in self.folder.names() if name.endswith(".safetensors")):
            if file not in placed:
                self._say(f"{file} belongs to no part of the model: {INDEX} does not name it")
                continue
            self._check_file(file, placed[file])
        self._check_index()

    def _check_file(self, file: str, placed: set[str]) -> None:
        try:
            entries, record, digests = read_sealed(self.folder, file)
        except (BrokenSeal, NoSeal) as error:
            self._say(f"{file} {error}")
            return
        except InputError as error:
            self._say(error.problem)
            return
        if record.pop("fingerprint", None) != self.result.fingerprint:
            self._say(f"{file} belongs to another run")
        for name in sorted(entries.keys() ^ placed):
            self._say(f"{file} and {INDEX} do not agree on {name}")
        self.digests |= digests
        if not record.pop("frame", False):
            try:
                layer = LayerRecord.read(record)
            except Malformed as error:
                self._say(f"{file} has a record that {error}")
                return
            for report in layer.projections:
                name = self.skeleton.projection_tensor(layer.layer, report.name)
                self.reports[str(self.checkpoint.place(name))] = report

    def _check_index(self) -> None:
        if not self.folder.is_file(INDEX):
            return
        stated = self.folder.read_json(INDEX).get("metadata", {}).get("total_size")
        size = sum(entry.size for entry in self.checkpoint.files.values())
        if stated is not None and stated != size:
            self._say(f"{INDEX} says {stated} bytes in all, and the tensors have {size}")

    def _check_tokenizer(self) -> None:
        if any("tokenizer" in name for name in self.checkpoint.companions()):
            try:
                self.checkpoint.tokenizer()
            except InputError as error:
                self._say(error.problem)

    # -- tensors ------------------------------------------------------------------------------------------------

    def _check_tensors(self) -> dict[str, TensorFacts]:
        """Read every tensor, and compare it with its digest and its report; return the facts, by the place in the
        files. Parts of a tensor are read besides."""
        parts = {str(self.checkpoint.place(name)): entry for name, entry in self.checkpoint.entries.items()}
        entries = {**parts, **self.checkpoint.files}
        with ThreadPoolExecutor(READERS) as readers:
            facts = dict(zip(entries, readers.map(self._facts, entries, entries.values()), strict=True))
        for name, found in facts.items():
            entry = entries[name]
            if name in self.checkpoint.files:
                self.verdict.tensors += 1
                self.verdict.bytes += entry.size
            for fault in self._faults(name, found):
                self._say(f"{entry.file}: {name} {fault}")
        return facts

    def _facts(self, name: str, entry: Entry) -> TensorFacts:
        report = self.reports.get(name)
        pattern = parse_pattern(report.pattern) if report and report.pattern else None
        broken = partial(_broken, pattern) if isinstance(pattern, NM) else None
        return TensorFacts.of(StoredTensor(self.folder, entry), broken)

    def _faults(self, name: str, found: TensorFacts) -> Iterator[str]:
        if name in self.digests and found.digest != self.digests[name]:
            yield "is not what was written"
        if found.strange and name in self.checkpoint.files:
            yield f"has {found.strange} elements that are infinite or no number"
        if report := self.reports.get(name):
            if found.zeros != report.zeros:
                yield f"has {found.zeros} zeros, and its record says {report.zeros}"
            if found.broken:
                yield f"has {found.broken} groups of weights that are not {report.pattern}"

    # -- the result -----------------------------------------------------------------------------------------------

    def _check_result(self, found: Mapping[str, TensorFacts]) -> None:
        """Compare what `result.json` says with what was found."""
        for place, stated, counted in self._statements(found):
            if stated is not None and abs(stated - counted) > EXACT * max(1.0, abs(counted)):
                self._say(f"{RESULT} says {stated:.9g} of {place}, and it is {counted:.9g}")
        structure = self.result.structure
        if structure and structure.after != shape_of(self.checkpoint.config):
            self._say(f"{RESULT} says another shape of the model than its config")

    def _statements(self, found: Mapping[str, TensorFacts]) -> Iterator[tuple[str, float | None, float]]:
        """Yield numbers of the result: what they are about, what is stated, and what was found."""
        result, skeleton, checkpoint = self.result, self.skeleton, self.checkpoint
        counts: dict[tuple[int, str], tuple[int, int]] = {}  # zeros and weights
        for index in range(skeleton.layers):
            for name, (rows, cols) in skeleton.projection_shapes(index).items():
                facts = found[str(checkpoint.place(skeleton.projection_tensor(index, name)))]
                counts[index, name] = facts.zeros, rows * cols
        zeros, weights = (sum(column) for column in zip(*counts.values(), strict=True))
        self.verdict.zeros, self.verdict.weights = zeros, weights
        yield "the parameters after", result.model.parameters_after, skeleton.parameters()
        yield "the zeros after", result.model.zeros_after, zeros
        if result.recovery:
            yield "the zeros after training", result.recovery.zeros_after, zeros
        if not (sparsity := result.sparsity):
            return
        removed = sparsity.removed or 0.0
        yield "the sparsity that was achieved", sparsity.achieved, removed + (1 - removed) * zeros / weights
        for entry in sparsity.projections:
            own = counts.get((entry.layer, entry.name), (0, 1))
            yield f"the sparsity of layer {entry.layer}'s {entry.name}", entry.achieved, own[0] / own[1]
        for layer in sparsity.layers:
            of_layer = [count for (index, _), count in counts.items() if index == layer.layer] or [(0, 1)]
            share = sum(count[0] for count in of_layer) / sum(count[1] for count in of_layer)
            yield f"the sparsity of layer {layer.layer}", layer.achieved, share


def _broken(pattern: NM, rows: Tensor) -> int:
    return int(pattern.broken(rows))
