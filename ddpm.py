"""The DDPM of the report's section 5 and annex, on MNIST (Ho, Jain & Abbeel, 2020, arXiv:2006.11239).

    python ddpm.py                                              train, draw the report's figure 4
    python ddpm.py --resume                                     go on after an interruption
    python ddpm.py --load results/ddpm/ddpm.pt --sampler ddpm   samples.png in the report's 1000 steps

Diffusion mixes a clean image, always called x_0, with more and more Gaussian noise. After step t, from 0 to
999, it is

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise,

where alpha_bar_t falls from almost 1 (an image with a little noise) to almost 0 (only noise). The network
sees x_t and t, and learns to predict the noise. Solved for x_0, the same formula then estimates the image.

Why many steps? Many images and noises fit one noisy x_t. Under the mean squared error, the best prediction is
the mean of all these noises, so the x_0 that it implies is a mean of images: blurred. A jump there would end
in a blurred image. A small step towards it is right, and fewer images fit the less noisy x_{t-1}. So
sampling starts from pure noise; each step, from t = 999 down to 0, takes a little of the predicted noise
away. It also adds a little new noise, as x_{t-1} is drawn at random, not set to its mean; but none at t = 0.

The annex comes first, then what goes beyond it: v (a mix of noise and image), a fast sampler, the training.
"Worth" gives what a part changes: the Fréchet distance of samples to the test digits, smaller is better, with
the part and without it; mean ± standard deviation over three seeds, after 12 epochs (benchmarks/README.md).
What is said to be after three epochs was measured in an earlier version, of commit ae90fed.
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

    Ho et al. count t from 1 to T; the index here, 0 to timesteps - 1, is their t - 1. At t = 0 the image
    still has a little noise, and reverse_process at t = 0 returns the clean image x_0. Images are (B, 1, H,
    W) in [-1, 1], but those of `sample` in [0, 1]. Other timesteps than 1000 need other betas (see
    build_ddpm).

    Step t adds noise: x_t = sqrt(alpha_t) x_{t-1} + sqrt(beta_t) noise, with alpha_t = 1 - beta_t; at t = 0,
    x_{t-1} is the clean image, with alpha_bar_{t-1} = 1. All the steps up to t together are forward_process,
    where alpha_bar_t is the product alpha_0 ... alpha_t. By induction: suppose it for x_{t-1}, and insert it
    in the step. x_0 has the factor sqrt(alpha_t alpha_bar_{t-1}), which is sqrt(alpha_bar_t), and the
    variances of the two independent noises add to alpha_t (1 - alpha_bar_{t-1}) + 1 - alpha_t, which is
    1 - alpha_bar_t.
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

        If x_0 were known, x_{t-1} would have the law that sample_posterior draws from, with s = t - 1. Insert
        the network's x_0 = (x_t - sqrt(1 - alpha_bar_t) noise) / sqrt(alpha_bar_t) into its mean (eq. 7), and
        the mean below follows (eq. 11): the factor of x_t is (beta_t + alpha_t - alpha_bar_t) /
        (sqrt(alpha_t) (1 - alpha_bar_t)), which is 1 / sqrt(alpha_t). That law has a smaller variance than
        beta_t, by 55% at t = 1, 8% at t = 20 and 0.8% at t = 200: both are possible choices (section 3.2).
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
        al., eq. 14, algorithm 1).
        """
        self.model.train()
        t = torch.randint(0, self.timesteps, (x0.shape[0],), device=self.device)
        noise = torch.randn_like(x0)
        x_t = self.forward_process(x0, t, noise)
        pred_noise = self.model(x_t, t)
        loss = F.mse_loss(pred_noise, noise)

        optimizer.zero_grad()  # missing in the listing, where the gradients of all the steps add up
        loss.backward()
        # Clipping, not in the listing: a gradient longer than 1 is shortened to 1. In batches of 5, a short
        # training then ends with half the loss (eight seeds, benchmarks/LOG.md).
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
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
            # After the loop: the listing's indentation puts the next two lines inside it.
            x = torch.clamp(x, -1.0, 1.0)
            x = (x + 1.0) / 2.0
        return x


# ---- Beyond the annex: v, fewer steps, guidance


