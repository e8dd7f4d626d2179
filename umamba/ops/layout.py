"""Memory layout that all scan backends share: the chunk length and how results are allocated.

B batch, K directions, E channels of a direction, L tokens, N states, G groups.
"""

import torch
from torch import Tensor

CHUNK = 32  # tokens between two saved states; equals CHUNK in csrc/umamba.h


def empty_tokens(x: Tensor) -> Tensor:
    """Return an uninitialised tensor like x (B, D, L), its memory laid out (B, L, D)."""
    B, D, L = x.shape
    return torch.empty(B, L, D, dtype=x.dtype, device=x.device).transpose(1, 2)


def empty_walked(x: Tensor, n_directions: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised (B, K, E, L) tensor for x (B, *, E, L), laid out (K, B, L, E)."""
    B, _, E, L = x.shape
    memory = torch.empty(n_directions, B, L, E, dtype=dtype or x.dtype, device=x.device)
    return memory.permute(1, 0, 3, 2)


def empty_matrix(x: Tensor) -> Tensor:
    """Return an uninitialised tensor like x (B, K, G, N, L), laid out (K, B, G, L, N)."""
    B, K, G, N, L = x.shape
    return torch.empty(K, B, G, L, N, dtype=x.dtype, device=x.device).permute(1, 0, 2, 4, 3)


def empty_state(A: Tensor, batch: int) -> Tensor:
    """Return an uninitialised (B, K, E, N) state for A (K, E, N), laid out (K, B, E, N)."""
    K, E, N = A.shape
    return torch.empty(K, batch, E, N, dtype=A.dtype, device=A.device).transpose(0, 1)


def empty_saved(A: Tensor, batch: int, length: int, wanted: bool) -> Tensor:
    """Return uninitialised states before each chunk (K, B, chunks, N * E), (0,) if not wanted.

    The order within the last axis is the backend's own.
    """
    K, E, N = A.shape
    n_chunks = (length + CHUNK - 1) // CHUNK
    shape = (K, batch, n_chunks, N * E) if wanted else (0,)
    return torch.empty(shape, dtype=A.dtype, device=A.device)
