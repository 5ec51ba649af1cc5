"""Trains AutoInt on synthetic data by however many processes: torchrun --nproc-per-node 2 docs/sharded_run.py

Make the data first: embtab prepare synthetic --out data/demo --rows 200000 --scale 0.002 --if-absent
A second argument names how tables are spread, such as row_wise; a third, a checkpoint to go on from.
"""

import os
import sys
from datetime import timedelta

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import embtab as et
from embtab.models import AutoInt

folder, sharding, checkpoint = [*sys.argv[1:], *["data/demo", "auto", None][len(sys.argv) - 1 :]]
data = et.DataModule(folder, batch_size=1024)
L.seed_everything(0)
plan = et.plan(data.features, method="qr", budget="0.2x", dim=16)
tables = et.EmbeddingBagCollection(plan, optimizer=et.Optimizer("rowwise_adagrad", lr=0.05))
task = et.RankingTask(tables, AutoInt(len(data.dataset.dense), len(data.features), 16, num_layers=1, dnn=(64,)))
on_gpu = torch.cuda.is_available()
trainer = L.Trainer(
    accelerator="gpu" if on_gpu else "cpu",
    devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", 1)),
    strategy=et.TorchRecStrategy(sharding, timeout=timedelta(minutes=2)),
    max_epochs=1,
    num_sanity_val_steps=0,
    logger=False,
    enable_model_summary=False,
    callbacks=[ModelCheckpoint("checkpoints", filename="last", every_n_train_steps=20, enable_version_counter=False)],
)
trainer.fit(task, data, ckpt_path=checkpoint, weights_only=True)
if trainer.is_global_zero:
    print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()})
