"""The effect of beta on the report's convolutional VAE, measured (section 4).

    python beta_study.py                       the report's five values, and its figure 3
    python beta_study.py --betas 0 1 20        other values; saved models are not trained again

A model's figures: python conv_vae.py --load results/beta_study/conv_vae_beta5.pt --save-dir results/beta5
Needs common.py and conv_vae.py beside it. All the options: --help.
"""

import argparse
import math
import os
import sys
import tempfile

import torch

import common
import conv_vae
from common import plt  # after common has set matplotlib's backend


@torch.no_grad()
def encode_dataset(vae, data_loader, device):
    """The posterior mean of each image, and a code z sampled for each, both (n, d) on the CPU."""
    vae.eval()
    means, codes = [], []
    for x, _ in data_loader:
        mu, logvar = vae.encode(x.to(device))
        means.append(mu.cpu())
        codes.append(vae.reparameterize(mu, logvar).cpu())
    return torch.cat(means), torch.cat(codes)


def active_units(means, threshold=0.01):
    """Number of latent dimensions that are used: Var_x(E_{q(z|x)}[z]) > 0.01.

    means: the posterior means of a data set, (n, d). From Burda et al. (2016, arXiv:1509.00519), section 5.2.
    """
    return (means.var(0) > threshold).sum().item()


def gaussian_kl(codes):
    """KL(N(m, S) || N(0, I)), in nats, where m and S are the mean and covariance of the codes, (n, d).

    0 if the aggregate posterior, q(z|x) averaged over the images, has the prior's mean and covariance; n
    codes then give about d (d + 3) / (4 n). The formula: (tr S + |m|^2 - d - ln det S) / 2.
    """
    codes = codes.double()
    mean = codes.mean(0)
    covariance = codes.T.cov().view(len(mean), -1)  # (d, d), also for d = 1
    kl = covariance.trace() + mean.square().sum() - len(mean) - torch.linalg.slogdet(covariance).logabsdet
    return 0.5 * kl.item()


def nearest_distance(points, codes):
    """Distance from each point, (m, d), to its nearest code, (n, d). Returns (m,)."""
    return torch.cat([torch.cdist(chunk, codes).amin(1) for chunk in points.split(500)])


def remote_samples(prior, train_codes, test_codes):
    """The share of remote samples of the prior, and all its samples, (m, d), the most remote first.

    Remote: further from the nearest training code than 99% of the test codes are. These are the report's
    empty regions. The precision of Kynkäänniemi et al. (2019, arXiv:1904.06991) also judges samples by their
    nearest neighbours. The codes, (n, d), are samples of q(z|x), not its means: in an unused dimension all
    the means are near 0, and most samples would be remote.
    """
    threshold = nearest_distance(test_codes, train_codes).quantile(0.99)
    distance = nearest_distance(prior, train_codes)
    return (distance > threshold).float().mean().item(), prior[distance.argsort(descending=True)]


def measure(vae, train_loader, test_loader, latent_dim, device):
    """The numbers of a row of the table, and 10,000 prior samples, (10000, d), the most remote first."""
    bce, kl = common.evaluate(vae, test_loader)
    _, train_codes = encode_dataset(vae, train_loader, device)
    test_means, test_codes = encode_dataset(vae, test_loader, device)
    share, remote = remote_samples(torch.randn(10_000, latent_dim), train_codes, test_codes)
    row = {"bce": bce, "kl": kl, "loss": bce + kl, "active_units": active_units(test_means)}
    return row | {"gaussian_kl": gaussian_kl(test_codes), "remote_share": share}, remote


def plot_rate_distortion(rows, save_dir="results"):
    """Draw the held-out BCE (distortion) against the KL (rate), as Alemi et al. (2018, arXiv:1711.00464)."""
    fig, ax = plt.subplots(figsize=(7, 5))
    ax.plot([row["kl"] for row in rows], [row["bce"] for row in rows], "o")
    for row in rows:
        label, offset = f"beta = {row['beta']:g}", {"xytext": (0, 7), "textcoords": "offset points"}
        ax.annotate(label, (row["kl"], row["bce"]), ha="center", **offset)
    ax.margins(0.15)
    ax.set_xlabel("Rate: KL, nats per image")
    ax.set_ylabel("Distortion: BCE, nats per image")
    ax.set_title("Rate and distortion on the test images")
    common.save_figure(fig, save_dir, "rate_distortion.png")


