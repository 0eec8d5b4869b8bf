"""Runs of the scripts: what they leave, what they refuse, what an interruption costs."""

import csv
import itertools
import os
import runpy
import sys

import compare
import numpy as np
import pytest
import torch
from conftest import ROOT

import beta_study
import common
import conv_vae
import ddpm
import dense_vae
from test_shapes import write_mnist

DDPM = "--timesteps", "4", "--steps", "2", "--precision", "fp32"


@pytest.fixture
def no_figures(monkeypatch):
    """Don't write figures, which takes most of the time of a short run."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **kwargs: None)


def interrupt(monkeypatch, owner, name, call):
    """Ctrl-C in place of one call of owner.name, the first of which is 0; returns the counter of calls."""
    function, calls = getattr(owner, name), itertools.count()

    def interrupted(*args, **kwargs):
        if next(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    return calls


def held_out(out):
    return out.partition("Held-out loss: ")[2].partition("\n")[0]


@pytest.mark.parametrize(
    "script, options",
    [
        (dense_vae, ["--epochs", "0"]),
        (dense_vae, ["--latent-dim", "1.5"]),
        (dense_vae, ["--lr", "nan"]),
        (dense_vae, ["--hidden-dims", "256", "0"]),
        (dense_vae, ["--seed", str(2**64)]),
        (conv_vae, ["--channels", "32"]),
        (conv_vae, ["--beta", "-1"]),
        (conv_vae, ["--device", "cuda:99"]),
        (beta_study, ["--betas", "1", "2", "1.0"]),
        (ddpm, ["--steps", "0"]),
        (ddpm, ["--guidance", "nan"]),
        (compare, ["--num-samples", "5"]),
    ],
)
def test_a_wrong_option_is_named(script, options, capsys):
    with pytest.raises(SystemExit) as error:
        script.parse_args(options)
    message = capsys.readouterr().err
    assert error.value.code == 2 and message.startswith("usage: ") and f"argument {options[0]}: " in message


def test_options_that_torch_takes(monkeypatch):
    assert dense_vae.parse_args(["--seed", "-1"]).seed == -1
    assert conv_vae.parse_args(["--save-dir=~/x"]).save_dir == os.path.expanduser("~/x")
    monkeypatch.setattr(torch, "cpu", None)  # an older torch, which can't tell whether it has bfloat16
    assert conv_vae.parse_args(["--device", "cpu"]).precision == "fp32"


@pytest.mark.parametrize("script", ["dense_vae", "conv_vae", "beta_study", "ddpm"])
def test_a_failed_run_ends_in_one_line(script, argv, tmp_path, monkeypatch):
    (tmp_path / "out").write_text("a file where the folder should be")
    monkeypatch.setattr(sys, "argv", [script, *argv])
    with pytest.raises(SystemExit, match=rf"^{script}\.py: can't write in .*--save-dir"):
        runpy.run_path(os.path.join(ROOT, f"{script}.py"), run_name="__main__")


def test_a_missing_backend_of_a_notebook_is_not_used(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://missing.backend_inline")
    runpy.run_path(os.path.join(ROOT, "common.py"))
    assert "MPLBACKEND" not in os.environ


def test_damaged_data(mnist):
    with open(mnist / "MNIST" / "raw" / "train-images-idx3-ubyte", "r+b") as f:
        f.truncate(1000)
    with pytest.raises(OSError, match=f"delete the folder {mnist}"):
        common.load_mnist(mnist)


@pytest.mark.parametrize("script", [dense_vae, conv_vae, ddpm])
def test_files_that_cannot_be_loaded(no_figures, script, argv, tmp_path, monkeypatch, capsys):
    options = DDPM if script is ddpm else ["--latent-dim", "2"]
    script.main([*argv, *options])
    path = str(tmp_path / "out" / ("ddpm.pt" if script is ddpm else f"{script.__name__}_latent2.pt"))
    first = held_out(capsys.readouterr().out)
    script.main([*argv, *options, "--load", path])
    assert held_out(capsys.readouterr().out) == first

    other = conv_vae if script is dense_vae else dense_vae
    with pytest.raises(OSError, match=f"it is a model of {script.__name__}.py"):
        other.load(path)
    with pytest.raises(OSError, match="there is no .*mistyped.pt"):
        script.load(tmp_path / "mistyped.pt")
    with pytest.raises(OSError, match="can't load .*Is a directory"):
        script.load(tmp_path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(OSError, match="can't load .*list.pt"):
        script.load(tmp_path / "list.pt")
    name = "SimpleMNistUNet" if script is ddpm else "VAE"  # the network is edited: a layer more
    network = getattr(script, name)

    class Edited(network):
        def __init__(self, *args):
            super().__init__(*args)
            self.added = torch.nn.Linear(1, 1)

    monkeypatch.setattr(script, name, Edited)
    with pytest.raises(OSError, match="Missing key.*added"):
        script.load(path)
    with open(path, "r+b") as f:
        f.truncate(1000)
    with pytest.raises(OSError, match="can't load"):
        script.load(path)


def test_fit_from_a_notebook(mnist, tmp_path):
    """In a folder that is not there, with numpy's numbers; a run that fails leaves the model in place."""
    args = dense_vae.parse_args(["--epochs", "1", "--latent-dim", "2", "--device", "cpu"])
    loader, _ = common.load_mnist(mnist, batch_size=10)
    path = tmp_path / "new" / "model.pt"
    args.lr, args.hidden_dims = np.float64(4e-3), (np.int64(8), 16)
    before = dense_vae.fit(args, loader, path).state_dict()
    assert dense_vae.load(path).options["lr"] == 4e-3 and dense_vae.fit(args, loader, path, reuse=True)
    args.lr = 1e6
    with pytest.raises(FloatingPointError, match="--lr"):
        dense_vae.fit(args, loader, path)
    args.lr = 4e-3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("no space")))
        with pytest.raises(OSError, match="no space"):
            dense_vae.fit(args, loader, path)
    after = dense_vae.load(path).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "script, vae, options, table",
    [
        (dense_vae, dense_vae, ["--sweep"], "sweep.csv"),
        (conv_vae, conv_vae, ["--sweep"], "sweep.csv"),
        (
            beta_study,
            conv_vae,
            ["--latent-dim", "2", "--channels", "4", "6", "--betas", "0", "100"],
            "beta_study.csv",
        ),
    ],
)
def test_sweep_and_study_train_nothing_twice(
    no_figures, script, vae, options, table, argv, tmp_path, monkeypatch
):
    monkeypatch.setattr(vae, "ARCHITECTURES", [[4, 6]])
    monkeypatch.setattr(vae, "LATENT_DIMS", (2, 3))
    trained = interrupt(monkeypatch, vae, "train_vae", 1)  # in the second model
    with pytest.raises(KeyboardInterrupt):
        script.main([*argv, *options])
    tables = []
    for _ in range(2):
        script.main([*argv, *options])
        tables.append((tmp_path / "out" / table).read_text())
    assert next(trained) == 3 and tables[0] == tables[1]
    rows = list(csv.DictReader(tables[0].splitlines()))
    assert len(rows) == 2
    if script is beta_study:
        assert float(rows[1]["kl"]) < 0.5 * float(rows[0]["kl"])  # beta=100 against beta=0
    with pytest.raises(OSError, match="--save-dir"):
        script.main([*argv, *options, "--lr", "0.1"])
    write_mnist(tmp_path / "other", 99)
    with pytest.raises(OSError, match="images.*--save-dir"):
        script.main([*argv, *options, "--data-dir", str(tmp_path / "other")])


