"""How well can a digit be read from what each model has learnt, as the report's last paragraph asks?

python benchmarks/representations.py             the default models of the three scripts, from results/
python benchmarks/representations.py PATH ...    a saved DDPM, and any number of saved VAEs

A linear probe and the nearest neighbours read the digit from mu of the VAEs, and from the bottleneck of the
DDPM's U-Net, on the image noised up to t.
"""

import argparse
import os
import sys
import tempfile

import torch
import torch.nn.functional as F
from compare import DEFAULTS, load, names
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common
import ddpm
from common import plt


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


def read_unet(process, train, test, seed):
    """How well a digit is read from the U-Net, an untrained one and the pixels, on images noised up to t.

    train, test: (images, labels) of the two splits. Returns the times t, {name: [(linear, nearest) at each
    t]}, and (title, representation of the test images) at the t whose digits a linear probe reads best.
    """
    torch.manual_seed(seed)
    unets = {
        "U-Net": getattr(process.model, "unet", process.model),
        "untrained U-Net": ddpm.build_unet(process.device),
    }
    curves = {"U-Net": [], "untrained U-Net": [], "pixels": []}
    shares = 0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7
    times = sorted({round(share * (process.timesteps - 1)) for share in shares})
    best, space = 0, None
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
                best, space = curve[-1][0], (f"Bottleneck of the U-Net at t={t}", features[1])
    return times, curves, space


def plot_representations(times, curves, lines, save_dir):
    """Draw the accuracies: curves over t, and a dashed line for each mu."""
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


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    add = parser.add_argument
    folder = os.path.expanduser  # "~" is the home folder
    add("paths", nargs="*", type=folder, default=list(DEFAULTS), help="saved models")
    add("--num-images", type=int, default=5000, help="images of each split (default: 5000)")
    add("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    add("--device", default=device, help="a torch device")
    add("--data-dir", type=folder, default="data", help="folder of MNIST (default: data)")
    folder_help = "default: results/representations"
    add("--save-dir", type=folder, default="results/representations", help=folder_help)
    args = parser.parse_args(argv)
    if args.num_images < 40:
        parser.error("--num-images takes a whole number >= 40")
    try:
        torch.zeros(1, device=args.device).item()
    except Exception as error:  # torch has several types for it
        reason = str(error).splitlines()[0]
        parser.error(f"--device {args.device} can't be used ({reason}); try --device cpu")
    return args


def main(argv=None):
    args = parse_args(argv)
    loaders = common.load_mnist(args.data_dir, device="cpu")
    train_images = loaders[0].dataset.tensors[0]
    models = {name: load(path, args.device, train_images) for name, path in names(args.paths).items()}
    os.makedirs(args.save_dir, exist_ok=True)
    tempfile.TemporaryFile(dir=args.save_dir).close()  # fails now, not after the work
    n = args.num_images
    train, test = ((x[:n] / 255, y[:n]) for x, y in (loader.dataset.tensors for loader in loaders))

    times, curves, lines, spaces = [], {}, {}, {}
    for name, (script, model) in models.items():
        if script is ddpm:
            times, curves, (title, space) = read_unet(model[0], train, test, args.seed)
            spaces[title] = space
        elif script is not None:
            features = [encode(model, images) for images, _ in (train, test)]
            lines[f"{name}, mu"] = linear, nearest = probe(features[0], train[1], features[1], test[1])
            print(f"{name}, mu: linear probe {linear:.2%}, nearest neighbours {nearest:.2%}")
            spaces[f"mu of {name}"] = features[1]
    if not spaces:
        raise OSError("none of the files is a model")
    rows = [(name, t, *pair) for name, curve in curves.items() for t, pair in zip(times, curve)]
    rows += [(name, "", *pair) for name, pair in lines.items()]
    columns = "features", "t", "linear", "nearest"
    common.save_table([dict(zip(columns, row)) for row in rows], args.save_dir, "representations.csv")
    plot_representations(times, curves, lines, args.save_dir)
    plot_latent_spaces(spaces, test[1], args.save_dir)


if __name__ == "__main__":
    try:
        main()
    except (OSError, KeyboardInterrupt) as error:
        sys.exit(f"representations.py: {str(error) or 'interrupted'}")
