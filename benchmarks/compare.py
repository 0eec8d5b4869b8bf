"""Compare the VAEs with the DDPM, as the report's last paragraph proposes: images, cost, representations.

python benchmarks/compare.py             the default models of the three scripts, from results/
python benchmarks/compare.py PATH ...    any saved models, or samples.npy of ddpm.py --num-samples
"""

import argparse
import os
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
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

# ---- The models


class Model(NamedTuple):
    """What is compared: a VAE, a DDPM, or images, which are (n, 1, 28, 28) in [0, 1]."""

    name: str
    images: torch.Tensor = None  # instead of all that follows
    samplers: dict = {}  # {label: function from n to n images}; the first one is the default
    network: nn.Module = None
    training: object = None  # has the options and the seconds of the training
    process: ddpm.DDPM = None  # of a DDPM only


def load(name, path, device):
    """The Model saved at `path`. Raises OSError if the file is missing, damaged or none of these."""
    if not os.path.exists(path):
        how = f": make it with {DEFAULTS[path]}, or start where results/ is" if path in DEFAULTS else ""
        raise OSError(f"there is no {path} in {os.getcwd()}{how}")
    if path.endswith(".npy"):
        try:
            images = torch.from_numpy(np.load(path)).float()
        except Exception as error:
            raise ddpm.unreadable(path, error) from error
        if images.shape[1:] != (1, 28, 28) or len(images) < 100:
            raise OSError(f"{path} is an array of {tuple(images.shape)}: give (n, 1, 28, 28), n at least 100")
        if not (0 <= images.min() and images.max() <= 1):  # true of NaN, too
            raise OSError(f"{path} has pixels outside [0, 1]")
        return Model(name, images)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        script = {"dense_vae": dense_vae, "conv_vae": conv_vae, "ddpm": ddpm}[saved["script"]]
    except Exception as error:
        raise ddpm.unreadable(path, error) from error
    if script is not ddpm:
        vae = script.load(path, device)
        d = vae.options["latent_dim"]
        return Model(name, None, {"": lambda n: common.generate_samples(vae, d, n, device)}, vae, vae)

    process, guide = ddpm.load(path, device)

    def fast(steps):
        return lambda n: (ddpm.sample_fast(process, guide, n, steps)[-1].clamp(-1, 1) + 1) / 2

    most = process.timesteps
    samplers = {f"{min(steps, most)} steps": fast(steps) for steps in (30, 10, 20, 50)}
    samplers[f"{most} steps, the report's sampler"] = process.sample
    return Model(name, None, samplers, process.model, process, process)


def generate(model, sample, n, device):
    """`n` images of a sampler, (n, 1, 28, 28) in [0, 1], on the CPU, and the milliseconds that each took."""
    start = time.perf_counter()
    # As in the scripts: the DDPM in bfloat16, the VAEs in float32.
    bf16 = model.process is not None and conv_vae.has_bf16(device)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
        batches = tqdm(torch.arange(n).split(100), desc="Samples", leave=False)
        images = torch.cat([sample(len(batch)).float().cpu() for batch in batches])
    return images, 1000 * (time.perf_counter() - start) / n


# ---- The quality of the images


def train_classifier(train_loader, device, num_epochs=4):
    """A small convolutional classifier of digits; its last layer but one gives the features, 64 numbers."""
    layers = []
    for i, o in (1, 32), (32, 64):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(64 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10)]
    model = nn.Sequential(*layers).to(device)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    total_steps = num_epochs * len(train_loader)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=total_steps)
    for epoch in range(num_epochs):
        for x, y in tqdm(train_loader, desc=f"Classifier, epoch {epoch + 1}", leave=False):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
    return model.eval()


@torch.no_grad()
def classify(classifier, images):
    """The features, (n, 64), and the probabilities of the digits, (n, 10), of the images."""
    device = next(classifier.parameters()).device
    features = torch.cat([classifier[:-1](x.to(device)) for x in images.split(500)])
    return features.cpu(), classifier[-1](features).softmax(1).cpu()


def frechet(a, b):
    """The Fréchet distance of the features a and b, (n, d) each, as in FID (Heusel et al., 2017).

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), with the means m and the covariances S.
    """
    a, b = a.double().numpy(), b.double().numpy()
    cov_a, cov_b = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    # The trace of the root is the sum of the roots of the eigenvalues, all real and >= 0 but for rounding.
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0)).sum()
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b) - 2 * root


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
    """The median Euclidean distance of the pixels, in [0, 1], to the nearest training image."""
    flat, train = images.flatten(1), train_images.flatten(1)
    bars = tqdm(flat.split(500), desc="Nearest training images", leave=False)
    return torch.cat([torch.cdist(chunk, train).amin(1) for chunk in bars]).median().item()


