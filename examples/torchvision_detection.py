"""A RetinaNet on ResNet-34 teaches one on ResNet-18, on rendered street scenes, in a plain training loop."""

import argparse

import torch
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from rakd.evaluation.boxes2d import evaluate_detector
from rakd.integrations.torchvision import DistilledDetector
from rakd.scenes.boxes2d import rendered_boxes

parser = argparse.ArgumentParser(description=__doc__)
for name, default in {"out": "runs/torchvision", "frames": 300, "size": 320, "epochs": 20}.items():
    parser.add_argument(f"--{name}", type=type(default), default=default)
run = parser.parse_args()
train_set, val_set = rendered_boxes(run.out, run.frames, run.size, first_label=1)


def make(name):
    backbone = resnet_fpn_backbone(backbone_name=name, weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5)
    return RetinaNet(backbone, num_classes=4, min_size=run.size // 2, max_size=run.size)


def train(detector):
    optimizer = torch.optim.AdamW(detector.train().parameters(), lr=3e-4)
    for images, targets in (batch for _ in range(run.epochs) for batch in train_set.loader(4)):
        optimizer.zero_grad()
        sum(detector(images, targets).values()).backward()
        optimizer.step()
    return evaluate_detector(detector, val_set)


print("expert:     mAP50-95", train(expert := make("resnet34")))
print("apprentice: mAP50-95", train(make("resnet18")))
print("distilled:  mAP50-95", train(DistilledDetector(make("resnet18"), expert, weight="auto:10", normalize=True)))
