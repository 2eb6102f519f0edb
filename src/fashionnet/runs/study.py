"""The folder and the database of a hyper-parameter search."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fashionnet.errors import UserError, first_line
from fashionnet.system.files import missing_folders, own_copy, refuse_strange_below, remove_empty

if TYPE_CHECKING:
    from optuna import Study

    from fashionnet.config.schema import Config
    from fashionnet.config.search_space import Space

DATABASE = "search.db"
_STUDY = "fashionnet"  # its name in the database


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences Optuna's own log lines while the body runs."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


@contextlib.contextmanager
def claimed(folder: Path, config: Config, space: Space, data: Mapping[str, Any]) -> Iterator[Study]:
    """Locks a search's folder for the body, and opens or creates its study.

    Raises:
        UserError: the folder is in use, or holds another search or something else.
    """
    from optuna.distributions import distribution_to_json
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    from fashionnet.config import schema
    from fashionnet.system import locks

    plan = {
        "space": {key: distribution_to_json(space[key]) for key in space},
        "config": schema.that_counts(schema.as_dict(config)),
        "data": data,
    }
    made = missing_folders(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locks.exclusive(folder, remove=True):
            if not (folder / DATABASE).exists():
                _create(folder, plan)
            yield _opened(folder, plan, space)
    except (SQLAlchemyError, StorageInternalError) as error:
        raise UserError(f"{folder / DATABASE} cannot be used: {_cause(error)}") from None
    finally:
        remove_empty(made)


def _create(folder: Path, plan: Mapping[str, Any]) -> None:
    """Creates the database of a new search, which gets its final name once complete."""
    import optuna

    from fashionnet.system import locks

    new = folder / f".{DATABASE}"
    others = {path.name for path in folder.iterdir() if not path.name.startswith(new.name)}
    if others := others - {locks.NAME}:
        raise UserError(
            f"{folder} holds other files ({', '.join(sorted(others)[:3])}) and no {DATABASE}; "
            "choose a new or empty folder with --out"
        )
    with contextlib.ExitStack() as stack:
        for path in (new, folder / f"{new.name}-journal"):
            path.unlink(missing_ok=True)  # of a process killed in here
            stack.callback(path.unlink, missing_ok=True)
        storage = optuna.storages.RDBStorage(_url(new))
        stack.callback(storage.engine.dispose)
        study = optuna.create_study(storage=storage, study_name=_STUDY)
        study.set_user_attr("plan", plan)
        os.replace(new, folder / DATABASE)


def _opened(folder: Path, plan: Mapping[str, Any], space: Space) -> Study:
    """Opens the study of a search; a file without one is left unchanged."""
    import optuna

    from fashionnet import data as datasets
    from fashionnet.config import schema

    refuse_strange_below(folder)  # it and its trials will be written to, through any link
    path = folder / DATABASE
    for file in filter(Path.is_file, folder.glob(f"{DATABASE}*")):  # and SQLite's journals
        own_copy(file)
    try:
        storage = optuna.storages.RDBStorage(_url(path), skip_table_creation=True)
        study = optuna.load_study(study_name=_STUDY, storage=storage)
        before, now = dict(study.user_attrs["plan"]), json.loads(json.dumps(plan))
        changed = datasets.difference(before.pop("data"), now.pop("data"))
        differing = schema.differing_keys(before, now)
        states = {trial.state.name for trial in study.trials}
        own = all(trial.distributions == space for trial in study.trials)
        own &= all(isinstance(trial.value, float | None) for trial in study.trials)
    except Exception as error:  # a strange file makes Optuna raise anything
        raise UserError(f"{path} is damaged or not a search's: {_cause(error)}") from None
    if differing:
        keys = ", ".join(sorted({key.partition(".")[2] for key in differing}))
        raise UserError(
            f"{folder} holds another search (differs in {keys}); "
            "use the same overrides to continue it, or another --out"
        )
    if changed:
        raise datasets.OtherData(
            f"{folder} holds a search on other data: {changed}; "
            "restore the data, or choose another --out"
        )
    if not own or states - {"RUNNING", "COMPLETE", "FAIL"}:
        raise UserError(f"{path} is damaged: it holds trials of another search")
    return study


def _url(path: Path) -> str:
    from sqlalchemy.engine import URL

    return URL.create("sqlite", database=str(path.absolute())).render_as_string()


def _cause(error: BaseException) -> str:
    """Returns SQLite's own message, which Optuna and SQLAlchemy wrap in theirs."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def propose(study: Study, space: Space, seed: int) -> None:
    """Adds the next trial, in the state RUNNING, with values that Optuna proposes.

    Optuna proposes in memory, and one transaction writes the trial, so that every trial in the
    database has all of its values. A sampler of its own for each trial makes its values a function
    of `seed` and the results so far.
    """
    import optuna
    from optuna.trial import TrialState, create_trial

    from fashionnet.system import seeds

    trials = study.trials
    stream = seeds.derive(seed, "trial", len(trials)) % 2**32  # as many bits as NumPy takes
    draft = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=stream))
    draft.add_trials(trials)
    asked = draft.ask(dict(space))
    running = create_trial(
        state=TrialState.RUNNING, params=asked.params, distributions=asked.distributions
    )
    study.add_trial(running)
