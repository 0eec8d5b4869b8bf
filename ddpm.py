"""The DDPM of the report's section 5 and annex, on MNIST (Ho, Jain & Abbeel, 2020).

    python ddpm.py                                              train, draw the report's figure 4
    python ddpm.py --resume                                     go on after an interruption
    python ddpm.py --load results/ddpm/ddpm.pt --sampler ddpm   sample with the report's 1000 steps

Losses, quality and speed of the samples, and the commands that gave them: README.md.
"""

import copy
import math
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common


class SinusoidalPositionEmbeddings(nn.Module):
    """t, (B,) -> (B, dim): sines, then cosines, of t at dim / 2 frequencies from 1 down to 1 / 10000."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, time):
        half_dim = self.dim // 2
        embeddings = math.log(10000) / (half_dim - 1)  # NumPy's log would make it float64 when compiled
        embeddings = torch.exp(torch.arange(half_dim, device=time.device) * -embeddings)
        embeddings = time[:, None] * embeddings[None, :]
        return torch.cat((embeddings.sin(), embeddings.cos()), dim=-1)


class SimpleBlock(nn.Module):
    """(B, in_channels, H, W) and the embedding of t -> (B, out_channels, H, W)."""

    def __init__(self, in_channels, out_channels, time_emb_dim):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.time_mlp = nn.Linear(time_emb_dim, out_channels)

    def forward(self, x, t_emb):
        h = F.silu(self.conv1(x))
        h = h + self.time_mlp(t_emb)[:, :, None, None]
        return F.silu(self.conv2(h))


class SimpleMNistUNet(nn.Module):
    """x_t, (B, 1, 28, 28), and t, (B,) -> the noise in x_t, (B, 1, 28, 28) (report, annex)."""

    def __init__(self, in_channels=1, out_channels=1, time_emb_dim=64):
        super().__init__()
        self.time_mlp = nn.Sequential(
            SinusoidalPositionEmbeddings(time_emb_dim),
            nn.Linear(time_emb_dim, time_emb_dim),
            nn.SiLU(),
            nn.Linear(time_emb_dim, time_emb_dim),
        )
        self.enc1 = SimpleBlock(in_channels, 32, time_emb_dim)
        self.enc2 = SimpleBlock(32, 64, time_emb_dim)
        self.enc3 = SimpleBlock(64, 128, time_emb_dim)

        self.bottleneck = SimpleBlock(128, 256, time_emb_dim)

        self.up1 = nn.ConvTranspose2d(256, 128, 4, stride=2, padding=1)
        self.dec1 = SimpleBlock(256, 128, time_emb_dim)

        self.up2 = nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1)
        self.dec2 = SimpleBlock(128, 64, time_emb_dim)

        self.up3 = nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1)
        self.dec3 = SimpleBlock(64, 32, time_emb_dim)

        self.final_conv = nn.Conv2d(32, out_channels, 3, padding=1)

    def forward(self, x, t):
        t_emb = self.time_mlp(t)

        x1 = self.enc1(x, t_emb)  # (B, 32, 28, 28)
        x2 = self.enc2(F.max_pool2d(x1, 2), t_emb)  # (B, 64, 14, 14)
        x3 = self.enc3(F.max_pool2d(x2, 2), t_emb)  # (B, 128, 7, 7)

        x = self.bottleneck(F.max_pool2d(x3, 2), t_emb)  # (B, 256, 3, 3)

        for up, dec, skip in (self.up1, self.dec1, x3), (self.up2, self.dec2, x2), (self.up3, self.dec3, x1):
            x = up(x)
            if x.shape[2:] != skip.shape[2:]:  # 6x6 for 7x7
                x = F.interpolate(x, size=skip.shape[2:], mode="nearest")
            x = dec(torch.cat([x, skip], dim=1), t_emb)

        return self.final_conv(x)


class DDPM:
    """The diffusion process of a noise-predicting `model` (report, annex; Ho et al., 2020, section 3).

    Time runs from 0, a little noise, to timesteps - 1, noise alone. Images are (B, 1, H, W) in [-1, 1].
    With predict="v" the model's output is v, as in Salimans & Ho (2022), and the noise is worked out from it.
    `weak` is the same network after less training, which guides `model` in sampling.
    """

    def __init__(
        self,
        model,
        timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        device="cuda",
        bf16=False,
        predict="noise",
        weak=None,
    ):
        self.model = model
        self.timesteps = timesteps
        self.device = torch.device(device)
        self.bf16 = bf16
        self.predict = predict
        self.weak = weak

        self.betas = torch.linspace(beta_start, beta_end, timesteps, device=device)
        self.alphas = 1.0 - self.betas
        self.alpha_bars = torch.cumprod(self.alphas, dim=0)

        print(f"Beta schedule: {beta_start} -> {beta_end}")
        print(f"Alpha bars: {self.alpha_bars[0]:.3f} -> {self.alpha_bars[-1]:.3f}")
        print(f"Nombre de timesteps: {timesteps}")

    def predict_noise(self, x, t, model=None):
        """The noise in x_t, (B, 1, H, W), from the noise or v of `model`, self.model by default, t (B,).

        v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0 (Salimans & Ho, 2022, appendix D). Where x_t is
        nearly noise alone, x_t is already nearly the answer, and an error in v counts for little.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            prediction = (model or self.model)(x, t).float()
        if self.predict == "noise":
            return prediction
        alpha_bar_t = self.alpha_bars[t].view(-1, 1, 1, 1)
        return torch.sqrt(1 - alpha_bar_t) * x + torch.sqrt(alpha_bar_t) * prediction

    def forward_process(self, x0, t, noise=None):
        """A sample of q(x_t | x_0), t (B,), with the noise given (Ho et al., eq. 4)."""
        if noise is None:
            noise = torch.randn_like(x0)
        t = torch.clamp(t, 0, self.timesteps - 1)
        alpha_bar_t = self.alpha_bars[t].view(-1, 1, 1, 1)
        return torch.sqrt(alpha_bar_t) * x0 + torch.sqrt(1 - alpha_bar_t) * noise

    def reverse_process(self, x, t):
        """A sample of p(x_{t-1} | x_t), t (B,), of variance beta_t (Ho et al., eq. 11 and algorithm 2)."""
        t = torch.clamp(t, 0, self.timesteps - 1)
        pred_noise = self.predict_noise(x, t)
        alpha_t = self.alphas[t].view(-1, 1, 1, 1)
        alpha_bar_t = self.alpha_bars[t].view(-1, 1, 1, 1)
        beta_t = self.betas[t].view(-1, 1, 1, 1)

        mean = (x - beta_t * pred_noise / torch.sqrt(1 - alpha_bar_t)) / torch.sqrt(alpha_t)
        noise = torch.randn_like(x) * (t > 0).view(-1, 1, 1, 1)  # none at t = 0, where the mean is x_0
        return mean + torch.sqrt(beta_t) * noise

    def predict_x0(self, x, t, guidance=1.0):
        """The x_0 that x_t and the predicted noise make (Ho et al., eq. 15).

        A guidance above 1 goes on past the network's noise, in the direction that more training has taken it
        from the weak network's: autoguidance (Karras et al., 2024).
        """
        noise = self.predict_noise(x, t)
        if guidance != 1.0:
            noise = torch.lerp(self.predict_noise(x, t, self.weak), noise, guidance)
        alpha_bar_t = self.alpha_bars[t].view(-1, 1, 1, 1)
        return (x - torch.sqrt(1 - alpha_bar_t) * noise) / torch.sqrt(alpha_bar_t)

    def ddim_process(self, x, t, t_prev, eta=1.0, x0=None):
        """From x_t to x_{t_prev}, both (B,); t_prev = -1 stands for x_0 (Song et al., 2021, eq. 12 and 16).

        eta=0 is deterministic; eta=1 has the variance of the DDPM's posterior. `x0` is the network's at t, if
        no better estimate is given.
        """
        x0 = self.predict_x0(x, t) if x0 is None else x0
        alpha_bar_t = self.alpha_bars[t].view(-1, 1, 1, 1)
        alpha_bar_prev = torch.where(t_prev >= 0, self.alpha_bars[t_prev], 1.0).view(-1, 1, 1, 1)

        pred_noise = (x - torch.sqrt(alpha_bar_t) * x0) / torch.sqrt(1 - alpha_bar_t)
        variance = eta**2 * (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)
        mean = torch.sqrt(alpha_bar_prev) * x0 + torch.sqrt(1 - alpha_bar_prev - variance) * pred_noise
        return mean + torch.sqrt(variance) * torch.randn_like(x)

    def loss(self, x0):
        """The squared error of the noise predicted at a random t for each image (Ho et al., eq. 14)."""
        t = torch.randint(0, self.timesteps, (x0.shape[0],), device=self.device)
        noise = torch.randn_like(x0)
        x_t = self.forward_process(x0, t, noise)
        return F.mse_loss(self.predict_noise(x_t, t), noise)

    def train_step(self, x0, optimizer):
        """One step on a batch; returns its loss, left on the device (Ho et al., algorithm 1)."""
        self.model.train()
        optimizer.zero_grad()  # missing in the listing, where the gradients of all the steps add up
        loss = self.loss(x0)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    @torch.inference_mode()
    def sample(
        self,
        num_samples=16,
        image_size=(28, 28),
        sampler="ddpm",
        steps=50,
        eta=1.0,
        guidance=1.0,
        history=None,
    ):
        """`num_samples` images in [0, 1], by all the time steps ("ddpm") or by `steps` ("ddim", "dpm++").

        "ddim" keeps to the network's x_0 throughout a step. "dpm++" extends the line through the last two to
        the middle of the step, in log(SNR) / 2: the second-order DPM-Solver++(2M), at eta=1 its SDE form (Lu
        et al., 2022). The guidance of both is limited to the middle of the way, where the digit takes shape
        (Kynkäänniemi et al., 2024). A list given as `history` receives x_t, from noise alone to x_0.
        """
        self.model.eval()
        x = torch.randn(num_samples, 1, *image_size, device=self.device)
        steps = self.timesteps if sampler == "ddpm" else steps
        u = torch.linspace(1, 0, steps, device=self.device)
        times = ((steps - 1) * u + (self.timesteps - steps) * u**2).round().long()  # closer near x_0
        lengths = torch.diff(0.5 * torch.log(self.alpha_bars / (1 - self.alpha_bars))[times])
        guided = (times >= 0.2 * self.timesteps) & (times < 0.6 * self.timesteps)
        guidances = torch.where(guided, guidance, 1.0).tolist()
        times = torch.cat([times, times.new_tensor([-1])])[:, None].expand(-1, num_samples)
        history = [] if history is None else history
        history.append(x)
        x0_last = None
        for i in tqdm(range(steps), desc="Génération", leave=False, disable=None):
            if sampler == "ddpm":
                x = self.reverse_process(x, times[i])
            else:
                x0 = x0_middle = self.predict_x0(x, times[i], guidances[i])
                if sampler == "dpm++" and 0 < i < steps - 1:  # the last step ends at no noise: no middle
                    x0_middle = x0 + lengths[i] / (2 * lengths[i - 1]) * (x0 - x0_last)
                x = self.ddim_process(x, times[i], times[i + 1], eta, x0_middle)
                x0_last = x0
            history.append(x)
        return (torch.clamp(x, -1.0, 1.0) + 1.0) / 2.0


