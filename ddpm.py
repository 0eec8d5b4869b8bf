"""The DDPM of the report's section 5 and annex, on MNIST (Ho, Jain & Abbeel, 2020, arXiv:2006.11239).

    python ddpm.py             train, draw the report's figure 4
    python ddpm.py --resume    go on after an interruption
    python ddpm.py --annex     the report's own DDPM: the annex with the zero_grad that it lacks

Diffusion mixes a clean image, always called x_0, with more and more Gaussian noise. After step t, from 0 to
999, it is

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise,

where alpha_bar_t falls from almost 1 (an image with a little noise) to almost 0 (only noise). The network
sees x_t and t, and learns to predict the noise. Solved for x_0, the same formula then estimates the image.

Why many steps? Many images and noises fit one noisy x_t. Under the mean squared error, the best prediction is
the mean of all these noises, so the x_0 that it implies is E[x_0 | x_t], a mean of images: if we jumped
straight to it, the image would be blurred. A small step in its direction is right (reverse_process shows
why), and fewer images fit the less noisy x_{t-1}. So sampling starts from pure noise; each step, from t = 999
down to 0, takes a little of the predicted noise away. It also adds a little new noise, as x_{t-1} is drawn at
random, not set to its mean; but none at t = 0.

The annex comes first, then what goes beyond it: v (a mix of noise and image), a fast sampler, the training.
What a part is worth is given as a distance between samples and digits, with the part and without it: by the
features of a classifier, or by the principal components of the pixels. Smaller is better; 2,000 training
digits have 5.5 and 0.48. All were measured on training images left out for this purpose, after three
epochs with the seeds 0 and 1, or after twelve with the seed 0 (benchmarks/README.md, LOG.md).
Needs common.py beside it. All the options: --help.
"""

import argparse
import copy
import io
import math
import os
import sys
import tempfile
import textwrap
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common

# ---- The annex


class SinusoidalPositionEmbeddings(nn.Module):
    """t, (B,) -> (B, dim): sines, then cosines, of t at dim / 2 frequencies from 1 to 1 / 10000 (annex)."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, time):
        device = time.device
        half_dim = self.dim // 2
        embeddings = math.log(10000) / (half_dim - 1)  # np.log in the listing: under torch.compile, float64
        embeddings = torch.exp(torch.arange(half_dim, device=device) * -embeddings)
        embeddings = time[:, None] * embeddings[None, :]
        embeddings = torch.cat((embeddings.sin(), embeddings.cos()), dim=-1)
        return embeddings


class SimpleBlock(nn.Module):
    """(B, in_channels, H, W) and t's embedding, (B, time_emb_dim) -> (B, out_channels, H, W) (annex)."""

    def __init__(self, in_channels, out_channels, time_emb_dim):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.time_mlp = nn.Linear(time_emb_dim, out_channels)

    def forward(self, x, t_emb):
        h = F.silu(self.conv1(x))

        time_emb = self.time_mlp(t_emb)
        time_emb = time_emb[(...,) + (None,) * 2]  # (B, out_channels, 1, 1)
        h = h + time_emb

        h = F.silu(self.conv2(h))
        return h


class SimpleMNistUNet(nn.Module):
    """x_t, (B, in_channels, 28, 28), and t, (B,) -> (B, out_channels, 28, 28): the noise, or v (annex)."""

    def __init__(self, in_channels=1, out_channels=1, time_emb_dim=64):
        super().__init__()
        self.time_mlp = nn.Sequential(
            SinusoidalPositionEmbeddings(time_emb_dim),
            nn.Linear(time_emb_dim, time_emb_dim),
            nn.SiLU(),
            nn.Linear(time_emb_dim, time_emb_dim),
        )
        self.enc1 = SimpleBlock(in_channels, 32, time_emb_dim)
        self.enc2 = SimpleBlock(32, 64, time_emb_dim)
        self.enc3 = SimpleBlock(64, 128, time_emb_dim)

        self.bottleneck = SimpleBlock(128, 256, time_emb_dim)

        self.up1 = nn.ConvTranspose2d(256, 128, 4, stride=2, padding=1)
        self.dec1 = SimpleBlock(256, 128, time_emb_dim)

        self.up2 = nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1)
        self.dec2 = SimpleBlock(128, 64, time_emb_dim)

        self.up3 = nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1)
        self.dec3 = SimpleBlock(64, 32, time_emb_dim)

        self.final_conv = nn.Conv2d(32, out_channels, 3, padding=1)

    def forward(self, x, t):
        t_emb = self.time_mlp(t)

        x1 = self.enc1(x, t_emb)  # (B, 32, 28, 28)
        x2 = self.enc2(F.max_pool2d(x1, 2), t_emb)  # (B, 64, 14, 14)
        x3 = self.enc3(F.max_pool2d(x2, 2), t_emb)  # (B, 128, 7, 7)

        x_bottleneck = self.bottleneck(F.max_pool2d(x3, 2), t_emb)  # (B, 256, 3, 3)

        x = self.up1(x_bottleneck)  # (B, 128, 6, 6)
        if x.shape[2:] != x3.shape[2:]:
            x = F.interpolate(x, size=x3.shape[2:], mode="nearest")  # (B, 128, 7, 7)
        x = torch.cat([x, x3], dim=1)
        x = self.dec1(x, t_emb)

        x = self.up2(x)  # (B, 64, 14, 14)
        if x.shape[2:] != x2.shape[2:]:
            x = F.interpolate(x, size=x2.shape[2:], mode="nearest")
        x = torch.cat([x, x2], dim=1)
        x = self.dec2(x, t_emb)

        x = self.up3(x)  # (B, 32, 28, 28)
        if x.shape[2:] != x1.shape[2:]:
            x = F.interpolate(x, size=x1.shape[2:], mode="nearest")
        x = torch.cat([x, x1], dim=1)
        x = self.dec3(x, t_emb)

        return self.final_conv(x)


