"""nnU-Net's own networks: their plans are those of nnU-Net's planners."""

import json
import warnings
from typing import Any

import pytest
import torch

from umamba.planning import footprint
from umamba.planning.footprint import GIB
from umamba.planning.planner import plan_dataset
from umamba.planning.plans import get_configuration, network_builder, replan
from umamba.planning.topology import check_network_args
from umamba.planning.upstream import UPSTREAM, find_entry


def stock_plans(name: str, dataset: str) -> dict[str, Any]:
    """What nnU-Net's own command would write."""
    planner = UPSTREAM[name].load_planner()(dataset)
    planner.plan_experiment()
    with open(f"{planner.raw_dataset_folder}/../../preprocessed/{dataset}/"
              f"{planner.plans_identifier}.json") as file:  # fmt: skip
        return json.load(file)


@pytest.mark.parametrize("kind", ["isotropic_ct", "anisotropic_mr", "flat", "micro"])
@pytest.mark.parametrize("name", UPSTREAM)
def test_the_plan_is_that_of_nnunets_planner(fingerprinted, name, kind):
    dataset = fingerprinted(kind)
    stock, plans = stock_plans(name, dataset), plan_dataset(dataset, network=name)
    assert plans["plans_name"] == name
    for own in ("umamba", "plans_name"):
        del plans[own]
    del stock["plans_name"]
    for part in (*plans["configurations"].values(), *stock["configurations"].values()):
        for key in ("planning", "recipe", "data_identifier"):
            part.pop(key, None)
    assert plans == stock
