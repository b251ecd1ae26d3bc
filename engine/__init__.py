"""Training, evaluation and checkpoints of any detector that is handed in."""
