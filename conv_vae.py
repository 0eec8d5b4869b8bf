"""The convolutional VAE of the report's section 3, on MNIST.

    python conv_vae.py                                    train the report's model, draw its figures
    python conv_vae.py --latent-dim 2 --channels 32 64    another configuration

Held-out loss, speed and the commands that gave them: README.md.
"""

import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common


class ConvEncoder(nn.Module):
    """(B, 1, 28, 28) -> mu and logvar, (B, latent_dim) each, in two or three layers (report, §3.1)."""

    def __init__(self, latent_dim=20, channels=[32, 64, 128]):
        super().__init__()
        self.conv_layers = nn.Sequential(
            nn.Conv2d(1, channels[0], kernel_size=4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels[0], channels[1], kernel_size=4, stride=2, padding=1),
            nn.ReLU(),
        )
        if len(channels) == 3:
            self.conv_layers.append(nn.Conv2d(channels[1], channels[2], kernel_size=3, stride=1, padding=0))
            self.conv_layers.append(nn.ReLU())
        self.flatten = nn.Flatten()
        size = 5 if len(channels) == 3 else 7
        self.fc_mu = nn.Linear(channels[-1] * size * size, latent_dim)
        self.fc_logvar = nn.Linear(channels[-1] * size * size, latent_dim)

    def forward(self, x):
        x = self.conv_layers(x)
        x = self.flatten(x)
        mu = self.fc_mu(x)
        logvar = self.fc_logvar(x)
        return mu, logvar


class ConvDecoder(nn.Module):
    """z, (B, latent_dim) -> (B, 1, 28, 28) in [0, 1], the mirror of ConvEncoder (report, §3.2)."""

    def __init__(self, latent_dim=20, channels=[32, 64, 128]):
        super().__init__()
        size = 5 if len(channels) == 3 else 7
        self.shape = channels[-1], size, size
        self.fc = nn.Linear(latent_dim, channels[-1] * size * size)
        self.deconv_layers = nn.Sequential()
        if len(channels) == 3:
            self.deconv_layers.append(nn.ConvTranspose2d(channels[2], channels[1], kernel_size=3))
            self.deconv_layers.append(nn.ReLU())
        self.deconv_layers.extend(
            [
                nn.ConvTranspose2d(channels[1], channels[0], kernel_size=4, stride=2, padding=1),
                nn.ReLU(),
                nn.ConvTranspose2d(channels[0], 1, kernel_size=4, stride=2, padding=1),
                nn.Sigmoid(),
            ]
        )

    def forward(self, z):
        x = F.relu(self.fc(z))
        x = x.view(-1, *self.shape)
        x = self.deconv_layers[:-1](x)
        return self.deconv_layers[-1](x.float())  # a sigmoid in bfloat16 would round to 0 and 1


class VAE(nn.Module):
    """An encoder and a decoder joined by the reparameterization trick (report, §2.3)."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def reparameterize(self, mu, logvar):
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return mu + eps * std

    def forward(self, x):
        mu, logvar = self.encoder(x)
        z = self.reparameterize(mu, logvar)
        x_recon = self.decoder(z)
        return x_recon, mu, logvar

    def decode(self, z):
        return self.decoder(z)

    def encode(self, x):
        return self.encoder(x)


def train_vae(
    model, dataloader, optimizer, num_epochs=10, beta=1.0, scheduler=None, verbose=True, bf16=False
):
    """Minimise vae_loss over `num_epochs` passes; a scheduler steps with each batch (report, §2.4).

    FloatingPointError at the end of an epoch whose loss is not finite.
    """
    device = next(model.parameters()).device
    model.train()
    for epoch in range(num_epochs):
        train_loss = torch.zeros((), device=device)
        for x, _ in tqdm(dataloader, f"Epoch {epoch + 1}", leave=False, disable=None):
            x = x.to(device)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                x_recon, mu, logvar = model(x)
            loss = common.vae_loss(x_recon, x, mu.float(), logvar.float(), beta)
            loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            train_loss += loss.detach()  # loss.item() would wait for the GPU at every step
        avg_loss = train_loss.item() / len(dataloader.dataset)
        if not math.isfinite(avg_loss):
            raise FloatingPointError(f"the loss is {avg_loss} in epoch {epoch + 1}: try a smaller --lr")
        if verbose:
            print(f"Epoch [{epoch + 1}/{num_epochs}] Average loss: {avg_loss:.4f}", flush=True)


# The report's three (§3.3), by the channels of the encoder.
ARCHITECTURES = [32, 64], [16, 32, 64], [32, 64, 128]


def build_vae(latent_dim, channels):
    """The convolutional VAE whose encoder has these two or three `channels`, mirrored by its decoder."""
    encoder = ConvEncoder(latent_dim=latent_dim, channels=channels)
    decoder = ConvDecoder(latent_dim=latent_dim, channels=channels)
    return VAE(encoder, decoder).to(memory_format=torch.channels_last)  # what convolutions are fastest on


def fit(model, train_loader, args, verbose=True):
    """Train as the command line says: Adam under the one-cycle policy of Smith & Topin (2017).

    The learning rate goes up to args.lr and down to 0, the momentum from 0.95 to 0.85 and back.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.99), fused=True)
    total_steps = args.epochs * len(train_loader)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=total_steps)
    bf16 = args.precision == "bf16"
    train_vae(model, train_loader, optimizer, args.epochs, args.beta, scheduler, verbose, bf16)


