"""The emulated device: a pool file addressed by page frame number (PFN), its run-time file, locks and mappings.

Knows nothing of inodes or extents. Read in this order: `units`, `errors`, `record`, `persist`, `pool`, `locks`,
`runtime`, `slots`, `mapping`.
"""
