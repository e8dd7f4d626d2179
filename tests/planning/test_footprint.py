"""The counted memory of a training step: nnU-Net's number, and what autograd really keeps."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from umamba.blocks.mixer import MixerLayer
from umamba.blocks.recompute import recompute_mixers
from umamba.blocks.ss2d import SS2D, VSSBlock
from umamba.networks import create_network, get_entry, list_networks
from umamba.planning.footprint import (
    conv_features,
    count_footprint,
)
from umamba.planning.plans import network_builder


def plain_unet(
    strides: list[list[int]],
    features: list[int],
    n_classes: int = 3,
    deep_supervision: bool = True,
    name: str = "PlainConvUNet",
) -> Callable[[], nn.Module]:
    dims, n = len(strides[0]), len(strides)
    residual = name != "PlainConvUNet"
    arguments = {
        "n_stages": n,
        "features_per_stage": features,
        "conv_op": f"torch.nn.Conv{dims}d",
        "kernel_sizes": [[3] * dims] * n,
        "strides": strides,
        "n_blocks_per_stage" if residual else "n_conv_per_stage": [2] * n,
        "n_conv_per_stage_decoder": [2] * (n - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    architecture = {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
        "arch_kwargs": arguments,
        "_kw_requires_import": ["conv_op", "norm_op", "nonlin"],
    }
    return network_builder({"architecture": architecture}, 1, n_classes, deep_supervision)


@pytest.mark.parametrize(
    ("patch_size", "expected"),
    [((128, 128, 128), 453_694_976), ((96, 160, 160), 531_673_800)],
    ids=["128x128x128", "96x160x160"],
)
def test_conv_features_equal_the_number_of_nnunet_at_its_own_patches(patch_size, expected):
    strides = [[1, 1, 1], *[[2, 2, 2]] * 5]
    with torch.device("meta"):
        network = plain_unet(strides, [32, 64, 128, 256, 320, 320])()
    assert conv_features(network, 1, patch_size) == expected
    assert network.compute_conv_feature_map_size(patch_size) == expected


def test_conv_features_of_a_residual_encoder_are_within_a_promille_of_nnunet():
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    with torch.device("meta"):
        network = plain_unet(strides, [8, 16, 32], name="ResidualEncoderUNet")()
    expected = network.compute_conv_feature_map_size((16, 40, 24))
    assert conv_features(network, 1, (16, 40, 24)) == pytest.approx(expected, rel=1e-3)


def test_saved_bytes_of_the_plain_unet_at_40x56x40_are_the_measured_151_6_megabytes():
    build = plain_unet([[1] * 3, *[[2] * 3] * 3], [32, 64, 128, 256])
    assert count_footprint(build, 1, (40, 56, 40)).saved_bytes == 151_620_096


class Chain(nn.Module):
    """Convolution and ReLU in place: kept are the input (as a copy of none) and one activation."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=in_place)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.relu(self.conv(image)))


@pytest.mark.parametrize("in_place", [True, False])
def test_a_storage_that_two_operations_keep_is_counted_once(in_place):
    footprint = count_footprint(lambda: Chain(in_place), 1, (10, 6))
    # The ReLU keeps its output, which is the head's input; the first convolution keeps the image.
    assert footprint.saved_bytes == 10 * 6 * 4 + 4 * 10 * 6 * 4
    assert footprint.parameter_bytes == 4 * (4 * 9 + 4 + 2 * 4 + 2)
    assert footprint.logit_bytes == 2 * 10 * 6 * 4


def test_memory_grows_linearly_with_the_batch_and_half_precision_needs_less():
    build = plain_unet([[1, 1], [2, 2]], [8, 16])
    footprint = count_footprint(build, 1, (24, 40))
    one, two, three = (footprint.training_bytes(batch) for batch in (1, 2, 3))
    assert three - two == two - one > 0
    assert count_footprint(build, 1, (24, 40), half_precision=True).training_bytes(3) < three


def test_the_moments_of_the_optimizer_count():
    build = plain_unet([[1, 1], [2, 2]], [8, 16])
    sgd, adam = (count_footprint(build, 1, (24, 40), n_moments=n) for n in (1, 2))
    assert adam.training_bytes(2) - sgd.training_bytes(2) == sgd.parameter_bytes


@pytest.mark.parametrize(
    ("name", "low", "high"), [("umamba_enc_noscan", 0.49, 0.52), ("umamba_enc", 0.6, 0.9)]
)
def test_half_precision_halves_the_convolutions_but_not_the_scans(name, low, high):
    arguments = {"strides": [[1] * 3, [2] * 3], "features_per_stage": [16, 32]}

    def build() -> nn.Module:
        return create_network(name, 1, 2, patch_size=(16, 24, 16), **arguments)

    full, half = (
        count_footprint(build, 1, (16, 24, 16), half_precision) for half_precision in (False, True)
    )
    assert low < half.saved_bytes / full.saved_bytes < high
    assert half.parameter_bytes == full.parameter_bytes


