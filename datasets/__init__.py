"""Raw files to dataset folders, and a folder's batches. Knows features; knows nothing of tables, models or training.

`embtab.datasets.schema` says what a folder holds, `embtab.datasets.reader` reads it, `embtab.datasets.check` says what
is wrong with one. Folders are made of known logs by `embtab.datasets.criteo`, `embtab.datasets.avazu`,
`embtab.datasets.frappe`, `embtab.datasets.movielens` and `embtab.datasets.sequences`; of any table, by its roles, by
`embtab.datasets.table`; of nothing, with a known best AUC, by `embtab.datasets.synthetic` and
`embtab.datasets.long_histories`.
"""
