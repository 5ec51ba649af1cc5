"""Rankers: plain modules that receive embeddings and know no compression method, lookup backend or trainer.

AutoInt takes one vector per feature; MeanPool, DIN and DARE take a target and the events before it (see events.py).
"""

from embtab.models.autoint import AutoInt
from embtab.models.dare import DARE
from embtab.models.din import DIN
from embtab.models.meanpool import MeanPool

SEQUENCE_MODELS = (MeanPool, DIN, DARE)

__all__ = ["DARE", "DIN", "SEQUENCE_MODELS", "AutoInt", "MeanPool"]
