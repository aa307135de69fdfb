"""Every exercise: its stub fails, its solution passes, its mistakes get their sentences.

A check runs in this process here; test_grading.py runs files in processes of their own.
"""

import shutil

import numpy as np
import pytest
import torch

from crate_mini import intervene, model, reference, stats
from crate_mini.course import exercise, grading
from crate_mini.course.checking import Case, Learner, Wrong
from crate_mini.course.exercises import (
    attention,
    autoencoder_loss,
    cached_tokens,
    controls,
    counting,
    gradient,
    hooked_neuron,
    looking_back,
    proximal_maps,
    rates,
    sparse_step,
    token_simulator,
)
from crate_mini.neurons.simulators import NgramTable
from crate_mini.sae.autoencoder import SAE
from crate_mini.training import device

EXERCISES = exercise.exercises()
PYTHON = [chosen for chosen in EXERCISES if "FILE" not in chosen.facts]
FACTS = {"TITLE": str, "STARS": int, "MINUTES": int, "TEACHES": str, "HINTS": tuple}
WITHOUT = "raise NotImplementedError"
NAMES = {chosen.name: chosen for chosen in EXERCISES}

# Solutions with one change: (exercise, solution's text, wrong text, part of the sentence).
WRONG = [
    ("rates", "return 0.5 *", "return -0.5 *", "coding_rate has the opposite sign (for Z ("),
    ("rates", "Z.T @ Z)", "Z @ Z.T)", "line 8: `return 0.5"),
    ("rates", "return sum", "return 3 * sum", "compression_rate is 3 times the right answer"),
    (
        "gradient",
        "return total",
        "return total.T",
        "returns shape (8, 7), expected (7, 8): transposed? (f",
    ),
    (
        "autoencoder_loss",
        "E + c)",
        "E + c).T",
        "encode returns shape (7, 2), expected (2, 7): trans",
    ),
    ("gradient", "zeros_like(Z)", "zeros_like(Z, dtype=torch.float32)", None),
    ("gradient", "return total", "return total.float()", "float32, expected float64"),
    ("gradient", "new = new + kappa", "new = new - kappa", "compression_step is wrong: at ["),
    ("attention", "return total", "total", "mssa returns None; is a `return` missing?"),
    ("attention", "u @ U_k.T", "u", "line 13: `total = total + scores.softmax(-1) @ u` raises Ru"),
    ("attention", '"-inf"', '"nan"', "mssa returns nan where the right answer is finite"),
    ("sparse_step", "residual = x", "a -= 1; residual = x", "ista_step changes its argument a"),
    (
        "sparse_step",
        "def lasso(",
        "def lass(",
        "lasso is missing; the file has to define lasso(x, ",
    ),
    ("sparse_step", "def lasso(x, a, D, lam)", "def lasso(x, a, D)", "lasso takes other arguments"),
    ("looking_back", "0.5 **", "1.0 **", "which is not longer; lengths have to fall"),
    ("looking_back", "0.5 **", "0.99 **", "scores token 1 highest, not its predecessor"),
    ("looking_back", ".argmax(-1)", ".argmax(-1).tolist()", "returns a list; expected a tensor"),
    ("cached_tokens", "squeeze(1), cache", "squeeze(1)", "has to return 2 results"),
    (
        "hooked_neuron",
        "        handle.remove()",
        "        pass",
        "the hook stays on the model after",
    ),
    (
        "hooked_neuron",
        "    try:\n        return model(ids)\n    finally:\n        handle.remove()",
        "    logits = model(ids)\n    handle.remove()\n    return logits",
        "the hook stays on the model when the model raises an exception",
    ),
    ("controls", "order.roll(1)", "order", "is its own partner"),
    ("controls", "[order] = order.roll(1)", "[:] = 0", "is not a permutation"),
    ("controls", "torch.randperm(n, generator=generator)", "torch.arange(n)", "every seed gives"),
    (
        "controls",
        "torch.stack([values[documents == name].mean() for name in names])",
        "values",
        "times too narrow: tokens are drawn instead of documents",
    ),
    ("controls", "means[drawn].mean(1)", "means[drawn].flatten()", "times too wide"),
    ("controls", "[0.025, 0.975]", "[0.975, 0.025]", "is empty; return (low, high)"),
    ("controls", "[0.025, 0.975]", "[0.16, 0.84]", "quantiles 0.025 and 0.975"),
    (
        "proximal_maps",
        "scatter(-1, places, values)",
        "add(torch.where(b >= values[:, -1:], b, 0)).relu()",
        "of equal codes are kept, the budget is",
    ),
    ("faster_kernel", "before[j]", "before[0]", "codes["),
    ("faster_kernel", "- eta * lam[j]", "", "expected"),
    ("faster_kernel", "y[i] = row", "y[d] = row", "it writes outside y"),
    ("faster_kernel", "j < h; j++) sum +=", "j < h; j += 2) sum +=", "expected"),
    ("faster_kernel", "int64_t j = 0;", "int64_t j = 0", "it does not compile:"),
    ("faster_kernel", "ista_forward", "ista", "ista_forward is missing"),
    ("fused_kernel", "__syncthreads();\n  }", "}", "(for N"),
    ("fused_kernel", "i < rows * d", "i < kRows * d", "it writes outside y"),
]