def build_unet():
    """The U-Net with He et al. (2015)'s weights, which keep the signal's size from layer to layer.

    PyTorch's own shrink it at each, and the report's network has no normalisation that would mend it.
    """
    model = SimpleMNistUNet()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.ConvTranspose2d):  # of its 4x4 weights, 2x2 reach each pixel
            nn.init.normal_(module.weight, std=(module.in_channels * 4) ** -0.5)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(model.final_conv.weight)
    return model.to(memory_format=torch.channels_last)  # what convolutions are fastest on


def build_models():
    """The network, and the weak one that guides it in sampling: a copy from the start of its training."""
    model = build_unet()
    return nn.ModuleDict({"model": model, "weak": copy.deepcopy(model)})


@torch.no_grad()
def update_average(average, model, step):
    """Move `average` towards the weights of step 1, 2, ...; over some 1000 steps, over fewer at the start."""
    decay = min(0.999, (1 + step) / (10 + step))
    for p_average, p in zip(average.parameters(), model.parameters()):
        p_average.lerp_(p, 1 - decay)


def train(ddpm, dataloader, optimizer, scheduler, average, num_epochs, first_epoch=0, save=None):
    """The epochs from `first_epoch` on; calls `save(epochs done)` after each. FloatingPointError on NaN."""
    for epoch in range(first_epoch, num_epochs):
        train_loss = torch.zeros((), device=ddpm.device)
        for x, _ in tqdm(dataloader, f"Epoch {epoch + 1}", leave=False, disable=None):
            x0 = 2.0 * x.to(ddpm.device) - 1.0
            train_loss += ddpm.train_step(x0, optimizer)
            scheduler.step()
            update_average(average, ddpm.model, scheduler.last_epoch)
        avg_loss = train_loss.item() / len(dataloader)
        if not math.isfinite(avg_loss):
            raise FloatingPointError(f"the loss is {avg_loss} in epoch {epoch + 1}: try a smaller --lr")
        if save is not None:
            save(epoch + 1)
        print(f"Epoch [{epoch + 1}/{num_epochs}] Average loss: {avg_loss:.4f}", flush=True)


