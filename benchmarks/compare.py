"""Compare the images of the VAEs and the DDPM, and what they cost, as the report's last paragraph proposes.

python benchmarks/compare.py             the default models of the three scripts, from results/
python benchmarks/compare.py PATH ...    any saved models, or images: a .npy file, (n, 1, 28, 28) in [0, 1]

The measures are those of rulers.py. What each model has learnt is measured by representations.py.
"""

import argparse
import functools
import os
import sys
import tempfile
import time

import numpy as np
import torch
from rulers import Rulers, classify
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common
import conv_vae
import ddpm
import dense_vae
from common import plt

DEFAULTS = {
    "results/dense_vae/dense_vae_latent5.pt": "python dense_vae.py",
    "results/conv_vae/conv_vae_latent10.pt": "python conv_vae.py",
    "results/ddpm/ddpm.pt": "python ddpm.py",
}
STEPS = 20, 10, 30, 50  # of the DDPM's sampler; the first one is its default

# ---- The models


def load(path, device, train_images):
    """(script, model) of a file: a VAE, or a DDPM (process, guide), or (None, images) of a .npy file.

    Raises OSError if the file is missing, damaged, none of these, or trained on other images.
    """
    if not os.path.exists(path):
        how = f": make it with {DEFAULTS[path]}, or start where results/ is" if path in DEFAULTS else ""
        raise OSError(f"there is no {path} in {os.getcwd()}{how}")
    try:
        if path.endswith(".npy"):
            images = torch.from_numpy(np.load(path)).float()
        else:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            script = {"dense_vae": dense_vae, "conv_vae": conv_vae, "ddpm": ddpm}[saved["script"]]
    except Exception as error:
        raise OSError(f"can't load {path}, is it a model of these scripts? ({error!r:.100})") from error
    if path.endswith(".npy"):
        if images.shape[1:] != (1, 28, 28) or len(images) < 100:
            raise OSError(f"{path} is an array of {tuple(images.shape)}: give (n, 1, 28, 28), n at least 100")
        if not (0 <= images.min() and images.max() <= 1):  # true of NaN, too
            raise OSError(f"{path} has pixels outside [0, 1]")
        return None, images
    if saved["options"].get("images_crc32") != common.checksum(train_images[: saved["options"]["limit"]]):
        raise OSError(f"{path} was trained on other images than those in --data-dir, or by an older version")
    return script, script.load(path, device)


def names(paths):
    """{name: path}: the names of the files, or their paths if two files have the same name."""
    short = {os.path.splitext(os.path.basename(path))[0]: path for path in paths}
    return short if len(short) == len(paths) else {path: path for path in paths}


def samplers(script, model, device):
    """{label: a function from n to n images, (n, 1, 28, 28) in [0, 1]}, as the scripts sample."""
    if script is not ddpm:
        d = model.options["latent_dim"]
        return {"": lambda n: common.generate_samples(model, d, n, device)}
    process, guide = model

    def draw(n, steps):
        with torch.autocast(process.device.type, torch.bfloat16, enabled=ddpm.has_bf16(device)):
            if process.options["annex"]:  # by the report's algorithm
                return process.sample(n)
            return ddpm.to_pixels(ddpm.sample_fast(process, n, steps, guide)[-1])

    steps = [process.timesteps] if process.options["annex"] else STEPS
    return {f"{min(n, process.timesteps)} steps": functools.partial(draw, steps=n) for n in steps}


def held_out_loss(script, model, test_loader):
    """Of a VAE: nats per image; of a DDPM: the mean squared error of the predicted noise."""
    if script is not ddpm:
        return sum(common.evaluate(model, test_loader))
    process, _ = model
    with torch.autocast(process.device.type, torch.bfloat16, enabled=ddpm.has_bf16(process.device)):
        return ddpm.evaluate(process, test_loader)


