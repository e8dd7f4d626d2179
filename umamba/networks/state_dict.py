"""Key maps between official state dicts and ours, usable in both directions."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Transform = Callable[[Tensor], Tensor]

WRAPPERS = ("network_weights", "model_state_dict", "state_dict", "model", "module")
# The last two are those of MSVM-UNet's and UVM-Net's training modules.
PREFIXES = ("module.", "_orig_mod.", "_model.", "net.")
COUNTERS = ("total_ops", "total_params")


@dataclass(frozen=True)
class Row:
    """One line of a key map: an official name and ours, as patterns.

    `{name}` stands for one part of a dotted key, `{name...}` for one or more parts; both patterns
    hold the same ones. adapt turns the official tensor into ours, restore does the reverse.
    """

    official: str
    own: str
    adapt: Transform | None = None
    restore: Transform | None = None


@dataclass
class LoadReport:
    """Own keys taken as they were or adapted; own keys missing; official keys unused.

    aliases: official duplicates. ignored: official keys that the network has no use for.
    """

    matched: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{len(self.matched)} tensors matched, {len(self.adapted)} adapted, "
            f"{len(self.missing)} missing, {len(self.unused)} unused, "
            f"{len(self.aliases)} duplicates and {len(self.ignored)} others left out"
        )


class KeyMap:
    """Ordered rows; the first row that fits a key decides.

    aliases: pairs of patterns (duplicate, original) for tensors that the official state dict lists
    under several keys. They are left out, after a check that they equal their original.
    ignored: patterns of official tensors that no output depends on, or that are no parameters but
    computed. They are left out.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        aliases: Iterable[tuple[str, str]] = (),
        ignored: Iterable[str] = (),
    ) -> None:
        rows = list(rows)
        self._to_own = [(_compile(row.official), _template(row.own), row) for row in rows]
        self._to_official = [(_compile(row.own), _template(row.official), row) for row in rows]
        self._aliases = [(_compile(alias), _template(original)) for alias, original in aliases]
        self._ignored = [_compile(pattern) for pattern in ignored]

    def covers(self, official_keys: Iterable[str]) -> bool:
        """Whether the map knows all of these official keys, duplicates too."""
        return all(
            self.ignores(key) or self._find(self._to_own, self.resolve(key))
            for key in official_keys
        )

    def fits(self, own_keys: Iterable[str]) -> bool:
        """Whether the map knows all of these keys of ours."""
        return all(self._find(self._to_official, key) for key in own_keys)

    def ignores(self, official: str) -> bool:
        """Whether the network has no use for this official key."""
        return any(pattern.fullmatch(official) for pattern in self._ignored)

    def resolve(self, official: str) -> str:
        """The official key that a duplicate repeats; a key that is no duplicate stays."""
        for pattern, template in self._aliases:
            match = pattern.fullmatch(official)
            if match and (original := match.expand(template)) != official:
                return self.resolve(original)
        return official

    def translate(self, official: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        """An official tensor under our name and in our form; None if the map does not know it."""
        if (found := self._find(self._to_own, official)) is None:
            return None
        name, row = found
        return name, row.adapt(tensor) if row.adapt else tensor

    def own_shapes(self, official: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """The shapes of those of the official tensors that the map knows, under our names."""
        originals = {self.resolve(key): value for key, value in official.items()}
        found = (self.translate(key, value) for key, value in originals.items())
        return {name: tuple(value.shape) for name, value in filter(None, found)}

    def to_own(
        self, official: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[str, Tensor], LoadReport]:
        """Official tensors under our names, and the report.

        shapes: our keys and their shapes. Raises ValueError unless every tensor of both sides is
        accounted for and has the expected shape.
        """
        report = LoadReport()
        own: dict[str, Tensor] = {}
        for key, tensor in self._without_duplicates(official, report).items():
            if self.ignores(key):
                report.ignored.append(key)
                continue
            found = self._find(self._to_own, key)
            if found is None or found[0] not in shapes:
                report.unused.append(key)
                continue
            name, row = found
            own[name] = row.adapt(tensor) if row.adapt else tensor
            (report.adapted if row.adapt else report.matched).append(name)
            if tuple(own[name].shape) != tuple(shapes[name]):
                raise ValueError(
                    f"the checkpoint's {key} has the shape {tuple(own[name].shape)} where the "
                    f"network has {tuple(shapes[name])}: the plans are not the checkpoint's "
                    "(features, kernels, channels, classes or patch size differ)"
                )
        report.missing = [name for name in shapes if name not in own]
        if report.missing or report.unused:
            example = (report.missing + report.unused)[0]
            raise ValueError(
                f"the checkpoint does not fit the network: {len(report.missing)} tensors missing, "
                f"{len(report.unused)} unused, e.g. {example}; check the network's name and plans"
            )
        return {name: own[name] for name in shapes}, report

    def to_official(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors under their official names, without duplicates."""
        official = {}
        for key, tensor in own.items():
            found = self._find(self._to_official, key)
            assert found is not None, f"the key map has no row for {key}"
            name, row = found
            official[name] = row.restore(tensor) if row.restore else tensor
        return official

    def _without_duplicates(
        self, official: Mapping[str, Tensor], report: LoadReport
    ) -> dict[str, Tensor]:
        originals: dict[str, Tensor] = {}
        for key, tensor in official.items():
            original = self.resolve(key)
            if original != key:
                report.aliases.append(key)
            if original not in originals:
                originals[original] = tensor
            elif not torch.equal(originals[original], tensor):
                raise ValueError(
                    f"the checkpoint's {key} differs from {original}, of which it should be a "
                    "duplicate: the file was altered"
                )
        return originals

    @staticmethod
    def _find(table: list[tuple[re.Pattern[str], str, Row]], key: str) -> tuple[str, Row] | None:
        for pattern, template, row in table:
            if match := pattern.fullmatch(key):
                return match.expand(template), row
        return None


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict inside a checkpoint.

    Looks under WRAPPERS, takes the PREFIXES of wrapped networks off, and leaves out the COUNTERS
    that thop leaves in a network. ValueError if no tensors are found.
    """
    weights: Any = checkpoint
    for name in WRAPPERS:
        if isinstance(weights, Mapping) and isinstance(weights.get(name), Mapping):
            weights = weights[name]
    tensors = {
        key: value
        for key, value in weights.items()
        if isinstance(value, Tensor) and key.rpartition(".")[2] not in COUNTERS
    }
    if not tensors:
        raise ValueError("the checkpoint holds no network weights")
    while True:
        for prefix in PREFIXES:
            if all(key.startswith(prefix) for key in tensors):
                tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
                break
        else:
            return tensors


def renamed_rows(official: str, own: str, names: Mapping[str, str]) -> list[Row]:
    """A row for the parameters of each layer: names are official and ours, behind the prefixes."""
    return [Row(f"{official}{old}.{{p}}", f"{own}{new}.{{p}}") for old, new in names.items()]


def count_blocks(keys: Collection[str], stages: str) -> list[int]:
    """How many blocks each of the stages has whose keys are `<stages>.<stage>.<block>. ...`."""
    pattern = re.compile(rf"{re.escape(stages)}\.(\d+)\.(\d+)\.")
    blocks = {(int(m[1]), int(m[2])) for key in keys if (m := pattern.match(key))}
    n_stages = 1 + max((stage for stage, _ in blocks), default=-1)
    return [sum(stage == i for stage, _ in blocks) for i in range(n_stages)]


def mixer_rows(norm: str, mamba: str, own: str, n_directions: int = 1) -> list[Row]:
    """The rows of a MixerLayer: the official prefixes of its norm and its Mamba, and ours."""
    mixer = mamba_rows(mamba, f"{own}mixer.", n_directions)
    return [Row(f"{norm}{{p}}", f"{own}norm.{{p}}"), *mixer]


def projected_mixer_rows(official: str, own: str) -> list[Row]:
    """The rows of a ProjectedMixerLayer; both prefixes end in a dot."""
    return [
        *mixer_rows(f"{official}norm.", f"{official}mamba.", own),
        Row(f"{official}proj.{{p}}", f"{own}proj.{{p}}"),
        Row(f"{official}skip_scale", f"{own}skip_scale"),
    ]


def mamba_rows(official: str, own: str, n_directions: int = 1) -> list[Row]:
    """The rows of a Mamba-1 mixer of 1 to 3 directions (mamba_simple and its copies v2, v3).

    Both prefixes end in a dot or are empty.
    """
    rows = renamed_rows(official, own, {"in_proj": "in_proj", "out_proj": "out_proj"})
    for k, suffix in enumerate(("", "_b", "_s")[:n_directions]):  # ahead, back, across slices
        direction = f"{own}directions.{k}."
        rows += [
            Row(f"{official}A{suffix}_log", f"{direction}A_log"),
            Row(f"{official}D{suffix}", f"{direction}D"),
            Row(f"{official}conv1d{suffix}.{{p}}", f"{direction}conv_{{p}}"),
            Row(f"{official}x_proj{suffix}.weight", f"{direction}x_proj_weight"),
            Row(f"{official}dt_proj{suffix}.{{p}}", f"{direction}dt_proj_{{p}}"),
        ]
    return rows


def unetr_block_rows(official: str, own: str) -> list[Row]:
    """The rows of a ResidualBlock that is MONAI's UnetResBlock; both prefixes end in a dot."""
    return [
        Row(f"{official}conv3.conv.weight", f"{own}shortcut.conv.weight"),
        Row(f"{official}{{conv}}.conv.weight", f"{own}{{conv}}.weight"),
    ]


def unetr_decoder_rows(official: str, n_stages: int) -> list[Row]:
    """The rows of a UNetDecoder that is MONAI's UNETR's, which ends with a block of its own.

    The official prefix ends in a dot or is empty; official blocks are counted from the finest on.
    """
    rows = unetr_block_rows(f"{official}decoder1.layer.", f"decoder.stages.{n_stages - 1}.1.")
    for k in range(n_stages):
        block = f"{official}decoder{n_stages + 1 - k}."
        rows += renamed_rows(block, f"decoder.upsample.{k}.", {"transp_conv.conv": "conv"})
        rows += unetr_block_rows(f"{block}conv_block.", f"decoder.stages.{k}.0.")
    return rows


def basic_block_rows(official: str, own: str, skips: tuple[int, ...] = (1, 0)) -> list[Row]:
    """The rows of a ResidualBlock that is BasicBlockD; both prefixes end in a dot.

    skips: where a shortcut's projection may be, at 1 behind a pool, else at 0.
    """
    names = {"conv{i}.conv": "conv{i}", "conv{i}.norm": "norm{i}"}
    names |= {f"skip.{index}.{{layer}}": "shortcut.{layer}" for index in skips}
    return renamed_rows(official, own, names)


def double_conv_rows(official: str, own: str) -> list[Row]:
    """The rows of a DoubleConv that is a sequence; both prefixes end in a dot."""
    names = {"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2"}
    return renamed_rows(official, own, names)


def ss2d_rows(official: str, own: str, out_norm: str = "layer") -> list[Row]:
    """The rows of an SS2D; both prefixes end in a dot or are empty. out_norm as in SS2D."""
    stacked = {"adapt": lambda x: x.unflatten(0, (4, -1)), "restore": lambda x: x.flatten(0, 1)}
    norm, conv = {"cnorm": ("out_norm.0", "out_norm.2")}.get(out_norm, ("out_norm", "out_norm.1"))
    return [
        Row(f"{official}x_proj_weight", f"{own}x_proj_weight"),
        Row(f"{official}dt_projs_{{p}}", f"{own}dt_proj_{{p}}"),
        Row(f"{official}A_logs", f"{own}A_log", **stacked),
        Row(f"{official}Ds", f"{own}D", **stacked),
        # Linear2d saves its weights as (out, in), a 1x1 convolution as (out, in, 1, 1)
        Row(f"{official}in_proj.weight", f"{own}in_proj.weight", lambda x: x.flatten(1)),
        Row(f"{official}out_proj.weight", f"{own}out_proj.weight", lambda x: x.flatten(1)),
        *renamed_rows(official, own, {"conv2d": "conv", conv: "out_norm.conv"}),
        *renamed_rows(official, own, {norm: "out_norm.norm"}),
    ]


def vss_block_rows(
    official: str, own: str, *, old: bool = False, out_norm: str = "layer"
) -> list[Row]:
    """The rows of a VSSBlock; both prefixes end in a dot or are empty.

    old: in the spelling of VMamba's first version and of the networks built on it (`ln_1`,
    `self_attention`). out_norm as in SS2D.
    """
    norm, mixer = ("ln_1", "self_attention") if old else ("norm", "op")
    return [
        Row(f"{official}{norm}.{{p}}", f"{own}norm.{{p}}"),
        *ss2d_rows(f"{official}{mixer}.", f"{own}mixer.", out_norm),
        Row(f"{official}norm2.{{p}}", f"{own}norm2.{{p}}"),
        Row(f"{official}mlp.{{fc}}.weight", f"{own}mlp.{{fc}}.weight", lambda x: x.flatten(1)),
        Row(f"{official}mlp.{{fc}}.bias", f"{own}mlp.{{fc}}.bias"),
    ]


_PLACEHOLDER = re.compile(r"\{(\w+)(\.\.\.)?\}")


@functools.cache  # re keeps fewer patterns than all networks' maps have
def _compile(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern with placeholders."""
    expression, end = "", 0
    for match in _PLACEHOLDER.finditer(pattern):
        part = ".+" if match[2] else r"[^.]+?"
        expression += re.escape(pattern[end : match.start()]) + f"(?P<{match[1]}>{part})"
        end = match.end()
    return re.compile(expression + re.escape(pattern[end:]))


def _template(pattern: str) -> str:
    """The replacement string of a pattern with placeholders."""
    return _PLACEHOLDER.sub(r"\\g<\1>", pattern)
