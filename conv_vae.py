"""The convolutional VAE of the report's section 3, on MNIST.

    python conv_vae.py                                    train the report's model, draw its figures
    python conv_vae.py --latent-dim 2 --channels 32 64    another configuration

Needs common.py beside it. All the options: --help.
"""

import argparse
import io
import itertools
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
from common import vae_loss


class ConvEncoder(nn.Module):
    """(B, 1, 28, 28) -> mu and logvar, (B, latent_dim) each (report, §3.1).

    channels: those of the three layers. The shapes below are those of one image, by default.
    """

    def __init__(self, latent_dim=20, channels=(32, 64, 128)):
        super().__init__()
        self.conv_layers = nn.Sequential(
            nn.Conv2d(1, channels[0], kernel_size=4, stride=2, padding=1),  # (32, 14, 14)
            nn.ReLU(),
            nn.Conv2d(channels[0], channels[1], kernel_size=4, stride=2, padding=1),  # (64, 7, 7)
            nn.ReLU(),
            nn.Conv2d(channels[1], channels[2], kernel_size=3, stride=1, padding=0),  # (128, 5, 5)
            nn.ReLU(),
        )
        self.flatten = nn.Flatten()
        self.fc_mu = nn.Linear(channels[2] * 5 * 5, latent_dim)
        self.fc_logvar = nn.Linear(channels[2] * 5 * 5, latent_dim)

    def forward(self, x):
        x = self.conv_layers(x)
        x = self.flatten(x)
        mu = self.fc_mu(x)
        logvar = self.fc_logvar(x)
        return mu, logvar


class Sigmoid(nn.Sigmoid):
    """The sigmoid in float32, even where the layers compute in bfloat16.

    There the largest number below 1 is 0.996, so a larger one may be rounded to 1. If that pixel is black,
    BCE is -log 0, which PyTorch limits to 100.
    """

    def forward(self, x):
        return super().forward(x.float())


class ConvDecoder(nn.Module):
    """z, (B, latent_dim) -> (B, 1, 28, 28) in [0, 1], the mirror of ConvEncoder (report, §3.2).

    channels: those of ConvEncoder, in the same order.
    """

    def __init__(self, latent_dim=20, channels=(32, 64, 128)):
        super().__init__()
        self.channels = channels
        self.fc = nn.Linear(latent_dim, channels[2] * 5 * 5)
        self.deconv_layers = nn.Sequential(
            nn.ConvTranspose2d(channels[2], channels[1], kernel_size=3, stride=1, padding=0),  # (64, 7, 7)
            nn.ReLU(),
            nn.ConvTranspose2d(channels[1], channels[0], kernel_size=4, stride=2, padding=1),  # (32, 14, 14)
            nn.ReLU(),
            nn.ConvTranspose2d(channels[0], 1, kernel_size=4, stride=2, padding=1),  # (1, 28, 28)
            Sigmoid(),
        )

    def forward(self, z):
        x = F.relu(self.fc(z))
        x = x.view(-1, self.channels[2], 5, 5)
        x = self.deconv_layers(x)
        return x


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
    for epoch in range(num_epochs):
        model.train()  # in each epoch, as samples drawn between two of them leave it in eval mode
        train_loss = torch.zeros((), device=device)
        for x, _ in tqdm(dataloader, desc=f"Epoch {epoch + 1}", leave=False):
            x = x.to(device)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                x_recon, mu, logvar = model(x)
            # BCE raises an error at a NaN, after which all fails on a GPU: nan_to_num avoids it. The NaN is
            # not hidden: the gradients become NaN (0 * NaN = NaN), then the weights, then the next KL term.
            # float(): a loss in float32.
            loss = vae_loss(x_recon.nan_to_num(), x, mu.float(), logvar.float(), beta)
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


def fit(model, dataloader, num_epochs, lr, beta=1.0, bf16=False):
    """Train with Adam and a one-cycle learning rate; returns the average loss of each epoch.

    One-cycle (Smith & Topin, 2017, arXiv:1708.07120): the learning rate rises to lr (the script's default is
    6e-3), then falls to almost 0. On the test images, a constant 1e-3 gives 102.25 nats, one-cycle
    98.75, and with Adam's second coefficient 0.99, in place of 0.999, 98.57 (three seeds).
    bf16: see train_vae. Raises FloatingPointError if the training diverges.
    """
    # OneCycleLR replaces beta1: 0.95, down to 0.85, and back. fused: all weights in one operation.
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99), fused=True)
    total_steps = num_epochs * len(dataloader)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=total_steps)
    losses = train_vae(model, dataloader, optimizer, num_epochs, beta, scheduler, bf16)
    if not all(p.isfinite().all() for p in model.parameters()):  # no loss has seen the last step
        raise FloatingPointError("the last step diverged: try a smaller --lr")
    return losses


