"""Post-processing by nnU-Net's rule: largest components alone, where the validation gains by it."""

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import cc3d
import numpy as np
from scipy import ndimage, sparse

from umamba.evaluation.images import read_label_map, rewrite_label_map
from umamba.evaluation.overlap import Label, label_box, label_mask, label_values
from umamba.evaluation.tables import summarize
from umamba.processes import count_cores

Group = tuple[int, ...]
_NNUNET_FUNCTION = "remove_all_but_largest_component_from_segmentation"
_CONNECTIVITY: Final = 26  # voxels that share a corner hang together; of one slice that is 8


def keep_largest_components(labels: np.ndarray, groups: Sequence[Group]) -> np.ndarray:
    """Returns the label map with only the largest component of each group, the rest background.

    labels: (z, y, x) or (y, x), whole numbers. groups: label values that count as one structure,
    treated in this order. Components of equal size are all kept, as in nnU-Net.
    """
    components, pieces = _find_pieces(labels[None] if labels.ndim == 2 else labels)
    alive = np.ones(len(pieces.values), bool)
    for group in groups:
        alive = pieces.keep_largest(alive, group)
    gone = np.append(False, ~alive)
    return np.where(gone[components].reshape(labels.shape), labels.dtype.type(0), labels)


@dataclass(frozen=True)
class Pieces:
    """A label map as its P connected pieces of one label each.

    A component of any group consists of whole pieces, and so does what is left of one, so that
    no decision needs voxels. values, sizes: label and voxels of each piece. edges: (E, 2) pieces
    that touch.
    """

    values: np.ndarray
    sizes: np.ndarray
    edges: np.ndarray

    def keep_largest(self, alive: np.ndarray, group: Collection[int]) -> np.ndarray:
        """Returns which of the pieces that are left stay when the group keeps its largest."""
        inside = alive & np.isin(self.values, list(group))
        if np.count_nonzero(inside) < 2:
            return alive
        edges = self.edges[inside[self.edges].all(axis=1)]
        n = len(self.values)
        graph = sparse.coo_array((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), (n, n))
        component = sparse.csgraph.connected_components(graph, directed=False)[1]
        sizes = np.bincount(component, self.sizes * inside)
        return alive & ~(inside & (sizes[component] < sizes.max()))


def _find_pieces(labels: np.ndarray) -> tuple[np.ndarray, Pieces]:
    """Returns the number of the piece that each voxel of a volume is in, from 1, and the pieces."""
    components, n = cc3d.connected_components(labels, connectivity=_CONNECTIVITY, return_N=True)
    touching = list(cc3d.region_graph(components, connectivity=_CONNECTIVITY))
    there = labels != 0
    values = np.zeros(n, dtype=np.int64)
    values[components[there] - 1] = labels[there]
    sizes = np.bincount(components[there], minlength=n + 1)[1:]
    edges = np.array(touching, dtype=np.int64).reshape(-1, 2) - 1
    return components, Pieces(values, sizes, edges)


@dataclass(frozen=True)
class MeasuredPieces(Pieces):
    """The pieces of a prediction, and how they overlap with its reference.

    counted: voxels of each piece that are not ignored. members: per label or region its pieces,
    hits: their voxels that the reference gives the same label or region, n_ref: voxels of it in the
    reference.
    """

    counted: np.ndarray
    members: tuple[np.ndarray, ...]
    hits: tuple[np.ndarray, ...]
    n_ref: tuple[int, ...]

    def overlap(self, alive: np.ndarray, index: int) -> dict[str, float]:
        """Returns Dice, n_pred and n_ref of a label; Dice is nan where neither map holds it."""
        members, n_ref = self.members[index], self.n_ref[index]
        left = alive[members]
        n_pred = int(self.counted[members][left].sum())
        both = n_pred + n_ref
        dice = 2 * int(self.hits[index][left].sum()) / both if both else math.nan
        return {"Dice": dice, "n_pred": n_pred, "n_ref": n_ref}


def measure_pieces(
    reference: np.ndarray,
    prediction: np.ndarray,
    labels: Collection[Label],
    ignore_label: int | None = None,
) -> MeasuredPieces:
    """Returns the pieces of a label map and how they overlap with the reference of its shape.

    Voxels that carry `ignore_label` in the reference count in sizes, but in no overlap.
    """
    if reference.ndim == 2:
        reference, prediction = reference[None], prediction[None]
    largest = max(value for label in labels for value in label_values(label))
    boxes_ref, boxes = (ndimage.find_objects(part, largest) for part in (reference, prediction))
    components, pieces = _find_pieces(prediction)
    values, n = pieces.values, len(pieces.values)
    counted = pieces.sizes
    if ignore_label is not None:
        counted = np.bincount(components[reference != ignore_label], minlength=n + 1)[1:]
    members, hits, n_ref = [], [], []
    for label in labels:
        # a label is never the ignore label, so its mask in the reference holds counted voxels only
        in_ref = label_mask(reference[label_box([boxes_ref], label, 3)], label)
        n_ref.append(int(np.count_nonzero(in_ref)))
        box = label_box([boxes], label, 3)
        both = label_mask(reference[box], label) & label_mask(prediction[box], label)
        members.append(np.flatnonzero(np.isin(values, label_values(label))))
        hits.append(np.bincount(components[box][both], minlength=n + 1)[1:][members[-1]])
    found = counted, tuple(members), tuple(hits), tuple(n_ref)
    return MeasuredPieces(values, pieces.sizes, pieces.edges, *found)


