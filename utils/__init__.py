"""Configuration, files, images and pictures shared by every layer."""