class DDPM:
    """The diffusion process of a `model` that predicts the noise (annex; Ho et al., 2020, section 3).

    Ho et al. count t from 1 to T; the index here, 0 to timesteps - 1, is their t - 1. x_0 always means the
    clean image, never x_t at t = 0, which has a little noise. So for t = 0, x_{t-1} is x_0, alpha_bar_{t-1}
    is 1, and reverse_process returns x_0. Images are (B, 1, H, W) in [-1, 1], but those of `sample` in
    [0, 1]. Other timesteps than 1000 need other betas (build_ddpm).

    Step t adds noise of variance beta_t = 1 - alpha_t, and shrinks the image so that a variance of 1 stays 1.
    forward_process does all the steps up to t at once, with alpha_bar_t = alpha_0 ... alpha_t. By induction
    from t = 0:

        step:    x_t     = sqrt(alpha_t) x_{t-1} + sqrt(1 - alpha_t) noise
        suppose: x_{t-1} = sqrt(alpha_bar_{t-1}) x_0 + sqrt(1 - alpha_bar_{t-1}) noise'
        then:    x_t     = sqrt(alpha_t alpha_bar_{t-1}) x_0 + a Gaussian noise of variance
                           alpha_t (1 - alpha_bar_{t-1}) + 1 - alpha_t = 1 - alpha_bar_t,

    as the variances of independent noises add, and alpha_t alpha_bar_{t-1} = alpha_bar_t.
    """

    def __init__(self, model, timesteps=1000, beta_start=1e-4, beta_end=0.02, device=None):
        self.model = model
        self.timesteps = timesteps
        self.device = torch.device(device or next(model.parameters()).device)  # "cuda" in the listing

        self.betas = torch.linspace(beta_start, beta_end, timesteps, device=self.device)
        self.alphas = 1.0 - self.betas
        self.alpha_bars = torch.cumprod(self.alphas, dim=0)

        print(f"Beta schedule: {beta_start} → {beta_end}")
        print(f"Alpha bars: {self.alpha_bars[0]:.3f} → {self.alpha_bars[-1]:.3f}")
        print(f"Nombre de timesteps: {timesteps}")

    def forward_process(self, x0, t, noise=None):
        """Sample x_t ~ q(x_t | x_0): mix x0, in [-1, 1], with `noise` or new noise (Ho et al., eq. 4).

        t: (B,), from 0 to timesteps - 1.
        """
        if noise is None:
            noise = torch.randn_like(x0)
        t = torch.clamp(t, 0, self.timesteps - 1)
        alpha_bar_t = self.alpha_bars[t].view(-1, 1, 1, 1)
        x_t = torch.sqrt(alpha_bar_t) * x0 + torch.sqrt(1 - alpha_bar_t) * noise
        return x_t

    def reverse_process(self, x, t):
        """Sample x_{t-1} ~ p(x_{t-1} | x_t), of variance beta_t (Ho et al., algorithm 2).

        For t = 0, returns the clean image x_0. x: x_t, (B, 1, H, W), not limited to [-1, 1]; t: (B,), from 0
        to timesteps - 1.

        With x_0 known, x_{t-1} is Gaussian (sample_posterior, s = t - 1), with

            mean = (sqrt(alpha_bar_{t-1}) beta_t x_0 + sqrt(alpha_t) (1 - alpha_bar_{t-1}) x_t)
                   / (1 - alpha_bar_t)
            variance = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)

        (Ho et al., eq. 7). The mean is linear in x_0: averaged over all x_0 that fit x_t, it is the same with
        E[x_0 | x_t] for x_0, which the network estimates. And if beta_t is small beside 1 - alpha_bar_{t-1},
        x_{t-1} given x_t alone is nearly Gaussian, too: by Bayes' rule its density is a narrow Gaussian, that
        of the step, times the density of x_{t-1}. This is a mixture of Gaussians of variance
        1 - alpha_bar_{t-1}, one for each image: over a smaller width its logarithm is nearly linear (but near
        a border between two images, where few x_{t-1} lie). So a *small* step may draw x_{t-1} from a
        Gaussian around this mean. (The last few steps are not small in this sense, but their noise is too
        weak to be seen.) Insert the x_0 that the noise implies:

            x_0 = (x_t - sqrt(1 - alpha_bar_t) noise) / sqrt(alpha_bar_t)

        As alpha_bar_t = alpha_t alpha_bar_{t-1} and beta_t + alpha_t = 1, the mean (eq. 11) has the factors

            of x_t:    (beta_t + alpha_t - alpha_bar_t) / (sqrt(alpha_t) (1 - alpha_bar_t))
                       = 1 / sqrt(alpha_t)
            of -noise: beta_t / (sqrt(alpha_t) sqrt(1 - alpha_bar_t))

        The variance above is smaller than beta_t, by 55% at t = 1, 8% at t = 20, 0.8% at t = 200: Ho et al.
        (section 3.2) allow both.
        """
        t = torch.clamp(t, 0, self.timesteps - 1)
        pred_noise = self.model(x, t)

        alpha_t = self.alphas[t].view(-1, 1, 1, 1)
        alpha_bar_t = self.alpha_bars[t].view(-1, 1, 1, 1)
        beta_t = self.betas[t].view(-1, 1, 1, 1)

        mean = (x - beta_t * pred_noise / torch.sqrt(1 - alpha_bar_t)) / torch.sqrt(alpha_t)

        # The listing tests t[0] > 0, but each image may have its own t. At t = 0 this mean equals the
        # listing's `else` branch: alpha_bar_0 = alpha_0 = 1 - beta_0, so beta_0 / sqrt(1 - alpha_bar_0) is
        # sqrt(1 - alpha_bar_0).
        noise = torch.randn_like(x) * (t > 0).view(-1, 1, 1, 1)
        std = torch.sqrt(beta_t)
        x_prev = mean + std * noise
        return x_prev

    def train_step(self, x0, optimizer):
        """One step on x0, (B, 1, H, W) in [-1, 1]: 2 * x - 1 for the x of a loader, in [0, 1].

        Returns the loss, a tensor: the mean squared error of the noise, at a random t for each image (Ho et
        al., algorithm 1). It comes from a bound of -log p(x_0), as the VAE's loss: a sum with a term for each
        step, a KL between two Gaussians (at t = 0: -log p(x_0 | x_t)). As their variances are fixed, each is,
        up to a constant, |mean - mean'|^2 / (2 beta_t), by eq. 11 a weight times |noise - pred_noise|^2.
        Without the weights, as here, it is no bound (eq. 14).
        """
        self.model.train()
        t = torch.randint(0, self.timesteps, (x0.shape[0],), device=self.device)
        noise = torch.randn_like(x0)
        x_t = self.forward_process(x0, t, noise)
        pred_noise = self.model(x_t, t)
        loss = F.mse_loss(pred_noise, noise)

        optimizer.zero_grad()  # missing in the listing: unless the loop does it, all gradients add up
        loss.backward()
        optimizer.step()
        return loss.detach()  # loss.item() would wait for the GPU at every step

    def sample(self, num_samples=16, image_size=(28, 28)):
        """Images, (num_samples, 1, H, W) in [0, 1], in `timesteps` steps (Ho et al., algorithm 2)."""
        self.model.eval()
        with torch.no_grad():
            x = torch.randn(num_samples, 1, image_size[0], image_size[1], device=self.device)
            # [::-1] in place of the listing's reversed(): so tqdm knows how many steps there are.
            for i in tqdm(range(self.timesteps)[::-1], desc="Génération", leave=False):
                t = torch.full((num_samples,), i, device=self.device, dtype=torch.long)
                x = self.reverse_process(x, t)
            # After the loop: as printed, these two lines are inside it (or only their indentation is lost).
            x = torch.clamp(x, -1.0, 1.0)
            x = (x + 1.0) / 2.0
        return x


