"""What an embedding holds: logit lens, latent lens, and a report beside what is decoded."""
