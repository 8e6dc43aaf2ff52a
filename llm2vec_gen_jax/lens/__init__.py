"""Analysis of embeddings: logit lens, latent lens, decoded text, and an HTML report."""
