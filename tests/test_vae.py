"""The mathematics of the VAEs, of their data and of the measures."""

import os

import compare
import numpy as np
import pytest
import rulers
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence
from torch.utils.data import DataLoader, random_split

import beta_study
import common
import conv_vae
import ddpm
import dense_vae
from test_shapes import write_mnist

both = pytest.mark.parametrize("script", [dense_vae, conv_vae])


@both
def test_reparameterize_has_the_mean_and_the_variance(script):
    torch.manual_seed(0)
    mu, logvar = torch.tensor([[0.0, -1.0, 3.0]]), torch.tensor([[0.0, 2.0, -4.0]])
    z = script.VAE(None, None).reparameterize(mu.expand(100_000, 3), logvar.expand(100_000, 3))
    std = logvar.div(2).exp()
    assert torch.all((z.mean(0) - mu).abs() < 0.02 * std)
    assert torch.all((z.std(0) / std - 1).abs() < 0.02)


@both
def test_gradients_flow_through_z(script):
    model = script.build_vae(3)
    model(torch.rand(4, 1, 28, 28))[0].sum().backward()  # the reconstruction alone, without the KL
    assert model.encoder.fc_mu.weight.grad.abs().sum() > 0
    assert model.encoder.fc_logvar.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.5])
def test_loss_against_torch_distributions(beta):
    mu, logvar = torch.randn(2, 4, 3)
    x, x_recon = torch.rand(2, 4, 1, 28, 28)
    kl = kl_divergence(Normal(mu, logvar.div(2).exp()), Normal(0.0, 1.0)).sum()
    expected = F.binary_cross_entropy(x_recon, x, reduction="sum") + beta * kl
    torch.testing.assert_close(common.vae_loss(x_recon, x, mu, logvar, beta), expected)


@both
def test_training_learns_and_reports_a_nan(script, mnist, capsys):
    torch.manual_seed(0)
    loader, _ = common.load_mnist(mnist, batch_size=20)
    model = script.build_vae(5)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    before = sum(common.evaluate(model, loader))
    losses = script.train_vae(model, loader, optimizer, 4)
    assert sum(common.evaluate(model, loader)) < 0.8 * before
    assert f"Epoch [4/4] Average loss: {losses[3]:.4f}" in capsys.readouterr().out and len(losses) == 4
    next(model.decoder.parameters()).data.fill_(torch.nan)  # which the encoder learns of by its gradients
    with pytest.raises(FloatingPointError, match="--lr"):
        common.evaluate(model, loader)
    with pytest.raises(FloatingPointError, match="--lr"):
        script.train_vae(model, loader, optimizer)


@both
def test_fit_is_adam_with_a_one_cycle_rate(script, mnist, monkeypatch):
    seen = []
    monkeypatch.setattr(script, "train_vae", lambda *args: seen.append(args) or [1.0])
    model, loader = script.build_vae(2), common.load_mnist(mnist, batch_size=40)[0]
    assert script.fit(model, loader, 5, 1e-2, beta=3.0) == [1.0]
    _, _, optimizer, epochs, beta, scheduler, *_ = seen[0]
    assert isinstance(optimizer, torch.optim.Adam) and (epochs, beta) == (5, 3.0)
    assert scheduler.total_steps == 15 and optimizer.param_groups[0]["max_lr"] == 1e-2
    next(model.parameters()).data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="last step diverged"):
        script.fit(model, loader, 5, 1e-2)


@both
def test_each_epoch_trains_in_train_mode(script, mnist, monkeypatch):
    model, loader = script.build_vae(2), common.load_mnist(mnist, batch_size=50)[0]
    modes = []
    model.register_forward_hook(lambda *_: modes.append(model.training) or model.eval() and None)
    script.train_vae(model, loader, torch.optim.Adam(model.parameters()), 2)
    assert modes == [True, False, True, False]  # two steps an epoch; the hook leaves eval mode


