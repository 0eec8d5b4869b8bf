"""The convolutional VAE of the report's section 3, on MNIST.

    python conv_vae.py                                    train the report's model, draw its figures
    python conv_vae.py --latent-dim 2 --channels 32 64    another configuration

Needs common.py beside it. All the options: --help.
"""

import argparse
import itertools
import math
import os
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common
from common import vae_loss


class ConvEncoder(nn.Module):
    """(B, 1, 28, 28) -> mu and logvar, (B, latent_dim) each, through two or three layers (report, §3.1)."""

    def __init__(self, latent_dim=20, channels=(32, 64, 128)):
        super().__init__()
        c1, c2, *c3 = channels  # c3 is [128], or [] for two layers
        self.conv_layers = nn.Sequential(
            nn.Conv2d(1, c1, kernel_size=4, stride=2, padding=1),  # (B, 32, 14, 14)
            nn.ReLU(),
            nn.Conv2d(c1, c2, kernel_size=4, stride=2, padding=1),  # (B, 64, 7, 7)
            nn.ReLU(),
            # (B, 128, 5, 5)
            *([nn.Conv2d(c2, *c3, kernel_size=3, stride=1, padding=0), nn.ReLU()] if c3 else []),
        )
        self.flatten = nn.Flatten()
        side = 5 if c3 else 7
        self.fc_mu = nn.Linear(channels[-1] * side * side, latent_dim)  # 128 * 5 * 5
        self.fc_logvar = nn.Linear(channels[-1] * side * side, latent_dim)

    def forward(self, x):
        x = self.conv_layers(x)
        x = self.flatten(x)
        mu = self.fc_mu(x)
        logvar = self.fc_logvar(x)
        return mu, logvar


class ConvDecoder(nn.Module):
    """z, (B, latent_dim) -> (B, 1, 28, 28) in [0, 1], the mirror of ConvEncoder (report, §3.2).

    channels: those of ConvEncoder, in the same order.
    """

    def __init__(self, latent_dim=20, channels=(32, 64, 128)):
        super().__init__()
        c1, c2, *c3 = channels
        side = 5 if c3 else 7
        self.shape = channels[-1], side, side  # (128, 5, 5)
        self.fc = nn.Linear(latent_dim, channels[-1] * side * side)
        self.deconv_layers = nn.Sequential(
            # (B, 64, 7, 7)
            *([nn.ConvTranspose2d(*c3, c2, kernel_size=3, stride=1, padding=0), nn.ReLU()] if c3 else []),
            nn.ConvTranspose2d(c2, c1, kernel_size=4, stride=2, padding=1),  # (B, 32, 14, 14)
            nn.ReLU(),
            nn.ConvTranspose2d(c1, 1, kernel_size=4, stride=2, padding=1),  # (B, 1, 28, 28)
            nn.Sigmoid(),
        )

    def forward(self, z):
        x = F.relu(self.fc(z))
        x = x.view(-1, *self.shape)  # (B, 128, 5, 5)
        x = self.deconv_layers[:-1](x)
        return self.deconv_layers[-1](x.float())  # the sigmoid in float32: bfloat16 is too coarse near 1


