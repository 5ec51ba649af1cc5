"""A stopped run goes on in the middle of an epoch, with any number of processes: every row once.

The processes here are one after another, each with a Trainer of its own; tests/distributed has real ones.
"""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from embtab.datasets import reader
from embtab.training.data import DataModule

ROWS = 2_000


class Recorder(L.LightningModule):
    """Keeps the rows of every batch: the toy's column x names them."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, int, list[float]]] = []

    def training_step(self, batch, index):
        self.seen.append((self.current_epoch, index, batch.dense[:, 0].tolist()))
        return (batch.label.mean() * self.weight).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(toy, folder, world_size, batch_size, steps, workers=0, resume=None, monkeypatch=None):
    """What each of the processes sees, by rank, until its Trainer has done so many steps."""
    found = []
    for rank in range(world_size):
        monkeypatch.setattr(reader, "_place", lambda *_, rank=rank: (rank, world_size))
        recorder = Recorder()
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=2,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[
                ModelCheckpoint(
                    folder,
                    filename=f"{{step}}-{rank}",
                    every_n_train_steps=steps if steps > 0 else 10_000,
                    save_top_k=-1,
                )
            ],
        )
        trainer.fit(recorder, DataModule(str(toy), batch_size, num_workers=workers), ckpt_path=resume)
        assert trainer.current_epoch == 2 or steps > 0
        found.append(recorder.seen)
    return found


@pytest.mark.parametrize(
    ("first", "then"),
    [((2, 40, 0), (1, 40, 0)), ((1, 40, 0), (2, 20, 2)), ((2, 40, 2), (4, 50, 0)), ((1, 100, 0), (1, 100, 0))],
)
@pytest.mark.parametrize("cut", [5, 10])
def test_every_row_of_an_epoch_once(toy, tmp_path, monkeypatch, first, then, cut):
    def run(setting, steps, resume=None):
        world_size, batch_size, workers = setting
        return train(toy, tmp_path, world_size, batch_size, steps, workers, resume, monkeypatch)

    before = run(first, cut)
    after = run(then, -1, tmp_path / f"step={cut}-0.ckpt")
    for epoch in (0, 1):
        rows = [row for seen in before + after for at, _, batch in seen if at == epoch for row in batch]
        assert len(rows) == len(set(rows)) == ROWS, f"epoch {epoch}"
    for seen in after:  # the Trainer counts the batches of the epoch on, to the same end in both epochs
        last = then[0] * then[1]
        assert [index for at, index, _ in seen if at == 1] == list(range(-(-ROWS // last)))
        assert [index for at, index, _ in seen if at == 0][-1] == -(-ROWS // last) - 1


def test_fewer_rows_left_than_processes_is_the_end_of_the_epoch(toy, tmp_path, monkeypatch):
    train(toy, tmp_path, 1, 333, 6, monkeypatch=monkeypatch)
    after = train(toy, tmp_path, 4, 100, -1, resume=tmp_path / "step=6-0.ckpt", monkeypatch=monkeypatch)
    assert {epoch for seen in after for epoch, _, _ in seen} == {1}
    rows = [row for seen in after for _, _, batch in seen for row in batch]
    assert len(rows) == len(set(rows)) == ROWS
