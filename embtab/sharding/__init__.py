"""Tables spread over processes by torchrec, under Lightning's Trainer; nothing else in embtab knows of processes.

`embtab.sharding.strategy` is what a program uses, `embtab.sharding.placement` decides which process holds what, and
`embtab.sharding.cost` says what a step sends, for machines one does not have.
"""
