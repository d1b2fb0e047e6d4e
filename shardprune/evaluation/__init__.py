"""Evaluation of a finished model over its shards: perplexity and lm-eval's tasks."""
