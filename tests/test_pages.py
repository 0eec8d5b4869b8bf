"""The tables of the pages show what the files in benchmarks/results/ hold."""

import csv
import os
import re
import statistics

import pytest
from conftest import ROOT


def read(*parts):
    with open(os.path.join(ROOT, *parts), encoding="utf-8", newline="") as f:
        return f.read()


def table(*file_names):
    """{name: {column: its values, as strings}}: of the rows whose first columns differ in the seed alone."""
    rows = {}
    for file_name in file_names:
        for row in csv.DictReader(read("benchmarks", "results", file_name).splitlines()):
            rows.setdefault(re.sub("_seed[0-9]+", "", next(iter(row.values()))), []).append(row)
    return {name: {column: [row[column] for row in of] for column in of[0]} for name, of in rows.items()}


def mean_cell(values, digits):
    """Mean ± standard deviation."""
    numbers = [float(value.rstrip("%")) for value in values]
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{spread}{'%' * values[0].endswith('%')}"


def mean_cells(values, columns):
    """The cells of some columns of `table`; columns: {name: digits behind the point}."""
    return [mean_cell(values[column], digits) for column, digits in columns.items()]


def pair_cells(values):
    """The cells of representations.py, linear probe / nearest neighbours in %, one for each row."""
    pairs = zip(values["linear"], values["nearest"])
    return [" / ".join(f"{100 * float(share):.1f}" for share in pair) for pair in pairs]


def list_cell(values, digits, unit=""):
    """The value of each seed."""
    return ", ".join(f"{float(value) * (100 if unit else 1):.{digits}f}" for value in values) + unit


def line(*cells):
    """The line of a table that starts with these cells."""
    return "| " + " | ".join(cells)


MODELS = {
    "dense VAE, d=5": ("results/dense/dense_vae_latent5.pt", 2),
    "convolutional VAE, d=10": ("results/conv/conv_vae_latent10.pt", 2),
    "DDPM": ("results/ddpm/ddpm.pt", 4),
}
MEASURES = {"frechet": 1, "pixels": 2, "doubtful": 1}  # and the digits behind the point
MORE = {"precision": 2, "recall": 2, "mean_pixel": 4, "entropy": 3, "nearest": 2}


@pytest.mark.parametrize("label", MODELS)
def test_results(label):
    """Of the seeds on which nothing was chosen: the rows of both pages."""
    name, digits = MODELS[label]
    values = table("compare.csv")[name]
    cells = [label, f"{int(values['parameters'][0]):,}", mean_cell(values["loss"], digits)]
    cells += mean_cells(values, MEASURES)
    assert line(*cells) in read("README.md")
    cells += mean_cells(values, MORE)
    assert line(*cells) in read("benchmarks", "README.md")


def test_annex():
    """The report's own DDPM, each seed, and the others on as many images."""
    rows, page = table("compare_annex.csv"), read("benchmarks", "README.md")
    labels = {
        "training digits": "training digits",
        "convolutional VAE, d=10": "results/conv/conv_vae_latent10.pt",
        "the default DDPM, 20 steps": "results/ddpm/ddpm.pt",
    }
    lines = {label: rows[name] for label, name in labels.items()}
    annex = rows["results/annex/ddpm.pt"]
    for i, seed in enumerate((10, 11, 12)):
        lines[f"the report's DDPM, seed {seed}"] = {column: annex[column][i : i + 1] for column in annex}
    for label, values in lines.items():
        cells = mean_cells(values, MEASURES | MORE)
        assert line(label, *cells) in page, label


def test_beta():
    study = table(*(f"beta_seed{seed}.csv" for seed in (10, 11, 12)))
    images, page = table("compare_beta.csv"), read("benchmarks", "README.md")
    for beta, row in study.items():
        cells = [mean_cell(row[column], 1) for column in ("bce", "kl", "loss")]
        cells += [row["active_units"][0], mean_cell(row["gaussian_kl"], 3)]
        cells.append(mean_cell([f"{100 * float(share)}%" for share in row["remote_share"]], 1))
        cells += mean_cells(images[f"results/beta/conv_vae_beta{beta}.pt"], MEASURES)
        assert line(beta, *cells) in page, beta


