"""The registry of networks: names, classes, where each comes from, and how to build one."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from umamba.networks.base import SegmentationNetwork

NetworkClass = TypeVar("NetworkClass", bound=type[SegmentationNetwork])

# A network with a `mixer` argument is also registered with its scan taken out or replaced.
CONTROLS = {"_noscan": {"mixer": "none"}, "_convmix": {"mixer": "conv"}}

_entries: dict[str, NetworkEntry] = {}


@dataclass(frozen=True)
class NetworkEntry:
    """What is known of one registered name.

    arguments: keyword arguments that the name implies (a control's mixer); they belong into the
    plans' arch_kwargs beside those of the plan. control_of: the name whose control this is.
    """

    name: str
    cls: type[SegmentationNetwork]
    paper: str
    reference: str
    licence: str
    quirks: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    control_of: str | None = None

    @property
    def class_path(self) -> str:
        """The value of `network_class_name` in the plans."""
        return f"{self.cls.__module__}.{self.cls.__qualname__}"

    @property
    def spatial_dims(self) -> tuple[int, ...]:
        """Which of 2 and 3 dimensions the network supports."""
        return self.cls.spatial_dims

    @property
    def fixed_strides(self) -> tuple[tuple[int, ...], ...] | None:
        """The only strides the network has, or None where the planner chooses."""
        return self.cls.fixed_strides

    def own_stages(self, spatial_dims: int) -> dict[str, Any]:
        """The strides, and the widths if they have a default, of a network with fixed strides.

        In 2D those of the last axes of a 3D entry.
        """
        assert self.fixed_strides is not None
        strides = [list(stride[-spatial_dims:]) for stride in self.fixed_strides]
        stages: dict[str, Any] = {"strides": strides}
        widths = inspect.signature(self.cls).parameters.get("features_per_stage")
        if widths is not None and widths.default is not widths.empty:
            stages["features_per_stage"] = list(widths.default)
        return stages

    @property
    def keywords(self) -> tuple[str, ...]:
        """The names of the keyword arguments that plans may give."""
        parameters = inspect.signature(self.cls).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def register(
    name: str, *, paper: str, reference: str, licence: str, quirks: tuple[str, ...] = ()
) -> Callable[[NetworkClass], NetworkClass]:
    """Registers a network class, and its controls where it has a `mixer` argument.

    reference: the official repository and commit that the network equals. quirks: behaviour kept
    for the sake of published checkpoints, a sentence each.
    """

    def add(cls: NetworkClass) -> NetworkClass:
        entry = NetworkEntry(name, cls, paper, reference, licence, quirks)
        entries = [entry]
        if "mixer" in entry.keywords:
            entries += [
                replace(entry, name=name + suffix, arguments=arguments, control_of=name)
                for suffix, arguments in CONTROLS.items()
            ]
        for each in entries:
            assert each.name not in _entries, f"{each.name} is registered twice"
            _entries[each.name] = each
        return cls

    return add


def create_network(
    name: str, input_channels: int, num_classes: int, **arguments: Any
) -> SegmentationNetwork:
    """Builds a registered network. An unknown keyword argument is a TypeError."""
    entry = get_entry(name)
    return entry.cls(input_channels, num_classes, **{**entry.arguments, **arguments})


def list_networks(spatial_dims: int | None = None, *, controls: bool = True) -> list[str]:
    """The registered names, sorted; only those that support spatial_dims (2 or 3) if given."""
    return sorted(
        entry.name
        for entry in _entries.values()
        if (spatial_dims is None or spatial_dims in entry.spatial_dims)
        and (controls or entry.control_of is None)
    )


def get_entry(name: str) -> NetworkEntry:
    """The entry of a name (`-` and `_` are the same); ValueError with the nearest names."""
    wanted = name.strip().lower().replace("-", "_")
    if wanted in _entries:
        return _entries[wanted]
    near = difflib.get_close_matches(wanted, _entries, n=3, cutoff=0.5)
    raise ValueError(
        f"no network is called {name!r}; did you mean {' or '.join(near)}?"
        if near
        else f"no network is called {name!r}; registered are {', '.join(list_networks())}"
    )


def recognize_network(keys: Collection[str]) -> list[str]:
    """The registered networks whose official, or own, state dict could have these keys."""
    maps = {name: _entries[name].cls.official_key_map() for name in list_networks(controls=False)}
    return [name for name, key_map in maps.items() if key_map.fits(keys) or key_map.covers(keys)]
