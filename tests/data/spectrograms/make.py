"""A network for sound, and timm's answers: spectrograms of sine sweeps, an eca_nfnet_l0 of one channel with sigmoid outputs.

    python make.py        # writes NAME.png, checkpoint/ and answers.json beside this file

Needs torch, timm, numpy and pillow. A sound is half a second at 16 kHz: a sweep up or down, a steady tone, two of them at once, or noise; its
spectrogram (Hann windows of 512 samples, every 80) is in decibels on 0..255, low frequencies at the bottom, 96 columns by 64
rows: no square. The network is trained for a minute to tell `up`, `down` and `tone`, of which a sound may have any number.
"""
import json
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models._hub import save_for_hf

HERE = Path(__file__).resolve().parent
RATE, WINDOW, STEP = 16000, 512, 80
LABELS = ["up", "down", "tone"]
HEIGHT, WIDTH = 64, 96
ARGS = dict(in_chans=1, num_classes=3, depths=(1, 1, 1, 1), channels=(16, 24, 32, 32), stem_chs=16, group_size=8, num_features=64)


def sound(parts, seed):
    """Half a second of these parts, and a little noise."""
    random = np.random.default_rng(seed)
    time = np.arange(STEP * WIDTH + WINDOW) / RATE
    wave = 0.02 * random.standard_normal(len(time))
    for part in parts:
        low, high = random.uniform(300, 1500), random.uniform(3500, 7000)
        start, end = {"up": (low, high), "down": (high, low), "tone": (low, low) if random.random() < 0.5 else (high, high)}[part]
        wave += np.sin(2 * np.pi * (start * time + (end - start) / (2 * time[-1]) * time**2) + random.uniform(0, 6))
    return wave


def spectrogram(wave):
    frames = np.stack([wave[i * STEP : i * STEP + WINDOW] for i in range(WIDTH)]) * np.hanning(WINDOW)
    power = np.abs(np.fft.rfft(frames))[:, 1:].reshape(WIDTH, HEIGHT, -1).mean(2)
    decibel = 20 * np.log10(power + 1e-4)
    level = np.clip((decibel + 40) / 80, 0, 1)
    return Image.fromarray((255 * level.T[::-1]).round().astype(np.uint8), "L")


def batch(seed, images):
    random = np.random.default_rng(seed)
    pictures, targets = [], []
    for i in range(images):
        parts = [label for label in LABELS if random.random() < 0.4]
        pictures.append(spectrogram(sound(parts, seed * 10000 + i)))
        targets.append([float(label in parts) for label in LABELS])
    return pictures, torch.tensor(targets)


def main():
    torch.manual_seed(0)
    model = timm.create_model("eca_nfnet_l0", **ARGS)
    data = dict(input_size=(1, HEIGHT, WIDTH), crop_pct=1.0, interpolation="bicubic", mean=(0.5,), std=(0.25,))
    transform = create_transform(**resolve_data_config(data), is_training=False)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(150):
        pictures, targets = batch(step + 1, 16)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(torch.stack([transform(p) for p in pictures])), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss {loss.item():.3f}")
    model.eval()
    lists = {key: list(value) if isinstance(value, tuple) else value for key, value in ARGS.items()}
    save_for_hf(model, HERE / "checkpoint", model_config=dict(label_names=LABELS), model_args=lists, safe_serialization=True)
    # what save_for_hf writes of the preprocessing is the architecture's
    path = HERE / "checkpoint/config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"] |= {**data, "input_size": [1, HEIGHT, WIDTH], "mean": [0.5], "std": [0.25]}
    for key in ("test_input_size", "test_crop_pct", "pool_size"):
        config["pretrained_cfg"].pop(key, None)
    config["problem_type"] = "multi_label_classification"
    path.write_text(json.dumps(config, indent=2) + "\n")
    answers = {}
    for i, parts in enumerate([["up"], ["down"], ["tone"], ["up", "tone"], ["down", "tone"], ["up", "down"], [], LABELS]):
        name = "-".join(parts) or "noise"
        spectrogram(sound(parts, 77 + i)).save(HERE / f"{name}.png")
        with torch.inference_mode():
            x = transform(Image.open(HERE / f"{name}.png").convert("L"))[None]
            logits = model(x)
            features = model.forward_head(model.forward_features(x), pre_logits=True)
        answers[f"{name}.png"] = dict(
            parts=parts, logits=logits[0].tolist(), scores=logits[0].sigmoid().tolist(), features=features[0].tolist())
    (HERE / "answers.json").write_text(json.dumps(answers) + "\n")
    for name, answer in answers.items():
        print(name, [round(score, 3) for score in answer["scores"]])


main()
