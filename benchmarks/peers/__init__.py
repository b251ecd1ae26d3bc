"""Other projects, measured in an environment of their own."""