@torch.inference_mode()
def evaluate(ddpm, data_loader):
    """The mean squared error of the predicted noise, each image at a time step drawn for it."""
    ddpm.model.eval()
    loss = 0.0
    for x, _ in data_loader:
        loss += ddpm.loss(2.0 * x.to(ddpm.device) - 1.0).item() * len(x)
    return loss / len(data_loader.dataset)


def fit(ddpm, train_loader, args):
    """Train as the command line says, a checkpoint after each epoch; leave the average of the weights.

    ddpm.weak has the average of the first epoch.

    Adam under the one-cycle policy of Smith & Topin (2017): the learning rate goes up to args.lr and down
    to 0, the momentum from 0.95 to 0.85 and back.
    """
    model, weak = ddpm.model, ddpm.weak
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.99), fused=True)
    total_steps = args.epochs * len(train_loader)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=total_steps)
    average = copy.deepcopy(model)

    path = os.path.join(args.save_dir, "checkpoint.pt")
    names = "epochs", "batch_size", "lr", "seed", "timesteps", "predict", "precision", "limit"
    settings = {name: getattr(args, name) for name in names}
    parts = {"model": model, "average": average, "weak": weak, "optimizer": optimizer, "scheduler": scheduler}
    on_gpu = args.device.type == "cuda"
    epochs_done = 0

    def save(epoch):
        nonlocal epochs_done
        if epoch == 1:
            weak.load_state_dict(average.state_dict())
        checkpoint = {name: part.state_dict() for name, part in parts.items()}
        checkpoint |= {"settings": settings, "epoch": epoch, "random": torch.get_rng_state()}
        if on_gpu:
            checkpoint["gpu_random"] = torch.cuda.get_rng_state(args.device)
        with common.replacing(path) as tmp:
            torch.save(checkpoint, tmp)
        epochs_done = epoch

    if args.resume:
        checkpoint = load_checkpoint(path, settings)
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        epochs_done = checkpoint["epoch"]
        torch.set_rng_state(checkpoint["random"])
        if on_gpu and "gpu_random" in checkpoint:
            torch.cuda.set_rng_state(checkpoint["gpu_random"], args.device)
        print(f"Going on after epoch {epochs_done}")
    try:
        train(ddpm, train_loader, optimizer, scheduler, average, args.epochs, epochs_done, save)
    except KeyboardInterrupt:
        if not epochs_done:
            raise
        message = f"interrupted: the same command with --resume goes on after epoch {epochs_done}"
        raise KeyboardInterrupt(message) from None
    model.load_state_dict(average.state_dict())


