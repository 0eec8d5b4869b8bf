"""The dense VAE of the report's section 2, on MNIST.

    python dense_vae.py                                         train the report's model, draw its figures
    python dense_vae.py --latent-dim 2 --hidden-dims 128 256    another configuration

Held-out loss, speed and the commands that gave them: README.md.
"""

import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common


class DenseEncoder(nn.Module):
    """(B, 1, 28, 28) or (B, 784) -> mu and logvar, (B, latent_dim) each (report, §2.1)."""

    def __init__(self, input_dim=784, latent_dim=20, hidden_dims=[512, 256]):
        super().__init__()
        self.fc_layers = nn.ModuleList()
        prev_dim = input_dim
        for h_dim in hidden_dims:
            self.fc_layers.append(nn.Linear(prev_dim, h_dim))
            prev_dim = h_dim
        self.fc_mu = nn.Linear(prev_dim, latent_dim)
        self.fc_logvar = nn.Linear(prev_dim, latent_dim)

    def forward(self, x):
        x = x.view(x.size(0), -1)
        for layer in self.fc_layers:
            x = F.relu(layer(x))
        mu = self.fc_mu(x)
        logvar = self.fc_logvar(x)
        return mu, logvar


class DenseDecoder(nn.Module):
    """z, (B, latent_dim) -> (B, 1, 28, 28) in [0, 1] (report, §2.2)."""

    def __init__(self, latent_dim=20, output_dim=784, hidden_dims=[256, 512]):
        super().__init__()
        self.fc_layers = nn.ModuleList()
        prev_dim = latent_dim
        for h_dim in hidden_dims:
            self.fc_layers.append(nn.Linear(prev_dim, h_dim))
            prev_dim = h_dim
        self.fc_out = nn.Linear(prev_dim, output_dim)

    def forward(self, z):
        x = z
        for layer in self.fc_layers:
            x = F.relu(layer(x))
        x = torch.sigmoid(self.fc_out(x))
        return x.view(-1, 1, 28, 28)


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


def train_vae(model, dataloader, optimizer, num_epochs=10, beta=1.0, scheduler=None, verbose=True):
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
            x_recon, mu, logvar = model(x)
            loss = common.vae_loss(x_recon, x, mu, logvar, beta)
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


# The report's three (§2.6), by the widths of the decoder.
ARCHITECTURES = [128, 256], [256, 512], [512, 1024]


def build_vae(latent_dim, hidden_dims):
    """The dense VAE whose decoder has the widths `hidden_dims`, and whose encoder mirrors them."""
    encoder = DenseEncoder(latent_dim=latent_dim, hidden_dims=hidden_dims[::-1])
    decoder = DenseDecoder(latent_dim=latent_dim, hidden_dims=hidden_dims)
    return VAE(encoder, decoder)


def fit(model, train_loader, args, verbose=True):
    """Train as the command line says: Adam under the one-cycle policy of Smith & Topin (2017).

    The learning rate goes up to args.lr and down to 0, the momentum from 0.95 to 0.85 and back.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.99), fused=True)
    total_steps = args.epochs * len(train_loader)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=total_steps)
    train_vae(model, train_loader, optimizer, args.epochs, args.beta, scheduler, verbose)


def parse_args(argv=None):
    parser = common.ArgumentParser(description="Train the report's dense VAE and draw its figures.")
    add = parser.add_argument
    add("--epochs", type=common.positive_int, default=10, help="passes over the training images")
    add("--batch-size", type=common.positive_int, default=128, help="images in a step")
    add("--lr", type=common.positive_float, default=4e-3, help="peak learning rate")
    add("--seed", type=common.seed, default=0, help="seed of the weights, the batches and the samples")
    add("--latent-dim", type=common.positive_int, default=5, help="dimension of z")
    add(
        "--hidden-dims",
        type=common.positive_int,
        nargs="+",
        default=[256, 512],
        help="widths of the decoder's hidden layers; the encoder mirrors them",
    )
    add("--beta", type=common.nonnegative_float, default=1.0, help="weight of the KL term")
    add("--device", type=common.device, default="auto", help="auto is cuda, else mps, else cpu")
    add("--data-dir", default="data", help="where MNIST is, or is put")
    add("--save-dir", default="results/dense_vae", help="where the model and the figures go")
    add("--limit", type=common.positive_int, default=60000, metavar="N", help="train on the first N images")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--load", metavar="PATH", help="no training: draw the figures from a saved model")
    mode.add_argument("--sweep", action="store_true", help="train all 18 models of the report's study")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    common.check_writable(args.save_dir)
    if args.sweep:
        common.sweep(args, "dense_vae", "hidden_dims", ARCHITECTURES, build_vae, fit)
        return

    torch.manual_seed(args.seed)
    config = {"latent_dim": args.latent_dim, "hidden_dims": args.hidden_dims}
    if args.load:
        model, config = common.load_model(args.load, "dense_vae", build_vae)
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
        path = os.path.join(args.save_dir, f"dense_vae_latent{latent_dim}.pt")
        common.save_model(path, "dense_vae", config, model)
        print(f"Model saved: {path}")

    images = common.generate_samples(model, latent_dim, device=args.device)
    common.plot_generated_images(images, latent_dim, save_dir=args.save_dir)
    common.plot_reconstructions(model, test_loader, args.device, latent_dim, args.save_dir)
    common.plot_interpolation(model, latent_dim, args.device, args.save_dir)
    common.plot_latent_space(model, test_loader, args.device, latent_dim, args.save_dir)


if __name__ == "__main__":
    common.run(main)