def test_counting_allocates_no_activations():
    # 512^3 with 32 features would take 17 GB for a single activation.
    footprint = count_footprint(plain_unet([[1] * 3, [2] * 3], [32, 64]), 1, (512, 512, 512))
    assert footprint.saved_bytes > 100e9


THREE = ("raster", "raster_reversed", "inter_slice_4")
NARROW = {"features_per_stage": [8, 16, 16, 16, 16]}
STAGES = {"strides": [[1] * 3, [1, 2, 2], [2, 2, 2]], "features_per_stage": [8, 16, 24]}
UNALIKE = {
    "lightm_unet": {"features_per_stage": [8, 16, 16, 16]},
    "mamba_clinix": STAGES,
    "umamba_bot": STAGES,
    "umamba_bot_v1": STAGES,
    "umamba_enc": STAGES,
    "umamba_enc_v1": STAGES,
    "uvm_net": {"inner_size": [8, 6], "input_residual": False},
}


class ScanResults(TorchDispatchMode):
    """Remembers what the scans return: where mixers are recomputed, it is kept without a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[torch.UntypedStorage] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.umamba.selective_scan_fwd.default:
            self.kept += [tensor.untyped_storage() for tensor in output]
        return output


def kept_bytes(network: nn.Module, image: torch.Tensor, recomputes: bool = False) -> tuple:
    """What a forward pass keeps for backward besides the parameters, and its outputs."""
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with ScanResults() as scans:  # noqa: SIM117  the hooks are inside
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            outputs = network(image)
    if recomputes:
        kept |= {storage.data_ptr(): storage for storage in scans.kept}
    return sum(s.nbytes() for at, s in kept.items() if at not in parameters), outputs


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", list_networks(controls=False))
def test_saved_bytes_of_recomputed_mixers_are_what_is_kept(name):
    arguments = NARROW | UNALIKE.get(name, {})
    patch = [16, 32, 32] if 3 in get_entry(name).spatial_dims else [64, 64]
    if "patch_size" in get_entry(name).keywords:
        arguments["patch_size"] = patch

    def build(recomputes: bool = True) -> nn.Module:
        network = create_network(name, 1, 3, deep_supervision=True, **arguments)
        recompute_mixers(network, recomputes)
        return network

    footprint = count_footprint(build, 1, patch)
    kept, _ = kept_bytes(build(), torch.randn(1, 1, *patch), recomputes=True)
    assert footprint.saved_bytes == pytest.approx(kept, rel=0.01)
    plain = count_footprint(lambda: build(False), 1, patch)
    assert footprint.saved_bytes < plain.saved_bytes
    assert footprint.training_bytes(1) < plain.training_bytes(1)
    assert plain.peak_saved_bytes == plain.saved_bytes


LAYERS = {
    "Mamba": (lambda: MixerLayer(32, spatial_dims=3), 32, (8, 8, 8)),
    "tri-orientated": (lambda: MixerLayer(32, spatial_dims=3, orders=THREE), 32, (8, 8, 8)),
    "SS2D": (lambda: VSSBlock(32, lambda: SS2D(32)), 16, (16, 32)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_recomputed_layer_keeps_at_most_half(kind):
    build, *image = LAYERS[kind]

    def recomputed() -> nn.Module:
        layer = build()
        recompute_mixers(layer)
        return layer

    plain, less = count_footprint(build, *image), count_footprint(recomputed, *image)
    assert less.saved_bytes <= plain.saved_bytes / 2
    # The only layer there is is whole again in backward.
    assert less.peak_saved_bytes == pytest.approx(plain.saved_bytes, rel=0.1)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("times", [1, 2], ids=["small", "large"])
@pytest.mark.parametrize("name", list_networks(controls=False))
def test_saved_bytes_are_what_autograd_keeps(name, times):
    arguments = NARROW | UNALIKE.get(name, {})
    patch = [16, 32, 32 * times] if 3 in get_entry(name).spatial_dims else [64, 64 * times]
    if "patch_size" in get_entry(name).keywords:
        arguments["patch_size"] = patch

    def build() -> nn.Module:
        return create_network(name, 1, 3, deep_supervision=True, **arguments)

    network, image = build(), torch.randn(1, 1, *patch)
    saved, outputs = kept_bytes(network, image)
    assert len(outputs) == len(network.deep_supervision_scales)
    assert count_footprint(build, 1, patch).saved_bytes == pytest.approx(saved, rel=0.1)
