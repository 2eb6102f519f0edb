"""A run's final weights as models for use elsewhere, without this package.

python -m fashionnet.export RUN_DIR
python -m fashionnet.export RUN_DIR --format pt2 --out somewhere

Writes to RUN_DIR/export: model.pt2 (torch.export), model.onnx, and model.json, which describes
both. The models take batches of any number of uint8 pictures, shaped as in the run's data, and
return class probabilities: they scale the pixels and apply softmax themselves. Each model is loaded
back and compared with the run.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fashionnet.errors import UserError, first_line, is_out_of_memory, visible
from fashionnet.system import extras, terminal
from fashionnet.system.command_line import Parser, reported
from fashionnet.system.files import atomic_write, refuse_strange_below, remove_temporary

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

    from fashionnet.runs.saved import SavedRun

DESCRIPTION = "model.json"
FORMATS = ("pt2", "onnx")
TOLERANCE = 1e-4  # of a probability


@dataclass(frozen=True)
class Exported:
    """The files written: for each name, its size and largest difference from the run."""

    folder: Path
    files: dict[str, dict[str, Any]]
    largest_difference: float


def export(
    run_dir: str | Path,
    out: str | Path | None = None,
    formats: Sequence[str] | None = None,
    report: Callable[[str], object] = lambda line: None,
) -> Exported:
    """Writes the final weights of a completed run as models for use elsewhere.

    Replaces an earlier export once the new one is complete and checked.

    Args:
        out: folder to write to; None takes RUN_DIR/export.
        formats: some of `FORMATS`; None takes all whose packages are installed.
        report: function that receives one line per file, and other notices.

    Raises:
        UserError: the format is unknown, onnx is missing, the run is missing, damaged or not
            completed, the network cannot be exported, or its model differs from the run.
    """
    formats = _available(formats, report)
    from fashionnet.runs import directory, saved
    from fashionnet.system import devices, locks

    run = saved.read(run_dir)
    if (status := run.record["status"]) != "completed":
        raise UserError(f"{run.path} is {status}: only the weights of a completed run are final")
    if out is None:
        refuse_strange_below(run.path)  # the run will be written to, through any link in it
    if run.config.precision != "float32":
        report(f"in float32, not {run.config.precision}, which other runtimes may not know")
    folder = run.path / directory.EXPORT if out is None else Path(out)
    with locks.writing(folder):
        remove_temporary(folder, ".model.*.tmp")  # of an export that was killed
        with devices.started("cpu", run.config.threads, deterministic=False):
            files = _write(run, folder, [f"model.{name}" for name in formats], report)
    return Exported(folder, files, max(file["largest_difference"] for file in files.values()))


def _available(formats: Sequence[str] | None, report: Callable[[str], object]) -> Sequence[str]:
    for name in formats or ():
        if name not in FORMATS:
            raise UserError(f"format={name} is not known; choose {' or '.join(FORMATS)}")
    try:
        if formats is None or "onnx" in formats:
            packages = ("onnx", "onnxruntime", "onnxscript")
            extras.require("export to ONNX needs onnx", "export", *packages)
    except UserError as missing:
        if formats is not None:
            raise
        report(f"no model.onnx: {missing}")
        return FORMATS[:1]
    return [name for name in FORMATS if not formats or name in formats]


def _write(
    run: SavedRun, folder: Path, names: Sequence[str], report: Callable[[str], object]
) -> dict[str, dict[str, Any]]:
    import torch

    from fashionnet.training import evaluation

    shape = (8, *run.record["data"]["image_shape"])
    noise = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    contrast = torch.linspace(0, 1, len(noise)).view(-1, *[1] * (noise.ndim - 1))
    pixels = (noise * contrast).byte()
    expected = evaluation.probabilities(run.model, pixels, run.config.data.scale).float()
    if not torch.isfinite(expected).all():
        raise UserError(f"the network of {run.path} gives nan or infinite figures; train it anew")
    files = {}
    with contextlib.ExitStack() as stack:
        # The description is entered first, so it takes its place last, when all models have.
        places = [folder / name for name in (DESCRIPTION, *names)]
        description, *models = [stack.enter_context(atomic_write(path)) for path in places]
        with _exporting(run, "by torch.export"):
            program = _program(run, pixels)
        for name, file in zip(names, models, strict=True):
            with _exporting(run, f"as {name}"):
                size = file.write((_onnx if name == "model.onnx" else _pt2)(program))
                file.flush()
                answer = (_open_onnx if name == "model.onnx" else _open_pt2)(file.name)
                # Two batch sizes: an exporter may fix the size that it saw.
                answers = torch.cat([answer(pixels[:1]), answer(pixels[1:])])
            difference = float((answers - expected).abs().max())
            if not difference <= TOLERANCE:
                raise UserError(
                    f"{name} gives probabilities that differ from those of {run.path} by up to "
                    f"{difference:.1e}, more than {TOLERANCE}; leave it out by --format"
                )
            files[name] = {"bytes": size, "largest_difference": difference}
            report(f"{name}  {size:,} bytes, largest difference {difference:.1e}")
        described = _described(run) | {"files": files}
        description.write((json.dumps(described, indent=2) + "\n").encode())
        description.flush()
        if places[0].exists():  # an earlier export may have more files
            for old in {DESCRIPTION, *(f"model.{name}" for name in FORMATS)} - {*names}:
                (folder / old).unlink(missing_ok=True)
    return files


@contextlib.contextmanager
def _exporting(run: SavedRun, how: str) -> Iterator[None]:
    """Silences torch's exporters and reports their failure in one line."""
    disabled = logging.root.manager.disable
    logging.disable()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # exporters raise errors of all kinds
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise
        raise UserError(
            f"the network of {run.path} cannot be exported {how} ({first_line(error)}); choose "
            "another --format, or keep to tensor operations in its forward"
        ) from error
    finally:
        logging.disable(disabled)


