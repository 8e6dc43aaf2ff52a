"""Reading an embedding: logit lens, latent lens, and a page that shows them beside what is decoded."""
