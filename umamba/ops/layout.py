"""Memory layout that all scan backends share: the chunk length and the token-major allocation."""

import torch

CHUNK = 32  # tokens between two saved states; equals CHUNK in csrc/umamba.h


def empty_tokens(x: torch.Tensor) -> torch.Tensor:
    """Return an uninitialised tensor like x (B, D, L), its memory laid out (B, L, D)."""
    B, D, L = x.shape
    return torch.empty(B, L, D, dtype=x.dtype, device=x.device).transpose(1, 2)
