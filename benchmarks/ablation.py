"""What is each addition to the report's listings worth? The default, each part left out, over several seeds.

python benchmarks/ablation.py ddpm --epochs 3 --seeds 0 1 2
python benchmarks/ablation.py ddpm --select    to choose: train on 50,000 images, measure against the others
python benchmarks/ablation.py dense --seeds 0 1 2 3 4
python benchmarks/ablation.py conv

Each finished row is added to results/ablation/<what>.csv at once, and each network is kept beside it: started
again, the command measures what is missing. Delete the folder after a change of the code or of --num-samples.
"""

import argparse
import contextlib
import csv
import os
import sys
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
from rulers import MEASURES, N_TRAIN, Rulers
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common
import conv_vae
import ddpm
import dense_vae

# ---- The DDPM: how a network is trained, and how its samples are drawn

ANNEX = {"predict": "noise", "he": False, "constant_lr": 1e-3, "clip": False}
DEFAULT = {"predict": "v", "he": True, "constant_lr": None, "clip": True}
ROWS = {
    "the annex as printed": (ANNEX | {"zero_grad": False}, {"guided": False}),
    "the annex with zero_grad": (ANNEX, {"guided": False}),
    "the default": (DEFAULT, {}),
    "without one-cycle, 1e-3": (DEFAULT | {"constant_lr": 1e-3}, {}),
    "without one-cycle, 2e-3": (DEFAULT | {"constant_lr": 2e-3}, {}),
    "without one-cycle, 3e-3": (DEFAULT | {"constant_lr": 3e-3}, {}),
    "without clipping": (DEFAULT | {"clip": False}, {}),
    "without He's weights": (DEFAULT | {"he": False}, {}),
    "without v": (DEFAULT | {"predict": "noise"}, {}),
    "without guidance": (DEFAULT, {"guided": False}),
    "without the midpoint": (DEFAULT, {"midpoint": False}),
    "in float32": (DEFAULT | {"bf16": False}, {}),
    "the annex with zero_grad, 1000 steps": (ANNEX, {"annex": True}),
    "the default, 1000 steps": (DEFAULT, {"annex": True}),
}


def train_ddpm(how, train_loader, epochs, seed, device):
    """Train a DDPM; returns (process, guide)."""
    torch.manual_seed(seed)
    process = ddpm.build_ddpm(1000, how["predict"], device, how["he"])
    optimizer, scheduler = ddpm.build_optimizer(process, 3e-3, epochs * len(train_loader))
    if how["constant_lr"]:
        optimizer.param_groups[0].update(lr=how["constant_lr"], betas=(0.9, 0.999))  # one-cycle has set both
        scheduler = None
    with contextlib.ExitStack() as changes:
        if not how.get("zero_grad", True):
            optimizer.zero_grad = lambda: None
        if not how["clip"]:
            changes.enter_context(mock.patch.object(nn.utils, "clip_grad_norm_", lambda *_: None))
        bf16, guide = how.get("bf16", True) and ddpm.has_bf16(device), None
        with contextlib.suppress(FloatingPointError):  # a network that diverged is measured, too
            for epoch in ddpm.train_ddpm(process, train_loader, optimizer, epochs, scheduler, bf16, seed):
                guide = epoch[2]
    return process, guide


def measure_ddpm(process, guide, sampling, test_loader, rulers, num_samples, seed, bf16):
    """The columns of a row: the held-out loss, and the measures of the samples."""
    guide = guide if sampling.get("guided", True) else None
    midpoint = ddpm.midpoint if sampling.get("midpoint", True) else lambda x0, *_: x0
    torch.manual_seed(seed)
    with (
        torch.autocast(process.device.type, torch.bfloat16, enabled=bf16),
        mock.patch.object(ddpm, "midpoint", midpoint),
    ):
        try:
            loss = ddpm.evaluate(process, test_loader)
        except FloatingPointError:
            loss = np.nan
        images = []
        for batch in tqdm(torch.arange(num_samples).split(100), desc="Samples", leave=False):
            if sampling.get("annex"):
                images.append(process.sample(len(batch)).cpu())
            else:
                images.append(ddpm.to_pixels(ddpm.sample_fast(process, len(batch), guide=guide)[-1]).cpu())
    images = torch.cat(images)
    measured = dict.fromkeys(MEASURES, np.nan)
    if images.isfinite().all():
        measured = rulers.measure(images)
    return {"loss": loss, "samples": num_samples} | measured


