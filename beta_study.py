"""The effect of beta on the report's convolutional VAE, measured (section 4).

    python beta_study.py                       the report's five values, and its figure 3
    python beta_study.py --betas 0 1 20        others; what is trained already is not trained again

The models can be looked at further: python conv_vae.py --load results/beta_study/conv_vae_beta5.pt
"""

import argparse
import os
import time

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

import common
import conv_vae


@torch.no_grad()
def encode_dataset(vae, data_loader, device):
    """The posterior means of all the images, and a code z drawn for each of them, both (n, d) on the CPU."""
    vae.eval()
    means, codes = [], []
    for x, _ in data_loader:
        mu, logvar = vae.encode(x.to(device))
        means.append(mu.cpu())
        codes.append(vae.reparameterize(mu, logvar).cpu())
    return torch.cat(means), torch.cat(codes)


def active_units(means, threshold=0.01):
    """How many latent dimensions carry something: Var_x(E_q[z|x]) > 0.01 (Burda et al., 2016, section 5.2).

    means: the posterior means of a data set, (n, d).
    """
    return (means.var(0) > threshold).sum().item()


def gaussian_kl(codes):
    """KL(N(m, S) || N(0, I)), in nats, of the mean m and covariance S of the codes (n, d).

    0 if the aggregate posterior has the prior's first two moments; a lower bound of how far it is from it.
    """
    codes = codes.double()
    mean = codes.mean(0)
    covariance = codes.T.cov().view(len(mean), -1)
    kl = covariance.trace() + mean.square().sum() - len(mean) - torch.linalg.slogdet(covariance).logabsdet
    return 0.5 * kl.item()


def nearest_distance(points, codes):
    """Of each of the points, (m, d), the distance to the nearest of the codes, (n, d): (m,)."""
    return torch.cat([torch.cdist(chunk, codes).amin(1) for chunk in points.split(500)])


def empty_regions(prior, train_codes, test_codes):
    """Which of the prior's samples lie where no image was encoded; returns (share, samples from far to near).

    Far is further from every training code than 99% of the test codes are. Near or not near to the data, by
    nearest neighbours, is the idea of Kynkäänniemi et al. (2019)'s precision. The codes are samples of
    q(z|x), not its means: in a dimension that is not used all the means are 0, and the prior's samples far.
    """
    limit = nearest_distance(test_codes, train_codes).quantile(0.99)
    distance = nearest_distance(prior, train_codes)
    return (distance > limit).float().mean().item(), prior[distance.argsort(descending=True)]


def measure(vae, train_loader, test_loader, latent_dim, device):
    """A row of the table, and 10,000 samples of the prior, from the remotest to the nearest."""
    bce, kl = common.evaluate(vae, test_loader)
    _, train_codes = encode_dataset(vae, train_loader, device)
    test_means, test_codes = encode_dataset(vae, test_loader, device)
    share, remote = empty_regions(torch.randn(10_000, latent_dim), train_codes, test_codes)
    return {
        "bce": f"{bce:.2f}",
        "kl": f"{kl:.2f}",
        "loss": f"{bce + kl:.2f}",
        "active_units": active_units(test_means),
        "gaussian_kl": f"{gaussian_kl(test_codes):.3f}",
        "empty_share": f"{share:.4f}",
    }, remote


def parse_args(argv=None):
    parser = common.ArgumentParser(description="Train the report's convolutional VAE for several betas.")
    add = parser.add_argument
    betas = "weights of the KL term; 0 leaves an autoencoder with noise on its code, and no prior to sample"
    add("--betas", type=common.nonnegative_float, nargs="+", default=[0.2, 0.5, 1.0, 2.0, 5.0], help=betas)
    conv_vae.add_options(parser)
    add("--save-dir", default="results/beta_study", help="where the models, the table and the figures go")
    args = parser.parse_args(argv)
    if len({f"{beta:g}" for beta in args.betas}) < len(args.betas):
        parser.error("argument --betas: takes each value once")
    conv_vae.check_options(parser, args)
    return args


