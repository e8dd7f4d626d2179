"""A small synthetic 3D dataset with the difficulties of a real one, for the demo and for tests.

Every case is a body with organs placed in mm, so that the spacing, which differs from case to
case, matters: a large organ, two kidneys, a curved vessel beside a bone of nearly the same
brightness that has no label, and a small lesion in about half of the cases, as dark as the
tissue around the organs. A bias field, noise and partial volume make thresholds fail.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK
from scipy.spatial import cKDTree

from umamba.files import replacing, write_json

LABELS = {"background": 0, "large_organ": 1, "kidney": 2, "vessel": 3, "lesion": 4}
BODY, ORGAN, KIDNEY, VESSEL, LESION, BONE = 450.0, 600.0, 740.0, 860.0, 430.0, 900.0


def make_demo_dataset(folder: Path, n_train: int = 16, n_test: int = 3, seed: int = 0) -> Path:
    """Write the dataset in nnU-Net's raw format into `folder` and return `folder`.

    Images are about 40 x 56 x 56 voxels (z, y, x). The same arguments give the same voxels. The
    test cases lie in imagesTs, their labels in labelsTs.
    """
    folder = Path(folder)
    rng = np.random.default_rng(seed)
    has_lesion = np.concatenate([rng.permutation(np.arange(n) % 2 == 0) for n in (n_train, n_test)])
    for i in range(n_train + n_test):
        image, label = make_case(np.random.default_rng([seed, i]), bool(has_lesion[i]))
        part = "Tr" if i < n_train else "Ts"
        _write(image, folder / f"images{part}" / f"demo_{i:03d}_0000.nii.gz")
        _write(label, folder / f"labels{part}" / f"demo_{i:03d}.nii.gz")
    content = {
        "channel_names": {"0": "synthetic"},
        "labels": LABELS,
        "numTraining": n_train,
        "file_ending": ".nii.gz",
        "name": "Demo",
        "description": f"Synthetic organs of umamba, seed {seed}",
    }
    write_json(folder / "dataset.json", content)
    return folder


def make_case(
    rng: np.random.Generator, has_lesion: bool = True
) -> tuple[SimpleITK.Image, SimpleITK.Image]:
    """Return one image (float32) and its label map (uint8) with the same geometry."""
    shape = tuple(int(n + rng.integers(-3, 4)) for n in (40, 56, 56))
    in_plane = rng.uniform(0.9, 1.2)
    spacing = np.array([rng.uniform(1.6, 2.4), in_plane, in_plane])
    middle = (np.array(shape) - 1) / 2
    mm = (np.moveaxis(np.indices(shape), 0, -1) - middle) * spacing  # (z, y, x, 3)
    mm -= rng.uniform(-2, 2, 3)
    size = rng.uniform(0.9, 1.1)
    soft = float(spacing.mean()) / 2
    image = np.zeros(shape)
    label = np.zeros(shape, np.uint8)

    def paint(distance: np.ndarray, brightness: float, value: int) -> None:
        """Blend a structure in over about one voxel; `distance` in mm, negative inside."""
        share = 1 / (1 + np.exp(np.clip(distance / (soft / 2), -30, 30)))
        image[:] = image * (1 - share) + brightness * share
        label[distance < 0] = value

    def place(*center: float) -> np.ndarray:
        return size * (np.array(center) + rng.uniform(-1.5, 1.5, 3))

    paint(_ellipsoid(mm, place(0, 0, 0), size * np.array([60, 26, 27])), BODY, 0)
    t = np.linspace(-1, 1, 48)
    bone = np.stack([58 * t, 17 + 2 * t**2, rng.uniform(-3, 3) * t], axis=1)
    paint(cKDTree(size * bone).query(mm)[0] - 4.5 * size, BONE, 0)
    organ = place(8, -6, -8)
    radii = size * np.array([17, 12, 13]) * rng.uniform(0.88, 1.12, 3)
    organ_distance = _ellipsoid(mm, organ, radii, rng.uniform(-0.4, 0.4))
    paint(organ_distance, ORGAN, LABELS["large_organ"])
    for side in (-1, 1):
        kidney = place(-16, 8, 14 * side)
        radii = size * np.array([9, 5, 4.5]) * rng.uniform(0.9, 1.15, 3)
        paint(_ellipsoid(mm, kidney, radii, 0.3 * side), KIDNEY, LABELS["kidney"])
    bend, phase = rng.uniform(3, 6), rng.uniform(0, 2 * np.pi)
    y, x = 6 + bend * np.sin(2.5 * t + phase) / 2, 3 + bend * np.cos(2.0 * t + phase)
    vessel = size * np.stack([55 * t, y, x], axis=1)
    vessel_distance = cKDTree(vessel).query(mm)[0] - rng.uniform(2.4, 3.0) * size
    paint(vessel_distance, VESSEL, LABELS["vessel"])
    if has_lesion:
        center = organ + size * rng.uniform(-4.5, 4.5, 3)
        lesion = _ellipsoid(mm, center, size * rng.uniform(3.2, 4.8, 3))
        lesion[label != LABELS["large_organ"]] = 1e3
        paint(lesion, LESION, LABELS["lesion"])
    image *= _bias(rng, mm)
    image += rng.normal(0, 38, shape)
    first, second = _with_geometry(rng, spacing, image.astype(np.float32), label)
    return first, second


def _ellipsoid(
    mm: np.ndarray, center: np.ndarray, radii: np.ndarray, turn: float = 0.0
) -> np.ndarray:
    """Return the signed distance (mm, first order) to an ellipsoid turned in the axial plane."""
    c, s = np.cos(turn), np.sin(turn)
    turned = (mm - center) @ np.array([[1, 0, 0], [0, c, s], [0, -s, c]])
    return (np.linalg.norm(turned / radii, axis=-1) - 1) * float(np.min(radii))


def _bias(rng: np.random.Generator, mm: np.ndarray) -> np.ndarray:
    """Return a smooth factor between about 0.8 and 1.2."""
    unit = mm / np.abs(mm).max(axis=(0, 1, 2))
    slope, curve = rng.uniform(-0.12, 0.12, 3), rng.uniform(-0.08, 0.08, 3)
    return 1 + unit @ slope + unit**2 @ curve


def _with_geometry(
    rng: np.random.Generator, spacing: np.ndarray, *arrays: np.ndarray
) -> list[SimpleITK.Image]:
    """Return the arrays as images that lie alike, a little turned about the body's axis."""
    turn = rng.uniform(-0.1, 0.1)
    c, s = float(np.cos(turn)), float(np.sin(turn))
    origin = rng.uniform(-150, 150, 3).tolist()
    images = [SimpleITK.GetImageFromArray(array) for array in arrays]
    for image in images:
        image.SetSpacing(spacing[::-1].tolist())
        image.SetOrigin(origin)
        image.SetDirection((c, -s, 0.0, s, c, 0.0, 0.0, 0.0, 1.0))
    return images


def _write(image: SimpleITK.Image, path: Path) -> None:
    with replacing(path) as temporary:
        SimpleITK.WriteImage(image, str(temporary), True)