# ---- The script: the report's model, its study of configurations (§3.3), files, command line

ARCHITECTURES = [32, 64], [16, 32, 64], [32, 64, 128]  # channels of the encoder
LATENT_DIMS = 2, 5, 10, 20, 50, 100
RUN = "device", "data_dir", "save_dir", "load", "sweep"  # the options that change nothing in a model


class TwoLayerEncoder(ConvEncoder):
    """ConvEncoder without its third convolution, which is cut off (report, §3.3). channels: of two layers."""

    def __init__(self, latent_dim=20, channels=(32, 64)):
        super().__init__(latent_dim, (*channels, 1))
        self.conv_layers = self.conv_layers[:4]  # (64, 7, 7)
        self.fc_mu = nn.Linear(channels[1] * 7 * 7, latent_dim)
        self.fc_logvar = nn.Linear(channels[1] * 7 * 7, latent_dim)


class TwoLayerDecoder(ConvDecoder):
    """ConvDecoder without its first transposed convolution (report, §3.3)."""

    def __init__(self, latent_dim=20, channels=(32, 64)):
        super().__init__(latent_dim, (*channels, 1))
        self.fc = nn.Linear(latent_dim, channels[1] * 7 * 7)
        self.deconv_layers = self.deconv_layers[2:]

    def forward(self, z):
        x = F.relu(self.fc(z))
        x = x.view(-1, self.channels[1], 7, 7)
        x = self.deconv_layers(x)
        return x


def build_vae(latent_dim=10, channels=(32, 64, 128), device="cpu"):
    """The convolutional VAE whose encoder has these channels, two or three; the decoder mirrors it."""
    if len(channels) == 3:
        vae = VAE(ConvEncoder(latent_dim, channels), ConvDecoder(latent_dim, channels))
    elif len(channels) == 2:
        vae = VAE(TwoLayerEncoder(latent_dim, channels), TwoLayerDecoder(latent_dim, channels))
    else:
        raise ValueError(f"channels takes two or three channels, not {channels}")
    # channels_last, a memory layout: in bfloat16 a step is 12% faster. To flatten a tensor in this layout,
    # use .flatten, not .view. On mps, torch may get its gradients wrong.
    if torch.device(device).type in ("cpu", "cuda"):
        vae = vae.to(memory_format=torch.channels_last)
    return vae.to(device)


def train(args, train_loader, path, reuse=False):
    """Build a VAE, fit it with the options `args`, save it at `path` and return it as `load` does.

    train_loader: of load_mnist. With `reuse`, a model that is already there is returned instead. Raises
    OSError if that has other options or images, or if the file can't be written.
    """
    # tolist() makes numpy's numbers plain: torch.load refuses them.
    options = {name: np.asarray(value).tolist() for name, value in vars(args).items() if name not in RUN}
    options["images_crc32"] = common.checksum(train_loader.dataset.tensors[0])
    if reuse and os.path.exists(path):
        model = load(path, args.device)
        for name in options | model.options:
            before, now = model.options.get(name), options.get(name)
            if before != now:
                mend = "delete it, or give another --save-dir"
                raise OSError(f"{path} was trained with {name} {before}, not {now}: {mend}")
        print(f"{path} is not trained again: delete it after a change of the code")
        return model

    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    torch.manual_seed(args.seed)
    model = build_vae(args.latent_dim, args.channels, args.device)
    parameters = sum(p.numel() for p in model.parameters())
    precision = "bf16" if args.bf16 else "fp32"
    print(f"VAE on {args.device} ({precision}): {parameters:,} parameters")
    start = time.perf_counter()
    model.losses = fit(model, train_loader, options["epochs"], options["lr"], options["beta"], args.bf16)
    model.seconds, model.options = time.perf_counter() - start, options

    saved = {"script": "conv_vae", "options": options, "losses": model.losses, "seconds": model.seconds}
    buffer = io.BytesIO()  # in memory first: torch.save to a full disk raises no OSError
    torch.save(saved | {"state_dict": model.state_dict()}, buffer)
    with open(f"{path}.new", "wb") as f:
        f.write(buffer.getbuffer())
    os.replace(f"{path}.new", path)  # if this is refused, its error names the complete file
    print(f"Model saved: {path}")
    return model


