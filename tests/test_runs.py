"""Runs of the scripts: what they leave, what they refuse, what an interruption costs."""

import csv
import gzip
import io
import itertools
import os
import runpy
import shutil
import sys
import types

import ablation
import compare
import numpy as np
import pytest
import representations
import torch
from conftest import ROOT

import beta_study
import common
import conv_vae
import ddpm
import dense_vae
from test_shapes import write_mnist

DDPM = "--timesteps", "4", "--steps", "2", "--fp32"


@pytest.fixture
def no_figures(monkeypatch):
    """Don't write figures, which takes most of the time of a short run."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **kwargs: None)


def interrupt(monkeypatch, owner, name, call, error=KeyboardInterrupt):
    """An error in one call of owner.name, the first of which is 0, Ctrl-C by default; returns the counter."""
    function, calls = getattr(owner, name), itertools.count()

    def interrupted(*args, **kwargs):
        if next(calls) == call:
            raise error
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    return calls


def held_out(out):
    return out.partition("Held-out loss: ")[2].partition("\n")[0]


@pytest.mark.parametrize(
    "script, options",
    [
        (dense_vae, ["--epochs", "0"]),
        (conv_vae, ["--channels", "32"]),
        (beta_study, ["--betas", "1", "-2"]),
        (ddpm, ["--guidance", "nan"]),
        (ddpm, ["--device", "cuda:99"]),
    ],
)
def test_a_wrong_option_is_named(script, options, capsys):
    with pytest.raises(SystemExit) as error:
        script.parse_args(options)
    message = capsys.readouterr().err
    assert error.value.code == 2 and message.startswith("usage: ") and options[0] in message.splitlines()[-1]


def test_options_that_torch_takes(monkeypatch):
    assert dense_vae.parse_args(["--seed", "-1"]).seed == -1
    assert conv_vae.parse_args(["--save-dir=~/x"]).save_dir == os.path.expanduser("~/x")
    monkeypatch.setattr(torch, "cpu", None)  # an older torch, which can't tell whether it has bfloat16
    for script in conv_vae, beta_study, ddpm:
        assert not script.parse_args(["--device", "cpu"]).bf16


@pytest.mark.parametrize("script", [conv_vae, ddpm])
def test_bfloat16_where_the_hardware_has_it(script, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert all(map(script.has_bf16, ("cpu", "cpu:0", torch.device("cpu"))))
    assert script.parse_args(["--device", "cpu:0"]).bf16
    assert not script.parse_args(["--device", "cpu", "--fp32"]).bf16


def run_as_script(script, argv, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, *argv])
    runpy.run_path(os.path.join(ROOT, f"{script}.py"), run_name="__main__")


@pytest.mark.parametrize("script", ["dense_vae", "conv_vae", "beta_study", "ddpm"])
def test_a_failed_run_ends_in_one_line(script, argv, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, torch.Tensor, "backward", 0, torch.OutOfMemoryError("Tried to allocate 99 GiB."))
        with pytest.raises(SystemExit, match=rf"^{script}\.py: .* 99 GiB\.$"):
            run_as_script(script, argv, monkeypatch)
        interrupt(patch, torch.Tensor, "backward", 0)
        with pytest.raises(SystemExit, match=rf"^{script}\.py: interrupted$"):
            run_as_script(script, argv, monkeypatch)
    (tmp_path / "file").write_text("a file where the folder should be")
    with pytest.raises(SystemExit, match=rf"^{script}\.py: .*File exists.*file"):
        run_as_script(script, [*argv, "--save-dir", str(tmp_path / "file")], monkeypatch)


def test_streams_and_backends_of_other_machines(monkeypatch):
    """A notebook's backend that is not installed here, and an output that has no é."""
    monkeypatch.setenv("MPLBACKEND", "module://missing.backend_inline")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    runpy.run_path(os.path.join(ROOT, "common.py"))
    assert "MPLBACKEND" not in os.environ
    print("Image enregistrée", flush=True)
    assert sys.stdout.buffer.getvalue() == b"Image enregistr?e\n"


