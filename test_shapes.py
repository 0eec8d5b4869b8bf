"""The smoke test, without network: python test_shapes.py (pytest finds the same functions).

The images are scikit-learn's digits, 8x8, enlarged to 28x28 and laid out as MNIST's files are.
"""

import contextlib
import io
import os
import runpy
import sys
import tempfile
import time
from unittest import mock

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.distributions import Normal, kl_divergence

import beta_study
import common
import conv_vae
import ddpm
import dense_vae

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.append(os.path.join(HERE, "benchmarks"))
import compare  # noqa: E402

VAES = dense_vae, conv_vae
DIGITS, LABELS = load_digits(return_X_y=True)
DIGITS = np.pad(np.kron(DIGITS.reshape(-1, 8, 8), np.ones((1, 3, 3))), ((0, 0), (2, 2), (2, 2)))
DIGITS, LABELS = (DIGITS * 255 / 16).astype(np.uint8), LABELS.astype(np.uint8)  # (1797, 28, 28), (1797,)


@contextlib.contextmanager
def small_mnist(n_train=300, n_test=50):
    """A temporary folder with a small data set in MNIST's format."""
    with tempfile.TemporaryDirectory() as folder:
        os.makedirs(f"{folder}/MNIST/raw")
        for split, part in ("train", slice(n_train)), ("t10k", slice(n_train, n_train + n_test)):
            n = len(LABELS[part])
            for name, header, array in (
                ("images-idx3", [0x803, n, 28, 28], DIGITS[part]),
                ("labels-idx1", [0x801, n], LABELS[part]),
            ):
                with open(f"{folder}/MNIST/raw/{split}-{name}-ubyte", "wb") as f:
                    f.write(np.array(header, ">i4").tobytes() + array.tobytes())
        yield folder


def run(function, *args, error=(), **kwargs):
    """(result, printed text), or the message of the `error` that must be raised; lists are command lines."""
    args = [[str(word) for word in arg] if isinstance(arg, list) else arg for arg in args]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            result = function(*args, **kwargs), out.getvalue()
        except error as raised:
            return f"{raised} {out.getvalue()}"
    assert error == (), f"{function} did not raise {error}"
    return result


def run_script(name, argv, **kwargs):
    """What `python NAME.py ARGV` prints."""
    with mock.patch.object(sys, "argv", [name, *map(str, argv)]):
        printed = run(runpy.run_path, os.path.join(HERE, f"{name}.py"), run_name="__main__", **kwargs)
    return printed if isinstance(printed, str) else printed[1]


def count(model):
    return sum(p.numel() for p in model.parameters())


# ---- The models


def test_parameter_counts():
    for d in dense_vae.LATENT_DIMS:
        for a, b in dense_vae.ARCHITECTURES:  # the decoder's layers
            by_hand = (784 * b + b) + (b * a + a) + 2 * (a * d + d)
            by_hand += (d * a + a) + (a * b + b) + (b * 784 + 784)
            assert count(dense_vae.build_vae(d, [a, b])) == by_hand
        for channels in conv_vae.ARCHITECTURES:
            a, b, *c = channels
            by_hand = (16 * a + a) + (16 * a * b + b) + (16 * b * a + a) + (16 * a + 1)
            by_hand += sum((9 * b * c + c) + (9 * c * b + b) for c in c)
            flat = 25 * c[0] if c else 49 * b
            assert count(conv_vae.build_vae(d, channels)) == by_hand + 2 * (flat * d + d) + (d * flat + flat)
    assert count(dense_vae.build_vae()) == 1_071_130  # the report's numbers, §2.6 and §3.3
    assert count(conv_vae.build_vae()) == 313_557
    assert count(ddpm.SimpleMNistUNet()) == 2_495_457