def generate(sample, n):
    """`n` images of a sampler, (n, 1, 28, 28) in [0, 1], on the CPU, and the milliseconds that each took."""
    start = time.perf_counter()
    batches = tqdm(torch.arange(n).split(100), desc="Samples", leave=False)
    images = torch.cat([sample(len(batch)).cpu() for batch in batches])
    return images, 1000 * (time.perf_counter() - start) / n


# ---- The quality of the images


def precision_recall(real, generated, k=3):
    """Improved precision and recall of the features, (n, d) each (Kynkäänniemi et al., 2019).

    Precision: the share of generated points in a ball around a real point that reaches to its k-th nearest
    real neighbour. Recall: the same with the roles exchanged.
    """

    def share_inside(points, centers):
        # k + 1, as the nearest of all is the point itself.
        radii = torch.cat([torch.cdist(c, centers).kthvalue(k + 1).values for c in centers.split(500)])
        inside = [(torch.cdist(p, centers) <= radii).any(1) for p in points.split(500)]
        return torch.cat(inside).float().mean().item()

    return share_inside(generated, real), share_inside(real, generated)


def nearest_training_image(images, train_images):
    """The 1% quantile of the pixels' Euclidean distance to the nearest training image.

    Not the median, which misses a model that copies four images of ten.
    """
    flat, train = images.flatten(1), train_images.flatten(1)
    bars = tqdm(flat.split(500), desc="Nearest training images", leave=False)
    return torch.cat([torch.cdist(chunk, train).amin(1) for chunk in bars]).quantile(0.01).item()


# ---- The comparison


def compare_images(images, rulers, train):
    """The columns that measure `images`.

    frechet, pixels, doubtful, mean_pixel: of Rulers.measure; entropy: of the shares of the predicted digits,
    at most ln 10 = 2.303; nearest: nearest_training_image.
    """
    features, probabilities = classify(rulers.classifier, images)
    shares = probabilities.argmax(1).bincount(minlength=10) / len(images)
    precision, recall = precision_recall(rulers.features[: len(images)], features)
    measured = rulers.measure(images)
    return {
        "samples": len(images),
        "frechet": f"{measured['frechet']:.2f}",
        "pixels": f"{measured['pixels']:.3f}",
        "precision": f"{precision:.3f}",
        "recall": f"{recall:.3f}",
        "doubtful": f"{measured['doubtful']:.1%}",
        "mean_pixel": f"{measured['mean_pixel']:.4f}",
        "entropy": f"{torch.special.entr(shares).sum():.3f}",
        "nearest": f"{nearest_training_image(images, train):.2f}",
    }


def plot_images(images, save_dir):
    """Draw the first twenty images of each model, a row each. images: {name: (n, 1, 28, 28)}."""
    fig, axes = plt.subplots(len(images), 1, figsize=(11, 0.75 * len(images)), layout="constrained")
    for ax, (name, of_model) in zip(axes, images.items()):
        common.show_grid(ax, of_model[:20], n_rows=1)
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
    common.save_figure(fig, save_dir, "compare.png")