# ---- Beyond the annex: v, fewer steps, guidance


class NoiseFromV(nn.Module):
    """Wraps a network that predicts v: takes x_t and t, returns the noise, as class DDPM expects it.

    v (Salimans & Ho, 2022, arXiv:2202.00512, appendix D) is a mix of noise and image. With a = alpha_bar_t:

        x_t = sqrt(a) x_0 + sqrt(1 - a) noise
        v   = sqrt(a) noise - sqrt(1 - a) x_0
        noise = sqrt(1 - a) x_t + sqrt(a) v      the x_0 cancel, and (1 - a + a) noise remains
        x_0   = sqrt(a) x_t - sqrt(1 - a) v      the noises cancel, and (a + 1 - a) x_0 remains

    The loss is still the report's, on the noise, and what is gained is mainly the estimate of x_0. A network
    that predicts the noise with an error e has in x_0 the error sqrt((1 - a) / a) e: 157 e at t = 999. If it
    predicts v with an error e, this is sqrt(1 - a) e, never magnified: even v = 0 gives a grey image there,
    sqrt(a) x_t. In the loss, an error e of v costs a e^2: 0.08 e^2 at t = 500, 4e-5 e^2 at t = 999. So the
    loss hardly teaches v at a large t: x_0, about -v there, may stay vague, but it is not wrong by a large
    factor. After three epochs, by the classifier: with v 40 and 36, without it 83 and 74 (two seeds).

    alpha_bars: those of the DDPM, (timesteps,).
    """

    def __init__(self, unet, alpha_bars):
        super().__init__()
        self.unet = unet
        self.register_buffer("alpha_bars", alpha_bars, persistent=False)

    def forward(self, x, t):
        alpha_bar_t = self.alpha_bars[t].view(-1, 1, 1, 1)
        return torch.sqrt(alpha_bar_t) * self.unet(x, t) + torch.sqrt(1 - alpha_bar_t) * x


