"""Tables in Markdown."""


def markdown(head, rows):
    """A Markdown table; cells are text or numbers."""
    lines = []
    for cells in (head, *rows):
        lines.append("|" + "".join(" |" if cell == "" else f" {cell} |" for cell in cells))
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines)
