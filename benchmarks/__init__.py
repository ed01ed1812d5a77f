"""The comparisons of the project, one question per file.

Each file runs alone (`python benchmarks/clone.py [--json] [--quick]`) or with all others (`onecopy bench`), and offers
`measure(quick)`, which returns rows. What is compared runs side by side: in one process, in turn, in both orders, and
the medians are set against each other. What this machine can't do is skipped, with the reason in the row.

Those that set more than two ways side by side offer `compare(quick)`, too: panels of figures, which also become pictures.
"""

COMPARISONS = ("copies", "reads", "clone_stores", "pressure", "by_processes", "by_clones", "by_size", "by_extents")
PAIRS = (
    "memory",
    "clone",
    "clone_fragmented",
    "snapshot",
    "first_read",
    "map_fragmented",
    "stores",
    "first_store",
    "private_store",
    "shootdown",
    "parallel_stores",
    "put",
    "directory",
    "open_pool",
    "dedupe",
    "replacement",
)
NAMES = (*COMPARISONS, *PAIRS)