class NoiseFromV(nn.Module):
    """Wraps a network that predicts v: takes x_t and t, returns the noise, as class DDPM expects it.

    v = sqrt(a) noise - sqrt(1 - a) x_0, where a = alpha_bar_t (Salimans & Ho, 2022, arXiv:2202.00512,
    appendix D). Then sqrt(a) v + sqrt(1 - a) x_t is the noise: insert x_t = sqrt(a) x_0 + sqrt(1 - a) noise,
    the x_0 terms cancel, and (a + 1 - a) noise remains.

    The loss is still the report's, on the noise. There an error e of v is sqrt(a) e, and its square has the
    factor a: 0.08 at t = 500, 4e-5 at t = 999. So the loss hardly sees v at a large t, where sqrt(1 - a) x_t,
    almost all of the noise, needs no learning. What is gained is the estimate of x_0. The division by sqrt(a)
    in x0_from_noise magnifies the error of a predicted noise, sqrt((1 - a) / a) times in all, 157 at t = 999.
    Here that error is only sqrt(a) e, so x_0 has the error sqrt(1 - a) e, never magnified. Worth, after three
    epochs: 46 ± 4, not 99 ± 83.

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


def x0_from_noise(x, noise, bar_t):
    """The x_0 that x = x_t and its noise imply: forward_process, solved for x_0. bar_t: alpha_bar_t."""
    return (x - math.sqrt(1 - bar_t) * noise) / math.sqrt(bar_t)


def sample_posterior(x, x0, bar_t, bar_s):
    """Draw x_s ~ q(x_s | x_t, x_0) for a time s < t; x: x_t; bar_t, bar_s: alpha_bar at t and at s.

    Given x_0, x_s has the mean sqrt(bar_s) x_0 and the variance 1 - bar_s; given x_s, x_t has the mean
    sqrt(alpha) x_s and the variance 1 - alpha, where alpha = bar_t / bar_s: so x_t / sqrt(alpha) is x_s with
    noise of variance (1 - alpha) / alpha. By Bayes' rule the precisions of x_s, 1 / variance, add up:
    1 / (1 - bar_s) + alpha / (1 - alpha) = (1 - bar_t) / ((1 - bar_s) (1 - alpha)). The mean is the average
    of sqrt(bar_s) x_0 and x_t / sqrt(alpha), weighted by these two precisions (Ho et al., eq. 6 and 7, which
    hold for any s < t). bar_s = 1 is the clean image: the variance is 0, and the mean is x0.
    """
    alpha = bar_t / bar_s  # the product of the alphas from s + 1 to t, in place of alpha_t in eq. 7
    mean = (math.sqrt(bar_s) * (1 - alpha) * x0 + math.sqrt(alpha) * (1 - bar_s) * x) / (1 - bar_t)
    variance = (1 - bar_s) * (1 - alpha) / (1 - bar_t)
    return mean + math.sqrt(variance) * torch.randn_like(x)


@torch.no_grad()
def sample_fast(process, num_samples=16, steps=20, guide=None, guidance=1.5, image_size=(28, 28)):
    """Generate images in few steps; returns the list of all x_t, (n, 1, H, W), the last one x_0.

    to_pixels turns them into pixels in [0, 1]. One step goes from t to the next time s, over many time steps:

    1. Estimate x_0: the network predicts the noise, and the noise implies x_0.
    2. (midpoint) On the way to s, the estimate would change. Take its value half way, on the straight line
       through this estimate and the previous one, whose abscissa is log(alpha_bar / (1 - alpha_bar)), the
       logarithm of the signal-to-noise ratio, SNR (SDE-DPM-Solver++(2M), Lu et al., 2022, "DPM-Solver++",
       arXiv:2211.01095). Worth: 12.7 ± 1.6, not 18.7 ± 0.9 (5,000 samples).
    3. (guidance) Push it away from the estimate of a guiding model, the same network after less training,
       by guidance - 1 times their difference. Without 2, this is guide + guidance * (model - guide): 1 means
       no guidance (autoguidance: Karras et al., 2024, arXiv:2406.02507). Only at 0.2 <= t / timesteps < 0.6,
       where a digit takes shape (an interval, as in Kynkäänniemi et al., 2024, arXiv:2404.07724). Worth:
       11.6 ± 1.2, not 20.8 ± 2.0; on 5,000 samples 12.7 ± 1.6, and 24.8 ± 2.6 at all t.
    4. Draw x_s from the posterior.

    Without 2 and 3, the two `if`s, it is the plain sampler that skips time steps; and with as many steps as
    there are time steps, it is the annex's, except for the variance (see reverse_process).
    """
    process.model.eval()
    if guide is not None:
        guide.eval()
    steps = min(steps, process.timesteps)
    u = torch.linspace(1, 0, steps, dtype=torch.float64)
    # From timesteps - 1 to 0, closer near 0, where x_0 gets its details. The first term alone falls by 1 from
    # one u to the next, so no two times are equal. With u**3, 30 steps have the same distance as these 20.
    times = ((steps - 1) * u + (process.timesteps - steps) * u**2).round().long().tolist()
    alpha_bars = [*process.alpha_bars[times].tolist(), 1.0]  # x_0 has no noise
    log_snr = [math.log(bar / (1 - bar)) for bar in alpha_bars[:-1]]
    x, x0_last = torch.randn(num_samples, 1, *image_size, device=process.device), None
    xs = [x]
    for i, t in enumerate(tqdm(times, desc="Génération", leave=False)):
        t_batch = torch.full((num_samples,), t, device=process.device)
        bar_t, bar_s = alpha_bars[i], alpha_bars[i + 1]
        x0 = x0_from_noise(x, process.model(x, t_batch).float(), bar_t)  # a predicted noise may be bfloat16
        target = x0
        if 0 < i < steps - 1:  # the first step has no previous estimate, the final one ends at infinite SNR
            ratio = (log_snr[i + 1] - log_snr[i]) / (log_snr[i] - log_snr[i - 1])
            target = x0 + ratio / 2 * (x0 - x0_last)
        if guide is not None and guidance != 1 and 0.2 <= t / process.timesteps < 0.6:
            x0_guide = x0_from_noise(x, guide(x, t_batch).float(), bar_t)
            target = target + (guidance - 1) * (x0 - x0_guide)
        x0_last = x0
        x = sample_posterior(x, target, bar_t, bar_s)
        xs.append(x)
    return xs


# ---- Training


def build_unet(device="cpu"):
    """The annex's U-Net, with initial weights under which the signal shrinks less.

    It has no normalisation layers against that. An output is a sum over fan_in inputs, with independent
    weights of mean 0: its mean square is fan_in times that of one product, and weights of variance 1 / fan_in
    keep it. ReLU halves it, so He et al. (2015, arXiv:1502.01852) take 2 / fan_in. With SiLU, a layer then
    keeps 0.5 to 0.8 of the mean square of an input, if that is below 1; with PyTorch's 1 / (3 fan_in), about
    a tenth, and one training of two, without clipping, failed: 729, not 20. The transposed convolutions keep
    PyTorch's weights, as others gained nothing.
    """
    model = SimpleMNistUNet()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # fan_in = in_channels * 3 * 3
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    nn.init.zeros_(model.final_conv.weight)  # at first it predicts 0, not something random
    if torch.device(device).type in ("cpu", "cuda"):  # on mps, some versions of torch get its gradients wrong
        model = model.to(memory_format=torch.channels_last)  # the fastest layout for convolutions
    return model.to(device)


def build_ddpm(timesteps=1000, predict="v", device="cpu"):
    """A DDPM with an untrained U-Net that predicts "v" or "noise"; timesteps: 2 or more."""
    # About as much noise in fewer steps, as in the code of Nichol & Dhariwal (2021, arXiv:2102.09672).
    scale = 1000 / timesteps
    process = DDPM(build_unet(device), timesteps, 1e-4 * scale, min(0.02 * scale, 0.999))
    if predict == "v":
        process.model = NoiseFromV(process.model, process.alpha_bars)
    return process


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

OPTIONS = "epochs", "batch_size", "lr", "seed", "timesteps", "predict", "limit"


def fit(args, train_loader, path):
    """Train with the options `args`, such as parse_args([]), save the model at `path`; returns load(path).

    train_loader: of common.load_mnist. Adam with the one-cycle policy of Smith & Topin (2017,
    arXiv:1708.07120): the learning rate rises to args.lr, then falls to almost 0. The guiding model is a copy
    of the network after a twelfth of the epochs; a single epoch has none. checkpoint.pt, beside `path`, is
    written after each epoch, and removed at the end. Raises FloatingPointError if the training diverges;
    OSError if a file can't be written, or if checkpoint.pt is there without args.resume, or has other
    options.
    """
    # tolist() makes numpy's numbers plain: torch.load refuses them. pixel_sum distinguishes sets of images.
    options = {name: np.asarray(getattr(args, name)).tolist() for name in OPTIONS}
    options["pixel_sum"] = train_loader.dataset.tensors[0].sum().item()
    epochs, checkpoint = options["epochs"], os.path.join(os.path.dirname(path), "checkpoint.pt")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    torch.manual_seed(args.seed)
    process = build_ddpm(args.timesteps, args.predict, args.device)
    model, guide = process.model, None
    optimizer = torch.optim.Adam(model.parameters(), lr=options["lr"], fused=True)
    # One-cycle, clipping and beta2 0.99, after three epochs of the annex: worth 251 ± 42, not 631 ± 37.
    total_steps = epochs * len(train_loader)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=options["lr"], total_steps=total_steps)
    losses, seconds = [], 0.0
    parameters = sum(p.numel() for p in model.parameters())
    print(f"DDPM on {args.device} ({args.precision}): {parameters:,} parameters")

    if args.resume:
        saved = read(checkpoint)
        for name, value in options.items():
            if (before := saved["options"][name]) != value:
                why = ", and its learning rate falls to 0 by then" if name == "epochs" else ""
                mend = "start as before (pixel_sum: the images in --data-dir), or delete it to start again"
                raise OSError(f"{checkpoint} was started with {name} {before}, not {value}{why}: {mend}")
        restore(saved, checkpoint, model=model, optimizer=optimizer, scheduler=scheduler)
        losses, seconds = saved["losses"], saved["seconds"]
        if saved["guide"] is not None:
            guide = copy.deepcopy(model)
            restore(saved, checkpoint, guide=guide)
        print(f"Resuming after epoch {len(losses)}")
    elif os.path.exists(checkpoint):
        mend = "--resume continues it; delete it to start again"
        raise OSError(f"{checkpoint} is an unfinished training: {mend}")

    for epoch in range(len(losses), epochs):
        # Two seeds below a million never draw the same; a resumed run draws what an uninterrupted one draws.
        torch.manual_seed((options["seed"] + 10**6 * (epoch + 1)) % 2**64)
        start = time.perf_counter()
        avg_loss = train_epoch(process, train_loader, optimizer, scheduler, args.precision == "bf16")
        seconds += time.perf_counter() - start
        if not math.isfinite(avg_loss) or not all(p.isfinite().all() for p in model.parameters()):
            raise FloatingPointError(f"diverged in epoch {epoch + 1}, loss {avg_loss}: try a smaller --lr")
        losses.append(avg_loss)
        if epoch + 1 == max(1, round(epochs / 12)) < epochs:
            guide = copy.deepcopy(model)
        parts = {"model": model, "guide": guide, "optimizer": optimizer, "scheduler": scheduler}
        save(checkpoint, options, losses, seconds, **parts)  # before print, whose output may be closed
        print(f"Epoch [{epoch + 1}/{epochs}] Average loss: {avg_loss:.4f}", flush=True)
    save(path, options, losses, seconds, model=model, guide=guide)
    os.remove(checkpoint)
    print(f"Model saved: {path}")
    return load(path, args.device)


def save(path, options, losses, seconds, **parts):
    """Write a file with the state of each part, beside `path`, and move it there when it is complete."""
    saved = {"script": "ddpm", "options": options, "losses": losses, "seconds": seconds}
    saved |= {name: None if part is None else part.state_dict() for name, part in parts.items()}
    buffer = io.BytesIO()  # in memory first: torch.save to a full disk raises no OSError
    torch.save(saved, buffer)
    with open(f"{path}.new", "wb") as f:
        f.write(buffer.getbuffer())
    os.replace(f"{path}.new", path)  # if this is refused, its error names the complete file


def read(path):
    """The dictionary that `save` wrote. Raises OSError if the file is missing, damaged or another one."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["script"] != "ddpm":
            raise OSError(f"it is a model of {saved['script']}.py")
    except (OSError, RuntimeError) as error:  # missing, locked, or cut short
        raise OSError(f"can't load {path}: {textwrap.shorten(str(error), 200)}") from error
    except Exception as error:  # any other file
        raise OSError(f"{path} is not a model of these scripts ({type(error).__name__})") from error
    return saved


