"""YOLO11s teaches YOLO11n on rendered street scenes, in ultralytics' own trainer (AGPL-3.0: see the README)."""

import argparse
from pathlib import Path

from ultralytics import YOLO

from rakd.data.boxes2d import write_yolo
from rakd.integrations.ultralytics import distill
from rakd.scenes import make_scenes

parser = argparse.ArgumentParser(description=__doc__)
for name, default in {"out": "runs/ultralytics", "frames": 300, "size": 320, "epochs": 40}.items():
    parser.add_argument(f"--{name}", type=type(default), default=default)
run = parser.parse_args()

out = Path(run.out).absolute()
make_scenes(out / "kitti", run.frames, size=(run.size, run.size // 2))
data = write_yolo(out / "kitti", out / "yolo")
settings = {"data": str(data), "epochs": run.epochs, "imgsz": run.size, "batch": 8}
settings |= {"project": str(out), "exist_ok": True, "plots": False, "verbose": False}

expert = YOLO("yolo11s.yaml")
print("expert:     mAP50-95", expert.train(name="expert", **settings).box.map)

alone = YOLO("yolo11n.yaml")
print("apprentice: mAP50-95", alone.train(name="alone", **settings).box.map)

distilled = distill(YOLO("yolo11n.yaml"), expert, weight="auto:10", normalize=True)
print("distilled:  mAP50-95", distilled.train(name="distilled", **settings).box.map)
