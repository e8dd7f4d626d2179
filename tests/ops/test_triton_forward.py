"""The Triton forward of the scan along walks, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are decorated
pytest.importorskip("triton")

from umamba.ops import reference, triton_forward, triton_scan

pytestmark = pytest.mark.triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
L = 70  # maps of 7 x 10 or 2 x 5 x 7 tokens: two whole chunks and a tail
RASTER = (0, 1, 0, 1, 0, L, 1)
REVERSED = (L - 1, 1, 0, 1, 0, L, -1)
COLUMNS = (0, 1, 0, 10, 1, 7, 10)
COLUMNS_REVERSED = (L - 1, 1, 0, 10, -1, 7, -10)
SHORT = ((0, 1, 0, 4, 1, 3, 4), (11, 1, 0, 1, 0, 12, -1))  # of 3 x 4 tokens
TRANSPOSED = (0, 7, 1, 5, 7, 2, 35)  # the last axis slowest, the first fastest
WALKS = {
    "raster": (RASTER,),
    "raster and transposed": (RASTER, TRANSPOSED),
    "tri-orientated": (RASTER, REVERSED, COLUMNS),
    "cross": (RASTER, COLUMNS, REVERSED, COLUMNS_REVERSED),
}
ALL = ("D", "z", "delta_bias", "delta_softplus", "initial_state")


def tokens_of(walk: tuple[int, ...]) -> list[int]:
    start, n0, s0, n1, s1, n2, s2 = walk
    steps = itertools.product(range(n0), range(n1), range(n2))
    return [start + i * s0 + j * s1 + k * s2 for i, j, k in steps]


def make(
    walks: tuple[tuple[int, ...], ...], E: int = 5, N: int = 4, G: int = 1, batch: int = 1,
    options: tuple[str, ...] = ALL, shared: bool = True, dtype: torch.dtype = torch.float32,
) -> dict[str, object]:  # fmt: skip
    """Random arguments of forward, whose rows lie token by token."""
    K = len(walks)
    length = len(tokens_of(walks[0]))
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def rows(k: int, *inner: int) -> Tensor:
        return normal(batch, k, length, *inner).to(dtype).to(DEVICE).movedim(2, -1)

    optional = {
        "D": normal(K, E).to(DEVICE),
        "z": rows(1 if shared else K, E),
        "delta_bias": (normal(K, E) - 1).to(DEVICE),
        "initial_state": normal(batch, K, E, N).to(DEVICE),
    }
    softplus = "delta_softplus" in options
    return {
        "u": rows(1 if shared else K, E),
        "delta": rows(K, E) if softplus else rows(K, E).abs() * 0.3,
        "A": -torch.exp(0.5 * normal(K, E, N)).to(DEVICE),
        "B": rows(K, G, N),
        "C": rows(K, G, N),
        **{name: x if name in options else None for name, x in optional.items()},
        "delta_softplus": softplus,
        "walks": sum(walks, ()),
    }


def run(
    inputs: dict[str, object], *, merged: bool = False, window: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    return triton_scan.forward(
        **inputs, merged=merged, save_states=not window, window=window  # type: ignore[arg-type]
    )  # fmt: skip


def expected(
    inputs: dict[str, object], *, merged: bool = False, window: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """out, last_state and states by the definition in float64, on tokens gathered walk by walk."""
    wide = {name: x.cpu().double() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    walks = wide.pop("walks")
    outs, lasts, kept = [], [], []
    for k in range(len(walks) // 7):
        tokens = torch.tensor(tokens_of(walks[7 * k : 7 * k + 7]))
        one = {}
        for name, x in wide.items():
            if not isinstance(x, Tensor):
                one[name] = x
            elif name in ("A", "D", "delta_bias"):
                one[name] = x[k]
            else:
                part = x[:, min(k, x.shape[1] - 1)]
                one[name] = part if name == "initial_state" else part[..., tokens]
        if window:
            one.pop("initial_state")
            walked = reference.local_scan(**one, reverse=False, window=window)
        else:
            walked, last, states = reference.forward(**one, reverse=False, save_states=True)
            lasts.append(last)
            kept.append(states.transpose(2, 3).flatten(2))
        out = torch.empty_like(walked)
        out[..., tokens] = walked
        outs.append(out)
    out = torch.stack(outs, 1)
    out = out.sum(1, keepdim=True) if merged else out
    return (out, out, out) if window else (out, torch.stack(lasts, 1), torch.stack(kept))


def assert_close(
    found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float = 5e-6
) -> None:
    for i, (x, y) in enumerate(zip(found, wanted, strict=True)):
        assert x.shape == y.shape
        error = (x.cpu().double() - y).abs().max() / y.abs().max()
        assert error < tolerance, f"result {i}: {error:.1e}"


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """Cuts every walk into so many segments."""
    monkeypatch.setattr(triton_scan, "segments", lambda *_: request.param)
    return request.param


def segments(*counts: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("cut", counts, indirect=True, ids="segments={}".format)


@pytest.mark.parametrize(
    ("walks", "merged", "cut"),
    [
        ("raster", False, 2),
        ("raster", True, 1),
        ("raster and transposed", False, 1),
        ("tri-orientated", True, 1),
        ("tri-orientated", False, 3),
        ("cross", True, 2),
    ],
    indirect=["cut"],
)
def test_the_scan_is_that_of_float64_along_every_walk(nan_empty, cut, walks, merged):
    inputs = make(WALKS[walks], E=3, N=2, shared=merged)
    assert_close(run(inputs, merged=merged), expected(inputs, merged=merged))


@segments(2)
@pytest.mark.parametrize("options", [(), ("D",), ("z",), ("delta_bias", "delta_softplus"),
                                     ("initial_state",)])  # fmt: skip
def test_each_option_may_be_absent(nan_empty, cut, options):
    inputs = make((COLUMNS,), N=2, options=options)
    assert_close(run(inputs), expected(inputs))


@pytest.mark.parametrize(
    ("E", "N", "G"), [(33, 4, 1), (6, 5, 3), (40, 8, 2), (1, 1, 1), (2, 16, 1)], ids=str
)
def test_channels_states_and_groups_may_be_odd_in_number(nan_empty, E, N, G):
    inputs = make(((0, 1, 0, 1, 0, 9, 1),), E=E, N=N, G=G, batch=2)
    assert_close(run(inputs), expected(inputs))


@pytest.mark.parametrize("length", [1, 32, 33])
def test_the_walk_may_end_anywhere_in_a_chunk(nan_empty, length):
    inputs = make(((length - 1, 1, 0, 1, 0, length, -1),), N=2)
    assert_close(run(inputs), expected(inputs))


@pytest.mark.parametrize("merged", [False, True], ids=["separate", "merged"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_rounded_once(nan_empty, dtype, merged):
    inputs = make(SHORT, dtype=dtype)
    out, last, states = run(inputs, merged=merged)
    full, *wanted = expected(inputs, merged=merged)
    assert out.dtype == dtype
    assert_close((last, states), tuple(wanted))
    # Triton's interpreter cuts bfloat16 off where a GPU rounds: a whole step rather than a half.
    step = torch.finfo(dtype).eps * full.abs() + 5e-5
    assert ((out.cpu().double() - full).abs() <= step).all()


def test_inputs_may_have_any_strides(nan_empty):
    inputs = make(SHORT, N=8, batch=2, shared=False)
    wanted = expected(inputs)
    packed = torch.cat([inputs["B"], inputs["C"]], 3).movedim(4, 2)  # (B, K, L, G, 2 N)
    for B, C in (
        (packed[..., :8], packed[..., 8:]),
        (torch.cat([packed[..., :1], packed], -1)[..., 1:9], packed[..., 8:]),
    ):
        inputs |= {"B": B.movedim(2, 4), "C": C.movedim(2, 4)}
        assert_close(run(inputs), wanted)
    for name in ("u", "delta", "z", "B", "C", "initial_state", "A"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
        inputs[name] = inputs[name].flip(0).contiguous().flip(0)
    assert_close(run(inputs), wanted)


def test_offsets_of_64_bits_give_the_same_bits(monkeypatch):
    inputs = make(SHORT)
    narrow = run(inputs, merged=True)
    monkeypatch.setattr(triton_forward, "_index_type", lambda *_: triton_forward.tl.int64)
    assert all(torch.equal(x, y) for x, y in zip(narrow, run(inputs, merged=True), strict=True))


@pytest.mark.parametrize(("window", "cut"), [(4, 1), (8, 2), (16, 1)], indirect=["cut"])
def test_windows_are_those_of_the_locally_bidirectional_scan(nan_empty, cut, window):
    inputs = make((REVERSED,), N=2, options=("D", "z", "delta_bias", "delta_softplus"))
    out = run(inputs, window=window)[0]
    assert_close((out,) * 3, expected(inputs, window=window))


def test_results_lie_in_memory_as_agreed_and_are_the_same_in_every_run():
    inputs = make(SHORT, E=6, N=1, batch=2)
    first, second = run(inputs), run(inputs)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    out, last, states = first
    assert out.permute(1, 0, 3, 2).is_contiguous() and last.transpose(0, 1).is_contiguous()
    assert states.shape == (2, 2, 1, 6) and states.is_contiguous()


def test_without_channels_or_tokens_the_state_is_the_initial_one():
    inputs = make((RASTER,))
    empty = {name: inputs[name][..., :0] for name in ("u", "delta", "z", "B", "C")}
    out, last, states = run(inputs | empty | {"walks": (0, 1, 0, 1, 0, 0, 1)})
    assert out.shape == (1, 1, 5, 0) and states.shape == (1, 1, 0, 20)
    assert torch.equal(last, inputs["initial_state"])


@pytest.mark.parametrize(
    ("n_programs", "length", "count"),
    [(4, 2097152, 656), (32, 4096, 64), (768, 4096, 1), (792, 262144, 1), (8, 32, 1), (1, 70, 3)],
)
def test_the_walk_is_cut_where_programs_are_few(n_programs, length, count):
    assert triton_scan.segments(n_programs, length, 132) == count


def test_what_cannot_be_served_is_refused_with_the_reason(monkeypatch):
    cpu = torch.device("cpu")
    assert "float64" in str(triton_scan.supports(torch.device(DEVICE), torch.float64, 16))
    assert "65" in str(triton_scan.supports(torch.device(DEVICE), torch.float32, 65))
    assert triton_scan.supports(torch.device(DEVICE), torch.bfloat16, 64) is None
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "CUDA" in str(triton_scan.supports(cpu, torch.float32, 16))


@pytest.mark.parametrize("name", ["triton", "pytorch-triton-rocm", "triton-windows"])
@pytest.mark.parametrize(
    ("version", "old"),
    [("3.2.0", True), ("2.3.1", True), ("3.3.0+git9c288bc5", False), ("3.10.0", False)],
)
def test_a_triton_too_old_for_the_kernels_is_named_with_the_cure(monkeypatch, name, version, old):
    def installed(asked: str) -> str:
        if asked != name:
            raise triton_scan.importlib.metadata.PackageNotFoundError(asked)
        return version

    monkeypatch.setattr(triton_scan.importlib.metadata, "version", installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = triton_scan.why_unavailable()
    assert (reason is not None) == old
    if old:
        assert version in str(reason) and "upgrade torch to 2.7" in str(reason)
