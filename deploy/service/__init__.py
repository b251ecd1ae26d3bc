"""The HTTP service: what deploy/serve.py starts."""
