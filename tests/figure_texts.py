"""Reads a drawn figure as an eye does: which texts are cut off, or lie on one another."""

import itertools


def texts_of(figure):
    """Every visible text of a figure: titles, labels, ticks, legends and annotations."""
    texts = list(figure.texts)
    if figure._suptitle is not None:
        texts.append(figure._suptitle)
    for axes in figure.axes:
        texts += [axes.title, *axes.texts]
        if not axes.axison:  # then neither ticks nor names of axes are drawn
            continue
        texts += [axes.xaxis.label, axes.yaxis.label]
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            low, high = sorted(limits)
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels())
            texts += [label for place, label in ticks if low <= place <= high]
        if axes.get_legend():
            texts += axes.get_legend().get_texts()
    for legend in figure.legends:
        texts += legend.get_texts()
    return [text for text in dict.fromkeys(texts) if text.get_visible() and text.get_text().strip()]


def clashes(figure, tolerance=2):
    """Sentences about texts that leave the figure or overlap by more than `tolerance` pixels.

    Slanted texts may: their boxes are larger than they are.
    """
    figure.draw_without_rendering()
    width, height = figure.bbox.width + tolerance, figure.bbox.height + tolerance
    texts = texts_of(figure)
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    found = []
    for text, box in boxes:
        if min(box.x0, box.y0) < -tolerance or box.x1 > width or box.y1 > height:
            found.append(f"{text!r} is cut off")
    upright = [box for box, text in zip(boxes, texts) if text.get_rotation() % 90 == 0]
    for (one, a), (other, b) in itertools.combinations(upright, 2):
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        down = min(a.y1, b.y1) - max(a.y0, b.y0)
        if across > tolerance and down > tolerance:
            found.append(f"{one!r} lies on {other!r}")
    return found