def to_pixels(images):
    """Images of the DDPM as pixels in [0, 1]; what is outside [-1, 1], as in noise, is cut off."""
    return (images.clamp(-1, 1) + 1) / 2


def estimate_x0(model, x, t, bar_t):
    """The x_0 that the predicted noise implies: forward_process, solved for x_0.

    x: x_t, (B, 1, H, W); t: a time, the same for all; bar_t: alpha_bar_t.
    """
    noise = model(x, torch.full((len(x),), t, device=x.device)).float()  # it may be bfloat16
    return (x - math.sqrt(1 - bar_t) * noise) / math.sqrt(bar_t)


def midpoint(x0, x0_last, log_snr_last, log_snr_t, log_snr_s):
    """The estimate of x_0 half way from t to s, from those at t and at the time before, x0 and x0_last.

    Cut the step from t to s into many small ones: x_s is then a weighted sum of x_t, of the estimates of x_0
    on the way, and of noise. One step uses a single estimate for all of them: the one half way fits best.
    "Half way" is meant in log_snr = log(alpha_bar / (1 - alpha_bar)), the logarithm of the signal-to-noise
    ratio, in which the estimates change smoothly. Extrapolated from the last two, it is

        x0 + (x0 - x0_last) / (log_snr_t - log_snr_last) * (log_snr_s - log_snr_t) / 2

    (SDE-DPM-Solver++(2M), Lu et al., 2022, "DPM-Solver++", arXiv:2211.01095). After three epochs, by the
    classifier: with it 40 and 36, without it 56 and 55 (two seeds).
    """
    ratio = (log_snr_s - log_snr_t) / (log_snr_t - log_snr_last)
    return x0 + ratio / 2 * (x0 - x0_last)


def guided(target, x0, x0_guide, guidance):
    """`target`, pushed away from the estimate of a guiding model, the same network after less training.

    Both networks err in much the same directions, and the guiding model more: so x0 - x0_guide points away
    from the error of both. Without the midpoint, where target = x0, the result extrapolates:

        x0 + (guidance - 1) (x0 - x0_guide) = x0_guide + guidance (x0 - x0_guide)

    (autoguidance, Karras et al., 2024, arXiv:2406.02507). The mean of each image is subtracted from the
    difference, so that guidance changes the shape of an estimate, not its ink (the samples still get a little
    bolder). sample_fast guides where a digit takes shape, at 0.2 <= t / timesteps < 0.6 (an interval, as
    Kynkäänniemi et al., 2024, arXiv:2404.07724, who found that guidance costs variety at a large t). After
    twelve epochs, one network, on which this was chosen (training digits: 2,000 for the distances, all for
    the mean pixel):

                                         classifier  components  mean pixel
        training digits                      5.5        0.48       0.1310
        guided                              13.0        0.51       0.1301
        not guided                          28.0        0.71       0.1263
        each image's mean not subtracted    12.7        0.65       0.1363
        guided at all t                     18.0        0.58       0.1296
        by a guide of 1/24, not 1/12        17.8        1.16       0.1407
        by a guide of 1/6                   14.8        0.64       0.1299
    """
    difference = x0 - x0_guide
    return target + (guidance - 1) * (difference - difference.mean((1, 2, 3), keepdim=True))


def sample_posterior(x, x0, bar_t, bar_s):
    """Draw x_s ~ q(x_s | x_t, x_0) for a time s < t; x: x_t; bar_t, bar_s: alpha_bar at t and at s.

    alpha = bar_t / bar_s is the product of the alphas from s + 1 to t. Given x_0,

        x_s = sqrt(bar_s) x_0 + sqrt(1 - bar_s) noise        N(sqrt(bar_s) x_0, 1 - bar_s)
        x_t = sqrt(alpha) x_s + sqrt(1 - alpha) noise'

    As a function of x_s, the density of this x_t is a Gaussian around x_t / sqrt(alpha), of the variance
    (1 - alpha) / alpha. By Bayes' rule the density of x_s is the product of both Gaussians: the precisions,
    1 / variance, add up, and the mean is the average of the two means, weighted by them:

        precision = 1 / (1 - bar_s) + alpha / (1 - alpha)
                  = (1 - alpha + alpha - alpha bar_s) / ((1 - bar_s) (1 - alpha))
                  = (1 - bar_t) / ((1 - bar_s) (1 - alpha))                     as alpha bar_s = bar_t
        mean      = (sqrt(bar_s) x_0 / (1 - bar_s) + sqrt(alpha) x_t / (1 - alpha)) / precision

    The code multiplies this out (Ho et al., eq. 6 and 7, which hold for any s < t). bar_s = 1 is the clean
    image: the variance is 0, and the mean is x0.
    """
    alpha = bar_t / bar_s
    mean = (math.sqrt(bar_s) * (1 - alpha) * x0 + math.sqrt(alpha) * (1 - bar_s) * x) / (1 - bar_t)
    variance = (1 - bar_s) * (1 - alpha) / (1 - bar_t)
    return mean + math.sqrt(variance) * torch.randn_like(x)


