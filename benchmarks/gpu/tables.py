"""The figures of a run as one page of tables: from the JSON file, without a GPU.

python -m benchmarks.gpu.tables FILE.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu import checks, layers, scan, steps, train
from benchmarks.gpu.common import markdown_head, markdown_row

COLUMNS = {
    "checks": checks.columns,
    "scan": scan.columns,
    "layers": layers.columns,
    "steps": steps.columns,
    "train": train.columns,
}


def markdown(found: dict[str, Any]) -> str:
    """The page: device and versions, then each part that ran."""
    lines = ["# GPU benchmark", ""]
    facts = [(key, value) for key, value in found["facts"].items() if value is not None]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts)]
    for part, columns in COLUMNS.items():
        if part not in found["parts"]:
            continue
        result = found["parts"][part]
        lines += ["", f"## {result.get('part', part)}", ""]
        if rows := result.get("rows"):
            shown = columns()
            lines += [*markdown_head(list(shown)), *(markdown_row(row, shown) for row in rows)]
        for note in result.get("notes", []):
            lines += ["", note]
        if result["code"] != 0:
            lines += ["", f"This part did not end well: {result['code']}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())), end="")