# ---- The representations


@torch.no_grad()
def encode(vae, images):
    """The means mu, (n, d), of the images."""
    device = next(vae.parameters()).device
    return torch.cat([vae.encode(x.to(device))[0].cpu() for x in images.split(500)])


@torch.no_grad()
def bottleneck(unet, x_t, t):
    """The bottleneck of the U-Net, (n, 256 * 3 * 3), on noised images: the first lines of its forward."""
    features = []
    for x in x_t.split(500):
        t_emb = unet.time_mlp(torch.full((len(x),), t, device=x.device))
        x1 = unet.enc1(x, t_emb)
        x2 = unet.enc2(F.max_pool2d(x1, 2), t_emb)
        x3 = unet.enc3(F.max_pool2d(x2, 2), t_emb)
        features.append(unet.bottleneck(F.max_pool2d(x3, 2), t_emb).flatten(1).float().cpu())
    return torch.cat(features)


def probe(train_features, train_labels, test_features, test_labels):
    """The test accuracies of logistic regression (a linear probe) and of 5 nearest neighbours."""
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, tol=1e-3))
    scores = []
    for model in linear, make_pipeline(StandardScaler(), KNeighborsClassifier(5)):
        model.fit(train_features.numpy(), train_labels.numpy())
        scores.append(model.score(test_features.numpy(), test_labels.numpy()))
    return scores


def compare_representations(process, vaes, train, test, seed):
    """Measure and print how well a digit can be read from each representation.

    train, test: (images, labels) of the two splits. Returns the times t; the accuracies {name: [(linear,
    nearest) at each t]} of the U-Net, of an untrained one and of the pixels, on images noised up to t; those
    of mu, {name: (linear, nearest)}; and for latent_spaces.png {title: representation of the test images}:
    the U-Net's at the t that a linear probe reads best, and the last VAE's mu.
    """
    torch.manual_seed(seed)
    unets = {
        "U-Net": getattr(process.model, "unet", process.model),
        "untrained U-Net": ddpm.build_unet().to(process.device),
    }
    curves = {"U-Net": [], "untrained U-Net": [], "pixels": []}
    shares = 0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7
    times = sorted({round(share * (process.timesteps - 1)) for share in shares})
    best, spaces = 0, {}
    for t in tqdm(times, desc="Representations", leave=False):
        torch.manual_seed(seed)
        x_t = []
        for images, _ in train, test:
            t_batch = torch.full((len(images),), t, device=process.device)
            x_t.append(process.forward_process(2 * images.to(process.device) - 1, t_batch))
        for name, curve in curves.items():
            if name == "pixels":
                features = [x.flatten(1).cpu() for x in x_t]
            else:
                features = [bottleneck(unets[name], x, t) for x in x_t]
            curve.append(probe(features[0], train[1], features[1], test[1]))
            print(f"{name} at t={t}: linear probe {curve[-1][0]:.2%}, nearest neighbours {curve[-1][1]:.2%}")
            if name == "U-Net" and curve[-1][0] > best:
                best, spaces = curve[-1][0], {f"Bottleneck of the U-Net at t={t}": features[1]}

    lines = {}
    for vae in vaes:
        features = [encode(vae.network, images) for images, _ in (train, test)]
        lines[f"{vae.name}, mu"] = linear, nearest = probe(features[0], train[1], features[1], test[1])
        print(f"{vae.name}, mu: linear probe {linear:.2%}, nearest neighbours {nearest:.2%}")
    if vaes:
        spaces[f"mu of {vaes[-1].name}"] = features[1]
    return times, curves, lines, spaces


