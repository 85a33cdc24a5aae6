"""What images and indices are worth: networks, metrics, protocols."""
