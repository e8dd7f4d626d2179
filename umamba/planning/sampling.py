"""Chooses how training samples foreground, from how often its patches would hold each class."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from umamba.planning.budget import planned_shapes
from umamba.planning.cases import read_dataset
from umamba.planning.hit_rates import HitRates, guess_hit_rates, measure_hit_rates, n_forced
from umamba.planning.plans import Plans, get_configuration, preprocessed_folder, read_json
from umamba.planning.preprocess import folder_is_current

DECIDED = ("sampling", "class_weights")
CHOICES = ("auto", "stock", "jittered", "balanced")
LEAST_PER_BATCH = 0.5
"""Patches per batch that should hold a class: where a class is absent the loss only pushes it down,
and with less than this most batches do so."""
LEAST_SEEN = 0.1
"""A class that fewer patches hold is chosen no more often: ten times as often as one that is in
every patch, so that the few cases of a very rare class do not become the whole training."""


def settle_sampling(plans: Plans, names: Sequence[str], asked: str = "auto") -> Plans:
    """Returns plans whose configurations `names` say how foreground is sampled, and why.

    The recipe gets "sampling" and, if balanced, "class_weights" (nothing for "stock": it stays
    nnU-Net's); "planning" gets the table "sampling" and a reason. Rates are measured on the
    preprocessed cases; where there are none of these plans yet they are guessed from the audit, and
    without an audit the sampling is what was asked for, nnU-Net's with "auto". Patch and batch must
    be final.
    """
    if asked not in CHOICES:
        raise ValueError(f"sampling is {asked!r}; choose one of {', '.join(CHOICES)}")
    settled: Plans = copy.deepcopy(plans)
    home = preprocessed_folder(plans["dataset_name"])
    audit = read_json(home / "audit.json") if (home / "audit.json").is_file() else {}
    facts = audit.get("summary", {}).get("labels", {})
    classes = _classes(plans["dataset_name"])
    for name in names:
        part = get_configuration(plans, name)
        rates = _rates(plans, name, classes, facts)
        weights = None if rates is None else class_weights(rates)
        chosen, reason = _choose(asked, list(classes.values()), rates, part["batch_size"], weights)
        if chosen != "balanced":
            weights = None
        own = settled["configurations"][name]
        recipe = {k: v for k, v in part.get("recipe", {}).items() if k not in DECIDED}
        if chosen != "stock":
            recipe["sampling"] = chosen
        if weights is not None:
            recipe["class_weights"] = weights
        own["recipe"] = recipe
        planning = part.get("planning", {})
        kept = [r for r in planning.get("reasons", []) if not r.startswith("Sampling: ")]
        planning["reasons"] = [*kept, f"Sampling: {reason}"]
        planning["sampling"] = _table(classes, facts, rates, part["batch_size"], chosen, weights)
        own["planning"] = planning
    return settled


def class_weights(rates: HitRates) -> list[float]:
    """Returns the share of forced patches per class: inverse to the patches that hold it anyway.

    A class without cases gets the share of one that is never seen; nothing is forced on it.
    """
    wanted = 1 / np.maximum(rates.per_patch(None, 1), LEAST_SEEN)
    return [round(float(share), 4) for share in wanted / wanted.sum()]


def _classes(dataset_name: str) -> dict[Hashable, str]:
    """The names of the classes (or regions) by their keys in nnU-Net's class_locations."""
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    content, _ = read_dataset(dataset_name)
    labels = LabelManager(content["labels"], content.get("regions_class_order"))
    named: dict[Hashable, str] = {}
    for name, value in content["labels"].items():
        named[tuple(value) if isinstance(value, list) else int(value)] = name
        if isinstance(value, list) and len(value) == 1:
            named[int(value[0])] = name
    keys = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    keys = [tuple(map(int, key)) if isinstance(key, tuple) else int(key) for key in keys]
    return {key: named[key] for key in keys}


def _rates(
    plans: Plans, name: str, classes: Mapping[Hashable, str], facts: Mapping[str, Any]
) -> HitRates | None:
    """Measured where these plans' cases are preprocessed, guessed where an audit tells enough."""
    part, home = get_configuration(plans, name), preprocessed_folder(plans["dataset_name"])
    if folder_is_current(plans["dataset_name"], plans, name):
        return measure_hit_rates(home / part["data_identifier"], part["patch_size"], list(classes))
    if not all(str(key) in facts for key in classes):
        return None
    fingerprint = read_json(home / "dataset_fingerprint.json")
    shapes = planned_shapes(plans, part["spacing"])
    voxels = np.prod(np.array(fingerprint["shapes_after_crop"], float), axis=1)
    ratio = float(np.median(np.prod(shapes, axis=1) / voxels))
    shape = [round(extent) for extent in np.median(shapes, axis=0)]
    known = [facts[str(key)] for key in classes]
    return guess_hit_rates(known, shape, part["patch_size"], ratio, len(shapes))


def _choose(
    asked: str,
    classes: Sequence[str],
    rates: HitRates | None,
    batch_size: int,
    weights: Sequence[float] | None,
) -> tuple[str, str]:
    """The sampling and the reason for it, in one sentence."""
    if rates is None:
        chosen = "stock" if asked == "auto" else asked
        return chosen, f"{chosen}, {_unknown(asked)}."
    seen = batch_size * rates.per_patch("stock", batch_size)
    rare = int(np.argmin(np.where(rates.n_cases > 0, seen, np.inf)))
    stock = f"nnU-Net's sampling shows {classes[rare]}, the rarest, in {_n(seen[rare])} batch"
    if asked in ("stock", "jittered"):
        return asked, f"{asked}, as asked; {stock}."
    if asked == "auto" and seen[rare] >= LEAST_PER_BATCH:
        return "stock", f"stock; {stock}, and {LEAST_PER_BATCH:g} are enough."
    if asked == "auto" and not n_forced(batch_size):
        return "stock", f"stock; {stock}, but with a batch of {batch_size} it forces no patch."
    new = batch_size * rates.per_patch("balanced", batch_size, weights)
    why = "as asked" if asked == "balanced" else f"for {LEAST_PER_BATCH:g} are wanted"
    return "balanced", (
        f"balanced, {why}; {stock}. Forced patches choose the class first, the rarely seen more "
        f"often, then one of the {rates.n_cases[rare]} cases that have it, and hold the voxel "
        f"anywhere but at their border: {classes[rare]} is in {_n(new[rare])} batch."
    )


def _unknown(asked: str) -> str:
    how = "as asked" if asked != "auto" else "nnU-Net's"
    return f"{how}; nothing is preprocessed or audited yet that tells how often a class is seen"


def _n(patches: float) -> str:
    return f"{patches:.2g} patches per" if patches < 10 else f"{patches:.0f} patches per"


def _table(
    classes: Mapping[Hashable, str],
    facts: Mapping[str, Any],
    rates: HitRates | None,
    batch_size: int,
    chosen: str,
    weights: Sequence[float] | None,
) -> dict[str, Any]:
    """What plans and report keep: per class its size (of the audit) and the share of patches."""
    if rates is None:
        return {"chosen": chosen, "classes": []}
    kinds = {
        "random": rates.per_patch(None, batch_size),
        "stock": rates.per_patch("stock", batch_size),
        "chosen": rates.per_patch(chosen, batch_size, weights),
    }
    rows = []
    for index, (key, name) in enumerate(classes.items()):
        fact = facts.get(str(key), {})
        parts = fact.get("components", {})
        rows.append(
            {
                "name": name,
                "n_cases": int(rates.n_cases[index]),
                "share": fact.get("share"),
                "parts_per_case": parts.get("per_case_median"),
                "median_voxels": parts.get("median_voxels"),
                **{kind: round(float(values[index]), 4) for kind, values in kinds.items()},
            }
        )
    return {"chosen": chosen, "n_cases": rates.n_total, "classes": rows}