def test_shapes():
    x = torch.rand(3, 1, 28, 28)
    for script in VAES:
        for architecture in script.ARCHITECTURES:
            for d in 1, 10:
                x_recon, mu, logvar = script.build_vae(d, architecture)(x)
                assert x_recon.shape == x.shape and mu.shape == logvar.shape == (3, d)
                assert 0 <= x_recon.min() and x_recon.max() <= 1
    encoder, decoder = dense_vae.DenseEncoder(1024, 3, []), dense_vae.DenseDecoder(3, 1024, [8])
    assert dense_vae.VAE(encoder, decoder)(torch.rand(3, 1, 32, 32))[0].shape == (3, 1, 32, 32)
    run(dense_vae.DenseDecoder(3, 2 * 784), torch.randn(4, 3), error=RuntimeError)  # no 8 images out of 4 z

    unet, t = ddpm.SimpleMNistUNet(3, 3, time_emb_dim=8), torch.tensor([0, 999])
    assert unet(torch.randn(2, 3, 28, 28), t).shape == (2, 3, 28, 28)
    for sizes in (1, 1, 2), (1, 1, 7), (1, 3, 64):
        run(ddpm.SimpleMNistUNet, *sizes, error=ValueError)
    by_hand = [[f(k * 10000 ** (-i / 3)) for f in (np.sin, np.cos) for i in range(4)] for k in t.tolist()]
    embeddings = ddpm.SinusoidalPositionEmbeddings(8)(t)
    torch.testing.assert_close(embeddings, torch.tensor(by_hand).float(), atol=1e-4, rtol=0)


def test_reparameterize():
    for script in VAES:
        torch.manual_seed(0)
        mu, logvar = torch.tensor([[0.0, -1.0, 3.0]]), torch.tensor([[0.0, 2.0, -4.0]])
        z = script.VAE(None, None).reparameterize(mu.expand(100_000, 3), logvar.expand(100_000, 3))
        std = logvar.div(2).exp()
        assert torch.all((z.mean(0) - mu).abs() < 0.02 * std)
        assert torch.all((z.std(0) / std - 1).abs() < 0.02)

        model = script.build_vae(3)  # the reconstruction alone, without the KL, must reach mu and logvar
        model(torch.rand(4, 1, 28, 28))[0].sum().backward()
        assert model.encoder.fc_mu.weight.grad.abs().sum() > 0
        assert model.encoder.fc_logvar.weight.grad.abs().sum() > 0


def test_train_vae():
    with small_mnist() as folder:
        loader, _ = common.load_mnist(folder, batch_size=50)
    for script in VAES:
        torch.manual_seed(0)
        model = script.build_vae(5)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        before = sum(common.evaluate(model, loader))
        losses, out = run(script.train_vae, model, loader, optimizer, 4)
        assert sum(common.evaluate(model, loader)) < 0.8 * before
        assert len(losses) == 4 and f"Epoch [4/4] Average loss: {losses[3]:.4f}" in out
        model.encoder.fc_mu.bias.data.fill_(float("nan"))
        assert "--lr" in run(common.evaluate, model, loader, error=FloatingPointError)
        assert "--lr" in run(script.train_vae, model, loader, optimizer, error=FloatingPointError)


# ---- The loss and the data


def test_vae_loss():
    mu, logvar = torch.randn(2, 4, 3)
    x, x_recon = torch.rand(2, 4, 1, 28, 28)
    kl = kl_divergence(Normal(mu, logvar.div(2).exp()), Normal(0.0, 1.0)).sum()
    bce = torch.nn.functional.binary_cross_entropy(x_recon, x, reduction="sum")
    for beta in 0.0, 1.0, 2.5:
        torch.testing.assert_close(common.vae_loss(x_recon, x, mu, logvar, beta), bce + beta * kl)
    torch.testing.assert_close(common.vae_loss(x_recon, x, mu, logvar), bce + kl)

    # By hand: -ln 0.25 - ln(1 - 0.2) for the pixels 1 and 0; 0.5 * (1 + e - 1 - 1) for mu=1, logvar=1.
    pixels = torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.2])
    loss = common.vae_loss(pixels[1], pixels[0], torch.tensor([1.0]), torch.tensor([1.0]))
    assert abs(loss.item() - (1.3862944 + 0.2231436 + 0.5 * (2.7182818 - 1.0))) < 1e-5
    nan = float("nan")
    assert common.vae_loss(x_recon * nan, x, mu * nan, logvar).isnan()  # and no assertion