@torch.no_grad()
def sample_fast(process, num_samples=16, steps=20, guide=None, guidance=1.5, image_size=(28, 28)):
    """Generate images in few steps; returns the list of all x_t, (n, 1, H, W), the last one x_0.

    to_pixels turns them into pixels in [0, 1]. Each step estimates x_0, goes on to the estimate in the middle
    of the step, adds guidance (in an interval of t), and draws x_s, over many time steps at once. Such a step
    is not small: it is right only if the estimate in its middle can stand for all on the way. If steps is
    process.timesteps, it is, without the midpoint and guidance, the annex's sampler, but for the variance
    (see reverse_process). guide: the guiding model, or None; guidance: its weight, 1 for none.
    """
    process.model.eval()
    if guide is not None:
        guide.eval()
    steps = min(steps, process.timesteps)
    u = torch.linspace(1, 0, steps, dtype=torch.float64)
    # From timesteps - 1 to 0, closer near 0, where x_0 gets its details. The first term alone falls by 1 from
    # one u to the next, so no two times are equal.
    times = ((steps - 1) * u + (process.timesteps - steps) * u**2).round().long().tolist()
    bars = [*process.alpha_bars[times].tolist(), 1.0]  # x_0 has no noise
    log_snr = [math.log(bar / (1 - bar)) for bar in bars[:-1]]
    x, x0_last = torch.randn(num_samples, 1, *image_size, device=process.device), None
    xs = [x]
    for i, t in enumerate(tqdm(times, desc="Génération", leave=False)):
        x0 = estimate_x0(process.model, x, t, bars[i])
        target = x0
        if 0 < i < steps - 1:  # the first step has no previous estimate, the final one ends at infinite SNR
            target = midpoint(x0, x0_last, log_snr[i - 1], log_snr[i], log_snr[i + 1])
        if guide is not None and guidance != 1 and 0.2 <= t / process.timesteps < 0.6:
            target = guided(target, x0, estimate_x0(guide, x, t, bars[i]), guidance)
        x0_last = x0
        x = sample_posterior(x, target, bars[i], bars[i + 1])
        xs.append(x)
    return xs


# ---- Training


def build_unet(device="cpu", he=True):
    """The annex's U-Net; he: with initial weights under which the signal shrinks less, and biases of 0.

    It has no normalisation layers against that. An output y = w_1 x_1 + ... is a sum over fan_in inputs. With
    independent weights of mean 0, the cross terms vanish; and as a weight is as likely as its negative, so is
    an output, of which ReLU keeps half:

        E[y^2] = fan_in Var(w) E[x^2]
        E[relu(y)^2] = E[y^2] / 2

    So Var(w) = 2 / fan_in keeps the mean square (He et al., 2015, arXiv:1502.01852). With SiLU, computed
    numerically, a layer then keeps 0.5 to 0.8 of the mean square of an input, if that is below 1; with
    PyTorch's 1 / (3 fan_in), about a tenth. After three epochs, by the classifier: with `he` 40 and 36,
    without it 469 and 162 (two seeds). The transposed convolutions keep PyTorch's weights, as others
    gained nothing.
    """
    model = SimpleMNistUNet()
    if he:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):  # fan_in = in_channels * 3 * 3
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        nn.init.zeros_(model.final_conv.weight)  # at first it predicts 0, not something random
    # channels_last, a memory layout: a step is 19% faster. On mps, torch may get its gradients wrong.
    if torch.device(device).type in ("cpu", "cuda"):
        model = model.to(memory_format=torch.channels_last)
    return model.to(device)


def build_ddpm(timesteps=1000, predict="v", device="cpu", he=True):
    """A DDPM with an untrained U-Net that predicts "v" or "noise". timesteps: 2 or more; he: build_unet."""
    # About as much noise in fewer steps, as in the code of Nichol & Dhariwal (2021, arXiv:2102.09672).
    scale = 1000 / timesteps
    process = DDPM(build_unet(device, he), timesteps, 1e-4 * scale, min(0.02 * scale, 0.999))
    if predict == "v":
        process.model = NoiseFromV(process.model, process.alpha_bars)
    return process


def build_optimizer(process, lr, total_steps):
    """Adam, clipping, and a one-cycle learning rate; returns (optimizer, scheduler).

    One-cycle (Smith & Topin, 2017, arXiv:1708.07120): the learning rate rises to lr, then falls to almost 0
    at the last of total_steps. After three epochs, by the classifier: with it 40 and 36, with a constant 1e-3
    129 and 183 (two seeds). Clipping shortens a gradient longer than 1 to 1: held-out losses after three
    epochs with it 0.0263 and 0.0258, without it 0.0268 and 0.0264 (two seeds); in batches of 5 it halves the
    last loss (LOG.md). It is a hook, as train_step leaves no place between backward() and step().
    """
    parameters = list(process.model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)  # fused: all weights in one operation

    def clip(*_):
        nn.utils.clip_grad_norm_(parameters, 1.0)

    optimizer.register_step_pre_hook(clip)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=total_steps)
    return optimizer, scheduler


