"""What one layer may ask of a GPU at most, and how far results on it may be from the CPU's.

A layer of hidden size 256 and 896 neurons is pruned to half its weights, in bfloat16; steps over waves are given for
one wave of 128 tokens (`benchmarks.launches.count_layer`). Launches, synchronisations of the host, and kilobytes over
PCIe. The simulated GPU runs no Triton: columns are stepped over by the recursion, and a kernel asks for less.
"""

HIDDEN = 256
TOLERANCE = 1e-5  # of float32 weights that a solution of SparseGPT's or least squares gave, relative to the largest

STEPS = {
    "accumulate": (47, 0, 0),
    "solve q, k, v": (1055, 4, 1),
    "solve o": (897, 4, 1),
    "solve gate, up": (976, 4, 1),
    "solve down": (2897, 4, 1),
    "write": (7, 1, 1632),
    "finish": (0, 0, 0),
    "propagate": (46, 0, 0),
}
# Where waves are on the host, each comes and goes: 64 KiB of 16-bit numbers.
ON_HOST = {"accumulate": (48, 1, 64), "propagate": (47, 2, 128)}
# Launches of a projection's column steps for each column, without what is done once for an input.
COLUMN = {"unstructured": 3.4, "2:4": 5.6}
