"""Commands in a checkout: `python -m launch.NAME`, the same as `llm2vec-gen NAME` of an installed package."""

from llm2vec_gen_jax.common import huge_pages

huge_pages.request()
