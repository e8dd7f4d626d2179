"""The file that nnU-Net's `nnUNet_extTrainer` finds: it re-exports our trainer and nothing else."""

from umamba.training.trainer import UMambaTrainer

__all__ = ["UMambaTrainer"]
