"""The sizes that a plan could take: narrower, smaller, and those that a machine can hold."""

import copy

import pytest

from umamba.planning import sizes as sizes_file
from umamba.planning.footprint import GIB
from umamba.planning.planner import plan_dataset
from umamba.planning.sizes import candidates, fitting_sizes, sizes_of


def test_sizes_shrink_in_width_and_patch_and_stay_divisible():
    found = candidates((32, 64, 128, 256), (40, 56, 40), 9, [(1,) * 3, *[(2,) * 3] * 3])
    assert {c.batch_size for c in found} == {2}
    assert max(c.cost for c in found) <= 2 / 9 + 1e-9
    widths = {c.features_per_stage for c in found}
    assert widths == {(32, 64, 128, 256), (16, 32, 64, 128), (8, 16, 32, 64)}
    assert len({c.patch_size for c in found}) > 1
    assert all(s % 8 == 0 for c in found for s in c.patch_size)


def test_a_plan_with_pretrained_weights_keeps_its_widths():
    arguments = {"features_per_stage": [24, 96, 192], "strides": [[1, 1], [4, 4], [2, 2]]}
    arguments |= {"depths": [1, 1], "depths_decoder": [1, 1]}
    part = {
        "architecture": {
            "network_class_name": "umamba.networks.vm_unet.VMUNet",
            "arch_kwargs": arguments,
            "_kw_requires_import": [],
        },
        "planning": {"input_channels": 1, "num_classes": 2},
        "patch_size": [128, 96],
        "batch_size": 4,
    }
    assert len({c.features_per_stage for c in sizes_of(part)}) == 3
    found = sizes_of({**part, "recipe": {"pretrained": "vssm_tiny"}})
    assert {c.features_per_stage for c in found} == {(24, 96, 192)}
    assert len(found) > 1


def test_a_2d_batch_holds_as_many_pixels_whatever_the_patch():
    small = candidates((32, 64), (64, 48), 300, [(1, 1), (2, 2)])
    large = candidates((32, 64), (512, 512), 12, [(1, 1), (2, 2)])
    assert small[-1].batch_size == 2**17 // (64 * 48)
    assert large[-1].batch_size == 2


def test_the_map_in_front_of_the_head_of_a_network_on_patches_stays_wide():
    strides = [(1, 1), (4, 4), (2, 2)]
    found = candidates((24, 96, 192), (64, 64), 8, strides)
    assert {c.features_per_stage for c in found} == {(24, 96, 192), (24, 48, 96), (24, 32, 48)}
    costs = {c.features_per_stage: c.cost for c in found if c.patch_size == (64, 64)}
    assert costs[(24, 32, 48)] < costs[(24, 48, 96)] < costs[(24, 96, 192)]


def test_widths_that_are_kept_leave_only_smaller_patches(fingerprinted):
    plans = plan_dataset(fingerprinted("anisotropic_mr"), network="plainconv_unet")
    part = plans["configurations"]["2d"]
    widths = part["architecture"]["arch_kwargs"]["features_per_stage"]
    found = sizes_of(part, keeps_widths=True)
    assert {size.features_per_stage for size in found} == {tuple(widths)}
    assert len(found) > 1


def test_sizes_that_a_machine_cannot_hold_are_not_tried(fingerprinted, monkeypatch):
    monkeypatch.setattr(sizes_file, "machine_memory", lambda: (500 * GIB, "much"))
    plans = plan_dataset(fingerprinted("isotropic_ct"), network="plainconv_unet")
    part = plans["configurations"]["3d_fullres"]
    sizes, before = sizes_of(part), copy.deepcopy(part)
    assert fitting_sizes(sizes, part, 1000 * GIB, "cpu") == sizes
    assert fitting_sizes(sizes, part, None, "cpu") == sizes
    found = fitting_sizes(sizes, part, 3 * GIB, "cpu")
    monkeypatch.setattr(sizes_file, "machine_memory", lambda: (3 * GIB, "little"))
    assert fitting_sizes(sizes, part, 1000 * GIB, "cpu") == found
    assert 0 < len(found) < len(sizes)
    assert max(size.cost for size in found) < max(size.cost for size in sizes)
    with pytest.raises(ValueError, match="not even the smallest"):
        fitting_sizes(sizes, part, 10_000_000, "cpu")
    assert part == before
