"""The DDPM of the report's section 5 and annex, on MNIST (Ho, Jain & Abbeel, 2020).

    python ddpm.py                                              train, draw the report's figure 4
    python ddpm.py --resume                                     go on after an interruption
    python ddpm.py --load results/ddpm/ddpm.pt --sampler ddpm   sample in the report's 1000 steps

First the annex, then what goes beyond it: a network that predicts v, a fast sampler, the training.
"""

import argparse
import copy
import math
import os
import sys
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
        if dim < 4 or dim % 2:  # the listing divides by 0 for 2, and returns dim - 1 numbers if dim is odd
            raise ValueError(f"the time embedding takes an even dimension of at least 4, not {dim}")
        self.dim = dim

    def forward(self, time):
        device = time.device
        half_dim = self.dim // 2
        embeddings = np.log(10000) / (half_dim - 1)
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
    """x_t, (B, 1, 28, 28), and t, (B,) -> the noise in x_t, (B, 1, 28, 28) (annex)."""

    def __init__(self, in_channels=1, out_channels=1, time_emb_dim=64):
        super().__init__()
        if in_channels != out_channels:  # mse_loss would compare arrays of different shapes
            raise ValueError("the noise is as large as the image: in_channels and out_channels must be equal")
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

    t goes from 0, a little noise, to timesteps - 1, only noise; Ho et al. count from 1. x_0 is the clean
    image, before t = 0. Images are (B, 1, H, W) in [-1, 1]. With other timesteps the betas must be scaled
    (see build_ddpm).
    """

    def __init__(self, model, timesteps=1000, beta_start=1e-4, beta_end=0.02, device=None):
        self.model = model
        self.timesteps = timesteps
        self.device = device or next(model.parameters()).device

        self.betas = torch.linspace(beta_start, beta_end, timesteps, device=self.device)
        self.alphas = 1.0 - self.betas
        self.alpha_bars = torch.cumprod(self.alphas, dim=0)

        print(f"Beta schedule: {beta_start} -> {beta_end}")
        print(f"Alpha bars: {self.alpha_bars[0]:.3f} -> {self.alpha_bars[-1]:.3f}")
        print(f"Nombre de timesteps: {timesteps}")

    def forward_process(self, x0, t, noise=None):
        """Add noise to x0: sample x_t ~ q(x_t | x_0), t: (B,), from `noise`, if given (Ho et al., eq. 4)."""
        if noise is None:
            noise = torch.randn_like(x0)
        t = torch.clamp(t, 0, self.timesteps - 1)
        alpha_bar_t = self.alpha_bars[t].view(-1, 1, 1, 1)
        x_t = torch.sqrt(alpha_bar_t) * x0 + torch.sqrt(1 - alpha_bar_t) * noise
        return x_t

    def reverse_process(self, x, t):
        """Sample x_{t-1} ~ p(x_{t-1} | x_t), of variance beta_t; t: (B,) (Ho et al., algorithm 2)."""
        t = torch.clamp(t, 0, self.timesteps - 1)
        pred_noise = self.model(x, t)

        alpha_t = self.alphas[t].view(-1, 1, 1, 1)
        alpha_bar_t = self.alpha_bars[t].view(-1, 1, 1, 1)
        beta_t = self.betas[t].view(-1, 1, 1, 1)

        mean = (x - beta_t * pred_noise / torch.sqrt(1 - alpha_bar_t)) / torch.sqrt(alpha_t)

        # The listing tests t[0] > 0, but each image may have its own t. At t = 0 the mean is x_0, as there.
        noise = torch.randn_like(x) * (t > 0).view(-1, 1, 1, 1)
        std = torch.sqrt(beta_t)
        x_prev = mean + std * noise
        return x_prev

    def train_step(self, x0, optimizer):
        """One step on a batch of images; returns its loss, a tensor (Ho et al., eq. 14, algorithm 1)."""
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
            x = torch.clamp(x, -1.0, 1.0)
            x = (x + 1.0) / 2.0
        return x


# ---- Beyond the annex: v, fewer steps, guidance


class NoiseFromV(nn.Module):
    """Wraps a network that predicts v: takes x_t and t, returns the noise.

    v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0 (Salimans & Ho, 2022, appendix D), so that
    noise = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x_t. At a large t, alpha_bar is near 0: the noise is
    nearly x_t, and an error in v has little weight. The loss is still the report's, on the noise.
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

    Each step goes from t to the next time s by the posterior q(x_s | x_t, x_0) (Ho et al., eq. 6 and 7). For
    x_0 it takes the estimate at the midpoint of the step, extrapolated from the last two in
    log(SNR) = log(alpha_bar / (1 - alpha_bar)) (SDE-DPM-Solver++(2M), Lu et al., 2022, "DPM-Solver++").
    guidance > 1 extrapolates: noise = guide + guidance * (model - guide), where `guide` is the same network
    after less training (autoguidance, Karras et al., 2024), for t from 0.2 to 0.6 of the time steps
    (Kynkäänniemi et al., 2024).
    """
    ddpm.model.eval()
    guide.eval()
    u = torch.linspace(1, 0, steps)
    # From timesteps - 1 to 0, closer near 0; the first term keeps them apart.
    times = (steps - 1) * u + (ddpm.timesteps - steps) * u**2
    times = times.round().long().tolist()
    alpha_bars = [*ddpm.alpha_bars[times].tolist(), 1.0]  # x_0 has no noise
    log_snr = [math.log(a / (1 - a)) for a in alpha_bars[:-1]]
    x, x0_last = torch.randn(num_samples, 1, 28, 28, device=ddpm.device), None
    xs = [x]
    for i in tqdm(range(steps), desc="Génération", leave=False):
        t = torch.full((num_samples,), times[i], device=ddpm.device)
        a_t, a_s = alpha_bars[i], alpha_bars[i + 1]  # alpha_bar at t and at s

        noise = ddpm.model(x, t).float()
        if guidance != 1 and 0.2 <= times[i] / ddpm.timesteps < 0.6:
            noise_guide = guide(x, t).float()
            noise = noise_guide + guidance * (noise - noise_guide)

        x0 = x0_mid = (x - math.sqrt(1 - a_t) * noise) / math.sqrt(a_t)  # the noise implies x_0
        if x0_last is not None and i < steps - 1:  # the last step ends at log(SNR) = infinity: no midpoint
            step_ratio = (log_snr[i + 1] - log_snr[i]) / (log_snr[i] - log_snr[i - 1])
            x0_mid = x0 + step_ratio / 2 * (x0 - x0_last)  # half a step further on the line through both
        x0_last = x0

        alpha = a_t / a_s  # the product of the alphas from s + 1 to t; then eq. 7
        mean = (math.sqrt(a_s) * (1 - alpha) * x0_mid + math.sqrt(alpha) * (1 - a_s) * x) / (1 - a_t)
        variance = (1 - a_s) * (1 - alpha) / (1 - a_t)
        x = mean + math.sqrt(variance) * torch.randn_like(x)
        xs.append(x)
    return xs


# ---- Training


def build_unet():
    """The U-Net, its convolutions initialised as by He et al. (2015), to keep the variance in each layer.

    PyTorch's default shrinks it in each layer, and this U-Net has no normalisation against that.
    """
    model = SimpleMNistUNet()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.ConvTranspose2d):  # no ReLU follows; a pixel sees 2x2 of the 4x4
            nn.init.normal_(module.weight, std=(module.in_channels * 4) ** -0.5)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(model.final_conv.weight)  # predicts 0 at first
    return model.to(memory_format=torch.channels_last)  # the fastest layout for convolutions


def build_ddpm(timesteps=1000, predict="v", device="cpu"):
    """A DDPM with an untrained U-Net that predicts "v" or "noise"; with any `timesteps`, x_T is noise."""
    scale = 1000 / timesteps  # as much noise in fewer steps, as in the code of Nichol & Dhariwal (2021)
    ddpm = DDPM(build_unet().to(device), timesteps, 1e-4 * scale, min(0.02 * scale, 0.999))
    if predict == "v":
        ddpm.model = NoiseFromV(ddpm.model, ddpm.alpha_bars)
    return ddpm


@torch.no_grad()
def update_ema(ema, model, step):
    """Exponential moving average of the weights: decay 0.999, less during the first steps (step >= 1)."""
    decay = min(0.999, (1 + step) / (10 + step))  # as in TensorFlow's ExponentialMovingAverage
    for p_ema, p in zip(ema.parameters(), model.parameters()):
        p_ema.lerp_(p, 1 - decay)


@torch.no_grad()
def evaluate(ddpm, data_loader):
    """The mean squared error of the predicted noise, with one random t for each image.

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


