"""Key maps: both directions, duplicates, adapted tensors, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from umamba.networks.state_dict import KeyMap, Row, unwrap

KEY_MAP = KeyMap(
    [
        Row("body.0.{p}", "stem.{p}"),
        Row("body.{i}.{p}", "stages.{i}.{p}"),
        Row("head.{rest...}", "decoder.{rest...}", torch.Tensor.t, torch.Tensor.t),
    ],
    aliases=[("copy.{rest...}", "body.{rest...}"), ("{a...}.also.{p}", "{a...}.{p}")],
)


def official() -> dict[str, torch.Tensor]:
    body = {"body.0.weight": torch.arange(3.0), "body.1.weight": torch.arange(4.0)}
    return {
        **body,
        "head.a.b.weight": torch.arange(6.0).reshape(2, 3),
        "copy.1.weight": body["body.1.weight"].clone(),
        "copy.1.also.weight": body["body.1.weight"].clone(),
    }


SHAPES = {"stem.weight": (3,), "stages.1.weight": (4,), "decoder.a.b.weight": (3, 2)}


def test_the_first_fitting_row_decides_and_the_report_accounts_for_all() -> None:
    own, report = KEY_MAP.to_own(official(), SHAPES)
    assert list(own) == list(SHAPES)
    assert torch.equal(own["decoder.a.b.weight"], torch.arange(6.0).reshape(2, 3).t())
    assert (report.matched, report.adapted) == (
        ["stem.weight", "stages.1.weight"],
        ["decoder.a.b.weight"],
    )
    assert (report.missing, report.unused) == ([], [])
    assert report.aliases == ["copy.1.weight", "copy.1.also.weight"]
    assert str(report).startswith("2 tensors matched, 1 adapted")


def test_the_reverse_direction_gives_the_official_tensors_back() -> None:
    own, _ = KEY_MAP.to_own(official(), SHAPES)
    back = KEY_MAP.to_official(own)
    assert set(back) == {"body.0.weight", "body.1.weight", "head.a.b.weight"}
    assert all(torch.equal(back[key], official()[key]) for key in back)


def test_ignored_tensors_are_left_out_and_reported() -> None:
    key_map = KeyMap([Row("body.{p}", "stem.{p}")], ignored=["table", "body.{p}.unread"])
    given = {"body.a": torch.zeros(1), "table": torch.zeros(2), "body.a.unread": torch.zeros(3)}
    assert key_map.covers(given)
    own, report = key_map.to_own(given, {"stem.a": (1,)})
    assert list(own) == ["stem.a"]
    assert report.ignored == ["table", "body.a.unread"]
    assert "2 others left out" in str(report)
    assert not key_map.covers([*given, "table.0"])
    with pytest.raises(ValueError, match=r"1 unused, e\.g\. table\.0"):
        key_map.to_own({**given, "table.0": torch.zeros(1)}, {"stem.a": (1,)})


def test_a_duplicate_that_differs_is_refused() -> None:
    altered = official()
    altered["copy.1.also.weight"] += 1
    with pytest.raises(ValueError, match=r"copy\.1\.also\.weight differs from body\.1\.weight"):
        KEY_MAP.to_own(altered, SHAPES)


def test_an_alias_pattern_may_fit_the_original_too() -> None:
    key_map = KeyMap([Row("{a}.0.{p}", "{a}.{p}")], aliases=[("{a}.{i}.{p}", "{a}.0.{p}")])
    tensors = {"x.0.weight": torch.ones(2), "x.1.weight": torch.ones(2)}
    own, report = key_map.to_own(tensors, {"x.weight": (2,)})
    assert torch.equal(own["x.weight"], torch.ones(2))
    assert report.aliases == ["x.1.weight"]


def test_a_duplicate_stands_in_for_its_absent_original() -> None:
    partial = official()
    del partial["body.1.weight"]
    own, _ = KEY_MAP.to_own(partial, SHAPES)
    assert torch.equal(own["stages.1.weight"], torch.arange(4.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"body.0.weight": None}, r"1 tensors missing, 0 unused, e\.g\. stem\.weight"),
        ({"body.2.weight": torch.zeros(1)}, r"0 tensors missing, 1 unused, e\.g\. body\.2"),
        ({"strange": torch.zeros(1)}, "strange"),
        ({"body.0.weight": torch.zeros(5)}, r"shape \(5,\) where the network has \(3,\)"),
    ],
)
def test_whatever_is_not_accounted_for_is_refused(change: dict, message: str) -> None:
    tensors = {k: v for k, v in {**official(), **change}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        KEY_MAP.to_own(tensors, SHAPES)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"network_weights": state, "epoch": 3},
        lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {"model": {f"_orig_mod.module.{k}": v for k, v in state.items()}},
        lambda state: {"module": state},
        lambda state: {"state_dict": {f"_model.{k}": v for k, v in state.items()}, "epoch": 3},
        lambda state: {"state_dict": {f"net.{k}": v for k, v in state.items()}},
    ],
    ids=[
        "bare",
        "network_weights",
        "state_dict, module.",
        "model, _orig_mod.",
        "module",
        "_model.",
        "net.",
    ],
)
def test_wrapped_state_dicts_are_unwrapped(wrap) -> None:
    state = {"a.weight": torch.zeros(1), "b.weight": torch.zeros(1)}
    assert unwrap(wrap(state)).keys() == state.keys()


def test_counters_of_a_profiler_are_left_out() -> None:
    state = {"vmunet.a.weight": torch.zeros(1)}
    counters = {"total_ops": torch.zeros(1), "vmunet.a.total_params": torch.zeros(1)}
    assert unwrap({"model_state_dict": state | counters}).keys() == state.keys()


def test_a_checkpoint_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="no network weights"):
        unwrap({"epoch": 1})
