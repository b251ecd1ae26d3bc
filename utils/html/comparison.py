"""The page that lays several runs side by side: tables that can be sorted."""

from collections.abc import Sequence

from utils.html.figures import metric_tables
from utils.html.page import element, page
from utils.report import cost_table
from utils.runs import Row


def comparison_page(rows: Sequence[Row]) -> str:
    """Return the tables of `utils.report` as one HTML document."""
    runs = list(dict.fromkeys(str(row.get("run") or row["settings"]["preset"]) for row in rows))
    count = f"{len(runs)} runs" if len(runs) > 1 else runs[0]
    return page(
        f"Comparison: {count}",
        element("h1", f"Comparison: {count}"),
        element(
            "p",
            "A click on the title of a column sorts by it. ± is the standard deviation over seeds.",
            class_="soft",
        ),
        metric_tables(rows, cost_table(rows)),
    )