def plot_representations(times, curves, lines, save_dir):
    """Draw the accuracies of compare_representations: curves over t, and a dashed line for each mu."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for i, (ax, title) in enumerate(zip(axes, ("Linear probe", "5 nearest neighbours"))):
        for name, curve in curves.items():
            ax.plot(times, [accuracy[i] for accuracy in curve], "o-", label=name)
        for j, (name, accuracy) in enumerate(lines.items()):
            ax.axhline(accuracy[i], color=f"C{3 + j}", linestyle="--", label=name)
        ax.set_xlabel("t of the noised image")
        ax.set_title(title)
    axes[0].set_ylabel("Accuracy on the test images")
    axes[0].legend()
    common.save_figure(fig, save_dir, "representations.png")


def plot_latent_spaces(spaces, labels, save_dir):
    """Draw the t-SNE of each representation, {title: (n, d)}, coloured by digit."""
    size = 6.5 * len(spaces), 5.5
    fig, axes = plt.subplots(1, len(spaces), figsize=size, layout="constrained", squeeze=False)
    for ax, (title, features) in zip(axes[0], spaces.items()):
        points = TSNE(2, init="random", random_state=0).fit_transform(features.numpy())
        scatter = ax.scatter(*points.T, c=labels.numpy(), cmap="tab10", s=4, vmin=-0.5, vmax=9.5)
        ax.set(title=title, xlabel="t-SNE 1", ylabel="t-SNE 2")
    fig.colorbar(scatter, ax=axes[0], label="Digit", ticks=range(10))
    common.save_figure(fig, save_dir, "latent_spaces.png")


# ---- The comparison


def compare_images(models, classifier, real, train, n, seed, device):
    """A row of the table for each model, and {name: (images, ms per image)}. real: the test images' features.

    over_99%: the share whose most probable digit has more than 99%; entropy: of the shares of the predicted
    digits, at most ln 10 = 2.303; nearest: nearest_training_image.
    """
    rows, results = [], {}
    for model in models:
        row, ms = {"model": model.name, "parameters": "", "train_s": "", "ms_per_image": ""}, None
        if model.images is not None:
            images = model.images[:n]
        else:
            torch.manual_seed(seed)
            images, ms = generate(model, next(iter(model.samplers.values())), n, device)
            row["parameters"] = sum(p.numel() for p in model.network.parameters())
            row |= {"train_s": f"{model.training.seconds:.0f}", "ms_per_image": f"{ms:.2f}"}
        features, probabilities = classify(classifier, images)
        shares = probabilities.argmax(1).bincount(minlength=10) / len(images)
        precision, recall = precision_recall(real[: len(images)], features)
        row |= {
            "samples": len(images),
            "frechet": f"{frechet(features, real):.2f}",
            "precision": f"{precision:.3f}",
            "recall": f"{recall:.3f}",
            "over_99%": f"{(probabilities.amax(1) > 0.99).float().mean():.1%}",
            "entropy": f"{torch.special.entr(shares).sum():.3f}",
            "nearest": f"{nearest_training_image(images, train):.2f}",
        }
        rows.append(row)
        results[model.name] = images, ms
    return rows, results


def plot_images(results, save_dir):
    """Draw the first twenty images of each model, a row each."""
    fig, axes = plt.subplots(len(results), 1, figsize=(11, 0.75 * len(results)), layout="constrained")
    for ax, (name, (images, _)) in zip(axes, results.items()):
        ax.imshow(common.tile(images[:20], n_rows=1), cmap="gray", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
    common.save_figure(fig, save_dir, "compare.png")


def compare_cost(models, results, classifier, real, train, n, seed, device):
    """Measure and print each sampler's time and distance; returns {name: [(ms, distance, sd, label)]}.

    The Fréchet distance is larger for fewer samples. So that of as many training digits is subtracted; sd is
    its standard deviation. n samples each, a tenth by the report's sampler, the slowest. results: of
    compare_images.
    """
    torch.manual_seed(seed)
    digits, _ = classify(classifier, train[torch.randperm(len(train))[:20000]])
    points = {}
    for model in models:
        points[model.name] = []
        for i, (label, sample) in enumerate(model.samplers.items()):
            torch.manual_seed(seed)
            if i == 0:
                images, ms = results[model.name]
            else:
                slow = sample == model.process.sample
                images, ms = generate(model, sample, n // 10 if slow else n, device)
            images = images[:n]
            parts = [part for part in digits.split(len(images)) if len(part) == len(images)]
            of_digits = [frechet(part, real) for part in parts]
            distance = frechet(classify(classifier, images)[0], real) - np.mean(of_digits)
            points[model.name].append((ms, distance, np.std(of_digits), label))
            print(f"{model.name} {label}: {len(images)} samples, {ms:.2f} ms per image, ", end="")
            print(f"Fréchet distance of digits + {distance:.2f} (standard deviation {np.std(of_digits):.2f})")
    return points


def plot_quality_cost(points, save_dir):
    """Draw the points of compare_cost, the distance against the time, with its standard deviation."""
    fig, ax = plt.subplots(figsize=(7, 5), layout="constrained")
    for name, of_model in points.items():
        x, y, error, labels = zip(*sorted(of_model))
        ax.errorbar(x, y, error, fmt="o", label=name)
        for i, label in enumerate(labels):  # left and right in turn, as they are close
            side = {"ha": "left", "xytext": (6, -3)} if i % 2 else {"ha": "right", "xytext": (-6, -3)}
            ax.annotate(label, (x[i], y[i]), textcoords="offset points", fontsize=8, **side)
    ax.set(xscale="log", yscale="symlog", xlabel="Milliseconds per image")
    ax.margins(0.2)
    ax.axhline(0, color="gray", linestyle="--", label="training digits")
    ax.set_ylabel("Fréchet distance - that of as many training digits")
    ax.legend()
    common.save_figure(fig, save_dir, "quality_cost.png")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    add = parser.add_argument
    folder = os.path.expanduser  # "~" is the home folder
    add("paths", nargs="*", type=folder, default=list(DEFAULTS), help="saved models, or samples.npy")
    add("--num-samples", type=int, default=10000, help="images of each model (default: 10000)")
    add("--seed", type=int, default=0, help="seed of the samples and the classifier (default: 0)")
    add("--device", default=device, help="a torch device")
    add("--data-dir", type=folder, default="data", help="folder of MNIST (default: data)")
    add("--save-dir", type=folder, default="results/compare", help="default: results/compare")
    args = parser.parse_args(argv)
    if args.num_samples < 100:
        parser.error("argument --num-samples: takes a whole number >= 100")
    if not -(2**63) <= args.seed < 2**64:
        parser.error("argument --seed: takes a whole number from -2**63 to 2**64 - 1")
    if len(set(args.paths)) < len(args.paths):
        parser.error("argument paths: takes each file once")
    try:
        torch.zeros(1, device=args.device).item()
    except Exception as error:  # torch has several types for it
        reason = str(error).splitlines()[0]
        parser.error(f"argument --device: {args.device} can't be used ({reason}); try --device cpu")
    return args


def main(argv=None):
    args = parse_args(argv)
    names = [os.path.splitext(os.path.basename(path))[0] for path in args.paths]
    if len(set(names)) < len(names):
        names = args.paths
    models = [load(name, path, args.device) for name, path in zip(names, args.paths)]
    common.make_folder(args.save_dir)
    loaders = common.load_mnist(args.data_dir, device=args.device)
    (train, train_labels), (test, test_labels) = (loader.dataset.tensors for loader in loaders)
    for model, path in zip(models, args.paths):
        options = model.training.options if model.images is None else None
        if options and options.get("pixel_sum") != train[: options["limit"]].sum().item():
            raise OSError(f"{path} was trained on other images than those in {args.data_dir}")
    train, test = train.cpu() / 255, test.cpu() / 255
    train_labels, test_labels = train_labels.cpu(), test_labels.cpu()

    torch.manual_seed(args.seed)
    classifier = train_classifier(loaders[0], args.device)
    real, probabilities = classify(classifier, test)
    accuracy = (probabilities.argmax(1) == test_labels).float().mean()
    print(f"Classifier: {accuracy:.2%} of the test images right")

    torch.manual_seed(args.seed)
    n = args.num_samples
    digits = Model("test digits", test[:n]), Model("training digits", train[torch.randperm(len(train))[:n]])
    everything = [*digits, Model("noise", torch.rand(n, 1, 28, 28)), *models]
    rows, results = compare_images(everything, classifier, real, train, n, args.seed, args.device)
    for row in [{column: column for column in rows[0]}, *rows]:
        print("".join(f"{value:>{22 if column == 'model' else 13}}" for column, value in row.items()))
    common.save_table(rows, args.save_dir, "compare.csv")
    plot_images(results, args.save_dir)

    models = [model for model in models if model.images is None]
    if models:
        points = compare_cost(models, results, classifier, real, train, min(n, 2000), args.seed, args.device)
        plot_quality_cost(points, args.save_dir)
    vaes = [model for model in models if model.process is None]
    processes = [model.process for model in models if model.process is not None]
    if processes:
        n = min(n, 5000)
        splits = (train[:n], train_labels[:n]), (test[:n], test_labels[:n])
        times, curves, lines, spaces = compare_representations(processes[0], vaes, *splits, args.seed)
        plot_representations(times, curves, lines, args.save_dir)
        plot_latent_spaces(spaces, splits[1][1], args.save_dir)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"compare.py: {error}")
    except KeyboardInterrupt:
        sys.exit("compare.py: interrupted")
