"""Triton's kernels run in its interpreter where there is no GPU."""

import os

import torch

# Read when triton is imported, by whichever test is collected first.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
