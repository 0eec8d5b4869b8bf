"""What the tests share. Run them from the folder above: pytest"""

import os
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "benchmarks")]
from test_shapes import write_mnist


@pytest.fixture
def mnist(tmp_path):
    """A folder with 100 training and 40 test images in MNIST's format."""
    folder = tmp_path / "data"
    write_mnist(folder, n_test=40)  # more than t-SNE's perplexity of 30
    return folder


@pytest.fixture
def argv(mnist, tmp_path):
    """The options of a short run, to which tmp_path/out belongs."""
    options = "--epochs", 1, "--batch-size", 10, "--device", "cpu", "--data-dir", mnist
    return [*map(str, options), "--save-dir", str(tmp_path / "out")]
