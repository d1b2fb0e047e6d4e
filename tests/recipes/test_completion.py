"""What a shell offers where the tabulator key is pressed in a `shardprune` command."""

import shutil
import subprocess
import sys

import pytest
import typer

from shardprune.cli import app
from shardprune.planning.hardware import HARDWARE

HEAVY = ("torch", "transformers", "ray", "datasets", "deepspeed", "accelerate")
OFFERS = {
    "commands": ("shardprune p", ["prune", "pipeline", "plan", "plan-recovery"]),
    "options": ("shardprune prune --sa", ["--samples"]),
    "switches": ("shardprune prune --no-", ["--no-resume", "--no-correction", "--no-measure-error"]),
    "choices": ("shardprune prune --method ", ["magnitude", "wanda", "sparsegpt", "alps"]),
    "choices that begin so": ("shardprune prune model --allocation mo", ["mosaic", "mosaic-released"]),
    "choices of a table": ("shardprune plan --hardware ", list(HARDWARE)),
    "sources": ("shardprune prune m --calibration ", ["stdlib", "wikitext2", "ptb", "c4"]),
    "sources that begin so": ("shardprune evaluate m --perplexity w", ["wikitext2", "weights/", "words.txt"]),
    "sources in a folder": ("shardprune recover m --data weights/", ["weights/rows.jsonl"]),
    "sources of data": ("shardprune recover m --data a", ["alpaca"]),
    "choices of a command's own option": ("shardprune slurm r.yaml --command reb", ["rebuild"]),
    "nothing: the shell offers files": ("shardprune prune --out run", []),
}


@pytest.mark.parametrize(("line", "offered"), OFFERS.values(), ids=OFFERS)
def test_bash_is_offered(line, offered, monkeypatch, capsys, tmp_path):
    (tmp_path / "weights").mkdir()
    for name in ("words.txt", "words.csv", ".wrong.txt", "weights/rows.jsonl", "weights/model.safetensors"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("_SHARDPRUNE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
    with pytest.raises(SystemExit) as ended:
        typer.main.get_command(app).main([], prog_name="shardprune")
    assert ended.value.code == 0
    found = capsys.readouterr().out.split()
    assert [word for word in found if word in offered] == offered
    assert line.endswith(("p", "--no-", "--calibration ")) or sorted(found) == sorted(offered)
    assert "words.csv" not in found


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_offered_the_same(shell, monkeypatch, capsys):
    monkeypatch.setenv("_SHARDPRUNE_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "shardprune prune --method ")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    with pytest.raises(SystemExit):
        typer.main.get_command(app).main([], prog_name="shardprune")
    assert capsys.readouterr().out.replace('"', " ").replace("))'", " ").split()[-4:] == [
        "magnitude",
        "wanda",
        "sparsegpt",
        "alps",
    ]


def test_the_script_for_bash_works_in_bash(tmp_path):
    bash = shutil.which("bash")
    if not bash:
        pytest.skip("no bash")
    command = tmp_path / "shardprune"
    command.write_text(f"#!{sys.executable}\nfrom shardprune.cli import main\n\nmain()\n")
    command.chmod(0o755)
    script = (
        f'PATH="{tmp_path}:$PATH"; eval "$(shardprune --show-completion)"; COMP_WORDS=(shardprune prune --backend l);'
        'COMP_CWORD=3; _shardprune_completion shardprune; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run([bash, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "local\n", done.stderr


def test_nothing_heavy_is_imported_for_it():
    code = f"import sys, shardprune.cli; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
