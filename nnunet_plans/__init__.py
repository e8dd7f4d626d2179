"""Templates of plans: the sizes of published trainings, to be put into a dataset's own plans.

A template is a JSON file beside this one:
    reference      where the sizes were read
    configuration  the configuration that they belong to
    networks       registered names that they were published for
    changes        keyword arguments of `umamba.planning.plans.replan`
"""

import difflib
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def list_templates() -> list[str]:
    """Returns the names of the templates, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read_template(name: str) -> dict[str, Any]:
    """Returns a template (`-` and `_` are the same); ValueError with the nearest names."""
    wanted = name.replace("-", "_")
    known = list_templates()
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=2, cutoff=0.4) or known
        raise ValueError(f"no template is called {name!r}; there are {', '.join(near)}")
    content: dict[str, Any] = json.loads((FOLDER / f"{wanted}.json").read_text())
    return content
