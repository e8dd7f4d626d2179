"""Names, controls and errors of the registry."""

from __future__ import annotations

import inspect

import pytest
import torch

from umamba.networks import (
    create_module,
    create_network,
    get_entry,
    get_module,
    list_modules,
    list_networks,
    recognize_network,
    register,
    register_module,
)
from umamba.networks.umamba import UMambaBot, UMambaEnc

NETWORKS = ("umamba_bot", "umamba_bot_v1", "umamba_enc", "umamba_enc_v1")
PLAN = {"strides": [[1, 1], [2, 2]], "features_per_stage": [4, 8]}


def test_the_networks_and_their_controls_are_listed() -> None:
    assert set(NETWORKS) <= set(list_networks(controls=False))
    controls = {name + suffix for name in NETWORKS for suffix in ("_noscan", "_convmix")}
    assert controls <= set(list_networks())
    assert not controls & set(list_networks(controls=False))
    assert set(NETWORKS) <= set(list_networks(2)) & set(list_networks(3))


def test_dashes_and_underscores_are_the_same() -> None:
    assert get_entry("UMamba-Bot-v1") is get_entry("umamba_bot_v1")


def test_an_unknown_name_is_answered_with_the_nearest_ones() -> None:
    with pytest.raises(ValueError, match=r"did you mean.*umamba_bot"):
        get_entry("umamba_bott")
    with pytest.raises(ValueError, match=r"registered are .*umamba_enc"):
        get_entry("zzzz")


def test_a_control_implies_its_mixer() -> None:
    entry = get_entry("umamba_bot_noscan")
    assert entry.cls is UMambaBot
    assert entry.control_of == "umamba_bot"
    assert dict(entry.arguments) == {"mixer": "none"}
    assert not any(
        "bottleneck" in key for key in create_network(entry.name, 1, 2, **PLAN).state_dict()
    )
    assert dict(get_entry("umamba_enc_convmix").arguments) == {"mixer": "conv"}
    assert get_entry("umamba_enc").class_path == "umamba.networks.umamba.UMambaEnc"
    assert "patch_size" in get_entry("umamba_enc").keywords


def test_an_unknown_mixer_is_refused() -> None:
    with pytest.raises(ValueError, match="'scan', 'none', 'conv'"):
        create_network("umamba_bot", 1, 2, **PLAN, mixer="attention")


def test_a_name_is_registered_once() -> None:
    with pytest.raises(AssertionError, match="twice"):
        register("umamba_enc", paper="", reference="", licence="")(UMambaEnc)


@pytest.mark.parametrize("name", NETWORKS)
def test_state_dicts_are_recognized_by_own_and_official_keys(name: str) -> None:
    patch = {"patch_size": [64, 64]} if name == "umamba_enc" else {}
    plan = {"strides": [[1, 1], [2, 2], [2, 2]], "features_per_stage": [4, 8, 16]}
    with torch.device("meta"):
        own = create_network(name, 1, 2, **plan, **patch).state_dict()
    official = get_entry(name).cls.official_key_map().to_official(own)
    assert recognize_network(own) == [name]
    assert recognize_network(official) == [name]
    assert recognize_network([*own, "something.else"]) == []


@pytest.mark.parametrize("name", list_modules())
def test_modules_are_built_but_are_no_networks(name: str) -> None:
    entry = get_module(name)
    assert entry.paper
    assert entry.licence
    assert "@" in entry.reference
    given = {"input_channels": 1, "num_classes": 2}
    keys = inspect.signature(entry.cls).parameters
    with torch.device("meta"):
        module = create_module(name, **{k: v for k, v in given.items() if k in keys})
    assert isinstance(module, entry.cls)
    assert name not in list_networks()
    with pytest.raises(ValueError, match=f"{name} is a module without plans"):
        get_entry(name.replace("_", "-"))
    with pytest.raises(TypeError, match="n_stages"):
        create_module(name, **{k: v for k, v in given.items() if k in keys}, n_stages=3)


def test_the_modules_are_those_of_the_papers() -> None:
    others = {"nnmamba_classifier", "nnmamba_landmark", "swin_unet", "unet_small"}
    sizes = {f"vmamba_{size}" for size in ("tiny", "small", "base", "tiny_0230s", "small_0229s")}
    assert others | sizes <= set(list_modules())
    depths = [len(stage) for stage in create_module("vmamba_tiny_0230s").stages]
    assert depths == [2, 2, 8, 2]
    with pytest.raises(ValueError, match="did you mean swin_unet"):
        get_module("swinunet")
    with pytest.raises(AssertionError, match="twice"):
        register_module("umamba_enc", paper="", reference="", licence="")(UMambaEnc)
