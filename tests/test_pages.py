"""The pages show what the files in benchmarks/results/ hold."""

import csv
import os
import statistics

import pytest
from conftest import ROOT


def read(*parts):
    with open(os.path.join(ROOT, *parts), encoding="utf-8", newline="") as f:
        return f.read()


@pytest.mark.parametrize(
    "what, column, digits",
    [("dense", "loss", 2), ("conv", "loss", 2), ("ddpm", "loss", 4), ("ddpm", "frechet", 1)],
)
def test_ablation_table(what, column, digits):
    """Mean and standard deviation of each row, as the page has them."""
    page = read("benchmarks", "LOG.md" if what == "ddpm" else "README.md")
    values = {}
    for row in csv.DictReader(read("benchmarks", "results", f"ablation_{what}.csv").splitlines()):
        values.setdefault(row["row"], []).append(float(row[column]))
    for name, of_name in values.items():
        if name != "the annex as printed":  # it diverges
            mean, sd = statistics.mean(of_name), statistics.stdev(of_name)
            assert f" {mean:.{digits}f} ± {sd:.{digits}f} " in page, name