def plot_quality_cost(cost, of_digits, n, save_dir):
    """Draw the Fréchet distance of n samples against the time. cost: the rows of cost.csv."""
    models = dict.fromkeys(row["model"] for row in cost)
    fig, ax = plt.subplots(figsize=(9, max(5, len(models) / 4)), layout="constrained")
    for name in models:
        of_model = [row for row in cost if row["model"] == name]
        points = [(float(row["ms_per_image"]), float(row["frechet"]), row["sampler"]) for row in of_model]
        x, y, labels = zip(*sorted(points))
        ax.plot(x, y, "o", label=name)
        for i, label in enumerate(labels):  # left and right in turn, as they are close
            side = {"ha": "left", "xytext": (6, -3)} if i % 2 else {"ha": "right", "xytext": (-6, -3)}
            ax.annotate(label, (x[i], y[i]), textcoords="offset points", fontsize=8, **side)
    ax.axhline(of_digits, color="gray", linestyle="--", label=f"{n} training digits")
    ax.set(xscale="log", yscale="log", xlabel="Milliseconds per image")
    ax.set_ylabel(f"Fréchet distance of {n} samples")
    ax.margins(0.2)
    fig.legend(loc="outside right upper")
    common.save_figure(fig, save_dir, "quality_cost.png")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    add = parser.add_argument
    folder = os.path.expanduser  # "~" is the home folder
    add("paths", nargs="*", type=folder, default=list(DEFAULTS), help="saved models, or images in .npy files")
    add("--num-samples", type=int, default=10000, help="images of each model (default: 10000)")
    add("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    add("--device", default=device, help="a torch device")
    add("--data-dir", type=folder, default="data", help="folder of MNIST (default: data)")
    add("--save-dir", type=folder, default="results/compare", help="default: results/compare")
    args = parser.parse_args(argv)
    if args.num_samples < 100 or len(set(args.paths)) < len(args.paths):
        parser.error("--num-samples takes a whole number >= 100, paths takes each file once")
    try:
        torch.zeros(1, device=args.device).item()
    except Exception as error:  # torch has several types for it
        reason = str(error).splitlines()[0]
        parser.error(f"--device {args.device} can't be used ({reason}); try --device cpu")
    return args


def main(argv=None):
    args = parse_args(argv)
    loaders = common.load_mnist(args.data_dir, device=args.device)
    train, test = (loader.dataset.tensors[0].cpu() for loader in loaders)
    models = {name: load(path, args.device, train) for name, path in names(args.paths).items()}
    os.makedirs(args.save_dir, exist_ok=True)
    tempfile.TemporaryFile(dir=args.save_dir).close()  # fails now, not after the work
    train, test = train / 255, test / 255

    rulers = Rulers(train, test, args.device)
    torch.manual_seed(args.seed)
    n, n_cost = args.num_samples, min(args.num_samples, 2000)
    digits = train[torch.randperm(len(train))[:n]]
    images = {"test digits": test[:n], "training digits": digits, "uniform noise": torch.rand(n, 1, 28, 28)}
    of_digits = rulers.measure(digits[:n_cost])["frechet"]
    columns, cost = {}, []  # what is known of a model besides its images
    for name, (script, model) in models.items():
        if script is None:
            images[name] = model[:n]
            continue
        for i, (label, sample) in enumerate(samplers(script, model, args.device).items()):
            torch.manual_seed(args.seed)
            generated, ms = generate(sample, n_cost if i else n)
            if i == 0:
                images[name], training = generated, model[0] if script is ddpm else model
                network = training.model if script is ddpm else model
                parameters = sum(p.numel() for p in network.parameters())
                torch.manual_seed(args.seed)
                loss = held_out_loss(script, model, loaders[1])
                columns[name] = parameters, f"{training.seconds:.0f}", f"{ms:.2f}", f"{loss:.5g}"
            measured = rulers.measure(generated[:n_cost])
            row = {"model": name, "sampler": label, "ms_per_image": f"{ms:.4g}", "samples": n_cost}
            cost.append(row | {column: f"{value:.4g}" for column, value in measured.items()})
            print(", ".join(f"{column} {value}" for column, value in cost[-1].items() if value))

    rows = []
    for name, of_model in images.items():
        known = zip(("parameters", "train_s", "ms_per_image", "loss"), columns.get(name, [""] * 4))
        rows.append({"model": name, **dict(known), **compare_images(of_model, rulers, train)})
    for row in [{column: column for column in rows[0]}, *rows]:
        print("".join(f"{value:>{22 if column == 'model' else 13}}" for column, value in row.items()))
    common.save_table(rows, args.save_dir, "compare.csv")
    plot_images(images, args.save_dir)
    if cost:
        common.save_table(cost, args.save_dir, "cost.csv")
        print(f"{n_cost} training digits: Fréchet distance {of_digits:.2f}")
        plot_quality_cost(cost, of_digits, n_cost, args.save_dir)


if __name__ == "__main__":
    try:
        main()
    except (OSError, FloatingPointError, KeyboardInterrupt) as error:
        sys.exit(f"compare.py: {str(error) or 'interrupted'}")
