"""The two rulers by which compare.py and ablation.py measure images.

python benchmarks/rulers.py    trains the classifier again and writes classifier.pt (three minutes)

1. The features of a classifier of digits, trained once on the first 50,000 training images. Its weights are
   in classifier.pt, so it is the same everywhere. They see mostly the shape.
2. The first 64 principal components of the pixels of the same images. They see the ink, and how the
   images vary.

Both turn an image into 64 numbers, whose Fréchet distance to those of real digits is the measure.
"""

import argparse
import os
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common

CLASSIFIER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "classifier.pt")
MEASURES = "frechet", "pixels", "doubtful", "mean_pixel"
N_TRAIN = 50_000  # what is chosen is measured against the other 10,000 training images


def build_classifier():
    """An untrained classifier; all but its last layer gives the features, (n, 64)."""
    layers = []
    for i, o in (1, 32), (32, 64):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10))


def load_classifier(device):
    """The trained classifier. Its weights are stored in float16 and used in float32."""
    classifier = build_classifier()
    classifier.load_state_dict(torch.load(CLASSIFIER, map_location="cpu", weights_only=True))
    return classifier.eval().to(device)


def train_classifier(train_loader, num_epochs=4):
    """Train a classifier on a loader of digits, on the CPU."""
    torch.manual_seed(0)
    classifier = build_classifier()
    optimizer = torch.optim.Adam(classifier.parameters(), fused=True)
    total_steps = num_epochs * len(train_loader)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=total_steps)
    for epoch in range(num_epochs):
        for x, y in tqdm(train_loader, desc=f"Classifier, epoch {epoch + 1}", leave=False):
            optimizer.zero_grad()
            F.cross_entropy(classifier(x), y).backward()
            optimizer.step()
            scheduler.step()
    return classifier.eval()


@torch.no_grad()
def classify(classifier, images):
    """The features, (n, 64), and the probabilities of the digits, (n, 10), of images in [0, 1]."""
    device = next(classifier.parameters()).device
    features = torch.cat([classifier[:-1](x.to(device)) for x in images.split(500)])
    return features.cpu(), classifier[-1](features).softmax(1).cpu()


def principal_components(train_images):
    """The 64 directions, (784, 64), along which the pixels of the images vary most."""
    covariance = train_images[:N_TRAIN].flatten(1).double().T.cov()
    return torch.linalg.eigh(covariance).eigenvectors[:, -64:].float()  # the eigenvalues are in rising order


def frechet(a, b):
    """The Fréchet distance of a and b, (n, d) each, as in FID (Heusel et al., 2017).

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), with the means m and the covariances S.
    """
    a, b = a.double().numpy(), b.double().numpy()
    cov_a, cov_b = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    # The trace of the root is the sum of the roots of the eigenvalues, all real and >= 0 but for rounding.
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0)).sum()
    distance = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b) - 2 * root
    return max(distance, 0.0)  # of equal images, rounding may leave -1e-12


class Rulers:
    """Measures images, (n, 1, 28, 28) in [0, 1] on the CPU, against `real` ones."""

    def __init__(self, train_images, real, device="cpu"):
        self.classifier = load_classifier(device)
        self.components = principal_components(train_images)
        self.features, self.probabilities = classify(self.classifier, real)
        self.projections = real.flatten(1) @ self.components

    def measure(self, images):
        """MEASURES: two distances, the share of digits that get less than 90%, and the mean pixel."""
        features, probabilities = classify(self.classifier, images)
        return {
            "frechet": frechet(features, self.features),
            "pixels": frechet(images.flatten(1) @ self.components, self.projections),
            "doubtful": (probabilities.amax(1) < 0.9).float().mean().item(),
            "mean_pixel": images.mean().item(),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", type=os.path.expanduser, default="data", help="folder (default: data)")
    args = parser.parse_args()
    train, test = common.load_mnist(args.data_dir, limit=N_TRAIN)
    if len(train.dataset) < N_TRAIN:
        sys.exit(f"rulers.py: {args.data_dir} has {len(train.dataset)} images, not {N_TRAIN} and more")
    classifier = train_classifier(train)
    torch.save(classifier.half().state_dict(), f"{CLASSIFIER}.new")
    os.replace(f"{CLASSIFIER}.new", CLASSIFIER)
    _, probabilities = classify(load_classifier("cpu"), torch.cat([x for x, _ in test]))
    accuracy = (probabilities.argmax(1) == test.dataset.tensors[1]).float().mean()
    print(f"{CLASSIFIER}: {accuracy:.2%} of the test images right")


if __name__ == "__main__":
    try:
        main()
    except (OSError, KeyboardInterrupt) as error:
        sys.exit(f"rulers.py: {str(error) or 'interrupted'}")