def test_loader():
    with small_mnist() as folder:
        train, test = common.load_mnist(folder, batch_size=128)
        limited, whole_test = common.load_mnist(folder, limit=20)
    assert len(train) == 3 and len(train.dataset) == 300
    passes = [list(train), list(train)]
    digits = {(image.tobytes(), label) for image, label in zip(DIGITS[:300], LABELS[:300].tolist())}
    for batches in passes:
        assert [len(x) for x, _ in batches] == [128, 128, 44]
        x, y = (torch.cat(tensors) for tensors in zip(*batches))
        assert x.dtype == torch.float32 and y.dtype == torch.int64 and x.shape == (300, 1, 28, 28)
        assert x.min() == 0 and x.max() == 1
        assert {(i.tobytes(), label) for i, label in zip(x.mul(255).byte().numpy(), y.tolist())} == digits
    assert not torch.equal(passes[0][0][1], passes[1][0][1])  # a new order
    assert torch.equal(torch.cat([y for _, y in test]), torch.from_numpy(LABELS[300:350]).long())
    assert (len(limited.dataset), len(whole_test.dataset)) == (20, 50)


def test_no_data():
    with small_mnist() as folder:
        with open(f"{folder}/MNIST/raw/train-images-idx3-ubyte", "r+b") as f:
            f.truncate(1000)
        assert f"delete the folder {folder}" in run(common.load_mnist, folder, error=OSError)
        os.remove(f"{folder}/MNIST/raw/train-images-idx3-ubyte")
        with mock.patch.object(common.MNIST, "download", side_effect=RuntimeError):
            with mock.patch("subprocess.run", return_value=mock.Mock(returncode=1)):
                assert "put its four files in" in run(common.load_mnist, folder, error=OSError)


def test_figures():
    z1, z2 = torch.randn(2, 7)
    z = common.interpolate_points(z1, z2, n_steps=5)
    torch.testing.assert_close(z[[0, 2, 4]], torch.stack([z1, (z1 + z2) / 2, z2]))
    with small_mnist() as folder:
        loader = torch.utils.data.DataLoader(common.load_mnist(folder)[1].dataset, 50)
        loader.dataset.tensors = loader.dataset.tensors[0].float() / 255, loader.dataset.tensors[1]
        for d in 1, 3:
            model, kwargs = dense_vae.build_vae(d, [8]), {"latent_dim": d, "save_dir": f"{folder}/out"}
            images = common.generate_samples(model, d)
            assert images.shape == (25, 1, 28, 28)
            run(common.plot_generated_images, images, **kwargs)
            run(common.plot_reconstructions, model, loader, **kwargs)
            run(common.plot_interpolation, model, **kwargs)
            run(common.plot_latent_space, model, loader, **kwargs)
            for name in "images_gen", "reconstructions", "interpolation", "latent_space":
                assert os.path.exists(f"{folder}/out/{name}_latent{d}.png")


def test_measures_of_the_beta_study():
    torch.manual_seed(0)
    means = torch.randn(50_000, 4) * torch.tensor([1.0, 0.2, 0.05, 0.0]) + 3  # variances 1, 0.04, 0.0025, 0
    assert beta_study.active_units(means) == 2
    assert abs(beta_study.gaussian_kl(torch.randn(100_000, 5))) < 1e-3
    for d in 1, 5:
        codes = 2 * torch.randn(100_000, d) + 1  # 0.5 * (sigma^2 + mu^2 - 1 - ln sigma^2) per dimension
        assert abs(beta_study.gaussian_kl(codes) - d * 0.5 * (4 + 1 - 1 - np.log(4))) < 0.05

    square = torch.rand(2, 5000, 2) - 0.5  # codes that fill a square of side 1
    prior = torch.cat([torch.rand(300, 2) - 0.5, torch.tensor([[9.0, 0.0]]), torch.rand(100, 2) + 3])
    share, remote = beta_study.empty_regions(prior, *square)
    assert abs(share - 101 / 401) < 0.03 and torch.equal(remote[0], prior[300])


def test_measures_of_the_comparison():
    torch.manual_seed(0)
    a = torch.randn(200_000, 3) * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([0.0, 1.0, 0.0])
    b = torch.randn(200_000, 3) * torch.tensor([2.0, 2.0, 1.0])
    assert abs(compare.frechet(a, b) - (1.0 + 1.0 + 0.25)) < 0.05  # |m_a - m_b|^2 + sum of (s_a - s_b)^2
    assert abs(compare.frechet(a, a)) < 1e-6

    square = torch.rand(2000, 2)
    assert compare.precision_recall(square, square) == (1.0, 1.0)
    assert compare.precision_recall(square, square + 5) == (0.0, 0.0)
    precision, recall = compare.precision_recall(square, torch.rand(2000, 2) * 0.5)  # a quarter of the square
    assert precision > 0.9 and 0.2 < recall < 0.35, (precision, recall)


