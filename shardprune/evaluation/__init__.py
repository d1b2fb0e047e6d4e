"""Measuring a finished model: perplexity and the tasks of lm-eval, over its shards."""
