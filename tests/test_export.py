"""`python -m fashionnet.export`: models that others use without this package, as the run answers.

timm's test_resnet is the backbone: the exporters take as long as a network has layers.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from fashionnet import export as exports
from fashionnet.data import published
from fashionnet.errors import UserError
from fashionnet.export import export
from fashionnet.models import backbones
from fashionnet.models.weights import weights_sha256
from fashionnet.predict import predict
from fashionnet.system import extras
from fashionnet.train import train
from fashionnet.training import features

if TYPE_CHECKING:
    from tests.conftest import Commands, FinishedRun

NAME = "test_resnet"
NUM = 7

# What someone does who has nothing but an exported folder and pictures: see its model.json.
USER = """
import json, sys
from pathlib import Path
import numpy as np
from PIL import Image

def pixels(path, told):
    size = told["input"]["shape"][-1]
    if told["pictures"]["mode"] == "gray":
        assert told["pictures"]["size"] == size
        return np.asarray(Image.open(path))
    shorter, crop = told["pictures"]["shorter_side"], told["pictures"]["center_crop"]
    photo = Image.open(path).convert("RGB")
    sides = [int(shorter * side / min(photo.size)) for side in photo.size]
    left, upper = (round((side - crop) / 2) for side in sides)
    photo = photo.resize(sides, Image.Resampling.BICUBIC)
    return np.asarray(photo.crop((left, upper, left + crop, upper + crop))).transpose(2, 0, 1)

def opened(kind, path):
    if kind == "pt2":
        import torch
        module = torch.export.load(path).module()
        return lambda x: module(torch.from_numpy(x)).numpy()
    import onnxruntime
    session = onnxruntime.InferenceSession(path)
    return lambda x: session.run(["probabilities"], {"pictures": x})[0]

kind, *folders = sys.argv[1:]
found = []
for folder in map(Path, folders):
    told = json.loads((folder / "model.json").read_text())
    x = np.stack([pixels(path, told) for path in sorted((folder / "pngs").iterdir())])
    assert x.dtype == told["input"]["dtype"]
    answer = opened(kind, str(folder / f"model.{kind}"))
    found.append([answer(x).tolist(), answer(x[:1]).tolist()])
assert not {"fashionnet", "torch" if kind == "onnx" else "onnx"} & sys.modules.keys()
print(json.dumps(found))
"""


@pytest.fixture(autouse=True, scope="module")
def _quick(one_thread: None) -> None:
    """Small networks on one thread."""


@pytest.fixture(scope="module")
def transfer_run(
    commands: Commands, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Trains the head of a tiny network whose random backbone counts as pretrained."""
    folder = tmp_path_factory.mktemp("transfer")
    torch.manual_seed(0)
    backbone, _ = backbones.build("timm", NAME)
    backbone(torch.rand(64, 3, 32, 32))  # so that the batch statistics are some
    torch.save(backbone.state_dict(), folder / "w.pth")

    def trained(name: str, *overrides: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(features, "cache_folder", lambda: folder / "features")
            patch.setattr("fashionnet.data.photos.default_root", lambda: folder)
            train(
                *("model=timm", f"model.name={NAME}", f"model.pretrained={folder / 'w.pth'}"),
                *("epochs=5", "batch_size=8", "optimizer.lr=0.02", "device=cpu", *overrides),
                run_dir=folder / name,
            )
        return folder / name

    return trained


@pytest.fixture(scope="module")
def mlp(
    commands: Commands,
    small: tuple[FinishedRun, FinishedRun],
    tmp_path_factory: pytest.TempPathFactory,
) -> FinishedRun:
    """A run that tests may write to."""
    path = tmp_path_factory.mktemp("mlp") / "run"
    shutil.copytree(small[0].path, path)
    return commands.opened(path)


@pytest.fixture(scope="module")
def told(commands: Commands, mlp: FinishedRun) -> str:
    """What the command printed when it exported the MLP, on a machine without the data."""
    return commands.succeed("export", "run", cwd=mlp.path.parent, FASHIONNET_DATA="none")


@pytest.fixture(scope="module")
def on_photos(transfer_run: Callable[..., Path], photos: Path) -> Path:
    path = transfer_run("photos", "data=photos", f"data.root={photos}", "data.size=32")
    export(path)
    return path


@pytest.fixture(scope="module")
def resized(transfer_run: Callable[..., Path]) -> Path:
    """Trained on Fashion-MNIST, brought to another size by the network."""
    few = ("data.classes=[Bag,Sandal,Coat]", "validation_split=0.01", "data.limit=200")
    path = transfer_run("resized", *few, "model.size=40", "model.head_stages=3")
    export(path)
    return path


@pytest.fixture(scope="module")
def pngs(
    told: str, mlp: FinishedRun, on_photos: Path, resized: Path, photos: Path
) -> dict[Path, list[Path]]:
    """Pictures to ask each run about, put beside its exported models."""
    images = published.load("fashion_mnist").train.images[:NUM].numpy()
    for run in (mlp.path, on_photos, resized):
        folder = run / "export/pngs"
        folder.mkdir()
        for i in range(NUM):
            if run == on_photos:
                color = ("red", "green", "blue")[i % 3]
                shutil.copy(photos / f"val/{color}/{i}.png", folder / f"{i}.png")
            else:
                Image.fromarray(images[i]).save(folder / f"{i}.png")
    return {run: sorted((run / "export/pngs").iterdir()) for run in (mlp.path, on_photos, resized)}


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_models_answer_elsewhere_as_the_run_does(
    kind: str, commands: Commands, pngs: dict[Path, list[Path]], tmp_path: Path
) -> None:
    line = [sys.executable, "-c", USER, kind, *(str(run / "export") for run in pngs)]
    done = commands.call(line, tmp_path)
    assert done.returncode == 0, done.stderr
    for (run, paths), (rows, alone) in zip(pngs.items(), json.loads(done.stdout), strict=True):
        names = described(run)["class_names"]
        expected = [[said.probabilities[name] for name in names] for said in predict(run, paths)]
        assert np.shape(rows) == (NUM, len(names)) and np.shape(alone) == (1, len(names))
        np.testing.assert_allclose(rows, expected, atol=1e-4, rtol=0)
        np.testing.assert_allclose(alone, expected[:1], atol=1e-4, rtol=0)
        assert np.std(expected, 0).max() > 0.05  # the network tells the pictures apart


def described(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "export/model.json").read_text()))


