"""The structures of a model (layers, key/value groups, neurons) and how many are removed: arithmetic on configs and
counts, without weights.
"""
