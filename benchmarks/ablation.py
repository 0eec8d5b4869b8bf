"""What is each addition to the report's listings worth? One change a row, over several seeds.

python benchmarks/ablation.py ddpm --epochs 3 --seeds 0 1 2
python benchmarks/ablation.py dense --seeds 0 1 2 3 4
python benchmarks/ablation.py conv

Each finished row is added to results/ablation/<what>.csv at once, and is not measured again when the command
is started again: delete the folder after a change of the code or of --num-samples.
"""

import argparse
import copy
import csv
import os
import sys
import time
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
from compare import classify, frechet, train_classifier
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common
import conv_vae
import ddpm
import dense_vae
from common import plt

# ---- The DDPM: from the annex to the default, each row with what it changes in the row above

ANNEX = {
    "zero_grad": False,
    "one_cycle": False,
    "clip": False,
    "he": False,
    "predict": "noise",
    "bf16": True,  # where the hardware has it
}
WALK = [
    ("the annex as printed", {}),
    ("+ zero_grad", {"zero_grad": True}),
    ("+ one-cycle to 3e-3", {"one_cycle": True}),
    ("+ clipping", {"clip": True}),
    ("+ He's weights, zero last layer", {"he": True}),
    ("+ v", {"predict": "v"}),
    ("+ guidance", {}),
    ("+ guidance, but float32", {"bf16": False}),
]


def build_process(how, device):
    """An untrained DDPM."""
    process = ddpm.build_ddpm(1000, how["predict"], device)
    if not how["he"]:
        for module in process.model.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()
    return process


def train_ddpm(how, train_loader, epochs, seed, device):
    """Train a DDPM; returns the states of its model and its guiding model, and the seconds of an epoch."""
    torch.manual_seed(seed)
    process, scheduler = build_process(how, device), None
    lr = 3e-3 if how["one_cycle"] else 1e-3
    optimizer = Adam(process.model.parameters(), lr=lr, fused=True)
    if how["one_cycle"]:
        scheduler = OneCycleLR(optimizer, max_lr=lr, total_steps=epochs * len(train_loader))
    if not how["zero_grad"]:
        optimizer.zero_grad = lambda: None
    clip = nn.utils.clip_grad_norm_ if how["clip"] else lambda *_: None
    bf16, seconds = how["bf16"] and ddpm.has_bf16(device), []
    for epoch in range(epochs):
        torch.manual_seed(10_000 * seed + epoch + 1)
        start = time.perf_counter()
        with mock.patch.object(nn.utils, "clip_grad_norm_", clip):
            ddpm.train_epoch(process, train_loader, optimizer, scheduler, bf16)
        seconds.append(time.perf_counter() - start)
        if epoch == 0:  # as ddpm.fit does, from 2 to 17 epochs
            guide = copy.deepcopy(process.model.state_dict())
    saved = {"model": process.model.state_dict(), "guide": guide}
    return saved | {"seconds": min(seconds)}  # the fastest epoch, as machines are shared


def measure_ddpm(how, saved, guided, test_loader, classifier, real, num_samples, seed, device):
    """The columns of a row; frechet and doubtful are those of samples of sample_fast."""
    process, guide = build_process(how, device), None
    process.model.load_state_dict(saved["model"])
    if guided:
        guide = copy.deepcopy(process.model)
        guide.load_state_dict(saved["guide"])
    torch.manual_seed(seed)
    with torch.autocast(process.device.type, torch.bfloat16, enabled=how["bf16"] and ddpm.has_bf16(device)):
        try:
            loss = ddpm.evaluate(process, test_loader)
        except FloatingPointError:
            loss = np.nan
        batches = tqdm(torch.arange(num_samples).split(100), desc="Samples", leave=False)
        xs = [ddpm.sample_fast(process, len(batch), guide=guide)[-1] for batch in batches]
    pixels, distance, doubtful = ddpm.to_pixels(torch.cat(xs)), np.nan, np.nan
    if pixels.isfinite().all():
        features, probabilities = classify(classifier, pixels)
        distance = frechet(features, real)
        doubtful = (probabilities.amax(1) < 0.9).float().mean().item()
    return {"loss": loss, "frechet": distance, "doubtful": doubtful, "seconds": saved["seconds"]}


def ablate_ddpm(args, loaders, table):
    """Train and measure the missing rows, seed by seed."""
    torch.manual_seed(0)
    classifier = train_classifier(loaders[0], args.device)
    real, _ = classify(classifier, torch.cat([x for x, _ in loaders[1]]))
    for seed in args.seeds:
        how = ANNEX
        for name, change in WALK:
            how = how | change
            if table.has(name, seed):
                continue
            file_name = "-".join(map(str, [*how.values(), args.epochs, args.limit, seed])) + ".pt"
            path = os.path.join(args.save_dir, file_name)  # rows with one training share it
            if not os.path.exists(path):
                torch.save(train_ddpm(how, loaders[0], args.epochs, seed, args.device), path)
            saved = torch.load(path, map_location="cpu", weights_only=True)
            sampling = classifier, real, args.num_samples, seed, args.device
            table.add(name, seed, measure_ddpm(how, saved, "guidance" in name, loaders[1], *sampling))


# ---- The VAEs: from the listing's loop with Adam to the default

VAE_WALK = [
    ("Adam at 1e-3", {"one_cycle": False, "beta2": 0.999, "bf16": True}),  # where the hardware has it
    ("+ one-cycle to the default --lr", {"one_cycle": True}),
    ("+ beta2 0.99", {"beta2": 0.99}),
    ("+ beta2 0.99, but float32", {"bf16": False}),
]