def load_checkpoint(path, settings):
    """The checkpoint, on the CPU. OSError if it is missing, damaged, or one of other settings."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        saved = dict(checkpoint["settings"])
    except FileNotFoundError:
        raise OSError(f"there is no {path} to resume: train without --resume") from None
    except Exception as error:  # a foreign file can fail in any way
        raise OSError(f"{path} is damaged, or no checkpoint: train without --resume") from error
    for name, value in settings.items():
        if saved.get(name) != value:
            option = "--" + name.replace("_", "-")
            raise OSError(
                f"{path} was made with {option} {saved.get(name)}, not {value}: it can't be resumed so"
            )
    return checkpoint


def plot_samples(ddpm, test_loader, args):
    """The report's figure 4: a digit's way to noise, noise's way to digits, and a sheet of samples."""
    how = {"sampler": args.sampler, "steps": args.sample_steps, "eta": args.eta, "guidance": args.guidance}

    times = torch.linspace(0, ddpm.timesteps - 1, 10).round().long().to(args.device)
    x0 = 2.0 * next(iter(test_loader))[0][:1].to(args.device) - 1.0
    x_t = ddpm.forward_process(x0.expand(10, -1, -1, -1), times)
    fig = common.plot_images((x_t + 1) / 2, 1, 10, (10, 1.7), "Évolution du chiffre vers le bruit")
    for ax, t in zip(fig.axes, times.tolist()):
        ax.set_title(f"t={t}", fontsize=9)
    common.save_figure(fig, args.save_dir, "noising.png")

    history = []
    ddpm.sample(6, history=history, **how)
    stages = torch.linspace(0, len(history) - 1, 10).round().long().tolist()
    images = torch.stack([history[i] for i in stages], dim=1).flatten(0, 1)  # (6 * 10, 1, 28, 28)
    fig = common.plot_images((images + 1) / 2, 6, 10, (10, 6.3), "Évolution du bruit vers le chiffre")
    common.save_figure(fig, args.save_dir, "denoising.png")

    images = ddpm.sample(64, **how)
    fig = common.plot_images(images, 8, 8, (8, 8), "Exemples de chiffres MNIST générés par le modèle DDPM")
    common.save_figure(fig, args.save_dir, "samples.png")

    if args.num_samples:
        counts = [len(chunk) for chunk in torch.arange(args.num_samples).split(500)]
        images = torch.cat([ddpm.sample(n, **how).cpu() for n in counts])
        path = os.path.join(args.save_dir, "samples.npy")
        with common.replacing(path) as tmp, open(tmp, "wb") as f:
            np.save(f, images.numpy())
        print(f"Samples saved: {path}")


