"""What a run would ask, in questions and tokens, before anything is asked."""

from crate_mini.judges import explanation, probe, simulation
from crate_mini.judges.answer_cache import answer_key, token_estimate
from crate_mini.judges.simulation import MODES

SAMPLE_WORDS = "some ten words on what this neuron fires on"  # for an explanation to come
SAMPLE_NEURONS = 20  # from which the cheapest mode is found
OUT = 4  # times as much as a token in costs a token out, unless --price says


def by_mode(selected, decode, settings, modes):
    """{mode: queries of the neurons} that a run over `selected` would ask, without the probe."""
    style = likely_style(settings)
    explaining = queries_to_explain(selected, decode, settings)
    asked = {}
    for mode in modes:
        asked[mode] = list(explaining)
        for neuron, excerpts in selected.items():
            for protocol, (_, to_score) in excerpts.items():
                cases = simulation.cases(mode, to_score, decode, f"{neuron} {protocol}")
                # No two neurons share an explanation, and each is also tried with another's.
                for words in (neuron, f"not {neuron}")[: 1 + MODES[mode].needs_words]:
                    words = f"{SAMPLE_WORDS} {words}"
                    asked[mode] += [MODES[mode].ask(style, words, shown) for shown, _ in cases]
    return asked


def likely_style(settings):
    """The style of the prompts as far as it is known without asking."""
    if settings.style != "auto":
        return settings.style
    return "chat" if settings.simulator.startswith("http:") else "text"


def queries_to_explain(selected, decode, settings):
    """The queries that explain the neurons; none without a model that explains."""
    if settings.explainer == "template":
        return []
    style = likely_style(settings)
    queries = []
    for excerpts in selected.values():
        queries += [explanation.query(fit, decode, style) for fit, _ in excerpts.values()]
    return queries


def of_probe(mode, settings):
    """The queries of the probe of a mode."""
    style = likely_style(settings)
    return [MODES[mode].ask(style, words, shown) for words, shown in probe.questions(mode)]


def total(queries):
    """[questions, tokens in, tokens out] of queries, the same one counted once."""
    estimates = {answer_key("", query): token_estimate(query) for query in queries}
    tokens_in = sum(tokens for tokens, _ in estimates.values())
    tokens_out = sum(tokens for _, tokens in estimates.values())
    return [len(estimates), tokens_in, tokens_out]


def dollars(price, tokens_in, tokens_out):
    """Dollars at a price per million tokens in and out, like "0.15,0.60"; None without one."""
    if not price:
        return None
    price_in, price_out = map(float, price.split(","))
    return (price_in * tokens_in + price_out * tokens_out) / 1e6


def cost(counts, price):
    """What modes are compared by: dollars, or tokens, one out counting as OUT in."""
    _, tokens_in, tokens_out = counts
    return dollars(price or f"1,{OUT}", tokens_in, tokens_out)


def cheapest_first(selected, decode, settings):
    """The modes that --rung allows, by their price for some of the neurons, the probe included."""
    modes = simulation.chosen_modes(settings.rung)
    sample = dict(list(selected.items())[:SAMPLE_NEURONS])
    asked = by_mode(sample, decode, settings, modes)
    scale = len(selected) / max(1, len(sample))

    def price(mode):
        neurons = cost(total(asked[mode]), settings.price)
        return scale * neurons + cost(total(of_probe(mode, settings)), settings.price)

    return sorted(modes, key=price)


def estimate(selected, decode, settings, log):
    """Log what a run would ask in each mode, and which is the cheapest. Nothing is asked.

    Returns {mode: [questions, tokens in, tokens out]}, without the probe.
    """
    modes = cheapest_first(selected, decode, settings)
    explaining = queries_to_explain(selected, decode, settings)
    if explaining:
        log(f"to explain:\n{prompt_text(explaining[0])}\n")
    asked = by_mode(selected, decode, settings, modes)
    totals, lines = {}, []
    for mode in modes:
        totals[mode] = total(asked[mode])
        probing = total(of_probe(mode, settings))
        mark = ""
        if mode == modes[0] and len(modes) > 1:
            mark = "  <- the cheapest: chosen if it passes the probe"
        lines.append(f"{mode}: {words(totals[mode], settings.price)}; probe: ")
        lines[-1] += f"{words(probing, settings.price)}{mark}"
        if asked[mode]:
            log(f"{mode}, the last question:\n{prompt_text(asked[mode][-1])}\n")
    log("\n".join(lines))
    return totals


def words(counts, price):
    """Questions, tokens and dollars as text."""
    questions, tokens_in, tokens_out = counts
    text = f"{questions:,} questions, about {tokens_in:,} tokens in and {tokens_out:,} out"
    if not price:
        return text
    return f"{text}, about ${dollars(price, tokens_in, tokens_out):.2f}"


def prompt_text(query):
    """A query's prompt for people to read."""
    return query.get("prompt") or "\n".join(f"[{role}] {text}" for role, text in query["chat"])