class VAE(nn.Module):
    """An encoder and a decoder, joined by the reparameterization trick (report, §2.3)."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def reparameterize(self, mu, logvar):
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        z = mu + eps * std
        return z

    def forward(self, x):
        mu, logvar = self.encoder(x)
        z = self.reparameterize(mu, logvar)
        x_recon = self.decoder(z)
        return x_recon, mu, logvar

    def decode(self, z):
        return self.decoder(z)

    def encode(self, x):
        return self.encoder(x)


def train_vae(model, dataloader, optimizer, num_epochs=10, beta=1.0, scheduler=None, bf16=False):
    """Minimise vae_loss; returns the average loss of each epoch (report, §2.4).

    A scheduler makes one step per batch. bf16: compute the network in bfloat16, a float of 16 bits, with the
    range of float32 but 8 bits of precision, not 24: faster where the hardware has it. Raises
    FloatingPointError after an epoch whose loss is not finite.
    """
    device = next(model.parameters()).device  # global in the listing
    losses = []
    model.train()
    for epoch in range(num_epochs):
        train_loss = torch.zeros((), device=device)
        for x, _ in tqdm(dataloader, desc=f"Epoch {epoch + 1}", leave=False):
            x = x.to(device)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                x_recon, mu, logvar = model(x)
            loss = vae_loss(x_recon, x, mu.float(), logvar.float(), beta)  # the loss in float32
            loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            train_loss += loss.detach()  # loss.item() would wait for the GPU at every step
        avg_loss = train_loss.item() / len(dataloader.dataset)
        if not math.isfinite(avg_loss):
            raise FloatingPointError(f"the loss is {avg_loss} in epoch {epoch + 1}: try a smaller --lr")
        print(f"Epoch [{epoch + 1}/{num_epochs}] Average loss: {avg_loss:.4f}", flush=True)
        losses.append(avg_loss)
    return losses


# ---- The report's model, its training and its study of configurations (§3.3)

ARCHITECTURES = [32, 64], [16, 32, 64], [32, 64, 128]  # channels of the encoder
LATENT_DIMS = 2, 5, 10, 20, 50, 100
OPTIONS = "latent_dim", "channels", "epochs", "batch_size", "lr", "beta", "seed", "limit"


def build_vae(latent_dim=10, channels=(32, 64, 128)):
    """The convolutional VAE whose encoder has these channels; the decoder mirrors it."""
    encoder = ConvEncoder(latent_dim=latent_dim, channels=channels)
    decoder = ConvDecoder(latent_dim=latent_dim, channels=channels)
    return VAE(encoder, decoder).to(memory_format=torch.channels_last)  # the fastest layout for convolutions


def fit(args, train_loader, path, reuse=False):
    """Train a VAE with the options `args`, such as parse_args([]), save it at `path` and return it.

    train_loader: of common.load_mnist. Adam with the one-cycle policy of Smith & Topin (2017): the learning
    rate rises to args.lr, then falls to almost 0. With `reuse`, a model that is already there is returned
    instead; raises OSError if it is damaged or has other options or images. Also raises OSError if the file
    can't be written, and FloatingPointError as train_vae does.
    """
    # tolist() makes plain numbers of numpy's: load takes no others. The sum of the pixels tells images apart.
    options = {name: np.asarray(getattr(args, name)).tolist() for name in OPTIONS}
    options["pixel_sum"] = train_loader.dataset.tensors[0].sum().item()
    if reuse and os.path.exists(path):
        model = load(path, args.device)
        if model.options != options:
            raise OSError(f"{path} has other options or images: delete it, or give another --save-dir")
        return model

    torch.manual_seed(args.seed)
    model = build_vae(args.latent_dim, args.channels).to(args.device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"VAE on {args.device} ({args.precision}): {parameters:,} parameters")
    # Adam's betas: OneCycleLR replaces the 0.9, by 0.95 to 0.85 and back; 0.99 gave a lower loss than 0.999.
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.99), fused=True)
    total_steps = int(args.epochs) * len(train_loader)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=total_steps)
    start = time.perf_counter()
    bf16 = args.precision == "bf16"
    losses = train_vae(model, train_loader, optimizer, args.epochs, args.beta, scheduler, bf16)

    saved = {"script": "conv_vae", "options": options, "losses": losses}
    saved |= {"seconds": time.perf_counter() - start, "state_dict": model.state_dict()}
    common.evaluate(model, train_loader)  # raises if the last step diverged: an earlier model stays
    folder = os.path.dirname(path) or "."
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as tmp:
            torch.save(saved, os.path.join(tmp, "model.pt"))
            os.replace(os.path.join(tmp, "model.pt"), path)  # complete, or an earlier model stays
    except RuntimeError as error:  # torch's own, instead of an OSError
        raise OSError(f"can't write {path}, is the disk full? ({str(error).splitlines()[0]})") from error
    print(f"Model saved: {path}")
    return load(path, args.device)


def load(path, device="cpu"):
    """The VAE saved at `path`, with its training's options, losses and seconds.

    Raises OSError if the file is missing, damaged or another one.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["script"] != "conv_vae":
            raise ValueError(f"it is a model of {saved['script']}.py")
        model = build_vae(saved["options"]["latent_dim"], saved["options"]["channels"])
        model.load_state_dict(saved["state_dict"])
        model.options, model.losses, model.seconds = saved["options"], saved["losses"], saved["seconds"]
    except FileNotFoundError as error:
        raise OSError(f"there is no {path}") from error
    except Exception as error:  # an arbitrary file can fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise OSError(f"can't load {path}, is it damaged or another file? {reason[:200]}") from error
    return model.to(device)


