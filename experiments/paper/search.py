"""Settings are searched on validation, with whole histories: each change is tried on the best so far.

A change is kept where it is better in the mean over SEEDS seeds. One that is BEHIND with the first of them is given up
then and there. Not by one seed alone: with it, two settings of one model differ by .0015 to .0019 (standard deviation)
more or less than with others, which is as much as there is to find. Not with short histories, which cost less: what is
best at 200 events need not be best at 1000, least of all what models have for long ones (how many events they select,
the mass of what they attend to).
"""

from typing import Any

import numpy as np

from experiments.paper import models
from experiments.paper.study import Model, Study

SEEDS = 3
#: AUC on validation of the best so far, less that of a change, both with seed 0, from which on it is not pursued.
BEHIND = 0.002

#: Settings and a seed.
Run = tuple[dict[str, Any], int]


def choose(study: Study, column: str, names: list[str], trials: int, run: bool) -> dict[str, Model]:
    """Each model with what was found for it, as far as its search has come; as it comes where nothing was better.

    Both columns have the settings that were best with all tricks: what differs between them is then the tricks alone.
    """
    if run:
        # The first trials of all models, then the second ones: what is cut short has every model in it.
        for _ in range(2 * trials):
            wanted = [(name, *run) for name in names for run in _search(study, name, trials)[1]]
            study.run([(_model(name, settings), seed) for name, settings, seed in wanted])
    found = {name: _search(study, name, trials)[0] for name in names}
    return {name: Model(name, name, {**models.model(name, column).settings, **found[name]}) for name in names}


def unfinished(study: Study, name: str, trials: int) -> str:
    """What is missing of a model's search, such as "2 of 4 trials"; empty if nothing is."""
    all_of_them, done = len(models.trials(name)[:trials]), _search(study, name, trials)[2]
    return "" if done == all_of_them else f"{done} of {all_of_them} trials"


def chosen(study: Study, name: str, run: bool) -> Model:
    """The model of table 2's `tricks`; its defaults where nothing has been searched.

    Args:
      run: whether it is going to be run: what has been found so far will do for a report.

    Raises:
      ValueError: its search is under way, and it is going to be run.
    """
    trials = len(models.trials(name))
    missing = unfinished(study, name, trials)
    # The first trial is the defaults, which other tables run too: the second one, where there is one, tells.
    begun = any(study.outcome(_model(name, change), 0) is not None for change in models.trials(name)[1:2])
    if run and missing and begun:
        raise ValueError(f"the search for {name} has come to {missing}: finish table2 of this data set first")
    return choose(study, "tricks", [name], trials, run=False)[name]


def chosen_rates(study: Study, name: str, run: bool) -> Model:
    """The model's own form, with the learning rates that it has in table 2: what variants of it are compared with.

    Arguments and errors as for `chosen`.
    """
    own, best = models.model(name, "tricks"), chosen(study, name, run)
    rates = {field: value for field, value in best.settings.items() if field.startswith("optim.")}
    return Model(name, name, {**own.settings, **rates})


def _search(study: Study, name: str, trials: int) -> tuple[dict[str, Any], list[Run], int]:
    """The best settings so far, the runs that decide on the next trial (none at the end), and how many are decided."""
    changes = models.trials(name)[:trials]
    best, aucs = {}, []
    for decided, change in enumerate(changes):
        trial = {**best, **change}
        found = [study.outcome(_model(name, trial), seed) for seed in range(SEEDS if len(changes) > 1 else 1)]
        missing = [(trial, seed) for seed, outcome in enumerate(found) if outcome is None]
        if decided and missing and missing[0][1] == 0:
            return best, missing[:1], decided
        if decided and found[0].results["valid_auc"] <= aucs[0] - BEHIND:
            continue
        if missing:
            return best, missing, decided
        now = [outcome.results["valid_auc"] for outcome in found]
        if None in now:
            raise ValueError(f"validation has no AUC for {name}, its labels are all alike: nothing can be chosen by it")
        if not decided or np.mean(now) > np.mean(aucs):
            best, aucs = trial, now
    return best, [], len(changes)


def _model(name: str, settings: dict[str, Any]) -> Model:
    return Model(name, name, {**models.model(name, "tricks").settings, **settings})
