"""Loading and saving of backbones, tokenizers and model directories, by name, path or hub id."""