# ---- The diffusion


class Network(torch.nn.Module):
    """A network whose output is known: predict(x, t)."""

    def __init__(self, predict):
        super().__init__()
        self.predict, self.weight = predict, torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, t):
        return self.predict(x, t)


def make_ddpm(predict=None, timesteps=1000):
    return run(ddpm.DDPM, Network(predict), timesteps)[0]


def alpha_bar(t, timesteps=1000):
    """alpha_bar_t by hand, in double precision, (B, 1, 1, 1)."""
    alpha_bars = np.cumprod(1 - np.linspace(1e-4, 0.02, timesteps))
    return torch.from_numpy(alpha_bars)[t].view(-1, 1, 1, 1)


def noise_in(x, t, x0):
    """The noise that leads from x_0 to x_t = x."""
    return ((x - alpha_bar(t).sqrt() * x0) / (1 - alpha_bar(t)).sqrt()).float()


def test_schedule():
    for timesteps in 2, 10, 100, 1000, 4000:  # x_T is noise, x_0 is not
        process, _ = run(ddpm.build_ddpm, timesteps)
        assert process.alpha_bars[-1] < 1e-3 and process.alpha_bars[0] > 0.9 and process.betas.max() < 1
    process, out = run(ddpm.DDPM, ddpm.build_unet())  # on the model's device
    assert "Nombre de timesteps: 1000" in out and process.device.type == "cpu"
    assert torch.equal(process.betas, torch.linspace(1e-4, 0.02, 1000))


def test_forward_process():
    torch.manual_seed(0)
    for t in 0, 100, 500, 999:
        t = torch.full((200,), t)
        x_t = make_ddpm().forward_process(torch.full((200, 1, 28, 28), 0.7), t)
        assert abs(x_t.mean() - 0.7 * alpha_bar(t)[0].sqrt()) < 0.01
        assert abs(x_t.var() / (1 - alpha_bar(t)[0]) - 1) < 0.02