def train_ddpm(args, dataloader):
    """Train with the options `args`; leave checkpoint.pt after each epoch and ddpm.pt after the last.

    Adam with the one-cycle policy of Smith & Topin (2017). The guiding model is the EMA after one epoch.
    Raises FloatingPointError after an epoch whose loss is not finite, OSError if the checkpoint to resume
    is missing, damaged, or of other options.
    """
    torch.manual_seed(args.seed)
    ddpm = build_ddpm(args.timesteps, args.predict, args.device)
    model = ddpm.model
    ema, guide = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.99), fused=True)
    total_steps = args.epochs * len(dataloader)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=total_steps)
    parts = {"model": model, "ema": ema, "guide": guide, "optimizer": optimizer, "scheduler": scheduler}
    checkpoint = {"script": "ddpm", "options": {name: getattr(args, name) for name in OPTIONS}}
    losses, seconds = [], 0.0
    path = os.path.join(args.save_dir, "checkpoint.pt")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"DDPM on {args.device} ({args.precision}): {parameters:,} parameters")

    if args.resume:
        saved = read(path, needed=[*parts, "rng"])
        for name, value in checkpoint["options"].items():
            if saved["options"][name] != value:
                option = f"--{name.replace('_', '-')} {saved['options'][name]}"
                raise OSError(f"{path} was trained with {option}, not {value}: resume with the same options")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.manual_seed(args.seed + len(saved["losses"]))  # a GPU's generator: not the first batches again
        torch.set_rng_state(saved["rng"])  # the CPU's generator: as if there had been no interruption
        checkpoint, losses, seconds = saved, saved["losses"], saved["seconds"]
        print(f"Resuming after epoch {len(losses)}")

    for epoch in range(len(losses), args.epochs):
        start = time.perf_counter()
        train_loss = torch.zeros((), device=ddpm.device)
        for x, _ in tqdm(dataloader, desc=f"Epoch {epoch + 1}", leave=False):
            x0 = 2.0 * x.to(ddpm.device) - 1.0
            with torch.autocast(ddpm.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                train_loss += ddpm.train_step(x0, optimizer)
            scheduler.step()
            update_ema(ema, model, scheduler.last_epoch)  # which counts steps here
        avg_loss = train_loss.item() / len(dataloader)
        if not math.isfinite(avg_loss):
            raise FloatingPointError(f"the loss is {avg_loss} in epoch {epoch + 1}: try a smaller --lr")
        print(f"Epoch [{epoch + 1}/{args.epochs}] Average loss: {avg_loss:.4f}", flush=True)
        losses.append(avg_loss)
        seconds += time.perf_counter() - start
        if epoch == 0:
            guide.load_state_dict(ema.state_dict())
        checkpoint |= {"losses": losses, "seconds": seconds, "rng": torch.get_rng_state()}
        checkpoint |= {name: part.state_dict() for name, part in parts.items()}
        save(checkpoint, path)

    path = os.path.join(args.save_dir, "ddpm.pt")
    keep = "script", "options", "losses", "seconds", "ema", "guide"
    save({name: checkpoint[name] for name in keep}, path)
    print(f"Model saved: {path}")


def save(saved, path):
    """Write the file and rename it once it is complete: a kill or a full disk leaves the earlier file."""
    try:
        torch.save(saved, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
        raise OSError(f"can't write {path}: is the disk full?") from error


def read(path, needed=("ema", "guide")):
    """The contents of ddpm.pt or checkpoint.pt. OSError if it is missing, damaged or another file."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["script"] != "ddpm" or not set(needed) <= set(saved):
            raise ValueError(saved["script"])
    except Exception as error:  # an arbitrary file can fail in any way
        raise OSError(f"{path} is missing, damaged, or not a model of ddpm.py") from error
    return saved


def load(path, device="cpu"):
    """The DDPM in ddpm.pt or checkpoint.pt, with the EMA of the weights, and its guiding model."""
    saved = read(path)
    ddpm = build_ddpm(saved["options"]["timesteps"], saved["options"]["predict"], device)
    guide = copy.deepcopy(ddpm.model)
    ddpm.model.load_state_dict(saved["ema"])
    guide.load_state_dict(saved["guide"])
    ddpm.losses, ddpm.seconds = saved["losses"], saved["seconds"]
    return ddpm, guide


# ---- The figures and the command line


def plot_samples(ddpm, guide, test_loader, args):
    """Draw the report's figure 4: from a digit to noise, from noise to digits (sample_fast), 64 samples."""
    times = torch.linspace(0, ddpm.timesteps - 1, 10).round().long().to(ddpm.device)
    x0 = 2.0 * next(iter(test_loader))[0][:1].to(ddpm.device) - 1.0
    x_t = ddpm.forward_process(x0.expand(10, -1, -1, -1), times)
    fig = common.plot_images((x_t + 1) / 2, 1, 10, (10, 1.7), "Évolution du chiffre vers le bruit")
    for ax, t in zip(fig.axes, times.tolist()):
        ax.set_title(f"t={t}", fontsize=9)
    common.save_figure(fig, args.save_dir, "noising.png")

    xs = sample_fast(ddpm, guide, 6, args.steps, args.guidance)
    stages = torch.linspace(0, len(xs) - 1, 10).round().long().tolist()
    images = torch.stack([xs[i] for i in stages], dim=1).flatten(0, 1)  # (6 * 10, 1, 28, 28)
    fig = common.plot_images((images + 1) / 2, 6, 10, (10, 6.3), "Évolution du bruit vers le chiffre")
    common.save_figure(fig, args.save_dir, "denoising.png")

    def sample(n):
        if args.sampler == "ddpm":
            return ddpm.sample(n)
        return (sample_fast(ddpm, guide, n, args.steps, args.guidance)[-1].clamp(-1, 1) + 1) / 2

    title = "Exemples de chiffres MNIST générés par le modèle DDPM"
    common.save_figure(common.plot_images(sample(64), 8, 8, (8, 8), title), args.save_dir, "samples.png")

    if args.num_samples:
        batches = torch.arange(args.num_samples).split(100)  # to save memory
        path = os.path.join(args.save_dir, "samples.npy")
        np.save(path, torch.cat([sample(len(batch)).cpu() for batch in batches]).numpy())
        print(f"Samples saved: {path}")


def has_bf16(device):
    """Whether the device computes in bfloat16 in hardware; False where an older torch can't tell."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = getattr(torch.cpu, "get_capabilities", dict)() if device == "cpu" else {}
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
    add("--data-dir", default="data", help="folder of MNIST, downloaded if missing")
    add("--save-dir", default="results/ddpm", help="folder of the model and the figures")
    add("--limit", type=int, default=60000, metavar="N", help="train on the first N images only")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="resume from checkpoint.pt, after its last epoch")
    mode.add_argument("--load", metavar="PATH", help="no training: draw the figures of a saved model")
    args = parser.parse_args(argv)

    most_steps = args.timesteps if args.load is None else math.inf  # a loaded model has its own
    for option, valid, takes in (
        ("--epochs", args.epochs >= 1, "a whole number >= 1"),
        ("--batch-size", args.batch_size >= 1, "a whole number >= 1"),
        ("--lr", 0 < args.lr < math.inf, "a finite number above 0"),
        ("--seed", 0 <= args.seed < 2**32, "a whole number from 0 to 2**32 - 1"),
        ("--timesteps", args.timesteps >= 2, "a whole number >= 2"),
        ("--steps", 1 <= args.steps <= most_steps, "a whole number from 1 to --timesteps"),
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
        train_ddpm(args, train_loader)
        args.load = os.path.join(args.save_dir, "ddpm.pt")
    ddpm, guide = load(args.load, args.device)
    if args.steps > ddpm.timesteps:
        raise OSError(f"{args.load} has {ddpm.timesteps} time steps: give --steps {ddpm.timesteps} or fewer")

    torch.manual_seed(args.seed)  # the figures depend on the model alone, trained now or loaded
    with torch.autocast(ddpm.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        print(f"Held-out loss: {evaluate(ddpm, test_loader):.4f}")
        common.plot_losses(ddpm.losses, args.save_dir)
        plot_samples(ddpm, guide, test_loader, args)


if __name__ == "__main__":
    try:
        main()
    except (OSError, FloatingPointError) as error:
        sys.exit(f"ddpm.py: {error}")
    except KeyboardInterrupt:
        sys.exit("ddpm.py: interrupted (--resume continues after the last complete epoch, if there is one)")
