"""Allocations: how a sparsity target is divided among layers and projections. Arithmetic on a few numbers per
projection.
"""
