"""Tests of the trainer on five tiny cases: learning, clock, checkpoints, NaN, transforms."""

import copy
import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._functorch.config
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from umamba.networks.checkpoint import read_checkpoint
from umamba.planning.plans import replan
from umamba.training.augmentation import thin_out
from umamba.training.checkpoints import BEST
from umamba.training.nnunet_hooks import ddp_wrapper
from umamba.training.progress import format_seconds
from umamba.training.recipes import get_recipe
from umamba.training.run import TrainingRun, fold_folder, train_fold
from umamba.training.trainer import UMambaTrainer

pytestmark = [
    pytest.mark.slow,
    # nnU-Net's logger takes the mean of Dice values of classes that a batch did not show.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def with_recipe(plans, **values):
    plans = copy.deepcopy(plans)
    plans["configurations"]["3d_fullres"]["recipe"].update(values)
    return plans


def trainer_of(plans, content, **values):
    plans = with_recipe(plans, **values)
    plans["continue_training"] = False
    return UMambaTrainer(plans, "3d_fullres", 0, content, torch.device("cpu"))


def no_validation(trainer, save_probabilities):
    """Stands in for the validation, which has tests of its own."""


def run_of(plans, content, **options):
    return TrainingRun(plans, "3d_fullres", 0, content, validator=no_validation, **options)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]


def test_a_short_training_learns_and_leaves_an_ordinary_model_folder(blobs, capsys):
    plans, content = blobs
    longer = with_recipe(plans, num_epochs=3, num_iterations_per_epoch=8)
    folder = train_fold(run_of(longer, content))
    found = records(folder)
    assert [r["epoch"] for r in found] == [0, 1, 2]
    assert found[-1]["train_loss"] < found[0]["train_loss"] - 0.1
    assert {p.name for p in folder.iterdir()} >= {"checkpoint_final.pth", "progress.png"}
    assert {p.name for p in folder.parent.iterdir()} >= {"plans.json", "dataset.json"}
    checkpoint = read_checkpoint(folder / "checkpoint_final.pth")
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    assert not list(folder.rglob(".*"))
    cost = json.loads((folder / "training.json").read_text())
    assert cost["iterations"] == 24
    assert cost["cpu_seconds"] > 0
    assert "pseudo Dice" in capsys.readouterr().out


def test_recomputed_mixers_learn_the_same(blobs):
    plans, content = blobs
    losses = []
    for recompute in ("none", "mixer"):
        wanted = with_recipe(plans, recompute=recompute, num_epochs=1)
        losses.append(records(train_fold(run_of(wanted, content)))[-1]["train_loss"])
    assert losses[0] == losses[1]
    trainer = trainer_of(plans, content, recompute="mixer")
    trainer.initialize()
    assert any(getattr(module, "recomputes", False) for module in trainer.network.modules())


@pytest.mark.parametrize("slow_down", [1.0, 3.0], ids=["steady machine", "machine slows down"])
def test_the_schedule_completes_in_the_given_time(blobs, monkeypatch, slow_down):
    plans, content = blobs
    clocked = with_recipe(
        plans, train_seconds=100.0, num_epochs=10, num_iterations_per_epoch=5, schedule="cosine"
    )
    trainer = trainer_of(clocked, content)
    now = [0.0]

    def step(self, batch):
        now[0] += 1.0 if now[0] < 50 else slow_down
        return {"loss": np.float32(0.5)}

    trainer.clock = lambda: now[0]
    monkeypatch.setattr(nnUNetTrainer, "train_step", step)
    trainer.run_training()
    assert 95 <= now[0] <= 105
    assert trainer.iteration == pytest.approx(50 + 50 / slow_down, abs=3)
    assert trainer.optimizer.param_groups[0]["lr"] < 0.02 * trainer.recipe.initial_lr


