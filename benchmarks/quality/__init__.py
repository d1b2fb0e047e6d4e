"""Perplexity of every part of what shardprune can do to the weights that stay, alone and together: see __main__.py."""
