"""nnU-Net's own networks: the planner of each, its memory, and what may be set of the network."""

from __future__ import annotations

import inspect
import pydoc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from umamba.networks.registry import (
    NetworkEntry,
    get_entry,
    list_modules,
    list_networks,
    plain_name,
    unknown_name,
)

PLANNERS = "nnunetv2.experiment_planning.experiment_planners"
RESIDUAL_PLANNERS = f"{PLANNERS}.residual_unets.residual_encoder_unet_planners"
UNETS = "dynamic_network_architectures.architectures.unet"


@dataclass(frozen=True)
class UpstreamEntry:
    """What is known of one of nnU-Net's networks, under the names that a registered one has.

    planner_path: nnU-Net's planner for it. memory_gb: the GiB that this planner plans for.
    n_per_stage: the name of the number of convolutions, or of residual blocks, of a stage, and the
    numbers that the planner gives in the encoder.
    """

    name: str
    class_path: str
    planner_path: str
    memory_gb: float
    paper: str
    n_per_stage: tuple[str, tuple[int, ...]]
    n_conv_decoder: int
    reference: str = "MIC-DKFZ/dynamic-network-architectures@0.4"
    licence: str = "Apache-2.0"
    spatial_dims: tuple[int, ...] = (2, 3)
    fixed_strides: None = None
    pretrained_files: tuple[str, ...] = ()
    control_of: None = None

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The arguments that --network-arg may set, by name."""
        sizes, counts = "Sequence[Sequence[int]]", "Sequence[int]"
        kinds = {"strides": sizes, "kernel_sizes": sizes, "features_per_stage": counts}
        kinds |= {self.n_per_stage[0]: counts, "n_conv_per_stage_decoder": counts}
        keyword = inspect.Parameter.KEYWORD_ONLY
        return {key: inspect.Parameter(key, keyword, annotation=k) for key, k in kinds.items()}

    @property
    def keywords(self) -> tuple[str, ...]:
        """The names of the parameters."""
        return tuple(self.parameters)

    def load_planner(self) -> Any:
        """nnU-Net's planner class."""
        return pydoc.locate(self.planner_path)

    def architecture(
        self, strides: Sequence[Sequence[int]], features_per_stage: Sequence[int]
    ) -> dict[str, Any]:
        """The block of the plans that nnU-Net's planner writes for these stages."""
        n_stages, dims = len(strides), len(strides[0])
        name, numbers = self.n_per_stage
        arguments: dict[str, Any] = {
            "n_stages": n_stages,
            "features_per_stage": list(features_per_stage),
            "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
            "kernel_sizes": [[3] * dims] * n_stages,
            "strides": [list(stride) for stride in strides],
            name: [*numbers, *[numbers[-1]] * n_stages][:n_stages],
            "n_conv_per_stage_decoder": [self.n_conv_decoder] * (n_stages - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        }
        return {
            "network_class_name": self.class_path,
            "arch_kwargs": arguments,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        }


def _residual(size: str, memory_gb: float) -> UpstreamEntry:
    return UpstreamEntry(
        name=f"resenc_{size.lower()}",
        class_path=f"{UNETS}.ResidualEncoderUNet",
        planner_path=f"{RESIDUAL_PLANNERS}.nnUNetPlannerResEnc{size}",
        memory_gb=memory_gb,
        paper="arXiv:2404.09556",
        n_per_stage=("n_blocks_per_stage", (1, 3, 4, 6)),
        n_conv_decoder=1,
    )


_PLAIN = UpstreamEntry(
    name="plainconv_unet",
    class_path=f"{UNETS}.PlainConvUNet",
    planner_path=f"{PLANNERS}.default_experiment_planner.ExperimentPlanner",
    memory_gb=8,
    paper="arXiv:1904.08128",
    n_per_stage=("n_conv_per_stage", (2,)),
    n_conv_decoder=2,
)
UPSTREAM: Mapping[str, UpstreamEntry] = {
    entry.name: entry
    for entry in (_PLAIN, _residual("M", 8), _residual("L", 24), _residual("XL", 40))
}


def find_entry(name: str) -> NetworkEntry | UpstreamEntry:
    """The entry of a registered network or of one of nnU-Net's; ValueError with nearest names."""
    key, known = plain_name(name), {*list_networks(), *UPSTREAM}
    if key not in known and key not in list_modules():
        raise unknown_name("network", name, known)
    return UPSTREAM.get(key) or get_entry(name)
