"""Key maps between official state dicts and ours, usable in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Transform = Callable[[Tensor], Tensor]


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
    """Own keys taken as they were or adapted; own keys missing; official keys unused."""

    matched: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{len(self.matched)} tensors matched, {len(self.adapted)} adapted, "
            f"{len(self.missing)} missing, {len(self.unused)} unused, "
            f"{len(self.aliases)} duplicates left out"
        )


class KeyMap:
    """Ordered rows; the first row that fits a key decides.

    aliases: pairs of patterns (duplicate, original) for tensors that the official state dict lists
    under several keys. They are left out, after a check that they equal their original.
    """

    def __init__(self, rows: Iterable[Row], aliases: Iterable[tuple[str, str]] = ()) -> None:
        rows = list(rows)
        self._to_own = [(_compile(row.official), _template(row.own), row) for row in rows]
        self._to_official = [(_compile(row.own), _template(row.official), row) for row in rows]
        self._aliases = [(_compile(alias), _template(original)) for alias, original in aliases]

    def covers(self, official_keys: Iterable[str]) -> bool:
        """Whether the map knows all of these official keys, duplicates too."""
        return all(self._find(self._to_own, self.resolve(key)) for key in official_keys)

    def fits(self, own_keys: Iterable[str]) -> bool:
        """Whether the map knows all of these keys of ours."""
        return all(self._find(self._to_official, key) for key in own_keys)

    def resolve(self, official: str) -> str:
        """The official key that a duplicate repeats; a key that is no duplicate stays."""
        for pattern, template in self._aliases:
            if match := pattern.fullmatch(official):
                return self.resolve(match.expand(template))
        return official

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

    Looks under `network_weights`, `state_dict` and `model`, and takes the prefixes `module.` and
    `_orig_mod.` of wrapped networks off. ValueError if no tensors are found.
    """
    weights: Any = checkpoint
    for name in ("network_weights", "state_dict", "model"):
        if isinstance(weights, Mapping) and isinstance(weights.get(name), Mapping):
            weights = weights[name]
    tensors = {key: value for key, value in weights.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError("the checkpoint holds no network weights")
    while True:
        for prefix in ("module.", "_orig_mod."):
            if all(key.startswith(prefix) for key in tensors):
                tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
                break
        else:
            return tensors


def mixer_rows(norm: str, mamba: str, own: str) -> list[Row]:
    """The rows of a MixerLayer: the official prefixes of its norm and its Mamba, and ours."""
    return [Row(f"{norm}{{p}}", f"{own}norm.{{p}}"), *mamba_rows(mamba, f"{own}mixer.")]


def mamba_rows(official: str, own: str) -> list[Row]:
    """The rows of a Mamba-1 mixer of one direction; both prefixes end in a dot or are empty."""
    direction = own + "directions.0."
    return [
        Row(f"{official}A_log", f"{direction}A_log"),
        Row(f"{official}D", f"{direction}D"),
        Row(f"{official}in_proj.{{p}}", f"{own}in_proj.{{p}}"),
        Row(f"{official}conv1d.{{p}}", f"{direction}conv_{{p}}"),
        Row(f"{official}x_proj.weight", f"{direction}x_proj_weight"),
        Row(f"{official}dt_proj.{{p}}", f"{direction}dt_proj_{{p}}"),
        Row(f"{official}out_proj.{{p}}", f"{own}out_proj.{{p}}"),
    ]


_PLACEHOLDER = re.compile(r"\{(\w+)(\.\.\.)?\}")


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