def train_epoch(process, dataloader, optimizer, scheduler=None, bf16=False):
    """One pass over a loader of images in [0, 1]; returns the average loss, the MSE of the noise.

    scheduler: makes one step per batch. bf16: compute in bfloat16, a float of 16 bits, with the range of
    float32 but 8 bits of precision, not 24: faster where the hardware has it.
    """
    train_loss = torch.zeros((), device=process.device)
    for x, _ in tqdm(dataloader, leave=False):
        x0 = 2.0 * x.to(process.device) - 1.0  # from [0, 1] to [-1, 1]
        # autocast casts each weight to bfloat16 once and reuses the copy until it ends. So it stands around
        # each step: around the loop, the network would compute with its first weights throughout. PyTorch
        # advises to leave backward() outside, but the annex's train_step has all in one.
        with torch.autocast(process.device.type, torch.bfloat16, enabled=bf16):
            train_loss += process.train_step(x0, optimizer)
        if scheduler is not None:
            scheduler.step()
    return train_loss.item() / len(dataloader)


def train_ddpm(
    process, dataloader, optimizer, num_epochs=12, scheduler=None, bf16=False, seed=0, done=0, guide=None
):
    """Train on a loader of images in [0, 1]; a generator, which yields (epoch, loss, guide) after each epoch:

        optimizer, scheduler = build_optimizer(process, 3e-3, 12 * len(dataloader))
        for epoch, loss, guide in train_ddpm(process, dataloader, optimizer, 12, scheduler):
            print(epoch, loss)  # or draw samples: to_pixels(sample_fast(process, guide=guide)[-1])

    epoch: its number, from 1; loss: its average loss; guide: the guiding model, a copy of the network after a
    twelfth of the epochs, None before it and if there is a single epoch. bf16: see train_epoch. Each pair of
    seed and epoch has random numbers of its own (torch's global seed is set): to go on with a training, give
    the number of epochs that are `done`, and its guide. Raises ValueError if the first images are not in
    [0, 1], FloatingPointError if the training diverges.
    """
    x, _ = next(iter(dataloader))
    if not (0 <= x.min() and x.max() <= 1):
        raise ValueError(f"the images must be in [0, 1], not from {x.min():g} to {x.max():g}")
    for epoch in range(done + 1, num_epochs + 1):
        torch.manual_seed((seed + 10**6 * epoch) % 2**64)  # two seeds below a million never draw the same
        loss = train_epoch(process, dataloader, optimizer, scheduler, bf16)
        if not math.isfinite(loss) or not all(p.isfinite().all() for p in process.model.parameters()):
            raise FloatingPointError(f"diverged in epoch {epoch}, loss {loss}: try a smaller --lr")
        if num_epochs > 1 and epoch == max(1, round(num_epochs / 12)):
            guide = copy.deepcopy(process.model)
        yield epoch, loss, guide


@torch.no_grad()
def evaluate(process, data_loader):
    """The mean squared error of the predicted noise, with one random t for each image; images in [0, 1].

    Raises FloatingPointError if it is not finite.
    """
    process.model.eval()
    loss = 0.0
    for x, _ in data_loader:
        x0 = 2.0 * x.to(process.device) - 1.0
        t = torch.randint(0, process.timesteps, (len(x0),), device=process.device)
        noise = torch.randn_like(x0)
        x_t = process.forward_process(x0, t, noise)
        loss += F.mse_loss(process.model(x_t, t), noise).item() * len(x0)
    if not math.isfinite(loss):
        raise FloatingPointError(f"the held-out loss is {loss}: try a smaller --lr")
    return loss / len(data_loader.dataset)


# ---- The script: files, figures, command line

# The options that change nothing in a model.
RUN = "device", "data_dir", "save_dir", "resume", "load", "sampler", "steps", "guidance"


