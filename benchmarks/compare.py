"""Compare the VAEs with the DDPM, as the report's last paragraph proposes: images, cost, representations.

python benchmarks/compare.py             the default models of the three scripts, from results/
python benchmarks/compare.py PATH ...    any saved models, or samples.npy of ddpm.py --num-samples
"""

import argparse
import os
import sys
import time

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


def load(path, device):
    """A VAE, a pair (DDPM, guiding model), or images, (n, 1, 28, 28). OSError if the file is none of them."""
    if not os.path.exists(path):
        how = f": make it with {DEFAULTS[path]}" if path in DEFAULTS else ""
        raise OSError(f"there is no {path}{how}")
    if path.endswith(".npy"):
        try:
            images = torch.from_numpy(np.load(path)).float()
        except Exception as error:
            raise OSError(f"{path} is damaged, or no array of numbers") from error
        if images.shape[1:] != (1, 28, 28) or len(images) < 100:
            raise OSError(f"{path} is an array of {tuple(images.shape)}: give (n, 1, 28, 28), n at least 100")
        if not (0 <= images.min() and images.max() <= 1):  # true of NaN, too
            raise OSError(f"{path} has pixels outside [0, 1]")
        return images
    for script in dense_vae, conv_vae, ddpm:
        try:
            return script.load(path, device)
        except OSError:  # the next script's, perhaps
            pass
    raise OSError(f"{path} is damaged, or not a model of these scripts")


def generate(model, n, steps=30):
    """`n` images, (n, 1, 28, 28) in [0, 1], on the CPU, and the milliseconds that each took.

    steps: of the DDPM's sample_fast; None stands for the report's sampler.
    """
    images, start = [], time.perf_counter()
    device = next(model.parameters()).device if isinstance(model, nn.Module) else model[0].device
    bf16 = conv_vae.has_bf16(str(device))
    for batch in tqdm(torch.arange(n).split(100), desc="Samples", leave=False):
        if isinstance(model, nn.Module):
            images.append(common.generate_samples(model, model.options["latent_dim"], len(batch), device))
            continue
        process, guide = model
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            if steps is None:
                images.append(process.sample(len(batch)).cpu())
            else:
                x0 = ddpm.sample_fast(process, guide, len(batch), min(steps, process.timesteps))[-1]
                images.append((x0.clamp(-1, 1) + 1).cpu() / 2)
    return torch.cat(images), 1000 * (time.perf_counter() - start) / n


# ---- The quality of the images


def get_classifier(train_loader, path, device, num_epochs=4):
    """A small convolutional classifier, saved at `path`, or trained and saved there."""
    layers = []
    for i, o in (1, 32), (32, 64):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(64 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10)]
    model = nn.Sequential(*layers).to(device)
    if os.path.exists(path):
        try:
            model.load_state_dict(torch.load(path, map_location=device, weights_only=True))
            return model.eval()
        except Exception as error:
            raise OSError(f"{path} is damaged: delete it") from error
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    total_steps = num_epochs * len(train_loader)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=total_steps)
    for epoch in range(num_epochs):
        for x, y in tqdm(train_loader, desc=f"Classifier, epoch {epoch + 1}", leave=False):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
    ddpm.save(model.state_dict(), path)
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


