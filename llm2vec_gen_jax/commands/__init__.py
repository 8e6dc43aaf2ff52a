"""The commands: `llm2vec-gen NAME`, and `python -m launch.NAME` in a checkout."""

import gc

# With the default of 700, collections take a tenth of the time of imports and a sixth of that of tracing.
gc.set_threshold(50_000)
