"""`python -m fashionnet.predict`: pictures of the right form, of any other, and of none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fashionnet.data.published import SETS
from fashionnet.errors import UserError
from fashionnet.predict import predict

if TYPE_CHECKING:
    from tests.conftest import Commands, FinishedRun


CLASS_NAMES = SETS["fashion_mnist"].class_names


@pytest.fixture(scope="module")
def pictures(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the first training picture as a PNG, and two drawn photos of trousers."""
    from fashionnet.data import published

    folder = tmp_path_factory.mktemp("pictures")
    boot = published.load("fashion_mnist").train.images[0].numpy()
    Image.fromarray(boot).save(folder / "boot.png")
    for name, backdrop, cloth in (("dark", "white", "navy"), ("light", "black", "khaki")):
        photo = Image.new("RGB", (1200, 1600), backdrop)
        draw = ImageDraw.Draw(photo)
        draw.rectangle((400, 200, 800, 500), fill=cloth)
        draw.rectangle((400, 500, 560, 1400), fill=cloth)
        draw.rectangle((640, 500, 800, 1400), fill=cloth)
        photo.save(folder / f"{name} trousers.jpg")
    return folder


def answered(commands: Commands, run: FinishedRun, *images: str, cwd: Path) -> list[dict[str, Any]]:
    return list(json.loads(commands.succeed("predict", run.path, *images, "--json", cwd=cwd)))


def test_each_picture_gets_ten_probabilities_and_a_best_guess(
    commands: Commands, lesson: FinishedRun, pictures: Path
) -> None:
    images = ["boot.png", "dark trousers.jpg", "light trousers.jpg"]
    answers = answered(commands, lesson, *images, cwd=pictures)
    assert [entry["path"] for entry in answers] == images  # in the order they were given
    for entry in answers:
        probabilities = entry["probabilities"]
        assert set(probabilities) == set(CLASS_NAMES)
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)
        assert entry["best_guess"] == max(probabilities, key=probabilities.__getitem__)
    boot, dark, light = answers
    assert (boot["best_guess"], boot["steps"]) == ("Ankle boot", [])  # label 9: taken as it is
    assert dark["best_guess"] == light["best_guess"] == "Trouser"
    for entry, negated in ((dark, True), (light, False)):
        steps = "; ".join(entry["steps"])
        assert "turned gray" in steps and "scaled to" in steps and "padded to 28x28" in steps
        assert ("negated" in steps) is negated


def test_probabilities_are_those_of_the_network_for_the_pixels_as_they_are(
    commands: Commands, lesson: FinishedRun, pictures: Path
) -> None:
    import torch

    weights = torch.load(lesson.path / "checkpoints/last.pt", weights_only=True)["model"]
    w1, b1, w2, b2 = (weights[name].cpu().double().numpy() for name in weights)
    x = np.asarray(Image.open(pictures / "boot.png"), dtype=np.float64).reshape(1, 784) / 255
    logits = np.maximum(x @ w1.T + b1, 0) @ w2.T + b2
    expected = np.exp(logits)[0] / np.exp(logits).sum()
    (answer,) = answered(commands, lesson, "boot.png", cwd=pictures)
    assert [answer["probabilities"][name] for name in CLASS_NAMES] == pytest.approx(
        expected.tolist(), abs=1e-5
    )


def test_words_say_what_was_done_and_what_is_likely(
    commands: Commands, lesson: FinishedRun, pictures: Path
) -> None:
    printed = commands.succeed(
        "predict", lesson.path, "boot.png", "dark trousers.jpg", cwd=pictures
    )
    boot, as_it_is, likely, trousers, done, _ = printed.splitlines()
    assert boot == "boot.png: Ankle boot"
    assert "as it is" in as_it_is
    assert likely.strip().startswith("Ankle boot ") and likely.count("%") == 3
    assert trousers == "dark trousers.jpg: Trouser"
    assert "negated" in done


def test_one_unreadable_picture_of_several_is_refused_in_one_line_and_nothing_is_predicted(
    commands: Commands, lesson: FinishedRun, pictures: Path, tmp_path: Path
) -> None:
    boot, notes = pictures / "boot.png", tmp_path / "notes.png"
    notes.write_text("not a picture")
    done = commands.run("predict", lesson.path, boot, notes, boot, cwd=tmp_path)
    assert str(notes) in commands.error(done)
    assert done.stdout == ""
    with pytest.raises(UserError, match=r"missing\.png.*no such file"):
        predict(lesson.path, [boot, tmp_path / "missing.png"])


def test_wrong_run_is_refused(
    commands: Commands, failed: FinishedRun, pictures: Path, tmp_path: Path
) -> None:
    boot = pictures / "boot.png"
    assert "last.pt is missing" in commands.fail("predict", failed.path, boot, cwd=tmp_path)
    assert "IMAGE" in commands.fail("predict", failed.path, cwd=tmp_path)
    with pytest.raises(UserError, match="nowhere is not a folder"):
        predict(tmp_path / "nowhere", [boot])
    with pytest.raises(UserError, match=r"holds no run\.json"):
        predict(tmp_path, [boot])