def _program(run: SavedRun, pixels: Tensor) -> ExportedProgram:
    """Returns the graph from a batch of uint8 pictures, of any size, to probabilities."""
    import torch

    from fashionnet.training import evaluation

    class Served(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = run.model

        def forward(self, pictures: Tensor) -> Tensor:
            x = pictures.to(dtype) / run.config.data.scale
            return torch.softmax(self.network(x), 1).float()

    dtype = evaluation.dtype_of(run.model)
    sizes = ({0: torch.export.Dim("batch")},)
    served = Served().eval().requires_grad_(False)
    program = torch.export.export(served, (pixels,), dynamic_shapes=sizes)
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _pt2(program: ExportedProgram) -> bytes:
    import torch

    torch.export.save(program, content := io.BytesIO())
    return content.getvalue()


def _open_pt2(path: str) -> Callable[[Tensor], Tensor]:
    import torch

    module: torch.nn.Module = torch.export.load(io.BytesIO(Path(path).read_bytes())).module()
    return module


def _onnx(program: ExportedProgram) -> bytes:
    import torch

    written = torch.onnx.export(program, dynamo=True, verbose=False, output_names=["probabilities"])
    assert written is not None
    model: Any = written.model_proto
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del model.graph.value_info[:]  # intermediate values name the batch dimension differently
    for node in model.graph.node:
        del node.metadata_props[:]
    return bytes(model.SerializeToString())


def _open_onnx(path: str) -> Callable[[Tensor], Tensor]:
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(None, {"pictures": pixels.numpy()})[0])


def _described(run: SavedRun) -> dict[str, Any]:
    """Returns the content of model.json."""
    import torch

    from fashionnet.data.pictures import FORMS
    from fashionnet.models.transfer import Transfer
    from fashionnet.models.weights import weights_sha256
    from fashionnet.runs import facts

    names, shape = run.record["data"]["class_names"], run.record["data"]["image_shape"]
    photo = {"mode": "RGB", "upright": True, "on": "white", "resample": "bicubic, antialiased"}
    photo |= {"shorter_side": round(shape[-1] * 256 / 224), "center_crop": shape[-1]}
    plain = {"mode": "RGB" if len(shape) == 3 else "gray", "size": shape[-2:]}
    single = {"mode": "gray", "size": shape[-1], "shows": "one item, light on black, centered"}
    frozen = run.model.frozen_state() if isinstance(run.model, Transfer) else None
    here = facts.environment(torch.device("cpu"))
    return {
        "run": run.path.resolve().name,
        "class_names": names,
        "input": {"name": "pictures", "dtype": "uint8", "shape": ["batch", *shape]},
        "output": {"name": "probabilities", "dtype": "float32", "shape": ["batch", len(names)]},
        "pictures": {"photos": photo, **dict.fromkeys(FORMS, single)}.get(
            run.config.data.name, plain
        ),
        "weights_sha256": weights_sha256(run.model.state_dict()),
        "frozen_sha256": weights_sha256(frozen) if frozen else None,
        "versions": {"python": here["python"], **here["packages"]},
    }


@reported()
def main() -> None:
    """The command: `python -m fashionnet.export`."""
    parser = Parser("export", __doc__, "run_dir", "--json")
    parser.add_argument("--out", metavar="DIR", help="default: RUN_DIR/export")
    parser.add_argument(
        "--format",
        type=lambda names: names.split(","),
        metavar="NAMES",
        help=f"some of {','.join(FORMATS)}; default: all whose packages are installed",
    )
    given = parser.parse_args()
    report = partial(print, flush=True, file=sys.stderr if given.json else sys.stdout)
    with terminal.surviving():
        exported = export(given.run_dir, given.out, given.format, report)
    if given.json:
        print(json.dumps(asdict(exported) | {"folder": str(exported.folder)}))
    else:
        print(f"written to {visible(str(exported.folder))}")


if __name__ == "__main__":
    main()
