"""Optional transforms of the alignment targets: averaging, centering, whitening. Not in the paper."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm2vec_gen_jax.config import TeacherConfig
from llm2vec_gen_jax.data.examples import Examples

# Directions with less variance than this, relative to the largest, are dominated by noise and dropped.
_MIN_VARIANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class Transform:
    """Centering or whitening of vectors: (vectors - mean) @ matrix.

    Both are None if vectors are not changed, the matrix if they are only centered.
    """

    mean_E: NDArray[np.float32] | None = None
    matrix_EE: NDArray[np.float32] | None = None

    def __call__(self, vectors_BE: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the transformed vectors (B, E)."""
        if self.mean_E is None:
            return vectors_BE
        centered_BE: NDArray[np.float32] = vectors_BE - self.mean_E
        return centered_BE if self.matrix_EE is None else centered_BE @ self.matrix_EE


def transform_targets(
    examples: Examples, config: TeacherConfig, questions: Sequence[str], held_out: Examples | None = None
) -> Transform:
    """Transforms the targets of Examples in place, as set by a TeacherConfig: averaging, then centering or whitening.

    questions: the texts of the queries. Targets of negative answers and of held-out examples, which are not averaged,
    get the same Transform, which is returned.
    """
    target_BE: Any = examples.target
    if config.average:
        target_BE = examples.target = average(target_BE, questions)
    transform = Transform()
    if config.whiten:
        transform = Transform(*whitening(target_BE, config.whiten))
    elif config.centre:
        transform = Transform(_mean(target_BE))
    for part in [examples] if held_out is None else [examples, held_out]:
        for name in ("target", "negative_target"):
            if (targets_BE := getattr(part, name)) is not None:
                setattr(part, name, transform(targets_BE))
    return transform


def average(targets_BE: np.ndarray, questions: Sequence[str]) -> NDArray[np.float32]:
    """Returns targets (B, E) averaged over equal questions, such as over several sampled responses to a query."""
    _, group_B, count_G = np.unique(np.asarray(questions, dtype=object), return_inverse=True, return_counts=True)
    sums_GE = np.zeros((len(count_G), targets_BE.shape[1]))
    np.add.at(sums_GE, group_B, targets_BE)
    return (sums_GE / count_G[:, None])[group_B].astype(np.float32)


def whitening(targets_BE: np.ndarray, power: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns the (mean (E,), symmetric matrix (E, E)) that whiten targets with covariance C.

    (targets - mean) @ matrix has covariance C^(1 - power), rescaled to the trace of C. A few directions dominate all
    vectors of an LLM: power 0 only centers, power 1 gives every direction the same variance (ZCA; Su et al. 2021,
    "Whitening Sentence Representations").
    """
    mean_E = _mean(targets_BE)
    centered_BE = np.asarray(targets_BE, np.float64) - mean_E
    variances_E, axes_EE = np.linalg.eigh(centered_BE.T @ centered_BE / len(centered_BE))
    nonzero = variances_E > _MIN_VARIANCE * variances_E.max()
    factors_E = np.zeros_like(variances_E)
    factors_E[nonzero] = variances_E[nonzero] ** (-power / 2)
    scale = np.sqrt(variances_E.sum() / (variances_E * factors_E**2).sum()) if nonzero.any() else 1.0
    return mean_E, (axes_EE * (scale * factors_E) @ axes_EE.T).astype(np.float32)


def _mean(targets_BE):
    return targets_BE.mean(axis=0, dtype=np.float64).astype(np.float32)
