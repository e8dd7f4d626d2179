"""VMamba's encoders: the published sizes, both spellings of the names, odd images."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from umamba.blocks.mixer import count_parameters
from umamba.networks.state_dict import KeyMap, Row
from umamba.networks.vmamba import (
    SIZES,
    VMambaClassifier,
    VMambaEncoder,
    drop_path_rates,
    encoder_rows,
)

SMALL: dict[str, Any] = {"features_per_stage": (4, 8, 12), "depths": (1, 2, 1), "d_state": 2}
LATER: dict[str, Any] = {
    **SMALL,
    "forward_type": "v05_noz",
    "mlp_ratio": 2,
    "patch_embed": "v2",
    "downsample": "v3",
}


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vssm_tiny", 22_893_448),
        ("vssm_small", 44_417_416),
        ("vssm_base", 76_254_056),
        ("vssm1_tiny_0230", 30_705_832),
        ("vssm1_small_0229", 50_147_752),
        ("vssm1_base_0229", 88_557_800),
        ("vssm1_tiny_0230s", 30_249_064),
        ("vssm1_small_0229s", 49_012_840),
        ("vssm1_base_0229s", 86_614_504),
    ],
)
def test_the_published_sizes_have_the_official_numbers_of_parameters(name: str, count: int) -> None:
    with torch.device("meta"):
        assert count_parameters(VMambaClassifier(VMambaEncoder(**SIZES[name]))) == count


@pytest.mark.parametrize("name", SIZES)
def test_the_published_sizes_return_the_outputs_of_their_stages(name: str) -> None:
    arguments = {**SIZES[name], "depths": (1, 1, 1, 1)}
    with torch.device("meta"):
        maps = VMambaEncoder(1, **arguments)(torch.empty(1, 1, 64, 96))
    sizes = ((16, 24), (8, 12), (4, 6), (2, 3))
    widths = arguments["features_per_stage"]
    expected = [(1, *size, width) for size, width in zip(sizes, widths, strict=True)]
    assert [tuple(x.shape) for x in maps] == expected


@pytest.mark.parametrize("downsample", ["v1", "v2", "v3"])
@pytest.mark.parametrize("patch_embed", ["v1", "v2"])
def test_all_embeddings_and_downsamplings_go_together(patch_embed: str, downsample: str) -> None:
    arguments = {**LATER, "patch_embed": patch_embed, "downsample": downsample}
    maps = VMambaEncoder(2, **arguments)(torch.randn(1, 2, 32, 48))
    assert [tuple(x.shape) for x in maps] == [(1, 8, 12, 4), (1, 4, 6, 8), (1, 2, 3, 12)]


def test_unknown_variants_are_refused() -> None:
    for arguments in ({"patch_embed": "v3"}, {"downsample": "v4"}, {"patch": 2}):
        with pytest.raises(ValueError, match=r"choose one of|v1 takes any"):
            VMambaEncoder(**{**LATER, **arguments})
    with pytest.raises(ValueError, match="depths has 2 entries"):
        VMambaEncoder(**{**SMALL, "depths": (1, 1)})
    with pytest.raises(ValueError, match="norm_layer is 'bn'"):
        VMambaEncoder.official_arguments({"norm_layer": "bn"})


def test_a_single_official_width_doubles_per_stage() -> None:
    own = VMambaEncoder.official_arguments({"dims": 8, "depths": [1, 1, 1], "ssm_dt_rank": "auto"})
    assert own == {"features_per_stage": [8, 16, 32], "depths": [1, 1, 1], "dt_rank": None}


def test_a_file_in_the_old_spelling_gives_the_same_network() -> None:
    classifier = VMambaClassifier(VMambaEncoder(**SMALL), 5)
    head = [Row("norm.{p}", "norm.{p}"), Row("head.{p}", "head.{p}")]
    older = KeyMap([*encoder_rows("", "encoder.", old=True), *head]).to_official(
        classifier.state_dict()
    )
    assert {
        *("patch_embed.proj.weight", "patch_embed.norm.bias", "layers.1.blocks.1.ln_1.weight"),
        *("layers.0.blocks.0.self_attention.A_logs", "layers.0.downsample.norm.weight"),
        *("norm.weight", "head.bias"),
    } <= older.keys()
    assert not any("classifier" in key or ".op." in key for key in older)
    check_import(classifier, older)


def test_linear_weights_may_come_as_pointwise_convolutions() -> None:
    classifier = VMambaClassifier(VMambaEncoder(**LATER), 5)
    official = {
        key: value[..., None, None] if re.search(r"(_proj|mlp\.fc.)\.weight$", key) else value
        for key, value in classifier.official_key_map().to_official(classifier.state_dict()).items()
    }
    assert official["layers.0.blocks.0.mlp.fc1.weight"].ndim == 4
    assert official["layers.0.blocks.0.op.in_proj.weight"].ndim == 4
    check_import(classifier, official)


def check_import(classifier: VMambaClassifier, official: dict[str, torch.Tensor]) -> None:
    own = classifier.state_dict()
    shapes = {key: tuple(value.shape) for key, value in own.items()}
    loaded, _ = classifier.official_key_map().to_own(official, shapes)
    assert all(torch.equal(loaded[key], own[key]) for key in own)


def test_stochastic_depth_rises_over_all_blocks() -> None:
    assert drop_path_rates(0, 0.4, [1, 3, 1]) == [[0], pytest.approx([0.1, 0.2, 0.3]), [0.4]]
    assert drop_path_rates(0.4, 0, [2, 1]) == [pytest.approx([0.4, 0.2]), [0]]
    encoder = VMambaEncoder(**SMALL, drop_path_rate=0.3)
    rates = [block.drop_path.rate for stage in encoder.stages for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