def parse_args(argv=None):
    parser = common.ArgumentParser(description="Train the report's DDPM and draw its figures.")
    add = parser.add_argument
    add("--epochs", type=common.positive_int, default=12, help="passes over the training images")
    add("--batch-size", type=common.positive_int, default=128, help="images in a step")
    add("--lr", type=common.positive_float, default=3e-3, help="peak learning rate")
    add("--seed", type=common.seed, default=0, help="seed of the weights, the batches and the samples")
    add("--timesteps", type=common.positive_int, default=1000, help="steps from an image to noise")
    add("--predict", choices=["v", "noise"], default="v", help="what the network is to predict")
    sampler = "dpm++ is ddim of the second order; ddpm takes all the steps"
    add("--sampler", choices=["dpm++", "ddim", "ddpm"], default="dpm++", help=sampler)
    add("--sample-steps", type=common.positive_int, default=30, help="steps of dpm++ and ddim")
    add("--eta", type=common.nonnegative_float, default=1.0, help="their noise: none at 0, the ddpm's at 1")
    guidance = "how far they go beyond a network of less training: 1 is none"
    add("--guidance", type=common.nonnegative_float, default=1.5, help=guidance)
    add("--num-samples", type=common.positive_int, metavar="N", help="write N samples to samples.npy too")
    precision = "bf16 is faster where the hardware has it; auto takes it there"
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help=precision)
    add("--device", type=common.device, default="auto", help="auto is cuda, else mps, else cpu")
    add("--data-dir", default="data", help="where MNIST is, or is put")
    add("--save-dir", default="results/ddpm", help="where the model and the figures go")
    add("--limit", type=common.positive_int, default=60000, metavar="N", help="train on the first N images")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="go on from the last epoch's checkpoint")
    mode.add_argument("--load", metavar="PATH", help="no training: draw the figures from a saved model")
    args = parser.parse_args(argv)
    if args.sampler != "ddpm" and args.sample_steps > args.timesteps:
        parser.error(
            f"argument --sample-steps: takes 1 to --timesteps ({args.timesteps}), not {args.sample_steps}"
        )
    for name, most in ("eta", 1), ("guidance", 100):
        if getattr(args, name) > most:
            parser.error(f"argument --{name}: takes a number from 0 to {most}, not {getattr(args, name)}")
    common.check_precision(parser, args)
    return args


def main(argv=None):
    args = parse_args(argv)
    common.check_writable(args.save_dir)
    torch.manual_seed(args.seed)
    if args.load:
        models, config = common.load_model(args.load, "ddpm", lambda timesteps, predict: build_models())
        args.timesteps, args.predict = config["timesteps"], config["predict"]
        if args.sampler != "ddpm" and args.sample_steps > args.timesteps:
            raise OSError(f"--sample-steps {args.sample_steps}: {args.load} has {args.timesteps} time steps")
    else:
        models = build_models()
    models.to(args.device)
    train_loader, test_loader = common.load_mnist(args.data_dir, args.batch_size, args.device, args.limit)

    print(f"DDPM on {args.device}: {sum(p.numel() for p in models['model'].parameters()):,} parameters")
    ddpm = DDPM(
        models["model"],
        args.timesteps,
        device=args.device,
        bf16=args.precision == "bf16",
        predict=args.predict,
        weak=models["weak"],
    )
    if not args.load:
        fit(ddpm, train_loader, args)
        path = os.path.join(args.save_dir, "ddpm.pt")
        common.save_model(path, "ddpm", {"timesteps": args.timesteps, "predict": args.predict}, models)
        print(f"Model saved: {path}")

    torch.manual_seed(args.seed)  # the figures depend on the model alone, trained now or loaded
    print(f"Held-out loss: {evaluate(ddpm, test_loader):.4f}")
    plot_samples(ddpm, test_loader, args)


if __name__ == "__main__":
    common.run(main)
