"""Settings of a sweep that are chosen by what earlier ones reached: Optuna's tree-structured Parzen estimator.

Pure: from the request and the scores so far to the next setting. Optuna (the extra `sweeps`) is imported only here, and
keeps nothing: its study is made again from the rows of the sweep each time, so that any process may choose.
"""

import importlib
import importlib.util
from typing import Any

from apt_jobs.jobs.sweeps import Range, Setting, SweepSpec, Values

NUM_RANDOM = 10  # settings that are sampled blindly before the estimator says anything, as it is Optuna's default


def is_installed() -> bool:
    """Return whether Optuna is there."""
    return importlib.util.find_spec("optuna") is not None


def load() -> None:
    """Import Optuna now, which takes half a second that no transaction should last."""
    importlib.import_module("optuna")


class Sampler:
    """One look at a sweep: add what is known, then ask for settings."""

    def __init__(self, sweep: SweepSpec, *, is_minimized: bool, number: int) -> None:
        """Make a sampler for the settings from `number` on.

        Args:
            sweep: What was asked for.
            is_minimized: Whether the smaller score is better.
            number: Of the first setting to ask for; with the sweep's seed it makes the same choice each time.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._parameters = optuna, sweep.parameters
        self._distributions = {name: self._distribution(one) for name, one in sweep.parameters.items()}
        seed = (sweep.seed + number) % 2**32
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=NUM_RANDOM, constant_liar=True)
        self._study = optuna.create_study(sampler=sampler, direction="minimize" if is_minimized else "maximize")

    def add(self, setting: Setting, score: float | None) -> None:
        """Add a setting that runs (`score` None) or has reached something."""
        states = self._optuna.trial.TrialState
        self._study.add_trial(
            self._optuna.trial.create_trial(
                state=states.RUNNING if score is None else states.COMPLETE,
                params={name: self._index(name, value) for name, value in setting.items()},
                distributions=self._distributions,
                value=score,
            )
        )

    def propose(self) -> Setting:
        """Return the next setting, which counts as running from now on."""
        chosen = self._study.ask(self._distributions).params
        return {name: self._value(name, chosen[name]) for name in self._parameters}

    def _distribution(self, parameter: Values | Range) -> Any:
        kinds = self._optuna.distributions
        if isinstance(parameter, Values):  # by index: Optuna takes no lists
            return kinds.CategoricalDistribution(range(len(parameter.values)))
        is_log = parameter.scale == "log"
        if isinstance(parameter.min, int) and isinstance(parameter.max, int):
            return kinds.IntDistribution(parameter.min, parameter.max, log=is_log)
        return kinds.FloatDistribution(float(parameter.min), float(parameter.max), log=is_log)

    def _index(self, name: str, value: Any) -> Any:
        parameter = self._parameters[name]
        return parameter.values.index(value) if isinstance(parameter, Values) else value

    def _value(self, name: str, chosen: Any) -> Any:
        parameter = self._parameters[name]
        return parameter.values[chosen] if isinstance(parameter, Values) else chosen
