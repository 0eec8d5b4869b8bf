"""The quick smoke test: python test_shapes.py (no network, 20 seconds). The thorough one: pytest, in tests/.

The images are scikit-learn's digits, 8x8, enlarged to 28x28 and laid out as MNIST's files are.
"""

import contextlib
import io
import os
import tempfile

import numpy as np
import torch
from sklearn.datasets import load_digits

import beta_study
import common
import conv_vae
import ddpm
import dense_vae


def write_mnist(folder, n_train=100, n_test=20, transpose=False):
    """Write a small data set into `folder`, in MNIST's format; returns all the digits and their labels."""
    images, labels = load_digits(return_X_y=True)
    images = np.pad(np.kron(images.reshape(-1, 8, 8), np.ones((3, 3))), ((0, 0), (2, 2), (2, 2)))
    images, labels = (images * 255 / 16).astype(np.uint8), labels.astype(np.uint8)
    images = images.transpose(0, 2, 1) if transpose else images
    os.makedirs(f"{folder}/MNIST/raw")
    for split, part in ("train", slice(n_train)), ("t10k", slice(n_train, n_train + n_test)):
        for name, header, array in (
            ("images-idx3", [0x803, len(images[part]), 28, 28], images[part]),
            ("labels-idx1", [0x801, len(labels[part])], labels[part]),
        ):
            with open(f"{folder}/MNIST/raw/{split}-{name}-ubyte", "wb") as f:
                f.write(np.array(header, ">i4").tobytes() + array.tobytes())
    return images, labels


def short_run(script, model, *options):
    """Run main() on a few images, check that it has learnt; returns the names of the files that it leaves."""
    with tempfile.TemporaryDirectory() as folder:
        write_mnist(folder)
        argv = ["--data-dir", folder, "--save-dir", f"{folder}/out", "--device", "cpu"]
        script.main([*argv, "--epochs", "3", "--batch-size", "5", *options])
        losses = torch.load(f"{folder}/out/{model}")["losses"]
        assert losses[-1] < 0.7 * losses[0], losses
        return set(os.listdir(f"{folder}/out"))


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts():
    assert count(dense_vae.build_vae()) == 1_071_130  # report, §2.6
    assert count(conv_vae.build_vae()) == 313_557  # report, §3.3
    assert count(conv_vae.build_vae(10, [32, 64])) == 163_925  # two layers, counted by hand
    assert count(ddpm.SimpleMNistUNet()) == 2_495_457  # the annex's listing, counted


def test_shapes_of_the_vaes():
    x = torch.rand(3, 1, 28, 28)
    for script in dense_vae, conv_vae:
        for architecture in script.ARCHITECTURES:
            for d in 1, 10:
                vae = script.build_vae(d, architecture)
                x_recon, mu, logvar = vae(x)
                assert x_recon.shape == x.shape and mu.shape == logvar.shape == (3, d)
                assert 0 <= x_recon.min() and x_recon.max() <= 1
                assert vae.decode(torch.randn(d)).shape == (1, 1, 28, 28)  # a single z


def test_shapes_of_the_unet():
    t = torch.tensor([0, 999])
    assert ddpm.SimpleMNistUNet()(torch.randn(2, 1, 28, 28), t).shape == (2, 1, 28, 28)
    assert ddpm.SimpleMNistUNet(3, 2, time_emb_dim=8)(torch.randn(2, 3, 32, 32), t).shape == (2, 2, 32, 32)
    assert ddpm.SinusoidalPositionEmbeddings(64)(t).shape == (2, 64)
    process = ddpm.build_ddpm(timesteps=4)
    assert process.sample(2).shape == (2, 1, 28, 28)
    xs = ddpm.sample_fast(process, num_samples=2, steps=3, guide=process.model)
    assert [x.shape for x in xs] == 4 * [(2, 1, 28, 28)]  # from pure noise to x_0


def test_loss_by_hand():
    x, x_recon = torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.2])
    mu, logvar = torch.tensor([1.0]), torch.tensor([1.0])
    bce = 1.3862944 + 0.2231436  # -ln 0.25 - ln(1 - 0.2)
    kl = 0.5 * (1.0 + 2.7182818 - 1.0 - 1.0)  # (mu^2 + sigma^2 - 1 - ln sigma^2) / 2
    for beta in 0.0, 1.0, 2.5:
        assert abs(common.vae_loss(x_recon, x, mu, logvar, beta).item() - (bce + beta * kl)) < 1e-5


FIGURES = {
    f"{name}_latent2.png" for name in ("images_gen", "reconstructions", "interpolation", "latent_space")
}


def test_dense_vae():
    files = short_run(dense_vae, "dense_vae_latent2.pt", "--latent-dim", "2")
    assert files == FIGURES | {"dense_vae_latent2.pt", "loss.png"}


def test_conv_vae():
    files = short_run(conv_vae, "conv_vae_latent2.pt", "--latent-dim", "2")
    assert files == FIGURES | {"conv_vae_latent2.pt", "loss.png"}


def test_beta_study():
    files = short_run(beta_study, "conv_vae_beta1.pt", "--betas", "1")
    assert files >= {"conv_vae_beta1.pt", "beta_study.csv", "beta_study.png", "rate_distortion.png"}


def test_ddpm():
    files = short_run(ddpm, "ddpm.pt", "--steps", "3", "--epochs", "6")
    assert files == {"ddpm.pt", "noising.png", "denoising.png", "samples.png", "loss.png"}


if __name__ == "__main__":
    tests = [(name, test) for name, test in globals().items() if name.startswith("test_")]
    for name, test in tests:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            test()
        print(f"{name}: passed", flush=True)
    print(f"{len(tests)} passed")
