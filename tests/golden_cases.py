"""Loads recorded cases: FAMILY.json (parameters) and FAMILY.npz (arrays) of the folder TIDE_GOLDEN_DIR names."""

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN_DIR = Path(os.environ.get("TIDE_GOLDEN_DIR") or Path(__file__).parent / "golden")


@cache
def _records(family: str) -> dict[str, dict]:
    """Parameters of each case of a family; none if either of its files is missing."""
    if not all((GOLDEN_DIR / f"{family}.{kind}").is_file() for kind in ("json", "npz")):
        return {}
    return json.loads((GOLDEN_DIR / f"{family}.json").read_text(encoding="utf-8"))["cases"]


@cache
def _arrays(family: str):
    return np.load(GOLDEN_DIR / f"{family}.npz")


class Case(dict):
    """Parameters of one case by name; its arrays as torch tensors, read when first asked for."""

    def __init__(self, family: str, key: str):
        super().__init__(_records(family)[key])
        self.family, self.key = family, key

    def has(self, name: str) -> bool:
        return f"{self.key}.{name}" in _arrays(self.family).files

    def array(self, name: str) -> torch.Tensor:
        """float32 as recorded, integers as int64; `flag` for 0/1 arrays."""
        values = torch.from_numpy(_arrays(self.family)[f"{self.key}.{name}"])
        return values if values.is_floating_point() else values.long()

    def flag(self, name: str) -> torch.Tensor:
        return self.array(name).bool()


def golden(family: str, **equal):
    """Parametrises a test by the cases of a family whose parameters equal the given ones; skipped where none is."""
    keys = [
        key
        for key, record in _records(family).items()
        if all(record.get(name) == value for name, value in equal.items())
    ]
    return pytest.mark.parametrize("case", [pytest.param(Case(family, key), id=f"{family}-{key}") for key in keys])


def assert_golden(case: Case, compute, names: tuple[str, ...] = ("loss",)) -> None:
    """Checks value and gradient of `compute(student_logits) -> losses` (one per name, the first with the gradient).

    Where the case is ill-conditioned in float32 the recorded float32 numbers are noise: the value is compared with
    the recorded float64 one, in float32 within the case's tolerance and in float64 tightly; the gradient is left out.
    """
    logits = case.array("student_logits").requires_grad_()
    losses = compute(logits)
    assert losses[0].requires_grad, "a loss without a graph breaks backward()"
    (gradient,) = torch.autograd.grad(losses[0], logits)
    if case.get("well_conditioned", True):
        for name, loss in zip(names, losses, strict=True):
            assert abs(loss.item() - case[name]) <= case["tol_loss"], name
        expected = case.array("grad_student_logits")
        assert gradient.shape == expected.shape
        assert (gradient - expected).abs().max() <= case["tol_grad"] if expected.numel() else True
        return
    exact = case["loss_f64"]
    assert abs(losses[0].item() - exact) <= case["tol_loss"]
    precise = compute(case.array("student_logits").double())[0].item()
    assert abs(precise - exact) <= max(1e-6, 2e-6 * abs(exact))
