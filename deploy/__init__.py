"""Deployment: an exported bundle, this folder, metrics/ and utils/ are all a factory needs."""
