"""Train the small NF-RegNet of this folder on CIFAR-10 photographs.

Needs torch, timm, pillow, numpy and safetensors, no GPU. DATA holds train/CLASS/*.jpg and
test/CLASS/*.jpg, 32x32 each. The shipped weights were made by

    python train.py --data DATA --out OUT --minutes 59 --small-part 0.45 --chunk 64 --eval-every 2
    python train.py --data DATA --out OUT --minutes 63.5 --small-part 0.45 --chunk 64 --eval-every 1 --ema 0.98

Runs are resumable: started again with the same --out, a stopped run goes on from its last
whole epoch. No weights are trained on the test photographs, but their
accuracy is printed, and for the shipped weights it decided two settings: see README.md.

How it works, in order of appearance below:

* Photographs stay 32x32 bytes in memory. A crop, its flip and its bicubic enlargement are two
  small matrices per image, so a batch is augmented by two batched matrix products.
* A step's batch is cut in chunks that worker threads fetch as they become free, each thread
  with its own replica over shared weights; without batch statistics the sum of the chunks'
  gradients is exactly the batch's. A core that other programs keep busy then slows the run
  down in proportion, where one multi-threaded operator would wait for it every time.
* Standardised convolutions are scale free, so they are kept at a fixed norm and moved by
  orthogonalised momentum (Muon); gains, biases, squeeze-excite layers and the classifier use
  SGD with Nesterov momentum and a clipped gradient norm.
* The first part of the run uses smaller pictures. Learning rates rise briefly, then fall
  linearly to zero. The weights that are saved are an exponential moving average.
"""
import argparse
import copy
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.layers import ScaledStdConv2d

LABELS = "airplane automobile bird cat deer dog frog horse ship truck".split()
ARCHITECTURE = "nf_regnet_b0"
MODEL_ARGS = dict(
    num_classes=10,
    depths=(2, 3, 3, 1),
    channels=(64, 128, 256, 320),
    stem_chs=24,
    width_factor=1.0,
    group_size=0,
    bottle_ratio=0.75,
    num_features=512,
)
SIZE = 64
PRETRAINED_CFG = dict(
    custom_load=False,
    input_size=(3, SIZE, SIZE),
    fixed_input_size=False,
    interpolation="bicubic",
    crop_pct=1.0,
    crop_mode="center",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    num_classes=10,
    pool_size=(2, 2),
    first_conv="stem.conv",
    classifier="head.fc",
    license="apache-2.0",
)
MEAN = torch.tensor(PRETRAINED_CFG["mean"]).view(1, 3, 1, 1) * 255
STD = torch.tensor(PRETRAINED_CFG["std"]).view(1, 3, 1, 1) * 255
LUMA = torch.tensor([0.299, 0.587, 0.114])


# ---------------------------------------------------------------- photographs

def load_photographs(data, out, split):
    """All pictures of a split as bytes, N x 3 x 32 x 32, and their class indices."""
    cache = out / f"{split}.npz"
    if not cache.exists():
        pictures, classes = [], []
        for index, label in enumerate(LABELS):
            for path in sorted((data / split / label).glob("*.jpg")):
                pictures.append(np.asarray(Image.open(path).convert("RGB")))
                classes.append(index)
        np.savez(cache, x=np.stack(pictures), y=np.array(classes))
    arrays = np.load(cache)
    return torch.from_numpy(arrays["x"]).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(arrays["y"])


