"""Names, controls and errors of the registry."""

from __future__ import annotations

import pytest
import torch

from umamba.networks import create_network, get_entry, list_networks, recognize_network, register
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
