"""How many times as fast as the report's are the loader, the training and the sampler? Both run in turn.

python benchmarks/speed.py            all of them, about ten minutes on two cores
python benchmarks/speed.py loader     or dense, conv, ddpm, sampler
"""

import argparse
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.optim import Adam
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common
import conv_vae
import ddpm
import dense_vae


def report_loader(args):
    return DataLoader(MNIST(args.data_dir, transform=ToTensor()), batch_size=128, shuffle=True)


def report_train_vae(model, dataloader, optimizer, device):
    """One epoch of the report's listing (§2.4)."""
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


def time_loader(args, way):
    """Seconds of one pass over the training images."""
    loader = report_loader(args) if way == "report" else common.load_mnist(args.data_dir)[0]
    start = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - start


def time_vae(args, way, script):
    """Seconds of one epoch."""
    model = script.build_vae().to(args.device)
    if way == "report":
        model.to(memory_format=torch.contiguous_format)
        loader, optimizer = report_loader(args), Adam(model.parameters(), lr=1e-3)
        start = time.perf_counter()
        report_train_vae(model, loader, optimizer, args.device)
        return time.perf_counter() - start
    loader, _ = common.load_mnist(args.data_dir, device=args.device)
    options = {"bf16": True} if way == "bf16" else {}
    start = time.perf_counter()
    script.fit(model, loader, 1, 4e-3, **options)
    return time.perf_counter() - start


def time_ddpm(args, way):
    """Seconds of 30 training steps; the report's are float32 in PyTorch's usual memory layout."""
    process = ddpm.build_ddpm(device=args.device)
    if way == "report":
        process.model = process.model.unet.to(memory_format=torch.contiguous_format)
        optimizer = Adam(process.model.parameters(), lr=1e-3)
    else:
        optimizer, _ = ddpm.build_optimizer(process, 1e-3, 100)
    loader, _ = common.load_mnist(args.data_dir, device=args.device, limit=32 * 128)
    for i, (x, _) in enumerate(loader):
        if i == 2:  # after a warm-up
            start = time.perf_counter()
        with torch.autocast(process.device.type, torch.bfloat16, enabled=way == "bf16"):
            loss = process.train_step(2 * x - 1, optimizer)
        if way == "report":
            loss.item()  # in each step, as the listing
    loss.item()  # waits for the GPU
    return time.perf_counter() - start


def time_sampler(args, way):
    """Seconds of 16 images by the report's 1000 steps, or by sample_fast."""
    process = ddpm.build_ddpm(device=args.device)
    start = time.perf_counter()
    images = process.sample(16) if way == "report" else ddpm.sample_fast(process, 16, guide=process.model)[-1]
    images.cpu()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    everything = ["loader", "dense", "conv", "ddpm", "sampler"]
    parser.add_argument("what", nargs="*", default=everything, help="what to measure")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default: 5)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="a torch device"
    )
    parser.add_argument("--data-dir", type=os.path.expanduser, default="data", help="folder (default: data)")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds takes a whole number >= 1")
    if not set(args.what) <= set(everything):
        parser.error(f"argument what: takes {', '.join(everything)}")
    common.load_mnist(args.data_dir)  # there before the first measurement

    for what in args.what:
        ways = ["report", "fp32"]
        if what in ("conv", "ddpm") and conv_vae.has_bf16(args.device):
            ways.append("bf16")
        ratios = {way: [] for way in ways[1:]}
        for _ in range(args.rounds):
            seconds = {}
            for way in ways:
                if what in ("dense", "conv"):
                    seconds[way] = time_vae(args, way, dense_vae if what == "dense" else conv_vae)
                else:
                    measure = {"loader": time_loader, "ddpm": time_ddpm, "sampler": time_sampler}[what]
                    seconds[way] = measure(args, way)
            print(f"{what}: {', '.join(f'{way} {s:.2f} s' for way, s in seconds.items())}", flush=True)
            for way in ways[1:]:
                ratios[way].append(seconds["report"] / seconds[way])
        for way, values in ratios.items():
            spread = f"{min(values):.2f} to {max(values):.2f}"
            print(f"{what}, {way}: {statistics.median(values):.2f} times as fast ({spread})", flush=True)


if __name__ == "__main__":
    main()
