"""Between device and trees: the frame allocator, limbo, and pins. Knows nothing of trees or names.

Read `frames` first, then `limbo`, then `pins`.
"""
