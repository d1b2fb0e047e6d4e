"""Many workers at once: their layout, the flow of waves between them, and what happens when one dies.

Ray is imported in `ray_backend`, `ray_training` and `ray_metrics` alone; everything else drives workers of this process
just as well.
"""
