"""What commands do with a terminal: lost streams, poor encodings, hostile text, Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import pytest
from hydra.errors import HydraException, MissingConfigException
from PIL import Image

from fashionnet.config import compose
from fashionnet.errors import UserError, visible
from fashionnet.system import command_line, terminal

if TYPE_CHECKING:
    from tests.conftest import Commands, FinishedRun, WriteRun
    from tests.warm import Forked

pytestmark = pytest.mark.slow

FULL = Path("/dev/full")
HOSTILE = "A\x1b]0;own\x07\x9b31m\x7f\n\rfake\u202eevil\u2066\u200b\u2028\udcff|$\\frac{"
PRINTING = (
    ("list", "."),
    ("predict", "--help"),
    ("train", "--help"),
    ("train", "--info"),  # through logging
)
TINY = ("epochs=1", "data.limit=320", "device=cpu")


# ------------------------------------------------------------------------------ lost streams


class Lost:
    """Runs a command with a stream that takes nothing."""

    def __init__(self, commands: Commands, cwd: Path) -> None:
        self.commands, self.cwd = commands, cwd

    def to_a_gone_reader(self, *words: str) -> tuple[int, str]:
        reader, writer = os.pipe()
        os.close(reader)
        return self._run(open(writer, "wb"), *words)

    def to_a_full_disk(self, *words: str) -> tuple[int, str]:
        return self._run(FULL.open("wb"), *words)

    def _run(self, stdout: IO[bytes], module: str, *arguments: str) -> tuple[int, str]:
        process = self.commands.start(module, *arguments, cwd=self.cwd, stdout=stdout)
        _, errors = process.communicate()
        return process.wait(), errors

    def closed(self, descriptors: str, module: str, *arguments: str) -> tuple[int, str]:
        line = self.commands.line(module, *arguments)
        done = self.commands.call(
            ["sh", "-c", f'exec "$@" >/dev/null {descriptors}', "sh", *line], self.cwd
        )
        return done.returncode, done.stderr


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_a_printing_command_ends_in_good_order_without_its_output(
    commands: Commands, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    lost = Lost(commands, tmp_path)
    gone = [pool.submit(lost.to_a_gone_reader, *words) for words in PRINTING]
    full = [pool.submit(lost.to_a_full_disk, *words) for words in PRINTING]
    closed = [pool.submit(lost.closed, ">&-", *words) for words in PRINTING]
    for words, each in zip(PRINTING, gone, strict=True):
        assert each.result() == (128 + signal.SIGPIPE, ""), words
    printed = "error: cannot write to standard output: No space left on device\n"
    for words, each in zip(PRINTING, full, strict=True):
        assert each.result() == (2, printed), words
    for words, each in zip(PRINTING, closed, strict=True):
        assert each.result() == (0, ""), words
    # Of an error the line is lost, never the status.
    assert lost.closed("2>&-", "list", "nowhere") == (2, "")
    assert lost.closed("2>/dev/full", "list", "nowhere") == (2, "")


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_training_goes_on_without_its_output(
    commands: Commands, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    lost = Lost(commands, tmp_path)

    def train(name: str) -> tuple[str, ...]:
        return "train", *TINY, f"hydra.run.dir={name}"

    sweep = ("train", "-m", "seed=0,1", *TINY)
    joblib = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=joblib")
    search = ("search", "optimizer.lr=0.1,0.01", *TINY, "--num", "1", "--out")
    ended = {
        "gone": pool.submit(lost.to_a_gone_reader, *train("gone")),
        "full": pool.submit(lost.to_a_full_disk, *train("full")),
        "closed": pool.submit(lost.closed, ">&- 2>&- <&-", *train("closed")),
        "joblib": pool.submit(lost.to_a_gone_reader, *sweep, *joblib),
        "search": pool.submit(lost.to_a_gone_reader, *search, "search"),
        "found": pool.submit(lost.to_a_full_disk, *search, "found"),
    }
    full_disk = (2, "error: cannot write to standard output: No space left on device\n")
    for name, each in ended.items():
        assert each.result() == (full_disk if name == "found" else (0, "")), name
    again = lost.to_a_gone_reader("reproduce", "gone", "--out", "again")
    assert again == (0, "")
    records = sorted(tmp_path.rglob("run.json"))
    assert len(records) == 3 + 2 + 1 + 1 + 1
    for path in records:
        assert json.loads(path.read_text())["status"] == "completed", path
        assert "best guess" in path.with_name("train.log").read_text(encoding="utf-8")


def test_what_an_encoding_does_not_have_is_replaced(
    commands: Commands, write_run: WriteRun, tmp_path: Path
) -> None:
    ascii_, posix = (
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )
    write_run(tmp_path / "лес é/run")
    printed = commands.succeed("train", *TINY, "hydra.run.dir='лес é/new'", cwd=tmp_path, **posix)
    assert "best guess: 9" in printed and "(it is: " in printed
    table = commands.succeed("list", ".", cwd=tmp_path, **ascii_)
    assert table.count("completed") == 2
    rows = json.loads(commands.succeed("list", ".", "--json", cwd=tmp_path, **posix))
    assert len(rows) == 2
    assert "is not a folder" in commands.fail("list", "нет", cwd=tmp_path, **ascii_)


# ------------------------------------------------------------------------------ hostile text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Ankle boot, Größe 38 – é 靴 ±", "Ankle boot, Größe 38 – é 靴 ±"),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\nb\rc\td", "a\\nb\\rc\\td"),
        ("\x9b\x7f\x00", "\\x9b\\x7f\\x00"),
        ("\u202egnp\u2066\u200b\ufeff", "\\u202egnp\\u2066\\u200b\\ufeff"),
        ("\udcff\u2028\U000e0041", "\\udcff\\u2028\\U000e0041"),
        ("\u3000\xa0", "\u3000\xa0"),  # spaces
    ],
)
def test_the_unprintable_is_shown_as_escapes(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert (
        visible(f"{text}\n", keep="\n").splitlines()[-1:] == shown.splitlines()[-1:] or "\n" in text
    )


def test_a_commands_stream_shows_what_nobody_escaped_before() -> None:
    written = io.BytesIO()
    plain = io.TextIOWrapper(written, "ascii")
    stream = terminal._Terminal(plain, "replace", survives=False)
    stream.write("\r 50 %\tdone\n\x1b[31mred\udcff é\n")
    stream.flush()
    assert written.getvalue() == b"\r 50 %\tdone\n\\x1b[31mred\\udcff ?\n"


def unprintable(text: str) -> set[str]:
    return {c for line in text.split("\n") for c in line if visible(c) != c}


def hostile_run(run: FinishedRun, path: Path) -> Path:
    """Copies a run, and puts hostile text wherever a stranger can put some."""
    shutil.copytree(run.path, path)
    record = json.loads((path / "run.json").read_text())
    names = [f"{HOSTILE}{i}" for i in range(10)]
    record["data"]["class_names"] = names
    record["choices"] = dict.fromkeys(("model", "data", "optimizer", "experiment"), HOSTILE)
    record["packages"] = {HOSTILE: HOSTILE}
    record |= {"command": HOSTILE, "error": HOSTILE, "python": HOSTILE, "platform": HOSTILE}
    (path / "run.json").write_text(json.dumps(record))
    return path


def test_no_text_of_a_stranger_acts_on_the_terminal(
    commands: Commands,
    small: tuple[FinishedRun, FinishedRun],
    write_run: WriteRun,
    pool: ThreadPoolExecutor,
    tmp_path: Path,
) -> None:
    run = hostile_run(small[0], tmp_path / "h" / "run\x1b[2J\nfake\u202e")
    write_run(tmp_path / "h/failed", status="failed", error=HOSTILE, choices={"model": HOSTILE})
    write_run(tmp_path / "h/other", config={"model.dropout": 0.3}, choices={"model": f"B{HOSTILE}"})
    picture = tmp_path / "shirt\x1b[31m\nfake.png"
    Image.new("L", (28, 28)).save(picture)
    right = (
        ("list", "h"),
        ("list", "h", "--json"),
        ("predict", run, picture),
        ("compare", "h"),
        ("compare", "h", "--markdown"),
        ("compare", "--config", run, "h/other"),
    )
    wrong = (
        ("evaluate", f"{run}x"),
        ("evaluate", run, "--split", "test", "--data-root", "no\x1b[31m\nfake"),
        ("predict", run, f"{picture}x"),
        ("train", *TINY, "hydra.run.dir=h/other"),
        ("train", "\x1b[31mmodel=mlp"),
        ("playground", "\x1b[31m\nfake"),
    )
    runs = [pool.submit(commands.run, *words, cwd=tmp_path) for words in (*right, *wrong)]
    answers = [future.result() for future in runs]
    for words, done in zip((*right, *wrong), answers, strict=True):
        assert not unprintable(done.stdout + done.stderr), words
        assert not any(
            line.lstrip(" *|-").startswith("fake")
            for line in (done.stdout + done.stderr).splitlines()
        ), words
        if words in right:
            assert done.returncode == 0 and not done.stderr, (words, done.stderr)
        else:
            commands.error(done)
    table, rows = answers[0].stdout, json.loads(answers[1].stdout)
    assert "A\\x1b]0;own\\x07\\x9b31m\\x7f\\n\\rfake\\u202eevil" in table
    assert HOSTILE in {row["model"] for row in rows}  # a machine reads what it is


def test_names_of_classes_do_not_act_either(commands: Commands, tmp_path: Path) -> None:
    random_pixels = np.random.default_rng(0)
    for name in ("a\x1b]0;x\x07\n\rfake", "b\u202egnp$\\frac{", "c\x9b31m\u200b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            pixels = random_pixels.integers(0, 255, (24, 24, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}\x1b.png")
    (tmp_path / "photos" / name / "bad\n\x1b[31m.png").write_text("not a picture")
    photos = ("data=photos", "data.root=photos", "data.size=16", "validation_split=0.3")
    printed = commands.run("train", *photos, "epochs=1", "hydra.run.dir=run", cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr
    found = commands.run("mistakes", "run", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    tables = "".join(path.read_text() for path in (tmp_path / "run/mistakes").rglob("*.csv"))
    log = (tmp_path / "run/train.log").read_text(encoding="utf-8")
    for text in (printed.stdout, printed.stderr, found.stdout, found.stderr, tables, log):
        assert not unprintable(text)
        assert not any(line.startswith(("fake", "\\rfake")) for line in text.splitlines())
    assert "Warning" not in found.stderr  # of glyphs that a font does not have


# ------------------------------------------------------------------------------------ Ctrl-C

# Says when a command's own first lines have run: what comes before them is Python's.
_SITE = """
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("fashionnet.") and "READY" in os.environ:
            open(os.environ.pop("READY"), "w").close()
