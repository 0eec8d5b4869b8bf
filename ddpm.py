"""The DDPM of the report's section 5 and annex, on MNIST (Ho, Jain & Abbeel, 2020).

    python ddpm.py                                              train, draw the report's figure 4
    python ddpm.py --resume                                     go on after an interruption
    python ddpm.py --load results/ddpm/ddpm.pt --sampler ddpm   samples.png in the report's 1000 steps

Diffusion mixes a clean image, called x_0, with more and more Gaussian noise. After step t = 0, ..., 999 it is

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise,

where alpha_bar_t falls from almost 1 (an image with a little noise) to almost 0 (only noise). The network
sees x_t and t, and learns to predict the noise. Solved for x_0, the same formula then estimates the image.
Sampling starts from pure noise; each step, from t = 999 down to 0, takes a little of the predicted noise away
and adds a little new noise.

The annex comes first, then what goes beyond it: v (a mix of noise and image), a fast sampler, the training.
Needs common.py beside it. All the options: --help.
"""

import argparse
import copy
import math
import os
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

import common

# ---- The annex


class SinusoidalPositionEmbeddings(nn.Module):
    """t, (B,) -> (B, dim): sines, then cosines, of t at dim / 2 frequencies from 1 to 1 / 10000 (annex)."""

    def __init__(self, dim):
        super().__init__()
        if dim < 4 or dim % 2:  # the listing divides by 0 for 2, and returns dim - 1 numbers if dim is odd
            raise ValueError(f"the time embedding takes an even dimension of at least 4, not {dim}")
        self.dim = dim

    def forward(self, time):
        device = time.device
        half_dim = self.dim // 2
        embeddings = math.log(10000) / (half_dim - 1)  # np.log in the listing: float64 for torch.compile
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

    Step t draws x_t ~ N(sqrt(alpha_t) x_{t-1}, beta_t I), with alpha_t = 1 - beta_t. All the steps up to t
    together are forward_process, where alpha_bar_t is the product alpha_0 ... alpha_t.
    """

    def __init__(self, model, timesteps=1000, beta_start=1e-4, beta_end=0.02, device=None):
        self.model = model
        self.timesteps = timesteps
        self.device = torch.device(device or next(model.parameters()).device)  # "cuda" in the listing

        self.betas = torch.linspace(beta_start, beta_end, timesteps, device=self.device)
        self.alphas = 1.0 - self.betas
        self.alpha_bars = torch.cumprod(self.alphas, dim=0)

        print(f"Beta schedule: {beta_start} -> {beta_end}")
        print(f"Alpha bars: {self.alpha_bars[0]:.3f} -> {self.alpha_bars[-1]:.3f}")
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
        """
        t = torch.clamp(t, 0, self.timesteps - 1)
        pred_noise = self.model(x, t)

        alpha_t = self.alphas[t].view(-1, 1, 1, 1)
        alpha_bar_t = self.alpha_bars[t].view(-1, 1, 1, 1)
        beta_t = self.betas[t].view(-1, 1, 1, 1)

        mean = (x - beta_t * pred_noise / torch.sqrt(1 - alpha_bar_t)) / torch.sqrt(alpha_t)

        # The listing tests t[0] > 0, but each image may have its own t. At t = 0 the mean is its else:
        # there alpha_bar_0 = alpha_0 = 1 - beta_0, so beta_0 / sqrt(1 - alpha_bar_0) = sqrt(1 - alpha_bar_0).
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
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)  # not in the listing: a high --lr stays stable
        optimizer.step()
        return loss.detach()  # loss.item() would wait for the GPU at every step

    def sample(self, num_samples=16, image_size=(28, 28)):
        """Images, (num_samples, 1, H, W) in [0, 1], in `timesteps` steps (Ho et al., algorithm 2)."""
        self.model.eval()
        with torch.no_grad():
            x = torch.randn(num_samples, 1, image_size[0], image_size[1], device=self.device)
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

    v = sqrt(a) noise - sqrt(1 - a) x_0, where a = alpha_bar_t (Salimans & Ho, 2022, appendix D). Then
    sqrt(a) v + sqrt(1 - a) x_t is the noise: insert x_t = sqrt(a) x_0 + sqrt(1 - a) noise, the x_0 terms
    cancel, and (a + 1 - a) noise remains.

    Why v: at a large t, a is near 0, and x_0 = (x_t - sqrt(1 - a) noise) / sqrt(a) magnifies an error of the
    noise, 157 times at t = 999. An error e of v is sqrt(a) e in the noise, and so sqrt(1 - a) e in x_0, never
    magnified. The loss is still the report's, on the noise. alpha_bars: those of the DDPM, (timesteps,).
    """

    def __init__(self, unet, alpha_bars):
        super().__init__()
        self.unet = unet
        self.register_buffer("alpha_bars", alpha_bars, persistent=False)

    def forward(self, x, t):
        alpha_bar_t = self.alpha_bars[t].view(-1, 1, 1, 1)
        return torch.sqrt(alpha_bar_t) * self.unet(x, t) + torch.sqrt(1 - alpha_bar_t) * x


@torch.no_grad()
def sample_fast(ddpm, guide, num_samples=16, steps=30, guidance=1.5):
    """Generate images in few steps; returns the list of all x_t, (n, 1, 28, 28), the last one x_0.

    x_0 is in [-1, 1] but for small errors: clamp it. Without a guiding model, pass ddpm.model as `guide`:
    then guidance has no effect. One step goes from t to the next time s, a jump over many time steps:

    1. The network predicts the noise, and the noise implies x_0, an estimate that changes on the way to s.
       The sampler takes its value at the midpoint, half a jump ahead, on a straight line through the last two
       estimates. The line's abscissa is log(SNR) = log(alpha_bar / (1 - alpha_bar)) (SDE-DPM-Solver++(2M), Lu
       et al., 2022, "DPM-Solver++").
    2. Guidance > 1 extrapolates: x_0 = guide + guidance * (model - guide), that is x_0 of the model plus
       (guidance - 1) * (model - guide), where `guide` is the same network after less training (autoguidance:
       Karras et al., 2024, "Guiding a diffusion model with a bad version of itself"). There is none outside
       of 0.2 <= t / timesteps < 0.6 (an interval, as in Kynkäänniemi et al., 2024).
    3. x_s is drawn from the posterior q(x_s | x_t, x_0) (Ho et al., eq. 6 and 7, which hold for any s < t:
       they are Bayes' rule for q(x_t | x_s) and q(x_s | x_0)).
    """
    ddpm.model.eval()
    guide.eval()
    steps = min(steps, ddpm.timesteps)
    u = torch.linspace(1, 0, steps)
    # From timesteps - 1 to 0, closer near 0, where x_0 gets its details; the first term keeps them apart.
    times = (steps - 1) * u + (ddpm.timesteps - steps) * u**3
    times = times.round().long().tolist()
    alpha_bars = [*ddpm.alpha_bars[times].tolist(), 1.0]  # x_0 has no noise
    log_snr = [math.log(bar / (1 - bar)) for bar in alpha_bars[:-1]]
    x, x0_last = torch.randn(num_samples, 1, 28, 28, device=ddpm.device), None
    xs = [x]
    for i in tqdm(range(steps), desc="Génération", leave=False):
        t = torch.full((num_samples,), times[i], device=ddpm.device)
        bar_t, bar_s = alpha_bars[i], alpha_bars[i + 1]  # alpha_bar at t and at s

        noise = ddpm.model(x, t).float()
        x0 = x0_mid = (x - math.sqrt(1 - bar_t) * noise) / math.sqrt(bar_t)
        # The last jump ends at log(SNR) = infinity and has no midpoint: there bar_s = 1, so that below the
        # variance is 0 and the mean x_0.
        if 0 < i < steps - 1:
            jump_ratio = (log_snr[i + 1] - log_snr[i]) / (log_snr[i] - log_snr[i - 1])
            x0_mid = x0 + jump_ratio / 2 * (x0 - x0_last)
        x0_last = x0
        if guidance != 1 and 0.2 <= times[i] / ddpm.timesteps < 0.6:
            noise_guide = guide(x, t).float()
            x0_guide = (x - math.sqrt(1 - bar_t) * noise_guide) / math.sqrt(bar_t)
            x0_mid = x0_mid + (guidance - 1) * (x0 - x0_guide)

        alpha = bar_t / bar_s  # the product of the alphas from s + 1 to t, in place of alpha_t in eq. 7
        mean = (math.sqrt(bar_s) * (1 - alpha) * x0_mid + math.sqrt(alpha) * (1 - bar_s) * x) / (1 - bar_t)
        variance = (1 - bar_s) * (1 - alpha) / (1 - bar_t)
        x = mean + math.sqrt(variance) * torch.randn_like(x)
        xs.append(x)
    return xs


# ---- Training


def build_unet():
    """The annex's U-Net, with initial weights under which the signal shrinks less (He et al., 2015).

    It has no normalisation layers against that. A sum of fan_in products has fan_in times the mean square of
    one: weights of variance 1 / fan_in keep it. ReLU halves it, so He et al. take 2 / fan_in before; SiLU
    then leaves 0.5 to 0.7 of it. With PyTorch's default, 1 / (3 fan_in), a tenth would be left in each layer.
    """
    model = SimpleMNistUNet()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # fan_in = in_channels * 3 * 3
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.ConvTranspose2d):  # no SiLU follows; a pixel sees 2x2 of the 4x4
            nn.init.normal_(module.weight, std=(module.in_channels * 2 * 2) ** -0.5)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(model.final_conv.weight)  # predicts 0 at first
    return model.to(memory_format=torch.channels_last)  # the fastest layout for convolutions


def build_ddpm(timesteps=1000, predict="v", device="cpu"):
    """A DDPM with an untrained U-Net that predicts "v" or "noise"; timesteps: 2 or more."""
    scale = 1000 / timesteps  # as much noise in fewer steps, as in the code of Nichol & Dhariwal (2021)
    ddpm = DDPM(build_unet().to(device), timesteps, 1e-4 * scale, min(0.02 * scale, 0.999))
    if predict == "v":
        ddpm.model = NoiseFromV(ddpm.model, ddpm.alpha_bars)
    return ddpm


def build_ema(model):
    """A running average of the weights of `model`, called EMA as usual.

    ema.update_parameters(model) belongs after each step; ema.module is the averaged network. Step 1 copies
    the weights; step k, where n is k - 1 below, does average = k / (k + 9) average + 9 / (k + 9) weights.
    Multiplied out, the weights of step k have a share of about 9 k**8 / N**9 after N steps: whatever the
    length of the training, its last tenth makes 60% of the average, its first half 0.2% (a power function
    average: Karras et al., 2024, "Analyzing and improving the training dynamics of diffusion models").
    """
    return AveragedModel(model, avg_fn=lambda average, weights, n: average.lerp(weights, 9 / (10 + n)))


def train_epoch(ddpm, dataloader, optimizer, scheduler=None, ema=None, bf16=False):
    """One pass over a loader of images in [0, 1]; returns the average loss, the MSE of the noise.

    scheduler: makes one step per batch; ema: of build_ema. bf16: compute in bfloat16, a float of 16 bits,
    with the range of float32 but 8 bits of precision, not 24: faster where the hardware has it.
    """
    train_loss = torch.zeros((), device=ddpm.device)
    for x, _ in tqdm(dataloader, leave=False):
        x0 = 2.0 * x.to(ddpm.device) - 1.0  # from [0, 1] to [-1, 1]
        # autocast casts each weight to bfloat16 once and reuses the copy until it ends. So it stands around
        # each step: around the loop, the network would compute with its first weights throughout. PyTorch
        # advises to leave backward() outside, but the annex's train_step has all in one.
        with torch.autocast(ddpm.device.type, torch.bfloat16, enabled=bf16):
            train_loss += ddpm.train_step(x0, optimizer)
        if scheduler is not None:
            scheduler.step()
        if ema is not None:
            ema.update_parameters(ddpm.model)
    return train_loss.item() / len(dataloader)


@torch.no_grad()
def evaluate(ddpm, data_loader):
    """The mean squared error of the predicted noise, with one random t for each image; images in [0, 1].

    Raises FloatingPointError if it is not finite.
    """
    ddpm.model.eval()
    loss = 0.0
    for x, _ in data_loader:
        x0 = 2.0 * x.to(ddpm.device) - 1.0
        t = torch.randint(0, ddpm.timesteps, (len(x0),), device=ddpm.device)
        noise = torch.randn_like(x0)
        x_t = ddpm.forward_process(x0, t, noise)
        loss += F.mse_loss(ddpm.model(x_t, t), noise).item() * len(x0)
    if not math.isfinite(loss):
        raise FloatingPointError(f"the held-out loss is {loss}: try a smaller --lr")
    return loss / len(data_loader.dataset)


OPTIONS = "epochs", "batch_size", "lr", "seed", "timesteps", "predict", "limit"


def fit(args, train_loader, path):
    """Train with the options `args`, such as parse_args([]), save the model at `path`; returns load(path).

    train_loader: of common.load_mnist. Adam with the one-cycle policy of Smith & Topin (2017): the learning
    rate rises to args.lr, then falls to almost 0. The guiding model is the EMA after the first epoch.
    checkpoint.pt, beside `path`, is written after each epoch, for --resume. Raises FloatingPointError after
    an epoch whose loss is not finite, OSError if a file can't be written, or read, or resumed with these
    options.
    """
    torch.manual_seed(args.seed)
    ddpm = build_ddpm(args.timesteps, args.predict, args.device)
    model = ddpm.model
    ema, guide = build_ema(model), copy.deepcopy(model)
    # Adam's betas: OneCycleLR replaces the 0.9, by 0.95 to 0.85 and back; 0.99 gave a lower loss than 0.999.
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.99), fused=True)
    total_steps = int(args.epochs) * len(train_loader)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=total_steps)
    parts = {"model": model, "ema": ema, "guide": guide, "optimizer": optimizer, "scheduler": scheduler}
    # tolist() makes plain numbers of numpy's: load takes no others. The sum of the pixels tells images apart.
    options = {name: np.asarray(getattr(args, name)).tolist() for name in OPTIONS}
    options["pixel_sum"] = train_loader.dataset.tensors[0].sum().item()
    losses, seconds = [], 0.0
    checkpoint_path = os.path.join(os.path.dirname(path), "checkpoint.pt")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"DDPM on {args.device} ({args.precision}): {parameters:,} parameters")

    if args.resume:
        try:
            saved = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
            for name, value in options.items():
                if (before := saved["options"][name]) != value:
                    raise ValueError(f"trained with {name} {before}, not {value}: give the same options")
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            losses, seconds = saved["losses"], saved["seconds"]
        except Exception as error:
            raise unreadable(checkpoint_path, error) from error
        print(f"Resuming after epoch {len(losses)}")

    for epoch in range(len(losses), args.epochs):
        # A seed per epoch: a resumed run draws what an uninterrupted one draws.
        torch.manual_seed((args.seed + epoch + 1) % 2**64)
        start = time.perf_counter()
        avg_loss = train_epoch(ddpm, train_loader, optimizer, scheduler, ema, args.precision == "bf16")
        if not math.isfinite(avg_loss):
            raise FloatingPointError(f"the loss is {avg_loss} in epoch {epoch + 1}: try a smaller --lr")
        print(f"Epoch [{epoch + 1}/{args.epochs}] Average loss: {avg_loss:.4f}", flush=True)
        losses.append(avg_loss)
        seconds += time.perf_counter() - start
        if epoch == 0:
            guide.load_state_dict(ema.module.state_dict())
        save(options, losses, seconds, parts, checkpoint_path)
    save(options, losses, seconds, {"ema": ema, "guide": guide}, path)
    print(f"Model saved: {path}")
    return load(path, args.device)


def save(options, losses, seconds, parts, path):
    """Write a file, and move it to `path` once it is complete: else an earlier file stays there."""
    saved = {"script": "ddpm", "options": options, "losses": losses, "seconds": seconds}
    saved |= {name: part.state_dict() for name, part in parts.items()}
    folder = os.path.dirname(path) or "."
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as tmp:
            torch.save(saved, os.path.join(tmp, "model.pt"))
            os.replace(os.path.join(tmp, "model.pt"), path)
    except RuntimeError as error:  # torch's own, instead of an OSError
        raise OSError(f"can't write {path}, is the disk full? ({str(error).splitlines()[0]})") from error


def load(path, device="cpu"):
    """The DDPM in ddpm.pt or checkpoint.pt, with the EMA of the weights, and its guiding model.

    The DDPM also has the options, losses and seconds of its training. Raises OSError if the file is missing,
    damaged or another one.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["script"] != "ddpm":
            raise ValueError(f"it is a model of {saved['script']}.py")
        ddpm = build_ddpm(saved["options"]["timesteps"], saved["options"]["predict"], device)
        ema, guide = build_ema(ddpm.model), copy.deepcopy(ddpm.model)
        ema.load_state_dict(saved["ema"])
        guide.load_state_dict(saved["guide"])
        ddpm.model = ema.module
        ddpm.options, ddpm.losses, ddpm.seconds = saved["options"], saved["losses"], saved["seconds"]
    except Exception as error:  # an arbitrary file can fail in any way
        raise unreadable(path, error) from error
    return ddpm, guide


def unreadable(path, error):
    """The OSError that says in one line why the file can't be loaded."""
    if isinstance(error, FileNotFoundError):
        return OSError(f"there is no {path}")
    if isinstance(error, ValueError):  # such as those above, whose words are enough
        return OSError(f"can't load {path}: {error}")
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return OSError(f"can't load {path}, is it damaged or another file? {reason[:200]}")


# ---- The figures and the command line


def plot_noising(ddpm, x0, save_dir="results"):
    """Draw the image x0, (1, 1, 28, 28) in [-1, 1], at ten times t, each with its own noise (figure 4 a)."""
    times = torch.linspace(0, ddpm.timesteps - 1, 10).round().long().to(ddpm.device)
    x_t = ddpm.forward_process(x0.expand(10, -1, -1, -1), times)
    fig = common.plot_images((x_t + 1) / 2, 1, 10, (10, 1.7), "Évolution du chiffre vers le bruit")
    for ax, t in zip(fig.axes, times.tolist()):
        ax.set_title(f"t={t}", fontsize=9)
    common.save_figure(fig, save_dir, "noising.png")


def plot_denoising(xs, save_dir="results"):
    """Draw n images on their way from noise, a row each (figure 4 b). xs: the list of sample_fast."""
    stages = torch.linspace(0, len(xs) - 1, 10).round().long().tolist()
    images = torch.stack([xs[i] for i in stages], dim=1).flatten(0, 1)  # (n * 10, 1, 28, 28)
    n = len(xs[0])
    fig = common.plot_images((images + 1) / 2, n, 10, (10, n + 0.3), "Évolution du bruit vers le chiffre")
    common.save_figure(fig, save_dir, "denoising.png")


def has_bf16(device):
    """Whether bfloat16 is known to be fast on the device, a str: recent GPUs, AMX, AVX512-BF16."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)
    cpu = getattr(torch.cpu, "get_capabilities", dict)() if device == "cpu" else {}  # not in older versions
    return cpu.get("avx512_bf16", False) or cpu.get("amx_bf16", False)


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
    add("--sampler", choices=["fast", "ddpm"], default="fast", help="of the samples; ddpm: the report's")
    add("--steps", type=int, default=30, help="steps of the fast sampler")
    add("--guidance", type=float, default=1.5, help="weight of the guidance in the fast sampler; 1: none")
    add("--num-samples", type=int, metavar="N", help="write N samples to samples.npy, too")
    add("--device", default=device, help="a torch device")
    precision = "auto: bf16 if the hardware has it (faster), else fp32"
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help=precision)
    folder = os.path.expanduser  # "~" is the home folder
    add("--data-dir", type=folder, default="data", help="folder of MNIST, downloaded if missing")
    add("--save-dir", type=folder, default="results/ddpm", help="folder of the model and the figures")
    add("--limit", type=int, default=60000, metavar="N", help="train on the first N images only")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="resume from checkpoint.pt, after its last epoch")
    mode.add_argument("--load", type=folder, metavar="PATH", help="no training: figures of a saved model")
    args = parser.parse_args(argv)

    for option, valid, takes in (
        ("--epochs", args.epochs >= 1, "a whole number >= 1"),
        ("--batch-size", args.batch_size >= 1, "a whole number >= 1"),
        ("--lr", 0 < args.lr < math.inf, "a finite number above 0"),
        ("--seed", -(2**63) <= args.seed < 2**64, "a whole number from -2**63 to 2**64 - 1"),
        ("--timesteps", 2 <= args.timesteps <= 10**6, "a whole number from 2 to 1000000"),
        ("--steps", args.steps >= 1, "a whole number >= 1"),
        ("--guidance", 0 <= args.guidance <= 100, "a number from 0 to 100"),
        ("--num-samples", args.num_samples is None or args.num_samples >= 1, "a whole number >= 1"),
        ("--limit", args.limit >= 1, "a whole number >= 1"),
    ):
        if not valid:
            parser.error(f"argument {option}: takes {takes}")
    try:
        torch.zeros(1, device=args.device).item()
    except Exception as error:  # torch has several types for it
        reason = str(error).splitlines()[0]
        parser.error(f"argument --device: {args.device} can't be used ({reason}); try --device cpu")
    if args.precision == "bf16" and not has_bf16(args.device):
        parser.error(f"argument --precision: takes auto or fp32 here, {args.device} has no bfloat16")
    if args.precision == "auto":
        args.precision = "bf16" if has_bf16(args.device) else "fp32"
    return args


def main(argv=None):
    args = parse_args(argv)
    common.make_folder(args.save_dir)
    train_loader, test_loader = common.load_mnist(args.data_dir, args.batch_size, args.device, args.limit)
    if args.load is None:
        ddpm, guide = fit(args, train_loader, os.path.join(args.save_dir, "ddpm.pt"))
    else:
        ddpm, guide = load(args.load, args.device)

    def sample(n):
        if args.sampler == "ddpm":
            return ddpm.sample(n)
        return (sample_fast(ddpm, guide, n, args.steps, args.guidance)[-1].clamp(-1, 1) + 1) / 2

    torch.manual_seed(args.seed)  # the figures depend on the model alone, trained now or loaded
    with torch.autocast(ddpm.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        print(f"Held-out loss: {evaluate(ddpm, test_loader):.4f}")
        common.plot_losses(ddpm.losses, args.save_dir)
        x, _ = next(iter(test_loader))
        plot_noising(ddpm, 2.0 * x[:1].to(ddpm.device) - 1.0, args.save_dir)
        plot_denoising(sample_fast(ddpm, guide, 6, args.steps, args.guidance), args.save_dir)
        title = "Exemples de chiffres MNIST générés par le modèle DDPM"
        common.save_figure(common.plot_images(sample(64), 8, 8, (8, 8), title), args.save_dir, "samples.png")
        if args.num_samples:
            batches = torch.arange(args.num_samples).split(100)  # to save memory
            path = os.path.join(args.save_dir, "samples.npy")
            np.save(path, torch.cat([sample(len(batch)).cpu() for batch in batches]).numpy())
            print(f"Samples saved: {path}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, FloatingPointError) as error:
        sys.exit(f"ddpm.py: {error}")
    except KeyboardInterrupt:
        sys.exit("ddpm.py: interrupted (--resume continues after the last complete epoch, if there is one)")
