"""Where everything goes: the raw, preprocessed and results folders, chosen in a fixed order."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path

VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
FOLDER_NAME = "umamba-work"
_set_here: dict[str, str] = {}  # what activate() put into the environment of this process


@dataclass(frozen=True)
class Workspace:
    """The three folders of nnU-Net, and in words what chose them."""

    root: Path
    raw: Path
    preprocessed: Path
    results: Path
    chosen_by: str

    def activate(self) -> Workspace:
        """Create the folders and set nnU-Net's three variables for this process and its children.

        Raises ValueError where a folder cannot be made.
        """
        for variable, folder in self.variables().items():
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(
                    f"The folder {folder} cannot be made ({error.strerror}); "
                    "name another place with --workspace DIR"
                ) from error
            if os.environ.get(variable) != str(folder):
                os.environ[variable] = _set_here[variable] = str(folder)
        return self

    def variables(self) -> dict[str, Path]:
        """Return nnU-Net's variables and the folders they name."""
        return dict(zip(VARIABLES, (self.raw, self.preprocessed, self.results), strict=True))

    def describe(self) -> str:
        """Return one line that says where everything goes and why there."""
        if self == _workspace(self.root, self.chosen_by):
            return f"Workspace {self.root} ({self.chosen_by})"
        return (
            f"Workspace raw {self.raw}, preprocessed {self.preprocessed}, "
            f"results {self.results} ({self.chosen_by})"
        )


def resolve_workspace(
    dataset_folder: Path | None = None, workspace: str | Path | None = None
) -> Workspace:
    """Return the workspace; makes no folder.

    The first hit wins: `workspace` (the --workspace of the commands); nnU-Net's three variables
    together; a umamba.toml at or above the dataset, or above the current folder where no dataset
    folder is known (key `workspace`, relative to the file); the workspace the dataset itself lies
    in; <dataset>/umamba-work; ./umamba-work/<dataset name> where the dataset cannot be written to.
    Variables that `activate` set itself count only where no dataset folder is known.
    Raises ValueError when only some of the variables are set or a umamba.toml is broken.
    """
    if workspace:
        return _workspace(Path(workspace).expanduser().absolute(), "--workspace")
    from_variables = _from_variables()
    # a second dataset in one process shall not land in the first one's workspace by accident
    are_ours = _set_here == {v: os.environ.get(v) for v in VARIABLES}
    if from_variables is not None and (dataset_folder is None or not are_ours):
        return from_variables
    start = (dataset_folder or Path.cwd()).absolute()
    from_file = _from_file(start)
    if from_file is not None:
        return from_file
    if dataset_folder is None:
        return _workspace(start / FOLDER_NAME, "in the current folder")
    if start.parent.name == "raw" and (start.parent.parent / "preprocessed").is_dir():
        return _workspace(start.parent.parent, "the dataset lies in it")
    if os.access(start, os.W_OK):
        return _workspace(start / FOLDER_NAME, "in the dataset's folder")
    root = Path.cwd() / FOLDER_NAME / start.name
    return _workspace(root, "the dataset's folder cannot be written to")


def _workspace(root: Path, chosen_by: str) -> Workspace:
    if root.exists() and not root.is_dir():
        raise ValueError(f"The workspace {root} is a file; name a folder with --workspace DIR")
    return Workspace(root, root / "raw", root / "preprocessed", root / "results", chosen_by)


def _from_variables() -> Workspace | None:
    values = {name: os.environ.get(name, "").strip() for name in VARIABLES}
    missing = [name for name, value in values.items() if not value]
    if len(missing) == len(VARIABLES):
        return None
    if missing:
        present = " and ".join(name for name in VARIABLES if name not in missing)
        raise ValueError(
            f"{present} is set but {' and '.join(missing)} is not; "
            "set all three, unset them, or name a folder with --workspace DIR"
        )
    raw, preprocessed, results = (Path(v).expanduser().absolute() for v in values.values())
    return Workspace(raw.parent, raw, preprocessed, results, "the nnUNet_* variables")


def _from_file(start: Path) -> Workspace | None:
    for folder in (start, *start.parents):
        file = folder / "umamba.toml"
        if not file.is_file():
            continue
        try:
            content = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not valid TOML ({error}); correct or remove it") from error
        value = content.get("workspace")
        if value is None:
            continue
        if not isinstance(value, str) or not value:
            raise ValueError(f'{file}: write the workspace as text, workspace = "folder"')
        root = Path(os.path.normpath(folder / Path(value).expanduser()))
        return _workspace(root, str(file))
    return None
