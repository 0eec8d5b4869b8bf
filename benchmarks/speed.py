"""Our loader, training loops and sampler against the report's, in one run, alternating; prints the ratios.

python benchmarks/speed.py            all of it, ten minutes on two cores
python benchmarks/speed.py loader     or dense, conv, ddpm, sampler
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
import ddpm  # noqa: E402
import dense_vae  # noqa: E402

# What is timed, and how: the first way is the report's.
WAYS = {
    "loader": ["plain", "fp32"],  # one pass over the training images
    "dense": ["plain", "fp32"],  # one epoch
    "conv": ["plain", "fp32", "auto"],
    "ddpm": ["plain", "fp32", "auto"],  # 30 steps
    "sampler": ["ddpm", "ddim"],  # 16 images in 1000 steps, in 50
}


def time_loader(args, way):
    loader = make_loader(args, way)
    start = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - start


def make_loader(args, way):
    if way == "plain":
        return DataLoader(MNIST(args.data_dir, transform=ToTensor()), batch_size=128, shuffle=True)
    return common.load_mnist(args.data_dir, 128, args.device)[0]


def time_vae(args, way, script, config):
    loader = make_loader(args, way)
    model = script.build_vae(**config).to(args.device)
    if way == "plain":
        model.to(memory_format=torch.contiguous_format)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        start = time.perf_counter()
        report_epoch(model, loader, optimizer, args.device)
    else:
        options = ["--epochs", "1", "--device", str(args.device)]
        options += ["--precision", way] if script is conv_vae else []
        options = script.parse_args(options)
        start = time.perf_counter()
        script.fit(model, loader, options, verbose=False)
    return time.perf_counter() - start


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


def time_ddpm(args, way):
    """Steps of training; the annex's is float32, in the usual memory format, and reads each loss."""
    model = ddpm.build_unet().to(args.device)
    if way == "plain":
        model.to(memory_format=torch.contiguous_format)
    options = ddpm.parse_args(
        ["--device", str(args.device), "--precision", "fp32" if way == "plain" else way]
    )
    process = ddpm.DDPM(model, device=args.device, bf16=options.precision == "bf16")
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, fused=way != "plain")
    loader, _ = common.load_mnist(args.data_dir, 128, args.device, limit=32 * 128)

    for i, (x, _) in enumerate(loader):
        if i == 2:
            start = time.perf_counter()
        x0 = 2 * x - 1
        if way == "plain":
            t = torch.randint(0, 1000, (len(x0),), device=args.device)
            noise = torch.randn_like(x0)
            optimizer.zero_grad()
            loss = F.mse_loss(model(process.forward_process(x0, t, noise), t), noise)
            loss.backward()
            optimizer.step()
            loss.item()
        else:
            loss = process.train_step(x0, optimizer)
    loss.item()
    return time.perf_counter() - start


def time_sampler(args, way):
    process = ddpm.DDPM(ddpm.build_unet().to(args.device), device=args.device)
    process.sample(16, sampler="ddim", steps=2)
    start = time.perf_counter()
    process.sample(16, sampler=way, steps=50).cpu()
    return time.perf_counter() - start


def measure(args, what, way):
    """Seconds that one way takes."""
    if way != "plain":
        common.keep_freed_memory()  # as common.run does
    if what == "loader":
        return time_loader(args, way)
    if what == "dense":
        return time_vae(args, way, dense_vae, {"latent_dim": 5, "hidden_dims": [256, 512]})
    if what == "conv":
        return time_vae(args, way, conv_vae, {"latent_dim": 10, "channels": [32, 64, 128]})
    return time_ddpm(args, way) if what == "ddpm" else time_sampler(args, way)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="*", default=list(WAYS))
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
        command = [sys.executable, __file__, what, "--data-dir", args.data_dir, "--device", str(args.device)]
        for _ in range(args.rounds):
            outputs = [subprocess.check_output([*command, "--one", way], text=True) for way in WAYS[what]]
            seconds = [float(output.split()[-1]) for output in outputs]
            ratios.append([seconds[0] / s for s in seconds[1:]])
            print(f"{what}: {', '.join(f'{w} {s:.2f} s' for w, s in zip(WAYS[what], seconds))}", flush=True)
        for way, column in zip(WAYS[what][1:], zip(*ratios)):
            spread = f"{min(column):.2f} to {max(column):.2f}"
            print(f"{what}, {way}: {statistics.median(column):.2f} times as fast ({spread})", flush=True)


if __name__ == "__main__":
    main()