def test_loader(tmp_path):
    images, labels = write_mnist(tmp_path, 300, 50)
    train, test = common.load_mnist(tmp_path, batch_size=128)
    assert len(train) == 3 and len(train.dataset) == 300
    digits = {(image.tobytes(), label) for image, label in zip(images[:300], labels[:300].tolist())}
    passes = [list(train), list(train)]
    for batches in passes:
        assert [len(x) for x, _ in batches] == [128, 128, 44]
        x, y = (torch.cat(tensors) for tensors in zip(*batches))
        assert x.dtype == torch.float32 and y.dtype == torch.int64 and x.shape == (300, 1, 28, 28)
        assert x.min() == 0 and x.max() == 1
        assert {(i.tobytes(), label) for i, label in zip(x.mul(255).byte().numpy(), y.tolist())} == digits
    assert not torch.equal(passes[0][0][1], passes[1][0][1])  # a new order
    assert torch.equal(torch.cat([y for _, y in test]), torch.from_numpy(labels[300:350]).long())
    limited, whole_test = common.load_mnist(tmp_path, limit=20)
    assert (len(limited.dataset), len(whole_test.dataset)) == (20, 50)


def test_images_in_other_ranges(tmp_path):
    write_mnist(tmp_path)
    loader, _ = common.load_mnist(tmp_path)
    images, labels = loader.dataset.tensors
    with pytest.raises(TypeError, match="uint8"):  # they would be divided by 255 twice
        common.MNISTLoader(images / 255, labels, 128, shuffle=True)
    part, _ = random_split(loader.dataset, [10, 90])
    x, y = next(iter(DataLoader(part, batch_size=10)))
    index = torch.tensor(part.indices)
    torch.testing.assert_close(x, images[index] / 255, atol=0, rtol=0)
    assert torch.equal(y, labels[index])
    for wrong in (images.float(), labels), (images / 127.5 - 1, labels):
        with pytest.raises(ValueError, match="must be in"):
            next(ddpm.train_ddpm(ddpm.build_ddpm(), [wrong], None))


def test_checksum_sees_order_and_orientation():
    images = torch.arange(2 * 28 * 28).to(torch.uint8).view(2, 1, 28, 28)
    others = [images, images.flip(0), images.flip(3), images.transpose(2, 3)]
    assert len(set(map(common.checksum, others))) == 4


def test_listings_are_called_whole():
    """A hook on a part of the listing fires; other numbers of channels are refused."""
    calls = []
    for channels in (2, 3), (2, 3, 4):
        vae = conv_vae.build_vae(2, channels)
        for part in vae.encoder.conv_layers, vae.decoder.deconv_layers:
            part.register_forward_hook(lambda *_: calls.append(1))
        vae(torch.rand(2, 1, 28, 28))
    assert len(calls) == 4
    with pytest.raises(ValueError, match="two or three channels"):
        conv_vae.build_vae(10, (16, 32, 64, 128))


@pytest.mark.parametrize("d", [1, 3])
def test_figures_with_a_plain_dataloader(mnist, tmp_path, d):
    test = common.load_mnist(mnist)[1].dataset.tensors
    loader = DataLoader([(x / 255, int(y)) for x, y in zip(*test)], batch_size=8)
    model, kwargs = dense_vae.build_vae(d, [8]), {"latent_dim": d, "save_dir": tmp_path}
    common.plot_latent_space(model, loader, **kwargs)
    common.plot_generated_images(common.generate_samples(model, d), **kwargs)
    common.plot_reconstructions(model, loader, save_dir=tmp_path)
    common.plot_interpolation(model, **kwargs)
    for name in "images_gen", "reconstructions", "interpolation", "latent_space":
        assert (tmp_path / f"{name}_latent{d}.png").exists()


def test_interpolation():
    z1, z2 = torch.randn(2, 7)
    z = common.interpolate_points(z1, z2, n_steps=5)
    torch.testing.assert_close(z[[0, 2, 4]], torch.stack([z1, (z1 + z2) / 2, z2]))


