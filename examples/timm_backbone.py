"""A timm ResNet-34 teaches a ResNet-10 which classes a rendered street scene shows, in a plain loop."""

import argparse

import timm
import torch

from rakd.integrations.timm import distill
from rakd.scenes.boxes2d import rendered_boxes

parser = argparse.ArgumentParser(description=__doc__)
for name, default in {"out": "runs/timm", "frames": 300, "size": 320, "epochs": 20}.items():
    parser.add_argument(f"--{name}", type=type(default), default=default)
run = parser.parse_args()
train_set, val_set = rendered_boxes(run.out, run.frames, run.size)


def predict(net, images, targets):
    maps = net[0](torch.stack(images))
    truth = torch.stack([torch.eye(3)[target["labels"]].sum(0).clamp(max=1) for target in targets])
    return maps, net[1](maps[-1].mean((2, 3))), truth


def train(backbone, distiller=None):
    net = torch.nn.ModuleList([backbone, torch.nn.Linear(backbone.feature_info.channels()[-1], 3)])
    optimizer = torch.optim.AdamW([*net.parameters(), *(distiller.parameters() if distiller else [])], lr=1e-3)
    for images, targets in (batch for _ in range(run.epochs) for batch in train_set.loader(8)):
        maps, logits, truth = predict(net.train(), images, targets)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth)
        optimizer.zero_grad()
        (loss + (distiller(images, [t["boxes"] for t in targets], maps, task_loss=loss) if distiller else 0)).backward()
        optimizer.step()
    _, logits, truth = predict(net.eval().requires_grad_(False), *zip(*val_set, strict=True))
    return float(((logits > 0) == truth).float().mean())


expert, alone, apprentice = (timm.create_model(f"resnet{n}", features_only=True) for n in ("34", "10t", "10t"))
print("expert:     accuracy", train(expert))
print("apprentice: accuracy", train(alone))
print("distilled:  accuracy", train(apprentice, distill(expert, apprentice, "auto:10", normalize=True)))
