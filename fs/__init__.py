"""The file system: copy-on-write trees over the pool's frames.

Reading order, down the layers: `filesystem` (the public API), `mount`, `tx`, `file`, `sharing`, `namei`, `inode`, `extents`,
`directory`, `counts`, `btree`, `format`.
"""