sys.meta_path.insert(0, Finder())
"""


def interrupted(
    commands: Commands, words: Sequence[str], seconds: float, cwd: Path, folder: Path
) -> tuple[int, str, str]:
    """Sends a command Ctrl-C some time after it began; returns its status, stdout and stderr."""
    ready = folder / f"ready-{random.getrandbits(64):x}"
    environment: Mapping[str, str] = commands.environment | commands.importing(folder)
    with subprocess.Popen(
        commands.line(*words),
        cwd=cwd,
        env={**environment, "READY": str(ready)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not ready.exists() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate()
        return process.returncode, stdout, stderr


def test_ctrl_c_at_any_moment_is_one_line(
    commands: Commands,
    small: tuple[FinishedRun, FinishedRun],
    pool: ThreadPoolExecutor,
    tmp_path: Path,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(_SITE)
    run = str(small[0].path)
    long = ("epochs=1000", "device=cpu")
    asked: list[tuple[float, tuple[str, ...]]] = [
        (0.5, ("list", run)),
        (0.3, ("train", "--help")),
        (0.5, ("playground", "xor", "--epochs", "100000")),
        (2.0, ("evaluate", run)),
        (2.0, ("compare", run)),
        (3.0, ("train", *long)),
        (3.0, ("train", "-m", "seed=0,1", *long)),
        (3.0, ("search", "optimizer.lr=0.1,0.01", *long)),
        (3.0, ("reproduce", run, "--out", "rerun")),
        (3.0, ("export", run, "--format", "pt2", "--out", "export")),
    ]
    random_delays = random.Random(0)
    tried = []
    for number, (most, words) in enumerate(asked):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        delay = most * random_delays.random() ** 2  # imports, where exceptions get lost, come first
        tried.append(
            (words, delay, pool.submit(interrupted, commands, words, delay, folder, tmp_path))
        )
    statuses = []
    for words, delay, future in tried:
        status, stdout, stderr = future.result()
        statuses.append(status)
        if status == 130:
            assert stderr == "interrupted by SIGINT\n", (words, delay)
        else:  # it was done before
            assert (status, stderr) == (0, ""), (words, delay)
        assert "Traceback" not in stdout
    assert statuses.count(130) > 5


def test_an_interrupt_that_a_destructor_swallowed_comes_again(
    commands: Commands, tmp_path: Path
) -> None:
    program = (
        "import sys, time\n"
        "sys.argv = sys.orig_argv = ['fashionnet-test']\n"
        "from fashionnet.system.command_line import reported\n"
        "class Slow:\n"
        "    def __del__(self):\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "with reported():\n"
        "    slow = Slow()\n"
        "    del slow\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=commands.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=30)
    assert (process.returncode, printed) == (130, "interrupted by SIGINT\n")


def test_a_command_looks_for_garbage_rarely_and_not_at_its_end(
    commands: Commands, tmp_path: Path
) -> None:
    program = (
        "import gc\n"
        "from fashionnet.system.command_line import reported\n"
        "before = gc.get_threshold()[0]\n"
        "with reported():\n"
        "    assert gc.isenabled() and gc.get_threshold()[0] > 10 * before\n"
        "    assert gc.get_freeze_count() == 0\n"
        "assert gc.get_freeze_count() > 1000\n"
    )
    done = commands.call([sys.executable, "-c", program], tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_failure_over_what_an_interrupt_left_half_done_is_the_interrupt(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for make in (AttributeError, MissingConfigException):
        with pytest.raises(SystemExit) as ended, command_line._in_one_line():
            try:
                try:
                    raise KeyboardInterrupt
                finally:
                    raise make("half done")
            except HydraException as error:
                raise UserError(compose.explain(error)) from None
        assert ended.value.code == 130
        assert capsys.readouterr().err == "interrupted by SIGINT\n"


def test_a_notebook_keeps_its_handlers_and_streams(commands: Commands, tmp_path: Path) -> None:
    program = (
        "import signal, sys\n"
        "before = signal.getsignal(signal.SIGINT), sys.excepthook, sys.stdout\n"
        "import fashionnet, fashionnet.list, fashionnet.evaluate, fashionnet.train\n"
        "assert before == (signal.getsignal(signal.SIGINT), sys.excepthook, sys.stdout)\n"
    )
    done = commands.call([sys.executable, "-c", program], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def wait_for_an_epoch(history: Path, process: Forked | subprocess.Popen[str]) -> None:
    while not (history.exists() and history.read_text().count("\n") == 1):
        assert process.poll() is None
        time.sleep(0.005)


TWO_EPOCHS = ("epochs=2", "hydra.run.dir=run", "device=cpu")


def test_a_closed_terminal_saves_the_run(commands: Commands, tmp_path: Path) -> None:
    process = commands.start("train", *TWO_EPOCHS, cwd=tmp_path)
    wait_for_an_epoch(tmp_path / "run/history.jsonl", process)
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate()
    assert (process.wait(), errors) == (128 + signal.SIGHUP, "interrupted by SIGHUP\n")
    assert commands.opened(tmp_path / "run").record["status"] == "interrupted"
    assert (tmp_path / "run/checkpoints/last.pt").exists()


def test_nohup_keeps_a_run_alive_without_its_terminal(commands: Commands, tmp_path: Path) -> None:
    with subprocess.Popen(
        ["nohup", *commands.line("train", *TWO_EPOCHS)],
        cwd=tmp_path,
        env=commands.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    ) as process:
        wait_for_an_epoch(tmp_path / "run/history.jsonl", process)
        process.send_signal(signal.SIGHUP)
    assert process.returncode == 0
    assert commands.opened(tmp_path / "run").record["status"] == "completed"


# ------------------------------------------------------------------- what one may paste


PATH = {"PATH": "/usr/local/bin:/usr/bin:/bin"}  # without an environment of ours


def pasted(line: str, commands: Commands, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a line that was printed, in a shell like the one in which it was."""
    return commands.call(["bash", "-c", line], cwd, PATH)


