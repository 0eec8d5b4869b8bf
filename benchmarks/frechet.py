"""How far generated digits are from real ones: the Frechet distance of a digit classifier's features.

    python ddpm.py --load results/ddpm/ddpm.pt --num-samples 10000
    python benchmarks/frechet.py results/ddpm/samples.npy results/conv_vae/conv_vae_latent10.pt

The distance of Heusel et al. (2017) to the 10,000 test images, with the hidden layer of a small classifier,
trained here in a minute, in the place of Inception's. It falls with the number of samples: compare equal
numbers, and with the training images, which stand for the best that can be had.
"""

import argparse
import os
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common  # noqa: E402
import conv_vae  # noqa: E402


def train_classifier(train_loader, num_epochs=3):
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    total_steps = num_epochs * len(train_loader)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=total_steps)
    for _ in range(num_epochs):
        for x, y in train_loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
    return model


def frechet(a, b):
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of the features a and b, (n, d) each."""
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    # The trace of the root is the sum of the roots of the eigenvalues, all real and >= 0 but for rounding.
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0)).sum()
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b) - 2 * root


def load_samples(path):
    """The images of a file of ddpm.py --num-samples, or 10,000 images of a model of conv_vae.py."""
    if path.endswith(".npy"):
        return torch.from_numpy(np.load(path))
    model, config = common.load_model(path, "conv_vae", conv_vae.build_vae)
    return common.generate_samples(model, config["latent_dim"], n_samples=10_000)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("samples", nargs="+", help="samples.npy of ddpm.py, or a model of conv_vae.py")
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args()

    torch.manual_seed(0)
    train_loader, test_loader = common.load_mnist(args.data_dir)
    model = train_classifier(train_loader)

    @torch.no_grad()
    def features_and_logits(images):
        hidden = torch.cat([model[:-1](x) for x in images.split(1000)])
        return hidden.double().numpy(), model[-1](hidden)

    real, labels = test_loader.dataset.tensors
    real, logits = features_and_logits(real.float() / 255)
    accuracy = (logits.argmax(1) == labels).float().mean()
    print(f"Classifier: {accuracy:.2%} of the test images right")

    train = train_loader.dataset.tensors[0]
    train = train[torch.randperm(len(train))].float() / 255
    for path in args.samples:
        images = load_samples(path)
        generated, logits = features_and_logits(images)
        floor, _ = features_and_logits(train[: len(images)])
        floor, distance = frechet(floor, real), frechet(generated, real)
        sure = (logits.softmax(1).amax(1) > 0.99).float().mean()
        print(
            f"{path}: {len(images)} samples, Frechet distance {distance:.2f}, training images {floor:.2f}, ",
            end="",
        )
        print(f"ratio {distance / floor:.1f}; classified at over 99%: {sure:.1%}")


if __name__ == "__main__":
    main()
