"""The mathematics of the DDPM: the process, the samplers, the training."""

import numpy as np
import pytest
import torch

import common
import ddpm


class Network(torch.nn.Module):
    """A network whose output is known: predict(x, t)."""

    def __init__(self, predict):
        super().__init__()
        self.predict, self.weight = predict, torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, t):
        return self.predict(x, t)


def alpha_bar(t):
    """alpha_bar_t by hand, in double precision, (B, 1, 1, 1)."""
    alpha_bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    return torch.from_numpy(alpha_bars)[t].view(-1, 1, 1, 1)


def noise_in(x, t, x0):
    """The noise that leads from x_0 to x_t = x."""
    return ((x - alpha_bar(t).sqrt() * x0) / (1 - alpha_bar(t)).sqrt()).float()


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


def test_embeddings():
    t = torch.tensor([0, 999])
    by_hand = [[f(k * 10000 ** (-i / 3)) for f in (np.sin, np.cos) for i in range(4)] for k in t.tolist()]
    embeddings = ddpm.SinusoidalPositionEmbeddings(8)(t)
    torch.testing.assert_close(embeddings, torch.tensor(by_hand).float(), atol=1e-4, rtol=0)


def test_unet_compiles():
    compiled = torch.compile(ddpm.SimpleMNistUNet(), backend="eager")
    assert compiled(torch.randn(2, 1, 28, 28), torch.tensor([3, 4])).dtype == torch.float32


def test_schedule(capsys):
    process = ddpm.DDPM(ddpm.build_unet())  # on the model's device
    assert torch.equal(process.betas, torch.linspace(1e-4, 0.02, 1000)) and process.device.type == "cpu"
    torch.testing.assert_close(process.alpha_bars[[5, 999]].double(), alpha_bar([5, 999]).flatten())
    assert "Nombre de timesteps: 1000" in capsys.readouterr().out


@pytest.mark.parametrize("timesteps", [2, 10, 100, 4000])
def test_other_timesteps_end_in_noise_too(timesteps):
    process = ddpm.build_ddpm(timesteps)
    assert process.alpha_bars[-1] < 1e-3 and process.alpha_bars[0] > 0.9 and process.betas.max() < 1


@pytest.mark.parametrize("t", [0, 100, 500, 999])
def test_forward_process(t):
    torch.manual_seed(0)
    t = torch.full((200,), t)
    x_t = ddpm.DDPM(Network(None)).forward_process(torch.full((200, 1, 28, 28), 0.7), t)
    assert abs(x_t.mean() - 0.7 * alpha_bar(t)[0].sqrt()) < 0.01
    assert abs(x_t.var() / (1 - alpha_bar(t)[0]) - 1) < 0.02


