"""A RetinaNet on ResNet-34 teaches one on ResNet-18 in Lightning, by images and boxes as the detector resized them."""

import argparse

import lightning.pytorch as pl
import torch
from torchvision.models.detection import RetinaNet, backbone_utils

from rakd.evaluation.boxes2d import evaluate_detector
from rakd.integrations.lightning import DistillCallback, images_and_boxes
from rakd.scenes.boxes2d import rendered_boxes

parser = argparse.ArgumentParser(description=__doc__)
for name, default in {"out": "runs/lightning", "frames": 300, "size": 320, "epochs": 20}.items():
    parser.add_argument(f"--{name}", type=type(default), default=default)
run = parser.parse_args()
train_set, val_set = rendered_boxes(f"{run.out}/scenes", run.frames, run.size, first_label=1)


class Detector(pl.LightningModule):
    def training_step(self, batch, batch_idx):
        return sum(self.net(*batch).values())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-4)


def train(name, *distilling):
    backbone = backbone_utils.resnet_fpn_backbone(backbone_name=name, weights=None, norm_layer=torch.nn.BatchNorm2d)
    model = Detector()
    model.net = RetinaNet(backbone.requires_grad_(), 4, min_size=run.size // 2, max_size=run.size)
    model.net.transform.register_forward_hook(lambda *call: setattr(model, "seen", images_and_boxes(call[2])))
    callbacks = distilling and [DistillCallback(*distilling, apprentice="net.backbone", batch=lambda _: model.seen)]
    pl.Trainer(max_epochs=run.epochs, default_root_dir=run.out, callbacks=callbacks).fit(model, train_set.loader(4))
    return model.net, evaluate_detector(model.net, val_set)


print("expert:     mAP50-95", (expert := train("resnet34"))[1])
print("apprentice: mAP50-95", train("resnet18")[1])
print("distilled:  mAP50-95", train("resnet18", expert[0].backbone, "auto:10")[1])