def load(path, device="cpu"):
    """The VAE saved at `path`, with its training's options, losses and seconds.

    Raises OSError if the file is missing, damaged or of another script, or its weights don't fit the network.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["script"] != "conv_vae":
            raise OSError(f"it is a model of {saved['script']}.py")
        model = build_vae(saved["options"]["latent_dim"], saved["options"]["channels"], device)
        model.load_state_dict(saved["state_dict"])
        model.options, model.losses, model.seconds = saved["options"], saved["losses"], saved["seconds"]
    except Exception as error:  # torch has many types for it
        why = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        raise OSError(f"can't load {path}: {why}") from error
    return model


def sweep(args, train_loader, test_loader):
    """Train the report's 18 configurations, except those that are saved already; draw the results."""
    rows, samples = [], []
    for architecture, latent_dim in itertools.product(ARCHITECTURES, LATENT_DIMS):
        args.channels, args.latent_dim = architecture, latent_dim
        name = "-".join(map(str, architecture))
        print(f"Architecture {name}, latent_dim={latent_dim}")
        path = os.path.join(args.save_dir, f"conv_vae_{name}_latent{latent_dim}.pt")
        model = train(args, train_loader, path, reuse=True)

        torch.manual_seed(args.seed)  # so that --load prints the same held-out loss
        bce, kl = common.evaluate(model, test_loader)
        print(f"Held-out loss: {bce + kl:.2f} nats per image (BCE {bce:.2f} + KL {kl:.2f})")
        torch.manual_seed(args.seed)  # the same z for every architecture
        samples.append(common.generate_samples(model, latent_dim, 8, args.device))
        row = {"architecture": name, "latent_dim": latent_dim}
        row |= {"parameters": sum(p.numel() for p in model.parameters()), "epochs": args.epochs}
        results = {"bce": bce, "kl": kl, "loss": bce + kl, "seconds": model.seconds}
        rows.append(row | {key: round(value, 2) for key, value in results.items()})
    common.save_table(rows, args.save_dir, "sweep.csv")
    common.plot_sweep(rows, samples, args.save_dir)


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
    add("--fp32", dest="bf16", action="store_false", default=argparse.SUPPRESS, help="float32, not bfloat16")
    folder = os.path.expanduser  # "~" is the home folder
    add("--data-dir", type=folder, default="data", help="folder of MNIST, downloaded if missing")
    add("--save-dir", type=folder, default="results/conv_vae", help="folder of the model and the figures")
    add("--limit", type=int, default=60000, metavar="N", help="train on the first N images only")
    one_of = parser.add_mutually_exclusive_group().add_argument
    one_of("--load", type=folder, metavar="PATH", help="no training: a saved model, with its options")
    one_of("--sweep", action="store_true", help="all 18 models; ignores --latent-dim, --channels")
    args = parser.parse_args(argv)

    if min(args.epochs, args.batch_size, args.latent_dim, args.limit, *args.channels) < 1:
        parser.error("--epochs, --batch-size, --latent-dim, --limit and --channels take whole numbers >= 1")
    if len(args.channels) not in (2, 3):
        parser.error("--channels takes two or three numbers")
    if not 0 < args.lr < math.inf or not 0 <= args.beta < math.inf:
        parser.error("--lr takes a finite number above 0, --beta a finite number >= 0")
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
        model = load(args.load, args.device)  # before MNIST is downloaded
        print(f"{args.load} was trained with {model.options}")
    train_loader, test_loader = common.load_mnist(args.data_dir, args.batch_size, args.device, args.limit)
    if args.sweep:
        sweep(args, train_loader, test_loader)
        return
    if args.load is None:
        path = os.path.join(args.save_dir, f"conv_vae_latent{args.latent_dim}.pt")
        model = train(args, train_loader, path)
    latent_dim = model.options["latent_dim"]

    torch.manual_seed(args.seed)  # so that --load draws the same figures, if no other option changes
    bce, kl = common.evaluate(model, test_loader)
    print(f"Held-out loss: {bce + kl:.2f} nats per image (BCE {bce:.2f} + KL {kl:.2f})")
    common.plot_losses(model.losses, args.save_dir)
    images = common.generate_samples(model, latent_dim, device=args.device)
    common.plot_generated_images(images, latent_dim, save_dir=args.save_dir)
    common.plot_reconstructions(model, test_loader, args.device, args.save_dir)
    common.plot_interpolation(model, latent_dim, args.device, args.save_dir)
    common.plot_latent_space(model, test_loader, args.device, latent_dim, args.save_dir)


if __name__ == "__main__":
    try:
        main()
    except (OSError, FloatingPointError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        sys.exit(f"conv_vae.py: {str(error) or 'interrupted'}")