def restore(saved, path, **parts):
    """Give each part its saved state. Raises OSError if it does not fit: the network was edited since."""
    try:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    except (KeyError, RuntimeError, ValueError) as error:
        why = textwrap.shorten(str(error), 200)
        raise OSError(f"the network is not that of {path}, or an older version saved it ({why})") from error


def load(path, device="cpu"):
    """The DDPM in ddpm.pt or checkpoint.pt, and its guiding model, or None.

    The DDPM also has the options, losses and seconds of its training. Raises OSError if the file is missing,
    damaged or another one.
    """
    saved = read(path)
    process = build_ddpm(saved["options"]["timesteps"], saved["options"]["predict"], device)
    restore(saved, path, model=process.model)
    guide = None
    if saved["guide"] is not None:
        guide = copy.deepcopy(process.model)
        restore(saved, path, guide=guide)
    process.options, process.losses, process.seconds = saved["options"], saved["losses"], saved["seconds"]
    return process, guide


def plot_noising(process, x0, save_dir="results"):
    """Draw the image x0, (1, 1, 28, 28) in [-1, 1], at ten times t, each with its own noise (figure 4 a)."""
    times = torch.linspace(0, process.timesteps - 1, 10).round().long().to(process.device)
    x_t = process.forward_process(x0.expand(10, -1, -1, -1), times)
    fig = common.plot_images(to_pixels(x_t), 1, 10, (10, 1.7), "Évolution du chiffre vers le bruit")
    for ax, t in zip(fig.axes, times.tolist()):
        ax.set_title(f"t={t}", fontsize=9)
    common.save_figure(fig, save_dir, "noising.png")


