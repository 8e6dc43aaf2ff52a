"""From a name or a folder to a loaded backbone or model, and back."""
