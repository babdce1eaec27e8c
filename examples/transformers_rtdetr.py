"""An RT-DETR teaches one of a quarter of its width on rendered street scenes, in transformers' Trainer."""

import argparse

import torch
from torchvision.ops import box_convert
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessor, Trainer, TrainingArguments

from rakd.evaluation.boxes2d import mean_average_precision
from rakd.integrations.transformers import DistillMixin
from rakd.scenes.boxes2d import rendered_boxes

parser = argparse.ArgumentParser(description=__doc__)
for name, default in {"out": "runs/transformers", "frames": 300, "size": 256, "epochs": 20}.items():
    parser.add_argument(f"--{name}", type=type(default), default=default)
run = parser.parse_args()
train_set, val_set = rendered_boxes(f"{run.out}/scenes", run.frames, run.size)
DistillTrainer, wh = type("DistillTrainer", (DistillMixin, Trainer), {}), torch.tensor([run.size, run.size // 2] * 2)


def collate(batch):
    labels = [{"class_labels": t["labels"], "boxes": box_convert(t["boxes"], "xyxy", "cxcywh") / wh} for _, t in batch]
    return {"pixel_values": torch.stack([image for image, _ in batch]), "labels": labels}


def train(width, **kwargs):
    backbone = {"model_type": "rt_detr_resnet", "hidden_sizes": [width] * 4, "out_indices": [2, 3, 4]}
    sizes = {"encoder_in_channels": [width] * 3, "encoder_hidden_dim": width, "decoder_in_channels": [width] * 3}
    model = RTDetrForObjectDetection(RTDetrConfig(backbone_config=backbone, num_labels=3, **sizes))
    args = TrainingArguments(f"{run.out}/{width}", num_train_epochs=run.epochs, learning_rate=2e-4, report_to=[])
    DistillTrainer(model, args, collate, train_set, **kwargs).train()
    read, size = RTDetrImageProcessor().post_process_object_detection, [(run.size // 2, run.size)]
    outputs = [model.eval().requires_grad_(False)(image[None].to(model.device)) for image, _ in val_set]
    found = [read(output, threshold=0, target_sizes=size)[0] for output in outputs]
    return model, mean_average_precision(found, [target for _, target in val_set])


print("expert:     mAP50-95", (expert := train(128))[1])
print("apprentice: mAP50-95", train(32)[1])
print("distilled:  mAP50-95", train(32, expert=expert[0], distill={"weight": "auto:10", "normalize": True})[1])
