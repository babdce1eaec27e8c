"""Run a model of ``rakd export`` with onnxruntime, NumPy and Pillow alone: ``python onnx_model.py MODEL IMAGE CALIB``.

CALIB is a calibration file in KITTI's form. Prints a line an object: class, score, 2D box in the image's pixels,
height, width, length, the bottom's centre (x, y, z) in the camera's frame, all in metres, and rotation_y in radians.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

CLASSES = ("Car", "Pedestrian", "Cyclist")

if len(sys.argv) != 4:
    sys.exit(__doc__)
model, image, calib = sys.argv[1:]
session = onnxruntime.InferenceSession(model)
height, width = session.get_inputs()[0].shape[2:]
picture = ImageOps.exif_transpose(Image.open(image))
if picture.mode[0] in "IF":
    sys.exit(f"{image}: expected 8 bits a channel, got mode {picture.mode}")
picture = picture.convert("RGB")
small = picture.resize((max(1, round(picture.width * height / picture.height)), height), Image.Resampling.BILINEAR)
if small.width > width:
    sys.exit(f"{image}: {small.width} pixels wide at the model's height, it takes {width}")

padded = np.zeros((1, 3, height, width), np.float32)
padded[0, :, :, : small.width] = np.asarray(small, np.float32).transpose(2, 0, 1) / 255

# Pixels are counted from the centre of the first, which resizing moves.
x, y = small.width / picture.width, height / picture.height
lines = Path(calib).read_text(encoding="utf-8").splitlines()
numbers = next((line.split()[1:] for line in lines if line.startswith(("P2:", "P_rect_02:"))), ())
if len(numbers) != 12:
    sys.exit(f"{calib}: expected a line P2: with 12 numbers")
resize = np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]])
projection = resize @ np.array(numbers, np.float64).reshape(3, 4)

size = np.array(small.size, np.float32)
found = session.run(None, {"image": padded, "size": size, "projection": projection.astype(np.float32)})
boxes, classes, scores, dimensions, location, rotation, _ = found
boxes = (boxes + 0.5) / np.array([x, y, x, y]) - 0.5
for i, score in enumerate(scores):
    place = [*boxes[i], *dimensions[i], *location[i], rotation[i]]
    print(CLASSES[int(classes[i])], f"{score:.4f}", *(f"{value:.2f}" for value in place))