@pytest.mark.parametrize("what", ["dense", "conv"])
def test_sweeps(what):
    page = read("benchmarks", "README.md").replace("**", "")
    for architecture, values in table(f"{what}_sweep.csv").items():
        cells = [f"{float(loss):.2f}" for loss in values["loss"]]
        assert line(architecture.replace("-", " "), *cells) in page, architecture


@pytest.mark.parametrize("what", ["dense", "conv"])
def test_images_of_the_sweeps(what):
    page, models = read("benchmarks", "README.md").replace("**", ""), table("compare_sweep.csv")
    for architecture in table(f"{what}_sweep.csv"):
        cells = []
        for latent_dim in (2, 5, 10, 20, 50, 100):
            values = models[f"{what}_vae_{architecture}_latent{latent_dim}"]
            cells.append(" / ".join(mean_cells(values, MEASURES)))
        assert line(f"{what} {architecture.replace('-', ' ')}", *cells) in page, architecture


def test_representations():
    page = read("benchmarks", "README.md").replace("**", "")
    labels = {"conv_vae_latent10, mu": "convolutional VAE, mu (10 numbers)"}
    labels["dense_vae_latent5, mu"] = "dense VAE, mu (5 numbers)"
    for name, values in table("representations.csv").items():
        assert line(labels.get(name, name), *pair_cells(values)) in page, name


def test_representations_at_equal_d():
    rows, page = table("representations_vaes.csv"), read("benchmarks", "README.md")
    dense, conv = "dense_vae_256-512_latent", "conv_vae_32-64-128_latent"
    for label, name in ("dense 256 512, seed 10", dense), ("conv 32 64 128, seed 10", conv):
        cells = [pair_cells(rows[f"{name}{latent_dim}, mu"])[0] for latent_dim in (5, 10)]
        assert line(label, *cells) in page, label
    of_dense = ", ".join(pair_cells(rows["results/dense/dense_vae_latent5, mu"]))
    of_conv = ", ".join(pair_cells(rows["results/conv/conv_vae_latent10, mu"]))
    assert line("dense 256 512, seeds 11, 12", of_dense) in page
    assert line("conv 32 64 128, seeds 11, 12", "") + f"| {of_conv} |" in page


def test_choices():
    """The default, each part left out."""
    page = read("benchmarks", "README.md")
    for name, values in table("ablation_ddpm_select.csv").items():
        cells = list_cell(values["loss"], 4), list_cell(values["frechet"], 1), list_cell(values["pixels"], 2)
        assert line(name, *cells, list_cell(values["doubtful"], 1, "%")) in page, name


def test_epochs_and_batches():
    page = read("benchmarks", "README.md")
    for row in csv.DictReader(read("benchmarks", "results", "epochs_batches_select.csv").splitlines()):
        label = f"{row['epochs']} epochs" + f", {row['row']}" * (row["row"] != "the default")
        cells = [
            list_cell([row[column]], digits)
            for column, digits in (("loss", 4), ("frechet", 1), ("pixels", 2))
        ]
        cells += [list_cell([row["doubtful"]], 1, "%"), list_cell([row["mean_pixel"]], 4)]
        assert line(label, *cells) in page, label


def test_learning_rates_of_the_vaes():
    page, conv = read("benchmarks", "README.md"), table("ablation_conv_select.csv")
    for name, dense in table("ablation_dense_select.csv").items():
        label = "one-cycle, up to 4e-3 (dense), 6e-3 (convolutional)" if name == "the default" else name
        start = "the default: " if name == "the default" else "constant "
        cells = list_cell(dense["loss"], 2), list_cell(conv[name]["loss"], 2)
        assert line(start + label, *cells) in page, name


@pytest.mark.parametrize(
    "what, column, digits",
    [("dense", "loss", 2), ("conv", "loss", 2), ("ddpm", "loss", 4), ("ddpm", "frechet", 1)],
)
def test_older_ablations(what, column, digits):
    """Mean and standard deviation of each row, as the page has them, or the log."""
    page = read("benchmarks", "LOG.md" if what == "ddpm" else "README.md")
    for name, values in table(f"ablation_{what}.csv").items():
        if name != "the annex as printed":  # it diverges
            assert f" {mean_cell(values[column], digits)} " in page, name