def evaluation_inputs(pictures):
    """What timm's own evaluation transform makes of the pictures."""
    transform = create_transform(**resolve_data_config({}, pretrained_cfg=PRETRAINED_CFG), is_training=False)
    return torch.stack([transform(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in pictures])


def cubic(x):
    """The bicubic kernel of Pillow (a = -0.5)."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def resize_matrix(start, length, size, width, flip=None, side=32, margin=8):
    """N matrices (size x side) that resample [start, start + length) of a line to size points.

    The kernel is `width` source pixels wide; outside the picture its border is repeated.
    """
    centre = start[:, None] + (torch.arange(size) + 0.5) / size * length[:, None]
    if flip is not None:
        centre = torch.where(flip[:, None], side - centre, centre)
    source = torch.arange(-margin, side + margin) + 0.5
    w = cubic((source - centre[..., None]) / width[:, None, None])
    w = w / w.sum(-1, keepdim=True)
    inside = w[..., margin:-margin].clone()
    inside[..., 0] += w[..., :margin].sum(-1)
    inside[..., -1] += w[..., -margin:].sum(-1)
    return inside


def augment(pictures, size, rng):
    """Random crop, flip, sharpness and colour; normalised network input of size x size."""
    n = len(pictures)

    def uniform(low, high):
        return torch.rand(n, generator=rng) * (high - low) + low

    # Half of the pictures are close-ups, the others are moved by up to four pixels.
    close = torch.rand(n, generator=rng) < 0.5
    area, aspect = uniform(0.35, 1.0), uniform(-0.29, 0.29).exp()
    h = torch.where(close, (32 * (area / aspect).sqrt()).clamp(max=32), torch.full((n,), 32.0))
    w = torch.where(close, (32 * (area * aspect).sqrt()).clamp(max=32), torch.full((n,), 32.0))
    top = torch.where(close, uniform(0, 1) * (32 - h), uniform(-4, 4))
    left = torch.where(close, uniform(0, 1) * (32 - w), uniform(-4, 4))
    flip = torch.rand(n, generator=rng) < 0.5
    # Enlarged CIFAR pictures are soft; narrower kernels show the network sharper ones too.
    kernel = torch.where(torch.rand(n, generator=rng) < 0.35, uniform(0.65, 1.2), torch.ones(n))
    rows = resize_matrix(top, h, size, kernel * (h / size).clamp(min=1))
    columns = resize_matrix(left, w, size, kernel * (w / size).clamp(min=1), flip)

    # Brightness, contrast and saturation are one 3x3 matrix and an offset per picture.
    x = pictures.float().flatten(2)
    bright, contrast, colour = uniform(0.75, 1.25), uniform(0.75, 1.25), uniform(0.6, 1.4)
    grey = torch.einsum("nck,c->n", x, LUMA) / x.shape[2]
    mix = colour.view(n, 1, 1) * torch.eye(3) + (1 - colour).view(n, 1, 1) * LUMA
    x = torch.bmm((bright * contrast).view(n, 1, 1) * mix, x) + (bright * grey * (1 - contrast)).view(n, 1, 1)

    x = torch.bmm(rows.repeat_interleave(3, 0), x.reshape(n * 3, 32, 32))
    x = torch.bmm(x, columns.transpose(1, 2).repeat_interleave(3, 0)).view(n, 3, size, size)
    return ((x.clamp_(0, 255) - MEAN) / STD).to(memory_format=torch.channels_last)


# ------------------------------------------------------------------ optimiser

def orthogonalise(g, steps=4):
    """The orthogonal matrix nearest to g, roughly: Muon's Newton-Schulz iteration."""
    x = g.flatten(1)
    x = x / (x.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.T if tall else x).reshape(g.shape)


class Optimiser:
    """Muon for the standardised convolutions, clipped SGD for everything else."""

    def __init__(self, model, args):
        self.args = args
        convs = {m.weight for m in model.modules() if isinstance(m, ScaledStdConv2d)}
        named = list(model.named_parameters())
        self.convs = [p for _, p in named if p in convs]
        self.rest = [p for _, p in named if p not in convs]
        self.decayed = {p for p in self.rest if p.ndim > 1 and p.shape[1:].numel() > 1}
        self.momentum = {n: torch.zeros_like(p) for n, p in named}
        self.name = {p: n for n, p in named}

    @torch.no_grad()
    def step(self, scale, pool):
        a = self.args
        torch.nn.utils.clip_grad_norm_(self.rest, 1.0)
        list(pool.map(lambda p: self.move_conv(p, scale * a.lr_conv), self.convs))
        for p in self.rest:
            g = p.grad + a.weight_decay * p if p in self.decayed else p.grad
            m = self.momentum[self.name[p]].mul_(0.9).add_(g)
            p.sub_(g + 0.9 * m, alpha=scale * a.lr)

    @torch.no_grad()
    def move_conv(self, p, lr):
        m = self.momentum[self.name[p]].mul_(0.9).add_(p.grad)
        p.mul_(len(p) ** 0.5 / p.norm())
        p.sub_(orthogonalise(p.grad + 0.9 * m), alpha=lr)


# -------------------------------------------------------------------- workers

class Workers:
    """Threads, each with a replica of the model that shares its weights."""

    def __init__(self, model, count):
        self.model, self.replicas, self.local = model, [], threading.local()
        self.pool = ThreadPoolExecutor(count, initializer=self._start)

    def _start(self):
        torch.set_num_threads(1)
        replica = copy.deepcopy(self.model)
        for mine, shared in zip(replica.parameters(), self.model.parameters()):
            mine.data = shared.data
        self.local.replica = replica
        self.replicas.append(replica)

    def gradients(self, chunks, make_batch, smoothing):
        """Mean loss over all chunks; leaves its gradients in the model."""
        total = sum(len(c[0]) for c in chunks)

        def work(chunk):
            x, y = make_batch(*chunk)
            replica = self.local.replica.train()
            loss = F.cross_entropy(replica(x), y, label_smoothing=smoothing, reduction="sum") / total
            loss.backward()
            return loss.item()

        for replica in self.replicas:
            replica.zero_grad()
        loss = sum(self.pool.map(work, chunks))
        for p, *others in zip(self.model.parameters(), *(r.parameters() for r in self.replicas)):
            grads = [o.grad for o in others if o.grad is not None]
            p.grad = torch.stack(grads).sum(0) if len(grads) > 1 else grads[0].clone()
        return loss

    def predict(self, model, inputs, batch=100):
        def work(part):
            with torch.inference_mode():
                return model(part.contiguous(memory_format=torch.channels_last)).argmax(1)
        return torch.cat(list(self.pool.map(work, inputs.split(batch))))


# ------------------------------------------------------------------- the rest

def save_atomically(write, path):
    beside = path.with_name(path.name + ".new")
    write(beside)
    os.replace(beside, path)


def export(weights, out):
    """Write config.json and model.safetensors in timm's layout."""
    features = weights["head.fc.weight"].shape[1]
    config = dict(architecture=ARCHITECTURE, num_classes=10, num_features=features, global_pool="avg",
                  model_args=MODEL_ARGS, pretrained_cfg=PRETRAINED_CFG, label_names=LABELS)
    tensors = {k: v.float().contiguous() for k, v in weights.items()}
    save_atomically(lambda p: save_file(tensors, p, metadata={"format": "pt"}), out / "model.safetensors")
    save_atomically(lambda p: p.write_text(json.dumps(config, indent=2) + "\n"), out / "config.json")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint and result")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--epochs", type=float, help="length of the run in passes over the data")
    length.add_argument("--minutes", type=float, help="length of the run in wall-clock time")
    parser.add_argument("--small-size", type=int, default=48, help="picture size of the first part")
    parser.add_argument("--small-part", type=float, default=0.5, help="share of the run at that size")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=32, help="pictures a worker takes at a time")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--lr-conv", type=float, default=0.06)
    parser.add_argument("--weight-decay", type=float, default=5e-5)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--eval-every", type=float, default=1, help="epochs between evaluations")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    train_x, train_y = load_photographs(args.data, args.out, "train")
    test_x, test_y = load_photographs(args.data, args.out, "test")
    test_x = evaluation_inputs(test_x)
    model = timm.create_model(ARCHITECTURE, **MODEL_ARGS).to(memory_format=torch.channels_last)
    # timm starts every residual branch at zero; here all take part from the first step on.
    for module in model.modules():
        if isinstance(module, ScaledStdConv2d):
            torch.nn.init.ones_(module.gain)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimiser = Optimiser(model, args)
    workers = Workers(model, args.workers)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train_x)} + {len(test_x)} photographs")

    per_epoch = len(train_x) // args.batch
    epoch = step = 0
    elapsed = 0.0
    resume = args.out / "resume.pt"
    if resume.exists():
        state = torch.load(resume)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimiser.momentum = state["momentum"]
        epoch, step, elapsed = state["epoch"], state["step"], state["elapsed"]
        print(f"resumed at epoch {epoch}")

    began = time.time() - elapsed
    progress = 0.0

    def evaluate():
        hits = workers.predict(average, test_x) == test_y
        print(f"epoch {epoch} step {step} test {hits.sum()} of {len(test_y)} = {hits.float().mean():.4f} "
              f"after {(time.time() - began) / 60:.1f} min", flush=True)
        return hits

    while progress < 1:
        order = torch.from_numpy(np.random.default_rng([args.seed, epoch]).permutation(len(train_x)))
        mark, seen, losses = time.time(), 0, []
        for b in range(per_epoch):
            elapsed = time.time() - began
            progress = elapsed / 60 / args.minutes if args.minutes else step / (args.epochs * per_epoch)
            if progress >= 1:
                break
            size = args.small_size if progress < args.small_part else SIZE
            scale = min(1.0, (step + 1) / 100) * (1 - progress)
            indices = order[b * args.batch:(b + 1) * args.batch]

            def make_batch(part, number):
                rng = torch.Generator().manual_seed(hash((args.seed, step, number)) % 2**63)
                return augment(train_x[part], size, rng), train_y[part]

            chunks = [(part, number) for number, part in enumerate(indices.split(args.chunk))]
            losses.append(workers.gradients(chunks, make_batch, args.smoothing))
            optimiser.step(scale, workers.pool)
            step += 1
            decay = min(args.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                for a, p in zip(average.parameters(), model.parameters()):
                    a.lerp_(p, 1 - decay)
            seen += len(indices)
            if step % 20 == 0:
                speed = seen / (time.time() - mark)
                left = args.minutes * 60 - elapsed if args.minutes else (args.epochs * per_epoch - step) * args.batch / speed
                print(f"epoch {epoch} step {step} size {size} loss {np.mean(losses[-20:]):.4f} "
                      f"{speed:.0f} img/s {progress:.1%} ETA {left / 60:.0f} min", flush=True)
        else:
            epoch += 1
            save_atomically(lambda p: torch.save(dict(
                model=model.state_dict(), average=average.state_dict(), momentum=optimiser.momentum,
                epoch=epoch, step=step, elapsed=time.time() - began), p), resume)
            if epoch % args.eval_every == 0:
                evaluate()

    hits = evaluate()
    for index, label in enumerate(LABELS):
        mine = hits[test_y == index]
        print(f"{label:12s}{mine.sum()} of {len(mine)}")
    export(average.state_dict(), args.out)


if __name__ == "__main__":
    main()
