"""The scan's backward in Triton against the definition in float64, and what it compiles to.

Without a CUDA device the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
pytest.importorskip("triton")

from umamba.ops import reference, triton_scan_backward

pytestmark = pytest.mark.triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("du", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddelta_bias", "dinitial_state")
BY_TOKEN, PER_DIRECTION = ("du", "ddelta", "dB", "dC", "dz"), ("dA", "dD", "ddelta_bias")
OPTIONS = {
    "bare": (),
    "gate": ("z", "softplus"),
    "skip": ("D", "delta_bias", "dlast_state"),
    "all": ("D", "z", "delta_bias", "softplus", "initial_state", "dlast_state"),
}


def raster(length: int) -> tuple[int, ...]:
    return (0, 1, 0, 1, 0, length, 1)


def back(length: int) -> tuple[int, ...]:
    return (length - 1, 1, 0, 1, 0, length, -1)


# (B, E, L, N, G), the walks
CASES = {
    "one token": ((2, 3, 1, 4, 1), [raster(1)]),
    "back over a chunk": ((1, 5, 35, 3, 1), [back(35)]),
    "groups": ((2, 6, 9, 16, 3), [raster(9)]),
    "several tiles": ((1, 40, 3, 16, 1), [raster(3)]),
    "columns and slices": (
        (1, 4, 12, 2, 2),
        [raster(12), (0, 1, 0, 4, 1, 3, 4), (0, 1, 0, 6, 1, 2, 6)],
    ),
    # of a map of 2 x 3 x 4
    "three levels": ((1, 4, 24, 1, 1), [(0, 4, 1, 3, 4, 2, 12), (23, 3, -4, 4, -1, 2, -12)]),
}
FOUR = [raster(6), (0, 1, 0, 3, 1, 2, 3), back(6), (5, 1, 0, 3, -1, 2, -3)]


def positions(walk: tuple[int, ...]) -> Tensor:
    start, n0, s0, n1, s1, n2, s2 = walk
    i0, i1, i2 = torch.meshgrid(*(torch.arange(n) for n in (n0, n1, n2)), indexing="ij")
    return (start + i0 * s0 + i1 * s1 + i2 * s2).flatten()


def make(
    sizes: tuple[int, ...],
    n_directions: int,
    options: tuple[str, ...],
    shared: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Random arguments; those named in `shared` (u, z, dout) have one direction."""
    B, E, L, N, G = sizes
    K = n_directions
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    def tokens(name: str) -> Tensor:
        return normal(B, L, 1 if name in shared else K, E, dtype=dtype).permute(0, 2, 3, 1)

    delta = tokens("delta") if "softplus" in options else tokens("delta").abs() * 0.3
    arguments = {
        "dout": tokens("dout"),
        "dlast_state": normal(B, K, E, N),
        "u": tokens("u"),
        "delta": delta,
        "A": -torch.exp(0.5 * normal(K, E, N)),
        "B": normal(B, K, G, N, L, dtype=dtype),
        "C": normal(B, K, L, G, N, dtype=dtype).permute(0, 1, 3, 4, 2),
        "D": normal(K, E),
        "z": tokens("z"),
        "delta_bias": normal(K, E) - 1 if "softplus" in options else 0.1 * normal(K, E).abs(),
        "initial_state": normal(B, K, E, N),
    }
    optional = ("D", "z", "delta_bias", "initial_state", "dlast_state")
    return {name: x for name, x in arguments.items() if name in options or name not in optional}


