"""Between device and trees: the frame allocator, limbo, and address spaces. Knows nothing of trees or names.

Read `frames` first, then `limbo`, then `spaces`.
"""