def verdict(chosen, text, folder):
    path = folder / chosen.file
    path.write_text(text, encoding="utf-8")
    return grading.examine(chosen.number, path)


def needs_compiler(chosen):
    if chosen.name == "fused_kernel" and not shutil.which("g++"):
        pytest.skip("no g++")
    if chosen.name == "faster_kernel" and not shutil.which("c++"):
        pytest.skip("no C++ compiler")


@pytest.mark.parametrize("chosen", EXERCISES, ids=lambda chosen: chosen.name)
def test_the_stub_fails_and_the_solution_passes(chosen, tmp_path):
    needs_compiler(chosen)
    stub = verdict(chosen, chosen.stub(), tmp_path)
    assert stub.outcome == "fail"
    if chosen in PYTHON:
        assert "is not written yet (line" in stub.sentence
    passed = verdict(chosen, chosen.solution(), tmp_path)
    assert passed.outcome == "pass", passed.sentence


@pytest.mark.parametrize("chosen", EXERCISES, ids=lambda chosen: chosen.name)
def test_an_exercise_says_all_a_learner_needs(chosen):
    assert {name: type(chosen.facts[name]) for name in FACTS} == FACTS
    assert 1 <= chosen.facts["STARS"] <= 3
    stub = chosen.stub()
    assert chosen.title in stub and f"check {chosen.number}" in stub
    assert all(hint.split()[0] in stub for hint in chosen.facts["HINTS"])
    assert "\n    " in chosen.task  # a picture or an equation
    if chosen in PYTHON:
        written = [node for node in stub.split("\n\n\n") if node.startswith("def ")]
        assert written and all(text.count(WITHOUT) == 1 for text in written)


def mistakes():
    for chosen in PYTHON:
        for function, wrong in chosen.module().MISTAKES.items():
            for mistake in wrong:
                yield pytest.param(
                    chosen, function, mistake, id=f"{chosen.name}-{mistake.__name__}"
                )


@pytest.mark.parametrize("chosen, function, mistake", list(mistakes()))
def test_a_mistake_gets_its_sentence(chosen, function, mistake):
    module = chosen.module()
    names = {**vars(module), function.__name__: mistake}
    with pytest.raises(Wrong) as error:
        module.check(Learner(names, module.MISTAKES))
    assert str(error.value).startswith(f"{function.__name__}: {mistake.__doc__}")


