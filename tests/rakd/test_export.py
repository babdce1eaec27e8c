"""Detectors outside PyTorch: torch.export, ONNX, and the commands that take an ONNX model."""

import contextlib
import csv
import io
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from rakd.cli import main
from rakd.commands.models import open_model
from rakd.data.frames import find_frames
from rakd.data.kitti import KittiDataset, Sample, collate
from rakd.data.labels import read_results
from rakd.detector import export
from rakd.detector.configs import DetectorConfig
from rakd.detector.detector import Detector
from rakd.detector.export import Deployed, check_onnx, export_program, translations
from rakd.detector.files import load_detector, save_detector
from rakd.detector.inference import detect
from rakd.detector.onnx_model import METADATA, OUTPUTS, OnnxDetector, model_inputs
from rakd.errors import MissingFileError, UserError
from rakd_ops import multilevel_roi_align


@pytest.fixture(scope="module")
def samples(scenes: Path) -> list[Sample]:
    dataset = KittiDataset(scenes, "train", height=64)
    return [dataset[i] for i in range(4)]


@pytest.fixture(scope="module")
def detector(small_config: DetectorConfig, samples: list[Sample]) -> Detector:
    """One whose scores differ enough for a mistake to show."""
    made = Detector(replace(small_config, width=224), seed=1)
    update_bn([collate(samples, size=(224, 64)).images], made.pyramid)
    with torch.no_grad():
        made.box_head.scores.weight.mul_(20)
    return made.eval()


@pytest.fixture(scope="module")
def program(detector: Detector) -> torch.export.ExportedProgram:
    return export_program(detector)


@dataclass(frozen=True)
class Exported:
    """What the command wrote, from a detector's file, and printed."""

    file: Path
    text: str


@pytest.fixture(scope="module")
def exported(
    detector: Detector,
    program: torch.export.ExportedProgram,
    scenes: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Exported:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'rakd[export]'")
    folder = tmp_path_factory.mktemp("onnx")
    save_detector(folder / "detector.pt", detector)
    out, printed = folder / "small.onnx", io.StringIO()
    arguments = ["export", str(folder / "detector.pt"), "--out", str(out), "--data", str(scenes), "--frames", "2"]

    def traced(own: Detector) -> torch.export.ExportedProgram:
        """Of the same detector, rather than traced again: that takes seconds."""
        assert own.config == detector.config
        weights = detector.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in own.state_dict().items())
        return program

    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(printed):
        monkeypatch.setattr(export, "export_program", traced)
        assert main(arguments) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["detector.pt", "small.onnx"]
    return Exported(out, printed.getvalue())


@pytest.fixture(scope="module")
def file(exported: Exported) -> Path:
    return exported.file


@pytest.fixture(scope="module")
def model(file: Path) -> OnnxDetector:
    return OnnxDetector(file)


def test_threads_of_onnxruntime_leave_the_cores_to_others(model: OnnxDetector) -> None:
    # Spinning, they made the latency of a detector in PyTorch, in turns with this one, 2.6 times what it is.
    entry = "session.intra_op.allow_spinning"
    assert model.session.get_session_options().get_session_config_entry(entry) == "0"


def test_onnxruntime_has_as_many_threads_as_torch(file: Path) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert OnnxDetector(file).session.get_session_options().intra_op_num_threads == threads
    finally:
        torch.set_num_threads(before)


