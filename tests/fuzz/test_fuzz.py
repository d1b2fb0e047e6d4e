"""A small share of the malformed inputs, always the same; `make fuzz` tries many others."""

import os
import subprocess
import sys

from tests.fuzz.kinds import HEAVY, KINDS


def test_malformed_inputs_end_in_one_line_or_a_right_output(tmp_path):
    """One input of every kind, and every command on what it was made for."""
    count = str(len(KINDS) - len(HEAVY))
    command = [sys.executable, "-m", "tests.fuzz", "--seed", "0", "--count", count, "--without", *sorted(HEAVY)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--keep", str(tmp_path)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
