"""Settings are searched on validation, with seed 0 and short histories: a search at full length would cost more than
the table that it is for.
"""

from itertools import zip_longest

from experiments.paper import models
from experiments.paper.study import Model, Study

SEARCH_LENGTH = 200


def choose(study: Study, column: str, names: list[str], trials: int, run: bool) -> dict[str, Model]:
    """Each model with those of its settings that were best on validation, at SEARCH_LENGTH events and with seed 0.

    Where only one is asked for, or none has been tried yet, it is the first: the model's own defaults. Both columns
    have the settings that were best with all tricks: what differs between them is then the tricks alone.
    """
    settings = {name: models.trials(name)[:trials] for name in names}

    def short(name: str, trial: dict) -> Model:
        fixed = models.model(name, "tricks").settings
        return Model(name, name, {**fixed, **trial, "data.history_length": SEARCH_LENGTH})

    searched = {name: tried for name, tried in settings.items() if len(tried) > 1}
    if run:
        # The first trials of all models, then the second ones: what is cut short has every model in it.
        rounds = zip_longest(*([short(name, trial) for trial in tried] for name, tried in searched.items()))
        study.run([(model, 0) for some in rounds for model in some if model is not None])
    result = {}
    for name, tried in settings.items():
        outcomes = [(study.outcome(short(name, trial), 0), trial) for trial in tried] if name in searched else []
        found = [(outcome.results["valid_auc"], trial) for outcome, trial in outcomes if outcome is not None]
        best = max(found, key=lambda pair: pair[0])[1] if found else tried[0]
        result[name] = Model(name, name, {**models.model(name, column).settings, **best})
    return result


def chosen(study: Study, name: str) -> Model:
    """The model of table 2's `tricks`, as far as its search has come."""
    return choose(study, "tricks", [name], len(models.trials(name)), run=False)[name]


def chosen_rates(study: Study, name: str) -> Model:
    """The model's own form, with the learning rates that it has in table 2: what variants of it are compared with."""
    own, best = models.model(name, "tricks"), chosen(study, name)
    rates = {field: value for field, value in best.settings.items() if field.startswith("optim.")}
    return Model(name, name, {**own.settings, **rates})
