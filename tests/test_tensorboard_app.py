"""Runs in the real TensorBoard: its server on loopback, asked directly and through a browser.

The folder that FASHIONNET_SCREENSHOTS names keeps what the browser showed.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Commands

pytestmark = pytest.mark.slow

PATIENCE = 90  # seconds until something that comes must be there
RUNS = [
    *("dropout,seed=0/tensorboard/mistakes", "dropout,seed=0/tensorboard/train"),
    *("dropout,seed=0/tensorboard/validation",),
    *("plain,seed=0/tensorboard/train", "plain,seed=0/tensorboard/validation"),
]


def until(what: Callable[[], Any], told: str) -> Any:
    """Returns what `what` returns once that is true."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.2)
    pytest.fail(f"{told} did not come in {PATIENCE} s")


@pytest.fixture(scope="module")
def logs(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of three epochs, one of them with its mistakes."""
    folder = tmp_path_factory.mktemp("tensorboard")
    for name, model in (("plain", "mlp_no_dropout"), ("dropout", "mlp")):
        commands.succeed(
            *("train", f"model={model}", "epochs=3", "data.limit=2000"),
            f"hydra.run.dir='logs/{name},seed=0'",
            cwd=folder,
        )
    commands.succeed("mistakes", "logs/dropout,seed=0", cwd=folder)
    return folder / "logs"


class Server:
    """TensorBoard on a port of its own choice."""

    def __init__(self, logs: Path) -> None:
        line = (sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--port", "0")
        self.log = logs.parent / "tensorboard.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen([*line, "--host", "127.0.0.1"], stderr=log, stdout=log)
        address = until(self._address, "TensorBoard")
        self.port = int(address.group(1))
        self.url = f"http://127.0.0.1:{self.port}/"

    def _address(self) -> re.Match[str] | None:
        assert self.process.poll() is None, self.log.read_text()
        return re.search(r"http://127\.0\.0\.1:(\d+)/", self.log.read_text())

    def ask(self, path: str, body: Any = None, **query: str | int) -> Any:
        """Returns the answer of TensorBoard's API: JSON, or the bytes of a picture."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request(
            "GET" if body is None else "POST",
            f"/data/{path}?{urlencode(query)}",
            None if body is None else json.dumps(body),
            {"Content-Type": "application/json"},
        )
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status == 200, content
        is_json = (answer.getheader("Content-Type") or "").startswith("application/json")
        return json.loads(content) if is_json else content