@pytest.mark.parametrize("name, old, new, part", WRONG)
def test_a_wrong_variant_is_diagnosed(name, old, new, part, tmp_path):
    chosen = NAMES[name]
    needs_compiler(chosen)
    solution = chosen.solution()
    assert old in solution
    result = verdict(chosen, solution.replace(old, new), tmp_path)
    if part is None:  # harmless: promoted where it is used
        assert result.outcome == "pass"
        return
    assert result.outcome == "fail"
    assert part in result.sentence
    assert "\n" not in result.sentence


def test_every_exercise_has_at_least_two_wrong_variants():
    count = dict.fromkeys(NAMES, 0)
    for name, *_, part in WRONG:
        count[name] += part is not None
    for case in mistakes():
        count[case.values[0].name] += 1
    assert min(count.values()) >= 2


def test_a_kernel_that_is_not_faster_fails(tmp_path, monkeypatch):
    chosen = NAMES["faster_kernel"]
    needs_compiler(chosen)
    monkeypatch.setattr(chosen.module(), "speedup", lambda yours, theirs: 1.2)
    result = verdict(chosen, chosen.solution(), tmp_path)
    assert (
        result.sentence == "right, and 1.20 times as fast as the naive kernel; 2 times is the goal."
    )


def test_a_second_launch_is_noticed(tmp_path):
    chosen = NAMES["fused_kernel"]
    needs_compiler(chosen)
    launch = "  LAUNCH(fused, grid"
    lines = chosen.solution().split(launch)[1].split(";")[0]
    twice = chosen.solution().replace(launch, f"{launch}{lines};\n{launch}")
    assert "it launches 2 kernels" in verdict(chosen, twice, tmp_path).sentence


@pytest.mark.parametrize("name", ["faster_kernel", "fused_kernel"])
def test_without_a_compiler_it_says_so(name, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda word: None)
    result = verdict(NAMES[name], NAMES[name].solution(), tmp_path)
    assert result.outcome == "unusable"
    assert "needs a C++ compiler" in result.sentence


def test_the_naive_kernel_in_the_stub_is_the_one_of_csrc():
    source = exercise.in_checkout("csrc", "ista_naive.cpp").read_text(encoding="utf-8")
    loops = source.split("float* residuals) {")[1].split("\n}")[0]
    assert loops in NAMES["faster_kernel"].stub()


def test_outside_a_checkout_kernels_cannot_be_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(exercise, "ROOT", tmp_path)
    result = verdict(NAMES["fused_kernel"], "", tmp_path)
    assert result.outcome == "unusable"
    assert "run the course from a checkout" in result.sentence


def test_a_check_that_breaks_on_a_result_still_answers_in_a_sentence(tmp_path):
    odd = "class Odd:\n    def __mul__(self, other): raise ValueError\n"
    text = odd + "def coding_rate(Z, eps2):\n    return Odd()\n"
    result = verdict(NAMES["rates"], text, tmp_path)
    assert result.sentence.startswith("coding_rate returns a Odd; expected a number")


def test_names_are_those_of_the_order():
    files = {path.stem for path in exercise.FOLDER.glob("*.py")} - {"__init__"}
    assert files == set(exercise.ORDER)
    assert len(exercise.ORDER) >= 12