def compare_representations(vaes, process, train, test, args):
    """Print how well a digit can be read from each representation; draw two figures.

    train, test: (images, labels) of the two splits. representations.png shows the accuracies,
    latent_spaces.png the t-SNE of the bottleneck at the t that a linear probe reads best, and of a VAE's mu.
    """
    torch.manual_seed(args.seed)
    unets = {
        "U-Net": getattr(process.model, "unet", process.model),
        "untrained U-Net": ddpm.build_unet().to(process.device),
    }
    curves = {"U-Net": [], "untrained U-Net": [], "pixels": []}
    shares = 0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7
    times = sorted({round(share * (process.timesteps - 1)) for share in shares})
    best, best_t, spaces = 0, 0, {}
    for t in tqdm(times, desc="Representations", leave=False):
        torch.manual_seed(args.seed)
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
                best, best_t, spaces["U-Net"] = curve[-1][0], t, features[1]

    lines = {}
    for name, vae in vaes:
        features = [encode(vae, images) for images, _ in (train, test)]
        lines[name] = probe(features[0], train[1], features[1], test[1])
        print(f"{name}, mu: linear probe {lines[name][0]:.2%}, nearest neighbours {lines[name][1]:.2%}")
        spaces["VAE"] = features[1]

    fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for i, (ax, title) in enumerate(zip(axes, ("Linear probe", "5 nearest neighbours"))):
        for name, curve in curves.items():
            ax.plot(times, [accuracy[i] for accuracy in curve], "o-", label=name)
        for j, (name, accuracy) in enumerate(lines.items()):
            ax.axhline(accuracy[i], color=f"C{3 + j}", linestyle="--", label=f"{name}, mu")
        ax.set_xlabel("t of the noised image")
        ax.set_title(title)
    axes[0].set_ylabel("Accuracy on the test images")
    axes[0].legend()
    common.save_figure(fig, args.save_dir, "representations.png")

    size = 6.5 * len(spaces), 5.5
    fig, axes = plt.subplots(1, len(spaces), figsize=size, layout="constrained", squeeze=False)
    titles = {"U-Net": f"Bottleneck of the U-Net at t={best_t}"}
    titles["VAE"] = f"mu of {vaes[-1][0]}" if vaes else ""
    for ax, (name, features) in zip(axes[0], spaces.items()):
        points = TSNE(2, init="random", random_state=0).fit_transform(features.numpy())
        scatter = ax.scatter(*points.T, c=test[1].numpy(), cmap="tab10", s=4, vmin=-0.5, vmax=9.5)
        ax.set(title=titles[name], xlabel="t-SNE 1", ylabel="t-SNE 2")
    fig.colorbar(scatter, ax=axes[0], label="Digit", ticks=range(10))
    common.save_figure(fig, args.save_dir, "latent_spaces.png")


# ---- The comparison


def compare_images(models, classifier, real, train, test, args):
    """A row of the table for each model, for digits and for noise; and {name: (images, ms per image)}.

    real: the features of the test images. over_99%: the share whose most probable digit has more than 99%;
    entropy: of the shares of the predicted digits, at most ln 10 = 2.303; nearest: nearest_training_image.
    """
    torch.manual_seed(args.seed)
    n = args.num_samples
    images_only = {"test digits": test[:n], "training digits": train[torch.randperm(len(train))[:n]]}
    images_only["noise"] = torch.rand(n, 1, 28, 28)
    rows, results = [], {}
    for name, model in [*images_only.items(), *models]:
        row, ms = {"model": name, "parameters": "", "train_s": "", "ms_per_image": ""}, None
        if isinstance(model, torch.Tensor):
            images = model[:n]
        else:
            torch.manual_seed(args.seed)
            images, ms = generate(model, n)
            trained, network = (model[0], model[0].model) if isinstance(model, tuple) else (model, model)
            row["parameters"] = sum(p.numel() for p in network.parameters())
            row |= {"train_s": f"{trained.seconds:.0f}", "ms_per_image": f"{ms:.2f}"}
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
        results[name] = images, ms
    return rows, results