def test_steps():
    """Both samplers step to the mean of q(x_{t-1} | x_t, x_0) and add noise (Ho et al., 2020, eq. 7)."""
    torch.manual_seed(0)
    x0, noises, randn_like = torch.randn(4, 1, 28, 28), [], torch.randn_like
    process = make_ddpm(lambda x, t: noise_in(x, t, x0))

    def recorded(x):
        noises.append(randn_like(x))
        return noises[-1]

    with mock.patch("torch.randn_like", recorded):
        xs, _ = run(ddpm.sample_fast, process, process.model, 4, 1000, 1.0)
        for t in 999, 500, 10, 1:
            x_t, x_s, now = xs[999 - t], xs[1000 - t], torch.full((4,), t)
            a_t, a_s = alpha_bar(now), alpha_bar(now - 1)
            mean = a_s.sqrt() * (1 - a_t / a_s) * x0 + (a_t / a_s).sqrt() * (1 - a_s) * x_t
            mean, variance = mean / (1 - a_t), (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
            expected = mean + variance.sqrt() * noises[999 - t]
            torch.testing.assert_close(x_s.double(), expected, atol=2e-3, rtol=1e-3)
            x_s = process.reverse_process(x_t, now)
            expected = mean + (1 - a_t / a_s).sqrt() * noises[-1]  # the report's variance is beta_t
            torch.testing.assert_close(x_s.double(), expected, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(xs[-1], x0, atol=1e-4, rtol=0)

    t = torch.tensor([0, 500, 0, 999])  # mixed: no noise is added where t = 0
    x_prev = process.reverse_process(process.forward_process(x0, t), t)
    torch.testing.assert_close(x_prev[[0, 2]], x0[[0, 2]], atol=1e-3, rtol=0)


def test_noise_from_v():
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 4, 1, 8, 8)
    t = torch.tensor([0, 10, 500, 999])
    angle = alpha_bar(t).sqrt().arccos().float()  # v is the derivative of cos(angle) x_0 + sin(angle) noise
    process = make_ddpm(lambda x, t: angle.cos() * noise - angle.sin() * x0)
    wrapped = ddpm.NoiseFromV(process.model, process.alpha_bars)
    torch.testing.assert_close(wrapped(process.forward_process(x0, t, noise), t), noise, atol=1e-4, rtol=0)


def best_noise(mean, variance):
    """The best prediction of the noise for data x_0 ~ N(mean, variance), each pixel on its own.

    x_t = sqrt(a) x_0 + sqrt(1 - a) noise has the variance a variance + 1 - a, and with x_0 the covariance
    sqrt(a) variance. All is Gaussian, so E[x_0 | x_t] = mean + gain (x_t - sqrt(a) mean), where the gain is
    covariance / variance of x_t. The best noise is the one that leads from this x_0 to x_t.
    """

    def predict(x, t):
        a = alpha_bar(t)
        gain = a.sqrt() * variance / (a * variance + 1 - a)
        return noise_in(x, t, mean + gain * (x - a.sqrt() * mean))

    return predict


def test_samples_of_gaussian_data():
    """With the best prediction, samples have the mean and the variance of the data."""
    torch.manual_seed(0)
    process = make_ddpm(best_noise(0.2, 0.1))
    xs, _ = run(ddpm.sample_fast, process, process.model, 50, 50, 1.0)
    for x in 2 * run(process.sample, 50)[0] - 1, xs[-1]:
        assert abs(x.mean() - 0.2) < 0.01 and 0.93 < x.var() / 0.1 < 1.07, (x.mean(), x.var())


def test_guidance():
    """Guidance 2 moves the samples away from a guide with a smaller mean, 0 towards it, 1 doesn't call it."""
    torch.manual_seed(0)
    process, guide = make_ddpm(best_noise(0.2, 0.1)), Network(None)
    means, times = [], []
    for guidance in 0.0, 1.0, 2.0:
        times.clear()
        guide.predict = lambda x, t: times.append(t[0].item()) or best_noise(0.0, 0.1)(x, t)
        means.append(run(ddpm.sample_fast, process, guide, 50, 30, guidance)[0][-1].mean().item())
        assert len(times) == (0 if guidance == 1 else 10) and all(200 <= t < 600 for t in times)
    assert means[0] < means[1] - 0.02 and means[1] + 0.02 < means[2], means


def test_train_step():
    torch.manual_seed(0)
    process, _ = run(ddpm.build_ddpm)
    optimizer = torch.optim.Adam(process.model.parameters(), 2e-3)
    x0 = torch.from_numpy(DIGITS[:16]).unsqueeze(1) / 127.5 - 1
    loader = mock.MagicMock(__iter__=lambda _: iter([(x0 / 2 + 0.5, None)]), dataset=x0)

    def loss():
        torch.manual_seed(1)
        return ddpm.evaluate(process, loader)

    before = loss()
    for _ in range(15):
        process.train_step(x0, optimizer)
    assert loss() < 0.7 * before

    gradients = []  # a step's own, without those of the steps before it
    for _ in range(2):
        torch.manual_seed(1)
        process.train_step(x0, torch.optim.SGD(process.model.parameters(), lr=0.0))
        gradients.append(process.model.unet.final_conv.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_ema():
    ema, model = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(ema.weight)
    by_hand = 0.0
    for step, weight, decay in (1, 3.0, 2 / 11), (2, 5.0, 3 / 12), (100_000, -700.0, 0.999):
        torch.nn.init.constant_(model.weight, weight)
        ddpm.update_ema(ema, model, step)
        by_hand = decay * by_hand + (1 - decay) * weight
        assert abs(ema.weight.item() - by_hand) < 1e-4


# ---- The scripts


def test_command_lines():
    """A short run of each script as `python script.py` makes it, in this process: torch is imported once."""
    names = "images_gen", "reconstructions", "interpolation", "latent_space"
    figures = [f"{name}_latent2.png" for name in names]
    diffusion = ["--timesteps", 2, "--steps", 2, "--num-samples", 100]
    with small_mnist(n_train=100) as folder:
        held_out = {}
        for name, options, files in (
            ("dense_vae", ["--latent-dim", 2], ["dense_vae_latent2.pt", *figures]),
            ("conv_vae", ["--latent-dim", 2], ["conv_vae_latent2.pt", *figures]),
            ("beta_study", ["--betas", 1], ["conv_vae_beta1.pt", "beta_study.csv", "beta_study.png"]),
            ("ddpm", diffusion, ["samples.npy", "denoising.png"]),
        ):
            argv = ["--data-dir", folder, "--save-dir", f"{folder}/{name}", "--epochs", 1, "--device", "cpu"]
            out = run_script(name, [*argv, *options])
            assert "Epoch [1/1] Average loss: " in out, out
            held_out[name] = out.partition("Held-out loss: ")[2].partition("\n")[0]
            assert set(files) <= set(os.listdir(f"{folder}/{name}")), name
            no_folder = [*argv, "--save-dir", f"{folder}/{name}/{files[0]}"]
            assert f"{name}.py: can't write in" in run_script(name, no_folder, error=SystemExit)

        with mock.patch.dict(os.environ, MPLBACKEND="module://missing.backend_inline"):
            run_script("common", [])  # a notebook's backend that is not installed here
            assert "MPLBACKEND" not in os.environ

        # The saved model gives the same held-out loss, and no other script takes it.
        path = f"{folder}/dense_vae/dense_vae_latent2.pt"
        load = ["--data-dir", folder, "--save-dir", f"{folder}/again", "--device", "cpu", "--load"]
        with mock.patch("matplotlib.figure.Figure.savefig"):
            _, again = run(dense_vae.main, [*load, path])
        assert held_out["dense_vae"] in again
        for script in conv_vae, ddpm:
            assert "not a model" in run(script.main, [*load, path], error=OSError)

        options = [*load[:2], "--device", "cpu", "--num-samples", 100, "--save-dir", f"{folder}/compare"]
        _, out = run(compare.main, [path, f"{folder}/ddpm/ddpm.pt", f"{folder}/ddpm/samples.npy", *options])
        assert out.count("linear probe") == 3 * 2 + 1  # three curves at t = 0 and 1, and the VAE
        names = "compare.csv", "compare.png", "quality_cost.png", "representations.png", "latent_spaces.png"
        assert set(names) <= set(os.listdir(f"{folder}/compare"))
        np.save(f"{folder}/flat.npy", np.zeros((200, 784)))
        for name in "flat.npy", "missing.pt", "compare/compare.csv":
            assert name in run(compare.main, [f"{folder}/{name}", *options], error=OSError)


def test_bad_options():
    for script, option, *values in (
        (dense_vae, "--epochs", 0),
        (dense_vae, "--latent-dim", 1.5),
        (dense_vae, "--lr", "nan"),
        (dense_vae, "--hidden-dims", 256, 0),
        (conv_vae, "--channels", 32),
        (conv_vae, "--beta", -1),
        (conv_vae, "--device", "cuda:99"),
        (beta_study, "--betas", 1, 2, 1.0),
        (ddpm, "--steps", 1001),
        (ddpm, "--guidance", "nan"),
    ):
        message = run(script.parse_args, [option, *values], error=SystemExit)
        assert f"argument {option}: " in message and "usage: " in message
        assert "--device cpu" in message or option != "--device"
    with mock.patch.object(torch, "cpu", None):  # an older torch
        assert conv_vae.parse_args(["--device", "cpu"]).precision == "fp32"


def test_bad_files_and_failing_runs():
    with small_mnist() as folder:
        torch.save([1, 2], f"{folder}/list")
        with open(f"{folder}/zip", "wb") as f:
            f.write(b"PK\3\4 cut short")
        argv = ["--data-dir", folder, "--device", "cpu", "--epochs", 1, "--batch-size", 10, "--save-dir"]
        for script in dense_vae, ddpm:
            for name in "list", "zip", "missing", "MNIST":
                assert name in run(script.main, [*argv, folder, "--load", f"{folder}/{name}"], error=OSError)
            assert "--save-dir" in run(script.main, [*argv, f"{folder}/zip"], error=OSError)

        run(dense_vae.main, [*argv, folder, "--latent-dim", 2])
        before = dense_vae.load(f"{folder}/dense_vae_latent2.pt").state_dict()
        run(dense_vae.main, [*argv, folder, "--latent-dim", 2, "--lr", 1e6], error=FloatingPointError)
        with mock.patch("os.replace", side_effect=OSError("no space left")):
            run(dense_vae.main, [*argv, folder, "--latent-dim", 2, "--seed", 1], error=OSError)
        after = dense_vae.load(f"{folder}/dense_vae_latent2.pt").state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)


@mock.patch("matplotlib.figure.Figure.savefig", mock.Mock())
def test_sweep_and_beta_study_train_nothing_twice():
    with small_mnist(n_train=100) as folder:
        argv = ["--epochs", 1, "--batch-size", 10, "--device", "cpu", "--data-dir", folder, "--save-dir"]
        for script, vae, options, name in (
            (dense_vae, dense_vae, ["--sweep"], "sweep"),
            (conv_vae, conv_vae, ["--sweep"], "sweep"),
            (beta_study, conv_vae, ["--latent-dim", 2, "--channels", 4, 6, "--betas", 0, 100], "beta_study"),
        ):
            command = [*argv, f"{folder}/{script.__name__}", *options]
            patches = mock.patch.multiple(vae, ARCHITECTURES=[[4, 6]], LATENT_DIMS=(2, 3))
            tables = []
            with patches, mock.patch.object(vae, "train_vae", wraps=vae.train_vae) as train:
                train.side_effect = mock.DEFAULT, KeyboardInterrupt, mock.DEFAULT
                run(script.main, command, error=KeyboardInterrupt)  # in the second model
                for _ in range(2):
                    run(script.main, command)
                    with open(f"{folder}/{script.__name__}/{name}.csv") as f:
                        tables.append(f.read())
                assert train.call_count == 3
                assert "--save-dir" in run(script.main, [*command, "--lr", 0.1], error=OSError)
            assert tables[0] == tables[1] and len(tables[0].splitlines()) == 3
            if script is beta_study:
                kl = [float(line.split(",")[2]) for line in tables[0].splitlines()[1:]]
                assert kl[1] < 0.5 * kl[0]  # beta=100 against beta=0


@mock.patch.object(ddpm, "plot_samples", mock.Mock())
def test_ddpm_killed_and_resumed():
    with small_mnist(n_train=48, n_test=16) as folder:
        argv = ["--epochs", 3, "--batch-size", 16, "--timesteps", 4, "--steps", 2, "--device", "cpu"]
        argv += ["--precision", "fp32", "--data-dir", folder, "--save-dir"]
        run(ddpm.main, [*argv, f"{folder}/whole"])
        out, checkpoint = [*argv, f"{folder}/out"], f"{folder}/out/checkpoint.pt"
        assert "checkpoint.pt" in run(ddpm.main, [*out, "--resume"], error=OSError)
        steps = mock.Mock(wraps=ddpm.DDPM.train_step, side_effect=[mock.DEFAULT] * 7 + [KeyboardInterrupt])
        with mock.patch.object(ddpm.DDPM, "train_step", lambda *args: steps(*args)):
            run(ddpm.main, out, error=KeyboardInterrupt)  # in the third epoch
        run(ddpm.main, [*out, "--load", checkpoint])
        assert "4 time steps" in run(ddpm.main, [*out, "--load", checkpoint, "--steps", 5], error=OSError)
        for option in ["--lr", 0.1], ["--predict", "noise"]:
            assert option[0] in run(ddpm.main, [*out, "--resume", *option], error=OSError)
        run(ddpm.main, [*out, "--resume"])
        whole, resumed = (
            torch.load(f"{folder}/{name}/ddpm.pt", weights_only=True) for name in ("whole", "out")
        )
        for part in "ema", "guide":
            assert all(torch.equal(weights, resumed[part][name]) for name, weights in whole[part].items())
        assert whole["losses"] == resumed["losses"]
        assert not torch.equal(whole["ema"]["unet.final_conv.bias"], whole["guide"]["unet.final_conv.bias"])

        with open(checkpoint, "r+b") as f:
            f.truncate(1000)
        assert "damaged" in run(ddpm.main, [*out, "--resume"], error=OSError)


if __name__ == "__main__":
    tests = [(name, test) for name, test in globals().items() if name.startswith("test_")]
    for name, test in tests:
        start = time.perf_counter()
        test()
        print(f"{name}: passed ({time.perf_counter() - start:.1f} s)", flush=True)
    print(f"{len(tests)} passed")
