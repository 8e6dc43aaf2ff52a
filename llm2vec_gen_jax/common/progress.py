"""Progress bars on long work, on process 0's terminal only."""

import sys

import jax
from tqdm import tqdm


def bar(total, unit, label, initial=0, enabled=True, scale=False):
    """Returns a tqdm bar; silent on other processes and, in logs without a terminal, updated every 10 seconds.

    scale: whether numbers are shown in thousands and millions.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=scale,
        desc=label,
        disable=not enabled or jax.process_index() != 0,
        mininterval=0.2 if terminal else 10.0,
        dynamic_ncols=terminal,
        smoothing=0.1,
    )