def defined(
    arguments: dict[str, Tensor], walks: list[tuple[int, ...]], softplus: bool, window: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """The gradients in float64, and the states that the forward saves."""
    wide = {name: x.double() for name, x in arguments.items()}
    gradients: dict[str, list[Tensor]] = {}
    states = []
    for k, walk in enumerate(walks):
        tokens = positions(walk)

        def taken(name: str, k: int = k, tokens: Tensor = tokens) -> Tensor | None:
            if name not in wide:
                return None
            x = wide[name]
            x = x[k] if name in ("A", "D", "delta_bias") else x[:, min(k, x.shape[1] - 1)]
            return x[..., tokens] if name in ("dout", "u", "delta", "B", "C", "z") else x

        inputs = [taken(name) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
        initial = taken("initial_state")
        saved = reference.forward(*inputs, softplus, initial, False, True)[2]
        states.append(saved.transpose(2, 3).flatten(2))
        if window:
            found = of_windows(taken("dout"), inputs, softplus, window)
        else:
            upstream = (taken("dout"), taken("dlast_state"))
            found = reference.backward(*upstream, *inputs, softplus, initial, saved, False)
        for name, gradient in zip(NAMES, found, strict=False):
            if gradient is None:
                continue
            whole = gradient
            if name in BY_TOKEN:
                whole = torch.empty_like(gradient)
                whole[..., tokens] = gradient
            gradients.setdefault(name, []).append(whole)
    stacked = {
        name: torch.stack(parts, 0 if name in PER_DIRECTION else 1)
        for name, parts in gradients.items()
    }
    for name in ("du", "dz"):
        if name in stacked and arguments[name[1:]].shape[1] == 1:
            stacked[name] = stacked[name].sum(1, keepdim=True)
    return stacked, torch.stack(states).float()


def of_windows(
    dout: Tensor, inputs: list[Tensor | None], softplus: bool, window: int
) -> list[Tensor | None]:
    """The gradients of `reference.local_scan`."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    out = reference.local_scan(*leaves, softplus, False, window)
    given = [x for x in leaves if x is not None]
    found = iter(torch.autograd.grad(out, given, dout))
    return [None if x is None else next(found) for x in leaves]


def run(
    arguments: dict[str, Tensor],
    states: Tensor,
    walks: list[tuple[int, ...]],
    softplus: bool,
    window: int = 0,
) -> dict[str, Tensor]:
    on = {name: x.to(DEVICE) for name, x in arguments.items()}
    inputs = [on.get(name) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    numbers = tuple(number for walk in walks for number in walk)
    upstream = (on["dout"], on.get("dlast_state"))
    states = states.to(DEVICE)
    found = triton_scan_backward.backward(
        *upstream, *inputs, softplus, on.get("initial_state"), states, numbers, window
    )
    return {name: x.cpu() for name, x in zip(NAMES, found, strict=True) if x is not None}


def check(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert actual[name].shape == x.shape, name
        difference = (actual[name].double() - x).abs().max()
        assert difference <= tolerance * x.abs().max(), name


@pytest.fixture(autouse=True)
def _nan(nan_empty: None) -> None:
    """Memory that no kernel writes shows."""


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_definition(case: str) -> None:
    sizes, walks = CASES[case]
    arguments = make(sizes, len(walks), OPTIONS["all"])
    expected, states = defined(arguments, walks, True)
    check(run(arguments, states, walks, True), expected, 5e-6)


@pytest.mark.parametrize("options", ["bare", "gate", "skip"])
def test_every_option_can_be_left_out(options: str) -> None:
    softplus = "softplus" in OPTIONS[options]
    arguments = make((1, 4, 6, 16, 1), 1, OPTIONS[options])
    expected, states = defined(arguments, [back(6)], softplus)
    check(run(arguments, states, [back(6)], softplus), expected, 5e-6)


@pytest.mark.parametrize("shared", [("u", "dout"), ("z",), ("u", "z", "dout")], ids="+".join)
def test_what_directions_share_gets_the_sum_of_their_gradients(shared: tuple[str, ...]) -> None:
    arguments = make((1, 4, 6, 16, 1), 4, OPTIONS["all"], shared)
    expected, states = defined(arguments, FOUR, True)
    check(run(arguments, states, FOUR, True), expected, 5e-6)


@pytest.mark.parametrize(
    ("n_segments", "sizes", "window"),
    [(2, (2, 2, 33, 2, 1), 0), (3, (1, 2, 66, 2, 2), 0), (2, (1, 2, 37, 2, 1), 8)],
    ids=("two", "three", "windows"),
)
def test_segments_give_the_gradients_of_the_whole(
    n_segments: int, sizes: tuple[int, ...], window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    B, _, L, _, _ = sizes
    walks = [back(L), raster(L)][:B]
    options = set(OPTIONS["all"]) - ({"initial_state", "dlast_state"} if window else set())
    arguments = make(sizes, len(walks), tuple(options), ("u",))
    expected, states = defined(arguments, walks, True, window)
    monkeypatch.setattr(triton_scan_backward, "segments", lambda *sizes: (n_segments, 1))
    check(run(arguments, states, walks, True, window), expected, 5e-6)


def test_gradients_of_the_state_go_through_any_number_of_segments() -> None:
    generator = torch.Generator().manual_seed(0)
    n_segments, K, B, E, N = 10, 2, 1, 3, 2
    A = -torch.rand(K, E, N, generator=generator)
    own = torch.randn(n_segments, K, B, E, N, generator=generator)
    steps = torch.rand(n_segments, K, B, E, generator=generator)
    last = torch.randn(K, B, E, N, generator=generator)
    received = [last]
    for segment in range(n_segments - 1, 0, -1):
        decay = torch.exp(A[:, None] * steps[segment, ..., None])
        received.insert(0, decay * received[0] + own[segment])
    carries = own.to(DEVICE)
    sizes = (n_segments, last.numel(), B, E)
    tensors = (A.to(DEVICE), last.to(DEVICE), carries, steps.to(DEVICE))
    triton_scan_backward.carry_over[(1,)](*tensors, *sizes, N=N, BLOCK=32, UNROLL=8, num_warps=1)
    torch.testing.assert_close(carries.cpu(), torch.stack(received))


@pytest.mark.parametrize("window", [4, 8, 16])
def test_windows_equal_the_definition(window: int) -> None:
    arguments = make((1, 4, 37, 3, 1), 1, ("D", "z", "delta_bias", "softplus"))
    expected, states = defined(arguments, [back(37)], True, window)
    check(run(arguments, states, [back(37)], True, window), expected, 5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_rounded_once(dtype: torch.dtype) -> None:
    arguments = make((1, 4, 6, 16, 1), 4, OPTIONS["all"], ("u", "z", "dout"), dtype)
    expected, states = defined(arguments, FOUR, True)
    actual = run(arguments, states, FOUR, True)
    for name in NAMES:
        assert actual[name].dtype == (dtype if name in BY_TOKEN else torch.float32)
    check(actual, expected, torch.finfo(dtype).eps / 2)


def test_any_strides_runs_and_launches_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    walks = FOUR[:2]
    arguments = make((2, 4, 6, 3, 2), 2, OPTIONS["all"], ("u", "dout"))
    _, states = defined(arguments, walks, True)
    once = run(arguments, states, walks, True)
    strange = {}
    for name, x in arguments.items():
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
        strange[name] = wide[..., ::2].copy_(x)
    monkeypatch.setattr(triton_scan_backward, "MOST_PROGRAMS", 3)
    again = run(strange, states, walks, True)
    for name, x in once.items():
        assert torch.equal(x, again[name]), name
        if name in BY_TOKEN:  # lies as (K, B, L, E) or (K, B, G, L, N)
            x = x.transpose(-1, -2)
        assert (x if name in PER_DIRECTION else x.transpose(0, 1)).is_contiguous(), name


@pytest.mark.parametrize("sizes", [(0, 4, 5, 3, 1), (2, 4, 0, 3, 1), (2, 0, 5, 3, 1)], ids=str)
def test_nothing_to_walk_gives_zeros_and_passes_the_state_back(sizes: tuple[int, ...]) -> None:
    arguments = make(sizes, 1, OPTIONS["all"])
    B, E, L, N, _ = sizes
    states = torch.zeros(1, B, -(-L // 32), N * E)
    found = run(arguments, states, [raster(L)], True)
    assert torch.equal(found["dinitial_state"], arguments["dlast_state"] * (L == 0))
    for name in set(NAMES) - {"dinitial_state"}:
        assert torch.equal(found[name], torch.zeros_like(found[name])), name


def test_segments_follow_from_the_shape_and_cover_it() -> None:
    for programs, chunks in ((1, 1), (2, 65536), (6, 8192), (192, 128), (4096, 128), (700, 9)):
        n_segments, length = triton_scan_backward.segments(programs, chunks)
        assert (n_segments - 1) * length < chunks <= n_segments * length
        assert n_segments == 1 or length >= 8
        assert n_segments == 1 or programs < 1024
