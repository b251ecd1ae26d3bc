"""Scorers: from latents and log-determinants to an anomaly map and a score per image."""
