"""What a saved folder holds beside weights: the Python files, the model card, and how it is written and uploaded."""
