"""Train a small class-conditional U-Net, one of the models that ship.

It uses v-prediction, linear betas and T = 1000.

    python training/train_unet.py fashion --out runs/fashion --minutes 120
    python training/train_unet.py scenes --data scenes.npz --out runs/scenes --minutes 120

Training stops after ``--minutes``, when the learning rate reaches zero. A checkpoint is written
every minute; a restarted run resumes from it. With it the averaged weights are written to
``OUT/DATASET.safetensors`` in float16, the format of ``ddim_fast/weights``. ``--start-from`` begins
with such weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from data_sets import DATASETS
from optimizer import Muon, split_parameters
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddim_fast.models.unet import SmallUNet
from ddim_fast.plans.schedules import NoiseSchedule

NUM_TRAIN_TIMESTEPS = 1000
LABEL_DROPOUT = 0.1
schedule = NoiseSchedule.linear(NUM_TRAIN_TIMESTEPS)
alphas_cumprod = torch.tensor(schedule.alphas_cumprod)
# Half of the timesteps are drawn uniformly, half from a normal distribution over the log
# signal-to-noise ratio (after EDM, arXiv 2206.00364), because linear betas have half of all
# timesteps where hardly any signal is left.
LOG_SNR_MEAN, LOG_SNR_STD = 1.3, 2.4


def timestep_cdf() -> Tensor:
    log_snr = torch.log(alphas_cumprod / (1 - alphas_cumprod))
    density = torch.exp(-0.5 * ((log_snr - LOG_SNR_MEAN) / LOG_SNR_STD) ** 2) * torch.gradient(-log_snr)[0].abs()
    mixture = 0.5 / NUM_TRAIN_TIMESTEPS + 0.5 * density / density.sum()
    return torch.cumsum(mixture, 0) / mixture.sum()


def velocity_loss(model, x0: Tensor, labels: Tensor, t: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return the mean squared error of v at timesteps ``t`` ``(B,)``."""
    noise = torch.randn(x0.shape, generator=generator)
    return F.mse_loss(model(schedule.add_noise(x0, noise, t), t, labels), schedule.velocity(x0, noise, t))


@torch.no_grad()
def held_out_loss(model, images: Tensor, labels: Tensor) -> float:
    generator = torch.Generator().manual_seed(0)
    n = min(250, len(images) // 4)
    t = torch.arange(0, NUM_TRAIN_TIMESTEPS, NUM_TRAIN_TIMESTEPS // n)[:n]
    losses = [
        velocity_loss(model, images[i * n : (i + 1) * n], labels[i * n : (i + 1) * n], t, generator) for i in range(4)
    ]
    return torch.stack(losses).mean().item()


def export(model: SmallUNet, path: Path) -> None:
    """Write the weights in float16."""
    save_file(
        {k: v.half().contiguous() for k, v in model.state_dict().items()},
        path,
        metadata={"config": json.dumps(model.config), "prediction_type": "v_prediction"},
    )
    path.chmod(0o644)  # safetensors makes files readable by the owner only; these are packaged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="default: where the dataset is expected")
    parser.add_argument("--start-from", type=Path, help="weights to go on from, a file like those that are written")
    parser.add_argument("--minutes", type=float, default=120.0, help="training time, over all resumed runs")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--optimizer", choices=["muon", "adamw"], default="muon")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--adamw-lr", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    dataset = DATASETS[args.dataset]
    images, labels = dataset.load_split("train", args.data or dataset.path)
    test_images, test_labels = dataset.load_split("test", args.data or dataset.path)
    model = SmallUNet(**dataset.unet).to(memory_format=torch.channels_last)
    if args.start_from is not None:
        model.load_state_dict({name: tensor.float() for name, tensor in load_file(args.start_from).items()})
    average = copy.deepcopy(model).requires_grad_(False)
    muon_weights, others = split_parameters(model, ("stem", "conv_out", "label_embedding", "time_mlp"))
    if args.optimizer == "adamw":
        muon_weights, others = [], muon_weights + others
    optimizers = [torch.optim.AdamW(others, lr=args.adamw_lr, betas=(0.9, 0.99), weight_decay=0.01)]
    if muon_weights:
        optimizers.append(Muon(muon_weights, lr=args.lr))
    base_lrs = [o.param_groups[0]["lr"] for o in optimizers]
    generator = torch.Generator().manual_seed(1)
    cdf = timestep_cdf()
    step, seconds = 0, 0.0
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seconds = state["step"], state["seconds"]
        generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
    log = (args.out / "log.jsonl").open("a")

    def save() -> None:
        temporary = checkpoint.with_suffix(".tmp")
        state = dict(
            model=model.state_dict(),
            average=average.state_dict(),
            optimizers=[o.state_dict() for o in optimizers],
            step=step,
            seconds=seconds,
            generator=generator.get_state(),
            torch_rng=torch.get_rng_state(),
        )
        torch.save(state, temporary)
        temporary.replace(checkpoint)
        export(average, args.out / f"{args.dataset}.safetensors")

    total, running, last_save, saves = args.minutes * 60, [], time.monotonic(), 0
    while seconds < total:
        started = time.monotonic()
        progress = seconds / total
        warm_up = min(1.0, (step + 1) / 200)
        factor = warm_up * 0.5 * (1 + math.cos(math.pi * progress))
        for optimizer, lr in zip(optimizers, base_lrs, strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
        index = torch.randint(len(images), (args.batch_size,), generator=generator)
        # Stratified sampling: one draw in each of batch_size equal slices has the same expectation
        # and less variance.
        u = (torch.arange(args.batch_size) + torch.rand(args.batch_size, generator=generator)) / args.batch_size
        t = torch.searchsorted(cdf, u.double()).clamp_(max=NUM_TRAIN_TIMESTEPS - 1)
        batch_labels = labels[index].clone()
        batch_labels[torch.rand(args.batch_size, generator=generator) < LABEL_DROPOUT] = model.num_classes
        loss = velocity_loss(model, images[index], batch_labels, t, generator)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        decay = min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        running.append(loss.item())
        seconds += time.monotonic() - started
        if time.monotonic() - last_save > 60 or seconds >= total:
            save()
            saves += 1
            entry = dict(
                step=step, images=step * args.batch_size, minutes=seconds / 60, train_loss=sum(running) / len(running)
            )
            if saves % 10 == 0 or seconds >= total:
                entry["held_out_loss"] = held_out_loss(average, test_images, test_labels)
            running, last_save = [], time.monotonic()
            log.write(json.dumps(entry) + "\n")
            log.flush()
            print(json.dumps(entry), flush=True)
    export(average, args.out / f"{args.dataset}.safetensors")


if __name__ == "__main__":
    main()
