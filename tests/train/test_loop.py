"""The training loop: several processes do what one does, a killed run goes on, and what it cannot do it refuses."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mmrecipes import models, train
from mmrecipes.errors import UserError
from mmrecipes.mini import curriculum, losses, siglip

RUN = """
import sys; sys.path[:0] = ["tests", "tests/train"]
import torch; torch.set_num_threads(1)
from pathlib import Path
import test_loop
getattr(test_loop, sys.argv[1])(Path(sys.argv[2]))
"""


def contrast(work: Path, steps: int = 4) -> nn.Module:
    """A tiny SigLIP learns from pairs; its weights go to `work`/weights.pt."""
    processor = siglip.make_processor()
    model = siglip.make_siglip(len(processor.tokenizer), 64, 1, 1)
    config = train.TrainConfig(steps, 4, 0.01, 1e-3, checkpoint_every=2)
    batches = curriculum.caption_batches("student", config, processor.tokenizer)
    train.fit(siglip.with_probes(model, 64), batches, siglip.dual_loss, config, work)
    torch.save(model.state_dict(), work / "weights.pt")
    return model


def long_contrast(work: Path) -> None:
    """The same, long enough to be killed."""
    contrast(work, steps=40)


def answers(work: Path) -> None:
    """A tiny VLM learns from a larger one, images and packed questions; its weights go to `work`/weights.pt."""
    import tiny
    from mmrecipes import distill

    config, weights = train.TrainConfig(3, 4, 0.01, 1e-3), distill.LossWeights(attention=1.0)
    batches = curriculum.chat_batches("student", config, tiny.processor().tokenizer)
    small = distill.distill(tiny.house(1), tiny.house(0, layers=2), batches, config, weights, work)
    torch.save(small.state_dict(), work / "weights.pt")


def run(what: str, work: Path, processes: int = 1) -> dict[str, torch.Tensor]:
    """The weights after `what` on so many processes, as `accelerate launch` starts them (gloo, CPU)."""
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--num_processes", str(processes), "--main_process_port", "0"]
    script = work.parent / "script.py"
    script.write_text(RUN)
    work.mkdir()
    command = [sys.executable, *(launch if processes > 1 else []), str(script), what, str(work)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(work / "weights.pt", weights_only=True)


@pytest.mark.parametrize("what", ["contrast", "answers"])
def test_two_processes_learn_what_one_learns_from_the_same_batch(what, tmp_path):
    one, two = run(what, tmp_path / "one"), run(what, tmp_path / "two", processes=2)
    losses = [train.read_log(tmp_path / name)["loss"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert losses[0][-1] != losses[0][0]
    for name, weight in one.items():
        assert torch.allclose(weight, two[name], atol=2e-3), name


def test_a_killed_run_goes_on_to_the_weights_of_one_never_killed(tmp_path):
    whole = run("long_contrast", tmp_path / "whole")
    killed = tmp_path / "killed"
    killed.mkdir()
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    command = [sys.executable, "-c", RUN, "long_contrast", str(killed)]
    process = subprocess.Popen(command, env=env)
    while not (killed / "checkpoint" / "progress.json").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9, "the run was over before it could be killed"
    assert not (killed / "weights.pt").exists()
    subprocess.run(command, env=env, check=True)
    after = torch.load(killed / "weights.pt", weights_only=True)
    assert all(torch.equal(whole[k], after[k]) for k in whole)
    assert train.read_log(killed)["step"] == list(range(40)), "every step is logged once"


# ---- a model of one matrix, whose loss is a mean over rows


def task(rows: int = 8, steps: int = 6):
    torch.manual_seed(0)
    return nn.Linear(3, 2), [torch.randn(rows, 3) for _ in range(steps)]


def squares(model, batch):
    far = (model(batch) - batch[:, :2]).square().mean()
    return far, {"far": far.item()}


def test_a_batch_in_parts_is_the_same_batch():
    trained = []
    for accumulate in (1, 4):
        model, batches = task()
        trained.append(train.fit(model, batches, squares, train.TrainConfig(6, 8, 0.1, 0.1, accumulate)).weight)
    assert torch.allclose(*trained, atol=1e-5)


def test_frozen_weights_stay_and_the_loss_falls(tmp_path):
    model, batches = task(steps=100)
    model.bias.requires_grad_(False)
    before = model.bias.clone()
    train.fit(model, batches, squares, train.TrainConfig(100, 8, 0.1, 0.1), tmp_path)
    losses = train.read_log(tmp_path)["loss"]
    assert torch.equal(model.bias, before) and losses[-1] < 0.5 * losses[0]
    assert not model.training and all(p.requires_grad == (n != "bias") for n, p in model.named_parameters())


@pytest.mark.parametrize(
    "config",
    [train.TrainConfig(0), train.TrainConfig(1, 0), train.TrainConfig(1, 8, accumulate=3), train.TrainConfig(1, 8, accumulate=0)],
)
def test_a_config_that_does_not_divide_is_refused(config):
    with pytest.raises(UserError, match="a batch that 1 processes"):
        train.fit(*task(), squares, config)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model, batches = task()
    with pytest.raises(UserError, match=r"step 0 is nan; lower lr \(it is 0.004\)"):
        train.fit(model, batches, lambda m, b: (m(b).sum() * float("nan"), {}), train.TrainConfig(6, 8), tmp_path)
    assert not (tmp_path / "checkpoint").exists()


def test_foreign_and_damaged_checkpoints_are_refused_and_kept(tmp_path):
    model, batches = task()
    train.fit(model, batches, squares, train.TrainConfig(6, 8), tmp_path)
    with pytest.raises(UserError, match="is of another run"):
        train.fit(*task(), squares, train.TrainConfig(5, 8), tmp_path)
    (tmp_path / "checkpoint" / "pytorch_model.bin").write_bytes(b"not weights")
    with pytest.raises(UserError, match="cannot be resumed"):
        train.fit(*task(), squares, train.TrainConfig(6, 8), tmp_path)
    assert (tmp_path / "checkpoint" / "pytorch_model.bin").read_bytes() == b"not weights"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be a folder for checkpoints"):
        train.fit(*task(), squares, train.TrainConfig(6, 8), tmp_path / "file")


def test_a_finished_run_is_not_run_again(tmp_path):
    model, batches = task()
    train.fit(model, batches, squares, train.TrainConfig(6, 8), tmp_path)
    again, _ = task()
    train.fit(again, [], squares, train.TrainConfig(6, 8), tmp_path)  # it would need a batch
    assert torch.equal(again.weight, model.weight)


def test_the_library_loads_what_was_trained(tmp_path):
    model = contrast(tmp_path)
    models.save(model, siglip.make_processor(), tmp_path / "out")
    assert type(models.load(tmp_path / "out")).__name__ == "SiglipModel"


def test_devices_and_ragged_batches_are_refused(tmp_path):
    for device in ("banana", "cuda:7"):
        with pytest.raises(UserError, match=f"device '{device}' cannot be used here"):
            train.fit(*task(), squares, train.TrainConfig(6, 8, device=device))
    ragged = [(torch.randn(8, 3), torch.randn(20, 3))]
    with pytest.raises(UserError, match=r"tensors of \[8, 20\] rows; to cut it in 2 parts all must have 8"):
        train.fit(nn.Linear(3, 2), ragged, squares, train.TrainConfig(1, 8, accumulate=2))


def test_sharded_training_is_refused_in_one_line(tmp_path, monkeypatch):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        model, batches = task()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(UserError, match=r"parameters are sharded .*notebook 53") as e:
            train.fit(model, batches, squares, train.TrainConfig(6, 8, device="cpu"))
        assert "\n" not in str(e.value)
    finally:
        dist.destroy_process_group()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch --use_fsdp` sets it, which a CPU ignores
    with pytest.raises(UserError, match="FSDP cuts matrices"):
        train.fit(*task(), squares, train.TrainConfig(6, 8, device="cpu"))


def test_a_run_about_something_else_is_not_resumed(tmp_path):
    config = train.TrainConfig(6, 8, about="these loss weights")
    train.fit(*task(), squares, config, tmp_path)
    with pytest.raises(UserError, match=r"is of another run .*these loss weights"):
        train.fit(*task(), squares, replace(config, about="those loss weights"), tmp_path)
    train.fit(*task(), squares, replace(config, device="cpu", checkpoint_every=3), tmp_path)  # where and how often may change


def test_something_may_be_done_after_each_step_of_the_optimizers():
    model, batches = task()
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    model.weight.data.mul_(mask)
    calls = []

    @torch.no_grad()
    def keep_zeros():
        calls.append((model.weight[mask == 0] != 0).any().item())
        model.weight.mul_(mask)

    train.fit(model, batches, squares, train.TrainConfig(6, 8, 0.1, 0.1), after_step=keep_zeros)
    assert calls == [True] * 6, "a step fills the zeros, and comes before"
    assert (model.weight[mask == 0] == 0).all() and (model.weight[mask == 1] != 0).all()


# ---- which parameters Muon trains


class Mixed(nn.Module):
    """A matrix, a point-wise and a depthwise convolution, an image's patches, an embedding, a head, and a marked map."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Linear(4, 4, bias=False)  # a name says nothing
        self.point_wise_conv = nn.Conv2d(4, 8, 1, bias=False)
        self.stem = nn.Conv2d(3, 4, 3, stride=2, bias=False)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4, bias=False)
        self.patches = nn.Conv2d(3, 4, 16, stride=16, bias=False)
        self.table = nn.Embedding(5, 4)
        self.lm_head = nn.Linear(4, 5, bias=False)
        self.tied_head = nn.Linear(4, 5, bias=False)
        self.tied_head.weight = self.table.weight
        self.maps = nn.Linear(4, 4)
        self.maps.use_adamw = True
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)


def test_muon_trains_matrices_and_not_what_is_marked():
    for model in (Mixed(), copy.deepcopy(Mixed())):  # a mark outlives a copy
        muon, adamw = ([p for g in o.param_groups for p in g["params"]] for o in train.optimizers([model], 0.1, 0.1))
        names = {id(p): name for name, p in model.named_parameters()}
        assert {names[id(p)] for p in muon} == {"embeddings.weight", "point_wise_conv.weight", "stem.weight"}
        assert {names[id(p)] for p in adamw} == {
            *("depthwise.weight", "patches.weight", "table.weight", "lm_head.weight", "maps.weight", "maps.bias")
        }


def test_probes_and_adapters_are_marked():
    import tiny

    adapted = train.add_lora(tiny.house(), 2)
    assert [type(o).__name__ for o in train.optimizers([adapted, copy.deepcopy(adapted)], 0.1, 0.1)] == ["AdamW"]
    probes = losses.Probes(8)
    muon, _ = train.optimizers([probes], 0.1, 0.1)
    assert {id(p) for p in muon.param_groups[0]["params"]} == {id(probes.between.weight), id(probes.middle.weight)}
