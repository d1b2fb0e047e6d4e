"""Queries and commands to Slurm about the running job."""

import os
import subprocess


def _output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def allocated_nodes() -> list[str]:
    """Return the names of the nodes that this attempt at the job started on, in Slurm's order."""
    return _output_of("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()


def remaining_nodes() -> list[str]:
    """Return the names of the job's nodes that Slurm has not found dead; empty if Slurm does not answer."""
    try:
        held = _output_of(
            "squeue", "--noheader", "--jobs", os.environ["SLURM_JOB_ID"], "--states=RUNNING", "--format=%N"
        )
        return _output_of("scontrol", "show", "hostnames", held).split() if held else []
    except subprocess.CalledProcessError:
        return []


def requeue() -> str | None:
    """End this attempt and requeue the job; return the reason if Slurm refuses."""
    done = subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], capture_output=True, text=True)
    return done.stderr.strip() or f"scontrol ended with code {done.returncode}" if done.returncode else None