def test_a_training_ends_with_its_time_and_leaves_out_epochs_that_are_left(blobs, monkeypatch):
    plans, content = blobs
    clocked = with_recipe(
        plans, train_seconds=20.0, num_epochs=10, num_iterations_per_epoch=5, schedule="cosine"
    )
    trainer = trainer_of(clocked, content)
    now = [0.0]

    def step(self, batch):
        now[0] += 1.0 if now[0] < 9 else 100.0
        return {"loss": np.float32(0.5)}

    trainer.clock = lambda: now[0]
    monkeypatch.setattr(nnUNetTrainer, "train_step", step)
    trainer.run_training()
    folder = Path(trainer.output_folder)
    n_epochs = len(records(folder))
    assert (trainer.iteration, n_epochs, trainer.current_epoch) == (10, 4, 4)
    final = read_checkpoint(folder / "checkpoint_final.pth")
    assert final["current_epoch"] == 4
    assert len(final["logging"]["train_losses"]) == 4
    assert (folder / "progress.png").is_file()


def test_a_resumed_training_goes_on_with_weights_epoch_and_clock(blobs):
    plans, content = blobs
    first = train_fold(run_of(plans, content))
    before = read_checkpoint(first / "checkpoint_final.pth")
    (first / "checkpoint_final.pth").rename(first / "checkpoint_latest.pth")
    longer = with_recipe(plans, num_epochs=3)
    second = train_fold(run_of(longer, content, checkpoint=first / "checkpoint_latest.pth"))
    after = read_checkpoint(second / "checkpoint_final.pth")
    assert (before["current_epoch"], after["current_epoch"]) == (2, 3)
    assert after["umamba"]["iteration"] == 9
    assert after["umamba"]["trained_seconds"] > before["umamba"]["trained_seconds"]
    assert [r["epoch"] for r in records(second)] == [0, 1, 2]


def test_the_best_checkpoint_is_written_once_while_no_score_is_defined(blobs, monkeypatch):
    trainer, saved = trainer_of(*blobs), []
    monkeypatch.setattr(trainer, "_save", saved.append)
    monkeypatch.setattr(trainer, "_report_epoch", lambda epoch: None)
    monkeypatch.setattr(trainer.logger, "plot_progress_png", lambda folder: None)
    for epoch in range(3):
        for key in ("train_losses", "val_losses", "epoch_start_timestamps"):
            trainer.logger.log(key, 0.0, epoch)
        trainer.logger.log("dice_per_class_or_region", [np.nan, np.nan], epoch)
        trainer.logger.log("mean_fg_dice", np.nan, epoch)  # no batch showed a class
        trainer.on_epoch_end()
    assert saved == [BEST]


def test_a_loading_process_that_dies_during_a_step_is_said_in_one_sentence(blobs, monkeypatch):
    def step(self, batch):
        raise RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. ")

    monkeypatch.setattr(nnUNetTrainer, "train_step", step)
    with pytest.raises(ValueError, match="nnUNet_n_proc_DA=1"):
        trainer_of(*blobs).run_training()


def test_a_checkpoint_of_an_attacker_is_refused_before_it_runs(blobs, tmp_path):
    plans, content = blobs

    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    file = tmp_path / "evil.pth"
    torch.save({"network_weights": Attack()}, file)
    with pytest.raises(ValueError, match="not read"):
        trainer_of(plans, content).load_checkpoint(str(file))
    assert not (tmp_path / "touched").exists()


def test_a_non_finite_loss_is_named_and_undone_in_the_middle_of_training(blobs):
    plans, content = blobs
    trainer = trainer_of(plans, content)
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    trainer.train_step(batch)
    poisoned = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    poisoned["data"][0, 0, 0, 0, 0] = float("nan")
    trainer.train_step(poisoned)
    assert all(bool(torch.isfinite(p).all()) for p in trainer.network.parameters())
    assert (Path(trainer.output_folder) / "non_finite_1.pt").is_file()
    assert np.isfinite(trainer.train_step(batch)["loss"])


@pytest.fixture
def autocast_type_after():
    """What CUDA's autocast takes by default; put back afterwards, as the compiler's setting is."""
    before = torch.get_autocast_dtype("cuda")
    with torch._functorch.config.patch(backward_pass_autocast="same_as_forward"):
        yield lambda: torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", before)


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_the_default_precision_is_bf16_on_gpus_that_have_it_and_scaled_fp16_elsewhere(
    blobs, monkeypatch, autocast_type_after, has_bf16, dtype
):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    torch.set_autocast_dtype("cuda", torch.float32)
    trainer = trainer_of(*blobs)
    trainer.grad_scaler = scaler = object()
    trainer._settle_precision()
    assert autocast_type_after() == dtype
    assert torch._functorch.config.backward_pass_autocast == "off"
    assert trainer.grad_scaler is (None if has_bf16 else scaler)