def measure_cases(
    files: Mapping[str, tuple[Path, Path]],
    labels: Collection[Label],
    ignore_label: int | None = None,
    n_threads: int | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, MeasuredPieces]:
    """Reads each prediction and its reference once; returns the pieces by case.

    files: case -> (prediction, reference). Memory: one pair of label maps per thread. Raises
    ValueError or FileNotFoundError naming the file for one that cannot be read or compared.
    """

    def measure(pair: tuple[Path, Path]) -> MeasuredPieces:
        (prediction, _), (reference, _) = map(read_label_map, pair)
        if prediction.shape != reference.shape:
            raise ValueError(
                f"{pair[0]}: has shape {prediction.shape}, its reference {pair[1]} has "
                f"{reference.shape}; predict again from the image of this reference"
            )
        return measure_pieces(reference, prediction, labels, ignore_label)

    measured: dict[str, MeasuredPieces] = {}
    with ThreadPoolExecutor(n_threads or min(count_cores(), 4)) as pool:
        try:
            for case, pieces in zip(files, pool.map(measure, files.values()), strict=True):
                measured[case] = pieces
                progress(len(measured), len(files))
        finally:
            pool.shutdown(cancel_futures=True)
    return measured


def summarize_pieces(
    measured: Mapping[str, MeasuredPieces],
    labels: Collection[Label],
    alive: Sequence[np.ndarray] | None = None,
) -> dict[str, Any]:
    """Returns the summary of the predictions (tables.summarize) with Dice, n_pred and n_ref."""
    entries = []
    for (case, pieces), left in zip(measured.items(), alive or _everything(measured), strict=True):
        metrics = {}
        for index, label in enumerate(labels):
            values = pieces.overlap(left, index).items()
            metrics[str(label)] = {name: None if math.isnan(v) else v for name, v in values}
        entries.append({"case": case, "metrics": metrics})
    return summarize(entries, list(map(str, labels)))


def determine_postprocessing(
    measured: Mapping[str, MeasuredPieces], labels: Collection[Label]
) -> tuple[list[Group], dict[str, Any]]:
    """Returns the groups that shall keep their largest component alone, by nnU-Net's decisions.

    All foreground as one first: taken where the mean Dice over the labels rises and no label loses;
    undefined where a label is in no case, and then not taken. Next, each label or region in their
    order, on what is left: taken where its own Dice rises. The second value is the content of
    postprocessing.json in nnU-Net's form, with the means before and after.
    """
    alive = start = _everything(measured)
    foreground = tuple(sorted({v for label in labels for v in label_values(label) if v}))
    groups: list[Group] = []

    def attempt(group: Group) -> list[np.ndarray]:
        return [p.keep_largest(a, group) for p, a in zip(measured.values(), alive, strict=True)]

    def mean_dice(which: Sequence[np.ndarray], index: int) -> float:
        pairs = zip(measured.values(), which, strict=True)
        dice = [pieces.overlap(left, index)["Dice"] for pieces, left in pairs]
        defined = [value for value in dice if not math.isnan(value)]
        return float(np.mean(defined)) if defined else math.nan

    left = attempt(foreground)
    means = np.array([(mean_dice(alive, i), mean_dice(left, i)) for i in range(len(labels))])
    if means[:, 1].mean() > means[:, 0].mean() and not (means[:, 1] < means[:, 0]).any():
        groups, alive = [foreground], left
    for index, label in enumerate(labels if len(labels) > 1 else ()):
        left = attempt(label_values(label))
        if mean_dice(left, index) > mean_dice(alive, index):
            groups, alive = [*groups, label_values(label)], left
    before, final = (summarize_pieces(measured, labels, which) for which in (start, alive))
    content = {
        "input_folder": {key: before[key] for key in ("foreground_mean", "mean")},
        "postprocessed": {key: final[key] for key in ("foreground_mean", "mean")},
        "postprocessing_fns": [_NNUNET_FUNCTION] * len(groups),
        "postprocessing_kwargs": [{"labels_or_regions": list(group)} for group in groups],
    }
    return groups, content


def read_postprocessing(file: Path) -> list[Group]:
    """Returns the groups of a postprocessing.json, ours or nnU-Net's, in their order.

    Raises FileNotFoundError, or ValueError naming the file where it holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; umamba best writes postprocessing.json")
    if file.suffix == ".pkl":
        raise ValueError(
            f"{file}: may run code when it is read; give postprocessing.json beside it"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        functions, arguments = content["postprocessing_fns"], content["postprocessing_kwargs"]
        if set(functions) - {_NNUNET_FUNCTION} or len(functions) != len(arguments):
            raise ValueError(f"functions {functions}")
        named = [entry["labels_or_regions"] for entry in arguments]
        return [tuple(map(int, [n] if isinstance(n, int) else n)) for n in named]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: is not a postprocessing.json of umamba best or nnU-Net ({error})"
        ) from error


def postprocess_files(
    files: Mapping[Path, Path],
    groups: Sequence[Group],
    n_threads: int | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[str]:
    """Writes each label map (source -> target) post-processed; returns what is wrong with others.

    Each target appears whole or not at all; a file that cannot be read does not stop the rest.
    """

    def write(pair: tuple[Path, Path]) -> str | None:
        try:
            rewrite_label_map(*pair, partial(keep_largest_components, groups=groups))
        except (ValueError, FileNotFoundError) as error:
            return str(error)
        return None

    failures = []
    with ThreadPoolExecutor(n_threads or min(count_cores(), 4)) as pool:
        for done, failure in enumerate(pool.map(write, files.items()), 1):
            failures += [failure] if failure else []
            progress(done, len(files))
    return failures


def _everything(measured: Mapping[str, MeasuredPieces]) -> list[np.ndarray]:
    return [np.ones(len(pieces.values), bool) for pieces in measured.values()]
