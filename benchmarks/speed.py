"""Our loader and training loops against the plain ones, in one run, alternating; prints the ratios.

python benchmarks/speed.py            all of it, some minutes on two cores
python benchmarks/speed.py loader     or dense, or conv
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common  # noqa: E402
import conv_vae  # noqa: E402
import dense_vae  # noqa: E402


def report_epoch(model, dataloader, optimizer, device):
    """An epoch of the report's listing (§2.4), with its loss."""
    model.train()
    train_loss = 0
    for x, _ in dataloader:
        x = x.to(device)
        optimizer.zero_grad()
        x_recon, mu, logvar = model(x)
        recon_loss = F.binary_cross_entropy(x_recon, x, reduction="sum")
        kl_loss = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        loss = recon_loss + kl_loss
        loss.backward()
        optimizer.step()
        train_loss += loss.item()


CONFIGS = {
    "dense": (dense_vae, {"latent_dim": 5, "hidden_dims": [256, 512]}),
    "conv": (conv_vae, {"latent_dim": 10, "channels": [32, 64, 128]}),
}


def measure(args, what, how):
    """Seconds of one pass, the "plain" way or ours, after a warm-up of the interpreter and the caches."""
    if how == "plain":
        loader = DataLoader(MNIST(args.data_dir, transform=ToTensor()), batch_size=128, shuffle=True)
    else:
        common.keep_freed_memory()  # as common.run does
        loader, _ = common.load_mnist(args.data_dir, 128, args.device)

    if what != "loader":
        script, config = CONFIGS[what]
        model = script.build_vae(**config).to(args.device)
        if how == "plain":
            model.to(memory_format=torch.contiguous_format)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        else:
            options = ["--epochs", "1", "--device", str(args.device)]
            options = script.parse_args(options + (["--precision", how] if what == "conv" else []))

    start = time.perf_counter()
    if what == "loader":
        for _ in loader:
            pass
    elif how == "plain":
        report_epoch(model, loader, optimizer, args.device)
    else:
        script.fit(model, loader, options, verbose=False)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="*", default=["loader", *CONFIGS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=common.device, default="auto")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # one measurement, in a process of its own
    args = parser.parse_args()
    common.load_mnist(args.data_dir)
    if args.one:
        print(measure(args, args.what[0], args.one))
        return

    for what in args.what:
        ratios = []
        ways = ["plain", "fp32", "auto"] if what == "conv" else ["plain", "fp32"]
        for _ in range(args.rounds):
            command = [
                sys.executable,
                __file__,
                what,
                "--device",
                str(args.device),
                "--data-dir",
                args.data_dir,
            ]
            outputs = [subprocess.check_output([*command, way], text=True) for way in ways]
            plain, *ours = map(float, outputs)
            ratios.append([plain / seconds for seconds in ours])
            print(f"{what}: plain {plain:.2f} s, ours {'  '.join(f'{s:.2f} s' for s in ours)}", flush=True)
        for way, column in zip(ways[1:], zip(*ratios)):
            spread = f"{min(column):.2f} to {max(column):.2f}"
            print(f"{what}, {way}: {statistics.median(column):.2f} times as fast ({spread})", flush=True)


if __name__ == "__main__":
    main()
