"""Hydra's launcher `vectorized`: jobs that differ in the seed alone are trained together.

Hydra looks for plugins in the package `hydra_plugins` and imports them at every start, so what
takes time to import is imported when jobs are launched.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

log = logging.getLogger(__name__)

# Jobs that differ in these keys alone can take their steps together.
_FREE = ("seed=", "optimizer.lr=")


ConfigStore.instance().store(
    group="hydra/launcher",
    name="vectorized",
    node={"_target_": "hydra_plugins.vectorized_launcher.VectorizedLauncher"},
    provider="fashionnet",
)


class VectorizedLauncher(Launcher):
    """Runs the jobs of a sweep in this process, and takes the steps of many at once."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Called by Hydra before `launch`."""
        self._context, self._task, self._config = hydra_context, task_function, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Runs jobs and returns what became of each, in the order of `job_overrides`."""
        from fashionnet.training.together import Jobs

        setup_globals()
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
        Path(str(self._config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        log.info(f"Launching {len(job_overrides)} jobs together")
        groups: dict[tuple[str, ...], list[int]] = {}
        for index, overrides in enumerate(job_overrides):
            log.info(f"\t#{initial_job_idx + index} : {' '.join(filter_overrides(overrides))}")
            alike = tuple(text for text in overrides if not text.startswith(_FREE))
            groups.setdefault(alike, []).append(index)
        returned: dict[int, JobReturn] = {}
        alone: Counter[str] = Counter()
        for indices in groups.values():
            jobs = Jobs()
            functions = [
                lambda index=index: self._run(job_overrides[index], initial_job_idx + index)
                for index in indices
            ]
            returned |= zip(indices, jobs.run(functions), strict=True)
            alone += jobs.alone
        for why, count in alone.items():
            log.info(f"{count} jobs were trained one after another: {why}")
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
        return [returned[index] for index in range(len(job_overrides))]

    def _run(self, overrides: Sequence[str], number: int) -> JobReturn:
        config = self._context.config_loader.load_sweep_config(self._config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return run_job(
            task_function=self._task,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
            hydra_context=self._context,
        )
