"""The one comparison of the exercises' tests: a failure says equation, input, what was expected, what came, a hint."""

import inspect
import math
import traceback
from pathlib import Path

import torch
from exercises import EXERCISES


class Mismatch(AssertionError):
    """A comparison that failed; its parts are what the grader prints and reports."""

    def __init__(self, parts: dict):
        self.parts = parts
        super().__init__("\n" + "\n".join(f"    {name:10} {text}" for name, text in parts.items()))


def expect(n: int, expected, function, *args, within: float = 1e-6, because: str = "", **kwargs) -> None:
    """Fail with a message unless function(*args, **kwargs) is `expected`: numbers, lists of them, or anything equal.

    n: the exercise. within: relative and absolute tolerance. because: what this case is about.
    """
    __tracebackhide__ = True
    inputs = call_text(function, args, kwargs)  # before the call, which may write into its arguments
    try:
        got = plain(function(*args, **kwargs))
        right, came = close(got, expected, within), show(got)
    except NotImplementedError:  # not written yet: the grader says so, and no more
        raise
    except Exception as error:
        right, came = False, describe(error)
    if not right:
        exercise = EXERCISES[n - 1]
        raise Mismatch({
            "exercise": f"{n}, {exercise.name}", "equation": exercise.equation, "input": inputs,
            "expected": show(expected) + (f"   ({because})" if because else ""), "got": came, "hint": exercise.hints[0],
        }) from None


def plain(value):
    """Tensors and tuples as nested lists."""
    if isinstance(value, torch.Tensor):
        return value.detach().tolist()
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def close(got, expected, within: float) -> bool:
    """Are two nested lists of numbers the same in shape, and to within the tolerance in value?"""
    if isinstance(expected, (list, tuple)):
        return isinstance(got, list) and len(got) == len(expected) and all(
            close(g, e, within) for g, e in zip(got, expected))
    if isinstance(expected, (int, float)):
        return isinstance(got, (int, float)) and math.isclose(got, expected, rel_tol=within, abs_tol=within)
    return type(got) is type(expected) and got == expected  # no object that says it equals everything


def show(value) -> str:
    """A value as short text."""
    if isinstance(value, float):
        return "0" if abs(value) <= 1e-12 else f"{value:.7g}"  # NaN is no 0
    if isinstance(value, (list, tuple)):
        text = "[" + ", ".join(map(show, value)) + "]"
        return text if len(text) < 300 else text[:300] + " ..."
    return repr(value) if isinstance(value, (bool, int, str, type(None))) else f"<{type(value).__name__}>"


def call_text(function, args, kwargs) -> str:
    """The call as text, every argument with its name."""
    call = inspect.signature(function).bind(*args, **kwargs)
    call.apply_defaults()
    texts = [f"{name} = {show(plain(value))}" for name, value in call.arguments.items()]
    return f"{function.__name__}({', '.join(texts)})"


def describe(error: BaseException) -> str:
    """An exception as one line, with the last place in the files that students write."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({Path(error.filename or '?').name}, line {error.lineno})"
    files = {f"{module}.py" for exercise in EXERCISES for module in exercise.modules}
    places = [(Path(frame.filename).name, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    tests = [place for place in places if place[0].startswith("test_")]
    own = [place for place in places if place[0] in files] or tests or places
    where = f" ({own[-1][0]}, line {own[-1][1]}{', in a call' * (own[-1] != places[-1])})" if own else ""
    return f"{type(error).__name__}: {str(error).strip()[:500] or 'no message'}{where}"