def sweep(args, train_loader, test_loader):
    """Train the report's 18 configurations, except those that are saved already; draw the results."""
    rows, samples = [], []
    for architecture, latent_dim in itertools.product(ARCHITECTURES, LATENT_DIMS):
        args.channels, args.latent_dim = architecture, latent_dim
        name = "-".join(map(str, architecture))
        print(f"Architecture {name}, latent_dim={latent_dim}")
        path = os.path.join(args.save_dir, f"conv_vae_{name}_latent{latent_dim}.pt")
        model = fit(args, train_loader, path, reuse=True)

        torch.manual_seed(args.seed)  # so that --load prints the same held-out loss
        bce, kl = common.evaluate(model, test_loader)
        print(f"Held-out loss: {bce + kl:.2f} nats per image (BCE {bce:.2f} + KL {kl:.2f})")
        torch.manual_seed(args.seed)  # the same z for every architecture
        samples.append(common.generate_samples(model, latent_dim, 8, args.device))
        row = {"architecture": name, "latent_dim": latent_dim}
        row |= {"parameters": sum(p.numel() for p in model.parameters()), "epochs": args.epochs}
        results = {"bce": bce, "kl": kl, "loss": bce + kl, "seconds": model.seconds}
        rows.append(row | {key: round(value, 2) for key, value in results.items()})
    common.plot_sweep(rows, samples, args.save_dir)


def has_bf16(device):
    """Whether bfloat16 is known to be fast on the device, a str: recent GPUs, AMX, AVX512-BF16."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)
    cpu = getattr(torch.cpu, "get_capabilities", dict)() if device == "cpu" else {}  # not in older versions
    return cpu.get("avx512_bf16", False) or cpu.get("amx_bf16", False)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Train the report's convolutional VAE and draw its figures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    add = parser.add_argument
    add("--epochs", type=int, default=10, help="passes over the training images")
    add("--batch-size", type=int, default=128, help="images per step")
    add("--lr", type=float, default=6e-3, help="maximum of the learning rate")
    add("--seed", type=int, default=0, help="seed of the weights, the batches and the samples")
    add("--latent-dim", type=int, default=10, help="dimension of z")
    add("--channels", type=int, nargs="+", default=[32, 64, 128], help="channels of the 2 or 3 layers")
    add("--beta", type=float, default=1.0, help="weight of the KL term")
    add("--device", default=device, help="a torch device")
    precision = "auto: bf16 if the hardware has it (faster), else fp32"
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help=precision)
    folder = os.path.expanduser  # "~" is the home folder
    add("--data-dir", type=folder, default="data", help="folder of MNIST, downloaded if missing")
    add("--save-dir", type=folder, default="results/conv_vae", help="folder of the model and the figures")
    add("--limit", type=int, default=60000, metavar="N", help="train on the first N images only")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--load", type=folder, metavar="PATH", help="no training: figures of a saved model")
    mode.add_argument("--sweep", action="store_true", help="train the report's 18 configurations")
    args = parser.parse_args(argv)

    for option, valid, takes in (
        ("--epochs", args.epochs >= 1, "a whole number >= 1"),
        ("--batch-size", args.batch_size >= 1, "a whole number >= 1"),
        ("--lr", 0 < args.lr < math.inf, "a finite number above 0"),
        ("--seed", -(2**63) <= args.seed < 2**64, "a whole number from -2**63 to 2**64 - 1"),
        ("--latent-dim", args.latent_dim >= 1, "a whole number >= 1"),
        ("--channels", len(args.channels) in (2, 3) and min(args.channels) >= 1, "two or three numbers >= 1"),
        ("--beta", 0 <= args.beta < math.inf, "a finite number >= 0"),
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
    if args.sweep:
        sweep(args, train_loader, test_loader)
        return
    path = os.path.join(args.save_dir, f"conv_vae_latent{args.latent_dim}.pt")
    model = fit(args, train_loader, path) if args.load is None else load(args.load, args.device)
    latent_dim = model.options["latent_dim"]

    torch.manual_seed(args.seed)  # the figures depend on the model alone, trained now or loaded
    bce, kl = common.evaluate(model, test_loader)
    print(f"Held-out loss: {bce + kl:.2f} nats per image (BCE {bce:.2f} + KL {kl:.2f})")
    common.plot_losses(model.losses, args.save_dir)
    images = common.generate_samples(model, latent_dim, device=args.device)
    common.plot_generated_images(images, latent_dim, save_dir=args.save_dir)
    common.plot_reconstructions(model, test_loader, args.device, latent_dim, args.save_dir)
    common.plot_interpolation(model, latent_dim, args.device, args.save_dir)
    common.plot_latent_space(model, test_loader, args.device, latent_dim, args.save_dir)


if __name__ == "__main__":
    try:
        main()
    except (OSError, FloatingPointError) as error:
        sys.exit(f"conv_vae.py: {error}")
    except KeyboardInterrupt:
        sys.exit("conv_vae.py: interrupted (start a --sweep again to train what is missing)")