def test_the_command_reports_size_and_difference_of_each_file(told: str, mlp: FinishedRun) -> None:
    pt2, onnx, written = told.splitlines()
    for line, name in ((pt2, "model.pt2"), (onnx, "model.onnx")):
        size = (mlp.path / "export" / name).stat().st_size
        assert line.startswith(f"{name}  {size:,} bytes, largest difference ")
        assert float(line.split()[-1]) == pytest.approx(
            described(mlp.path)["files"][name]["largest_difference"], rel=0.1
        )
    assert written == "written to run/export"


def test_the_description_names_classes_input_and_weights(told: str, mlp: FinishedRun) -> None:
    about = described(mlp.path)
    assert about["run"] == "run"
    assert about["class_names"] == list(published.SETS["fashion_mnist"].class_names)
    assert about["input"] == {"name": "pictures", "dtype": "uint8", "shape": ["batch", 28, 28]}
    assert about["weights_sha256"] == mlp.record["weights_sha256"]
    assert about["frozen_sha256"] is None
    assert about["versions"]["torch"] == torch.__version__


def test_frozen_weights_are_named_too(on_photos: Path) -> None:
    about = described(on_photos)
    frozen = torch.load(on_photos / "checkpoints/frozen.pt", weights_only=True)["model"]
    assert about["frozen_sha256"] == weights_sha256(frozen)
    assert about["input"]["shape"] == ["batch", 3, 32, 32]
    record = json.loads((on_photos / "run.json").read_text())
    assert about["weights_sha256"] == record["weights_sha256"]


def test_the_test_set_stays_sealed_and_no_path_of_this_machine_is_written(
    told: str, mlp: FinishedRun, resized: Path
) -> None:
    assert mlp.record["test"]["evaluations"] == 1
    assert not (mlp.path.parent / "none").exists()  # nor was any other data asked for
    for file in (*(mlp.path / "export").iterdir(), *(resized / "export").iterdir()):
        if file.is_file():
            content = file.read_bytes()
            for path in (Path(exports.__file__).parent, resized.parent, mlp.path):
                assert str(path).encode() not in content, file


def test_any_precision_is_exported_in_float32(resized: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(resized, run, ignore=shutil.ignore_patterns("export"))
    record = json.loads((run / "run.json").read_text())
    record["config"]["precision"] = "bfloat16"
    (run / "run.json").write_text(json.dumps(record))
    lines: list[str] = []
    assert list(export(run, formats=["pt2"], report=lines.append).files) == ["model.pt2"]
    assert lines[0].startswith("in float32, not bfloat16")
    x = published.load("fashion_mnist").train.images[:NUM]
    exact, same = (
        torch.export.load(path / "export/model.pt2").module()(x) for path in (resized, run)
    )
    torch.testing.assert_close(same, exact, atol=1e-6, rtol=0)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "pngs")


