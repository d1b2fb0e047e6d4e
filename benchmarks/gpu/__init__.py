"""A GPU's checks and measurements in one command: `python -m benchmarks.gpu --out DIR`, or `make gpu`.

steps      the table of steps in their order, each with the seconds that it may take
results    rows of results, written while a step runs; gpu.json and gpu.md, written after each step
setting    device and sizes that all steps share, and how seconds are taken on either device
"""
