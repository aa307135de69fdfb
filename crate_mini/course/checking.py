"""What a check is made of: seeded random cases, and a learner whose answers are compared.

Everything is float64, so that a right answer agrees with ours to many digits and a wrong one does
not. A wrong answer is diagnosed: first by the mistakes that the exercise declares, then by what can
be wrong with any tensor (type, shape, dtype, nan, sign, factor, transposed).
"""

import inspect

import torch

TOLERANCE = 1e-6  # relative to the largest value: other orders of summation differ by 1e-12


class Wrong(Exception):
    """What is wrong with a learner's work, in one sentence."""


class Case:
    """Random numbers of one case; the same seed gives the same case on every machine."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low, high):
        """An int in low..high, both included."""
        return torch.randint(low, high + 1, (), generator=self.generator).item()

    def uniform(self, low, high):
        """A float in low..high."""
        share = torch.rand((), generator=self.generator, dtype=torch.float64).item()
        return low + (high - low) * share

    def normal(self, *shape):
        """Standard normal numbers, float64."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)


def cases(n):
    """n cases, with the seeds 1 to n."""
    for seed in range(1, n + 1):
        yield Case(seed)


class Learner:
    """The functions that a learner has written.

    names: {name: object} of the learner's file. mistakes: {function: [wrong functions]}, as
    MISTAKES of an exercise. Every method takes a function of the solution, for its name.
    """

    def __init__(self, names, mistakes):
        self.names, self.mistakes = names, mistakes

    def function(self, solution):
        """The learner's function of the same name. Raises Wrong if there is none."""
        name = solution.__name__
        if not callable(self.names.get(name)):
            raise Wrong(f"{name} is missing; the file has to define {_signature(solution)}.")
        return self.names[name]

    def call(self, solution, *args):
        """What the learner's function returns. Raises Wrong if it changes its arguments."""
        function = self.function(solution)
        copies = [arg.clone() if torch.is_tensor(arg) else arg for arg in args]
        try:
            inspect.signature(function).bind(*copies)
        except TypeError:
            raise Wrong(
                f"{solution.__name__} takes other arguments; expected {_signature(solution)}."
            ) from None
        result = function(*copies)
        for name, arg, copy in zip(_parameters(solution), args, copies):
            if torch.is_tensor(arg) and not torch.equal(arg, copy):
                raise Wrong(f"{solution.__name__} changes its argument {name}; work on a copy.")
        return result

    def tensor(self, solution, shape, *args):
        """The learner's result, which has to be a tensor of this shape."""
        result = self.call(solution, *args)
        expected = torch.empty(tuple(shape))
        if problem := type_problem(result, expected) or shape_problem(result, expected):
            raise Wrong(f"{solution.__name__} {problem}{_seen(solution, args)}.")
        return result

    def agree(self, solution, *args):
        """Compare the learner's result with the solution's, which is returned.

        Raises Wrong with a diagnosis.
        """
        expected = solution(*args)
        result = self.call(solution, *args)
        if same(result, expected):
            return expected
        name, seen = solution.__name__, _seen(solution, args)
        for mistake in self.mistakes.get(solution, []):
            if _is_result_of(mistake, args, result):
                raise Wrong(f"{name}: {mistake.__doc__}{seen}.")
        if isinstance(expected, tuple):
            raise Wrong(f"{name} {_tuple_problem(result, expected)}{seen}.")
        raise Wrong(f"{name} {problem_of(result, expected)}{seen}.")


def _is_result_of(mistake, args, result):
    try:
        return same(result, mistake(*args))
    except Exception:  # a mistake that is impossible for these arguments
        return False


def _parameters(function):
    return list(inspect.signature(function).parameters)


def _signature(function):
    return f"{function.__name__}({', '.join(_parameters(function))})"