CHANNELS = "two or three whole numbers above 0, such as 32 64, 16 32 64 or 32 64 128"


def add_options(parser):
    """The options of the model and its training, which beta_study.py has too."""
    add = parser.add_argument
    add("--epochs", type=common.positive_int, default=10, help="passes over the training images")
    add("--batch-size", type=common.positive_int, default=128, help="images in a step")
    add("--lr", type=common.positive_float, default=6e-3, help="peak learning rate")
    add("--seed", type=common.seed, default=0, help="seed of the weights, the batches and the samples")
    add("--latent-dim", type=common.positive_int, default=10, help="dimension of z")
    channel = common.number(int, CHANNELS, lambda n: 1 <= n <= 1e9)
    add("--channels", type=channel, nargs="*", default=[32, 64, 128], help=f"the encoder's: {CHANNELS}")
    precision = "bf16 is faster where the hardware has it; auto takes it there"
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help=precision)
    add("--device", type=common.device, default="auto", help="auto is cuda, else mps, else cpu")
    add("--data-dir", default="data", help="where MNIST is, or is put")
    add("--limit", type=common.positive_int, default=60000, metavar="N", help="train on the first N images")


def check_options(parser, args):
    if len(args.channels) not in (2, 3):
        parser.error(f"argument --channels: takes {CHANNELS}, not {len(args.channels)} of them")
    common.check_precision(parser, args)


def parse_args(argv=None):
    parser = common.ArgumentParser(description="Train the report's convolutional VAE and draw its figures.")
    add_options(parser)
    add = parser.add_argument
    add("--beta", type=common.nonnegative_float, default=1.0, help="weight of the KL term")
    add("--save-dir", default="results/conv_vae", help="where the model and the figures go")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--load", metavar="PATH", help="no training: draw the figures from a saved model")
    mode.add_argument("--sweep", action="store_true", help="train all 18 models of the report's study")
    args = parser.parse_args(argv)
    check_options(parser, args)
    return args


def main(argv=None):
    args = parse_args(argv)
    common.check_writable(args.save_dir)
    if args.sweep:
        common.sweep(args, "conv_vae", "channels", ARCHITECTURES, build_vae, fit)
        return

    torch.manual_seed(args.seed)
    config = {"latent_dim": args.latent_dim, "channels": args.channels}
    if args.load:
        model, config = common.load_model(args.load, "conv_vae", build_vae)
    else:
        model = build_vae(**config)
    latent_dim = config["latent_dim"]
    model.to(args.device)
    train_loader, test_loader = common.load_mnist(args.data_dir, args.batch_size, args.device, args.limit)

    print(f"VAE {config} on {args.device}: {sum(p.numel() for p in model.parameters()):,} parameters")
    if not args.load:
        fit(model, train_loader, args)

    torch.manual_seed(args.seed)  # the figures depend on the model alone, trained now or loaded
    bce, kl = common.evaluate(model, test_loader)
    print(f"Held-out loss: {bce + kl:.2f} nats per image (BCE {bce:.2f} + KL {kl:.2f})")
    if not args.load:
        path = os.path.join(args.save_dir, f"conv_vae_latent{latent_dim}.pt")
        common.save_model(path, "conv_vae", config, model)
        print(f"Model saved: {path}")

    images = common.generate_samples(model, latent_dim, device=args.device)
    common.plot_generated_images(images, latent_dim, save_dir=args.save_dir)
    common.plot_reconstructions(model, test_loader, args.device, latent_dim, args.save_dir)
    common.plot_interpolation(model, latent_dim, args.device, args.save_dir)
    common.plot_latent_space(model, test_loader, args.device, latent_dim, args.save_dir)


if __name__ == "__main__":
    common.run(main)
