"""`umamba models fetch NAME`: where published weights are, and with --download, gets them."""

from __future__ import annotations

import argparse
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from umamba.cli import common
from umamba.files import OutputError, replacing

if TYPE_CHECKING:
    from umamba.networks.pretrained import PublishedFile

TIMEOUT_SECONDS = 30.0  # without a byte
CHUNK = 1 << 20


def run_fetch(args: argparse.Namespace) -> int:
    """Tell where published ImageNet weights are; with --download, get them.

    Nothing is put in place that agrees with no checksum, unless --trust says so.
    """
    from umamba.networks.pretrained import pretrained_folder

    entry = find_published(args.name)
    target = pretrained_folder() / entry.file
    recorded = f"{entry.sha256} (recorded by users; the authors publish none)"
    for label, value in {
        "file": entry.file,
        "address": entry.address,
        "licence": entry.licence,
        "size": f"{entry.parameters / 1e6:.1f} M parameters, {entry.parameters * 4e-6:.0f} MB",
        "sha256": recorded if entry.sha256 else "none is published",
        "for": ", ".join(entry.networks),
        "place": f"{target}{' (is there)' if target.is_file() else ''}",
    }.items():
        print(f"{label:<8} {value}")
    if not args.download:
        print(f"next: umamba models fetch {entry.name} --download")
        return 0
    pending = target.with_name(f"{target.name}.unchecked")
    if not pending.is_file():
        download(entry.address, pending)
    expected = (args.sha256 or entry.sha256 or "").lower()
    found = sha256_of(pending)
    if expected and found != expected:
        pending.unlink()
        raise ValueError(
            f"what came from {entry.address} has the sha256 {found}, not {expected}, and was "
            "deleted: give the right one with --sha256 HEX, or try again"
        )
    print(f"sha256 of what came: {found}")
    if not expected and not args.trust:
        print(
            f"it waits as {pending}: compare the checksum with one you trust and repeat the "
            "command with --sha256 HEX, or with --trust to take it as it is"
        )
        return 1
    os.replace(pending, target)
    print(f"in place: {target}")
    return 0


def find_published(name: str) -> PublishedFile:
    """The catalogue's entry of a name, or of the network of that name; UsageError otherwise."""
    from umamba.networks.pretrained import CATALOGUE, choose_file

    if name in CATALOGUE:
        return CATALOGUE[name]
    try:
        network = common.find_network(name)
    except common.UsageError:
        raise common.UsageError(
            f"no weights and no network are called {name!r}; there are {', '.join(CATALOGUE)}"
        ) from None
    with common.usage_errors():
        return CATALOGUE[choose_file(network)]


def download(address: str, target: Path) -> None:
    """Writes what is at an address to a file, whole or not at all, with a progress bar.

    ValueError where it cannot be reached or ends early.
    """
    from tqdm import tqdm

    try:
        with (
            replacing(target) as temporary,
            urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as source,
            open(temporary, "wb") as file,
        ):
            size = int(source.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=target.name) as bar:
                while chunk := source.read(CHUNK):
                    bar.update(file.write(chunk))
            if size and file.tell() != size:
                raise ValueError(f"{address} ended after {file.tell()} of {size} bytes; try again")
    except OutputError:
        raise
    except urllib.error.URLError as error:
        raise ValueError(
            f"{address} cannot be reached ({error.reason}); try again, or copy the file yourself"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"{address} could not be read to its end ({error}); try again") from error


def sha256_of(file: Path) -> str:
    """The checksum of a file, in hexadecimal digits."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