def main(argv=None):
    args = parse_args(argv)
    common.check_writable(args.save_dir)
    train_loader, test_loader = common.load_mnist(args.data_dir, args.batch_size, args.device, args.limit)
    config = {"latent_dim": args.latent_dim, "channels": args.channels}
    places = "betas", "device", "data_dir", "save_dir"
    settings = {key: str(value) for key, value in vars(args).items() if key not in places}
    table = os.path.join(args.save_dir, "beta_study.csv")
    rows = {row["beta"]: row for row in common.read_rows(table, settings)}
    x = next(iter(test_loader))[0][:10]
    sheet = {}

    for beta in tqdm(args.betas, "Beta study", disable=None):
        name = f"{beta:g}"
        path = os.path.join(args.save_dir, f"conv_vae_beta{name}.pt")
        if name in rows and os.path.exists(path):
            model, _ = common.load_model(path, "conv_vae", conv_vae.build_vae)
            model.to(args.device)
            seconds = rows[name]["seconds"]
        else:
            print(f"beta={name}")
            torch.manual_seed(args.seed)  # the same weights and batches for every beta
            model = conv_vae.build_vae(**config).to(args.device)
            start = time.perf_counter()
            conv_vae.fit(model, train_loader, argparse.Namespace(**vars(args), beta=beta))
            seconds = f"{time.perf_counter() - start:.1f}"
            common.save_model(path, "conv_vae", config, model)

        torch.manual_seed(args.seed)  # the held-out loss that conv_vae.py --load finds, too
        values, remote = measure(model, train_loader, test_loader, args.latent_dim, args.device)
        rows[name] = {"beta": name} | values | {"seconds": seconds} | settings
        common.write_rows(table, rows.values())

        torch.manual_seed(args.seed)  # the same z for every beta
        images = common.generate_samples(model, args.latent_dim, device=args.device)
        where = {"latent_dim": args.latent_dim, "save_dir": args.save_dir}
        common.plot_generated_images(images, file_name=f"images_gen_beta{name}.png", **where)
        file_name = f"reconstructions_beta{name}.png"
        common.plot_reconstructions(model, test_loader, args.device, file_name=file_name, **where)
        with torch.no_grad():
            sheet[name] = torch.cat([x, model(x)[0]]), images[:20], model.decode(remote[:20].to(args.device))

    columns = [column for column in rows[name] if column not in settings]
    print("".join(f"{column:>13}" for column in columns))
    for name in sheet:
        print("".join(f"{rows[name][column]:>13}" for column in columns))
    print(f"Table saved: {table}")
    plot_rate_distortion([rows[name] for name in sheet], args.save_dir)
    plot_sheet(sheet, rows, args.save_dir)


def plot_rate_distortion(rows, save_dir):
    """The held-out distortion (BCE) against the rate (KL), a point a beta (Alemi et al., 2018)."""
    fig, ax = plt.subplots(figsize=(7, 5))
    ax.plot([float(row["kl"]) for row in rows], [float(row["bce"]) for row in rows], "o")
    for row in rows:
        point = float(row["kl"]), float(row["bce"])
        ax.annotate(f"beta = {row['beta']}", point, xytext=(0, 7), textcoords="offset points", ha="center")
    ax.margins(0.15)
    ax.set_xlabel("Rate: KL, nats per image")
    ax.set_ylabel("Distortion: BCE, nats per image")
    ax.set_title("Rate and distortion on the test images")
    common.save_figure(fig, save_dir, "rate_distortion.png")


def plot_sheet(sheet, rows, save_dir):
    """A row a beta: reconstructions, samples, and what decodes from the remotest samples of the prior."""
    size = 14, 1.3 * len(sheet) + 0.4
    fig, axes = plt.subplots(len(sheet), 3, figsize=size, layout="constrained", squeeze=False)
    for row_axes, (name, columns) in zip(axes, sheet.items()):
        for ax, images in zip(row_axes, columns):
            ax.imshow(common.tile(images, n_rows=2), cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
        row_axes[0].set_ylabel(f"beta = {name}")
        row_axes[2].set_xlabel(f"{float(rows[name]['empty_share']):.1%} of the prior's samples are remote")
    axes[0, 0].set_title("Test digits above their reconstructions")
    axes[0, 1].set_title("Generated, from the same z")
    axes[0, 2].set_title("Generated, from the remotest z")
    common.save_figure(fig, save_dir, "beta_study.png")


if __name__ == "__main__":
    common.run(main)
