"""ImageNet weights: what each network takes of a VMamba file, and where the tensors arrive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from umamba.networks import create_network, get_entry, list_networks
from umamba.networks.pretrained import (
    CATALOGUE,
    choose_file,
    find_file,
    initialize_encoder,
    pretrained_folder,
)
from umamba.networks.vmamba import SIZES, VMambaClassifier, VMambaEncoder

WIDTHS = (8, 12, 16, 20)
START = 77.0  # of parameters that nothing is copied to
OLD_NAMES = {
    ".op.": ".self_attention.",
    "blocks.0.norm.": "blocks.0.ln_1.",
    "blocks.1.norm.": "blocks.1.ln_1.",
    "blocks.2.norm.": "blocks.2.ln_1.",
    "patch_embed.0.": "patch_embed.proj.",
    "patch_embed.2.": "patch_embed.norm.",
    "classifier.": "",
}


@pytest.mark.parametrize(
    ("name", "size", "n_channels", "taken", "adapted", "left", "unused"),
    [
        ("swin_umamba", "vssm_tiny", 1, 205, 0, 52, 7),
        ("swin_umamba_d", "vssm_tiny", 3, 208, 0, 104, 4),
        ("swin_umamba_d", "vssm_tiny", 1, 204, 0, 108, 8),
        ("vm_unet", "vssm_tiny", 1, 208, 0, 14, 95),
        ("vm_unet", "vssm_small", 3, 208, 0, 14, 329),
        ("mamba_unet", "vssm_tiny", 1, 197, 0, 21, 93),
        ("msvm_unet", "vssm1_tiny_0230s", 4, 271, 1, 178, 4),
    ],
)
def test_published_sizes_are_taken_as_the_official_loaders_take_them(
    name: str,
    size: str,
    n_channels: int,
    taken: int,
    adapted: int,
    left: int,
    unused: int,
    tmp_path: Path,
) -> None:
    with torch.device("meta"):
        weights = official(VMambaClassifier(VMambaEncoder(3, **SIZES[size])))
        network = create_network(name, n_channels, 5)
    # One number per tensor is saved: the file stays small.
    torch.save({"model": {k: torch.zeros(()).expand(v.shape) for k, v in weights.items()}}, f := (
        tmp_path / "weights.pth"
    ))  # fmt: skip
    report = initialize_encoder(network, f)
    assert sum(value.numel() for value in weights.values()) == CATALOGUE[size].parameters
    counts = [len(keys) for keys in (report.taken, report.adapted, report.left, report.unused)]
    assert counts == [taken, adapted, left, unused]
    assert len(network.state_dict()) == taken + adapted + left
    assert f"{taken} tensors taken, {adapted} adapted, {left} of" in str(report)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "module.", "bare"])
@pytest.mark.parametrize("names", ["old", "new"])
def test_values_arrive_under_both_spellings_and_all_wrappers(
    names: str, wrapper: str, tmp_path: Path
) -> None:
    encoder, weights = synthetic_file(tmp_path / "a.pth", names=names, wrapper=wrapper)
    network = tiny("swin_umamba_d", 3)
    report = initialize_encoder(network, tmp_path / "a.pth")
    own = network.state_dict()
    for key, value in encoder.state_dict().items():
        assert torch.equal(own[f"encoder.{key}"], value), key
    assert all(key.startswith("decoder.") for key in report.left)
    assert all(own[key].eq(START).all() for key in report.left)
    assert len(report.unused) == 4
    assert set(report.unused) <= weights.keys()


def test_swin_umamba_keeps_its_stem_and_the_embedding_but_for_one_bias(tmp_path: Path) -> None:
    encoder, _ = synthetic_file(tmp_path / "a.pth")
    network = tiny("swin_umamba", 1)
    initialize_encoder(network, tmp_path / "a.pth")
    own, theirs = network.state_dict(), encoder.state_dict()
    assert torch.equal(own["encoder.patch_embed.norm.bias"], theirs["patch_embed.norm.bias"])
    for key in ("patch_embed.norm.weight", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        assert own[f"encoder.{key}"].eq(START).all()
    assert own["stem.conv.weight"].eq(START).all()
    for key in ("stages.3.1.mixer.x_proj_weight", "downsamples.2.reduction.weight"):
        assert torch.equal(own[f"encoder.{key}"], theirs[key])


def test_swin_umamba_d_leaves_the_whole_embedding_out_for_other_channels(tmp_path: Path) -> None:
    synthetic_file(tmp_path / "a.pth")
    network = tiny("swin_umamba_d", 2)
    report = initialize_encoder(network, tmp_path / "a.pth")
    embedding = [key for key in report.left if key.startswith("encoder.")]
    assert len(embedding) == 4
    assert all(key.startswith("encoder.patch_embed.") for key in embedding)


def test_vm_unets_decoder_mirrors_the_encoder_as_far_as_it_has_blocks(tmp_path: Path) -> None:
    encoder, _ = synthetic_file(tmp_path / "a.pth")
    network = tiny("vm_unet", 1, depths=[2, 2, 2, 2], depths_decoder=[2, 2, 2, 1])
    report = initialize_encoder(network, tmp_path / "a.pth")
    own, theirs = network.state_dict(), encoder.state_dict()
    for stage in range(4):
        for block in range(2):
            key = f"{block}.mixer.A_log"
            value = theirs[f"stages.{stage}.{key}"]
            assert torch.equal(own[f"encoder.stages.{stage}.{key}"], value)
            if (mirrored := f"decoder.stages.{3 - stage}.{key}") in own:
                assert torch.equal(own[mirrored], value)
    assert "decoder.stages.3.1.norm.weight" not in own
    # The third block of stage 2, norm and head.
    assert {key.split(".blocks.")[0] for key in report.unused} == {
        "layers.2", "norm.weight", "norm.bias", "head.weight", "head.bias",
    }  # fmt: skip


def test_a_stem_for_other_channels_answers_gray_images_as_the_rgb_stem_does(
    tmp_path: Path,
) -> None:
    encoder, _ = synthetic_file(tmp_path / "a.pth")
    network = tiny("vm_unet", 5)
    report = initialize_encoder(network, tmp_path / "a.pth")
    assert report.adapted == ["encoder.patch_embed.proj.weight"]
    gray = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        wide = network.encoder.patch_embed.proj(gray.expand(-1, 5, -1, -1))
        torch.testing.assert_close(wide, encoder.patch_embed.proj(gray.expand(-1, 3, -1, -1)))


def test_files_of_another_size_or_kind_are_refused(tmp_path: Path) -> None:
    network = tiny("swin_umamba_d", 3)
    synthetic_file(tmp_path / "wide.pth", features_per_stage=(8, 12, 16, 24))
    with pytest.raises(
        ValueError, match=r"wide\.pth: layers\.\S+ has the shape .* of another size"
    ):
        initialize_encoder(network, tmp_path / "wide.pth")
    torch.save({"model": {"conv1.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth holds nothing of a VMamba encoder"):
        initialize_encoder(network, tmp_path / "other.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match=r"empty\.pth: the checkpoint holds no network weights"):
        initialize_encoder(network, tmp_path / "empty.pth")
    torch.save({"model": network}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"^\S+code\.pth is damaged or holds objects"):
        initialize_encoder(network, tmp_path / "code.pth")
    assert all(value.eq(START).all() for value in network.state_dict().values())


def test_every_declared_file_is_in_the_catalogue_and_the_other_way_round() -> None:
    declared = [f for name in list_networks() for f in get_entry(name).cls.pretrained_files]
    assert set(declared) == set(CATALOGUE)
    assert CATALOGUE["vssm_tiny"].networks[-1] == "vm_unet"
    for name, entry in CATALOGUE.items():
        assert name in SIZES
        assert entry.address.endswith(entry.file)


def test_a_wish_becomes_a_name_or_a_path_and_others_are_refused(tmp_path: Path) -> None:
    assert choose_file(get_entry("vm_unet")) == "vssm_small"
    assert choose_file(get_entry("vm_unet"), "vssm_tiny") == "vssm_tiny"
    path = str(tmp_path / "w.pth")
    assert choose_file(get_entry("vm_unet_noscan"), path) == path
    with pytest.raises(ValueError, match="vm_unet does not start from vssm1_tiny_0230s but from"):
        choose_file(get_entry("vm_unet"), "vssm1_tiny_0230s")
    with pytest.raises(ValueError, match="no ImageNet weights are published for segmamba"):
        choose_file(get_entry("segmamba"))


def test_a_missing_file_is_named_with_its_place_and_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UMAMBA_PRETRAINED", raising=False)
    assert pretrained_folder() == Path.home() / ".cache" / "umamba" / "pretrained"
    monkeypatch.setenv("UMAMBA_PRETRAINED", str(tmp_path))
    entry = CATALOGUE["vssm_tiny"]
    with pytest.raises(FileNotFoundError) as error:
        find_file("vssm_tiny")
    for word in (str(tmp_path), entry.file, entry.address, "models fetch vssm_tiny"):
        assert word in str(error.value)
    with pytest.raises(FileNotFoundError, match="no pretrained weights absent"):
        find_file("absent")
    (tmp_path / entry.also[0]).touch()
    assert find_file("vssm_tiny").name == entry.also[0]
    assert find_file(str(tmp_path / entry.also[0])) == tmp_path / entry.also[0]
    monkeypatch.setenv("UMAMBA_PRETRAINED", str(tmp_path / entry.also[0]))
    with pytest.raises(ValueError, match="is a file: set UMAMBA_PRETRAINED to a folder"):
        find_file("vssm_tiny")


def official(classifier: VMambaClassifier) -> dict[str, Tensor]:
    return classifier.official_key_map().to_official(classifier.state_dict())


def synthetic_file(
    file: Path, *, names: str = "old", wrapper: str = "model", **arguments: Any
) -> tuple[VMambaEncoder, dict[str, Tensor]]:
    """Writes a vssm_tiny of small widths and three blocks in stage 2; every tensor is random."""
    shape = {"features_per_stage": WIDTHS, "depths": (2, 2, 3, 2), **arguments}
    encoder = VMambaEncoder(3, **shape)
    classifier = VMambaClassifier(encoder, num_classes=5)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.normal_()
    weights = official(classifier)
    if names == "old":
        for new, old in OLD_NAMES.items():
            weights = {key.replace(new, old): value for key, value in weights.items()}
    if wrapper == "module.":
        torch.save({f"module.{key}": value for key, value in weights.items()}, file)
    else:
        torch.save(weights if wrapper == "bare" else {wrapper: weights, "epoch": 1}, file)
    return encoder, weights


def tiny(name: str, n_channels: int, **arguments: Any) -> Any:
    """A network of the synthetic file's widths, with all parameters at START."""
    own = {"features_per_stage": (8, *WIDTHS), "depths": (2, 2, 3, 2), **arguments}
    network = create_network(name, n_channels, 2, **own)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(START)
    return network
