"""Transformers' detectors with few and narrow layers, random weights, and data for their Trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("rt_detr", "rt_detr_v2", "d_fine", "deformable_detr", "detr")


def make(kind: str, width: int, seed: int = 0) -> nn.Module:
    """A detector whose maps have ``width`` channels."""
    import transformers as hf

    torch.manual_seed(seed)
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_labels": 3, "num_queries": 20}
    heads |= {"decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    if kind in ("deformable_detr", "detr"):
        stages = ["stage4"] if kind == "detr" else ["stage2", "stage3", "stage4"]
        backbone = hf.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1] * 4, layer_type="basic", out_features=stages
        )
        plain = {"backbone_config": backbone, "use_timm_backbone": False, "backbone": None, "encoder_layers": 1}
        if kind == "detr":
            return hf.DetrForObjectDetection(hf.DetrConfig(d_model=width, **plain, **heads))
        config = hf.DeformableDetrConfig(d_model=width, num_feature_levels=4, **plain, **heads)
        return hf.DeformableDetrForObjectDetection(config)
    stages = ["stage2", "stage3", "stage4"]
    sizes = {"hidden_sizes": [8, 16, 32, width], "depths": [1] * 4, "out_features": stages}
    if kind == "d_fine":
        one = {"stage_num_blocks": [1] * 4, "stage_numb_of_layers": [1] * 4, "stage_mid_channels": [8] * 4}
        channels = {"stem_channels": [3, 8, 8], "stage_in_channels": [8, 8, 16, 32]}
        outputs = {"stage_out_channels": [8, 16, 32, width], "hidden_sizes": [8, 16, 32, width], "depths": [1] * 4}
        backbone = hf.HGNetV2Config(**one, **channels, **outputs, out_features=stages)
    else:
        backbone = hf.RTDetrResNetConfig(embedding_size=8, layer_type="basic", **sizes)
    widths = {"encoder_in_channels": [16, 32, width], "encoder_hidden_dim": width, "d_model": 32}
    settings = {"decoder_in_channels": [width] * 3, "num_denoising": 4, **widths, **heads}
    names = {"rt_detr": "RTDetr", "rt_detr_v2": "RTDetrV2", "d_fine": "DFine"}
    config = getattr(hf, f"{names[kind]}Config")(backbone_config=backbone, **settings)
    return getattr(hf, f"{names[kind]}ForObjectDetection")(config)


def items(count: int = 12) -> list[dict[str, Any]]:
    """Noise of 64 × 96 pixels with one or two boxes."""
    generator = torch.Generator().manual_seed(3)
    boxes = [torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.3, 0.4]]), torch.tensor([[0.5, 0.5, 0.8, 0.6]])]
    return [
        {
            "pixel_values": torch.rand(3, 64, 96, generator=generator),
            "labels": {"class_labels": torch.arange(len(boxes[i % 2])), "boxes": boxes[i % 2]},
        }
        for i in range(count)
    ]


def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
    images: list[Tensor] = [item["pixel_values"] for item in batch]
    return {"pixel_values": torch.stack(images), "labels": [item["labels"] for item in batch]}


def trainer(model: nn.Module, folder: Any, *, expert: Any = None, distill: Any = None, **changes: Any) -> Any:
    """A Trainer with distillation; two images a batch, learning rate fixed."""
    import transformers as hf

    from rakd.integrations.transformers import DistillMixin

    class DistillTrainer(DistillMixin, hf.Trainer):
        pass

    settings: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "num_train_epochs": 2, "use_cpu": True,
        "report_to": [], "save_strategy": "epoch", "logging_steps": 2, "disable_tqdm": True, "learning_rate": 1e-3,
        "remove_unused_columns": False, "lr_scheduler_type": "constant", "seed": 1, **changes,
    }  # fmt: skip
    callbacks = settings.pop("callbacks", None)
    return DistillTrainer(
        model, hf.TrainingArguments(**settings), collate, items(), items(4),
        expert=expert, distill=distill, callbacks=callbacks,
    )  # fmt: skip
