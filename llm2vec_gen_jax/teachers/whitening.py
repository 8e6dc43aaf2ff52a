"""What may be done to the alignment targets before training; beyond the paper, and off by default."""

import numpy as np

# Directions with less variance than this part of the largest carry rounding and too few texts, and are left out.
_LEAST_VARIANCE = 1e-6


def transform_targets(examples, config, questions):
    """Applies what a TeacherConfig says to the targets of Examples: averaging, then centring or whitening.

    questions: the texts of the examples' queries. Targets of negative answers are moved and scaled as the others.
    """
    if config.average:
        examples.target = average(examples.target, questions)
    if config.whiten:
        mean_E, matrix_EE = whitening(examples.target, config.whiten)
    elif config.centre:
        mean_E, matrix_EE = _mean(examples.target), None
    else:
        return
    for name in ("target", "negative_target"):
        if (targets_BE := getattr(examples, name)) is not None:
            moved_BE = targets_BE - mean_E
            setattr(examples, name, moved_BE if matrix_EE is None else moved_BE @ matrix_EE)


def average(targets_BE, questions):
    """Returns targets of which those of equal questions are their mean: of several sampled responses to a query, what
    they have in common."""
    _, group_B, count_G = np.unique(np.asarray(questions, dtype=object), return_inverse=True, return_counts=True)
    sums_GE = np.zeros((len(count_G), targets_BE.shape[1]))
    np.add.at(sums_GE, group_B, targets_BE)
    return (sums_GE / count_G[:, None])[group_B].astype(np.float32)


def whitening(targets_BE, power):
    """Returns (mean (E,), symmetric matrix (E, E)), float32: (targets - mean) @ matrix has covariance C^(1 - power),
    scaled to the trace of C, the covariance of the targets.

    A few directions dominate all vectors of an LLM. power 0 keeps them (centring), 1 gives every direction the same
    variance (ZCA; Su et al. 2021, "Whitening Sentence Representations").
    """
    mean_E = _mean(targets_BE)
    centred_BE = np.asarray(targets_BE, np.float64) - mean_E
    variances_E, axes_EE = np.linalg.eigh(centred_BE.T @ centred_BE / len(centred_BE))
    kept = variances_E > _LEAST_VARIANCE * variances_E.max()
    factors_E = np.zeros_like(variances_E)
    factors_E[kept] = variances_E[kept] ** (-power / 2)
    scale = np.sqrt(variances_E.sum() / (variances_E * factors_E**2).sum()) if kept.any() else 1.0
    return mean_E, (axes_EE * (scale * factors_E) @ axes_EE.T).astype(np.float32)


def _mean(targets_BE):
    """What all vectors share says nothing about a text."""
    return targets_BE.mean(axis=0, dtype=np.float64).astype(np.float32)
