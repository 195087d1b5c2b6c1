"""What of llama.cpp's server tests cannot run on SmolLM2, and what is adapted to it."""

from dataclasses import dataclass, field

SLOW = "one of the models that only llama.cpp's slow tests download"

# By file, by function or by case, in the order of llama.cpp's folder.
CANNOT_RUN = {
}


@dataclass(frozen=True)
class Adapted:
    any_text: bool = False  # whatever text is as good as the story model's words
    params: dict = field(default_factory=dict)  # a parametrized case's values
    constants: dict = field(default_factory=dict)  # constants in the body of the function


ADAPTED = {
}


def cannot_run(case: str) -> str | None:
    """Why a case such as test_x.py::test_y[z] cannot run, or None."""
    for key in (case, case.split("[", 1)[0], case.split("::", 1)[0]):
        if key in CANNOT_RUN:
            return CANNOT_RUN[key]
    return None