def test_a_recipe_in_fp32_shields_the_network_from_autocast(blobs, autocast_type_after):
    before = autocast_type_after()
    trainer = trainer_of(*blobs, precision="fp32")
    trainer.grad_scaler = object()
    trainer.network = torch.nn.Linear(3, 2)
    trainer._settle_precision()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert trainer.network(torch.zeros(1, 3)).dtype == torch.float32
    assert trainer.grad_scaler is None
    assert autocast_type_after() == before


def test_a_compiled_network_trains_and_the_guard_looks_into_it(blobs, monkeypatch):
    compile_quickly = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compile_quickly)
    monkeypatch.setattr(UMambaTrainer, "_do_i_compile", lambda self: True)
    trainer = trainer_of(*blobs)
    trainer.on_train_start()
    assert hasattr(trainer.network, "_orig_mod")
    batch = next(trainer.dataloader_train)
    assert np.isfinite(trainer.train_step(batch)["loss"])
    trainer.set_deep_supervision_enabled(False)
    assert isinstance(trainer.network(batch["data"]), torch.Tensor)
    trainer.set_deep_supervision_enabled(True)
    trainer.train_step({**batch, "data": torch.full_like(batch["data"], 3e38)})
    saved = torch.load(Path(trainer.output_folder) / "non_finite_1.pt", weights_only=True)
    assert saved["culprit"].startswith("encoder.")
    assert np.isfinite(trainer.train_step(batch)["loss"])


def test_the_stock_trainer_class_builds_and_steps_our_plans(blobs):
    plans, content = blobs
    stock = copy.deepcopy(plans)
    stock["continue_training"] = False
    trainer = nnUNetTrainer(stock, "3d_fullres", 0, content, torch.device("cpu"))
    trainer.on_train_start()
    assert type(trainer.network).__name__ == "UMambaBot"
    assert np.isfinite(trainer.train_step(next(trainer.dataloader_train))["loss"])


def test_a_network_of_two_stages_trains_with_a_finite_loss(blobs):
    plans, content = blobs
    two = replan(plans, "3d_fullres", patch_size=[8, 8, 8], features_per_stage=[4, 8])
    assert len(two["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["strides"]) == 2
    trainer = trainer_of(two, content)
    trainer.on_train_start()
    assert np.isfinite(trainer.train_step(next(trainer.dataloader_train))["loss"])
    assert np.isfinite(trainer.validation_step(next(trainer.dataloader_val))["loss"])


def test_light_augmentation_drops_noise_and_narrows_the_spatial_limits(blobs):
    plans, content = blobs
    trainer = trainer_of(plans, content)
    arguments = ([16, 24, 16], (-0.5, 0.5), None, (0, 1, 2), False)
    full = nnUNetTrainer.get_training_transforms(*arguments)
    light = trainer.get_training_transforms(*arguments)
    none = nnUNetTrainer.get_training_transforms(*arguments)
    thin_out(none, "none")
    assert len(none.transforms) < len(light.transforms) < len(full.transforms)
    assert any(isinstance(t, MirrorTransform) for t in light.transforms)
    assert not any(isinstance(t, MirrorTransform) for t in none.transforms)
    batch = {"image": torch.randn(1, 20, 30, 20), "segmentation": torch.ones(1, 20, 30, 20)}
    once = none(**{k: v.clone() for k, v in batch.items()})["image"]
    again = none(**{k: v.clone() for k, v in batch.items()})["image"]
    assert torch.equal(once, again)


def test_without_mirroring_prediction_may_not_mirror_either(blobs):
    plans, content = blobs
    trainer = trainer_of(plans, content, mirroring=False)
    trainer.initialize()
    axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3]
    assert axes is None
    assert trainer.inference_allowed_mirroring_axes is None


def test_the_results_folder_is_known_before_training(blobs):
    plans, content = blobs
    trainer = trainer_of(plans, content)
    assert Path(trainer.output_folder) == fold_folder(run_of(plans, content))


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "0:05"), (125, "2:05"), (3725, "1:02:05"), (3 * 86400, "3.0 d")]
)
def test_time_left_reads_naturally(seconds, text):
    assert format_seconds(seconds) == text


