"""Train the zoo's models on cluttered digits, measure them, and write what the package ships.

    python examples/train_digits.py --model cnn
    python examples/train_digits.py --model vit
    python examples/train_digits.py --samples
    python examples/train_digits.py --model cnn --evaluate 4000

Needs scikit-learn for the digits. Training makes fresh clutter for every scene it shows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from clutter import Glyphs, hide, save_samples, split_glyphs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saliency_fast.zoo import Samples
from saliency_fast.zoo.networks import DigitsCNN, DigitsViT

SHIPPED = Path(__file__).parents[1] / "saliency_fast" / "zoo" / "data"
SCENES_PER_EPOCH = 8192
BATCH = 64
# Clutter brightens over this share of training: at full strength from the start, the
# transformer stays at chance for long.
CURRICULUM = 0.4
# Methods ask a model about dimmed inputs (paths from a black baseline) and noisy ones (SmoothGrad).
# Trained on clean scenes alone it reads neither, and its maps are of what it says when blind. So a
# second stage shows it both: a share of the scenes dimmed, a share noisy.
DIMMED, NOISY, MOST_NOISE = 0.4, 0.75, 0.35
SECOND_SEED = 1
# Held-out scenes use seeds far from those of training, which count batches up from seed << 32.
EVALUATION_SEED = 7_000_000
SAMPLES_SEED = 8_000_000
SAMPLES_PER_LABEL = 10


@dataclass(frozen=True)
class Plan:
    """How one model is trained: AdamW, one cycle to `rate` after `warm_up`, a share of steps; then
    `second` epochs of disturbed scenes, in one cycle to `second_rate`.
    """

    build: Callable[[], nn.Module]
    epochs: int
    rate: float
    warm_up: float
    second: int = 0
    second_rate: float = 0.0


PLANS = {
    "cnn": Plan(DigitsCNN, epochs=20, rate=4e-3, warm_up=0.15, second=45, second_rate=2e-3),
    "vit": Plan(DigitsViT, epochs=45, rate=1.2e-3, warm_up=0.03),
}


def train(plan: Plan, glyphs: Glyphs, epochs: int, seed: int) -> nn.Module:
    """Train a fresh model for `epochs` of 8192 scenes, and return it in eval mode."""
    torch.manual_seed(seed)
    model = plan.build()
    cycle(model, glyphs, epochs, plan.rate, plan.warm_up, seed, ramp)
    return model.eval()


def train_on(model: nn.Module, plan: Plan, glyphs: Glyphs) -> nn.Module:
    """Train a model on for the plan's second stage, and return it in eval mode."""
    torch.manual_seed(SECOND_SEED)
    cycle(model, glyphs, plan.second, plan.second_rate, plan.warm_up, SECOND_SEED, None)
    return model.eval()


def ramp(done: float) -> float:
    """How bright clutter is when a share of training is done."""
    return min(1.0, done / CURRICULUM)


