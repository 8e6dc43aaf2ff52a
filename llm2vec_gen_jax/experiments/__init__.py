"""Several commands run as one study: quickstart, ablations, the reproduction and its tables and plots."""
