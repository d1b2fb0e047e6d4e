"""A home in which Ray cannot keep its token, as that of a user whom a container does not know."""

import os
import subprocess
import sys


def test_a_home_that_cannot_be_written_is_one_line(folder, tmp_path):
    home = tmp_path / "home"
    home.touch()  # root could write into any directory
    command = [sys.executable, "-m", "shardprune", "prune", str(folder / "model"), "--out", str(tmp_path / "o")]
    command += ["--calibration", str(folder / "tokens.npy"), "--samples", "4", "--seqlen", "24", "--sparsity", "0.5"]
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    ended = subprocess.run(command, env={**others, "HOME": str(home)}, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert f"error: backend: Ray cannot write '{home}/.ray' (Not a directory); set HOME to" in ended.stderr
    assert "Traceback" not in ended.stderr
