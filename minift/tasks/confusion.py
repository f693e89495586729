"""Which labels were taken for which. Not a task: this is what a task with classes has to tell beside numbers.

V labels; counts (V, V): how often each label (row) was taken for each (column).
"""

from torch import Tensor

from ..errors import table_lines

MOST = 12  # labels that the tables show one by one


def by_label(counts: Tensor, labels: list[str]) -> dict:
    """{"by_label": {label: {"precision", "recall", "f1", "support"}}, "confusion": {label: {predicted: count}}}.

    What has nothing to be divided by is 0, as in scikit-learn; confusions that never occurred are left out.
    """
    table = [[int(count) for count in row] for row in counts.tolist()]
    predicted = [sum(column) for column in zip(*table, strict=True)]
    figures = {}
    confusion = {}
    for i, label in enumerate(labels):
        support = sum(table[i])
        figures[label] = {
            "precision": ratio(table[i][i], predicted[i]),
            "recall": ratio(table[i][i], support),
            "f1": ratio(2 * table[i][i], predicted[i] + support),
            "support": support,
        }
        confusion[label] = {labels[j]: count for j, count in enumerate(table[i]) if count}
    return {"by_label": figures, "confusion": confusion}


def ratio(part: int, whole: int) -> float:
    """part / whole; 0 where there is no whole."""
    return part / whole if whole else 0.0


def describe(details: dict, width: int) -> list[str]:
    """The figures of each label, then the confusions: as a table where it fits into `width` columns, else the worst."""
    figures, confusion = details["by_label"], details["confusion"]
    total = sum(row["support"] for row in figures.values())
    commonest = max(figures, key=lambda label: figures[label]["support"])
    share = figures[commonest]["support"] / total
    table = confusion_table(confusion)
    if len(confusion) > MOST or max(map(len, table)) > width:
        table = worst_confusions(confusion, figures, width)
    guess = f"always answering {shortened(commonest, max(10, width - 36))}: accuracy {share:.4f}"
    return [*figure_lines(figures, width), "", *table, "", guess]


def figure_lines(figures: dict, width: int) -> list[str]:
    """A line for each label; of more than MOST, those with the lowest F1."""
    found = list(figures.items())
    lines = []
    if len(found) > MOST:
        lines = [f"of {len(found)} labels the {MOST} with the lowest F1 (minift eval --json tells all):"]
        found = sorted((item for item in found if item[1]["support"]), key=lambda item: item[1]["f1"])[:MOST]
    rows = []
    for label, row in found:
        shares = [f"{row[name]:.4f}" for name in ("precision", "recall", "f1")]
        rows.append((shortened(label, max(10, width - 36)), *shares, f"{row['support']:,}"))
    return [*lines, *table_lines(("label", "precision", "recall", "f1", "support"), rows, "<>>>>")]


def confusion_table(confusion: dict) -> list[str]:
    """The whole table: a row for each true label, a column for each predicted one."""
    labels = list(confusion)
    rows = [(label, *(f"{confusion[label].get(other, 0):,}" for other in labels)) for label in labels]
    return table_lines(("true \\ predicted", *labels), rows, "<" + ">" * len(labels))


def worst_confusions(confusion: dict, figures: dict, width: int) -> list[str]:
    """The most frequent confusions, at most ten, one a line."""
    found = []
    for label, row in confusion.items():
        found += [(count, label, other) for other, count in row.items() if other != label]
    if not found:
        return ["no label was taken for another"]
    found = sorted(found, key=lambda item: -item[0])[:10]
    room = max(10, (width - 22) // 2)
    rows = []
    for count, label, other in found:
        support = f"{figures[label]['support']:,}"
        rows.append((f"{count:,}", support, shortened(label, room), shortened(other, room)))
    return table_lines(("wrong", "of", "true label", "taken for"), rows, ">><<")


def shortened(name: str, most: int) -> str:
    """A name in at most this many characters: its two ends, for names often differ in one of them."""
    if len(name) <= most:
        return name
    front = (most - 3) // 2
    return name[:front] + "..." + name[len(name) - (most - 3 - front) :]