def ablate_ddpm(args, loaders, table):
    """Train and measure the missing rows, seed by seed."""
    train, test = (loader.dataset.tensors[0].cpu() / 255 for loader in loaders)
    rulers, checksum = Rulers(train, test, args.device), common.checksum(loaders[0].dataset.tensors[0])
    for seed in args.seeds:
        for name, (how, sampling) in ROWS.items():
            if table.has(name, seed) or (args.rows and name not in args.rows):
                continue
            file_name = "-".join(map(str, [*how.values(), args.epochs, checksum, seed])) + ".pt"
            path = os.path.join(args.save_dir, file_name)  # rows with one training share it
            if os.path.exists(path):
                process, guide = ddpm.load(path, args.device)
            else:
                process, guide = train_ddpm(how, loaders[0], args.epochs, seed, args.device)
                process.options = {"timesteps": 1000, "predict": how["predict"], "annex": False}
                process.options |= {"limit": len(train), "images_crc32": checksum}
                process.losses, process.seconds = [], 0.0
                ddpm.save(path, process, guide)
            num_samples = min(args.num_samples, 1000) if sampling.get("annex") else args.num_samples
            bf16 = how.get("bf16", True) and ddpm.has_bf16(args.device)
            columns = measure_ddpm(process, guide, sampling, loaders[1], rulers, num_samples, seed, bf16)
            table.add(name, seed, columns)


# ---- The VAEs: the default, against Adam at a constant rate


def ablate_vae(args, loaders, table, script):
    """Train and measure the missing rows, seed by seed."""
    defaults = script.parse_args(["--device", args.device])
    options = {"bf16": defaults.bf16} if script is conv_vae else {}
    for seed in args.seeds:
        for name, lr in ("the default", None), ("1e-3", 1e-3), ("2e-3", 2e-3), ("4e-3", 4e-3):
            if table.has(name, seed):
                continue
            torch.manual_seed(seed)
            vae = script.build_vae(device=args.device)
            if lr is None:
                script.fit(vae, loaders[0], args.epochs, defaults.lr, **options)
            else:
                optimizer = torch.optim.Adam(vae.parameters(), lr=lr, fused=True)
                script.train_vae(vae, loaders[0], optimizer, args.epochs, **options)
            torch.manual_seed(seed)
            bce, kl = common.evaluate(vae, loaders[1])
            table.add(name, seed, {"loss": bce + kl, "bce": bce, "kl": kl})


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
        """Lines of text: mean and standard deviation of each row, and of its difference to the default's."""
        rows, lines = {(row["row"], row["seed"]): row for row in self.of_epochs()}, []
        for name in dict.fromkeys(name for name, _ in rows):
            of_name = [row for row in rows.values() if row["row"] == name]
            pairs = [(row, rows.get(("the default", row["seed"]))) for row in of_name]
            lines.append(f"{name} ({len(of_name)} seeds)")
            for column in list(of_name[0])[3:]:
                mean = spread([float(row[column]) for row in of_name])
                change = spread(
                    [float(row[column]) - float(default[column]) for row, default in pairs if default]
                )
                lines.append(f"    {column}: {mean}; minus the default: {change}")
        return lines


def spread(values):
    """Mean ± standard deviation."""
    sd = np.std(values, ddof=1) if len(values) > 1 else np.nan
    return f"{np.mean(values):.4g} ± {sd:.2g}" if values else "-"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("what", choices=["ddpm", "dense", "conv"], help="what to measure")
    add("--epochs", type=int, help="of each training (default: 3 of the DDPM, 10 of the VAEs)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--rows", nargs="+", choices=list(ROWS), help="rows of the DDPM (default: all)")
    add("--num-samples", type=int, default=2000, help="samples of each DDPM (default: 2000)")
    add("--select", action="store_true", help="train on 50,000 images, measure against the other 10,000")
    add("--device", default=device, help="a torch device")
    add("--data-dir", type=os.path.expanduser, default="data", help="folder of MNIST (default: data)")
    add("--save-dir", type=os.path.expanduser, default="results/ablation", help="default: results/ablation")
    args = parser.parse_args(argv)
    if args.epochs is None:
        args.epochs = 3 if args.what == "ddpm" else 10
    if args.epochs < 1 or args.num_samples < 100:
        parser.error("--epochs takes a whole number >= 1, --num-samples >= 100")
    os.makedirs(args.save_dir, exist_ok=True)
    loaders = common.load_mnist(args.data_dir, device=args.device)
    if args.select:
        images, labels = loaders[0].dataset.tensors
        loaders = (
            common.MNISTLoader(images[:N_TRAIN], labels[:N_TRAIN], 128, shuffle=True),
            common.MNISTLoader(images[N_TRAIN:], labels[N_TRAIN:], 128, shuffle=False),
        )
    name = args.what + ("-select" if args.select else "")
    table = Table(os.path.join(args.save_dir, f"{name}.csv"), args.epochs)
    if args.what == "ddpm":
        ablate_ddpm(args, loaders, table)
    else:
        ablate_vae(args, loaders, table, dense_vae if args.what == "dense" else conv_vae)
    print("\n".join(table.summary()))


if __name__ == "__main__":
    try:
        main()
    except (OSError, FloatingPointError, KeyboardInterrupt) as error:
        sys.exit(f"ablation.py: {str(error) or 'interrupted'}")