def test_the_encoder_stands_still_while_frozen_and_moves_afterwards(blobs):
    plans, content = blobs
    trainer = trainer_of(plans, content, freeze_encoder=0.3)
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    encoder = list(trainer.network.encoder_parameters())
    decoder = list(trainer.network.decoder.parameters())

    def moved(parameters):
        before = [p.detach().clone() for p in parameters]
        trainer.on_train_epoch_start()
        trainer.train_step(batch)
        return [not torch.equal(a, b) for a, b in zip(before, parameters, strict=True)]

    assert not any(moved(encoder))
    assert any(moved(decoder))
    trainer.current_epoch, trainer.iteration = 1, 3  # the second of two epochs
    assert any(moved(encoder))


def test_a_resumed_training_freezes_only_what_is_left_of_the_share(blobs):
    plans, content = blobs
    frozen = with_recipe(plans, freeze_encoder=0.5, num_epochs=4)
    first = trainer_of(frozen, content)
    first.on_train_start()
    first.on_train_epoch_start()
    first.iteration = 6
    file = Path(first.output_folder) / "half.pth"
    first.current_epoch = 1  # saved as the one that is finished
    first.save_checkpoint(str(file))
    second = trainer_of(frozen, content)
    second.initialize()
    second.load_checkpoint(str(file))
    second.on_train_epoch_start()
    states = {p.requires_grad for p in second.network.encoder_parameters()}
    assert second.current_epoch == 2
    assert states == {True}


def test_a_training_by_the_recipe_of_another_network_learns(blobs):
    plans, content = blobs
    values = get_recipe("mamba_clinix_tversky") | {"initial_lr": 1e-2}
    trainer = trainer_of(plans, content, **values)
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    losses = [float(trainer.train_step(batch)["loss"]) for _ in range(6)]
    assert losses[-1] < losses[0] - 0.1


def test_several_gpus_look_for_unused_parameters_only_while_a_recipe_freezes():
    module = sys.modules[nnUNetTrainer.__module__]
    for wanted in (True, False):
        with ddp_wrapper(find_unused_parameters=wanted):
            assert module.DDP.keywords == {"find_unused_parameters": wanted}
    assert module.DDP is torch.nn.parallel.DistributedDataParallel


def test_several_gpus_follow_the_clock_of_the_first(blobs, monkeypatch):
    trainer = trainer_of(*blobs, train_seconds=100.0)

    def broadcast(numbers, source):
        numbers[0] = 99.0 if source == 0 else -1.0

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    assert not trainer._is_time_up()
    assert trainer.progress == 0.0
    trainer.is_ddp = True
    assert not trainer._is_time_up()
    assert trainer.progress == pytest.approx(0.99)


def test_an_epoch_takes_the_steps_of_nnunets_in_its_order():
    def calls_of(run):
        calls = []

        class Stub:
            current_epoch, num_epochs = 0, 2
            num_iterations_per_epoch, num_val_iterations_per_epoch = 2, 1
            dataloader_train = dataloader_val = Endless()
            _run_epoch = UMambaTrainer._run_epoch

            def _is_time_up(self):
                return False

            def on_epoch_end(self):
                calls.append("on_epoch_end")
                self.current_epoch += 1

            def __getattr__(self, name):
                return lambda *_: calls.append((name, torch.is_grad_enabled()))

        run(Stub())
        return calls

    class Endless:
        def __next__(self):
            return "batch"

        def close(self):
            """As the loaders have it."""

    assert calls_of(UMambaTrainer.run_training) == calls_of(nnUNetTrainer.run_training)
    assert len(calls_of(UMambaTrainer.run_training)) == 20