def test_ddpm_interrupted_and_resumed(no_figures, argv, tmp_path, monkeypatch):
    argv = [*argv, *DDPM, "--limit", "50", "--epochs", "3"]
    ddpm.main([*argv, "--save-dir", str(tmp_path / "whole")])
    with pytest.raises(OSError, match="there is no .*checkpoint.pt"):
        ddpm.main([*argv, "--resume"])
    with monkeypatch.context() as patch:
        interrupt(patch, ddpm.DDPM, "train_step", 7)  # in the second epoch of 5 steps each
        with pytest.raises(KeyboardInterrupt):
            ddpm.main(argv)
    checkpoint = tmp_path / "out" / "checkpoint.pt"
    saved = torch.load(checkpoint)
    assert all(torch.equal(saved["ema"][f"module.{name}"], guide) for name, guide in saved["guide"].items())
    ddpm.main([*argv, "--load", str(checkpoint), "--save-dir", str(tmp_path / "figures")])
    for name, value in ("lr", "0.1"), ("predict", "noise"), ("seed", "1"):
        with pytest.raises(OSError, match=f"trained with {name} "):
            ddpm.main([*argv, "--resume", f"--{name}", value])
    ddpm.main([*argv, "--resume"])
    whole, resumed = (torch.load(tmp_path / name / "ddpm.pt") for name in ("whole", "out"))
    for part in "ema", "guide":
        assert all(torch.equal(weights, resumed[part][name]) for name, weights in whole[part].items())
    assert whole["losses"] == resumed["losses"]
    bias = "unet.final_conv.bias"
    assert not torch.equal(whole["ema"][f"module.{bias}"], whole["guide"][bias])
    with open(checkpoint, "r+b") as f:
        f.truncate(1000)
    with pytest.raises(OSError, match="can't load .*checkpoint.pt"):
        ddpm.main([*argv, "--resume"])


def test_compare(argv, mnist, tmp_path, capsys):
    dense_vae.main([*argv, "--latent-dim", "2"])
    ddpm.main([*argv, *DDPM, "--num-samples", "100"])
    out, folder = tmp_path / "out", tmp_path / "compare"
    paths = [str(out / name) for name in ("dense_vae_latent2.pt", "ddpm.pt", "samples.npy")]
    options = ["--data-dir", str(mnist), "--device", "cpu", "--num-samples", "100", "--save-dir", str(folder)]
    write_mnist(tmp_path / "other", 150, 150)
    with pytest.raises(OSError, match="trained on other images"):
        compare.main([*paths, *options, "--data-dir", str(tmp_path / "other")])
    np.save(tmp_path / "flat.npy", np.zeros((200, 784)))
    for name in "flat.npy", "missing.pt", "data":
        with pytest.raises(OSError, match=name):
            compare.main([str(tmp_path / name), *options])
    capsys.readouterr()
    compare.main([*paths, *options])
    names = "compare.csv", "compare.png", "quality_cost.png", "representations.png", "latent_spaces.png"
    assert set(names) <= set(os.listdir(folder))
    assert capsys.readouterr().out.count("linear probe") == 3 * 3 + 1  # three curves at three t, and the VAE
