"""The templates of published sizes can be read and put into a dataset's plans."""

import importlib.util
import json
from pathlib import Path

import pytest

from umamba.networks import get_entry
from umamba.planning.plans import get_configuration, replan

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "nnunet_plans" / "__init__.py"
_spec = importlib.util.spec_from_file_location("nnunet_plans_under_test", SOURCE)
assert _spec is not None
assert _spec.loader is not None
templates = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(templates)


@pytest.mark.parametrize("name", templates.list_templates())
def test_a_template_fits_plans_and_names_registered_networks(name):
    template = templates.read_template(name)
    assert template["reference"]
    plans = json.loads((HERE / "golden" / "anisotropic_mr.json").read_text())
    configuration = template["configuration"]
    part = get_configuration(replan(plans, configuration, **template["changes"]), configuration)
    for key in ("patch_size", "batch_size"):
        assert part[key] == template["changes"][key]
    for network in template["networks"]:
        assert get_entry(network).name == network


def test_an_unknown_template_names_the_nearest():
    with pytest.raises(ValueError, match="umamba_abdomen_ct_3d"):
        templates.read_template("umamba-abdomen-ct")
