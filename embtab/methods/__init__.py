"""Every method, by its name. Adding one: a file here, a line below, a row in tests/laws.py."""

from embtab.methods.base import Encoding, Spec
from embtab.methods.cafe import CAFE
from embtab.methods.cce import CCE
from embtab.methods.dense import Dense
from embtab.methods.dhe import DHE
from embtab.methods.freqcut import FreqCut
from embtab.methods.hash import Hash
from embtab.methods.lowrank import LowRank
from embtab.methods.memcom import MEmCom
from embtab.methods.mixed_dim import MixedDim
from embtab.methods.multihash import MultiHash
from embtab.methods.partitions import Partitions
from embtab.methods.pruned import Pruned
from embtab.methods.qr import QR
from embtab.methods.robe import Robe
from embtab.methods.sparse import Sparse
from embtab.methods.storage import PRECISIONS, Table
from embtab.methods.tt import TensorTrain
from embtab.methods.unified import Unified

METHODS: dict[str, type[Encoding]] = {
    "dense": Dense,
    "hash": Hash,
    "unified": Unified,
    "qr": QR,
    "partitions": Partitions,
    "lowrank": LowRank,
    "mixed_dim": MixedDim,
    "cce": CCE,
    "cafe": CAFE,
    "multihash": MultiHash,
    "freqcut": FreqCut,
    "memcom": MEmCom,
    "robe": Robe,
    "tt": TensorTrain,
    "dhe": DHE,
    "pruned": Pruned,
    "sparse": Sparse,
}


def list_methods() -> list[str]:
    """The names that `plan` takes: every method, and "auto", which chooses among them."""
    return ["auto", *METHODS]


__all__ = ["METHODS", "PRECISIONS", "Encoding", "Spec", "Table", "list_methods"]