def train(args, train_loader, path):
    """Train a DDPM with the options `args` and save it at `path`; returns (process, guide), as `load` does.

    train_loader: of load_mnist. checkpoint.pt, beside `path`, is written after each epoch, and removed at the
    end. Raises FloatingPointError if the training diverges; OSError if a file can't be written, if
    checkpoint.pt is there without args.resume, or if it has other options or images.
    """
    # tolist() makes numpy's numbers plain: torch.load refuses them.
    options = {name: np.asarray(value).tolist() for name, value in vars(args).items() if name not in RUN}
    options["images_crc32"] = common.checksum(train_loader.dataset.tensors[0])
    epochs, checkpoint = options["epochs"], os.path.join(os.path.dirname(path), "checkpoint.pt")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    if args.resume:
        process, guide = load(checkpoint, args.device)
        for name in options | process.options:
            before, now = process.options.get(name), options.get(name)
            if before != now and name != "bf16":
                why = "; its learning rate falls to 0 by then" if name == "epochs" and not args.annex else ""
                mend = "start as before, or delete it to start again"
                raise OSError(f"{checkpoint} was started with {name} {before}, not {now}{why}: {mend}")
        print(f"Resuming after epoch {len(process.losses)}")
    elif os.path.exists(checkpoint):
        mend = "--resume continues it; delete it to start again"
        raise OSError(f"{checkpoint} is an unfinished training: {mend}")
    else:
        torch.manual_seed(args.seed)
        process = build_ddpm(args.timesteps, args.predict, args.device, he=not args.annex)
        process.losses, process.seconds, guide = [], 0.0, None
    process.options = options

    if args.annex:
        optimizer = torch.optim.Adam(process.model.parameters(), lr=options["lr"], fused=True)
        scheduler = None
    else:
        optimizer, scheduler = build_optimizer(process, options["lr"], epochs * len(train_loader))
    if args.resume:
        read(checkpoint, optimizer=optimizer, scheduler=scheduler)
    parameters = sum(p.numel() for p in process.model.parameters())
    print(f"DDPM on {args.device} ({'bf16' if args.bf16 else 'fp32'}): {parameters:,} parameters")

    state = {"seed": options["seed"], "done": len(process.losses), "guide": guide}
    epochs_left = train_ddpm(process, train_loader, optimizer, epochs, scheduler, args.bf16, **state)
    start = time.perf_counter()
    try:
        for epoch, loss, guide in epochs_left:
            process.losses.append(loss)
            process.seconds += time.perf_counter() - start
            save(checkpoint, process, guide, optimizer=optimizer, scheduler=scheduler)  # before the line
            print(f"Epoch [{epoch}/{epochs}] Average loss: {loss:.4f}", flush=True)
            start = time.perf_counter()
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}, and delete {checkpoint}, if it is there") from error
    save(path, process, guide)
    os.remove(checkpoint)
    print(f"Model saved: {path}")
    return process, guide


def save(path, process, guide, **parts):
    """Write a file with the state of each part, beside `path`, and move it there when it is complete."""
    saved = {"script": "ddpm", "options": process.options, "losses": process.losses}
    saved["seconds"] = process.seconds
    parts |= {"model": process.model, "guide": guide}
    saved |= {name: None if part is None else part.state_dict() for name, part in parts.items()}
    buffer = io.BytesIO()  # in memory first: torch.save to a full disk raises no OSError
    torch.save(saved, buffer)
    with open(f"{path}.new", "wb") as f:
        f.write(buffer.getbuffer())
    os.replace(f"{path}.new", path)  # if this is refused, its error names the complete file


