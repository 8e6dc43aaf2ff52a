"""Progress bars in terminals and notebooks, shown by process 0 only."""

import sys

import jax
from tqdm.auto import tqdm


def bar(total: int | None, unit: str, label: str, initial: int = 0, enabled: bool = True, scale: bool = False) -> tqdm:
    """Returns a tqdm bar, disabled on other processes and updated every 10 seconds in log files.

    scale: whether counts are shown with the prefixes k and M.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=scale,
        desc=label,
        disable=not enabled or jax.process_index() != 0,
        mininterval=0.2 if terminal or "ipykernel" in sys.modules else 10.0,
        dynamic_ncols=terminal,
        smoothing=0.1,
    )
