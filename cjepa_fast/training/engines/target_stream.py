"""The target's forward on a CUDA stream of its own, beside the context encoder's."""

import torch
from torch import nn


class TargetStream:
    """Calls the target on a second CUDA stream; the main one waits for it after the predictor.

    What reads the targets, the loss, comes after that. The target begins when all that the main
    stream had been given is done: the images and the last EMA among it. Its activations lie in
    a pool of their own, so that memory grows by them.
    """

    def __init__(self, target: nn.Module, predictor: nn.Module, device: torch.device):
        self.target = target
        self.stream = torch.cuda.Stream(device)
        predictor.register_forward_hook(self._join)

    def __call__(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """The target's tokens, not to be read before the predictor has run."""
        main = torch.cuda.current_stream()
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            tokens = self.target(images_BCHW)
        images_BCHW.record_stream(self.stream)
        tokens.record_stream(main)
        return tokens

    def _join(self, predictor: nn.Module, args: tuple, output: torch.Tensor) -> None:
        torch.cuda.current_stream().wait_stream(self.stream)