def read(path, **parts):
    """The dictionary that `save` wrote; each part that is not None gets its saved state.

    Raises OSError if the file is missing, damaged or of another script, or its weights don't fit the network.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["script"] != "ddpm":
            raise OSError(f"it is a model of {saved['script']}.py")
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(saved[name])
    except Exception as error:  # torch has many types for it
        why = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        raise OSError(f"can't load {path}: {why}") from error
    return saved


def load(path, device="cpu"):
    """The DDPM in ddpm.pt or checkpoint.pt, and its guiding model, or None. Raises OSError, as `read`.

    The DDPM also has the options, losses and seconds of its training.
    """
    saved = read(path)
    process = build_ddpm(saved["options"]["timesteps"], saved["options"]["predict"], device)
    guide = None if saved["guide"] is None else copy.deepcopy(process.model)
    read(path, model=process.model, guide=guide)
    process.options, process.losses, process.seconds = saved["options"], saved["losses"], saved["seconds"]
    return process, guide


def plot_noising(process, x0, save_dir="results"):
    """Draw the image x0, (1, 1, 28, 28) in [-1, 1], at ten times t, each with its own noise (figure 4 a)."""
    times = torch.linspace(0, process.timesteps - 1, 10).round().long().to(process.device)
    x_t = process.forward_process(x0.expand(10, -1, -1, -1), times)
    fig = common.images_figure(to_pixels(x_t), 1, 10, (10, 1.7), "Évolution du chiffre vers le bruit")
    for ax, t in zip(fig.axes, times.tolist()):
        ax.set_title(f"t={t}", fontsize=9)
    common.save_figure(fig, save_dir, "noising.png")


def plot_denoising(xs, save_dir="results"):
    """Draw n images on their way from noise, a row each (figure 4 b). xs: the list of sample_fast."""
    stages = torch.linspace(0, len(xs) - 1, 10).round().long().tolist()
    images = torch.stack([to_pixels(xs[i]) for i in stages], dim=1).flatten(0, 1)  # (n * 10, 1, 28, 28)
    n = len(xs[0])
    fig = common.images_figure(images, n, 10, (10, n + 0.3), "Évolution du bruit vers le chiffre")
    common.save_figure(fig, save_dir, "denoising.png")


def has_bf16(device):
    """Whether bfloat16 is known to be fast on the device: recent GPUs, AMX, AVX512-BF16."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # older versions can't tell
        return False
    return any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Train the report's DDPM and draw its figures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    add = parser.add_argument
    add("--epochs", type=int, default=12, help="passes over the training images")
    add("--batch-size", type=int, default=128, help="images per step")
    add("--lr", type=float, default=3e-3, help="maximum of the learning rate")
    add("--seed", type=int, default=0, help="seed of the weights, the batches and the samples")
    add("--timesteps", type=int, default=1000, help="steps from an image to noise")
    add("--predict", choices=["v", "noise"], default="v", help="what the network predicts")
    add("--annex", action="store_true", help="the report's own DDPM, by default in results/annex")
    choices = ["fast", "ddpm"]  # without a default: it depends on the model
    add("--sampler", choices=choices, default=argparse.SUPPRESS, help="ddpm: the report's, as with --annex")
    add("--steps", type=int, default=20, help="steps of the fast sampler, at most as many as time steps")
    add("--guidance", type=float, default=1.5, help="weight of the guidance in the fast sampler; 1: none")
    add("--device", default=device, help="a torch device")
    add("--fp32", dest="bf16", action="store_false", default=argparse.SUPPRESS, help="float32, not bfloat16")
    folder = os.path.expanduser  # "~" is the home folder
    add("--data-dir", type=folder, default="data", help="folder of MNIST, downloaded if missing")
    add("--save-dir", type=folder, default="results/ddpm", help="folder of the model and the figures")
    add("--limit", type=int, default=60000, metavar="N", help="train on the first N images only")
    one_of = parser.add_mutually_exclusive_group().add_argument
    one_of("--resume", action="store_true", help="continue an unfinished training, with its options")
    one_of("--load", type=folder, metavar="PATH", help="no training: a saved model, with its options")
    args = parser.parse_args(argv)
    if args.annex:
        parser.set_defaults(predict="noise", lr=1e-3, save_dir="results/annex")
        args = parser.parse_args(argv)
    if args.resume:  # the checkpoint's options are the defaults; train refuses another one
        checkpoint = os.path.join(args.save_dir, "checkpoint.pt")
        if not os.path.exists(checkpoint):
            raise OSError(f"nothing to resume: {checkpoint} is not there; a finished training leaves none")
        parser.set_defaults(**read(checkpoint)["options"])
        args = parser.parse_args(argv)

    if min(args.epochs, args.batch_size, args.steps, args.limit) < 1:
        parser.error("--epochs, --batch-size, --steps and --limit take whole numbers >= 1")
    if args.timesteps < 2:
        parser.error("--timesteps takes a whole number >= 2")
    if not 0 < args.lr < math.inf or not math.isfinite(args.guidance):
        parser.error("--lr takes a finite number above 0, --guidance a finite number")
    try:
        torch.zeros(1, device=args.device).item()
    except Exception as error:  # torch has several types for it
        reason = str(error).splitlines()[0]
        parser.error(f"--device {args.device} can't be used ({reason}); try --device cpu")
    args.bf16 = getattr(args, "bf16", True) and has_bf16(args.device)
    return args


def main(argv=None):
    args = parse_args(argv)
    os.makedirs(args.save_dir, exist_ok=True)
    tempfile.TemporaryFile(dir=args.save_dir).close()  # fails now, not after the training
    if args.load is not None:
        process, guide = load(args.load, args.device)  # before MNIST is downloaded
        print(f"{args.load} was trained with {process.options}")
    train_loader, test_loader = common.load_mnist(args.data_dir, args.batch_size, args.device, args.limit)
    if args.load is None:
        process, guide = train(args, train_loader, os.path.join(args.save_dir, "ddpm.pt"))
    annex = args.annex or process.options.get("annex")
    fast = getattr(args, "sampler", "ddpm" if annex else "fast") == "fast"
    steps = min(args.steps, process.timesteps) if fast else process.timesteps
    guidance = f"guidance {args.guidance:g}" if fast and guide is not None else "without a guiding model"
    print(f"Samples in {steps} steps, {guidance}")

    torch.manual_seed(args.seed)  # so that --load draws the same figures, if no other option changes
    with torch.autocast(process.device.type, torch.bfloat16, enabled=args.bf16):
        print(f"Held-out loss: {evaluate(process, test_loader):.4f}")
        common.plot_losses(process.losses, args.save_dir)
        x, _ = next(iter(test_loader))
        plot_noising(process, 2.0 * x[:1].to(process.device) - 1.0, args.save_dir)
        if fast:
            plot_denoising(sample_fast(process, 6, steps, guide, args.guidance), args.save_dir)
            images = to_pixels(sample_fast(process, 64, steps, guide, args.guidance)[-1])
        else:
            xs = []  # the x_t of six images, as the network gets them
            hook = process.model.register_forward_pre_hook(lambda _, inputs: xs.append(inputs[0][:6]))
            images = process.sample(64)
            hook.remove()
            plot_denoising([*xs, 2.0 * images[:6] - 1.0], args.save_dir)
        title = "Exemples de chiffres MNIST générés par le modèle DDPM"
        common.save_figure(common.images_figure(images, 8, 8, (8, 8), title), args.save_dir, "samples.png")


if __name__ == "__main__":
    try:
        main()
    except (OSError, FloatingPointError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        sys.exit(f"ddpm.py: {str(error) or 'interrupted'}")