def _seen(function, args):
    """ " (for Z (3, 4), eps2 0.1)": the arguments of a failure, tensors by their shapes."""
    words = []
    for name, arg in zip(_parameters(function), args):
        if torch.is_tensor(arg):
            words.append(f"{name} {tuple(arg.shape)}")
        elif isinstance(arg, float):
            words.append(f"{name} {arg:.3g}")
        elif arg is None or isinstance(arg, int):
            words.append(f"{name} {arg}")
    return f" (for {', '.join(words)})" if words else ""


# ---- comparing -----------------------------------------------------------------------------------


def same(result, expected):
    """Whether two results agree: tensors with dtype and shape, numbers of any kind, tuples."""
    if isinstance(expected, tuple):
        fits = isinstance(result, (tuple, list)) and len(result) == len(expected)
        return fits and all(map(same, result, expected))
    if type_problem(result, expected) or shape_problem(result, expected):
        return False
    return not dtype_problem(result, expected) and _close(result, expected)


def _close(result, expected):
    left, right = _double(result), _double(expected)
    finite = right[right.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    atol = TOLERANCE * max(largest, 1e-9)
    return torch.allclose(left, right, rtol=0, atol=atol, equal_nan=True)


def _double(value):
    return torch.as_tensor(value).detach().double()


# ---- diagnosing ----------------------------------------------------------------------------------


def problem_of(result, expected):
    """What is wrong with a result that does not agree, as the rest of a sentence."""
    for look in (type_problem, shape_problem, dtype_problem, value_problem):
        if problem := look(result, expected):
            return problem
    return "differs"


def _tuple_problem(result, expected):
    if not isinstance(result, (tuple, list)) or len(result) != len(expected):
        return f"has to return {len(expected)} results, separated by commas"
    for i, (left, right) in enumerate(zip(result, expected), 1):
        if not same(left, right):
            return f"(result {i} of {len(expected)}) {problem_of(left, right)}"
    return "differs"


def type_problem(result, expected):
    if result is None:
        return "returns None; is a `return` missing?"
    if torch.is_tensor(result):
        return None
    if torch.is_tensor(expected) and expected.dim() > 0:
        shape = tuple(expected.shape)
        return f"returns a {type(result).__name__}; expected a tensor of shape {shape}"
    if not isinstance(result, (int, float)):
        return f"returns a {type(result).__name__}; expected a number"
    return None


def shape_problem(result, expected):
    got, wanted = torch.as_tensor(result).shape, torch.as_tensor(expected).shape
    if got == wanted:
        return None
    problem = f"returns shape {tuple(got)}, expected {tuple(wanted)}"
    return f"{problem}: transposed?" if got == wanted[::-1] else problem


def dtype_problem(result, expected):
    if not (torch.is_tensor(result) and torch.is_tensor(expected)):
        return None
    names = [str(t.dtype).removeprefix("torch.") for t in (result, expected)]
    if expected.dim() == 0 or names[0] == names[1]:
        return None
    return (
        f"returns {names[0]}, expected {names[1]}; new tensors take the dtype of the arguments, "
        "as in torch.zeros_like or dtype=Z.dtype"
    )


def value_problem(result, expected):
    left, right = _double(result), _double(expected)
    if not left.isfinite().all() and right.isfinite().all():
        bad = "nan" if left.isnan().any() else "infinity"
        return f"returns {bad} where the right answer is finite"
    if _close(-left, right):
        return "has the opposite sign"
    factor = ((left * right).sum() / right.square().sum()).item()
    if abs(factor) > 1e-9 and _close(left / factor, right):
        return f"is {factor:.4g} times the right answer"
    if left.dim() == 2 and left.shape[0] == left.shape[1] and _close(left.T, right):
        return "is transposed"
    place = (left - right).abs().flatten().argmax()
    values = f"{left.flatten()[place]:.5g}, expected {right.flatten()[place]:.5g}"
    if left.dim() == 0:
        return f"returns {values}"
    index = [int(i) for i in torch.unravel_index(place, left.shape)]
    return f"is wrong: at {index} it has {values}"