def plot_sheet(rows, sheet, save_dir="results"):
    """Draw three columns per beta: reconstructions, samples, and samples from the most remote z."""
    size = 14, 1.3 * len(rows) + 0.4
    fig, axes = plt.subplots(len(rows), 3, figsize=size, layout="constrained", squeeze=False)
    for row_axes, row, columns in zip(axes, rows, sheet):
        for ax, images in zip(row_axes, columns):
            common.show_grid(ax, images, n_rows=2)
        row_axes[0].set_ylabel(f"beta = {row['beta']:g}")
        row_axes[2].set_xlabel(f"{row['remote_share']:.1%} of the prior's samples are remote")
    axes[0, 0].set_title("Test digits above their reconstructions")
    axes[0, 1].set_title("Generated, from the same z")
    axes[0, 2].set_title("Generated, from the most remote z")
    common.save_figure(fig, save_dir, "beta_study.png")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Train the report's convolutional VAE with several betas and measure the effect.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    add = parser.add_argument
    add("--betas", type=float, nargs="+", default=[0.2, 0.5, 1.0, 2.0, 5.0], help="weights of the KL term")
    add("--epochs", type=int, default=10, help="passes over the training images, for each beta")
    add("--batch-size", type=int, default=128, help="images per step")
    add("--lr", type=float, default=6e-3, help="maximum of the learning rate")
    add("--seed", type=int, default=0, help="seed of the weights, the batches and the samples")
    add("--latent-dim", type=int, default=10, help="dimension of z")
    add("--channels", type=int, nargs="+", default=[32, 64, 128], help="channels of the 2 or 3 layers")
    add("--device", default=device, help="a torch device")
    add("--fp32", dest="bf16", action="store_false", default=argparse.SUPPRESS, help="float32, not bfloat16")
    folder = os.path.expanduser  # "~" is the home folder
    add("--data-dir", type=folder, default="data", help="folder of MNIST, downloaded if missing")
    add("--save-dir", type=folder, default="results/beta_study", help="folder of the models and the figures")
    add("--limit", type=int, default=60000, metavar="N", help="train on the first N images only")
    args = parser.parse_args(argv)

    if min(args.epochs, args.batch_size, args.latent_dim, args.limit, *args.channels) < 1:
        parser.error("--epochs, --batch-size, --latent-dim, --limit and --channels take whole numbers >= 1")
    if len(args.channels) not in (2, 3):
        parser.error("--channels takes two or three numbers")
    if not 0 < args.lr < math.inf or not all(0 <= beta < math.inf for beta in args.betas):
        parser.error("--lr takes a finite number above 0, --betas finite numbers >= 0")
    try:
        torch.zeros(1, device=args.device).item()
    except Exception as error:  # torch has several types for it
        reason = str(error).splitlines()[0]
        parser.error(f"--device {args.device} can't be used ({reason}); try --device cpu")
    args.bf16 = getattr(args, "bf16", True) and conv_vae.has_bf16(args.device)
    return args


def main(argv=None):
    args = parse_args(argv)
    os.makedirs(args.save_dir, exist_ok=True)
    tempfile.TemporaryFile(dir=args.save_dir).close()  # fails now, not after the training
    train_loader, test_loader = common.load_mnist(args.data_dir, args.batch_size, args.device, args.limit)
    x = next(iter(test_loader))[0][:10]
    rows, sheet = [], []
    betas = vars(args).pop("betas")  # a model's options hold its own beta alone
    for beta in betas:
        args.beta = beta
        print(f"beta={beta:g}")
        path = os.path.join(args.save_dir, f"conv_vae_beta{beta:g}.pt")
        model = conv_vae.train(args, train_loader, path, reuse=True)

        torch.manual_seed(args.seed)  # so that conv_vae.py --load prints the same held-out loss
        row, remote = measure(model, train_loader, test_loader, args.latent_dim, args.device)
        rows.append({"beta": beta} | row | {"seconds": model.seconds})

        torch.manual_seed(args.seed)  # the same z for every beta
        images = common.generate_samples(model, args.latent_dim, device=args.device)
        file_name = f"images_gen_beta{beta:g}.png"
        common.plot_generated_images(images, args.latent_dim, save_dir=args.save_dir, file_name=file_name)
        with torch.no_grad():
            pairs = torch.cat([x, model(x)[0]])  # above their reconstructions
            sheet.append([pairs, images[:20], model.decode(remote[:20].to(args.device))])
        fig = common.images_figure(pairs, 2, len(x), (10, 2.4), f"Images reconstruites pour β = {beta:g}")
        common.save_figure(fig, args.save_dir, f"reconstructions_beta{beta:g}.png")

    formats = {"beta": "g", "active_units": "d", "gaussian_kl": ".3f", "remote_share": ".4f"}
    table = [{name: format(value, formats.get(name, ".2f")) for name, value in row.items()} for row in rows]
    for line in [{name: name for name in table[0]}, *table]:
        print("".join(f"{value:>13}" for value in line.values()))
    common.save_table(table, args.save_dir, "beta_study.csv")
    plot_rate_distortion(rows, args.save_dir)
    plot_sheet(rows, sheet, args.save_dir)


if __name__ == "__main__":
    try:
        main()
    except (OSError, FloatingPointError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        sys.exit(f"beta_study.py: {str(error) or 'interrupted'}")
