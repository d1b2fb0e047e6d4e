"""Outputs of every kind in the engines that are installed: `python -m benchmarks.clients`.

models  the outputs
engine  one engine, in its own environment
"""