def test_data_that_is_incomplete_or_damaged(mnist):
    raw = mnist / "MNIST" / "raw"
    processed = mnist / "MNIST" / "processed"  # of an old torchvision, which would read it instead
    processed.mkdir()
    for name in "training.pt", "test.pt":
        torch.save((torch.zeros(9, 28, 28, dtype=torch.uint8), torch.zeros(9)), processed / name)
    assert len(common.load_mnist(mnist)[0].dataset) == 100
    os.rename(raw / "t10k-labels-idx1-ubyte", raw / "t10k-labels.idx1-ubyte")
    before = {path.name: path.read_bytes() for path in raw.iterdir()}
    with pytest.raises(OSError, match="No such file.*t10k-labels-idx1-ubyte.*add what is missing"):
        common.load_mnist(mnist)
    assert before == {path.name: path.read_bytes() for path in raw.iterdir()}
    os.rename(raw / "t10k-labels.idx1-ubyte", raw / "t10k-labels-idx1-ubyte")
    with open(raw / "train-images-idx3-ubyte", "r+b") as f:
        f.truncate(1000)
    with pytest.raises(OSError, match=f"delete the folder {mnist}"):
        common.load_mnist(mnist)


def test_archives_and_interrupted_downloads(mnist, tmp_path, monkeypatch):
    """Whole archives are unpacked, and half of one is downloaded again; what fails leaves nothing behind."""
    raw = mnist / "MNIST" / "raw"
    whole = common.load_mnist(mnist)[0].dataset.tensors
    for path in list(raw.iterdir()):
        with gzip.open(f"{path}.gz", "wb") as f:
            f.write(path.read_bytes())
        path.unlink()
    assert all(map(torch.equal, whole, common.load_mnist(mnist)[0].dataset.tensors))

    half = tmp_path / "half" / "MNIST" / "raw"
    half.mkdir(parents=True)
    archive = (raw / "train-images-idx3-ubyte.gz").read_bytes()
    (half / "train-images-idx3-ubyte.gz").write_bytes(archive[: len(archive) // 2])

    def download(folder, download):
        shutil.copytree(raw, os.path.join(folder, "MNIST", "raw"))
        if next(calls) == 0:
            raise KeyboardInterrupt

    calls = itertools.count()
    monkeypatch.setattr(common, "MNIST", download)
    with pytest.raises(KeyboardInterrupt):
        common.load_mnist(tmp_path / "half")
    assert os.listdir(half) == ["train-images-idx3-ubyte.gz"]
    assert all(map(torch.equal, whole, common.load_mnist(tmp_path / "half")[0].dataset.tensors))


def test_why_a_download_fails(tmp_path, monkeypatch):
    interrupt(monkeypatch, common, "MNIST", 0, OSError(28, "No space left on device"))
    pip = ["ERROR: something", "ERROR: Could not install packages: No space left on device"]
    run = types.SimpleNamespace(returncode=1, stderr="\n".join(pip) + "\n")
    monkeypatch.setattr(common.subprocess, "run", lambda *args, **kwargs: run)
    with pytest.raises(OSError, match="can't be downloaded: .*No space left on device"):
        common.load_mnist(tmp_path)


@pytest.mark.parametrize("script", [dense_vae, conv_vae, ddpm])
def test_files_that_cannot_be_loaded(no_figures, script, argv, tmp_path, monkeypatch, capsys):
    options = [*DDPM, "--epochs", "2"] if script is ddpm else ["--latent-dim", "2"]
    script.main([*argv, *options])
    path = str(tmp_path / "out" / ("ddpm.pt" if script is ddpm else f"{script.__name__}_latent2.pt"))
    first = held_out(capsys.readouterr().out)
    script.main([*argv, *options, "--load", path])
    assert held_out(capsys.readouterr().out) == first

    other = conv_vae if script is dense_vae else dense_vae
    with pytest.raises(OSError, match=f"is a model of {script.__name__}.py"):
        other.load(path)
    with pytest.raises(OSError, match="No such file.*mistyped.pt"):
        script.load(tmp_path / "mistyped.pt")
    (tmp_path / "text.txt").write_text("no model")
    with pytest.raises(OSError, match="can't load .*text.txt: UnpicklingError: "):
        script.load(tmp_path / "text.txt")
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
    with pytest.raises(OSError, match=f"can't load {path}"):
        script.load(path)


@pytest.mark.parametrize("script", [dense_vae, ddpm])
def test_train_from_a_notebook(mnist, tmp_path, script, monkeypatch):
    """In a folder that is not there, with numpy's numbers; a run that fails leaves the model in place."""
    args = script.parse_args(["--epochs", "2", "--device", "cpu"])
    loader, _ = common.load_mnist(mnist, batch_size=50)
    path = tmp_path / "new" / "model.pt"
    args.lr, args.seed = np.float64(args.lr), np.int64(1)
    script.train(args, loader, path)
    before = path.read_bytes()
    args.lr = 1e300
    with pytest.raises(FloatingPointError, match="--lr"):
        script.train(args, loader, path)
    assert path.read_bytes() == before
    if script is ddpm:
        assert not (tmp_path / "new" / "checkpoint.pt").exists()

    args.lr = np.float64(1e-3)
    with monkeypatch.context() as patch:
        interrupt(patch, os, "replace", 0 if script is dense_vae else 2, PermissionError(13, "locked"))
        with pytest.raises(PermissionError, match="locked"):
            script.train(args, loader, path)
    assert path.read_bytes() == before
    script.load(tmp_path / "new" / "model.pt.new")  # the complete file is kept
    if script is ddpm:  # the checkpoint has numpy's number as a plain one
        args.resume = True
        script.train(args, loader, path)


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
    no_figures, script, vae, options, table, argv, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(vae, "ARCHITECTURES", [[4, 6]])
    monkeypatch.setattr(vae, "LATENT_DIMS", (2, 3))
    monkeypatch.setattr(conv_vae, "has_bf16", lambda device: False)
    trained = interrupt(monkeypatch, vae, "train_vae", 1)  # in the second model
    with pytest.raises(KeyboardInterrupt):
        script.main([*argv, *options])
    tables = []
    for _ in range(2):
        script.main([*argv, *options])
        tables.append((tmp_path / "out" / table).read_text())
    assert next(trained) == 3 and tables[0] == tables[1]
    assert capsys.readouterr().out.count("delete it after a change of the code") == 3
    rows = list(csv.DictReader(tables[0].splitlines()))
    assert len(rows) == 2
    if script is beta_study:
        assert float(rows[1]["kl"]) < 0.5 * float(rows[0]["kl"])  # beta=100 against beta=0
    with pytest.raises(OSError, match=r"lr 0.00\d, not 0.1: .*--save-dir"):
        script.main([*argv, *options, "--lr", "0.1"])
    if vae is conv_vae:
        with monkeypatch.context() as patch:
            patch.setattr(vae, "has_bf16", lambda device: True)
            with pytest.raises(OSError, match="bf16 False, not True"):
                script.main([*argv, *options])
    write_mnist(tmp_path / "other", transpose=True)
    with pytest.raises(OSError, match="images_crc32.*--save-dir"):
        script.main([*argv, *options, "--data-dir", str(tmp_path / "other")])


def test_an_option_that_somebody_adds_is_compared(mnist, tmp_path):
    loader, _ = common.load_mnist(mnist)
    args = dense_vae.parse_args(["--epochs", "1", "--device", "cpu"])
    path = str(tmp_path / "vae.pt")
    dense_vae.train(args, loader, path)
    dense_vae.train(args, loader, path, reuse=True)
    args.dropout = 0.1
    with pytest.raises(OSError, match="dropout None, not 0.1"):
        dense_vae.train(args, loader, path, reuse=True)
    dense_vae.train(args, loader, path)
    del args.dropout
    with pytest.raises(OSError, match="dropout 0.1, not None"):
        dense_vae.train(args, loader, path, reuse=True)


def closed(text, **kwargs):
    if text.startswith("Epoch"):
        raise BrokenPipeError


def test_ddpm_interrupted_and_resumed(no_figures, argv, tmp_path, monkeypatch):
    argv = [*argv[2:], *DDPM]  # without --epochs
    options = "--limit", "50", "--epochs", "3", "--lr", "0.001"
    ddpm.main([*argv, *options, "--save-dir", str(tmp_path / "whole")])
    with pytest.raises(OSError, match="nothing to resume: .*checkpoint.pt is not there"):
        ddpm.main([*argv, "--resume"])
    with monkeypatch.context() as patch:
        interrupt(patch, ddpm.DDPM, "train_step", 7)  # in the second epoch of 5 steps each
        with pytest.raises(KeyboardInterrupt):
            ddpm.main([*argv, *options])
    checkpoint = tmp_path / "out" / "checkpoint.pt"
    saved = torch.load(checkpoint)
    assert all(torch.equal(saved["model"][name], guide) for name, guide in saved["guide"].items())
    ddpm.main([*argv, "--load", str(checkpoint), "--save-dir", str(tmp_path / "figures")])
    with pytest.raises(OSError, match="unfinished training: --resume continues it"):
        ddpm.main([*argv, *options])
    for name, value, why in ("lr", "0.1", "lr 0.001, not"), ("epochs", "4", "falls to 0"):
        with pytest.raises(OSError, match=why):
            ddpm.main([*argv, "--resume", f"--{name}", value])
    write_mnist(tmp_path / "other", transpose=True)
    with pytest.raises(OSError, match="images_crc32"):
        ddpm.main([*argv, "--resume", "--data-dir", str(tmp_path / "other")])
    with monkeypatch.context() as patch:
        patch.setattr(ddpm, "train_epoch", lambda *_: float("nan"))
        with pytest.raises(FloatingPointError, match=f"try a smaller --lr, and delete {checkpoint}"):
            ddpm.main([*argv, "--resume"])
    with monkeypatch.context() as patch:  # the output is closed, as by head: the second epoch is kept
        patch.setattr(ddpm, "print", closed, raising=False)
        with pytest.raises(BrokenPipeError):
            ddpm.main([*argv, "--resume"])
    assert len(torch.load(checkpoint)["losses"]) == 2
    ddpm.main([*argv, "--resume"])
    assert not checkpoint.exists()
    whole, resumed = (torch.load(tmp_path / name / "ddpm.pt") for name in ("whole", "out"))
    for part in "model", "guide":
        assert all(torch.equal(weights, resumed[part][name]) for name, weights in whole[part].items())
    assert whole["losses"] == resumed["losses"]
    bias = "unet.final_conv.bias"
    assert not torch.equal(whole["model"][bias], whole["guide"][bias])


@pytest.mark.parametrize("epochs, guided_after", [(1, None), (2, 1), (30, 2)])
def test_guiding_model(mnist, monkeypatch, epochs, guided_after):
    """A copy after a twelfth of the epochs, at least one. Each pair of seed and epoch has its own seed."""

    def train_epoch(process, *_):
        process.model.unet.final_conv.bias.data.add_(1)
        return 0.0

    seeds = []
    monkeypatch.setattr(ddpm, "train_epoch", train_epoch)
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    loader, _ = common.load_mnist(mnist)
    for seed in 0, 1:
        process = ddpm.build_ddpm()
        for epoch, _, guide in ddpm.train_ddpm(process, loader, None, epochs, seed=seed):
            taken = guided_after is not None and epoch >= guided_after
            assert (guide and round(guide.unet.final_conv.bias.item())) == (guided_after if taken else None)
    assert len(set(seeds)) == len(seeds) == 2 * epochs and epoch == epochs


def test_the_annex(no_figures, argv, tmp_path, monkeypatch, capsys):
    """PyTorch's weights, the noise, Adam at a constant 1e-3, no clipping, algorithm 2; in its own folder."""
    monkeypatch.chdir(tmp_path)
    short = [*argv[:-2], "--timesteps", "4", "--fp32", "--limit", "50"]
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", None)
        ddpm.main([*short, "--annex"])
    assert "Samples in 4 steps, without a guiding model" in capsys.readouterr().out
    process, _ = ddpm.load("results/annex/ddpm.pt")
    assert isinstance(process.model, ddpm.SimpleMNistUNet) and process.options["lr"] == 1e-3
    torch.manual_seed(0)
    by_hand = ddpm.DDPM(ddpm.SimpleMNistUNet(), 4, 0.025, 0.999)
    loader, _ = common.load_mnist(argv[argv.index("--data-dir") + 1], batch_size=10, limit=50)
    torch.manual_seed(10**6)
    optimizer = torch.optim.Adam(by_hand.model.parameters(), lr=1e-3)
    for x, _ in loader:
        by_hand.train_step(2 * x - 1, optimizer)
    for weights, expected in zip(process.model.parameters(), by_hand.model.parameters()):
        torch.testing.assert_close(weights, expected, atol=1e-4, rtol=0)

    ddpm.main([*short, "--load", "results/annex/ddpm.pt", "--save-dir", "figures", "--steps", "2"])
    assert "Samples in 4 steps, without a guiding model" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        interrupt(patch, ddpm.DDPM, "train_step", 6)
        ddpm.main([*short, "--annex", "--epochs", "2"])
    capsys.readouterr()
    ddpm.main([*short[2:], "--resume", "--save-dir", "results/annex"])
    assert "Samples in 4 steps, without a guiding model" in capsys.readouterr().out
    ddpm.main([*short, "--annex", "--load", "results/annex/ddpm.pt", "--sampler", "fast", "--steps", "2"])
    assert "Samples in 2 steps, guidance 1.5" in capsys.readouterr().out
    ddpm.main([*short, "--load", "results/annex/ddpm.pt", "--sampler", "fast", "--steps", "2"])
    assert "Samples in 2 steps, guidance 1.5" in capsys.readouterr().out
    assert len(ddpm.load("results/annex/ddpm.pt")[0].losses) == 2


def test_compare(argv, mnist, tmp_path, capsys):
    dense_vae.main([*argv, "--latent-dim", "2"])
    ddpm.main([*argv, *DDPM])
    np.save(tmp_path / "samples.npy", np.random.rand(120, 1, 28, 28))
    out, folder = tmp_path / "out", tmp_path / "compare"
    paths = [str(out / "dense_vae_latent2.pt"), str(out / "ddpm.pt")]
    options = ["--data-dir", str(mnist), "--device", "cpu", "--save-dir", str(folder)]
    write_mnist(tmp_path / "other", transpose=True)
    with pytest.raises(OSError, match="trained on other images"):
        compare.main([*paths, *options, "--data-dir", str(tmp_path / "other")])
    np.save(tmp_path / "flat.npy", np.zeros((200, 784)))
    for name in "flat.npy", "missing.pt", "data":
        with pytest.raises(OSError, match=name):
            compare.main([str(tmp_path / name), *options])
    compare.main([*paths, str(tmp_path / "samples.npy"), *options, "--num-samples", "100"])
    rows = list(csv.DictReader((folder / "compare.csv").open()))
    assert [row["model"] for row in rows[3:]] == ["dense_vae_latent2", "ddpm", "samples"]
    assert float(rows[3]["loss"]) > 100 > 10 > float(rows[4]["loss"]) > 0 and rows[5]["loss"] == ""
    capsys.readouterr()
    representations.main([*paths, *options, "--num-images", "40"])
    assert capsys.readouterr().out.count("linear probe") == 3 * 3 + 1  # three curves at three t, and the VAE
    assert {"compare.csv", "cost.csv", "compare.png", "quality_cost.png"} <= set(os.listdir(folder))
    assert {"representations.csv", "representations.png", "latent_spaces.png"} <= set(os.listdir(folder))


def test_ablation(argv, mnist, tmp_path, monkeypatch, capsys):
    first = dict(list(ablation.ROWS.items())[:2])
    monkeypatch.setattr(ablation, "ROWS", first)
    options = "--epochs", "1", "--seeds", "0", "--num-samples", "100", "--device", "cpu"
    folders = "--data-dir", str(mnist), "--save-dir", str(tmp_path)
    for what in "ddpm", "dense", "conv":
        for _ in range(2):
            ablation.main([what, *options, *folders])
        rows = list(csv.DictReader((tmp_path / f"{what}.csv").open()))
        assert len(rows) == {"ddpm": 2, "dense": 4, "conv": 4}[what]
