"""Who may import whom, and what the entry points leave unloaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "umamba"

OURS = {
    "ops": set(),
    "blocks": {"ops"},
    "networks": {"blocks", "ops"},
    "data": set(),
    "preprocessing": set(),
    "planning": {"networks", "blocks", "ops", "preprocessing"},
    "training": {"networks", "blocks", "ops", "preprocessing"},
    "inference": {"networks", "blocks", "ops", "preprocessing"},
    "evaluation": set(),
    "report": {"evaluation"},
}
ALL_LAYERS = {*OURS, "cli"}
# The scan's adapter imports its package inside a function, and nowhere else.
TORCH_ONLY = {"torch"}
OTHERS = {
    "ops": TORCH_ONLY | {"mamba_ssm", "causal_conv1d", "triton"},
    "blocks": TORCH_ONLY,
    "networks": TORCH_ONLY,
    "evaluation": {"numpy", "scipy", "SimpleITK", "edt", "cc3d"},
    "report": {"numpy", "matplotlib"},
}
NNUNET_LAYERS = {"data", "preprocessing", "planning", "training", "inference"}
HEAVY = {
    "torch",
    "numpy",
    "scipy",
    "nnunetv2",
    "SimpleITK",
    "nibabel",
    "matplotlib",
}

FILES = sorted(PACKAGE.rglob("*.py"))


def imports_of(file: Path, *, module_level_only: bool = False) -> set[str]:
    """Dotted names of the imported modules, relative ones resolved."""
    tree = ast.parse(file.read_text())
    nodes = ast.iter_child_nodes(tree) if module_level_only else ast.walk(tree)
    package = ("umamba", *file.relative_to(PACKAGE).parent.parts)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_imports_only_what_its_layer_may(file: Path) -> None:
    parts = file.relative_to(PACKAGE).parts
    layer = parts[0] if len(parts) > 1 else ""
    names = imports_of(file)
    own = {name.split(".")[1] for name in names if name.startswith("umamba.")} & ALL_LAYERS
    if layer in OURS:
        assert own - {layer} <= OURS[layer]
    if layer:
        assert layer == "cli" or "cli" not in own
    third_party = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"umamba"}
    if layer in OTHERS:
        assert third_party <= OTHERS[layer]
    if layer not in NNUNET_LAYERS and layer != "cli":
        assert "nnunetv2" not in third_party
    assert not third_party & {"timm", "torchvision", "monai"}
    if layer == "cli":
        at_top = {name.split(".")[0] for name in imports_of(file, module_level_only=True)}
        assert not at_top & HEAVY


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_is_short_and_says_what_it_is(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= 430
    if text.strip():
        assert ast.get_docstring(ast.parse(text))


def test_networks_load_without_nnunet_and_other_heavy_packages() -> None:
    assert not loaded_by("import umamba.networks") & {"nnunetv2", "monai", "timm", "triton"}


def test_the_package_and_the_help_page_load_no_torch() -> None:
    assert not loaded_by("import umamba") & HEAVY
    program = "from umamba.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    assert not loaded_by(program) & HEAVY


def loaded_by(program: str) -> set[str]:
    """Top-level packages in sys.modules after the program, in a fresh interpreter."""
    listing = "import sys\nprint('\\nloaded', *{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{listing}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=PACKAGE.parent,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])
