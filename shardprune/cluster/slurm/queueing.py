"""What Slurm is asked about a running job, and told."""

import os
import subprocess


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def allocated_nodes() -> list[str]:
    """The names of the nodes that this attempt at the job started on, in Slurm's order."""
    return _said("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()


def remaining_nodes() -> list[str]:
    """The names of the job's nodes but for those that Slurm has found dead; none where Slurm does not say."""
    try:
        held = _said("squeue", "--noheader", "--jobs", os.environ["SLURM_JOB_ID"], "--states=RUNNING", "--format=%N")
        return _said("scontrol", "show", "hostnames", held).split() if held else []
    except subprocess.CalledProcessError:
        return []


def requeue() -> str | None:
    """End this attempt at the job and put it back into the queue; why not, where Slurm refuses."""
    done = subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], capture_output=True, text=True)
    return done.stderr.strip() or f"scontrol ended with code {done.returncode}" if done.returncode else None
