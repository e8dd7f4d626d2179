"""Which patches a training sees: nnU-Net's choice, jittered, or balanced over the classes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset

from umamba.preprocessing.class_locations import count_locations, jittered_bounds
from umamba.training.recipe import Recipe


def loader_class(recipe: Recipe) -> Callable[..., nnUNetDataLoader]:
    """Returns what makes a loader of patches, with the arguments of nnU-Net's.

    Without a word about sampling in the recipe it is nnU-Net's loader itself.  As nnU-Net forces
    foreground in the patches of validation, too, they are drawn like those of training.
    """
    if recipe.sampling == "balanced":
        return functools.partial(BalancedLoader, class_weights=recipe.class_weights)
    return JitteredLoader if recipe.sampling == "jittered" else nnUNetDataLoader


class JitteredLoader(nnUNetDataLoader):
    """nnU-Net's loader, whose forced foreground may lie anywhere in the patch but at its border.

    nnU-Net puts the chosen voxel into the middle, so that a small structure is seen there and
    hardly anywhere else.  Patches that are not forced are nnU-Net's.
    """

    def get_bbox(
        self,
        data_shape: np.ndarray,
        force_fg: bool,
        class_locations: dict | None,
        overwrite_class: Hashable | None = None,
        verbose: bool = False,
    ) -> tuple[list[int], list[int]]:
        """Returns the lower and upper corner of a patch; arguments are nnU-Net's."""
        voxel = None
        if force_fg and class_locations is not None:
            voxel = self._choose_voxel(class_locations, overwrite_class)
        if voxel is None:
            return super().get_bbox(data_shape, force_fg, class_locations, overwrite_class, verbose)
        low, high = jittered_bounds(
            voxel, data_shape, self.patch_size, self.final_patch_size, self.need_to_pad
        )
        corner = np.random.randint(low, high + 1)
        return corner.tolist(), (corner + self.patch_size).tolist()

    def _choose_voxel(self, located: Mapping, wanted: Hashable | None) -> np.ndarray | None:
        """A voxel of the wanted class, else of any class of the case; None without foreground."""
        there = [key for key, voxels in located.items() if len(voxels) and self._is_class(key)]
        if not there:
            return None
        key = wanted if wanted in there else there[np.random.choice(len(there))]
        voxels = located[key]
        return np.asarray(voxels[np.random.choice(len(voxels))][1:])

    def _is_class(self, key: Hashable) -> bool:
        """Whether the key is a class or region, and not that of all annotated voxels."""
        return key != self.annotated_classes_key


class BalancedLoader(JitteredLoader):
    """Chooses for a forced patch the class first, then a case that has it, then a voxel of it.

    nnU-Net chooses the case first, so that a class which few cases have is rarely forced.

    Args:
        arguments, options: nnU-Net's.
        class_weights: how often each class is chosen, in the order of the dataset's classes or
            regions; default all alike.
    """

    get_do_oversample: Callable[[int], bool]

    def __init__(
        self, *arguments: Any, class_weights: Sequence[float] | None = None, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        found = cases_per_class(self._data)
        cases = {key: names for key, names in found.items() if self._is_class(key)}
        weights = np.ones(len(cases)) if class_weights is None else np.asarray(class_weights)
        if len(weights) != len(cases):
            raise ValueError(
                f"recipe: {len(weights)} class_weights are given, and the data preprocessed in "
                f"{self._data.source_folder} have {len(cases)} classes: plan again"
            )
        weights = weights * [len(names) > 0 for names in cases.values()]
        self._cases = list(cases.items())
        self._shares = weights / weights.sum() if weights.any() else None
        self._is_forced = self.get_do_oversample
        self._wanted: list[Hashable] = []

    def get_indices(self) -> list[str]:
        """Returns the cases of a batch; those of forced patches have the class that is wanted."""
        names = list(super().get_indices())
        if self._shares is None:
            return names
        # Drawn once: nnU-Net may throw dice at each question.
        forced = [self._is_forced(index) for index in range(self.batch_size)]
        self.get_do_oversample = forced.__getitem__
        self._wanted = []
        for index in np.flatnonzero(forced):
            key, cases = self._cases[np.random.choice(len(self._cases), p=self._shares)]
            names[index] = cases[np.random.choice(len(cases))]
            self._wanted.append(key)
        return names

    def get_bbox(
        self,
        data_shape: np.ndarray,
        force_fg: bool,
        class_locations: dict | None,
        overwrite_class: Hashable | None = None,
        verbose: bool = False,
    ) -> tuple[list[int], list[int]]:
        """Returns the corners of the batch's next patch; arguments are nnU-Net's."""
        if force_fg and self._wanted:
            overwrite_class = self._wanted.pop(0)
        return super().get_bbox(data_shape, force_fg, class_locations, overwrite_class, verbose)


def cases_per_class(data: nnUNetBaseDataset) -> dict[Hashable, list[str]]:
    """Returns the cases of a preprocessed dataset that have each class (or region)."""
    cases: dict[Hashable, list[str]] = {}
    for name in data.identifiers:
        for key, n_voxels in count_locations(Path(data.source_folder) / f"{name}.pkl").items():
            cases.setdefault(key, []).extend([name] if n_voxels else [])
    return cases
