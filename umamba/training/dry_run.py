"""One training step of planned training on noise: the real network, loss and optimizer, no data."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from umamba.training.trainer import UMambaTrainer


class DryRun:
    """A training step that can be run again and again; nothing is left on the disk.

    network: that of the configuration, in the recipe's precision. image: (B, C, *patch) noise.
    """

    def __init__(self, plans: dict, configuration: str, dataset_json: dict, device: str) -> None:
        with _folders_for_a_while(), contextlib.redirect_stdout(io.StringIO()):
            trainer = UMambaTrainer(
                copy.deepcopy(plans) | {"continue_training": False},
                configuration,
                0,
                dataset_json,
                torch.device(device),
            )
            _pretend_preprocessed(Path(trainer.preprocessed_dataset_folder))
            trainer.initialize()
            trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
        self._trainer = trainer
        part = trainer.configuration_manager
        shape = (part.batch_size, trainer.num_input_channels, *part.patch_size)
        self.image = torch.randn(shape, device=trainer.device)
        self._batch = {"data": self.image, "target": self._targets(shape[2:])}

    @property
    def network(self) -> nn.Module:
        """The network that is trained, as the trainer holds it."""
        network: nn.Module = self._trainer.network
        return network

    def run(self) -> bool:
        """Does one training step; tells whether its loss is finite."""
        self._trainer.network.train()
        loss = float(self._trainer.train_step(self._batch)["loss"])
        return loss - loss == 0

    def _targets(self, patch_size: tuple[int, ...]) -> Tensor | list[Tensor]:
        """Labels as nnU-Net's transforms make them: int16 (B, 1, *), or bool for regions."""
        trainer, labels = self._trainer, self._trainer.label_manager
        n_samples = len(self.image)

        def draw(scale: list[float]) -> Tensor:
            spatial = [round(n * share) for n, share in zip(patch_size, scale, strict=True)]
            if not labels.has_regions:
                shape, highest = (n_samples, 1, *spatial), len(labels.foreground_labels) + 1
                return torch.randint(highest, shape, dtype=torch.int16, device=trainer.device)
            n_channels = labels.num_segmentation_heads + labels.has_ignore_label
            return torch.rand((n_samples, n_channels, *spatial), device=trainer.device) < 0.5

        scales = trainer._get_deep_supervision_scales() if trainer.enable_deep_supervision else None
        if scales is None:
            return draw([1.0] * len(patch_size))
        return [draw(scale) for scale in scales]


@contextlib.contextmanager
def _folders_for_a_while() -> Iterator[None]:
    """Lets nnU-Net's variables name folders that are gone afterwards."""
    names = ("nnUNet_preprocessed", "nnUNet_results")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update({name: f"{folder}/{name}" for name in names})
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _pretend_preprocessed(folder: Path) -> None:
    """The trainer tells by a case's ending how the data are stored."""
    folder.mkdir(parents=True)
    (folder / "case.b2nd").touch()
