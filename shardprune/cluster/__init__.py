"""Many workers at once: their layout, the flow of waves between them, and what happens when one dies.

Only `ray_backend` imports Ray; everything else drives workers of this process just as well.
"""
