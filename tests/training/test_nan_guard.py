"""Tests of the NaN guard: it names the culprit, rolls back, saves the batch, gives up in time."""

from pathlib import Path

import pytest
import torch
from torch import nn

from umamba.training.nan_guard import NanGuard, first_non_finite


class Overflow(nn.Module):
    def forward(self, x):
        return x / torch.zeros_like(x) if bool((x > 1e3).any()) else x


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), Overflow(), nn.Linear(4, 2))


def batch(scale):
    return {"data": torch.full((2, 3), scale), "target": torch.zeros(2, 2)}


def test_the_first_module_with_a_non_finite_output_is_named():
    network = small_network()
    with torch.no_grad():
        network[0].weight.fill_(1e6)
    assert first_non_finite(network, torch.ones(2, 3)).startswith("1 (Overflow)")


def test_a_non_finite_batch_is_told_from_a_non_finite_network():
    data = torch.ones(2, 3)
    data[0, 0] = float("inf")
    assert "batch itself" in first_non_finite(small_network(), data)


def test_a_bad_loss_restores_weights_and_optimizer_and_saves_the_batch(tmp_path):
    network = small_network()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    guard = NanGuard(network, optimizer, tmp_path, keep_every=1)
    before = [p.detach().clone() for p in network.parameters()]
    with torch.no_grad():
        network[0].weight.fill_(float("nan"))
    assert guard.check(batch(1.0), float("nan"))
    for old, new in zip(before, network.parameters(), strict=True):
        assert torch.equal(old, new)
    saved = torch.load(tmp_path / "non_finite_1.pt", weights_only=True)
    assert torch.equal(saved["data"], torch.ones(2, 3))
    assert [p.name for p in tmp_path.iterdir()] == ["non_finite_1.pt"]


def test_a_finite_loss_with_broken_weights_is_not_kept(tmp_path):
    network = small_network()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    guard = NanGuard(network, optimizer, tmp_path, keep_every=1)
    with torch.no_grad():
        network[0].weight.fill_(float("inf"))
    assert not guard.check(batch(1.0), 0.5)
    assert guard.check(batch(1.0), float("inf"))
    assert torch.isfinite(network[0].weight).all()


def test_the_search_for_the_culprit_leaves_no_mark_on_running_statistics(tmp_path):
    network = nn.Sequential(nn.Linear(3, 4), Overflow(), nn.BatchNorm1d(4))
    with torch.no_grad():
        network[0].weight.fill_(1e6)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    assert NanGuard(network, optimizer, tmp_path).check(batch(1.0), float("nan"))
    assert torch.equal(network[2].running_mean, torch.zeros(4))
    assert torch.equal(network[2].running_var, torch.ones(4))


def test_training_stops_after_too_many_events(tmp_path):
    network = small_network()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    guard = NanGuard(network, optimizer, tmp_path, max_events=2)
    assert guard.check(batch(1.0), float("nan"))
    with pytest.raises(RuntimeError, match=r"after 2 non-finite losses.*initial_lr"):
        guard.check(batch(1.0), float("nan"))


def test_an_epoch_starts_from_a_finite_state_that_a_bad_loss_goes_back_to(tmp_path):
    network = small_network()
    guard = NanGuard(network, torch.optim.SGD(network.parameters(), 0.1), tmp_path)
    weight = network[0].weight
    with torch.no_grad():
        weight.fill_(1.0)
        guard.start_epoch()
        weight.fill_(float("nan"))
        guard.start_epoch()
    assert guard.check(batch(1.0), float("nan"))
    assert torch.equal(weight, torch.ones_like(weight))


def test_a_batch_that_cannot_be_written_does_not_end_the_training(tmp_path, caplog):
    network = small_network()
    folder = tmp_path / "file"
    folder.write_text("in the way of the folder")
    guard = NanGuard(network, torch.optim.SGD(network.parameters(), 0.1), folder)
    assert guard.check(batch(1.0), float("nan"))
    assert "could not be written" in caplog.text


def train_on_two(rank: int, folder: Path) -> None:
    """Five steps of two processes as DDP makes them; the second's loss is NaN at the third."""
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=2)
    network = torch.nn.parallel.DistributedDataParallel(small_network())
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    guard = NanGuard(network.module, optimizer, folder, keep_every=1)
    undone = []
    for step in range(5):
        content = batch(float("nan") if (rank, step) == (1, 2) else rank + 1.0)
        optimizer.zero_grad()
        loss = network(content["data"]).square().mean()
        loss.backward()
        optimizer.step()
        undone.append(guard.check(content, float(loss)))
    torch.save((undone, network.module.state_dict()), folder / f"{rank}.pth")
    torch.distributed.destroy_process_group()


def test_several_gpus_undo_a_step_together_and_stay_equal(tmp_path):
    torch.multiprocessing.spawn(train_on_two, (tmp_path,), nprocs=2)
    (undone, weights), (also_undone, others) = (
        torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2)
    )
    assert undone == also_undone == [False, False, True, False, False]
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    saved = torch.load(tmp_path / "non_finite_1.pt", weights_only=True)
    assert "batch itself" in saved["culprit"]
