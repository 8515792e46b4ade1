"""Tables on a terminal."""

from collections.abc import Collection, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table


def terminal_table(columns: Sequence[str], *, title: str, words: Collection[str] = (), caption: str = "") -> Table:
    """Lay out a table whose columns fit into 80 characters where rules between them would cut them.

    Args:
        columns: Their heads, of which each word gets a line; underscores are spaces.
        title: What stands above it.
        words: Heads of the columns of words, which begin at the left, as the first does; numbers end at the right.
        caption: What stands below it.

    Returns:
        A table without rows.
    """
    table = Table(
        title=title,
        caption=caption or None,
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    for i, name in enumerate(columns):
        is_words = i == 0 or name in words
        head = "\n".join(name.replace("_", " ").split())  # which nobody else wraps, cutting words as it comes
        table.add_column(head, justify="left" if is_words else "right", overflow="fold")
    return table
