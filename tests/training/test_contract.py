"""What fused tables and a Trainer, or a process group, may not do together."""

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.errors import UserError
from embtab.training.contract import check

FEATURES = [et.Feature("a", 9), et.Feature("b", 5)]
BATCH = KeyedJaggedTensor(["a", "b"], torch.arange(4), lengths=torch.ones(4, dtype=torch.int64))


def tables(backend: str = "fbgemm", kind: type = et.EmbeddingBagCollection, method: object = "dense", **options):
    return kind(et.plan(FEATURES, method, dim=4, **options), backend=backend)


class Own(L.LightningModule):
    """A module of the user's, which knows nothing of the contract."""

    def __init__(self, collection: nn.Module):
        super().__init__()
        self.deep = nn.ModuleList([nn.Sequential(collection)])

    def training_step(self, batch, index):
        return self.deep[0][0](BATCH).values().sum()

    def configure_optimizers(self):
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


def fitting(strategy: object = "ddp", devices: int = 2) -> L.Trainer:
    trainer = L.Trainer(accelerator="cpu", devices=devices, strategy=strategy, logger=False, enable_checkpointing=False)
    trainer.state.fn = TrainerFn.FITTING
    return trainer


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn", "ddp_find_unused_parameters_true"])
@pytest.mark.parametrize("backend", ["fbgemm", "native"])
@pytest.mark.parametrize("kind", [et.EmbeddingBagCollection, et.EmbeddingCollection])
def test_strategies_that_leave_tables_apart_are_refused(kind, backend, strategy, devices):
    with pytest.raises(
        UserError, match=r"DDPStrategy would train other tables \(deep.0.0\) on each process; .*torchrec"
    ):
        check(fitting(strategy, devices), Own(tables(backend, kind)))


def test_strategies_that_are_right_are_not():
    check(fitting(), Own(tables("torch")))
    check(fitting("torchrec"), Own(tables()))
    check(fitting("auto", 1), Own(tables()))
    evaluating = fitting()
    evaluating.state.fn = TrainerFn.TESTING
    check(evaluating, Own(tables()))
    trial = tables()
    trial.per_process = True
    check(fitting(), Own(trial))


def test_adaptive_tables_are_not_reorganised_by_each_process():
    with pytest.raises(UserError, match="method 'cce' of 'a' reorganise its tables by what each process"):
        check(fitting(), Own(tables("torch", method="cce", budget="0.9x")))


@pytest.mark.parametrize("name", ["torchrec", "TorchRec", "TorchRecStrategy", "embtab.TorchRecStrategy"])
def test_the_strategy_has_names(name):
    assert isinstance(fitting(name).strategy, et.TorchRecStrategy)
    assert type(fitting().strategy) is DDPStrategy


def test_a_module_of_the_users_own_is_checked_by_the_callback():
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "max_steps": 1, "barebones": False}
    data = [torch.zeros(1)] * 2
    trainer = L.Trainer(**options, accumulate_grad_batches=2, callbacks=[et.TableContract()])
    with pytest.raises(UserError, match="accumulate_grad_batches=2"):
        trainer.fit(Own(tables()), data)


@pytest.fixture
def two_processes():
    """A process group of two, of which only this one is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", [et.EmbeddingBagCollection, et.EmbeddingCollection])
def test_a_plain_loop_on_several_processes_is_refused(two_processes, kind):
    for backend in ("fbgemm", "native"):
        collection = tables(backend, kind)
        with pytest.raises(
            UserError, match=r"each of 2 processes would train other tables.*TorchRecStrategy.*per_process"
        ):
            collection(BATCH)
        with torch.no_grad():
            collection(BATCH)
        collection.eval()(BATCH)
        collection.train().per_process = True
        collection(BATCH)
    tables("torch", kind)(BATCH)