def test_a_new_export_takes_the_place_of_the_old_and_of_what_was_left(
    told: str, mlp: FinishedRun, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.onnx").touch()
    for name in ("model.onnx", "model.pt2", "model.json"):
        shutil.copy(mlp.path / "export" / name, out)
    (out / ".model.pt2.1.tmp").write_text("half")
    exported = export(mlp.path, out, ["pt2"])
    assert exported.folder == out
    assert 0 <= exported.largest_difference < 1e-6
    assert names_in(out) == ["mine.onnx", "model.json", "model.pt2"]
    assert list(json.loads((out / "model.json").read_text())["files"]) == ["model.pt2"]


def wrong(answer: Callable[[Any], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
    return lambda pixels: answer(pixels) + (1e-3 if len(pixels) > 1 else 0)


def test_a_model_that_differs_is_refused_and_changes_nothing(
    told: str, mlp: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = exports._open_onnx
    monkeypatch.setattr(exports, "_open_onnx", lambda path: wrong(sound(path)))
    folder = mlp.path / "export"
    before = {name: (folder / name).read_bytes() for name in names_in(folder)}
    for out in (None, tmp_path / "new/folder"):
        with pytest.raises(UserError, match=r"model\.onnx gives .* up to 1\.0e-03.*--format"):
            export(mlp.path, out)
    assert {name: (folder / name).read_bytes() for name in names_in(folder)} == before
    assert not (tmp_path / "new").exists()


def test_a_network_that_cannot_be_exported_is_refused_in_one_line(
    mlp: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(program: object) -> bytes:
        raise RuntimeError("no such operator\nand much more")

    monkeypatch.setattr(exports, "_pt2", broken)
    with pytest.raises(UserError) as told:
        export(mlp.path, tmp_path / "out", ["pt2"])
    assert "cannot be exported as model.pt2 (no such operator)" in str(told.value)
    assert not (tmp_path / "out").exists()


def test_without_onnx_the_other_format_is_written(
    mlp: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    lines: list[str] = []
    assert list(export(mlp.path, tmp_path / "out", report=lines.append).files) == ["model.pt2"]
    needs = f"export to ONNX needs onnx: {extras.install_command('export')}"
    assert lines[0] == f"no model.onnx: {needs}"
    with pytest.raises(UserError) as told:
        export(mlp.path, tmp_path / "other", ["pt2", "onnx"])
    assert str(told.value) == needs


def test_json_is_the_whole_answer(
    mlp: FinishedRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = str(tmp_path / "out")
    arguments = ["export", str(mlp.path), "--format", "pt2", "--out", out, "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    exports.main()
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert answer["folder"] == out and list(answer["files"]) == ["model.pt2"]
    assert answer["largest_difference"] == answer["files"]["model.pt2"]["largest_difference"]
    assert printed.err.startswith("model.pt2  ")


def test_a_run_that_is_not_completed_is_refused(
    commands: Commands, mlp: FinishedRun, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"holds no run\.json"):
        export(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(mlp.path, copy, ignore=shutil.ignore_patterns("export"))
    commands.opened(copy).edit(status="interrupted")
    with pytest.raises(UserError, match="copy is interrupted: only the weights of a completed"):
        export(copy)
    assert not (copy / "export").exists()


def test_a_link_out_of_the_run_is_not_followed(mlp: FinishedRun, tmp_path: Path) -> None:
    copy, elsewhere = tmp_path / "copy", tmp_path / "elsewhere"
    shutil.copytree(mlp.path, copy, ignore=shutil.ignore_patterns("export"))
    elsewhere.mkdir()
    (copy / "export").symlink_to(elsewhere)
    with pytest.raises(UserError, match="leads out of"):
        export(copy)
    assert not any(elsewhere.iterdir())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--format", "pt2,tflite"), "format=tflite is not known; choose pt2 or onnx"),
        (("--out", "file/out"), "cannot use 'file/out': Not a directory; choose another path"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(
    given: tuple[str, str],
    said: str,
    mlp: FinishedRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["export", str(mlp.path), *given])
    with pytest.raises(SystemExit) as ended:
        exports.main()
    assert ended.value.code == 2
    assert tuple(capsys.readouterr()) == ("", f"error: {said}\n")
