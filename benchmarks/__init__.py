"""Speed and memory against baselines, each measured in one run."""