@pytest.fixture(scope="module")
def server(logs: Path) -> Iterator[Server]:
    server = Server(logs)
    try:
        until(lambda: len(server.ask("runs")) == len(RUNS), "the runs")
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def history(logs: Path, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (logs / run / "history.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------ the server


def test_the_list_of_runs_has_no_other(server: Server) -> None:
    assert sorted(server.ask("runs")) == RUNS


def test_train_and_validation_are_on_one_chart(server: Server, logs: Path) -> None:
    for run in ("plain,seed=0", "dropout,seed=0"):
        for split, prefix in (("train", ""), ("validation", "val_")):
            for figure in ("loss", "accuracy"):
                points = server.ask(
                    "plugin/scalars/scalars",
                    run=f"{run}/tensorboard/{split}",
                    tag=f"epoch_{figure}",
                )
                expected = [(row["epoch"], row[prefix + figure]) for row in history(logs, run)]
                assert [step for _, step, _ in points] == [epoch for epoch, _ in expected]
                assert [value for *_, value in points] == pytest.approx([v for _, v in expected])


def test_the_hparams_tab_has_a_row_for_each_run(server: Server, logs: Path) -> None:
    statuses = [f"STATUS_{word}" for word in ("UNKNOWN", "SUCCESS", "FAILURE", "RUNNING")]
    request = {"allowedStatuses": statuses, "startIndex": 0, "sliceSize": 100, "colParams": []}
    rows = server.ask(
        "plugin/hparams/session_groups", request | {"aggregationType": "AGGREGATION_AVG"}
    )["sessionGroups"]
    assert len(rows) == 2
    for row in rows:
        run = row["name"].split(" ")[0]
        last = history(logs, run)[-1]
        assert row["hparams"]["model.dropout"] == {"plain,seed=0": 0, "dropout,seed=0": 0.2}[run]
        assert row["hparams"]["data.limit"] == 2000
        figures = {value["name"]["tag"]: value["value"] for value in row["metricValues"]}
        assert figures["epoch_loss"] == pytest.approx(last["val_loss"])
        assert figures["epoch_accuracy"] == pytest.approx(last["val_accuracy"])
        assert [session["status"] for session in row["sessions"]] == ["STATUS_SUCCESS"]
    differing = server.ask("plugin/hparams/experiment", {})["hparamInfos"]
    assert {info["name"] for info in differing if info["differs"]} == {"model", "model.dropout"}


def test_pictures_and_texts(server: Server, logs: Path) -> None:
    pictures = server.ask("plugin/images/tags")
    run = "dropout,seed=0/tensorboard"
    assert {name: sorted(tags) for name, tags in pictures.items()} == {
        f"{run}/train": ["train/examples", "train/weights"],
        f"{run}/mistakes": [f"validation/{n}" for n in ("calibration", "confusion", "mistakes")],
        "plain,seed=0/tensorboard/train": ["train/examples", "train/weights"],
    }
    steps = server.ask("plugin/images/images", run=f"{run}/train", tag="train/weights", sample=0)
    assert [picture["step"] for picture in steps] == [0, 1, 2, 3]
    content = server.ask(f"plugin/images/individualImage?{steps[-1]['query']}&")
    assert Image.open(io.BytesIO(content)).size == (926, 462)
    texts = server.ask("plugin/text/tags")[f"{run}/train"]
    assert sorted(texts) == ["command", "config", "summary"]
    (shown,) = server.ask("plugin/text/text", run=f"{run}/train", tag="config")
    assert "dropout: 0.2" in shown["text"]


# ----------------------------------------------------------------------------------- the browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, without a network but this machine's own."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in (
        *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"),
        *("--window-size=1400,1100", "--hide-scrollbars"),
        "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    ):
        options.add_argument(option)
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


def keep(browser: Any, name: str, folder: Path) -> None:
    """Keeps a picture of the page."""
    place = Path(os.environ.get("FASHIONNET_SCREENSHOTS", folder))
    place.mkdir(parents=True, exist_ok=True)
    assert browser.save_screenshot(str(place / f"tensorboard-{name}.png"))


# Every element of the page as `all`, those inside of TensorBoard's own components included.
WALK = """
const all = [];
const walk = root => { for (const one of root.querySelectorAll('*')) {
    all.push(one);
    if (one.shadowRoot) walk(one.shadowRoot);
}};
walk(document);
"""


def in_page(browser: Any, script: str) -> Any:
    return browser.execute_script(f"{WALK} return {script}")


def pixels_like(picture: np.ndarray, color: tuple[int, ...]) -> int:
    """Returns how many pixels of a picture (H, W, 3) have about this color."""
    return int((abs(picture.astype(int) - color).max(2) <= 12).sum())


def test_curves_of_both_runs_are_drawn(server: Server, browser: Any, tmp_path: Path) -> None:
    browser.get(f"{server.url}#timeseries")
    cards = "[...document.querySelectorAll('scalar-card')]"
    until(lambda: in_page(browser, f"{cards}.length >= 2"), "the charts")
    titles = in_page(browser, f"{cards}.map(card => card.querySelector('.tag').innerText)")
    assert titles == ["epoch_accuracy", "epoch_loss"]  # these two are open from the start
    until(
        lambda: in_page(browser, f"{cards}[0].querySelectorAll('.row-circle span').length >= 4"),
        "the curves' legend",
    )
    # Each curve has its color in the legend, and the chart has lines of it.
    legend = in_page(
        browser,
        f"[...{cards}[0].querySelectorAll('.row-circle span')]"
        ".map(circle => getComputedStyle(circle).backgroundColor)",
    )
    colors = [tuple(map(int, re.findall(r"\d+", color)[:3])) for color in legend]
    assert len(set(colors)) == len(colors) == 4
    chart = browser.find_element("css selector", "scalar-card line-chart")

    def drawn() -> bool:
        png = Image.open(io.BytesIO(chart.screenshot_as_png)).convert("RGB")
        return all(pixels_like(np.asarray(png), color) > 40 for color in colors)

    until(drawn, "the four curves")
    keep(browser, "curves", tmp_path)


def test_pictures_are_shown(server: Server, browser: Any, tmp_path: Path) -> None:
    browser.get(f"{server.url}#images")
    browser.refresh()  # the page does not look at its address again
    images = "all.filter(one => one.tagName == 'IMG')"
    loaded = f"{images}.map(image => [image.naturalWidth, image.naturalHeight])"

    def sizes() -> list[Any]:
        return sorted(in_page(browser, loaded))

    expected = [[670, 578], [670, 578], [926, 462], [926, 462]]
    until(lambda: [size for size in sizes() if size in expected] == expected, "the pictures")
    keep(browser, "images", tmp_path)


def test_the_hparams_tab_is_filled(server: Server, browser: Any, tmp_path: Path) -> None:
    browser.get(f"{server.url}#hparams")
    browser.refresh()
    cells = "all.filter(one => !one.children.length).map(one => one.innerText || '')"
    until(lambda: any("Trial ID" in cell for cell in in_page(browser, cells)), "the table")

    def rows() -> list[str]:
        return [cell.split(" ")[0] for cell in in_page(browser, cells) if ",seed=0 " in cell]

    until(rows, "the runs")
    assert sorted(rows()) == ["dropout,seed=0", "plain,seed=0"]
    keep(browser, "hparams", tmp_path)
