"""Whether configurations differ by more than their seeds do.

Runs whose configurations differ in nothing but the seed are one group. Each group is compared with
the first: by Student's t test of the differences seed by seed where both have the same seeds, else
by Welch's t test (scipy.stats). Every seed was scored on the same test images; how far these stand
for others is another error (uncertainty.py).
"""

import contextlib
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cjepa_fast import config as configuration
from cjepa_fast.checkpoint.encoders import run_of
from cjepa_fast.checkpoint.restore import deciding
from cjepa_fast.eval.records import inside

CONFIDENCE = 0.95
MOST_NAMED = 3  # keys in a group's name
PAIRED, APART = "the same seeds", "other seeds"
By = dict[int | None, float]  # a value by seed; None: of an encoder that belongs to no run


class Group(NamedTuple):
    """Runs of one configuration: their indices by seed."""

    name: str
    runs: dict[int | None, list[int]]


class Difference(NamedTuple):
    """The difference of two groups' means, second minus first, in the measure's units."""

    mean: float
    error: float  # standard error
    low: float  # of the interval that holds the difference with CONFIDENCE
    high: float
    p: float | None  # None where the differences do not vary at all
    seeds: int  # pairs, or the fewer of either
    how: str


def groups_of(checkpoints: Sequence[str | Path], names: Sequence[str]) -> list[Group]:
    """In the order of their first checkpoints, named by the keys they differ in. What belongs to no
    run, or to one whose configuration this version cannot read, is a group of its own."""
    settings, members = [], {}
    for i, checkpoint in enumerate(checkpoints):
        run, made = run_of(checkpoint), None
        with contextlib.suppress(configuration.ConfigError):
            made = configuration.load_run(run) if run else None
        own = deciding(made.model_dump(mode="json")) if made else {}
        settings.append(own)
        key = (json.dumps(own), inside(checkpoint)) if made else (str(i), "")
        seeds = members.setdefault(key, {})
        seeds.setdefault(made.run.seed if made else None, []).append(i)
    firsts = [next(iter(seeds.values()))[0] for seeds in members.values()]
    titles = _titles([settings[i] for i in firsts], [names[i] for i in firsts])
    return [Group(*pair) for pair in zip(titles, members.values(), strict=True)]


def _titles(settings: list[dict], names: list[str]) -> list[str]:
    """ "loss.vicreg.beta=0" where the values tell the groups apart, else the first run's name."""
    keys = dict.fromkeys(key for own in settings for key in own)
    differing = [key for key in keys if len({json.dumps(own.get(key)) for own in settings}) > 1]
    titles = [
        ", ".join(f"{key}={json.dumps(own[key])}" for key in differing[:MOST_NAMED] if key in own)
        for own in settings
    ]
    told = differing and len(set(titles)) == len(titles) and all(titles)
    return titles if told else names


def values_of(group: Group, found: Sequence[float | None]) -> By:
    """A measure by seed; of several runs with one seed their mean. found: by run."""
    known = {
        seed: [found[i] for i in runs if found[i] is not None] for seed, runs in group.runs.items()
    }
    return {seed: statistics.fmean(values) for seed, values in known.items() if values}


def difference(first: By, second: By) -> Difference | None:
    """None where seeds cannot tell: fewer than two in common, and fewer than two of either."""
    from scipy import stats

    shared = [seed for seed in first if seed in second]
    if len(shared) > 1:
        pairs = [second[s] for s in shared], [first[s] for s in shared]
        gaps = [b - a for b, a in zip(*pairs, strict=True)]
        error, seeds, how = statistics.stdev(gaps) / math.sqrt(len(gaps)), len(gaps), PAIRED
        mean = statistics.fmean(gaps)
    elif min(len(first), len(second)) > 1:
        pairs = list(second.values()), list(first.values())
        error = math.sqrt(sum(statistics.variance(x) / len(x) for x in pairs))
        mean = statistics.fmean(pairs[0]) - statistics.fmean(pairs[1])
        seeds, how = min(map(len, pairs)), APART
    else:
        return None
    if error <= 1e-12 * max(1.0, abs(mean)):
        return Difference(mean, 0.0, mean, mean, None, seeds, how)
    test = stats.ttest_rel(*pairs) if how == PAIRED else stats.ttest_ind(*pairs, equal_var=False)
    interval = test.confidence_interval(CONFIDENCE)
    return Difference(mean, error, interval.low, interval.high, test.pvalue, seeds, how)