def cycle(
    model: nn.Module,
    glyphs: Glyphs,
    epochs: int,
    rate: float,
    warm_up: float,
    seed: int,
    strength: Callable[[float], float] | None,
) -> None:
    """One cycle of training; without a `strength` of clutter it is full, and scenes disturbed."""
    steps = epochs * SCENES_PER_EPOCH // BATCH
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=warm_up)
    begun, hits, seen = time.perf_counter(), 0, 0
    for step in range(steps):
        which = torch.randint(len(glyphs), (BATCH,))
        clutter = 1.0 if strength is None else strength(step / steps)
        scenes = hide(glyphs, which, (seed << 32) + step, clutter)
        logits = model(disturbed(scenes.images) if strength is None else scenes.images)
        loss = F.cross_entropy(logits, scenes.labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        hits += int((logits.argmax(1) == scenes.labels).sum())
        seen += BATCH
        if (step + 1) % (SCENES_PER_EPOCH // BATCH) == 0:
            spent = time.perf_counter() - begun
            epoch = (step + 1) * BATCH // SCENES_PER_EPOCH
            print(
                f"epoch {epoch:3d}  training accuracy {hits / seen:.4f}  {spent:5.0f} s", flush=True
            )
            hits, seen = 0, 0


def disturbed(images: Tensor) -> Tensor:
    """Scenes [N, 1, 64, 64] of which some are dimmed, and some carry normal noise of up to 0.35 of
    their own brightness.
    """
    shape = (len(images), 1, 1, 1)
    dim = 1.0 - torch.rand(shape) * (torch.rand(shape) < DIMMED)
    noise = MOST_NOISE * torch.rand(shape) * (torch.rand(shape) < NOISY)
    return dim * (images + noise * torch.randn(images.shape))


@torch.no_grad()
def correct(model: nn.Module, glyphs: Glyphs, which: Tensor) -> Tensor:
    """Which scenes [N] of `glyphs[which]` in fresh clutter `model` reads right, as bool."""
    right = []
    for part, chunk in enumerate(torch.split(which, 500)):
        scenes = hide(glyphs, chunk, EVALUATION_SEED + part)
        right.append(model(scenes.images).argmax(1) == scenes.labels)
    return torch.cat(right)


def measure(model: nn.Module, glyphs: Glyphs, count: int) -> dict[str, float | int | list[float]]:
    """Accuracy on `count` fresh held-out scenes, with a 95 % interval.

    Scenes of one glyph succeed and fail together, so the interval resamples glyphs, not scenes.
    """
    which = torch.arange(count) % len(glyphs)
    right = correct(model, glyphs, which).to(torch.float64)
    hits = torch.zeros(len(glyphs), dtype=torch.float64).index_add_(0, which, right)
    shown = torch.bincount(which, minlength=len(glyphs)).to(torch.float64)
    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(len(glyphs), (10_000, len(glyphs)), generator=generator)
    resampled = hits[draw].sum(1) / shown[draw].sum(1)
    low, high = torch.quantile(
        resampled, torch.tensor([0.025, 0.975], dtype=torch.float64)
    ).tolist()
    return {
        "accuracy": round(float(right.mean()), 4),
        "interval95": [round(low, 4), round(high, 4)],
        "scenes": count,
        "glyphs": len(glyphs),
    }


def write_samples(glyphs: Glyphs, path: Path) -> None:
    """Write a balanced set of held-out scenes, each of another glyph."""
    which = [(glyphs.labels == label).nonzero()[:SAMPLES_PER_LABEL, 0] for label in range(10)]
    save_samples(hide(glyphs, torch.stack(which, 1).flatten(), SAMPLES_SEED), path)


def brightness(scenes: Samples) -> dict[str, float]:
    """Mean brightness within the digits' boxes, up to 4 px around them, and farther away."""
    steps = torch.arange(scenes.images.shape[-1])
    top, left, bottom, right = scenes.boxes[:, :, None].unbind(1)
    down = torch.maximum(top - steps, steps - bottom + 1)
    across = torch.maximum(left - steps, steps - right + 1)
    distance = torch.maximum(down[:, :, None], across[:, None, :]).unsqueeze(1)
    parts = {"box": distance <= 0, "rim": (distance > 0) & (distance <= 4), "away": distance > 4}
    return {name: round(float(scenes.images[part].mean()), 3) for name, part in parts.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train and measure the zoo's digit models.")
    parser.add_argument("--model", choices=sorted(PLANS))
    parser.add_argument("--epochs", type=int, help="default: the plan of the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=SHIPPED, help="folder to write to and read from"
    )
    parser.add_argument(
        "--second-only",
        action="store_true",
        help="take the weights in OUT as those of the first stage",
    )
    parser.add_argument("--samples", action="store_true", help="write the held-out samples")
    parser.add_argument(
        "--evaluate",
        type=int,
        metavar="N",
        help="only measure the weights in OUT on N fresh scenes",
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.model is None and not args.samples:
        parser.error("nothing to do: pass --model cnn, --model vit or --samples")
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    train_glyphs, held_out_glyphs = split_glyphs()
    if args.samples:
        write_samples(held_out_glyphs, args.out / "held_out.safetensors")
        every = torch.arange(len(held_out_glyphs))
        print("mean brightness", brightness(hide(held_out_glyphs, every, EVALUATION_SEED)))
    if args.model is None:
        return
    plan, weights = PLANS[args.model], args.out / f"digits_{args.model}.safetensors"
    if args.evaluate is not None:
        model = plan.build()
        model.load_state_dict(load_file(weights))
        print(json.dumps(measure(model.eval(), held_out_glyphs, args.evaluate), indent=2))
        return
    epochs = plan.epochs if args.epochs is None else args.epochs
    begun = time.perf_counter()
    if args.second_only:
        model = plan.build()
        model.load_state_dict(load_file(weights))
    else:
        model = train(plan, train_glyphs, epochs, args.seed)
    if plan.second:
        model = train_on(model, plan, train_glyphs)
    seconds = round(time.perf_counter() - begun)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, weights)
    report = measure(model, held_out_glyphs, 4000) | {
        "parameters": sum(value.numel() for value in model.parameters()),
        "epochs": epochs + plan.second,
        "seed": args.seed,
        "training_seconds": seconds,
        "threads": args.threads,
        "torch": torch.__version__,
    }
    weights.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