@pytest.mark.parametrize("seed", range(5))
def test_solutions_agree_with_the_reference(seed):
    """With reference.py, the model and the chapters, whose tests are elsewhere."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    Z, U, eps2 = normal(7, 6), normal(2, 6, 3), 0.3
    u = torch.einsum("nd,kdp->nkp", Z, U)
    close(rates.coding_rate(Z, eps2), reference.coding_rate(Z, eps2))
    close(rates.compression_rate(Z, U, eps2), reference.compression_rate(u, eps2))
    expected = reference.compression_gradient(Z, U, eps2)
    close(gradient.compression_gradient(Z, U, eps2), expected)
    expected = reference.compression_step(Z, U, 0.1, eps2)
    close(gradient.compression_step(Z, U, 0.1, eps2), expected)
    for causal in (False, True):
        close(attention.mssa(Z, U, 0.5, causal), reference.mssa(Z, U, 0.5, causal))
    x, a, D = normal(4, 5), normal(4, 9).relu(), normal(5, 9)
    close(sparse_step.lasso(x, a, D, 0.2), reference.lasso(x, a, D, 0.2))
    expected = reference.ista_step(a, x - a @ D.T, D, 0.1, 0.2)
    close(sparse_step.ista_step(x, a, D, 0.1, 0.2), expected)
    path = sparse_step.lasso_path(x, D, 0.1, 0.2, 3)
    codes = reference.ista_codes(x, D, 0.1, 0.2, 3)
    close(path[-1], reference.lasso(x, codes, D, 0.2).mean())
    close(proximal_maps.top_k(a, 3), reference.top_k(a, 3))
    close(proximal_maps.soft(a, 0.1), reference.ista_step(a, torch.zeros_like(x), D, 1.0, 0.1))


@pytest.mark.parametrize("seed", range(3))
def test_solutions_agree_with_the_model_and_its_chapters(seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    u, gate = normal(6, 4), normal(4)
    shifted = model.shift_keys(u[None, None], gate)[0, 0]
    close(looking_back.shift_keys(u, gate.sigmoid()), shifted)
    heads, cache = normal(2, 6, 4), None
    for t in range(6):
        y, cache = cached_tokens.attend_next(heads[:, t], cache)
        close(y, model.attend(heads[None], heads[None], heads[None])[0, :, t])
    config = model.preset("2L", vocab_size=40, block_size=9, n_embd=8, n_head=2)
    sizes = (40, 8, 2, config.n_code)
    assert counting.n_parameters(*sizes) == model.LM(config).n_params()
    assert counting.training_flops(*sizes, 9, config.ista_steps) == device.flops_per_token(config)
    lm = model.LM(config).double()
    ids = torch.arange(9)[None]
    with torch.no_grad(), intervene.steer(lm, [intervene.Intervention(1, 5, "set", 2.0)]):
        steered = lm(ids)
    close(hooked_neuron.set_neuron(lm, ids, 1, 5, 2.0).detach(), steered)
    sae = SAE(6, 12, l1=0.3, seed=seed).double().requires_grad_(False)
    x = normal(5, 6).relu() + 0.5
    features = autoencoder_loss.encode(x, sae.E, sae.b, sae.c)
    loss = autoencoder_loss.sae_loss(x, sae.E, sae.W, sae.b, sae.c, 0.3)
    close([loss, features], list(sae.loss(x)))


def test_statistics_of_the_solutions_agree_with_stats():
    case = Case(1)
    tokens, acts = token_simulator.neuron(case, n=300, V=9)
    sums = torch.bincount(tokens, weights=acts, minlength=9)[:, None].numpy()
    counts = torch.bincount(tokens, minlength=9).numpy()
    no_pairs = np.zeros((0, 2), int), np.zeros(0), np.zeros((0, 1))
    table = NgramTable(counts, sums, *no_pairs, shrink=(0.5, 10.0)).values[:9, 0]
    ours = token_simulator.token_table(tokens, acts, 9, 0.5)
    np.testing.assert_allclose(ours.numpy(), table, rtol=1e-6)
    simulated = ours[tokens]
    r = stats.pearson(acts.numpy(), simulated.numpy())[0][0]
    close(token_simulator.correlation(acts, simulated).item(), r)
    documents = torch.arange(20).repeat_interleave(5)
    values = case.normal(100)
    interval = controls.bootstrap_interval(values, documents, 4000, case.generator)
    means = values.view(20, 5).mean(1).numpy()
    np.testing.assert_allclose(interval, stats.bootstrap_interval([means]), atol=0.05)


def close(result, expected):
    torch.testing.assert_close(result, expected)
