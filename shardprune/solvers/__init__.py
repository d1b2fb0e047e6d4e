"""Pruning mathematics as pure functions on tensors: no models, no files, no Ray."""
