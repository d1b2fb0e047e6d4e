"""Hugging Face models: checkpoints, families, one layer at a time."""