def test_both_samplers_step_to_the_posterior(monkeypatch):
    """The mean of q(x_{t-1} | x_t, x_0), and its variance or beta_t (Ho et al., 2020, eq. 7)."""
    torch.manual_seed(0)
    x0, noises, randn_like = torch.randn(4, 1, 28, 28), [], torch.randn_like
    monkeypatch.setattr(torch, "randn_like", lambda x: noises.append(randn_like(x)) or noises[-1])
    process = ddpm.DDPM(Network(lambda x, t: noise_in(x, t, x0)))
    xs = ddpm.sample_fast(process, 4, 1000)
    for t in 999, 500, 10, 1:
        x_t, x_s, now = xs[999 - t], xs[1000 - t], torch.full((4,), t)
        bar_t, bar_s = alpha_bar(now), alpha_bar(now - 1)
        alpha = bar_t / bar_s
        mean = (bar_s.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - bar_s) * x_t) / (1 - bar_t)
        expected = mean + ((1 - bar_s) / (1 - bar_t) * (1 - alpha)).sqrt() * noises[999 - t]
        torch.testing.assert_close(x_s.double(), expected, atol=2e-3, rtol=1e-3)
        x_s = process.reverse_process(x_t, now)
        expected = mean + (1 - alpha).sqrt() * noises[-1]  # the report's variance is beta_t
        torch.testing.assert_close(x_s.double(), expected, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(xs[-1], x0, atol=1e-4, rtol=0)


def test_no_noise_at_t_0():
    x0, t = torch.randn(4, 1, 28, 28), torch.tensor([0, 500, 0, 999])  # each image its own t
    process = ddpm.DDPM(Network(lambda x, t: noise_in(x, t, x0)))
    x_prev = process.reverse_process(process.forward_process(x0, t), t)
    torch.testing.assert_close(x_prev[[0, 2]], x0[[0, 2]], atol=1e-3, rtol=0)


def test_noise_from_v():
    x0, noise = torch.randn(2, 4, 1, 8, 8)
    t = torch.tensor([0, 10, 500, 999])
    angle = alpha_bar(t).sqrt().arccos().float()  # v is the derivative of cos(angle) x_0 + sin(angle) noise
    process = ddpm.DDPM(Network(lambda x, t: angle.cos() * noise - angle.sin() * x0))
    wrapped = ddpm.NoiseFromV(process.model, process.alpha_bars)
    torch.testing.assert_close(wrapped(process.forward_process(x0, t, noise), t), noise, atol=1e-4, rtol=0)


@pytest.mark.parametrize("steps, gained", [(20, 0.22), (50, 0.09)])
@pytest.mark.parametrize("variance", [0.01, 0.1, 1.0])
def test_fast_sampler_keeps_a_gaussian(variance, steps, gained):
    """In the default 20 steps the mean stays, and the variance grows by up to 22%: by less in more steps."""
    torch.manual_seed(0)
    process = ddpm.DDPM(Network(best_noise(0.2, variance)))
    x = ddpm.sample_fast(process, 300, steps)[-1]
    assert abs(x.mean() - 0.2) < 0.01 and -0.01 < x.var() / variance - 1 < gained, (x.mean(), x.var())


def test_sample_keeps_a_gaussian():
    torch.manual_seed(0)
    process = ddpm.DDPM(Network(best_noise(0.2, 0.05)))
    x = 2 * process.sample(50) - 1
    assert abs(x.mean() - 0.2) < 0.01 and abs(x.var() / 0.05 - 1) < 0.04, (x.mean(), x.var())


@pytest.mark.parametrize("steps", [15, 20, 50])
def test_guidance(steps):
    """Guided by a model of less contrast, few steps raise it as far as 1000 steps do, from 0.2 to 0.216."""
    torch.manual_seed(0)
    shape = torch.where(torch.arange(28) < 14, 1.0, -1.0)  # the left half bright, the right one dark
    times, guess = [], best_noise(0.0, 0.1)
    guide = Network(lambda x, t: times.append(t[0].item()) or guess(x, t))
    process = ddpm.DDPM(Network(best_noise(0.2 * shape, 0.1)))
    x = ddpm.sample_fast(process, 200, steps, guide, 1.5)[-1]
    contrast = (x * shape).mean()
    assert abs(contrast - 0.216) < 0.005, contrast  # 0.208 in 15 steps if guided estimates have the midpoint
    assert times and all(200 <= t < 600 for t in times)

    times.clear()
    ddpm.sample_fast(process, 1, steps, guide, 1.0)
    assert not times  # no guidance, no pass of the guide


def test_guidance_leaves_the_ink():
    """Guided by a darker model, samples get no brighter: the difference's mean is left out."""
    torch.manual_seed(0)
    process = ddpm.DDPM(Network(best_noise(0.2, 0.1)))
    x = ddpm.sample_fast(process, 200, 20, Network(best_noise(0.0, 0.1)), 3.0)[-1]
    assert abs(x.mean() - 0.2) < 0.005, x.mean()


def test_train_step_uses_its_own_gradients():
    process = ddpm.build_ddpm()
    optimizer = torch.optim.SGD(process.model.parameters(), lr=0.0)
    x0, gradients = torch.rand(4, 1, 28, 28) * 2 - 1, []
    for _ in range(2):
        torch.manual_seed(1)
        process.train_step(x0, optimizer)
        gradients.append(process.model.unet.final_conv.weight.grad.clone())
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("predict", ["v", "noise"])
def test_training_learns(mnist, predict, bf16):
    torch.manual_seed(0)
    process = ddpm.build_ddpm(predict=predict)
    loader, _ = common.load_mnist(mnist, batch_size=10, limit=40)
    optimizer, scheduler = ddpm.build_optimizer(process, 4e-3, 8 * len(loader))

    def held_out():
        torch.manual_seed(1)
        return ddpm.evaluate(process, loader)

    before = held_out()
    losses = [loss for _, loss, _ in ddpm.train_ddpm(process, loader, optimizer, 8, scheduler, bf16)]
    assert held_out() < 0.75 * before and losses[7] < losses[0]
    assert scheduler.last_epoch == 32


def test_gradients_are_clipped():
    """The optimizer sees no gradient longer than 1, and train_step itself clips nothing."""
    process = ddpm.build_ddpm()
    optimizer, _ = ddpm.build_optimizer(process, 1e-3, 10)
    parameters = list(process.model.parameters())

    def length(scale):
        for p in parameters:
            p.grad = torch.full_like(p, scale)
        optimizer.step()
        return torch.cat([p.grad.flatten() for p in parameters]).norm().item()

    assert abs(length(1.0) - 1) < 0.01 and length(1e-6) < 0.01
    process.train_step(100 * torch.randn(4, 1, 28, 28), torch.optim.SGD(parameters, 0.0))
    assert torch.cat([p.grad.flatten() for p in parameters]).norm() > 1.5


def test_time_steps_are_distinct(monkeypatch):
    """Almost as many steps as time steps: no two are the same, which would divide by 0."""
    times = []
    network = Network(lambda x, t: times.append(t[0].item()) or x)
    process = ddpm.DDPM(network, 10_001, 1e-5, 2e-3)
    ddpm.sample_fast(process, 1, 10_000, image_size=(1, 1))
    assert len(set(times)) == 10_000 and times[0] == 10_000 and times[-1] == 0