def test_torch_export_gives_the_same_detections(
    detector: Detector, program: torch.export.ExportedProgram, samples: list[Sample]
) -> None:
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"rakd_ops.align.default", "rakd_ops.prepare_boxes.default"} <= names
    deployed, counts = program.module(), set()
    for sample in samples:
        inputs = [torch.from_numpy(value) for value in model_inputs(detector.config, sample).values()]
        with torch.no_grad():
            found = deployed(*inputs)
        (expected,) = detector.predict(inputs[0], [(sample.image.shape[2], 64)], [sample.calibration])
        values = dict(zip(OUTPUTS, found, strict=True))
        counts.add(len(expected))
        np.testing.assert_allclose(values["scores"].numpy(), expected.scores, rtol=1e-6)
        # The camera is float32 here.
        np.testing.assert_allclose(values["location"].numpy(), expected.location, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(values["rotation_y"].numpy(), expected.rotation_y, atol=1e-5)
    assert max(counts) > 0


def test_onnxruntime_finds_what_pytorch_finds(detector: Detector, model: OnnxDetector, samples: list[Sample]) -> None:
    found = check_onnx(detector, model, samples)
    assert found.detections > 4 and found.unmatched == 0
    # float32 through some twenty layers in another order of sums; pixels and metres are in the tens.
    assert max(found.worst.values()) < 2e-3, found


def test_a_wrong_model_is_found_out(
    detector: Detector, model: OnnxDetector, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = OnnxDetector.run

    def far(own: OnnxDetector, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        values = run(own, inputs)
        values[OUTPUTS.index("location")] = values[OUTPUTS.index("location")] + np.float32(0.5)
        return values

    def fewer(own: OnnxDetector, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [value[1:] for value in run(own, inputs)]

    def lost(own: OnnxDetector, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        values = run(own, inputs)
        values[OUTPUTS.index("scores")] = values[OUTPUTS.index("scores")] * np.float32(np.nan)
        return values

    monkeypatch.setattr(OnnxDetector, "run", lost)
    assert check_onnx(detector, model, samples).worst["scores"] == math.inf
    monkeypatch.setattr(OnnxDetector, "run", far)
    assert check_onnx(detector, model, samples).worst["location"] > 1e-3
    monkeypatch.setattr(OnnxDetector, "run", fewer)
    assert check_onnx(detector, model, samples).unmatched == len(samples)


def test_the_model_holds_standard_operators_alone(file: Path) -> None:
    import onnx

    graph = onnx.load(file)
    assert {(opset.domain, opset.version) for opset in graph.opset_import} == {("", 18)}
    assert not graph.functions
    assert {node.domain for node in graph.graph.node} == {""}
    assert sum(node.op_type == "RoiAlign" for node in graph.graph.node) == 8  # 4 levels, for two stages of heads
    assert [output.name for output in graph.graph.output] == list(OUTPUTS)


def test_the_detectors_agree_in_one_interface(detector: Detector, model: OnnxDetector, samples: list[Sample]) -> None:
    assert model.config == detector.config
    cpu = torch.device("cpu")
    for sample in samples:
        own, other = detect(detector, sample, cpu), detect(model, sample, cpu)
        assert own.types.tolist() == other.types.tolist()
        np.testing.assert_allclose(own.boxes, other.boxes, atol=2e-3)


class Pooling(nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        return multilevel_roi_align(
            list(inputs[:4]), list(inputs[4:]), output_size=(3, 5), assignment="soft", canonical_size=30.0
        )


def test_pooling_of_several_images_with_soft_levels() -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'rakd[export]'")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'rakd[export]'")
    rng = torch.Generator().manual_seed(0)
    maps = [torch.rand(2, 6, 64 // s, 96 // s, generator=rng) for s in (4, 8, 16, 32)]
    corner = torch.rand(2, 7, 2, generator=rng) * 70 - 10  # some reach beyond the maps
    boxes = list(torch.cat([corner, corner + 60 * torch.rand(2, 7, 2, generator=rng)], dim=2))
    boxes[1] = boxes[1][:4]
    boxes[0][0, 2:] = boxes[0][0, :2]  # an empty one
    inputs = (*maps, *boxes)
    program = torch.onnx.export(
        torch.export.export(Pooling(), inputs, strict=False), dynamo=True, custom_translation_table=translations()
    )
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [value.name for value in session.get_inputs()]
    (got,) = session.run(None, dict(zip(names, (value.numpy() for value in inputs), strict=True)))
    np.testing.assert_allclose(got, Pooling()(*inputs), atol=1e-5)


@pytest.fixture
def run_folder(detector: Detector, tmp_path: Path) -> Iterator[Path]:
    save_detector(tmp_path / "detector.pt", detector)
    yield tmp_path


def test_the_command_tells_what_it_compared(exported: Exported) -> None:
    assert (
        "compared with PyTorch: " in exported.text
        and "detections in 2 frames, 0 found by one side alone" in exported.text
        and "largest differences: boxes" in exported.text
    )


def test_a_model_that_differs_is_not_kept(
    run_folder: Path, file: Path, scenes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Any model differs by more than this; the one that is there is as good as another.
    monkeypatch.setattr(export, "export_onnx", lambda detector, path: shutil.copy(file, path))
    out = run_folder / "small.onnx"
    out.write_text("an earlier one")
    arguments = ["export", str(run_folder / "detector.pt"), "--out", str(out), "--data", str(scenes), "--frames", "2"]
    assert main([*arguments, "--tolerance", "1e-12"]) == 2
    assert "differs from PyTorch by more than --tolerance, 1e-12, and is not kept" in capsys.readouterr().err
    assert out.read_text() == "an earlier one" and len(list(run_folder.glob("*.onnx"))) == 1
    assert main(arguments) == 0
    assert out.read_bytes() == file.read_bytes()


def test_predict_and_latency_take_the_model(
    run_folder: Path, file: Path, scenes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run_folder / "small.onnx"
    shutil.copy(file, out)
    frame = find_frames(scenes)[0]
    for name in ("detector.pt", "small.onnx"):
        options = ["--calib", str(frame.calib), "--checkpoint", str(run_folder / name), "--device", "cpu"]
        assert main(["predict", str(frame.image), *options, "--out", str(run_folder / f"of {name}")]) == 0
    lines = [(run_folder / f"of {name}" / f"{frame.id}.txt").read_text() for name in ("detector.pt", "small.onnx")]
    assert [row.split()[0] for row in lines[0].splitlines()] == [row.split()[0] for row in lines[1].splitlines()]
    capsys.readouterr()
    written: list[Detector] = []

    def write(own: Detector, path: Path) -> None:
        """The same detector's model: writing it anew takes seconds."""
        written.append(own)
        shutil.copy(file, path)

    monkeypatch.setattr(export, "export_onnx", write)
    table = run_folder / "latency.csv"
    names = [str(run_folder / "detector.pt"), str(out)]
    options = ["--forms", "eager", "onnxruntime", "--repeats", "1", "--device", "cpu", "--out", str(table)]
    assert main(["latency", *names, *options]) == 0
    assert "--forms" not in capsys.readouterr().err
    assert main(["latency", str(out), "--forms", "compiled", "--repeats", "1", "--device", "cpu"]) == 0
    assert "--forms does nothing for ONNX models" in capsys.readouterr().err
    assert [own.config for own in written] == [load_detector(run_folder / "detector.pt").config]
    with table.open() as opened:
        rows = list(csv.DictReader(opened))
    assert [row["runs"] for row in rows] == ["eager", "onnxruntime", "onnxruntime"]
    assert [row["parameters"] != "" for row in rows] == [True, False, False]


def test_the_example_needs_neither_torch_nor_rakd(file: Path, scenes: Path, tmp_path: Path) -> None:
    frame = find_frames(scenes)[0]
    options = ["--calib", str(frame.calib), "--checkpoint", str(file), "--device", "cpu", "--no-pictures"]
    assert main(["predict", str(frame.image), *options, "--out", str(tmp_path)]) == 0
    expected = read_results(tmp_path / f"{frame.id}.txt")
    example = Path(__file__).parents[2] / "examples" / "onnx_model.py"
    script = "import runpy, sys; sys.modules.update(torch=None, rakd=None); runpy.run_path(sys.argv.pop(1))"
    done = subprocess.run(
        [sys.executable, "-c", script, str(example), str(file), str(frame.image), str(frame.calib)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for words, message in (
        ([str(file), str(frame.image)], "Run a model of"),
        ([str(file), str(frame.image), str(frame.label)], f"{frame.label}: expected a line P2: with 12 numbers"),
    ):
        refused = subprocess.run([sys.executable, str(example), *words], capture_output=True, text=True, check=False)
        assert refused.returncode == 1 and refused.stderr.startswith(message)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) > 5 and [row[0] for row in rows] == expected.types.tolist()
    assert expected.scores is not None
    table = np.array([[float(value) for value in row[1:]] for row in rows])
    places = (expected.boxes, expected.dimensions, expected.location, expected.rotation_y[:, None])
    np.testing.assert_allclose(table, np.concatenate([expected.scores[:, None], *places], axis=1), atol=0.0051)


def test_onnxruntime_without_a_gpu_beside_a_torch_that_has_one(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'rakd[export]'")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.warns(UserWarning, match=r"this onnxruntime computes on the CPU alone"):
        model = open_model(file, torch.device("cuda"))
    assert isinstance(model, OnnxDetector) and model.session.get_providers() == ["CPUExecutionProvider"]
    with pytest.raises(UserError, match="expected CUDAExecutionProvider for device cuda, this onnxruntime started"):
        open_model(file, torch.device("cuda"), needed=True)


def test_a_provider_that_cannot_start_is_no_gpu(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'rakd[export]'")
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    # As onnxruntime-gpu does where a library of CUDA is missing: it goes on without.
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda path, options, providers: session(path, options))
    with pytest.raises(UserError, match="expected CUDAExecutionProvider for device cuda, this onnxruntime started"):
        OnnxDetector(file, torch.device("cuda"))
    with pytest.warns(UserWarning, match="this onnxruntime computes on the CPU alone"):
        assert OnnxDetector(file, torch.device("cuda"), needed=False).device.type == "cpu"
    assert OnnxDetector(file).session.get_providers() == ["CPUExecutionProvider"]


def test_what_is_refused(run_folder: Path, detector: Detector, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'rakd[export]'")
    with pytest.raises(MissingFileError, match="expected an ONNX model of rakd export"):
        OnnxDetector(run_folder / "none.onnx")
    (run_folder / "text.onnx").write_text("no model")
    with pytest.raises(UserError, match="cannot be read as an ONNX model"):
        OnnxDetector(run_folder / "text.onnx")
    import onnx

    bare = onnx.load(file)
    (settings,) = [entry for entry in bare.metadata_props if entry.key == METADATA]
    assert json.loads(settings.value) == json.loads(json.dumps(asdict(detector.config)))
    del bare.metadata_props[:]
    onnx.save(bare, run_folder / "bare.onnx")
    with pytest.raises(UserError, match="it has no property 'rakd_detector'"):
        OnnxDetector(run_folder / "bare.onnx")
    for settings in ("no JSON", "[1]", '{"backbone": {"name": "x"}, "newfield": 1}', "{}"):
        onnx.helper.set_model_props(bare, {METADATA: settings})
        onnx.save(bare, run_folder / "odd.onnx")
        with pytest.raises(UserError, match=r"odd\.onnx: expected a detector's settings in its property"):
            OnnxDetector(run_folder / "odd.onnx")
    for arguments, message in (
        (["--out", str(run_folder / "a.pt")], "--out: expected a name that ends in .onnx"),
        (["--frames", "0"], "--frames must be 1 or more, got 0"),
        (["--tolerance", str(math.nan)], "--tolerance must be positive, got nan"),
    ):
        assert main(["export", str(run_folder / "detector.pt"), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["export", str(file), "--out", str(run_folder / "b.onnx")]) == 2
    assert "is an ONNX model already" in capsys.readouterr().err
    with pytest.raises(UserError, match="export needs a detector with a fixed width"):
        export_program(Detector(replace(detector.config, width=None)))


def test_deployed_detectors_find_nothing_without_an_error(detector: Detector, samples: list[Sample]) -> None:
    shy = Detector(replace(detector.config, heads=replace(detector.config.heads, score_limit=0.999)), seed=3).eval()
    with torch.no_grad():
        found = Deployed(shy)(*map(torch.from_numpy, model_inputs(shy.config, samples[0]).values()))
    assert [len(values) for values in found] == [0] * 7
