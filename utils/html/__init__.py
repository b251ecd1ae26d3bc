"""Reports as HTML pages of one file each: of one evaluation, and of several side by side."""
