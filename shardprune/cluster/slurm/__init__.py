"""Runs as Slurm jobs: `batch` writes a job's script, `job` is what the script runs, `node` what runs on each node, and
`driver` the command in a `container`.
"""
