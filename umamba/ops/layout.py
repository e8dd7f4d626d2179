"""Memory layout that all scan backends share: the chunk length and the token-major allocation."""

import torch

CHUNK = 32  # tokens between two saved states; equals CHUNK in csrc/umamba.h


def empty_tokens(B: int, D: int, L: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return an uninitialised (B, D, L) view of memory laid out (B, L, D), channels innermost."""
    return torch.empty(B, L, D, dtype=dtype, device=device).transpose(1, 2)
