"""Tests of the recipes' losses: ignored voxels, regions, deep supervision, and refusals."""

from types import SimpleNamespace

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from umamba.training.losses import CrossEntropyDice, RegionTversky, build_loss

IGNORE = 3
SHAPE = (2, 3, 9, 10, 15)


@pytest.fixture
def batch():
    """Logits (B, 3, *spatial) in float64 and labels 0 to 2 (B, 1, *spatial)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (SHAPE[0], 1, *SHAPE[2:]), generator=generator).float()
    return logits, labels


def stock_loss(batch_dice=True, ignore_label=None):
    dice = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False}
    return DC_and_CE_loss(
        dice, {}, ignore_label=ignore_label, dice_class=MemoryEfficientSoftDiceLoss
    )


def built(name, stock=None, *, weights=(1, 1), regions=False, ignore_label=None):
    labels = SimpleNamespace(has_regions=regions, ignore_label=ignore_label)
    stock = stock or stock_loss(ignore_label=ignore_label)
    return build_loss(name, weights, stock, labels, batch_dice=True, ddp=False)


@pytest.mark.parametrize("name", ["ce", "dice_ce_all", "region_tversky"])
def test_what_stands_at_ignored_voxels_changes_neither_value_nor_gradient(batch, name):
    logits, labels = batch
    ignored = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    labels[ignored] = IGNORE
    loss = built(name, ignore_label=IGNORE)
    other = torch.where(ignored, 7 * torch.ones_like(logits), logits)
    values = []
    for given in (logits, other):
        leaf = given.clone().requires_grad_()
        loss(leaf, labels).backward()
        values.append(loss(given, labels).item())
        assert leaf.grad.masked_select(ignored.expand_as(leaf)).abs().max() == 0
        assert leaf.grad.abs().max() > 0
    assert values[0] == pytest.approx(values[1], rel=1e-6)


@pytest.mark.parametrize("name", ["ce", "dice_ce_all", "region_tversky"])
def test_an_ignore_label_that_no_voxel_has_changes_nothing(batch, name):
    assert built(name)(*batch) == built(name, ignore_label=IGNORE)(*batch)


@pytest.mark.parametrize("name", ["ce", "dice_ce_all", "region_tversky"])
def test_a_batch_of_ignored_voxels_has_a_finite_loss_and_no_gradient(batch, name):
    logits, labels = batch
    leaf = logits.requires_grad_()
    loss = built(name, ignore_label=IGNORE)(leaf, torch.full_like(labels, IGNORE))
    loss.backward()
    assert torch.isfinite(loss)
    assert leaf.grad.abs().max() == 0


@pytest.mark.parametrize("name", ["ce", "dice_ce_all", "region_tversky"])
def test_ignored_slices_between_and_behind_the_others_leave_their_loss(batch, name):
    logits, labels = batch
    between = labels.repeat_interleave(2, 2)
    between[:, :, 1::2] = IGNORE
    behind = torch.cat([between, torch.full_like(between, IGNORE)], dim=2)
    more = logits.repeat_interleave(2, 2).repeat(1, 1, 2, 1, 1)
    loss = alone = built(name, ignore_label=IGNORE)
    if name == "region_tversky":
        loss, alone = (
            RegionTversky(True, IGNORE, regions=(n, 2, 2), background=True) for n in (6, 3)
        )
    assert loss(more, behind) == pytest.approx(alone(logits, labels).item(), rel=1e-12)


def test_a_perfect_and_certain_prediction_has_the_least_loss(batch):
    _, labels = batch
    logits = 100 * torch.nn.functional.one_hot(labels[:, 0].long(), 3).movedim(-1, 1).double()
    assert RegionTversky(False)(logits, labels) == pytest.approx(-1)
    assert CrossEntropyDice()(logits, labels) == pytest.approx(0, abs=1e-9)


def test_region_tversky_takes_the_last_regions_in_2d(batch):
    logits, labels = batch
    flat = RegionTversky(True)(logits[:, :, 0], labels[:, :, 0])
    deep = RegionTversky(True, regions=(1, 8, 14))(logits[:, :, :1], labels[:, :, :1])
    assert flat == deep


def test_cross_entropy_on_regions_is_nnunets_and_skips_ignored_voxels(batch):
    logits, labels = batch
    truth = torch.cat([labels > 0, labels > 1, labels == 0], dim=1).double()
    ignored = (labels == 2).double()
    stock = DC_and_BCE_loss({}, {"smooth": 1e-5, "ddp": False}, weight_dice=0)
    expected = stock(logits, truth)
    assert built("ce", stock, regions=True)(logits, truth) == pytest.approx(expected.item())
    loss = built("dice_ce_all", stock, regions=True, ignore_label=4)
    other = torch.where(ignored.bool(), -logits, logits)
    target = torch.cat([truth, ignored], dim=1)
    assert loss(logits, target) == pytest.approx(loss(other, target).item())
    assert loss(logits, target) != pytest.approx(loss(-logits, target).item())


def test_region_tversky_refuses_regions_with_the_cure():
    with pytest.raises(ValueError, match="choose dice_ce or dice_ce_all"):
        built("region_tversky", regions=True)


@pytest.mark.parametrize("name", ["ce", "dice_ce_all", "region_tversky"])
def test_each_output_of_deep_supervision_counts_with_nnunets_weight(batch, name):
    logits, labels = batch
    wrapped = DeepSupervisionWrapper(stock_loss(), [0.75, 0.25, 0.0])
    loss, single = built(name, wrapped), built(name)
    outputs = [logits, logits[:, :, ::2], logits[:, :, ::4]]
    targets = [labels, labels[:, :, ::2], labels[:, :, ::4]]
    expected = 0.75 * single(outputs[0], targets[0]) + 0.25 * single(outputs[1], targets[1])
    assert loss(outputs, targets) == pytest.approx(expected.item())
    assert built("dice_ce", wrapped) is wrapped


def test_half_precision_logits_are_summed_in_float32(batch):
    logits, labels = batch
    for name in ("ce", "dice_ce_all", "region_tversky"):
        loss = built(name)
        half = loss(logits.bfloat16(), labels)
        assert half.dtype == torch.float32
        assert half == pytest.approx(loss(logits, labels).item(), abs=5e-3)
