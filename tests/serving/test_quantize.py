"""torchrec quantises a model: our tables follow where a mapping says so, and else say that they do not."""

import warnings
from pathlib import Path

import pytest
import torch
from laws import CASES, Case
from test_compiled import batch_of
from torch import nn
from torchrec.inference.modules import quantize_embeddings, quantize_inference_model
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import embtab as et
from embtab.bundle.quantised import QuantisedCollection
from embtab.errors import UserError
from embtab.reader import Bundle

OURS = [et.EmbeddingBagCollection, et.EmbeddingCollection]


class Model(nn.Module):
    """Tables and a layer."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.tables = et.EmbeddingBagCollection(case.plan(), "torch", init_std=0.3)
        self.layer = nn.Linear(80, 1)

    def forward(self, batch: KeyedJaggedTensor) -> torch.Tensor:
        """Scores [B, 1]."""
        return self.layer(self.tables(batch).values())


@pytest.mark.parametrize("name", ["dense", "qr product", "memcom", "mixed"])
@pytest.mark.parametrize(("kind", "precision"), [(torch.qint8, "int8"), (torch.quint4x2, "int4")], ids=str)
def test_tables_that_are_mapped_are_those_of_a_bundle(
    name: str, kind: torch.dtype, precision: str, tmp_path: Path
) -> None:
    model = Model(next(case for case in CASES if case.name == name))
    et.save(model.tables, tmp_path / "b", precision=precision)
    mapping = dict.fromkeys(OURS, QuantisedCollection)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="this quantises no embtab tables")
        made = quantize_embeddings(
            model, kind, inplace=False, additional_qconfig_spec_keys=OURS, additional_mapping=mapping
        )
    assert isinstance(made.tables, QuantisedCollection)
    assert isinstance(model.tables, et.EmbeddingBagCollection), "not in place"
    opened, batch = Bundle(tmp_path / "b"), batch_of(9, weighted=True)
    found, apart = made.tables(batch), 0.0
    for feature in opened.features:
        one = batch[feature]
        ids, offsets, weights = (each.numpy() for each in (one.values(), one.offsets(), one.weights()))
        expected = torch.from_numpy(opened.lookup(feature, ids, offsets, weights))
        torch.testing.assert_close(found[feature], expected, rtol=0, atol=1e-5)
        apart = max(apart, float((expected - model.tables(batch)[feature]).detach().abs().max()))
    assert apart > 1e-5, "quantised rows differ from those trained"


def test_a_model_for_inference_is_quantised_by_the_name_of_the_class() -> None:
    model = Model(CASES[0])
    named = {f"{kind.__module__}.{kind.__qualname__}": QuantisedCollection for kind in OURS}
    made = quantize_inference_model(model, quantization_mapping=named)
    assert isinstance(made.tables, QuantisedCollection)
    assert made(batch_of(3)).shape == (3, 1)


def test_tables_that_are_not_mapped_say_that_they_stay_float32() -> None:
    for quantise in (lambda model: quantize_embeddings(model, torch.qint8, inplace=True), quantize_inference_model):
        with pytest.warns(UserWarning, match=r"no embtab tables, which stay float32: plan them with precision='int8'"):
            quantise(Model(CASES[0]))
        model = Model(CASES[0])
        assert not hasattr(model.tables, "qconfig")


def test_types_that_tables_do_not_have_are_a_line() -> None:
    mapping = dict.fromkeys(OURS, QuantisedCollection)
    with pytest.raises(UserError, match=r"tables cannot be quantised to torch.qint32; there are torch.int8"):
        quantize_embeddings(
            Model(CASES[0]), torch.qint32, True, additional_qconfig_spec_keys=OURS, additional_mapping=mapping
        )
    with pytest.raises(UserError, match="per_table_weight_dtype is not for embtab's tables"):
        quantize_embeddings(
            Model(CASES[0]), torch.qint8, True, OURS, mapping, per_table_weight_dtype={"a": torch.qint8}
        )
