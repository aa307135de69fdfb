"""The charts of index.html count every neuron."""

import re

import numpy as np

from crate_mini.neurons import page_charts, summary
from crate_mini.plots import svg


def total_height(chart, kind, highest):
    """The sum of a histogram's counts, read from its outline; highest: the largest count."""
    path = re.search(f'class="{kind}" d="([^"]*)', chart)[1]
    base = svg.HEIGHT - svg.BOTTOM
    unit = base - svg.TOP
    heights = [base - float(y) for y in re.findall(r"V([\d.]+)H", path)]
    return round(sum(highest * height / unit for height in heights))


def test_charts_count_every_neuron():
    neurons = []
    for j, (density, r) in enumerate(np.random.default_rng(0).random((50, 2)).tolist()):
        scores = {"ngram_r": r, "null_r": -0.3, "init_r": None}
        neurons.append({"site": "L0", "neuron": j, "density": density, "scores": scores})
    densities = [neuron["density"] for neuron in neurons]
    for j in range(50, 53):
        scores = {"ngram_r": None}
        neurons.append({"site": "L0", "neuron": j, "density": 0.0, "scores": scores})
    places = {("L0", j): j for j in range(53)}
    assert page_charts.scatter_chart(neurons, places).count("h0") == 50
    chart = page_charts.score_chart(neurons)  # all 50 of null_r are in one bar, the highest
    assert total_height(chart, "bars", 50) == 50
    assert total_height(chart, "null", 50) == 50
    assert 'class="init"' not in chart
    assert ">-0.25<" in chart and ">-0.5<" not in chart  # ticks from the lowest edge, -0.3
    highest = max(np.histogram(np.log10(densities), np.linspace(-5, 0, 41))[0])
    chart = page_charts.density_chart(neurons)
    assert total_height(chart, "bars", highest) == 50
    assert total_height(chart, "dead", highest) == 3


def test_dots_lead_to_neurons_on_the_page():
    neurons = []
    for j in range(3):
        neurons.append({"site": "L0", "neuron": j, "density": 0.5, "scores": {"ngram_r": 0.5}})
    chart = page_charts.scatter_chart(neurons, {("L0", 0): 0, ("L0", 2): 1})
    assert 'data-neurons="0,,1"' in chart


def test_the_charts_of_all_sites_share_their_axes():
    neurons = []
    for site, null in (("L0", -0.62), ("L1", 0.1)):
        scores = {"ngram_r": 0.5, "null_r": null}
        neurons.append({"site": site, "neuron": 0, "density": 0.5, "scores": scores})
    lowest = page_charts.lowest_score(neurons, "ngram_r")
    assert lowest == -0.62
    ticks = []
    for site in ("L0", "L1"):
        of_site = [neuron for neuron in neurons if neuron["site"] == site]
        block = page_charts.distributions(of_site, "ngram_r", {}, site, lowest)
        score, density, scatter = re.findall("<svg.*?</svg>", block)
        ticks.append(
            [re.findall('<text x="([^"]*)" y="([^"]*)"', chart) for chart in (score, scatter)]
        )
        assert ">-0.5<" in score and ">-0.5<" in scatter and "-0.5" not in density
    bottoms = [[place for place in chart if place[1] == str(svg.HEIGHT - 8)] for chart in ticks[0]]
    others = [[place for place in chart if place[1] == str(svg.HEIGHT - 8)] for chart in ticks[1]]
    assert bottoms == others and ticks[0][1] == ticks[1][1]


def test_every_correlation_in_the_table_of_means_has_a_note():
    for metric in summary.CORRELATIONS:
        assert page_charts.ABOUT[metric.partition("[")[0]]
