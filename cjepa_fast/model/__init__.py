"""The networks and the loss: images and masks in, terms of the loss out."""

from cjepa_fast.model.jepa import JEPA
from cjepa_fast.model.loss import CJEPALoss
from cjepa_fast.model.predictor import Predictor
from cjepa_fast.model.sigreg import SIGReg
from cjepa_fast.model.vit import Encoder

__all__ = ["JEPA", "CJEPALoss", "Encoder", "Predictor", "SIGReg"]
