"""The registry of networks and of modules without plans: names, classes, origin, how to build."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import nn

from umamba.networks.base import SegmentationNetwork

NetworkClass = TypeVar("NetworkClass", bound=type[SegmentationNetwork])
ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])
Entry = TypeVar("Entry", bound="ModuleEntry")

# A network with a `mixer` argument is also registered with its scan taken out or replaced.
CONTROLS = {"_noscan": {"mixer": "none"}, "_convmix": {"mixer": "conv"}}

_entries: dict[str, NetworkEntry] = {}
_modules: dict[str, ModuleEntry] = {}


@dataclass(frozen=True)
class ModuleEntry:
    """What is known of one registered name.

    arguments: keyword arguments that the name implies.
    """

    name: str
    cls: type[nn.Module]
    paper: str
    reference: str
    licence: str
    quirks: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def class_path(self) -> str:
        """The value of `network_class_name` in the plans."""
        return f"{self.cls.__module__}.{self.cls.__qualname__}"

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The keyword arguments that plans, or callers, may give, by name."""
        parameters = inspect.signature(self.cls).parameters
        return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}

    @property
    def keywords(self) -> tuple[str, ...]:
        """The names of the parameters."""
        return tuple(self.parameters)


@dataclass(frozen=True)
class NetworkEntry(ModuleEntry):
    """What is known of one registered network.

    arguments: a control's mixer; they belong into the plans' arch_kwargs beside those of the plan.
    control_of: the name whose control this is.
    """

    cls: type[SegmentationNetwork]
    control_of: str | None = None

    @property
    def spatial_dims(self) -> tuple[int, ...]:
        """Which of 2 and 3 dimensions the network supports."""
        return self.cls.spatial_dims

    @property
    def pretrained_files(self) -> tuple[str, ...]:
        """The published ImageNet weights that it starts from, its authors' choice first."""
        return self.cls.pretrained_files

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
            _add(_entries, each)
        return cls

    return add


def register_module(
    name: str,
    *,
    paper: str,
    reference: str,
    licence: str,
    arguments: Mapping[str, Any] | None = None,
) -> Callable[[ModuleClass], ModuleClass]:
    """Registers a module that plans do not name: it is built in Python, by `create_module`.

    reference as in `register`. arguments: those that the name implies.
    """

    def add(cls: ModuleClass) -> ModuleClass:
        _add(_modules, ModuleEntry(name, cls, paper, reference, licence, (), arguments or {}))
        return cls

    return add


def _add(entries: dict[str, Any], entry: ModuleEntry) -> None:
    assert entry.name not in {*_entries, *_modules}, f"{entry.name} is registered twice"
    entries[entry.name] = entry


def create_network(
    name: str, input_channels: int, num_classes: int, **arguments: Any
) -> SegmentationNetwork:
    """Builds a registered network. An unknown keyword argument is a TypeError."""
    entry = get_entry(name)
    return entry.cls(input_channels, num_classes, **{**entry.arguments, **arguments})


def create_module(name: str, **arguments: Any) -> nn.Module:
    """Builds a registered module. An unknown keyword argument is a TypeError."""
    entry = get_module(name)
    return entry.cls(**{**entry.arguments, **arguments})


def list_networks(spatial_dims: int | None = None, *, controls: bool = True) -> list[str]:
    """The registered names, sorted; only those that support spatial_dims (2 or 3) if given."""
    return sorted(
        entry.name
        for entry in _entries.values()
        if (spatial_dims is None or spatial_dims in entry.spatial_dims)
        and (controls or entry.control_of is None)
    )


def list_modules() -> list[str]:
    """The names of the registered modules without plans, sorted."""
    return sorted(_modules)


def get_entry(name: str) -> NetworkEntry:
    """The entry of a name (`-` and `_` are the same); ValueError with the nearest names."""
    if (key := plain_name(name)) in _modules:
        raise ValueError(
            f"{key} is a module without plans, for Python alone: "
            f"umamba.networks.create_module({key!r}, ...) builds it"
        )
    return _find(_entries, "network", name)


def get_module(name: str) -> ModuleEntry:
    """The entry of a module without plans, as get_entry."""
    return _find(_modules, "module", name)


def _find(entries: dict[str, Entry], kind: str, name: str) -> Entry:
    if plain_name(name) in entries:
        return entries[plain_name(name)]
    raise unknown_name(kind, name, entries)


def unknown_name(kind: str, name: str, known: Collection[str]) -> ValueError:
    """The error for a name that is none of those known, with the nearest of them."""
    near = difflib.get_close_matches(plain_name(name), known, n=3, cutoff=0.5)
    return ValueError(
        f"no {kind} is called {name!r}; did you mean {' or '.join(near)}?"
        if near
        else f"no {kind} is called {name!r}; registered are {', '.join(sorted(known))}"
    )


def plain_name(name: str) -> str:
    """A name as it is registered: in small letters, `-` as `_`."""
    return name.strip().lower().replace("-", "_")


def recognize_network(keys: Collection[str]) -> list[str]:
    """The registered networks whose official, or own, state dict could have these keys."""
    maps = {name: _entries[name].cls.official_key_map() for name in list_networks(controls=False)}
    return [name for name, key_map in maps.items() if key_map.fits(keys) or key_map.covers(keys)]
