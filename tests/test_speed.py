"""--amp, --compile and --workers: the same training step, in half the precision or compiled, and checkpoints that do not show it."""

import functools
import json
import threading

import pytest
import torch

import actupose
import data
import train


def two_steps(**changes):
    """Losses of two adaptation steps and the student after them, and the precisions its convolutions computed in."""
    settings = train.make_settings("demo", image_size=32, batch_size=4, source_count=8, target_count=8, **changes)
    trainer = train.Trainer(settings, data.BODY16, None, torch.device("cpu"))
    trainer.teacher = actupose.make_teacher(trainer.student)
    precisions = set()
    if not settings.compile:
        for network in (trainer.student, trainer.teacher):
            network.backbone.conv1.register_forward_hook(lambda module, inputs, output: precisions.add(output.dtype))
    source, target = (data.Mannequin(domain, "train", 32, 8) for domain in ("source", "target"))
    index = torch.arange(4)
    losses = [trainer.step(step, (index, *source[index]), (index, *target[index]))[0] for step in range(2)]
    return losses, trainer.student.state_dict(), precisions


def test_bf16_is_for_the_networks_alone():
    """The networks compute in bfloat16; losses and parameters are float32, and near those of float32 throughout: bfloat16
    has 8 bits, and the pose loss, a sum over the maps, agrees to about a percent."""
    exact, names, precisions = two_steps()
    assert precisions == {torch.float32}
    rounded, parameters, precisions = two_steps(amp="bf16")
    assert precisions == {torch.bfloat16}
    assert {name: p.dtype for name, p in parameters.items()} == {name: p.dtype for name, p in names.items()}
    # The second step starts from weights that the first moved by rounded gradients' signs (Adam).
    for a, b, tolerance in zip(exact, rounded, (0.02, 0.1)):
        assert b["mse"].dtype == torch.float32 and a["mse"] != b["mse"]
        for name in ("mse", "consistency"):
            assert torch.allclose(a[name], b[name], rtol=tolerance)


def test_compile_changes_neither_losses_nor_names(monkeypatch):
    """Both networks compile into whole graphs, and a checkpoint is the same with and without. (The compiler's last stage,
    which takes a minute, is left out.)"""
    exact, names, _ = two_steps()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    compiled, parameters, _ = two_steps(compile=True)
    assert parameters.keys() == names.keys()
    for a, b in zip(exact, compiled):
        for name in ("mse", "consistency"):
            assert torch.allclose(a[name], b[name], rtol=1e-3)


def test_a_run_in_bf16(tmp_path, monkeypatch):
    """From the command line to the scores; the setting is recorded."""
    monkeypatch.setattr(data.Mannequin, "DEFAULT_COUNTS", {k: min(n, 50) for k, n in data.Mannequin.DEFAULT_COUNTS.items()})
    tiny = ["--epochs", "2", "--pretrain-epochs", "1", "--iters-per-epoch", "1", "--batch-size", "4", "--source-count", "60",
            "--target-count", "30", "--style-iters", "2", "--vae-steps", "5", "--image-size", "32", "--device", "cpu"]
    assert train.main([*tiny, "--amp", "bf16", "--out", str(tmp_path / "r")]) == 0
    assert json.loads((tmp_path / "r" / "config.json").read_text())["amp"] == "bf16"
    assert train.main(["evaluate", str(tmp_path / "r"), "--device", "cpu"]) == 0


def test_a_gpu_without_bf16_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    with pytest.raises(train.UserError, match="--amp bf16: Old GPU"):
        train.train(train.make_settings("demo", amp="bf16"), tmp_path / "r")


def test_batches_are_drawn_in_one_thread(tmp_path, monkeypatch):
    """--workers decodes in threads; which samples a batch holds is settled in the thread of the run, since a Shuffler keeps
    its passes and is not made for several. The log is that of a run without workers."""
    drawing, threads = train.Shuffler.batch, set()

    def watched(*arguments):
        threads.add(threading.current_thread())
        return drawing(*arguments)

    monkeypatch.setattr(train.Shuffler, "batch", watched)
    logs = []
    for workers in ("0", "3"):
        out = tmp_path / workers
        assert train.main(["--method", "udape", "--epochs", "2", "--pretrain-epochs", "1", "--iters-per-epoch", "9", "--batch-size",
                           "4", "--source-count", "30", "--target-count", "10", "--style", "off", "--vae-steps", "2",
                           "--image-size", "32", "--device", "cpu", "--workers", workers, "--out", str(out)]) == 0
        logs.append((out / "log.jsonl").read_text())
    assert threads == {threading.main_thread()} and logs[0] == logs[1]
