"""Training under Lightning: what is learnt, from which batches, and what is measured and kept.

`embtab.training.task` and `embtab.training.sequence_task` are the tasks, `embtab.training.data` is the data module,
`embtab.training.metrics` says how well a ranker ranks, `embtab.training.checkpoint` reads tables back.
"""