def ablate_vae(args, loaders, table, script):
    """Train and measure the missing rows, seed by seed."""
    defaults = script.parse_args([])
    for seed in args.seeds:
        how = {}
        for name, change in VAE_WALK:
            how = how | change
            if table.has(name, seed) or (not how["bf16"] and script is dense_vae):  # it has no bfloat16
                continue
            torch.manual_seed(seed)
            vae, scheduler = script.build_vae(device=args.device), None
            lr = defaults.lr if how["one_cycle"] else 1e-3
            optimizer = Adam(vae.parameters(), lr=lr, betas=(0.9, how["beta2"]), fused=True)
            if how["one_cycle"]:
                scheduler = OneCycleLR(optimizer, max_lr=lr, total_steps=args.epochs * len(loaders[0]))
            bf16 = how["bf16"] and conv_vae.has_bf16(args.device)
            options = {"bf16": bf16} if script is conv_vae else {}
            start = time.perf_counter()
            script.train_vae(vae, loaders[0], optimizer, args.epochs, scheduler=scheduler, **options)
            seconds = (time.perf_counter() - start) / args.epochs
            torch.manual_seed(seed)
            bce, kl = common.evaluate(vae, loaders[1])
            table.add(name, seed, {"loss": bce + kl, "bce": bce, "kl": kl, "seconds": seconds})


# ---- The table


class Table:
    """The rows measured so far, a dictionary each, in a CSV file that grows by a row at a time."""

    def __init__(self, path, epochs):
        self.path, self.epochs, self.rows = path, epochs, []
        if os.path.exists(path):
            with open(path, newline="") as f:
                self.rows = list(csv.DictReader(f))

    def of_epochs(self):
        """The rows with these epochs."""
        return [row for row in self.rows if row["epochs"] == str(self.epochs)]

    def has(self, name, seed):
        return any((row["row"], row["seed"]) == (name, str(seed)) for row in self.of_epochs())

    def add(self, name, seed, columns):
        row = {"row": name, "seed": str(seed), "epochs": str(self.epochs)}
        row |= {key: f"{value:.5g}" for key, value in columns.items()}
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        with open(self.path, "a", newline="") as f:
            writer = csv.DictWriter(f, list(row))
            if not self.rows:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append(row)

    def summary(self):
        """{name: {column: (mean, standard deviation over the seeds)}} of the rows with these epochs."""
        result, rows = {}, self.of_epochs()
        for name in dict.fromkeys(row["row"] for row in rows):
            of_name = [row for row in rows if row["row"] == name]
            result[name] = {}
            for column in list(of_name[0])[3:]:
                values = np.array([float(row[column]) for row in of_name])
                result[name][column] = values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0
        return result


def plot_walk(rows, save_dir):
    """Draw the Fréchet distance from row to row of the walk, a point for each seed."""
    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    names = [name for name, _ in WALK if any(row["row"] == name for row in rows)]
    for seed in dict.fromkeys(row["seed"] for row in rows):
        points = [(names.index(row["row"]), float(row["frechet"])) for row in rows if row["seed"] == seed]
        ax.plot(*zip(*sorted(points)), "o-", label=f"seed {seed}", alpha=0.7)
    half_way_up = {"y": 0.5, "va": "center", "transform": ax.get_xaxis_transform()}
    for x, name in enumerate(names):
        if all(row["frechet"] == "nan" for row in rows if row["row"] == name):
            ax.text(x, s="samples not finite", rotation=90, **half_way_up)
    ax.set_yscale("log")
    ax.set_xlim(-0.5, len(names) - 0.5)
    ax.set_xticks(range(len(names)), names, rotation=25, ha="right")
    ax.yaxis.set_minor_formatter("{x:.0f}")
    ax.yaxis.set_major_formatter("{x:.0f}")
    ax.set_ylabel("Fréchet distance")
    ax.set_title("From the report's annex to the default DDPM")
    ax.grid(axis="y", which="both", alpha=0.3)
    ax.legend()
    common.save_figure(fig, save_dir, "ablation.png")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("what", choices=["ddpm", "dense", "conv"], help="what to measure")
    add("--epochs", type=int, help="of each training (default: 3 of the DDPM, 10 of the VAEs)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--num-samples", type=int, default=2000, help="samples of each DDPM (default: 2000)")
    add("--limit", type=int, help="train on the first LIMIT images only")
    add("--device", default=device, help="a torch device")
    add("--data-dir", type=os.path.expanduser, default="data", help="folder of MNIST (default: data)")
    add("--save-dir", type=os.path.expanduser, default="results/ablation", help="default: results/ablation")
    args = parser.parse_args(argv)
    if args.epochs is None:
        args.epochs = 3 if args.what == "ddpm" else 10
    if min(args.epochs, args.num_samples) < 1:
        parser.error("--epochs and --num-samples take whole numbers >= 1")
    os.makedirs(args.save_dir, exist_ok=True)
    loaders = common.load_mnist(args.data_dir, device=args.device, limit=args.limit)
    name = args.what if args.limit is None else f"{args.what}-limit{args.limit}"
    table = Table(os.path.join(args.save_dir, f"{name}.csv"), args.epochs)
    if args.what == "ddpm":
        ablate_ddpm(args, loaders, table)
        plot_walk([row for row in table.of_epochs() if "float32" not in row["row"]], args.save_dir)
    else:
        ablate_vae(args, loaders, table, dense_vae if args.what == "dense" else conv_vae)
    for name, columns in table.summary().items():
        values = (f"{column} {mean:.4g} ± {sd:.2g}" for column, (mean, sd) in columns.items())
        print(f"{name}: {', '.join(values)}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, FloatingPointError) as error:
        sys.exit(f"ablation.py: {error}")
    except KeyboardInterrupt:
        sys.exit("ablation.py: interrupted (start it again to measure what is missing)")