def plot_quality_cost(models, results, classifier, real, train, args):
    """Draw the Fréchet distance against the milliseconds per image: VAEs, and the DDPM by several samplers.

    The distance is larger for fewer samples: that of as many training digits is subtracted, and its standard
    deviation drawn as the error bar. 2,000 samples each, a tenth by the report's sampler, the slowest.
    real: the features of the test images.
    """
    n = min(args.num_samples, 2000)
    torch.manual_seed(args.seed)
    digits, _ = classify(classifier, train[torch.randperm(len(train))[:20000]])
    fig, ax = plt.subplots(figsize=(7, 5), layout="constrained")
    for name, model in models:
        runs, points = {"": results[name]}, []
        if isinstance(model, tuple):
            timesteps = model[0].timesteps
            runs = {f"{min(30, timesteps)} steps": results[name]}
            for steps in [steps for steps in (10, 20, 50) if steps < timesteps] + [None]:
                torch.manual_seed(args.seed)
                label = f"{steps} steps" if steps else f"{timesteps} steps ({n // 10} samples)"
                runs[label] = generate(model, n if steps else n // 10, steps)
        for label, (images, ms) in runs.items():
            images = images[:n]
            parts = digits.split(len(images))
            of_digits = [frechet(part, real) for part in parts if len(part) == len(images)]
            distance = frechet(classify(classifier, images)[0], real) - np.mean(of_digits)
            points.append((ms, distance, np.std(of_digits), label))
            print(f"{name} {label}: {len(images)} samples, {ms:.2f} ms per image, ", end="")
            print(f"Fréchet distance of digits + {distance:.2f} (standard deviation {points[-1][2]:.2f})")
        x, y, error, labels = zip(*sorted(points))
        ax.errorbar(x, y, error, fmt="o", label=name)
        for i, label in enumerate(labels):  # left and right in turn, as they are close
            side = {"ha": "left", "xytext": (6, -3)} if i % 2 else {"ha": "right", "xytext": (-6, -3)}
            ax.annotate(label, (x[i], y[i]), textcoords="offset points", fontsize=8, **side)
    ax.set(xscale="log", yscale="symlog", xlabel="Milliseconds per image")
    ax.margins(0.2)
    ax.axhline(0, color="gray", linestyle="--", label="training digits")
    ax.set_ylabel("Fréchet distance - that of as many training digits")
    ax.legend()
    common.save_figure(fig, args.save_dir, "quality_cost.png")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    add = parser.add_argument
    add("paths", nargs="*", default=list(DEFAULTS), help="saved models, or samples.npy")
    add("--num-samples", type=int, default=10000, help="images of each model (default: 10000)")
    add("--seed", type=int, default=0, help="seed of the samples and the classifier (default: 0)")
    add("--device", default=device, help="a torch device")
    add("--data-dir", default="data", help="folder of MNIST, downloaded if missing (default: data)")
    add("--save-dir", default="results/compare", help="folder of the figures (default: results/compare)")
    args = parser.parse_args(argv)
    if args.num_samples < 100:
        parser.error("argument --num-samples: takes a whole number >= 100")
    if not 0 <= args.seed < 2**32:
        parser.error("argument --seed: takes a whole number from 0 to 2**32 - 1")
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
    common.make_folder(args.save_dir)
    names = [os.path.splitext(os.path.basename(path))[0] for path in args.paths]
    if len(set(names)) < len(names):
        names = args.paths
    models = [(name, load(path, args.device)) for name, path in zip(names, args.paths)]
    loaders = common.load_mnist(args.data_dir, device=args.device)
    (train, train_labels), (test, test_labels) = (loader.dataset.tensors for loader in loaders)
    train, test = train.cpu() / 255, test.cpu() / 255

    torch.manual_seed(args.seed)
    classifier = get_classifier(loaders[0], os.path.join(args.save_dir, "classifier.pt"), args.device)
    real, probabilities = classify(classifier, test)
    accuracy = (probabilities.argmax(1) == test_labels.cpu()).float().mean()
    print(f"Classifier: {accuracy:.2%} of the test images right")

    rows, results = compare_images(models, classifier, real, train, test, args)
    for row in [{column: column for column in rows[0]}, *rows]:
        print("".join(f"{value:>{22 if column == 'model' else 13}}" for column, value in row.items()))
    common.save_table(rows, args.save_dir, "compare.csv")

    fig, axes = plt.subplots(len(results), 1, figsize=(11, 0.75 * len(results)), layout="constrained")
    for ax, (name, (images, _)) in zip(axes, results.items()):
        ax.imshow(common.tile(images[:20], n_rows=1), cmap="gray", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
    common.save_figure(fig, args.save_dir, "compare.png")

    models = [(name, model) for name, model in models if not isinstance(model, torch.Tensor)]
    if models:
        plot_quality_cost(models, results, classifier, real, train, args)
    vaes = [(name, model) for name, model in models if isinstance(model, nn.Module)]
    ddpms = [model for _, model in models if isinstance(model, tuple)]
    if ddpms:
        n = min(5000, args.num_samples)
        splits = (train[:n], train_labels[:n].cpu()), (test[:n], test_labels[:n].cpu())
        compare_representations(vaes, ddpms[0][0], *splits, args)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"compare.py: {error}")
    except KeyboardInterrupt:
        sys.exit("compare.py: interrupted")
