"""The table of scores: each task, its mean over tasks, and what S2O changes against dense attention."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import statistics
from .answers import Answer, Answers

AVERAGE, ALL = "average", "all"
REFERENCE = "dense"
"""The backend that others are compared with, on the same prompts."""
ALLOWED = 2.0
"""Points that a task may lose."""

COLUMNS = (
    "model", "backend", "task", "length", "score", "ci95", "density", "samples",
    "difference", "difference_low", "difference_high", "same_answers",
)  # fmt: skip

Group = tuple[str, int]
"""Task and length."""


@dataclass(frozen=True)
class Row:
    """Scores of a backend: of one task at one length, or the mean over several."""

    backend: str
    task: str
    length: int | str
    score: statistics.Estimate
    density: float | None
    samples: int
    difference: statistics.Estimate | None = None
    """From the reference; None for itself, and where it was not asked."""
    same: int | None = None
    """Answers that are the reference's, character for character."""

    @property
    def worse(self) -> bool:
        """Whether more is lost than may be, as far as the mean says."""
        return self.difference is not None and round(self.difference.mean, 6) < -ALLOWED

    def cells(self, model: str) -> tuple[object, ...]:
        compared: tuple[object, ...] = ("", "", "", "")
        if self.difference:
            compared = (*(f"{value:.2f}" for value in self.difference), self.same)
        density = "" if self.density is None else f"{self.density:.3f}"
        scored = (f"{self.score.mean:.2f}", f"{self.score.ci95:.2f}", density, self.samples)
        return model, self.backend, self.task, self.length, *scored, *compared


def rows(answers: Answers, backends: Sequence[str], groups: dict[Group, int]) -> list[Row]:
    """All rows that the answers give: tasks by length, and their average at each length; then each task of several
    lengths, and the average, over all lengths, of which each counts the same.

    Args:
        groups: the number of samples by task and length.
    """
    lengths = sorted({length for _, length in groups})
    every: list[int | str] = [*lengths, ALL]
    found = []
    for length in every:
        mine = [group for group in groups if length in (ALL, group[1])]
        if length == ALL and len(lengths) == 1:
            continue
        sets = [(task, [g for g in mine if g[0] == task]) for task in dict.fromkeys(task for task, _ in mine)]
        average = [(AVERAGE, mine)] if len(sets) > 1 else []
        if length == ALL:
            sets = [(task, some) for task, some in sets if len(some) > 1]
        sets += average
        for task, some in sets:
            found += [_row(answers, backend, task, length, some, groups, backends) for backend in backends]
    return found


def _row(
    answers: Answers, backend: str, task: str, length: int | str, some: list[Group], groups: dict[Group, int],
    backends: Sequence[str],
) -> Row:  # fmt: skip
    def of(name: str) -> list[list[Answer]]:
        return [[answers.found[name, *group, index] for index in range(groups[group])] for group in some]

    given = of(backend)
    difference = same = None
    if backend != REFERENCE and REFERENCE in backends:
        pairs = [list(zip(*both, strict=True)) for both in zip(given, of(REFERENCE), strict=True)]
        difference = statistics.difference([[(a.score, b.score) for a, b in group] for group in pairs])
        same = sum(a.text == b.text for group in pairs for a, b in group)
    score = statistics.score([[answer.score for answer in group] for group in given])
    density = answers.density(backend, {group: groups[group] for group in some})
    return Row(backend, task, length, score, density, sum(map(len, given)), difference, same)


def write(path: Path, model: str, found: Sequence[Row]) -> None:
    """The table as a whole, or not at all."""
    unfinished = path.with_name(path.name + ".new")
    with unfinished.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(row.cells(model) for row in found)
    unfinished.replace(path)


def summary(found: Sequence[Row], tries: int = 0) -> str:
    """The table for people, and what follows from it.

    Args:
        tries: requests that had to be made again.
    """
    lines = list(_lines(found))
    compared = [(row, row.difference) for row in found if row.difference]
    tasks = [(row, difference) for row, difference in compared if row.task != AVERAGE]
    if compared:
        worse = [f"{row.task} at {row.length}" for row, _ in tasks if row.worse]
        single = [difference for row, difference in tasks if row.length != ALL]
        proven = sum(difference.low > -ALLOWED for difference in single)
        certain = [f"{row.task} at {row.length}" for row, difference in tasks if difference.high < -ALLOWED]
        lines.append(
            f"Worse than {REFERENCE} by more than {ALLOWED:g} points: {', '.join(worse) or 'none'}, with certainty "
            f"{', '.join(certain) or 'none'}; the interval of {proven} of {len(single)} differences excludes it."
        )
        last, difference = compared[-1]
        what = "Average over tasks" if last.task == AVERAGE else f"{last.task} at {last.length}"
        lines.append(f"{what}: {_difference(difference)}.")
    if tries:
        lines.append(f"Requests that had to be made again: {tries}.")
    return "\n".join(lines)


def _difference(found: statistics.Estimate) -> str:
    return f"{found.mean:+.1f} points ({found.low:+.1f} to {found.high:+.1f})"


def _lines(found: Sequence[Row]) -> Iterator[str]:
    for row in found:
        density = "" if row.density is None else f"density {row.density:.3f}"
        scored = f"{row.score.mean:5.1f} ± {row.score.ci95:4.1f}"
        said = f"{row.length:>6}  {row.task:20} {row.backend:6} {scored}  {density:13}"
        if row.difference:
            said += f"  {_difference(row.difference)}, {row.same} of {row.samples} answers the same"
        yield said.rstrip()
