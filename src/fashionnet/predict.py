"""Class probabilities of pictures, each converted to the form that the network was trained on.

A network for Fashion-MNIST, MNIST or KMNIST takes a picture of 28×28 gray pixels as it is.

python -m fashionnet.predict RUN_DIR shirt.png photo.jpg
python -m fashionnet.predict RUN_DIR photo.jpg --json
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fashionnet.errors import visible
from fashionnet.system.command_line import Parser, reported

if TYPE_CHECKING:
    from fashionnet.data.pictures import Picture


@dataclass(frozen=True)
class Prediction:
    """A network's answer for one picture.

    Attributes:
        steps: what was done to the picture first, in words; () for one taken as it is.
        probabilities: by class name, most probable first; they add up to 1.
    """

    path: str
    steps: tuple[str, ...]
    probabilities: dict[str, float]

    @property
    def best_guess(self) -> str:
        """The most probable class."""
        return next(iter(self.probabilities))


def predict(
    run_dir: str | Path, images: Sequence[str | Path], device: str | None = None
) -> list[Prediction]:
    """Predicts the class of each picture file with the final weights of a run.

    Raises:
        UserError: no run, a damaged one, or a file that is not a picture.
    """
    import torch

    from fashionnet.runs import saved
    from fashionnet.training import evaluation

    run = saved.read(run_dir)
    data, shape = run.config.data, run.record["data"]["image_shape"]
    read = [_read(image, data.name, shape) for image in images]
    if not read:
        return []
    with run.on_device(device) as (chosen, model):
        pixels = torch.stack([picture.pixels for picture in read]).to(chosen)
        rows = evaluation.probabilities(model, pixels, data.scale).tolist()
    names = run.record["data"]["class_names"]
    predictions = []
    for picture, row in zip(read, rows, strict=True):
        ranked = sorted(zip(names, row, strict=True), key=lambda pair: -pair[1])
        predictions.append(Prediction(picture.path, picture.steps, dict(ranked)))
    return predictions


def _read(path: str | Path, data: str, shape: Sequence[int]) -> Picture:
    """Reads a picture in the form of those of a data set, `data.name` in the configuration."""
    from fashionnet.data import photos, pictures

    if data in pictures.FORMS:
        return pictures.read(path, pictures.FORMS[data])
    return photos.read(path, shape[-1]) if data == "photos" else pictures.read_resized(path, shape)


def describe(prediction: Prediction) -> str:
    """Returns a prediction in words: what was done, the best guess, the three likeliest classes."""
    shown = list(prediction.probabilities.items())[:3]
    done = "; ".join(prediction.steps) or "taken as it is"
    return "\n".join(
        (
            f"{visible(prediction.path)}: {visible(prediction.best_guess)}",
            f"  picture: {done}",
            "  " + ", ".join(f"{visible(name)} {p:.1%}" for name, p in shown),
        )
    )


@reported()
def main() -> None:
    """The command: `python -m fashionnet.predict`."""
    parser = Parser("predict", __doc__, "run_dir", "--device", "--json")
    parser.add_argument("images", metavar="IMAGE", nargs="+")
    given = parser.parse_args()
    predictions = predict(given.run_dir, given.images, given.device)
    if given.json:
        rows = [{**asdict(p), "best_guess": p.best_guess} for p in predictions]
        print(json.dumps(rows, indent=2))
    else:
        print(os.linesep.join(describe(prediction) for prediction in predictions))


if __name__ == "__main__":
    main()
