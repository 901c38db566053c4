"""The trained network: encoder, predictor and optional projector, from images to the loss."""

import torch
from torch import nn

from cjepa_fast.kernels.gather import prediction_loss
from cjepa_fast.model.loss import CJEPALoss, Terms
from cjepa_fast.model.packed import PackedContext


class JEPA(nn.Module):
    """What the optimiser sees. The target encoder stays outside: it takes no gradient."""

    def __init__(
        self,
        encoder: nn.Module,
        predictor: nn.Module,
        loss: CJEPALoss,
        projector: nn.Module | None = None,
    ):
        super().__init__()
        self.encoder = encoder
        self.predictor = predictor
        self.projector = projector
        self.loss = loss

    def forward(
        self,
        images_BCHW: torch.Tensor,
        context: torch.Tensor | PackedContext,
        target_idx_BMP: torch.Tensor,
        target_tokens_BND: torch.Tensor,
        directions_DK: torch.Tensor | None = None,
    ) -> Terms:
        """The loss and its terms, 0-d by name. target_tokens: the target encoder's output;
        directions: of the step, for SIGReg."""
        tokens = self.encoder(images_BCHW, context)
        predicted = self.predictor(tokens, context, target_idx_BMP)
        jepa = prediction_loss(predicted, target_tokens_BND, target_idx_BMP, self.loss.prediction)
        return self.loss(
            jepa, predicted, tokens, target_tokens_BND, self.projector, context, directions_DK
        )
