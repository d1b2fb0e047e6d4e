"""An address of a cluster that is not there."""

import pytest

from shardprune.cli import main


def test_an_address_where_no_cluster_answers(folder, tmp_path, capsys):
    command = ["prune", str(folder / "model"), "--out", str(tmp_path / "o"), "--address", "127.0.0.1:1"]
    command += ["--calibration", str(folder / "tokens.npy"), "--samples", "4", "--seqlen", "24", "--sparsity", "0.5"]
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: address: no Ray cluster answers at '127.0.0.1:1'")
    assert not (tmp_path / "o").exists()
