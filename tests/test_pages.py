"""The tables of the pages show what the files in benchmarks/results/ hold."""

import csv
import os
import statistics

import pytest
from conftest import ROOT


def read(*parts):
    with open(os.path.join(ROOT, *parts), encoding="utf-8", newline="") as f:
        return f.read()


def table(file_name):
    """{name: {column: its values, as strings, one for each seed}}; the first column has the names."""
    rows = {}
    for row in csv.DictReader(read("benchmarks", "results", file_name).splitlines()):
        rows.setdefault(next(iter(row.values())).split("_seed")[0], []).append(row)
    return {name: {column: [row[column] for row in of] for column in of[0]} for name, of in rows.items()}


def mean_cell(values, digits):
    """Mean ± standard deviation."""
    numbers = [float(value.rstrip("%")) for value in values]
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{spread}{'%' * values[0].endswith('%')}"


def list_cell(values, digits, unit=""):
    """The value of each seed."""
    return ", ".join(f"{float(value) * (100 if unit else 1):.{digits}f}" for value in values) + unit


MODELS = {
    "dense VAE, d=5": ("results/dense", 2),
    "convolutional VAE, d=10": ("results/conv", 2),
    "DDPM": ("results/ddpm", 4),
}


@pytest.mark.parametrize("label", MODELS)
def test_results(label):
    """Of the seeds on which nothing was chosen: the rows of both pages."""
    name, digits = MODELS[label]
    values = table("compare.csv")[name]
    parameters, loss = f"{int(values['parameters'][0]):,}", mean_cell(values["loss"], digits)
    measures = {"frechet": 1, "pixels": 2, "doubtful": 1}
    cells = [mean_cell(values[column], digits) for column, digits in measures.items()]
    start = " | ".join(["", label, parameters, loss, *cells]).strip()
    assert start in read("README.md")
    measures = {"precision": 2, "recall": 2, "mean_pixel": 4, "entropy": 3, "nearest": 2}
    cells = [mean_cell(values[column], digits) for column, digits in measures.items()]
    assert " | ".join([start, *cells]) in read("benchmarks", "README.md")


def test_choices():
    """The default, each part left out."""
    page = read("benchmarks", "README.md")
    for name, values in table("ablation_ddpm_select.csv").items():
        cells = list_cell(values["loss"], 4), list_cell(values["frechet"], 1), list_cell(values["pixels"], 2)
        assert " | ".join(["", name, *cells, list_cell(values["doubtful"], 1, "%"), ""]).strip() in page


@pytest.mark.parametrize("what, digits", [("dense", 2), ("conv", 2)])
def test_learning_rates(what, digits):
    page = read("benchmarks", "README.md")
    for name, values in table(f"ablation_{what}.csv").items():
        assert f" {mean_cell(values['loss'], digits)} " in page, name
