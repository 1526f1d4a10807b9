"""Records -> metrics. What every benchmark's own aggregate is made of.

A *unit* is what is counted: a question, or a group of questions that is right when all of them are. A question without
a reply is wrong and its unit is not scored; it stays in the denominator, so a crash can only lower a number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from grace_vlm.evals.bootstrap import components_interval
from grace_vlm.evals.statistics import wilson_interval
from grace_vlm.evals.tasks.task import Metric, Profile, Record, Report

Measure = Callable[[Sequence[Record]], Metric]


@dataclass(frozen=True)
class Unit:
    """What is counted once. ``cluster``: what it shares with others. ``weight``: its part of a mean."""

    cluster: str
    value: float
    is_scored: bool
    weight: float = 1.0


def questions(records: Sequence[Record], cluster: str | None = None) -> list[Unit]:
    """Every record a unit; ``cluster`` is the group that it shares, none if it is independent."""
    return [
        Unit(record.id if cluster is None else record.groups[cluster], record.score, record.extract.status != "error")
        for record in records
    ]


def groups_right(records: Sequence[Record], group: str, cluster: str | None = None) -> list[Unit]:
    """Every group a unit that is right when all of its records are."""
    members: dict[str, list[Record]] = {}
    for record in records:
        members.setdefault(record.groups[group], []).append(record)
    return [
        Unit(
            name if cluster is None else rows[0].groups[cluster],
            float(all(row.score == 1.0 for row in rows)),
            all(row.extract.status != "error" for row in rows),
        )
        for name, rows in members.items()
    ]


def flat(units: Sequence[Unit], unit: str = "questions") -> Metric:
    """The share of units that are right, with Wilson's interval; units are independent and right or wrong."""
    num_right = sum(one.value == 1.0 for one in units)
    assert all(one.value in (0.0, 1.0) for one in units)
    low, high = wilson_interval(num_right, len(units))
    value = num_right / len(units) if units else 0.0
    return Metric(value, low, high, sum(one.is_scored for one in units), len(units), unit, "wilson")


def clustered(components: Sequence[Sequence[Unit]], unit: str = "questions", upper: float = 1.0) -> Metric:
    """The mean of the components' means, times ``upper``, with the cluster bootstrap's interval. Empty components are
    left out. Units are summed in an order of their own: reports do not depend on the order of records."""
    present = [
        sorted(component, key=lambda one: (one.cluster, one.value, one.weight)) for component in components if component
    ]
    means = [
        sum(one.weight * one.value for one in component) / sum(one.weight for one in component) for component in present
    ]
    value = sum(means) / len(means) if means else 0.0
    low, high = components_interval(
        [[(one.cluster, one.value, one.weight) for one in component] for component in present]
    )
    low, high = min(low, value), max(high, value)
    units = [one for component in present for one in component]
    num_scored = sum(one.is_scored for one in units)
    return Metric(upper * value, upper * low, upper * high, num_scored, len(units), unit, "bootstrap", upper)


def accuracy(records: Sequence[Record]) -> Metric:
    """Of independent questions."""
    return flat(questions(records))


def macro(records: Sequence[Record], group: str) -> Metric:
    """The mean of the categories' accuracies; ``num_total`` counts questions."""
    split = by_value(records, group)
    return clustered([questions(part) for part in split.values()])


def by_value(records: Sequence[Record], group: str) -> dict[str, list[Record]]:
    """Records by what they have for ``group``, sorted; those without it are in none."""
    split: dict[str, list[Record]] = {}
    for record in records:
        if group in record.groups:
            split.setdefault(record.groups[group], []).append(record)
    return dict(sorted(split.items()))


def report(
    task: str,
    profile: Profile,
    records: Sequence[Record],
    metrics: Mapping[str, Metric],
    headline: str,
    measure: Measure,
    categories: Sequence[str],
) -> Report:
    """The report: ``measure`` of each category's records is its entry of the breakdown."""
    assert headline in metrics
    breakdown = {name: {value: measure(part) for value, part in by_value(records, name).items()} for name in categories}
    statuses = Counter(record.extract.status for record in records)
    rules = Counter(record.extract.rule for record in records if record.extract.status != "error")
    return Report(
        task,
        profile,
        headline,
        dict(metrics),
        breakdown,
        len(records),
        statuses["unparsed"],
        statuses["error"],
        dict(sorted(rules.items())),
    )