def test_show_grid():
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 2, 3)
    _, ax = common.plt.subplots()
    common.show_grid(ax, images, n_rows=2)
    (image,) = ax.images
    assert image.get_array().shape == (4, 9) and image.get_interpolation() == "nearest"
    assert image.get_array()[::2, ::3].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_active_units():
    torch.manual_seed(0)
    means = torch.randn(50_000, 4) * torch.tensor([1.0, 0.2, 0.05, 0.0]) + 3  # variances 1, 0.04, 0.0025, 0
    assert beta_study.active_units(means) == 2


@pytest.mark.parametrize("d", [1, 5])
def test_kl_of_a_gaussian(d):
    torch.manual_seed(0)
    assert abs(beta_study.gaussian_kl(torch.randn(100_000, d))) < 1e-3
    codes = 2 * torch.randn(100_000, d) + 1  # 0.5 * (sigma^2 + mu^2 - 1 - ln sigma^2) per dimension
    assert abs(beta_study.gaussian_kl(codes) - d * 0.5 * (4 + 1 - 1 - np.log(4))) < 0.05


def test_remote_samples():
    torch.manual_seed(0)
    square = torch.rand(2, 5000, 2) - 0.5  # codes that fill a square of side 1
    prior = torch.cat([torch.rand(300, 2) - 0.5, torch.tensor([[9.0, 0.0]]), torch.rand(100, 2) + 3])
    share, remote = beta_study.remote_samples(prior, *square)
    assert abs(share - 101 / 401) < 0.03 and torch.equal(remote[0], prior[300])


def test_the_classifier_gives_the_features_that_it_gave(tmp_path):
    """The first ruler is the same on every machine, up to rounding."""
    images, _ = write_mnist(tmp_path)
    x = torch.from_numpy(images[:4]).view(4, 1, 28, 28) / 255
    features, probabilities = rulers.classify(rulers.load_classifier("cpu"), x)
    expected = torch.tensor([34.2402, 34.5644, 42.1175, 42.7055])
    torch.testing.assert_close(features.norm(dim=1), expected, atol=0, rtol=1e-3)
    assert probabilities.argmax(1).tolist() == [0, 1, 2, 3]
    assert os.path.getsize(rulers.CLASSIFIER) < 500_000


def test_principal_components():
    """Pixels that vary along one direction: it is the last of 64 orthogonal ones."""
    torch.manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(784), dim=0)
    images = torch.randn(500, 1) * direction + 1e-3 * torch.randn(500, 784)
    components = rulers.principal_components(images.view(500, 1, 28, 28))
    torch.testing.assert_close(components.T @ components, torch.eye(64), atol=1e-4, rtol=0)
    assert abs(components[:, -1] @ direction) > 0.999


def test_the_nearest_images_show_a_copy():
    """A model that copies two images of a hundred: its 1% quantile is 0, not that of the others."""
    torch.manual_seed(0)
    train, images = torch.rand(200, 1, 28, 28), torch.rand(100, 1, 28, 28)
    assert compare.nearest_training_image(images, train) > 5
    images[:2] = train[:2]
    assert compare.nearest_training_image(images, train) < 0.1


def test_frechet_distance_of_gaussians():
    torch.manual_seed(0)
    a = torch.randn(200_000, 3) * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([0.0, 1.0, 0.0])
    b = torch.randn(200_000, 3) * torch.tensor([2.0, 2.0, 1.0])
    assert abs(rulers.frechet(a, b) - (1.0 + 1.0 + 0.25)) < 0.05  # |m_a - m_b|^2 + sum of (s_a - s_b)^2
    assert abs(rulers.frechet(a, a)) < 1e-6


def test_precision_and_recall_of_squares():
    torch.manual_seed(0)
    square = torch.rand(2000, 2)
    assert compare.precision_recall(square, square) == (1.0, 1.0)
    assert compare.precision_recall(square, square + 5) == (0.0, 0.0)
    precision, recall = compare.precision_recall(square, torch.rand(2000, 2) * 0.5)  # a quarter of the square
    assert precision > 0.9 and 0.2 < recall < 0.35