def plot_denoising(xs, save_dir="results"):
    """Draw n images on their way from noise, a row each (figure 4 b). xs: the list of sample_fast."""
    stages = torch.linspace(0, len(xs) - 1, 10).round().long().tolist()
    images = torch.stack([to_pixels(xs[i]) for i in stages], dim=1).flatten(0, 1)  # (n * 10, 1, 28, 28)
    n = len(xs[0])
    fig = common.plot_images(images, n, 10, (10, n + 0.3), "Évolution du bruit vers le chiffre")
    common.save_figure(fig, save_dir, "denoising.png")


def has_bf16(device):
    """Whether bfloat16 is known to be fast on the device, a str: recent GPUs, AMX, AVX512-BF16."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # older versions can't tell
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
    add("--sampler", choices=["fast", "ddpm"], default="fast", help="of samples.png; ddpm: the report's")
    add("--steps", type=int, default=20, help="steps of the fast sampler, at most as many as time steps")
    add("--guidance", type=float, default=1.5, help="weight of the guidance in the fast sampler; 1: none")
    add("--device", default=device, help="a torch device")
    add("--fp32", action="store_true", help="compute in float32 even where bfloat16 is faster")
    folder = os.path.expanduser  # "~" is the home folder
    add("--data-dir", type=folder, default="data", help="folder of MNIST, downloaded if missing")
    add("--save-dir", type=folder, default="results/ddpm", help="folder of the model and the figures")
    add("--limit", type=int, default=60000, metavar="N", help="train on the first N images only")
    one_of = parser.add_mutually_exclusive_group().add_argument
    one_of("--resume", action="store_true", help="continue an unfinished training, with its options")
    one_of("--load", type=folder, metavar="PATH", help="no training: a saved model, with its options")
    args = parser.parse_args(argv)
    if args.resume:  # its options are the defaults; fit refuses another one
        parser.set_defaults(**read(os.path.join(args.save_dir, "checkpoint.pt"))["options"])
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
    args.precision = "bf16" if has_bf16(args.device) and not args.fp32 else "fp32"
    return args


def main(argv=None):
    args = parse_args(argv)
    os.makedirs(args.save_dir, exist_ok=True)
    tempfile.TemporaryFile(dir=args.save_dir).close()  # fails now, not after the training
    train_loader, test_loader = common.load_mnist(args.data_dir, args.batch_size, args.device, args.limit)
    if args.load is None:
        process, guide = fit(args, train_loader, os.path.join(args.save_dir, "ddpm.pt"))
    else:
        process, guide = load(args.load, args.device)
    if guide is None:
        print("No guiding model (after a single epoch, or early in a training): the samples are not guided")

    torch.manual_seed(args.seed)  # so that --load draws the same figures, if no other option changes
    with torch.autocast(process.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        print(f"Held-out loss: {evaluate(process, test_loader):.4f}")
        common.plot_losses(process.losses, args.save_dir)
        x, _ = next(iter(test_loader))
        plot_noising(process, 2.0 * x[:1].to(process.device) - 1.0, args.save_dir)
        plot_denoising(sample_fast(process, 6, args.steps, guide, args.guidance), args.save_dir)
        if args.sampler == "ddpm":
            images = process.sample(64)
        else:
            images = to_pixels(sample_fast(process, 64, args.steps, guide, args.guidance)[-1])
        title = "Exemples de chiffres MNIST générés par le modèle DDPM"
        common.save_figure(common.plot_images(images, 8, 8, (8, 8), title), args.save_dir, "samples.png")


if __name__ == "__main__":
    try:
        main()
    except (OSError, FloatingPointError) as error:
        sys.exit(f"ddpm.py: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"ddpm.py: {error} Try a smaller --batch-size.")
    except KeyboardInterrupt:
        saved = "after 'Epoch' above, --resume continues; after 'Model saved', --load PATH draws the figures"
        sys.exit(f"ddpm.py: interrupted; {saved}")
