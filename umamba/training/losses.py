"""The losses that a recipe may name, beside nnU-Net's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.utilities.ddp_allgather import AllGatherGrad
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn

TVERSKY_WEIGHT = 0.8
TVERSKY_REGIONS = (8, 8, 14)


def build_loss(
    name: str,
    weights: Sequence[float],
    stock: nn.Module,
    labels: LabelManager,
    *,
    batch_dice: bool,
    ddp: bool,
) -> nn.Module:
    """The loss of that name, in place of `stock`, which is nnU-Net's ("dice_ce").

    Args:
        weights: of cross-entropy and Dice in "dice_ce_all".
        stock: may be wrapped for deep supervision; the result is then wrapped with its weights.
        batch_dice: whether "region_tversky" sums over the batch.

    Raises ValueError for "region_tversky" where regions overlap: it has no definition there.
    """
    if name == "dice_ce":
        return stock
    if isinstance(stock, DeepSupervisionWrapper):
        each = build_loss(name, weights, stock.loss, labels, batch_dice=batch_dice, ddp=ddp)
        return DeepSupervisionWrapper(each, stock.weight_factors)
    ignore_label, regions = labels.ignore_label, labels.has_regions
    if name != "region_tversky":
        chosen = (1.0, 0.0) if name == "ce" else weights
        return CrossEntropyDice(chosen, regions=regions, ignore_label=ignore_label, ddp=ddp)
    if regions:
        raise ValueError(
            "recipe: loss region_tversky is for labels that exclude each other, and this dataset "
            "has overlapping regions: choose dice_ce or dice_ce_all"
        )
    return PlusRegionTversky(stock, RegionTversky(batch_dice, ignore_label))


class CrossEntropyDice(nn.Module):
    """Weighted sum of cross-entropy and 1 - Dice over all classes, the background among them.

    Labels: softmax, and Dice = (2 sum(p t) + s) / (sum(p^2) + sum(t^2) + s) over the whole batch
    (of all GPUs), s = 1e-5.  Equals the loss of JCruan519/VM-UNet for Synapse with weights (1, 1),
    of ziyangwang007/Mamba-UNet with (0.5, 0.5) and of gndlwch2w/msvm-unet with (0.4, 0.6).
    Regions: sigmoid, binary cross-entropy, and Dice = (2 sum(p t) + 1) / (sum(p) + sum(t) + 1) per
    sample, which is the loss of VM-UNet for ISIC.  Ignored voxels count in neither term.
    """

    def __init__(
        self,
        weights: Sequence[float] = (1.0, 1.0),
        *,
        regions: bool = False,
        ignore_label: int | None = None,
        ddp: bool = False,
    ) -> None:
        super().__init__()
        self.weight_ce, self.weight_dice = weights
        self.regions = regions
        self.ignore_label = ignore_label
        self.ddp = ddp

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """logits (B, C, *spatial); target as nnU-Net makes it: labels (B, 1, *spatial), or regions
        (B, C, *spatial), with the ignored voxels as a last channel where there are any."""
        logits = at_least_float32(logits)
        if self.regions:
            n_regions = logits.shape[1]
            truth = target[:, :n_regions].to(logits.dtype)
            valid = torch.ones_like(logits[:, :1])
            if self.ignore_label is not None:
                valid = 1 - target[:, n_regions:].to(logits.dtype)
            entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        else:
            truth, valid = one_hot(target, logits, self.ignore_label)
            entropy = F.cross_entropy(logits, truth, reduction="none")[:, None]
        n_valid = valid.sum().clamp(min=1) * entropy.shape[1]
        loss = self.weight_ce * (entropy * valid).sum() / n_valid
        if self.weight_dice == 0:
            return loss
        return loss + self.weight_dice * (1 - self._dice(logits, truth * valid, valid).mean())

    def _dice(self, logits: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
        spatial = tuple(range(2, logits.ndim))
        if self.regions:
            shares = logits.sigmoid() * valid
            overlap = (shares * truth).sum(spatial)
            return (2 * overlap + 1) / (shares.sum(spatial) + truth.sum(spatial) + 1)
        shares = logits.softmax(1) * valid
        axes = (0, *spatial)
        overlap = (shares * truth).sum(axes)
        size = (shares**2).sum(axes) + truth.sum(axes)
        if self.ddp:
            overlap, size = (AllGatherGrad.apply(part).sum(0) for part in (overlap, size))
        return (2 * overlap + 1e-5) / (size + 1e-5)


class RegionTversky(nn.Module):
    """MambaClinix's region-specific Tversky loss, -1 (best) to 0; arXiv 2409.12533.

    Each axis is cut into a number of regions (the last ones of TVERSKY_REGIONS in 2D), and shares
    of true positives, false positives and false negatives are taken per region, class and sample,
    or summed over the batch.  In each region alpha + beta x (its share of the errors) weighs the
    false positives, and so the false negatives.  Equals CYB08/MambaClinix-PyTorch@ba1af65,
    region_specific_tversky_losses.py, but for ignored voxels: there they are background, here
    shares are of the valid voxels, and regions without any do not count.
    """

    def __init__(
        self,
        batch_dice: bool,
        ignore_label: int | None = None,
        *,
        regions: Sequence[int] = TVERSKY_REGIONS,
        alpha: float = 0.3,
        beta: float = 0.4,
        smooth: float = 1e-5,
        background: bool = False,
    ) -> None:
        super().__init__()
        self.batch_dice = batch_dice
        self.ignore_label = ignore_label
        self.regions = tuple(regions)
        self.alpha, self.beta, self.smooth = alpha, beta, smooth
        self.first_class = 0 if background else 1

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """logits (B, C, *spatial), labels (B, 1, *spatial)."""
        logits = at_least_float32(logits)
        truth, valid = one_hot(target, logits, self.ignore_label)
        truth = truth[:, self.first_class :] * valid
        shares = logits.softmax(1)[:, self.first_class :] * valid
        n_axes = logits.ndim - 2
        pool_type = {2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[n_axes]
        pool = pool_type(self.regions[-n_axes:])
        seen = pool(valid)  # (B, 1, *regions)
        share = seen.clamp(min=1 / valid.numel())
        tp = pool(shares * truth) / share
        fp, fn = pool(shares) / share - tp, pool(truth) / share - tp
        if self.batch_dice:
            tp, fp, fn, seen = (part.sum(0, keepdim=True) for part in (tp, fp, fn, seen))
        wrong = fp + fn + self.smooth
        a = self.alpha + self.beta * (fp + self.smooth) / wrong
        b = self.alpha + self.beta * (fn + self.smooth) / wrong
        index = (tp + self.smooth) / (tp + a * fp + b * fn + self.smooth)
        counts = (seen > 0).to(index.dtype)
        return -(index * counts).sum() / (counts.sum().clamp(min=1) * index.shape[1])


class PlusRegionTversky(nn.Module):
    """MambaClinix's compound: nnU-Net's Dice and cross-entropy + 0.8 x RegionTversky."""

    def __init__(self, stock: nn.Module, tversky: RegionTversky) -> None:
        super().__init__()
        self.stock = stock
        self.tversky = tversky

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """logits (B, C, *spatial), labels (B, 1, *spatial)."""
        return self.stock(logits, target) + TVERSKY_WEIGHT * self.tversky(logits, target)


def one_hot(target: Tensor, logits: Tensor, ignore_label: int | None) -> tuple[Tensor, Tensor]:
    """Labels (B, 1, *spatial) as 0 and 1 in the logits' shape, and where they are valid (B, 1)."""
    valid = torch.ones_like(target, dtype=torch.bool)
    if ignore_label is not None:
        valid = target != ignore_label
    labels = torch.where(valid, target, 0).long()
    return torch.zeros_like(logits).scatter_(1, labels, 1), valid.to(logits.dtype)


def at_least_float32(logits: Tensor) -> Tensor:
    """Half-precision logits in float32: sums over voxels need it."""
    return logits if logits.dtype == torch.float64 else logits.float()
