"""What runs the pages finds what is wrong on one: a made-up page, line by line."""

import pytest

from tests.docs.blocks import Page, kind_of
from tests.docs.walking import walk

PAGE = """\
# A page

    shardprune prune meta-llama/Llama-3.1-8B --out runs/a --sparsity 0.5   # good
    shardprune evaluate runs/a \\
      --perplexity c4 --windows 1
    shardprune prune meta-llama/Llama-3.1-8B --out runs/b --sparsty 0.5
    shardprune prune meta-llama/Llama-3.1-8B --out runs/b --sparsity 1.5
    shardprune prune meta-llama/Llama-3.1-8B --out runs/a --sparsity 0.6
    shardprnue prune MODEL --out OUT --sparsity 0.5
    shardprune trim MODEL
    shardprune evaluate runs/c --perplexity c4
    shardprune prune meta-lama/Llama-3.1-8B --out runs/b --sparsity 0.5
    python -m shardprune.evaluation.lm_eval --model shardprune --model_args pretrained=runs/a,shard=2 --tasks piqa

    $ shardprune plan ray_configs/models/llama-3.1-8b/config.json --gpu-memory 80GB
    ray_configs/models/llama-3.1-8b/config.json: 8,030,261,248 parameters in 32 layers, stored as bfloat16
    ...
    exact: does not fit

    $ shardprune prune MODEL --out OUT --sparsity 2
    error: sparsity: 2.0 is not allowed; use a number from 0 to below 1
    $ shardprune prune MODEL --out OUT --sparsity 2
    error: sparsity: 2.0 is too much

    shardprune rebuild DENSE nowhere --out OUT --rebuild-granularity cell
    ray job submit --working-dir . --runtime-env nowhere.yaml -- python -m jobs.prune RECIPE --out OUT
    ray job submit --working-dir . -- python -m jobs.prune RECIPE --ouput OUT
    sbatch --nods 4 cluster/slurm/shardprune.sbatch prune RECIPE.yaml --out OUT
    python -m tests.benchmarks.solver --thread 2 --row
    pip install 'shardprune[s4]'
    make tset
    export COLUMNS

```python
from shardprune import Recipe, prune
result = prune(Recipe(model="MODEL", out="OUT", sparsity=0.5, calibration="c4"))
assert result.sparsity.achieved == 0.5
```

```python
assert result.sparsity.achieved == 0.7
```

A recipe, `mine.yaml`:

```yaml
sparsity: 0.7
allocation: owl
```

    shardprune prune MODEL --out runs/mine --recipe mine.yaml

```yaml
sparsity: 0.7
alocation: owl
```

```json
{"sparsity": 0.7,}
```

    Some output: 3 lines
"""
FOUND = {
    6: "No such option: --sparsty",
    7: "sparsity: 1.5 is not allowed",
    8: "runs/a holds another run",
    9: "unknown program 'shardprnue'",
    10: "shardprune has no command 'trim'",
    11: "no page makes 'runs/c'",
    12: "'meta-lama/Llama-3.1-8B' is not in HUB",
    13: "--model_args: shardprune knows no shard",
    15: "shown, but not printed: 'exact: does not fit'",
    22: "without 'error: sparsity: 2.0 is too much'",
    25: "rebuild_granularity: 'cell' is not allowed",
    26: "no file 'nowhere.yaml'",
    27: "No such option: --ouput",
    28: "sbatch: unknown option --nods",
    29: "refuses --thread 2 --row",
    30: "shardprune has no extra s4",
    31: "the Makefile has no 'tset'",
    32: "export: 'COLUMNS' is not NAME=VALUE",
    41: "AssertionError",
    54: "no recipe: alocation: no field of a recipe has this name",
    59: "JSONDecodeError",
}


@pytest.fixture
def problems(shell):
    return {problem.line: problem.reason for problem in walk(Page.parse("made-up.md", PAGE), shell)}


def test_all_that_is_wrong_is_found_with_its_line_and_nothing_else(problems):
    assert problems.keys() == FOUND.keys(), problems
    for line, reason in FOUND.items():
        assert reason in problems[line], line


KINDS = {
    "shardprune plan MODEL": "commands",
    "X=1 shardprune plan MODEL": "commands",
    "$ make demo\nno output": "commands",
    "from x import y": "python",
    "model = load('x')": "python",
    "model: x\nsparsity: 0.5": "yaml",
    '{"a": 1}\n{"a": 2}': "json",
    "error: out: missing": "output",
    "exact: fits; up to 80 layers a shard": "output",
    "  0.0 |rrr|": "output",
}


@pytest.mark.parametrize(("text", "kind"), KINDS.items(), ids=KINDS)
def test_a_block_without_a_language_is_what_it_looks_like(text, kind):
    assert kind_of(text) == kind
