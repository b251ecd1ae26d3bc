"""From image folders to records, network inputs, masks and cached features."""
