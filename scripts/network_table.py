"""Writes the README's table of networks from the registry; `--check` only compares.

    python scripts/network_table.py [--check]

Exit code 1 where README.md holds another table than the registry gives.
"""

import sys
from pathlib import Path

from umamba.planning.overview import markdown_table

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- networks: scripts/network_table.py -->\n", "<!-- end of networks -->\n"


def main() -> int:
    """Replaces what stands between the two comments."""
    text = README.read_text()
    before, rest = text.split(BEGIN)
    table, after = rest.split(END)
    wanted = markdown_table() + "\n"
    if table == wanted:
        return 0
    if "--check" in sys.argv[1:]:
        print(f"{README.name} has an old table of networks: run python scripts/network_table.py")
        return 1
    README.write_text(before + BEGIN + wanted + END + after)
    print(f"wrote the table of networks into {README.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
