"""Published ImageNet weights of VMamba: where they are, and how networks start from them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from umamba.networks.base import SegmentationNetwork
from umamba.networks.checkpoint import read_weights
from umamba.networks.registry import get_entry, list_networks
from umamba.networks.vmamba import VMambaClassifier

FOLDER_VARIABLE = "UMAMBA_PRETRAINED"
STEM = "encoder.patch_embed.proj.weight"
RELEASES = "https://github.com/MzeroMiko/VMamba/releases/download/"


@dataclass(frozen=True)
class PublishedFile:
    """A checkpoint of VMamba's classifier.

    parameters: of the network in it, four bytes each; a file may hold more than them. also: names
    under which other repositories keep the file. sha256: None where nobody has published it.
    """

    name: str
    file: str
    release: str
    parameters: int
    also: tuple[str, ...] = ()
    sha256: str | None = None
    licence: str = "MIT"

    @property
    def address(self) -> str:
        """Where its authors publish it."""
        return f"{RELEASES}{self.release}/{self.file}"

    @property
    def networks(self) -> list[str]:
        """The registered networks that start from it, without their controls."""
        names = list_networks(controls=False)
        return [name for name in names if self.name in get_entry(name).pretrained_files]


# The addresses stand in VMamba's assets/performance.md, the numbers of parameters are counted. The
# authors publish no checksums: that of vssm_tiny is the one two projects that use it have recorded.
CATALOGUE = {
    entry.name: entry
    for entry in (
        PublishedFile(
            "vssm_tiny",
            "vssmtiny_dp01_ckpt_epoch_292.pth",
            "%23v0cls",
            22_893_448,
            also=("vmamba_tiny_e292.pth",),
            sha256="dbc0cc4f5ec0e45db5fba7c939d2c7d9b617e891ac10766912a8d604c37c5e47",
        ),
        PublishedFile(
            "vssm_small",
            "vssmsmall_dp03_ckpt_epoch_238.pth",
            "%23v0cls",
            44_417_416,
            also=("vmamba_small_e238_ema.pth",),
        ),
        PublishedFile(
            "vssm1_tiny_0230s", "vssm1_tiny_0230s_ckpt_epoch_264.pth", "%23v2cls", 30_249_064
        ),
        PublishedFile(
            "vssm1_small_0229s", "vssm1_small_0229s_ckpt_epoch_240.pth", "%23v2cls", 49_012_840
        ),
    )
}


@dataclass
class Initialization:
    """Our keys that took a tensor as it was, took an adapted one, or were left at their start.

    unused: keys of the file that no tensor of the network took.
    """

    taken: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{len(self.taken)} tensors taken, {len(self.adapted)} adapted, {len(self.left)} of "
            f"the network left at their start, {len(self.unused)} of the file unused"
        )


class Startable(Protocol):
    """An entry of a network: its name, and the names in the catalogue that it starts from."""

    @property
    def name(self) -> str: ...

    @property
    def pretrained_files(self) -> tuple[str, ...]: ...


def choose_file(entry: Startable, wanted: str = "") -> str:
    """What a recipe's `pretrained` holds for a wish: a name of the catalogue or an absolute path.

    wanted: such a name, a path, or nothing for the file that the network's authors take. Raises
    ValueError for a network that none is known for, and for a name of another network's.
    """
    names = entry.pretrained_files
    if not names:
        able = [name for name in list_networks(controls=False) if get_entry(name).pretrained_files]
        raise ValueError(
            f"no ImageNet weights are published for {entry.name}; there are some for "
            f"{', '.join(able)}"
        )
    if not wanted:
        return names[0]
    if wanted in CATALOGUE and wanted not in names:
        raise ValueError(f"{entry.name} does not start from {wanted} but from {' or '.join(names)}")
    return wanted if wanted in names else str(Path(wanted).expanduser().absolute())


def pretrained_folder() -> Path:
    """Where published files are kept: $UMAMBA_PRETRAINED, else ~/.cache/umamba/pretrained.

    Raises ValueError where that is a file.
    """
    given = os.environ.get(FOLDER_VARIABLE, "").strip()
    folder = Path(given or "~/.cache/umamba/pretrained").expanduser().absolute()
    if folder.is_file():
        raise ValueError(
            f"{folder} is a file: set {FOLDER_VARIABLE} to a folder, or give the file itself as "
            "--pretrained FILE"
        )
    return folder


def find_file(chosen: str) -> Path:
    """The file of a recipe's `pretrained`; FileNotFoundError with the cure where it is missing."""
    entry = CATALOGUE.get(chosen)
    if entry is None:
        if not Path(chosen).is_file():
            raise FileNotFoundError(
                f"there are no pretrained weights {chosen}; give the path of a file or one of "
                f"{', '.join(CATALOGUE)}"
            )
        return Path(chosen)
    folder = pretrained_folder()
    for name in (entry.file, *entry.also):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"the ImageNet weights {chosen} are not in {folder}: put {entry.file} from {entry.address} "
        f"there, or run `umamba models fetch {chosen} --download`"
    )


def initialize_encoder(network: SegmentationNetwork, file: Path) -> Initialization:
    """Copies the tensors of a VMamba checkpoint into a network, as its `pretrained_maps` say.

    Reads both spellings of VMamba's names. A stem for C other than 3 channels gets the mean of the
    RGB kernels C times, scaled by 3 / C, unless the maps leave the stem out. Raises ValueError
    where the file is no such checkpoint or a tensor has another shape.
    """
    _, weights = read_weights(file)
    own, values, report = network.state_dict(), {}, Initialization()
    classifier, maps = VMambaClassifier.official_key_map(), network.pretrained_maps()
    for key, tensor in weights.items():
        name, value = classifier.translate(key, tensor) or ("", tensor)
        targets = [found[0] for m in maps if (found := m.translate(name, value))]
        targets = [target for target in targets if target in own]
        if not targets:
            report.unused.append(key)
        for target in targets:
            shape = own[target].shape
            is_stem = name == STEM and value.ndim == len(shape) and value.shape[1] == 3 != shape[1]
            values[target] = widen_stem(value, shape[1]) if is_stem else value
            (report.adapted if is_stem else report.taken).append(target)
            if values[target].shape != shape:
                raise ValueError(
                    f"{file}: {key} has the shape {tuple(value.shape)} where "
                    f"{type(network).__name__} has {tuple(shape)}: the file is of another size or "
                    "version of VMamba than the network's widths and arguments"
                )
    if not values:
        raise ValueError(f"{file} holds nothing of a VMamba encoder; give one of VMamba's files")
    report.left = [key for key in own if key not in values]
    with torch.no_grad():
        for target, value in values.items():
            own[target].copy_(value)
    return report


def widen_stem(kernel: Tensor, n_channels: int) -> Tensor:
    """A kernel (out, 3, h, w) for n_channels: its mean over channels, with as large a sum."""
    mean = kernel.mean(1, keepdim=True)
    return mean.expand(-1, n_channels, -1, -1) * (kernel.shape[1] / n_channels)