def test_a_run_ends_with_commands_that_work_where_it_was_started(
    commands: Commands, tmp_path: Path
) -> None:
    printed = commands.succeed("train", *TINY, cwd=tmp_path, **PATH)
    (run,) = (tmp_path / "outputs/mlp").iterdir()
    shown = printed.splitlines()[-5:]
    assert shown[:2] == [f"run: {run.relative_to(tmp_path)}", "next:"]
    for line in shown[2:]:
        more = " --inspect" if "tensorboard" in line else ""  # else it serves for ever
        done = pasted(line + more, commands, tmp_path)
        assert done.returncode == 0, (line, done.stderr)


def test_the_line_that_continues_a_run_continues_it(commands: Commands, tmp_path: Path) -> None:
    name = "it's a=b, é"
    (tmp_path / "more/experiment").mkdir(parents=True)
    (tmp_path / "more/experiment/mine.yaml").write_text(
        "# @package _global_\nepochs: 2\noverwrite: true\n"
    )
    words = ("train", "--config-dir=more", "experiment=mine", "device=cpu")
    quoted = name.replace("'", "\\'")
    process = commands.start(*words, f"hydra.run.dir='{quoted}'", cwd=tmp_path, **PATH)
    wait_for_an_epoch(tmp_path / name / "history.jsonl", process)
    process.send_signal(signal.SIGINT)
    stdout, errors = process.communicate()
    assert (process.wait(), errors) == (130, "interrupted by SIGINT\n")
    head, _, line = stdout.splitlines()[-1].partition(": ")
    assert head == "continue with"
    step = commands.opened(tmp_path / name).record["status"]
    assert step == "interrupted"
    done = pasted(line, commands, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"continues {name} from epoch 2, step " in done.stdout
    assert "epoch 1/2" not in done.stdout
    assert commands.opened(tmp_path / name).record["status"] == "completed"


def test_a_sweep_prints_no_table_and_no_advice_for_each_job(
    commands: Commands, tmp_path: Path
) -> None:
    printed = commands.succeed(
        *("train", "-m", "model.hidden=8,16", *TINY, "hydra.sweep.dir=sweep"), cwd=tmp_path
    )
    assert "Total params" not in printed and "next:" not in printed
    assert len(printed.splitlines()) < 20
    for log in tmp_path.glob("sweep/*/train.log"):
        assert "Total params" in log.read_text(encoding="utf-8")
    assert len(list(tmp_path.glob("sweep/*/train.log"))) == 2


def test_a_stream_that_bars_draw_on_takes_their_returns() -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as shown, open(writer, "wb") as raw:
        stream = io.TextIOWrapper(raw, "utf-8")
        ours = terminal._Terminal(stream, "replace", False)
        print("\rbar \x1b[31m\r\tend", file=ours, flush=True)
        ours.close()
        assert shown.read() == b"\rbar \\x1b[31m\\r\tend\n"
